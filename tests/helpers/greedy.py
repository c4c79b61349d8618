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
