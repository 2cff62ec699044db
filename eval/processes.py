"""The processes that share the work of a program: one, or as many as `accelerate launch` or `torchrun` started."""

from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process among all; one that is done waits for the others for days.

    On CPUs launch with `torchrun --nproc-per-node 2 -m PROGRAM ...`: `accelerate launch --cpu` starts a single process.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
