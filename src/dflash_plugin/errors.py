"""The error that every bad checkpoint, configuration or input ends in."""

# The way out where nothing else helps, at the end of a message.
OFF = "DFLASH_PLUGIN=off leaves the drafter to the engine"


class DFlashError(ValueError):
    """A checkpoint, configuration or input that cannot be used.

    The message names the offending value and says how to fix it.
    """


def reason(error: Exception) -> str:
    """The first line of another library's error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
