"""The arguments of a stock pipeline's call, read before its loop stumbles over them."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Annotated, Any

import torch
from torch import Tensor

from goca_guidance.denoisers.base import Family
from goca_guidance.schema import FILLED, Bound, Count, Positive, at_least, check_names, fields_in, read


FINITE = Bound("finite", lambda tensor: bool(torch.isfinite(tensor).all()), before=True)
Text = str | Annotated[Sequence[str], FILLED] | None
Embeds = Annotated[Tensor, FINITE] | None
Numbers = Annotated[Sequence[float], FILLED] | None
EACH = ("num_images_per_prompt", "num_videos_per_prompt")
STOCK: dict[str, Any] = {  # what stock does not check itself, or only where it stumbles; other arguments are its own matter
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3"), Text),
    **dict.fromkeys(("negative_prompt", "negative_prompt_2", "negative_prompt_3"), Text),
    **dict.fromkeys(("height", "width"), Positive | None),
    **dict.fromkeys(("num_inference_steps", *EACH, "max_sequence_length"), Count),
    **dict.fromkeys(("guidance_scale", "guidance_scale_2", "true_cfg_scale", "pag_scale", "pag_adaptive_scale"), float),
    **dict.fromkeys(("guidance_rescale", "eta", "strength"), float),
    **dict.fromkeys(("timesteps", "sigmas", "original_size", "target_size", "crops_coords_top_left"), Numbers),
    "generator": torch.Generator | list[torch.Generator] | None,
    "latents": Embeds,
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), Embeds),
    **dict.fromkeys(
        ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask"), Embeds
    ),
    "clip_skip": Annotated[int, at_least(0)] | None,
    "callback_on_step_end": Callable[..., Any] | None,
    "callback_on_step_end_tensor_inputs": Sequence[str],
    "callback": Callable[..., Any] | None,
    "callback_steps": Count | None,
    **dict.fromkeys(
        ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"), dict[str, Any] | None
    ),
}  # fmt: skip
CLOSE = 0.7  # of difflib: at least so much like a name of ours


def bind(stock: Callable, name: str, ours: Mapping[str, Any], args: tuple, kwargs: Mapping) -> tuple[dict, set[str]]:
    """Arguments of a stock call with its defaults, and the names of those that are given and are not the default itself.

    `ours` are the annotations of the arguments that we add to the call named `name`. TypeError for a name that the call does
    not know, and for one that it would swallow (`**kwargs`) but that is like an argument of ours or a field of one.
    """
    signature = inspect.signature(stock)
    known = {key for key, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    swallowing = next((key for key in signature.parameters if key not in known), "")
    unknown = [key for key in kwargs if key not in known]
    if not swallowing:
        check_names(unknown, {*known, *ours}, f"an argument of {name}", ours)
    else:
        check_names((key for key in unknown if _is_like_ours(key, ours)), ours, f"an argument of {name}", ours)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Expected the arguments of {name}, but got: {error}.") from None
    given = {key for key in call.arguments if call.arguments[key] is not signature.parameters[key].default}
    call.apply_defaults()
    return {
        **{k: v for k, v in call.arguments.items() if k != swallowing},
        **call.arguments.get(swallowing, {}),
    }, given


def _is_like_ours(name: str, ours: Mapping[str, Any]) -> bool:
    return bool(
        {"goca", "scfg"} & {*name.split("_")} or get_close_matches(name, {**fields_in(ours), **ours}, 1, CLOSE)
    )


def documented(ours: str | None, stock: str | None) -> str:
    """Our docstring of a call, with the arguments that the stock one's docstring tells before ours."""
    told = re.search(r"^( *)Args:\n((?:\1 +\S.*\n|\s*\n)+)", stock or "", re.MULTILINE)
    theirs = textwrap.indent(textwrap.dedent(told[2]).strip() + "\n", " " * 4) if told else ""
    return inspect.cleandoc(ours or "").replace("Args:\n", f"Args:\n{theirs}", 1)


def check_arguments(arguments: Mapping[str, Any], given: Iterable[str]) -> None:
    """TypeError or ValueError for what a stock pipeline would only stumble over later, in what is given."""
    other_schedule = any(arguments.get(name) is not None for name in ("timesteps", "sigmas"))
    for name in given:
        if name in STOCK and not (name == "num_inference_steps" and arguments[name] is None and other_schedule):
            read(name, arguments[name], STOCK[name])
    if arguments["prompt"] is None and arguments.get("prompt_embeds") is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    _check_one_prompt(arguments)
    if arguments.get("pag_scale"):  # refused before the loop, which would leave its processors behind
        raise ValueError(
            "Expected two predictions to mix, but perturbed-attention guidance makes a third: pass `pag_scale=0.0`, or "
            "`use_scfg=False`."
        )


def _check_one_prompt(arguments: Mapping[str, Any]) -> None:
    """LTX-Video's long videos may have a prompt for each part."""
    if "prompt_segments" in arguments and (arguments["prompt_segments"] or "|" in str(arguments["prompt"])):
        raise ValueError(
            "Expected one prompt for all frames of a video, but got several ones for parts of it: pass one, or "
            "`use_scfg=False`."
        )


def check_latents(latents: Tensor | None, family: Family, channels: int | None, images: int) -> None:
    """ValueError for latents of another shape than a call for so many images draws itself, where that is known."""
    if latents is None or channels is None or (of_image := family.latents(channels)) is None:
        return
    wanted = (images, *of_image)
    if len(latents.shape) != len(wanted) or any(
        w not in (None, n) for w, n in zip(wanted, latents.shape, strict=True)
    ):
        shape = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(f"Expected `latents` of shape ({shape}), but got {tuple(latents.shape)}.")


def counts(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts a call has, and how many images."""
    prompt = arguments["prompt"] if arguments["prompt"] is not None else arguments["prompt_embeds"]
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    each = next((arguments[name] for name in EACH if arguments.get(name)), 1)
    return prompts, prompts * each


@contextmanager
def or_plain():
    """What cannot be guided can still be drawn: a refusal of ours in a call says so."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        at = error.__traceback__
        while at.tb_next is not None:
            at = at.tb_next
        if at.tb_frame.f_globals["__name__"].startswith("goca_guidance.") and "use_scfg" not in str(error):
            error.args = (f"{error} Or pass `use_scfg=False`.",)
        raise
