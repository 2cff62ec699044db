"""GoCA + S-CFG as a guider of modular diffusers pipelines, by itself or beside another one of diffusers' guiders."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import denoisers_of, family_of, text_encoders_of
from goca_guidance.hooks.guided import GuidedCall
from goca_guidance.method.scfg import SpatialGuidanceScale
from goca_guidance.mixing import Mixing
from goca_guidance.schema import between, checked


PREDICTIONS = {"pred_uncond": 0, "pred_cond": 1}  # by a guider's name of it; others (a skipped layer's) are no half
SCALES = ("guidance_scale", "adaptive_projected_guidance_scale")  # what a guider multiplies by the guidance difference
WITHOUT_PRODUCT = {  # why guiders cannot be given regions
    "MagnitudeAwareGuidance": "its scale is computed from the predictions",
    "FrequencyDecoupledGuidance": "it has a scale for each band of frequencies",
    "LTX2Guidance": "it mixes pictures and sound",
}


class RegionMixin(BaseGuidance):
    """Before a guider of diffusers: the product of its guidance scale and its guidance difference follows regions.

    See [`GoCAGuidance`] for how to use one.
    """

    _call: GuidedCall | None = None
    _mixing = False  # from where a step begins to where it mixes: forwards outside are not the loop's
    _mixed = False  # in any step of the call
    _guides = False  # the step in progress has two predictions to mix

    def _choose(self, goca, scfg, region_tokens) -> None:
        """Keep the choices, and save them in the guider's configuration."""
        self.goca = goca if isinstance(goca, GoCAConfig) else GoCAConfig(**(goca or {}))
        self.scfg = scfg if isinstance(scfg, SCFGConfig) else SCFGConfig(**(scfg or {}))
        self.region_tokens = region_tokens
        saved: dict[str, Any] = {"goca": dataclasses.asdict(self.goca), "scfg": dataclasses.asdict(self.scfg)}
        saved["region_tokens"] = region_tokens
        self.register_to_config(**saved, _use_default_values=[])  # a positional argument would count as a default

    @checked
    @contextmanager
    def watching(self, pipe, keep_regions: bool = False, keep_negative: bool = False) -> Iterator[GuidedCall]:
        """Watch one call of `pipe`, whose guider this is; what was seen is in the yielded call's `results()`."""
        if all(getattr(pipe, name, None) is not self for name in ("guider", "guider_2")):
            raise ValueError(
                "Expected this guider in the pipeline: call `pipe.update_components(guider=guider)` first."
            )
        denoisers = denoisers_of(pipe.components)
        call = GuidedCall(
            denoisers,
            text_encoders_of(pipe, family_of(denoisers[0])),
            self.goca,
            self.scfg,
            separate=True,
            mixing=Mixing(excess=int(getattr(self, "use_original_formulation", False))),
            is_guided=lambda step: self._guides,
            own=lambda: self._mixing,
            region_tokens=self.region_tokens,
            keep_regions=keep_regions,
            keep_negative=keep_negative,
        )
        self._call, self._mixed = call, False
        try:
            with call.installed():
                yield call
        finally:
            self._call, self._mixing = None, False
        if self._mixed:
            call.check()

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """A step begins."""
        super().set_state(step, num_inference_steps, timestep)
        if self._call is not None:
            if step == 0 and self._call.step:
                raise ValueError(
                    "Expected one pipeline call inside `with guider.watching(pipe):`, but this is a second one."
                )
            self._call.begin_step()
            self._mixing = True

    def prepare_inputs(self, data: Mapping) -> list:
        """Inputs of each prediction; where there are two to mix, someone must watch."""
        batches = super().prepare_inputs(data)
        self._prepare(batches, [value for value in data.values() if isinstance(value, tuple)])
        return batches

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping) -> list:
        """As `prepare_inputs`, where a pipeline names the fields of its state."""
        named = [names for names in input_fields.values() if isinstance(names, tuple)]
        batches = super().prepare_inputs_from_block_state(data, input_fields)
        self._prepare(batches, [tuple(getattr(data, name, None) for name in names) for names in named])
        return batches

    def _prepare(self, batches, inputs: Sequence[tuple]) -> None:
        """`inputs` that differ between predictions: each conditional, then unconditional."""
        if any(len(each) != 2 for each in inputs):
            raise ValueError(
                f"Expected a pipeline whose guider mixes two predictions, but this one's makes {len(inputs[0])} (sounds, or "
                "layers skipped): use its own guider."
            )
        one_only = not inputs or any(c is not None and u is None for c, u in inputs)
        kinds = [PREDICTIONS.get(getattr(batch, self._identifier_key)) for batch in batches]
        self._guides = 0 in kinds
        if self._guides:
            self._watched(one_only).steps.announce(kinds)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **others: Tensor):
        """The guider's own combination, its scale spatial."""
        if not self._guides:
            return super().forward(pred_cond, pred_uncond, **others)
        call = self._watched(pred_uncond is None)
        scales = {name: value for name, value in vars(self).items() if name in SCALES and value is not None}
        self._mixed = True
        try:
            self.__dict__.update({name: SpatialGuidanceScale(value, call.rate) for name, value in scales.items()})
            return super().forward(pred_cond, pred_uncond, **others)
        finally:
            self.__dict__.update(scales)
            self._mixing = False

    def _watched(self, one_only: bool) -> GuidedCall:
        """The call in progress: someone must watch, and there must be two predictions to mix."""
        if self._call is None:
            raise RuntimeError(
                f"Expected {type(self).__name__} to watch the pipeline: call it inside `with guider.watching(pipe):`, or use "
                "`guider.disable()`."
            )
        if one_only:
            raise ValueError(
                "Expected conditional and unconditional text embeddings to guide with, but got the conditional ones only: "
                'pass `negative_prompt=""` (without it, this pipeline guides nothing and does not say so).'
            )
        return self._call


