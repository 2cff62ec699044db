"""Presets resolve to real layers on full-size denoisers (meta device), tiny ones, and ones that nobody has heard of."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin

from goca_guidance.config import RELEASED, GoCAConfig
from goca_guidance.denoisers.adapters import ADAPTERS, denoiser_of, family_of, text_encoders_of
from goca_guidance.denoisers.base import DenoiserCall, Family, _warn_of_generic_preset, check_whole
from goca_guidance.denoisers.unets import UNetFamily, XLFamily
from goca_guidance.stock import named_pipeline
from tests.helpers import families
from tests.helpers.families import BERT_TOKENS, FAMILIES, HUNYUAN_T5_TOKENS, MAX_TOKENS, stock_pipeline
from tests.helpers.places import shared
from tests.helpers.tiny import tiny_components


JOINT = ("FluxFamily", "SD3Family")


# ---- full-size denoisers ---------------------------------------------------------------------------------------------
def unet_blocks(*places):
    """`down_blocks.0.1.0`: level, attention and transformer block to the self-attention's full name."""
    split = (place.rsplit(".", 2) for place in places)
    return tuple(f"{level}.attentions.{attention}.transformer_blocks.{b}.attn1" for level, attention, b in split)


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_SIZE = {
    "sd1": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    "sd2": lambda: UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)),
    "sdxl": lambda: UNet2DConditionModel(sample_size=128, **XL),
    "pixart": PixArtTransformer2DModel,
    "flux": FluxTransformer2DModel,
    "hunyuan": lambda: HunyuanDiT2DModel(in_channels=4, patch_size=2, num_layers=40),
    "sd3": lambda: SD3Transformer2DModel(num_layers=24),
    "sd3.5": lambda: SD3Transformer2DModel(num_layers=24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
}
REAL = {
    "sd1": "stable-diffusion-v1-5/unet",
    "sdxl": "stable-diffusion-xl-base-1.0/unet",
    "flux": "FLUX.1-dev/transformer",
    "sd3": "stable-diffusion-3-medium/transformer",
}
SD = {
    "text": 16,
    "reference": "up_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "refine": unet_blocks("down_blocks.0.1.0", "up_blocks.3.0.0", "up_blocks.3.1.0"),
    "manual": tuple(  # the list of the released configuration
        f"{block}.transformer_blocks.0.attn2"
        for block in (
            *("down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"),
            *("up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2"),
            *("up_blocks.2.attentions.0", "up_blocks.2.attentions.1"),
        )
    ),
}
SD3 = {
    "text": 24,
    "reference": "transformer_blocks.12.attn",
    "refine": tuple(f"transformer_blocks.{i}.attn" for i in range(8, 16)),
    "heads": "uniform",
}
EXPECTED = {
    "sd1": SD,
    "sd2": SD,
    "sdxl": {
        "text": 70,
        "reference": "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "refine": unet_blocks(
            *("down_blocks.1.0.0", "down_blocks.1.0.1"),
            *("up_blocks.1.0.0", "up_blocks.1.0.1", "up_blocks.1.1.0", "up_blocks.1.1.1", "up_blocks.1.2.0"),
        ),
    },
    "pixart": {
        "text": 28,
        "reference": "transformer_blocks.13.attn2",
        "refine": tuple(f"transformer_blocks.{i}.attn1" for i in range(10, 18)),
        "order": 5,
    },
    "flux": {
        "text": 57,
        "reference": "single_transformer_blocks.8.attn",
        "refine": ("transformer_blocks.12.attn", "transformer_blocks.18.attn"),
        "timestep": 150,
        "heads": "uniform",
        "features": "output",
    },
    "hunyuan": {
        "text": 10,
        "reference": "blocks.25.attn2",
        "refine": tuple(f"blocks.{i}.attn1" for i in range(20, 30)),
        "order": 4,
        "heads": "uniform",
    },
    "sd3": SD3,
    "sd3.5": SD3,
}
DEFAULTS = {"order": 2, "timestep": 100, "heads": "contribution", "features": "query", "manual": ()}


