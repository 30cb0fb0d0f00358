"""``fold``: the folded model against the model, and nothing of ours in it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from code_model import Code
from torch import nn
from torch.nn.utils import parametrizations

import normprop
from normprop import (
    PAPER,
    RECOMMENDED,
    GlobalDataNorm,
    NormalizedActivation,
    NormalizedAdaptiveAvgPool2d,
    NormalizedAdaptiveMaxPool2d,
    NormalizedAdd,
    NormalizedAvgPool2d,
    NormalizedCat,
    NormalizedDropout,
    NormalizedGate,
    NormalizedMaxPool2d,
    NormalizedUpsample,
    NormPropConv2d,
    NormPropConvTranspose2d,
    NormPropLinear,
    NormRule,
    Standardize,
    WhiteningDataNorm,
    activations,
    convert,
    fold,
)
from normprop.graph import fold as folding
from normprop.graph.fold import FoldError
from normprop.recipes import models

LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}
RULES = {
    "paper": PAPER,
    "recommended": RECOMMENDED,
    "affine": NormRule(constants="affine"),
    "none": NormRule(constants="none"),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
KINDS = {
    1: (normprop.NormPropConv1d, normprop.NormPropConvTranspose1d),
    2: (normprop.NormPropConv2d, normprop.NormPropConvTranspose2d),
    3: (normprop.NormPropConv3d, normprop.NormPropConvTranspose3d),
}


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trained(model, dtype=torch.float64):
    """Parameters as after training: gains of any sign, biases, slopes."""
    for index, (name, p) in enumerate(model.named_parameters()):
        with torch.no_grad():
            noise = randn(*p.shape, seed=index).to(p.dtype)
            p.add_((0.3 if p.ndim > 1 else 0.5) * noise)
            if name.endswith("gain"):
                p[::5] *= -1
    return model.to(dtype)


def nothing_of_ours(folded):
    assert not [n for n, m in folded.named_modules() if type(m).__module__.startswith("normprop")]
    targets = [n.target for n in folded.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if (getattr(t, "__module__", "") or "").startswith("normprop")]


@torch.no_grad()
def assert_folds(model, *inputs, verify=True):
    """Equal at every input, whatever it was traced with; the source as it was."""
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    folded = fold(model, verify=inputs[0] if verify else None)
    assert [m.training for m in model.modules()] == flags
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    nothing_of_ours(folded)
    assert not folded.training
    twin = copy.deepcopy(model).eval()
    for x in inputs:
        kept = x.clone()
        expected, actual = twin(x.clone()), folded(x)
        assert torch.equal(x, kept)
        scale = float(expected.abs().max())
        assert float((actual - expected).abs().max()) <= LIMIT[x.dtype] * scale
    return folded


# --- layers -------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("name", activations.names())
def test_every_activation_before_a_padded_convolution(name, rule):
    """What waits behind the activation meets the next layer's zeros at the border."""
    torch.manual_seed(0)
    net = nn.Sequential(
        NormPropConv2d(3, 6, 3, padding=1, activation=name, rule=rule),
        NormPropConv2d(6, 6, 3, 2, 2, dilation=2, groups=2, activation=name, rule=rule),
        nn.Flatten(2),
        NormPropLinear(20, 5, activation=name, rule=rule),
        NormPropLinear(5, 2, activation=None, rule=rule),
    )
    assert_folds(trained(net), randn(2, 3, 10, 8))


@rules
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_every_kind_of_layer(spatial, transposed, bias, rule):
    kind = KINDS[spatial][transposed]
    more = {"stride": 2, "output_padding": 1} if transposed else {}
    net = nn.Sequential(
        kind(4, 6, 3, padding=1, bias=bias, activation="silu", rule=rule),
        kind(6, 4, 3, padding=1, groups=2, bias=bias, rule=rule, **more),
        kind(4, 4, 3, padding=1, bias=bias, activation="tanh", rule=rule, **more),
        kind(4, 2, 2, bias=bias, activation=nn.PReLU(2), rule=rule),
    )
    assert_folds(trained(net), randn(2, 4, *[5] * spatial), randn(3, 4, *[7] * spatial, seed=1))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"])
def test_every_padding(mode, padding):
    net = nn.Sequential(
        NormPropConv2d(3, 4, 3, activation="gelu"),
        NormPropConv2d(4, 4, (3, 5), padding=padding, padding_mode=mode, activation="gelu"),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        NormPropConv2d(4, 4, 3, padding=1, padding_mode=mode),
    )
    assert_folds(trained(net), randn(2, 3, 11, 12), randn(2, 3, 9, 13))


