"""Operations in place: who reads a tensor that was overwritten, and how they are written out of place."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.graph.reading import TraceError, key, module_of


def written_attributes(model: nn.Module, graph: fx.Graph) -> set[str]:
    """The tensors of the model's own that its code writes into."""
    owned = {_storage(n) or id(n): n for n in graph.nodes if n.op == "get_attr"}
    found = set()
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        if isinstance(target, fx.Node) and writes_in_place(model, node):
            source = owned.get(_storage(target) or id(target))
            if source is not None and not str(source.target).startswith("_tensor_constant"):
                found.add(f"writes into self.{source.target}")
    return found


def writes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node overwrites its first argument."""
    module = module_of(root, node)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return (
        bool(getattr(module, "inplace", False))
        or bool(node.kwargs.get("inplace"))
        or (node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__"))
        or (node.op == "call_function" and node.target in _IN_PLACE)
    )


def name_what_is_written(model: nn.Module, graph: fx.Graph) -> None:
    """Who reads a tensor after it was overwritten reads the node that wrote it."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        if isinstance(target, fx.Node) and writes_in_place(model, node) and _is_map(target):
            for user in list(target.users):
                if order[user] > order[node]:
                    user.replace_input_with(target, node)
            for other in _other_names(model, target):
                read_later = any(order[user] > order[node] for user in other.users)
                if order[other] < order[node] and read_later and _overlap(target, other):
                    raise TraceError(
                        f"'{node}' writes into '{target}', of which '{other}', read later, is another view; "
                        "write it out of place"
                    )


def _other_names(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """The other names of a node's memory: by storage; without values its views, and what it is a view of."""
    if isinstance(node.meta.get("value"), Tensor):
        storage = _storage(node)
        yield from (other for other in node.graph.nodes if other is not node and _storage(other) == storage)
        return

    def is_view(n: fx.Node) -> bool:
        name = type(model.get_submodule(str(n.target))).__name__ if n.op == "call_module" else key(n)
        return name in _VIEWS

    base = node
    while is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
        yield base
    views = [user for user in node.users if is_view(user)]
    for view in views:  # grows
        yield view
        views += [user for user in view.users if is_view(user)]


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("value")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _overlap(node: fx.Node, other: fx.Node) -> bool:
    """Whether two views of one memory share an element; yes, if it is not known."""
    a, b = (n.meta.get("value") for n in (node, other))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype != b.dtype:
        return True
    seen = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    seen.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _is_map(node: fx.Node) -> bool:
    """Not a number or a size, which ``+=`` does not overwrite."""
    value = node.meta.get("value")
    return value is None or isinstance(value, Tensor)


_VIEWS = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "movedim",
    "swapaxes", "rearrange", "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "getitem", "chunk", "split",
    "unbind", "t", "detach", "contiguous", "Identity", "Flatten", "Unflatten", "Dropout", "Dropout2d", "Dropout3d",
}  # fmt: skip


def write_nothing_in_place(graph_module: fx.GraphModule) -> None:
    """A layer may have kept for its backward what an in-place operation behind it would overwrite."""
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[union-attr, assignment]
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif writes_in_place(graph_module, node) and not _fills(node):
            name = str(node.target) if node.op == "call_method" else node.target.__name__
            plain = name.removesuffix("_")
            home = next((m for m in (torch.nn.functional, torch) if hasattr(m, plain)), None)
            if node.op == "call_method" and hasattr(Tensor, plain):
                node.target = plain
            elif node.op == "call_function" and home is not None:
                node.target = getattr(home, plain)


def _fills(node: fx.Node) -> bool:
    """Whether a node writes in place what has no out-of-place twin."""
    home = getattr(node.target, "__module__", None) or ""
    return node.target in ("requires_grad_", "bernoulli_") or home == "torch.nn.init"


_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
