"""What doctor names when one thing is wrong with a pair that is otherwise healthy."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.reference_drafts import answer, load_record
from dflash_plugin.cli.main import app
from dflash_plugin.doctor import Check, Diagnosis, DoctorOptions, TargetTexts, diagnose
from dflash_plugin.doctor.acceptance import (
    BlockAcceptance,
    decoded_tau,
    measure,
    with_config,
)
from dflash_plugin.doctor.block_trials import with_requested
from dflash_plugin.doctor.chat_template import check_template
from dflash_plugin.doctor.config_trials import mask_tokens
from dflash_plugin.doctor.diagnose import prompt_form, questions
from dflash_plugin.doctor.known_blocks import KnownBlocks
from dflash_plugin.doctor.layer_trials import orders, shifted
from dflash_plugin.doctor.numerics import (
    check_dtype,
    check_fp8,
    check_known,
    check_quantized_target,
    distinct_values,
)
from dflash_plugin.doctor.probe import Probe, Question, ServerProber
from dflash_plugin.doctor.server import InspectedServer, check_server, inspect_server
from dflash_plugin.doctor.texts import encode_as, forms
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.monitor.client import ServerClient
from dflash_plugin.monitor.metrics import ServerError
from dflash_plugin.transformers import Engine, Request, load_target
from dflash_plugin.transformers.loading import bound
from tests.doctor.conftest import SHIPPED
from tests.helpers.layouts import write_laguna
from tests.helpers.tiny import tiny_config, tiny_target, write_target, write_tiny

DFLASH2 = Path(__file__).parents[2] / "examples" / "smollm2-135m-dflash2"
IDS = [5, 13, 21, 28]


def check(found: Diagnosis, name: str) -> Check:
    return next(each for each in found.checks if each.name == name)


def statuses(found: Diagnosis) -> dict[str, str]:
    return {each.name: each.status for each in found.checks}


@pytest.mark.parametrize("drafter", [SHIPPED, DFLASH2], ids=lambda path: path.name)
def test_a_healthy_pair_has_no_finding(pair, drafter):
    found = diagnose(pair, drafter)
    # Longer blocks of the DFlash 2 drafter commit more than those of 8 that it was trained on.
    noted = {"block size"} if drafter == DFLASH2 else set()
    unlike = {name: status for name, status in statuses(found).items() if status != "ok"}
    assert unlike in ({}, dict.fromkeys(noted, "note")), unlike
    assert found.exit_code == 0
    assert found.verdict.startswith("healthy")
    assert len(found.checks) == 17
    assert check(found, "known answers").evidence == {
        "agree": 21, "compared": 21, "hidden_agree": True
    }  # fmt: skip
    # Every variant was worse than the checkpoint as it is.
    gains = check(found, "rope").evidence["gain"]
    assert len(gains) >= 6
    assert max(gains.values()) < 0


def test_without_a_record_a_healthy_pair_has_none_either(pair, planted):
    found = diagnose(pair, planted(record=False))
    assert found.exit_code == 0
    assert {name for name, status in statuses(found).items() if status != "ok"} <= {
        "known answers", "chat template"
    }  # fmt: skip


SHIFTED = {"draft": {"target_layer_ids": [i + 1 for i in IDS]}}
MASK = {"draft": {"mask_token_id": 0}}
WINDOW = {
    "layer_types": ["sliding_attention"] * 3,
    "sliding_window": 8,
    "use_sliding_window": True,
}


@pytest.mark.parametrize(
    ("name", "changes", "fix"),
    [
        ("mask token", MASK, "set mask_token_id to"),
        ("rope", {"is_neox_style": False}, "set is_neox_style to true"),
        ("window and causality", WINDOW, "layer_types to full_attention"),
    ],
)
def test_a_setting_that_costs_much_is_named_by_acceptance_alone(pair, planted, name, changes, fix):
    found = diagnose(pair, planted(record=False, **changes))
    assert found.verdict.startswith(f"{name}: "), statuses(found)
    assert found.exit_code == 1
    assert "known answers" not in found.verdict
    assert fix in str(found.fix)
    assert check(found, name).gain > 0.5


@pytest.mark.parametrize(
    ("name", "changes", "fix"),
    [
        ("target layers", SHIFTED, f"set target_layer_ids to {IDS}"),
        (
            "target layers",
            {"draft": {"target_layer_ids": [i - 1 for i in IDS]}},
            f"set target_layer_ids to {IDS}",
        ),
        ("mask token", MASK, "set mask_token_id to 4"),
        (
            "rope",
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0}},
            "set rope_theta to 1",
        ),
        ("block size", {"block_size": 16}, "set block_size to 8"),
        ("block size", {"block_size": 4}, "set block_size to 8"),
        (
            # Without is_causal, SpecForge's sliding layers are not causal and z-lab's are.
            "dialect",
            {**WINDOW, "sliding_window": 4096, "is_causal": "absent"},
            "--to specforge --dialect specforge",
        ),
    ],
    ids=["ids+1", "ids-1", "mask", "theta", "block16", "block4", "dialect"],
)
def test_known_answers_tell_the_right_setting(pair, planted, name, changes, fix):
    found = diagnose(pair, planted(**changes))
    assert found.verdict.startswith(f"{name}: "), statuses(found)
    assert "gives the known answers" in found.verdict
    assert fix in str(found.fix)
    assert found.exit_code == 1
    assert check(found, "known answers").status == "fault"


def test_features_in_another_order_than_the_weights(pair, planted):
    def swap(weights):
        parts = list(weights["fc.weight"].chunk(4, dim=1))
        parts[0], parts[2] = parts[2], parts[0]
        weights["fc.weight"] = torch.cat(parts, dim=1).contiguous()

    found = diagnose(pair, planted(tensors=swap))
    assert found.verdict.startswith("feature order: ")
    assert "[21, 13, 5, 28]" in str(found.fix)


def test_a_quantized_layer_is_named(pair, planted):
    def round_down(weights):
        name = "layers.1.mlp.down_proj.weight"
        weight = weights[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 7
        weights[name] = ((weight / scale).round() * scale).bfloat16()

    found = diagnose(pair, planted(tensors=round_down))
    assert found.verdict.startswith("weights: draft layer 1 was quantized")
    assert "layers.1.mlp.down_proj" in found.verdict
    assert check(found, "known answers").evidence["first_difference"] == "draft layer 1"


def test_the_first_layer_that_differs_is_named(pair, planted):
    def disturb(weights):
        name = "layers.1.self_attn.o_proj.weight"
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
        weights[name] = (weights[name].float() * (1 + 0.3 * noise)).bfloat16()

    found = diagnose(pair, planted(tensors=disturb))
    assert found.verdict.startswith("known answers: ")
    assert "first difference: draft layer 1" in found.verdict


def test_a_setting_of_a_dflash2_drafter(pair, planted):
    found = diagnose(pair, planted(of=DFLASH2, **SHIFTED))
    assert found.verdict.startswith("target layers: ")
    assert "gives the known answers" in found.verdict


def test_a_damaged_selector_is_named(pair, planted):
    def negate(weights):
        weights["candidate_selector.successor_codebook"].neg_()

    found = diagnose(pair, planted(of=DFLASH2, tensors=negate))
    assert found.verdict.startswith("known answers: ")
    assert "behind the draft layers: norm, head, selector" in found.verdict
    assert check(found, "known answers").evidence["hidden_agree"]


def test_a_target_of_another_revision_is_named_by_its_layer(pair, trials):
    weight = pair.target.model.layers[10].mlp.down_proj.weight
    original = weight.detach().clone()
    try:
        weight.data.mul_(1.05)
        known = KnownBlocks.of(pair.target, load_record(SHIPPED))
        found = check_known(trials.drafter, known)
    finally:
        weight.data.copy_(original)
    assert found.status == "fault"
    assert found.evidence["first_difference"] == "output of target layer 13"


def test_speculative_tokens_are_held_against_the_block(trials):
    def asking(requested: int) -> Check:
        fine = Check(name="block size", status="ok", looked_at="", finding="", evidence={})
        return with_requested(trials, fine, requested)

    above = asking(15)
    assert above.finding.startswith("15 speculative tokens are asked for")
    assert "--num-speculative-tokens 7" in str(above.fix)
    cut = asking(2)
    assert (cut.status, cut.name) == ("fault", "block size")
    assert cut.finding.startswith("blocks cut to 2 of 7 drafts")
    assert asking(7).status == "ok"


def test_a_dialect_that_was_forced(pair):
    found = diagnose(pair, SHIPPED, DoctorOptions(dialect="speculators"))
    assert found.verdict.startswith("dialect: the checkpoint does not read as speculators")
    assert len(found.checks) == 1


def test_a_drafter_of_another_target_is_not_run(pair, planted):
    found = diagnose(pair, planted(num_target_layers=32))
    assert found.verdict.startswith("configuration: num_target_layers: made for a target of 32")
    assert len(found.checks) == 1


def test_a_missing_chat_template(pair):
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.chat_template = None
    bare = TargetTexts(pair.directory, pair.target, tokenizer, pair.prompts[1:2], 24)
    found = diagnose(bare, SHIPPED)
    assert found.verdict.startswith("chat template: prompts reach the target with no template")
    assert "copy chat_template.jinja" in str(found.fix)
    assert "known answers" in check(found, "chat template").evidence["tau"]


def test_raw_prompts_where_training_had_a_template(pair, trials):
    record, prompts = load_record(SHIPPED), pair.encoded("no template")
    by_form = {"no template": trials.base}
    raw = check_template(
        pair.tokenizer, "no template", prompts, record, lambda: by_form, expected=None
    )
    assert raw.status == "fault"
    assert "its known answers hold <|im_start|>" in raw.finding
    assert "/v1/chat/completions" in str(raw.fix)
    fine = check_template(
        pair.tokenizer, "no template", prompts, record, lambda: by_form, expected=3.3
    )
    assert fine.status == "note"
    assert "all the same" in fine.finding


@pytest.mark.parametrize(("expected", "status"), [(3.3, "fault"), (1.0, "ok"), (None, "note")])
def test_a_form_that_is_accepted_far_better(pair, trials, expected, status):
    """Only where acceptance is low does it count; texts of another form are others."""
    poor = BlockAcceptance(torch.zeros_like(trials.base.hits))
    by_form = {"thinking on": poor, "thinking off": trials.base}
    prompts = pair.encoded("chat template")
    found = check_template(
        pair.tokenizer, "thinking on", prompts, None, lambda: by_form, expected=expected
    )
    assert found.status == status
    assert ("with thinking off" in found.finding) == (status != "ok")


def test_forms_of_a_template_that_thinks(pair):
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.chat_template += "{% if enable_thinking %}THINK{% endif %}"
    assert forms(tokenizer) == ["chat template", "no template", "thinking on", "thinking off"]
    thinks, silent = (
        tokenizer.decode(encode_as(tokenizer, pair.prompts[0], form))
        for form in ("thinking on", "thinking off")
    )
    assert thinks.endswith("THINK")
    assert "THINK" not in silent
    assert prompt_form(DoctorOptions(thinking=True), tokenizer) == "thinking on"
    assert prompt_form(DoctorOptions(), tokenizer) == "chat template"
    with pytest.raises(DFlashError, match="no enable_thinking: leave --thinking out"):
        prompt_form(DoctorOptions(thinking=False), pair.tokenizer)


def test_a_dtype_that_overflows_is_named_with_its_layer(pair, trials):
    """The same model with a residual stream four times as large, past what float16 holds."""
    large = copy.deepcopy(pair.target)
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(4)
        for layer in large.model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
            layer.mlp.down_proj.weight.mul_(4)
    half = copy.deepcopy(large).half()
    config = trials.drafter.config.model_copy(update={"embedding_scale": 0.25})
    drafter = with_config(trials.drafter, config)
    exact = bound(replace(load_checkpoint(SHIPPED, torch.float32), config=config), large)
    texts = trials.texts
    # In float32 it drafts as the original does.
    assert measure(exact, texts.on(large)).hits.equal(measure(trials.drafter, texts).hits)
    drafter = bound(replace(load_checkpoint(SHIPPED, torch.float16), config=config), half)
    found = check_dtype(texts.on(half), drafter, "bfloat16", lambda: large)
    assert found.status == "fault"
    assert found.finding.startswith("float16 takes τ from")
    assert "first difference: target layer 13" in found.finding
    assert "--dtype bfloat16" in str(found.fix)


def test_bfloat16_is_exact_enough(trials):
    rounded = copy.deepcopy(trials.texts.target).bfloat16()
    drafter = bound(load_checkpoint(SHIPPED, torch.bfloat16), rounded)
    whole = trials.texts.first(1)
    found = check_dtype(whole.on(rounded), drafter, "bfloat16", lambda: trials.texts.target)
    assert found.status == "ok"
    assert found.evidence["first_difference"] is None
    errors = found.evidence["relative_error"]
    assert [*errors][:4] == [f"target layer {i}" for i in IDS]
    assert 0 < max(errors.values()) < 0.1
    assert check_dtype(whole.on(rounded), drafter, "bfloat16", None).status == "note"


def test_a_quantized_target_is_noted():
    target = tiny_target()
    assert check_quantized_target(target).status == "ok"
    target.config.quantization_config = {"quant_method": "awq"}
    assert check_quantized_target(target).status == "note"
    assert "(awq), its head is not" in check_quantized_target(target).finding
    rounded = nn.Module()
    rounded.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    target.set_output_embeddings(rounded)
    assert "(awq), its head too" in check_quantized_target(target).finding
    del target.config.quantization_config
    found = check_quantized_target(target)
    assert found.status == "note"
    assert "head is quantized" in found.finding
    assert "leave the head out" in str(found.fix)


def test_fp8_weights_that_cost_acceptance_are_named(trials):
    def rounded() -> Drafter:
        drafter = bound(load_checkpoint(SHIPPED, torch.float32), trials.texts.target)
        quantize_drafter(drafter)
        return drafter

    fine = check_fp8(trials.texts, trials.base, "fp8", rounded)
    assert fine.status == "ok"
    assert fine.evidence["tau_fp8"] == pytest.approx(trials.base.tau, abs=0.3)
    causal = tuple(layer.model_copy(update={"sliding_window": 2}) for layer in
                   trials.drafter.config.layers)  # fmt: skip
    worse = with_config(trials.drafter, trials.drafter.config.model_copy(update={"layers": causal}))
    costly = check_fp8(trials.texts, trials.base, "fp8", lambda: worse)
    assert costly.status == "fault"
    assert costly.fix == "leave draft_weights at checkpoint"


def inspected(metrics: str, info: dict[str, Any] | None = None) -> InspectedServer:
    """What ``inspect_server`` makes of a server that answers so."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=metrics)
        return httpx.Response(200, json=info) if info else httpx.Response(404)

    return inspect_server(ServerClient("localhost:8000", transport=httpx.MockTransport(answer)))