@pytest.fixture(params=[*((name, "defaults") for name in FULL_SIZE), *((name, "real") for name in REAL)], ids="-".join)
def full_size(request):
    """Name and adapter of a denoiser of the published size, without weights, from code and from its real configuration."""
    name, source = request.param
    with torch.device("meta"):
        if source == "defaults":
            return name, family_of(FULL_SIZE[name]())
        config = json.loads(shared(f"model_trees/{REAL[name]}/config.json").read_text())
        return name, family_of(getattr(diffusers, config["_class_name"]).from_config(config))


def test_preset_of_a_full_size_denoiser(full_size):
    name, family = full_size
    preset, expected = family.preset, DEFAULTS | EXPECTED[name]
    found = {key: getattr(preset, key) for key in expected}
    assert found | {"text": len(preset.text)} == expected
    assert not preset.row_normalise


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("sd-1.5", "sd1"),
        ("sdxl", "sdxl"),
        ("pixart-alpha", "pixart"),
        ("pixart-sigma", "pixart"),
        ("hunyuandit", "hunyuan"),
        ("flux.1", "flux"),
    ],
)
def test_the_released_configuration_is_that_of_the_released_preset(model, size):
    expected, named, config = DEFAULTS | EXPECTED[size], GoCAConfig.released(model), GoCAConfig.released()
    assert (named.heads, named.refine_order, named.timestep) == RELEASED[model]
    assert RELEASED[model] == tuple(expected[key] for key in ("heads", "order", "timestep"))
    assert config == replace(named, heads=None, refine_order=None, timestep=None)
    assert (config.blur_size, config.blur_sigma, config.reference_channels) == (5, 1.1, 1)
    assert config.rescale is not config.row_normalise is config.drop_stop_words is False


def test_a_released_configuration_is_a_published_models():
    with pytest.raises(ValueError, match="but got 'sd3'"):
        GoCAConfig.released("sd3")


def test_every_layer_of_a_preset_exists_in_network_order(full_size):
    """Text keys are as wide as the text, and pixel keys as the pixels, where one layer has only one of them."""
    _, family = full_size
    preset, names = family.preset, list(family.attention_modules)
    for layers in (preset.text, preset.self_attention, preset.refine):
        places = [names.index(layer) for layer in layers]
        assert places == sorted(set(places))
    assert preset.reference in preset.text
    if type(family).__name__ in JOINT:
        assert preset.self_attention == preset.text
        return
    assert preset.self_attention == tuple(layer.replace("attn2", "attn1") for layer in preset.text)
    assert set(preset.refine) <= set(preset.self_attention)
    assert all(family.attention_modules[layer].is_cross_attention for layer in preset.text)
    assert not any(family.attention_modules[layer].is_cross_attention for layer in preset.self_attention)


def test_flux_runs_double_blocks_first():
    with torch.device("meta"):
        cross = family_of(FULL_SIZE["flux"]()).preset.text
    assert cross[:19] == tuple(f"transformer_blocks.{i}.attn" for i in range(19))
    assert cross[19:] == tuple(f"single_transformer_blocks.{i}.attn" for i in range(38))


# ---- tiny denoisers --------------------------------------------------------------------------------------------------
@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return stock_pipeline(name)


def family_in(pipe) -> Family:
    return family_of(denoiser_of(pipe.components))


ADAPTED = {
    "sd": "UNetFamily",
    "sdxl": "XLFamily",
    "pixart-alpha": "PixArtFamily",
    "pixart-sigma": "PixArtFamily",
    "flux": "FluxFamily",
    "sd3": "SD3Family",
    "hunyuan": "HunyuanFamily",
}


def test_every_adapter_is_tested():
    """A new one has a tiny model in `tests/helpers/families.py`, or a tiny loop: `tests/loops` holds the latter."""
    denoisers = {type(denoiser_of(FAMILIES[name].components())).__name__ for name in ADAPTED}
    assert denoisers <= {*ADAPTERS, "UNet2DConditionModel"}
    assert set(ADAPTED.values()) <= {cls.__name__ for cls in (*ADAPTERS.values(), UNetFamily, XLFamily)}
    assert set(ADAPTED) == set(FAMILIES)


