"""The parts of the vLLM adapter that need no vLLM; ``tests/vllm`` runs the rest in the engine."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import after_import as hooks
from dflash_plugin.serving import engine_surface
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.prometheus import WORKER_FACTS
from dflash_plugin.serving.sources import Source
from dflash_plugin.vllm import adaptive, arguments, compat, metrics, options, plugin, surface
from dflash_plugin.vllm.draft_logits import DraftLogits
from dflash_plugin.vllm.names import ARCHITECTURE
from dflash_plugin.vllm.options import drafter_spec, read_options
from dflash_plugin.vllm.workarounds import expand_kernel, without_empty_rows
from tests.checkpoints.test_open_spec import rewritten
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import DFLASH2, tiny_target, write_tiny

TARGET = SimpleNamespace(
    get_hidden_size=lambda: 32,
    get_total_num_hidden_layers=lambda: 4,
    get_vocab_size=lambda: 97,
    hf_text_config=SimpleNamespace(model_type="llama"),
    max_model_len=4096,
    is_hybrid=False,
)

# Of vLLM's speculative configuration.
KEYS = {
    "method",
    "model",
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
    "revision",
    "code_revision",
    "draft_load_config",
    "draft_sample_method",
    "rejection_sample_method",
    "enable_adaptive_verification",
    "quantization",
    "disable_eagle_block_drop",
    "draft_tensor_parallel_size",
}


def unreachable(model, **settings):
    raise OSError(f"no hub to ask for {model}")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arguments, "_load_config", lambda: "loader")
    monkeypatch.setattr(arguments, "redirected", lambda model: model)
    monkeypatch.setattr(options, "speculative_keys", lambda: KEYS)
    monkeypatch.setattr(compat, "installed", lambda: "0.33.0")
    # No hub is there.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    surface.surface.cache_clear()


def a_compilation(**values):
    open_to_vllm = ("cudagraph_capture_sizes", "max_cudagraph_capture_size", "cudagraph_mode")
    return SimpleNamespace(**{**dict.fromkeys(open_to_vllm), **values})


def engine_args(**values):
    given = {
        "speculative_config": None,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "additional_config": {},
        "download_dir": None,
        "load_format": "auto",
        "hf_token": None,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "enable_dbo": False,
        "ubatch_size": 0,
        "max_num_seqs": 8,
        "enforce_eager": False,
        "cudagraph_capture_sizes": None,
        "max_cudagraph_capture_size": None,
        "compilation_config": a_compilation(),
        "watermark_config": None,
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


@pytest.mark.parametrize("kind", ["W4A16", "ModelOpt FP8", "FP8 by block"])
@pytest.mark.parametrize("asked", [None, "its own", "other"])
def test_a_quantization_says_what_the_checkpoint_is(tmp_path, kind, asked):
    plain = write_tiny(tmp_path / "plain", intermediate_size=48)
    drafter = quantise(plain, tmp_path / "drafter", LAYOUTS[kind])
    named = {"W4A16": "compressed-tensors", "ModelOpt FP8": "modelopt", "FP8 by block": "fp8"}[kind]
    value = {None: None, "its own": named, "other": "awq"}[asked]
    args = engine_args(
        speculative_config={"method": "dflash", "model": str(drafter), "quantization": value}
    )
    if asked == "other":
        with pytest.raises(
            DFlashError, match=f"quantization of .* is 'awq', but .* quantised .* or give '{named}'"
        ):
            arguments.prepare(args, TARGET)
        return
    arguments.prepare(args, TARGET)
    assert "quantization" not in args.speculative_config
    staged = json.loads((Path(args.speculative_config["model"]) / "config.json").read_text())
    assert "quantization_config" not in staged
    assert staged["dflash_plugin"]["config"]["quantization"] == LAYOUTS[kind].named


def test_a_quantization_of_a_plain_drafter_is_refused(tmp_path):
    settings = {"method": "dflash", "model": str(write_tiny(tmp_path)), "quantization": "fp8"}
    with pytest.raises(
        DFlashError, match=r"is 'fp8', but .* is not quantised: leave it out; the op"
    ):
        arguments.prepare(engine_args(speculative_config=settings), TARGET)


@pytest.mark.parametrize("given", [None, "greedy", "probabilistic"])
@pytest.mark.parametrize("wanted", ["auto", "greedy", "probabilistic"])
def test_draft_sampling_is_vllms_sample_method(tmp_path, wanted, given):
    """Which "auto" leaves alone: drawn drafts cost memory in vLLM."""
    settings = {"method": "dflash", "model": str(write_tiny(tmp_path))}
    settings |= {} if given is None else {"draft_sample_method": given}
    args = engine_args(
        speculative_config=settings,
        additional_config={"dflash_plugin": {"draft_sampling": wanted}},
    )
    if wanted != "auto" and given not in (None, wanted):
        with pytest.raises(DFlashError, match=f"draft_sampling is '{wanted}' but .* is '{given}'"):
            arguments.prepare(args, TARGET)
        return
    arguments.prepare(args, TARGET)
    found = args.speculative_config.get("draft_sample_method")
    assert found == (given if wanted == "auto" else wanted)


@pytest.mark.parametrize(
    ("wanted", "changes", "expected"),
    [
        ("probabilistic", {}, "block"),
        ("probabilistic", {"rejection_sample_method": "standard"}, "standard"),
        ("greedy", {}, None),
        ("auto", {"draft_sample_method": "probabilistic"}, None),
    ],
)
def test_drawn_blocks_are_verified_whole(tmp_path, wanted, changes, expected):
    settings = {"method": "dflash", "model": str(write_tiny(tmp_path)), **changes}
    args = engine_args(
        speculative_config=settings,
        additional_config={"dflash_plugin": {"draft_sampling": wanted}},
    )
    arguments.prepare(args, TARGET)
    assert args.speculative_config.get("rejection_sample_method") == expected


@pytest.mark.parametrize(
    ("version", "watermark"), [("0.32.0", None), ("0.33.0", {"key": 1})], ids=["0.32", "watermark"]
)
def test_where_vllm_cannot_verify_blocks_its_own_method_stays(
    tmp_path, monkeypatch, version, watermark
):
    monkeypatch.setattr(compat, "installed", lambda: version)
    args = engine_args(
        speculative_config={"method": "dflash", "model": str(write_tiny(tmp_path))},
        additional_config={"dflash_plugin": {"draft_sampling": "probabilistic"}},
        watermark_config=watermark,
    )
    arguments.prepare(args, TARGET)
    assert "rejection_sample_method" not in args.speculative_config


def test_preparing_twice_changes_nothing(tmp_path):
    args, _ = prepared(tmp_path)
    before = dict(args.speculative_config)
    arguments.prepare(args, TARGET)
    assert args.speculative_config == before


def test_layers_are_listed_in_the_order_in_which_vllm_collects_them(tmp_path):
    _, staged = prepared(tmp_path, changes={"target_layer_ids": (2, -1, 0)})
    assert staged["dflash_config"]["target_layer_ids"] == [-1, 0, 2]
    assert staged["dflash_plugin"]["config"]["target_layer_ids"] == [2, -1, 0]


@pytest.mark.parametrize("mode", [None, "FULL_AND_PIECEWISE"])
def test_prompts_are_captured_where_nobody_says_what_is(tmp_path, mode):
    _, staged = prepared(tmp_path, compilation_config=a_compilation(cudagraph_mode=mode))
    assert staged["dflash_plugin"]["captures_prompts"] is (mode is None)


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


def without_block(directory: Path) -> Path:
    """A checkpoint whose file names no block, as NVIDIA's for Nemotron."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({name: v for name, v in raw.items() if name != "block_size"}))
    return directory


