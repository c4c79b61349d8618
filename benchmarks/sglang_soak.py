"""Random load on SGLang with the plugin, every finished text compared with the target's alone.

Arrivals, prompt and output lengths, aborts, shared prefixes and a cache too small for all requests
(so that some are retracted) are drawn from a seed; what the target alone answers comes from the
Transformers engine:

    python benchmarks/sglang_soak.py --output FILE.json --steps 5000 --minutes 60

``--sampled`` is the share of requests with a temperature, which run in the same batches and are
checked for their length alone. ``--verified-drafts 1,5`` lets adaptive verification choose between
1 and 5 drafts of a request, so that no pass verifies whole blocks. ``--swaps 2`` gives target and
drafter new weights twice on the way, at equal distances: first those of a target that writes other
texts, then the old ones.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from serving_common import Load as EngineLoad
from serving_common import circumstances, real_prompts, resident_mb
from sglang_engine import FLOAT32, acceptance_length, in_float32
from sglang_serving import arguments
from target_alone import TIE, TargetAlone, other_weights

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.sglang.compat import installed

DRAIN_SECONDS = 180
# How often new weights are sent until no request runs.
TRIES = 50


class Log:
    """Counts in the log that the engine's processes write."""

    def __init__(self, path: Path) -> None:
        self.file = path.open()
        self.rest = ""
        self.steps = 0
        self.retracted = 0

    def advance(self) -> int:
        """How many batches were decoded since the last call."""
        lines, _, self.rest = (self.rest + self.file.read()).rpartition("\n")
        steps = lines.count("Decode batch")
        self.steps += steps
        self.retracted += sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", lines))
        return steps


class Load:
    """Requests in flight and what became of the others."""

    def __init__(
        self, engine: Any, log: Log, target: TargetAlone, draw: random.Random, sampled: float
    ) -> None:
        self.engine = engine
        self.log = log
        self.target = target
        self.draw = draw
        self.sampled = sampled
        self.live: dict[str, asyncio.Task[None]] = {}
        self.number = 0
        self.asked_to_stop: set[str] = set()
        self.finished = self.drawn = 0
        self.aborted = 0
        self.wrong: list[dict[str, Any]] = []
        self.ties: list[dict[str, Any]] = []
        self.metas: list[dict[str, Any]] = []

    def begin(self, longest: int) -> None:
        """Send a request."""
        # SGLang aborts every request whose name begins with the given one.
        name = f"soak-{self.number:09}"
        self.number += 1
        index = self.draw.randrange(len(self.target.prompts))
        length = self.draw.randint(1, longest)
        temperature = float(self.draw.random() < self.sampled)
        self.live[name] = asyncio.create_task(self.follow(name, index, length, temperature))

    def abort(self) -> None:
        """Take one back."""
        name = self.draw.choice(list(self.live))
        self.asked_to_stop.add(name)
        self.engine.tokenizer_manager.abort_request(name)

    async def follow(self, name: str, index: int, length: int, temperature: float) -> None:
        """Wait for an answer and judge it."""
        sampling = {"temperature": temperature, "max_new_tokens": length, "ignore_eos": True}
        place = {"step": self.log.steps, "prompt": index}
        try:
            answer = await self.engine.async_generate(
                input_ids=self.target.prompts[index], sampling_params=sampling, rid=name
            )
        except Exception as error:
            self.wrong.append({**place, "error": repr(error)})
            return
        finally:
            del self.live[name]
        got, meta = answer["output_ids"], answer["meta_info"]
        self.metas.append(meta)
        self.drawn += temperature > 0
        apart = self.target.compare(index, got) if temperature == 0 else None
        if apart is not None:
            (self.ties if apart["margin"] < TIE else self.wrong).append({**place, **apart})
        if meta["finish_reason"]["type"] != "abort":
            self.finished += 1
            if len(got) != length:
                self.wrong.append({**place, "length": len(got), "asked": length})
        elif name in self.asked_to_stop:
            self.aborted += 1
        else:
            self.wrong.append({**place, "finish_reason": meta["finish_reason"]})


def scheduler() -> int:
    """The scheduler's process id."""
    for child in multiprocessing.active_children():
        if "sglang::scheduler" in Path(f"/proc/{child.pid}/cmdline").read_text():
            return child.pid
    raise RuntimeError("SGLang's scheduler is not among this process's children")


async def drive(
    load: Load, steps: int, deadline: float, running: int, longest: int, sample_every: int
) -> list[dict[str, float]]:
    """Keep the engine under load up to a step, then let it finish; memory along the way."""
    process, memory, sampled = scheduler(), [], load.log.steps
    while load.log.steps < steps and time.monotonic() < deadline:
        for _ in range(load.log.advance()):
            if len(load.live) < 2 * running and load.draw.random() < 0.3:
                load.begin(longest)
            if load.live and load.draw.random() < 0.02:
                load.abort()
        if not load.live:
            load.begin(longest)
        if load.log.steps >= sampled + sample_every:
            sampled = load.log.steps
            memory.append(used(sampled, process))
            print(sampled, load.finished, load.aborted, len(load.wrong), memory[-1], flush=True)
        await asyncio.sleep(0.01)
    if load.live:
        await asyncio.wait(load.live.values(), timeout=DRAIN_SECONDS)
    load.log.advance()
    memory.append(used(load.log.steps, process))
    return memory


