r"""The layer mathematics, stateless, in plain torch: the definition that all else must equal.

.. math:: o = \frac{\varphi(g \cdot (W x)/\lVert W\rVert_{row} + b) - \text{mean}}{\text{std}}

(Arpit et al., ICML 2016, eqs. 9, 11 and 12.) Everything that depends on parameters alone is moved
into the weight and the bias of one plain linear map, so that a layer costs what an unnormalised one
costs (docs/method.md, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normprop import activations

Number = float | Tensor


@dataclass(frozen=True)
class NormRule:
    """Which variant of Normalization Propagation a layer follows.

    Attributes:
        centered: Remove each weight row's mean before the division (Huang et al., Centered Weight
            Normalization, ICCV 2017): a common offset of the inputs then cannot grow with depth.
        constants: ``"standard"``: mean and std of phi(z), z ~ N(0, 1), as the paper has them.
            ``"affine"``: of phi(gain * z + bias), per channel, differentiable. ``"none"``: 0 and 1.
        gain: Initial gain: ``"jacobian"`` for 1/jacobian, 1/1.21117 for ReLU as the paper has it,
            or a number.

    Raises:
        ValueError: For any other value.

    Example:
        >>> NormRule(centered=True, gain=1.0)
        NormRule(centered=True, constants='standard', gain=1.0)
    """

    centered: bool = False
    constants: str = "standard"
    gain: float | str = "jacobian"

    def __post_init__(self) -> None:
        if not isinstance(self.centered, bool):
            raise ValueError(f"centered must be True or False, got {self.centered!r}")
        if self.constants not in ("standard", "affine", "none"):
            raise ValueError(f"constants must be 'standard', 'affine' or 'none', got {self.constants!r}")
        number = isinstance(self.gain, (int, float)) and not isinstance(self.gain, bool)
        if not (self.gain == "jacobian" or (number and math.isfinite(self.gain))):  # type: ignore[arg-type]
            raise ValueError(f"gain must be 'jacobian' or a finite number, got {self.gain!r}")

    def at(self, fan_in: int, first: bool = False) -> NormRule:
        """The rule for one place in a network: uncentred in the first layer and below 16 inputs.

        Centring removes most of a first layer's signal, neighbouring pixels being alike, and wastes
        a degree of freedom that small rows cannot spare (docs/method.md, section 5).
        """
        return replace(self, centered=self.centered and not first and fan_in >= 16)


PAPER = NormRule()
RECOMMENDED = NormRule(centered=True, gain=1.0)


def row_view(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """``weight`` with the output units on dims 0 and 2 if transposed, on dim 0 if not.

    ``nn.ConvTranspose`` stores (in, out/groups, kernel): seen as (groups, in/groups, out/groups,
    kernel), what feeds one output unit are dims 1, 3, 4, ...; else they are dims 1, 2, ...
    """
    return weight.unflatten(0, (groups, -1)) if transposed else weight


def _fan_in_dims(view: Tensor, transposed: bool) -> tuple[int, ...]:
    return (1, *range(3, view.ndim)) if transposed else tuple(range(1, view.ndim))


def unit_rows(
    weight: Tensor, centered: bool = False, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    r"""The rows and the factor that makes them unit vectors: ``rows * factor``.

    .. math:: \tilde W_i = W_i/\lVert W_i\rVert_2, \qquad
        \text{centred: } (W_i - \bar W_i)/\lVert W_i - \bar W_i\rVert_2

    Source: Arpit et al. (ICML 2016), the denominators of eqs. 9 and 11. A zero row (a constant one,
    if centred) has factor 1: it counts as zero, and its gradient is that of a plain weight.

    Args:
        weight: Shape ``(out, in/groups, *kernel)``; transposed: ``(in, out/groups, *kernel)``.
        centered: Remove each row's mean first.
        transposed: Whether the weight is stored as ``nn.ConvTranspose`` stores it.
        groups: Groups of the convolution.

    Returns:
        The rows (:func:`row_view`, at least float32, centred if asked) and the factors, with every
        dimension that feeds an output unit of size 1.

    Example:
        >>> rows, factor = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> rows * factor
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = row_view(weight, transposed, groups)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    dims = _fan_in_dims(rows, transposed)
    negligible: Number = 0.0
    if centered:
        raw = rows
        rows = raw - raw.mean(dims, keepdim=True)
        # What rounding leaves of a constant row is no direction.
        power = raw.detach().square().sum(dims, keepdim=True)
        negligible = power * (16 * torch.finfo(rows.dtype).eps) ** 2
    square = rows.square().sum(dims, keepdim=True)
    return rows, torch.where(square > negligible, square, 1.0).rsqrt()


