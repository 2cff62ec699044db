"""Denoisers of videos: a row of facts each, code where facts do not do. Latents are b c F H W where nothing else is said.

Nobody has picked layers for them, or looked for their sinks: all layers are read, heads are uniform, as for Flux, and maps are
brought to a bounded grid before pixels are compared with pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, Family, all_layers, row, words_alone
from goca_guidance.denoisers.joint import JointFamily, valid_first
from goca_guidance.method.records import AttentionView


ROWS = 1024  # of a layer's attention that are compared with the reference; what is held before that was seen
WORKING_SIZE = 24  # Wan's 21 x 30 x 52 tokens become 12 x 14 x 24


class Frames:
    """What families of videos share: latents of five axes, on a bounded grid."""

    channel: ClassVar[int] = 1  # axis of the channels in the denoiser's input and prediction

    @cached_property
    def preset(self) -> LayerPreset:
        bounded = {"working_size": WORKING_SIZE, "agreement_rows": ROWS}
        return replace(super().preset, heads="uniform", **bounded)  # type: ignore[misc]

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """Frames, height and width of the latent."""
        sample = self.sample(given)  # type: ignore[attr-defined]
        if sample.ndim != 5:
            raise ValueError(
                f"Expected video latents of five axes, but the denoiser got {tuple(sample.shape)}: pass use_scfg=False."
            )
        return tuple(sample.movedim(self.channel, 1).shape[2:])

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        return None

    def pack(self, maps: Float[Tensor, "b c *S"]) -> Tensor:
        return maps.movedim(1, self.channel)

    def unpack(self, prediction: Tensor, call: DenoiserCall) -> Float[Tensor, "b c *S"]:
        return prediction.movedim(self.channel, 1)


# ---- text cross-attention --------------------------------------------------------------------------------------------
class CrossFamily(Family):
    """Layers that read text, `...attn2`, beside those that read the pixels of all frames, `...attn1`."""

    sink = "end"
    sink_measured = False
    unconditional_sink = False
    modules = r"(transformer_)?blocks\.\d+\.attn[12]"

    @cached_property
    def preset(self) -> LayerPreset:
        return self._generic_preset()


class VideoFamily(Frames, CrossFamily):
    """Cross-attention of a video. Pictures beside the text are read by a kernel call of their own, which is passed over."""


class KandinskyFamily(VideoFamily):
    """`Kandinsky5Transformer3DModel`: channels come last; pictures are videos of one frame.

    A refiner has mixed the tokens of the text. It has no output projection by the usual name.
    """

    channel = -1
    modules = r"visual_transformer_blocks\.\d+\.(self|cross)_attention"

    def _generic_preset(self) -> LayerPreset:
        text = tuple(name for name in self.attention_modules if name.endswith("cross_attention"))
        return all_layers(text, tuple(name.replace("cross", "self") for name in text))

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        if given.get("sparse_params") is not None:
            raise ValueError(
                "Expected attention of all tokens to all, but this Kandinsky 5 computes blocks of it (nabla), its tokens in "
                "another order: use a model with regular attention, or pass use_scfg=False."
            )
        return super().size(given)

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        return super().view(call, name.replace("cross_attention", "attn2"), queries, keys)


class HeliosFamily(VideoFamily):
    """`HeliosTransformer3DModel`: frames of the past stand before the video's own in self-attention."""

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        pixels = math.prod(self.grid(name, call.latent))
        if name.endswith("attn1") and queries == keys >= pixels:
            return AttentionView(self.grid(name, call.latent), image=slice(keys - pixels, keys))
        return super().view(call, name, queries, keys)


class SanaVideoFamily(VideoFamily):
    """`SanaVideoTransformer3DModel`: self-attention is linear and has no map; words are read, and nothing refines."""

    sink = "start"

    def _generic_preset(self) -> LayerPreset:
        return words_alone(tuple(name for name in self.attention_modules if name.endswith(".attn2")))


class AllegroFamily(VideoFamily):
    """`AllegroTransformer3DModel`: its text has an axis more."""

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        return [text.flatten(1, -2) for text in super().text(given)]


class CosmosFamily(VideoFamily):
    """`CosmosTransformer3DModel`: beside the text a picture's tokens may stand (2.5)."""

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        text = given["encoder_hidden_states"]
        return [text[0] if isinstance(text, tuple) else text]


class PackedVideoFamily(VideoFamily):
    """`LTXVideoTransformer3DModel`, `LTX2VideoTransformer3DModel`: tokens b n c, row-major over frames, rows and columns.

    Their numbers are arguments, or told by the positions of the tokens, `video_coords` b 3 n (LTX-2: and where each ends).
    Whole frames that condition the video, before its own or behind them, are frames like these.
    """

    channel = -1
    patch = 1
    patch_frames = 1

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        tokens, positions = self.sample(given).shape[1], given.get("video_coords")
        found = _told(given) if positions is None else self.once(positions, _grid)
        if math.prod(found) != tokens:
            raise ValueError(
                f"Expected whole frames of {found[-2]} x {found[-1]} tokens, but the denoiser got {tokens} tokens in all: "
                "pictures of other sizes are in the sequence, and cannot be told apart. Pass use_scfg=False."
            )
        return found

    def pack(self, maps: Float[Tensor, "b c *S"]) -> Float[Tensor, "b n c"]:
        return maps.flatten(2).mT

    def unpack(self, prediction: Float[Tensor, "b n c"], call: DenoiserCall) -> Float[Tensor, "b c *S"]:
        return prediction.mT.unflatten(2, call.latent)


