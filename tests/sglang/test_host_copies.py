"""Numbers that SGLang's worker sends to the GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from dflash_plugin.serving.engine_surface import Surface
from dflash_plugin.sglang import host_copies
from dflash_plugin.sglang.seams import SEAMS
from dflash_plugin.sglang.surface import ENGINE


@pytest.fixture
def made(monkeypatch) -> list[dict[str, Any]]:
    """What ``torch.tensor`` was asked for; it makes everything on the host, unpinned."""
    asked: list[dict[str, Any]] = []

    class Made:
        def __init__(self, values: Any) -> None:
            self.values = values

        def to(self, device: Any, *, non_blocking: bool) -> Any:
            asked.append({"device": device, "non_blocking": non_blocking})
            return self

    def tensor(data: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return Made(data)

    monkeypatch.setattr(torch, "tensor", tensor)
    return asked


def test_numbers_go_to_a_gpu_from_pinned_memory_without_a_wait(made):
    sent = host_copies.Torch().tensor([3, 5], dtype=torch.int32, device="cuda:1")
    assert sent.values == [3, 5]
    assert made == [
        {"dtype": torch.int32, "pin_memory": True},
        {"device": "cuda:1", "non_blocking": True},
    ]


def test_other_tensors_are_made_as_ever():
    ours = host_copies.Torch()
    made = ours.tensor([3, 5], dtype=torch.int32, device="cpu")
    assert (made.tolist(), made.dtype) == ([3, 5], torch.int32)
    assert ours.tensor(2.5).dtype == torch.float32
    assert ours.zeros is torch.zeros
    assert ours.Tensor is torch.Tensor
    with pytest.raises(AttributeError, match="no_such"):
        ours.no_such  # noqa: B018


@pytest.mark.parametrize(("version", "replaced"), [("0.5.20", True), ("0.5.23", False)])
def test_only_versions_that_wait_are_changed(monkeypatch, version, replaced):
    module = ModuleType(host_copies.WORKER_MODULE)
    module.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, host_copies.WORKER_MODULE, module)
    found = Surface(ENGINE, version, SEAMS)
    monkeypatch.setattr(host_copies, "surface", lambda: found)
    host_copies.send_without_waiting()
    assert isinstance(module.torch, host_copies.Torch) is replaced
