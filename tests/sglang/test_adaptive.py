"""Verify passes of fewer rows than a block, with a made-up SGLang around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import ranks
from dflash_plugin.serving.adaptive_setup import VerifyBudget
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang import adaptive, compat, verify_graphs
from dflash_plugin.sglang.adaptive import AdaptiveVerifier, build_verifier
from dflash_plugin.sglang.block_attention import BlockAttention
from dflash_plugin.sglang.draft_step import Step
from dflash_plugin.sglang.patches import skip_unread_embedding, skip_unused_drafts
from dflash_plugin.sglang.verify_input import compacting_input, take_output

BLOCK, BATCH, SIZE = 4, 3, 5
CPU = torch.device("cpu")


class Graphs:
    """SGLang's runner of captured passes, in its ragged verify mode where that is on."""

    def __init__(self, runner: Any, *, attn_backend: Any = None) -> None:
        self.attn_backend, self.staged = attn_backend, []
        self.capture_bs = [1, 2, 4, 5]
        self.max_bs = 5
        self.is_ragged = verify_graphs._is_ragged.get()
        if self.is_ragged:
            self.capture_num_tokens = self._build_ragged_verify_token_buckets()
            self.layouts = [self._capture_ragged_verify_layout(n) for n in self.capture_num_tokens]
            self.starts = attn_backend.seen()

    def _build_ragged_verify_token_buckets(self) -> list[int]:
        return [size * BLOCK for size in self.capture_bs]

    def _capture_ragged_verify_layout(self, num_tokens: int) -> Any:
        slots = min(num_tokens, self.max_bs)
        lens = [num_tokens // slots] * slots
        lens[0] += num_tokens - sum(lens)
        return SimpleNamespace(verify_lens_cpu=lens)

    def _stage_ragged_verify_layout(self, ragged_layout: Any, graph_size_key: int) -> None:
        self.staged.append(graph_size_key)


class Backend:
    """An attention back end, which notes what it was asked while passes are captured."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.attention: BlockAttention | None = None
        self.supports_ragged_verify_graph = False

    def init_cuda_graph_state(self, *_: int) -> None:
        self.asked.append("state")

    def init_forward_metadata_out_graph(self, *_: Any) -> None:
        self.asked.append("metadata")

    def seen(self) -> list[int] | None:
        """The rows of each request that captured passes read."""
        self.init_cuda_graph_state(1, 1)
        self.init_forward_metadata_out_graph(None)
        blocks = self.attention and self.attention.blocks
        return blocks.starts.tolist() if blocks else None


class Runner:
    """SGLang's of the target."""

    def __init__(self) -> None:
        self.init_new_workspace = False
        self.attn_backend: Any = Backend()
        self.decode_cuda_graph_runner: Any = Graphs(self)

    def _get_attention_backend(self, init_new_workspace: bool = False) -> Any:
        self.init_new_workspace = init_new_workspace
        return Backend()


def attention_of(**changes: Any) -> BlockAttention:
    return BlockAttention(None, torch.zeros(1, 1), **{"used_ours": True, **changes})


def worker_of(verifier: AdaptiveVerifier) -> SimpleNamespace:
    return SimpleNamespace(
        verifier=verifier,
        step="a step",
        target_worker=SimpleNamespace(model_runner=Runner()),
        _draft_block_tokens_buf=torch.zeros(8, BLOCK, dtype=torch.int64, device=CPU),
    )


def batch_of(**changes: Any) -> SimpleNamespace:
    values = {"return_logprob": False, "has_grammar": False, "sampling_info": None}
    return SimpleNamespace(**{"reqs": [None] * BATCH, **values, **changes})


def verifier_with(
    by_request: bool = True, is_optional: bool = False, **options: Any
) -> AdaptiveVerifier:
    budget = VerifyBudget(Options(**options), BLOCK - 1, SIZE, CPU)
    return AdaptiveVerifier(
        budget, BLOCK, SIZE, CPU, by_request=by_request, is_optional=is_optional
    )


def verifier_choosing(rows: int, **options: Any) -> AdaptiveVerifier:
    verifier = verifier_with(**options)
    verifier.policy.choose = lambda requests, now: rows
    return verifier


def rows_of_batch(batch: int = BATCH) -> torch.Tensor:
    return torch.arange(batch * BLOCK, device=CPU)


PROBABILITIES = torch.tensor([[0.9, 0.8, 0.2], [0.1] * 3, [0.7, 0.1, 0.9]])


@pytest.fixture(autouse=True)
def old_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: "0.5.17")


