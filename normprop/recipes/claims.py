"""The claims that ``normprop reproduce`` tests: what the paper says, and which runs test it.

A claim lists its runs for a protocol; nothing here trains. ``full`` is the paper's protocol (its sec. 5;
what the paper leaves open is said where it is filled in), ``narrow`` the same at a quarter of the width,
``reduced`` finishes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.table import Table

from normprop.recipes import Row, figures
from normprop.recipes.hidden import observe_hidden
from normprop.recipes.jacobian import jacobian_findings, jacobian_table, measure_jacobian
from normprop.recipes.models import NORMS
from normprop.recipes.speed import measure_speed, speed_findings, speed_table
from normprop.recipes.summary import accuracy_table, best_lr, hidden_means, largest_steps
from normprop.recipes.train import Observe, Run

VARIANTS: dict[str, dict[str, Any]] = {
    "normprop, paper": {"norm": "normprop", "rule": "paper"},
    "normprop, recommended": {"norm": "normprop", "rule": "recommended"},
    **{norm: {"norm": norm} for norm in NORMS if norm != "normprop"},
}
RIVALS = ("normprop, recommended", "batch")
NORMPROP = ("normprop, paper", "normprop, recommended")
AIDS: dict[str, dict[str, Any]] = {
    "whitened": {"data_norm": "whitening"},
    "orthogonal": {"orthogonal": True},
}
AIDED = {
    f"{name}, {aid}": VARIANTS[name] | change
    for aid, change in AIDS.items()
    for name in (*NORMPROP, "batch")
}
ITS_STEP = (
    "normprop, paper, step .08"  # the paper's for batches of 100, twice what the rule takes by default
)
AIDED[ITS_STEP] = VARIANTS["normprop, paper"] | {"lr": 0.08}
BATCH_SIZES = (1, 2, 4, 8, 16, 50, 100, 250)
LEARNING_RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
ACTIVATIONS = (
    "relu", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "mish", "softplus", "tanh",
)  # fmt: skip


LIBRARIES = ("torchvision:resnet18", "torchvision:densenet121")


@dataclass(frozen=True)
class Protocol:
    """How much is trained.

    Attributes:
        name: ``"reduced"``, ``"full"`` or ``"narrow"``.
        base: What all runs share, data norm of the batch-size claim apart.
        seeds: How many, from 0.
        short: Changes for the claims that have many runs.
        batches: Changes for the claim over batch sizes; the small ones take long.
        search: Changes for runs that look for a step size, always on held-out training images.
        final: Changes for the runs with the step size that was found.
        table: Changes for the table of errors, by data set; ``""`` for any other.
    """

    name: str
    base: Run
    seeds: int
    short: dict[str, Any]
    batches: dict[str, Any]
    search: dict[str, Any]
    final: dict[str, Any]
    table: dict[str, dict[str, Any]]

    @property
    def papers(self) -> bool:
        """Whether it trains by the paper's schedule."""
        return self.base.halve_every is not None

    def lr(self, run: Run) -> float:
        """The paper's step size where its schedule is used, else what ``normprop train`` takes.

        The paper gives .05 at batch 50, .08 at 100, .0001 without norm; for other sizes we scale
        linearly below 50 and stay at .08 above 100.
        """
        if not self.papers:
            return replace(run, lr=None).peak_lr
        if run.norm == "none":
            return 1e-4
        return 0.08 if run.batch_size >= 100 else 0.05 * min(1.0, run.batch_size / 50)

    def run(self, variant: str, **changes: Any) -> Run:
        """The base with ``changes``, a variant's norm, rule and aid, its step size and trust radius."""
        run = replace(self.base, **(changes | (VARIANTS | AIDED)[variant]))
        if run.peak_radius is not None:
            run = replace(run, trust_radius=run.peak_radius)
        return run if run.lr is not None else replace(run, lr=self.lr(run))


