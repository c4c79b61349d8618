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
from dflash_plugin.drafter.config import Dialect, DrafterConfig
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.prompts import Prompt, encode
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
    command: str,
    device: str | None = None,
) -> Path:
    """Write a drafter in the z-lab dialect, bf16, with model card and known answers.

    The known answers are made from the written file, read back in float32.

    Args:
        drafter: trained, any dtype.
        target_directory: the target that it was trained for.
        output: where config.json, model.safetensors, known_answer.json and README.md go.
        facts: what ``pipeline.train`` returned.
        command: the command line that made it.
        device: where the known answers are computed.
    """
    tensors = {
        name: tensor.to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in checkpoint_tensors(drafter).items()
    }
    save_checkpoint(output, drafter.config, tensors, dialect="z-lab", overwrite=True)
    target, tokenizer = load_target(target_directory, torch.float32, device)
    record_known_answers(output, target, tokenizer)
    (output / "README.md").write_text(model_card(drafter, target_directory.name, facts, command))
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


def model_card(drafter: Drafter, target: str, facts: dict[str, Any], command: str) -> str:
    """The README of an exported drafter."""
    config = drafter.config
    parameters = sum(p.numel() for p in drafter.parameters())
    held_out = facts.get("held_out", {})
    lines = [
        "---",
        "library_name: dflash-plugin",
        "license: apache-2.0",
        "---",
        f"# {'DFlash' if config.selector is None else 'DFlash 2'} drafter for {target}",
        "",
        f"A block of {config.block_size} (anchor and {config.num_draft_tokens} drafts), "
        f"{len(config.layers)} layers, {parameters / 1e6:.2f} M parameters; reads the outputs of "
        f"target layers {', '.join(map(str, config.target_layer_ids))} and borrows the target's "
        "embedding and head. z-lab dialect.",
        *_parts(config),
        "",
        "| | |",
        "| --- | --- |",
        f"| started from | {facts.get('start_from') or 'new weights'} |",
        f"| sequences | {facts.get('sequences')}, written by the target |",
        f"| response tokens | {facts.get('response_tokens')} |",
        f"| optimizer steps | {facts.get('steps')} |",
        f"| anchors seen | {facts.get('anchors')} |",
        f"| held-out τ | {held_out.get('held_out_tau', float('nan')):.2f} |",
        f"| machine | {facts.get('processes')} × {facts.get('device')}, torch "
        f"{facts.get('torch')} |",
        f"| seconds | {facts.get('seconds_data')} for data, {facts.get('seconds_training')} for "
        "training |",
        "",
        "Made by:",
        "",
        "```bash",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def _parts(config: DrafterConfig) -> list[str]:
    """What a DFlash 2 drafter has besides."""
    if config.convolution is None or config.selector is None:
        return []
    taps, group = config.convolution.kernel_size, config.convolution.group_size
    return [
        f"Convolutions of {taps} taps in groups of {group} channels; a selector of rank "
        f"{config.selector.rank} over {config.selector.top_k} candidates.",
    ]


def save_facts(path: Path, facts: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Keep what the card was made from, and the curve of held-out acceptance."""
    path.write_text(json.dumps({**facts, "history": history}, indent=1) + "\n")
