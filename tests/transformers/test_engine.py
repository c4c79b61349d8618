"""The Transformers engine: the target's own text, in any batch, for many kinds of target."""

from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dflash_plugin.decoding.draft_sampling import WINDOW
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors, probabilities
from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from tests.helpers.families import SERVED
from tests.helpers.tiny import DFLASH2, VOCABULARY, tiny_drafter, tiny_target, write_tiny

DATA = Path(__file__).parents[1] / "data"
EXAMPLES = Path(__file__).parents[2] / "examples"
SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")
KINDS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss", "qwen3_moe",
    "glm4", "gpt2", "cohere2", "gemma4_text", "deepseek_v3", "qwen3_5_text",
)  # fmt: skip
TARGETS = {family.kind: family.changes for family in SERVED if family.kind in KINDS}


def prompts_of(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def greedy(model, prompt, new_tokens, stop_ids=()) -> list[int]:
    """The target alone: one whole forward pass a token, no cache."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, DFLASH2], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("kind", TARGETS)
def test_greedy_output_is_the_targets_own(kind, changes):
    target = tiny_target(kind, **TARGETS[kind])
    prompts = prompts_of(7)
    expected = [greedy(target, prompt, 24) for prompt in prompts]
    drafter = tiny_drafter(**changes)
    for batch in (1, 4):
        engine = Engine(target, drafter, max_batch=batch, max_length=72)
        found = engine.generate([Request(prompt, 24, stop_ids=[]) for prompt in prompts])
        assert [result.tokens for result in found] == expected
    plain = Engine(target, None, max_batch=3, max_length=72)
    found = plain.generate([Request(prompt, 24, stop_ids=[]) for prompt in prompts])
    assert [result.tokens for result in found] == expected
    # The model is still usable by itself.
    assert greedy(target, prompts[0], 24) == expected[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (LayerAttention(sliding_window=5), LayerAttention(causal=True))},
        {"sample_from_anchor": True},
        {"draft_vocab_size": 24, "own_head": True},
        {"own_embedding": True, "own_mask_embedding": True, "embedding_scale": 2.0},
        {"own_mask_embedding": True, "mask_token_id": 200},
        {"attention_sinks": True, "attention_value_scale": 0.5, "logit_softcap": 5.0},
        {"norm_style": "gemma", "qk_norm": False, "attention_bias": True, "mlp_bias": True},
        {
            "layers": (LayerAttention(sliding_window=5, causal=True),),
            "window_from": "anchor",
            "target_layer_ids": (-1, 3),
        },
        {**DFLASH2, "layers": (LayerAttention(sliding_window=5),), "own_head": True},
        {**DFLASH2, "attention_sinks": True, "norm_style": "gemma", "logit_softcap": 5.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_kind_of_drafter_leaves_the_output_alone(changes):
    target = tiny_target("qwen3")
    prompts = prompts_of(5, seed=3)
    engine = Engine(target, tiny_drafter(**changes), max_batch=3, max_length=80)
    found = engine.generate([Request(prompt, 20, stop_ids=[]) for prompt in prompts])
    assert [r.tokens for r in found] == [greedy(target, prompt, 20) for prompt in prompts]


def test_a_reduced_vocabulary_is_loaded_in_the_weights_dtype(tmp_path):
    checkpoint = write_tiny(tmp_path, draft_vocab_size=24, own_head=True)
    drafter = load_drafter(checkpoint, tiny_target())
    assert drafter.norm.weight.dtype == torch.float32
    assert drafter.d2t.dtype == torch.int64


def test_requests_join_and_leave_at_block_boundaries():
    target = tiny_target()
    prompts = prompts_of(23, seed=5)
    limits = [1 + 7 * i % 31 for i in range(len(prompts))]
    engine = Engine(target, tiny_drafter(), max_batch=4, max_length=80)
    requests = [Request(p, n, stop_ids=[]) for p, n in zip(prompts, limits, strict=True)]
    streamed: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    results = engine.generate(requests, lambda index, tokens: streamed[index].extend(tokens))
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        assert result.tokens == greedy(target, request.prompt, request.max_new_tokens)
        assert result.finish_reason == "length"
        assert streamed[index] == result.tokens
        assert 1 + sum(result.committed) == len(result.tokens)


def perfect_drafter(prompt: list[int], answer: list[int]) -> Drafter:
    """A drafter that reads the target's answer from a table."""
    drafter = tiny_drafter()
    known = torch.tensor(prompt + answer + [0] * 8)

    def oracle(anchors, positions):
        hidden = torch.zeros(len(anchors), 3, 32)
        hidden[..., 0] = positions[:, None] + torch.arange(1, 4)
        return hidden

    drafter.draft = oracle
    drafter.logits = lambda hidden: torch.nn.functional.one_hot(
        known[hidden[..., 0].long()], VOCABULARY
    ).float()
    return drafter


def test_a_perfect_drafter_is_accepted_whole():
    """It commits whole blocks."""
    target = tiny_target()
    prompt = prompts_of(1)[0]
    answer = greedy(target, prompt, 33)
    engine = Engine(target, perfect_drafter(prompt, answer), max_length=80)
    result = engine.generate([Request(prompt, 33, stop_ids=[])])[0]
    assert result.tokens == answer
    assert result.committed == [4] * 8


def test_a_stop_token_ends_a_request_inside_a_block():
    target = tiny_target()
    drafter = tiny_drafter()
    engine = Engine(target, drafter, max_batch=2, max_length=80)
    for prompt in prompts_of(6, seed=8):
        free = greedy(target, prompt, 20)
        stop = free[11]
        expected = free[: free.index(stop) + 1]
        result = engine.generate([Request(prompt, 20, stop_ids=[stop])])[0]
        assert result.tokens == expected
        assert result.finish_reason == "stop"


def test_nothing_of_the_context_is_recomputed_and_rejected_features_stay_out():
    target = tiny_target()
    drafter = tiny_drafter()
    seen: list[tuple[int, int]] = []
    inject = drafter.inject

    def recording(features, positions):
        seen.extend((int(p), 1) for p in positions[positions >= 0])
        inject(features, positions)

    drafter.inject = recording
    prompt = prompts_of(1, seed=2)[0]
    engine = Engine(target, drafter, max_length=80)
    result = engine.generate([Request(prompt, 24, stop_ids=[])])[0]
    positions = [position for position, _ in seen]
    # Every position up to the last pass' anchor exactly once, in order.
    assert positions == list(range(len(positions)))
    assert len(prompt) <= len(positions) <= len(prompt) + len(result.tokens)


def test_long_prompts_are_prefilled_in_chunks(monkeypatch):
    from dflash_plugin.transformers import engine as module

    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    target = tiny_target("gemma3_text", **TARGETS["gemma3_text"])
    prompts = prompts_of(4, seed=4, longest=90)
    engine = Engine(target, tiny_drafter(), max_batch=4, max_length=128)
    found = engine.generate([Request(prompt, 12, stop_ids=[]) for prompt in prompts])
    assert [r.tokens for r in found] == [greedy(target, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request([], 4), "request 0 has an empty prompt"),
        (Request([5], 0), "max_new_tokens=0"),
        (Request([5] * 60, 40), "= 100 but max_length is 64"),
        (Request([5, 97], 4), "token 97 outside the target's vocabulary of 97"),
        (Request([5], 4, stop_ids=range(9)), "9 stop tokens"),
    ],
)
def test_requests_that_cannot_run_are_refused_before_anything_runs(request_, named):
    engine = Engine(tiny_target(), tiny_drafter(), max_length=64)
    with pytest.raises(DFlashError, match=named):
        engine.generate([request_])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_hidden_size": 48}, "features 48 wide but the target's hidden_size is 32"),
        ({"target_layer_ids": (0, 9), "num_target_layers": None}, "reads target layer 9"),
        ({"hidden_size": 40, "head_dim": 10}, "embedding is 32 wide"),
        ({"vocab_size": 200, "mask_token_id": 150}, "mask_token_id 150"),
        ({**DFLASH2, "vocab_size": 90}, "tables of 90 rows but the target has 97 tokens"),
        ({"own_head": True, "vocab_size": 104}, "tables of 104 rows but the target has 97"),
    ],
)
def test_a_drafter_of_another_target_is_refused(changes, named):
    with pytest.raises(DFlashError, match=named):
        Engine(tiny_target(), tiny_drafter(**changes))


