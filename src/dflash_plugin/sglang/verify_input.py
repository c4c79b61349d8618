"""The input and output of a verify pass that runs fewer rows than whole blocks.

SGLang's worker makes the input for whole blocks and reads the output as whole blocks. Between the
two, ``compacting_input`` cuts the input to the selected rows, and ``scatter`` lays the output out
as whole blocks again, with -1 in place of drafts that were not verified so that they are always
rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dflash_plugin.kernels.cut_blocks import CutBlocks
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.protocols import LogitsOutputLike


def compacting_input(
    native: Any, current: Callable[[], AdaptiveVerifier | None], plans_kv_writes: bool
) -> Any:
    """A subclass of SGLang's ``DFlashVerifyInput`` that compacts itself while a pass is cut.

    Args:
        native: SGLang's class.
        current: returns the verifier of the pass that runs, or None outside of such passes.
        plans_kv_writes: the input holds a plan of the slots that the pass writes (``compat``).
    """

    def cutting() -> AdaptiveVerifier | None:
        verifier = current()
        whole = verifier is None or verifier.verify_len == verifier.block
        return None if whole else verifier

    class CompactInput(native):
        """SGLang's, with what was made for whole blocks cut to the selected rows."""

        draft_token: Tensor
        positions: Tensor
        kv_loc_plan: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            verifier = cutting()
            if verifier is not None:
                kwargs["draft_token_num"] = verifier.verify_len
            super().__init__(*args, **kwargs)

        def prepare_for_verify(
            self, batch: Any, target_worker: Any, *args: Any, **kwargs: Any
        ) -> Any:
            verifier = cutting()
            if verifier is not None:
                cut = verifier.compact(self.draft_token, self.positions, batch.out_cache_loc)
                self.draft_token, self.positions = cut.tokens, cut.positions
                batch.out_cache_loc = cut.slots
                if verifier.device.type == "cpu":
                    self.row_counts = verifier.row_counts()
                if plans_kv_writes:
                    self._plan_kv_writes(verifier, batch, target_worker)
            return super().prepare_for_verify(batch, target_worker, *args, **kwargs)

        def _plan_kv_writes(
            self, verifier: AdaptiveVerifier, batch: Any, target_worker: Any
        ) -> None:
            """Plan the slots that are left, where the worker has planned those of whole blocks."""
            whole = self.kv_loc_plan
            if whole is None:
                return
            translator = target_worker.model_runner.kv_index_translator
            self.kv_loc_plan = translator.plan(
                req_pool_indices=whole.req_pool_indices,
                seq_lens=whole.seq_lens,
                seq_lens_cpu=whole.seq_lens_cpu,
                write_virtual=batch.out_cache_loc,
                read_extent=verifier.block if verifier.by_request else verifier.verify_len,
            )

    CompactInput.__name__ = CompactInput.__qualname__ = native.__name__
    return CompactInput


def scatter(
    output: LogitsOutputLike, cut: CutBlocks, tokens: Tensor, *, reads_features: bool
) -> None:
    """Lay the output of a compacted verify pass out as that of whole blocks, in place.

    Args:
        output: of the pass; its N rows become B * block.
        cut: the rows that the pass verified.
        tokens: int64 [at least B, block], the worker's blocks; drafts that were not verified
            become -1.
        reads_features: whether the hidden states are still to be read. If not, only their shape is
            made to fit.
    """
    if output.next_token_logits is not None:
        output.next_token_logits = output.next_token_logits[cut.indices]
    hidden = output.hidden_states
    if hidden is not None:
        shape = len(cut.indices), *hidden.shape[1:]
        output.hidden_states = hidden[cut.indices] if reads_features else hidden[:1].expand(shape)
    tokens[: len(cut.kept)].copy_(cut.kept)
