"""What the serving benchmarks of all engines share: prompts, turns, comparison of texts."""

from __future__ import annotations

import datetime
import json
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_process import Served
from timeline import load, timeline

from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.prompts import encode, load_prompts

TRACES = Path(__file__).parent / "results" / "traces-smollm2-250.safetensors"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def start(engines: Iterable[Served], record: dict[str, Any]) -> list[Served]:
    """The engines that are up; the record says how long that took and which failed.

    Those of a list start together, those of a generator one after the other.
    """
    up, record["startup_seconds"], record["failed"] = [], {}, {}
    for engine in engines:
        try:
            record["startup_seconds"][engine.mode] = round(engine.wait()["startup"], 1)
            up.append(engine)
        except RuntimeError as error:
            record["failed"][engine.mode] = str(error)[-300:]
        print(engine.mode, "up" if engine in up else record["failed"][engine.mode], flush=True)
    return up


def measure(
    engines: list[Served],
    work: dict[int, list[list[int]]],
    sampling: dict[str, Any],
    repeats: int,
    record: dict[str, Any],
    output: Path,
    seconds: float = 0.0,
) -> None:
    """Time the engines in turns and add rows to the record, which is written after each level.

    Args:
        engines: all up; each runs every level once before it is timed.
        work: prompts by requests in flight.
        sampling: the engine's own names.
        repeats: timed runs of each, at least.
        record: holds the circumstances.
        output: a JSON file.
        seconds: for which every level is repeated, at least: few requests at once take less time,
            and their speeds lie further apart.
    """
    record["rows"] = []
    for level, prompts in work.items():
        request = {"prompts": prompts, "concurrency": level, "sampling": sampling}
        for engine in engines:
            engine.ask(**request)
        timed: dict[str, list[dict[str, Any]]] = {engine.mode: [] for engine in engines}
        started, done = time.monotonic(), 0
        while done < repeats or time.monotonic() - started < seconds:
            done += 1
            for engine in engines:
                timed[engine.mode].append(engine.ask(**request))
        for mode, results in timed.items():
            speeds = [sum(map(len, r["tokens"])) / r["seconds"] for r in results]
            row = {
                "engine": mode,
                "concurrency": level,
                "requests": len(prompts),
                "tokens_per_second": round(median(speeds), 1),
                "all": [round(speed, 1) for speed in speeds],
                "tau": round(median(r["tau"] for r in results), 3),
            }
            if "adaptive" in results[-1]:
                row["adaptive"] = results[-1]["adaptive"]
            record["rows"].append(row)
            shown = {key: row[key] for key in row if key not in ("all", "adaptive")}
            print(shown, flush=True)
        output.write_text(json.dumps(record, indent=1) + "\n")


def add_timelines(
    engines: list[Served],
    work: dict[int, list[list[int]]],
    sampling: dict[str, Any],
    record: dict[str, Any],
    output: Path,
    steps: int = 24,
) -> None:
    """Profile decode steps of every engine at every level; the record says where the time went.

    Args:
        engines: all up and warm.
        work: prompts by requests in flight.
        sampling: the engine's own names.
        record: takes "timelines".
        output: a JSON file.
        steps: to look at.
    """
    record["timelines"] = []
    for level, prompts in work.items():
        for engine in engines:
            with tempfile.TemporaryDirectory() as directory:
                trace = {"directory": directory, "steps": steps}
                engine.ask(prompts=prompts, concurrency=level, sampling=sampling, trace=trace)
                found = timeline(load(wait_for_trace(Path(directory))))
            record["timelines"].append({"engine": engine.mode, "concurrency": level, **found})
            print(engine.mode, level, found["milliseconds"], flush=True)
            output.write_text(json.dumps(record, indent=1) + "\n")


