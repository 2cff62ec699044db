"""All that a call must leave as it was: hooks, kernels, dtypes, processors, the process's switches, the stock output."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from tests.fuzz.pairs import Pair


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks")  # fmt: skip


def state_of(pair: Pair) -> dict[str, Any]:
    """What can be compared with `==`, by name."""
    return {**_of_modules(pair.modules), **_of_pipelines(pair), **_of_process()}


def _of_modules(modules: list[tuple[str, torch.nn.Module]]) -> dict[str, Any]:
    """In one pass, for there are hundreds of them and thousands of calls."""
    hooks, processors, flags, dtypes, version = [], [], [], set(), 0
    for name, module in modules:
        inside = vars(module)
        hooks += [(name, kind, found) for kind in HOOKS if inside[kind] and (found := _hooks(inside[kind]))]
        processors.append(id(inside.get("processor")))
        flags.append((module.training, len(inside), len(inside["_modules"]), "forward" in inside))
        for tensor in (*inside["_parameters"].values(), *inside["_buffers"].values()):
            if tensor is not None:
                dtypes.add((tensor.dtype, tensor.device, tensor.requires_grad, tensor.grad is None))
                version += tensor._version
    return {
        "hooks": hooks,
        "processors": processors,
        "modules": flags,
        "dtypes and devices": dtypes,
        "weights": version,
    }


def _hooks(table: dict) -> list[int]:
    """But for those by which transformers' encoders capture hidden states for good."""
    return [
        id(hook) for hook in table.values() if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]


def _of_pipelines(pair: Pair) -> dict[str, Any]:
    found = {}
    for which, pipe in (("stock", pair.stock), ("ours", pair.ours)):
        scheduler = pipe.scheduler
        found[f"components of {which}"] = {name: id(part) for name, part in pipe.components.items()}
        found[f"scheduler of {which}"] = (type(scheduler), dict(scheduler.config))
        found[f"progress bar of {which}"] = dict(getattr(pipe, "_progress_bar_config", {}))
        found[f"ours in {which}"] = _ours(pipe)
    return found | {"call": pair.ours._goca_call}


def _of_process() -> dict[str, Any]:
    return {
        "torch's kernel": id(F.scaled_dot_product_attention),
        "diffusers' kernels": {name: id(kernel) for name, kernel in _AttentionBackendRegistry._backends.items()},
        "diffusers' backend": _AttentionBackendRegistry._active_backend,
        "default dtype": torch.get_default_dtype(),
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
        "compiler's stance": torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else "default",
        "tracing": (sys.gettrace(), sys.getprofile()),
        "threads": torch.get_num_threads(),
    }


def _ours(holder: Any) -> list[str]:
    """Attributes that are objects of the library."""
    return [name for name, value in vars(holder).items() if type(value).__module__.startswith("goca_guidance")]


def changed(before: dict, after: dict) -> list[str]:
    """Names of what differs."""
    return [name for name in before if before[name] != after[name]]
