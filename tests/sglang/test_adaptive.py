"""Verify passes of fewer rows than a block, with a made-up SGLang around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.adaptive.policy import VerifyLenPolicy
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang import adaptive, compat, triton_attention, verify_graphs
from dflash_plugin.sglang.adaptive import AdaptiveVerifier, build_verifier
from dflash_plugin.sglang.patches import skip_unused_drafts
from dflash_plugin.sglang.triton_attention import VerifyAttention
from dflash_plugin.sglang.verify_input import compacting_input, scatter

BLOCK, BATCH, SIZE = 4, 3, 5
CPU = torch.device("cpu")


class Graphs:
    """SGLang's runner of captured passes."""

    capture_bs = (4, 1, 2)

    def __init__(
        self, runner: Any, *, attn_backend: Any = None, speculative_num_draft_tokens: int = BLOCK
    ) -> None:
        self.made = runner, attn_backend, speculative_num_draft_tokens


class Runner:
    """SGLang's of the target."""

    def __init__(self) -> None:
        self.init_new_workspace = False
        self.attn_backend: Any = "whole"
        self.decode_cuda_graph_runner: Any = Graphs(self)
        self.backends = 0

    def _get_attention_backend(self, init_new_workspace: bool = False) -> Any:
        self.init_new_workspace = init_new_workspace
        self.backends += 1
        return SimpleNamespace(number=self.backends)


def worker_of(verifier: AdaptiveVerifier) -> SimpleNamespace:
    return SimpleNamespace(
        verifier=verifier,
        step="a step",
        target_worker=SimpleNamespace(model_runner=Runner()),
        _draft_block_tokens_buf=torch.zeros(8, BLOCK, dtype=torch.int64, device=CPU),
    )


def batch_of(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"reqs": [None] * BATCH, "return_logprob": False, "has_grammar": False, **changes}
    )


def verifier_of_rows(*rows: int, by_request: bool = True, **options: Any) -> AdaptiveVerifier:
    policy = VerifyLenPolicy(rows)
    return AdaptiveVerifier(policy, BLOCK, SIZE, CPU, Options(**options), by_request=by_request)


def verifier_choosing(rows: int, **options: Any) -> AdaptiveVerifier:
    verifier = verifier_of_rows(1, 2, BLOCK, **options)
    verifier.policy.choose = lambda requests, now: rows
    return verifier


def rows_of_batch(batch: int = BATCH) -> torch.Tensor:
    return torch.arange(batch * BLOCK, device=CPU)


def test_every_width_has_a_back_end_and_graphs_of_its_own():
    verifier, runner = verifier_of_rows(1, 2, BLOCK), Runner()
    verifier.capture(runner, Runner())
    assert set(verifier.graphs.passes) == {1, 2}
    for rows, made in verifier.graphs.passes.items():
        assert made.graphs.made == (runner, made.backend, rows)
        assert made.starts.tolist() == [rows * n for n in range(SIZE + 1)]
        assert made.requests.tolist() == [n for n in range(SIZE) for _ in range(rows)]
    assert runner.backends == 2
    assert verifier.policy.sizes == (1, 2, 4)
    assert not runner.init_new_workspace


@pytest.mark.parametrize(
    ("attention", "wanted", "shared"),
    [
        (VerifyAttention(used_ours=True), True, True),
        (VerifyAttention(used_ours=True), False, False),
        (VerifyAttention(used_ours=True, used_native=True), True, False),
        (None, True, False),
    ],
)
def test_rows_are_shared_out_where_all_attention_takes_them(monkeypatch, attention, wanted, shared):
    monkeypatch.setattr(triton_attention, "install", lambda backend, device: attention)
    verifier = verifier_of_rows(1, 2, BLOCK, by_request=wanted)
    verifier.capture(Runner(), Runner())
    assert verifier.by_request is shared
    assert (verifier.policy.expected == verifier._expected) is shared


