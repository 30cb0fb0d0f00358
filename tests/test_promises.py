"""The promises hold for our layers, and the checks fail for BatchNorm, naming it."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normprop
from normprop import NormalizedAdd
from normprop.testing import (
    assert_accumulation_equals_batch,
    assert_batch_independent,
    assert_train_equals_eval,
)


class Residual(nn.Module):
    def __init__(self, channels, rule):
        super().__init__()
        self.body = normprop.NormPropConv2d(channels, channels, 3, padding=1, activation="gelu", rule=rule)
        self.add = NormalizedAdd.residual(4)

    def forward(self, x):
        return self.add(x, self.body(x))


def ours(rule=normprop.RECOMMENDED, *more):
    return nn.Sequential(
        normprop.NormPropConv2d(3, 8, 3, stride=2, padding=1, rule=rule.at(27, first=True)),
        Residual(8, rule),
        normprop.NormPropConvTranspose2d(8, 8, 4, stride=2, padding=1, activation="prelu", rule=rule),
        normprop.NormalizedActivation("silu", 8, rule),
        *more,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        normprop.NormPropLinear(8, 5, activation=None, rule=rule),
    )


def batch_norm(size=8):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def some_batch(n=6, size=8, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype), torch.randint(0, 5, (n,))


RULES = [normprop.PAPER, normprop.RECOMMENDED, normprop.NormRule(True, "affine", 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=normprop.modules.rule_name)
def test_our_layers_keep_every_promise(rule, dtype):
    model = ours(rule).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gain", "bias")):
                p.add_(torch.randn_like(p) * 0.2)
    before = copy.deepcopy(model.state_dict())
    for n, size in ((6, 8), (2, 1), (3, 7)):
        x, y = some_batch(n, size, dtype)
        assert_batch_independent(model, x)
        assert_train_equals_eval(model, x)
        assert_train_equals_eval(model, x[:1])
        for micro_batch in range(1, n):
            assert_accumulation_equals_batch(model, x, y, F.cross_entropy, micro_batch)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("random", "name"),
    [
        (nn.Dropout(0.5), "4 (Dropout)"),
        (nn.Dropout2d(0.5), "4 (Dropout2d)"),
        (nn.RReLU(), "4 (RReLU)"),
        (normprop.BatchDataNorm((8, 8, 8)), "4 (BatchDataNorm)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_random_by_purpose_is_switched_off_and_said_so(random, name):
    model, (x, y) = ours(normprop.RECOMMENDED, random), some_batch()
    for check in (
        lambda: assert_batch_independent(model, x),
        lambda: assert_train_equals_eval(model, x),
        lambda: assert_accumulation_equals_batch(model, x, y, F.cross_entropy),
    ):
        with pytest.warns(UserWarning, match="switched off for this check") as caught:
            check()
        assert name in str(caught[0].message)
        assert caught[0].filename == __file__  # where the check is called
    assert random.training


def test_dropout_inside_modules_is_switched_off_too():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.inner(x)[0]

    class Attention(Last):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    x = torch.randn(3, 6, 4)
    both = (assert_batch_independent, assert_train_equals_eval)
    for model, name, checks in (
        (Last(), "inner (LSTM)", both),
        (Attention(), "inner (MultiheadAttention)", both[:1]),  # torch evaluates it with another kernel
    ):
        for check in checks:
            with pytest.warns(UserWarning, match=re.escape(f"switched off for this check: {name}")):
                check(model, x)
        assert model.inner.dropout == 0.5


def test_buffers_that_a_pass_changes_are_named():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
    why = r"; a forward pass changes the buffers 0\.parametrizations\.weight\.0\._u, 0\.par"
    with pytest.raises(AssertionError, match=f"output depends on the rest of its batch: .*{why}"):
        assert_batch_independent(nn.Sequential(layer, nn.Linear(64, 2)), torch.randn(4, 64))


def test_outputs_of_whole_numbers_are_compared():
    class Classes(nn.Module):
        def forward(self, x):
            return x.argmax(1, keepdim=True) if self.training else x.argmin(1, keepdim=True)

    x = torch.eye(3)
    assert_batch_independent(Classes(), x)
    with pytest.raises(AssertionError, match=r"train\(\) and eval\(\) differ"):
        assert_train_equals_eval(Classes(), x)


def test_randomness_that_nobody_announced_fails():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    model, (x, _) = ours(normprop.RECOMMENDED, Noise()), some_batch()
    why = "; but two passes over the same data differ too: the model draws random numbers"
    with pytest.raises(AssertionError, match=rf"train\(\) and eval\(\) differ by .*{why}"):
        assert_train_equals_eval(model, x)
    with pytest.raises(AssertionError, match=f"output depends on the rest of its batch: .*{why}"):
        assert_batch_independent(model, x)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda m, x, y: assert_batch_independent(m, x),
            "sample 0's output depends on the rest of its batch",
        ),
        (
            lambda m, x, y: assert_train_equals_eval(m, x),
            r"train\(\) and eval\(\) differ by .* of the largest",
        ),
        (
            lambda m, x, y: assert_accumulation_equals_batch(m, x, y, F.cross_entropy, 2),
            "samples in micro-batches of 2 give a gradient that differs",
        ),
    ],
    ids=["batch", "eval", "accumulation"],
)
def test_batch_norm_breaks_every_promise_by_name(check, message):
    model, (x, y) = batch_norm(), some_batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AssertionError, match=message) as caught:
        check(model, x, y)
    assert "batch statistics in 1.0 (BatchNorm2d)" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda m, x, y: assert_batch_independent(m, x),
            "the model fails on sample 0 alone: Expected more than 1",
        ),
        (
            lambda m, x, y: assert_train_equals_eval(m, x[:1]),
            "the model fails in train mode: Expected more than 1",
        ),
        (
            lambda m, x, y: assert_accumulation_equals_batch(m, x, y, F.cross_entropy),
            "the model fails on a micro-batch of 1: Expected more than 1",
        ),
    ],
    ids=["batch", "eval", "accumulation"],
)
def test_batch_norm_of_a_single_value_raises_and_is_named(check, message):
    with pytest.raises(AssertionError, match=message) as caught:
        check(batch_norm(), *some_batch(4, 1))
    assert "batch statistics in 1.0 (BatchNorm2d)" in str(caught.value)


def test_a_changing_buffer_is_told():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    with pytest.raises(AssertionError, match=r"a forward pass changes the buffers 4\.calls"):
        assert_train_equals_eval(ours(normprop.PAPER, Counter()), some_batch()[0])


def test_other_norms_without_batch_statistics_pass():
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)):
        model, (x, y) = (
            nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            some_batch(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_batch_independent(model, x)
            assert_train_equals_eval(model, x)
            assert_accumulation_equals_batch(model, x, y, F.cross_entropy)


def test_batch_independence_needs_two_samples():
    with pytest.raises(ValueError, match="x needs at least 2 samples, got 1"):
        assert_batch_independent(ours(), some_batch(1)[0])


def test_a_nan_is_no_promise_kept():
    class Broken(nn.Module):
        def forward(self, x):
            return (x - x) / (x - x)

    with pytest.raises(AssertionError, match="the model returns NaN"):
        assert_batch_independent(Broken(), torch.randn(3, 2))
    with pytest.raises(AssertionError, match="the model returns NaN"):
        assert_train_equals_eval(Broken(), torch.randn(3, 2))


# --- merges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "add",
    [
        NormalizedAdd(),
        NormalizedAdd((3.0, -1.0, 0.5)),
        NormalizedAdd.residual(1),
        NormalizedAdd.residual(16),
    ],
)
def test_an_add_keeps_variance_1(add):
    y = add(*torch.randn(len(add.weights), 200_000, dtype=torch.float64))
    square = y.square()
    assert abs(y.mean()) < 5 * y.std() / len(y) ** 0.5
    assert abs(square.mean() - 1) < 5 * square.std() / len(y) ** 0.5


def test_an_add_is_the_weighted_sum():
    a, b = torch.randn(2, 5)
    torch.testing.assert_close(NormalizedAdd((3.0, 4.0))(a, b), 0.6 * a + 0.8 * b)
    torch.testing.assert_close(NormalizedAdd.residual(4)(a, b), 0.75**0.5 * a + 0.5 * b)
    assert repr(NormalizedAdd((3.0, 4.0))) == "NormalizedAdd(0.6, 0.8)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalizedAdd(()), "weights must be finite and not all zero, got "),
        (lambda: NormalizedAdd((0.0, 0.0)), "weights must be finite and not all zero"),
        (lambda: NormalizedAdd((1.0, float("nan"))), "weights must be finite and not all zero"),
        (lambda: NormalizedAdd.residual(0), "blocks must be at least 1, got 0"),
        (lambda: NormalizedAdd()(torch.ones(1)), "expected 2 branches, got 1"),
    ],
)
def test_bad_adds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_list_of_weights_is_refused():
    with pytest.raises(TypeError, match="weights must be numbers, one a branch, got 3"):
        NormalizedAdd(3)
    torch.testing.assert_close(
        NormalizedAdd(torch.tensor([3.0, 4.0])).initial, NormalizedAdd((3.0, 4.0)).initial
    )


def test_the_checks_refuse_what_they_cannot_judge():
    net = nn.Sequential(normprop.NormPropLinear(3, 2))
    x, y = torch.randn(4, 3), torch.zeros(4, 2)
    bad = x.clone()
    bad[0, 0] = float("nan")
    for check in (
        lambda: assert_batch_independent(net, bad),
        lambda: assert_train_equals_eval(net, bad),
        lambda: assert_accumulation_equals_batch(net, bad, y, F.mse_loss),
    ):
        with pytest.raises(ValueError, match="x holds NaN or infinite values"):
            check()
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        assert_accumulation_equals_batch(net, x, y, F.mse_loss, micro_batch=0)
    for labels, micro_batch in ((y, 4), (y[:3], 1)):
        with pytest.raises(
            ValueError, match=f"more samples than micro_batch={micro_batch} and y as many, got 4"
        ):
            assert_accumulation_equals_batch(net, x, labels, F.mse_loss, micro_batch)
    with pytest.raises(
        ValueError, match=r"shape \(8, 1\) .* of 4 samples and \(2, 1\) .* of one; expected one row"
    ):
        assert_batch_independent(nn.Sequential(net, nn.Flatten(0), nn.Unflatten(0, (-1, 1))), x)
    for check in (assert_batch_independent, assert_train_equals_eval):
        with pytest.raises(
            TypeError, match="among the model's outputs is a str; these checks need a tensor"
        ):
            check(Returns(lambda net, x: {"out": net(x), "kind": "logits"}), x)
        with pytest.raises(TypeError, match="among the model's outputs is no tensor"):
            check(Returns(lambda net, x: None), x)
    with pytest.raises(ValueError, match="no trainable parameter"):
        assert_accumulation_equals_batch(net.requires_grad_(False), x, y, F.mse_loss)


class Returns(nn.Module):
    """What ``shape_up(layer, x)`` makes of a linear layer and the input."""

    def __init__(self, shape_up):
        super().__init__()
        self.net, self.shape_up = nn.Linear(3, 2), shape_up

    def forward(self, x):
        return self.shape_up(self.net, x)


def test_outputs_may_be_tensors_in_tuples_and_dicts():
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    fine = Returns(lambda net, x: {"out": net(x), "more": (x, [None, net(x).argmax(1)])})
    assert_batch_independent(fine, x)
    assert_train_equals_eval(fine, x)
    mixes = Returns(lambda net, x: (x, {"out": net(x - x.mean(0))}))
    with pytest.raises(AssertionError, match="sample 0's output depends on the rest of its batch"):
        assert_batch_independent(mixes, x)
    differs = Returns(lambda net, x: (x, net(x) * (2 if net.training else 1)))
    with pytest.raises(AssertionError, match=r"train\(\) and eval\(\) differ by 1 of the largest output"):
        assert_train_equals_eval(differs, x)
    auxiliary = Returns(lambda net, x: (net(x), net(x)) if net.training else net(x))
    with pytest.raises(
        AssertionError, match=r"shape \(4, 2\) \(float32\), \(4, 2\) \(float32\), eval\(\) of \(4, 2\)"
    ):
        assert_train_equals_eval(auxiliary, x)
    assert_batch_independent(auxiliary, x)
    counts = Returns(lambda net, x: (net(x), torch.full((len(x),), 1000 + len(x))))
    with pytest.raises(AssertionError, match="sample 0's output depends on the rest of its batch"):
        assert_batch_independent(counts, x)
    pairs = Returns(lambda net, x: (net(x)[:, :0], x @ x.T))
    with pytest.raises(AssertionError, match=r"alone it has shape \(1, 1\), with 4 samples \(4, 4\)"):
        assert_batch_independent(pairs, x)
    widens = Returns(lambda net, x: net(x) if net.training else net(x).double())
    with pytest.raises(AssertionError, match=r"\(4, 2\) \(float32\), eval\(\) of \(4, 2\) \(float64\)"):
        assert_train_equals_eval(widens, x)
    several = Returns(lambda net, x: [net(x)] * len(x))
    with pytest.raises(ValueError, match=r"\(4, 2\) \(float32\), .* of 4 samples and \(1, 2\)"):
        assert_batch_independent(several, x)


class TwoInputs(nn.Module):
    """A sum over the batch, if it is asked for, in the second input alone."""

    def __init__(self, mixes=False):
        super().__init__()
        self.a, self.b, self.mixes = nn.Linear(4, 3), nn.Embedding(5, 3), mixes

    def forward(self, x, category):
        y = self.b(category)
        return self.a(x) + (y - y.mean(0) if self.mixes else y)


def test_models_of_several_inputs():
    x = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 5
    y = torch.arange(6) % 3
    model = TwoInputs().double()
    assert_batch_independent(model, x)
    assert_train_equals_eval(model, x)
    assert_accumulation_equals_batch(model, x, y, F.cross_entropy, micro_batch=4)
    with pytest.raises(AssertionError, match="depends on the rest of its batch"):
        assert_batch_independent(TwoInputs(mixes=True).double(), x)
    with pytest.raises(AssertionError, match="differs from the whole batch"):
        assert_accumulation_equals_batch(TwoInputs(mixes=True).double(), x, y, F.cross_entropy)
    with pytest.raises(ValueError, match="as many samples in each input, got 6, 5"):
        assert_batch_independent(model, (x[0], x[1][:5]))


def test_a_loss_that_is_a_sum_is_refused():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="loss is a sum over samples; expected their mean"):
        normprop.testing.assert_accumulation_equals_batch(model, x, y, nn.MSELoss(reduction="sum"))
    normprop.testing.assert_accumulation_equals_batch(model, x, y, nn.MSELoss())


@pytest.mark.parametrize("check", [assert_batch_independent, assert_train_equals_eval])
def test_the_checks_take_modules_alone(check):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got Conversion; pass its \.model"):
        check(normprop.convert(nn.Sequential(nn.Linear(3, 2))), torch.randn(4, 3))
