"""What stands in front of SGLang's loaders of new weights."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import new_weights
from dflash_plugin.sglang.metrics import Counted
from dflash_plugin.sglang.new_weights import DraftUpdater, TargetUpdater
from tests.helpers.tiny import write_target, write_tiny


class Native:
    """SGLang's updater, with the answers that a test wants."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.calls = answers, []
        self.model_config = SimpleNamespace(model_path="old")
        self.tp_rank = 3

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers[name]
            if callable(answer):
                answer = answer(*args)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def drafter() -> Any:
    return SimpleNamespace(target_changed=False)


@pytest.mark.parametrize(
    "name",
    [
        "update_weights_from_tensor",
        "update_weights_from_distributed",
        "load_weights_from_distributed",
        "update_weights_from_ipc",
    ],
)
def test_what_a_loader_raises_is_an_answer(name):
    model = drafter()
    updater = TargetUpdater(Native(**{name: AssertionError("wrong shape\nand more")}), model)
    assert getattr(updater, name)("given") == (False, "wrong shape")
    assert model.target_changed
    assert getattr(TargetUpdater(Native(**{name: (True, "fine")}), model), name)() == (True, "fine")
    assert updater.tp_rank == 3


def test_a_directory_is_the_targets_or_the_drafters(tmp_path, monkeypatch):
    taken: list[Any] = []
    monkeypatch.setattr(new_weights, "take_checkpoint", lambda *args: taken.append(args))
    model, native = drafter(), Native(update_weights_from_disk=(True, "fine"))
    updater = TargetUpdater(native, model)
    ours = write_tiny(tmp_path / "drafter")
    assert updater.update_weights_from_disk(str(ours), "auto") == (True, new_weights.REPLACED)
    assert taken == [(model, ours)]
    assert (native.calls, model.target_changed) == ([], False)
    target = str(write_target(tmp_path / "target"))
    answer = updater.update_weights_from_disk(target, "auto", recapture_cuda_graph=True)
    assert answer == (True, new_weights.KEPT)
    expected = ("update_weights_from_disk", (target, "auto"), {"recapture_cuda_graph": True})
    assert native.calls == [expected]
    assert (len(taken), model.target_changed) == (1, True)


@pytest.mark.parametrize(
    ("failure", "loads"),
    [
        ((False, "Failed to get weights iterator: gone."), ["new"]),
        ((False, "Failed to update weights: wrong shape."), ["new", "old"]),
        (RuntimeError("wrong shape, twice"), ["new", "old"]),
    ],
)
def test_a_target_that_does_not_fit_leaves_the_one_before(failure, loads):
    native = Native(
        update_weights_from_disk=lambda path, *_: failure if path == "new" else (True, "")
    )
    native.model_config.model_path = "old"
    done, message = TargetUpdater(native, drafter()).update_weights_from_disk("new", "auto")
    assert not done
    assert [args[0] for _, args, _ in native.calls] == loads
    assert native.model_config.model_path == "old"
    assert message.endswith("The target has the weights of old again.") is (len(loads) == 2)


def test_a_session_leaves_the_drafter_whole():
    native = Native(update_weights_from_tensor=(True, "Success"))
    updater = DraftUpdater(native, drafter())
    updater.begin_weight_update()
    assert updater.update_weights_from_tensor([], None) == (True, "Success")
    done, message = updater.update_weights_from_tensor([], load_format="direct")
    assert not done
    assert "load_format is 'direct'" in message
    updater.end_weight_update(run_post_load=True)
    assert len(native.calls) == 1


@pytest.mark.parametrize(("ours", "asked"), [(True, "target"), (False, "all")])
def test_tensors_for_both_models_go_to_the_target(ours, asked):
    worker = Counted() if ours else object()
    manager = SimpleNamespace(draft_worker=worker)
    seen = new_weights.select_runners(lambda _, selector: selector, manager)
    assert seen == asked
    assert new_weights.select_runners(lambda _, selector: selector, manager, "draft") == "draft"


@pytest.mark.parametrize(
    ("ours", "empties", "idle", "loads"),
    [
        (True, True, True, True),
        (True, True, False, False),
        (True, False, False, True),
        (False, True, False, True),
    ],
)
def test_weights_are_not_loaded_under_requests_of_the_old_ones(
    monkeypatch, ours, empties, idle, loads
):
    io_struct: Any = ModuleType("sglang.srt.managers.io_struct")
    io_struct.UpdateWeightFromDiskReqOutput = SimpleNamespace
    managers: Any = ModuleType("sglang.srt.managers")
    managers.io_struct = io_struct
    monkeypatch.setitem(sys.modules, "sglang.srt.managers", managers)

    class UpdateWeightFromDiskReqInput:
        flush_cache = empties

    manager = SimpleNamespace(
        draft_worker=Counted() if ours else object(), is_fully_idle=lambda: idle
    )
    asked: list[Any] = []

    def native(_: Any, request: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(success=True, message="")

    request = UpdateWeightFromDiskReqInput()
    answer = new_weights.update_when_idle(native, manager, request)
    assert asked == ([request] if loads else [])
    assert (answer.success, answer.message) == ((True, "") if loads else (False, new_weights.BUSY))


@pytest.mark.parametrize(
    ("tags", "saver", "backup", "restores"),
    [
        (None, True, False, True),
        (["weights"], True, False, True),
        (["kv_cache"], True, False, False),
        (None, False, False, False),
        (None, True, True, False),
    ],
)
def test_released_weights_come_back_where_they_are_lost(monkeypatch, tags, saver, backup, restores):
    restored: list[Any] = []
    monkeypatch.setattr(new_weights, "restore", restored.append)
    monkeypatch.setattr(new_weights, "argument", lambda args, name: args[name])
    worker: Any = Counted()
    worker.draft_model = object()
    worker.server_args = {
        "enable_memory_saver": saver,
        "enable_weights_cpu_backup": False,
        "enable_draft_weights_cpu_backup": backup,
    }
    request, manager = SimpleNamespace(tags=tags), SimpleNamespace(draft_worker=worker)
    assert new_weights.resume_memory(lambda *_: "answer", manager, request) == "answer"
    assert restored == ([worker.draft_model] if restores else [])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("saver", [False, True])
@pytest.mark.parametrize("backup", [False, True])
def test_memory_that_would_lose_quantised_linears_is_refused_at_start(
    monkeypatch, keeps, saver, backup
):
    monkeypatch.setattr(new_weights, "argument", lambda args, name: args[name])
    args = {
        "enable_memory_saver": saver,
        "enable_weights_cpu_backup": False,
        "enable_draft_weights_cpu_backup": backup,
    }
    model: Any = SimpleNamespace(keeps_quantised_linears=keeps)
    if keeps and saver and not backup:
        with pytest.raises(DFlashError, match="add --enable-weights-cpu-backup or --enable-draft-"):
            new_weights.check_restorable(args, model)
    else:
        new_weights.check_restorable(args, model)


def test_a_drafters_path_is_not_the_served_models(tmp_path):
    noted: list[str] = []
    for path in (write_tiny(tmp_path / "drafter"), write_target(tmp_path / "target")):
        new_weights.keep_model_path(lambda _, path, __: noted.append(path), None, str(path), "auto")
    assert noted == [str(tmp_path / "target")]
