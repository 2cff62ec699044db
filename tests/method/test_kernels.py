"""Fused kernels give what the forms in PyTorch give, in Triton's interpreter; what they do not know is left to PyTorch."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from goca_guidance.config import GoCAConfig
from goca_guidance.method import aggregation, attention, goca, kernels
from goca_guidance.method.maps import pull_affinity, row_mass
from goca_guidance.method.records import AttentionRecord, AttentionView
from tests.helpers.attention import same, step
from tests.helpers.interpreted import interpreted, switched


pytest.importorskip("triton", reason="Triton is not installed: it has no wheels for this platform")


@pytest.fixture
def in_interpreter() -> Iterator[None]:
    with interpreted():
        yield


def layer(keys=None, grid=(7, 9), d=40, dtype=torch.float32, mask=None, heads=3, side_by_side=True) -> AttentionRecord:
    """Of two images. `keys`: so many of text; so many before and behind the pixels (joint); or None, of pixels alone."""
    g, pixels = torch.Generator().manual_seed(0), grid[0] * grid[1]
    if isinstance(keys, int):
        view, count = AttentionView(grid, text=slice(0, keys)), keys
    else:
        before, behind = keys or (0, 0)
        text = slice(0, before) if before else slice(pixels, pixels + behind)
        view, count = AttentionView(grid, text, slice(before, before + pixels)), pixels + before + behind
    made = [torch.randn(2, n, heads, d, generator=g).to(dtype).transpose(1, 2) for n in (pixels, count, pixels)]
    query, key, output = made if side_by_side else [x.contiguous() for x in made]
    w = torch.randn(heads * d, 50, generator=g)
    gram = (w @ w.mT / (w @ w.mT).amax()).to(dtype)
    added = None if mask is None else MASKS[mask](pixels, count, heads, g).to(dtype)
    return AttentionRecord("layer", query, key, None, output, d**-0.5, view, added, gram)


MASKS = {
    "by key": lambda p, n, h, g: torch.rand(2, 1, 1, n, generator=g).lt(0.3) * -1e4,
    "by key of all images, infinite": lambda p, n, h, g: torch.zeros(1, 1, 1, n).masked_fill(
        torch.rand(n, generator=g) < 0.3, -torch.inf
    ),
    "by head": lambda p, n, h, g: torch.randn(1, h, 1, n, generator=g),
    "by row": lambda p, n, h, g: torch.randn(2, 1, p, n, generator=g),
    "of all": lambda p, n, h, g: torch.randn(2, h, p, n, generator=g),
}


def close(found, wanted):
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


BFLOAT, HALF = torch.bfloat16, torch.float16
LAYERS = [
    {}, {"d": 72, "side_by_side": False}, {"d": 160, "dtype": BFLOAT}, {"d": 8, "mask": "by key of all images, infinite"},
    {"keys": (6, 0), "d": 64, "dtype": HALF, "mask": "by head"}, {"keys": (0, 77), "mask": "by key", "d": 128},
    {"mask": "by row", "d": 80}, {"grid": (5, 3), "heads": 1, "mask": "of all", "dtype": BFLOAT},
]  # fmt: skip


REFERENCES = [((7, 9), False), ((3, 4), True), ((9, 10), True)]  # in turn: a layer's cases are slow to interpret
CASES = [(case, *REFERENCES[turn % len(REFERENCES)]) for turn, case in enumerate(LAYERS)]


@pytest.mark.parametrize(("case", "reference", "normalised"), CASES, ids=str)
def test_agreement_and_sum(in_interpreter, case, reference, normalised):
    """Rows that the reference's grid reads, alone and among all; a reference at the layer's grid, coarser and finer."""
    r = layer(**case)
    assert kernels.usable(r)
    grid, count = r.view.grid, r.query.shape[2]
    mean = torch.cat([p[..., r.view.image].mean(1) for _, p in attention.probabilities(r)], 1)
    affinity = torch.randn(2, *[reference[0] * reference[1]] * 2, generator=torch.Generator().manual_seed(1)).softmax(
        -1
    )
    rows, pulled = pull_affinity(affinity, reference, grid, grid)
    mass = row_mass(reference, grid, None) if normalised else None
    wanted = goca.agreement(mean[:, rows], pulled, mass)
    close(kernels.pixels(r, kernels.log_sum_exp(r, rows), rows, None, pulled.contiguous(), mass), wanted)
    lse = kernels.log_sum_exp(r)
    slots = torch.full((count,), -1).scatter_(0, rows, torch.arange(len(rows)))
    total = torch.full((2, count, count), torch.nan)
    close(kernels.pixels(r, lse, None, slots, pulled.contiguous(), mass, total, add=False), wanted)
    close(total, mean)
    assert kernels.pixels(r, lse, total=total) is None
    close(total, 2 * mean)


def test_several_tiles(in_interpreter):
    """More rows and keys than a tile has, in joint attention; words with the sum over all the text beside them."""
    r = layer((70, 0), grid=(9, 15), heads=2)
    probs = torch.cat([p for _, p in attention.probabilities(r)], 2)
    lse, total = kernels.log_sum_exp(r), torch.zeros(2, 135, 135)
    close(lse, (r.query @ r.key.mT * r.scale).logsumexp(-1))
    kernels.pixels(r, lse, total=total)
    close(total, probs[..., r.view.image].mean(1))
    text = probs[..., r.view.text].mean(1)
    close(kernels.words(r, None), text)
    columns = torch.tensor([[3, 69], [0, 5]])
    for known in (lse, None):
        words, total = kernels.words(r, columns, lse=known, total=True).tensor_split([2], -1)
        close(words, text.take_along_dim(columns[:, None], 2))
        close(total, text.sum(-1, keepdim=True))


TEXTS = [
    {"keys": 77}, {"keys": 150, "d": 72, "mask": "by key", "dtype": BFLOAT}, {"keys": (9, 0), "d": 64},
    {"keys": (0, 9), "d": 160, "dtype": HALF, "mask": "by row"}, {"keys": 20, "d": 256, "grid": (3, 3), "dtype": BFLOAT},
]  # fmt: skip


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_words(in_interpreter, case):
    """Heads' mean, given weights, and shares found on the way; with and without a log-sum-exp; of some columns and all."""
    r = layer(**case)
    columns = torch.tensor([[1, 4, 4], [0, 8, 2]])
    weights, zww = goca.head_weights(r.output, [r.gram]), r.output.transpose(1, 2).flatten(2) @ r.gram
    every = torch.arange(r.view.text.stop - r.view.text.start).repeat(2, 1)
    for lse in (kernels.log_sum_exp(r), None):
        close(kernels.words(r, columns, lse=lse), attention.token_maps(r, columns, None))
        for given in ({"weights": weights}, {"zww": zww}):
            close(kernels.words(r, columns, **given, lse=lse), attention.token_maps(r, columns, weights))
    close(kernels.words(r, None, zww=zww), attention.token_maps(r, every, weights))


