"""Graphs of models, and their signals by formula against plain hooks on Gaussian data."""

import copy
import math
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from code_model import Code
from torch import nn

import normprop
from normprop import NormPropConv2d, NormPropLinear, NormRule, activations, predict
from normprop.graph import reading
from normprop.graph.predict import walk
from normprop.graph.reading import TraceError, key
from normprop.graph.trace import trace
from normprop.merges import NormalizedAdd, Standardize
from normprop.pools import NormalizedMaxPool2d

RECOMMENDED = normprop.RECOMMENDED


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- trace --------------------------------------------------------------------------------------


def looks_at_shapes(self, x):
    n, _, h, w = x.shape
    if h > 4 and len(x.shape) == 4:
        x = self.conv(x)
    for index in range(x.size(1)):
        x = x + x[:, index : index + 1]
    a, b = x.chunk(2, dim=1)
    return torch.cat([a, b, *x.split(1, 1)], 1).reshape(n, -1, h, w)


def is_functional(self, x):
    for _ in range(3):
        x = F.relu(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1))
    return F.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias)


def unpacks(self, x):
    values, indices = self.pool(self.conv(x))
    first, *others = values.unbind(1)
    return first + sum(others) * int(x.shape[0]) / float(len(others)), indices


def called_twice(self, x):
    return self.conv(self.act(self.conv(self.act(x))))


def keeps_constants(self, x):
    return self.conv(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1, 1) + torch.zeros(1)


def conv(channels=3, out=4):
    return nn.Conv2d(channels, out, 3, padding=1)


MODELS = {
    "shapes": lambda: Code(looks_at_shapes, conv=conv()),
    "functional": lambda: Code(is_functional, conv=conv(3, 3), fc=nn.Linear(3, 2)),
    "unpacks": lambda: Code(unpacks, conv=conv(), pool=nn.MaxPool2d(2, return_indices=True)),
    "constants": lambda: Code(keeps_constants, conv=conv()),
    "shared": lambda: Code(called_twice, conv=conv(3, 3), act=nn.ReLU()),
    "batch norm": lambda: nn.Sequential(OrderedDict(c=conv(), b=nn.BatchNorm2d(4), d=nn.Dropout())),
    "one layer": lambda: conv(),
    "ours": lambda: NormPropConv2d(3, 4, 3),
    "frozen": lambda: nn.Sequential(conv().requires_grad_(False), nn.BatchNorm2d(4).eval()),
}  # fmt: skip
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@every_model
def test_the_graph_computes_what_the_model_does_and_knows_its_shapes(build):
    model = build().eval()
    x = randn(2, 3, 7, 6)
    graph_module = trace(model, x)
    expected, actual = model(x), graph_module(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    seen = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    Shapes(graph_module).run(x)
    tensors = [n for n in graph_module.graph.nodes if n.op != "output" and torch.is_tensor(seen[n])]
    assert tensors
    for node in tensors:
        assert reading.shape(node) == tuple(seen[node].shape), node
        assert node.meta["value"].is_meta  # nothing was computed


@every_model
@pytest.mark.parametrize("train", [True, False])
def test_the_users_model_is_as_it_was(build, train):
    model = build()
    if train:
        model.train()
    before = copy.deepcopy(model.state_dict()), list(vars(model)), [m.training for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    random = torch.get_rng_state()
    for action in (trace, predict):
        action(model, randn(2, 3, 7, 6))
        after = model.state_dict(), list(vars(model)), [m.training for m in model.modules()]
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        assert after[1:] == before[1:]
        assert [id(p) for p in model.parameters()] == parameters
        assert torch.equal(torch.get_rng_state(), random)


def depends_on_data(self, x):
    x = self.conv(x) * torch.tensor([2.0])
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "code",
    [
        depends_on_data,
        lambda self, x: self.conv(x)[: int(x.max())],
        lambda self, x: [self.conv(x) for _ in range(int(x.mean().item()))],
        lambda self, x: self.conv(x) if bool((x > 0).any()) else x,
    ],
    ids=["if", "slice", "item", "bool"],
)
def test_control_flow_on_data_says_so(code):
    for example in (randn(2, 3, 7, 6), None):
        with pytest.raises(TraceError, match=r"torch\.fx cannot follow Code: \w+: \S+"):
            trace(Code(code, conv=conv()), example)


def test_a_failed_trace_leaves_no_constant_on_the_model():
    model = Code(depends_on_data, conv=conv())
    before = set(vars(model))
    with pytest.raises(TraceError):
        trace(model, randn(2, 3, 7, 6))
    assert set(vars(model)) == before


def test_without_shapes_the_way_out_is_named():
    model = Code(lambda self, x: x[:, : len(x)] * 2)  # no weight layer to guess an input from
    with pytest.raises(TraceError, match="pass example="):
        trace(model)
    assert trace(model, randn(2, 3))(randn(2, 3)).shape == (2, 2)


SPELLINGS = {
    "F.relu": (F.relu, nn.ReLU()),
    "torch.relu": (torch.relu, nn.ReLU()),
    "F.relu_": (F.relu_, nn.ReLU()),
    "x.relu()": (lambda x: x.relu(), nn.ReLU()),
    "x.relu_()": (lambda x: x.relu_(), nn.ReLU()),
    "F.relu inplace": (lambda x: F.relu(x, inplace=True), nn.ReLU()),
    "F.relu positional": (lambda x: F.relu(x, True), nn.ReLU()),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), nn.ReLU()),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), nn.Hardtanh(0, 6)),
    "F.hardtanh keywords": (lambda x: F.hardtanh(x, max_val=6.0), nn.Hardtanh(-1, 6)),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU(0.2)),
    "F.leaky_relu keyword": (
        lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
        nn.LeakyReLU(0.3),
    ),
    "F.gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "F.elu": (lambda x: F.elu(x, 0.5), nn.ELU(0.5)),
    "F.softplus": (lambda x: F.softplus(x, 2.0), nn.Softplus(2.0)),
    "x.sigmoid": (lambda x: x.sigmoid(), nn.Sigmoid()),
    "x.tanh_": (lambda x: x.tanh_(), nn.Tanh()),
    "F.silu": (lambda x: F.silu(x, inplace=True), nn.SiLU()),
    "F.hardswish": (F.hardswish, nn.Hardswish()),
    "F.selu": (F.selu, nn.SELU()),
    "torch.selu_": (torch.selu_, nn.SELU()),
    "F.softsign": (F.softsign, nn.Softsign()),
}


