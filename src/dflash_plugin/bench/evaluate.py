"""Acceptance and speed of a drafter over prompt sets."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from pydantic import BaseModel
from transformers import PreTrainedModel

from dflash_plugin.decoding.acceptance import at_least, histogram, rates, tau
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt, encode
from dflash_plugin.transformers.engine import Engine, OnTokens, generate_timed
from dflash_plugin.transformers.requests import Request, Result


class Evaluation(BaseModel):
    """Result of one prompt set.

    Attributes:
        set_name: the set.
        prompts: how many ran.
        tau: tokens committed per verify pass, over all passes of all prompts.
        tau_per_request: the same within each request.
        acceptance: share of verify passes whose first k drafts were all accepted, k = 1..K.
        passes: verify passes.
        tokens: output tokens; the first of each prompt comes from no verify pass.
        tokens_per_second: with the drafter, prompts included; the median of the runs.
        plain_tokens_per_second: of the target alone with the same engine, or None.
        equal: requests whose text equals the target's own, or None.
        repeats: timed runs with the drafter, and without.
        tokens_per_second_range, plain_tokens_per_second_range: of the slowest and of the fastest
            run.
    """

    set_name: str
    prompts: int
    tau: float
    tau_per_request: list[float]
    acceptance: list[float]
    passes: int
    tokens: int
    tokens_per_second: float
    plain_tokens_per_second: float | None = None
    equal: int | None = None
    repeats: int = 1
    tokens_per_second_range: tuple[float, float]
    plain_tokens_per_second_range: tuple[float, float] | None = None

    @property
    def speedup(self) -> float | None:
        """Median tokens/s over those of the target alone; None where that was not run."""
        if self.plain_tokens_per_second is None:
            return None
        return self.tokens_per_second / self.plain_tokens_per_second


def speed_range(tokens: int, seconds: Sequence[float]) -> tuple[float, float]:
    """Tokens/s of the slowest and of the fastest of several runs that each wrote ``tokens``."""
    return tokens / max(seconds), tokens / min(seconds)


def pooled_tau(results: Sequence[Result]) -> float:
    """Tokens committed per verify pass over all results; 0 when there was none."""
    committed = [tokens for result in results for tokens in result.committed]
    return tau(sum(committed), len(committed)) or 0.0


def acceptance_by_position(results: Sequence[Result], num_drafts: int) -> list[float]:
    """Share of verify passes that accepted at least k drafts, for k = 1..num_drafts."""
    accepted = [count for result in results for count in result.accepted]
    return rates(at_least(histogram(accepted, num_drafts)), len(accepted))


def evaluate_set(
    set_name: str,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    engine: Engine,
    plain: Engine | None = None,
    max_new_tokens: int = 256,
    sampling: SamplingParams | None = None,
    on_tokens: OnTokens | None = None,
    repeats: int = 1,
) -> Evaluation:
    """Run prompts with a drafter, and without for comparison.

    Acceptance and texts are those of the first run; the engines then take turns, so that a machine
    that grows busy slows both.

    Args:
        set_name: label of the result.
        prompts: what to ask.
        tokenizer: the target's.
        engine: has a drafter.
        plain: the same target without one, or None to leave the comparison out.
        max_new_tokens: limit of an output.
        sampling: greedy when None; texts are compared only when greedy.
        on_tokens: called with a request's index and its new tokens, as they come.
        repeats: timed runs of each engine. With more than one, a first run of each warms up and is
            not timed.

    Raises:
        DFlashError: ``repeats`` is below 1.
    """
    _check_repeats(repeats)
    requests = [
        Request(encode(tokenizer, p), max_new_tokens, sampling=sampling or SamplingParams())
        for p in prompts
    ]
    engines = [engine] if plain is None else [engine, plain]
    first = [generate_timed(one, requests, on_tokens) for one in engines]
    timed = [[seconds] for _, seconds in first]
    if repeats > 1:
        timed = _take_turns(engines, requests, repeats, on_tokens)
    results = first[0][0]
    tokens = sum(len(result.tokens) for result in results)
    evaluation = Evaluation(
        set_name=set_name,
        prompts=len(prompts),
        tau=pooled_tau(results),
        tau_per_request=[round(result.acceptance_length, 4) for result in results],
        acceptance=acceptance_by_position(results, engine.num_drafts),
        passes=sum(len(result.committed) for result in results),
        tokens=tokens,
        tokens_per_second=tokens / median(timed[0]),
        repeats=repeats,
        tokens_per_second_range=speed_range(tokens, timed[0]),
    )
    if plain is not None:
        alone = first[1][0]
        count = sum(len(result.tokens) for result in alone)
        evaluation.plain_tokens_per_second = count / median(timed[1])
        evaluation.plain_tokens_per_second_range = speed_range(count, timed[1])
        if sampling is None or sampling.temperature == 0:
            pairs = zip(results, alone, strict=True)
            evaluation.equal = sum(ours.tokens == theirs.tokens for ours, theirs in pairs)
    return evaluation


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise DFlashError(f"repeats is {repeats}: give at least 1")


def _take_turns(
    engines: Sequence[Engine],
    requests: Sequence[Request],
    repeats: int,
    on_tokens: OnTokens | None = None,
) -> list[list[float]]:
    """Wall time in seconds of each engine's runs, by engine."""
    rounds = [
        [generate_timed(engine, requests, on_tokens)[1] for engine in engines]
        for _ in range(repeats)
    ]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """One request with and without a drafter.

    Attributes:
        result: with the drafter.
        seconds, plain_seconds: wall time of each repeat, prompt included.
        equal: whether the texts are the same; None when sampled.
    """

    result: Result
    seconds: list[float]
    plain_seconds: list[float]
    equal: bool | None

    @property
    def speedup_range(self) -> list[float]:
        """The smallest and the largest speedup of the pairs of runs that followed each other."""
        pairs = zip(self.seconds, self.plain_seconds, strict=True)
        speedups = [theirs / ours for ours, theirs in pairs]
        return [min(speedups), max(speedups)]

    def facts(self) -> dict[str, Any]:
        """Median speeds, their range and equality, for reports."""
        count = len(self.result.tokens)
        ours, alone = median(self.seconds), median(self.plain_seconds)
        return {
            "tokens_per_second": count / ours,
            "plain_tokens_per_second": count / alone,
            "speedup": alone / ours,
            "speedup_range": self.speedup_range,
            "repeats": len(self.seconds),
            "equal": self.equal,
        }


def compare_runs(engine: Engine, plain: Engine, request: Request, repeats: int) -> Comparison:
    """Run a request with and without a drafter, in turns, after one run of each to warm up.

    Raises:
        DFlashError: ``repeats`` is below 1.
    """
    _check_repeats(repeats)
    result, alone = engine.generate([request])[0], plain.generate([request])[0]
    seconds, plain_seconds = _take_turns([engine, plain], [request], repeats)
    greedy = request.sampling.temperature == 0
    return Comparison(
        result, seconds, plain_seconds, result.tokens == alone.tokens if greedy else None
    )


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """What a figure was measured on: device, dtype, threads and versions."""
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"{_processor()}, {os.cpu_count()} cores"
    return {
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
