"""``convert``: against the source in eval mode, against the source's own bits, and against measured signals."""

import copy
import functools
import io
import math
import pickle
import re
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from code_model import Code
from timm.layers import BatchNormAct2d
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import normprop
from normprop import convert
from normprop.graph.convert import ConversionError
from normprop.testing import (
    assert_accumulation_equals_batch,
    assert_batch_independent,
    assert_train_equals_eval,
)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_statistics(model):
    """BatchNorms as after training."""
    for index, norm in enumerate(m for m in model.modules() if isinstance(m, _BatchNorm)):
        if norm.running_mean is not None:
            norm.running_mean.copy_(0.5 * randn(norm.num_features, seed=index))
            norm.running_var.copy_(0.5 + randn(norm.num_features, seed=index + 50).square())
        if norm.affine:
            with torch.no_grad():
                norm.weight.copy_(randn(norm.num_features, seed=index + 100))
                norm.bias.copy_(randn(norm.num_features, seed=index + 150))
    return model


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
C = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
B = nn.BatchNorm2d


def triple(layer, norm, act=nn.ReLU, **_):
    return nn.Sequential(OrderedDict(conv=layer, bn=norm, act=act()))


def by_function(act):
    return lambda: Code(lambda self, x: act(self.bn(self.conv(x))), conv=C(3, 8), bn=B(8))


def functional_conv(self, x):
    return F.relu(self.bn(F.conv2d(F.pad(x, (1, 2, 1, 2)), self.conv.weight, self.conv.bias)))


def residual(self, x):
    x = self.stem(x)
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    y += x
    return F.relu(y)


def pre_activation(self, x):
    x = self.stem(x)
    y = self.conv1(F.relu(self.bn1(x)))
    return x + self.conv2(self.bn2(y).relu_())


def dense(self, x):
    x = self.stem(x)
    y = self.conv1(F.relu(self.bn1(x)))
    z = torch.cat([x, y], 1)
    return F.relu(self.bn2(z))


def called_twice(self, x):
    x = F.relu(self.stem(x))
    for _ in range(2):
        x = self.act(self.bn(self.conv(x)))
    return x


def two_norms(self, x):
    x = self.stem(x)
    return self.act(self.bn1(self.conv(x))) + self.act(self.bn2(self.conv(x)))


def one_norm_two_convs(self, x):
    return self.act(self.bn(self.conv1(x))) + self.bn(self.conv2(x))


def output_read_twice(self, x):
    y = self.conv(x)
    z = self.bn(y)
    return y + z + F.relu(z)


def squeeze_excite(self, x):
    x = F.relu(self.bn(self.conv(x)))
    return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


