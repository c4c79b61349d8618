"""vLLM over HTTP: chat completions, and its counters at ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from dflash_plugin.bench.http_endpoint import HttpEndpoint
from dflash_plugin.bench.measurements import Counters, RequestTrace
from dflash_plugin.bench.metrics import read_passes_off_chunks
from dflash_plugin.bench.schema import Role, Server, Settings
from dflash_plugin.monitor.metrics import DRAFTER_INFO, NAMES, Samples
from dflash_plugin.monitor.redact import without_secrets
from dflash_plugin.prompts import Message

CHAT = "/v1/chat/completions"
METRICS = NAMES["vllm"]


class VllmServer(HttpEndpoint):
    """A running ``vllm serve``. It counts passes of all requests together, not of each."""

    by_request = f"streamed chunks, which are as many as {METRICS.passes} counts"

    def describe(self, role: Role) -> Server:
        """What it is; flags only under ``VLLM_SERVER_DEV_MODE=1``."""
        models = self.client.get_json("/v1/models") or {}
        self.model = models["data"][0]["id"]
        samples = self.client.samples()
        counters = self._counters(samples)
        version = (self.client.get_json("/version") or {}).get("version")
        info = self.client.get_json("/server_info?config_format=json")
        notes, flags, gpu, gpus = [], None, None, 1
        speculative: bool | None = counters.passes is not None
        if counters.passes is None and counters.tokens is None:
            speculative = None
            notes.append(
                "drafts: /metrics has no counters, so whether it drafts is not known; start it "
                "without --disable-log-stats"
            )
        if info is None:
            notes.append(
                "flags: vLLM tells them only under VLLM_SERVER_DEV_MODE=1; give --server-command"
            )
        else:
            config = info.get("vllm_config")
            flags = without_secrets(config)
            gpu = (info.get("system_env") or {}).get("nvidia_gpu_models")
            if isinstance(config, dict):
                gpus = int((config.get("parallel_config") or {}).get("world_size") or 1)
        return Server(
            role=role,
            engine="vllm",
            version=version,
            plugin_version=samples.labels(DRAFTER_INFO).get("plugin"),
            url=self.client.display_url,
            model=self.model,
            speculative=speculative,
            num_drafts=len(counters.accepted) if counters.accepted is not None else None,
            gpu=gpu,
            gpus=gpus,
            flags=flags,
            notes=notes,
        )

    def counters(self) -> Counters:
        """Its counters now."""
        return self._counters(self.client.samples())

    def _counters(self, samples: Samples) -> Counters:
        accepted = samples.by(METRICS.accepted, "position").values()
        tokens, passes = samples.count(METRICS.generated), samples.count(METRICS.passes)
        return Counters(
            tokens,
            passes,
            tuple(round(count) for count in accepted) or None,
            {
                "tokens": _source(METRICS.generated, tokens is not None),
                "passes": _source(METRICS.passes, passes is not None),
                "accepted": _source(METRICS.accepted, bool(accepted)),
            },
        )

    def fill_passes(self, observations: Sequence[RequestTrace], increase: Counters) -> str | None:
        """Take chunks for passes where the counters agree."""
        return read_passes_off_chunks(observations, increase)

    async def prepare(
        self, client: httpx.AsyncClient, messages: list[Message], settings: Settings
    ) -> tuple[str, dict[str, Any]]:
        """A chat completion; the server applies the chat template."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.model_dump() for message in messages],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if settings.ignore_eos:
            body["ignore_eos"] = True
        if settings.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
        return CHAT, body

    def read(self, observation: RequestTrace, chunk: dict[str, Any]) -> int:
        """Take a chunk of a chat completion; the last one brings the number of tokens."""
        if chunk.get("usage"):
            observation.tokens = chunk["usage"]["completion_tokens"]
        if not chunk.get("choices"):
            return 0
        choice = chunk["choices"][0]
        delta = choice.get("delta") or {}
        observation.text += delta.get("content") or ""
        ids = choice.get("token_ids") or []
        observation.token_ids += ids
        written = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
        # Without ids a chunk still tells when tokens came; how many is then not known.
        return len(ids) or (1 if written else 0)

    def detokenize(self, texts: list[list[int]]) -> list[str]:
        """Text of token ids."""

        def one(ids: list[int]) -> str:
            body = {"model": self.model, "tokens": ids}
            return str(self.client.post_json("/detokenize", body)["prompt"])

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, texts))


def _source(name: str, exported: bool) -> str:
    return name if exported else f"/metrics has no {name}"
