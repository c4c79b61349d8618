"""What SGLang needs to serve DFLASH on a CPU, for development and tests."""

from __future__ import annotations

from typing import Any

import torch

from dflash_plugin.sglang.compat import argument, set_argument

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
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from dflash_plugin.sglang.attention import CpuAttention

    ATTENTION_BACKENDS[BACKEND] = CpuAttention
    if BACKEND not in server_args.DRAFT_ATTENTION_BACKEND_CHOICES:
        server_args.DRAFT_ATTENTION_BACKEND_CHOICES.append(BACKEND)
    # There are no streams to record a use on.
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
