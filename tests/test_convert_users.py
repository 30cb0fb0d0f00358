"""``convert`` on what users' models do: modules called twice, contexts, sizes as numbers, calls by parents."""

import copy
import pickle
import random
import re

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from code_model import Code
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import normprop
from normprop import convert, fold
from normprop.graph.convert import ConversionError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(channels, out, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), act())


def used(model):
    """In float64, statistics as after training."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked += 7
    return model.double().eval()


def assert_preserved(model, *inputs):
    conversion = convert(model, preserve=True, strict=True, example=inputs)
    torch.testing.assert_close(conversion.model(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)
    return conversion


# --- modules that are called twice ---------------------------------------------------------------

TWICE = {
    "max pool": (nn.MaxPool2d(2), "NormalizedMaxPool2d"),
    "average pool": (nn.AvgPool2d(2), "NormalizedAvgPool2d"),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), "NormalizedUpsample"),
}


@pytest.mark.parametrize("pool", TWICE)
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_a_pool_that_is_called_twice(pool, act):
    module, name = TWICE[pool]
    model = nn.Sequential(block(3, 8), module, block(8, 8, act), module).double()
    conversion = convert(model, strict=True)
    x = randn(64, 3, 16, 16)
    fold(conversion.model, verify=x)
    found = [type(m).__name__ for m in conversion.model.modules()]
    other = pool == "max pool" and act is nn.GELU  # its constants are those of another activation
    assert found.count(name) == 1 + other
    trace = normprop.predict(conversion.model, x)
    pools = [record for record in trace.records if record.op == name]
    assert len(pools) == 2
    for record in pools:
        assert abs(record.mean) < 0.25  # borders have less variance
        assert abs(record.std - 1) < 0.15
    assert not convert(conversion.model).replaced  # again


# --- state ---------------------------------------------------------------------------------------


def test_measured_constants_go_with_the_weights():
    def build(seed):
        torch.manual_seed(seed)
        trunk = [block(8, 8), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
        body = Code(
            lambda self, x: self.relu(x + self.b(self.a(x))), a=trunk[0], b=trunk[1], relu=nn.ReLU()
        )
        parts = (block(3, 8), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        return convert(nn.Sequential(*parts).double()).model.eval()

    one, other, x = build(0), build(1), randn(4, 3, 9, 9)
    kept = [name for name in one.state_dict() if name.endswith("constants")]
    assert len(kept) >= 2
    assert not torch.equal(other.state_dict()[kept[0]], one.state_dict()[kept[0]])
    assert float((other(x) - one(x)).detach().abs().max()) > 0.01
    for receiver in (other, copy.deepcopy(build(2)), pickle.loads(pickle.dumps(build(3)))):
        receiver.load_state_dict(one.state_dict())
        assert torch.equal(receiver(x), one(x))
    fold(other, verify=x)
    rest = {name: value for name, value in one.state_dict().items() if name != kept[0]}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{re.escape(kept[0])}"'):
        other.load_state_dict(rest)
    assert not list(one.buffers())


def test_what_containers_hold_is_kept():
    model = Code(lambda self, x: self.net(x), net=block(3, 4))
    model.scale = nn.Parameter(torch.ones(()))
    model.net.extra = nn.Parameter(torch.zeros(2))
    model.register_buffer("queue", torch.zeros(3))
    model.register_buffer("hidden", torch.zeros(1), persistent=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    conversion = convert(model)
    names = set(conversion.model.state_dict())
    assert names == {"scale", "queue", "net.extra", "net.0.weight", "net.0.bias", "net.0.gain"}
    assert {name for name, _ in conversion.model.named_buffers()} == {"queue", "hidden"}
    conversion.update_optimizer_(optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in conversion.model.parameters()}


def test_two_optimizers_share_nothing():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:3], model[4:])]
    conversion = convert(model, example=torch.randn(1, 3, 3, 3))
    names = {id(p): name for name, p in conversion.model.named_parameters()}
    held = []
    for optimizer in optimizers:
        conversion.update_optimizer_(optimizer)
        held.append({names[id(p)] for group in optimizer.param_groups for p in group["params"]})
    assert held == [{f"{layer}.{name}" for name in ("weight", "gain", "bias")} for layer in (0, 4)]
    with pytest.raises(TypeError, match=r"LBFGS keeps its own list .* build it anew on conversion\.model"):
        conversion.update_optimizer_(torch.optim.LBFGS(model.parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_skipped_with_the_way_out():
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.BatchNorm1d(3)))
    for source in (model, torch.jit.script(model)):
        (site,) = convert(source).skipped
        assert (site.path, site.source) == ("1", "RecursiveScriptModule")
        assert (
            site.target == "TorchScript cannot be followed: convert the Python model that it was made from"
        )
        with pytest.raises(normprop.ConversionError, match="1 site cannot be converted"):
            convert(source, strict=True)
    for follow in (normprop.fold, lambda m: normprop.measure(m, torch.randn(8, 4))):
        with pytest.raises(normprop.TraceError, match="cannot follow TorchScript: pass the Python model"):
            follow(torch.jit.script(model))


def test_what_the_result_computes_in_another_way_is_noted():
    def body(self, x):
        with torch.autocast("cpu", enabled=False):
            h = self.a(x)
        h = checkpoint(self.b, h, use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(
            lambda y, scale: y * scale, h, scale=2, use_reentrant=False
        )

    model, x = used(Code(body, a=block(3, 4), b=block(4, 4))), randn(2, 3, 8, 8)
    conversion = assert_preserved(model, x)
    assert "'model' loses activation checkpointing and torch.autocast(enabled=False)" in conversion.notes
    assert checkpoint is torch.utils.checkpoint.checkpoint
    assert not any("loses" in note for note in convert(used(block(3, 4))).notes)


# --- the parent's code ---------------------------------------------------------------------------


def test_lost_methods_are_noted():
    class Net(nn.Sequential):
        def features(self, x):
            return self[0](x)

        def _private(self):
            pass

    assert convert(Net(block(3, 4))).notes == ["the result computes forward() alone; it has no features"]
    assert not convert(nn.Sequential(block(3, 4))).notes


def test_what_runs_without_gradients_stays_so():
    def body(self, x):
        with torch.no_grad():
            h = self.frozen(x)
        return self.head(h)

    model = used(Code(body, frozen=block(3, 4), head=block(4, 4)))
    conversion = assert_preserved(model, randn(2, 3, 8, 8))
    assert "its forward uses torch.no_grad(), which a graph does not keep" in " ".join(conversion.notes)
    conversion.model(randn(2, 3, 8, 8)).sum().backward()
    got = {name for name, p in conversion.model.named_parameters() if p.grad is not None}
    assert got == {"head.0.weight", "head.0.bias", "head.0.gain"}
    with torch.no_grad():  # the caller's own is no business of the model's
        assert not convert(nn.Sequential(block(3, 4))).notes


def test_autocast_in_forward_stays():
    def body(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
        return self.b(h.float())

    conversion = convert(Code(body, a=block(3, 4), b=block(4, 4)))
    assert "torch.autocast()" in " ".join(conversion.notes)
    seen = []
    conversion.model.a.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    conversion.model(torch.randn(2, 3, 8, 8))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("code", "noted"),
    [
        (lambda h: F.interpolate(h, size=(int(h.shape[2]) * 2, 8)), True),
        (lambda h: sum(h[:, :, t] for t in range(h.shape[2])), True),
        (lambda h: h / float(h.shape[3]), True),
        (lambda h: torch.stack(list(h)), True),
        (lambda h: h.view(h.shape[0], int(h.shape[1]), -1), False),
        (lambda h: h.view(h.size(0), -1, h.size(3)), False),
    ],
)
def test_sizes_that_become_numbers_are_noted(code, noted):
    notes = convert(
        Code(lambda self, x: code(self.net(x)), net=block(3, 4)), example=torch.randn(2, 3, 6, 6)
    ).notes
    assert any("is for sizes like the example's" in note for note in notes) == noted


class Head(nn.Module):
    """Takes a list of maps."""

    def __init__(self):
        super().__init__()
        self.conv = block(8, 8)

    def forward(self, maps):
        return sum(self.conv(x).mean((2, 3)) for x in maps)


class Backbone(nn.Module):
    """Used by a method that is not its forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = block(3, 8), block(8, 8)

    def features(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        return self.features(x).mean((2, 3))


def by_parts(self, x):
    if float(x.sum()) > 1e9:  # fx cannot follow it
        return x
    h = self.backbone.features(x)
    return self.head([h, 2 * h])


@pytest.mark.parametrize("given", [True, False])
def test_parts_are_converted_as_their_parent_calls_them(given):
    model, x = used(Code(by_parts, backbone=Backbone(), head=Head())), randn(4, 3, 16, 16)
    conversion = convert(model, preserve=True, strict=True, example=x if given else None)
    torch.testing.assert_close(conversion.model(x), model(x), rtol=1e-9, atol=1e-9)
    said = " ".join(conversion.notes)
    assert "'backbone' was converted child by child: it is not called by its parent" in said
    assert "'head' was converted child by child: it is called with more than tensors by its parent" in said
    fresh = convert(model, strict=True).model
    assert fresh(x).shape == (4, 8)
    assert fresh.backbone.features(x).shape == (4, 8, 16, 16)


def test_parts_go_on_from_what_the_parts_before_make():
    def body(self, x):
        maps = [x]
        for part in self.parts:
            maps.append(part(maps[-1] if float(maps[-1].detach().sum()) < 1e9 else x))
        return maps[-1]

    def network(seed):
        torch.manual_seed(seed)
        parts = [block(3 if i == 0 else 16, 16, nn.SiLU) for i in range(16)]
        return Code(body, parts=nn.ModuleList(parts))

    model, other = (convert(network(seed), strict=True).model for seed in (0, 1))
    assert not hasattr(model.parts[0], "standardize")  # it reads the data
    x, stds = torch.randn(8, 3, 96, 96), []
    layers = [m for m in model.modules() if isinstance(m, normprop.NormPropConv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: stds.append(float(args[0].detach().std())))
    model(x)
    assert len(stds) == 16
    assert 0.8 < min(stds) < max(stds) < 1.25
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_a_list_is_not_guessed_to_be_a_batch():
    def body(self, x):
        if not isinstance(x, list):
            raise ValueError("a list of images is wanted")
        return self.head(x)

    model = used(Code(body, head=Head()))
    maps = [randn(2, 8, 6, 6), randn(2, 8, 3, 3, seed=1)]
    conversion = convert(model, preserve=True)
    torch.testing.assert_close(conversion.model(maps), model(maps), rtol=1e-9, atol=1e-9)


def test_code_that_asks_for_types_is_told_what_the_model_gets():
    def body(self, x):
        y = self.block(torch.as_tensor(x))
        if torch.jit.isinstance(y, torch.Tensor):
            y = torch.cat([y, x], 1)
        y = self.pool(y)
        if isinstance(y, tuple):
            y = y[0]
        assert isinstance(y.shape[1], int)
        assert not isinstance(y, nn.Parameter)
        return self.head([y] if torch.is_tensor(y) else y)

    pool = nn.MaxPool2d(2, return_indices=True)
    model = used(Code(body, block=block(3, 5), pool=pool, head=Head()))
    x = randn(4, 3, 16, 16)
    conversion = convert(model, preserve=True, strict=True)
    assert not any("child by child" in note for note in conversion.notes)
    torch.testing.assert_close(conversion.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert "isinstance" not in globals()


class Padded(nn.Conv2d):
    """EfficientNet's: a convolution that calls a module of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("preserve", [False, True])
def test_modules_that_a_layer_calls_stay_with_it(preserve):
    def stage(i, o):
        return nn.Sequential(Padded(i, o, 3, stride=2, bias=False), nn.BatchNorm2d(o), nn.SiLU())

    model, x = (
        used(nn.Sequential(stage(3, 20), stage(20, 8), nn.Flatten(), nn.Linear(32, 3))),
        randn(2, 3, 8, 8),
    )
    conversion = convert(model, preserve=preserve, strict=True)
    assert isinstance(conversion.model.get_submodule("0.0.static_padding"), nn.ZeroPad2d)
    if preserve:
        torch.testing.assert_close(conversion.model(x), model(x), rtol=1e-9, atol=1e-9)
    folded = fold(conversion.model, verify=x)
    torch.testing.assert_close(folded(x), conversion.model(x), rtol=1e-9, atol=1e-9)


def test_a_norm_whose_input_no_one_can_follow_is_skipped():
    def body(self, x):
        return self.norm(self.layer(x)) if float(x.sum()) < 1e9 else x

    wrapped = nn.Sequential(nn.BatchNorm1d(8))
    model, x = used(Code(body, layer=nn.Linear(3, 8), norm=wrapped)), randn(4, 3)
    (site,) = convert(model).skipped
    assert site.path == "norm.0"
    assert site.target.startswith("what it reads comes from code that cannot be followed")
    assert_preserved(model, x)


def test_large_inputs_are_measured_with_fewer_samples():
    from normprop.graph.convert import calibration

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    meta = torch.device("meta")
    counts = [
        len(calibration(model, torch.empty(1, 3, n, n, device=meta))[0]) for n in (224, 384, 640, 1500)
    ]
    assert counts == [16, 16, 8, 4]


def test_keyword_arguments_of_a_layer_are_kept():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 3, 2, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.up(self.down(x), output_size=x.shape[2:]))

    model = used(Up())
    x, odd = randn(2, 3, 16, 16), randn(2, 3, 15, 17)
    for converted in (assert_preserved(model, x).model, convert(model).model):
        folded = fold(converted, verify=x)
        for some in (x, odd):
            assert converted(some).shape[2:] == some.shape[2:]
            torch.testing.assert_close(folded(some), converted(some), rtol=1e-9, atol=1e-9)


# --- what stands between layers ------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_between_hidden_layers_adds_no_variance(p, shared):
    torch.manual_seed(0)
    drop, layers = nn.Dropout(p), []
    for inputs in (64, *[256] * 5):
        layers += [
            nn.Linear(inputs, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            drop if shared else nn.Dropout(p),
        ]
    x = torch.randn(1024, 64)
    conversion = convert(nn.Sequential(*layers, nn.Linear(256, 10)), strict=True, example=x)
    kinds = [type(m) for m in conversion.model.modules() if isinstance(m, nn.Dropout)]
    assert kinds.count(normprop.NormalizedDropout) == 5
    assert kinds.count(nn.Dropout) == 1  # before the output, whose scale nobody counts on
    with torch.no_grad():
        evaluated = float(conversion.model.eval()(x).std())
        trained = float(conversion.model.train()(x).std())
    assert abs(evaluated - 1) < 0.15
    assert abs(trained * (1 - p) ** 0.5 - 1) < 0.15
    fold(conversion.model, verify=x)


def test_a_norm_of_the_data_becomes_a_data_norm():
    data = 1000 + 100 * randn(512, 6)
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)
    ).double()
    fresh = convert(model, example=data)
    assert "'0' normalised the data and has no statistics yet" in " ".join(fresh.notes)
    torch.testing.assert_close(fresh.model.get_submodule("0")(data), data)
    for _ in range(60):
        model(data)
    conversion = convert(model, strict=True, example=data)
    assert not conversion.notes
    fresh.model.load_state_dict(conversion.model.state_dict())  # with the statistics
    torch.testing.assert_close(fresh.model(data), conversion.model(data))
    end = conversion.model.get_submodule("0")
    assert isinstance(end, normprop.GlobalDataNorm)
    torch.testing.assert_close(end.mean, data.mean(0), rtol=5e-3, atol=0)
    torch.testing.assert_close(end.std, data.std(0), rtol=5e-2, atol=0)
    assert abs(float(conversion.model(data).detach().std()) - 1) < 0.25
    fold(conversion.model, verify=data)
    images = convert(used(nn.Sequential(nn.BatchNorm2d(3), block(3, 4))))
    assert images.model.get_submodule("0").mean.shape == (3, 1, 1)
    assert images.model(randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)


# --- what is left, and why ------------------------------------------------------------------------


def test_old_spectral_norm_is_skipped_with_the_way_out():
    for preserve in (True, False):
        model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
        skipped = convert(model, preserve=preserve).skipped
        assert [(site.path, "parametrized" in site.target) for site in skipped] == [("0", True)]


def test_strict_names_a_norm_that_is_a_function():
    def body(self, x):
        return F.batch_norm(self.conv(x), torch.zeros(4), torch.ones(4), training=self.training)

    model = Code(body, conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ConversionError, match=r"F\.batch_norm: written as a function; use an nn\.BatchNorm"
    ):
        convert(model, strict=True)
    assert len(convert(model).skipped) == 1


def test_arguments_at_their_defaults_are_noted():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(5, 8), nn.BatchNorm1d(8)

        def forward(self, x, mask=None, scale=1.0):
            y = torch.relu(self.n(self.a(x))) * scale
            return y if mask is None else y * mask

    x, mask = torch.randn(2, 5), torch.ones(2, 8)
    note = "forward() has no {} (taken at the default); a tensor stays if example= has it"
    assert note.format("mask, scale") in convert(Masked()).notes
    masked = convert(Masked(), example=(x, mask))
    assert note.format("scale") in masked.notes
    assert masked.model(x, mask * 0).abs().max() == 0
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'mask'"):
        masked.model(x)


def test_an_argument_that_nothing_reads_before_one_that_counts():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(5, 8), nn.BatchNorm1d(8)

        def forward(self, x, unread=None, mask=None):
            return torch.relu(self.n(self.a(x))) * mask

    x, mask = torch.randn(2, 5), torch.zeros(2, 8)
    assert convert(Masked(), example=(x, x, mask), strict=True).model(x, x, mask).abs().max() == 0


def test_a_hook_that_was_traced_through_is_noted():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    model[0][1].register_forward_hook(lambda module, args, y: None)
    notes = convert(model).notes
    assert (
        "hook on '0' ran once: what it did to values is part of the graph, it is not called again" in notes
    )
    assert "hook on '0.1' is lost: register it anew" in notes


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_models_that_cannot_be_copied_say_why():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.utils.weight_norm(nn.Linear(8, 3)))
    for follow in (convert, fold, normprop.lighten, lambda m: normprop.measure(m, torch.randn(8, 5))):
        with pytest.raises(
            normprop.TraceError, match=r"cannot be copied, .* \(old weight_norm .*: remove that"
        ):
            follow(model)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.nb(self.b(torch.relu(self.na(self.a(x))))))


def small_residual(seed, blocks=3):
    torch.manual_seed(seed)
    stem = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*stem, *(Residual() for _ in range(blocks)))


@pytest.mark.parametrize("data", [False, True])
def test_a_state_dict_loads_into_a_conversion_of_another_seed(data):
    """What stands where is decided on weights and noise that are always the same."""
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), 16)
    models = [convert(small_residual(seed), example=torch.zeros(1, 3, 16, 16)).model for seed in range(6)]
    if data:
        models = [models[0], convert(small_residual(6), example=x).model]
    values = {tuple(model.state_dict()["5.add.constants"].tolist()) for model in models}
    assert len(values) == len(models)  # measured on each one's own weights
    for ours in models[1:]:
        ours.load_state_dict(models[0].state_dict())
        torch.testing.assert_close(ours(x), models[0](x))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_narrow_nets_of_two_seeds_have_the_same_keys(name):
    torchvision = pytest.importorskip("torchvision")
    keys = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name)
        keys.append(set(convert(model, example=torch.zeros(1, 3, 64, 64)).model.state_dict()))
    assert keys[0] == keys[1]


def test_a_rehearsal_leaves_the_random_numbers_and_the_model_alone():
    model = small_residual(0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_state_dict_that_does_not_fit_says_what_to_do():
    model = convert(small_residual(0)).model
    with pytest.raises(
        RuntimeError, match="Convert the same model with the same example=, or save it whole"
    ):
        model.load_state_dict(convert(small_residual(0, blocks=2)).model.state_dict(), strict=False)
    model.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_slices_of_a_sequential_are_followed():
    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                *(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)) for _ in range(3))
            )

        def forward(self, x):
            middle = self.body[:2](x)
            return middle, self.body[2:](middle)

    model, x = Staged().eval(), torch.randn(4, 5)
    conversion = convert(model, preserve=True)
    assert [site.path for site in conversion.replaced] == ["body.0.0", "body.1.0", "body.2.0"]
    for ours, theirs in zip(conversion.model(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


class SelfGated(nn.Module):
    """An activation written out, between two layers."""

    def __init__(self, phi):
        super().__init__()
        self.first, self.last = block(3, 16, nn.Identity), block(16, 8)
        self.beta = nn.Parameter(torch.ones(16, 1, 1))
        self.phi = phi

    def forward(self, x):
        return self.last(self.phi(self, self.first(x)))


@pytest.mark.parametrize(
    "phi",
    [
        lambda self, x: x * torch.sigmoid(1.702 * x),
        lambda self, x: x * torch.tanh(F.softplus(x)),
        lambda self, x: x * torch.sigmoid(self.beta * x),
        lambda self, x: torch.sigmoid(x) * (2 * x),
    ],
    ids=["quick gelu", "mish", "swish", "scaled"],
)
def test_an_activation_written_out_is_no_gate(phi):
    conversion = convert(SelfGated(phi), strict=True)
    assert not any("Gate" in site.target for site in conversion.replaced)
    # What the last layer reads is the activation of the first's output, but for mean and length.
    net, x = conversion.model, torch.randn(8, 3, 9, 9)
    seen = {}
    for name in ("first.0", "last.0"):
        net.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: seen.update({name: (args[0], y)})
        )
    net(x)
    together = torch.stack([phi(net, seen["first.0"][1]).flatten(), seen["last.0"][0].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.9999


def test_reports_name_a_pools_activation_plainly():
    net = nn.Sequential(*block(3, 8), nn.MaxPool2d(2), *block(8, 8))
    assert "NormalizedMaxPool2d, relu\n" in str(convert(net))


class Blocks(nn.Module):
    """A small network; what its forward does besides is the test's."""

    def __init__(self, extra):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.register_buffer("steps", torch.zeros(1))
        self.maps, self.calls, self.extra = [], 0, extra

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        return self.out(self.extra(self, h))


def draws(draw):
    return lambda self, h: h if self.training and draw() < 0.5 else 2 * h


def counts(self, h):
    self.steps.add_(1)
    return h


def averages(self, h):
    self.steps = 0.9 * self.steps + 0.1 * h.detach().mean()
    return h


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (draws(lambda: torch.rand(1).item()), "draws random numbers"),
        (draws(random.random), "draws random numbers"),
        (draws(np.random.rand), "draws random numbers"),
        (counts, "writes into self.steps"),
        (averages, "sets self.steps"),
    ],
    ids=["torch", "random", "numpy", "counts", "averages"],
)
def test_code_that_does_more_than_its_graph_is_left_as_it_is(extra, what):
    model = Blocks(extra)
    conversion = convert(model, preserve=True)
    assert [site.path for site in conversion.skipped] == ["norm"]
    assert what in conversion.skipped[0].target
    x = torch.randn(2, 3, 8, 8)
    if "steps" in what:
        for net in (model, conversion.model):
            net.eval()(x)
        assert not torch.equal(model.steps, torch.zeros(1))
        torch.testing.assert_close(conversion.model.steps, model.steps)
        folded = fold(model, verify=x)
        torch.testing.assert_close(folded.steps, model.steps)
        torch.testing.assert_close(folded(x), model(x))
        torch.testing.assert_close(folded.steps, model.steps)
    else:
        outputs = {float(conversion.model.train()(x).detach().sum()) for _ in range(20)}
        assert len(outputs) > 1


def remembers(self, h):
    self.calls += 1
    self.maps.append(h)
    self.seen = h
    return h


def test_tracing_leaves_the_model_as_it_was():
    model, x = Blocks(remembers), torch.randn(2, 3, 8, 8)
    normprop.predict(model, x)
    conversion = convert(model, strict=True)
    assert "forward() sets self.seen, which the result does not" in conversion.notes
    for net in (model, conversion.model):
        assert (net.calls, net.maps, hasattr(net, "seen")) == (0, [], False)
    pickle.loads(pickle.dumps(conversion.model))


def test_random_numbers_that_are_part_of_the_graph_stay_so():
    class Drop(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x[:, :1, :1, :1]).round() if self.training else x

    net = nn.Sequential(*block(3, 8), Drop(), *block(8, 8))
    conversion = convert(net, strict=True)
    x = torch.randn(4, 3, 8, 8)
    assert len({float(conversion.model(x).detach().sum()) for _ in range(20)}) > 1


def test_norms_inside_torchs_own_modules_are_skipped_by_name():
    class Last(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.norm1 = Last(8)
    net = nn.Sequential(nn.Linear(4, 8), layer)
    with pytest.raises(
        ConversionError, match=r"1\.norm1: Last: it is inside a module whose code is not followed"
    ):
        convert(net, example=torch.randn(2, 5, 4), strict=True)


def test_conditional_norms_are_skipped():
    class Conditional(nn.BatchNorm2d):
        def __init__(self, channels, classes):
            super().__init__(channels, affine=False)
            self.scale = nn.Linear(classes, channels)

        def forward(self, x, y):
            return super().forward(x) * self.scale(y)[:, :, None, None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), Conditional(8, 4)

        def forward(self, x, y):
            return self.norm(self.conv(x), y)

    inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    for preserve in (False, True):
        assert [s.path for s in convert(Net(), preserve=preserve, example=inputs).skipped] == ["norm"]
    assert normprop.predict(Net(), inputs)["norm"].shape == (2, 8, 6, 6)


def test_an_embeddings_scale_counts():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = (
                nn.Embedding(100, 32),
                nn.Sequential(nn.Conv1d(32, 32, 3), nn.BatchNorm1d(32)),
            )
            nn.init.normal_(self.embed.weight, std=0.02)

        def forward(self, tokens):
            return self.body(self.embed(tokens).transpose(1, 2))

    tokens = torch.randint(0, 100, (16, 20))
    model = Tokens()
    assert normprop.predict(model, tokens)["embed"].std == pytest.approx(0.02, rel=0.05)
    assert 0.8 < float(convert(model, example=tokens).model(tokens).detach().std()) < 1.2


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.detach().requires_grad_(),
        lambda x: x + nn.init.zeros_(torch.empty_like(x)),
        lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1.0),
    ],
)
def test_writes_without_a_twin_are_left(write):
    model = used(Code(lambda self, x: self.body2(write(x)), body2=block(3, 8)))
    conversion = convert(model, preserve=True, strict=True, example=randn(2, 3, 8, 8))
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(conversion.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_any_number_of_inputs_is_not_followed():
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = block(3, 8)

        def forward(self, *xs):
            return [self.body(x) for x in xs]

    x = torch.randn(1, 3, 8, 8)
    conversion = convert(Each(), example=(x, x))
    assert [len(conversion.model(*[x] * n)) for n in (1, 2, 3)] == [1, 2, 3]
    assert any("forward takes *xs, any number of inputs" in note for note in conversion.notes)


def test_parameter_names_follow_the_parameters():
    model = block(3, 8)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    convert(model).update_optimizer_(optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.gain", "0.bias"]


def test_an_example_is_not_written_into():
    model = Code(lambda self, x: self.layers(x.sub_(0.5)), layers=block(3, 8))
    example = F.interpolate(torch.randn(16, 3, 3, 3), size=(16, 16), mode="bilinear") * 1.6
    before = example.clone()
    convert(model, example=example)
    assert torch.equal(example, before)


def test_keys_do_not_depend_on_parameters_of_other_kinds():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.mix = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x):
            tokens = self.stem(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention(tokens, tokens, tokens)[0]
            return tokens + self.mix(tokens)

    keys = set()
    for seed in (0, 8, 9, 11):
        torch.manual_seed(seed)
        keys.add(tuple(convert(Attention(), example=torch.randn(4, 3, 16, 16)).model.state_dict()))
    assert len(keys) == 1


class Sized(nn.Module):
    """Ends with a pool over the whole map, as the map's size says."""

    def __init__(self, pool):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head, self.pool = nn.Linear(16, 4), pool

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, x.size()[3]),
        lambda x: F.avg_pool2d(x, kernel_size=x.size()[2:]),
        lambda x: F.avg_pool2d(x, (x.size(2), x.shape[3])),
        lambda x: F.max_pool2d(x, x.size(3)),
        lambda x: F.adaptive_avg_pool2d(x, (x.size(2) // 14, 1)),
    ],
)
def test_a_pool_of_the_maps_own_size(pool):
    x = torch.randn(8, 3, 16, 16)
    model = Sized(pool)
    assert "no rule" not in str(normprop.predict(model, x))
    converted = normprop.convert(model, example=x).model
    normprop.fold(converted, verify=x)
    seen = []
    converted.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    converted(torch.randn(256, 3, 16, 16))
    assert 0.7 < seen[0].std() < 1.4
    if pool(torch.ones(1, 1, 20, 20)).shape[2:] == (1, 1):
        assert converted(torch.randn(2, 3, 20, 20)).shape == (2, 4)


def test_inputs_that_are_no_numbers_keep_the_measured_constants():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torchvision.models.mobilenet_v3_small(num_classes=4)
            self.kinds = nn.Embedding(10, 4)

        def forward(self, x, kind=None, **options):
            y = self.net(x)
            return y if kind is None else y + self.kinds(kind)

    x, kind = torch.randn(2, 3, 64, 64), torch.tensor([3, 5])
    counts = []
    for example in (x, (x, kind), (torch.empty(2, 3, 64, 64, device="meta"), kind)):
        torch.manual_seed(0)
        conversion = normprop.convert(Net(), example=example)
        assert not any("by formula alone" in note for note in conversion.notes)
        counts.append(sum(name.endswith("constants") for name in conversion.model.state_dict()))
    assert min(counts) == max(counts) > 20  # 15 without


def test_noise_and_data_have_as_many_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.b = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(16, 2)

        def forward(self, image, table):
            return self.head(torch.cat([self.a(image).mean((2, 3)), self.b(table)], 1))

    torch.manual_seed(0)
    for table in (torch.zeros(4, 5), torch.randn(4, 5)):
        assert normprop.convert(Net(), example=(torch.randn(4, 3, 16, 16), table)).notes == []


def test_what_is_lost_is_noted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout())
            self.head = self.last = nn.Linear(8, 2)

        def train(self, mode=True):
            super().train(mode)
            self.body.eval()
            return self

        def forward(self, x):
            return self.last(self.body(x).mean((2, 3)))

    notes = normprop.convert(Net()).notes
    assert "second names of modules are lost: last" in notes
    assert "the result computes forward() alone; it has no train() of its own" in notes