def test_passes_are_captured_by_their_rows_with_the_targets_own_back_end():
    verifier, runner, attention = verifier_with(), Runner(), attention_of()
    backend, whole = runner.attn_backend, runner.decode_cuda_graph_runner
    verifier.attention = backend.attention = attention
    verifier.capture(runner, Runner())
    made = verifier.graphs.runner
    assert not whole.is_ragged
    assert made.is_ragged
    assert isinstance(made, Graphs)
    assert made.attn_backend is backend
    assert verifier.budget.capture_sizes == [4, 8, 16, 20]
    # Its metadata stay those of whole blocks, and captured passes read our rows.
    assert backend.asked == []
    assert made.starts == [0, 4, 8, 12, 16, 20]
    assert attention.blocks is None
    assert backend.supports_ragged_verify_graph
    made._stage_ragged_verify_layout(object(), 8)
    assert made.staged == []
    backend.init_cuda_graph_state(1)
    assert backend.asked == ["state"]
    assert runner.decode_cuda_graph_runner is whole
    assert not runner.init_new_workspace


def test_a_back_end_whose_own_attention_takes_layouts_is_made_anew():
    verifier, runner = verifier_with(), Runner()
    verifier.attention = attention_of(used_native=True)
    verifier.capture(runner, Runner())
    made = verifier.graphs.runner
    assert made.attn_backend is not runner.attn_backend
    assert made.attn_backend.asked == ["state", "metadata"]
    layout = object()
    for _ in range(2):  # As SGLang plans the pass, and as it runs it.
        made._stage_ragged_verify_layout(layout, 8)
    assert made.staged == [8]
    made._stage_ragged_verify_layout(object(), 8)
    assert made.staged == [8, 8]
    assert not runner.init_new_workspace
    # What the pass has left of a recurrent target is read from the back end that ran it.
    whole = runner.attn_backend
    for keeps_state, expected in ((False, whole), (True, made.attn_backend)):
        verifier.graphs.keeps_state = keeps_state
        with verifier.graphs.swapped_in(runner):
            assert runner.attn_backend is expected
        assert runner.attn_backend is whole


def test_captured_sizes_are_neither_close_nor_far_apart():
    assert verify_graphs.spaced([1, 2, 3, 4, 8, 9, 10, 12], 8) == [1, 2, 3, 4, 8, 10, 12]
    assert verify_graphs.spaced([8, 9], 8) == [8, 9]
    assert verify_graphs.spaced([5], 8) == [5]
    # Between 256 and 384 rows. Passes of 128 rows and fewer wait for the target's weights, and
    # those of 384 and 512 are close.
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48]
    assert verify_graphs.spaced(sizes, 16) == [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48]
    # Eight ranks share a pass's rows, so that no other number of requests may be captured.
    assert verify_graphs.spaced([8, 16, 24], 16) == [8, 16, 24]


def test_captured_passes_are_profiled(monkeypatch):
    """A cut pass takes 1 ms a row, one of whole blocks half of that, a draft pass 0.5 ms."""
    drafting = Runner()

    def seconds(graphs, device):
        if graphs is drafting.decode_cuda_graph_runner:
            return dict.fromkeys((1, 2, 4, 5), 0.0005)
        if graphs.is_ragged:
            return {rows: 0.001 * rows for rows in graphs.capture_num_tokens}
        return {size: 0.0005 * BLOCK * size for size in graphs.capture_bs}

    monkeypatch.setattr(adaptive, "graph_seconds", seconds)
    verifier = verifier_with()
    verifier.attention = attention_of()
    verifier.capture(Runner(), drafting)
    prior = verifier.policy.times.prior
    assert verifier.policy.sizes == (1, 2, 4, 5)
    # Anchors alone need no draft pass; two rows of four requests fill a pass of eight.
    assert prior[4, 1, BLOCK] == pytest.approx(0.004)
    assert prior[4, 2, BLOCK] == pytest.approx(0.0085)
    assert prior[4, BLOCK, BLOCK] == pytest.approx(0.0085)
    monkeypatch.undo()
    assert verify_graphs.graph_seconds(drafting.decode_cuda_graph_runner, CPU) == {}
    assert verify_graphs.graph_seconds(None, CPU) == {}


