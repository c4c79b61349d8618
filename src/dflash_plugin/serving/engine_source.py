"""Checks the table of an adapter's engine symbols against source text; imports no engine."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from dflash_plugin.serving.engine_surface import Parameter, Seam, mismatch

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def check_source(root: Path, seams: Iterable[Seam], version: str) -> list[str]:
    """What the source of an engine version lacks of a table; nothing is imported.

    Args:
        root: a folder with the engine's top package, such as an unpacked wheel or site-packages.
        seams: the table; only the seams of ``version`` are checked.
        version: of the engine in ``root``.

    Returns:
        One line per seam that is missing or has another signature.
    """
    source = _Source(root)
    wrong = []
    for seam in seams:
        if not seam.exists_in(version):
            continue
        problem = source.problem(seam)
        if problem is not None:
            wrong.append(f"{seam.name} ({seam.feature}: {seam.why}): {problem}")
    return wrong


class _Class:
    """A class in source text.

    Attributes:
        bases: those that are in the source too, nearest first.
    """

    def __init__(self, node: ast.ClassDef, bases: list[_Class]) -> None:
        self.node, self.bases = node, bases

    def lineage(self) -> Iterator[_Class]:
        """The class and its bases."""
        yield self
        for base in self.bases:
            yield from base.lineage()

    def member(self, name: str) -> ast.AST | None:
        """What a name of an instance or of the class stands for."""
        for cls in self.lineage():
            if name in cls._members:
                return cls._members[name]
        return None

    @cached_property
    def _members(self) -> dict[str, ast.AST]:
        found: dict[str, ast.AST] = {}
        for node in _statements(self.node.body):
            if isinstance(node, FunctionNode):
                found.update(_assigned_to_self(node))
        found.update(_names(self.node.body))
        return found

    def constructor(self) -> list[Parameter]:
        """The constructor's parameters, without self."""
        for cls in self.lineage():
            init = cls._members.get("__init__")
            if isinstance(init, FunctionNode):
                return _parameters(init)[1:]
        fields: dict[str, Parameter] = {}
        for cls in reversed(list(self.lineage())):
            for node in cls.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    name = node.target.id
                    fields[name] = Parameter(name, "positional", node.value is None)
        return list(fields.values())


class _Source:
    """The modules under a folder, parsed when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, dict[str, ast.AST] | None] = {}

    def problem(self, seam: Seam) -> str | None:
        if self._names_of(seam.module) is None:
            return "its module is missing"
        owner, _, member = seam.symbol.partition(".")
        found = self._find(seam.module, owner)
        if found is None:
            return f"the module has no {owner!r}"
        node: ast.AST | _Class = found
        if member:
            node = self._member(seam.module, found, member)  # type: ignore[assignment]
            if node is None:
                return f"{owner} has no {member!r}"
        if seam.signature is None:
            return None
        parameters: list[Parameter] | None = None
        if isinstance(node, _Class):
            parameters = node.constructor()
        elif isinstance(node, FunctionNode):
            is_free = not member or "staticmethod" in map(_last_name, node.decorator_list)
            parameters = _parameters(node)[0 if is_free else 1 :]
        return "it is not a function" if parameters is None else mismatch(seam, parameters)

    def _member(self, module: str, owner: ast.AST | _Class, name: str) -> ast.AST | None:
        """A member of a class, or of the class that a module's object is made of."""
        if isinstance(owner, ast.Assign | ast.AnnAssign) and isinstance(owner.value, ast.Call):
            made_of = self._find(module, _last_name(owner.value.func))
            owner = made_of if made_of is not None else owner
        return owner.member(name) if isinstance(owner, _Class) else None

    def _find(self, module: str, name: str) -> ast.AST | _Class | None:
        names = self._names_of(module)
        node = None if names is None else names.get(name)
        if isinstance(node, ast.ImportFrom):
            origin = next(a.name for a in node.names if (a.asname or a.name) == name)
            source = self._absolute(module, node)
            found = self._find(source, origin)
            # A name from outside the source is there, but nothing is known of it.
            return node if found is None and self._names_of(source) is None else found
        if isinstance(node, ast.ClassDef):
            bases = (self._find(module, _last_name(base)) for base in node.bases)
            return _Class(node, [base for base in bases if isinstance(base, _Class)])
        return node

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".")
        if self._path(module).name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _path(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")

    def _names_of(self, module: str) -> dict[str, ast.AST] | None:
        if module not in self._modules:
            path = self._path(module)
            self._modules[module] = (
                _names(ast.parse(path.read_text(encoding="utf-8")).body) if path.is_file() else None
            )
        return self._modules[module]


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block and of the branches in it, but not of functions and classes."""
    for node in body:
        yield node
        for branch in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, FunctionNode | ast.ClassDef):
                yield from _statements(getattr(node, branch, []))


def _names(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """What a block defines, by name; what a name is defined as first counts."""
    found: dict[str, ast.AST] = {}
    for node in _statements(body):
        names: list[str] = []
        if isinstance(node, FunctionNode | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            if name not in found or _is_overload(found[name]):
                found[name] = node
    return found


def _is_overload(node: ast.AST) -> bool:
    return isinstance(node, FunctionNode) and "overload" in map(_last_name, node.decorator_list)


def _assigned_to_self(function: FunctionNode) -> dict[str, ast.AST]:
    """The attributes that a method sets on its object."""
    if not function.args.args:
        return {}
    self_name = function.args.args[0].arg
    found: dict[str, ast.AST] = {}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == self_name
        ):
            found.setdefault(node.attr, node)
    return found


def _parameters(function: FunctionNode) -> list[Parameter]:
    given = function.args
    ordered = [*given.posonlyargs, *given.args]
    first_default = len(ordered) - len(given.defaults)
    found = [Parameter(a.arg, "positional", i < first_default) for i, a in enumerate(ordered)]
    if given.vararg is not None:
        found.append(Parameter(given.vararg.arg, "*args", False))
    for keyword, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append(Parameter(keyword.arg, "keyword", default is None))
    if given.kwarg is not None:
        found.append(Parameter(given.kwarg.arg, "**kwargs", False))
    return found


def _last_name(node: ast.expr) -> str:
    """The name that an expression such as ``module.Class[T]`` ends with."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )
