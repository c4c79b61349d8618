"""What splits a server up or extends it: refused by name, or shared out over the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import compat, scale_out
from tests.helpers.tiny import tiny_config

OFF = "DFLASH_PLUGIN=off"
PLAIN: dict[str, Any] = {
    "tp_size": 2,
    "dp_size": 2,
    "ep_size": 2,
    "pp_size": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "enable_prefill_cp": False,
    "enable_dp_attention": False,
    "disaggregation_mode": "null",
    "enable_two_batch_overlap": False,
    "enable_lora": None,
    "lora_paths": None,
}


def check(monkeypatch: pytest.MonkeyPatch, version: str, **changes: Any) -> None:
    monkeypatch.setattr(compat, "installed", lambda: version)
    monkeypatch.setattr(compat, "argument", getattr)
    monkeypatch.setattr(scale_out, "argument", getattr)
    scale_out.check(SimpleNamespace(**{**PLAIN, **changes}))


@pytest.mark.parametrize("version", compat.SUPPORTED)
def test_ranks_and_replicas_are_served(monkeypatch, version):
    check(monkeypatch, version)
    # Paths beside a switch that is off are SGLang's to ignore.
    check(monkeypatch, version, enable_lora=False, lora_paths=["somewhere"])


@pytest.mark.parametrize(
    ("version", "changes", "message", "has_off"),
    [
        ("0.5.23", {"pp_size": 2}, "--pp-size is 2.*split the target with --tp-size", False),
        ("0.5.17", {"enable_dp_attention": True}, "has it from 0.5.23 on", False),
        ("0.5.22", {"attn_dp_size": 2}, "--attn-dp-size is set.*from 0.5.23 on", False),
        ("0.5.23", {"attn_dp_size": 2}, "--enable-dp-attention", True),
        ("0.5.17", {"disaggregation_mode": "prefill"}, "'prefill'.*from 0.5.18 on", False),
        ("0.5.20", {"disaggregation_mode": "decode"}, "--disaggregation-mode is 'decode'", True),
        ("0.5.20", {"attn_cp_size": 4}, "--attn-cp-size is 4", True),
        ("0.5.20", {"dcp_size": 2}, "--dcp-size is 2", True),
        ("0.5.20", {"enable_prefill_cp": True}, "--enable-prefill-cp is True", True),
        ("0.5.20", {"enable_two_batch_overlap": True}, "--enable-two-batch-overlap is set", False),
        ("0.5.18", {"enable_lora": True}, "--enable-lora.*install SGLang 0.5.19", False),
        ("0.5.17", {"lora_paths": ["somewhere"]}, "--lora-paths", False),
    ],
)
def test_what_the_plugin_does_not_run_with_is_refused(
    monkeypatch, version, changes, message, has_off
):
    """With the way back to SGLang's own DFlash only where that runs."""
    with pytest.raises(DFlashError, match=message) as refusal:
        check(monkeypatch, version, **changes)
    assert (OFF in str(refusal.value)) is has_off
    assert "leave it out" in str(refusal.value) or "instead" in str(refusal.value)


def test_adapters_are_taken_from_0_5_19_on(monkeypatch):
    for version, row in compat.SUPPORTED.items():
        assert row.lora is (version not in ("0.5.17", "0.5.18"))
    check(monkeypatch, "0.5.19", enable_lora=True, lora_paths=["somewhere"])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "ranks", "splits"),
    [
        (4, 2, 40, 2, True),
        (4, 2, 40, 4, True),
        (4, 2, 40, 1, True),
        (3, 3, 40, 2, False),
        (6, 3, 40, 2, False),
        (4, 2, 41, 2, False),
    ],
)
def test_drafters_are_shared_out_or_whole_on_every_rank(heads, kv_heads, inner, ranks, splits):
    config = tiny_config(
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner
    )
    assert scale_out.splits(config, ranks) is splits
