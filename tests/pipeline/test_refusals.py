"""Stock pipelines that cannot be served are refused in time, by their true cause, and leave the modules as they were."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState
from PIL import Image

from goca_guidance import GoCAGuidance
from tests.helpers.families import run, stock_pipeline
from tests.helpers.guided import NEUTRAL, PROMPT, assert_clean, guided
from tests.helpers.tiny import tiny_components


SMALL = {"height": 32, "width": 32, "guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "latent"}


def built(kind, **components):
    stock = kind(**tiny_components() | components)
    stock.set_progress_bar_config(disable=True)
    return stock


def seeded():
    return {"generator": torch.Generator().manual_seed(0)}


# ---- attention processors --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "processor", "more"),
    [
        ("StableDiffusionSAGPipeline", "CrossAttnStoreProcessor", {}),
        ("StableDiffusionAttendAndExcitePipeline", "AttendExciteAttnProcessor", {"token_indices": [2, 4]}),
    ],
)
def test_processors_of_another_method_are_named_and_taken_back(name, processor, more):
    stock = built(getattr(diffusers, name))
    before, plain = dict(stock.unet.attn_processors), run(stock_pipeline("sd", unet=stock.unet), "sd").images
    ours, callbacks = guided(stock), []
    with pytest.raises(ValueError, match=processor):
        ours(PROMPT, **SMALL, **more, callback=lambda *step: callbacks.append(step))
    assert not callbacks
    assert stock.unet.attn_processors == before
    other = guided(stock_pipeline("sd", unet=stock.unet))
    assert torch.equal(run(other, "sd", scfg=NEUTRAL).images, plain)
    assert len(run(other, "sd", output_regions=True).regions) == 2
    assert_clean(ours)


def test_processors_are_taken_back_after_any_error():
    pipe = guided(stock_pipeline("sd"))
    before = dict(pipe.unet.attn_processors)

    def changed(*step):
        pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, "sd", callback_on_step_end=changed)
    assert pipe.unet.attn_processors == before


def test_a_batch_of_three_predictions_is_told():
    stock = built(diffusers.StableDiffusionInstructPix2PixPipeline, unet=tiny_components(in_channels=8)["unet"])
    call = {key: value for key, value in SMALL.items() if key not in ("height", "width")}
    with pytest.raises(ValueError, match=r"predictions of 1 images .* got a batch of 3"):
        guided(stock)(PROMPT, image=Image.new("RGB", (32, 32)), **call)


# ---- what was asked for ----------------------------------------------------------------------------------------------
def test_an_output_of_another_kind_keeps_its_fields_and_gets_ours():
    """Images and depth."""
    vae = {**tiny_components()["vae"].config, "in_channels": 6, "out_channels": 6}
    stock = built(
        diffusers.StableDiffusionLDM3DPipeline, vae=diffusers.AutoencoderKL.from_config(vae), image_encoder=None
    )
    ours, call = guided(stock), {**SMALL, "output_type": "np"}
    plain = stock(PROMPT, **call, **seeded())
    asked = {"output_regions": True, "output_negative_maps": True, "negative_prompt": "dog", "scfg": NEUTRAL}
    found = ours(PROMPT, **call, **asked, **seeded())
    assert type(found) is type(plain)
    assert len(found.regions) == len(found["guidance_maps"]) == len(found.negative_maps) == 2
    assert (ours(PROMPT, **call, scfg=NEUTRAL, **seeded()).depth == plain.depth).all()
    as_tuple = ours(PROMPT, **call, **asked, return_dict=False, **seeded())
    assert len(as_tuple) == len(plain.keys()) + (plain.nsfw_content_detected is None) + 3
    assert len(as_tuple[-3]) == 2


def latent_upscaler():
    blocks = {
        "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        "layers_per_block": 2,
        "mid_block_type": None,
        "only_cross_attention": False,
    }
    sizes = {
        "in_channels": 8,
        "out_channels": 5,
        "time_cond_proj_dim": 2 * 64 + 32,
        "block_out_channels": (32, 32, 64, 64),
    }
    kinds = {"act_fn": "gelu", "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier"}
    kernels = {"conv_in_kernel": 1, "conv_out_kernel": 1, "timestep_post_act": "gelu", "norm_num_groups": 4}
    unet = tiny_components(**blocks, **sizes, **kinds, **kernels)["unet"]
    parts = {key: value for key, value in tiny_components().items() if key in ("vae", "text_encoder", "tokenizer")}
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    stock = diffusers.StableDiffusionLatentUpscalePipeline(unet=unet, scheduler=scheduler, **parts)
    stock.set_progress_bar_config(disable=True)
    return stock


def test_the_latent_upscaler_is_no_latent_consistency_model():
    """It takes a condition beside the time too, and mixes two predictions."""
    stock = latent_upscaler()
    ours = guided(stock)
    image = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"image": image, "guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "latent"}
    plain = stock(PROMPT, **call, **seeded()).images
    assert torch.equal(ours(PROMPT, **call, scfg=NEUTRAL, **seeded()).images, plain)
    found = ours(PROMPT, **call, output_regions=True, **seeded())
    assert len(found.regions) == 2
    assert not torch.equal(found.images, plain)


# ---- texts -----------------------------------------------------------------------------------------------------------
class Long(diffusers.StableDiffusionPipeline):
    """Prompts of more tokens than the encoder reads at once: in chunks of 24, as their authors like to order them."""

    together, cut = False, False

    def encode_prompt(self, prompt, device, num_images_per_prompt, do_cfg, negative_prompt=None, **kwargs):
        texts = [prompt, negative_prompt or ""]
        if self.together:
            rows = torch.stack([torch.cat(self.chunks(text)) for text in texts])  # text, chunk
            found = [self.text_encoder(rows[:, i])[0] for i in range(2)]
            positive, negative = torch.cat(found, 1).split(1)
        else:
            positive, negative = (
                torch.cat([self.text_encoder(ids)[0] for ids in self.chunks(text)], 1) for text in texts
            )
        return (positive[:, :40], negative[:, :40]) if self.cut else (positive, negative)

    def chunks(self, text):
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        parts = [ids[:22], ids[22:44]]
        return [torch.tensor([[start, *part, end] + [end] * (22 - len(part))]) for part in parts]


TEXT = "a cat on grass and a red plant and a photo of the sky and a dog on the grass of a bus and a potted plant"
WORDS = ("cat", "grass", "red", "plant", "photo", "sky", "dog", "grass", "bus", "potted", "plant")


@pytest.mark.parametrize("together", [False, True])
def test_chunks_of_a_long_prompt_are_all_regions(together):
    pipe = guided(built(Long))
    type(pipe).together = together
    call = {"negative_prompt": "dog", "output_regions": True, "output_negative_maps": True}
    found = run(pipe, "sd", TEXT, **call)
    assert found.regions[0].labels == ((*WORDS, "<sos>"),)
    assert found.negative_maps[0].labels == (("dog",),)
    assert torch.equal(run(pipe, "sd", TEXT, scfg=NEUTRAL).images, run(pipe, "sd", TEXT, use_scfg=False).images)


def test_chunks_that_are_cut_are_told_by_their_rows():
    """The denoiser gets 40 of the 48 tokens that were read: words behind its end are no regions."""
    pipe = guided(built(Long))
    type(pipe).cut = True
    found = run(pipe, "sd", TEXT, output_regions=True)
    (labels,) = found.regions[0].labels
    whole = [*WORDS, "<sos>"]
    assert set(labels) <= set(whole)
    assert {"cat", "sky"} <= set(labels)
    assert max(found.regions[0].masks.flatten(2).any(-1)[0].nonzero().flatten()) < len(labels)
    found = run(pipe, "sd", TEXT, region_tokens={"cat": [2], "sky": [16]}, output_regions=True)
    assert found.regions[0].labels == (("cat", "sky", "<sos>"),)


class Keeping(diffusers.StableDiffusionPipeline):
    """Embeddings of a prompt are made once."""

    def encode_prompt(self, prompt, device, num_images_per_prompt, do_cfg, negative_prompt=None, **kwargs):
        self.kept = getattr(self, "kept", {})
        for text in (negative_prompt or "", prompt):
            if text not in self.kept:
                self.kept[text] = super().encode_prompt(text, "cpu", 1, False)[0]
        return self.kept[prompt], self.kept[negative_prompt or ""]


def test_kept_embeddings_are_refused_and_the_order_is_told():
    pipe = guided(built(Keeping))
    call = {"output_regions": True, "output_negative_maps": True}
    found = run(pipe, "sd", "a cat", negative_prompt="a dog", **call)
    assert found.regions[0].labels == (("cat", "<sos>"),)
    assert found.negative_maps[0].labels == (("dog",),)
    assert run(pipe, "sd", "a bus", negative_prompt="a dog", output_regions=True).regions[0].labels == (
        ("bus", "<sos>"),
    )
    for prompt, negative in (("a bus", "sky"), ("a bus", "a dog")):
        with pytest.raises(ValueError, match="region_tokens"):
            run(pipe, "sd", prompt, negative_prompt=negative)


# ---- the guider ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{"cap_feats": ("one", "other")}, {"encoder_hidden_states": ("one", "other")}])
def test_a_guider_that_does_not_watch_says_so_in_every_pipeline(fields):
    """Wan, LTX and Z-Image name fields of their state; all combine by `forward`."""
    guider, state = GoCAGuidance(5.0), BlockState(one=torch.ones(1), other=torch.ones(1))
    guider.set_state(0, 2, torch.tensor(1))
    with pytest.raises(RuntimeError, match=r"with guider.watching\(pipe\)"):
        guider.prepare_inputs_from_block_state(state, fields)
    with pytest.raises(RuntimeError, match=r"with guider.watching\(pipe\)"):
        guider.forward(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    guider.disable()
    assert len(guider.prepare_inputs_from_block_state(state, fields)) == 1
    assert guider.forward(torch.ones(1, 4, 2, 2)).pred is not None
