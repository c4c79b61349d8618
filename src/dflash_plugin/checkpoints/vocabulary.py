"""Fits a drafter to its target's vocabulary: one verdict for inspect and every engine.

Checkpoints pad their tables, each project to another number of rows. Tables that go beyond the
target's vocabulary are cut, so that no drafted token is one that the target lacks. Tables that end
before it are read as far as they go: a head becomes a reduced draft vocabulary, and embedding and
codebooks are zero for the tokens that they lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.checkpoints.io import CODEBOOKS, EMBEDDING, HEAD, Checkpoint
from dflash_plugin.drafter.config import DrafterConfig, build_config
from dflash_plugin.errors import DFlashError

MASK = "mask_embedding"
LOOKED_UP = (EMBEDDING, *CODEBOOKS)


def fitted_config(config: DrafterConfig, tokens: int) -> DrafterConfig:
    """The drafter with the target's vocabulary; itself where the two are equal.

    Args:
        config: as the checkpoint has it.
        tokens: of the target's vocabulary.

    Raises:
        DFlashError: the target has no mask token for it, or it cannot be cut or completed.
    """
    if config.vocab_size == tokens:
        return config
    values = {"vocab_size": tokens}
    if config.mask_token_id >= tokens:
        if not (config.own_mask_embedding or config.own_embedding):
            raise DFlashError(
                f"mask_token_id {config.mask_token_id} is outside the target's vocabulary of "
                f"{tokens} tokens, and the drafter has no embedding of its own: use the drafter "
                "made for this target"
            )
        values["own_mask_embedding"] = True
    if config.own_head and config.draft_vocab_size is None and config.vocab_size < tokens:
        if config.selector is not None:
            raise DFlashError(
                f"lm_head.weight has {config.vocab_size} rows but the target has {tokens} tokens, "
                "and the drafter's selector chooses among all of them: use the drafter made for "
                "this target"
            )
        values["draft_vocab_size"] = config.vocab_size
    return build_config({**config.model_dump(), **values})


def fitted(checkpoint: Checkpoint, tokens: int) -> Checkpoint:
    """A checkpoint with the target's vocabulary; itself where the two are equal.

    Args:
        checkpoint: from ``load_checkpoint``.
        tokens: of the target's vocabulary.

    Raises:
        DFlashError: as ``fitted_config``, or it drafts a token that the target lacks.
    """
    config = fitted_config(checkpoint.config, tokens)
    if config is checkpoint.config:
        return checkpoint
    tensors = fitted_tensors(checkpoint.tensors, checkpoint.config, config)
    return replace(checkpoint, config=config, tensors=tensors)


def fitted_tensors(
    tensors: Mapping[str, Tensor], before: DrafterConfig, after: DrafterConfig
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, all or some, with the target's vocabulary.

    Args:
        tensors: canonical names.
        before: the drafter, as the checkpoint has it.
        after: with the target's vocabulary, from ``fitted_config``.

    Raises:
        DFlashError: ``d2t`` names a token that the target lacks.
    """
    tokens, fit = after.vocab_size, dict(tensors)
    adds_mask = after.own_mask_embedding and not before.own_mask_embedding
    if adds_mask and EMBEDDING in tensors:
        fit[MASK] = tensors[EMBEDDING][after.mask_token_id].clone()
    for name in LOOKED_UP:
        if name in tensors:
            rows = tensors[name][:tokens]
            fit[name] = F.pad(rows, (0, 0, 0, tokens - len(rows)))
    if before.draft_vocab_size is not None and "d2t" in tensors:
        highest = int((tensors["d2t"] + torch.arange(before.draft_vocab_size)).max())
        if highest >= tokens:
            raise DFlashError(
                f"d2t maps a draft token to {highest}, outside the target's vocabulary of {tokens} "
                "tokens: use the drafter made for this target"
            )
    elif before.draft_vocab_size is None and HEAD in tensors:
        fit[HEAD] = tensors[HEAD][:tokens]
        if after.draft_vocab_size is not None:
            fit["d2t"] = torch.zeros(after.draft_vocab_size, dtype=torch.int64)
    return fit


def difference(config: DrafterConfig, tokens: int) -> str | None:
    """What is done about a vocabulary of another size than the target's, or None.

    Args:
        config: as the checkpoint has it.
        tokens: of the target's vocabulary.
    """
    own = config.vocab_size
    if own in (0, tokens):  # A checkpoint without tables need not name one.
        return None
    sizes = f"the drafter's vocab_size is {own}, the target's {tokens}"
    if own > tokens:
        return f"{sizes}: its rows from {tokens} on are left out"
    if not has_tables(config):
        return f"{sizes}: it drafts over the target's, as it has no table of its own"
    return f"{sizes}: its tables know no token from {own} on"


def has_tables(config: DrafterConfig) -> bool:
    """Whether a drafter has tables with a row a token: embedding, head or codebooks."""
    return config.own_embedding or config.own_head or config.selector is not None
