"""What is known about each node of a network, predicted or measured, as a table, a figure or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
