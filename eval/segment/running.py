"""One experiment, measured: every image read, segmented and counted, in chunks that stay on disk as they are done."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from eval.common.files import intact
from eval.common.load import load_pipeline
from eval.common.processes import now, processes, progress, seed_of, share, slices
from eval.common.provenance import fingerprint
from eval.datasets.benchmarks import BadSample, Benchmark, present
from eval.datasets.folders import VOID
from eval.prompts.sources import Prompt, Source
from eval.segment.confusion import Counts, as_tensor, cells_of, cells_of_values, joined, mean_iou, total
from eval.segment.experiment import Experiment, base_of, images_of, method_of, rule_of, source_of
from eval.segment.label_maps import best_classes, crf_label_maps, label_maps, matched_label_maps
from eval.segment.methods import Batch, Scores, labels_asked
from eval.segment.results import Measured, result_of


CHUNK = 32  # images whose counts are kept together
RUNS = Path("runs/segmentation")
MODULES = ("goca_guidance", "eval.datasets", "eval.prompts", "eval.scenes.scene", "eval.common.load", "eval.common.processes",
           "eval.segment.running", "eval.segment.experiment", "eval.segment.methods", "eval.segment.baselines",
           "eval.segment.label_maps", "eval.segment.matching", "eval.segment.confusion")  # fmt: skip
"""What counts depend on."""


@dataclass
class SegmentationRun:
    """One experiment's images, prompts and model, each made when it is first needed.

    Args:
        experiment: what is measured.
        lender: another run, whose loaded model is used.
    """

    experiment: Experiment
    lender: "SegmentationRun | None" = None

    @cached_property
    def state(self) -> PartialState:
        return processes()

    @cached_property
    def images(self) -> Benchmark:
        return images_of(self.experiment)

    @cached_property
    def source(self) -> Source:
        """Of prompts; ValueError where it cannot serve the images."""
        source = source_of(self.experiment, self.images)
        source.check(self.images.ids)
        return source

    @cached_property
    def pipe(self):
        model, dtype = self.experiment.model, self.experiment.dtype
        return self.lender.pipe if self.lender else load_pipeline(model, dtype, self.state.device)

    @cached_property
    def conditions(self) -> dict:
        """What all rows share; digests of large files are taken once."""
        return self.experiment.conditions() | {"classes": self.images.classes}

    def prompts_of(self, image_id: str, image: Image.Image, mask: np.ndarray) -> list[Prompt]:
        """The prompts of an image."""
        return self.source(image_id, image, present(mask))

    def on_training_images(self) -> "SegmentationRun":
        """The same model and settings on the images that choose among values of the background's rule."""
        if self.experiment.evaluated_split == "train":
            raise ValueError("Expected another split than the training images, on which `tune` chooses a value.")
        return SegmentationRun(replace(self.experiment, split="train", limit=self.experiment.tune), self)

    def counts(self, row: str) -> Counts:
        """Counts of one row's method, from disk as far as they are there and whole; the processes share the chunks."""
        settings = self.experiment.rows[row]
        settings = {**settings, "base": base_of(row, settings)}
        digest = fingerprint(*MODULES, **self.conditions, settings=settings)
        chunks = slices(self.images.ids, CHUNK)
        work = [(ids, RUNS / digest / f"{zlib.crc32(' '.join(ids).encode()):08x}.npz") for ids in chunks]
        mine = share(work, self.state)
        with progress((ids for ids, _ in mine), row, self.state) as bar:
            for ids, path in mine:
                known = intact(path, partial(Counts.of, ids))
                if known is None or known.skipped:  # what was skipped may have been mended
                    self.measure(row, ids).save(path)
                bar.update(len(ids))
        self.state.wait_for_everyone()
        return joined([Counts.load(path) for _, path in work])

    def measure(self, row: str, ids: Sequence[str]) -> Counts:
        """Count one chunk of images; what cannot be counted is told in `skipped`."""
        counting = Counting(self, row)
        for batch in slices(ids, self.experiment.batch):
            counting.process(batch)
        refused = counting.refused
        if len(ids) > 1 and refused.keys() == set(ids) and len(set(refused.values())) == 1:
            raise ValueError(refused[ids[0]])  # not the images are at fault
        cells = np.concatenate([np.zeros((0, 5), np.int64), *counting.cells])
        return Counts(tuple(counting.counted), cells, counting.skipped, dict(counting.seconds))