@pytest.mark.parametrize("preserve", [False, True])
def test_lazy_modules_are_run_first(preserve):
    for layers in ([nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)], [nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()]):
        model = nn.Sequential(*layers, nn.ReLU())
        with pytest.raises(ValueError, match="has no weights yet: run the model once, then convert it"):
            normprop.convert(model, preserve=preserve)
        model(torch.randn(2, 3, 8, 8))
        assert normprop.convert(model, preserve=preserve, strict=True).replaced


def test_distributed_checkpoints_hold_the_constants():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    one, other = (
        normprop.convert(
            torchvision.models.mobilenet_v3_small(num_classes=4), example=torch.zeros(1, 3, 64, 64)
        ).model
        for _ in range(2)
    )
    state = get_model_state_dict(one)
    assert any(name.endswith(".constants") for name in state)
    set_model_state_dict(other, state)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(other.eval()(x), one.eval()(x))


def test_a_weight_that_forward_reads_too_is_noted():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.norm = nn.Linear(12, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return F.linear(F.relu(self.norm(self.encoder(x))), self.encoder.weight.t())

    for preserve in (False, True):
        notes = normprop.convert(Tied(), preserve=preserve, example=torch.randn(4, 12)).notes
        assert any(note.startswith("forward() itself reads encoder.weight: projection") for note in notes)
    assert not any("reads" in note for note in normprop.convert(torchvision.models.resnet18()).notes)


# --- einops --------------------------------------------------------------------------------------


def arranged(self, x):
    y = self.b(self.a(self.rows(x)))
    y = rearrange(y, "b c h w -> b (h w) c")
    y = einops.rearrange(y, "b (h w) c -> b c h w", h=1)
    return self.out(self.mean(y))


def test_einops_is_followed():
    def block(i, o, size):
        return nn.Sequential(nn.Conv2d(i, o, size), nn.BatchNorm2d(o), nn.ReLU())

    modules = {
        "rows": Rearrange("b c t -> b 1 c t"),
        "a": block(1, 8, (1, 9)),
        "b": block(8, 16, (8, 1)),
        "mean": Reduce("b c 1 t -> b c", "mean"),
        "out": nn.Linear(16, 2),
    }
    model, x = used(Code(arranged, **modules)), randn(4, 8, 64)
    assert_preserved(model, x)
    fresh = convert(model, strict=True, example=x)
    assert [site.path for site in fresh.replaced] == ["a.0", "b.0", "out"]
    assert not any("child by child" in note for note in fresh.notes)
    for net in (fresh.model, fold(fresh.model, verify=x)):
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), fresh.model(x), rtol=1e-9, atol=1e-9)
    layouts = [record for record in normprop.predict(fresh.model, x) if "rearrange" in record.name]
    assert len(layouts) == 2
    assert not any(record.note for record in layouts)


