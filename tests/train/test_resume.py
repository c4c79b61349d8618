"""A run that stops and goes on is the run that does not stop, bit for bit."""

import json
import time

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.train.optimizer import parameters_of
from dflash_plugin.train.snapshot import load_snapshot
from dflash_plugin.train.trainer import LOG, Trainer
from tests.helpers.tiny import tiny_target
from tests.helpers.training import PARTS, trainer_of

RUNS = [{}, {"optimizer": "muon"}, {**PARTS, "optimizer": "muon"}]


def watched(trainer: Trainer) -> list:
    """Collects what a run draws: the sequences and the anchors of every step."""
    drawn = []
    features, objective = trainer.features, trainer.objective

    def record(batch):
        drawn.append(batch.indices.tolist())
        return features(batch)

    trainer.features = record
    objective.register_forward_pre_hook(
        lambda _, inputs: drawn.append(inputs[1].anchors.tolist()) if objective.training else None
    )
    return drawn


def state(trainer: Trainer) -> list[torch.Tensor]:
    tensors = list(trainer.drafter.state_dict().values())
    for optimizer, parameter in parameters_of(trainer.optimizers):
        tensors += [value for _, value in sorted(optimizer.state[parameter].items())]
    return tensors


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("settings", RUNS, ids=["adamw", "muon", "dflash2-muon"])
def test_k_steps_and_k_more_are_2k_steps(settings, tmp_path):
    target = tiny_target()
    settings = {"steps": 10, "eval_every": 5, "save_every": 3, **settings}
    whole = trainer_of(target, tmp_path / "whole", **settings)
    drawn = watched(whole)
    records: list[dict] = []
    whole.run(records.append)

    first = trainer_of(target, tmp_path / "parts", **settings)
    drawn_in_parts = watched(first)
    records_in_parts: list[dict] = []
    first.run(records_in_parts.append, stop_at=5)
    assert first.step == 5
    # Whatever else the process draws must not reach the run.
    torch.rand(7)
    second = trainer_of(target, tmp_path / "parts", **settings)
    rest = watched(second)
    second.run(records_in_parts.append)

    assert drawn_in_parts + rest == drawn
    assert without_times(records_in_parts) == without_times(records)
    assert len(state(second)) == len(state(whole))
    for ours, theirs in zip(state(second), state(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert second.seconds > first.seconds


@pytest.mark.parametrize("settings", RUNS, ids=["adamw", "muon", "dflash2-muon"])
def test_a_run_in_pieces_of_limited_time_is_the_whole_run(settings, tmp_path):
    target = tiny_target()
    settings = {"steps": 4, "eval_every": 2, "save_every": 100, **settings}
    whole = trainer_of(target, tmp_path / "whole", **settings)
    whole.run()
    for step in (1, 2):
        piece = trainer_of(target, tmp_path / "parts", **settings)
        piece.run(deadline=time.monotonic())
        assert piece.step == step
    last = trainer_of(target, tmp_path / "parts", **settings)
    last.run(deadline=time.monotonic() + 3600)
    assert last.step == 4
    assert without_times(last.history) == without_times(whole.history)
    assert len(state(last)) == len(state(whole))
    for ours, theirs in zip(state(last), state(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_the_log_holds_each_evaluation_once(tmp_path):
    settings = {"steps": 6, "eval_every": 2, "save_every": 3}
    trainer_of(tiny_target(), tmp_path, **settings).run(stop_at=3)
    # An evaluation after the last snapshot, of a run that was killed.
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 4}\n')
    trainer_of(tiny_target(), tmp_path, **settings).run()
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 6]
    for record in log:
        assert record["held_out_tau"] >= 1
        assert len(record["held_out_acceptance"]) == 3
        assert record["loss"] > 0


def test_muon_steps_the_matrices_of_the_layers_only(tmp_path):
    trainer = trainer_of(tiny_target(), tmp_path, optimizer="muon", **PARTS)
    muon, adamw = trainer.optimizers
    names = {parameter: name for name, parameter in trainer.drafter.named_parameters()}
    of = [
        {
            names[parameter]
            for optimizer, parameter in parameters_of(trainer.optimizers)
            if optimizer is one
        }
        for one in (muon, adamw)
    ]
    assert of[0] | of[1] == set(names.values())
    assert not of[0] & of[1]
    assert {"fc.weight", "layers.0.mlp.down_proj.weight"} <= of[0]
    assert {"norm.weight", "candidate_selector.successor_codebook"} <= of[1]
    assert not [name for name in of[0] if "codebook" in name or "norm" in name]


def test_a_torch_without_muon_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(DFlashError, match=r"optimizer is 'muon', but torch .* has none"):
        trainer_of(tiny_target(), tmp_path, optimizer="muon")


def test_a_snapshot_from_before_a_setting_existed_goes_on(tmp_path):
    trainer = trainer_of(tiny_target(), tmp_path, steps=2)
    trainer.run()
    identity = trainer._identity()
    other = {**identity, "config": {**identity["config"]}}
    del identity["config"]["optimizer"]
    trainer._identity = lambda: identity
    trainer.save()

    def read(wanted):
        return load_snapshot(tmp_path, trainer.drafter, trainer.optimizers, wanted)

    assert read(other)["step"] == 2
    other["config"]["optimizer"] = "muon"
    with pytest.raises(DFlashError, match="was made with optimizer 'adamw' instead of 'muon'"):
        read(other)