_MIXED = {"model": "nin", "data_norm": "batch", "precision": "bf16-mixed"}
PROTOCOLS = {
    "reduced": Protocol(
        "reduced",
        Run(width=0.25, batch_size=100, epochs=10, **_MIXED),  # type: ignore[arg-type]
        seeds=3,
        short={"train_images": 20_000, "epochs": 4},
        batches={"train_images": 10_000, "epochs": 2},
        search={"train_images": 10_000, "epochs": 2, "validation": 5_000},
        final={},
        table={"": {}},
    ),
    "full": Protocol(
        "full",
        Run(batch_size=50, epochs=50, halve_every=10, **_MIXED),  # type: ignore[arg-type]
        seeds=3,
        short={},
        batches={},
        search={"batch_size": 100, "epochs": 10, "halve_every": None, "validation": 5_000},
        final={"batch_size": 100, "halve_every": None},
        table={
            "": {"epochs": 200, "halve_every": 25},
            "svhn": {"batch_size": 100, "epochs": 25, "halve_every": 5},
        },
    ),
}
PROTOCOLS["narrow"] = replace(
    PROTOCOLS["full"], name="narrow", base=replace(PROTOCOLS["full"].base, width=0.25)
)


@dataclass(frozen=True)
class Planned:
    """A run of a claim.

    Attributes:
        label: Of its variant, as tables and figures show it.
        run: What to train.
        stage: ``"selection"`` of a step size or ``"final"``; empty where a claim has one stage.
    """

    label: str
    run: Run
    stage: str = ""


Plan = Callable[[Protocol, str, int, Sequence[Row]], list[Planned]]
Measurement = Callable[[str, str, Callable[[str], None]], list[Row]]


@dataclass(frozen=True)
class Claim:
    """One claim and its test.

    Attributes:
        name: As typed.
        paper: What the paper reports, in one line.
        figure: Draws the figure from what ``results.json`` holds, into a file.
        plan: The runs, from the protocol, the data set's name, the number of seeds and the rows that
            are there; None for a claim that is measured without training.
        by: What tells the rows of one variant apart, seeds aside; keys of a row.
        observe: Called after every epoch of its runs.
        drift: Whether its rows keep what ``observe`` found after every epoch, not only at the end.
        measurement: For a claim without runs: its rows, from the protocol's name, the device and a
            function that is told what is going on.
        table: Of its rows, for people; by default of accuracies.
        findings: What the rows come to, in a few numbers.
    """

    name: str
    paper: str
    figure: figures.Figure
    plan: Plan | None = None
    by: tuple[str, ...] = ()
    observe: Observe = observe_hidden
    drift: bool = False
    measurement: Measurement | None = None
    table: Callable[[Sequence[Row], Sequence[str]], Table] = accuracy_table
    findings: Callable[[Sequence[Row]], Row] = lambda _: {}


def _grid(
    protocol: Protocol, seeds: int, variants: Iterable[str], settings: Iterable[dict[str, Any]] = ({},)
) -> list[Planned]:
    """Every variant under every setting, seed by seed, so that what is there early covers all of them."""
    return [
        Planned(variant, protocol.run(variant, seed=seed, **setting))
        for seed in range(seeds)
        for setting in list(settings)
        for variant in variants
    ]


def _by_default(planned: Iterable[Planned]) -> list[Planned]:
    """With the step size that ``normprop train`` takes, whatever the protocol."""
    return [replace(p, run=replace(p.run, lr=replace(p.run, lr=None).peak_lr)) for p in planned]


