"""Layers against the paper's formulas, written out slowly in float64."""

import copy
import itertools
import math
import pickle
import re
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normprop
from normprop import NormRule, activations, functional, rows

# Name, class, torch parent, spatial dimensions, transposed.
KINDS = [
    (normprop.NormPropLinear, nn.Linear, 0, False),
    (normprop.NormPropConv1d, nn.Conv1d, 1, False),
    (normprop.NormPropConv2d, nn.Conv2d, 2, False),
    (normprop.NormPropConv3d, nn.Conv3d, 3, False),
    (normprop.NormPropConvTranspose1d, nn.ConvTranspose1d, 1, True),
    (normprop.NormPropConvTranspose2d, nn.ConvTranspose2d, 2, True),
    (normprop.NormPropConvTranspose3d, nn.ConvTranspose3d, 3, True),
]
kinds = pytest.mark.parametrize(
    ("cls", "parent", "spatial", "transposed"), KINDS, ids=[kind[0].__name__ for kind in KINDS]
)
RULES = [
    NormRule(centered, constants, gain)
    for centered in (False, True)
    for constants in ("standard", "affine", "none")
    for gain in ("jacobian", 1.0)
]
# Activation, how the reference writes it, its kinks; what is smooth or piecewise linear.
ACTIVATIONS = {
    "relu": (lambda: "relu", lambda u: u.clamp(min=0), (0.0,)),
    "leaky": (lambda: nn.LeakyReLU(0.2), lambda u: torch.where(u > 0, u, 0.2 * u), (0.0,)),
    "mirrored": (lambda: nn.LeakyReLU(-0.5), lambda u: torch.where(u > 0, u, -0.5 * u), (0.0,)),
    "steep": (lambda: nn.LeakyReLU(1.5), lambda u: torch.where(u > 0, u, 1.5 * u), (0.0,)),
    "prelu": (lambda: nn.PReLU(dtype=torch.float64), None, (0.0,)),
    "gelu": (lambda: F.gelu, lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2, ()),
    "silu": (lambda: "silu", lambda u: u / (1 + torch.exp(-u)), ()),
    "tanh": (lambda: nn.Tanh(), lambda u: 1 - 2 / (1 + torch.exp(2 * u)), ()),
    "elu": (lambda: "elu", lambda u: torch.where(u > 0, u, u.clamp(max=0).exp() - 1), (0.0,)),
    "hardtanh": (lambda: "hardtanh", lambda u: u.clamp(-1, 1), (-1.0, 1.0)),
    "lambda": (lambda: lambda u: (u - 0.3).abs(), lambda u: (u - 0.3).abs(), (0.3,)),
    "none": (lambda: None, lambda u: u, ()),
}
LEGENDRE = [torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(600)]
fast = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)


# --- the reference: the paper's formulas, nothing shared with the library ---------------------


def centered_unit_rows(weight, centered, transposed, groups):
    """W_i / ||W_i||, one output unit at a time."""
    result = torch.zeros_like(weight)
    if not transposed:
        for i in range(weight.shape[0]):
            row = weight[i] - weight[i].mean() if centered else weight[i]
            result = result.index_put((torch.tensor([i]),), (row / (row**2).sum().sqrt()).unsqueeze(0))
        return result
    per_group = weight.shape[0] // groups
    pieces = []
    for g in range(groups):
        block = weight[g * per_group : (g + 1) * per_group]
        columns = []
        for o in range(weight.shape[1]):
            row = block[:, o] - block[:, o].mean() if centered else block[:, o]
            columns.append(row / (row**2).sum().sqrt())
        pieces.append(torch.stack(columns, 1))
    return torch.cat(pieces)


def correlate(x, weight, stride, padding, dilation, groups, mode):
    """W * x of a convolution: a sum over the taps of the kernel."""
    spatial = x.ndim - 2
    if padding == "same":
        both = [(d * (k - 1)) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pad = [(total // 2, total - total // 2) for total in both]
    else:
        pad = [(p, p) for p in padding]
    x = F.pad(x, [p for sides in reversed(pad) for p in sides], **mode)
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], dilation, weight.shape[2:], stride, strict=True)
    ]
    w = weight.unflatten(0, (groups, -1))
    out = 0
    for tap in itertools.product(*map(range, weight.shape[2:])):
        window = [
            slice(d * k, d * k + s * (n - 1) + 1, s)
            for d, k, s, n in zip(dilation, tap, stride, size, strict=True)
        ]
        part = x[(slice(None), slice(None), *window)].unflatten(1, (groups, -1))
        out = out + torch.einsum("ngi...,goi->ngo...", part, w[(..., *tap)])
    assert out.ndim == spatial + 3
    return out.flatten(1, 2)


def spread(x, weight, stride, padding, output_padding, dilation, groups):
    """W * x of a transposed convolution: each input writes the kernel into the output."""
    sizes = zip(x.shape[2:], stride, dilation, weight.shape[2:], output_padding, strict=True)
    full = [(n - 1) * s + d * (k - 1) + 1 + extra for n, s, d, k, extra in sizes]
    w = weight.unflatten(0, (groups, -1))
    parts = x.unflatten(1, (groups, -1))
    out = torch.zeros(x.shape[0], groups * weight.shape[1], *full, dtype=x.dtype)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        window = [
            slice(d * k, d * k + s * (n - 1) + 1, s)
            for d, k, s, n in zip(dilation, tap, stride, x.shape[2:], strict=True)
        ]
        term = torch.einsum("ngi...,gio->ngo...", parts, w[(..., *tap)]).flatten(1, 2)
        canvas = torch.zeros_like(out)
        canvas[(slice(None), slice(None), *window)] = term
        out = out + canvas
    crop = [slice(p, n - p) for p, n in zip(padding, full, strict=True)]
    return out[(slice(None), slice(None), *crop)]


