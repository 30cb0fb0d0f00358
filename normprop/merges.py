r"""What stands between layers: the rules that keep mean 0 and variance 1 where maps meet or shrink.

Each rule is a stateless function and a module, torch's own where torch has one. None keeps a buffer.
A module's ``propagate(*signals, shapes=None)`` says what it does, for a prediction without data: the
output's :class:`~normprop.signal.Signal` for independent input signals, away from borders, and for
each input the factor from the expected squared L2 norm of the gradient map at the output to that at
the input, gradients at different positions being independent. ``shapes`` are the inputs' shapes;
only what depends on them (adaptive pools, concat, upsampling to a size) looks at them.

A window of n elements with correlation C has an average of variance C + (1 - C)/n; the greatest of n
has a mean and a variance that are integrals (docs/method.md, section 10). At borders n is the number
of elements that the window really has.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normprop import activations, gaussian
from normprop.functional import Number, along
from normprop.signal import Signal, gaussian_nodes

Shapes = Sequence[Sequence[int]] | None
Declared = tuple[Signal, tuple[float, ...]]


# --- sums and concatenations ------------------------------------------------------------------


def _unit(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights, divided by their length."""
    length = math.hypot(*weights)
    if not weights or not math.isfinite(length) or length == 0:
        raise ValueError(f"weights must be finite and not all zero, got {tuple(weights)}")
    return tuple(weight / length for weight in weights)


def _expect(count: int, what: str, got: int) -> None:
    if got != count:
        raise ValueError(f"expected {count} {what}, got {got}")