def vllm_metrics(
    passes: int, accepted: list[int], hits: int = 0, plugin: bool = True, more: str = ""
) -> str:
    lines = [
        f"vllm:spec_decode_num_drafts_total {passes}",
        *(
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{k}"}} {count}'
            for k, count in enumerate(accepted)
        ),
        "vllm:prefix_cache_queries_total 1000",
        f"vllm:prefix_cache_hits_total {hits}",
    ]
    if plugin:
        lines.append('dflash:drafter_info{plugin="0.1.0",dialect="z-lab",block_size="8"} 1')
    return "\n".join([*lines, more]) + "\n"


FINE = [80, 60, 45, 35, 25, 20, 15]
POOR = [30, 15, 8, 4, 2, 1, 0]
CUT = (
    "dflash:verified_drafts_total 300\ndflash:saved_drafts_total 400\n"
    'dflash:adaptive_steps_total{rows="4"} 90'
)


@pytest.mark.parametrize(
    ("metrics", "fault", "finding"),
    [
        (vllm_metrics(100, FINE, hits=900), None, ""),
        (vllm_metrics(100, POOR, hits=900), "served acceptance", "τ is 1.60 on the server"),
        (vllm_metrics(100, POOR), "served acceptance", "τ is 1.60 on the server and 3.90 here"),
        (vllm_metrics(100, POOR, plugin=False), "served acceptance", "the engine's own"),
        (vllm_metrics(100, POOR, hits=900, more=CUT), None, ""),
        ("vllm:num_requests_running 0\n", "server", "vllm runs without a drafter"),
    ],
    ids=["fine", "prefix", "low", "native", "adaptive", "plain"],
)
def test_a_server_is_held_against_this_pair(metrics, fault, finding):
    found = Diagnosis(
        target="", drafter="", checks=check_server(inspected(metrics), 3.9, expected=3.31)
    )
    assert [each.name for each in found.faults] == ([fault] if fault else [])
    assert finding in found.verdict
    if "saved" in metrics:
        assert check(found, "adaptive verification").status == "note"
        assert check(found, "adaptive verification").evidence["share_saved"] == 0.571


