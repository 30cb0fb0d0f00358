r"""Pools and upsampling that keep mean 0 and variance 1: rules of ``merges`` for windows of neighbours.

A window of n elements with correlation C has an average of variance C + (1 - C)/n; the greatest of n
has a mean and a variance that are integrals (docs/method.md, section 10). At borders n is the number
of elements that the window really has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normprop import activations, gaussian
from normprop.activations import ActivationLike
from normprop.functional import Size
from normprop.merges import Declared, Shapes, standardize
from normprop.rows import is_plain
from normprop.signal import COMMON, Signal, gaussian_nodes

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
    x: Tensor,
    spatial: int,
    kernel: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
) -> Tensor:
    """Elements in each window of a pool, shape of one output map."""
    kernel, padding = per_axis(kernel, spatial), per_axis(padding, spatial)
    stride, dilation = per_axis(stride, spatial), per_axis(dilation, spatial)
    if not ceil_mode and all(d == 1 for d in dilation):  # what an average divides by, of ones
        plain = x.new_ones([1, 1, *(x.shape[axis - spatial] for axis in range(spatial))])
        ones = torch.ones_like(plain, dtype=torch.float32) * plain  # float64 stays float64
        if spatial == 1:  # torch.export fixes the length that pools in 1d see
            ones, kernel, stride, padding = ones.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding)
        counts: Tensor = _AVG_POOL[len(kernel) - 1](ones, kernel, stride, padding, False, True)  # type: ignore
        return (counts * math.prod(kernel)).flatten(0, -1 - spatial)[0]
    lines = []
    for axis, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
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


def _adaptive_counts(x: Tensor, spatial: int, output_size: int | Sequence[int | None]) -> Tensor:
    """Elements in each window of an adaptive pool, shape of one output map.

    Of L positions the i-th of n windows has those from floor(i L/n) to before ceil((i + 1) L/n). The halves
    keep the quotients off whole numbers, so that rounding cannot move floor or ceil.
    """
    lines = []
    for axis, size in enumerate(per_axis(output_size, spatial)):
        ones = _ones(x, axis, spatial)
        if size is not None:
            ends = ones.new_ones(size).cumsum(0) * ones.sum()
            ones = ((ends - 0.5) / size).ceil() - ((ends - ones.sum() + 0.5) / size).floor()
        lines.append(ones)
    return _outer(lines)


def _by_shape(make: Callable[..., Any], x: Tensor, spatial: int, *arguments: Any) -> Any:
    """``make(x, spatial, *arguments)``, which only looks at x's shape, dtype and device: made once for each.

    Dozens of operations on small tensors, which a small map takes less time than. Where code is traced or
    transformed they are made anew, so that a graph serves other sizes.
    """
    if not is_plain(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make(x, spatial, *arguments)
    arguments = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
    return _made(make, spatial, x.shape[-spatial:], x.dtype, x.device, *arguments)


@lru_cache(maxsize=64)
def _made(
    make: Callable[..., Any],
    spatial: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *arguments: Any,
) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return make(torch.empty((1, 1, *sizes), dtype=dtype, device=device), spatial, *arguments)


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
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    correlation: float = 0.0,
    spatial: int | None = None,
) -> Tensor:
    r"""Average pooling that keeps variance 1, borders included.

    .. math:: y = \frac{\bar x}{\sqrt{C + (1 - C)/n}}

    with n the elements that the window really has: padding and overhang are left out, and whatever
    torch divides by cancels. Derivation: docs/method.md, section 10; C is the correlation after the
    activation (docs/method.md, section 10).

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
    counts = _by_shape(_pool_counts, x, spatial, kernel_size, stride, padding, 1, ceil_mode)
    return y * _scale(1 / counts, correlation).to(y.dtype)


