"""What SGLang on a CPU does with each family of targets, for ``tools/targets.py`` and a test."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.transformers.loading import load_drafter
from tests.helpers.core_drafts import core_drafts
from tests.helpers.families import FAMILIES, NEW_TOKENS, Family, own_texts, prompts
from tests.helpers.tiny import tiny_target, write_target, write_tiny
from tests.on_sglang.schedulers import Schedulers, settings_of

COLUMN = "sglang"
# SGLang does not run the attention of these on a CPU.
ON_ANY_BACK_END = ("Gemma 4", "gpt-oss", "DeepSeek V2", "DeepSeek V3, Kimi K2")
# Gated delta rules run in torch (``delta_rule``), without a prefix cache. Qwen3.5-MoE is left out:
# without a drafter, SGLang's experts on a CPU choose otherwise for one row than for several.
DELTA_RULES = ("Qwen3-Next", "Qwen3.5", "Qwen3.5 text")
# Text alone runs: an image processor is not asked for.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"disable_radix_cache": True} for name in DELTA_RULES},
    "Gemma 4": {"disable_hybrid_swa_memory": True},
    "gpt-oss": {"disable_hybrid_swa_memory": True},
    "Qwen3-VL": {"skip_tokenizer_init": True},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {"moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy"}
# What SGLang reads, and published configurations of the family have.
CHANGES: dict[str, dict[str, Any]] = {
    "Gemma 2": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma 4": {"global_head_dim": 8, "num_global_key_value_heads": 2, "enable_moe_block": False},
    "gpt-oss": {"swiglu_limit": 7.0},
    # SGLang leaves the window out.
    "Mistral": {"sliding_window": None},
    "Ministral 3, Mistral 3": {"original_max_position_embeddings": 16},
    # Transformers leaves out the scale of scores that goes with a factor.
    "DeepSeek V2": {"rope_parameters": {**YARN, "factor": 1.0}, **DEEPSEEK},
    "DeepSeek V3, Kimi K2": {
        "rope_parameters": YARN,
        **DEEPSEEK,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "DeepSeek V3.2": {
        "rope_parameters": YARN,
        **DEEPSEEK,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "GPT-2": {"num_key_value_heads": 4},
    "OPT": {"num_key_value_heads": 4},
}
LACKS = ("has no SGlang implementation",)
# Of a best logit to the next, below which two ways to compute it may choose differently.
NEAR_TIE = 1e-3
# Rows of a request, on average, that the passes verify in turns.
WIDTHS = [4, 3, 1, 2]


def batches() -> list[list[list[int]]]:
    """A prompt alone; it again beside others, out of the cache; and one of those alone."""
    found = prompts()
    return [[found[1]], found, [found[3]]]


def write_family(family: Family, directory: Path) -> PreTrainedModel:
    """A tiny random target of a family, on disk too."""
    write_target(directory)
    target = tiny_target(family.kind, **{**family.changes, **CHANGES.get(family.name, {})})
    target.save_pretrained(directory)
    return target


def outcome(schedulers: Schedulers, family: Family, directory: Path) -> dict[str, str]:
    """What SGLang does with a family, and why where it is not "equal".

    Returns:
        ``text``: "equal" where the text is SGLang's own without a drafter, alone, beside others
        and out of the prefix cache, with the drafter's drafts and with right ones, in whole blocks
        and in verify passes of fewer rows; and where every draft is the core's. "refused": the
        plugin's error. "not on a CPU" and "SGLang does not have it": of SGLang alone. "not run":
        there is no tiny model. ``message``: an error's text.
    """
    try:
        target = write_family(family, directory / "target")
    except (ValueError, AttributeError) as error:
        if "Unrecognized model" not in str(error):
            raise
        message = f"no tiny model: transformers {version('transformers')} has no {family.kind}"
        return {"text": "not run", "message": message}
    checkpoint = write_tiny(directory / "drafter")
    job = {
        "any_back_end": family.name in ON_ANY_BACK_END,
        "batches": {"batches": batches(), "length": NEW_TOKENS, "known": None},
        "drafts_file": str(directory / "drafts"),
    }

    def settings(drafter: Path | None) -> dict[str, Any]:
        return settings_of(directory / "target", drafter, SETTINGS.get(family.name))

    if job["any_back_end"]:
        own = own_texts(target)
        in_batches = [[own[1]], own, [own[3]]]
    else:
        alone = schedulers.ask({**job, "settings": settings(None)})
        if "error" in alone:
            return alone_failed(alone["error"])
        in_batches = [batch["texts"] for batch in alone["batches"]]
    drafted = schedulers.ask({**job, "settings": settings(checkpoint)})
    if "error" in drafted:
        kind, _, message = drafted["error"].partition(": ")
        return {"text": "refused" if kind == "DFlashError" else "fails", "message": message}
    right = [prompt + text for prompt, text in zip(prompts(), in_batches[1], strict=True)]
    cut = schedulers.ask(
        {
            **job,
            "settings": settings(checkpoint),
            "environment": {"DFLASH_PLUGIN_ADAPTIVE_VERIFICATION": "1"},
            "widths": WIDTHS,
            "batches": {**job["batches"], "known": right},
        }
    )
    if "error" in cut:
        return {"text": "fails", "message": cut["error"]}
    differs = [
        name
        for name, made in (("its drafts", drafted), ("right drafts", cut))
        if [batch["texts"] for batch in made["batches"]] != in_batches
    ]
    if differs:
        return {"text": "differs", "message": f"text with {' and '.join(differs)}"}
    wrong = wrong_draft(drafted, Path(job["drafts_file"]), target, checkpoint)
    if wrong is not None:
        return {"text": "differs", "message": wrong}
    hits = [batch["cached"] for batch in drafted["batches"]]
    widths = {width for width, _, _ in cut["cut"]}
    parts = ["equal"]
    if not (hits[1][1] and hits[2][0]):
        parts.append("no prefix hits")
    if widths != set(WIDTHS):
        parts.append("whole blocks")
    return {"text": ", ".join(parts)}


def alone_failed(error: str) -> dict[str, str]:
    """The outcome where SGLang without a drafter ends."""
    kind, _, message = error.partition(": ")
    message = " ".join(message.split()) or kind
    if any(word in message for word in LACKS):
        return {"text": "SGLang does not have it", "message": message}
    return {"text": "not on a CPU", "message": f"{kind}: {message}"}


@torch.inference_mode()
def wrong_draft(
    made: dict[str, Any], file: Path, target: PreTrainedModel, checkpoint: Path
) -> str | None:
    """The first draft that is not the core's, or None."""
    blocks: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for line in file.read_text().splitlines():
        request, anchor, block = json.loads(line)
        blocks[request][anchor] = block
    reference = {"target": target, "drafter": load_drafter(checkpoint, target)}
    compared = 0
    for run, asked in zip(made["batches"], batches(), strict=True):
        for request, prompt, text in zip(run["ids"], asked, run["texts"], strict=True):
            whole = prompt + text
            found = {at: block for at, block in blocks[request].items() if at < len(whole)}
            drafts = core_drafts(reference, whole, list(found))
            for (at, block), (core, margins) in zip(found.items(), drafts, strict=True):
                for got, wanted, margin in zip(block[1:], core, margins, strict=True):
                    if got != wanted and margin >= NEAR_TIE:
                        return f"drafts {block[1:]} at {at} instead of {core}, margins {margins}"
                    compared += 1
    return None if compared > NEW_TOKENS else f"only {compared} drafts were compared"


def outcomes() -> dict[str, dict[str, str]]:
    """What SGLang does with each family, by name."""
    found = {}
    with (
        tempfile.TemporaryDirectory() as place,
        closing(Schedulers(Path(place) / "log")) as schedulers,
    ):
        for number, family in enumerate(FAMILIES):
            found[family.name] = outcome(schedulers, family, Path(place) / str(number))
            print(family.name, found[family.name], flush=True)
    return found


def columns() -> dict[str, Any]:
    """SGLang's version and outcomes, by column of the table."""
    versions = f"sglang {version('sglang')}, transformers {version('transformers')}, "
    return {COLUMN: (f"{versions}torch {torch.__version__}", outcomes())}
