"""Training data written by the target itself: responses to prompts, and prompts of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt, encode
from dflash_plugin.train.sequences import SequenceSet
from dflash_plugin.transformers.engine import Engine
from dflash_plugin.transformers.requests import Request

Progress = Callable[[int, int], None]
_SLOT = "\u241fPROMPT\u241f"


class Opening(BaseModel):
    """How self-written prompts of one kind begin.

    Attributes:
        text: what the user's turn begins with; the target writes on from here.
        suffix: appended to the finished prompt.
        weight: share of the prompts, relative to the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    suffix: str = ""
    weight: float = Field(default=1.0, gt=0)


DEFAULT_OPENINGS = (Opening(),)


def load_openings(path: Path) -> tuple[Opening, ...]:
    """Read openings, one JSON object a line.

    Raises:
        DFlashError: names the line that is malformed.
    """
    openings = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            openings.append(Opening.model_validate_json(line))
        except ValidationError as error:
            raise DFlashError(
                f"{str(path)!r} line {number} is not an opening ({error.errors()[0]['msg']}): "
                'write {"text": "...", "suffix": "...", "weight": 1}'
            ) from error
    if not openings:
        raise DFlashError(f"{str(path)!r} holds no opening: write at least one line")
    return tuple(openings)


def write_prompts(
    engine: Engine,
    tokenizer: Any,
    count: int,
    openings: Sequence[Opening] = DEFAULT_OPENINGS,
    seed: int = 0,
    max_tokens: int = 192,
    progress: Progress | None = None,
) -> list[Prompt]:
    """Let the target write user turns, by sampling what its chat template puts before the answer.

    Turns that do not end within ``max_tokens`` or come out shorter than 8 characters are dropped,
    and so are repetitions.

    Raises:
        DFlashError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DFlashError(
            "the target's tokenizer has no chat template, so it cannot write its own prompts: give "
            "a file with --prompts"
        )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True
    )
    before = rendered.split(_SLOT)[0]
    rng = random.Random(seed)
    kinds = rng.choices(openings, [o.weight for o in openings], k=count)
    requests = [
        Request(
            tokenizer.encode(before + kind.text, add_special_tokens=False),
            max_new_tokens=max_tokens,
            sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=rng.getrandbits(31)),
        )
        for kind in kinds
    ]
    done = 0
    results = []
    for first in range(0, count, 8192):
        part = engine.generate(requests[first : first + 8192])
        results.extend(part)
        done += len(part)
        if progress is not None:
            progress(done, count)
    seen: set[str] = set()
    prompts: list[Prompt] = []
    for kind, result in zip(kinds, results, strict=True):
        written = tokenizer.decode(result.tokens, skip_special_tokens=True)
        text = (kind.text + written).strip() + kind.suffix
        if result.finish_reason != "stop" or len(text) < 8 or text in seen:
            continue
        seen.add(text)
        prompts.append(Prompt.user(text, id=f"self-{len(prompts)}"))
    return prompts


def respond(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    max_prompt_tokens: int = 512,
    progress: Progress | None = None,
) -> SequenceSet:
    """The target's responses to prompts, as training sequences.

    Args:
        engine: runs the target, with or without a drafter.
        tokenizer: the target's.
        prompts: longer ones than ``max_prompt_tokens`` are left out.
        max_new_tokens: limit of a response.
        temperature: 0 for greedy responses.
        samples: responses a prompt; more than one needs a temperature.
        seed: of the sampled responses.
        max_prompt_tokens: see ``prompts``.
        progress: called with prompts done and their number.
    """
    if samples > 1 and temperature == 0:
        raise DFlashError(
            f"{samples} samples at temperature 0 would all be equal: raise the temperature"
        )
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) <= max_prompt_tokens] * samples
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []
    for first in range(0, len(encoded), 8192):
        group = encoded[first : first + 8192]
        requests = [
            Request(
                ids,
                max_new_tokens=max_new_tokens,
                sampling=SamplingParams(
                    temperature=temperature, seed=(seed + first + i) if temperature else None
                ),
            )
            for i, ids in enumerate(group)
        ]
        results = engine.generate(requests)
        pairs += [
            (ids, result.tokens)
            for ids, result in zip(group, results, strict=True)
            if len(result.tokens) > 1
        ]
        if progress is not None:
            progress(first + len(group), len(encoded))
    return SequenceSet.build(pairs)


def save_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSONL that ``load_prompts`` reads back."""
    lines = [json.dumps({"messages": prompt.model_dump()["messages"]}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
