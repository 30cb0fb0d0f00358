"""Result files: written whole or not at all, with what made them."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import normprop
from normprop.records import whole

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]
from normprop.recipes import InputError, check_choice, writing


def environment(accelerator: str = "auto") -> dict[str, Any]:
    """Versions, device, threads and commit, for every result file; ``"cpu"`` for what runs beside a GPU."""
    if accelerator != "cpu" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "versions": {
            "normprop": normprop.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch-lightning": version("pytorch-lightning"),
        },
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def check_device(device: str, known: Sequence[str] = ("cpu", "cuda")) -> None:
    """Refuse a device that is unknown, or CUDA where torch sees none.

    Raises:
        InputError: If it is.
    """
    check_choice("--device", device, known)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")


def _commit() -> str | None:
    """The checkout's commit, with '+' if the package's files differ from it; None for an installed package."""
    root = Path(normprop.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "normprop") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def new_figure(path: Path, columns: int, lines: int = 1, width: float = 4.5, height: float = 3.6) -> Any:
    """A figure and its axes in a grid, always two-dimensional; saved whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield figure, axes
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        with whole(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    finally:
        plt.close(figure)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same folder, which must exist."""
    with (folder / ".lock").open("w") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _innermost_on_one_line(text: str) -> str:
    """Lists and objects that hold no other, short enough for a line, without their line breaks."""

    def join(match: re.Match[str]) -> str:
        line = re.sub(r"\n *", " ", match[0])
        line = line[0] + line[2:-2] + line[-1]
        return line if len(line) <= 160 or line[0] == "[" else match[0]

    return re.sub(r"[\[{]\n[^\[\]{}]*\n *[\]}]", join, text)


class InUse(InputError):
    """Another process writes to the folder."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, :func:`whole`."""
    with whole(path) as temporary:
        temporary.write_text(_innermost_on_one_line(json.dumps(value, indent=1, allow_nan=False)) + "\n")


def _lock(out: Path) -> Any:
    """Hold ``out`` for this run; the system lets go of it however the process ends."""
    if fcntl is None or os.environ.get("LOCAL_RANK", "0") != "0":  # the processes of one run share it
        return None
    handle = (out / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise InUse(f"--out {out}: another run is writing there; choose another --out") from None
    return handle


@contextmanager
def output_folder(out: Path, keep: Sequence[str] = ("results.json",)) -> Iterator[Path]:
    """Create ``out``, and take it away again if the block fails before there is a checkpoint or a file of ``keep``.

    One process at a time: a second one into the same folder is refused.

    Raises:
        InputError: If nothing can be written there, at the start or later (a full disk).
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]

    def undo() -> None:
        if not new or any((out / kept).exists() for kept in keep) or list(out.glob("checkpoints/*.ckpt")):
            return
        shutil.rmtree(out, ignore_errors=True)
        for folder in new[1:]:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    lock = None
    with writing("--out", out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = _lock(out)
            probe = out / f".write-test-{os.getpid()}"
            probe.write_bytes(b"normprop" * 512)
            probe.unlink()
            yield out
        except BaseException:
            undo()
            raise
        finally:
            if lock is not None:
                (out / ".lock").unlink(missing_ok=True)
                lock.close()
