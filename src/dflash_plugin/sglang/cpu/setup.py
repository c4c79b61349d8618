"""What SGLang needs to serve DFLASH on a CPU, for development and tests."""

from __future__ import annotations

from typing import Any

import torch

from dflash_plugin.sglang.compat import argument, current, set_argument

BACKEND = "torch_native"


def prepare_cpu(server_args: Any) -> None:
    """Choose the attention of the draft model.

    Args:
        server_args: SGLang's ``ServerArgs``.
    """
    if argument(server_args, "attention_backend") in (None, BACKEND):
        set_argument(server_args, "attention_backend", BACKEND)
        set_argument(server_args, "speculative_draft_attention_backend", BACKEND)


def install() -> None:
    """Make this process able to verify blocks on a CPU."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.speculative import draft_worker_common

    from dflash_plugin.sglang.cpu.attention import CpuAttention

    register_attention_backend(BACKEND)(CpuAttention)
    # It would choose among back ends of a GPU.
    setattr(draft_worker_common, current().draft_backend, lambda **_: BACKEND)
    # There are no streams to record a use on.
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
