"""What the background scores, which every class of an image must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor


KINDS = ("offset", "constant", "max", "square")


@dataclass(frozen=True)
class Rule:
    """What the background scores: for each of the `values` v, with e the highest background entity's score and s the highest
    class's: "offset" v + e, "constant" v, "max" max(v, e), "square" (2 v - s)^2, which is FTTM's.

    All values share one forward, and one count: they ascend, and what the background wins at one it wins at all above.
    """

    kind: str
    values: tuple[float, ...]

    def __post_init__(self):
        if self.kind not in KINDS or not self.values or list(self.values) != sorted(set(self.values)):
            raise ValueError(
                f"Expected a background rule among {', '.join(KINDS)} with at least one value, in ascending order, but got "
                f"{self.kind!r} with {list(self.values)}."
            )
        if self.kind == "square" and self.values[0] < 0:
            raise ValueError(f"Expected values of at least 0 for this rule, but got {list(self.values)}.")

    def score(self, value: float, entity: Tensor, highest: Tensor) -> Tensor:
        """The background's score at each pixel."""
        if self.kind == "offset":
            return entity + value
        if self.kind == "constant":
            return torch.full_like(entity, value)
        return entity.clamp(min=value) if self.kind == "max" else (2 * value - highest) ** 2

    def margin(self, entity: Tensor, highest: Tensor) -> Tensor:
        """The value above which the background wins a pixel."""
        if self.kind == "offset":
            return highest - entity
        if self.kind == "constant":
            return highest
        if self.kind == "max":
            return highest.masked_fill(entity > highest, -torch.inf)
        return (highest + highest.sqrt()) / 2  # of (2 v - s)^2 > s, as v and s are not negative
