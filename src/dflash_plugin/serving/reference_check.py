"""The start-up check: compares an engine's drafts with the checkpoint's reference drafts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from dflash_plugin.checkpoints.reference_drafts import (
    ReferenceDraft,
    ReferenceDrafts,
    compare,
    describe,
    load_record,
)
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec

# By how much a draft must be decided to be compared, and the share of these that must agree.
FLOAT32 = (1e-3, 1.0)
HALF = (0.5, 0.75)

EngineDrafts = Callable[[ReferenceDraft], Sequence[int] | None]
"""The engine's drafts after a recorded prompt and its anchor, or None where it cannot tell."""


def check_drafter(
    spec: DrafterSpec,
    draft: EngineDrafts,
    *,
    block_size: int,
    dtype: str,
    is_quantized: bool,
    how_to_override: str,
    logger: logging.Logger,
    skip_reason: str | None = None,
    if_none_compared: str | None = None,
) -> None:
    """Compare the engine's drafts with the checkpoint's reference drafts, as the options say.

    The check is left out, with a line in the log, where it cannot judge: the checkpoint has no
    record, the blocks are cut, or the engine gives a ``skip_reason``. A mismatch is logged as a
    warning where the option ``known_answers`` is "warn" or where the target is quantized, since the
    record was made with the target in full precision.

    Args:
        spec: the drafter, with its options.
        draft: runs the engine.
        block_size: rows of a block in this engine, anchor included.
        dtype: of the target, as torch writes it.
        is_quantized: the target's weights or its KV cache are.
        how_to_override: what to set so that the engine serves in spite of a mismatch.
        logger: the engine's.
        skip_reason: why the engine cannot run the check, or None.
        if_none_compared: the mismatch to report where ``draft`` gave None for every prompt; None
            accepts that.

    Raises:
        DFlashError: the drafts differ and the option ``known_answers`` is "require".
    """
    mode = spec.options.known_answers
    if mode == "off":
        return
    record = load_record(spec.checkpoint)
    if record is None:
        logger.info("%s has no known answers: the drafter is not checked", spec.checkpoint)
        return
    if skip_reason is not None:
        logger.info("%s: the drafter is not checked", skip_reason)
        return
    if block_size != spec.config.block_size:
        logger.info(
            "blocks are cut to %d tokens of %d: the known answers do not apply",
            block_size,
            spec.config.block_size,
        )
        return
    mismatch = find_mismatch(
        record,
        draft,
        is_float32=dtype == "torch.float32" and not _rounds(spec),
        is_chained=spec.config.selector is not None,
        if_none_compared=if_none_compared,
    )
    if mismatch is None:
        logger.info("the drafter's %d known answers agree", len(record.answers))
        return
    if mode == "warn" or is_quantized:
        logger.warning("%s", mismatch)
        return
    raise DFlashError(f"{mismatch}. To serve all the same, set {how_to_override}")


def _rounds(spec: DrafterSpec) -> bool:
    """Whether draft weights, and what they multiply, may be rounded."""
    asked = spec.options.draft_weights
    return asked == "fp8" or (asked == "checkpoint" and spec.config.quantization is not None)


def find_mismatch(
    record: ReferenceDrafts,
    draft: EngineDrafts,
    *,
    is_float32: bool,
    is_chained: bool = False,
    if_none_compared: str | None = None,
) -> str | None:
    """What is wrong with an engine's drafts, or None.

    Args:
        record: what the float32 core drafts.
        draft: runs the engine.
        is_float32: whether the engine drafts in float32, weights included; it must then agree on
            every draft that is not a tie.
        is_chained: each draft depends on the one before it, as a selector's drafts do.
        if_none_compared: the answer where ``draft`` gave None for every prompt.
    """
    min_margin, share = FLOAT32 if is_float32 else HALF
    prompts, compared, wrong, first = 0, 0, 0, None
    for number, expected in enumerate(record.answers):
        drafts = draft(expected)
        if drafts is None:
            continue
        prompts += 1
        counted, differences = compare(expected, drafts, min_margin, walked=is_chained)
        compared += counted
        wrong += len(differences)
        if differences and first is None:
            first = describe(number, expected, drafts, differences[0])
    if compared and wrong > (1 - share) * compared:
        return f"{wrong} of {compared} known drafts differ; {first}"
    return None if prompts else if_none_compared
