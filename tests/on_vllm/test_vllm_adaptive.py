"""Adaptive verification in the V2 runner: whatever number of drafts is chosen, text stays."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from vllm import SamplingParams

from dflash_plugin.adaptive import policy
from dflash_plugin.adaptive.step_times import Lengths, Step
from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, answer, save_record
from dflash_plugin.serving import adaptive_setup, draft_tokens
from dflash_plugin.transformers import load_drafter
from dflash_plugin.vllm import adaptive, adaptive_default
from dflash_plugin.vllm.selfcheck import draft
from tests.helpers.core_drafts import core_proposals
from tests.helpers.distribution import check_distribution, continuations
from tests.helpers.tiny import DFLASH2, tiny_target, write_target, write_tiny
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.on_vllm.vllm_helpers import ON_V2, Server, counter, on_worker, running, serving

pytestmark = pytest.mark.skipif(not ON_V2, reason="adaptive verification needs the V2 runner")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53], [7, 8, 9]]
ADAPTIVE = {"enable_adaptive_verification": True}


@contextmanager
def adapting(monkeypatch: Any, target: Path, drafter: Path, turns: Any, **settings: Any) -> Any:
    """An engine, in this process, whose steps have rows by turns, and may draft shorter blocks."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    speculative = {**ADAPTIVE, **settings.pop("speculative", {})}
    with running(target, drafter, speculative=speculative, **settings) as engine:
        budget = adaptive.latest()
        assert budget is not None
        lengths, choose = itertools.cycle(turns), budget.policy.choose
        chosen = Lengths(budget.block, budget.block)

        def by_turns(*args: Any) -> int:
            nonlocal chosen
            choose(*args)
            turn = next(lengths)
            chosen = turn if isinstance(turn, Lengths) else Lengths(turn, budget.block)
            return chosen.verify

        monkeypatch.setattr(budget.policy, "choose", by_turns)
        drafted = property(lambda _: chosen.draft)
        monkeypatch.setattr(policy.VerifyLenPolicy, "draft_len", drafted)
        yield engine, budget


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[PreTrainedModel, Path, Path]:
    directory = write_target(tmp_path_factory.mktemp("target"))
    target = tiny_target(**SIZES)
    with torch.no_grad():
        target.lm_head.weight.mul_(3)  # as sure as a trained one, so that few samples tell much
    target.save_pretrained(directory)
    drafter = tmp_path_factory.mktemp("drafter")
    write_tiny(drafter, **SIZES, target_hidden_size=64, block_size=8)
    known = answer(load_drafter(drafter, target), target, PROMPTS[0])
    save_record(drafter, ReferenceDrafts(answers=[known]))
    return target, directory, drafter


@pytest.mark.parametrize(
    ("turns", "interpreted"),
    [((5, 5, 8, 1, 1, 4), False), ((3, 1, Lengths(4, 4), 8, Lengths(2, 4), 2), True)],
)
def test_greedy_text_is_the_targets(pair, monkeypatch, turns, interpreted):
    target, directory, drafter = pair
    admitted = []
    if interpreted:
        native = adaptive_setup.admit_drafts
        monkeypatch.setattr(draft_tokens.kernels, "available", lambda device: True)
        monkeypatch.setattr(
            adaptive_setup,
            "admit_drafts",
            lambda *args, **options: (native(*args, **options), admitted.append(args[4])),
        )
    with adapting(monkeypatch, directory, drafter, turns, max_model_len=256) as (engine, _):
        if interpreted:
            # What a GPU's start compiles ahead changes nothing of what is served.
            on_worker(engine, lambda worker: worker.model_runner.speculator._launch_all())
            assert admitted
            admitted.clear()
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        (summary,) = engine.collective_rpc("dflash_adaptive")
    assert [list(output.outputs[0].token_ids) for output in outputs] == of_target(target)
    assert sum(summary["steps"].values()) > 5
    assert bool(admitted) == interpreted