@cache
def standard_normal_constants(name):
    """Mean and standard deviation of phi(z) by scipy."""
    _, phi, kinks = ACTIVATIONS[name]

    def expectation(f):
        return scipy.integrate.quad(
            lambda t: f(phi(torch.tensor(t, dtype=torch.float64)).item()) * math.exp(-t * t / 2),
            -12,
            12,
            points=(*kinks, -4, 4),
            limit=400,
            epsabs=1e-12,
        )[0] / math.sqrt(2 * math.pi)

    mean = expectation(lambda y: y)
    return mean, math.sqrt(expectation(lambda y: (y - mean) ** 2))


def relu_family(a, mean, std):
    """Mean and variance of a*u + (1-a)*relu(u), from the moments of relu; Cov(u, relu(u)) = std^2 Phi."""
    std = std.abs()
    r = mean / std
    Phi = (1 + torch.erf(r / math.sqrt(2))) / 2
    density = torch.exp(-r * r / 2) / math.sqrt(2 * math.pi)
    first = mean * Phi + std * density
    var = (mean**2 + std**2) * Phi + mean * std * density - first**2
    return a * mean + (1 - a) * first, (a * std) ** 2 + (1 - a) ** 2 * var + 2 * a * (1 - a) * std**2 * Phi


def gaussian_integral(phi, kinks, mean, std):
    """Mean and variance of phi(u), u ~ N(mean, std^2): 600 Gauss-Legendre nodes between kinks."""
    x, w = LEGENDRE
    first, second = [], []
    for m, s in zip(mean, std.abs(), strict=True):
        at = sorted(((k - m) / s).detach().item() for k in kinks)
        edges = [-11.0, *(t for t in at if abs(t) < 11), 11.0]
        t = torch.cat([(b + a) / 2 + (b - a) / 2 * x for a, b in itertools.pairwise(edges)])
        weight = torch.cat([(b - a) / 2 * w for a, b in itertools.pairwise(edges)])
        weight = weight * torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        y = phi(m + s * t)
        first.append((weight * y).sum())
        second.append((weight * (y - first[-1]) ** 2).sum())
    return torch.stack(first), torch.stack(second)


def normalised(u, name, constants, gain, bias, slope, dim):
    """(phi(u) - mean) / std, eqs. 9, 11, 12."""
    phi, kinks = ACTIVATIONS[name][1:]
    if name == "prelu":

        def phi(u):
            return torch.where(u > 0, u, slope * u)

    if name == "none":
        return u
    if constants == "none":
        return phi(u)
    if constants == "standard":
        if name == "prelu":
            mean = (1 - slope) / math.sqrt(2 * math.pi)
            var = ((1 + slope**2) - (1 - slope) ** 2 / math.pi) / 2
            return (phi(u) - mean) / var.sqrt()
        mean, std = standard_normal_constants(name)
        return (phi(u) - mean) / std
    bias = torch.zeros_like(gain) if bias is None else bias
    linear = {"relu": 0.0, "leaky": 0.2, "steep": 1.5, "prelu": slope}
    if name in linear:
        mean, var = relu_family(linear[name], bias, gain)
    else:
        mean, var = gaussian_integral(phi, kinks, bias, gain)
    std = torch.maximum(var.sqrt(), 0.05 * gain.abs() + 1e-3)
    shape = (-1, *[1] * (-dim - 1))
    return (phi(u) - mean.view(shape)) / std.view(shape)


def reference(layer, name, x, parameters):
    """The layer's output by definition."""
    gain, bias = parameters["gain"], parameters.get("bias")
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    w = centered_unit_rows(parameters["weight"], layer.rule.centered, transposed, groups)
    dim = -1
    if isinstance(layer, nn.Linear):
        z = torch.einsum("...i,oi->...o", x, w)
    else:
        dim = 1 - x.ndim
        if transposed:
            z = spread(x, w, layer.stride, layer.padding, layer.output_padding, layer.dilation, groups)
            z = z * math.prod(layer.stride) ** 0.5
        else:
            mode = {"mode": "constant" if layer.padding_mode == "zeros" else layer.padding_mode}
            z = correlate(x, w, layer.stride, layer.padding, layer.dilation, groups, mode)
    shape = (-1, *[1] * (-dim - 1))
    u = gain.view(shape) * z
    if bias is not None:
        u = u + bias.view(shape)
    slope = parameters.get("activation.weight")
    return normalised(u, name, layer.rule.constants, gain, bias, slope, dim)


