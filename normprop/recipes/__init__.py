"""Users of the library: data, models, training, comparison (extra: 'normprop[recipes]')."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # of a result file


class InputError(ValueError):
    """Bad input, told in one line: what was expected, what came, what to type."""


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Take what the file system refuses in this block for bad input.

    Raises:
        InputError: If it refuses anything, at the start or later (a full disk).
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot write there ({error.strerror or error}); choose another place or free space"
        ) from error


def check_choice(option: str, value: object, known: Collection[str]) -> None:
    """Refuse what is not one of the known names.

    Raises:
        InputError: If it is none.
    """
    if value not in known:
        raise InputError(f"{option} {value}: expected one of {', '.join(known)}")


def check_count(option: str, value: int | None, minimum: int = 1) -> None:
    """Refuse a whole number below ``minimum``, or one that torch's sizes cannot hold; None is fine.

    Raises:
        InputError: If it is.
    """
    if value is not None and value < minimum:
        raise InputError(f"{option} {value}: expected at least {minimum}")
    if value is not None and value >= 2**31:
        raise InputError(f"{option} {value}: expected at most {2**31 - 1}")


def check_seed(seed: int) -> None:
    """Refuse a seed that not every random generator takes.

    Raises:
        InputError: If it is below 0 or of more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: expected 0 to {2**32 - 1}")


def first_line(error: BaseException) -> str:
    """What an error says, or its name if it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def duration(seconds: float) -> str:
    """Seconds as people read them: ``"12.0 s"``, ``"3.5 min"``, ``"2.1 h"``."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
