"""Which positions of a map a layer's outputs read."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn import grad as input_gradients

from normprop.graph.reading import argument, shape, tensor_inputs


def positions(node: fx.Node) -> tuple[int, ...]:
    """The node's shape behind batch and channels."""
    return (shape(node) or ())[2:]


def transposed_share(node: fx.Node, layer: Any) -> float:
    """The share of its taps that an output of a transposed convolution reads, on average over the map.

    ``1 / prod(stride)`` far from borders; on small maps less, as most taps reach beyond the input.
    """
    before, after = shape(tensor_inputs(node)[0]), shape(node)
    if before is None or after is None or isinstance(layer.padding, str):
        return 1.0 / math.prod(layer.stride)
    share = 1.0
    for axis, taps in enumerate(layer.kernel_size):
        dim = axis - len(layer.kernel_size)
        first = torch.arange(before[dim]) * layer.stride[axis] - layer.padding[axis]
        place = first[:, None] + torch.arange(taps) * layer.dilation[axis]
        reached = ((place >= 0) & (place < after[dim])).sum()
        share *= float(reached) / (taps * after[dim])
    return share


def taps_of(node: fx.Node, layer: Any) -> Taps | None:
    """Where a convolution's outputs read, if its map has positions and its padding is zeros."""
    size = getattr(layer, "kernel_size", ())
    before, after = ((shape(n) or ())[-len(size) :] for n in (tensor_inputs(node)[0], node))
    if not size or len(before) != len(size) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    padding = layer.padding
    if node.op == "call_function":
        padding = argument(node, 4, "padding", 0)
    if padding == "same":
        padding = [(d * (k - 1)) // 2 for k, d in zip(size, layer.dilation, strict=True)]
    elif isinstance(padding, (str, int)):
        padding = [padding if isinstance(padding, int) else 0] * len(size)
    taps = Taps(before, size, layer.stride, padding, layer.dilation)
    # An even kernel's "same" padding is lopsided.
    return taps if taps.inside.shape == after else None


@dataclass(frozen=True)
class Taps:
    """The positions that a convolution's outputs read: outside of the input stand zeros.

    Attributes:
        before: The input's positions, by axis; the others likewise.
    """

    before: tuple[int, ...]
    size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @functools.cached_property
    def kernel(self) -> Tensor:
        return torch.ones((1, 1, *self.size), dtype=torch.float64) / math.prod(self.size)

    @functools.cached_property
    def inside(self) -> Tensor:
        """The share of each output's taps that the input has."""
        return self.read(torch.ones(self.before, dtype=torch.float64))

    @functools.cached_property
    def pairs(self) -> Tensor:
        """Shape (taps, taps): by which two taps outputs meet at an input position, per output; 0 for one tap."""
        met = torch.ones(1, 1, dtype=torch.float64)
        for axis, taps in enumerate(self.size):
            outputs = self.inside.shape[axis]
            first = torch.arange(outputs) * self.stride[axis] - self.padding[axis]
            place = first + torch.arange(taps)[:, None] * self.dilation[axis]
            inside = (place >= 0) & (place < self.before[axis])
            reads = torch.zeros(taps, self.before[axis], dtype=torch.float64)
            reads[torch.arange(taps)[:, None].expand_as(place)[inside], place[inside]] = 1.0
            met = torch.kron(met, reads @ reads.T / outputs)
        return met.fill_diagonal_(0.0)

    def read(self, energy: Tensor) -> Tensor:
        """The mean over each output's taps."""
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        where = (self.stride, self.padding, self.dilation)
        return convolve(energy[None, None], self.kernel, None, *where)[0, 0]

    def spread(self, place: Tensor) -> Tensor:
        """Each output's share over its taps; of mean 1 if ``place`` is 1 everywhere."""
        back = getattr(input_gradients, f"conv{len(self.size)}d_input")
        where = (self.stride, self.padding, self.dilation)
        there = back((1, 1, *self.before), self.kernel, place[None, None], *where)[0, 0]
        return there * (there.numel() / self.inside.sum())


def even_out(x: Tensor) -> Tensor:
    """Divided by its mean; even where that is 0."""
    return x / x.mean() if x.mean() > 0 else torch.ones_like(x)


def phase_sums(rows: Tensor, stride: Sequence[int]) -> Tensor:
    """Sums of a transposed convolution's taps that meet in one output position: shape (phases, channels).

    Args:
        rows: Shape (groups, in, out, *kernel), see :func:`normprop.functional.row_view`.
        stride: One a spatial dim.
    """
    parts = [rows.sum(1)]
    for axis, step in enumerate(stride):
        before = (slice(None),) * (2 + axis)
        parts = [part[(*before, slice(first, None, step))] for part in parts for first in range(step)]
    return torch.stack([part.flatten(2).sum(2).flatten() for part in parts])