def test_a_drafter_without_a_block_has_the_one_that_is_asked_for(tmp_path):
    directory = without_block(write_tiny(tmp_path / "drafter"))
    args = engine_args(spec_method="dflash", spec_model=str(directory), spec_tokens=5)
    arguments.prepare(args, TARGET)
    staged = json.loads((Path(args.speculative_config["model"]) / "config.json").read_text())
    assert args.speculative_config["num_speculative_tokens"] == 5
    assert staged["block_size"] == 6
    for asked in (None, 0):
        args = engine_args(spec_method="dflash", spec_model=str(directory), spec_tokens=asked)
        with pytest.raises(DFlashError, match=r"block_size is (missing: ask the engine|1: give)"):
            arguments.prepare(args, TARGET)


def test_the_last_layers_output_is_asked_for_like_any_other(tmp_path):
    """vLLM gives it before the norm; features have it behind, as ``hidden_states`` does."""
    target = tiny_target()
    out = target.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert torch.equal(out.hidden_states[4], out.last_hidden_state)
    _, staged = prepared(tmp_path, changes={"target_layer_ids": (0, 3)})
    assert staged["dflash_config"]["target_layer_ids"] == [0, 3]


def test_a_dflash2_drafter_is_staged_under_our_architecture(tmp_path):
    """vLLM takes it for a DFlash drafter, and so its own DFlash 2 never gets it."""
    args, staged = prepared(tmp_path, changes=DFLASH2)
    assert args.speculative_config["method"] == "dflash"
    assert staged["architectures"] == [ARCHITECTURE]
    assert set(staged["dflash_config"]) == {"mask_token_id", "target_layer_ids"}
    assert staged["dflash_plugin"]["config"]["selector"] == DFLASH2["selector"].model_dump()


