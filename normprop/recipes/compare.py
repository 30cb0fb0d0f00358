"""One model under several norms, batch sizes and seeds: a live table, results.json and a figure."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from normprop.recipes import InputError, Row, check_count
from normprop.recipes.data import ImageData
from normprop.recipes.models import COLORS, build, check_norms
from normprop.recipes.results import environment, new_figure, output_folder, write_json
from normprop.recipes.train import RULES, Run, fit


def compare(
    run: Run,
    data: ImageData,
    norms: Sequence[str],
    batch_sizes: Sequence[int],
    seeds: int,
    out: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every combination, one after the other; an interrupted comparison goes on where it was.

    Args:
        run: What the runs share; norm, batch size and seed are replaced.
        data: On what.
        norms: Names from ``NORMS``.
        batch_sizes: At least 1 each.
        seeds: How many, counted up from ``run.seed``.
        out: Folder for ``results.json`` (after every run) and ``compare.png``.
        console: Where the table is shown; None for nowhere.

    Returns:
        What ``results.json`` holds: ``{"rows": [...], "status", "run", versions, device, commit}``.

    Raises:
        InputError: For an unknown norm, a number below 1, or a folder with another comparison.
    """
    check_norms(norms)
    if not norms or not batch_sizes:
        raise InputError("--norms and --batch-sizes need at least one value each, separated by commas")
    check_count("--seeds", seeds)
    runs = [
        replace(run, norm=norm, batch_size=batch_size, seed=run.seed + seed)
        for seed in range(seeds)
        for batch_size in batch_sizes
        for norm in norms
    ]
    for norm in norms:  # refuse what cannot be built before anything is written
        build(run.model, data.shape, data.classes, norm, RULES[run.rule], run.width, run.activation)
    shared = {k: v for k, v in asdict(run).items() if k not in ("norm", "batch_size", "seed")}
    shared |= {
        "dataset": data.name,
        "test_images": len(data.test_y),
        "norms": list(norms),
        "batch_sizes": list(batch_sizes),
    }
    shared |= {"seeds": [run.seed + seed for seed in range(seeds)]}
    rows = _rows_so_far(out, shared)
    result = {"rows": rows, "status": "partial", "run": shared, **environment()}

    with output_folder(out), _LiveTable(console, runs, rows) as table:
        for one in runs[len(rows) :]:
            table.running(one)
            outcome = fit(one, data, report=table.epoch)
            rows.append(
                {
                    "norm": one.norm,
                    "batch_size": one.batch_size,
                    "seed": one.seed,
                    "status": outcome.status,
                    "reason": outcome.reason,
                    "lr": one.peak_lr,
                    "test_accuracy": outcome.test_accuracy,
                    "seconds_per_epoch": outcome.seconds_per_epoch,
                    "epochs": outcome.history,
                }
            )
            write_json(out / "results.json", result)
            table.finished()
        plot(result, out / "compare.png")
        result["status"] = "complete"
        write_json(out / "results.json", result)
    return result


