"""What a loop predicts and what it gives to its scheduler, seen from outside, stock or guided."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.helpers.loops.tiny_loop import TinyLoop


DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")


@dataclass
class Step:
    """Of one step, float64: the unconditional and the conditional prediction, and what the scheduler was given.

    `at`: the sample, the timestep and the sigma that it was given with.
    """

    u: Tensor | None
    c: Tensor
    given: Tensor
    at: tuple[Tensor, Tensor, Tensor | None]


def denoisers(pipe) -> list[torch.nn.Module]:
    """Those of the loop; an image prior beside a U-Net has a loop of its own."""
    if pipe.components.get("unet") is not None:
        return [pipe.unet]
    return [pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None]


def latents(output) -> Tensor:
    """Of an output of any kind, one tensor."""
    found = next(
        getattr(output, n) for n in ("images", "frames", "latents", "image_embeddings", "image") if hasattr(output, n)
    )
    while not isinstance(found, Tensor):
        found = torch.stack([torch.as_tensor(part) for part in found]) if len(found) > 1 else found[0]
    return found


def _first(output: Any) -> Tensor:
    """A denoiser's prediction: some give an object, some a tuple, some a list with a tensor for each image."""
    while not isinstance(output, Tensor):
        if isinstance(output, list):
            return torch.stack(output)
        output = output[0]
    return output


@contextmanager
def watched(pipe, loop: TinyLoop) -> Iterator[list[Step]]:
    """The steps of a call inside the block, as it makes them."""
    steps: list[Step] = []
    predictions: list[Tensor] = []
    scheduler = type(pipe.scheduler)
    step = scheduler.step

    def note(module, args, output):
        predictions.append(_first(output).detach().double())

    @functools.wraps(step)  # pipelines ask its signature whether it takes their generator
    def given(self, model_output, *args, **kwargs):
        if not predictions:
            _add_frame(steps, model_output)
            return step(self, model_output, *args, **kwargs)
        if len(predictions) == 2 and len(model_output) == sum(map(len, predictions)):
            return step(self, model_output, *args, **kwargs)  # Cosmos 1 asks for samples without noise first
        asked = inspect.signature(step).bind(self, model_output, *args, **kwargs).arguments
        sigma = self.sigmas[self.step_index or 0] if hasattr(self, "sigmas") and hasattr(self, "step_index") else None
        at = asked["sample"].double(), torch.as_tensor(asked["timestep"]), sigma
        steps.append(Step(*_halves(predictions, loop, model_output), model_output.double(), at))
        predictions.clear()
        return step(self, model_output, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(scheduler, "step", given))
        for denoiser in denoisers(pipe):
            stack.callback(denoiser.register_forward_hook(note).remove)
        yield steps


def _halves(predictions: list[Tensor], loop: TinyLoop, given: Tensor) -> tuple[Tensor | None, Tensor]:
    """The unconditional prediction, None where there is one only, and the conditional one."""
    first, *others = predictions
    if others:
        (second,) = others
        conditional_first = loop.conditional_first is not False
    elif len(first) == 2 * len(given):
        first, second = first.chunk(2)
        conditional_first = bool(loop.conditional_first)
    else:
        return None, _target(first, loop, given)
    first, second = _target(first, loop, given), _target(second, loop, given)
    return (second, first) if conditional_first else (first, second)


def _add_frame(steps: list[Step], model_output: Tensor) -> None:
    """Diffusion forcing steps each latent frame by itself; what else comes is not a picture's (LTX-2's sound)."""
    last = steps[-1]
    if model_output.ndim == 4 and last.c.ndim == 5:
        before = last.given.unsqueeze(2) if last.given.ndim == 4 else last.given
        last.given = torch.cat([before, model_output.double().unsqueeze(2)], 2)


def own(loop: TinyLoop, step: Step, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """What the loop makes of a mixture, and what the scheduler was given, of the part that is denoised."""
    expected = loop.own(loop.after(mixture, *step.at))
    return expected, step.given if step.given.shape == expected.shape else loop.own(step.given)


def _target(prediction: Tensor, loop: TinyLoop, given: Tensor) -> Tensor:
    """Without the tokens of other pictures, or of the text, in the same sequence."""
    if prediction.ndim != 3 or given.ndim != 3:
        return prediction
    count = given.shape[1]
    return prediction[:, -count:] if loop.target_last else prediction[:, :count]


def scale_of(pipe, loop: TinyLoop) -> float:
    """The effective one; of a guider, where one mixes."""
    if getattr(pipe, "guider", None) is not None:
        return pipe.guider.guidance_scale
    known = inspect.signature(type(pipe).__call__).parameters
    names = [name for name in ("true_cfg_scale", "guidance_scale") if name in known]
    name = next((name for name in names if name in loop.call), names[0])
    return loop.excess + loop.call.get(name, known[name].default)


def traced(run: Callable, pipe, loop: TinyLoop, **kwargs) -> tuple[Any, list[Step]]:
    """The output of a call, and its steps."""
    with watched(pipe, loop) as steps:
        output = run(pipe, loop, **kwargs)
    return output, steps


def spread(loop: TinyLoop, scales: Tensor, prediction: Tensor) -> Tensor:
    """A guidance map b 1 *S, float64, in the form of a prediction."""
    packed = loop.packed(scales.double())
    return packed.repeat(1, 1, prediction.shape[-1] // packed.shape[-1]) if packed.ndim == 3 else packed
