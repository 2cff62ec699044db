"""Fused kernels give what the forms in PyTorch give, in Triton's interpreter; what they do not know is left to PyTorch."""

from collections.abc import Iterator

import pytest
import torch

from goca_guidance.method import attention, goca, kernels
from goca_guidance.method.maps import pull_affinity, row_mass
from goca_guidance.method.records import AttentionRecord, AttentionView
from tests.helpers.interpreted import interpreted


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


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize(("reference", "normalised"), [((7, 9), False), ((3, 4), True), ((9, 10), True)])
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
    """More rows and keys than a tile has, in joint attention; the sum over some keys is that of a text."""
    r = layer((70, 0), grid=(9, 15), heads=2)
    probs = torch.cat([p for _, p in attention.probabilities(r)], 2)
    lse, total = kernels.log_sum_exp(r), torch.zeros(2, 135, 135)
    close(lse, (r.query @ r.key.mT * r.scale).logsumexp(-1))
    kernels.pixels(r, lse, total=total)
    close(total, probs[..., r.view.image].mean(1))
    close((kernels.log_sum_exp(r, keys=r.view.text) - lse).exp(), probs[..., r.view.text].sum(-1))
    close(kernels.words(r, None), probs[..., r.view.text].mean(1))


TEXTS = [
    {"keys": 77}, {"keys": 150, "d": 72, "mask": "by key", "dtype": BFLOAT}, {"keys": (9, 0), "d": 64},
    {"keys": (0, 9), "d": 160, "dtype": HALF, "mask": "by row"}, {"keys": 20, "d": 256, "grid": (3, 3)},
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