@rules
@pytest.mark.parametrize("features", [None, 4])
@pytest.mark.parametrize("name", ["identity", "relu", "silu", "prelu"])
def test_a_lone_activation(name, features, rule):
    net = nn.Sequential(
        NormPropConv2d(3, 4, 3, padding=1, activation="silu", rule=rule),
        NormalizedActivation(name, features, rule),
        NormPropConv2d(4, 4, 3, padding=1, activation=None, rule=rule),
        NormalizedActivation(name, features, rule),
    )
    assert_folds(trained(net), randn(2, 3, 6, 5), randn(2, 3, 7, 7))


@pytest.mark.parametrize("dtype", LIMIT)
def test_constants_go_into_weights(dtype):
    """Of a plain chain nothing but layers, activations, pads and one last affine map is left."""
    net = nn.Sequential(
        *(NormPropConv2d(3 if i == 0 else 8, 8, 3, padding=1, activation="silu") for i in range(4)),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        NormPropLinear(8, 2, activation=None),
    )
    folded = assert_folds(trained(net, dtype), randn(2, 3, 9, 9, dtype=dtype))
    functions = [n.target for n in folded.graph.nodes if n.op == "call_function"]
    assert functions == [F.pad] * 3
    relu = nn.Sequential(NormPropConv2d(3, 8, 3), NormPropConv2d(8, 8, 3))
    folded = assert_folds(trained(relu, dtype), randn(2, 3, 9, 9, dtype=dtype))
    assert [type(m).__name__ for m in folded.children()] == ["Conv2d", "Threshold"] * 2


# --- what stands between layers -----------------------------------------------------------------


def conv(channels=4, out=4, act="silu", **more):
    return NormPropConv2d(channels, out, 3, padding=1, activation=act, rule=RECOMMENDED, **more)


def joined(join):
    return lambda self, x: self.last(join(self, self.first(x)))


