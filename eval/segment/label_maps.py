"""Scores to label maps: the background's rule, a dense CRF where a method has one, and matching where there are no names."""

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval.datasets.folders import VOID
from eval.segment.matching import match
from eval.segment.methods import BackgroundRule, Scores
from goca_guidance import CRF
from goca_guidance.method.crf import labels_by_crf
from goca_guidance.method.maps import min_max, resize


def best_classes(
    scores: Scores, rule: BackgroundRule | None, background: int | None, size: tuple[int, int], stretched: bool = False
) -> tuple[Int[Tensor, "H W"], Int[Tensor, "H W"]]:
    """The best class at each pixel of a picture of `size`, and how many of the rule's values leave it the pixel; on the CPU.

    The values ascend, and what the background wins at one of them it wins at all above: so the number says at which ones.
    Without a rule it is 1, of one value in all. The scores are resized, never the labels; `stretched`, each class's then
    reach from 0 to 1 again. Where no class was asked for, all is background.
    """
    if not scores.labels:
        return torch.full(size, background), torch.ones(size, dtype=torch.long)
    highest, first = _class_scores(scores, size, stretched).max(0)
    labels = torch.tensor(scores.labels, device=highest.device)[first]
    if rule is None:
        return labels.cpu(), torch.ones_like(labels).cpu()
    margin = rule.margin(_resized(scores.background[None], size)[0], highest)
    values = torch.tensor(rule.values, device=margin.device)
    return labels.cpu(), torch.searchsorted(values, margin, right=True).cpu()


def label_maps(
    scores: Scores, rule: BackgroundRule | None, background: int | None, size: tuple[int, int], stretched: bool = False
) -> Int[Tensor, "v H W"]:
    """`best_classes` as a label map for each value."""
    labels, kept = best_classes(scores, rule, background, size, stretched)
    numbers = torch.arange(len(rule.values) if rule else 1)[:, None, None]
    return torch.where(numbers < kept, labels, background or 0)


def crf_label_maps(
    scores: Scores,
    rule: BackgroundRule | None,
    background: int | None,
    picture: Image.Image,
    parameters: CRF,
) -> Int[Tensor, "v H W"]:
    """Label maps by a dense CRF on the picture, one for each value of the rule (one in all without a rule)."""
    size = picture.height, picture.width
    if not scores.labels:
        return torch.full((len(rule.values), *size), background)
    classes = _class_scores(scores, size)
    labels, highest = torch.tensor(scores.labels), classes.amax(0)
    if rule is None:
        return _by_crf(classes, labels, picture, parameters)[None]
    entity, both = _resized(scores.background[None], size)[0], torch.cat([labels, torch.tensor([background])])
    backgrounds = [rule.score(value, entity, highest).clamp(0, 1) for value in rule.values]
    every = (torch.cat([classes, score[None]]) for score in backgrounds)
    return torch.stack([_by_crf(scores, both, picture, parameters) for scores in every])


def matched_label_maps(
    scores: Scores, truth: np.ndarray, classes: int, background: int | None
) -> Int[Tensor, "1 H W"]:
    """Nameless segments with the classes that suit the truth best."""
    return torch.from_numpy(match(scores.segments.numpy(), truth, classes, VOID, background).astype(np.int64))[None]


def _resized(maps: Float[Tensor, "k H W"], size) -> Float[Tensor, "k Y X"]:
    return resize(maps[None].float(), size)[0]


def _class_scores(scores, size, stretched=False) -> Float[Tensor, "k Y X"]:
    maps = _resized(scores.maps, size)
    return min_max(maps[None])[0] if stretched else maps


def _by_crf(scores, labels, picture, parameters):
    return labels[labels_by_crf(scores, torch.from_numpy(np.array(picture)), parameters)]
