"""What several threads share: hooks, wrappers and compiled calls heed their own thread, and leave in any order."""

import sys
import threading
from contextlib import ExitStack

import pytest
import torch

from goca_guidance.hooks.shared import COMPILED, eager_here, hook_here


@pytest.fixture
def hurried():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def elsewhere(function):
    """What a function gives, or raises, in another thread."""
    found = []

    def work():
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def together(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Counting:
    """A compiler that runs graphs as they are, and counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def compiled(kind: str, backend) -> torch.nn.Module:
    """A module that is compiled as a whole, in place, inside, or by its forward."""
    torch.compiler.reset()
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    if kind == "wrapped":
        return torch.compile(module, backend=backend)
    if kind == "forward":
        module.forward = torch.compile(module.forward, backend=backend)
    else:
        (module if kind == "in place" else module[1]).compile(backend=backend)
    return module


def kept(module) -> list:
    """What the module and its parts keep of compiled calls."""
    return [vars(m).get(name) for m in module.modules() for name in COMPILED]


# ---- hooks -----------------------------------------------------------------------------------------------------------
def test_a_hook_heeds_its_thread():
    module, heard = torch.nn.Identity(), []
    handle = hook_here(module.register_forward_pre_hook, lambda *_: heard.append(threading.get_ident()))
    module(0)
    elsewhere(lambda: module(0))
    handle.remove()
    module(0)
    assert heard == [threading.get_ident()]


def test_another_thread_may_compile_a_hooked_module():
    """In one graph, and its results are those without hooks."""
    module, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(1, 4)
    expected, heard = module(x), []
    torch.compiler.reset()
    handles = [
        hook_here(module[0].register_forward_pre_hook, lambda *_: heard.append(1), with_kwargs=True),
        hook_here(module[0].register_forward_hook, lambda *_: heard.append(1), always_call=True),
    ]
    assert torch.equal(elsewhere(lambda: torch.compile(module, backend="eager", fullgraph=True)(x)), expected)
    for handle in handles:
        handle.remove()
    assert heard == []


# ---- compiled calls --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["wrapped", "in place", "inside", "forward"])
def test_what_is_compiled_runs_eagerly_in_this_thread_alone(kind):
    backend = Counting()
    module, x = compiled(kind, backend), torch.ones(2, 4)
    before, expected = kept(module), module(x)
    runs = backend.runs
    assert runs > 0
    with eager_here([module]):
        assert torch.equal(module(x), expected)
        assert backend.runs == runs
        assert torch.equal(elsewhere(lambda: module(x)), expected)
        assert backend.runs == 2 * runs
    assert torch.equal(module(x), expected)
    assert backend.runs == 3 * runs
    assert kept(module) == before


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_the_first_thread_to_come_may_be_the_first_to_go(kind):
    backend = Counting()
    module, x = compiled(kind, backend), torch.ones(2, 4)
    before, runs = kept(module), []
    first, second = ExitStack(), ExitStack()
    module(x)
    elsewhere(lambda: first.enter_context(eager_here([module])))
    second.enter_context(eager_here([module]))
    first.close()
    runs.append(backend.runs)
    module(x)  # still eager
    runs.append(backend.runs)
    elsewhere(lambda: module(x))
    runs.append(backend.runs)
    second.close()
    module(x)
    runs.append(backend.runs)
    assert [count - runs[0] for count in runs] == [0, 0, 1, 2]
    assert kept(module) == before


def test_nothing_is_left_of_many_threads(hurried):
    backend = Counting()
    module, x, wrong = compiled("in place", backend), torch.ones(2, 4), []
    before, expected = kept(module), module(x)

    def work():
        for _ in range(100):
            with eager_here([module]):
                wrong.extend([] if torch.equal(module(x), expected) else [1])

    together(*[work] * 4)
    assert (wrong, kept(module)) == ([], before)
