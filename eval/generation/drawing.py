"""Pictures of captions of Scenes by methods of guidance: each caption from the same noise, or the same noised scene."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from eval.common.load import load_pipeline
from eval.common.processes import seed_of, slices
from eval.generation.classifier import drawn, masks_of, pixels_of, reproduced
from eval.scenes.scene import CLASSES, OBJECTS, Scene
from goca_guidance import GoCASCFGPipeline, GoCASCFGPipelineOutput, Regions, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.method.scfg import rate_map, weighted_mean
from goca_guidance.real_images.noising import encode
from goca_guidance.stock import exact_arguments, guidance_arguments


Start = Literal["noise", "scene"]
SEED = 42
STRENGTH = 0.75  # share of the steps that are left where a picture starts from a noised scene


# ---- methods ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """How regions guide.

    Args:
        scfg: how regions become rates; None is plain guidance.
        start, stop: fractions of the steps between which regions guide.
        layout: regions and foreground are the scene's own, from which the picture starts.
        objects: instead of S-CFG's rates, guidance of the scene's objects is so many times that of its ground, at equal mean.
    """

    scfg: SCFGConfig | None = field(default_factory=SCFGConfig)
    start: float = 0.0
    stop: float = 1.0
    layout: bool = False
    objects: float | None = None


CONDITIONAL = SCFGConfig(foreground="conditional")
METHODS: dict[str, Method] = {
    "cfg": Method(None),
    "s-cfg": Method(SCFGConfig(segmentor="s-cfg")),
    "s-cfg, equal mean": Method(SCFGConfig(segmentor="s-cfg", equal_mean=True)),
    "goca": Method(),
    "goca, equal mean": Method(SCFGConfig(equal_mean=True)),
    "goca, conditional foreground": Method(CONDITIONAL),
    "goca, conditional foreground, equal mean": Method(SCFGConfig(foreground="conditional", equal_mean=True)),
    "goca, late": Method(start=0.4),
    "goca, early": Method(stop=0.4),
    "goca, conditional foreground, late": Method(CONDITIONAL, start=0.4),
    "layout": Method(layout=True),
    "layout, equal mean": Method(SCFGConfig(equal_mean=True), layout=True),
    "layout, objects x 2": Method(layout=True, objects=2.0),
    "layout, objects x 0.5": Method(layout=True, objects=0.5),
}


class Rule:
    """S-CFG's rates, or a method's own, and what they were: for each image, means over the guided steps.

    `truth`: regions of the scenes that the pictures start from, to which the rates are compared.
    """

    def __init__(self, method: Method, truth: Regions | None = None):
        self.method, self.truth = method, truth
        self._seen: dict[str, list[Tensor]] = {}

    def __call__(self, delta: Tensor, regions: Regions, scale: float, config: SCFGConfig) -> Float[Tensor, "b 1 H W"]:
        used = self.truth if self.method.layout and self.truth else regions
        strength = delta.float().norm(dim=1, keepdim=True)
        if self.method.objects is None:
            rate = rate_map(delta, used, scale, config)
        else:
            rate = torch.where(used.foreground, self.method.objects, 1.0)
            rate = rate / weighted_mean(rate, strength)[:, None, None, None]
        self._note("mean_rate", weighted_mean(rate, strength))
        if self.truth is not None:
            objects = self.truth.foreground
            self._note("rate_on_objects", _mean_in(rate, objects))
            self._note("rate_on_ground", _mean_in(rate, ~objects))
            both, either = used.foreground & objects, used.foreground | objects
            self._note("foreground_iou", both.flatten(1).sum(1) / either.flatten(1).sum(1).clamp(min=1))
        return rate

    def _note(self, name: str, values: Float[Tensor, " b"]) -> None:
        self._seen.setdefault(name, []).append(values.float())

    def means(self, steps: int) -> dict[str, Float[Tensor, " b"]]:
        """What was seen, by name: the mean rate over all `steps`, the others over the guided ones. Nothing without regions."""
        found = {name: torch.stack(values) for name, values in self._seen.items()}
        means = {name: values.mean(0) for name, values in found.items()}
        if found:
            means["mean_rate"] = 1 + (found["mean_rate"] - 1).sum(0) / steps
        return means


def _mean_in(values: Float[Tensor, "b 1 H W"], mask: Tensor) -> Float[Tensor, " b"]:
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


# ---- scenes ----------------------------------------------------------------------------------------------------------
def scenes_of_several(split: str, count: int, size: int) -> dict[str, Scene]:
    """The first scenes of a split with two or three objects, by id."""
    found: dict[str, Scene] = {}
    start = 0
    while len(found) < count:
        scenes = drawn(split, [(number, "plain") for number in range(start, start + count)], size)
        found |= {f"{start + place:06d}": each for place, each in enumerate(scenes) if len(each.objects) > 1}
        start += count
    return dict([*found.items()][:count])


def layout_of(masks: Int[Tensor, "n H W"], size: tuple[int, int]) -> Regions:
    """The scenes' own regions: the class that is most of a latent pixel; objects are foreground."""
    shares = F.adaptive_avg_pool2d(F.one_hot(masks, len(CLASSES)).permute(0, 3, 1, 2).float(), size)
    classes = shares.argmax(1)
    regions = F.one_hot(classes, len(CLASSES)).permute(0, 3, 1, 2).bool()
    return Regions(regions, (classes < len(OBJECTS))[:, None], (CLASSES,) * len(masks))


