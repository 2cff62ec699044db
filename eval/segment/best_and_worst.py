"""Pictures of the images on which a method does best and worst: the image, the truth, the prediction."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.common.files import replacing
from eval.common.plots import stack
from eval.datasets.folders import VOID
from eval.segment.confusion import image_scores
from eval.segment.running import Counting, SegmentationRun
from goca_guidance.pictures import overlay


def draw(run: SegmentationRun, found: dict, count: int, folder: Path) -> list[Path]:
    """Write BENCHMARK-METHOD-{best,worst}.png with `count` images each, by the mIoU of the image alone."""
    paths = []
    for row, measured in found.items():
        scores = image_scores(measured.counts, measured.best, len(run.images.classes))
        ranked = sorted((score, image_id) for image_id, score in scores.items())
        for kind, chosen in (("worst", ranked[:count]), ("best", ranked[: -count - 1 : -1])):
            page = stack([_picture(run, row, measured.best, image_id, score) for score, image_id in chosen], width=900)
            path = folder / f"{run.images.name}-{row.replace(' ', '-')}-{kind}.png"
            with replacing(path) as part:
                page.save(part, format="PNG")
            paths.append(path)
    return paths


def _picture(run, row, value, image_id, score) -> Image.Image:
    counting = Counting(run, row)
    image, mask = run.images.read(image_id)
    (scores,) = counting.run_model({image_id: (image, run.prompts_of(image_id, image, mask))})
    prediction = counting.label_maps(scores, image, mask)[value]
    truth = torch.from_numpy(np.where(mask == VOID, len(run.images.classes), mask).astype(np.int64))
    titles = [f"truth ({image_id})", f"{row}: {100 * score:.1f} %"]
    figure = overlay(image, [truth, prediction], (*run.images.classes, "void"), titles)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return Image.open(buffer).convert("RGB")