def _data_norm(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    sizes = (50, 100) if protocol.papers else (protocol.base.batch_size,)
    settings = [{"data_norm": norm, "batch_size": b} for b in sizes for norm in ("global", "batch")]
    return _grid(protocol, seeds, NORMPROP, settings)


def _hidden_mean(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    return _grid(protocol, seeds, (*NORMPROP, "batch", "none"))


def _convergence(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    if protocol.papers:
        return _grid(protocol, seeds, (*NORMPROP, "batch"))
    orthogonal = [f"{name}, orthogonal" for name in (*NORMPROP, "batch")]
    # The best at a quarter of the width, too.
    wide = _grid(protocol, 1, (*NORMPROP, orthogonal[0], "batch"), [{"width": 1.0}])
    return [*_grid(protocol, seeds, (*VARIANTS, ITS_STEP, *orthogonal)), *wide]


def _batch_size(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    # The largest batches first: they take the least time.
    settings = [
        protocol.batches | {"batch_size": size, "data_norm": "global"} for size in reversed(BATCH_SIZES)
    ]
    return _grid(
        protocol, seeds, (*NORMPROP, "normprop, recommended, orthogonal", "batch", "group"), settings
    )


def _table(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    change = protocol.table.get(dataset, protocol.table[""])
    flips = (False,) if dataset == "svhn" else (False, True)  # a mirrored 2 is no 2
    return _grid(protocol, seeds, (*NORMPROP, "batch"), [change | {"flip": flip} for flip in flips])


def _activations(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    settings = [protocol.short | {"activation": name} for name in ACTIVATIONS]
    return _grid(protocol, seeds, ("normprop, paper",), settings)


def _step_size(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    settings = [protocol.search | {"lr": lr} for lr in LEARNING_RATES]
    return _grid(protocol, seeds, (*NORMPROP, "batch", "none"), settings)


def _beyond(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    """First a step size for each model and norm, on held-out training images; then the runs that count."""
    variants = (*RIVALS, *(f"{name}, {aid}" for aid in AIDS for name in RIVALS))
    models: list[dict[str, Any]] = [
        {"model": protocol.base.model, "width": protocol.base.width},
        {"model": "resnet20", "width": 1.0},
    ]
    models = [model | {"flip": True, "data_norm": "channel"} for model in models]
    settings = [model | protocol.search | {"lr": lr} for model in models for lr in LEARNING_RATES]
    planned = [replace(p, stage="selection") for p in _grid(protocol, seeds, variants, settings)]
    for model in models:
        for variant in variants:
            mine = [p for p in planned if p.label == variant and p.run.model == model["model"]]
            mine = [p for p in mine if p.stage == "selection"]
            lr = best_lr(rows, variant, model["model"], len(mine))
            if lr is not None:
                changes = model | protocol.final | {"lr": lr}
                final = _grid(protocol, seeds, (variant,), [changes])
                planned += [replace(p, stage="final") for p in final]
    return planned


def _depth(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    """From the first step at the largest step size, which halves four times: no warm-up."""
    epochs = protocol.short.get("epochs", protocol.base.epochs)
    changes = {"halve_every": max(1, epochs // 5), "width": 0.5, "data_norm": "channel"}
    settings = [protocol.short | changes | {"model": model} for model in ("resnet20", "resnet110")]
    return _by_default(_grid(protocol, seeds, (*NORMPROP, "batch", "none"), settings))


def _converted(protocol: Protocol, dataset: str, seeds: int, rows: Sequence[Row]) -> list[Planned]:
    """As few images as where batches are small: these models are large."""
    images = protocol.batches.get("train_images")
    changes = {"train_images": images, "width": 1.0, "data_norm": "channel", "flip": True}
    settings = [protocol.short | changes | {"model": model} for model in LIBRARIES]
    return _by_default(_grid(protocol, seeds, (*RIVALS, "normprop, recommended, orthogonal"), settings))


SHORT = {
    "width": "w", "batch_size": "b", "epochs": "e", "lr": "lr", "halve_every": "halve", "train_images": "n",
    "validation": "val", "trust_radius": "r", "limit_train_batches": "limit", "weight_decay": "wd",
}  # fmt: skip
ALWAYS = ("width", "batch_size", "epochs", "lr")


def run_key(protocol: Protocol, dataset: str, run: Run) -> str:
    """A folder's name: protocol, data set and every setting that is not the default's, the seed last.

    Example:
        >>> run_key(PROTOCOLS["reduced"], "cifar10", PROTOCOLS["reduced"].run("batch", seed=1))
        'reduced-cifar10-nin-batch-w0.25-b100-e10-lr0.078125-batch_data-bf16-seed1'
    """
    parts = [protocol.name, dataset, run.model.replace(":", "_"), run.norm]
    if run.norm == "normprop":
        parts.append(run.rule)
    for field in fields(Run):
        name, value = field.name, getattr(run, field.name)
        if name in ("model", "norm", "rule", "seed") or (value == field.default and name not in ALWAYS):
            continue
        if name in SHORT:
            parts.append(f"{SHORT[name]}{value:g}")
        elif name == "data_norm":
            parts.append(f"{value}_data")
        elif name == "precision":
            parts.append(value.removesuffix("-mixed"))
        elif value is True:
            parts.append(name)
        elif name == "activation":
            parts.append(value)
        else:
            parts.append(f"{name}_{value}")
    return "-".join([*parts, f"seed{run.seed}"])


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "data-norm",
            "sec. 5.1, fig. 1: global and batch data normalisation reach nearly the same accuracy, about "
            "90 % by epoch 30; best 90.35 % with batch data normalisation at batch size 50",
            figures.data_norm,
            _data_norm,
            ("batch_size", "data_norm"),
        ),
        Claim(
            "hidden-mean",
            "fig. 2: the mean of a hidden layer's input settles during training, at 0.19 on average with "
            "NormProp, 0.33 with BatchNorm",
            figures.hidden_mean,
            _hidden_mean,
            drift=True,
            findings=hidden_means,
        ),
        Claim(
            "convergence",
            "fig. 3: NormProp is ahead of BatchNorm for about 30 epochs and smoother; both end at about 90 %",
            figures.convergence,
            _convergence,
            ("model", "width"),
        ),
        Claim(
            "batch-size",
            "fig. 4: NormProp ends at about 90 % with batches of 1, 50 and 100, at about 88 % with 250",
            figures.batch_size,
            _batch_size,
            ("batch_size",),
        ),
        Claim(
            "table",
            "table 1, test error of NormProp and BatchNorm: CIFAR-10 9.11 and 9.41 %, with flips 7.47 and "
            "7.25 %; CIFAR-100 32.19 and 35.32 %, with flips 29.24 and 30.26 %; SVHN 1.88 and 2.25 %",
            figures.table,
            _table,
            ("flip",),
        ),
        Claim(
            "speed",
            "sec. 5: 84 s an epoch of CIFAR-10 with NormProp, 96 s with BatchNorm (Titan X)",
            figures.speed,
            measurement=measure_speed,
            table=speed_table,
            findings=speed_findings,
        ),
        Claim(
            "jacobian",
            "sec. 3: the singular values of a layer's Jacobian are about 1.21; the gain 1/1.21 makes "
            "them 1; the canonical error bound (Prop. 1) bounds the correlation of a layer's outputs",
            figures.jacobian,
            measurement=measure_jacobian,
            table=jacobian_table,
            findings=jacobian_findings,
        ),
        Claim(
            "activations",
            "eq. 12: the method takes any activation, by its mean and std under N(0, 1)",
            figures.activations,
            _activations,
            ("activation",),
        ),
        Claim(
            "step-size",
            "not in the paper: the largest step size that each norm trains with",
            figures.step_size,
            _step_size,
            ("lr",),
            findings=largest_steps,
        ),
        Claim(
            "beyond",
            "not in the paper: NormProp against BatchNorm, each at its own best step size; the same on whitened data",
            figures.beyond,
            _beyond,
            ("stage", "model", "lr"),
        ),
        Claim(
            "depth",
            "not in the paper: residual nets of 20 and 110 layers, without warm-up",
            figures.convergence,
            _depth,
            ("model",),
        ),
        Claim(
            "converted",
            "not in the paper: torchvision's models as they are and converted, by the step sizes of normprop train",
            figures.convergence,
            _converted,
            ("model",),
        ),
    )
}
