"""One vLLM engine in a process of its own, driven over a pipe."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from engine_process import Served, answer, claim_stdout, each, fixed_drafts

ADAPTIVE = {"enable_adaptive_verification": True}


def served(
    mode: str, settings: dict[str, Any], drafting: dict[str, Any], log: Path, **environment: str
) -> Served:
    """A child process with one engine.

    Args:
        mode: "none", "native" or "plugin", the latter two also followed by "-adaptive" or "-fp8";
            "-k5" drafts 5 tokens, whatever ``drafting`` says; "-whole" captures all passes as a
            whole, those that read prompts, too.
        settings: of ``LLM``.
        drafting: ``speculative_config``, for all modes but "none".
        log: takes what the child prints.
        environment: added to the child's.
    """
    settings = json.loads(json.dumps(settings))
    if mode != "none":
        settings["speculative_config"] = dict(drafting)
        if (drafts := fixed_drafts(mode)) is not None:
            settings["speculative_config"]["num_speculative_tokens"] = drafts
    if "-adaptive" in mode:
        settings["speculative_config"].update(ADAPTIVE)
    if "-fp8" in mode:
        settings["additional_config"] = {"dflash_plugin": {"draft_weights": "fp8"}}
    if "-whole" in mode:
        settings["compilation_config"] = {"cudagraph_mode": "FULL"}
    environment |= {
        "DFLASH_PLUGIN": "on" if mode.startswith("plugin") else "off",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return Served(mode, __file__, settings, environment, log)


def counters(engine: Any) -> dict[str, float]:
    """vLLM's speculation counters so far."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    names = {
        "passes": "vllm:spec_decode_num_drafts",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
    }
    return {key: found[name].value if name in found else 0 for key, name in names.items()}


# Steps until all prompts of a level are read.
TRACE_AFTER = 20


class Trace:
    """Profiles some steps and writes them down; without a directory, does nothing.

    Args:
        directory: where the trace goes.
        steps: how many of them.
    """

    def __init__(self, directory: str | None = None, steps: int = 0) -> None:
        self.directory, self.last, self.step = directory, TRACE_AFTER + steps, 0
        self.profiler: Any = None

    def advance(self) -> None:
        """Say that a step is done."""
        self.step += 1
        if self.directory is None:
            return
        from torch.profiler import profile

        if self.step == TRACE_AFTER:
            self.profiler = profile()
            self.profiler.start()
        elif self.step == self.last:
            self.profiler.stop()
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(f"{self.directory}/steps.trace.json.gz")


def run(
    engine: Any,
    prompts: list[list[int]],
    concurrency: int,
    sampling: dict[str, Any],
    trace: dict[str, Any] | None = None,
    seeds: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Keep ``concurrency`` requests in flight until every prompt is answered.

    ``seeds`` holds the seed of each prompt, by the name of vLLM's parameter. With
    ``trace``, which holds a "directory" and a number of "steps", a profile is left there.
    """
    from vllm import SamplingParams

    profiled = Trace(**(trace or {}))

    core = engine.llm_engine
    params = [SamplingParams(**one) for one in each(sampling, len(prompts), seeds)]
    waiting = deque(enumerate(prompts))
    outputs: dict[int, Any] = {}
    sent: dict[int, float] = {}
    latencies: dict[int, float] = {}
    before, running = counters(engine), 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and running < concurrency:
            index, prompt = waiting.popleft()
            sent[index] = time.perf_counter()
            core.add_request(f"{index}", {"prompt_token_ids": prompt}, params[index])
            running += 1
        for output in core.step():
            if output.finished:
                index = int(output.request_id.split("-")[0])
                outputs[index] = output.outputs[0]
                latencies[index] = time.perf_counter() - sent[index]
                running -= 1
        profiled.advance()
    seconds = time.perf_counter() - start
    after = counters(engine)
    passes = after["passes"] - before["passes"]
    ordered = [outputs[index] for index in range(len(prompts))]
    found = {
        "seconds": seconds,
        "latencies": [latencies[index] for index in range(len(prompts))],
        "tokens": [list(output.token_ids) for output in ordered],
        "tau": 1 + (after["accepted"] - before["accepted"]) / passes if passes else 1.0,
    }
    if os.environ["DFLASH_PLUGIN"] == "on":
        from dflash_plugin.vllm.adaptive import latest

        if (budget := latest()) is not None:
            found["adaptive"] = budget.summary()
    if sampling.get("logprobs"):
        found["margins"] = [[margin(step) for step in output.logprobs] for output in ordered]
    return found


def margin(step: Any) -> float:
    """Log-probability of the best token less the second best's."""
    best = sorted((entry.logprob for entry in step.values()), reverse=True)
    return round(best[0] - best[1], 6)


def attention(engine: Any) -> str | None:
    """The back ends of the target's and the drafter's attention layers."""
    layers = engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    return ", ".join(sorted(names)) or None


def main() -> None:
    pipe = claim_stdout()
    from vllm import LLM

    started = time.perf_counter()
    engine = LLM(**json.loads(sys.argv[1]))
    answer(pipe, started, partial(run, engine), attention=attention(engine))


if __name__ == "__main__":
    main()