# --- examples that a model does not take --------------------------------------------------------------


@pytest.mark.parametrize("preserve", [False, True], ids=["fresh", "preserved"])
@pytest.mark.parametrize(
    ("example", "told"),
    [
        (torch.randn(3, 8, 8), r"\(\(3, 8, 8\) torch.float32\): expected 4D input"),
        (torch.randn(2, 4, 8, 8), r"\(\(2, 4, 8, 8\) torch.float32\): .* to have 3 channels"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\(\(2, 3, 8, 8\) torch.uint8\): Input type"),
        (torch.randn(2, 3, 2, 2), r"\(\(2, 3, 2, 2\) torch.float32\): .* greater than actual input size"),
    ],
    ids=["no batch", "channels", "bytes", "too small"],
)
def test_an_example_that_the_model_does_not_take_is_refused(example, told, preserve):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    with pytest.raises(ValueError, match=r"the model does not take example " + told):
        normprop.convert(net, example=example, preserve=preserve)


def test_a_weight_read_by_a_function_without_its_padding_mode():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1))

    model, x = Zeros().eval(), torch.randn(2, 3, 8, 8)
    converted = normprop.convert(model, preserve=True, example=x).model
    torch.testing.assert_close(converted(x), model(x))


def test_a_model_that_wants_more_than_tensors_is_converted_all_the_same():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x, sizes):
            return self.body(x) * len(sizes["names"])

    conversion = normprop.convert(Scaled(), example=torch.randn(2, 3, 8, 8))
    assert len(conversion.replaced) == 1
    y = conversion.model(torch.randn(2, 3, 8, 8), {"names": "ab"})
    assert y.shape == (2, 8, 6, 6)


