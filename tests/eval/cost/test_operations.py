"""The counting of what GoCA-S-CFG must add, by hand."""

import pytest

from eval.cost import operations


def test_least_cost_of_stable_diffusion_by_hand():
    step = operations.stock_step("sd-1.5")
    assert step.flops == pytest.approx(1.6e12, rel=0.02)  # two predictions of 0.8 TFLOP
    parts = operations.added(step)
    levels = [(5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280)]  # layers, pixels, channels
    assert parts["heads"].flops == 2 * sum(count * 2 * p * c * c for count, p, c in levels)
    assert parts["heads"].flops == pytest.approx(25.6e9, rel=0.001)
    assert parts["cross"].exponentials == 2 * sum(count * p * 77 * 8 for count, p, _ in levels)
    rows = {4096: 1024, 1024: 1024, 256: 256, 64: 64}  # that a resize to 32 x 32 reads
    assert parts["agreement"].flops == 2 * sum(count * 2 * rows[p] * p * (c + 1) for count, p, c in levels)
    assert parts["refinement"].flops == 3 * 2 * 3072 * 4096 * 320 + 2 * 2 * 4096**2 * 6


def test_least_cost_of_joint_attention_counts_probabilities_once():
    parts = operations.added(operations.stock_step("flux-short"))
    assert parts["heads"] == parts["cross"] == operations.Cost()
    assert parts["agreement"].flops == 6 * 2 * 4096 * (4096 + 512) * (3072 + 1)
    assert parts["refinement"].flops == 2 * 2 * 4096**2 * 6
