"""DFlash in SGLang. ``register`` is the entry point in ``sglang.srt.plugins``.

SGLang logs and skips what goes wrong in a plugin, so a fault here ends the process with its reason.
"""


def register() -> None:
    """Make ``--speculative-algorithm DFLASH`` this project's, in every SGLang process."""
    try:
        from dflash_plugin.sglang.plugin import activate

        activate()
    except Exception as error:
        raise SystemExit(
            f"dflash-plugin could not be set up: {type(error).__name__}: {error}. "
            "Set DFLASH_PLUGIN=off to run SGLang without it."
        ) from error
