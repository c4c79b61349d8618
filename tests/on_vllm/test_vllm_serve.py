"""``vllm serve`` over HTTP, with the flags that the README gives, against vLLM alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_plugin.bench.evaluate import acceptance_by_position
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from tests.helpers import live
from tests.on_vllm.vllm_helpers import BLOCK, TOKENS, Server, command, serving

DATA = Path(__file__).parents[1] / "data"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")


@pytest.fixture(scope="module")
def reference(smollm2, shipped) -> dict[str, Any]:
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    prompts = [
        encode(tokenizer, prompt)
        for name in SETS
        for prompt in load_prompts(DATA / f"{name}.jsonl")
    ]
    engine = Engine(target, load_drafter(shipped, target), max_batch=8, max_length=512)
    results = engine.generate([Request(prompt, TOKENS) for prompt in prompts])
    return {"prompts": prompts, "results": results, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def alone(smollm2, reference, tmp_path_factory) -> list[str]:
    """What the target alone answers, in the same vLLM."""
    log = tmp_path_factory.mktemp("alone") / "log"
    with serving(log, smollm2, DFLASH_PLUGIN="off") as server:
        return server.batch(reference["prompts"])


@pytest.fixture(scope="module")
def server(smollm2, shipped, alone, tmp_path_factory) -> Iterator[Server]:
    """Started as for a user, but for processes that sleep where vLLM's keep a core busy."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--speculative-method=dflash", f"--speculative-model={shipped}"]
    path = os.pathsep.join([str(Path(__file__).with_name("sleeping")), *sys.path])
    environment = {"TORCHDYNAMO_DISABLE": "", "PYTHONPATH": path}
    with serving(log, smollm2, *flags, forks=False, **environment) as running:
        yield running


def test_greedy_text_equals_the_target_alone(server, reference, alone):
    """50 prompts batched, in chunks; a few again one by one, out of the prefix cache."""
    prompts = reference["prompts"]
    assert len(prompts) >= 50
    assert max(map(len, prompts)) > 96
    before = server.metrics()
    assert server.batch(prompts) == alone
    after = server.metrics()
    passes, accepted = (
        after[name] - before[name]
        for name in (
            "vllm:spec_decode_num_drafts_total",
            "vllm:spec_decode_num_accepted_tokens_total",
        )
    )
    core = 1 + sum(acceptance_by_position(reference["results"], 7))
    assert 1 + accepted / passes == pytest.approx(core, rel=0.02)
    for number in range(0, len(prompts), 5):
        answer = server.complete(prompts[number])
        assert answer["choices"][0]["text"] == alone[number]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (len(prompts[number]) - 1) // BLOCK * BLOCK


def test_the_drafter_was_checked_at_start(server):
    assert "the drafter's 3 known answers agree" in server.log.read_text()


def test_metrics(server):
    found = server.metrics()
    by_position = [
        found[f"vllm:spec_decode_num_accepted_tokens_per_pos_total[{k}]"] for k in range(7)
    ]
    assert by_position == sorted(by_position, reverse=True)
    assert sum(by_position) == found["vllm:spec_decode_num_accepted_tokens_total"]
    assert found["dflash:expected_acceptance_length"] == pytest.approx(3.31, abs=0.01)
    assert found["dflash:drafter_info"] == 1
    assert found["dflash:engine_info"] == 1
    assert found["dflash:worker_info"] == 1
    assert found["dflash:kv_cache_groups"] == 1
    assert found["dflash:acceptance_warnings_total"] == 0
    assert "dflash:proposed_drafts_total" not in found  # only with adaptive verification


def test_bench_counts_what_the_server_counts(server, reference, tmp_path):
    """By chunk, by pass and by position, with two turns and several in flight."""
    record = live.bench(server, tmp_path / "bench.json", 3, TOKENS)
    for cell in record.cells:
        tokens, passes = cell.repeats[0].checks
        assert tokens.agrees is True, cell
        # With several in flight a busy machine may stream two passes in one chunk.
        assert passes.agrees is True or (passes.agrees is None and cell.concurrency > 1), cell
        assert (cell.tau.mean_per_request is None) == (passes.agrees is None)
    live.check_kept_text(record, reference)


def test_doctor_and_top_read_what_the_server_counts(server, reference):
    names = (
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    )
    probe, finding = live.check_doctor_and_top(server, reference, 4, *names, server.metrics)
    assert finding == "vllm drafts with this plugin"
    assert probe.first.passes == probe.first.counted


def test_aborted_streams_leave_the_others_alone(server, reference, alone):
    prompts = reference["prompts"][:6]
    body = {"prompt": prompts[0], "temperature": 0, "max_tokens": 200, "stream": True}
    with ThreadPoolExecutor(6) as pool:
        rest = [pool.submit(server.text, prompt) for prompt in prompts[1:]]
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        assert [one.result() for one in rest] == alone[1:6]
    assert server.text(prompts[0]) == alone[0]


def test_structured_output_is_valid(server, reference):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
    }
    body = {
        "messages": [{"role": "user", "content": "How many legs has a spider? Answer in JSON."}],
        "max_tokens": 100,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "legs", "schema": schema},
        },
    }
    answer = server.client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    found = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert isinstance(found["answer"], int)
    assert isinstance(found["sure"], bool)


def test_sampled_requests_are_served(server, reference):
    answer = server.complete(reference["prompts"][0], temperature=1.0, n=8, max_tokens=16)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-speculative-tokens=20"], "a block of 8 drafts 7"),
        (['--additional-config={"dflash_plugin": {"typo": 1}}'], "dflash_plugin.typo is 1"),
    ],
    ids=["drafts", "option"],
)
def test_what_cannot_be_served_ends_with_its_reason(smollm2, shipped, flags, message):
    draft = ["--speculative-method=dflash", f"--speculative-model={shipped}"]
    ended = subprocess.run(
        command(smollm2, *draft, *flags), capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode != 0
    assert message in ended.stdout + ended.stderr


def test_a_drafter_that_is_run_wrongly_is_not_served(smollm2, shipped, tmp_path):
    """The checkpoint's layers shifted by one: its own known answers give it away."""
    for file in shipped.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((shipped / "config.json").read_text())
    layers = config["dflash_config"]["target_layer_ids"]
    config["dflash_config"]["target_layer_ids"] = [layer - 1 for layer in layers]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft = ["--speculative-method=dflash", f"--speculative-model={tmp_path}"]
    ended = subprocess.run(
        command(smollm2, *draft), capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode != 0
    assert re.search(r"\d+ of 21 known drafts differ", ended.stdout + ended.stderr)
