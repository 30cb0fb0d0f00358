"""Every layer kind through the systems that models pass through."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import normprop
from normprop import NormRule

KINDS = {
    "linear": (normprop.NormPropLinear, 0),
    "conv1d": (normprop.NormPropConv1d, 1),
    "conv2d": (normprop.NormPropConv2d, 2),
    "conv3d": (normprop.NormPropConv3d, 3),
    "transpose1d": (normprop.NormPropConvTranspose1d, 1),
    "transpose2d": (normprop.NormPropConvTranspose2d, 2),
    "transpose3d": (normprop.NormPropConvTranspose3d, 3),
    "activation": (normprop.NormalizedActivation, 2),
}
RULES = {"paper": normprop.PAPER, "affine": NormRule(centered=True, constants="affine", gain=1.0)}
kinds = pytest.mark.parametrize("kind", KINDS)
rules = pytest.mark.parametrize("rule", RULES)
acts = pytest.mark.parametrize("act", ["relu", "gelu", "prelu"])
CHANNELS = 4


def build(kind, act, rule, **options):
    """A layer with random gains and biases, so that none of them can be forgotten."""
    cls, spatial = KINDS[kind]
    rule = RULES[rule]
    if kind == "activation":
        layer = cls(act, CHANNELS, rule, **options)
    else:
        arguments = (CHANNELS, 6) if spatial == 0 else (CHANNELS, 6, 3)
        layer = cls(*arguments, activation=act, rule=rule, **options)
    with torch.no_grad():
        layer.gain.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


def some_input(kind, batch=3, **options):
    return torch.randn(batch, CHANNELS, *[5] * KINDS[kind][1], **options)


def gradients(layer, function, x):
    """Output of ``function(x)``, and the gradients of its square with respect to input and parameters."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    inputs = [x, *layer.parameters()]
    return y.detach(), torch.autograd.grad(y.float().square().mean(), inputs)


def assert_same(layer, function, x, **tolerance):
    expected, expected_gradients = gradients(layer, layer, x)
    y, got = gradients(layer, function, x)
    torch.testing.assert_close(y, expected, **tolerance)
    for a, b in zip(got, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@kinds
@acts
@rules
def test_copies_and_files(kind, act, rule):
    layer, x = build(kind, act, rule), some_input(kind)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    pickled = pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = build(kind, act, rule)
    assert not torch.equal(loaded(x), expected)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copied, pickled, loaded):
        assert torch.equal(twin(x), expected)
        assert repr(twin) == repr(layer)
        for a, b in zip(twin.parameters(), layer.parameters(), strict=True):
            assert a.data_ptr() != b.data_ptr()
        twin.reset_parameters()
    assert torch.equal(layer(x), expected)


@kinds
@acts
@rules
def test_train_equals_eval_bit_for_bit(kind, act, rule):
    layer, x = build(kind, act, rule), some_input(kind)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert not list(layer.buffers())


@kinds
@acts
@rules
def test_compiles_as_one_graph(kind, act, rule):
    torch.compiler.reset()
    layer, x = build(kind, act, rule), some_input(kind)
    assert_same(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x)


@kinds
def test_compiles_without_gradients(kind):
    torch.compiler.reset()
    for act in ("relu", torch.nn.LeakyReLU(0.2)):
        layer, x = build(kind, act, "affine"), some_input(kind)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
        layer.requires_grad_(False)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("kind", "act", "rule"),
    [("conv2d", "relu", "affine"), ("linear", "prelu", "paper")],
)
def test_compiles_to_kernels(kind, act, rule):
    torch.compiler.reset()
    layer, x = build(kind, act, rule), some_input(kind)
    assert_same(layer, torch.compile(layer, fullgraph=True), x)


@kinds
@acts
@rules
def test_exports(kind, act, rule):
    layer, x = build(kind, act, rule).eval(), some_input(kind)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@kinds
