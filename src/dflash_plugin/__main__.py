"""The program ``dflash-plugin``, also as ``python -m dflash_plugin``."""

from __future__ import annotations

import codecs
import sys

EXTRA = ("typer", "rich", "httpx", "gguf", "accelerate")
"""Packages of the ``cli`` extra; serving needs none of them."""
_SPELLED_OUT = {"τ": "tau", "×": "x", "→": "->", "…": "...", "–": "-", "’": "'", "•": "*"}


def main() -> None:
    """Run the command line, or say what to install where its packages are missing."""
    codecs.register_error("dflash-plugin", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="dflash-plugin")
    try:
        from dflash_plugin.cli.main import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(
            f"error: the command line needs {package}, which is not installed: run "
            "pip install 'dflash-plugin[cli]'"
        )


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: what the terminal's encoding lacks is spelled in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_SPELLED_OUT.get(character, "?") for character in text), error.end


if __name__ == "__main__":
    main()
