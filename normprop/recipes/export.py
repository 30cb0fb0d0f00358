"""Whole models to files and back: saved, or exported for deployment and checked there.

A model is what :func:`normprop.recipes.zoo.load_model` reads, or a file that ``torch.save`` wrote.
Files appear whole or not at all: they are written in a folder beside their place and moved.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import normprop
from normprop.graph.reading import OURS
from normprop.recipes import InputError, writing
from normprop.recipes.zoo import load_model

FORMATS = (".onnx", ".pt2")
EXTRA = "pip install 'normprop[export]'"
LIMIT = 1e-4  # of the largest output; what normprop.fold allows in float32


class ExportError(ValueError):
    """torch cannot export the model, or the file does not compute what the model computes."""


def load(spec: str) -> nn.Module:
    """The model of ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` or of a ``.pt`` file.

    A ``.pt`` file is a pickle: reading it runs code that it holds.

    Raises:
        InputError: If there is no such model, or the file holds something else.
    """
    if not spec.endswith((".pt", ".pth")):
        return load_model(spec)
    if not Path(spec).is_file():
        raise InputError(f"MODEL {spec}: no such file")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own classes are found in the current folder, as in load_model
    try:
        model = torch.load(spec, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the code in a pickle raises
        raise InputError(f"MODEL {spec} cannot be read: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"MODEL {spec} holds a {type(model).__name__}; expected a whole model: torch.save(model, path)"
        )
    return model


def gaussian(size: Sequence[int], batch: int = 2) -> Tensor:
    """``batch`` samples of N(0, 1), the same in every run."""
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The tensors that the model returns in eval mode, one after another; its flags stay as they are."""
    flags = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return _tensors(model.eval()(*inputs))
    finally:
        for module, training in flags.items():
            module.training = training


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, in units of the largest expected value of the same output.

    Example:
        >>> relative_error([torch.tensor([1.0, 5.0])], [torch.tensor([1.0, 4.0])])
        0.25
    """
    errors = []
    for one, other in zip(actual, expected, strict=True):
        one, other = one.detach().double(), other.detach().double()
        scale = other.abs().max().clamp_min(torch.finfo(other.dtype).tiny)
        errors.append(float((one - other).abs().max() / scale))
    return next((error for error in errors if math.isnan(error)), max(errors))  # max() would lose it


def has_our_layers(model: nn.Module) -> bool:
    """Whether there is something to fold."""
    return any(type(module).__module__ in OURS for module in model.modules())


def left(model: nn.Module) -> dict[str, int]:
    """What a folded model runs: how many modules of each type, how often each function, by count.

    Example:
        >>> left(normprop.fold(nn.Sequential(normprop.NormPropLinear(8, 4))))
        {'Linear': 1, 'Threshold': 1}
    """
    names: Counter[str] = Counter()
    if not isinstance(model, fx.GraphModule):  # its parts were folded one by one
        children = list(model.children())
        for child in children:
            names.update(left(child))
        return dict(names.most_common()) if children else {type(model).__name__: 1}
    for node in model.graph.nodes:
        if node.op == "call_module":
            names[type(model.get_submodule(str(node.target))).__name__] += 1
        elif node.op == "call_function":
            names[getattr(node.target, "__name__", str(node.target))] += 1
        elif node.op == "call_method":
            names[str(node.target)] += 1
    return dict(names.most_common())


def check_target(path: Path, overwrite: bool, option: str) -> None:
    """Refuse, before any work, a path that cannot be written to.

    Raises:
        InputError: If it is a folder, or a file and ``overwrite`` is not set.
    """
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"{option} {path}: the file exists; pass --overwrite to replace it")


@contextmanager
def written_whole(path: Path, option: str) -> Iterator[Path]:
    """A path to write to; what lies there moves to ``path`` if the block succeeds, else it is removed.

    Raises:
        InputError: If nothing can be written there.
    """
    with writing(option, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".normprop-") as folder:
            yield Path(folder) / path.name
            # A large ONNX model has its weights in a second file, which must be there first.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)


def save(model: nn.Module, path: Path, option: str = "--out") -> None:
    """``torch.save(model, path)``, whole or not at all.

    Raises:
        InputError: If the model cannot be pickled, or nothing can be written there.
    """
    with written_whole(path, option) as temporary:
        try:
            torch.save(model, temporary)
        except OSError:
            raise
        except Exception as error:  # pickle has no common error: a lambda, a local class, a lock
            raise InputError(f"the model cannot be saved: {_first_line(error)}") from error


def export(
    model: nn.Module,
    path: Path,
    example: Tensor | tuple[Tensor, ...],
    dynamic_batch: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fold a model and export it; the file is read back, run, and compared with ``model.eval()``.

    Args:
        model: With normprop's layers or without; left as it is.
        path: ``*.onnx`` (ONNX, run by ONNX Runtime) or ``*.pt2`` (``torch.export.save``).
        example: An input, or a tuple of them, samples along dim 0.
        dynamic_batch: The file takes any number of samples, and is checked with 1 and 3; otherwise
            the example's, and is checked with that.
        overwrite: Replace an existing file.

    Returns:
        ``format``, ``folded``, ``dynamic_batch``, ``bytes`` and ``errors``: by number of samples, the
        difference in units of the largest output.

    Raises:
        InputError: If the path is of another kind or taken, or a package is missing.
        ExportError: If torch cannot export the model, or outputs differ by more than 1e-4 (or twice the
            model's own rounding, if that is more); there is no file then.
        normprop.TraceError: If the model cannot be folded.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"OUT {path}: expected a name that ends in {' or '.join(FORMATS)}")
    check_target(path, overwrite, "OUT")
    if path.suffix == ".onnx":
        _need_onnx()
    inputs = example if isinstance(example, tuple) else (example,)
    if dynamic_batch and len(inputs[0]) < 2:  # torch.export takes a size of 1 as fixed
        inputs = tuple(torch.cat([x, x]) for x in inputs)
    folded = has_our_layers(model)
    plain = normprop.fold(model, verify=inputs) if folded else copy.deepcopy(model).eval()
    sizes = (1, 3) if dynamic_batch else (len(inputs[0]),)
    write, run = _FORMATS[path.suffix]
    with written_whole(path, "OUT") as temporary:
        try:
            write(plain, inputs, dynamic_batch, temporary)
        except OSError:
            raise
        except Exception as error:  # torch.export has no common error
            hint = "; --no-dynamic-batch may help" if dynamic_batch else ""
            raise ExportError(
                f"torch cannot export the model: {_first_line(_cause(error))}{hint}"
            ) from error
        errors = {}
        for count in sizes:
            samples = tuple(_resized(x, count) for x in inputs)
            expected = outputs(model, *samples)
            errors[count] = relative_error(run(temporary, samples), expected)
            limit = LIMIT if errors[count] <= LIMIT else max(LIMIT, 2 * _rounding(model, samples, expected))
            if not errors[count] <= limit:
                raise ExportError(
                    f"the exported model differs from the model by {errors[count]:.2g} of the largest output "
                    f"at batch size {count} (limit {limit:.0e}); the file was removed"
                )
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return {
        "format": path.suffix[1:],
        "folded": folded,
        "dynamic_batch": dynamic_batch,
        "bytes": size,
        "errors": errors,
    }


def _rounding(model: nn.Module, inputs: tuple[Tensor, ...], rounded: Sequence[Tensor]) -> float:
    """How far a model's outputs are from what it computes in float64."""
    doubles = (x.double() if x.is_floating_point() else x for x in inputs)
    return relative_error(outputs(copy.deepcopy(model).double(), *doubles), rounded)


def _resized(x: Tensor, count: int) -> Tensor:
    """``count`` samples, all different from one another."""
    fresh = torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(1)).to(x)
    return fresh if x.is_floating_point() else x[:1].expand(count, *x.shape[1:]).clone()


def _need_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"export to .onnx needs {name}: {EXTRA}") from error


def _dynamic(inputs: tuple[Tensor, ...], dynamic_batch: bool) -> Any:
    return tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None


def _write_pt2(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, path: Path) -> None:
    program = torch.export.export(model, inputs, dynamic_shapes=_dynamic(inputs, dynamic_batch))
    torch.export.save(program, path)


def _run_pt2(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(torch.export.load(path).module()(*inputs))


def _write_onnx(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, path: Path) -> None:
    shapes = _dynamic(inputs, dynamic_batch)
    # The optimizer warns of each empty maximum (of shapes) that it leaves to ONNX Runtime.
    folder = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = folder.level
    folder.setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    finally:
        folder.setLevel(level)
    assert program is not None  # what dynamo=True promises
    program.save(path)


def _run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


_FORMATS: dict[str, tuple[Callable[..., None], Callable[..., list[Tensor]]]] = {
    ".onnx": (_write_onnx, _run_onnx),
    ".pt2": (_write_pt2, _run_pt2),
}


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _cause(error: BaseException) -> BaseException:
    """What came first: torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