# A pair whose every text of three tokens can be told the probability of.
REDUCED = {"draft_vocab_size": 4, "own_head": True}
FEW = {"vocab_size": 8, "hidden_size": 16, "head_dim": 4, "intermediate_size": 24}


def test_an_unknown_way_to_draft_is_named():
    with pytest.raises(DFlashError, match="draft_sampling is 'best': give one of 'auto', 'greedy'"):
        Engine(tiny_target(), None, draft_sampling="best")


def check_sampled_pairs(
    target, engine: Engine, count: int, seeded: bool = True, **limits: float
) -> None:
    """χ² of the second and third token of ``count`` requests against exact probabilities.

    Args:
        target: of sizes ``FEW``.
        engine: runs it.
        count: requests.
        seeded: whether the requests give a seed.
        limits: top-k and top-p of the requests.
    """
    size, prompt, temperature = FEW["vocab_size"], [4, 5], 1.3
    with torch.inference_mode():
        triples = torch.tensor([[*prompt, *triple] for triple in product(range(size), repeat=3)])
        logits = target(triples, use_cache=False).logits
        drawn = [SamplingParams(temperature, **limits)] * len(triples)
        params = SamplingTensors.build(drawn, logits.device)
        probs = probabilities(logits, params).double()
    rows = torch.arange(len(triples))
    exact = torch.ones(len(triples), dtype=torch.float64)
    for place in (2, 3, 4):
        exact *= probs[rows, place - 1, triples[:, place]]
    expected = exact.view(size, -1).sum(0).numpy() * count
    seeds = [seed if seeded else None for seed in range(count)]
    results = engine.generate(
        [Request(prompt, 3, [], SamplingParams(temperature, **limits, seed=seed)) for seed in seeds]
    )
    pairs = [result.tokens[1] * size + result.tokens[2] for result in results]
    counts = np.bincount(pairs, minlength=size**2)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    expected = expected[possible] * (count / expected.sum())
    assert chisquare(counts[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("draft_sampling", "changes"),
    [
        pytest.param("probabilistic", {}, id="drawn"),
        pytest.param("greedy", {}, id="chosen"),
        pytest.param("probabilistic", REDUCED, id="reduced-vocabulary"),
        pytest.param("probabilistic", DFLASH2, id="dflash2-drawn"),
        pytest.param("greedy", DFLASH2, id="dflash2-chosen"),
    ],
)
def test_sampled_pairs_follow_the_target(draft_sampling, changes):
    target = tiny_target(**FEW)
    drafter = tiny_drafter(**FEW, target_hidden_size=16, **changes)
    engine = Engine(target, drafter, max_batch=2048, max_length=8, draft_sampling=draft_sampling)
    check_sampled_pairs(target, engine, 100_000)


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        pytest.param({}, {}, id="dflash"),
        pytest.param(DFLASH2, {"top_k": 5, "top_p": 0.9}, id="dflash2-limited"),
    ],
)
def test_sampled_pairs_follow_the_target_while_the_best_proposal_is_learnt(
    changes, limits, monkeypatch
):
    """Requests without a seed, whose proposals change with what earlier passes measured."""
    monkeypatch.setattr("secrets.randbits", Random(0).getrandbits)
    target = tiny_target(**FEW)
    drafter = tiny_drafter(**FEW, target_hidden_size=16, **changes)
    engine = Engine(target, drafter, max_batch=2048, max_length=8)
    check_sampled_pairs(target, engine, 100_000, seeded=False, **limits)
    assert float(engine.acceptance.rows.max()) == WINDOW


