"""Inputs of the V1 runner's draft pass, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from dflash_plugin.vllm import proposer as module
from dflash_plugin.vllm.proposer import NO_SLOT, Proposer

DRAFTS, PAGE, LIMIT, MASK = 3, 4, 64, 96
# Two requests: 6 tokens computed before and 3 in the pass, the last rejected; 5 in a first pass.
COUNTS, LENGTHS, REJECTED = (3, 5), (9, 5), (1, 0)


@pytest.fixture
def proposer():
    # Not by the class, whose making the plugin patches.
    made = object.__new__(Proposer)
    made.spec = SimpleNamespace(config=SimpleNamespace(sample_from_anchor=False))
    made.laid_out = []
    block = SimpleNamespace(lay_out=made.laid_out.append)
    made.model = SimpleNamespace(model=block, follow_target=lambda: None)
    made.num_speculative_tokens = DRAFTS
    made.parallel_drafting_token_id = MASK
    made.max_model_len, made.block_size = LIMIT, PAGE
    made.dflash_causal = False
    made.arange = torch.arange(LIMIT, dtype=torch.int32)
    made.token_arange_np = numpy.arange(LIMIT, dtype=numpy.int32)
    for name in ("_context_positions_buffer", "_context_slot_mapping_buffer", "positions"):
        setattr(made, name, torch.zeros(LIMIT, dtype=torch.int64))
    made._slot_mapping_buffer = torch.zeros(LIMIT, dtype=torch.int64)
    made.input_ids = torch.zeros(LIMIT, dtype=torch.int32)
    return made


def first_pass(proposer, positions):
    total = sum(COUNTS)
    starts = torch.tensor([0, COUNTS[0], total], dtype=torch.int32)
    pages = torch.arange(2 * LIMIT // PAGE, dtype=torch.int32).view(2, -1)
    metadata = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=total,
        max_query_len=max(COUNTS),
        max_seq_len=max(LENGTHS),
        block_table_tensor=pages,
        slot_mapping=torch.zeros(total, dtype=torch.int64),
    )
    size, sampled, block = proposer.set_inputs_first_pass(
        torch.zeros(total, dtype=torch.int32),
        torch.tensor([20, 21], dtype=torch.int32),
        positions,
        torch.zeros(total, 8),
        None,
        metadata,
        torch.tensor(REJECTED, dtype=torch.int32),
    )
    context = (proposer._context_positions_buffer, proposer._context_slot_mapping_buffer)
    drafting = (proposer.input_ids, proposer.positions, proposer._slot_mapping_buffer)
    return (
        [buffer[:total].tolist() for buffer in context],
        [buffer[:size].tolist() for buffer in drafting],
        (sampled.tolist(), block.seq_lens.tolist()),
    )


def test_blocks_follow_the_accepted_tokens(proposer):
    context, (tokens, positions, slots), (sampled, lengths) = first_pass(
        proposer, torch.tensor([6, 7, 8, 0, 1, 2, 3, 4])
    )
    assert context == [[6, 7, 8, 0, 1, 2, 3, 4], [6, 7, NO_SLOT, 64, 65, 66, 67, 68]]
    assert tokens == [20, MASK, MASK, MASK, 21, MASK, MASK, MASK]
    assert positions == [8, 9, 10, 11, 5, 6, 7, 8]
    assert slots == [8, 9, 10, 11, 69, 70, 71, 72]
    assert (sampled, lengths) == ([1, 2, 3, 5, 6, 7], [12, 9])
    assert proposer.laid_out == [1 + DRAFTS]


@pytest.mark.parametrize(
    "axes",
    [
        # Text: the same on every axis. Image: its tokens share a position, those after it count on.
        [[6, 7, 8, 0, 1, 2, 3, 4]] * 3,
        [[4, 5, 6, 0, 1, 1, 1, 3], [4, 5, 6, 0, 1, 1, 2, 3], [4, 5, 6, 0, 1, 2, 1, 3]],
    ],
    ids=["text", "image"],
)
def test_positions_on_several_axes_are_counted_in_tokens(proposer, axes):
    counted = first_pass(proposer, torch.tensor([6, 7, 8, 0, 1, 2, 3, 4]))
    assert first_pass(proposer, torch.tensor(axes)) == counted


def test_this_runner_draws_drafts_beside_block_verification(monkeypatch):
    """Which it has not, and beside another method than its own vLLM draws none."""
    seen = []
    monkeypatch.setattr(
        module.DFlashProposer,
        "__init__",
        lambda self, config, *_: seen.append(config.speculative_config.rejection_sample_method),
    )
    monkeypatch.setattr(module, "required_spec", lambda config: None)
    monkeypatch.setattr(module, "require_hidden_states", lambda config: None)
    for method in ("block", "synthetic"):
        settings = SimpleNamespace(rejection_sample_method=method)
        config = SimpleNamespace(speculative_config=settings, model_config=None)
        Proposer.__init__(object.__new__(Proposer), config, torch.device("cpu"))
    assert seen == ["standard", "synthetic"]


def test_limits_of_a_batch():
    def limits(**given):
        metadata = {"temperature": torch.tensor([1.0, 0.5]), "top_k": None, "top_p": None}
        return module.limits_of(SimpleNamespace(**{**metadata, **given}))

    assert limits() is None
    top_k, top_p = torch.tensor([5, 97], dtype=torch.int32), torch.tensor([1.0, 0.9])
    assert [part.tolist() for part in limits(top_k=top_k)[:3]] == [[5, 97], [1, 1], [0, 0]]
    found = limits(top_p=top_p)
    assert (found.top_k.tolist(), found.top_k.dtype) == ([0, 0], torch.int64)
    assert torch.equal(found.top_p, top_p)
