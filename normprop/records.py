"""What is known about each node of a network, predicted or measured, as a table, a figure or JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Random in training; in eval mode they hand on what they get.
DROPS = {
    "dropout", "dropout2d", "alpha_dropout", "feature_dropout", "Dropout", "Dropout1d",
    "Dropout2d", "Dropout3d", "AlphaDropout", "DropPath", "StochasticDepth",
}  # fmt: skip
# Operations that hand on each element of a map as it is, in another place, shape or type.
MOVES = DROPS | {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t", "movedim",
    "swapaxes", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile", "contiguous", "clone", "detach",
    "to", "float", "type_as", "rearrange", "roll", "flip", "rot90", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle", "Identity", "Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle",
}  # fmt: skip
# With those that hand on a part: not shown in tables, unless there is a note.
LAYOUT = MOVES | {
    "narrow", "getitem", "chunk", "split", "tensor_split", "unbind", "index_select", "unfold", "getattr", "size",
}  # fmt: skip
_COLUMNS = ("mean", "std", "gradient")


@dataclass
class Record:
    """One node's signal.

    Attributes:
        name: The node's name in the graph.
        path: The module that it calls, or in whose forward it is written.
        op: Type of the module, or name of the function.
        shape: Of its output, None if unknown.
        mean: Over samples, channels and positions.
        std: Likewise.
        gradient: L2 norm of the gradient of the whole map, that of the output being 1.
        note: Where an assumption is weak.
        details: What only data can tell (:func:`normprop.measure`).
    """

    name: str
    path: str
    op: str
    shape: tuple[int, ...] | None
    mean: float
    std: float
    gradient: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def var(self) -> float:
        """The std squared."""
        return self.std**2

    @property
    def place(self) -> str:
        """Where to look in the code: the module's path; for a function its node behind that."""
        plain = self.path.replace(".", "_")
        if not plain or self.name.lstrip("_").startswith(plain.lstrip("_")):
            return self.path if self.name.lstrip("_") == plain.lstrip("_") else self.name
        return f"{self.path}:{self.name}"


