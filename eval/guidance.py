"""Whether guidance by regions makes better pictures, compared fairly, on the models that were trained on scenes.

    python -m eval.guidance --model tiny-flux      # draw and judge: runs/guidance/tiny-flux-100.npz
    python -m eval.guidance                        # what was measured to results/guidance.json, docs/guidance*.png

The captions are those of test scenes with two or three objects. Each is drawn by every method at every guidance scale from the
same noise, and judged: how many of its objects are shown, and others, by the classifier of Scenes; the ground, and how far its
texture is from scenes' (`eval.generation.textures`); the kernel distance of all pictures from scenes (EfficientNet-Lite0).
Methods: plain guidance (cfg), S-CFG, GoCA + S-CFG with the released and with the conditional foreground, each also with rates
divided by their mean (`SCFGConfig.equal_mean`), and guided by regions early or late only.

Pictures are also begun from noised scenes, with three quarters of the steps to go: there the scene's own layout can be the
regions ("layout"), which says whether rates by regions can help the model at all.

What is measured is kept cell by cell: a killed start goes on, and a cell that fails is told and left for the next. The coarse
scales of every method come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from eval.common.files import file_digest, some, writable, write_json
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command, commit, versions, weights_digest
from eval.generation.classifier import WEIGHTS
from eval.generation.drawing import METHODS, SEED, STRENGTH, Drawing, scenes_of_several
from eval.generation.guidance_pictures import SCALE, curves, draw_pairs, sheet
from eval.generation.judging import Judge
from eval.generation.outcomes import Cell, Kept, rows_of, scenes_rows
from eval.scenes.models import MODELS, SHIPPED, checkpoint


RUNS = Path("runs/guidance")
REFERENCE = 400  # validation scenes from which distances are measured
SCALES = (SCALE, 7.5, 1.5, 5.0, 2.0, 10.0)  # as they are measured
COARSE = SCALES[:2]
BETWEEN = (4.0, 12.5)  # of cfg alone, beside which others are compared at equal mean
WINDOWS = ("goca, late", "goca, early", "goca, conditional foreground, late")
LAYOUTS = tuple(name for name, method in METHODS.items() if method.layout)
PLAIN = tuple(name for name in METHODS if name not in WINDOWS + LAYOUTS)


@dataclass(frozen=True)
class Measurement:
    """What is drawn, beside the model.

    Args:
        images: captions.
        steps: denoising steps.
        batch: pictures in a call.
    """

    images: int = 256
    steps: int = 25
    batch: int = 64


def cells() -> list[Cell]:
    """All, the most telling ones first: every method at one scale, the curve of cfg, the scene's own layout; then the rest."""
    first, second = COARSE
    order = [Cell("noise", name, first) for name in PLAIN]
    order += [Cell("noise", "cfg", scale) for scale in (*SCALES, *BETWEEN)]
    order += [Cell("scene", name, first) for name in ("cfg", "goca", *LAYOUTS)] + [Cell("scene", "cfg", 5.0)]
    order += [Cell("noise", name, second) for name in PLAIN] + [Cell("noise", name, first) for name in WINDOWS]
    order += [Cell("noise", name, scale) for scale in SCALES for name in PLAIN]
    order += [Cell("scene", name, scale) for scale in SCALES[:4] for name in PLAIN + LAYOUTS]
    order += [Cell("noise", name, second) for name in WINDOWS] + [
        Cell("scene", "cfg", scale) for scale in SCALES + BETWEEN
    ]
    return list(dict.fromkeys(order))