@pytest.mark.parametrize("rows", [90, 104])
def test_a_drafter_is_staged_with_the_targets_vocabulary(tmp_path, rows):
    _, staged = prepared(tmp_path, changes={**DFLASH2, "vocab_size": rows})
    assert staged["dflash_plugin"]["config"]["vocab_size"] == staged["vocab_size"] == 97
    assert staged["dflash_plugin"]["embedding_factor"] == 1.0


def test_the_factor_of_a_gemma_target_is_staged(tmp_path, monkeypatch):
    gemma = SimpleNamespace(model_type="gemma3_text", hidden_size=32)
    monkeypatch.setattr(TARGET, "hf_text_config", gemma)
    _, staged = prepared(tmp_path)
    assert staged["dflash_plugin"]["embedding_factor"] == pytest.approx(32**0.5)


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


@pytest.mark.parametrize("is_hybrid", [False, True])
@pytest.mark.parametrize("last", [0, 1])
def test_steps_without_drafts_are_refused_beside_recurrent_layers(tmp_path, is_hybrid, last):
    table = [[1, 4, 3], [5, 64, last]]
    args = engine_args(
        speculative_config={
            "method": "dflash",
            "model": str(write_tiny(tmp_path / "d")),
            "num_speculative_tokens_per_batch_size": table,
        }
    )
    target = SimpleNamespace(**{**vars(TARGET), "is_hybrid": is_hybrid})
    if is_hybrid and not last:
        with pytest.raises(DFlashError, match=r"no drafts in \[5, 64, 0\].* give 1 or more"):
            arguments.prepare(args, target)
        return
    arguments.prepare(args, target)
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == table


def test_what_spreads_a_server_is_checked_with_the_drafters_sizes(tmp_path):
    args, _ = prepared(tmp_path, tensor_parallel_size=3)
    assert args.speculative_config["draft_tensor_parallel_size"] == 1
    with pytest.raises(DFlashError, match="pipeline_parallel_size is 2"):
        prepared(tmp_path / "other", pipeline_parallel_size=2)


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


@pytest.mark.parametrize("dialect", ["z-lab", "speculators", "specforge", "modelopt"])
@pytest.mark.parametrize("name", ["drafter", "eagle3-and-others"])
def test_method_is_known_by_the_checkpoint(tmp_path, dialect, name):
    args = engine_args(speculative_config={"model": str(write_tiny(tmp_path / name, dialect))})
    arguments.prepare(args, TARGET)
    assert args.speculative_config["method"] == "dflash"
    assert args.speculative_config["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("x", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}),
        ("x", {"architectures": ["Qwen3DSparkModel"], "dflash_config": {"mask_token_id": 3}}),
        ("x", {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}),
        ("dflash/eagle3-x", {"architectures": ["LlamaForCausalLMEagle3"]}),
        ("dflash/eagle-x", {"architectures": ["EAGLEModel"]}),
        ("x", {"architectures": "DFlashDraftModel"}),
        ("x", None),
    ],
)
def test_other_checkpoints_stay_vllms(tmp_path, name, raw):
    place = tmp_path / name
    place.mkdir(parents=True)
    if raw is not None:
        (place / "config.json").write_text(json.dumps(raw))
    settings = {"model": str(place), "num_speculative_tokens": 2}
    args = engine_args(speculative_config=dict(settings))
    arguments.prepare(args, TARGET)
    assert args.speculative_config == settings


