"""Drafters that vLLM is not told to be DFlash's, and those that are given as the main model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.transformers.loading import load_drafter
from dflash_plugin.vllm.selfcheck import draft
from tests.checkpoints.test_open_spec import rewritten
from tests.helpers.tiny import ENGINE_SIZES, write_tiny
from tests.on_vllm.vllm_helpers import on_worker, running, serving

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40]
SIZES: dict[str, Any] = {**ENGINE_SIZES, "target_hidden_size": 64}


def cached(home: Path, repository: str, directory: Path) -> None:
    """Lay a directory down as the hub's library keeps a repository."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "a" * 40
    for parent in ("refs", "snapshots"):
        (place / parent).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).symlink_to(directory, target_is_directory=True)


def test_a_drafter_is_known_by_its_checkpoint(pair, tmp_path):
    target, directory = pair
    checkpoint = write_tiny(tmp_path / "drafter", "modelopt", **SIZES)
    assert "dflash" not in str(checkpoint)
    expected = answer(load_drafter(checkpoint, target), target, PROMPT)
    speculative = {"model": str(checkpoint)}
    with running(directory, None, speculative=speculative, max_model_len=256) as engine:
        assert on_worker(engine, draft, [*PROMPT, expected.anchor]) == expected.drafts


def speculators(checkpoint: Path, is_new: bool) -> None:
    """Name the target; the older layout suggests a whole block, anchor included."""
    if is_new:
        rewritten(checkpoint, verifier="tests/target")
        return
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = raw["block_size"]
    raw["speculators_config"]["verifier"]["name_or_path"] = "tests/target"
    (checkpoint / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("is_new", "flags", "drafts"),
    [(False, [], 3), (False, ["--num-speculative-tokens=2"], 2), (True, [], 3)],
)
def test_a_speculators_checkpoint_is_the_main_model(pair, tmp_path, is_new, flags, drafts):
    """Both of its layouts, out of the hub's cache without a network."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path / "drafter", "speculators", **SIZES)
    speculators(checkpoint, is_new)
    home = tmp_path / "home"
    cached(home, "tests/target", directory)
    cached(home, "tests/speculator", checkpoint)
    alone = target.generate(
        torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with serving(tmp_path / "log", Path("tests/speculator"), *flags, **offline) as server:
        settings = {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
        [choice] = server.complete(PROMPT, **settings)["choices"]
        assert choice["token_ids"] == alone[0, len(PROMPT) :].tolist()
        found = server.metrics()
        positions = [name for name in found if name.startswith("vllm:spec_decode_num_accepted_tok")]
        assert found["dflash:drafter_info"] == 1
        assert f"vllm:spec_decode_num_accepted_tokens_per_pos_total[{drafts - 1}]" in positions
        assert f"vllm:spec_decode_num_accepted_tokens_per_pos_total[{drafts}]" not in positions
    warned = (
        "suggests 4 speculative tokens, but a block of 4 drafts 3" in (tmp_path / "log").read_text()
    )
    assert warned is (not is_new and not flags)
