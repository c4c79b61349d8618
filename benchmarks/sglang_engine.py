"""One SGLang engine in a process of its own, driven over a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from engine_process import Served, answer, claim_stdout, each, fixed_drafts

FLOAT32 = Path(__file__).parent / "sglang_float32"


def served(
    mode: str, settings: dict[str, Any], speculative: dict[str, Any], log: Path, **environment: str
) -> Served:
    """A child process with one engine.

    Args:
        mode: "none", "native" or "plugin", the last also followed by "-fp8" and by "-adaptive"
            or "-fixed", which turn adaptive verification on and off; "-k5" drafts 5 tokens,
            whatever ``speculative`` says; "-triton" takes that attention back end; "-whole"
            captures passes over prompts as a whole.
        settings: of ``Engine``.
        speculative: more arguments, for all modes but "none".
        log: takes what the child prints.
        environment: added to the child's.
    """
    settings = {**settings, **({} if mode.startswith("none") else speculative)}
    if (drafts := fixed_drafts(mode)) is not None:
        settings["speculative_num_draft_tokens"] = drafts + 1
    environment["DFLASH_PLUGIN"] = "on" if mode.startswith("plugin") else "off"
    if "-fp8" in mode:
        environment["DFLASH_PLUGIN_DRAFT_WEIGHTS"] = "fp8"
    if "-adaptive" in mode or "-fixed" in mode:
        environment["DFLASH_PLUGIN_ADAPTIVE_VERIFICATION"] = str(int("-adaptive" in mode))
    if "-triton" in mode:
        settings["attention_backend"] = "triton"
    if "-whole" in mode:
        settings["cuda_graph_backend_prefill"] = "full"
    if settings["dtype"] == "float32":
        environment.update(in_float32())
    return Served(mode, __file__, settings, environment, log)


def in_float32() -> dict[str, str]:
    """Environment in which SGLang's processes multiply float32 as it is."""
    paths = [str(FLOAT32), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # SGLang's Triton attention would round to TF32.
        "TRITON_F32_DEFAULT": "ieee",
    }


async def generate(
    engine: Any,
    prompts: list[list[int]],
    concurrency: int,
    sampling: list[dict[str, Any]],
    answered: asyncio.Event,
    **request: Any,
) -> list[tuple[dict[str, Any], float]]:
    """Keep ``concurrency`` requests in flight until every prompt is answered.

    The first answer sets ``answered``.

    Returns:
        Each prompt's answer and how many seconds it took from the prompt's sending.
    """
    free = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int], params: dict[str, Any]) -> tuple[dict[str, Any], float]:
        async with free:
            sent = time.perf_counter()
            found = await engine.async_generate(input_ids=prompt, sampling_params=params, **request)
            answered.set()
            return found, time.perf_counter() - sent

    return await asyncio.gather(*map(one, prompts, sampling))


async def traced(
    engine: Any, directory: str, steps: int, answering: Any, answered: asyncio.Event
) -> Any:
    """Answer while a profiler looks at the passes after the first answer, prompts among them."""
    from sglang.srt.managers.io_struct import ProfileReq

    answers = asyncio.ensure_future(answering)
    await answered.wait()
    await engine.tokenizer_manager.start_profile(
        ProfileReq(
            output_dir=directory,
            num_steps=steps,
            activities=["CPU", "GPU"],
            with_stack=False,
            record_shapes=False,
        )
    )
    return await answers


def run(
    engine: Any,
    prompts: list[list[int]],
    concurrency: int,
    sampling: dict[str, Any],
    trace: dict[str, Any] | None = None,
    seeds: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Answer prompts; ``top_logprobs_num`` among the sampling parameters asks for margins.

    ``seeds`` holds the seed of each prompt, by the name of SGLang's parameter. With
    ``trace``, which holds a "directory" and a number of "steps", a profile is left there.
    """
    top = sampling.pop("top_logprobs_num", None)
    request = {}
    if top is not None:
        request |= {"return_logprob": True, "top_logprobs_num": top}
    start = time.perf_counter()
    params = each(sampling, len(prompts), seeds)
    answered = asyncio.Event()
    answering = generate(engine, prompts, concurrency, params, answered, **request)
    if trace is not None:
        answering = traced(engine, answering=answering, answered=answered, **trace)
    answers, latencies = zip(*engine.loop.run_until_complete(answering), strict=True)
    seconds = time.perf_counter() - start
    metas = [one["meta_info"] for one in answers]
    found = {
        "seconds": seconds,
        "latencies": latencies,
        "tokens": [one["output_ids"] for one in answers],
        "tau": acceptance_length(metas),
    }
    if os.environ["DFLASH_PLUGIN"] == "on":
        state = engine.get_server_info()["internal_states"][0].get("dflash_plugin", {})
        if state.get("adaptive") is not None:
            found["adaptive"] = state["adaptive"]
    if top is not None:
        found["margins"] = [
            [round(best[0] - second[0], 6) for best, second in meta["output_top_logprobs"]]
            for meta in metas
        ]
    return found


def acceptance_length(metas: list[dict[str, Any]]) -> float:
    """Tokens committed per verify pass of all requests, those cut off at a limit included."""
    passes = sum(meta.get("spec_verify_ct", 0) for meta in metas)
    accepted = sum(meta.get("spec_num_correct_drafts", 0) for meta in metas)
    return 1 + accepted / passes if passes else 1.0


def attention(engine: Any) -> str:
    """The back end that SGLang picked, or was given."""
    return str(engine.server_args.attention_backend)


def main() -> None:
    pipe = claim_stdout()
    from sglang import Engine

    started = time.perf_counter()
    engine = Engine(**json.loads(sys.argv[1]))
    answer(pipe, started, partial(run, engine), attention=attention(engine))
    engine.shutdown()


if __name__ == "__main__":
    main()
