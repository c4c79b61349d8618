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
from dflash_plugin.sglang import triton_attention
from dflash_plugin.sglang.cpu import attention, setup

COUNTS = {"blocks": 0, "blocks_natively": 0, "heads": 0}


def turn_on() -> None:
    """Let this process run the kernels wherever a GPU would."""
    import triton.runtime.interpreter

    from dflash_plugin.serving import draft_tokens
    from tests.helpers.kernel_helpers import rounded

    # As a GPU rounds.
    triton.runtime.interpreter._convert_float = rounded

    class TritonAttnBackend(attention.CpuAttention):
        """By its name one of those whose blocks attend through the kernel."""

        forward_metadata: Any = None
        # What the kernel's use depends on, as of a server with neither.
        dcp_size = 1
        enable_deterministic = False
        _translate_kv_loc = None

        def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
            COUNTS["blocks_natively"] += args[4].forward_mode.is_target_verify()
            return super().forward_extend(*args, **kwargs)

    kernels.available = lambda device: True
    attention.CpuAttention = TritonAttnBackend
    native_install, native_attend = triton_attention.install, triton_attention.attend
    native_head = draft_tokens.draft_head

    def install(backend: Any, device: torch.device) -> triton_attention.VerifyAttention:
        backend.req_to_token = backend.req_to_token_pool.req_to_token
        # SGLang gives its own back ends one.
        vars(backend).setdefault("kv_index_translator", SimpleNamespace(is_translating=False))
        passes = native_install(backend, device)
        assert passes is not None
        ours = backend.forward_extend

        def forward_extend(q: Any, k: Any, v: Any, layer: Any, batch: Any, **kwargs: Any) -> Tensor:
            if batch.forward_mode.is_target_verify():
                backend.forward_metadata = SimpleNamespace(
                    custom_mask=None, max_extend_len=int(batch.spec_info.draft_token_num)
                )
            return ours(q, k, v, layer, batch, **kwargs)

        backend.forward_extend = forward_extend
        return passes

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        COUNTS["blocks"] += 1
        return native_attend(*args, **kwargs)

    def head(*args: Any, **kwargs: Any) -> Any:
        COUNTS["heads"] += 1
        return native_head(*args, **kwargs)

    triton_attention.install, triton_attention.attend = install, attend
    draft_tokens.draft_head = head
    assert setup.BACKEND in ATTENTION_BACKENDS