def normalized_adaptive_avg_pool(
    x: Tensor, output_size: int | Sequence[int | None], correlation: float = 0.0, spatial: int | None = None
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
    return y * _scale(1 / _by_shape(_adaptive_counts, x, spatial, output_size), correlation).to(y.dtype)


def normalized_upsample(
    x: Tensor,
    size: Size | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
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
    shares = _by_shape(_upsample_shares, x, spatial, size, scale_factor, mode, align_corners)
    return y * _scale(shares, correlation).to(y.dtype)


def _upsampled_dims(mode: str) -> int:
    """Spatial dims of the modes that mix neighbours; 0 for those that copy."""
    modes = {"nearest": 0, "nearest-exact": 0, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode]


def _upsample_shares(
    x: Tensor,
    spatial: int,
    size: Size | None,
    scale_factor: float | tuple[float, ...] | None,
    mode: str,
    align_corners: bool | None,
) -> Tensor:
    """Sum of squared weights into each output position, shape of one output map."""
    shares = []
    for axis, (out, factor) in enumerate(
        zip(per_axis(size, spatial), per_axis(scale_factor, spatial), strict=True)
    ):
        ones = _ones(x, axis, spatial)
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


class AvgPool(nn.Module):
    """Average pools: the torch parent's constructor plus ``correlation=``."""

    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    _spatial: int

    def __init__(self, kernel_size: Size, *args: Any, correlation: float = 0.0, **kwargs: Any) -> None:
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


class NormalizedAvgPool1d(AvgPool, nn.AvgPool1d):
    """``nn.AvgPool1d`` that keeps variance 1, see :class:`NormalizedAvgPool2d`; (N, C, L) or (C, L)."""

    _spatial = 1


class NormalizedAvgPool2d(AvgPool, nn.AvgPool2d):
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


class NormalizedAvgPool3d(AvgPool, nn.AvgPool3d):
    """``nn.AvgPool3d`` that keeps variance 1, see :class:`NormalizedAvgPool2d`."""

    _spatial = 3


class AdaptiveAvgPool(nn.Module):
    """Adaptive average pools: the torch parent's constructor plus ``correlation=``."""

    output_size: Any
    _spatial: int

    def __init__(self, output_size: int | Sequence[int | None], *, correlation: float = 0.0) -> None:
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


class NormalizedAdaptiveAvgPool1d(AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` that keeps variance 1, see :class:`NormalizedAdaptiveAvgPool2d`."""

    _spatial = 1


class NormalizedAdaptiveAvgPool2d(AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
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


class NormalizedAdaptiveAvgPool3d(AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
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
        size: Size | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
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
        shares = _upsample_shares(x, spatial, self.size, self.scale_factor, self.mode, self.align_corners)
        return _declare_average(signal, shares, self.correlation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correlation={self.correlation}"


# --- maxima -------------------------------------------------------------------------------------

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_ADAPTIVE_MAX_POOL = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_GRID = 8193  # odd: a node at 0, where most kinks are


def _phi_values(activation: ActivationLike | None) -> tuple[float, ...]:
    """The activation on the grid: what its maxima depend on, and hashable."""
    module = activations.as_module("identity" if activation is None else activation)
    with torch.no_grad():
        return tuple(activations.of_one_variable(module)(gaussian_nodes(_GRID)[0]).tolist())


@lru_cache(maxsize=256)
def _max_moments(
    values: tuple[float, ...], counts: tuple[int, ...], correlation: float
) -> tuple[tuple[float, float], ...]:
    """Mean and std, for each count n, of the greatest of n normalised values; exactly (0, 1) for 1.

    numpy: a tracer of torch must not see it.
    """
    reach = 8.5
    u = np.linspace(-reach, reach, _GRID)
    common = np.linspace(-reach, reach, COMMON)[:, None] if correlation else np.zeros((1, 1))
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


def max_constants(
    count: int, activation: ActivationLike | None = "relu", correlation: float = 0.0
) -> tuple[float, float]:
    r"""Mean and std of the greatest of ``count`` normalised activations.

    With :math:`u_i = \sqrt\rho\,z + \sqrt{1-\rho}\,e_i`, all standard Gaussian: the values
    :math:`(\varphi(u_i) - \text{mean})/\text{std}` are independent given z, so that their maximum
    has the distribution :math:`E_z[F(v\,|\,z)^n]`. Derivation: docs/method.md, section 10.

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


def _max_table(
    values: tuple[float, ...], counts: tuple[int, ...], correlation: float
) -> tuple[tuple[float, float], ...]:
    """Mean and std by count, from 0 on; (0, 1) where ``counts`` does not name it."""
    wanted = tuple(sorted(set(counts)))
    found = dict(zip(wanted, _max_moments(values, wanted, correlation), strict=True))
    return tuple(found.get(count, (0.0, 1.0)) for count in range(wanted[-1] + 1))


# What torch.compiler.assume_constant_result sets; the decorator itself imports all of the compiler.
_max_table._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` as a tensor like ``like``, which may be a stand-in of torch.fx."""
    return like.new_tensor(values) if isinstance(like, fx.Proxy) else gaussian._constant(values, like)


def _by_count(
    x: Tensor,
    spatial: int,
    counts: Callable[..., Tensor],
    table: tuple[tuple[float, float], ...],
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """``1/std`` and ``-mean/std`` of each window's count, which ``counts`` finds; in x's dtype."""
    found = counts(x, spatial, *arguments)
    index = found.round().long()
    scale = _table(tuple(1 / std for _, std in table), found)[index]
    shift = _table(tuple(-mean / std for mean, std in table), found)[index]
    return scale.to(x.dtype), shift.to(x.dtype)


def _axis_products(axes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Counts that windows may have, from those of each axis."""
    products = {1}
    for axis in axes:
        products = {a * b for a in products for b in axis}
    return tuple(sorted(products))


def normalized_max_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    activation: ActivationLike | None = "relu",
    correlation: float = 0.0,
    spatial: int | None = None,
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

    Returns:
        As torch's pool.

    Raises:
        ValueError: For a correlation outside [0, 1), an unknown activation, or another shape.
    """
    spatial = _spatial_dims(x, spatial)
    stride = kernel_size if stride is None else stride
    windows = kernel_size, stride, padding, dilation, ceil_mode
    return _max_pool(x, spatial, windows, _pool_table(spatial, windows, activation, correlation))


_Windows = tuple[Size, Size, Size, Size, bool]  # kernel_size, stride, padding, dilation, ceil_mode


def _bordered(spatial: int, windows: _Windows) -> bool:
    """Whether some windows may hang over the map's edges."""
    _, _, padding, _, ceil_mode = windows
    return ceil_mode or any(per_axis(padding, spatial))


def _pool_table(
    spatial: int, windows: _Windows, activation: ActivationLike | None, correlation: float
) -> tuple[tuple[float, float], ...]:
    """Mean and std by count, for the counts that these windows may have."""
    _check_correlation(correlation, ")")
    kernel = per_axis(windows[0], spatial)
    bordered = _bordered(spatial, windows)
    counts = _axis_products([range(1, k + 1) for k in kernel]) if bordered else (math.prod(kernel),)
    return _max_table(_phi_values(activation), counts, correlation)


def _max_pool(x: Tensor, spatial: int, windows: _Windows, table: tuple[tuple[float, float], ...]) -> Tensor:
    y: Tensor = _MAX_POOL[spatial - 1](x, *windows)  # type: ignore
    if not _bordered(spatial, windows):
        return standardize(y, *table[-1])
    scale, shift = _by_shape(_by_count, x, spatial, _pool_counts, table, *windows)
    return torch.addcmul(shift, y, scale)


def normalized_adaptive_max_pool(
    x: Tensor,
    output_size: int | Sequence[int | None],
    activation: ActivationLike | None = "relu",
    correlation: float = 0.0,
    spatial: int | None = None,
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

    Returns:
        As torch's pool.
    """
    _check_correlation(correlation, ")")
    return _adaptive_max_pool(
        x, _spatial_dims(x, spatial), output_size, _phi_values(activation), correlation
    )


def _adaptive_max_pool(
    x: Tensor,
    spatial: int,
    output_size: int | Sequence[int | None],
    values: tuple[float, ...],
    correlation: float,
) -> Tensor:
    """With the activation's values on the grid."""
    if isinstance(x, fx.Proxy):
        raise TypeError(
            "adaptive max pooling needs the input's size: make it a leaf of the torch.fx tracer"
        )
    counts = _adaptive_products(x.shape[-spatial:], per_axis(output_size, spatial))
    table = _max_table(values, counts, correlation)
    y: Tensor = _ADAPTIVE_MAX_POOL[spatial - 1](x, output_size)  # type: ignore
    if len(counts) == 1:
        return standardize(y, *table[-1])
    scale, shift = _by_shape(_by_count, x, spatial, _adaptive_counts, table, output_size)
    return torch.addcmul(shift, y, scale)


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
    greatest = Signal.of(signal.values, signal.greatest(count, correlation))
    return greatest.affine(1 / std, -mean / std), (1 / std**2,)


class MaxPool(nn.Module):
    """Max pools: the torch parent's constructor plus ``activation=`` and ``correlation=``."""

    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    _spatial: int

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        activation: ActivationLike | None = "relu",
        correlation: float = 0.0,
    ) -> None:
        if return_indices:
            raise ValueError("return_indices must be False: a normalised pool returns its output alone")
        super().__init__(kernel_size, stride, padding, dilation, False, ceil_mode)
        self.correlation = correlation
        self.activation = _activation_name(activation)
        self.table = _pool_table(self._spatial, self._windows(), activation, correlation)

    def _windows(self) -> _Windows:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        spatial = _spatial_dims(input, self._spatial)
        return _max_pool(input, spatial, self._windows(), self.table)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The standardised maximum's signal, and ``1/std^2``."""
        (signal,) = signals
        count, mean, std = self.window(shapes)
        return _declare_max(signal, count, self.correlation, mean, std)

    def window(self, shapes: Shapes) -> tuple[int, float, float]:
        """How many elements a whole window has, and mean and std of their greatest."""
        return len(self.table) - 1, *self.table[-1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, correlation={self.correlation}"


def _activation_name(activation: ActivationLike | None) -> str:
    return "identity" if activation is None else activations.name_of(activations.as_module(activation))


class NormalizedMaxPool1d(MaxPool, nn.MaxPool1d):
    """``nn.MaxPool1d`` with mean 0 and variance 1, see :class:`NormalizedMaxPool2d`; (N, C, L) or (C, L)."""

    _spatial = 1


class NormalizedMaxPool2d(MaxPool, nn.MaxPool2d):
    r"""``nn.MaxPool2d`` with mean 0 and variance 1: :math:`(\max x - m_n)/s_n`.

    :math:`m_n, s_n` are the mean and std of the greatest of n normalised activations of Gaussians
    (:func:`max_constants`), n the elements that the window really has.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: As in torch;
            ``return_indices`` must be False.
        activation: What the input went through, as a layer takes it; None for a Gaussian itself. A
            learned one counts with the parameters it has when the pool is built (channels averaged).
        correlation: Between the activation's arguments in a window, in [0, 1). Near 0.9 for the
            pixels of an image.

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


class NormalizedMaxPool3d(MaxPool, nn.MaxPool3d):
    """``nn.MaxPool3d`` with mean 0 and variance 1, see :class:`NormalizedMaxPool2d`."""

    _spatial = 3


class AdaptiveMaxPool(nn.Module):
    """Adaptive max pools: the torch parent's constructor plus ``activation=`` and ``correlation=``."""

    output_size: Any
    _spatial: int

    def __init__(
        self,
        output_size: int | Sequence[int | None],
        *,
        activation: ActivationLike | None = "relu",
        correlation: float = 0.0,
    ) -> None:
        super().__init__(output_size)
        _check_correlation(correlation, ")")
        self.correlation = correlation
        self.activation = _activation_name(activation)
        self.values = _phi_values(activation)

    def forward(self, input: Tensor) -> Tensor:
        spatial = _spatial_dims(input, self._spatial)
        return _adaptive_max_pool(input, spatial, self.output_size, self.values, self.correlation)

    def constants_of(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``1/std`` and ``-mean/std`` of each window of a map of these sizes, float64; shape () if all are alike."""
        counts = _adaptive_products(sizes, per_axis(self.output_size, self._spatial))
        table = _max_table(self.values, counts, self.correlation)
        x = torch.ones((), dtype=torch.float64).expand(1, 1, *sizes)
        scale, shift = _by_count(x, self._spatial, _adaptive_counts, table, self.output_size)
        return (scale.view(-1)[0], shift.view(-1)[0]) if len(counts) == 1 else (scale, shift)

    def propagate(self, *signals: Signal, shapes: Shapes = None) -> Declared:
        """The standardised maximum's signal, and ``1/std^2``, of the largest window; needs ``shapes``."""
        (signal,) = signals
        count, mean, std = self.window(shapes)
        return _declare_max(signal, count, self.correlation, mean, std)

    def window(self, shapes: Shapes) -> tuple[int, float, float]:
        """How many elements the largest window has, and mean and std of their greatest; needs ``shapes``."""
        shape = _map_like(self, shapes).shape[-self._spatial :]
        count = _adaptive_products(shape, per_axis(self.output_size, self._spatial))[-1]
        return count, *_max_moments(self.values, (count,), self.correlation)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, correlation={self.correlation}"


class NormalizedAdaptiveMaxPool1d(AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """``nn.AdaptiveMaxPool1d`` with mean 0 and variance 1, see :class:`NormalizedAdaptiveMaxPool2d`."""

    _spatial = 1


class NormalizedAdaptiveMaxPool2d(AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
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


class NormalizedAdaptiveMaxPool3d(AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """``nn.AdaptiveMaxPool3d`` with mean 0 and variance 1, see :class:`NormalizedAdaptiveMaxPool2d`."""

    _spatial = 3