@pytest.mark.parametrize(("spelling", "module"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_an_activation_is_one_module(spelling, module):
    model = (
        Code(lambda self, x: self.act(x), act=spelling)
        if isinstance(spelling, nn.Module)
        else Code(lambda self, x: spelling(x))
    )
    graph_module = trace(model, randn(3))
    node = next(n for n in graph_module.graph.nodes if n.op.startswith("call"))
    found = reading.activation_of(node, reading.module_of(graph_module, node))
    assert type(found) is type(module)
    x = randn(64) * 5
    torch.testing.assert_close(found(x.clone()), spelling(x.clone()), rtol=0, atol=0)
    torch.testing.assert_close(found(x.clone()), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "code",
    [
        lambda x: F.leaky_relu(x, x.mean()),
        lambda x: F.softmax(x, 0),
        lambda x: F.glu(x[None]),
        lambda x: x + 1,
        lambda x: F.prelu(x, torch.ones(1)),
    ],
    ids=["slope of data", "softmax", "glu", "add", "prelu"],
)
def test_other_functions_are_no_activation(code):
    graph_module = trace(Code(lambda self, x: code(x)), randn(4))
    assert all(reading.activation_of(n, None) is None for n in graph_module.graph.nodes if n.op != "output")


def test_key_has_one_spelling():
    def code(self, x):
        y = x + 1
        y += x
        y = torch.add(y, x).add(x).add_(x)
        y = y - 1
        y = y * 2 / 3
        y = torch.cat([y, x]).flatten(0)
        return torch.concat([y, x.flatten()])

    keys = [key(n) for n in trace(Code(code), randn(2)).graph.nodes]
    adds = ["add"] * 5
    assert keys == ["placeholder", *adds, "sub", "mul", "div", "cat", "flatten", "flatten", "cat", "output"]


def test_a_weight_layer_is_found_behind_its_function():
    graph_module = trace(MODELS["functional"](), randn(2, 3, 5, 5))
    found = [reading.weight_source(graph_module, n) for n in graph_module.graph.nodes]
    assert [path for path, _ in filter(None, found)] == ["conv", "conv", "conv", "fc"]


# --- predict against hooks ----------------------------------------------------------------------


class Measured:
    """Mean, std and gradient norm of each module's output, by plain hooks: random output gradients."""

    def __init__(self, model, x):
        self.outputs = {}
        handles = [
            m.register_forward_hook(lambda m, args, y, name=n: self.outputs.__setitem__(name, y))
            for n, m in model.named_modules()
            if n
        ]
        y = model(x.clone().requires_grad_())
        for handle in handles:
            handle.remove()
        names = [n for n, v in self.outputs.items() if v.requires_grad]
        grads = torch.autograd.grad(
            y, [self.outputs[n] for n in names], randn(*y.shape, seed=9), allow_unused=True
        )
        scale = math.sqrt(y.numel())  # expected length of the output's gradient
        self.gradient = {
            n: float(g.norm()) / scale for n, g in zip(names, grads, strict=True) if g is not None
        }

    def __getitem__(self, name):
        y = self.outputs[name].detach()
        return float(y.mean()), float(y.std()), self.gradient.get(name)


def assert_predicted(model, x, names, mean=0.1, std=0.1, gradient=0.1):
    """|mean| in units of the std, std and gradient as ratios."""
    measured = Measured(model, x)
    found = predict(model, x)
    for name in names:
        m, s, g = measured[name]
        record = found[name]
        assert abs(record.mean - m) < mean * s, (name, record, m)
        assert abs(math.log(record.std / s)) < math.log1p(std), (name, record, s)
        assert abs(math.log(record.gradient / g)) < math.log1p(gradient), (name, record, g)
        assert record.shape == tuple(measured.outputs[name].shape)
    return found


def random_affine(model, seed=0):
    """Gains and biases as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("gain"):
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif name.endswith("bias"):
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


RULES = [normprop.PAPER, RECOMMENDED, NormRule(constants="affine"), NormRule(constants="none", gain=1.0)]


# A layer of width w has its own variance within sqrt(2/w): 9 % at 256; errors of three layers add.
@pytest.mark.parametrize("rule", RULES, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_normprop_mlp(rule, activation):
    torch.manual_seed(0)
    layers = [NormPropLinear(256 if i else 128, 256, activation=activation, rule=rule) for i in range(4)]
    net = random_affine(nn.Sequential(*layers, NormPropLinear(256, 256, activation=None, rule=rule)))
    assert_predicted(net, randn(2000, 128), "01234", mean=0.12, std=0.15, gradient=0.15)


@pytest.mark.parametrize("rule", RULES[:2], ids=lambda v: getattr(v, "__name__", str(v)))
def test_normprop_cnn(rule):
    torch.manual_seed(0)
    first = NormRule(gain=rule.gain)
    net = nn.Sequential(
        NormPropConv2d(3, 256, 3, padding=1, rule=first),
        NormPropConv2d(256, 256, 3, 2, 1, rule=rule),
        NormPropConv2d(256, 256, 1, rule=rule),
        NormPropConv2d(256, 256, 3, 1, 1, groups=4, activation=None, rule=rule),
    )
    assert_predicted(net, randn(16, 3, 12, 12), "0123", mean=0.12, std=0.12, gradient=0.15)


def test_small_maps_lose_energy_at_the_borders_not_in_the_middle():
    # Depthwise layers of few terms on a map not much larger than their kernels: taken as even, the
    # gradient came out at 0.36 of what it is and the std at up to 3.3 times.
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            NormPropConv2d(256, 256, 5, padding=2, groups=256, activation="silu", rule=RECOMMENDED)
            for _ in range(8)
        )
    )
    assert_predicted(net, randn(64, 256, 7, 7), "01234567", mean=0.1, std=0.2, gradient=0.25)


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(2), nn.ConstantPad2d(1, 2.0), nn.ReflectionPad2d(2)])
def test_padding_modules_do_what_they_are(pad):
    found = predict(nn.Sequential(pad, nn.Conv2d(3, 8, 3)), randn(1, 3, 8, 8))
    measured = pad(randn(400, 3, 8, 8))
    assert found["0"].std == pytest.approx(float(measured.std()), rel=0.02)
    assert found["0"].mean == pytest.approx(float(measured.mean()), abs=0.02)
    assert found["0"].note == ""


def test_what_a_maximum_never_takes_is_no_value():
    def body(self, x):
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3)

    found = predict(Code(body), randn(1, 3, 7, 7))
    assert [round(r.mean, 3) for r in found][1:] == [0, 1.485]


def test_unbatched_maps_and_learned_activations():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 16, 3, padding=1))
    one, many = predict(net, randn(8, 9, 9)), predict(net, randn(64, 8, 9, 9))
    assert [r.std for r in one] == pytest.approx([r.std for r in many], rel=0.06)
    assert_predicted(net, randn(64, 8, 9, 9), "012", mean=0.1, std=0.05, gradient=0.05)


def test_plain_nets():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(200, 300), nn.ReLU(inplace=False), nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 256), nn.Tanh()
    )  # fmt: skip
    assert_predicted(net, randn(4000, 200), "012345", mean=0.12, std=0.15, gradient=0.15)


def test_batch_norm_in_train_mode():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64),
    ).train()  # fmt: skip
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    buffers = copy.deepcopy(net)
    # BatchNorm's backward also takes out the gradient's mean and its share along the map: 2 of 64 * 144.
    assert_predicted(net, randn(32, 3, 12, 12), "01234567", mean=0.05, std=0.05, gradient=0.1)
    before = predict(buffers, randn(32, 3, 12, 12))
    # The hooks' forward moved the running statistics, which train mode does not read.
    assert [r.std for r in predict(net, randn(32, 3, 12, 12))] == [r.std for r in before]


def test_batch_norm_in_eval_mode_reads_its_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256)).eval()
    nn.init.normal_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.1, 2)
    assert_predicted(net, randn(4000, 256), "0123", std=0.12, gradient=0.15)


class Rectified(nn.Module):
    """``r <- relu(sqrt(1 - a^2) r + a f)``: DESIGN.md section 4."""

    def __init__(self, width, blocks, mean, std):
        super().__init__()
        self.entry = Standardize(mean, std)
        self.conv1 = NormPropConv2d(width, width, 3, padding=1, rule=RECOMMENDED)
        self.conv2 = NormPropConv2d(width, width, 3, padding=1, rule=RECOMMENDED, activation=None)
        self.add = NormalizedAdd.residual(blocks)
        self.relu = nn.ReLU()

    def forward(self, r):
        return self.relu(self.add(r, self.conv2(self.conv1(self.entry(r)))))


def moments_of_a_trunk(blocks):
    """The trunk's mean and std block after block, by sampling: its own recurrence, not predict's."""
    r = torch.randn(400_000, generator=torch.Generator().manual_seed(5)).double()
    for index in range(blocks):
        yield float(r.mean()), float(r.std())
        f = torch.randn(len(r), generator=torch.Generator().manual_seed(6 + index)).double()
        r = (math.sqrt(1 - 1 / blocks) * r + f / math.sqrt(blocks)).relu()


@pytest.fixture(scope="module")
def rectified_trunk():
    torch.manual_seed(0)
    blocks = [Rectified(64, 12, *constants) for constants in moments_of_a_trunk(12)]
    net = nn.Sequential(NormPropConv2d(3, 64, 3, padding=1, activation=None), *blocks)
    x = randn(16, 3, 16, 16)
    found = predict(net, x)
    records = [found["0"], *(found[f"{i}.relu"] for i in range(1, 13))]
    measured = Measured(net, x)
    return [(record, *measured[str(i)]) for i, record in enumerate(records)]


def test_the_map_of_a_rectified_trunk_of_12_blocks(rectified_trunk):
    for record, mean, std, _ in rectified_trunk:
        assert abs(record.mean - mean) < 0.15 * std, record
        assert abs(math.log(record.std / std)) < math.log(1.15), record


def test_the_gradient_of_a_rectified_trunk_of_12_blocks(rectified_trunk):
    for record, _, _, gradient in rectified_trunk:
        assert abs(math.log(record.gradient / gradient)) < math.log(1.2), record


@pytest.mark.parametrize("blocks", [4, 12])
def test_a_linear_trunk(blocks):
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = normprop.NormalizedActivation("relu")
            self.conv1 = NormPropConv2d(64, 64, 3, padding=1, rule=RECOMMENDED)
            self.conv2 = NormPropConv2d(64, 64, 3, padding=1, rule=RECOMMENDED, activation=None)
            self.add = NormalizedAdd.residual(blocks)

        def forward(self, x):
            return self.add(x, self.conv2(self.conv1(self.act(x))))

    net = nn.Sequential(
        NormPropConv2d(3, 64, 3, padding=1, activation=None), *(Block() for _ in range(blocks))
    )
    names = ["0", *(f"{i + 1}.add" for i in range(blocks))]
    assert_predicted(net, randn(16, 3, 16, 16), names, mean=0.15, std=0.15, gradient=0.2)


# --- notes and special rules --------------------------------------------------------------------


def gaussian_stats(code, x=None):
    y = code(None, randn(1_000_000) if x is None else x)
    return float(y.mean()), float(y.std())


@pytest.mark.parametrize(
    "code",
    [
        lambda self, x: x + x,
        lambda self, x: x * torch.sigmoid(x),
        lambda self, x: F.relu(x) - F.relu(-x),
        lambda self, x: (x - 1) / 2 + x**2,
        lambda self, x: torch.relu(x) * x,
        lambda self, x: x.abs().sqrt().clamp(0.3, 1.0),
        lambda self, x: 3 - x,
        lambda self, x: torch.sub(F.relu(x), x, alpha=3.0),
    ],
    ids=["x + x", "swish", "relu - relu", "polynomial", "relu * x", "chain", "rsub", "alpha"],
)
def test_functions_of_one_map_are_exact(code):
    record = walk(trace(Code(code), randn(4)), whole=False).trace()[
        -1
    ]  # x - 1 is no normalisation of data here
    mean, std = gaussian_stats(code)
    # 1e6 samples: five standard errors of about std/1000, with room for heavy tails.
    assert record.mean == pytest.approx(mean, abs=0.01 * std)
    assert record.std == pytest.approx(std, rel=0.01)
    assert record.note == ""


def test_the_gradient_of_a_function_of_one_map_is_exact():
    x = randn(1_000_000).requires_grad_()
    (torch.relu(x) * x + x).backward(torch.ones(len(x)))
    found = predict(Code(lambda self, x: torch.relu(x) * x + x), randn(4))
    assert found["x"].gradient == pytest.approx(float(x.grad.square().mean().sqrt()), rel=0.01)


@pytest.mark.parametrize(
    "code",
    [
        lambda x, y, softmax: torch.add(x, y, alpha=3.0),
        lambda x, y, softmax: torch.sub(x, y[:, :1], alpha=20.0),
        lambda x, y, softmax: torch.softmax(0.1 * x, 1),
        lambda x, y, softmax: F.softmax(0.1 * x, dim=-2),
        lambda x, y, softmax: softmax(0.1 * x),
        lambda x, y, softmax: torch.einsum("bij,bkj->bik", x, y),
        lambda x, y, softmax: torch.einsum("bij, bkj", x, y),
        lambda x, y, softmax: torch.einsum("...ij,...kj->...ik", x, y),
    ],
    ids=["add", "sub", "softmax", "F.softmax", "Softmax", "einsum", "implicit", "ellipsis"],
)
def test_what_arguments_say_counts(code):
    model = Code(lambda self, x: code(*x, self.softmax), softmax=nn.Softmax(1))
    x = randn(2, 64, 100, 7)
    record, y = predict(model, x)[-1], model(x)
    assert record.mean == pytest.approx(float(y.mean()), abs=0.05 * float(y.std()))
    assert record.std == pytest.approx(float(y.std()), rel=0.05)


def test_modules_that_look_alike_are_told_apart():
    class Act(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            return x.relu() if self.kind == "relu" else x.softmax(-1)

    x = randn(4, 8)
    assert [predict(nn.Sequential(Act(k)), x)[-1].op for k in ("relu", "softmax")] == ["Act", "softmax"]


def test_inference_mode_changes_no_prediction():
    model = nn.Sequential(
        NormPropConv2d(3, 8, 3, activation="gelu"), NormPropConv2d(8, 8, 3, activation="silu")
    )
    with torch.inference_mode():
        inside = predict(model, randn(2, 3, 9, 9))
    assert inside.table() == predict(model, randn(2, 3, 9, 9)).table()


def notes(model, x):
    return {r.name: r.note for r in predict(model, x) if r.note}


def test_weak_assumptions_are_noted():
    x = randn(2, 8, 6, 6)
    assert "neighbours taken as independent" in notes(nn.Sequential(nn.MaxPool2d(2)), x)["_0"]
    assert "fan_in 8:" in notes(nn.Sequential(nn.Conv2d(8, 64, 1)), x)["_0"]
    assert notes(nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 1)), x) == {}
    for kernel, stride, said in ((3, 2, True), (2, 3, True), (4, 2, False), ((4, 3), (2, 2), True)):
        up = nn.Sequential(nn.ConvTranspose2d(8, 64, kernel, stride))
        assert ("stride does not divide its kernel" in notes(up, x).get("_0", "")) == said
    wide = nn.Conv2d(8, 8, 3, padding=1)
    for code in (
        lambda y: y + y.roll(1),
        lambda y: y - F.avg_pool2d(y, 3, 1, 1),
        lambda y: y * y.mean(1, True),
    ):
        correlated = Code(lambda self, x, code=code: code(self.conv(x)), conv=wide)
        *averages, note = notes(correlated, x).values()
        assert note == "its inputs share conv: correlated, taken as independent"
        assert all(said.startswith("average: values taken as independent") for said in averages)
    separate = Code(lambda self, x: self.conv(x) + self.other(x), conv=wide, other=copy.deepcopy(wide))
    assert notes(separate, x) == {}
    unknown = Code(lambda self, x: torch.cumsum(x, 1))
    assert notes(unknown, x) == {"cumsum": "no rule for cumsum: taken as N(0, 1)"}


def test_an_unknown_module_has_no_rule():
    assert notes(nn.Sequential(nn.Fold((4, 4), 2)), randn(2, 8, 9)) == {
        "_0": "no rule for Fold: taken as N(0, 1)"
    }
    model = Code(lambda self, x: self.rnn(x)[0], rnn=nn.RNN(8, 8))  # tables do not show what gives a tuple
    assert notes(model, randn(2, 3, 8))["getitem"] == "no rule for RNN: taken as N(0, 1)"


@pytest.mark.parametrize("classes", [2, 8, 64])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        nn.Softmax(1),
        lambda x: F.log_softmax(x, 1),
        nn.LogSoftmax(-1),
        nn.GLU(1),
        lambda x: x.max(1)[0],
        lambda x: torch.min(x, dim=1)[0],
        lambda x: x.amin(1),
    ],
)
def test_functions_of_several_independent_values(function, classes):
    torch.manual_seed(0)
    model = Code(lambda self, x: function(x))
    trace = normprop.measure(model, torch.randn(40_000, classes))
    assert trace.predicted[0].gradient == pytest.approx(trace[0].gradient, rel=0.03)
    assert trace.predicted[-1].mean == pytest.approx(trace[-1].mean, rel=0.03, abs=0.01)
    assert trace.predicted[-1].std == pytest.approx(trace[-1].std, rel=0.03)


def test_straight_through_code():
    model = Code(lambda self, x: F.relu(x.sin().detach() + x.tanh() - x.tanh().clone().detach()))
    trace = normprop.measure(model, torch.randn(4000, 16))
    assert trace.predicted["relu"].std == pytest.approx(trace["relu"].std, rel=0.03)
    assert trace.predicted[0].gradient == pytest.approx(trace[0].gradient, rel=0.05)


def test_constants_are_no_maps():
    model = Code(lambda self, x: torch.linspace(0, 1, x.shape[1]).type_as(x) * x)
    assert [record.op for record in predict(model, randn(9, 8))] == ["input", "mul"]


@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED], ids=["plain", "centered"])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(4, 2, 1), (2, 2, 1), (3, 2, 1), (4, 2, 4)])
def test_a_transposed_convolution_reads_a_mean_by_phases(rule, kernel, stride, groups):
    torch.manual_seed(0)
    layer = normprop.NormPropConvTranspose2d(
        32, 16, kernel, stride, kernel // 2 - 1, groups=groups, activation=None, rule=rule
    )
    trace = normprop.measure(nn.Sequential(nn.ReLU(), layer), torch.randn(128, 32, 16, 16))
    assert trace.predicted[-1].std == pytest.approx(trace[-1].std, rel=0.03)
    assert trace.predicted[-1].mean == pytest.approx(trace[-1].mean, abs=0.03)


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (2, 2, 1), (3, 1, 2), (20, 2, 1)])
def test_transposed_convolutions_of_small_maps(size, stride, padding):
    torch.manual_seed(0)
    layer = normprop.NormPropConvTranspose2d(64, 256, 4, stride, padding, activation=None)
    x = randn(512, 64, size, size)
    expected = float(layer(x).detach().square().mean().sqrt())
    assert abs(normprop.predict(nn.Sequential(layer), x)["_0"].std / expected - 1) < 0.02


def test_behind_integers_a_signal_begins():
    net = nn.Sequential(nn.Embedding(10, 64), normprop.NormPropLinear(64, 8, rule=normprop.RECOMMENDED))
    trace = normprop.predict(net, torch.randint(0, 10, (4, 5)))
    rows = net[0].weight.detach()
    assert (trace["_0"].mean, trace["_0"].std) == pytest.approx(
        (float(rows.mean()), float(rows.std())), abs=0.002
    )
    assert abs(trace["_1"].mean) < 0.05
    assert trace["_1"].std == pytest.approx(float(rows.std()), rel=0.01)
    functional = Code(lambda self, x: F.embedding(x, self.table.weight), table=nn.Embedding(10, 64))
    assert predict(functional, torch.randint(0, 10, (4, 5)))[-1].note == (
        "no rule for embedding: taken as N(0, 1)"
    )


def test_an_example_that_does_not_fit_is_noted():
    net = nn.Sequential(normprop.NormPropConv2d(3, 8, 3), nn.ReLU())
    found = {name: note for name, note in notes(net, randn(2, 1, 8, 8)).items() if "fails" in note}
    assert list(found) == ["_0"]
    assert found["_0"].startswith("fails with the example: RuntimeError: ")


@pytest.mark.parametrize(("example", "said"), [((3, 8, 8), "a tuple with int"), ([1], "list")])
def test_what_is_no_example_is_refused(example, said):
    message = (
        f"example must be a tensor or a tuple of tensors, got {said}; for a shape alone write torch.zeros"
    )
    for call in (normprop.predict, lambda model, example: normprop.convert(model, example=example)):
        with pytest.raises(TypeError, match=message):
            call(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), example)


def test_few_terms_are_computed():
    """A depthwise convolution of ReLUs: its output's shape is that of a sum of nine."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(256, 256, 3, groups=256, bias=False), nn.ReLU())
    x = randn(64, 256, 6, 6)
    found = assert_predicted(net, x, "01", mean=0.05, std=0.05)
    y = net(x).detach()
    assert found["2"].mean == pytest.approx(float(y.mean()), rel=0.05)  # 256 rows: 1/16 of a row's spread
    assert found["2"].std == pytest.approx(float(y.std()), rel=0.05)


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), NormalizedMaxPool2d(2)]
)
def test_pools_of_independent_elements(pool):
    x = randn(200, 64, 6, 6)
    y = pool(torch.relu(x) if isinstance(pool, NormalizedMaxPool2d) else x)
    model = nn.Sequential(nn.ReLU(), pool) if isinstance(pool, NormalizedMaxPool2d) else nn.Sequential(pool)
    record = predict(model, x)[-1]
    assert record.mean == pytest.approx(float(y.mean()), abs=0.02)  # the maximum's half cell of 17/511
    assert record.std == pytest.approx(float(y.std()), rel=0.02)


