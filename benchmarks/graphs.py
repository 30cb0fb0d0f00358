"""Seconds that ``convert``, ``predict`` and ``fold`` of a large network take.

    python benchmarks/graphs.py               torchvision's ResNet-152 at 224 pixels, a minute
    python benchmarks/graphs.py --quick       its ResNet-18, once

Medians of n = ``rounds`` runs, each on a model of its own, random weights. Bar: each under 10 s.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import normprop
from normprop.recipes.results import environment, output_folder, write_json
from normprop.recipes.zoo import load_model

BAR_SECONDS = 10.0


def once(spec: str, image: int) -> dict[str, float]:
    """Seconds of each verb; ``fold`` proves itself at an input, both passes included."""
    torch.manual_seed(0)
    model, x = load_model(spec), torch.randn(1, 3, image, image)
    taken: dict[str, float] = {}

    def clock(name: str, start: float) -> None:
        taken[name] = time.perf_counter() - start

    start = time.perf_counter()
    converted = normprop.convert(model, strict=True, example=x).model
    clock("convert", start)
    start = time.perf_counter()
    normprop.predict(converted, x)
    clock("predict", start)
    converted.eval()
    start = time.perf_counter()
    normprop.fold(converted)
    clock("fold", start)
    start = time.perf_counter()
    normprop.fold(converted, verify=x)
    clock("fold, verified", start)
    return taken


def graphs(spec: str, image: int, rounds: int, out: Path) -> dict[str, Any]:
    """Run ``rounds`` times; graphs.json after each."""
    result: dict[str, Any] = {"model": spec, "image": image, "batch": 1, **environment("cpu")}
    runs: list[dict[str, float]] = []
    started = time.perf_counter()
    with output_folder(out, keep=["graphs.json"]):
        for number in range(1, rounds + 1):
            runs.append(once(spec, image))
            rows = [
                {
                    "verb": verb,
                    "seconds": statistics.median(run[verb] for run in runs),
                    "all": [run[verb] for run in runs],
                    "in_bar": statistics.median(run[verb] for run in runs) < BAR_SECONDS,
                }
                for verb in runs[0]
            ]
            result |= {"rounds": number, "bar_seconds": BAR_SECONDS, "rows": rows}
            write_json(out / "graphs.json", result)
            left = (time.perf_counter() - started) / number * (rounds - number)
            print(f"\r{f'{number}/{rounds} {spec} ({left:.0f} s left)':<79}", end="", flush=True)
        print()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, help="runs (3; quick: 1)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "graphs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    spec = "torchvision:resnet18" if arguments.quick else "torchvision:resnet152"
    result = graphs(spec, 224, arguments.rounds or (1 if arguments.quick else 3), arguments.out)
    for row in result["rows"]:
        print(f"{row['verb']}: {row['seconds']:.2f} s")


if __name__ == "__main__":
    main()
