"""The error that every bad checkpoint, configuration or input ends in."""


class DFlashError(ValueError):
    """A checkpoint, configuration or input that cannot be used.

    The message names the offending value and says how to fix it.
    """
