"""Scores to label maps: the background's rule, a dense CRF where a method has one, and matching where there are no names."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval import crf
from eval.benchmarks import VOID
from eval.matching import match
from eval.methods import Scores


KINDS = ("offset", "constant", "max", "square")


@dataclass(frozen=True)
class Rule:
    """What the background scores: for each of the `values` v, with e the highest background entity's score and s the highest
    class's: "offset" v + e, "constant" v, "max" max(v, e), "square" max(0, 2 v - s)^2, which is FTTM's.

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
        return entity.clamp(min=value) if self.kind == "max" else (2 * value - highest).clamp(min=0) ** 2


def label_maps(
    scores: Scores,
    rule: Rule | None,
    background: int | None,
    size: tuple[int, int],
    picture: Image.Image | None = None,
) -> list[Int[Tensor, "H W"]]:
    """Label maps of `size`, on the CPU, one for each value of the rule (one in all without a rule).

    The scores are resized, never the labels. With a `picture` a dense CRF refines them.
    """
    own = _resized(scores.maps, size)
    labels = torch.tensor(scores.labels, device=own.device)
    highest, first = own.max(0)
    if rule is None:
        return [_refined(own, labels, picture) if picture else labels[first].cpu()]
    entity, found = _resized(scores.background[None], size)[0], []
    for value in rule.values:
        score = rule.score(value, entity, highest)
        if picture:
            both = torch.cat([own, score[None].clamp(0, 1)])
            found.append(_refined(both, torch.cat([labels, labels.new_tensor([background])]), picture))
        else:
            found.append(torch.where(score > highest, background, labels[first]).cpu())
    return found


def matched(scores: Scores, truth: np.ndarray, classes: int, background: int | None) -> list[Int[Tensor, "H W"]]:
    """Nameless segments with the classes that suit the truth best."""
    return [torch.from_numpy(match(scores.segments.numpy(), truth, classes, VOID, background).astype(np.int64))]


def _resized(maps: Float[Tensor, "k H W"], size) -> Float[Tensor, "k Y X"]:
    return F.interpolate(maps[None].float(), size, mode="bilinear", align_corners=False)[0]


def _refined(scores, labels, picture):
    shares = scores.clamp(min=1e-5)
    refined = crf.refine((shares / shares.sum(0)).cpu().numpy(), np.asarray(picture))
    return labels.cpu()[torch.from_numpy(np.ascontiguousarray(refined)).argmax(0)]