class Counting:
    """One row's method on batches of images: read, prompted, segmented, compared with their masks, counted; and the time of
    each stage."""

    def __init__(self, run: SegmentationRun, row: str):
        self.run, self.method = run, method_of(row, run.experiment.rows[row])
        self.rule = rule_of(run.experiment, self.method, run.images)
        self.counted: list[str] = []  # ids
        self.cells: list[np.ndarray] = []  # of each of them
        self.skipped: dict[str, str] = {}  # id to reason
        self.refused: dict[str, str] = {}  # of those, the ones that the model did not take
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        device = self.run.state.device.type
        start = now(device)
        yield
        self.seconds[name] += now(device) - start

    def process(self, ids: Sequence[str]) -> None:
        """A batch of images, from files to counts."""
        with self.stage("read"):
            samples = self.try_each(ids, self.run.images.read)
        with self.stage("prompts"):
            prompts = self.try_each(samples, lambda image_id: self.run.prompts_of(image_id, *samples[image_id]))
        asked = [i for i in prompts if labels_asked(prompts[i]) or self.method.nameless]
        with self.stage("model"):
            scores = self.scores({image_id: (samples[image_id][0], prompts[image_id]) for image_id in asked})
        unasked = [image_id for image_id in prompts if image_id not in asked]
        if self.run.images.background is None:
            self.skipped |= dict.fromkeys(unasked, "no class is asked for, and there is no background")
        else:
            scores |= dict.fromkeys(unasked, Scores())
        with self.stage("labels"):
            for image_id in scores:
                self.count(image_id, scores[image_id], *samples[image_id])

    def try_each(self, ids, function: Callable[[str], Any]) -> dict[str, Any]:
        """The function's value for each image that is not at fault."""
        found = {}
        for image_id in ids:
            try:
                found[image_id] = function(image_id)
            except BadSample as error:
                self.skipped[image_id] = str(error)
        return found

    def scores(self, asked: dict[str, tuple[Image.Image, list[Prompt]]]) -> dict[str, Scores]:
        """Scores of each image; if the batch fails, image by image, so that one prompt too long costs one image."""
        try:
            return dict(zip(asked, self.run_model(asked), strict=True)) if asked else {}
        except ValueError as error:
            if len(asked) > 1:
                parts = [self.scores({image_id: asked[image_id]}) for image_id in asked]
                return {image_id: scores for part in parts for image_id, scores in part.items()}
            self.refused |= dict.fromkeys(asked, str(error))
            self.skipped |= self.refused
            return {}

    def run_model(self, asked: dict[str, tuple[Image.Image, list[Prompt]]]) -> list[Scores]:
        """The method's answer for a batch of images with their prompts."""
        experiment, method = self.run.experiment, self.method
        images, prompts = map(list, zip(*asked.values(), strict=True))
        seeds = [seed_of(experiment.seed, image_id) for image_id in asked]
        settings = {
            "timestep": experiment.timestep if method.timestep is None else method.timestep,
            "num_noises": experiment.num_noises if method.num_noises is None else method.num_noises,
            "height": experiment.size,
            "width": experiment.size,
            **method.extra,
        }
        batch = Batch(images, prompts, seeds, self.run.images.classes, self.rule is None or self.rule.merged)
        return method.answer(self.run.pipe, batch, method.config, experiment.batch, **settings)

    def label_maps(self, scores: Scores, image: Image.Image, mask: np.ndarray) -> Int[Tensor, "v H W"]:
        """Of the mask's size, one for each value of the background's rule."""
        background = self.run.images.background
        if scores.segments is not None:
            return matched_label_maps(scores, mask, len(self.run.images.classes), background)
        if self.method.crf:
            return crf_label_maps(scores, self.rule, background, image, self.method.crf)
        return label_maps(scores, self.rule, background, mask.shape, self.method.stretched)

    def count(self, image_id: str, scores: Scores, image: Image.Image, mask: np.ndarray) -> None:
        """Compare an image's scores with its mask."""
        if (mask == VOID).all():
            self.skipped[image_id] = "its mask is void everywhere"
            return
        self.cells.append(self.count_pixels(scores, image, mask))
        self.counted.append(image_id)

    def count_pixels(self, scores: Scores, image: Image.Image, mask: np.ndarray) -> np.ndarray:
        """Cells of the next image; the values of a rule in one go, where each has no picture of its own."""
        place, truth, classes = len(self.counted), as_tensor(mask), len(self.run.images.classes)
        if self.rule is None or self.method.crf:
            return cells_of(place, self.label_maps(scores, image, mask), truth, classes, VOID)
        background, values = self.run.images.background, len(self.rule.values)
        labels, kept = best_classes(scores, self.rule, background, mask.shape, self.method.stretched)
        return cells_of_values(place, labels, kept, values, truth, classes, VOID, background)


def measured(run: SegmentationRun) -> dict[str, Measured]:
    """What each row measured; what cannot be measured is found before anything is."""
    experiment, found = run.experiment, {}
    protocol = experiment.chosen_protocol
    judge = run.on_training_images() if experiment.tune and not protocol.best_value else run
    rules = {
        row: rule_of(experiment, method_of(row, settings), run.images) for row, settings in experiment.rows.items()
    }
    for each in (run, judge):
        _ = each.source
    for row, rule in rules.items():
        values = rule.values if rule else (None,)
        counts = run.counts(row)
        if not counts.images:
            first = next(iter(counts.skipped.values()))
            raise ValueError(
                f"Expected images to measure {row} on, but all {len(counts.skipped)} were skipped: {first}"
            )
        judged = counts if judge is run or len(values) == 1 else judge.counts(row)
        matrices = total(judged, len(values), len(run.images.classes))
        best = int(np.argmax(mean_iou(matrices, protocol.absent_counts)))
        found[row] = Measured(counts, best, values)
    return found


def result(experiment: Experiment) -> dict:
    """The result of an experiment, as its JSON file holds it."""
    run = SegmentationRun(experiment)
    return result_of(experiment, run.images, measured(run))
