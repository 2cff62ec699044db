"""The three models that are trained here, each from stock component classes: what is built, on which pictures, by which loss.

tiny-unet      UNet2DConditionModel, CLIP                  epsilon prediction
tiny-pixart    PixArtTransformer2DModel, T5                epsilon prediction
tiny-flux      FluxTransformer2DModel, T5 and CLIP         flow matching

All three draw in the latents of one autoencoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from eval.scenes.tokenizers import caption_words, clip_tokenizer, t5_tokenizer


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FACTOR = 4  # pixels to a latent
EMBEDDING_STD = (
    0.5  # token embeddings start loud enough for attention to hear them (the default 0.02 does not localise)
)
CLIP_TOKENS, T5_TOKENS = 32, 64
POOLED = 32  # width of Flux' pooled text
OTHERS = Path(__file__).parents[1] / "scenes" / "models"


# ---- what is learned -------------------------------------------------------------------------------------------------
class Learner(torch.nn.Module, ABC):
    """A denoiser and its text encoders, which learn together, as one forward of a loss.

    `parts` are the pipeline's components without autoencoder and scheduler; `tokens` of a forward are what `tokenized` makes.
    """

    def __init__(self, **parts: torch.nn.Module | PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizers = {name: part for name, part in parts.items() if not isinstance(part, torch.nn.Module)}
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                setattr(self, name, part)

    @property
    def parts(self) -> dict[str, Any]:
        """The components of the pipeline that are learned, and the tokenizers."""
        return {**dict(self.named_children()), **self.tokenizers}

    def tokenized(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids, and masks, of captions [N L]."""
        tokens = {}
        for name, tokenizer in self.tokenizers.items():
            found = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
            tokens |= {f"{name}_ids": found.input_ids, f"{name}_mask": found.attention_mask}
        return tokens

    def begin(self, parts: Mapping[str, Any]) -> None:
        """Take the weights of a pipeline's components."""
        for name, part in self.named_children():
            part.load_state_dict(parts[name].state_dict())

    @abstractmethod
    def forward(self, latents: Tensor, noise: Tensor, draw: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Squared error [b] of the prediction: latents and noise [b c h w], the time's `draw` [b] uniform in [0, 1)."""


class _Epsilon(Learner):
    """Noise is predicted, at one of the schedule's thousand timesteps."""

    noiser = DDPMScheduler(**SCHEDULE)

    def forward(self, latents, noise, draw, tokens):
        times = (draw * 1000).long()
        noisy = self.noiser.add_noise(latents, noise, times)
        return (self.predicted(noisy, times, tokens).float() - noise).square().mean((1, 2, 3))


class StableDiffusion(_Epsilon):
    """Cross- and self-attention at 16 x 16, 8 x 8 and 4 x 4 of 64 pixels, four heads; one CLIP layer of width 64."""

    def __init__(self):
        tokenizer = clip_tokenizer(caption_words(), CLIP_TOKENS)
        unet = UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(64, 128, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        super().__init__(unet=unet, text_encoder=clip(tokenizer, 64), tokenizer=tokenizer)

    def predicted(self, noisy, times, tokens):
        """The noise in latents."""
        return self.unet(noisy, times, self.text_encoder(tokens["tokenizer_ids"])[0]).sample


class PixArt(_Epsilon):
    """Eight blocks of width 160, five heads, a token a latent; one T5 layer of width 64, whose padding is masked."""

    def __init__(self):
        tokenizer = t5_tokenizer(caption_words(), T5_TOKENS)
        transformer = PixArtTransformer2DModel(
            sample_size=16,
            patch_size=1,
            num_layers=8,
            num_attention_heads=5,
            attention_head_dim=32,
            cross_attention_dim=160,
            caption_channels=64,
            in_channels=4,
            out_channels=4,
            use_additional_conditions=False,
        )
        super().__init__(transformer=transformer, text_encoder=t5(tokenizer), tokenizer=tokenizer)

    def predicted(self, noisy, times, tokens):
        """The noise in latents."""
        ids, mask = tokens["tokenizer_ids"], tokens["tokenizer_mask"]
        return self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(ids, attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


class Flux(Learner):
    """Three double and six single blocks of width 160, five heads, a token for 2 x 2 latents; one T5 layer of width 64, whose
    padding is seen.

    The pooled text of its CLIP layer is mute, all zeros: where it learned along, it alone told the blocks which objects to
    draw, and no pixel had to look at a word.
    """

    def __init__(self):
        tokenizers = clip_tokenizer(caption_words(), CLIP_TOKENS), t5_tokenizer(caption_words(), T5_TOKENS)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=64,
            pooled_projection_dim=POOLED,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        super().__init__(
            transformer=transformer,
            text_encoder=_mute(clip(tokenizers[0], POOLED)),
            text_encoder_2=t5(tokenizers[1]),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
        )

    def begin(self, parts):
        """Of weights whose pooled text spoke, it is mute from now on."""
        super().begin(parts)
        _mute(self.text_encoder)

    def forward(self, latents, noise, draw, tokens):
        """The time's logit is 1.2 times a normal."""
        sigma = torch.sigmoid(1.2 * torch.special.ndtri(draw.clamp(1e-6, 1 - 1e-6)))
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        packed, target = (FluxPipeline._pack_latents(each, *each.shape) for each in (mixed, noise - latents))
        text = self.text_encoder_2(tokens["tokenizer_2_ids"])[0]
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        along = partial(torch.arange, device=latents.device, dtype=latents.dtype)
        predicted = self.transformer(
            packed,
            encoder_hidden_states=text,
            pooled_projections=self.text_encoder(tokens["tokenizer_ids"]).pooler_output,
            timestep=sigma,
            img_ids=torch.cartesian_prod(along(1), along(rows), along(columns)),
            txt_ids=text.new_zeros(text.shape[1], 3, dtype=latents.dtype),
        ).sample
        return (predicted.float() - target).square().mean((1, 2))


# ---- text encoders and the autoencoder -------------------------------------------------------------------------------
def clip(tokenizer: PreTrainedTokenizerBase, width: int) -> CLIPTextModel:
    """One CLIP layer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _loud(CLIPTextModel(config))


def t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """One T5 layer of width 64."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_heads=4,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return _loud(T5EncoderModel(config))


def _mute(encoder: CLIPTextModel) -> CLIPTextModel:
    """The encoder, whose output is zero and stays so: its last norm is."""
    encoder.requires_grad_(False)
    for weight in encoder.final_layer_norm.parameters():
        weight.zero_()
    return encoder


def _loud(encoder):
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=EMBEDDING_STD)
    return encoder


def autoencoder() -> AutoencoderKL:
    """Convolutional, factor 4, four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        shift_factor=0.0,
    )


# ---- the models ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spec:
    """A model and its training.

    Args:
        learner: makes the networks.
        pipeline: the class that loads them.
        scheduler: makes the scheduler that comes with them.
        sizes: sides of the training pictures in pixels, taken in turns; the first is the model's home.
        steps, batch: optimiser steps, and pictures in one; at twice the home's side, a quarter of them.
        place: the folder of the finished model.
        asked: arguments of the pipeline at home.
    """

    learner: Callable[[], Learner]
    pipeline: type[DiffusionPipeline]
    scheduler: Callable[[], Any]
    sizes: tuple[int, ...]
    steps: int
    batch: int
    place: Path
    asked: Mapping[str, Any]


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


SPECS = {
    "tiny-unet": Spec(
        StableDiffusion, StableDiffusionPipeline, _ddim, (64, 128), 4100, 128, OTHERS / "tiny-unet", {"guidance_scale": 5.0}
    ),
    "tiny-pixart": Spec(
        PixArt, PixArtSigmaPipeline, _ddim, (64, 128), 11200, 128, OTHERS / "tiny-pixart",
        {"guidance_scale": 5.0, "height": 64, "width": 64, "max_sequence_length": T5_TOKENS, "use_resolution_binning": False},
    ),
    "tiny-flux": Spec(
        Flux, FluxPipeline, FlowMatchEulerDiscreteScheduler, (128,), 11000, 96, OTHERS / "tiny-flux",
        {
            "guidance_scale": 1.0, "true_cfg_scale": 5.0, "negative_prompt": "", "height": 128, "width": 128,
            "max_sequence_length": T5_TOKENS,
        },
    ),
}  # fmt: skip