@pytest.mark.parametrize(
    "channels",
    [
        64,
        2048,
    ],
)
def test_batch_norm_of_a_rectified_map(channels):
    """Half of the values are one atom, which a coarser grid for many channels must keep."""
    norm = nn.BatchNorm1d(channels).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(norm.bias, -0.5, 0.5, generator=torch.Generator().manual_seed(1))
    # The atom shares a bin, 17/511 wide, with what lies beside it.
    net = nn.Sequential(nn.ReLU(), norm, nn.ReLU())
    assert_predicted(net, randn(1000, channels), "012", mean=0.03, std=0.03, gradient=0.04)


# Behind a global average all positions have the same gradient, and a depthwise layer's taps add up; taken as
# unrelated from position to position, the gradient came out at .92 to 1.29 of what it is.
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "rule"), [(3, normprop.PAPER), (5, normprop.PAPER), (5, RECOMMENDED)], ids=["3", "5", "5c"]
)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_gradient_of_a_depthwise_layer_behind_a_global_average(activation, kernel, rule, stride):
    torch.manual_seed(0)
    depthwise = NormPropConv2d(
        512, 512, kernel, stride, kernel // 2, groups=512, activation=activation, rule=rule
    )
    net = nn.Sequential(
        NormPropConv2d(64, 512, 1, activation=activation),
        depthwise,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        NormPropLinear(512, 100, activation=None),
    )
    assert_predicted(net, randn(32, 64, 16, 16), "01", mean=0.1, std=0.1, gradient=0.06)


