"""``normprop reproduce``: run what a claim still lacks, collect all its runs, write results and figure.

Every run is ``train`` into a folder of its own, ``runs/KEY``, which all claims share; so a run resumes
after a kill, two commands can share a claim, and ``results.json`` is made of the run folders and of the rows
that it held before, which may be another machine's.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from normprop.recipes import InputError, Row, check_choice, check_count, duration, writing
from normprop.recipes.claims import CLAIMS, PROTOCOLS, Claim, Planned, Protocol, run_key
from normprop.recipes.data import ImageData, load
from normprop.recipes.results import InUse, check_device, environment, exclusive, write_json
from normprop.recipes.summary import summarize
from normprop.recipes.train import RULES, Observe, Run, newest_checkpoint, train

Tell = Callable[..., None]
# What a step costs besides its images, in images; it only matters for the time that is said to be left.
STEP = 20
# Where there is no terminal for bars, an epoch is told when nothing was for so many seconds.
EVERY = 60


@dataclass(frozen=True)
class Task:
    """One run to make: what, where, and what to look at after every epoch."""

    key: str
    run: Run
    folder: Path
    observe: Observe


@dataclass(frozen=True)
class Study:
    """A claim under one protocol on one data set, in one folder.

    Attributes:
        claim: From ``CLAIMS``.
        protocol: From ``PROTOCOLS``.
        dataset: The data set's name, never a path.
        seeds: How many.
        out: The folder of ``results.json`` and ``figure.png``.
        runs: The folder of the runs; claims that need the same run share it.
    """

    claim: Claim
    protocol: Protocol
    dataset: str
    seeds: int
    out: Path
    runs: Path

    @property
    def data_name(self) -> str | None:
        """The data set's name; None for a claim that reads none."""
        return None if self.claim.plan is None else self.dataset

    def key(self, planned: Planned) -> str:
        """The name of its folder in ``runs``."""
        return run_key(self.protocol, self.dataset, planned.run)

    def folder(self, planned: Planned) -> Path:
        """Where it is trained."""
        return self.runs / self.key(planned)

    def gather(self) -> tuple[list[Planned], list[Row]]:
        """All runs of the claim, and the rows of those that have begun, finished or not.

        Where a run has no folder here its row is the one that ``results.json`` holds, if it does.
        """
        rows: list[Row] = []
        kept = self.kept()
        assert self.claim.plan is not None
        while True:  # what a later stage runs follows from the rows of the one before
            planned = self.claim.plan(self.protocol, self.dataset, self.seeds, rows)
            found = [self.row(one) or kept.get((self.key(one), one.stage)) for one in planned]
            rows = [row for row in found if row is not None]
            if self.claim.plan(self.protocol, self.dataset, self.seeds, rows) == planned:
                return planned, rows

    def kept(self) -> dict[tuple[str, str], Row]:
        """The rows that ``results.json`` holds, by key and stage: others may have made them elsewhere."""
        path = self.out / "results.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return {(row["key"], row["stage"]): row for row in rows}

    def row(self, planned: Planned) -> Row | None:
        """What the folder of a run says of it; None if it has not finished an epoch here.

        Raises:
            InputError: If its folder holds another run.
        """
        folder = self.folder(planned)
        if not (folder / "results.json").exists():
            return None
        record = json.loads((folder / "results.json").read_text())
        self._check(planned.run, record, folder)
        epochs = record["epochs"]
        by_epoch = (planned.run.measures, "train_loss", "seconds")
        hidden = [epoch["hidden"] for epoch in epochs if "hidden" in epoch]
        made_by = {key: record[key] for key in ("device", "threads", "versions", "commit")}
        return {
            "key": self.key(planned),
            "label": planned.label,
            "stage": planned.stage,
            "status": record["status"],
            "reason": record["reason"],
            **record["run"],
            "rule": planned.run.rule if record["rule"] else None,
            "rule_is": record["rule"],
            **{key: [epoch[key] for epoch in epochs] for key in by_epoch},
            "hidden": record["hidden"],
            **({"hidden_by_epoch": hidden} if hidden and self.claim.drift else {}),
            **made_by,
        }

    def _check(self, run: Run, record: Row, folder: Path) -> None:
        there = asdict(Run()) | record["run"] | {"rule_is": record["rule"]}
        rule = asdict(RULES[run.rule]) if run.norm == "normprop" else None
        for name, value in (asdict(run) | {"dataset": self.dataset, "rule_is": rule}).items():
            if there[name] != value:
                raise InputError(
                    f"--out {self.out}: {folder} holds a run with {name} {there[name]}, this one has "
                    f"{value}; delete that folder, or choose another --out"
                )

    def missing(self, only: str) -> list[Planned]:
        """The runs whose key has ``only`` in it that are not finished here."""
        asked = [p for p in self.gather()[0] if _has(self.key(p), only)]
        return [p for p in asked if (self.row(p) or {"status": "partial"})["status"] == "partial"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folders; what the file system refuses is bad input."""
        with writing("--out", self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            if self.claim.measurement is None:
                self.runs.mkdir(parents=True, exist_ok=True)
            yield

    def collect(self) -> Row:
        """Write ``results.json`` from all run folders and what it held before; what it holds."""
        with self.writing(), exclusive(self.runs):
            planned, rows = self.gather()
            finished = sum(row["status"] != "partial" for row in rows)
            keys = {row["key"] for row in rows}
            settings = {self.key(one).rpartition("-seed")[0] for one in planned}
            # More seeds than were asked for now.
            rows += [
                r
                for k, r in self.kept().items()
                if k[0] not in keys and k[0].rpartition("-seed")[0] in settings
            ]
            result = self._result(rows, finished == len(planned)) | {
                "planned": len(planned),
                "finished": finished,
                "summary": summarize(rows, self.claim.by),
                "findings": self.claim.findings(rows),
                "rows": rows,
            }
            write_json(self.out / "results.json", result)
        return result

    def measure(self, device: str, report: Callable[[str], None]) -> Row:
        """Take the measurements of a claim without runs, write ``results.json``; what it holds."""
        assert self.claim.measurement is not None
        with self.writing():
            pass  # before the work
        rows = self.claim.measurement(self.protocol.name, device, report)
        made_by = environment(device)
        result = self._result([made_by | row for row in rows], True) | {
            "findings": self.claim.findings(rows),
            "rows": rows,
        }
        write_json(self.out / "results.json", result)
        return result

    def _result(self, rows: Sequence[Row], complete: bool) -> Row:
        """The head of ``results.json``; where runs were made by different machines or commits, all of them."""
        now = environment()
        made_by = {}
        for key in ("device", "threads", "versions", "commit"):
            values = [row[key] for row in rows]
            distinct = [value for index, value in enumerate(values) if value not in values[:index]]
            made_by[key] = distinct[0] if len(distinct) == 1 else distinct or now[key]
        return {
            "claim": self.claim.name,
            "paper": self.claim.paper,
            "protocol": self.protocol.name,
            "status": "complete" if complete else "partial",
            "dataset": self.data_name,
            **made_by,
        }

    def check_folder(self) -> None:
        """Refuse a folder with results of another claim, protocol or data set: they are never mixed."""
        path = self.out / "results.json"
        if not path.exists():
            return
        try:
            before = json.loads(path.read_text())
            found = {key: before[key] for key in ("claim", "protocol", "dataset")}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"--out {self.out}: results.json there is of something else; choose another --out"
            ) from error
        wanted = {"claim": self.claim.name, "protocol": self.protocol.name, "dataset": self.data_name}
        for key, value in wanted.items():
            if found[key] != value:
                raise InputError(
                    f"--out {self.out} holds results of {key} {found[key]}, not {value}; choose another --out"
                )


def _has(key: str, only: str) -> bool:
    """Whether all of ``only``'s texts, with commas between, are in the key."""
    return all(text in key for text in only.split(","))


def study(claim: str, protocol: str, dataset: str, seeds: int | None, out: Path | None) -> Study:
    """A :class:`Study` from what was typed.

    Raises:
        InputError: For an unknown name, or seeds below 1.
    """
    check_choice("CLAIM", claim, CLAIMS)
    check_choice("--protocol", protocol, PROTOCOLS)
    check_count("--seeds", seeds)
    chosen = PROTOCOLS[protocol]
    name = Path(dataset).name or dataset
    folder = Path("experiments") / claim if out is None else out
    runs = folder.parent / "runs" if out is None else folder / "runs"
    return Study(CLAIMS[claim], chosen, name, chosen.seeds if seeds is None else seeds, folder, runs)


def reproduce(
    claim: str,
    protocol: str = "reduced",
    dataset: str = "cifar10",
    out: Path | None = None,
    jobs: int = 1,
    device: str = "auto",
    only: str = "",
    seeds: int | None = None,
    console: Console | None = None,
) -> Row:
    """Run what is missing of a claim, write ``results.json`` after every run, and ``figure.png``.

    Args:
        claim: One of ``CLAIMS``.
        protocol: One of ``PROTOCOLS``.
        dataset: What ``load`` takes; read only if a run is missing.
        out: Folder, of the runs as well; by default ``experiments/CLAIM``, and ``experiments/runs`` for the
            runs of all claims.
        jobs: Runs at once, each in a process of its own.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        only: Make only the runs with this text, or all of these texts with commas between, in their key;
            all that are there are collected.
        seeds: How many; by default the protocol's.
        console: Where progress and table are shown; None for nowhere.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: For bad arguments, a folder that cannot be written or holds results of something
            else, an ``only`` that no run has, or a process that was killed.
    """
    check_count("--jobs", jobs)
    check_device(device, ("auto", "cpu", "cuda"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    this = study(claim, protocol, dataset, seeds, out)
    this.check_folder()
    if this.claim.measurement is not None:
        result = this.measure(device, lambda text: console.print(text) if console else None)
    else:
        if not any(_has(this.key(planned), only) for planned in this.gather()[0]):
            some = this.key(this.gather()[0][0])
            raise InputError(f"--only {only}: no run of {claim} has this in its name; one is called {some}")
        result = _train_missing(this, dataset, jobs, device, only, console)
    if result["rows"]:
        this.claim.figure(result, this.out / "figure.png")
    if console is not None:
        console.print(this.claim.table(result["rows"], this.claim.by))
        for name, value in result["findings"].items():
            values = value.items() if isinstance(value, dict) else [("", value)]
            told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
            console.print(f"{name}: {told.strip()}", highlight=False)
    return result


def _train_missing(
    this: Study, dataset: str, jobs: int, device: str, only: str, console: Console | None
) -> Row:
    """Train until nothing is missing that this process may do; collects whatever happens."""
    tried: set[str] = set()
    data = None
    failures: list[Exception] = []
    try:
        while planned := [p for p in this.missing(only) if this.key(p) not in tried]:
            data = load(dataset) if data is None else data
            tried |= {this.key(p) for p in planned}
            tasks = [Task(this.key(p), p.run, this.folder(p), this.claim.observe) for p in planned]
            with _Progress(console, tasks, len(data.train_y)) as progress:

                def tell(kind: str, key: str, *rest: Any) -> None:
                    if kind == "failed":
                        failures.append(rest[0])
                    progress.tell(kind, key, *rest)
                    if kind == "finished":
                        this.collect()

                if jobs == 1:
                    for task in tasks:
                        _train(task, data, device, tell)
                else:
                    _train_side_by_side(tasks, data, jobs, device, tell)
    finally:
        if this.runs.exists():  # not where the first run was refused
            this.collect()
    if failures:
        raise failures[0]
    return this.collect()


def _train(task: Task, data: ImageData, device: str, tell: Tell) -> None:
    """Make one run, or go on with it; tells ``started``, ``epoch``, and ``finished`` or ``skipped``."""
    tell("started", task.key)

    def report(history: list[Row]) -> None:
        tell("epoch", task.key, len(history), history[-1][task.run.measures])

    try:
        outcome = train(
            task.run,
            data,
            task.folder,
            resume=newest_checkpoint(task.folder) is not None,
            report=report,
            devices="1",
            accelerator=device,
            observe=task.observe,
        )
    except InUse:
        tell("skipped", task.key)
        return
    tell(
        "finished",
        task.key,
        outcome.status,
        outcome.history[-1][task.run.measures] if outcome.history else None,
    )


def _train_side_by_side(tasks: Sequence[Task], data: ImageData, jobs: int, device: str, tell: Tell) -> None:
    """Processes that take run after run; one that dies leaves its run unfinished, the others go on.

    Each talks through a pipe of its own: with the pipe's other end a process is gone, whichever of
    the two it was.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    threads = max(1, torch.get_num_threads() // jobs)
    workers: dict[Any, Any] = {}
    busy: dict[Any, str] = {}
    with tempfile.TemporaryDirectory(prefix="normprop-") as folder:
        file = Path(folder) / "data.pt"
        torch.save(vars(data), file)
        try:
            for _ in range(min(jobs, len(tasks))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, file, device, threads), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process
            while workers:
                for connection in wait(list(workers)):
                    assert isinstance(connection, Connection)
                    try:
                        kind, *rest = connection.recv()
                    except (EOFError, ConnectionResetError):
                        process = workers.pop(connection)
                        process.join()
                        if connection in busy:
                            key, code = busy.pop(connection), process.exitcode
                            text = f"{key}: its process ended with code {code}; repeat with fewer --jobs"
                            tell("failed", key, InputError(text))
                        continue
                    if kind == "ready":
                        busy.pop(connection, None)
                        task = waiting.pop(0) if waiting else None
                        if task is not None:
                            busy[connection] = task.key
                        connection.send(task)
                    else:
                        tell(kind, *rest)
        finally:
            for process in workers.values():
                process.kill()  # every run keeps its last epoch
                process.join()


def _work(connection: Connection, file: Path, device: str, threads: int) -> None:
    """A worker: says ``ready``, gets a task or None, tells how it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it decides
    torch.set_num_threads(threads)
    data = ImageData(**torch.load(file, mmap=True))

    def tell(*event: Any) -> None:
        connection.send(event)

    while True:
        tell("ready")
        try:
            task = connection.recv()
        except EOFError:
            return
        if task is None:
            return
        try:
            _train(task, data, device, tell)
        except InputError as error:
            tell("failed", task.key, error)
        except BrokenPipeError:  # the parent is gone
            return
        except Exception:
            tell("failed", task.key, RuntimeError(f"{task.key}: {traceback.format_exc()}"))


def cost(run: Run, images: int) -> float:
    """Of a run, in images at full width; good enough to guess the time that is left."""
    used = images - run.validation if run.train_images is None else run.train_images
    steps = used / run.batch_size
    if run.limit_train_batches is not None:
        steps = min(steps, run.limit_train_batches)
    return run.epochs * steps * (STEP + run.batch_size * run.width)


class _Progress:
    """Bars on a terminal, elsewhere a line a finished run and one a minute of the others; the time that is left."""

    def __init__(self, console: Console | None, tasks: Sequence[Task], images: int) -> None:
        self.console = console
        self.epochs = {task.key: task.run.epochs for task in tasks}
        self.cost = {task.key: cost(task.run, images) for task in tasks}
        self.share: dict[str, float] = dict.fromkeys(self.epochs, 0.0)  # done, of each run
        self.before: dict[str, float] = {}  # done by an earlier command
        self.ended = 0
        self.started = self.told = time.perf_counter()
        self.live = console is not None and console.is_terminal
        self.bars = Progress(console=console, disable=not self.live, transient=True)
        self.bar: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        self.bars.__enter__()
        self.total = self.bars.add_task("", total=sum(self.cost.values()))
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.__exit__(*error)

    def tell(self, kind: str, key: str, *rest: Any) -> None:
        """Take note of ``started``, ``epoch``, ``finished``, ``skipped`` or ``failed``."""
        if kind == "started":
            self.bar[key] = self.bars.add_task(key, total=self.epochs[key])
            return
        if kind == "epoch":
            done, accuracy = rest
            self.before.setdefault(key, (done - 1) / self.epochs[key])
            self.share[key] = done / self.epochs[key]
            self.bars.update(self.bar[key], completed=done, description=f"{key}: {100 * accuracy:.1f} %")
        else:
            self.share[key] = 1.0
            if kind != "finished":
                self.before[key] = 1.0
            self.ended += 1
            if key in self.bar:
                self.bars.remove_task(self.bar.pop(key))
        done = sum(self.cost[k] * self.share[k] for k in self.cost)
        self.bars.update(
            self.total,
            completed=done,
            description=f"{self.ended} of {len(self.cost)} runs{self._left(done)}",
        )
        silent = time.perf_counter() - self.told
        if self.console is None or (kind == "epoch" and (self.live or silent < EVERY)):
            return
        self.told = time.perf_counter()
        if kind == "epoch":
            text = f"epoch {rest[0]} of {self.epochs[key]}, {100 * rest[1]:.1f} %"
        else:
            says = {"skipped": "another process makes it", "failed": f"failed: {rest[-1] if rest else ''}"}
            text = says.get(kind) or self._outcome(*rest)
        self.console.print(
            f"{self.ended} of {len(self.cost)}: {key}: {text}{self._left(done)}", highlight=False
        )

    @staticmethod
    def _outcome(status: str, accuracy: float | None) -> str:
        return f"{100 * accuracy:.1f} %" if status == "ok" and accuracy is not None else status

    def _left(self, done: float) -> str:
        made = done - sum(self.cost[k] * share for k, share in self.before.items())
        ahead = sum(self.cost.values()) - done
        if made <= 0 or ahead <= 0:
            return ""
        return f", about {duration((time.perf_counter() - self.started) / made * ahead)} left"
