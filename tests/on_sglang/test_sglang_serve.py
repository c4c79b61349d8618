"""``sglang.launch_server`` over HTTP with the README's flags, against SGLang alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import DynamicCache

from dflash_plugin.bench.evaluate import acceptance_by_position
from dflash_plugin.checkpoints import reference_drafts
from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, save_record
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.sglang import compat
from dflash_plugin.sglang.new_weights import KEPT, REPLACED
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from tests.helpers import live
from tests.helpers.core_drafts import core_drafts
from tests.helpers.distribution import check_distribution, continuations
from tests.helpers.tiny import DFLASH2, tiny_target, write_target, write_tiny
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.on_sglang.sglang_server import (
    AS_FOR_A_USER,
    ENVIRONMENT,
    Server,
    command,
    dflash,
    serving,
    tokens,
)

DATA = Path(__file__).parents[1] / "data"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")
TOKENS, DRAFTS, CHUNK = 24, 7, 96
# All prompts on one version, a part on the others.
STEP = 1 if compat.installed() == "0.5.20" else 4
CHUNKED = f"--chunked-prefill-size={CHUNK}"


@pytest.fixture(scope="module")
def reference(smollm2, shipped) -> dict[str, Any]:
    """The target, the drafter and what the Transformers engine makes of the prompts."""
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    drafter = load_drafter(shipped, target)
    prompts = [
        encode(tokenizer, prompt)
        for name in SETS
        for prompt in load_prompts(DATA / f"{name}.jsonl")
    ][::STEP]
    engine = Engine(target, drafter, max_batch=8, max_length=512)
    results = engine.generate([Request(prompt, TOKENS) for prompt in prompts])
    return {
        "target": target,
        "drafter": drafter,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "results": results,
    }


@pytest.fixture(scope="module")
def alone(smollm2, reference, tmp_path_factory) -> list[list[int]]:
    """What the target alone answers, in Transformers; on one version some of it in SGLang too.

    In float32 both write the same.
    """
    found = [result.tokens for result in reference["results"]]
    if STEP == 1:
        log = tmp_path_factory.mktemp("alone") / "log"
        with serving(log, smollm2, CHUNKED, DFLASH_PLUGIN="off") as server:
            some = server.batch(reference["prompts"][::5], max_new_tokens=TOKENS)
        assert tokens(some) == found[::5]
    return found


@pytest.fixture(scope="module")
def drafts_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("drafts") / "blocks.jsonl"


@pytest.fixture(scope="module")
def server(smollm2, shipped, alone, drafts_file, tmp_path_factory) -> Iterator[Server]:
    """Overlapped, chunked, with metrics; every drafted block is recorded.

    Started as for a user.
    """
    log = tmp_path_factory.mktemp("server") / "log"
    flags = [*dflash(shipped), CHUNKED, "--enable-metrics"]
    environment = {**AS_FOR_A_USER, "RECORD_DRAFTS": str(drafts_file)}
    with serving(log, smollm2, *flags, **environment) as running:
        yield running


@pytest.fixture(scope="module")
def synchronous(smollm2, shipped, alone, tmp_path_factory) -> Iterator[Server]:
    """Without overlap, with pages of 16 and a cache too small for all."""
    log = tmp_path_factory.mktemp("synchronous") / "log"
    flags = ["--disable-overlap-schedule", "--page-size=16", "--max-total-tokens=1152"]
    # SGLang's allocator of pages is a Triton kernel.
    with serving(log, smollm2, *dflash(shipped), *flags, TRITON_INTERPRET="1") as running:
        yield running


@pytest.fixture(scope="module")
def short(smollm2, shipped, tmp_path_factory) -> Iterator[Server]:
    """With two drafts a block, as many as a text of three tokens commits."""
    log = tmp_path_factory.mktemp("short") / "log"
    flags = ["--speculative-num-draft-tokens=3", "--max-running-requests=32"]
    with serving(log, smollm2, *dflash(shipped), *flags) as running:
        yield running


def tau(answers: list[Any]) -> float:
    """Tokens committed per verify pass, those that a stop or the limit cuts off included."""
    metas = [answer["meta_info"] for answer in answers]
    accepted = sum(meta.get("spec_num_correct_drafts", 0) for meta in metas)
    return 1 + accepted / sum(meta.get("spec_verify_ct", 0) for meta in metas)


@pytest.mark.versions
def test_greedy_text_equals_the_target_alone(server, reference, alone):
    """50 prompts batched, in chunks; a few again one by one, out of the radix cache."""
    prompts = reference["prompts"]
    assert len(prompts) >= 50 // STEP
    assert max(map(len, prompts)) > CHUNK
    answers = server.batch(prompts, max_new_tokens=TOKENS)
    assert tokens(answers) == alone
    core = 1 + sum(acceptance_by_position(reference["results"], DRAFTS))
    assert tau(answers) == pytest.approx(core, rel=0.02)
    for number in range(0, len(prompts), 5):
        again = server.generate(prompts[number], max_new_tokens=TOKENS)
        assert again["output_ids"] == alone[number]
        assert again["meta_info"]["cached_tokens"] >= len(prompts[number]) - 1


@pytest.mark.versions
def test_greedy_text_with_as_many_drafts_as_pay(
    smollm2, shipped, reference, alone, server, tmp_path
):
    """The policy's own choices, by this machine's clock."""
    prompts = reference["prompts"]
    flags = [*dflash(shipped), CHUNKED, "--enable-metrics"]
    # Each length is tried for eight steps, the longest first.
    long = {"max_new_tokens": 192, "ignore_eos": True}
    with serving(
        tmp_path / "log", smollm2, *flags, DFLASH_PLUGIN_ADAPTIVE_VERIFICATION="1"
    ) as ours:
        assert tokens(ours.batch(prompts[:8], max_new_tokens=TOKENS)) == alone[:8]
        assert tokens(ours.batch(prompts[:1], **long)) == tokens(server.batch(prompts[:1], **long))
        learnt = ours.info()["adaptive"]
        counted = ours.metrics()
    used = [int(rows) for rows, steps in learnt["steps"].items() if steps]
    assert len(used) > 2
    assert min(used) < max(used) == DRAFTS + 1
    assert learnt["drafts_saved"] > 0
    assert learnt["short_block_steps"] == counted["dflash:short_block_steps_total"] > 0
    assert learnt["expected_tokens"][1] > 1.4
    for rows in used:
        steps = counted[f"dflash:adaptive_steps_total[{rows}]"]
        assert 0 < steps <= learnt["steps"][str(rows)]
    assert 0 < counted["dflash:saved_drafts_total"] <= learnt["drafts_saved"]
    assert counted["dflash:verified_drafts_total"] < counted["dflash:proposed_drafts_total"]


@pytest.mark.versions
def test_a_dflash2_drafter(tmp_path):
    """Overlapped; the server does not start unless every known answer agrees."""
    directory = write_target(tmp_path / "target")
    target = tiny_target(**SIZES)
    target.save_pretrained(directory)
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64, **DFLASH2)
    drafter = load_drafter(checkpoint, target)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [50, 51, 52, 53], [7, 8, 9]]
    known = [reference_drafts.answer(drafter, target, prompt) for prompt in prompts]
    save_record(checkpoint, ReferenceDrafts(answers=known))
    alone = [
        target.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    log = tmp_path / "log"
    with serving(log, directory, *dflash(checkpoint)) as server:
        assert "the drafter's 3 known answers agree" in log.read_text()
        params = {"max_new_tokens": 16, "ignore_eos": True}
        assert tokens(server.batch(prompts, **params)) == alone
        drawn = {"temperature": 1.0, "sampling_seed": 3, **params}
        first = server.generate(prompts[0], **drawn)["output_ids"]
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(server.generate, prompts[1], **params)
            assert server.generate(prompts[0], **drawn)["output_ids"] == first
            assert other.result()["output_ids"] == alone[1]
    assert first != alone[0]


@pytest.mark.versions
def test_greedy_text_without_overlap_and_with_retraction(synchronous, reference, alone):
    """Every other prompt, where all were read with overlap."""
    part = slice(None, None, 2 if STEP == 1 else 1)
    answers = synchronous.batch(reference["prompts"][part], max_new_tokens=TOKENS)
    assert tokens(answers) == alone[part]
    core = 1 + sum(acceptance_by_position(reference["results"][part], DRAFTS))
    assert tau(answers) == pytest.approx(core, rel=0.02)
    longer = synchronous.batch(reference["prompts"][:8], max_new_tokens=100, ignore_eos=True)
    for answer, text in zip(longer, alone, strict=False):
        assert answer["output_ids"][: len(text)] == text
    assert "etract" in synchronous.log.read_text()


@pytest.mark.versions
def test_the_drafter_was_checked_at_start(server):
    assert "the drafter's 3 known answers agree" in server.log.read_text()


@pytest.mark.versions
@torch.inference_mode()
def test_every_draft_equals_the_core(server, reference, drafts_file):
    """Of prompts that are new and of one whose prefix is in the radix cache."""
    prompts = reference["prompts"][:4]
    answers = [
        server.generate(prompt, rid=f"drafts-{number}", ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]
    assert any(answer["meta_info"]["cached_tokens"] for answer in answers)
    made = defaultdict(dict)
    for line in drafts_file.read_text().splitlines():
        rid, anchor, block = json.loads(line)
        made[rid][anchor] = block
    compared = 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = prompt + answer["output_ids"]
        blocks = {at: block for at, block in made[f"drafts-{number}"].items() if at < len(text)}
        expected = core_drafts(reference, text, list(blocks))
        for (at, block), (core, margins) in zip(blocks.items(), expected, strict=True):
            assert block[0] == text[at]
            for got, wanted, margin in zip(block[1:], core, margins, strict=True):
                assert got == wanted or margin < 1e-3, (at, block, core, margins)
                compared += 1
    assert compared >= 30 * DRAFTS


def test_acceptance_is_in_meta_info_server_info_and_prometheus(server, reference):
    before = server.info()
    answer = server.generate(reference["prompts"][0], ignore_eos=True)
    meta = answer["meta_info"]
    by_position = meta["spec_accept_by_position"]
    assert len(by_position) == DRAFTS
    assert by_position == sorted(by_position, reverse=True)
    accepted = meta["spec_num_correct_drafts"] / meta["spec_verify_ct"]
    assert sum(by_position) == pytest.approx(accepted)
    after = server.info()
    assert after["verify_passes"] - before["verify_passes"] >= meta["spec_verify_ct"]
    assert after["acceptance_length"] == pytest.approx(1 + sum(after["accept_by_position"]))
    assert after["dialect"] == "z-lab"
    # Keys and values of 3 layers of 3 heads of 64 in float32, for every slot.
    slots, rest = divmod(after["draft_pool_bytes"], 2 * 3 * 3 * 64 * 4)
    assert slots > 0
    assert rest == 0
    found = server.metrics()
    assert found["dflash:expected_acceptance_length"] == pytest.approx(3.31, abs=0.01)
    assert found["dflash:drafter_info"] == 1
    assert found["dflash:verify_passes_total"] > 0
    counts = [found[f"dflash:accepted_drafts_total[{k}]"] for k in range(DRAFTS)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= found["dflash:verify_passes_total"]


@pytest.mark.versions
def test_bench_counts_what_the_server_counts(server, reference, tmp_path):
    """Of requests, of SGLang's metrics and by position, with two turns and several in flight."""
    record = live.bench(server, tmp_path / "bench.json", 2, TOKENS)
    for cell in record.cells:
        assert [check.agrees for check in cell.repeats[0].checks] == [True, True], cell
    live.check_kept_text(record, reference)


