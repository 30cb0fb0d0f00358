"""Seconds an epoch of CIFAR-10 takes in the paper's network: NormProp against BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normprop.recipes.bench import Case, measure

BATCH_SIZE = 50
STEPS = 50_000 // BATCH_SIZE
ROUNDS = {"reduced": 10, "full": 100}
PAPER_SECONDS = {"normprop, paper": 84.0, "batch": 96.0}


def measure_speed(protocol: str, device: str, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of steps timed in turn (``bench.measure``), full-width NIN at batch size 50.

    Args:
        protocol: ``"reduced"``: 10 rounds, eager; ``"full"``: 100 rounds, eager and compiled.
        device: ``"cpu"`` or ``"cuda"``.
        report: Told what is going on.

    Returns:
        The rows of ``bench.measure`` with ``label`` and ``seconds_per_epoch``: the median step's
        time times 1,000 steps, loading and evaluation excluded.
    """
    rows = []
    for compiled in (False, True) if protocol == "full" else (False,):
        for precision in ("fp32", "bf16"):
            for rule, norms in (("paper", ("normprop", "batch")), ("recommended", ("normprop",))):
                report(f"{precision}, {'compiled' if compiled else 'eager'}, {rule}")
                case = Case("nin", 1.0, BATCH_SIZE, precision, compiled, rule=rule)
                for row in measure(case, norms, ROUNDS.get(protocol, 1), device):
                    if row["norm"] == "none" and rule == "recommended":
                        continue  # measured with the paper's already
                    label = f"normprop, {rule}" if row["norm"] == "normprop" else row["norm"]
                    seconds = row["ms"]["step"] * STEPS / 1000 if row["status"] == "ok" else None
                    rows.append({"label": label, **row, "seconds_per_epoch": seconds})
    return rows