def test_an_unsupported_vllm_is_left_alone_where_dflash_is_not_asked_for(tmp_path, monkeypatch):
    """Nothing of it is called or read, as it may have changed."""

    def gone(model):
        raise ImportError("this vLLM has no redirects")

    monkeypatch.setattr(compat, "installed", lambda: "0.99.0")
    monkeypatch.setattr(arguments, "redirected", gone)
    for settings in ({"model": str(write_tiny(tmp_path / "x"))}, {"method": "ngram"}, {}):
        args = engine_args(speculative_config=dict(settings))
        arguments.prepare(args, TARGET)
        assert args.speculative_config == settings


def test_a_malformed_dflash_checkpoint_is_named_and_not_left_to_vllm(tmp_path):
    drafter = write_tiny(tmp_path / "drafter")
    raw = json.loads((drafter / "config.json").read_text())
    del raw["block_size"]
    (drafter / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DFlashError, match="block_size"):
        arguments.prepare(engine_args(speculative_config={"model": str(drafter)}), TARGET)


def speculators(tmp_path, suggested):
    """A block of 4, whose file suggests a number of speculative tokens."""
    place = write_tiny(tmp_path / "speculator", "speculators")
    raw = json.loads((place / "config.json").read_text())
    raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = suggested
    (place / "config.json").write_text(json.dumps(raw))
    return str(place)


@pytest.mark.parametrize(("suggested", "drafted"), [(4, 3), (3, 3), (2, 2)])
def test_what_a_main_model_suggests_is_at_most_a_block(tmp_path, caplog, suggested, drafted):
    """vLLM makes this speculative configuration of a speculators checkpoint."""
    place = speculators(tmp_path, suggested)
    settings = {"method": "dflash", "model": place, "num_speculative_tokens": suggested}
    args = engine_args(speculative_config=settings)
    arguments.prepare(args, TARGET)
    assert args.speculative_config["num_speculative_tokens"] == drafted
    warned = "suggests 4 speculative tokens, but a block of 4 drafts 3" in caplog.text
    assert warned is (suggested > drafted)


def test_more_drafts_than_suggested_and_drafted_are_refused(tmp_path):
    settings = {"method": "dflash", "model": speculators(tmp_path, 4), "num_speculative_tokens": 5}
    with pytest.raises(DFlashError, match="is 5 but a block of 4 drafts 3"):
        arguments.prepare(engine_args(speculative_config=settings), TARGET)


@pytest.mark.parametrize(
    ("given", "flag", "seen"),
    [
        (None, 2, ({"num_speculative_tokens": 2}, None)),
        ({"model": "x"}, 2, ({"model": "x", "num_speculative_tokens": 2}, None)),
        ({"num-speculative-tokens": 3}, 2, ({"num-speculative-tokens": 3}, 2)),
        ({"num_speculative_tokens": 3}, None, ({"num_speculative_tokens": 3}, None)),
        (None, None, (None, None)),
    ],
)
def test_the_flags_number_is_seen_where_a_main_model_is_resolved(given, flag, seen):
    """And two numbers are left for the message that names both places."""
    args = engine_args(speculative_config=given, spec_tokens=flag)
    create = arguments.create_engine_config(
        lambda self, usage: (usage, (self.speculative_config, self.spec_tokens))
    )
    assert create(args, "usage") == ("usage", seen)


def overridden(model, given=None, revision=None):
    """What is made of a main model that is no speculators checkpoint to vLLM."""

    def native(model, tokenizer, trust_remote_code, revision=None, vllm_speculative_config=None):
        return model, tokenizer, vllm_speculative_config

    override = arguments.maybe_override_with_speculators(native)
    return override(
        model=str(model),
        tokenizer=None,
        trust_remote_code=False,
        revision=revision,
        vllm_speculative_config=given,
    )


