"""What the options that save time cost in accuracy, on the embedded model: `python -m eval.savings`.

Images are generated for the captions of held-out scenes by the default guidance. Then, with each option, twice more: with
the default's latents put in place at every step, where the regions of both are compared; and left to itself, where the
images are. Plain guidance (CFG) stands beside them for scale. Segmentation of the scenes is measured for the options that
it has. `--core` measures, instead, the time of GoCA's core on the attention of a full-size Stable Diffusion 1.5 step (random
weights), into savings-core.json.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval.common.files import writable, write_json
from eval.common.load import load_pipeline
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command, weights_digest
from eval.common.tables import markdown
from eval.cost.captured_step import full_size
from eval.scenes.scene import scene
from eval.segment.experiment import Experiment
from eval.segment.running import result as segmented
from goca_guidance import TINY_SD, GoCAConfig, Regions, SCFGConfig


TINY_SIDE, FULL_SIDE = 16, 64  # of the finest grids


@dataclass(frozen=True)
class Option:
    """One of the options, or several.

    Args:
        every: `SCFGConfig.every`.
        rows: `GoCAConfig.agreement_rows` as a share of the finest grid's pixels; None for all.
        side: `GoCAConfig.working_size` as a share of the finest grid's longer side; None for all of it.
    """

    every: int = 1
    rows: float | None = None
    side: float | None = None

    def goca(self, side: int) -> dict:
        """Fields of a `GoCAConfig` where the finest grid is so large."""
        rows = {} if self.rows is None else {"agreement_rows": int(self.rows * side**2)}
        return rows | ({} if self.side is None else {"working_size": int(self.side * side)})

    def arguments(self) -> dict:
        """Of the embedded model's pipeline."""
        return {"goca": GoCAConfig(**self.goca(TINY_SIDE)), "scfg": SCFGConfig(every=self.every)}

    def name(self, side: int) -> str:
        given = ({"every": self.every} if self.every > 1 else {}) | self.goca(side)
        return " ".join(f"{name}={value}" for name, value in given.items()) or "default"


OPTIONS = [Option(), *(Option(every=every) for every in (2, 3, 5)), *(Option(rows=rows) for rows in (0.25, 0.1))]
OPTIONS += [Option(side=0.5), Option(every=2, side=0.5)]


@dataclass(frozen=True)
class SavingsSettings:
    """What the errors depend on.

    Args:
        captions: of held-out scenes, from the first on.
        steps, guidance_scale: of generation.
        batch: captions in a call.
        scenes: that are segmented.
    """

    captions: int = 32
    steps: int = 30
    guidance_scale: float = 5.0
    batch: int = 16
    scenes: int = 100


@dataclass
class Trajectory:
    """Latents after each step, and what they end in: images b 3 H W in [0, 255], or nothing."""

    latents: list[Tensor] = field(default_factory=list)
    regions: list[Regions] | None = None
    images: Tensor | None = None


# ---- generation ------------------------------------------------------------------------------------------------------
def generate(pipe, first: int, settings: SavingsSettings, on: Trajectory | None = None, **kwargs) -> Trajectory:
    """Images for the captions of some scenes; with `on`, every step ends in the latents of that trajectory."""
    found = Trajectory()

    def after(pipe, step, timestep, tensors):
        found.latents.append(tensors["latents"] if on is None else on.latents[step])
        return {"latents": found.latents[-1]}

    kind = "pt" if on is None else "latent"
    output = generated(pipe, first, settings, output_type=kind, callback_on_step_end=after, **kwargs)
    found.regions, found.images = getattr(output, "regions", None), None if on else 255 * output.images
    return found


def generated(pipe, first: int, settings: SavingsSettings, **arguments):
    """A batch's output for the captions of scenes from number `first`; a scene's number is its seed, whatever the method.

    Images are in [0, 1], b 3 H W.
    """
    numbers = range(first, min(first + settings.batch, settings.captions))
    return pipe(
        [scene("test", i).caption for i in numbers],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in numbers],
        **{"output_type": "pt", **arguments},
    )


def errors(pipe, settings: SavingsSettings) -> Iterator[dict[str, dict[str, float]]]:
    """Of each batch of captions: errors by the name of what guides."""
    shown = tqdm(total=settings.captions * 2 * len(OPTIONS), desc="captions", smoothing=0)
    for first in range(0, settings.captions, settings.batch):
        default = generate(pipe, first, settings, output_regions=True)
        found = {OPTIONS[0].name(TINY_SIDE): regional(default, default) | difference(default, default)}
        found |= {"CFG": difference(generate(pipe, first, settings, use_scfg=False), default)}
        shown.update(2 * len(default.images))
        for option in OPTIONS[1:]:
            kwargs = {**option.arguments(), "output_regions": True}
            regions = regional(generate(pipe, first, settings, on=default, **kwargs), default)
            found[option.name(TINY_SIDE)] = regions | difference(generate(pipe, first, settings, **kwargs), default)
            shown.update(2 * len(default.images))
        yield found


