"""GoCA + S-CFG as a guider of modular diffusers pipelines (Stable Diffusion XL and 3)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of, family_of, text_encoders_of
from goca_guidance.hooks.guided import GuidedCall
from goca_guidance.method.scfg import SpatialGuidanceScale
from goca_guidance.schema import between, checked


class GoCAGuidance(ClassifierFreeGuidance):
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

    guidance_scale: float

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
        self._call: GuidedCall | None = None
        self._mixing = False  # from where a step begins to where it mixes: forwards outside are not the loop's
        self._mixed = False  # in any step of the call
        self.goca = goca if isinstance(goca, GoCAConfig) else GoCAConfig(**(goca or {}))
        self.scfg = scfg if isinstance(scfg, SCFGConfig) else SCFGConfig(**(scfg or {}))
        self.region_tokens = region_tokens
        saved = {"goca": dataclasses.asdict(self.goca), "scfg": dataclasses.asdict(self.scfg)}
        self.register_to_config(**saved, _use_default_values=[])  # a positional argument would count as a default

    @checked
    @contextmanager
    def watching(self, pipe, keep_regions: bool = False, keep_negative: bool = False) -> Iterator[GuidedCall]:
        """Watch one call of `pipe`, whose guider this is; what was seen is in the yielded call's `results()`."""
        if getattr(pipe, "guider", None) is not self:
            raise ValueError(
                "Expected this guider in the pipeline: call `pipe.update_components(guider=guider)` first."
            )
        denoiser = denoiser_of(pipe.components)
        call = GuidedCall(
            denoiser,
            text_encoders_of(pipe, family_of(denoiser)),
            self.goca,
            self.scfg,
            separate=True,
            is_guided=lambda step: self._is_cfg_enabled(),
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
        """Conditional inputs, then unconditional ones; both must be there, and someone must watch."""
        text = data.get("encoder_hidden_states", data.get("prompt_embeds"))
        if self._is_cfg_enabled():
            self._watched(not isinstance(text, tuple) or any(part is None for part in text))
        return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping) -> list:
        """As `prepare_inputs`, where a pipeline names the fields of its state."""
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        found = [tuple(getattr(data, name, None) for name in names) for names in pairs]
        if self._is_cfg_enabled():
            self._watched(all(unconditional is None for _, unconditional in found))
        return super().prepare_inputs_from_block_state(data, input_fields)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None):
        """The stock combination, its scale spatial."""
        if not self._is_cfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        call, scale = self._watched(pred_uncond is None), self.guidance_scale
        self.guidance_scale, self._mixed = SpatialGuidanceScale(scale, call.rate), True
        try:
            return super().forward(pred_cond, pred_uncond)
        finally:
            self.guidance_scale, self._mixing = scale, False

    def _watched(self, one_only: bool) -> GuidedCall:
        """The call in progress: someone must watch, and there must be two predictions to mix."""
        if self._call is None:
            raise RuntimeError(
                "Expected GoCAGuidance to watch the pipeline: call it inside `with guider.watching(pipe):`, or use "
                "`guider.disable()`."
            )
        if one_only:
            raise ValueError(
                "Expected conditional and unconditional text embeddings to guide with, but got the conditional ones only: "
                'pass `negative_prompt=""` (without it, this pipeline guides nothing and does not say so).'
            )
        return self._call
