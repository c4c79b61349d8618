"""Quantised targets: the text is what vLLM gives without a drafter, whose linears stay plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.helpers.quantised import (
    COMPRESSED,
    LAYOUTS,
    TOKEN,
    W8A8,
    Layout,
    Quantised,
    fp8_channels,
    groups,
    int32_of,
    integers,
    quantise,
)
from tests.helpers.tiny import ENGINE_SIZES, write_target, write_tiny
from tests.on_vllm.test_vllm_quantised import PROMPTS
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

pytestmark = pytest.mark.skipif(
    ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted"
)

GROUP = 32
# The nibbles of a word hold these of eight columns.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# In bfloat16 the shape of a pass decides between tokens that are nearly tied.
TIE = 0.05


def gptq(weight: Tensor) -> Quantised:
    """Four bits in groups, packed along the input; zero points are stored less one."""
    codes, scale, _, made = integers(weight, 4, GROUP, symmetric=True)
    rows, columns = weight.shape
    parts = {
        "qweight": int32_of(codes, 4).T,
        "qzeros": int32_of(torch.full((columns // GROUP, rows), -1), 4),
        "scales": scale.T.half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }
    return made._replace(parts=parts)


def awq(weight: Tensor) -> Quantised:
    """Four bits in groups with zero points, packed along the output."""
    codes, scale, zero, made = integers(weight, 4, GROUP, symmetric=False)
    codes, zero = (x.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1) for x in (codes, zero))
    parts = {"qweight": int32_of(codes, 4), "qzeros": int32_of(zero, 4), "scales": scale.T.half()}
    return made._replace(parts=parts)


FP8_ROWS = {
    **groups("float", 8, strategy="channel")["group_0"],
    "input_activations": {**TOKEN, "type": "float"},
}
KINDS: dict[str, Layout] = {
    "W8A8": W8A8,
    "W4A16": LAYOUTS["W4A16"],
    "GPTQ": Layout(
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        "gptq",
    ),
    "AWQ": Layout(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        "awq",
    ),
    "FP8": Layout(
        fp8_channels,
        {**COMPRESSED, "format": "float-quantized", "config_groups": {"group_0": FP8_ROWS}},
        "compressed-tensors FP8",
    ),
}


def methods(worker: Any) -> tuple[set[str], set[str]]:
    """How the linears of the target's layers and of the drafter are multiplied."""

    def of(model: Any) -> set[str]:
        linears = [m for m in model.modules() if hasattr(m, "input_size")]
        return {type(linear.quant_method).__name__ for linear in linears}

    return of(worker.get_model().model.layers), of(worker.get_draft_model().drafter.layers)


def texts(engine: Any) -> list[list[tuple[int, float]]]:
    """Tokens, each with its lead over the next likeliest."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    made = []
    for output in engine.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        leads = []
        for step in completion.logprobs:
            best, second, *_ = sorted((one.logprob for one in step.values()), reverse=True)
            leads.append(best - second)
        made.append(list(zip(completion.token_ids, leads, strict=True)))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_vllms_own_and_the_drafter_stays_plain(tmp_path, monkeypatch, kind):
    if kind == "FP8" and not (torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM multiplies FP8 on a CPU with AMX")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    plain = write_target(tmp_path / "plain", **ENGINE_SIZES)
    directory = quantise(plain, tmp_path / "target", KINDS[kind])
    for file in plain.glob("*token*"):
        (directory / file.name).symlink_to(file)
    drafter = write_tiny(tmp_path / "drafter", **ENGINE_SIZES, target_hidden_size=64)
    settings = {"dtype": "bfloat16", "max_model_len": 256}
    with running(directory, None, **settings) as engine:
        alone = texts(engine)
    with running(directory, drafter, **settings) as engine:
        of_target, of_drafter = on_worker(engine, methods)
        found = texts(engine)
    assert "UnquantizedLinearMethod" not in of_target
    assert of_drafter == {"UnquantizedLinearMethod"}
    for expected, text in zip(alone, found, strict=True):
        differing = [i for i, (e, t) in enumerate(zip(expected, text, strict=True)) if e[0] != t[0]]
        assert not differing or expected[differing[0]][1] < TIE
