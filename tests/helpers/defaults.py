"""The process's default dtype and device, and the tensors that are kept from call to call."""

from contextlib import contextmanager, nullcontext

import torch

from goca_guidance.method import maps


CONSTANTS = (maps._gaussian, maps.row_mass, maps._linear_matrix, maps.nearest_index, maps._read, maps.sample)


def forget_constants() -> None:
    """Nothing is kept of what was made before."""
    for constant in CONSTANTS:
        constant.cache_clear()


@contextmanager
def default(dtype=torch.float32, device=None):
    """Another default while the block runs. Torch 2.6 cannot tell its default device once that was set back to None."""
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