BETWEEN = {
    "max pool": nn.MaxPool2d(3, 2, 1),
    "average pool": nn.AvgPool2d(3, 2, 1),
    "ceiled average pool": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "adaptive average pool": nn.AdaptiveAvgPool2d(3),
    "adaptive max pool": nn.AdaptiveMaxPool2d(3),
    "normalised max pool": NormalizedMaxPool2d(3, 2, 1, activation="silu"),
    "inner normalised max pool": NormalizedMaxPool2d(2, activation="silu", correlation=0.5),
    "normalised average pool": NormalizedAvgPool2d(3, 2, 1),
    "normalised adaptive average pool": NormalizedAdaptiveAvgPool2d(2),
    "upsampling": NormalizedUpsample(scale_factor=2, mode="bilinear"),
    "dropout": nn.Dropout(0.5),
    "normalised dropout": NormalizedDropout(0.5),
    "standardize": Standardize(-0.4, 3.0),
    "relu": nn.ReLU(),
    "in-place relu": nn.ReLU(inplace=True),
    "threshold": nn.Threshold(0.2, 0.2),
    "another threshold": nn.Threshold(0.2, -0.3),
    "leaky": nn.LeakyReLU(0.1, inplace=True),
    "group norm": nn.GroupNorm(2, 4),
    "batch norm": nn.BatchNorm2d(4),
    "shuffle": nn.ChannelShuffle(2),
    "plain convolution": nn.Conv2d(4, 4, 3, padding=1),
    "transposed": NormPropConvTranspose2d(4, 4, 3, 2, 1, activation="gelu"),
    "pad": nn.ZeroPad2d(1),
    "reflect": nn.ReflectionPad2d(1),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_modules_between_layers(between):
    net = nn.Sequential(conv(3), copy.deepcopy(between), conv())
    inputs = randn(2, 3, 9, 8), randn(2, 3, 12, 11, seed=1)
    assert_folds(trained(net), *inputs)
    assert_folds(trained(net), *inputs, verify=False)


JOINS = {
    "sum": lambda self, x: x + self.a(x),
    "sum of raw and normalised": lambda self, x: self.raw(x) + self.a(x),
    "sum in place": lambda self, x: self.a(x).add_(self.b(x)),
    "sum with alpha": lambda self, x: torch.add(x, self.a(x), alpha=-2),
    "difference": lambda self, x: self.a(x) - self.b(x),
    "residual": lambda self, x: self.add(x, self.a(x)),
    "residual of residuals": lambda self, x: self.add(self.add(x, self.a(x)), self.b(x)),
    "weighted": lambda self, x: self.three(x, self.a(x), self.raw(x)),
    "relu after": lambda self, x: F.relu(self.add(x, self.a(x))),
    "in-place relu after": lambda self, x: self.add(x, self.a(x)).relu_(),
    "broadcast": lambda self, x: x + self.a(x).mean((2, 3), keepdim=True),
    "concat": lambda self, x: self.narrow(torch.cat([x, self.a(x)], 1)),
    "concat of like": lambda self, x: self.narrow(torch.cat([x, x.roll(1, 2)], 1)),
    "gate": lambda self, x: self.gate(x, self.a(x).mean((2, 3), keepdim=True)),
    "plain gate": lambda self, x: x * torch.sigmoid(self.a(x)),
    "squared": lambda self, x: self.a(x) ** 2,
    "scaled": lambda self, x: 1 - 3 * self.a(x) / 2 + 0.5,
    "negated relu": lambda self, x: F.relu(-self.a(x)),
    "clamped": lambda self, x: self.a(x).clamp(min=-0.1),
    "threshold": lambda self, x: F.threshold(self.a(x), 0.1, 0.1),
    "another threshold": lambda self, x: F.threshold(self.a(x), 0.1, -0.3),
    "chunks": lambda self, x: torch.cat(self.a(x).chunk(2, 1), 1),
    "unpacked chunks": lambda self, x: (lambda y: torch.cat([y[1], y[0]], 1))(self.a(x).split(2, 1)),
    "flipped": lambda self, x: self.a(x).flip(2).transpose(2, 3).contiguous(),
    "views": lambda self, x: (y := self.a(x)).view(y.size(0), 4, -1).view(y.shape[0], -1, *y.shape[2:]),
    "indices": lambda self, x: self.a(x)[:, [1, 0, 3, 2]],
    "interpolate": lambda self, x: F.interpolate(self.a(x), scale_factor=2),
    "pad": lambda self, x: F.pad(self.a(x), (1, 2, 0, 1)),
    "parameter": lambda self, x: self.a(x) * self.scale + self.scale,
    "functional dropout": lambda self, x: F.dropout(self.a(x), 0.5, self.training),
    "read twice": lambda self, x: (y := self.a(x)) + self.b(y) + self.raw(y),
    "one layer twice": lambda self, x: self.a(self.a(x)),
    "last of raw": lambda self, x: self.linear(x),
    "twice the output": lambda self, x: (lambda y: y + 2 * y)(self.raw(x)),
}
BROKEN = {
    "chunks stacked": (
        lambda self, x: torch.stack(self.a(x).chunk(2, 1)).sum(0).repeat(1, 2, 1, 1),
        "a tuple that waits is written down as one tensor",
    ),
    "product of sizes": (
        lambda self, x: (y := self.a(x)).view(y.size(0) * 2, 2, *y.shape[2:]).view_as(y),
        "a size is taken for a map",
    ),
    "smaller by one": (lambda self, x: (y := self.a(x))[:, :, : y.size(2) - 1], "a size is taken for a map"),
    "normalised concat": (
        lambda self, x: self.narrow(self.cat(x, self.a(x))),
        "torch.add of two sizes is a tensor, their quotient float32",
    ),
    "times zero": (lambda self, x: self.a(x) * 0 + self.b(x), "division by a factor of 0"),
    "parametrized": (
        lambda self, x: self.parametrized(self.a(x)),
        "an affine map is written into a weight that is computed",
    ),
    "discarded in place": (
        lambda self, x: (y := self.raw(x), self.relu(y), self.a(y))[2],
        "an in-place operation whose result is dropped is taken for dead code",
    ),
    "discarded method": (lambda self, x: (y := self.raw(x), y.relu_(), self.a(y))[2], "as above"),
    "in place and read": (
        lambda self, x: (y := self.a(x), self.b(self.relu(y)) + y)[1],
        "an in-place operation on a map that waits writes another one",
    ),
}  # fmt: skip


def parts():
    torch.manual_seed(0)
    return {
        "first": conv(3), "last": conv(), "a": conv(), "b": conv(act="gelu"), "raw": conv(act=None),
        "narrow": conv(8, 4), "add": NormalizedAdd.residual(3), "three": NormalizedAdd((1.0, 2.0, -1.0)),
        "cat": NormalizedCat(1, (1.0, 2.0)), "gate": NormalizedGate(), "relu": nn.ReLU(inplace=True),
        "scale": nn.Parameter(torch.ones(4, 1, 1)), "linear": nn.Conv2d(4, 4, 1),
        "greatest": NormalizedAdaptiveMaxPool2d(3, activation="silu"),
        "parametrized": parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "join",
    [
        *(pytest.param(join, id=name) for name, join in JOINS.items()),
        *(pytest.param(join, id=name) for name, (join, _) in BROKEN.items()),
    ],
)
def test_code_between_layers(join):
    inputs = randn(2, 3, 9, 8), randn(3, 3, 7, 10, seed=1)
    for body in (joined(join), lambda self, x: join(self, self.first(x))):  # read by a layer, or returned
        assert_folds(trained(Code(body, **parts())), *inputs)


def test_adaptive_max_pool_has_the_constants_of_its_size():
    net = trained(Code(joined(lambda self, x: self.greatest(x)), **parts()))
    assert_folds(net, randn(2, 3, 9, 8), randn(3, 3, 9, 8, seed=1))
    assert_folds(net, randn(2, 3, 9, 9))  # windows of one size: no map


def test_pools_that_are_subclassed_are_still_ours():
    class Top(NormalizedAdaptiveMaxPool2d):
        pass

    net = nn.Sequential(conv(3), Top(2)).double()
    assert_folds(net, randn(2, 3, 9, 8))


def test_dropout_that_always_drops_drops_before_the_constants():
    layer = NormPropLinear(8, 8, activation="gelu")
    net = Code(lambda self, x: F.dropout(self.layer(x), 0.5), layer=layer)
    zeros = (fold(net)(torch.randn(500, 8)) == 0).double().mean()
    assert abs(float(zeros) - 0.5) < 5 * 0.5 / 4000**0.5


def test_outputs_of_any_structure():
    def body(self, x):
        y = self.a(self.first(x))
        return {"deep": [y, self.raw(y)], "pooled": (y.mean((2, 3)),)}

    net = trained(Code(body, **parts()))
    x = randn(2, 3, 9, 8)
    torch.testing.assert_close(fold(net, verify=x)(x), net.eval()(x))


def test_a_tuple_of_chunks_as_output():
    net = trained(Code(lambda self, x: self.first(x).chunk(2, 1), **parts()))
    x = randn(2, 3, 9, 8)
    torch.testing.assert_close(fold(net)(x), net.eval()(x))


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.add = conv(3), conv(3), NormalizedAdd()

        def forward(self, x, y):
            return self.add(self.a(x), self.b(y))

    net, inputs = trained(Two()), (randn(2, 3, 5, 5), randn(2, 3, 5, 5, seed=1))
    torch.testing.assert_close(fold(net, verify=inputs)(*inputs), net.eval()(*inputs))


DATA_ENDS = {
    "element": GlobalDataNorm.fit,
    "channel": lambda data: GlobalDataNorm.fit(data, per="channel"),
    "whitening": WhiteningDataNorm.fit,
}


@pytest.mark.parametrize(
    ("dtype", "pixels"), [(torch.float32, torch.uint8), *((dtype, dtype) for dtype in LIMIT)]
)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("end", DATA_ENDS)
def test_the_data_norm_goes_in_front(end, padding, verify, dtype, pixels):
    data = (100 + 30 * randn(64, 3, 8, 8)).to(pixels)
    net = nn.Sequential(DATA_ENDS[end](data), NormPropConv2d(3, 4, 3, padding=padding), conv())
    net, x = trained(net, dtype).eval(), data[:4]
    folded = fold(net, verify=x if verify else None)
    expected = net(x).detach()
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=LIMIT[dtype] * float(expected.abs().max()))
    assert folded(x).dtype == dtype
    nothing_of_ours(folded)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_layout(dtype, channels_last):
    net = trained(nn.Sequential(conv(3), nn.MaxPool2d(2), conv(), conv(act="relu")), dtype)
    x = randn(2, 3, 9, 9, dtype=dtype)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    folded = assert_folds(net, x)
    assert {p.dtype for p in folded.parameters()} | {b.dtype for b in folded.buffers()} == {dtype}
    assert folded(x).is_contiguous(memory_format=torch.channels_last) or not channels_last


