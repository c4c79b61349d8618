"""The engine with SmolLM2 and the shipped drafter, against the float32 core and the target.

Runs on the V1 runner, and on V2 where ``VLLM_USE_V2_MODEL_RUNNER=1`` (``run.sh``), then shorter:
its Triton kernels are interpreted there.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from dflash_plugin.bench.evaluate import acceptance_by_position, pooled_tau
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from tests.helpers.core_drafts import core_drafts
from tests.helpers.distribution import check_distribution, continuations
from tests.on_vllm.vllm_helpers import (
    BLOCK,
    ON_V2,
    counter,
    on_worker,
    running,
)

DATA = Path(__file__).parents[1] / "data"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")
# One of each set; test_vllm_serve has 50 prompts.
PROMPTS, TOKENS = 5, 12 if ON_V2 else 48
CHUNK = 64


@pytest.fixture(scope="module")
def engine(smollm2, shipped):
    """Prompts of more than ``CHUNK`` tokens are prefilled in chunks."""
    with running(smollm2, shipped, max_num_batched_tokens=CHUNK) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2, shipped) -> dict[str, Any]:
    """The target, the drafter and what the Transformers engine makes of the prompts."""
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    drafter = load_drafter(shipped, target)
    sets = [load_prompts(DATA / f"{name}.jsonl") for name in SETS]
    mixed = [prompt for row in zip(*sets, strict=False) for prompt in row][:PROMPTS]
    prompts = [encode(tokenizer, prompt) for prompt in mixed]
    drafting = Engine(target, drafter, max_batch=5, max_length=512)
    results = drafting.generate([Request(prompt, TOKENS) for prompt in prompts])
    return {
        "target": target,
        "drafter": drafter,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "results": results,
    }


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **{"max_tokens": TOKENS, **changes})


def generate(engine: Any, prompts: list[list[int]], params: Any) -> list[Any]:
    return engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_batched_text_and_acceptance_equal_the_transformers_engine(engine, reference):
    assert max(map(len, reference["prompts"])) > CHUNK
    before = counter(engine, "vllm:spec_decode_num_drafts")
    accepted = counter(engine, "vllm:spec_decode_num_accepted_tokens")
    outputs = generate(engine, reference["prompts"], greedy())
    assert texts(outputs) == [result.tokens for result in reference["results"]]
    passes = counter(engine, "vllm:spec_decode_num_drafts") - before
    tau = 1 + (counter(engine, "vllm:spec_decode_num_accepted_tokens") - accepted) / passes
    # A result counts what a stop or the limit cuts off, and so does vLLM.
    cores = acceptance_by_position(reference["results"], 7)
    assert tau == pytest.approx(1 + sum(cores), rel=0.02)
    assert pooled_tau(reference["results"]) > 1.5


def test_counters_by_position_add_up(engine, reference):
    generate(engine, reference["prompts"][:1], greedy())
    by_position = counter(engine, "vllm:spec_decode_num_accepted_tokens_per_pos")
    assert len(by_position) == 7
    assert list(by_position) == sorted(by_position, reverse=True)
    assert sum(by_position) == counter(engine, "vllm:spec_decode_num_accepted_tokens")


def test_cached_prefixes_are_whole_and_change_nothing(engine, reference):
    longest = max(reference["prompts"], key=len)
    first = generate(engine, [longest], greedy())
    again = generate(engine, [longest], greedy())
    assert texts(again) == texts(first)
    assert again[0].num_cached_tokens == (len(longest) - 1) // BLOCK * BLOCK


def record(worker: Any) -> None:
    """Keep every proposal of one request: the anchor's position and the drafts."""
    runner = worker.model_runner
    drafter = getattr(runner, "speculator", None) or runner.drafter
    propose, worker.proposals = drafter.propose, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        buffers = getattr(drafter, "input_buffers", drafter)
        worker.proposals.append((int(buffers.positions[0]), drafts[0].tolist()))
        return drafts

    drafter.propose = recorded


def proposals(worker: Any) -> list[tuple[int, list[int]]]:
    found, worker.proposals = worker.proposals, []
    return found


@torch.inference_mode()
def test_every_draft_equals_the_core(engine, reference):
    on_worker(engine, record)
    compared = 0
    for prompt in reference["prompts"][:3]:
        text = prompt + texts(generate(engine, [prompt], greedy(ignore_eos=True)))[0]
        made = [(at, drafts) for at, drafts in on_worker(engine, proposals) if at < len(text)]
        # From the last chunk of the prompt on, every pass proposes.
        made = [(at, drafts) for at, drafts in made if at >= len(prompt)]
        assert made
        expected = core_drafts(reference, text, [at for at, _ in made])
        for (at, drafts), (core, margins) in zip(made, expected, strict=True):
            for got, wanted, margin in zip(drafts, core, margins, strict=True):
                assert got == wanted or margin < 1e-3, (at, drafts, core, margins)
                compared += 1
    assert compared >= (4 if ON_V2 else 30) * 7


@pytest.mark.skipif(ON_V2, reason="too slow interpreted; test_vllm_dialects has a small one")
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_targets_distribution(smollm2, shipped, reference, method):
    """χ² at temperature 1: the second and third token come out of verification."""
    prompt = encode(reference["tokenizer"], load_prompts(DATA / "mt_bench.jsonl")[0])
    samples = 400
    expected = continuations(reference["target"], prompt, 3, best=3, cut=True)
    params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True, n=samples)
    # As many drafts as may be committed: rows of further ones would cost most of the time.
    speculative = {"draft_sample_method": method, "num_speculative_tokens": 2}
    with running(smollm2, shipped, speculative=speculative, max_num_seqs=32) as llm:
        completions = generate(llm, [prompt], params)[0].outputs
    assert check_distribution([tuple(c.token_ids) for c in completions], expected) == samples


