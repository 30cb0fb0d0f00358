"""Second-order NormProp on a quarter-width NIN: n = 3 seeds a variant and step size, about 25 s each on one core.

    python experiments/second-order/run.py --dataset cifar10

Evaluated on held-out training images; the test set is not looked at. Runs that results.json holds already are
not run again. ``--long`` adds 10 epochs of all images that are not held out, one seed, second order and recommended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from second_order import attach_second_order
from torch import Tensor, nn

import normprop
from normprop.recipes import InputError, Row
from normprop.recipes.data import ImageData, load, subset
from normprop.recipes.figures import VARIANT_COLORS
from normprop.recipes.hidden import hidden_statistics
from normprop.recipes.models import build
from normprop.recipes.results import environment, output_folder, write_json
from normprop.recipes.summary import accuracy_table, summarize

HERE = Path(__file__).parent
SAME_RULE = normprop.NormRule(constants="affine", gain=1.0)
VARIANTS: dict[str, tuple[str, normprop.NormRule | None]] = {
    "second order": ("normprop", SAME_RULE),
    "same rule, first order": ("normprop", SAME_RULE),
    "recommended": ("normprop", normprop.RECOMMENDED),
    "batch": ("batch", None),
}
COLORS = {
    "second order": VARIANT_COLORS["normprop, recommended, whitened"],
    "same rule, first order": VARIANT_COLORS["group"],
    "recommended": VARIANT_COLORS["normprop, recommended"],
    "batch": VARIANT_COLORS["batch"],
}
SHARED = {
    "model": "nin",
    "width": 0.25,
    "batch_size": 100,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "validation": 5000,
}
SHORT = {"protocol": "short", "epochs": 2, "train_images": 10_000}
LONG = {"protocol": "long", "epochs": 10, "train_images": None}
BY = ("protocol", "lr")


def plan(seeds: int, long: bool) -> list[Row]:
    """What to run, seed by seed, so that what is there early covers all variants."""
    runs = [
        {"label": label, "lr": lr, "seed": seed} | SHORT
        for seed, lr, label in product(range(seeds), (0.2, 0.8), VARIANTS)
    ]
    if long:
        runs += [{"label": label, "lr": 0.2, "seed": 0} | LONG for label in ("second order", "recommended")]
    return [
        run | {"key": f"{run['protocol']}-{run['label']}-lr{run['lr']}-seed{run['seed']}"} for run in runs
    ]


def standardized(data: ImageData) -> tuple[Tensor, Tensor]:
    """Training and held-out images with each colour's mean 0 and variance 1 over the training images."""
    x, held = data.train_x.float(), data.test_x.float()
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    return tuple(((t - mean) / std).contiguous(memory_format=torch.channels_last) for t in (x, held))  # type: ignore


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """A fraction, in eval mode."""
    net.eval()
    right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    net.train()
    return right / len(y)


