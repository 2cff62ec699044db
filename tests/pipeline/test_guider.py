"""The guider of modular pipelines: rate one equals stock guidance, on differs, nothing is left, and silence is broken."""

import pytest
import torch
from diffusers import guiders
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig

from goca_guidance import GoCAConfig, GoCAGuidance, SCFGConfig
from goca_guidance.guider import RegionMixin, regional
from tests.helpers.families import FAMILIES, stock_pipeline
from tests.helpers.guided import NEUTRAL, assert_untouched, guided
from tests.helpers.modular import modular_pipeline, needs_modular_sd3


CALL = {
    "prompt": "a cat on grass",
    "negative_prompt": "dog",
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "output": "latents",
}


@pytest.fixture(params=["sdxl", pytest.param("sd3", marks=needs_modular_sd3)])
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return modular_pipeline(name)


def run(pipe, name, guider, **kwargs):
    """Latents, and what the guider saw, if it watches."""
    pipe.update_components(guider=guider)
    length = {"max_sequence_length": FAMILIES[name].call["max_sequence_length"]} if name == "sd3" else {}
    arguments = {**CALL, **length, "generator": torch.Generator().manual_seed(0), **kwargs}
    if not isinstance(guider, RegionMixin):
        return pipe(**arguments), None
    with guider.watching(pipe, keep_regions=True, keep_negative=True) as seen:
        return pipe(**arguments), seen


def test_rate_one_equals_stock_guidance(pipe, name):
    ours, seen = run(pipe, name, GoCAGuidance(5.0, scfg=NEUTRAL))
    assert torch.equal(ours, run(pipe, name, ClassifierFreeGuidance(5.0))[0])
    assert len(seen.results()[0]) == 2


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}, {"use_original_formulation": True}])
def test_on_differs_and_repeats(pipe, name, options):
    ours, seen = run(pipe, name, GoCAGuidance(5.0, **options))
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, run(pipe, name, ClassifierFreeGuidance(5.0, **options))[0], atol=1e-4)
    assert torch.equal(ours, run(pipe, name, GoCAGuidance(5.0, **options))[0])
    regions, maps, words = seen.results()
    assert regions[0].labels == (("cat", "grass", "<sos>"),)
    assert (regions[0].masks.sum(1) == 1).all()
    assert maps.shape == (2, 1, 1, 16, 16)
    assert words[0].labels == (("dog",),)


def test_equals_the_pipeline_on_the_same_modules(pipe, name):
    """The guider and the pipeline class meet in the same regions; modular and standard loops differ by rounding."""
    modular, seen = run(pipe, name, GoCAGuidance(5.0))
    ours = guided(stock_pipeline(name))
    kwargs = {k: v for k, v in CALL.items() if k not in ("prompt", "output")} | FAMILIES[name].call
    kwargs |= {"negative_prompt": "dog", "generator": torch.Generator().manual_seed(0), "guidance_scale": 5.0}
    standard = ours("a cat on grass", output_type="latent", output_regions=True, **kwargs)
    first, again = seen.results()[0][0], standard.regions[0]
    assert first.labels == again.labels
    assert (first.masks == again.masks).float().mean() > 0.99
    assert (modular - standard.images).norm() / standard.images.norm() < 0.01


def test_nothing_is_left(pipe, name):
    guider = GoCAGuidance(5.0)
    denoiser = getattr(pipe, FAMILIES[name].denoiser)

    def explode(*_):
        raise KeyError("inside the network")

    run(pipe, name, guider)
    assert_untouched(denoiser, pipe.text_encoder)
    handle = denoiser.register_forward_hook(explode)
    with pytest.raises(KeyError):
        run(pipe, name, guider)
    handle.remove()
    assert_untouched(denoiser, pipe.text_encoder)
    assert guider._call is None
    assert type(guider.guidance_scale) is float


def test_start_and_stop_are_the_guiders(pipe, name):
    ours, seen = run(pipe, name, GoCAGuidance(5.0, start=0.5))
    assert len(seen.results()[0]) == 1
    neutral, _ = run(pipe, name, GoCAGuidance(5.0, start=0.5, scfg=NEUTRAL))
    assert torch.equal(neutral, run(pipe, name, ClassifierFreeGuidance(5.0, start=0.5))[0])
    assert not torch.equal(ours, neutral)


@needs_modular_sd3
def test_disabled_is_stock():
    """Modular SDXL enables its guider itself."""
    pipe, name = modular_pipeline("sd3"), "sd3"
    guider, stock = GoCAGuidance(5.0), ClassifierFreeGuidance(5.0)
    guider.disable(), stock.disable()
    assert torch.equal(run(pipe, name, guider)[0], run(pipe, name, stock)[0])


def test_config_round_trip(tmp_path):
    guider = GoCAGuidance(
        4.0, goca=GoCAConfig(heads="uniform"), scfg=SCFGConfig(rate_max=2), region_tokens={"cat": [2]}
    )
    guider.save_pretrained(tmp_path)
    for again in (GoCAGuidance.from_pretrained(tmp_path), guider.new()):
        assert (again.guidance_scale, again.goca, again.scfg) == (4.0, guider.goca, guider.scfg)
        assert again.region_tokens == {"cat": [2]}
    assert guider.new(guidance_scale=3.0).guidance_scale == 3.0


