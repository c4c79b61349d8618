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

V2 = {"runner": "v2", "selector": "none", "multimodal": "no"}
FACTS = {
    "attention_backend": "FLASH_ATTN", "draft_attention_backend": "FLASH_ATTN",
    "draft_graphs": "yes",
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
    facts: dict[str, str] | None = FACTS,
    drafter: dict[str, str] | None = None,
    groups: tuple[int, int] | None = (1, 0),
) -> dict[str, Any]:
    """A server without the plugin, where ``setup`` is None; an idle one, where the next is."""
    told = {"dialect": PLAIN.dialect, "block_size": str(PLAIN.block_size)} | (drafter or {})
    text = "vllm:spec_decode_num_drafts_total 9\n" + labels("vllm:cache_config_info", CACHE)
    if setup is not None:
        text += labels("dflash:drafter_info", told) + labels("dflash:engine_info", setup)
        if facts is not None:
            text += labels("dflash:worker_info", facts)
        if groups is not None:
            text += "dflash:kv_cache_groups {}\ndflash:kv_cache_tokens_lost {}\n".format(*groups)
    return {"/metrics": text}


def sglang(
    state: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    plugin = {"dialect": PLAIN.dialect, "block_size": PLAIN.block_size, "draft_pool_bytes": 2**28}
    plugin |= dict.fromkeys(FACTS, "fa3") | {"draft_graphs": "yes"}
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
    for answers in (vllm(None), {"/server_info": {"speculative_algorithm": "DFLASH"}}):
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


def test_an_idle_server_tells_the_rest_with_its_first_request():
    found = checked(vllm(facts=None, groups=None))
    later = {name for name, check in found.items() if "first request" in check.finding}
    assert later == {"kv cache", "attention back end", "draft pass"}
    assert all("leave --no-ask out" in str(found[name].fix) for name in later)
    assert {check.status for name, check in found.items() if name not in later} == {"ok"}


def test_kv_groups_and_the_tokens_that_they_cost():
    """As the gauges say, whatever the cache's blocks and tokens would suggest."""
    split = checked(vllm(groups=(5, 400)))["kv cache"]
    assert split.evidence == {"groups": 5, "tokens": 1600, "tokens_lost": 400}
    assert split.finding.startswith("5 KV groups")
    assert "the cache would hold 400 more" in split.finding
    assert split.status == "note"
    few = checked(vllm(groups=(1, 100)))["kv cache"]
    assert few.status == "ok"
    assert few.finding.startswith("1 KV group, ")


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
    hybrid = FACTS | {"attention_backend": "FLASHINFER+GDN_ATTN"}
    found = checked(vllm(facts=hybrid))["attention back end"]
    assert found.finding == "FLASHINFER+GDN_ATTN, FLASH_ATTN for drafts"
    chosen = {"attention_backend": "TritonAttnBackend"}
    flagged = checked(sglang(state=chosen, attention_backend="fa3"))["attention back end"]
    assert flagged.finding.startswith("TritonAttnBackend"), "what runs, not what was asked for"
    native = checked(sglang(speculative_draft_attention_backend="triton"))["attention back end"]
    assert native.finding == "fa3, triton for drafts"


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
    eager = {"draft_graphs": "no"}
    for answers, fix in (
        (vllm(facts=FACTS | eager), "without --enforce-eager"),
        (vllm(V2 | {"runner": "v1"}, FACTS | eager), "VLLM_USE_V2_MODEL_RUNNER=1"),
        (sglang(state=eager), "without --disable-cuda-graph"),
        # SGLang's own worker says nothing but its flags.
        (sglang(disable_cuda_graph=True), "without --disable-cuda-graph"),
        (sglang(device="cpu"), "serve on a GPU"),
    ):
        found = checked(answers)["draft pass"]
        assert found.status == "note"
        assert found.finding.startswith("eager")
        assert fix in str(found.fix)
    assert checked(sglang())["draft pass"].finding.startswith("unknown: ")


def test_images_that_a_drafter_does_not_see():
    for answers in (
        vllm(V2 | {"multimodal": "yes"}),
        sglang(state={}, model={"has_image_understanding": True}),
    ):
        found = checked(answers)["images"]
        assert found.status == "note"
        assert "reads images" in found.finding


def over_http(kind: str, config: DrafterConfig = PLAIN, **told: Any) -> dict[str, str]:
    """What doctor finds at a server in this process."""
    with serving(kind, told=told) as fake:
        checks = check_setup(inspect_server(ServerClient(fake.url)), config)
    return {check.name: check.finding for check in checks}


def test_all_that_a_vllm_server_tells_over_http():
    lines = [
        labels("dflash:engine_info", {"runner": "v1", "selector": "no", "multimodal": "yes"}),
        labels("dflash:worker_info", FACTS | {"draft_graphs": "no"}),
        "dflash:kv_cache_groups 5\n",
        "dflash:kv_cache_tokens_lost 400\n",
    ]
    told = dict(line.rstrip().rsplit(" ", 1) for line in lines)
    found = over_http("vllm", SELECTING, **told)
    assert list(found) == NAMES
    assert found["server layout"].startswith("unknown"), "its drafter_info has no dialect"
    assert found["kv cache"].startswith("5 KV groups")
    assert found["attention back end"] == "FLASH_ATTN"
    assert "the V1 runner drafts without the selector" in found["model runner"]
    assert found["draft pass"].startswith("eager")
    assert "reads images" in found["images"]
    assert "unknown" in over_http("vllm")["attention back end"]


def test_all_that_an_sglang_server_tells_over_http():
    facts = {"attention_backend": "TritonAttnBackend", "draft_graphs": "yes"}
    found = over_http("sglang", dialect="specforge", block_size=6, **facts)
    assert list(found) == NAMES
    assert "the server read as specforge, block size 6, and here" in found["server layout"]
    assert found["attention back end"] == "TritonAttnBackend"
    assert found["draft pass"].startswith("a CUDA graph")
    assert "unknown" in over_http("sglang")["draft pass"]