def test_frozen_stays_frozen():
    net = nn.Sequential(conv(3), conv(act="relu"))
    net[0].requires_grad_(False)
    folded = fold(net, verify=randn(2, 3, 9, 9, dtype=torch.float32))
    assert {n.split(".")[0] for n, p in folded.named_parameters() if not p.requires_grad} == {"0"}


# --- verify -------------------------------------------------------------------------------------


def test_verify_compares(monkeypatch):
    net, x = trained(nn.Sequential(conv(3), conv(act=None))), randn(2, 3, 9, 9)
    fold(net, verify=x)
    compute = NormPropConv2d.plain

    def wrong(layer):
        plain, *rest = compute(layer)
        with torch.no_grad():
            plain.weight[0, 0, 0, 0] += 1e-6
        return plain, *rest

    monkeypatch.setattr(NormPropConv2d, "plain", wrong)
    with pytest.raises(
        FoldError, match=r"differs from the model by \S+ of the largest output \(limit 1e-09\)"
    ):
        fold(net, verify=x)
    fold(net.float(), verify=x.float())  # within float32's limit
    fold(net)
    monkeypatch.setattr(NormPropConv2d, "plain", lambda layer: (compute(layer)[0], float("nan"), 1.0))
    with pytest.raises(FoldError, match="differs from the model by nan"):
        fold(net, verify=x.float())