QUESTIONS = [Question([1, 2, 3], [10 + k for k in range(9)]), Question([4] * 5, [7] * 9)]
# Drafts accepted by each pass of an answer of nine tokens.
WELL, BADLY = (3, 3), (1, 1, 1, 1)


class Answering:
    """A server that is asked.

    Args:
        engine: vllm or sglang.
        rounds: for each time that all questions are asked, drafts that each pass accepts.
        hits: whether the second round comes out of the prefix cache.
        chunks: passes that are sent as one chunk.
        others: tokens of other requests beside every answer.
        saved: drafts left unverified by each pass.
        shift: what is added to every token of an answer.
        status: of an answer.
    """

    def __init__(self, engine: str, rounds: list[tuple[int, ...]], **options: Any) -> None:
        self.engine, self.rounds, self.options = engine, rounds, options
        self.asked: list[dict[str, Any]] = []
        self.generated = self.passes = self.prompt = self.cached = self.saved = 0

    def prober(self) -> ServerProber:
        transport = httpx.MockTransport(self.answer)
        client = ServerClient("localhost:8000", "secret", transport=transport)
        return ServerProber(client, sleep=lambda _: None)

    def probe(self, reference_tau: float = 4.0) -> Probe:
        return self.prober().probe(self.engine, QUESTIONS, reference_tau)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=self.metrics())
        if request.url.path == "/server_info":
            return httpx.Response(404)
        if "status" in self.options:
            return httpx.Response(self.options["status"], text="Unauthorized")
        assert request.headers["Authorization"] == "Bearer secret"
        body = json.loads(request.content)
        self.asked.append(body)
        again = len(self.asked) > len(QUESTIONS)
        question = QUESTIONS[(len(self.asked) - 1) % len(QUESTIONS)]
        plan = self.rounds[again]
        cached = len(question.prompt) - 1 if again and self.options.get("hits") else 0
        tokens = [token + self.options.get("shift", 0) for token in question.answer]
        self.generated += len(tokens) + self.options.get("others", 0)
        self.passes += len(plan)
        self.prompt += len(question.prompt)
        self.cached += cached
        self.saved += len(plan) * self.options.get("saved", 0)
        if self.engine == "sglang":
            assert body["input_ids"] == question.prompt
            meta = {"spec_verify_ct": len(plan), "cached_tokens": cached}
            return httpx.Response(200, json={"output_ids": tokens, "meta_info": meta})
        assert body["prompt"] == question.prompt
        return httpx.Response(200, text=self.stream(tokens, plan))

    def stream(self, tokens: list[int], plan: tuple[int, ...]) -> str:
        merged = self.options.get("chunks", 1)
        sizes = [accepted + 1 for accepted in plan]
        sizes = [1, *(sum(sizes[at : at + merged]) for at in range(0, len(sizes), merged))]
        lines, at = [], 0
        for size in sizes:
            chunk = {"choices": [{"text": "x", "token_ids": tokens[at : at + size]}]}
            lines.append(f"data: {json.dumps(chunk)}\n\n")
            at += size
        return "".join([*lines, 'data: {"choices": [], "usage": {}}\n\n', "data: [DONE]\n\n"])

    def metrics(self) -> str:
        lines = [
            f"{self.engine}:generation_tokens_total {self.generated}",
            f"vllm:spec_decode_num_drafts_total {self.passes}",
            f"vllm:prefix_cache_queries_total {self.prompt}",
            f"vllm:prefix_cache_hits_total {self.cached}",
        ]
        if "saved" in self.options:
            lines += [
                f"dflash:verified_drafts_total {7 * self.passes - self.saved}",
                f"dflash:saved_drafts_total {self.saved}",
            ]
        return "\n".join(lines if self.engine == "vllm" else [lines[0], *lines[4:]]) + "\n"