def test_launches_ahead_leave_nothing_of_a_cut_pass(monkeypatch):
    """Whole passes, which are captured behind them, would be laid out as cut ones."""

    def refuse(*_):
        raise ValueError("no such block")

    verifier = verifier_with()
    verifier.attention = attention_of()
    verifier.compile_ahead()
    assert (verifier.attention.blocks, verifier.cut, verifier.num_rows) == (None, None, None)
    monkeypatch.setattr(adaptive, "accept_greedy", refuse)
    with pytest.raises(ValueError, match="no such block"):
        verifier.compile_ahead()
    assert (verifier.attention.blocks, verifier.cut, verifier.num_rows) == (None, None, None)
    assert not verifier.attention.ragged


def test_passes_of_whole_blocks_are_timed_once(monkeypatch):
    timed, runner = [], Runner()
    whole = runner.decode_cuda_graph_runner

    def seconds(graphs, device):
        timed.append(graphs)
        return {size: 0.001 * size * (1 + timed.count(whole)) for size in (1, 2, 4, 5)}

    monkeypatch.setattr(adaptive, "graph_seconds", seconds)
    verifier = verifier_with()
    verifier.attention = attention_of()
    verifier.measure(runner)
    assert timed == [whole]
    verifier.capture(runner, Runner())
    assert timed.count(whole) == 1
    # Of the first time, with a draft pass.
    prior = verifier.policy.times.prior[5, BLOCK, BLOCK]
    assert prior == pytest.approx(0.002 * 5 + 0.002 * 5)


def test_what_disturbs_one_turn_of_timing_does_not_count(monkeypatch):
    """Every replay takes a thousandth of its rows, but those of the first turn a second longer."""
    replays: list[int] = []

    class Key(NamedTuple):
        size: int

    def seconds(graph):
        return graph.size / 1000 + (replays.count(graph.size) == 1)

    graphs = {
        Key(size): SimpleNamespace(size=size, replay=lambda size=size: replays.append(size))
        for size in (8, 16)
    }
    monkeypatch.setattr(verify_graphs, "is_instance", lambda *_: True)
    monkeypatch.setattr(verify_graphs, "_replay_seconds", seconds)
    runner = SimpleNamespace(backend=SimpleNamespace(_graphs=graphs))
    assert verify_graphs.graph_seconds(runner, torch.device("cuda")) == {8: 0.008, 16: 0.016}
    assert replays == [8, 16] * verify_graphs.TIMED_TURNS


@pytest.mark.parametrize(
    ("seconds", "bypass", "whole"),
    [
        ({1: 1.0, 2: 1.05, 4: 1.5, 5: 2.0}, 2, False),
        ({1: 1.0, 2: 1.05, 4: 1.07, 5: 1.08}, 5, True),
        ({1: 1.0, 2: 2.0}, 0, False),
        ({}, 0, False),
    ],
)
def test_batches_that_gain_nothing_are_verified_whole(monkeypatch, seconds, bypass, whole):
    monkeypatch.setattr(adaptive, "graph_seconds", lambda graphs, device: seconds)
    verifier, runner = verifier_choosing(1), Runner()
    verifier.measure(runner)
    assert (verifier.bypass, verifier.whole_blocks) == (bypass, whole)
    assert verifier.predicts(SIZE) is not whole
    assert not verifier.predicts(bypass)
    with verifier.verifying(worker_of(verifier), batch_of(reqs=[None] * bypass)):
        assert verifier.num_rows is None
    # A limit holds for them too.
    limited = verifier_with(max_draft_tokens=1)
    limited.measure(runner)
    assert limited.bypass == 0


