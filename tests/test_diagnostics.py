"""What is measured, held against numpy, scipy and autograd by hand; what is shown of it."""

import itertools
import json
import math
import os
import struct
import sys

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normprop
from normprop import diagnostics
from normprop.cli import main
from normprop.diagnostics import DataError, measure
from normprop.graph.predict import predict
from normprop.graph.trace import TraceError
from normprop.recipes import InputError
from normprop.recipes.zoo import input_size, load_model
from normprop.records import Record, SignalTrace

pytestmark = pytest.mark.filterwarnings("default:::(torchvision|timm|matplotlib)")
DETAILS = {"coherence", "singular_values", "error_bound", "error", "error_columns"}


class InPlace(nn.Module):
    """Functions, in-place operations and a weight read by hand: what hooks on modules do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.add_(1.0)
        x.relu_()
        return F.linear(x, self.b.weight) * 3


def last(layer: nn.Module, x: Tensor) -> Record:
    return measure(nn.Sequential(layer), x).records[-1]


# --- values ---------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy_and_scipy():
    net, x = InPlace(), torch.randn(50, 6)
    trace = measure(net, x)
    z = net.a(x).detach()
    expected = {"x": x, "a": z, "add_": z + 1, "relu_": (z + 1).relu()}
    expected["linear"] = expected["relu_"] @ net.b.weight.detach().T
    expected["mul"] = expected["linear"] * 3
    assert [record.name for record in trace] == list(expected)
    for name, values in expected.items():
        array, record = values.double().numpy().ravel(), trace[name]
        assert record.shape == tuple(values.shape)
        ours = [record.mean, record.std, record.details["skew"], record.details["kurtosis"]]
        truth = [array.mean(), array.std(), scipy.stats.skew(array), scipy.stats.kurtosis(array)]
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)  # the values are float32


def test_gradients_are_those_of_autograd():
    """One sample and one output: the cotangent can only be 1 or -1."""
    net, x = InPlace(), torch.randn(1, 6).requires_grad_()
    trace = measure(net, x)
    a = net.a(x)
    added = a + 1
    relu = added.relu()
    linear = F.linear(relu, net.b.weight)
    output = linear * 3
    for name, node in {"x": x, "a": a, "add_": added, "relu_": relu, "linear": linear}.items():
        (grad,) = torch.autograd.grad(output.sum(), node, retain_graph=True)
        assert trace[name].gradient == pytest.approx(grad.norm().item(), rel=1e-5)
    assert trace["mul"].gradient == pytest.approx(1.0)


def test_the_gradient_of_several_outputs_counts_each_as_1():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x[:, 2:] * 3, "b": (x[:, :2] * 4, "text")}

    trace = measure(Two(), torch.randn(5, 7))
    assert trace["mul"].gradient == pytest.approx(1.0)
    assert trace["mul_1"].gradient == pytest.approx(1.0)
    assert trace["x"].gradient == pytest.approx(5.0)  # they read different elements: 3, 4, 5


def test_dead_units_are_counted_per_channel():
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([100.0, -100.0, -100.0, 100.0]))
    for x in (torch.randn(9, 3), torch.randn(2, 9, 3)):  # tokens: the channels stay last
        record = measure(nn.Sequential(linear, nn.ReLU()), x)["1"]
        assert record.details["dead"] == 0.5
        assert record.note == "50 % of the units are constant"
    conv = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([100.0, -100.0]))
    assert measure(nn.Sequential(conv, nn.ReLU()), torch.randn(1, 1, 2, 2))["1"].details["dead"] == 0.5
    layer = normprop.NormPropLinear(3, 4)
    with torch.no_grad():
        layer.bias[0] = -100
    assert last(layer, torch.randn(9, 3)).details["dead"] == 0.25
    assert last(layer, torch.randn(1, 3)).details["dead"] is None  # one value cannot vary


def plain_rows(layer: nn.Module) -> Tensor:
    """The weight rows that a linear layer applies, column by column."""
    zero = layer(torch.zeros(1, layer.in_features))
    return (layer(torch.eye(layer.in_features)) - zero).T.double().detach()


LAYERS = {
    "plain": lambda: nn.Linear(7, 4),
    "paper": lambda: normprop.NormPropLinear(7, 4, activation=None),
    "centred": lambda: normprop.NormPropLinear(7, 4, activation=None, rule=normprop.RECOMMENDED),
    "wide": lambda: nn.Linear(3, 6),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_details_of_weights(build):
    """Proposition 1 by a double loop, the singular values by a decomposition of their own."""
    layer = build()
    x = torch.randn(500, layer.in_features)
    details = last(layer, x).details
    rows = plain_rows(layer)
    pairs = list(itertools.permutations(range(len(rows)), 2))
    mu = max(abs(float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm())) for i, j in pairs)
    total = sum(float(rows[i].norm() ** 2 * rows[j].norm() ** 2) for i, j in pairs)
    bound = float(x.double().var(correction=0)) * mu * math.sqrt(total)
    assert details["coherence"] == pytest.approx(mu, rel=1e-4)
    assert details["error_bound"] == pytest.approx(bound, rel=1e-4)
    covariance = np.cov(layer(x).detach().double().numpy(), rowvar=False, bias=True)
    error = math.sqrt(sum(covariance[i, j] ** 2 for i, j in pairs))
    assert details["error"] == pytest.approx(error, rel=1e-4)
    assert details["error_columns"] == 500
    s = torch.linalg.svdvals(rows)
    truth = {"min": s.min(), "median": s.median(), "max": s.max(), "rms": s.square().mean().sqrt()}
    for name, value in truth.items():
        assert details["singular_values"][name] == pytest.approx(float(value), rel=1e-4, abs=1e-4)


def test_the_bound_holds_for_uncorrelated_input():
    """x over all corners of a cube is uncorrelated exactly, so the error is below the bound, not above by chance."""
    x = torch.tensor(list(itertools.product((-2.0, 2.0), repeat=8)), dtype=torch.float64)
    layer = normprop.NormPropLinear(
        8, 12, activation="gelu", rule=normprop.RECOMMENDED, dtype=torch.float64
    )
    details = last(layer, x).details
    assert 0 < details["error"] <= details["error_bound"]
    rows = plain_rows_of(layer)
    gram = 4 * rows @ rows.T  # s^2 = 4
    assert details["error"] == pytest.approx(float((gram - gram.diag().diag()).norm()), rel=1e-9)


def plain_rows_of(layer: normprop.NormPropLinear) -> Tensor:
    rows = layer.weight.detach()
    rows = rows - rows.mean(1, keepdim=True) * layer.rule.centered
    return rows / rows.norm(dim=1, keepdim=True) * layer.gain.detach()[:, None]


def test_singular_values_are_those_of_the_jacobian():
    """E[phi'^2]/var = (1/2) / ((1 - 1/pi)/2) = pi/(pi - 1) for ReLU: rows of that mean square (paper, sec. 3.3)."""
    layer = normprop.NormPropLinear(512, 256, rule=normprop.NormRule(gain=1.0), dtype=torch.float64)
    x = torch.randn(4, 512, dtype=torch.float64)  # as many as are looked at
    values = last(layer, x).details["singular_values"]
    jacobians = [torch.autograd.functional.jacobian(layer, sample) for sample in x]
    s = torch.cat([torch.linalg.svdvals(jacobian) for jacobian in jacobians])
    truth = {"min": s.min(), "median": s.median(), "max": s.max(), "rms": s.square().mean().sqrt()}
    for name, value in truth.items():
        # The square root of an eigenvalue that rounding leaves of 0.
        assert values[name] == pytest.approx(float(value), rel=1e-6, abs=1e-6)
    # rms^2 is pi/(pi-1) times twice the share of 1024 coins: standard error 1/sqrt(1024).
    assert abs(values["rms"] ** 2 * (math.pi - 1) / math.pi - 1) < 5 / math.sqrt(1024)


@pytest.mark.parametrize("activation", ["gelu", "prelu", None])
@pytest.mark.parametrize(
    "layer",
    [
        (normprop.NormPropConv1d, (8, 6, 3), {"groups": 2}),
        (normprop.NormPropConvTranspose2d, (8, 6, 2), {"stride": 2, "groups": 2}),
        (normprop.NormPropConv2d, (3, 5, 3), {"padding": 1}),
    ],
    ids=["conv1d", "conv_transpose2d", "conv2d"],
)
def test_details_of_convolutions_are_those_of_their_first_group(layer, activation):
    """One position at a time, a convolution is the linear layer of its unfolded filters."""
    kind, arguments, options = layer
    module = kind(*arguments, **options, activation=activation).double()
    spatial = len(module.kernel_size)
    x = torch.randn(2, module.in_channels, *[6] * spatial, dtype=torch.float64)
    details = last(module, x).details
    assert details.keys() >= DETAILS
    module.activation = None
    z = module(x).detach()[:, : module.out_channels // module.groups]
    covariance = torch.cov(z.movedim(1, 0).flatten(1), correction=0)
    error = (covariance - covariance.diag().diag()).norm()
    assert details["error"] == pytest.approx(float(error), rel=1e-9)
    # All taps of one output: an input that is as large as the kernel, by autograd.
    size = [k if not module.transposed else 1 for k in module.kernel_size]
    one = torch.zeros(1, module.in_channels, *size, dtype=torch.float64)
    module.padding = tuple(0 for _ in size)
    jacobian = torch.autograd.functional.jacobian(module, one)
    # Outputs of all phases together hold all taps of a transposed convolution's channel.
    taps = jacobian.movedim(1, 0).flatten(1, -1)
    rows = taps[: len(taps) // module.groups]
    square = float(rows.square().sum(1).mean())
    gains = module.gain[: len(rows)].detach().square().mean() * module.stretch**2
    assert square == pytest.approx(float(gains), rel=1e-9)
    if activation is None:
        smaller = min(len(rows), module.fan_in)
        assert details["singular_values"]["rms"] == pytest.approx(
            math.sqrt(square * len(rows) / smaller), rel=1e-9
        )


def test_what_would_take_too_long_is_none(monkeypatch):
    monkeypatch.setattr(diagnostics, "LARGEST_OUT", 3)
    details = last(nn.Linear(5, 4), torch.randn(9, 5)).details
    assert details["error"] is None
    assert details["error_bound"] > 0
    monkeypatch.setattr(diagnostics, "LARGEST_WEIGHT", 19)
    details = last(nn.Linear(5, 4), torch.randn(9, 5)).details
    assert all(details[name] is None for name in DETAILS)


def test_one_vector_is_measured_as_a_batch_of_one_is():
    layer, x = nn.Sequential(normprop.NormPropLinear(16, 4)), torch.randn(16)
    one, batch = normprop.measure(layer, x)[1], normprop.measure(layer, x[None])[1]
    assert (one.mean, one.std, one.details["dead"]) == (batch.mean, batch.std, None)


def test_overflow_and_single_units_are_measured():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.fill_(3e38)
    trace = measure(net, torch.ones(3, 4))
    assert trace["0"].std != trace["0"].std or math.isinf(trace["0"].mean)
    assert json.loads(trace.to_json())["records"][1]["mean"] is None
    assert last(nn.Linear(4, 1), torch.randn(3, 4)).details["coherence"] is None


# --- nothing changes ------------------------------------------------------------------------------


def test_the_model_and_the_random_state_stay_as_they_were():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    net[3].eval()
    net[0].weight.requires_grad_(False)
    x = torch.randn(5, 3, 6, 6)
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    flags = [m.training for m in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    attributes = [set(vars(m)) for m in net.modules()]
    copy, state = x.clone(), torch.get_rng_state()
    with torch.no_grad():
        first = measure(net, DataLoader(TensorDataset(x), batch_size=5, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert [m.training for m in net.modules()] == flags
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert torch.equal(x, copy)
    assert not x.requires_grad
    assert first["1"].std == pytest.approx(1.0, abs=1e-3)  # training: by the batch
    assert measure(net.eval(), x)["1"].std != pytest.approx(1.0, abs=0.1)  # by the running statistics


def test_the_same_seed_gives_the_same_records():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3))
    x = torch.randn(8, 6)
    texts = [measure(net, x, seed).to_json() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# --- prediction -----------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [normprop.NormPropLinear(512, 512, rule=normprop.RECOMMENDED) for _ in range(5)]
    return nn.Sequential(*layers), torch.randn(512, 512)


def cnn() -> tuple[nn.Module, Tensor]:
    conv = normprop.NormPropConv2d
    net = nn.Sequential(
        conv(3, 32, 3, padding=1),
        conv(32, 64, 3, padding=1, stride=2, rule=normprop.RECOMMENDED),
        conv(64, 64, 3, padding=1, activation="gelu", rule=normprop.RECOMMENDED),
        nn.Flatten(),
        normprop.NormPropLinear(4096, 32, activation=None),
    )
    return net, torch.randn(16, 3, 16, 16)


@pytest.mark.parametrize("build", [mlp, cnn])
def test_prediction_and_measurement_agree(build):
    net, x = build()
    trace = measure(net, x)
    assert [r.name for r in trace] == [r.name for r in trace.predicted] == [r.name for r in predict(net, x)]
    for measured, predicted in zip(trace, trace.predicted, strict=True):
        assert measured.shape == predicted.shape
        assert max(measured.std / predicted.std, predicted.std / measured.std) < 1.1, measured.name
        # Channels' means differ, and the last layer has 32 rows to weigh them: 1/sqrt(32) = 0.18.
        assert abs(measured.mean - predicted.mean) < 0.18, measured.name
        ratio = measured.gradient / predicted.gradient
        assert max(ratio, 1 / ratio) < 1.15, measured.name


# --- data -----------------------------------------------------------------------------------------


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_kinds_of_data():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = measure(net, x).to_json()
    loader = DataLoader(TensorDataset(x, torch.zeros(4)), batch_size=4)
    for data in (loader, [x, x[:2]], iter([{"image": x, "label": 3}]), (x,)):
        assert measure(net, data).to_json() == expected
    assert measure(Sum(), (x, x + 1))["add"].mean == pytest.approx(2 * float(x.mean()) + 1, abs=1e-6)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (torch.full((2, 3), math.nan), DataError, "input 0 holds NaN or infinite values"),
        (torch.full((2, 3), -math.inf), DataError, "input 0 holds NaN or infinite values"),
        (torch.zeros(0, 3), DataError, r"no data: input 0 has shape \(0, 3\)"),
        ([], DataError, "no data: there is not one batch"),
        (torch.zeros(2, 4), DataError, r"does not take data of shape \(2, 4\): .*mat1 and mat2 shapes"),
        (torch.zeros(2, 3).int(), DataError, r"does not take data of shape \(2, 3\): .*dtype"),
        ((torch.zeros(2, 3), torch.zeros(2)), DataError, r"the model takes 1 input\(s\), got 2"),
        (3, TypeError, "expected a tensor, .* or another iterable of batches, got int"),
        ("text", TypeError, "got str"),
        ([3], TypeError, "a batch must be a tensor"),
        (TensorDataset(torch.zeros(2, 3)), TypeError, "must come in batches: measure"),
    ],
)
def test_bad_data_is_told(data, kind, message):
    with pytest.raises(kind, match=message):
        measure(nn.Linear(3, 2), data)


def test_too_few_inputs_and_code_that_looks_at_shapes():
    with pytest.raises(DataError, match="positional argument"):
        measure(Sum(), torch.zeros(2, 3))

    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise RuntimeError("three channels, please")
            return x

    with pytest.raises(DataError, match=r"shape \(2, 4\): three channels, please"):
        measure(Picky(), torch.zeros(2, 4))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="cannot follow Branching"):
        measure(Branching(), torch.ones(2, 4))


# --- code that torch.fx cannot follow -------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        return x + weight * self.act(self.conv(x))


class Guarded(nn.Module):
    """A block is called twice, one also with a keyword, one activation by all; ``guard`` decides by the data."""

    def __init__(self, guard: bool) -> None:
        super().__init__()
        self.guard = guard
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([Residual(self.act), Residual(self.act)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        if self.guard and float(x.detach().abs().max()) > 1e9:
            return x
        first, second = self.blocks
        y = first(x)
        x = first(second(y) * 2) + y
        return self.head(second(x, weight=0.5))


def guarded() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net, plain = Guarded(True), Guarded(False)
    plain.load_state_dict(net.state_dict())
    return net, plain


def test_parts_are_measured_as_the_whole_is():
    (net, plain), x = guarded(), torch.randn(16, 3, 12, 10)
    found, whole = measure(net, x), measure(plain, x)
    pairs = {
        "stem": "stem", "act": "act", "blocks_0_conv": "blocks_0_conv", "blocks_0_act": "act_1",
        "blocks_0_add": "add", "blocks_1_conv": "blocks_1_conv", "blocks_0_1_conv": "blocks_0_conv_1",
        "blocks_0_1_add": "add_2", "head_2": "head_2",
    }  # fmt: skip
    for name, other in pairs.items():
        one, two = found[name], whole[other]
        assert (one.op, one.shape) == (two.op, two.shape)
        assert one.path.endswith(two.path)
        assert (one.mean, one.std) == pytest.approx((two.mean, two.std), rel=1e-5)
        assert one.gradient == pytest.approx(two.gradient, rel=1e-4)
        assert one.details.keys() == two.details.keys()
        for detail in {"skew", "coherence"} & one.details.keys():
            assert one.details[detail] == pytest.approx(two.details[detail], rel=1e-4)
    assert {record.path for record in found} >= {"stem", "act", "blocks.0.conv", "blocks.1.act", "head.2"}
    assert sum(record.op == "ReLU" for record in found) == 4  # but for the call with a keyword
    assert len({record.name for record in found}) == len(found)
    assert "its parts alone are shown: torch.fx cannot follow Guarded" in found[0].note
    assert net.training
    assert net.stem.weight.requires_grad
    assert net.stem.weight.grad is None
    assert "forward" not in vars(net.stem)


def test_parts_are_predicted_from_what_they_read():
    (net, _), x = guarded(), torch.randn(64, 3, 16, 16)
    found = measure(net, x)
    pairs = [(r, p) for r, p in found.shown() if not r.path.startswith("head")]  # its pool is a guess
    assert len(pairs) == 19
    for record, predicted in pairs:
        assert predicted is not None
        assert predicted.std == pytest.approx(record.std, rel=0.15), record
        if record.name == "act_input_1":
            assert record.gradient is None  # the activation writes over it
            continue
        assert predicted.gradient == pytest.approx(record.gradient, rel=0.25), record
    alone = normprop.predict(net, x)
    read = [record for record in alone if record.op == "input"]
    assert all((r.mean, r.std) == pytest.approx((0.0, 1.0), abs=1e-9) for r in read)
    assert all(r.note.startswith("taken as N(0, 1): it comes from code that is not followed") for r in read)
    assert "torch.fx cannot follow Guarded" in alone[0].note
    assert alone["blocks.1.conv"].std == pytest.approx(
        normprop.predict(Residual(nn.ReLU()), x.new_zeros(2, 8, 16, 16))["conv"].std, rel=0.1
    )
    assert [r.name for r in normprop.predict(net, x.to("meta"))] == [r.name for r in alone]


# --- shown ----------------------------------------------------------------------------------------


def test_table():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Identity(), nn.ReLU(), nn.Dropout())
    trace = measure(net, torch.randn(64, 3, 4))
    lines = trace.table().splitlines()
    columns = ["predicted", "std", "predicted", "gradient", "predicted", "note"]
    assert lines[0].split() == ["node", "op", "shape", "mean", *columns]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["input_1", "input", "64x3x4"],
        ["1", "Linear", "64x12"],
        ["3", "ReLU", "64x12"],
    ]
    assert lines[2].endswith("fan_in 12: a sum of few terms, not Gaussian")
    assert repr(trace) == str(trace) == trace.table()
    assert len(trace.table(every=True).splitlines()) == 1 + len(trace) == 7
    ends = {line.index("fan_in") for line in lines[1:] if "fan_in" in line}
    assert ends == {lines[0].index("note")}


def test_table_of_a_prediction_and_of_odd_numbers():
    records = [
        Record("layer_0_conv", "layer.0.conv", "Conv2d", (1, 2), 1e-12, 1.0, None),
        Record("add_1", "layer.0", "add", None, math.nan, math.inf, 1e-12),
        Record("layer_0_relu_1", "layer.0.relu", "ReLU", (2,), 123456.0, 2e-4, 0.0),
        Record("view", "", "view", (2,), 0.0, 1.0, 1.0),
    ]
    rows = [line.split() for line in SignalTrace(records).table().splitlines()]
    assert rows == [
        ["node", "op", "shape", "mean", "std", "gradient", "note"],
        ["layer.0.conv", "Conv2d", "1x2", "0.000", "1.000", "-"],
        ["layer.0:add_1", "add", "-", "nan", "inf", "1.0e-12"],
        ["layer_0_relu_1", "ReLU", "2", "1.2e+05", "2.0e-04", "0.000"],
    ]


def test_json_round_trip(tmp_path):
    trace = measure(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(16, 8))
    text = trace.to_json(tmp_path / "signal.json")
    assert (tmp_path / "signal.json").read_text() == text + "\n"
    assert os.listdir(tmp_path) == ["signal.json"]
    value = json.loads(text)
    for name, side in (("records", trace), ("predicted", trace.predicted)):
        again = [Record(**{**row, "shape": tuple(row["shape"])}) for row in value[name]]
        assert again == side.records
    assert json.loads(trace.predicted.to_json())["predicted"] is None


@pytest.mark.parametrize("depth", [1, 60])
def test_plot(tmp_path, depth):
    layers = [normprop.NormPropLinear(16, 16, activation="tanh") for _ in range(depth)]
    trace = measure(nn.Sequential(*layers), torch.randn(32, 16))
    for name, one in (("both.png", trace), ("predicted.png", trace.predicted)):
        one.plot(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert 1000 <= width <= 2500
        assert 700 <= height <= 1500
    assert len(os.listdir(tmp_path)) == 2


def test_plot_of_what_cannot_be_drawn(tmp_path):
    SignalTrace([Record("x", "", "input", None, math.nan, 0.0, None)]).plot(tmp_path / "a.png")
    SignalTrace([]).plot(tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))


def test_plot_says_that_matplotlib_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'normprop\[recipes\]'"):
        SignalTrace([]).plot(tmp_path / "x.png")


# --- command line ---------------------------------------------------------------------------------

FACTORIES = """
from torch import nn
def net(): return nn.Sequential(nn.Linear(20, 20), nn.Flatten(), nn.ReLU())
def wide(width): return nn.Linear(width, width)
def text(): return "no model"
number = 3
ready = nn.Flatten()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a module of models."""
    (tmp_path / "signalmodels.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("signalmodels", None)


def inspect(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *arguments])
    return stop.value.code


def test_inspect_prints_a_table_and_writes_files(folder, capsys):
    assert inspect("signalmodels:net", "--batch", "64", "--out", "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["node", "input_1", "0", "2", "run/signal.png,"]
    value = json.loads((folder / "run" / "signal.json").read_text())
    assert value["input_size"] == [20]
    assert (value["model"], value["batch"], value["seed"]) == ("signalmodels:net", 64, 0)
    assert len(value["records"]) == len(value["predicted"]) == 4
    assert sorted(os.listdir(folder / "run")) == ["signal.json", "signal.png"]
    assert inspect("signalmodels:net", "--batch", "64", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["records"] == value["records"]
    torch.save(nn.Sequential(nn.Linear(20, 3)), "model.pt")
    assert inspect("model.pt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"][-1]["shape"] == [8, 3]
    assert inspect("signalmodels:net", "--every") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_inspect_models_of_torchvision_and_timm(capsys):
    assert inspect("torchvision:resnet18", "--input-size", "3x32x32", "--batch", "2", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["records"][-1]["shape"] == [2, 1000]
    pytest.importorskip("timm")
    assert inspect("timm:resnet10t.c3_in1k", "--batch", "2", "--input-size", "3x32x32") == 0
    assert "layer4.0.act2" in capsys.readouterr().out


def test_inspect_converts_first(folder, capsys, monkeypatch):
    class Converted:
        model = nn.Linear(20, 3)

    monkeypatch.setattr(normprop, "convert", lambda model, example: Converted, raising=False)
    assert inspect("signalmodels:net", "--convert", "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"][-1]["shape"] == [8, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing"],
            "MODEL nothing: expected torchvision:NAME, timm:NAME, package.module:factory or a FILE.pt",
        ),
        (["torchvision:"], "MODEL torchvision:: expected torchvision:NAME"),
        (["torchvision:resnet1"], "there is no resnet1; did you mean resnet18, "),
        (["signalmodels:nett"], "there is no nett; did you mean net?"),
        (["nosuchmodule:net"], "there is no module nosuchmodule; expected"),
        (["signalmodels.deeper:net"], "there is no module signalmodels.deeper; expected"),
        (["signalmodels:wide"], "wide cannot be called without arguments (missing a required argument"),
        (["signalmodels:text"], "text() gives a str; expected an nn.Module"),
        (["signalmodels:number"], "number is a int; expected a callable"),
        (["signalmodels:net", "--batch", "0"], "--batch 0: expected at least 1"),
        (["signalmodels:net", "--batch", str(2**31)], f"--batch {2**31}: expected at most"),
        (["signalmodels:net", "--seed", str(2**32)], f"--seed {2**32}: expected 0 to {2**32 - 1}"),
        (["signalmodels:net", "--input-size", str(2**28)], "a batch of 8 is more than 2^31 numbers"),
        (["nowhere.pt"], "MODEL nowhere.pt: no such file"),
        (["signalmodels:net", "--input-size", "3x0"], "--input-size 3x0: expected whole numbers above 0"),
        (
            ["signalmodels:net", "--input-size", "3x9"],
            "does not take data of shape (8, 3, 9): mat1 and mat2",
        ),
        (["torch.nn:Identity"], "the model does not say what it reads; pass --input-size"),
        (["signalmodels:net", "--out", "signalmodels.py"], "--out signalmodels.py: cannot write there"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, capsys, arguments, message):
    assert inspect(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("normprop: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="MODEL timm:resnet18 needs timm: pip install timm"):
        load_model("timm:resnet18")


def test_models_by_name(folder):
    assert isinstance(load_model("signalmodels:ready"), nn.Flatten)
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)
    detector = load_model("torchvision:lraspp_mobilenet_v3_large")  # its backbone is not fetched
    assert input_size(detector, None) == (3, 224, 224)
    assert input_size(nn.Linear(5, 2), None) == (5,)
    assert input_size(nn.Linear(5, 2), "7X5") == (7, 5)


def test_an_identity_has_a_gradient_of_its_own():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.other = nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return 0.01 * self.same(x) + 10 * self.other(x)

    trace = measure(Branches(), torch.randn(64, 64))
    assert trace["same"].gradient == pytest.approx(0.01, rel=1e-3)
    assert trace["first"].gradient > 1.0


def test_an_identity_whose_output_is_written_to_is_its_input():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same = nn.Linear(64, 64), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.same(x).relu_()
            return x * 1.0

    assert measure(Written(), torch.randn(512, 64))["first"].gradient == pytest.approx(0.7, abs=0.05)
