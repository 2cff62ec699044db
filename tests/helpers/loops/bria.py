"""Bria 3.2, FIBO, FIBO Edit and FIBO 2, tiny.

All mix as `u + s (c - u)`, one call a step, the unconditional half first; FIBO 2 with two calls, the conditional one first.
Keys are text, then pixels; FIBO Edit puts the pictures behind them, told apart by the first column of `img_ids` (0, then 1,
2, ...). FIBO's block i replaces half of each text token's channels by the text encoder's layer i. FIBO 2's stream is gist
tokens, which a Perceiver made of the text, pixels, and pictures; words are keys in the cross-attention of a few layers only.
"""

import json
from functools import partial
from typing import Any

import diffusers
import transformers

from tests.helpers.families import FAMILIES
from tests.helpers.loops.flux_like import flux2_vae
from tests.helpers.loops.qwen import picture
from tests.helpers.loops.texts_qwen import WIDTH, byte_level_tokenizer, qwen3_vl, qwen3_vl_processor
from tests.helpers.loops.tiny_loop import TinyLoop, in_patches, in_tokens, seeded
from tests.helpers.loops.zimage import flow_vae


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4]}
_LAYERS = {"num_layers": 1, "num_single_layers": 1}
START = 128000  # the id that FIBO reads for an empty prompt: Llama 3's start


def _bria() -> dict[str, Any]:
    transformer = diffusers.BriaTransformer2DModel(in_channels=16, joint_attention_dim=32, **_LAYERS, **_HEADS)
    texts = FAMILIES["flux"].components()
    texts = {"text_encoder": texts["text_encoder_2"], "tokenizer": texts["tokenizer_2"]}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": flow_vae(), "scheduler": scheduler, **texts}


def smollm3() -> dict[str, Any]:
    """SmolLM3 and a byte-level tokenizer without a template or a start token; the end token pads, as with its own."""
    tokenizer = byte_level_tokenizer(["<|end_of_text|>"], eos_token="<|end_of_text|>", pad_token="<|end_of_text|>")
    config = transformers.SmolLM3Config(
        vocab_size=START + 1,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=START,
    )
    return {"text_encoder": transformers.SmolLM3ForCausalLM(config), "tokenizer": tokenizer}


def _fibo() -> dict[str, Any]:
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, **_LAYERS, **_HEADS
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False],
        scale_factor_spatial=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, **smollm3()}


def _fibo2() -> dict[str, Any]:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(1, 2, 3, 4, 5),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=(8, 4, 4),
        axes_lens=(256, 32, 32),
    )
    parts = {"transformer": transformer, "vae": flux2_vae(), "text_encoder": qwen3_vl(36)}
    parts |= {"processor": qwen3_vl_processor()}
    return parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def _instruction(prompt: str) -> str:
    return json.dumps({"edit_instruction": prompt})


_CALL = {"guidance_scale": 4.0, "negative_prompt": ""}
_FIBO = _CALL | {"height": 64, "width": 96, "negative_prompt": "red"}  # 4 x 6 tokens
LOOPS: dict[str, TinyLoop] = {
    "BriaPipeline": TinyLoop(
        partial(seeded, _bria), _CALL | {"height": 32, "width": 48, "max_sequence_length": 24}, packed=in_patches
    ),
    "BriaFiboPipeline": TinyLoop(partial(seeded, _fibo), _FIBO, packed=in_tokens),
    "BriaFiboEditPipeline": TinyLoop(
        partial(seeded, _fibo), _FIBO | {"image": picture(64, 64)}, packed=in_tokens, written=_instruction
    ),
    "BriaFibo2Pipeline": TinyLoop(partial(seeded, _fibo2), _CALL | {"height": 16, "width": 24}),
}
