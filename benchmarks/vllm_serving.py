"""vLLM without speculation, with its own DFlash, and with this plugin, in turns on one GPU.

With a real pair, texts are compared too:

    python benchmarks/vllm_serving.py --output FILE.json --check

With ``--shape qwen3-8b``, target and drafter have dummy weights and acceptance is forced, which
compares the engines' overhead only, or, for what adapts to it, replayed from recorded traces
(``benchmarks/acceptance_replay``):

    python benchmarks/vllm_serving.py --output FILE.json --shape qwen3-8b --acceptance 6.4
    python benchmarks/vllm_serving.py --output FILE.json --shape qwen3-8b --replay 6.4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from serving_common import EngineUnderTest, Load, command
from vllm_engine import served

from dflash_plugin.vllm.compat import installed


def arguments(load: Load) -> dict[str, Any]:
    """``LLM``'s arguments of all modes."""
    found: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": load.requests,
        "gpu_memory_utilization": 0.2 if load.memory is None else load.memory,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if load.is_dummy:
        found |= {"load_format": "dummy", "skip_tokenizer_init": True}
    return found


def speculative(drafter: Path, num_drafts: int) -> dict[str, Any]:
    """``speculative_config`` of all modes but "none"."""
    return {"method": "dflash", "model": str(drafter), "num_speculative_tokens": num_drafts}


def forced(acceptance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Configuration and environment that force an acceptance length."""
    return {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": acceptance,
    }, {}


def greedy(tokens: int, is_dummy: bool) -> dict[str, Any]:
    """Sampling parameters; dummy weights have no text and no end."""
    found: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens}
    return {**found, "ignore_eos": True, "detokenize": False} if is_dummy else found


VLLM = EngineUnderTest(
    name="vllm",
    version=installed,
    model=lambda directory: {"model": str(directory)},
    common=arguments,
    speculative=speculative,
    forced=forced,
    sampling=greedy,
    margins={"logprobs": 2},
    served=served,
)


if __name__ == "__main__":
    typer.run(command(VLLM, "none,native,native-k7,native-adaptive,plugin"))
