"""Whether segmentation grows with the generative model: trained models, their checkpoints, eight levels of scenes.

    python -m eval.proof choices        # timestep, layers by hand, background offset, on validation: results/choices.json
    python -m eval.proof                # mIoU of every method on every level, on test: the rows of results/proof.json
    python -m eval.proof defaults       # what the papers leave open, and what we add: results/defaults.json
    python -m eval.proof loss           # of every checkpoint on validation scenes: its "quality"
    python -m eval.proof pictures       # how well each checkpoint draws: the same
    python -m eval.proof show           # regions on the first test scenes: docs/models.png, at the top of the README

Over many processes on CPUs: `torchrun --nproc-per-node 2 -m eval.proof`. The models are those of eval.scenes.models: at the
end of their training they are in the repository, earlier checkpoints in runs/checkpoints/MODEL/PERCENT, where their training
leaves them. Rows of checkpoints that are not there stay in the result as they were measured.

Counts are kept under runs/proof/ chunk by chunk, pictures batch by batch: a killed run goes on.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from eval.common.files import expecting, writable, write_json
from eval.common.processes import processes, progress, share
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import PACKAGES, command, commit, versions
from eval.common.tables import markdown
from eval.generation.checkpoint_quality import Drawing, Judges, draw, generator_of, held_out_loss
from eval.scenes.levels import LEVELS
from eval.scenes.models import MODELS, SHIPPED, checkpoint, shares, weights_of
from eval.segment.level_choices import choose, methods_of
from eval.segment.level_counts import LevelRun, loaded, measure, unknown
from eval.segment.level_defaults import defaults as candidates_of
from eval.segment.level_picture import SHOWN
from eval.segment.level_picture import draw as draw_regions
from eval.segment.level_rows import BASE, rows_of
from eval.training.specs import SPECS


CHOICES, DEFAULTS = Path("results/choices.json"), Path("results/defaults.json")
IMAGES, EARLIER = 100, 60  # test scenes of a level at the end of a training, and before
PLACE = ("model", "checkpoint", "level", "method")
Folders = dict[tuple[str, int], Path]  # by model and share of its training


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", nargs="?", choices=PARTS, default="segmentation")
    parser.add_argument("--models", nargs="+", help=f"among {', '.join(MODELS)}; all that are there by default")
    parser.add_argument("--levels", nargs="+", help=f"among {', '.join(LEVELS)}; all that a model knows by default")
    parser.add_argument(
        "--checkpoints", nargs="+", type=int, help="percent of the training; all that are there by default"
    )
    parser.add_argument(
        "--images",
        type=at_least(2),
        help=f"test scenes of a level ({IMAGES}, {EARLIER} early on), or captions",
    )
    parser.add_argument("--device", help="cpu or cuda; the accelerator by default, if there is one")
    parser.add_argument("--result", type=Path, default=Path("results/proof.json"))
    args = parser.parse_args(arguments)
    writable(args.result)
    PARTS[args.what](args, processes())


def folders_of(models: Collection[str] | None, checkpoints: Sequence[int] | None = None) -> Folders:
    """The checkpoints that are there; ValueError where one that was named is not, or none is."""
    asked = [(name, each) for name in models or MODELS for each in checkpoints or shares(name)]
    found = {place: folder for place in asked if (folder := checkpoint(*place)) is not None}
    needed = [place for place in asked if place[1] in (checkpoints or [SHIPPED])] if models else asked[:0]
    missing = [f"{name} at {each} %" for name, each in needed if (name, each) not in found]
    if missing or not found:
        raise ValueError(
            f"Expected the weights of {', '.join(missing) or 'a model'}, but they are not there: train it, or name others."
        )
    return found


# ---- choices ---------------------------------------------------------------------------------------------------------
def choices(args: Namespace, state: PartialState) -> None:
    """Each model's choices, with the weights that are shipped; those of other models stay.

    The processes share the models, and one of them reads what all counted.
    """
    folders = folders_of(args.models, [SHIPPED])
    for model, folder in share([(model, folder) for (model, _), folder in folders.items()], state):
        choose(model, folder, loaded(folder, args.device or state.device))
    state.wait_for_everyone()
    if state.is_main_process:
        known = {row["model"]: row for row in _rows(CHOICES)}
        for (model, _), folder in folders.items():
            known[model] = choose(model, folder, loaded(folder, args.device or state.device))
        write_json(CHOICES, made() | {"rows": [known[model] for model in MODELS if model in known]})


def chosen(model: str) -> dict:
    """What was chosen for a model; ValueError where that was not with the weights that are shipped."""
    rows, folder = {row["model"]: row for row in _rows(CHOICES)}, checkpoint(model)
    if folder is not None and rows.get(model, {}).get("weights") == weights_of(folder):
        return rows[model]
    came = "those of other weights" if model in rows else "none"
    raise ValueError(
        f"Expected choices for {model} in {CHOICES}, but got {came}: run `python -m eval.proof choices --models {model}`."
    )


# ---- segmentation ----------------------------------------------------------------------------------------------------
def segmentation(args: Namespace, state: PartialState) -> None:
    """Measure what is missing, the processes sharing chunks, and write the rows."""
    runs = runs_of(folders_of(args.models, args.checkpoints), args.levels, args.images)
    work = {
        run.path(BASE, chunk): (run, chunk) for _, run in runs for chunk in run.chunks
    }  # a level with its interior
    in_turns([*work.values()], partial(loaded, device=args.device or state.device), measure, state)
    if state.is_main_process:
        rows = [row for each, run in runs for row in rows_of(run, each)]
        write_json(args.result, result_with(args.result, rows=rows))
        print(markdown(rows, [*PLACE, "images", "miou", "difference", "low", "high"]))


def runs_of(folders: Folders, levels: Sequence[str] | None, images: int | None) -> list[tuple[int, LevelRun]]:
    """Every level of every checkpoint, with the share of the training; a level that a model does not know, only if named."""
    if strange := [level for level in levels or () if level not in LEVELS]:
        raise ValueError(f"Expected levels among {', '.join(LEVELS)}, but got {strange[0]!r}.")
    rules = {model: chosen(model) for model, _ in folders}
    found = []
    for (model, each), folder in folders.items():
        methods, timestep = methods_of(rules[model]), rules[model]["timestep"]
        for level in levels or [name for name in LEVELS if not unknown(model, name)]:
            size = images or (IMAGES if each == SHIPPED else EARLIER)
            found.append((each, LevelRun(model, folder, level, methods, images=size, timestep=timestep)))
    return found


# ---- defaults --------------------------------------------------------------------------------------------------------
def defaults(args: Namespace, state: PartialState) -> None:
    """Candidates of each model, with the weights that are shipped; those of other models stay. One process measures."""
    folders = folders_of(args.models, [SHIPPED])
    if state.is_main_process:
        rows = [row for row in _rows(DEFAULTS) if (row["model"], SHIPPED) not in folders]
        for (model, _), folder in folders.items():
            timestep = chosen(model)["timestep"]
            rows += candidates_of(model, folder, loaded(folder, args.device or state.device), timestep)
        rows.sort(key=lambda row: [*MODELS].index(row["model"]))
        write_json(DEFAULTS, made() | {"rows": rows})
        print(markdown(rows, ["model", "level", "split", "method", "base", "miou", "difference", "low", "high"]))


# ---- quality ---------------------------------------------------------------------------------------------------------
def loss(args: Namespace, state: PartialState) -> None:
    """The training's loss on validation scenes, of every checkpoint."""
    rows = []
    if state.is_main_process:
        for (model, each), folder in folders_of(args.models or SPECS, args.checkpoints).items():
            pipe = generator_of(folder, args.device or state.device)
            rows.append({**_checkpoint(model, each, folder), "loss": held_out_loss(model, pipe)})
            tqdm.write(f"{model} {each} %: {rows[-1]['loss']}")
        write_json(args.result, result_with(args.result, quality=rows))


