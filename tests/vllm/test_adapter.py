"""The parts of the vLLM adapter that need no vLLM; ``tests/vllm`` runs the rest in the engine."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import after_import as hooks
from dflash_plugin.serving import engine_surface
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.vllm import adaptive, arguments, compat, metrics, plugin, surface
from dflash_plugin.vllm.draft_logits import DraftLogits
from dflash_plugin.vllm.names import ARCHITECTURE
from dflash_plugin.vllm.options import drafter_spec, read_options
from dflash_plugin.vllm.workarounds import expand_kernel, without_empty_rows
from tests.helpers.tiny import DFLASH2, tiny_target, write_tiny

TARGET = SimpleNamespace(
    get_hidden_size=lambda: 32,
    get_total_num_hidden_layers=lambda: 4,
    get_vocab_size=lambda: 97,
    max_model_len=4096,
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arguments, "_load_config", lambda: "loader")
    monkeypatch.setattr(compat, "installed", lambda: "0.33.0")
    surface.surface.cache_clear()


def engine_args(**values):
    given = {
        "speculative_config": None,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "additional_config": {},
        "download_dir": None,
        "load_format": "auto",
    }
    return SimpleNamespace(**{**given, **values})


def prepared(tmp_path, **values):
    changes = values.pop("changes", {})
    args = engine_args(spec_method="dflash", spec_model=str(write_tiny(tmp_path / "d", **changes)))
    for name, value in values.items():
        setattr(args, name, value)
    arguments.prepare(args, TARGET)
    staged = json.loads((Path(args.speculative_config["model"]) / "config.json").read_text())
    return args, staged


def test_flags_become_a_configuration_of_ours(tmp_path):
    args, staged = prepared(tmp_path)
    settings = args.speculative_config
    assert (settings["method"], settings["num_speculative_tokens"]) == ("dflash", 3)
    assert settings["draft_load_config"] == "loader"
    assert args.spec_method is args.spec_model is args.spec_tokens is None
    assert staged["architectures"] == [ARCHITECTURE]
    assert staged["vocab_size"] == 97
    assert staged["is_causal"] is False
    spec = DrafterSpec.model_validate(staged["dflash_plugin"])
    assert spec.config == load_config(spec.checkpoint)


def test_preparing_twice_changes_nothing(tmp_path):
    args, _ = prepared(tmp_path)
    before = dict(args.speculative_config)
    arguments.prepare(args, TARGET)
    assert args.speculative_config == before


def test_layers_are_listed_in_the_order_in_which_vllm_collects_them(tmp_path):
    _, staged = prepared(tmp_path, changes={"target_layer_ids": (2, -1, 0)})
    assert staged["dflash_config"]["target_layer_ids"] == [-1, 0, 2]
    assert staged["dflash_plugin"]["config"]["target_layer_ids"] == [2, -1, 0]


def test_windows_reach_vllm(tmp_path):
    layers = ({"sliding_window": 64}, {})
    _, staged = prepared(tmp_path, changes={"layers": layers})
    assert staged["layer_types"] == ["sliding_attention", "full_attention"]
    assert staged["sliding_window"] == 64


def test_position_range_follows_the_target(tmp_path):
    _, staged = prepared(tmp_path, changes={"rope": {"max_position_embeddings": 128}})
    assert staged["max_position_embeddings"] == 4096


@pytest.mark.parametrize("asked", [0, 4, 20])
def test_number_of_drafts_is_checked_against_the_block(tmp_path, asked):
    with pytest.raises(DFlashError, match=rf"is {asked} but a block of 4 drafts 3"):
        prepared(tmp_path, spec_tokens=asked)


def test_a_drafter_of_the_last_layers_output_is_refused(tmp_path):
    """Features come from ``hidden_states``, whose last entry is behind the target's norm."""
    target = tiny_target()
    out = target.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert torch.equal(out.hidden_states[4], out.last_hidden_state)
    with pytest.raises(DFlashError, match=r"\[0, 3\], and vLLM gives .* last one \(3\) without"):
        prepared(tmp_path, changes={"target_layer_ids": (0, 3)})


def test_a_dflash2_drafter_is_staged_under_our_architecture(tmp_path):
    """vLLM takes it for a DFlash drafter, and so its own DFlash 2 never gets it."""
    _, staged = prepared(tmp_path, changes=DFLASH2)
    assert args.speculative_config["method"] == "dflash"
    assert staged["architectures"] == [ARCHITECTURE]
    assert set(staged["dflash_config"]) == {"mask_token_id", "target_layer_ids"}
    assert staged["dflash_plugin"]["config"]["selector"] == DFLASH2["selector"].model_dump()


