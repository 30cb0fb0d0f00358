"""Figures of the claims, from what ``results.json`` holds; each draws on axes and saves nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from normprop.recipes import Row
from normprop.recipes.models import COLORS
from normprop.recipes.results import new_figure
from normprop.recipes.speed import PAPER_SECONDS
from normprop.recipes.summary import accuracies, by_epoch, failures, summarize

Figure = Callable[[Row, Path], None]
BANDS = "mean over seeds, band from three seeds on: 95 % confidence interval"

VARIANT_COLORS = {
    **COLORS,
    "normprop, recommended": COLORS["normprop"],
    "normprop, paper": "#5b1a2e",
    "normprop, recommended, whitened": "#e8743b",
    "batch, whitened": "#56b4e9",
    "normprop, recommended, orthogonal": "#7b2cbf",
    "normprop, paper, orthogonal": "#b185db",
    "batch, orthogonal": "#2d6a4f",
    "normprop, paper, step .08": "#c2185b",
}
CUT = 10.0  # of hidden means: what diverged would hide all else
TICKS = (-10, -3, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 3, 10)
# Test error in percent, by data set and flips: Arpit et al. 2016, table 1.
PAPER_ERRORS = {
    ("cifar10", False): {"normprop, paper": 9.11, "batch": 9.41},
    ("cifar10", True): {"normprop, paper": 7.47, "batch": 7.25},
    ("cifar100", False): {"normprop, paper": 32.19, "batch": 35.32},
    ("cifar100", True): {"normprop, paper": 29.24, "batch": 30.26},
    ("svhn", False): {"normprop, paper": 1.88, "batch": 2.25},
}


def _title(result: Row, note: str = "") -> str:
    """Which protocol, on what, how much of it is there."""
    state = ""
    if result["status"] != "complete":
        state = f", {result['finished']} of {result['planned']} runs"
        if begun := sum(row["status"] == "partial" for row in result["rows"]):
            state += f", {begun} more begun"
    return f"{result['dataset']}, {result['protocol']} protocol{state}" + (f"\n{note}" if note else "")


def _network(row: Row) -> str:
    width = "" if row["width"] == 1 else f" x{row['width']:g}"
    return f"{row['model']}{width}"


def _groups(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows by the values of keys, in order of appearance; one key without a tuple."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values[0] if len(values) == 1 else values, []).append(row)
    return groups


def _interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t; 0 below three values, which say little."""
    from scipy.stats import t  # scikit-learn brings it

    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 2 else 0.0


def _curve(axis: Any, rows: Sequence[Row], label: str, **style: Any) -> None:
    """Accuracy by epoch with its confidence band; seeds that failed are named, not averaged."""
    remark = failures(summarize([row | {"label": label} for row in rows])[0])
    epochs = by_epoch(rows)
    at = range(1, len(epochs) + 1)
    means = [100 * statistics.mean(values) for values in epochs]
    margins = [100 * _interval(values) for values in epochs]
    name = f"{label} ({remark})" if remark else label
    (line,) = axis.plot(at, means, label=name, linewidth=2, **style)
    axis.xaxis.get_major_locator().set_params(integer=True)
    low, high = ([m + sign * e for m, e in zip(means, margins, strict=True)] for sign in (-1, 1))
    axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if len(epochs) == 1:
        axis.plot(at, means, "o", color=line.get_color())


def _accuracy_axes(axis: Any, rows: Sequence[Row], x: str) -> None:
    """Label the axes, and let no wide band or lost run decide what is seen."""
    axis.set_xlabel(x)
    held = "validation_accuracy" in rows[0]
    axis.set_ylabel("accuracy on held-out training images (%)" if held else "test accuracy (%)")
    low, high = axis.get_ylim()
    values = [100 * v for row in rows for v in accuracies(row)]
    if values:
        top = min(high, max(values) + 3, 100.5)
        axis.set_ylim(max(low, min(values) - 3, 0, min(max(values) - 60, top - 5)), top)


def convergence(result: Row, path: Path) -> None:
    """Test accuracy by epoch, a line a variant, a panel a network."""
    panels = _groups(result["rows"], "model", "width")
    with new_figure(path, max(1, len(panels)), width=6, height=5) as (figure, axes):
        for axis, rows in zip(axes.flat, panels.values(), strict=True):
            for label, mine in _groups(rows, "label").items():
                _curve(axis, mine, f"{label}, n = {len(mine)}", color=VARIANT_COLORS[label])
            axis.set_title(_network(rows[0]), fontsize=10)
            _accuracy_axes(axis, rows, "epoch")
            axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        figure.suptitle(_title(result, BANDS), fontsize=10)


