"""The package as a whole."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dflash_plugin

ROOT = Path(dflash_plugin.__file__).parent
ADAPTERS = ("vllm", "sglang")
# Low to high: a module imports from its own level and from lower ones.
ORDER = (
    ("__init__", "charts", "errors", "prompts"),
    ("kernels",),
    ("decoding",),
    ("drafter",),
    ("checkpoints",),
    ("adaptive",),
    ("serving",),
    ("transformers",),
    ("train",),
    ("monitor",),
    ("bench",),
    ("doctor",),
    ADAPTERS,
    ("cli", "__main__"),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


def imports_of(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in names if name in modules)


def test_no_import_goes_up_and_none_runs_in_a_circle():
    modules = {
        ".".join(("dflash_plugin", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in ROOT.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {name: set(imports_of(path, modules)) for name, path in modules.items()}
    assert len(graph) > 100
    parts = {name: [*name.split("."), "__init__"][1] for name in graph}
    upward = [
        f"{name} imports {other}"
        for name, others in sorted(graph.items())
        for other in sorted(others)
        if LEVELS[parts[other]] > LEVELS[parts[name]]
        or (parts[name] != parts[other] and {parts[name], parts[other]} == set(ADAPTERS))
    ]
    assert not upward, "\n".join(upward)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import circle: {' -> '.join(error.args[1])}") from None


def test_importing_the_core_pulls_in_no_engine():
    modules = [
        ".".join(("dflash_plugin", *path.relative_to(ROOT).with_suffix("").parts))
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "__init__.py" and path.relative_to(ROOT).parts[0] not in ADAPTERS
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"sys.exit(' '.join(n for n in {ADAPTERS!r} if n in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 20


def test_the_example_answers_every_question(smollm2):
    done = subprocess.run(
        [sys.executable, ROOT.parents[1] / "examples" / "batch.py", "Name a color.", "Say hello."],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("τ ") == 2
    assert "[0] " in done.stdout
    assert "[1] " in done.stdout


def test_the_readme_shows_the_recorded_results():
    done = subprocess.run(
        [sys.executable, ROOT.parents[1] / "tools" / "make_tables.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
