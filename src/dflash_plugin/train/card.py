"""The card of a drafter: what it is, what it was trained on, what it reaches, how to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_plugin.charts import Line, line_image
from dflash_plugin.drafter.config import DrafterConfig

CURVE = "learning_curve.svg"


def model_card(
    config: DrafterConfig,
    parameters: int,
    facts: Mapping[str, Any],
    *,
    name: str = "DRAFTER",
    base_model: str | None = None,
    license: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """The README of an exported drafter.

    Args:
        config: of the drafter.
        parameters: of its own.
        facts: what ``pipeline.train`` returned, with "command"; what is missing is left out.
        name: of the drafter in the commands that serve it.
        base_model: name of the target on the hub; the facts' "target" where None.
        license: SPDX identifier, in lower case.
        evaluation: what ``dflash-plugin eval --json`` printed.
    """
    target = base_model or str(facts.get("target") or "TARGET")
    # JSON strings are YAML strings.
    head = {"library_name": "dflash-plugin", "license": license, "base_model": base_model}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)]
    lines += [
        "tags:",
        "- speculative-decoding",
        "- dflash",
        "---",
        f"# {'DFlash' if config.selector is None else 'DFlash 2'} drafter for {target}",
        "",
        f"A block of {config.block_size} (anchor and {config.num_draft_tokens} drafts), "
        f"{len(config.layers)} layers, {parameters / 1e6:.2f} M parameters; reads the outputs of "
        f"target layers {', '.join(map(str, config.target_layer_ids))} and borrows the target's "
        "embedding and head. z-lab dialect.",
        *_parts(config),
    ]
    if evaluation is not None:
        lines += ["", "## Acceptance", "", *_acceptance(evaluation)]
    lines += ["", "## Serve", "", *_serving(name, target)]
    lines += ["", "## Training", "", "| | |", "| --- | --- |", *_training(facts)]
    if facts.get("history"):
        alt = "Held-out τ against optimizer steps"
        lines += ["", f"{alt}:", "", f"![{alt}]({CURVE})"]
    if facts.get("command"):
        lines += ["", "Made by:", "", "```bash", str(facts["command"]), "```"]
    return "\n".join([*lines, ""])


def learning_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Held-out τ of each evaluation against its step, as SVG."""
    points = [(float(record["step"]), float(record["held_out_tau"])) for record in history]
    return line_image([Line("held-out τ", points, 0)], "optimizer steps", "held-out τ")


def _parts(config: DrafterConfig) -> list[str]:
    """What a DFlash 2 drafter has besides."""
    if config.convolution is None or config.selector is None:
        return []
    taps, group = config.convolution.kernel_size, config.convolution.group_size
    return [
        f"Convolutions of {taps} taps in groups of {group} channels; a selector of rank "
        f"{config.selector.rank} over {config.selector.top_k} candidates.",
    ]


def _acceptance(evaluation: Mapping[str, Any]) -> list[str]:
    sets = evaluation["sets"]
    positions = range(1, max(len(one["acceptance"]) for one in sets) + 1)
    heads = ["set", "prompts", "τ", *(f"at {k}" for k in positions)]
    return [
        'τ counts the tokens committed per verify pass, bonus token included; "at k" is the share '
        "of passes that accept at least k drafts. Measured by `dflash-plugin eval` on "
        f"{evaluation['device']} in {evaluation['dtype']}, {evaluation['date']}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
        *(
            f"| {one['set_name']} | {one['prompts']} | {one['tau']:.2f} | "
            + " | ".join(f"{share:.2f}" for share in one["acceptance"])
            + " |"
            for one in sets
        ),
    ]


def _serving(name: str, target: str) -> list[str]:
    return [
        "With `pip install dflash-plugin` in the engine's environment:",
        "",
        "```bash",
        f"vllm serve {target} --speculative-method dflash --speculative-model {name}",
        f"python -m sglang.launch_server --model-path {target} \\",
        f"  --speculative-algorithm DFLASH --speculative-draft-model-path {name}",
        "```",
        "",
        "With Transformers, from directories:",
        "",
        "```bash",
        f'dflash-plugin generate "Hello" --target {target} --drafter {name}',
        "```",
    ]


def _training(facts: Mapping[str, Any]) -> list[str]:
    """Rows of what was trained on what; those that the facts do not tell are left out."""
    prompts = facts.get("prompts")
    held_out = (facts.get("held_out") or {}).get("held_out_tau")
    rows = {
        "started from": facts.get("start_from") or "new weights",
        "prompts": prompts and ", ".join(f"{count} of {of}" for of, count in prompts.items()),
        "sequences": facts.get("sequences") and f"{facts['sequences']}, written by the target",
        "response tokens": facts.get("response_tokens"),
        "optimizer": facts.get("optimizer")
        and f"{facts['optimizer']}, learning rate {facts['learning_rate']:g}, "
        f"{facts['weighting']} weighting",
        "optimizer steps": facts.get("steps"),
        "anchors seen": facts.get("anchors"),
        "held-out τ": held_out and f"{held_out:.2f}",
        "machine": facts.get("device")
        and f"{facts['processes']} × {facts['device']}, torch {facts['torch']}",
        "seconds": facts.get("seconds_training")
        and f"{facts['seconds_data']} for data, {facts['seconds_training']} for training",
    }
    return [f"| {what} | {value} |" for what, value in rows.items() if value]
