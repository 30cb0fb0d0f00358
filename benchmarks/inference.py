"""Inference after ``normprop.fold``: time as a ratio to a plain convolution + activation network.

    python benchmarks/inference.py            about 4 minutes on 2 CPU cores
    python benchmarks/inference.py --quick    quarter-width networks, few rounds

The plain network has the same shapes, biases included, and no normalisation. Eager, eval, without
gradients, channels_last, contenders interleaved round by round; ratios are medians of n = ``rounds``
paired ones. ``plain, again`` is a second copy of the plain network: how far its ratio is from 1 is what
the machine's noise can do. A folded network whose output differs from its model's is not timed.
Bar: 1.00 +- 0.02.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normprop
from normprop.recipes import Row
from normprop.recipes.bench import in_turn, paired
from normprop.recipes.models import COLORS, build, without_norm
from normprop.recipes.results import environment, output_folder, write_json
from normprop.recipes.train import RULES
from normprop.recipes.zoo import load_model

BAR = (0.98, 1.02)
TOLERANCE = 1e-4  # of the folded output in float32, relative to the largest number in the model's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One comparison; ``model`` is a recipe's, or ``torchvision:NAME``; ``width`` is for recipes."""

    model: str
    batch: int
    precision: str = "fp32"
    image: int = 32
    width: float = 1.0


CASES = [
    *(Case("nin", batch, precision) for precision in DTYPES for batch in (1, 128)),
    *(Case("resnet18", batch) for batch in (1, 128)),
    *(Case("torchvision:resnet18", batch, image=96) for batch in (1, 16)),
]
QUICK = [
    *(Case("nin", batch, precision, width=0.25) for precision in DTYPES for batch in (1, 8)),
    Case("resnet18", 8, width=0.25),
    Case("torchvision:resnet18", 1, image=96),
]


def networks(case: Case) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The plain network, and those to fold by the rule they follow; random weights."""
    torch.manual_seed(0)
    if ":" in case.model:
        source = load_model(case.model)
        example = torch.empty(1, 3, case.image, case.image, device="meta")
        converted = {
            label: normprop.convert(source, rule, example=example).model for label, rule in RULES.items()
        }
        return without_norm(source), converted
    shape = (3, case.image, case.image)
    made = {
        label: build(case.model, shape, 10, "normprop", rule, case.width) for label, rule in RULES.items()
    }
    return build(case.model, shape, 10, "none", width=case.width), made


def seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """One forward pass."""
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


@torch.inference_mode()
def timed(
    contenders: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds a pass, interleaved, after two passes each that do not count."""
    calls = {label: (lambda run=run: seconds(run, x)) for label, run in contenders.items()}
    in_turn(calls, 2)
    return in_turn(calls, rounds)


def compare(case: Case, rounds: int) -> list[Row]:
    """A row a contender, ``plain`` first: ``ms``, ratio to plain with quartiles, ``error`` of the fold."""
    plain, models = networks(case)
    torch.manual_seed(1)
    x = torch.randn(case.batch, 3, case.image, case.image)
    ready = {"plain": plain.eval(), "plain, again": copy.deepcopy(plain).eval()}
    rows: dict[str, Row] = {name: asdict(case) | {"contender": name, "status": "ok"} for name in ready}
    for label, model in models.items():
        name = f"folded, {label}"
        with torch.no_grad():
            folded, expected = normprop.fold(model.eval()), model(x)
            error = float((folded(x) - expected).abs().max() / expected.abs().max())
        fine = error <= TOLERANCE
        status = "ok" if fine else f"wrong: {error:.2g} from the model's output"
        rows[name] = asdict(case) | {"contender": name, "status": status, "error": error}
        if fine:
            ready[name] = folded.eval()
    dtype = DTYPES[case.precision]
    x = x.to(dtype).to(memory_format=torch.channels_last)
    ready = {name: net.to(dtype).to(memory_format=torch.channels_last) for name, net in ready.items()}
    # A pass of one image is short: more rounds for the same noise.
    rounds *= 5 if case.batch == 1 else 1
    times = timed(ready, x, rounds)
    for name, mine in times.items():
        rows[name] |= {
            "rounds": rounds,
            "ms": 1000 * statistics.median(mine),
            **paired(mine, times["plain"]),
            "operations": operations(ready[name]),
        }
        rows[name]["in_bar"] = BAR[0] <= rows[name]["ratio"] <= BAR[1]
    return list(rows.values())


def operations(net: nn.Module) -> dict[str, int]:
    """Modules and functions that a pass calls, by name: what is left to explain a ratio."""
    counts: dict[str, int] = {}
    for node in normprop.graph.trace.trace(net).graph.nodes:
        if node.op == "call_module":
            name = type(net.get_submodule(str(node.target))).__name__
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else node.target.__name__
        else:
            continue
        counts[name] = counts.get(name, 0) + 1
    return counts


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratio to the plain network with quartiles, a line a case and rule; the bar shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    mine = [row for row in rows if row["contender"] != "plain" and row["status"] == "ok"][::-1]
    colors = {"plain, again": COLORS["none"], "folded, paper": COLORS["group"]}
    colors |= {"folded, recommended": COLORS["normprop"]}
    figure, axis = plt.subplots(figsize=(6.4, 1 + 0.24 * len(mine)), layout="constrained")
    axis.axvspan(*BAR, color="#7a7a7a", alpha=0.2, label="bar: 1.00 +- 0.02")
    for height, row in enumerate(mine):
        low, high = row["quartiles"]
        color = colors[row["contender"]]
        axis.plot([low, high], [height, height], color=color, linewidth=2)
        axis.plot(row["ratio"], height, "o", color=color)
    names = [f"{r['model']} {r['precision']}, batch {r['batch']}: {r['contender']}" for r in mine]
    axis.set_yticks(range(len(mine)), names, fontsize=7)
    axis.set_xlabel("time of a pass / plain network (median, quartiles)")
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def inference(cases: Sequence[Case], rounds: int, out: Path) -> dict[str, Any]:
    """Run all cases; inference.json after each, inference.png at the end."""
    rows: list[Row] = []
    result = {"bar": list(BAR), "rows": rows, **environment("cpu")}
    cost = [case.width**2 * (case.batch + 8) * case.image**2 for case in cases]
    started = time.perf_counter()
    with output_folder(out, keep=["inference.json"]):
        for number, case in enumerate(cases, 1):
            rows += compare(case, rounds)
            write_json(out / "inference.json", result)
            left = (time.perf_counter() - started) * (sum(cost) / sum(cost[:number]) - 1)
            name = f"{case.model} {case.precision}, batch {case.batch}"
            print(f"\r{f'{number}/{len(cases)} {name} ({left:.0f} s left)':<79}", end="", flush=True)
        print()
        plot(rows, out / "inference.png")
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    text = ["| network | batch | contender | ms | ratio | quartiles |", "|---|---|---|---|---|---|"]
    for row in rows:
        start = (
            f"| {row['model']} x{row['width']:g} {row['precision']} | {row['batch']} | {row['contender']} |"
        )
        if row["status"] != "ok":
            text.append(f"{start} | {row['status']} | |")
            continue
        low, high = row["quartiles"]
        text.append(f"{start} {row['ms']:.2f} | {row['ratio']:.3f} | {low:.3f}-{high:.3f} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, help="timed rounds a case, five times as many at batch 1 (30; quick: 5)"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "inference")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (5 if arguments.quick else 30)
    result = inference(QUICK if arguments.quick else CASES, rounds, arguments.out)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