def test_a_target_with_more_tokens_than_the_codebooks_is_refused(tmp_path):
    with pytest.raises(DFlashError, match="selector knows 90 tokens but the target has 97"):
        prepared(tmp_path, changes={**DFLASH2, "vocab_size": 90})


def test_draft_logits_are_those_of_the_last_pass():
    """Requests stand in any order; padding behind them writes to none."""
    draft_logits = DraftLogits((3, 2, 10), 2, torch.device("cpu"))
    positions = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    scores = torch.arange(8.0).view(4, 2)
    first = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    draft_logits.write(first, scores, torch.tensor([2, 2, 0, 0]), positions)
    second = torch.tensor([[2, 9], [0, 3], [5, 6], [7, 8]])
    draft_logits.write(second, scores + 10, torch.tensor([2, 2, -1, -1]), positions)
    expected = torch.full((3, 2, 10), float("-inf"))
    for request, position, tokens, values in (
        (2, 0, [2, 9], [10.0, 11.0]),
        (2, 1, [0, 3], [12.0, 13.0]),
        (0, 0, [5, 6], [4.0, 5.0]),
        (0, 1, [7, 8], [6.0, 7.0]),
    ):
        expected[request, position, tokens] = torch.tensor(values)
    assert torch.equal(draft_logits.logits, expected)


def test_fewer_drafts_may_be_asked_for(tmp_path):
    args, _ = prepared(tmp_path, spec_tokens=2)
    assert args.speculative_config["num_speculative_tokens"] == 2


def test_an_anchor_that_drafts_makes_one_more(tmp_path):
    args, _ = prepared(tmp_path, changes={"sample_from_anchor": True})
    assert args.speculative_config["num_speculative_tokens"] == 4


def test_setting_given_twice_is_refused():
    args = engine_args(spec_model="a", speculative_config={"method": "dflash", "model": "b"})
    with pytest.raises(DFlashError, match="both give 'model'"):
        arguments.prepare(args, TARGET)


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "eagle3", "model": "x"}, {"method": "ngram"}, {"model": "some/draft"}],
)
def test_other_methods_are_left_alone(settings):
    args = engine_args(speculative_config=dict(settings))
    arguments.prepare(args, TARGET)
    assert args.speculative_config == settings


def test_method_is_known_by_the_drafters_name(tmp_path):
    args = engine_args(speculative_config={"model": str(write_tiny(tmp_path / "x-DFlash"))})
    arguments.prepare(args, TARGET)
    assert args.speculative_config["method"] == "dflash"


def test_missing_drafter_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = engine_args(spec_method="dflash", spec_model=str(tmp_path / "nowhere"))
    with pytest.raises(DFlashError, match="nowhere' is neither a directory nor"):
        arguments.prepare(args, TARGET)
    with pytest.raises(DFlashError, match="needs a drafter"):
        arguments.prepare(engine_args(spec_method="dflash"), TARGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 64}, "64 wide but the target's hidden_size is 32"),
        ({"target_layer_ids": (0, 7), "num_target_layers": 8}, "target layer 7 but the target"),
        ({"vocab_size": 200, "mask_token_id": 150}, "mask_token_id 150 is outside"),
    ],
)
def test_drafter_of_another_target_is_refused(tmp_path, changes, message):
    with pytest.raises(DFlashError, match=message):
        prepared(tmp_path, changes=changes)


def test_dummy_weights_are_neither_loaded_nor_checked(tmp_path):
    args, staged = prepared(tmp_path, load_format="dummy")
    assert "draft_load_config" not in args.speculative_config
    assert staged["dflash_plugin"]["options"]["known_answers"] == "off"


@pytest.mark.parametrize(("version", "drops"), [("0.31.0", True), ("0.33.0", False)])
def test_cached_blocks_are_kept_where_the_version_drops_them(tmp_path, monkeypatch, version, drops):
    monkeypatch.setattr(compat, "installed", lambda: version)
    args, _ = prepared(tmp_path)
    assert args.speculative_config.get("disable_eagle_block_drop", False) is drops


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0.0", "dev"])
def test_unsupported_version_stops_with_its_reason(tmp_path, monkeypatch, version):
    monkeypatch.setattr(compat, "installed", lambda: version)
    with pytest.raises(DFlashError, match=rf"vLLM {version} is not supported.*0\.31, 0\.32, 0\.33"):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("version", "switch", "all_of_it"),
    [("0.32.1", "on", True), ("0.32.1", "off", False), ("0.99.0", "on", False)],
)
def test_only_the_flags_where_the_plugin_is_off_or_the_version_unknown(
    monkeypatch, version, switch, all_of_it
):
    patched = []
    monkeypatch.setattr(compat, "installed", lambda: version)
    monkeypatch.setenv("DFLASH_PLUGIN", switch)
    monkeypatch.setattr(engine_surface, "after_import", lambda name, _: patched.append(name))
    plugin.activate()
    assert patched[:2] == ["vllm.engine.arg_utils"] * 2
    assert (len(patched) > 2) is all_of_it


