"""Training with Lightning: one model, one norm; checkpoints every epoch and resumes bit for bit."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import normprop
from normprop.projection import annealed, orthogonal
from normprop.recipes import InputError, check_choice, check_count, check_seed
from normprop.recipes.data import Batches, ImageData, subset
from normprop.recipes.hidden import observe_hidden
from normprop.recipes.models import build
from normprop.recipes.results import environment, output_folder, write_json
from normprop.records import whole

RULES = {"paper": normprop.PAPER, "recommended": normprop.RECOMMENDED}
DATA_NORMS = ("channel", "whitening", "global", "batch", "none")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
# Peak learning rates at batch 128, chosen on held-out training images (experiments/LOG.md).
BASE_LR = {"normprop": 0.05, "batch": 0.1, "group": 0.1, "layer": 0.1, "weight": 0.02, "none": 0.02}
# The recommended rule's: with a trust region the step size hardly matters any more.
RECOMMENDED_LR = 0.4
# Where NormProp's weights take orthogonal steps it moves gains, biases and other layers alone (experiments/beyond).
ORTHOGONAL_LR = 0.05
TRUST_RADIUS = 0.01
ORTHOGONAL_RADIUS = 0.02
EVALUATION_BATCH = 500
LARGEST = 1e30  # of the numbers that float32 must hold


@dataclass(frozen=True)
class Run:
    """Everything that decides a training run's result.

    Attributes:
        model: One of ``MODELS``, or another library's, such as ``"torchvision:resnet18"``.
        norm: One of ``NORMS``.
        rule: One of :data:`RULES`, for NormProp.
        width: Factor on the hidden channels.
        batch_size: Samples a step (and device).
        epochs: Passes over the data.
        lr: Peak learning rate of the schedule; None for the default of norm, rule, model and batch size.
        data_norm: ``"channel"`` (over the training set), ``"whitening"`` (the same, and uncorrelated),
            ``"global"`` (per pixel, over the training set: the paper's first choice), ``"batch"`` (per
            pixel, over the input batch: its second), ``"none"``.
        flip: Mirror half of the training images.
        seed: Of weights, order and flips.
        precision: Lightning's: ``"32-true"``, ``"bf16-mixed"``, ...
        limit_train_batches: Steps an epoch at most; None for all.
        halve_every: The paper's schedule: start at ``lr`` and halve it every so many epochs; None for
            one cycle (up to ``lr`` in a quarter of the steps, and down to nothing).
        weight_decay: Of what is no NormProp layer's (``normprop.param_groups``).
        train_images: Train on so many, always the same ones; None for all.
        validation: Hold out so many training images, always the same ones, and evaluate on them; the
            test images are then never looked at.
        activation: Of all hidden layers.
        trust_radius: For NormProp, of ``normprop.attach_projection``; 0 for no limit. None for
            :data:`TRUST_RADIUS` with the recommended rule and no limit with the paper's;
            :data:`ORTHOGONAL_RADIUS` if orthogonal; less below batch 128.
        orthogonal: Nesterov momentum, and steps of the weights that are orthogonal
            (``normprop.attach_projection``); with another norm the same, relative to the length of their rows.
    """

    model: str = "cnn"
    norm: str = "normprop"
    rule: str = "recommended"
    width: float = 1.0
    batch_size: int = 128
    epochs: int = 20
    lr: float | None = None
    data_norm: str = "channel"
    flip: bool = False
    seed: int = 0
    precision: str = "32-true"
    limit_train_batches: int | None = None
    halve_every: int | None = None
    weight_decay: float = 5e-4
    train_images: int | None = None
    validation: int = 0
    activation: str = "relu"
    trust_radius: float | None = None
    orthogonal: bool = False

    @property
    def measures(self) -> str:
        """The name of what an epoch's record says: ``"test_accuracy"`` or ``"validation_accuracy"``."""
        return "validation_accuracy" if self.validation else "test_accuracy"

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, asked for or by default: linear in the batch below 128 (Goyal et al. 2017)."""
        if self.lr is not None:
            return self.lr
        base = BASE_LR[self.norm]
        if self.norm == "normprop" and self.orthogonal:
            base = ORTHOGONAL_LR
        elif self.norm == "normprop" and self.rule == "recommended":
            # What a converted ResNet-18 did better with (experiments/LOG.md, "Converted models").
            base = BASE_LR["batch"] if ":" in self.model else RECOMMENDED_LR
        return base * min(1.0, self.batch_size / 128)

    @property
    def peak_radius(self) -> float | None:
        """The trust radius, asked for or by default: random steps add up as the root of their number."""
        if self.trust_radius is not None:
            return self.trust_radius or None
        if (self.norm, self.rule) != ("normprop", "recommended") and not self.orthogonal:
            return None
        return (ORTHOGONAL_RADIUS if self.orthogonal else TRUST_RADIUS) * math.sqrt(
            min(1.0, self.batch_size / 128)
        )

    def __post_init__(self) -> None:
        check_choice("--rule", self.rule, RULES)
        check_choice("--data-norm", self.data_norm, DATA_NORMS)
        check_choice("--precision", self.precision, PRECISIONS)
        least = dict.fromkeys(
            ("batch_size", "epochs", "limit_train_batches", "halve_every", "train_images"), 1
        )
        for name, minimum in (least | {"validation": 0}).items():
            value = getattr(self, name)
            check_count(f"--{name.replace('_', '-')}", value, minimum)
        if self.trust_radius is not None and not 0 <= self.trust_radius <= LARGEST:
            raise InputError(
                f"--trust-radius {self.trust_radius}: expected a number from 0 (no limit) to {LARGEST:g}"
            )
        if self.trust_radius and self.norm != "normprop" and not self.orthogonal:
            raise InputError(
                f"--trust-radius {self.trust_radius}: plain steps of --norm {self.norm} have none; pass "
                "--orthogonal, or use --norm normprop"
            )
        if self.orthogonal and self.trust_radius == 0:
            raise InputError(
                "--orthogonal steps have the length --trust-radius, got 0; leave that out for the default"
            )
        if self.orthogonal and self.norm == "weight":
            raise InputError(
                "--orthogonal: the weights of --norm weight are no parameters; use --norm normprop"
            )
        if not 0 <= self.weight_decay <= LARGEST:
            raise InputError(f"--weight-decay {self.weight_decay}: expected a number from 0 to {LARGEST:g}")
        if self.lr is not None and not 0 < self.lr <= LARGEST:
            raise InputError(f"--lr {self.lr}: expected a number above 0, at most {LARGEST:g}")
        check_seed(self.seed)
        if self.data_norm == "batch" and self.batch_size == 1:
            raise InputError("--data-norm batch needs --batch-size of at least 2; use --data-norm global")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        status: ``"ok"``, ``"diverged"`` or ``"cannot train"``.
        reason: Why not, in one line; empty if ok.
        history: One record an epoch: epoch, train_loss, test_accuracy or validation_accuracy, seconds.
        network: The trained network, data end included.
        hidden: :func:`hidden_statistics` of it; empty unless the run is ok.
    """

    status: str
    reason: str
    history: list[dict[str, Any]]
    network: nn.Module
    hidden: list[dict[str, Any]]

    @property
    def test_accuracy(self) -> float | None:
        """A fraction, after the last epoch; None unless the run is ok and was tested."""
        return self.history[-1].get("test_accuracy") if self.status == "ok" else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median training time of an epoch, evaluation excluded."""
        seconds = sorted(record["seconds"] for record in self.history)
        return seconds[len(seconds) // 2] if seconds else None


def network(run: Run, data: ImageData) -> nn.Module:
    """The data end and the model, weights drawn from ``run.seed``."""
    torch.manual_seed(run.seed)
    model = build(run.model, data.shape, data.classes, run.norm, RULES[run.rule], run.width, run.activation)
    end: nn.Module = nn.Identity()
    batches = data.train_x.split(1000)
    if run.data_norm in ("global", "channel"):
        end = normprop.GlobalDataNorm.fit(
            batches, per="element" if run.data_norm == "global" else "channel"
        )
    elif run.data_norm == "whitening":
        end = normprop.WhiteningDataNorm.fit(batches)
    elif run.data_norm == "batch":
        end = normprop.BatchDataNorm(data.shape)
    return nn.Sequential(OrderedDict(data_norm=end, model=model))


class _Diverged(Exception):
    """The loss is no number any more."""


class _Classifier(pl.LightningModule):
    """Cross-entropy, SGD with momentum 0.9 (Nesterov if orthogonal); NormProp's rows projected every step."""

    def __init__(
        self, run: Run, dataset: str, net: nn.Module, observe: Callable[[], dict[str, Any]]
    ) -> None:
        super().__init__()
        self.run, self.net, self.observe = run, net, observe
        self.identity = asdict(run) | {"dataset": dataset}
        self.history: list[dict[str, Any]] = []
        self.dtype_in = torch.float64 if run.precision == "64-true" else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dtype != self.dtype_in:
            x = x.to(self.dtype_in)
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def configure_optimizers(self) -> Any:
        run = self.run
        lr = run.peak_lr
        groups = normprop.param_groups(self.net, weight_decay=run.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=run.orthogonal)
        if run.norm == "normprop":
            normprop.attach_projection(optimizer, self.net, run.peak_radius, run.orthogonal)
            normprop.scale_together(self.net)
        elif run.orthogonal and run.peak_radius:
            make_orthogonal(optimizer, self.net, run.peak_radius)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule: torch.optim.lr_scheduler.LRScheduler
        if run.halve_every is None:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=lr,
                total_steps=max(8, steps),  # it divides by 0 at 4
                pct_start=0.25,
                cycle_momentum=False,
            )
        else:
            period = steps // run.epochs * run.halve_every
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, period, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.started = time.perf_counter()
        self.loss_sum = torch.zeros((), device=self.device)
        self.steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if index == 0:
            # Every epoch's randomness follows from its number, so that a resumed run is the same run.
            torch.manual_seed((self.run.seed * 10_007 + self.current_epoch) * 1009 + self.global_rank)
        x, y = batch
        if self.run.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        loss = F.cross_entropy(self(x).float(), y)
        self.loss_sum += loss.detach()
        self.steps += 1
        if self.steps % 50 == 0 and not torch.isfinite(self.loss_sum):
            raise _Diverged(
                f"the loss is NaN or infinite after {self.steps} steps of epoch {self.current_epoch + 1}"
            )
        return loss

    def on_validation_epoch_start(self) -> None:
        self.seconds = time.perf_counter() - self.started
        self.correct = torch.zeros((), device=self.device)
        self.seen = torch.zeros((), device=self.device)
        self.lost = torch.zeros((), device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        output = self(x)
        self.correct += (output.argmax(1) == y).sum()
        self.lost += (~output.isfinite()).sum()
        self.seen += len(y)

    def on_validation_epoch_end(self) -> None:
        totals = self.all_gather(
            torch.stack([self.correct, self.seen, self.lost, self.loss_sum / self.steps])
        )
        assert isinstance(totals, Tensor)
        correct, seen, lost, loss = totals.reshape(-1, 4).double().sum(0).tolist()
        if not math.isfinite(loss):
            raise _Diverged(f"the loss is no number in epoch {self.current_epoch + 1}")
        if lost:  # the last step did it
            raise _Diverged(f"the outputs are no numbers after epoch {self.current_epoch + 1}")
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "train_loss": loss / self.trainer.world_size,
                self.run.measures: correct / seen,
                "seconds": self.seconds,
            }
        )
        if self.logger:
            self.log_dict({k: float(v) for k, v in self.history[-1].items() if k != "epoch"})
        self.history[-1] |= self.observe()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["normprop"] = {"history": self.history, "run": self.identity}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["normprop"]["history"]


