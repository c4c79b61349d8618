"""Draft passes over the first rows of each block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.serving.adaptive_setup import VerifyBudget
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang import compat
from dflash_plugin.sglang.acceptance_probs import NOT_MADE, AcceptancePredictor
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.block_attention import BlockAttention
from dflash_plugin.sglang.draft_step import DraftGraphHead, Drafting
from dflash_plugin.sglang.short_blocks import ShortBlocks

BLOCK, ROWS, BATCH = 8, 4, 3
CPU = torch.device("cpu")


class Model:
    block_size = BLOCK

    def set_block_size(self, block_size: int) -> None:
        self.block_size = block_size


class DecodeCudaGraphRunner:
    """SGLang's, as far as it is made and captured."""

    def __init__(
        self, runner: Any, *, attn_backend: Any, speculative_num_draft_tokens: int = BLOCK
    ) -> None:
        self.runner, self.width = runner, speculative_num_draft_tokens
        self.capture_bs = [1, 2, 4, 8]
        attn_backend.init_cuda_graph_state()
        self.capture()

    def capture(self) -> None:
        self.block_size = self.runner.model.block_size
        self.captured = list(self.capture_bs)


def drafter_runner() -> SimpleNamespace:
    states: list[int] = []
    backend = SimpleNamespace(
        init_cuda_graph_state=lambda: states.append(1),
        init_forward_metadata_out_graph=None,
        states=states,
    )
    runner = SimpleNamespace(
        device=CPU, attn_backend=backend, model=Model(), kv_index_translator="translator"
    )
    runner.decode_cuda_graph_runner = DecodeCudaGraphRunner(runner, attn_backend=backend)
    return runner


@pytest.fixture
def short() -> ShortBlocks:
    runner = drafter_runner()
    return ShortBlocks(ROWS, BLOCK, runner, runner.model)


def batch_of_whole_blocks(**changes: Any) -> SimpleNamespace:
    rows = torch.arange(BATCH * BLOCK)
    info = SimpleNamespace(
        draft_token_num=BLOCK, num_tokens_per_req=BLOCK, num_tokens_for_logprob_per_req=BLOCK
    )
    values = {
        "batch_size": BATCH, "input_ids": rows, "positions": rows + 100, "out_cache_loc": rows + 7,
        "spec_info": info, "num_token_non_padded": None, "global_num_token_non_padded_cpu": 24,
        "kv_loc_plan": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def first_rows() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19])


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20", "0.5.23"])
def test_a_pass_is_cut_to_the_first_rows_of_each_block(short, monkeypatch, version):
    monkeypatch.setattr(compat, "installed", lambda: version)
    bound = []
    plan = SimpleNamespace(bind=lambda *given, cols: bound.append((*given, cols)))
    batch = batch_of_whole_blocks(
        kv_loc_plan=plan, num_token_non_padded=torch.tensor(24, dtype=torch.int32)
    )
    info, whole = batch.spec_info, short.runner.decode_cuda_graph_runner
    seen = []

    def forward(given: Any) -> Any:
        seen.append((short.model.block_size, short.runner.decode_cuda_graph_runner))
        hidden = given.input_ids[:, None].float()
        return SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=hidden), can_run_graph=False
        )

    out = short.run(forward, batch)
    assert torch.equal(batch.input_ids, first_rows())
    assert torch.equal(batch.positions, first_rows() + 100)
    assert torch.equal(batch.out_cache_loc, first_rows() + 7)
    assert int(batch.num_token_non_padded) == BATCH * ROWS
    counted = compat.SUPPORTED[version].counts_rows_on_host
    assert batch.global_num_token_non_padded_cpu == (BATCH * ROWS if counted else 24)
    planned = [(batch, "translator", slice(0, ROWS))]
    assert bound == (planned if compat.SUPPORTED[version].plans_kv_writes else [])
    # The description of whole blocks is SGLang's, and stays.
    assert (info.draft_token_num, batch.spec_info.draft_token_num) == (BLOCK, ROWS)
    assert batch.spec_info.num_tokens_per_req == ROWS
    assert seen == [(ROWS, whole)]
    assert short.model.block_size == BLOCK
    # SGLang reads rows of whole blocks; those that drafted are found again.
    hidden = out.logits_output.hidden_states.view(BATCH, BLOCK)
    assert torch.equal(hidden[:, :ROWS].flatten(), first_rows().float())
    assert not hidden[:, ROWS:].any()
    rows = short.made_rows(hidden[:, 1:].reshape(-1, 1)).view(BATCH, ROWS - 1)
    assert torch.equal(rows, hidden[:, 1:ROWS])


