"""Cut passes over recurrent layers, with a made-up back end; ``on_sglang`` has SGLang's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.sglang import recurrent_verify


class GDNAttnBackend:
    supports_ragged_verify_graph = False

    def __init__(self, states: Any = "states") -> None:
        cache = SimpleNamespace(intermediate_ssm=states)
        pool = SimpleNamespace(mamba_cache=cache)
        self.req_to_token_pool = SimpleNamespace(mamba_pool=pool, mamba_map={3: 0, 1: 1})

    def forward_extend(self, *given: Any, **more: Any) -> Any:
        return given, more


class Mamba2AttnBackend(GDNAttnBackend):
    pass


class HybridLinearAttnBackend:
    def __init__(self, layers: Any) -> None:
        self.linear_attn_backend, self.full_attn_backend = layers, "full"


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    block=st.integers(5, 8),
    padding=st.integers(0, 4),
)
def test_rows_stand_where_their_request_has_them(counts, block, padding):
    counts[0] = max(1, counts[0])
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    total = sum(counts)
    found = recurrent_verify.rows_of(starts, block, total + padding)
    expected = [owner * block + row for owner, n in enumerate(counts) for row in range(n)]
    assert found.in_blocks[:total].tolist() == expected
    assert found.are_verified.tolist() == [True] * total + [False] * padding
    # Every row of the whole blocks, and of the padding, is there.
    assert found.in_pass.shape == (len(counts) * block,)
    assert 0 <= int(found.in_pass.min()) <= int(found.in_pass.max()) < total
    assert 0 <= int(found.in_blocks.min()) <= int(found.in_blocks.max()) < len(counts) * block
    assert found.in_pass[found.in_blocks[:total]].tolist() == list(range(total))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (HybridLinearAttnBackend(GDNAttnBackend()), None),
        (HybridLinearAttnBackend(Mamba2AttnBackend()), "of Mamba2AttnBackend take whole blocks"),
        (SimpleNamespace(), "of SimpleNamespace take whole blocks only: use another target"),
        (
            HybridLinearAttnBackend(GDNAttnBackend(states=None)),
            "leave out --enable-linear-replayssm-spec",
        ),
    ],
)
def test_layers_that_take_whole_blocks_only_are_told(backend, message):
    found = recurrent_verify.obstacle(backend)
    assert (found is None) == (message is None)
    assert message is None or message in str(found)


def test_other_passes_stay_with_sglang():
    layers = GDNAttnBackend()
    assert recurrent_verify.install(HybridLinearAttnBackend(layers))
    assert layers.supports_ragged_verify_graph
    for verifies in (False, True):
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_target_verify=lambda verifies=verifies: verifies),
            spec_info=SimpleNamespace(ragged_verify_layout=None),
        )
        given = layers.forward_extend(layer="l", forward_batch=batch, mixed_qkv=1, a=2, b=3, more=4)
        assert given == (("l", batch, 1, 2, 3), {"more": 4})


def test_a_back_end_without_recurrent_layers_stays_as_it_is():
    backend = SimpleNamespace()
    assert not recurrent_verify.install(backend)
    assert vars(backend) == {}
    assert recurrent_verify.full_attention_of(backend) is backend
    assert recurrent_verify.full_attention_of(HybridLinearAttnBackend("layers")) == "full"