def test_code_that_looks_at_sizes_is_told():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return x.relu() if x.shape[2] > 4 else x

    said = "'model' decides by its input's size: the result is for sizes like "
    assert said + "the example's" in normprop.convert(Sized(), example=torch.randn(2, 3, 8, 8)).notes
    assert said + "one that was guessed; pass example=" in normprop.convert(Sized()).notes


DATA = 120 + 30 * torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.flatten(1),
        nn.Flatten(),
        lambda x: x.reshape(len(x), -1) / 255,
        lambda x: (x.flatten(1) - 100) * 0.1,
    ],
    ids=["method", "module", "bytes", "arithmetic"],
)
def test_a_trained_norm_of_the_data_stays_their_norm(flat):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = flat
            self.data = nn.BatchNorm1d(192)
            self.layers = nn.Sequential(nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 9))

        def forward(self, x):
            return self.layers(self.data(self.flat(x)))

    torch.manual_seed(0)
    model = Net()
    for part in DATA.split(16) * 3:
        model(part)
    conversion = normprop.convert(model, example=torch.randn(4, 3, 8, 8))
    assert [site.target for site in conversion.replaced if site.path == "data"] == ["GlobalDataNorm"]
    assert not any("standardize" in name for name, _ in conversion.model.named_modules())
    assert 0.7 < conversion.model(DATA).std().item() < 1.3


