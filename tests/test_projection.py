"""Training aids: unit rows, parameter groups, unit-wise clipping, each against a plain loop."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import normprop
from normprop import NormRule
from normprop.projection import orthogonal

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
    with pytest.raises(
        TypeError, match="LBFGS makes many moves in a step, which a trust radius cannot bound"
    ):
        normprop.attach_projection(optimizer, model, trust_radius=0.01)
    normprop.attach_projection(optimizer, model)

    def closure():
        backward(model)
        return model(torch.randn(5, 3, 4, 4)).square().mean()

    optimizer.step(closure)
    assert_unit(model[0])


def test_attach_projection_refuses_models_without_our_layers():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="Sequential has no NormProp layer; build it with normprop"):
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


def test_what_stands_between_layers_decays_as_layers_do():
    net = nn.Sequential(
        normprop.NormalizedAdd(learnable=True), normprop.NormalizedGate(nn.PReLU()), nn.Linear(2, 2)
    )
    groups = normprop.param_groups(net, 5e-4, gain_decay=1e-5)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {g["weight_decay"]: [names[id(p)] for p in g["params"]] for g in groups} == {
        0.0: ["0.weight"],
        1e-5: [name for name in names.values() if name.startswith("1.")],
        5e-4: ["2.weight", "2.bias"],
    }


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
    ("decay", "gain_decay", "name"),
    [(-1.0, 0.0, "weight_decay"), (0.0, -1.0, "gain_decay"), (0.0, "5e-4", "gain_decay")],
)
def test_bad_decays_are_refused(decay, gain_decay, name):
    bad = decay or gain_decay
    with pytest.raises(ValueError, match=rf"^{name} must be a number of at least 0, got {bad!r}"):
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


@pytest.mark.parametrize("clipping", [0.0, -1.0, float("nan"), float("inf"), None])
def test_bad_clipping_is_refused(clipping):
    with pytest.raises(ValueError, match=f"clipping must be a number above 0, got {clipping}"):
        normprop.clip_grad_unitwise_([nn.Parameter(torch.ones(2))], clipping)


def change(layer, before, after):
    """The formula of attach_projection, a unit at a time."""
    old, new = copy.deepcopy(layer), copy.deepcopy(layer)
    old.load_state_dict(before)
    new.load_state_dict(after)
    has_rows = hasattr(layer, "weight")
    result = []
    for i in range(len(layer.gain)):
        g, h = old.gain[i].item(), new.gain[i].item()
        shift = 0.0 if layer.bias is None else (new.bias[i] - old.bias[i]).item()
        turn = (rows(new)[i] - rows(old)[i]).norm().item() if has_rows else 0.0
        result.append((max(abs(g), abs(h)) ** 2 * turn**2 + (h - g) ** 2 + shift**2) ** 0.5)
    return result


def states(model):
    return {name: copy.deepcopy(m.state_dict()) for name, m in model.named_modules() if hasattr(m, "gain")}


@pytest.mark.parametrize(("dtype", "excess"), [(torch.float64, 1e-3), (torch.bfloat16, 0.5)], ids=str)
def test_trust_region_in_other_dtypes(dtype, excess):
    torch.manual_seed(0)
    model = net().to(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=10.0)
    normprop.attach_projection(opt, model, trust_radius=0.05)
    before = states(model)
    model(torch.randn(5, 3, 4, 4, dtype=dtype)).square().mean().backward()
    opt.step()
    for name, after in states(model).items():  # a bfloat16 row of length 1 is known to 0.4 % an element
        assert 0 < max(change(model.get_submodule(name), before[name], after)) < 0.05 * (1 + excess)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED], ids=["paper", "recommended"])
def test_trust_region_bounds_every_unit(layer, optimizer, rule):
    torch.manual_seed(0)
    model = layer(rule)
    opt = optimizer(model.parameters())
    normprop.attach_projection(opt, model, trust_radius=0.02)
    size = (5, 6, *[6] * (model.weight.ndim - 2))
    for _ in range(4):
        before = copy.deepcopy(model.state_dict())
        opt.zero_grad()
        (1e3 * model(torch.randn(size)).square().mean()).backward()
        opt.step()
        assert_unit(model)
        changes = change(model, before, model.state_dict())
        # Back on the sphere, a chord of the radius is an arc: asin(r) = r + r^3/6.
        assert max(changes) < 0.02 * 1.001
        assert max(changes) > 0.015  # these steps are far larger without it


def test_trust_region_leaves_small_steps_alone():
    torch.manual_seed(0)
    plain = net()
    bounded = copy.deepcopy(plain)
    results = []
    for model, radius in ((plain, None), (bounded, 10.0)):
        torch.manual_seed(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        normprop.attach_projection(opt, model, radius)
        for _ in range(3):
            backward(model)
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_trust_region_covers_all_units_of_a_network_and_nothing_else():
    torch.manual_seed(0)
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=100.0)
    normprop.attach_projection(opt, model, trust_radius=0.05)
    before = states(model)
    foreign = model[4].weight.detach().clone()
    backward(model)
    opt.step()
    for name, after in states(model).items():
        assert 0 < max(change(model.get_submodule(name), before[name], after)) < 0.0501
    torch.testing.assert_close(model[4].weight.detach(), foreign - 100.0 * model[4].weight.grad)


def test_trust_radius_falls_with_the_learning_rate_and_a_resumed_run_knows_the_largest():
    def step(opt, model):
        before = copy.deepcopy(model.state_dict())
        opt.zero_grad()
        (1e6 * model(torch.randn(5, 6)).square().mean()).backward()
        opt.step()
        return max(change(model, before, model.state_dict()))

    torch.manual_seed(0)
    model = normprop.NormPropLinear(6, 4)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    normprop.attach_projection(opt, model, trust_radius=0.04)
    assert 0.036 < step(opt, model) < 0.0401  # the bound is not tight where the gain falls
    opt.param_groups[0]["lr"] = 0.25
    assert 0.009 < step(opt, model) < 0.01001
    resumed = torch.optim.SGD(model.parameters(), lr=0.25)
    resumed.load_state_dict(opt.state_dict())
    normprop.attach_projection(resumed, model, trust_radius=0.04)
    assert 0.009 < step(resumed, model) < 0.01001
    resumed.param_groups[0]["lr"] = 0.0
    assert step(resumed, model) < 1e-6  # rounding of the projection


def test_trust_region_takes_shared_weights_missing_biases_and_can_be_removed():
    torch.manual_seed(0)
    a, b = normprop.NormPropLinear(6, 6, bias=False), normprop.NormPropLinear(6, 6, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    opt = torch.optim.SGD(model.parameters(), lr=100.0)
    handle = normprop.attach_projection(opt, model, trust_radius=0.01)

    def step():
        before = a.weight.detach().clone()
        opt.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        opt.step()
        return (a.weight - before).norm(dim=1).max()

    assert step() < 0.0101 / 0.8  # the first layer's gain is 1/jacobian, about 0.83
    handle.remove()
    assert step() > 0.1


def test_trust_region_of_a_weight_that_is_measured_in_parts():
    torch.manual_seed(0)
    layer = normprop.NormPropLinear(2**17, 5)
    normprop.project_(layer)
    opt = torch.optim.SGD(layer.parameters(), lr=100.0)
    normprop.attach_projection(opt, layer, trust_radius=0.02)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 2**17)).square().mean().backward()
    opt.step()
    assert 0.01 < max(change(layer, before, layer.state_dict())) < 0.0201


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED], ids=["paper", "recommended"])
def test_a_step_is_the_same_by_parts(layer, rule, monkeypatch):
    torch.manual_seed(0)
    whole = layer(rule)
    by_parts = copy.deepcopy(whole)
    x = torch.randn(5, 6, *[6] * (whole.weight.ndim - 2))
    for model, part in ((whole, 2**18), (by_parts, 8)):
        monkeypatch.setattr("normprop.rows.PART", part)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)  # some units are bounded, some are not
        normprop.attach_projection(opt, model, trust_radius=0.05)
        model(x).square().mean().backward()
        opt.step()
    torch.testing.assert_close(by_parts.state_dict(), whole.state_dict())


def test_trust_region_copies_anew_when_a_dtype_changes_between_steps():
    torch.manual_seed(0)
    layer = normprop.NormPropLinear(6, 4)
    opt = torch.optim.SGD(layer.parameters(), lr=100.0)
    normprop.attach_projection(opt, layer, trust_radius=0.02)
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        before = copy.deepcopy(layer.state_dict())
        layer.zero_grad()
        layer(torch.randn(5, 6, dtype=dtype)).square().mean().backward()
        opt.step()
        assert 0.01 < max(change(layer, before, layer.state_dict())) < 0.0201


def matrices(weight, layer):
    """A layer's weight (or step) as one matrix a group, gathered unit by unit."""
    groups = getattr(layer, "groups", 1)
    if not layer.transposed:
        return [part.flatten(1) for part in weight.chunk(groups)]
    return [
        torch.stack([part[:, o].flatten() for o in range(part.shape[1])]) for part in weight.chunk(groups)
    ]


