"""How a gradient passes functions of independent maps, as a density over the values that it meets.

A node's G, the expected squared L2 norm of its gradient, is kept as a function g of the node's values, with
E[g] = G: what is large now may be what passes the next rectifier too. Each function here turns g over a result's
values into g over an input's (docs/method.md, section 9). Densities are tensors of shape (n,), n being the
values of their :class:`~normprop.signal.Signal`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.signal import Signal, gaussian_nodes, with_slope


def interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """``values`` given at rising ``nodes``, between them linearly."""
    if len(nodes) == 1:
        return values.expand_as(x)
    right = torch.searchsorted(nodes, x.contiguous()).clamp(1, len(nodes) - 1)
    left = right - 1
    share = ((x - nodes[left]) / (nodes[right] - nodes[left])).clamp(0.0, 1.0)
    return values[left] * (1 - share) + values[right] * share


def through_sum(part: Signal, factor: float, rest: Signal, total: Signal, density: Tensor) -> Tensor:
    """The density that a sum's gradient has over one part's values, the rest being independent."""
    rest = Signal.of(rest.values, rest.weights, 64)
    sums = part.values[:, None] * factor + rest.values
    return factor**2 * (interpolate(sums, total.values, density) * rest.weights).sum(1)


def through_product(factor: Tensor, other: Signal, result: Signal, density: Tensor) -> Tensor:
    """The density that a product's gradient has over one factor's values, the other being independent."""
    other = Signal.of(other.values, other.weights, 64)
    products = factor[:, None] * other.values
    return (interpolate(products, result.values, density) * other.weights * other.values.square()).sum(1)


def of_some(values: Tensor, share: float, result: Signal) -> Callable[[Tensor], Tensor]:
    """How this share of a gradient passes to what became ``values`` of the result."""
    return lambda density: share * interpolate(values, result.values, density)


def in_average(signal: Signal, result: Signal, count: int, factor: float) -> Callable[[Tensor], Tensor]:
    """How a gradient passes to the terms of ``count``, which get ``factor`` of it together."""
    size = math.sqrt(factor / count)  # of a term in the result
    rest = math.sqrt(max(0.0, result.var - signal.var * size**2))
    others = sum_of(signal, count - 1).standardized().affine(rest, result.mean - signal.mean * size)
    return lambda density: count * through_sum(signal, size, others, result, density)


_FEW_TERMS = 16  # of an average, above which it is Gaussian


def sum_of(signal: Signal, count: int) -> Signal:
    """Of independent copies; its shape counts, of many it is a Gaussian."""
    if count > _FEW_TERMS:
        return Signal.gaussian()
    coarse = Signal.of(signal.values, signal.weights, 128)
    return functools.reduce(Signal.plus, [coarse] * (count - 1), coarse) if count else Signal.constant(0.0)


def chance_of_most(signal: Signal, count: int, correlation: float = 0.0) -> Tensor:
    """That an element of each value is its window's greatest, times the window's size: shape (n,)."""
    return (signal.greatest(count, correlation) / signal.weights).clamp(max=count)


def picked(
    values: Tensor, chance: Tensor, result: Signal, scale: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """How a gradient passes an extremum: all of a window's to the one element that is in the result.

    Args:
        values: What each element becomes if it is that one.
        chance: That it is, see :func:`chance_of_most`.
        result: The extremum's.
        scale: By what the extremum was multiplied.
    """
    return lambda density: scale**2 * chance * interpolate(values, result.values, density)


def extreme(
    signal: Signal, count: int, side: float, law: tuple[Tensor, Tensor] | None = None
) -> tuple[Signal, Tensor]:
    """The greatest of ``count`` (with side -1 the smallest), and each value's chance: :func:`chance_of_most`.

    Args:
        signal: The elements'.
        count: How many independent ones a window has.
        side: See above.
        law: What each channel holds, shape (nodes, channels), and the nodes' weights: a window is of one channel.
    """
    if law is None:
        flipped = signal.affine(side)
        chance = chance_of_most(flipped, count)
        return flipped.maximum(count).affine(side), chance if side > 0 else chance.flip(0)
    values, weights = law
    order = (values * side).argsort(0)
    y, w = values.gather(0, order), weights[:, None].expand_as(values).gather(0, order)
    below = w.cumsum(0).clamp(max=1.0).pow(count)
    most = below.diff(dim=0, prepend=torch.zeros_like(below[:1])).clamp_min(0.0)
    nearest = torch.bucketize(y, (signal.values[1:] + signal.values[:-1]) / 2).flatten()
    own, chosen = (torch.zeros_like(signal.values).index_add_(0, nearest, t.flatten()) for t in (w, most))
    seen = own > 0
    chance = interpolate(signal.values, signal.values[seen], (chosen[seen] / own[seen]).clamp(max=count))
    chance = chance / (signal.weights @ chance).clamp_min(1e-300)
    return Signal.of(y, most), chance.clamp(max=count)


def product(x: Signal, y: Signal, function: Callable[[Tensor], Tensor]) -> tuple[Signal, list[Any], Signal]:
    """``x * function(y)``, how a gradient passes to x and to y, and ``function(y)``; x and y are independent."""
    values, slope = with_slope(function, y.values)
    factor = y.image(values)
    result = x.times(factor)

    def to_y(density: Tensor) -> Tensor:
        return slope.square() * through_product(values, x, result, density)

    return result, [functools.partial(through_product, x.values, factor, result), to_y], factor


@dataclass(frozen=True)
class Passage:
    """How a gradient passes functions of a map's channels.

    Attributes:
        values: What each channel reads, shape (n,).
        weights: Their probabilities.
        squares: Shape (n, bins): what the gradient's mean square over the result's values turns into, on average
            over the channels, where such a value was read.
        slope: The functions' mean slope in each channel, or in one for all.
    """

    values: Tensor
    weights: Tensor
    squares: Tensor
    slope: Tensor

    def on_average(self) -> Callable[[Tensor], float]:
        """For a sum, whose terms' values tell nothing."""
        squares = self.weights @ self.squares
        return lambda density: float((squares * density).sum())

    def by_value(self, values: Tensor) -> Callable[[Tensor], Tensor]:
        """Over the values read, shape (n,), which may be finer than ours."""
        squares = self.squares.to_sparse()  # few bins each: kept for as long as the walk
        return lambda density: interpolate(values, self.values, squares @ density)

    def even_share(self, common: Tensor) -> float:
        """What share of a gradient that is the same everywhere stays so; ``common`` is its square, by channel."""
        return ratio(common.mean(), (self.weights @ self.squares).sum())