def test_the_model_may_normalise_its_data_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.47, 0.45, 0.4]))
            self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.norm(self.conv((x.float() / 255 - self.mean.view(-1, 1, 1)) / 0.118))

    torch.manual_seed(0)
    model, images = Net(), DATA.round().to(torch.uint8)
    for example in (images[:2], torch.randn(2, 3, 8, 8)):
        converted = normprop.convert(model, example=example).model
        assert not any("standardize" in name for name, _ in converted.named_modules())
        assert 0.8 < converted(images).std().item() < 1.2
        assert normprop.predict(converted, example)[-1].std == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "shaped",
    [
        lambda g: g.view(-1, 16, 1, 1),
        lambda g: g[:, :, None, None],
        lambda g: g[..., None, None],
        nn.Unflatten(1, (16, 1, 1)),
        lambda g: g.unsqueeze(2).unsqueeze(3),
    ],
)
def test_a_gate_in_any_spelling(shaped):
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.shaped = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), shaped
            self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 16)
            self.drop, self.flat, self.head = nn.Dropout(0.1), nn.Flatten(), nn.Linear(16 * 36, 8)
            self.last = nn.BatchNorm1d(8)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
            return self.last(self.head(self.flat(self.drop(x * self.shaped(gate)))))

    torch.manual_seed(0)
    conversion = normprop.convert(Squeeze(), example=torch.randn(4, 3, 8, 8))
    targets = {site.path: site.target for site in conversion.replaced}
    assert targets["gate"].startswith("NormalizedGate")
    assert targets["drop"] == "NormalizedDropout"  # seen through nn.Flatten too
    normprop.fold(conversion.model, verify=torch.randn(2, 3, 8, 8))


