"""One table of the engine symbols that an adapter depends on: patched from it, verified by it.

An adapter lists every symbol of its engine that it patches, subclasses, calls or reads as a
``Seam``. ``Surface`` applies patches that the table lists and no others, and ``verify`` stops a
server when a symbol that a feature in use needs is missing, has another signature, or was never
patched. ``engine_source`` checks the same table against an unpacked wheel without importing it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.after_import import after_import
from dflash_plugin.serving.variables import SWITCH

Kind = Literal["patch", "hook", "subclass", "call", "attribute", "write"]
# In a signature: the names behind it are given by keyword, so that their order does not matter.
KEYWORDS = "*"
# Last in a signature: the adapter accepts and passes on whatever other parameters there are.
MORE = "..."


class Seam(NamedTuple):
    """One symbol of an engine that an adapter depends on.

    Attributes:
        module: the module that defines the symbol.
        symbol: "function", "Class", "Class.method" or "Class.attribute".
        kind: "patch" and "hook" are replaced or acted on when their module is imported; "subclass"
            is a base class, or a method of one that the adapter overrides; "call" is called by the
            adapter; "attribute" is read, and may be written too; "write" is an attribute that the
            engine reads and that the adapter alone sets, so that an object may lack it at first.
        feature: the feature that needs the symbol; ``Surface.verify`` is given those in use.
        why: what the adapter does with the symbol.
        signature: the parameters that the adapter relies on, without self, in order; of a class,
            those of its constructor. Names behind ``KEYWORDS`` are given by keyword. Other
            parameters of a "call" need defaults; there may be none of a "patch", "hook" or
            "subclass" unless the signature ends with ``MORE``. None where nothing is relied on.
        since: the first engine version that has the symbol; all if empty.
        until: the first engine version that no longer has it; none if empty.
    """

    module: str
    symbol: str
    kind: Kind
    feature: str
    why: str
    signature: tuple[str, ...] | None = None
    since: str = ""
    until: str = ""

    @property
    def name(self) -> str:
        """The symbol with its module."""
        return f"{self.module}.{self.symbol}"

    def exists_in(self, version: str) -> bool:
        """Whether an engine version is expected to have the symbol."""
        number = _number(version)
        return (not self.since or number >= _number(self.since)) and (
            not self.until or number < _number(self.until)
        )


class Parameter(NamedTuple):
    """A parameter of an engine's function.

    Attributes:
        name: as it is spelled.
        kind: "positional" (which may also be given by keyword), "keyword", "*args" or "**kwargs".
        required: whether it has no default.
    """

    name: str
    kind: Literal["positional", "keyword", "*args", "**kwargs"]
    required: bool


class Surface:
    """The part of one engine version that an adapter depends on.

    Args:
        engine: the engine's name, for messages; also names the log.
        version: the installed engine version.
        seams: the adapter's whole table, for all versions.
    """

    def __init__(self, engine: str, version: str, seams: Iterable[Seam]) -> None:
        self.engine, self.version, self.seams = engine, version, tuple(seams)
        self._registered: set[tuple[str, str]] = set()
        self._applied: set[tuple[str, str]] = set()
        self._problems: dict[Seam, str] = {}
        self._logger = logging.getLogger(f"{engine}.dflash_plugin")

    def current(self) -> list[Seam]:
        """The seams of the installed version."""
        return [seam for seam in self.seams if seam.exists_in(self.version)]

    def has(self, module: str, symbol: str) -> bool:
        """Whether the table lists a symbol for the installed version."""
        return any((seam.module, seam.symbol) == (module, symbol) for seam in self.current())

    def patch(self, module: str, symbol: str, make: Callable[[Any], Any]) -> None:
        """Replace a symbol once its module is imported; at once if it has been.

        A symbol that is missing or whose signature changed is left alone, so that an engine that
        does not use the adapter keeps running; ``verify`` reports it. A symbol that the table does
        not list for the installed version is skipped.

        Args:
            module: the module that defines the symbol.
            symbol: listed in the table as "patch" or "hook".
            make: gets the native object (of a static or class method its function) and returns
                what takes its place, or None where the native object stays.

        Raises:
            KeyError: the table lists no such patch for any version.
        """
        key = (module, symbol)
        rows = [s for s in self.seams if key == s[:2] and s.kind in ("patch", "hook")]
        if not rows:
            raise KeyError(f"{module}.{symbol} is not in the table of {self.engine} patches")
        row = next((seam for seam in rows if seam.exists_in(self.version)), None)
        if row is None or key in self._registered:
            return
        self._registered.add(key)
        after_import(module, partial(self._apply, row, make))

    def record(self, module: str, symbol: str) -> None:
        """Note that a patch was applied by other means, such as the engine's own hooks."""
        self._registered.add((module, symbol))
        self._applied.add((module, symbol))

    def _apply(self, seam: Seam, make: Callable[[Any], Any], module: ModuleType) -> None:
        problem = _problem_at_run_time(seam, module)
        if problem is not None:
            self._problems[seam] = problem
            self._logger.warning("%s is left as it is: %s", seam.name, problem)
            return
        *path, name = seam.symbol.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part)
        native = inspect.getattr_static(owner, name) if path else getattr(owner, name)
        method = type(native) if isinstance(native, staticmethod | classmethod) else None
        if isinstance(native, staticmethod | classmethod):
            native = native.__func__
        made = make(native)
        if made is not None and made is not native:
            setattr(owner, name, made if method is None else method(made))
        self._applied.add(seam[:2])

    def verify(self, features: Collection[str], load: bool = False) -> None:
        """Check every seam of the installed version.

        Modules of features that are not in use are not imported; what is wrong with those that
        are imported already is logged as a warning.

        Args:
            features: those in use in this process.
            load: import the patched modules of these features first. Without it, a patched module
                that the engine has not imported counts as a patch that never applied.

        Raises:
            DFlashError: a feature in use needs a symbol that is missing, changed or not patched.
        """
        wrong = []
        for seam in self.current():
            in_use = seam.feature in features
            problem = self._problem(seam, in_use, load)
            if problem is None:
                continue
            found = f"{seam.name} ({seam.feature}: {seam.why}): {problem}"
            if in_use:
                wrong.append(found)
            elif seam not in self._problems:  # Those were logged when their module was imported.
                self._logger.warning("%s", found)
        self._stop(wrong)

    def verify_object(self, value: object) -> None:
        """Check what the table lists of a live object's classes, instance attributes included.

        Raises:
            DFlashError: the object lacks an attribute or method.
        """
        classes = {(cls.__module__, cls.__qualname__) for cls in type(value).__mro__}
        wrong = []
        for seam in self.current():
            owner, _, name = seam.symbol.rpartition(".")
            if seam.kind == "write" or (seam.module, owner) not in classes:
                continue
            if not _has(value, name):
                kind = type(value).__name__
                wrong.append(
                    f"{seam.name} ({seam.feature}: {seam.why}): the {kind} has no {name!r}"
                )
        self._stop(wrong)

    def read(self, value: object, symbol: str, default: Any = None) -> Any:
        """An attribute that only some engine versions have.

        Args:
            value: the engine's object.
            symbol: "Class.attribute", as the table lists it.
            default: returned for versions that the table says lack it.

        Raises:
            KeyError: the table lists no such attribute for any version.
            DFlashError: the object lacks it although its version should have it.
        """
        rows = [seam for seam in self.seams if seam.symbol == symbol]
        if not rows:
            raise KeyError(f"{symbol} is not in the table of {self.engine} symbols")
        row = next((seam for seam in rows if seam.exists_in(self.version)), None)
        if row is None:
            return default
        name = symbol.rpartition(".")[2]
        if not _has(value, name):
            kind = type(value).__name__
            self._stop([f"{row.name} ({row.feature}: {row.why}): the {kind} has no {name!r}"])
        return getattr(value, name)

    def _problem(self, seam: Seam, in_use: bool, load: bool) -> str | None:
        if seam in self._problems:
            return self._problems[seam]
        is_patch = seam.kind in ("patch", "hook")
        if seam.module not in sys.modules:
            if not in_use:
                return None
            if is_patch and not load:
                return "never patched, since the engine has not imported its module"
            try:
                importlib.import_module(seam.module)
            except ImportError as error:
                return f"its module cannot be imported ({error})"
        if seam in self._problems:
            return self._problems[seam]
        if is_patch and seam[:2] in self._applied:
            return None
        if is_patch and seam[:2] in self._registered:
            return "never patched, although its module is imported"
        if is_patch:  # Registered by no one: the plugin is off, or the adapter forgot it.
            return "no patch was registered" if in_use else None
        return _problem_at_run_time(seam, sys.modules[seam.module])

    def _stop(self, wrong: Sequence[str]) -> None:
        if wrong:
            raise DFlashError(
                f"{self.engine} {self.version} is not what dflash-plugin expects: "
                + "; ".join(wrong)
                + f". Install a version of {self.engine} that dflash-plugin supports, or set "
                f"{SWITCH}=off to use {self.engine}'s own DFlash"
            )


