"""Prompt sets in JSONL, formatted as the public DFlash benchmark formats them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dflash_plugin.errors import DFlashError

_STEPS = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
TEMPLATES = {
    "gsm8k": _STEPS,
    "math500": _STEPS,
    "humaneval": (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n{}\n```"
    ),
    "mbpp": "{}",
    "mt_bench": "{}",
}
"""First user turn per set; the wording is that of PyPI dflash 0.1.0's benchmark. Others are plain.

mbpp's ``test_list`` is not shown to the target, as in that benchmark.
"""

FIELDS = ("messages", "turns", "question", "prompt", "text")
"""Fields that may hold a prompt; the first that an item has is taken."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: str
    content: str = Field(min_length=1)


class Prompt(BaseModel):
    """What is asked of the target: a conversation, or raw text.

    Attributes:
        id: unique within its set.
        messages: turns that end with the user's; empty for raw text.
        text: raw text that the target continues, without chat template.
        set_name: gsm8k, math500, ... or the file's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = Field(default=None, min_length=1)
    set_name: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> Prompt:
        if bool(self.messages) == (self.text is not None):
            raise ValueError(f"prompt {self.id!r} needs either messages or text")
        return self

    @classmethod
    def user(cls, text: str, id: str = "prompt", set_name: str = "") -> Prompt:
        """A single user turn."""
        return cls(id=id, messages=(Message(role="user", content=text),), set_name=set_name)


def set_name_of(path: Path) -> str:
    """Set that a file holds, by its name: ``gsm8k_test.jsonl.gz`` is gsm8k."""
    stem = path.name.split(".")[0]
    return next((name for name in TEMPLATES if stem.lower().startswith(name)), stem)


def load_prompts(
    path: str | Path,
    limit: int | None = None,
    field: str | None = None,
    turns: Literal["first", "all"] = "first",
) -> list[Prompt]:
    """Read prompts, one JSON object a line; ``.gz`` is decompressed and blank lines are skipped.

    Args:
        path: the file.
        limit: read no more than this many.
        field: field that holds the prompt, used as it is; None finds it (``FIELDS``) and applies
            the set's template.
        turns: of a ``turns`` field take the first, or all as consecutive user messages between
            which the caller puts the target's answers.

    Returns:
        Prompts in the file's order; ids are the set's name and the line number.

    Raises:
        DFlashError: the file is missing or empty, or a line is malformed; names file and line.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DFlashError(f"limit={limit} leaves no prompt: give at least 1, or None for all")
    if turns not in ("first", "all"):
        raise DFlashError(f"turns={turns!r}: choose 'first' or 'all'")
    name = set_name_of(path)
    prompts: list[Prompt] = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(_read(path).split("\n"), start=1):
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
        messages = _messages(item, name, field, turns, where)
        prompts.append(Prompt(id=f"{name}-{number}", messages=messages, set_name=name))
    if not prompts:
        raise DFlashError(f"{str(path)!r} holds no prompt: write one JSON object a line")
    return prompts


def _read(path: Path) -> str:
    if not path.is_file():
        raise DFlashError(f"{str(path)!r} is not a file: give a JSONL file of prompts")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DFlashError(
            f"{str(path)!r} cannot be read ({error}): give UTF-8 JSONL, plain or .gz"
        ) from error


def _messages(
    item: dict[str, Any], name: str, field: str | None, turns: str, where: str
) -> tuple[Message, ...]:
    present = field or next((f for f in FIELDS if f in item), None)
    if present is None or present not in item:
        wanted = repr(field) if field else f"one of {', '.join(FIELDS)}"
        raise DFlashError(
            f"{where} has the fields {sorted(item)} but not {wanted}: name the field that holds "
            "the prompt"
        )
    value = item[present]
    if present == "messages":
        if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            raise DFlashError(
                f'{where} has malformed messages: write [{{"role": "user", "content": "..."}}]'
            )
        return tuple(Message(role=m["role"], content=m["content"]) for m in value)
    texts = value if present == "turns" and isinstance(value, list) and value else [value]
    if turns == "first":
        texts = texts[:1]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DFlashError(f"{where} has {present}={value!r}: write a text that is not empty")
    template = TEMPLATES.get(name, "{}") if field is None else "{}"
    texts = [template.format(texts[0]), *texts[1:]]
    return tuple(Message(role="user", content=text) for text in texts)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
        and bool(value["content"].strip())
    )


def encode(
    tokenizer: Any, prompt: Prompt | Sequence[Message], thinking: bool | None = None
) -> list[int]:
    """Token ids of a prompt up to where the target answers.

    Uses the tokenizer's chat template, which writes every special token itself. Raw text, and the
    turns' text where there is no template, is encoded with the tokenizer's own special tokens.

    Args:
        tokenizer: the target's.
        prompt: what is asked.
        thinking: ``enable_thinking`` of the chat template; None leaves it to the template.

    Returns:
        Token ids, [tokens].
    """
    messages = prompt.messages if isinstance(prompt, Prompt) else prompt
    if isinstance(prompt, Prompt) and prompt.text is not None:
        return list(tokenizer.encode(prompt.text))
    if getattr(tokenizer, "chat_template", None):
        options = {} if thinking is None else {"enable_thinking": thinking}
        text = tokenizer.apply_chat_template(
            [m.model_dump() for m in messages],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode("\n".join(m.content for m in messages)))