def _told(given: Mapping[str, Any]) -> tuple[int, ...]:
    return given["num_frames"], given["height"], given["width"]


def _grid(positions: Float[Tensor, "b 3 n *ends"]) -> tuple[int, ...]:
    """Frames, rows and columns by where tokens start, and perhaps end; no frames where they are not alike."""
    starts = positions[0, :, :, 0] if positions.ndim == 4 else positions[0]
    rows, columns = (len(axis.unique()) for axis in starts[1:])
    if starts.shape[1] % (rows * columns):
        return 0, rows, columns
    places = starts[1:].unflatten(1, (-1, rows, columns))
    alike = bool((places == places[:, :1]).all())
    return places.shape[1] if alike else 0, rows, columns


# ---- joint attention -------------------------------------------------------------------------------------------------
class JointVideoFamily(Frames, JointFamily):
    """Text and the pixels of all frames attend to each other in one call."""


class FramepackFamily(JointVideoFamily):
    """`HunyuanVideoFramepackTransformer3DModel`: frames of the past, the video's own, tokens of a picture, and the text.

    The text of a single video is cut where it ends.
    """

    text_first = False

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        call, mask = super().sizes(given), given["encoder_attention_mask"]
        return replace(call, text=int(mask.sum())) if call.batch == 1 else call  # the denoiser itself waits for it

    def others(self, given: Mapping[str, Any]) -> int:
        """Tokens of the picture."""
        return given["image_embeds"].shape[1]

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        last = keys - call.text - call.others
        if (start := last - math.prod(grid)) < 0:
            return None
        return AttentionView(grid, slice(keys - call.text, keys), slice(start, last))


class HunyuanVideo15Family(JointVideoFamily):
    """`HunyuanVideo15Transformer3DModel`: the video's tokens, and then of each image the valid ones of a picture, of ByT5's
    text, which is what a prompt has in quotes, and of Qwen's text, and the rest of all three.

    A refiner has mixed the tokens of Qwen's text before the first layer that is read.
    """

    text_first = False

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        """In the order of the tokens; only so many channels as both texts have, and zeros for the picture."""
        texts = [given["encoder_hidden_states_2"], given["encoder_hidden_states"]]
        masks = [given["encoder_attention_mask_2"], given["encoder_attention_mask"]]
        channels, picture = min(text.shape[-1] for text in texts), given["image_embeds"]
        pixels = texts[0].new_zeros(*picture.shape[:2], channels)
        shown = picture.any().expand(picture.shape[:2])  # the denoiser asks the same
        parts = torch.cat([pixels, *(text[..., :channels].to(pixels) for text in texts)], 1)
        valid = torch.cat([shown, *(mask.bool() for mask in masks)], 1)
        return [valid_first(parts, valid)]


# ---- rows ------------------------------------------------------------------------------------------------------------
_ATTN1 = r"transformer_blocks\.\d+\.attn1"
VIDEOS: dict[str, type[Family]] = {
    "WanTransformer3DModel": row(VideoFamily, pipeline="WanPipeline"),
    "WanVACETransformer3DModel": row(VideoFamily, pipeline="WanVACEPipeline"),
    "WanAnimateTransformer3DModel": row(VideoFamily, pipeline="WanAnimatePipeline"),
    "ChronoEditTransformer3DModel": row(VideoFamily, pipeline="ChronoEditPipeline"),
    "SkyReelsV2Transformer3DModel": row(VideoFamily, pipeline="SkyReelsV2Pipeline"),
    "AnyFlowTransformer3DModel": row(VideoFamily, pipeline="AnyFlowPipeline", channel=2),
    "HeliosTransformer3DModel": row(HeliosFamily, pipeline="HeliosPipeline"),
    "CosmosTransformer3DModel": row(CosmosFamily, pipeline="Cosmos2TextToImagePipeline"),
    "AllegroTransformer3DModel": row(AllegroFamily, pipeline="AllegroPipeline"),
    "LTXVideoTransformer3DModel": row(PackedVideoFamily, pipeline="LTXPipeline"),
    "LTX2VideoTransformer3DModel": row(PackedVideoFamily, pipeline="LTX2Pipeline", sink="start", gathered=True),
    "Kandinsky5Transformer3DModel": row(KandinskyFamily, pipeline="Kandinsky5T2VPipeline"),
    "SanaVideoTransformer3DModel": row(SanaVideoFamily, pipeline="SanaVideoPipeline"),
    "CogVideoXTransformer3DModel": row(JointVideoFamily, pipeline="CogVideoXPipeline", modules=_ATTN1, channel=2),
    "EasyAnimateTransformer3DModel": row(JointVideoFamily, pipeline="EasyAnimatePipeline", modules=_ATTN1),
    "HunyuanVideoTransformer3DModel": row(JointVideoFamily, pipeline="HunyuanVideoPipeline", text_first=False),
    "HunyuanVideo15Transformer3DModel": row(HunyuanVideo15Family, pipeline="HunyuanVideo15Pipeline"),
    "HunyuanVideoFramepackTransformer3DModel": row(FramepackFamily, pipeline="HunyuanVideoFramepackPipeline"),
    "MochiTransformer3DModel": row(JointVideoFamily, pipeline="MochiPipeline", modules=_ATTN1, text_first=False),
}