def mismatch(seam: Seam, parameters: Sequence[Parameter]) -> str | None:
    """How a function's parameters differ from those that a seam relies on, or None."""
    if seam.signature is None:
        return None
    names = [name for name in seam.signature if name != MORE]
    split = names.index(KEYWORDS) if KEYWORDS in names else len(names)
    ordered, keywords = names[:split], names[split + 1 :]
    by_name = {p.name: p for p in parameters}
    positional = [p.name for p in parameters if p.kind == "positional"]
    takes_any = any(p.kind == "**kwargs" for p in parameters)
    others = [p for p in parameters if p.name not in names and p.kind in ("positional", "keyword")]
    if seam.kind == "call":
        others = [p for p in others if p.required]
    fits = (
        positional[: len(ordered)] == ordered
        and all(takes_any or name in by_name for name in keywords)
        and (not others or MORE in seam.signature)
    )
    if fits:
        return None
    expected = ", ".join(seam.signature)
    found = ", ".join(p.name if p.required else f"{p.name}=" for p in parameters)
    return f"expected the parameters ({expected}), found ({found})"


def _number(version: str) -> tuple[int, ...]:
    found = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return tuple(found + [0] * (3 - len(found)))


def _has(value: object, name: str) -> bool:
    try:
        getattr(value, name)
    except AttributeError:
        return False
    return True


