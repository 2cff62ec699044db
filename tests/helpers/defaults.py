"""The process's default dtype and device, and the tensors that are kept from call to call."""

from contextlib import contextmanager

import torch

from goca_guidance.method import maps


CONSTANTS = (maps._gaussian, maps.row_mass, maps._linear_matrix, maps.nearest_index, maps._read, maps.sample)


def forget_constants() -> None:
    """Nothing is kept of what was made before."""
    for constant in CONSTANTS:
        constant.cache_clear()


@contextmanager
def default(dtype=torch.float32, device=None):
    """Another default while the block runs."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
