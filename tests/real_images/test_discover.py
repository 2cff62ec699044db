"""Segments without names: DiffCut's features are those of a forward done by hand, and nothing is left behind."""

import pytest
import torch
from PIL import Image

from goca_guidance.real_images import discover
from tests.helpers.families import stock_pipeline
from tests.helpers.guided import guided, hooks_of


def test_segments_of_each_image_at_its_size(pipe, image):
    turned = image.transpose(Image.ROTATE_90)
    both = pipe.discover([image, turned], size=32)
    assert [tuple(labels.shape) for labels in both] == [(40, 52), (52, 40)]
    assert all(labels.dtype == torch.int64 and labels.min() == 0 for labels in both)
    assert torch.equal(pipe.discover(turned, size=32)[0], both[1])
    assert hooks_of(pipe.unet) == hooks_of(pipe.text_encoder) == 0


def test_a_low_threshold_cuts_nothing(pipe, image):
    assert not pipe.discover(image, threshold=0.0)[0].any()
    assert len(pipe.discover(image, threshold=2.0)[0].unique()) > 10


@pytest.mark.parametrize(("layer", "side"), [(None, 8), ("up_blocks.1.attentions.0", 16)])
def test_features_are_a_self_attentions_output(pipe, image, monkeypatch, layer, side):
    """The last one's of the encoder, or the named one's, against a forward by hand: encode, add noise, empty prompt."""
    seen, found = [], []
    monkeypatch.setattr(
        discover, "cut", lambda features, *rest: seen.append(features) or torch.zeros(1, 128, 128).long()
    )
    pipe.discover(image, generator=torch.Generator().manual_seed(3), layer=layer)
    module = pipe.unet.get_submodule(f"{layer or 'down_blocks.1.attentions.0'}.transformer_blocks.0.attn1")
    handle = module.register_forward_hook(lambda m, a, output: found.append(output))
    with torch.no_grad():
        latent = pipe.vae.encode(pipe.image_processor.preprocess(image, height=32, width=32)).latent_dist.mode()
        latent = latent * pipe.vae.config.scaling_factor
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        noisy = pipe.scheduler.add_noise(latent, noise, torch.tensor([50]))
        length = pipe.tokenizer.model_max_length
        empty = pipe.tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
        pipe.unet(noisy, 50, pipe.text_encoder(empty.input_ids)[0])
    handle.remove()
    assert torch.allclose(seen[0].flatten(2).mT, found[0], atol=1e-5)
    assert seen[0].shape[-2:] == (side, side)


def test_a_layer_that_is_not_there(pipe, image):
    with pytest.raises(ValueError, match=r"'down_block.1': the nearest are down_blocks.1, "):
        pipe.discover(image, layer="down_block.1")
    assert hooks_of(pipe.unet) == 0


def test_a_transformer_has_no_encoder(image):
    pipe = guided(stock_pipeline("pixart-sigma"))
    with pytest.raises(ValueError, match="defined for U-Nets"):
        pipe.discover(image)
