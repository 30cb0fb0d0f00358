r"""The layer mathematics, stateless, in plain torch: the definition that all else must equal.

.. math:: o = \frac{\varphi(g \cdot (W x)/\lVert W\rVert_{row} + b) - \text{mean}}{\text{std}}

(Arpit et al., ICML 2016, eqs. 9, 11 and 12.) Everything that depends on parameters alone is moved
into the weight and the bias of one plain linear map, so that a layer costs what an unnormalised one
costs (docs/method.md, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop import activations
from normprop.rows import (
    Geometry,
    Numbers,
    Recipe,
    call,
    fan_in as fan_in,
    fan_in_dims as fan_in_dims,
    geometry_of as geometry_of,
    in_forward_mode,
    project_ as project_,
    row_lengths as row_lengths,
    row_view as row_view,
    scale_rows,
    scaled_weight as scaled_weight,
)

Number = float | Tensor
Size = int | tuple[int, ...]  # of a kernel, a stride ...: one number, or one a spatial dim


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
        number = isinstance(self.gain, Real) and not isinstance(self.gain, bool)
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


def check_rule(rule: Any) -> None:
    """Raises TypeError for what is not a rule."""
    if not isinstance(rule, NormRule):
        raise TypeError(
            f"rule must be a normprop.NormRule, such as normprop.PAPER or normprop.RECOMMENDED, got {rule!r}"
        )


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
        standard: The two for z ~ N(0, 1) if the activation has no parameters and no buffers.

    Returns:
        Numbers, or tensors of shape ``(out,)`` (or ``(1,)``) with gradients. With ``"affine"`` the
        std is at least ``0.05 * |gain| + 1e-3``.
    """
    if activation is None or rule.constants == "none":
        return 0.0, 1.0
    if rule.constants == "standard" or (gain is None and bias is None):
        if standard is not None:
            return standard
        like: Tensor | None = next(activation.parameters(), None)
        if like is None:  # of buffers: one number for all channels
            like = next(activation.buffers()).new_zeros((), dtype=torch.float32)
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        mean, var = activations.mean_var(activation, torch.zeros_like(like), torch.ones_like(like))
        return mean, var.sqrt()
    given = bias if gain is None else gain
    assert given is not None
    wide = torch.promote_types(given.dtype, torch.float32)
    gain = torch.ones_like(given, dtype=wide) if gain is None else gain.to(wide)
    shift = torch.zeros_like(gain) if bias is None else bias.to(wide)
    mean, var = activations.mean_var(activation, shift, gain)
    floor = 0.05 * gain.abs() + 1e-3
    # The floor goes inside the root, whose slope at 0 is infinite.
    return mean, torch.maximum(var, floor.square()).sqrt()


def standard_constants(activation: nn.Module | None) -> tuple[float, float] | None:
    """Mean and std of phi(z), z ~ N(0, 1), as numbers; None if phi has parameters or buffers, which may change."""
    if activation is None:
        return 0.0, 1.0
    if activations.is_learned(activation) or any(True for _ in activation.buffers()):
        return None
    result = activations.moments(activation)
    if result.std <= 1e-12 * abs(result.mean):
        raise ValueError(
            f"activation {activations.name_of(activation)} is constant under N(0, 1): nothing of it can be normalised"
        )
    return result.mean, result.std


