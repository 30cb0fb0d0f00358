"""Constants against the reference table, mpmath, closed forms on paper and sampling."""

import math
import re
from functools import cache

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import normprop
from normprop import activations, gaussian

NAMES = activations.names()
GAUSSIANS = [(0.0, 1.0), (0.7, 0.3), (-1.5, 2.5)]

# Activation, then mean, sd, 1/sd, rms and jacobian as the reference table prints them.
PRINTED = [
    ("relu", "0.39894228", "0.58381937", "1.712859", "0.707107", "1.21117"),
    (nn.LeakyReLU(0.01), "0.394953", "0.586568", "1.7048", None, "1.2056"),
    (nn.LeakyReLU(0.1), "0.359048", "0.613257", "1.6306", None, "1.1588"),
    (nn.LeakyReLU(0.2), "0.319154", "0.646638", "1.5465", None, "1.1152"),
    (nn.PReLU(dtype=torch.float64), "0.29920671", "0.66462421", "1.504610", "0.728869", "1.09666"),
    ("tanh", "0.00000000", "0.62792873", "1.592537", "0.627929", "1.08527"),
    ("sigmoid", "0.50000000", "0.20827634", "4.801313", "0.541645", "1.01666"),
    (torch.erf, "0.00000000", "0.68158569", "1.467167", "0.681586", "1.10711"),
    ("gelu", "0.28209479", "0.58791497", "1.700926", "0.652090", "1.14841"),
    ("gelu_tanh", "0.28203859", "0.58791832", "1.700917", "0.652069", "1.14836"),
    ("silu", "0.20662096", "0.55953847", "1.787187", "0.596469", "1.10095"),
    ("mish", "0.24040389", "0.62813069", "1.592025", "0.672564", "1.10193"),
    ("elu", "0.16052057", "0.78687900", "1.270843", "0.803085", "1.03876"),
    ("selu", "0.00000000", "1.00000000", "1.000000", "1.000000", "1.03517"),
    ("softplus", "0.80605918", "0.52107053", "1.919126", "0.959816", "1.03948"),
    ("softsign", "0.00000000", "0.42780138", "2.337533", "0.427801", "1.11535"),
    ("hardswish", "0.16621670", "0.55130698", "1.813871", "0.575819", "1.08610"),
    ("hardtanh", "0.00000000", "0.71837215", "1.392036", "0.718372", "1.15017"),
    ("relu_squared", "0.50000000", "1.11803399", "0.894427", "1.224745", "1.26491"),
]
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# The same activations in mpmath, and where they are not smooth.
TRUTH = {
    "identity": (lambda u: u, ()),
    "relu": (lambda u: max(u, mp.mpf(0)), (0,)),
    "leaky_relu": (lambda u: u if u > 0 else mp.mpf(0.01) * u, (0,)),
    "prelu": (lambda u: u if u > 0 else u / 4, (0,)),
    "relu6": (lambda u: min(max(u, mp.mpf(0)), mp.mpf(6)), (0, 6)),
    "elu": (lambda u: u if u > 0 else mp.expm1(u), (0,)),
    "selu": (lambda u: SELU_SCALE * (u if u > 0 else SELU_ALPHA * mp.expm1(u)), (0,)),
    "celu": (lambda u: u if u > 0 else mp.expm1(u), (0,)),
    "gelu": (lambda u: u * mp.ncdf(u), ()),
    "gelu_tanh": (
        lambda u: u / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (u + mp.mpf("0.044715") * u**3))),
        (),
    ),
    "silu": (lambda u: u / (1 + mp.exp(-u)), ()),
    "mish": (lambda u: u * mp.tanh(mp.log1p(mp.exp(u))), ()),
    "hardswish": (lambda u: u * min(max(u + 3, mp.mpf(0)), mp.mpf(6)) / 6, (-3, 3)),
    "hardsigmoid": (lambda u: min(max(u + 3, mp.mpf(0)), mp.mpf(6)) / 6, (-3, 3)),
    "hardtanh": (lambda u: min(max(u, mp.mpf(-1)), mp.mpf(1)), (-1, 1)),
    "sigmoid": (lambda u: 1 / (1 + mp.exp(-u)), ()),
    "logsigmoid": (lambda u: -mp.log1p(mp.exp(-u)), ()),
    "tanh": (mp.tanh, ()),
    "softplus": (lambda u: mp.log1p(mp.exp(u)), ()),
    "softsign": (lambda u: u / (1 + abs(u)), (0,)),
    "tanhshrink": (lambda u: u - mp.tanh(u), ()),
    "relu_squared": (lambda u: max(u, mp.mpf(0)) ** 2, (0,)),
    "abs": (abs, (0,)),
    "erf": (mp.erf, ()),
}

