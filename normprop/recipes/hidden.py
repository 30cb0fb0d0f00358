"""Statistics of hidden layers' inputs: what normalisation is meant to hold at mean 0 and variance 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop.recipes.data import ImageData

IMAGES = 1000
CHUNK = 100
UNIT = 0  # the one unit a layer that is followed through training, as in the paper's figure 2


@torch.no_grad()
def hidden_statistics(net: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Mean and variance of each unit at the input of every weight layer but the first, in eval mode.

    A unit is a channel (of a convolution's input, over images and positions) or a feature (of a
    linear layer's, over images).

    Args:
        net: The network, data end included; its mode is put back.
        x: Images, shape ``(N, C, H, W)``.

    Returns:
        One record a layer: ``layer`` (its path), ``units``, ``unit_mean`` (mean of unit 0), ``mean``
        and ``var`` (averages over the units), ``mean_error`` (average of \\|mean\\|) and ``var_error``
        (average of \\|var - 1\\|). Empty if a number is not finite.

    Example:
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)
        >>> _ = net[1].weight.copy_(torch.eye(2)), net[1].bias.zero_()
        >>> record = hidden_statistics(net, torch.tensor([[0.0, 2.0], [2.0, 2.0]]))[0]
        >>> record["layer"], record["unit_mean"], record["mean"], record["var"], record["var_error"]
        ('2', 1.0, 1.5, 0.5, 0.5)
    """
    layers = {
        name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            units = inputs[0].double().movedim(1, 0).flatten(1)
            count = torch.full_like(units[:, 0], units.shape[1])
            sums[name] = sums.get(name, 0) + torch.stack([units.sum(1), units.square().sum(1), count])

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in list(layers.items())[1:]]
    parameter = next(net.parameters())
    training = net.training
    net.eval()
    try:
        for images in x.split(CHUNK):
            images = images.to(parameter)
            net(images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    records = [_record(name, *total.cpu()) for name, total in sums.items()]
    finite = all(math.isfinite(v) for record in records for v in record.values() if isinstance(v, float))
    return records if finite else []


def _record(name: str, total: Tensor, squares: Tensor, count: Tensor) -> dict[str, Any]:
    mean = total / count
    var = (squares / count - mean.square()).clamp_min(0.0)
    values = {
        "unit_mean": mean[UNIT],
        "mean": mean.mean(),
        "var": var.mean(),
        "mean_error": mean.abs().mean(),
        "var_error": (var - 1).abs().mean(),
    }
    # Six digits: a result file is read by people too.
    return {"layer": name, "units": len(mean)} | {k: float(f"{v:.6g}") for k, v in values.items()}


def observe_hidden(net: nn.Module, data: ImageData) -> dict[str, Any]:
    """``{"hidden": hidden_statistics}`` on a thousand training images, always the same ones."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(1))[:IMAGES]
    return {"hidden": hidden_statistics(net, data.train_x[order])}
