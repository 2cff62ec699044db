"""FinishedRun folders of `eval.coco30k` as they are read, and which of them are a pair."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval.common.files import some
from eval.common.provenance import model_name
from eval.features import Item, visible


COCO30K = "MS-COCO_val2014_30k_captions"
UNPAIRED = {"method", "model", "captions", "batch"}  # a pair may differ in these; digests stand for the paths


@dataclass(frozen=True)
class FinishedRun:
    """A run folder of `eval.coco30k`: its settings, its images sorted by id, and how many failed."""

    folder: Path
    settings: dict
    items: tuple[Item, ...]
    failed: int

    @property
    def group(self) -> dict:
        """What a pair shares."""
        source = Path(self.settings["captions"]).stem
        return {
            "model": model_name(self.settings["model"]),
            "captions": "coco30k" if source == COCO30K else source,
            "guidance_scale": self.settings["guidance_scale"],
        }


def read_run(folder: Path) -> FinishedRun:
    """ValueError for a folder that is no run, or whose manifest and images do not agree."""
    if lacking := [name for name in ("settings.json", "manifest.csv") if not (folder / name).is_file()]:
        names = " and no ".join(lacking)
        raise ValueError(f"Expected a run folder of eval.coco30k, but {folder} has no {names}: finish its generation.")
    told = json.loads((folder / "settings.json").read_text())
    settings = told.get("settings", {}) | {"versions": told.get("versions")}
    refuse(
        folder, "settings of eval.coco30k; these lack", {"method", "model", "captions", "guidance_scale"} - {*settings}
    )
    table, failed = (read_table(folder / name) for name in ("manifest.csv", "failed.csv"))
    refuse(folder, "the columns of manifest.csv; these lack", {"id", "caption", "file", "sha256"} - {*table.columns})
    refuse(folder, "each id once in manifest.csv; these stand twice", {*table["id"][table["id"].duplicated()]})
    if table.empty:
        raise ValueError(
            f"Expected images in the run {folder}, but its manifest is empty: start its generation again."
        )
    items = [Item(row.id, folder / row.file, row.caption, row.sha256) for row in table.itertuples()]
    listed, found = {item.path for item in items}, {*visible(folder / "images")}
    names = {path.name for path in listed - found}
    refuse(folder, "every image of its manifest (start its generation again); these lack", names)
    names = {path.name for path in found - listed}
    refuse(folder, "only images of its manifest (move others away, or start its generation again); found", names)
    return FinishedRun(folder, settings, tuple(sorted(items, key=lambda item: item.id)), len(failed))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file of texts as they stand, or no rows where there is no file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def refuse(folder: Path, expected: str, mistakes: Collection[str]) -> None:
    """ValueError that names some of the mistakes, if there are any."""
    if mistakes:
        raise ValueError(f"Expected of {folder} {expected}: {some(sorted(mistakes))}.")


def base_of(run: FinishedRun, runs: Sequence[FinishedRun]) -> FinishedRun | None:
    """The cfg run of the same captions, model and scale, None for such a run itself; ValueError if they are no pair."""
    bases = [each for each in runs if each.settings["method"] == "cfg" and each.group == run.group]
    if len(bases) > 1:
        folders = ", ".join(str(each.folder) for each in bases)
        raise ValueError(f"Expected one cfg run of {run.group}, but got {len(bases)}: {folders}.")
    if not bases or bases[0] is run:
        return None
    check_pair(run, bases[0])
    return bases[0]


def check_pair(run: FinishedRun, base: FinishedRun) -> None:
    """ValueError unless both were made from the same captions and noise, with the same settings but for the method."""
    names = {*run.settings, *base.settings} - UNPAIRED
    differing = {name for name in names if run.settings.get(name) != base.settings.get(name)}
    refuse(run.folder, f"the settings of {base.folder}, its pair, but for the method; these differ", differing)
    ours, theirs = ({(item.id, item.caption) for item in each.items} for each in (run, base))
    refuse(
        run.folder,
        f"the ids and captions of {base.folder}, its pair; only in one",
        {name for name, _ in ours ^ theirs},
    )
