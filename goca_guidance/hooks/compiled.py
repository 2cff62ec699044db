"""A compiled denoiser stays compiled while it is guided: a second graph tells what its attention layers computed.

A graph ignores hooks on what is inside. So what the user compiled, the denoiser or blocks of it, is traced once more for the
user's own compiler, as code of its own: the user's graphs stay. Queries, keys and outputs of the observed layers are further
outputs of this graph, taken off before the caller sees them. They wait until the graph has run: all layers' at once, where a
denoiser is compiled as a whole. What cannot be traced in one graph, or hides its attention, runs eagerly, with one warning.
"""

import copy
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.utils import logging
from torch.fx import GraphModule, Node

from goca_guidance.denoisers.base import Family
from goca_guidance.denoisers.unknown import UnknownFamily
from goca_guidance.hooks.observer import ARGUMENTS, AttentionObserver, TracedCall
from goca_guidance.hooks.shared import EagerHere, Wrapper, compiled_calls, compiled_names


logger = logging.get_logger(__name__)

SDPA = torch._C._nn.scaled_dot_product_attention  # as it stands in a graph, whatever wraps it
TENSORS = ("query", "key", "attn_mask")  # of its arguments


class Layers(NamedTuple):
    """Observed attention layers of a module, named from there, and those whose raw queries are wanted."""

    names: frozenset[str]
    raw: frozenset[str]


class Taken(NamedTuple):
    """A kernel call in a graph: its layer, its arguments that are no tensors, and which further outputs the tensors are."""

    layer: str
    arguments: dict[str, Any]
    tensors: dict[str, int]


