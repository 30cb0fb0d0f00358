"""experiments/second-order: its mathematics against quadrature and sampling, its layer against the formula."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normprop
from normprop import NormPropConv2d, NormRule, activations

FILE = Path(__file__).parent.parent / "experiments" / "second-order" / "second_order.py"
spec = importlib.util.spec_from_file_location("second_order", FILE)
so = sys.modules["second_order"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(so)

AFFINE = NormRule(constants="affine", gain=1.0)
RULES = [AFFINE, normprop.PAPER, NormRule(centered=True, constants="affine", gain=1.0)]


def small_net(rule=AFFINE, activation="relu"):
    net = nn.Sequential(
        NormPropConv2d(3, 32, 5, padding=2, activation=activation, rule=rule.at(75, first=True)),
        NormPropConv2d(32, 32, 1, activation=activation, rule=rule),
        nn.MaxPool2d(3, 2, 1) if activation == "relu" else nn.AvgPool2d(2),
        NormPropConv2d(32, 32, 3, padding=1, activation=activation, rule=rule),
        nn.ZeroPad2d(1),
        nn.AvgPool2d(3, 2),
        NormPropConv2d(32, 32, 3, activation=activation, rule=rule),
        NormPropConv2d(32, 5, 1, activation=None, rule=rule),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for layer in net:
        if isinstance(layer, NormPropConv2d):
            nn.init.normal_(layer.bias, std=0.3)
    return net


def smooth_fields(count, size=32):
    """Gaussian images whose neighbouring pixels and colours are correlated."""
    bump = torch.exp(-torch.arange(-4.0, 5.0).square() / 4)
    kernel = torch.outer(bump, bump)
    kernel = (kernel / kernel.norm()).expand(3, 1, 9, 9)
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.5, 0.3, 0.8]])
    return torch.einsum(
        "cd,ndhw->nchw", colours, F.conv2d(torch.randn(count, 3, size + 8, size + 8), kernel, groups=3)
    )


def attached(rule=AFFINE, activation="relu", every=3):
    """A net, 200 images, an optimizer and the hook's handle."""
    net, x = small_net(rule, activation), smooth_fields(200)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    normprop.attach_projection(optimizer, net, trust_radius=0.05)
    return net, x, optimizer, so.attach_second_order(optimizer, net, x, every)


def step(net, x, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(net(x[:20]), torch.arange(20) % 5).backward()
    optimizer.step()


def moments(net):
    return [(layer.z_mean.clone(), layer.z_std.clone()) for layer in net if hasattr(layer, "z_std")]


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "gelu", "tanh"])
def test_hermite_coefficients_agree_with_quadrature(name):
    phi = activations.as_module(name)
    gain = torch.tensor([1.0, -0.7, 1.5, 3.0], dtype=torch.float64)
    bias = torch.tensor([0.0, -0.6, 0.8, 2.5], dtype=torch.float64)
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    y = phi(gain[:, None] * z + bias[:, None]) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = [
        torch.trapezoid(
            y * np.polynomial.hermite_e.hermeval(z, [0] * k + [1 / math.sqrt(math.factorial(k))]), z
        )
        for k in range(1, 9)
    ]
    # The trapezoid's error at the kink: its step squared.
    torch.testing.assert_close(
        so.hermite_coefficients(phi, gain, bias, 8), torch.stack(expected), atol=1e-7, rtol=0
    )


