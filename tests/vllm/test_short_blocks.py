"""The layout of shorter blocks, on a made-up speculator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.vllm.short_blocks import ShortBlocks

CPU = torch.device("cpu")
DRAFTS, REQUESTS = 15, 20


class Graphs:
    """vLLM's manager of the draft's graphs, as far as it is used."""

    def __init__(self, config: Any, device: torch.device, mode: str, decode_query_len: int) -> None:
        self.cudagraph_mode, self.rows = mode, decode_query_len
        self.sizes = config.compilation_config.cudagraph_capture_sizes
        self.graphs: dict[int, str] = {}


def made(from_anchor: bool = False, mode: str = "full") -> SimpleNamespace:
    compilation = SimpleNamespace(cudagraph_capture_sizes=[16, 64], max_cudagraph_capture_size=96)
    config = SimpleNamespace(compilation_config=compilation)
    rows = DRAFTS + (not from_anchor)
    return SimpleNamespace(
        vllm_config=config,
        device=CPU,
        max_num_reqs=REQUESTS,
        sample_from_anchor=from_anchor,
        num_speculative_steps=DRAFTS,
        num_query_per_req=rows,
        sample_col=torch.arange(DRAFTS, dtype=torch.int32).repeat(REQUESTS),
        draft_tokens=torch.zeros(REQUESTS, DRAFTS, dtype=torch.int64),
        query_cudagraph_manager=Graphs(config, CPU, mode, rows),
        short_cudagraph_manager=None,
    )


@pytest.mark.parametrize("from_anchor", [False, True])
def test_the_speculator_is_laid_out_for_shorter_blocks_and_back(from_anchor):
    speculator = made(from_anchor)
    whole, blocks = dict(vars(speculator)), ShortBlocks(speculator, 8)
    assert vars(speculator) == whole
    speculator.short_cudagraph_manager = graphs = blocks.make_graphs(speculator)

    def draft() -> None:
        assert speculator.num_speculative_steps == 7
        assert speculator.num_query_per_req == (7 if from_anchor else 8)
        assert speculator.query_cudagraph_manager is graphs
        assert speculator.sample_col.dtype == torch.int32
        assert speculator.sample_col.tolist() == list(range(7)) * REQUESTS
        speculator.draft_tokens[:2] = torch.arange(14).view(2, 7)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"), blocks.laid_out(speculator):
        draft()
    del whole["short_cudagraph_manager"]
    assert all(vars(speculator)[name] is value for name, value in whole.items())
    # The drafts stand where those of whole blocks begin.
    assert speculator.draft_tokens[:2, :8].tolist() == [[*range(7), 0], [*range(7, 14), 0]]


def test_graphs_of_shorter_blocks_hold_more_requests():
    speculator = made()
    graphs = ShortBlocks(speculator, 8).make_graphs(speculator)
    assert isinstance(graphs, Graphs)
    assert (graphs.cudagraph_mode, graphs.rows) == ("full", 8)
    # Passes of 1, 2, 4 and 8 requests; 96 rows hold no 16.
    assert graphs.sizes == [8, 16, 32, 64]
    assert speculator.vllm_config.compilation_config.cudagraph_capture_sizes == [16, 64]


def test_all_requests_have_a_pass_if_it_may_be_captured():
    speculator = made()
    speculator.vllm_config.compilation_config.max_cudagraph_capture_size = 1024
    graphs = ShortBlocks(speculator, 8).make_graphs(speculator)
    assert graphs.sizes[:6] == [8 * requests for requests in (1, 2, 4, 8, 16, REQUESTS)]


def test_passes_of_shorter_blocks_are_captured_by_themselves(monkeypatch, caplog):
    free = iter([4 << 30, 3 << 30])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 << 30))
    caplog.set_level("INFO", "vllm.dflash_plugin")
    speculator = made()
    blocks = ShortBlocks(speculator, 8)
    speculator.short_cudagraph_manager = graphs = blocks.make_graphs(speculator)

    def capture() -> None:
        rows = speculator.num_query_per_req
        speculator.query_cudagraph_manager.graphs = dict.fromkeys(range(4), f"of {rows} rows")

    blocks.capture(speculator, capture)
    assert graphs.graphs == dict.fromkeys(range(4), "of 8 rows")
    assert speculator.query_cudagraph_manager.graphs == {}
    assert "4 draft passes of blocks of 8 rows take 1.00 GiB" in caplog.text


def test_without_graphs_none_is_captured():
    speculator = made(mode="")
    blocks = ShortBlocks(speculator, 8)
    speculator.short_cudagraph_manager = blocks.make_graphs(speculator)
    assert speculator.short_cudagraph_manager is speculator.query_cudagraph_manager
    blocks.capture(speculator, lambda: pytest.fail("captured"))