def pictures(args: Namespace, state: PartialState) -> None:
    """Draw what is missing, the processes sharing batches; one of them judges."""
    size, device = {} if args.images is None else {"captions": args.images}, args.device or state.device
    drawings = {
        place: Drawing(place[0], folder, **size) for place, folder in folders_of(args.models, args.checkpoints).items()
    }
    work = [(drawing, batch) for drawing in drawings.values() for batch in drawing.batches]
    missing = [(drawing, batch) for drawing, batch in work if drawing.kept(batch) is None]
    in_turns(missing, partial(generator_of, device=device), draw, state)
    if state.is_main_process:
        judge, rows = Judges(state), []
        for (model, each), drawing in drawings.items():
            facts = {"captions": drawing.captions, "scale": drawing.scale, "steps": drawing.steps}
            rows.append({**_checkpoint(model, each, drawing.folder), **facts, **judge(drawing)})
        write_json(args.result, result_with(args.result, quality=rows))
        print(markdown(rows))


def _checkpoint(model, share, folder):
    return {"model": model, "checkpoint": share, "weights": weights_of(folder)}


# ---- a picture -------------------------------------------------------------------------------------------------------
def show(args: Namespace, state: PartialState) -> None:
    """Vanilla and GoCA on the first test scenes, by models as they are shipped."""
    if state.is_main_process:
        device = args.device or state.device
        models = {name: (loaded(MODELS[name].folder, device), chosen(name)["timestep"]) for name in SHOWN}
        draw_regions(models, Path("docs/models.png"))