@pytest.mark.parametrize(
    "average",
    [
        lambda self, x: x.mean((2, 3)),
        lambda self, x: x.mean(3).mean(2),
        lambda self, x: x.sum((2, 3)),
        lambda self, x: F.avg_pool2d(x, 2).mean((2, 3)),
        lambda self, x: F.adaptive_avg_pool2d(self.conv2(x) * x, 1).flatten(1),
        lambda self, x: F.adaptive_avg_pool2d(x * (2 + self.conv2(x)), 1).flatten(1),
    ],
    ids=["mean", "twice", "sum", "pooled before", "product", "product with a mean"],
)
@pytest.mark.parametrize("kernel", [5, 7])
def test_a_global_average_however_it_is_written(average, kernel):
    rule = NormRule(gain=1.0)
    torch.manual_seed(0)
    layers = nn.Sequential(
        NormPropConv2d(64, 256, 1, activation="silu", rule=rule),
        NormPropConv2d(256, 256, kernel, padding=kernel // 2, groups=256, activation="silu", rule=rule),
    )
    last = Code(average)
    last.conv2 = NormPropConv2d(256, 256, 1, activation=None, rule=rule)
    net = nn.Sequential(layers, last, NormPropLinear(256, 64, activation=None))
    measured, found = Measured(net, randn(32, 64, 12, 12)), predict(net, randn(32, 64, 12, 12))
    assert abs(math.log(found["0.0"].gradient / measured["0.0"][2])) < math.log(1.06)


def test_padding_and_concat_count_elements():
    x = randn(100, 16, 6, 6)
    code = Code(
        lambda self, x: torch.cat([F.pad(x, (1, 2, 3, 4), value=2.0), torch.ones(100, 48, 13, 9) * 3], 1)
    )
    y = code(x)
    record = predict(code, x)[-1]
    assert record.mean == pytest.approx(float(y.mean()), abs=0.01)
    assert record.std == pytest.approx(float(y.std()), rel=0.01)


def test_every_activation_of_the_table_is_an_element_wise_node():
    for name in activations.names():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = predict(nn.Sequential(activations.as_module(name)), randn(2, 3))
        with torch.no_grad():
            expected = activations.moments(name)
        assert found[-1].mean == pytest.approx(float(expected.mean), abs=2e-3), name
        assert found[-1].std == pytest.approx(float(expected.std), rel=2e-3), name
        assert found[0].gradient == pytest.approx(math.sqrt(float(expected.slope)), rel=0.02), name


def view_written(self, x):
    h = self.conv(x)
    v = h.flatten(2)
    v += 1
    return h


def base_written(self, x):
    h = self.conv(x)
    v = h.flatten(2)
    h += 1
    return v


def selected(self, x):
    h = self.conv(x)
    h.select(1, 0).relu_()
    return h


def raveled(self, x):
    h = self.conv(x)
    h.ravel().relu_()
    return h


def diagonal(self, x):
    h = self.conv(x)
    h.diagonal(0, 2, 3).relu_()
    return h


def harmless(self, x):
    h = self.conv(x)
    a, b = h[:, :2], h[:, 2:]
    a += b
    v = a.flatten(2)
    v += 1
    return torch.cat([v, b.flatten(2)], 1)


def sibling(self, x):
    h = self.conv(x)
    v = h.flatten(2)
    h[:, :2].relu_()
    return v


@pytest.mark.parametrize("code", [view_written, base_written, selected, raveled, diagonal, sibling])
def test_a_write_through_another_name_is_refused(code):
    model = Code(code, conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(TraceError, match=r"writes into '\w+', of which '\w+', read later, is another view"):
        trace(model, randn(2, 3, 8, 8))
    parts = predict(model, randn(2, 3, 8, 8))
    assert [record.path for record in parts] == ["conv", "conv"]
    assert "is another view" in parts[0].note


def test_an_adaptive_pool_that_enlarges_repeats():
    for pool in (nn.AdaptiveAvgPool2d(7), nn.AdaptiveMaxPool2d(7)):
        record = predict(nn.Sequential(nn.Conv2d(3, 32, 3), pool), randn(2, 3, 5, 5))["1"]
        before = predict(nn.Conv2d(3, 32, 3), randn(2, 3, 5, 5))[-1]
        assert (record.mean, record.std) == pytest.approx((before.mean, before.std), rel=0.1, abs=0.1)
        assert record.std > 0


W, SHIFT = torch.full((64,), 3.0), torch.linspace(-1, 2, 64)
NORMS = {
    "layer_norm": lambda self, x: F.layer_norm(x, (64,), W.to(x), SHIFT.to(x)),
    "layer_norm, keywords": lambda self, x: F.layer_norm(x, (64,), bias=SHIFT.to(x), weight=W.to(x)),
    "layer_norm, plain": lambda self, x: F.layer_norm(x, (64,)),
    "group_norm": lambda self, x: F.group_norm(x, 2, W.to(x), SHIFT.to(x)),
    "batch_norm": lambda self, x: F.batch_norm(x, None, None, W.to(x), SHIFT.to(x), True),
    "rms_norm": lambda self, x: F.rms_norm(x, (64,), W.to(x)),
    "RMSNorm": nn.RMSNorm(64),
    "LayerNorm": nn.LayerNorm(64),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_keep_their_weights_and_biases(norm):
    torch.manual_seed(0)
    last = norm if isinstance(norm, nn.Module) else Code(norm)
    if isinstance(norm, nn.Module):
        norm.weight.data.normal_()
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), last).double()
    measured = normprop.measure(net, randn(4096, 64).double())
    one, two = measured.records[-1], measured.predicted.records[-1]
    assert not two.note
    assert two.mean == pytest.approx(one.mean, abs=0.1 * one.std)
    assert two.std == pytest.approx(one.std, rel=0.1)
    assert measured.predicted["1"].gradient == pytest.approx(measured["1"].gradient, rel=0.1)


def test_a_norm_without_rule_says_so():
    record = predict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(2)), randn(2, 3, 9, 9))["1"]
    assert record.note == "no rule for LocalResponseNorm: taken as N(0, 1)"


