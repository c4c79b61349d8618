"""The error that every bad checkpoint, configuration or input ends in."""


class DFlashError(ValueError):
    """A checkpoint, configuration or input that cannot be used.

    The message names the offending value and says how to fix it.
    """


def reason(error: Exception) -> str:
    """The first line of another library's error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
