"""Rows of the table of features that change the models: adapters, precision, memory, compilation, attention, shards."""

from contextlib import contextmanager
from unittest.mock import patch

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, HunyuanAttnProcessor2_0

from goca_guidance import GoCAConfig
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from goca_guidance.hooks import compiled as compiled_calls
from tests.features.checks import (
    ABSENT,
    WORKS,
    check,
    feature,
    like_denoiser,
    refused,
    refused_by_diffusers,
    works,
)
from tests.helpers.families import FAMILIES, add_ip_adapter, add_lora, run, stock_pipeline
from tests.helpers.guided import guided


CPU = torch.device("cpu")


# ---- adapters --------------------------------------------------------------------------------------------------------
@feature("LoRA (peft)")
def lora(name):
    """Heads are weighed by the adapted output projection."""
    found = check(name, add_lora, ours={"goca": GoCAConfig(heads="contribution")})
    modules = dict(denoiser_of(found.pipe.components).named_modules())
    adapted = {key: modules[f"{key}.to_out.0"] for key in found.grams if f"{key}.to_out.0" in modules}
    assert adapted
    for key, layer in adapted.items():
        change = layer.get_delta_weight("default")
        assert change.norm() > 0.1 * layer.weight.norm()
        gram = (layer.weight + change).mT @ (layer.weight + change)
        assert torch.allclose(found.grams[key], gram / gram.amax(), atol=1e-5)
    return WORKS


@feature("IP-Adapter")
def ip_adapter(name):
    if not hasattr(stock_pipeline(name), "load_ip_adapter"):
        return ABSENT
    return works(name, add_ip_adapter, alone=False)


@feature("Fused QKV projections")
def fused_projections(name):
    if name != "sd3":
        return _fused(name, stock_pipeline(name))
    small, large = ({"dual_attention_layers": (), "qk_norm": norm} for norm in (None, "rms_norm"))  # 3.0, 3.5 large
    _fused(name, stock_pipeline(name, **like_denoiser(name, **small)))
    _fused(name, stock_pipeline(name, **like_denoiser(name, **large)), faithful=False)
    stock, reason = stock_pipeline(name), "crashes with 3.5 medium, forgets the norms of 3.5 large; 3.0 works"
    denoiser_of(stock.components).fuse_qkv_projections()
    return refused_by_diffusers("'ndim'", reason, lambda: run(stock, name))


def _fused(name, stock, faithful=True):
    """`faithful`: whether stock computes the same as without."""
    before = run(stock, name).images
    denoiser_of(stock.components).fuse_qkv_projections()
    found = check(name, stock=stock, visible=False)
    assert any(getattr(layer, "fused_projections", False) for layer in denoiser_of(stock.components).modules())
    assert torch.allclose(found.expected, before, atol=1e-4) == faithful
    return WORKS


# ---- precision and memory --------------------------------------------------------------------------------------------
def _half(name, dtype):
    found = check(name, lambda pipe: pipe.to(dtype) and None)
    assert found.guided.images.dtype == dtype
    return WORKS


@feature("bfloat16")
def bfloat16(name):
    return _half(name, torch.bfloat16)


@feature("float16")
def float16(name):
    return _half(name, torch.float16)


@feature("Autocast")
def autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        return works(name)


@feature("fp8 weights (layerwise casting)")
def fp8(name):
    storage = torch.float8_e4m3fn
    found = check(name, lambda pipe: denoiser_of(pipe.components).enable_layerwise_casting(storage, torch.float32))
    assert storage in {parameter.dtype for parameter in denoiser_of(found.pipe.components).parameters()}
    return WORKS


@feature("Model offload")
def model_offload(name):
    """With the CPU in place of an accelerator."""
    found = check(name, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), again=True, visible=False)
    assert len(found.pipe._all_hooks) > 2
    return WORKS


@feature("Sequential offload")
def sequential_offload(name):
    """With the CPU in place of an accelerator."""
    stock = stock_pipeline(name)
    accelerate.cpu_offload(denoiser_of(stock.components), CPU)
    assert all(parameter.is_meta for parameter in denoiser_of(stock.components).parameters())
    if name == "hunyuan":
        reason = "its attention pool reads weights that are elsewhere"
        return refused_by_diffusers("device meta", reason, lambda: run(stock, name))
    return works(name, stock=stock, visible=False)


@feature("Group offload")
def group_offload(name):
    """With the CPU in place of an accelerator."""
    stock = stock_pipeline(name)
    places = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
    if not denoiser_of(stock.components)._supports_group_offloading:
        switch = denoiser_of(stock.components).enable_group_offload
        return refused_by_diffusers("does not support", "the denoiser does not support it", lambda: switch(**places))
    denoiser_of(stock.components).enable_group_offload(**places)
    return works(name, stock=stock, visible=False)


# ---- compilation -----------------------------------------------------------------------------------------------------
@contextmanager
def _counting_backend():
    """Runs graphs as they are, and lists the runs."""
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(len(args)) or graph(*args)

    torch.compiler.reset()
    try:
        yield backend, runs
    finally:
        torch.compiler.reset()


FEW_LAYERS = {  # what is traced in less time
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (16,),
    },
    "sdxl": {"transformer_layers_per_block": (1, 1)},
    "flux": {"num_layers": 1, "num_single_layers": 1},
    **{key: {"num_layers": 2} for key in ("pixart-alpha", "pixart-sigma", "sd3")},
}


