"""Scores to label maps: the background's rule, a dense CRF where a method has one, and matching where there are no names."""

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval.datasets.folders import VOID
from eval.segment import crf
from eval.segment.matching import match
from eval.segment.methods import Rule, Scores
from goca_guidance.method.maps import min_max, resize


def decided(
    scores: Scores, rule: Rule | None, background: int | None, size: tuple[int, int], stretched: bool = False
) -> tuple[Int[Tensor, "H W"], Int[Tensor, "H W"]]:
    """The best class at each pixel of a picture of `size`, and for how many of the rule's values, from the lowest, it keeps it
    from the background; on the CPU. Without a rule it does for one value in all.

    The scores are resized, never the labels; `stretched`, each class's then reach from 0 to 1 again. Where no class was asked
    for, all is background.
    """
    if not scores.labels:
        return torch.full(size, background), torch.ones(size, dtype=torch.long)
    highest, first = _own(scores, size, stretched).max(0)
    labels = torch.tensor(scores.labels, device=highest.device)[first]
    if rule is None:
        return labels.cpu(), torch.ones_like(labels).cpu()
    margin = rule.margin(_resized(scores.background[None], size)[0], highest)
    values = torch.tensor(rule.values, device=margin.device)
    return labels.cpu(), torch.searchsorted(values, margin, right=True).cpu()


def label_maps(
    scores: Scores, rule: Rule | None, background: int | None, size: tuple[int, int], stretched: bool = False
) -> Int[Tensor, "v H W"]:
    """What `decided` says, as a label map for each value."""
    labels, kept = decided(scores, rule, background, size, stretched)
    numbers = torch.arange(len(rule.values) if rule else 1)[:, None, None]
    return torch.where(numbers < kept, labels, background or 0)


def refined(scores: Scores, rule: Rule | None, background: int | None, picture: Image.Image) -> Int[Tensor, "v H W"]:
    """Label maps by a dense CRF on the picture, one for each value of the rule (one in all without a rule)."""
    size = picture.height, picture.width
    if not scores.labels:
        return torch.full((len(rule.values), *size), background)
    own = _own(scores, size)
    labels, highest = torch.tensor(scores.labels), own.amax(0)
    if rule is None:
        return _by_crf(own, labels, picture)[None]
    entity, both = _resized(scores.background[None], size)[0], torch.cat([labels, torch.tensor([background])])
    backgrounds = [rule.score(value, entity, highest).clamp(0, 1) for value in rule.values]
    return torch.stack([_by_crf(torch.cat([own, score[None]]), both, picture) for score in backgrounds])


def matched(scores: Scores, truth: np.ndarray, classes: int, background: int | None) -> Int[Tensor, "1 H W"]:
    """Nameless segments with the classes that suit the truth best."""
    return torch.from_numpy(match(scores.segments.numpy(), truth, classes, VOID, background).astype(np.int64))[None]


def _resized(maps: Float[Tensor, "k H W"], size) -> Float[Tensor, "k Y X"]:
    return resize(maps[None].float(), size)[0]


def _own(scores, size, stretched=False):
    own = _resized(scores.maps, size)
    return min_max(own[None])[0] if stretched else own


def _by_crf(scores, labels, picture):
    shares = scores.clamp(min=1e-5)
    found = crf.refine((shares / shares.sum(0)).cpu().numpy(), np.asarray(picture))
    return labels[torch.from_numpy(np.ascontiguousarray(found)).argmax(0)]