@pytest.mark.parametrize("able", [True, False])
def test_it_is_on_by_itself_unless_the_runner_finds_a_back_end_that_cannot(pair, monkeypatch, able):
    """What a GPU with full graphs answers is put in; here no batch is captured."""
    target, directory, drafter = pair
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(adaptive_default, "reason_against", lambda vllm_config: None)
    if not able:

        def unable(**_: Any) -> None:
            raise ValueError("the OWN attention back end does not support it")

        name = "maybe_create_adaptive_verification_manager"
        place = f"vllm.v1.worker.gpu.model_runner.{name}"
        monkeypatch.setattr(place, adaptive.create_manager(unable))
    with running(directory, drafter, max_model_len=256) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        (summary,) = engine.collective_rpc("dflash_adaptive")
    assert [list(output.outputs[0].token_ids) for output in outputs] == of_target(target)
    assert (summary is not None) == able


def test_a_server_answers_like_the_target_and_counts_what_it_chose(pair, tmp_path):
    """The policy decides, in a process of its own; its counts reach the one that serves HTTP.

    Those of the passes that check the drafter at start are among them.
    """
    target, directory, drafter = pair
    flag = json.dumps({"method": "dflash", "model": str(drafter), **ADAPTIVE})
    asked = {"max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    with (
        serving(
            tmp_path / "log",
            directory,
            f"--speculative-config={flag}",
            "--max-model-len=256",
            VLLM_SERVER_DEV_MODE="1",
        ) as server,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        answers = list(pool.map(lambda prompt: server.complete(prompt, **asked), PROMPTS))
        assert [answer["choices"][0]["token_ids"] for answer in answers] == of_target(target)
        chosen = counts(server)
        deadline = time.monotonic() + 5  # The last step's statistics may still be under way.
        while (exported := server.metrics()) | chosen != exported and time.monotonic() < deadline:
            time.sleep(0.1)
        assert exported | chosen == exported
        assert chosen["dflash:verified_drafts_total"] > 0


def counts(server: Server) -> dict[str, float]:
    """What the worker has chosen, by the names of its counters."""
    answer = server.client.post("/collective_rpc", json={"method": "dflash_adaptive"})
    (summary,) = answer.json()["results"]
    kinds = ("proposed", "verified", "saved")
    return {
        **{f"dflash:{kind}_drafts_total": summary[f"drafts_{kind}"] for kind in kinds},
        **{f"dflash:adaptive_steps_total[{rows}]": n for rows, n in summary["steps"].items()},
    }


def of_target(target: PreTrainedModel) -> list[list[int]]:
    """20 tokens after each prompt."""
    found = []
    for prompt in PROMPTS:
        tokens = target.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        found.append(tokens[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_targets_distribution(pair, monkeypatch, method):
    """χ² at temperature 1: which drafts are verified must not depend on the drafts."""
    target, directory, drafter = pair
    length, samples = 2, 150
    expected = continuations(target, PROMPTS[0], length, best=5, cut=False)
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, n=samples)
    settings = {"speculative": {"draft_sample_method": method}, "max_model_len": 256}
    turns = (2, 1, Lengths(4, 4), 8, Lengths(3, 4))
    with adapting(monkeypatch, directory, drafter, turns, max_num_seqs=64, **settings) as (
        engine,
        _,
    ):
        prompt = {"prompt_token_ids": PROMPTS[0]}
        completions = engine.generate([prompt], params, use_tqdm=False)[0].outputs
    assert len(completions) == samples
    assert 0 < check_distribution([tuple(c.token_ids) for c in completions], expected) < samples


def block_rows(worker: Any) -> int:
    """Rows of a block that the layers of the last draft pass were told."""
    return int(worker.model_runner.speculator.model.model.block_size)


def test_shorter_blocks(pair, monkeypatch, tmp_path):
    """Greedy text of steps that draft blocks of 8 and of 4 rows, in turns.

    The drafts of the shorter ones are those of a core with blocks of 4 rows. The drafter's
    convolutions and its selector look at a row's place in the block.
    """
    target, directory, _ = pair
    drafter, short = (
        write_tiny(tmp_path / str(size), **SIZES, target_hidden_size=64, block_size=size, **DFLASH2)
        for size in (8, 4)
    )
    reference = {"target": target, "drafter": load_drafter(short, target)}
    turns = [Lengths(*lens) for lens in ((4, 4), (2, 4), (8, 8), (4, 8), (1, 8), (4, 4), (8, 8))]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(policy, "RUN", 1)
    with running(directory, drafter, speculative=ADAPTIVE, max_model_len=256) as engine:
        manager = adaptive.latest()
        chosen = itertools.cycle(turns)
        monkeypatch.setattr(manager.policy, "_next", lambda *_: next(chosen))
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        (summary,) = engine.collective_rpc("dflash_adaptive")
        monkeypatch.setattr(manager, "draft_whole_blocks", lambda: setattr(manager, "draft_len", 4))
        for prompt in PROMPTS:
            (core,) = core_proposals(reference, prompt, [len(prompt) - 1])
            assert on_worker(engine, draft, prompt)[:3] == core.tokens[0].tolist()
        assert on_worker(engine, block_rows) == 4
    assert [list(output.outputs[0].token_ids) for output in outputs] == of_target(target)
    assert 0 < summary["short_block_steps"] < sum(summary["steps"].values())


def skew_clock(worker: Any) -> None:
    """By the second rank's clock steps take what was profiled; by the first's, the host is slow."""
    learned, policy.RUN = adaptive.latest().policy, 2
    learned.times.prior = {
        Step(size, *choice): 0.001 * (1 + choice.verify)
        for size in range(1, 5)
        for choice in learned.choices
    }
    if worker.rank == 1:
        steps = itertools.count()
        adaptive.time = SimpleNamespace(monotonic=lambda: 0.003 * next(steps))


def test_ranks_whose_clocks_differ_verify_the_same(pair, monkeypatch):
    target, directory, drafter = pair
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(
        directory, drafter, speculative=ADAPTIVE, tensor_parallel_size=2, max_num_seqs=4
    ) as engine:
        engine.collective_rpc(skew_clock)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
            use_tqdm=False,
        )
        first, second = engine.collective_rpc("dflash_adaptive")
    assert [list(output.outputs[0].token_ids) for output in outputs] == of_target(target)
    assert first["steps"] == second["steps"]
    assert first["short_block_steps"] == second["short_block_steps"]
    assert sum(steps > 0 for steps in first["steps"].values()) > 1
    assert first["step_milliseconds"] != second["step_milliseconds"]


def test_prompts_wait_for_others(pair, monkeypatch):
    """Four requests run at a time, and each has another length, so that they end one by one."""
    target, directory, drafter = pair
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lengths = range(4, 13)
    read: list[int] = []
    with running(directory, drafter, speculative=ADAPTIVE, max_num_seqs=4) as engine:
        manager = adaptive.latest()
        assert manager.policy.may_wait
        note = manager.policy.read_prompts
        monkeypatch.setattr(manager, "bypass", 0)
        monkeypatch.setattr(manager.policy, "_choose_wait", lambda requests: None)
        monkeypatch.setattr(
            manager.policy, "read_prompts", lambda *given: (read.append(given[0]), note(*given))
        )
        texts = {}
        for wait_below in (0, 3):
            manager.policy.wait_below = wait_below
            read.clear()
            outputs = engine.generate(
                [{"prompt_token_ids": PROMPTS[0]}] * len(lengths),
                [
                    SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
                    for length in lengths
                ],
                use_tqdm=False,
            )
            texts[wait_below] = [list(output.outputs[0].token_ids) for output in outputs]
            assert (manager.policy.waited > 0) == (wait_below > 0)
            # Of the first prompts, which come before any draft, vLLM tells nothing.
            assert sum(read) == len(lengths) - 4
            assert (max(read) > 1) == (wait_below > 0)
    whole = of_target(target)[0]
    assert texts[0] == texts[3] == [whole[:length] for length in lengths]


def test_prompts_of_another_engine_do_not_wait(pair, monkeypatch):
    """Of two engines in one process the first has no drafter, so none of its prompts waits."""
    target, directory, drafter = pair
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    texts = {}
    with (
        running(directory, None) as alone,
        running(directory, drafter, speculative=ADAPTIVE) as drafted,
    ):
        assert on_worker(alone, adaptive.of_worker) is None
        assert on_worker(drafted, adaptive.of_worker) is not None
        manager = adaptive.latest()
        monkeypatch.setattr(manager, "bypass", 0)
        monkeypatch.setattr(manager.policy, "wait_below", 100)
        engine = alone.llm_engine
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            engine.step()
            scheduler = engine.engine_core.engine_core.scheduler
            assert scheduler.get_request_counts() == (number + 1, 0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)
        assert manager.policy.waited == 0
    assert [texts[number] for number in range(len(PROMPTS))] == of_target(target)


def test_prompts_that_lack_room_in_the_cache_wait_for_nothing_else(pair, monkeypatch):
    """Five of eight requests fit at first and two in the end, and the preempted ones begin again.

    Slots are free for all, so in nearly all steps a prompt waits for the cache alone.
    """
    target, directory, drafter = pair
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with running(
        directory, drafter, speculative=ADAPTIVE, max_model_len=96, num_gpu_blocks_override=6
    ) as engine:
        manager = adaptive.latest()
        monkeypatch.setattr(manager, "bypass", 0)
        monkeypatch.setattr(manager.policy, "_choose_wait", lambda requests: None)
        manager.policy.wait_below = 100
        outputs = engine.generate(
            [{"prompt_token_ids": PROMPTS[0]}] * 8,
            SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
            use_tqdm=False,
        )
        assert counter(engine, "vllm:num_preemptions") > 0
        assert 4 * manager.policy.waited < manager.steps
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts == [of_target(target)[0]] * 8


def proposals(worker: Any) -> torch.Tensor:
    """What all drafts were drawn from, of all requests that there may be."""
    return worker.model_runner.speculator.draft_logits


def slots_limited_to_three(engine: Any) -> int:
    """Request slots whose drafts were each drawn from three tokens."""
    counts = on_worker(engine, proposals).isfinite().sum(-1)
    return int((counts == 3).all(-1).sum())


def test_a_dflash2_drafter(pair, monkeypatch, tmp_path):
    """χ² of what its path draws, in cut passes; then within a request's own top-k.

    Last the path by the kernels, interpreted. Blocks are shorter than the drafter's: those of a
    core with blocks of that size.
    """
    target, directory, _ = pair
    whole, short = (
        write_tiny(tmp_path / str(size), **SIZES, target_hidden_size=64, block_size=size, **DFLASH2)
        for size in (8, 5)
    )
    reference = {"target": target, "drafter": load_drafter(short, target)}
    length, samples = 2, 200
    expected = continuations(target, PROMPTS[0], length, best=5, cut=False)
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, n=samples)
    settings = {"draft_sample_method": "probabilistic", "num_speculative_tokens": 4}
    with adapting(
        monkeypatch, directory, whole, (3, 5, 2), max_num_seqs=64, max_model_len=256,
        speculative=settings,
    ) as (engine, _):  # fmt: skip
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        completions = engine.generate(prompts[:1], params, use_tqdm=False)[0].outputs
        assert slots_limited_to_three(engine) == 0
        params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True, n=2)
        limited = engine.generate(prompts[:1], params, use_tqdm=False)[0].outputs
        assert slots_limited_to_three(engine) == 2
        monkeypatch.setattr(draft_tokens.kernels, "available", lambda device: True)
        for prompt in PROMPTS:
            (core,) = core_proposals(reference, prompt, [len(prompt) - 1])
            assert on_worker(engine, draft, prompt) == core.tokens[0].tolist()
            logits = torch.full((4, 97), float("-inf")).scatter(
                -1, core.candidates[0], core.scores[0]
            )
            found = on_worker(engine, proposals)
            assert any(torch.allclose(one, logits, atol=1e-3) for one in found)
        greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        outputs = engine.generate(prompts, greedy, use_tqdm=False)
    assert len(completions) == samples
    assert 0 < check_distribution([tuple(c.token_ids) for c in completions], expected) < samples
    within = continuations(target, PROMPTS[0], length, best=3, cut=True)
    assert all(tuple(c.token_ids[:length]) in within for c in limited)
    assert [list(output.outputs[0].token_ids) for output in outputs] == of_target(target)