def test_captured_passes_are_profiled(monkeypatch):
    """A verify pass takes 1 ms a row, a draft pass half a millisecond a request."""
    drafting = Runner()

    def seconds(graphs, device):
        if graphs is drafting.decode_cuda_graph_runner:
            return {1: 0.0005, 2: 0.001}
        return {size: 0.001 * size * graphs.made[2] for size in (1, 2, 4)}

    monkeypatch.setattr(adaptive, "graph_seconds", seconds)
    verifier = verifier_of_rows(1, 2, BLOCK)
    verifier.capture(Runner(), drafting)
    assert verifier.policy.prior == pytest.approx(
        {
            (1, 1): 0.001, (2, 1): 0.002, (4, 1): 0.004,
            (1, 2): 0.0025, (2, 2): 0.005,
            (1, BLOCK): 0.0045, (2, BLOCK): 0.009,
        }
    )  # fmt: skip
    monkeypatch.undo()
    assert verify_graphs.graph_seconds(drafting.decode_cuda_graph_runner, CPU) == {}
    assert verify_graphs.graph_seconds(None, CPU) == {}


@pytest.mark.parametrize("asked", [True, None])
def test_nothing_is_captured_where_graphs_are_off(asked):
    verifier, runner = verifier_of_rows(1, BLOCK, adaptive_verification=asked), Runner()
    runner.decode_cuda_graph_runner = None
    verifier.capture(runner, Runner())
    assert not verifier.graphs.passes
    assert runner.backends == 0
    assert verifier.whole_blocks == (asked is None)


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_is_cut_and_whole_again_afterwards(fails):
    """Two rows each on average: the drafts that stand most probably, of whatever request."""
    verifier = verifier_choosing(2)
    worker = worker_of(verifier)
    runner, rows = worker.target_worker.model_runner, rows_of_batch()
    verifier.capture(runner, Runner())
    verifier.by_request = True
    before = runner.attn_backend, runner.decode_cuda_graph_runner
    verifier.predictor.predictions[:BATCH] = torch.tensor(
        [[0.9, 0.8, 0.2], [0.1] * 3, [0.7, 0.1, 0.9]]
    )
    try:
        with verifier.verifying(worker, batch_of()):
            own = verifier.graphs.passes[2]
            assert (runner.attn_backend, runner.decode_cuda_graph_runner) == (
                own.backend, own.graphs,
            )  # fmt: skip
            assert not verifier.skips_draft
            cut = verifier.compact(rows + 50, rows, rows + 100)
            assert cut.tokens.tolist() == [50, 51, 52, 54, 58, 59]
            assert cut.positions.tolist() == [0, 1, 2, 4, 8, 9]
            assert cut.slots.tolist() == [100, 101, 102, 104, 108, 109]
            assert verifier.row_counts() == [3, 1, 2]
            # Two requests that pad the captured pass have two rows each.
            assert own.starts.tolist() == [0, 3, 4, 6, 8, 10]
            assert own.requests.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert (runner.attn_backend, runner.decode_cuda_graph_runner) == before
    assert verifier.cut is None
    assert verifier.verify_len == BLOCK


def test_requests_that_cannot_differ_have_as_many_rows_each():
    verifier = verifier_choosing(2)
    verifier.by_request = False
    verifier.predictor.predictions[0] = 1.0
    with verifier.verifying(worker_of(verifier), batch_of()):
        cut = verifier.compact(rows_of_batch(), rows_of_batch(), rows_of_batch())
        assert cut.tokens.tolist() == [0, 1, 4, 5, 8, 9]
        assert verifier.row_counts() == [2, 2, 2]


def test_a_pass_of_anchors_alone():
    verifier = verifier_choosing(1)
    with verifier.verifying(worker_of(verifier), batch_of()):
        assert verifier.skips_draft
        cut = verifier.compact(rows_of_batch(), rows_of_batch(), rows_of_batch())
        assert cut.tokens.tolist() == [0, 4, 8]
        verifier.learn(torch.ones(BATCH, device=CPU))
    assert not verifier.skips_draft


