"""Reads a drafter checkpoint and lists everything that does not fit its target."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from transformers import AutoConfig, AutoTokenizer

from dflash_plugin.checkpoints.dialects import rules_applied
from dflash_plugin.checkpoints.files import local_path
from dflash_plugin.checkpoints.io import Checkpoint, load_checkpoint
from dflash_plugin.checkpoints.notices import mark_told, reported
from dflash_plugin.checkpoints.reference_drafts import load_record
from dflash_plugin.checkpoints.vocabulary import difference, fitted
from dflash_plugin.drafter.config import Dialect, DrafterConfig
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError, reason

Level = Literal["error", "warning", "note"]


class Finding(BaseModel):
    """One thing worth knowing: errors cannot run, warnings run worse than they should."""

    level: Level
    subject: str
    message: str


class Report(BaseModel):
    """What a checkpoint holds, and what is wrong with it.

    Attributes:
        directory: the checkpoint.
        config: the drafter.
        parameters: weights of its own.
        num_draft_tokens: speculative tokens of one block.
        known_answers: number of reference drafts in the known_answer.json beside it.
        findings: in the order in which they were found.
    """

    directory: str
    config: DrafterConfig
    parameters: int
    num_draft_tokens: int
    known_answers: int
    findings: list[Finding]

    @property
    def fits(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)


def inspect_checkpoint(
    directory: str | Path,
    target: str | Path | None = None,
    num_speculative_tokens: int | None = None,
    dialect: Dialect | None = None,
) -> Report:
    """Read a drafter and hold it against its target.

    Args:
        directory: a drafter checkpoint of any dialect.
        target: the target's directory; without it only the drafter is looked at.
        num_speculative_tokens: the engine's option; checked against the block.
        dialect: overrides detection.

    Raises:
        DFlashError: the checkpoint or the target cannot be read at all.
    """
    directory = local_path(directory)
    with reported():
        checkpoint = load_checkpoint(directory, dialect=dialect, drafts=num_speculative_tokens)
    findings = _alone(checkpoint, dialect)
    if num_speculative_tokens is not None:
        findings += _speculative_tokens(checkpoint.config, num_speculative_tokens)
    if target is not None:
        findings += _against_target(checkpoint, Path(target))
    record = load_record(directory)
    if record is None:
        findings.append(
            Finding(
                level="note",
                subject="known answers",
                message="there is no known_answer.json: engines cannot prove that they run this "
                "drafter rightly",
            )
        )
    return Report(
        directory=str(directory),
        config=checkpoint.config,
        parameters=sum(t.numel() for name, t in checkpoint.tensors.items() if name != "d2t"),
        num_draft_tokens=checkpoint.config.num_draft_tokens,
        known_answers=len(record.answers) if record else 0,
        findings=findings,
    )


def _alone(checkpoint: Checkpoint, dialect: Dialect | None) -> list[Finding]:
    findings = [
        Finding(level="warning", subject=subject, message=rule)
        for subject, rule in rules_applied(checkpoint.raw, checkpoint.config, dialect).items()
    ]
    config = checkpoint.config
    if not config.vocab_size:
        findings.append(
            Finding(
                level="note",
                subject="vocab_size",
                message="config.json names no vocabulary: the drafter is read with the target's",
            )
        )
    if config.quantization is not None:
        findings.append(
            Finding(
                level="note",
                subject="quantization",
                message=f"the checkpoint is quantised ({config.quantization}): "
                "dequantised at load; in vLLM and SGLang draft_weights says what becomes of it",
            )
        )
    last = config.num_target_layers
    if last is not None and last - 1 in config.target_layer_ids:
        how = "after" if config.last_layer_normed else "before"
        findings.append(
            Finding(
                level="warning",
                subject="target_layer_ids",
                message=f"layer {last - 1} is the target's last: its output is read {how} the "
                "final norm, and an engine's own DFlash may read it otherwise",
            )
        )
    return findings


def _speculative_tokens(config: DrafterConfig, requested: int) -> list[Finding]:
    drafts = config.num_draft_tokens
    if requested == drafts:
        return []
    above = requested > drafts
    return [
        Finding(
            level="error" if above else "warning",
            subject="num_speculative_tokens",
            message=f"{requested} speculative tokens are asked for but a block of "
            f"{config.block_size} drafts {drafts}: "
            + (f"ask for at most {drafts}" if above else "the rest of each block is wasted"),
        )
    ]


def _against_target(checkpoint: Checkpoint, target: Path) -> list[Finding]:
    if not target.is_dir():
        raise DFlashError(f"{target}: not a directory: give the target's model directory")
    try:
        text: Any = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise DFlashError(
            f"{target}: the target's config.json cannot be read "
            f"({reason(error)}): give a model directory"
        ) from error
    config = checkpoint.config
    findings: list[Finding] = []

    def found(level: Level, subject: str, message: str) -> None:
        findings.append(Finding(level=level, subject=subject, message=message))

    if config.target_hidden_size != text.hidden_size:
        found(
            "error",
            "hidden_size",
            f"the drafter reads features {config.target_hidden_size} wide, the target's "
            f"hidden_size is {text.hidden_size}",
        )
    elif config.hidden_size != text.hidden_size and not (config.own_embedding and config.own_head):
        found(
            "error",
            "hidden_size",
            f"the drafter is {config.hidden_size} wide and borrows the target's embedding or head, "
            f"which are {text.hidden_size} wide",
        )
    layers = text.num_hidden_layers
    for layer in config.target_layer_ids:
        if layer >= layers:
            found(
                "error",
                "target_layer_ids",
                f"layer {layer} is out of range: the target has layers 0 to {layers - 1}",
            )
    depth = config.other_depth(layers)
    if depth is not None:
        found("error", "num_target_layers", depth)
    changed = difference(config, text.vocab_size)
    try:
        fitted(checkpoint, text.vocab_size)
    except DFlashError as error:
        found("error", "vocab_size", str(error))
    else:
        if changed is not None:
            mark_told(checkpoint.directory, changed)
            found("warning", "vocab_size", changed)
    factor = embedding_factor(text)
    if factor != 1.0 and not config.own_embedding:
        scale = config.embedding_scale
        found(
            "note",
            "input_embedding_scale",
            f"the target multiplies the rows of its embedding by {factor:g}, and the drafter "
            + (f"by {scale:g} instead" if scale else "reads the same"),
        )
    dtype = str(getattr(text, "dtype", None) or "").removeprefix("torch.")
    if dtype and dtype != config.dtype:
        found(
            "note",
            "dtype",
            f"the drafter is stored as {config.dtype}, the target as {dtype}: "
            "it runs in the target's",
        )
    if config.rope.max_position_embeddings < text.max_position_embeddings:
        found(
            "warning",
            "max_position_embeddings",
            "the drafter was made for "
            f"{config.rope.max_position_embeddings} positions, the target for "
            f"{text.max_position_embeddings}: acceptance may fall beyond",
        )
    return findings + _tokenizer(checkpoint, target)


def _tokenizer(checkpoint: Checkpoint, target: Path) -> list[Finding]:
    findings: list[Finding] = []
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(target)
    except Exception as error:  # Transformers raises many kinds here
        return [
            Finding(
                level="warning",
                subject="tokenizer",
                message=f"the target's tokenizer does not load ({reason(error)}): it was not "
                "compared",
            )
        ]
    mask = checkpoint.config.mask_token_id
    spelled = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if spelled is not None and spelled not in special:
        findings.append(
            Finding(
                level="warning",
                subject="mask_token_id",
                message=f"{mask} is the ordinary token {spelled!r}: prompts may contain it",
            )
        )
    own, theirs = checkpoint.directory / "tokenizer.json", target / "tokenizer.json"
    if own.is_file() and theirs.is_file() and _digest(own) != _digest(theirs):
        findings.append(
            Finding(
                level="error",
                subject="tokenizer",
                message="the tokenizer.json beside the drafter differs from the target's: the "
                "drafter was made for another vocabulary",
            )
        )
    return findings


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
