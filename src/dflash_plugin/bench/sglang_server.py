"""SGLang over HTTP: ``/generate``, whose answers count their own verify passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from dflash_plugin.bench.http_endpoint import HttpEndpoint
from dflash_plugin.bench.measurements import Counters, RequestTrace
from dflash_plugin.bench.schema import Role, Server, Settings
from dflash_plugin.monitor.metrics import (
    DRAFTER_INFO,
    NAMES,
    SGLANG_VERIFY_CALLS,
    ServerError,
    plugin_states,
)
from dflash_plugin.monitor.redact import without_secrets
from dflash_plugin.prompts import Message

TOKENS = NAMES["sglang"].generated
NO_METRICS = "nothing: SGLang was started without --enable-metrics"
PLUGIN = "/server_info internal_states.dflash_plugin"


class SglangServer(HttpEndpoint):
    """A running ``sglang.launch_server``. The chat template is applied at its ``/tokenize``."""

    by_request = "spec_verify_ct of each answer's meta_info"

    def describe(self, role: Role) -> Server:
        """What it is."""
        info = self._info()
        self.model = str(info.get("served_model_name") or info.get("model_path"))
        self.speculative = bool(info.get("speculative_algorithm"))
        # Of a tree of drafts a pass accepts one branch, which has a draft for each step.
        tree = int(info.get("speculative_eagle_topk") or 1) > 1
        block, steps = info.get("speculative_num_draft_tokens"), info.get("speculative_num_steps")
        plugin = plugin_states(info)
        samples = self.client.samples()
        version = samples.labels(DRAFTER_INFO).get("plugin")
        flags = without_secrets({k: v for k, v in info.items() if k != "internal_states"})
        sizes = [int(info.get(name) or 1) for name in ("tp_size", "pp_size")]
        # With data-parallel attention the ranks of a tensor-parallel group are divided up.
        if not info.get("enable_dp_attention"):
            sizes.append(int(info.get("dp_size") or 1))
        gpus = 1
        for size in sizes:
            gpus *= size
        self.num_drafts = 0
        if self.speculative:
            self.num_drafts = int(steps) if tree and steps else max(0, int(block or 1) - 1)
        return Server(
            role=role,
            engine="sglang",
            version=info.get("version"),
            plugin_version=version or (plugin[0].get("version") if plugin else None),
            url=self.client.display_url,
            model=str(info.get("model_path")),
            speculative=self.speculative,
            num_drafts=self.num_drafts or None,
            gpus=gpus,
            flags=flags,
        )

    def _info(self) -> dict[str, Any]:
        info = self.client.info()
        if info is None:
            raise ServerError(
                f"{self.client.display_url}/server_info is not there: give the root URL of an "
                "SGLang server"
            )
        return info

    def counters(self) -> Counters:
        """Prometheus where it is exported, else the plugin's passes; positions are in answers."""
        samples, plugin = self.client.samples(), plugin_states(self._info())
        # SGLang names a counter only once it has counted.
        exported = samples.engine() == "sglang"
        tokens = samples.count(TOKENS)
        if tokens is None and exported:
            tokens = 0
        passes = samples.count(SGLANG_VERIFY_CALLS)
        if passes is None and exported and self.speculative:
            passes = 0
        sources = {
            "tokens": TOKENS if tokens is not None else NO_METRICS,
            "passes": SGLANG_VERIFY_CALLS,
            "accepted": "meta_info has no spec_correct_drafts_histogram",
        }
        if passes is None and plugin:
            passes = sum(int(state["verify_passes"]) for state in plugin)
            sources["passes"] = PLUGIN
        elif not self.speculative:
            sources["passes"] = sources["accepted"] = "the server has no drafter"
        elif passes is None:
            sources["passes"] = NO_METRICS
        return Counters(tokens, passes, None, sources)

    def fill_passes(self, observations: Sequence[RequestTrace], increase: Counters) -> str | None:
        """The answers brought them."""
        if not self.speculative:
            return "the server has no drafter"
        for observation in observations:
            # An answer of one token has no verify pass, and meta_info does not say so.
            if observation.passes is None and observation.tokens <= 1:
                observation.passes, observation.accepted = 0, []
        if any(observation.passes is None for observation in observations):
            return "meta_info has no spec_verify_ct"
        return None

    async def prepare(
        self, client: httpx.AsyncClient, messages: list[Message], settings: Settings
    ) -> tuple[str, dict[str, Any]]:
        """Have the server apply the chat template; the request itself is of token ids."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.model_dump() for message in messages],
        }
        if settings.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
        tokens = (await self.client.async_post_json(client, "/tokenize", body))["tokens"]
        sampling: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_tokens,
        }
        if settings.temperature > 0:
            sampling["sampling_seed"] = settings.seed
        if settings.ignore_eos:
            sampling["ignore_eos"] = True
        return "/generate", {
            "input_ids": tokens,
            "sampling_params": sampling,
            "stream": True,
        }

    def read(self, observation: RequestTrace, chunk: dict[str, Any]) -> int:
        """Take a chunk of ``/generate``; ids and text are the answer's so far, or what is new."""
        meta, ids = chunk["meta_info"], chunk.get("output_ids") or []
        tokens = int(meta["completion_tokens"])
        new = tokens - observation.tokens
        observation.tokens = tokens
        if len(ids) == tokens:
            observation.token_ids, observation.text = list(ids), chunk.get("text") or ""
        else:
            observation.token_ids += ids
            observation.text += chunk.get("text") or ""
        if "spec_verify_ct" in meta:
            observation.passes = int(meta["spec_verify_ct"])
            histogram = meta.get("spec_correct_drafts_histogram")
            histogram = histogram or meta.get("spec_accept_histogram")
            if histogram:
                missing = self.num_drafts + 1 - len(histogram)
                observation.accepted = [*histogram, *[0] * missing]
        return new

    def detokenize(self, texts: list[list[int]]) -> list[str]:
        """Text of token ids."""
        body = {"model": self.model, "tokens": texts, "skip_special_tokens": False}
        return list(self.client.post_json("/detokenize", body)["text"])
