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
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normprop import activations, gaussian
from normprop.functional import affine, along, rectify
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
        weights: One a branch, in the order of ``forward``'s arguments; their length is irrelevant.
        learnable: Whether they are trained: parameter ``weight``, shape ``(branches,)``, divided by
            its length in ``forward``.
        stds: Of the branches, where they are not of variance 1: each is divided by its own. A branch
            whose last layer starts with its weight as gain costs no operation.
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
        device: Any = None,
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
        device: Any = None,
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
        # drops whole channels, which the samples are behind one more dim.
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


# --- windows: what they hold at borders ---------------------------------------------------------


def per_axis(value: Any, spatial: int) -> tuple[Any, ...]:
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
    line = line[:1].flatten(0, -2).sum(0)  # of an empty batch too
    return torch.ones_like(line, dtype=torch.float32) * torch.ones_like(line)  # float64 stays float64


def _counts(ones: Tensor, max_pool: Callable[[Tensor], Tensor], dilation: int = 1) -> Tensor:
    """Elements in each window along one axis: its last position less its first, shape (out,)."""
    position = ones.cumsum(0)[None, None]
    extent = (max_pool(position) + max_pool(-position)).flatten()
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
    lines = []
    axes = zip(*(per_axis(value, spatial) for value in (kernel, stride, padding, dilation)), strict=True)
    for axis, (k, s, p, d) in enumerate(axes):
        # torch.export fixes the length that F.max_pool1d sees; in 2d it does not.
        window = partial(
            F.max_pool2d,
            kernel_size=(1, k),
            stride=(1, s),
            padding=(0, p),
            dilation=(1, d),
            ceil_mode=ceil_mode,
        )
        lines.append(_counts(_ones(x, axis, spatial), window, d))
    return _outer(lines)


def _adaptive_counts(x: Tensor, spatial: int, output_size: Any) -> Tensor:
    """Elements in each window of an adaptive pool, shape of one output map."""
    lines = []
    for axis, size in enumerate(per_axis(output_size, spatial)):
        ones = _ones(x, axis, spatial)
        lines.append(
            ones if size is None else _counts(ones, partial(F.adaptive_max_pool1d, output_size=size))
        )
    return _outer(lines)


def _elements(x: Tensor, spatial: int) -> Any:
    """Elements of one map."""
    count = x.shape[-1]
    for axis in range(2, spatial + 1):
        count = count * x.shape[-axis]
    return count


def _check_correlation(correlation: float, most: str) -> None:
    inside = 0 <= correlation < 1 or (most == "]" and correlation == 1)
    if not inside:
        raise ValueError(f"correlation must be in [0, 1{most}, got {correlation}")


# --- averages -----------------------------------------------------------------------------------


def _scale(share: Any, correlation: float) -> Any:
    """``1/sqrt(C + (1 - C) share)``; share: the sum of an output's squared weights, which sum to 1."""
    return (correlation + (1 - correlation) * share) ** -0.5


