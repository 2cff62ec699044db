"""Whether what an autoencoder decodes in a call is finite: NaN would be a black picture."""

from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from goca_guidance.hooks.shared import hook_here


@contextmanager
def finite_pictures(vae: Any):
    """ValueError behind the `with` block where the decoder gave NaN or infinity in it; no hook is left.

    What is compiled is not looked at: a hook would have it compiled again at every call.
    """
    decoder: Any = getattr(vae, "decoder", None)
    looked_at = isinstance(decoder, torch.nn.Module) and not any(map(_is_compiled, (vae, vae.decode, decoder)))
    finite: list[torch.Tensor] = []  # one flag a picture or tile, read at the end: no synchronisation between

    def look(module, args, output):
        if isinstance(output, torch.Tensor):
            finite.append(torch.isfinite(output).all())

    with ExitStack() as stack:
        if looked_at:
            stack.callback(hook_here(decoder.register_forward_hook, look).remove)
        yield
    if finite and not torch.stack(finite).all():
        raise ValueError(
            f"Expected a finite picture, but the autoencoder gave NaN or infinity in {vae.dtype}: use it in float32, or check "
            "its weights."
        )


def _is_compiled(part: Any) -> bool:
    marks = ("_orig_mod", "_torchdynamo_orig_callable")
    forward = getattr(part, "forward", None)
    return getattr(part, "_compiled_call_impl", None) is not None or any(
        hasattr(each, mark) for each in (part, forward) for mark in marks
    )
