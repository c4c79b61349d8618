"""The input and output of a verify pass that runs fewer rows than whole blocks.

SGLang's worker makes the input for whole blocks and reads the output as whole blocks. In between,
``compacting_input`` cuts the input to the selected rows. ``take_output`` keeps the output compact,
for acceptance and injection, and leaves SGLang's worker placeholders of the shape it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor

from dflash_plugin.sglang.adaptive import AdaptiveVerifier, CutPass
from dflash_plugin.sglang.protocols import LogitsOutputLike
from dflash_plugin.sglang.surface import is_instance, surface

BATCH_MODULE = "sglang.srt.model_executor.forward_batch_info"


class CutFrom(NamedTuple):
    """The whole blocks that a pass was cut from.

    Attributes:
        positions: [B * block].
        sources: int64 [N], the row of the whole blocks that each row of the pass was.
    """

    positions: Tensor
    sources: Tensor


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
        return None if verifier is None or verifier.num_rows is None else verifier

    class CompactInput(native):
        """SGLang's, with what was made for whole blocks cut to the selected rows."""

        draft_token: Tensor
        positions: Tensor
        kv_loc_plan: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            verifier = cutting()
            # Requests with as many rows each go by this number, others by the layout.
            if verifier is not None and not verifier.by_request:
                kwargs["draft_token_num"] = verifier.verify_len
            super().__init__(*args, **kwargs)

        def prepare_for_verify(
            self, batch: Any, target_worker: Any, *args: Any, **kwargs: Any
        ) -> Any:
            verifier = cutting()
            if verifier is not None:
                cut = verifier.compact(self.draft_token, self.positions, batch.out_cache_loc)
                self.cut_from = CutFrom(self.positions, cut.sources)
                self.draft_token, self.positions = cut.tokens, cut.positions
                batch.out_cache_loc = cut.slots
                if verifier.by_request:
                    self.ragged_verify_layout = verifier.layout()
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


def cut_position_axes() -> None:
    """Let the positions of a target that counts on several axes be those of the rows of a pass.

    SGLang makes them for requests with the same number of rows.
    """

    def make(native: Callable[..., None]) -> Callable[..., None]:
        @wraps(native)
        def compute(
            self: Any, model_runner: Any, batch: Any, seq_positions: Tensor | None = None
        ) -> None:
            info = batch.spec_info
            cut = vars(info).get("cut_from") if is_instance(info, "DFlashVerifyInput") else None
            if seq_positions is not None or cut is None:
                native(self, model_runner, batch, seq_positions)
                return
            native(self, model_runner, batch, cut.positions)
            self.mrope_positions = self.mrope_positions[:, cut.sources]

        return compute

    surface().patch(BATCH_MODULE, "ForwardBatch.compute_spec_mrope_positions", make)


def take_output(output: LogitsOutputLike, cut: CutPass, tokens: Tensor) -> None:
    """Move the output of a cut pass to the pass, and leave placeholders of whole blocks.

    Args:
        output: of the pass; its N rows become B * block without content.
        cut: the pass.
        tokens: int64 [at least B, block], the worker's blocks; drafts that were not verified
            become -1.
    """
    rows, logits, hidden = len(cut.rows.indices), output.next_token_logits, output.hidden_states
    cut.logits, cut.hidden = logits, hidden
    if logits is not None:
        output.next_token_logits = logits[:1, :1].expand(rows, 1)
    if hidden is not None:
        output.hidden_states = hidden[:1].expand(rows, *hidden.shape[1:])
    tokens[: len(cut.rows.kept)].copy_(cut.rows.kept)
