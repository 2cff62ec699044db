"""What the observer hands over is what the layer computed, the model does not notice, and nothing stays behind."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from goca_guidance.families import family_of
from goca_guidance.observer import AttentionObserver, check_seen
from tests.tiny import hooks_of, tiny_components


@pytest.fixture
def unet():
    return tiny_components()["unet"]


def run(unet, height=16, width=16, batch=2):
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(batch, 4, height, width, generator=g), torch.randn(batch, 24, 32, generator=g)
    with torch.no_grad():
        return unet(sample, 10, encoder_hidden_states=text).sample


def observe(unet, size=(16, 16), **kwargs):
    family, records = family_of(unet), []
    with AttentionObserver(
        family.attention_modules, records.append, lambda p: family.grid(p, size), frozenset(family.attention_modules)
    ):
        output = run(unet, *size, **kwargs)
    return records, output


def test_output_is_bit_equal_and_no_hook_is_left(unet):
    before = run(unet)
    records, output = observe(unet)
    assert torch.equal(before, output)
    assert len(records) == len(family_of(unet).attention_modules)
    assert hooks_of(unet) == 0


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (14, 10)])
def test_recorded_attention_is_the_layers_output(unet, size):
    for r in observe(unet, size)[0]:
        computed = (r.query @ r.key.mT * r.scale).softmax(-1) @ r.value
        assert torch.allclose(computed, r.output, atol=1e-5)
        assert r.grid[0] * r.grid[1] == r.query.shape[2]
        assert r.grid[0] / r.grid[1] == pytest.approx(size[0] / size[1], rel=0.05)


def test_projection_is_what_the_layer_applies(unet):
    modules = family_of(unet).attention_modules
    for r in observe(unet)[0]:
        linear = modules[r.name].to_out[0]
        assert torch.allclose(r.projection, linear.weight.T, atol=1e-6)
        z = r.output.transpose(1, 2).flatten(2)
        assert torch.allclose(z @ r.projection + linear.bias, linear(z), atol=1e-5)


def test_no_hook_is_left_after_an_exception(unet):
    def explode(*_):
        raise KeyError("inside the network")

    handle = unet.mid_block.register_forward_hook(explode)
    with pytest.raises(KeyError):
        observe(unet)
    handle.remove()
    assert hooks_of(unet) == 0
    assert torch.overrides._get_current_function_mode_stack() == []


def test_paused_sees_nothing(unet):
    family, records = family_of(unet), []
    with AttentionObserver(family.attention_modules, records.append, lambda p: (1, p)) as observer:
        observer.paused = True
        run(unet)
    assert records == []
    assert observer.seen == set()


@pytest.mark.parametrize("hide", [lambda u: u.set_attention_slice(1), lambda u: u.set_attn_processor(AttnProcessor())])
def test_hidden_attention_is_noticed(unet, hide):
    hide(unet)
    records, _ = observe(unet)
    assert records == []
    with pytest.raises(RuntimeError, match="disable_attention_slicing"):
        check_seen(family_of(unet).preset.layers, {r.name for r in records})


def test_seen_attention_is_no_error(unet):
    records, _ = observe(unet)
    check_seen(family_of(unet).preset.layers, {r.name for r in records})


def test_branches_are_the_halves_of_the_batch(unet):
    r = observe(unet)[0][0]
    assert torch.equal(torch.cat([r.branch(0).query, r.branch(1).query]), r.query)


def test_fused_projections_are_seen(unet):
    plain = observe(unet)[0]
    unet.fuse_qkv_projections()
    fused, _ = observe(unet)
    assert len(fused) == len(plain)
    assert torch.allclose(fused[0].query, plain[0].query, atol=1e-5)
