"""What a recurrent target's verify passes keep, counted in a made-up pool of SGLang's layout."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.sglang import verify_state as module
from dflash_plugin.sglang.verify_state import GIB, VerifyState, verify_state

LAYERS, REQUESTS, ROWS = 3, 7, 4
HEADS, WIDTH, STATE, CHANNELS, KERNEL = 2, 5, 6, 8, 4


@dataclass
class Cache:
    """SGLang's ``MambaPool.SpeculativeState``."""

    conv: list[torch.Tensor]
    temporal: torch.Tensor
    intermediate_ssm: torch.Tensor | None
    intermediate_conv_window: list[torch.Tensor]
    replayssm_g: torch.Tensor | None = None


def pool_of(**changes: Any) -> Any:
    wide = torch.zeros(LAYERS, REQUESTS + 1, CHANNELS, ROWS + KERNEL - 2)
    # Windows of successive rows overlap in one buffer.
    windows = wide.unfold(-1, KERNEL - 1, 1).transpose(2, 3)
    values = {
        "conv": [torch.zeros(LAYERS, 99, CHANNELS, KERNEL - 1)],
        "temporal": torch.zeros(LAYERS, 99, HEADS, WIDTH, STATE),
        "intermediate_ssm": torch.zeros(LAYERS, REQUESTS + 1, ROWS, HEADS, WIDTH, STATE),
        "intermediate_conv_window": [windows],
    }
    return SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=Cache(**{**values, **changes})))


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "verify_features", lambda features: None)


def test_states_and_shared_windows_are_counted():
    recurrent = 4 * LAYERS * (REQUESTS + 1) * ROWS * HEADS * WIDTH * STATE
    windows = 4 * LAYERS * (REQUESTS + 1) * CHANNELS * (ROWS + KERNEL - 2)
    found = verify_state(pool_of())
    assert found == VerifyState(recurrent + windows, recurrent, REQUESTS + 1, ROWS, 4)
    assert found.limited() == found.total
    assert found.limited(rows=2) == recurrent // 2 + windows
    assert found.limited(item=2, slots=4) == recurrent // 4 + windows


def test_states_that_are_replayed_are_not_there():
    ring = torch.zeros(10)
    found = verify_state(pool_of(intermediate_ssm=None, replayssm_g=ring))
    assert found is not None
    assert (found.recurrent, found.itemsize) == (0, 0)
    assert found.total == 4 * LAYERS * (REQUESTS + 1) * CHANNELS * (ROWS + KERNEL - 2) + 40
    assert "less with" not in found.describe()


def test_targets_without_state_for_verify_passes():
    assert verify_state(SimpleNamespace()) is None
    plain = SimpleNamespace(conv=[], temporal=None)
    assert verify_state(SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=plain))) is None


def test_the_line_of_the_log_names_what_makes_it_smaller():
    """48 requests of 16 rows, 45 layers of 64 states of 128 x 128, over 8 ranks."""
    row = 45 * 8 * 128 * 128 * 4
    state = VerifyState(row * 49 * 16 + GIB, row * 49 * 16, 49, 16, 4)
    assert state.describe() == (
        "the target's state for verify passes takes 18.23 GiB: 16 rows for each of 48 requests; "
        "less with --speculative-num-draft-tokens 8 (9.61 GiB), --mamba-ssm-dtype bfloat16 "
        "(9.61 GiB), --max-running-requests 24 (9.79 GiB), or --enable-linear-replayssm-spec "
        "(1.00 GiB and its own rings)"
    )
    smallest = VerifyState(100, 90, 2, 2, 2).describe()
    assert "--enable-linear-replayssm-spec" in smallest
    for flag in ("--speculative-num", "--mamba-ssm-dtype", "--max-running"):
        assert flag not in smallest
