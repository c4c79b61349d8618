"""vLLM without speculation, with its own DFlash, and with this plugin, in turns on one GPU.

With a real pair, texts are compared too:

    python benchmarks/vllm_serving.py --output FILE.json --check

With ``--shape qwen3-8b``, target and drafter are made up (dummy weights) and acceptance is forced,
which compares the engines' overhead only:

    python benchmarks/vllm_serving.py --output FILE.json --shape qwen3-8b --acceptance 6.4
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from vllm_engine import Served

from dflash_plugin.config import DrafterConfig, LayerAttention
from dflash_plugin.fetch import resolve_drafter, resolve_model
from dflash_plugin.prompts import encode, load_prompts

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


def made_up_pair(directory: Path) -> tuple[Path, Path]:
    """Configurations of Qwen3-8B and its z-lab drafter; the weights are drawn by the engine."""
    from dflash_plugin.checkpoint import expected_tensors, save_checkpoint

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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    sets = [load_prompts(data / f"{name}.jsonl") for name in SETS]
    mixed = [one[i] for i in range(max(map(len, sets))) for one in sets if i < len(one)]
    return [encode(tokenizer, mixed[i % len(mixed)]) for i in range(count)]


def compare(alone: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """How many texts are equal, and by how little the target decided where they part."""
    equal, margins = 0, []
    for number, (plain, drafted) in enumerate(zip(alone["tokens"], ours["tokens"], strict=True)):
        apart = [i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b]
        if apart:
            margins.append(alone["margins"][number][apart[0]])
        equal += plain == drafted
    return {"equal": equal, "of": len(alone["tokens"]), "margins_where_apart": margins}


def main(
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    shape: str | None = None,
    acceptance: float | None = None,
    modes: str = "none,native,native-adaptive,plugin",
    concurrency: str = "1,8,32,64",
    new_tokens: int = 256,
    repeats: int = 5,
    per_slot: int = 2,
    dtype: str = "bfloat16",
    memory: float = 0.2,
    drafts: int | None = None,
    check: bool = False,
    settings: str = "{}",
) -> None:
    """Measure and write one JSON file."""
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
    output.parent.mkdir(parents=True, exist_ok=True)
    engines = [
        Served(mode, common, output.with_suffix(f".{mode}.log")) for mode in modes.split(",")
    ]
    startup, failed = {}, {}
    for engine in engines:
        try:
            startup[engine.mode] = round(engine.wait()["startup"], 1)
        except RuntimeError as error:
            failed[engine.mode] = str(error)[-300:]
    engines = [engine for engine in engines if engine.mode in startup]
    print("startup", startup, "failed", failed, flush=True)
    sampling = {"temperature": 0.0, "max_tokens": new_tokens}
    if shape is not None:
        sampling |= {"ignore_eos": True, "detokenize": False}
    record = {
        **circumstances(),
        "dtype": dtype,
        "repeats": repeats,
        "max_new_tokens": new_tokens,
        "acceptance_forced": acceptance,
        "num_speculative_tokens": speculative["num_speculative_tokens"],
        "startup_seconds": startup,
        "failed": failed,
        "rows": [],
    }
    for level in levels:
        count = max(per_slot * level, 5) if shape is None else level
        if shape is None:
            prompts = real_prompts(directory, data, count)
        else:
            prompts = torch.randint(1000, 150000, (count, 128)).tolist()
        work = {"prompts": prompts, "concurrency": level, "sampling": sampling}
        for engine in engines:
            engine.ask(**work)
        timed: dict[str, list[dict[str, Any]]] = {engine.mode: [] for engine in engines}
        for _ in range(repeats):
            for engine in engines:
                timed[engine.mode].append(engine.ask(**work))
        for mode, results in timed.items():
            speeds = [sum(map(len, r["tokens"])) / r["seconds"] for r in results]
            record["rows"].append(
                {
                    "engine": mode,
                    "concurrency": level,
                    "requests": count,
                    "tokens_per_second": round(median(speeds), 1),
                    "all": [round(speed, 1) for speed in speeds],
                    "tau": round(results[-1]["tau"], 3),
                }
            )
            print({k: v for k, v in record["rows"][-1].items() if k != "all"}, flush=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    if check:
        prompts = real_prompts(directory, data, 25)
        work = {"prompts": prompts, "concurrency": max(levels)}
        alone = engines[0].ask(**work, sampling={**sampling, "logprobs": 2})
        record["text"] = {
            engine.mode: compare(alone, engine.ask(**work, sampling=sampling))
            for engine in engines[1:]
        }
        print(record["text"], flush=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for engine in engines:
        engine.close()


def circumstances() -> dict[str, Any]:
    """By which command, on what, with which versions and when a result is made."""
    from importlib.metadata import version

    from dflash_plugin.vllm.compat import installed

    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"vllm": installed(), **{name: version(name) for name in ("torch", "triton")}},
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    typer.run(main)