# ---- pictures --------------------------------------------------------------------------------------------------------
def beginning_late(scheduler: Any, strength: float) -> Any:
    """The same schedule without its first steps, as image-to-image pipelines run it."""

    kind = type(scheduler)

    class Late(kind):
        @wraps(kind.set_timesteps)  # pipelines look which arguments there are
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            begin = len(self.timesteps) - round(strength * len(self.timesteps))
            self.timesteps = self.timesteps[begin:]
            if getattr(self, "sigmas", None) is not None and len(self.sigmas) > len(self.timesteps):
                self.sigmas = self.sigmas[begin:]

    return Late.from_config(scheduler.config)


class Drawing:
    """A model that draws the captions of some scenes, again and again.

    Args:
        folder: of the model.
        scenes: by id; their size is that of the pictures.
        steps, batch: denoising steps; pictures in a call.
        device: where it draws.
        arguments: of every call of the pipeline.
    """

    def __init__(
        self,
        folder: Path,
        scenes: Mapping[str, Scene],
        steps: int,
        batch: int,
        device: str,
        arguments: Mapping[str, Any] | None = None,
    ):
        self.pipe, self.device = load_pipeline(str(folder), device=device), device
        self.scenes, self.steps, self.batch, self.arguments = scenes, steps, batch, arguments or {}
        self.captions = [each.caption for each in scenes.values()]
        self.family = family_of(denoiser_of(self.pipe.components))
        self.masks = masks_of([*scenes.values()]).to(device)
        self.size = self.masks.shape[-1]

    def __call__(
        self, method: Method, scale: float, start: Start = "noise"
    ) -> tuple[Float[Tensor, "n 3 H W"], dict[str, Tensor]]:
        """Pictures in [0, 1] of all captions, and what their rates were (`Rule.means`)."""
        pictures, seen = [], []
        for part in torch.arange(len(self.captions)).split(self.batch):
            output, rule = self.draw(part.tolist(), method, scale, start)
            pictures.append(output.images)
            seen.append(
                rule.means(len(self.pipe.scheduler.timesteps if start == "noise" else self.late.scheduler.timesteps))
            )
        return torch.cat(pictures), {name: torch.cat([each[name] for each in seen]) for name in seen[0]}

    def draw(
        self, chosen: Sequence[int], method: Method, scale: float, start: Start = "noise", **kwargs: Any
    ) -> tuple[GoCASCFGPipelineOutput, Rule]:
        """The pipeline's output for some captions, by their places, and the rule that was asked."""
        pipe, latents = (self.pipe, self.noise) if start == "noise" else (self.late, self.noised)
        truth = layout_of(self.masks[list(chosen)], tuple(latents.shape[-2:])) if start == "scene" else None
        pipe.guidance_rule = rule = Rule(method, truth)
        captions = [self.captions[i] for i in chosen]
        guided = {"use_scfg": False}
        if method.scfg is not None:
            guided = {"scfg": method.scfg, "scfg_start": method.start, "scfg_stop": method.stop}
        return self._call(pipe, captions, latents[list(chosen)], scale, **guided, **kwargs), rule

    @cached_property
    def encoded(self) -> Float[Tensor, "n c H W"]:
        """The scenes as latents."""
        pictures = [Image.fromarray(each.image) for each in self.scenes.values()]
        with torch.no_grad():
            parts = [encode(self.pipe, p, self.size, self.size, torch.float32) for p in slices(pictures, self.batch)]
        return torch.cat(parts)

    @cached_property
    def reproduced(self) -> Float[Tensor, "n 3 H W"]:
        """The scenes as the autoencoder shows them, in [0, 1]: the best pictures that there are."""
        return reproduced(self.pipe.vae, pixels_of([*self.scenes.values()])) / 2 + 0.5

    @cached_property
    def noise(self) -> Float[Tensor, "n c H W"]:
        """Of each id its own, drawn on the CPU: the same on every device, and for every method."""
        generators = [torch.Generator().manual_seed(seed_of(SEED, name)) for name in self.scenes]
        return torch.stack([torch.randn(self.encoded.shape[1:], generator=each) for each in generators]).to(
            self.device
        )

    @cached_property
    def noised(self) -> Float[Tensor, "n c H W"]:
        """The scenes at the noise with which the late schedule begins: a picture is drawn to see where that is."""
        self._call(self.late, self.captions[:1], self.noise[:1], 2.0, use_scfg=False)
        scheduler, clean, noise = self.late.scheduler, self.encoded, self.noise
        if hasattr(scheduler, "add_noise"):
            return scheduler.add_noise(clean, noise, scheduler.timesteps[:1].expand(len(clean)))
        sigma = scheduler.sigmas[0].to(clean)
        return (1 - sigma) * clean + sigma * noise

    @cached_property
    def late(self) -> GoCASCFGPipeline:
        """The pipeline, its schedule without what lies before `STRENGTH`."""
        late = GoCASCFGPipeline.from_pipe(self.pipe, scheduler=beginning_late(self.pipe.scheduler, STRENGTH))
        late.set_progress_bar_config(disable=True)
        return late

    def _call(self, pipe, captions, latents, scale, **kwargs) -> GoCASCFGPipelineOutput:
        kind = type(pipe)
        given = guidance_arguments(kind, scale) | exact_arguments(kind)
        if "negative_prompt" in given:  # Flux wants as many as prompts
            given["negative_prompt"] = [given["negative_prompt"]] * len(captions)
        return pipe(
            captions,
            num_inference_steps=self.steps,
            height=self.size,
            width=self.size,
            latents=self.family.pack(latents),
            output_type="pt",
            **self.arguments,
            **given,
            **kwargs,
        )
