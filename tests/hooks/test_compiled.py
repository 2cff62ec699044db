"""A compiled denoiser is guided by graphs of its own, beside the user's; what cannot be traced is guided eagerly."""

import logging

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.hooks import compiled as under_test
from goca_guidance.hooks.guided import GuidedCall
from goca_guidance.hooks.shared import COMPILED
from tests.features.checks import like_denoiser
from tests.helpers.families import FAMILIES, add_lora, run, stock_pipeline
from tests.helpers.guided import NEUTRAL, assert_clean, guided


class Counting:
    """A compiler that runs graphs as they are, and counts them, and their runs.

    `reuse`: further outputs are written to the same memory each time, as CUDA graphs write all.
    """

    def __init__(self, reuse: bool = False):
        self.graphs = self.runs = 0
        self.__name__ = "cudagraphs" if reuse else "counting"  # as torch names a compiler

    def __call__(self, graph, inputs):
        self.graphs += 1
        memory: list[torch.Tensor] = []

        def run(*args):
            self.runs += 1
            found = list(graph(*args))
            if self.__name__ == "counting":
                return found
            if not memory:
                memory.extend(x.clone() for x in found[1:])
            return found[:1] + [place.copy_(x) for place, x in zip(memory, found[1:], strict=True)]

        return run


@pytest.fixture(autouse=True)
def _no_graphs():
    torch.compiler.reset()
    under_test._WARNED.clear()
    yield
    torch.compiler.reset()


def short(name: str):
    """The stock pipeline of a family, with few layers, which take little time to trace."""
    layers = {"num_layers": 1, "num_single_layers": 1} if name == "flux" else {"num_layers": 2}
    return stock_pipeline(name, **like_denoiser(name, **layers))


def compile_denoiser(pipe, name: str, kind: str, backend) -> None:
    denoiser = denoiser_of(pipe.components)
    if kind == "wrapped":
        setattr(pipe, FAMILIES[name].denoiser, torch.compile(denoiser, backend=backend))
    elif kind == "forward":
        denoiser.forward = torch.compile(denoiser.forward, backend=backend)
    elif kind == "in place":
        denoiser.compile(backend=backend)
    else:
        denoiser.compile_repeated_blocks(backend=backend)


def generate(pipe, name: str, prompt: str = "a cat on grass", **kwargs):
    return run(pipe, name, prompt, output_regions=True, **kwargs)


def assert_same(found, expected) -> None:
    """Images, regions and foregrounds, to the bit."""
    assert torch.equal(found.images, expected.images)
    for ours, theirs in zip(found.regions, expected.regions, strict=True):
        assert torch.equal(ours.masks, theirs.masks)
        assert torch.equal(ours.foreground, theirs.foreground)


def kept(pipe) -> list:
    """What the denoiser and its parts keep of compiled calls."""
    return [vars(m).get(name) for m in denoiser_of(pipe.components).modules() for name in COMPILED]


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "runs eagerly while it is guided" in r.getMessage()]


@pytest.fixture
def heard(caplog, monkeypatch):
    """Warnings of ours."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(under_test.logger, "propagate", True)
    return lambda: warnings_of(caplog)


# ---- compiled --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind"),
    [("pixart-sigma", "wrapped"), ("pixart-sigma", "forward"), ("sd3", "in place"), ("sd", "blocks")],
)
def test_guided_calls_run_graphs_of_their_own(name, kind, heard):
    """They are as if eager; the user's graphs are as before; a second call, and another prompt, compile nothing."""
    stock, backend = stock_pipeline(name) if kind == "blocks" else short(name), Counting()
    expected, other = generate(guided(stock), name), generate(guided(stock), name, "a dog and a bus")
    compile_denoiser(stock, name, kind, backend)
    ours = guided(stock)
    plain, before, graphs = run(stock, name).images, kept(ours), backend.graphs
    runs = backend.runs
    assert_same(generate(ours, name), expected)
    assert backend.graphs > graphs
    assert backend.runs == 2 * runs > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(generate(ours, name, "a dog and a bus"), other)
        assert torch.equal(run(ours, name, scfg=NEUTRAL).images, plain)
        assert torch.equal(run(stock, name).images, plain)
    assert kept(ours) == before
    assert_clean(ours)
    assert heard() == []


