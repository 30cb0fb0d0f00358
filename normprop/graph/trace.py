"""A model as a torch.fx graph whose nodes know their values' shapes; in parts, where torch.fx cannot follow it."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normprop import pools
from normprop.graph.inplace import name_what_is_written, written_attributes
from normprop.graph.reading import (
    OURS,
    RANDOM_NAMES,
    WEIGHT_LAYERS,
    TraceError,
    attribute,
    call,
    home_of_forward,
    is_batch_norm,
    is_normprop,
    is_weight_layer,
    key,
    own_activation,
    owner,
    package,
    tensor_inputs,
)

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


class _Concrete:
    """What a proxy answers where Python needs a number: the value that the example gives."""

    node: fx.Node

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)  # type: ignore[arg-type]

    def _value(self, what: str) -> Any:
        value = self.node.meta.get("value", _MISSING)
        if value is _MISSING:
            raise fx.proxy.TraceError(f"the code asks for the {what} of '{self.node}'; pass example=")
        return value

    def _augmented(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})  # type: ignore[attr-defined]

    # Without these, fx takes x += y for x = x + y, and other names of x keep the old value.
    def __iadd__(self, other: Any) -> Any:
        return self._augmented(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._augmented(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._augmented(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._augmented(operator.itruediv, other)

    def __len__(self) -> int:
        value = self._value("length")
        return len(self._fixed(value) if isinstance(value, Tensor) else value)

    def __int__(self) -> int:
        return int(self._fixed(self._value("value")))

    def __index__(self) -> int:
        return operator.index(self._fixed(self._value("value")))

    def __float__(self) -> float:
        return float(self._fixed(self._value("value")))

    def _fixed(self, value: Any) -> Any:
        """The value. The graph keeps it for inputs of all sizes: noted, unless it is the number of channels."""
        if not (key(self.node) in ("getitem", "size") and self.node.args[-1] == 1):
            self.tracer.decisions.add(owner(self.node))  # type: ignore[attr-defined]
        return value


_MISSING: Any = object()
_MATH = dict(vars(math))  # as it is; while fx traces it has wrappers in it


class _Proxy(_Concrete, fx.Proxy):
    pass


class _Attribute(_Concrete, fx.proxy.Attribute):
    pass


def _is_passing(module: nn.Module) -> bool:
    """Whether a module that forward() makes, ``blocks[:2](x)`` or ``nn.ReLU()(x)``, holds nothing of its own."""
    held = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return type(module) is nn.Sequential or not held


def check_forward(module: nn.Module) -> None:
    """Raises TraceError for a subclass of a NormProp layer that computes something else."""
    if is_normprop(module) and not home_of_forward(module).startswith("normprop."):
        raise TraceError(
            f"{type(module).__name__} gives a NormProp layer a forward of its own: make it a module that holds the "
            "layer and calls it"
        )


class _Tracer(fx.Tracer):
    """Follows the code with the example's shapes at hand; control flow on them is decided by it."""

    proxy_buffer_attributes = True

    def __init__(
        self, model: nn.Module, inputs: tuple[Tensor, ...] | None, leaves: tuple[str, ...]
    ) -> None:
        einops: Any = sys.modules.get("einops")
        wrapped: Any = (math,) if einops is None else (math, einops)
        super().__init__(autowrap_modules=wrapped)
        # While it traces, there is a wrapper in its place.
        self.rearrange: Any = getattr(einops, "rearrange", None)
        self.inputs = inputs
        self.leaves = leaves
        self.decisions: set[str] = set()
        self.contexts: set[str] = set()
        self.iterated = False  # over an input
        self.evaluating = False
        # Shapes alone are wanted: the meta device computes nothing.
        self.shadow = None if inputs is None else copy.deepcopy(model).to("meta").eval()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Code that computes, among code that is traced; random numbers and ``math`` are left as they were.

        What is imported meanwhile (the compiler, by torch's own code) must not find fx's wrappers in ``math``.
        """
        before, self.evaluating = self.evaluating, True
        wrapped = dict(vars(math))
        vars(math).update(_MATH)
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            vars(math).update(wrapped)
            self.evaluating = before

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        with self._evaluation():
            return self._is_leaf(m, module_qualified_name)

    def _is_leaf(self, m: nn.Module, path: str) -> bool:
        return (
            super().is_leaf_module(m, path)
            or type(m).__module__ in self.leaves
            or home_of_forward(m) in self.leaves  # a subclass without a forward of its own
            or isinstance(m, pools.AdaptiveMaxPool)  # its constants need sizes as numbers
            or is_weight_layer(m)
            or is_batch_norm(m)
            or type(m).__name__ in RANDOM_NAMES
            or package(type(m).__module__) == "einops"
            or own_activation(m) is not None
        )

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        # While it traces, fx sends every module's call here, the shadow's too.
        check_forward(m)
        unknown = m not in (self.submodule_paths or {})
        if self.evaluating or (unknown and _is_passing(m)):
            return forward(*args, **kwargs)
        if unknown:
            raise fx.proxy.TraceError(
                f"its forward calls a {type(m).__name__} that it does not hold; make it an attribute in __init__"
            )
        if type(m).__name__ == "Rearrange" and package(type(m).__module__) == "einops":
            moved = self.create_proxy("call_function", self.rearrange, (*args, m.pattern), m.axes_lengths)
            moved.node.meta["is_wrapped"] = True  # fx's, for pickle: not to be followed inside
            return moved
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # fx looks each tensor up among all parameters; what the shadow reads is not among them.
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta.get("value", _MISSING)
        if value is _MISSING:
            return super().iter(obj)
        if isinstance(value, Tensor):  # it may have been made for a list
            self.decisions.add(owner(obj.node))
            self.iterated |= obj.node.op == "placeholder"
        return iter([obj[index] for index in range(len(value))])  # type: ignore[index]

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta.get("value", _MISSING)
        if value is _MISSING:
            return super().to_bool(obj)
        self.decisions.add(owner(obj.node))
        return bool(value)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if not torch.is_grad_enabled():
            self.contexts.add("torch.no_grad()")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self.contexts.add("torch.autocast()")
        if self.shadow is not None:
            try:
                with self._evaluation(), torch.no_grad():
                    try:
                        node.meta["value"] = self._evaluate(node)
                    except RuntimeError:  # a tensor that the code makes has values, the rest are on meta
                        node.meta["value"] = self._evaluate(node, on_meta=True)
            except Exception as error:
                node.meta["error"] = f"{type(error).__name__}: {error}"
        return node

    def _evaluate(self, node: fx.Node, on_meta: bool = False) -> Any:
        assert self.shadow is not None
        assert self.inputs is not None
        if node.op == "placeholder":
            index = sum(n.op == "placeholder" for n in node.graph.nodes) - 1
            if index < len(self.inputs):
                return self.inputs[index]
            return node.args[0]
        if node.op == "get_attr":
            try:
                return attribute(self.shadow, node)
            except AttributeError:  # a tensor that the code made and fx keeps as a constant
                return attribute(self.root, node).to("meta")

        def value(n: fx.Node) -> Any:
            value = n.meta["value"]
            return value.to("meta") if on_meta and isinstance(value, Tensor) else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return args[0] if node.op == "output" else call(self.shadow, node, args, kwargs)


def as_inputs(example: Any, name: str = "example") -> tuple[Tensor, ...]:
    """``example`` as a tuple of tensors.

    Raises:
        TypeError: If it is neither a tensor nor a tuple of tensors.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a tuple of tensors, got {'a tuple with ' * (inputs is example)}"
                f"{type(x).__name__}; for a shape alone write torch.zeros(1, 3, 32, 32)"
            )
    return inputs


