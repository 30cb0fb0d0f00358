"""What stands between layers: against explicit windows, impulses, sampling and the paper's numbers."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import gradcheck

import normprop
from normprop import NormalizedActivation, activations, merges, pools
from normprop.merges import (
    NormalizedAdd,
    NormalizedCat,
    NormalizedDropout,
    NormalizedGate,
    RectifiedSum,
    ShiftedReLU,
    Standardize,
)
from normprop.pools import (
    NormalizedAdaptiveAvgPool1d,
    NormalizedAdaptiveAvgPool2d,
    NormalizedAdaptiveAvgPool3d,
    NormalizedAdaptiveMaxPool1d,
    NormalizedAdaptiveMaxPool2d,
    NormalizedAdaptiveMaxPool3d,
    NormalizedAvgPool1d,
    NormalizedAvgPool2d,
    NormalizedAvgPool3d,
    NormalizedMaxPool1d,
    NormalizedMaxPool2d,
    NormalizedMaxPool3d,
    NormalizedUpsample,
    max_constants,
)
from normprop.signal import Signal
from normprop.testing import assert_batch_independent, assert_train_equals_eval

MAX = (NormalizedMaxPool1d, NormalizedMaxPool2d, NormalizedMaxPool3d)
AVG = (NormalizedAvgPool1d, NormalizedAvgPool2d, NormalizedAvgPool3d)
ADAPTIVE_MAX = (NormalizedAdaptiveMaxPool1d, NormalizedAdaptiveMaxPool2d, NormalizedAdaptiveMaxPool3d)
ADAPTIVE_AVG = (NormalizedAdaptiveAvgPool1d, NormalizedAdaptiveAvgPool2d, NormalizedAdaptiveAvgPool3d)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def assert_moments(y, mean, std):
    """Mean and std within 5 standard errors; y's elements are independent."""
    y = y.double().flatten()
    centered = y - y.mean()
    var = centered.square().mean()
    mean_error = (var / y.numel()).sqrt()
    std_error = ((centered.pow(4).mean() - var**2) / (4 * var * y.numel())).sqrt()
    assert abs(y.mean() - mean) < 5 * mean_error
    assert abs(var.sqrt() - std) < 5 * std_error


# --- the constants of a maximum -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "mean", "std"),  # PAPER.md 1.7, six decimals
    [
        (2, 0.564190, 0.825645),
        (3, 0.846284, 0.747975),
        (4, 1.029375, 0.701224),
        (9, 1.485013, 0.597790),
        (16, 1.765991, 0.543148),
    ],
)
def test_max_of_gaussians_is_the_papers(count, mean, std):
    assert max_constants(count, None) == pytest.approx((mean, std), abs=1e-6)
    assert max_constants(count, "identity") == max_constants(count, None)
    grid = 17 / 8192  # the midpoint rule's error is of its square, in units of what is not shared
    for correlation in (0.3, 0.9, 0.99):  # sqrt(rho) z + sqrt(1 - rho) times the independent maximum
        shrunk = (
            math.sqrt(1 - correlation) * mean,
            math.sqrt(correlation + (1 - correlation) * std**2),
        )
        assert max_constants(count, None, correlation) == pytest.approx(
            shrunk, abs=1e-6 + grid**2 / 12 / (1 - correlation)
        )


