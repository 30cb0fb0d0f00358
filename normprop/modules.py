"""The layers: torch's own, with ``activation=`` and ``rule=``. They hold tensors; the maths is in functional."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.types import Device
from torch.utils.hooks import RemovableHandle

from normprop import activations, functional
from normprop.activations import ActivationLike
from normprop.functional import PAPER, RECOMMENDED, NormRule, Size


class _Activated(nn.Module):
    """A module with an activation, whose constants go with it."""

    activation: Any  # None, or what activations.as_module returns
    rule: NormRule
    gain: Any
    bias: Any
    standard: tuple[float, float] | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":  # whoever swaps ReLUs in a finished model gets the new one's constants
            value = None if value is None else activations.as_module(value)
            self.standard = functional.standard_constants(value)
        super().__setattr__(name, value)
        if name != "training":  # what nobody has set since need not be read again
            self.__dict__["_changes"] = self.__dict__.get("_changes", 0) + 1

    def mean_std(self) -> tuple[functional.Number, functional.Number]:
        """What is subtracted from the activation's output, and by what it is divided then."""
        return functional.constants(self.activation, self.rule, self.gain, self.bias, self.standard)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class NormPropLayer(_Activated):
    """What all weight layers share. Mixed in before the torch parent, which stores the weight."""

    weight: Tensor
    bias: Any  # Parameter or None; torch's parents disagree on its type
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...]
    factor: float = 1.0  # on ``W x``, where the input's std is known and not 1 (set by convert and lighten)
    initial_bias: float = 0.0
    channel_dim: int
    _parent: Callable[..., Any]

    def _finish(self, activation: ActivationLike | None, rule: NormRule, out_features: int) -> None:
        """The rest of the constructor, after the torch parent's."""
        functional.check_rule(rule)
        self.rule = rule
        phi = None if activation is None else activations.as_module(activation)
        # Set once: each time its constants are computed.
        self.activation = (
            None if phi is None else activations.placed(phi, self.weight.device, self.weight.dtype)
        )
        self.initial_gain = initial_gain(rule, phi)
        if out_features and not self.fan_in:
            raise ValueError(
                f"expected at least 1 input to each output unit, got weight {tuple(self.weight.shape)}"
            )
        if rule.centered and self.fan_in == 1:
            raise ValueError(
                "rule.centered needs at least 2 inputs to each output unit, got 1 "
                f"(weight {tuple(self.weight.shape)}, groups {self.groups}); pass "
                "rule=dataclasses.replace(rule, centered=False)"
            )
        empty = torch.empty(out_features, device=self.weight.device, dtype=self.weight.dtype)
        self.gain = nn.Parameter(empty)
        self.reset_parameters()

    @classmethod
    def from_parent(
        cls, layer: Any, activation: nn.Module | None, rule: NormRule, bias: bool = True
    ) -> Any:
        """A layer that takes over the weight (the Parameter itself) of a torch layer of the parent's kind.

        Its gain is the rule's, its bias 0; both have the weight's device, dtype and requires_grad.
        """
        new = cls(**parent_arguments(layer), bias=bias, device="meta", rule=rule, activation=None)
        new.weight = layer.weight
        new.activation = activation
        new.initial_gain = initial_gain(rule, new.activation)
        gain = new.weight.new_full((len(new.gain),), new.initial_gain)
        new.gain = nn.Parameter(gain, requires_grad=layer.weight.requires_grad)
        if bias:
            new.bias = nn.Parameter(torch.zeros_like(gain), requires_grad=layer.weight.requires_grad)
        return new.train(layer.training)

    @property
    def fan_in(self) -> int:
        """Number of weights that feed one output unit."""
        return functional.fan_in(self.weight, *functional.geometry_of(self))

    @property
    def stretch(self) -> float:
        """Factor on ``W x``; a transposed convolution spreads its taps over the stride's phases."""
        return self.factor * (math.sqrt(math.prod(self.stride)) if self.transposed else 1.0)

    def reset_parameters(self) -> None:
        """Glorot weights with rows scaled to 1, the rule's gain, bias 0 (paper, sec. 4)."""
        # The torch parent's constructor calls this first; on the meta device there is nothing to draw.
        if not hasattr(self, "gain") or self.weight.is_meta:
            return
        with torch.no_grad():
            nn.init.xavier_uniform_(self.weight)
            self.project_()
            nn.init.constant_(self.gain, self.initial_gain)
            if self.bias is not None:
                nn.init.constant_(self.bias, self.initial_bias)

    def project_(self) -> None:
        """Put the weight rows back on the unit sphere, in place; the layer's function stays."""
        functional.project_(self.weight, self.rule.centered, *functional.geometry_of(self))

    def _parameters_now(self) -> functional.Parameters:
        return functional.Parameters(
            self.weight,
            self.gain,
            self.bias,
            self.activation,
            self.rule,
            self.standard,
            functional.geometry_of(self),
            self.stretch,
        )

    def _propagate(self, linear: Any) -> Tensor:
        ready = _shared(self)
        if ready is None:
            return functional.propagate(linear, self._parameters_now(), self.channel_dim)
        return functional.applied(linear, ready, self.channel_dim)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function in torch's own modules, weights copied (timm's re-parameterisation calls it).

        Returns:
            The torch parent for ``activation=None``; for ReLU a ``Sequential`` of it and
            ``nn.Threshold`` (a ``torch.maximum`` where constants follow gain and bias); else of it, the
            activation and, unless the constants are "none", one affine map (an ``fx.GraphModule`` of a
            subtraction and a division).
        """
        layer, mean, std = self.plain()
        layer.train(self.training)
        if self.activation is None:
            return layer
        if type(self.activation) is not nn.ReLU:
            parts = _fuse_activation(self.activation, mean, std, self.channel_dim, self.weight)
        elif isinstance(low := -mean / std, float):
            parts = [nn.Threshold(low, low)]
        else:
            parts = [_affine_module([(torch.maximum, low.to(self.weight.dtype))], self.channel_dim)]
        return nn.Sequential(layer, *parts).train(self.training)

    @torch.no_grad()
    def plain(self) -> tuple[Any, functional.Number, functional.Number]:
        """The torch parent that computes what the activation is given, and the mean and std of what it makes.

        ReLU's constants are in the layer: ``(relu(z) - mean)/std = max(z/std - mean/std, -mean/std)``.
        Computed in float64.
        """
        exact = copy.deepcopy(self).cpu().double()
        mean, std = exact.mean_std()
        relu = type(exact.activation) is nn.ReLU
        scale, shift = (std, mean / std) if relu else (1.0, 0.0)
        row = (exact.rule.centered, *functional.geometry_of(exact))
        weight = functional.scaled_weight(exact.weight, exact.gain / scale, exact.stretch, *row)
        bias = None if exact.bias is None else exact.bias / scale
        if relu and not (isinstance(shift, float) and shift == 0.0):
            bias = (torch.zeros_like(exact.gain) if bias is None else bias) - shift
        layer = self._parent(
            **parent_arguments(self), bias=bias is not None, device="meta", dtype=self.weight.dtype
        )
        learns = self.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(self.weight), requires_grad=learns)
        if self.weight.ndim == 4 and self.weight.is_contiguous(memory_format=torch.channels_last):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(self.weight), requires_grad=learns)
        mean, std = (v.to(self.weight.device) if isinstance(v, Tensor) else v for v in (mean, std))
        return layer, mean, std

    def extra_repr(self) -> str:
        name = None if self.activation is None else activations.name_of(self.activation)
        return f"{super().extra_repr()}, activation={name}, rule={rule_name(self.rule)}"


class _Share(NamedTuple):
    """What one forward of a model has made ready for its layers, and the state it was made in."""

    model: nn.Module
    autocasts: Any
    grad: bool
    hooks: Any
    layers: dict[int, tuple[functional.Parameters, int | None, int, functional.Ready]]


class _Shares(threading.local):
    """The forwards under way in this thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[_Share] = []


