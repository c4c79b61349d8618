"""Random load on vLLM with the plugin, every finished text compared with the target's alone.

Arrivals, prompt and output lengths, aborts, shared prefixes and a cache too small for all requests
(so that some are preempted) are drawn from a seed; what the target alone answers comes from the
Transformers engine:

    python benchmarks/vllm_soak.py --output FILE.json --steps 5000

``--swaps 2`` gives target and drafter new weights twice on the way, at equal distances: first those
of a target that writes other texts, then the old ones.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from serving_common import circumstances, real_prompts, resident_mb
from target_alone import TIE, TargetAlone, other_weights
from vllm_engine import counters

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.vllm.compat import installed


class Load:
    """Requests in flight and what became of the others.

    Args:
        engine: the ``LLM``.
        draw: decides all that is random.
        longest: tokens of a text, at most.
        running: requests in the engine at once.
        sample_every: steps between two looks at the memory.
    """

    def __init__(
        self, engine: Any, draw: random.Random, longest: int, running: int, sample_every: int
    ) -> None:
        self.engine, self.core = engine, engine.llm_engine
        self.draw, self.longest, self.running = draw, longest, running
        self.sample_every = sample_every
        self.live: dict[str, tuple[int, int]] = {}
        self.number = self.step = self.finished = self.aborted = 0
        self.wrong: list[dict[str, Any]] = []
        self.ties: list[dict[str, Any]] = []
        self.memory: list[dict[str, float]] = []

    def run(self, target: TargetAlone, last: int) -> None:
        """Keep the engine under load up to a step, then let it finish."""
        while self.step < last or self.live:
            while (
                self.step < last and len(self.live) < 2 * self.running and self.draw.random() < 0.3
            ):
                self.begin(target.prompts)
            if not self.live:
                continue
            for result in self.core.step():
                self.judge(target, result)
            self.step += 1
            if self.live and self.draw.random() < 0.02:
                self.abort(self.draw.choice(list(self.live)))
            if self.step % self.sample_every == 0:
                self.look()

    def begin(self, prompts: list[list[int]]) -> None:
        """Send a request."""
        from vllm import SamplingParams

        index, length = self.draw.randrange(len(prompts)), self.draw.randint(1, self.longest)
        name = f"{self.number}"
        self.number += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        self.core.add_request(name, {"prompt_token_ids": prompts[index]}, sampling)
        self.live[name] = (index, length)

    def abort(self, name: str) -> None:
        """Take one back."""
        self.core.abort_request([name])
        self.aborted += 1
        del self.live[name]

    def judge(self, target: TargetAlone, result: Any) -> None:
        """Compare what there is of a text; one that parts ends."""
        name = result.request_id.split("-")[0]
        index, length = self.live[name]
        got = list(result.outputs[0].token_ids)
        apart = target.compare(index, got)
        if apart is not None:
            kind = self.ties if apart["margin"] < TIE else self.wrong
            kind.append({"step": self.step, **apart})
            self.core.abort_request([result.request_id])
            del self.live[name]
        elif result.finished:
            self.finished += 1
            if len(got) != length:
                self.wrong.append({"step": self.step, "prompt": index, "length": len(got)})
            del self.live[name]

    def look(self) -> None:
        """Note the memory of this process and of the GPU."""
        gpu = torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
        self.memory.append({"step": self.step, "resident_mb": resident_mb(), "gpu_mb": gpu})
        counts = (self.finished, self.aborted, len(self.wrong))
        print(self.step, *counts, self.memory[-1], flush=True)


def swap(engine: Any, target: Path, drafter: Path) -> None:
    """Give the engine both models' weights, and drop what the old ones have cached."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(target)})
    engine.collective_rpc("reload_draft_weights", args=(str(drafter),))
    if not engine.reset_prefix_cache():
        raise RuntimeError("vLLM has kept its prefix cache")


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
    swaps: int = 0,
    seed: int = 0,
    settings: str = "{}",
) -> None:
    """Run the load and write one JSON file; the exit status is 1 if anything was wrong."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # On a GPU, Triton's attention would round float32 to TF32.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    prompts = real_prompts(directory, data, pool)
    draw = random.Random(seed)
    # A third of the prompts begin with another one, which hits its cached blocks.
    prompts = [
        draw.choice(prompts) + prompt if draw.random() < 1 / 3 else prompt for prompt in prompts
    ]
    scratch = tempfile.TemporaryDirectory()
    directories = [directory]
    if swaps:
        directories.append(other_weights(directory, Path(scratch.name)))
    targets = [TargetAlone(one, prompts, longest) for one in directories]

    from vllm import LLM

    engine = LLM(
        **{
            "model": str(directory),
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": running,
            "max_num_batched_tokens": 256,
            "disable_log_stats": False,
            "block_size": 32,
            "num_gpu_blocks_override": blocks,
            "speculative_config": {"method": "dflash", "model": str(weights)},
            **json.loads(settings),
        }
    )
    load = Load(engine, draw, longest, running, max(1, steps // 20))
    start = time.perf_counter()
    for part in range(swaps + 1):
        place = part % 2
        if part:
            swap(engine, directories[place], weights)
        load.run(targets[place], steps * (part + 1) // (swaps + 1))
    found = {metric.name: metric for metric in engine.get_metrics()}
    count = counters(engine)
    # Caches and the allocator fill up at first, so growth is judged over the last third.
    early, late = load.memory[-len(load.memory) // 3], load.memory[-1]
    record = {
        **circumstances("vllm", installed()),
        "steps": load.step,
        "seconds": round(time.perf_counter() - start, 1),
        "finished": load.finished,
        "aborted": load.aborted,
        "preempted": found["vllm:num_preemptions"].value,
        "prefix_hits": found["vllm:prefix_cache_hits"].value,
        "swaps": swaps,
        "tau": 1 + count["accepted"] / count["passes"],
        "mismatches": load.wrong,
        "ties": load.ties,
        "growth_mb": {key: round(late[key] - early[key], 1) for key in ("resident_mb", "gpu_mb")},
        "memory": load.memory,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print({key: value for key, value in record.items() if key != "memory"})
    sys.exit(1 if load.wrong else 0)


if __name__ == "__main__":
    typer.run(main)
