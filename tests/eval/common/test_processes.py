"""How many processes there are is what `torchrun` says."""

import os
import subprocess
import sys

from tests.helpers.places import ROOT


def test_torchrun_starts_two_that_share_the_work(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from eval.common.processes import processes, share\n"
        "state = processes()\n"
        "Path(f'{state.process_index} of {state.num_processes}').write_text(str(share(list('abcde'), state)))\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", program.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(launch, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "0 of 2").read_text() == "['a', 'c', 'e']"
    assert (tmp_path / "1 of 2").read_text() == "['b', 'd']"
