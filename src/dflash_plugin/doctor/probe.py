"""Sends prompts to a running server whose answer and τ in Transformers are known.

What other requests a server has had is not known. Its counters alone therefore cannot tell a server
that runs the drafter wrongly from one whose requests are unlike the drafter's training text. The
same prompts on both sides can.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median_high
from typing import NamedTuple

from dflash_plugin.decoding.acceptance import tau
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.monitor.client import ServerClient, settle
from dflash_plugin.monitor.metrics import (
    EngineName,
    MetricsSnapshot,
    increase,
    share_saved,
    with_server_info,
)

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
class ProbeRound:
    """All questions, sent once.

    Attributes:
        tau: tokens committed per verify pass; None without verify passes.
        passes: verify passes.
        counted: increase of vLLM's counter of them; None where other requests were counted too.
        hit_rate: share of the prompt tokens out of the prefix cache, or None.
        saved_share: share of the drafts that were left unverified meanwhile; None without adaptive
            verification.
        agreement: share of an answer's tokens before the first that differs from the answer in
            Transformers; the median of the answers.
    """

    tau: float | None
    passes: int
    counted: int | None
    hit_rate: float | None
    saved_share: float | None
    agreement: float


@dataclass(frozen=True)
class Probe:
    """What the server made of the questions.

    Attributes:
        reference_tau: τ of decoding the same texts in Transformers.
        first: the first round, which finds nothing in the prefix cache.
        repeated: the same questions once more, with what ``first`` left in the prefix cache.
        refused: why there is no answer, or None.
    """

    reference_tau: float
    first: ProbeRound | None = None
    repeated: ProbeRound | None = None
    refused: str | None = None


class ServerProber:
    """Sends questions to a server.

    Args:
        client: of the server.
        sleep: the time's.
    """

    def __init__(self, client: ServerClient, sleep: Callable[[float], None] = time.sleep) -> None:
        self.client = client
        self._sleep = sleep

    def probe(
        self, engine: EngineName, questions: Sequence[Question], reference_tau: float
    ) -> Probe:
        """Send all questions twice, one at a time.

        Args:
            engine: what serves.
            questions: token ids.
            reference_tau: τ of the same texts in Transformers.
        """
        salt = secrets.token_hex(8)
        try:
            first, repeated = (self._round(engine, questions, salt) for _ in range(2))
        except (DFlashError, KeyError, ValueError) as error:
            return Probe(reference_tau, refused=reason(error))
        return Probe(reference_tau, first, repeated)

    def _round(self, engine: EngineName, questions: Sequence[Question], salt: str) -> ProbeRound:
        send = self._send_to_vllm if engine == "vllm" else self._send_to_sglang
        before = self._snapshot()
        # A salt each, since prompts share the beginning of a chat template.
        answers = [send(question, f"{salt}-{number}") for number, question in enumerate(questions)]
        generated = sum(len(answer.tokens) for answer in answers)
        # SGLang's answers tell their passes; its counter of tokens may leave out first ones.
        after = self._settled(before, generated) if engine == "vllm" else self._snapshot()
        alone = engine == "vllm" and increase(before.generated, after.generated) == generated
        committed = sum(max(0, len(answer.tokens) - 1) for answer in answers)
        passes = sum(answer.passes or 0 for answer in answers)
        counted = increase(before.passes, after.passes) if alone else None
        if counted is not None:
            # A chunk may hold two passes, and a pass without drafts is not counted.
            passes = max(passes, int(counted))
        cached = [answer.cached for answer in answers if answer.cached is not None]
        if len(cached) == len(answers):
            hits: float | None = sum(cached) / sum(len(each.prompt) for each in questions)
        else:
            prompt = increase(before.prompt_tokens, after.prompt_tokens)
            found = increase(before.cached_tokens, after.cached_tokens)
            hits = found / prompt if alone and prompt and found is not None else None
        return ProbeRound(
            tau(committed, passes),
            passes,
            None if counted is None else int(counted),
            hits,
            share_saved(
                increase(before.verified, after.verified), increase(before.saved, after.saved)
            ),
            median_high(
                agreement(answer.tokens, question.answer)
                for answer, question in zip(answers, questions, strict=True)
            ),
        )

    def _snapshot(self) -> MetricsSnapshot:
        info = self.client.info() or {}
        try:
            return with_server_info(self.client.metrics(), info)
        except DFlashError:
            return with_server_info(MetricsSnapshot(), info)

    def _settled(self, before: MetricsSnapshot, tokens: int) -> MetricsSnapshot:
        def done(now: MetricsSnapshot) -> bool:
            written = increase(before.generated, now.generated)
            return written is None or written >= tokens

        def counters(now: MetricsSnapshot) -> tuple[float | None, ...]:
            return now.generated, now.passes, now.prompt_tokens, now.cached_tokens, now.saved

        return settle(self._snapshot, done, counters, sleep=self._sleep)

    def _send_to_vllm(self, question: Question, salt: str) -> Answer:
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
        for chunk in self.client.events("/v1/completions", body):
            details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens", cached)
            for choice in chunk.get("choices", []):
                chunks += [choice["token_ids"]] if choice.get("token_ids") else []
        return Answer(
            [token for chunk in chunks for token in chunk], max(0, len(chunks) - 1), cached
        )

    def _send_to_sglang(self, question: Question, salt: str) -> Answer:
        body = {
            "input_ids": question.prompt,
            "sampling_params": {"max_new_tokens": len(question.answer), **GREEDY},
            "extra_key": salt,
        }
        found = self.client.post_json("/generate", body)
        meta = found["meta_info"]
        return Answer(
            list(found["output_ids"]), meta.get("spec_verify_ct"), meta.get("cached_tokens")
        )


def agreement(found: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens before the first that differs."""
    pairs = zip(found, expected, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(expected)