def test_a_layer_that_writes_nothing_has_uniform_heads(in_interpreter):
    r = layer(20)
    columns = torch.tensor([[1], [2]])
    close(kernels.words(r, columns, zww=torch.zeros(2, 63, 120)), attention.token_maps(r, columns, None))


# ---- in the aggregation of layers ------------------------------------------------------------------------------------
def answers(name, dtype=torch.float32, **options):
    """Layer weights, scores and regions of a step of a family's tiny model."""
    reader = step(name, dtype).ours(GoCAConfig(**options))
    return reader.weights(), reader.scores(), reader.regions((32, 32))


def assert_alike(found, wanted):
    assert torch.allclose(found[0], wanted[0], rtol=0, atol=1e-4)
    assert torch.allclose(found[1], wanted[1], rtol=0, atol=1e-4)
    assert same(found[2], wanted[2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd", {}),
        ("sd", {"dtype": BFLOAT}),
        ("flux", {"rescale": False, "dtype": HALF}),
        ("flux", {"heads": "contribution", "agreement_rows": 20}),
    ],
    ids=str,
)
def test_layers_by_kernels_are_those_by_pytorch(name, options, monkeypatch):
    """Cross- and joint attention, all reductions by kernels: weights, scores and regions."""
    wanted, launched, launch = answers(name, **options), [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda plan, *rest: launched.append(plan.kernel) or launch(plan, *rest))
    with interpreted():
        monkeypatch.setattr(aggregation, "over_heads", None)  # not called
        found = answers(name, **options)
    assert set(launched) == {"log_sum_exp", "pixels", "words"}
    assert_alike(found, wanted)


