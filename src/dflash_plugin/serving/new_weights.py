"""New weights for a running engine: the drafter's in place, and what follows the target's.

Engines hand new tensors to ``load_weights`` of a model, all at once or a few a call. The drafter's
own takes names of its checkpoint. The target's takes, beside its own, names that begin with
``draft.``; no name could tell them apart without it, since both models have a ``layers.0``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.updates import layout_of, read_update
from dflash_plugin.checkpoints.vocabulary import fitted, fitted_config
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.rope import frequencies
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin

logger = logging.getLogger(__name__)

PREFIX = "draft."
# Fields that say how a checkpoint is stored, not what the drafter is.
_STORAGE = {"dtype", "dialect", "quantization"}

Named = Iterable[tuple[str, Tensor]]


def take_weights(model: EngineDrafterMixin, weights: Named) -> set[str]:
    """Replace weights of the running drafter, all or some; either all that are given, or none.

    Args:
        model: its weights are loaded and prepared.
        weights: tensors by their names in the checkpoint's dialect, with or without ``draft.``.

    Returns:
        The given names.

    Raises:
        DFlashError: a tensor is not the drafter's, or has another shape or values that are not
            finite; nothing has changed then.
    """
    spec, given = model.spec, [(name.removeprefix(PREFIX), tensor) for name, tensor in weights]
    layout = layout_of(spec.checkpoint, spec.options.dialect, spec.config.num_draft_tokens)
    dtype = model.drafter.norm.weight.dtype
    try:
        tensors = read_update(given, layout, spec.config, dtype)
    except DFlashError as error:
        raise DFlashError(f"the drafter keeps its weights: {error}") from error
    model.take_tensors(tensors)
    model.has_tensors = True
    return {name for name, _ in given}


def take_checkpoint(model: EngineDrafterMixin, directory: Path) -> None:
    """Replace all weights of the running drafter by those of a checkpoint.

    Args:
        model: its weights are loaded and prepared.
        directory: of a drafter that differs in its weights alone; any dialect.

    Raises:
        DFlashError: the checkpoint is malformed, or of another drafter; nothing has changed then.
    """
    spec, dtype = model.spec, model.drafter.norm.weight.dtype
    dialect, drafts = spec.options.dialect, spec.config.num_draft_tokens
    checkpoint = load_checkpoint(directory, dtype, dialect, drafts=drafts)
    tokens = spec.config.vocab_size
    new = fitted(checkpoint, tokens)
    running = layout_of(spec.checkpoint, dialect, drafts).config
    _require_alike(new.config, fitted_config(running, tokens))
    model.take_tensors(new.tensors)
    model.source, model.has_tensors = directory, False


def _require_alike(new: DrafterConfig, running: DrafterConfig) -> None:
    for field in DrafterConfig.model_fields.keys() - _STORAGE:
        value, kept = getattr(new, field), getattr(running, field)
        if value != kept:
            raise DFlashError(
                f"the drafter keeps its weights: config.json makes {field} {value!r}, but the "
                f"running drafter has {kept!r}; start the engine with the new one"
            )


def refuse_to_lose(model: EngineDrafterMixin, why: str) -> None:
    """Refuse to give back memory of weights that ``restore`` could not load again.

    Args:
        model: the drafter.
        why: what would lose them, and what to do instead.

    Raises:
        DFlashError: the engine multiplies some linears as the checkpoint stores them.
    """
    if model.keeps_quantised_linears:
        raise DFlashError(
            "draft_weights is 'checkpoint', and the engine's quantised linears take weights at "
            f"start alone; {why}, or set draft_weights to 'dequantised'"
        )


def restore(model: EngineDrafterMixin) -> None:
    """Load the drafter's weights again, whose memory the engine has given back.

    Args:
        model: its weights are prepared; dummy weights stay lost.
    """
    if model.source is None:
        return
    rotary = model.drafter.rotary.inverse_frequencies
    with torch.no_grad():
        rotary.copy_(frequencies(model.spec.config)[0])
    if model.has_tensors:
        logger.warning(
            "the drafter's weights that came as tensors are lost: those of %s take their place, "
            "send yours again",
            model.source,
        )
    take_checkpoint(model, model.source)


def route(target: Any, model: EngineDrafterMixin) -> None:
    """Let the target's ``load_weights`` pass the drafter's tensors on, and tell of the rest.

    Args:
        target: whose method is replaced, on this object alone.
        model: the drafter.
    """
    native: Callable[..., Any] = target.load_weights

    @wraps(native)
    def load_weights(weights: Named, *args: Any, **kwargs: Any) -> Any:
        model.target_changed = True
        if isinstance(weights, list | tuple):
            # The drafter's are checked before the target changes.
            ours = [pair for pair in weights if pair[0].startswith(PREFIX)]
            taken = take_weights(model, ours) if ours else set()
            others = [pair for pair in weights if not pair[0].startswith(PREFIX)]
            return native(others, *args, **kwargs) if others or not ours else taken
        late: list[tuple[str, Tensor]] = []
        loaded = native(_without(weights, late), *args, **kwargs)
        if late:
            take_weights(model, late)
        return loaded

    target.load_weights = load_weights


def _without(weights: Named, ours: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors of a stream; the drafter's are put into ``ours``."""
    for name, tensor in weights:
        if name.startswith(PREFIX):
            ours.append((name, tensor))
        else:
            yield name, tensor
