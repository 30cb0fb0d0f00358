"""Seconds an epoch of CIFAR-10 takes in the paper's network: NormProp against BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from normprop.recipes import Row
from normprop.recipes.bench import Case, measure

BATCH_SIZE = 50
STEPS = 50_000 // BATCH_SIZE
PRECISIONS = {"reduced": ("fp32",), "full": ("fp32", "bf16")}
ROUNDS = {"reduced": 5, "full": 100}
PAPER_SECONDS = {"normprop, paper": 84.0, "batch": 96.0}


def measure_speed(protocol: str, device: str, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of steps timed in turn (``bench.measure``), full-width NIN at batch size 50.

    Args:
        protocol: ``"reduced"``: 5 rounds, eager, fp32; ``"full"``: 100 rounds, eager and compiled, bf16 too.
        device: ``"cpu"`` or ``"cuda"``.
        report: Told what is going on.

    Returns:
        The rows of ``bench.measure`` with ``label`` and ``seconds_per_epoch``: the step's paired ratio
        to no norm, times the median step without norm, times 1,000 steps; so that a machine that
        slows down in between slows all alike. Loading and evaluation are not in it.
    """
    rows: list[Row] = []
    for compiled in (False, True) if protocol == "full" else (False,):
        for precision in PRECISIONS.get(protocol, ("fp32",)):
            report(f"{precision}, {'compiled' if compiled else 'eager'}")
            mine: list[Row] = []
            for rule, norms in (("paper", ("normprop", "batch")), ("recommended", ("normprop",))):
                case = Case("nin", 1.0, BATCH_SIZE, precision, compiled, rule=rule)
                for row in measure(case, norms, ROUNDS.get(protocol, 1), device):
                    label = f"normprop, {rule}" if row["norm"] == "normprop" else row["norm"]
                    if label not in [other["label"] for other in mine]:
                        mine.append({"label": label, **row})
            ok = {row["label"]: row for row in mine if row["status"] == "ok"}
            for row in mine:
                known = row["label"] in ok and "none" in ok
                seconds = row["ratio"] * ok["none"]["ms"]["step"] * STEPS / 1000 if known else None
                rows.append(row | {"seconds_per_epoch": seconds})
    return rows


def speed_table(rows: Sequence[Row], _: Sequence[str]) -> Table:
    """Seconds an epoch, milliseconds a step, and its median paired ratio to no norm."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", "setting"):
        view.add_column(column)
    for column in ("s/epoch", "ms/step", "to none"):
        view.add_column(column, justify="right")
    for row in rows:
        setting = f"{row['precision']}, {'compiled' if row['compiled'] else 'eager'}"
        if row["status"] != "ok":
            view.add_row(row["label"], setting, row["status"])
            continue
        numbers = (f"{row['seconds_per_epoch']:.1f}", f"{row['ms']['step']:.2f}", f"{row['ratio']:.3f}")
        view.add_row(row["label"], setting, *numbers)
    return view


def speed_findings(rows: Sequence[Row]) -> Row:
    """Seconds an epoch of NormProp over BatchNorm's; the paper: 84 / 96 = 0.875."""
    found = {}
    seconds = {(r["precision"], r["compiled"], r["label"]): r["seconds_per_epoch"] for r in rows}
    for (precision, compiled, label), value in seconds.items():
        batch = seconds.get((precision, compiled, "batch"))
        if label.startswith("normprop") and value and batch:
            mode = "compiled" if compiled else "eager"
            found[f"{label} / batch, {precision}, {mode}"] = value / batch
    return found