def assert_same_function(layer, x, expected):
    """The layer's output and all its gradients are those of ``expected(x, parameters)``."""
    parameters = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    twin = x.detach().clone().requires_grad_()
    x = x.detach().requires_grad_()
    out, truth = layer(x), expected(twin, parameters)
    torch.testing.assert_close(out, truth)
    weights = torch.randn_like(truth)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(
        (truth * weights).sum(), [twin, *parameters.values()], allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(["input", *parameters], got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def randomise(layer, seed):
    """Weights of any length, gains of both signs, biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name == "gain":  # where std = |gain| is not near 0
                parameter.add_(0.2 * parameter.sign())
    return layer


@st.composite
def layers(draw, cls, spatial, transposed):
    """A layer in float64 with random parameters, the name of its activation and a fitting input."""
    dims = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))  # noqa: E731
    name = draw(st.sampled_from(sorted(ACTIVATIONS)))
    rule = draw(st.sampled_from(RULES))
    batch = draw(st.integers(1, 3))
    options = {"bias": draw(st.booleans()), "dtype": torch.float64}
    if spatial == 0:
        n, out = draw(st.integers(1, 6)), draw(st.integers(1, 5))
        fan_in, arguments = n, (n, out)
        lead = (batch, *([draw(st.integers(1, 3))] if draw(st.booleans()) else []))
        shape = (*lead, n)
    else:
        groups = draw(st.integers(1, 3))
        n, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        kernel, stride, dilation = dims(1, 3), dims(1, 3), dims(1, 2)
        padding = dims(0, 2)
        size = tuple(d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, dims(0, 3), strict=True))
        options.update(groups=groups, dilation=dilation)
        if transposed:
            size = tuple(2 * p + e for p, e in zip(padding, dims(1, 2), strict=True))
            options["output_padding"] = tuple(
                draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
            )
        else:
            options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
            size = tuple(max(n, 3) for n in size)
            if draw(st.booleans()):
                padding, stride = "same", (1,) * spatial
                size = tuple(n + 2 for n in size)
        options.update(stride=stride, padding=padding)
        fan_in, arguments = n // groups * math.prod(kernel), (n, out, kernel)
        shape = (batch, n, *size)
    rule = replace(rule, centered=rule.centered and fan_in > 1)
    with warnings.catch_warnings():  # torch pads a copy for even kernels, and says so
        warnings.simplefilter("ignore")
        layer = cls(*arguments, activation=ACTIVATIONS[name][0](), rule=rule, **options)
    seed = draw(st.integers(0, 2**20))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return randomise(layer, seed), name, x


@kinds
@pytest.mark.parametrize("part", [rows.PART, 8])  # all rows at once, or as large weights are worked on
def test_outputs_and_gradients_equal_the_paper(cls, parent, spatial, transposed, part, monkeypatch):
    monkeypatch.setattr(rows, "PART", part)

    @fast
    @given(layers(cls, spatial, transposed))
    def check(case):
        layer, name, x = case
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
            assert_same_function(layer, x, lambda x, p: reference(layer, name, x, p))

    check()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("features", [None, 5])
@pytest.mark.parametrize("constants", ["standard", "affine", "none"])
def test_normalized_activation_equals_the_paper(name, features, constants):
    layer = normprop.NormalizedActivation(
        ACTIVATIONS[name][0](), features, NormRule(constants=constants), dtype=torch.float64
    )
    randomise(layer, 1)

    def expected(x, p):
        dim = 1 - x.ndim
        gain, bias = p.get("gain"), p.get("bias")
        view = (-1, *[1] * (-dim - 1))
        u = x if gain is None else gain.view(view) * x + bias.view(view)
        rule = "standard" if gain is None and constants == "affine" else constants
        return normalised(u, name, rule, gain, bias, p.get("activation.weight"), dim)

    for shape in ((3, 5), (2, 5, 3, 2), (1, 5, 7)):
        assert_same_function(layer, torch.randn(shape, dtype=torch.float64), expected)


# --- what the paper promises ------------------------------------------------------------------

NORMALISING = ["relu", "prelu", "gelu", "tanh", "elu", "lambda", "none"]


def small(cls, spatial, activation="relu", rule=normprop.PAPER, inputs=6, outputs=4, **options):
    """A small layer of any kind."""
    arguments = (inputs, outputs) if spatial == 0 else (inputs, outputs, 3)
    return cls(*arguments, activation=activation, rule=rule, **options)


def some_input(spatial, batch=2, inputs=6, **options):
    return torch.randn(batch, inputs, *[5] * spatial, **options)


def assert_standardised(y, variance=1.0):
    """Mean 0 and variance 1 within 5 standard errors; only the samples (dim 0) are independent."""
    for statistic, value in ((y.flatten(1).mean(1), 0.0), (y.flatten(1).square().mean(1), variance)):
        standard_error = statistic.std() / statistic.numel() ** 0.5
        assert standard_error < 0.1
        assert abs(statistic.mean() - value) < 5 * standard_error


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", NORMALISING)
@kinds
def test_standard_normal_input_gives_mean_0_and_variance_1(
    cls, parent, spatial, transposed, name, centered
):
    rule = NormRule(centered, gain=1.0)
    # padding 3 with kernel 4 and stride 2 leaves the positions that two taps an axis reach.
    kernel, options = (4, {"stride": 2, "padding": 3}) if transposed else (3, {"stride": 2})
    arguments = (8, 6) if spatial == 0 else (8, 6, kernel)
    options = options if spatial else {}
    layer = cls(*arguments, activation=ACTIVATIONS[name][0](), rule=rule, dtype=torch.float64, **options)
    if transposed and name != "none":
        # The variance is 1 on average over the stride's phases; where it is 1 in each, phi's is 1 too.
        with torch.no_grad():
            for phase in itertools.product((0, 1), repeat=spatial):
                taps = layer.weight[(slice(None), slice(None), *[slice(p, None, 2) for p in phase])]
                dims = (0, *range(2, taps.ndim))
                taps -= taps.mean(dims, keepdim=True)
                taps /= taps.square().sum(dims, keepdim=True).sqrt()
    y = layer(
        torch.randn(
            3000 if spatial < 3 else 600, 8, *[4 if transposed else 5] * spatial, dtype=torch.float64
        )
    )
    assert_standardised(y.detach())


@pytest.mark.parametrize("name", NORMALISING[:-1])
def test_normalized_activation_of_a_standard_normal_has_mean_0_and_variance_1(name):
    layer = normprop.NormalizedActivation(
        ACTIVATIONS[name][0](), 6, NormRule(gain=1.0), dtype=torch.float64
    )
    assert_standardised(layer(torch.randn(5000, 6, 4, dtype=torch.float64)).detach())


@pytest.mark.parametrize("constants", ["standard", "affine"])
@pytest.mark.parametrize(("gain", "bias"), [(1.0, 0.0), (0.826, -0.5), (-2.0, 1.0)])
def test_affine_constants_keep_what_learned_gains_disturb(constants, gain, bias):
    layer = normprop.NormPropLinear(64, 1, rule=NormRule(constants=constants), dtype=torch.float64)
    nn.init.constant_(layer.gain, gain)
    nn.init.constant_(layer.bias, bias)
    y = layer(torch.randn(100_000, 64, dtype=torch.float64)).detach()
    if constants == "affine" or (gain, bias) == (1.0, 0.0):
        assert_standardised(y)
    elif gain == 0.826:  # the reference's example of what fixed constants leave
        assert y.mean() == pytest.approx(-0.446, abs=5 * 0.54 / len(y) ** 0.5)
        assert y.std() == pytest.approx(0.536, abs=0.01)


@kinds
@pytest.mark.parametrize("centered", [False, True])
def test_rows_without_direction_count_as_zero(cls, parent, spatial, transposed, centered):
    layer = small(cls, spatial, "prelu", NormRule(centered, "affine", 1.0))
    unit = (slice(None), 1) if transposed else 1
    with torch.no_grad():
        layer.bias.normal_()
        layer.weight[unit] = 0.0
    for constant in (0.0, 0.1, 1e-8, 1e4) if centered else (0.0,):
        with torch.no_grad():
            layer.weight[unit] = constant
        y = layer(some_input(spatial))
        channel = y[:, 1]
        u = layer.bias[1]
        mean, std = (
            c[1] for c in functional.constants(layer.activation, layer.rule, layer.gain, layer.bias, None)
        )
        torch.testing.assert_close(channel, ((layer.activation(u) - mean) / std).expand_as(channel))
        layer.zero_grad()
        y.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        layer.project_()
        assert (layer.weight[unit].abs() <= 4 * torch.finfo(torch.float32).eps * constant).all()


@pytest.mark.parametrize("name", ["relu", "prelu", "gelu", "elu", "tanh"])
@pytest.mark.parametrize("ratio", [-30.0, -6.0, -1.0, 0.0, 1.0, 6.0, 30.0])
@pytest.mark.parametrize("gain", [1e-2, 0.3, -1.0, 3.0])
def test_affine_constants_do_not_cancel_in_float32(name, ratio, gain):
    rule = NormRule(constants="affine")
    phi = ACTIVATIONS[name][1]
    if name == "prelu":

        def phi(u):
            return torch.where(u > 0, u, 0.25 * u)

    bias = ratio * gain
    module = activations.as_module(name).float()
    mean, std = functional.constants(module, rule, torch.tensor([gain]), torch.tensor([bias]), None)
    # The numbers that float32 holds, not the decimals.
    exact_gain, exact_bias = (torch.tensor([v]).double() for v in (gain, bias))
    true_mean, true_var = gaussian_integral(phi, ACTIVATIONS[name][2], exact_bias, exact_gain)
    floor = 0.05 * exact_gain.abs() + 1e-3
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, true_mean.float(), rtol=1e-6, atol=1e-6 * floor.item())
    torch.testing.assert_close(std, torch.maximum(true_var.sqrt(), floor).float(), rtol=1e-6, atol=0)


def test_constants_of_a_gain_or_a_bias_alone():
    module, rule = activations.as_module("gelu"), NormRule(constants="affine")
    value, one, zero = torch.tensor([0.3, -1.0]), torch.ones(2), torch.zeros(2)
    for alone, both in (((None, value), (one, value)), ((value, None), (value, zero))):
        torch.testing.assert_close(
            functional.constants(module, rule, *alone, None),
            functional.constants(module, rule, *both, None),
        )


@pytest.mark.parametrize("ratio", [-30.0, -3.0, 0.0, 3.0, 30.0])
@pytest.mark.parametrize("name", ["relu", "prelu", "gelu"])
def test_affine_layers_in_float32_follow_float64(name, ratio):
    layer = normprop.NormPropLinear(32, 8, activation=name, rule=NormRule(constants="affine", gain=1.0))
    with torch.no_grad():
        layer.gain.uniform_(0.1, 2)
        layer.bias.copy_(ratio * layer.gain)
    x = torch.randn(63, 32)
    exact = copy.deepcopy(layer).double()(x.double())
    # Numbers of size bias/std are rounded, and subtracted from each other.
    size = max(1.0, abs(ratio)) * 8
    torch.testing.assert_close(
        layer(x).double(), exact, rtol=1e-5, atol=size * torch.finfo(torch.float32).eps * 8
    )


@pytest.mark.parametrize("name", ["relu", "leaky", "prelu", "gelu", "elu", "tanh", "lambda"])
@pytest.mark.parametrize("bias", [0.0, -2.0, 2.0])
def test_a_gain_of_zero_stays_finite(name, bias):
    activation = ACTIVATIONS[name][0]()
    layer = normprop.NormPropLinear(
        8, 4, activation=activation, rule=NormRule(constants="affine", gain=0.0)
    )
    nn.init.constant_(layer.bias, bias)
    y = layer(torch.randn(63, 8))
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_relu_with_affine_constants_is_free_of_the_gain_at_bias_0():
    layer = normprop.NormPropLinear(16, 4, rule=NormRule(constants="affine", gain=1.0))
    x = torch.randn(63, 16)
    expected = layer(x)
    for gain in (1e-2, 0.5, 30.0):  # .58|gain| is above the floor of the std
        nn.init.constant_(layer.gain, gain)
        torch.testing.assert_close(layer(x), expected)


@kinds
@pytest.mark.parametrize(
    "rule", [normprop.PAPER, NormRule(True, "affine", 1.0)], ids=normprop.modules.rule_name
)
def test_the_length_of_a_row_has_no_effect(cls, parent, spatial, transposed, rule):
    layer = small(cls, spatial, "gelu", rule, dtype=torch.float64)
    x = some_input(spatial, dtype=torch.float64)
    expected = layer(x)
    lengths = torch.rand(4, dtype=torch.float64) * 3 + 0.1
    view = (1, -1) if transposed else (-1, 1)
    with torch.no_grad():
        layer.weight *= lengths.view(*view, *[1] * spatial)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    grad, weight = (t.transpose(0, 1) if transposed else t for t in (layer.weight.grad, layer.weight))
    along_row = (grad * weight).flatten(1).sum(1)
    size = grad.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1)
    assert (along_row.abs() <= 1e-12 * size).all()
    assert (size > 0).all()
    if rule.centered:
        assert (grad.flatten(1).sum(1).abs() <= 1e-12 * grad.flatten(1).abs().sum(1)).all()


@kinds
@pytest.mark.parametrize("name", ["relu", "leaky", "prelu", "gelu"])
@pytest.mark.parametrize(
    "rule", [normprop.PAPER, NormRule(True, "affine", 1.0)], ids=normprop.modules.rule_name
)
def test_gradcheck(cls, parent, spatial, transposed, name, rule):
    arguments = (2, 2) if spatial == 0 else (2, 2, 2)
    layer = randomise(cls(*arguments, activation=ACTIVATIONS[name][0](), rule=rule, dtype=torch.float64), 3)
    names = [key for key, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = torch.randn(2, 2, *[2] * spatial, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert gradcheck(function, inputs)
    if spatial == 0:  # gradient penalties differentiate twice
        assert gradgradcheck(function, inputs)


# --- fuse -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fuse_keeps_the_function_and_none_of_our_modules(cls, parent, spatial, transposed, name):
    x = some_input(spatial, dtype=torch.float64)
    for rule, bias in itertools.product(RULES, (True, False)):
        layer = small(cls, spatial, ACTIVATIONS[name][0](), rule, bias=bias, dtype=torch.float64)
        randomise(layer, 5).eval()
        fused = layer.fuse()
        torch.testing.assert_close(fused(x), layer(x))
        assert_plain(fused)
        if name == "none":
            assert type(fused) is parent
        if name == "relu" and rule.constants == "standard":
            assert [type(m) for m in fused] == [parent, nn.Threshold]


def assert_plain(model):
    for module in model.modules():
        assert not type(module).__module__.startswith("normprop")
        assert not module.training


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("features", [None, 6])
def test_normalized_activation_fuses(name, features):
    for constants in ("standard", "affine", "none"):
        layer = normprop.NormalizedActivation(
            ACTIVATIONS[name][0](), features, NormRule(constants=constants), dtype=torch.float64
        )
        fused = randomise(layer, 5).eval().fuse()
        for x in (some_input(0, dtype=torch.float64), some_input(3, dtype=torch.float64)):
            torch.testing.assert_close(fused(x), layer(x), rtol=1e-11, atol=1e-11)
        assert_plain(fused)


def test_fuse_of_what_fx_cannot_trace_says_so():
    layer = normprop.NormPropLinear(3, 2, activation=lambda u: u * 2 if u.sum() == u.sum() else u)
    with pytest.raises(
        ValueError, match=r"activation <lambda> cannot be turned into plain torch: torch.fx says"
    ):
        layer.fuse()


# --- the modules ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_initial_values(cls, parent, spatial, transposed, centered, groups):
    options = {"groups": groups} if spatial else {}
    layer = small(cls, spatial, rule=NormRule(centered), **options)
    assert isinstance(layer, parent)
    rows = layer.weight.unflatten(0, (groups if transposed else 1, -1))
    if transposed:
        rows = rows.transpose(1, 2)
    rows = rows.flatten(0, 1).flatten(1)
    assert len(rows) == 4
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert (rows.std(1) > 0.1 / rows.shape[1] ** 0.5).all()
    if centered:
        torch.testing.assert_close(rows.sum(1), torch.zeros(4))
    assert (layer.bias == 0).all()
    torch.testing.assert_close(layer.gain, torch.full((4,), 1 / 1.2111739))
    assert small(cls, spatial, None).gain.eq(1).all()
    assert small(cls, spatial, rule=normprop.RECOMMENDED).gain.eq(1).all()
    before = layer.weight.detach().clone()
    nn.init.constant_(layer.gain, 7.0)
    layer.reset_parameters()
    torch.testing.assert_close(layer.gain, torch.full((4,), 1 / 1.2111739))
    assert not torch.equal(layer.weight, before)


@kinds
def test_state_dict_keys(cls, parent, spatial, transposed):
    assert set(small(cls, spatial).state_dict()) == {"weight", "gain", "bias"}
    assert set(small(cls, spatial, bias=False).state_dict()) == {"weight", "gain"}
    keys = small(cls, spatial, "prelu", rule=NormRule(True, "affine")).state_dict()
    assert set(keys) == {"weight", "gain", "bias", "activation.weight"}
    assert keys["gain"].shape == (4,)
    assert set(small(cls, spatial, lambda u: u.sin()).state_dict()) == {"weight", "gain", "bias"}


CONSTRUCTORS = [
    (
        lambda: normprop.NormPropLinear(1, 3, rule=normprop.RECOMMENDED),
        ValueError,
        "centered needs at least 2 inputs",
    ),
    (
        lambda: normprop.NormPropConv2d(4, 4, 1, groups=4, rule=NormRule(True)),
        ValueError,
        "needs at least 2 inputs",
    ),
    (
        lambda: normprop.NormPropConvTranspose2d(4, 4, 1, groups=4, rule=NormRule(True)),
        ValueError,
        "at least 2",
    ),
    (lambda: normprop.NormPropLinear(3, 3, activation="swosh"), ValueError, "unknown activation 'swosh'"),
    (lambda: normprop.NormPropConv1d(3, 3, 1, activation=nn.ReLU), TypeError, r"write ReLU\(\) for ReLU"),
    (
        lambda: normprop.NormPropLinear(3, 3, rule="paper"),
        TypeError,
        "rule must be a normprop.NormRule, such as .*, got 'paper'",
    ),
    (
        lambda: normprop.NormalizedActivation("relu", rule=None),
        TypeError,
        "rule must be a normprop.NormRule, such as .*, got None",
    ),
    (
        lambda: normprop.NormalizedActivation("relu", 0),
        ValueError,
        "num_features must be a number of at least 1, or None, got 0",
    ),
    (lambda: normprop.NormalizedActivation(None), TypeError, "activation must be a name"),
    (lambda: normprop.NormPropLinear(0, 2), ValueError, "at least 1 input to each output unit"),
    (lambda: normprop.NormPropLinear(3, 2, activation=torch.ones_like), ValueError, "constant under N"),
    (lambda: normprop.NormPropLinear(3, 2, activation=torch.sign), ValueError, "sign has slope 0"),
    (lambda: NormRule(centered=1), ValueError, "centered must be True or False, got 1"),
    (
        lambda: NormRule(constants="fixed"),
        ValueError,
        "constants must be 'standard', 'affine' or 'none', got 'fixed'",
    ),
    (lambda: NormRule(gain="one"), ValueError, "gain must be 'jacobian' or a finite number, got 'one'"),
    (lambda: NormRule(gain=math.nan), ValueError, "gain must be 'jacobian' or a finite number, got nan"),
    (lambda: NormRule(gain=True), ValueError, "gain must be 'jacobian' or a finite number, got True"),
]


@pytest.mark.parametrize(("make", "kind", "message"), CONSTRUCTORS, ids=range(len(CONSTRUCTORS)))
def test_bad_arguments_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_rules():
    assert NormRule() == normprop.PAPER
    assert NormRule(False, "standard", "jacobian") == normprop.PAPER
    assert NormRule(True, gain=1.0) == normprop.RECOMMENDED
    with pytest.raises(AttributeError):
        normprop.PAPER.centered = True
    at = normprop.RECOMMENDED.at
    assert (at(16).centered, at(15).centered, at(16, first=True).centered) == (True, False, False)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: normprop.NormPropLinear(3, 2, activation=nn.LeakyReLU(0.2)),
            "NormPropLinear(in_features=3, out_features=2, bias=True, "
            "activation=LeakyReLU(negative_slope=0.2), rule=PAPER)",
        ),
        (
            lambda: normprop.NormPropConvTranspose1d(
                3, 2, 4, stride=2, activation=None, rule=NormRule(True)
            ),
            "NormPropConvTranspose1d(3, 2, kernel_size=(4,), stride=(2,), activation=None, "
            "rule=NormRule(centered=True))",
        ),
        (lambda: normprop.NormalizedActivation(F.silu, 8), "NormalizedActivation(silu, 8, rule=PAPER)"),
        (
            lambda: normprop.NormalizedActivation("relu", rule=normprop.RECOMMENDED),
            "NormalizedActivation(relu, rule=RECOMMENDED)",
        ),
        (
            lambda: normprop.NormalizedActivation(lambda u: u.sin()),
            "NormalizedActivation(<lambda>, rule=PAPER)",
        ),
    ],
    ids=["linear", "transposed", "activation", "recommended", "lambda"],
)
def test_repr_tells(layer, text):
    assert repr(layer()) == text


@kinds
@pytest.mark.parametrize("batch", [0, 1, 63])
def test_batches_of_any_size(cls, parent, spatial, transposed, batch):
    layer = small(cls, spatial, "relu", NormRule(True, "affine", 1.0))
    x = some_input(spatial, batch)
    y = layer(x)
    assert y.shape == small(parent_of(parent), spatial)(x).shape
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    for index in range(min(batch, 3)):
        torch.testing.assert_close(layer(x[index : index + 1])[0], y[index])


def parent_of(parent):
    """The torch parent with the arguments of ``small``."""
    return lambda *arguments, activation, rule, **options: parent(*arguments, **options)


@pytest.mark.parametrize("size", [1, 63, 1001])
def test_odd_sizes(size):
    for activation in ("relu", "gelu"):
        linear = normprop.NormPropLinear(size, 3, activation=activation, dtype=torch.float64)
        wide = normprop.NormPropLinear(3, size, activation=activation, dtype=torch.float64)
        conv = normprop.NormPropConv1d(2, 3, 1, activation=activation, dtype=torch.float64)
        for layer, shape in ((linear, (2, size)), (wide, (2, 3)), (conv, (1, 2, size))):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(
                layer(x), reference(layer, activation, x, dict(layer.named_parameters()))
            )


@kinds
def test_strided_and_unbatched_inputs(cls, parent, spatial, transposed):
    layer = small(cls, spatial, "prelu")
    x = some_input(spatial, 4)
    y = layer(x)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), y)
    torch.testing.assert_close(layer(x.transpose(0, 1).contiguous().transpose(0, 1)), y)
    torch.testing.assert_close(layer(x[1]), y[1])


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["relu", "leaky", "prelu", "gelu", "none"])
@pytest.mark.parametrize("part", [rows.PART, 8])
def test_other_dtypes(cls, parent, spatial, transposed, dtype, name, part, monkeypatch):
    monkeypatch.setattr(rows, "PART", part)
    for rule in (normprop.PAPER, NormRule(True, "affine", 1.0)):
        made = small(cls, spatial, ACTIVATIONS[name][0](), rule, dtype=dtype)
        cast = small(cls, spatial, ACTIVATIONS[name][0](), rule).to(dtype)
        for layer in (made, cast):
            assert {p.dtype for p in layer.parameters()} == {dtype}
            x = some_input(spatial, dtype=dtype)
            y = layer(x)
            assert y.dtype == dtype
            y.float().square().sum().backward()
            assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in layer.parameters())
            exact = copy.deepcopy(layer).double()(x.double())
            # In bfloat16 weights, the sum, the bias and the output are rounded once each.
            limit = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 8 * 2**-8}
            torch.testing.assert_close(y.double(), exact, **limit)


def test_output_size_of_transposed_convolutions():
    layer = normprop.NormPropConvTranspose2d(3, 2, 3, stride=2)
    x = torch.randn(1, 3, 5, 5)
    assert layer(x, output_size=[12, 12]).shape == (1, 2, 12, 12)
    torch.testing.assert_close(layer(x, output_size=[12, 12])[..., :11, :11], layer(x))


def test_a_lambda_is_deep_copied_and_says_why_it_is_not_pickled():
    layer = normprop.NormPropLinear(3, 2, activation=lambda u: u.sin())
    x = torch.randn(5, 3)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x))
    assert twin.weight is not layer.weight
    message = "activation <lambda> cannot be pickled .*; define it with 'def' at the top of a module"
    with pytest.raises(pickle.PicklingError, match=message):
        pickle.dumps(layer)


def test_moments_use_the_kinks_that_were_found():
    layer = normprop.NormPropLinear(3, 2, activation=lambda u: (u - 0.3).abs())
    assert layer.activation.kinks == pytest.approx([0.3], abs=1e-6)


def test_rows_of_any_length_keep_the_output_or_say_nan():
    layer = normprop.NormPropLinear(6, 3)
    x = torch.randn(4, 6)
    expected = layer(x)
    for length in (1e-12, 1e12):
        scaled = copy.deepcopy(layer)
        scaled.weight.data.mul_(length)
        torch.testing.assert_close(scaled(x), expected)
        scaled.project_()
        torch.testing.assert_close(scaled.weight, layer.weight)
    layer.weight.data[1] *= 1e30
    assert layer(x)[:, 1].isnan().all()
    layer.project_()
    assert layer.weight[1].isnan().all()
    torch.testing.assert_close(layer(x)[:, [0, 2]], expected[:, [0, 2]])


@pytest.mark.parametrize("centered", [False, True])
def test_tracing_and_meta_construction(centered):
    layer = normprop.NormPropLinear(
        5, 3, activation="leaky_relu", rule=normprop.NormRule(centered=centered)
    )
    x = torch.randn(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))
    with torch.device("meta"):
        assert normprop.NormPropLinear(3, 4, activation="gelu").weight.is_meta
        assert "meta" in repr(normprop.GlobalDataNorm((3,)))


def test_affine_is_rsub_with_one_pass_back():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def affine(x):
        return functional.affine(x, -1.7, 0.3)

    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(affine(x.to(dtype)), torch.rsub(x.to(dtype), 0.3, alpha=1.7))
    assert gradgradcheck(affine, x)
    assert gradcheck(affine, x)
    assert torch.equal(torch.func.vmap(affine)(x), affine(x))
    assert type(affine(x).grad_fn).__name__ == "_AffineBackward"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "gelu", None])
@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED, NormRule(constants="affine")])
def test_forward_mode_derivatives(activation, rule):
    """jvp against differences, a Hessian forward over reverse against reverse over reverse."""
    layer = normprop.NormPropConv2d(
        2, 3, 3, padding=1, activation=activation, rule=rule, dtype=torch.float64
    )
    net = nn.Sequential(randomise(layer, 1))
    x, v = some_input(2, inputs=2, dtype=torch.float64), some_input(2, inputs=2, dtype=torch.float64)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    steps = {name: torch.randn_like(p) for name, p in weights.items()}

    def run(weights, x):
        return torch.func.functional_call(net, weights, (x,))

    value, tangent = torch.func.jvp(run, (weights, x), (steps, v))
    assert torch.equal(value, net(x))
    ends = []
    for e in (1e-6, -1e-6):
        ends.append(run({name: p + e * steps[name] for name, p in weights.items()}, x + e * v))
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    gradient = torch.func.grad(lambda w: run(w, x).square().sum())
    torch.testing.assert_close(torch.func.jacfwd(gradient)(weights), torch.func.jacrev(gradient)(weights))


@pytest.mark.parametrize("part", [rows.PART, 8])
def test_a_batch_of_gradients_at_once(part, monkeypatch):
    monkeypatch.setattr(rows, "PART", part)
    rule = replace(normprop.PAPER, centered=True)
    layer = normprop.NormPropLinear(6, 4, activation="gelu", rule=rule, dtype=torch.float64)
    y = layer(torch.randn(5, 6, dtype=torch.float64)).sum(0)
    one_by_one = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0] for v in y]
    (batch,) = torch.autograd.grad(
        y, layer.weight, torch.eye(4, dtype=torch.float64), is_grads_batched=True
    )
    torch.testing.assert_close(batch, torch.stack(one_by_one))


@pytest.mark.parametrize(
    "rule", [NormRule(gain=1.0), NormRule(True, "affine", 1.0)], ids=["paper", "affine"]
)
def test_constants_go_with_an_activation_that_is_put_in(rule):
    layer = normprop.NormPropLinear(6, 4, rule=rule)
    alone = normprop.NormalizedActivation("relu", 4, rule)
    x = torch.randn(5, 6)
    for activation in (nn.GELU(), nn.LeakyReLU(0.5), lambda z: z * torch.sigmoid(z), nn.ReLU()):
        layer.activation = alone.activation = activation
        fresh = normprop.NormPropLinear(6, 4, activation=activation, rule=rule)
        fresh.load_state_dict(layer.state_dict())
        assert layer.standard == alone.standard == fresh.standard
        torch.testing.assert_close(layer(x), fresh(x), rtol=0, atol=0)
        torch.testing.assert_close(
            alone(x[:, :4]), normprop.NormalizedActivation(activation, 4, rule)(x[:, :4]), rtol=0, atol=0
        )
    layer.activation = None
    assert layer.standard == (0.0, 1.0)
    with pytest.raises(ValueError, match="is constant under N"):
        layer.activation = nn.Threshold(100.0, 3.0)
    assert layer.activation is None


def test_an_activation_that_is_watched_is_called():
    layer, seen = normprop.NormPropConv2d(3, 4, 3), []
    x = torch.randn(2, 3, 8, 8)
    expected = layer(x)
    handle = layer.activation.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1
    handle.remove()
    layer(x)
    assert len(seen) == 1


def test_slopes_that_lie_elsewhere_than_the_channels_are_refused():
    layer = normprop.NormPropLinear(8, 5, activation=nn.PReLU(5))
    assert layer(torch.randn(3, 8)).shape == (3, 5)
    with pytest.raises(
        ValueError, match=r"PReLU's 5 slopes lie along dim 1, .* of shape \(3, 5, 5\) along dim 2"
    ):
        layer(torch.randn(3, 5, 8))


@pytest.mark.parametrize("size", [(2, 1, 3), (2, 5), (4,)])
def test_other_channels_than_num_features_are_refused(size):
    with pytest.raises(ValueError, match=rf"expected shape \(N, 4, \*\), got {re.escape(str(size))}"):
        normprop.NormalizedActivation("relu", 4)(torch.randn(size))


@pytest.mark.parametrize(
    ("activation", "rule"), [("prelu", normprop.PAPER), ("gelu", NormRule(constants="affine"))]
)
def test_no_map_more_is_kept_than_without_normalisation(activation, rule):
    def kept(model):
        maps = {}

        def pack(t):
            if t.shape[:1] == (8,):
                maps[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        maps[y.untyped_storage().data_ptr()] = 0  # whoever reads it keeps it
        return sum(maps.values())

    x = torch.randn(8, 4, 16, 16)
    layer = normprop.NormPropConv2d(4, 4, 3, padding=1, activation=activation, rule=rule)
    assert kept(layer) == kept(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), activations.as_module(activation))
    )


class Shifted(nn.Module):
    def __init__(self, by=0.0):
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, x):
        return torch.relu(x - self.by)


def test_constants_follow_the_buffers_of_an_activation():
    one, other = (normprop.NormPropLinear(64, 64, activation=Shifted(by)) for by in (1.0, 0.0))
    other.load_state_dict(one.state_dict())
    x = torch.randn(32, 64)
    torch.testing.assert_close(other(x), one(x))
    torch.testing.assert_close(normprop.fold(nn.Sequential(other), verify=x)(x), one(x))
    truth = normprop.moments(lambda u: torch.relu(u - 1.0))
    mean, std = normprop.functional.constants(one.activation, one.rule, one.gain, one.bias, one.standard)
    assert float(mean) == pytest.approx(truth.mean, abs=1e-6)
    assert float(std) == pytest.approx(truth.std, abs=1e-6)


def test_an_activation_in_two_precisions_is_copied():
    act = nn.PReLU()
    same = normprop.NormPropLinear(3, 3, activation=act)
    half = normprop.NormPropLinear(3, 3, activation=act, dtype=torch.bfloat16)
    assert same.activation is act
    assert act.weight.dtype == torch.float32
    assert half.activation.weight.dtype == torch.bfloat16


def test_layers_share_the_copy_of_an_activation():
    act = nn.PReLU()
    layers = [normprop.NormPropLinear(4, 4, activation=act, dtype=torch.float64) for _ in range(2)]
    assert layers[0].activation is layers[1].activation
    assert layers[0].activation is not act
