"""Training aids: unit rows after every step, parameter groups, unit-wise gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normprop.modules import NormalizedActivation, _NormProp
from normprop.rows import Geometry, project_rows_


def project_(model: nn.Module) -> None:
    """Put the weight rows of all NormProp layers back on the unit sphere, in place, without gradient.

    Changes no output: the layers divide by the row's length anyway. It keeps the step that a gradient
    makes in a row's direction from shrinking as the row grows (docs/method.md, section 7). Zero rows
    stay zero; centred rows lose their mean; rows whose length is no number any more become NaN.

    Args:
        model: Any module; layers of other kinds are left alone.
    """
    together: dict[Any, dict[int, tuple[Tensor, Geometry]]] = {}
    for module in model.modules():
        if isinstance(module, _NormProp):
            weight, geometry = module.weight, (module.transposed, module.groups)
            key = (module.rule.centered, weight.device, weight.dtype)
            together.setdefault(key, {})[id(weight)] = weight, geometry  # a shared weight once
    for (centered, *_), rows in together.items():
        weights, geometries = zip(*rows.values(), strict=True)
        project_rows_(weights, geometries, centered)


def attach_projection(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Call :func:`project_` after every ``optimizer.step()``, as the paper does after every iteration.

    Args:
        optimizer: Any torch optimizer.
        model: The model whose rows it keeps at unit length.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: If the model has no NormProp layer.

    Example:
        >>> layer = normprop.NormPropLinear(3, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = attach_projection(optimizer, layer)
    """
    if not any(isinstance(module, _NormProp) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no NormProp layer to project; build it with "
            "normprop.NormPropLinear, NormPropConv2d, ..."
        )
    return optimizer.register_step_post_hook(lambda *_: project_(model))


def param_groups(model: nn.Module, weight_decay: float, gain_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: what decays, and by how much.

    A NormProp weight never decays: its length has no effect, so decay would only change its
    step size (docs/method.md, section 7). The gains, biases and activation parameters of NormProp layers
    decay by ``gain_decay``, all others by ``weight_decay``.

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
    for name, value in (("weight_decay", weight_decay), ("gain_decay", gain_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    layers = [m for m in model.modules() if isinstance(m, (_NormProp, NormalizedActivation))]
    weights = {id(layer.weight): layer.weight for layer in layers if isinstance(layer, _NormProp)}
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
    (gain, bias) is one unit. With unit rows, ``lr * clipping`` bounds the angle of a plain step.

    Args:
        parameters: A tensor or an iterable of tensors; those without gradient are skipped.
        clipping: The share, the paper's lambda; 0.01 is its choice for large batches.
        floor: The least length that counts.

    Raises:
        ValueError: If clipping is not above 0.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 10.0]])
        >>> clip_grad_unitwise_(weight, 0.1)
        >>> weight.grad
        tensor([[0.0000, 0.5000]])
    """
    if not clipping > 0:
        raise ValueError(f"clipping must be above 0, got {clipping}")
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        dims = tuple(range(1, parameter.ndim)) if parameter.ndim > 1 else None
        weight_norm, grad_norm = (
            torch.linalg.vector_norm(
                t, dim=dims, keepdim=True, dtype=torch.promote_types(t.dtype, torch.float32)
            )
            for t in (parameter.detach(), parameter.grad)
        )
        limit = clipping * weight_norm.clamp_min(floor)
        factor = limit / torch.maximum(grad_norm, limit)
        parameter.grad.copy_(parameter.grad * factor)
