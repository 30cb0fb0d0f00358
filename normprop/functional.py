r"""The layer mathematics, stateless, in plain torch: the definition that all else must equal.

.. math:: o = \frac{\varphi(g \cdot (W x)/\lVert W\rVert_{row} + b) - \text{mean}}{\text{std}}

(Arpit et al., ICML 2016, eqs. 9, 11 and 12.) Everything that depends on parameters alone is moved
into the weight and the bias of one plain linear map, so that a layer costs what an unnormalised one
costs (docs/method.md, section 4).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


def fan_in_dims(view: Tensor, transposed: bool) -> tuple[int, ...]:
    """The dims of a :func:`row_view` that feed one output unit."""
    return (1, *range(3, view.ndim)) if transposed else tuple(range(1, view.ndim))


def _center(rows: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | float]:
    """Rows without their mean, and the length below which they are only what rounding left."""
    mean = rows.mean(dims, keepdim=True)
    return rows - mean, _rounding(rows, mean)


def _rounding(rows: Tensor, mean: Tensor) -> Tensor:
    """The length that rounding may leave of constant rows from which their mean is subtracted."""
    fan_in = rows.numel() // max(1, mean.numel())
    return mean.detach().abs() * (16 * torch.finfo(rows.dtype).eps * math.sqrt(fan_in))


def _inverse(norm: Tensor) -> Tensor:
    """``1 / norm``, but NaN where a length overflowed: a row must not vanish without a word."""
    return norm / norm.square()


def _lengths(rows: Tensor, dims: tuple[int, ...], negligible: Tensor | float) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
    return torch.where(norm > negligible, norm, 1.0)


class _Positional(inspect.Signature):
    """``bind`` for calls with all arguments in their place.

    ``autograd.Function.apply`` reads and binds forward's signature at every call, which takes longer
    than the work on a small layer.
    """

    def bind(self, *args: Any, **_: Any) -> Any:
        return _Bound(args)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never filled

    def apply_defaults(self) -> None:
        pass


class _ScaleRows(torch.autograd.Function):
    """Rows scaled to lengths ``gain * factor``: one node in the graph, where its parts would be a dozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, gain: Tensor, factor: float, dims: tuple[int, ...], centered: bool
    ) -> tuple[Tensor, Tensor]:
        rows, negligible = _center(rows, dims) if centered else (rows, 0.0)
        norm = _lengths(rows, dims, negligible)
        return rows * (gain.view(norm.shape) * factor * _inverse(norm)), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, gain, ctx.factor, ctx.dims, ctx.centered = inputs
        ctx.save_for_backward(rows, gain, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:
        r"""With w the (centred) row, n its length, l the wanted one:
        :math:`dl = g \cdot w / n`, :math:`dw = (l/n) (g - w\,(g \cdot w)/n^2)`, centred again.
        """
        rows, gain, norm = ctx.saved_tensors
        dims = ctx.dims
        negligible: Tensor | float = 0.0
        if ctx.centered:
            rows, negligible = _center(rows, dims)
        if torch.is_grad_enabled():  # a second derivative is wanted: the saved norm has no graph
            norm = _lengths(rows, dims, negligible)
        inverse = ctx.factor * _inverse(norm)
        radial = (grad * rows).sum(dims, keepdim=True) * inverse
        scale = gain.view(norm.shape) * inverse
        pull = gain.view(norm.shape) * radial / norm.square()
        grad_rows = torch.addcmul(grad * scale, rows, pull, value=-1.0)
        if ctx.centered:
            grad_rows = grad_rows - grad_rows.mean(dims, keepdim=True)
        return grad_rows, radial.view(gain.shape), None, None, None


def scaled_weight(
    weight: Tensor,
    gain: Tensor,
    factor: float = 1.0,
    centered: bool = False,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    r"""``weight`` with row i scaled to length ``gain[i] * factor``.

    .. math:: \ell_i\, W_i/\lVert W_i\rVert_2, \qquad
        \text{centred: } \ell_i\, (W_i - \bar W_i)/\lVert W_i - \bar W_i\rVert_2

    Source: Arpit et al. (ICML 2016), the denominators of eqs. 9 and 11. The division is done in at
    least float32. A zero row (a constant one, if centred) counts as length 1: it stays zero, and its
    gradient is that of a plain weight.

    Args:
        weight: Shape ``(out, in/groups, *kernel)``; transposed: ``(in, out/groups, *kernel)``.
        gain: Shape ``(out,)``; the sign is kept.
        factor: On every length.
        centered: Remove each row's mean first.
        transposed: Whether the weight is stored as ``nn.ConvTranspose`` stores it.
        groups: Groups of the convolution.

    Returns:
        Same shape and dtype as ``weight``.

    Example:
        >>> scaled_weight(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 1.0]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = row_view(weight, transposed, groups)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    dims = fan_in_dims(rows, transposed)
    scaled, _ = _ScaleRows.apply(rows, gain.to(rows.dtype), factor, dims, centered)
    return (scaled.flatten(0, 1) if transposed else scaled).to(weight.dtype)


@torch.no_grad()
def project_(weight: Tensor, centered: bool = False, transposed: bool = False, groups: int = 1) -> None:
    """Scale the rows to length 1, in place; zero rows (constant ones, if centred) become 0.

    Arguments as :func:`scaled_weight`.
    """
    rows = row_view(weight, transposed, groups)
    if rows.dtype in (torch.float16, torch.bfloat16):
        wide = rows.float()
        project_(wide.flatten(0, 1) if transposed else wide, centered, transposed, groups)
        rows.copy_(wide)
        return
    dims = fan_in_dims(rows, transposed)
    negligible: Tensor | float = 0.0
    if centered:
        mean = rows.mean(dims, keepdim=True)
        negligible = _rounding(rows, mean)
        rows.sub_(mean)
    norm = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
    rows.mul_(torch.where(norm > negligible, _inverse(norm), 0.0 if centered else 1.0))


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


class _Rectify(torch.autograd.Function):
    """``y`` above the threshold, ``threshold + slope * (y - threshold)`` below; keeps its output alone.

    torch's clamp, threshold and maximum keep their input: one more map a layer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, threshold: Tensor | float, slope: float) -> Tensor:
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            # A linear map's output, which nothing else has seen: nobody misses it, nobody kept it.
            # mark_dirty would say so, but neither vmap nor the compiler takes it.
            y = y.detach()
            if slope == 0.0:
                return y.clamp_min_(threshold)  # type: ignore[arg-type]
            return F.leaky_relu_(y.sub_(threshold), slope).add_(threshold)
        if slope == 0.0:
            return y.clamp_min(threshold)  # type: ignore[arg-type]
        return F.leaky_relu(y - threshold, slope) + threshold

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, threshold, ctx.slope = inputs
        ctx.threshold = None
        if isinstance(threshold, Tensor):
            ctx.save_for_backward(output, threshold)
        else:
            ctx.threshold = threshold
            ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        saved = ctx.saved_tensors  # checkpointing lets it be read once
        output = saved[0]
        threshold = saved[1] if ctx.threshold is None else ctx.threshold
        if ctx.slope != 0.0:
            grad_y = torch.ops.aten.leaky_relu_backward(grad, output - threshold, ctx.slope, False)
        elif ctx.threshold is None:
            grad_y = torch.ops.aten.threshold_backward(grad, output - threshold, 0.0)
        else:
            grad_y = torch.ops.aten.threshold_backward(grad, output, threshold)
        if not ctx.needs_input_grad[1]:
            return grad_y, None, None
        return grad_y, (grad - grad_y).sum_to_size(threshold.shape), None


for _function in (_ScaleRows, _Rectify):
    _function.forward.__signature__ = _Positional()  # type: ignore


def rectify(y: Tensor, threshold: Number, slope: float = 0.0) -> Tensor:
    """``y`` above the threshold, ``threshold + slope * (y - threshold)`` below. Overwrites ``y``.

    Args:
        y: Any shape; the output of a linear map that nothing else uses, not a leaf.
        threshold: A number, or a tensor that is broadcastable to ``y``. It is rounded to ``y``'s dtype:
            a float32 tensor would turn a bfloat16 map into float32, and a number that is not a
            bfloat16 would compare wrongly with its own rounding.
        slope: At most 1; 0 for ReLU.

    Returns:
        Shape of ``y``.
    """
    threshold = threshold.to(y.dtype) if isinstance(threshold, Tensor) else _rounded(threshold, y.dtype)
    return _Rectify.apply(y, threshold, slope)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number that ``dtype`` holds (but for its range), computed without a tensor."""
    mantissa, exponent = math.frexp(value)
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def along(value: Tensor, like: Tensor, dim: int) -> Tensor:
    """A per-channel tensor cast to ``like``'s dtype and shaped to lie along its dim ``dim`` < 0."""
    return value.to(like.dtype).view(-1, *[1] * (-dim - 1))


def normalize_activation(u: Tensor, activation: nn.Module, mean: Number, std: Number, dim: int) -> Tensor:
    """``(phi(u) - mean) / std``, the constants along dim ``dim`` < 0 of ``u``."""
    if isinstance(mean, float) and isinstance(std, float):
        if (mean, std) == (0.0, 1.0):
            return activation(u)
        slope = activations.negative_slope(activation)
        if slope is None or _plain:
            return (activation(u) - mean) / std
        low = -mean / std
        return rectify(torch.rsub(u, low, alpha=-1 / std), low, slope)  # low + u / std, a map of its own
    y = activation(u)
    shift, scale = (along(c, y, dim) if isinstance(c, Tensor) else c for c in (mean, std))
    return (y - shift) / scale


_plain = False


@contextmanager
def plainly() -> Iterator[None]:
    """Within it, layers compute by :func:`definition`: the truth that fast paths are held against."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def definition(
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
    """:func:`propagate`, written as the formula reads: slow, and obvious."""
    rows = row_view(weight, transposed, groups)
    dims = fan_in_dims(rows, transposed)
    if rule.centered:
        rows = rows - rows.mean(dims, keepdim=True)
    square = rows.square().sum(dims, keepdim=True)
    unit = rows / torch.where(square > 0, square, 1.0).sqrt()
    z = linear(unit.reshape(weight.shape), None) * stretch
    along_channels = (-1, *[1] * (-dim - 1))
    z = z * gain.view(along_channels)
    if bias is not None:
        z = z + bias.view(along_channels)
    if activation is None:
        return z
    mean, std = (
        c.view(along_channels) if isinstance(c, Tensor) else c
        for c in constants(activation, rule, gain, bias, standard)
    )
    return (activation(z) - mean) / std


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
        transposed: See :func:`scaled_weight`.
        groups: See :func:`scaled_weight`.
        stretch: Factor on ``W x``: sqrt(prod(stride)) for transposed convolutions.

    Returns:
        What ``linear`` returns, normalised.
    """
    if _plain:
        return definition(
            linear, weight, gain, bias, activation, rule, standard, dim, transposed, groups, stretch
        )
    mean, std = constants(activation, rule, gain, bias, standard)
    slope = None if activation is None else activations.negative_slope(activation)
    if activation is None or slope is None:
        z = linear(scaled_weight(weight, gain, stretch, rule.centered, transposed, groups), bias)
        return z if activation is None else normalize_activation(z, activation, mean, std, dim)

    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        shift = torch.as_tensor(-mean / std)
        scaled = scaled_weight(weight, gain / std, stretch, rule.centered, transposed, groups)
        offset = shift if bias is None else bias / std + shift
        y = linear(scaled, offset.to(weight.dtype))
        return rectify(y, along(shift, y, dim), slope)
    scaled = scaled_weight(weight, gain, stretch / std, rule.centered, transposed, groups)
    low = -mean / std
    if bias is not None:
        bias = torch.rsub(bias, low, alpha=-1 / std)  # low + bias / std, in one operation
    elif low != 0.0:
        bias = gain.new_full(gain.shape, low)
    return rectify(linear(scaled, bias), low, slope)