@pytest.mark.parametrize("is_optional", [False, True])
@pytest.mark.parametrize("obstacle", ["graphs", "back end", None])
def test_targets_whose_passes_cannot_be_cut(caplog, is_optional, obstacle):
    verifier, runner = verifier_with(is_optional=is_optional), Runner()
    verifier.device = torch.device("cuda")
    verifier.attention = attention_of(used_native=obstacle == "back end")
    if obstacle == "graphs":
        runner.decode_cuda_graph_runner = None
    if obstacle is None:
        assert verifier._graph_obstacle(runner) is None
        verifier.attention = attention_of(used_native=True)
        runner.attn_backend.supports_ragged_verify_graph = True
        assert verifier._graph_obstacle(runner) is None
        return
    message = "CUDA graphs are off" if obstacle == "graphs" else "Backend's own attention takes"
    if is_optional:
        with caplog.at_level("INFO"):
            verifier.measure(runner)
        assert message in caplog.text
        assert verifier.whole_blocks
        verifier.capture(runner, Runner())
        assert verifier.graphs.runner is None
    else:
        with pytest.raises(DFlashError, match=f"{message}.*, or turn"):
            verifier.measure(runner)


@pytest.mark.parametrize("is_optional", [False, True])
def test_a_server_without_memory_for_more_graphs_verifies_whole_blocks(
    monkeypatch, caplog, is_optional
):
    """Asked for, it takes what is there."""
    monkeypatch.setattr(adaptive, "free_memory", lambda device: 1.5 * 2**30)
    verifier = verifier_with(is_optional=is_optional)
    verifier.attention = attention_of()
    verifier.capture(Runner(), Runner())
    assert (verifier.graphs.runner is None) is is_optional
    assert verifier.whole_blocks is is_optional
    assert ("1.5 GiB of GPU memory are free" in caplog.text) is is_optional


def test_memory_that_another_rank_lacks_leaves_all_blocks_whole():
    verifier = verifier_with(is_optional=True)
    verifier.on_any_rank = lambda here: True
    verifier.attention = attention_of()
    verifier.capture(Runner(), Runner())
    assert verifier.graphs.runner is None
    assert verifier.whole_blocks


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_is_cut_and_whole_again_afterwards(fails):
    """Two rows each on average: the drafts that stand most probably, of whatever request."""
    verifier = verifier_choosing(2)
    worker = worker_of(verifier)
    runner, rows = worker.target_worker.model_runner, rows_of_batch()
    verifier.attention = attention_of()
    verifier.capture(runner, Runner())
    whole = runner.decode_cuda_graph_runner
    verifier.predictor.predictions[:BATCH] = PROBABILITIES
    try:
        with verifier.verifying(worker, batch_of()):
            assert runner.decode_cuda_graph_runner is verifier.graphs.runner
            assert not verifier.skips_draft
            # Two rows each are six, and the next captured pass has eight.
            assert verifier.num_rows == 8
            cut = verifier.compact(rows + 50, rows, rows + 100)
            assert cut.tokens.tolist() == [50, 51, 52, 53, 54, 55, 58, 59]
            assert cut.positions.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
            assert cut.slots.tolist() == [100, 101, 102, 103, 104, 105, 108, 109]
            assert verifier.row_counts() == [4, 2, 2]
            # Two requests that pad the captured pass have no rows.
            assert verifier.graphs.starts.tolist() == [0, 4, 6, 8, 8, 8]
            assert verifier.graphs.requests[:8].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert runner.decode_cuda_graph_runner is whole
    assert verifier.cut is None
    assert verifier.num_rows is None
    assert verifier.verify_len == BLOCK


def test_rows_that_fill_whole_blocks_are_not_cut():
    """Three rows of three requests round up to twelve."""
    verifier = verifier_choosing(3)
    verifier.budget.capture_sizes = [4, 8, 16]
    with verifier.verifying(worker_of(verifier), batch_of()):
        assert verifier.num_rows is None
        assert verifier.verify_len == BLOCK


