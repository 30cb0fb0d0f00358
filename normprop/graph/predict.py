r"""``predict``: mean, variance and gradient gain of every node, by formula, before any data.

Each node has one rule, from the signals that it reads to the signal that it returns, and to the
factors by which the squared L2 norm of the gradient (of the whole map) at its output turns into that at
its inputs (docs/method.md, section 9). What has no rule is said to have none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from normprop import activations, functional, pools
from normprop.data_norm import DATA_NORMS
from normprop.density import (
    FEW_NODES,
    alike,
    by_pair,
    by_term,
    chance_of_most,
    extreme,
    in_average,
    interpolate,
    of_some,
    picked,
    product,
    ratio,
    sum_of,
    through_channels,
    through_sum,
)
from normprop.graph import reading, trace as tracing
from normprop.graph.reading import argument, key, shape, tensor_inputs
from normprop.graph.taps import even_out, phase_sums, positions, taps_of, transposed_share
from normprop.merges import (
    NormalizedAdd,
    NormalizedCat,
    NormalizedGate,
    RectifiedSum,
    ShiftedReLU,
    Standardize,
)
from normprop.modules import NormalizedActivation, check_model
from normprop.records import LAYOUT, Record, SignalTrace
from normprop.signal import Signal, gaussian_nodes, with_slope

# How the square of a gradient's L2 norm passes to an input: a factor, or a function from its density over the
# output's values to that over the input's (a number where it is the same for all).
Factor = float | Callable[[Tensor], Tensor | float]
Result = tuple[Signal, list[Any]]

_NUMBERS = {"add", "sub", "mul", "div", "neg", "pow", "rsub"}
# Over dims that the code names, as reading.POOLS has pools.
_REDUCTIONS = {
    "mean": ("avg", True, 0), "sum": ("avg", True, 0), "amax": ("max", True, 0), "max": ("max", True, 0),
    "amin": ("min", True, 0), "min": ("min", True, 0),
}  # fmt: skip
# Of what moves elements, what leaves them in their places.
_SAME_PLACES = {"detach", "clone", "contiguous", "to", "float", "type_as", "Identity"}
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Where their weights and biases stand as arguments.
_FUNCTIONAL_NORMS = {
    "batch_norm": (3, 4),
    "instance_norm": (3, 4),
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "rms_norm": (2, 4),
}
_GLOBAL = 49  # positions of a global pool where sizes are unknown: 7x7
_AVERAGES = (pools.AvgPool, pools.AdaptiveAvgPool)
_MAXIMA = (pools.MaxPool, pools.AdaptiveMaxPool)
_LAW_NODES = 257
SMALL_FAN_IN = 32  # up to which the distribution of a layer's sums is computed, above it is Gaussian


@torch.inference_mode(False)
def predict(model: nn.Module, example: Any) -> SignalTrace:
    """The signal through ``model`` by formula: no data, no training step.

    The graph's inputs are taken as N(0, 1), or what constants make of them in code: ``(x / 255 - mean) / std``.
    A weight layer's rows are taken as unrelated to what it reads: exact on average over random weights, an
    approximation after training, which :func:`normprop.measure` checks.

    Args:
        model: Any model; it is not changed.
        example: An input, or a tuple of them; only shapes are read. Code that torch.fx cannot follow runs on it.

    Returns:
        :class:`SignalTrace`: a record for each node. Where torch.fx cannot follow the model's own code: one for
        each node of its parts, each part taken to read N(0, 1), gradients being those of the part's own output.

    Raises:
        TraceError: If torch.fx can follow neither the code nor any part.
        ValueError: If weights are on the meta device.
    """
    check_model(model)
    if without := tracing.without_values(model):
        raise ValueError(
            f"predict reads the weights, and '{without}' has no values (device meta): "
            "model.to_empty(device='cpu') and initialise it first"
        )
    tracing.check_unwrapped(model)
    twin = tracing.copied(model, model.parameters())
    try:
        return walk(tracing.trace(twin, example)).trace()
    except tracing.TraceError as error:
        reason = str(error)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        inputs = tracing.as_inputs(example)
        parts = tracing.parts(
            twin, tuple(torch.zeros_like(x, device=device) if x.is_meta else x for x in inputs)
        )
        if not parts:
            raise
    records = [
        in_whole(part, record) for part in parts for record in walk(part.graph_module, whole=False).trace()
    ]
    for record in records:
        if record.op == "input":
            record.note = "taken as N(0, 1): it comes from code that is not followed"
    if records:
        records[0].note += f" ({reason})"
    return SignalTrace(records)


def in_whole(part: tracing.Part, record: Record, call: int = 0) -> Record:
    """A record of a part named as in the whole model; ``call`` counts the part's calls from 0."""
    plain = part.path.replace(".", "_") + (f"_{call}" if call else "")
    if part.alone and record.path:
        return replace(record, name=plain, path=part.path)
    return replace(
        record, name=f"{plain}_{record.name.lstrip('_')}", path=tracing.below(part.path, record.path)
    )