def test_every_patch_of_the_table_has_its_function():
    """Those that import vLLM are there too: their source defines them."""
    made = {(module, symbol) for module, symbol, _ in plugin.FLAGS + plugin.PATCHES}
    assert made == {row[:2] for row in surface.SEAMS if row.kind in ("patch", "hook")}
    for _, _, maker in plugin.FLAGS + plugin.PATCHES:
        module, function = maker.split(":")
        assert callable(getattr(importlib.import_module(f"dflash_plugin.vllm.{module}"), function))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"known_answer": "off"}, "dflash_plugin.known_answer is 'off'"),
        ({"acceptance_warning": 2}, "dflash_plugin.acceptance_warning is 2"),
        ("on", "dflash_plugin is 'on'"),
    ],
)
def test_wrong_option_is_named(values, message):
    with pytest.raises(DFlashError, match=message):
        read_options({"dflash_plugin": values})


def test_flags_are_long_names_of_vllms():
    parser = argparse.ArgumentParser()
    for _, native, attribute, _ in arguments.FLAGS:
        parser.add_argument(native, dest=attribute, default=None)
    arguments.add_flags(parser)
    given = parser.parse_args(
        "--speculative-method dflash --speculative-model D --num-speculative-tokens 5".split()
    )
    assert (given.spec_method, given.spec_model, given.spec_tokens) == ("dflash", "D", 5)
    assert parser.parse_args([]).spec_method is None


@pytest.mark.parametrize(
    ("value", "off"), [("off", True), ("OFF", True), ("0", True), ("on", False)]
)
def test_switch(monkeypatch, value, off):
    monkeypatch.setenv("DFLASH_PLUGIN", value)
    assert plugin.is_off() is off


def test_a_configuration_without_our_entry_is_not_ours():
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    assert drafter_spec(SimpleNamespace(draft_model_config=draft)) is None
    assert drafter_spec(SimpleNamespace(draft_model_config=None)) is None
    assert drafter_spec(None) is None


def test_only_the_native_class_is_substituted(monkeypatch):
    class Native:
        def __init__(self, vllm_config):
            self.config = vllm_config

    class Other(Native):
        pass

    class Ours(Native):
        pass

    monkeypatch.setattr(plugin, "drafter_spec", lambda speculative_config: speculative_config)
    plugin.substitute(Native, Ours)
    with_ours, without = (SimpleNamespace(speculative_config=value) for value in (1, None))
    assert type(Native(with_ours)) is Ours
    assert Native(with_ours).config is with_ours
    assert type(Native(without)) is Native
    assert type(Other(with_ours)) is Other


