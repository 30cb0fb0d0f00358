"""Timing that can be trusted: contenders interleaved round by round, paired ratios, results checked first.

Round after round every contender takes one training step on the same batch (A B C A B C ...), so that
drift of a shared machine hits all alike; what is reported is the median, over rounds, of each
contender's time divided by that of ``none`` in the same round (on a GPU a round is ten steps each). The
optimizer step, NormProp's projection included, is inside the timed step. The phases are timed apart
afterwards.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import normprop
from normprop.recipes import InputError, Row, check_choice, check_count
from normprop.recipes.models import COLORS, Blocks, build, check_norms, library_model
from normprop.recipes.results import check_device, environment, new_figure, output_folder, write_json
from normprop.recipes.train import RULES, Run

PHASES = ("forward", "backward", "optimizer")
PRECISIONS = ("fp32", "bf16")
STEPS = 10  # of a round on a GPU
# Largest relative error of output and gradient of a float32 step against float64: BatchNorm in a ResNet-50
# errs by 2e-2 by rounding alone. A bfloat16 step is the same code; its gradient on random labels is mostly
# rounding, so its error is reported alone.
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Case:
    """One benchmark: a model, a batch and how it is run.

    Attributes:
        model: One of ``MODELS``, or another library's, such as ``"torchvision:resnet50"``.
        width: Factor on the hidden channels of one of ``MODELS``.
        batch_size: Samples a step.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        compiled: Through ``torch.compile``.
        layout: ``"channels_last"`` or ``"contiguous"``.
        rule: NormProp's: ``"paper"`` or ``"recommended"``.
        image: Height and width of the images, three channels.
        classes: Outputs.
        cudagraphs: The compiled code replayed as CUDA graphs (``mode="reduce-overhead"``): Python waits for nobody.
    """

    model: str = "nin"
    width: float = 1.0
    batch_size: int = 128
    precision: str = "fp32"
    compiled: bool = False
    layout: str = "channels_last"
    rule: str = "recommended"
    image: int = 32
    classes: int = 10
    cudagraphs: bool = False

    def __post_init__(self) -> None:
        check_choice("--precisions", self.precision, PRECISIONS)
        check_choice("--layout", self.layout, ("channels_last", "contiguous"))
        check_choice("--rules", self.rule, RULES)
        if self.cudagraphs and not self.compiled:
            raise InputError("cudagraphs replays what is compiled: compiled=True")
        check_count("--batch-sizes", self.batch_size)
        check_count("--image", self.image)


def network(case: Case, norm: str) -> nn.Module:
    """The case's model with a norm: a recipe (lightened), or another library's.

    Raises:
        InputError: For an unknown model, or a norm that another library's model cannot be given.
    """
    shape, rule = (3, case.image, case.image), RULES[case.rule]
    if ":" in case.model:
        return library_model(case.model, shape, None, norm, rule, case.width)
    net = build(case.model, shape, case.classes, norm, rule, case.width)
    return normprop.lighten(net) if norm == "normprop" else net


class Contender:
    """One network with its optimizer, ready to step; ``make`` builds another than the case's model."""

    def __init__(
        self, norm: str, case: Case, device: torch.device, make: Callable[[Blocks], nn.Module] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.norm, self.case, self.device = norm, case, device
        net = network(case, norm) if make is None else make(Blocks(norm, RULES[case.rule]))
        net = net.to(device)
        self.exact = copy.deepcopy(net).double()
        self.layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        self.net = net.to(memory_format=self.layout)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        if norm == "normprop":
            radius = Run(rule=case.rule, batch_size=case.batch_size).peak_radius
            normprop.attach_projection(self.optimizer, net, radius)
            normprop.scale_together(net)
        mode = "reduce-overhead" if case.cudagraphs else None
        self.run: nn.Module | Any = torch.compile(self.net, mode=mode) if case.compiled else self.net

    def loss(self, x: Tensor, y: Tensor, precision: str | None = None) -> tuple[Tensor, Tensor]:
        if self.case.cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()  # no contender's graph follows another's
        low = (precision or self.case.precision) == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            output = self.run(x)
        return F.cross_entropy(output.float(), y), output

    def step(self, x: Tensor, y: Tensor, now: Callable[[], float] = lambda: 0.0) -> list[float]:
        """One training step; the times before and after its phases, by ``now``."""
        times = [now()]
        loss, _ = self.loss(x, y)
        times.append(now())
        loss.backward()
        times.append(now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [*times, now()]

    def seconds(self, x: Tensor, y: Tensor) -> float:
        """A whole step. A GPU is waited for after several, since in training Python runs ahead of it."""
        steps = STEPS if self.device.type == "cuda" else 1
        start = _now(self.device)
        for _ in range(steps):
            self.step(x, y)
        return (_now(self.device) - start) / steps

    def phases(self, x: Tensor, y: Tensor) -> list[float]:
        """Seconds of forward, backward and optimizer step, each waited for."""
        times = self.step(x, y, lambda: _now(self.device))
        return [b - a for a, b in itertools.pairwise(times)]

    def error(self, x: Tensor, y: Tensor, precision: str) -> float:
        """Largest relative error of the outputs and of the gradient against float64 in plain torch."""
        loss, output = self.loss(x, y, precision)
        loss.backward()
        with normprop.functional.plainly():
            true = self.exact(x.double())
            F.cross_entropy(true, y).backward()
        exact = [q.grad for q in self.exact.parameters()]
        self.exact.zero_grad()
        pairs = [(output.detach().double(), true.detach())]
        pairs += [
            (p.grad.double(), gradient)
            for p, gradient in zip(self.net.parameters(), exact, strict=True)
            if p.grad is not None and gradient is not None
        ]
        self.optimizer.zero_grad()
        outputs = float((pairs[0][0] - pairs[0][1]).norm() / pairs[0][1].norm())
        # The gradient as one vector: single biases may be all rounding.
        wrong = sum(float((a - b).square().sum()) for a, b in pairs[1:])
        size = sum(float(b.square().sum()) for _, b in pairs[1:])
        return max(outputs, (wrong / size) ** 0.5)

    def memory(self, x: Tensor, y: Tensor) -> int | None:
        """Bytes kept for backward; of parameters and what has a parameter's size nothing is counted.

        On CUDA what the allocator's peak in a whole step adds to what lies there before it; None with CUDA
        graphs, which hold theirs all the time.
        """
        if self.case.cudagraphs:
            return None
        if self.device.type == "cuda":
            self.step(x, y)  # momentum and workspaces are there from now on
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(x, y)
            return torch.cuda.max_memory_allocated() - before
        weights = {p.numel() for p in self.net.parameters() if p.ndim > 1}
        vectors = {p.numel() for p in self.net.parameters() if p.ndim <= 1}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # At batch size 1 the output of a linear layer has as many numbers as its bias.
            activation = tensor.ndim == 2 and len(tensor) == len(x)
            if tensor.numel() not in weights and (activation or tensor.numel() not in vectors):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = self.loss(x, y)
        kept.pop(x.untyped_storage().data_ptr(), None)
        del loss
        return sum(kept.values())


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Convolutions in float32 proper: by default CUDA computes them in TF32, which errs by 1e-3 a layer."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    timed: Mapping[str, Callable[[], float]], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Round after round, each call once; what they return, their seconds.

    Example:
        >>> in_turn({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
        {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, seconds in timed.items():
            times[name].append(seconds())
        advance()
    return times


def paired(times: Sequence[float], reference: Sequence[float]) -> Row:
    """Median and quartiles of the ratios, round by round.

    Example:
        >>> paired([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
        {'ratio': 2.0, 'quartiles': [1.0, 3.0]}
    """
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    quartiles = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    return {"ratio": statistics.median(ratios), "quartiles": quartiles}


def measure(
    case: Case, norms: Sequence[str], rounds: int, device: str, advance: Callable[[], None] = lambda: None
) -> list[Row]:
    """One case: a row a norm, ``none`` first.

    Args:
        case: What to run.
        norms: Contenders; ``"none"`` is added.
        rounds: Timed rounds.
        device: ``"cpu"`` or ``"cuda"``.
        advance: Called after every round.

    Returns:
        Rows with ``ms`` (medians of the step and its phases), ``ratio`` (median, quartiles of the
        paired ratios to ``none``), ``bytes`` and their ratio, ``error`` and ``status``.
    """
    norms = ["none", *(norm for norm in norms if norm != "none")]
    where = torch.device(device)
    torch.manual_seed(1)
    x = torch.randn(case.batch_size, 3, case.image, case.image, device=where)
    y = torch.randint(case.classes, (case.batch_size,), device=where)
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}
    for norm in norms:
        row: Row = asdict(case) | {"norm": norm, "status": "ok", "rounds": rounds, "device_type": device}
        rows[norm] = row
        if norm != "none" and rows["none"]["status"] != "ok":
            row["status"] = f"no ratio: 'none' is {rows['none']['status']}"
            continue
        try:
            contender = Contender(norm, case, where)
            batch = x.to(memory_format=contender.layout)
            with _exact_float32():
                row["error"] = contender.error(batch, y, "fp32")
            if not row["error"] <= TOLERANCE:
                row["status"] = f"wrong: relative error {row['error']:.2g} against float64"
                continue
            if case.precision != "fp32":
                row[f"error_{case.precision}"] = contender.error(batch, y, case.precision)
            row["bytes"] = contender.memory(batch, y)
            for _ in range(3):
                contender.step(batch, y)
        except InputError:
            raise
        except ValueError as error:
            row["status"] = f"cannot train: {error}"
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
                raise
            row["status"] = "out of memory"
        else:
            contenders[norm] = contender
    x = x.to(
        memory_format=torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    )
    timed = {norm: functools.partial(contender.seconds, x, y) for norm, contender in contenders.items()}
    times = in_turn(timed, rounds, advance)
    for norm, contender in contenders.items():
        total = times[norm]
        columns = zip(*(contender.phases(x, y) for _ in range(min(rounds, 10))), strict=True)
        medians = [1000 * statistics.median(column) for column in columns]
        rows[norm] |= {
            "ms": {"step": 1000 * statistics.median(total), **dict(zip(PHASES, medians, strict=True))},
            **paired(total, times["none"]),
        }
        kept = rows[norm]["bytes"]
        rows[norm]["bytes_ratio"] = None if kept is None else kept / rows["none"]["bytes"]
    return list(rows.values())


def bench(
    cases: Sequence[Case], norms: Sequence[str], rounds: int, device: str, out: Path, console: Console
) -> dict[str, Any]:
    """Measure all cases; ``bench.json`` after every case, ``bench.png`` at the end.

    Args:
        cases: What to run.
        norms: Contenders; ``"none"`` is added.
        rounds: Timed rounds a case.
        device: ``"cpu"`` or ``"cuda"``.
        out: Folder.
        console: Where progress and table are shown.

    Returns:
        ``{"rows": [...], versions, device, threads, commit}``.

    Raises:
        InputError: For an unknown norm or device, or ``rounds`` below 1.
    """
    check_norms(norms)
    check_device(device)
    if device == "cpu" and any(case.cudagraphs for case in cases):
        raise InputError("--modes cudagraphs: needs --device cuda")
    check_count("--rounds", rounds)
    rows: list[Row] = []
    result = {"rows": rows, **environment()}
    with output_folder(out), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("bench", total=len(cases) * rounds)
        for number, case in enumerate(cases, 1):
            # Each contender compiles the same Python code anew; beyond torch's limit of 8 it would run eagerly.
            with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
                rows += measure(case, norms, rounds, device, lambda: progress.advance(task))
            write_json(out / "bench.json", result)
            torch.compiler.reset()
            if not console.is_terminal:
                console.print(f"{number} of {len(cases)} cases")
        plot(result, out / "bench.png")
    console.print(table(rows))
    return result


def table(rows: Sequence[Row]) -> Table:
    """Ratios to ``none`` as people read them."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("case", "left"), ("norm", "left"), ("ms", "right"), ("time", "right")):
        view.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("quartiles", *PHASES, "bytes"):
        view.add_column(column, justify="right")
    for row in rows:
        name = f"{row['model']} x{row['width']:g} {row['precision']} b{row['batch_size']} {row['rule']}"
        name += (
            " compiled" * row["compiled"]
            + " CUDA graphs" * row["cudagraphs"]
            + " contiguous" * (row["layout"] == "contiguous")
        )
        if row["status"] != "ok":
            view.add_row(name, row["norm"], row["status"])
            continue
        low, high = row["quartiles"]
        phases = [f"{row['ms'][phase]:.2f}" for phase in PHASES]
        view.add_row(
            name if row["norm"] == "none" else "",
            row["norm"],
            f"{row['ms']['step']:.2f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            *phases,
            "-" if row["bytes_ratio"] is None else f"{row['bytes_ratio']:.3f}",
        )
    return view


def plot(result: dict[str, Any], path: Path) -> None:
    """Time of a step, as a ratio to ``none``, and its quartiles: a panel for each setting.

    Against batch size, a line for each norm; with one batch size, side by side.
    """
    panels: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["status"] == "ok":
            mode = "CUDA graphs" if row["cudagraphs"] else "compiled" if row["compiled"] else "eager"
            model = row["model"].split(":")[-1] + ("" if row["width"] == 1 else f" x{row['width']:g}")
            key = f"{model}, {row['precision']}, {mode}\n{row['rule']}"
            panels.setdefault(key, []).append(row)
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    with new_figure(path, columns, lines, width=4.2, height=3.2) as (_, axes):
        for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
            sizes = sorted({row["batch_size"] for row in rows})
            for norm in dict.fromkeys(row["norm"] for row in rows):
                mine = sorted((r for r in rows if r["norm"] == norm), key=lambda r: r["batch_size"])
                at = [r["batch_size"] if len(sizes) > 1 else norm for r in mine]
                middle = [r["ratio"] for r in mine]
                away = zip(*([abs(q - r["ratio"]) for q in r["quartiles"]] for r in mine), strict=True)
                style = {"marker": "o", "color": COLORS[norm], "label": norm, "linewidth": 2}
                axis.errorbar(at, middle, list(away), capsize=4, **style)
            if len(sizes) > 1:
                axis.set_xscale("log", base=2)
                axis.set_xticks(sizes, [str(size) for size in sizes])
                axis.set_xlabel("batch size")
                axis.legend(frameon=False)
            else:
                title += f", batch {sizes[0]}"
                axis.margins(x=0.3)
            axis.set_title(title, fontsize=10)
            axis.set_ylabel("time of a step / none")
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
