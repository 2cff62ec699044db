"""What regions add to a step on a GPU, counted on fake tensors: nothing waits, and it does not grow.

Full-size denoisers; Flux with six of its blocks, whose widths are the whole one's. The other families, and the whole Flux, are
counted by `make gpu-budget`, as it takes longer.
"""

from functools import cache

import pytest
import torch

from eval.cost.budget import cost
from eval.cost.cases import CASES
from goca_guidance.method.aggregation import Aggregation


BUDGETS = {  # family, kernels: launches, GB, MB of peak memory that a step may add
    ("tiny-sd, 64 px", False): (285, 0.06, 5),
    ("sd-1.5, 512 px", False): (640, 17.7, 270),
    ("sd-1.5, 512 px", True): (256, 1.35, 130),
    ("pixart-sigma, 1024 px", True): (340, 6.9, 395),
    ("flux.1 with 2 + 4 blocks, 1024 px", True): (165, 2.6, 175),
}
counted = cache(lambda name, kernels: cost(CASES[name], with_kernels=kernels))


@pytest.mark.parametrize(("name", "kernels"), BUDGETS)
def test_a_step_waits_for_nothing_and_adds_no_more_than_it_did(name, kernels):
    """What mixes devices, or makes the host wait, would raise; nothing is copied from the second step on."""
    found, (launches, gb, mb) = counted(name, kernels), BUDGETS[name, kernels]
    copies = len(found.first.copies)
    assert 4 <= copies <= 6  # the prompt's layout, whether a region of it is alone, where pixels stand
    assert found.second.copies == []
    row = found.row()
    assert 0 < row["added_launches"] <= launches
    assert 0 < row["added_gb"] <= gb
    assert 0 < row["added_peak_mb"] <= mb


def test_a_batch_takes_no_more_launches():
    """With kernels; bytes and memory grow as the batch does."""
    one, four = counted("sd-1.5, 512 px", True), cost(CASES["sd-1.5, 512 px"], 4, with_kernels=True)
    assert four.second.ours.launches <= 1.05 * one.second.ours.launches
    assert four.second.ours.bytes <= 4.2 * one.second.ours.bytes
    assert four.added_peak <= 4.2 * one.added_peak


def test_growth_is_seen(monkeypatch):
    """One launch more for each layer, and a number that the host puts on the device."""
    found, keep, layers = counted("tiny-sd, 64 px", False).second, Aggregation.keep, []

    def with_more(aggregation, record):
        layers.append(torch.zeros(64).to("cuda") + 1)
        keep(aggregation, record)

    monkeypatch.setattr(Aggregation, "keep", with_more)
    more = cost(CASES["tiny-sd, 64 px"]).second
    assert len(more.copies) == len(layers) // 2 > 0
    assert more.ours.launches == found.ours.launches + 3 * len(more.copies)
    assert more.ours.bytes == found.ours.bytes + (1 + 2 + 2) * 256 * len(more.copies)
