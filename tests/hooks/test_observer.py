"""What the observer hands over is what the layer computed, the model does not notice, and nothing stays behind."""

import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, AttnProcessor

from goca_guidance.denoisers.adapters import family_of
from goca_guidance.hooks.observer import (
    BACKENDS,
    TORCH_KERNEL,
    Asked,
    AttentionObserver,
    WatchedKernel,
    _Call,
    check_seen,
)
from goca_guidance.method.records import AttentionView
from tests.helpers import families
from tests.helpers.families import FAMILIES, stock_pipeline
from tests.helpers.guided import assert_untouched, guided
from tests.helpers.tiny import tiny_components


@pytest.fixture
def unet():
    return tiny_components()["unet"]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return stock_pipeline(name)


def run(unet, height=16, width=16, batch=2):
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(batch, 4, height, width, generator=g), torch.randn(batch, 24, 32, generator=g)
    with torch.no_grad():
        return unet(sample, 10, encoder_hidden_states=text).sample


@contextmanager
def observed(denoiser):
    """An observer of every layer that may be read, and the records that it hands over."""
    family, calls, records = family_of(denoiser), [], []
    handle = denoiser.register_forward_pre_hook(lambda m, *call: calls.append(family.call(*call)), with_kwargs=True)
    layers = {layer: module for layer, module in family.attention_modules.items() if layer in family.preset.layers}
    raw = frozenset({family.preset.reference}) if family.preset.features == "query" else frozenset()
    view = lambda *tokens: family.view(calls[-1], *tokens)  # noqa: E731
    observer = AttentionObserver(layers, records.append, view, family.project, raw)
    observer.projected = frozenset(layers)
    try:
        with observer:
            yield observer, records
    finally:
        handle.remove()


def observe(unet, size=(16, 16), **kwargs):
    with observed(unet) as (_, records):
        output = run(unet, *size, **kwargs)
    return records, output


def generate(pipe, name):
    """Two steps: all records, the last ones by layer, the denoiser's family, and latents."""
    denoiser = getattr(pipe, FAMILIES[name].denoiser)
    with observed(denoiser) as (_, records):
        latents = families.run(pipe, name).images
    return SimpleNamespace(
        all=records, last={r.name: r for r in records}, family=family_of(denoiser), denoiser=denoiser, latents=latents
    )


# ---- every family ----------------------------------------------------------------------------------------------------
def test_output_is_bit_equal_and_no_hook_is_left(pipe, name):
    before = families.run(pipe, name).images
    seen = generate(pipe, name)
    assert torch.equal(before, seen.latents)
    assert_untouched(seen.denoiser)


def test_every_layer_is_seen(pipe, name):
    """Once each time the denoiser runs, twice a step under true guidance; SD3's second attention has no text: left out."""
    seen = generate(pipe, name)
    names = {n for n in seen.family.attention_modules if not (name == "sd3" and n.endswith("attn2"))}
    assert set(seen.last) == names
    assert len(seen.all) == len(names) * (4 if FAMILIES[name].scale == "true_cfg_scale" else 2)


def test_recorded_attention_is_the_layers_output_in_every_family(pipe, name):
    """Over all keys, words and pixels; and the pixels' output is what the projection reads (last: probing comes before)."""
    denoiser, applied = getattr(pipe, FAMILIES[name].denoiser), {}
    for layer in family_of(denoiser).preset.layers:
        linear, _ = projection_of(denoiser, layer)
        linear.register_forward_pre_hook(lambda m, args, layer=layer: applied.__setitem__(layer, args[0]))
    seen = generate(pipe, name)
    for r in seen.all:
        logits = r.query @ r.key.mT * r.scale
        computed = (logits if r.mask is None else logits + r.mask).softmax(-1) @ r.value
        assert torch.allclose(computed, r.output, atol=1e-5)
        assert r.grid[0] * r.grid[1] == r.query.shape[2]
    for layer, r in seen.last.items():
        z = r.output.transpose(1, 2).flatten(2)
        assert torch.equal(applied[layer][:, -z.shape[1] :, : z.shape[2]], z)


def test_keys_are_words_or_pixels(pipe, name):
    """Their numbers are the text's and the grid's; in joint attention both are there and nothing else is."""
    seen, joint = generate(pipe, name), name in ("flux", "sd3")
    text = {"sd3": 2 * families.MAX_TOKENS, "hunyuan": families.BERT_TOKENS + families.HUNYUAN_T5_TOKENS}
    for r in seen.all:
        words, pixels = (range(r.key.shape[2])[part] for part in (r.view.text, r.view.image))
        assert r.view.joint == joint
        assert sorted([*words, *pixels]) == list(range(r.key.shape[2]))
        if words:
            assert len(words) == text.get(name, families.MAX_TOKENS)
        if pixels:
            assert len(pixels) == r.query.shape[2]
        assert bool(words) == (joint or r.name.endswith("attn2"))