def normalized_add(branches: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    r"""The weighted sum of independent branches of variance 1 that has variance 1.

    .. math:: y = \frac{\sum_i w_i x_i}{\sqrt{\sum_i w_i^2}}

    Args:
        branches: Tensors of one shape.
        weights: One a branch: numbers, or a tensor of shape ``(branches,)``, which may have gradients.

    Returns:
        Shape and dtype of the branches.

    Raises:
        ValueError: If the weights are not one a branch, or numbers that are all zero or not finite.

    Example:
        >>> normalized_add([torch.tensor(1.0), torch.tensor(0.5)], (3.0, 4.0))
        tensor(1.)
    """
    if isinstance(weights, (Tensor, fx.Proxy)):
        parts = (weights / torch.linalg.vector_norm(weights)).unbind(0) if branches else ()
        if isinstance(weights, Tensor):
            _expect(len(weights), "branches", len(branches))
            parts = parts[: len(branches)]
        total = branches[0] * parts[0]
        for index, branch in enumerate(branches[1:], 1):
            total = total + branch * parts[index]
        return total
    unit = _unit(weights)
    _expect(len(unit), "branches", len(branches))
    total = branches[0] * unit[0]
    for weight, branch in zip(unit[1:], branches[1:], strict=True):
        total = torch.add(total, branch, alpha=weight)
    return total


class NormalizedAdd(nn.Module):
    r"""A weighted sum of independent branches of variance 1 that has variance 1.

    .. math:: y = \frac{\sum_i w_i x_i}{\sqrt{\sum_i w_i^2}}

    For a residual net of L blocks, :math:`x \leftarrow \sqrt{1-a^2}\,x + a f(x)` with
    :math:`a^2 = 1/L` bounds the growth of gradients by :math:`e^{(J^2-1)/2}` at any depth
    (docs/method.md, section 6); that is :meth:`residual`.

    Args:
        weights: One a branch, in the order of ``forward``'s arguments; their length is irrelevant.
        learnable: Whether they are trained: parameter ``weight``, shape ``(branches,)``, divided by
            its length in ``forward``.
        drop_prob: Stochastic depth (Huang et al., ECCV 2016) for (trunk, branch): in training a
            sample's branch is dropped with this probability and its trunk then passes with weight 1,
            so that the variance stays 1.

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
        self, weights: Sequence[float] = (1.0, 1.0), *, learnable: bool = False, drop_prob: float = 0.0
    ) -> None:
        super().__init__()
        self.initial = _unit(weights)
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")
        if drop_prob > 0 and len(self.initial) != 2:
            raise ValueError(f"drop_prob needs two weights (trunk, branch), got {len(self.initial)}")
        self.drop_prob = drop_prob
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.empty(len(self.initial))) if learnable else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights that the constructor was given, of length 1."""
        if self.weight is not None:
            with torch.no_grad():
                self.weight.copy_(torch.tensor(self.initial))

    @classmethod
    def residual(cls, blocks: int, *, learnable: bool = False, drop_prob: float = 0.0) -> NormalizedAdd:
        """For (trunk, branch) in a stack of ``blocks`` residual blocks: a^2 = 1/blocks.

        A single block has two equal weights: a^2 = 1 would leave nothing of its trunk.
        """
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        share = 1 / max(blocks, 2)
        return cls((math.sqrt(1 - share), math.sqrt(share)), learnable=learnable, drop_prob=drop_prob)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in use, of length 1."""
        return self.initial if self.weight is None else _unit(self.weight.tolist())

    def forward(self, *branches: Tensor) -> Tensor:
        _expect(len(self.initial), "branches", len(branches))
        total = normalized_add(branches, self.initial if self.weight is None else self.weight)
        if not self.training or self.drop_prob == 0:
            return total
        # A dropped sample keeps its trunk: the step away from it is what is dropped. As the channels
        # of one sample, samples are dropped whole.
        trunk = branches[0]
        step = torch.feature_dropout((total - trunk).unsqueeze(0), self.drop_prob, True).squeeze(0)
        return torch.add(trunk, step, alpha=1 - self.drop_prob)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The sum's signal, and the squared weights, as in eval mode."""
        weights = self.weights
        _expect(len(weights), "signals", len(signals))
        parts = [signal.affine(weight) for signal, weight in zip(signals, weights, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total, tuple(weight**2 for weight in weights)

    def extra_repr(self) -> str:
        text = ", ".join(f"{weight:.4g}" for weight in self.initial)
        text += ", learnable=True" if self.weight is not None else ""
        return text + (f", drop_prob={self.drop_prob}" if self.drop_prob else "")


def _cat_scales(sizes: Sequence[Any], weights: Sequence[float]) -> list[Any]:
    """One factor a part: ``w * sqrt(N / sum w^2) / sqrt(N_part)``."""
    unit = _unit(weights)
    _expect(len(unit), "parts", len(sizes))
    total = sum(sizes)
    return [weight * (total / size) ** 0.5 for weight, size in zip(unit, sizes, strict=True)]


def normalized_cat(
    parts: Sequence[Tensor], dim: int = 1, weights: Sequence[float] | None = None
) -> Tensor:
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
        ValueError: If the weights are not one a part, all zero or not finite.

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
        weights: One a part, their length is irrelevant; None for ``torch.cat`` as it is.

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
        """The mixture of the parts, and their squared factors; parts of equal size without ``shapes``."""
        sizes = [1] * len(signals) if shapes is None else [shape[self.dim] for shape in shapes]
        scales = [1.0] * len(sizes) if self.weights is None else _cat_scales(sizes, self.weights)
        parts = [signal.affine(scale) for signal, scale in zip(signals, scales, strict=True)]
        mixed = Signal.mixture(parts, [size / sum(sizes) for size in sizes])
        return mixed, tuple(scale**2 for scale in scales)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.weights is None else f", weights={self.weights}")


# --- windows: what they hold at borders ---------------------------------------------------------


def _per_axis(value: Any, spatial: int) -> tuple[Any, ...]:
    """One entry a spatial dim."""
    entries = tuple(value) if isinstance(value, Sequence) else (value,)
    entries = entries * spatial if len(entries) == 1 else entries
    if len(entries) != spatial:
        raise ValueError(f"expected one number or {spatial}, got {value}")
    return entries


def _spatial_dims(x: Tensor, spatial: int | None) -> int:
    """The number of spatial dims: given, or those behind (N, C)."""
    spatial = x.ndim - 2 if spatial is None else spatial
    if isinstance(x, Tensor) and not (1 <= spatial <= 3 and x.ndim in (spatial + 1, spatial + 2)):
        raise ValueError(f"expected (N, C, *) with 1 to 3 spatial dims, got shape {tuple(x.shape)}")
    return spatial


def _ones(x: Tensor, axis: int, spatial: int) -> Tensor:
    """Ones along spatial dim ``axis`` of x, shape (L,), at least float32.

    Made from a slice of x, so that a traced graph makes them anew for another image size.
    """
    line = x[(..., *(slice(None) if index == axis else 0 for index in range(spatial)))]
    line = line[:1].flatten(0, -2)[0]
    return torch.ones_like(line, dtype=torch.float32) * torch.ones_like(line)  # float64 stays float64


def _counts(ones: Tensor, max_pool: Callable[[Tensor], Tensor], dilation: int = 1) -> Tensor:
    """Elements in each window along one axis: its last position less its first, shape (out,)."""
    position = ones.cumsum(0).unsqueeze(0)
    extent = (max_pool(position) + max_pool(-position)).squeeze(0)
    return (extent / dilation + 1).clamp_min(1)


def _outer(lines: Sequence[Tensor]) -> Tensor:
    """Product of one vector an axis, shape (out, ...)."""
    product = lines[0]
    for line in lines[1:]:
        product = product.unsqueeze(-1) * line
    return product


def _pool_counts(
    x: Tensor, spatial: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Tensor:
    """Elements in each window of a pool, shape of one output map."""
    axes = zip(*(_per_axis(value, spatial) for value in (kernel, stride, padding, dilation)), strict=True)
    return _outer(
        [
            _counts(
                _ones(x, axis, spatial),
                partial(F.max_pool1d, kernel_size=k, stride=s, padding=p, dilation=d, ceil_mode=ceil_mode),
                d,
            )
            for axis, (k, s, p, d) in enumerate(axes)
        ]
    )


def _adaptive_counts(x: Tensor, spatial: int, output_size: Any) -> Tensor:
    """Elements in each window of an adaptive pool, shape of one output map."""
    lines = []
    for axis, size in enumerate(_per_axis(output_size, spatial)):
        ones = _ones(x, axis, spatial)
        lines.append(ones if size is None else _counts(ones, partial(F.adaptive_max_pool1d, output_size=size)))
    return _outer(lines)


def _elements(x: Tensor, spatial: int) -> Any:
    """Elements of one map."""
    return math.prod(x.shape[-axis] for axis in range(1, spatial + 1))


def _check_correlation(correlation: float, most: str) -> None:
    inside = 0 <= correlation < 1 or (most == "]" and correlation == 1)
    if not inside:
        raise ValueError(f"correlation must be in [0, 1{most}, got {correlation}")


# --- averages -----------------------------------------------------------------------------------


def _rescaled(y: Tensor, share: Any, correlation: float) -> Tensor:
    """``y / sqrt(C + (1 - C) share)``; share: the sum of an output's squared weights, whose sum is 1."""
    scale = (correlation + (1 - correlation) * share) ** -0.5
    return y * (scale if isinstance(share, float) or not _is_tensor(share) else scale.to(y.dtype))


def _declare_average(signal: Signal, shares: Tensor, correlation: float) -> Declared:
    """Averages of a signal, over outputs whose squared weights sum to ``shares``, at unit variance.

    The elements are taken as ``sqrt(C) a + sqrt(1 - C) b_i``, all distributed as the signal.
    """
    var = correlation + (1 - correlation) * shares
    share = float(shares.mean())
    total, power, left = Signal.constant(0.0), signal.standardized(), max(1, round(1 / share))
    while left:  # the sum of that many copies, by doubling
        total = total.plus(power) if left % 2 else total
        left //= 2
        power = power.plus(power) if left else power
    own = total.standardized().affine(math.sqrt((1 - correlation) * share))
    mixed = signal.standardized().affine(math.sqrt(correlation)).plus(own).standardized()
    mean = signal.mean * float(var.rsqrt().mean())
    return mixed.affine(signal.std, mean), (float((shares / var).mean()),)