@acts
@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision(kind, act, rule, dtype):
    layer, x = build(kind, act, rule), some_input(kind)
    expected, expected_gradients = gradients(layer, layer, x)
    with torch.autocast("cpu", dtype=dtype):
        y, got = gradients(layer, layer, x)
        plain = layer.activation(x).dtype
    # An element-wise layer follows torch: of the three activations, autocast lowers PReLU alone.
    assert y.dtype == (plain if kind == "activation" else dtype)
    # Weight, input, sum, bias and constants are rounded once each: 6 roundings of numbers up to 4.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=6 * eps, atol=24 * eps)
    # Some gradients are small sums of large terms (the gain's, when constants follow it): they are
    # measured against the largest.
    largest = max(b.norm() for b in expected_gradients[1:])
    for a, b in zip(got, expected_gradients, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 10 * eps * max(b.norm(), largest)


def test_the_norm_is_taken_in_float32_under_autocast():
    # In float16 the squares overflow at 256, and vanish below 2^-12.
    for scale in (1e-5, 1.0, 3e4):
        layer = normprop.NormPropLinear(8, 4, activation=None)
        x = torch.randn(3, 8)
        expected = layer(x)
        with torch.no_grad():
            layer.weight *= scale
        with torch.autocast("cpu", dtype=torch.float16):
            torch.testing.assert_close(layer(x).float(), expected, rtol=1e-2, atol=1e-2)
        half = copy.deepcopy(layer).half()
        torch.testing.assert_close(half(x.half()).float(), expected, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("kind", [kind for kind, (_, spatial) in KINDS.items() if spatial >= 2])
@acts
@rules
def test_channels_last_stays(kind, act, rule):
    layer, x = build(kind, act, rule), some_input(kind)
    form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    expected = layer(x)
    y = layer.to(memory_format=form)(x.contiguous(memory_format=form))
    assert y.is_contiguous(memory_format=form)
    assert not y.is_contiguous()
    torch.testing.assert_close(y, expected.contiguous(memory_format=form))


@kinds
@acts
@rules
def test_per_sample_gradients_by_vmap(kind, act, rule):
    layer = build(kind, act, rule, dtype=torch.float64)
    x = some_input(kind, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, sample.unsqueeze(0)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        layer.zero_grad()
        layer(sample.unsqueeze(0)).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(together[name][index], p.grad)


@kinds
def test_two_forwards_then_two_backwards(kind):
    layer, x = build(kind, "relu", "affine"), some_input(kind)
    a, b = layer(x), layer(x + 1)
    a.sum().backward()
    b.sum().backward()
    apart, layer.gain.grad = layer.gain.grad.clone(), None
    (layer(x).sum() + layer(x + 1).sum()).backward()
    torch.testing.assert_close(layer.gain.grad, apart)


@kinds
def test_checkpointing(kind):
    layer, x = build(kind, "relu", "affine"), some_input(kind)
    assert_same(layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "activation"])
def test_meta_and_empty_weights(kind):
    layer = build(kind, "gelu", "affine", device="meta")
    assert layer(some_input(kind, device="meta")).device.type == "meta"
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(some_input(kind))).all()


def test_a_model_of_layers_goes_through_torch_save():
    model = nn.Sequential(build("conv2d", "relu", "paper"), normprop.NormalizedActivation(nn.Tanh()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = some_input("conv2d")
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "activation"])
def test_batched_gradients(kind):
    layer, x = build(kind, "relu", "affine"), some_input(kind)
    y = layer(x).flatten(1).sum(1)
    together = torch.autograd.grad(
        y, layer.weight, torch.eye(len(y)).to(y), is_grads_batched=True, retain_graph=True
    )
    for index, own in enumerate(together[0]):
        expected = torch.autograd.grad(y[index], layer.weight, retain_graph=True)[0]
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED], ids=["plain", "centered"])
def test_gradients_switched_on_in_inference_mode(rule):
    layer, x = normprop.NormPropLinear(8, 3, rule=rule), torch.randn(2, 8)
    with torch.inference_mode(), torch.enable_grad():  # torch's layers take it, and give no gradient
        y = layer(x)
    torch.testing.assert_close(y.clone(), layer(x).detach())


def test_per_sample_gradients_of_no_sample():
    layer = normprop.NormPropLinear(8, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.randn(0, 8))
    assert grads["weight"].shape == (0, 3, 8)
