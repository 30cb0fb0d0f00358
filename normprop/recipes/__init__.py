"""Users of the library: data, models, training, comparison (extra: 'normprop[recipes]')."""


class InputError(ValueError):
    """Bad input, told in one line: what was expected, what came, what to type."""


def duration(seconds: float) -> str:
    """Seconds as people read them: ``"12.0 s"``, ``"3.5 min"``, ``"2.1 h"``."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
