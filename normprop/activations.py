"""The table of activations, and the moments of any of them.

A row holds what the library knows about one activation: its function, where it is not smooth, its
closed forms, and the torch module and functions that mean it. A new activation is one row. What is
not in the table (a lambda, a function, a module of the user's) is wrapped in :class:`Elementwise`,
which finds the kinks by itself.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.types import Device

from normprop import gaussian

ActivationLike = str | nn.Module | Callable[[Tensor], Tensor]  # what as_module takes


class Moments(NamedTuple):
    """What an activation does to a Gaussian (Arpit et al. 2016, eq. 12; docs/method.md, section 2).

    Attributes:
        mean: E[phi(u)], the paper's c2.
        var: Variance of phi(u).
        std: Its square root, the paper's c1.
        slope: E[phi'(u)^2].
        jacobian: ``std(u) * sqrt(slope / var)``, the factor by which the normalised activation
            stretches gradients: at least 1 (Gaussian-Poincare), 1.21117 for ReLU.
    """

    mean: Any
    var: Any
    std: Any
    slope: Any
    jacobian: Any


class ReLUSquared(nn.Module):
    """ReLU squared, ``max(z, 0)**2``, element-wise, any shape."""

    def forward(self, z: Tensor) -> Tensor:
        return relu_squared(z)


class Abs(nn.Module):
    """Absolute value, element-wise, any shape."""

    def forward(self, z: Tensor) -> Tensor:
        return z.abs()


class Erf(nn.Module):
    """The error function, element-wise, any shape."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.erf(z)


def relu_squared(z: Tensor) -> Tensor:
    """``max(z, 0)**2``."""
    return F.relu(z).square()


@dataclass(frozen=True)
class Activation:
    """One row of the table.

    Attributes:
        name: What ``activation="..."`` says.
        phi: ``phi(u, *parameters)``, element-wise.
        module: Type of the module that computes it.
        parameters: The module's attributes that ``phi``, ``kinks``, ``closed`` and
            ``negative_slope`` take, in order.
        kinks: From the parameters to the points where phi is not smooth.
        closed: ``(mean, std, *parameters) -> (mean, var, slope)``; None if it takes quadrature.
        functions: Torch functions that mean it, with default parameters.
        arguments: How the name alone is built: arguments of ``module``.
        negative_slope: From the parameters to a, for functions ``z if z > 0 else a*z`` with a in [0, 1];
            their constants are folded into weight and bias (docs/method.md, section 4).
    """

    name: str
    phi: Callable[..., Tensor]
    module: type[nn.Module]
    parameters: tuple[str, ...] = ()
    kinks: Callable[..., tuple[float, ...]] = lambda *_: ()
    closed: Callable[..., tuple[Any, Any, Any]] | None = None
    functions: tuple[Callable[..., Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    negative_slope: Callable[..., Any] | None = None

    def build(self) -> nn.Module:
        """The module with default parameters."""
        return self.module(**dict(self.arguments))


def _at_zero(*_: Any) -> tuple[float, ...]:
    return (0.0,)


def _gelu(u: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(u, approximate=approximate)


def _prelu(u: Tensor, weight: Tensor) -> Tensor:
    return torch.where(u > 0, u, weight.unsqueeze(-1) * u)


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

TABLE: tuple[Activation, ...] = (
    Activation("identity", lambda u: u, nn.Identity, closed=gaussian.identity),
    Activation(
        "relu",
        F.relu,
        nn.ReLU,
        kinks=_at_zero,
        closed=lambda m, s: gaussian.piecewise_linear(m, s, 0.0),
        functions=(F.relu, torch.relu, F.relu_, torch.relu_),
        negative_slope=lambda: 0.0,
    ),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        nn.LeakyReLU,
        ("negative_slope",),
        kinks=_at_zero,
        closed=gaussian.piecewise_linear,
        functions=(F.leaky_relu, F.leaky_relu_),
        negative_slope=lambda a: a if 0 <= a <= 1 else None,
    ),
    Activation(
        "prelu",
        _prelu,
        nn.PReLU,
        ("weight",),
        kinks=_at_zero,
        closed=gaussian.piecewise_linear,
    ),
    Activation("relu6", F.relu6, nn.ReLU6, kinks=lambda *_: (0.0, 6.0), functions=(F.relu6,)),
    Activation(
        "elu",
        F.elu,
        nn.ELU,
        ("alpha",),
        kinks=_at_zero,
        closed=gaussian.exponential_linear,
        functions=(F.elu, F.elu_),
    ),
    Activation(
        "selu",
        F.selu,
        nn.SELU,
        kinks=_at_zero,
        closed=lambda m, s: gaussian.exponential_linear(m, s, _SELU_ALPHA, 1.0, _SELU_SCALE),
        functions=(F.selu, torch.selu, F.selu_, torch.selu_),
    ),
    Activation(
        "celu",
        F.celu,
        nn.CELU,
        ("alpha",),
        kinks=_at_zero,
        closed=lambda m, s, alpha: gaussian.exponential_linear(m, s, alpha, alpha),
        functions=(F.celu, torch.celu, F.celu_, torch.celu_),
    ),
    Activation("gelu", _gelu, nn.GELU, ("approximate",), functions=(F.gelu,)),
    Activation("gelu_tanh", _gelu, nn.GELU, ("approximate",), arguments=(("approximate", "tanh"),)),
    Activation("silu", F.silu, nn.SiLU, functions=(F.silu,)),
    Activation("mish", F.mish, nn.Mish, functions=(F.mish,)),
    Activation(
        "hardswish",
        F.hardswish,
        nn.Hardswish,
        kinks=lambda: (-3.0, 3.0),
        functions=(F.hardswish,),
    ),
    Activation(
        "hardsigmoid",
        lambda u: F.relu6(u + 3) / 6,  # torch has no second derivative of F.hardsigmoid
        nn.Hardsigmoid,
        kinks=lambda: (-3.0, 3.0),
        functions=(F.hardsigmoid,),
    ),
    Activation(
        "hardtanh",
        F.hardtanh,
        nn.Hardtanh,
        ("min_val", "max_val"),
        kinks=lambda low, high: (low, high),
        functions=(F.hardtanh, F.hardtanh_),
    ),
    Activation("sigmoid", torch.sigmoid, nn.Sigmoid, functions=(torch.sigmoid, F.sigmoid)),
    Activation("logsigmoid", F.logsigmoid, nn.LogSigmoid, functions=(F.logsigmoid,)),
    Activation("tanh", torch.tanh, nn.Tanh, functions=(torch.tanh, F.tanh)),
    Activation(
        "softplus",
        F.softplus,
        nn.Softplus,
        ("beta", "threshold"),
        kinks=lambda beta, threshold: (threshold / beta, *(u / beta for u in (-20, -5, -1, 0, 1, 5))),
        functions=(F.softplus,),
    ),
    Activation("softsign", F.softsign, nn.Softsign, kinks=_at_zero, functions=(F.softsign,)),
    Activation("tanhshrink", F.tanhshrink, nn.Tanhshrink, functions=(F.tanhshrink,)),
    Activation("relu_squared", relu_squared, ReLUSquared, kinks=_at_zero, functions=(relu_squared,)),
    Activation(
        "abs",
        torch.abs,
        Abs,
        kinks=_at_zero,
        closed=lambda m, s: gaussian.piecewise_linear(m, s, -1.0),
        functions=(torch.abs,),
    ),
    Activation("erf", torch.erf, Erf, functions=(torch.erf,)),
)

_BY_NAME = {row.name: row for row in TABLE}
_BY_FUNCTION = {function: row for row in TABLE for function in row.functions}
BY_MODULE = {row.module: row for row in reversed(TABLE)}


def names() -> tuple[str, ...]:
    """The names that ``activation=`` takes, in table order."""
    return tuple(_BY_NAME)


class Elementwise(nn.Module):
    """Any element-wise callable as an activation whose kinks were found by search.

    Args:
        phi: Function from a tensor to a tensor of the same shape, or a module. Its kinks are searched once,
            with float64 tensors; its parameters, if any, are trained with the layer.

    Raises:
        TypeError: If ``phi`` is not callable or does not return a tensor.
        ValueError: If it fails on a float64 tensor, returns another shape, is random, is not
            element-wise, or is not finite on [-27, 27].
    """

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(phi):
            raise TypeError(
                f"activation must be a name, an nn.Module or a callable, got {phi!r}; "
                f"names: {', '.join(names())}"
            )
        self.phi = phi
        probe = copy.deepcopy(phi).double().cpu() if isinstance(phi, nn.Module) else phi
        _check_elementwise(probe, _label(phi))
        # Clones: an in-place function must not change the nodes.
        self.kinks = gaussian.breakpoints(lambda u: probe(u.clone()))

    def forward(self, z: Tensor) -> Tensor:
        return self.phi(z)

    def extra_repr(self) -> str:
        return "" if isinstance(self.phi, nn.Module) else _label(self.phi)

    def __deepcopy__(self, memo: dict[int, Any]) -> Elementwise:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        phi = self.__dict__.get("phi")  # a module lives in _modules, and pickles by itself
        if phi is not None:
            try:
                pickle.dumps(phi)
            except Exception as error:
                raise pickle.PicklingError(
                    f"activation {_label(phi)} cannot be pickled ({error}); define it with 'def' "
                    "at the top of a module, or pass an nn.Module; state_dict() works as it is"
                ) from None
        return self.__dict__


def _label(phi: Any) -> str:
    return getattr(phi, "__name__", None) or type(phi).__name__


def _check_elementwise(phi: Callable[[Tensor], Tensor], name: str) -> None:
    u = (
        torch.arange(-27 * 76, 27 * 76 + 1, dtype=torch.float64, device="cpu") / 76
    )  # hits 0, where poles are
    with torch.no_grad():
        try:
            y = phi(u.clone())
        except Exception as error:
            raise ValueError(
                f"activation {name} failed on a float64 tensor of shape {tuple(u.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(y, Tensor):
            raise TypeError(f"activation {name} must return a tensor, got {type(y).__name__}")
        if y.shape != u.shape:
            raise ValueError(
                f"activation {name} must be element-wise: it turned shape {tuple(u.shape)} "
                f"into {tuple(y.shape)}"
            )
        if not y.is_floating_point():
            raise TypeError(f"activation {name} must return floating point, got {y.dtype}")
        if not torch.isfinite(y).all():
            at = u[~torch.isfinite(y)][0].item()
            raise ValueError(
                f"activation {name} must be finite on [-27, 27]: {name}({at:.4g}) = "
                f"{y[~torch.isfinite(y)][0].item()}"
            )
        if not torch.equal(y, phi(u.clone())):
            raise ValueError(f"activation {name} is random: two calls on one input differ")
        some = torch.randperm(u.numel(), generator=torch.Generator("cpu").manual_seed(0), device="cpu")[
            :1009
        ]
        if not torch.allclose(phi(u[some]), y[some], rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"activation {name} must be element-wise: an element's output depends on the others"
            )


def as_module(phi: ActivationLike) -> nn.Module:
    """The module that computes ``phi``: a name, an nn.Module, a torch function or any callable.

    Raises:
        ValueError: For an unknown name, or a callable that is not an element-wise finite function.
        TypeError: For what is not callable.
    """
    if isinstance(phi, str):
        if phi not in _BY_NAME:
            raise ValueError(f"unknown activation '{phi}'; names: {', '.join(names())}")
        return _BY_NAME[phi].build()
    if isinstance(phi, type):
        raise TypeError(f"activation must be an instance: write {phi.__name__}() for {phi.__name__}")
    if isinstance(phi, nn.Module) and (isinstance(phi, Elementwise) or type(phi) in BY_MODULE):
        return phi
    try:
        row = _BY_FUNCTION.get(phi)
    except TypeError:  # unhashable callable
        row = None
    return row.build() if row else Elementwise(phi)


_PLACED: WeakKeyDictionary[nn.Module, dict[Any, nn.Module]] = WeakKeyDictionary()


def placed(module: nn.Module, device: Device, dtype: torch.dtype | None) -> nn.Module:
    """The activation itself, or a copy if what it holds has to be cast or moved: others may use it too.

    Layers on one device and of one dtype that are given one activation share its copy.
    """
    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if all(t.to(device, dtype) is t for t in held):
        return module
    copies = _PLACED.setdefault(module, {})
    if (device, dtype) not in copies:
        copies[device, dtype] = copy.deepcopy(module).to(device, dtype)
    return copies[device, dtype]


def out_of_place(module: nn.Module) -> nn.Module:
    """The activation itself, or one that writes nothing in place: for what reads a map of others."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module


def name_of(module: nn.Module) -> str:
    """How a layer's repr names its activation: ``relu``, ``LeakyReLU(negative_slope=0.2)``."""
    row = BY_MODULE.get(type(module))
    if row is not None and repr(module) == repr(row.build()):
        return row.name
    return _label(module.phi) if isinstance(module, Elementwise) else repr(module)


def plain_module(module: nn.Module) -> nn.Module:
    """The activation as torch's own module, a copy; what is not torch's is traced by torch.fx.

    Raises:
        ValueError: If torch.fx cannot trace a callable of the user's.
    """
    if type(module).__module__.startswith("torch.nn"):
        return copy.deepcopy(module)
    try:
        return fx.symbolic_trace(copy.deepcopy(module))
    except Exception as error:
        raise ValueError(
            f"activation {name_of(module)} cannot be turned into plain torch: torch.fx says "
            f"'{error}'; write it without control flow on its values, or as an nn.Module of torch.nn"
        ) from error


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether anything is called with the module's input, output or gradients."""
    return any(getattr(module, name) for name in HOOKS)


def negative_slope(module: nn.Module) -> float | None:
    """a, if the module is ``z if z > 0 else a*z`` with a constant a in [0, 1] and nobody watches it; else None."""
    row = BY_MODULE.get(type(module))
    if row is None or row.negative_slope is None or hooked(module):  # then it is called
        return None
    return row.negative_slope(*(getattr(module, name) for name in row.parameters))


def is_learned(module: nn.Module) -> bool:
    """Whether the activation has parameters, so that its constants change in training."""
    return next(module.parameters(), None) is not None


def _pieces(
    module: nn.Module,
) -> tuple[Callable[[Tensor], Tensor], tuple[float, ...], Callable[..., Any] | None]:
    """phi as a function of u alone, its kinks, and its closed form."""
    if isinstance(module, Elementwise):
        return module.phi, module.kinks, None
    row = BY_MODULE[type(module)]
    values = [getattr(module, name) for name in row.parameters]
    form = row.closed
    closed = None if form is None else (lambda mean, std: form(mean, std, *values))
    return (lambda u: row.phi(u, *values)), row.kinks(*values), closed


def exact(activation: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU; of one on the meta device a fresh one, with the parameters it starts with."""
    if any(parameter.is_meta for parameter in activation.parameters()):
        with torch.device("cpu"):
            return type(activation)().double()
    return copy.deepcopy(activation).to("cpu", torch.float64)


def of_one_variable(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """phi of a float64 vector on the CPU, with the parameters it has now; channels are averaged."""
    phi = _pieces(exact(activation))[0]
    return lambda u: phi(u).reshape(-1, u.shape[-1]).mean(0)


def mean_var(module: nn.Module, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an activation module under N(mean, std^2), differentiable.

    Args:
        module: What :func:`as_module` returned.
        mean: Any shape; with a per-channel PReLU the shape of its slopes, or one value.
        std: Broadcastable; its sign does not matter.

    Returns:
        Mean and variance, in the dtype and shape of ``mean + std``.
    """
    first, var, _ = _evaluate(module, mean, std, want_slope=False)
    return first, var


def _evaluate(
    module: nn.Module, mean: Tensor, std: Tensor, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.promote_types(mean.dtype, std.dtype)
    mean, std = torch.broadcast_tensors(mean, std)
    # A handful of numbers a channel: float64 costs nothing and leaves no cancellation.
    precise = torch.float32 if mean.device.type == "mps" else torch.float64
    mean, std = mean.to(precise), std.to(precise).abs()
    phi, kinks, closed = _pieces(module)
    if closed is not None:
        first, var, slope = closed(mean, std)
    else:
        first, var = gaussian.quadrature_mean_var(phi, mean, std, kinks)
        slope = gaussian.quadrature_slope(phi, mean, std, kinks) if want_slope else None
    return first.to(dtype), var.to(dtype), slope.to(dtype) if want_slope else None


def moments(
    phi: ActivationLike,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
) -> Moments:
    r"""Mean, variance, slope and Jacobian factor of ``phi(u)`` for u ~ N(mean, std^2).

    The constants of Normalization Propagation (Arpit et al., ICML 2016, eqs. 9 and 12): closed
    forms where they exist, else float64 quadrature split at the kinks. Absolute error below 1e-9 in float64
    for the activations of the table, 1e-6 for other callables (mean and std up to 100) that bend in
    [-27, 27] alone, and there over at least a hundredth: further out they are taken as smooth on the scale of
    std (cos is not, from a std of about 3 on), and a narrower bump, or sin(100 u), is missed or inexact.

    Args:
        phi: A name (``"relu"``), a module (``nn.LeakyReLU(0.2)``), a torch function or any
            element-wise callable.
        mean: A number, or a tensor, one value a channel.
        std: Likewise, at least 0; of a tensor the sign does not matter, as a gain's does not.

    Returns:
        :class:`Moments`: floats if mean and std are numbers and phi has no parameters, else tensors
        of the broadcast shape, differentiable in mean, std and the parameters.

    Raises:
        ValueError: If phi is unknown, not element-wise or not finite, or mean or std is a number
            that is not finite or std is below 0.
        TypeError: If phi is not callable or does not return a tensor, or mean or std is no number.

    Example:
        >>> m = moments("relu")
        >>> round(m.mean, 6), round(m.std, 6), round(m.jacobian, 5)
        (0.398942, 0.583819, 1.21117)
        >>> round(moments(lambda u: 3 * u).std, 9)
        3.0
    """
    plain = not (isinstance(mean, Tensor) or isinstance(std, Tensor))
    for label, value in (("mean", mean), ("std", std)):
        if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.is_complex()):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{label} must be a real number or a tensor of them, got {got}")
        if not isinstance(value, Tensor) and not math.isfinite(value):
            raise ValueError(f"{label} must be finite, got {value}")
    if not isinstance(std, Tensor) and std < 0:
        raise ValueError(f"std must be at least 0, got {std}")
    module = as_module(phi)
    given = [t for t in (mean, std) if isinstance(t, Tensor)]
    like: Tensor = (
        given[0] if given else next(module.parameters(), torch.zeros((), dtype=torch.float64, device="cpu"))
    )
    if not given and not is_learned(module):
        like = like.double()
    if not like.is_floating_point():
        like = like.to(torch.get_default_dtype())
    u_mean, u_std = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (mean, std))
    first, var, slope = _evaluate(module, u_mean, u_std, want_slope=True)
    assert slope is not None
    # Without spread phi is affine there, as far as u can tell: the limit of the ratio is 1.
    point = (u_std == 0) | (var == 0)
    ratio = torch.where(point, 1.0, slope / torch.where(point, 1.0, var))
    jacobian = torch.where(point, 1.0, u_std.abs() * ratio.sqrt())
    result = Moments(first, var, var.sqrt(), slope, jacobian)
    if plain and not is_learned(module):
        return Moments(*(value.item() for value in result))
    return result
