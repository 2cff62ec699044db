"""Whether what an autoencoder decodes in a call is finite: NaN would be a black picture."""

from contextlib import contextmanager
from typing import Any

import torch

from goca_guidance.hooks.observer import own_thread


@contextmanager
def finite_pictures(vae: Any):
    """ValueError behind the `with` block where the decoder gave NaN or infinity in it; no hook is left."""
    decoder = getattr(vae, "decoder", None)
    finite: list[torch.Tensor] = []  # one flag a picture or tile, read at the end: no synchronisation between

    def look(module, args, output):
        if isinstance(output, torch.Tensor):
            finite.append(torch.isfinite(output).all())

    handle = decoder.register_forward_hook(own_thread(look)) if isinstance(decoder, torch.nn.Module) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    if finite and not torch.stack(finite).all():
        raise ValueError(
            f"Expected a finite picture, but the autoencoder gave NaN or infinity in {vae.dtype}: use it in float32, or check "
            "its weights."
        )
