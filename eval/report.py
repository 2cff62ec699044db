"""Results to the documents: `python -m eval.report` puts every results/*.json that one names into its place there.

`<!-- results: NAME -->` stands for the whole table of results/NAME.json, `<!-- results: NAME column ... -->` for some of its
columns. The plots of docs/ are drawn from the results too, and where `make demo` left its pictures, the README's picture is
made of them.
"""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from PIL import Image


DOCUMENTS = ("README.md", "eval/speed.md", "eval/benchmarks.md", "goca_guidance/models/tiny-sd/README.md")
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "goca-guidance")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name and rename when whole, so that nothing half-written is ever taken for whole.

    What was begun is removed where the disk does not take it.
    """
    part = path.with_name(f".part-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    try:
        yield part
    except OSError:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        raise
    old = path.with_name(f".old-{path.name}")
    if path.is_dir():
        path.replace(old)  # a folder is not replaced in one step: the old one steps aside until the new one is there
    part.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def command() -> str:
    """The command line of the program that runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def model_name(model: str) -> str:
    """A folder's own name; a repository's whole one."""
    return Path(model).name if Path(model).is_dir() else model


def commit() -> str:
    """The commit of the code, marked where it was changed since; "unknown" outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {package: version(package) for package in packages}


def some(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first, more = list(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def fingerprint(**inputs) -> str:
    """Digest of everything that a cached measurement depends on: its inputs, and the code that computes it."""
    return hashlib.sha256(json.dumps([inputs, code()], sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code() -> str:
    """Digest of our own code that runs in this process, as it was when first asked for, and the versions of what it calls."""
    ours = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] in ("eval", "goca_guidance")]
    started = getattr(sys.modules["__main__"], "__file__", None)
    files = {Path(file).resolve() for file in [*ours, started] if file}
    parts = [file_digest(path) for path in sorted(files)] + [f"{name} {version(name)}" for name in PACKAGES]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def weights_digest(model: str) -> str:
    """Digest of a model folder, weights and configurations; the name itself for a hub repository."""
    files = sorted(
        path for path in Path(model).glob("**/*") if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model")
    )
    digests = " ".join(f"{path.relative_to(model)} {file_digest(path)}" for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if files else model


def write_json(path: Path, value) -> None:
    """Readable JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def markdown(rows: list[dict], columns: list[str] | None = None) -> str:
    """A GitHub table of the rows' plain values, of all columns or some; dictionaries are left to the JSON file."""
    frame = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows])
    frame = frame[columns] if columns else frame
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(object).fillna("").to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(text: str, results: Path) -> str:
    """Replace what stands between `<!-- results: NAME -->` and `<!-- end -->` by NAME.json's table and its command."""

    def table(match):
        name, *columns = match[1].split()
        result = json.loads((results / f"{name}.json").read_text())
        lines = [f"<!-- results: {match[1]} -->", markdown(result["rows"], columns), "", f"`{result['command']}`"]
        return "\n".join([*lines, "<!-- end -->"])

    return re.sub(r"<!-- results: ([^>]+?) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def growth(rows: list[dict], path: Path) -> None:
    """How a step's time grows with the picture and with the batch: stock and guided, and their ratio."""
    from matplotlib.figure import Figure

    frame = pd.DataFrame(rows).query("options == '' and family != 'tiny-sd'")
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, ratio = figure.subplots(1, 2)
    for number, (family, group) in enumerate(frame.groupby("family", sort=False)):
        group = group.assign(pixels=group["size"] ** 2 * group["batch"] / 1e6).sort_values("pixels")
        time.plot(group["pixels"], group["stock_ms"] / 1000, "o--", color=f"C{number}", mfc="white")
        time.plot(group["pixels"], group["guided_ms"] / 1000, "o-", color=f"C{number}", label=family)
        ratio.plot(group["pixels"], group["time_ratio"], "o-", color=f"C{number}")
        ratio.plot(group["pixels"], group["memory_ratio"], "s:", color=f"C{number}", mfc="white")
    time.set(xscale="log", yscale="log", ylabel="seconds a step (dashed: stock)")
    ratio.set(xscale="log", ylabel="guided / stock (dotted: peak memory)")
    for axes in (time, ratio):
        axes.set_xlabel("megapixels in a batch")
        axes.grid(alpha=0.3)
    time.legend(frameon=False)
    figure.suptitle(rows[0]["device"])
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def stack(pictures: list[Image.Image], width: int = 1000) -> Image.Image:
    """Pictures one above the other on white, each as wide as the page."""
    scaled = [p.convert("RGB").resize((width, round(p.height * width / p.width)), Image.LANCZOS) for p in pictures]
    page, top = Image.new("RGB", (width, sum(p.height for p in scaled)), "white"), 0
    for picture in scaled:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def main() -> None:
    results, picture, demo = Path("results"), Path("docs/picture.png"), Path("demo")
    for document in map(Path, DOCUMENTS):
        with replacing(document) as part:
            part.write_text(fill(document.read_text(), results))
    for path in results.glob("speed-*.json"):
        growth(json.loads(path.read_text())["rows"], Path(f"docs/{path.stem}.png"))
    if demo.exists():
        parts = [Image.open(demo / f"{name}.png") for name in ("comparison", "strip", "segmentation")]
        with replacing(picture) as part:
            stack(parts).quantize(256).save(part, format="PNG")


if __name__ == "__main__":
    main()
