r"""``fold``: a NormProp model as plain torch, for inference.

The graph is built anew, node by node. What a node returns is held as ``a * u + b``, u being a node of
the new graph and a, b numbers: an activation's constants, a pool's, a sum's weights wait there until
something takes them in exactly - a convolution's weight and bias, the next sum, a threshold - or until
they have to be written down as one element-wise operation (docs/method.md, section 13).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normprop import activations, functional, modules, pools
from normprop.data_norm import DATA_NORMS, BatchDataNorm, WhiteningDataNorm
from normprop.graph import inplace, reading, trace as tracing
from normprop.graph.lighten import lighten_
from normprop.graph.reading import TraceError, key, shape, tensor_inputs
from normprop.graph.trace import below, has, place
from normprop.records import MOVES

_LEAVES = ("normprop.modules", "normprop.data_norm")
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest output


class FoldError(ValueError):
    """The folded model does not compute what the model computes, or something of ours cannot be folded."""


@torch.no_grad()
def fold(model: nn.Module, verify: Any = None) -> nn.Module:
    """``model.eval()`` in torch's own modules and functions; ``model`` is left untouched.

    Row norms and constants become weights wherever that is exact, also at zero-padded borders (the raw
    map is padded with its mean), through pools and sums; what is left is one element-wise affine map.

    Args:
        model: A model with normprop's layers.
        verify: An input, or a tuple of them: outputs are compared there (relative error 1e-4 in
            float32, or twice the model's own rounding if that is more; 1e-9 in float64, 5e-2 in halves),
            and the code's decisions on shapes are taken with it.

    Returns:
        A graph module in eval mode, for inputs of any size that the model takes; of ``verify``'s size
        where the code turns sizes into Python numbers, or pools adaptively by maxima. Where torch.fx cannot
        follow the model's own code: a copy of the model, its parts folded one by one.

    Raises:
        FoldError: If outputs differ at ``verify``; without it, if constants depend on the input's size or
            there are forward hooks, which the result does not run.
        TraceError: For a model that is wrapped (DDP, torch.compile), TorchScript, and a layer with a forward of
            its own.

    Example:
        >>> layer = modules.NormPropLinear(8, 4)
        >>> [type(m).__name__ for m in fold(nn.Sequential(layer), verify=torch.randn(2, 8)).children()]
        ['Linear', 'Threshold']
    """
    modules.check_model(model)
    tracing.check_unwrapped(model)
    twin = tracing.copied(model).eval()
    inputs = () if verify is None else tracing.as_inputs(verify, "verify")
    hooked = _hooked(model)
    if hooked and not inputs:
        raise FoldError(
            f"{', '.join(hooked)}: forward hooks, which the folded model does not run; remove them, or pass verify= "
            "if they change nothing"
        )
    if without := tracing.without_values(model):
        raise FoldError(f"'{without}' has no values (device meta): load the weights first")
    expected = _outputs(twin, [x.clone() for x in inputs]) if inputs else None
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    folded: nn.Module
    try:
        folded = _folded(twin, verify, dtype)
    except TraceError:
        twin = tracing.copied(model).eval()  # the other one ran, and its code may have kept something
        folded = _parts_folded(twin, inputs or None, dtype)
    if inputs:
        # Code that stayed may keep something when it runs.
        runs = folded if isinstance(folded, fx.GraphModule) else copy.deepcopy(folded)
        _check(model, inputs, expected, _outputs(runs, inputs), hooked)
    return folded


def _folded(model: nn.Module, verify: Any, dtype: torch.dtype) -> fx.GraphModule:
    light = tracing.trace(model, verify)
    tracing.check_whole(light)
    lighten_(light, model.modules())
    light.recompile()
    graph_module = tracing.trace(light, verify, _LEAVES)
    inplace.write_nothing_in_place(graph_module)
    return _Folder(graph_module, verify is not None, dtype).run()


def _parts_folded(model: nn.Module, inputs: Any, dtype: torch.dtype) -> nn.Module:
    """A model whose code cannot be followed: what it holds is folded, in place."""

    def visit(part: nn.Module, path: str, inputs: Any, calls: dict[nn.Module, Any]) -> None:
        """``inputs`` are the tensors that a part is called with, ``calls`` those of modules inside, if known."""
        tracing.check_forward(part)
        if inputs is not None:
            calls = tracing.calls_within(part, inputs) or {}
        for name, child in list(part.named_children()):
            where, ours = below(path, name), reading.home_of_forward(child) in reading.OURS
            graph = isinstance(child, (fx.GraphModule, tracing.ByMode))
            if ours and hasattr(child, "fuse"):
                tracing.put_in_place_of(child, child.fuse(), model)  # type: ignore[operator]
            elif ours or graph or type(child) is nn.Sequential:
                try:
                    folded = _folded(child, calls.get(child), dtype)
                    tracing.keep_attributes(child, folded)
                    tracing.put_in_place_of(child, folded, model)
                except TraceError as error:
                    if ours:
                        raise FoldError(
                            f"{where} ({type(child).__name__}) cannot be folded by itself: {error}"
                        ) from error
                    visit(child, where, calls.get(child), calls)
            else:
                visit(child, where, calls.get(child), calls)

    visit(model, "", inputs, {})
    return model


def _hooked(model: nn.Module) -> list[str]:
    """Modules with forward hooks that the folded model does not run: it itself, and layers of ours."""
    named = model.named_modules()
    lost = (name for name, m in named if (m is model or type(m).__module__ in reading.OURS) and _hooks(m))
    return [f"'{name or 'model'}'" for name in lost]


def _hooks(module: nn.Module) -> bool:
    """Whether there are forward hooks of the user's."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("normprop.") for hook in hooks)


def _drops(node: fx.Node) -> bool:
    """Whether it is a dropout, written as a function, that draws in eval mode too."""
    return "dropout" in key(node) and bool(reading.argument(node, 2, "training", True))


def _outputs(model: nn.Module, inputs: Sequence[Tensor], seed: int = 0) -> Any:
    """What a model makes of inputs; what it draws at random is the seed's."""
    devices = sorted({x.get_device() for x in inputs if x.is_cuda})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        return model(*inputs)


def _is_plain_layer(module: Any) -> bool:
    """Whether a weight layer's numbers may be changed."""
    return reading.is_weight_layer(module) and not (reading.is_parametrized(module) or _hooks(module))


def _check(
    model: nn.Module, inputs: tuple[Any, ...], expected: Any, actual: Any, hooked: Sequence[str]
) -> None:
    # Outputs may be cast to more digits than they were computed with.
    dtypes = {x.dtype for x in (*model.parameters(), *inputs) if x.is_floating_point()}
    least = min((_LIMITS.get(dtype, 5e-2) for dtype in dtypes), default=0.0)
    gaps = [(gap, max(limit, least)) for gap, limit in _gaps(expected, actual)]
    single = _LIMITS[torch.float32]
    if any(limit == single and not gap <= limit for gap, limit in gaps):
        # It may be the model that loses so many digits, unless it draws numbers: those of float64 are others.
        twin = copy.deepcopy(model).eval()
        draws = any(gap > 0 for gap, _ in _gaps(_outputs(twin, inputs, seed=1), expected))
        doubles = [x.double() if x.is_floating_point() else x for x in (x.cpu() for x in inputs)]
        own = _gaps(_outputs(twin.cpu().double(), doubles), expected)
        gaps = [
            (gap, max(limit, 2 * rounding) if limit == single and not draws else limit)
            for (gap, limit), (rounding, _) in zip(gaps, own, strict=True)
        ]
    for gap, limit in gaps:
        if not gap <= limit:
            raise FoldError(
                f"the folded model differs from the model by {gap:.2g} of the largest output "
                f"(limit {limit:.0e}); "
                + (
                    f"it does not run the forward hooks of {', '.join(hooked)}"
                    if hooked
                    else "if verify is finite, please report the model"
                )
            )


def _gaps(expected: Any, actual: Any) -> list[tuple[float, float]]:
    """Of each output of real numbers the largest difference, relative to its largest value, and the limit."""
    found = []
    for one, other in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            scale = one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            gap = (other.to(one.device) - one).abs().max() / scale
            found.append((float(gap.float()), _LIMITS.get(one.dtype, 5e-2)))
    return found


class _Value:
    """``a * node + b`` in the new graph."""

    def __init__(self, node: Any, a: float = 1.0, b: float = 0.0) -> None:
        self.node, self.a, self.b = node, a, b

    @property
    def plain(self) -> bool:
        return self.a == 1.0 and self.b == 0.0


class _Folder:
    def __init__(self, source: fx.GraphModule, sized: bool, dtype: torch.dtype) -> None:
        self.source = source
        self.sized = sized  # whether shapes are those of an input that was given
        self.dtype = dtype  # of the data, normalised
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, _Value] = {}
        self.names: set[str] = set()
        self.calls: dict[str, int] = {}
        for node in source.graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            self.values[node] = self.translate(node)
        result = fx.GraphModule(self.root, self.graph, f"Folded{type(self.source).__name__}").eval()
        result.graph.eliminate_dead_code()
        result.delete_all_unused_submodules()
        _write_in_place(result)
        result.recompile()
        return result

    # Nodes of the new graph ---------------------------------------------------------------------

    def value(self, node: fx.Node) -> fx.Node:
        """The node's value itself, its affine map written down."""
        held = self.values[node]
        if held.plain:
            return held.node
        layer = self.own_layer(held.node)
        readers = [n for n, value in self.values.items() if value.node is held.node]
        if layer is not None and not held.node.users and all(len(n.users) == 1 for n in readers):
            _scale_output(layer, held.a, held.b)
            new = held.node
        elif held.b == 0.0:
            new = self.call(torch.mul, held.node, held.a)
        else:
            new = self.call(torch.rsub, held.node, held.b, alpha=-held.a)
        self.values[node] = _Value(new)
        return new

    def own_layer(self, node: fx.Node) -> Any:
        """The weight layer that a node of the new graph calls, if nothing else calls it."""
        if node.op != "call_module":
            return None
        layer = self.root.get_submodule(str(node.target))
        own = _is_plain_layer(layer) and self.calls.get(str(node.target), 1) == 1
        return layer if own else None

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def module(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        place(self.root, path, module)
        return self.graph.call_module(path, args, kwargs)

    def buffer(self, path: str, tensor: Tensor) -> fx.Node:
        name = path.replace(".", "_")
        while hasattr(self.root, name):
            name += "_"
        self.root.register_buffer(name, tensor.detach().clone())
        return self.graph.get_attr(name)

    # Translation --------------------------------------------------------------------------------

    def translate(self, node: fx.Node) -> _Value:
        module = reading.module_of(self.source, node)
        if isinstance(module, modules.NormalizedActivation):
            return self.activation_module(node, module)
        if isinstance(module, DATA_NORMS):
            return self.data_norm(node, module)
        if isinstance(module, modules.NormPropLayer) or _is_plain_layer(module):
            return self.weight_layer(node, module)
        if module is not None and type(module).__module__ not in reading.OURS and _hooks(module):
            return self.copied(node, module)
        if isinstance(module, pools.AdaptiveMaxPool):
            return self.adaptive_max_pool(node, module)
        held = [self.values[n] for n in tensor_inputs(node)]
        of_shape = key(node) == "getattr" and node.args[1] in ("shape", "ndim", "dtype", "device")
        if of_shape or key(node) in ("size", "dim"):  # the raw map has the same
            return _Value(self.graph.node_copy(node, lambda n: self.values[n].node))
        if all(value.plain for value in held) and key(node) not in reading.ARITHMETIC:
            return self.copied(node, module)
        return self.waiting(node, module) or self.copied(node, module)

    def copied(self, node: fx.Node, module: nn.Module | None) -> _Value:
        """The node as it is, its inputs written down."""
        for source in dict.fromkeys(tensor_inputs(node)):
            self.value(source)
        if module is not None:
            place(self.root, str(node.target), module)
        elif node.op == "get_attr":
            path = str(node.target).rpartition(".")[0]
            if path in self.calls:  # what stands there will be a layer with other numbers
                return _Value(self.buffer(str(node.target), reading.attribute(self.source, node)))
            self.attribute(str(node.target))
        return _Value(self.graph.node_copy(node, lambda n: self.values[n].node))

    def attribute(self, target: str) -> None:
        path, _, name = target.rpartition(".")
        tensor = getattr(self.source.get_submodule(path), name)
        if path and not has(self.root, path):
            place(self.root, path, nn.Module())
        owner = self.root.get_submodule(path)
        if not hasattr(owner, name):
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name, tensor)
            else:
                owner.register_buffer(name, tensor)

    def waiting(self, node: fx.Node, module: nn.Module | None) -> _Value | None:
        """The node on raw inputs, their affine map behind it; None if that is not exact."""
        what = key(node)
        inputs = tensor_inputs(node)
        first = self.values[inputs[0]]
        value = node.meta.get("value")
        if not (isinstance(value, Tensor) and value.is_floating_point()) or not all(
            isinstance(n.meta.get("value"), Tensor) for n in inputs
        ):
            return None  # a size, or a tuple
        numbers = [a for a in node.args[1:] if isinstance(a, (int, float))]
        if len(inputs) == 1 and first.a > 0:
            if isinstance(module, nn.ReLU) or what == "relu":
                return self.above(first, 0.0)
            threshold = _threshold_of(node, module)
            if threshold is not None:
                return self.above(first, threshold)
            indices = getattr(module, "return_indices", False) or node.kwargs.get("return_indices")
            if self.commutes(node) and not indices:
                new = self.graph.node_copy(node, lambda n: self.values[n].node)
                if module is not None:
                    place(self.root, str(node.target), module)
                return _Value(new, first.a, first.b)
        if (
            len(inputs) == 1
            and node.args
            and isinstance(node.args[0], fx.Node)
            and len(numbers) == len(node.args) - 1 == 1
        ):
            number = float(numbers[0])
            if "rounding_mode" in node.kwargs or (what in ("mul", "div") and number == 0.0):
                return None
            if what == "mul":
                return _Value(first.node, first.a * number, first.b * number)
            if what == "div":
                return _Value(first.node, first.a / number, first.b / number)
            if what in ("add", "sub", "rsub"):
                alpha = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
                if what == "rsub":
                    return _Value(first.node, -alpha * first.a, number - alpha * first.b)
                sign = 1.0 if what == "add" else -1.0
                return _Value(first.node, first.a, first.b + sign * alpha * number)
        if (
            what == "add"
            and len(inputs) == 2
            and len(node.args) == 2
            and shape(inputs[0]) == shape(inputs[1])
        ):
            second = self.values[inputs[1]]
            alpha = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
            ratio = alpha * second.a / first.a
            extra = {} if ratio == 1.0 else {"alpha": ratio}
            new = self.call(torch.add, first.node, second.node, **extra)
            return _Value(new, first.a, first.b + alpha * second.b)
        if what == "cat":
            held = [self.values[n] for n in inputs]
            if all((value.a, value.b) == (first.a, first.b) for value in held):
                return _Value(self.graph.node_copy(node, lambda n: self.values[n].node), first.a, first.b)
        return None

    def commutes(self, node: fx.Node) -> bool:
        """Whether an affine map of positive slope can come after a node as well as before it."""
        name = reading.operation_name(self.source, node)
        kind, adaptive, _ = reading.POOLS.get(name, ("", False, 0))
        fits = kind == "max" or adaptive  # zero padding would take part in other averages
        return (name in MOVES or name in ("getitem", "mean", "amax") or fits) and not _drops(node)

    def above(self, held: _Value, threshold: float) -> _Value:
        """``max(a * u + b, t) = a * max(u, (t - b) / a) + b`` for a above 0."""
        level = (threshold - held.b) / held.a
        return _Value(self.call(F.threshold, held.node, level, level), held.a, held.b)

    def data_norm(self, node: fx.Node, module: Any) -> _Value:
        """The data's mean and std, and filters if there are any, as buffers."""
        path, source = str(node.target), self.value(tensor_inputs(node)[0])
        if isinstance(module, BatchDataNorm):
            mean, std = (
                v.view(module.shape) for v in (module.running_mean, (module.running_var + 1e-8).sqrt())
            )
        else:
            norm = module.norm if isinstance(module, WhiteningDataNorm) else module
            mean, std = norm.mean, norm.divisor
        names = [self.buffer(f"{path}_{n}", v) for n, v in (("mean", mean), ("std", std))]
        value = self.call(torch.div, self.call(torch.sub, source, names[0]), names[1])
        value = self.graph.call_method("to", (value, self.dtype))
        if isinstance(module, WhiteningDataNorm):
            weight = self.buffer(f"{path}_weight", module.weight.to(self.dtype))
            if margins := module.margins:
                value = self.call(F.pad, value, margins, "reflect")
            value = self.call(module.operation, value, weight)
        return _Value(value)

    def adaptive_max_pool(self, node: fx.Node, module: Any) -> _Value:
        """Its windows depend on the input's size: the constants are those of the example's."""
        source = tensor_inputs(node)[0]
        before = shape(source)
        if before is None or not self.sized:
            raise FoldError(f"{node.target}: its constants depend on the input's size; pass verify=")
        kind = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[module._spatial - 1]
        pooled = self.module(str(node.target), kind(module.output_size), self.value(source))
        constants = module.constants_of(before[-module._spatial :])
        if constants[0].ndim == 0:
            return _Value(pooled, *(float(c) for c in constants))
        like = next(self.source.parameters(), constants[0])
        maps = [
            self.buffer(f"{node.target}_{name}", c.to(like))
            for name, c in zip(("scale", "shift"), constants, strict=True)
        ]
        return _Value(self.call(torch.addcmul, maps[1], pooled, maps[0]))

    def weight_layer(self, node: fx.Node, layer: Any) -> _Value:
        """A linear map that takes in what waits before it; then the activation."""
        path = str(node.target)
        source = tensor_inputs(node)[0]
        if reading.is_normprop(layer):
            (plain, mean, std), activation = layer.plain(), layer.activation
        else:
            plain, mean, std, activation = copy.deepcopy(layer), 0.0, 1.0, None
        held = self.values[source]
        one_sided = getattr(plain, "padding", None) == "same" and _padding(plain) is None
        exact = held.b == 0.0 or not one_sided or all(k == 1 for k in plain.kernel_size)
        if not held.plain and exact and self.calls[path] == 1 and self.absorb(plain, held):
            reads = held.node
            if held.b != 0.0 and _padding(plain) is not None:
                sides = [side for p in reversed(_padding(plain) or ()) for side in (p, p)]
                reads = self.call(F.pad, reads, sides, "constant", -held.b / held.a)
                plain.padding = (0,) * len(plain.kernel_size)
        else:
            reads = self.value(source)
        rest, named = fx.node.map_arg((node.args[1:], node.kwargs), lambda n: self.values[n].node)
        y = self.module(path, plain, reads, *rest, **{k: v for k, v in named.items() if k != "input"})
        return self.activated(path, y, activation, mean, std, layer, plain)

    def absorb(self, plain: Any, held: _Value) -> bool:
        """Put ``a * u + b`` before a linear map into its weight and bias; False if that is not exact."""
        if getattr(plain, "transposed", False) and held.b != 0.0:
            return False  # how many taps reach a position depends on it
        weight = plain.weight.double()
        if held.b != 0.0:
            total = weight.flatten(1).sum(1) * held.b
            bias = total if plain.bias is None else plain.bias.double() + total
            plain.bias = nn.Parameter(bias.to(plain.weight.dtype), requires_grad=plain.weight.requires_grad)
        plain.weight.copy_(weight * held.a)
        return True

    def activated(
        self,
        path: str,
        y: fx.Node,
        activation: nn.Module | None,
        mean: Any,
        std: Any,
        layer: Any,
        plain: Any,
    ) -> _Value:
        """``(phi(y) - mean) / std``."""
        if activation is None:
            return _Value(y)
        along = getattr(layer, "channel_dim", None)
        if type(activation) is nn.ReLU and along is not None:
            # phi is homogeneous: 1/std went into the weight, -mean/std into the bias (see ``plain``).
            low = -mean / std
            if isinstance(low, float):
                return _Value(self.module(f"{path}_relu", nn.Threshold(low, low) if low else nn.ReLU(), y))
            level = self.buffer(f"{path}_low", functional.along(low, plain.weight, along))
            return _Value(self.call(torch.maximum, y, level))
        phi = activations.plain_module(activation).eval()
        y = self.module(f"{path}_{_word(activation)}", phi, y)
        if isinstance(mean, float) and isinstance(std, float):
            return _Value(y, 1 / std, -mean / std)
        return self.per_channel(path, y, 1 / std, -mean / std, layer, along)

    def per_channel(
        self, path: str, x: fx.Node, scale: Any, shift: Any, like: Any, dim: int | None
    ) -> _Value:
        """``scale * x + shift`` with one value a channel, on dim 1 if ``dim`` is None."""
        tensor = next(like.parameters())
        scale, shift = (torch.as_tensor(v, device=tensor.device).double().flatten() for v in (scale, shift))
        if len(scale) == len(shift) == 1:
            return _Value(x, float(scale), float(shift))
        scale, shift = torch.broadcast_tensors(scale, shift)
        names = [
            self.buffer(f"{path}_{n}", v.to(tensor.dtype)) for n, v in (("scale", scale), ("shift", shift))
        ]
        if dim is None:  # the number of dims is the input's
            moved = self.call(torch.movedim, x, 1, -1)
            return _Value(
                self.call(torch.movedim, self.call(torch.addcmul, names[1], moved, names[0]), -1, 1)
            )
        sizes = (-1, *[1] * (-dim - 1))
        views = [self.call(torch.reshape, name, sizes) for name in names] if dim < -1 else names
        return _Value(self.call(torch.addcmul, views[1], x, views[0]))

    def activation_module(self, node: fx.Node, module: modules.NormalizedActivation) -> _Value:
        path = str(node.target)
        source = tensor_inputs(node)[0]
        mean, std = module.mean_std()
        if module.gain is not None and module.bias is not None:
            held = self.values[source]
            gain = module.gain.double()
            scale, shift = gain * held.a, gain * held.b + module.bias.double()
            size = shape(source)
            if size is not None and len(size) == 2 and not self.sized:
                size = None  # (N, C) may be a wrong guess
            dim = None if size is None else 1 - len(size)
            value = self.per_channel(path, held.node, scale, shift, module, dim)
            self.values[node] = value
            y = self.value(node)
        else:
            y = self.value(source)
        known = isinstance(mean, float) and isinstance(std, float)
        if isinstance(module.activation, nn.Identity) and known and (mean, std) == (0.0, 1.0):
            return _Value(y)
        return self.activated(path, y, module.activation, mean, std, module, module)


