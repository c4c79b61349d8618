"""From a trained drafter to a directory that any engine loads: weights, card, known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.io import save_checkpoint
from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, answer, save_record
from dflash_plugin.checkpoints.tensors import checkpoint_tensors
from dflash_plugin.drafter.config import Dialect
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.prompts import Prompt, encode
from dflash_plugin.train.card import CURVE, learning_curve, model_card
from dflash_plugin.transformers.loading import load_drafter, load_target

KNOWN_PROMPTS = (
    "What is 17 + 25?",
    "Write a Python function that returns the square of a number.",
    "Name three colors of the rainbow.",
)


def export_drafter(
    drafter: Drafter,
    target_directory: Path,
    output: Path,
    facts: dict[str, Any],
    device: str | None = None,
) -> Path:
    """Write a drafter in the z-lab dialect, bf16, with model card, curve and known answers.

    The known answers are made from the written file, read back in float32.

    Args:
        drafter: trained, any dtype.
        target_directory: the target that it was trained for.
        output: where config.json, model.safetensors, known_answer.json, README.md and
            learning_curve.svg go.
        facts: what ``pipeline.train`` returned, with "command".
        device: where the known answers are computed.
    """
    tensors = {
        name: tensor.to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in checkpoint_tensors(drafter).items()
    }
    save_checkpoint(output, drafter.config, tensors, dialect="z-lab", overwrite=True)
    target, tokenizer = load_target(target_directory, torch.float32, device)
    record_known_answers(output, target, tokenizer)
    parameters = sum(p.numel() for p in drafter.parameters())
    card = model_card(drafter.config, parameters, facts, name=output.name)
    (output / "README.md").write_text(card, encoding="utf-8")
    if facts.get("history"):
        (output / CURVE).write_text(learning_curve(facts["history"]), encoding="utf-8")
    return output


def record_known_answers(
    output: Path, target: PreTrainedModel, tokenizer: Any, dialect: Dialect | None = None
) -> None:
    """Compute a checkpoint's known answers with a float32 target and write them beside it.

    Args:
        output: the checkpoint's directory.
        target, tokenizer: from ``load_target``.
        dialect: overrides detection.
    """
    drafter = load_drafter(output, target, torch.float32, dialect=dialect)
    prompts = [encode(tokenizer, Prompt.user(text)) for text in KNOWN_PROMPTS]
    save_record(
        output, ReferenceDrafts(answers=[answer(drafter, target, prompt) for prompt in prompts])
    )


def save_facts(path: Path, facts: dict[str, Any]) -> None:
    """Keep what the card was made from, and the curve of held-out acceptance."""
    path.write_text(json.dumps(facts, indent=1) + "\n")