_shares = _Shares()


def _version(layer: functional.Parameters) -> int:
    """How often the tensors were changed in place; those of inference mode do not say."""
    return sum([t._version for t in layer[:3] if t is not None and not t.is_inference()])


def _saving_hooks() -> Any:
    """What the tensors that autograd saves pass through now: checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _holds(module: NormPropLayer, layer: functional.Parameters, changes: int | None) -> bool:
    """Whether this is what the module has still, but for what is in the tensors."""
    own: dict[str, Any] = module._parameters
    if "weight" not in own:  # a replica of nn.DataParallel has plain tensors
        own = module.__dict__
    return (
        module.__dict__.get("_changes") == changes
        and own.get("weight") is layer.weight
        and own.get("gain") is layer.gain
        and own.get("bias") is layer.bias
        and module._modules.get("activation") is layer.activation
    )


def _shared(module: NormPropLayer) -> functional.Ready | None:
    """What :func:`scale_together` has made ready for this layer, if it is what the layer would make."""
    if torch.compiler.is_compiling() or not _shares.open or functional._plain:
        return None
    share = _shares.open[-1]
    found = share.layers.get(id(module))
    if found is None:
        return None
    layer, changes, version, ready = found
    # What a checkpoint recomputes has no share: its layers must save the same tensors both times.
    apart = (torch.is_grad_enabled() and not share.grad) or _saving_hooks() != share.hooks
    same = _holds(module, layer, changes) and version == _version(layer)
    return ready if same and not apart and share.autocasts == functional.autocasts() else None


class _Arranged(NamedTuple):
    """Layers, how they were arranged, and what that follows from."""

    modules: list[NormPropLayer]
    layers: list[functional.Parameters]
    changes: list[int | None]
    autocasts: Any
    states: list[Any]
    arrangement: functional.Arrangement

    @staticmethod
    def now(modules: list[NormPropLayer]) -> _Arranged:
        changes = [module.__dict__.get("_changes") for module in modules]  # before what they count is read
        layers = [module._parameters_now() for module in modules]
        states = [functional.state(layer) for layer in layers]
        return _Arranged(
            modules, layers, changes, functional.autocasts(), states, functional.Arrangement(layers)
        )

    def holds(self, modules: list[NormPropLayer]) -> bool:
        """Whether it is theirs still."""
        return (
            self.autocasts == functional.autocasts()
            and self.modules == modules
            and all(map(_holds, modules, self.layers, self.changes))
            and self.states == [functional.state(layer) for layer in self.layers]
            and all(
                module.stretch == layer.stretch for module, layer in zip(modules, self.layers, strict=True)
            )
        )


class _OpenShare:
    """A forward pre-hook that makes all layers of a model ready; it remembers how they were arranged."""

    def __init__(self) -> None:
        self.last: _Arranged | None = None

    def __reduce__(self) -> Any:
        return _OpenShare, ()  # a copy of the model has other layers

    def __call__(self, model: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or functional._plain:
            return
        modules: list[NormPropLayer] = []
        places = [model]
        while places:
            place = places.pop()
            if isinstance(place, NormPropLayer):
                modules.append(place)
            # What hooks its own forward may change its parameters there.
            places += [m for m in place._modules.values() if m is not None and not m._forward_pre_hooks]
        last = self.last  # another thread may set it
        if last is None or not last.holds(modules):
            last = _Arranged.now(modules)
            self.last = last if last.arrangement.lasting else None
        each = zip(modules, last.layers, last.changes, last.arrangement.make(), strict=True)
        made = {
            id(module): (layer, changes, _version(layer), ready) for module, layer, changes, ready in each
        }
        grad, hooks = torch.is_grad_enabled(), _saving_hooks()
        _shares.open.append(_Share(model, last.autocasts, grad, hooks, made))


def _close_share(model: nn.Module, _: Any, __: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for index, share in enumerate(_shares.open):
        if share.model is model:
            del _shares.open[index:]
            return


class Handles(NamedTuple):
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def scale_together(model: nn.Module) -> Handles:
    """From now on each forward of ``model`` scales the weights of all its NormProp layers at once.

    The same outputs and gradients, with fewer and larger operations: worth it where the maps are
    small or the GPU waits for Python. Nothing is kept between forwards. A layer that is called outside the
    model's forward, in a compiled graph or in a checkpointed part, or whose parameters change during the
    forward, scales its own weight as before.

    Args:
        model: What is called: hooks are registered on it.

    Returns:
        A handle; ``handle.remove()`` ends it. A second call on one model does nothing.

    Example:
        >>> model = nn.Sequential(NormPropLinear(3, 2), NormPropLinear(2, 2))
        >>> handle = scale_together(model)
    """
    check_model(model)
    if any(isinstance(hook, _OpenShare) for hook in model._forward_pre_hooks.values()):
        return Handles(())
    return Handles(
        (
            model.register_forward_pre_hook(_OpenShare()),
            model.register_forward_hook(_close_share, always_call=True),
        )
    )


def check_model(model: Any) -> None:
    """Raises TypeError for what is not a module."""
    if not isinstance(model, nn.Module):
        inner = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}{inner}")


def parent_arguments(layer: Any) -> dict[str, Any]:
    """What a torch weight layer's constructor was given, but for bias, device and dtype."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode"] + ["output_padding"] * layer.transposed
    return {name: getattr(layer, name) for name in names}