def test_a_module_is_patched_when_it_is_imported_and_once(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    calls = []
    hooks.after_import("late_module", calls.append)
    hooks.after_import("late_module", calls.append)
    assert calls == []
    module = importlib.import_module("late_module")
    assert calls == [module]
    assert module.value == 1
    hooks.after_import("json", calls.append)
    assert calls[1:] == [sys.modules["json"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32])
def test_values_are_repeated_in_place(dtype):
    output = torch.full((7,), 9, dtype=dtype)
    values = torch.tensor([2, 0, 5], dtype=dtype)
    expand_kernel(output, values, torch.tensor([3, 4, 6], dtype=torch.int32), 0, 1)
    assert output.tolist() == [2, 2, 2, 1, 5, 5, 9]


def test_nothing_left_to_verify_needs_no_constraints():
    seen = []
    constrain = without_empty_rows(lambda logits, scale: seen.append(scale) or logits * scale)
    assert constrain(torch.zeros(0, 5), 2).shape == (0, 5)
    assert seen == []
    assert constrain(torch.ones(1, 5), 2).tolist() == [[2.0] * 5]


def test_adaptive_counts_go_where_a_steps_statistics_go(monkeypatch):
    """Those of steps whose statistics nobody gets go with the next ones."""
    stats = SimpleNamespace()
    counted, recorded = [], []

    class Outputs:
        __struct_fields__ = ("scheduler_stats",)

        def __init__(self, scheduler_stats, dflash=None):
            self.scheduler_stats, self.dflash = scheduler_stats, dflash
            self.__post_init__()

        def __post_init__(self):
            pass

    class Runner:
        adaptive_verification = None

        def sample_tokens(self, grammar_output):
            return SimpleNamespace(model_runner_output=SimpleNamespace())

    class Scheduler:
        def update_from_output(self, scheduler_output, model_runner_output):
            sent = (None, stats) if scheduler_output else (None,)
            return {client: Outputs(one) for client, one in enumerate(sent)}

    class Logger:
        def __init__(self, ours):
            self.spec_decoding_prom = SimpleNamespace(dflash=ours)

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
            recorded.append((scheduler_stats, engine_idx))

    Runner.sample_tokens = metrics.attach_counts(Runner.sample_tokens)
    Scheduler.update_from_output = metrics.send_counts(Scheduler.update_from_output)
    Logger.record = metrics.export_counts(Logger.record)
    monkeypatch.setattr(metrics, "count_budget", lambda *args: counted.append(args))
    ours = object.__new__(metrics.Metrics)
    ours.labels, ours.values = ("engine",), {2: ["2"]}
    runner, scheduler, logger = Runner(), Scheduler(), Logger(ours)
    for saved, is_sent in ((None, True), (3, True), (4, False), (9, True), (9, True)):
        if saved is not None:
            policy = SimpleNamespace(counts=lambda saved=saved: {"saved": saved})
            runner.adaptive_verification = object.__new__(adaptive.AdaptiveManager)
            runner.adaptive_verification.policy = policy
        scheduler.update_from_output(is_sent, runner.sample_tokens(None).model_runner_output)
        logger.record(stats if is_sent else None, None, mm_cache_stats=None, engine_idx=2)
    assert counted == [(("engine",), ["2"], {"saved": n}) for n in (3, 6)]
    assert recorded == [(stats, 2), (stats, 2), (None, 2), (stats, 2), (stats, 2)]
    Logger(None).record(stats, None)


@pytest.mark.parametrize(
    ("is_v2", "decodes", "backend", "expected"),
    [
        (True, "FULL", None, ("v2", "yes", "auto")),
        (True, "NONE", "FLASH_ATTN", ("v2", "no", "FLASH_ATTN")),
        # The V1 runner captures no graph of the draft pass.
        (False, "FULL", "TRITON_ATTN", ("v1", "no", "TRITON_ATTN")),
    ],
)
def test_the_metrics_tell_how_the_engine_runs_the_drafter(
    tmp_path, monkeypatch, is_v2, decodes, backend, expected
):
    shown = []

    class Gauge:
        def labels(self, *values):
            shown.append(values)
            return SimpleNamespace(set=shown.append)

    class Logger:
        def __init__(self, vllm_config, engine_indexes=None):
            ours = object.__new__(metrics.Metrics)
            ours.labels, ours.values = ("engine",), {0: ["0"]}
            made = ours if drafter_spec(vllm_config.speculative_config) else None
            self.spec_decoding_prom = SimpleNamespace(dflash=made)

    facts = ("runner", "draft_graphs", "attention_backend", "selector", "multimodal")
    monkeypatch.setattr(
        metrics,
        "engine_info",
        lambda labels, names: (labels, names) == (("engine",), facts) and Gauge(),
    )
    _, staged = prepared(tmp_path, changes=DFLASH2)
    draft = SimpleNamespace(hf_config=SimpleNamespace(**staged))
    config = SimpleNamespace(
        use_v2_model_runner=is_v2,
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(decode_mode=lambda: SimpleNamespace(name=decodes))
        ),
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        model_config=SimpleNamespace(is_multimodal_model=True),
        speculative_config=SimpleNamespace(draft_model_config=draft),
    )
    Logger.__init__ = metrics.tell_setup(Logger.__init__)
    Logger(config, [0])
    assert shown == [("0", *expected, "yes", "yes"), 1]
    config.speculative_config = None
    Logger(config)
    assert len(shown) == 2


@pytest.mark.parametrize("dialect", ["z-lab", "speculators", "specforge", "modelopt"])
def test_headers_say_what_the_whole_checkpoint_says(tmp_path, dialect):
    directory = write_tiny(tmp_path, dialect)
    whole = load_checkpoint(directory).config
    assert load_config(directory).model_copy(update={"dtype": whole.dtype}) == whole


def test_headers_are_checked_like_the_tensors(tmp_path):
    directory = write_tiny(tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "intermediate_size": 41}))
    with pytest.raises(DFlashError, match=r"mlp\.gate_proj\.weight' has shape"):
        load_config(directory)
