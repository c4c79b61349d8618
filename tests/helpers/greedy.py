"""The text that an engine must give."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def greedy_text(target: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """What the target's own ``generate`` writes after a prompt, past its end of sequence too."""
    ids = target.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def first_difference(found: list[int], expected: list[int], strict: bool = False) -> int | None:
    """Where a text leaves the expected one, if it does.

    Args:
        found, expected: token ids; one may be longer than the other unless ``strict``.
        strict: refuse texts of different lengths that are equal as far as the shorter one goes.
    """
    pairs = enumerate(zip(found, expected, strict=strict))
    return next((place for place, (token, wanted) in pairs if token != wanted), None)