def test_a_server_is_asked_twice_past_its_prefix_cache():
    server = Answering("vllm", [WELL, WELL], hits=True)
    found = server.probe()
    assert found.refused is None
    assert (found.first.tau, found.first.passes, found.first.counted) == (4.0, 4, 4)
    assert (found.first.hit_rate, found.repeated.hit_rate) == (0.0, 6 / 8)
    assert found.first.agreement == 1.0
    salts = [body["cache_salt"] for body in server.asked]
    assert salts[:2] == salts[2:]
    assert salts[0] != salts[1]
    assert server.probe().repeated.tau == 4.0
    assert server.asked[-1]["cache_salt"] not in salts
    # Two passes a chunk: the counter tells.
    assert Answering("vllm", [WELL, WELL], chunks=2).probe().first.tau == 4.0
    # Beside other requests the chunks do.
    busy = Answering("vllm", [WELL, BADLY], others=5, hits=True).probe()
    assert (busy.first.tau, busy.repeated.tau) == (4.0, 2.0)
    assert (busy.first.counted, busy.repeated.hit_rate) == (None, None)
    sglang = Answering("sglang", [BADLY, WELL], hits=True).probe()
    assert (sglang.first.tau, sglang.repeated.tau, sglang.repeated.hit_rate) == (2.0, 4.0, 6 / 8)


