r"""Affine maps by known constants move out of a converted graph's way, into the layers around them.

``Standardize`` behind a layer joins the layer's constants. A residual trunk
:math:`r_{l+1} = \max(A r_l + B f_l, 0)`, read through :math:`(r - m)/s`, is carried as
:math:`\hat r = (r - m)/k` instead:

.. math:: \hat r_{l+1} = \max\Big(\frac{A k_l}{k_{l+1}} \hat r_l +
    \Big[\frac{B}{k_{l+1}} f_l + \frac{A m_l - m_{l+1}}{k_{l+1}}\Big],\; -\frac{m_{l+1}}{k_{l+1}}\Big)

What stands in brackets belongs to the branch's last layer; with :math:`k_{l+1} = A k_l` the trunk is
added as it is, and readers multiply their weights by k/s. No pass over a map is left that the network
without normalisation does not make (docs/method.md, section 12).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import fx, nn

from normprop import merges, modules
from normprop.graph import trace as tracing
from normprop.graph.trace import place, tensor_inputs

# How far from 1 the std of a trunk may drift before it is multiplied back.
_DRIFT = (0.8, 1.25)


class _Carried(NamedTuple):
    """A trunk r as the graph has it: ``(r - mean) / scale``."""

    mean: float = 0.0
    scale: float = 1.0


def lighten(graph_module: fx.GraphModule, made: Iterable[nn.Module]) -> list[str]:
    """Rewrite a converted graph in place, its layers' constants with it.

    Args:
        graph_module: The only code that calls its modules.
        made: What the conversion made; modules of others, and those with hooks, are left alone.

    Returns:
        Paths of sums that became :class:`~normprop.merges.RectifiedSum`.
    """
    return _Lighter(graph_module, made).run()


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


class _Lighter:
    def __init__(self, graph_module: fx.GraphModule, made: Iterable[nn.Module]) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.made = {id(module) for module in made if not _hooked(module)}
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

    def run(self) -> list[str]:
        for node, module in list(self.modules.items()):
            if isinstance(module, merges.Standardize) and self.own(node):
                self.join_layer(node, module)
        self.joins = {
            node: after for node in self.graph.nodes if (after := self.rectified(node)) is not None
        }
        sums = [self.carry(node, after) for node, after in self.joins.items()]
        for node, module in list(self.modules.items()):
            if isinstance(module, merges.Standardize) and module.mean == 0.0 and self.own(node):
                self.join_readers(node, module)
        for module, names in self.kept.items():
            merges.keep_in_state_dict(module, *sorted(names))
        return sums

    def own(self, node: Any) -> Any:
        """The module of ours that only this node calls and nothing reads; None if there is none."""
        module = self.modules.get(node)
        if module is None or id(module) not in self.made or str(node.target) in self.read:
            return None
        return module if self.calls[id(module)] == 1 else None

    def layer(self, node: Any) -> Any:
        """Likewise if it is a NormProp layer."""
        module = self.own(node)
        return module if isinstance(module, modules._NormProp) else None

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
        layers = [self.layer(user) for user in node.users]
        if not all(
            layer is not None and user.args[0] is node
            for layer, user in zip(layers, node.users, strict=True)
        ):
            return
        for layer in layers:
            layer.factor /= module.std
            self.kept[layer].add("factor")
        self.remove(node, tensor_inputs(node)[0])

    def rectified(self, node: fx.Node) -> fx.Node | None:
        """The ReLU that alone reads a sum of a trunk and a layer's output, if the two can be one."""
        module = self.own(node)
        if type(module) is not merges.NormalizedAdd or module.weight is not None or module.drop_prob:
            return None
        if len(node.args) != 2 or len(node.users) != 1 or node.args[0] is node.args[1]:
            return None
        (after,) = node.users
        phi = tracing.activation_of(after, self.modules.get(after))
        if type(phi) is not nn.ReLU or (after in self.modules and _hooked(self.modules[after])):
            return None
        return after if self.linear(node.args[1], node) else None

    def linear(self, node: Any, reader: fx.Node) -> Any:
        """The layer without activation whose output only ``reader`` reads; None if it is none."""
        layer = self.layer(node)
        own = layer is not None and layer.activation is None and layer.bias is not None
        return layer if own and set(node.users) == {reader} else None

    def carry(self, node: fx.Node, after: fx.Node) -> str:
        """One module for a sum and its ReLU; what it carries."""
        module: Any = self.modules[node]
        trunk, branch = node.args
        over_trunk, over_branch = module.factors
        before = self.carried.get(trunk, _Carried())  # type: ignore[arg-type]
        entry = next((user for user in after.users if isinstance(self.own(user), merges.Standardize)), None)
        others = [user for user in after.users if user is not entry]
        free = all(
            user in self.joins and user.args[0] is after and user.args[1] is not after for user in others
        )
        mean, scale, std = 0.0, 1.0, None
        shortcut = self.linear(trunk, node)
        reads: Any = self.modules.get(entry)
        if entry is not None and free:
            mean, scale = reads.mean, over_trunk * before.scale
            if shortcut is not None or not _DRIFT[0] <= reads.std / scale <= _DRIFT[1]:
                scale = reads.std
            std = reads.std / scale
        ratio = over_trunk * before.scale / scale
        if shortcut is not None:
            self.multiply(shortcut, ratio)
            ratio = 1.0
        last = self.linear(branch, node)
        self.multiply(last, over_branch / scale, (over_trunk * before.mean - mean) / scale)
        total = merges.RectifiedSum(1.0 if abs(ratio - 1) < 1e-12 else ratio, -mean / scale, std)
        merges.keep_in_state_dict(total, "ratio", "low", *(["std"] if std else []))
        total.train(module.training)
        place(self.graph_module, str(node.target), total)
        self.modules[node] = total
        self.remove(after, node)
        self.carried[node] = _Carried(mean, scale)
        if entry is not None and std is not None:
            reads.mean, reads.std = 0.0, std
            # A sum that reads it takes it as it is, not as what is carried.
            if abs(std - 1) < 1e-12 and not any(user in self.joins for user in entry.users):
                self.remove(entry, node)
        return str(node.target)

    def multiply(self, layer: Any, factor: float, shift: float = 0.0) -> None:
        """``factor * output + shift`` is what the layer gives from now on."""
        layer.factor *= factor
        layer.initial_bias = layer.initial_bias * factor + shift
        layer.bias.data.mul_(factor).add_(shift)
        self.kept[layer].add("factor")