def test_len_is_not_the_examples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            return self.head(x.reshape(len(x), -1)) * len(x.shape)

    conversion = normprop.convert(Net(), example=torch.randn(4, 3, 8, 8))
    assert conversion.notes == []
    assert conversion.model(torch.randn(1, 3, 8, 8)).shape == (1, 5)


def test_modules_that_forward_makes():
    class Net(nn.Module):
        def __init__(self, head=None):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), head

        def forward(self, x):
            x = nn.ReLU(inplace=True)(self.norm(self.conv(x)))
            x = nn.Flatten()(nn.AdaptiveAvgPool2d(1)(x))
            return x if self.head is None else nn.Linear(8, 2)(x)

    x = torch.randn(16, 3, 12, 12)
    targets = [site.target for site in normprop.convert(Net(), example=x).replaced]
    assert targets == ["NormPropConv2d, relu", "NormalizedAdaptiveAvgPool2d"]
    (site,) = normprop.convert(Net(head=True), example=x).skipped
    assert "calls a Linear that it does not hold; make it an attribute in __init__" in site.target


def test_tensors_that_forward_makes_have_shapes_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 9), nn.BatchNorm1d(9)

        def forward(self, x):
            x = self.norm(self.layer(x)) + torch.eye(3, dtype=x.dtype).flatten()
            return x * 2 if x.shape[1] > 4 else x

    model, x = Net(), torch.randn(8, 8)
    assert len(normprop.convert(model, example=x).replaced) == 1
    converted = normprop.convert(model.eval(), preserve=True, example=x).model
    torch.testing.assert_close(converted(x), model(x))


