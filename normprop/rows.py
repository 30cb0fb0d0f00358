r"""Rows of weights scaled to given lengths, and biases with them: any number of layers in one node.

.. math:: v_i = \ell_i\, W_i/\lVert W_i\rVert_2, \qquad
    \text{centred: } v_i = \ell_i\, (W_i - \bar W_i)/\lVert W_i - \bar W_i\rVert_2

What has one number a row (lengths, gains, biases) is joined to one vector for all layers, so that a
model pays for it once; what has a weight's size is done in as few passes as the formula allows
(docs/method.md, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from normprop import kernels

Geometry = tuple[bool, int]  # whether stored transposed, groups

PART = 2**18  # numbers of a weight that a processor's own cache holds, with what is made of them


def geometry_of(layer: Any) -> Geometry:
    """How a layer, torch's or ours, stores its weight."""
    return bool(getattr(layer, "transposed", False)), getattr(layer, "groups", 1)


def row_view(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """``weight`` with the output units on dims 0 and 2 if transposed, on dim 0 if not.

    ``nn.ConvTranspose`` stores (in, out/groups, kernel): seen as (groups, in/groups, out/groups,
    kernel), what feeds one output unit are dims 1, 3, 4, ...; else they are dims 1, 2, ...
    """
    return weight.view(groups, len(weight) // groups, *weight.shape[1:]) if transposed else weight


def fan_in_dims(view: Tensor, transposed: bool) -> tuple[int, ...]:
    """The dims of a :func:`row_view` that feed one output unit."""
    return (1, *range(3, view.ndim)) if transposed else tuple(range(1, view.ndim))


def fan_in(weight: Tensor, transposed: bool = False, groups: int = 1) -> int:
    """How many weights feed one output unit; 0 if there is no unit."""
    units = weight.shape[1] * groups if transposed else weight.shape[0]
    return weight.numel() // units if units else 0


def row_lengths(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """Length of each output unit's row, shape (out,), in at least float32."""
    return _norm(_rows(weight, (transposed, groups))).flatten()


class _Rows(NamedTuple):
    """A weight's row view in at least float32, the dims and size of one row, and the shape of per-row numbers.

    ``slices`` are its :func:`cache_slices`, ``offset`` one number a row that is still to be subtracted, or None.
    """

    values: Tensor
    dims: tuple[int, ...]
    fan_in: int
    shape: tuple[int, ...]
    slices: Sequence[slice] = ()
    offset: Tensor | None = None


def _rows(weight: Tensor, geometry: Geometry) -> _Rows:
    view = row_view(weight, *geometry)
    if view.dtype in (torch.float16, torch.bfloat16):
        view = view.float()
    if geometry[0]:
        groups, per_group, units = view.shape[:3]
        fan_in = per_group * math.prod(view.shape[3:])
        lie = (groups, 1, units, *[1] * (view.ndim - 3))
        return _Rows(view, fan_in_dims(view, True), fan_in, lie, cache_slices(view))
    shape = view.shape
    lie = (shape[0], *[1] * (len(shape) - 1))
    return _Rows(view, tuple(range(1, len(shape))), math.prod(shape[1:]), lie, cache_slices(view))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Older compilers lose the gradient of an output that ``to`` returned as it was."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _join(vectors: Sequence[Tensor]) -> Tensor:
    """One vector of them all."""
    flat = [v if v.ndim == 1 else v.reshape(-1) for v in vectors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(vector: Tensor, rows: Sequence[_Rows], gains: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's part of a joined vector, shaped to lie along its rows."""
    parts = [vector] if len(rows) == 1 else vector.split([gain.numel() for gain in gains])
    return [part.view(r.shape) for part, r in zip(parts, rows, strict=True)]


def _means(rows: Sequence[_Rows], centered: Sequence[bool]) -> list[Tensor | None]:
    return [
        r.values.mean(r.dims, keepdim=True) if has else None for r, has in zip(rows, centered, strict=True)
    ]


def _center(rows: Sequence[_Rows], centered: Sequence[bool]) -> tuple[list[_Rows], list[Tensor | None]]:
    """Rows, the centred ones without their means; and the means, None of the others."""
    means = _means(rows, centered)
    return [r if m is None else _without(r, m) for r, m in zip(rows, means, strict=True)], means


def _without(r: _Rows, mean: Tensor) -> _Rows:
    return r._replace(offset=mean) if r.slices else r._replace(values=r.values - mean)


def cache_slices(values: Tensor) -> list[slice]:
    """Slices of a weight's first dim that a processor's cache holds; none where all is done at once.

    On a CPU fresh memory is slower than arithmetic: part by part, what several passes make stays in the
    cache. Where the work is traced, transformed or to be differentiated nothing may be written in place.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return []
    if values.numel() <= PART or values.device.type != "cpu" or len(values) == 1 or not is_plain(values):
        return []
    step = max(1, PART // values[0].numel())
    return [slice(first, first + step) for first in range(0, len(values), step)]


def _part(r: _Rows, at: slice) -> Tensor:
    return r.values[at] if r.offset is None else r.values[at] - r.offset[at]


def _norm(r: _Rows) -> Tensor:
    if r.offset is None:
        return torch.linalg.vector_norm(r.values, dim=r.dims)
    return torch.cat([torch.linalg.vector_norm(_part(r, at), dim=r.dims) for at in r.slices])


def _norms(rows: Sequence[_Rows]) -> Tensor:
    return _join([_norm(r) for r in rows])


def _times(r: _Rows, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times one number each."""
    if not r.slices:
        return _as(r.values * scale, dtype)
    result = torch.empty_like(r.values, dtype=dtype)
    for at in r.slices:
        result[at] = _part(r, at) * scale[at]
    return result


def _joined(parts: Sequence[Tensor | None], rows: Sequence[_Rows], like: Tensor) -> Tensor:
    """One number a row, 0 where there is no part."""
    each = zip(parts, rows, strict=True)
    return _join([like.new_zeros(math.prod(r.shape)) if part is None else part for part, r in each])


def _negligible(rows: Sequence[_Rows], means: Sequence[Tensor | None], norms: Tensor) -> Tensor | float:
    """The length that rounding may leave of constant rows from which their mean is subtracted."""
    if all(mean is None for mean in means):
        return 0.0
    eps = 16 * torch.finfo(norms.dtype).eps
    bounds = [
        None if m is None else m.detach() * (eps * math.sqrt(r.fan_in))
        for r, m in zip(rows, means, strict=True)
    ]
    return _joined(bounds, rows, norms).abs()


def _lengths(rows: Sequence[_Rows], means: Sequence[Tensor | None]) -> Tensor:
    """Lengths of all rows; 1 for those without direction."""
    norms = _norms(rows)
    least = _negligible(rows, means, norms)
    # A length that is no number stays so: a row must not vanish without a word.
    if isinstance(least, float):
        return torch.threshold(norms, 0.0, 1.0)
    return torch.where(norms <= least, 1.0, norms)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken (``torch.func.jvp``): forward is then plain torch."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_plain(x: Any) -> bool:
    """Whether it is a tensor of torch's own kind, and nothing is traced, compiled or transformed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() or torch._C._len_torch_dispatch_stack()
    return not (transformed or in_forward_mode())


@cache
def _direct(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same node without a ``setup_context``, for which torch binds forward's signature at every call.

    For a small layer that costs more than the layer itself; only transforms and the compiler need it.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, or its forward alone where nothing asks for a gradient or all is traced."""
    wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if torch.compiler.is_compiling():
        return function.apply(*args) if wanted else function.forward(*args)  # type: ignore[no-untyped-call]
    # Nothing may keep inference mode's tensors, whatever enable_grad says.
    if not wanted or torch.jit.is_tracing() or torch.is_inference_mode_enabled() or in_forward_mode():
        return function.forward(*args)
    if torch._C._functorch.peek_interpreter_stack() is None:
        function = _direct(function)
    return function.apply(*args)  # type: ignore[no-untyped-call]


class Numbers(NamedTuple):
    """A layer's own constants.

    Attributes:
        factor: On every length.
        low: What is added to the biases.
        tilt: What they are multiplied by before.
        centered: Remove each row's mean first.
    """

    factor: float = 1.0
    low: float = 0.0
    tilt: float = 1.0
    centered: bool = False


class Recipe(NamedTuple):
    """What is done to the layers that are scaled together.

    Attributes:
        numbers: One a layer.
        dtype: Of scaled weights and biases; None for the weights' own.
    """

    numbers: tuple[Numbers, ...]
    dtype: torch.dtype | None = None

    @property
    def centered(self) -> list[bool]:
        """Of each layer."""
        return [n.centered for n in self.numbers]


def _along(numbers: Sequence[Numbers], counts: Sequence[int], like: Tensor) -> Sequence[Any]:
    """Factor, low and tilt: numbers if all layers have the same, else vectors over all rows."""
    if all(n[:3] == numbers[0][:3] for n in numbers):
        return numbers[0][:3]
    # Fake tensors, and those of a transform's level, must not outlive it.
    make = _vectors if is_plain(like) else _vectors.__wrapped__
    return make(tuple(n[:3] for n in numbers), tuple(counts), like.device, like.dtype)


@lru_cache(maxsize=64)
def _vectors(
    numbers: tuple[tuple[float, ...], ...],
    counts: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return kernels.by_row(numbers, counts, dtype).to(device).unbind(0)


def _moved(bias: Tensor, low: Any, tilt: Any) -> Tensor:
    """``low + tilt * bias``."""
    if isinstance(low, Tensor):
        return torch.addcmul(low, tilt, bias)
    return torch.rsub(bias, low, alpha=-tilt)


def _scales(factor: Any, gain: Tensor, lengths: Tensor) -> Tensor:
    """``factor * gain / lengths``."""
    # lengths - lengths is 0, or NaN where a length overflowed: a row must not vanish without a word.
    if isinstance(factor, Tensor):
        return torch.addcdiv(lengths - lengths, gain * factor, lengths)
    return torch.addcdiv(lengths - lengths, gain, lengths, value=factor)


class _Scale(torch.autograd.Function):
    """n weights, n gains and n or 0 biases to n scaled weights, n or 0 biases, and what backward needs.

    One node in the graph, where its parts would be a dozen a layer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: Recipe, geometries: tuple[Geometry, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(geometries)
        weights, gains, biases = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        if _in_kernels(weights, geometries):
            scaled, moved, *rest = kernels.scale(*recipe, weights, gains, biases)
            return (*scaled, *moved, *rest)
        counts = [gain.numel() for gain in gains]
        rows = [_rows(w, g) for w, g in zip(weights, geometries, strict=True)]
        rows, means = _center(rows, recipe.centered)
        lengths = _lengths(rows, means)
        factor, low, tilt = _along(recipe.numbers, counts, lengths)
        scale = _scales(factor, _as(_join(gains), lengths.dtype), lengths)
        scaled = []
        for r, s, g, w in zip(rows, _split(scale, rows, gains), geometries, weights, strict=True):
            v = _times(r, s, recipe.dtype or w.dtype)
            scaled.append(v.flatten(0, 1) if g[0] else v)
        moved = []
        if biases:
            bias = _join(biases)
            bias = _as(_moved(bias, low, tilt), recipe.dtype or bias.dtype)
            moved = [bias] if n == 1 else bias.split(counts)
        return (*scaled, *moved, lengths, *(mean for mean in means if mean is not None))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, ctx.geometries, *tensors = inputs
        n = len(ctx.geometries)
        ctx.bias_dtype = tensors[-1].dtype
        ctx.set_materialize_grads(False)
        rest = output[len(tensors) - n :]
        ctx.save_for_backward(*tensors[: 2 * n], *rest)
        ctx.mark_non_differentiable(*rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        r"""With w the (centred) row, n its length, l the wanted one:
        :math:`dl = g \cdot w / n`, :math:`dw = (l/n) (g - w\,(g \cdot w)/n^2)`, centred again.

        Neither g nor w is centred by a pass of its own: with means G and S over the f elements,
        :math:`g \cdot w = g \cdot W - GS/f`, and dw gets one number a row more.
        """
        recipe: Recipe = ctx.recipe
        n, saved = len(ctx.geometries), ctx.saved_tensors
        result: list[Tensor | None] = [None] * (2 + 2 * n)
        biases = grads[n : n + len(ctx.needs_input_grad) - len(result)]
        counts = [gain.numel() for gain in saved[n : 2 * n]]
        here = [i for i in range(n) if grads[i] is not None]
        if not here:
            return (*result, *_bias_grads(recipe, biases, ctx.bias_dtype))
        weights, gains = [saved[i] for i in here], [saved[n + i] for i in here]
        numbers = tuple(recipe.numbers[i] for i in here)
        lengths = _some(saved[2 * n], counts, here)
        joined = len(saved) == 2 * n + 2 and saved[-1].ndim == 1  # the means, as kernels have them
        if joined and not torch.is_grad_enabled():
            means = _some(saved[-1], counts, here)
            given: Any = [grads[i] for i in here]
            shifted: Any = [biases[i] for i in here] if biases else []
            lone = any(biases[i] is not None for i in range(len(biases)) if i not in here)
            if not lone and kernels.readable([*given, *shifted]):
                known = numbers, weights, gains, lengths, means
                pulled_back = kernels.pull_back(*known, given, shifted, ctx.bias_dtype)
                result += [None] * len(biases)
                for first, part in zip((2, 2 + n, 2 + 2 * n), pulled_back, strict=True):
                    for i, value in zip(here, part, strict=False):
                        result[first + i] = value
                return tuple(result)
        rows = [_rows(w, ctx.geometries[i]) for i, w in zip(here, weights, strict=True)]
        centered = recipe.centered
        parts = iter(saved[-1].split(counts) if joined else saved[2 * n + 1 :])
        every: list[Any] = [next(parts) if has or joined else None for has in centered]
        each = [every[i].view(r.shape) if centered[i] else None for i, r in zip(here, rows, strict=True)]
        if torch.is_grad_enabled():  # a second derivative is wanted: what was saved has no graph
            directions, each = _center(rows, [centered[i] for i in here])
            lengths = _lengths(directions, each)
        pulled = [(grads[i], ctx.geometries[i]) for i in here]
        found = _pull_back(numbers, rows, gains, lengths, each, pulled)
        for i, dw, dg in zip(here, *found, strict=True):
            dw = dw.reshape(saved[i].shape) if ctx.geometries[i][0] else dw
            result[2 + i], result[2 + n + i] = _as(dw, saved[i].dtype), _as(dg, saved[n + i].dtype)
        return (*result, *_bias_grads(recipe, biases, ctx.bias_dtype))


def _some(vector: Tensor, counts: Sequence[int], here: Sequence[int]) -> Tensor:
    """Of a vector over all layers' rows, with so many each, the parts of these layers."""
    if len(here) == len(counts):
        return vector
    parts = vector.split(counts)
    return _join([parts[i] for i in here])


def _in_kernels(weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> bool:
    return not any(transposed for transposed, _ in geometries) and kernels.usable(weights)


def _bias_grads(recipe: Recipe, grads: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Of the biases as they were given, from those of the biases that came out."""
    here = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
    result: list[Tensor | None] = [None] * len(grads)
    if here:
        counts = [grad.numel() for _, grad in here]
        joint = _as(_join([grad for _, grad in here]), dtype)
        tilted = joint * _along([recipe.numbers[i] for i, _ in here], counts, joint)[2]
        for (i, _), part in zip(here, tilted.split(counts), strict=True):
            result[i] = part
    return result


def _pull_back(
    numbers: Sequence[Numbers],
    rows: Sequence[_Rows],
    gains: Sequence[Tensor],
    lengths: Tensor,
    means: Sequence[Tensor | None],
    grads: Sequence[tuple[Any, Geometry]],
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Gradients of weights (as rows) and gains, see ``_Scale.backward``."""
    views = [row_view(grad, *geometry) for grad, geometry in grads]
    dots, levels = zip(*map(_sums, views, rows, means), strict=True)
    counts = [gain.numel() for gain in gains]
    factor, *_ = _along(numbers, counts, lengths)
    scale = _scales(factor, _as(_join(gains), lengths.dtype), lengths)
    radial = _join(dots) / lengths
    pull = radial * scale / lengths
    each: list[Any] = [_split(scale, rows, gains), _split(pull, rows, gains)]
    if any(mean is not None for mean in means):
        shift = pull * _joined(means, rows, lengths) - scale * _joined(levels, rows, lengths)
        shifts = _split(shift, rows, gains)
        each.append([None if m is None else s for m, s in zip(means, shifts, strict=True)])
    result = [_combined(v, r, *own) for v, r, *own in zip(views, rows, *each, strict=True)]
    radial = radial * factor
    return result, [radial] if len(rows) == 1 else radial.split(counts)


def _plain_parts(grad: Tensor, r: _Rows) -> Sequence[slice]:
    """The rows' parts, if the gradient is no batch of gradients and no tensor of another kind."""
    if not r.slices:  # so while compiling, which could not follow what comes next
        return ()
    plain = type(grad) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(grad)
    return r.slices if plain else ()


def _sums(grad: Tensor, r: _Rows, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of each row the gradient's product with it, without its mean, and the gradient's mean (None if not centred)."""
    centered = mean is not None
    dots, levels = [], []
    for at in _plain_parts(grad, r) or (None,):
        g, values = (grad, r.values) if at is None else (grad[at], r.values[at])
        g = _as(g, values.dtype)
        dots.append((g * values).sum(r.dims, keepdim=centered))
        if centered:
            levels.append(g.mean(r.dims, keepdim=True))
    dot = dots[0] if len(dots) == 1 else torch.cat(dots)
    if mean is None:
        return dot, None
    level = levels[0] if len(levels) == 1 else torch.cat(levels)
    return torch.addcmul(dot, level, mean, value=-r.fan_in), level


def _combined(grad: Tensor, r: _Rows, scale: Tensor, pull: Tensor, shift: Tensor | None = None) -> Tensor:
    """``scale * grad - pull * row + shift``, with one number a row of each."""
    slices = _plain_parts(grad, r)
    if not slices:
        result = torch.addcmul(_as(grad, r.values.dtype) * scale, r.values, pull, value=-1.0)
        return result if shift is None else result.add_(shift)
    result = torch.empty_like(r.values)
    for at in slices:
        part = result[at].copy_(grad[at]).mul_(scale[at]).addcmul_(r.values[at], pull[at], value=-1.0)
        if shift is not None:
            part.add_(shift[at])
    return result


def scale_rows(
    recipe: Recipe,
    geometries: tuple[Geometry, ...],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
) -> list[tuple[Tensor, Tensor | None]]:
    """Several layers' weights and biases at once.

    Args:
        recipe: What is done to them.
        geometries: Of each weight whether it is stored transposed, and its groups.
        weights: See :func:`scaled_weight`; of one dtype, on one device.
        gains: Of one dtype.
        biases: As many as weights, or none.

    Returns:
        Of each layer the weight with row i scaled to length ``gain[i] * factor``, and
        ``low + tilt * bias``, or None without biases; the numbers are the layer's.
    """
    n = len(geometries)
    result = call(_Scale, recipe, geometries, *weights, *gains, *biases)
    return list(zip(result[:n], result[n : 2 * n] if biases else [None] * n, strict=True))


def scaled_weight(
    weight: Tensor,
    gain: Tensor,
    factor: float = 1.0,
    centered: bool = False,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    r"""``weight`` with row i scaled to length ``gain[i] * factor``.

    .. math:: \ell_i\, W_i/\lVert W_i\rVert_2, \qquad
        \text{centred: } \ell_i\, (W_i - \bar W_i)/\lVert W_i - \bar W_i\rVert_2

    Source: Arpit et al. (ICML 2016), the denominators of eqs. 9 and 11. The division is done in at
    least float32. A zero row (a constant one, if centred) counts as length 1: it stays zero, and its
    gradient is that of a plain weight.

    Args:
        weight: Shape ``(out, in/groups, *kernel)``; transposed: ``(in, out/groups, *kernel)``.
        gain: Shape ``(out,)``; the sign is kept.
        factor: On every length.
        centered: Remove each row's mean first.
        transposed: Whether the weight is stored as ``nn.ConvTranspose`` stores it.
        groups: Groups of the convolution.

    Returns:
        Same shape and dtype as ``weight``.

    Example:
        >>> scaled_weight(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 1.0]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    ((scaled, _),) = scale_rows(
        Recipe((Numbers(factor, centered=centered),)), ((transposed, groups),), [weight], [gain]
    )
    return scaled


@torch.no_grad()
def project_rows_(
    weights: Sequence[Tensor], geometries: Sequence[Geometry], centered: Sequence[bool]
) -> None:
    """Scale the rows of all weights to length 1, in place; zero rows (constant ones, if centred) become 0.

    Args:
        weights: See :func:`scaled_weight`; of one dtype, on one device.
        geometries: Of each weight whether it is stored transposed, and its groups.
        centered: Of each weight whether each row's mean is removed first.
    """
    if _in_kernels(weights, geometries):
        kernels.project_(weights, centered)
        return
    rows = [_rows(w, g) for w, g in zip(weights, geometries, strict=True)]
    means = _means(rows, centered)
    for r, mean in zip(rows, means, strict=True):
        if mean is not None:
            r.values.sub_(mean)
    norms = _norms(rows)
    # norms / norms.square() is 1 / norms, but NaN where a length overflowed.
    inverse = torch.where(norms <= _negligible(rows, means, norms), 0.0, norms / norms.square())
    sizes = [r.values.numel() // max(1, r.fan_in) for r in rows]
    for w, g, r, part in zip(weights, geometries, rows, inverse.split(sizes), strict=True):
        view = row_view(w, *g)
        if view.dtype == r.values.dtype:
            torch.mul(r.values, part.view(r.shape), out=view)
        else:
            view.copy_(r.values * part.view(r.shape))


def project_(weight: Tensor, centered: bool = False, transposed: bool = False, groups: int = 1) -> None:
    """One weight's rows to length 1, see :func:`project_rows_`; arguments as :func:`scaled_weight`."""
    project_rows_([weight], [(transposed, groups)], [centered])