# Callables whose kinks and jumps the library has to find.
UNKNOWN = {
    "kinks at -1.7, 0.3, 2.3": (
        lambda u: (u - 0.3).abs().clamp(max=2),
        lambda u: min(abs(u - mp.mpf("0.3")), mp.mpf(2)),
        ("-1.7", "0.3", "2.3"),
    ),
    "step": (lambda u: (u > 0.37).to(u.dtype), lambda u: mp.mpf(u > 0.37), ("0.37",)),
    "step at 0": (lambda u: (u > 0).to(u.dtype), lambda u: mp.mpf(u > 0), ("0",)),
    "sharp tanh": (
        lambda u: torch.tanh(50 * u),
        lambda u: mp.tanh(50 * u),
        ("-.3", "-.1", "0", ".1", ".3"),
    ),
    "relu": (lambda u: u.clamp_min(0), lambda u: max(u, mp.mpf(0)), ("0",)),
    "round": (torch.round, mp.nint, tuple(str(k + 0.5) for k in range(-32, 32))),
    "sine": (torch.sin, mp.sin, ()),
    "module": (nn.Sequential(nn.Softshrink(0.8), nn.Tanh()), None, ("-0.8", "0.8")),
}
UNKNOWN["module"] = (
    UNKNOWN["module"][0],
    lambda u: mp.tanh(mp.sign(u) * max(abs(u) - mp.mpf("0.8"), 0)),
    UNKNOWN["module"][2],
)


def label(phi):
    return phi if isinstance(phi, str) else getattr(phi, "__name__", repr(phi))


def expectations(phi, kinks, mean, std):
    """Mean, variance and mean squared slope of phi(u), u ~ N(mean, std^2), to 20 digits."""
    with mp.workdps(30):
        mean, std, h = mp.mpf(mean), mp.mpf(std), mp.mpf(10) ** -13
        inside = [t for t in ((mp.mpf(k) - mean) / std for k in kinks) if abs(t) < 12]
        edges = sorted({mp.mpf(e) for e in range(-12, 13, 2)} | set(inside))

        def under_gaussian(f):
            return mp.quad(lambda t: f(mean + std * t) * mp.npdf(t), edges, method="gauss-legendre")

        first = under_gaussian(phi)
        second = under_gaussian(lambda u: phi(u) ** 2)
        slope = under_gaussian(lambda u: ((phi(u + h) - phi(u - h)) / (2 * h)) ** 2)
        return tuple(float(value) for value in (first, second - first**2, slope))


@cache
def truth(name, mean, std):
    return expectations(*TRUTH[name], mean, std)


def numbers(result):
    return tuple(value.item() if isinstance(value, torch.Tensor) else value for value in result)


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: label(row[0]))
def test_constants_equal_the_reference_table_to_its_last_digit(row):
    phi, *printed = row
    m = normprop.moments(phi)
    mean, var, std, _, jacobian = numbers(m)
    for text, value in zip(printed, (mean, std, 1 / std, math.hypot(mean, std), jacobian), strict=True):
        if text is not None:
            half_unit = 0.501 * 10.0 ** -len(text.split(".")[1])
            assert abs(value - float(text)) <= half_unit
    assert std == pytest.approx(var**0.5, abs=1e-15)