@pytest.mark.parametrize("kind", LAYERS)
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind](normprop.PAPER).double()
    step = torch.randn_like(layer.weight).detach() * 1e-9
    result = orthogonal(step, layer.transposed, getattr(layer, "groups", 1))
    assert (result.shape, result.dtype) == (step.shape, step.dtype)
    for before, after in zip(matrices(step, layer), matrices(result, layer), strict=True):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        values = u.mT @ after @ v.mT
        assert (values - values.diag().diag()).abs().max() < 1e-9 * values.max()
        assert values.diag().max() < 1.8 * values.diag().min()
        torch.testing.assert_close(after.square().sum(), torch.tensor(float(len(after))).double())


def test_orthogonal_of_extremes():
    torch.manual_seed(0)
    step = torch.randn(4, 6)
    for scale in (1e-37, 1e30):
        torch.testing.assert_close(orthogonal(step * scale), orthogonal(step), rtol=1e-3, atol=1e-4)
    assert not orthogonal(torch.zeros(4, 6)).any()
    assert orthogonal(step * float("nan")).isnan().all()
    one = orthogonal(torch.outer(step[:, 0], step[0]))  # rank 1
    torch.testing.assert_close(one.norm(), torch.tensor(2.0))
    torch.testing.assert_close(torch.linalg.matrix_norm(one, 2), torch.tensor(2.0), rtol=1e-3, atol=0)
    assert orthogonal(torch.randn(5, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED], ids=["paper", "recommended"])
