"""Typed access to a checkpoint's configuration, with errors that name the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_plugin.errors import DFlashError

_MISSING: Any = object()


class Fields:
    """Values of one or more nested JSON objects; where several have a name, they must agree.

    Args:
        sections: (prefix shown in errors, object) in the order in which they are asked.
    """

    def __init__(self, *sections: tuple[str, Mapping[str, Any]]) -> None:
        self._sections = sections

    def find(self, *names: str) -> tuple[str, Any]:
        """Full name and value of the first of ``names`` that is there and not null.

        Args:
            names: of one setting.

        Raises:
            DFlashError: the setting stands elsewhere, or by another of its names, with another
                value.
        """
        found = [
            (f"{prefix}{name}", section[name])
            for prefix, section in self._sections
            for name in names
            if section.get(name) is not None
        ]
        if not found:
            return names[0], None
        full_name, value = found[0]
        for other_name, other in found[1:]:
            if other != value:
                raise contradiction(full_name, value, other_name, other)
        return full_name, value

    def get(self, *names: str, default: Any = None) -> Any:
        """The value, or ``default``."""
        value = self.find(*names)[1]
        return default if value is None else value

    def integer(self, *names: str, default: Any = _MISSING, minimum: int = 1) -> Any:
        """An integer of at least ``minimum``."""
        name, value = self.find(*names)
        if value is None:
            return self._default(name, default, "an integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise DFlashError(f"{name} is {value!r}: give an integer of at least {minimum}")
        return value

    def number(self, *names: str, default: Any = _MISSING) -> Any:
        """A finite number."""
        name, value = self.find(*names)
        if value is None:
            return self._default(name, default, "a number")
        if not is_number(value):
            raise DFlashError(f"{name} is {value!r}: give a finite number")
        return float(value)

    def flag(self, *names: str, default: Any = _MISSING) -> Any:
        """true or false."""
        name, value = self.find(*names)
        if value is None:
            return self._default(name, default, "true or false")
        if not isinstance(value, bool):
            raise DFlashError(f"{name} is {value!r}: write true or false")
        return value

    def text(self, *names: str, default: Any = _MISSING) -> Any:
        """A string."""
        name, value = self.find(*names)
        if value is None:
            return self._default(name, default, "a string")
        if not isinstance(value, str):
            raise DFlashError(f"{name} is {value!r}: write a string")
        return value

    def integers(self, *names: str, default: Any = _MISSING) -> Any:
        """A non-empty list of integers, as a tuple."""
        name, value = self.find(*names)
        if value is None:
            return self._default(name, default, "a list of integers")
        well_formed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        if not well_formed or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise DFlashError(f"{name} is {value!r}: give a list of integers like [1, 9, 17]")
        return tuple(value)

    @staticmethod
    def _default(name: str, default: Any, kind: str) -> Any:
        if default is _MISSING:
            raise DFlashError(f"{name} is missing: add it to config.json ({kind})")
        return default


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no true or false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Beyond it an integer has no float.
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def contradiction(name: str, value: Any, other_name: str, other: Any) -> DFlashError:
    """The refusal of two statements that cannot both be right."""
    return DFlashError(
        f"{name} is {value!r} and {other_name} is {other!r}: leave out the one that the drafter "
        "was not trained with"
    )


def section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A nested object, empty where it is absent."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DFlashError(f"{name} is {value!r}: it must be a JSON object")
    return value
