r"""``measure``: what :func:`normprop.predict` says, held against data, and what only data can say.

The model is copied, traced and run node by node. A node's statistics are taken the moment it has run,
before a later in-place operation can change its tensor (docs/method.md, section 11).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from normprop import functional
from normprop.data_norm import first_tensor
from normprop.graph import inplace, reading, trace as tracing
from normprop.graph.predict import effective, in_whole, path_of, walk
from normprop.modules import check_model
from normprop.records import Record, SignalTrace
from normprop.signal import Signal

COLUMNS = 4096  # (sample, position) pairs that a covariance is taken over
POSITIONS = 4  # of a layer's Jacobian
LARGEST_WEIGHT = 4_000_000  # beyond it no singular values and no coherence: they cost out * out * fan_in
LARGEST_OUT = 2048  # beyond it no covariance


class DataError(ValueError):
    """There is no data, it is not finite, or the model does not take it."""


def measure(model: nn.Module, data: Any, seed: int = 0) -> SignalTrace:
    """The signal through ``model`` on data, node by node, beside what :func:`normprop.predict` says.

    The gradient is that of a random scalar: each output is weighted with standard normal numbers and
    these are scaled to length 1, so that a node's number is the L2 norm of its whole gradient map.

    Args:
        model: Any model, in train or eval mode, on any device. It is not changed: a copy runs.
        data: A tensor ``(N, ...)``, a tuple of the model's input tensors, or a DataLoader or other
            iterable of batches, of which the first batch counts, and of that its first tensor.
        seed: Of the gradient's weights, of dropout, and of the positions that are sampled.

    Returns:
        :class:`SignalTrace` with ``.predicted``. Where torch.fx cannot follow the model's own code it holds the
        nodes of its parts, each part predicted from the mean and std of what it reads and from the gradient that
        it gets. Each record's ``details``:

        - ``skew``, ``kurtosis`` (excess; 0 for a Gaussian), None for a constant;
        - of activations ``dead``: share of channels that are constant over samples and positions;
        - of weight layers ``coherence``, ``singular_values``, ``error_bound``, ``error`` and
          ``error_columns`` (:func:`weight_details`).

    Raises:
        DataError: If there is no data, it is not finite, or the model does not take it (a ValueError).
        TypeError: If data is none of the above.
        TraceError: If torch.fx can follow neither the code nor any part.

    Example:
        >>> trace = measure(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(256, 64))
        >>> trace["1"].details["dead"]
        0.0
    """
    check_model(model)
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        inputs = _inputs(data)
        if len(devices) == 1:
            inputs = tuple(x.to(next(iter(devices))) for x in inputs)
        tracing.check_unwrapped(model)
        twin = tracing.copied(model)
        try:
            graph_module = tracing.trace(twin, inputs)
        except tracing.TraceError as error:
            with _refusal_told(inputs), torch.no_grad():  # is it the data's shape, or the code?
                copy.deepcopy(twin)(*inputs)
            parts = tracing.parts(twin, inputs)
            if not parts:
                raise
            found = _Parts(twin.requires_grad_(False), parts, inputs, seed).trace()
            if not len(found):
                raise
            found[0].note = f"its parts alone are shown: {error}"
            return found
        twin.requires_grad_(False)
        wanted = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        if len(inputs) > len(wanted) and not any(str(node.target).startswith("*") for node in wanted):
            raise DataError(
                f"the model takes {len(wanted)} input(s), got {len(inputs)}; "
                "of a batch (x, y) pass x alone, or the DataLoader"
            )
        run = _Run(graph_module, inputs, seed)
        backward(run.run(*inputs), seed)
        return SignalTrace(list(run.records.values()), walk(graph_module).trace())


def _inputs(data: Any) -> tuple[Tensor, ...]:
    """The model's inputs, checked."""
    expected = "expected a tensor, a tuple of input tensors, a DataLoader or another iterable of batches"
    if isinstance(data, Tensor):
        inputs: tuple[Tensor, ...] = (data,)
    elif isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data):
        inputs = data
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError("data must come in batches: measure(model, DataLoader(dataset, batch_size=256))")
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        batch = next(iter(data), None)
        if batch is None:
            raise DataError("no data: there is not one batch")
        inputs = (first_tensor(batch),)
    else:
        raise TypeError(f"{expected}, got {type(data).__name__}")
    for index, x in enumerate(inputs):
        if x.numel() == 0:
            raise DataError(f"no data: input {index} has shape {tuple(x.shape)}")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise DataError(f"input {index} holds NaN or infinite values")
    return tuple(x.detach() for x in inputs)