def test_mehler_is_the_arc_cosine_kernel():
    r = torch.linspace(-0.95, 0.95, 39, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    h = so.hermite_coefficients(activations.as_module("relu"), one, one * 0, 60).square()
    kernel = ((1 - r.square()).sqrt() + r * (math.pi - r.acos()) - 1) / (2 * math.pi)
    left = activations.moments("relu").var - h.sum()  # all further coefficients squared
    assert ((so.mehler(h, r) - kernel).abs() <= left * r.abs() ** 61 + 1e-12).all()


def row_outputs(layer, x):
    """``w * x`` with unit rows."""
    ones = torch.ones_like(layer.gain)
    rows = normprop.functional.scaled_weight(layer.weight, ones, centered=layer.rule.centered)
    return F.conv2d(x, rows, padding=layer.padding)


def rms(values):
    return values.square().mean().sqrt()


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_moments_agree_with_smooth_gaussian_fields(rule, activation):
    net, x, *_ = attached(rule, activation)
    first_order, y = small_net(rule, activation), x
    first_order.load_state_dict(net.state_dict(), strict=False)
    # Variances are exact in the first layer, and nearly so in the second, which is 1x1. After a pool maps are
    # neither Gaussian nor of separable covariance: no closer is promised there.
    mean_within, std_within = iter((0.01, 0.02, 0.1, 0.3)), iter((1e-4, 0.02, 0.1, 0.2))
    for layer, twin in zip(net[:-3], first_order, strict=False):
        if isinstance(layer, NormPropConv2d):
            z = row_outputs(layer, x)
            ratio = z.std((0, 2, 3)) / layer.z_std
            assert rms((z.mean((0, 2, 3)) - layer.z_mean) / layer.z_std) < next(mean_within)
            assert abs(rms(ratio) - 1) < next(std_within)
            assert rms(ratio - 1) < rms(
                row_outputs(twin, y).std((0, 2, 3)) - 1
            )  # what independence predicts
        x, y = layer(x), twin(y)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_layer_and_gradients_equal_the_formula(rule, activation):
    layer = NormPropConv2d(3, 8, 3, padding=1, activation=activation, rule=rule).double()
    nn.init.normal_(layer.gain)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    c, d = normprop.functional.constants(layer.activation, rule, layer.gain, layer.bias, layer.standard)
    mean, std = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5

    def wide(v):
        return torch.as_tensor(v, dtype=torch.float64).expand(8).view(8, 1, 1)

    rows = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True) * rule.centered
    z = F.conv2d(x, rows / rows.flatten(1).norm(dim=1).view(8, 1, 1, 1), padding=1)
    u = wide(layer.gain) * (z - wide(mean)) / wide(std) + wide(layer.bias)
    expected = (layer.activation(u) - wide(c)) / wide(d)
    layer.__class__ = so.SecondOrderConv2d
    layer.register_buffer("z_mean", mean)
    layer.register_buffer("z_std", std)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_no_output_depends_on_the_batch_or_the_mode():
    net, x, *_ = attached()
    before, together = moments(net), net(x)
    torch.testing.assert_close(net(x[:1]), together[:1])
    torch.testing.assert_close(net.eval()(x), together, rtol=0, atol=0)
    torch.testing.assert_close(moments(net), before, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert net[:3](x).dtype == torch.bfloat16


def test_hook_refreshes_every_third_step_until_it_is_removed():
    net, x, optimizer, handle = attached(every=3)
    assert [type(m) is so.SecondOrderConv2d for m in net if isinstance(m, NormPropConv2d)] == [True] * 4 + [
        False
    ]
    seen = [moments(net)]
    for _ in range(7):
        step(net, x, optimizer)
        seen.append(moments(net))
    changed = [not torch.equal(a[-1][1], b[-1][1]) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True, False]
    expected = so.propagate(net, so.data_field(x, net[0]))
    step(net, x, optimizer)
    step(net, x, optimizer)  # the ninth
    assert not torch.equal(moments(net)[1][1], expected[1][1])
    torch.testing.assert_close(moments(net), so.propagate(net, so.data_field(x, net[0])))
    handle.remove()
    last = moments(net)
    for _ in range(3):
        step(net, x, optimizer)
    torch.testing.assert_close(moments(net), last, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("at", "other"),
    [
        (1, NormPropConv2d(32, 32, 3, stride=2)),
        (1, NormPropConv2d(32, 32, 3, groups=2)),
        (1, NormPropConv2d(32, 32, (1, 3))),
        (1, NormPropConv2d(32, 32, 1, activation="prelu")),
        (1, nn.ReLU()),
        (2, nn.MaxPool2d(2, ceil_mode=True)),
        (3, nn.MaxPool2d(2)),
        (5, nn.MaxPool2d(2)),
        (5, nn.Identity()),
    ],
    ids=repr,
)
def test_what_has_no_rule_is_named(at, other):
    net = small_net()
    net[at] = other
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"second order|layer \d: second order"):
        so.attach_second_order(optimizer, net, smooth_fields(10))
    assert not any(isinstance(m, so.SecondOrderConv2d) for m in net)  # nothing half done