def test_orthogonal_steps_are_the_optimizers_made_orthogonal(kind, optimizer, rule):
    """Against the same step made without the aid, orthogonalised by a singular value decomposition."""
    torch.manual_seed(0)
    layer = LAYERS[kind](rule).double()
    normprop.project_(layer)
    plain = copy.deepcopy(layer)
    x = torch.randn(5, 6, *[6] * (layer.weight.ndim - 2), dtype=torch.float64)
    before = layer.weight.detach().clone()
    aided = optimizer([layer.weight])
    normprop.attach_projection(aided, layer, trust_radius=0.02, orthogonal=True)
    for model, opt in ((layer, aided), (plain, optimizer([plain.weight]))):
        model(x).square().mean().backward()
        opt.step()
    assert_unit(layer.float())
    for step, move, old in zip(
        *(
            matrices(t, layer)
            for t in (plain.weight.detach() - before, layer.weight.detach() - before, before)
        ),
        strict=True,
    ):
        step = step - old * (step * old).sum(1, keepdim=True)  # what the projection takes away
        step = step - step.mean(1, keepdim=True) if rule.centered else step
        u, s, v = torch.linalg.svd(step, full_matrices=False)
        rank = int((s > 1e-3 * s[0]).sum())
        wanted = u[:, :rank] @ v[:rank]
        wanted = wanted - old * (wanted * old).sum(1, keepdim=True)  # on the sphere
        cosine = (wanted * move).sum() / wanted.norm() / move.norm()
        assert cosine > 0.9  # singular values of .7 to 1.2, and rows longer than the radius cut to it
        assert 0.01 < move.norm(dim=1).max() < 0.0201 / 0.8  # the gain is at least 1/jacobian, about 0.83