# Model, shape of its input; what sites its BatchNorms become.
SITES = {
    **{f"conv{d}": (lambda d=d: triple(CONVS[d](3, 8, 3, padding=1), NORMS[d](8)), (2, 3, *[7] * d)) for d in CONVS},
    **{
        f"transposed{d}": (
            lambda d=d: triple(TRANSPOSED[d](4, 6, 3, stride=2, output_padding=1, groups=2), NORMS[d](6)),
            (2, 4, *[4] * d),
        )
        for d in CONVS
    },
    "linear": (lambda: triple(nn.Linear(5, 8), nn.BatchNorm1d(8)), (4, 5)),
    "linear of sequences": (lambda: triple(nn.Linear(5, 8), nn.BatchNorm1d(6)), (4, 6, 5)),
    "function": (by_function(F.relu), (2, 3, 7, 7)),
    "in place": (by_function(lambda x: F.relu(x, inplace=True)), (2, 3, 7, 7)),
    "method": (by_function(lambda x: x.relu()), (2, 3, 7, 7)),
    "in-place method": (by_function(lambda x: x.relu_()), (2, 3, 7, 7)),
    "in-place module": (lambda: triple(C(3, 8), B(8), lambda: nn.ReLU(inplace=True)), (2, 3, 7, 7)),
    "gelu": (by_function(lambda x: F.gelu(x, approximate="tanh")), (2, 3, 7, 7)),
    "leaky": (by_function(lambda x: F.leaky_relu(x, 0.2)), (2, 3, 7, 7)),
    "swish": (by_function(lambda x: x * torch.sigmoid(x)), (2, 3, 7, 7)),
    "prelu": (lambda: triple(C(3, 8), B(8), lambda: nn.PReLU(8)), (2, 3, 7, 7)),
    "lambda": (by_function(lambda x: x.clamp(min=-0.5).tanh()), (2, 3, 7, 7)),
    "no activation": (by_function(lambda x: x), (2, 3, 7, 7)),
    "functional conv": (lambda: Code(functional_conv, conv=nn.Conv2d(3, 8, 3), bn=B(8)), (2, 3, 7, 7)),
    "residual": (
        lambda: Code(residual, stem=triple(C(3, 6), B(6)), conv1=C(6, 6), bn1=B(6), conv2=C(6, 6), bn2=B(6)),
        (2, 3, 7, 7),
    ),
    "pre-activation": (
        lambda: Code(pre_activation, stem=C(3, 6), bn1=B(6), conv1=C(6, 6), bn2=B(6), conv2=C(6, 6)),
        (2, 3, 7, 7),
    ),
    "conv after BatchNorm": (lambda: nn.Sequential(C(3, 6), B(6), C(6, 4), B(4)), (2, 3, 7, 7)),
    "BatchNorm first": (lambda: nn.Sequential(B(3), C(3, 6), nn.ReLU()), (2, 3, 7, 7)),
    "dense": (lambda: Code(dense, stem=C(3, 6), bn1=B(6), conv1=C(6, 6), bn2=B(12)), (2, 3, 7, 7)),
    "pair called twice": (
        lambda: Code(called_twice, stem=C(3, 6), conv=C(6, 6), bn=B(6), act=nn.ReLU()),
        (2, 3, 7, 7),
    ),
    "conv with two norms": (
        lambda: Code(two_norms, stem=C(3, 6), conv=C(6, 6), bn1=B(6), bn2=B(6), act=nn.ReLU()),
        (2, 3, 7, 7),
    ),
    "norm with two convs": (
        lambda: Code(one_norm_two_convs, conv1=C(3, 6), conv2=C(3, 6), bn=B(6), act=nn.ReLU(inplace=True)),
        (2, 3, 7, 7),
    ),
    "output read twice": (lambda: Code(output_read_twice, conv=C(3, 6), bn=B(6)), (2, 3, 7, 7)),
    "squeeze-excite": (
        lambda: Code(squeeze_excite, conv=C(3, 8), bn=B(8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1)),
        (2, 3, 7, 7),
    ),
    "bn and act in one": (
        lambda: nn.Sequential(C(3, 8), BatchNormAct2d(8), C(8, 4), BatchNormAct2d(4, apply_act=False)),
        (2, 3, 7, 7),
    ),
    "no conv bias": (lambda: triple(C(3, 8, bias=False), B(8)), (2, 3, 7, 7)),
    "groups": (lambda: triple(C(4, 8, groups=4), B(8)), (2, 4, 7, 7)),
    "dilation": (lambda: triple(nn.Conv2d(3, 8, 3, 2, 2, 2), B(8)), (2, 3, 9, 8)),
    "reflect": (lambda: triple(C(3, 8, padding_mode="reflect"), B(8)), (2, 3, 7, 7)),
    "same": (lambda: triple(nn.Conv2d(3, 8, (1, 3), padding="same"), B(8)), (2, 3, 7, 7)),
    "no affine": (lambda: triple(C(3, 8), B(8, affine=False)), (2, 3, 7, 7)),
    "cumulative average": (lambda: triple(C(3, 8), B(8, momentum=None, eps=0.1)), (2, 3, 7, 7)),
    "sync": (lambda: triple(C(3, 8), nn.SyncBatchNorm(8)), (2, 3, 7, 7)),
    "zero rows": (lambda: triple(zeroed(C(3, 8)), B(8)), (2, 3, 7, 7)),
    "tied weights": (lambda: tie(nn.Sequential(C(3, 3), B(3), nn.ReLU(), C(3, 3), B(3))), (2, 3, 7, 7)),
    "dropout": (
        lambda: nn.Sequential(C(3, 8), B(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(392, 4)),
        (2, 3, 7, 7),
    ),
}  # fmt: skip
sites = pytest.mark.parametrize(("build", "shape"), SITES.values(), ids=SITES)


def zeroed(layer):
    nn.init.zeros_(layer.weight[2:])
    return layer


def tie(model):
    model[3].weight = model[0].weight
    return model


def prepared(build):
    torch.manual_seed(0)
    return random_statistics(build().double())


def fingerprint(model):
    """All that conversion must leave alone."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, id(m), m.training, list(vars(m)), list(m._forward_hooks)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters(remove_duplicate=False)],
    )


def assert_untouched(model, before):
    after = fingerprint(model)
    assert after[1:] == before[1:]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)


# --- every site ---------------------------------------------------------------------------------


def test_a_resize_that_keeps_variance_is_left():
    for mode in ("nearest", "nearest-exact", "area"):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Upsample(scale_factor=2, mode=mode)
        )
        conversion = convert(net)
        assert [site.path for site in conversion.replaced] == ["0"]
        assert type(conversion.model.get_submodule("3")) is nn.Upsample


@sites
def test_preserved_is_the_source_in_eval_mode(build, shape):
    model, x = prepared(build), randn(*shape)
    expected = copy.deepcopy(model).eval()(x)
    model.train()
    before = fingerprint(model)
    conversion = convert(model, preserve=True, strict=True, example=x)
    assert_untouched(model, before)
    converted = conversion.model
    for mode in (True, False):
        converted.train(mode)
        if mode and any(isinstance(m, nn.Dropout) for m in converted.modules()):
            continue
        torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9)
    assert any("constants 'none'" in note for note in conversion.notes)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # see below
@sites
@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_what_every_conversion_keeps(build, shape, preserve):
    model, x = prepared(build).train(), randn(*shape)
    paths = {
        n for n, m in model.named_modules() if not isinstance(m, _BatchNorm) and list(m.parameters(False))
    }
    before = fingerprint(model)
    torch.manual_seed(1)  # rows of zeros are drawn anew
    conversion = convert(model, preserve=preserve, example=x)
    assert_untouched(model, before)
    converted = conversion.model
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    layers = [m for m in converted.modules() if not isinstance(m, normprop.GlobalDataNorm)]
    assert not [buffer for m in layers for buffer in m.buffers(recurse=False)]
    assert not conversion.skipped
    assert paths <= {n for n, _ in converted.named_modules()} | {"act"}  # a PReLU is in its layer
    torch.manual_seed(1)
    again = convert(model, preserve=preserve, example=x).model
    assert list(again.state_dict()) == list(converted.state_dict())
    torch.testing.assert_close(again.state_dict(), converted.state_dict(), rtol=0, atol=0)
    twice = convert(converted, preserve=preserve, example=x)
    assert list(twice.model.state_dict()) == list(converted.state_dict())
    assert "no BatchNorm layer found" in " ".join(twice.notes)
    converted.eval()
    torch.testing.assert_close(twice.model.eval()(x), converted(x), rtol=0, atol=0)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    assert not shared
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    conversion.update_optimizer_(optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in converted.parameters()}
    # One sample has a finite output and finite gradients, all of them.
    converted(x[:1]).square().sum().backward()
    for name, p in converted.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
    # A step changes it.
    y = converted(x).detach()
    optimizer.step()
    assert not torch.equal(converted(x), y)


@pytest.mark.filterwarnings("ignore:switched off for this check")
@sites
@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_the_three_promises(build, shape, preserve):
    converted = convert(prepared(build), preserve=preserve, example=randn(*shape)).model
    x = randn(3, *shape[1:])
    assert_batch_independent(converted, x)
    assert_train_equals_eval(converted, x)
    target = torch.zeros(())
    assert_accumulation_equals_batch(
        converted, x, target.expand(3), lambda y, _: y.square().mean(), tolerance=1e-9
    )


@sites
def test_a_copy_is_a_model_of_its_own(build, shape):
    x = randn(*shape)
    converted = convert(prepared(build), example=x).model.eval()
    expected = converted(x)
    twin = copy.deepcopy(converted)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1 * randn(*p.shape))
    assert not torch.equal(twin(x), expected)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=0)
    converted.load_state_dict(twin.state_dict())
    torch.testing.assert_close(converted(x), twin(x), rtol=0, atol=0)


def network(channels=8):
    """Small, with what a small net has."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, channels, 3, padding=1, bias=False), bn1=B(channels), relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2), conv2=nn.Conv2d(channels, channels, 3), bn2=B(channels), act=nn.SiLU(),
            gap=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(channels, 4),
        )
    )  # fmt: skip