def projection_of(denoiser, layer):
    """The linear layer that a layer applies, and how many of its inputs are attention's."""
    if layer.startswith("single_transformer_blocks"):
        block = denoiser.get_submodule(layer.removesuffix(".attn"))
        return block.proj_out, block.attn.to_q.out_features
    linear = denoiser.get_submodule(layer).to_out[0]
    return linear, linear.in_features


def test_gram_is_that_of_what_the_layer_applies(pipe, name):
    """Of the whole weight of an output projection, of the first columns of a Flux single block's; its largest entry is one."""
    seen = generate(pipe, name)
    for r in seen.last.values():
        linear, width = projection_of(seen.denoiser, r.name)
        gram = linear.weight[:, :width].T @ linear.weight[:, :width]
        assert torch.allclose(r.gram, gram / gram.amax(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux"], indirect=True)
def test_reference_features_are_the_raw_query(pipe, name):
    """What `to_q` gives, before norm and rotary embeddings, where a family has them."""
    denoiser, raw = getattr(pipe, FAMILIES[name].denoiser), []
    reference = family_of(denoiser).preset.reference
    denoiser.get_submodule(reference).to_q.register_forward_hook(lambda m, args, output: raw.append(output))
    record = generate(pipe, name).last[reference]
    features = record.query if record.features is None else record.features
    assert torch.equal(features.transpose(1, 2).flatten(2), raw[-1])
    assert (record.features is not None) == (name in ("hunyuan", "sd3"))
    assert torch.equal(features, record.query) == (name not in ("hunyuan", "sd3"))


def test_no_hook_is_left_after_an_exception_in_any_family(pipe, name):
    """Raised in the middle of an attention layer."""
    denoiser = getattr(pipe, FAMILIES[name].denoiser)

    def explode(*_):
        raise KeyError("inside the network")

    handle = denoiser.get_submodule(family_of(denoiser).preset.reference).to_v.register_forward_hook(explode)
    with pytest.raises(KeyError), observed(denoiser):
        families.run(pipe, name)
    handle.remove()
    assert_untouched(denoiser)


def test_a_kernel_that_is_not_torchs_is_seen(monkeypatch):
    """Flux calls its kernels through a table (flash, sage, xformers); this one never reaches torch's function."""

    def by_hand(query, key, value, **_):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)

    plain = generate(stock_pipeline("flux"), "flux")
    monkeypatch.setitem(BACKENDS, AttentionBackendName.NATIVE, by_hand)
    seen = generate(stock_pipeline("flux"), "flux")
    assert BACKENDS[AttentionBackendName.NATIVE] is by_hand
    assert set(seen.last) == set(plain.last)
    for layer, r in seen.last.items():
        assert torch.allclose(r.query, plain.last[layer].query, atol=1e-4)
        assert torch.allclose(r.output, plain.last[layer].output, atol=1e-4)


# ---- a U-Net ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(16, 16), (8, 16), (14, 10)])
def test_recorded_attention_is_the_layers_output(unet, size):
    for r in observe(unet, size)[0]:
        computed = (r.query @ r.key.mT * r.scale).softmax(-1) @ r.value
        assert torch.allclose(computed, r.output, atol=1e-5)
        assert r.grid[0] * r.grid[1] == r.query.shape[2]
        assert r.grid[0] / r.grid[1] == pytest.approx(size[0] / size[1], rel=0.05)


def test_only_what_is_asked_for_is_projected(unet):
    family = family_of(unet)
    wanted = frozenset(family.preset.text[:1])
    with observed(unet) as (observer, records):
        observer.projected = wanted
        run(unet)
    assert {r.name for r in records if r.gram is not None} == wanted


def idle_observer():
    view = AttentionView((1, 1))
    return AttentionObserver({}, lambda record: None, lambda *_: view, lambda name: lambda x: x)


def watched_call(observer) -> _Call:
    """An attention module that runs, as torch's kernel sees it."""
    call = _Call(None)
    observer.watch(vars(torch.nn.functional), [TORCH_KERNEL], call.kernels)
    return call


def test_watchers_that_overlap_leave_no_chain():
    """Calls of many threads begin and end in any order: the first one to come is the first one to go."""
    torch_kernel, open_calls = torch.nn.functional.scaled_dot_product_attention, []
    for _ in range(50):
        observer = idle_observer()
        open_calls.append(watched_call(observer))
        if len(open_calls) == 3:
            open_calls.pop(0).close()
        length, kernel = 0, torch.nn.functional.scaled_dot_product_attention
        while isinstance(kernel, WatchedKernel):
            length, kernel = length + 1, kernel.kernel
        assert length == len(open_calls)
    for call in open_calls:
        call.close()
    assert torch.nn.functional.scaled_dot_product_attention is torch_kernel


def test_another_thread_may_compile_attention_meanwhile():
    """The compiler meets the wrapper, and looks through it: one graph, without breaks."""
    query = torch.randn(1, 2, 4, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    compiled = torch.compile(
        lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), backend="eager", fullgraph=True
    )
    call = watched_call(idle_observer())
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(compiled(query)))
    thread.start()
    thread.join()
    call.close()
    assert torch.equal(found[0], expected)