def test_named_regions(pipe, name):
    _, seen = run(pipe, name, GoCAGuidance(5.0, region_tokens={"cat": [2]}))
    assert seen.results()[0][0].labels == (("cat", "<sos>"),)


@needs_modular_sd3
def test_modular_sd3_without_a_negative_prompt_is_not_silent():
    """Stock guidance changes nothing there and does not say so."""
    pipe = modular_pipeline("sd3")
    kwargs = {"negative_prompt": None}
    plain, _ = run(pipe, "sd3", ClassifierFreeGuidance(1.0), **kwargs)
    assert torch.equal(run(pipe, "sd3", ClassifierFreeGuidance(9.0), **kwargs)[0], plain)
    with pytest.raises(ValueError, match='pass `negative_prompt=""`'):
        run(pipe, "sd3", GoCAGuidance(5.0), **kwargs)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"start": 0.9, "stop": 0.95}])
def test_nothing_guided_is_stock(pipe, name, options):
    stock = run(pipe, name, ClassifierFreeGuidance(**options))[0]
    assert torch.equal(run(pipe, name, GoCAGuidance(**options))[0], stock)


def test_one_call_for_each_watching(pipe, name):
    guider = GoCAGuidance(5.0)
    pipe.update_components(guider=guider)
    kwargs = CALL | ({"max_sequence_length": FAMILIES[name].call["max_sequence_length"]} if name == "sd3" else {})
    with guider.watching(pipe):
        pipe(**kwargs)
        with pytest.raises(ValueError, match="one pipeline call"):
            pipe(**{**kwargs, "prompt": "a dog"})


def test_a_guider_that_does_not_watch(pipe, name):
    guider = GoCAGuidance(5.0)
    with pytest.raises(ValueError, match="update_components"), guider.watching(pipe):
        pass
    pipe.update_components(guider=guider)
    with pytest.raises(RuntimeError, match=r"with guider.watching\(pipe\)"):
        pipe(**CALL)


# ---- beside other guiders --------------------------------------------------------------------------------------------
SKIPPED = {"fqn": "transformer_blocks", "indices": [1]}
OTHERS = {  # of diffusers, with arguments
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 0},
    "TangentialClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_rescale": 0.0},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 1},
    "SkipLayerGuidance": {"skip_layer_config": LayerSkipConfig(**SKIPPED), "skip_layer_guidance_start": 0.0},
    "SmoothedEnergyGuidance": {"seg_guidance_config": SmoothedEnergyGuidanceConfig(**SKIPPED), "seg_blur_sigma": 1.0},
    "PerturbedAttentionGuidance": {
        "perturbed_guidance_config": LayerSkipConfig(
            **SKIPPED, skip_attention_scores=True, skip_attention=False, skip_ff=False
        ),
        "perturbed_guidance_start": 0.0,
    },
}


@needs_modular_sd3
@pytest.mark.parametrize("other", OTHERS)
def test_other_guiders_follow_regions(other):
    """A rate of one is the guider itself, bit for bit; and every step is guided, a third prediction among them or not."""
    pipe, stock = modular_pipeline("sd3"), getattr(guiders, other)
    arguments = {"guidance_scale": 5.0, **OTHERS[other]}
    expected, _ = run(pipe, "sd3", stock(**arguments))
    neutral, _ = run(pipe, "sd3", regional(stock)(**arguments, scfg=NEUTRAL))
    assert torch.equal(neutral, expected)
    ours, seen = run(pipe, "sd3", regional(stock)(**arguments))
    assert not torch.allclose(ours, expected, atol=1e-4)
    assert len(seen.results()[0]) == 2
    assert_untouched(pipe.transformer)


def test_a_regional_guider_is_saved_with_its_choices():
    made = regional(guiders.AdaptiveProjectedGuidance)
    guider = made(guidance_scale=4.0, eta=0.5, goca=GoCAConfig(rescale=False), scfg=SCFGConfig(rate_max=2.0))
    again = made.from_config(guider.config)
    assert (again.guidance_scale, again.eta, again.goca, again.scfg) == (4.0, 0.5, guider.goca, guider.scfg)
    assert regional(guiders.AdaptiveProjectedGuidance) is made


@pytest.mark.parametrize("other", ["MagnitudeAwareGuidance", "FrequencyDecoupledGuidance", "LTX2Guidance"])
def test_guiders_without_the_product_are_refused_by_name(other):
    if not hasattr(guiders, other):
        pytest.skip(f"this diffusers has no {other}")
    with pytest.raises(ValueError, match=f"but {other} does not .*use another one"):
        regional(getattr(guiders, other))
    with pytest.raises(TypeError, match="Expected a class of diffusers' guiders"):
        regional(torch.nn.Linear)