def make_orthogonal(optimizer: torch.optim.Optimizer, net: nn.Module, radius: float) -> None:
    """The aid that NormProp's weights have, for those of torch's layers: steps relative to their rows' length."""
    weights = [layer.weight for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    before = [torch.empty_like(weight) for weight in weights]

    @torch.no_grad()
    def remember(*_: Any) -> None:
        torch._foreach_copy_(before, weights)

    @torch.no_grad()
    def replace_steps(*_: Any) -> None:
        share = radius * annealed(optimizer)
        for weight, old in zip(weights, before, strict=True):
            length = share * float(old.norm()) / math.sqrt(len(old))
            weight.copy_(old + length * orthogonal(weight - old))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(replace_steps)


class _Data(pl.LightningDataModule):
    """Shuffled training batches; the order of an epoch follows from the seed and the epoch's number."""

    def __init__(self, run: Run, data: ImageData) -> None:
        super().__init__()
        self.run, self.data = run, data

    def _loader(self, x: Tensor, y: Tensor, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        assert self.trainer is not None
        sampler: DistributedSampler[Any] = DistributedSampler(
            Batches(x, y), self.trainer.world_size, self.trainer.global_rank, shuffle, self.run.seed
        )
        return DataLoader(
            Batches(x, y),
            batch_size,
            sampler=sampler,
            collate_fn=_already_a_batch,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.train_x, self.data.train_y, self.run.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.test_x, self.data.test_y, EVALUATION_BATCH, shuffle=False)


def _already_a_batch(batch: Any) -> Any:
    return batch


class _AtomicCheckpoints(TorchCheckpointIO):
    """A checkpoint has its name only once it is whole, whatever kills the process."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with whole(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


class _AfterEpoch(Callback):
    """Calls ``report(history)`` after every epoch's evaluation, on the first process."""

    def __init__(self, report: Callable[[list[dict[str, Any]]], None]) -> None:
        self.report = report

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and module.history:
            self.report(module.history)  # type: ignore[arg-type]


Observe = Callable[[nn.Module, ImageData], dict[str, Any]]


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def fit(
    run: Run,
    data: ImageData,
    report: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    out: Path | None = None,
    checkpoint: Path | None = None,
    progress_bar: bool = False,
    devices: str = "1",
    nodes: int = 1,
    accelerator: str = "auto",
    observe: Observe = _nothing,
) -> Outcome:
    """Train one model.

    Args:
        run: What to train and how.
        data: On what.
        report: Called after every epoch with its records.
        out: Folder for checkpoints and logs (TensorBoard, CSV); None for neither.
        checkpoint: File to go on from.
        progress_bar: Show Lightning's bar.
        devices: How many, or ``"auto"``.
        nodes: Number of machines.
        accelerator: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        observe: Called after every epoch with the network and the run's data; what it returns joins
            the epoch's record.

    Returns:
        The outcome; a norm that refuses the batch size, or a loss that is no number, is a status.
    """
    data = subset(data, run.train_images, run.validation)
    net = network(run, data).to(memory_format=torch.channels_last)
    module = _Classifier(run, data.name, net, lambda: observe(net, data))
    callbacks: list[Callback] = [_AfterEpoch(report)]
    loggers: list[Any] = []
    if out is not None:
        callbacks.append(
            ModelCheckpoint(
                out / "checkpoints", "epoch-{epoch}", auto_insert_metric_name=False, save_top_k=1
            )
        )
        loggers = [CSVLogger(out, "logs"), TensorBoardLogger(out, "logs", log_graph=False)]
    if progress_bar:
        callbacks.append(RichProgressBar())
    with warnings.catch_warnings(), _quiet_lightning():
        warnings.simplefilter("ignore")
        status, reason = "ok", ""
        try:
            trainer = pl.Trainer(
                accelerator=accelerator,
                devices=devices if devices == "auto" else int(devices),
                num_nodes=nodes,
                precision=run.precision,  # type: ignore[arg-type]
                max_epochs=run.epochs,
                limit_train_batches=run.limit_train_batches,
                num_sanity_val_steps=0,
                logger=loggers or False,
                callbacks=callbacks,
                plugins=[_AtomicCheckpoints()],
                enable_checkpointing=out is not None,
                enable_progress_bar=progress_bar,
                enable_model_summary=False,
                use_distributed_sampler=False,
                benchmark=False,
            )
            trainer.fit(module, datamodule=_Data(run, data), ckpt_path=checkpoint)
        except MisconfigurationException as error:
            raise InputError(f"--devices {devices} --nodes {nodes}: {error}") from error
        except SystemExit:  # Lightning's answer to Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        except _Diverged as error:
            status, reason = "diverged", f"{error}; try --lr {run.peak_lr / 4:.2g}"
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            status = "cannot train"
            reason = "BatchNorm saw one value a channel (a batch of 1)"
            if run.norm != "batch":
                reason = "GroupNorm saw one value a group (a batch of 1, a layer this narrow)"
        else:
            if trainer.interrupted:
                raise KeyboardInterrupt
    hidden = observe_hidden(net, data)["hidden"] if status == "ok" and is_first_process() else []
    return Outcome(status, reason, module.history, net, hidden)


class _quiet_lightning:
    """Lightning's hints (processors, worker counts, tips) are not about the user's run."""

    names = ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric")

    def __enter__(self) -> None:
        self.levels = {name: logging.getLogger(name).level for name in self.names}
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)


def is_first_process() -> bool:
    """Whether this process writes and prints; Lightning starts one a device."""
    return getattr(rank_zero_only, "rank", 0) == 0


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the last finished epoch; they are only named once whole."""
    found = list(out.glob("checkpoints/epoch-*.ckpt"))
    return max(found, key=lambda path: int(path.stem.split("-")[1]), default=None)


def _check_resumable(path: Path, run: Run, dataset: str, out: Path) -> None:
    """Refuse a checkpoint of another run, naming the first difference."""
    try:
        before = torch.load(path, map_location="cpu", weights_only=False)["normprop"]["run"]
    except Exception as error:
        raise InputError(
            f"--resume: {path} is no checkpoint of normprop train ({type(error).__name__}); "
            "delete it, or choose another --out"
        ) from error
    before = asdict(Run()) | before  # a field that came later had its default
    for name, value in (asdict(run) | {"dataset": dataset}).items():
        if before.get(name) != value:
            raise InputError(
                f"--resume: {out} holds a run with {name.replace('_', '-')} {before.get(name)}, this one has "
                f"{value}; repeat its options or choose another --out"
            )


def train(
    run: Run,
    data: ImageData,
    out: Path,
    resume: bool = False,
    report: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    progress_bar: bool = False,
    devices: str = "auto",
    nodes: int = 1,
    accelerator: str = "auto",
    observe: Observe = _nothing,
) -> Outcome:
    """Train one model into a folder: ``results.json``, ``checkpoints/``, ``logs/``, ``model.pt``.

    Args:
        run: What to train and how.
        data: On what.
        out: The folder; created, and taken away again if nothing comes of it.
        resume: Go on from the last finished epoch of the same run in ``out``.
        report: Called after every epoch with its records.
        progress_bar: Show a bar.
        devices: How many, or ``"auto"``.
        nodes: Number of machines.
        accelerator: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        observe: As for :func:`fit`.

    Returns:
        The outcome; ``model.pt`` is the trained network's state dict.

    Raises:
        InputError: If ``out`` cannot be written, holds another run, or has nothing to resume.
    """
    checkpoint = newest_checkpoint(out)
    if checkpoint is not None and not resume:
        raise InputError(f"--out {out} holds a run already; add --resume to go on, or choose another --out")
    if resume and checkpoint is None:
        raise InputError(f"--resume: no checkpoint in {out}; leave --resume out to start")
    if checkpoint is not None:
        _check_resumable(checkpoint, run, data.name, out)
    made_by = environment(accelerator)

    def save(
        history: list[dict[str, Any]], status: str = "partial", reason: str = "", hidden: Sequence[Any] = ()
    ) -> None:
        ok = status == "ok"
        record = {
            "run": asdict(run) | {"dataset": data.name},
            "rule": asdict(RULES[run.rule]) if run.norm == "normprop" else None,
            "status": status,
            "reason": reason,
            run.measures: history[-1][run.measures] if ok else None,
            "epochs": history,
            "hidden": list(hidden),
            **made_by,
        }
        write_json(out / "results.json", record)

    def after_epoch(history: list[dict[str, Any]]) -> None:
        save(history)
        report(history)

    with output_folder(out, keep=()):
        outcome = fit(
            run, data, after_epoch, out, checkpoint, progress_bar, devices, nodes, accelerator, observe
        )
        if is_first_process():
            with whole(out / "model.pt") as temporary:
                torch.save(outcome.network.state_dict(), temporary)
            save(outcome.history, outcome.status, outcome.reason, outcome.hidden)
    return outcome
