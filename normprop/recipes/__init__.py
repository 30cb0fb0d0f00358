"""Users of the public API, nothing more: data, models, training, comparison (extra: 'normprop[recipes]')."""


class InputError(ValueError):
    """Bad input, told in one line: what was expected, what came, what to type."""
