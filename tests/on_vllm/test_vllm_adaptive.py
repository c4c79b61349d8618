"""Adaptive verification in the V2 runner: whatever number of drafts is chosen, text stays.

vLLM wants full CUDA graphs for it, which a CPU does not have; its checks of that are set aside, and
the runner takes its batches as they come.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm_helpers import ON_V2, running

from dflash_plugin.kernels import admit_drafts
from dflash_plugin.serving import head
from dflash_plugin.vllm import adaptive
from distribution import check_distribution, continuations
from tiny import ENGINE_SIZES as SIZES
from tiny import tiny_target, write_target, write_tiny

pytestmark = pytest.mark.skipif(not ON_V2, reason="adaptive verification needs the V2 runner")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53], [7, 8, 9]]
ADAPTIVE = {"enable_adaptive_verification": True}


@contextmanager
def adapting(monkeypatch: Any, target: Path, drafter: Path, turns: Any, **settings: Any) -> Any:
    """An engine, in this process, whose steps have rows by turns; None lets the policy choose."""
    from vllm.v1.worker.gpu import model_runner

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not torch.cuda.is_available():
        monkeypatch.setattr(VllmConfig, "_validate_adaptive_verification", lambda self: None)
        monkeypatch.setattr(model_runner, "resolve_adaptive_cudagraph_mode", lambda mode, **_: mode)
        name = "maybe_create_adaptive_verification_manager"
        monkeypatch.setattr(model_runner, name, lambda **_: object())
        adaptive.patch(model_runner)
    speculative = {**ADAPTIVE, **settings.pop("speculative", {})}
    with running(target, drafter, speculative=speculative, **settings) as engine:
        budget = adaptive.latest()
        assert budget is not None
        if turns is not None:
            rows, choose = itertools.cycle(turns), budget.policy.choose
            monkeypatch.setattr(budget.policy, "choose", lambda *args: choose(*args) and next(rows))
        yield engine, budget


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[PreTrainedModel, Path, Path]:
    directory = write_target(tmp_path_factory.mktemp("target"))
    target = tiny_target(**SIZES)
    with torch.no_grad():
        target.lm_head.weight.mul_(3)  # as sure as a trained one, so that few samples tell much
    target.save_pretrained(directory)
    drafter = tmp_path_factory.mktemp("drafter")
    return target, directory, write_tiny(drafter, **SIZES, target_hidden_size=64, block_size=8)


@pytest.mark.parametrize(
    ("turns", "interpreted"), [(None, False), ((5, 5, 8, 1, 1, 4), False), ((3, 1, 8, 2), True)]
)
def test_greedy_text_is_the_targets(pair, monkeypatch, turns, interpreted):
    target, directory, drafter = pair
    admitted = []
    if interpreted:
        native = admit_drafts.admit_drafts
        monkeypatch.setattr(head.kernels, "available", lambda device: True)
        monkeypatch.setattr(
            admit_drafts,
            "admit_drafts",
            lambda *args, **options: (native(*args, **options), admitted.append(args[4])),
        )
    with adapting(monkeypatch, directory, drafter, turns, max_model_len=256) as (engine, _):
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        (summary,) = engine.collective_rpc("dflash_adaptive")
        steps = summary["steps"]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        alone = target.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert list(output.outputs[0].token_ids) == alone[0, len(prompt) :].tolist()
    assert sum(steps.values()) > 5
    assert bool(admitted) == interpreted


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_targets_distribution(pair, monkeypatch, method):
    """χ² at temperature 1: which drafts are verified must not depend on the drafts."""
    target, directory, drafter = pair
    length, samples = 2, 150
    expected = continuations(target, PROMPTS[0], length, best=5, cut=False)
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, n=samples)
    settings = {"speculative": {"draft_sample_method": method}, "max_model_len": 256}
    with adapting(monkeypatch, directory, drafter, (2, 1, 8, 3), max_num_seqs=64, **settings) as (
        engine,
        _,
    ):
        prompt = {"prompt_token_ids": PROMPTS[0]}
        completions = engine.generate([prompt], params, use_tqdm=False)[0].outputs
    assert len(completions) == samples
    assert 0 < check_distribution([tuple(c.token_ids) for c in completions], expected) < samples
