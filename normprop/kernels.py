# mypy: allow-untyped-defs
r"""Rows of any number of weights in one kernel a pass, on CUDA; :mod:`normprop.rows` is the truth.

A step of a network spends its time in convolutions; what NormProp adds are hundreds of operations on
small tensors, each of which costs more to launch than to run. Here a program is one row of one weight,
whichever layer it belongs to: a table holds the addresses of all rows, so that weights stay where
they are and are read and written in place. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # torch brings it where it brings CUDA
    triton = None

BLOCK = 1024
# Triton's interpreter works on the CPU (TRITON_INTERPRET=1).
DEVICE = "cpu" if hasattr(triton, "knobs") and triton.knobs.runtime.interpret else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(weights: Sequence[Tensor]) -> bool:
    """Whether these weights' rows can be worked on here: dense rows, plain tensors on one GPU.

    Args:
        weights: Each with its output units along dim 0.
    """
    if triton is None or not weights or weights[0].device.type != DEVICE:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    dtype, device = weights[0].dtype, weights[0].device
    return dtype in DTYPES and all(
        type(w) in (Tensor, torch.nn.Parameter) and w.dtype == dtype and w.device == device and _dense(w)
        for w in weights
    )


def readable(grads: Sequence[Tensor | None]) -> bool:
    """Whether all gradients are there, and plain tensors."""
    return torch._C._functorch.peek_interpreter_stack() is None and all(
        type(g) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(g) for g in grads
    )


def _dense(weight: Tensor) -> bool:
    """Whether each row is one stretch of memory, the rows one after another."""
    if weight.is_contiguous():
        return True
    return weight.stride(0) * len(weight) == weight.numel() and (
        (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))
        or (weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor's numbers in the order in which ``like``, which is dense, has its own in memory."""
    if tensor.stride() != like.stride() or tensor.dtype not in DTYPES:
        tensor = torch.empty_like(like).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _run(kernel, rows: int, like: Tensor, *arguments) -> None:
    """A program a row, on the device of ``like``; no row, no launch."""
    if rows:
        with torch.cuda.device_of(like):
            kernel[(rows,)](*arguments)


