"""What users and their scripts rely on: flags, variables, options, metric names and formats.

After a deliberate change, write the list again and look at the difference:
``python -m tests.helpers.public_surface > tests/data/public_surface.json``
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import dflash_plugin
from dflash_plugin.bench.schema import Record
from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts
from dflash_plugin.cli.main import app
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang.options import Options as SGLangOptions

SOURCE = Path(dflash_plugin.__file__).parent
ADAPTERS = ("serving", "vllm", "sglang")


def surface() -> dict[str, Any]:
    """Everything public, in plain values."""
    return {
        "commands": {
            name: {param.opts[0]: option(param, command) for param in command.params}
            for name, command in sorted(typer.main.get_command(app).commands.items())
        },
        "environment": environment(),
        "options": {"vllm": fields(Options), "sglang": fields(SGLangOptions)},
        "metrics": sorted(
            {
                name
                for adapter in ADAPTERS
                for path in (SOURCE / adapter).rglob("*.py")
                for name in re.findall(r'"(dflash:\w+)"', path.read_text())
            }
        ),
        "record": sorted(Record.model_fields),
        "known_answer.json": sorted(ReferenceDrafts.model_fields),
    }


def option(param: Any, command: Any) -> dict[str, Any]:
    """A flag or argument of a command, without its help text."""
    found: dict[str, Any] = {
        "names": [*param.opts, *param.secondary_opts],
        "default": plain(param.default),
    }
    values = {
        "required": param.required,
        "repeatable": param.multiple or param.nargs != 1,
        "hidden": getattr(param, "hidden", False),
        "variable": param.envvar,
        "choices": choices(typer.utils.get_params_from_function(command.callback), param.name),
    }
    return {**found, **{name: value for name, value in values.items() if value}}


def choices(params: Any, name: str) -> list[str]:
    """The words that an option may be, where it is not free."""
    annotation = params[name].annotation
    parts = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else [annotation]
    )
    for part in parts:
        if isinstance(part, type) and issubclass(part, Enum):
            return [member.value for member in part]
        if typing.get_origin(part) is typing.Literal:
            return list(typing.get_args(part))
    return []


def environment() -> list[str]:
    """Environment variables: those that the source names, and one for each of SGLang's options."""
    texts = [path.read_text() for path in SOURCE.rglob("*.py")]
    written = {n for text in texts for n in re.findall(r"\bDFLASH(?:_[A-Z]+)+\b", text)}
    joined = {n for text in texts for n in re.findall(r"\{SWITCH\}(_[A-Z]+)\b", text)}
    of_options = {f"DFLASH_PLUGIN_{name.upper()}" for name in SGLangOptions.model_fields}
    return sorted(written | of_options | {f"DFLASH_PLUGIN{end}" for end in joined})


def fields(model: type[BaseModel]) -> dict[str, Any]:
    """Names and defaults of a model's fields."""
    return {name: plain(field.default) for name, field in model.model_fields.items()}


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.stdout.write(json.dumps(surface(), indent=1) + "\n")