def test_other_shapes_and_adapters_are_compiled_as_those_of_stock():
    name, backend, sizes = "pixart-sigma", Counting(), ({}, {"width": 48})
    stock, counts = short(name), []
    ours = guided(stock)

    def calls(pipe):
        graphs, found = backend.graphs, [run(pipe, name, **size) for size in sizes]
        return found, backend.graphs - graphs

    expected = [generate(ours, name, **size) for size in sizes]
    compile_denoiser(stock, name, "in place", backend)
    for pipe in (stock, ours):
        found, count = calls(pipe)
        counts.append(count)
    assert counts[0] == counts[1] > 1
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got.images, wanted.images)
    add_lora(stock)
    with torch.compiler.set_stance("force_eager"):
        adapted = generate(ours, name)
    assert_same(generate(ours, name), adapted)
    assert not torch.equal(adapted.images, expected[0].images)


def test_memory_that_graphs_write_again_is_copied():
    """Two predictions a step by one graph, and records of the first one that wait for the second."""
    stock = short("flux")
    expected = generate(guided(stock), "flux")
    compile_denoiser(stock, "flux", "in place", Counting(reuse=True))
    assert_same(generate(guided(stock), "flux"), expected)


def test_an_error_in_the_middle_leaves_nothing(monkeypatch):
    name, backend, expect_error = "pixart-sigma", Counting(), True
    stock = short(name)
    ours = guided(stock)
    expected = generate(ours, name)
    compile_denoiser(stock, name, "in place", backend)
    before, keep = kept(ours), GuidedCall.on_attention

    def fail(self, record):
        if expect_error and record.name.startswith("transformer_blocks.1"):
            raise KeyError("in the middle")
        keep(self, record)

    monkeypatch.setattr(GuidedCall, "on_attention", fail)
    with pytest.raises(KeyError, match="in the middle"):
        generate(ours, name)
    assert kept(ours) == before
    assert_clean(ours)
    expect_error, graphs = False, backend.graphs
    assert_same(generate(ours, name), expected)
    assert backend.graphs == graphs


# ---- eager -----------------------------------------------------------------------------------------------------------
def _graph_break(denoiser, monkeypatch):
    denoiser.transformer_blocks[1].ff.register_forward_hook(lambda *_: torch._dynamo.graph_break())


def _another_forward(denoiser, monkeypatch):
    denoiser.forward = lambda *args, forward=denoiser.forward, **kwargs: forward(*args, **kwargs)


def _unknown_compiler(denoiser, monkeypatch):
    monkeypatch.setattr(under_test.inspect, "getclosurevars", lambda kernel: type("Vars", (), {"nonlocals": {}}))


def _compiled_attention(denoiser, monkeypatch):
    denoiser.transformer_blocks[0].attn1.compile(backend="eager")
    denoiser._compiled_call_impl = None


@pytest.mark.parametrize("change", [_graph_break, _another_forward, _unknown_compiler, _compiled_attention])
def test_what_cannot_be_traced_runs_eagerly(change, monkeypatch, heard):
    """With the same results, one warning, and without trying again."""
    name, backend = "pixart-sigma", Counting()
    stock = short(name)
    ours = guided(stock)
    expected = generate(ours, name)
    compile_denoiser(stock, name, "in place", backend)
    change(denoiser_of(stock.components), monkeypatch)
    assert_same(generate(ours, name), expected)
    assert_same(generate(ours, name), expected)
    assert (backend.runs, len(heard())) == (0, 1)


def test_hidden_attention_is_refused_as_ever(heard):
    stock = stock_pipeline("pixart-sigma")
    denoiser = denoiser_of(stock.components)
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    denoiser.compile(backend=Counting())
    with pytest.raises(RuntimeError, match="disable_attention_slicing"):
        generate(guided(stock), "pixart-sigma")
    assert len(heard()) == 1