def test_orthogonal_steps_do_not_depend_on_the_learning_rate_and_fall_with_it():
    def moved(lr, last):
        torch.manual_seed(0)
        layer = normprop.NormPropLinear(6, 4)
        opt = torch.optim.SGD([layer.weight], lr=lr)
        normprop.attach_projection(opt, layer, 0.02, orthogonal=True)
        opt.param_groups[0]["largest_lr"] = lr
        opt.param_groups[0]["lr"] = last
        before = layer.weight.detach().clone()
        layer(torch.randn(8, 6)).square().mean().backward()
        opt.step()
        return (layer.weight - before).detach()

    torch.testing.assert_close(moved(1e-3, 1e-3), moved(1e3, 1e3), rtol=0.02, atol=1e-4)
    torch.testing.assert_close(moved(0.1, 0.05) * 2, moved(0.1, 0.1), rtol=0.05, atol=2e-4)
    assert not moved(0.1, 0.0).abs().max() > 1e-6


def test_weight_decay_changes_no_orthogonal_step():
    def moved(decay):
        torch.manual_seed(0)
        layer = normprop.NormPropConv2d(4, 6, 3, rule=normprop.RECOMMENDED)
        normprop.project_(layer)
        opt = torch.optim.SGD([layer.weight], lr=0.1, weight_decay=decay)
        normprop.attach_projection(opt, layer, 0.02, orthogonal=True)
        before = layer.weight.detach().clone()
        layer(torch.randn(8, 4, 5, 5)).square().mean().backward()
        opt.step()
        return layer.weight.detach() - before

    torch.testing.assert_close(moved(0.1), moved(0.0), rtol=1e-2, atol=1e-5)


def test_orthogonal_is_as_accurate_within_autocast():
    torch.manual_seed(0)
    step = torch.randn(64, 64) @ torch.diag(torch.logspace(0, -3, 64)) @ torch.randn(64, 200)
    expected = orthogonal(step)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(orthogonal(step), expected)


def test_orthogonal_steps_of_weights_in_half_precision_are_refused():
    net = nn.Sequential(normprop.NormPropLinear(3, 2)).bfloat16()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"need float32 weights, '0' is torch\.bfloat16: keep weights float32"
    ):
        normprop.attach_projection(opt, net, 0.02, orthogonal=True)


def test_gains_and_biases_share_the_bound_with_orthogonal_steps():
    def row_moves(lr):
        torch.manual_seed(0)
        layer = normprop.NormPropLinear(20, 8, rule=normprop.RECOMMENDED)
        opt = torch.optim.SGD(layer.parameters(), lr=lr)
        normprop.attach_projection(opt, layer, 0.02, orthogonal=True)
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(50, 20)).square().mean().backward()
        opt.step()
        assert max(change(layer, before, layer.state_dict())) < 0.0201
        return (layer.weight.detach() - before["weight"]).norm(dim=1)

    assert row_moves(1e-3).mean() > 0.018
    assert row_moves(10.0).mean() < 0.005


def test_orthogonal_steps_need_a_radius():
    layer = normprop.NormPropLinear(3, 2)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="orthogonal steps have the length trust_radius, got None"):
        normprop.attach_projection(opt, layer, orthogonal=True)


def test_a_gradient_that_is_no_number_is_not_hidden():
    layer = normprop.NormPropLinear(3, 2)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    normprop.attach_projection(opt, layer, trust_radius=0.01)
    for p in layer.parameters():
        p.grad = torch.full_like(p, float("nan"))
    opt.step()
    assert all(p.isnan().all() for p in layer.parameters())


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf"), "0.01"])
def test_trust_radius_must_be_a_number_above_0(radius):
    layer = normprop.NormPropLinear(3, 2)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"trust_radius must be a number above 0, got {radius!r}"):
        normprop.attach_projection(opt, layer, radius)


