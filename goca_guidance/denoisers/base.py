"""What an adapter of a denoiser answers, with the answers for a transformer that no adapter names."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.utils import logging
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import ModuleList, Sequential

from goca_guidance.config import LayerPreset
from goca_guidance.method.records import AttentionView


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DenoiserCall:
    """What one call of a denoiser predicts: so many images, of this latent size, from so many text tokens.

    `latent`: H W, or F H W of a video. `others`: tokens of other pictures in the same sequence, behind the image's own.
    `order` b n: for each image the tokens of the sequence as a view has them, where images are laid out differently.
    """

    batch: int
    latent: tuple[int, ...]
    text: int
    others: int = 0
    order: Int[Tensor, "b n"] | None = None


@dataclass(frozen=True)
class Family:
    """Adapter of a denoiser with text cross-attention layers `...attn2` beside self-attention layers `...attn1`.

    As it stands, it serves a transformer that no other adapter names; the others change what differs.
    """

    denoiser: Any  # a torch module of diffusers
    compiled: Any = None  # the compiled module that was looked through

    pipeline: ClassVar[str | None] = None  # the stock text-to-image pipeline, where its name follows from the denoiser
    encoders: ClassVar[tuple[tuple[str, str], ...]] = (("text_encoder", "tokenizer"),)  # in the order of the text
    side_by_side: ClassVar[bool] = False  # encoders share token positions, and the first one is read
    sink: ClassVar[str] = "start"  # the token that looks at the background: "start" or "end"
    sink_measured: ClassVar[bool] = True  # whether anyone has looked, on trained weights
    unconditional_sink: ClassVar[bool] = True  # in which prediction it does
    packed: ClassVar[bool] = False  # a patch's pixels are channels of the denoiser's input
    modules: ClassVar[str] = r"[^.]*block.*"  # names of attention modules, in network order: those of the blocks
    samples: ClassVar[tuple[str, ...]] = ("sample", "hidden_states")  # the argument that is denoised
    # Arguments that are text, in the order of the tokens.
    texts: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    segmented: ClassVar[bool] = False  # attention is asked for segments of the queries one by one, the pixels last
    branches: ClassVar[tuple[int, ...]] = (0, 1)  # order of a batch of two predictions: the unconditional one first
    gathered: ClassVar[bool] = False  # padding before an encoder's tokens is taken out of the denoiser's text
    by_frame: ClassVar[bool] = False  # a video's frames lie side by side in the batch of the layers
    by_image: ClassVar[bool] = False  # whether the loop mixes each image of a batch by itself

    # ---- layers ------------------------------------------------------------------------------------------------------
    @cached_property
    def attention_modules(self) -> dict[str, Any]:
        """Every attention module of the denoiser's blocks by its full name, in network order.

        Modules outside the blocks, such as an image prompt's projection, are no layers.
        """
        kinds, named = (Attention, AttentionModuleMixin, MochiAttention), self.denoiser.named_modules()
        return {name: m for name, m in named if isinstance(m, kinds) and re.fullmatch(self.modules, name)}

    @cached_property
    def preset(self) -> LayerPreset:
        """The layers that GoCA reads."""
        preset = self._generic_preset()
        _warn_of_generic_preset(type(self.denoiser).__name__)
        return preset

    def _text_layers(self) -> tuple[str, ...]:
        """Layers that read text beside layers that read pixels; others are left out, whatever they are called.

        The x4 upscaler's `attn1` reads text too (`only_cross_attention`), and an `attn2` may read pixels
        (`double_self_attention`).
        """
        reads_text = {
            n: getattr(m, "is_cross_attention", n.endswith("attn2")) for n, m in self.attention_modules.items()
        }
        layers = [name for name, reads in reads_text.items() if reads and name.endswith(".attn2")]
        text = tuple(
            n
            for n, beside in zip(layers, self_attention_beside(layers), strict=True)
            if not reads_text.get(beside, True)
        )
        if not text:
            raise ValueError(
                "Expected text cross-attention layers (`attn2` beside `attn1`) in the denoiser's blocks, but "
                f"{type(self.denoiser).__name__} has none, and no row of facts names it: use one of the supported families."
            )
        processors = (
            getattr(self.attention_modules[layer], "processor", None) for layer in self_attention_beside(text)
        )
        if any("Linear" in type(processor).__name__ for processor in processors):
            raise ValueError(
                f"Expected softmax attention, but the self-attention of {type(self.denoiser).__name__} is linear and has no "
                "map to read: use one of the supported families."
            )
        return text

    def _generic_preset(self) -> LayerPreset:
        """Ours, for one grid."""
        text = self._text_layers()
        return all_layers(text, self_attention_beside(text))

    # ---- calls -------------------------------------------------------------------------------------------------------
    def bound(self, args: tuple, kwargs: Mapping) -> dict[str, Any]:
        """The arguments of a call of the denoiser by name, from what a forward pre-hook sees."""
        return self._signature.bind_partial(self.denoiser, *args, **kwargs).arguments

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.denoiser).forward)

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        """What is denoised, of the arguments by name."""
        return next(given[name] for name in self.samples if name in given)

    def hand(self, args: tuple, kwargs: Mapping[str, Any], sample: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call with another sample."""
        name = next((name for name in self.samples if name in kwargs), None)
        given = self.as_given(sample)
        return ((given, *args[1:]), dict(kwargs)) if name is None else (args, {**kwargs, name: given})

    def as_given(self, sample: Tensor) -> Any:
        """A sample in the form of the denoiser's argument."""
        return sample

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        """The texts [b n c] of a call in the order of their tokens."""
        return [given[name] for name in self.texts if given.get(name) is not None]

    def read(self, layer: Tensor) -> Tensor:
        """What the pipeline makes of a text encoder's layer [b n c], to the bit, before it is the denoiser's text."""
        return layer

    def call(self, args: tuple, kwargs: Mapping) -> DenoiserCall:
        """Sizes of a call of the denoiser, from what a forward pre-hook sees."""
        return self.sizes(self.bound(args, kwargs))

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        """Sizes of a call of the denoiser, from its arguments by name."""
        sample, texts = self.sample(given), self.text(given)
        if not texts:
            raise ValueError(f"Expected text tokens for the denoiser, but {type(self.denoiser).__name__} got none.")
        return DenoiserCall(len(sample), self.size(given), sum(text.shape[1] for text in texts), self.others(given))

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """Height and width of the latent, behind its number of frames if it is a video, from the arguments by name."""
        sample = self.sample(given)
        if sample.ndim != 4:
            raise ValueError(f"Expected image latents of shape b c H W, but the denoiser got {tuple(sample.shape)}.")
        return sample.shape[2], sample.shape[3]

    def others(self, given: Mapping[str, Any]) -> int:
        """Tokens of other pictures that stand behind the image's own in the sequence."""
        return 0

    def once(self, positions: Tensor, read: Callable[[Tensor], tuple[int, ...]]) -> tuple[int, ...]:
        """What positions of tokens say, read once for each tensor of them: it waits for the device."""
        key = id(positions), 0 if positions.is_inference() else positions._version
        if key not in self._read_once:
            self._read_once[key] = positions, read(positions)
        return self._read_once[key][1]

    @cached_property
    def _read_once(self) -> dict[tuple[int, int], tuple[Tensor, tuple[int, ...]]]:
        """By the identity of the positions, which are kept so that no others get it."""
        return {}

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        """What the tokens of a layer's attention call are; None where they are not all of the layer's, and no others."""
        grid, text = self.grid(name, call.latent), name.endswith("attn2")
        if (queries, keys) != (math.prod(grid), call.text if text else queries):
            return None
        tokens: dict[str, Any] = {"text" if text else "image": slice(0, keys)}
        return AttentionView(grid, **tokens)

    def grid(self, name: str, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width of a layer's pixel tokens, behind the frames if any: the latent's in patches."""
        patches = (self.patch_frames, self.patch, self.patch)
        return tuple(side // patch for side, patch in zip(latent, patches[-len(latent) :], strict=True))

    def project(self, name: str) -> Callable[[Tensor], Tensor]:
        """The output projection of a layer, bias included.

        Where a block projects attention and feed-forward at once, the latter's part, which comes last, is fed zeros.
        """
        layer = self.attention_modules[name]
        if getattr(layer, "to_out", None) is None:
            last: Any = self.denoiser.get_submodule(name.rpartition(".")[0]).proj_out
        else:
            last = layer.to_out[0] if isinstance(layer.to_out, (ModuleList, Sequential)) else layer.to_out
        return lambda x: last(F.pad(x, (0, last.in_features - x.shape[-1])))

    # ---- latents as the denoiser takes them --------------------------------------------------------------------------
    @property
    def patch(self) -> int:
        """Latent pixels on a side of a pixel token, at the least."""
        size = getattr(self.denoiser.config, "patch_size", None) or 1
        return size[-1] if isinstance(size, (tuple, list)) else size

    @property
    def patch_frames(self) -> int:
        """Latent frames of a pixel token."""
        config = self.denoiser.config
        size = getattr(config, "patch_size", None)
        along = size[0] if isinstance(size, (tuple, list)) and len(size) == 3 else None
        return along or getattr(config, "patch_size_t", None) or 1

    @property
    def channels(self) -> int | None:
        """Of the latent, at the most: what a prediction has more is no picture (a variance). None is all of it."""
        return getattr(self.denoiser.config, "in_channels", None)

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        """Shape, behind the images, of the latents that a pipeline takes; None for a free side, or where nobody knows."""
        return channels, None, None

    def pack(self, maps: Float[Tensor, "b c *S"]) -> Tensor:
        """Maps in the form of the denoiser's input and prediction."""
        return maps

    def unpack(self, prediction: Tensor, call: DenoiserCall) -> Float[Tensor, "b c *S"]:
        """The inverse of `pack`."""
        return prediction


def row(base: type[Family], **facts: Any) -> type[Family]:
    """A family that differs from `base` by facts alone."""
    if unknown := [name for name in facts if not hasattr(base, name)]:
        raise TypeError(f"Expected facts that {base.__name__} has, but got {', '.join(unknown)}.")
    return type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **facts})


