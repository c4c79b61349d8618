"""Where adaptive verification is on in vLLM by itself, with a made-up configuration around it."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.vllm import adaptive, adaptive_default, compat
from dflash_plugin.vllm.arguments import with_switch

ALWAYS, UNIFORM = "ALWAYS", "UNIFORM_BATCH"


@pytest.fixture
def engine(monkeypatch) -> SimpleNamespace:
    """vLLM's choice of a back end; ``support`` is what its graphs hold."""
    state = SimpleNamespace(support=ALWAYS, error=None, asked=[])

    class Builder:
        @staticmethod
        def get_cudagraph_support(vllm_config: Any, spec: Any) -> str:
            return state.support

    class Backend:
        get_name = staticmethod(lambda: "FLASH_ATTN")
        get_builder_cls = staticmethod(lambda: Builder)

    def get_attn_backend(head_size: int, dtype: str, kv_cache_dtype: str) -> type:
        state.asked.append((head_size, dtype, kv_cache_dtype))
        if state.error:
            raise ValueError(state.error)
        return Backend

    modules = {
        "vllm.config": SimpleNamespace(set_current_vllm_config=lambda config: nullcontext()),
        "vllm.v1.attention.backend": SimpleNamespace(
            AttentionCGSupport=SimpleNamespace(ALWAYS=ALWAYS)
        ),
        "vllm.v1.attention.selector": SimpleNamespace(get_attn_backend=get_attn_backend),
        "vllm.v1.kv_cache_interface": SimpleNamespace(FullAttentionSpec=SimpleNamespace),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return state


def config(monkeypatch, options: Options | None = None, **changed: Any) -> Any:
    """An engine's settled configuration that can run it, but for what is changed."""
    spec = SimpleNamespace(options=options or Options())
    monkeypatch.setattr(adaptive_default, "drafter_spec", lambda speculative: spec)
    monkeypatch.setattr(adaptive, "drafter_spec", lambda speculative: spec)
    monkeypatch.setattr(compat, "installed", lambda: "0.32.0")
    model = SimpleNamespace(
        is_hybrid=False,
        use_mla=False,
        return_sampling_mask=False,
        hf_text_config=SimpleNamespace(attention_chunk_size=changed.pop("chunk", None)),
        dtype="bfloat16",
        get_head_size=lambda: 128,
        get_num_kv_heads=lambda parallel: 8,
    )
    for name in [name for name in changed if hasattr(model, name)]:
        setattr(model, name, changed.pop(name))
    full = changed.pop("full_graphs", True)
    values = {
        "speculative_config": SimpleNamespace(
            enable_adaptive_verification=False,
            num_speculative_tokens_per_batch_size=changed.pop("table", None),
        ),
        "model_config": model,
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        "compilation_config": SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: full)
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "lora_config": None,
        "aux_output_config": SimpleNamespace(enabled=False),
    }
    return SimpleNamespace(**{**values, **changed})


def test_it_is_on_where_the_back_end_takes_mixed_lengths(engine, monkeypatch):
    settled = config(monkeypatch)
    adaptive_default.turn_on_where_able(settled)
    assert settled.speculative_config.enable_adaptive_verification is True
    assert engine.asked == [(128, "bfloat16", "auto")]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"full_graphs": False}, "full CUDA graphs"),
        ({"lora_config": object()}, "LoRA"),
        (
            {"parallel_config": SimpleNamespace(tensor_parallel_size=2, data_parallel_size=1)},
            "2 ranks",
        ),
        (
            {"parallel_config": SimpleNamespace(tensor_parallel_size=1, data_parallel_size=2)},
            "data parallelism",
        ),
        ({"table": [(1, 8, 7)]}, "num_speculative_tokens_per_batch_size"),
        ({"is_hybrid": True}, "recurrent"),
        ({"use_mla": True}, "latent attention"),
        ({"chunk": 8192}, "chunked attention"),
        ({"return_sampling_mask": True}, "sampling masks"),
        ({"aux_output_config": SimpleNamespace(enabled=True)}, "routed experts"),
    ],
)
def test_it_stays_off_with_a_reason(engine, monkeypatch, caplog, changed, reason):
    settled = config(monkeypatch, **changed)
    with caplog.at_level("INFO"):
        adaptive_default.turn_on_where_able(settled)
    assert settled.speculative_config.enable_adaptive_verification is False
    assert (
        f"adaptive verification is off: {adaptive_default.reason_against(settled)}" in caplog.text
    )
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("state", "reason"),
    [({"support": UNIFORM}, "FLASH_ATTN hold passes of one length"), ({"error": "none"}, "none")],
)
def test_it_stays_off_where_the_back_end_does_not_take_it(engine, monkeypatch, state, reason):
    vars(engine).update(state)
    settled = config(monkeypatch)
    adaptive_default.turn_on_where_able(settled)
    assert settled.speculative_config.enable_adaptive_verification is False
    assert reason in str(adaptive_default.reason_against(settled))


