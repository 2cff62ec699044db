"""Presets resolve to real layers, on the tiny U-Net and on the full-size one (meta device)."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention

from goca_guidance.families import family_of
from tests.tiny import tiny_components


def full_size(**changes):
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **changes)


@pytest.mark.parametrize("changes", [{}, {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}])
def test_stable_diffusion_preset(changes):
    """1.x, and 2.x with its other widths: sixteen cross layers, the paper's reference and refining layers."""
    with torch.device("meta"):
        preset = family_of(UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": 768, **changes})).preset
    assert len(preset.cross) == len(preset.self_layers) == 16
    assert preset.reference == "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    assert [name.split(".transformer")[0] for name in preset.fine] == [
        "down_blocks.0.attentions.1",
        "up_blocks.3.attentions.0",
        "up_blocks.3.attentions.1",
    ]
    assert (preset.order, preset.timestep) == (2, 100)


def test_every_layer_of_a_preset_exists():
    for unet in (full_size(), tiny_components()["unet"]):
        family = family_of(unet)
        assert family.preset.layers <= set(family.attention_modules)


def test_generic_preset_reads_the_finest_grid():
    preset = family_of(tiny_components()["unet"]).preset
    assert preset.reference.startswith("up_blocks.1.")
    assert {name.split(".attentions")[0] for name in preset.fine} <= {"down_blocks.0", "up_blocks.1"}


@pytest.mark.parametrize(
    ("pixels", "latent", "grid"), [(4096, (64, 64), (64, 64)), (64, (64, 64), (8, 8)), (48, (15, 11), (8, 6))]
)
def test_grid(pixels, latent, grid):
    assert family_of(tiny_components()["unet"]).grid(pixels, latent) == grid


def test_an_image_prompts_own_attention_is_no_layer():
    """IP-Adapter Plus brings attention modules outside the blocks."""
    unet = tiny_components()["unet"]
    before = set(family_of(unet).attention_modules)
    unet.encoder_hid_proj = torch.nn.ModuleList([Attention(query_dim=8, heads=1, dim_head=8)])
    assert set(family_of(unet).attention_modules) == before


def test_unknown_grid_and_denoiser():
    with pytest.raises(ValueError, match="Expected pixel tokens"):
        family_of(tiny_components()["unet"]).grid(50, (16, 16))
    with pytest.raises(ValueError, match="as Stable Diffusion XL has"):
        family_of(tiny_components(addition_embed_type="text_time", addition_time_embed_dim=8,
                                  projection_class_embeddings_input_dim=80)["unet"])  # fmt: skip
    with pytest.raises(ValueError, match="got UNet2DModel"):
        family_of(
            UNet2DModel(
                block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
            )
        )