@pytest.mark.parametrize(
    ("plugin", "answering", "traffic", "fault", "finding"),
    [
        (True, ([WELL, WELL], {"hits": True}), FINE, None, "healthy: no fault found"),
        # What other requests accept is no fault of the server's, and the cache none of it.
        (True, ([WELL, WELL], {"hits": True}), POOR, "served acceptance", "it is the requests"),
        (True, ([WELL, BADLY], {"hits": True}), FINE, "prefix cache", "lacks the features"),
        (True, ([WELL, BADLY], {}), FINE, None, "healthy: no fault found"),
        (True, ([BADLY, BADLY], {}), FINE, "asked acceptance", "4.00 here"),
        (False, ([BADLY, BADLY], {}), FINE, "asked acceptance", "the engine's own speculation"),
        (True, ([BADLY, BADLY], {"shift": 1}), FINE, "asked acceptance", "its target answers"),
        (True, ([BADLY, BADLY], {"saved": 3}), FINE, None, "see the notes on adaptive"),
        (True, ([WELL, BADLY], {"hits": True, "saved": 3}), FINE, None, "healthy"),
    ],
    ids=["fine", "traffic", "prefix", "no hits", "low", "native", "target", "adaptive", "widths"],
)
def test_an_asked_server_is_told_from_its_traffic(plugin, answering, traffic, fault, finding):
    rounds, options = answering
    more = CUT if "saved" in options else ""
    shown = inspected(vllm_metrics(100, traffic, hits=900, plugin=plugin, more=more))
    probe = Answering("vllm", rounds, **options).probe()
    found = Diagnosis(
        target="", drafter="", checks=check_server(shown, 3.9, expected=3.31, probe=probe)
    )
    assert [each.name for each in found.faults] == ([fault] if fault else []), found.verdict
    assert finding in found.verdict


