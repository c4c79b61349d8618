"""New weights while SGLang runs: drafts and text are those of the new ones, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from dflash_plugin.sglang import surface
from dflash_plugin.sglang.new_weights import KEPT, REPLACED
from dflash_plugin.transformers.loading import load_drafter
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import tiny_target, write_target, write_tiny
from tests.on_sglang.checks import check_core

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53]]
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
# The process, whose kernels run or not, weights, and what makes the drafter.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("schedulers", "checkpoint", {**BIASES, "target_layer_ids": (2, 0)}),
    "kernels": ("interpreted", "checkpoint", {}),
    "FP8": ("schedulers", "fp8", BIASES),
    "FP8, own head": ("schedulers", "fp8", {"draft_vocab_size": 24, "own_head": True}),
}
# Whether an update of tensors says which model it is for, between calls that begin and end it.
HAS_SESSIONS = "SchedulerWeightUpdaterManager._select_runners" in {
    seam.symbol for seam in surface.hooks()
}
TENSOR, DISK = "update_weights_from_tensor", "update_weights_from_disk"


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_reach_text_and_drafts(request, tmp_path, kind):
    process, weights, changes = KINDS[kind]
    running = request.getfixturevalue(process)
    targets = {seed: tiny_target(**SIZES, seed=seed) for seed in (0, 1)}
    first, second = (write_target(tmp_path / f"target{seed}", **SIZES) for seed in targets)
    for target, directory in zip(targets.values(), (first, second), strict=True):
        target.save_pretrained(directory)
    made = {**SIZES, "target_hidden_size": 64, **changes}
    old, new = (write_tiny(tmp_path / str(seed), seed=seed, **made) for seed in (0, 1))
    # SGLang on a CPU fills linears of other sizes without a word; not an embedding.
    other = write_target(tmp_path / "other", **SIZES, vocab_size=50)
    selected = {"selector": "draft"} if HAS_SESSIONS else {}
    prefix = "" if HAS_SESSIONS else "draft."
    # What is asked, whether it succeeds, what it says, and the target and the drafter after it.
    steps: list[tuple[dict[str, Any], bool, str, int, Path]] = [
        ({"call": DISK, "fields": {"model_path": str(new)}}, True, REPLACED, 0, new),
        (
            {"call": TENSOR, "tensors": [[prefix, str(old)]], "fields": selected},
            *(True, "", 0, old),
        ),
        (
            {
                "call": TENSOR, "tensors": [[prefix, str(new)]], "fields": selected,
                "cut": "fc.weight",
            },
            *(False, "the drafter keeps its weights: tensor 'fc.weight' has shape", 0, old),
        ),
        (
            {"call": TENSOR, "tensors": [["draft.", str(new)], ["", str(second)]]},
            *(True, "", 1, new),
        ),
        ({"call": DISK, "fields": {"model_path": str(other)}}, False, "weights of", 0, new),
        ({"call": DISK, "fields": {"model_path": str(second)}}, True, KEPT, 1, new),
        ({"call": DISK, "fields": {"model_path": "/nowhere"}}, False, "", 1, new),
        ({"call": "release_memory_occupation"}, True, "", 1, new),
        ({"call": "resume_memory_occupation"}, True, "", 1, new),
        # The last checkpoint; the tensors after it are lost.
        ({"call": "lose"}, True, "", 1, new),
    ]  # fmt: skip
    length = 12
    if process == "interpreted":
        # A pass takes seconds: a drafter from a directory, tensors of both, and what is lost.
        length, steps = 4, [steps[0], steps[3], steps[-1]]
    made = running.run(
        first, old, PROMPTS, environment={"DFLASH_PLUGIN_DRAFT_WEIGHTS": weights},
        steps=[step for step, *_ in steps], temperature=0.0, max_new_tokens=length,
        ignore_eos=True,
    )  # fmt: skip

    def check(found: dict[str, Any], target: PreTrainedModel, checkpoint: Path) -> None:
        drafter = load_drafter(checkpoint, target, weights=weights)
        check_core(found, PROMPTS, target, drafter, length)

    check(made, targets[0], old)
    for found, (step, succeeds, message, target, checkpoint) in zip(
        made["after"], steps, strict=True
    ):
        assert found["told"][0] is succeeds, (step, found["told"])
        assert message in found["told"][1], step
        if step["call"] != "release_memory_occupation":
            check(found, targets[target], checkpoint)
