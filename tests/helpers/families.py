"""Tiny stock pipelines of seven families: real classes, random weights, no files; their variants and adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image

from eval.scenes.tokenizers import CHARACTERS, clip_tokenizer, t5_tokenizer
from goca_guidance.denoisers.adapters import denoiser_of
from tests.helpers.tiny import WORDS, tiny_components


MAX_TOKENS = 24
BERT_TOKENS, HUNYUAN_T5_TOKENS = 77, 256  # HunyuanDiTPipeline pads to these whatever its tokenizers say
IMAGE_WIDTH = 16  # of the embedding that an IP-Adapter is shown
SMALL_TEXT = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 37}


def _clip(encoder: type, suffix: str = "", max_length: int = MAX_TOKENS) -> dict:
    """Each of WORDS is one token; any other word is spelled."""
    tokenizer = clip_tokenizer(WORDS, max_length=max_length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        projection_dim=32,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SMALL_TEXT,
    )
    return {f"text_encoder{suffix}": encoder(config), f"tokenizer{suffix}": tokenizer}


def _t5(suffix: str = "", width: int = 32, max_length: int = MAX_TOKENS) -> dict:
    """Each of WORDS is one token; any other word is spelled."""
    tokenizer = t5_tokenizer(WORDS, max_length)
    sizes = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes))
    return {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}


def _bert() -> dict:
    """Each of WORDS is one token; any other word is a character and its ## continuations."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocab), **SMALL_TEXT))
    return {
        "text_encoder": encoder,
        "tokenizer": transformers.BertTokenizer(vocab=vocab, model_max_length=BERT_TOKENS),
    }


def _vae(levels: int = 2, latent_channels: int = 4, **changes) -> diffusers.AutoencoderKL:
    """Shrinks pixels by 2 ** (levels - 1)."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **changes,
    )


def _flow_vae(latent_channels: int) -> diffusers.AutoencoderKL:
    scaling = {"shift_factor": 0.0609, "scaling_factor": 1.5035}
    return _vae(latent_channels=latent_channels, use_quant_conv=False, use_post_quant_conv=False, **scaling)


def _seeded(build: Callable[[], dict]) -> dict:
    """The same weights at every call, in evaluation mode."""
    torch.manual_seed(0)
    parts = build()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return parts


XL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,  # six sizes of 8 and a pooled prompt of 32
}


def _sdxl() -> dict:
    parts = tiny_components(**XL_UNET, cross_attention_dim=64)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    shared = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
    return {**shared, "scheduler": scheduler, **_clip(transformers.CLIPTextModelWithProjection, "_2")}


def _pixart() -> dict:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return {"transformer": transformer, "vae": _vae(), "scheduler": scheduler, **_t5()}


def _flux() -> dict:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # four latent channels in packs of 2x2
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    prompts = _clip(transformers.CLIPTextModel) | _t5("_2")
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **prompts}


def _sd3() -> dict:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,  # the inpainting pipeline takes no other number
        out_channels=16,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    clip = transformers.CLIPTextModelWithProjection
    prompts = _clip(clip) | _clip(clip, "_2") | _t5("_3", width=64)
    return {"transformer": transformer, "vae": _flow_vae(16), "scheduler": scheduler, **prompts}


def _hunyuan() -> dict:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=8,
        hidden_size=24,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=BERT_TOKENS,
        text_len_t5=HUNYUAN_T5_TOKENS,
        activation_fn="gelu-approximate",
    )
    vae = _vae(levels=4)  # the rotary grid is hard-coded to pixels // 8
    prompts = _bert() | _t5("_2", max_length=HUNYUAN_T5_TOKENS)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, **prompts, **safety}


@dataclass(frozen=True)
class Family:
    """A stock pipeline class, fresh components for it, and arguments of a small call with two predictions."""

    stock: type
    components: Callable[[], dict]
    call: dict
    scale: str = "guidance_scale"
    denoiser: str = "transformer"


_SMALL = {"height": 32, "width": 32, "guidance_scale": 5.0}
_TOKENS = {"max_sequence_length": MAX_TOKENS}
_PIXART = _SMALL | _TOKENS | {"use_resolution_binning": False, "clean_caption": False}
_FLUX = _SMALL | _TOKENS | {"guidance_scale": 1.0, "true_cfg_scale": 4.0, "negative_prompt": ""}
_HUNYUAN = _SMALL | {"height": 128, "width": 128, "use_resolution_binning": False}
FAMILIES = {
    "sd": Family(diffusers.StableDiffusionPipeline, tiny_components, _SMALL, denoiser="unet"),
    "sdxl": Family(diffusers.StableDiffusionXLPipeline, partial(_seeded, _sdxl), _SMALL, denoiser="unet"),
    "pixart-alpha": Family(diffusers.PixArtAlphaPipeline, partial(_seeded, _pixart), _PIXART),
    "pixart-sigma": Family(diffusers.PixArtSigmaPipeline, partial(_seeded, _pixart), _PIXART),
    "flux": Family(diffusers.FluxPipeline, partial(_seeded, _flux), _FLUX, scale="true_cfg_scale"),
    "sd3": Family(diffusers.StableDiffusion3Pipeline, partial(_seeded, _sd3), _SMALL | _TOKENS),
    "hunyuan": Family(diffusers.HunyuanDiTPipeline, partial(_seeded, _hunyuan), _HUNYUAN),
}


def _build(pipeline: type, name: str, **changes) -> diffusers.DiffusionPipeline:
    pipe = pipeline(**FAMILIES[name].components() | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_pipeline(name: str, **component_changes) -> diffusers.DiffusionPipeline:
    """The stock pipeline of a family on fresh components, some of them replaced."""
    return _build(FAMILIES[name].stock, name, **component_changes)


def run(pipe, name: str, prompt: str | list[str] = "a cat on grass", seed: int = 0, **kwargs):
    """What the pipeline returns for the family's small call: two steps, latents."""
    torch.manual_seed(seed)  # for the control images that SD3 and HunyuanDiT encode without the generator
    small = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(prompt=prompt, **FAMILIES[name].call | small | kwargs)