def _write_in_place(graph_module: fx.GraphModule) -> None:
    """Activations overwrite what a weight layer or a sum has just made for them alone."""
    nodes = [n for n in graph_module.graph.nodes if n.op in ("call_module", "call_function")]
    paths = [n.target for n in nodes if n.op == "call_module"]
    for node in nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        made = source.target in (torch.add, torch.mul, torch.addcmul)
        if source.op == "call_module":
            made = isinstance(graph_module.get_submodule(str(source.target)), reading.WEIGHT_LAYERS)
        if not made:
            continue
        if node.target is F.threshold:
            node.kwargs = dict(node.kwargs) | {"inplace": True}
        elif node.op == "call_module" and paths.count(node.target) == 1:
            module = graph_module.get_submodule(node.target)
            if isinstance(module, (nn.ReLU, nn.Threshold)):
                module.inplace = True


def _padding(layer: Any) -> list[int] | None:
    """Zeros that a layer puts around its input, one number an axis; None if none."""
    padding = getattr(layer, "padding", None)
    if padding is None or layer.padding_mode != "zeros" or padding == "valid":
        return None
    if padding == "same":
        if any(d * (k - 1) % 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)):
            return None
        padding = [d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return list(padding) if any(padding) else None


def _scale_output(layer: Any, a: float, b: float) -> None:
    bias = torch.zeros_like(layer.weight[:, 0].flatten()[:1]) if layer.bias is None else layer.bias
    units = layer.out_channels if getattr(layer, "transposed", False) else layer.weight.shape[0]
    bias = bias.double().expand(units) * a + b
    layer.weight.mul_(a)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _threshold_of(node: fx.Node, module: nn.Module | None) -> float | None:
    """t, if the node is ``max(x, t)``."""
    if isinstance(module, nn.Threshold):
        return module.threshold if module.threshold == module.value else None
    if key(node) == "threshold" and len(node.args) == 3 and node.args[1] == node.args[2]:
        return float(node.args[1])  # type: ignore[arg-type]
    return None


def _word(activation: nn.Module) -> str:
    return "".join(
        c for c in activations.name_of(activation).split("(")[0].lower() if c.isalnum() or c == "_"
    )
