"""The parts of the SGLang adapter that need no SGLang."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from prometheus_client import REGISTRY
from torch import Tensor

from dflash_plugin.decoding.draft_sampling import FACTORS, sharpen
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving.prometheus import WORKER_FACTS
from dflash_plugin.sglang import arguments, compat, metrics, penalties, register, sampling
from dflash_plugin.sglang.names import ARCHITECTURE
from dflash_plugin.sglang.options import DrafterSpec, Options, drafter_spec, read_options
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import DFLASH2, tiny_config, write_tiny

TARGET = SimpleNamespace(
    hidden_size=32,
    num_hidden_layers=4,
    vocab_size=97,
    max_position_embeddings=512,
    model_type="llama",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compat, "installed", lambda: "0.5.17")
    monkeypatch.setattr(arguments, "target_config", lambda server_args: TARGET)


def server_args(drafter: Path | None, **changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": drafter and str(drafter),
        "speculative_draft_model_revision": "main",
        "speculative_num_draft_tokens": None,
        "speculative_dflash_block_size": None,
        "download_dir": None,
        "context_length": None,
        "load_format": "auto",
        "quantization": None,
        "speculative_draft_model_quantization": None,
        "device": "cuda",
        "tp_size": 1,
        "pp_size": 1,
        "attn_cp_size": 1,
        "dcp_size": 1,
        "enable_prefill_cp": False,
        "enable_two_batch_overlap": False,
        "enable_lora": None,
        "lora_paths": None,
        "enable_dp_attention": False,
        "disaggregation_mode": "null",
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("flag", arguments.BLOCK_ARGUMENTS)
def test_a_drafter_without_a_block_has_the_one_that_is_asked_for(tmp_path, flag):
    drafter = write_tiny(tmp_path / "drafter")
    raw = json.loads((drafter / "config.json").read_text())
    del raw["block_size"]
    (drafter / "config.json").write_text(json.dumps(raw))
    args = server_args(drafter, **{flag: 6})
    arguments.prepare(args)
    staged = json.loads((Path(args.speculative_draft_model_path) / "config.json").read_text())
    assert staged["block_size"] == 6
    with pytest.raises(DFlashError, match="block_size is missing: ask the engine"):
        arguments.prepare(server_args(drafter))


def test_a_drafter_that_no_rank_shares_has_its_heads_on_each(tmp_path):
    """SGLang gives a rank's cache and attention the staged heads by the number of ranks."""
    whole = write_tiny(tmp_path / "drafter", num_attention_heads=3, num_key_value_heads=3)
    args = server_args(whole, tp_size=2)
    arguments.prepare(args)
    staged = Path(args.speculative_draft_model_path)
    config = json.loads((staged / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 6)
    spec = drafter_spec(staged)
    assert spec is not None
    assert spec.config.num_attention_heads == 3


def test_arguments_lead_to_a_staged_draft_model(tmp_path):
    drafter = write_tiny(tmp_path / "drafter", target_layer_ids=(2, 0))
    (drafter / "optimizer.safetensors").write_bytes(b"what SGLang could not read")
    args = server_args(drafter, context_length=4096)
    arguments.prepare(args)
    staged = Path(args.speculative_draft_model_path)
    config = json.loads((staged / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    assert config["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [0, 2]}
    assert config["block_size"] == args.speculative_num_draft_tokens == 4
    assert config["max_position_embeddings"] == 32768
    assert (staged / "model.safetensors").resolve() == (drafter / "model.safetensors").resolve()
    assert not (staged / "optimizer.safetensors").exists()
    spec = drafter_spec(staged)
    assert spec is not None
    assert spec.config.target_layer_ids == (2, 0)
    assert spec.options == Options()
    assert args.speculative_draft_model_revision is None


@pytest.mark.parametrize("dialect", ["z-lab", "speculators"])
def test_a_dflash_drafter_without_an_algorithm_is_not_left_unused(tmp_path, dialect):
    drafter = write_tiny(tmp_path / "drafter", dialect)
    args = server_args(drafter, speculative_algorithm=None)
    message = r"drafter', a DFlash drafter, .*: give --speculative-algorithm DFLASH"
    with pytest.raises(DFlashError, match=message):
        arguments.handle_speculative_decoding(lambda server_args: "native", args)


@pytest.mark.parametrize("raw", [None, {"architectures": ["LlamaForCausalLMEagle3"]}])
def test_other_drafters_and_algorithms_stay_sglangs(tmp_path, raw):
    if raw is not None:
        (tmp_path / "config.json").write_text(json.dumps(raw))
    for path in (tmp_path, None):
        args = server_args(path, speculative_algorithm=None)
        assert arguments.handle_speculative_decoding(lambda server_args: "native", args) == "native"
    args = server_args(write_tiny(tmp_path / "drafter"), speculative_algorithm="EAGLE3")
    before = dict(vars(args))
    assert arguments.handle_speculative_decoding(lambda server_args: "native", args) == "native"
    assert vars(args) == before


def test_the_source_is_what_the_arguments_say(tmp_path, monkeypatch):
    asked, place = [], write_tiny(tmp_path / "drafter")

    def fetch(model, **settings):
        asked.append((model, settings))
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    args = server_args(
        None,
        speculative_draft_model_path="org/drafter",
        speculative_draft_model_revision="v2",
        download_dir="/there",
    )
    arguments.prepare(args)
    [(model, found)] = asked
    assert model == "org/drafter"
    assert (found["revision"], found["cache_dir"], found["token"]) == ("v2", "/there", None)


def test_preparing_twice_changes_nothing(tmp_path):
    args = server_args(write_tiny(tmp_path / "drafter"))
    arguments.prepare(args)
    once = dict(vars(args))
    arguments.prepare(args)
    assert vars(args) == once


def test_the_targets_quantization_is_not_the_drafters(tmp_path):
    """SGLang gives the draft model the target's unless it is told otherwise."""
    args = server_args(
        write_tiny(tmp_path / "drafter"),
        quantization="awq",
        speculative_draft_model_quantization="awq",
    )
    arguments.prepare(args)
    assert args.quantization == "awq"
    assert args.speculative_draft_model_quantization is None
    args.speculative_draft_model_quantization = "awq"
    arguments.prepare(args)
    assert args.speculative_draft_model_quantization is None


@pytest.mark.parametrize("kind", ["W4A16", "ModelOpt NVFP4"])
def test_a_quantization_of_the_draft_model_says_what_the_checkpoint_is(tmp_path, kind):
    plain = write_tiny(tmp_path / "plain", intermediate_size=48)
    drafter = quantise(plain, tmp_path / "drafter", LAYOUTS[kind])
    named = {"W4A16": "compressed-tensors", "ModelOpt NVFP4": "modelopt_fp4"}[kind]
    args = server_args(drafter, speculative_draft_model_quantization=named)
    arguments.prepare(args)
    staged = Path(args.speculative_draft_model_path)
    assert args.speculative_draft_model_quantization is None
    assert not (staged / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((staged / "config.json").read_text())
    for directory, what in (
        (drafter, f"quantised \\({LAYOUTS[kind].named}"),
        (plain, "not quantised"),
    ):
        with pytest.raises(
            DFlashError,
            match=f"--speculative-draft-model-quantization is 'fp8', but .* is {what}.*: leave it",
        ):
            arguments.prepare(server_args(directory, speculative_draft_model_quantization="fp8"))


def test_a_mask_outside_the_vocabulary_is_left_to_the_model(tmp_path):
    drafter = write_tiny(tmp_path / "drafter", mask_token_id=97, own_mask_embedding=True)
    args = server_args(drafter)
    arguments.prepare(args)
    staged = Path(args.speculative_draft_model_path)
    config = json.loads((staged / "config.json").read_text())
    assert config["dflash_config"]["mask_token_id"] == 0
    assert config[KEY]["config"]["mask_token_id"] == 97


@pytest.mark.parametrize("name", arguments.BLOCK_ARGUMENTS)
def test_a_block_that_the_drafter_lacks_is_refused(tmp_path, name):
    drafter = write_tiny(tmp_path / "drafter")
    for asked in (1, 5):
        with pytest.raises(DFlashError, match=rf"is {asked} but the drafter's block is 4 tokens"):
            arguments.prepare(server_args(drafter, **{name: asked}))
    args = server_args(drafter, **{name: 3})
    arguments.prepare(args)
    assert getattr(args, name) == 3


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DFlashError, match="give --speculative-draft-model-path"):
        arguments.prepare(server_args(None))
    with pytest.raises(DFlashError, match="features 16 wide but the target's hidden_size is 32"):
        arguments.prepare(server_args(write_tiny(tmp_path / "narrow", target_hidden_size=16)))
    with pytest.raises(DFlashError, match="--enable-dp-attention"):
        arguments.prepare(server_args(tmp_path, enable_dp_attention=True))
    with pytest.raises(DFlashError, match=r"--disaggregation-mode is 'decode'"):
        arguments.prepare(server_args(tmp_path, disaggregation_mode="decode"))
    with pytest.raises(DFlashError, match="--attn-dp-size"):
        arguments.prepare(server_args(tmp_path, attn_dp_size=2))
    layers = ({"sliding_window": 8}, {"sliding_window": 16})
    with pytest.raises(DFlashError, match=r"different windows \[8, 16\]"):
        arguments.check_layers(tiny_config(layers=layers), 4)
    with pytest.raises(DFlashError, match=r"target layers \[-1, 2\]"):
        arguments.check_layers(tiny_config(target_layer_ids=(-1, 2)), 4)
    with pytest.raises(DFlashError, match=r"last one \(3\) only beside another layer's: use vLLM"):
        arguments.check_layers(tiny_config(target_layer_ids=(3,)), 4)


def test_a_dflash2_drafter_is_staged_under_our_architecture(tmp_path):
    """SGLang's own parts of it are left out, and with them what its versions lack."""
    args = server_args(write_tiny(tmp_path, **DFLASH2))
    arguments.prepare(args)
    staged = Path(args.speculative_draft_model_path)
    config = json.loads((staged / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    assert config["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [0, 2]}
    spec = drafter_spec(staged)
    assert spec is not None
    assert spec.config.selector == DFLASH2["selector"]


@pytest.mark.parametrize("rows", [90, 104])
def test_a_drafter_is_staged_with_the_targets_vocabulary(tmp_path, rows):
    args = server_args(write_tiny(tmp_path / "drafter", **DFLASH2, vocab_size=rows))
    arguments.prepare(args)
    spec = drafter_spec(args.speculative_draft_model_path)
    assert spec.config.vocab_size == 97
    assert spec.embedding_factor == 1.0


def test_a_drafter_without_a_mask_token_in_the_target_is_refused(tmp_path):
    drafter = write_tiny(tmp_path / "drafter", vocab_size=104, mask_token_id=100)
    with pytest.raises(DFlashError, match="mask_token_id 100 is outside"):
        arguments.prepare(server_args(drafter))


def test_the_factor_of_a_gemma_target_is_staged(tmp_path, monkeypatch):
    gemma = SimpleNamespace(**{**vars(TARGET), "model_type": "gemma3_text"})
    monkeypatch.setattr(arguments, "target_config", lambda server_args: gemma)
    args = server_args(write_tiny(tmp_path / "drafter"))
    arguments.prepare(args)
    spec = drafter_spec(args.speculative_draft_model_path)
    assert spec.embedding_factor == pytest.approx(32**0.5)


def test_dummy_weights_are_not_checked(tmp_path):
    args = server_args(write_tiny(tmp_path / "drafter"), load_format="dummy")
    arguments.prepare(args)
    spec = drafter_spec(args.speculative_draft_model_path)
    assert spec is not None
    assert spec.options.known_answers == "off"
    assert spec.options.acceptance_warning == 0


def test_a_directory_that_was_not_staged_has_no_spec(tmp_path):
    assert drafter_spec(write_tiny(tmp_path / "drafter")) is None
    assert drafter_spec(None) is None


def test_options_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "options.json"
    file.write_text('{"known_answers": "warn", "acceptance_window": 10}')
    monkeypatch.setenv("DFLASH_PLUGIN_CONFIG", str(file))
    monkeypatch.setenv("DFLASH_PLUGIN_ACCEPTANCE_WINDOW", "20")
    monkeypatch.setenv("DFLASH_PLUGIN_DRAFT_SAMPLING", "greedy")
    assert read_options() == Options(
        known_answers="warn", acceptance_window=20, draft_sampling="greedy"
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DFLASH_PLUGIN_KNOWN_ANSWERS", "maybe", "known_answers is 'maybe'"),
        ("DFLASH_PLUGIN_KNOWN_ANSWER", "off", r"known_answer is 'off'.*options are known_answers"),
        ("DFLASH_PLUGIN_CONFIG", "/nowhere.json", "'/nowhere.json', which cannot be read"),
    ],
)
def test_a_wrong_option_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(DFlashError, match=message):
        read_options()


@pytest.mark.parametrize("service", ["DFLASH_PLUGIN", "DFLASH_PLUGIN_EU_WEST"])
def test_variables_of_a_service_and_empty_ones_are_no_options(monkeypatch, service):
    """Kubernetes sets the first kind for every service, in every container."""
    address = f"{service}_PORT_80_TCP"
    for name in (
        *(f"{service}_SERVICE_HOST", f"{service}_SERVICE_PORT", f"{service}_SERVICE_PORT_HTTP"),
        *(f"{service}_PORT", address, f"{address}_PROTO", f"{address}_PORT", f"{address}_ADDR"),
    ):
        monkeypatch.setenv(name, "tcp://10.0.0.12:80")
    monkeypatch.setenv("DFLASH_PLUGIN_KNOWN_ANSWERS", "")
    assert read_options() == Options()
    # A misspelt option is still told.
    monkeypatch.setenv("DFLASH_PLUGIN_PORTS", "1")
    with pytest.raises(DFlashError, match="ports is '1'"):
        read_options()


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.5.17", True), ("0.5.23", True), ("0.5.20.post1", True), ("0.5.16", False)],
)
def test_versions(monkeypatch, version, known):
    monkeypatch.setattr(compat, "installed", lambda: version)
    assert (compat.row() is not None) is known
    other = server_args(None, speculative_algorithm="EAGLE")
    arguments.refuse_version(other)
    asked = server_args(None, speculative_algorithm="dflash")
    if known:
        arguments.refuse_version(asked)
        return
    with pytest.raises(DFlashError, match=rf"SGLang {version} is not supported.*0\.5\.17"):
        arguments.refuse_version(asked)


def test_a_plugin_that_cannot_be_set_up_ends_the_process(monkeypatch):
    """SGLang would only log the exception and serve without the plugin."""

    def fail() -> None:
        raise DFlashError("no such version")

    monkeypatch.setattr(compat, "row", fail)
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.plugins.hook_registry", None)
    with pytest.raises(SystemExit, match="could not be set up"):
        register()


def penalized(logits: Tensor, output: list[int], params: SimpleNamespace, stop: int) -> Tensor:
    """What the target alone would see after ``output``."""
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits))
    logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    scale = torch.where(counts > 0, params.repetition_penalty, 1.0)
    logits = torch.where(logits < 0, logits * scale, logits / scale)
    if len(output) < params.min_new_tokens:
        logits[stop] = float("-inf")
    return logits


def test_penalties_of_every_row_are_those_of_its_own_text():
    torch.manual_seed(0)
    vocabulary, stop = 11, 2
    params = [
        SimpleNamespace(
            frequency_penalty=0.7,
            presence_penalty=0.2,
            repetition_penalty=1.3,
            min_new_tokens=6,
            stop_token_ids=None,
        ),
        SimpleNamespace(
            frequency_penalty=0.0,
            presence_penalty=0.0,
            repetition_penalty=1.0,
            min_new_tokens=0,
            stop_token_ids=None,
        ),
    ]
    outputs = [[5, 5, 7, 1], [3]]
    requests = [
        SimpleNamespace(
            output_ids=list(output),
            sampling_params=p,
            eos_token_ids={stop},
            tokenizer=None,
        )
        for output, p in zip(outputs, params, strict=True)
    ]
    device = torch.device("cpu")
    penalties.begin(requests[:1], vocabulary, device)
    drafts = torch.tensor([[5, 8, 8], [4, 4, 3]])
    committed = torch.tensor([2, 4])
    for _ in range(2):
        written = torch.tensor([len(output) for output in outputs])
        gathered = penalties.gather(requests, written, vocabulary)
        logits = torch.randn(2, 4, vocabulary)
        expected = torch.stack(
            [
                torch.stack(
                    [penalized(block[row], output + draft[:row], p, stop) for row in range(4)]
                )
                for block, output, draft, p in zip(
                    logits, outputs, drafts.tolist(), params, strict=True
                )
            ]
        )
        # A pass whose second request has two rows, and one of whole blocks.
        owners, places = torch.tensor([0] * 4 + [1] * 4), torch.arange(4).repeat(2)
        for rows in (torch.tensor([0, 1, 2, 3, 4, 5]), torch.arange(8)):
            found = logits.flatten(0, 1)[rows]
            gathered.apply(found, drafts, owners[rows], places[rows])
            assert torch.allclose(found, expected.flatten(0, 1)[rows])
        # Two drafts of the first, three and a bonus token of the second were committed.
        tokens = torch.cat([drafts, torch.tensor([[0], [9]])], dim=1)
        penalties.count(gathered, tokens, committed)
        outputs = [
            output + row[:number]
            for output, row, number in zip(
                outputs, tokens.tolist(), committed.tolist(), strict=True
            )
        ]


def sampling_info(**changes: Any) -> SimpleNamespace:
    values = {
        "temperatures": torch.tensor([[1.0], [0.5]]),
        "top_ks": torch.tensor([1 << 30, 1 << 30], dtype=torch.int32),
        "top_ps": torch.ones(2),
        "min_ps": torch.zeros(2),
        "need_top_k_sampling": False,
        "need_top_p_sampling": False,
        "need_min_p_sampling": False,
    }
    return SimpleNamespace(**{**values, **changes})


def test_the_shorter_way_gives_the_same_distribution():
    logits = torch.randn(2, 3, 13)
    plain = sampling_info()
    params = sampling.tensors(plain, torch.zeros(2, dtype=torch.int64))
    whole = sampling.distribution(logits, params, sampling_info(need_top_p_sampling=True))
    assert torch.allclose(sampling.distribution(logits, params, plain), whole)


@pytest.mark.parametrize("limited", [False, True])
def test_a_factor_of_the_temperature_sharpens_the_distribution(limited):
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    info = sampling_info(need_top_p_sampling=limited)
    params = sampling.tensors(info, torch.zeros(2, dtype=torch.int64))
    factors = torch.tensor(FACTORS).expand(2, -1)
    found = sampling.distribution(logits, params, info, factors)
    expected = sharpen(sampling.distribution(logits, params, info), factors)
    torch.testing.assert_close(found, expected)


def test_a_greedy_request_stays_greedy_beside_one_that_samples():
    logits = torch.randn(2, 3, 13)
    info = sampling_info(
        top_ks=torch.tensor([1, 1 << 30], dtype=torch.int32), need_top_k_sampling=True
    )
    params = sampling.tensors(info, torch.zeros(2, dtype=torch.int64))
    probs = sampling.distribution(logits, params, info)
    assert torch.equal(probs[0], torch.nn.functional.one_hot(logits[0].argmax(-1), 13).float())
    assert (probs[1] > 0).all()


def test_a_walk_draws_within_the_limits_of_requests_that_have_some():
    plain = sampling_info()
    params = sampling.tensors(plain, torch.zeros(2, dtype=torch.int64))
    assert sampling.limits(params, plain) is None
    within = sampling.limits(params, sampling_info(need_top_k_sampling=True))
    assert within is not None
    assert torch.equal(within.top_k, params.top_k)
    assert torch.equal(within.top_p, params.top_p)
    assert torch.equal(within.min_p, params.min_p)


def test_given_seeds_are_kept_and_the_others_new():
    device = torch.device("cpu")
    requests = [
        SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in (7, None)
    ]
    given = sampling.given_seeds(requests, device)
    noise = sampling.Noise(1, device)
    first, second = noise.seeds(given, 2), noise.seeds(given, 2)
    assert first[0] == second[0] == 7
    assert first[1] != second[1]
    assert torch.equal(sampling.Noise(1, device).seeds(given, 2), first)
    assert sampling.given_seeds(requests[1:], device) is None


def counting(checkpoint: Path) -> metrics.AcceptanceCounts:
    """Counts of a drafter with 3 drafts, judged every ``STRIDE`` passes by an expected τ of 3."""
    options = Options(expected_acceptance_length=3.0, acceptance_window=metrics.STRIDE)
    spec = DrafterSpec(
        checkpoint=checkpoint,
        config=tiny_config(),
        options=options,
        expected_acceptance_length=3.0,
    )
    return metrics.AcceptanceCounts(spec, 3, None)


def test_how_the_worker_runs_both_models_is_told(tmp_path):
    facts = dict(
        zip(WORKER_FACTS, ("FlashAttentionBackend", "TritonAttnBackend", "no"), strict=True)
    )
    spec = counting(tmp_path).info
    summary = metrics.AcceptanceCounts(spec, 3, "told", facts=facts).summary()
    assert summary.items() >= facts.items()
    told = {"model_name": "told", **facts}
    assert REGISTRY.get_sample_value("dflash:worker_info", told) == 1


def test_acceptance_is_counted_by_position(tmp_path, caplog):
    counted = counting(tmp_path)
    for _ in range(metrics.STRIDE // 2):
        counted.observe([0, 2])
    summary = counted.summary()
    assert summary["accept_by_position"] == [0.5, 0.5, 0.0]
    assert summary["acceptance_length"] == 2.0
    assert summary["acceptance_warnings"] == 0
    counted.observe([0] * metrics.STRIDE)
    assert counted.summary()["acceptance_warnings"] == 1
    assert "hardly any first draft is accepted" in caplog.text


def test_passes_that_verify_a_part_count_but_do_not_judge_the_drafter(tmp_path):
    counted = counting(tmp_path)
    for _ in range(4):
        counted.observe([0] * metrics.STRIDE, whole=False)
    summary = counted.summary()
    assert summary["verify_passes"] == 4 * metrics.STRIDE
    assert summary["acceptance_warnings"] == 0
    counted.observe([0] * metrics.STRIDE)
    assert counted.summary()["acceptance_warnings"] == 1


def test_meta_info_gets_the_share_by_position():
    def native(manager: Any, meta_info: dict[str, Any], *_: Any) -> None:
        meta_info.update(
            spec_verify_ct=4, spec_num_proposed_drafts=12, spec_correct_drafts_histogram=[1, 2, 1]
        )

    meta: dict[str, Any] = {}
    metrics.describe_acceptance(native, None, meta, None, 0)
    assert meta["spec_accept_by_position"] == [0.75, 0.25, 0.0]
    plain: dict[str, Any] = {}
    metrics.describe_acceptance(lambda *_: None, None, plain, None, 0)
    assert plain == {}
