"""What a step costs on a fake GPU: counted by shapes alone, on a small U-Net and a small transformer."""

import diffusers
import pytest
import torch

from eval.step_cost import Case, measure


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # which is the same for all fake tensors
SMALL = Case(
    lambda: diffusers.UNet2DConditionModel(
        sample_size=32, cross_attention_dim=32, block_out_channels=(32, 64), attention_head_dim=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    lambda b: {
        "sample": torch.empty(b, 4, 32, 32, device="meta"),
        "timestep": torch.empty(b, device="meta"),
        "encoder_hidden_states": torch.empty(b, 77, 32, device="meta"),
    },
    (32, 32),
    batched=True,
)  # fmt: skip


def test_a_step_is_counted():
    """Eight heads of 1,024 x 1,024 probabilities are never one tensor; a second run counts the same."""
    row = measure(SMALL)
    assert row["tokens"] == 1024
    assert row["map_of_all_heads_mb"] == 8 * 4
    assert 100 < row["stock_kernels"] < 1000
    assert 0 < row["added_kernels"] < 1000
    assert 0 < row["added_gb"] < 1
    assert row["largest_tensor_mb"] <= 64
    assert measure(SMALL) == row


def test_weights_are_not_made():
    """A model of 40 GB is counted in little memory."""
    large = Case(
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=2, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536
        ),
        lambda b: {
            "hidden_states": torch.empty(b, 16, 64, 64, device="meta"),
            "encoder_hidden_states": torch.empty(b, 77, 4096, device="meta"),
            "pooled_projections": torch.empty(b, 2048, device="meta"),
            "timestep": torch.empty(b, device="meta"),
        },
        (32, 32),
        batched=True,
    )
    assert measure(large)["stock_gb"] > 0.1