def _rows_so_far(out: Path, shared: dict[str, Any]) -> list[Row]:
    """Rows of the same comparison, if it was interrupted; a finished one starts anew."""
    path = out / "results.json"
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        known = {name: value for name, value in asdict(Run()).items() if name in shared} | before["run"]
        same, complete, rows = known == shared, before["status"] == "complete", before["rows"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"--out {out}: results.json there is of something else; choose another --out"
        ) from error
    if not same:
        raise InputError(f"--out {out} holds another comparison; choose another --out, or delete it")
    return [] if complete else rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a norm and batch size: mean and standard deviation over the seeds that are ok."""
    keys = dict.fromkeys((row["batch_size"], row["norm"]) for row in rows)
    result = []
    for batch_size, norm in keys:
        group = [r for r in rows if (r["batch_size"], r["norm"]) == (batch_size, norm)]
        accuracies = [r["test_accuracy"] for r in group if r["status"] == "ok"]
        seconds = [r["seconds_per_epoch"] for r in group if r["seconds_per_epoch"] is not None]
        failed = next((r for r in group if r["status"] != "ok"), None)
        result.append(
            {
                "norm": norm,
                "batch_size": batch_size,
                "n": len(accuracies),
                "status": failed["status"] if failed else "ok",
                "reason": failed["reason"] if failed else "",
                "mean": statistics.mean(accuracies) if accuracies else None,
                "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "seconds_per_epoch": statistics.median(seconds) if seconds else None,
            }
        )
    return result


def table(rows: Sequence[Row], title: str) -> Table:
    """The comparison as people read it."""
    view = Table(title=title, title_justify="left")
    view.add_column("batch size", justify="right")
    view.add_column("norm")
    view.add_column("test accuracy", justify="right")
    view.add_column("s/epoch", justify="right")
    view.add_column("remark")
    last = None
    for row in summary(rows):
        accuracy = "-" if row["mean"] is None else f"{100 * row['mean']:.1f} %"
        if row["std"] is not None:
            accuracy += f" ± {100 * row['std']:.1f}"
        seconds = "-" if row["seconds_per_epoch"] is None else f"{row['seconds_per_epoch']:.2f}"
        remark = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        if last is not None and last != row["batch_size"]:
            view.add_section()
        last = row["batch_size"]
        view.add_row(str(row["batch_size"]), row["norm"], accuracy, seconds, remark)
    return view


class _LiveTable:
    """The finished rows, the run that is on, and the time that is left."""

    def __init__(self, console: Console | None, runs: Sequence[Run], rows: list[Row]) -> None:
        self.console, self.runs, self.rows = console, runs, rows
        self.started, self.already = time.perf_counter(), len(rows)
        self.note = self.left = ""
        self.live: Live | None = None

    def __enter__(self) -> _LiveTable:
        if self.console is not None and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
        if self.console is not None and error[0] is None:
            self.console.print(table(self.rows, self._title()))

    def _title(self) -> str:
        run = self.runs[0]
        return (
            f"{run.model}, {run.epochs} epochs, {len(self.rows)} of {len(self.runs)} runs done{self.note}"
        )

    def running(self, run: Run) -> None:
        self.run = run
        self._show("")

    def epoch(self, history: list[Row]) -> None:
        done = len(history)
        self._show(f", epoch {done} of {self.run.epochs}: {100 * history[-1]['test_accuracy']:.1f} %")
        # Steps, not runs, take the time: small batches make many of them.
        share = done / self.run.epochs
        finished = sum(1 / r["batch_size"] for r in self.rows[self.already :]) + share / self.run.batch_size
        ahead = sum(1 / r.batch_size for r in self.runs[len(self.rows) :]) - share / self.run.batch_size
        left = (time.perf_counter() - self.started) / finished * ahead
        self.left = f", about {max(1, round(left))} s left"

    def _show(self, progress: str) -> None:
        self.note = f"; now {self.run.norm} at batch {self.run.batch_size}{progress}{self.left}"
        if self.live is not None:
            self.live.update(table(self.rows, self._title()))

    def finished(self) -> None:
        self.note = ""
        if self.console is not None and self.live is None:
            row = self.rows[-1]
            accuracy = (
                row["status"] if row["test_accuracy"] is None else f"{100 * row['test_accuracy']:.1f} %"
            )
            self.console.print(
                f"{len(self.rows)} of {len(self.runs)}: {row['norm']}, batch {row['batch_size']}, "
                f"seed {row['seed']}: {accuracy}{self.left}"
            )


def _error(row: Row, test_images: int) -> float:
    """Standard deviation over the seeds; for one seed the standard error that the test set's size leaves."""
    if row["std"] is not None:
        return float(row["std"])
    return math.sqrt(row["mean"] * (1 - row["mean"]) / test_images)


def plot(result: dict[str, Any], path: Path) -> None:
    """Test accuracy and seconds an epoch against batch size, a line a norm; what cannot train is named.

    Args:
        result: What :func:`compare` returns.
        path: The PNG file.
    """
    rows = summary(result["rows"])
    run = result["run"]
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    with new_figure(path, 2) as (figure, axes):
        left, right = axes[0]
        sizes = sorted({row["batch_size"] for row in rows})
        for norm in norms:
            mine = [row for row in rows if row["norm"] == norm]
            ok = sorted((r for r in mine if r["mean"] is not None), key=lambda r: r["batch_size"])
            style = {"marker": "o", "color": COLORS[norm], "label": norm, "linewidth": 2}
            at = [row["batch_size"] for row in ok]
            errors = [100 * _error(row, run["test_images"]) for row in ok]
            left.errorbar(at, [100 * row["mean"] for row in ok], yerr=errors, capsize=3, **style)
            right.plot(at, [row["seconds_per_epoch"] for row in ok], **style)
        bottom, top = left.get_ylim()
        left.set_ylim(min(bottom, top - 10), top)  # small differences should look small
        low = left.get_ylim()[0]
        failed = [row for row in rows if row["mean"] is None]
        for height, row in enumerate(failed):
            left.plot(row["batch_size"], low, "x", color=COLORS[row["norm"]], markersize=10, clip_on=False)
            left.annotate(
                f" {row['norm']}: {row['status']}",
                (row["batch_size"], low),
                xytext=(6, 8 + 12 * height),
                textcoords="offset points",
                color=COLORS[row["norm"]],
                fontsize=9,
            )
        for axis, label in ((left, "test accuracy (%)"), (right, "seconds per epoch of training")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_xlabel("batch size")
            axis.set_ylabel(label)
        right.set_yscale("log")
        right.legend(frameon=False)
        seeds = len(run["seeds"])
        bars = (
            "bars: standard deviation"
            if seeds > 1
            else f"bars: standard error of {run['test_images']} test images"
        )
        plural = "s" if seeds > 1 else ""
        figure.suptitle(
            f"{run['model']} on {run['dataset']}, {run['epochs']} epochs, {seeds} seed{plural} ({bars})",
            fontsize=11,
        )