def scaled_weight(
    weight: Tensor,
    length: Tensor,
    centered: bool = False,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """``weight`` with row i scaled to length ``length[i]``, in the weight's own shape and dtype.

    Args:
        weight: See :func:`unit_rows`.
        length: Shape ``(out,)``; the sign is kept.
        centered: See :func:`unit_rows`.
        transposed: See :func:`unit_rows`.
        groups: See :func:`unit_rows`.

    Returns:
        Same shape and dtype as ``weight``.
    """
    rows, factor = unit_rows(weight, centered, transposed, groups)
    scaled = rows * (factor * length.to(rows.dtype).view(factor.shape))
    return scaled.view(weight.shape).to(weight.dtype)


def constants(
    activation: nn.Module | None,
    rule: NormRule,
    gain: Tensor | None,
    bias: Tensor | None,
    standard: tuple[float, float] | None,
) -> tuple[Number, Number]:
    r"""Mean and std that a layer subtracts and divides by.

    Args:
        activation: The activation's module; None for none.
        rule: ``rule.constants`` selects them.
        gain: Shape ``(out,)``, for ``"affine"``; None counts as 1.
        bias: Shape ``(out,)``, for ``"affine"``; None counts as 0.
        standard: The two for z ~ N(0, 1) if the activation has no parameters.

    Returns:
        Numbers, or tensors of shape ``(out,)`` (or ``(1,)``) with gradients. With ``"affine"`` the
        std is at least ``0.05 * |gain| + 1e-3``.
    """
    if activation is None or rule.constants == "none":
        return 0.0, 1.0
    if rule.constants == "standard" or (gain is None and bias is None):
        if standard is not None:
            return standard
        like: Tensor = next(activation.parameters())
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        mean, var = activations.mean_var(activation, torch.zeros_like(like), torch.ones_like(like))
        return mean, var.sqrt()
    assert gain is not None
    gain = gain.to(torch.promote_types(gain.dtype, torch.float32))
    shift = torch.zeros_like(gain) if bias is None else bias.to(gain.dtype)
    mean, var = activations.mean_var(activation, shift, gain)
    floor = 0.05 * gain.abs() + 1e-3
    # The floor goes inside the root, whose slope at 0 is infinite.
    return mean, torch.maximum(var, floor.square()).sqrt()


def standard_constants(activation: nn.Module | None) -> tuple[float, float] | None:
    """Mean and std of phi(z), z ~ N(0, 1), as numbers; None if phi has parameters."""
    if activation is None:
        return 0.0, 1.0
    if activations.is_learned(activation):
        return None
    result = activations.moments(activation)
    return result.mean, result.std


class _ClampMin(torch.autograd.Function):
    """``max(y, threshold)``; keeps the output for backward, which the next layer keeps anyway.

    torch's clamp, threshold and maximum keep their input, one more map a layer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, threshold: Tensor) -> Tensor:
        return torch.maximum(y, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        output, threshold = ctx.saved_tensors
        above = output > threshold
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            grad_threshold = torch.where(above, 0.0, grad).sum_to_size(threshold.shape)
        return torch.where(above, grad, 0.0), grad_threshold


def clamp_min(y: Tensor, threshold: Tensor) -> Tensor:
    """``max(y, threshold)``, keeping the output alone for backward.

    Args:
        y: Any shape.
        threshold: Same dtype as ``y`` (a float32 threshold would turn a bfloat16 map into float32),
            broadcastable to ``y``.

    Returns:
        Shape of ``y``.
    """
    return _ClampMin.apply(y, threshold)


def along(value: Tensor, like: Tensor, dim: int) -> Tensor:
    """A per-channel tensor cast to ``like``'s dtype and shaped to lie along its dim ``dim`` < 0."""
    return value.to(like.dtype).view(-1, *[1] * (-dim - 1))


def normalize_activation(u: Tensor, activation: nn.Module, mean: Number, std: Number, dim: int) -> Tensor:
    """``(phi(u) - mean) / std``, the constants along dim ``dim`` < 0 of ``u``."""
    y = activation(u)
    if isinstance(mean, float) and isinstance(std, float):
        return y if (mean, std) == (0.0, 1.0) else (y - mean) / std
    shift, scale = (along(c, y, dim) if isinstance(c, Tensor) else c for c in (mean, std))
    return (y - shift) / scale


def propagate(
    linear: Callable[[Tensor, Tensor | None], Tensor],
    weight: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    activation: nn.Module | None,
    rule: NormRule,
    standard: tuple[float, float] | None,
    dim: int,
    transposed: bool = False,
    groups: int = 1,
    stretch: float = 1.0,
) -> Tensor:
    r"""One NormProp layer: ``o = (phi(gain * (W x)/||W_row|| + bias) - mean) / std``.

    For ReLU and LeakyReLU the constants go into the linear map: with
    :math:`y = (z - \text{mean})/\text{std}`,
    :math:`o = \max(y,\; a y + (a-1)\,\text{mean}/\text{std})` (docs/method.md, section 4).

    Args:
        linear: From (weight, bias) to the layer's linear map of its input.
        weight: As the torch parent stores it.
        gain: Shape ``(out,)``.
        bias: Shape ``(out,)`` or None.
        activation: Module that computes phi; None for the linear output
            ``gain * (W x)/||W_row|| + bias``.
        rule: Centring and constants.
        standard: See :func:`constants`.
        dim: Channel dimension of the output, counted from the end: -1 for linear, -3 for conv2d.
        transposed: See :func:`unit_rows`.
        groups: See :func:`unit_rows`.
        stretch: Factor on ``W x``: sqrt(prod(stride)) for transposed convolutions.

    Returns:
        What ``linear`` returns, normalised.
    """
    mean, std = constants(activation, rule, gain, bias, standard)
    length = gain.to(torch.promote_types(gain.dtype, torch.float32)) * stretch
    slope = None if activation is None else activations.negative_slope(activation)
    if activation is None or slope is None:
        scaled = scaled_weight(weight, length, rule.centered, transposed, groups)
        z = linear(scaled, bias)
        return z if activation is None else normalize_activation(z, activation, mean, std, dim)

    scaled = scaled_weight(weight, length / std, rule.centered, transposed, groups)
    if not isinstance(mean, Tensor) and mean == 0.0:
        y = linear(scaled, bias if bias is None or std == 1.0 else (bias / std).to(weight.dtype))
        return activation(y)
    shift = -mean / std
    offset = gain.new_full(gain.shape, shift) if not isinstance(shift, Tensor) else shift
    y = linear(scaled, (offset if bias is None else bias / std + offset).to(weight.dtype))
    threshold = along(shift, y, dim) if isinstance(shift, Tensor) else y.new_full((), shift)
    if slope == 0.0:
        return clamp_min(y, threshold)
    return torch.maximum(y, slope * y + (1 - slope) * threshold)