def test_drafts_drawn_from_another_distribution_than_they_say_fail_the_same_test():
    target, drafter = tiny_target(**FEW), tiny_drafter(**FEW, target_hidden_size=16, **DFLASH2)
    propose = drafter.propose

    def misleading(*args):
        proposal = propose(*args)
        return proposal._replace(probs=proposal.scores.softmax(-1))

    drafter.propose = misleading
    engine = Engine(target, drafter, max_batch=2048, max_length=8, draft_sampling="probabilistic")
    with pytest.raises(AssertionError):
        check_sampled_pairs(target, engine, 30_000)


@pytest.mark.parametrize("changes", [{}, DFLASH2], ids=["dflash", "dflash2"])
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(changes):
    target, drafter = tiny_target(), tiny_drafter(**changes)
    requests = [
        Request(prompt, 16, [], SamplingParams(temperature=1.0, top_k=20, seed=seed))
        for seed, prompt in enumerate(prompts_of(6))
    ]
    together = Engine(target, drafter, max_batch=6, max_length=64).generate(requests)
    alone = Engine(target, drafter, max_batch=1, max_length=64).generate(requests)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    again = Request(requests[0].prompt, 16, [], SamplingParams(temperature=1.0, top_k=20, seed=99))
    other = Engine(target, drafter, max_length=64).generate([again])[0]
    assert other.tokens != alone[0].tokens


