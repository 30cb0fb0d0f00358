"""One graph rewritten: which nodes become a NormProp layer, and what is put between them."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normprop import activations, functional, merges, modules, pools
from normprop.data_norm import DATA_NORMS, GlobalDataNorm
from normprop.functional import NormRule
from normprop.graph import inplace, reading
from normprop.graph.lighten import lighten_
from normprop.graph.predict import Walk
from normprop.graph.reading import argument, key, shape, tensor_inputs
from normprop.graph.trace import below, has, place
from normprop.records import DROPS

if TYPE_CHECKING:
    from normprop.graph.convert import Converter

_LAYERS = {
    nn.Linear: modules.NormPropLinear,
    nn.Conv1d: modules.NormPropConv1d,
    nn.Conv2d: modules.NormPropConv2d,
    nn.Conv3d: modules.NormPropConv3d,
    nn.ConvTranspose1d: modules.NormPropConvTranspose1d,
    nn.ConvTranspose2d: modules.NormPropConvTranspose2d,
    nn.ConvTranspose3d: modules.NormPropConvTranspose3d,
}
_PRESERVE = NormRule(centered=False, constants="none", gain=1.0)
_TOLERANCE = 0.15  # how far from mean 0, std 1, and from its prediction, a weight layer's map may be
_LIMIT = 1.0  # mean, or std - 1, above which a map is moved though the rehearsal did not ask for it
_TINY = 0.1  # a branch that starts below this std (layer scale) is left to grow by itself


class Flow:
    """A graph's signals, node by node while it is rewritten: by formula and, if there is input, by running it."""

    def __init__(
        self, graph_module: fx.GraphModule, inputs: tuple[Tensor, ...] | None, whole: bool
    ) -> None:
        self.graph_module = graph_module
        self.walk = Walk(graph_module, drops=False, whole=whole)
        self.inputs = inputs
        self.values: dict[fx.Node, Any] = {}
        self.measured: dict[fx.Node, tuple[float, float]] = {}
        self.chance: dict[fx.Node, float] | None = None  # what other weights may make of a map's mean
        self.visited: set[fx.Node] = set()
        self.count = 0
        self.failure = ""

    def visit(self, node: fx.Node) -> None:
        self.walk.visit(node)
        self.visited.add(node)
        if self.inputs is None:
            return
        try:
            value = self.run(node)
            if value is not None and self.walk.normalizes_data(node) and value.numel() > 1:
                # As it is, the noise stands for what comes out of that too.
                value = (value - value.mean()) / value.std().clamp_min(1e-12)
            self.values[node] = value
        except Exception as error:  # formulas are left
            self.failure = (
                f"constants are by formula alone from '{reading.owner(node) or node}' on: {type(error).__name__}: "
                f"{error}; pass example= of a size that the model takes"
            )
            self.inputs = None
            return
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
            flat = value.detach().float()
            mean = flat.mean()  # torch.var_mean takes several times as long as the two passes
            length = torch.linalg.vector_norm(flat - mean)
            self.measured[node] = (float(mean), float(length) / math.sqrt(value.numel() - 1))
            if (
                self.chance is not None
                and value.ndim > 1
                and value.shape[1] > 1
                and self.is_by_formula(node)
            ):
                means = value.transpose(0, 1).flatten(1).float().mean(1)
                self.chance[node] = float(means.std()) / math.sqrt(len(means))
        for source in node.all_input_nodes:
            if all(user in self.visited for user in source.users):
                self.values.pop(source, None)

    def is_by_formula(self, node: fx.Node) -> bool:
        """Whether a weight layer lies before a map, and no measured mean between the two."""
        assert self.chance is not None
        module = reading.module_of(self.graph_module, node)
        if isinstance(module, merges.Standardize):
            return False
        above = any(source in self.chance for source in node.all_input_nodes)
        return above or reading.weight_source(self.graph_module, node) is not None

    @torch.no_grad()
    def run(self, node: fx.Node) -> Any:
        assert self.inputs is not None
        if node.op == "placeholder":
            self.count += 1
            if self.count <= len(self.inputs):
                return self.inputs[self.count - 1]
            return node.args[0] if node.args else {} if str(node.target).startswith("**") else ()
        if node.op == "get_attr":
            return reading.attribute(self.graph_module, node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if "dropout" in key(node) and node.op == "call_function":
            return args[0]  # the constants are those of eval mode
        if isinstance(reading.module_of(self.graph_module, node), DATA_NORMS):
            return args[0]  # the noise stands for what comes out of it
        return None if node.op == "output" else reading.call(self.graph_module, node, args, kwargs)

    def moments(self, node: fx.Node) -> tuple[float, float] | None:
        """Mean and std of a node's map, measured if it can be; None if it is no map."""
        signal = self.walk.signals.get(node)
        if signal is None:
            return None
        return self.measured.get(node, (signal.mean, signal.std))


@dataclass
class _Chain:
    """A weight layer and what follows it: (weight) -> BatchNorm -> activation."""

    weight: fx.Node | None
    norm: fx.Node | None
    act: fx.Node | None
    activation: nn.Module | None
    first: bool = False  # no weight layer before it
    data: bool = False  # a BatchNorm that normalises the data
    start: float | None = None  # initial gain, if not the rule's

    @property
    def end(self) -> fx.Node:
        last = self.act or self.norm or self.weight
        assert last is not None
        return last


class Rewriter:
    """Plans and rewrites one graph.

    Args:
        alone: Whether no other code calls its modules.
        hidden: Whether its input comes from parts that were already converted.
    """

    def __init__(
        self,
        converter: Converter,
        graph_module: fx.GraphModule,
        prefix: str,
        inputs: tuple[Tensor, ...] | None,
        alone: bool,
        hidden: bool = False,
        rehearsed: dict[str, bool] | None = None,
    ) -> None:
        self.converter, self.alone, self.hidden = converter, alone, hidden
        self.rehearsed = rehearsed
        self.decided: dict[str, bool] = {}
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.prefix = prefix
        self.flow = Flow(graph_module, inputs, whole=not prefix)
        self.preserve = converter.preserve
        self.nodes = list(self.graph.nodes)
        self.ready_nodes: dict[fx.Node, fx.Node] = {}
        self.calls: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)].append(node)
        self.starts: dict[fx.Node, float] = {}  # of sums and gates: the gain of the layer before

    def run(self) -> fx.GraphModule:
        chains = self.find_chains()
        if self.preserve:
            for chain in chains.values():
                self.rewrite(chain)
        else:
            self.rewrite_fresh(chains)
            if self.alone:
                for path, kind in lighten_(
                    self.graph_module, self.converter.new.values(), self.decide
                ).items():
                    self.converter.became(self.path(path), kind)
            if self.flow.failure and self.flow.failure not in self.converter.report.notes:
                self.converter.report.notes.append(self.flow.failure)
        inplace.write_nothing_in_place(self.graph_module)
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "is_wrapped")}
        result = fx.GraphModule(self.graph_module, self.graph, type(self.converter.source).__name__)
        self.graph.lint()
        # Tensors that the code makes are no part of its state.
        result._non_persistent_buffers_set |= {
            n for n in result._buffers if n.startswith("_tensor_constant")
        }
        return result

    def path(self, local: str) -> str:
        return below(self.prefix, local)

    def local(self, node: fx.Node) -> str:
        """Path of the module that a node calls or whose weight it uses."""
        source = reading.weight_source(self.graph_module, node)
        return source[0] if source is not None else str(node.target)

    def module(self, node: fx.Node) -> nn.Module | None:
        return reading.module_of(self.graph_module, node)

    def moves(self, node: fx.Node) -> bool:
        return reading.moves(self.graph_module, node)

    def drops(self, node: fx.Node) -> bool:
        return reading.operation_name(self.graph_module, node) in DROPS

    def decide(self, what: str, node: fx.Node, seen: bool) -> bool:
        """A choice that rests on what was measured: as in the rehearsal, if there was one."""
        name = f"{what} {node.name}"
        self.decided[name] = seen if self.rehearsed is None else self.rehearsed.get(name, seen)
        return self.decided[name]

    # Find and plan ------------------------------------------------------------------------------

    def find_chains(self) -> dict[fx.Node, _Chain]:
        """The chains by their first node; a module that is called twice must stand in equal ones."""
        weights = [n for n in self.nodes if self.is_weight(n)]
        norms = [n for n in self.nodes if self.is_norm(n)]
        gates = set() if self.preserve else {top for _, top in self.gates.values()}
        chains: dict[fx.Node, _Chain] = {}
        for node in weights:
            first = not self.behind_weight(tensor_inputs(node)[0])
            chain = _Chain(node, None, None, None, first)
            user = _only_user(node)
            if user is not None and user in norms and self.fits(node, user):
                chain.norm = user
            self.follow(chain, gates)
            chains[node] = chain
        taken = {chain.norm for chain in chains.values()}
        for node in norms:
            if node not in taken:
                chain = _Chain(None, node, None, None, data=self.reads_data(node))
                self.follow(chain, gates)
                chains[node] = chain
        self.unify(chains)
        if self.preserve:  # a weight layer without BatchNorm stays as it is
            chains = {n: c for n, c in chains.items() if c.norm is not None}
        return chains

    def follow(self, chain: _Chain, gates: set[fx.Node]) -> None:
        """Take in the activation behind the chain's end."""
        inside = getattr(self.module(chain.norm), "act", None) if chain.norm is not None else None
        if inside is not None and not isinstance(inside, nn.Identity):
            chain.activation = _own_copy(inside)
            return
        user = _only_user(chain.end)
        if user is None or user in gates:
            return
        activation = reading.activation_of(user, self.module(user))
        if activation is None or isinstance(activation, nn.Identity):
            return
        try:
            chain.activation = activations.as_module(_own_copy(activation))
            chain.act = user
        except (ValueError, TypeError):
            return

    def unify(self, chains: dict[fx.Node, _Chain]) -> None:
        """Shared modules: all calls alike, or each part by itself."""
        local = functools.cache(self.local)
        groups: dict[str, list[_Chain]] = defaultdict(list)
        for node, chain in chains.items():
            groups[local(node)].append(chain)
        for group in list(groups.values()):
            kinds = {(local(c.norm) if c.norm else "", repr(c.activation)) for c in group}
            shared = {local(c.norm) for c in group if c.norm}
            elsewhere = any(
                c.norm is not None and local(c.norm) in shared and c not in group for c in chains.values()
            )
            if len(kinds) == 1 and not elsewhere:
                continue
            for chain in group:
                if chain.weight is not None and chain.norm is not None:
                    alone = _Chain(None, chain.norm, None, None)
                    chains[chain.norm] = alone
                    chain.norm = None
                chain.act, chain.activation = None, None

    def is_weight(self, node: fx.Node) -> bool:
        """Whether it is a weight layer that is converted; if it is left though it could be, that is reported."""
        source = reading.weight_source(self.graph_module, node)
        if source is None or reading.is_normprop(source[1]):
            return False
        path, layer = source
        if reading.is_parametrized(layer):
            self.converter.skip(
                self.path(path), layer, "its weight is parametrized; remove_parametrizations first"
            )
            return False
        return not self.filtered(layer, path)

    def is_norm(self, node: fx.Node) -> bool:
        """Whether it is a BatchNorm that is converted; if it is left, that is reported."""
        if reading.is_functional_norm(node):
            self.converter.skip_functional(self.path(reading.owner(node)))
            return False
        norm: Any = self.module(node)
        if norm is None or not reading.is_batch_norm(norm):
            return False
        path = str(node.target)
        forward = type(norm).forward
        known = forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or hasattr(norm, "act")
        reason = ""
        if self.filtered(norm, path):
            reason = "filter_fn returned False"
        elif not known:
            reason = f"{type(norm).__name__} has a forward of its own; use torch's BatchNorm"
        elif self.preserve and norm.running_mean is None:
            reason = "it keeps no running statistics, so eval mode is not a fixed function; convert without preserve"
        elif self.prefix and not self.preserve and self.reads_data(node):
            reason = (
                "what it reads comes from code that cannot be followed (see the notes), its scale is not known; "
                "write that code so that torch.fx follows it, or convert with preserve=True"
            )
        if reason:
            self.converter.skip(self.path(path), norm, reason)
        return not reason

    def filtered(self, module: nn.Module, path: str) -> bool:
        return self.converter.filter_fn is not None and not self.converter.filter_fn(
            module, self.path(path)
        )

    def fits(self, weight: fx.Node, norm: fx.Node) -> bool:
        """Whether BatchNorm's channels (dim 1) are the weight layer's output units."""
        source = reading.weight_source(self.graph_module, weight)
        assert source is not None
        size = shape(weight)
        if isinstance(source[1], nn.Linear):
            features = getattr(self.module(norm), "num_features", source[1].out_features)
            return size is not None and len(size) == 2 and features == source[1].out_features
        return size is None or len(size) == len(source[1].kernel_size) + 2  # type: ignore[arg-type]

    @functools.cached_property
    def gates(self) -> dict[fx.Node, tuple[int, fx.Node]]:
        """Multiplications by a gate: (position of the gate among the arguments, its activation's node).

        A gate is a bounded activation of another map's weight layer, seen through views.
        """
        gates = {}
        for node in self.nodes:
            pair = node.args
            if key(node) != "mul" or len(pair) != 2 or not all(isinstance(a, fx.Node) for a in pair):
                continue
            for index in (0, 1):
                top, other = pair[index], pair[1 - index]
                assert isinstance(top, fx.Node)
                assert isinstance(other, fx.Node)
                while self.moves(top) and not self.drops(top) and len(top.users) == 1:
                    top = tensor_inputs(top)[0]
                alone = len(top.users) == 1 and len(tensor_inputs(top)) == 1
                if not (alone and _is_bounded(reading.activation_of(top, self.module(top)))):
                    continue
                itself = self.made_of(top) is self.made_of(other)  # x * sigmoid(2 * x)
                if not itself and self.behind_weight(top) and self.behind_weight(other):
                    gates[node] = (index, top)
                    break
        return gates

    def made_of(self, node: fx.Node) -> fx.Node:
        """The map from which a node is made, by operations without weights that read it alone and keep its shape."""
        while reading.weight_source(self.graph_module, node) is None:
            sources = {n for n in tensor_inputs(node) if n.op != "get_attr"}
            if len(sources) != 1 or shape(*sources) != shape(node):
                break
            (node,) = sources
        return node

    def behind_weight(self, node: fx.Node) -> bool:
        """Whether a weight layer lies before the node."""
        return bool(self.ancestors[node] & self.weight_mask)

    @functools.cached_property
    def ancestors(self) -> dict[fx.Node, int]:
        """The nodes before each node, and itself, as bits."""
        result: dict[fx.Node, int] = {}
        for index, node in enumerate(self.nodes):
            result[node] = 1 << index
            for source in node.all_input_nodes:
                result[node] |= result[source]
        return result

    def reads_data(self, norm: fx.Node) -> bool:
        """Whether a BatchNorm normalises the model's input."""
        return reading.data_of(self.graph_module, tensor_inputs(norm)[0]) is not None

    @functools.cached_property
    def weight_mask(self) -> int:
        """The weight layers, as bits."""
        layers = (reading.weight_source(self.graph_module, node) is not None for node in self.nodes)
        return sum(1 << index for index, is_layer in enumerate(layers) if is_layer)

    # Rewrite ------------------------------------------------------------------------------------

    def rewrite(self, chain: _Chain) -> fx.Node:
        """Put one module in a chain's place; the node that calls it."""
        head = chain.weight or chain.norm
        assert head is not None
        source = tensor_inputs(head)[0]
        path = self.local(head)
        full = self.path(path)
        if full not in self.converter.new:
            build = self.build_layer if chain.weight is not None else self.build_activation
            if not self.preserve and chain.data and chain.end is head:
                build = self.build_data_norm
            self.converter.new[full] = build(chain, head)
        if not self.preserve:
            source = self.ready(source)
        for called in self.calls:  # a layer whose forward calls modules of its own: padding, say
            if called.startswith(f"{path}."):
                child = self.graph_module.get_submodule(called)
                place(self.converter.new[full], called.removeprefix(f"{path}."), child)
        place(self.graph_module, path, self.converter.new[full])
        with self.graph.inserting_before(head):
            rest, named = (head.args[1:], head.kwargs) if head.op == "call_module" else ((), {})
            named = {name: value for name, value in named.items() if name != "input"}
            node = self.graph.call_module(path, (source, *rest), named)
        node.meta = dict(head.meta, value=chain.end.meta.get("value", head.meta.get("value")))
        if "value" not in chain.end.meta and "value" not in head.meta:
            node.meta.pop("value")
        chain.end.replace_all_uses_with(node)
        for old in (chain.act, chain.norm, chain.weight):
            if old is not None:
                self.graph.erase_node(old)
        return node

    def chain_name(self, chain: _Chain) -> str:
        parts = []
        if chain.weight is not None:
            source = reading.weight_source(self.graph_module, chain.weight)
            assert source is not None
            parts.append(type(source[1]).__name__)
        if chain.norm is not None:
            parts.append(type(self.module(chain.norm)).__name__)
        if chain.activation is not None:
            parts.append(activations.name_of(chain.activation))
        return " -> ".join(parts)

    def record(self, path: str, source: str, target: nn.Module) -> None:
        phi = getattr(target, "activation", None)
        name = phi if phi is None or isinstance(phi, str) else activations.name_of(phi)
        rule = getattr(target, "rule", None)
        details = [type(target).__name__, name, "centered" if rule is not None and rule.centered else None]
        self.converter.note_replaced(self.path(path), source, ", ".join(filter(None, details)))

    def build_layer(self, chain: _Chain, head: fx.Node) -> nn.Module:
        source = reading.weight_source(self.graph_module, head)
        assert source is not None
        path, layer = source
        kind = next(new for old, new in _LAYERS.items() if isinstance(layer, old))
        norm: Any = None if chain.norm is None else self.module(chain.norm)
        name = self.chain_name(chain)
        if head.op == "call_function":  # F.conv2d(x, self.weight, ...): its padding is the call's
            layer = copy.copy(layer)
            if isinstance(layer, nn.modules.conv._ConvNd):
                layer.padding = argument(head, 4, "padding", 0)
        if self.preserve:
            new = self._preserved(kind, layer, norm, chain.activation)
        else:
            bias = norm is not None or layer.bias is not None
            rule = self.layer_rule(layer, chain.first)
            new = kind.from_parent(layer, chain.activation, rule, bias)  # type: ignore[attr-defined]
            self.fresh_weight(new)
            if chain.start is not None:
                new.initial_gain = chain.start
                nn.init.constant_(new.gain, new.initial_gain)
        self.hand_over(path, layer, chain.norm, new)
        if chain.norm is not None:
            self.converter.absorbed.add(self.path(self.local(chain.norm)))
        if keep_hooks(layer, new) and (chain.norm is not None or chain.activation is not None):
            self.converter.report.notes.append(
                f"hook on '{self.path(path)}' now sees the normalised, activated map"
            )
        self.record(path, name, new)
        return new

    def layer_rule(self, layer: Any, first: bool) -> NormRule:
        return self.converter.rule.at(
            functional.fan_in(layer.weight, *functional.geometry_of(layer)), first
        )

    def fresh_weight(self, layer: Any) -> None:
        """Rows of length 1; a weight with a zero row (zero-initialised) is drawn anew."""
        with torch.no_grad():
            if layer.weight.is_meta:
                return
            layer.project_()
            lengths = functional.row_lengths(layer.weight, *functional.geometry_of(layer))
            if not bool((lengths > 0).all()):
                layer.reset_parameters()

    def hand_over(self, path: str, layer: Any, norm: fx.Node | None, new: Any) -> None:
        """Which parameter took whose place, and requires_grad."""
        full = self.path(path)
        if hasattr(layer, "weight") and not reading.is_batch_norm(layer):
            self.converter.moved[f"{full}.weight"] = f"{full}.weight"
            if layer.bias is not None:
                self.converter.moved[f"{full}.bias"] = f"{full}.bias" if norm is None else None
                if norm is None and new.bias is not None:
                    new.bias.requires_grad_(layer.bias.requires_grad)
        if norm is None:
            return
        module: Any = self.module(norm)
        where = self.path(self.local(norm))
        for theirs, ours in (("weight", "gain"), ("bias", "bias")):
            parameter = getattr(module, theirs)
            if parameter is not None and getattr(new, ours) is not None:
                self.converter.moved[f"{where}.{theirs}"] = f"{full}.{ours}"
                getattr(new, ours).requires_grad_(parameter.requires_grad)

    @torch.no_grad()
    def _preserved(self, kind: Any, layer: Any, norm: Any, activation: nn.Module | None) -> Any:
        new = kind.from_parent(layer, activation, _PRESERVE)
        gain, bias = _affine_of(norm)
        length = functional.row_lengths(layer.weight.double(), *functional.geometry_of(new))
        if layer.bias is not None:
            bias = bias + gain * layer.bias.double()
        new.gain.copy_(gain * length / new.stretch)
        new.bias.copy_(bias)
        return new

    def build_activation(self, chain: _Chain, head: fx.Node) -> nn.Module:
        norm: Any = self.module(head)
        phi = chain.activation if chain.activation is not None else nn.Identity()
        rule = _PRESERVE if self.preserve else self.converter.rule
        like = norm.running_mean if norm.running_mean is not None else norm.weight
        factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
        new = modules.NormalizedActivation(phi, norm.num_features, rule, **factory)
        name = self.chain_name(chain)
        if self.preserve:
            gain, bias = _affine_of(norm)
            with torch.no_grad():
                assert new.gain is not None
                assert new.bias is not None
                new.gain.copy_(gain)
                new.bias.copy_(bias)
        self.hand_over(str(head.target), norm, head, new)
        self.record(str(head.target), name, new)
        return new.train(norm.training)

    def build_data_norm(self, chain: _Chain, head: fx.Node) -> nn.Module:
        """A GlobalDataNorm with the statistics that a BatchNorm on the data has gathered, if it has."""
        norm: Any = self.module(head)
        path = self.path(str(head.target))
        size = shape(head)
        spatial = len(size) - 2 if size else 2 * isinstance(norm, nn.BatchNorm2d)
        result = GlobalDataNorm((norm.num_features, *[1] * spatial))
        known = norm.running_mean is not None and not norm.running_mean.is_meta
        if known and norm.num_batches_tracked:
            result.mean.copy_(norm.running_mean.view(result.mean.shape))
            result.std.copy_((norm.running_var + norm.eps).sqrt().view(result.std.shape))
        else:
            self.converter.report.notes.append(
                f"'{path}' normalised the data and has no statistics yet: data now pass as they are; put "
                "normprop.GlobalDataNorm.fit(data) before the model"
            )
        for name, _ in norm.named_parameters():
            self.converter.moved[f"{path}.{name}"] = None
        self.converter.note_replaced(path, type(norm).__name__, "GlobalDataNorm")
        tensors = [*norm.parameters(), *norm.buffers(), *self.graph_module.parameters(), result.mean]
        return result.to(tensors[0].device)

    # Fresh: everything between the layers -------------------------------------------------------

    def rewrite_fresh(self, chains: dict[fx.Node, _Chain]) -> None:
        joins, gates = self.find_joins(), self.gates
        branches = {node: node.args[1 - trunk] for node, trunk in joins.items() if trunk is not None}
        self.depth = max(2, len(branches))
        small = {node: (before, 1 / math.sqrt(self.depth)) for node, before in branches.items()}
        small |= {node: (tensor_inputs(top)[0], 1 / len(gates)) for node, (_, top) in gates.items()}
        for node, (before, start) in small.items():
            if (chain := self.chain_before(before, chains)) is not None:
                chain.start = self.starts[node] = start
        phis = {top: reading.activation_of(top, self.module(top)) for _, top in gates.values()}
        inner = {n for c in chains.values() for n in (c.weight, c.norm, c.act)}
        for node in self.nodes:
            if node in chains:
                self.flow.visit(self.rewrite(chains[node]))
            elif node in phis:  # the gate applies it
                node.replace_all_uses_with(tensor_inputs(node)[0])
                self.graph.erase_node(node)
            elif node not in inner:
                if node in gates:
                    index, top = gates[node]
                    node = self.rewrite_gate(node, index, phis[top])
                elif node in joins:
                    node = self.rewrite_join(node, joins[node])
                elif key(node) == "cat" and isinstance(argument(node, 0, "tensors"), (list, tuple)):
                    for part in dict.fromkeys(tensor_inputs(node)):
                        node.replace_input_with(part, self.ready(part))
                elif type(self.module(node)) is nn.Dropout and self.feeds_hidden(node, chains):
                    node = self.rewrite_dropout(node)
                else:
                    node = self.rewrite_pool(node)
                if node not in self.flow.visited:
                    self.flow.visit(node)

    def ready(self, node: fx.Node) -> fx.Node:
        """The node, or a Standardize behind it if its signal is not at mean 0, variance 1."""
        if node in self.ready_nodes:
            new = self.ready_nodes[node]
            if new not in self.flow.values:  # given up when all who read it then had done so
                self.flow.visit(new)
            return new
        now = self.flow.moments(node) or self.flow.measured.get(node)  # of a tensor that the code makes
        border = self.hidden and node.op == "placeholder"  # the parts before it are not exact
        if now is None or (node.op in ("placeholder", "get_attr") and not border):
            return node
        mean, std = now
        far = max(abs(mean), abs(std - 1))
        if (signal := self.flow.walk.signals.get(node)) is not None:
            foreseen = max(signal.std, 1e-9)
            wrong = max(
                abs(mean - signal.mean), abs(std / foreseen - 1), abs(foreseen / max(std, 1e-9) - 1)
            )
            far = max(far, wrong)
        if not (math.isfinite(mean) and math.isfinite(std)) or std < 1e-6:
            return node
        if self.flow.chance is not None:
            far += 2 * self.flow.chance.get(node, 0.0)
        if (
            not self.decide("standardize", node, far > _TOLERANCE or border)
            and max(abs(mean), std - 1) <= _LIMIT
        ):
            return node
        module = merges.Standardize(mean, std)
        merges.keep_in_state_dict(module, "mean", "std")
        path = self.install(node, "standardize", module)
        with self.graph.inserting_after(node):
            new = self.graph.call_module(path, (node,))
        new.meta = dict(node.meta)
        self.flow.visit(new)
        self.ready_nodes[node] = new
        return new

    def install(self, node: fx.Node, name: str, module: nn.Module, source: str = "") -> str:
        """Place a new module beside the code that it serves; the same in both modes' graphs."""
        where = reading.owner(node)
        if node.op == "call_module" and has(self.graph_module, where.rpartition(".")[0]):
            where = where.rpartition(".")[0]
        while (
            where
            and has(self.graph_module, where)
            and isinstance(self.graph_module.get_submodule(where), reading.WEIGHT_LAYERS)
        ):
            where = where.rpartition(".")[0]
        base = below(where, name)
        ordinal = 0
        path = base
        while self.converter.new.get(self.path(path)) is not None or has(self.graph_module, path):
            ordinal += 1
            known = self.converter.new.get(self.path(path))
            if known is not None and repr(known) == repr(module) and path not in self.calls:
                module = known
                break
            path = f"{base}_{ordinal}"
        self.converter.new[self.path(path)] = module
        self.calls[path] = []
        place(self.graph_module, path, module)
        if source:
            self.record(path, source, module)
        return path

    def find_joins(self) -> dict[fx.Node, int | None]:
        """Sums of two branches, and which of the two is the trunk; None if neither is.

        The trunk is what the other branch was made of, or else the branch with fewer weight layers
        since they parted: a projection shortcut.
        """
        joins: dict[fx.Node, int | None] = {}
        for node in self.nodes:
            pair = node.args
            if key(node) != "add" or len(pair) != 2 or not all(isinstance(a, fx.Node) for a in pair):
                continue
            a, b = pair
            assert isinstance(a, fx.Node)
            assert isinstance(b, fx.Node)
            if a is b or shape(a) != shape(b) or not (self.behind_weight(a) and self.behind_weight(b)):
                continue
            value = node.meta.get("value")
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            before = self.ancestors[a], self.ancestors[b]
            layers = [(before[k] & ~before[1 - k] & self.weight_mask).bit_count() for k in (0, 1)]
            if max(layers) == 0:
                continue  # x + act(x)
            joins[node] = None if layers[0] == layers[1] else layers.index(min(layers))
        return joins

    def chain_before(self, node: Any, chains: dict[fx.Node, _Chain]) -> _Chain | None:
        """The weight layer without activation whose output, read by nobody else, a node is."""
        while isinstance(node, fx.Node) and len(node.users) == 1:
            chain = next((c for c in chains.values() if c.end is node), None)
            if chain is not None:
                if chain.weight is None or chain.activation is not None:
                    return None
                return chain if len(self.calls[self.local(chain.weight)]) <= 1 else None
            if not self.moves(node):
                return None
            node = tensor_inputs(node)[0]
        return None

    def rewrite_join(self, node: fx.Node, trunk: int | None) -> fx.Node:
        ends: list[Any] = [node.args[trunk or 0], node.args[1 - (trunk or 0)]]
        there, here = (self.flow.moments(n) for n in ends)
        if there is None or here is None:
            return node
        if trunk is not None and self.decide("tiny", node, here[1] < _TINY * there[1]):
            return node
        if trunk is None:
            ends = [self.ready(n) for n in ends]
            module = merges.NormalizedAdd()
        else:
            scaled = self.starts.get(node, 1.0)
            if scaled == 1.0:
                ends[1] = self.ready(ends[1])
            if self.decide("far", node, not 0.2 <= math.hypot(*there) <= 5.0):
                ends[0], there = self.ready(ends[0]), (0.0, 1.0)
            module = merges.NormalizedAdd.residual(self.depth, stds=(there[1], scaled))
            merges.keep_in_state_dict(module, "stds")
        return self.replace(node, self.install(node, "add", module, "add"), tuple(ends))

    def rewrite_gate(self, node: fx.Node, index: int, phi: nn.Module | None) -> fx.Node:
        ends: list[Any] = [node.args[1 - index], node.args[index]]
        if any(self.flow.moments(n) is None for n in ends):
            return node
        ends[0] = self.ready(ends[0])
        std = self.starts.get(node, 1.0)
        if std == 1.0:
            ends[1] = self.ready(ends[1])
        assert phi is not None
        gate = merges.NormalizedGate(_own_copy(phi), std=std)
        source = f"{activations.name_of(phi)} -> mul"
        return self.replace(node, self.install(node, "gate", gate, source), tuple(ends))

    def rewrite_pool(self, node: fx.Node) -> fx.Node:
        """A pool, an average over all positions or an upsampling as its normalised twin; else the node."""
        # Once it was called, a pool's place is taken by its twin.
        module = self.converter.pools.get(self.path(str(node.target)), self.module(node))
        source = next(iter(tensor_inputs(node)), None)
        if source is None or self.flow.moments(source) is None:
            return node
        pool = _normalized_pool(node, module, self.phi_before(source))
        if pool is None:
            return node
        name = type(module).__name__ if module is not None else key(node)
        source = self.ready(source)
        self.correlate(pool, source)
        if module is not None:
            path = str(node.target)
            known = self.converter.new.get(self.path(path))
            if known is None:
                self.converter.pools[self.path(path)] = module
                self.converter.new[self.path(path)] = known = pool.train(module.training)
                keep_hooks(module, known)
                self.record(path, name, known)
            if repr(known) == repr(pool):
                place(self.graph_module, path, known)
            else:  # the same module after another activation, or of another correlation
                path = self.install(node, "pool", pool.train(module.training), name)
        else:
            path = self.install(node, "pool", pool, name)
        new = self.replace(node, path, (source,))
        if key(node) == "mean" and not argument(node, 2, "keepdim", False):
            self.flow.visit(new)
            with self.graph.inserting_after(new):
                flat = self.graph.call_function(torch.flatten, (new, 1))
            flat.meta = dict(new.meta)
            new.replace_all_uses_with(flat)
            flat.args = (new, 1)
            if isinstance(value := new.meta.get("value"), Tensor):
                new.meta["value"] = value[..., None, None]
            return flat
        return new

    def feeds_hidden(self, node: fx.Node, chains: dict[fx.Node, _Chain]) -> bool:
        """Whether all that reads a map are hidden weight layers, whose activation counts on variance 1."""
        readers = list(node.users)
        for reader in readers:  # grows
            if self.moves(reader):
                readers += reader.users
            elif reader not in chains or not (chains[reader].norm or chains[reader].activation):
                return False
        return bool(readers)

    def rewrite_dropout(self, node: fx.Node) -> fx.Node:
        """Dropout between hidden layers keeps variance, or each would add to that of the one before."""
        module: Any = self.module(node)
        source = self.ready(tensor_inputs(node)[0])
        new = merges.NormalizedDropout(module.p).train(module.training)
        path = str(node.target)
        if len(self.calls[path]) > 1 or keep_hooks(module, new):
            path = self.install(node, "hidden_dropout", new, "Dropout")
        else:
            self.converter.new[self.path(path)] = new
            place(self.graph_module, path, new)
            self.record(path, "Dropout", new)
        return self.replace(node, path, (source,))

    def correlate(self, pool: nn.Module, source: fx.Node) -> None:
        """Give a global average pool the correlation of the positions that it averages."""
        x = self.flow.values.get(source)
        if not (isinstance(x, Tensor) and isinstance(pool, pools.AdaptiveAvgPool)) or x.ndim <= 2:
            return
        count = math.prod(x.shape[2:])
        if count < 2 or any(size not in (1, None) for size in pools.per_axis(pool.output_size, x.ndim - 2)):
            return
        share = float(x.flatten(2).float().mean(2).var() / x.float().var().clamp_min(1e-12))
        if math.isfinite(share):
            pool.correlation = min(max((count * share - 1) / (count - 1), 0.0), 0.99)  # type: ignore[assignment]
            merges.keep_in_state_dict(pool, "correlation")

    def replace(self, node: fx.Node, path: str, args: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_before(node):
            new = self.graph.call_module(path, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def phi_before(self, node: fx.Node) -> nn.Module | None:
        """The activation whose normalised output a map is, seen through concats and other pools."""
        for _ in range(8):
            module = self.module(node)
            phi = getattr(module, "activation", None)
            if isinstance(phi, nn.Module) and reading.is_normprop(module):
                return _own_copy(phi)
            found = reading.activation_of(node, module)
            if found is not None:
                return _own_copy(found)
            inputs = tensor_inputs(node)
            if not inputs or reading.is_normprop(module):
                return None
            node = inputs[0]
        return None


def _normalized_pool(node: fx.Node, module: nn.Module | None, phi: nn.Module | None) -> nn.Module | None:
    """The normalised twin of a pool; None if the node is none, is one already, or returns indices."""
    modes = ("linear", "bilinear", "bicubic", "trilinear")
    if type(module) is nn.Upsample and module.mode in modes and not module.recompute_scale_factor:
        return pools.NormalizedUpsample(module.size, module.scale_factor, module.mode, module.align_corners)
    name = key(node) if module is None else type(module).__name__
    if name == "mean" and module is None:
        dims = argument(node, 1, "dim", None)
        size = shape(tensor_inputs(node)[0])
        spatial = isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]
        return (
            pools.NormalizedAdaptiveAvgPool2d(1)
            if spatial and size is not None and len(size) == 4
            else None
        )
    if name not in reading.POOLS:
        return None
    kind, adaptive, d = reading.POOLS[name]
    names = _POOL_ARGUMENTS["adaptive" if adaptive else kind]
    if module is not None:
        given = {n: getattr(module, n) for n in (*names, "return_indices") if hasattr(module, n)}
    else:
        given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.pop("return_indices", False) or any(
        reading.nodes_in(v) for n, v in given.items() if n != "input"
    ):
        return None
    options = {n: value for n, value in given.items() if n not in ("input", "inplace")}
    twin = f"Normalized{'Adaptive' * adaptive}{kind.capitalize()}Pool{d}d"
    return getattr(pools, twin)(**options, **({"activation": phi} if kind == "max" else {}))


_POOL_ARGUMENTS = {
    "adaptive": ("output_size",),
    "max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
}


def keep_hooks(old: nn.Module, new: nn.Module) -> bool:
    """Give a module the hooks of the one whose place it takes; whether there are any."""
    tables = [name for name in vars(old) if "forward" in name and "hooks" in name]
    for name in tables:
        setattr(new, name, getattr(old, name))
    return any(getattr(old, name) for name in ("_forward_hooks", "_forward_pre_hooks"))


def _is_bounded(activation: nn.Module | None) -> bool:
    """Whether a function, such as sigmoid, stays small far out: what gates are made of."""
    if activation is None or activations.is_learned(activation):
        return False
    with torch.no_grad():
        return bool(_own_copy(activation)(torch.tensor([-50.0, 50.0])).abs().max() < 10)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _own_copy(activation: nn.Module) -> nn.Module:
    """The activation for a layer of its own: learned slopes shared, nothing written in place, no hooks."""
    if activations.is_learned(activation):
        return activation
    activation = copy.deepcopy(activation)
    for name in activations.HOOKS:
        getattr(activation, name).clear()  # they are listed as lost
    return activations.out_of_place(activation)


def _affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm does in eval mode: ``gain * x + bias``, float64."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    bias = -norm.running_mean.double() * gain
    return gain, bias if norm.bias is None else bias + norm.bias.double()
