"""The program as a process: version, completion, a terminal without UTF-8, missing packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dflash_plugin

ROOT = Path(dflash_plugin.__file__).parents[1]
# Refuses this project's imports of the packages named in its first argument (Transformers may have
# them), then runs the code in its second.
BLOCKED = """
import sys
blocked, code = sys.argv[1].split(","), sys.argv[2]
class Finder:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        importer = frame.f_globals.get("__name__", "")
        if name in blocked and importer.startswith("dflash_plugin"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = sys.argv[3:]
exec(code)
"""
CLI_PACKAGES = "typer,rich,httpx,gguf,accelerate"


def python(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == code, done.stderr.decode()
    return done


def test_version_and_help_of_the_module():
    shown = python("-m", "dflash_plugin", "--version").stdout.decode()
    assert shown == f"dflash-plugin {dflash_plugin.__version__}\n"
    assert "generate" in python("-m", "dflash_plugin", "--help").stdout.decode()


def test_help_starts_without_torch():
    code = (
        "from dflash_plugin.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    python("-c", BLOCKED, "nothing", code, "train", "--help")


def test_completion_names_the_commands():
    code = "from dflash_plugin.__main__ import main; sys.argv[0] = 'dflash-plugin'; main()"
    shown = python(
        "-c", BLOCKED, "nothing", code,
        _DFLASH_PLUGIN_COMPLETE="complete_bash", COMP_WORDS="dflash-plugin con", COMP_CWORD="1",
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )  # fmt: skip
    assert shown.stdout.decode().split() == ["convert"]
    assert "--install-completion" in python("-m", "dflash_plugin", "--help").stdout.decode()


@pytest.mark.parametrize("command", [[], ["eval"], ["generate"], ["train"], ["top"]])
def test_help_is_readable_in_a_terminal_without_utf8(command):
    arguments = ("-m", "dflash_plugin", *command, "--help")
    shown = python(*arguments, PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert "Usage" in shown.stdout.decode("latin-1")
    assert not set("?\\") & set(shown.stdout.decode("latin-1"))
    ascii_only = python(*arguments, PYTHONIOENCODING="ascii")
    assert ascii_only.stdout.isascii()


@pytest.mark.parametrize("package", CLI_PACKAGES.split(",")[:2])
def test_the_program_says_what_to_install(package):
    code = "from dflash_plugin.__main__ import main; main()"
    done = python("-c", BLOCKED, package, code, "--help", code=1)
    message = done.stderr.decode()
    assert message.splitlines() == [
        f"error: the command line needs {package}, which is not installed: run "
        "pip install 'dflash-plugin[cli]'"
    ]


def test_a_command_says_what_to_install():
    code = "from dflash_plugin.__main__ import main; main()"
    arguments = ("top", "--server", "http://localhost:1", "--once")
    done = python("-c", BLOCKED, "httpx", code, *arguments, code=1)
    assert "needs httpx, which is not installed" in done.stderr.decode()


def test_serving_needs_no_package_of_the_command_line():
    """The core and the adapters load without the extra's packages, as far as an engine is there."""
    folders = (
        "adaptive", "checkpoints", "decoding", "drafter", "kernels", "serving", "sglang",
        "transformers", "vllm",
    )  # fmt: skip
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in folders
        for path in sorted((ROOT / "dflash_plugin" / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = """
import importlib
loaded = 0
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        loaded += 1
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("vllm", "sglang"):
            raise
print(loaded)
"""
    done = python("-c", BLOCKED, CLI_PACKAGES, code, *modules)
    assert int(done.stdout) > 60
