"""Our pipelines on tiny stock ones: what the tests of every family share, and what a call may leave behind: nothing."""

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from goca_guidance import GoCASCFGPipeline, SCFGConfig
from goca_guidance.method.scfg import SpatialGuidanceScale
from tests.helpers.families import (
    BERT_TOKENS,
    FAMILIES,
    HUNYUAN_T5_TOKENS,
    MAX_TOKENS,
    controlnet,
    image_to_image,
    inpaint,
    run,
    stock_pipeline,
)


ATTENTION, KERNELS = torch.nn.functional.scaled_dot_product_attention, dict(_AttentionBackendRegistry._backends)
PROMPT = "a cat on grass"
PROMPTS = ["a cat and a bus on grass", "potted plant"]
LABELS = [("cat", "bus", "grass"), ("potted", "plant")]
NEUTRAL = SCFGConfig(rate_min=1, rate_max=1)
STEP_CALLBACK = ["sd", "sdxl", "flux", "sd3", "hunyuan"]  # PixArt has the old `callback`, which changes nothing
END_SINK = ["pixart-alpha", "pixart-sigma", "flux"]  # the start token is a region in the others
VARIANTS = [(build, name) for build in (image_to_image, inpaint) for name in ("sd", "sdxl", "flux", "sd3")]
VARIANTS += [(controlnet, name) for name in STEP_CALLBACK]
every_family = pytest.mark.parametrize("name", FAMILIES)


def guided(stock, **kwargs) -> GoCASCFGPipeline:
    """Ours on the same modules."""
    pipe = GoCASCFGPipeline.from_pipe(stock, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pair(name: str) -> tuple[diffusers.DiffusionPipeline, GoCASCFGPipeline]:
    """A stock pipeline, and ours on its modules."""
    stock = stock_pipeline(name)
    return stock, guided(stock)


def latents(pipe, name: str, *args, **kwargs) -> torch.Tensor:
    return run(pipe, name, *args, **kwargs).images


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the size of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def wide(name: str) -> dict:
    height = FAMILIES[name].call["height"]
    return {"height": height, "width": 3 * height // 2}


def batch(name: str, prompts: list[str], seeds: list[int], **kwargs) -> dict:
    """Arguments of a batch, each image with its seed; Flux wants as many negative prompts."""
    negative = {"negative_prompt": [""] * len(prompts)} if name == "flux" else {}
    return {"prompt": prompts, "generator": [torch.Generator().manual_seed(s) for s in seeds]} | negative | kwargs


def labelled(name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return words if name in END_SINK else (*words, "<sos>")


def hooks_of(module: torch.nn.Module) -> int:
    """Forward hooks anywhere in a module, but for those by which transformers' encoders capture hidden states for good."""
    found = [
        hook for m in module.modules() for table in (m._forward_hooks, m._forward_pre_hooks) for hook in table.values()
    ]
    return sum(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in found)


def assert_untouched(*modules: torch.nn.Module) -> None:
    """No hook is left in the modules, nor anything of ours in torch and in the kernels of diffusers."""
    assert sum(map(hooks_of, modules)) == 0
    assert torch.nn.functional.scaled_dot_product_attention is ATTENTION
    assert _AttentionBackendRegistry._backends == KERNELS
    assert torch.overrides._get_current_function_mode_stack() == []


def assert_clean(pipe) -> None:
    """Nothing of ours is left in the pipeline either."""
    assert_untouched(*(part for part in pipe.components.values() if isinstance(part, torch.nn.Module)))
    assert pipe._goca_call is None
    assert not isinstance(getattr(pipe, "_guidance_scale", 1.0), SpatialGuidanceScale)


def embedded(stock, name: str) -> dict:
    """What the stock pipeline encodes, as arguments of its call."""
    pooled = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    masked = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    encode, length = stock.encode_prompt, {"max_sequence_length": MAX_TOKENS}
    if name == "sd":
        return dict(zip(pooled[:2], encode(PROMPT, "cpu", 1, True), strict=True))
    if name == "sdxl":
        return dict(zip(pooled, encode(PROMPT), strict=True))
    if name == "sd3":
        return dict(zip(pooled, encode(PROMPT, None, None, **length), strict=True))
    if name == "flux":
        (positive, pooled_positive, _), (negative, pooled_negative, _) = encode(PROMPT, **length), encode("", **length)
        return dict(zip(pooled, [positive, negative, pooled_positive, pooled_negative], strict=True))
    if name == "hunyuan":
        order = [masked[0], masked[2], masked[1], masked[3]]
        lengths = enumerate((BERT_TOKENS, HUNYUAN_T5_TOKENS))
        found = [encode(PROMPT, text_encoder_index=i, max_sequence_length=length) for i, length in lengths]
        return dict(zip([*order, *(f"{key}_2" for key in order)], [*found[0], *found[1]], strict=True))
    return dict(zip(masked, encode(PROMPT, **length), strict=True))
