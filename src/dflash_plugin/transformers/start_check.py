"""A check at start: over a few tokens the engine's passes give the logits of the model alone.

A family whose attention, positions or recurrent states depend on something that the engine's
passes do not carry is refused here instead of writing another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.drafter.static_kv import StaticKV
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers.recurrent import RecurrentStates
from dflash_plugin.transformers.static_cache import TargetPass

LENGTHS = 9, 6
# Relative differences of logits and states. A wrong computation gives a tenth to 1, rounding less:
# a GPU may convolve in TensorFloat-32, and quantised targets round activations by the pass.
TOLERANCE_FLOAT32, TOLERANCE_HALF = 0.03, 0.15


class Checked(Protocol):
    """What is read of a ``Target``."""

    model: PreTrainedModel
    config: Any
    dtype: torch.dtype
    kv: StaticKV
    recurrent: RecurrentStates | None

    def forward(self, tokens: Tensor, target_pass: TargetPass) -> tuple[Tensor, Tensor | None]:
        """Logits of a pass, and features."""

    def advance(self, counts: Sequence[int]) -> None:
        """Commit tokens of the pass."""


def sequences(model: PreTrainedModel) -> list[Tensor]:
    """Two token sequences int64 [1, n] of different lengths."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [
        (torch.arange(length, device=model.device)[None] * 7 + length) % vocabulary
        for length in LENGTHS
    ]


@torch.inference_mode()
def own_logits(model: PreTrainedModel) -> list[Tensor]:
    """The model's last logits [vocab] for each sequence, without a cache."""
    return [
        model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        for tokens in sequences(model)
    ]


@torch.inference_mode()
def check_start(target: Checked, expected: list[Tensor]) -> None:
    """Run both sequences side by side with tokens taken back; compare last logits and states.

    Args:
        target: its first rows are used.
        expected: from ``own_logits``, before the target's attention was replaced.

    Raises:
        DFlashError: they differ by more than rounding.
    """
    long, short = sequences(target.model)
    rows = min(target.kv.rows, 2)
    _run(target, [long], [0], [LENGTHS[0]])
    states = _states(target)
    _run(target, [long[:, :3]], [0], [3])
    if rows == 2:
        _run(target, [short[:, :1]], [0], [1], first_row=1)
    _run(target, [long[:, 3:7], short[:, 1:5]][:rows], [3, 1][:rows], [2, 1][:rows])
    logits = _run(target, [long[:, 5:9], short[:, 2:6]][:rows], [5, 2][:rows], [4, 4][:rows])
    tolerance = TOLERANCE_FLOAT32 if target.dtype == torch.float32 else TOLERANCE_HALF
    pairs = [*zip(logits[:, -1].float(), expected, strict=False)]
    pairs += zip(_states(target), states, strict=True)
    for found, own in pairs:
        difference = float((found - own).norm() / own.norm().clamp(min=1e-6))
        if own.isfinite().all() and not difference <= tolerance:
            cause = (
                "recurrent layers that do not carry a state through a pass of several tokens in "
                f"Transformers {transformers.__version__}"
                if target.recurrent is not None
                else "something in its layers that depends on more than tokens and positions"
            )
            raise DFlashError(
                f"the target {target.config.model_type!r} computes something else in this "
                f"engine's passes than alone (relative difference {difference:.2g}; likely {cause})"
                ": serve it with vLLM or SGLang"
            )


def _states(target: Checked) -> list[Tensor]:
    """Float32 copies of the recurrent states of the first row."""
    if target.recurrent is None:
        return []
    buffers = target.recurrent.buffers.values()
    return [state[0].float().clone() for states in buffers for state in states.values()]


def _run(
    target: Checked, tokens: list[Tensor], starts: list[int], counts: list[int], first_row: int = 0
) -> Tensor:
    """One pass over [1, T] tokens for each row, of which ``counts`` are committed; logits."""
    batch = torch.cat(tokens)
    offsets = torch.as_tensor(starts, device=batch.device)[:, None]
    positions = offsets + torch.arange(batch.shape[1], device=batch.device)
    rows = torch.arange(first_row, first_row + len(tokens), device=batch.device)
    step = TargetPass(target.kv, positions, max(LENGTHS), rows, is_start=starts[0] == 0)
    logits = target.forward(batch, step)[0]
    target.advance(counts)
    return logits