def join(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors' numbers, one after another."""
    return torch.cat([v.contiguous() for v in vectors]) if len(vectors) > 1 else vectors[0].contiguous()


def _part(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a joined tensor, shaped and laid out as those it stands for."""
    views, start = [], joined.storage_offset()
    for tensor in like:
        views.append(joined.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return views


@lru_cache(maxsize=64)
def _table(device: torch.device, blocks: tuple[tuple[int, int, int, int], ...]) -> Tensor:
    """Of each row its address, its start in the joined weights and its size: shape (3, rows), int64."""
    parts, start = [], 0
    for address, rows, size, itemsize in blocks:
        row = torch.arange(rows, device="cpu")
        parts.append(
            torch.stack([address + row * size * itemsize, start + row * size, torch.full_like(row, size)])
        )
        start += rows * size
    return _to_device(torch.cat(parts, 1), device)


@lru_cache(maxsize=64)
def _numbers(
    device: torch.device, numbers: tuple[tuple[float, ...], ...], counts: tuple[int, ...]
) -> Tensor:
    """Of each row its layer's numbers: shape (how many, rows), float32."""
    return _to_device(by_row(numbers, counts, torch.float32), device)


def by_row(numbers: Sequence[tuple[float, ...]], counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Each layer's numbers for each of its rows: shape (how many, rows), on the CPU."""
    layers = torch.tensor(numbers, dtype=dtype, device="cpu")
    each = [layer.expand(count, len(layer)) for layer, count in zip(layers, counts, strict=True)]
    return torch.cat(each).T.contiguous()


def _flags(device: torch.device, centered: Sequence[bool], counts: Sequence[int]) -> Tensor:
    """Of each row whether it is centred: shape (1, rows), float32."""
    return _numbers(device, tuple((float(flag),) for flag in centered), tuple(counts))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without a wait for what it does now."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def table(device: torch.device, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor:
    """Where each of ``counts[i]`` rows of tensor i lies; address 0 and size 0 where there is no tensor."""
    blocks = tuple(
        (0, count, 0, 0)
        if t is None
        else (t.data_ptr(), count, t.numel() // max(1, count), t.element_size())
        for t, count in zip(tensors, counts, strict=True)
    )
    return _table(device, blocks)


def scale(
    numbers: tuple[tuple[float, float, float, bool], ...],
    dtype: torch.dtype | None,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Forward of ``rows.scale_rows``: scaled weights, moved biases, lengths and means of all rows.

    The first two arguments are ``rows.Recipe``'s.
    """
    counts = [len(w) for w in weights]
    total, like = sum(counts), weights[0]
    scaled = like.new_empty(sum(w.numel() for w in weights), dtype=dtype or like.dtype)
    moved = like.new_empty(total if biases else 0, dtype=dtype or (biases or weights)[0].dtype)
    lengths, means = like.new_empty((2, total), dtype=torch.float32)
    _run(
        _scale, total, like, table(like.device, weights, counts), _numbers(like.device, numbers, tuple(counts)),
        join(gains), join(biases) if biases else lengths, scaled, moved, lengths, means,
        total, bool(biases), _TYPES[like.dtype], BLOCK,
    )  # fmt: skip
    return _part(scaled, weights), list(moved.split(counts)) if biases else [], lengths, means


def pull_back(
    numbers: tuple[tuple[float, float, float, bool], ...],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    lengths: Tensor,
    means: Tensor,
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    bias_dtype: torch.dtype,
) -> tuple[list[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Backward of :func:`scale`: gradients of weights, gains and biases."""
    counts = [len(w) for w in weights]
    total, like = sum(counts), weights[0]
    result = like.new_empty(sum(w.numel() for w in weights))
    dgain = gains[0].new_empty(total)
    dbias = like.new_empty(total if bias_grads else 0, dtype=bias_dtype)
    _run(
        _pull_back, total, like, table(like.device, weights, counts), _numbers(like.device, numbers, tuple(counts)),
        join([_laid_out(g, w) for g, w in zip(grads, weights, strict=True)]),
        join(bias_grads) if bias_grads else lengths, join(gains), lengths, means, result, dgain, dbias,
        total, bool(bias_grads), _TYPES[like.dtype], BLOCK,
    )  # fmt: skip
    return _part(result, weights), dgain.split(counts), dbias.split(counts) if bias_grads else []


def project_(weights: Sequence[Tensor], centered: Sequence[bool]) -> None:
    """``rows.project_rows_``."""
    like, counts = weights[0], [len(w) for w in weights]
    total, rows = sum(counts), table(like.device, weights, counts)
    _run(
        _project, total, like, rows, _flags(like.device, centered, counts), total, _TYPES[like.dtype], BLOCK
    )
    torch.autograd.graph.increment_version(weights)


class Units(NamedTuple):
    """Units of layers of one kind, where their weights, gains and biases lie, and what they were.

    Attributes:
        tensors: All of them.
        table: All rows of weights, then all gains, then all biases, see :func:`table`.
        before: Their numbers.
        centered: Of each unit whether its row is projected without its mean.
    """

    tensors: list[Tensor]
    table: Tensor
    before: Tensor
    centered: Tensor

    @staticmethod
    def now(
        layers: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
        counts: Sequence[int],
        centered: Sequence[bool],
    ) -> Units:
        """Units as they are now.

        Args:
            layers: Of each layer weight, gain and bias; None where it has none of its own.
            counts: Of each layer its units.
            centered: Of each layer whether its rows are projected without their means.
        """
        parts = [t for part in zip(*layers, strict=True) for t in part]
        tensors = [t for t in parts if t is not None]
        like, each = tensors[0], [*counts] * 3
        where = table(like.device, parts, each)
        before = like.new_empty(sum(t.numel() for t in tensors))
        _run(_copy, sum(each), like, where, before, sum(each), _TYPES[like.dtype], BLOCK)
        return Units(tensors, where, before, _flags(like.device, centered, counts))

    def restrain_(self, radius: float) -> None:
        """Updates since then scaled down to the trust region, and rows projected, see ``projection._TrustRegion``."""
        like, total = self.tensors[0], self.centered.shape[1]
        where = self.table, self.before, self.centered
        _run(_restrain, total, like, *where, radius, total, _TYPES[like.dtype], BLOCK)
        torch.autograd.graph.increment_version(self.tensors)


if triton is not None:
    _TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

    @triton.jit
    def _negligible(mean, size):
        """The length that rounding may leave of a constant row, as ``rows._negligible`` has it."""
        return tl.abs(mean) * (16 * 1.1920929e-07) * tl.sqrt(size.to(tl.float32))

    @triton.jit
    def _mean(source, size, centered, BLOCK: tl.constexpr):
        """Of a row that is centred; 0 of another, which is not read."""
        total = tl.zeros((BLOCK,), tl.float32)
        read = tl.where(centered > 0, size, 0)
        for at in range(0, read, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            total += tl.load(source + columns, mask=columns < read, other=0.0).to(tl.float32)
        return tl.sum(total) / size

    @triton.jit
    def _length(source, size, mean, BLOCK: tl.constexpr):
        """Of the row without ``mean``."""
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            x = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            x = tl.where(columns < size, x - mean, 0.0)
            total += x * x
        return tl.sqrt(tl.sum(total))

    @triton.jit
    def _project_row(source, size, centered, BLOCK: tl.constexpr):
        mean = _mean(source, size, centered, BLOCK)
        length = _length(source, size, mean, BLOCK)
        inverse = tl.where(length <= _negligible(mean, size), 0.0, length / (length * length))
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            x = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            tl.store(source + columns, (x - mean) * inverse, mask=columns < size)

    @triton.jit
    def _scale(
        rows, numbers, gains, biases, scaled, moved, lengths, means, total,
        BIASED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        source = tl.load(rows + row).to(tl.pointer_type(TYPE))
        target = scaled + tl.load(rows + total + row)
        size = tl.load(rows + 2 * total + row)
        mean = _mean(source, size, tl.load(numbers + 3 * total + row), BLOCK)
        tl.store(means + row, mean)
        length = _length(source, size, mean, BLOCK)
        length = tl.where(length <= _negligible(mean, size), 1.0, length)
        tl.store(lengths + row, length)
        factor = tl.load(numbers + row)
        by = factor * tl.load(gains + row).to(tl.float32) / length + (length - length)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            x = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            tl.store(target + columns, (x - mean) * by, mask=columns < size)
        if BIASED:
            low, tilt = tl.load(numbers + total + row), tl.load(numbers + 2 * total + row)
            tl.store(moved + row, low + tilt * tl.load(biases + row).to(tl.float32))

    @triton.jit
    def _pull_back(
        rows, numbers, grads, bias_grads, gains, lengths, means, result, dgain, dbias, total,
        BIASED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        source = tl.load(rows + row).to(tl.pointer_type(TYPE))
        start = tl.load(rows + total + row)
        size = tl.load(rows + 2 * total + row)
        dots = tl.zeros((BLOCK,), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            w = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            g = tl.load(grads + start + columns, mask=columns < size, other=0.0).to(tl.float32)
            dots += g * w
            sums += g
        mean = tl.load(means + row)
        level = tl.sum(sums) / size * tl.load(numbers + 3 * total + row)
        dot = tl.sum(dots) - level * mean * size
        length = tl.load(lengths + row)
        factor = tl.load(numbers + row)
        by = factor * tl.load(gains + row).to(tl.float32) / length + (length - length)
        radial = dot / length
        pull = radial * by / length
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            w = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            g = tl.load(grads + start + columns, mask=columns < size, other=0.0).to(tl.float32)
            tl.store(result + start + columns, (g - level) * by - (w - mean) * pull, mask=columns < size)
        tl.store(dgain + row, radial * factor)
        if BIASED:
            tilt = tl.load(numbers + 2 * total + row)
            tl.store(dbias + row, tilt * tl.load(bias_grads + row).to(tl.float32))

    @triton.jit
    def _copy(rows, target, total, TYPE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        source = tl.load(rows + row).to(tl.pointer_type(TYPE))
        start = tl.load(rows + total + row)
        size = tl.load(rows + 2 * total + row)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            x = tl.load(source + columns, mask=columns < size)
            tl.store(target + start + columns, x, mask=columns < size)

    @triton.jit
    def _project(rows, centered, total, TYPE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        source = tl.load(rows + row).to(tl.pointer_type(TYPE))
        _project_row(source, tl.load(rows + 2 * total + row), tl.load(centered + row), BLOCK)

    @triton.jit
    def _one(rows, total, row, before, TYPE: tl.constexpr):
        """Where a unit's gain or bias lies, whether it has one, what it was and what it is."""
        at = tl.load(rows + row).to(tl.pointer_type(TYPE))
        own = tl.load(rows + 2 * total + row) > 0
        old = tl.load(before + tl.load(rows + total + row), mask=own, other=0.0).to(tl.float32)
        return at, own, old, tl.load(at, mask=own, other=0.0).to(tl.float32)

    @triton.jit
    def _between(old, new, share):
        """``torch.lerp``."""
        return tl.where(share < 0.5, old + share * (new - old), new - (new - old) * (1 - share))

    @triton.jit
    def _restrain(
        rows, before, centered, radius, total,
        TYPE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        entries = 3 * total  # rows of weights, gains, biases
        source = tl.load(rows + row).to(tl.pointer_type(TYPE))
        start = tl.load(rows + entries + row)
        size = tl.load(rows + 2 * entries + row)
        gain_at, gained, gain_old, gain = _one(rows, entries, total + row, before, TYPE)
        bias_at, biased, bias_old, bias = _one(rows, entries, 2 * total + row, before, TYPE)
        squares = tl.zeros((BLOCK,), tl.float32)
        moves = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            old = tl.load(before + start + columns, mask=columns < size, other=0.0).to(tl.float32)
            new = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            squares += old * old
            moves += (new - old) * (new - old)
        length = tl.sqrt(tl.sum(squares))
        turn = tl.sqrt(tl.sum(moves)) / tl.where(length <= 0.0, 1.0, length)
        change, shift = gain - gain_old, bias - bias_old
        turn *= tl.abs(gain_old) + tl.minimum(tl.abs(change), radius, propagate_nan=tl.PropagateNan.ALL)
        moved = tl.sqrt(turn * turn + change * change + shift * shift)
        least = tl.maximum(radius, 1e-30)
        share = radius / tl.maximum(moved, least, propagate_nan=tl.PropagateNan.ALL)
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            old = tl.load(before + start + columns, mask=columns < size, other=0.0).to(tl.float32)
            new = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
            tl.store(source + columns, _between(old, new, share), mask=columns < size)
        tl.store(gain_at, _between(gain_old, gain, share), mask=gained)
        tl.store(bias_at, _between(bias_old, bias, share), mask=biased)
        tl.debug_barrier()
        _project_row(source, size, tl.load(centered + row), BLOCK)
