"""Distributions by formula, against closed forms and sampling."""

import math

import pytest
import torch
import torch.nn.functional as F

from normprop import Signal, activations

N = 1_000_000
GRID = 17 / 511  # distance of a Gaussian's nodes; the trapezoidal rule errs with its square at a kink
BINS = 1e-3  # 512 bins keep mean and variance to rounding, other moments to this


def sample(seed=0, n=N):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(signal, power):
    return float((signal.weights * signal.values.pow(power)).sum())


def assert_sampled(signal, x, powers=(1, 2, 3), slack=BINS):
    """Each raw moment within 5 standard errors of the sample's."""
    for power in powers:
        y = x.pow(power)
        error = float(y.std()) / math.sqrt(len(y))
        assert abs(moment(signal, power) - float(y.mean())) < 5 * error + slack * power**2, power


def assert_ordered(signal):
    assert bool((signal.values.diff() > 0).all())
    assert bool((signal.weights > 0).all())
    assert float(signal.weights.sum()) == pytest.approx(1, abs=1e-12)


# Signal, how it is drawn from Gaussians.
SIGNALS = {
    "gaussian": (lambda: Signal.gaussian(0.5, 2.0), lambda: 0.5 + 2 * sample()),
    "negative std": (lambda: Signal.gaussian(0.5, -2.0), lambda: 0.5 + 2 * sample()),
    "relu": (lambda: Signal.gaussian().apply(torch.relu)[0], lambda: sample().relu()),
    "in place": (lambda: Signal.gaussian().apply(F.relu_)[0], lambda: sample().relu()),
    "gelu": (lambda: Signal.gaussian(0.3, 1.2).apply(F.gelu)[0], lambda: F.gelu(0.3 + 1.2 * sample())),
    "affine": (lambda: Signal.gaussian().apply(torch.relu)[0].affine(-2.0, 1.0), lambda: 1 - 2 * sample().relu()),
    "plus": (
        lambda: Signal.gaussian().apply(torch.relu)[0].plus(Signal.gaussian(1.0, 0.5)),
        lambda: sample().relu() + 1 + 0.5 * sample(1),
    ),
    "times": (
        lambda: Signal.gaussian(1.0).times(Signal.gaussian().apply(torch.sigmoid)[0]),
        lambda: (1 + sample()) * sample(1).sigmoid(),
    ),
    "mixture": (
        lambda: Signal.mixture([Signal.gaussian(-1.0), Signal.gaussian(3.0, 0.5)], [1.0, 3.0]),
        lambda: torch.cat([sample()[: N // 4] - 1, 3 + 0.5 * sample(1)[: 3 * N // 4]]),
    ),
    "standardized": (
        lambda: Signal.gaussian().apply(torch.relu)[0].standardized(),
        lambda: (sample().relu() - 1 / math.sqrt(2 * math.pi)) / math.sqrt(0.5 - 0.5 / math.pi),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "draw"), SIGNALS.values(), ids=SIGNALS)
def test_agrees_with_sampling(build, draw):
    signal = build()
    assert_ordered(signal)
    assert_sampled(signal, draw())
    assert signal.rms**2 == pytest.approx(signal.mean**2 + signal.var)
    assert signal.std == pytest.approx(math.sqrt(signal.var))


@pytest.mark.parametrize("name", activations.names())
def test_apply_agrees_with_the_table_of_activations(name):
    module = activations.as_module(name).double()
    signal, slope = Signal.gaussian(0.2, 1.3).apply(module)
    with torch.no_grad():
        expected = activations.moments(name, 0.2, 1.3)
    # A jump of the derivative costs one cell's share of its square.
    assert signal.mean == pytest.approx(float(expected.mean), abs=GRID**2)
    assert signal.var == pytest.approx(float(expected.var), abs=GRID**2 * 10)
    assert slope == pytest.approx(float(expected.slope), abs=GRID)


def test_plus_adds_and_times_multiplies_exactly():
    a, b = Signal.gaussian(1.0, 2.0).apply(torch.relu)[0], Signal.gaussian(-0.5, 0.7)
    total, product = a.plus(b), a.times(b)
    assert (total.mean, total.var) == pytest.approx((a.mean + b.mean, a.var + b.var), rel=1e-12)
    assert product.mean == pytest.approx(a.mean * b.mean, rel=1e-9)
    assert product.var == pytest.approx(a.rms**2 * b.rms**2 - (a.mean * b.mean) ** 2, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize("phi", [lambda u: u, torch.relu, F.gelu], ids=["identity", "relu", "gelu"])
def test_maximum_agrees_with_sampling(phi, count):
    x = phi(sample(n=50_000 * count)).view(count, -1).amax(0)
    # A node's own share counts as below it: half a cell too much.
    assert_sampled(Signal.gaussian().apply(phi)[0].maximum(count), x, powers=(1, 2), slack=GRID / 2)


@pytest.mark.parametrize("count", [1, 2, 9, 64])
def test_maximum_of_uniform_values_has_the_beta_distribution(count):
    uniform = Signal.of(torch.linspace(0, 1, 4097, dtype=torch.float64), bins=4097).maximum(count)
    n = count
    tolerance = count / 4096  # a value's own share counts as below it
    assert uniform.mean == pytest.approx(n / (n + 1), abs=tolerance)
    assert uniform.var == pytest.approx(n / ((n + 1) ** 2 * (n + 2)), abs=tolerance)


def test_combination_is_the_standardised_weighted_sum():
    relu = Signal.gaussian().apply(torch.relu)[0]
    row = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    shape = relu.combination(row)
    assert (shape.mean, shape.var) == pytest.approx((0, 1), abs=1e-9)
    # Fourth cumulants of independent terms add; a mixture with the negative keeps even moments.
    cumulant = moment(relu.standardized(), 4) - 3
    expected = 3 + cumulant * float(row.pow(4).sum() / row.square().sum() ** 2)
    assert moment(shape, 4) == pytest.approx(expected, rel=0.01)  # 128 bins at each of three sums
    assert moment(shape, 3) == pytest.approx(0, abs=1e-9)


def test_rare_values_far_out_take_no_bins_from_the_others():
    few = Signal(
        *(torch.tensor(t, dtype=torch.float64) for t in ([-1.0, 1.0, 90.0], [0.5, 0.4999, 0.0001]))
    )
    row = torch.linspace(0.5, 1, 32).mul(torch.tensor([1.0, -1.0]).repeat(16))[None]
    share = float(row.pow(4).sum() / row.square().sum() ** 2)
    cumulant = moment(few.standardized(), 4) - 3
    assert moment(few.combination(row), 4) - 3 == pytest.approx(cumulant * share, rel=0.2)
    heavy, x = Signal.gaussian().apply(lambda u: u.pow(3))[0], sample().pow(3)
    assert heavy.times(heavy).plus(heavy).apply(torch.tanh)[0].std == pytest.approx(
        float((x * sample(1).pow(3) + sample(2).pow(3)).tanh().std()), rel=0.02
    )


def test_of_keeps_mean_and_variance_of_any_values():
    for x in (sample(n=5000).exp(), torch.tensor([1, 2, 10]), sample(n=70).bfloat16().view(7, 10).T):
        signal = Signal.of(x)
        exact = x.double()
        assert (signal.mean, signal.var) == pytest.approx(
            (float(exact.mean()), float(exact.var(correction=0)))
        )
        assert_ordered(signal)
    weighted = Signal.of(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 1.0]))
    assert (weighted.mean, weighted.var) == pytest.approx((2.5, 2.25))


def test_constants():
    three = Signal.constant(3.0)
    z = Signal.gaussian()
    assert (three.mean, three.var, three.rms) == (3, 0, 3)
    assert three.apply(torch.square)[0].mean == 9
    assert three.apply(torch.square)[1] == 36
    assert three.maximum(5).mean == three.affine(0.0, 3.0).mean == z.affine(0.0, 3.0).mean == 3
    assert three.plus(three).mean == 6
    assert three.standardized().mean == three.standardized().var == 0
    assert z.plus(three).mean == pytest.approx(3)
    assert z.apply(torch.sign)[1] == 0
    assert Signal.of(torch.full((4,), 7.0)).var == Signal.gaussian(2.0, 0.0).var == 0
    assert three.combination(torch.ones(1, 2)).var == pytest.approx(
        1
    )  # nothing known of its shape: Gaussian


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad):
    assert math.isnan(Signal.of(torch.tensor([1.0, bad])).mean)
    assert math.isnan(Signal.gaussian(bad).plus(Signal.gaussian()).mean)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e100])
def test_any_scale(scale):
    z = Signal.gaussian().affine(scale)
    assert z.plus(z).std == pytest.approx(math.sqrt(2) * scale)
    assert z.maximum(4).mean == pytest.approx(1.029375 * scale, rel=GRID)
    assert z.standardized().std == pytest.approx(1)


def test_a_small_spread_on_a_large_mean_is_kept():
    assert Signal.gaussian(1e6, 1e-3).plus(Signal.gaussian(0.0, 1e-3)).std == pytest.approx(
        math.sqrt(2) * 1e-3
    )


def test_values_without_weight_do_not_count():
    signal = Signal.mixture([Signal.constant(0.0), Signal.constant(1.0)], [1.0, 0.0])
    assert (signal.mean, signal.var) == (0, 0)
