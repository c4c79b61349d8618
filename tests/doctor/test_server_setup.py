"""What doctor says of how a server runs the drafter, by what the server tells over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dflash_plugin.doctor.report import Check
from dflash_plugin.doctor.server import inspect_server
from dflash_plugin.doctor.server_setup import check_setup
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.monitor.client import ServerClient
from tests.helpers.fake_server import serving
from tests.helpers.tiny import DFLASH2, tiny_config

V2 = {
    "runner": "v2", "draft_graphs": "yes", "attention_backend": "FLASH_ATTN", "selector": "none",
    "multimodal": "no",
}  # fmt: skip
CACHE = {"num_gpu_blocks": "100", "block_size": "16", "kv_cache_size_tokens": "1600"}
PLAIN = tiny_config()
SELECTING = tiny_config(**DFLASH2)
NAMES = ["server layout", "kv cache", "attention back end", "model runner", "draft pass", "images"]


def labels(name: str, values: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in values.items())
    return f"{name}{{{inside}}} 1\n"


def vllm(
    setup: dict[str, str] | None = V2,
    cache: dict[str, str] = CACHE,
    drafter: dict[str, str] | None = None,
) -> dict[str, Any]:
    told = {"dialect": PLAIN.dialect, "block_size": str(PLAIN.block_size)} | (drafter or {})
    text = "vllm:spec_decode_num_drafts_total 9\n" + labels("vllm:cache_config_info", cache)
    if setup is not None:
        text += labels("dflash:drafter_info", told) + labels("dflash:engine_info", setup)
    return {"/metrics": text}


def sglang(
    state: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    plugin = {"dialect": PLAIN.dialect, "block_size": PLAIN.block_size, "draft_pool_bytes": 2**28}
    internal: dict[str, Any] = {"memory_usage": memory or {"token_capacity": 1000, "kvcache": 4.0}}
    internal |= {"dflash_plugin": plugin | (state or {})} if state is not None else {}
    return {
        "/server_info": {
            "speculative_algorithm": "DFLASH", "disable_cuda_graph": False, "device": "cuda",
            "attention_backend": "fa3", "internal_states": [internal], **arguments,
        },
        "/model_info": model or {"has_image_understanding": False},
    }  # fmt: skip


def checked(answers: dict[str, Any], config: DrafterConfig = PLAIN) -> dict[str, Check]:
    def answer(request: httpx.Request) -> httpx.Response:
        found = answers.get(request.url.path)
        if isinstance(found, str):
            return httpx.Response(200, text=found)
        return httpx.Response(404) if found is None else httpx.Response(200, json=found)

    client = ServerClient("localhost:8000", transport=httpx.MockTransport(answer))
    checks = check_setup(inspect_server(client), config)
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


@pytest.mark.parametrize("answers", [vllm(), sglang(state={})], ids=["vllm", "sglang"])
def test_a_server_that_runs_well_is_ok(answers):
    assert {check.status for check in checked(answers).values()} == {"ok"}


def test_what_a_server_does_not_say_is_unknown():
    for answers in (vllm(None, {}), {"/server_info": {"speculative_algorithm": "DFLASH"}}):
        found = checked(answers)
        unknown = {name for name, check in found.items() if check.finding.startswith("unknown: ")}
        # A drafter without a selector runs as well in SGLang's own worker.
        assert unknown >= set(NAMES) - {"model runner"}
        assert {found[name].status for name in unknown} == {"note"}
        assert all(found[name].fix is None for name in unknown)


def test_the_layout_and_block_size_that_were_read():
    other = checked(vllm(drafter={"dialect": "specforge"}))["server layout"]
    assert other.status == "fault"
    assert "read as specforge" in other.finding
    assert f"here {PLAIN.dialect}" in other.finding
    size = checked(sglang(state={"block_size": 16}))["server layout"]
    assert size.status == "fault"
    assert "block size 16" in size.finding


def test_kv_groups_and_the_tokens_that_they_cost():
    split = checked(vllm(cache=CACHE | {"kv_cache_size_tokens": "400"}))["kv cache"]
    assert split.evidence["groups"] == 4
    assert split.evidence["tokens_lost"] == 1200
    assert "400 tokens, which their blocks hold in 4 KV groups" in split.finding
    assert split.status == "note"
    whole = checked(vllm())["kv cache"]
    assert (whole.evidence["groups"], whole.evidence["tokens_lost"]) == (1, 0)
    assert whole.finding == "1,600 tokens, which their blocks hold in 1 KV group"


def test_the_pool_of_the_drafter_in_sglang():
    found = checked(sglang(state={"draft_pool_bytes": 2**30}))["kv cache"]
    assert found.evidence["tokens_lost"] == 250
    assert found.status == "note"
    memory = {"token_capacity": 1000, "token_capacity_swa": 500, "kvcache": 4.0}
    hybrid = checked(sglang(state={}, memory=memory))["kv cache"]
    assert hybrid.evidence["groups"] == 2
    assert "in 2 pools of the target" in hybrid.finding


def test_the_attention_back_end():
    assert checked(vllm())["attention back end"].finding == "FLASH_ATTN"
    auto = checked(vllm(V2 | {"attention_backend": "auto"}))["attention back end"]
    assert auto.finding.startswith("unknown: ")
    assert "its log names it" in auto.finding
    two = checked(sglang(state={}, speculative_draft_attention_backend="triton"))
    assert two["attention back end"].finding == "fa3, triton for drafts"


def test_a_runner_without_the_selector():
    for answers in (vllm(V2 | {"runner": "v1", "selector": "no"}), vllm(None), sglang()):
        found = checked(answers, SELECTING)["model runner"]
        assert found.status == "fault"
        assert "without the selector" in found.finding
        assert "VLLM_USE_V2_MODEL_RUNNER=1" in str(found.fix)
    fine = checked(vllm(V2 | {"selector": "yes"}), SELECTING)["model runner"]
    assert (fine.status, fine.finding) == ("ok", "the V2 runner, with the drafter's selector")
    slow = checked(vllm(V2 | {"runner": "v1", "selector": "yes"}), SELECTING)["model runner"]
    assert slow.status == "note"
    assert "not for speed" in slow.finding


def test_an_eager_draft_pass():
    for answers in (
        vllm(V2 | {"draft_graphs": "no"}),
        sglang(state={}, disable_cuda_graph=True),
        sglang(state={}, device="cpu"),
    ):
        found = checked(answers)["draft pass"]
        assert found.status == "note"
        assert found.finding.startswith("eager")
        assert "serve without" in str(found.fix)


def test_images_that_a_drafter_does_not_see():
    for answers in (
        vllm(V2 | {"multimodal": "yes"}),
        sglang(state={}, model={"has_image_understanding": True}),
    ):
        found = checked(answers)["images"]
        assert found.status == "note"
        assert "reads images" in found.finding


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_over_http(kind):
    """A server whose answers the other tests of its client use too."""
    with serving(kind) as fake:
        checks = check_setup(inspect_server(ServerClient(fake.url)), PLAIN)
    assert [check.name for check in checks] == NAMES
    assert "unknown" in {check.name: check for check in checks}["attention back end"].finding