def without_values(model: nn.Module) -> str:
    """The name of a parameter that is on the meta device; empty if there is none."""
    return next((name for name, p in model.named_parameters() if p.is_meta), "")


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it or on a part of it."""
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)


def check_unwrapped(model: nn.Module) -> None:
    """Raises TraceError for TorchScript, and for a model that is wrapped for several devices or compiled."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("torch.fx cannot follow TorchScript: pass the Python model that it was made from")
    if kind in WRAPPERS:
        raise TraceError(f"model is wrapped in {kind}: pass model.{WRAPPERS[kind]}")
    if is_sharded(model):
        raise TraceError(
            "model is sharded (FSDP2): load its full state dict into a model of your own and pass that"
        )


def trace(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...] | None = None,
    leaves: tuple[str, ...] = OURS,
) -> fx.GraphModule:
    """``model`` as a graph; its modules are shared with ``model``, not copied.

    Args:
        model: As it stands: ``self.training`` is baked into the graph.
        example: An input, or a tuple of them; it gives each node's ``meta["value"]``, a tensor
            without data. None: guessed from the first weight layer (:func:`guess_example`).
        leaves: Our Python modules whose layers stay single nodes.

    Raises:
        TraceError: If torch.fx cannot follow the code.
        TypeError: If the example is no tensor and no tuple of tensors.
    """
    check_unwrapped(model)
    if example is None:
        example = guess_example(model)
    inputs = None
    if example is not None:
        inputs = tuple(t.to("meta") for t in as_inputs(example))
    if isinstance(model, ByMode):
        model = model.graphs[model.training]
    if is_weight_layer(model) or is_batch_norm(model) or type(model).__module__ in OURS:
        model = nn.Sequential(model)
    several = [
        p.name
        for p in inspect.signature(type(model).forward).parameters.values()
        if p.kind is p.VAR_POSITIONAL
    ]
    if several and inputs is not None:
        raise TraceError(f"forward takes *{several[0]}, any number of inputs: give each a name")
    before = set(vars(model))
    try:
        return _traced(model, inputs, leaves, lengths=True)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"torch.fx cannot follow {type(model).__name__}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
            + ("" if example is not None else "; passing example= helps where code looks at shapes")
        ) from error
    finally:
        for name in set(vars(model)) - before:  # fx leaves its constants on the model
            delattr(model, name)