def test_no_hook_is_left_after_an_exception(unet):
    def explode(*_):
        raise KeyError("inside the network")

    handle = unet.mid_block.register_forward_hook(explode)
    with pytest.raises(KeyError):
        observe(unet)
    handle.remove()
    assert_untouched(unet)


def test_paused_sees_nothing(unet):
    family, records = family_of(unet), []
    view = lambda name, queries, keys: AttentionView((1, queries))  # noqa: E731
    with AttentionObserver(family.attention_modules, records.append, view, family.project) as observer:
        observer.paused = True
        run(unet)
        assert observer.seen == set()
        observer.paused = False
        run(unet)
        assert observer.seen == {r.name for r in records} == set(family.attention_modules)


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


# ---- attention in parts ----------------------------------------------------------------------------------------------
def joined(part, sizes: dict, dim: int, query, key, value, **kwargs):
    """Attention computed for chunks along a dimension of those tensors that have it, and put together."""
    tensors = {"query": query, "key": key, "value": value}
    chunks = [tensors[n].chunk(2, dim) if n in sizes else [tensors[n]] * 2 for n in tensors]
    return torch.cat([part(q, k, v, **kwargs) for q, k, v in zip(*chunks, strict=True)], dim)


def tiles(part, query, key, value, **kwargs):
    """Self-attention within each quarter of the picture; rows need not be those of a picture here."""
    if query.shape[2] != key.shape[2]:
        return part(query, key, value, **kwargs)
    count = len(query)
    split = [torch.cat(x.chunk(4, 2)) for x in (query, key, value)]
    return torch.cat(part(*split, **kwargs).split(count), 2)


def merged(part, query, key, value, **kwargs):
    """Every two neighbours are one query."""
    return part(query[:, :, ::2], key, value, **kwargs).repeat_interleave(2, 2)


def half_the_keys(part, query, key, value, **kwargs):
    return sum(part(query, k, v, **kwargs) for k, v in zip(key.chunk(2, 2), value.chunk(2, 2), strict=True)) / 2


def folded(part, query, key, value, **kwargs):
    """Heads are images, as in the oldest processors."""
    return part(*(x.flatten(0, 1) for x in (query, key, value)), **kwargs).unflatten(0, query.shape[:2])


PARTS = {
    "heads": lambda part, *args, **kwargs: joined(part, {"query", "key", "value"}, 1, *args, **kwargs),
    "images": lambda part, *args, **kwargs: joined(part, {"query", "key", "value"}, 0, *args, **kwargs),
    "queries": lambda part, *args, **kwargs: joined(part, {"query"}, 2, *args, **kwargs),
    "keys": half_the_keys,
    "tiles": tiles,
    "merged queries": merged,
    "heads as images": folded,
    "two of the same": lambda part, *args, **kwargs: (part(*args, **kwargs) + part(*args, **kwargs)) / 2,
}


class InParts:
    """A processor whose kernel is called for parts."""

    def __init__(self, processor, split):
        self.processor, self.split = processor, split

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        kernel, given = (
            torch.nn.functional.scaled_dot_product_attention,
            {"encoder_hidden_states": encoder_hidden_states},
        )
        torch.nn.functional.scaled_dot_product_attention = partial(self.split, kernel)
        try:
            return self.processor(attn, hidden_states, attention_mask=attention_mask, **given, **kwargs)
        finally:
            torch.nn.functional.scaled_dot_product_attention = kernel


