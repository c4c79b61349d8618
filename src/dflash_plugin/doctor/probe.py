"""Puts texts to a running server of which Transformers told the answer and τ.

What other requests a server has had is not known, so its counters alone cannot tell a drafter that
is run wrongly from one that meets other texts than it was trained on. The same prompts can.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import httpx

from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.monitor.client import (
    EngineName,
    MetricsSnapshot,
    ServerClient,
    grown,
    share_saved,
)
from dflash_plugin.monitor.metrics import completed

TIMEOUT = httpx.Timeout(300.0, connect=10.0)
# Seconds in which a server's counters follow its answers.
SETTLED = 3.0
# Greedy, and without what a target's generation_config may add.
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


class Question(NamedTuple):
    """A prompt and the target's greedy answer in Transformers, both token ids."""

    prompt: list[int]
    answer: list[int]


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        tokens: ids.
        passes: verify passes behind the first token; None without a drafter.
        cached: prompt tokens out of the prefix cache; None where the answer does not tell.
    """

    tokens: list[int]
    passes: int | None
    cached: int | None


@dataclass(frozen=True)
class Round:
    """All questions, asked once.

    Attributes:
        tau: tokens committed per verify pass; None without verify passes.
        passes: verify passes.
        counted: by which vLLM's counter of them grew; None where other requests grew it too.
        hit_rate: share of the prompt tokens out of the prefix cache, or None.
        saved: share of the drafts that were left unverified meanwhile; None without adaptive
            verification.
        same: share of an answer's tokens before it leaves the one in Transformers, the median.
    """

    tau: float | None
    passes: int
    counted: int | None
    hit_rate: float | None
    saved: float | None
    same: float


@dataclass(frozen=True)
class Probe:
    """What became of the questions.

    Attributes:
        here: τ of decoding the same texts in Transformers.
        fresh: asked for the first time, past the prefix cache.
        again: the same once more, with what ``fresh`` left in the prefix cache.
        refused: why there is no answer, or None.
    """

    here: float
    fresh: Round | None = None
    again: Round | None = None
    refused: str | None = None


class ServerProber:
    """Asks a server.

    Args:
        client: of its metrics.
        api_key: sent as a bearer token.
        transport: of httpx; for tests.
        sleep: the time's.
    """

    def __init__(
        self,
        client: ServerClient,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.client = client
        self._sleep = sleep
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=client.url, timeout=TIMEOUT, headers=headers, transport=transport
        )

    def probe(self, engine: EngineName, questions: Sequence[Question], here: float) -> Probe:
        """Ask twice, one question at a time.

        Args:
            engine: what serves.
            questions: token ids.
            here: τ of the same texts in Transformers.
        """
        salt = secrets.token_hex(8)
        try:
            fresh, again = (self._round(engine, questions, salt) for _ in range(2))
        except (httpx.HTTPError, DFlashError, KeyError, ValueError) as error:
            return Probe(here, refused=reason(error))
        return Probe(here, fresh, again)

    def _round(self, engine: EngineName, questions: Sequence[Question], salt: str) -> Round:
        ask = self._vllm if engine == "vllm" else self._sglang
        before = self._reading()
        # A salt each, since prompts share the beginning of a chat template.
        answers = [ask(question, f"{salt}-{number}") for number, question in enumerate(questions)]
        generated = sum(len(answer.tokens) for answer in answers)
        # SGLang's answers tell their passes; its counter of tokens may leave out first ones.
        after = self._settled(before, generated) if engine == "vllm" else self._reading()
        alone = engine == "vllm" and grown(before.generated, after.generated) == generated
        committed = sum(max(0, len(answer.tokens) - 1) for answer in answers)
        passes = sum(answer.passes or 0 for answer in answers)
        counted = grown(before.passes, after.passes) if alone else None
        if counted is not None:
            # A chunk may hold two passes, and a pass without drafts is not counted.
            passes = max(passes, int(counted))
        cached = [answer.cached for answer in answers if answer.cached is not None]
        if len(cached) == len(answers):
            hits: float | None = sum(cached) / sum(len(each.prompt) for each in questions)
        else:
            prompt = grown(before.prompt_tokens, after.prompt_tokens)
            found = grown(before.cached_tokens, after.cached_tokens)
            hits = found / prompt if alone and prompt and found is not None else None
        return Round(
            committed / passes if passes else None,
            passes,
            None if counted is None else int(counted),
            hits,
            share_saved(grown(before.verified, after.verified), grown(before.saved, after.saved)),
            sorted(
                agreement(one.tokens, other.answer)
                for one, other in zip(answers, questions, strict=True)
            )[len(answers) // 2],
        )

    def _reading(self) -> MetricsSnapshot:
        info = self.client.info() or {}
        try:
            return completed(self.client.reading(), info)
        except DFlashError:
            return completed(MetricsSnapshot(), info)

    def _settled(self, before: MetricsSnapshot, tokens: int) -> MetricsSnapshot:
        step = 0.1
        for _ in range(int(SETTLED / step)):
            now = self._reading()
            written = grown(before.generated, now.generated)
            if written is None or written >= tokens:
                break
            self._sleep(step)
        return self._reading()

    def _vllm(self, question: Question, salt: str) -> Answer:
        body = {
            "prompt": question.prompt,
            "max_tokens": len(question.answer),
            "cache_salt": salt,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **GREEDY,
        }
        chunks: list[list[int]] = []
        cached = None
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                answer.read()
            _accept(answer)
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise DFlashError(json.dumps(chunk["error"]))
                details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens", cached)
                for choice in chunk.get("choices", []):
                    chunks += [choice["token_ids"]] if choice.get("token_ids") else []
        return Answer(
            [token for chunk in chunks for token in chunk], max(0, len(chunks) - 1), cached
        )

    def _sglang(self, question: Question, salt: str) -> Answer:
        body = {
            "input_ids": question.prompt,
            "sampling_params": {"max_new_tokens": len(question.answer), **GREEDY},
            "extra_key": salt,
        }
        answer = self._http.post("/generate", json=body)
        _accept(answer)
        found: Mapping[str, Any] = answer.json()
        meta = found["meta_info"]
        return Answer(
            list(found["output_ids"]), meta.get("spec_verify_ct"), meta.get("cached_tokens")
        )


def agreement(found: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens before the first that differs."""
    pairs = zip(found, expected, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(expected)


def _accept(answer: httpx.Response) -> None:
    if answer.status_code == httpx.codes.OK:
        return
    advice = ""
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        advice = ": give its key in the environment as DFLASH_BENCH_API_KEY"
    raise DFlashError(
        f"{answer.request.url.path} answered {answer.status_code}: {answer.text[:200].strip()}"
        f"{advice}"
    )