def test_open_spec_config_is_a_main_model_too(tmp_path):
    place = rewritten(write_tiny(tmp_path / "d", "speculators"), verifier="org/target")
    settings = {"method": "dflash", "model": str(place)}
    assert overridden(place) == ("org/target", "org/target", settings)
    given = {"num_speculative_tokens": 2, "model": "other", "method": "ngram"}
    assert overridden(place, given)[2] == {**settings, "num_speculative_tokens": 2}


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_main_model_is_read_from_the_hubs_cache(tmp_path, monkeypatch, revision):
    """vLLM has put its configuration there by then."""
    asked, place = [], rewritten(write_tiny(tmp_path / "d", "speculators"), verifier="org/target")

    def look(model, name, revision):
        asked.append((model, name, revision))
        return str(place / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    assert overridden("org/drafter", revision=revision)[0] == "org/target"
    assert asked == [("org/drafter", "config.json", revision)]


@pytest.mark.parametrize("changes", [{"method": "eagle3"}, {"verifier": None}, {"verifier": 3}])
def test_other_main_models_stay_as_they_are(tmp_path, changes):
    place = rewritten(write_tiny(tmp_path / "d", "speculators"), **changes)
    for model in (
        place,
        write_tiny(tmp_path / "z"),
        tmp_path / "nowhere",
        "org/target",
        "s3://b/t",
    ):
        assert overridden(model, {"method": "ngram"}) == (str(model), None, {"method": "ngram"})


def test_what_vllm_resolves_itself_stays(tmp_path):
    override = arguments.maybe_override_with_speculators(lambda model: ("target", "target", {}))
    place = rewritten(write_tiny(tmp_path / "d", "speculators"), verifier="org/target")
    assert override(model=str(place)) == ("target", "target", {})


def test_a_checkpoint_names_a_local_target_where_vllm_lets_it(tmp_path, monkeypatch):
    place = rewritten(write_tiny(tmp_path / "d", "speculators"), verifier=str(tmp_path))
    with pytest.raises(DFlashError, match=rf"serve '{tmp_path}' with --speculative-method dflash"):
        overridden(place)
    monkeypatch.setattr(compat, "installed", lambda: "0.32.0")
    assert overridden(place)[0] == str(tmp_path)


def test_the_source_is_what_vllms_settings_say(monkeypatch):
    args = engine_args(hf_token="secret", download_dir="/there")
    monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)
    assert arguments.source_of(args, {"revision": "v2"}) == Source("v2", "/there", "secret", False)
    for value, modelscope in (("True", True), ("1", True), ("", False), ("0", False)):
        monkeypatch.setenv("VLLM_USE_MODELSCOPE", value)
        assert arguments.source_of(engine_args(), {}) == Source(modelscope=modelscope)


def test_the_source_and_a_redirected_name_reach_the_hub(tmp_path, monkeypatch):
    asked, place = [], write_tiny(tmp_path / "drafter")

    def fetch(model, **settings):
        asked.append((model, settings))
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(arguments, "redirected", lambda model: "org/other")
    settings = {"method": "dflash", "model": "org/drafter", "revision": "v2", "code_revision": "v2"}
    args = engine_args(speculative_config=settings, hf_token="secret", download_dir="/there")
    arguments.prepare(args, TARGET)
    [(model, found)] = asked
    assert model == "org/other"
    assert (found["revision"], found["cache_dir"], found["token"]) == ("v2", "/there", "secret")
    # They are the repository's, and the staged directory has none.
    assert not {"revision", "code_revision"} & args.speculative_config.keys()


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


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        (
            {"dflash_plugin": {"draft-weights": "fp8"}},
            r"no such option, did you mean draft_weights\?",
        ),
        ({"dflash-plugin": {"draft_weights": "fp8"}}, "has 'dflash-plugin': write 'dflash_plugin'"),
        ({"dflash_plugins": {}}, "has 'dflash_plugins': write 'dflash_plugin'"),
    ],
)
def test_misspelt_options_are_told_with_the_nearest(additional, message):
    with pytest.raises(DFlashError, match=message):
        read_options(additional)