@pytest.mark.parametrize("features", [False, True])
def test_the_output_is_laid_out_like_whole_blocks(features):
    verifier = verifier_choosing(2)
    verifier.predictor.predictions[:BATCH] = torch.tensor(
        [[0.9, 0.8, 0.2], [0.1] * 3, [0.7, 0.1, 0.9]]
    )
    output = SimpleNamespace(
        next_token_logits=torch.arange(6.0).repeat(9, 1).T, hidden_states=torch.arange(6.0)[:, None]
    )
    tokens = rows_of_batch(SIZE).view(SIZE, BLOCK)
    with verifier.verifying(worker_of(verifier), batch_of()):
        cut = verifier.compact(tokens[:BATCH].flatten(), rows_of_batch(), rows_of_batch())
    scatter(output, cut, tokens, reads_features=features)
    places = [0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5]
    assert output.next_token_logits[:, 0].tolist() == places
    assert output.hidden_states.shape == (12, 1)
    assert not features or output.hidden_states[:, 0].tolist() == places
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


@pytest.mark.parametrize("reason", ["logprobs", "held", "grammar"])
def test_passes_that_stay_whole(reason):
    verifier = verifier_choosing(1)
    worker = worker_of(verifier)
    verifier.whole_blocks = reason == "held"
    batch = batch_of(return_logprob=reason == "logprobs", has_grammar=reason == "grammar")
    with verifier.verifying(worker, batch):
        assert not verifier.skips_draft
        assert verifier.verify_len == BLOCK


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


def test_the_input_of_a_pass_is_cut():
    class DFlashVerifyInput:
        def __init__(self, draft_token: Any, positions: Any, draft_token_num: int) -> None:
            self.draft_token, self.positions = draft_token, positions
            self.draft_token_num = draft_token_num

        def prepare_for_verify(self, batch: Any, target_worker: Any) -> Any:
            return batch.out_cache_loc

    verifier = verifier_choosing(2)
    worker: Any = worker_of(verifier)
    running: list[Any] = [None]
    compacted = compacting_input(DFlashVerifyInput, lambda: running[0], plans_kv_writes=False)
    rows = rows_of_batch()
    verifier.predictor.predictions[:BATCH] = torch.tensor(
        [[0.9, 0.8, 0.2], [0.1] * 3, [0.7, 0.1, 0.9]]
    )

    def made() -> tuple[int, list[int], list[int], Any]:
        found = compacted(draft_token=rows, positions=rows, draft_token_num=BLOCK)
        assert isinstance(found, DFlashVerifyInput)
        slots = found.prepare_for_verify(SimpleNamespace(out_cache_loc=rows), worker.target_worker)
        assert torch.equal(found.draft_token, found.positions)
        counts = getattr(found, "row_counts", None)
        return found.draft_token_num, found.positions.tolist(), slots.tolist(), counts

    everything, cut = rows.tolist(), [0, 1, 2, 4, 8, 9]
    assert made() == (BLOCK, everything, everything, None)
    running[0] = verifier
    assert made() == (BLOCK, everything, everything, None)
    with verifier.verifying(worker, batch_of()):
        assert made() == (2, cut, cut, [3, 1, 2])


def info_of(**options: Any) -> Any:
    values = {"adaptive_verification": True, "latency_vs_throughput": 0.5}
    return SimpleNamespace(options=Options(**{**values, **options}))


def runner_of(mrope: bool = False, size: int = SIZE, **changes: Any) -> SimpleNamespace:
    sizes = {"tp_size": 2, "pp_size": 1, "dp_size": 1, "attn_cp_size": 1, "dcp_size": 1}
    values = {**sizes, "enable_two_batch_overlap": False, "enable_lora": False}
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**values, **changes}),
        model_config=SimpleNamespace(model_is_mrope=mrope),
        req_to_token_pool=SimpleNamespace(size=size),
    )


@pytest.fixture
def old_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: "0.5.17")


@pytest.mark.usefixtures("old_sglang")
def test_widths_follow_the_options():
    assert build_verifier(info_of(adaptive_verification=False), runner_of(), 16, CPU, None) is None
    limits = info_of(min_draft_tokens=2, max_draft_tokens=7)
    found = build_verifier(limits, runner_of(), 16, CPU, None)
    assert found is not None
    assert found.block == 16
    assert found.by_request
    assert found.policy.verify_lens == (3, 4, 6, 8)
    assert found.policy.weight == 0.5


def test_one_rank_asks_nobody():
    assert adaptive.agree_across_ranks(SimpleNamespace(world_size=1)) is None


