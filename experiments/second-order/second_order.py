r"""Second-order Normalization Propagation: covariances of a network's maps, from parameters alone.

The paper takes a layer's inputs to be uncorrelated, so that a unit row gives variance 1 (Arpit et al.,
ICML 2016, eq. 9). Here their covariance is propagated, as channels times lags (:class:`Field`), and each
unit is divided by the standard deviation that follows from it:

.. math:: o_i = \frac{\varphi(g_i\,(w_i * x - m_i)/s_i + b_i) - \text{mean}}{\text{std}}, \qquad
    s_i^2 = \sum_{a, b} M_{ab}\,\rho(b - a)\, w_i(a)^T C\, w_i(b)

with unit rows w, taps a and b, and M the share of positions where both taps lie inside the map.
An activation maps correlations by its Hermite coefficients (:func:`mehler`). The moments m and s are
buffers that the optimizer's hook alone changes; to backward they are constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normprop import NormPropConv2d, activations, functional, gaussian

LAG = 15  # lags -LAG .. LAG are kept; beyond, the last one
TERMS = 8  # of the Hermite series; the variance that it leaves counts as one more
FLOOR = 0.02  # the least s: a row that meets next to no signal is blown up no further
IMAGES = 2000  # the most that the data's covariance is taken from
DRAWS = 16384  # fixed Gaussian windows: moments of a maximum within about 1 %


def hermite_polynomials(x: Tensor, count: int) -> Tensor:
    r""":math:`He_k(x)/\sqrt{k!}` for k = 0 .. count - 1, orthonormal under N(0, 1); ``(count, *x.shape)``."""
    found = [torch.ones_like(x), x]
    for k in range(2, count):
        found.append((x * found[-1] - math.sqrt(k - 1) * found[-2]) / math.sqrt(k))
    return torch.stack(found[:count])


def hermite_coefficients(activation: nn.Module, gain: Tensor, bias: Tensor, terms: int = TERMS) -> Tensor:
    r"""Coefficients of an activation in normalised Hermite polynomials.

    .. math:: h_k = E[\varphi(g z + b)\, He_k(z)]/\sqrt{k!}, \quad z \sim N(0, 1)

    Where :math:`\varphi` is linear on both sides of 0, with slopes a and 1, :math:`\varphi''` is a delta,
    and partial integration leaves :math:`(1 - a)\, |g|\, p(b/g)\, He_{k-2}(-b/g)/\sqrt{k!}` for k > 1; at
    b = 0 this is the series of the arc-cosine kernel (Cho & Saul, NeurIPS 2009). Others by quadrature.

    Args:
        activation: What ``normprop.activations.as_module`` returns, without parameters.
        gain: Shape ``(n,)``.
        bias: Shape ``(n,)``.
        terms: The last k, at least 2.

    Returns:
        k = 1 .. terms, shape ``(terms, n)``.
    """
    size, sign = gain.abs().clamp_min(1e-6), gain.sign()
    slope = activations.negative_slope(activation)
    if slope is None:
        u, weights = gaussian.nodes(bias.double(), size.double())
        z = (u - bias[:, None]) / size[:, None] * sign[:, None]
        return (hermite_polynomials(z, terms + 1)[1:] * activation(u) * weights).sum(-1).to(gain.dtype)
    r = (bias / size).clamp(-40, 40)
    k = torch.arange(2, terms + 1, device=gain.device, dtype=gain.dtype)[:, None]
    bend = (1 - slope) * size * gaussian.pdf(r)
    higher = bend * hermite_polynomials(-r * sign, terms - 1) / (k * (k - 1)).sqrt()
    return torch.cat([(gain * (slope + (1 - slope) * gaussian.cdf(r)))[None], higher])


def mehler(products: Tensor, correlation: Tensor) -> Tensor:
    r"""Covariance of functions of two Gaussians of variance 1, from their Hermite coefficients.

    .. math:: \mathrm{Cov}(f(x), g(y)) = \sum_{k \ge 1} f_k\, g_k\, r^k

    Source: Mehler's formula; e.g. Daniely et al. (NeurIPS 2016), arXiv 1602.05897, the dual activation.

    Args:
        products: Of the coefficients, k = 1, 2, ..., along dim 0.
        correlation: Shape that each product broadcasts to.
    """
    result = torch.zeros_like(correlation)
    for product in products.flip(0):
        result = (result + product) * correlation
    return result


@dataclass(frozen=True)
class Field:
    r"""Second-order description of a map: :math:`\mathrm{Cov}(x_c(p), x_d(p + t)) = C_{cd}\,\rho(t)`.

    Attributes:
        mean: Shape ``(c,)``.
        covariance: C, shape ``(c, c)``.
        lag: ρ, shape ``(2 LAG + 1, 2 LAG + 1)``, 1 in the middle.
        size: Height and width.
        patch: Covariance of the patches that the first layer sees, in the order of its weight.
        before: The layer that made the map, and ρ of its pre-activations, for a maximum that follows.
    """

    mean: Tensor
    covariance: Tensor
    lag: Tensor
    size: int
    patch: Tensor | None = None
    before: tuple[NormPropConv2d, Tensor] | None = None


@torch.no_grad()
def data_field(images: Tensor, first: NormPropConv2d) -> Field:
    """The field of images ``(N, C, S, S)``, with the covariance of the patches that ``first`` sees."""
    x, size = images[:IMAGES], images.shape[-1]
    if x.shape[-2] != size:
        raise ValueError(f"images must be square, got {tuple(images.shape)}")
    mean = x.mean((0, 2, 3))
    total, square, count = 0.0, 0.0, 0
    for part in x.split(100):
        rows = (
            F.unfold(part, first.kernel_size, padding=first.padding).transpose(1, 2).flatten(0, 1).double()
        )
        total, square, count = total + rows.sum(0), square + rows.T @ rows, count + len(rows)
    patch = square / count - torch.outer(total / count, total / count)  # type: ignore[arg-type]
    centred = x[:500] - mean[:, None, None]
    wide = [2 * max(size, LAG + 1)] * 2
    power = torch.fft.rfft2(centred, s=wide).abs().square().mean((0, 1))
    pairs = torch.fft.rfft2(x.new_ones(size, size), s=wide).abs().square()
    lag = torch.fft.irfft2(power, s=wide) / torch.fft.irfft2(pairs, s=wide).clamp_min(0.5)
    middle = torch.arange(-LAG, LAG + 1)
    lag = lag[middle][:, middle]
    covariance = torch.einsum("nchw,ndhw->cd", centred, centred) * x.shape[1] / centred.numel()
    return Field(mean, covariance, (lag / lag[LAG, LAG]).clamp(-1, 1), size, patch.to(x.dtype))


def _offsets(kernel: int) -> Tensor:
    """From each tap of a window to each other, shape ``(k^2, k^2, 2)``."""
    taps = torch.cartesian_prod(torch.arange(kernel), torch.arange(kernel))
    return taps[None] - taps[:, None]


def _window(lag: Tensor, kernel: int) -> Tensor:
    """Correlation of every two positions of a window."""
    return lag[tuple((_offsets(kernel) + LAG).unbind(-1))]


def _correlate(lag: Tensor, filters: Tensor) -> Tensor:
    """``sum_t filters[i, t] lag(. + t)``, filters of odd size."""
    reach = filters.shape[-1] // 2
    return F.conv2d(F.pad(lag[None, None], [reach] * 4, mode="replicate"), filters[:, None])[0]


def _constants(layer: NormPropConv2d) -> tuple[Tensor, Tensor]:
    """What the layer subtracts and divides by after the activation, shapes ``(out,)``."""
    pair = functional.constants(layer.activation, layer.rule, layer.gain, layer.bias, layer.standard)
    c, d = (torch.as_tensor(v, dtype=layer.gain.dtype, device=layer.gain.device) for v in pair)
    return c.expand_as(layer.gain), d.expand_as(layer.gain)


def convolve(layer: NormPropConv2d, field: Field) -> tuple[Tensor, Tensor, Field]:
    """Mean m and standard deviation s of each unit's ``w * x``, and the field of the layer's output.

    Args:
        layer: See :func:`propagate`.
        field: Of its input.
    """
    rows = functional.scaled_weight(layer.weight, torch.ones_like(layer.gain), centered=layer.rule.centered)
    out, channels, kernel, _ = rows.shape
    padding, taps = int(layer.padding[0]), rows.permute(0, 2, 3, 1).reshape(out, -1, channels)
    inside = F.unfold(rows.new_ones(1, 1, field.size, field.size), kernel, padding=padding)[0]
    both = inside @ inside.T / inside.shape[1]
    mean = (taps @ field.mean * both.diagonal()).sum(1)
    mixed = taps @ field.covariance
    if field.patch is not None:
        z_cov = rows.flatten(1) @ field.patch @ rows.flatten(1).T
    else:
        seen = torch.einsum("oac,ab->obc", mixed, _window(field.lag, kernel) * both)
        z_cov = seen.flatten(1) @ taps.flatten(1).T
    std = z_cov.diagonal().clamp_min(FLOOR**2).sqrt()
    z_corr = (z_cov / (std[:, None] * std)).clamp(-1, 1)
    # Over lags each unit has a correlation of its own, by the autocorrelation of its filter.
    wide = 2 * kernel - 1
    at = ((_offsets(kernel) + kernel - 1) @ torch.tensor([wide, 1])).flatten().to(rows.device)
    pairs = torch.einsum("oac,obc->oab", mixed, taps).flatten(1)
    z_lag = _correlate(
        field.lag, rows.new_zeros(out, wide**2).index_add_(1, at, pairs).view(out, wide, wide)
    )
    z_lag = (z_lag / z_lag[:, LAG, LAG].clamp_min(1e-8)[:, None, None]).clamp(-1, 1)

    bias = torch.zeros_like(layer.gain) if layer.bias is None else layer.bias
    y_mean, y_var = activations.mean_var(layer.activation, bias, layer.gain)
    h = hermite_coefficients(layer.activation, layer.gain, bias)
    h = torch.cat([h, (y_var - h.square().sum(0)).clamp_min(0).sqrt()[None]])
    c, d = _constants(layer)
    h = h / d
    lag = mehler(h.square()[:, :, None, None], z_lag).sum(0)
    size = field.size + 2 * padding - kernel + 1
    after = Field(
        (y_mean - c) / d,
        mehler(h[:, :, None] * h[:, None], z_corr),
        (lag / lag[LAG, LAG].clamp_min(1e-12)).clamp(-1, 1),
        size,
        before=(layer, z_lag.mean(0)),
    )
    return mean, std, after


def average(field: Field, kernel: int, stride: int, padding: int) -> Field:
    """The field of a window's average; that padding lowers the variance at the edge is neglected."""
    ramp = kernel - torch.arange(1 - kernel, kernel, device=field.lag.device).abs().to(field.lag.dtype)
    lag = _correlate(field.lag, torch.outer(ramp, ramp)[None])[0] / kernel**4
    factor = lag[LAG, LAG]
    steps = (torch.arange(-LAG, LAG + 1) * stride).clamp(-LAG, LAG) + LAG
    size = (field.size + 2 * padding - kernel) // stride + 1
    return Field(field.mean, field.covariance * factor, lag[steps][:, steps] / factor, size)