def test_verify_knows_the_models_own_rounding(monkeypatch):
    def amplify(self, x):
        return torch.sin(3e4 * self.layer(x)), x  # float32 keeps three digits of it

    net, x = Code(amplify, layer=conv(3)).float(), randn(2, 3, 9, 9).float()
    folded = fold(net, verify=x)
    gap = float((folded(x)[0] - net(x)[0]).detach().abs().max())
    assert 1e-4 < gap < 0.1
    compute = NormPropConv2d.plain

    def wrong(layer):
        plain, *rest = compute(layer)
        with torch.no_grad():
            plain.weight.mul_(1.001)
        return plain, *rest

    monkeypatch.setattr(NormPropConv2d, "plain", wrong)
    with pytest.raises(
        FoldError, match=r"differs from the model by \S+ of the largest output \(limit \de-02"
    ):
        fold(net, verify=x)


def test_an_output_that_is_cast_has_the_limit_of_what_computed_it():
    def two(self, x):
        return self.layer(x), self.layer(x).double()

    net, x = Code(two, layer=conv(3)).float(), randn(2, 3, 9, 9).float()
    fold(net.double(), verify=x.double())
    fold(net.float(), verify=x)


# --- whole networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [PAPER, RECOMMENDED], ids=["paper", "recommended"])
@pytest.mark.parametrize("name", models.MODELS)
def test_recipe_models(name, rule):
    torch.manual_seed(0)
    net = models.build(name, (3, 32, 32), 10, rule=rule, width=0.125)
    assert_folds(trained(net), randn(2, 3, 32, 32))


def preserved_zoo(build):
    net = build().double()
    for index, m in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        m.running_mean.copy_(0.1 * randn(m.num_features, seed=index))
        m.running_var.copy_(0.5 + randn(m.num_features, seed=index).square())
    return net


ZOO = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(12, (2, 2), 16, num_classes=10),
}


@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_converted_networks(build, preserve):
    torch.manual_seed(0)
    source = preserved_zoo(build)
    x = randn(1, 3, 37, 33)
    converted = convert(source, preserve=preserve, example=x, strict=True).model.eval()
    inputs = (x, randn(2, 3, 48, 45, seed=1))
    if not preserve:  # trained a little: no two channels alike
        with torch.no_grad():
            for index, p in enumerate(converted.parameters()):
                p.add_(0.05 * randn(*p.shape, seed=index))
    folded = assert_folds(converted, *inputs)
    if preserve:
        source.eval()
        for x in inputs:
            torch.testing.assert_close(folded(x), source(x), rtol=1e-8, atol=1e-8)


def test_the_folded_network_is_an_ordinary_module():
    net = trained(
        nn.Sequential(conv(3), NormalizedMaxPool2d(3, 2, 1, activation="silu"), conv(), conv(act="relu"))
    )
    x = randn(2, 3, 9, 9)
    folded = fold(net, verify=x)
    expected = folded(x)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(folded),
        pickle.loads(pickle.dumps(folded)),
        torch.load(file, weights_only=False),
        torch.export.export(folded, (x,)).module(),
    ):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(folded, backend="eager", fullgraph=True)(x), expected)
    twin = copy.deepcopy(folded)
    for p in twin.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(folded.float()(x.float()).double(), expected, rtol=1e-3, atol=1e-4)


class Twice(nn.Module):
    """A map that two read, and one that only the activation reads."""

    def __init__(self):
        super().__init__()
        self.trunk = normprop.NormPropConv2d(3, 3, 1, activation=None)
        self.alone = normprop.NormPropConv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.trunk(x)
        return self.alone(self.act(y)) + y