# ---- graphs ----------------------------------------------------------------------------------------------------------
class Graphs:
    """Graphs of modules of one kind, for guided calls; torch is told that they are its compiler, and they ask the user's.

    Args:
        backend, dynamic: the user's compiler.
        layers: whose attention the graphs tell.
    """

    count = itertools.count()

    def __init__(self, backend: Callable, dynamic: bool | None, layers: Layers):
        self.chosen = backend, dynamic, layers
        self.refused = False
        self._of_thread = threading.local()  # `module`: what is run; `told`: by its graph
        # Named anew, as torch takes shapes of code of one name, file and line for those of one function.
        code = _call.__code__.replace(co_name=f"guided_{next(self.count)}")
        self._run = torch.compile(type(_call)(code, globals()), backend=self, dynamic=dynamic, fullgraph=True)

    def run(self, function: Callable, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[Any, list | None]:
        """The function's output, and of each kernel call the layer, arguments and tensors; None where nothing was compiled."""
        self._of_thread.module, self._of_thread.told = module, None
        try:
            output = self._run(function, module, args, kwargs)
            return output, self._of_thread.told
        finally:
            self._of_thread.module = self._of_thread.told = None

    def __call__(self, graph: GraphModule, inputs: list) -> Callable:
        """Compile: torch asks, the user's compiler does it."""
        backend, _, layers = self.chosen
        output = graph.graph.output_node()
        given, (taken, further) = list(output.args[0]), self._taken(graph, layers)
        output.args = ((*given, *further),)
        graph.recompile()
        compiled, count, overwritten = backend(graph, inputs), len(given), _overwrites(backend)

        def run(*args):
            found = compiled(*args)
            tensors = [x.clone() if overwritten else x for x in found[count:]]
            self._of_thread.told = [
                (layer, arguments, {name: tensors[i] for name, i in of_call.items()})
                for layer, arguments, of_call in taken
            ]
            return found[:count]

        return run

    def _taken(self, graph: GraphModule, layers: Layers) -> tuple[list[Taken], list[Node]]:
        """The layers' kernel calls, and the nodes that are to be further outputs."""
        module, further = self._of_thread.module, dict[Node, int]()
        known = {str(id(module.get_submodule(name))): name for name in layers.names}
        taken = []
        for node in graph.graph.nodes:
            layer = next((known[key] for key in _modules_of(node) if key in known), None)
            if layer is None or node.target is not SDPA:
                continue
            arguments = {**dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
            nodes = {name: arguments.pop(name) for name in TENSORS if isinstance(arguments.get(name), Node)}
            nodes["output"] = node
            if layer in layers.raw and (raw := _normalised(graph, module.get_submodule(layer))):
                nodes["raw"] = raw
            tensors = {name: further.setdefault(x, len(further)) for name, x in nodes.items()}
            taken.append(Taken(layer, arguments | {"value": None, "lse": None}, tensors))
        missing = layers.names - {call.layer for call in taken}
        if missing or any(isinstance(x, Node) for call in taken for x in call.arguments.values()):
            raise ValueError(f"the graph shows no attention of {min(missing, default='a fixed scale')}")
        return taken, list(further)


def _call(function, module, args, kwargs):
    return function(module, *args, **kwargs)


def _modules_of(node: Node) -> list[str]:
    """Identities of the modules in which a node was traced, the innermost one first."""
    return [key.partition("@")[0] for key in reversed(node.meta.get("nn_module_stack", {}))]


def _normalised(graph: GraphModule, layer: torch.nn.Module) -> Node | None:
    """What the layer's norm of queries is given; None where it has none."""
    norm = getattr(layer, "norm_q", None)
    inside = [node for node in graph.graph.nodes if norm is not None and str(id(norm)) in _modules_of(node)]
    given = (x for node in inside for x in node.all_input_nodes if x not in inside and x.op != "placeholder")
    return next(given, None)


def _overwrites(backend: Any) -> bool:
    """Whether graphs write their outputs to the same memory each time (CUDA graphs)."""
    chosen = getattr(backend, "config", {}).get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    return bool(chosen) or getattr(backend, "compiler_name", "") == "cudagraphs"


# ---- calls -----------------------------------------------------------------------------------------------------------
_GRAPHS: WeakKeyDictionary[torch.nn.Module, list[Graphs]] = WeakKeyDictionary()  # by denoiser
_WARNED: WeakSet[torch.nn.Module] = WeakSet()


class Watched:
    """A denoiser, and the observer that is told of its attention."""

    def __init__(self, family: Family, observer: AttentionObserver):
        self.family, self.observer = family, observer
        self.names = {module: name for name, module in family.denoiser.named_modules()}
        if family.compiled is not None:
            self.names[family.compiled] = ""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is compiled of it, and has to do with observed attention."""
        layers = set(self.observer.modules)
        around = {layer[:i] for layer in layers for i, letter in enumerate(layer) if letter == "."} | {""}
        inside = tuple(f"{layer}." for layer in layers)
        compiled = {module: name for module, name in self.names.items() if compiled_names(module)}
        return [m for m, name in compiled.items() if name in around or f"{name}.".startswith(inside)]

    def call(self, module: torch.nn.Module, name: str, kernel: Any) -> EagerHere:
        """What takes the place of a compiled call of a module."""
        try:
            return GuidedHere(name, kernel, module, self)
        except ValueError as error:
            self.warn(error)
            return EagerHere(name, kernel)

    def warn(self, reason: object) -> None:
        if self.family.denoiser not in _WARNED:
            _WARNED.add(self.family.denoiser)
            first = str(reason).strip().partition("\n")[0].rstrip(".")
            logger.warning(
                f"The compiled {type(self.family.denoiser).__name__} runs eagerly while it is guided: {first}."
            )

    def graphs(self, kernel: Any, where: str) -> Graphs:
        """Those of earlier calls, for the compiler that the user chose; a ValueError says why there can be none."""
        start = f"{where}." if where else ""
        names, raw = (
            frozenset(name.removeprefix(start) for name in found if name.startswith(start))
            for found in (self.observer.modules, self.observer.raw)
        )
        if isinstance(self.family, UnknownFamily) or not names:
            raise ValueError("where its text stands is found out first" if names else "attention itself is compiled")
        chosen = *compiler(kernel), Layers(names, raw)
        known = _GRAPHS.setdefault(self.family.denoiser, [])
        found = next((graphs for graphs in known if graphs.chosen == chosen), None)
        if found is None:
            known.append(found := Graphs(*chosen))
        return found

    def tell(self, where: str, told: list) -> bool:
        """Whether the observer, of what a graph computed, knew every layer's attention; else it hears none of it."""
        calls: dict[str, TracedCall] = {}
        for layer, arguments, tensors in told:
            name = f"{where}.{layer}" if where else layer
            call = calls.setdefault(name, TracedCall(self.observer.modules[name]))
            call.raw = tensors.pop("raw", None)
            call.calls.append((arguments | tensors, tensors["output"]))
        return self.observer.tell(calls)


def compiler(kernel: Any) -> tuple[Callable, bool | None]:
    """What the user chose for `torch.compile`: backend and dynamic. ValueError where torch does not say."""
    while isinstance(kernel, Wrapper):  # another thread's
        kernel = kernel.kernel
    context: Any = inspect.getclosurevars(kernel).nonlocals.get("self")
    try:
        return torch._dynamo.eval_frame.innermost_backend(context.callback), context._dynamic
    except (AttributeError, TypeError):
        raise ValueError("this version of torch does not tell its compiler") from None


class GuidedHere(EagerHere):
    """A compiled call of a module that in one thread runs a graph of ours, and has what it tells observed."""

    def __init__(self, name: str, kernel: Any, module: torch.nn.Module, watched: Watched):
        super().__init__(name, kernel)
        self.module, self.watched, self.where = getattr(module, "_orig_mod", module), watched, watched.names[module]
        self.graphs = watched.graphs(kernel, self.where)
        self.hooked = self._torchdynamo_orig_callable.__name__ == "forward"  # it is called by what runs the hooks
        if not self.hooked and "forward" in vars(self.module):
            raise ValueError("another forward was put in the place of its own")

    def here(self, *args, **kwargs):
        """The module's own hooks run outside of the graph: they are a twin's, which is the module but for its forward."""
        if self.hooked:
            return self._forward(*args, **kwargs)
        twin = copy.copy(self.module)
        twin._compiled_call_impl, twin.forward = None, self._forward
        return twin(*args, **kwargs)

    def _forward(self, *args, **kwargs):
        function: Any = type(self.module).forward
        if not self.graphs.refused:
            try:
                output, told = self.graphs.run(function, self.module, args, kwargs)
                if told is None or self.watched.tell(self.where, told):
                    return output
                reason: object = "a layer's attention is not all of its images, heads and tokens"
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = error
            self.graphs.refused = True
            self.watched.warn(reason)
        return function(self.module, *args, **kwargs)


@contextmanager
def guided_here(family: Family, observer: AttentionObserver) -> Iterator[None]:
    """What is compiled of a denoiser tells an observer of its attention, in this thread."""
    watched = Watched(family, observer)
    with compiled_calls(watched.modules, watched.call):
        yield