def test_a_server_that_refuses_to_be_asked_is_not_judged():
    refused = Answering("vllm", [WELL, WELL], status=401).probe()
    checks = check_server(inspected(vllm_metrics(100, FINE)), 3.9, expected=3.31, probe=refused)
    found = Diagnosis(target="", drafter="", checks=checks)
    assert found.exit_code == 2
    assert "give its key in the environment" in check(found, "asked acceptance").finding


def test_a_server_without_a_drafter_is_not_asked():
    prober = Answering("vllm", [WELL, WELL]).prober()
    plain = replace(inspected("vllm:num_requests_running 0\n"), prober=prober)
    assert plain.probe(QUESTIONS, lambda: 4.0) is None


def test_walking_a_text_gives_the_engines_acceptance_length(pair, trials):
    """Pass by pass, as the Transformers engine decodes the same prompts."""
    texts = trials.texts
    asked = questions(texts)
    engine = Engine(pair.target, trials.drafter, max_batch=len(asked), max_length=256)
    results = engine.generate([Request(each.prompt, len(each.answer)) for each in asked])
    assert [result.tokens for result in results] == [each.answer for each in asked]
    committed = sum(len(result.tokens) - 1 for result in results)
    passes = sum(len(result.accepted) for result in results)
    assert decoded_tau(trials.drafter, texts) == pytest.approx(committed / passes)


def test_few_passes_are_no_finding():
    few = check_server(inspected(vllm_metrics(10, [1, 0, 0, 0, 0, 0, 0])), 3.9, None)
    found = Diagnosis(target="", drafter="", checks=few)
    assert found.exit_code == 2
    assert "served acceptance" in found.verdict