def test_a_layer_with_a_forward_of_its_own_names_the_way_out():
    class Causal(normprop.NormPropConv1d):
        def forward(self, x):
            return super().forward(F.pad(x, (2, 0)))

    class Named(normprop.NormPropConv1d):
        pass

    with pytest.raises(
        TraceError, match="Causal gives a NormProp layer a forward of its own: make it a module"
    ):
        predict(nn.Sequential(Causal(3, 4, 3)), randn(2, 3, 8))
    named, x = nn.Sequential(Named(3, 4, 3)), randn(2, 3, 8).float()
    assert predict(named, x)["_0"].op == "Named"
    torch.testing.assert_close(normprop.fold(named, verify=x)(x), named(x))


def test_a_write_that_nobody_else_sees_is_followed():
    model, x = Code(harmless, conv=nn.Conv2d(3, 4, 3)), randn(2, 3, 8, 8).float()
    torch.testing.assert_close(normprop.fold(model, verify=x)(x), model(x))


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"predict reads the weights, and '0\.weight' has no values"):
        normprop.predict(model, torch.randn(2, 4))


def test_weights_that_are_no_numbers_are_seen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    nn.init.constant_(model[1].weight, math.nan)
    trace = predict(model, torch.randn(2, 4))
    assert math.isnan(trace["1"].std)
    assert math.isnan(trace["0"].gradient)