@pytest.mark.usefixtures("old_sglang")
@pytest.mark.parametrize("changes", [{"enable_lora": True}, {"mrope": True}])
def test_targets_that_lay_out_rows_by_themselves_have_as_many_of_each_request(changes):
    found = build_verifier(info_of(), runner_of(**changes), 16, CPU, None)
    assert found is not None
    assert not found.by_request


@pytest.mark.usefixtures("old_sglang")
@pytest.mark.parametrize(
    ("name", "value"), [("pp_size", 2), ("dcp_size", 2), ("enable_two_batch_overlap", True)]
)
def test_servers_whose_batches_are_split_up_are_refused(name, value):
    with pytest.raises(DFlashError, match=f"{name} is {value}: set it to .*, or turn"):
        build_verifier(info_of(), runner_of(**{name: value}), 16, CPU, None)


@pytest.mark.usefixtures("old_sglang")
def test_what_recurrent_layers_keep_is_not_cut():
    with pytest.raises(DFlashError, match=r"the target keeps state .*, or turn"):
        build_verifier(info_of(), runner_of(), 16, CPU, None, keeps_state=True)


@pytest.mark.usefixtures("old_sglang")
@pytest.mark.parametrize(
    ("changes", "attention", "keeps_state", "why"),
    [
        ({}, VerifyAttention(), False, None),
        ({}, None, False, "requests cannot differ"),
        ({"mrope": True}, VerifyAttention(), False, "requests cannot differ"),
        ({"enable_lora": True}, VerifyAttention(), False, "requests cannot differ"),
        ({"pp_size": 2}, VerifyAttention(), False, "pp_size is 2"),
        ({"size": 8}, VerifyAttention(), False, "no more than 8 requests"),
        ({}, VerifyAttention(), True, "keeps state"),
        ({"agree": int}, VerifyAttention(), False, "several ranks"),
    ],
)
def test_where_verification_adapts_unasked(caplog, changes, attention, keeps_state, why):
    runner = runner_of(**{"size": 9, **changes})
    agree = changes.get("agree")
    info = info_of(adaptive_verification=None)
    with caplog.at_level("INFO"):
        found = build_verifier(
            info, runner, 16, CPU, attention, agree=agree, keeps_state=keeps_state
        )
    assert (found is None) == (why is not None)
    assert why is None or why in caplog.text


def test_graphs_take_at_most_half_of_the_memory(monkeypatch):
    """Three back ends of 3 GiB each, of 8: the second leaves less than half."""
    runner, verifier = Runner(), verifier_of_rows(1, 2, 3, BLOCK)
    monkeypatch.setattr(verify_graphs, "free_memory", lambda device: 8.0 - 3.0 * runner.backends)
    verifier.capture(runner, Runner())
    assert set(verifier.graphs.passes) == {1, 2}
    assert verifier.policy.verify_lens == (1, 2, BLOCK)
    # What is verified at most has to be there.
    runner = Runner()
    verifier = verifier_of_rows(1, 2, 3)
    verifier.capture(runner, Runner())
    assert set(verifier.graphs.passes) == {1, 2, 3}


class TritonAttnBackend:
    """SGLang's, before its captured passes have a buffer of slots."""

    def __init__(self, window: int | None = None) -> None:
        self.sliding_window_size = window
        self.made: list[Any] = []
        self.cuda_graph_kv_indices = torch.zeros(1)

    def init_cuda_graph_state(self, *sizes: int, **more: Any) -> None:
        self.made.append((sizes, more))


def test_slots_are_listed_where_those_of_whole_blocks_are():
    whole, cut = TritonAttnBackend(), TritonAttnBackend()
    verify_graphs.share_kv_indices(whole, cut)
    cut.init_cuda_graph_state(4, 8)
    assert cut.made == [((4, 8), {"kv_indices_buf": whole.cuda_graph_kv_indices})]
    # A window would need a second buffer; another back end's lists are of another kind.
    for first, second in (
        (whole, TritonAttnBackend(window=128)),
        (SimpleNamespace(cuda_graph_kv_indices=[torch.zeros(1)]), TritonAttnBackend()),
    ):
        verify_graphs.share_kv_indices(first, second)
        second.init_cuda_graph_state(4, 8)
        assert second.made == [((4, 8), {})]