def maximum(field: Field, kernel: int, stride: int, padding: int) -> Field:
    """The field of a window's maximum after a monotone activation: moments by fixed Gaussian windows.

    Correlations between channels are taken to be those before, over lags those of the average.
    """
    if field.before is None:
        raise TypeError("second order: a maximum must come right after a NormPropConv2d")
    layer, z_lag = field.before
    values, vectors = torch.linalg.eigh(_window(z_lag, kernel))
    draws = torch.randn(DRAWS, kernel**2, generator=torch.Generator().manual_seed(0)).to(z_lag)
    z = draws @ (vectors * values.clamp_min(0).sqrt()).T
    gain = layer.gain[:, None]
    u = gain * torch.where(gain >= 0, z.amax(1), z.amin(1))
    y = layer.activation(u if layer.bias is None else u + layer.bias[:, None])
    c, d = _constants(layer)
    ratio = y.std(1) / d / field.covariance.diagonal().clamp_min(1e-8).sqrt()
    after = average(field, kernel, stride, padding)
    return replace(after, mean=(y.mean(1) - c) / d, covariance=field.covariance * ratio[:, None] * ratio)


def _window_size(place: str, layer: Any) -> tuple[int, int, int]:
    """(kernel, stride, padding) of a square window; raises for any other."""
    pairs = [
        v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride, layer.padding)
    ]
    plain = getattr(layer, "dilation", 1) in (1, (1, 1)) and getattr(layer, "groups", 1) == 1
    plain = plain and not getattr(layer, "ceil_mode", False)
    plain = plain and getattr(layer, "padding_mode", "zeros") == "zeros"
    if not plain or any(len(v) != 2 or v[0] != v[1] or isinstance(v[0], str) for v in pairs):
        raise TypeError(
            f"{place}: second order needs square windows without groups and dilation, got {layer}"
        )
    kernel, stride, padding = (int(v[0]) for v in pairs)
    return kernel, stride, padding


