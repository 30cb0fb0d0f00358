"""The data end: what is normalised once, before the first layer (paper, sec. 4.1 and 4.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from torch.utils.data import Dataset, IterableDataset


def first_tensor(batch: Any) -> Tensor:
    """The batch's data: itself if it is a tensor, else the first tensor in a tuple, list or dict.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(batch, Tensor):
        return batch
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = batch
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise TypeError(f"a batch must be a tensor, or a tuple or dict with one, got {type(batch).__name__}")


def _in_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Samples in parts that fit into memory as float64; none if there are none."""
    return x.split(max(1, 2**22 // max(1, x[:1].numel()))) if len(x) else ()


class GlobalDataNorm(nn.Module):
    """Normalises data by the mean and standard deviation of the training set, per element or channel.

    Built by :meth:`fit`. Features that never changed come out as 0. The statistics stay in
    float64, whatever the module is cast to, so that a mean of 1e4 with a standard deviation of 1e-2
    loses nothing.

    Args:
        shape: Shape of the statistics, such as ``(3, 32, 32)`` or, per channel, ``(3, 1, 1)``.

    Attributes:
        mean: Shape ``shape``, float64.
        std: Shape ``shape``, float64, of the population (divided by n).
        count: How many values each statistic was made from.

    Shape:
        ``(N, *)`` to the same; integers become the default floating type.

    Example:
        >>> norm = GlobalDataNorm.fit(torch.tensor([[1.0], [3.0]]))
        >>> norm(torch.tensor([[3.0]]))
        tensor([[1.]])
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @classmethod
    def fit(cls, data: Any, per: str = "element") -> GlobalDataNorm:
        """One streamed pass over the data (Chan, Golub, LeVeque 1983: pairwise update of mean and M2).

        Args:
            data: A tensor ``(N, *)``, a DataLoader, or any iterable of batches ``(n, *)``; of a
                batch that is a tuple or dict the first tensor counts.
            per: ``"element"``: one statistic a feature (pixel and channel), as in the paper;
                ``"channel"``: one a channel, dim 1.

        Returns:
            The fitted module.

        Raises:
            ValueError: If there is no data, or it is not finite, or batches differ in shape.
            TypeError: If a batch holds no tensor of real numbers, or data does not come in batches.
        """
        if per not in ("element", "channel"):
            raise ValueError(f"per must be 'element' or 'channel', got {per!r}")
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise TypeError(
                "data must come in batches: wrap the Dataset, GlobalDataNorm.fit(DataLoader(dataset, batch_size=256))"
            )
        if not isinstance(data, (Tensor, Iterable)) or hasattr(data, "__array_interface__"):
            raise TypeError(
                f"data must be a tensor, a DataLoader or another iterable of batches, got {type(data).__name__}"
            )
        total: GlobalDataNorm | None = None
        for index, batch in enumerate([data] if isinstance(data, Tensor) else data):
            x = first_tensor(batch)
            if x.ndim < 2 or 0 in x.shape[1:]:
                raise ValueError(
                    f"batch {index} has shape {tuple(x.shape)} (its first tensor, if it is several), expected "
                    "(batch, features, ...)"
                )
            if x.is_complex():
                raise TypeError(f"batch {index} is {x.dtype}, expected real numbers")
            for some in _in_parts(x):
                part = cls._of_batch(some, per)
                if not (torch.isfinite(part.mean).all() and torch.isfinite(part.std).all()):
                    raise ValueError(f"batch {index} holds NaN or infinite values")
                total = part if total is None else total.merge(part)
        if total is None:
            raise ValueError("no data: expected at least one batch with at least one sample")
        return total

    @classmethod
    def _of_batch(cls, x: Tensor, per: str) -> GlobalDataNorm:
        x = x.detach().to(torch.float64)
        dims = (0,) if per == "element" else (0, *range(2, x.ndim))
        shape = x.shape[1:] if per == "element" else (x.shape[1], *[1] * (x.ndim - 2))
        part = cls(shape).to(x.device)
        var, mean = torch.var_mean(x, dims, correction=0)
        part.mean.copy_(mean.view(shape))
        part.std.copy_(part._clean(var.sqrt().view(shape), part.mean))
        part.count.fill_(x.numel() // part.mean.numel())
        return part

    @staticmethod
    def _clean(std: Tensor, mean: Tensor) -> Tensor:
        """0 for features whose spread is float64 rounding."""
        return torch.where(std > 1e-12 * mean.abs(), std, 0.0)

    def merge(self, other: GlobalDataNorm) -> GlobalDataNorm:
        """The statistics of both data sets together, as a new module; neither is changed.

        Federated clients or workers fit their own part and merge.

        Raises:
            ValueError: If the shapes differ.
            TypeError: If ``other`` is no GlobalDataNorm.
        """
        if not isinstance(other, GlobalDataNorm):
            raise TypeError(f"other must be a GlobalDataNorm, as fit makes it, got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge statistics of shape {tuple(other.mean.shape)} into "
                f"{tuple(self.mean.shape)}; for images of different sizes use per='channel'"
            )
        count = self.count + other.count
        result = type(self)(self.mean.shape).to(self.mean.device)
        share = other.count / count.clamp_min(1).double()
        delta = other.mean.to(self.mean) - self.mean
        var = (1 - share) * self.std**2 + share * other.std.to(self.std) ** 2
        var = var + share * (1 - share) * delta**2
        result.mean.copy_(self.mean + share * delta)
        result.std.copy_(self._clean(var.sqrt(), result.mean))
        result.count.copy_(count)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalDataNorm:
        """Follow ``.to(device)``, but keep float64 through ``.half()``, ``.to(dtype)``."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @property
    def divisor(self) -> Tensor:
        """The std; infinite where it is 0, so that 0 comes out of any finite number."""
        return torch.where(self.std > 0, self.std, math.inf)

    def forward(self, input: Tensor) -> Tensor:
        try:
            fits = torch.broadcast_shapes(input.shape[1:], self.mean.shape) == input.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"expected (N, {', '.join(map(str, self.mean.shape))}) as at fit (1 for any size), got "
                f"{tuple(input.shape)}"
            )
        dtype = input.dtype if input.is_floating_point() else torch.get_default_dtype()
        std = self.divisor
        # Booleans cannot be subtracted.
        x = input.to(dtype) if input.dtype == torch.bool else input
        return ((x - self.mean) / std).to(dtype)

    def extra_repr(self) -> str:
        count = "meta" if self.count.is_meta else self.count.item()
        return f"{tuple(self.mean.shape)}, count={count}"


class WhiteningDataNorm(nn.Module):
    """Takes mean, spread and most of the correlation out of data, by filters fitted once.

    NormProp's formulas assume inputs of covariance I. The paper (sec. 4.1) calls whitening the ideal and
    normalises each element instead, which is cheaper; with one zero-phase (ZCA) filter a channel for all
    positions whitening is cheap too, at any image size. Derivation: docs/method.md, section 8.

    Args:
        channels: Of the data, dim 1.
        kernel_size: Of the filters, an odd number for each spatial dimension; ``()`` for ``(N, C)``.

    Attributes:
        norm: The :class:`GlobalDataNorm` per channel that comes first.
        weight: The filters, shape ``(channels, channels, *kernel_size)``.

    Shape:
        ``(N, channels, *)`` to the same. Borders are mirrored.

    Example:
        >>> x = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]])
        >>> torch.allclose(WhiteningDataNorm.fit(x, eps=0.0)(x).T.cov(), torch.eye(2), atol=1e-2)
        True
    """

    weight: Tensor

    def __init__(self, channels: int, kernel_size: Sequence[int] = ()) -> None:
        super().__init__()
        self.norm = GlobalDataNorm((channels, *[1] * len(kernel_size)))
        self.register_buffer("weight", torch.zeros(channels, channels, *kernel_size))

    @classmethod
    def fit(cls, data: Any, kernel_size: int = 9, eps: float = 0.1) -> WhiteningDataNorm:
        """Three passes over the data: mean and std of each channel, correlations, std of what comes out.

        Args:
            data: As for :meth:`GlobalDataNorm.fit`, but nothing that can be read only once. A few
                thousand images are enough.
            kernel_size: Of the filters on each spatial axis, odd; less where the data is smaller.
            eps: Added to the variance of every direction, 1 being the average one. Directions with less
                variance are mostly noise, and are not blown up to 1.

        Returns:
            The fitted module.

        Raises:
            ValueError: As :meth:`GlobalDataNorm.fit`; if ``data`` can be read only once, ``kernel_size`` is
                even or ``eps`` negative.
            TypeError: As :meth:`GlobalDataNorm.fit`.
        """
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be a number of at least 0, got {eps}")
        if isinstance(data, Iterator):
            raise ValueError(
                f"data is read three times, and a {type(data).__name__} can be read only once; pass a tensor, "
                "a DataLoader or a list"
            )
        norm = GlobalDataNorm.fit(data, per="channel")
        reach: list[int] = []
        sums = counts = torch.zeros(())
        batches = [data] if isinstance(data, Tensor) else data
        for batch in batches:
            x = first_tensor(batch).detach()
            for part in _in_parts(x):
                part = norm(part.double())
                part = part if part.ndim > 2 else part.unsqueeze(-1)
                reach = reach or [min(kernel_size, size - 1 + size % 2) - 1 for size in part.shape[2:]]
                if any(size <= lag for size, lag in zip(part.shape[2:], reach, strict=True)):
                    raise ValueError(
                        f"data of one size, or a smaller kernel_size, expected: filters for the first batch do not "
                        f"fit {tuple(x.shape)}"
                    )
                products = _products_at_lags(part, reach)
                sums, counts = sums + products[0], counts + products[1]
        weight = _whitening_filters(sums / counts.clamp_min(1), eps)
        weight = weight if norm.mean.ndim > 1 else weight.squeeze(-1)
        result = cls(len(weight), weight.shape[2:]).to(weight.device)
        result.norm = norm
        result.weight.copy_(weight)
        out = GlobalDataNorm.fit((result(first_tensor(batch)) for batch in batches), per="channel")
        alive = out.std > 1e-6  # 1 where there is anything, rounding where not
        result.weight.div_(torch.where(alive, out.std, 1.0).view(-1, *[1] * (weight.ndim - 1)))
        return result

    @property
    def margins(self) -> list[int]:
        """By how much each border is mirrored, as ``torch.nn.functional.pad`` takes it."""
        return [size // 2 for size in reversed(self.weight.shape[2:]) for _ in range(2)]

    @property
    def operation(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The linear map or convolution that applies the filters."""
        return (F.linear, F.conv1d, F.conv2d, F.conv3d)[self.weight.ndim - 2]

    def forward(self, input: Tensor) -> Tensor:
        x = self.norm(input)
        least = [size // 2 + 1 for size in self.weight.shape[2:]]
        if any(size < wanted for size, wanted in zip(x.shape[2:], least, strict=True)):
            raise ValueError(
                f"expected at least {' x '.join(map(str, least))} positions, half the filters' kernel_size, got "
                f"{tuple(input.shape)}; fit with a smaller kernel_size"
            )
        padded = F.pad(x, self.margins, mode="reflect") if self.margins else x
        return self.operation(padded, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}"


def _products_at_lags(x: Tensor, reach: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sums over n and p of ``x[n, a, p] * x[n, b, p + lag]``, and of how many, for lags from -reach to reach.

    By the discrete Fourier transform, with as many zeros behind the map as keep it from wrapping around.

    Returns:
        Shapes ``(C, C, *lags)`` and ``lags``, lag 0 in the middle.
    """
    dims = tuple(range(2, x.ndim))
    padded = [size + far for size, far in zip(x.shape[2:], reach, strict=True)]
    spectrum = torch.fft.rfftn(x, padded, dims)
    sums = torch.fft.irfftn(torch.einsum("na...,nb...->ab...", spectrum.conj(), spectrum), padded, dims)
    counts = torch.tensor(float(len(x)), dtype=x.dtype, device=x.device)
    for dim, size, far in zip(dims, x.shape[2:], reach, strict=True):
        sums = sums.roll(far, dim).narrow(dim, 0, 2 * far + 1)
        lag = torch.arange(-far, far + 1, device=x.device)
        counts = counts[..., None] * (size - lag.abs()).clamp_min(0)
    return sums, counts


def _whitening_filters(correlation: Tensor, eps: float) -> Tensor:
    """For each channel the row of (T + eps I)^(-1/2) at the patch's centre, T the correlation of patches.

    Args:
        correlation: Shape ``(C, C, *lags)``.
        eps: What is added to T's eigenvalues.

    Returns:
        Shape ``(C, C, *kernel)``, kernel = (lags + 1) / 2.
    """
    channels = len(correlation)
    kernel = [(lags + 1) // 2 for lags in correlation.shape[2:]]
    axes = torch.meshgrid([torch.arange(size) for size in kernel], indexing="ij")
    place = torch.stack(axes, -1).view(-1, len(kernel))
    lag = place[None, :] - place[:, None] + torch.tensor(kernel) - 1
    where: tuple[Any, ...] = (slice(None), slice(None), *lag.unbind(-1))
    patches = correlation[where]  # channel, channel, place, place
    matrix = patches.transpose(1, 2).reshape(channels * len(place), channels * len(place))
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0) + eps
    scale = torch.where(values > 1e-9, values.rsqrt(), 0.0)
    rows = ((vectors * scale) @ vectors.T).view(channels, len(place), -1)[:, len(place) // 2]
    return rows.reshape(channels, channels, *kernel)


class BatchDataNorm(nn.Module):
    """Normalises the INPUT batch per element; a running estimate serves for eval (the paper's second choice).

    The only layer of this library that looks across the batch: it acts as a regulariser. Hidden
    layers never do.

    Args:
        shape: Shape of one sample, such as ``(3, 32, 32)``.
        momentum: Share of the newest batch in the running estimate.
        device: Of the running estimate.
        dtype: Of the running estimate.

    Shape:
        ``(N, *shape)`` to the same. 1e-8 is added to the variance, so that elements with a standard
        deviation of 1e-3 and less come out smaller than 1.

    Raises:
        ValueError: For a momentum outside [0, 1]; in training with a batch of 1 (:class:`GlobalDataNorm` has no
            such limit).

    Example:
        >>> BatchDataNorm((1,))(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        momentum: float = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        features = torch.Size(self.shape).numel()
        self.register_buffer("running_mean", torch.zeros(features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[1:] != self.shape:
            raise ValueError(
                f"expected shape (N, {', '.join(map(str, self.shape))}), got {tuple(input.shape)}"
            )
        if self.training and input.shape[0] == 1:
            raise ValueError(
                "BatchDataNorm cannot train on a batch of 1: one sample has no spread; "
                "use normprop.GlobalDataNorm.fit(data)"
            )
        own = self.running_mean.dtype
        x = input if input.is_floating_point() else input.to(own)
        wide = x.dtype if x.dtype == torch.float64 else own  # of float64, not a digit is lost
        running = self.running_mean.to(wide), self.running_var.to(wide)
        y = F.batch_norm(x.flatten(1), *running, training=self.training, momentum=self.momentum, eps=1e-8)
        if self.training and wide != own:
            self.running_mean.copy_(running[0])
            self.running_var.copy_(running[1])
        return y.view_as(x)

    def extra_repr(self) -> str:
        return f"{self.shape}, momentum={self.momentum}"


DATA_NORMS = (GlobalDataNorm, WhiteningDataNorm, BatchDataNorm)
