"""Rows of the table of features: guidance, and what changes it in the loop."""

import diffusers
import torch
from diffusers import callbacks

from goca_guidance import SCFGConfig
from tests.features.checks import (
    ABSENT,
    feature,
    plain,
    refused,
    refused_by_diffusers,
    takes,
    variant,
    works,
)
from tests.helpers.families import FAMILIES, run, stock_pipeline
from tests.helpers.guided import NEUTRAL, guided


CUTOFFS = {"sd": "SDCFGCutoffCallback", "sdxl": "SDXLCFGCutoffCallback", "sd3": "SD3CFGCutoffCallback"}


@feature("Guidance in some of the steps (`scfg_start`, `scfg_stop`)")
def some_steps(name):
    return works(name, visible=False, steps=1, ours={"scfg_start": 0.5})


@feature("S-CFG's own segmentor")
def own_segmentor(name):
    return works(name, visible=False, scfg=SCFGConfig(segmentor="s-cfg"))


@feature("Second-order scheduler (Heun)")
def heun(name):
    """Two steps call the denoiser three times."""
    config = stock_pipeline(name).scheduler.config
    flow = "shift_terminal" in config
    kind = diffusers.FlowMatchHeunDiscreteScheduler if flow else diffusers.HeunDiscreteScheduler
    stock = stock_pipeline(name, scheduler=kind.from_config(config))
    if name == "flux":
        return refused_by_diffusers("custom sigmas", "no custom sigmas in this scheduler", lambda: run(stock, name))
    return works(name, stock=stock, steps=3)


@feature("Rescaled guidance (`guidance_rescale`)")
def guidance_rescale(name):
    return works(name, guidance_rescale=0.7) if takes(name, "guidance_rescale") else ABSENT


@feature("Scale changed by a callback")
def changing_scale(name):
    if not takes(name, "callback_on_step_end"):
        return ABSENT
    call, pipe = {"callback_on_step_end": _raise_scale}, guided(stock_pipeline(name))
    if torch.equal(run(stock_pipeline(name), name, **call).images, plain(name)):  # the loop has a scale of its own
        assert torch.equal(run(pipe, name, scfg=NEUTRAL, **call).images, plain(name))
        return ABSENT
    maps = run(pipe, name, scfg=NEUTRAL, output_regions=True, **call).guidance_maps
    assert [step.unique().tolist() for step in maps] == [[5.0], [6.0]]
    return works(name, **call)


def _raise_scale(pipe, step, timestep, tensors):
    pipe._guidance_scale += 1
    return tensors


@feature("Call interrupted by a callback")
def interruption(name):
    if not hasattr(FAMILIES[name].stock, "interrupt"):
        return ABSENT
    return works(name, callback_on_step_end=_interrupt, steps=1)


def _interrupt(pipe, step, timestep, tensors):
    pipe._interrupt = True
    return tensors


@feature("Guidance cut off by a callback of diffusers")
def cutoff(name):
    if name not in CUTOFFS:
        known = {callback for callback in vars(callbacks) if callback.endswith("CFGCutoffCallback")}
        assert known == {*CUTOFFS.values(), "SDXLControlnetCFGCutoffCallback"}
        return ABSENT
    callback = getattr(callbacks, CUTOFFS[name])(cutoff_step_ratio=None, cutoff_step_index=0)
    return works(name, steps=1, callback_on_step_end=callback)


@feature("Skip-layer guidance")
def skip_layer(name):
    if not takes(name, "skip_guidance_layers"):
        return ABSENT
    return works(name, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@feature("Perturbed-attention guidance")
def perturbed_attention(name):
    if (stock := variant(name, "PAG")) is None:
        return ABSENT
    reason = "three predictions are mixed; `pag_scale=0.0`"
    return refused(name, "pag_scale=0.0", reason, stock=stock, fix=lambda pipe: {"pag_scale": 0.0})


@feature("FreeU")
def freeu(name):
    if not hasattr(stock_pipeline(name), "enable_freeu"):
        return ABSENT
    return works(name, lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))
