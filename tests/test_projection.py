"""Training aids: unit rows, parameter groups, unit-wise clipping, each against a plain loop."""

import copy

import pytest
import torch
from torch import nn

import normprop
from normprop import NormRule

LAYERS = {
    "linear": lambda rule: normprop.NormPropLinear(6, 4, rule=rule),
    "conv1d": lambda rule: normprop.NormPropConv1d(6, 4, 3, rule=rule),
    "conv2d": lambda rule: normprop.NormPropConv2d(6, 4, 3, groups=2, rule=rule),
    "conv3d": lambda rule: normprop.NormPropConv3d(6, 4, 2, rule=rule),
    "transpose1d": lambda rule: normprop.NormPropConvTranspose1d(6, 4, 3, rule=rule),
    "transpose2d": lambda rule: normprop.NormPropConvTranspose2d(6, 4, 3, stride=2, groups=2, rule=rule),
    "transpose3d": lambda rule: normprop.NormPropConvTranspose3d(6, 4, 2, rule=rule),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
}


def rows(layer):
    """Each output unit's weights, gathered one by one."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [w.flatten() for w in layer.weight.detach()]
    per_group = layer.in_channels // layer.groups
    return [
        layer.weight.detach()[g * per_group : (g + 1) * per_group, o].flatten()
        for g in range(layer.groups)
        for o in range(layer.weight.shape[1])
    ]


def assert_unit(layer):
    for row in rows(layer):
        torch.testing.assert_close(row.norm(), torch.tensor(1.0))
        if layer.rule.centered:
            torch.testing.assert_close(row.sum(), torch.tensor(0.0))


def net():
    """Two NormProp layers, an activation of ours, and foreign layers."""
    return nn.Sequential(
        normprop.NormPropConv2d(3, 8, 3, padding=1),
        normprop.NormPropConv2d(8, 8, 3, activation="prelu", rule=normprop.RECOMMENDED),
        normprop.NormalizedActivation("gelu", 8),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def backward(model):
    model.zero_grad()
    model(torch.randn(5, 3, 4, 4)).square().mean().backward()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("centered", [False, True])
def test_project_makes_unit_rows_and_keeps_the_outputs(kind, centered):
    layer = LAYERS[kind](NormRule(centered))
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) * 5).add_(0.3)
    weight = layer.weight
    before = layer.weight.detach().clone()
    x = torch.randn(2, 6, *[5] * (layer.weight.ndim - 2))
    expected = layer(x)
    assert normprop.project_(layer) is None
    assert layer.weight is weight
    assert not torch.equal(layer.weight, before)
    assert layer.weight.grad_fn is None
    assert_unit(layer)
    torch.testing.assert_close(layer(x), expected)
    once = layer.weight.detach().clone()
    normprop.project_(layer)
    torch.testing.assert_close(layer.weight, once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("centered", [False, True])
def test_zero_rows_stay(centered):
    layer = LAYERS["conv2d"](NormRule(centered))
    with torch.no_grad():
        layer.weight[1] = 0
    normprop.project_(nn.Sequential(layer))
    assert (layer.weight[1] == 0).all()
    for index in (0, 2, 3):
        torch.testing.assert_close(layer.weight[index].norm(), torch.tensor(1.0))


def test_project_leaves_other_layers_alone():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    normprop.project_(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"0.weight", "1.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_attached_projection_follows_every_step_until_removed(name, grouped):
    model = net()
    parameters = normprop.param_groups(model, 1e-3) if grouped else model.parameters()
    optimizer = OPTIMIZERS[name](parameters)
    handle = normprop.attach_projection(optimizer, model)
    for _ in range(3):
        before = model[0].weight.detach().clone()
        backward(model)
        optimizer.step()
        assert_unit(model[0])
        assert_unit(model[1])
        assert not torch.equal(model[0].weight, before)
    handle.remove()
    backward(model)
    optimizer.step()
    assert all((row.norm() - 1).abs() > 1e-4 for row in rows(model[0]))


def test_attached_projection_works_with_a_closure():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    normprop.attach_projection(optimizer, model)

    def closure():
        backward(model)
        return model(torch.randn(5, 3, 4, 4)).square().mean()

    optimizer.step(closure)
    assert_unit(model[0])


def test_attach_projection_refuses_models_without_our_layers():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match="Sequential has no NormProp layer to project; build it with normprop"
    ):
        normprop.attach_projection(torch.optim.SGD(model.parameters(), lr=1), model)


def test_param_groups_hold_each_parameter_once_with_its_decay():
    model = net()
    groups = normprop.param_groups(model, 5e-4, gain_decay=1e-5)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(decays)
    assert decays == {
        "0.weight": 0.0,
        "0.gain": 1e-5,
        "0.bias": 1e-5,
        "1.weight": 0.0,
        "1.gain": 1e-5,
        "1.bias": 1e-5,
        "1.activation.weight": 1e-5,
        "2.gain": 1e-5,
        "2.bias": 1e-5,
        "4.weight": 5e-4,
        "4.bias": 5e-4,
    }
    backward(model)
    torch.optim.AdamW(groups, lr=0.1).step()


def test_param_groups_skip_frozen_and_count_shared_parameters_once():
    model = net()
    model[0].requires_grad_(False)
    model[1].gain = model[2].gain  # shared within ours
    foreign = nn.Conv2d(8, 8, 3)
    foreign.weight = model[1].weight  # shared with a foreign layer: ours decides
    model.append(foreign)
    groups = normprop.param_groups(model, 5e-4)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert groups[0] == {"params": [model[1].weight], "weight_decay": 0.0}
    model.requires_grad_(False)
    assert normprop.param_groups(model, 5e-4) == []


@pytest.mark.parametrize(
    ("decay", "gain_decay", "name"), [(-1.0, 0.0, "weight_decay"), (0.0, -1.0, "gain_decay")]
)
def test_negative_decays_are_refused(decay, gain_decay, name):
    with pytest.raises(ValueError, match=rf"^{name} must be at least 0, got -1.0"):
        normprop.param_groups(net(), decay, gain_decay)


@pytest.mark.parametrize("clipping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_equals_a_loop(clipping, dtype):
    model = net().to(dtype)
    with torch.no_grad():
        model[4].weight[0] = 0  # below the floor
    model.zero_grad()
    model(torch.randn(5, 3, 4, 4, dtype=dtype)).square().mean().backward()
    expected = {}
    for name, p in model.named_parameters():
        grad = p.grad.clone()
        for w, g in zip(p.detach(), grad, strict=True) if p.ndim > 1 else [(p.detach(), grad)]:
            limit = clipping * max(w.square().sum().sqrt().item(), 1e-3)
            length = g.square().sum().sqrt().item()
            if length > limit:
                g *= limit / length
        expected[name] = grad
    normprop.clip_grad_unitwise_(model.parameters(), clipping)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_clipping_takes_one_tensor_and_skips_missing_and_zero_gradients():
    weight, missing, zero = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    weight.grad, zero.grad = torch.full((2, 2), 5.0), torch.zeros(2, 2)
    normprop.clip_grad_unitwise_([missing, zero, weight], 0.5)
    assert missing.grad is None
    assert (zero.grad == 0).all()
    # Rows of length sqrt(2): gradients are cut to half of it.
    torch.testing.assert_close(weight.grad, torch.full((2, 2), 0.5))
    normprop.clip_grad_unitwise_(weight, 0.25)
    torch.testing.assert_close(weight.grad, torch.full((2, 2), 0.25))


@pytest.mark.parametrize("clipping", [0.0, -1.0, float("nan")])
def test_bad_clipping_is_refused(clipping):
    with pytest.raises(ValueError, match=f"clipping must be above 0, got {clipping}"):
        normprop.clip_grad_unitwise_([nn.Parameter(torch.ones(2))], clipping)
