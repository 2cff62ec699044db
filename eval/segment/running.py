"""One experiment, measured: every image read, answered for and counted, in chunks that stay on disk as they are done."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from eval.common.load import load_pipeline
from eval.common.processes import now, processes, progress, seed_of, share, slices
from eval.common.provenance import fingerprint
from eval.datasets.benchmarks import BadSample, Benchmark, present
from eval.datasets.folders import VOID
from eval.prompts.sources import Prompt
from eval.segment.confusion import Counts, as_tensor, cells_of, cells_of_values, joined, mean_iou, total
from eval.segment.experiment import Experiment, base_of, images_of, method_of, rule_of, source_of
from eval.segment.label_maps import decided, label_maps, matched, refined
from eval.segment.methods import Batch, Scores, named
from eval.segment.results import Measured, result_of


CHUNK = 32  # images whose counts are kept together
RUNS = Path("runs/segmentation")


@dataclass
class SegmentationRun:
    """One experiment's images, prompts and model, each made when it is first needed."""

    experiment: Experiment
    lender: "SegmentationRun | None" = None  # whose model it is

    @cached_property
    def state(self) -> PartialState:
        return processes()

    @cached_property
    def images(self) -> Benchmark:
        return images_of(self.experiment)

    @cached_property
    def prompts(self) -> Callable:
        source = source_of(self.experiment, self.images)
        source.check(self.images.ids)
        return source

    @cached_property
    def pipe(self):
        own = self.experiment
        return self.lender.pipe if self.lender else load_pipeline(own.model, own.dtype, self.state.device)

    @cached_property
    def conditions(self) -> dict:
        """What all rows share; digests of large files are taken once."""
        return self.experiment.conditions() | {"classes": self.images.classes}

    def said(self, name: str, image: Image.Image, mask: np.ndarray) -> list[Prompt]:
        """The prompts of an image."""
        return self.prompts(name, image, present(mask))

    def on_training_images(self) -> "SegmentationRun":
        """The same model and settings on the images that choose among values of the background's rule."""
        if self.experiment.evaluated == "train":
            raise ValueError("Expected another split than the training images, on which `tune` chooses a value.")
        return SegmentationRun(replace(self.experiment, split="train", limit=self.experiment.tune), self)

    def counts(self, name: str) -> Counts:
        """Counts of one method, from disk as far as they are there and whole; the processes share the chunks."""
        settings = self.experiment.rows[name]
        settings = {**settings, "base": base_of(name, settings)}
        digest = fingerprint(**self.conditions, settings=settings)
        chunks = slices(self.images.ids, CHUNK)
        work = [(ids, RUNS / digest / f"{zlib.crc32(' '.join(ids).encode()):08x}.npz") for ids in chunks]
        mine = share(work, self.state)
        with progress((ids for ids, _ in mine), name, self.state) as bar:
            for ids, path in mine:
                if not path.exists() or Counts.load(path).skipped:  # what was skipped may have been mended
                    self.measure(name, ids).save(path)
                bar.update(len(ids))
        self.state.wait_for_everyone()
        return joined([Counts.load(path) for _, path in work])

    # ---- one chunk ---------------------------------------------------------------------------------------------------
    def measure(self, name: str, ids: Sequence[str]) -> Counts:
        """Count some images; what cannot be counted is told in `skipped`."""
        answer = Answer(self, name)
        for part in slices(ids, self.experiment.batch):
            answer.add(part)
        if len(ids) > 1 and answer.failed.keys() == set(ids) and len(set(answer.failed.values())) == 1:
            raise ValueError(answer.failed[ids[0]])  # not the images are at fault
        cells = np.concatenate([np.zeros((0, 5), np.int64), *answer.found])
        return Counts(tuple(answer.images), cells, answer.skipped, dict(answer.seconds))


