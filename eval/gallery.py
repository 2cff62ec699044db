"""Pictures of the documents, by the embedded model: `python -m eval.gallery` draws them into docs/.

docs/first.png, the README's first picture (its prompt and seed were picked: see `FIRST`); docs/how_it_works/, the stages of
one segmentation (`goca explain` draws the same); docs/choosing/, a strip for each parameter: the same noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from eval.common.files import replacing
from eval.common.programs import command_line
from eval.common.programs import run as run_program
from goca_guidance import CRF, TINY_SD, GoCAConfig, GoCASCFGPipeline, SCFGConfig, explain
from goca_guidance.pictures import colour, comparison, enlarged, painted, painted_regions


# Picked from the pairs of docs/generation.md, half of which were chosen because most differs: no typical case.
FIRST = {"prompt": "a tv monitor and a cow on wood", "guidance_scale": 3.0, "num_inference_steps": 12}
FIRST_SEED = 3612064351  # that scene's there
SAMPLE = Path(TINY_SD).parent / "scene.png"  # a held-out scene, whose names the file holds
WIDTH = 1100  # pixels

GENERATED: dict[str, Mapping[str, dict]] = {  # strips, by name; title to what changes
    "guidance_scale": {f"scale {s:g}": {"guidance_scale": s} for s in (1.5, 3.0, 5.0, 7.5, 12.0)},
    "rate_max": {
        "plain guidance": {"use_scfg": False},
        **{f"rate_max {most:g}": {"scfg": SCFGConfig(rate_max=most)} for most in (1.5, 3.0, 6.0)},
    },
    "rule": {
        "plain guidance": {"use_scfg": False},
        "segmentor s-cfg": {"scfg": SCFGConfig(segmentor="s-cfg")},
        "default": {},
        "foreground conditional": {"scfg": SCFGConfig(foreground="conditional")},
        "equal_mean": {"scfg": SCFGConfig(equal_mean=True)},
    },
    "window": {
        "whole": {},
        "scfg_stop 0.5": {"scfg_stop": 0.5},
        "scfg_start 0.5": {"scfg_start": 0.5},
        "every 5": {"scfg": SCFGConfig(every=5)},
    },
}
SEGMENTED: dict[str, Mapping[str, dict]] = {
    "timestep": {f"timestep {t}": {"timestep": t} for t in (20, 50, 200, 500, 900)},
    "refine_order": {f"refine_order {n}": {"goca": GoCAConfig(refine_order=n)} for n in (0, 1, 2, 5)},
    "parts": {
        "vanilla": {"goca": GoCAConfig.vanilla()},
        "rescale off": {"goca": GoCAConfig(rescale=False)},
        "heads uniform": {"goca": GoCAConfig(heads="uniform")},
        "default": {},
    },
    "background": {
        "threshold 0.3": {"background": 0.3},
        "threshold 0.5": {"background": 0.5},
        "threshold 0.7": {"background": 0.7},
        "words": {"background": ["water"]},
    },
    "crf": {"none": {}, "CRF()": {"crf": CRF()}, "theta_beta 10": {"crf": CRF(theta_beta=10.0)}},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS], help=f"of {', '.join(PARTS)} (default: all)")
    parts = parser.parse_args(arguments).parts
    if unknown := sorted({*parts} - {*PARTS}):
        raise ValueError(f"Expected parts among {', '.join(PARTS)}, but got {', '.join(unknown)}.")
    pipe = GoCASCFGPipeline.from_pretrained(TINY_SD)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(SAMPLE) as file:
        names, photo = file.info["names"].split(", "), file.convert("RGB")
    for part in parts:
        for path, figure in PARTS[part](pipe, photo, names):
            _write(figure, Path("docs") / path)


def first(pipe, photo, names) -> Iterator[tuple[str, Figure]]:
    yield "first.png", first_picture(pipe, photo, names)


def stages(pipe, photo, names) -> Iterator[tuple[str, Figure]]:
    for name, figure in explain(pipe, photo, names).figures().items():
        yield f"how_it_works/{name}.png", figure


def strips(pipe, photo, names) -> Iterator[tuple[str, Figure]]:
    for name, changes in GENERATED.items():
        shown = [pipe(**FIRST | change, generator=_noise(FIRST_SEED)).images[0] for change in changes.values()]
        yield f"choosing/{name}.png", comparison([enlarged(image) for image in shown], list(changes))
    for name, changes in SEGMENTED.items():
        shown = [_segmented(pipe, photo, names, **change) for change in changes.values()]
        yield f"choosing/{name}.png", comparison(shown, list(changes))


PARTS = {"first": first, "stages": stages, "strips": strips}


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _segmented(pipe, photo, names, background=None, **change) -> Image.Image:
    classes = names if background is None else names[:2]
    return painted(enlarged(photo), pipe.segment(photo, classes, background=background, **change).label_maps[0])


def first_picture(pipe: GoCASCFGPipeline, photo: Image.Image, names: Sequence[str]) -> Figure:
    """Plain guidance and guidance by regions from the same noise, the regions, the guidance; and a picture's segmentation."""
    plain, ours = (
        pipe(**FIRST, generator=_noise(FIRST_SEED), use_scfg=guided, output_regions=True) for guided in (False, True)
    )
    middle = len(ours.regions) // 2
    regions, guidance = ours.regions[middle], ours.guidance_maps[middle, 0, 0]
    figure = Figure(figsize=(9.6, 2.1), layout="constrained")
    axes = figure.subplots(1, 6)
    titles = ("plain guidance", "guided by regions", "regions", "guidance", "a picture", "segmented")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    shown = (plain.images[0], ours.images[0], painted_regions(regions), None, photo)
    for axis, picture in zip(axes, shown, strict=False):
        if picture is not None:
            axis.imshow(picture)
    axes[5].imshow(painted(photo, pipe.segment(photo, names).label_maps[0]))
    scale = FIRST["guidance_scale"]
    norm = TwoSlopeNorm(scale, min(guidance.min().item(), scale - 0.01), max(guidance.max().item(), scale + 0.01))
    figure.colorbar(axes[3].imshow(guidance, norm=norm, cmap="coolwarm"), ax=axes[3], shrink=0.5)
    told = [f"{name}: start token, no word" if name.startswith("<") else name for name in regions.labels[0]]
    for place, entries in (("left", [*told, "pale: not foreground"]), ("right", names)):
        handles = [Patch(color=colour(i) if i < len(entries) - (place == "left") else "0.85", label=name)
                   for i, name in enumerate(entries)]  # fmt: skip
        figure.legend(
            handles=handles, loc=f"outside lower {place}", ncols=6, fontsize=7, frameon=False, handlelength=1
        )
    return figure


def _write(figure: Figure, path: Path) -> None:
    """As a small PNG: no wider than `WIDTH`, in a palette."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        picture.quantize(256).save(part, format="PNG", optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