def through_channels(
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    function: Callable[[Tensor], Tensor],
    size: Tensor | None = None,
    one: bool = False,
) -> tuple[Signal, Passage]:
    """``function(scale * x + shift)``, all channels together, and how a gradient passes it.

    Args:
        values: Shape (n,), what each channel reads.
        weights: Shape (n,).
        scale: Shape (channels,) or (1,).
        shift: Likewise.
        function: Of shape (n, channels).
        size: By what each channel multiplies a gradient, beside the function's slope; ``scale`` if None.
        one: Whether the function is the same for all channels.
    """
    scale, shift, size = torch.broadcast_tensors(scale, shift, scale if size is None else size)
    if (
        one
        and alike(scale)
        and alike(size)
        and float(shift.max() - shift.min()) <= 1e-9 * float(scale.max())
    ):
        scale, shift, size = scale[:1], shift[:1], size[:1]
    elif len(values) * len(scale) > 2_000_000:  # a coarser grid for each of many channels
        coarse = Signal.of(values, weights, max(32, 2_000_000 // len(scale)))
        values, weights = coarse.values, coarse.weights
    y, slope = with_slope(function, values[:, None] * scale + shift)
    result = Signal.of(y, weights[:, None].expand_as(y) / y.shape[1])
    bins = len(result.values)
    nearest = torch.searchsorted(result.values, y).clamp(max=bins - 1)
    place = (nearest + bins * torch.arange(len(values))[:, None]).flatten()
    squares = torch.zeros(len(values) * bins, dtype=torch.float64)
    squares.index_add_(0, place, ((slope * size).square() / y.shape[1]).flatten())
    return result, Passage(values, weights, squares.view(-1, bins), weights @ slope)


FEW_NODES = 257  # of a sum of few terms, from -8.5 to 8.5 of its standard deviations


def by_term(signal: Signal, rows: Tensor, curves: Tensor) -> Tensor:
    """How a gradient behind sums of few terms depends on the value of one term: of mean 1.

    Given one term the sum is that term and a Gaussian of the rest's variance.

    Args:
        signal: The terms', independent.
        rows: Shape (rows, fan_in).
        curves: Shape (FEW_NODES, rows): the mean square of the gradient at the sum, over its value.

    Returns:
        Shape (n,), over the signal's values.
    """
    coarse = Signal.of(signal.values, signal.weights, 48).standardized()
    total = torch.zeros_like(coarse.values)
    for row, curve in zip(rows, curves.T, strict=True):
        total = total + row.square() @ _given_term(coarse.values, row, curve)
    mean = (coarse.weights * total).sum()
    if not mean > 0:
        return torch.ones_like(signal.values)
    return interpolate(signal.standardized().values, coarse.values, total / mean)


def _given_term(values: Tensor, row: Tensor, curve: Tensor) -> Tensor:
    """The mean of a function of ``sum_j W_j x_j`` given one term's ``x_j``, the rest taken as Gaussian.

    Args:
        values: Shape (n,): what x_j may be.
        row: Shape (fan_in,).
        curve: Shape (FEW_NODES,): the function of the sum.

    Returns:
        Shape (fan_in, n).
    """
    grid, _ = gaussian_nodes(FEW_NODES)
    z, probability = gaussian_nodes(48)
    share = (row / row.norm().clamp(min=1e-30))[:, None, None]
    sums = share * values[:, None] + (1 - share.square()).clamp(min=0).sqrt() * z
    return interpolate(sums, grid, curve.contiguous()) @ probability


def by_pair(signal: Signal, rows: Tensor, slopes: Tensor, pairs: Tensor) -> Tensor:
    """How what a gradient that is the same at all positions adds at overlapping taps depends on a term's value.

    The slopes of two sums that share x_j are related through it: of few terms each tells of x_j.

    Args:
        signal: The terms', independent.
        rows: Shape (rows, fan_in), the taps of one input channel after another.
        slopes: Shape (FEW_NODES, rows): the function's slope at the sum, over its value.
        pairs: See :attr:`Taps.pairs`.

    Returns:
        Shape (n,), over the signal's values: without what unrelated slopes make of it.
    """
    coarse = Signal.of(signal.values, signal.weights, 48).standardized()
    total = torch.zeros_like(coarse.values)
    for row, slope in zip(rows, slopes.T, strict=True):
        terms = (row[:, None] * _given_term(coarse.values, row, slope)).unflatten(0, (-1, len(pairs)))
        mean = terms @ coarse.weights
        alone = torch.einsum("ck,kl,cl->", mean, pairs, mean)
        total = total + (torch.einsum("ckn,kl,cln->n", terms, pairs, terms) - alone) / len(rows)
    return interpolate(signal.standardized().values, coarse.values, total)


def ratio(part: Tensor, whole: Tensor | float) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0


def alike(t: Tensor | None) -> bool:
    """Whether all of its numbers are one; so is what is not there."""
    return t is None or (bool(t.numel()) and float(t.max() - t.min()) <= 1e-9 * float(t.abs().max()))