@cache
def _warn_of_generic_preset(denoiser: str) -> None:
    """Once for each kind of denoiser."""
    logger.warning(
        f"No preset is known for {denoiser}: a generic one reads all its text attention layers. Look at the regions before "
        "you rely on them."
    )


def check_whole(family: Family) -> None:
    """Refuse a denoiser whose attention calls are skipped or split: they would be seen in part."""
    denoiser = family.denoiser
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            "Expected a denoiser that runs every block at every step, but a cache is enabled on it: call "
            "`denoiser.disable_cache()`."
        )
    processors = [getattr(module, "processor", None) for module in family.attention_modules.values()]
    split = any(getattr(processor, "_parallel_config", None) is not None for processor in processors)
    split = split or len(set((getattr(denoiser, "hf_device_map", None) or {}).values())) > 1
    if split or any(type(parameter).__name__ == "DTensor" for parameter in denoiser.parameters()):
        raise ValueError(
            "Expected a whole denoiser on each device, but this one is split (context or tensor parallel): run one process "
            "for each image instead."
        )


def argument(args: tuple, kwargs: Mapping, position: int, *names: str):
    """An argument of a call, by any of its names or by its position."""
    return next((kwargs[name] for name in names if name in kwargs), args[position] if len(args) > position else None)


def all_layers(text: tuple[str, ...], self_attention: tuple[str, ...], **choices: Any) -> LayerPreset:
    """All layers that read text; the middle one is the reference, and the middle third refines."""
    count = len(text)
    refine = self_attention[count // 3 : max(count // 3 + 1, 2 * count // 3)]
    return LayerPreset(text, self_attention, text[count // 2], refine, **choices)


def words_alone(text: tuple[str, ...]) -> LayerPreset:
    """Of a denoiser whose self-attention has no map: nothing is compared, and nothing refines."""
    return LayerPreset(text, (), text[len(text) // 2], (), order=0)


def self_attention_beside(layers: Iterable[str]) -> tuple[str, ...]:
    """The self-attention layers beside cross-attention layers: `...attn2` to `...attn1`."""
    return tuple(name.removesuffix("attn2") + "attn1" for name in layers)