def test_truths_cover_the_table():
    assert set(TRUTH) == set(NAMES)


@pytest.mark.parametrize(("mean", "std"), GAUSSIANS)
@pytest.mark.parametrize("name", NAMES)
def test_table_agrees_with_mpmath(name, mean, std):
    phi = activations.as_module(name).double()
    result = numbers(normprop.moments(phi, mean, std))
    first, var, slope = truth(name, mean, std)
    expected = (first, var, var**0.5, slope, std * (slope / var) ** 0.5)
    assert result == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.parametrize(("mean", "std"), GAUSSIANS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_callables_of_unknown_kinks_agree_with_mpmath(name, mean, std):
    phi, exact, kinks = UNKNOWN[name]
    m = normprop.moments(phi, mean, std)
    first, var, slope = expectations(exact, kinks, mean, std)
    assert (m.mean, m.var) == pytest.approx((first, var), rel=0, abs=1e-6)
    if "step" not in name and name != "round":  # a jump's slope is 0 by quadrature, infinite by limits
        assert m.slope == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_variance_agree_with_sampling(name):
    y = activations.as_module(name).double()(torch.randn(400_000, dtype=torch.float64)).detach()
    mean, var, *_ = numbers(normprop.moments(name))
    for sample, value in ((y, mean), ((y - mean) ** 2, var)):
        standard_error = sample.std() / sample.numel() ** 0.5
        assert abs(sample.mean() - value) < 5 * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("phi", [*NAMES, UNKNOWN["step"][0]], ids=label)
def test_per_channel_tensors_agree_with_numbers(phi, dtype):
    mean, std = torch.tensor(GAUSSIANS, dtype=dtype).T
    phi = activations.as_module(phi).to(dtype)
    together = normprop.moments(phi, mean, std)
    for field in together:
        assert field.shape == mean.shape
        assert field.dtype == dtype
    for index in range(len(GAUSSIANS)):
        alone = normprop.moments(phi, mean[index].item(), std[index].item())
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[index], torch.as_tensor(b, dtype=dtype).squeeze())


def test_mean_and_std_broadcast():
    m = normprop.moments("gelu", torch.zeros(3, 1), torch.ones(4))
    assert m.mean.shape == m.jacobian.shape == (3, 4)
    torch.testing.assert_close(m.mean, torch.full((3, 4), normprop.moments("gelu").mean))
    assert normprop.moments("relu", 0.5, torch.tensor([1.0, 2.0])).var.shape == (2,)


@pytest.mark.parametrize(
    "phi", [*NAMES, UNKNOWN["kinks at -1.7, 0.3, 2.3"][0], UNKNOWN["sine"][0]], ids=label
)
def test_gradients_with_respect_to_mean_and_std(phi):
    mean, std = (t.requires_grad_() for t in torch.tensor(GAUSSIANS, dtype=torch.float64).T.clone())
    phi = activations.as_module(phi).double()
    # A column of zeros is no gradient to check: identity's slope is 1 everywhere.
    assert gradcheck(lambda m, s: normprop.moments(phi, m, s)[:3], (mean, std))
    if phi.__class__ is not nn.Identity:
        assert gradcheck(lambda m, s: normprop.moments(phi, m, s)[3], (mean, std))


@pytest.mark.parametrize("jump", [0.0, 0.37, 1.0])
def test_gradient_of_a_jump(jump):
    mean, std = torch.tensor([0.2, 1.1], dtype=torch.float64, requires_grad=True), 0.9
    normprop.moments(lambda u: (u > jump).to(u.dtype), mean, std).mean.sum().backward()
    z = (mean.detach() - jump) / std
    torch.testing.assert_close(mean.grad, gaussian.pdf(z) / std)


