"""Reference drafts: what the float32 core drafts for a few short prompts.

An engine replays them at start. Equal draft tokens prove, before the first request, that it reads
the right target layers with the right rotation, mask and head. Files and options call them known
answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.drafter.target_features import features_of
from dflash_plugin.errors import DFlashError

FILE_NAME = "known_answer.json"
HIDDEN_VALUES = 8


class ReferenceDraft(BaseModel):
    """One prompt and the block that the float32 core drafts after it.

    Attributes:
        prompt: token ids whose features are the context.
        anchor: the target's greedy token after the prompt.
        drafts: the drafter's greedy tokens after the anchor, [num_draft_tokens].
        margins: score of each draft (its logit, or a selector's) less the runner-up's,
            [num_draft_tokens].
        hidden: the first values of the first and the last drafting row, after the final norm.
        features: the first values of every target layer's output at the prompt's last token, in
            the order of ``target_layer_ids``; empty in older records, as ``layers``.
        layers: the first values of every draft layer's output in the first drafting row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: list[int]
    anchor: int
    drafts: list[int]
    margins: list[float]
    hidden: list[list[float]]
    features: list[list[float]] = []
    layers: list[list[float]] = []


class ReferenceDrafts(BaseModel):
    """The content of known_answer.json, beside a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    answers: list[ReferenceDraft]


@torch.inference_mode()
def answer(drafter: Drafter, target: PreTrainedModel, prompt: Sequence[int]) -> ReferenceDraft:
    """Draft the block after a prompt with the target's own forward pass.

    Args:
        drafter: bound to ``target``; its store is replaced while this runs.
        target: the model, any attention implementation.
        prompt: token ids.
    """
    config = drafter.config
    device = target.device
    tokens = torch.as_tensor([list(prompt)], device=device)
    features, logits = features_of(target, config, tokens)
    anchor = logits.argmax(dim=-1)
    length = len(prompt)
    kept = drafter.store
    drafter.store = StaticStore(
        drafter, 1, length + config.block_size, drafter.norm.weight.dtype, device
    )
    try:
        drafter.inject(features, torch.arange(length, device=device)[None])
        position = torch.full_like(anchor, length)
        with layer_outputs(drafter) as outputs:
            hidden = drafter.draft(anchor, position)
    finally:
        drafter.store = kept
    proposal = drafter.propose(hidden, anchor, position)
    best = proposal.scores[0].float().topk(2, dim=-1).values
    return ReferenceDraft(
        prompt=list(prompt),
        anchor=int(anchor),
        drafts=proposal.tokens[0].tolist(),
        margins=[round(float(m), 4) for m in best[:, 0] - best[:, 1]],
        hidden=[first_values(hidden[0, row]) for row in (0, -1)],
        features=[
            first_values(part) for part in features[0, -1].chunk(len(config.target_layer_ids))
        ],
        layers=[first_values(output[0, -config.num_draft_tokens]) for output in outputs],
    )


def first_values(row: Tensor) -> list[float]:
    """What a record keeps of a row [hidden]."""
    return [round(float(value), 4) for value in row[:HIDDEN_VALUES]]


@contextmanager
def layer_outputs(drafter: Drafter) -> Iterator[list[Tensor]]:
    """The outputs [B, T, hidden] of the draft layers that run in the block, in their order."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, given, output: outputs.append(output))
        for layer in drafter.layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def replay(
    drafter: Drafter,
    target: PreTrainedModel,
    record: ReferenceDrafts,
    min_margin: float = 0.0,
    hidden_tolerance: float | None = 1e-2,
) -> None:
    """Draft every recorded prompt again and compare.

    Args:
        drafter, target: what is about to serve.
        record: what the float32 core gave.
        min_margin: drafts decided by less than this are not compared; 0 compares all, and a
            half-precision engine gives about 0.5.
        hidden_tolerance: largest difference of a hidden value, or None to leave them out.

    Raises:
        DFlashError: naming the first prompt and position that differ.
    """
    for number, expected in enumerate(record.answers):
        found = answer(drafter, target, expected.prompt)
        if found.anchor != expected.anchor:
            raise DFlashError(
                f"known answer {number}: the target continues with token {found.anchor} instead of "
                f"{expected.anchor}: this is not the target that the drafter was made for"
            )
        walked = drafter.candidate_selector is not None
        _, differences = compare(expected, found.drafts, min_margin, walked=walked)
        if differences:
            raise DFlashError(describe(number, expected, found.drafts, differences[0]))
        if hidden_tolerance is None:
            continue
        difference = (torch.tensor(found.hidden) - torch.tensor(expected.hidden)).abs().max().item()
        if difference > hidden_tolerance:
            raise DFlashError(
                f"known answer {number}: hidden values differ by {difference:.4f}, more than "
                f"{hidden_tolerance}: the drafter is not run as it was trained"
            )


def compare(
    expected: ReferenceDraft, drafts: Sequence[int], min_margin: float, *, walked: bool
) -> tuple[int, list[int]]:
    """How many drafts count, and the positions, from 0, of those that differ.

    Args:
        expected: what the float32 core drafted.
        drafts: to be compared with it.
        min_margin: a draft counts if at least so much decided it.
        walked: each draft depends on the one before it, as a selector's do; drafts after one that
            differs are then not compared.
    """
    counted, differences = 0, []
    rows = zip(drafts, expected.drafts, expected.margins, strict=True)
    for position, (got, wanted, margin) in enumerate(rows):
        counted += margin >= min_margin
        if got != wanted and margin >= min_margin:
            differences.append(position)
        if got != wanted and walked:
            break
    return counted, differences


def describe(number: int, expected: ReferenceDraft, drafts: Sequence[int], position: int) -> str:
    """What is wrong with a draft that differs, and why it may be."""
    return (
        f"known answer {number}: draft {position + 1} is token {drafts[position]} instead of "
        f"{expected.drafts[position]}: the drafter is not run as it was trained (target layers, "
        "rotation, mask token, causality or head differ)"
    )


def save_record(directory: Path, record: ReferenceDrafts) -> None:
    """Write the record beside a checkpoint."""
    (directory / FILE_NAME).write_text(
        json.dumps(record.model_dump(), separators=(",", ":")) + "\n"
    )


def load_record(directory: Path) -> ReferenceDrafts | None:
    """The record beside a checkpoint, or None where there is none.

    Raises:
        DFlashError: the file is there but not such a record.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        return ReferenceDrafts.model_validate_json(path.read_text())
    except ValidationError as error:
        raise DFlashError(
            f"{str(path)!r} is not a known-answer record ({error.error_count()} problems, first: "
            f"{error.errors()[0]['msg']}): export the drafter again or remove the file"
        ) from error