def set_in_parts(denoiser, split):
    for module in family_of(denoiser).attention_modules.values():
        module.processor = InParts(module.processor, split)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_not_taken_for_the_whole(unet, part):
    set_in_parts(unet, PARTS[part])
    records, _ = observe(unet)
    text = {r.name for r in records}
    assert text == ({name for name in family_of(unet).preset.text} if part == "tiles" else set())
    with pytest.raises(RuntimeError, match="all their images, heads and tokens"):
        check_seen(family_of(unet).preset.layers, text)


@pytest.mark.parametrize("part", ["heads", "images", "queries", "keys", "two of the same"])
def test_a_part_of_joint_attention_is_refused(part):
    """Stable Diffusion 3; without regions the pipeline runs as it is."""
    stock = stock_pipeline("sd3")
    set_in_parts(stock.transformer, PARTS[part])
    pipe, expected = guided(stock), families.run(stock, "sd3").images
    with pytest.raises(RuntimeError, match="all their images, heads and tokens"):
        families.run(pipe, "sd3")
    assert torch.equal(families.run(pipe, "sd3", use_scfg=False).images, expected)
    assert_untouched(stock.transformer)


def test_a_kernel_that_puts_its_parts_together_is_read(monkeypatch):
    """Flux's table: what the kernel of the table computes is whole, whatever it calls within."""
    plain, native = generate(stock_pipeline("flux"), "flux"), BACKENDS[AttentionBackendName.NATIVE]

    def by_heads(query, key, value, **kwargs):
        heads = zip(*(x.split(1, 2) for x in (query, key, value)), strict=True)
        return torch.cat([native(q, k, v, **kwargs) for q, k, v in heads], 2)

    monkeypatch.setitem(BACKENDS, AttentionBackendName.NATIVE, by_heads)
    seen = generate(stock_pipeline("flux"), "flux")
    assert set(seen.last) == set(plain.last)
    for layer, r in seen.last.items():
        assert torch.allclose(r.query, plain.last[layer].query, atol=1e-5)
        assert torch.allclose(r.output, plain.last[layer].output, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        lambda whole, x: whole(x[:, ::4]).repeat_interleave(4, 1),  # as many as the next coarser grid has
        lambda whole, x: torch.cat([whole(half) for half in x.chunk(2)]),
    ],
    ids=["merged tokens", "half the images"],
)
def test_a_module_that_is_called_for_a_part_is_refused(part):
    """By the block around it: what the module is given is compared with what the denoiser predicts."""
    stock = stock_pipeline("sd")
    for layer, module in family_of(stock.unet).attention_modules.items():
        if layer.endswith("attn1"):
            call = lambda self, x, **_: part(partial(Attention.__call__, self), x)  # noqa: E731
            module.__class__ = type("Part", (Attention,), {"__call__": call})
    families.run(stock, "sd")
    with pytest.raises(RuntimeError, match="all their images, heads and tokens"):
        families.run(guided(stock), "sd")
    with pytest.raises(RuntimeError, match="all their images, heads and tokens"):
        guided(stock).segment([np.zeros((32, 32, 3), np.uint8)] * 2, ["cat", "grass"])


class Asking:
    """What is asked, of an attention module."""

    heads = 3

    def forward(self, hidden_states, encoder_hidden_states=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("query", "key", "whole"),
    [
        ((2, 3, 16, 5), (2, 3, 16, 5), True),  # the pixels
        ((2, 3, 16, 5), (2, 3, 7, 5), True),  # the text
        ((2, 3, 23, 5), (2, 3, 23, 5), True),  # both
        ((2, 3, 16, 5), (2, 3, 23, 5), True),  # both, asked by the pixels alone
        ((1, 3, 16, 5), (1, 3, 7, 5), False),
        ((2, 1, 16, 5), (2, 1, 7, 5), False),
        ((2, 3, 8, 5), (2, 3, 7, 5), False),
        ((2, 3, 16, 5), (2, 3, 6, 5), False),
        ((2, 3, 16, 5), (2, 1, 7, 5), False),
        ((6, 16, 5), (6, 7, 5), False),
    ],
)
def test_sizes_of_a_part(query, key, whole):
    """Each by itself: of two images, three heads, sixteen tokens, and seven others."""
    module, own, other = Asking(), torch.zeros(2, 16, 15), torch.zeros(2, 7, 9)
    asked = Asked.of(module, (own,), {"encoder_hidden_states": None if key == query == (2, 3, 16, 5) else other})
    assert asked.answered(torch.zeros(query), torch.zeros(key), torch.zeros(query)) == whole
    assert not asked.answered(torch.zeros(query), torch.zeros(key), torch.zeros(query)[:, :, :4])