def regional(ours: Trajectory, default: Trajectory) -> dict[str, float]:
    """Percent of pixels of the same region, and of the same side of the foreground's border: means over steps and images."""
    pairs = list(zip(ours.regions, default.regions, strict=True))
    same = [(a.masks & b.masks).any(1).float().mean().item() for a, b in pairs]
    foreground = [(a.foreground == b.foreground).float().mean().item() for a, b in pairs]
    return {"same region": 100 * statistics.mean(same), "same foreground": 100 * statistics.mean(foreground)}


def difference(ours: Trajectory, default: Trajectory) -> dict[str, float]:
    """Of the last latents, relative to their norm; of pixels, the mean absolute one in 0..255."""
    latents, theirs = ours.latents[-1].flatten(1), default.latents[-1].flatten(1)
    relative = ((latents - theirs).norm(dim=1) / theirs.norm(dim=1)).mean().item()
    return {"latents": 100 * relative, "pixels": (ours.images - default.images).abs().mean().item()}


# ---- segmentation and time -------------------------------------------------------------------------------------------
def miou(settings: SavingsSettings, model: str) -> dict[str, dict]:
    """Rows of `eval.segmentation` by name, for the options without `every`, which segmentation does not have."""
    methods = {o.name(TINY_SIDE): {"base": "goca", **o.goca(TINY_SIDE)} for o in OPTIONS if o.every == 1}
    rows = segmented(Experiment(methods, limit=settings.scenes, model=model))["rows"]
    return {row["method"]: row for row in rows}


def core_milliseconds(repeats: int) -> list[dict]:
    """A step's mean time in GoCA's core, for Stable Diffusion 1.5 at 512 pixels, one image; options take turns."""
    step, taken = full_size("sd-1.5", 512), {option: [] for option in OPTIONS}
    for _ in tqdm(range(repeats + 1), desc="core"):
        for option, seconds in taken.items():
            start = time.perf_counter()
            step.ours(GoCAConfig(**option.goca(FULL_SIDE))).regions((FULL_SIDE, FULL_SIDE))
            seconds.append((time.perf_counter() - start) / option.every)
    medians = {option: statistics.median(seconds[1:]) for option, seconds in taken.items()}
    base, rows = medians[OPTIONS[0]], medians.items()
    return [{"option": o.name(FULL_SIDE), "core_ms": round(1000 * s, 1), "ratio": round(s / base, 3)} for o, s in rows]


def run(settings: SavingsSettings, model: str) -> list[dict]:
    """A row for each option, and one for plain guidance."""
    pipe = load_pipeline(model)
    batches, segmentation = list(errors(pipe, settings)), miou(settings, model)
    return [row(name, [batch[name] for batch in batches], segmentation.get(name)) for name in batches[0]]


def row(name: str, batches: list[dict[str, float]], segmentation: dict | None) -> dict:
    """Means over batches of equal size, as a table shows them."""
    mean = {key: statistics.mean(batch[key] for batch in batches) for key in batches[0]}
    shown = {
        key: f"{mean[key]:.2f} %" if key in mean else "–" for key in ("same region", "same foreground", "latents")
    }
    return {
        "guidance": name,
        **shown,
        "pixels, of 255": f"{mean['pixels']:.2f}",
        "mIoU": segmentation["miou"] if segmentation else "–",
        "95 % interval of its difference": segmentation.get("interval", "–") if segmentation else "–",
        "values": mean,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--captions", type=at_least(1), default=SavingsSettings.captions, help="a multiple of 16, or fewer"
    )
    parser.add_argument("--scenes", type=at_least(1), default=SavingsSettings.scenes)
    parser.add_argument("--core", action="store_true", help="the core's time on a full-size step instead")
    parser.add_argument("--model", default=TINY_SD)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args(arguments)
    result = writable(args.result or Path(f"results/savings{'-core' if args.core else ''}.json"))
    settings = SavingsSettings(captions=args.captions, scenes=args.scenes)
    rows = core_milliseconds(repeats=5) if args.core else run(settings, args.model)
    shared = {**vars(settings), "weights": weights_digest(args.model), "threads": torch.get_num_threads()}
    write_json(result, {"command": command(), "settings": shared, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    run_program(main)