def test_what_cannot_be_projected_is_refused():
    pruned = nn.Sequential(normprop.NormPropLinear(4, 3), normprop.NormPropLinear(3, 2))
    prune.l1_unstructured(pruned[1], "weight", amount=0.5)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    message = r"the weight of '1' is parametrized or pruned, .* remove that first"
    with pytest.raises(ValueError, match=message):
        normprop.attach_projection(optimizer, pruned)
    with pytest.raises(ValueError, match="the weight of 'NormPropLinear' is parametrized or pruned"):
        normprop.project_(pruned)
    torch.optim.SGD(normprop.param_groups(pruned, 1e-3), lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.original_optimizer = inner

    net = normprop.NormPropLinear(4, 3)
    with pytest.raises(
        TypeError, match=r"the optimizer comes first: attach_projection\(optimizer, model\)"
    ):
        normprop.attach_projection(net, optimizer)
    with pytest.raises(
        TypeError, match="Wrapper takes no step hooks: attach the projection to the optimizer"
    ):
        normprop.attach_projection(Wrapper(torch.optim.SGD(net.parameters(), lr=0.1)), net)


def test_a_handle_ends_with_its_block():
    net = normprop.NormPropLinear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with normprop.attach_projection(optimizer, net, trust_radius=0.01):
        assert optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
def test_units_that_share_a_row_are_each_bounded(gain):
    torch.manual_seed(0)
    first, second = normprop.NormPropLinear(5, 5), normprop.NormPropLinear(5, 5)
    second.weight = first.weight
    nn.init.constant_(second.gain, gain)
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    normprop.attach_projection(optimizer, model, trust_radius=0.02)
    before = copy.deepcopy(model)
    model(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()
    moves = []
    for new, old in zip(model, before, strict=True):
        parts = (new.weight - old.weight) * old.gain[:, None], new.gain - old.gain, new.bias - old.bias
        moves.append(torch.cat([p.detach().view(5, -1) for p in parts], 1).norm(dim=1).max())
    assert 0.015 < max(moves) < 0.0202


@pytest.mark.parametrize(
    "options", [{}, {"trust_radius": 0.01}, {"trust_radius": 0.01, "orthogonal": True}]
)
def test_frozen_weights_stay_bit_for_bit(options):
    model = nn.Sequential(normprop.NormPropLinear(5, 8), normprop.NormPropLinear(8, 3))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(3)
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9, nesterov=True)
    normprop.attach_projection(optimizer, model, **options)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())
    assert_unit(model[1])


def test_an_optimizer_of_another_model_is_refused():
    model, other = net(), net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter of this Sequential: build it on this model"):
        normprop.attach_projection(optimizer, model)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(5, 3\) is sparse, .* sparse=False"):
        normprop.clip_grad_unitwise_(embedding.parameters(), 0.1)


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "options", [{}, {"trust_radius": 0.01}, {"trust_radius": 0.02, "orthogonal": True}]
)
def test_sharded_parameters_train_as_whole_ones(mesh, options):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
    whole = nn.Sequential(
        normprop.NormPropConv2d(3, 6, 3),
        normprop.NormPropConvTranspose2d(6, 4, 3, groups=2, rule=normprop.RECOMMENDED),
        nn.Flatten(),
        normprop.NormPropLinear(256, 5, activation="prelu", rule=normprop.RECOMMENDED),
    )
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=mesh)
    for model in (whole, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
        normprop.attach_projection(optimizer, model, **options)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            normprop.clip_grad_unitwise_(model.parameters(), 0.1)
            optimizer.step()
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.data)


def test_a_model_of_normalised_activations_alone():
    """What preserve=True makes of Linear -> ReLU -> BatchNorm: no row to project, gains and biases to bound."""
    model = nn.Sequential(nn.Linear(4, 8), normprop.NormalizedActivation("relu", 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    normprop.attach_projection(optimizer, model, trust_radius=0.01)
    before = model[1].bias.detach().clone()
    model(torch.randn(16, 4)).square().sum().backward()
    optimizer.step()
    assert 0 < float((model[1].bias.detach() - before).abs().max()) < 0.0101


def test_what_is_no_model_or_no_number_is_refused():
    with pytest.raises(TypeError, match=r"got Conversion; pass its \.model"):
        normprop.project_(normprop.convert(nn.Sequential(nn.Linear(3, 2))))
    with pytest.raises(TypeError, match=r"got Linear; pass model.parameters\(\)"):
        normprop.clip_grad_unitwise_(nn.Linear(3, 2), 0.01)
    with pytest.raises(ValueError, match="floor must be a number above 0"):
        normprop.clip_grad_unitwise_(nn.Linear(3, 2).parameters(), 0.01, floor=0.0)
