"""What a node, or a module, is: one view of what code may write in many ways.

A ReLU may be a module, a function, a method or in place, and a convolution a module or
``F.conv2d(x, self.weight, ...)``. The passes (predict, convert, fold) ask a node's *key* and see one spelling.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from normprop import activations
from normprop.data_norm import DATA_NORMS
from normprop.modules import NormalizedActivation, NormPropLayer
from normprop.records import MOVES

WEIGHT_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

RANDOM_NAMES = ("DropPath", "StochasticDepth")

_FUNCTIONAL_WEIGHTS = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}

# Of torch's pools, as modules and as functions: kind, whether adaptive, spatial dims.
POOLS = {
    name: (kind, bool(adaptive), d)
    for d in (1, 2, 3)
    for kind in ("max", "avg")
    for adaptive in ("", "adaptive")
    for name in (
        f"{adaptive.capitalize()}{kind.capitalize()}Pool{d}d",
        f"{adaptive}_{kind}_pool{d}d".strip("_"),
    )
}

OURS = tuple(f"normprop.{name}" for name in ("modules", "merges", "pools", "data_norm", "activations"))


class TraceError(ValueError):
    """torch.fx cannot follow the model's code."""


def home_of_forward(module: nn.Module) -> str:
    """The Python module that a module's forward is written in."""
    return getattr(inspect.getattr_static(type(module), "forward", None), "__module__", "")


def package(name: str) -> str:
    return name.partition(".")[0]


def is_normprop(module: Any) -> bool:
    """Whether it is a layer that follows a rule, or a normalised activation."""
    return isinstance(module, (NormPropLayer, NormalizedActivation))


def is_weight_layer(module: Any) -> bool:
    """A linear or (transposed) convolution layer that computes what torch's computes."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in WEIGHT_LAYERS)


def is_batch_norm(module: Any) -> bool:
    """A BatchNorm layer, timm's with activation and SyncBatchNorm included."""
    return isinstance(module, _BatchNorm)


_OWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def own_activation(module: nn.Module) -> nn.Module | None:
    """The module, if it is an element-wise activation of the user's own."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "normprop.")) or kind.__name__ in RANDOM_NAMES:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    if module not in _OWN:
        try:
            y = module(torch.linspace(-3, 3, 7, dtype=torch.float64))
            _OWN[module] = isinstance(y, Tensor) and not isinstance(
                activations.as_module(copy.deepcopy(module)), nn.Identity
            )
        except Exception:
            _OWN[module] = False
    return module if _OWN[module] else None


def module_of(graph_module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None if it calls none."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


_SPELLED_BY_NAME = ("torch", "_operator", "builtins", "math", "operator", "einops")


def key(node: fx.Node) -> str:
    """What a function or method node does, in one spelling: ``add`` for ``+``, ``+=``, ``torch.add``, ``x.add_``.

    A function that is not torch's or Python's gets its full name; other nodes get their kind.
    """
    if node.op == "call_method":
        return _spelling(str(node.target))
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "__name__", str(node.target))
    home = getattr(node.target, "__module__", None) or "torch"
    if package(home) not in _SPELLED_BY_NAME:
        return f"{home}.{name}"
    return _spelling(name)


def operation_name(graph_module: nn.Module, node: fx.Node) -> str:
    """A node's operation as tables show it: a module's type, a function's or method's key, or "input"."""
    module = module_of(graph_module, node)
    if module is not None:
        return type(module).__name__
    return "input" if node.op == "placeholder" else key(node)


def moves(graph_module: nn.Module, node: fx.Node) -> bool:
    """Whether a node hands on all elements of its first input as they are: a view, cast, dropout, ``x[:, None]``."""
    if key(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is ... or i == slice(None) for i in index)
    return bool(tensor_inputs(node)) and operation_name(graph_module, node) in MOVES


ARITHMETIC = ("add", "sub", "rsub", "mul", "div")


def data_of(graph_module: nn.Module, node: fx.Node) -> fx.Node | None:
    """The input, or the data norm, that a node holds: as it is, moved, or behind ``(x / 255 - mean) / std``."""
    if node.op == "placeholder" or isinstance(module_of(graph_module, node), DATA_NORMS):
        return node
    if moves(graph_module, node):
        return data_of(graph_module, tensor_inputs(node)[0])
    read = [n for n in tensor_inputs(node) if not is_constant(graph_module, n)]
    return data_of(graph_module, read[0]) if key(node) in ARITHMETIC and len(read) == 1 else None


def normalizes_data(graph_module: nn.Module, node: fx.Node) -> bool:
    """Whether it is arithmetic that the author wrote to normalise the data: nothing but weight layers reads them."""
    source = data_of(graph_module, node) if key(node) in ARITHMETIC else None
    return source is not None and source.op == "placeholder" and _leads_to_layers(graph_module, source)


def _leads_to_layers(graph_module: nn.Module, node: fx.Node) -> bool:
    """Whether all that reads data, moved or behind arithmetic, are weight layers and norms."""
    for user in node.users:
        module = module_of(graph_module, user)
        layer = (
            weight_source(graph_module, user) is not None or is_batch_norm(module) or is_normprop(module)
        )
        if layer or isinstance(module, DATA_NORMS) or key(user) in ("getattr", "size", "dim"):
            continue
        if data_of(graph_module, user) is None or not _leads_to_layers(graph_module, user):
            return False
    return bool(node.users)


def is_constant(graph_module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a tensor that the model holds and does not learn, moved or not."""
    if node.op == "get_attr":
        return not isinstance(attribute(graph_module, node), nn.Parameter)
    return moves(graph_module, node) and all(is_constant(graph_module, n) for n in tensor_inputs(node))


