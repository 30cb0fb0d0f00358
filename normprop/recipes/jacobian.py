"""The paper's theory (sec. 3) in numbers, at random weights: Jacobians, depth, canonical error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from rich import box
from rich.table import Table
from torch import Tensor

import normprop
from normprop.diagnostics import coherence, off_diagonal_norm
from normprop.recipes import Row

SEEDS = 3
FEATURES = 256
DEPTH = 50
SAMPLES = 512
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
RULES = {
    "gain 1/1.21": normprop.PAPER,
    "gain 1": normprop.NormRule(gain=1.0),
    "gain 1, centred rows": normprop.NormRule(centered=True, gain=1.0),
}


def measure_jacobian(protocol: str, device: str, report: Callable[[str], None]) -> list[Row]:
    """Three measurements, each for three seeds; both protocols are the same.

    Args:
        protocol: Not used: it is cheap.
        device: ``"cpu"`` or ``"cuda"``.
        report: Told what is going on.

    Returns:
        Rows with ``part``, ``seed`` and

        - ``"singular values"``: ``values`` of one layer's Jacobian at one input (``kind`` "one input"),
          and the roots of the eigenvalues of the mean of :math:`J J^T` over inputs ("mean over
          inputs"), their ``rms``, and ``expected``, 1.2112 for ReLU. ``fan_in`` as given;
        - ``"depth"``: ``label`` (gain), ``signal`` (std of each layer's output) and ``gradient`` (norm
          of the gradient there, 1 at the last layer);
        - ``"bound"``: ``width``, ``fan_in``, ``bound`` (Prop. 1) and ``actual``.
    """
    rows: list[Row] = []
    for seed in range(SEEDS):
        report(f"seed {seed}")
        with torch.device(device):
            for fan_in in (FEATURES, 16 * FEATURES):
                rows += spectra(FEATURES, fan_in, seed)
            rows += [depth(label, rule, seed) for label, rule in RULES.items()]
            rows += [bound(width, times * width, seed) for times in (1, 9) for width in WIDTHS]
    return rows


def _numbers(values: Sequence[float] | Tensor) -> list[float]:
    return [float(f"{float(value):.5g}") for value in values]


def spectra(width: int, fan_in: int, seed: int) -> list[Row]:
    r"""Singular values of :math:`J = \mathrm{diag}(\varphi'(z)) W / std` of a ReLU layer with gain 1.

    Source: Arpit et al. (ICML 2016), sec. 3: the mean of :math:`J J^T` is about 1.47 I, so that the
    singular values are about 1.21.

    Args:
        width: Units.
        fan_in: Inputs, independent N(0, 1).
        seed: Of weights and inputs.

    Returns:
        Two rows, see :func:`measure_jacobian`.
    """
    torch.manual_seed(seed)
    layer = normprop.NormPropLinear(fan_in, width, rule=normprop.NormRule(gain=1.0)).double()
    weight = layer.weight.detach()
    z = torch.randn(SAMPLES, fan_in, dtype=torch.float64) @ weight.T
    slope = (z > 0).double() / normprop.moments("relu").std
    one = torch.linalg.svdvals(slope[0][:, None] * weight)
    one = torch.where(one < 1e-9, 0.0, one)  # of the units that are off
    mean = (slope.T @ slope / SAMPLES) * (weight @ weight.T)
    average = torch.linalg.eigvalsh(mean).clamp_min(0.0).sqrt()
    shared = {"part": "singular values", "seed": seed, "width": width, "fan_in": fan_in}
    return [
        shared
        | {
            "kind": kind,
            "values": _numbers(values.sort().values),
            "rms": float(values.square().mean().sqrt()),
            "expected": normprop.moments("relu").jacobian,
        }
        for kind, values in (("one input", one), ("mean over inputs", average))
    ]


def depth(label: str, rule: normprop.NormRule, seed: int) -> Row:
    """Std of the signal and norm of the gradient at each layer's output of a deep ReLU network.

    Args:
        label: Of the rule.
        rule: Of all layers.
        seed: Of weights, inputs and the gradient at the end.
    """
    torch.manual_seed(seed)
    layers = [
        normprop.NormPropLinear(FEATURES, FEATURES, rule=rule.at(FEATURES, first=index == 0))
        for index in range(DEPTH)
    ]
    outputs = [torch.randn(SAMPLES, FEATURES)]
    for layer in layers:
        outputs.append(layer(outputs[-1]))
        outputs[-1].retain_grad()
    outputs[-1].backward(torch.randn(SAMPLES, FEATURES))
    gradients = torch.stack([output.grad.norm() for output in outputs[1:] if output.grad is not None])
    return {
        "part": "depth",
        "seed": seed,
        "label": label,
        "width": FEATURES,
        "signal": _numbers([float(output.detach().std()) for output in outputs[1:]]),
        "gradient": _numbers(gradients / gradients[-1]),
    }


def bound(width: int, fan_in: int, seed: int) -> Row:
    r"""The canonical error bound of a random layer with unit rows, and what it bounds.

    .. math:: \lVert W W^T - \mathrm{diag}\rVert_F \le \mu \sqrt{\textstyle\sum_{i \ne j} 1}
        = \mu \sqrt{m (m - 1)}

    Source: Arpit et al. (ICML 2016), Proposition 1, for uncorrelated inputs of variance 1.

    Args:
        width: Units, m.
        fan_in: Inputs.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    weight = normprop.NormPropLinear(fan_in, width).weight.detach().double()
    gram = weight @ weight.T
    return {
        "part": "bound",
        "seed": seed,
        "width": width,
        "fan_in": fan_in,
        "bound": coherence(gram) * math.sqrt(width * (width - 1)),
        "actual": off_diagonal_norm(gram),
    }


def jacobian_findings(rows: Sequence[Row]) -> Row:
    """Means over seeds: rms singular values, signal and gradient at the ends, actual error over bound."""
    found: Row = {}
    for row in rows:
        if row["part"] == "singular values":
            name = f"rms singular value, {row['kind']}, fan-in {row['fan_in']}"
            found.setdefault(name, []).append(row["rms"])
        elif row["part"] == "depth":
            layers = len(row["signal"])
            found.setdefault(f"std of layer {layers}, {row['label']}", []).append(row["signal"][-1])
            name = f"gradient of layer 1 / layer {layers}, {row['label']}"
            found.setdefault(name, []).append(row["gradient"][0])
        else:
            name = f"actual / bound, {row['width']} units, fan-in {row['fan_in']}"
            found.setdefault(name, []).append(row["actual"] / row["bound"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def jacobian_table(rows: Sequence[Row], _: Sequence[str]) -> Table:
    """How many rows of which part; the numbers are the findings."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "rows"):
        view.add_column(column)
    for part in dict.fromkeys(row["part"] for row in rows):
        view.add_row(part, str(sum(row["part"] == part for row in rows)))
    return view
