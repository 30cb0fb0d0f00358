"""Training aids: unit rows after every step, a trust region, parameter groups, unit-wise clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from normprop import kernels
from normprop.merges import NormalizedAdd, NormalizedGate
from normprop.modules import Handles, NormalizedActivation, NormPropLayer, check_model
from normprop.rows import Geometry, _rows, cache_slices, geometry_of, project_rows_, row_lengths, row_view


def project_(model: nn.Module) -> None:
    """Put the weight rows of all NormProp layers back on the unit sphere, in place, without gradient.

    Changes no output: the layers divide by the row's length anyway (a weight that an nn.Embedding shares
    does change there). It keeps the step that a gradient makes in a row's direction from shrinking as
    the row grows (docs/method.md, section 7). Zero rows stay zero; centred rows lose their mean; rows
    whose length is no number any more become NaN. Frozen weights are left alone.

    Args:
        model: Any module; layers of other kinds are left alone.

    Raises:
        ValueError: If a layer's weight is no parameter of its own (pruned, parametrized).
    """
    check_model(model)
    together: dict[Any, dict[int, tuple[Tensor, Geometry, bool]]] = {}
    for module in model.modules():
        if isinstance(module, NormPropLayer) and module.weight.requires_grad:
            _check_owned(module)
            weight = module.weight
            rows = together.setdefault((weight.device, weight.dtype), {})
            # A shared weight once; a layer that does not centre needs its mean.
            *_, others = rows.get(id(weight), (True,))
            rows[id(weight)] = weight, geometry_of(module), module.rule.centered and others
    for rows in together.values():
        project_rows_(*zip(*rows.values(), strict=True))


def attach_projection(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    trust_radius: float | None = None,
    orthogonal: bool = False,
) -> Handles:
    r"""Call :func:`project_` after every ``optimizer.step()``, as the paper does after every iteration.

    With ``trust_radius`` no step changes a NormProp unit by more than that, whatever the learning rate
    and the optimizer; layers of other kinds are not bounded. The unit's update is scaled down where

    .. math:: \Delta^2 = (|g| + \min(|\delta g|, r))^2\, \lVert \delta W_i \rVert^2 + \delta g^2 + \delta b^2

    (changes of unit row W, gain g and bias b) is larger than r squared, r being the radius. For inputs of mean
    0 and covariance I, Δ bounds the root mean square of the pre-activation's change; inputs that are
    correlated can move it several times as far (docs/method.md, section 7). The radius falls with the
    learning rate, in proportion to the largest one so far.

    With ``orthogonal`` the step of each NormProp weight, tangent to its rows, is first replaced by
    :func:`orthogonal` of it, rows of the radius' length: all singular directions of the step get
    about the same size. Gains and biases move as the optimizer moves them
    and share the bound with their rows: a small learning rate (0.05 with SGD) leaves most of it to the
    rows. A warm-up, or another learning rate in one group, does not change the rows' steps (the radius
    is that of the largest rate so far). More accurate at equal epochs, for 6 to 40 % of a
    step's time on a CPU (experiments/beyond; docs/method.md, section 7).

    Args:
        optimizer: Any torch optimizer; of one that steps another (SAM), the inner one, whose ``step`` is called.
            Before Opacus or accelerate wrap it.
        model: The model whose rows it keeps at unit length.
        trust_radius: The largest change, in standard deviations of a pre-activation; 0.01 suits batches
            of about 100, 0.02 if orthogonal (experiments/LOG.md), and ``sqrt(batch / 100)`` times that
            smaller ones. None for no limit. It costs a copy of the weights (of the whole ones, if FSDP
            shards them).
        orthogonal: Make the weights' steps orthogonal; needs a trust radius, float32 weights, and an optimizer
            with momentum (``torch.optim.SGD(..., momentum=0.9, nesterov=True)``).

    Returns:
        A handle; ``handle.remove()`` ends it. A deep copy of the optimizer has no hooks: call this
        for it again.

    Raises:
        ValueError: If the model has no NormProp layer, or one whose weight is no parameter of its own
            (pruned, parametrized), or no parameter in the optimizer, or the radius is not above 0; if
            orthogonal, also if it is missing, or a weight is in half precision, where rounding decides a
            small step's direction.
        TypeError: If the optimizer takes no hooks, or is LBFGS with a trust radius.

    Example:
        >>> layer = normprop.NormPropLinear(3, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1000.0)
        >>> handle = attach_projection(optimizer, layer, trust_radius=0.01)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(4, 3)).sum().backward()
        >>> optimizer.step()
        >>> bool((layer.weight - before).norm(dim=1).max() < 0.0101)
        True
    """
    if isinstance(optimizer, nn.Module):
        raise TypeError("the optimizer comes first: attach_projection(optimizer, model)")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} takes no step hooks: attach the projection to the optimizer that it "
            "wraps (with Opacus, before make_private)"
        )
    check_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NormPropLayer)}
    for name, layer in layers.items():
        _check_owned(layer, name)
    if not any(isinstance(module, (NormPropLayer, NormalizedActivation)) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no NormProp layer; build it with normprop.NormPropLinear, NormPropConv2d, "
            "..., or convert it: normprop.convert(model).model"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"the optimizer holds no parameter of this {type(model).__name__}: build it on this model (after "
            "normprop.convert: on conversion.model, or conversion.update_optimizer_(optimizer))"
        )
    if trust_radius is None:
        if orthogonal:
            raise ValueError(
                "orthogonal steps have the length trust_radius, got None; 0.02 suits batches of about 100"
            )
        return Handles((optimizer.register_step_post_hook(lambda *_: project_(model)),))
    _check_positive("trust_radius", trust_radius)
    half = [
        f"'{name}' is {layer.weight.dtype}"
        for name, layer in layers.items()
        if layer.weight.dtype.itemsize < 4
    ]
    if orthogonal and half:
        raise ValueError(
            f"orthogonal steps need float32 weights, {half[0]}: keep weights float32, use torch.autocast"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS makes many moves in a step, which a trust radius cannot bound: leave trust_radius out"
        )
    region = _TrustRegion(model, trust_radius, orthogonal)
    before = optimizer.register_step_pre_hook(region.remember)
    return Handles((before, optimizer.register_step_post_hook(region.restrain)))


class _TrustRegion:
    """Where the units of a model may be after a step: around where they were before."""

    def __init__(self, model: nn.Module, radius: float, orthogonal: bool) -> None:
        self.model, self.radius, self.orthogonal = model, radius, orthogonal
        self.units: list[tuple[Any, dict[str, Tensor]]] = []
        self.before: list[dict[str, Tensor]] = []
        self.sharers: dict[int, list[int]] = {}  # the units of a weight, by its id
        self.kept: list[Tensor] = []
        self.joined: list[kernels.Units] = []  # instead, where kernels do it

    def _units(self) -> list[tuple[Any, dict[str, Tensor]]]:
        """Layers with what of theirs a step moves; a shared parameter belongs to the first."""
        self.sharers = {}
        units: list[tuple[Any, dict[str, Tensor]]] = []
        seen: set[int] = set()
        for layer in self.model.modules():
            if isinstance(layer, (NormPropLayer, NormalizedActivation)) and layer.gain is not None:
                moving: dict[str, Tensor] = {}
                for name in ("weight", "gain", "bias"):
                    p = layer._parameters.get(name)
                    if p is not None and id(p) not in seen and (p.requires_grad or name != "weight"):
                        moving[name] = p
                        seen.add(id(p))
                    if p is not None and name == "weight":
                        self.sharers.setdefault(id(p), []).append(len(units))
                units.append((layer, moving))
        return units

    def _join(self) -> list[kernels.Units]:
        """The units of layers of each kind; none where kernels cannot, or they share parameters."""
        kinds: dict[Any, list[tuple[Any, ...]]] = {}
        if any(len(places) > 1 for places in self.sharers.values()):
            return []
        for layer, own in self.units:
            if "weight" in own and (layer.transposed or "gain" not in own):
                return []
            if own:
                gain = layer.gain
                parts = own.get("weight"), own.get("gain"), own.get("bias")
                entry = parts, len(gain), layer.rule.centered
                kinds.setdefault((gain.device, gain.dtype), []).append(entry)
        arguments = [list(zip(*kind, strict=True)) for kind in kinds.values()]
        for layers, *_ in arguments:
            if not kernels.usable([t for parts in layers for t in parts if t is not None]):
                return []
        return [kernels.Units.now(*own) for own in arguments]

    @torch.no_grad()
    def remember(self, *_: Any) -> None:
        """Before a step."""
        self.units = self._units()
        self.joined = [] if self.orthogonal else self._join()
        if not self.joined:
            now = [_whole(p) for _, own in self.units for p in own.values()]
            if [_layout(t) for t in self.kept] != [_layout(p) for p in now]:
                self.kept = [torch.empty_like(p) for p in now]  # kept for all steps: fresh memory is slow
            torch._foreach_copy_(self.kept, now)
            copies = iter(self.kept)
            self.before = [dict(zip(own, copies, strict=False)) for _, own in self.units]

    @torch.no_grad()
    def restrain(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step: updates scaled down to the radius, rows put back to unit length."""
        radius = self.radius * annealed(optimizer)
        if self.joined:
            for kind in self.joined:
                kind.restrain_(radius)
            self.units, self.joined = [], []
            return
        sharded, before, self.units, self.before = self.units, self.before, [], []
        moved = [
            _Moved(layer, {name: _whole(p) for name, p in own.items()}, old)
            for (layer, own), old in zip(sharded, before, strict=True)
        ]
        if self.orthogonal:
            for layer in moved:
                layer.make_orthogonal_(radius)
        for layer, share in zip(moved, self._shares(moved, radius), strict=True):
            layer.go_(share)
        for (_, own), layer in zip(sharded, moved, strict=True):
            for name, p in own.items():
                _put_back(p, layer.now[name])
        project_(self.model)

    def _shares(self, moved: list[_Moved], radius: float) -> Sequence[Tensor]:
        """What share of its step each unit may make, layer by layer; computed for all at once."""
        counts = [layer.count for layer in moved]
        lengths = torch.cat([layer.of("weight", layer.lengths) for layer in moved])
        turn = torch.cat([layer.of("weight", layer.distances) for layer in moved])
        turn /= torch.threshold(lengths, 0.0, 1.0)
        change, shift = (
            torch.cat([layer.of(name, lambda old, new: _wide(new - old)) for layer in moved])
            for name in ("gain", "bias")
        )
        gain = torch.cat([layer.gain_before for layer in moved]).abs()
        gain += change.abs().clamp_max(radius)  # it will not grow by more than that
        shared = [
            (first, other)
            for first, *others in self.sharers.values()
            for other in others
            if counts[other] == counts[first]
        ]
        turns = turn.split(counts)
        for first, other in shared:  # its rows turn too
            turns[other].copy_(turns[first])
        size = ((gain * turn).square() + change.square() + shift.square()).sqrt()
        sizes = size.split(counts)
        for first, other in shared:
            torch.maximum(sizes[first], sizes[other], out=sizes[first])
        return (radius / size.clamp_min(max(radius, 1e-30))).split(counts)


