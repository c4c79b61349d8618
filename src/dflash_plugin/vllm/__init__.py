"""DFlash in vLLM. ``register`` is the entry point in ``vllm.general_plugins``.

vLLM logs and skips an entry point that fails to import, so everything is imported inside it: what
goes wrong there ends the process with its reason.
"""


def register() -> None:
    """Make ``method="dflash"`` this project's, in every vLLM process."""
    from dflash_plugin.vllm.plugin import activate

    activate()
