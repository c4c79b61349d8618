"""Quantised drafters that stay quantised on vLLM's linears: ``draft_weights: checkpoint``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from vllm import SamplingParams

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.transformers.loading import load_drafter
from dflash_plugin.vllm.selfcheck import draft
from tests.helpers.greedy import first_difference
from tests.helpers.quantised import LAYOUTS, W8A8, Layout, keep_fp8_rows, quantise
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import write_tiny
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

pytestmark = pytest.mark.skipif(
    ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted"
)

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40],
    [50, 51, 52, 53],
    [60, 3, 61, 4, 62],
    [80, 70, 60, 50, 40, 30, 20],
]
OPTIONS = {"additional_config": {"dflash_plugin": {"draft_weights": "checkpoint"}}}
KEPT = {"gate_up_proj", "down_proj", "output_proj"}
# bfloat16 and int8 activations may turn a draft that is nearly a tie.
TIE = 0.2
# Kernels of the CPU; others are asked for on a GPU.
KERNELS = {"W4A16": "CPUWNA16LinearKernel", "W8A8": "CPUInt8ScaledMMLinearKernel"}
ON_OWN_LINEARS: dict[str, Layout] = {"W4A16": LAYOUTS["W4A16"], "W8A8": W8A8}


def linears(worker: Any) -> dict[str, str]:
    """The method of each kind of linear of the drafter."""
    modules = worker.get_draft_model().drafter.named_modules()
    return {
        name.rpartition(".")[2]: type(module.quant_method).__name__
        for name, module in modules
        if hasattr(module, "quant_method")
    }


def kernel(worker: Any) -> str:
    """What multiplies one of the quantised linears."""
    mlp = worker.get_draft_model().drafter.layers[0].mlp
    return type(mlp.down_proj.scheme.kernel).__name__


def texts(engine: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def alone(pair) -> list[list[int]]:
    """What vLLM writes in bfloat16 without a drafter: processors round differently."""
    _, directory = pair
    with running(directory, None, dtype="bfloat16", max_model_len=256) as engine:
        return texts(engine)


def check_text(
    engine: Any, target: PreTrainedModel, alone: Sequence[Sequence[int]] | None = None
) -> None:
    """Each token is the target's likeliest, or all but tied with it in bfloat16.

    Args:
        engine: with a drafter.
        target: in float32.
        alone: texts of the engine without a drafter; as far as a text is equal, it is right.
    """
    for prompt, text, own in zip(PROMPTS, texts(engine), alone or [()] * len(PROMPTS), strict=True):
        with torch.no_grad():
            logits = target(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        place = first_difference(text, own)
        same = len(own) if place is None else place
        assert (logits.amax(dim=1) - chosen < TIE)[same:].all()


@pytest.mark.parametrize("kind", ON_OWN_LINEARS)
def test_vllms_own_linears_draft_what_the_dequantised_core_does(pair, alone, tmp_path, kind):
    target, directory = pair
    plain = write_tiny(tmp_path / "plain", **SIZES, target_hidden_size=64)
    checkpoint = quantise(plain, tmp_path / "quantised", ON_OWN_LINEARS[kind])
    drafter = load_drafter(plain, target)
    with running(directory, checkpoint, dtype="bfloat16", max_model_len=256, **OPTIONS) as engine:
        methods = on_worker(engine, linears)
        assert {name for name, method in methods.items() if method.startswith("Comp")} == KEPT
        if not torch.cuda.is_available():
            assert on_worker(engine, kernel) == KERNELS[kind]
        compared = 0
        for prompt in PROMPTS:
            expected = answer(drafter, target, prompt)
            drafts = on_worker(engine, draft, [*prompt, expected.anchor])
            for found, wanted, margin in zip(
                drafts, expected.drafts, expected.margins, strict=True
            ):
                if margin > TIE:
                    assert found == wanted
                    compared += 1
        assert compared >= 6
        check_text(engine, target, alone)


def test_what_vllm_has_no_kernel_for_is_dequantised(pair, tmp_path):
    """In float32, which no quantised linear multiplies; the drafts are then equal to a digit."""
    target, directory = pair
    plain = write_tiny(tmp_path / "plain", **SIZES, target_hidden_size=64)
    checkpoint = quantise(plain, tmp_path / "quantised", W8A8)
    drafter = load_drafter(plain, target)
    with running(directory, checkpoint, max_model_len=256, **OPTIONS) as engine:
        assert set(on_worker(engine, linears).values()) == {"UnquantizedLinearMethod"}
        for prompt in PROMPTS[:2]:
            expected = answer(drafter, target, prompt)
            assert min(expected.margins) > 1e-3
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts


def test_fp8_rows_are_multiplied_as_they_are_stored(pair, tmp_path):
    target, directory = pair
    plain = write_tiny(tmp_path / "plain", **SIZES, target_hidden_size=64)
    checkpoint = quantise(plain, tmp_path / "quantised", LAYOUTS["FP8 by tensor"])
    drafter = keep_fp8_rows(load_drafter(checkpoint, target), checkpoint)
    with running(directory, checkpoint, max_model_len=256, **OPTIONS) as engine:
        assert set(on_worker(engine, linears).values()) == {"Fp8Method"}
        for prompt in PROMPTS[:2]:
            expected = answer(drafter, target, prompt)
            assert min(expected.margins) > 1e-3
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts
        check_text(engine, target)