@dataclass
class _Moved:
    """A layer's parameters after a step, and before it; those that are its own to move."""

    layer: Any
    now: dict[str, Tensor]
    before: dict[str, Tensor]

    @property
    def count(self) -> int:
        """How many units."""
        return len(self.layer.gain)

    @property
    def gain_before(self) -> Tensor:
        return _wide(self.before["gain"] if "gain" in self.before else _whole(self.layer.gain))

    def of(self, name: str, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One number a unit, from what was and what is; 0 where there is no such parameter."""
        if name not in self.now:
            return torch.zeros_like(self.gain_before)
        return measure(self.before[name], self.now[name])

    def lengths(self, old: Tensor, _: Tensor) -> Tensor:
        return row_lengths(old, *geometry_of(self.layer))

    def distances(self, old: Tensor, new: Tensor) -> Tensor:
        """How far each row moved; on a CPU in parts that a cache holds, as fresh memory is slow."""
        slices = [] if self.layer.transposed else cache_slices(old)
        if not slices:
            return row_lengths(new - old, *geometry_of(self.layer))
        return torch.cat([row_lengths(new[at] - old[at]) for at in slices])

    def make_orthogonal_(self, radius: float) -> None:
        """The weight's step, tangent to its rows, replaced by an orthogonal one of this length."""
        if "weight" in self.now:
            old, new = self.before["weight"], self.now["weight"]
            step = orthogonal(_tangent(self.layer, old, new - old), *geometry_of(self.layer))
            torch.add(old, step, alpha=radius, out=new)

    def go_(self, share: Tensor) -> None:
        """This share of the step, of each unit, from where it was."""
        for name, end in self.now.items():
            start, part = self.before[name], share.to(end.dtype)
            if name == "weight":
                part = part.view(_rows(end, geometry_of(self.layer)).shape)
                start, end = (row_view(t, *geometry_of(self.layer)) for t in (start, end))
            torch.lerp(start, end, part, out=end)


def _check_owned(layer: nn.Module, name: str = "") -> None:
    if "weight" not in layer._parameters:
        raise ValueError(
            f"the weight of '{name or type(layer).__name__}' is parametrized or pruned, so that it cannot be put "
            "back on the sphere; remove that first (remove_parametrizations, prune.remove; what is to stay pruned is "
            "pruned after normprop.fold, for centred rows keep no zeros)"
        )


def _check_positive(name: str, value: Any) -> None:
    if not (isinstance(value, Real) and 0 < float(value) < math.inf):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _whole(x: Any) -> Tensor:
    """A tensor's values; where FSDP keeps a part of them here, those of all parts."""
    return x.full_tensor().detach() if hasattr(x, "full_tensor") else x.detach()


def _put_back(x: Any, whole: Tensor) -> None:
    """The values into the part that is here; a tensor of its own has them."""
    if hasattr(x, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        x.copy_(distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None))


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tangent(layer: Any, weight: Tensor, step: Tensor) -> Tensor:
    """A weight's step without what the projection takes away: rows' directions, and their means if centred."""
    rows, moves = (_rows(t, geometry_of(layer)) for t in (weight, step))
    along = (rows.values * moves.values).sum(rows.dims, keepdim=True)
    square = (
        rows.values.square().sum(rows.dims, keepdim=True).clamp_min(torch.finfo(rows.values.dtype).tiny)
    )
    tangent = moves.values - rows.values * (along / square)
    if layer.rule.centered:
        tangent -= tangent.mean(rows.dims, keepdim=True)
    return tangent.reshape(step.shape)


def annealed(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate as a share of the largest so far, which the optimizer's state keeps for a resumed run."""
    groups = optimizer.param_groups
    rate = max(float(group["lr"]) for group in groups)
    groups[0]["largest_lr"] = largest = max(rate, groups[0].get("largest_lr", 0.0))
    return rate / largest if largest > 0 else 1.0


def orthogonal(step: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    r"""The (semi-)orthogonal matrix nearest to a weight's step, scaled to rows of length 1.

    .. math:: W = USV' \mapsto UV', \qquad X_0 = W/\lVert W\rVert_F, \quad
        X_{k+1} = (aI + bX_kX_k' + c(X_kX_k')^2)\, X_k

    Source: Jordan et al. (2024), "Muon", with their a, b, c; five iterations bring singular values of at
    least 0.01 of the step's length to between 0.68 and 1.14, before the scaling. All products but the
    first and last are of the smaller side's size. The rows' length is the root mean square over them.

    Args:
        step: Shape as a weight's: ``(out, in/groups, *kernel)``; transposed: ``(in, out/groups, *kernel)``. A group
            is a matrix of its own, ``(out/groups, in/groups * prod(kernel))``.
        transposed: Whether the weight is stored as ``nn.ConvTranspose`` stores it.
        groups: Groups of the convolution.

    Returns:
        Same shape and dtype; zeros if the step is.

    Example:
        >>> orthogonal(torch.tensor([[3.0, 0.0], [0.0, 0.1]])).round(decimals=1)
        tensor([[0.7000, 0.0000],
                [0.0000, 1.2000]])
    """
    view = row_view(step, transposed, groups)  # (groups, in, out, kernel) if transposed
    rows = view.transpose(1, 2) if transposed else view.unflatten(0, (groups, -1))
    x = _wide(rows.flatten(2))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1.0)  # at least 1, unless nothing steps
    with torch.autocast(step.device.type, enabled=False):  # powers of x x' need float32
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        square, power = x @ x.mT, identity
        for left in reversed(range(5)):
            factor = 3.4445 * identity - 4.7750 * square + 2.0315 * square @ square
            power = factor if power is identity else factor @ power
            square = factor @ square @ factor if left else square
        x = power @ x
    x = x.mT if tall else x
    x = x * (math.sqrt(x.shape[1]) / x.norm(dim=(1, 2), keepdim=True).clamp_min(0.1))
    x = x.reshape(rows.shape)
    return (x.transpose(1, 2) if transposed else x).reshape(step.shape).to(step.dtype)


def param_groups(model: nn.Module, weight_decay: float, gain_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: what decays, and by how much.

    A NormProp weight never decays, nor do a sum's learned weights: their length has no effect, so decay
    would only change their step size (docs/method.md, section 7). The gains, biases and activation
    parameters of NormProp layers decay by ``gain_decay``, all others by ``weight_decay``.

    Args:
        model: Any module.
        weight_decay: For the parameters of all other layers.
        gain_decay: For gains, biases and learned activations.

    Returns:
        Up to three groups, each trainable parameter in exactly one.

    Raises:
        ValueError: If a decay is negative.

    Example:
        >>> layer = normprop.NormPropLinear(3, 2)
        >>> [(len(g["params"]), g["weight_decay"]) for g in param_groups(layer, 5e-4)]
        [(1, 0.0), (2, 0.0)]
    """
    check_model(model)
    for name, value in (("weight_decay", weight_decay), ("gain_decay", gain_decay)):
        if not (isinstance(value, Real) and float(value) >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    kinds = (NormPropLayer, NormalizedActivation, NormalizedAdd, NormalizedGate)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    directions = [layer.weight for layer in layers if isinstance(layer, (NormPropLayer, NormalizedAdd))]
    weights = {id(p): p for p in directions if isinstance(p, nn.Parameter)}
    gains = {id(p): p for layer in layers for p in layer.parameters() if id(p) not in weights}
    rest = {id(p): p for p in model.parameters() if id(p) not in weights and id(p) not in gains}
    groups: list[tuple[dict[int, Any], float]] = [(weights, 0.0), (gains, gain_decay), (rest, weight_decay)]
    trained = [([p for p in g.values() if p.requires_grad], decay) for g, decay in groups]
    return [{"params": params, "weight_decay": decay} for params, decay in trained if params]


@torch.no_grad()
def clip_grad_unitwise_(
    parameters: Tensor | Iterable[Tensor], clipping: float, floor: float = 1e-3
) -> None:
    r"""Adaptive gradient clipping: bound each output unit's gradient by a share of its weight's length.

    .. math:: G_i \leftarrow \lambda \frac{\max(\lVert W_i\rVert, \epsilon)}{\lVert G_i\rVert} G_i
        \quad\text{if } \lVert G_i\rVert > \lambda \max(\lVert W_i\rVert, \epsilon)

    Source: Brock et al. (2021), arXiv 2102.06171, eq. 3. A unit is an index of dim 0; a vector
    (gain, bias) is one unit. With unit rows, ``lr * clipping`` bounds the angle of a plain step, except in
    transposed convolutions, whose units are not along dim 0.

    Args:
        parameters: A tensor or an iterable of tensors; those without gradient are skipped.
        clipping: The share, the paper's lambda; 0.01 is its choice for large batches.
        floor: The least length that counts.

    Raises:
        ValueError: If clipping or floor is no number above 0, or a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 10.0]])
        >>> clip_grad_unitwise_(weight, 0.1)
        >>> weight.grad
        tensor([[0.0000, 0.5000]])
    """
    _check_positive("clipping", clipping)
    _check_positive("floor", floor)
    if isinstance(parameters, nn.Module):
        raise TypeError(
            f"parameters must be tensors, got {type(parameters).__name__}; pass model.parameters()"
        )
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise ValueError(
                f"a gradient of shape {tuple(parameter.grad.shape)} is sparse, which cannot be clipped unit by unit: "
                "leave that parameter out, or build its nn.Embedding with sparse=False"
            )
        dims = tuple(range(1, parameter.ndim)) if parameter.ndim > 1 else None
        weight, grad = _whole(parameter), _whole(parameter.grad)
        weight_norm, grad_norm = (
            torch.linalg.vector_norm(
                t, dim=dims, keepdim=True, dtype=torch.promote_types(t.dtype, torch.float32)
            )
            for t in (weight, grad)
        )
        limit = clipping * weight_norm.clamp_min(floor)
        factor = limit / torch.maximum(grad_norm, limit)
        _put_back(parameter.grad, grad.copy_(grad * factor))
