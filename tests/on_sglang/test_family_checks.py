"""What checks families of targets on a GPU, without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.tiny import tiny_target
from tests.on_sglang import target_families
from tests.on_sglang.batches import read_drafts
from tests.on_sglang.target_families import Attempt, gpu_attempts

BY_NAME = {family.name: family for family in FAMILIES}


def test_drafts_of_a_captured_pass_are_read_from_the_texts():
    # Two requests of blocks of four; the graph was captured for three.
    worker = SimpleNamespace(
        choose_drafts=None,
        block_size=4,
        vocab_size=97,
        step=SimpleNamespace(batch=SimpleNamespace(reqs=[0, 1]), anchors=torch.tensor([2, 6])),
        _draft_block_ids_buf=torch.tensor([[12, 0, 0, 0], [76, 0, 0, 0], [0, 0, 0, 0]]),
        _draft_sampler=SimpleNamespace(out=torch.full((9,), 5)),
    )
    known = [[10, 11, 12, 13, 14, 15, 16, 17], [70, 71, 72, 73, 74, 75, 76, 96, 78]]
    read_drafts(worker, known)
    # Position 5 is wrong by one; behind a text's end stand the drafter's drafts.
    assert worker._draft_sampler.out.view(2, 3).tolist() == [[13, 14, 16], [96, 78, 5]]
    assert worker._draft_sampler.native.out.tolist() == [5] * 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_text_is_the_same_up_to_a_near_tie_in_half_precision_alone(dtype, monkeypatch):
    target = tiny_target()
    prompt = [5, 6, 7]
    with torch.inference_mode():
        order = target(input_ids=torch.tensor([prompt])).logits[0, -1].argsort(descending=True)
    best, second, last = order[0].item(), order[1].item(), order[-1].item()
    monkeypatch.setattr(target_families, "batches", lambda: [[prompt]])

    def is_same(token: int, near_tie: float) -> bool:
        monkeypatch.setitem(target_families.NEAR_TIE, "bfloat16", near_tie)
        made = [{"texts": [[token, 9]]}]
        return target_families.is_same(made, [[[best, 8]]], target, dtype)

    assert target_families.is_same([{"texts": [[best, 8]]}], [[[best, 8]]], target, dtype)
    gap = target_families.distance(target, [second], [best], prompt)
    assert gap > 0
    assert is_same(second, gap * 1.01) == (dtype == "bfloat16")
    assert not is_same(second, gap * 0.99)
    assert not is_same(last, gap * 1.01)


def test_float32_runs_where_kernels_take_it_and_the_users_back_end_comes_first():
    assert gpu_attempts(BY_NAME["Llama"]) == [
        Attempt("float32", "triton"),
        Attempt("bfloat16", "fa3"),
        Attempt("bfloat16", "triton"),
    ]
    assert gpu_attempts(BY_NAME["Qwen3.5"]) == [
        Attempt("bfloat16", "fa3"),
        Attempt("bfloat16", "triton"),
    ]