@torch.no_grad()
def propagate(net: Iterable[nn.Module], field: Field) -> list[tuple[Tensor, Tensor]]:
    """(m, s) of every ``NormPropConv2d`` up to the first without an activation, the output layer.

    Args:
        net: In order: convolutions of stride 1, maximum and average pools, zero padding before the latter.
        field: Of its input.

    Raises:
        TypeError: At anything else before the output layer.
    """
    found: list[tuple[Tensor, Tensor]] = []
    padded = 0
    for index, layer in enumerate(net):
        place = f"layer {index}"
        if isinstance(layer, nn.ZeroPad2d) and len(set(layer.padding)) == 1:
            padded += layer.padding[0]
            continue
        if isinstance(layer, NormPropConv2d):
            if layer.activation is None:
                break
            kernel, stride, _ = _window_size(place, layer)
            if (
                stride == 1
                and kernel <= LAG
                and not padded
                and not activations.is_learned(layer.activation)
            ):
                mean, std, field = convolve(layer, field)
                found.append((mean, std))
                continue
        elif isinstance(layer, nn.AvgPool2d):
            kernel, stride, padding = _window_size(place, layer)
            field, padded = average(field, kernel, stride, padding + padded), 0
            continue
        elif isinstance(layer, nn.MaxPool2d) and not padded:
            field = maximum(field, *_window_size(place, layer))
            continue
        raise TypeError(
            f"{place}: second order has no rule for {layer} here; it takes NormPropConv2d of stride 1 with a fixed "
            "activation, MaxPool2d, and AvgPool2d with or without ZeroPad2d before it"
        )
    return found


