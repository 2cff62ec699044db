"""What the page does with its pipeline: one call at a time, each of which can be stopped. No Gradio here."""

import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from goca_guidance.config import CRF, Background, SCFGConfig
from goca_guidance.pictures import as_labels, fitted
from goca_guidance.pipeline import GoCASCFGPipeline, stock_of
from goca_guidance.real_images.load import load_image
from goca_guidance.real_images.segment import Segmentation
from goca_guidance.schema import Count, checked
from goca_guidance.stock import guidance_arguments, is_text_to_image


METHODS = ("CFG", "S-CFG", "GoCA + S-CFG")
LARGEST = 2048  # pixels on a side, to which a picture is reduced: the model sees fewer, and the page shows fewer


class StoppedError(RuntimeError):
    """A call ended because nobody waits for it any more."""


@dataclass(frozen=True)
class Steps:
    """How one picture was guided, small enough to be kept for each visitor.

    `regions`: index into `names` of each latent pixel, `foreground` where one is; `guidance`: scale times rate. `acting`:
    where each of the `negative` prompt's words acts, in [0, 1].
    """

    names: tuple[str, ...]
    regions: Int[Tensor, "steps H W"]
    foreground: Bool[Tensor, "steps H W"]
    guidance: Float[Tensor, "steps H W"]
    negative: tuple[str, ...] = ()
    acting: Float[Tensor, "steps k H W"] | None = None

    @classmethod
    def of(cls, output) -> "Steps | None":
        """Those of the first image of a [`GoCASCFGPipelineOutput`]; None where nothing was guided."""
        if not output.regions:
            return None
        first = [regions.of(0) for regions in output.regions]
        found = {
            "regions": torch.stack([as_labels(regions) for regions in first]).to(torch.int16),
            "foreground": torch.stack([regions.foreground[0, 0] for regions in first]),
            "guidance": output.guidance_maps[:, 0, 0].cpu(),
        }
        if output.negative_maps:
            names = output.negative_maps[0].labels[0]
            acting = torch.stack([maps.scores[0, : len(names)].cpu().half() for maps in output.negative_maps])
            found |= {"negative": names, "acting": acting}
        return cls(first[0].labels[0], **found)


class Studio:
    """A pipeline behind the page. Gradio queues the calls; what it lets through together, after a stop, waits here.

    All calls are made in one thread, and `load`, which makes the pipeline, gets no other one to help it: each thread that
    computes on a CPU has helpers of its own (OpenMP's), and where there are more of them than cores they no longer wait awake
    for the next piece. A tiny model then takes twice the time.

    ValueError for a pipeline that asks for more than words, or makes videos.
    """

    def __init__(self, load: Callable[[], GoCASCFGPipeline]):
        with _without_helpers():
            pipe = load()
        stock = stock_of(type(pipe))
        if hasattr(pipe, "video_processor") or not is_text_to_image(stock):
            raise ValueError(
                f"Expected a text-to-image model for the page, but {stock.__name__} asks for more than words, or makes "
                "videos: use it from Python."
            )
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self._thread = ThreadPoolExecutor(1)
        self._calls: dict[str, object] = {}  # the call that each visitor waits for

    @checked
    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        guidance_scale: float = 5.0,
        seed: int = 0,
        steps: Count = 30,
        rate_min: float = 0.8,
        rate_max: float = 3.0,
        visitor: str = "",
        on_step: Callable[[str, int], Any] = lambda method, step: None,
    ) -> Iterator[tuple[str, Image.Image, Steps | None]]:
        """A picture by each of `METHODS`, from one noise; `on_step` is told the method and how many steps are done."""
        if not prompt.strip():
            raise ValueError("Expected a prompt, but got an empty one: write what the picture is to show.")
        limits: dict[str, Any] = {"rate_min": rate_min, "rate_max": rate_max}
        rules = {"S-CFG": SCFGConfig(segmentor="s-cfg", **limits), "GoCA + S-CFG": SCFGConfig(**limits)}
        arguments = guidance_arguments(type(self.pipe), guidance_scale) | {"num_inference_steps": steps}
        if negative_prompt.strip():
            arguments["negative_prompt"] = negative_prompt
        with self._visit(visitor) as go_on:
            for method in METHODS:
                ours = {"scfg": rules[method], "output_regions": True} if method in rules else {"use_scfg": False}
                if method == METHODS[-1] and negative_prompt.strip():
                    ours["output_negative_maps"] = True
                told = self._told(lambda step, method=method: (go_on(), on_step(method, step)))

                def call(given=arguments | ours | told):
                    go_on()
                    return self.pipe(prompt, generator=torch.Generator().manual_seed(seed), **given)

                output = self._thread.submit(call).result()
                yield method, output.images[0], Steps.of(output)

    def _told(self, on_step: Callable[[int], Any]) -> dict[str, Any]:
        """The arguments that have a function called after each step, with how many are done; none where a loop has no such."""
        known = inspect.signature(stock_of(type(self.pipe)).__call__).parameters

        def after(pipe, step, timestep, tensors):
            on_step(step + 1)
            return tensors

        if "callback_on_step_end" in known:
            return {"callback_on_step_end": after}
        return {"callback": lambda step, timestep, latents: on_step(step + 1)} if "callback" in known else {}

    @checked
    def segment(
        self,
        image: Any,
        classes: str,
        background: str = "",
        threshold: float | None = None,
        crf: bool = False,
        visitor: str = "",
    ) -> Segmentation:
        """A picture segmented by names that commas part, as the background's are."""
        others = tuple(parted(background))
        rule = Background(others, threshold) if others or threshold is not None else None
        with self._visit(visitor) as go_on:

            def call():
                go_on()
                return self.pipe.segment(reduced(image), parted(classes), background=rule, crf=CRF() if crf else None)

            return self._thread.submit(call).result()

    def stop(self, visitor: str) -> None:
        """Nobody waits for the visitor's call any more: it ends at its next step."""
        self._calls.pop(visitor, None)

    def close(self) -> None:
        """Nobody waits any more: no call begins, and what runs ends at its next step, for which this waits."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._calls.clear()
        self._thread.shutdown()

    @contextmanager
    def _visit(self, visitor: str) -> Iterator[Callable[[], None]]:
        """A call that the visitor waits for; what it gives raises [`StoppedError`] once nobody does."""
        call = self._calls[visitor] = object()

        def go_on() -> None:
            if self._calls.get(visitor) is not call:
                raise StoppedError("Stopped.")

        try:
            yield go_on
        finally:
            if self._calls.get(visitor) is call:
                del self._calls[visitor]


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Torch computes in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parted(text: str) -> list[str]:
    """Names between commas, semicolons or ends of lines."""
    return [name.strip() for name in re.split(r"[,;\n]", text) if name.strip()]


def size_of(path: str) -> tuple[int, int]:
    """Width and height of a picture's file, of which no pixel is read; of a broken one none."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0, 0


def reduced(image) -> Image.Image:
    """A readable picture of at most `LARGEST` pixels on a side."""
    return fitted(load_image(image), LARGEST)
