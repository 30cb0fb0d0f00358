r"""Expectations of a scalar function of a Gaussian variable.

Everything is about :math:`u \sim N(\mu, \sigma^2)` and a function :math:`\varphi`: its mean
:math:`E[\varphi(u)]`, its variance and its mean squared slope :math:`E[\varphi'(u)^2]`. Closed
forms where they exist, else Gauss-Legendre quadrature split at the kinks (plain Gauss-Hermite
misses ReLU's mean by 1e-3). This file knows no layer and no activation by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

Phi = Callable[[Tensor], Tensor]

# Beyond 12 standard deviations the Gaussian density is below 1e-31.
REACH = 12.0
# Panel edges in standard deviations, and in units of u around the origin, where activations bend.
# With 20 nodes a panel, functions whose poles are no nearer to the real line than tanh's are
# integrated to float64 rounding. Those in standard deviations avoid 0, so that a kink at the mean
# keeps an edge of its own.
_STD_EDGES = (-REACH, *(float(t) for t in np.arange(-REACH + math.e, REACH, 3)), REACH)
_UNIT_EDGES = (-27.0, -9.0, -3.0, -1.0, 0.0, 1.0, 3.0, 9.0, 27.0)
_NODES, _WEIGHTS = (tuple(a.tolist()) for a in np.polynomial.legendre.leggauss(20))


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` on the device and in the dtype of ``like``, sent there once: a transfer waits for the GPU."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    # What is made in a transform, or of fake tensors, must not outlive it.
    passing = torch._C._functorch.peek_interpreter_stack() or torch._C._len_torch_dispatch_stack()
    make = _kept.__wrapped__ if passing else _kept
    return make(values, like.dtype, like.device)


@cache  # a CUDA graph may read it for ever
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def cdf(r: Tensor) -> Tensor:
    """Standard normal distribution function, accurate in both tails."""
    return 0.5 * torch.erfc(-r / math.sqrt(2))


def pdf(r: Tensor) -> Tensor:
    """Standard normal density."""
    return torch.exp(-0.5 * r * r) / math.sqrt(2 * math.pi)


def _location(mean: Tensor, std: Tensor) -> Tensor:
    """``mean / std``, finite where std is 0; past +-40 the Gaussian is all on one side."""
    return (mean / std.clamp_min(1e-12)).clamp(-40.0, 40.0)


# --- closed forms: (mean, std, parameters) -> (mean, var, slope) ----------------------------


def piecewise_linear(mean: Tensor, std: Tensor, negative: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moments of ``u`` for u > 0, ``negative * u`` for u < 0: ReLU, LeakyReLU, PReLU, abs.

    With :math:`r = \mu/\sigma` and :math:`M(r) = r\Phi(r) + \phi(r)`, the mean of
    :math:`\max(r + t, 0)`, its variance is :math:`\Phi(r) - M(r) M(-r)`; the two halves never
    overlap, so their covariance is :math:`-M(r)M(-r)`. No term cancels for large r.
    Derivation: docs/method.md, section 2.

    Args:
        mean: Any shape, mean of u.
        std: Broadcastable, standard deviation of u, at least 0.
        negative: Slope left of 0 (may be a tensor with gradients, as PReLU's).

    Returns:
        Mean, variance and mean squared slope.

    Example:
        >>> m, v, s = piecewise_linear(torch.tensor(0.0), torch.tensor(1.0), 0.0)
        >>> round(m.item(), 4), round(v.item(), 4), round(s.item(), 4)  # 1/sqrt(2 pi), (1-1/pi)/2, 1/2
        (0.3989, 0.3408, 0.5)
    """
    r = _location(mean, std)
    right, left, density = cdf(r), cdf(-r), pdf(r)
    upper, lower = r * right + density, density - r * left
    shared = upper * lower
    first = mean * right + std * density + negative * (mean * left - std * density)
    unit_var = right - shared + negative**2 * (left - shared) + 2 * negative * shared
    slope = right + negative**2 * left
    return first, std**2 * unit_var, slope


