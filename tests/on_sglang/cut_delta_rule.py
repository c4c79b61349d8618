"""A cut pass through SGLang's own kernels of the gated delta rule, beside one of whole blocks.

The process has to start with TRITON_INTERPRET=1, and without SGLang's engine for a CPU. Prints
what differs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.layers.attention.linear import gdn_backend
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from torch import Tensor
from triton.runtime import interpreter

from dflash_plugin.sglang.recurrent_verify import CutPasses

REQUESTS, BLOCK, COUNTS, PADDING = 4, 4, (1, 4, 2), 5
KEY_HEADS, VALUE_HEADS, KEY, VALUE, WIDTH = 2, 4, 16, 16, 4
LAYERS = [0, 2]
SLOTS = torch.tensor([5, 2, 7], dtype=torch.int32)


def backend_of() -> Any:
    """SGLang's back end of recurrent layers over a pool of its own, without a model."""
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=VALUE_HEADS * VALUE,
        n_groups=KEY_HEADS,
        num_heads=VALUE_HEADS,
        head_dim=VALUE,
        state_size=KEY,
        conv_kernel=WIDTH,
    )
    numbers = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
    pool = HybridReqToTokenPool(
        size=REQUESTS,
        mamba_size=8,
        mamba_spec_state_size=REQUESTS,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=LAYERS, dtype=numbers),
        mamba_layer_ids=LAYERS,
        enable_mamba_extra_buffer=False,
        speculative_num_draft_tokens=BLOCK,
        speculative_eagle_topk=1,
    )
    backend: Any = gdn_backend.GDNAttnBackend.__new__(gdn_backend.GDNAttnBackend)
    kernel = TritonGDNKernel()
    backend.req_to_token_pool, backend.mis_metadata = pool, None
    backend.kernel_dispatcher = SimpleNamespace(
        tree_verify_kernel=kernel, target_verify=kernel.target_verify
    )
    backend.verify_intermediate_state_indices = torch.arange(REQUESTS, dtype=torch.int32)
    return backend


def layer_of(layer_id: int, width: int) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=layer_id,
        conv_weights=torch.randn(width, WIDTH),
        bias=None,
        activation="silu",
        num_q_heads=KEY_HEADS,
        num_k_heads=KEY_HEADS,
        num_v_heads=VALUE_HEADS,
        head_q_dim=KEY,
        head_k_dim=KEY,
        head_v_dim=VALUE,
        q_dim=KEY_HEADS * KEY,
        k_dim=KEY_HEADS * KEY,
        v_dim=VALUE_HEADS * VALUE,
        A_log=torch.randn(VALUE_HEADS),
        dt_bias=torch.randn(VALUE_HEADS),
    )


def run(starts: Tensor, layout: Any, layers: list[Any], inputs: list[Any]) -> list[Any]:
    """Outputs, states and windows of a pass through all layers."""
    torch.manual_seed(1)
    backend = backend_of()
    cache = backend.req_to_token_pool.mamba_pool.mamba_cache
    for kept in (cache.temporal, *cache.conv):
        kept.normal_()
    for scratch in (cache.intermediate_ssm, *cache.intermediate_conv_window):
        scratch.fill_(torch.nan)
    cut = CutPasses(backend)
    backend.forward_metadata = SimpleNamespace(
        query_start_loc=starts,
        mamba_cache_indices=SLOTS,
        retrieve_next_token=None,
        retrieve_next_sibling=None,
        retrieve_parent_token=None,
    )
    batch = SimpleNamespace(
        req_pool_indices=torch.arange(len(SLOTS)),
        forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        spec_info=SimpleNamespace(ragged_verify_layout=layout, draft_token_num=BLOCK),
    )
    outputs = [
        cut.forward_extend(layer, batch, *given)
        for layer, given in zip(layers, inputs, strict=True)
    ]
    return [outputs, cache.temporal, cache.intermediate_ssm, cache.intermediate_conv_window[0]]


def differing() -> list[str]:
    torch.manual_seed(0)
    width = 2 * KEY_HEADS * KEY + VALUE_HEADS * VALUE
    layers = [layer_of(layer, width) for layer in LAYERS]
    rows = len(COUNTS) * BLOCK
    whole = [
        (torch.randn(rows, width), *torch.randn(2, rows, VALUE_HEADS).unbind()) for _ in LAYERS
    ]
    kept = torch.cat([BLOCK * request + torch.arange(n) for request, n in enumerate(COUNTS)])
    padded = torch.cat([kept, torch.zeros(PADDING, dtype=torch.int64)])
    starts = torch.tensor([0, *COUNTS], dtype=torch.int32).cumsum(0).int()
    blocks = torch.arange(0, rows + 1, BLOCK, dtype=torch.int32)
    expected = run(blocks, None, layers, whole)
    made = run(starts, "a layout", layers, [tuple(x[padded] for x in part) for part in whole])
    found = []
    for number, (ours, native) in enumerate(zip(made[0], expected[0], strict=True)):
        if not torch.equal(ours[0, : len(kept)], native[0, kept]):
            found.append(f"output of layer {number}")
        if ours[0, len(kept) :].any():
            found.append(f"padding of layer {number}")
    if not torch.equal(made[1], expected[1]):
        found.append("committed states")
    for name, ours, native in zip(("states", "windows"), made[2:], expected[2:], strict=True):
        for request, count in enumerate(COUNTS):
            part = (slice(None), request, slice(count))
            if not torch.equal(ours[part], native[part]):  # NaN, which was there before, differs.
                found.append(f"{name} of request {request}")
    if not made[2][:, 0, 1:].isnan().all():
        found.append("states behind rows that were cut")
    return found


def take_masks_of_integers() -> None:
    """Let the interpreter take masks that are integers, as a GPU does."""

    def with_truth(native: Any, at: int) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[at]
            if mask is not None and mask.data.dtype != np.bool_:
                mask = interpreter.TensorHandle(mask.data.astype(bool), interpreter.tl.int1)
            return native(self, *args[:at], mask, *args[at + 1 :], **kwargs)

        return call

    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        native = getattr(interpreter.InterpreterBuilder, name)
        setattr(interpreter.InterpreterBuilder, name, with_truth(native, at))


take_masks_of_integers()
print(differing())