def test_requests_that_cannot_differ_have_as_many_rows_each():
    verifier = verifier_choosing(2, by_request=False)
    verifier.predictor.predictions[0] = 1.0
    assert verifier.policy.expected == verifier.policy.acceptance.expected
    with verifier.verifying(worker_of(verifier), batch_of()):
        cut = verifier.compact(rows_of_batch(), rows_of_batch(), rows_of_batch())
        assert cut.tokens.tolist() == [0, 1, 4, 5, 8, 9]
        assert verifier.row_counts() == [2, 2, 2]


@pytest.mark.parametrize(("captured", "rows"), [([], [0, 4, 8]), ([4], [0, 1, 4, 8])])
def test_a_pass_of_anchors_alone(captured, rows):
    """A captured pass is filled with rows that nothing drafted for."""
    verifier = verifier_choosing(1)
    verifier.budget.capture_sizes = captured
    verifier.graphs.runner = SimpleNamespace(max_bs=SIZE, attn_backend=None) if captured else None
    verifier.predictor.predictions[:BATCH] = PROBABILITIES
    with verifier.verifying(worker_of(verifier), batch_of()):
        assert verifier.skips_draft
        cut = verifier.compact(rows_of_batch(), rows_of_batch(), rows_of_batch())
        assert cut.tokens.tolist() == rows
        verifier.learn(torch.ones(BATCH, device=CPU))
    assert not verifier.skips_draft


def test_a_limit_of_drafts_leaves_padding_in_a_captured_pass():
    """One draft each fills six rows of eight."""
    verifier = verifier_choosing(2, max_draft_tokens=1)
    verifier.budget.capture_sizes = [4, 8, 16]
    verifier.graphs.runner = SimpleNamespace(max_bs=SIZE, attn_backend=None)
    verifier.predictor.predictions[:BATCH] = PROBABILITIES
    with verifier.verifying(worker_of(verifier), batch_of()):
        cut = verifier.compact(rows_of_batch() + 50, rows_of_batch(), rows_of_batch() + 100)
        assert cut.tokens.tolist() == [50, 51, 54, 55, 58, 59, 0, 0]
        assert cut.slots.tolist() == [100, 101, 104, 105, 108, 109, 0, 0]
        assert verifier.row_counts() == [2, 2, 2]


def test_the_output_stays_compact():
    verifier = verifier_choosing(2)
    verifier.predictor.predictions[:BATCH] = PROBABILITIES
    logits, hidden = torch.arange(6.0).repeat(9, 1).T, torch.arange(6.0)[:, None]
    output = SimpleNamespace(next_token_logits=logits, hidden_states=hidden)
    tokens = rows_of_batch(SIZE).view(SIZE, BLOCK)
    with verifier.verifying(worker_of(verifier), batch_of()):
        verifier.compact(tokens[:BATCH].flatten(), rows_of_batch(), rows_of_batch())
        cut = verifier.cut
        take_output(output, cut, tokens)
    assert cut.logits is logits
    assert cut.hidden is hidden
    assert cut.rows.indices.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5]
    # SGLang reads shapes alone.
    assert output.next_token_logits.argmax(dim=-1).view(BATCH, BLOCK).tolist() == [[0] * 4] * 3
    assert output.hidden_states.view(BATCH, BLOCK, -1).shape == (BATCH, BLOCK, 1)
    assert tokens.tolist() == [
        [0, 1, 2, -1], [4, -1, -1, -1], [8, 9, -1, -1], [12, 13, 14, 15], [16, 17, 18, 19]
    ]  # fmt: skip


def test_the_policy_hears_what_drafts_promise_once_outcomes_are_learnt():
    """A drafter that is sure and wrong is not believed in for long."""
    verifier = verifier_choosing(BLOCK)
    worker = worker_of(verifier)
    predictor = verifier.predictor
    believed = verifier.policy.expected()
    for _ in range(1500):
        predictor.confidences[:BATCH] = 4.0
        predictor.predictions[:BATCH] = predictor.model.probabilities(predictor.confidences[:BATCH])
        with verifier.verifying(worker, batch_of()):
            verifier.learn(torch.ones(BATCH, dtype=torch.int32, device=CPU))
        verifier.policy.expected()
    assert verifier.policy.expected()[-1] < 1.2 < believed[-1]


