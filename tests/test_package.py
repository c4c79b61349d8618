"""The package as a whole."""

import subprocess
import sys
from pathlib import Path

import dflash_plugin

ROOT = Path(dflash_plugin.__file__).parent
ADAPTERS = ("vllm", "sglang")


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
