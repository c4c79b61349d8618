"""The kernels in SGLang on a CPU: interpreted, and attending as under SGLang's Triton back end.

The process has to start with TRITON_INTERPRET=1. Not covered: CUDA graphs and streams.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.sglang import block_attention
from dflash_plugin.sglang.cpu import attention, setup

COUNTS = {"blocks": 0, "blocks_natively": 0, "heads": 0}


def turn_on() -> None:
    """Let this process run the kernels wherever a GPU would."""
    import triton.runtime.interpreter

    from dflash_plugin.serving import draft_tokens
    from tests.helpers import quick_interpreter
    from tests.helpers.kernel_helpers import rounded

    quick_interpreter.turn_on()

    # As a GPU rounds.
    triton.runtime.interpreter._convert_float = rounded

    class TritonAttnBackend(attention.CpuAttention):
        """By its name one of those whose blocks attend through the kernel."""

        # What the kernel's use depends on, as of a server that does not translate slots.
        _translate_kv_loc = None

        def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
            COUNTS["blocks_natively"] += args[4].forward_mode.is_target_verify()
            return super().forward_extend(*args, **kwargs)

    kernels.available = lambda device: True
    attention.CpuAttention = TritonAttnBackend
    native_install, native_attend = block_attention.install, block_attention.attend
    native_head = draft_tokens.draft_head

    def install(runner: Any, device: torch.device) -> block_attention.BlockAttention:
        # SGLang gives its own back ends one.
        backend = vars(runner.attn_backend)
        backend.setdefault("kv_index_translator", SimpleNamespace(is_translating=False))
        attention = native_install(runner, device)
        assert attention is not None
        return attention

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        COUNTS["blocks"] += 1
        return native_attend(*args, **kwargs)

    def head(*args: Any, **kwargs: Any) -> Any:
        COUNTS["heads"] += 1
        return native_head(*args, **kwargs)

    block_attention.install, block_attention.attend = install, attend
    draft_tokens.draft_head = head
    assert setup.BACKEND in ATTENTION_BACKENDS


def launch_ahead(worker: Any) -> dict[str, int]:
    """Launch what a GPU's start compiles ahead, before the worker serves.

    Returns:
        What is counted from then on, and in ``ahead`` the blocks and heads of these launches.
    """
    runner = worker.target_worker.model_runner
    worker._launch_all(
        block_attention.BlockAttention(
            runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        )
    )
    ahead = min(COUNTS["blocks"], COUNTS["heads"])
    COUNTS.update(dict.fromkeys(COUNTS, 0), ahead=ahead)
    return COUNTS