@pytest.mark.versions
def test_doctor_and_top_read_what_the_server_counts(server, reference):
    def counted_now() -> dict[str, float]:
        """With what came since the plugin last exported; ``/server_info`` has it export."""
        server.info()
        return server.metrics()

    names = "dflash:verify_passes_total", "dflash:accepted_drafts_total"
    _, finding = live.check_doctor_and_top(server, reference, 2, *names, counted_now)
    assert finding == "sglang drafts with this plugin"


@pytest.mark.versions
def test_aborted_streams_leave_the_others_alone(server, reference, alone):
    prompts = reference["prompts"][:6]
    params = {"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}
    body = {"input_ids": prompts[0], "sampling_params": params, "stream": True}
    with ThreadPoolExecutor(6) as pool:
        rest = [
            pool.submit(server.generate, prompt, max_new_tokens=TOKENS) for prompt in prompts[1:]
        ]
        with server.client.stream("POST", "/generate", json=body) as stream:
            next(stream.iter_lines())
        assert tokens([one.result() for one in rest]) == alone[1:6]
    assert server.generate(prompts[0], max_new_tokens=TOKENS)["output_ids"] == alone[0]


def test_structured_output_is_valid(server):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
    }
    body = {
        "model": "default",
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


PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "frequency, presence": {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    "length": {"min_new_tokens": 12, "frequency_penalty": 0.2},
}


@torch.inference_mode()
def penalized(
    target: Any, prompt: list[int], length: int, stops: set[int], **params: Any
) -> list[int]:
    """Greedy text under penalties, step by step from the target's logits."""
    found: list[int] = []
    cache = DynamicCache()
    while len(found) < length and (not found or found[-1] not in stops):
        ids = torch.tensor([found[-1:] or prompt])
        logits = target(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        counts = torch.bincount(torch.tensor(found, dtype=torch.int64), minlength=len(logits))
        logits -= params.get("frequency_penalty", 0.0) * counts
        logits -= params.get("presence_penalty", 0.0) * (counts > 0)
        scale = torch.where(counts > 0, params.get("repetition_penalty", 1.0), 1.0)
        logits = torch.where(logits < 0, logits * scale, logits / scale)
        if len(found) < params.get("min_new_tokens", 0):
            logits[list(stops)] = float("-inf")
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_count_every_token_of_a_block(server, synchronous, reference, alone, kind):
    """Overlapped or not, beside a request that has none."""
    params = PENALTIES[kind]
    prompts, plain = reference["prompts"][:2], [text[:20] for text in alone[:3]]
    # A token that ends the text too early for a minimum length.
    stop = plain[0][5]
    stops = {stop, reference["tokenizer"].eos_token_id}
    expected = [penalized(reference["target"], p, 20, stops, **params) for p in prompts]
    assert expected[0] != plain[0]
    for running in (server, synchronous):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(running.generate, reference["prompts"][2], max_new_tokens=20)
            texts = running.batch(prompts, max_new_tokens=20, stop_token_ids=[stop], **params)
        assert tokens(texts) == expected
        assert other.result()["output_ids"] == plain[2]


@pytest.mark.parametrize(
    "filters",
    [pytest.param({"top_k": 3}, marks=pytest.mark.versions), {"min_p": 0.3}],
    ids=["top_k", "min_p"],
)
def test_sampled_text_has_the_targets_distribution(short, reference, filters):
    """χ² at temperature 1: the second and third token come out of verification."""
    prompt = encode(reference["tokenizer"], load_prompts(DATA / "mt_bench.jsonl")[0])
    samples = 300
    if "min_p" in filters:
        expected = cut_by_min_p(reference["target"], prompt, 3, filters["min_p"])
    else:
        expected = continuations(reference["target"], prompt, 3, best=3, cut=True)
    assert len(expected) > 3
    params = {"temperature": 1.0, "max_new_tokens": 3, "ignore_eos": True, **filters}
    answers = short.samples(prompt, samples, **params)
    texts = [tuple(answer["output_ids"]) for answer in answers]
    assert check_distribution(texts, expected) == samples
    proposed = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    assert proposed >= samples


@torch.inference_mode()
def cut_by_min_p(target: Any, prompt: list[int], length: int, min_p: float) -> dict[Any, float]:
    """Every continuation whose tokens are at least ``min_p`` as likely as the likeliest."""
    sequences: dict[Any, float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, probability in sequences.items():
            ids = torch.tensor([prompt + list(text)])
            shares = torch.softmax(target(input_ids=ids, use_cache=False).logits[0, -1], -1)
            kept = shares * (shares >= min_p * shares.max())
            for token in kept.nonzero()[:, 0].tolist():
                longer[(*text, token)] = probability * float(kept[token] / kept.sum())
        sequences = longer
    return sequences


@pytest.mark.versions
def test_a_seed_repeats_its_text_in_any_batch(server, reference):
    prompts, params = reference["prompts"][:3], {"temperature": 1.0, "max_new_tokens": 16}
    first = server.generate(prompts[0], sampling_seed=11, **params)["output_ids"]
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(server.generate, prompt, **params) for prompt in prompts[1:]]
        again = server.generate(prompts[0], sampling_seed=11, **params)["output_ids"]
        assert [one.result()["output_ids"] for one in others]
    assert again == first
    assert server.generate(prompts[0], sampling_seed=12, **params)["output_ids"] != first
    several, repeated = (
        tokens(server.samples(prompts[0], 3, sampling_seed=11, **params)) for _ in range(2)
    )
    assert several == repeated
    assert several[0] == first
    assert several[1] != first
    assert several[2] not in several[:2]


@pytest.mark.versions
@torch.inference_mode()
def test_log_probabilities_are_the_targets(server, reference):
    prompt = reference["prompts"][0]
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": TOKENS},
        "return_logprob": True,
    }
    answer = server.client.post("/generate", json=body)
    if not compat.current().log_probabilities:
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert "return_logprob" in answer.text
        return
    found = answer.json()
    text = found["output_ids"]
    logits = reference["target"](input_ids=torch.tensor([prompt + text]), use_cache=False).logits
    expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1], dim=-1)
    wanted = [float(row[token]) for row, token in zip(expected, text, strict=True)]
    got = [entry[0] for entry in found["meta_info"]["output_token_logprobs"]]
    assert got == pytest.approx(wanted, abs=2e-3)


