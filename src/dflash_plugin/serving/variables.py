"""The environment variables of this project, and what to say of one that is none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from dflash_plugin.checkpoints.hub import CACHE
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY

SWITCH = "DFLASH_PLUGIN"
PREFIX = f"{SWITCH}_"
# A file of options, where an engine has no place for them.
FILE = f"{SWITCH}_CONFIG"
# Variables that are no options.
OTHERS = (FILE, CACHE)
OFF, ON = ("off", "0", "false", "no"), ("on", "1", "true", "yes", "")
# What Kubernetes sets in every container for services whose names begin like this project's.
OF_A_SERVICE = re.compile(
    r"(.+_)?(SERVICE_(HOST|PORT)(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def is_off() -> bool:
    """Whether the user asked for the engine's own DFlash."""
    return _switch() in OFF


def require_switch() -> None:
    """Check the switch, where DFlash is asked for.

    Raises:
        DFlashError: it is neither on nor off.
    """
    if _switch() not in OFF + ON:
        raise DFlashError(f"{SWITCH} is {os.environ[SWITCH]!r}: give on or off, or unset it")


def given_options() -> dict[str, str]:
    """The variables that are meant as options, by the option; those that are blank are unset."""
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in os.environ.items()
        if name.startswith(PREFIX)
        and name not in OTHERS
        and OF_A_SERVICE.fullmatch(name.removeprefix(PREFIX)) is None
        and value.strip()
    }


def variable(option: str) -> str:
    """The environment variable of an option."""
    return PREFIX + option.upper()


def require_options(given: Mapping[str, str], options: Iterable[str]) -> None:
    """Check that variables are an engine's options.

    Args:
        given: ``given_options()``.
        options: the names of those that the engine has.

    Raises:
        DFlashError: names the variable that is none, and the nearest one that is.
    """
    known = list(options)
    for option, value in given.items():
        if option not in known:
            similar = nearest(option, [*known, *(name[len(PREFIX) :].lower() for name in OTHERS)])
            raise DFlashError(
                f"environment: {KEY}.{option} is {value!r}: there is no variable {variable(option)}"
                + (f", did you mean {variable(similar)}?" if similar else "")
                + f"; the options are {', '.join(known)}"
            )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a misspelt one."""
    plain = name.lower().replace("-", "_")
    return next(iter(get_close_matches(plain, known, n=1, cutoff=0.7)), None)


def _switch() -> str:
    return os.environ.get(SWITCH, "").strip().lower()
