"""The program that measures the segmentor against its naive form."""

import numpy as np
import torch

from eval.core_cost import PARTS, measure, profile
from tests.helpers.attention import step


def test_core_measures(tmp_path):
    path = tmp_path / "step.pt"
    torch.save(step("sd"), path)
    ours, naive = (measure(path, "cpu", form, repeats=1) for form in ("ours", "naive"))
    assert ours["masks"].shape == naive["masks"].shape
    np.testing.assert_allclose(ours["scores"], naive["scores"], rtol=0, atol=1e-4)
    shares = profile(path, "cpu", repeats=1)
    assert shares.keys() == {*PARTS, "rest"}
    assert all(share > 0 for share in shares.values())  # each part has run, and no time is counted twice
