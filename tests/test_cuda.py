"""The promises on a GPU, where there is one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normprop
from normprop.recipes.models import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RULES = {"paper": normprop.PAPER, "affine": normprop.NormRule(True, "affine", 1.0)}


def net(rule):
    return build("resnet20", (3, 16, 16), 10, rule=RULES[rule], width=0.5)


@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_gradients_equal_the_cpus(rule):
    ours = net(rule).double()
    twin = build("resnet20", (3, 16, 16), 10, rule=RULES[rule], width=0.5).double()
    twin.load_state_dict(ours.state_dict())
    twin.cuda()
    x = torch.randn(4, 3, 16, 16).double()
    outputs = ours(x), twin(x.cuda()).cpu()
    torch.testing.assert_close(*outputs)
    for model, data in ((ours, x), (twin, x.cuda())):
        model(data).square().sum().backward()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_channels_last_trains(rule, compiled, dtype):
    model = net(rule).cuda().to(memory_format=torch.channels_last)
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(normprop.param_groups(model, 5e-4), lr=0.05, momentum=0.9)
    normprop.attach_projection(optimizer, model)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    x = torch.randn(64, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(10, (64,), device="cuda")
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype):
            output = run(x)
        assert output.dtype == dtype
        loss = F.cross_entropy(output.float(), y)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    for layer in model.modules():
        if isinstance(layer, normprop.NormPropConv2d):
            rows = layer.weight.detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(rows, torch.ones_like(rows))


def test_the_checks_on_cuda():
    model = net("paper").cuda().double()
    x, y = torch.randn(4, 3, 16, 16).cuda().double(), torch.tensor([1, 2, 3, 4]).cuda()
    normprop.testing.assert_batch_independent(model, x)
    normprop.testing.assert_train_equals_eval(model, x)
    normprop.testing.assert_accumulation_equals_batch(model, x, y, F.cross_entropy)


def test_data_norm_on_cuda():
    data = torch.randn(100, 3, 4, 4) * 3 + 1
    ends = [normprop.GlobalDataNorm.fit(d) for d in (data, data.cuda())]
    torch.testing.assert_close(ends[0](data), ends[1](data.cuda()).cpu())
    assert ends[0].cuda()(data.cuda()).std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_forward_never_waits_for_the_gpu():
    """A value read in forward or backward would stall the queue; torch raises in this mode."""
    model = nn.Sequential(
        normprop.NormPropConv2d(3, 8, 3, rule=RULES["affine"], activation="gelu"),
        normprop.NormPropConv2d(8, 8, 3, rule=RULES["affine"]),
        normprop.NormPropConv2d(8, 8, 3),
    ).cuda()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        normprop.project_(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_changed_weight_is_noticed():
    """What kernels write in place counts as a change: autograd refuses what was saved before."""
    layer = normprop.NormPropLinear(4, 3).cuda()
    output = layer(torch.randn(2, 4, device="cuda"))
    normprop.project_(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