@pytest.mark.parametrize("reason", ["logprobs", "held", "grammar", "processor", "masks", "size"])
def test_passes_that_stay_whole(monkeypatch, reason):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")
    verifier = verifier_choosing(1)
    worker = worker_of(verifier)
    verifier.whole_blocks = reason == "held"
    if reason == "size":
        verifier.budget.capture_sizes = [4]
        verifier.graphs.runner = SimpleNamespace(max_bs=BATCH - 1)
    info = SimpleNamespace(
        has_custom_logit_processor=reason == "processor",
        sampling_mask_batch_indices=torch.zeros(1) if reason == "masks" else None,
    )
    batch = batch_of(
        return_logprob=reason == "logprobs",
        has_grammar=reason == "grammar",
        sampling_info=info,
    )
    with verifier.verifying(worker, batch):
        assert not verifier.skips_draft
        assert verifier.num_rows is None
    if reason not in ("held", "size"):
        with verifier.verifying(worker, batch_of()):
            assert verifier.num_rows == BATCH


@pytest.mark.parametrize(("rows", "runs"), [(1, 0), (2, 1)])
def test_the_draft_pass_is_left_out_where_no_draft_is_verified(rows, runs):
    verifier = verifier_choosing(rows)
    worker, calls = worker_of(verifier), []
    runner = SimpleNamespace(forward=calls.append)
    skip_unused_drafts(runner, worker)
    forward = runner.forward
    positions = torch.arange(BATCH * BLOCK, device=CPU)
    with verifier.verifying(worker, batch_of()):
        out = forward(SimpleNamespace(positions=positions))
        assert len(calls) == runs
        assert runs or out.logits_output.hidden_states.shape == (BATCH * BLOCK, 1)
    # Passes that are no steps, such as those that warm up, run.
    worker.step = None
    forward(SimpleNamespace(positions=positions))
    assert len(calls) == runs + 1


def test_blocks_are_not_embedded_for_a_drafter_that_embeds_itself():
    embed = torch.nn.Embedding(9, 4)
    target = SimpleNamespace(get_input_embeddings=lambda: embed)
    passes: list[Any] = []
    runner = SimpleNamespace(forward=passes.append)
    worker: Any = SimpleNamespace(step=None)
    skip_unread_embedding(worker, target, runner)
    block, embeddings = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(6, 4)
    # Outside of steps both are as they were.
    assert target.get_input_embeddings() is embed
    runner.forward(SimpleNamespace(input_embeds=embeddings))
    assert passes.pop().input_embeds is embeddings
    worker.step = Step(batch_of(), torch.zeros(2))
    made = target.get_input_embeddings()(block)
    # SGLang's worker takes the last dimension for the width.
    assert made.view(-1, made.shape[-1]).shape == (6, 1)
    runner.forward(SimpleNamespace(input_embeds=made))
    assert passes.pop().input_embeds is None
    # The target's own pass may ask for its embedding too.
    assert target.get_input_embeddings() is embed


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("by_request", [False, True])
def test_the_input_of_a_pass_is_cut(captured, by_request):
    class DFlashVerifyInput:
        ragged_verify_layout: Any = None

        def __init__(self, draft_token: Any, positions: Any, draft_token_num: int) -> None:
            self.draft_token, self.positions = draft_token, positions
            self.draft_token_num = draft_token_num

        def prepare_for_verify(self, batch: Any, target_worker: Any) -> Any:
            return batch.out_cache_loc

    verifier = verifier_choosing(2, by_request=by_request)
    worker: Any = worker_of(verifier)
    running: list[Any] = [None]
    compacted = compacting_input(DFlashVerifyInput, lambda: running[0], plans_kv_writes=False)
    rows = rows_of_batch()
    verifier.predictor.predictions[:BATCH] = PROBABILITIES
    if captured:
        verifier.graphs.runner = SimpleNamespace(max_bs=SIZE, attn_backend=None)
    verifier.graphs.layout = lambda requests, rows: ("a layout", requests, rows)

    def made() -> tuple[int, list[int], list[int], Any, Any]:
        found = compacted(draft_token=rows, positions=rows, draft_token_num=BLOCK)
        assert isinstance(found, DFlashVerifyInput)
        slots = found.prepare_for_verify(SimpleNamespace(out_cache_loc=rows), worker.target_worker)
        assert torch.equal(found.draft_token, found.positions)
        counts, layout = getattr(found, "row_counts", None), found.ragged_verify_layout
        return found.draft_token_num, found.positions.tolist(), slots.tolist(), counts, layout

    everything = rows.tolist()
    assert made() == (BLOCK, everything, everything, None, None)
    running[0] = verifier
    assert made() == (BLOCK, everything, everything, None, None)
    # Rows that differ go by a layout, others by their number.
    cut, counts, number, layout = [0, 1, 4, 5, 8, 9], [2, 2, 2], 2, None
    if by_request:
        cut, counts, number = [0, 1, 2, 4, 8, 9], [3, 1, 2], BLOCK
        layout = ("a layout", BATCH, 6)
    with verifier.verifying(worker, batch_of()):
        assert made() == (number, cut, cut, counts, layout)


