"""A drafter on several ranks, beside experts of several ranks, in several engines of a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams

from dflash_plugin.checkpoints.reference_drafts import FILE_NAME, ReferenceDrafts, answer
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers.loading import load_drafter, load_target
from tests.helpers.greedy import greedy_text
from tests.helpers.http_server import free_port
from tests.helpers.tiny import ENGINE_SIZES, tiny_target, write_target, write_tiny
from tests.on_vllm.test_vllm_dialects import PROMPTS, check_drafts, check_text
from tests.on_vllm.vllm_helpers import ON_V2, TOKENS, counter, running, serving

pytestmark = pytest.mark.skipif(ON_V2, reason="too slow interpreted")

EXPERTS = {
    **ENGINE_SIZES,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
LENGTH = 16
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


@contextmanager
def experts_by_rank() -> Iterator[None]:
    """Let the CPU's kernel look up a rank's experts by their numbers on that rank.

    vLLM 0.32 hands it numbers among all, drafter or not, and it reads beyond the weights.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    native: Callable[..., None] = CPUUnquantizedExperts.apply

    def apply(self: Any, **given: Any) -> None:
        if (places := given["expert_map"]) is not None:
            local = places[given["topk_ids"]]
            given["topk_weights"] = torch.where(local >= 0, given["topk_weights"], 0.0)
            given["topk_ids"] = local.clamp(min=0).to(given["topk_ids"].dtype)
        native(self, **given)

    with patch.object(CPUUnquantizedExperts, "apply", apply):
        yield


def test_a_whole_drafter_on_each_rank_drafts_beside_shared_experts(tmp_path, monkeypatch):
    """Three heads do not divide by two ranks, which have two experts of the target each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    directory = write_target(tmp_path / "target", "qwen3_moe", **EXPERTS)
    target = tiny_target("qwen3_moe", **EXPERTS)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    sizes = {**ENGINE_SIZES, **heads, "target_hidden_size": 64}
    drafter = write_tiny(tmp_path / "drafter", **sizes)
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    with (
        experts_by_rank(),
        running(directory, drafter, max_model_len=256, **ranks) as engine,
    ):
        check_drafts(engine, target, load_drafter(drafter, target))
        check_text(engine, target)


def test_two_engines_behind_one_server_answer_alike(pair, tmp_path):
    """Data parallel: the server shares out the requests."""
    target, directory = pair
    drafter = write_tiny(tmp_path / "drafter", **ENGINE_SIZES, target_hidden_size=64)
    record = ReferenceDrafts(answers=[answer(load_drafter(drafter, target), target, PROMPTS[0])])
    (drafter / FILE_NAME).write_text(record.model_dump_json())
    flags = ["--speculative-method=dflash", f"--speculative-model={drafter}"]
    with serving(tmp_path / "log", directory, *flags, "--data-parallel-size=2") as server:

        def answered(prompt: list[int]) -> list[int]:
            settings = {"max_tokens": LENGTH, "ignore_eos": True, "return_token_ids": True}
            return server.complete(prompt, **settings)["choices"][0]["token_ids"]

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(answered, PROMPTS * 2))
        metrics = server.client.get("/metrics").text.splitlines()
    expected = [greedy_text(target, prompt, LENGTH) for prompt in PROMPTS]
    assert texts == expected * 2
    assert (tmp_path / "log").read_text().count("the drafter's 1 known answers agree") == 2
    counts = [line for line in metrics if line.startswith("vllm:spec_decode_num_drafts_total{")]
    assert len(counts) == 2
    assert all(float(line.rpartition(" ")[2]) > 0 for line in counts)


def connector(role: str) -> str:
    """The flag that lets a server on a CPU give or take caches over NIXL."""
    given = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    return f"--kv-transfer-config={json.dumps(given)}"


def test_a_drafters_cache_goes_with_the_targets_to_the_server_that_decodes(
    smollm2, shipped, tmp_path
):
    """Prefill-decode disaggregation: as many drafts are accepted as where one server does both.

    A drafter that did not get its context would have fewer accepted.
    """
    pytest.importorskip("nixl")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    data = Path(__file__).parents[1] / "data" / "gsm8k_test.jsonl"
    prompts = [encode(tokenizer, prompt) for prompt in load_prompts(data)[:3]]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with running(smollm2, shipped) as engine:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        accepted = counter(engine, ACCEPTED)
    target, _ = load_target(smollm2, torch.float32, "cpu")
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts == [greedy_text(target, prompt, TOKENS) for prompt in prompts]
    flags = ["--speculative-method=dflash", f"--speculative-model={shipped}"]
    port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    with (
        serving(tmp_path / "p", smollm2, *flags, connector("kv_producer"), **port) as prefill,
        serving(tmp_path / "d", smollm2, *flags, connector("kv_consumer")) as decode,
    ):
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        for prompt, text in zip(prompts, texts, strict=True):
            filled = prefill.complete(prompt, max_tokens=1, kv_transfer_params=wanted)
            answer = decode.complete(
                prompt,
                ignore_eos=True,
                return_token_ids=True,
                kv_transfer_params=filled["kv_transfer_params"],
            )
            assert answer["choices"][0]["token_ids"] == text
        found = decode.metrics()
    assert found["vllm:external_prefix_cache_hits_total"] == sum(map(len, prompts))
    assert found[f"{ACCEPTED}_total"] == accepted > 0