# ---- work and results ------------------------------------------------------------------------------------------------
def in_turns(work: Sequence[tuple], load: Callable, do: Callable, state: PartialState) -> None:
    """`do(what, model, part)` for this process's share of (what, part), each with `load(what.folder)`; all wait for all."""
    mine, folder, model = share(work, state), None, None
    with progress([part for _, part in mine], "proof", state) as bar:
        for what, part in mine:
            if what.folder != folder:
                folder, model = what.folder, load(what.folder)
            do(what, model, part)
            bar.update(len(part))
    state.wait_for_everyone()


def made() -> dict:
    """How a result was made."""
    return {"command": command(), "versions": versions(PACKAGES), "commit": commit()}


def result_with(path: Path, **tables: list[dict]) -> dict:
    """The result with some tables measured anew; what was not measured now stays, unless it is of other weights.

    How the rows were made stands on top, how the quality was in `quality_made`.
    """
    found = {"rows": [], "quality": []} | _content(path)
    for name, rows in tables.items():
        kept = {_place(row): row for row in found[name] if _stands(row)}
        for row in rows:
            kept[_place(row)] = (kept.get(_place(row), {}) if name == "quality" else {}) | row
        found[name] = sorted(kept.values(), key=_order)
    how = made()
    return found | (how if "rows" in tables else {}) | ({"quality_made": how} if "quality" in tables else {})


def _place(row: dict) -> tuple:
    return tuple(row.get(key) for key in PLACE)


def _stands(row: dict) -> bool:
    """Whether a row is of the weights that are there, or nothing is there that could be measured again."""
    folder = checkpoint(row["model"], row["checkpoint"]) if row["model"] in MODELS else None
    return folder is None or row["weights"] == weights_of(folder)


def _order(row):
    levels = [*LEVELS, None]
    return [*MODELS].index(row["model"]), -row["checkpoint"], levels.index(row.get("level"))


def _content(path: Path) -> dict:
    if not path.exists():
        return {}
    with expecting("a result of eval.proof", path, "remove it, and measure again"):
        return {"rows": [], **json.loads(path.read_text())}


def _rows(path: Path) -> list[dict]:
    return _content(path).get("rows", [])


PARTS = {"choices": choices, "defaults": defaults, "segmentation": segmentation, "loss": loss, "pictures": pictures,
         "show": show}  # fmt: skip


if __name__ == "__main__":
    run_program(main)