def info_of(**options: Any) -> Any:
    values = {"adaptive_verification": True, "latency_vs_throughput": 0.5}
    return SimpleNamespace(options=Options(**{**values, **options}))


def runner_of(size: int = SIZE, **changes: Any) -> SimpleNamespace:
    values = {"enable_lora": False, "disable_cuda_graph_padding": False}
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**values, **changes}),
        req_to_token_pool=SimpleNamespace(size=size),
    )


def test_widths_follow_the_options():
    assert build_verifier(info_of(adaptive_verification=False), runner_of(), 16, CPU, None) is None
    limits = info_of(min_draft_tokens=2, max_draft_tokens=7)
    found = build_verifier(limits, runner_of(), 16, CPU, None)
    assert found is not None
    assert found.block == 16
    assert found.by_request
    assert found.policy.verify_lens == (3, 4, 5, 6, 8)
    assert found.policy.weight == 0.5


def test_one_rank_asks_nobody():
    alone = SimpleNamespace(world_size=1)
    assert ranks.agree_across_ranks(alone) is None
    assert [ranks.any_across_ranks(alone)(here) for here in (False, True)] == [False, True]


def test_targets_that_lay_out_rows_by_themselves_have_as_many_of_each_request():
    found = build_verifier(info_of(), runner_of(enable_lora=True), 16, CPU, None)
    assert found is not None
    assert not found.by_request


def test_recurrent_layers_that_take_whole_blocks_are_told():
    with pytest.raises(DFlashError, match=r"is on, but its layers differ: use .*, or turn"):
        build_verifier(
            info_of(), runner_of(), 16, CPU, None, recurrent="its layers differ: use another"
        )


@pytest.mark.parametrize(
    ("changes", "device", "recurrent", "why"),
    [
        ({}, "cuda", None, None),
        ({}, "cpu", None, "not measured on this device"),
        ({"enable_lora": True}, "cuda", None, "LoRA"),
        ({"disable_cuda_graph_padding": True}, "cuda", None, "disable_cuda_graph_padding is on"),
        ({}, "cuda", "its layers differ", "its layers differ"),
        ({"agree": int}, "cuda", None, None),
        ({"dp_size": 2}, "cuda", None, None),
        ({"is_mrope": True}, "cuda", None, "was not run on a GPU yet"),
    ],
)
def test_where_verification_adapts_unasked(monkeypatch, caplog, changes, device, recurrent, why):
    monkeypatch.setattr(adaptive, "AdaptiveVerifier", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(adaptive, "VerifyBudget", lambda *_, **__: None)
    runner = runner_of(**{"size": 9, **changes})
    runner.model_config = SimpleNamespace(model_is_mrope=changes.get("is_mrope", False))
    info = info_of(adaptive_verification=None)
    with caplog.at_level("INFO"):
        found = build_verifier(
            info,
            runner,
            16,
            torch.device(device),
            None,
            agree=changes.get("agree"),
            recurrent=recurrent,
        )
    assert (found is None) == (why is not None)
    assert why is None or why in caplog.text