def test_parts_given_by_keyword_are_joined():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            return torch.cat(tensors=(x[:, :4], x[:, 4:]), dim=1)

    assert (
        normprop.convert(Net(), example=torch.randn(8, 3, 12, 12)).model(torch.randn(1, 3, 9, 9)).shape[1]
        == 8
    )


def test_why_nothing_became_of_a_norm():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"preserve=True: '0.weight' has no values \(device meta\)"):
        normprop.convert(model, preserve=True)
    wrapped = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))
    (site,) = normprop.convert(wrapped).skipped
    assert site.target == "it is wrapped in DataParallel: put model.0.module in the place of model.0"


def test_a_generator_starts_from_one_position():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(True),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    trace = normprop.measure(normprop.convert(model).model, torch.randn(256, 32, 1, 1))
    assert all(0.8 < record.std < 1.25 for record in trace)


def test_coordinates_that_the_code_makes_are_normalised_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 15, 3), nn.BatchNorm2d(15), nn.Conv2d(16, 32, 3)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            grid = torch.linspace(0, 20, x.shape[3]).view(1, 1, 1, -1).expand(len(x), 1, x.shape[2], -1)
            return self.head(torch.cat([x, grid.type_as(x)], 1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 12, 12)
    converted = normprop.convert(model, example=x).model
    trace = normprop.measure(converted, x)
    assert 0.9 < trace["cat"].std < 1.1
    assert abs(trace["cat"].mean) < 0.1
    assert 0.8 < trace["head"].std < 1.25


def test_len_may_have_to_be_a_number():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            x = self.norm(self.layer(x))
            return x + torch.zeros(len(x), 8)

    conversion = normprop.convert(Net(), example=torch.randn(6, 8))
    assert len(conversion.replaced) == 1
    assert any("decides by its input's size" in note for note in conversion.notes)


class Inner(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)
        self.code = code

    def forward(self, x, y):
        return self.code(self, x, y)


@pytest.mark.parametrize(
    "code",
    [
        lambda self, x, y: self.b(torch.relu(self.norm(self.a(x))) + 0.1 * y),
        lambda self, x, y: self.b(torch.relu(self.norm(self.a(x))) * (1 + y / 10)),
        lambda self, x, y: self.b(x * 0.1 + torch.relu(self.norm(self.a(x)))),
    ],
    ids=["noise", "time", "skip"],
)
def test_arithmetic_on_what_is_no_data(code):
    torch.manual_seed(0)
    x = torch.randn(512, 64), torch.randn(512, 64)
    model = normprop.convert(Inner(code), example=x).model
    read = []
    model.b.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(*x)
    assert 0.9 < read[0].std().item() < 1.1
    trace = normprop.measure(Inner(code), x)
    assert trace.predicted["b"].std == pytest.approx(trace["b"].std, rel=0.15)


def test_an_input_of_one_number():
    torch.manual_seed(0)
    model = Inner(lambda self, x, t: self.b(torch.relu(self.norm(self.a(x))) * (2 * t)))
    names = [
        normprop.convert(model, example=(torch.randn(256, 64), t)).model.state_dict().keys()
        for t in (torch.tensor([1.0]), torch.ones(1, 2)[:, :1])
    ]
    assert names[0] == names[1]
    for name, value in (
        normprop.convert(model, example=(torch.randn(64, 64), torch.ones(1))).model.state_dict().items()
    ):
        assert torch.isfinite(torch.as_tensor(value)).all(), name


def test_dropout_of_a_gate_stays_behind_it():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.up = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 16)
            self.drop, self.last = nn.Dropout(0.5), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            gate = self.drop(torch.sigmoid(self.up(x.mean((2, 3)))))
            return self.last(x * gate[:, :, None, None])

    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    model, read = normprop.convert(Squeeze(), example=x).model.train(), []
    model.last.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(x)
    share = (read[0].abs().amax((2, 3)) < 1e-6).float().mean().item()
    assert 0.3 < share < 0.7


def test_a_sharded_model_is_told_the_way_out():
    class FSDPModule:  # what fully_shard mixes into a module's class
        pass

    class Sharded(nn.Sequential, FSDPModule):
        pass

    model = nn.Sequential(Sharded(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="convert it first, then call fully_shard on the result"):
        normprop.convert(model)
    for function in (normprop.fold, lambda model: normprop.predict(model, torch.randn(2, 4))):
        with pytest.raises(ValueError, match="load its full state dict into a model of your own"):
            function(model)
