"""The error that every bad checkpoint, configuration or input ends in."""

# The way out where nothing else helps, at the end of a message.
OFF = "DFLASH_PLUGIN=off leaves the drafter to the engine"


class DFlashError(ValueError):
    """A checkpoint, configuration or input that cannot be used.

    The message names the offending value and says how to fix it.
    """


# Of another library's error; some list everything that they know.
_LONGEST = 600


def reason(error: Exception) -> str:
    """The first line of another library's error, or its kind where it says nothing.

    A line that ends with a colon takes the next one along.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    first = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