def test_an_activation_overwrites_only_what_it_alone_reads():
    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(2, 3, 5, 5)
    before = x.clone()
    folded = normprop.fold(model, verify=x)
    kinds = {type(m): m for m in folded.modules()}
    assert kinds[nn.Threshold].inplace
    assert not kinds[nn.ReLU].inplace
    with torch.no_grad():
        first, second = folded(x), folded(x)
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    torch.testing.assert_close(first, model(x))
    gradients = [
        torch.autograd.grad(net(leaf).square().sum(), leaf)[0]
        for net in (folded, model)
        for leaf in (x.clone().requires_grad_(),)
    ]
    torch.testing.assert_close(*gradients)


class Positions(nn.Module):
    """Arithmetic on whole numbers, and a division that rounds, as positional encodings have them."""

    def __init__(self):
        super().__init__()
        self.layer = normprop.NormPropLinear(6, 6)

    def forward(self, x):
        index = torch.arange(6, device=x.device)
        frequency = 10.0 ** (2 * torch.div(index.float(), 2, rounding_mode="floor") / 6)
        return self.layer(x)[:, index * 1] + torch.div(x, 2.0, rounding_mode="floor") / frequency


def test_whole_numbers_and_rounding_divisions_are_left_as_they_are():
    torch.manual_seed(0)
    model = Positions()
    x = 5 * torch.randn(3, 6)
    torch.testing.assert_close(normprop.fold(model, verify=x)(x), model(x))


class ReadTwice(nn.Module):
    """What waits behind its layer is read by two, who wait themselves."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = NormPropConv2d(3, 4, 3, activation=None), read

    def forward(self, x):
        return self.read(self.layer(x))


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y + torch.tanh((y - 1.0) / 2.0),
        lambda y: torch.cat([torch.tanh(y * 2), torch.tanh(y + 1)]),
        lambda y: torch.tanh(y * 2) + (y * 2).relu() + y,
    ],
)
def test_a_layer_that_is_read_twice_keeps_its_scale(read):
    assert_folds(trained(ReadTwice(read)), randn(2, 3, 7, 7))


@pytest.mark.parametrize(
    "act", [nn.LeakyReLU(0.2), nn.ELU(0.5), nn.PReLU(init=0.7), lambda z: z * torch.sigmoid(z)]
)
def test_adaptive_max_pools_have_the_constants_of_their_activation(act):
    net = nn.Sequential(conv(3, act=act), NormalizedAdaptiveMaxPool2d(2, activation=act))
    assert_folds(net.double(), randn(2, 3, 9, 9))


def test_outputs_that_are_no_real_numbers_are_left_uncompared():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = NormPropLinear(3, 4)

        def forward(self, x):
            y = self.layer(x)
            return {"y": y, "label": y.argmax(1), "nothing": None, "pair": [y, (y,)]}

    net, x = Many(), randn(2, 3, dtype=torch.float32)
    found = fold(net, verify=x)(x)
    torch.testing.assert_close(found["pair"][1][0], net(x)["y"])
    assert found["nothing"] is None


@pytest.mark.parametrize(("verify", "said"), [(True, "got bool"), ((1, 2), "got a tuple with int")])
def test_what_is_no_example_is_refused(verify, said):
    with pytest.raises(
        TypeError, match=f"verify must be a tensor or a tuple of tensors, {said}; for a shape"
    ):
        fold(nn.Sequential(conv(3)), verify=verify)


class Reads(nn.Module):
    """Code that reads layers' parameters, and writes calls with keywords alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = NormPropLinear(5, 8), nn.Linear(8, 3)
        self.c = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        early = self.a.weight
        y = self.a(x)
        tied = nn.functional.linear(y, self.a.weight.t())
        sums = torch.add(input=y, other=1.0), torch.mul(input=y, other=2)
        both = torch.cat(tensors=[y * 2 + 1, y * 2 + 1], dim=1)
        return early.square().sum(), tied, self.b(y) * 2, self.b.bias, self.c(y) / 4, *sums, both


