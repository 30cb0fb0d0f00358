"""The library's promises as checks that anyone can run on any model (README)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from normprop.data_norm import BatchDataNorm
from normprop.graph.reading import RANDOM_NAMES, is_batch_norm
from normprop.graph.trace import as_inputs
from normprop.merges import NormalizedAdd
from normprop.modules import check_model


def _prepared(model: nn.Module) -> nn.Module:
    """A copy in train mode whose modules that are random by purpose are in eval mode."""
    check_model(model)
    twin = copy.deepcopy(model).train()
    off = []
    for name, module in twin.named_modules():
        # Random by purpose, or batch-dependent by purpose: switched off, and said so.
        random = isinstance(module, (_DropoutNd, nn.RReLU, BatchDataNorm))
        random = random or (isinstance(module, NormalizedAdd) and module.drop_prob > 0)
        inside = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0
        if inside:
            module.dropout = 0.0
        elif random or type(module).__name__ in RANDOM_NAMES:
            module.eval()
        else:
            continue
        off.append(f"{name or 'model'} ({type(module).__name__})")
    if off:
        warnings.warn(f"switched off for this check: {', '.join(off)}", stacklevel=3)
    return twin


def _suspects(model: nn.Module) -> str:
    """The layers that are known to look across the batch, for the message."""
    found = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if is_batch_norm(module)
    ]
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; batch statistics in {', '.join(found[:3])}{more}"


@torch.no_grad()
def _causes(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """For the message: why outputs may differ; ``model`` as prepared, in train mode."""
    found = _suspects(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    one, other = _tensors(model(*inputs)), _tensors(model(*inputs))
    if not all(output.isfinite().all() for output in one):
        return "; the model returns NaN or infinite values"
    if found or all(map(torch.equal, one, other)):
        return found
    if changed := _changed(model, before):
        return f"; a forward pass changes the buffers {changed}"
    return (
        "; but two passes over the same data differ too: the model draws random numbers. Only modules can be "
        "switched off here, such as nn.Dropout in place of F.dropout"
    )


def _changed(model: nn.Module, before: dict[str, Tensor]) -> str:
    """The names of buffers that are not what they were."""
    return ", ".join(name for name, b in model.named_buffers() if not torch.equal(b, before[name]))


def _tolerance(dtype: torch.dtype) -> float:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype.to_real(), 2e-2)


def _inputs(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The model's inputs, checked."""
    inputs = as_inputs(x, "x")
    if len({len(one) for one in inputs}) > 1:
        raise ValueError(
            f"x needs as many samples in each input, got {', '.join(str(len(one)) for one in inputs)}"
        )
    if not all(torch.isfinite(one).all() for one in inputs if one.is_floating_point()):
        raise ValueError("x holds NaN or infinite values; the checks need finite data")
    return inputs


def _tensors(output: Any) -> list[Tensor]:
    """All that a model returns, in order; None counts as nothing."""
    found = [leaf for leaf in tree_leaves(output) if leaf is not None]
    if not found or not all(isinstance(leaf, Tensor) for leaf in found):
        other = next((type(leaf).__name__ for leaf in found if not isinstance(leaf, Tensor)), "")
        raise TypeError(
            f"among the model's outputs is {f'a {other}' if other else 'no tensor'}; these checks need a tensor, "
            "or tensors in tuples, lists and dicts"
        )
    return found


def _shapes(outputs: list[Tensor]) -> str:
    return ", ".join(f"{tuple(o.shape)} ({str(o.dtype).removeprefix('torch.')})" for o in outputs)


