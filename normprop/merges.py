r"""What stands between layers: the rules that keep mean 0 and variance 1 where maps meet or shrink.

Each rule is a stateless function and a module, torch's own where torch has one. None keeps a buffer.
A module's ``propagate(*signals, shapes=None)`` says what it does, for a prediction without data: the
output's :class:`~normprop.signal.Signal` for independent input signals, away from borders, and for
each input the factor from the expected squared L2 norm of the gradient map at the output to that at
the input, gradients at different positions being independent. ``shapes`` are the inputs' shapes;
only what depends on them (adaptive pools, concat, upsampling to a size) looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.types import Device

from normprop import activations
from normprop.activations import ActivationLike
from normprop.functional import affine, along, rectify
from normprop.signal import Signal

Shapes = Sequence[Sequence[int]] | None
Declared = tuple[Signal, tuple[float, ...]]


# --- sums and concatenations ------------------------------------------------------------------


def _unit(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights, divided by their length."""
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights must be numbers, one a branch, got {weights!r}")
    weights = tuple(float(weight) for weight in weights)
    length = math.hypot(*weights)
    if not weights or not math.isfinite(length) or length == 0:
        raise ValueError(f"weights must be finite and not all zero, got {weights}")
    return tuple(weight / length for weight in weights)


def _expect(count: int, what: str, got: int) -> None:
    if got != count:
        raise ValueError(f"expected {count} {what}, got {got}")


def normalized_add(
    branches: Sequence[Tensor], weights: Sequence[float] | Tensor, stds: Sequence[float] | None = None
) -> Tensor:
    r"""The weighted sum of independent branches of variance 1 that has variance 1.

    .. math:: y = \frac{\sum_i w_i x_i}{\sqrt{\sum_i w_i^2}}

    Args:
        branches: Tensors of one shape.
        weights: One a branch: numbers, or a tensor of shape ``(branches,)``, which may have gradients.
        stds: One a branch, by which it is divided first; 1 if None.

    Returns:
        Shape and dtype of the branches.

    Raises:
        ValueError: If the weights are not one a branch, or numbers that are all zero or not finite.

    Example:
        >>> normalized_add([torch.tensor(1.0), torch.tensor(0.5)], (3.0, 4.0))
        tensor(1.)
    """
    if isinstance(weights, (Tensor, fx.Proxy)):
        if isinstance(weights, Tensor):
            _expect(len(weights), "branches", len(branches))
        shares = (weights / torch.linalg.vector_norm(weights)).unbind(0)
        scales = [1.0] * len(branches) if stds is None else [1 / std for std in stds]
        total = branches[0] * (shares[0] * scales[0])
        for index, branch in enumerate(branches[1:], 1):
            total = total + branch * (shares[index] * scales[index])
        return total
    factors = _factors(_unit(weights), stds)
    _expect(len(factors), "branches", len(branches))
    # A branch with factor 1 comes first: one operation less.
    order = sorted(range(len(factors)), key=lambda index: factors[index] != 1.0)
    first = order[0]
    total = (
        branches[first] if factors[first] == 1.0 and len(order) > 1 else branches[first] * factors[first]
    )
    for index in order[1:]:
        total = torch.add(total, branches[index], alpha=factors[index])
    return total


def _factors(unit: Sequence[float], stds: Sequence[float] | None) -> list[float]:
    """What each branch is multiplied by; exactly 1 where weight and std are the same but for rounding."""
    factors = [weight / std for weight, std in zip(unit, stds or [1.0] * len(unit), strict=True)]
    return [1.0 if abs(factor - 1) < 1e-12 else factor for factor in factors]


