"""What rows of ``results.json`` come to: means over seeds, step sizes; failed runs are counted, never averaged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from normprop.recipes import Row

WITHIN = 0.05  # of a variant's best mean accuracy: a step size that is not too large


def best_lr(rows: Sequence[Row], label: str, model: str, needed: int) -> float | None:
    """The step size with the best mean held-out accuracy, no seed diverged; None until all is there.

    Args:
        rows: Of any stage.
        label: The variant.
        model: Its model.
        needed: Number of selection rows that must be finished.
    """
    mine = [r for r in rows if (r["label"], r["model"], r["stage"]) == (label, model, "selection")]
    mine = [r for r in mine if r["status"] != "partial"]
    if len(mine) < needed:
        return None
    groups = [g for g in summarize(mine, ("lr",)) if g["n"] and not g["failed"]]
    return max(groups, key=lambda g: g["mean"])["lr"] if groups else None


def largest_lr(rows: Sequence[Row], label: str) -> float | None:
    """The largest step size at which all seeds end within 5 points of the variant's best mean accuracy."""
    groups = summarize([r for r in rows if r["label"] == label], ("lr",))
    whole = [g for g in groups if g["n"] and not g["failed"] and not g["partial"]]
    bound = max((g["mean"] for g in whole), default=0.0) - WITHIN
    return max((g["lr"] for g in whole if min(g["finals"]) >= bound), default=None)


def final_accuracy(row: Row) -> float | None:
    """A fraction, after the last epoch; None unless the run is finished and ok."""
    return accuracies(row)[-1] if row["status"] == "ok" else None


def accuracies(row: Row) -> list[float]:
    """One an epoch: on test images, or on held-out training images, whichever the run looked at."""
    return row["test_accuracy"] if "test_accuracy" in row else row["validation_accuracy"]


def summarize(rows: Sequence[Row], by: Sequence[str] = ()) -> list[Row]:
    """One record a variant and setting: mean and std of the final accuracy over the seeds that are ok.

    Args:
        rows: Of finished and unfinished runs.
        by: Keys of the settings.

    Returns:
        ``label``, the settings, ``n``, ``mean`` (None if n is 0), ``std`` (None below 2), ``finals``
        (one a seed), ``failed`` (how many of each status that is neither ok nor partial) and
        ``partial`` (how many are not finished), in the order of the rows.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["label"], *(row.get(key) for key in by)), []).append(row)
    result = []
    for (label, *setting), mine in groups.items():
        finals = [accuracy for row in mine if (accuracy := final_accuracy(row)) is not None]
        failed: dict[str, int] = {}
        for row in mine:
            if row["status"] not in ("ok", "partial"):
                failed[row["status"]] = failed.get(row["status"], 0) + 1
        result.append(
            {
                "label": label,
                **dict(zip(by, setting, strict=True)),
                "n": len(finals),
                "mean": statistics.mean(finals) if finals else None,
                "std": statistics.stdev(finals) if len(finals) > 1 else None,
                "finals": finals,
                "failed": failed,
                "partial": sum(row["status"] == "partial" for row in mine),
            }
        )
    return result


def by_epoch(rows: Sequence[Row]) -> list[list[float]]:
    """The accuracies of each epoch that every seed has reached, over seeds that are ok or still run."""
    alive = [accuracies(row) for row in rows if row["status"] in ("ok", "partial")]
    return [list(values) for values in zip(*alive, strict=False)]


def failures(group: Row) -> str:
    """``"1 diverged, 1 not finished"``; empty if all of a group of :func:`summarize` are ok."""
    remarks = [f"{count} {status}" for status, count in group["failed"].items()]
    if group["partial"]:
        remarks.append(f"{group['partial']} not finished")
    return ", ".join(remarks)


def percent(mean: float | None, std: float | None, digits: int = 2) -> str:
    """``"84.10 % ± 0.32"``."""
    if mean is None:
        return "-"
    return f"{100 * mean:.{digits}f} %" + ("" if std is None else f" ± {100 * std:.{digits}f}")


def accuracy_table(rows: Sequence[Row], by: Sequence[str]) -> Table:
    """Mean and standard deviation over the seeds that are ok; those that are not are counted apart."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", *by):
        view.add_column(column.replace("_", " "))
    for column in ("accuracy", "n"):
        view.add_column(column, justify="right")
    view.add_column("remark")
    for group in summarize(rows, by):
        settings = [f"{v:g}" if isinstance(v, float) else str(v) for v in (group[key] for key in by)]
        accuracy = percent(group["mean"], group["std"])
        view.add_row(group["label"], *settings, accuracy, str(group["n"]), failures(group))
    return view


def largest_steps(rows: Sequence[Row]) -> Row:
    """:func:`largest_lr` of every variant."""
    labels = dict.fromkeys(row["label"] for row in rows)
    return {f"largest step size, {label}": largest_lr(rows, label) for label in labels}


def hidden_means(rows: Sequence[Row]) -> Row:
    """At the end of training, averages over layers and seeds: \\|mean of one unit\\|, \\|mean\\|, \\|var - 1\\|.

    The first is what the paper's figure 2 averages to 0.19 for NormProp and 0.33 for BatchNorm.
    """
    found: Row = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        records = [r for row in rows if row["label"] == label for r in row["hidden"]]
        if records:
            found[label] = {
                "unit": statistics.mean(abs(r["unit_mean"]) for r in records),
                "mean": statistics.mean(r["mean_error"] for r in records),
                "var": statistics.mean(r["var_error"] for r in records),
            }
    return found