def test_every_family_has_its_adapter_and_pipeline(pipe, name, caplog):
    family = family_in(pipe)
    assert type(family).__name__ == ADAPTED[name]
    assert family.preset.layers <= set(family.attention_modules)
    assert not caplog.records
    assert named_pipeline(family) is FAMILIES[name.replace("alpha", "sigma")].stock  # one denoiser, two pipelines
    finetuned = type("Finetuned", (type(family.denoiser),), {})
    assert type(family_of(finetuned.from_config(family.denoiser.config))) is type(family)


def test_a_compiled_denoiser_is_looked_through(pipe):
    denoiser = denoiser_of(pipe.components)
    family = family_of(torch.compile(denoiser, backend="eager"))
    assert family.denoiser is denoiser


def test_the_encoders_whose_tokens_are_seen(pipe, name):
    """SDXL's two share positions; Flux's CLIP makes no tokens, nor does SD3's second CLIP make other ones."""
    encoders = {
        "flux": [("text_encoder_2", "tokenizer_2")],
        "sd3": [("text_encoder", "tokenizer"), ("text_encoder_3", "tokenizer_3")],
        "hunyuan": [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")],
    }.get(name, [("text_encoder", "tokenizer")])
    expected = [tuple(getattr(pipe, part) for part in encoder) for encoder in encoders]
    assert text_encoders_of(pipe, family_in(pipe)) == expected


def test_an_encoder_that_is_not_loaded():
    """Refiners of SDXL have the second one only; SD3 runs without T5, with its tokenizer or without."""
    refiner = stock_pipeline("sdxl", text_encoder=None, tokenizer=None)
    assert text_encoders_of(refiner, family_in(refiner)) == [(refiner.text_encoder_2, refiner.tokenizer_2)]
    embedded = stock_pipeline("sd3", text_encoder_3=None)
    assert text_encoders_of(embedded, family_in(embedded))[1] == (None, embedded.tokenizer_3)
    small = stock_pipeline("sd3", text_encoder_3=None, tokenizer_3=None)
    assert text_encoders_of(small, family_in(small)) == [(small.text_encoder, small.tokenizer)]


def test_sizes_of_a_call(pipe, name):
    """Two images, wider than high: rows before columns; the predictions of Flux's true guidance come one by one."""
    family, calls = family_in(pipe), []
    family.denoiser.register_forward_pre_hook(lambda m, *call: calls.append(family.call(*call)), with_kwargs=True)
    height = FAMILIES[name].call["height"]
    families.run(pipe, name, ["a cat", "a dog on grass"], width=height * 2)
    text = {"sd3": 2 * MAX_TOKENS, "hunyuan": BERT_TOKENS + HUNYUAN_T5_TOKENS}.get(name, MAX_TOKENS)
    assert set(calls) == {DenoiserCall(2 if name == "flux" else 4, (16, 32), text)}


def test_packing_is_the_stock_pipelines(pipe, name):
    family, maps = family_in(pipe), torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    packed = family.pack(maps)
    expected = FluxPipeline._pack_latents(maps, 2, 4, 6, 10) if name == "flux" else maps
    assert torch.equal(packed, expected)
    assert torch.equal(family.unpack(packed, DenoiserCall(2, (6, 10), 24)), maps)


def test_generic_preset_refines_on_the_finest_grid_and_compares_on_half_the_latents():
    unet = tiny_components()["unet"]  # two levels
    preset = family_of(unet).preset
    assert family_of(unet)._level(preset.reference) == 1
    assert {name.split(".attentions")[0] for name in preset.refine} <= {"down_blocks.0", "up_blocks.1"}
    assert (preset.order, preset.timestep, preset.row_normalise) == (1, 50, True)


@pytest.mark.parametrize(
    ("levels", "reference"),
    [
        ((0, 1, 2), "up_blocks.1.attentions.0"),  # Stable Diffusion's grids
        ((1, 2), "up_blocks.1.attentions.0"),  # XL's: the finest one is half the latent's
        ((0, 2), "up_blocks.2.attentions.0"),  # none is half the latent's
        ((2,), "up_blocks.0.attentions.0"),
    ],
)
def test_the_reference_of_a_generic_unet_has_half_the_latents_grid(levels, reference):
    down = [("DownBlock2D", "CrossAttnDownBlock2D")[level in levels] for level in range(3)]
    up = [("UpBlock2D", "CrossAttnUpBlock2D")[level in levels] for level in (2, 1, 0)]
    unet = UNet2DConditionModel(
        block_out_channels=(4, 4, 4),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
    )
    assert family_of(unet).preset.reference == f"{reference}.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("block", "latent", "grid"),
    [("down_blocks.0", (64, 64), (64, 64)), ("up_blocks.0", (64, 64), (32, 32)), ("mid_block", (15, 11), (8, 6))],
)
def test_grid(block, latent, grid):
    assert family_of(tiny_components()["unet"]).grid(f"{block}.attentions.0", latent) == grid


