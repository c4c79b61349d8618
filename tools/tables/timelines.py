"""Where the milliseconds of a decode step go."""

from __future__ import annotations

from collections.abc import Iterator

from tools.tables.common import commands_of, runs_of, table
from tools.tables.serving import name_of


def timelines(name: str, plugin: str = "plugin-fp8") -> str:
    """Where the milliseconds of a decode step go, of native and a mode of the plugin."""
    runs = runs_of(name)
    found = [line for run in runs for line in run["timelines"]]
    parts = ("verify graph", "other graphs", "eager", "idle", "step")
    rows = [
        [str(level), name, *(f"{times[part]:.2f}" for part in parts), launches]
        for level in sorted({line["concurrency"] for line in found})
        for line in found
        if line["concurrency"] == level and line["engine"] in ("native", plugin)
        for name, times, launches in kinds_of_steps(line)
    ]
    header = ["requests", "", "verify graph", "draft graph", "eager", "idle", "whole step"]
    commands = commands_of(runs)
    facts = f"{runs[0]['device']}, {runs[0]['date']}. {commands}"
    return f"{table([*header, 'eager launches'], rows)}\n\n{facts}"


def kinds_of_steps(line: dict) -> Iterator[tuple[str, dict[str, float], str]]:
    """A timeline's steps without prompts and, where there are some, those that read prompts."""
    name = name_of(line["engine"])
    yield name, line["milliseconds"], f"{line['eager_launches']:.0f}"
    if "with_prompts" in line:
        with_prompts = line["with_prompts"]
        yield f"{name}, steps with prompts", with_prompts["milliseconds"], ""