class _Rectify(torch.autograd.Function):
    """``y`` above the threshold, ``threshold + slope * (y - threshold)`` below; keeps its output alone.

    torch's clamp, threshold and maximum keep their input: one more map a layer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, threshold: Tensor | float, slope: float, inplace: bool) -> Tensor:
        if inplace and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_forward_mode()):
            # Safe: y is a linear map's fresh output, which no other code holds.
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
        _, threshold, ctx.slope, _ = inputs
        ctx.threshold = None
        if isinstance(threshold, Tensor):
            ctx.save_for_backward(output, threshold)
        else:
            ctx.threshold = threshold
            ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
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
            return grad_y, None, None, None
        return grad_y, (grad - grad_y).sum_to_size(threshold.shape), None, None


def rectify(y: Tensor, threshold: Number, slope: float = 0.0, inplace: bool = True) -> Tensor:
    """``y`` above the threshold, ``threshold + slope * (y - threshold)`` below.

    Args:
        y: Any shape; with ``inplace`` the output of a linear map that nothing else uses, not a leaf.
        threshold: A number, or a tensor that is broadcastable to ``y``. It is rounded to ``y``'s dtype:
            a float32 tensor would turn a bfloat16 map into float32, and a number that is not a
            bfloat16 would compare wrongly with its own rounding.
        slope: In [0, 1]; 0 for ReLU.
        inplace: Overwrite ``y``.

    Returns:
        Shape of ``y``.
    """
    threshold = threshold.to(y.dtype) if isinstance(threshold, Tensor) else _rounded(threshold, y.dtype)
    return call(_Rectify, y, threshold, slope, inplace)


class _Affine(torch.autograd.Function):
    """``shift + scale * x`` with numbers; torch.rsub's backward takes two passes and a map more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float, shift: float) -> Tensor:
        return torch.rsub(x, shift, alpha=-scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.scale, None, None


class _Standardize(torch.autograd.Function):
    """``(y - mean) / std`` with tensors; keeps its output, which what comes next keeps anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (y - mean) / std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mean, std = inputs
        ctx.shape = mean.shape
        ctx.save_for_backward(output, std)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, std = ctx.saved_tensors
        grad_y = grad / std
        return grad_y, -grad_y.sum_to_size(ctx.shape), -(grad_y * output).sum_to_size(std.shape)


def affine(x: Tensor, scale: float, shift: float) -> Tensor:
    """``shift + scale * x``, in one pass, and one in backward.

    Example:
        >>> affine(torch.tensor([3.0]), 2.0, 0.5)
        tensor([6.5000])
    """
    return call(_Affine, x, scale, shift)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number that ``dtype`` holds (but for its range), computed without a tensor."""
    mantissa, exponent = math.frexp(value)
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def along(value: Tensor, like: Tensor, dim: int) -> Tensor:
    """A per-channel tensor cast to ``like``'s dtype and shaped to lie along its dim ``dim`` < 0."""
    return value.to(like.dtype).view(-1, *[1] * (-dim - 1))


def normalize_activation(
    u: Tensor,
    activation: nn.Module,
    mean: Number,
    std: Number,
    dim: int,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``(phi(gain * u + bias) - mean) / std``, ``own`` being gain and bias.

    Tensors hold one value a channel and lie along dim ``dim`` < 0 of ``u``.
    """
    numbers = (mean, std) if isinstance(mean, float) and isinstance(std, float) else None
    plain = _plain or numbers in (None, (0.0, 1.0))
    slope = None if plain else activations.negative_slope(activation)
    if numbers and slope is not None:  # what is done to phi's output is done to its input
        scale, low = 1 / numbers[1], -numbers[0] / numbers[1]
        if own is None:
            u = affine(u, scale, low)
        else:
            gain, bias = own[0] * scale, affine(own[1], scale, low)
            u = torch.addcmul(along(bias, u, dim), u, along(gain, u, dim))
        return rectify(u, low, slope)  # a map of its own
    if own is not None:
        gain, bias = own
        u = torch.addcmul(along(bias, u, dim), u, along(gain, u, dim))
    y = activated(u, activation, dim)
    if numbers:
        return y if numbers == (0.0, 1.0) else (y - mean) / std
    shift, divisor = (along(torch.as_tensor(c, device=y.device), y, dim) for c in (mean, std))
    return call(_Standardize, y, shift, divisor)


def activated(u: Tensor, activation: nn.Module, dim: int) -> Tensor:
    """``activation(u)``, whose channels lie along dim ``dim`` < 0; a PReLU's slopes lie along dim 1."""
    if isinstance(activation, nn.PReLU) and activation.num_parameters > 1 and u.ndim + dim != 1:
        raise ValueError(
            f"a PReLU's {activation.num_parameters} slopes lie along dim 1, the channels of this output of shape "
            f"{tuple(u.shape)} along dim {u.ndim + dim}: use nn.PReLU() with one slope, or flatten the dims before"
        )
    return activation(u)  # type: ignore[no-any-return]


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


class Parameters(NamedTuple):
    """What a layer has besides its input.

    Attributes:
        weight: As the torch parent stores it.
        gain: Shape ``(out,)``.
        bias: Shape ``(out,)`` or None.
        activation: Module that computes phi; None for the linear output
            ``gain * (W x)/||W_row|| + bias``.
        rule: Centring and constants.
        standard: See :func:`constants`.
        geometry: Whether the weight is stored transposed, and its groups.
        stretch: Factor on ``W x``: sqrt(prod(stride)) for transposed convolutions.
    """

    weight: Tensor
    gain: Tensor
    bias: Tensor | None
    activation: nn.Module | None
    rule: NormRule
    standard: tuple[float, float] | None
    geometry: Geometry = (False, 1)
    stretch: float = 1.0


class Ready(NamedTuple):
    """A layer's linear map with all that depends on parameters alone in it, and what is left to do.

    Attributes:
        weight: Scaled, with the constants in it if there is a slope.
        bias: Likewise.
        slope: Of an activation that is linear on both sides of 0; None if it is another.
        low: With a slope: where the output has its kink.
        activation: The layer's, or None.
        mean: Without a slope: what is subtracted after the activation.
        std: Without a slope: what it is divided by.
    """

    weight: Tensor
    bias: Tensor | None
    slope: float | None
    low: Number
    activation: nn.Module | None
    mean: Number
    std: Number


def definition(linear: Callable[[Tensor, Tensor | None], Tensor], layer: Parameters, dim: int) -> Tensor:
    """:func:`propagate`, written as the formula reads: slow, and obvious."""
    weight, gain, bias, activation, rule, standard, geometry, stretch = layer
    rows = row_view(weight, *geometry)
    dims = fan_in_dims(rows, geometry[0])
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
    return (activated(z, activation, dim) - mean) / std


def autocasts() -> dict[str, torch.dtype | None]:
    """What autocast would cast float32 weights to at their use, on each device; they are then made so at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return {}
    return {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    }


class _Group(NamedTuple):
    """Layers whose rows are scaled in one node: their numbers, and the arguments of ``scale_rows``."""

    members: list[int]
    arguments: tuple[Any, ...]


class Arrangement:
    """How layers' linear maps are made together: all but the work on their values.

    Attributes:
        groups: Which are scaled in one node.
        ready: What is known of each before.
        lasting: Whether it can be used again while the layers, their :func:`state` and :func:`autocasts` stay.
    """

    def __init__(self, layers: Sequence[Parameters]) -> None:
        self.ready: list[Ready] = []
        held = [t for layer in layers for t in layer[:3] if t is not None]
        self.lasting = all(type(t) is nn.Parameter for t in held)
        together: dict[Any, list[int]] = {}
        gains: list[Tensor] = []
        numbers: list[Numbers] = []
        biases: dict[int, Tensor] = {}  # those that are moved with the others'
        casts = autocasts()
        for index, layer in enumerate(layers):
            mean, std = constants(layer.activation, layer.rule, layer.gain, layer.bias, layer.standard)
            slope = None if layer.activation is None else activations.negative_slope(layer.activation)
            gain, bias = layer.gain, layer.bias
            low: Number = 0.0
            own = Numbers(layer.stretch, centered=layer.rule.centered)
            if not (isinstance(mean, float) and isinstance(std, float)):
                self.lasting = False
            if slope is not None and isinstance(mean, float) and isinstance(std, float):
                low = -mean / std
                own = Numbers(layer.stretch / std, low, 1 / std, layer.rule.centered)
                if bias is not None:
                    biases[index] = bias
                elif low != 0.0:
                    bias, self.lasting = gain.new_full(gain.shape, low), False
            elif slope is not None:
                shift = low = torch.as_tensor(-mean / std)
                gain = gain / std
                bias = (shift if bias is None else bias / std + shift).to(layer.weight.dtype)
            elif bias is not None and len(layers) > 1:
                biases[index] = bias
            tensors = [t for t in (layer.weight, gain, biases.get(index)) if t is not None]
            single = layer.weight.dtype == torch.float32
            kind = (casts.get(layer.weight.device.type) if single else None, layer.geometry[0])
            key = (*kind, *((t.device, t.dtype, t.requires_grad) for t in tensors))
            together.setdefault(key, []).append(index)
            self.ready.append(Ready(layer.weight, bias, slope, low, layer.activation, mean, std))
            gains.append(gain)
            numbers.append(own)
        self.groups = [
            _Group(
                members,
                (
                    Recipe(tuple(numbers[i] for i in members), dtype),
                    tuple(layers[i].geometry for i in members),
                    [layers[i].weight for i in members],
                    [gains[i] for i in members],
                    [biases[i] for i in members] if members[0] in biases else (),
                ),
            )
            for (dtype, *_), members in together.items()
        ]

    def make(self) -> list[Ready]:
        """The maps, from the values as they are now."""
        ready = list(self.ready)
        for members, arguments in self.groups:
            for i, (weight, moved) in zip(members, scale_rows(*arguments), strict=True):
                ready[i] = ready[i]._replace(weight=weight, bias=ready[i].bias if moved is None else moved)
        return ready


def state(layer: Parameters) -> tuple[Any, ...]:
    """What of a layer an arrangement follows from that changes without the layer being told."""
    weight, gain, bias, activation, *_ = layer
    return (
        None if activation is None else activations.negative_slope(activation),
        [(t.device, t.dtype, t.requires_grad) for t in (weight, gain, bias) if t is not None],
    )


def make_ready(layers: Sequence[Parameters]) -> list[Ready]:
    r"""The linear maps of any number of layers, in a number of operations that hardly grows with it.

    For ReLU and LeakyReLU the constants go into the map: with :math:`y = (z - \text{mean})/\text{std}`,
    :math:`o = \max(y,\; a y + (a-1)\,\text{mean}/\text{std})` (docs/method.md, section 4).

    Args:
        layers: On any devices, of any kinds.

    Returns:
        One for each layer.
    """
    return Arrangement(layers).make()


def propagate(linear: Callable[[Tensor, Tensor | None], Tensor], layer: Parameters, dim: int) -> Tensor:
    """One NormProp layer: ``o = (phi(gain * (W x)/||W_row|| + bias) - mean) / std``.

    Args:
        linear: From (weight, bias) to the layer's linear map of its input.
        layer: Its parameters.
        dim: Channel dimension of the output, counted from the end: -1 for linear, -3 for conv2d.

    Returns:
        What ``linear`` returns, normalised.
    """
    return definition(linear, layer, dim) if _plain else applied(linear, make_ready((layer,))[0], dim)


def applied(linear: Callable[[Tensor, Tensor | None], Tensor], ready: Ready, dim: int) -> Tensor:
    """:func:`propagate` with what :func:`make_ready` made of the layer."""
    weight, bias, slope, low, activation, mean, std = ready
    y = linear(weight, bias)
    if slope is not None:
        return rectify(y, along(low, y, dim) if isinstance(low, Tensor) else low, slope)
    return y if activation is None else normalize_activation(y, activation, mean, std, dim)
