"""One error for numbers that are no longer numbers, so that a job of many runs can tell it from bad input."""


class NotFiniteError(ValueError, FloatingPointError):
    """A network or a loss diverged: nan or inf where a finite value is needed.

    A ValueError for those who call one function; a FloatingPointError, as stages raise, for a job that goes on
    with its next run.
    """