def test_sglang_tells_without_metrics():
    summary = {
        "verify_passes": 200, "accept_by_position": [0.8, 0.5], "expected_acceptance_length": 3.3,
        "adaptive": {"drafts_verified": 300, "drafts_saved": 100},
    }  # fmt: skip
    info = {
        "speculative_algorithm": "DFLASH",
        "speculative_num_draft_tokens": 8,
        "internal_states": [{"dflash_plugin": summary, "avg_spec_accept_length": 2.3}],
    }
    found = inspected("", info)
    assert found.plugin
    assert found.drafts == 7
    assert inspected(vllm_metrics(100, [60, 40])).drafts == 2
    assert found.snapshot.tau == pytest.approx(2.3)
    assert found.snapshot.saved_share == 0.25
    assert "--enable-metrics" in str(found.missing)
    native = inspected("", {**info, "internal_states": [{"avg_spec_accept_length": 2.1}]})
    assert not native.plugin
    assert native.speculates
    assert native.snapshot.tau == 2.1


def test_a_server_that_tells_nothing_is_refused():
    with pytest.raises(ServerError, match="--enable-metrics"):
        inspected("")
    with pytest.raises(ServerError, match="cannot be reached"):
        inspect_server(ServerClient("localhost:1"))


def test_shifts_and_orders_stay_within_the_target():
    config = tiny_config(target_layer_ids=(0, 3))
    assert shifted(config, 4) == [(-1, 2)]
    assert orders((0, 3)) == [(0, 3), (3, 0)]
    assert len(set(orders((1, 2, 3, 4)))) == 11


def test_mask_tokens_with_equal_embeddings_are_tried_once(pair):
    embedding = pair.target.get_input_embeddings().weight
    found = mask_tokens(pair.tokenizer, embedding)
    assert found[4] == "<reponame>"
    # Tokens that SmolLM2 never saw have one embedding among them.
    assert torch.equal(embedding[7], embedding[8]) == (not {7, 8} <= set(found))
    assert len(found) < len(pair.tokenizer.get_added_vocab())


def test_a_tap_before_the_final_norm_is_refused(tmp_path):
    at = write_target(tmp_path / "target")
    on = TargetTexts(at, *load_target(at, torch.float32, "cpu"))
    drafter = write_laguna(tmp_path / "drafter", {"target_layer_ids": (1, 3)})
    with pytest.raises(DFlashError, match=r"\[1, 3\] name the target's last layer"):
        diagnose(on, drafter)


def test_distinct_values():
    weight = torch.arange(64.0).view(2, 32)
    assert distinct_values(weight) == 32
    assert distinct_values((weight / 8).round()) == pytest.approx(5, abs=1)


def test_acceptance_equals_that_of_drafting_block_by_block(trials):
    """Against the engine's own injection and draft pass, at one position of one text."""
    hits = measure(trials.drafter, trials.texts).hits
    tokens, prompt = trials.texts.sequences[0]
    one = answer(trials.drafter, trials.texts.target, tokens[:prompt].tolist())
    assert one.anchor == int(tokens[prompt])
    follows = tokens[prompt + 1 : prompt + 8].tolist()
    assert hits[0].tolist() == [a == b for a, b in zip(one.drafts, follows, strict=True)]
    assert sum(hits[0].tolist()) > 0


def run(*arguments: object, code: int) -> str:
    result = CliRunner().invoke(app, ["doctor", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output
    return result.output if code == 2 else result.stdout


def test_the_command(tmp_path):
    target = write_target(tmp_path / "target")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"question": f"w{i} w{i + 7}"}) + "\n" for i in range(4)))
    fits = ["--target", target, "--drafter", write_tiny(tmp_path / "drafter"), "--data", data]
    # Random weights: every check runs, and nothing is certain.
    found = json.loads(run(*fits, "--max-new-tokens", 24, "--json", code=0))
    assert found["exit_code"] == 0
    assert len(found["checks"]) == 17
    assert "healthy" in run(*fits, "--max-new-tokens", 24, code=0)
    shown = run(*fits, "--num-speculative-tokens", 9, "--max-new-tokens", 24, code=1)
    assert "fix: --num-speculative-tokens 3" in shown
    wide = write_tiny(tmp_path / "wide", target_hidden_size=48)
    found = json.loads(run(*fits[:3], wide, "--json", code=1))
    assert found["verdict"].startswith("configuration: hidden_size")
    assert "nowhere" in run("--target", target, "--drafter", tmp_path / "nowhere", code=2)
    away = run(*fits, "--server", "http://127.0.0.1:1", code=2)
    assert "cannot be reached" in " ".join(away.split())
