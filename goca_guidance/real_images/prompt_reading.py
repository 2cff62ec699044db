"""What the text encoders of a pipeline read of a prompt: its own loop, stopped before the denoiser runs."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from goca_guidance.denoisers.adapters import text_encoders_of
from goca_guidance.denoisers.base import Family
from goca_guidance.denoisers.words import Encoded
from goca_guidance.hooks.watch import Watch
from goca_guidance.real_images.forwards import fresh, readable
from goca_guidance.stock import exact_arguments, unguided


class _Stop(Exception):  # noqa: N818 (no error)
    """The text was read, and no more is needed."""


class Reading(Watch):
    """The loop's first call of the denoiser, which tells where the tokens stand, and is not made."""

    def __init__(self, pipe: DiffusionPipeline, family: Family):
        super().__init__([family], text_encoders_of(pipe, family))
        self.pipe = pipe

    def run(
        self, stock: type[DiffusionPipeline], prompt: str, arguments: Mapping[str, Any] | None = None
    ) -> list[Encoded]:
        """What the encoders read of a prompt; `stock` is the text-to-image class that runs the pipeline's components.

        `arguments`: further ones of its call.
        """
        with readable(self.pipe):
            runner = fresh(stock, self.pipe, type(self.pipe.scheduler).from_config(self.pipe.scheduler.config))
        self.prompts = [prompt]
        try:
            with self.installed(), readable(self.pipe):
                runner(
                    prompt=prompt,
                    num_inference_steps=2,
                    **unguided(stock) | exact_arguments(stock) | dict(arguments or {}),
                )
        except _Stop:
            return self.found
        finally:
            self.pipe.maybe_free_model_hooks()
        raise RuntimeError(
            "Expected the denoiser to be called in this thread, but it was called in another one or not at all: use the model "
            "itself, not a wrapper that runs it elsewhere."
        )

    def on_forward(self, call, device) -> None:
        self.found = self.encoded(self.prompts)
        raise _Stop