def _problem_at_run_time(seam: Seam, module: ModuleType) -> str | None:
    """What is wrong with a seam in its imported module, or None.

    Attributes that a class sets on its instances cannot be seen there: see
    ``Surface.verify_object``.
    """
    *path, name = seam.symbol.split(".")
    owner: Any = module
    for part in path:
        owner = inspect.getattr_static(owner, part, None)
        if owner is None:
            return f"{seam.module} has no {part!r}"
    if not _has(owner, name):
        if seam.kind in ("attribute", "write") and path:
            return None
        return f"{seam.module} has no {seam.symbol!r}"
    if seam.signature is None:
        return None
    native = inspect.getattr_static(owner, name) if path else getattr(owner, name)
    bound = isinstance(owner, type) and not isinstance(native, staticmethod)
    if isinstance(native, staticmethod | classmethod):
        native = native.__func__
    try:
        parameters = list(inspect.signature(native).parameters.values())
    except (TypeError, ValueError) as error:
        return f"its signature cannot be read ({error})"
    if bound and not isinstance(native, type):
        parameters = parameters[1:]
    elif path and not isinstance(owner, type):  # A method of an object that the module holds.
        parameters = list(inspect.signature(getattr(owner, name)).parameters.values())
    return mismatch(seam, [_parameter(p) for p in parameters])


def _parameter(given: inspect.Parameter) -> Parameter:
    kinds: dict[Any, Any] = {
        inspect.Parameter.VAR_POSITIONAL: "*args",
        inspect.Parameter.VAR_KEYWORD: "**kwargs",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
    }
    return Parameter(
        given.name,
        kinds.get(given.kind, "positional"),
        given.default is inspect.Parameter.empty,
    )