def data_norm(result: Row, path: Path) -> None:
    """Test accuracy by epoch: batch data normalisation solid, global dashed, a panel a batch size."""
    panels = _groups(result["rows"], "batch_size")
    with new_figure(path, max(1, len(panels)), width=5.5) as (figure, axes):
        for axis, (size, rows) in zip(axes.flat, panels.items(), strict=True):
            for (label, norm), mine in _groups(rows, "label", "data_norm").items():
                style = "-" if norm == "batch" else "--"
                _curve(
                    axis, mine, f"{label}; {norm} data norm", color=VARIANT_COLORS[label], linestyle=style
                )
            axis.set_title(f"{_network(rows[0])}, batch size {size}", fontsize=10)
            _accuracy_axes(axis, rows, "epoch")
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(_title(result, BANDS), fontsize=10)


def hidden_mean(result: Row, path: Path) -> None:
    """By epoch, a line a layer, a column a variant: mean of one unit (seed 0), average \\|mean\\| (all seeds)."""
    columns = _groups([row for row in result["rows"] if row.get("hidden_by_epoch")], "label")
    with new_figure(path, max(1, len(columns)), 2, width=3.2, height=2.9) as (figure, axes):
        from matplotlib import colormaps

        for column, (label, rows) in enumerate(columns.items()):
            count = len(rows[0]["hidden_by_epoch"][0])
            first = [epoch for epoch in rows[0]["hidden_by_epoch"] if epoch]
            for layer in range(count):
                style = {"color": colormaps["viridis"](layer / max(1, count - 1)), "linewidth": 1.5}
                name = f"layer {layer + 2}"
                units = [epoch[layer]["unit_mean"] for epoch in first]
                axes[0, column].plot(range(1, len(units) + 1), units, label=name, **style)
                series = [[e[layer]["mean_error"] for e in row["hidden_by_epoch"] if e] for row in rows]
                means = [statistics.mean(values) for values in zip(*series, strict=False)]
                axes[1, column].plot(range(1, len(means) + 1), means, **style)
            last = [r["mean_error"] for row in rows for r in row["hidden_by_epoch"][-1]]
            remark = failures(summarize(rows)[0])
            axes[0, column].set_title(label + (f"\n({remark})" if remark else ""), fontsize=10)
            if last:
                axes[1, column].set_title(f"average at the end {statistics.mean(last):.2f}", fontsize=9)
            axes[1, column].set_xlabel("epoch")
            for axis in axes[:, column]:
                axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes.flat:  # linear up to .5, logarithmic beyond: what drifts far hides nothing
            axis.set_yscale("symlog", linthresh=0.5, linscale=1.5)
        bounds = [[max(-CUT, min(CUT, end)) for axis in row for end in axis.get_ylim()] for row in axes]
        for row, ends in zip(axes, bounds, strict=True):
            for axis in row:
                axis.set_ylim(min(0, *ends), max(ends))
                axis.set_yticks([t for t in TICKS if min(0, *ends) <= t <= max(ends)])
                axis.yaxis.set_major_formatter("{x:g}")
        for axis in axes[0]:
            axis.axhline(0, color="black", linewidth=0.8)
        axes[0, 0].set_ylabel("mean of one unit (seed 0)")
        axes[1, 0].set_ylabel("|mean|, average over units")
        axes[0, -1].legend(frameon=False, fontsize=7, ncols=2)
        figure.suptitle(
            _title(
                result,
                f"means of hidden layers' inputs (shown up to {CUT:g}), 1,000 training images, eval mode",
            ),
            fontsize=10,
        )


