"""What SGLang does with each family of targets, for ``tools/targets.py`` and a test."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.transformers.loading import load_drafter
from tests.helpers import families, gpu_families
from tests.helpers.core_drafts import core_drafts
from tests.helpers.device import NOT_HERE, ON_GPU
from tests.helpers.families import FAMILIES, NEW_TOKENS, Family, own_texts
from tests.helpers.greedy import first_difference, greedy_text
from tests.helpers.http_server import free_port
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
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5}
# Rows of a request, on average, that the passes verify in turns.
WIDTHS = [4, 3, 1, 2]
# On a GPU, three rows of each request may run in the captured pass of whole blocks.
EXPECTED_WIDTHS = {4, 1, 2} if ON_GPU else {*WIDTHS}


@dataclass(frozen=True)
class Attempt:
    """How a family is tried.

    Attributes:
        dtype: of target and drafter.
        attention: SGLang's back end, or None for that of ``schedulers.SETTINGS``.
    """

    dtype: str = "float32"
    attention: str | None = None


def gpu_attempts(family: Family) -> list[Attempt]:
    """How to try a family on a GPU, one way after the other.

    SGLang's choice on an H100 or H200 is fa3, which takes no float32.
    """
    backends = {"float32": "triton", "bfloat16": "fa3"}
    attempts = [Attempt(dtype, backends[dtype]) for dtype in gpu_families.dtypes(family)]
    return [*attempts, Attempt("bfloat16", "triton")]


def prompts() -> list[list[int]]:
    """Four prompts of different lengths, the second and the last the longest."""
    if ON_GPU:
        return gpu_families.random_prompts((1, gpu_families.LONG, 9, gpu_families.LONG - 64))
    return families.prompts()


def batches() -> list[list[list[int]]]:
    """A prompt alone; it again beside others, out of the cache; and one of those alone."""
    found = prompts()
    return [[found[1]], found, [found[3]]]


def write_family(family: Family, directory: Path) -> PreTrainedModel:
    """A tiny random target of a family, on disk too."""
    changes = CHANGES.get(family.name, {})
    if ON_GPU:
        if family.name == "Gemma 4":
            # SGLang reads one head dimension of all layers, which newer Transformers refuse.
            changes = {**changes, "allow_global_per_layer_attribute_access": True}
        changes = {**changes, **gpu_families.CHANGES.get(family.name, {})}
        return gpu_families.write_sized(family, directory, gpu_families.SIZES, changes)
    write_target(directory)
    target = tiny_target(family.kind, **{**family.changes, **changes})
    target.save_pretrained(directory)
    return target


def engine_settings(family: Family, attempt: Attempt) -> dict[str, Any]:
    """Settings beside those that all engines have."""
    found = {"dtype": attempt.dtype, **SETTINGS.get(family.name, {})}
    if attempt.attention is not None:
        found["attention_backend"] = attempt.attention
    if ON_GPU:
        # What a CPU's engine cannot do.
        found.pop("disable_radix_cache", None)
        found.pop("disable_hybrid_swa_memory", None)
        found["nccl_port"] = free_port()
        if gpu_families.is_recurrent(family):
            # States of requests and of the prefix cache; they would take most of the GPU.
            found["max_mamba_cache_size"] = 64
    return found


def outcome(
    schedulers: Schedulers,
    family: Family,
    directory: Path,
    attempt: Attempt = Attempt(),
    attention: list[str] | None = None,
) -> dict[str, str]:
    """What SGLang does with a family, and why where it is not "equal".

    Args:
        schedulers: run the engines.
        family: of the target.
        directory: where target and drafter go.
        attempt: how to try it.
        attention: takes the back end of the target's attention.

    Returns:
        ``text``: "equal" where the text is SGLang's own without a drafter, alone, beside others
        and out of the prefix cache, with the drafter's drafts and with right ones, in whole blocks
        and in verify passes of fewer rows; and where every draft is the core's. "refused": the
        plugin's error. "not on a CPU" and "SGLang does not have it": of SGLang alone. "not run":
        there is no tiny model. ``message``: an error's text.
    """
    try:
        target = write_family(family, directory / "target")
    except gpu_families.NoTinyModelError as error:
        return {"text": "not run", "message": str(error)}
    except (ValueError, AttributeError) as error:
        if "Unrecognized model" not in str(error):
            raise
        message = f"no tiny model: transformers {version('transformers')} has no {family.kind}"
        return {"text": "not run", "message": message}
    sizes = gpu_families.DRAFTER if ON_GPU else {}
    width = target.config.get_text_config().hidden_size
    checkpoint = write_tiny(
        directory / "drafter",
        **{**sizes, "target_hidden_size": width, "dtype": attempt.dtype},
    )
    if attempt.dtype == "bfloat16":
        target = target.bfloat16().float()
    job = {
        "any_back_end": family.name in ON_ANY_BACK_END and not ON_GPU,
        "batches": {"batches": batches(), "length": NEW_TOKENS, "known": None},
        "drafts_file": str(directory / "drafts"),
    }

    def settings(drafter: Path | None) -> dict[str, Any]:
        return settings_of(directory / "target", drafter, engine_settings(family, attempt))

    if job["any_back_end"]:
        own = own_texts(target)
        in_batches = [[own[1]], own, [own[3]]]
    else:
        alone = schedulers.ask({**job, "settings": settings(None)})
        if "error" in alone:
            return alone_failed(alone["error"])
        in_batches = [batch["texts"] for batch in alone["batches"]]
        if attention is not None:
            attention.append(alone["attention"])
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
    made_with = {"its drafts": drafted, "right drafts": cut}
    parts, message = ["equal" if attempt.dtype == "float32" else f"equal in {attempt.dtype}"], {}
    if "error" in cut:
        kind, _, refused = cut["error"].partition(": ")
        if kind != "DFlashError":
            return {"text": "fails", "message": f"adaptive: {cut['error']}"}
        del made_with["right drafts"]
        parts.append("not adaptive")
        message = {"message": refused}
    differs = [
        name
        for name, made in made_with.items()
        if not is_same(made["batches"], in_batches, target, attempt.dtype)
    ]
    if differs:
        return {"text": "differs", "message": f"text with {' and '.join(differs)}"}
    near_tie = NEAR_TIE[attempt.dtype]
    wrong = wrong_draft(drafted, Path(job["drafts_file"]), target, checkpoint, near_tie)
    if wrong is not None:
        of_core = [greedy_text(target, prompt, NEW_TOKENS) for prompt in prompts()]
        if is_close(in_batches[1], of_core, prompts(), target, attempt.dtype):
            return {"text": "differs", "message": wrong}
        parts.append("drafts not compared")
        message = {"message": "SGLang's text of this target alone is not Transformers'"}
    hits = [batch["cached"] for batch in drafted["batches"]]
    if not (hits[1][1] and hits[2][0]):
        parts.insert(1, "no prefix hits")
    if "error" not in cut and not {width for width, _, _ in cut["cut"]} >= EXPECTED_WIDTHS:
        parts.append("whole blocks")
    return {"text": ", ".join(parts), **message}


def is_same(
    made: list[dict[str, Any]],
    expected: list[list[list[int]]],
    target: PreTrainedModel,
    dtype: str,
) -> bool:
    """Whether batches have the expected texts; in half precision, up to a near tie of the target.

    Args:
        made: batches of requests.
        expected: texts by batch.
        target: in float32, with the weights of the engine's.
        dtype: of the engine.
    """
    found = [batch["texts"] for batch in made]
    if dtype == "float32":
        return found == expected
    runs = zip(found, expected, batches(), strict=True)
    return all(is_close(*run, target, dtype) for run in runs)


def is_close(
    texts: list[list[int]],
    expected: list[list[int]],
    asked: list[list[int]],
    target: PreTrainedModel,
    dtype: str,
) -> bool:
    """Whether texts after the asked prompts leave the expected ones at near ties alone."""
    triples = zip(texts, expected, asked, strict=True)
    return all(distance(target, *triple) < NEAR_TIE[dtype] for triple in triples)


@torch.inference_mode()
def distance(
    target: PreTrainedModel, text: list[int], expected: list[int], prompt: list[int]
) -> float:
    """How far apart, at most, the target's logits are where a text leaves the expected one."""
    place = first_difference(text, expected, strict=True)
    if place is None:
        return 0.0
    ids = torch.tensor([prompt + text[:place]])
    logits = target(input_ids=ids, use_cache=False).logits[0, -1].float()
    return float((logits[expected[place]] - logits[text[place]]).abs())


def alone_failed(error: str) -> dict[str, str]:
    """The outcome where SGLang without a drafter ends."""
    kind, _, message = error.partition(": ")
    message = " ".join(message.split()) or kind
    if any(word in message for word in LACKS):
        return {"text": "SGLang does not have it", "message": message}
    return {"text": NOT_HERE, "message": f"{kind}: {message}"}


@torch.inference_mode()
def wrong_draft(
    made: dict[str, Any],
    file: Path,
    target: PreTrainedModel,
    checkpoint: Path,
    near_tie: float,
) -> str | None:
    """The first draft that is not the core's, or None; below ``near_tie`` it may be another."""
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
                    if got != wanted and margin >= near_tie:
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