def test_other_plugins_options_are_theirs():
    assert read_options({"ascend_scheduler_config": {}, "x": 1}) == read_options(None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"num_speculative_token": 3},
            "vLLM 0.33.0 does not know: did you mean 'num_speculative_tokens'",
        ),
        ({"xyz": 3}, "'xyz', which vLLM 0.33.0 does not know: leave it out"),
        (
            {"draft_weights": "fp8"},
            r"of dflash-plugin: .*-config '{\"dflash_plugin\": {\"draft_weights\": \"fp8\"}}'",
        ),
        (
            {"dflash_plugin": {"dialect": "z-lab"}},
            r"--additional-config '{\"dflash_plugin\": {\"dialect\": \"z-lab\"}}'",
        ),
    ],
)
def test_settings_that_vllm_does_not_know_are_told(tmp_path, setting, message):
    with pytest.raises(DFlashError, match=message):
        prepared(tmp_path, speculative_config=setting)


def test_variables_that_are_options_in_sglang_alone_are_told(monkeypatch, caplog):
    monkeypatch.setenv("DFLASH_PLUGIN_DRAFT_WEIGHT", "fp8")
    monkeypatch.setenv("DFLASH_PLUGIN_SERVICE_HOST", "10.0.0.1")
    assert read_options({}).draft_weights == "auto"
    [record] = caplog.records
    assert "DFLASH_PLUGIN_DRAFT_WEIGHT is 'fp8'" in record.getMessage()
    assert (
        """--additional-config '{"dflash_plugin": {"draft_weights": …}}'""" in record.getMessage()
    )


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
    counted, recorded, gauged, sampled = [], [], [], []

    class Outputs:
        __struct_fields__ = ("scheduler_stats",)

        def __init__(self, scheduler_stats, dflash=None):
            self.scheduler_stats, self.dflash = scheduler_stats, dflash
            self.__post_init__()

        def __post_init__(self):
            pass

    class Worker:
        def __init__(self):
            self.model_runner = SimpleNamespace(adaptive_verification=None)
            self.inner = SimpleNamespace()

        def sample_tokens(self, grammar_output):
            # The V2 runner's output, the V1 runner's with and without asynchronous scheduling.
            wrapped = {"model_runner_output": self.inner}, {"_model_runner_output": self.inner}
            number = len(sampled) % 3
            sampled.append(number)
            return SimpleNamespace(**wrapped[number]) if number < 2 else self.inner

    class Scheduler:
        vllm_config, running = SimpleNamespace(dflash_counts={"kv_cache_groups": 5}), []

        def update_from_output(self, scheduler_output, model_runner_output):
            sent = (None, stats) if scheduler_output else (None,)
            return {client: Outputs(one) for client, one in enumerate(sent)}

    class Logger:
        def __init__(self, ours):
            self.spec_decoding_prom = SimpleNamespace(dflash=ours)

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
            recorded.append((scheduler_stats, engine_idx))

    Worker.sample_tokens = metrics.attach_counts(Worker.sample_tokens)
    Scheduler.update_from_output = metrics.send_counts(Scheduler.update_from_output)
    Logger.record = metrics.export_counts(Logger.record)
    monkeypatch.setattr(metrics, "count_budget", lambda *args: counted.append(args))
    ours = object.__new__(metrics.Metrics)
    ours.labels, ours.values = ("engine",), {2: ["2"]}
    gauge = SimpleNamespace(labels=lambda *names: SimpleNamespace(set=gauged.append))
    ours.cache = {"kv_cache_groups": gauge}
    facts = ("FLASH_ATTN", "FLASH_ATTN+GDN_ATTN", "no")
    told = SimpleNamespace(
        labels=lambda *values: SimpleNamespace(set=lambda one: gauged.append((*values, one)))
    )
    monkeypatch.setattr(metrics, "worker_info", lambda labels: told)
    worker, scheduler, logger = Worker(), Scheduler(), Logger(ours)
    metrics.attach(
        worker, {f"{name}:{value}": 1 for name, value in zip(WORKER_FACTS, facts, strict=True)}
    )
    for saved, is_sent in ((None, True), (3, True), (4, False), (9, True), (9, True)):
        if saved is not None:
            policy = SimpleNamespace(counts=lambda saved=saved: {"saved": saved})
            manager = object.__new__(adaptive.AdaptiveManager)
            manager.policy, manager.steps = policy, saved
            worker.model_runner.adaptive_verification = manager
        worker.inner = SimpleNamespace()
        worker.sample_tokens(None)
        scheduler.update_from_output(is_sent, worker.inner)
        logger.record(stats if is_sent else None, None, mm_cache_stats=None, engine_idx=2)
    assert counted == [(("engine",), ["2"], {"saved": n}) for n in (3, 6)]
    assert gauged == [5, ("2", *facts, 1)], "once, with the first statistics"
    assert recorded == [(stats, 2), (stats, 2), (None, 2), (stats, 2), (stats, 2)]
    Logger(None).record(stats, None)


