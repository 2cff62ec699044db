"""Checkpoints and schedulers that differ from the plain ones: what segmentation makes of them, and which words are read."""

import diffusers
import pytest
import torch

from goca_guidance.denoisers.adapters import family_of
from goca_guidance.denoisers.layouts import named_words
from goca_guidance.denoisers.words import Encoded
from goca_guidance.hooks.observer import AttentionObserver
from goca_guidance.real_images.noising import encode, noisy_latents
from tests.helpers.families import FAMILIES, inpaint, run, stock_pipeline
from tests.helpers.guided import every_family, guided
from tests.helpers.tiny import tiny_components


CLASSES = ["cat", "potted plant"]


def segment(pipe, image, name="sd", **kwargs):
    size = {key: FAMILIES[name].call[key] for key in ("height", "width")}
    return pipe.segment(image, CLASSES, **size, **kwargs).scores


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
)
def test_flow_models_get_flow_noise_whatever_the_scheduler(image, scheduler, options):
    pipe = guided(stock_pipeline("sd3"))
    expected = segment(pipe, image, "sd3", timestep=500)
    pipe.scheduler = getattr(diffusers, scheduler)(**options)
    assert torch.allclose(segment(pipe, image, "sd3", timestep=500), expected, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_noise_is_the_schedulers(shift):
    """The shift by hand against what the scheduler itself does with the same sigma."""
    pipe = stock_pipeline("sd3")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ((told, _),) = noisy_latents(pipe, family_of(pipe.transformer), torch.zeros(1, 16, 16, 16), [100], 1, None)
    pipe.scheduler.set_timesteps(sigmas=[0.1])
    assert told == pytest.approx(pipe.scheduler.timesteps[0].item(), rel=1e-5)


def test_a_schedule_of_another_kind_is_refused(image):
    pipe = guided(stock_pipeline("sd"))
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="but got EDMEulerScheduler"):
        segment(pipe, image)


def test_latents_of_a_vae_with_statistics(image):
    pipe = stock_pipeline("sdxl")
    plain = encode(pipe, [image], 32, 32, torch.float32)
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    mean, deviation = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale = pipe.vae.config.scaling_factor
    by_hand = (plain / scale - mean.view(1, -1, 1, 1)) * scale / deviation.view(1, -1, 1, 1)
    assert torch.allclose(encode(pipe, [image], 32, 32, torch.float32), by_hand, atol=1e-5)


def test_a_vae_that_overflows_in_half_precision_is_upcast(image):
    """As the published XL autoencoder is by the stock pipelines; its dtype is restored."""
    pipe = guided(stock_pipeline("sdxl")).to(dtype=torch.float16)
    pipe.vae.encoder.conv_in.weight.data *= 1000
    pipe.vae.encoder.conv_in.register_forward_hook(lambda m, args, out: out * 100)
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.raises(ValueError, match="the autoencoder gave NaN"):
        segment(pipe, image, "sdxl")
    pipe.vae.register_to_config(force_upcast=True)
    assert torch.isfinite(segment(pipe, image, "sdxl")).all()
    assert pipe.vae.dtype == torch.float16


@every_family
def test_a_vae_of_another_dtype(name, image):
    pipe = guided(stock_pipeline(name)).to(dtype=torch.bfloat16)
    pipe.vae.to(torch.float32)
    assert torch.isfinite(segment(pipe, image, name)).all()


def test_perturbed_attention_is_left_out_of_segmentation(image):
    stock = stock_pipeline("sd")
    pag = guided(diffusers.StableDiffusionPAGPipeline(**stock.components, requires_safety_checker=False))
    assert torch.equal(segment(pag, image), segment(guided(stock), image))


def test_checkpoints_that_ask_for_more_than_words(image):
    nine = stock_pipeline("sd")
    nine.unet = tiny_components(in_channels=9)["unet"]
    with pytest.raises(ValueError, match="9 input channels"):
        segment(guided(nine), image)
    blind = guided(stock_pipeline("sd"))
    blind.text_encoder = None
    with pytest.raises(ValueError, match="none loaded"):
        segment(blind, image)
    assert torch.isfinite(segment(guided(inpaint("sd")[0]), image)).all()


def reading(ids, suffix):
    def before(module, args, kwargs):
        ids.setdefault(suffix, (args[0] if args else kwargs["input_ids"]).cpu())

    return before


@every_family
@pytest.mark.parametrize("prompt", ["A Cat on Grass,  zebra", "a cat " * 30])
def test_words_stand_where_the_encoders_read_them(name, prompt):
    """Positions from the prompt alone, against the ids that the encoders get in a generation."""
    pipe, ids = guided(stock_pipeline(name)), {}
    suffixes = {"flux": ["_2"], "sd3": ["", "_3"], "hunyuan": ["", "_2"]}.get(name, [""])
    for suffix in suffixes:
        encoder = getattr(pipe, f"text_encoder{suffix}")
        encoder.register_forward_pre_hook(reading(ids, suffix), with_kwargs=True)
    default = {k: v for k, v in FAMILIES[name].call.items() if k not in ("max_sequence_length", "clean_caption")}
    pipe(
        prompt, num_inference_steps=1 if name != "pixart-alpha" else 2, output_type="latent", use_scfg=False, **default
    )
    encoded, start = [], 0
    for suffix in suffixes:
        encoded.append(Encoded(getattr(pipe, f"tokenizer{suffix}"), ids[suffix], start))
        start += ids[suffix].shape[1]
    sink = "end" if name in ("pixart-alpha", "pixart-sigma", "flux") else "start"
    assert pipe.words(prompt) == named_words(encoded, sink)


def test_kept_queries_hold_no_other_half(monkeypatch):
    kept, pipe, original = [], guided(stock_pipeline("sd")), AttentionObserver._record

    def record(self, name, call):
        found = original(self, name, call)
        kept.append(found.branch(1).only().alone())
        return found

    monkeypatch.setattr(AttentionObserver, "_record", record)
    run(pipe, "sd")
    assert kept
    assert all(x.untyped_storage().nbytes() == x.nbytes for r in kept for x in (r.query, r.key))