class SecondOrderConv2d(NormPropConv2d):
    """``NormPropConv2d`` that normalises ``w * x`` by ``z_mean`` and ``z_std``: buffers, shape ``(out,)``.

    Outside the library's promises: ``fuse``, ``fold``, ``scale_together`` and ``predict`` know nothing of it.
    """

    z_mean: Tensor
    z_std: Tensor

    def forward(self, input: Tensor) -> Tensor:
        scale = self.gain / self.z_std
        shift = -scale * self.z_mean if self.bias is None else self.bias - scale * self.z_mean
        c, d = _constants(self)
        slope = activations.negative_slope(self.activation)
        if slope is not None:  # phi(u)/d = phi(u/d): the constants go into the convolution
            scale, shift = scale / d, (shift - c) / d
        weight = functional.scaled_weight(self.weight, scale, centered=self.rule.centered)
        u = self._conv_forward(input, weight, shift.to(weight.dtype))
        if slope is not None:
            return functional.rectify(u, functional.along(-c / d, u, -3), slope)
        return functional.normalize_activation(u, self.activation, c, d, -3)


def attach_second_order(
    optimizer: torch.optim.Optimizer, net: nn.Sequential, images: Tensor, every: int = 20
) -> RemovableHandle:
    """Make a net second-order, in place, and refresh its moments now and after every 20th step.

    The output layer stays as it is: to pin the scale of the logits undoes what training does to it.

    Args:
        optimizer: Any torch optimizer; attach projections first.
        net: A sequence that :func:`propagate` knows, and any modules after its output layer.
        images: Training images as the net gets them, ``(N, C, S, S)``; some hundreds at least.
        every: Steps between refreshes.

    Returns:
        A handle; ``handle.remove()`` ends it, and leaves the last moments in the buffers.

    Raises:
        TypeError: If there is something in the net that :func:`propagate` does not know.
    """
    layers = [m for m in net if isinstance(m, NormPropConv2d) and m.activation is not None]
    if not layers or layers[0] is not net[0]:
        raise TypeError(
            f"second order needs a Sequential that begins with a NormPropConv2d, got {type(net).__name__}"
        )
    source = data_field(images, layers[0])
    moments = propagate(net, source)
    if len(moments) != len(layers):
        raise TypeError("second order: a convolution with an activation comes after one without")
    for layer in layers:
        layer.__class__ = SecondOrderConv2d
        layer.register_buffer("z_mean", torch.zeros_like(layer.gain.detach()))
        layer.register_buffer("z_std", torch.ones_like(layer.gain.detach()))

    def refresh() -> None:
        for layer, (mean, std) in zip(layers, propagate(net, source), strict=True):
            layer.z_mean.copy_(mean)
            layer.z_std.copy_(std)

    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            refresh()

    refresh()
    return optimizer.register_step_post_hook(step)