_SAME = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div",
    "concat": "cat", "concatenate": "cat", "multiply": "mul", "divide": "div", "subtract": "sub",
    "bmm": "matmul", "_threshold": "threshold",
}  # fmt: skip


def _spelling(name: str) -> str:
    name = name.removesuffix("_") if not name.endswith("__") else name
    return _SAME.get(name, name)


_ROWS = {
    function.__name__.removesuffix("_"): row for row in activations.TABLE for function in row.functions
}


def activation_of(node: fx.Node, module: nn.Module | None) -> nn.Module | None:
    """The element-wise activation that a node applies to its one input, as a module; None if none."""
    if module is not None:
        if type(module) in activations.BY_MODULE:
            return module
        return own_activation(module)
    row = _ROWS.get(key(node)) if node.op in ("call_function", "call_method") else None
    if row is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if any(isinstance(v, fx.Node) for v in (*node.args[1:], *kwargs.values())):
        return None
    names = row.parameters
    values = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    return row.module(**values) if values else row.build()


def weight_source(graph_module: nn.Module, node: fx.Node) -> tuple[str, nn.Module] | None:
    """Path and module of a weight layer that a node computes; ``F.conv2d(x, self.weight)`` counts."""
    module = module_of(graph_module, node)
    if module is not None:
        ours = isinstance(module, NormPropLayer)
        return (str(node.target), module) if ours or is_weight_layer(module) else None
    if node.op != "call_function" or key(node) not in _FUNCTIONAL_WEIGHTS or len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    path, _, name = str(weight.target).rpartition(".")
    owner = graph_module.get_submodule(path)
    if name != "weight" or not isinstance(owner, WEIGHT_LAYERS) or not _calls_as_built(node, path, owner):
        return None
    return path, owner


def _calls_as_built(node: fx.Node, path: str, layer: Any) -> bool:
    """Whether a function call does what its weight's layer would do, but for the padding."""
    if getattr(layer, "transposed", False) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    names = ("bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
    bias = given.pop("bias", None)
    own = (
        isinstance(bias, fx.Node)
        and bias.op == "get_attr"
        and str(bias.target) == f"{path}.bias".lstrip(".")
    )
    if not (own if layer.bias is not None else bias is None):
        return False
    for name, default in (("stride", 1), ("dilation", 1), ("groups", 1)):
        if hasattr(layer, name):
            value: Any = given.get(name, default)
            built = getattr(layer, name)
            if isinstance(built, tuple) and isinstance(value, int):
                value = (value,) * len(built)
            if (tuple(value) if isinstance(built, tuple) else value) != built:
                return False
    return True


def is_functional_norm(node: fx.Node) -> bool:
    """Whether a node is ``F.batch_norm``."""
    return key(node) == "batch_norm" and node.op == "call_function"


def is_parametrized(module: nn.Module) -> bool:
    """Whether its weight is computed from other parameters: by parametrize, or by a hook as older tools do."""
    return parametrize.is_parametrized(module) or "weight" not in module._parameters


def nodes_in(value: Any) -> list[fx.Node]:
    """What of an argument, or of a part of it, is computed in the graph: in order, each as often as it is named."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, note)
    return found


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A function's or method's argument, by its place or its name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def attribute(root: nn.Module, node: fx.Node) -> Any:
    """What a ``get_attr`` node reads."""
    return operator.attrgetter(str(node.target))(root)


def call(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node that calls something makes of these arguments."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def shape(node: Any) -> tuple[int, ...] | None:
    """The shape that the example gives a node's tensor; None if unknown."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in order, each as often as it is named."""
    return nodes_in((node.args, node.kwargs))


def owner(node: fx.Node) -> str:
    """Path of the module in whose forward a node is written."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