X = randn(4, 3, 13, 12)


@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_pickle_and_torch_save(preserve):
    converted = convert(network().double(), preserve=preserve, example=X).model
    torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(X), converted(X), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), converted(X), rtol=0, atol=0)


@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_compiles_exports_and_maps(preserve):
    converted = convert(network().double(), preserve=preserve, example=X).model
    expected = converted(X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(converted, backend="eager", fullgraph=True)(X), expected)
    exported = torch.export.export(copy.deepcopy(converted).eval(), (X,)).module()
    torch.testing.assert_close(exported(X), expected)
    parameters = dict(converted.named_parameters())

    def loss(p, x):
        return functional_call(converted, p, (x[None],)).square().sum()

    mapped = vmap(grad(loss), (None, 0))(parameters, X)
    for index, x in enumerate(X):
        single = grad(loss)(parameters, x)
        for name, g in single.items():
            torch.testing.assert_close(mapped[name][index], g)


def test_averages_of_weights_load():
    """FedAvg: no buffers to average, no counters."""
    model = convert(network().double(), example=X).model
    clients = [copy.deepcopy(model) for _ in range(3)]
    for index, client in enumerate(clients):
        for p in client.parameters():
            p.data.add_(0.1 * randn(*p.shape, seed=index))
    states = [c.state_dict() for c in clients]
    mean = {k: sum(s[k] for s in states) / 3 for k in states[0]}
    assert all(v.is_floating_point() for v in mean.values())
    model.load_state_dict(mean)
    torch.testing.assert_close(model.fc.weight, sum(c.fc.weight for c in clients) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_dtype_and_layout_are_kept(dtype, preserve):
    model = random_statistics(network()).to(dtype).to(memory_format=torch.channels_last)
    converted = convert(model, preserve=preserve, example=X.to(dtype)).model.eval()
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert converted.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    y = converted(X.to(dtype))
    assert y.dtype == dtype
    if preserve:
        # A few roundings of the type at each of three layers.
        tolerance = 40 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, model.eval()(X.to(dtype)), rtol=tolerance, atol=tolerance)


def test_frozen_parameters_stay_frozen():
    model = network()
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    model.bn2.weight.requires_grad_(False)
    for preserve in (True, False):
        converted = convert(model, preserve=preserve, example=X.float()).model
        frozen = {n for n, p in converted.named_parameters() if not p.requires_grad}
        assert frozen == {"conv1.weight", "conv1.gain", "conv1.bias", "conv2.gain"}


def test_training_flags_are_kept_per_module():
    model = network().train()
    model.conv2.eval()
    model.pool.eval()
    for preserve in (True, False):
        converted = convert(model, preserve=preserve, example=X.float()).model
        assert {n for n, m in converted.named_modules() if not m.training} >= {"conv2", "pool"}
        assert converted.training
        assert converted.conv1.training
        assert not any(
            m.training for m in convert(model.eval(), preserve=preserve, example=X.float()).model.modules()
        )
        model.train()
        model.conv2.eval()
        model.pool.eval()


# --- random and two-faced modules ---------------------------------------------------------------