@pytest.mark.parametrize("measured", [False, True])
def test_a_trunk_whose_std_was_measured_counts_with_it(measured):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = normprop.NormalizedAdd((3.0, 4.0), stds=(2.0, 1.0))
            if measured:
                normprop.merges.keep_in_state_dict(self.add, "stds")

        def forward(self, trunk, branch):
            return self.add(trunk, branch)

    trace = normprop.predict(Sum(), (torch.zeros(1, 8), torch.zeros(1, 8)))
    expected = 1.0 if measured else math.hypot(0.6 / 2, 0.8)
    assert trace["add"].std == pytest.approx(expected, rel=1e-3)


def test_long_maps_take_no_more_memory_than_their_length():
    model = nn.Sequential(nn.Conv1d(1, 16, 5, stride=4, padding=2), nn.ReLU(), nn.Conv1d(16, 8, 5))
    trace = predict(model, torch.empty(1, 1, 400_000, device="meta"))
    short = predict(model, torch.empty(1, 1, 4_000, device="meta"))
    for far, near in zip(trace, short, strict=True):
        assert (far.mean, far.var) == pytest.approx((near.mean, near.var), abs=2e-3)


# --- what is measured of trained networks -----------------------------------------------------------


def pairs(model, x):
    trace = normprop.measure(model, x)
    return {r.name: (r, p) for r, p in trace.shown(every=True)}