@dataclass
class SignalTrace:
    """A record a node, in the order of execution.

    Attributes:
        records: Predicted or measured.
        predicted: Beside measured records, those predicted.
    """

    records: list[Record]
    predicted: SignalTrace | None = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: str | int) -> Record:
        """By position, node name or module path (its last call)."""
        if isinstance(key, int):
            return self.records[key]
        found = [r for r in self.records if r.name == key] or [r for r in self.records if r.path == key]
        if not found:
            raise KeyError(f"no node or module '{key}'")
        return found[-1]

    def __repr__(self) -> str:
        return self.table()

    def shown(self, every: bool = False) -> list[tuple[Record, Record | None]]:
        """The records worth a line, each with the one predicted for it; with ``every`` all of them."""
        beside = {} if self.predicted is None else {r.name: r for r in self.predicted}
        pairs = [(record, beside.get(record.name)) for record in self.records]
        return [(r, p) for r, p in pairs if every or r.op not in LAYOUT or _note(r, p)]

    def table(self, every: bool = False) -> str:
        """A line a node, predicted beside measured if both are known.

        Args:
            every: Nodes that only move values (views, slices, dropout) too.
        """
        both = self.predicted is not None
        heads = [
            "node",
            "op",
            "shape",
            *(h for c in _COLUMNS for h in ([c, "predicted"] if both else [c])),
            "note",
        ]
        lines = [heads]
        for record, predicted in self.shown(every):
            line = [record.place, record.op, "x".join(map(str, record.shape or ())) or "-"]
            for column in _COLUMNS:
                for one in [record, predicted] if both else [record]:
                    line.append("-" if one is None else _number(one, column))
            lines.append([*line, _note(record, predicted)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if index < 3 or index == len(heads) - 1 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """``{"records": [...], "predicted": [...] or null}``; what is not finite becomes null.

        Args:
            path: Where to write it too.
        """
        value = {
            "records": [asdict(record) for record in self.records],
            "predicted": None if self.predicted is None else [asdict(record) for record in self.predicted],
        }
        text = json.dumps(_finite(value), indent=1, allow_nan=False)
        if path is not None:
            with whole(Path(path)) as file:
                file.write_text(text + "\n")
        return text

    def plot(self, path: str | Path) -> None:
        """Mean, std and gradient by depth, measured on predicted, as a PNG (or what the suffix says).

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'normprop[recipes]'") from error

        pairs = self.shown()
        details = [name for name in _FRACTIONS if any(r.details.get(name) for r, _ in pairs)]
        panels = len(_COLUMNS) + bool(details)
        width = min(16.0, max(8.0, 3 + 0.16 * len(pairs)))
        # Not pyplot: it would keep the figure, and the caller's backend is none of our business.
        figure = Figure(figsize=(width, 1.2 + 1.9 * panels), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(panels, 1, sharex=True)
        for axis, column in zip(axes, _COLUMNS, strict=False):
            _draw(axis, column, pairs, self.predicted is not None)
        if self.predicted is not None:
            lines = axes[0].get_legend_handles_labels()
            figure.legend(*lines, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
        if details:
            _draw_fractions(axes[-1], pairs, details)
        _label_depth(axes, [record for record, _ in pairs], width)
        with whole(Path(path)) as file:
            figure.savefig(file, dpi=150)


MEASURED, PREDICTED = "#d1495b", "#00798c"
_FRACTIONS = {
    "dead": ("x", "#7a7a7a", "share of constant units"),
    "coherence": (".", "#8d6a9f", "largest |cos| between weight rows"),
}
_LABELS = {"mean": "mean", "std": "std", "gradient": "gradient\n(output's is 1)"}
_TICKS_PER_INCH = 5.0


def _draw(axis: Any, column: str, pairs: list[tuple[Record, Record | None]], both: bool) -> None:
    """One panel: a line for what is predicted, points for what is measured; a line alone for one of them."""
    measured = [_plottable(getattr(record, column)) for record, _ in pairs]
    predicted = [_plottable(getattr(p, column, None)) for _, p in pairs]
    depth = range(len(pairs))
    if both:
        axis.plot(depth, predicted, color=PREDICTED, linewidth=2, label="predicted")
        axis.plot(depth, measured, "o", color=MEASURED, markersize=4, label="measured")
    else:
        axis.plot(depth, measured, "o-", color=MEASURED, markersize=4, linewidth=1.5)
    axis.axhline(float(column != "mean"), color="#7a7a7a", linewidth=0.8, zorder=0)
    positive = [v for v in (*measured, *predicted) if math.isfinite(v) and v > 0]
    if column == "mean":
        stds = [v for record, _ in pairs if math.isfinite(v := _plottable(record.std))]
        low, high = axis.get_ylim()
        room = 0.1 * max(stds, default=1.0)  # less is next to nothing, and should look like it
        axis.set_ylim(min(low, -room), max(high, room))
    elif positive and (column == "gradient" or max(positive) > 20 * min(positive)):
        _scale_by_logarithm(axis, max(positive) / min(positive))
    else:
        axis.set_ylim(0, 1.15 * max([1.0, *positive]))
    axis.set_ylabel(_LABELS[column])


def _scale_by_logarithm(axis: Any, span: float) -> None:
    """Ticks 1, 2, 5, 10, ... as plain numbers while they are few; powers of ten after that."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    if span < 1000:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0)))
        axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 2, high * 2)  # small differences should look small


def _draw_fractions(axis: Any, pairs: list[tuple[Record, Record | None]], names: list[str]) -> None:
    """What lies between 0 and 1."""
    for name in names:
        marker, color, label = _FRACTIONS[name]
        values = [_plottable(record.details.get(name)) for record, _ in pairs]
        axis.plot(range(len(pairs)), values, marker, color=color, markersize=6, label=label)
    axis.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97), fontsize=8)
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel("share, |cos|")


def _label_depth(axes: Any, records: list[Record], width: float) -> None:
    """Names along the bottom, as many as can be read; parts of the network on alternating grounds."""
    step = max(1, math.ceil(len(records) / (width * _TICKS_PER_INCH)))
    ticks = range(0, len(records), step)
    axes[-1].set_xticks(ticks, [records[i].place for i in ticks], rotation=90, fontsize=7)
    axes[-1].set_xlim(-0.5, max(0, len(records) - 1) + 0.5)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    parts = _parts(records)
    if 1 < len(parts) <= 1.5 * width and len(records) >= 3 * len(parts):
        for index, (name, start, end) in enumerate(parts):
            for axis in axes if index % 2 else ():
                axis.axvspan(start - 0.5, end - 0.5, color="#7a7a7a", alpha=0.08, linewidth=0, zorder=0)
            if (end - start) * width > len(name) * len(records) * 0.09:  # there is room for it
                axes[0].text(start - 0.4, 1.02, name, transform=axes[0].get_xaxis_transform(), fontsize=8)


def _parts(records: list[Record]) -> list[tuple[str, int, int]]:
    """Name, start and end of the runs of records in one child of the network."""
    parts: list[tuple[str, int, int]] = []
    for index, record in enumerate(records):
        name = record.path.split(".")[0]
        if parts and parts[-1][0] == name:
            parts[-1] = (name, parts[-1][1], index + 1)
        else:
            parts.append((name, index, index + 1))
    return parts


def _note(record: Record, predicted: Record | None) -> str:
    return "; ".join(dict.fromkeys(r.note for r in (record, predicted) if r is not None and r.note))


def _plottable(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _number(record: Record, column: str) -> str:
    value = getattr(record, column)
    if value is None:
        return "-"
    if value == 0 or (column == "mean" and abs(value) < 1e-6 * record.std):  # what rounding leaves of a 0
        return "0.000"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write that becomes ``path`` at the end; a reader, or a kill in the middle, finds the old one."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # with its suffix, which decides the format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
