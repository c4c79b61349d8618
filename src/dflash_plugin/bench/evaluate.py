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
        tokens_per_second: with the drafter, prompts included.
        plain_tokens_per_second: of the target alone with the same engine, or None.
        equal: requests whose text equals the target's own, or None.
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


def pooled_tau(results: Sequence[Result]) -> float:
    """Tokens committed per verify pass over all results; 0 when there was none."""
    passes = sum(len(result.committed) for result in results)
    return sum(sum(result.committed) for result in results) / passes if passes else 0.0


def acceptance_by_position(results: Sequence[Result], num_drafts: int) -> list[float]:
    """Share of verify passes that accepted at least k drafts, for k = 1..num_drafts."""
    accepted = [count for result in results for count in result.accepted]
    total = max(1, len(accepted))
    return [sum(count >= k for count in accepted) / total for k in range(1, num_drafts + 1)]


def evaluate_set(
    set_name: str,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    engine: Engine,
    plain: Engine | None = None,
    max_new_tokens: int = 256,
    sampling: SamplingParams | None = None,
    on_tokens: OnTokens | None = None,
) -> Evaluation:
    """Run prompts with a drafter, and without for comparison.

    Args:
        set_name: label of the result.
        prompts: what to ask.
        tokenizer: the target's.
        engine: has a drafter.
        plain: the same target without one, or None to leave the comparison out.
        max_new_tokens: limit of an output.
        sampling: greedy when None; texts are compared only when greedy.
        on_tokens: called with a request's index and its new tokens, as they come.
    """
    requests = [
        Request(encode(tokenizer, p), max_new_tokens, sampling=sampling or SamplingParams())
        for p in prompts
    ]
    results, seconds = generate_timed(engine, requests, on_tokens)
    tokens = sum(len(result.tokens) for result in results)
    evaluation = Evaluation(
        set_name=set_name,
        prompts=len(prompts),
        tau=pooled_tau(results),
        tau_per_request=[round(result.acceptance_length, 4) for result in results],
        acceptance=acceptance_by_position(results, engine.num_drafts),
        passes=sum(len(result.committed) for result in results),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
    )
    if plain is not None:
        alone, seconds = generate_timed(plain, requests, on_tokens)
        count = sum(len(result.tokens) for result in alone)
        evaluation.plain_tokens_per_second = count / seconds
        if sampling is None or sampling.temperature == 0:
            pairs = zip(results, alone, strict=True)
            evaluation.equal = sum(ours.tokens == theirs.tokens for ours, theirs in pairs)
    return evaluation


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

    def facts(self) -> dict[str, Any]:
        """Median speeds and equality, for reports."""
        count = len(self.result.tokens)
        ours, alone = median(self.seconds), median(self.plain_seconds)
        return {
            "tokens_per_second": count / ours,
            "plain_tokens_per_second": count / alone,
            "speedup": alone / ours,
            "repeats": len(self.seconds),
            "equal": self.equal,
        }


def compare_runs(engine: Engine, plain: Engine, request: Request, repeats: int) -> Comparison:
    """Run a request with and without a drafter, in turns, after one run of each to warm up.

    Raises:
        DFlashError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise DFlashError(f"repeats is {repeats}: give at least 1")
    result, alone = engine.generate([request])[0], plain.generate([request])[0]
    timed = [
        (generate_timed(engine, [request])[1], generate_timed(plain, [request])[1])
        for _ in range(repeats)
    ]
    greedy = request.sampling.temperature == 0
    return Comparison(
        result,
        [ours for ours, _ in timed],
        [theirs for _, theirs in timed],
        result.tokens == alone.tokens if greedy else None,
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