def test_batch_norm_in_eval_mode_is_what_it_has_seen():
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(), torch.randn(16, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    fresh = pairs(model.eval(), x)["bn1"]
    assert fresh[1].std == pytest.approx(fresh[0].std, rel=0.1)  # nothing seen: nothing is subtracted
    with torch.no_grad():
        model.train()(x)
    found = {
        name: pair for name, pair in pairs(model.eval(), x).items() if pair[0].op in ("BatchNorm2d", "ReLU")
    }
    assert len(found) == 37
    close = [
        abs(math.log(p.std / r.std)) < math.log(1.2) and abs(p.mean - r.mean) < 0.2 * r.std
        for r, p in found.values()
    ]
    assert all(close)
    for _, predicted in found.values():
        assert "were measured" in predicted.note or predicted.op == "ReLU" or not predicted.note


def test_batch_norm_that_has_seen_a_constant():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval()
    nn.init.zeros_(model[1].running_var)
    assert math.isfinite(predict(model, torch.randn(2, 64))["1"].std)


def test_a_norm_of_a_map_as_small_as_its_eps():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1e-3)
    one, two = pairs(model, torch.randn(512, 64))["_1"]
    assert one.std < 0.3
    assert two.std == pytest.approx(one.std, rel=0.1)


@pytest.mark.parametrize(
    "drop", [nn.Dropout(0.5), nn.Dropout1d(0.3), Code(lambda self, x: F.dropout(x, 0.5))]
)
def test_dropout_that_drops(drop):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), drop, nn.Linear(64, 64))
    found = pairs(model, torch.randn(4096, 64))
    for name in ("_1", "_3"):
        one, two = found[name]
        assert (two.std, two.gradient) == pytest.approx((one.std, one.gradient), rel=0.1)
    assert predict(model.eval(), torch.randn(2, 64))["3"].std < 0.85 * found["_3"][1].std or isinstance(
        drop, Code
    )


def test_averages_stay_where_their_values_are():
    gem = Code(lambda self, x: x.clamp(1e-6).pow(3).mean((-2, -1)).pow(1 / 3))
    trace = predict(nn.Sequential(nn.Conv2d(3, 32, 3), gem, nn.Linear(32, 4)), randn(2, 3, 32, 32))
    assert all(math.isfinite(r.std) and math.isfinite(r.gradient) for r in trace)


def mean_of_tokens(self, x):
    return self.b(F.gelu(self.a(x))).mean(1)


AVERAGED = {
    "layer": (nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1)), (256, 3, 18, 18)),
    "activation": (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        (256, 3, 18, 18),
    ),
    "norm": (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), nn.AdaptiveAvgPool2d(1)), (256, 3, 18, 18)
    ),
    "window": (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, bias=False), nn.AvgPool2d(4)),
        (256, 3, 18, 18),
    ),
    "tokens": (Code(mean_of_tokens, a=nn.Linear(64, 64), b=nn.Linear(64, 64)), (64, 20, 64)),
    "own layer": (
        nn.Sequential(NormPropConv2d(3, 32, 3), NormPropConv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1)), (256, 3, 18, 18)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "size"), AVERAGED.values(), ids=AVERAGED)
def test_an_average_keeps_what_channels_differ_by(model, size):
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    trace = normprop.measure(model, torch.randn(size))
    one, two = trace.records[-1], trace.predicted.records[-1]
    assert two.std == pytest.approx(one.std, rel=0.15)
    assert two.note == "average: values taken as independent"