def _traced(
    model: nn.Module, inputs: tuple[Tensor, ...] | None, leaves: tuple[str, ...], lengths: bool
) -> fx.GraphModule:
    """With ``lengths``, ``len(x)`` is a node, so that the graph serves batches of all sizes; else a number."""
    fixed = _defaults(model, inputs)
    lost: set[str] = set()
    left: set[str] = set()
    dropped: set[str] = set()
    counted: set[fx.Node] | None = set() if lengths else None
    try:
        tracer = _Tracer(model, inputs, leaves)
        with (
            _left_alone(model, lost, left),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            _proxies_seen_through(model, dropped, counted),
        ):
            graph = tracer.trace(model, concrete_args=fixed)
    except Exception:
        if not counted:
            raise
        return _traced(model, inputs, leaves, lengths=False)
    graph._tracer_cls = None  # unpickling would call it
    _drop_fixed_arguments(graph)
    name_what_is_written(model, graph)
    for node in list(reversed(graph.nodes)):  # reading a shape for a decision leaves dead nodes
        if (
            not node.users
            and node.op in ("call_function", "get_attr")
            and key(node) in ("getattr", "getitem")
        ):
            graph.erase_node(node)
    result = fx.GraphModule(model, graph, type(model).__name__)
    result.meta["decisions"] = sorted(tracer.decisions)
    result.meta["fixed"] = list(fixed)
    result.meta["contexts"] = sorted(tracer.contexts)
    result.meta["left"] = sorted(left)
    result.meta["dropped"] = sorted(dropped)
    result.meta["lost"] = sorted(lost | written_attributes(model, graph))
    result.meta["iterated"] = tracer.iterated
    for node in graph.nodes:  # fx copies the weight alone: the layer says what it is
        path = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and path and isinstance(model.get_submodule(path), WEIGHT_LAYERS):
            place(result, path, model.get_submodule(path))
    return result


