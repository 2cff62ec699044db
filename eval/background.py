"""What the background scores, which every class of an image must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor


KINDS = ("offset", "constant", "max", "square")


@dataclass(frozen=True)
class Rule:
    """What the background scores: for each of the `values` v, with e the highest background entity's score and s the highest
    class's: "offset" v + e, "constant" v, "max" max(v, e), "square" (2 v - s)^2, which is FTTM's.

    All values share one forward.
    """

    kind: str
    values: tuple[float, ...]

    def __post_init__(self):
        if self.kind not in KINDS or not self.values:
            raise ValueError(
                f"Expected a background rule among {', '.join(KINDS)} with at least one value, but got {self.kind!r} with "
                f"{list(self.values)}."
            )

    def score(self, value: float, entity: Tensor, highest: Tensor) -> Tensor:
        """The background's score at each pixel."""
        if self.kind == "offset":
            return entity + value
        if self.kind == "constant":
            return torch.full_like(entity, value)
        return entity.clamp(min=value) if self.kind == "max" else (2 * value - highest) ** 2