def test_an_average_of_what_is_not_known_by_channel_says_so():
    block = Code(lambda self, x: (x + self.a(x)).mean((2, 3)), a=nn.Conv2d(3, 3, 1))
    assert (
        predict(block, randn(2, 3, 9, 9))[-1].note
        == "average: values taken as independent, all channels as alike"
    )


def test_a_layer_that_returns_nothing_and_bytes_at_the_data_end():
    model = nn.Sequential(
        normprop.GlobalDataNorm.fit(torch.rand(9, 3, 8, 8)),
        normprop.NormPropConv2d(3, 4, 3),
        normprop.NormPropConv2d(4, 4, 3),
    )
    trace = predict(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert (trace["0"].std, trace["0"].note) == (pytest.approx(1.0), "")
    nn.init.zeros_(model[1].gain)
    assert math.isfinite(predict(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))[-1].std)


@pytest.mark.parametrize("code", [torch.max, torch.min, lambda a, b: torch.max(a, torch.tensor(0.0))])
def test_the_larger_of_two_maps_has_no_rule(code):
    model = Code(lambda self, x: code(self.a(x), self.b(x)), a=nn.Linear(64, 64), b=nn.Linear(64, 64))
    assert predict(model, randn(8, 64))[-1].note.startswith("no rule for")


# --- a gradient that depends on the value it meets ------------------------------------------------

BETWEEN = {
    "activation": (lambda s, a, b: s.m(0.9 * a + 0.5 * b), normprop.NormalizedActivation("relu")),
    "its own gains": (lambda s, a, b: s.m(0.9 * a + 0.5 * b), normprop.NormalizedActivation("relu", 16)),
    "group norm": (lambda s, a, b: F.relu(s.m(a)), nn.GroupNorm(1, 16)),
    "group norm, a function": (lambda s, a, b: F.relu(F.group_norm(a, 1)), None),
    "with weights": (lambda s, a, b: F.relu(F.group_norm(a, 1, s.m.weight, s.m.bias)), nn.GroupNorm(1, 16)),
    "max pool": (lambda s, a, b: F.relu(s.m(a)), nn.MaxPool2d(3, 2, 1)),
    "minimum": (lambda s, a, b: -F.relu(F.max_pool2d(-b, 2)), None),
    "normalised max pool": (lambda s, a, b: s.m(a), NormalizedMaxPool2d(2)),
    "pool of a product": (lambda s, a, b: F.relu(s.m(torch.tanh(a) * torch.sigmoid(b))), nn.MaxPool2d(2)),
    "pool of a concat": (lambda s, a, b: s.m(torch.cat([a, 0.1 * b], 1)), nn.MaxPool2d(2)),
    "pool of a concat, normalised": (lambda s, a, b: s.m(torch.cat([a, b], 1)), NormalizedMaxPool2d(2)),
    "pool and its places": (lambda s, a, b: F.relu(F.max_pool2d(a, 2, return_indices=True)[0]), None),
    "reflection": (lambda s, a, b: F.relu(F.pad(a, (4, 4, 4, 4), mode="reflect")), None),
    "crop": (lambda s, a, b: F.relu(F.pad(a, (-4, -4, -4, -4))), None),
    "largest of all": (lambda s, a, b: F.relu(s.m(a)), normprop.NormalizedAdaptiveMaxPool2d(4)),
    "average": (lambda s, a, b: F.relu(s.m(a)), nn.AvgPool2d(2)),
    "normalised average": (lambda s, a, b: F.relu(s.m(a)), normprop.NormalizedAvgPool2d(2)),
    "concat": (lambda s, a, b: F.relu(torch.cat([a, b], 1)), None),
    "weighted concat": (lambda s, a, b: F.relu(s.m(a, b)), normprop.NormalizedCat(1, (1.0, 2.0))),
    "product": (lambda s, a, b: F.relu(a * torch.sigmoid(b)), None),
    "quotient": (lambda s, a, b: F.relu(a / (b.abs() + 1)), None),
    "gate": (lambda s, a, b: F.relu(s.m(a, b)), normprop.NormalizedGate("silu")),
    "glu": (lambda s, a, b: F.relu(F.glu(torch.cat([a, b], 1), 1)), None),
    "dropout": (lambda s, a, b: F.relu(s.m(a)), nn.Dropout(0.5)),
    "normalised dropout": (lambda s, a, b: F.relu(s.m(a)), normprop.NormalizedDropout(0.5)),
    "padding": (lambda s, a, b: F.relu(F.pad(a, (4, 4, 4, 4))), None),
    "copies": (lambda s, a, b: F.relu(F.interpolate(a, scale_factor=2)), None),
    "normalised copies": (lambda s, a, b: F.relu(s.m(a)), normprop.NormalizedUpsample(scale_factor=2)),
    "one number a channel": (lambda s, a, b: F.relu(a + b.mean((2, 3), keepdim=True)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_passed_a_rectifier_passes_the_next(name):
    function, module = BETWEEN[name]

    def conv(activation, inputs=16):
        like = {"padding": 1, "padding_mode": "circular", "activation": activation, "rule": RECOMMENDED}
        return NormPropConv2d(inputs, 16, 3, **like)

    torch.manual_seed(0)
    wide = 32 if "concat" in name else 16
    net = Code(
        lambda s, x: s.end(function(s, s.a(x), s.b(x))),
        a=conv("relu"), b=conv("gelu"), end=conv(None, wide), m=copy.deepcopy(module) or nn.Identity(),
    )  # fmt: skip
    seen = normprop.measure(net.train(), randn(32, 16, 16, 16))
    assert seen.predicted["x"].gradient == pytest.approx(seen["x"].gradient, rel=0.08)


@pytest.mark.parametrize("size", [16, 32, 112])
def test_a_maximum_that_is_always_the_same(size):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Hardtanh(), nn.AdaptiveMaxPool2d(1))
    largest = predict(model, torch.zeros(2, 8, size, size))[-1]
    assert (largest.mean, largest.std) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_dropout_of_everything():
    trace = predict(nn.Sequential(nn.Linear(8, 64), nn.Dropout(1.0)), torch.zeros(2, 8))
    assert [(r.std, r.gradient) for r in trace][1:] == [(pytest.approx(trace[1].std), 0.0), (0.0, 1.0)]