class Answer:
    """Counts of a method as they come, and where the time goes."""

    def __init__(self, run: SegmentationRun, name: str):
        self.run, self.method = run, method_of(name, run.experiment.rows[name])
        self.rule = rule_of(run.experiment, self.method, run.images)
        self.images: list[str] = []
        self.found: list[np.ndarray] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}  # of those, the ones that the model did not take
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        device = self.run.state.device.type
        start = now(device)
        yield
        self.seconds[name] += now(device) - start

    def add(self, ids: Sequence[str]) -> None:
        with self.stage("read"):
            samples = self.each(ids, self.run.images.read)
        with self.stage("prompts"):
            prompts = self.each(samples, lambda name: self.run.said(name, *samples[name]))
        asked = {name: said for name, said in prompts.items() if named(said) or self.method.nameless}
        silent = [name for name in prompts if name not in asked]
        with self.stage("model"):
            scores = self.scores({name: (samples[name][0], said) for name, said in asked.items()})
        if self.run.images.background is None:
            self.skipped |= dict.fromkeys(silent, "no class is asked for, and there is no background")
        else:
            scores |= dict.fromkeys(silent, Scores())
        with self.stage("labels"):
            for name, found in scores.items():
                self.count(name, found, *samples[name])

    def each(self, ids, function: Callable[[str], Any]) -> dict[str, Any]:
        """The function's value for each image that is not at fault."""
        found = {}
        for name in ids:
            try:
                found[name] = function(name)
            except BadSample as error:
                self.skipped[name] = str(error)
        return found

    def scores(self, asked: dict) -> dict[str, Scores]:
        """Scores of each image; if the batch fails, image by image, so that one prompt too long costs one image."""
        try:
            return dict(zip(asked, self.read(asked), strict=True)) if asked else {}
        except ValueError as error:
            if len(asked) > 1:
                return {k: v for name, one in asked.items() for k, v in self.scores({name: one}).items()}
            self.failed |= dict.fromkeys(asked, str(error))
            self.skipped |= self.failed
            return {}

    def read(self, asked: dict) -> list[Scores]:
        run, method, images = self.run, self.method, [image for image, _ in asked.values()]
        seeds = [seed_of(run.experiment.seed, name) for name in asked]
        batch = Batch(images, [said for _, said in asked.values()], seeds, run.images.classes)
        settings = {
            "timestep": run.experiment.timestep if method.timestep is None else method.timestep,
            "num_noises": run.experiment.num_noises if method.num_noises is None else method.num_noises,
            "height": run.experiment.size,
            "width": run.experiment.size,
            **method.own,
        }
        return method.answer(run.pipe, batch, method.config, run.experiment.batch, **settings)

    def predictions(self, scores: Scores, image, mask) -> Int[Tensor, "v H W"]:
        """Label maps of the mask's size, one for each value of the background's rule."""
        if scores.segments is not None:
            return matched(scores, mask, len(self.run.images.classes), self.run.images.background)
        if self.method.crf:
            return refined(scores, self.rule, self.run.images.background, image)
        return label_maps(scores, self.rule, self.run.images.background, mask.shape, self.method.stretched)

    def cells(self, scores, image, mask) -> np.ndarray:
        """Counted pixels; the values of a rule in one go, where each has no picture of its own."""
        place, truth, classes = len(self.images), as_tensor(mask), len(self.run.images.classes)
        if self.rule is None or self.method.crf:
            return cells_of(place, self.predictions(scores, image, mask), truth, classes, VOID)
        labels, kept = decided(scores, self.rule, self.run.images.background, mask.shape, self.method.stretched)
        return cells_of_values(
            place, labels, kept, len(self.rule.values), truth, classes, VOID, self.run.images.background
        )

    def count(self, name, scores, image, mask):
        if (mask == VOID).all():
            self.skipped[name] = "its mask is void everywhere"
            return
        self.found.append(self.cells(scores, image, mask))
        self.images.append(name)


def measured(run: SegmentationRun) -> dict[str, Measured]:
    """What each row measured; what cannot be measured is found before anything is."""
    experiment, found = run.experiment, {}
    judge = run.on_training_images() if experiment.tune and not experiment.counted.best_value else run
    rules = {name: rule_of(experiment, method_of(name, row), run.images) for name, row in experiment.rows.items()}
    for each in (run, judge):
        _ = each.prompts
    for name, rule in rules.items():
        values = rule.values if rule else (None,)
        counts = run.counts(name)
        if not counts.images:
            first = next(iter(counts.skipped.values()))
            raise ValueError(
                f"Expected images to measure {name} on, but all {len(counts.skipped)} were skipped: {first}"
            )
        judged = counts if judge is run or len(values) == 1 else judge.counts(name)
        matrices = total(judged, len(values), len(run.images.classes))
        best = int(np.argmax(mean_iou(matrices, experiment.counted.absent_counts)))
        found[name] = Measured(counts, best, values)
    return found


def result(experiment: Experiment) -> dict:
    """The result of an experiment, as its JSON file holds it."""
    run = SegmentationRun(experiment)
    return result_of(experiment, run.images, measured(run))