def test_grid_of_a_transformer_is_in_patches():
    assert family_in(stock_pipeline("pixart-sigma")).grid("transformer_blocks.0.attn1", (16, 10)) == (8, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attention_call_of_fewer_tokens_is_no_layers(name):
    family = family_in(stock_pipeline(name))
    call, joint = DenoiserCall(2, (16, 16), 24), name in ("flux", "sd3")
    for layer in family.preset.layers:
        height, width = family.grid(layer, call.latent)
        pixels, text = height * width, joint or layer.endswith("attn2")
        queries = pixels + 24 if joint else pixels
        keys = pixels * (joint or not text) + 24 * text
        assert family.view(call, layer, queries, keys).grid == (height, width)
        merged = [(queries, keys - 1), (queries // 4, keys), (queries // 4, keys // 4)]
        assert [family.view(call, layer, *sizes) for sizes in merged[: 1 if joint else 3]] == [None] * (
            1 if joint else 3
        )


def test_layers_whose_keys_are_not_what_their_names_say_are_left_out():
    """`attn1` of the x4 upscaler reads text."""
    unet = tiny_components(only_cross_attention=(True, False), mid_block_only_cross_attention=True)["unet"]
    family = family_of(unet)
    assert {layer.partition(".attentions")[0] for layer in family.preset.layers} == {
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
    }
    every = {"only_cross_attention": True, "mid_block_type": None}
    with pytest.raises(ValueError, match="`attn2` beside `attn1`"):
        _ = family_of(tiny_components(**every)["unet"]).preset


def test_an_image_prompts_own_attention_is_no_layer():
    """IP-Adapter Plus brings attention modules outside the blocks."""
    unet = tiny_components()["unet"]
    before = set(family_of(unet).attention_modules)
    unet.encoder_hid_proj = torch.nn.ModuleList([Attention(query_dim=8, heads=1, dim_head=8)])
    assert set(family_of(unet).attention_modules) == before


# ---- unknown denoisers -----------------------------------------------------------------------------------------------
class Unheard(ModelMixin, ConfigMixin):
    """A transformer with cross-attention that no adapter names."""

    @register_to_config
    def __init__(self, layers: int = 7, patch_size: int = 2):
        super().__init__()
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 12}
        self.transformer_blocks = torch.nn.ModuleList(BasicTransformerBlock(dim=16, **sizes) for _ in range(layers))

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        raise NotImplementedError


@pytest.mark.parametrize(("layers", "fine"), [(7, range(2, 4)), (1, range(1)), (12, range(4, 8))])
def test_an_unknown_transformer_gets_a_generic_preset_and_a_warning(layers, fine, caplog):
    _warn_of_generic_preset.cache_clear()
    family = family_of(Unheard(layers))
    preset = family.preset
    assert family_of(Unheard(layers)).preset == preset  # and no second warning
    assert type(family) is Family
    assert preset.text == tuple(f"transformer_blocks.{i}.attn2" for i in range(layers))
    assert preset.self_attention == tuple(f"transformer_blocks.{i}.attn1" for i in range(layers))
    assert preset.reference == f"transformer_blocks.{layers // 2}.attn2"
    assert preset.refine == tuple(f"transformer_blocks.{i}.attn1" for i in fine)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "No preset is known for Unheard" in record.getMessage()


def test_calls_of_an_unknown_transformer():
    family, text = family_of(Unheard()), torch.zeros(2, 5, 12)
    call = family.call((torch.zeros(2, 4, 6, 8), None, text), {})
    assert call == DenoiserCall(2, (6, 8), 5)
    assert family.call((), {"hidden_states": torch.zeros(2, 4, 6, 8), "encoder_hidden_states": text}) == call
    assert family.view(call, "transformer_blocks.0.attn2", 12, 5).text == slice(0, 5)
    assert family.view(call, "transformer_blocks.0.attn1", 12, 12).image == slice(0, 12)
    assert family.view(call, "transformer_blocks.0.attn1", 12, 12).grid == (3, 4)
    with pytest.raises(ValueError, match="image latents of shape b c H W"):  # a video's
        family.call((torch.zeros(2, 4, 3, 6, 8),), {"encoder_hidden_states": text})
    with pytest.raises(ValueError, match="pipeline is known, but got Unheard: load the pipeline, and pass it"):
        named_pipeline(family)


@pytest.mark.parametrize("denoiser", ["DiTTransformer2DModel", "UNet2DModel"])
def test_a_denoiser_without_readable_text_attention_is_refused(denoiser, caplog):
    """Joint attention that no adapter names, and no text at all; a warning beside the refusal would promise too much."""
    with torch.device("meta"):
        family = family_of(getattr(diffusers, denoiser)())
    with pytest.raises(ValueError, match=rf"{denoiser} has none, and no row of facts names it"):
        _ = family.preset
    assert not caplog.records


def test_unknown_denoiser():
    with pytest.raises(ValueError, match="got Sequential: pass the model itself, not a wrapper"):
        family_of(torch.nn.Sequential(tiny_components()["unet"]))
    with pytest.raises(
        ValueError, match="Expected a `unet` or a `transformer` among the components, but got prior, vae"
    ):
        denoiser_of({"vae": None, "prior": None})


def test_a_second_image_in_the_sequence_is_told_apart():
    """As Flux Kontext puts it there, its positions marked by their first column; another length is refused."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ids = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], -1)
    family = family_in(stock_pipeline("flux"))
    text = {"encoder_hidden_states": torch.zeros(1, 7, 32)}
    one = {"hidden_states": torch.zeros(1, 24, 16), "img_ids": ids, **text}
    assert family.call((), one) == DenoiserCall(1, (8, 12), 7)
    ids = torch.cat([ids, ids + torch.tensor([1.0, 0, 0])])
    assert family.call((), {"hidden_states": torch.zeros(1, 48, 16), "img_ids": ids, **text}) == DenoiserCall(
        1, (8, 12), 7, 24
    )
    with pytest.raises(ValueError, match="4 x 6 tokens of one image, but the denoiser got 50"):
        family.call((), {"hidden_states": torch.zeros(1, 50, 16), "img_ids": ids, **text})


# ---- denoisers seen in part ------------------------------------------------------------------------------------------
def test_a_whole_denoiser_passes(pipe):
    check_whole(family_in(pipe))


def test_a_cached_denoiser_is_refused():
    denoiser = stock_pipeline("flux").transformer
    denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"a cache is enabled on it: call `denoiser.disable_cache"):
        check_whole(family_of(denoiser))
    denoiser.disable_cache()
    check_whole(family_of(denoiser))


def test_a_split_denoiser_is_refused():
    """Context parallelism sits in the processors, tensor parallelism in the weights."""
    denoiser = stock_pipeline("flux").transformer
    processor = denoiser.transformer_blocks[1].attn.processor
    assert "_parallel_config" in vars(type(processor))
    processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"this one is split \(context or tensor parallel\)"):
        check_whole(family_of(denoiser))
    processor._parallel_config = None
    check_whole(family_of(denoiser))
    denoiser.proj_out.weight = type("DTensor", (torch.nn.Parameter,), {})(denoiser.proj_out.weight.data)
    with pytest.raises(ValueError, match="this one is split"):
        check_whole(family_of(denoiser))
