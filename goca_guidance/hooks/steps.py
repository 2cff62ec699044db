"""Which step of a loop a forward of the denoiser belongs to, and which predictions it makes."""

from collections.abc import Sequence
from typing import Any

import torch

from goca_guidance.denoisers.base import DenoiserCall


class Steps:
    """The forwards and products of a loop, as they come: nothing of theirs may be left over.

    A step is known by its timestep: as tensors, those of two steps lie in different places even where they are equal (Heun,
    RePaint), and parts of one step (views of a panorama) are told the same one. Reading a value would wait for the device.

    Args:
        images: how many a step predicts; None, where predictions are `separate`, takes what comes.
        separate: a step predicts the conditional part and then the unconditional one, instead of both in one batch; None is
            found out at the first forward.
        order: of the predictions in one batch.
        by_image: each image has a product of its own.
    """

    def __init__(
        self, images: int | None, separate: bool | None, order: tuple[int, ...] = (0, 1), by_image: bool = False
    ):
        self.images, self.separate, self.order, self.by_image = images, separate, order, by_image
        self.count = 0  # steps begun
        self.branches: tuple[int, ...] = ()  # predicted by the last forward: 0 unconditional, 1 conditional
        self.awaited = False  # the product of scale and difference is still to come
        self.predictions = self.products = 0  # conditional ones, and those that were multiplied
        self.parts = False  # some step was predicted in several ones
        self._halves: set[int] = set()  # predictions since the last product
        self._timestep: Any = None  # of the last forward; held, so that its memory is not another one's
        self._place: tuple | None = None  # of it
        self._text: Any = None  # of the last conditional forward
        self._parts = 0  # of the step in progress
        # Predictions of the forwards to come, where a guider tells; None is no half.
        self._announced: list[int | None] = []
        self._image = 0  # whose product comes next, where each image has one

    def begin(self) -> None:
        """The next forward is the first one of a step, where a loop tells."""
        self.awaited, self._place = False, None
        self._announced = []

    def announce(self, predictions: Sequence[int | None]) -> None:
        """Which predictions the next forwards make, where a guider tells: 0 unconditional, 1 conditional, None neither."""
        self._announced = list(predictions)

    def forward(self, call: DenoiserCall, timestep: Any, text: Any) -> tuple[int, ...]:
        """A forward of the loop's own begins: which predictions it makes, none where nothing is mixed."""
        self.branches = self._predicted(call, text)
        if self.awaited and self.branches and len(self._halves) == 2:
            raise RuntimeError(
                "Expected the product of guidance scale and difference after every two predictions, but this loop predicts "
                "again before it: it mixes more than two predictions, or in another way. Pass use_scfg=False."
            )
        if 1 in self.branches and self.awaited and self.separate and self.images is not None and not self.products:
            raise RuntimeError(
                "Expected two predictions a step and the product of guidance scale and their difference, but this loop makes "
                "one: a distilled model, or other guidance. Pass use_scfg=False."
            )
        if self.branches != (0,):
            place = _place(timestep)
            if place is None or place != self._place:
                self.count, self._parts = self.count + 1, 0
            self._timestep, self._place = timestep, place
        if 1 in self.branches:
            self._text, self._halves, self.awaited = text, set(), True
            self._parts += 1
            self.parts = self.parts or self._parts > 1
            self.predictions += 1
        self._halves.update(self.branches)
        return self.branches

    def product(self) -> int:
        """The loop multiplies scale and difference: of which image, where each has a product of its own."""
        if not self.awaited:
            raise RuntimeError(
                "Expected each product of guidance scale and difference to follow a prediction of the pipeline's denoiser, "
                f"but product {self.products + 1} does not: another model predicts some steps, or the loop multiplies several "
                "times. Pass use_scfg=False."
            )
        image = self._image
        self._image = (image + 1) % (self.images or 1) if self.by_image else 0
        if self._image == 0:
            self.awaited, self.products = False, self.products + 1
        return image

    def _predicted(self, call: DenoiserCall, text: Any) -> tuple[int, ...]:
        if self._announced:
            told = self._announced.pop(0)
            return () if told is None else (told,)
        batch, images = call.batch, self.images or call.batch
        if self.separate is None:
            self.separate = batch == images
        if self.separate and batch == images:
            return (0,) if self.awaited and text is not self._text else (1,)
        if not self.separate and batch == 2 * images:
            return self.order
        if not self.separate and batch == images and self.count:
            return ()
        how = ("", "one after the other") if self.separate else ("2 x ", "unconditional and conditional")
        raise ValueError(
            f"Expected predictions of {images} images in a batch of {how[0]}{images} ({how[1]}), but the denoiser got a batch "
            f"of {batch}: this loop mixes other predictions than two (a distilled model: none), or makes them in parts. Pass "
            "use_scfg=False."
        )


def _place(timestep: Any) -> tuple | None:
    """Where a timestep lies, and how often what lies there was written; None for a number."""
    if not isinstance(timestep, torch.Tensor):
        return None
    return timestep.device, timestep.data_ptr(), None if timestep.is_inference() else timestep._version