class NormalizedAdd(nn.Module):
    r"""A weighted sum of independent branches of variance 1 that has variance 1.

    .. math:: y = \frac{\sum_i w_i x_i}{\sqrt{\sum_i w_i^2}}

    For a residual net of L blocks, :math:`x \leftarrow \sqrt{1-a^2}\,x + a f(x)` with
    :math:`a^2 = 1/L` bounds the growth of gradients by :math:`e^{(J^2-1)/2}` at any depth
    (docs/method.md, section 6); that is :meth:`residual`.

    Args:
        weights: One a branch, in the order of ``forward``'s arguments; only their ratios matter.
        learnable: Whether they are trained: parameter ``weight``, shape ``(branches,)``, divided by
            its length in ``forward``.
        stds: Of the branches, where they are not of variance 1: each is divided by its own. A branch whose
            std is its weight is added as it is, without a multiplication.
        drop_prob: Stochastic depth (Huang et al., ECCV 2016) for (trunk, branch): in training a
            sample's branch is dropped with this probability and its trunk then passes with weight 1,
            so that the variance stays 1.
        device: Of the learnable weights.
        dtype: Of the learnable weights.

    Shape:
        Any number of tensors of one shape, to that shape.

    Raises:
        ValueError: If there is no weight, or they are all zero or not finite; for a drop_prob outside
            [0, 1], or above 0 with other than two weights; in ``forward``, if the number of branches
            is another.

    Example:
        >>> NormalizedAdd((3.0, 4.0))(torch.tensor(1.0), torch.tensor(0.5))
        tensor(1.)
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0),
        *,
        learnable: bool = False,
        stds: Sequence[float] | None = None,
        drop_prob: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial = _unit(weights)
        self.stds = (1.0,) * len(self.initial) if stds is None else tuple(float(std) for std in stds)
        _expect(len(self.initial), "stds", len(self.stds))
        if not all(math.isfinite(std) and std > 0 for std in self.stds):
            raise ValueError(f"stds must be finite and above 0, got {self.stds}")
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")
        if drop_prob > 0 and len(self.initial) != 2:
            raise ValueError(f"drop_prob needs two weights (trunk, branch), got {len(self.initial)}")
        self.drop_prob = drop_prob
        self.weight: nn.Parameter | None
        weight = torch.empty(len(self.initial), device=device, dtype=dtype) if learnable else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights that the constructor was given, of length 1."""
        if self.weight is not None:
            with torch.no_grad():
                self.weight.copy_(torch.tensor(self.initial))

    @classmethod
    def residual(
        cls,
        blocks: int,
        *,
        learnable: bool = False,
        stds: Sequence[float] | None = None,
        drop_prob: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> NormalizedAdd:
        """For (trunk, branch) in a stack of ``blocks`` residual blocks: a^2 = 1/blocks.

        A single block has two equal weights: a^2 = 1 would leave nothing of its trunk.
        """
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        share = 1 / max(blocks, 2)
        weights = (math.sqrt(1 - share), math.sqrt(share))
        return cls(weights, learnable=learnable, stds=stds, drop_prob=drop_prob, device=device, dtype=dtype)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in use, of length 1."""
        return self.initial if self.weight is None else _unit(self.weight.tolist())

    @property
    def factors(self) -> list[float]:
        """What each branch is multiplied by."""
        return _factors(self.weights, self.stds)

    def forward(self, *branches: Tensor) -> Tensor:
        _expect(len(self.initial), "branches", len(branches))
        weights = self.initial if self.weight is None else self.weight
        total = normalized_add(branches, weights, self.stds)
        if not self.training or self.drop_prob == 0:
            return total
        # A dropped sample keeps its trunk: the step away from it is what is dropped. feature_dropout
        # drops whole channels; with one more dim in front, the samples are the channels.
        trunk = branches[0] if self.stds[0] == 1.0 else branches[0] / self.stds[0]
        step = torch.feature_dropout((total - trunk).unsqueeze(0), self.drop_prob, True).squeeze(0)
        return torch.add(trunk, step, alpha=1 - self.drop_prob)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The sum's signal, and the squared factors, as in eval mode."""
        weights = self.factors
        _expect(len(weights), "signals", len(signals))
        parts = [signal.affine(weight) for signal, weight in zip(signals, weights, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total, tuple(weight**2 for weight in weights)

    def extra_repr(self) -> str:
        text = ", ".join(f"{weight:.4g}" for weight in self.initial)
        text += ", learnable=True" if self.weight is not None else ""
        if self.stds != (1.0,) * len(self.stds):
            text += f", stds=({', '.join(f'{std:.4g}' for std in self.stds)})"
        return text + (f", drop_prob={self.drop_prob}" if self.drop_prob else "")


def _cat_scales(sizes: Sequence[Any], weights: Sequence[float]) -> list[Any]:
    """One factor a part: ``w * sqrt(N / sum w^2) / sqrt(N_part)``."""
    unit = _unit(weights)
    _expect(len(unit), "parts", len(sizes))
    total = sum(sizes)
    if any(isinstance(size, int) and size == 0 for size in sizes):
        raise ValueError(f"a part of a weighted concatenation is empty, sizes {tuple(sizes)}: leave it out")
    return [weight * (total / size) ** 0.5 for weight, size in zip(unit, sizes, strict=True)]


def normalized_cat(parts: Sequence[Tensor], dim: int = 1, weights: Sequence[float] | None = None) -> Tensor:
    r"""Concatenation; with weights, part i contributes the share :math:`w_i^2/\sum_j w_j^2` of the squares.

    .. math:: \text{part } i \text{ is scaled by } w_i\sqrt{N/\textstyle\sum_j w_j^2}\,/\sqrt{N_i}

    with :math:`N_i` its size along ``dim`` and N their sum: parts of variance 1 become a map of mean
    square 1. Source: Karras et al., EDM2 (CVPR 2024, arXiv 2312.02696), magnitude-preserving
    concatenation, for any number of parts.

    Args:
        parts: Tensors that agree in all dims but ``dim``.
        dim: Where they are joined.
        weights: One a part; None for ``torch.cat`` as it is.

    Returns:
        Their concatenation.

    Raises:
        ValueError: If the weights are not one a part, all zero or not finite, or a weighted part is empty.

    Example:
        >>> normalized_cat([torch.ones(1, 1), torch.ones(1, 3)], weights=(1.0, 1.0))
        tensor([[1.4142, 0.8165, 0.8165, 0.8165]])
    """
    if weights is None:
        return torch.cat(tuple(parts), dim)
    scales = _cat_scales([part.shape[dim] for part in parts], weights)
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], dim)


class NormalizedCat(nn.Module):
    """:func:`normalized_cat` as a module: parts of mean 0, variance 1 to a map of mean 0, mean square 1.

    Args:
        dim: Where the parts are joined.
        weights: One a part, only their ratios matter; None for ``torch.cat`` as it is.

    Shape:
        Parts as arguments or as one list or tuple, to their concatenation.

    Raises:
        ValueError: If the weights are all zero or not finite; in ``forward``, if they are not one a part.

    Example:
        >>> NormalizedCat(dim=0)(torch.zeros(1), torch.ones(2))
        tensor([0., 1., 1.])
    """

    def __init__(self, dim: int = 1, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.weights = None if weights is None else _unit(weights)

    def forward(self, *parts: Any) -> Tensor:
        if len(parts) == 1 and isinstance(parts[0], (list, tuple)):
            parts = tuple(parts[0])
        return normalized_cat(parts, self.dim, self.weights)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The mixture of the parts, and each one's share of the map times its squared factor.

        Without ``shapes`` the parts count as equally large.
        """
        sizes = [1] * len(signals) if shapes is None else [shape[self.dim] for shape in shapes]
        scales = [1.0] * len(sizes) if self.weights is None else _cat_scales(sizes, self.weights)
        parts = [signal.affine(scale) for signal, scale in zip(signals, scales, strict=True)]
        shares = [size / sum(sizes) for size in sizes]
        factors = tuple(share * scale**2 for share, scale in zip(shares, scales, strict=True))
        return Signal.mixture(parts, shares), factors

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.weights is None else f", weights={self.weights}")


# --- element by element -------------------------------------------------------------------------


def normalized_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps variance 1: in training ``mask * x / sqrt(1 - p)``, else x.

    Torch divides by 1 - p, which keeps the mean and multiplies the variance by 1/(1 - p). Here the
    mean given x is ``sqrt(1 - p) x`` in training and x in use: one of the two must give.

    Args:
        x: Any shape, mean 0 and variance 1.
        p: Probability of a zero, in [0, 1]; 1 gives zeros.
        training: Whether to drop.
        inplace: Whether x is overwritten.

    Returns:
        Shape of x.

    Raises:
        ValueError: For p outside [0, 1].

    Example:
        >>> normalized_dropout(torch.ones(2), p=1.0)
        tensor([0., 0.])
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if not training:
        return x
    y = F.dropout(x, p, True, inplace)
    return y.mul_(math.sqrt(1 - p)) if inplace else y * math.sqrt(1 - p)


class NormalizedDropout(nn.Dropout):
    """``nn.Dropout`` that keeps variance 1: ``mask / sqrt(1 - p)`` in training, the identity in eval mode.

    The price is a mean that differs between the two: given x, ``sqrt(1 - p) x`` in training and x in
    eval mode. Torch's own keeps that mean and multiplies the variance by 1/(1 - p).

    Args:
        p, inplace: As in torch.

    Shape:
        Any.
    """

    def forward(self, input: Tensor) -> Tensor:
        return normalized_dropout(input, self.p, self.training, self.inplace)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """As in eval mode: the signal itself, and 1."""
        (signal,) = signals
        return signal, (1.0,)


def normalized_gate(
    x: Tensor, z: Tensor, phi: ActivationLike = "sigmoid", rms: float | Tensor | None = None
) -> Tensor:
    r"""A product with a gate of mean square 1: x of mean 0 and variance 1 keeps both.

    .. math:: y = x\,\varphi(z)/\sqrt{E[\varphi(z)^2]}, \qquad z \sim N(0, 1) \text{ independent of } x

    Args:
        x: Any shape.
        z: Broadcastable to x, such as (N, C, 1, 1) for squeeze-and-excite.
        phi: As a layer takes an activation; pass a module for what is not a name: a callable is
            examined at each call.
        rms: The root, if it is known; one value, or one a channel on dim 1 of z.

    Returns:
        Shape of x.

    Example:
        >>> normalized_gate(torch.ones(1), torch.zeros(1))  # .5 / sqrt(.20827634^2 + .25)
        tensor([0.9231])
    """
    module = activations.as_module(phi)
    rms = _gate_rms(module) if rms is None else rms
    if isinstance(rms, Tensor):
        rms = rms.to(z.dtype).reshape(()) if rms.numel() == 1 else along(rms, z, 1 - z.ndim)
    return x * (module(z) / rms)


def _gate_rms(phi: nn.Module, std: float = 1.0) -> Any:
    """Root of E[phi(z)^2], z ~ N(0, std^2): a float, or a tensor if phi has parameters."""
    found = activations.moments(phi, std=std)
    return (found.var + found.mean**2) ** 0.5


class NormalizedGate(nn.Module):
    """``x * phi(z) / rms``, rms the root of E[phi(z)^2] for z ~ N(0, std^2): :func:`normalized_gate`.

    A gate multiplies whole channels of a sample by one random number, and the gates of a deep
    network multiply each other: with std 1/gates, as ``convert`` has it, their product stays near 1 at any
    depth (docs/method.md, section 12).

    Args:
        phi: As a layer takes an activation; of a learned one the rms follows the parameters.
        std: Of z: the gain with which the layer before it starts.

    Shape:
        x of any shape and z that is broadcastable to it, to the shape of x.

    Raises:
        ValueError: For an unknown activation, or one that is 0.

    Example:
        >>> NormalizedGate()(torch.ones(1), torch.zeros(1))
        tensor([0.9231])
    """

    def __init__(self, phi: ActivationLike = "sigmoid", *, std: float = 1.0) -> None:
        super().__init__()
        self.phi = activations.out_of_place(activations.as_module(phi))
        self.std = float(std)
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std must be finite and at least 0, got {std}")
        learned = activations.is_learned(self.phi)
        self.rms: float | None = None if learned else _gate_rms(self.phi, self.std)
        if self.rms is not None and not self.rms > 0:
            raise ValueError(f"phi must not be 0 everywhere, got {activations.name_of(self.phi)}")

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return normalized_gate(x, z, self.phi, self.root_mean_square())

    def root_mean_square(self) -> Any:
        """Of ``phi(z)``: a number, or a tensor if phi has parameters."""
        return _gate_rms(self.phi, self.std) if self.rms is None else self.rms

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """For (x, z): the product's signal, E[(phi/rms)^2], and E[x^2] E[phi'^2]/rms^2."""
        x, z = signals
        with torch.no_grad():
            rms = float(torch.as_tensor(self.root_mean_square()).mean())
        gate, slope = z.apply(activations.of_one_variable(self.phi))
        return x.times(gate.affine(1 / rms)), ((gate.rms / rms) ** 2, x.rms**2 * slope / rms**2)

    def extra_repr(self) -> str:
        return f"std={self.std:.4g}"


def standardize(x: Tensor, mean: float, std: float) -> Tensor:
    """``(x - mean) / std``, in one operation.

    Example:
        >>> standardize(torch.tensor([3.0]), 1.0, 4.0)
        tensor([0.5000])
    """
    return affine(x, 1 / std, -mean / std)


class Standardize(nn.Module):
    """``(x - mean) / std``: the entry of a branch that reads a trunk of known mean and std.

    Args:
        mean: A number.
        std: A number above 0.

    Shape:
        Any.

    Raises:
        ValueError: If mean or std is not finite, or std is not above 0.

    Example:
        >>> Standardize(1.0, 4.0)(torch.tensor([3.0]))
        tensor([0.5000])
    """

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = float(mean), float(std)
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean must be finite and std finite and above 0, got {mean} and {std}")

    def forward(self, x: Tensor) -> Tensor:
        return standardize(x, self.mean, self.std)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The signal moved and scaled, and ``1/std^2``."""
        (signal,) = signals
        return signal.affine(1 / self.std, -self.mean / self.std), (1 / self.std**2,)

    def extra_repr(self) -> str:
        return f"mean={self.mean:.6g}, std={self.std:.6g}"


class RectifiedSum(nn.Module):
    """``max(ratio * trunk + branch, low)``: a residual sum and its ReLU, whose inputs carry the constants.

    :func:`normprop.convert` makes it of a :class:`NormalizedAdd`, a ReLU and the :class:`Standardize` that
    reads them, whose constants go into the layers around (docs/method.md, section 12).

    Args:
        ratio: On the trunk.
        low: Where 0 lies on that scale: the lower limit.
        std: Of the result, if it is known; its mean is then 0.

    Shape:
        Two tensors of one shape, to that shape.

    Example:
        >>> RectifiedSum(low=-0.5)(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.25]))
        tensor([ 2.0000, -0.5000])
    """

    def __init__(self, ratio: float = 1.0, low: float = 0.0, std: float | None = None) -> None:
        super().__init__()
        self.ratio, self.low, self.std = ratio, low, std

    def forward(self, trunk: Tensor, branch: Tensor) -> Tensor:
        total = trunk + branch if self.ratio == 1.0 else torch.add(branch, trunk, alpha=self.ratio)
        if isinstance(total, fx.Proxy):
            return F.threshold(total, self.low, self.low)
        return rectify(total, self.low)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The sum's signal above ``low``, of the std that is known; factors times the share that passes."""
        trunk, branch = signals
        result, slope = trunk.affine(self.ratio).plus(branch).apply(lambda u: u.clamp_min(self.low))
        known = result if self.std is None else result.standardized().affine(self.std)
        return known, (slope * self.ratio**2, slope)

    def extra_repr(self) -> str:
        std = "" if self.std is None else f", std={self.std:.4g}"
        return f"ratio={self.ratio:.4g}, low={self.low:.4g}{std}"


class ShiftedReLU(nn.Module):
    """``max(x, low)``: a normalised ReLU that reads a trunk, whose input carries the constants.

    :func:`normprop.lighten` makes it of a :class:`~normprop.NormalizedActivation`, whose constants go into
    the layers around (docs/method.md, section 12). For its backward it keeps its output alone.

    Args:
        low: Where 0 lies on that scale: the lower limit.

    Shape:
        Any.

    Example:
        >>> ShiftedReLU(-0.5)(torch.tensor([1.0, -1.0]))
        tensor([ 1.0000, -0.5000])
    """

    def __init__(self, low: float = 0.0) -> None:
        super().__init__()
        self.low = low

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return F.threshold(x, self.low, self.low)
        return rectify(x, self.low, inplace=False)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The signal above ``low``, and the share that passes."""
        (signal,) = signals
        result, slope = signal.apply(lambda u: u.clamp_min(self.low))
        return result, (slope,)

    def extra_repr(self) -> str:
        return f"low={self.low:.4g}"


def keep_in_state_dict(module: nn.Module, *names: str) -> None:
    """Numbers that were measured go with the weights: the state dict's ``constants``, float64.

    The module's attribute ``constants`` holds their names; it is there because distributed checkpoints look for an
    attribute behind every key of a state dict.

    Args:
        module: Any module of ours.
        names: Its attributes, numbers or tuples of numbers.
    """
    before: tuple[str, ...] = getattr(module, "constants", ())
    module.constants = tuple(sorted({*before, *names}))  # type: ignore[assignment]
    if before:
        return
    module.register_state_dict_post_hook(_save_constants)
    module.register_load_state_dict_pre_hook(_load_constants)


def _save_constants(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[f"{prefix}constants"] = torch.tensor(_constants(module), dtype=torch.float64)


def _constants(module: Any) -> list[float]:
    """The numbers that go with the weights, one after another."""
    values = (getattr(module, name) for name in module.constants)
    return [number for v in values for number in (v if isinstance(v, tuple) else (v,))]


def _load_constants(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    constants = state.pop(f"{prefix}constants", None)
    if constants is None:
        missing.append(f"{prefix}constants")
        return
    wanted = len(_constants(module))
    if constants.numel() != wanted:
        errors.append(
            f"{prefix}constants: expected {wanted} ({', '.join(module.constants)}), got {constants.numel()}"
        )
        return
    numbers = iter(constants.tolist())
    for name in module.constants:
        old = getattr(module, name)
        new = tuple(next(numbers) for _ in old) if isinstance(old, tuple) else next(numbers)
        setattr(module, name, new)
