"""SGLang without speculation, with its own DFLASH, and with this plugin, in turns on one GPU.

With a real pair, texts are compared too:

    python benchmarks/sglang_serving.py --output FILE.json --check

With ``--shape qwen3-8b``, target and drafter are made up (dummy weights) and acceptance is forced,
which compares the engines' overhead only, or, for what adapts to it, replayed from recorded traces
(``benchmarks/acceptance_replay``):

    python benchmarks/sglang_serving.py --output FILE.json --shape qwen3-8b --acceptance 6.4
    python benchmarks/sglang_serving.py --output FILE.json --shape qwen3-8b --replay 6.4

SGLang's own DFLASH does not run on a CPU: give ``--modes none,plugin`` there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
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
from sglang_engine import arguments, served

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.sglang.compat import installed

# Positions that a request takes beyond its text, as Spec V2 reserves two blocks ahead.
AHEAD = 64


def main(
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    shape: str | None = None,
    acceptance: float | None = None,
    replay: float | None = None,
    traces: Path = TRACES,
    modes: str = "none,native,plugin",
    concurrency: str = "1,8,32,64",
    new_tokens: int = 256,
    repeats: int = 5,
    seconds: float = 0.0,
    per_slot: int = 2,
    dtype: str = "bfloat16",
    drafts: int | None = None,
    check: bool = False,
    timelines: bool = False,
    together: bool = False,
    settings: str = "{}",
) -> None:
    """Measure and write one JSON file.

    ``--timelines`` adds where the time of a decode step goes.

    ``--together`` starts the engines at once, which is faster but needs more free memory while they
    load: each sizes its cache by what the others have left.
    """
    if check and shape is not None:
        raise typer.BadParameter("made-up weights have no texts to compare: leave out --check")
    levels = [int(level) for level in concurrency.split(",")]
    scratch = tempfile.TemporaryDirectory()
    if shape is not None:
        directory, weights = made_up_pair(Path(scratch.name))
    else:
        directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    block = json.loads((weights / "config.json").read_text())["block_size"]
    work = prompts_by_level(levels, per_slot, shape, directory, data, replay is None)
    checked = real_prompts(directory, data, 25) if check else []
    longest = max(len(prompt) for prompts in [*work.values(), checked] for prompt in prompts)
    common: dict[str, Any] = {
        "model_path": str(directory),
        "dtype": dtype,
        "context_length": 2048,
        "max_total_tokens": max(levels) * (longest + new_tokens + AHEAD),
        "disable_radix_cache": True,
        **arguments(torch.cuda.is_available(), max(levels)),
        **({"load_format": "dummy"} if shape else {}),
        **json.loads(settings),
    }
    speculative = {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": str(weights),
        "speculative_num_draft_tokens": drafts + 1 if drafts else block,
    }
    environment = {} if acceptance is None else {"SGLANG_SIMULATE_ACC_LEN": str(acceptance)}
    if replay is not None:
        environment = replaying(traces, block - 1, replay)
    # Real texts end where they do: requests that all end at once read their prompts at once.
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": shape is not None}
    record = {
        **circumstances("sglang", installed()),
        "dtype": dtype,
        "repeats": repeats,
        "max_new_tokens": new_tokens,
        "acceptance_forced": acceptance,
        "acceptance_replayed": replay,
        "num_speculative_tokens": speculative["speculative_num_draft_tokens"] - 1,
        "engine_arguments": {key: common[key] for key in common if key != "model_path"},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    starting = (
        served(mode, common, speculative, output.with_suffix(f".{mode}.log"), **environment)
        for mode in modes.split(",")
    )
    engines = start(list(starting) if together else starting, record)
    measure(engines, work, sampling, repeats, record, output, seconds)
    if timelines:
        add_timelines(engines, work, sampling, record, output)
    if check:
        margins = {"top_logprobs_num": 2}
        record["text"] = check_text(engines, checked, max(levels), sampling, margins)
        output.write_text(json.dumps(record, indent=1) + "\n")
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    typer.run(main)
