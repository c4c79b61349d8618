"""vLLM without speculation, with its own DFlash, and with this plugin, in turns on one GPU.

With a real pair, texts are compared too:

    python benchmarks/vllm_serving.py --output FILE.json --check

With ``--shape qwen3-8b``, target and drafter are made up (dummy weights) and acceptance is forced,
which compares the engines' overhead only, or, for what adapts to it, replayed from recorded traces
(``benchmarks/acceptance_replay``):

    python benchmarks/vllm_serving.py --output FILE.json --shape qwen3-8b --acceptance 6.4
    python benchmarks/vllm_serving.py --output FILE.json --shape qwen3-8b --replay 6.4
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from acceptance_replay.acceptance_replay import settings as replaying
from serving_common import (
    TRACES,
    add_timelines,
    check_text,
    circumstances,
    made_up_pair,
    measure,
    prompts_by_level,
    real_prompts,
    start,
)
from vllm_engine import served

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.vllm.compat import installed


def main(
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    shape: str | None = None,
    acceptance: float | None = None,
    replay: float | None = None,
    traces: Path = TRACES,
    modes: str = "none,native,native-adaptive,plugin",
    concurrency: str = "1,8,32,64",
    new_tokens: int = 256,
    repeats: int = 5,
    seconds: float = 0.0,
    per_slot: int = 2,
    dtype: str = "bfloat16",
    memory: float = 0.2,
    drafts: int | None = None,
    check: bool = False,
    timelines: bool = False,
    settings: str = "{}",
) -> None:
    """Measure and write one JSON file; ``--timelines`` adds where a decode step's time goes."""
    levels = [int(level) for level in concurrency.split(",")]
    scratch = tempfile.TemporaryDirectory()
    if shape is not None:
        directory, weights = made_up_pair(Path(scratch.name))
    else:
        directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    block = json.loads((weights / "config.json").read_text())["block_size"]
    speculative: dict[str, Any] = {
        "method": "dflash",
        "model": str(weights),
        "num_speculative_tokens": drafts or block - 1,
    }
    if acceptance is not None:
        speculative |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": acceptance,
        }
    environment = {} if replay is None else replaying(traces, block - 1, replay)
    common: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype,
        "max_model_len": 2048,
        "max_num_seqs": max(levels),
        "gpu_memory_utilization": memory,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": speculative,
        **({"load_format": "dummy", "skip_tokenizer_init": True} if shape else {}),
        **json.loads(settings),
    }
    sampling = {"temperature": 0.0, "max_tokens": new_tokens}
    if shape is not None:
        sampling |= {"ignore_eos": True, "detokenize": False}
    record = {
        **circumstances("vllm", installed()),
        "dtype": dtype,
        "repeats": repeats,
        "max_new_tokens": new_tokens,
        "acceptance_forced": acceptance,
        "acceptance_replayed": replay,
        "num_speculative_tokens": speculative["num_speculative_tokens"],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    logs = {mode: output.with_suffix(f".{mode}.log") for mode in modes.split(",")}
    starting = [served(mode, common, log, **environment) for mode, log in logs.items()]
    engines = start(starting, record)
    work = prompts_by_level(levels, per_slot, shape, directory, data, replay is None)
    measure(engines, work, sampling, repeats, record, output, seconds)
    if timelines:
        add_timelines(engines, work, sampling, record, output)
    if check:
        prompts = real_prompts(directory, data, 25)
        record["text"] = check_text(engines, prompts, max(levels), sampling, {"logprobs": 2})
        output.write_text(json.dumps(record, indent=1) + "\n")
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    typer.run(main)
