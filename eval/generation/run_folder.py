"""A run folder of `eval.coco30k`, as it is written, and as it is read; and which of them are a pair.

images/ID.png, settings.json, manifest.csv (id, caption, seed, file, sha256) and, where an image is missing, failed.csv.
"""

import csv
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pandas as pd
from PIL import Image, UnidentifiedImageError

from eval.common.files import expecting, replacing, some, writable, write_json
from eval.common.provenance import model_name


MOVABLE = ("model", "captions")  # paths, which digests stand for
PNG_END = bytes.fromhex("0000000049454e44ae426082")  # the whole last chunk, IEND
COCO30K = "MS-COCO_val2014_30k_captions"
UNPAIRED = {"method", "model", "captions", "batch"}  # a pair may differ in these; digests stand for the paths
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


# ---- images ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Item:
    """One image: its id, its file, what it was generated for, and the sha256 of the file's bytes, where that is known."""

    id: str
    path: Path
    caption: str = ""
    sha256: str | None = None

    def identity(self) -> tuple:
        """What stands for the image in a fingerprint."""
        if self.sha256:
            return self.id, self.caption, self.sha256
        stat = self.path.stat()
        return self.id, self.caption, stat.st_size, stat.st_mtime_ns

    def read(self) -> Image.Image:
        """The image in RGB; ValueError if it cannot be read, or is not the one whose digest is known."""
        try:
            data = self.path.read_bytes()
            if self.sha256 and hashlib.sha256(data).hexdigest() != self.sha256:
                raise OSError("its bytes are not those that the manifest was written for")
            return Image.open(BytesIO(data)).convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"Expected an image that can be read whole, but {self.path} is not ({error}). Start its generation again, "
                "which replaces damaged images, or take it out of the reference."
            ) from error


def visible(folder: Path) -> list[Path]:
    """Files in a folder and below, but hidden ones, which unfinished writes are."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


# ---- as it is written ------------------------------------------------------------------------------------------------
def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_table(path: Path, rows: Iterable[Sequence], columns: Sequence[str]) -> None:
    """A CSV file, all texts in quotes."""
    table = pd.DataFrame(rows, columns=list(columns))
    write_whole(path, table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode())


def png_bytes(image: Image.Image) -> bytes:
    """The file that an image is kept as."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def digest_of_png(path: Path, size: int) -> str | None:
    """sha256 of a file; None unless it is an RGB PNG of `size` x `size` pixels, whole by the checksums of its chunks."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            expected = image.size == (size, size) and image.mode == "RGB"
            image.verify()
    except Exception:  # Pillow raises many kinds for damaged files
        return None
    return hashlib.sha256(data).hexdigest() if expected and data.endswith(PNG_END) else None


@dataclass(frozen=True)
class RunFolder:
    """A run folder."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    def path(self, name: str) -> Path:
        return self.images / f"{name}.png"

    def check(self, made_with: Mapping, ids: Iterable[str]) -> None:
        """ValueError for a folder that cannot be written to, of other settings or versions, or with files that are not of
        this run; changes nothing."""
        expected = {f"{name}.png" for name in ids}
        self._check_kinds(expected)
        present = [path.name for path in self.images.glob("[!.]*")]
        if before := self.before():
            self._check_settings(before, made_with)
        else:
            present += [path.name for path in self.root.glob("[!.]*") if path != self.images]
            expected = set()
        if foreign := sorted(set(present) - expected):
            raise ValueError(
                f"Expected only images of this run in {self.root}, but found {some(foreign)}: move them away, or use another "
                "--out."
            )

    def _check_kinds(self, names: Collection[str]) -> None:
        """Folders where the run has files, and a file where it has a folder."""
        writable(self.root / ".lock")
        if self.images.exists() and not self.images.is_dir():
            raise ValueError(f"Expected a folder of images, but {self.images} is none: move it away.")
        files = [*self.root.glob("*.json"), *self.root.glob("*.csv"), *self.images.glob("*.png")]
        known = {"settings.json", "manifest.csv", "failed.csv", *names}
        if folders := sorted(path.name for path in files if path.name in known and path.is_dir()):
            raise ValueError(f"Expected files in {self.root}, but these are folders: {some(folders)}. Move them away.")

    def before(self) -> dict | None:
        """What a started run says that it is made with; None for a new one, ValueError where it cannot be read."""
        if not self.settings.exists():
            return None
        advice = "if its images are of the settings given now, move them away, start again, and move them back"
        with expecting("the settings of a run", self.settings, advice):
            content = json.loads(self.settings.read_text())
            told = {**content["settings"], **content["versions"]}
            return {"told": told, "commits": content["commit"].split(", ")}

    def _check_settings(self, before: Mapping, made_with: Mapping) -> None:
        old, new = before["told"], {**made_with["settings"], **made_with["versions"]}
        names = [name for name in {**old, **new} if name not in MOVABLE and old.get(name) != new.get(name)]
        if names:
            changes = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names)
            raise ValueError(
                f"Expected the settings that {self.root} was made with, but these differ: {changes}. Use another --out."
            )

    def open(self, made_with: Mapping) -> None:
        """Remove what a killed process left half-written, and say what the run is made with, every commit of it."""
        for folder in (self.root, self.images):
            for path in folder.glob(".part-*"):
                path.unlink()
        before = self.before()
        commits = ", ".join(dict.fromkeys([*(before["commits"] if before else []), made_with["commit"]]))
        write_json(self.settings, {**made_with, "commit": commits})


# ---- as it is read ---------------------------------------------------------------------------------------------------
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
    settings = read_settings(folder)
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


def read_settings(folder: Path) -> dict:
    """The settings that a run was made with, and its versions."""
    path, needed = (
        folder / "settings.json",
        {"method": str, "model": str, "captions": str, "guidance_scale": int | float},
    )
    with expecting("the settings of a run", path, "its generation has to be started again"):
        content = json.loads(path.read_text())
        settings = {**content["settings"], "versions": content.get("versions")}
    wrong = {name for name, kind in needed.items() if not isinstance(settings.get(name), kind)}
    refuse(folder, "settings of eval.coco30k; these lack, or are of another type", wrong)
    return settings


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file of texts as they stand, every row of as many as there are columns; no rows where there is no file."""
    if not path.exists():
        return pd.DataFrame()
    with expecting("a table of texts", path, "its generation has to be started again"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different lengths" if rows else "no columns")
    return pd.DataFrame(rows[1:], columns=rows[0])


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