class TwoFaced(nn.Module):
    """An auxiliary head and functional dropout in training."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(C(3, 8), B(8), nn.ReLU(inplace=True), C(8, 8), B(8), nn.ReLU())
        self.aux = nn.Sequential(nn.Conv2d(8, 4, 1), B(4), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        y = self.features(x)
        z = self.fc(F.dropout(y.mean((2, 3)) * self.scale, 0.5, self.training))
        if self.training:
            return z, self.aux(y)
        return z


@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
def test_auxiliary_heads_and_functional_dropout(preserve):
    model = prepared(TwoFaced).train()
    conversion = convert(model, preserve=preserve, example=X)
    converted = conversion.model
    assert not conversion.skipped
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    y, aux = converted(X)
    assert aux.shape == (4, 4, 13, 12)
    assert not torch.equal(converted(X)[0], y)  # dropout
    converted.eval()
    y = converted(X)
    torch.testing.assert_close(converted(X), y, rtol=0, atol=0)
    if preserve:
        torch.testing.assert_close(y, model.eval()(X), rtol=1e-9, atol=1e-9)
    assert not converted.features.training
    assert converted.train().aux.training
    twin = copy.deepcopy(converted)
    torch.testing.assert_close(twin.eval()(X), y, rtol=0, atol=0)
    assert list(twin.state_dict()) == list(converted.state_dict())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(converted.eval(), backend="eager", fullgraph=True)(X), y)
    converted.train()(X)[1].sum().backward()
    assert converted.aux.get_submodule("0").gain.grad is not None


@pytest.mark.parametrize("copied", [False, True])
def test_a_new_head_takes_effect_in_both_modes(copied):
    converted = convert(TwoFaced().double(), example=X).model
    converted = copy.deepcopy(converted) if copied else converted
    converted.fc = nn.Linear(8, 2).double()
    assert converted.eval()(X).shape == (4, 2)
    assert converted.train()(X)[0].shape == (4, 2)


def stochastic(self, x):
    return F.relu(x + self.drop(self.bn(self.conv(x))))


@pytest.mark.parametrize("preserve", [True, False], ids=["preserved", "fresh"])
@pytest.mark.parametrize(
    "drop",
    [torchvision.ops.StochasticDepth(0.5, "row"), timm.layers.DropPath(0.5), nn.Dropout2d(0.5)],
    ids=["torchvision", "timm", "dropout"],
)
def test_train_and_eval_are_obeyed(drop, preserve):
    model = Code(stochastic, conv=C(3, 3), bn=B(3), drop=drop)
    model = random_statistics(nn.Sequential(C(3, 3), B(3), model).double()).train()
    converted = convert(model, preserve=preserve, example=X).model
    many = X[:1].expand(64, -1, -1, -1)
    outputs = converted(many).flatten(1).unique(dim=0)
    assert len(outputs) == 2 if not isinstance(drop, nn.Dropout2d) else len(outputs) > 2
    assert len(converted.eval()(many).flatten(1).unique(dim=0)) == 1
    if preserve:
        torch.testing.assert_close(converted(X), model.eval()(X), rtol=1e-9, atol=1e-9)


# --- what is left, and why ----------------------------------------------------------------------


def of_data(self, x):
    y = self.bn(self.conv(x))
    return y if y.sum() > 0 else -y


def untraceable(part=None):
    return Code(
        lambda self, x: self.part(x) if x.abs().sum() > 0 else x,
        part=part or network(),
    )


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


# Model, arguments of convert, where it is skipped, why.
SKIPPED = {
    "no statistics": (
        lambda: triple(C(3, 8), B(8, track_running_stats=False)), {"preserve": True}, "bn", "no running statistics",
    ),
    "functional": (
        lambda: Code(lambda self, x: F.batch_norm(self.conv(x), None, None, training=True), conv=C(3, 8), bn=B(8)),
        {}, "", r"written as a function; use an nn\.BatchNorm",
    ),
    "parametrized": (
        lambda: triple(parametrizations.weight_norm(C(3, 8)), B(8)), {}, "conv", "remove_parametrizations first",
    ),
    "own forward": (lambda: triple(C(3, 8), OwnForward(8)), {}, "bn", "a forward of its own"),
    "of data": (lambda: Code(of_data, conv=C(3, 8), bn=B(8)), {}, "bn", "cannot be followed"),
    "inside": (lambda: untraceable(Code(of_data, conv=C(3, 8), bn=B(8))), {}, "part.bn", "cannot be followed"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "arguments", "path", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_skipped_says_why(build, arguments, path, reason):
    model = prepared(build)
    conversion = convert(model, example=X, **arguments)
    assert path in [site.path for site in conversion.skipped]
    site = next(s for s in conversion.skipped if s.path == path)
    assert re.search(reason, site.target)
    assert reason.split("\\")[0].split()[0] in str(conversion)
    conversion.model(X)
    with pytest.raises(ConversionError, match=reason):
        convert(model, example=X, strict=True, **arguments)


@pytest.mark.parametrize("name", [n for n in SKIPPED if n not in ("functional",)])
def test_with_skipped_parts_preserved_is_still_the_source(name):
    model = prepared(SKIPPED[name][0])
    converted = convert(model, preserve=True, example=X).model
    torch.testing.assert_close(converted.eval()(X), copy.deepcopy(model).eval()(X), rtol=1e-9, atol=1e-9)


def test_strict_lists_every_reason():
    model = nn.Sequential(
        C(3, 4), B(4, track_running_stats=False), parametrizations.weight_norm(C(4, 4)), OwnForward(4)
    )
    with pytest.raises(ConversionError, match=r"^3 sites") as error:
        convert(model, preserve=True, strict=True, example=X.float())
    for line in (
        "  1: BatchNorm2d: it keeps no running",
        "  2: ParametrizedConv2d: its weight",
        "  3: OwnForward: ",
    ):
        assert line in str(error.value)


def test_a_model_that_fx_cannot_follow_is_converted_child_by_child():
    model = prepared(untraceable).train()
    before = fingerprint(model)
    conversion = convert(model, preserve=True, strict=True)
    assert_untouched(model, before)
    assert "'model' was converted child by child" in " ".join(conversion.notes)
    assert [s.path for s in conversion.replaced] == ["part.conv1", "part.conv2"]
    torch.testing.assert_close(conversion.model.eval()(X), model.eval()(X), rtol=1e-9, atol=1e-9)
    assert conversion.model.part.conv1.gain.shape == (8,)


def test_filter_fn_leaves_what_it_rejects():
    model = prepared(network)
    seen = []

    def keep_first(module, path):
        seen.append((path, module))
        return not path.endswith("1")

    conversion = convert(model, preserve=True, filter_fn=keep_first, example=X)
    assert {p for p, _ in seen} >= {"conv1", "bn1", "conv2", "bn2"}
    kept = [n for n, m in conversion.model.named_modules() if isinstance(m, _BatchNorm)]
    assert kept == ["bn1"]
    torch.testing.assert_close(conversion.model.eval()(X), model.eval()(X), rtol=1e-9, atol=1e-9)


def test_without_batch_norm_nothing_happens():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()).double()
    conversion = convert(model, strict=True)
    assert conversion.notes == ["no BatchNorm layer found: nothing to convert"]
    assert "0 sites replaced, 0 skipped" in str(conversion)
    assert conversion.model is not model
    torch.testing.assert_close(conversion.model(X), model(X), rtol=0, atol=0)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"rule must be a normprop\.NormRule, such as .*, got 'paper'"):
        convert(network(), rule="paper")
    with pytest.raises(
        TypeError, match=r"filter_fn must be a function of a module and its path, got \['conv'\]"
    ):
        convert(network(), filter_fn=["conv"])
    for name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        wrapper = type(name, (nn.Module,), {"forward": lambda self, x: self.module(x)})()
        wrapper.module = network()
        with pytest.raises(ValueError, match=rf"wrapped in {name}: convert model\.module"):
            convert(wrapper)


def test_an_unused_batch_norm_is_reported():
    model = Code(lambda self, x: self.bn(self.conv(x)), conv=C(3, 4), bn=B(4), unused=B(4))
    assert [site.path for site in convert(model).skipped] == ["unused"]


# --- bugs of what is written in place or with other arguments -----------------------------------


def trunk_in_place(self, x):
    x = self.bn1(self.conv1(x))
    y = self.bn2(self.conv2(self.relu(x)))
    return x + y  # of the rectified x


def discarded(self, x):
    x = self.bn1(self.conv1(x))
    self.relu(x)
    return self.bn2(self.conv2(x))


def discarded_method(self, x):
    x = self.bn1(self.conv1(x))
    x.add_(1.0)
    return self.bn2(self.conv2(x))


def alias(self, x):
    x = y = self.bn1(self.conv1(x))
    y += 1.0
    return self.bn2(self.conv2(x))


def own_stride(self, x):
    return self.bn1(F.conv2d(x, self.conv1.weight, self.conv1.bias, stride=2, padding=1))


def own_bias(self, x):
    return self.bn1(F.conv2d(x, self.conv1.weight, padding=1))


@pytest.mark.parametrize(
    "code",
    [trunk_in_place, discarded, discarded_method, alias, own_stride, own_bias],
    ids=lambda code: code.__name__,
)
def test_code_is_preserved_as_written(code):
    modules = {"conv1": C(3, 3), "bn1": B(3), "conv2": C(3, 3), "bn2": B(3), "relu": nn.ReLU(inplace=True)}
    model = prepared(lambda: Code(code, **modules))
    expected = copy.deepcopy(model).eval()(X.clone())
    converted = convert(model, preserve=True, example=X).model.eval()
    torch.testing.assert_close(converted(X.clone()), expected, rtol=1e-9, atol=1e-9)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = C(3, 4), B(4)

    def forward(self, x, mask=None):
        x = self.bn(self.conv(x))
        return x if mask is None else x * mask


def test_an_optional_input_that_is_not_given():
    model = prepared(Optional)
    converted = convert(model, preserve=True, example=X).model.eval()
    torch.testing.assert_close(converted(X), model.eval()(X), rtol=1e-9, atol=1e-9)


def test_no_warning_of_a_weight_read_by_a_function():
    torch.set_warn_always(True)  # torch warns of this once a process
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            convert(prepared(SITES["functional conv"][0]), example=randn(*SITES["functional conv"][1]))
    finally:
        torch.set_warn_always(False)
    assert not seen


def test_a_model_without_data():
    with torch.device("meta"):
        model = network()
    assert convert(model, example=torch.empty(1, 3, 13, 12)).model(
        torch.empty(2, 3, 13, 12, device="meta")
    ).shape == (2, 4)


def test_a_norm_of_the_data_without_data():
    model = nn.Sequential(B(3), C(3, 8), B(8), nn.ReLU()).to("meta")
    conversion = convert(model, example=torch.empty(1, 3, 13, 12), strict=True)
    assert conversion.model(torch.empty(2, 3, 13, 12, device="meta")).shape == (2, 8, 13, 12)


def test_a_norm_that_nothing_reads_stays():
    def forward(self, x):
        self.unread(y := self.conv(x))
        return self.norm(y)

    model = Code(forward, conv=C(3, 4), norm=B(4), unread=B(4))
    conversion = convert(model, example=torch.ones(2, 3, 8, 8))
    assert [site.path for site in conversion.replaced] == ["conv", "norm"]
    (left,) = conversion.skipped
    assert (left.path, left.target) == ("unread", "nothing reads what it makes; delete it")


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), normprop.NormalizedActivation("prelu", 8)]
)
def test_a_norm_behind_a_pool_without_data(norm):
    layers = [C(3, 8), nn.MaxPool2d(2), norm, nn.PReLU(), C(8, 8), B(8)]
    model = nn.Sequential(*layers).to("meta")
    conversion = convert(model, example=torch.empty(1, 3, 13, 12), strict=True)
    assert conversion.model(torch.empty(2, 3, 13, 12, device="meta")).shape == (2, 8, 6, 6)


def test_functional_dropout_leaves_the_random_state_alone():
    model = TwoFaced().double()
    state = torch.get_rng_state()
    convert(model, example=X)
    assert torch.equal(torch.get_rng_state(), state)


def drops(self, x):
    return self.bn2(self.conv2(F.dropout(F.relu(self.bn1(self.conv1(x))), 0.5, self.training)))


def test_both_modes_have_the_same_constants():
    model = Code(drops, conv1=C(3, 32), bn1=B(32), conv2=C(32, 32), bn2=B(32))
    converted = convert(model.double(), example=X).model
    assert not any("Standardize" in type(m).__name__ for m in converted.modules())


def test_a_tensor_in_the_code_is_no_new_key():
    model = Code(lambda self, x: self.bn(self.conv(x)) * torch.tensor([2.0]), conv=C(3, 4), bn=B(4))
    converted = convert(model, example=X.float()).model
    assert list(converted.state_dict()) == ["conv.weight", "conv.bias", "conv.gain"]


@pytest.mark.parametrize("name", ["code", "graph", "rule", "by_mode", "graphs"])
def test_any_attribute_may_be_the_users(name):
    inner = network()
    expected = str(convert(nn.Sequential(inner), example=X.float(), strict=True))
    model = nn.Sequential(inner)
    for module in (model, inner, inner.conv1, inner.fc):
        setattr(module, name, "theirs")
    conversion = convert(model, example=X.float(), strict=True)
    assert str(conversion) == expected
    assert normprop.predict(model, X.float())["0.fc"].op == "Linear"
    normprop.fold(conversion.model, verify=X.float())


def test_upsampling_by_a_recomputed_factor_samples_the_same_grid():
    up = nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True)
    source = nn.Sequential(C(3, 8), B(8), nn.ReLU(), up, C(8, 8))
    converted = convert(source, example=X.float()).model.eval()
    y = converted.get_submodule("0")(X.float())
    torch.testing.assert_close(converted.get_submodule("3")(y), up(y))


# --- hooks and optimizers -----------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    ("conv1", "bn1", "relu", "fc"),
    ("pool",),
])  # fmt: skip
def test_hooks_are_kept_or_listed(names):
    model = network()
    seen = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.append(name))
    model.register_forward_hook(lambda m, args, y: seen.append("model"))
    conversion = convert(model, example=X.float())
    seen.clear()
    conversion.model(X.float())
    lost = {note.split("'")[1] for note in conversion.notes if "is lost" in note}
    assert lost | set(seen) == {"model", *names}
    assert not lost & set(seen)
    assert lost <= {"model", "bn1", "relu"}


def test_a_hook_with_keyword_arguments():
    model = network()
    seen = []
    model.conv1.register_forward_hook(lambda m, args, kwargs, y: seen.append(m), with_kwargs=True)
    net = convert(model, example=X.float()).model
    seen.clear()
    net(X.float())
    assert seen == [net.conv1]


def stepped(model, optimizer):
    model(X.float()).square().mean().backward()
    optimizer.step()
    return optimizer


def test_update_optimizer_keeps_groups_options_and_state():
    model = network()
    groups = [
        {"params": [*model.conv1.parameters(), *model.bn1.parameters()], "lr": 0.5},
        {"params": [*model.conv2.parameters()], "weight_decay": 0.1},
        {"params": [*model.bn2.parameters()], "lr": 0.25},
        {"params": [*model.fc.parameters()]},
    ]
    model.add_module("extra", nn.Linear(4, 4))
    groups.append({"params": list(model.extra.parameters()), "momentum": 0.5})
    optimizer = stepped(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    # Untouched: a plain layer under preserve.
    momentum = [optimizer.state[p]["momentum_buffer"] for p in model.fc.parameters()]
    conversion = convert(model, preserve=True, example=X.float())
    conversion.update_optimizer_(optimizer)
    names = {id(p): n for n, p in conversion.model.named_parameters()}
    assert [sorted(names[id(p)] for p in g["params"]) for g in optimizer.param_groups] == [
        ["conv1.bias", "conv1.gain", "conv1.weight"],
        ["conv2.weight"],
        ["conv2.bias", "conv2.gain"],
        ["fc.bias", "fc.weight"],
        ["extra.bias", "extra.weight"],
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1, 0.25, 0.1, 0.1]
    assert optimizer.param_groups[1]["weight_decay"] == 0.1
    for p, buffer in zip(conversion.model.fc.parameters(), momentum, strict=True):
        assert optimizer.state[p]["momentum_buffer"] is buffer
    assert len(optimizer.state) == 4  # the others start anew
    before = conversion.model.conv1.weight.detach().clone()
    stepped(conversion.model, optimizer)
    assert not torch.equal(conversion.model.conv1.weight, before)
    assert id(conversion.model.conv1.gain) in {id(p) for p in optimizer.state}


def test_a_foreign_optimizer_is_refused():
    conversion = convert(network())
    with pytest.raises(
        ValueError, match=r"10 parameters that are not the source model's, the first of shape"
    ):
        conversion.update_optimizer_(
            torch.optim.SGD([*network().parameters(), nn.Parameter(torch.ones(1))], 0.1)
        )


# --- fresh: mean 0, variance 1 wherever a layer reads -------------------------------------------


class Residual(nn.Module):
    def __init__(self, width, out=None, gate=False, groups=1):
        super().__init__()
        out = out or width
        self.conv1 = nn.Conv2d(width, out, 3, 2 if out != width else 1, 1, bias=False)
        self.bn1, self.bn2 = B(out), B(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, 2, bias=False), B(out)) if out != width else None
        self.gate = None
        if gate:
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, out // 4, 1), nn.ReLU(),
                nn.Conv2d(out // 4, out, 1), nn.Sigmoid(),
            )  # fmt: skip

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.gate is not None:
            y = y * self.gate(y)
        return self.relu(y + (x if self.down is None else self.down(x)))


class Inverted(nn.Module):
    def __init__(self, width):
        super().__init__()
        wide = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), B(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), B(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, width, 1, bias=False), B(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


class Dense(nn.Module):
    def __init__(self, width, growth=16):
        super().__init__()
        self.bn, self.conv = B(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


def stem(width, stride=4):
    return [nn.Conv2d(3, width, 7, stride, 3, bias=False), B(width), nn.ReLU(inplace=True)]


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


FRESH = {
    "residual": lambda: [
        *stem(16), *(Residual(16) for _ in range(10)), Residual(16, 32), *(Residual(32) for _ in range(9)), *head(32),
    ],
    "squeeze-excite": lambda: [*stem(32), *(Residual(32, gate=True) for _ in range(6)), *head(32)],
    "dense": lambda: [
        *stem(32), *(Dense(32 + 16 * i) for i in range(8)), nn.AvgPool2d(2), B(160), nn.ReLU(), *head(160),
    ],
    "mobile": lambda: [*stem(16), *(Inverted(16) for _ in range(8)), *head(16)],
    "pooled": lambda: [*stem(32, 2), nn.MaxPool2d(3, 2, 1), *(Residual(32) for _ in range(4)), *head(32)],
}  # fmt: skip


def layers_of(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "rule") and hasattr(m, "weight")}


@pytest.mark.parametrize("rule", [normprop.RECOMMENDED, normprop.PAPER], ids=["recommended", "paper"])
@pytest.mark.parametrize("name", FRESH)
def test_fresh_layers_read_unit_variance(name, rule):
    torch.manual_seed(0)
    model = nn.Sequential(*FRESH[name]())
    x = randn(8, 3, 64, 64, dtype=torch.float32)
    converted = convert(model, rule, strict=True, example=x[:1]).model
    stds = {}
    for path, layer in layers_of(converted).items():
        layer.register_forward_pre_hook(
            lambda m, args, path=path: stds.__setitem__(path, args[0].std().item())
        )
    converted(randn(8, 3, 64, 64, dtype=torch.float32, seed=1))
    assert len(stds) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert {path: std for path, std in stds.items() if not 0.7 < std < 1.4} == {}


def test_fresh_gradients_keep_their_size_over_20_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(*FRESH["residual"]())
    x = randn(8, 3, 64, 64, dtype=torch.float32)
    converted = convert(model, example=x[:1]).model
    outputs = {}
    layers = [path for path, layer in layers_of(converted).items() if isinstance(layer, nn.Conv2d)]
    for path in (layers[0], layers[-1]):
        converted.get_submodule(path).register_forward_hook(
            lambda m, args, y, path=path: outputs.__setitem__(path, y)
        )
    loss = F.cross_entropy(converted(x), torch.arange(8))
    first, last = torch.autograd.grad(loss, [outputs[layers[0]], outputs[layers[-1]]])
    assert 0.1 < float(first.norm() / last.norm()) < 10
    weights = [converted.get_submodule(path).weight for path in (layers[0], layers[-1])]
    loss = F.cross_entropy(converted(x), torch.arange(8))
    first, last = torch.autograd.grad(loss, weights)
    assert 0.1 < float(first.norm() / last.norm()) < 10


def test_fresh_starts_at_the_rule():
    rule = normprop.NormRule(centered=True, gain=0.9)
    converted = convert(prepared(network), rule, example=X).model
    assert not converted.conv1.rule.centered  # reads the data
    assert converted.conv2.rule == rule
    assert converted.conv2.bias.abs().max().item() == 0
    torch.testing.assert_close(converted.conv2.gain, torch.full_like(converted.conv2.gain, 0.9))
    lengths = converted.conv2.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert math.isclose(converted.fc.gain.mean().item(), 0.9)


class RectifiedNet(nn.Module):
    """ResNet v1: a stem, two blocks that keep the shape and one with a shortcut; ReLU after every sum."""

    def __init__(self, drop=False):
        super().__init__()
        self.drop = drop
        self.stem = triple(C(3, 8), B(8))
        self.branches = nn.ModuleList(
            nn.Sequential(triple(C(a, b), B(b)), C(b, b), B(b)) for a, b in ((8, 8), (8, 8), (8, 16))
        )
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1), B(16))
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches[:2]:
            x = F.relu(x + branch(x))
        x = F.relu(self.branches[2](x) + self.shortcut(x))
        return self.last(F.dropout(x.mean((2, 3)), 0.5, self.training and self.drop))


def converted(monkeypatch, lightened, rule, drop=False):
    if not lightened:
        monkeypatch.setattr(normprop.graph.rewrite, "lighten_", lambda *_: {})
    torch.manual_seed(0)
    source = RectifiedNet(drop).double()
    torch.manual_seed(1)
    return convert(source, rule, example=randn(2, 3, 12, 12)).model


@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED])
def test_constants_go_into_the_layers_around(monkeypatch, rule):
    light = converted(monkeypatch, True, rule)
    plain = converted(monkeypatch, False, rule)
    kinds = [type(m).__name__ for m in light.modules()]
    assert kinds.count("RectifiedSum") == 3
    assert "NormalizedAdd" not in kinds
    assert kinds.count("Standardize") <= 1  # before the mean over positions, which is no layer
    assert [type(m).__name__ for m in plain.modules()].count("Standardize") >= 3
    x = randn(4, 3, 12, 12, seed=5)
    torch.testing.assert_close(light(x), plain(x), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(net(x).sum(), net.stem.conv.weight)[0] for net in (light, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    normprop.fold(light, verify=x)
    assert_train_equals_eval(light, x)


def test_the_constants_go_with_the_state_dict(monkeypatch):
    one = converted(monkeypatch, True, normprop.RECOMMENDED)
    other = copy.deepcopy(one)
    for module in other.modules():
        if isinstance(module, normprop.RectifiedSum):
            module.low, module.ratio = 7.0, 3.0
        elif "factor" in getattr(module, "constants", ()):
            module.factor = 5.0
    x = randn(2, 3, 12, 12, seed=5)
    assert not torch.allclose(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    before = one(x)
    for module in one.modules():
        if isinstance(module, normprop.modules.NormPropLayer) and module.activation is None:
            bias = module.bias.detach().clone()
            module.reset_parameters()
            torch.testing.assert_close(module.bias.detach(), bias)  # where the trunk's mean is
    assert not torch.allclose(one(x), before)


def test_modules_of_two_graphs_keep_their_constants_apart(monkeypatch):
    """What training and eval both call is one module in two graphs: nothing is moved."""
    kinds = [type(m).__name__ for m in converted(monkeypatch, True, normprop.PAPER, drop=True).modules()]
    assert "RectifiedSum" not in kinds
    assert "Standardize" in kinds


class Read(RectifiedNet):
    """Sums of branches of equal depth, one of which is a rectified sum itself; a layer's bias read apart."""

    def __init__(self, hook="", read=False):
        super().__init__()
        self.again, self.other = (nn.Sequential(C(8, 8), B(8)) for _ in range(2))
        self.read = read
        if hook:
            layer = self.get_submodule(hook.split()[0])
            if hook.endswith("pre"):
                layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2 + 1,))
            else:
                layer.register_forward_hook(lambda _, inputs, output: output * 2)

    def forward(self, x):
        x = F.relu(self.again(self.stem(x)) + self.other(self.stem(x)))
        y = self.branches[0](x)
        x = F.relu(x + self.other(y)) if not self.read else F.relu(x + y + self.branches[0][1].bias.mean())
        return self.last(F.relu(self.branches[2](x) + self.shortcut(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "build",
    [
        Read,
        functools.partial(Read, read=True),
        functools.partial(Read, "branches.2.1"),
        functools.partial(Read, "branches.2.0.conv pre"),
        functools.partial(Read, "shortcut.0 pre"),
    ],
)
def test_what_others_read_or_change_stays_as_it_is(monkeypatch, build):
    nets = []
    for lightened in (True, False):
        if not lightened:
            monkeypatch.setattr(normprop.graph.rewrite, "lighten_", lambda *_: {})
        torch.manual_seed(0)
        source = build().double()
        torch.manual_seed(1)
        nets.append(convert(source, normprop.RECOMMENDED, example=randn(2, 3, 12, 12)).model)
    x = randn(4, 3, 12, 12, seed=5)
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-6, atol=1e-6)


def test_constants_of_another_conversion_are_refused(monkeypatch):
    one = converted(monkeypatch, True, normprop.PAPER)
    state = one.state_dict()
    name = next(key for key in state if key.endswith("constants"))
    state[name] = torch.cat([state[name], state[name]])
    with pytest.raises(RuntimeError, match=re.escape(f"{name}: expected")):
        one.load_state_dict(state)


def test_a_converted_part_of_what_is_converted(monkeypatch):
    part = converted(monkeypatch, True, normprop.PAPER)
    whole = nn.Sequential(OrderedDict(part=part, fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(4), act=nn.ReLU()))
    new = convert(whole.double(), example=randn(2, 3, 12, 12)).model
    x = randn(4, 3, 12, 12, seed=5)
    before = new(x)
    new.load_state_dict(new.state_dict())
    assert torch.equal(new(x), before)


def test_an_activation_in_place_before_arithmetic():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = triple(C(3, 8), B(8)), C(8, 4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.act(F.max_pool2d(self.body(x), 2))
            return self.last(x * 1.5 + torch.sin(x))

    x = randn(2, 3, 8, 8)
    assert convert(Net().double(), example=x).model(x).isfinite().all()


def test_a_norm_of_positions_is_not_taken_for_one_of_a_linear_layers_features():
    """Without an example: 5 positions of 7 features each."""
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(7, 3)).eval()
    nn.init.normal_(model[1].running_mean)
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(normprop.convert(model, preserve=True).model(x), model(x))