@contextmanager
def _proxies_seen_through(
    model: nn.Module, dropped: set[str], counted: set[fx.Node] | None
) -> Iterator[None]:
    """``isinstance(x, Tensor)`` and ``len(x)`` answer as for the tensor that a proxy stands for.

    They are given to the Python packages of the model's classes; a ``len`` is a node, as ``x.size(0)`` is. (A
    proxy's ``__class__`` would reach torch's C++ too, which crashes on a tensor that is none.)
    Activation checkpointing is left out there.

    Args:
        model: The modules.
        dropped: Told what else its code does to the way that it is computed, and its graph does not.
        counted: Told whose length became a node; None for numbers.
    """

    def is_instance(value: Any, kinds: Any) -> bool:
        if isinstance(value, kinds):
            return True
        meant = value.node.meta.get("value", _MISSING) if issubclass(type(value), fx.Proxy) else _MISSING
        return meant is not _MISSING and isinstance(meant, kinds)

    def length(value: Any) -> Any:
        if counted is None or not issubclass(type(value), fx.Proxy) or not is_instance(value, Tensor):
            return len(value)
        counted.add(value.node)
        return value.size(0)

    def as_tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(type(data), fx.Proxy):
            return as_it_is(data, *args, **kwargs)
        if not (args or kwargs) and is_instance(data, Tensor):
            return data
        return data.tracer.create_proxy("call_function", as_it_is, (data, *args), kwargs)

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        dropped.add("activation checkpointing")
        of_checkpoint = inspect.signature(as_checkpoint).parameters
        own = {name: value for name, value in kwargs.items() if name not in of_checkpoint}
        return function(*args, **own)

    def enter(self: Any) -> Any:
        if not self._enabled:
            dropped.add("torch.autocast(enabled=False)")
        return as_enter(self)

    as_it_is, as_checkpoint = torch.as_tensor, torch.utils.checkpoint.checkpoint
    as_enter = torch.autocast.__enter__
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    packages = {package(cls.__module__) for cls in classes} - {"builtins", "torch", "normprop"}
    with ExitStack() as undo:
        for name, home in list(sys.modules.items()):
            if package(name) in packages and isinstance(home, ModuleType):
                undo.enter_context(_set(home, "isinstance", is_instance))
                undo.enter_context(_set(home, "len", length))
                for own in [n for n, value in vars(home).items() if value is as_checkpoint]:
                    undo.enter_context(_set(home, own, checkpoint))
        undo.enter_context(_set(torch, "as_tensor", as_tensor))
        undo.enter_context(_set(torch, "is_tensor", lambda value: is_instance(value, Tensor)))
        undo.enter_context(_set(torch.jit, "isinstance", is_instance))
        undo.enter_context(_set(torch.utils.checkpoint, "checkpoint", checkpoint))
        undo.enter_context(_set(torch.autocast, "__enter__", enter))
        yield