def _variant(name: str, kind: str) -> type | None:
    """FluxPipeline -> FluxInpaintPipeline, where diffusers has one."""
    return getattr(diffusers, FAMILIES[name].stock.__name__.replace("Pipeline", f"{kind}Pipeline"), None)


def _picture(name: str) -> Image.Image:
    side = FAMILIES[name].call["height"]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def image_to_image(name: str) -> tuple[diffusers.DiffusionPipeline, dict] | None:
    """The image-to-image pipeline and its further arguments (two of four steps), or None."""
    if (pipeline := _variant(name, "Img2Img")) is None:
        return None
    return _build(pipeline, name), {"image": _picture(name), "strength": 0.5, "num_inference_steps": 4}


def inpaint(name: str) -> tuple[diffusers.DiffusionPipeline, dict] | None:
    """The inpainting pipeline and its further arguments (left half, two of four steps), or None."""
    if (pipeline := _variant(name, "Inpaint")) is None:
        return None
    picture = _picture(name)
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, picture.width // 2, picture.height))
    return _build(pipeline, name), {"image": picture, "mask_image": mask, "strength": 0.5, "num_inference_steps": 4}


def controlnet(name: str) -> tuple[diffusers.DiffusionPipeline, dict] | None:
    """The ControlNet pipeline and its further arguments, or None; the control is heard from the start."""
    if (pipeline := _variant(name, "ControlNet")) is None:
        return None
    control = _control_model(name).eval()
    for parameter in control.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    argument = "image" if FAMILIES[name].denoiser == "unet" else "control_image"
    return _build(pipeline, name, controlnet=control), {argument: _picture(name)}


def _control_model(name: str) -> torch.nn.Module:
    """On a denoiser of its own, for SD3's `from_transformer` edits the config that it is given."""
    denoiser = FAMILIES[name].components()[FAMILIES[name].denoiser]
    if name == "flux":
        heads = {"num_attention_heads": 2, "attention_head_dim": 16}
        return diffusers.FluxControlNetModel.from_transformer(denoiser, num_layers=1, num_single_layers=1, **heads)
    if name == "sd3":
        return diffusers.SD3ControlNetModel.from_transformer(denoiser, num_layers=1, num_extra_conditioning_channels=0)
    if name == "hunyuan":  # whose pooled width cannot be copied
        sizes = {"transformer_num_layers": 4, "load_weights_from_transformer": False}
        return diffusers.HunyuanDiT2DControlNetModel.from_transformer(denoiser, **sizes)
    return diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(8, 16))


def add_lora(pipe) -> None:
    """A loud LoRA on the query, key, value and output projections of the denoiser."""
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    denoiser = denoiser_of(pipe.components)
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config)
    else:
        peft.inject_adapter_in_model(config, denoiser)


def add_ip_adapter(pipe) -> dict:
    """A random IP-Adapter on the denoiser; the call arguments that show it an image."""
    torch.manual_seed(1)
    embeds, denoiser = torch.randn(2, 1, IMAGE_WIDTH), denoiser_of(pipe.components)
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        layers = [module for name, module in denoiser.named_modules() if name.endswith("attn2")]
        denoiser._load_ip_adapter_weights([_ip_adapter({2 * i + 1: layer for i, layer in enumerate(layers)})])
        return {"ip_adapter_image_embeds": [embeds]}
    if isinstance(denoiser, diffusers.FluxTransformer2DModel):
        layers = [block.attn for block in denoiser.transformer_blocks]
        denoiser._load_ip_adapter_weights([_ip_adapter(dict(enumerate(layers)))])
        return {"negative_ip_adapter_image_embeds": [embeds[:1]], "ip_adapter_image_embeds": [embeds[1:]]}
    if isinstance(denoiser, diffusers.SD3Transformer2DModel):
        denoiser._load_ip_adapter_weights(_sd3_ip_adapter(denoiser))
        return {"ip_adapter_image_embeds": embeds}
    raise NotImplementedError(f"Expected a denoiser that takes an IP-Adapter, but got {type(denoiser).__name__}.")


def _ip_adapter(layers: dict[int, torch.nn.Module]) -> dict:
    """Weights under the numbers of the layers; a U-Net leaves the biases."""
    projections = {}
    for number, layer in layers.items():
        for which in ("to_k_ip", "to_v_ip"):
            projections[f"{number}.{which}.weight"] = 0.3 * torch.randn(layer.to_k.weight.shape)
            projections[f"{number}.{which}.bias"] = torch.zeros(layer.to_k.out_features)
    width = layer.to_k.in_features
    image = {"proj.weight": 0.3 * torch.randn(4 * width, IMAGE_WIDTH), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": image, "ip_adapter": projections}


def _sd3_ip_adapter(transformer: diffusers.SD3Transformer2DModel) -> dict:
    width, head = transformer.inner_dim, transformer.config.attention_head_dim
    image = IPAdapterTimeImageProjection(IMAGE_WIDTH, width, hidden_dim=64, heads=1, num_queries=4, timestep_in_dim=16)
    projections = {}
    for number in range(len(transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(width, width, head, timesteps_emb_dim=64)
        projections |= {f"{number}.{key}": weight for key, weight in processor.state_dict().items()}
    return {"image_proj": image.state_dict(), "ip_adapter": projections}
