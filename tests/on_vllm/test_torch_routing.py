"""Routing of experts in torch against plain loops, and against the argument order of vLLM's."""

from __future__ import annotations

import inspect

import pytest
import torch
from vllm import _custom_ops

from tests.on_vllm import torch_routing


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block"), [(1, 2, 4, 16), (37, 3, 8, 4)])
def test_every_block_has_one_expert_and_every_choice_its_place(tokens, top_k, experts, block):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator)
    ids = scores.topk(top_k, dim=-1).indices.int()
    room = ids.numel() + experts * (block - 1)
    places, owners = torch.empty(room).int(), torch.empty(-(-room // block)).int()
    used = torch.empty(1).int()
    torch_routing.moe_align_block_size(ids, experts, block, places, owners, used)
    count, flat = int(used), ids.flatten().tolist()
    assert count % block == 0
    assert sorted(place for place in places[:count].tolist() if place < len(flat)) == [
        *range(len(flat))
    ]
    for index, place in enumerate(places[:count].tolist()):
        if place < len(flat):
            assert flat[place] == owners[index // block]
    blocks = sum(-(-flat.count(expert) // block) for expert in range(experts))
    assert count == blocks * block


@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_are_scores_of_the_experts_that_biased_scores_choose(renormalize):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 0.0, 1.0, 0.5]])
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    for function, score in (
        (torch_routing.topk_softmax, lambda x: x.softmax(-1)),
        (torch_routing.topk_sigmoid, torch.sigmoid),
    ):
        weights, ids = torch.empty(2, 2), torch.empty(2, 2).int()
        function(weights, ids, torch.empty(2, 2).int(), logits, renormalize, bias)
        assert ids.tolist() == [[0, 3], [0, 2]]
        wanted = score(logits).gather(1, ids.long())
        if renormalize:
            wanted = wanted / wanted.sum(-1, keepdim=True)
        assert torch.allclose(weights, wanted)


def test_sums_are_over_the_experts_of_a_row():
    values, output = torch.arange(12.0).view(2, 3, 2), torch.empty(2, 2)
    torch_routing.moe_sum(values, output)
    assert output.tolist() == [[6.0, 9.0], [24.0, 27.0]]


def test_arguments_stand_where_vllm_has_them():
    for name in ("topk_softmax", "topk_sigmoid", "moe_align_block_size", "moe_sum"):
        ours = inspect.signature(getattr(torch_routing, name)).parameters
        native = inspect.signature(getattr(_custom_ops, name)).parameters
        assert len(ours) >= len(native)
        optional = [one for one in native.values() if one.default is not inspect.Parameter.empty]
        assert {one.name for one in optional} <= set(ours)