@contextmanager
def _refusal_told(inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """The model's own complaint, with the shapes that it was given."""
    try:
        yield
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise DataError(f"the model does not take data of shape {shapes}: {error}") from error


def backward(outputs: Any, seed: int) -> None:
    """From a random scalar of all outputs that have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    leaves = tree_leaves(outputs)
    found = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x.numel()]
    cotangents = []
    for x in found:
        c = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        cotangents.append((c / c.norm()).to(x.device, x.dtype))
    if found:
        torch.autograd.backward(found, cotangents)


class _Run(fx.Interpreter):
    """Runs the graph once, and keeps a record of every floating tensor."""

    def __init__(self, graph_module: fx.GraphModule, inputs: tuple[Tensor, ...], seed: int) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # the model's message is told as it is
        self.graph_module = graph_module
        self.inputs = inputs
        self.generator = torch.Generator().manual_seed(seed)
        self.records: dict[fx.Node, Record] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _refusal_told(self.inputs):
            value = super().run_node(n)
        if n.op not in ("output", "get_attr") and isinstance(value, Tensor) and value.is_floating_point():
            if self.is_its_input(n, value):
                value = value.clone()  # nn.Identity's output has a gradient of its own
            if not value.requires_grad:  # the input, or made of parameters alone; a clone may be written to
                value = value.detach().requires_grad_().clone()
            self._record(n, value)
        return value

    def is_its_input(self, node: fx.Node, value: Tensor) -> bool:
        """Whether a node hands on the very tensor that it got, which nobody may write to."""
        same = [source for source in node.all_input_nodes if value is self.env.get(source)]
        readers = (node, *node.users, *(user for source in same for user in source.users))
        return bool(same) and not any(
            reader.op == "output" or inplace.writes_in_place(self.graph_module, reader)
            for reader in readers
        )

    def _record(self, node: fx.Node, value: Tensor) -> None:
        module = reading.module_of(self.graph_module, node)
        record = Record(
            name=str(node),
            path=path_of(node),
            op=reading.operation_name(self.graph_module, node),
            shape=tuple(value.shape),
            **sample_moments(value.detach()),
        )
        self.records[node] = record

        def gradient(grad: Tensor) -> None:
            record.gradient = float(torch.linalg.vector_norm(grad, dtype=torch.float64))

        value.register_hook(gradient)
        source = reading.weight_source(self.graph_module, node)
        layer = None if source is None else source[1]
        phi = getattr(module, "activation", None) or reading.activation_of(node, module)
        if not isinstance(phi, (nn.Identity, type(None))):
            record.details["dead"] = dead = dead_share(value.detach(), self.channel_dim(node, layer, value))
            if dead:
                record.note = f"{100 * dead:.3g} % of the units are constant"
        if layer is not None:
            with torch.no_grad():
                x = self.env[reading.tensor_inputs(node)[0]].detach()
                z = value.detach() if module is None else pre_activation(module, x, value.detach())
                record.details |= weight_details(layer, x, z, self.generator)

    def channel_dim(self, node: fx.Node, layer: Any, value: Tensor) -> int:
        """Of the weight layer that the activation is part of or follows; else torch's habit."""
        if layer is None:
            source = reading.weight_source(self.graph_module, reading.tensor_inputs(node)[0])
            layer = None if source is None else source[1]
        if isinstance(layer, reading.WEIGHT_LAYERS):
            return channel_dim(layer)
        return 1 if value.ndim > 2 else -1


class _Parts:
    """Runs a model's own code, which calls its parts: node by node."""

    def __init__(
        self, model: nn.Module, parts: list[tracing.Part], inputs: tuple[Tensor, ...], seed: int
    ) -> None:
        self.model = model
        self.inputs = tuple(
            x.clone().requires_grad_().clone() if x.is_floating_point() else x for x in inputs
        )
        self.seed = seed
        self.parts = parts
        self.runs: list[tuple[tracing.Part, int, _Run]] = []

    def watch(self) -> None:
        """Put :meth:`run_part` in place of the parts' forward."""
        for part in self.parts:
            part.module.forward = functools.partial(self.run_part, part)

    def unwatch(self) -> None:
        for part in self.parts:
            del part.module.forward

    def run_part(self, part: tracing.Part, *args: Any, **kwargs: Any) -> Any:
        wanted = [n for n in part.graph_module.graph.nodes if n.op == "placeholder"]
        as_traced = [reading.shape(n) for n in wanted] == [getattr(x, "shape", None) for x in args]
        self.unwatch()  # it may call modules that are parts elsewhere
        try:
            if kwargs or not as_traced:
                return part.module.forward(*args, **kwargs)
            call = sum(other is part for other, _, _ in self.runs)
            run = _Run(part.graph_module, args, self.seed)
            self.runs.append((part, call, run))
            # Under other names, whose gradients are those of this part alone.
            return run.run(*(x.view_as(x) for x in args))
        finally:
            self.watch()

    def trace(self) -> SignalTrace:
        self.watch()
        try:
            with _refusal_told(self.inputs):
                outputs = self.model(*self.inputs)
        finally:
            self.unwatch()
        backward(outputs, self.seed)
        measured, predicted = [], []
        for part, call, run in self.runs:
            read = [r for node, r in run.records.items() if node.op == "placeholder"]
            given = [Signal.gaussian(r.mean, r.std) for r in read]
            walked = walk(part.graph_module, given, whole=False).trace()
            ends = part.graph_module.graph.output_node().all_input_nodes
            gradient = next((run.records[end].gradient for end in ends if end in run.records), None)
            for record in walked:
                if record.gradient is not None:
                    record.gradient = None if gradient is None else record.gradient * gradient
            measured += [in_whole(part, record, call) for record in run.records.values()]
            predicted += [in_whole(part, record, call) for record in walked]
        return SignalTrace(measured, SignalTrace(predicted))


def sample_moments(values: Tensor) -> dict[str, Any]:
    """Mean and std (of the population), and as ``details`` skew and excess kurtosis, over all elements."""
    x = values.double()
    var, mean = torch.var_mean(x, correction=0)
    record: dict[str, Any] = {"mean": float(mean), "std": float(var.sqrt())}
    skew = kurtosis = None
    if record["std"] > 1e-12 * abs(record["mean"]) and math.isfinite(record["std"]):
        x = ((x - mean) / var.sqrt()).flatten()
        square = x * x
        skew, kurtosis = float(square @ x) / len(x), float(square @ square) / len(x) - 3.0
    return record | {"details": {"skew": skew, "kurtosis": kurtosis}}


def dead_share(values: Tensor, dim: int) -> float | None:
    """Share of the channels, on dim ``dim``, whose value never changes; None if each has only one."""
    channels = values.movedim(dim, 0).reshape(values.shape[dim], -1)
    if channels.shape[1] < 2:
        return None
    low, high = channels.aminmax(dim=1)
    return float((low == high).double().mean())


def channel_dim(layer: nn.Module) -> int:
    """The channels' dim of a weight layer's output, from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]


def pre_activation(layer: Any, x: Tensor, output: Tensor) -> Tensor:
    """What the layer hands to its activation; ``output`` if it has none."""
    activation = getattr(layer, "activation", None)
    if activation is None:
        return output
    layer._modules["activation"] = None  # the constants stay
    try:
        return layer(x)
    finally:
        layer._modules["activation"] = activation


def rows_of(layer: Any, weight: Tensor) -> Tensor:
    """The weight rows that feed a layer's output units, shape ``(out, fan_in)``; of groups the first."""
    transposed, groups = functional.geometry_of(layer)
    rows = functional.row_view(weight, transposed, groups)
    return (rows[0].transpose(0, 1) if transposed else rows[: len(rows) // groups]).flatten(1)


def weight_details(layer: Any, x: Tensor, z: Tensor, generator: torch.Generator) -> dict[str, Any]:
    r"""What the weight W of a layer, as it is applied (rows scaled, centred), does to its input.

    ``coherence``: :math:`\mu = \max_{i \ne j} |\cos(W_i, W_j)|`.

    ``singular_values``: min, median, max and root mean square of those of the layer's Jacobian
    :math:`\mathrm{diag}(\varphi'(z)/std)\, W` at a few of the z that were seen; of W itself if the layer
    has no activation.

    ``error``: the Frobenius norm of z's covariance off its diagonal, which the method takes as 0, over
    ``error_columns`` samples and positions. m uncorrelated units of variance 1 seen n times show about
    sqrt(m (m - 1) / n), so for n < m it is None.

    ``error_bound``: what ``error`` can be at most if the input is uncorrelated with variance s^2,

    .. math:: s^2 \mu \sqrt{\textstyle\sum_{i \ne j} \lVert W_i\rVert^2 \lVert W_j\rVert^2}.

    Source: Arpit et al. (ICML 2016), Proposition 1, the main text's form. Of a grouped convolution all
    are the first group's. None stands for what would take too long (``LARGEST_WEIGHT``, ``LARGEST_OUT``).

    Args:
        layer: A weight layer, torch's or ours.
        x: Its input.
        z: Its pre-activation.
        generator: Chooses samples and positions.
    """
    names = ("coherence", "singular_values", "error_bound", "error", "error_columns")
    details: dict[str, Any] = dict.fromkeys(names)
    if layer.weight.numel() > LARGEST_WEIGHT or not (x.isfinite().all() and z.isfinite().all()):
        return details
    weight, _, finish = effective(layer)
    rows = rows_of(layer, weight)
    out = len(rows)
    columns = z.movedim(channel_dim(layer), -1).reshape(-1, z.shape[channel_dim(layer)])
    picked = torch.randperm(len(columns), generator=generator)[:COLUMNS]
    columns = columns[picked.to(columns.device)].double().cpu()
    gram = rows @ rows.T
    slope = None
    if getattr(layer, "activation", None) is not None:
        with torch.enable_grad():
            u = columns[:POSITIONS].clone().requires_grad_()
            (slope,) = torch.autograd.grad(finish(u).sum(), u)
    details["singular_values"] = singular_values(rows, gram, None if slope is None else slope[:, :out])
    if out < 2:
        return details
    details["coherence"] = mu = coherence(gram)
    details["error_bound"] = float(x.double().var(correction=0)) * mu * _lengths_off_diagonal(gram)
    if out <= min(LARGEST_OUT, len(columns)):
        details["error"] = off_diagonal_norm(columns[:, :out].T.cov(correction=0).reshape(out, out))
        details["error_columns"] = len(columns)
    return details


def coherence(gram: Tensor) -> float:
    """Largest |cos| between two rows, from their products; zero rows are orthogonal to all."""
    lengths = gram.diagonal().sqrt()
    cosines = (
        gram / torch.where(lengths > 0, lengths, 1.0) / torch.where(lengths > 0, lengths, 1.0)[:, None]
    )
    return float(cosines.fill_diagonal_(0.0).abs().max())


def _lengths_off_diagonal(gram: Tensor) -> float:
    """sqrt(sum over i != j of |W_i|^2 |W_j|^2)."""
    squares = gram.diagonal()
    return math.sqrt(max(0.0, float(squares.sum().square() - squares.square().sum())))


def off_diagonal_norm(matrix: Tensor) -> float:
    """Frobenius norm without the diagonal."""
    return float(torch.linalg.vector_norm(matrix - torch.diag(matrix.diagonal())))


def singular_values(rows: Tensor, gram: Tensor, slope: Tensor | None) -> dict[str, float]:
    """min, median, max and rms of the singular values of ``diag(slope) rows``, over the slopes given.

    Args:
        rows: Shape (out, fan_in).
        gram: ``rows @ rows.T``; its eigenvalues are cheaper than the rows' singular values.
        slope: Shape (positions, out); None for ones.
    """
    out, fan_in = rows.shape
    squares = []
    for d in [None] if slope is None else slope:
        if out <= fan_in:
            product = gram if d is None else gram * d * d[:, None]
        else:
            scaled = rows if d is None else rows * d[:, None]
            product = scaled.T @ scaled
        squares.append(torch.linalg.eigvalsh(product).clamp_min(0.0))
    values = torch.cat(squares)
    root = values.sqrt()
    return {
        "min": float(root.min()),
        "median": float(root.median()),
        "max": float(root.max()),
        "rms": float(values.mean().sqrt()),
    }