def test_a_known_log_sum_exp_is_not_found_again(monkeypatch):
    """In a comparison of fewer rows, normalised, with the heads' mean."""
    launched, launch = [], kernels.launch
    config = GoCAConfig(heads="uniform", agreement_rows=20, row_normalise=True)
    known = replace(step("sd"), calls=[[replace(r, lse=lse_of(r)) for r in call] for call in step("sd").calls])
    wanted = step("sd").ours(config).scores()
    monkeypatch.setattr(kernels, "launch", lambda plan, *rest: launched.append(plan.kernel) or launch(plan, *rest))
    with interpreted():
        assert torch.allclose(known.ours(config).scores(), wanted, rtol=0, atol=1e-4)
    assert set(launched) == {"pixels", "words"}


def lse_of(record):
    logits = record.query @ record.key.mT * record.scale
    return (logits if record.mask is None else logits + record.mask).logsumexp(-1)


def test_a_kernel_that_cannot_be_launched_leaves_the_rest_to_pytorch(monkeypatch):
    """Whatever was computed before."""
    failing, wanted = Kernel(), answers("sd")
    failing.failing = True
    with interpreted():
        monkeypatch.setattr(kernels._code(), "pixels", failing)
        with pytest.warns(RuntimeWarning, match="no compiler was found"):
            assert_alike(answers("sd"), wanted)
        assert len(failing.launched) == 1


# ---- what they leave to PyTorch --------------------------------------------------------------------------------------
UNKNOWN = {
    "are torch.float32 and keys torch.bfloat16": lambda r: replace(r, key=r.key.bfloat16()),
    "are torch.float64": lambda r: replace(r, query=r.query.double(), key=r.key.double()),
    "264 wide, more than 256": lambda r: layer(d=264, grid=(1, 1), dtype=HALF),
    "136 wide, more than 128 in torch.float32": lambda r: layer(d=136, grid=(1, 1)),
    "a mask is torch.float64": lambda r: replace(r, mask=torch.ones(1, 1, 1, 63).double()),
    "a mask is torch.float32 of (63, 63)": lambda r: replace(r, mask=torch.zeros(63, 63)),
    "a mask is torch.float32 of (2, 1, 1, 1)": lambda r: replace(r, mask=torch.zeros(2, 1, 1, 1)),
    "gradients are wanted": lambda r: replace(r, query=r.query.requires_grad_()),
}


@pytest.mark.parametrize(("reason", "change"), UNKNOWN.items(), ids=list(UNKNOWN))
def test_what_no_kernel_knows_is_told_once_on_a_gpu(reason, change, monkeypatch):
    monkeypatch.setattr(kernels, "hindrance", lambda device: None)
    record = change(layer())
    with switched("1"), FakeTensorMode(allow_non_fake_inputs=True):
        assert not kernels.usable(record)  # on a CPU nothing is lost
        record = replace(
            record, **{name: on_gpu(getattr(record, name)) for name in ("query", "key", "output", "mask")}
        )
        with pytest.warns(RuntimeWarning, match=f"takes longer: .*{re.escape(reason)}"):
            assert not kernels.usable(record)
        assert not kernels.usable(record)  # a second warning were an error