def _declare_average(signal: Signal, shares: Tensor, correlation: float) -> Declared:
    """Averages of a signal, over outputs whose squared weights sum to ``shares``, at unit variance.

    The elements are taken as ``sqrt(C) a + sqrt(1 - C) b_i``, all distributed as the signal; the
    average's shape is that of the nearest number of equal weights.
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
    mean = signal.mean * float(_scale(shares, correlation).mean())
    return mixed.affine(signal.std, mean), (float((shares / var).mean()),)


_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE_AVG_POOL = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def normalized_avg_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    correlation: float = 0.0,
    spatial: int | None = None,
) -> Tensor:
    r"""Average pooling that keeps variance 1, borders included.

    .. math:: y = \frac{\bar x}{\sqrt{C + (1 - C)/n}}

    with n the elements that the window really has: padding and overhang are left out, and whatever
    torch divides by cancels. Derivation: docs/method.md, section 10; C is the correlation after the
    activation (PAPER 1.7).

    Args:
        x: Shape ``(N, C, *)``, mean 0 and variance 1.
        kernel_size, stride, padding, ceil_mode: As in torch.
        correlation: C, between the elements of a window, in [0, 1].
        spatial: Number of spatial dims, if x may come without N or is traced; default ``x.ndim - 2``.

    Returns:
        As torch's pool.

    Raises:
        ValueError: For a correlation outside [0, 1], or another shape.

    Example:
        >>> normalized_avg_pool(torch.ones(1, 1, 4), 4)
        tensor([[[2.]]])
    """
    _check_correlation(correlation, "]")
    spatial = _spatial_dims(x, spatial)
    stride = kernel_size if stride is None else stride
    y: Tensor = _AVG_POOL[spatial - 1](x, kernel_size, stride, padding, ceil_mode, False)  # type: ignore
    if not ceil_mode and not any(per_axis(padding, spatial)):
        return y * _scale(1 / math.prod(per_axis(kernel_size, spatial)), correlation)
    counts = _pool_counts(x, spatial, kernel_size, stride, padding, 1, ceil_mode)
    return y * _scale(1 / counts, correlation).to(y.dtype)


def normalized_adaptive_avg_pool(
    x: Tensor, output_size: Any, correlation: float = 0.0, spatial: int | None = None
) -> Tensor:
    """Adaptive average pooling that keeps variance 1; ``output_size=1`` is global pooling.

    See :func:`normalized_avg_pool`; ``output_size`` as in torch.

    Example:
        >>> normalized_adaptive_avg_pool(torch.ones(1, 1, 3, 3), 1)
        tensor([[[[3.]]]])
    """
    _check_correlation(correlation, "]")
    spatial = _spatial_dims(x, spatial)
    y: Tensor = _ADAPTIVE_AVG_POOL[spatial - 1](x, output_size)  # type: ignore
    if all(size == 1 for size in per_axis(output_size, spatial)):
        return y * _scale(1 / _elements(x, spatial), correlation)
    return y * _scale(1 / _adaptive_counts(x, spatial, output_size), correlation).to(y.dtype)


def normalized_upsample(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    correlation: float = 0.0,
) -> Tensor:
    r"""``F.interpolate`` that keeps variance 1 at every output position.

    An output is :math:`\sum_i w_i x_i` with :math:`\sum_i w_i = 1`, of variance
    :math:`C + (1 - C)\sum_i w_i^2`; the squares' sum is a product over axes (docs/method.md,
    section 10). Copying modes have one weight, and nothing to correct.

    Args:
        x: Shape ``(N, C, *)``, mean 0 and variance 1.
        size, scale_factor, align_corners: As in ``F.interpolate``.
        mode: ``"nearest"``, ``"nearest-exact"``, ``"linear"``, ``"bilinear"``, ``"bicubic"`` or
            ``"trilinear"``.
        correlation: C, between neighbours, in [0, 1].

    Returns:
        As ``F.interpolate``.

    Raises:
        ValueError: For another mode, or a correlation outside [0, 1].

    Example:
        >>> normalized_upsample(torch.ones(1, 1, 2), scale_factor=2, mode="linear")
        tensor([[[1.0000, 1.2649, 1.2649, 1.0000]]])
    """
    _check_correlation(correlation, "]")
    spatial = _upsampled_dims(mode)
    y = F.interpolate(x, size, scale_factor, mode, align_corners)
    if spatial == 0:
        return y
    shares = _upsample_shares(
        [_ones(x, axis, spatial) for axis in range(spatial)], size, scale_factor, mode, align_corners
    )
    return y * _scale(shares, correlation).to(y.dtype)


def _upsampled_dims(mode: str) -> int:
    """Spatial dims of the modes that mix neighbours; 0 for those that copy."""
    modes = {"nearest": 0, "nearest-exact": 0, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode]


def _upsample_shares(
    lines: Sequence[Tensor], size: Any, scale_factor: Any, mode: str, align_corners: bool | None
) -> Tensor:
    """Sum of squared weights into each output position, shape of one output map; lines: ones, an axis each."""
    sizes, factors = per_axis(size, len(lines)), per_axis(scale_factor, len(lines))
    shares = []
    for ones, out, factor in zip(lines, sizes, factors, strict=True):
        # An output reads at most four neighbours: each is on a comb of its own, so that four combs
        # show all weights.
        tooth = ones.cumsum(0).remainder(4)
        combs = torch.stack([torch.eq(tooth, start) for start in range(4)]) * ones
        if mode == "bicubic":  # for images only: an axis of size 1 stays as it is
            pair = None if out is None else (out, 1), None if factor is None else (factor, 1.0)
            seen = F.interpolate(combs[None, :, :, None], *pair, mode, align_corners).squeeze(-1)
        else:
            seen = F.interpolate(combs.unsqueeze(0), out, factor, "linear", align_corners)
        shares.append(seen.squeeze(0).square().sum(0))
    return _outer(shares)


class _AvgPool(nn.Module):
    """Average pools: the torch parent's constructor plus ``correlation=``."""

    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    _spatial: int

    def __init__(self, kernel_size: Any, *args: Any, correlation: float = 0.0, **kwargs: Any) -> None:
        super().__init__(kernel_size, *args, **kwargs)
        _check_correlation(correlation, "]")
        self.correlation = correlation

    def forward(self, input: Tensor) -> Tensor:
        return normalized_avg_pool(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.correlation,
            self._spatial,
        )

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The average's signal at the input's variance, and ``scale^2 / n``."""
        (signal,) = signals
        share = 1 / math.prod(per_axis(self.kernel_size, self._spatial))
        return _declare_average(signal, torch.tensor([share], dtype=torch.float64), self.correlation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correlation={self.correlation}"


class NormalizedAvgPool1d(_AvgPool, nn.AvgPool1d):
    """``nn.AvgPool1d`` that keeps variance 1, see :class:`NormalizedAvgPool2d`; (N, C, L) or (C, L)."""

    _spatial = 1


class NormalizedAvgPool2d(_AvgPool, nn.AvgPool2d):
    r"""``nn.AvgPool2d`` that keeps variance 1: the average divided by :math:`\sqrt{C + (1 - C)/n}`.

    n counts the elements that the window really has, so that borders have variance 1 too. What torch
    divides by cancels: ``count_include_pad`` and ``divisor_override`` change nothing.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: As in torch.
        correlation: C, between the elements of a window, after the activation.

    Shape:
        As ``nn.AvgPool2d``: (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: For a correlation outside [0, 1].

    Example:
        >>> NormalizedAvgPool2d(2)(torch.ones(1, 1, 2, 2))
        tensor([[[[2.]]]])
    """

    _spatial = 2


class NormalizedAvgPool3d(_AvgPool, nn.AvgPool3d):
    """``nn.AvgPool3d`` that keeps variance 1, see :class:`NormalizedAvgPool2d`."""

    _spatial = 3


class _AdaptiveAvgPool(nn.Module):
    """Adaptive average pools: the torch parent's constructor plus ``correlation=``."""

    output_size: Any
    _spatial: int

    def __init__(self, output_size: Any, *, correlation: float = 0.0) -> None:
        super().__init__(output_size)
        _check_correlation(correlation, "]")
        self.correlation = correlation

    def forward(self, input: Tensor) -> Tensor:
        return normalized_adaptive_avg_pool(input, self.output_size, self.correlation, self._spatial)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The average's signal at the input's variance, and ``scale^2 / n``.

        Without ``shapes``, of large windows of independent elements: a Gaussian, factor 1.
        """
        (signal,) = signals
        if shapes is None and self.correlation == 0:
            return Signal.gaussian(signal.mean, signal.std), (1.0,)
        counts = _adaptive_counts(_map_like(self, shapes), self._spatial, self.output_size)
        return _declare_average(signal, 1 / counts, self.correlation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correlation={self.correlation}"


def _map_like(module: Any, shapes: Shapes, spatial: int | None = None) -> Tensor:
    """A map of the input's spatial shape, which takes no memory."""
    if shapes is None:
        raise ValueError(f"{type(module).__name__}.propagate depends on the input's size: pass shapes=")
    shape = tuple(shapes[0])[-(spatial or module._spatial) :]
    return torch.ones((), dtype=torch.float64).expand(1, 1, *shape)


class NormalizedAdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` that keeps variance 1, see :class:`NormalizedAdaptiveAvgPool2d`."""

    _spatial = 1


class NormalizedAdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    r"""``nn.AdaptiveAvgPool2d`` that keeps variance 1; ``output_size=1`` is global pooling.

    Each window's average is divided by :math:`\sqrt{C + (1 - C)/n}`, n its number of elements.

    Args:
        output_size: As in torch.
        correlation: C, between the elements of a window, after the activation.

    Shape:
        As ``nn.AdaptiveAvgPool2d``: (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: For a correlation outside [0, 1].

    Example:
        >>> NormalizedAdaptiveAvgPool2d(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    _spatial = 2


class NormalizedAdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` that keeps variance 1, see :class:`NormalizedAdaptiveAvgPool2d`."""

    _spatial = 3


class NormalizedUpsample(nn.Upsample):
    """``nn.Upsample`` that keeps variance 1 at every output position: :func:`normalized_upsample`.

    Args:
        size, scale_factor, mode, align_corners: As in torch.
        correlation: C, between neighbours, after the activation.

    Shape:
        As ``nn.Upsample``: (N, C, *).

    Raises:
        ValueError: For a mode that is not one of :func:`normalized_upsample`'s, or a correlation
            outside [0, 1].
    """

    def __init__(
        self,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        *,
        correlation: float = 0.0,
    ) -> None:
        super().__init__(size, scale_factor, mode, align_corners)
        _check_correlation(correlation, "]")
        _upsampled_dims(mode)
        self.correlation = correlation

    def forward(self, input: Tensor) -> Tensor:
        return normalized_upsample(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.correlation
        )

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The signal of the outputs on average, and the mean of ``scale^2 * sum of squared weights``."""
        (signal,) = signals
        spatial = _upsampled_dims(self.mode)
        if spatial == 0:
            return signal, (1.0,)
        if shapes is None and self.size is None:
            shapes = ((64,) * spatial,)  # enough periods for the mean
        x = _map_like(self, shapes, spatial)
        lines = [_ones(x, axis, spatial) for axis in range(spatial)]
        shares = _upsample_shares(lines, self.size, self.scale_factor, self.mode, self.align_corners)
        return _declare_average(signal, shares, self.correlation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correlation={self.correlation}"


# --- maxima -------------------------------------------------------------------------------------

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_ADAPTIVE_MAX_POOL = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_GRID = 8193  # odd: a node at 0, where most kinks are
_COMMON = 129


def _of_one_variable(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """phi of a float64 vector on the CPU, with the parameters it has now; channels are averaged."""
    if any(parameter.is_meta for parameter in activation.parameters()):
        with torch.device("cpu"):  # built without values: those it starts with are the default's
            activation = type(activation)()
    phi = activations._pieces(copy.deepcopy(activation).double().cpu())[0]
    return lambda u: phi(u).reshape(-1, u.shape[-1]).mean(0)


def _phi_values(activation: Any) -> tuple[float, ...]:
    """The activation on the grid: what its maxima depend on, and hashable."""
    module = activations.as_module("identity" if activation is None else activation)
    with torch.no_grad():
        return tuple(_of_one_variable(module)(gaussian_nodes(_GRID)[0].to("cpu")).tolist())


@lru_cache(maxsize=256)
def _max_moments(
    values: tuple[float, ...], counts: tuple[int, ...], correlation: float
) -> tuple[tuple[float, float], ...]:
    """Mean and std, for each count n, of the greatest of n normalised values; exactly (0, 1) for 1.

    numpy: a tracer of torch must not see it.
    """
    reach = 8.5
    u = np.linspace(-reach, reach, _GRID)
    common = np.linspace(-reach, reach, _COMMON)[:, None] if correlation else np.zeros((1, 1))
    density = np.exp(-(common**2) / 2)
    density /= density.sum()
    # Given what the window shares, its elements are independent, and F^n is the maximum's distribution.
    exponent = -((u - math.sqrt(correlation) * common) ** 2) / (2 * (1 - correlation))
    weights = np.exp(exponent - exponent.max(1, keepdims=True))
    order = np.argsort(np.array(values), kind="stable")
    v = np.array(values)[order]
    below = np.cumsum((weights / weights.sum(1, keepdims=True))[:, order], 1).clip(max=1.0)

    def moments(count: int) -> tuple[float, float]:
        mass = np.diff((density * below**count).sum(0), prepend=0.0)
        mean = float(mass @ v)
        return mean, math.sqrt(float(mass @ (v - mean) ** 2))

    mean, std = moments(1)
    if not std > 1e-9:
        raise ValueError("the activation is constant: its maximum has no variance to normalise")
    return tuple(
        (0.0, 1.0) if count == 1 else ((m - mean) / std, s / std)
        for count in counts
        for m, s in [moments(count)]
    )


def max_constants(count: int, activation: Any = "relu", correlation: float = 0.0) -> tuple[float, float]:
    r"""Mean and std of the greatest of ``count`` normalised activations.

    With :math:`u_i = \sqrt\rho\,z + \sqrt{1-\rho}\,e_i`, all standard Gaussian: the values
    :math:`(\varphi(u_i) - \text{mean})/\text{std}` are independent given z, so that their maximum
    has the distribution :math:`E_z[F(v\,|\,z)^n]`. Source: PAPER 1.7; docs/method.md, section 10.

    Args:
        count: n, at least 1.
        activation: As a layer takes it, a learned one with the parameters it has now; None for a
            Gaussian itself.
        correlation: rho, of the activation's arguments, in [0, 1).

    Returns:
        Mean and std.

    Raises:
        ValueError: For a count below 1, a correlation outside [0, 1), or a constant activation.

    Example:
        >>> [round(c, 4) for c in max_constants(9, None)]  # the greatest of nine Gaussians
        [1.485, 0.5978]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _check_correlation(correlation, ")")
    return _max_moments(_phi_values(activation), (count,), correlation)[0]


@torch.compiler.assume_constant_result
def _max_table(
    values: tuple[float, ...], counts: tuple[int, ...], correlation: float
) -> tuple[tuple[float, float], ...]:
    """Mean and std by count, from 0 on; (0, 1) where ``counts`` does not name it."""
    wanted = tuple(sorted(set(counts)))
    found = dict(zip(wanted, _max_moments(values, wanted, correlation), strict=True))
    return tuple(found.get(count, (0.0, 1.0)) for count in range(wanted[-1] + 1))


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` as a tensor like ``like``, which may be a stand-in of torch.fx."""
    return like.new_tensor(values) if isinstance(like, fx.Proxy) else gaussian._constant(values, like)


def _standardize_by_count(y: Tensor, counts: Tensor, table: tuple[tuple[float, float], ...]) -> Tensor:
    """``(y - mean) / std`` with the constants of each window's count."""
    index = counts.round().long()
    scale = _table(tuple(1 / std for _, std in table), counts)[index].to(y.dtype)
    shift = _table(tuple(-mean / std for mean, std in table), counts)[index].to(y.dtype)
    return torch.addcmul(shift, y, scale)


def _axis_products(axes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Counts that windows may have, from those of each axis."""
    products = {1}
    for axis in axes:
        products = {a * b for a in products for b in axis}
    return tuple(sorted(products))


def normalized_max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    activation: Any = "relu",
    correlation: float = 0.0,
    spatial: int | None = None,
    table: tuple[tuple[float, float], ...] | None = None,
) -> Tensor:
    r"""Max pooling whose output has mean 0 and variance 1, borders included.

    .. math:: y = \frac{\max x - m_n}{s_n}

    with n the elements that the window really has, and :func:`max_constants`.

    Args:
        x: Shape ``(N, C, *)``, the normalised activation of Gaussians.
        kernel_size, stride, padding, dilation, ceil_mode: As in torch.
        activation: What x went through; None for a Gaussian itself.
        correlation: Between the activation's arguments in a window, in [0, 1).
        spatial: Number of spatial dims, if x may come without N or is traced; default ``x.ndim - 2``.
        table: Mean and std by count, if they are known.

    Returns:
        As torch's pool.

    Raises:
        ValueError: For a correlation outside [0, 1), an unknown activation, or another shape.
    """
    spatial = _spatial_dims(x, spatial)
    stride = kernel_size if stride is None else stride
    kernel = per_axis(kernel_size, spatial)
    bordered = ceil_mode or any(per_axis(padding, spatial))
    if table is None:
        table = _pool_table(kernel, bordered, activation, correlation)
    y: Tensor = _MAX_POOL[spatial - 1](x, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore
    if not bordered:
        return standardize(y, *table[-1])
    counts = _pool_counts(x, spatial, kernel_size, stride, padding, dilation, ceil_mode)
    return _standardize_by_count(y, counts, table)


def _pool_table(
    kernel: tuple[int, ...], bordered: bool, activation: Any, correlation: float
) -> tuple[tuple[float, float], ...]:
    """Constants for the counts that a pool's windows may have."""
    _check_correlation(correlation, ")")
    counts = _axis_products([range(1, k + 1) for k in kernel]) if bordered else (math.prod(kernel),)
    return _max_table(_phi_values(activation), counts, correlation)


def normalized_adaptive_max_pool(
    x: Tensor,
    output_size: Any,
    activation: Any = "relu",
    correlation: float = 0.0,
    spatial: int | None = None,
    values: tuple[float, ...] | None = None,
) -> Tensor:
    """Adaptive max pooling with mean 0 and variance 1; ``output_size=1`` is global pooling.

    See :func:`normalized_max_pool`; the constants depend on the input's size, which must be known
    while a graph is traced.

    Args:
        x: Shape ``(N, C, *)``, the normalised activation of Gaussians.
        output_size: As in torch.
        activation: What x went through; None for a Gaussian itself.
        correlation: Between the activation's arguments in a window, in [0, 1).
        spatial: Number of spatial dims, if x may come without N; default ``x.ndim - 2``.
        values: The activation on the module's grid, if it is known.

    Returns:
        As torch's pool.
    """
    if isinstance(x, fx.Proxy):
        raise TypeError(
            "adaptive max pooling needs the input's size: make it a leaf of the torch.fx tracer"
        )
    _check_correlation(correlation, ")")
    spatial = _spatial_dims(x, spatial)
    counts = _adaptive_products(x.shape[-spatial:], per_axis(output_size, spatial))
    table = _max_table(_phi_values(activation) if values is None else values, counts, correlation)
    y: Tensor = _ADAPTIVE_MAX_POOL[spatial - 1](x, output_size)  # type: ignore
    if len(counts) == 1:
        return standardize(y, *table[-1])
    return _standardize_by_count(y, _adaptive_counts(x, spatial, output_size), table)


def _adaptive_products(shape: Sequence[int], output_size: Sequence[int | None]) -> tuple[int, ...]:
    """Counts that an adaptive pool's windows have: window i runs from floor(i L/out) to ceil((i+1) L/out)."""
    return _axis_products(
        [
            [1] if out is None else [-(-(i + 1) * length // out) - i * length // out for i in range(out)]
            for length, out in zip(shape, output_size, strict=True)
        ]
    )


def _declare_max(signal: Signal, count: int, correlation: float, mean: float, std: float) -> Declared:
    """The standardised maximum's signal, and ``1/std^2``: each output's gradient goes to one input."""
    if correlation == 0:
        return signal.maximum(count).affine(1 / std, -mean / std), (1 / std**2,)
    z, w = gaussian_nodes(_COMMON)
    quantile = torch.special.ndtri(signal.weights.cumsum(0).clamp(max=1.0)).unsqueeze(-1)
    given = gaussian.cdf((quantile - math.sqrt(correlation) * z) / math.sqrt(1 - correlation))
    below = (given**count * w).sum(-1)
    greatest = Signal.of(signal.values, below.diff(prepend=below.new_zeros(1)).clamp_min(0))
    return greatest.affine(1 / std, -mean / std), (1 / std**2,)


class _MaxPool(nn.Module):
    """Max pools: the torch parent's constructor plus ``activation=`` and ``correlation=``."""

    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    _spatial: int

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        activation: Any = "relu",
        correlation: float = 0.0,
    ) -> None:
        if return_indices:
            raise ValueError("return_indices must be False: a normalised pool returns its output alone")
        super().__init__(kernel_size, stride, padding, dilation, False, ceil_mode)
        self.correlation = correlation
        self.activation = _activation_name(activation)
        kernel = per_axis(kernel_size, self._spatial)
        bordered = ceil_mode or any(per_axis(padding, self._spatial))
        self.table = _pool_table(kernel, bordered, activation, correlation)

    def forward(self, input: Tensor) -> Tensor:
        return normalized_max_pool(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            spatial=self._spatial,
            table=self.table,
        )

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The standardised maximum's signal, and ``1/std^2``."""
        (signal,) = signals
        return _declare_max(signal, len(self.table) - 1, self.correlation, *self.table[-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, correlation={self.correlation}"


def _activation_name(activation: Any) -> str:
    return "identity" if activation is None else activations.name_of(activations.as_module(activation))


class NormalizedMaxPool1d(_MaxPool, nn.MaxPool1d):
    """``nn.MaxPool1d`` with mean 0 and variance 1, see :class:`NormalizedMaxPool2d`; (N, C, L) or (C, L)."""

    _spatial = 1


class NormalizedMaxPool2d(_MaxPool, nn.MaxPool2d):
    r"""``nn.MaxPool2d`` with mean 0 and variance 1: :math:`(\max x - m_n)/s_n`.

    :math:`m_n, s_n` are the mean and std of the greatest of n normalised activations of Gaussians
    (:func:`max_constants`), n the elements that the window really has.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: As in torch;
            ``return_indices`` must be False.
        activation: What the input went through, as a layer takes it; None for a Gaussian itself. A
            learned one counts with the parameters it has when the pool is built (channels averaged).
        correlation: Between the activation's arguments in a window, in [0, 1). Near 0.9 for the
            pixels of an image (PAPER 1.7).

    Shape:
        As ``nn.MaxPool2d``: (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: For ``return_indices=True``, a correlation outside [0, 1), or an unknown activation.

    Example:
        >>> pool = NormalizedMaxPool2d(3, activation=None)
        >>> round(pool(torch.zeros(1, 1, 3, 3)).item(), 3)  # -1.485013 / .597790
        -2.484
    """

    _spatial = 2


class NormalizedMaxPool3d(_MaxPool, nn.MaxPool3d):
    """``nn.MaxPool3d`` with mean 0 and variance 1, see :class:`NormalizedMaxPool2d`."""

    _spatial = 3


class _AdaptiveMaxPool(nn.Module):
    """Adaptive max pools: the torch parent's constructor plus ``activation=`` and ``correlation=``."""

    output_size: Any
    _spatial: int

    def __init__(self, output_size: Any, *, activation: Any = "relu", correlation: float = 0.0) -> None:
        super().__init__(output_size)
        _check_correlation(correlation, ")")
        self.correlation = correlation
        self.activation = _activation_name(activation)
        self.values = _phi_values(activation)

    def forward(self, input: Tensor) -> Tensor:
        return normalized_adaptive_max_pool(
            input,
            self.output_size,
            correlation=self.correlation,
            spatial=self._spatial,
            values=self.values,
        )

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The standardised maximum's signal, and ``1/std^2``, of the largest window; needs ``shapes``."""
        (signal,) = signals
        shape = _map_like(self, shapes).shape[-self._spatial :]
        count = _adaptive_products(shape, per_axis(self.output_size, self._spatial))[-1]
        constants = _max_moments(self.values, (count,), self.correlation)[0]
        return _declare_max(signal, count, self.correlation, *constants)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, correlation={self.correlation}"


class NormalizedAdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """``nn.AdaptiveMaxPool1d`` with mean 0 and variance 1, see :class:`NormalizedAdaptiveMaxPool2d`."""

    _spatial = 1


class NormalizedAdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """``nn.AdaptiveMaxPool2d`` with mean 0 and variance 1; ``output_size=1`` is global pooling.

    Args:
        output_size: As in torch.
        activation: See :class:`NormalizedMaxPool2d`.
        correlation: See :class:`NormalizedMaxPool2d`.

    Shape:
        As ``nn.AdaptiveMaxPool2d``: (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: For a correlation outside [0, 1), or an unknown activation.
    """

    _spatial = 2


class NormalizedAdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """``nn.AdaptiveMaxPool3d`` with mean 0 and variance 1, see :class:`NormalizedAdaptiveMaxPool2d`."""

    _spatial = 3


# --- element by element -------------------------------------------------------------------------


def normalized_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps variance 1: in training ``mask * x / sqrt(1 - p)``, else x.

    Torch divides by 1 - p, which keeps the mean and multiplies the variance by 1/(1 - p). Here the
    mean given x is ``sqrt(1 - p) x`` in training and x in use (PAPER 1.7): one of the two must give.

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
    eval mode (PAPER 1.7). Torch's own keeps that mean and multiplies the variance by 1/(1 - p).

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
    x: Tensor, z: Tensor, phi: Any = "sigmoid", rms: float | Tensor | None = None
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
    network multiply each other: with std 1/sqrt(gates) their product stays bounded at any depth
    (docs/method.md, section 10).

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

    def __init__(self, phi: Any = "sigmoid", *, std: float = 1.0) -> None:
        super().__init__()
        self.phi = activations.as_module(phi)
        self.std = float(std)
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std must be finite and at least 0, got {std}")
        learned = activations.is_learned(self.phi)
        self.rms: float | None = None if learned else _gate_rms(self.phi, self.std)
        if self.rms is not None and not self.rms > 0:
            raise ValueError(f"phi must not be 0 everywhere, got {activations.name_of(self.phi)}")

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return normalized_gate(x, z, self.phi, self._rms())

    def _rms(self) -> Any:
        return _gate_rms(self.phi, self.std) if self.rms is None else self.rms

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """For (x, z): the product's signal, E[(phi/rms)^2], and E[x^2] E[phi'^2]/rms^2."""
        x, z = signals
        with torch.no_grad():
            rms = float(torch.as_tensor(self._rms()).mean())
        gate, slope = z.apply(_of_one_variable(self.phi))
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
    """``max(ratio * trunk + branch, low)``: a residual sum and the ReLU behind it, in units in which that is all.

    :func:`normprop.convert` makes it of a :class:`NormalizedAdd`, a ReLU and the :class:`Standardize` that
    reads them, whose constants go into the layers around (docs/method.md, section 12).

    Args:
        ratio: On the trunk.
        low: What a raw value of 0 is in these units.
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
    """``max(x, low)``: a normalised ReLU that reads a trunk, in units in which that is all.

    :func:`normprop.lighten` makes it of a :class:`~normprop.NormalizedActivation`, whose constants go into
    the layers around (docs/method.md, section 12). For its backward it keeps its output alone.

    Args:
        low: What a raw value of 0 is in these units.

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

    Args:
        module: One of this file's modules.
        names: Its attributes, numbers or tuples of numbers.
    """
    before: tuple[str, ...] = getattr(module, "kept", ())
    module.kept = tuple(sorted({*before, *names}))  # type: ignore[assignment]
    if before:
        return
    module.register_state_dict_post_hook(_save_constants)
    module.register_load_state_dict_pre_hook(_load_constants)


def _save_constants(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[f"{prefix}constants"] = torch.tensor(_constants(module), dtype=torch.float64)


def _constants(module: Any) -> list[float]:
    """The numbers that go with the weights, one after another."""
    values = (getattr(module, name) for name in module.kept)
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
            f"{prefix}constants: expected {wanted} ({', '.join(module.kept)}), got {constants.numel()}"
        )
        return
    numbers = iter(constants.tolist())
    for name in module.kept:
        old = getattr(module, name)
        new = tuple(next(numbers) for _ in old) if isinstance(old, tuple) else next(numbers)
        setattr(module, name, new)