def test_captured_passes_are_replayed_and_put_back(short, monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")
    whole, backend = short.runner.decode_cuda_graph_runner, short.runner.attn_backend
    short.capture(above=2)
    graphs: Any = short.graphs
    assert (graphs.captured, graphs.width, graphs.block_size) == ([4, 8], ROWS, ROWS)
    # Those of whole blocks keep the back end's state.
    assert backend.states == [1]
    assert short.runner.decode_cuda_graph_runner is whole
    seen = []

    def forward(given: Any) -> Any:
        seen.append(short.runner.decode_cuda_graph_runner)
        return SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=given.input_ids), can_run_graph=True
        )

    out = short.run(forward, batch_of_whole_blocks())
    assert seen == [graphs]
    assert short.runner.decode_cuda_graph_runner is whole
    # Nobody reads the rows of a captured pass, whose head has drafted.
    assert torch.equal(out.logits_output.hidden_states, first_rows())
    short.capture(above=8)
    assert short.graphs is not None
    assert short.graphs.capture_bs == [1, 2, 4, 8]


def test_a_failed_pass_puts_everything_back(short, monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")
    short.capture(above=0)
    whole = short.runner.decode_cuda_graph_runner

    def fail(_: Any) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        short.run(fail, batch_of_whole_blocks())
    assert short.runner.decode_cuda_graph_runner is whole
    assert short.model.block_size == BLOCK


class HeadWorker:
    """Drafts row numbers."""

    device, skips_draft, num_drafts = CPU, False, BLOCK - 1

    def __init__(self, short: ShortBlocks) -> None:
        self.short_blocks: ShortBlocks | None = short
        self.draft_len = ROWS
        self.step: Any = SimpleNamespace(batch=SimpleNamespace(reqs=[None] * BATCH))
        self.drawn: Any = None

    def drafting_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view(-1, self.draft_len, 1)[:, 1:].reshape(-1, 1)

    def drafting(self, hidden: torch.Tensor, anchors: torch.Tensor) -> Drafting:
        return Drafting(hidden, anchors, None)

    def choose_drafts(self, drafting: Drafting) -> torch.Tensor:
        return drafting.hidden[:, 0].long()

    def draws_drafts(self, step: Any) -> bool:
        return self.drawn is not None

    def draw_drafts(self, drafting: Drafting, step: Any) -> torch.Tensor:
        self.drawn = drafting
        return 10 * drafting.hidden[:, 0].long()


def test_the_head_gives_whole_blocks_of_which_the_first_drafts_were_made(short):
    worker = HeadWorker(short)
    head = DraftGraphHead(worker, max_batch=4)
    for rows, factor in ((BLOCK, 1), (ROWS, 2)):
        worker.draft_len = rows
        hidden = factor * torch.arange(4 * rows).float()[:, None]
        head(hidden, torch.arange(4 * rows))
    made = head.out.view(BATCH, BLOCK - 1)
    assert made[:, : ROWS - 1].tolist() == [[2, 4, 6], [10, 12, 14], [18, 20, 22]]
    assert not made[:, ROWS - 1 :].any()
    worker.drawn = True
    made = head.out.view(BATCH, BLOCK - 1)
    assert made[:, : ROWS - 1].tolist() == [[20, 40, 60], [100, 120, 140], [180, 200, 220]]
    assert worker.drawn.anchors.tolist() == [0, ROWS, 2 * ROWS]


def verifier_with(**options: Any) -> AdaptiveVerifier:
    return AdaptiveVerifier(
        VerifyBudget(Options(**options), BLOCK - 1, 8, CPU), BLOCK, 8, CPU, is_optional=True
    )


def test_a_step_of_few_drafts_runs_a_shorter_block(short, monkeypatch):
    verifier = verifier_with()
    verifier.draft_short_blocks(short.runner, short.model, None)
    assert verifier.short is not None
    assert (verifier.short.rows, verifier.short.graphs) == (ROWS, None)
    batch: Any = SimpleNamespace(
        reqs=[None] * 4, return_logprob=False, has_grammar=False, sampling_info=None
    )
    worker = SimpleNamespace(target_worker=SimpleNamespace(model_runner=short.runner))
    seen = set()
    for step in range(400):
        monkeypatch.setattr("time.monotonic", lambda step=step: 1e-3 * step)
        with verifier.verifying(worker, batch):
            assert (verifier.running_short is not None) == (verifier.draft_len == ROWS)
            if verifier.draft_len == ROWS:
                assert verifier.num_rows is not None
                assert verifier.num_rows <= 4 * ROWS
            seen.add((verifier.verify_len, verifier.draft_len))
        assert verifier.draft_len == BLOCK
        assert verifier.running_short is None
    assert {(2, ROWS), (4, ROWS), (8, BLOCK), (4, BLOCK)} <= seen
    assert not any(rows > ROWS for rows, drafted in seen if drafted == ROWS)


@pytest.mark.parametrize(
    ("block", "changes"),
    [(4, {}), (BLOCK, {"by_request": False}), (BLOCK, {"whole": True})],
    ids=["too few rows to halve", "the same rows for all", "whole blocks alone"],
)
def test_where_blocks_stay_whole(short, block, changes):
    verifier = AdaptiveVerifier(
        VerifyBudget(Options(), block - 1, 8, CPU),
        block,
        8,
        CPU,
        by_request=changes.get("by_request", True),
    )
    verifier.whole_blocks = changes.get("whole", False)
    verifier.draft_short_blocks(short.runner, short.model, None)
    assert verifier.short is None
    assert all(choice.draft == block for choice in verifier.policy.choices)


@pytest.mark.parametrize(
    ("attention", "captures"),
    [
        (None, False),
        (BlockAttention(None, torch.zeros(1, 1), used_ours=True, used_native=True), False),
        (BlockAttention(None, torch.zeros(1, 1), used_ours=True), True),
    ],
    ids=["the back end's own", "some layers'", "ours"],
)
def test_on_a_gpu_all_attention_of_the_drafter_has_to_be_ours(
    short, monkeypatch, attention, captures
):
    """A back end's own may lay out blocks of one length, whatever rows the pass has."""
    verifier = verifier_with()
    verifier.bypass, verifier.device = 4, torch.device("cuda")
    verifier.draft_short_blocks(short.runner, short.model, attention)
    assert (verifier.short is not None) is captures
    if verifier.short is not None:
        assert verifier.short.graphs is not None
        assert verifier.short.graphs.capture_bs == [8]
        assert verifier.draft_len == BLOCK


def test_drafts_that_were_not_made_are_never_wanted():
    predictor = AcceptancePredictor(BLOCK - 1, 8, CPU)
    predictor.predict(torch.full((2 * (BLOCK - 1),), 3.0), None)
    assert (predictor.predictions[:2] > 0.5).all()
    predictor.predict(torch.full((2 * (ROWS - 1),), 2.0), None, ROWS - 1)
    assert (predictor.confidences[:2, : ROWS - 1] == 2.0).all()
    assert (predictor.predictions[:2, : ROWS - 1] > 0.5).all()
    assert (predictor.confidences[:2, ROWS - 1 :] == NOT_MADE).all()
    assert (predictor.predictions[:2, ROWS - 1 :] == 0).all()
    predictor.predict(torch.full((2 * (BLOCK - 1),), 3.0), None)
    assert (predictor.predictions[:2] > 0.5).all()