def test_gradients_with_respect_to_the_slope_of_prelu():
    phi = nn.PReLU(3, dtype=torch.float64)
    phi.weight.data.copy_(torch.tensor([0.25, 0.0, -0.7]))
    a = phi.weight.detach()
    m = normprop.moments(phi)
    torch.testing.assert_close(m.mean, (1 - a) / math.sqrt(2 * math.pi))
    torch.testing.assert_close(m.var, ((1 + a**2) - (1 - a) ** 2 / math.pi) / 2)
    torch.testing.assert_close(m.slope, (1 + a**2) / 2)
    known = {
        "mean": torch.full_like(a, -1 / math.sqrt(2 * math.pi)),
        "var": a + (1 - a) / math.pi,
        "slope": a,
    }
    for name, expected in known.items():
        (grad,) = torch.autograd.grad(getattr(m, name).sum(), phi.weight, retain_graph=True)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.7])
def test_a_std_of_zero_gives_the_value_itself(name, mean):
    m = normprop.moments(name, torch.tensor([mean]), torch.tensor([0.0]))
    torch.testing.assert_close(m.mean, activations.as_module(name)(torch.tensor([mean])))
    assert m.std.item() == pytest.approx(0, abs=1e-14)
    assert all(map(math.isfinite, numbers(m)))
    assert all(map(math.isfinite, numbers(normprop.moments(name, mean, 0.0))))
    assert m.jacobian.item() == 1  # its limit: any smooth function is affine at a point


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_is_never_below_one(name):
    mean, std = torch.linspace(-4, 4, 9, dtype=torch.float64), 0.8
    phi = activations.as_module(name).double()
    assert (normprop.moments(phi, mean, std).jacobian >= 1 - 1e-9).all()
    assert (normprop.moments("identity", mean, std).jacobian == 1).all()


@pytest.mark.parametrize(
    ("name", "gamma"),
    [
        ("relu", 1.713959),
        ("gelu", 1.701504),
        ("silu", 1.788129),
        ("tanh", 1.593912),
        ("elu", 1.271600),
        ("sigmoid", 4.803835),
    ],
)
def test_sampled_gammas_of_nfnet_agree(name, gamma):
    # Brock et al. sampled theirs: off by about 1e-3 (2.5e-3 at sigmoid's 4.8).
    assert 1 / normprop.moments(name).std == pytest.approx(gamma, rel=2e-3)


@pytest.mark.parametrize(
    ("same", "phi"),
    [
        ("relu", F.relu),
        ("relu", torch.relu),
        ("relu", nn.ReLU(inplace=True)),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("gelu_tanh", lambda u: F.gelu(u, approximate="tanh")),
        ("silu", F.silu),
        ("hardtanh", lambda u: u.clamp(-1, 1)),
        ("relu", lambda u: u.relu_()),
        ("leaky_relu", F.leaky_relu),
        ("elu", lambda u: F.elu(u)),
        ("tanh", torch.tanh),
    ],
    ids=label,
)
def test_every_spelling_of_an_activation_has_its_constants(same, phi):
    expected, got = normprop.moments(same, 0.3, 1.2), normprop.moments(phi, 0.3, 1.2)
    assert got == pytest.approx(tuple(expected), rel=0, abs=1e-6)