def identity(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of u itself."""
    mean, std = torch.broadcast_tensors(mean, std)
    return mean, std**2, torch.ones_like(std)


def exponential_linear(
    mean: Tensor, std: Tensor, alpha: float, length: float = 1.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moments of ``scale * u`` for u > 0, ``scale * alpha * (exp(u/length) - 1)`` else: ELU, SELU, CELU.

    Needs :math:`X_k = E[e^{ku/\ell}; u<0] = \tfrac12 e^{-r^2/2}\,\mathrm{erfcx}((r+k\sigma/\ell)/\sqrt2)`.
    Derivation: docs/method.md, section 2.

    Args:
        mean: Any shape, mean of u.
        std: Broadcastable, standard deviation of u, at least 0.
        alpha: Depth of the negative side.
        length: Decay length of the exponential, in units of u.
        scale: Factor on everything.

    Returns:
        Mean, variance and mean squared slope.
    """
    r = _location(mean, std)
    right, left = cdf(r), cdf(-r)
    relu_mean, relu_var, _ = piecewise_linear(mean, std, 0.0)

    def negative_exponential(k: float) -> Tensor:
        rate = k / length
        x = r + rate * std
        # erfcx overflows for negative x; there the plain product is safe, its exponent being negative.
        far = 0.5 * torch.exp(-0.5 * r * r) * torch.special.erfcx(x.clamp_min(0) / math.sqrt(2))
        near = torch.exp(torch.where(x > 0, 0.0, rate * (mean + 0.5 * rate * std**2))) * cdf(-x)
        return torch.where(x > 0, far, near)

    once, twice = negative_exponential(1), negative_exponential(2)
    tail_mean = alpha * (once - left)
    tail_var = alpha**2 * (right * left + twice - 2 * right * once - once**2)
    first = scale * (relu_mean + tail_mean)
    var = scale**2 * (relu_var + tail_var - 2 * relu_mean * tail_mean)
    slope = scale**2 * (right + (alpha / length) ** 2 * twice)
    return first, var.clamp_min(0), slope  # rounding, where std is 0


# --- quadrature ------------------------------------------------------------------------------


def nodes(mean: Tensor, std: Tensor, kinks: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    r"""Quadrature nodes u and weights for expectations under N(mean, std^2), split at the kinks.

    The panel edges move with mean and std, so that gradients of the sum are exact even where
    :math:`\varphi` or :math:`\varphi'` jumps at a kink (Leibniz' rule).

    Args:
        mean: Shape ``(...)``, float64 (float32 where the device has no more).
        std: Same shape, at least 0.
        kinks: Points of u where :math:`\varphi` is not smooth.

    Returns:
        ``u`` and ``weights``, shape ``(..., nodes)``; the weights sum to 1.

    Example:
        >>> u, w = nodes(torch.tensor(0.0), torch.tensor(1.0))
        >>> round((w * u**4).sum().item(), 6)  # the fourth moment of N(0, 1)
        3.0
    """
    mean, std = mean.unsqueeze(-1), std.unsqueeze(-1)
    safe = std.clamp_min(1e-6)
    bends = tuple(edge for edge in _UNIT_EDGES if edge not in kinks)
    points = [((_constant(bends, mean) - mean) / safe).detach()]
    if kinks:
        points.append((_constant(tuple(kinks), mean) - mean) / safe)
    bend = torch.cat(points, -1).clamp(-REACH, REACH)
    fixed = _constant(_STD_EDGES, mean).expand(*bend.shape[:-1], -1)
    edges = torch.cat([bend, fixed], -1).sort(-1).values
    half = (edges[..., 1:] - edges[..., :-1]) / 2
    middle = (edges[..., 1:] + edges[..., :-1]) / 2
    x, w = _constant(_NODES, mean), _constant(_WEIGHTS, mean)
    t = (middle.unsqueeze(-1) + half.unsqueeze(-1) * x).flatten(-2)
    weights = (half.unsqueeze(-1) * w).flatten(-2) * pdf(t)
    return mean + std * t, weights


def quadrature_mean_var(
    phi: Phi, mean: Tensor, std: Tensor, kinks: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Mean and variance of phi(u), shape of ``mean``; the variance is centred, so it cannot cancel."""
    u, weights = nodes(mean, std, kinks)
    y = phi(u)
    first = (weights * y).sum(-1)
    return first, (weights * (y - first.unsqueeze(-1)) ** 2).sum(-1)


def quadrature_slope(phi: Phi, mean: Tensor, std: Tensor, kinks: Sequence[float] = ()) -> Tensor:
    """E[phi'(u)^2], shape of ``mean``; phi' by automatic differentiation."""
    keep_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        u, weights = nodes(mean, std, kinks)
        if not u.requires_grad:
            keep_graph = keep_graph and phi(u.clone()).requires_grad  # phi's own parameters
            u = u.detach().requires_grad_()
        y = phi(u.clone())  # an in-place function must not meet a leaf
        if not y.requires_grad:  # constant
            return torch.zeros_like(mean)
        (derivative,) = torch.autograd.grad(y.sum(), u, create_graph=keep_graph)
    result = (weights * derivative**2).sum(-1)
    return result if keep_graph else result.detach()


# --- where an unknown function bends ----------------------------------------------------------


def breakpoints(phi: Phi) -> tuple[float, ...]:
    """Points that split the integrals' interval so that each panel of ``phi`` is integrated accurately.

    Panels whose 20-point rule disagrees with its two halves are bisected. A panel that still
    disagrees at width 1e-7 holds a kink or a jump; the search then starts again from the kinks, so
    that only the few edges that are needed are left.

    Args:
        phi: Element-wise function of a float64 tensor.

    Returns:
        Sorted points strictly inside the interval: kinks, jumps and edges of sharp bends.

    Example:
        >>> [round(k, 6) for k in breakpoints(lambda u: (u - 0.3).abs())]
        [0.3]
    """
    first, *inner, last = _UNIT_EDGES
    # A kink on an edge of the search would go unseen, and its panel edge must move with it.
    shifted = [first, *(x + math.pi / 100 for x in (first, *inner)), last]
    found = _refine(phi, shifted, collect_kinks=True)
    kinks = {next((x for x in _UNIT_EDGES if abs(x - kink) < 1e-6), kink) for kink in found}
    edges = _refine(phi, sorted({*_UNIT_EDGES, *kinks}), collect_kinks=False)
    return tuple(sorted({*kinks, *edges}))


def _refine(phi: Phi, edges: list[float], collect_kinks: bool) -> list[float]:
    """Bisect until each panel agrees with its halves; return the kinks, or the edges that were added."""
    low = torch.tensor(edges[:-1], dtype=torch.float64, device="cpu")
    high = torch.tensor(edges[1:], dtype=torch.float64, device="cpu")
    kinks: list[float] = []
    added: list[float] = []
    # A kink in a panel of width h errs by h^2: only a tolerance near rounding follows it to 1e-7.
    tolerance = 1e-13 if collect_kinks else 1e-11

    def panel(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, w = _constant(_NODES, a), _constant(_WEIGHTS, a)
        y = phi(((a + b) / 2).unsqueeze(-1) + ((b - a) / 2).unsqueeze(-1) * x)
        return (y * w).sum(-1) * (b - a) / 2, y.abs().amax(-1)

    with torch.no_grad():
        while low.numel() and low.numel() + len(added) < 4096:
            # Off the centre, where a jump would hide behind the symmetry of the nodes.
            middle = low + 0.382 * (high - low)
            whole, size = panel(low, high)
            halves = panel(low, middle)[0] + panel(middle, high)[0]
            width = high - low
            bad = (whole - halves).abs() > tolerance * size.clamp_min(1e-3) * width
            tiny = width < 1e-7
            if collect_kinks:
                kinks += middle[bad & tiny].tolist()
            split = bad & ~tiny
            low, middle, high = low[split], middle[split], high[split]
            added += middle.tolist()
            low, high = torch.cat([low, middle]), torch.cat([middle, high])
    if not collect_kinks:
        return added
    # Around one kink several tiny panels may disagree: they count once.
    merged: list[float] = []
    for kink in sorted(kinks):
        if not merged or kink - merged[-1] > 1e-6:
            merged.append(kink)
    # Hundreds of kinks are rounding noise of a function that computes in low precision.
    return merged if len(merged) <= 64 else []