def measure(model: str, share: int, chosen: Measurement, device: str) -> None:
    """Draw and judge every cell that is not kept yet, and the pairs."""
    folder = checkpoint(model, share)
    if folder is None:
        raise ValueError(
            f"Expected {model} at {share} % of its training, but it is not there: train it, or name another."
        )
    kept = Kept(writable(RUNS / f"{model}-{share}.npz"), settings_of(model, share, folder, chosen, device))
    known = MODELS[model]
    scenes = scenes_of_several("test", chosen.images, known.home)
    real = scenes_of_several("validation", REFERENCE, known.home)
    torch.set_float32_matmul_precision("high")  # as convolutions are computed
    drawing = Drawing(folder, scenes, chosen.steps, chosen.batch, device, known.arguments)
    judge = Judge(drawing.pipe.vae, [*real.values()], device)
    if not kept.of("scenes"):
        kept.add("scenes", judge(drawing.reproduced, [*scenes.values()]))
    failed = fill(kept, drawing, judge)
    if failed:
        last = [*failed.values()][-1]
        raise RuntimeError(f"Expected every cell of {model}, but {some(failed)} failed; the last one: {last}")


def fill(kept: Kept, drawing: Drawing, judge: Judge) -> dict[str, str]:
    """What is not kept yet, and the pairs; returns why some cells failed."""
    failed: dict[str, str] = {}
    for cell in tqdm([cell for cell in cells() if not kept.of(cell.name)], desc=kept.path.stem, unit="cell"):
        try:
            pictures, rates = drawing(METHODS[cell.method], cell.scale, cell.start)
            found = {name: values.cpu().numpy() for name, values in rates.items()}
            kept.add(cell.name, judge(pictures, [*drawing.scenes.values()]) | found)
        except (RuntimeError, ValueError) as error:
            failed[cell.name] = str(error)
            tqdm.write(f"{cell.name}: {error}")
        if not kept.of("pairs") and all(kept.of(Cell("noise", name, SCALE).name) for name in ("cfg", "goca")):
            draw_pairs(drawing, kept)
    return failed


def settings_of(model: str, share: int, folder: Path, chosen: Measurement, device: str) -> dict:
    """All that a number depends on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "model": model,
        "checkpoint": share,
        "weights": weights_digest(str(folder)),
        "classifier": file_digest(WEIGHTS)[:16],
        **vars(chosen),
        "strength": STRENGTH,
        "seed": SEED,
        "reference": REFERENCE,
        "device": name,
        "versions": versions(("torch", "diffusers", "transformers")),
        "command": command(),
    }


def report() -> None:
    """Rows of all that was measured, the curves, and a sheet for each finished model."""
    files = sorted(RUNS.glob("*.npz"))
    if not files:
        raise ValueError(f"Expected measurements in {RUNS}, but there are none: name a --model to draw.")
    measured = [Kept(path) for path in files]
    measured.sort(key=lambda kept: ([*MODELS].index(kept.settings["model"]), kept.settings["checkpoint"]))
    rows = [row for kept in measured for row in (*scenes_rows(kept), *rows_of(kept))]
    write_json(
        Path("results/guidance.json"),
        {"command": command(), "commit": commit(), "settings": [kept.settings for kept in measured], "rows": rows},
    )
    curves([row for row in rows if row["checkpoint"] == SHIPPED], Path("docs/guidance.png"))
    for kept in measured:
        if kept.settings["checkpoint"] == SHIPPED and kept.of("pairs"):
            sheet(kept, Path(f"docs/guidance-{kept.settings['model']}.png"))


def main(arguments: Sequence[str] | None = None) -> None:
    default = Measurement()
    parser = command_line(__doc__)
    parser.add_argument("--model", choices=MODELS, help="the model to draw with; without one, the result is written")
    parser.add_argument("--checkpoint", type=at_least(1), default=SHIPPED, help="percent of its training")
    parser.add_argument("--images", type=at_least(2), default=default.images, help="captions")
    parser.add_argument("--steps", type=at_least(2), default=default.steps, help="denoising steps")
    parser.add_argument("--batch", type=at_least(1), default=default.batch, help="pictures in a call")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.model:
        measure(args.model, args.checkpoint, Measurement(args.images, args.steps, args.batch), args.device)
    else:
        report()


if __name__ == "__main__":
    run_program(main)
