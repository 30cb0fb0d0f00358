"""The recipe models: one definition each, the norm is an argument.

NormProp takes the place of three things at once, the layer, its norm and its activation; so a model
is written in terms of :class:`Blocks`, which builds that triple for every norm.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import weight_norm

import normprop
from normprop import NormRule
from normprop.activations import as_module, names
from normprop.graph.reading import is_batch_norm
from normprop.recipes import InputError, check_choice, first_line
from normprop.recipes.zoo import load_model

COLORS = {
    "normprop": "#d1495b",
    "batch": "#00798c",
    "group": "#edae49",
    "layer": "#66a182",
    "weight": "#8d6a9f",
    "none": "#7a7a7a",
}
NORMS = tuple(COLORS)


def check_norms(norms: Sequence[str]) -> None:
    """Raise :class:`InputError` at the first name that is not in :data:`NORMS`, or comes again."""
    for norm in norms:
        if norm not in NORMS:
            raise InputError(f"--norms {norm}: expected some of {', '.join(NORMS)}")
    if len(set(norms)) < len(norms):
        raise InputError(f"--norms {','.join(norms)}: one is named twice")


class Blocks:
    """Builds convolution + norm + activation for one norm.

    Args:
        norm: One of :data:`NORMS`.
        rule: For ``"normprop"``.
        activation: A name from ``normprop.moments``' table.
    """

    def __init__(self, norm: str, rule: NormRule, activation: str = "relu") -> None:
        self.norm, self.rule, self.activation = norm, rule, activation

    def phi(self) -> nn.Module:
        """The activation as a module of its own; what it works on is the norm's output, read by nobody else."""
        return nn.ReLU(inplace=True) if self.activation == "relu" else as_module(self.activation)

    def conv(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        *,
        first: bool = False,
        activation: bool = True,
    ) -> nn.Module:
        """phi(norm(conv)); ``activation=False``: a linear map without norm, for outputs and branch ends."""
        if self.norm == "normprop":
            return normprop.NormPropConv2d(
                channels,
                out,
                kernel,
                stride,
                padding,
                activation=self.activation if activation else None,
                rule=self.rule.at(channels * kernel**2, first),
            )
        bias = not (activation and self.norm in ("batch", "group", "layer"))
        return self._wrap(nn.Conv2d(channels, out, kernel, stride, padding, bias=bias), out, activation)

    def linear(self, features: int, out: int, *, first: bool = False, activation: bool = True) -> nn.Module:
        """phi(norm(linear)); ``activation=False``: the output layer."""
        if self.norm == "normprop":
            return normprop.NormPropLinear(
                features,
                out,
                activation=self.activation if activation else None,
                rule=self.rule.at(features, first),
            )
        bias = not (activation and self.norm in ("batch", "group", "layer"))
        return self._wrap(nn.Linear(features, out, bias=bias), out, activation, nn.BatchNorm1d)

    def _wrap(
        self,
        layer: nn.Conv2d | nn.Linear,
        channels: int,
        activation: bool,
        batch_norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> nn.Module:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if not activation:
            return layer
        if self.norm == "weight":
            weight_norm(layer)
        return nn.Sequential(layer, *self._norm_layers(channels, batch_norm), self.phi())

    def _norm_layers(
        self, channels: int, batch_norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> list[nn.Module]:
        if self.norm == "batch":
            return [batch_norm(channels)]
        if self.norm == "group":
            return [nn.GroupNorm(math.gcd(32, channels), channels)]
        if self.norm == "layer":
            return [nn.GroupNorm(1, channels)]
        return []

    def activate(self, channels: int) -> nn.Module:
        """norm and activation of a residual trunk, which no layer comes right before."""
        if self.norm == "normprop":
            return normprop.NormalizedActivation(self.activation, rule=self.rule)
        return nn.Sequential(*self._norm_layers(channels), as_module(self.activation))

    def add(self, blocks: int, projection: bool) -> nn.Module:
        """The residual sum; NormProp keeps its variance (docs/method.md, section 6)."""
        if self.norm != "normprop":
            return Sum()
        return normprop.NormalizedAdd() if projection else normprop.NormalizedAdd.residual(blocks)


class Sum(nn.Module):
    """Plain residual sum."""

    def forward(self, trunk: Tensor, branch: Tensor) -> Tensor:
        return trunk + branch


class ResidualBlock(nn.Module):
    """Pre-activation block (He et al. 2016): act, conv, act, conv, add."""

    def __init__(self, make: Blocks, channels: int, out: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.activate = make.activate(channels)
        self.conv1 = make.conv(channels, out, 3, stride, 1)
        self.conv2 = make.conv(out, out, 3, 1, 1, activation=False)
        projection = stride != 1 or channels != out
        self.shortcut = make.conv(channels, out, 1, stride, activation=False) if projection else None
        self.add = make.add(blocks, projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(x)
        trunk = x if self.shortcut is None else self.shortcut(y)
        return self.add(trunk, self.conv2(self.conv1(y)))


def _width(channels: int, factor: float) -> int:
    return max(1, round(channels * factor))


def mlp(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """Two hidden layers of 256."""
    hidden = _width(256, width)
    return nn.Sequential(
        nn.Flatten(),
        make.linear(math.prod(shape), hidden, first=True),
        make.linear(hidden, hidden),
        make.linear(hidden, classes, activation=False),
    )


def cnn(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """A small network: four 3x3 convolutions, two average pools (a maximum shifts the mean), one hidden layer."""
    a, b, hidden = (_width(c, width) for c in (16, 32, 64))
    height, wide = shape[1] // 4, shape[2] // 4
    if min(height, wide) < 1:
        raise InputError(f"--model cnn needs images of at least 4x4, got {shape[1]}x{shape[2]}")
    return nn.Sequential(
        make.conv(shape[0], a, 3, padding=1, first=True),
        make.conv(a, a, 3, padding=1),
        nn.AvgPool2d(2),
        make.conv(a, b, 3, padding=1),
        make.conv(b, b, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        make.linear(b * height * wide, hidden),
        make.linear(hidden, classes, activation=False),
    )


def nin(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """The paper's Network in Network (Arpit et al. 2016, sec. 5), pads as printed there.

    C(192,5,1,2) C(160,1) C(96,1)... in the paper's order: nine convolutions, two pools, and the mean
    over positions. Maps of a 32x32 image: 32, 32, 16, 16, 16, 8, 4, 8, 8.
    """
    a, b, c = (_width(channels, width) for channels in (192, 160, 96))
    if min(shape[1:]) < 18:
        raise InputError(
            f"--model nin needs images of at least 18x18, got {shape[1]}x{shape[2]}; use --model cnn"
        )
    return nn.Sequential(
        make.conv(shape[0], a, 5, padding=2, first=True),
        make.conv(a, b, 1),
        nn.MaxPool2d(3, 2, 1),
        make.conv(b, c, 1),
        make.conv(c, a, 5, padding=2),
        make.conv(a, a, 1),
        # Padded apart: older releases of torch backpropagate wrongly through a padded average pool
        # in channels_last on CUDA (pytorch/pytorch#188344).
        nn.ZeroPad2d(1),
        nn.AvgPool2d(3, 2),
        make.conv(a, a, 1),
        make.conv(a, a, 5),
        make.conv(a, a, 1, padding=2),
        make.conv(a, classes, 1, activation=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _resnet(
    shape: tuple[int, int, int], classes: int, make: Blocks, widths: list[int], depth: int
) -> nn.Module:
    """Pre-activation ResNet for small images: a 3x3 stem, stages of ``depth`` blocks."""
    total = depth * len(widths)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = make.conv(shape[0], widths[0], 3, 1, 1, first=True, activation=False)
    channels = widths[0]
    for stage, out in enumerate(widths):
        blocks = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(ResidualBlock(make, channels, out, stride, total))
            channels = out
        layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    layers["activate"] = make.activate(channels)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = make.linear(channels, classes, activation=False)
    return nn.Sequential(layers)


def resnet20(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """Three stages of three blocks, 16 to 64 channels."""
    return _resnet(shape, classes, make, [_width(c, width) for c in (16, 32, 64)], 3)


def resnet18(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """Four stages of two blocks, 64 to 512 channels."""
    return _resnet(shape, classes, make, [_width(c, width) for c in (64, 128, 256, 512)], 2)


def resnet110(shape: tuple[int, int, int], classes: int, make: Blocks, width: float) -> nn.Module:
    """Three stages of eighteen blocks, 16 to 64 channels: 108 convolutions between stem and output."""
    return _resnet(shape, classes, make, [_width(c, width) for c in (16, 32, 64)], 18)


MODELS: dict[str, Callable[[tuple[int, int, int], int, Blocks, float], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "nin": nin,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet110": resnet110,
}


def build(
    model: str,
    shape: tuple[int, int, int],
    classes: int,
    norm: str = "normprop",
    rule: NormRule = normprop.RECOMMENDED,
    width: float = 1.0,
    activation: str = "relu",
) -> nn.Module:
    """A recipe model, or :func:`library_model`.

    Args:
        model: One of :data:`MODELS`, or ``"torchvision:NAME"``, ``"timm:NAME"``, ``"package.module:factory"``.
        shape: (C, H, W) of one image.
        classes: Number of outputs.
        norm: One of :data:`NORMS`.
        rule: For ``norm="normprop"``.
        width: Factor on every number of hidden channels.
        activation: Of all hidden layers; one of ``normprop.activations.names()``.

    Returns:
        A module from ``(N, C, H, W)`` to ``(N, classes)``.

    Raises:
        InputError: For an unknown name, a width that is not above 0, images that are too small, or what
            :func:`library_model` refuses.

    Example:
        >>> build("cnn", (1, 8, 8), 10)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """
    if ":" in model:
        return library_model(model, shape, classes, norm, rule, width, activation)
    check_choice("--model", model, (*MODELS, "torchvision:NAME", "timm:NAME", "package.module:factory"))
    check_choice("--norm", norm, NORMS)
    check_choice("--activation", activation, names())
    if not 0 < width <= 100:
        raise InputError(f"--width {width}: expected a number above 0, at most 100")
    return MODELS[model](shape, classes, Blocks(norm, rule, activation), width)


def library_model(
    model: str,
    shape: tuple[int, int, int],
    classes: int | None,
    norm: str,
    rule: NormRule,
    width: float = 1.0,
    activation: str = "relu",
) -> nn.Module:
    """Another library's image classifier: as it is (``"batch"``), bare (``"none"``), or converted (``"normprop"``).

    Args:
        model: As :func:`normprop.recipes.zoo.load_model` takes it.
        shape: (C, H, W) of one image.
        classes: Number of outputs, asked of torchvision's and timm's; None for any number.
        norm: ``"batch"``, ``"none"`` or ``"normprop"``.
        rule: For ``"normprop"``.
        width: 1; the model has its own.
        activation: ``"relu"``; the model has its own.

    Raises:
        InputError: For an unknown model, another norm, width or activation, images that the model cannot read,
            other outputs than ``(N, classes)``, or BatchNorm layers that cannot be converted, or none.
    """
    if (width, activation) != (1.0, "relu"):
        raise InputError(
            f"--model {model} has its own width and activation; leave --width and --activation out"
        )
    if norm not in ("normprop", "batch", "none"):
        raise InputError(f"{model} can be had with the norms normprop, batch and none, got {norm}")
    try:
        source = load_model(model, classes).train()
        weight = next(source.parameters())
        x = torch.zeros(2, *shape, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            output = copy.deepcopy(source)(x.contiguous(memory_format=torch.channels_last))
    except InputError:
        raise
    except Exception as error:  # the model's code meets what it was not made for
        size = "x".join(map(str, shape))
        raise InputError(f"--model {model} fails on images of {size}: {first_line(error)}") from error
    if not isinstance(output, Tensor):
        raise InputError(
            f"--model {model} returns a {type(output).__name__} in training; expected one tensor"
        )
    if classes is not None and output.shape != (2, classes):
        raise InputError(
            f"--model {model} returns shape {tuple(output.shape)} for 2 images; expected (2, {classes})"
        )
    if norm != "normprop":
        return source if norm == "batch" else without_norm(source)
    try:
        conversion = normprop.convert(
            source, rule, strict=True, example=torch.empty(1, *shape, device="meta")
        )
    except ValueError as error:
        raise InputError(f"--model {model}: {'; '.join(str(error).splitlines())}") from error
    if not conversion.replaced:
        raise InputError(
            f"--model {model} has no BatchNorm to convert; train it with --norm batch, as it is"
        )
    return conversion.model


def without_norm(model: nn.Module) -> nn.Module:
    """A copy without BatchNorm (its own activation stays, if it has one), each weight layer with a bias."""
    bare = copy.deepcopy(model)
    for name, module in list(bare.named_modules()):
        if is_batch_norm(module):
            bare.set_submodule(name, getattr(module, "act", None) or nn.Identity())
        elif isinstance(module, (_ConvNd, nn.Linear)) and module.bias is None:
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))
    return bare
