"""What a method leaves to its user, chosen on validation scenes: timestep, layers picked by hand, background offset."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.scenes.models import weights_of
from eval.segment.level_counts import LevelMethod, LevelRun, measure
from eval.segment.level_rows import miou
from goca_guidance import GoCAConfig, GoCASCFGPipeline
from goca_guidance.denoisers.adapters import denoiser_of, family_of


IMAGES = 50  # validation scenes
TIMESTEPS = (50, 100, 200)
OFFSETS = tuple(round(0.1 * step, 1) for step in range(-4, 5))
PARTS = {  # rows of the paper's ablation; Flux's preset has uniform heads, as released, so heads are named
    "vanilla": GoCAConfig.vanilla(),
    "heads": GoCAConfig.vanilla(heads="contribution"),
    "layers": GoCAConfig.vanilla(layers="agreement"),
    "rescaling": GoCAConfig.vanilla(rescale=True),
    "all": GoCAConfig(heads="contribution"),
}
UNIFORM_HEADS = "all, uniform heads"  # as released for Flux


def methods_of(choice: dict) -> dict[str, LevelMethod]:
    """The rows of a model, with what was chosen for it."""
    manual = GoCAConfig.vanilla(layers=tuple(choice["layers"]))
    rows = {"vanilla": PARTS["vanilla"], "manual": manual, **PARTS}
    if choice["preset_heads"] == "uniform":
        rows[UNIFORM_HEADS] = GoCAConfig(heads="uniform")
    return {name: LevelMethod(config, choice["offsets"].get(name, 0.0)) for name, config in rows.items()}


def choose(model: str, folder: Path, pipe: GoCASCFGPipeline, images: int | None = None) -> dict:
    """All choices of a model on its first `images` validation scenes (`IMAGES`), and what each that was tried reached."""
    preset = family_of(denoiser_of(pipe.components)).preset
    validation = LevelRun(model, folder, "plain", {}, "validation", images or IMAGES)
    timestep, timesteps = _timestep(validation, pipe)
    validation = replace(validation, timestep=timestep)
    layers, trail = _layers(validation, pipe, preset.text)
    choice = {
        "model": model, "weights": weights_of(folder), "timestep": timestep, "layers": layers, "offsets": {},
        "preset_heads": preset.heads,
    }  # fmt: skip
    choice["offsets"], offsets = _offsets(replace(validation, level="unnamed"), pipe, methods_of(choice))
    return choice | {"tried": {"timestep": timesteps, "layers": trail, "offset": offsets}}


def _measured(run, pipe) -> dict[str, float]:
    for chunk in run.chunks:
        measure(run, pipe, chunk)
    return {method: miou(run, method) for method in run.methods}


def _timestep(run, pipe) -> tuple[int, dict]:
    """The one at which vanilla and GoCA are best in the mean."""
    both = {name: LevelMethod(PARTS[name]) for name in ("vanilla", "all")}
    tried = {t: _measured(replace(run, timestep=t, methods=both), pipe) for t in TIMESTEPS}
    return max(tried, key=lambda t: sum(tried[t].values())), {str(t): found for t, found in tried.items()}


def _layers(run, pipe, known: Sequence[str]) -> tuple[list[str], dict]:
    """Layers whose plain mean is best: the best one, and then, as long as one helps, the one that helps most."""
    chosen: tuple[str, ...] = ()
    best, trail = 0.0, {}
    while len(chosen) < len(known):
        longer = {" + ".join(names): names for name in known if name not in chosen for names in [(*chosen, name)]}
        rows = {name: LevelMethod(GoCAConfig.vanilla(layers=names)) for name, names in longer.items()}
        found = _measured(replace(run, methods=rows), pipe)
        trail |= found
        winner = max(found, key=lambda name: found[name])
        if found[winner] <= best:
            break
        best, chosen = found[winner], longer[winner]
    return [name for name in known if name in chosen], trail


def _offsets(run, pipe, methods) -> tuple[dict[str, float], dict]:
    """Each method's best."""
    rows = {f"{name} {value}": replace(row, offset=value) for name, row in methods.items() for value in OFFSETS}
    found = _measured(replace(run, methods=rows), pipe)
    tried = {name: {str(value): found[f"{name} {value}"] for value in OFFSETS} for name in methods}
    return {name: max(OFFSETS, key=lambda value, name=name: found[f"{name} {value}"]) for name in methods}, tried