ERRORS = [
    ("swosh", ValueError, r"unknown activation 'swosh'; names: identity, relu"),
    (torch.log, ValueError, r"log must be finite on \[-27, 27\]: log\(-27\) = nan"),
    (lambda u: 1 / u, ValueError, r"must be finite on \[-27, 27\]: <lambda>\(.*\) = inf"),
    (nn.Softmax(dim=-1), ValueError, "Softmax must be element-wise: an element's output depends"),
    (lambda u: u - u.mean(), ValueError, "must be element-wise: an element's output depends"),
    (torch.mean, ValueError, "mean must be element-wise: it turned shape (4105,) into ()"),
    (lambda u: u[:7], ValueError, "<lambda> must be element-wise: it turned shape (4105,) into (7,)"),
    (lambda u: None, TypeError, "<lambda> must return a tensor, got NoneType"),
    (lambda u: u > 0, TypeError, "<lambda> must return floating point, got torch.bool"),
    (nn.Dropout(0.5), ValueError, "Dropout is random: two calls on one input differ"),
    (nn.Linear(3, 3), ValueError, "Linear failed on a float64 tensor of shape (4105,): RuntimeError"),
    (nn.ReLU, TypeError, "activation must be an instance: write ReLU() for ReLU"),
    (None, TypeError, "activation must be a name, an nn.Module or a callable, got None; names: identity"),
    (3.0, TypeError, "activation must be a name, an nn.Module or a callable, got 3.0"),
]


@pytest.mark.parametrize(("phi", "kind", "message"), ERRORS, ids=label)
def test_what_is_no_activation_is_refused(phi, kind, message):
    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises(kind, match=pattern):
        normprop.moments(phi)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": -1.0}, "std must be at least 0, got -1.0"),
        ({"std": math.nan}, "std must be finite, got nan"),
        ({"std": math.inf}, "std must be finite, got inf"),
        ({"mean": math.nan}, "mean must be finite, got nan"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        normprop.moments("relu", **arguments)


@pytest.mark.parametrize(("mean", "got"), [("1", "str"), (torch.tensor(1j), "torch.complex64")])
def test_what_is_no_number_is_refused(mean, got):
    with pytest.raises(TypeError, match=f"mean must be a real number or a tensor of them, got {got}"):
        normprop.moments("relu", mean)


@pytest.mark.parametrize("name", ["gelu", "silu", "relu"])
def test_inference_mode_changes_no_moment(name):
    with torch.inference_mode():
        inside = (
            activations.moments(name),
            activations.moments(name, torch.tensor([0.3]), torch.tensor([2.0])),
        )
        layer = normprop.NormPropLinear(3, 4, activation=name)
    outside = activations.moments(name), activations.moments(name, torch.tensor([0.3]), torch.tensor([2.0]))
    assert inside == outside
    assert layer.initial_gain == normprop.NormPropLinear(3, 4, activation=name).initial_gain


def test_a_celu_that_grows_to_the_left():
    def celu(u):
        return u if u > 0 else -mp.expm1(-u)

    found = normprop.moments(nn.CELU(-1.0), 0.3, 0.8)
    density = lambda u: mp.npdf(u, 0.3, 0.8)  # noqa: E731
    ends = [-12, -3, 0, 3, 12]
    mean = mp.quad(lambda u: celu(u) * density(u), ends)
    var = mp.quad(lambda u: (celu(u) - mean) ** 2 * density(u), ends)
    assert found.mean == pytest.approx(float(mean), abs=1e-10)
    assert found.var == pytest.approx(float(var), abs=1e-10)


@pytest.mark.parametrize(("beta", "threshold"), [(100.0, 20.0), (1000.0, 20.0), (1.0, 1.0), (5.0, 3.0)])
def test_a_softplus_of_any_sharpness(beta, threshold):
    def softplus(u):
        return u if beta * u > threshold else mp.log1p(mp.exp(beta * u)) / beta

    ends = [-12, -3, -1 / beta, 0, 1 / beta, threshold / beta, 3 + threshold / beta, 32]
    mean = mp.quad(lambda u: softplus(u) * mp.npdf(u), ends)
    assert normprop.moments(nn.Softplus(beta, threshold)).mean == pytest.approx(float(mean), abs=1e-13)


def test_moments_of_mixed_precision_are_in_the_wider_one():
    mean, var = activations.mean_var(nn.ReLU(), torch.zeros(2), torch.ones(2, dtype=torch.float64))
    assert mean.dtype == var.dtype == torch.float64