def wait_for_trace(directory: Path, seconds: float = 60) -> Path:
    """The one trace in a directory, once it is whole.

    Raises:
        TimeoutError: none came.
    """
    size, until = -1, time.monotonic() + seconds
    while time.monotonic() < until:
        found = sorted(directory.rglob("*.trace.json.gz"))
        if found and found[0].stat().st_size == size > 0:
            return found[0]
        size = found[0].stat().st_size if found else -1
        time.sleep(1)
    raise TimeoutError(f"no trace in {directory} after {seconds:.0f} s")


def check_text(
    engines: list[Served],
    prompts: list[list[int]],
    concurrency: int,
    sampling: dict[str, Any],
    margins: dict[str, Any],
) -> dict[str, Any]:
    """Compare all engines' texts with the first one's.

    Args:
        engines: the first has no drafter.
        prompts: one request each.
        concurrency: requests in flight.
        sampling: the engine's own names.
        margins: added to the first one's sampling, so that its answer holds margins.
    """
    request = {"prompts": prompts, "concurrency": concurrency}
    alone = engines[0].ask(**request, sampling={**sampling, **margins})
    found = {
        engine.mode: compare(alone, engine.ask(**request, sampling=sampling))
        for engine in engines[1:]
    }
    print(found, flush=True)
    return found


def compare(alone: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """How many texts are equal, and by how little the target decided where they part."""
    equal, margins = 0, []
    for number, (plain, drafted) in enumerate(zip(alone["tokens"], ours["tokens"], strict=True)):
        place = first_difference(plain, drafted)
        if place is not None:
            margins.append(alone["margins"][number][place])
        equal += plain == drafted
    return {"equal": equal, "of": len(alone["tokens"]), "margins_where_apart": margins}


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Where two texts part, or None if one begins with the other."""
    places = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(places, None)


def made_up_pair(directory: Path) -> tuple[Path, Path]:
    """Configurations of Qwen3-8B and its z-lab drafter; the weights are drawn by the engine."""
    from dflash_plugin.checkpoints.io import expected_tensors, save_checkpoint

    target = directory / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(QWEN3_8B))
    config = DrafterConfig(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        layers=(LayerAttention(),) * 5,
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=(1, 9, 17, 25, 33),
        num_target_layers=36,
        target_hidden_size=4096,
        vocab_size=151936,
    )
    tensors = {
        name: torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in expected_tensors(config).items()
    }
    return target, save_checkpoint(directory / "drafter", config, tensors)


def real_prompts(directory: Path, data: Path, count: int) -> list[list[int]]:
    """Prompts of all sets in turn, as the target's tokenizer makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    sets = [load_prompts(data / f"{name}.jsonl") for name in SETS]
    mixed = [one[i] for i in range(max(map(len, sets))) for one in sets if i < len(one)]
    return [encode(tokenizer, mixed[i % len(mixed)]) for i in range(count)]


def prompts_by_level(
    levels: Iterable[int],
    per_slot: int,
    shape: str | None,
    directory: Path,
    data: Path,
    together: bool = True,
) -> dict[int, list[list[int]]]:
    """Prompts for each number of requests in flight: 128 random tokens each, or real ones.

    Random ones begin and end ``together``, so that one for each place is enough; otherwise
    ``per_slot`` follow one another.
    """
    if shape is not None:
        waves = 1 if together else per_slot
        return {
            level: torch.randint(1000, 150000, (waves * level, 128)).tolist() for level in levels
        }
    counts = {level: max(per_slot * level, 5) for level in levels}
    prompts = real_prompts(directory, data, max(counts.values()))
    return {level: prompts[:count] for level, count in counts.items()}


def resident_mb(process: int | str = "self") -> float:
    """Memory of a process in MB, now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def circumstances(engine: str, version: str) -> dict[str, Any]:
    """By which command, on what, with which versions and when a result is made."""
    libraries = {name: metadata.version(name) for name in ("torch", "triton")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {engine: version, **libraries},
        "date": datetime.date.today().isoformat(),
    }