def evaluation_prompts(tokenizer) -> list[list[int]]:
    """10 prompts of each evaluation set."""
    return [
        encode(tokenizer, prompt)
        for name in SETS
        for prompt in load_prompts(DATA / f"{name}.jsonl", 10)
    ]


@torch.inference_mode()
def written_alone(target, prompts: list[list[int]], new_tokens: int, stop: int) -> list[list[int]]:
    """What the target's own ``generate`` writes greedily, eight prompts at a time."""
    texts: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), 8):
        chosen = by_length[start : start + 8]
        width = max(len(prompts[index]) for index in chosen)
        rows = [[stop] * (width - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        written = target.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=stop,
        )
        for index, row in zip(chosen, written[:, width:].tolist(), strict=True):
            end = row.index(stop) + 1 if stop in row else len(row)
            texts[index] = row[:end]
    return [texts[index] for index in range(len(prompts))]


def test_smollm2_with_the_shipped_drafters_writes_what_smollm2_writes(smollm2):
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    prompts = evaluation_prompts(tokenizer)
    new_tokens, stop = 24, target.generation_config.eos_token_id
    expected = written_alone(target, prompts, new_tokens, stop)
    dflash, dflash2 = (
        load_drafter(EXAMPLES / f"smollm2-135m-{kind}", target) for kind in ("dflash", "dflash2")
    )
    longest = max(map(len, prompts)) + new_tokens
    requests = [Request(prompt, new_tokens, stop_ids=[stop]) for prompt in prompts]
    # An eighth of them one by one: nearly all of the time goes into reading prompts.
    for drafter, batch, step in ((dflash, 1, 8), (dflash, 8, 1), (dflash2, 8, 8)):
        engine = Engine(target, drafter, max_batch=batch, max_length=longest)
        results = engine.generate(requests[::step])
        differing = [
            index
            for index, (result, own) in enumerate(zip(results, expected[::step], strict=True))
            if result.tokens != own
        ]
        assert differing == []
        passes = sum(len(result.committed) for result in results)
        # Of a drafter that is run wrongly almost nothing is accepted.
        assert sum(sum(result.committed) for result in results) / passes > 2
