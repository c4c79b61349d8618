"""The table of vLLM symbols in the installed vLLM, as a server checks it at start; no model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_surface import Surface
from dflash_plugin.vllm import compat, metrics, register, surface

FEATURES = {row.feature for row in surface.SEAMS}


def test_the_installed_vllm_has_every_symbol():
    register()
    surface.surface().verify(FEATURES, load=True)


def test_a_worker_or_server_without_the_patches_stops(monkeypatch):
    register()
    bare = Surface("vllm", compat.installed(), surface.SEAMS)
    monkeypatch.setattr(surface, "surface", lambda: bare)
    speculative = SimpleNamespace(enable_adaptive_verification=True)
    with pytest.raises(DFlashError, match=r"EngineArgs\.add_cli_args .*no patch was registered"):
        surface.verify_frontend()
    config = SimpleNamespace(use_v2_model_runner=True, speculative_config=speculative)
    with pytest.raises(DFlashError, match=r"gpu_worker\.Worker .*maybe_create_adaptive"):
        surface.verify_worker(config)


def test_counts_arrive_beside_a_steps_statistics():
    """In messages as an engine process sends them; an API server without the plugin drops them."""
    register()
    from vllm.v1.engine import EngineCoreOutputs, core_client
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    class Scheduler:
        vllm_config, running = SimpleNamespace(), []

        def update_from_output(self, scheduler_output, model_runner_output):
            stats = SchedulerStats(num_running_reqs=2)
            return {1: EngineCoreOutputs(), 0: EngineCoreOutputs(3, scheduler_stats=stats)}

    update, counts = metrics.send_counts(Scheduler.update_from_output), {"saved": 3}
    plain = update(Scheduler(), None, SimpleNamespace())
    assert all(type(one) is EngineCoreOutputs for one in plain.values())
    step = SimpleNamespace()
    surface.attach(step, counts)
    sent = update(Scheduler(), None, step)
    assert type(sent[1]) is EngineCoreOutputs
    assert surface.attached(sent[0].scheduler_stats) == counts, "in the API server's own process"
    for receiver, arrives in ((core_client.EngineCoreOutputs, counts), (EngineCoreOutputs, None)):
        for one in (sent[0], plain[0]):
            got = MsgpackDecoder(receiver).decode(MsgpackEncoder().encode(one))
            assert (got.engine_index, got.scheduler_stats.num_running_reqs) == (3, 2)
            assert got.timestamp == one.timestamp
            told = surface.attached(got.scheduler_stats)
            assert told == (arrives if one is sent[0] else None)