def rule_name(rule: NormRule) -> str:
    """``PAPER`` or ``RECOMMENDED``, else in what the rule differs from the paper's."""
    for name, known in (("PAPER", PAPER), ("RECOMMENDED", RECOMMENDED)):
        if rule == known:
            return name
    own = {f.name: getattr(rule, f.name) for f in fields(rule)}
    other = [f"{name}={value!r}" for name, value in own.items() if value != getattr(PAPER, name)]
    return f"NormRule({', '.join(other)})"


def initial_gain(rule: NormRule, activation: nn.Module | None) -> float:
    """The rule's gain as a number; 1 for ``"jacobian"`` without an activation."""
    if rule.gain != "jacobian":
        return float(rule.gain)
    if activation is None:
        return 1.0
    if activations.is_learned(activation):  # its parameters may have no values yet
        activation = activations.exact(activation)
    with torch.no_grad():
        jacobian = activations.moments(activation).jacobian
    jacobian = jacobian if isinstance(jacobian, float) else float(jacobian.mean())
    if jacobian == 0.0:
        raise ValueError(
            f"activation {activations.name_of(activation)} has slope 0: no gradient passes it, and the rule's "
            'gain "jacobian" is infinite; pass another activation'
        )
    return 1.0 / jacobian


def _affine_module(steps: Sequence[tuple[Callable[..., Tensor], Any]], dim: int) -> fx.GraphModule:
    """``function(x, value)`` one after another, as torch's own module; vectors lie along dim ``dim`` of x."""
    root = nn.Module()
    graph = fx.Graph()
    y = graph.placeholder("x")
    per_channel = any(isinstance(value, Tensor) and value.numel() > 1 for _, value in steps)
    if per_channel:
        y = graph.call_function(torch.movedim, (y, dim, -1))
    for name, (function, value) in zip("ab", steps, strict=False):
        if isinstance(value, Tensor):
            root.register_buffer(name, value.detach().clone())
            value = graph.get_attr(name)
        y = graph.call_function(function, (y, value))
    if per_channel:
        y = graph.call_function(torch.movedim, (y, -1, dim))
    graph.output(y)
    return fx.GraphModule(root, graph, "Affine")


