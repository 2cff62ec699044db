"""The fast segmentor's numbers are the naive one's, on the attention of each family's tiny model: the project's target."""

import pytest
import torch

from eval.cost.naive import head_shares, probabilities
from goca_guidance import GoCAConfig
from goca_guidance.method.records import AttentionRecord, AttentionView
from tests.helpers.attention import step
from tests.helpers.families import FAMILIES


def compare(name, config):
    fast, naive = step(name).ours(config), step(name).naive(config)
    assert (fast.layers, fast.projected) == (naive.layers, naive.projected)
    assert torch.allclose(fast.weights(), naive.weights(), rtol=0, atol=1e-4)
    assert torch.allclose(fast.scores(), naive.scores(), rtol=0, atol=1e-4)
    ours, theirs = (segmentor.regions((32, 32)) for segmentor in (fast, naive))
    assert (ours.masks == theirs.masks).all(1).float().mean() >= 0.999
    assert (ours.foreground == theirs.foreground).float().mean() >= 0.999


@pytest.mark.parametrize("heads", [None, "contribution"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fast_equals_naive(name, heads):
    compare(name, GoCAConfig(heads=heads))


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize(
    "config",
    [
        GoCAConfig.vanilla(),
        GoCAConfig.released(row_normalise=True),
        GoCAConfig(row_normalise=False),
        GoCAConfig(rescale=False, refine_order=0),
    ],
    ids=["vanilla", "released", "rows as they are", "plain"],
)
def test_fast_equals_naive_in_every_configuration(name, config):
    compare(name, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_loses_nothing(name, dtype):
    """Against the naive form in float64, on the same records: only the heads' products are of the model's precision."""
    fast, exact = step(name, dtype).ours(GoCAConfig()), step(name, dtype).naive(GoCAConfig(), torch.float64)
    assert torch.allclose(fast.weights().double(), exact.weights(), rtol=0, atol=1e-4)
    assert torch.allclose(fast.scores().double(), exact.scores(), rtol=0, atol=1e-2)
    masks = (fast.regions((32, 32)).masks == exact.regions((32, 32)).masks).all(1)
    assert masks.float().mean() >= 0.995


def test_naive_by_hand():
    """Two pixels, two heads that write (3, 0) and (1, 2); two words of which each head sees one."""
    query = torch.tensor([[[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]])
    key = torch.tensor([[[[9.0, 0.0], [0.0, 9.0]]]]).expand(1, 2, -1, -1)
    z = torch.tensor([[[[3.0, 0.0]] * 2, [[1.0, 2.0]] * 2]])
    projection = torch.cat([torch.eye(2), torch.eye(2)])
    view = AttentionView((1, 2), text=slice(0, 2))
    record = AttentionRecord("layer", query, key, None, z, 1.0, view)
    assert torch.allclose(head_shares(z, projection)[..., 0], torch.tensor([[[0.6, 0.6], [0.4, 0.4]]]))
    assert torch.allclose(probabilities(record, torch.float32)[0, :, 0], torch.eye(2), atol=1e-3)
