"""Compares an engine's drafts with a checkpoint's known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dflash_plugin.checkpoints.reference_drafts import (
    ReferenceDraft,
    ReferenceDrafts,
    compare,
    describe,
)

# By how much a draft must be decided to be compared, and the share of these that must agree.
FLOAT32 = (1e-3, 1.0)
HALF = (0.5, 0.75)


def trouble(
    record: ReferenceDrafts,
    draft: Callable[[ReferenceDraft], Sequence[int] | None],
    is_float32: bool,
    walked: bool = False,
) -> str | None:
    """What is wrong with an engine's drafts, or None.

    Args:
        record: what the float32 core drafts.
        draft: the engine's drafts after a prompt and its anchor, or None where it cannot tell.
        is_float32: whether the engine drafts in float32, weights included; it must then agree on
            every draft that is not a tie.
        walked: each draft follows from the one before it, as a selector's do.
    """
    min_margin, share = FLOAT32 if is_float32 else HALF
    compared, wrong, first = 0, 0, None
    for number, expected in enumerate(record.answers):
        drafts = draft(expected)
        if drafts is None:
            continue
        counted, differences = compare(expected, drafts, min_margin, walked=walked)
        compared += counted
        wrong += len(differences)
        if differences and first is None:
            first = describe(number, expected, drafts, differences[0])
    if compared and wrong > (1 - share) * compared:
        return f"{wrong} of {compared} known drafts differ; {first}"
    return None
