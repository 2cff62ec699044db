"""Images for captions, one PNG an id: `python -m eval.coco30k configs/generate/coco30k_sd15_goca.toml`.

Over many processes: `accelerate launch --num_processes 8 -m eval.coco30k configs/generate/coco30k_sd15_goca.toml`; over many
machines too, if they share the run folder. On CPUs, where accelerate starts a single process: `torchrun --nproc-per-node 2 -m
eval.coco30k ...`.

The noise of an image depends on the seed and its id alone, so that methods are paired. Batches are cut from the complete
list of captions, whatever is done already, and one with an image missing is made again whole: a killed run that goes on, and
any number of processes, have the same bytes as one that was never interrupted (on the same kind of device, with as many
threads, unless a batch fails and its captions are tried one by one). What is there and whole is kept; a truncated or
damaged PNG is made again. `--limit` can grow later.

The run folder holds settings.json, images/ID.png, manifest.csv (id, caption, seed, file, sha256; of all images in the folder)
and, where an image is missing, failed.csv (id, reason), and then the exit status is 1. A caption that fails is tried once
more, alone. An empty caption has no image under any method, so that the sets agree. Read both files with
`pandas.read_csv(path, dtype={"id": str}, keep_default_na=False)`.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from eval.common.processes import processes, progress, share
from eval.common.programs import at_least, command_line, positive
from eval.common.programs import run as run_program
from eval.common.provenance import command, commit, versions
from eval.generation.generator import GenerationSettings, Generator, batches
from eval.generation.run_folder import RunFolder, digest_of_png, png_bytes, write_table, write_whole


RUNS = Path("runs/generate")
PACKAGES = ("torch", "diffusers", "transformers", "pillow", "goca-guidance")
HOPELESS = 64  # captions in a row without an image: not their fault


# ---- a run -----------------------------------------------------------------------------------------------------------
class GenerationRun:
    """Captions to images in a folder, shared by the processes."""

    def __init__(self, settings: GenerationSettings, out: Path, limit: int | None = None):
        self.settings, self.folder = settings, RunFolder(out)
        self.state, self.lock = processes(), FileLock(out / ".lock")
        self.texts = settings.texts()
        self.asked = list(self.texts)[:limit]

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.settings, self.state.device)

    def __call__(self) -> dict[str, str]:
        """Make what is missing; returns the reasons why some images still are."""
        try:
            self.prepare()
            return self.make()
        finally:
            self.lock.release()

    def make(self) -> dict[str, str]:
        reasons = {name: "The caption is empty." for name in self.asked if not self.texts[name].strip()}
        present = self.present(self.texts)
        reasons |= dict(gather_object(list(self.work(self.missing(present)).items())))
        present |= self.present([name for name in self.asked if name not in present])
        failed = {name: reasons.get(name, "The image vanished.") for name in self.asked if name not in present}
        if self.state.is_main_process:
            self.report(present, failed)
        self.state.wait_for_everyone()
        return failed

    def prepare(self) -> None:
        """Every process finds the model and checks the folder before one of them changes it, so that all stop at a mistake."""
        _ = self.generator
        made_with = {
            "command": command(),
            "settings": self.settings.described(self.texts),
            "versions": versions(PACKAGES),
            "commit": commit(),
        }
        self.folder.check(made_with, self.texts)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.enter()
            self.folder.open(made_with)
        self.state.wait_for_everyone()

    def enter(self) -> None:
        """ValueError if another run is at work in the folder; until the lock is released, none can be."""
        self.folder.root.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Expected to be the only run in {self.folder.root}, but another is at work there: wait for it, or stop it."
            ) from error

    def present(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 of every whole image among some, by id; the processes share the reading, and all have the result."""
        mine = share(list(names), self.state)
        digest = partial(digest_of_png, size=self.generator.size)
        with ThreadPoolExecutor() as threads:
            found = zip(mine, threads.map(digest, map(self.folder.path, mine)), strict=True)
            return dict(gather_object([(name, sha256) for name, sha256 in found if sha256]))

    def missing(self, present: Mapping[str, str]) -> list[tuple[Sequence[str], list[str]]]:
        """Each batch with something to do, and what is wanted of it."""
        asked = {*self.asked} - {*present}
        every = batches(self.texts, self.settings.batch)
        wanted = [(batch, [name for name in batch if name in asked]) for batch in every]
        return [(batch, names) for batch, names in wanted if names]

    def work(self, batches: Sequence[tuple[Sequence[str], list[str]]]) -> dict[str, str]:
        """Make this process's share; returns the reasons why some failed."""
        mine, reasons, lost = share(batches, self.state), {}, 0
        name = f"{self.settings.method} {self.settings.guidance_scale:g}"
        with progress((names for _, names in mine), name, self.state) as bar:
            for batch, names in mine:
                images, failed = self.generator({name: self.texts[name] for name in batch}, names)
                for image_id, image in images.items():
                    write_whole(self.folder.path(image_id), png_bytes(image))
                for image_id, reason in failed.items():
                    bar.write(f"{image_id}: {reason}")
                reasons |= failed
                bar.update(len(names))
                lost = 0 if images else lost + len(failed)
                if lost >= HOPELESS:
                    raise RuntimeError(
                        f"Expected images, but {lost} captions in a row have none; the last one: {[*failed.values()][-1]}"
                    )
        return reasons

    def report(self, present: Mapping[str, str], failed: Mapping[str, str]) -> None:
        """manifest.csv, and failed.csv where something failed."""
        rows = [
            (name, text, self.settings.seed_of(name), f"images/{name}.png", present[name])
            for name, text in self.texts.items()
            if name in present
        ]
        write_table(self.folder.root / "manifest.csv", rows, ("id", "caption", "seed", "file", "sha256"))
        path = self.folder.root / "failed.csv"
        if failed:
            write_table(path, failed.items(), ("id", "reason"))
        else:
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("config", type=Path, help="a TOML file, see eval.generation.generator.GenerationSettings")
    parser.add_argument("--scale", type=positive, help="the guidance scale, instead of the file's")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many ids")
    parser.add_argument("--out", type=Path, help="the run folder; runs/generate/CONFIG_SCALE by default")
    args = parser.parse_args(arguments)
    settings = GenerationSettings.read(args.config, **({} if args.scale is None else {"guidance_scale": args.scale}))
    out = args.out or RUNS / f"{args.config.stem}_{settings.guidance_scale:g}"
    run = GenerationRun(settings, out, args.limit)
    failed = run()
    if failed and run.state.is_main_process:
        raise SystemExit(f"{len(failed)} of {len(run.asked)} captions have no image: see {out / 'failed.csv'}.")


if __name__ == "__main__":
    run_program(main)