@pytest.mark.parametrize("verify", [False, True])
def test_parameters_that_the_code_reads_are_the_models_own(verify):
    model, x = Reads().double(), torch.randn(2, 5, dtype=torch.float64)
    folded = fold(model, verify=x if verify else None)
    for ours, theirs in zip(folded(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_hooks_are_not_lost_silently():
    model, x = nn.Sequential(NormPropLinear(5, 8), nn.Sequential(nn.Linear(8, 3))), torch.randn(2, 5)
    for module in (model, model[0]):
        handle = module.register_forward_hook(lambda module, inputs, output: output * 3)
        with pytest.raises(FoldError, match="forward hooks, which the folded model does not run"):
            fold(model)
        with pytest.raises(FoldError, match="it does not run the forward hooks of '"):
            fold(model, verify=x)
        handle.remove()
    for module in (model[1], model[1][0]):  # one is traced through, the other kept
        module.register_forward_hook(lambda module, inputs, output: output * 3)
    normprop.scale_together(model)
    torch.testing.assert_close(fold(model)(x), model(x))


def test_constants_of_an_unknown_size_are_refused():
    pool = normprop.NormalizedAdaptiveMaxPool2d(1)
    with pytest.raises(FoldError, match="its constants depend on the input's size; pass verify="):
        fold(nn.Sequential(NormPropConv2d(3, 4, 3), pool))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(
            NormalizedActivation("relu", 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormPropLinear(8, 5)
        ),
        nn.Sequential(NormalizedActivation("gelu", 8), nn.Flatten(2), nn.ReLU(), nn.Linear(8, 8)),
    ],
    ids=["pooled", "flattened"],
)
def test_without_verify_no_number_of_dims_is_taken_for_granted(net):
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[0].gain.normal_()
        net[0].bias.normal_()
    folded = fold(net)
    for size in ((4, 8, 8, 1), (4, 8, 2, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize("call", [fold, lambda m: normprop.predict(m, torch.randn(2, 3)), normprop.lighten])
def test_wrapped_models_name_what_to_pass(call):
    wrapped = nn.DataParallel(nn.Sequential(NormPropLinear(3, 2)))
    with pytest.raises(normprop.TraceError, match=r"model is wrapped in DataParallel: pass model\.module"):
        call(wrapped)


def test_a_threshold_takes_the_constants_in():
    """As a module or a function: no operation for the activation's mean and std."""
    a, b = NormPropLinear(16, 16, activation="gelu"), NormPropLinear(16, 4, activation=None)
    function = Code(lambda self, x: self.b(F.threshold(self.a(x), 0.1, 0.1)), a=a, b=b)
    for net in (nn.Sequential(a, nn.Threshold(0.1, 0.1), b), function):
        assert sum(node.op.startswith("call") for node in fold(net).graph.nodes) == 4


# --- code that torch.fx cannot follow ------------------------------------------------------------


class ByList(nn.Module):
    """Layers called by a list, each told by an attribute what it reads; the way that detectors are written."""

    def __init__(self):
        super().__init__()
        down = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
        moded = Code(
            lambda self, x: self.a(x) if self.training else 2 * self.a(x), a=copy.deepcopy(down[:2])
        )
        self.parts = nn.ModuleList([down, moded, nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))])
        for part, reads in zip(self.parts, ([-1], [-1], [0, 1]), strict=True):
            part.reads = reads
        self.calls = 0

    def forward(self, *images):
        self.calls += 1
        maps, (x,) = [], images
        for part in self.parts:
            given = [maps[i] if i >= 0 else x for i in part.reads]
            maps.append(part(torch.cat(given, 1) if len(given) > 1 else given[0]))
        return maps[-1]


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_where_code_cannot_be_followed_its_parts_are_folded(preserve, verified):
    source, x = ByList().double(), randn(2, 3, 9, 9)
    model = convert(source, preserve=preserve).model
    folded = copy.deepcopy(fold(model, verify=x if verified else None))
    assert not ours(folded)
    assert folded.calls == model.calls == 0
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_parts_with_several_names_stay_one():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def body(self, x):
        for part in self.parts if float(x.detach().sum()) < 1e9 else []:
            x = part(x)
        return self.other(x)

    source, x = Code(body, parts=nn.ModuleList([block] * 3), other=block).double().eval(), randn(2, 4, 6, 6)
    conversion = convert(source, preserve=True, strict=True)
    folded = fold(conversion.model, verify=x)
    for model in (conversion.model, folded):
        assert len({id(part) for part in (*model.parts, model.other)}) == 1
        torch.testing.assert_close(model(x), source(x), rtol=1e-12, atol=1e-12)
    assert not ours(folded)
    conversion.update_optimizer_(torch.optim.SGD(source.parameters(), lr=0.1))


def test_sizes_reach_parts_inside_of_parts():
    def guarded(self, x):
        return self.a(x) if float(x.sum()) < 1e9 else x

    pooled = nn.Sequential(NormPropConv2d(3, 4, 3), NormalizedAdaptiveMaxPool2d(2))
    model, x = Code(guarded, a=Code(guarded, a=nn.Sequential(pooled))).double(), randn(2, 3, 9, 9)
    folded = fold(model, verify=x)
    assert not ours(folded)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def ours(model):
    return [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("normprop")]


def test_layers_called_by_such_code_are_folded_one_by_one():
    norm = GlobalDataNorm.fit(randn(50, 3))
    hidden = nn.Sequential(NormPropLinear(3, 8, activation="gelu"), NormPropLinear(8, 8))
    layers = nn.ModuleList(
        [norm, hidden, NormalizedActivation("silu", 8), NormPropLinear(8, 2, activation=None)]
    )

    def body(self, x):
        if float(x.sum()) > 1e9:
            return x
        for layer in self.layers:
            x = layer(x)
        return x, self.layers[3].in_features

    model, x = Code(body, layers=layers).double(), randn(4, 3)
    folded = fold(model)
    assert not ours(folded)
    assert folded(x)[1] == 8
    torch.testing.assert_close(folded(x)[0], model(x)[0], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_by_itself_is_named():
    def body(self, x):
        return self.join(x, x) if float(x.sum()) < 1e9 else x

    class Own(NormPropLinear):
        def forward(self, x):
            return super().forward(x + 1)

    with pytest.raises(FoldError, match=r"join \(NormalizedAdd\) cannot be folded by itself"):
        fold(Code(body, join=NormalizedAdd()))
    with pytest.raises(normprop.TraceError, match="Own gives a NormProp layer a forward of its own"):
        fold(Code(lambda self, x: self.a(x) if float(x.sum()) < 1e9 else x, a=Own(3, 2)))
    for model in (nn.Sequential(Own(3, 2)), Own(3, 2)):
        with pytest.raises(normprop.TraceError, match="Own gives a NormProp layer a forward of its own"):
            fold(model)


def test_deep_copies_of_a_conversion_keep_plain_attributes():
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    source.names = ["cat", "dog"]
    twin = copy.deepcopy(convert(source).model)
    assert twin.names == ["cat", "dog"]
    twin.names.append("bird")
    assert source.names == ["cat", "dog"]


def test_a_sample_without_batch_through_an_adaptive_max_pool():
    model = nn.Sequential(normprop.NormPropConv2d(3, 4, 3), normprop.NormalizedAdaptiveMaxPool2d((2, None)))
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(fold(model, verify=x)(x), model(x))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = normprop.NormPropLinear(8, 8)

    def forward(self, x):
        return self.layer(x) + 2 * torch.randn_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_draws_numbers_is_verified_with_the_same(dtype):
    model, x = Drawing().to(dtype), torch.randn(4, 8, dtype=dtype)
    before = torch.get_rng_state()
    fold(model, verify=x)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_noise_is_no_excuse_for_a_wrong_fold(monkeypatch):
    monkeypatch.setattr(folding, "_folded", lambda model, *_: nn.Identity())
    with pytest.raises(FoldError, match="the folded model differs"):
        fold(Drawing(), verify=torch.randn(4, 8))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(normprop.NormPropLinear(4, 4))
    with pytest.raises(
        ValueError, match=r"'0.weight' has no values \(device meta\): load the weights first"
    ):
        fold(model)


def test_a_global_pool_folds_without_a_pass_over_its_map():
    model = nn.Sequential(
        normprop.NormPropConv2d(3, 4, 3),
        normprop.NormalizedAdaptiveAvgPool2d(1, correlation=0.1),
        nn.Flatten(),
        normprop.NormPropLinear(4, 2, activation=None),
    )
    folded = fold(model, verify=torch.randn(2, 3, 9, 9))
    sized = [node.args[0].op for node in folded.graph.nodes if node.target is getattr]
    assert sized == ["call_module"] * 2  # the threshold's own map, not that map times a constant
    x = torch.randn(2, 3, 12, 7)
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("code", [lambda h: h.mT @ h, lambda h: h.data + 0.0, lambda h: h.flatten(1).T])
def test_attributes_that_are_maps_without_an_example(code):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.layer = nn.Embedding(10, 16), normprop.NormPropLinear(16, 16, activation="gelu")

        def forward(self, x):
            return code(self.layer(self.rows(x)))

    model, x = Net().eval(), torch.randint(0, 10, (3, 5))
    torch.testing.assert_close(fold(model)(x), model(x))
