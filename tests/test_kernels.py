"""The kernels of GPUs against plain torch: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import normprop
from normprop import kernels, rows
from normprop.recipes.models import build

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
here = kernels.DEVICE == "cpu" or torch.cuda.is_available()
with_kernels = pytest.mark.skipif(not here, reason="no CUDA device, and TRITON_INTERPRET is not 1")


@pytest.mark.skipif(here, reason="the tests below run by themselves")
def test_kernels_in_the_interpreter():
    """Triton decides when it is imported whether it compiles or interprets."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def weights_and_numbers(dtype, layout):
    """Three layers with a zero row and a constant one, their gains and biases."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, 3, 3), torch.randn(7, 1500), torch.randn(4, 2, 1, 1)]
    weights[1][2], weights[1][3] = 0, 0.7
    weights = [w.to(memory_format=layout) if w.ndim == 4 else w for w in weights]
    vectors = [torch.randn(len(w)) for w in weights * 2]
    return [t.to(kernels.DEVICE, dtype) for t in weights + vectors]


@with_kernels
@pytest.mark.parametrize("centered", [(False,) * 3, (True,) * 3, (True, False, True)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "unused"),
    [(torch.float32, ()), (torch.float32, (2, 3)), (torch.bfloat16, ()), (torch.float32, (0,))],
)
def test_kernels_equal_torch(monkeypatch, centered, layout, dtype, unused):
    """Also where some outputs (weights and biases in turn) have no gradient."""
    each = (1.3, 0.2, 0.7), (0.5, 0.0, 1.0), (1.3, 0.2, 0.7)
    numbers = tuple(rows.Numbers(*n, c) for n, c in zip(each, centered, strict=True))
    results = []
    for used in (True, False):
        if not used:
            monkeypatch.setattr(kernels, "usable", lambda _: False)
        leaves = [t.requires_grad_() for t in weights_and_numbers(dtype, layout)]
        assert kernels.usable(leaves[:3]) is used
        recipe = rows.Recipe(numbers)
        pairs = rows.scale_rows(recipe, ((False, 1),) * 3, leaves[:3], leaves[3:6], leaves[6:])
        outputs = [t for pair in pairs for t in pair]
        torch.manual_seed(1)
        read = [t for i, t in enumerate(outputs) if i not in unused]
        torch.autograd.backward(read, [torch.randn_like(t.contiguous()) for t in read])
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        projected = [w.detach().clone() for w in leaves[:3]]
        rows.project_rows_(projected, ((False, 1),) * 3, centered)
        results.append([t.detach().float() for t in outputs + gradients + projected])
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, **close)


@with_kernels
def test_second_derivatives_behind_kernels(monkeypatch):
    numbers = tuple(rows.Numbers(1.3, 0.2, 0.7, centered) for centered in (True, False, True))
    results = []
    for used in (True, False):
        if not used:
            monkeypatch.setattr(kernels, "usable", lambda _: False)
        leaves = [t.requires_grad_() for t in weights_and_numbers(torch.float32, torch.contiguous_format)]
        pairs = rows.scale_rows(
            rows.Recipe(numbers), ((False, 1),) * 3, leaves[:3], leaves[3:6], leaves[6:]
        )
        loss = sum((t * t.detach().cos()).sum() for pair in pairs for t in pair)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:6]))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-3)


@with_kernels
def test_a_shared_gain_bounds_the_rows_of_both_layers(monkeypatch):
    results = []
    for used in (True, False):
        if not used:
            monkeypatch.setattr(kernels, "usable", lambda _: False)
        torch.manual_seed(0)
        net = torch.nn.Sequential(normprop.NormPropLinear(8, 8), normprop.NormPropLinear(8, 8))
        net[1].gain = net[0].gain
        net = net.to(kernels.DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
        normprop.attach_projection(optimizer, net, 0.01)
        before = net[1].weight.detach().clone()
        net(torch.randn(4, 8, device=kernels.DEVICE)).square().sum().backward()
        optimizer.step()
        assert (net[1].weight - before).norm(dim=1).max() < 0.02
        results.append([p.detach() for p in net.parameters()])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@with_kernels
@pytest.mark.parametrize("radius", [None, 0.01])
@pytest.mark.parametrize("model", ["nin", "resnet20"])
def test_steps_with_kernels_equal_those_without(monkeypatch, model, radius):
    losses, parameters, launched = [], [], []
    run = kernels._run
    monkeypatch.setattr(
        kernels, "_run", lambda kernel, *rest: (launched.append(kernel), run(kernel, *rest))
    )
    for used in (True, False):
        if not used:
            monkeypatch.setattr(kernels, "usable", lambda _: False)
        torch.manual_seed(0)
        net = build(model, (3, 20, 20), 10, width=0.1)
        net = net.to(kernels.DEVICE, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        normprop.attach_projection(optimizer, net, radius)
        normprop.scale_together(net)
        launched.clear()
        x, y = torch.randn(8, 3, 20, 20, device=kernels.DEVICE), torch.arange(8, device=kernels.DEVICE)
        for _ in range(2):
            with torch.backends.cudnn.flags(allow_tf32=False):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        parameters.append([p.detach() for p in net.parameters()])
        # A kernel each for all layers: two steps, each forward, backward, and what follows the optimizer's.
        assert len(launched) == 2 * (3 if radius is None else 4) * used
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-3)
    if radius is not None:  # without it the step is too large for rounding not to grow
        for p, q in zip(*parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
