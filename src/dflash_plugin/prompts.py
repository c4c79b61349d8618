"""Prompt sets in JSONL, formatted as the public DFlash benchmark formats them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dflash_plugin.errors import DFlashError

_STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
TEMPLATES = {
    "gsm8k": "{question}" + _STEPS,
    "math500": "{question}" + _STEPS,
    "humaneval": (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n{prompt}\n```"
    ),
    "mbpp": "{text}",
}
"""User turn per set; the wording is that of PyPI dflash 0.1.0's benchmark. Others are plain."""

FIELDS = ("messages", "turns", "question", "prompt", "text")


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: str
    content: str = Field(min_length=1)


class Prompt(BaseModel):
    """What is asked of the target.

    Attributes:
        id: unique within its set.
        messages: turns that end with the user's.
        set_name: gsm8k, math500, ... or the file's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    set_name: str = ""

    @classmethod
    def user(cls, text: str, id: str = "prompt", set_name: str = "") -> Prompt:
        """A single user turn."""
        return cls(id=id, messages=(Message(role="user", content=text),), set_name=set_name)


def set_name_of(path: Path) -> str:
    """Set that a file holds, by its name: ``gsm8k_test.jsonl.gz`` is gsm8k."""
    stem = path.name.split(".")[0]
    return next((name for name in TEMPLATES if stem.startswith(name)), stem)


def load_prompts(
    path: str | Path, limit: int | None = None, field: str | None = None
) -> list[Prompt]:
    """Read prompts, one JSON object a line; ``.gz`` is decompressed.

    Args:
        path: the file.
        limit: read no more than this many.
        field: field that holds the user's text, used as it is; None finds it (``messages``,
            ``turns`` (the first), ``question``, ``prompt`` or ``text``) and applies the set's
            template.

    Raises:
        DFlashError: the file is missing or empty, or a line is malformed; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DFlashError(f"{str(path)!r} is not a file: give a JSONL file of prompts")
    try:
        raw = gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DFlashError(
            f"{str(path)!r} cannot be read ({error}): give UTF-8 JSONL, plain or .gz"
        ) from error
    name = set_name_of(path)
    prompts: list[Prompt] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        if not line.strip():
            continue
        where = f"{str(path)!r} line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DFlashError(f"{where} is not JSON ({error}): write one object a line") from error
        if not isinstance(item, dict):
            raise DFlashError(f"{where} is a {type(item).__name__}: write one JSON object a line")
        messages = _messages(item, name, field, where)
        prompts.append(Prompt(id=f"{name}-{number}", messages=messages, set_name=name))
    if not prompts:
        raise DFlashError(f"{str(path)!r} holds no prompt: write one JSON object a line")
    return prompts


def _messages(
    item: dict[str, Any], name: str, field: str | None, where: str
) -> tuple[Message, ...]:
    present = field or next((f for f in FIELDS if f in item), None)
    if present is None or present not in item:
        raise DFlashError(
            f"{where} has the fields {sorted(item)} but not {field or 'one of ' + str(FIELDS)}: "
            "name the prompt's field with --field"
        )
    value = item[present]
    if present == "messages" and isinstance(value, list):
        turns = [m for m in value if isinstance(m, dict)]
        if turns and len(turns) == len(value) and all(
            isinstance(m.get("role"), str) and isinstance(m.get("content"), str) and m["content"]
            for m in turns
        ):
            return tuple(Message(role=m["role"], content=m["content"]) for m in turns)
        raise DFlashError(
            f'{where} has malformed messages: write [{{"role": "user", "content": "..."}}]'
        )
    if present == "turns" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise DFlashError(f"{where} has {present}={value!r}: write a text that is not empty")
    template = TEMPLATES.get(name)
    if field is None and template is not None and f"{{{present}}}" in template:
        value = template.format(**{present: value})
    return (Message(role="user", content=value),)


def encode(tokenizer: Any, prompt: Prompt | Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the target answers.

    Uses the tokenizer's chat template, or the turns' text where it has none.
    """
    messages = prompt.messages if isinstance(prompt, Prompt) else prompt
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [m.model_dump() for m in messages], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode("\n".join(m.content for m in messages)))