@pytest.mark.parametrize(
    ("count", "correlation", "mean", "std"),  # PAPER.md 1.7, two decimals
    [
        (9, 0.5, 1.18, 1.30),
        (9, 0.8, 0.68, 1.28),
        (9, 0.9, 0.46, 1.23),
        (9, 0.95, 0.31, 1.17),
        (4, 0.5, 0.73, 1.24),
        (4, 0.8, 0.43, 1.20),
        (4, 0.9, 0.30, 1.16),
    ],
)
def test_max_of_relu_is_the_papers(count, correlation, mean, std):
    assert max_constants(count, "relu", correlation) == pytest.approx((mean, std), abs=0.0051)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize(
    "activation",
    [None, "relu", "silu", "tanh", "abs", nn.LeakyReLU(-0.5), nn.PReLU(), nn.PReLU(3), torch.sin],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_max_constants_agree_with_sampling(activation, correlation):
    count, n = 5, 300_000
    z, e = randn(n, 1), randn(count, n, seed=1).T
    u = math.sqrt(correlation) * z + math.sqrt(1 - correlation) * e
    phi = activations.as_module("identity" if activation is None else activation)
    moments = activations.moments(phi)
    mean, std = (float(torch.as_tensor(v).detach().mean()) for v in (moments.mean, moments.std))
    single = nn.PReLU() if isinstance(phi, nn.PReLU) else phi
    y = copy.deepcopy(single).double()(u.clone()).amax(1).detach()
    assert_moments((y - mean) / std, *max_constants(count, activation, correlation))


def test_one_element_has_nothing_to_correct():
    assert max_constants(1, "silu", 0.5) == (0.0, 1.0)


# --- pools against explicit windows -------------------------------------------------------------


def windows(length, out, kernel, stride, padding, dilation):
    """Positions of each window along an axis."""
    starts = [index * stride - padding for index in range(out)]
    return [[p for p in (s + t * dilation for t in range(kernel)) if 0 <= p < length] for s in starts]


def adaptive_windows(length, out):
    out = length if out is None else out
    return [list(range(i * length // out, math.ceil((i + 1) * length / out))) for i in range(out)]


def by_loops(x, axes, rule):
    """``rule(elements)`` over each window of each map; axes: windows along each axis."""
    spatial = len(axes)
    maps = x.reshape(-1, *x.shape[-spatial:])
    out = torch.empty(len(maps), *(len(axis) for axis in axes), dtype=x.dtype)
    for index in itertools.product(*(range(len(axis)) for axis in axes)):
        grid = torch.meshgrid(
            *(torch.tensor(axis[i]) for axis, i in zip(axes, index, strict=True)), indexing="ij"
        )
        out[(slice(None), *index)] = rule(maps[(slice(None), *grid)].flatten(1))
    return out.reshape(*x.shape[:-spatial], *out.shape[1:])


def greatest(activation, correlation):
    def rule(elements):
        mean, std = max_constants(elements.shape[1], activation, correlation)
        return (elements.amax(1) - mean) / std

    return rule


def average(correlation):
    return lambda elements: (
        elements.mean(1) / math.sqrt(correlation + (1 - correlation) / elements.shape[1])
    )


# Input's spatial shape; kernel, stride, padding, dilation, ceil_mode.
POOLS = [
    ((11,), 3, 2, 1, 1, False),
    ((12,), 4, 3, 0, 1, True),
    ((12,), 3, 2, 1, 2, True),
    ((7, 10), 2, None, 0, 1, False),
    ((7, 10), 3, 2, 1, 1, False),
    ((8, 5), 3, 2, 0, 1, True),
    ((9, 8), (3, 2), (1, 2), (1, 0), 1, False),
    ((9, 8), (3, 2), (2, 3), (1, 1), (2, 1), True),
    ((1, 1), 3, 2, 1, 1, False),
    ((5, 6, 4), 2, None, 0, 1, False),
    ((5, 6, 4), 3, 2, 1, 1, True),
]
every_pool = pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "ceil_mode"), POOLS, ids=str
)


def axes_of(shape, out, *arguments):
    spatial = len(shape)
    per_axis = (a if isinstance(a, tuple) else (a,) * spatial for a in arguments)
    return [windows(*axis) for axis in zip(shape, out, *per_axis, strict=True)]


@every_pool
@pytest.mark.parametrize(("activation", "correlation"), [("relu", 0.0), (None, 0.7)])
def test_max_pool_is_exact_in_every_window(
    shape, kernel, stride, padding, dilation, ceil_mode, activation, correlation
):
    x = randn(2, 3, *shape)
    pool = MAX[len(shape) - 1](
        kernel, stride, padding, dilation, False, ceil_mode, activation=activation, correlation=correlation
    )
    y = pool(x)
    plain = getattr(F, f"max_pool{len(shape)}d")(x, kernel, stride, padding, dilation, ceil_mode)
    assert y.shape == plain.shape
    axes = axes_of(shape, y.shape[2:], kernel, stride or kernel, padding, dilation)
    torch.testing.assert_close(y, by_loops(x, axes, greatest(activation, correlation)))
    torch.testing.assert_close(pool(x[0]), y[0])
    stateless = pools.normalized_max_pool(
        x, kernel, stride, padding, dilation, ceil_mode, activation, correlation
    )
    torch.testing.assert_close(stateless, y, rtol=0, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "ceil_mode"), [(*p[:4], p[5]) for p in POOLS if p[4] == 1]
)
def test_avg_pool_is_exact_in_every_window(shape, kernel, stride, padding, ceil_mode, correlation):
    x = randn(2, 3, *shape)
    pool = AVG[len(shape) - 1](kernel, stride, padding, ceil_mode, correlation=correlation)
    y = pool(x)
    plain = getattr(F, f"avg_pool{len(shape)}d")(x, kernel, stride, padding, ceil_mode)
    assert y.shape == plain.shape
    axes = axes_of(shape, y.shape[2:], kernel, stride or kernel, padding, 1)
    torch.testing.assert_close(y, by_loops(x, axes, average(correlation)))
    torch.testing.assert_close(pool(x[0]), y[0])
    stateless = pools.normalized_avg_pool(x, kernel, stride, padding, ceil_mode, correlation)
    torch.testing.assert_close(stateless, y, rtol=0, atol=0)


def test_what_torch_divides_by_cancels():
    x = randn(2, 3, 9, 9)
    expected = NormalizedAvgPool2d(3, 2, 1)(x)
    for arguments in ((3, 2, 1, False, False), (3, 2, 1, False, True, 7)):
        torch.testing.assert_close(NormalizedAvgPool2d(*arguments)(x), expected, rtol=0, atol=0)


ADAPTIVE = [
    ((11,), 1),
    ((11,), 4),
    ((7, 10), 1),
    ((7, 10), (3, 4)),
    ((7, 10), (None, 2)),
    ((2, 3), 5),  # windows overlap where the output is larger
    ((5, 6, 4), 1),
    ((5, 6, 4), (2, 3, 4)),
]


@pytest.mark.parametrize(("shape", "output_size"), ADAPTIVE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_adaptive_pools_are_exact_in_every_window(shape, output_size):
    x = randn(2, 3, *shape)
    spatial = len(shape)
    sizes = output_size if isinstance(output_size, tuple) else (output_size,) * spatial
    axes = [adaptive_windows(*axis) for axis in zip(shape, sizes, strict=True)]
    for correlation in (0.0, 0.6):
        pool = ADAPTIVE_AVG[spatial - 1](output_size, correlation=correlation)
        torch.testing.assert_close(pool(x), by_loops(x, axes, average(correlation)))
        torch.testing.assert_close(pool(x[0]), pool(x)[0])
        stateless = pools.normalized_adaptive_avg_pool(x, output_size, correlation)
        torch.testing.assert_close(stateless, pool(x), rtol=0, atol=0)
        pool = ADAPTIVE_MAX[spatial - 1](output_size, activation="silu", correlation=correlation)
        torch.testing.assert_close(pool(x), by_loops(x, axes, greatest("silu", correlation)))
        torch.testing.assert_close(pool(x[0]), pool(x)[0])
        stateless = pools.normalized_adaptive_max_pool(x, output_size, "silu", correlation)
        torch.testing.assert_close(stateless, pool(x), rtol=0, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_padded_max_pool_has_mean_0_and_variance_1_at_every_position(correlation):
    n = 40_000
    u = math.sqrt(correlation) * randn(n, 1, 1) + math.sqrt(1 - correlation) * randn(n, 5, 5, seed=1)
    moments = activations.moments("gelu")
    x = (F.gelu(u) - moments.mean) / moments.std
    y = NormalizedMaxPool2d(3, 2, 1, activation="gelu", correlation=correlation)(x.unsqueeze(1))
    for i, j in itertools.product(range(3), repeat=2):
        assert_moments(y[:, 0, i, j], 0.0, 1.0)


def test_a_learned_activation_counts_with_its_value_at_construction():
    phi = nn.PReLU(init=0.1)
    pool = NormalizedMaxPool2d(2, activation=phi)
    assert pool.table == NormalizedMaxPool2d(2, activation=nn.LeakyReLU(phi.weight.item())).table
    assert not pool.state_dict()
    assert "activation=prelu" in repr(pool)


# --- upsampling against impulses ----------------------------------------------------------------

UPSAMPLES = [
    ((7,), {"scale_factor": 2, "mode": "linear"}),
    ((7,), {"size": 5, "mode": "linear"}),
    ((1,), {"size": 4, "mode": "linear"}),
    ((5, 4), {"scale_factor": 2, "mode": "bilinear"}),
    ((5, 4), {"scale_factor": (2.5, 1.3), "mode": "bilinear"}),
    ((5, 4), {"size": (9, 3), "mode": "bilinear", "align_corners": True}),
    ((5, 6), {"scale_factor": 2, "mode": "bicubic"}),
    ((5, 6), {"size": (4, 11), "mode": "bicubic", "align_corners": True}),
    ((3, 4, 5), {"scale_factor": 2, "mode": "trilinear"}),
    ((5, 4), {"scale_factor": 3}),
    ((5, 4), {"size": (7, 9), "mode": "nearest-exact"}),
]


@pytest.mark.parametrize(("shape", "arguments"), UPSAMPLES, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_upsample_divides_by_the_root_of_the_variance(shape, arguments, correlation):
    count = math.prod(shape)
    weights = F.interpolate(torch.eye(count, dtype=torch.float64).view(count, 1, *shape), **arguments)
    var = correlation * weights.sum(0).square() + (1 - correlation) * weights.square().sum(0)
    x = randn(2, 3, *shape)
    expected = F.interpolate(x, **arguments) / var.sqrt()
    layer = NormalizedUpsample(**arguments, correlation=correlation)
    torch.testing.assert_close(layer(x), expected)
    stateless = pools.normalized_upsample(x, **arguments, correlation=correlation)
    torch.testing.assert_close(stateless, expected)


# --- sums, concats, dropout, gates --------------------------------------------------------------


def test_add_of_any_number_of_branches():
    x = [randn(4, 5, seed=seed) for seed in range(4)]
    for weights in ((2.0,), (3.0, -4.0), (1.0, 0.0, 2.0), (1.0, 2.0, 3.0, 4.0)):
        expected = sum(w * b for w, b in zip(weights, x, strict=False)) / math.hypot(*weights)
        for learnable in (False, True):
            add = NormalizedAdd(weights, learnable=learnable).double()
            torch.testing.assert_close(add(*x[: len(weights)]), expected, rtol=1e-6, atol=1e-6)
            assert math.hypot(*add.weights) == pytest.approx(1)
    assert NormalizedAdd.residual(1).weights == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert NormalizedAdd.residual(16).weights == pytest.approx((math.sqrt(15 / 16), 1 / 4))


def test_learnable_add_has_the_right_gradients():
    add = NormalizedAdd((3.0, 1.0, -2.0), learnable=True).double()
    assert list(add.state_dict()) == ["weight"]
    x = [randn(4, 5, seed=seed).requires_grad_() for seed in range(3)]
    assert gradcheck(lambda w, *b: merges.normalized_add(b, w), (add.weight, *x))
    add(*x).square().sum().backward()
    radial = (add.weight.grad * add.weight).sum()  # its length is irrelevant
    assert abs(radial) < 1e-10 * add.weight.grad.norm()
    with torch.no_grad():
        add.weight.mul_(7)
    torch.testing.assert_close(add(*x), NormalizedAdd((3.0, 1.0, -2.0))(*x), rtol=1e-6, atol=1e-6)


def test_a_dropped_branch_leaves_the_trunk_at_variance_1():
    torch.manual_seed(2)  # another than the maps'
    add = NormalizedAdd.residual(4, drop_prob=0.3)
    trunk, branch = randn(4000, 3, 5), randn(4000, 3, 5, seed=1)
    kept_whole = NormalizedAdd.residual(4)(trunk, branch)
    y = add(trunk, branch)
    dropped = (y == trunk).flatten(1).all(1)
    expected = torch.where(dropped[:, None, None], trunk, kept_whole)
    torch.testing.assert_close(y, expected)
    assert abs(dropped.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert_moments(y, 0.0, 1.0)
    torch.testing.assert_close(add.eval()(trunk, branch), kept_whole, rtol=0, atol=0)
    always = NormalizedAdd(drop_prob=1.0)
    torch.testing.assert_close(always(trunk[:, 0, 0], branch[:, 0, 0]), trunk[:, 0, 0], rtol=0, atol=0)


def test_cat_is_edm2s():
    a, b = randn(1000, 3, 4), randn(1000, 5, 4, seed=1)
    for t in (0.3, 0.5, 0.8):
        scale = math.sqrt(8 / ((1 - t) ** 2 + t**2))  # Karras et al. 2024, mp_cat
        expected = torch.cat([a * scale * (1 - t) / math.sqrt(3), b * scale * t / math.sqrt(5)], 1)
        for weights in ((1 - t, t), (10 - 10 * t, 10 * t)):
            torch.testing.assert_close(NormalizedCat(1, weights)(a, b), expected)
    # Four parts: the shares of the squares are those of the weights, the mean square is 1.
    parts = [randn(2000, size, seed=size) for size in (1, 4, 20, 7)]
    scaled = merges.normalized_cat(parts, -1, (1.0, 2.0, 3.0, 4.0)).split([1, 4, 20, 7], -1)
    for weight, part in zip((1, 2, 3, 4), scaled, strict=True):
        size = part.shape[1]
        assert_moments(part, 0.0, math.sqrt(weight**2 / 30 * 32 / size))
    torch.testing.assert_close(NormalizedCat(1)([a, b]), torch.cat([a, b], 1), rtol=0, atol=0)
    torch.testing.assert_close(NormalizedCat(1, (1.0, 1.0))((a, a)), torch.cat([a, a], 1))


def test_dropout_keeps_the_variance():
    torch.manual_seed(1)  # another than x's
    x = randn(100_000)
    for p in (0.1, 0.5, 0.9):
        layer = NormalizedDropout(p)
        y = layer(x)
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / math.sqrt(1 - p))
        assert_moments(y, 0.0, 1.0)
        torch.testing.assert_close(layer.eval()(x), x, rtol=0, atol=0)
    assert not NormalizedDropout(1.0)(x).any()
    torch.testing.assert_close(NormalizedDropout(0.0)(x), x, rtol=0, atol=0)
    z = x.clone()
    assert NormalizedDropout(0.5, inplace=True)(z) is z
    torch.testing.assert_close(z[z != 0], x[z != 0] * math.sqrt(2))


@pytest.mark.parametrize(
    "phi",
    ["sigmoid", "silu", "hardsigmoid", torch.tanh, nn.PReLU(init=0.5)],
    ids=["sigmoid", "silu", "hardsigmoid", "tanh", "prelu"],
)
def test_gate_keeps_the_mean_square(phi):
    x, z = randn(200_000, 1), randn(200_000, 1, seed=1)
    gate = NormalizedGate(copy.deepcopy(phi)).double()
    y = gate(x, z).detach()
    assert_moments(y, 0.0, 1.0)
    torch.testing.assert_close(merges.normalized_gate(x, z, gate.phi), y, check_stride=False)


def test_squeeze_and_excite_broadcasts_and_a_learned_gate_follows_its_parameters():
    x, z = randn(2, 3, 4, 5), randn(2, 3, 1, 1, seed=1)
    rms = math.sqrt(0.20827634**2 + 0.25)  # PAPER.md 1.6
    torch.testing.assert_close(NormalizedGate()(x, z), x * torch.sigmoid(z) / rms, rtol=1e-7, atol=1e-7)
    gate = NormalizedGate(nn.PReLU(3)).double()
    with torch.no_grad():
        gate.phi.weight.copy_(torch.tensor([0.0, 0.5, 1.0]))
    slopes = gate.phi.weight.detach().view(3, 1, 1)
    expected = x * torch.where(z > 0, z, slopes * z) / ((1 + slopes**2) / 2).sqrt()
    torch.testing.assert_close(gate(x, z), expected)
    assert gradcheck(lambda *_: gate(x, z), (gate.phi.weight,))


def test_standardize():
    x = randn(10)
    torch.testing.assert_close(Standardize(0.3, 2.0)(x), (x - 0.3) / 2)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormalizedAdd((1.0, 1.0, 1.0), drop_prob=0.1), r"two weights \(trunk, branch\), got 3"),
        (lambda: NormalizedAdd(drop_prob=1.5), r"drop_prob must be in \[0, 1\], got 1.5"),
        (lambda: NormalizedAdd(learnable=True)(torch.ones(1)), "expected 2 branches, got 1"),
        (lambda: NormalizedCat(1, (0.0, 0.0)), "not all zero"),
        (lambda: NormalizedCat(1, (1.0, 1.0))(torch.ones(1, 1)), "expected 2 parts, got 1"),
        (lambda: NormalizedMaxPool2d(2, return_indices=True), "return_indices must be False"),
        (lambda: NormalizedMaxPool2d(2, correlation=1.0), r"correlation must be in \[0, 1\), got 1.0"),
        (lambda: NormalizedMaxPool2d(2, activation="rulu"), "unknown activation 'rulu'"),
        (lambda: NormalizedMaxPool2d((2, 2, 2)), r"expected one number or 2, got \(2, 2, 2\)"),
        (lambda: NormalizedMaxPool2d(2)(torch.ones(3, 4)), r"spatial dims, got shape \(3, 4\)"),
        (lambda: NormalizedMaxPool1d(2, activation=nn.Threshold(99.0, 0.0)), "the activation is constant"),
        (lambda: max_constants(0), "count must be at least 1, got 0"),
        (lambda: NormalizedAvgPool1d(2, correlation=-0.1), r"correlation must be in \[0, 1\], got -0.1"),
        (lambda: NormalizedAdaptiveAvgPool1d(1, correlation=2), r"correlation must be in \[0, 1\], got 2"),
        (lambda: NormalizedAdaptiveMaxPool1d(1, correlation=1), r"correlation must be in \[0, 1\), got 1"),
        (lambda: NormalizedUpsample(2, mode="area"), "mode must be one of nearest, .* got 'area'"),
        (lambda: NormalizedUpsample(2, correlation=2.0), r"correlation must be in \[0, 1\], got 2.0"),
        (lambda: merges.normalized_dropout(torch.ones(1), 1.5), r"p must be in \[0, 1\], got 1.5"),
        (lambda: NormalizedGate(nn.Threshold(99.0, 0.0)), "phi must not be 0 everywhere"),
        (lambda: Standardize(0.0, 0.0), "std finite and above 0, got 0.0 and 0.0"),
        (lambda: Standardize(math.inf, 1.0), "mean must be finite"),
        (
            lambda: NormalizedAdaptiveMaxPool2d(1).propagate(Signal.gaussian()),
            "NormalizedAdaptiveMaxPool2d.propagate depends on the input's size: pass shapes=",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- every module under every tool --------------------------------------------------------------

MODULES = {
    "add": (lambda: NormalizedAdd((3.0, -4.0)), 2),
    "learned add": (lambda: NormalizedAdd((3.0, 4.0), learnable=True), 2),
    "dropped add": (lambda: NormalizedAdd(drop_prob=0.3), 2),
    "cat": (lambda: NormalizedCat(), 2),
    "weighted cat": (lambda: NormalizedCat(1, (1.0, 2.0)), 2),
    "max": (lambda: NormalizedMaxPool2d(3, 2), 1),
    "padded max": (lambda: NormalizedMaxPool2d(3, 2, 1, 2, ceil_mode=True, activation="silu"), 1),
    "avg": (lambda: NormalizedAvgPool2d(3, 2), 1),
    "padded avg": (lambda: NormalizedAvgPool2d(3, 2, 1, ceil_mode=True, correlation=0.3), 1),
    "global avg": (lambda: NormalizedAdaptiveAvgPool2d(1, correlation=0.1), 1),
    "adaptive avg": (lambda: NormalizedAdaptiveAvgPool2d((3, None)), 1),
    "global max": (lambda: NormalizedAdaptiveMaxPool2d(1), 1),
    "adaptive max": (lambda: NormalizedAdaptiveMaxPool2d((3, 2), correlation=0.3), 1),
    "nearest": (lambda: NormalizedUpsample(scale_factor=2), 1),
    "bilinear": (lambda: NormalizedUpsample(scale_factor=2, mode="bilinear"), 1),
    "bicubic": (lambda: NormalizedUpsample(size=(20, 23), mode="bicubic", align_corners=True), 1),
    "dropout": (lambda: NormalizedDropout(0.3), 1),
    "gate": (lambda: NormalizedGate(), 2),
    "standardize": (lambda: Standardize(1.0, 2.0), 1),
    "rectified sum": (lambda: RectifiedSum(0.8, -0.3), 2),
    "shifted relu": (lambda: ShiftedReLU(-0.3), 1),
}
modules = pytest.mark.parametrize(("build", "inputs"), MODULES.values(), ids=MODULES)
SIZED = (NormalizedAdaptiveMaxPool2d,)


class Net(nn.Module):
    """One tensor to one tensor, through the layer."""

    def __init__(self, layer, inputs):
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x):
        return self.layer(x, 0.5 - x) if self.inputs == 2 else self.layer(x)


class Into(fx.Tracer):
    def is_leaf_module(self, module, name):
        return False


@modules
def test_traces_to_a_graph_that_is_right_at_another_size(build, inputs):
    net = Net(build(), inputs).eval()
    if isinstance(net.layer, SIZED):
        with pytest.raises(TypeError, match="needs the input's size: make it a leaf"):
            Into().trace(net)
        return
    traced = fx.GraphModule(net, Into().trace(net))
    for shape in ((2, 4, 11, 13), (1, 3, 17, 8)):
        x = randn(*shape, dtype=torch.float32)
        torch.testing.assert_close(traced(x), net(x))


@modules
def test_compiles_whole_and_exports(build, inputs):
    net = Net(build(), inputs).eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for shape in ((2, 4, 11, 13), (3, 4, 17, 8)):
        x = randn(*shape, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize(
    "layer",
    [
        NormalizedMaxPool2d(3, 2, 1),  # not ceil_mode: torch's own pool then splits odd from even sizes
        NormalizedAvgPool2d(3, 2, 1),
        NormalizedAdaptiveAvgPool2d(1, correlation=0.1),
        NormalizedAdaptiveAvgPool2d((3, None)),
        NormalizedUpsample(scale_factor=2, mode="bilinear"),
    ],
    ids=repr,
)
def test_exports_with_free_sizes(layer):
    if torch.__version__.startswith("2.11.") and getattr(layer, "stride", None) is not None:
        pytest.skip("torch 2.11 exports its own pools with stride 2 for odd or for even sizes alone")
    net = Net(layer, 1).eval()
    sizes = {dim: torch.export.Dim(f"size{dim}", min=6, max=64) for dim in (2, 3)}
    x, other = randn(2, 4, 11, 13, dtype=torch.float32), randn(2, 4, 18, 7, dtype=torch.float32)
    exported = torch.export.export(net, (x,), dynamic_shapes=(sizes,)).module()
    torch.testing.assert_close(exported(other), net(other))


def test_training_randomness_compiles():
    x = randn(64, 4, dtype=torch.float32)
    for layer, inputs in ((NormalizedDropout(0.3), 1), (NormalizedAdd(drop_prob=0.3), 2)):
        torch._dynamo.reset()
        y = torch.compile(Net(layer, inputs), fullgraph=True, backend="aot_eager")(x)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


@modules
def test_copies_pickles_and_keeps_nothing_but_parameters(build, inputs):
    net = Net(build(), inputs).eval()
    x = randn(2, 4, 11, 13, dtype=torch.float32)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
        assert repr(twin) == repr(net)
    assert not list(net.buffers())
    assert len(list(net.parameters())) == (1 if getattr(net.layer, "weight", None) is not None else 0)


@modules
def test_keeps_dtype_and_layout(build, inputs):
    net = Net(build(), inputs)
    x = randn(2, 4, 11, 13, dtype=torch.float32)
    for train in (True, False):
        net.train(train)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert net(x.to(dtype)).dtype == dtype
        y = net(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
    # bfloat16 keeps 8 bits; an operation or two before and after the pool.
    torch.testing.assert_close(net(x.bfloat16()).float(), net(x.bfloat16().float()), rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore:switched off for this check")
@modules
def test_no_sample_sees_another(build, inputs):
    net = Net(build(), inputs)
    x = randn(3, 4, 11, 13)
    assert_batch_independent(net, x)
    assert_train_equals_eval(net, x)


@pytest.mark.parametrize(
    "name", [n for n in MODULES if not n.endswith(("cat", "linear", "cubic", "nearest"))]
)
def test_maps_over_a_batch(name):
    net = Net(*(v() if callable(v) else v for v in MODULES[name])).eval()
    x = randn(2, 4, 11, 13)
    torch.testing.assert_close(torch.vmap(net)(x), net(x))


def test_only_random_modules_are_switched_off():
    x = randn(3, 4)
    with pytest.warns(UserWarning, match=r"switched off for this check: layer \(NormalizedAdd\)"):
        assert_train_equals_eval(Net(NormalizedAdd(drop_prob=0.5), 2), x)
    assert_train_equals_eval(Net(NormalizedAdd(), 2), x)  # a warning would be an error


# --- what propagate declares, against what happens ----------------------------------------------

PROPAGATE = {
    "add": (lambda: NormalizedAdd((3.0, -4.0)), 2, 0.0),
    "learned add": (lambda: NormalizedAdd((1.0, 2.0), learnable=True), 2, 0.0),
    "cat": (lambda: NormalizedCat(1, (1.0, 2.0)), 2, 0.0),
    "max": (lambda: NormalizedMaxPool2d(2), 1, 0.0),
    "correlated max": (lambda: NormalizedMaxPool2d(2, correlation=0.5), 1, 0.5),
    "overlapping max": (lambda: NormalizedMaxPool2d(3, 2), 1, 0.0),
    "avg": (lambda: NormalizedAvgPool2d(2), 1, 0.0),
    "overlapping avg": (lambda: NormalizedAvgPool2d(3, 2), 1, 0.0),
    "correlated avg": (lambda: NormalizedAvgPool2d(3, correlation=0.5), 1, None),
    "global avg": (lambda: NormalizedAdaptiveAvgPool2d(1), 1, 0.0),
    "adaptive avg": (lambda: NormalizedAdaptiveAvgPool2d(4), 1, 0.0),
    "adaptive max": (lambda: NormalizedAdaptiveMaxPool2d(4), 1, 0.0),
    "nearest": (lambda: NormalizedUpsample(scale_factor=2), 1, 0.0),
    "bilinear": (lambda: NormalizedUpsample(scale_factor=2, mode="bilinear"), 1, 0.0),
    "dropout": (lambda: NormalizedDropout().eval(), 1, 0.0),
    "gate": (lambda: NormalizedGate(), 2, 0.0),
    "silu gate": (lambda: NormalizedGate("silu"), 2, 0.0),
    "standardize": (lambda: Standardize(-0.5, 2.0), 1, 0.0),
    "rectified sum": (lambda: RectifiedSum(0.8, -0.3), 2, 0.0),
    "shifted relu": (lambda: ShiftedReLU(-0.3), 1, 0.0),
}


def ratio(numerator, denominator):
    """Of two means over samples, with its standard error."""
    value = numerator.mean() / denominator.mean()
    spread = (numerator - value * denominator).std() / denominator.mean()
    return float(value), float(spread / len(numerator) ** 0.5)


@pytest.mark.parametrize(("build", "inputs", "correlation"), PROPAGATE.values(), ids=PROPAGATE)
def test_propagate_declares_what_happens(build, inputs, correlation):
    n, size = 3000, 8
    layer = build().double()
    moments = activations.moments("relu")
    signal, _ = Signal.gaussian().apply(lambda u: (torch.relu(u) - moments.mean) / moments.std)
    shape = (n, 2, size, size)
    if correlation is None:  # elements that share a part, and are correlated as the layer supposes
        c = layer.correlation
        x = [math.sqrt(c) * randn(n, 2, 1, 1) + math.sqrt(1 - c) * randn(*shape, seed=1)]
        signal = Signal.gaussian()
    else:
        # One common part a window of 2: what lies in it is all that such a pool reads.
        shared = randn(n, 2, size // 2, size // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        us = [
            math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * randn(*shape, seed=1 + i)
            for i in range(inputs)
        ]
        x = [(torch.relu(u) - moments.mean) / moments.std for u in us]
    x = [v.requires_grad_() for v in x]
    y = layer(*x)
    g = randn(*y.shape, seed=9)
    grads = torch.autograd.grad(y, x, g)
    shapes = [tuple(v.shape) for v in x]
    out, factors = layer.propagate(*(signal for _ in x), shapes=shapes)
    y = y.detach()
    # Upsampling mixes in shares that differ between outputs: of the sum's shape it declares a mean one.
    for power in (1, 2) if isinstance(layer, NormalizedUpsample) else (1, 2, 3):
        by_sample = y.pow(power).flatten(1).mean(1)
        expected = float((out.weights * out.values.pow(power)).sum())
        # A thousandth for the 512 values of a signal.
        assert abs(by_sample.mean() - expected) < 5 * by_sample.std() / n**0.5 + 1e-3 * power**2, power
    for grad, factor in zip(grads, factors, strict=True):
        value, error = ratio(grad.square().flatten(1).sum(1), g.square().flatten(1).sum(1))
        assert abs(value - factor) < 5 * error + 1e-3 * factor


def test_propagate_without_shapes():
    z = Signal.gaussian()
    assert NormalizedAdaptiveAvgPool2d(1).propagate(z)[1] == (1.0,)
    assert NormalizedCat(1, (1.0, 2.0)).propagate(z, z)[1] == pytest.approx((0.2, 0.8))
    assert NormalizedCat(1).propagate(z, z, shapes=[(1, 2), (1, 6)])[1] == pytest.approx((0.25, 0.75))
    assert NormalizedUpsample(scale_factor=2, mode="bilinear").propagate(z)[1] == pytest.approx((1.0,))
    padded, plain = NormalizedMaxPool2d(3, 2, 1), NormalizedMaxPool2d(3, 2)
    assert padded.propagate(z)[1] == plain.propagate(z)[1] == (1 / plain.table[-1][1] ** 2,)
    assert NormalizedAdaptiveMaxPool2d(1).propagate(z, shapes=[(1, 1, 3, 3)])[1] == plain.propagate(z)[1]


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_a_rectified_sum_is_a_sum_and_a_maximum(ratio):
    trunk, branch = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = RectifiedSum(ratio, -0.3)(trunk, branch)
    true = (ratio * trunk + branch).clamp_min(-0.3)
    torch.testing.assert_close(ours, true)
    assert [t.data_ptr() for t in kept] == [ours.data_ptr()]  # its output alone
    weights = randn(4, 3, seed=2)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (trunk, branch)),
        torch.autograd.grad((true * weights).sum(), (trunk, branch)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_shifted_relu_is_a_maximum_that_leaves_its_input():
    x = randn(4, 3).requires_grad_()
    y = x * 1.0
    before = y.detach().clone()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = ShiftedReLU(-0.3)(y)
    assert torch.equal(y, before)
    assert torch.equal(ours, before.clamp_min(-0.3))
    assert [t.data_ptr() for t in kept] == [ours.data_ptr()]  # its output alone
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert torch.equal(gradient, (before > -0.3).to(x.dtype))


@pytest.mark.parametrize("size", [1, 2])
def test_an_empty_batch_passes_an_adaptive_average(size):
    assert NormalizedAdaptiveAvgPool2d(size)(torch.randn(0, 4, 5, 5)).shape == (0, 4, size, size)


def test_an_empty_part_of_a_weighted_concatenation_is_refused():
    with pytest.raises(ValueError, match=r"is empty, sizes \(3, 0\): leave it out"):
        NormalizedCat(weights=(1.0, 1.0))(torch.ones(2, 3), torch.ones(2, 0))


@pytest.mark.parametrize("pool", [*MAX, *AVG, *ADAPTIVE_MAX])
def test_pools_are_built_on_the_meta_device(pool):
    with torch.device("meta"):
        there = pool(2)
    assert repr(there) == repr(pool(2))
    x = torch.randn(2, 3, *[5] * there._spatial)
    torch.testing.assert_close(there(x), pool(2)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "phi", [nn.SiLU(inplace=True), nn.ReLU(inplace=True), nn.Hardtanh(0.0, 1.0, inplace=True)]
)
def test_what_others_read_is_not_overwritten(phi):
    x, z = randn(5, 3), randn(5, 3, seed=1)
    before = x.clone(), z.clone()
    rule = normprop.NormRule(constants="none")
    plain = type(phi)(0.0, 1.0) if isinstance(phi, nn.Hardtanh) else type(phi)()
    for own, other in (
        (NormalizedActivation(phi, rule=rule), NormalizedActivation(plain, rule=rule)),
        (NormalizedActivation(phi), NormalizedActivation(plain)),
    ):
        torch.testing.assert_close(own(x), other(x))
    NormalizedGate(phi)(x, z)
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])
    assert phi.inplace  # the caller's own is as it was


@pytest.mark.parametrize("first", ["inference", "fake", "vmap", "grad", "compiled"])
def test_what_pools_keep_for_a_size_is_plain(first):
    """Whoever meets a size first, windows' counts serve all who come after."""
    pools._made.cache_clear()
    pool, x = NormalizedMaxPool2d(3, 2, 1), torch.randn(2, 3, 9, 7)
    if first == "inference":
        with torch.inference_mode():
            pool(x)
    elif first == "fake":
        with torch._subclasses.FakeTensorMode() as mode:
            pool(mode.from_tensor(x))
    elif first == "vmap":
        torch.func.vmap(pool)(x)
    elif first == "grad":
        torch.func.grad(lambda x: pool(x).sum())(x)
    else:
        torch.compile(pool, backend="eager", fullgraph=True)(x)
    x.requires_grad_()
    kept = pool(x)
    kept.sum().backward()
    assert type(kept) is torch.Tensor
    pools._made.cache_clear()
    torch.testing.assert_close(kept, pool(x))
    pool(torch.randn(2, 3, 11, 7))
    assert pools._made.cache_info().currsize == 2


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_windows_hold_what_they_hold(dims, dtype):
    for kernel, stride, dilation in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2)):
        for padding, ceil_mode in itertools.product(range(kernel // 2 + 1), (False, True)):
            sizes = [7 + axis for axis in range(dims)]
            if dilation * (kernel - 1) >= 7 + 2 * padding:
                continue
            x = torch.zeros(1, 1, *sizes)
            window = kernel, stride, padding, dilation, ceil_mode
            shape = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1](x, *window).shape[2:]
            expected = torch.ones(shape, dtype=torch.float64)
            for index in itertools.product(*map(range, shape)):
                for place, size in zip(index, sizes, strict=True):
                    taps = (place * stride - padding + dilation * tap for tap in range(kernel))
                    expected[index] *= sum(0 <= tap < size for tap in taps)
            counts = pools._pool_counts(x.to(dtype), dims, *window)
            assert counts.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(counts.double(), expected, rtol=1e-6, atol=0)