def train(run: Row, data: ImageData) -> Row:
    """One run; what ``results.json`` says of it."""
    x, held = standardized(data)
    norm, rule = VARIANTS[run["label"]]
    torch.manual_seed(run["seed"])
    net = build("nin", data.shape, data.classes, norm, rule or normprop.RECOMMENDED, SHARED["width"])
    net = net.to(memory_format=torch.channels_last)
    groups = normprop.param_groups(net, weight_decay=SHARED["weight_decay"])
    optimizer = torch.optim.SGD(groups, lr=run["lr"], momentum=SHARED["momentum"])
    settings: Row = {"trust_radius": None, "refresh_every": None}
    if rule is not None:
        settings["trust_radius"] = 0.01
        normprop.attach_projection(optimizer, net, trust_radius=settings["trust_radius"])
    if run["label"] == "second order":
        settings["refresh_every"] = 20
        attach_second_order(optimizer, net, x, settings["refresh_every"])
    size = SHARED["batch_size"]
    steps = len(x) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=run["lr"], total_steps=run["epochs"] * steps, pct_start=0.25, cycle_momentum=False
    )
    losses, accuracies, spent = [], [], 0.0
    status, reason = "ok", None
    for epoch in range(run["epochs"]):
        start, total = time.process_time(), 0.0
        for index in torch.randperm(len(x))[: steps * size].split(size):
            with torch.autocast("cpu", torch.bfloat16):
                output = net(x[index])
            loss = F.cross_entropy(output.float(), data.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        spent += time.process_time() - start
        if not math.isfinite(total):
            status, reason = "diverged", f"loss not finite in epoch {epoch + 1}"
            break
        losses.append(round(total / steps, 5))
        accuracies.append(accuracy(net, held, data.test_y))
        print(
            f"  epoch {epoch + 1}: loss {losses[-1]:.3f}, held-out {100 * accuracies[-1]:.1f} %", flush=True
        )
    return {
        "key": run["key"],
        "label": run["label"],
        "status": status,
        "reason": reason,
        "norm": norm,
        "rule": None if rule is None else vars(rule),
        **{key: run[key] for key in ("protocol", "lr", "seed", "epochs")},
        **SHARED,
        **settings,
        "train_images": len(x),
        "precision": "bf16 autocast, channels_last",
        "validation_accuracy": accuracies,
        "train_loss": losses,
        "cpu_ms_per_step": round(1000 * spent / (max(1, len(losses) + (status != "ok")) * steps), 1),
        "hidden": hidden_statistics(net, held[:500])[-3:],
    }


def result(rows: list[Row], planned: list[Row], dataset: str, made_by: Row) -> Row:
    """What ``results.json`` holds."""
    finished = sum(run["key"] in {row["key"] for row in rows} for run in planned)
    return {
        "claim": "second-order",
        "paper": "not in the paper: unit variance from propagated covariances, not from independence",
        "protocol": {
            **SHARED,
            "runs": [SHORT, LONG],
            "trust_radius": 0.01,
            "evaluated on": "held-out training images",
        },
        "status": "complete" if finished == len(planned) else "partial",
        "dataset": dataset,
        **made_by,
        "planned": len(planned),
        "finished": finished,
        "summary": summarize(rows, BY),
        "rows": rows,
    }


def markdown(found: Row) -> Iterator[str]:
    """The table of the README."""
    yield "| variant | step size | epochs of images | n | held-out accuracy, mean | std | \\|mean\\|, var before the last layer | ms a step |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|---|"
    for group in found["summary"]:
        mine = [r for r in found["rows"] if all(r[key] == group[key] for key in ("label", *BY))]
        alive = [r for r in mine if r["hidden"]]

        def mean(values: list[float]) -> str:
            return f"{sum(values) / len(values):.2f}" if values else "-"

        hidden = ", ".join(mean([r["hidden"][-1][key] for r in alive]) for key in ("mean_error", "var"))
        ms = sum(r["cpu_ms_per_step"] for r in mine) / len(mine)
        score = "diverged" if group["mean"] is None else f"{100 * group['mean']:.1f} %"
        std = "-" if group["std"] is None else f"{100 * group['std']:.1f}"
        amount = f"{mine[0]['epochs']} of {mine[0]['train_images']:,}"
        cells = (group["label"], group["lr"], amount, group["n"], score, std, hidden, f"{ms:.0f}")
        yield "| " + " | ".join(map(str, cells)) + " |"


def draw(found: Row, path: Path) -> None:
    """Accuracy by step size, a dot a seed; by epoch where there are long runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    long = [row for row in found["rows"] if row["protocol"] == "long" and row["validation_accuracy"]]
    figure, axes = plt.subplots(
        1, 1 + bool(long), figsize=(5.5 + 4 * bool(long), 3.8), layout="constrained", squeeze=False
    )
    axis = axes[0, 0]
    for place, label in enumerate(VARIANTS):
        shift = 0.16 * (place - 1.5)
        groups = [
            g for g in found["summary"] if g["label"] == label and g["protocol"] == "short" and g["n"]
        ]
        for group in groups:
            at = (0.2, 0.8).index(group["lr"]) + shift
            axis.plot(
                [at] * group["n"], [100 * v for v in group["finals"]], "o", color=COLORS[label], alpha=0.6
            )
            axis.plot([at - 0.06, at + 0.06], [100 * group["mean"]] * 2, color=COLORS[label], linewidth=2.5)
        axis.plot([], [], "o-", color=COLORS[label], label=label)
    axis.set_xticks([0, 1], ["0.2", "0.8"])
    axis.set_xlabel("peak step size")
    axis.set_ylabel("accuracy on 5,000 held-out\ntraining images (%)")
    axis.set_title(
        f"{found['dataset']}, quarter-width NIN, 2 epochs of 10,000 images\na dot a seed, bar: their mean",
        fontsize=9,
    )
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    for row in long:
        accuracies = [100 * v for v in row["validation_accuracy"]]
        axes[0, 1].plot(
            range(1, len(accuracies) + 1), accuracies, "o-", color=COLORS[row["label"]], label=row["label"]
        )
        axes[0, 1].set_title(f"{row['train_images']:,} images, step size {row['lr']}, one seed", fontsize=9)
    if long:
        axes[0, 1].set_xlabel("epoch")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(found: Row, out: Path) -> None:
    """The figure, the README's table, and the table for people."""
    draw(found, out / "figure.png")
    readme = out / "README.md"
    if readme.exists():
        begin, end = "<!-- table: run.py writes it -->\n", "<!-- end -->"
        head, _, rest = readme.read_text().partition(begin)
        if end in rest:
            table = "".join(line + "\n" for line in markdown(found))
            readme.write_text(head + begin + table + end + rest.partition(end)[2])
    Console().print(accuracy_table(found["rows"], BY))


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--dataset", default="cifar10", help="name on the Hugging Face Hub, or a folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="10 epochs of all images too")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    made_by = environment("cpu")
    whole = load(options.dataset)
    planned = plan(options.seeds, options.long)
    with output_folder(options.out) as out:
        path = out / "results.json"
        rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
        for number, run in enumerate(planned, 1):
            if run["key"] in {row["key"] for row in rows}:
                continue
            data = subset(whole, run["train_images"], SHARED["validation"])
            print(f"[{number}/{len(planned)}] {run['key']}", flush=True)
            rows.append(train(run, data) | made_by)
            write_json(path, result(rows, planned, whole.name, made_by))
        report(result(rows, planned, whole.name, made_by), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
