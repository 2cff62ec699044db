"""Scores to label maps: the background's rule, a dense CRF where a method has one, and matching where there are no names."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval import crf
from eval.background import Rule
from eval.benchmarks import VOID
from eval.matching import match
from eval.methods import Scores
from goca_guidance.maps import min_max


def label_maps(
    scores: Scores,
    rule: Rule | None,
    background: int | None,
    size: tuple[int, int],
    stretched: bool = False,
    picture: Image.Image | None = None,
) -> list[Int[Tensor, "H W"]]:
    """Label maps of `size`, on the CPU, one for each value of the rule (one in all without a rule).

    The scores are resized, never the labels; `stretched`, each class's then reach from 0 to 1 again. With a `picture` a dense
    CRF refines them. Where no class was asked for, all is background.
    """
    if not scores.labels:
        return [torch.full(size, background) for _ in rule.values]
    own = _resized(scores.maps, size)
    own = min_max(own[None])[0] if stretched else own
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
