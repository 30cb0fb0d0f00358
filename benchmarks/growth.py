"""Growth: time and memory of a training step against batch size, width and depth, with fitted exponents.

    python benchmarks/growth.py               about 5 minutes on 2 CPU cores
    python benchmarks/growth.py --quick       half a minute: few rounds, at most 100 layers and batch size 64

A plain MLP and a ResNet, one quantity varied at a time; float32, eager, the contenders interleaved round
by round as in ``normprop bench``. Results are written after each case, and a run goes on where the last
one stopped. n is a row's ``rounds``; bytes are those kept for backward, weight-sized tensors not counted. Steps of
untrained networks that are hundreds of layers deep may overflow; ``finite`` says so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from normprop.recipes import Row
from normprop.recipes.bench import TOLERANCE, Case, Contender, in_turn, paired
from normprop.recipes.models import COLORS, Blocks, _resnet
from normprop.recipes.results import environment, output_folder, write_json

CONTENDERS = {
    "none": ("none", "recommended"),
    "normprop, paper": ("normprop", "paper"),
    "normprop, recommended": ("normprop", "recommended"),
    "batch": ("batch", "recommended"),
}
IMAGE, CLASSES = 8, 10
# At width 1; no power of 2, so that no map of a batch has as many numbers as a weight.
WIDTH = {"mlp": 48, "resnet": 12}
AXES: dict[str, tuple[float, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "width": (0.5, 1, 2, 4, 8),
    "depth": (10, 30, 100, 300, 1000),
}
QUICK: dict[str, tuple[float, ...]] = {"batch": (1, 4, 16, 64), "width": (1, 2, 4), "depth": (10, 30, 100)}
# Where a norm and a rectifier alternate, each layer amplifies differences, roundings too (by up to
# sqrt(0.5 / Var[relu]) = 1.2): 1.2^30 of float32's 6e-8 is 1e-5. Deeper networks are the same layers.
CHECKED_DEPTH = 30


@dataclass(frozen=True)
class Point:
    """One network and batch: ``depth`` counts weight layers, ``width`` is a factor."""

    axis: str
    family: str
    batch: int = 32
    width: float = 1
    depth: int = 10

    def network(self, make: Blocks) -> nn.Module:
        """The plain MLP, or a ResNet of one stage: stem, blocks of two convolutions, output."""
        width, shape = round(WIDTH[self.family] * self.width), (3, IMAGE, IMAGE)
        if self.family == "resnet":
            return _resnet(shape, CLASSES, make, [width], (self.depth - 2) // 2)
        hidden = [make.linear(width, width) for _ in range(self.depth - 2)]
        first = make.linear(math.prod(shape), width, first=True)
        return nn.Sequential(nn.Flatten(), first, *hidden, make.linear(width, CLASSES, activation=False))

    def rounds(self, most: int) -> int:
        """Fewer where a step takes long."""
        return max(min(5, most), min(most, 100 * most // self.depth))


def points(axes: dict[str, tuple[float, ...]], families: Sequence[str] = tuple(WIDTH)) -> list[Point]:
    """One quantity varied, the others as :class:`Point` has them."""
    kinds: dict[str, type] = {"batch": int, "width": float, "depth": int}
    return [
        Point(axis, family, **{axis: kinds[axis](value)})
        for axis, values in axes.items()
        for family, value in itertools.product(families, values)
    ]


def measure_point(point: Point, rounds: int) -> list[Row]:
    """A row a contender: ``ms``, paired ratio to ``none`` with quartiles, bytes kept for backward."""
    layout = "channels_last" if point.family == "resnet" else "contiguous"
    device = torch.device("cpu")
    torch.manual_seed(1)
    x, y = torch.randn(point.batch, 3, IMAGE, IMAGE), torch.randint(CLASSES, (point.batch,))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    rounds = point.rounds(rounds)
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}
    for label, (norm, rule) in CONTENDERS.items():
        case = Case(batch_size=point.batch, layout=layout, rule=rule, image=IMAGE, classes=CLASSES)
        contender = Contender(norm, case, device, point.network)
        row = rows[label] = asdict(point) | {"contender": label, "status": "ok", "rounds": rounds}
        try:
            row["error"] = contender.error(x, y, "fp32") if point.depth <= CHECKED_DEPTH else None
            if row["error"] is not None and not row["error"] <= TOLERANCE:
                row["status"] = f"wrong: relative error {row['error']:.2g} against float64"
                row["error"] = row["error"] if math.isfinite(row["error"]) else None
                continue
            row["bytes"] = contender.memory(x, y)
        except ValueError as error:  # BatchNorm at batch size 1
            row["status"] = f"cannot train: {error}"
            continue
        contenders[label] = contender
        for _ in range(2):
            contender.step(x, y)
    times = in_turn({label: functools.partial(c.seconds, x, y) for label, c in contenders.items()}, rounds)
    for label, contender in contenders.items():
        rows[label] |= {
            "ms": 1000 * statistics.median(times[label]),
            **paired(times[label], times["none"]),
            "bytes_ratio": rows[label]["bytes"] / rows["none"]["bytes"],
            "finite": all(bool(p.isfinite().all()) for p in contender.net.parameters()),
        }
    return list(rows.values())


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) against log(at), over the larger half of ``at``.

    Example:
        >>> round(exponent([1, 2, 4, 8], [9.0, 9.0, 48.0, 192.0]), 6)
        2.0
    """
    pairs = sorted(zip(at, values, strict=True))[len(at) // 2 :]
    x, y = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def series(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows that were timed, by (axis, family, contender), sorted along the axis."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    order = {name: place for place, name in enumerate((*AXES, *WIDTH, *CONTENDERS))}
    names = ("axis", "family", "contender")
    for row in sorted(rows, key=lambda row: [*(order[row[name]] for name in names), row[row["axis"]]]):
        if row["status"] == "ok":
            found.setdefault((row["axis"], row["family"], row["contender"]), []).append(row)
    return found


def fits(rows: Sequence[Row]) -> list[Row]:
    """Exponents of time and bytes; ``ratio_from_to``: time as a ratio to ``none`` at both ends of the axis."""
    lines = []
    for (axis, family, contender), mine in series(rows).items():
        if len(mine) < 3:
            continue
        at = [row[axis] for row in mine]
        line: Row = {
            "axis": axis,
            "family": family,
            "contender": contender,
            "points": len(mine) - len(mine) // 2,
        }
        line |= {kind: exponent(at, [row[kind] for row in mine]) for kind in ("ms", "bytes")}
        line["ratio_from_to"] = [mine[0]["ratio"], mine[-1]["ratio"]]
        if axis == "batch" and contender.startswith("normprop"):
            line["overhead_shrinks"] = mine[-1]["ratio"] < mine[0]["ratio"]
        lines.append(line)
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time above, bytes below; a column an axis, a line a contender, the ResNet's dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(12, 6.4), layout="constrained", sharex="col")
    styles = {"mlp": "-", "resnet": "--"}
    colors = {label: COLORS[norm] for label, (norm, _) in CONTENDERS.items()} | {
        "normprop, paper": "#edae49"
    }
    for (axis, family, contender), mine in series(rows).items():
        column = list(AXES).index(axis)
        for panel, kind in zip(axes[:, column], ("ms", "bytes"), strict=True):
            scale = 1 if kind == "ms" else 2**-20
            at, values = [row[axis] for row in mine], [scale * row[kind] for row in mine]
            # Curves that lie on one another are told apart by width.
            width = 1.2 + 0.9 * (len(colors) - 1 - list(colors).index(contender))
            panel.plot(at, values, styles[family], color=colors[contender], linewidth=width)
    for column, (axis, name) in enumerate(
        zip(AXES, ("batch size", "width factor", "weight layers"), strict=True)
    ):
        axes[1, column].set_xlabel(name)
        axes[0, column].set_title(f"against {axis}", fontsize=10)
        base = 10 if axis == "depth" else 2
        axes[1, column].set_xscale("log", base=base)
        if base == 2:
            axes[1, column].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for panel in axes.flat:
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("ms a training step")
    axes[1, 0].set_ylabel("MiB kept for backward")
    for label, color in colors.items():
        axes[0, 0].plot([], [], color=color, linewidth=2, label=label)
    for family, style in styles.items():
        axes[0, 0].plot([], [], style, color="black", label=family)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=len(colors) + len(styles))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def growth(todo: Sequence[Point], rounds: int, out: Path, resume: bool = True) -> dict[str, Any]:
    """Measure what ``out`` does not have yet from this machine, these versions and threads.

    Returns:
        ``{"rows", "fits", versions, device, threads, commit}``, as in growth.json; rows have the
        commit that they were made with.
    """
    made_by, path = environment("cpu"), out / "growth.json"
    rows: list[Row] = []
    if resume and path.exists():
        old = json.loads(path.read_text())
        if all(old[key] == made_by[key] for key in ("versions", "device", "threads")):
            wanted = [asdict(point) | {"rounds": point.rounds(rounds)} for point in todo]
            rows = [row for row in old["rows"] if any(point.items() <= row.items() for point in wanted)]
    done = {Point(*(row[field.name] for field in fields(Point))) for row in rows}
    waiting = [point for point in todo if point not in done]
    # Layers are what a step's time is made of; a case's share of the whole for the time left.
    cost = {point: point.depth * (3 + point.rounds(rounds)) * (1 + point.batch / 64) for point in waiting}
    started, spent = time.perf_counter(), 0.0
    with output_folder(out, keep=["growth.json"]):
        for number, point in enumerate(waiting, 1):
            rows += [row | {"commit": made_by["commit"]} for row in measure_point(point, rounds)]
            write_json(path, {"rows": rows, "fits": fits(rows), **made_by})
            spent += cost[point]
            left = (time.perf_counter() - started) * (sum(cost.values()) / spent - 1)
            name = f"{point.family}, {point.axis} {getattr(point, point.axis):g}"
            print(f"\r{f'{number}/{len(waiting)} {name} ({left:.0f} s left)':<79}", end="", flush=True)
        print()
        result = {"rows": rows, "fits": fits(rows), **made_by}
        write_json(path, result)
        plot(rows, out / "growth.png")
    return result


def table(lines: Sequence[Row]) -> str:
    """The fits as Markdown."""
    text = [
        "| against | network | contender | time | bytes | time / none, from, to |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        low, high = line["ratio_from_to"]
        text.append(
            f"| {line['axis']} | {line['family']} | {line['contender']} | {line['ms']:.2f} | {line['bytes']:.2f} | "
            f"{low:.2f}, {high:.2f} |"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, help="timed rounds a case, fewer beyond 100 layers (60; quick: 5)"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "growth")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (5 if arguments.quick else 60)
    result = growth(points(QUICK if arguments.quick else AXES), rounds, arguments.out, not arguments.fresh)
    print(table(result["fits"]))


if __name__ == "__main__":
    main()
