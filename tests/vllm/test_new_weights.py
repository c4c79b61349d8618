"""What vLLM's worker does with the drafter when weights change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dflash_plugin.errors import DFlashError
from dflash_plugin.vllm import new_weights


class Model(nn.Module):
    """A drafter that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.target_changed, self.given = False, []
        self.keeps_quantised_linears = False

    def load_weights(self, weights: Any) -> set[str]:
        self.given += weights
        return {name for name, _ in weights}


class TransferEngine:
    model, model_config = Model(), "config"

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        self.model, self.model_config = model, model_config


@pytest.fixture
def worker(monkeypatch) -> Any:
    monkeypatch.setattr(new_weights, "drafter_spec", lambda config: config)
    model = Model()
    return SimpleNamespace(
        speculative_config="ours",
        weight_transfer_engine=TransferEngine(),
        get_draft_model=lambda: model,
        get_model=lambda: "target",
        dflash_weights_lost=False,
    )


def test_a_transfer_sees_no_parameter_of_the_drafter(worker):
    engine, model = worker.weight_transfer_engine, worker.get_draft_model()
    native = new_weights.receive_draft_weights(
        lambda self: engine.set_weight_update_target(model, "draft config")
    )
    native(worker)
    assert list(engine.model.parameters()) == []
    assert engine.model_config == "draft config"
    assert engine.model.load_weights([("fc.weight", 1)]) == {"fc.weight"}
    assert model.given == [("fc.weight", 1)]
    worker.speculative_config = None
    native(worker)
    assert engine.model is model


def test_the_drafter_is_told_of_the_targets_new_weights(monkeypatch, worker):
    packed: list[Any] = []
    monkeypatch.setattr(new_weights, "pack_head", packed.append)
    reload = new_weights.note_target_change(lambda self, path: path)
    assert reload(worker, "path") == "path"
    assert worker.get_draft_model().target_changed
    assert packed == ["target"]


@pytest.mark.parametrize(
    ("level", "tags", "restores"),
    [(1, None, 0), (2, None, 1), (2, ["weights"], 1), (2, ["kv_cache"], 0)],
)
def test_sleep_that_discards_weights_restores_them(monkeypatch, worker, level, tags, restores):
    restored: list[Any] = []
    monkeypatch.setattr(new_weights, "restore", restored.append)
    new_weights.note_sleep(lambda self, level: None)(worker, level)
    wake_up = new_weights.restore_when_awake(lambda self, tags: None)
    wake_up(worker, tags)
    assert restored == [worker.get_draft_model()] * restores
    wake_up(worker, ["kv_cache"])
    wake_up(worker)
    assert len(restored) == (level == 2)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_that_would_lose_quantised_linears_is_refused(worker, level):
    worker.get_draft_model().keeps_quantised_linears = True
    slept: list[int] = []
    sleep = new_weights.note_sleep(lambda self, level: slept.append(level))
    if level == 2:
        with pytest.raises(DFlashError, match=r"level 2 .* use level 1, or set draft_weights to"):
            sleep(worker, level)
    else:
        sleep(worker, level)
    assert slept == [1] * (level == 1)


def test_an_engine_without_a_drafter_has_none_to_reload(worker):
    worker.speculative_config = None
    with pytest.raises(DFlashError, match="no drafter of dflash-plugin"):
        new_weights.reload_draft_weights(worker, "path")
