"""Counting on a fake GPU, by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from eval.cost.fake_step import Counts, Trace, fake_cuda
from goca_guidance.method import maps
from goca_guidance.method.records import TokenLayout


MB = 2**20


@pytest.fixture
def trace():
    with fake_cuda(), Trace() as trace:
        yield trace


def layout(device) -> TokenLayout:
    one = torch.ones(1, 1, device=device)
    return TokenLayout((("cat",),), one.long(), one[..., None], one.bool(), one.long())


def test_a_sum_of_two_maps(trace):
    step, x = trace.begin(), torch.empty(MB // 4, device="cuda")
    y = x + 1
    assert step.model == Counts(1, 2 * MB, MB)
    assert (step.peak, trace.live) == (2 * MB, 2 * MB)
    x = None
    assert trace.live == MB
    assert y[::2].sum().shape == ()  # a view is neither launched nor memory, of which half is read
    assert step.model.bytes == 2 * MB + MB // 2 + 4
    assert (step.ours, step.copies) == (Counts(), [])


def test_what_the_library_asks_is_counted_by_line(trace):
    step, x = trace.begin(), torch.zeros(1, 1, 512, 512, device="cuda")
    maps.min_max(x)
    assert step.model.launches == 1
    (low,) = [line for line in step.lines if ":min_max:" in line and step.lines[line].bytes == 2 * MB + 8]
    assert low.startswith("method.maps:min_max:")
    assert step.ours.launches == sum(line.launches for line in step.lines.values()) == 8  # with the one of `where`
    assert step.held[""] == MB


def test_a_kernel_reads_and_writes_its_tensors(trace):
    step, x = trace.begin(), torch.empty(MB // 4, device="cuda")
    trace.launch(None, (x, None), (x,), (x,))
    assert step.ours == Counts(1, 4 * MB, 0)


def test_what_is_made_elsewhere_and_what_is_added_to(trace):
    """A product into a buffer does not read it; rows that are added are read, and their places read and written."""
    x, buffer = torch.empty(512, 512, device="cuda"), torch.empty(512, 512, device="cuda")
    step = trace.begin()
    torch.mm(x, x, out=buffer)
    assert step.model == Counts(1, 3 * MB, MB)
    buffer.index_add_(0, torch.empty(2, dtype=torch.long, device="cuda"), x[:2])
    assert step.model.bytes == 3 * MB + 3 * 2 * 512 * 4


def test_copies_to_the_device_are_noted(trace):
    step, there = trace.begin(), layout("cpu")
    there.to("cuda")
    assert len(step.copies) == 4
    assert all("TokenLayout.to" in copy for copy in step.copies)


def test_what_the_host_waits_for_is_an_error(trace):
    with pytest.raises(DataDependentOutputException):
        layout("cuda").alone  # noqa: B018


def test_mixed_devices_are_an_error(trace):
    with pytest.raises(Exception, match="same device"):
        torch.zeros(4, device="cuda") + torch.zeros(4)


def test_constants_of_fake_tensors_do_not_stay():
    with fake_cuda():
        assert maps.nearest_index((4, 4), (2, 2), torch.device("cuda")).shape == (4,)
    assert maps.nearest_index((4, 4), (2, 2), torch.device("cpu")).tolist() == [0, 2, 8, 10]
    assert maps.nearest_index.cache_info().currsize == 1
