"""How a running server runs the drafter, as far as it says so over HTTP.

vLLM tells it in metrics that the plugin exports; those that its workers know are there from the
first request on. SGLang tells it in ``/server_info`` and ``/model_info``. What a server does not
say is reported as unknown, and is not concluded from something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.server import InspectedServer
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.monitor.metrics import plugin_state

# Share of the KV cache's tokens that may be lost before it is worth a note.
MANY_LOST = 0.1
WHERE = "/metrics, /server_info and /model_info"


def check_setup(server: InspectedServer, config: DrafterConfig) -> list[Check]:
    """Name what the server runs the drafter with.

    Args:
        server: one that speculates.
        config: the drafter that was given to doctor.
    """
    return [
        _layout(server, config),
        _cache(server),
        _attention(server),
        _runner(server, config),
        _draft_pass(server),
        _images(server),
    ]


def _unknown(name: str, what: str, server: InspectedServer | None = None) -> Check:
    """A note that something is unknown; ``server`` is given where its workers would know."""
    finding = f"unknown: the server does not say {what}"
    check = Check(name=name, status="note", looked_at=WHERE, finding=finding)
    if server is None or not server.plugin or server.engine != "vllm":
        return check
    return check.note(
        f"{finding}; its workers do with the first request's statistics",
        "send a request, or leave --no-ask out, to a server without --disable-log-stats",
    )


def _layout(server: InspectedServer, config: DrafterConfig) -> Check:
    told = {**plugin_state(server.info), **server.snapshot.drafter}
    dialect, size = told.get("dialect"), told.get("block_size")
    if not dialect or not size:
        return _unknown("server layout", "as which layout it read config.json")
    check = Check(
        name="server layout",
        status="ok",
        looked_at="dialect and block size that the server read, against those read here",
        finding=f"read as {dialect}, block size {size}",
        evidence={"server": [dialect, str(size)], "here": [config.dialect, str(config.block_size)]},
    )
    if (dialect, str(size)) == (config.dialect, str(config.block_size)):
        return check
    return check.fault(
        f"the server {check.finding}, and here {config.dialect}, block size {config.block_size}: "
        "it runs another drafter, or another reading of it",
        "serve the drafter that is given here; give doctor the server's --dialect",
        Certainty.LIKELY,
    )


def _cache(server: InspectedServer) -> Check:
    """KV groups and the tokens that they, or a pool for the drafter, take from the cache."""
    name = "kv cache"
    if server.engine == "vllm":
        told, lost_there = server.snapshot.cache_groups, server.snapshot.cache_tokens_lost
        if told is None or lost_there is None:
            return _unknown(name, "in how many groups its cache is divided", server)
        groups, lost = int(told), int(lost_there)
        tokens = _integer(server.snapshot.cache.get("kv_cache_size_tokens"))
        evidence = {"groups": groups, "tokens": tokens}
        finding = f"{groups} KV group{'s' if groups > 1 else ''}, each with a block table"
        finding += "" if tokens is None else f", that hold {tokens:,} tokens"
        finding += f"; without the drafter the cache would hold {lost:,} more"
        whole = None if tokens is None else tokens + lost
    else:
        state, internal = plugin_state(server.info), _internal(server)
        memory = internal.get("memory_usage") or {}
        tokens, kv = _integer(memory.get("token_capacity")), memory.get("kvcache")
        pool = state.get("draft_pool_bytes")
        if not tokens or not kv or pool is None:
            return _unknown(name, "how many tokens its cache and the drafter's pool hold", server)
        groups = 2 if memory.get("token_capacity_swa") else 1
        lost = int(tokens * (pool / 2**30) / kv)
        whole = tokens + lost
        evidence = {"groups": groups, "tokens": tokens, "draft_pool_bytes": pool}
        finding = f"{tokens:,} tokens in {groups} pool{'s' if groups > 1 else ''} of the target"
        finding += f"; the drafter's own pool takes the room of about {lost:,} more"
    check = Check(
        name=name,
        status="ok",
        looked_at="tokens that the KV cache holds, and what the drafter takes of it",
        finding=finding,
        evidence=evidence | {"tokens_lost": lost},
    )
    return check if whole is None or lost < MANY_LOST * whole else check.note(finding)


def _attention(server: InspectedServer) -> Check:
    name, setup, info = "attention back end", server.snapshot.setup, server.info
    target = setup.get("attention_backend") or info.get("attention_backend")
    if not target:
        return _unknown(name, "which one is in use", server)
    draft = setup.get("draft_attention_backend") or info.get("speculative_draft_attention_backend")
    finding = f"{target}{f', {draft} for drafts' if draft and draft != target else ''}"
    return Check(name=name, status="ok", looked_at=WHERE, finding=finding)


def _runner(server: InspectedServer, config: DrafterConfig) -> Check:
    """vLLM's model runner, and whether it runs a DFlash 2 drafter's selector."""
    name = "model runner"
    if server.engine == "sglang":
        if server.plugin or config.selector is None:
            finding = "SGLang's worker, with the drafter's selector if it has one"
            return Check(name=name, status="ok", looked_at=WHERE, finding=finding)
        return _without_selector(name, "SGLang's own worker")
    setup = server.snapshot.setup
    runner, selector = setup.get("runner"), setup.get("selector")
    if not runner:
        if config.selector is None or server.plugin:
            return _unknown(name, "which model runner it has")
        return _without_selector(name, "vLLM's own proposer")
    check = Check(
        name=name,
        status="ok",
        looked_at="vLLM's model runner, and the candidate selector of a DFlash 2 drafter",
        finding=f"the {runner.upper()} runner",
        evidence={"runner": runner, "selector": selector},
    )
    if config.selector is not None and selector == "no":
        return _without_selector(name, f"the {runner.upper()} runner")
    if config.selector is not None:
        check.finding += ", with the drafter's selector"
    if runner == "v1":
        return check.note(
            f"{check.finding}, whose draft pass is made for correctness and not for speed",
            "serve with VLLM_USE_V2_MODEL_RUNNER=1",
        )
    return check


def _without_selector(name: str, what: str) -> Check:
    return Check(name=name, status="ok", looked_at=WHERE, finding="").fault(
        f"{what} drafts without the selector that this drafter was trained with",
        "install dflash-plugin in the server's environment, and serve with vLLM's V2 runner "
        "(VLLM_USE_V2_MODEL_RUNNER=1) or SGLang",
        Certainty.LIKELY,
    )


def _draft_pass(server: InspectedServer) -> Check:
    """Whether the draft pass replays a CUDA graph."""
    name, told = "draft pass", server.snapshot.setup.get("draft_graphs")
    if told is None and (
        server.info.get("disable_cuda_graph") or server.info.get("device") == "cpu"
    ):
        told = "no"
    if told is None:
        return _unknown(name, "whether the draft pass replays a CUDA graph", server)
    finding = "a CUDA graph where the batch is one of the captured sizes"
    check = Check(name=name, status="ok", looked_at=WHERE, finding=finding)
    if told == "yes":
        return check
    if server.engine == "sglang":
        fix = "serve on a GPU, without --disable-cuda-graph"
    elif server.snapshot.setup.get("runner") == "v1":
        fix = "serve with VLLM_USE_V2_MODEL_RUNNER=1"
    else:
        fix = (
            "serve on a GPU, without --enforce-eager and with a cudagraph_mode whose decode mode "
            "is FULL; if the log says that the draft attention does not support full CUDA graphs, "
            "with another --attention-backend"
        )
    return check.note("eager: every kernel of the draft pass is launched by the host", fix)


def _images(server: InspectedServer) -> Check:
    """A target that reads images, of which the drafter gets the target's features alone."""
    name = "images"
    told = server.snapshot.setup.get("multimodal")
    if told is None and server.model.get("has_image_understanding") is not None:
        told = "yes" if server.model["has_image_understanding"] else "no"
    if told is None:
        return _unknown(name, "whether its target reads images")
    finding = "the target reads text alone"
    check = Check(name=name, status="ok", looked_at=WHERE, finding=finding)
    if told == "no":
        return check
    return check.note(
        "the target reads images: the drafter sees them through the target's features alone, and "
        "was probably trained on text, so that requests with images may be drafted worse",
    )


def _internal(server: InspectedServer) -> Mapping[str, Any]:
    states = server.info.get("internal_states") or [{}]
    return states[0] if isinstance(states[0], dict) else {}


def _integer(text: object) -> int | None:
    """A whole number, or None for what is none, such as vLLM's label "None"."""
    try:
        return int(str(text))
    except ValueError:
        return None