@pytest.mark.versions
def test_new_weights_come_from_a_targets_or_a_drafters_directory(
    server, reference, alone, smollm2, shipped
):
    """The same weights again, so that the text and its acceptance stay."""
    for path, message in ((smollm2, KEPT), (shipped, REPLACED)):
        answer = server.client.post("/update_weights_from_disk", json={"model_path": str(path)})
        assert answer.json()["success"], answer.text
        assert message in answer.text
        answers = server.batch(reference["prompts"][:4], max_new_tokens=TOKENS)
        assert tokens(answers) == alone[:4]
        assert tau(answers) > 1.5
        # A drafter's path is not the served model's.
        assert server.client.get("/model_info").json()["model_path"] == str(smollm2)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--speculative-num-draft-tokens=20"], {}, "the drafter's block is 8 tokens"),
        ([], {"DFLASH_PLUGIN_TYPO": "1"}, "dflash_plugin.typo is '1'"),
    ],
    ids=["block", "option"],
)
def test_what_cannot_be_served_ends_with_its_reason(smollm2, shipped, flags, environment, message):
    ended = launch(smollm2, shipped, *flags, **environment)
    assert ended.returncode != 0
    assert message in ended.stdout + ended.stderr


def test_a_drafter_without_an_algorithm_is_not_left_unused(smollm2, shipped):
    ended = launched(smollm2, f"--speculative-draft-model-path={shipped}")
    assert ended.returncode != 0
    assert "give --speculative-algorithm DFLASH" in ended.stdout + ended.stderr


def test_a_drafter_that_is_run_wrongly_is_not_served(smollm2, shipped, tmp_path):
    """The checkpoint's layers shifted by one: its own known answers give it away."""
    for file in shipped.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((shipped / "config.json").read_text())
    layers = config["dflash_config"]["target_layer_ids"]
    config["dflash_config"]["target_layer_ids"] = [layer - 1 for layer in layers]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = launch(smollm2, tmp_path)
    assert ended.returncode != 0
    assert re.search(r"\d+ of 21 known drafts differ", ended.stdout + ended.stderr)


def launch(target: Path, drafter: Path, *flags: str, **environment: str) -> Any:
    """A server with a drafter that is to end by itself."""
    return launched(target, *dflash(drafter), *flags, **environment)


def launched(target: Path, *flags: str, **environment: str) -> Any:
    """A server that is to end by itself."""
    return subprocess.run(
        command(target, *flags),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **ENVIRONMENT, **environment},
    )