def _fuse_activation(
    activation: nn.Module, mean: functional.Number, std: functional.Number, dim: int, like: Tensor
) -> list[nn.Module]:
    """The activation and, unless the constants are 0 and 1, its affine map."""
    parts = [activations.plain_module(activation)]
    if isinstance(mean, Tensor) or isinstance(std, Tensor) or (mean, std) != (0.0, 1.0):
        mean, std = (c.to(like.dtype) if isinstance(c, Tensor) else c for c in (mean, std))
        parts.append(_affine_module([(torch.sub, mean), (torch.div, std)], dim))
    return parts


class NormPropLinear(NormPropLayer, nn.Linear):
    r"""``nn.Linear`` whose output has mean 0 and variance 1 (Arpit et al. 2016, eq. 9; eq. 12 for any activation).

    .. math:: o = (\varphi(g\,(W x)/\lVert W_i\rVert_2 + b) - \text{mean})/\text{std}

    That is at gain g = 1, b = 0. The paper's rule, the default, starts at a gain that keeps the length of
    gradients instead, 1/1.21 for ReLU: mean -0.12, std 0.83. With ``rule=normprop.RECOMMENDED`` it is 1.

    Code that reads ``weight`` and never calls the layer gets the raw rows: ``out_proj`` of
    nn.MultiheadAttention, nn.TransformerEncoderLayer's fast path in eval mode.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether to learn an additive bias.
        device: As in torch.
        dtype: As in torch.
        activation: A name (``normprop.activations.names()``), a module (copied if it learns in another dtype
            or on another device), a torch function, any element-wise callable, or None for a linear output
            (the last layer).
        rule: Which variant, default the paper's.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``. Parameters: ``weight`` (out, in), ``gain``
        (out,), ``bias`` (out,).

    Raises:
        ValueError: For an unknown activation, or centred rows with one input.
        TypeError: If activation or rule is not what it should be.

    Example:
        >>> layer = NormPropLinear(64, 10, activation="gelu")
        >>> layer(torch.randn(1, 64)).shape
        torch.Size([1, 10])
    """

    channel_dim = -1
    _parent = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        rule: NormRule = PAPER,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._finish(activation, rule, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return self._propagate(lambda weight, bias: F.linear(input, weight, bias))


class _NormPropConv(NormPropLayer):
    """Convolutions: the torch parent's constructor plus ``activation=`` and ``rule=``."""

    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        rule: NormRule = PAPER,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._finish(activation, rule, out_channels)

    def forward(self, input: Tensor) -> Tensor:
        return self._propagate(lambda weight, bias: self._conv_forward(input, weight, bias))


class NormPropConv1d(_NormPropConv, nn.Conv1d):
    """``nn.Conv1d`` with normalised output, see :class:`NormPropConv2d`; (N, C, L) or (C, L)."""

    channel_dim = -2
    _parent = nn.Conv1d


class NormPropConv2d(_NormPropConv, nn.Conv2d):
    r"""``nn.Conv2d`` whose output has mean 0 and variance 1 (Arpit et al. 2016, eq. 11; eq. 12 for any activation).

    .. math:: o = (\varphi(g\,(W * x)/\lVert W_i\rVert_F + b) - \text{mean})/\text{std}

    The norm of filter i runs over its input channels (of its group) and the kernel; gain and bias
    are one a channel. Zero padding pads a normalised map with its mean.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: As in ``nn.Conv2d``.
        activation: See :class:`NormPropLinear`.
        rule: See :class:`NormPropLinear`.

    Shape:
        ``(N, C_in, H, W)`` or ``(C_in, H, W)``, as ``nn.Conv2d``. Parameters: ``weight``, ``gain``
        (C_out,), ``bias`` (C_out,).

    Raises:
        ValueError: For an unknown activation, or centred rows with fan-in 1.
        TypeError: If activation or rule is not what it should be.

    Example:
        >>> layer = NormPropConv2d(3, 8, 3, padding=1)
        >>> layer
        NormPropConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), activation=relu, rule=PAPER)
    """

    channel_dim = -3
    _parent = nn.Conv2d


class NormPropConv3d(_NormPropConv, nn.Conv3d):
    """``nn.Conv3d`` with normalised output, see :class:`NormPropConv2d`; (N, C, D, H, W) or (C, D, H, W)."""

    channel_dim = -4
    _parent = nn.Conv3d


class _NormPropConvTranspose(NormPropLayer):
    """Transposed convolutions: the torch parent's constructor plus ``activation=`` and ``rule=``."""

    kernel_size: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    _output_padding: Callable[..., list[int]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike | None = "relu",
        rule: NormRule = PAPER,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._finish(activation, rule, out_channels)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        spatial = len(self.kernel_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            spatial,
            self.dilation,
        )
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        convolve: Callable[..., Tensor] = transposed[spatial - 1]
        return self._propagate(
            lambda weight, bias: convolve(
                input,
                weight,
                bias,
                self.stride,
                self.padding,
                output_padding,
                self.groups,
                self.dilation,
            )
        )


class NormPropConvTranspose1d(_NormPropConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with normalised output, see :class:`NormPropConvTranspose2d`."""

    channel_dim = -2
    _parent = nn.ConvTranspose1d


class NormPropConvTranspose2d(_NormPropConvTranspose, nn.ConvTranspose2d):
    r"""``nn.ConvTranspose2d`` whose output has mean 0 and variance 1 on average over the stride's phases.

    Its weight is stored (in, out/groups, kernel); the norm of an output channel runs over the inputs
    of its group and the kernel. About kernel/stride taps an axis reach each output position, so
    ``W x`` is multiplied by sqrt(prod(stride)) (docs/method.md, section 3).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device, dtype: As in ``nn.ConvTranspose2d``.
        activation: See :class:`NormPropLinear`.
        rule: See :class:`NormPropLinear`.

    Shape:
        As ``nn.ConvTranspose2d``; ``forward`` takes ``output_size`` too. Parameters: ``weight``,
        ``gain`` (C_out,), ``bias`` (C_out,).

    Raises:
        ValueError: For an unknown activation, or centred rows with fan-in 1.
        TypeError: If activation or rule is not what it should be.
    """

    channel_dim = -3
    _parent = nn.ConvTranspose2d


class NormPropConvTranspose3d(_NormPropConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with normalised output, see :class:`NormPropConvTranspose2d`."""

    channel_dim = -4
    _parent = nn.ConvTranspose3d


class NormalizedActivation(_Activated):
    r"""``(phi(gain * x + bias) - mean) / std`` where no weight layer comes right before: after an add, a concat.

    Args:
        phi: See ``activation`` of :class:`NormPropLinear`.
        num_features: With it, gain and bias are learned, one a channel on dim 1; without, they are
            1 and 0.
        rule: Constants and initial gain.
        device: As in torch.
        dtype: As in torch.

    Shape:
        Any; with ``num_features`` ``(N, num_features, *)``.

    Raises:
        ValueError: For an unknown activation, or num_features below 1.

    Example:
        >>> NormalizedActivation("relu")(torch.zeros(1)).item()  # (0 - .39894228) / .58381937
        -0.683331...
    """

    gain: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        phi: ActivationLike,
        num_features: int | None = None,
        rule: NormRule = PAPER,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (num_features is None or (isinstance(num_features, int) and num_features >= 1)):
            raise ValueError(f"num_features must be a number of at least 1, or None, got {num_features!r}")
        functional.check_rule(rule)
        self.rule = rule
        self.num_features = num_features
        activation = activations.out_of_place(activations.as_module(phi))
        self.activation = activations.placed(activation, device, dtype)
        self.initial_gain = initial_gain(rule, activation)
        for name in ("gain", "bias"):
            value = None
            if num_features is not None:
                value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The rule's gain, bias 0."""
        if self.gain is None or self.bias is None:
            return
        nn.init.constant_(self.gain, self.initial_gain)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.mean_std()
        own = None if self.gain is None or self.bias is None else (self.gain, self.bias)
        if own is not None and (input.ndim < 2 or input.shape[1] != self.num_features):
            raise ValueError(f"expected shape (N, {self.num_features}, *), got {tuple(input.shape)}")
        return functional.normalize_activation(input, self.activation, mean, std, 1 - input.ndim, own)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function in torch's own modules: an affine map, the activation, an affine map."""
        mean, std = self.mean_std()
        parts: list[nn.Module] = []
        if self.gain is not None:
            parts.append(_affine_module([(torch.mul, self.gain), (torch.add, self.bias)], 1))
        like = next(self.parameters(), torch.empty(0))
        parts += _fuse_activation(self.activation, mean, std, 1, like)
        return nn.Sequential(*parts).train(self.training)

    def extra_repr(self) -> str:
        channels = "" if self.num_features is None else f"{self.num_features}, "
        return f"{activations.name_of(self.activation)}, {channels}rule={rule_name(self.rule)}"