def on_gpu(x):
    """A tensor alike on a fake GPU."""
    return None if x is None else torch.empty_like(x, device="cuda", requires_grad=x.requires_grad)


def test_gradients_that_nobody_wants_are_no_hindrance(in_interpreter):
    r = layer()
    with torch.no_grad():
        assert kernels.usable(replace(r, query=r.query.requires_grad_()))


@pytest.mark.parametrize("value", ["0", None])
def test_off_unless_turned_on(value):
    with interpreted(), switched(value):
        assert not kernels.usable(layer())


def test_the_switch_is_read(monkeypatch):
    with switched("yes"), pytest.raises(ValueError, match="GOCA_TRITON to be 0 or 1, but got 'yes'"):
        kernels.usable(layer())


def test_devices_that_have_none(monkeypatch):
    """Without an interpreter: a CPU, an old card, ROCm; and no Triton at all."""
    compiled = SimpleNamespace(interpreted=lambda: False)
    monkeypatch.setattr(kernels, "_code", lambda: compiled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with switched("1"):
        assert "this is cpu" in kernels.hindrance(cpu)
        assert "compute capability 8.0, and this GPU's is 7.5" in kernels.hindrance(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with switched("1"):
        assert kernels.hindrance(gpu) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with switched("1"):
        assert "ROCm" in kernels.hindrance(gpu)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "goca_guidance.method.triton_kernels", None)
    kernels._code.cache_clear()
    with switched("1"):
        assert "cannot be imported" in kernels.hindrance(gpu)


# ---- launches --------------------------------------------------------------------------------------------------------
class Kernel:
    """Stands for one of Triton's kernels: notes how it is launched, compiled too, and fails if it should."""

    arg_names = ("q", "k", "n", "OWN")

    def __init__(self):
        self.launched, self.failing = [], False

    def __getitem__(self, grid):
        def run(*arguments, **keywords):
            self.launched.append((grid, arguments, keywords))
            if self.failing:
                raise OSError("no compiler\nwas found")
            return self

        return run


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    monkeypatch.setattr(kernels, "_code", lambda: SimpleNamespace(pixels=made, interpreted=lambda: True))
    with switched("1"):
        yield made


PLAN = kernels.Plan("pixels", (2, 1, 1), (5,), {"OWN": 7}, {"num_warps": 4})


def test_the_second_launch_calls_the_compiled_kernel(kernel):
    """All arguments in the kernel's order. Another dtype, or a tensor that lies otherwise in memory, is compiled anew."""
    q, k = torch.zeros(9), torch.zeros(4)
    for tensors in ((q, None), (q, None), (q[1:], None), (q.half(), None), (q, k)):
        kernels.launch(PLAN, tensors[:1], tensors[1:])
    first = {"OWN": 7, "num_warps": 4}
    found = [(grid, arguments[2:], keywords) for grid, arguments, keywords in kernel.launched]
    again = ((2, 1, 1), (5, 7), {})
    assert found == [((2, 1, 1), (5,), first), again, *[((2, 1, 1), (5,), first)] * 3]
    assert kernel.launched[1][1][0] is q
    assert kernel.launched[1][1][1] is q  # in the place of what it lacks


def test_a_first_launch_that_fails_turns_kernels_off(kernel):
    kernel.failing, r = True, layer()
    assert kernels.usable(r)
    launch_failed = pytest.raises(kernels.NotLaunchedError)
    with pytest.warns(RuntimeWarning, match=r"launch failed \(OSError: no compiler was found\)"), launch_failed:
        kernels.launch(PLAN, [torch.zeros(3)], [])
    assert not kernels.usable(r)
    with launch_failed:  # a second warning were an error
        kernels.launch(PLAN, [torch.zeros(3)], [])


def test_a_later_launch_that_fails_is_an_error(kernel):
    x = torch.zeros(3)
    kernels.launch(PLAN, [x], [])
    kernel.failing = True
    with pytest.raises(OSError, match="no compiler"):
        kernels.launch(PLAN, [x], [])
