"""What a tiny pipeline of a loop is, how one is built and run, and how a loop mixes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor


PROMPT = "a cat on grass"


# ---- how a loop mixes ------------------------------------------------------------------------------------------------
def plain(u: Tensor, c: Tensor, s: Tensor | float) -> Tensor:
    """`c + s (c - u)` is this with s + 1."""
    return u + s * (c - u)


def negated(u: Tensor, c: Tensor, s: Tensor | float) -> Tensor:
    """The scheduler counts time the other way round."""
    return -plain(u, c, s)


def without_variance(u: Tensor, c: Tensor, s: Tensor | float) -> Tensor:
    """The second half of the channels is a variance that is dropped."""
    return plain(u.chunk(2, 1)[0], c.chunk(2, 1)[0], s)


def as_is(maps: Tensor) -> Tensor:
    return maps


def in_tokens(maps: Tensor) -> Tensor:
    """b c *S to b (*S) c, row-major."""
    return maps.flatten(2).mT


def frames_first(maps: Tensor) -> Tensor:
    """b c F H W to b F c H W."""
    return maps.transpose(1, 2)


def channels_last(maps: Tensor) -> Tensor:
    """b c F H W to b F H W c."""
    return maps.movedim(1, -1)


def later_frames(maps: Tensor) -> Tensor:
    """Of b c F H W all but the first, which is a picture that was given."""
    return maps[:, :, 1:]


def in_patches(maps: Tensor) -> Tensor:
    """b c (H 2) (W 2) to b (H W) (c 2 2), as Flux.1 and its kin pack."""
    return F.unfold(maps, 2, stride=2).mT


# ---- tiny pipelines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyLoop:
    """Fresh tiny components for a stock pipeline class, and arguments of a small call whose loop mixes two predictions.

    Args:
        components: makes them, the same weights at every call, in evaluation mode, no weight all zeros that would hide the
            text or the picture.
        call: arguments besides the prompt, the generator, the number of steps and the type of output.
        steps: how many the call asks for; image-to-image pipelines make fewer.
        guided: how many of them mix.
        words: whether the text encoders read the prompt's words; else the call passes embeddings.
        written: how the pipeline wants a prompt to be written.
        settings: attributes of the pipeline before it is called, where its own sizes are too large for a test.
        batch: whether the stock loop takes two prompts at once; some want a picture for each.
        mixed: what the scheduler gets of the unconditional prediction, the conditional one and the effective scale.
        after: what the scheduler gets of that, of the sample, its timestep and its sigma, where the loop goes on with it.
        excess: of the effective scale over the argument: 1 where the loop mixes as `c + s (c - u)`.
        conditional_first: in a step; of two calls the first is, of two halves of a batch the second, unless this says so.
        packed: a guidance map b 1 *S in the form of the predictions that `mixed` multiplies.
        own: the part of a prediction that is denoised, where the loop puts given frames in place of the others.
        tolerance: of what the scheduler gets, where the loop divides a difference of large samples by a small sigma.
        target_last: other pictures' tokens stand before the target's, not behind.
    """

    components: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    guided: int = 2
    words: bool = True
    written: Callable[[str], str] = str
    settings: dict[str, Any] = field(default_factory=dict)
    batch: bool = True
    mixed: Callable[[Tensor, Tensor, Any], Tensor] = plain
    after: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda mixture, sample, timestep, sigma: mixture
    excess: int = 0
    conditional_first: bool | None = None
    packed: Callable[[Tensor], Tensor] = as_is
    own: Callable[[Tensor], Tensor] = as_is
    tolerance: float = 1e-5
    target_last: bool = False


def build(name: str, loop: TinyLoop, **changes) -> diffusers.DiffusionPipeline:
    """The stock pipeline of this class name on fresh components, some of them replaced."""
    pipe = getattr(diffusers, name)(**loop.components() | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: diffusers.DiffusionPipeline, loop: TinyLoop, prompt: str | list[str] = PROMPT, seed: int = 0, **kwargs):
    """What the pipeline returns for the small call: its own output object, latents."""
    for setting, value in loop.settings.items():
        setattr(pipe, setting, value)
    torch.manual_seed(seed)  # for what some pipelines draw without the generator
    asked = {
        "num_inference_steps": loop.steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    written = loop.written(prompt) if isinstance(prompt, str) else [loop.written(text) for text in prompt]
    asked |= {"prompt": written} if loop.words else {}
    return pipe(**asked | loop.call | kwargs)


def seeded(build_parts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The same weights at every call, in evaluation mode; parameters that begin as zeros are drawn, so that all is heard."""
    torch.manual_seed(0)
    parts = build_parts()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for parameter in part.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    return parts
