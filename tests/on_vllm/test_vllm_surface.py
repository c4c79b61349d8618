"""The table of vLLM symbols in the installed vLLM, as a server checks it at start; no model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_surface import Surface
from dflash_plugin.vllm import compat, register, surface

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
        surface.verify_frontend(speculative)
    config = SimpleNamespace(use_v2_model_runner=True, speculative_config=speculative)
    with pytest.raises(DFlashError, match=r"gpu_worker\.Worker .*model_runner\.GPUModelRunner\.sa"):
        surface.verify_worker(config)
