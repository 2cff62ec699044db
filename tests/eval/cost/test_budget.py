"""What regions add to a step on a GPU, counted on fake tensors: nothing waits, and it does not grow.

Full-size denoisers; Flux with six of its blocks, whose widths are the whole one's. The other families, and the whole Flux, are
counted by `make gpu-budget`.
"""

from functools import cache

import pytest

from eval.cost.budget import cost
from eval.cost.cases import CASES
from goca_guidance.method import aggregation


BUDGETS = {  # family, kernels: launches, GB, MB of peak memory that a step may add
    ("tiny-sd, 64 px", False): (480, 0.06, 5),
    ("sd-1.5, 512 px", False): (830, 17.6, 260),
}
counted = cache(lambda name, kernels: cost(CASES[name], with_kernels=kernels))


@pytest.mark.parametrize(("name", "kernels"), BUDGETS)
def test_a_step_waits_for_nothing(name, kernels):
    """What mixes devices, or makes the host wait, would raise; nothing is copied from the second step on."""
    found = counted(name, kernels)
    assert len(found.first.copies) == 5  # the prompt's layout, and whether one of its regions is alone
    assert found.second.copies == []


@pytest.mark.parametrize(("name", "kernels"), BUDGETS)
def test_a_step_adds_no_more_than_it_did(name, kernels):
    launches, gb, mb = BUDGETS[name, kernels]
    row = counted(name, kernels).row()
    assert 0 < row["added_launches"] <= launches
    assert 0 < row["added_gb"] <= gb
    assert 0 < row["added_peak_mb"] <= mb


def test_growth_is_seen(monkeypatch):
    """One more copy of the probabilities in every block, and one more number read, would fail."""
    found, probabilities = counted("tiny-sd, 64 px", False), aggregation.probabilities

    def copied(*args):
        for rows, probs in probabilities(*args):
            yield rows, probs.clone()

    monkeypatch.setattr(aggregation, "probabilities", copied)
    more = cost(CASES["tiny-sd, 64 px"]).second.ours
    assert more.launches > 1.02 * found.second.ours.launches
    assert more.bytes > 1.1 * found.second.ours.bytes