@contextmanager
def _set(home: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(home).get(name, _MISSING)
    setattr(home, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(home, name)
        else:
            setattr(home, name, before)


def check_whole(graph_module: fx.GraphModule) -> None:
    """Raises TraceError if the code does what is not in its graph."""
    if lost := graph_module.meta["lost"]:
        raise TraceError(f"its forward {' and '.join(lost)}, which a graph does not keep")


@contextmanager
def _left_alone(model: nn.Module, lost: set[str], left: set[str]) -> Iterator[None]:
    """What code that is traced does to its modules and to random numbers is undone.

    Args:
        model: The modules.
        lost: Told what it did that its graph will not do.
        left: Told which plain attributes it set to maps.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (m, dict(vars(m)), {t: dict(getattr(m, t)) for t in tables}, _containers(m))
        for m in model.modules()
    ]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        for module, attributes, kept, containers in before:
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if isinstance(value, fx.Proxy) and name in kept["_buffers"]:
                    lost.add(f"sets self.{name}")
                elif isinstance(value, fx.Proxy):
                    left.add(name)
            for own, entries in [
                (vars(module), attributes),
                *((getattr(module, t), kept[t]) for t in tables),
            ]:
                for name in set(own) - set(entries):
                    if not name.startswith("_tensor_constant"):  # fx's, which the graph reads
                        del own[name]
                own.update(entries)
            for name, copied_one in containers.items():
                now = vars(module)[name]
                if len(now) != len(copied_one):
                    now.clear()
                    now.extend(copied_one) if isinstance(now, list) else now.update(copied_one)
        drawn = not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate()
        position = np.random.get_state()  # noqa: NPY002
        if drawn or states[2][2] != position[2] or (states[2][1] != position[1]).any():  # type: ignore[index]
            lost.add(
                "draws random numbers that decide what it does (nn.Dropout and stochastic depth modules are kept)"
            )
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _containers(module: nn.Module) -> dict[str, Any]:
    """Copies of the lists, dicts and sets that a module holds."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: copy.copy(value) for name, value in own.items() if type(value) in (list, dict, set)}


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, but for the tensors that are to be shared.

    Raises:
        TraceError: If it holds a tensor that was computed, which torch does not copy.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except RuntimeError as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied, as it holds a tensor that was computed (old weight_norm or "
            "spectral_norm, pruning, an output that it keeps): remove that first; torch.nn.utils.parametrizations "
            "can stay"
        ) from error


def by_mode(model: nn.Module, example: Any = None) -> dict[bool, fx.GraphModule]:
    """``model`` as a graph of training, and one of eval if that is another.

    Raises:
        TraceError: As :func:`trace`; also for code that a graph does not keep.
    """
    flags = {module: module.training for module in model.modules()}
    graphs = {}
    try:
        for mode in (True, False):
            graphs[mode] = trace(model.train(mode), example)
            if contexts := graphs[mode].meta["contexts"]:
                raise TraceError(f"its forward uses {' and '.join(contexts)}, which a graph does not keep")
            check_whole(graphs[mode])
            if example is None and graphs[mode].meta["iterated"]:
                raise TraceError("its forward goes through its input one by one; pass example=")
    finally:
        for module, flag in flags.items():
            module.training = flag
    if graphs[True].code == graphs[False].code:
        del graphs[False]
    return graphs


class ByMode(nn.Module):
    """Two graphs over the same modules: one for ``train()``, one for ``eval()``.

    A graph holds the path that the code took; where the code asks ``self.training`` (auxiliary
    heads, functional dropout), there are two.
    """

    def __init__(self, train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
        super().__init__()
        # One tree of modules; the graphs only look into it.
        for graph in (train, evaluation):
            for name, module in graph.named_modules():
                if not has(self, name):
                    place(self, name, module)
            for table in ("_parameters", "_buffers"):
                for name, value in getattr(graph, table).items():
                    getattr(self, table).setdefault(name, value)
        self.graphs = {True: train, False: evaluation}
        self._share()

    def _share(self) -> None:
        for graph in self.graphs.values():
            for table in ("_modules", "_parameters", "_buffers"):
                graph.__dict__[table] = getattr(self, table)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a copy's graphs came with tables of their own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graphs[self.training](*args, **kwargs)


def calls_within(part: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, Any] | None:
    """With what each module in a part is called: tensors, or None if that is no plain call of tensors.

    Returns:
        The modules that are called, but for those inside of one that is called with tensors alone; None if the
        part does not run on the inputs.
    """
    calls: dict[nn.Module, Any] = {}
    twin = copy.deepcopy(part).eval()
    source = dict(zip(twin.modules(), part.modules(), strict=True))
    inside = {child: module for module in twin.modules() for child in module.children()}

    def is_inside_of_a_plain_call(module: nn.Module) -> bool:
        while (module := inside[module]) is not twin:
            if calls.get(module) is not None:
                return True
        return False

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not twin and not is_inside_of_a_plain_call(module):
            plain = not kwargs and all(isinstance(x, Tensor) for x in args)
            calls.setdefault(module, tuple(x.clone() for x in args) if plain else None)

    for module in twin.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            twin(*inputs)
    except Exception:
        return None
    return {source[module]: args for module, args in calls.items()}


class Part(NamedTuple):
    """A part of a model, as a graph.

    Attributes:
        path: In the model.
        module: The part.
        graph_module: Its graph.
        alone: Whether it is one of torch's layers, the only node of its graph.
    """

    path: str
    module: nn.Module
    graph_module: fx.GraphModule
    alone: bool


def parts(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Part]:
    """The largest parts that torch.fx can follow, of a model that it cannot; in the model's order."""
    found: dict[nn.Module, Part] = {}

    def visit(part: nn.Module, path: str, calls: dict[nn.Module, Any]) -> None:
        check_forward(part)
        for name, child in part.named_children():
            where, given = below(path, name), calls.get(child)
            inner = calls
            if child in found:
                continue
            if given is not None and "forward" not in vars(child):
                alone = type(child).__module__.startswith("torch.nn.") and not isinstance(
                    child, nn.Sequential
                )
                try:
                    graph_module = trace(nn.Sequential(copy.copy(child)) if alone else child, given)
                except TraceError:
                    inner = calls_within(child, given) or {}
                else:
                    found[child] = Part(where, child, graph_module, alone)
                    continue
            visit(child, where, inner)

    visit(model, "", calls_within(model, inputs) or {})
    return list(found.values())


class _Called(Exception):
    pass


def call_of(part: nn.Module, child: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """With which tensors one module in a part is called; None if the part fails before."""
    found = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args)
        raise _Called

    twin = copy.deepcopy(part).eval()
    dict(zip(part.modules(), twin.modules(), strict=True))[child].register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            twin(*inputs)
    except Exception:
        return found[0] if found else None
    return None


def _defaults(model: nn.Module, inputs: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """Arguments that the example does not give, at their defaults."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    given = len(inputs) if inputs is not None else 1
    return {
        q.name: q.default
        for q in parameters[given:]
        if q.default is not q.empty and q.kind in (q.POSITIONAL_OR_KEYWORD, q.KEYWORD_ONLY)
    }


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """fx leaves a placeholder and an assertion for each argument that is fixed; nothing reads them.

    An argument that the example gives has no default any more: the graph is for a tensor.
    """
    for node in list(graph.nodes):
        if (
            node.op == "call_function"
            and "_assert" in getattr(node.target, "__name__", "")
            and not node.users
        ):
            sources = tensor_inputs(node)
            if sources and all(n.op == "placeholder" or key(n) == "eq" for n in sources):
                graph.erase_node(node)
    for node in list(reversed(graph.nodes)):
        fixed = node.op == "placeholder" and node.args
        if not node.users and (
            key(node) == "eq" or (fixed and str(node.target).rpartition("_")[2].isdigit())
        ):
            graph.erase_node(node)
        elif fixed:
            node.args = ()


def below(prefix: str, name: str) -> str:
    """The path of what is called ``name`` in the module at ``prefix``; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def has(root: nn.Module, path: str) -> bool:
    """Whether there is a module at a path."""
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, making its parents; such a parent hands on what it was made for."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    before = root._modules.get(name)
    if before is not None and type(before) is nn.Module:
        module._modules = {**before._modules, **module._modules}
    root._modules[name] = module


def put_in_place_of(old: nn.Module, new: nn.Module, root: nn.Module) -> None:
    """Under every name that ``old`` has in ``root``."""
    for holder in list(root.modules()):
        for name, child in holder._modules.items():
            if child is old:
                holder._modules[name] = new


def keep_attributes(part: nn.Module, result: nn.Module) -> None:
    """Give a graph, and its deep copies, the plain attributes of its module: code around it may read them."""
    kept = {
        name: value
        for name, value in vars(part).items()
        if not (name.startswith("_") or name in vars(result) or hasattr(fx.GraphModule, name))
    }
    vars(result).update(kept)
    if isinstance(result, fx.GraphModule):  # torch copies what is named here, and nothing else
        result.meta["_user_preserved_attributes"] = kept


def guess_example(model: nn.Module) -> Tensor | None:
    """One input without data, from timm's ``pretrained_cfg`` or the first weight layer; None if unclear."""
    config = getattr(model, "pretrained_cfg", None)
    first = next((m for m in model.modules() if isinstance(m, WEIGHT_LAYERS)), None)
    if isinstance(config, Mapping) and config.get("input_size"):
        size = tuple(config["input_size"])
    elif isinstance(first, nn.Linear):
        size = (first.in_features,)
    elif isinstance(first, _ConvNd):
        spatial = len(first.kernel_size)
        positions = {1: 1024, 2: 224, 3: 32}[spatial]
        if first.transposed:  # it starts from a code: of one position, if its own kernel spreads it
            spreads = first.padding in ((0,) * spatial, "valid") and set(first.stride) == {1}
            positions = 1 if spreads else 8
        size = (first.in_channels, *[positions] * spatial)
    else:
        return None
    return torch.empty(1, *size, device="meta", dtype=None if first is None else first.weight.dtype)