class GoCAGuidance(RegionMixin, ClassifierFreeGuidance):
    """Classifier-free guidance whose strength follows GoCA's regions (arXiv 2603.06178) by S-CFG (arXiv 2404.05384).

    A guider sees neither the prompt nor the attention, so it watches the pipeline for the time of a call:

    ```python
    guider = GoCAGuidance(guidance_scale=5.0)
    pipe.update_components(guider=guider)
    with guider.watching(pipe, keep_regions=True) as seen:
        images = pipe(prompt="a cat on grass", negative_prompt="", output="images")
    regions, guidance_maps, _ = seen.results()
    ```

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: see [`ClassifierFreeGuidance`].
        goca, scfg: the choices, as [`GoCAConfig`] and [`SCFGConfig`] or as dictionaries of their fields, in which form they
            are saved.
        region_tokens: regions by name and token positions; by default every word of the prompt is one.
    """

    @register_to_config
    @checked
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: Annotated[float, between(0, 1)] = 0.0,
        stop: Annotated[float, between(0, 1)] = 1.0,
        enabled: bool = True,
        goca: GoCAConfig | Mapping[str, Any] | None = None,
        scfg: SCFGConfig | Mapping[str, Any] | None = None,
        region_tokens: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
    ):
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self._choose(goca, scfg, region_tokens)


@functools.cache
def regional(guider: type) -> type[BaseGuidance]:
    """A guider of diffusers whose guidance follows regions: `regional(AdaptiveProjectedGuidance)(guidance_scale=5.0)`.

    The class takes the guider's arguments, and `goca`, `scfg` and `region_tokens` as [`GoCAGuidance`] does.
    """
    if not (isinstance(guider, type) and issubclass(guider, BaseGuidance)):
        raise TypeError(f"Expected a class of diffusers' guiders, but got {guider!r}.")
    if reason := next(
        (WITHOUT_PRODUCT[base.__name__] for base in guider.__mro__ if base.__name__ in WITHOUT_PRODUCT), None
    ):
        raise ValueError(
            f"Expected a guider that multiplies one scale and the guidance difference, but {guider.__name__} does not "
            f"({reason}): use another one, for example `GoCAGuidance`."
        )
    stock = inspect.signature(guider.__init__)

    def __init__(self, *args, goca=None, scfg=None, region_tokens=None, **kwargs):  # noqa: N807
        guider.__init__(self, *args, **kwargs)
        self._choose(goca, scfg, region_tokens)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("goca", "scfg", "region_tokens")
    ]
    shown: Any = __init__
    shown.__signature__ = stock.replace(parameters=[*stock.parameters.values(), *added])
    return type(f"GoCA{guider.__name__}", (RegionMixin, guider), {"__init__": __init__, "__module__": __name__})
