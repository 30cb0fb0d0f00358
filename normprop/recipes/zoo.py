"""Other people's models, by name: ``torchvision:resnet18``, ``timm:resnet50``, ``my.module:factory``."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from normprop.graph.trace import guess_example
from normprop.recipes import InputError

FORMS = "expected torchvision:NAME, timm:NAME, package.module:factory or a FILE.pt"


def load_model(spec: str, classes: int | None = None) -> nn.Module:
    """The model, with random weights; nothing is downloaded.

    Args:
        spec: ``"torchvision:NAME"``, ``"timm:NAME"``, or ``"package.module:factory"``: a callable
            without arguments that returns a model (a class is fine too, and a model, of which there is a copy).
            The current folder can be imported from.
        classes: Outputs of torchvision's or timm's; None for what they have by default.

    Raises:
        InputError: If the package, the module or the name is missing, or is no model.
    """
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise InputError(f"MODEL {spec}: {FORMS}")
    options = {} if classes is None else {"num_classes": classes}
    if source == "torchvision":
        return _from_torchvision(spec, name, options)
    if source == "timm":
        return _from_timm(spec, name, options)
    return _from_code(spec, source, name)


def input_size(model: nn.Module, text: str | None, batch: int = 1) -> tuple[int, ...]:
    """Shape of one sample: as typed (``"3x224x224"``), or what the model says of itself.

    Raises:
        InputError: If the text is not such a shape, there is none and the model does not say, or ``batch``
            samples are more than 2^31 numbers.
    """
    if text is None:
        example = guess_example(model)
        if example is None:
            raise InputError("the model does not say what it reads; pass --input-size, such as 3x224x224")
        return tuple(example.shape[1:])
    try:
        size = tuple(int(number) for number in text.lower().split("x"))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise InputError(
            f"--input-size {text}: expected whole numbers above 0 joined by x, such as 3x224x224"
        )
    if batch * math.prod(size) >= 2**31:
        raise InputError(f"--input-size {text}: a batch of {batch} is more than 2^31 numbers")
    return size


def _from_torchvision(spec: str, name: str, options: dict[str, Any]) -> nn.Module:
    models = _package(spec, "torchvision").models
    _check_name(spec, name, models.list_models())
    # Some builders load a pretrained backbone unless told not to.
    known = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in known:
        options = options | {"weights_backbone": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how two of them will be initialised one day
        return models.get_model(name, weights=None, **options)


def _from_timm(spec: str, name: str, options: dict[str, Any]) -> nn.Module:
    timm = _package(spec, "timm")
    if not timm.is_model(name):
        _check_name(spec, name.split(".")[0], timm.list_models())
    return timm.create_model(name, pretrained=False, **options)


def _package(spec: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"MODEL {spec} needs {name}: pip install {name}") from error


def _from_code(spec: str, module_name: str, name: str) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for python -m
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"MODEL {spec}: {module_name} needs {error.name}") from error
        raise InputError(f"MODEL {spec}: there is no module {error.name}; {FORMS}") from error
    _check_name(spec, name, [known for known in vars(module) if not known.startswith("_")])
    factory = getattr(module, name)
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)
    if not callable(factory):
        raise InputError(f"MODEL {spec}: {name} is a {type(factory).__name__}; expected a callable")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InputError(f"MODEL {spec}: {name} cannot be called without arguments ({error})") from error
    except ValueError:  # some builtins have no signature
        pass
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"MODEL {spec}: {name}() gives a {type(model).__name__}; expected an nn.Module")
    return model


def _check_name(spec: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    raise InputError(
        f"MODEL {spec}: there is no {name}" + (f"; did you mean {', '.join(near)}?" if near else "")
    )
