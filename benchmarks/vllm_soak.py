"""Random load on vLLM with the plugin, every finished text compared with the target's alone.

Arrivals, prompt and output lengths, aborts, shared prefixes and a cache too small for all requests
(so that some are preempted) are drawn from a seed:

    python benchmarks/vllm_soak.py --output FILE.json --steps 5000
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from serving_common import circumstances, first_difference, real_prompts, resident_mb
from vllm_engine import counters, served

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.vllm.compat import installed


def main(
    output: Annotated[Path, typer.Option()],
    steps: int = 5000,
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    pool: int = 40,
    longest: int = 120,
    running: int = 8,
    blocks: int = 40,
    seed: int = 0,
    settings: str = "{}",
) -> None:
    """Run the load and write one JSON file; the exit status is 1 if anything was wrong."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    prompts = real_prompts(directory, data, pool)
    draw = random.Random(seed)
    # A third of the prompts begin with another one, which hits its cached blocks.
    prompts = [
        draw.choice(prompts) + prompt if draw.random() < 1 / 3 else prompt for prompt in prompts
    ]
    common: dict[str, Any] = {
        "model": str(directory),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": running,
        "max_num_batched_tokens": 256,
        "disable_log_stats": False,
        "block_size": 32,
        **json.loads(settings),
    }
    alone = served("none", common, {}, output.with_suffix(".none.log"))
    alone.wait()
    expected = alone.ask(
        prompts=prompts,
        concurrency=running,
        sampling={"temperature": 0.0, "max_tokens": longest, "ignore_eos": True, "logprobs": 2},
    )
    alone.close()

    from vllm import LLM, SamplingParams

    engine = LLM(
        **common,
        num_gpu_blocks_override=blocks,
        speculative_config={"method": "dflash", "model": str(weights)},
    )
    core = engine.llm_engine
    live: dict[str, tuple[int, int]] = {}
    done, aborted, wrong, ties, number, step = 0, 0, [], [], 0, 0
    memory: list[dict[str, float]] = []
    start = time.perf_counter()
    while step < steps or live:
        while step < steps and len(live) < 2 * running and draw.random() < 0.3:
            index, length = draw.randrange(pool), draw.randint(1, longest)
            name = f"{number}"
            core.add_request(
                name,
                {"prompt_token_ids": prompts[index]},
                SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True),
            )
            live[name] = (index, length)
            number += 1
        if not live:
            continue
        outputs = core.step()
        step += 1
        for result in outputs:
            name = result.request_id.split("-")[0]
            index, length = live[name]
            got = list(result.outputs[0].token_ids)
            want = expected["tokens"][index][: len(got)]
            if got != want:
                apart = first_difference(got, want)
                margin = expected["margins"][index][apart]
                (ties if margin < 1e-4 else wrong).append(
                    {"step": step, "prompt": index, "at": apart, "margin": margin}
                )
                core.abort_request([result.request_id])
                del live[name]
            elif result.finished:
                done += 1
                if len(got) != length:
                    wrong.append({"step": step, "prompt": index, "length": len(got)})
                del live[name]
        if live and draw.random() < 0.02:
            name = draw.choice(list(live))
            core.abort_request([name])
            aborted += 1
            del live[name]
        if step % max(1, steps // 20) == 0:
            gpu = torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
            memory.append({"step": step, "resident_mb": resident_mb(), "gpu_mb": gpu})
            print(step, done, aborted, len(wrong), memory[-1], flush=True)
    found = {metric.name: metric for metric in engine.get_metrics()}
    count = counters(engine)
    # Caches and the allocator fill up at first, so growth is judged over the last third.
    early, late = memory[-len(memory) // 3], memory[-1]
    record = {
        **circumstances("vllm", installed()),
        "steps": step,
        "seconds": round(time.perf_counter() - start, 1),
        "finished": done,
        "aborted": aborted,
        "preempted": found["vllm:num_preemptions"].value,
        "prefix_hits": found["vllm:prefix_cache_hits"].value,
        "tau": 1 + count["accepted"] / count["passes"],
        "mismatches": wrong,
        "ties": ties,
        "growth_mb": {key: round(late[key] - early[key], 1) for key in ("resident_mb", "gpu_mb")},
        "memory": memory,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print({key: value for key, value in record.items() if key != "memory"})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
