"""Families of targets on engines that share a device, each family in a process of its own.

A family that hangs is ended at a time limit; what ends one process does not end the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What a process leaves behind when it has found an outcome.
FOUND = "found.json"
# Characters of a message, at most; refusals are shorter.
MESSAGE = 400


@dataclass(frozen=True)
class Runs:
    """How families are run.

    Attributes:
        device: "cuda" or "cpu".
        jobs: families at the same time.
        limit: seconds of a family, over all of its attempts.
        where: by engine, its interpreter, or the directory of packages that it is in; this
            interpreter and its packages where there is none.
        logs: takes what each process prints; None keeps nothing.
        program: by engine, the module that runs a family; its arguments are the family, the number
            of the attempt and a directory.
    """

    device: str
    jobs: int = 6
    limit: float = 200.0
    where: dict[str, Path] = field(default_factory=dict)
    logs: Path | None = None
    program: Callable[[str], str] = "tests.on_{}.one_family".format

    def all(
        self,
        engines: Iterable[str],
        families: Iterable[str],
        keep: Callable[[str, str, dict[str, Any]], None],
    ) -> None:
        """Run all families on all engines.

        Args:
            engines: their names.
            families: likewise.
            keep: takes an engine, a family and its outcome, one at a time as they come.
        """
        pairs = [(engine, family) for family in families for engine in engines]
        with ThreadPoolExecutor(self.jobs) as pool:
            running = {pool.submit(self.one, *pair): pair for pair in pairs}
            for done in as_completed(running):
                keep(*running[done], done.result())

    def one(self, engine: str, family: str) -> dict[str, Any]:
        """The outcome of a family on an engine.

        Returns:
            ``text``, ``message`` and more, as the engine's program says it; or "fails" with the end
            of what the process printed. ``seconds`` is what it took.
        """
        started, attempt = time.monotonic(), 0
        while True:
            left = self.limit - (time.monotonic() - started)
            outcome = self._attempt(engine, family, attempt, left)
            attempt += 1
            if not outcome.pop("tries_next", False):
                break
        if "message" in outcome:
            outcome["message"] = one_line(outcome["message"])
        return {**outcome, "seconds": round(time.monotonic() - started, 1)}

    def _attempt(self, engine: str, family: str, attempt: int, limit: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            place = Path(directory)
            log = place / "log"
            python, environment = self._environment(engine, write_metadata(place / "metadata"))
            with log.open("w") as file:
                process = subprocess.Popen(
                    [python, "-m", self.program(engine), family, str(attempt), directory],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    process.wait(max(limit, 0.0))
                    ended = f"the process ended ({process.returncode})"
                except subprocess.TimeoutExpired:
                    ended = f"it did not end within {self.limit:.0f} s"
                finally:
                    end(process)
            printed = log.read_text(errors="replace")
            if self.logs is not None:
                self.logs.mkdir(parents=True, exist_ok=True)
                name = f"{engine}-{family.replace('/', ' ')}-{attempt}.log"
                (self.logs / name).write_text(printed)
            if (place / FOUND).exists():
                found: dict[str, Any] = json.loads((place / FOUND).read_text())
                return found
            return {"text": "fails", "message": f"{ended}: {last_line(printed)}"}

    def _environment(self, engine: str, metadata: Path) -> tuple[str, dict[str, str]]:
        """The interpreter that has an engine, and the environment in which it finds it.

        Args:
            engine: its name.
            metadata: the directory by which the engine finds this project's plugin.
        """
        where = self.where.get(engine)
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", ""), str(metadata)]
        python = sys.executable
        if where is not None and where.is_dir():
            paths.insert(0, str(where))
        elif where is not None:
            python = str(where)
        path = os.pathsep.join(filter(None, paths))
        # Torch's threads of several families would wait for each other's cores, and on a CPU the
        # engines fork, which threads do not survive.
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs) if self.device != "cpu" else 1
        return python, {
            **os.environ,
            "PYTHONPATH": path,
            "FAMILIES_DEVICE": self.device,
            "OMP_NUM_THREADS": str(threads),
            # What Inductor would compile runs as it is, and nothing asks for the network.
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }


def write_metadata(directory: Path) -> Path:
    """Make this project's plugins known to interpreters in which it is not installed.

    An installed project is found before, or by the same name, once.
    """
    project = (ROOT / "pyproject.toml").read_text()
    plugins = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', project, re.M)
    place = directory / "dflash_plugin-0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: dflash-plugin\nVersion: 0\n")
    (place / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{name} = {target}\n" for group, name, target in plugins)
    )
    return directory


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and what it started, which are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def one_line(message: str) -> str:
    """A message as a cell of a table takes it."""
    return " ".join(message.split()).replace("|", "/")[:MESSAGE]


def last_line(printed: str) -> str:
    """The last line that says something, of a log."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing was printed"])[-1]
