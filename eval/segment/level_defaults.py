"""What the papers leave open, and what we add: chosen on validation scenes, kept where it holds on test scenes.

A candidate changes one thing of a base. It is chosen where it is ahead of its base on validation scenes; there it is measured
on test scenes, and holds if the 95 % interval of the difference lies above zero.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from eval.scenes.models import weights_of
from eval.segment.level_counts import LevelMethod, LevelRun, measure, unknown
from eval.segment.level_rows import compared
from goca_guidance import CRF, GoCAConfig, GoCASCFGPipeline


IMAGES = {"validation": 100, "test": 120}
LEVELS = ("plain",)
ALL = GoCAConfig(heads="contribution")
BASES = {
    "all": LevelMethod(ALL),
    "vanilla": LevelMethod(GoCAConfig.vanilla()),
    "rows as they are": LevelMethod(replace(ALL, row_normalise=False)),
}
CANDIDATES = {  # each with its base
    "heads uniform": ("all", LevelMethod(replace(ALL, heads="uniform"))),
    "rows normalised": ("rows as they are", LevelMethod(replace(ALL, row_normalise=True))),
    "first channel of the features": ("all", LevelMethod(replace(ALL, reference_channels=1))),
    "no blur": ("all", LevelMethod(replace(ALL, blur_size=1))),
    **{f"refined {order} times": ("all", LevelMethod(replace(ALL, refine_order=order))) for order in (0, 1, 2, 3, 5)},
    "CRF (ours)": ("all", LevelMethod(ALL, crf=CRF())),
    "CRF of 10 grey levels (ours)": ("all", LevelMethod(ALL, crf=CRF(theta_beta=10.0))),
    "vanilla, CRF of 10 grey levels": ("vanilla", LevelMethod(GoCAConfig.vanilla(), crf=CRF(theta_beta=10.0))),
}


def defaults(model: str, folder: Path, pipe: GoCASCFGPipeline, timestep: int) -> list[dict]:
    """Rows of each candidate on each level: of validation scenes, and, where it was ahead, of test scenes."""
    rows = []
    for level in LEVELS:
        if not unknown(model, level):
            run = LevelRun(model, folder, level, {}, "validation", timestep=timestep)
            found = _measured(run, pipe, CANDIDATES)
            ahead = [row["method"] for row in found if row["difference"] > 0]
            rows += found + _measured(replace(run, split="test"), pipe, ahead)
    return rows


def _measured(run: LevelRun, pipe: GoCASCFGPipeline, names: Collection[str]) -> list[dict]:
    chosen = {name: CANDIDATES[name] for name in names}
    methods = {base: BASES[base] for base, _ in chosen.values()} | {name: ours for name, (_, ours) in chosen.items()}
    run = replace(run, images=IMAGES[run.split], methods=methods)
    for chunk in tqdm(run.chunks, desc=f"{run.model}, {run.level}, {run.split}", unit="chunk"):
        measure(run, pipe, chunk)
    place = {"model": run.model, "level": run.level, "split": run.split}
    facts = {"images": run.images, "weights": weights_of(run.folder)}
    return [
        {**place, "method": name, "base": base, **facts, **compared(run, name, base)}
        for name, (base, _) in chosen.items()
    ]
