"""The fused kernels compile for GPUs that are not here, and fit their registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

from eval.kernel_code import SHARED


pytest.importorskip("triton", reason="Triton is not installed: it has no wheels for this platform")


def test_kernels_fit_three_generations_of_gpus(tmp_path):
    """Nothing spills, products run on tensor cores, keys come in copies of 16 bytes: results cannot tell.

    In a process of its own: Triton may be interpreted here. With a cache of its own: it is compiled here.
    """
    result = tmp_path / "kernel-code.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    layers = ["sd-1.5, 64", "sd-1.5, 64, words"]
    subprocess.run(
        [sys.executable, "-m", "eval.kernel_code", "--layers", *layers, "--sm", "80", "90", "100", "--result", result],
        check=True, capture_output=True, env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    rows = json.loads(result.read_text())["rows"]
    kernels = ["log_sum_exp", "pixels", "words"]
    assert [(row["kernel"], row["sm"]) for row in rows] == [(kernel, sm) for kernel in kernels for sm in (80, 90, 100)]
    for row in rows:
        assert row["spills"] == 0, row
        assert 32 <= row["registers"] <= 255, row
        assert 0 < row["shared_kb"] <= SHARED[row["sm"]], row
        assert row["products"] == {80: "mma", 90: "wgmma", 100: "tcgen05"}[row["sm"]], row
        assert row["copies"] == 16, row