def test_seeded_samples_repeat(engine, reference):
    # In one chunk: vLLM rewinds a seeded generator after a partial one, which a CPU's cannot.
    prompt = reference["tokenizer"].encode("A recipe for pancakes:")
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=TOKENS)
    first, second = (texts(generate(engine, [prompt], params)) for _ in range(2))
    assert first == second


def test_structured_output_is_valid(engine, reference):
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Rhine", "Danube"]}, "long": {"type": "boolean"}},
        "required": ["name", "long"],
        "additionalProperties": False,
    }
    guided = greedy(max_tokens=64, structured_outputs=StructuredOutputsParams(json=schema))
    free = greedy(max_tokens=8)
    prompt = reference["prompts"][0]
    outputs = generate(engine, [prompt, prompt], [guided, free])
    answer = json.loads(outputs[0].outputs[0].text)
    assert answer["name"] in ("Rhine", "Danube")
    assert isinstance(answer["long"], bool)
    assert texts(outputs)[1] == reference["results"][0].tokens[:8]


@torch.inference_mode()
def test_log_probabilities_are_the_targets(engine, reference):
    prompt = reference["prompts"][0]
    output = generate(engine, [prompt], greedy(logprobs=1))[0].outputs[0]
    tokens = list(output.token_ids)
    logits = reference["target"](input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits
    expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1], dim=-1)
    got = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    wanted = [float(row[token]) for row, token in zip(expected, tokens, strict=True)]
    assert got == pytest.approx(wanted, abs=2e-3)


@torch.inference_mode()
def test_penalties_apply_before_verification(engine, reference):
    """Greedy text under a repetition penalty, step by step from the target's logits."""
    prompt, length = reference["prompts"][1], 12
    got = texts(generate(engine, [prompt], greedy(max_tokens=length, repetition_penalty=1.3)))[0]
    tokens: list[int] = []
    for _ in range(len(got)):
        ids = torch.tensor([prompt + tokens])
        logits = reference["target"](input_ids=ids, use_cache=False).logits[0, -1]
        seen = ids[0].unique()
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / 1.3, scores * 1.3)
        tokens.append(int(logits.argmax()))
    assert got == tokens
    assert got != reference["results"][1].tokens[:length]


def test_preempted_requests_lose_nothing(smollm2, shipped, reference):
    """A cache for about two of the five requests: the others are preempted and come back."""
    prompts = reference["prompts"][:5]
    blocks = 1 + 2 * (-(-(max(map(len, prompts)) + TOKENS + 8) // BLOCK))
    with running(
        smollm2, shipped, num_gpu_blocks_override=blocks, enable_prefix_caching=False,
        max_model_len=(blocks - 1) * BLOCK,
    ) as llm:  # fmt: skip
        outputs = generate(llm, prompts, greedy(ignore_eos=True))
        if not ON_V2:
            assert counter(llm, "vllm:num_preemptions") > 0
    for output, result in zip(texts(outputs), reference["results"], strict=False):
        assert output[: len(result.tokens)] == result.tokens


def test_stop_strings_and_limits_cut_inside_a_block(engine, reference):
    prompt, whole = reference["prompts"][0], reference["results"][0].tokens
    for length in itertools.islice(range(1, len(whole)), 4):
        cut = texts(generate(engine, [prompt], greedy(max_tokens=length)))[0]
        assert cut == whole[:length]


def write_adapter(directory: Path, target: Any) -> Path:
    """A LoRA adapter of rank 4 on every query projection, in peft's files."""
    directory.mkdir(exist_ok=True)
    tensors = {}
    for index, layer in enumerate(target.model.layers):
        name = f"base_model.model.model.layers.{index}.self_attn.q_proj"
        rows, columns = layer.self_attn.q_proj.weight.shape
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(4, columns)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return directory


@pytest.mark.skipif(ON_V2, reason="too slow interpreted; test_vllm_lora runs there")
@torch.inference_mode()
def test_lora_on_the_target(smollm2, shipped, reference, tmp_path):
    """Requests with an adapter and without in one batch; the drafter has none."""
    torch.manual_seed(0)
    target, prompts = reference["target"], reference["prompts"][:2]
    adapter = write_adapter(tmp_path / "adapter", target)
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged = copy.deepcopy(target)
    for index, layer in enumerate(merged.model.layers):
        name = f"base_model.model.model.layers.{index}.self_attn.q_proj"
        change = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        layer.self_attn.q_proj.weight += 8 / 4 * change
    results = Engine(merged, None, max_length=512).generate([Request(p, 24) for p in prompts])
    adapted = [result.tokens for result in results]
    plain = [result.tokens[:24] for result in reference["results"][:2]]
    assert all(one != other for one, other in zip(adapted, plain, strict=True))
    lora = LoRARequest("adapter", 1, str(adapter))
    # A CPU gives requests without an adapter the last slot's, drafter or not: it stays empty.
    with running(smollm2, shipped, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in (*prompts, *prompts)],
            greedy(max_tokens=24),
            lora_request=[lora, None, None, lora],
            use_tqdm=False,
        )
        assert counter(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert texts(outputs) == [adapted[0], plain[1], plain[0], adapted[1]]