@pytest.mark.parametrize("wanted", [True, False])
def test_what_the_user_says_stays(engine, monkeypatch, wanted):
    settled = config(monkeypatch, Options(adaptive_verification=wanted))
    settled.speculative_config.enable_adaptive_verification = wanted
    adaptive_default.turn_on_where_able(settled)
    assert settled.speculative_config.enable_adaptive_verification is wanted
    assert engine.asked == []


def test_the_runner_is_made_after_the_choice(engine, monkeypatch):
    settled, seen = config(monkeypatch), []

    def native(self: Any, vllm_config: Any, device: str) -> None:
        seen.append((vllm_config.speculative_config.enable_adaptive_verification, device))

    class Runner:
        pass

    adaptive_default.turned_on_where_able(native)(Runner(), settled, "cuda")
    assert seen == [(True, "cuda")]


def test_a_drafter_of_vllm_is_left_alone(engine, monkeypatch):
    settled = config(monkeypatch)
    monkeypatch.setattr(adaptive_default, "drafter_spec", lambda speculative: None)
    adaptive_default.turn_on_where_able(settled)
    assert settled.speculative_config.enable_adaptive_verification is False


def test_both_switches_must_agree():
    assert with_switch(Options(), None).adaptive_verification is None
    assert with_switch(Options(), False).adaptive_verification is False
    assert with_switch(Options(adaptive_verification=True), True).adaptive_verification is True
    with pytest.raises(DFlashError, match="adaptive_verification is True but enable_adaptive"):
        with_switch(Options(adaptive_verification=True), False)


def runner(settled: Any) -> Any:
    """A runner that vLLM has made, with what it keeps of adaptive verification."""

    class Runner:
        def __init__(self, vllm_config: Any) -> None:
            self.speculative_config = vllm_config.speculative_config
            self.rejection_sampler = SimpleNamespace(enable_adaptive_verification=True)
            self.speculator = SimpleNamespace(whole=False)
            self.speculator.verify_whole_blocks = lambda: setattr(self.speculator, "whole", True)

    Runner.__init__ = adaptive_default.turned_on_where_able(Runner.__init__)  # type: ignore[method-assign]
    return Runner(settled)


def created(settled: Any, *backends: str) -> Any:
    """What vLLM's runner gets of the manager, of a model whose back ends cannot."""

    def native(*, attn_groups: Any, **_: Any) -> Any:
        for group in itertools.chain(*attn_groups):
            raise ValueError(f"the {group.backend.__name__} attention back end does not")

    make = adaptive.create_manager(native)
    return make(
        vllm_config=settled,
        attn_groups=[[SimpleNamespace(backend=type(name, (), {}))] for name in backends],
        req_states=None,
        query_start_loc=None,
        num_bonus_tokens=1,
        max_total_logits=8,
    )


def test_a_back_end_that_vllm_finds_late_leaves_blocks_whole(engine, monkeypatch, caplog):
    settled = config(monkeypatch)
    made = runner(settled)
    assert created(settled, "OWN") is None
    assert made.speculator.whole
    assert made.rejection_sampler.enable_adaptive_verification is False
    assert made.speculative_config.enable_adaptive_verification is False
    assert "adaptive verification is off: the OWN attention back end" in caplog.text


def test_who_asks_for_it_is_told(engine, monkeypatch):
    settled = config(monkeypatch, Options(adaptive_verification=True))
    made = runner(settled)
    with pytest.raises(ValueError, match="OWN attention"):
        created(settled, "OWN")
    assert not made.speculator.whole


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0"])
def test_passes_over_gated_delta_rules_are_cut_where_all_requests_keep_verifying(
    engine, monkeypatch, version
):
    settled = config(monkeypatch, Options(adaptive_verification=True))
    monkeypatch.setattr(compat, "installed", lambda: version)
    backends = ["GDNAttentionBackend", "GDNAttentionBackend"]
    if version == "0.31.0":
        with pytest.raises(ValueError, match="GDNAttentionBackend attention"):
            created(settled, *backends)
    else:
        assert created(settled, *backends) is None
        with pytest.raises(ValueError, match="OWN attention"):
            created(settled, *backends, "OWN")
