"""The serving benchmark of both engines: options, prompts, turns, comparison of texts."""

from __future__ import annotations

import datetime
import json
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from acceptance_replay.acceptance_replay import settings as replaying
from engine_process import Served
from timeline import load, timeline

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.prompts import encode, load_prompts

TRACES = Path(__file__).parent / "results" / "traces-smollm2-250.safetensors"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")


class Shape(NamedTuple):
    """A target and a drafter without trained weights.

    Attributes:
        target: entries of the target's ``config.json``.
        windows: of the drafter's layers; None is full attention.
        target_layer_ids: layers whose outputs the drafter reads.
        block_size: anchor and drafts.
        prompt_tokens: of every prompt.
        heads: the drafter's own numbers and width of heads; None, as all other sizes, are the
            target's.
    """

    target: dict[str, Any]
    windows: tuple[int | None, ...]
    target_layer_ids: tuple[int, ...]
    block_size: int
    prompt_tokens: int
    heads: dict[str, int] | None = None


_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
_QWEN3_8B = Shape(
    target={
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    },
    windows=(None,) * 5,
    target_layer_ids=(1, 9, 17, 25, 33),
    block_size=16,
    prompt_tokens=128,
)
SHAPES = {
    # Qwen3-8B and its z-lab drafter.
    "qwen3-8b": _QWEN3_8B,
    # The same target and a drafter of whose layers most have windows.
    "qwen3-8b-windows": _QWEN3_8B._replace(windows=(2048,) * 4 + (None,)),
    # Qwen3.5-9B, three of four layers recurrent, and a drafter with heads of its own.
    "qwen3.5-9b": Shape(
        target={
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
            "full_attention_interval": 4,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
            },
            "tie_word_embeddings": False,
            "vocab_size": 248320,
            "max_position_embeddings": 32768,
            "torch_dtype": "bfloat16",
        },
        windows=(4096,) * 5 + (None,),
        target_layer_ids=(1, 7, 13, 19, 25, 30),
        block_size=16,
        prompt_tokens=128,
        heads={"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    # Small enough for a test on a CPU.
    "tiny": Shape(
        target={
            **_QWEN3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 2048,
            "max_position_embeddings": 2048,
            "torch_dtype": "float32",
        },
        windows=(None, None),
        target_layer_ids=(0, 2),
        block_size=8,
        prompt_tokens=16,
    ),
}


class EngineUnderTest(NamedTuple):
    """What the two engines do differently.

    Attributes:
        name: the engine's distribution.
        version: the installed version.
        model: the argument that names the target's directory.
        speculative: speculation arguments, of the drafter's directory and the number of drafts.
        common: engine arguments of all modes, of a ``Load``.
        forced: speculation arguments and environment that force an acceptance length.
        sampling: the engine's names for greedy sampling, of the number of tokens and whether
            weights are dummies.
        margins: added to ``sampling``, so that answers hold the target's margins.
        served: a child process of a mode, of common and speculative arguments, log and environment.
    """

    name: str
    version: Callable[[], str]
    model: Callable[[Path], dict[str, str]]
    speculative: Callable[[Path, int], dict[str, Any]]
    common: Callable[[Load], dict[str, Any]]
    forced: Callable[[float], tuple[dict[str, Any], dict[str, str]]]
    sampling: Callable[[int, bool], dict[str, Any]]
    margins: dict[str, Any]
    served: Callable[..., Served]


class Load(NamedTuple):
    """What the engines are to carry.

    Attributes:
        requests: in flight, at most.
        tokens: of prompt and output of a request, at most.
        memory: share of the GPU's memory that one engine takes; None leaves it to the engine.
        is_dummy: weights are drawn by the engine.
    """

    requests: int
    tokens: int
    memory: float | None
    is_dummy: bool


def command(engine: EngineUnderTest, default_modes: str) -> Callable[..., None]:
    """The benchmark of one engine as a command line."""

    def main(
        output: Annotated[Path, typer.Option()],
        target: str = "smollm2",
        drafter: Path | None = None,
        data: Path = Path("tests/data"),
        shape: str | None = None,
        acceptance: float | None = None,
        replay: str | None = None,
        traces: Path = TRACES,
        modes: str = default_modes,
        concurrency: str = "1,8,32,64",
        new_tokens: int = 256,
        repeats: int = 5,
        seconds: float = 0.0,
        per_slot: int = 2,
        max_requests: int | None = None,
        dtype: str = "bfloat16",
        memory: float | None = None,
        drafts: int | None = None,
        check: bool = False,
        timelines: bool = False,
        timeline_levels: str | None = None,
        together: bool = False,
        settings: str = "{}",
        sampling: str = "{}",
    ) -> None:
        """Measure and write one JSON file.

        ``--modes`` lists engines that are up together and measured in turns; a semicolon ends one
        such group, whose engines make room for the next. A mode of two groups shows how far their
        rows compare.

        ``--shape`` takes dummy weights: qwen3-8b, qwen3-8b-windows, qwen3.5-9b (in vLLM with
        ``--settings '{"additional_config": {"gdn_prefill_backend": "triton"}}'``, unless FlashInfer
        is there), or tiny for a test.

        ``--timelines`` adds where the time of a decode step goes, at all levels or at those of
        ``--timeline-levels``.

        ``--together`` starts the engines at once, which is faster but needs more free memory while
        they load.

        ``--per-slot`` is how many requests follow one another in flight, where the level times it
        is not above ``--max-requests``.

        ``--memory`` is the share of the GPU that each engine takes.

        ``--sampling`` holds sampling parameters in place of greedy ones, by the engine's names:
        ``'{"temperature": 0.6, "top_p": 0.95, "top_k": 20}'``.

        ``--replay`` may be several numbers with commas between: the result of the first is
        FILE.json, that of another FILE-NUMBER.json. Engines without a drafter stand in the first.
        """
        if check and shape is not None:
            raise typer.BadParameter("dummy weights have no texts to compare: leave out --check")
        drawn = json.loads(sampling)
        if drawn and (check or replay or acceptance):
            raise typer.BadParameter(
                "texts that are drawn have their own acceptance, and differ: leave out --sampling, "
                "or --check, --replay and --acceptance"
            )
        if shape is not None and shape not in SHAPES:
            raise typer.BadParameter(f"--shape is {shape!r}: one of {', '.join(SHAPES)}")
        levels = [int(level) for level in concurrency.split(",")]
        scratch = tempfile.TemporaryDirectory()
        if shape is not None:
            directory, weights = dummy_pair(SHAPES[shape], Path(scratch.name))
        else:
            directory, weights = resolve_model(target), resolve_drafter(drafter, target)
        num_drafts = drafts or json.loads((weights / "config.json").read_text())["block_size"] - 1
        taus = [float(tau) for tau in replay.split(",")] if replay is not None else []
        counts = requests_by_level(levels, per_slot, max_requests)
        work = prompts_by_level(counts, shape, directory, data, replay is None)
        checked = real_prompts(directory, data, 25) if check else []
        longest = max(len(prompt) for prompts in [*work.values(), checked] for prompt in prompts)
        load = Load(max(levels), longest + new_tokens, memory, shape is not None)
        arguments = {**engine.common(load), "dtype": dtype, **json.loads(settings)}
        speculative, environment = engine.speculative(weights, num_drafts), {}
        if acceptance is not None:
            forced, environment = engine.forced(acceptance)
            speculative |= forced
        if replay is not None:
            environment = replaying(traces, num_drafts, taus)
        params = {**engine.sampling(new_tokens, shape is not None), **drawn}
        record = {
            **circumstances(engine.name, engine.version()),
            "dtype": dtype,
            "repeats": repeats,
            "max_new_tokens": new_tokens,
            "acceptance_forced": acceptance,
            "acceptance_replayed": taus[0] if taus else None,
            "num_speculative_tokens": num_drafts,
            "engine_arguments": arguments,
            "sampling": drawn,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        record |= {"startup_seconds": {}, "gpu_gib": {}, "attention": {}, "failed": {}, "rows": []}
        runs = [(work, record, output)]
        if len(taus) > 1:
            runs = [
                (
                    {level: [[place, *p[1:]] for p in given] for level, given in work.items()},
                    {**record, "acceptance_replayed": tau, "rows": []} if place else record,
                    output.with_stem(f"{output.stem}-{tau}") if place else output,
                )
                for place, tau in enumerate(taus)
            ]
        for number, group in enumerate(modes.split(";")):
            starting = (
                engine.served(
                    mode,
                    {**arguments, **engine.model(directory)},
                    speculative,
                    output.with_suffix(f".{number}.{mode}.log"),
                    **environment,
                )
                for mode in group.split(",")
            )
            engines = start(list(starting) if together else starting, record)
            try:
                for place, (prompts, made, path) in enumerate(runs):
                    # Without a drafter, acceptance makes no difference: measured once.
                    timed = [e for e in engines if not (place and e.mode.startswith("none"))]
                    if timed:
                        measure(timed, prompts, params, repeats, made, path, seconds, number)
                if timelines:
                    wanted = [int(n) for n in (timeline_levels or concurrency).split(",")]
                    some = {level: work[level] for level in wanted}
                    add_timelines(engines, some, params, record, output)
                if check:
                    record["text"] = check_text(
                        engines, checked, max(levels), params, engine.margins
                    )
                    output.write_text(json.dumps(record, indent=1) + "\n")
            finally:
                for child in engines:
                    child.close()

    return main


def start(engines: Iterable[Served], record: dict[str, Any]) -> list[Served]:
    """The engines that started; the record says how long each took, the GPU memory that was gone
    afterwards, its attention back end, and which failed.

    Those of a list start together, and their memory is not told apart; those of a generator one
    after the other.
    """
    up: list[Served] = []
    for engine in engines:
        before = free_gib()
        try:
            started = engine.wait()
            if before is not None and not isinstance(engines, list):
                record["gpu_gib"][engine.mode] = round(before - (free_gib() or 0.0), 2)
            record["startup_seconds"][engine.mode] = round(started["startup"], 1)
            record["attention"][engine.mode] = started.get("attention")
            up.append(engine)
        except RuntimeError as error:
            record["failed"][engine.mode] = str(error)[-300:]
        print(engine.mode, "up" if engine in up else record["failed"][engine.mode], flush=True)
    return up


def free_gib() -> float | None:
    """Free memory of the GPU, or None without one."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def measure(
    engines: list[Served],
    work: dict[int, list[list[int]]],
    sampling: dict[str, Any],
    repeats: int,
    record: dict[str, Any],
    output: Path,
    seconds: float = 0.0,
    group: int = 0,
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
        group: number of the engines that are up together.
    """
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
            latencies = sorted(seconds for r in results for seconds in r["latencies"])
            row = {
                "engine": mode,
                "group": group,
                "concurrency": level,
                "requests": len(prompts),
                "tokens_per_second": round(median(speeds), 1),
                "all": [round(speed, 1) for speed in speeds],
                "tau": round(median(r["tau"] for r in results), 3),
                "request_seconds": {
                    "median": round(median(latencies), 4),
                    "95 %": round(latencies[int(0.95 * len(latencies))], 4),
                },
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
    record.setdefault("timelines", [])
    for level, prompts in work.items():
        for engine in engines:
            with tempfile.TemporaryDirectory() as directory:
                trace = {"directory": directory, "steps": steps}
                engine.ask(prompts=prompts, concurrency=level, sampling=sampling, trace=trace)
                found = timeline(load(wait_for_trace(Path(directory))))
            record["timelines"].append({"engine": engine.mode, "concurrency": level, **found})
            print(engine.mode, level, found["milliseconds"], found.get("with_prompts"), flush=True)
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


def dummy_pair(shape: Shape, directory: Path) -> tuple[Path, Path]:
    """Directories of a target without weights and of a drafter of zeros; the engine draws both."""
    from dflash_plugin.checkpoints.io import expected_tensors, save_checkpoint

    target = directory / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(shape.target))
    config = drafter_of(shape)
    dtype = getattr(torch, shape.target["torch_dtype"])
    tensors = {
        name: torch.zeros(size, dtype=dtype) for name, size in expected_tensors(config).items()
    }
    return target, save_checkpoint(directory / "drafter", config, tensors)


def drafter_of(shape: Shape) -> DrafterConfig:
    """The drafter's configuration."""
    sizes = {**shape.target, **(shape.heads or {})}
    return DrafterConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        layers=tuple(LayerAttention(sliding_window=window) for window in shape.windows),
        block_size=shape.block_size,
        mask_token_id=sizes["vocab_size"] - 267,
        target_layer_ids=shape.target_layer_ids,
        num_target_layers=sizes["num_hidden_layers"],
        target_hidden_size=sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
    )


def real_prompts(directory: Path, data: Path, count: int) -> list[list[int]]:
    """Prompts of all sets in turn, as the target's tokenizer makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    sets = [load_prompts(data / f"{name}.jsonl") for name in SETS]
    mixed = [one[i] for i in range(max(map(len, sets))) for one in sets if i < len(one)]
    return [encode(tokenizer, mixed[i % len(mixed)]) for i in range(count)]


def requests_by_level(
    levels: Iterable[int], per_slot: int, most: int | None = None
) -> dict[int, int]:
    """Requests of a run for each number in flight: ``per_slot`` times as many, or ``most``."""
    return {
        level: per_slot * level if most is None else max(level, min(per_slot * level, most))
        for level in levels
    }


def prompts_by_level(
    counts: dict[int, int],
    shape: str | None,
    directory: Path,
    data: Path,
    together: bool = True,
) -> dict[int, list[list[int]]]:
    """Prompts for each number of requests in flight: random tokens for a shape, or real ones.

    Random prompts begin and end ``together``, so that one for each request in flight is enough;
    otherwise all ``counts`` of a level follow one another.
    """
    if shape is not None:
        sizes = SHAPES[shape]
        last, length = sizes.target["vocab_size"] - 1936, sizes.prompt_tokens
        return {
            level: torch.randint(last // 150, last, (level if together else count, length)).tolist()
            for level, count in counts.items()
        }
    counts = {level: max(count, 5) for level, count in counts.items()}
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