def batch_size(result: Row, path: Path) -> None:
    """Final test accuracy against batch size, a line a variant; what failed is named."""
    with new_figure(path, 1, width=7, height=4.2) as (figure, axes):
        axis = axes[0, 0]
        groups = _groups(summarize(result["rows"], ("batch_size",)), "label")
        notes: list[tuple[Row, str]] = []
        for label, mine in groups.items():
            mine = sorted(mine, key=lambda g: g["batch_size"])
            there = [g for g in mine if g["n"]]
            axis.errorbar(
                [g["batch_size"] for g in there],
                [100 * g["mean"] for g in there],
                yerr=[100 * (g["std"] or 0.0) for g in there],
                color=VARIANT_COLORS[label], label=label, marker="o", capsize=3, linewidth=2,
            )  # fmt: skip
            notes += [(g, failures(g | {"partial": 0})) for g in mine if g["failed"]]
        _accuracy_axes(axis, result["rows"], "batch size")
        low = axis.get_ylim()[0]
        for height, (group, text) in enumerate(notes):
            color = VARIANT_COLORS[group["label"]]
            axis.plot(group["batch_size"], low, "x", color=color, markersize=10, clip_on=False)
            axis.annotate(
                f"{group['label']}: {text}", (group["batch_size"], low),
                xytext=(8 if group["batch_size"] <= 8 else -8, 8 + 12 * height),
                ha="left" if group["batch_size"] <= 8 else "right", textcoords="offset points", color=color,
                fontsize=8,
            )  # fmt: skip
        sizes = sorted({row["batch_size"] for row in result["rows"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        if result["rows"]:
            row = result["rows"][0]
            counts = sorted({g["n"] for mine in groups.values() for g in mine if g["n"]})
            seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
            note = f"{_network(row)}, {row['epochs']} epochs, {seeds} seed{'s' * (seeds != '1')}"
            figure.suptitle(_title(result, f"{note}; bars: standard deviation"), fontsize=10)


def table(result: Row, path: Path) -> None:
    """Test error without and with flips: dots with standard deviations, and the paper's numbers."""
    with new_figure(path, 1, width=6.5, height=4) as (figure, axes):
        axis = axes[0, 0]
        groups = summarize(result["rows"], ("flip",))
        labels = list(dict.fromkeys(group["label"] for group in groups))
        flips = list(dict.fromkeys(group["flip"] for group in groups))
        for index, label in enumerate(labels):
            color = VARIANT_COLORS[label]
            for group in (g for g in groups if g["label"] == label):
                at = flips.index(group["flip"]) + 0.18 * (index - (len(labels) - 1) / 2)
                first = label if group["flip"] == flips[0] else None
                if group["n"]:
                    error, std = 100 - 100 * group["mean"], 100 * (group["std"] or 0.0)
                    axis.errorbar(at, error, yerr=std, color=color, marker="o", capsize=4, label=first)
                    axis.annotate(
                        f"{error:.2f}", (at, error), xytext=(6, 4), textcoords="offset points", fontsize=8
                    )
                if group["failed"]:
                    axis.annotate(
                        failures(group), (at, 0.02), xycoords=("data", "axes fraction"), rotation=90, color=color,
                        fontsize=8,
                    )  # fmt: skip
                paper = PAPER_ERRORS.get((result["dataset"], group["flip"]), {}).get(label)
                if paper is not None:
                    name = f"{label.split(',')[0]}, as published" if first else None
                    axis.plot(at, paper, "D", markerfacecolor="none", color=color, label=name)
                    axis.annotate(
                        f"{paper:.2f}", (at, paper), xytext=(6, -10), textcoords="offset points", fontsize=8
                    )
        axis.set_xticks(range(len(flips)), ["flips" if flip else "no flips" for flip in flips])
        axis.set_xlim(-0.5, len(flips) - 0.5)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("test error (%)")
        axis.legend(frameon=False, fontsize=8)
        if result["rows"]:
            row = result["rows"][0]
            note = f"{_network(row)}, {row['epochs']} epochs; the paper's: nin, 200 epochs (SVHN 25)"
            figure.suptitle(_title(result, f"{note}; bars: standard deviation"), fontsize=10)


def activations(result: Row, path: Path) -> None:
    """Final test accuracy of each activation, best first: seeds, mean and standard deviation."""
    groups = summarize(result["rows"], ("activation",))
    groups.sort(key=lambda g: -1.0 if g["mean"] is None else g["mean"])
    with new_figure(path, 1, width=6.5, height=0.9 + 0.32 * max(4, len(groups))) as (figure, axes):
        axis = axes[0, 0]
        color = VARIANT_COLORS["normprop, recommended"]
        for at, group in enumerate(groups):
            if group["n"]:
                axis.plot(
                    [100 * v for v in group["finals"]], [at] * group["n"], ".", color=color, alpha=0.4
                )
                error = 100 * (group["std"] or 0.0)
                axis.errorbar(100 * group["mean"], at, xerr=error, marker="o", capsize=3, color=color)
            if failures(group):
                place = (0.02, at) if not group["n"] else (0.75, at)
                axis.annotate(failures(group), place, xycoords=("axes fraction", "data"), fontsize=8)
        axis.set_yticks(range(len(groups)), [group["activation"] for group in groups])
        axis.set_ylim(-0.6, len(groups) - 0.4)
        axis.set_xlabel("test accuracy (%)")
        if result["rows"]:
            row = result["rows"][0]
            note = f"{row['label']}, {_network(row)}, {row['epochs']} epochs; dots: seeds, bars: standard deviation"
            figure.suptitle(_title(result, note), fontsize=10)


def _against_lr(axis: Any, rows: Sequence[Row]) -> None:
    """Final accuracy against step size, a line a variant, band from the worst to the best seed."""
    failed: list[tuple[str, list[Row]]] = []
    for label, mine in _groups(summarize(rows, ("lr",)), "label").items():
        color = VARIANT_COLORS[label]
        there = sorted((g for g in mine if g["n"]), key=lambda g: g["lr"])
        at = [g["lr"] for g in there]
        axis.plot(at, [100 * g["mean"] for g in there], marker="o", color=color, label=label, linewidth=2)
        low, high = ([100 * end(g["finals"]) for g in there] for end in (min, max))
        axis.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        failed.append((label, [g for g in mine if g["failed"]]))
    _accuracy_axes(axis, rows, "peak step size")
    low, high = axis.get_ylim()
    step = 0.04 * (high - low)
    failed = [(label, groups) for label, groups in failed if groups]
    axis.set_ylim(low - step * len(failed), high)
    for height, (label, groups) in enumerate(failed, 1):
        for group in groups:
            count = sum(group["failed"].values())
            axis.plot(
                group["lr"], low - step * (height - 0.5), "x", color=VARIANT_COLORS[label], markersize=7
            )
            axis.annotate(
                str(count), (group["lr"], low - step * (height - 0.5)), xytext=(5, -3),
                textcoords="offset points", fontsize=7, color=VARIANT_COLORS[label],
            )  # fmt: skip
    if failed:
        axis.plot([], [], "x", color="black", label="diverged (number of seeds)")
    rates = sorted({row["lr"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()


def step_size(result: Row, path: Path) -> None:
    """Accuracy on held-out images against step size; what diverged is marked below."""
    with new_figure(path, 1, width=7, height=4.2) as (figure, axes):
        rows = result["rows"]
        if rows:
            _against_lr(axes[0, 0], rows)
            axes[0, 0].legend(frameon=False, fontsize=8)
            note = f"{_network(rows[0])}, {rows[0]['epochs']} epochs, one cycle"
            note += "; line: mean of the seeds that are ok, band: worst to best of them"
            figure.suptitle(_title(result, note), fontsize=10)


def beyond(result: Row, path: Path) -> None:
    """Above the selection of the step size, below test accuracy by epoch at it; a column a model."""
    columns = _groups(result["rows"], "model")
    with new_figure(path, max(1, len(columns)), 2, height=4.0) as (figure, axes):
        for column, rows in enumerate(columns.values()):
            above, below = axes[:, column]
            selection = [row for row in rows if row["stage"] == "selection"]
            final = [row for row in rows if row["stage"] == "final"]
            if selection:
                _against_lr(above, selection)
                above.legend(frameon=False, fontsize=7, loc="lower left")
                above.set_ylabel("held-out accuracy (%)")
            above.set_title(f"{_network(rows[0])}: choosing the step size", fontsize=10)
            for label, mine in _groups(final, "label").items():
                _curve(below, mine, f"{label}, step size {mine[0]['lr']:g}", color=VARIANT_COLORS[label])
            if final:
                _accuracy_axes(below, final, "epoch")
                below.legend(frameon=False, fontsize=7, loc="lower right")
        figure.suptitle(_title(result, f"above: band from worst to best seed; below: {BANDS}"), fontsize=10)


def speed(result: Row, path: Path) -> None:
    """Seconds an epoch, a group of bars a precision and mode, the paper's beside them."""
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    groups = _groups(rows, "precision", "compiled")
    with new_figure(path, 2, width=4.6) as (figure, axes):
        ours, paper = axes[0]
        papers = [{"label": label, "seconds_per_epoch": value} for label, value in PAPER_SECONDS.items()]
        modes = [(f"{p}{', compiled' * c}", mine) for (p, c), mine in groups.items()]
        for axis, bars in ((ours, modes), (paper, [("the paper: Titan X", papers)])):
            for at, (_, mine) in enumerate(bars):
                shown = [label for label in labels if any(row["label"] == label for row in mine)]
                for index, label in enumerate(shown):
                    seconds = next(row["seconds_per_epoch"] for row in mine if row["label"] == label)
                    place = at + 0.8 / len(shown) * (index - (len(shown) - 1) / 2)
                    name = label if at == 0 and axis is ours else None
                    axis.bar(place, seconds, 0.75 / len(shown), color=VARIANT_COLORS[label], label=name)
                    axis.annotate(
                        f"{seconds:.3g}", (place, seconds), xytext=(0, 2), textcoords="offset points", ha="center",
                        fontsize=8,
                    )  # fmt: skip
            axis.set_xticks(range(len(bars)), [name for name, _ in bars])
            axis.set_ylabel("seconds per epoch of training")
        ours.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.0))
        ours.set_ylim(top=1.35 * ours.get_ylim()[1])
        device = result["device"] if isinstance(result["device"], str) else ", ".join(result["device"])
        note = f"nin, batch size 50, 1,000 steps; {device}, {result['threads']} threads"
        figure.suptitle(f"{result['protocol']} protocol\n{note}", fontsize=10)


def jacobian(result: Row, path: Path) -> None:
    """Singular values beside 1.21; signal and gradient by depth; the error bound and what it bounds."""
    parts = _groups(result["rows"], "part")
    with new_figure(path, 3, width=4.6) as (figure, axes):
        left, middle, right = axes[0]
        kinds = _groups(parts["singular values"], "kind", "fan_in")
        styles = {"one input": "--", "mean over inputs": "-"}
        colors = dict(
            zip(_groups(parts["singular values"], "fan_in"), ("#00798c", "#d1495b"), strict=False)
        )
        edges = [0.05 * step for step in range(64)]
        for (kind, fan_in), rows in kinds.items():
            values = [value for row in rows for value in row["values"]]
            name = "at one input" if kind == "one input" else "root mean over inputs"
            left.hist(
                values, edges, density=True, histtype="step", color=colors[fan_in], linestyle=styles[kind],
                linewidth=1.8, label=f"fan-in {fan_in}, {name}",
            )  # fmt: skip
        expected = parts["singular values"][0]["expected"]
        left.axvline(expected, color="black", linewidth=1)
        left.annotate(f"{expected:.2f} ", (expected, 4.6), ha="right", fontsize=9)
        left.set_ylim(0, 5)  # the units that are off stand higher
        left.set_xlabel("singular value of a ReLU layer's Jacobian")
        left.set_ylabel("density (half of the units are off: at 0)")
        left.legend(frameon=False, fontsize=7, loc="upper right")
        shades = dict(
            zip(_groups(parts["depth"], "label"), ("#5b1a2e", "#edae49", "#d1495b"), strict=False)
        )
        for label, rows in _groups(parts["depth"], "label").items():
            for quantity, style in (("signal", "-"), ("gradient", "--")):
                for row in rows:
                    at = range(1, len(row[quantity]) + 1)
                    (line,) = middle.plot(at, row[quantity], style, color=shades[label], alpha=0.8)
                line.set_label(f"{quantity}, {label}")
        middle.axvline(9, color="black", linewidth=0.8, linestyle=":")
        middle.annotate(" 9 layers: the paper's depth", (9, 0.1), fontsize=8)
        middle.set_ylim(bottom=0.08)
        middle.set_yscale("log")
        middle.set_xlabel("layer")
        middle.set_ylabel("std of the signal; norm of the gradient")
        middle.legend(frameon=False, fontsize=7)
        for fan_in, color in ((1, "#00798c"), (9, "#d1495b")):
            rows = [row for row in parts["bound"] if row["fan_in"] == fan_in * row["width"]]
            for quantity, style in (("bound", "--"), ("actual", "-")):
                widths = _groups(rows, "width")
                means = [statistics.mean(row[quantity] for row in mine) for mine in widths.values()]
                name = f"{quantity}, fan-in {'= width' if fan_in == 1 else '9 x width'}"
                right.plot(list(widths), means, style, marker="o", color=color, label=name)
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xlabel("units of the layer")
        right.set_ylabel("covariance off the diagonal (Frobenius)")
        right.legend(frameon=False, fontsize=7)
        left.set_title("Jacobian of one layer", fontsize=10)
        middle.set_title(
            f"{len(parts['depth'][0]['signal'])} layers of {parts['depth'][0]['width']}", fontsize=10
        )
        right.set_title("canonical error bound (Prop. 1)", fontsize=10)
        figure.suptitle("random weights, Gaussian inputs, 3 seeds", fontsize=10)
