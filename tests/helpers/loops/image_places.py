"""Where text and pixels stand among the keys of a denoiser's attention, said by hand for every denoiser, and how to look.

Nothing of the library's rows is used: they are held against this.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.helpers.loops.kernels import Call, Kernels
from tests.helpers.released import Layer


FIRST = {  # token of the shorter prompt of the tests, by pipeline, where padding stands before it
    "CogView4": 13,
    "CogView4Control": 13,
    "Ideogram4": 45,
    "Kolors": 253,
    "KolorsImg2Img": 253,
    "Lumina": 5,
}
Places = tuple[list[int], list[int]]  # of text and of pixels, in their order


# ---- by hand ---------------------------------------------------------------------------------------------------------
def _run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def _text(given: dict) -> int:
    return given["encoder_hidden_states"].shape[1]


def _text_first(given: dict, image: int, keys: int, layer: str) -> Places:
    return _run(0, _text(given)), _run(_text(given), keys - _text(given))


def _registers(given: dict, image: int, keys: int, layer: str) -> Places:
    """Eight tokens of neither before all others."""
    return _run(8, _text(given)), _run(8 + _text(given), keys - 8 - _text(given))


def _cross(given: dict, image: int, keys: int, layer: str) -> Places:
    return (_run(0, keys), []) if layer.endswith("attn2") else ([], _run(0, keys))


def _lumina2(given: dict, image: int, keys: int, layer: str) -> Places:
    """The image's own valid text, and its pixels right behind."""
    valid, pixels = int(given["encoder_attention_mask"][image].sum()), _pixels(given)
    return _run(0, valid), _run(valid, pixels)


def _pixels(given: dict) -> int:
    """In patches of 2 x 2."""
    return math.prod(given["hidden_states"].shape[-2:]) // 4


def _hidream(given: dict, image: int, keys: int, layer: str) -> Places:
    """Three texts last; 16 x 4 pixels, and others that are padding."""
    text = given["encoder_hidden_states_t5"].shape[1] + 2 * given["encoder_hidden_states_llama3"].shape[2]
    return _run(keys - text, text), _run(0, 64)


def _hunyuan_image(given: dict, image: int, keys: int, layer: str) -> Places:
    """Valid text stands first, of the glyphs before that of the prompt; nothing is in quotes here."""
    text = _text(given) + given["encoder_hidden_states_2"].shape[1]
    return _run(keys - text, text), _run(0, keys - text)


def _kandinsky3(given: dict, image: int, keys: int, layer: str) -> Places:
    return ([], _run(0, keys)) if "attentions.0." in layer else (_run(0, keys), [])


def _cascade(given: dict, image: int, keys: int, layer: str) -> Places:
    """Behind the text are what CLIP makes of all of it, and of a picture."""
    pixels, text = math.prod(given["sample"].shape[-2:]), given["clip_text"].shape[1]
    return _run(pixels, text), _run(0, pixels)


def _ideogram(given: dict, image: int, keys: int, layer: str) -> Places:
    """32 x 16 latent pixels in patches of 2 x 2, behind the text."""
    return _run(0, keys - 128), _run(keys - 128, 128)


PLACES: dict[str, Callable[[dict, int, int, str], Places]] = {
    "AuraFlowTransformer2DModel": _registers,
    "CogView3PlusTransformer2DModel": _text_first,
    "CogView4Transformer2DModel": _text_first,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "Ideogram4Transformer2DModel": _ideogram,
    "Kandinsky3UNet": _kandinsky3,
    "Lumina2Transformer2DModel": _lumina2,
    "LuminaNextDiT2DModel": _cross,
    "PRXTransformer2DModel": _text_first,
    "SanaTransformer2DModel": _cross,
    "StableCascadeUNet": _cascade,
    "UNet2DConditionModel": _cross,
    "UNet2DConditionModel with added keys": _text_first,
}


def places_of(denoiser: torch.nn.Module) -> Callable[[dict, int, int, str], Places]:
    added = any(name.endswith("add_k_proj") for name, _ in denoiser.named_modules())
    return PLACES[type(denoiser).__name__ + (" with added keys" if added and hasattr(denoiser, "down_blocks") else "")]


# ---- looking ---------------------------------------------------------------------------------------------------------
def looked(denoiser: torch.nn.Module, layers: Sequence[str], call: Call, silent: bool = False) -> dict[str, dict]:
    """What the kernel was first given in each layer, with the `raw` queries, while a call is repeated."""
    look = Kernels(denoiser, layers, silent)
    first = {name: calls[0] for name, calls in look(call).items() if calls}
    return {name: given | ({"raw": look.raw[name]} if name in look.raw else {}) for name, given in first.items()}


def layer_of(
    denoiser: torch.nn.Module, name: str, seen: dict, image: int, places: Places, grid: tuple[int, int]
) -> Layer:
    """Attention of one layer for one image, float64, as `tests.helpers.released` takes it."""
    q, k, v = (seen[which][image].double() for which in ("query", "key", "value"))
    logits = q @ k.mT * (seen.get("scale") or q.shape[-1] ** -0.5)
    if (mask := seen.get("attn_mask")) is not None:
        of_image = mask[image % len(mask)]
        logits = logits.masked_fill(~of_image, -math.inf) if mask.dtype == torch.bool else logits + of_image.double()
    probs, (text, pixels) = logits.softmax(-1), places
    written = probs @ v
    if text and pixels and q.shape[1] == k.shape[1]:  # joint attention: the pixels' queries alone
        probs, written = probs[:, pixels], written[:, pixels]
    features = {"output": written.transpose(0, 1).flatten(1)}
    if "raw" in seen and len(seen["raw"][image]) == probs.shape[1]:
        features["query"] = seen["raw"][image].double()
    if text:  # else no head is weighted
        written = written @ _projection(denoiser, name).unflatten(1, (len(q), -1)).permute(1, 2, 0)
    return Layer(grid, probs[..., text], probs[..., pixels], written, features)


def _projection(denoiser: torch.nn.Module, name: str) -> Tensor:
    """c x (h d); Lumina-Next has a gate for each head of the cross-attention before it, a single block one for all it does."""
    module = denoiser.get_submodule(name)
    if module.to_out is None:
        return denoiser.get_submodule(name.rpartition(".")[0]).proj_out.weight[:, : module.to_q.out_features].double()
    last = module.to_out if isinstance(module.to_out, torch.nn.Linear) else module.to_out[0]
    weight = last.weight.double()
    if type(denoiser).__name__ == "LuminaNextDiT2DModel" and name.endswith("attn2"):
        gate = denoiser.get_submodule(name.removesuffix(".attn2")).gate.tanh().double()
        return weight * gate.repeat_interleave(weight.shape[1] // len(gate))
    return weight
