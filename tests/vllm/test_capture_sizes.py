"""How far vLLM captures graphs for a drafter."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dflash_plugin.vllm.capture_sizes import capture_more


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> SimpleNamespace:
    """The GPU that vLLM finds."""
    found = SimpleNamespace(cuda=True, gib=80)
    platform = SimpleNamespace(
        is_cuda=lambda: found.cuda, get_device_total_memory=lambda: found.gib << 30
    )
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    return found


def arguments(**given: Any) -> SimpleNamespace:
    values = {"cudagraph_capture_sizes": None, "max_cudagraph_capture_size": None}
    return SimpleNamespace(
        **{
            "compilation_config": SimpleNamespace(**values),
            **values,
            "max_num_seqs": 64,
            "enforce_eager": False,
            **given,
        }
    )


@pytest.mark.parametrize(
    ("requests", "rows", "most"),
    [(64, 16, 1024), (None, 16, 1024), (40, 16, 640), (128, 11, 1024), (50, 11, 544)],
)
def test_whole_blocks_of_all_requests_are_captured(requests, rows, most):
    found = arguments(max_num_seqs=requests)
    capture_more(found, rows)
    sizes = found.cudagraph_capture_sizes
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert {1, 2, 4, 8, 248, 256, 512} <= set(sizes)
    # A graph of whole blocks has no padding at few requests.
    assert {rows, 2 * rows, 4 * rows, 8 * rows} <= set(sizes)


@pytest.mark.parametrize(
    "given",
    [
        {"max_num_seqs": 32},  # vLLM's own 512 rows hold them.
        {"enforce_eager": True},
        {"max_cudagraph_capture_size": 512},
        {
            "compilation_config": SimpleNamespace(
                cudagraph_capture_sizes=[8], max_cudagraph_capture_size=None
            )
        },
    ],
)
def test_what_the_user_says_stays(given):
    found = arguments(**given)
    capture_more(found, 16)
    assert found.cudagraph_capture_sizes is None


@pytest.mark.parametrize("changed", [{"gib": 48}, {"cuda": False}])
def test_a_small_gpu_keeps_its_memory(gpu, changed):
    vars(gpu).update(changed)
    found = arguments()
    capture_more(found, 16)
    assert found.cudagraph_capture_sizes is None


def test_sizes_that_are_given_stay():
    found = arguments(cudagraph_capture_sizes=[1, 16])
    capture_more(found, 16)
    assert found.cudagraph_capture_sizes == [1, 16]
