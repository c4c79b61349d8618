"""SmolLM2 and the shipped drafter, which most tests of doctor make one fault in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.hub import resolve_drafter
from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.reference_drafts import load_record
from dflash_plugin.doctor import TargetTexts
from dflash_plugin.doctor.texts import PROMPTS
from dflash_plugin.doctor.trials import Trials
from dflash_plugin.prompts import Prompt
from dflash_plugin.transformers import load_target
from dflash_plugin.transformers.loading import bound

SHIPPED = resolve_drafter(None, "smollm2")


@pytest.fixture(scope="session")
def pair(smollm2) -> TargetTexts:
    """SmolLM2 and what it answers, with every layer's output of it."""
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    prompts = [Prompt.user(text) for text in PROMPTS[:8]]
    on = TargetTexts(smollm2, target, tokenizer, prompts, max_new_tokens=48)
    known = on.known(load_record(SHIPPED))
    assert known is not None
    for texts in (on.answers(on.encoded("chat template")), known.texts):
        texts.prepare(range(-1, 30))
    return on


@pytest.fixture(scope="session")
def trials(pair) -> Trials:
    """The healthy pair."""
    drafter = bound(load_checkpoint(SHIPPED, torch.float32), pair.target)
    texts = pair.answers(pair.encoded("chat template"))
    return Trials(drafter, texts, pair.known(load_record(SHIPPED)))


@pytest.fixture
def planted(tmp_path) -> Callable[..., Path]:
    """Makes a copy of the shipped drafter with a fault."""

    def plant(
        record: bool = True,
        of: Path = SHIPPED,
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
        draft: dict[str, Any] | None = None,
        **config: Any,
    ) -> Path:
        directory = tmp_path / "drafter"
        directory.mkdir()
        raw = json.loads((of / "config.json").read_text())
        raw["dflash_config"].update(draft or {})
        raw.update(config)
        written = {name: value for name, value in raw.items() if value != "absent"}
        (directory / "config.json").write_text(json.dumps(written))
        weights = load_file(of / "model.safetensors")
        if tensors is not None:
            tensors(weights)
        save_file(weights, directory / "model.safetensors")
        if record:
            for name in ("known_answer.json", "training.json"):
                (directory / name).write_text((of / name).read_text())
        return directory

    return plant
