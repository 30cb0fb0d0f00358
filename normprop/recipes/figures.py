"""Tables and figures of the claims, from the rows of ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from normprop.recipes.claims import Claim, largest_lr, summarize

Row = dict[str, Any]


def findings(claim: Claim, rows: Sequence[Row]) -> dict[str, Any]:
    """What a claim comes to in a number a variant; empty for most."""
    if claim.name != "step-size":
        return {}
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return {f"largest step size, {label}": largest_lr(rows, label) for label in labels}


def table(claim: Claim, rows: Sequence[Row]) -> Table:
    """Mean and standard deviation over the seeds that are ok; those that are not are counted apart."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", *claim.by):
        view.add_column(column.replace("_", " "))
    view.add_column("accuracy", justify="right")
    view.add_column("n", justify="right")
    view.add_column("remark")
    for group in summarize(rows, claim.by):
        accuracy = "-" if group["mean"] is None else f"{100 * group['mean']:.2f} %"
        if group["std"] is not None:
            accuracy += f" ± {100 * group['std']:.2f}"
        remarks = [f"{count} {status}" for status, count in group["failed"].items()]
        if group["partial"]:
            remarks.append(f"{group['partial']} not finished")
        settings = [
            f"{value:g}" if isinstance(value, float) else str(value)
            for value in (group[key] for key in claim.by)
        ]
        view.add_row(group["label"], *settings, accuracy, str(group["n"]), ", ".join(remarks))
    return view


def draw(claim: Claim, result: Row, path: Path) -> None:
    """The claim's figure."""
