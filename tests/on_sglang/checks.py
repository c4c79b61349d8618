"""What a scheduler made, against the core."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.drafter.model import Drafter
from tests.helpers.greedy import greedy_text


def check_core(
    made: dict[str, Any],
    prompts: list[list[int]],
    target: PreTrainedModel,
    drafter: Drafter,
    length: int,
) -> None:
    """Text is the target's own, of ``length`` tokens, and the first drafts are the core's."""
    for prompt, texts, blocks in zip(prompts, made["texts"], made["blocks"], strict=True):
        assert texts == [greedy_text(target, prompt, length)]
        expected = answer(drafter, target, prompt)
        assert min(expected.margins) > 1e-3
        assert blocks[0] == [expected.anchor, *expected.drafts]
