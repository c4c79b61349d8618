"""The Transformers engine of this project, in the client's own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from dflash_plugin.bench.evaluate import machine
from dflash_plugin.bench.http_endpoint import token_texts
from dflash_plugin.bench.measurements import Counters, KeptPasses, OnDone, RequestTrace, turns_of
from dflash_plugin.bench.schema import Pass, Role, Server, Settings
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.prompts import Message, Prompt, encode
from dflash_plugin.transformers.engine import Engine, generate_timed
from dflash_plugin.transformers.requests import Request

LENGTH_STEP = 256


class EmbeddedEngine:
    """Runs requests in batches as large as the concurrency.

    Args:
        target: from ``load_target``.
        tokenizer: its.
        drafter: from ``load_drafter``, or None for the target alone.
        name: of the target.
        adaptive: verify as many drafts as pay.
        record_drafts: so that answers can be kept with their rejected drafts.
    """

    by_request = "the engine's passes of each request"
    busy_client = False

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        drafter: Any | None,
        name: str,
        adaptive: bool = False,
        record_drafts: bool = False,
    ) -> None:
        self.target, self.tokenizer, self.drafter = target, tokenizer, drafter
        self.name, self.adaptive, self.record_drafts = name, adaptive, record_drafts
        self.engine: Engine | None = None
        self.tokens = self.passes = 0
        self.drafted: dict[tuple[str, int], tuple[list[int], list[int], list[list[int]]]] = {}

    def describe(self, role: Role) -> Server:
        """What it is."""
        facts = machine(self.target)
        config = self.drafter.config if self.drafter is not None else None
        return Server(
            role=role,
            engine="transformers",
            version=facts["transformers"],
            plugin_version=version("dflash-plugin"),
            model=self.name,
            speculative=config is not None,
            num_drafts=config.num_draft_tokens if config else None,
            gpu=facts["device"],
            flags={**facts, "adaptive": self.adaptive},
        )

    def counters(self) -> Counters:
        """Tokens handed out as they came, and lengths of the passes' own lists."""
        return Counters(
            self.tokens,
            self.passes if self.drafter is not None else None,
            None,
            {
                "tokens": "tokens that the engine streamed",
                "passes": "passes that the engine streamed",
                "accepted": "the engine's passes",
            },
        )

    def fill_passes(self, observations: Sequence[RequestTrace], grown: Counters) -> str | None:
        """They are known."""
        return None if self.drafter is not None else "there is no drafter"

    def run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        """Answer every turn of every prompt, one turn of all after the other."""
        talks: list[list[Message]] = [[] for _ in prompts]
        turns = [turns_of(prompt) for prompt in prompts]
        found: dict[tuple[int, int], RequestTrace] = {}
        seconds = 0.0
        for turn in range(max(map(len, turns))):
            active = [number for number, mine in enumerate(turns) if turn < len(mine)]
            for number in active:
                talks[number] += turns[number][turn]
            asked = [talks[number] for number in active]
            observations = [
                RequestTrace(prompts[number].id, turn, turns[number][turn][-1].content)
                for number in active
            ]
            seconds += self._generate(asked, observations, concurrency, settings, on_done)
            for number, observation in zip(active, observations, strict=True):
                talks[number].append(Message(role="assistant", content=observation.text or " "))
                found[number, turn] = observation
        return [found[key] for key in sorted(found)], seconds

    def _generate(
        self,
        asked: list[list[Message]],
        observations: list[RequestTrace],
        concurrency: int,
        settings: Settings,
        on_done: OnDone,
    ) -> float:
        sampling = SamplingParams(temperature=settings.temperature, seed=settings.seed)
        stop_ids: tuple[int, ...] | None = () if settings.ignore_eos else None
        requests = [
            Request(
                encode(self.tokenizer, messages, settings.thinking),
                settings.max_tokens,
                stop_ids,
                sampling,
            )
            for messages in asked
        ]
        longest = max(len(request.prompt) for request in requests)
        engine = self._engine(min(concurrency, len(requests)), longest + settings.max_tokens)
        times: list[list[float]] = [[] for _ in requests]

        def stamp(index: int, tokens: list[int]) -> None:
            times[index].append(time.perf_counter())
            self.tokens += len(tokens)
            self.passes += len(times[index]) > 1
            observations[index].chunks.append(len(tokens))

        start = time.perf_counter()
        results, seconds = generate_timed(engine, requests, stamp)
        # A request is sent when the one whose place it takes has ended.
        freed = sorted(stamps[-1] for stamps in times)
        for number, (result, stamps) in enumerate(zip(results, times, strict=True)):
            observation = observations[number]
            sent = start if number < engine.max_batch else freed[number - engine.max_batch]
            observation.tokens = len(result.tokens)
            observation.token_ids = result.tokens
            observation.first, observation.last = stamps[0] - sent, stamps[-1] - sent
            observation.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
            if self.drafter is not None:
                observation.passes = len(result.committed)
                observation.accepted = [
                    result.accepted.count(n) for n in range(engine.num_drafts + 1)
                ]
                if self.record_drafts:
                    key = observation.prompt_id, observation.turn
                    self.drafted[key] = result.accepted, result.committed, result.drafted
            on_done()
        return seconds

    def _engine(self, batch: int, length: int) -> Engine:
        """The last engine if it fits, so that what it captured is not captured again."""
        if self.engine is None or self.engine.max_batch != batch or self.engine.max_length < length:
            self.engine = None
            self.engine = Engine(
                self.target,
                self.drafter,
                max_batch=batch,
                max_length=-(-length // LENGTH_STEP) * LENGTH_STEP,
                adaptive=self.adaptive,
                record_drafts=self.record_drafts and self.drafter is not None,
            )
        return self.engine

    def passes_of(self, observation: RequestTrace) -> KeptPasses | None:
        """The passes that wrote the last answer to this prompt, with their rejected drafts."""
        ids = observation.token_ids

        def decode(texts: list[list[int]]) -> list[str]:
            return [self.tokenizer.decode(text) for text in texts]

        texts, passes, at = token_texts(ids, decode), [], 1
        key = observation.prompt_id, observation.turn
        accepted, committed, drafted = self.drafted.get(key, ([], [], []))
        for right, count, drafts in zip(accepted, committed, drafted, strict=True):
            run = texts[at : at + count]
            kept = min(right, count)
            rejected = [self.tokenizer.decode([draft]) for draft in drafts[right:]]
            bonus = run[kept] if kept < count else None
            passes.append(Pass(accepted=run[:kept], bonus=bonus, rejected=rejected))
            at += count
        return KeptPasses(texts[:1], passes, True, "the engine tells what each pass drafted")
