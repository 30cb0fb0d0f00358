r"""The distribution of one map's elements, carried through a network by formula, without data.

A :class:`Signal` is a weighted set of values: the nodes on which a Gaussian is integrated, seen
through whatever happened to them since. An element-wise function is applied to the values; a sum of
independent maps is all pairs of values; a maximum raises the distribution function to a power. What
a weight layer reads is then known (mean, variance) however un-Gaussian it has become
(docs/method.md, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop import gaussian

_NODES = 512
COMMON = 129  # of what correlated values have in common
_REACH = 8.5  # standard deviations; what lies beyond has probability 2e-17
_FAR = 12.0  # standard deviations; what lies beyond shares the outermost bins


@dataclass(frozen=True)
class Signal:
    """Values, rising, and their probabilities.

    Attributes:
        values: Shape (n,), float64.
        weights: Shape (n,), float64, positive, of sum 1.

    Example:
        >>> z = Signal.gaussian()
        >>> y, slope = z.apply(torch.relu)
        >>> round(y.mean, 3), round(y.std, 3), round(slope, 3)
        (0.399, 0.584, 0.5)
        >>> round(z.maximum(9).mean, 3)
        1.485
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def gaussian(cls, mean: float = 0.0, std: float = 1.0) -> Signal:
        """N(mean, std^2)."""
        z, w = gaussian_nodes(_NODES)
        return cls.of(mean + abs(std) * z, w)

    @classmethod
    def constant(cls, value: float) -> Signal:
        """One value."""
        return cls(torch.tensor([value], dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None, bins: int = _NODES) -> Signal:
        """Any values (say a parameter's), gathered in bins that keep each bin's mean.

        Args:
            values: Any shape.
            weights: Same shape, not negative; equal if None.
            bins: How many at most.
        """
        values = values.detach().double().cpu().flatten()
        weights = torch.ones_like(values) if weights is None else weights.double().flatten()
        values, weights = values[weights > 0], weights[weights > 0]
        weights = weights / weights.sum()
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(high - low):
            return cls(torch.full((1,), math.nan, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            return cls.constant((low + high) / 2)
        mean = float((weights * values).sum())
        var = float((weights * (values - mean).square()).sum())
        # Rare values far out would make the bins too wide for all others.
        low, high = max(low, mean - _FAR * math.sqrt(var)), min(high, mean + _FAR * math.sqrt(var))
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            return cls.constant(mean)
        index = ((values - low) * ((bins - 1) / (high - low))).round().long().clamp(0, bins - 1)
        mass = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, weights)
        moment = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, weights * values)
        kept = mass > 0
        centers, mass = moment[kept] / mass[kept], mass[kept]
        binned = float((mass * (centers - mean).square()).sum())
        return cls(mean + (centers - mean) * math.sqrt(var / binned), mass)  # no variance lost in bins

    @property
    def mean(self) -> float:
        return float((self.weights * self.values).sum())

    @property
    def var(self) -> float:
        return float((self.weights * (self.values - self.mean).square()).sum())

    @property
    def std(self) -> float:
        return math.sqrt(self.var)

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(float((self.weights * self.values.square()).sum()))

    def apply(self, function: Callable[[Tensor], Tensor]) -> tuple[Signal, float]:
        """The signal behind an element-wise function, and E[f'^2]."""
        y, slope = with_slope(function, self.values)
        return self.image(y), float((self.weights * slope.square()).sum())

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Independent values; always the same."""
        drawn = torch.rand(
            math.prod(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        index = torch.searchsorted(self.weights.cumsum(0), drawn * self.weights.sum())
        return self.values[index.clamp_max(len(self.values) - 1)].view(shape)

    def image(self, y: Tensor) -> Signal:
        """Of the values ``y``, kept in their range: the next function may not be defined outside."""
        result = Signal.of(y, self.weights)
        return Signal(result.values.clamp(y.min(), y.max()), result.weights)

    def affine(self, scale: float, shift: float = 0.0) -> Signal:
        """``scale * x + shift``."""
        if scale == 0:
            return Signal.constant(shift)
        values, weights = self.values * scale + shift, self.weights
        return Signal(values, weights) if scale > 0 else Signal(values.flip(0), weights.flip(0))

    def standardized(self) -> Signal:
        """Moved and scaled to mean 0, variance 1; a constant becomes 0."""
        std = self.std
        return self.affine(1 / std, -self.mean / std) if std > 0 else Signal.constant(0.0)

    def plus(self, other: Signal, bins: int = _NODES) -> Signal:
        """The sum of independent signals."""
        values = self.values[:, None] + other.values
        return Signal.of(values, self.weights[:, None] * other.weights, bins)

    def combination(self, rows: Tensor) -> Signal:
        """The shape of ``sum_i w_i x_i`` of independent copies, at mean 0, variance 1.

        A sum of few terms is not yet Gaussian: this is what a layer of small fan-in returns.

        Args:
            rows: Shape (rows, fan_in), a sample of a layer's rows. The mixture of all and of their
                negatives is returned: over many random rows skewness has no sign.
        """
        coarse = Signal.of(self.values, self.weights, 96)
        sums = []
        for row in rows.tolist():
            total = Signal.constant(0.0)
            for weight in row:
                if weight != 0.0:
                    total = total.plus(coarse.affine(weight), 128)
            if total.var > 0:
                shape = total.standardized()
                sums += [shape, shape.affine(-1.0)]
        return Signal.mixture(sums, [1.0] * len(sums)) if sums else Signal.gaussian()

    def times(self, other: Signal) -> Signal:
        """The product of independent signals."""
        return Signal.of(self.values[:, None] * other.values, self.weights[:, None] * other.weights)

    def maximum(self, count: int) -> Signal:
        """The largest of ``count`` independent copies."""
        return Signal.of(self.values, self.greatest(count))

    def greatest(self, count: int, correlation: float = 0.0) -> Tensor:
        """The probability that the largest of ``count`` copies has each of the values: shape (n,).

        Args:
            count: How many.
            correlation: Of the Gaussians behind the copies, in [0, 1).
        """
        below = self.weights.cumsum(0).clamp(max=1.0)
        if correlation:
            z, w = gaussian_nodes(COMMON)
            quantile = torch.special.ndtri(below).unsqueeze(-1)
            given = gaussian.cdf((quantile - math.sqrt(correlation) * z) / math.sqrt(1 - correlation))
            below = (given**count * w).sum(-1)
        else:
            below = below.pow(count)
        return below.diff(prepend=below.new_zeros(1)).clamp_min(0.0)

    @staticmethod
    def mixture(parts: Sequence[Signal], shares: Sequence[float]) -> Signal:
        """Elements drawn from the parts in these shares: a concat."""
        if len(parts) == 1:
            return parts[0]
        weights = [part.weights * share for part, share in zip(parts, shares, strict=True)]
        return Signal.of(torch.cat([part.values for part in parts]), torch.cat(weights))


def with_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """An element-wise function's values, and its derivative there."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = function(x * 1.0)  # not a leaf: in-place functions may have it
        slope = torch.zeros_like(x)
        if y.requires_grad:
            (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def gaussian_nodes(count: int) -> tuple[Tensor, Tensor]:
    """Equidistant nodes and weights for N(0, 1), shape (count,), float64: the trapezoidal rule.

    Its error falls faster than any power of the distance for smooth functions, and with its square
    at kinks.
    """
    z = torch.linspace(-_REACH, _REACH, count, dtype=torch.float64, device="cpu")
    w = torch.exp(-z.square() / 2)
    return z, w / w.sum()