def _compiled(name, change):
    """Stock runs its graphs, warm when ours comes, which runs some of its own: stock's would ignore the hooks."""
    with _counting_backend() as (backend, runs):
        stock = stock_pipeline(name, **like_denoiser(name, **FEW_LAYERS.get(name, {})))
        change(stock, backend)
        run(stock, name)
        assert runs
        with patch.object(compiled_calls, "TENSORS", (*compiled_calls.TENSORS, "value")):  # for the check alone
            found = check(name, stock=stock, visible=False, alone=None)
        for kwargs in ({}, {"use_scfg": False}):
            count = len(runs)
            run(found.pipe, name, **kwargs)
            assert len(runs) > count
    return WORKS


@feature("`torch.compile` of the denoiser")
def compiled(name):
    def change(pipe, backend):
        setattr(pipe, FAMILIES[name].denoiser, torch.compile(denoiser_of(pipe.components), backend=backend))

    return _compiled(name, change)


@feature("Compiled blocks (`compile_repeated_blocks`)")
def compiled_blocks(name):
    denoiser = denoiser_of(stock_pipeline(name).components)
    if not denoiser._repeated_blocks:
        reason = "the denoiser names no repeated blocks"
        return refused_by_diffusers("`_repeated_blocks` attribute is empty", reason, denoiser.compile_repeated_blocks)
    return _compiled(name, lambda pipe, backend: denoiser_of(pipe.components).compile_repeated_blocks(backend=backend))


# ---- attention -------------------------------------------------------------------------------------------------------
@contextmanager
def _backends_restored():
    """The table of kernels and the active one, which diffusers leaves set."""
    table, active = _AttentionBackendRegistry, _AttentionBackendRegistry._active_backend
    with patch.dict(table._backends), patch.dict(table._constraints), patch.dict(table._supported_arg_names):
        try:
            yield
        finally:
            table.set_active_backend(active)


def _dispatching(denoiser):
    """Processors that take their kernel from the table."""
    layers = family_of(denoiser).attention_modules.values()
    return [layer.processor for layer in layers if hasattr(layer.processor, "_attention_backend")]


@feature("Attention backend of torch")
def attention_backend(name):
    stock = stock_pipeline(name)
    if not _dispatching(denoiser_of(stock.components)):
        return ABSENT
    with _backends_restored():
        denoiser_of(stock.components).set_attention_backend("_native_math")
        return works(name, stock=stock, visible=False)


@feature("Attention backend of another library (flash, sage)")
def other_kernel(name):
    """A kernel of our own in its place, which no torch function shows."""
    stock, calls = stock_pipeline(name), []
    if not _dispatching(denoiser_of(stock.components)):
        return ABSENT

    def kernel(query, key, value, scale=None, _parallel_config=None):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        calls.append(query.shape)
        return ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value).transpose(1, 2)

    with _backends_restored():
        _AttentionBackendRegistry.register(AttentionBackendName.SAGE)(kernel)
        for processor in _dispatching(denoiser_of(stock.components)):
            processor._attention_backend = AttentionBackendName.SAGE
        works(name, stock=stock, visible=False)
    assert calls
    return WORKS


@feature("Attention slicing")
def attention_slicing(name):
    if not hasattr(denoiser_of(stock_pipeline(name).components), "set_attention_slice"):
        return ABSENT
    change, fix = (lambda pipe: pipe.enable_attention_slicing(1)), (lambda pipe: pipe.disable_attention_slicing())
    reason = "attention is hidden; `disable_attention_slicing()`"
    return refused(name, "disable_attention_slicing", reason, change, fix=fix)


@feature("Legacy attention processors")
def legacy_processors(name):
    def change(pipe):
        denoiser_of(pipe.components).set_attn_processor(AttnProcessor())

    def fix(pipe):
        denoiser_of(pipe.components).set_attn_processor(
            HunyuanAttnProcessor2_0() if name == "hunyuan" else AttnProcessor2_0()
        )

    if name in ("flux", "sd3"):
        stock = stock_pipeline(name)
        change(stock)
        return refused_by_diffusers("spatial_norm|size of tensor", "not for joint attention", lambda: run(stock, name))
    reason = "attention is hidden; set the processors that the model was loaded with"
    return refused(name, "set_attn_processor", reason, change, fix=fix)


@feature("Block caches")
def block_cache(name):
    denoiser = denoiser_of(stock_pipeline(name).components)
    if not hasattr(denoiser, "enable_cache"):
        return ABSENT

    def change(pipe):
        denoiser_of(pipe.components).enable_cache(FirstBlockCacheConfig(threshold=10.0))

    def fix(pipe):
        denoiser_of(pipe.components).disable_cache()

    return refused(name, "disable_cache", "blocks are skipped; `disable_cache()`", change, fix=fix)


@feature("Context or tensor parallel denoiser")
def shards(name):
    """Marked as diffusers marks them, for real ones need several devices."""
    denoiser = denoiser_of(stock_pipeline(name).components)
    if getattr(denoiser, "_cp_plan", None) is None and getattr(denoiser, "_tp_plan", None) is None:
        return ABSENT
    context, tensor = guided(stock_pipeline(name)), guided(stock_pipeline(name))
    next(iter(_dispatching(denoiser_of(context.components))))._parallel_config = object()
    shard = type("DTensor", (torch.nn.Parameter,), {})(torch.zeros(1))
    denoiser_of(tensor.components).register_parameter("shard", shard)
    for pipe in (context, tensor):
        with pytest.raises(ValueError, match=r"(?s)one process for each image.*use_scfg=False"):
            run(pipe, name)
    return "refused: each device sees a part; one process for each image"