def _gap(actual: Tensor, expected: Tensor, among: Tensor) -> float:
    """Largest difference, relative to the largest value of all that are ``among`` them."""
    if not among.numel():
        return 0.0
    if not (among.is_floating_point() or among.is_complex()):
        actual, expected, among = actual.double(), expected.double(), among.double()
    scale = among.abs().max().clamp_min(torch.finfo(among.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def assert_batch_independent(
    model: nn.Module, x: Tensor | tuple[Tensor, ...], tolerance: float | None = None
) -> None:
    """In train mode, each sample's output is what it is when the sample comes alone.

    Equal up to kernel rounding: 1e-5 in float32, 1e-12 in float64, relative to the largest output.
    Dropout, stochastic depth and BatchDataNorm are switched off, with a warning that names them.

    Args:
        model: Any model that returns a tensor, or tensors in tuples, lists and dicts; it is copied, not
            changed.
        x: At least two samples, shape ``(N, ...)``, or a tuple of the model's inputs.
        tolerance: In place of the default.

    Raises:
        AssertionError: If a sample's output depends on the others, or the model refuses one sample.
        TypeError: If the model returns anything else than tensors.
        ValueError: If ``x`` has fewer than two samples or is not finite, or an output has no row a sample.
    """
    inputs = _inputs(x)
    count = len(inputs[0])
    if count < 2:
        raise ValueError(f"x needs at least 2 samples, got {count}")
    twin = _prepared(model)
    with torch.no_grad():
        together = _tensors(twin(*inputs))
        for index in range(count):
            try:
                outputs = twin(*(one[index : index + 1] for one in inputs))
            except Exception as error:
                raise AssertionError(
                    f"the model fails on sample {index} alone: {error}{_suspects(model)}"
                ) from error
            alone = _tensors(outputs)
            rows = {(o.shape[:1], a.shape[:1]) for o, a in zip(together, alone, strict=False)}
            if len(alone) != len(together) or rows != {((count,), (1,))}:
                raise ValueError(
                    f"the model makes an output of shape {_shapes(together)} of {count} samples and "
                    f"{_shapes(alone)} of one; expected one row a sample"
                )
            for one, every in zip(alone, together, strict=True):
                if one.shape[1:] != every.shape[1:]:
                    raise AssertionError(
                        f"sample {index}'s output depends on the rest of its batch: alone it has shape "
                        f"{tuple(one.shape)}, with {count} samples {tuple(every.shape)}"
                    )
                gap = _gap(one[0], every[index], every)
                limit = _tolerance(every.dtype) if tolerance is None else tolerance
                if not gap <= limit:
                    raise AssertionError(
                        f"sample {index}'s output depends on the rest of its batch: alone it differs by "
                        f"{gap:.2g} of the largest output (limit {limit:.0e}){_causes(twin, inputs)}"
                    )


def assert_train_equals_eval(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> None:
    """``model.train()(x)`` equals ``model.eval()(x)`` bit for bit, and no buffer changes.

    Dropout, stochastic depth and BatchDataNorm are switched off, with a warning that names them.

    Args:
        model: Any model that returns a tensor, or tensors in tuples, lists and dicts; it is copied, not
            changed.
        x: Shape ``(N, ...)``, or a tuple of the model's inputs.

    Raises:
        AssertionError: If outputs differ in any bit, or a forward pass changes a buffer.
        TypeError: If the model returns anything else than tensors.
        ValueError: If ``x`` is not finite.
    """
    inputs = _inputs(x)
    twin = _prepared(model)
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    with torch.no_grad():
        try:
            outputs = twin(*inputs)
        except Exception as error:
            raise AssertionError(f"the model fails in train mode: {error}{_suspects(model)}") from error
        trained = _tensors(outputs)
        changed = _changed(twin, buffers)
        evaluated = _tensors(copy.deepcopy(twin).eval()(*inputs))
    if [(o.shape, o.dtype) for o in trained] != [(o.shape, o.dtype) for o in evaluated]:
        raise AssertionError(
            f"train() returns an output of shape {_shapes(trained)}, eval() of {_shapes(evaluated)}"
        )
    for one, other in zip(trained, evaluated, strict=True):
        if not torch.equal(one, other):
            raise AssertionError(
                f"train() and eval() differ by {_gap(one, other, other):.2g} of the largest output"
                f"{_causes(twin, inputs)}"
            )
    if changed:
        raise AssertionError(f"a forward pass changes the buffers {changed}{_suspects(model)}")


def assert_accumulation_equals_batch(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    y: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    micro_batch: int = 1,
    tolerance: float | None = None,
) -> None:
    """The gradient summed over micro-batches is the gradient of the whole batch.

    Args:
        model: Any model; it is copied, not changed.
        x: Shape ``(N, ...)``, or a tuple of the model's inputs.
        y: Targets, N of them.
        loss: ``loss(output, target)``, the mean over samples, such as ``F.cross_entropy``.
        micro_batch: Samples in a micro-batch.
        tolerance: In place of 1e-5 (float32) or 1e-12 (float64), relative to each parameter's
            largest gradient (or a tenth of the model's largest, if that is more).

    Raises:
        AssertionError: If a parameter's gradients differ, or the model refuses a micro-batch.
        ValueError: If ``x`` is not finite or all one micro-batch, ``micro_batch`` is below 1, or nothing is
            trainable, or the loss is a sum.
    """
    check_model(model)
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    inputs = _inputs(x)
    count = len(inputs[0])
    if count <= micro_batch or len(y) != count:
        raise ValueError(
            f"x needs more samples than micro_batch={micro_batch} and y as many, got {count} and {len(y)}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameter")
    whole = _prepared(model)
    parts = copy.deepcopy(whole)
    output = whole(*inputs)
    value = loss(output, y)
    if isinstance(output, Tensor):
        twice = loss(torch.cat([output, output]).detach(), torch.cat([y, y])).detach()
        if torch.isclose(twice, 2 * value.detach(), rtol=1e-3) and not torch.isclose(twice, value.detach()):
            raise ValueError(
                "loss is a sum over samples; expected their mean, as reduction='mean' gives it"
            )
    value.backward()
    for *a, b in zip(*(one.split(micro_batch) for one in (*inputs, y)), strict=True):
        try:
            (loss(parts(*a), b) * (len(b) / count)).backward()
        except Exception as error:
            raise AssertionError(
                f"the model fails on a micro-batch of {len(b)}: {error}{_suspects(model)}"
            ) from error
    largest = max(
        (float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None), default=0.0
    )
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if p.grad is None and q.grad is None:
            continue
        assert p.grad is not None
        assert q.grad is not None
        limit = _tolerance(p.dtype) if tolerance is None else tolerance
        # Gradients that are 0 but for rounding (a bias before an InstanceNorm) are measured against
        # the model's largest: in float32 their noise is about 1e-7 of it.
        scale = max(float(p.grad.abs().max()), 0.1 * largest) or 1.0
        gap = float((p.grad - q.grad).abs().max()) / scale
        if not gap <= limit:
            raise AssertionError(
                f"{name}: {count} samples in micro-batches of {micro_batch} give a gradient that "
                f"differs from the whole batch's by {gap:.2g} of its largest entry "
                f"(limit {limit:.0e}){_suspects(model)}"
            )
