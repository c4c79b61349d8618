"""SGLang without speculation, with its own DFLASH, and with this plugin, in turns on one GPU.

With a real pair, texts are compared too:

    python benchmarks/sglang_serving.py --output FILE.json --check

With ``--shape qwen3-8b``, target and drafter have dummy weights and acceptance is forced, which
compares the engines' overhead only, or, for what adapts to it, replayed from recorded traces
(``benchmarks/acceptance_replay``):

    python benchmarks/sglang_serving.py --output FILE.json --shape qwen3-8b --acceptance 6.4
    python benchmarks/sglang_serving.py --output FILE.json --shape qwen3-8b --replay 6.4

Every mode runs on the attention back end that SGLang picks, unless the mode names another:
``plugin-adaptive-triton``. SGLang's own DFLASH does not run on a CPU: give ``--modes none,plugin``
there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from serving_common import EngineUnderTest, Load, command
from sglang_engine import served

from dflash_plugin.sglang.compat import installed

# Positions that a request takes beyond its text, as Spec V2 reserves two blocks ahead.
AHEAD = 64


def arguments(load: Load) -> dict[str, Any]:
    """``Engine``'s arguments of all modes: token ids in and out, no more processes than needed."""
    found: dict[str, Any] = {
        "context_length": 2048,
        "max_total_tokens": load.requests * (load.tokens + AHEAD),
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_running_requests": load.requests,
        # An idle engine would otherwise take a core from the one that is measured.
        "sleep_on_idle": True,
        "log_level": "info",
    }
    if load.is_dummy:
        found["load_format"] = "dummy"
    if not torch.cuda.is_available():
        cpu = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
        return {**found, **cpu, "mem_fraction_static": load.memory or 0.3}
    # Part of the sizes that SGLang captures by itself, which take minutes.
    sizes = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
    captured = {size for size in sizes if size < load.requests}
    return {
        **found,
        "cuda_graph_bs_decode": sorted(captured | {load.requests}),
        # Prompts of a shape have 128 tokens.
        "cuda_graph_bs_prefill": [128 * prompts for prompts in (1, 2, 3, 4, 5, 6, 8, 12, 16)],
        # Of what is free when the engine starts; max_total_tokens is the limit that counts.
        "mem_fraction_static": load.memory or 0.95,
    }


def speculative(drafter: Path, num_drafts: int) -> dict[str, Any]:
    """Arguments of all modes but "none"."""
    return {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": str(drafter),
        "speculative_num_draft_tokens": num_drafts + 1,
    }


def forced(acceptance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments and environment that force an acceptance length."""
    return {}, {"SGLANG_SIMULATE_ACC_LEN": str(acceptance)}


def greedy(tokens: int, is_dummy: bool) -> dict[str, Any]:
    """Sampling parameters; dummy weights have no text and no end."""
    return {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": is_dummy}


SGLANG = EngineUnderTest(
    name="sglang",
    version=installed,
    model=lambda directory: {"model_path": str(directory)},
    common=arguments,
    speculative=speculative,
    forced=forced,
    sampling=greedy,
    margins={"top_logprobs_num": 2},
    served=served,
)


if __name__ == "__main__":
    typer.run(command(SGLANG, "none,native,native-k7,plugin"))