class Walk:
    """Signals and gradient factors of the nodes of one graph."""

    def __init__(self, graph_module: fx.GraphModule, drops: bool = True, whole: bool = True) -> None:
        self.graph_module = graph_module
        self.drops = drops  # whether dropout in training mode counts as dropping
        self.whole = whole  # whether the graph's inputs are the data, not what code around it made
        self.given: dict[fx.Node, Signal] = {}  # what the graph's inputs are, if not N(0, 1)
        self.signals: dict[fx.Node, Signal | None] = {}
        self.factors: dict[fx.Node, list[tuple[fx.Node, Factor]]] = {}
        # The mean square at each position over that of all: zero padding takes from the borders.
        self.energies: dict[fx.Node, Tensor] = {}
        # How a gradient's share of each position passes to the input's, of mean 1 if it was even.
        self.spreads: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        # Of a gradient's part that is the same at all positions: the share that is so at the input too.
        self.evens: dict[fx.Node, float | dict[fx.Node, float]] = {}
        # The gradient that overlapping taps of a layer with few inputs add, over the input's values.
        self.overlaps: dict[fx.Node, Tensor] = {}
        self.notes: dict[fx.Node, str] = {}
        # Mean and std of each channel, where it is Gaussian: behind weight layers and BatchNorm.
        self.channels: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        # The same with the function of it that the node is; of concats those of all parts.
        self.laws: dict[fx.Node, list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]] = {}
        # Mean of each channel, and the mean of their variances, there and behind functions of them.
        self.levels: dict[fx.Node, Tensor] = {}
        self.within: dict[fx.Node, float] = {}
        # Element-wise ancestry: (node, f) with this node's values = f(that node's values).
        self.origin: dict[fx.Node, tuple[fx.Node, Callable[[Tensor], Tensor]]] = {}
        # Where this node's randomness comes from: the nodes behind which no weight layer lies.
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}

    def visit(self, node: fx.Node) -> None:
        """Find the node's signal from those before it."""
        if node.op in ("output", "placeholder", "get_attr"):
            self._visit_end(node)
            return
        inputs = [n for n in tensor_inputs(node) if self.signals.get(n) is not None]
        self.roots[node] = frozenset().union(*(self.roots[n] for n in inputs)) if inputs else frozenset()
        value = node.meta.get("value")
        sources = tensor_inputs(node)
        module = reading.module_of(self.graph_module, node)
        if isinstance(module, DATA_NORMS):  # it may read bytes
            self.signals[node], self.factors[node] = Signal.gaussian(), [(n, 1.0) for n in inputs]
            self.roots[node] = self.roots[node] or frozenset([node])
            return
        if reading.moves(self.graph_module, node) and self.signals.get(sources[0]) is None:
            self.signals[node] = None  # other arguments than the first only give a shape or a type
            return
        if self.normalizes_data(node):
            factors = self._rule(node, module, inputs)[1] if inputs else []
            for known in (self.origin, self.channels, self.laws, self.levels, self.within, self.energies):
                known.pop(node, None)  # type: ignore[attr-defined]
            self.signals[node], self.factors[node] = (
                Signal.gaussian(),
                list(zip(inputs, factors, strict=False)),
            )
            self.notes[node] = "the model's own normalisation of the data: taken as N(0, 1)"
            return
        if sources and not inputs and (module is not None or key(node) == "embedding"):  # it reads integers
            rows = module.weight if isinstance(module, nn.Embedding) else None
            if rows is None or rows.is_meta or rows.numel() < 2:
                self.signals[node] = self._without_rule(node)
            else:
                var, mean = torch.var_mean(rows.detach().double().cpu())
                self.signals[node] = Signal.gaussian(float(mean), float(var.sqrt()))
            self.factors[node] = []
            return
        if not inputs or (isinstance(value, Tensor) and not value.is_floating_point()) or _is_number(value):
            self.signals[node] = None
            return
        signal, factors = self._rule(node, module, inputs)
        if "error" in node.meta and all("value" in n.meta for n in sources):
            self.notes[node] = f"fails with the example: {node.meta['error']}"
        self.signals[node] = signal
        kept = [n for n in inputs if n in self.energies and positions(n) == positions(node)]
        if kept and node not in self.energies:
            squares = torch.tensor([self._signal(n).rms ** 2 + 1e-30 for n in kept], dtype=torch.float64)
            self.energies[node] = sum(
                self.energies[n] * share for n, share in zip(kept, squares / squares.sum(), strict=True)
            )
        if node not in self.factors:
            factors = [*factors, *[0.0] * (len(inputs) - len(factors))]
            self.factors[node] = list(zip(inputs, factors, strict=True))

    def normalizes_data(self, node: fx.Node) -> bool:
        """Whether it is arithmetic on the data alone, which the model's author wrote to make them N(0, 1)."""
        return self.whole and _is_real(node) and reading.normalizes_data(self.graph_module, node)

    def _visit_end(self, node: fx.Node) -> None:
        self.roots[node] = frozenset([node])
        if node.op == "placeholder":
            self.signals[node] = self.given.get(node, Signal.gaussian()) if _is_real(node) else None
        elif node.op == "get_attr":
            tensor = reading.attribute(self.graph_module, node)
            real = isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
            self.signals[node] = Signal.of(tensor) if real and tensor.numel() else None
        else:
            inputs = [n for n in tensor_inputs(node) if self.signals.get(n) is not None]
            self.signals[node] = self.signals[inputs[0]] if inputs else None
            self.factors[node] = [(n, 1.0) for n in inputs]

    def _signal(self, node: fx.Node) -> Signal:
        signal = self.signals[node]
        assert signal is not None
        return signal

    # One node's rule ---------------------------------------------------------------------------

    def _rule(self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node]) -> Result:
        if reading.weight_source(self.graph_module, node) is not None:
            self.roots[node] = frozenset([node])
            return self._weight_layer(node, self._signal(inputs[0]), len(inputs))
        return self._rule_of_ours(node, module, inputs) or self._rule_of_torch(node, module, inputs)

    def _rule_of_ours(self, node: fx.Node, module: Any, inputs: list[fx.Node]) -> Result | None:
        if isinstance(module, NormalizedActivation):
            return self._normalized_activation(node, module, inputs[0])
        if isinstance(module, Standardize):
            return self._standardize(node, module, self._signal(inputs[0]))
        if isinstance(module, RectifiedSum):
            return self._rectified_sum(node, module, inputs)
        if isinstance(module, ShiftedReLU):
            return self._through(node, self._signal(inputs[0]), lambda values: values.clamp_min(module.low))
        if isinstance(module, NormalizedAdd):
            return self._normalized_add(node, module, inputs)
        if isinstance(module, NormalizedGate):
            self._check_correlation(node, inputs)
            phi = activations.of_one_variable(module.phi)
            with torch.no_grad():
                rms = float(torch.as_tensor(module.root_mean_square()).mean())
            x, z = (self._signal(n) for n in inputs)
            return product(x, z, lambda values: phi(values) / rms)[:2]
        return self._declared(node, module, inputs) if hasattr(module, "propagate") else None

    def _rule_of_torch(self, node: fx.Node, module: Any, inputs: list[fx.Node]) -> Result:
        what, first = key(node), inputs[0]
        single = len(inputs) == len(tensor_inputs(node)) == 1
        if self.drops and (dropped := _drop_share(node, module)):
            if dropped == 1:
                return Signal.constant(0.0), [0.0]
            signal, scale = self._signal(first), 1 / (1 - dropped)
            result = Signal.mixture([signal.affine(scale), Signal.constant(0.0)], [1 - dropped, dropped])
            return result, [of_some(signal.values * scale, scale, result)]
        if (name := reading.operation_name(self.graph_module, node)) in LAYOUT:
            if name in _SAME_PLACES:
                origin, function = self.origin.get(first, (first, _same))
                stopped = name == "detach"
                self.origin[node] = origin, (lambda u: function(u).detach()) if stopped else function
            if isinstance(first.meta.get("value"), tuple) and first in self.notes:  # tables do not show it
                self.notes[node] = self.notes[first]
            through = 0.0 if name == "detach" else _same
            return self._signal(first), [through] + [0.0] * (len(inputs) - 1)
        if reading.activation_of(node, module) is not None and len(inputs) == 1:
            return self._elementwise(node, module, first)
        if what in _NUMBERS and single:
            return self._elementwise(node, module, first)
        if what in ("add", "sub", "mul", "div") and len(inputs) == 2:
            return self._arithmetic(node, what, inputs)
        if what in ("cat", "stack"):
            return self._cat(node, inputs)
        if what == "pad" or type(module).__module__ == "torch.nn.modules.padding":
            return self._pad(node, module, first)
        if (pooled := self._pool(node, module, what, first)) is not None:
            return pooled
        if isinstance(module, _NORMS):
            return self._norm(node, module, first)
        if what in _FUNCTIONAL_NORMS:
            return self._functional_norm(node, what, inputs)
        if isinstance(module, (nn.Softmax, nn.LogSoftmax)) or what in ("softmax", "log_softmax"):
            return self._softmax(node, module, first)
        if isinstance(module, nn.GLU) or what == "glu":
            result, (to_map, to_gate), _ = product(self._signal(first), self._signal(first), torch.sigmoid)
            return result, [lambda density: to_map(density) + to_gate(density)]
        if what in ("matmul", "einsum") and len(inputs) == 2:
            return self._matmul(node, what, inputs)
        if what == "scaled_dot_product_attention":
            return self._attention(node, inputs)
        if isinstance(module, nn.Upsample) or what in ("interpolate", "upsample"):
            self.notes[node] = "interpolation: variance taken as kept"
            return self._signal(first), [_same]
        if single and (module is None or type(module).__module__ == "torch.nn.modules.activation"):
            try:  # any other function that acts on each element alone
                return self._elementwise(node, module, first)
            except Exception:
                pass
        return self._without_rule(node), [1.0] * len(inputs)

    def _standardize(self, node: fx.Node, module: Standardize, signal: Signal) -> Result:
        """Its constants are what is known of the map."""
        self._agrees(node, signal, module.mean, module.std)
        square = module.std**2
        return signal.standardized(), [lambda density: density / square]

    def _agrees(self, node: fx.Node, signal: Signal, mean: float, std: float) -> bool:
        """Whether what was measured of a map may be what formulas are about; notes where it is not quite."""
        ratio, shift = std / max(signal.std, 1e-9), abs(mean - signal.mean) / max(std, 1e-9)
        if not (0.8 < ratio < 1.25 and shift < 0.2):
            self.notes[node] = (
                f"its constants ({mean:.3g}, {std:.3g}) were measured; "
                f"by formula {signal.mean:.3g}, {signal.std:.3g}"
            )
        return 0.5 < ratio < 2.0 and shift < 1.0

    def _rectified_sum(self, node: fx.Node, module: RectifiedSum, inputs: list[fx.Node]) -> Result:
        self._check_correlation(node, inputs)
        total, passes = self._sum([self._signal(n) for n in inputs], [module.ratio, 1.0])
        signal, (above,) = self._through(node, total, lambda values: values.clamp_min(module.low))
        signal = signal if module.std is None else signal.standardized().affine(module.std)
        return signal, [lambda density, through=p: through(above(density)) for p in passes]

    def _normalized_add(self, node: fx.Node, module: NormalizedAdd, inputs: list[fx.Node]) -> Result:
        self._check_correlation(node, inputs)
        parts = [self._signal(n) for n in inputs]
        # A conversion measured the trunk's std; a lightened sum's stds, kept with its weights, undo their scale.
        if getattr(module, "constants", ()) == ("stds",) and parts[0].std > 0:
            parts[0] = parts[0].affine(module.stds[0] / parts[0].std)
        return self._sum(parts, module.factors)

    def _declared(self, node: fx.Node, module: Any, inputs: list[fx.Node]) -> Result:
        """What a module of ours says that it does."""
        if len(inputs) > 1:
            self._check_correlation(node, inputs)
        for kinds, even, name in ((_AVERAGES, 1.0, "average"), (_MAXIMA, 0.0, "max pool")):
            if isinstance(module, kinds):
                self.evens[node] = even
                self.notes[node] = f"{name}: neighbours' correlation taken as {module.correlation:.2g}"
        shapes = [shape(n) for n in inputs]
        try:
            known: Any = None if None in shapes else shapes
            signal, factors = module.propagate(*(self._signal(n) for n in inputs), shapes=known)
        except ValueError:  # its constants depend on a size that is not known
            return self._without_rule(node), [1.0] * len(inputs)
        first = self._signal(inputs[0])
        if isinstance(module, _MAXIMA):
            return signal, [self._through_maximum(inputs[0], signal, module, *module.window(known))]
        if isinstance(module, _AVERAGES):
            count, note = _window(node, module), self.notes[node]
            if module.correlation == 0 and inputs[0] in self.levels:  # whose differences do not average out
                signal = self._average(node, inputs[0], count).affine(math.sqrt(factors[0] * count))
            else:
                note += ", all channels as alike"
            self.notes[node] = note
            return signal, [in_average(first, signal, count, factors[0])]
        if isinstance(module, NormalizedCat):
            sizes = [1 if size is None else size[module.dim] for size in shapes]
            return signal, [
                of_some(self._signal(n).values * math.sqrt(factor * sum(sizes) / size), factor, signal)
                for n, size, factor in zip(inputs, sizes, factors, strict=True)
            ]
        if signal is first:  # its elements, some of them or several times
            return signal, [of_some(signal.values, factors[0], signal)]
        return signal, list(factors)

    def _through_maximum(
        self, source: fx.Node, result: Signal, module: Any, count: int, mean: float, std: float
    ) -> Factor:
        """How a gradient passes a normalised maximum of ``count``."""
        signal, law = self._signal(source), self._law(source)
        if module.correlation or law is None:
            chance = chance_of_most(signal, count, module.correlation)
        else:
            _, chance = extreme(signal, count, 1.0, law)
        return picked((signal.values - mean) / std, chance, result, 1 / std)

    def _cat(self, node: fx.Node, inputs: list[fx.Node]) -> Result:
        if all(n in self.laws for n in inputs):
            self.laws[node] = [law for n in inputs for law in self.laws[n]]
        sizes = [math.prod(shape(n) or (1,)) for n in inputs]
        shares = [size / sum(sizes) for size in sizes]
        parts = [self._signal(n) for n in inputs]
        result = Signal.mixture(parts, shares)
        return result, [of_some(p.values, share, result) for p, share in zip(parts, shares, strict=True)]

    def _attention(self, node: fx.Node, inputs: list[fx.Node]) -> Result:
        self.notes[node] = "attention taken as an average over all tokens"
        tokens = (shape(inputs[1]) or (1, 1))[-2]
        value = self._signal(inputs[2])
        result = Signal.gaussian(value.mean, value.std / math.sqrt(tokens))
        return result, [0.0, 0.0, 1.0 / tokens, *[0.0] * (len(inputs) - 3)]

    def _without_rule(self, node: fx.Node) -> Signal:
        self.notes[node] = (
            f"no rule for {reading.operation_name(self.graph_module, node)}: taken as N(0, 1)"
        )
        return Signal.gaussian()

    def _elementwise(self, node: fx.Node, module: nn.Module | None, source: fx.Node) -> Result:
        def step(values: Tensor) -> Tensor:
            values = values.clone()  # it may work in place
            if module is not None:
                phi = activations.exact(module)
                if not activations.is_learned(phi):
                    return phi(values)
                channels = max(p.numel() for p in phi.parameters())
                return phi(values[:, None].expand(-1, channels)).mean(1)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: values)
            return reading.call(self.graph_module, node, args, kwargs)

        probe = torch.linspace(-1, 1, 5, dtype=torch.float64)
        result = step(probe.clone())
        if result.shape != probe.shape or not torch.allclose(
            step(probe[1:3].clone()), result[1:3], equal_nan=True
        ):
            raise ValueError("not element-wise")
        origin, function = self.origin.get(source, (source, _same))
        self.origin[node] = (origin, lambda values: step(function(values)))
        if origin in self.channels:
            whole = self.origin[node][1]
            self._set_channels(node, *self.channels[origin], lambda u: whole(u.flatten()).view_as(u))
        self._uneven(node, source, self._signal(source), lambda u: step(u.flatten()).view_as(u))
        return self._through(node, self._signal(source), step)

    def _through(self, node: fx.Node, signal: Signal, function: Callable[[Tensor], Tensor]) -> Result:
        """An element-wise function, and how the gradient passes it, element by element."""
        y, slope = with_slope(function, signal.values)
        self.evens[node] = ratio((signal.weights @ slope).square(), signal.weights @ slope.square())
        result = signal.image(y)
        return result, [lambda density: slope.square() * interpolate(y, result.values, density)]

    def _sum(self, parts: list[Signal], factors: Sequence[float]) -> Result:
        """A weighted sum of independent maps."""
        scaled = [part.affine(factor) for part, factor in zip(parts, factors, strict=True)]
        total = functools.reduce(Signal.plus, scaled)
        passes = []
        for index, part in enumerate(parts):
            others = scaled[:index] + scaled[index + 1 :]
            rest = functools.reduce(Signal.plus, others) if others else Signal.constant(0.0)
            passes.append(functools.partial(through_sum, part, factors[index], rest, total))
        return total, passes

    def _arithmetic(self, node: fx.Node, what: str, inputs: list[fx.Node]) -> Result:
        a, b = inputs
        one, other = (self.origin.get(n, (n, _same)) for n in (a, b))
        alpha = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
        operation = (
            getattr(torch, what) if alpha == 1.0 else functools.partial(getattr(torch, what), alpha=alpha)
        )
        if one[0] is other[0] and shape(a) == shape(b):  # x * sigmoid(x), x + x
            origin = one[0]

            def combined(values: Tensor) -> Tensor:
                return operation(one[1](values), other[1](values))

            signal, (passing,) = self._through(node, self._signal(origin), combined)
            self.origin[node] = (origin, combined)
            self.factors[node] = [(origin, passing)]
            return signal, []
        x, y = self._signal(a), self._signal(b)
        self._check_correlation(node, inputs)
        if what in ("add", "sub"):
            share = alpha if what == "add" else -alpha
            return self._sum([x, y], [1.0, share])
        result, passes, y = product(x, y, torch.reciprocal if what == "div" else _same)
        if shape(a) == shape(b):
            self.evens[node] = {n: s.mean**2 / max(s.rms**2, 1e-30) for n, s in ((a, y), (b, x))}
        return result, passes

    def _check_correlation(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        shared = frozenset.intersection(*(self.roots[n] for n in inputs))
        if shared:
            names = ", ".join(sorted(str(n) for n in shared)[:2])
            self.notes[node] = f"its inputs share {names}: correlated, taken as independent"

    def _uneven(
        self, node: fx.Node, source: fx.Node, read: Signal, function: Callable[[Tensor], Tensor]
    ) -> None:
        """Note what an element-wise function of an uneven map does to its energies and gradients."""
        if source in self.energies:
            slopes = self._by_place(node, self.energies[source], read, function)
            self.spreads[node] = lambda place: place * slopes if place.shape == slopes.shape else place

    def _by_place(
        self, node: fx.Node, energy: Tensor, read: Signal, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Note the node's energies where ``function``, of shape (n, channels), reads uneven ones.

        Args:
            node: The function's.
            energy: What it reads, by position, of mean 1.
            read: Of all positions together.
            function: Of shape (n, channels) or (n, 1), rising n being values of ``read``.

        Returns:
            The function's mean squared slope by position, of mean 1.
        """
        coarse, relative = Signal.of(read.values, read.weights, 65), energy.sqrt()
        levels = Signal.of(relative, bins=9).values
        u = coarse.mean + (coarse.values - coarse.mean)[:, None] * levels
        y, slope = with_slope(function, u.reshape(-1, 1))
        square, slope = (
            coarse.weights @ t.square().mean(1).view(len(coarse.values), -1) for t in (y, slope)
        )
        self.energies[node] = even_out(interpolate(relative, levels, square))
        return even_out(interpolate(relative, levels, slope))

    def _weight_layer(self, node: fx.Node, signal: Signal, count: int) -> Result:
        source = reading.weight_source(self.graph_module, node)
        assert source is not None
        layer: Any = source[1]
        weight, bias, finish = effective(layer)
        transposed, groups = functional.geometry_of(layer)
        rows = functional.row_view(weight, transposed, groups)
        dims = functional.fan_in_dims(rows, transposed)
        length = torch.linalg.vector_norm(rows, dim=dims).flatten()
        total = rows.sum(dims).flatten()
        # Shares of the taps, and of the input's variance, that the outputs get.
        taps = None if transposed else taps_of(node, layer)
        if taps is None:
            inside = kept = transposed_share(node, layer) if transposed else 1.0
        else:
            uneven = self.energies.get(tensor_inputs(node)[0])
            energy = taps.inside if uneven is None else taps.read(uneven)
            inside, kept = float(taps.inside.mean()), float(energy.mean())
        mean = signal.mean * inside * total + (0.0 if bias is None else bias)
        if transposed:  # an output position reads one of the stride's phases: their sums make its mean
            missing = phase_sums(rows, layer.stride).var(0, correction=0) * signal.mean**2
        else:  # where the padding's zeros stand, the mean is missing too
            missing = length.square() * max(inside * (1 - inside), 0.0) * signal.mean**2
        std = (length.square() * kept * signal.var + missing).sqrt()
        self._set_channels(node, mean, std, finish)
        fan_in = rows.numel() // max(1, len(length))
        z, small = Signal.gaussian(), 0 < fan_in <= SMALL_FAN_IN
        # Many taps of one channel tell no less of it than few do; their pairs must fit into memory.
        lone = rows.shape[1] == 1 and fan_in <= 16 * SMALL_FAN_IN
        overlap = taps if small or lone else None
        if small or overlap is not None:
            every = max(1, len(length) // 8)
            few = rows.movedim(dims, tuple(range(-len(dims), 0))).reshape(-1, fan_in)[::every][:8]
        if small:
            self.notes[node] = f"fan_in {fan_in}: a sum of few terms, not Gaussian"
            z = signal.combination(few)
        if taps is not None:
            slopes = torch.ones_like(energy)
            if energy.max() > 1.01 * energy.min():
                relative = even_out(energy)
                z = z.times(Signal.of(relative.sqrt(), bins=9))
                slopes = self._by_place(node, relative, Signal.gaussian(), lambda u: finish(u * std + mean))
            self.spreads[node] = lambda place: taps.spread(
                place * slopes if place.shape == slopes.shape else slopes
            )
        result, passage = through_channels(
            z.values, z.weights, std, mean, finish, length, one=_is_one(finish)
        )
        passing = passage.on_average()
        if "standard" in getattr(layer, "constants", ()):  # its constants were measured
            result = result.standardized()
        if transposed:
            self.evens[node] = 0.0  # not followed
            if any(k % s for k, s in zip(layer.kernel_size, layer.stride, strict=True)):
                note = (
                    "its stride does not divide its kernel: the variance differs from position to position"
                )
                self.notes[node] = "; ".join(filter(None, [self.notes.get(node), note]))
        elif taps is not None:
            fewer = inside * taps.inside.numel() / math.prod(taps.before)
            summed = rows.flatten(2).sum(2).square().sum(1) * passage.slope.square()
            self.evens[node] = fewer * passage.even_share(summed)
        if small or overlap is not None:
            sums, few_slopes = with_slope(finish, gaussian_nodes(FEW_NODES)[0][:, None] * std + mean)
            # Over many random rows skewness has no sign.
            both = torch.cat([few, -few])
            sums, few_slopes = (t[:, ::every][:, :8].repeat(1, 2) for t in (sums, few_slopes))
            square = few_slopes.square()
            if overlap is not None:
                met = torch.einsum("ock,kl,ocl->o", rows.flatten(2), overlap.pairs, rows.flatten(2))
                related = by_pair(signal, both, few_slopes, overlap.pairs)
                self.overlaps[node] = (met * passage.slope.square()).mean() + related

        def through(density: Tensor) -> Tensor | float:
            if not small:
                return inside * passing(density)
            curves = square * interpolate(sums, result.values, density)
            return inside * passing(density) * by_term(signal, both, curves)

        return result, [through] + [0.0] * (count - 1)

    def _normalized_activation(
        self, node: fx.Node, module: NormalizedActivation, source: fx.Node
    ) -> Result:
        signal = self._signal(source)
        gain, bias = _exact(module, "gain", module.initial_gain), _exact(module, "bias")
        finish = _finish(module, gain, bias)
        if gain is None or bias is None:
            gain, bias = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        self._uneven(node, source, signal, lambda u: finish(u * gain + bias))
        result, passage = through_channels(
            signal.values, signal.weights, gain, bias, finish, one=_is_one(finish)
        )
        self.evens[node] = passage.even_share((gain * passage.slope).square())
        return result, [passage.by_value(signal.values)]

    def _pad(self, node: fx.Node, module: Any, source: fx.Node) -> Result:
        signal, before, after = self._signal(source), shape(source), shape(node)
        if module is not None:
            value = getattr(module, "value", None)  # reflections and copies have none
        else:
            constant = argument(node, 2, "mode", "constant") == "constant"
            value = (argument(node, 3, "value") or 0.0) if constant else None
        if (
            not isinstance(value, (int, float))
            or not math.isfinite(value)
            or before is None
            or after is None
        ):
            return signal, [_same]  # -inf, before a maximum, never shows
        share = min(1.0, math.prod(before) / math.prod(after))
        if share == 1.0:
            return signal, [_same]
        result = Signal.mixture([signal, Signal.constant(float(value))], [share, 1 - share])
        return result, [of_some(signal.values, share, result)]

    def _pool(self, node: fx.Node, module: nn.Module | None, what: str, source: fx.Node) -> Result | None:
        name = what.removesuffix("_with_indices") if module is None else type(module).__name__
        if (found := _REDUCTIONS.get(name) or reading.POOLS.get(name)) is None:
            return None
        if name in ("max", "min") and len(tensor_inputs(node)) > 1:  # of two maps
            return None
        kind, adaptive, spatial = found
        signal, before, after = self._signal(source), shape(source), shape(node)
        if isinstance(value := node.meta.get("value"), tuple):  # with the indices
            after = tuple(value[0].shape)
        size: Any = (
            argument(node, 1, "kernel_size", 1) if module is None else getattr(module, "kernel_size", 1)
        )
        if adaptive or reading.nodes_in(size):  # or it is made of the map's own size
            count = _GLOBAL
            if before is not None and after is not None:
                count = max(1, math.prod(before) // max(1, math.prod(after)))
        else:
            count = math.prod(pools.per_axis(size, spatial))
        if count == 1:
            return signal, [_same]
        self.evens[node] = float(kind == "avg")
        if kind in ("max", "min"):
            self.notes[node] = f"{kind} pool: neighbours taken as independent"
            side = 1.0 if kind == "max" else -1.0
            result, chance = extreme(signal, count, side, self._law(source))
            return result, [picked(signal.values, chance, result)]
        pooled = self._average(node, source, count)
        if name == "sum":
            total = pooled.affine(count)
            return total, [in_average(signal, total, count, float(count))]
        return pooled, [in_average(signal, pooled, count, 1 / count)]

    def _set_channels(
        self, node: fx.Node, mean: Tensor, std: Tensor, function: Callable[[Tensor], Tensor]
    ) -> None:
        """A node's channels are a function, of shape (n, channels), of Gaussians."""
        mean, std = torch.broadcast_tensors(mean, std)
        z, weights = gaussian_nodes(96)
        with torch.no_grad():
            y = function(z[:, None] * std + mean)
        self.levels[node] = weights @ y
        self.within[node] = float((weights @ (y - self.levels[node]).square()).mean())
        self.laws[node] = [(mean, std, function)]
        if function is _same:
            self.channels[node] = mean, std

    def _law(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        """What each of its channels holds, shape (nodes, channels), and the nodes' weights; None if unknown."""
        if node not in self.laws:
            return None
        z, weights = gaussian_nodes(_LAW_NODES)
        with torch.no_grad():
            return torch.cat([f(z[:, None] * std + mean) for mean, std, f in self.laws[node]], 1), weights

    def _average(self, node: fx.Node, source: fx.Node, count: int) -> Signal:
        """Of independent values: what channels differ by does not average out."""
        signal = self._signal(source)
        total = sum_of(signal, count).standardized()
        self.notes[node] = "average: values taken as independent"
        if source in self.levels:
            values = self.levels[source] + math.sqrt(self.within[source] / count) * total.values[:, None]
            weights = total.weights[:, None].expand_as(values)
        else:
            self.notes[node] += ", all channels as alike"
            values, weights = signal.mean + signal.std / math.sqrt(count) * total.values, total.weights
        inside = (values >= signal.values[0]) & (values <= signal.values[-1])  # as averages are
        return Signal.of(values[inside], weights[inside]) if bool(inside.any()) else signal

    def _norm(self, node: fx.Node, module: Any, source: fx.Node) -> Result:
        signal = self._signal(source)
        within = self.within[source] if source in self.channels else None
        weight, bias = _exact(module, "weight", 1.0), _exact(module, "bias")
        one = torch.ones(1, dtype=torch.float64)
        scale = one if weight is None else weight.flatten()
        shift = one * 0 if bias is None else bias.flatten()
        size: Tensor | None = None  # by what a gradient is multiplied, if not by the scale
        unit = 1.0
        # Behind a weight layer each channel is Gaussian, however its channels differ.
        ready = Signal.gaussian() if within is not None else signal.standardized()
        if reading.is_batch_norm(module) and module.running_var is not None and not module.training:
            means, variances = _exact(module, "running_mean"), _exact(module, "running_var", 1.0)
            size = scale / (variances + module.eps).sqrt()
            std = math.sqrt(float(variances.mean() + means.var(correction=0)))
            seen = not bool((means == 0).all() & (variances == 1).all())
            if seen and self._agrees(node, signal, float(means.mean()), std):
                scale = size * variances.sqrt()
            else:
                ready, scale, shift = signal, size, shift - means * size
        else:
            unit = max(signal.var if within is None else within, 1e-12)
            if isinstance(module, nn.RMSNorm):
                ready, length = _normalized(signal, True)
                unit = length**2
            scale = scale * math.sqrt(unit / (unit + (module.eps or 0.0)))
        act = getattr(module, "act", None)  # timm's BatchNormAct2d
        finish = _same if act is None else activations.exact(act)
        if reading.is_batch_norm(module) and ready is not signal:
            self._set_channels(node, shift, scale, finish)
        self._uneven(node, source, ready, lambda u: finish(u * scale + shift))
        result, passage = through_channels(
            ready.values, ready.weights, scale, shift, finish, size, one=_is_one(finish)
        )
        self.evens[node] = passage.even_share(((scale if size is None else size) * passage.slope).square())
        # Of a Gaussian channel the value read is another in each.
        passing: Any = passage.on_average() if within is not None else passage.by_value(ready.values)
        return result, [lambda density: passing(density) / unit]

    def _functional_norm(self, node: fx.Node, what: str, inputs: list[fx.Node]) -> Result:
        normed, size = _normalized(self._signal(inputs[0]), what == "rms_norm")
        weight, bias = _FUNCTIONAL_NORMS[what]
        scaled, to_normed = normed, _same
        if (scale := self.signals.get(argument(node, weight, "weight"))) is not None:
            scaled, (to_normed, _), _ = product(normed, scale, _same)
        result, to_scaled = scaled, _same
        if (shift := self.signals.get(argument(node, bias, "bias"))) is not None:
            result, (to_scaled, _) = self._sum([scaled, shift], [1.0, 1.0])
        return result, [lambda g: to_normed(to_scaled(g)) / size**2] + [0.0] * (len(inputs) - 1)

    def _softmax(self, node: fx.Node, module: Any, source: fx.Node) -> Result:
        r"""By sampled logits; with p the softmax and n its size, the squares of its Jacobian sum up to
        :math:`\sum p^2 - 2 \sum p^3 + (\sum p^2)^2`, those of its logarithm's to :math:`n - 2 + n \sum p^2`.
        """
        self.notes[node] = "softmax of independent logits"
        self.evens[node] = 0.0
        dim: Any = argument(node, 1, "dim") if module is None else module.dim
        size = (shape(node) or (2,))[-1 if dim is None else dim]
        logits = self._signal(source).sample((max(8, 2**15 // size), size))
        p = logits.softmax(1)
        squares = p.square().sum(1)
        if isinstance(module, nn.LogSoftmax) or key(node) == "log_softmax":
            return Signal.of(logits.log_softmax(1)), [float((size - 2 + size * squares).mean()) / size]
        passed = squares - 2 * p.pow(3).sum(1) + squares.square()
        return Signal.of(p), [float(passed.mean()) / size]

    def _matmul(self, node: fx.Node, what: str, inputs: list[fx.Node]) -> Result:
        a, b = (self._signal(n) for n in inputs)
        inner = (shape(inputs[0]) or (1,))[-1]
        if what == "einsum":
            inner = _summed(str(node.args[0]), [shape(n) or () for n in inputs])
        self.notes[node] = "product of two maps: taken as independent"
        mean = inner * a.mean * b.mean
        var = inner * (a.rms**2 * b.rms**2 - (a.mean * b.mean) ** 2)
        return Signal.gaussian(mean, math.sqrt(max(var, 0.0))), [inner * b.rms**2, inner * a.rms**2]

    # The whole graph ---------------------------------------------------------------------------

    def gradients(self) -> dict[fx.Node, float]:
        """L2 norm of the gradient of a node's whole map, the output's being 1.

        A rectified trunk passes the gradient of the same elements block after block: so the mean
        square is kept as a density over the signal's values.
        """
        densities: dict[fx.Node, Tensor] = {}
        places: dict[fx.Node, Tensor] = {}  # the share of each position
        evens: dict[fx.Node, float] = {}  # what of the mean square is the same at all positions
        for node in reversed(list(self.graph_module.graph.nodes)):
            signal = self.signals.get(node)
            if signal is None:
                continue
            if node.op == "output":
                densities[node] = torch.ones_like(signal.values)
            density = densities.get(node)
            if density is None:
                continue
            mean = float((signal.weights * density).sum())
            place = even_out(places.get(node, torch.ones(positions(node), dtype=torch.float64)))
            even = min(1.0, evens.get(node, 0.0) / mean) if mean > 0 else 0.0
            even = 1.0 if math.prod(positions(node)) == 1 else even
            for source, factor in self.factors.get(node, ()):
                read = self._signal(source)
                share = factor(density) if callable(factor) else factor * mean
                share = torch.as_tensor(share, dtype=torch.float64).expand_as(read.values)
                passed = self._evenness(node, source, even) * float((read.weights * share).sum())
                evens[source] = evens.get(source, 0.0) + passed
                if node in self.overlaps and callable(factor):  # not a weight that is an input
                    share = (share + even * mean * self.overlaps[node]).clamp_min(0.0)
                there = self.spreads[node](place) if node in self.spreads else place
                if there.shape != positions(source):
                    there = torch.ones(positions(source), dtype=torch.float64)
                share = share * there.mean()
                densities[source] = densities.get(source, 0.0) + share
                there = even_out(there) * (read.weights * share).sum()
                places[source] = places.get(source, 0.0) + there
        return {
            node: math.sqrt((self._signal(node).weights * density).sum().clamp_min(0.0))  # keeps NaN
            for node, density in densities.items()
        }

    def _evenness(self, node: fx.Node, source: fx.Node, even: float) -> float:
        """The share of a source's gradient that is the same at all positions, from that of the node's."""
        passed = self.evens.get(node, float(positions(node) == positions(source)))
        return even * (passed.get(source, 0.0) if isinstance(passed, dict) else passed)

    def trace(self) -> SignalTrace:
        """The records."""
        gradients = self.gradients()
        records = []
        for node in self.graph_module.graph.nodes:
            signal = self.signals.get(node)
            if signal is None or node.op in ("get_attr", "output"):
                continue
            records.append(
                Record(
                    name=str(node),
                    path=path_of(node),
                    op=reading.operation_name(self.graph_module, node),
                    shape=shape(node),
                    mean=signal.mean,
                    std=signal.std,
                    gradient=gradients.get(node),
                    note=self.notes.get(node, ""),
                )
            )
        return SignalTrace(records)


def walk(graph_module: fx.GraphModule, inputs: Sequence[Signal] = (), whole: bool = True) -> Walk:
    """All nodes visited, in order; the graph's first inputs are as given, others N(0, 1)."""
    state = Walk(graph_module, whole=whole)
    placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    state.given = dict(zip(placeholders, inputs, strict=False))
    for node in graph_module.graph.nodes:
        state.visit(node)
    return state


def _window(node: fx.Node, module: Any) -> int:
    """How many elements an average of ours is over, where no border cuts its windows."""
    if isinstance(module, pools.AvgPool):
        return math.prod(pools.per_axis(module.kernel_size, module._spatial))
    before, after = shape(tensor_inputs(node)[0]), shape(node)
    return (
        _GLOBAL
        if before is None or after is None
        else max(1, math.prod(before) // max(1, math.prod(after)))
    )


def _drop_share(node: fx.Node, module: nn.Module | None) -> float:
    """What share of the values a dropout sets to 0 and makes up for by scaling the others; 0 for other nodes."""
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        share = module.p if module.training else 0.0
    elif module is None and key(node) in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
        share = argument(node, 1, "p", 0.5) if argument(node, 2, "training", True) is True else 0.0
    else:
        return 0.0
    return float(share) if isinstance(share, (int, float)) and 0 <= share <= 1 else 0.0


def _normalized(signal: Signal, raw: bool) -> tuple[Signal, float]:
    """Divided by its std, or root mean square if ``raw``, and what that is; centred if not ``raw``."""
    size = max(signal.rms if raw else signal.std, 1e-6)
    return (signal.affine(1 / size) if raw else signal.standardized()), size


def _same(values: Tensor) -> Tensor:
    return values


def _summed(equation: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Over how many products an einsum of two tensors sums."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, size in zip(terms.split(","), shapes, strict=True):
        before, _, behind = term.partition("...")
        sizes.update(zip(before, size, strict=False))
        sizes.update(zip(reversed(behind), reversed(size), strict=False))
    kept = result if arrow else "".join(c for c in sizes if terms.count(c) == 1)
    return math.prod(size for label, size in sizes.items() if label not in kept)


def _is_real(node: fx.Node) -> bool:
    """Whether it is a tensor of real numbers, as far as is known."""
    value = node.meta.get("value")
    return value is None or (isinstance(value, Tensor) and value.is_floating_point())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.Size)) or (
        isinstance(value, (tuple, list)) and not any(isinstance(v, Tensor) for v in value)
    )


def path_of(node: fx.Node) -> str:
    """The module that the node calls, or the one in whose forward it is written."""
    return str(node.target) if node.op == "call_module" else reading.owner(node)


def _exact(owner: Any, name: str, start: float = 0.0) -> Any:
    """A parameter or buffer in float64 on the CPU, None if there is none; without values it is all ``start``."""
    tensor = getattr(owner, name, None)
    if tensor is None:
        return None
    if tensor.is_meta:
        return torch.full(tensor.shape, start, dtype=torch.float64)
    return tensor.detach().double().cpu()


def effective(layer: Any) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """The plain weight and bias that a weight layer applies, and what it does to their result.

    All in float64 on the CPU. The function takes shape (n, channels).
    """
    weight, bias = _exact(layer, "weight"), _exact(layer, "bias")
    if layer.weight.is_meta:  # as a fresh layer has them
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    if not reading.is_normprop(layer):
        return weight, bias, _same
    gain = _exact(layer, "gain", layer.initial_gain)
    row = (layer.rule.centered, *functional.geometry_of(layer))
    weight = functional.scaled_weight(weight, gain, layer.stretch, *row)
    return weight, bias, _finish(layer, gain, bias)


def _finish(layer: Any, gain: Tensor | None, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What a layer of ours does behind its gain and bias."""
    if layer.activation is None:
        return _same
    activation = activations.exact(layer.activation)
    one = not activations.is_learned(activation) and alike(gain) and alike(bias)
    own_gain, own_bias = (t[:1] if one and t is not None else t for t in (gain, bias))
    with torch.no_grad():
        mean, std = functional.constants(activation, layer.rule, own_gain, own_bias, layer.standard)
    return _Finish(activation, mean, std)


@dataclass(frozen=True)
class _Finish:
    """An activation and its constants: numbers, or of shape (channels,) or (1,)."""

    activation: nn.Module
    mean: Tensor | float
    std: Tensor | float

    def __call__(self, u: Tensor) -> Tensor:
        return (self.activation(u) - self.mean) / self.std  # type: ignore[no-any-return]


def _is_one(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether it is known to be the same function for all channels."""
    if not isinstance(function, _Finish):
        return function is _same
    sizes = {t.numel() for t in (function.mean, function.std) if isinstance(t, Tensor)}
    return sizes <= {1} and not activations.is_learned(function.activation)