def test_counts_are_sent_now_and_then_and_with_the_last_request():
    sent = []

    class Outputs:
        __struct_fields__ = ("scheduler_stats",)

        def __init__(self, scheduler_stats, dflash=None):
            self.scheduler_stats, self.dflash = scheduler_stats, dflash

        def __post_init__(self):
            pass

    class Scheduler:
        vllm_config, running = SimpleNamespace(), ["a request"]

        def update_from_output(self, scheduler_output, model_runner_output):
            return {0: Outputs("statistics")}

    class Worker:
        def sample_tokens(self):
            return SimpleNamespace()

    update = metrics.send_counts(Scheduler.update_from_output)
    sample = metrics.attach_counts(Worker.sample_tokens)
    worker, scheduler = Worker(), Scheduler()
    manager = object.__new__(adaptive.AdaptiveManager)
    manager.steps, manager.policy = 0, SimpleNamespace(counts=lambda: {"saved": manager.steps})
    worker.model_runner = SimpleNamespace(adaptive_verification=manager)

    def step(chooses):
        manager.steps += chooses
        output = sample(worker)
        (one,) = update(scheduler, None, output).values()
        sent.append(one.dflash)
        return metrics.attached(output)

    step(True)
    for _ in range(2 * metrics.SENT_AFTER):
        step(True)
    after = metrics.SENT_AFTER - 1
    grown = {"saved": metrics.SENT_AFTER}
    assert sent == [{"saved": 1}, *[None] * after, grown, *[None] * after, grown]
    sent.clear()
    assert step(True) is not None
    assert step(False) is None, "a step that bypasses the choice counts nothing"
    scheduler.running = []
    step(True)
    step(False)
    assert sent == [None, None, {"saved": 2}, None]


@pytest.mark.parametrize(("is_v2", "expected"), [(True, "v2"), (False, "v1")])
def test_the_metrics_tell_how_the_engine_runs_the_drafter(tmp_path, monkeypatch, is_v2, expected):
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

    facts = ("runner", "selector", "multimodal")
    monkeypatch.setattr(
        metrics,
        "engine_info",
        lambda labels, names: (labels, names) == (("engine",), facts) and Gauge(),
    )
    _, staged = prepared(tmp_path, changes=DFLASH2)
    draft = SimpleNamespace(hf_config=SimpleNamespace(**staged))
    config = SimpleNamespace(
        use_v2_model_runner=is_v2,
        model_config=SimpleNamespace(is_multimodal_model=True),
        speculative_config=SimpleNamespace(draft_model_config=draft),
    )
    Logger.__init__ = metrics.tell_setup(Logger.__init__)
    Logger(config, [0])
    assert shown == [("0", expected, "yes", "yes"), 1]
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


def test_adaptive_verification_beside_chunked_attention_is_refused():
    arguments.refuse_adaptive(SimpleNamespace(attention_chunk_size=None))
    arguments.refuse_adaptive(SimpleNamespace())
    with pytest.raises(DFlashError, match=r"enable_adaptive_verification .*chunk_size is 8192"):
        arguments.refuse_adaptive(SimpleNamespace(attention_chunk_size=8192))
