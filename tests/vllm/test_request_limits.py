"""Limits of the V2 runner's requests, copied to where a captured pass reads them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from dflash_plugin.vllm.request_limits import RequestLimits

VOCABULARY = 97


def slots(values: list, dtype: type) -> SimpleNamespace:
    """One parameter of the runner's slots; like vLLM's, its device tensor is not the host's."""
    host = np.array(values, dtype=dtype)
    return SimpleNamespace(np=host, gpu=torch.from_numpy(host.copy()))


def limited(top_k: list[int], top_p: list[float]) -> SimpleNamespace:
    return SimpleNamespace(top_k=slots(top_k, np.int32), top_p=slots(top_p, np.float32))


def test_limits_follow_the_runners_requests_in_place():
    limits = RequestLimits(3, torch.device("cpu"))
    seen = limits.of(torch.tensor([0, 1]))
    assert (seen.top_k.tolist(), seen.top_p.tolist()) == ([0, 0], [1.0, 1.0])
    limits.refresh()  # Before the runner has made its sampler.
    limits.states = limited([VOCABULARY, 5, 2], [1.0, 0.5, 0.25])
    limits.refresh()
    found = limits.of(torch.tensor([2, 0, 1]))
    assert found.top_k.tolist() == [2, VOCABULARY, 5]
    assert found.top_k.dtype == torch.int64
    assert found.top_p.tolist() == [0.25, 1.0, 0.5]
    assert found.min_p.tolist() == [0, 0, 0]
    # A new request takes a slot; the buffers that a graph reads stay where they are.
    address = limits._top_k.data_ptr()
    limits.states = limited([VOCABULARY, VOCABULARY, 2], [1.0, 0.75, 0.25])
    limits.refresh()
    found = limits.of(torch.tensor([1]))
    assert (found.top_k.tolist(), found.top_p.tolist()) == ([VOCABULARY], [0.75])
    assert limits._top_k.data_ptr() == address


def test_a_step_without_a_new_limit_copies_nothing():
    limits = RequestLimits(1, torch.device("cpu"))
    limits.states = limited([5], [0.5])
    limits.refresh()
    limits.states.top_k.gpu = limits.states.top_p.gpu = None
    limits.refresh()
    assert limits.of(torch.tensor([0])).top_k.tolist() == [5]
