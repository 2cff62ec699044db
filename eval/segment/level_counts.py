"""Methods on the levels of Scenes, counted: one forward for all methods, every chunk of images kept as soon as it is done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eval.common.files import expecting, intact
from eval.common.load import load_pipeline
from eval.common.processes import seed_of, slices
from eval.common.provenance import fingerprint
from eval.scenes.levels import LEVELS, VOID, question, without_borders
from eval.scenes.models import MODELS, longest_text, weights_of
from eval.segment.confusion import Counts, as_tensor, cells_of, joined
from eval.segment.together import joined_prompts, labelled, segment_together
from goca_guidance import CRF, GoCAConfig, GoCASCFGPipeline


CHUNK = 20  # images whose counts are kept together
BATCH = {"cpu": 10}  # images in a forward; on other devices a chunk
RUNS = Path("runs/proof")
MODULES = ("goca_guidance", "eval.scenes.scene", "eval.scenes.levels", "eval.scenes.models", "eval.common.load",
           "eval.common.processes", "eval.segment.level_counts", "eval.segment.together",
           "eval.segment.confusion")  # fmt: skip
"""What counts depend on."""


@dataclass(frozen=True)
class LevelMethod:
    """A row of the comparison: how attention becomes maps, what the background's words are raised by, and a CRF."""

    config: GoCAConfig
    offset: float = 0.0
    crf: CRF | None = None


@dataclass(frozen=True)
class LevelRun:
    """Methods on one level, by a model at one share of its training.

    Args:
        model: a name of `eval.scenes.models.MODELS`.
        folder: of the weights.
        level: a name of `LEVELS`.
        methods: the rows by name.
        split, images: the first so many scenes of it.
        timestep: of the noise; None is the preset's.
    """

    model: str
    folder: Path
    level: str
    methods: Mapping[str, LevelMethod] = field(hash=False)
    split: str = "test"
    images: int = 100
    timestep: int | None = None

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"Expected levels among {', '.join(LEVELS)}, but got {self.level!r}.")
        if reason := unknown(self.model, self.level):
            raise ValueError(
                f"Expected levels that {self.model} knows, but got {self.level!r}, {reason}: leave the level out."
            )

    @property
    def side(self) -> int:
        """Of its pictures, in pixels."""
        return MODELS[self.model].home * LEVELS[self.level].enlarged

    @property
    def prompts(self) -> int:
        """In so many are the names given, because the text encoder reads no more of them in one."""
        return -(-LEVELS[self.level].tokens // longest_text(self.folder))

    @property
    def chunks(self) -> list[Sequence[int]]:
        """Numbers of the scenes that are counted together."""
        return slices(range(self.images), CHUNK)

    @property
    def value(self) -> int:
        """Of the counts: 0 for all pixels, 1 for those inside."""
        return int(LEVELS[self.level].interior)

    def path(self, method: str, chunk: Sequence[int]) -> Path:
        """Where the counts of a method on a chunk are kept; a level and its interior share them."""
        asked = asdict(replace(LEVELS[self.level], says="", interior=False))
        digest = fingerprint(
            *MODULES, level=asked, model=self.model, weights=weights_of(self.folder), split=self.split,
            timestep=self.timestep, method=asdict(self.methods[method]),
        )  # fmt: skip
        return RUNS / digest / f"{chunk[0]}-{chunk[-1]}.npz"

    def kept(self, method: str, chunk: Sequence[int]) -> Counts | None:
        """The counts of a method on a chunk, if they were kept whole."""
        return intact(self.path(method, chunk), partial(Counts.of, [str(index) for index in chunk]))

    def missing(self, chunk: Sequence[int]) -> list[str]:
        """The methods that were not counted on a chunk."""
        return [method for method in self.methods if self.kept(method, chunk) is None]

    def counts(self, method: str) -> Counts:
        """Of all chunks, which were kept."""
        return joined([Counts.load(self.path(method, chunk)) for chunk in self.chunks])


def unknown(model: str, level: str) -> str:
    """Why a model cannot be asked at a level; "" where it can."""
    side, sides = MODELS[model].home * LEVELS[level].enlarged, MODELS[model].sides
    if side not in sides:
        return f"whose pictures have {side} pixels on a side, and it was trained on {' and '.join(map(str, sides))}"
    return ""


def loaded(folder: Path, device: str | torch.device | None = None) -> GoCASCFGPipeline:
    """The pipeline in float32; ValueError for weights that cannot be read."""
    with expecting("the weights of a model", folder, "let its training write them again"):
        return load_pipeline(str(folder), device=device)


def measure(run: LevelRun, pipe: GoCASCFGPipeline, chunk: Sequence[int]) -> None:
    """Count what is missing of a chunk, and keep it."""
    missing = run.missing(chunk)
    if not missing:
        return
    cells: dict[str, list[np.ndarray]] = {method: [] for method in missing}
    for batch in slices(chunk, BATCH.get(pipe.device.type, CHUNK)):
        for method, found in _cells(run, pipe, missing, batch, len(cells[missing[0]])).items():
            cells[method] += found
    for method, found in cells.items():
        Counts(tuple(map(str, chunk)), np.concatenate(found)).save(run.path(method, chunk))


def _cells(run, pipe, methods, batch, start) -> dict[str, list[np.ndarray]]:
    """Cells of each image of a batch, the first of which has the number `start`: of all pixels, and of those inside."""
    level = replace(LEVELS[run.level], interior=False)
    asked = [question(level, run.split, index, MODELS[run.model].home) for index in batch]
    configs = list(dict.fromkeys(run.methods[method].config for method in methods))
    parts = []
    for prompt in range(run.prompts):
        parts.append(
            segment_together(
                pipe,
                [each.image for each in asked],
                [each.names[prompt :: run.prompts] for each in asked],
                configs,
                asked[0].words,
                timestep=run.timestep,
                generator=[torch.Generator().manual_seed(seed_of(0, f"{run.split} {index}")) for index in batch],
                height=run.side,
                width=run.side,
                **MODELS[run.model].arguments,
            )
        )
    found = {config: joined_prompts([part[config] for part in parts]) for config in configs}
    masks = [(each.mask, without_borders(each.mask)) for each in asked]
    return {
        method: [
            np.concatenate([_of_value(value, start + place, labels, mask, level) for value, mask in enumerate(both)])
            for place, (labels, both) in enumerate(
                zip(labelled(found[row.config], level.classes, row.offset, row.crf), masks, strict=True)
            )
        ]
        for method, row in run.methods.items()
        if method in methods
    }


def _of_value(value, place, labels, mask, level):
    cells = cells_of(place, labels[None], as_tensor(mask), len(level.classes), VOID)
    cells[:, 1] = value
    return cells