def used(step: int, process: int) -> dict[str, float]:
    """Memory of the scheduler, and of the GPU."""
    found = {"step": step, "resident_mb": resident_mb(process)}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        found["gpu_used_mb"] = (whole - free) / 2**20
    return found


def swap(engine: Any, target: Path, drafter: Path) -> None:
    """Give the engine both models' weights; SGLang drops what the old ones have cached."""
    for path in (target, drafter):
        for _ in range(TRIES):
            done, message, *_ = engine.update_weights_from_disk(str(path))
            if done:
                break
            # A request that was taken back may still run for a step.
            time.sleep(0.2)
        else:
            raise RuntimeError(f"SGLang has refused {path}: {message}")


def main(
    output: Annotated[Path, typer.Option()],
    steps: int = 5000,
    minutes: float = 60,
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    pool: int = 40,
    longest: int = 120,
    running: int = 8,
    tokens: int = 1280,
    seed: int = 0,
    sampled: float = 0.0,
    verified_drafts: str | None = None,
    swaps: int = 0,
    settings: str = "{}",
) -> None:
    """Run the load and write one JSON file; the exit status is 1 if anything was wrong."""
    directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    prompts = real_prompts(directory, data, pool)
    draw = random.Random(seed)
    # A third of the prompts begin with another one, which hits its cached tokens.
    prompts = [
        draw.choice(prompts) + prompt if draw.random() < 1 / 3 else prompt for prompt in prompts
    ]
    scratch = tempfile.TemporaryDirectory()
    directories = [directory]
    if swaps:
        directories.append(other_weights(directory, Path(scratch.name)))
    targets = [TargetAlone(one, prompts, longest) for one in directories]
    print(f"{pool} texts of the target alone", flush=True)

    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(in_float32())
    # The scheduler takes its paths from this process.
    sys.path.insert(0, str(FLOAT32))
    if verified_drafts is not None:
        fewest, most = verified_drafts.split(",")
        os.environ["DFLASH_PLUGIN_ADAPTIVE_VERIFICATION"] = "1"
        os.environ["DFLASH_PLUGIN_MIN_DRAFT_TOKENS"] = fewest
        os.environ["DFLASH_PLUGIN_MAX_DRAFT_TOKENS"] = most
    path = output.with_suffix(".log")
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    import sglang

    # Of SGLang's back ends on a GPU only Triton takes float32; a prompt's parts have 256 tokens.
    on_gpu = {"attention_backend": "triton", "cuda_graph_bs_prefill": [64, 128, 256]}
    engine = sglang.Engine(
        **{
            **arguments(EngineLoad(running, longest, memory=None, is_dummy=False)),
            **(on_gpu if torch.cuda.is_available() else {}),
            "model_path": str(directory),
            "dtype": "float32",
            "context_length": 1024,
            "max_total_tokens": tokens,
            "disable_radix_cache": False,
            "chunked_prefill_size": 256,
            # Admits requests before there is room for all that they will write.
            "schedule_conservativeness": 0.1,
            "decode_log_interval": 1,
            "speculative_algorithm": "DFLASH",
            "speculative_draft_model_path": str(weights),
            **json.loads(settings),
        }
    )
    load = Load(engine, Log(path), targets[0], draw, sampled)
    load.log.advance()
    load.log.steps = load.log.retracted = 0
    begun = time.monotonic()
    memory: list[dict[str, float]] = []
    for part in range(swaps + 1):
        place = part % 2
        load.target = targets[place]
        if part:
            swap(engine, directories[place], weights)
        until = begun + 60 * minutes * (part + 1) / (swaps + 1)
        last = steps * (part + 1) // (swaps + 1)
        memory += engine.loop.run_until_complete(
            drive(load, last, until, running, longest, max(1, steps // 20))
        )
    # Caches and the allocator fill up at first, so growth is judged over the last third.
    early, late = memory[-len(memory) // 3], memory[-1]
    record = {
        **circumstances("sglang", installed()),
        "steps": load.log.steps,
        "seconds": round(time.monotonic() - begun, 1),
        "finished": load.finished,
        "sampled": load.drawn,
        "aborted": load.aborted,
        "unfinished": len(load.live),
        "retracted": load.log.retracted,
        "swaps": swaps,
        "prefix_hits": sum(meta.get("cached_tokens", 0) for meta in load.metas),
        "tau": acceptance_length(load.metas),
        "mismatches": load.wrong,
        "ties": load.ties,
        "growth_mb": {name: round(late[name] - early[name], 1) for name in late if name != "step"},
        "memory": memory,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    print({key: value for key, value in record.items() if key != "memory"}, flush=True)
    engine.shutdown()
    sys.exit(1 if load.wrong or load.live else 0)


if __name__ == "__main__":
    typer.run(main)
