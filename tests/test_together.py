"""Layers that are scaled together compute what each computes alone, wherever a model may be put."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import normprop
from normprop import NormRule, functional, modules

AFFINE = NormRule(True, "affine", 1.0)


class Net(nn.Module):
    """All kinds of layers and rules; a layer used twice, two that share a weight, one that is not used."""

    def __init__(self):
        super().__init__()
        self.stem = normprop.NormPropConv2d(3, 6, 3, padding=1, rule=normprop.PAPER)
        self.body = nn.ModuleList(
            normprop.NormPropConv2d(6, 6, 3, padding=1, groups=2, activation=activation, rule=rule)
            for activation, rule in (
                ("relu", normprop.PAPER),
                ("relu", normprop.RECOMMENDED),
                ("relu", AFFINE),
                ("gelu", normprop.RECOMMENDED),
                (nn.LeakyReLU(0.2), normprop.RECOMMENDED),
                ("prelu", AFFINE),
                (None, normprop.PAPER),
            )
        )
        self.bare = normprop.NormPropConv2d(6, 6, 3, padding=1, bias=False)
        self.up = normprop.NormPropConvTranspose2d(6, 6, 2, stride=2, groups=3, rule=normprop.RECOMMENDED)
        self.tied = normprop.NormPropConvTranspose2d(6, 6, 2, stride=2, groups=3, rule=normprop.PAPER)
        self.tied.weight = self.up.weight
        self.unused = normprop.NormPropConv2d(6, 6, 3)
        self.frozen = normprop.NormPropConv2d(6, 6, 1).requires_grad_(False)
        self.head = normprop.NormPropLinear(6, 4, activation=None, rule=normprop.RECOMMENDED)
        self.around = lambda function, *x: function(*x)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(("gain", "bias")):
                    p.add_(torch.randn_like(p) * 0.2)

    def middle(self, x):
        for layer in self.body:
            x = layer(x)
        return x

    def forward(self, x):
        x = self.around(self.middle, self.stem(x))
        x = self.body[1](self.bare(x))
        return self.head((self.frozen(self.tied(self.up(x)))).mean((2, 3)))


def pair(dtype=torch.float64):
    """A network, its twin that scales together, and an input."""
    alone = Net().to(dtype)
    together = copy.deepcopy(alone)
    modules.scale_together(together)
    return alone, together, torch.randn(3, 3, 6, 6, dtype=dtype)


def gradients(net, y):
    return torch.autograd.grad(y.square().sum(), list(net.parameters())[:-2], allow_unused=True)


def assert_same(alone, together, x, call=lambda net, x: net(x)):
    for net in (alone, together):
        net.zero_grad()
        net.y = call(net, x)
        net.y.square().sum().backward()
    torch.testing.assert_close(together.y, alone.y)
    for (name, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert not modules._shares.open


@pytest.fixture
def count(monkeypatch):
    """How many layers each call made ready."""
    calls = []
    honest = functional.Arrangement.make
    monkeypatch.setattr(
        functional.Arrangement, "make", lambda self: calls.append(len(self.ready)) or honest(self)
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients(dtype, count):
    alone, together, x = pair(dtype)
    assert_same(alone, together, x)
    assert together.unused.weight.grad is None
    assert count == [1] * 14 + [14]  # alone all but the unused, one of them twice; together
    with functional.plainly():
        expected = together(x)
    torch.testing.assert_close(together(x), expected)


def test_half_precision_and_autocast():
    alone, together, x = pair(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(together(x), alone(x))
    alone, together = alone.bfloat16(), together.bfloat16()
    # Numbers of one layer, or vectors over all of them: the last bits may differ.
    torch.testing.assert_close(together(x.bfloat16()), alone(x.bfloat16()), rtol=2e-2, atol=1e-2)


def test_second_derivatives():
    for net in (nets := pair())[:2]:
        x = nets[2].clone().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        net.penalty = torch.autograd.grad(
            g.square().sum(), [p for p in net.parameters() if p.requires_grad], allow_unused=True
        )
    assert any(g is not None for g in nets[0].penalty)
    torch.testing.assert_close(
        *([g if g is not None else torch.zeros(1) for g in net.penalty] for net in nets[:2])
    )


def test_two_forwards_before_two_backwards():
    alone, together, x = pair()
    assert_same(alone, together, x, lambda net, x: net(x) + net(x + 1).square())
    first, second = together(x), together(x + 1)
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    alone, together, x = pair()
    for net in (alone, together):
        net.around = lambda function, *x: checkpoint(function, *x, use_reentrant=reentrant)
    assert_same(alone, together, x.requires_grad_())
    for net in (alone, together):
        net.around = lambda function, *x: function(*x)
    assert_same(alone, together, x, lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    with torch.autograd.graph.save_on_cpu():
        assert_same(alone, together, x)


def test_functional_calls_and_vmap():
    alone, together, x = pair()
    parameters = {k: p.detach() * 1.5 for k, p in alone.named_parameters()}
    torch.testing.assert_close(
        functional_call(together, parameters, x), functional_call(alone, parameters, x)
    )
    stacked = {k: torch.stack([p, p * 2 + 0.1]) for k, p in parameters.items()}

    def each(net):
        loss = lambda p, x: functional_call(net, p, x[None]).square().sum()  # noqa: E731
        return vmap(grad(loss), (None, 0))(parameters, x)

    def many(net):
        return vmap(lambda p: functional_call(net, p, x))(stacked)

    for function in (each, many):
        torch.testing.assert_close(function(together), function(alone))


def test_copies_and_files(count):
    _, together, x = pair()
    del together.around
    together.around = checkpoint_free
    expected = together(x)
    buffer = io.BytesIO()
    torch.save(together, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(together), torch.load(buffer, weights_only=False)):
        count.clear()
        assert torch.equal(twin(x), expected)
        assert count == [14]


def checkpoint_free(function, *x):
    return function(*x)


def test_compiles_and_exports():
    alone, together, x = pair()
    assert_same(
        alone, together, x, lambda net, x: torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    )
    program = torch.export.export(together.eval(), (x,))
    torch.testing.assert_close(program.module()(x), alone(x))
    together.stem.compile(backend="aot_eager")  # a part alone
    assert_same(alone, together, x)


def test_parameters_that_change_after_the_start():
    alone, together, x = pair()
    for net in (alone, together):
        prune.l1_unstructured(net.body[0], "weight", 0.5)  # a hook sets the weight
    with torch.no_grad():
        for net in (alone, together):
            net.body[0].weight_orig.mul_(torch.linspace(1, 2, 6, dtype=x.dtype).view(-1, 1, 1, 1))
    assert_same(alone, together, x)

    def change(module, args, y):
        with torch.no_grad():
            net.body[1].weight[0].add_(1.0)
            net.bare.gain.mul_(2.0)

    before = alone.y
    for net in (alone, together):
        net.stem.register_forward_hook(change)
        net.y = net(x)
    torch.testing.assert_close(together.y, alone.y)
    assert not torch.allclose(alone.y, before)


def test_gradients_switched_on_inside():
    alone, together, x = pair()
    for net in (alone, together):

        def around(function, *x):
            with torch.enable_grad():
                return function(*x)

        net.around = around
        net.body[6].register_forward_hook(lambda module, args, y, net=net: setattr(net, "inner", y))
        with torch.no_grad():
            net(x)
        net.inner.sum().backward()
    torch.testing.assert_close(together.body[0].weight.grad, alone.body[0].weight.grad)


def test_an_error_inside_leaves_nothing_open():
    _, together, x = pair()
    with pytest.raises(RuntimeError):
        together(x[:, :2])
    assert not modules._shares.open
    handle = together.stem.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        together(x)
    handle.remove()
    together(x).sum().backward()
    assert not modules._shares.open


def test_a_model_within_a_model(count):
    alone, together, x = pair()
    outer = nn.Sequential(together, normprop.NormPropLinear(4, 2).double())
    handle = modules.scale_together(outer)
    torch.testing.assert_close(outer(x), outer[1](alone(x)))
    count.clear()
    outer(x)
    assert count == [1, 14]  # the outer's own, the inner's
    handle.remove()
    count.clear()
    outer(x)
    assert count == [14, 1]


def test_asking_twice_scales_once(count):
    _, together, x = pair()
    modules.scale_together(together).remove()
    together(x)
    assert count == [14]


def test_projection_of_a_shared_weight():
    _, together, _ = pair()
    with torch.no_grad():
        together.up.weight.mul_(3.0)
    normprop.project_(together)
    rows = together.up.weight.unflatten(0, (3, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6).double())


@pytest.mark.parametrize("first", [False, True])
def test_projection_of_a_weight_shared_by_layers_of_two_rules(first):
    rules = [normprop.NormRule(centered=first), normprop.NormRule(centered=not first)]
    net = nn.ModuleList(normprop.NormPropLinear(6, 5, rule=rule) for rule in rules).double()
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight.add_(0.7)
    x = torch.randn(4, 6).double()
    before = [layer(x) for layer in net]
    normprop.project_(net)
    torch.testing.assert_close([layer(x) for layer in net], before)
    torch.testing.assert_close(net[0].weight.norm(dim=1), torch.ones(5).double())


def small():
    net = nn.Sequential(
        normprop.NormPropLinear(3, 4, activation="relu"), normprop.NormPropLinear(4, 2, activation=None)
    )
    modules.scale_together(net)
    return net.double()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch's own making
def test_nothing_of_a_transform_outlives_it():
    """Layers with different constants keep vectors of them; those made within a transform are not kept."""
    net, x = small(), torch.randn(3).double()
    alone = copy.deepcopy(net)
    alone._forward_pre_hooks.clear()
    for _ in range(2):
        ours, theirs = (torch.func.jacfwd(torch.func.jacrev(m))(x) for m in (net, alone))
        torch.testing.assert_close(ours, theirs)
    net(x).sum().backward()


def test_fake_tensors():
    net = small()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert net(torch.empty(5, 3, dtype=torch.float64)).shape == (5, 2)
    assert net(torch.randn(5, 3).double()).isfinite().all()


def replace_weight(layer):
    torch.manual_seed(3)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def replace_weight_unseen(layer):
    torch.manual_seed(3)
    layer._parameters["weight"] = nn.Parameter(torch.randn_like(layer.weight))


def replace_data(layer):
    torch.manual_seed(3)
    layer.weight.data = torch.randn_like(layer.weight)


@pytest.mark.parametrize(
    "change",
    [
        replace_weight,
        replace_weight_unseen,
        replace_data,
        lambda layer: setattr(layer, "activation", nn.GELU()),
        lambda layer: layer._modules.update(activation=nn.Tanh()),
        lambda layer: layer.activation.register_forward_hook(lambda _, __, y: 2 * y),
        lambda layer: setattr(layer, "rule", normprop.NormRule(centered=True)),
        lambda layer: setattr(layer, "standard", (0.5, 2.0)),
        lambda layer: setattr(layer, "factor", 3.0),
        lambda layer: layer.requires_grad_(False),
        lambda layer: layer.float().double(),
    ],
)
def test_layers_that_change_between_forwards(change):
    """How layers were arranged is remembered for the same layers alone."""
    together, x = small(), torch.randn(5, 3).double()
    alone = copy.deepcopy(together)
    alone._forward_pre_hooks.clear()
    assert_same(alone, together, x)
    hook = next(iter(together._forward_pre_hooks.values()))
    before = hook.last
    together(x)
    assert hook.last is before is not None
    for net in (alone, together):
        change(net[0])
    assert_same(alone, together, x)


def test_layers_that_come_and_go_between_forwards():
    together, x = small(), torch.randn(5, 3).double()
    alone = copy.deepcopy(together)
    alone._forward_pre_hooks.clear()
    torch.manual_seed(3)
    first, second, last = (normprop.NormPropLinear(*size).double() for size in ((3, 3), (3, 2), (2, 4)))
    together(x)
    for net in (alone, together):
        net.insert(0, copy.deepcopy(first))
        net.append(copy.deepcopy(last))
    assert_same(alone, together, x)
    for net in (alone, together):
        del net[1:3]
        net.insert(1, copy.deepcopy(second))
    assert_same(alone, together, x)


def test_an_attribute_that_is_taken_away():
    together, x = small(), torch.randn(5, 3).double()
    before = together(x)
    together[0].factor = 3.0
    assert not torch.allclose(together(x), before)
    del together[0].factor
    assert torch.equal(together(x), before)


def test_what_keeps_an_arrangement_and_what_does_not(monkeypatch):
    together, x = small(), torch.randn(5, 3).double()
    hook = next(iter(together._forward_pre_hooks.values()))
    together(x)
    last, alone = hook.last, []
    ready = functional.make_ready
    monkeypatch.setattr(
        functional, "make_ready", lambda layers: (alone.append(layers[0].weight), ready(layers))[1]
    )
    together.eval().train()(x)
    assert hook.last is last
    assert not alone
    together[0].register_forward_pre_hook(lambda layer, _: setattr(layer, "note", 1))
    together[1].register_forward_pre_hook(lambda _, __: setattr(together[0], "note", 1))
    together(x)  # those with hooks are not scaled with the others
    assert [id(weight) for weight in alone] == [id(layer.weight) for layer in together]
    for layer in together:
        layer._forward_pre_hooks.clear()
    together.register_forward_hook(lambda *_: setattr(together[0], "note", 2))
    together[0].register_forward_hook(lambda *_: setattr(together[0], "note", 3))
    alone.clear()
    together(x)
    assert not alone  # the second layer has its share, whatever happens to the first
    gain = (together[0].gain * 2).detach().requires_grad_() * 1
    functional_call(together, {"0.gain": gain}, (x,))
    assert hook.last is None  # it would keep that gain's graph


def test_a_layer_that_changes_during_the_forward():
    together, x = small(), torch.randn(5, 3).double()
    alone = copy.deepcopy(together)
    alone._forward_pre_hooks.clear()
    for net in (alone, together):
        net[0].register_forward_hook(lambda _, __, ___, net=net: setattr(net[-1], "factor", 3.0))
    assert_same(alone, together, x)


def test_autocast_that_changes_inside():
    alone, together, x = pair(torch.float32)
    for net in (alone, together):
        middle = net.middle

        def without(x, middle=middle):
            with torch.autocast("cpu", enabled=False):
                return middle(x.float())

        net.middle = without
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(together(x), alone(x))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(normprop.NormPropLinear(4, 4), normprop.NormPropLinear(4, 3))
        x = torch.randn(2, 4)
        alone = model(x)
        normprop.scale_together(model)
        torch.testing.assert_close(model(x), alone)
