"""What regions add to a step of full-size denoisers, counted on a fake GPU: kernels, bytes, memory.

    python -m eval.step_cost [NAME ...]

No GPU is needed and nothing is run: shapes alone are followed, in bfloat16, of one image or video, two predictions a step. The
second guided step is counted, as the first one makes constants. Writes results/step-cost.json.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from tqdm import tqdm

from eval.common.programs import command_line
from eval.cost.fake_step import Trace, build, fake_cuda, on_cuda
from goca_guidance import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.joint import PackedFamily
from goca_guidance.hooks.guided import GuidedCall
from goca_guidance.method.records import TokenLayout
from goca_guidance.method.scfg import SpatialGuidanceScale


RESULT = Path("results/step-cost.json")
WORDS = {"cat": [2], "plant": [5], "bus": [8], "dog": [11], "grass": [14], "</s>": [15]}


@dataclass(frozen=True)
class Case:
    """A denoiser of its published size, and the arguments of one call of it.

    `tokens`: of pixels along each axis; `batched`: both predictions are one batch.
    """

    denoiser: Callable[[], torch.nn.Module]
    arguments: Callable[[int], dict[str, Any]]
    tokens: tuple[int, ...]
    batched: bool = False


def _text(b: int, tokens: int, width: int) -> torch.Tensor:
    return torch.empty(b, tokens, width, device="meta")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CASES = {
    "sd-1.5, 512 px": Case(
        lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        lambda b: {"sample": _meta(b, 4, 64, 64), "timestep": _meta(b), "encoder_hidden_states": _text(b, 77, 768)},
        (64, 64),
        batched=True,
    ),
    "flux.1, 1024 px": Case(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=False),
        lambda b: {
            "hidden_states": _meta(b, 4096, 64),
            "encoder_hidden_states": _text(b, 512, 4096),
            "pooled_projections": _meta(b, 768),
            "timestep": _meta(b),
            "img_ids": _meta(4096, 3),
            "txt_ids": _meta(512, 3),
        },
        (64, 64),
    ),
    "qwen-image, 1024 px": Case(
        lambda: diffusers.QwenImageTransformer2DModel(guidance_embeds=False),
        lambda b: {
            "hidden_states": _meta(b, 4096, 64),
            "encoder_hidden_states": _text(b, 64, 3584),
            "timestep": _meta(b),
            "img_shapes": [[(1, 64, 64)]] * b,
        },
        (64, 64),
    ),
    "flux.2 dev, 1024 px": Case(
        lambda: diffusers.Flux2Transformer2DModel(guidance_embeds=False),
        lambda b: {
            "hidden_states": _meta(b, 4096, 128),
            "encoder_hidden_states": _text(b, 512, 15360),
            "timestep": _meta(b),
            "img_ids": _meta(b, 4096, 4),
            "txt_ids": _meta(b, 512, 4),
        },
        (64, 64),
    ),
    "auraflow, 1024 px": Case(
        lambda: diffusers.AuraFlowTransformer2DModel(sample_size=128, pos_embed_max_size=9216),
        lambda b: {
            "hidden_states": _meta(b, 4, 128, 128),
            "encoder_hidden_states": _text(b, 256, 2048),
            "timestep": _meta(b),
        },
        (64, 64),
        batched=True,
    ),
    "wan 2.1 1.3B, 480 x 832 px, 81 frames": Case(
        lambda: diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        lambda b: {
            "hidden_states": _meta(b, 16, 21, 60, 104),
            "timestep": _meta(b),
            "encoder_hidden_states": _text(b, 512, 4096),
        },
        (21, 30, 52),
    ),
    "ltx-video, 512 x 704 px, 161 frames": Case(
        diffusers.LTXVideoTransformer3DModel,
        lambda b: {
            "hidden_states": _meta(b, 21 * 16 * 22, 128),
            "encoder_hidden_states": _text(b, 128, 4096),
            "timestep": _meta(b),
            "encoder_attention_mask": _meta(b, 128),
            "num_frames": 21,
            "height": 16,
            "width": 22,
        },
        (21, 16, 22),
        batched=True,
    ),
    "cogvideox 2B, 480 x 720 px, 49 frames": Case(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
        ),
        lambda b: {
            "hidden_states": _meta(b, 13, 16, 60, 90),
            "encoder_hidden_states": _text(b, 226, 4096),
            "timestep": _meta(b),
        },
        (13, 30, 45),
        batched=True,
    ),
}


def measure(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A stock step, and the second of two guided ones."""
    images = 2 if case.batched else 1
    with (
        fake_cuda(),
        patch.object(PackedFamily, "_read", lambda self, given: (*case.tokens[-2:], 0)),  # off positions, once a call
        patch.object(TokenLayout, "alone", False),  # off the layout, on the CPU
    ):
        denoiser = build(case.denoiser, dtype)
        halves = [on_cuda(case.arguments(images), dtype) for _ in range(1 if case.batched else 2)]

        def step(scale):
            made = [denoiser(**half, return_dict=False)[0] for half in halves]
            u, c = made[0].chunk(2) if case.batched else reversed(made)
            return u + scale * (c - u)

        with Trace() as stock:
            step(5.0)
        call = GuidedCall(
            denoiser, [], GoCAConfig(), SCFGConfig(), images=1, prompts=1, separate=None, region_tokens=WORDS
        )
        with call.installed():
            step(SpatialGuidanceScale(5.0, call.rate))
            with Trace() as guided:
                step(SpatialGuidanceScale(5.0, call.rate))
        heads = _heads(call)
    every = heads * math.prod(case.tokens) ** 2 * 4
    return {
        "tokens": math.prod(case.tokens),
        "stock_kernels": stock.model.kernels,
        "stock_gb": round(stock.model.bytes / 1e9, 2),
        "added_kernels": guided.ours.kernels,
        "added_gb": round(guided.ours.bytes / 1e9, 2),
        "stock_peak_mb": round(stock.peak / 2**20),
        "added_peak_mb": round((guided.peak - stock.peak) / 2**20),
        "largest_tensor_mb": round(guided.ours.largest / 2**20),
        "map_of_all_heads_mb": round(every / 2**20),
    }


def _heads(call: GuidedCall) -> int:
    layer = call.family.attention_modules[call.family.preset.reference]
    return getattr(layer, "heads", None) or layer.num_heads


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {'; '.join(CASES)}")
    names = parser.parse_args(arguments).names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"expected names among {'; '.join(CASES)}, but got {', '.join(unknown)}")
    for name in tqdm(names):
        _keep({"family": name, **measure(CASES[name])})


def _keep(row: dict[str, Any]) -> None:
    """Into the result beside the others, which an interrupted run has left there."""
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    rows = {other["family"]: other for other in [*rows, row]}
    kept = [rows[name] for name in CASES if name in rows]
    result = {"command": "python -m eval.step_cost", "torch": torch.__version__, "diffusers": diffusers.__version__}
    new = RESULT.with_suffix(".new")
    new.write_text(json.dumps(result | {"rows": kept}, indent=1) + "\n")
    os.replace(new, RESULT)


if __name__ == "__main__":
    main()
