"""The log-sum-exp of a stock attention call, which most of torch's kernels compute beside their output and drop.

The call is not changed: a mode sees the operation that torch itself has chosen, and keeps its second output.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from goca_guidance.schema import switched_on


aten = torch.ops.aten
WHOLE = aten.scaled_dot_product_attention.default
KERNELS = (  # whose second output it is, b h p
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def wanted() -> bool:
    """Whether `GOCA_LSE=1` asks for it; off unless it is, as on no card it was confirmed, and on a CPU it saves nothing.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    return switched_on("GOCA_LSE")


class LogSumExp(TorchDispatchMode):
    """Inside, `found` becomes the log-sum-exp b h p, float32, of the last attention that was computed, or None."""

    found: Tensor | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is WHOLE:  # in inference mode it is not yet taken apart
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in KERNELS:
            lse, asked = out[1], args[0].shape[2]
            # where a kernel was not asked, its second output is None (cuDNN) or empty; rows may be padded
            known = lse is not None and lse.ndim == 3 and lse.shape[2] >= asked
            self.found = lse[:, :, :asked] if known else None
        return out
