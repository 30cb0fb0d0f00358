r"""Affine maps by known constants move out of a graph's way, into the layers around them.

``Standardize`` behind a layer joins the layer's constants. A residual trunk
:math:`r_{l+1} = A r_l + B f_l`, with a ReLU behind the sum or not, whose readers see
:math:`(\max(r, 0) - m)/s`, is carried as :math:`\hat r = (r - m)/k` instead:

.. math:: \hat r_{l+1} = \frac{A k_l}{k_{l+1}} \hat r_l +
    \Big[\frac{B}{k_{l+1}} f_l + \frac{A m_l - m_{l+1}}{k_{l+1}}\Big],\quad
    \frac{\max(r, 0) - m}{k} = \max\Big(\hat r,\; -\frac{m}{k}\Big)

What stands in brackets belongs to the branch's last layer; with :math:`k_{l+1} = A k_l` the trunk is
added as it is, and readers multiply their weights by k/s. No pass over a map is left that the network
without normalisation does not make (docs/method.md, section 12).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import fx, nn

from normprop import activations, merges, modules
from normprop.graph import reading, trace as tracing
from normprop.graph.reading import TraceError, tensor_inputs
from normprop.graph.trace import place

# How far from 1 the std of a trunk may drift before it is multiplied back.
_DRIFT = (0.8, 1.25)


class _Carried(NamedTuple):
    """A trunk r as the graph has it: ``(r - mean) / scale``."""

    mean: float = 0.0
    scale: float = 1.0


def lighten(model: nn.Module, example: Any = None) -> fx.GraphModule:
    """The same function with fewer passes over maps: known constants in the layers around.

    For models that are written with NormProp's layers, sums and activations; :func:`~normprop.fold`
    does it by itself, and a fresh :func:`~normprop.convert` where one graph serves training and eval. Call it
    before an optimizer is made: the result has parameters of its own.

    A :class:`~normprop.NormalizedAdd` of a trunk and a layer's output becomes a plain sum, a
    :class:`~normprop.NormalizedActivation` ("relu", without gain and bias) that reads it for layers a
    :class:`~normprop.ShiftedReLU`, and ``Standardize`` goes. Sums with learned weights or dropped
    branches stay as they are, as do modules with hooks and those whose attributes other code reads.

    Args:
        model: Is left untouched.
        example: An input, or a tuple of them, where the code looks at shapes.

    Returns:
        ``forward`` as one graph, with the model's module paths. What was moved is in its state dict
        (``constants``): the model's own does not load.

    Raises:
        TraceError: If torch.fx cannot follow the code, or training and eval take different ways through it.
        TypeError: If ``model`` is no module.
        ValueError: If a part has hooks that a graph would lose.

    Example:
        >>> net = nn.Sequential(modules.NormPropLinear(8, 4), merges.Standardize(0.0, 2.0))
        >>> [type(m).__name__ for m in lighten(net).children()]
        ['NormPropLinear']
    """
    modules.check_model(model)
    twin = tracing.copied(model)
    graphs = tracing.by_mode(twin, example)
    if len(graphs) > 1:
        raise TraceError("forward asks self.training: training and eval have no graph in common")
    result = graphs[True]
    called = {str(node.target) for node in result.graph.nodes if node.op == "call_module"}
    for name, module in model.named_modules():
        if activations.hooked(module) and name not in called:
            raise ValueError(
                f"a graph would lose the hook on '{name or 'model'}': lighten, then register it"
            )
    lighten_(result, twin.modules())
    result.graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
    result.recompile()
    result.training = model.training
    return result


def lighten_(
    graph_module: fx.GraphModule,
    made: Iterable[nn.Module],
    decide: Callable[[str, fx.Node, bool], bool] = lambda what, node, seen: seen,
) -> dict[str, str]:
    """Rewrite a graph in place, its layers' constants with it.

    Args:
        graph_module: The only code that calls its modules.
        made: Modules that may change, if they are ours; those with hooks are left alone.
        decide: Asked where what was measured decides: what, where, and what it says.

    Returns:
        What stands at which path now, where that is of another kind.
    """
    return _Lighter(graph_module, made, decide).run()


class _Lighter:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        made: Iterable[nn.Module],
        decide: Callable[[str, fx.Node, bool], bool],
    ) -> None:
        self.decide = decide
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.made = {
            id(m) for m in made if type(m).__module__ in reading.OURS and not activations.hooked(m)
        }
        # What code reads beside calling it: layer.bias.
        self.read = {str(n.target).rpartition(".")[0] for n in self.graph.nodes if n.op == "get_attr"}
        self.modules = {
            node: graph_module.get_submodule(str(node.target))
            for node in self.graph.nodes
            if node.op == "call_module"
        }
        self.calls = Counter(id(module) for module in self.modules.values())
        self.kept: dict[Any, set[str]] = defaultdict(set)
        self.carried: dict[fx.Node, _Carried] = {}
        self.became: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        for node, module in list(self.modules.items()):
            if isinstance(module, merges.Standardize) and self.own(node):
                self.join_layer(node, module)
        # Sums that can be carried, and the map behind each that goes on as the trunk: its own or a ReLU's.
        self.joins: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if (trunk := self.trunk(node)) is not None:
                self.joins[node] = trunk
        for node in list(self.graph.nodes):
            if node in self.joins:
                self.carry(node, self.joins[node])
            elif self.layer(node) is not None:
                self.start(node)
        for node, module in list(self.modules.items()):
            if isinstance(module, merges.Standardize) and module.mean == 0.0 and self.own(node):
                self.join_readers(node, module)
        for module, names in self.kept.items():
            merges.keep_in_state_dict(module, *sorted(names))
        return self.became

    def own(self, node: Any) -> Any:
        """The module of ours that only this node calls and nothing reads; None if there is none."""
        module = self.modules.get(node)
        if module is None or id(module) not in self.made or str(node.target) in self.read:
            return None
        return module if self.calls[id(module)] == 1 else None

    def layer(self, node: Any) -> Any:
        """Likewise if it is a NormProp layer."""
        module = self.own(node)
        return module if isinstance(module, modules.NormPropLayer) else None

    def remove(self, node: fx.Node, instead: fx.Node) -> None:
        node.replace_all_uses_with(instead)
        self.graph.erase_node(node)
        self.modules.pop(node, None)

    def join_layer(self, node: fx.Node, module: merges.Standardize) -> None:
        """Into the constants of the layer before, if nobody else reads it."""
        (before,) = tensor_inputs(node)
        layer = self.layer(before)
        if layer is None or layer.activation is None or len(before.users) > 1:
            return
        if layer.rule.constants != "standard" or layer.standard is None:
            return
        mean, std = layer.standard
        layer.standard = mean + std * module.mean, std * module.std
        self.kept[layer].add("standard")
        self.remove(node, before)

    def join_readers(self, node: fx.Node, module: merges.Standardize) -> None:
        """Into the weights of those that read it, if they are layers all."""
        if self.layers_only(node):
            self.divide(node, module.std)
            self.remove(node, tensor_inputs(node)[0])

    def layers_only(self, node: fx.Node) -> bool:
        """Whether all that reads a map are layers of ours."""
        return all(self.layer(user) is not None and user.args[0] is node for user in node.users)

    def divide(self, node: fx.Node, std: float) -> None:
        """Its readers, layers all, divide what they read by ``std`` from now on."""
        for user in node.users:
            layer = self.layer(user)
            layer.factor /= std
            self.kept[layer].add("factor")

    def trunk(self, node: fx.Node) -> fx.Node | None:
        """Of a sum of a trunk and a layer's output: the map that goes on; None if it must stay as it is."""
        module = self.own(node)
        if type(module) is not merges.NormalizedAdd or module.weight is not None or module.drop_prob:
            return None
        if len(node.args) != 2 or node.args[0] is node.args[1] or self.linear(node.args[1], node) is None:
            return None
        before: Any = node.args[0]
        if self.rectifier(node) is not None or self.joins.get(before) is before:
            return node
        if len(node.users) != 1:
            return None
        (after,) = node.users
        phi = reading.activation_of(after, self.modules.get(after))
        if type(phi) is not nn.ReLU or (after in self.modules and activations.hooked(self.modules[after])):
            return None
        return after

    def rectifier(self, trunk: fx.Node) -> fx.Node | None:
        """The normalised ReLU that reads a trunk for layers."""
        for user in trunk.users:
            module = self.own(user)
            if isinstance(module, modules.NormalizedActivation) and self.layers_only(user):
                fixed = module.gain is None and type(module.activation) is nn.ReLU
                return user if fixed and module.rule.constants != "none" else None
        return None

    def entry(self, trunk: fx.Node, raw: bool) -> tuple[fx.Node, float, float] | None:
        """What alone, but for sums that carry it on, reads a trunk; the mean and std that it takes out."""
        if raw:
            found = self.rectifier(trunk)
        else:
            found = next((u for u in trunk.users if isinstance(self.own(u), merges.Standardize)), None)
        others = [user for user in trunk.users if user is not found]
        free = all(u in self.joins and u.args[0] is trunk and u.args[1] is not trunk for u in others)
        if found is None or not free:
            return None
        module: Any = self.modules[found]
        return found, *(module.standard if raw else (module.mean, module.std))

    def linear(self, node: Any, reader: fx.Node) -> Any:
        """The layer without activation whose output only ``reader`` reads; None if it is none."""
        layer = self.layer(node)
        own = layer is not None and layer.activation is None and layer.bias is not None
        return layer if own and set(node.users) == {reader} else None

    def start(self, node: fx.Node) -> None:
        """A layer without activation that makes a trunk: it gives the map that is carried."""
        layer, entry = self.layer(node), self.entry(node, True)
        if entry is None or layer.activation is not None or layer.bias is None:
            return
        reader, mean, std = entry
        self.multiply(layer, 1 / std, -mean / std)
        self.carried[node] = _Carried(mean, std)
        self.put(reader, merges.ShiftedReLU(-mean / std), "low")

    def carry(self, node: fx.Node, trunk: fx.Node) -> None:
        """A sum, and the ReLU behind it if ``trunk`` is one, of what is carried."""
        module: Any = self.modules[node]
        before, branch = node.args
        over_trunk, over_branch = module.factors
        held = self.carried.get(before, _Carried())  # type: ignore[arg-type]
        raw, shortcut = trunk is node, self.linear(before, node)
        reader, mean, scale, std = None, 0.0, 1.0, None
        if (entry := self.entry(trunk, raw)) is not None:
            reader, mean, whole = entry
            scale = over_trunk * held.scale
            drifted = not _DRIFT[0] <= whole / scale <= _DRIFT[1]
            if shortcut is not None or self.decide("drifted", node, drifted):
                scale = whole
            std = whole / scale
        ratio = over_trunk * held.scale / scale
        if shortcut is not None:
            self.multiply(shortcut, ratio)
            ratio = 1.0
        ratio = 1.0 if abs(ratio - 1) < 1e-12 else ratio
        shift = (over_trunk * held.mean - mean) / scale
        self.multiply(self.linear(branch, node), over_branch / scale, shift)
        self.carried[trunk] = _Carried(mean, scale)
        if raw:
            length = math.hypot(ratio, 1.0)
            total = merges.NormalizedAdd((ratio, 1.0), stds=(1 / length, 1 / length))
            self.put(node, total, "initial", "stds")
            if reader is not None and std is not None:
                self.put(reader, merges.ShiftedReLU(-mean / scale), "low")
                self.divide(reader, std)
            return
        names = ("ratio", "low", *(["std"] if std else []))
        self.put(node, merges.RectifiedSum(ratio, -mean / scale, std), *names)
        self.remove(trunk, node)
        self.carried[node] = self.carried[trunk]
        if reader is not None and std is not None:
            reads: Any = self.modules[reader]
            reads.mean, reads.std = 0.0, std
            # A sum that reads it takes it as it is, not as what is carried.
            if abs(std - 1) < 1e-12 and not any(user in self.joins for user in reader.users):
                self.remove(reader, node)

    def put(self, node: fx.Node, module: nn.Module, *names: str) -> None:
        """Another module in a node's place; the numbers that go with the weights."""
        path = str(node.target)
        merges.keep_in_state_dict(module, *names)
        module.train(self.modules[node].training)
        place(self.graph_module, path, module)
        if type(module) is not type(self.modules[node]):
            self.became[path] = type(module).__name__
        self.modules[node] = module

    def multiply(self, layer: Any, factor: float, shift: float = 0.0) -> None:
        """``factor * output + shift`` is what the layer gives from now on."""
        layer.factor *= factor
        layer.initial_bias = layer.initial_bias * factor + shift
        layer.bias.data.mul_(factor).add_(shift)
        self.kept[layer].add("factor")
