"""τ of every way to make drafts, by temperature and limits, on the same texts.

    python benchmarks/draft_sampling.py --data tests/data --output FILE.json

The Transformers engine samples texts from the target. Over a text that is known, the probability
that a block at a position commits the next k tokens follows from p and q alone, for every proposal;
and with it the expected number of verify passes. τ is the number of tokens over that number. No
proposal is luckier than another, because all are judged on the same texts. ``auto`` learns along a
drawn walk through the texts, in their order, and each text is judged with what was learnt before.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from dflash_plugin.bench.evaluate import machine, pooled_tau
from dflash_plugin.checkpoints.hub import resolve_model
from dflash_plugin.decoding.draft_sampling import FACTORS, AcceptanceEstimate, sharpen
from dflash_plugin.decoding.sampling import (
    SamplingParams,
    SamplingTensors,
    is_limited,
    probabilities,
)
from dflash_plugin.drafter.blockwise import KnownText, blocks_of_texts
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target

SETS = ("gsm8k_test", "math500", "humaneval", "mbpp", "mt_bench")
LIMITS: dict[str, dict[str, Any]] = {
    "none": {},
    "top-p 0.95, top-k 20": {"top_p": 0.95, "top_k": 20},
}
FIXED = {
    "greedy" if factor == 0 else "probabilistic" if factor == 1 else f"factor {factor}": factor
    for factor in FACTORS
}


class Replay(NamedTuple):
    """The block at each position of a text.

    Attributes:
        target, drafter: float32 [A, K, C], the distributions p and q, at the same tokens.
        wanted: float32 [A, K], p of the text's tokens; 1 beyond the text's end.
        columns: int64 [A, K], where of C the text's tokens are, -1 where they cannot be drafted.
    """

    target: Tensor
    drafter: Tensor
    wanted: Tensor
    columns: Tensor


@torch.no_grad()
def replay(
    drafter: Drafter, model: Any, tokens: list[int], first: int, params: SamplingParams
) -> Replay:
    """Draft at every position of one text.

    Args:
        drafter: bound to ``model``.
        model: the target.
        tokens: prompt and text.
        first: position of the first anchor.
        params: what the text was sampled with.
    """
    ids, limited = torch.tensor([tokens]), is_limited([params])
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    layers = [out.hidden_states[layer + 1] for layer in drafter.config.target_layer_ids]
    one = SamplingTensors.build([params], ids.device)
    whole = probabilities(out.logits[:, first:], one, limited)[0]
    text = KnownText(ids[0], torch.cat(layers, dim=-1)[0], first)
    (passes,) = blocks_of_texts(drafter, [text])
    parts = []
    for blocks, hidden in passes:
        labels, inside = blocks.labels[0], blocks.label_valid[0]
        rows = blocks.anchors[0][:, None] - first + torch.arange(labels.shape[1])
        p = whole[rows.clamp(max=len(whole) - 1)]
        wanted = torch.where(inside, p.gather(-1, labels[..., None])[..., 0], 1.0)
        scores, columns = drafter.logits(hidden), labels
        if drafter.candidate_selector is not None:
            best = scores.topk(drafter.candidate_selector.top_k, dim=-1)
            before = torch.cat([blocks.tokens[0, :, :1], labels[:, :-1]], dim=1)
            scores = drafter.candidate_selector.scores(best.indices, best.values, hidden, before)
            p, is_label = p.gather(-1, best.indices), best.indices == labels[..., None]
            columns = torch.where(is_label.any(-1), is_label.long().argmax(-1), -1)
        same = one.of_rows(torch.zeros(len(scores), dtype=torch.int64))
        q = probabilities(scores, same, limited)
        parts.append(Replay(p, q, wanted, torch.where(inside, columns, -1)))
    return Replay(*(torch.cat(part) for part in zip(*parts, strict=True)))


def reached(block: Replay, factors: Tensor) -> dict[str, Tensor]:
    """Probability that the blocks commit the text's next 1, …, K tokens as drafts.

    A prefix x of k tokens is drafted and accepted with probability ``q(x) * joint`` (block
    verification) or with the product of ``min(p, q)`` (token by token). The text goes on with x
    with probability p(x), and divided by that they are probabilities given the text.

    Args:
        block: of one text.
        factors: float32 [K].

    Returns:
        float64 [A, K] by way of verification.
    """
    drawn = torch.stack(
        [
            sharpen(block.drafter[:, place], factors[place].expand(len(block.drafter)))
            .gather(-1, block.columns[:, place, None].clamp(min=0))
            .squeeze(-1)
            for place in range(len(factors))
        ],
        dim=1,
    )
    drawn = torch.where(block.columns >= 0, drawn, 0.0).double()
    ratio = drawn / block.wanted.double().clamp(min=1e-30)
    joint, covered = torch.ones_like(ratio[:, 0]), []
    for part in ratio.unbind(dim=1):
        joint = (joint / part.clamp(min=1e-30)).clamp(max=1.0)
        covered.append(joint)
    return {
        "token by token": ratio.clamp(max=1.0).cumprod(dim=1),
        "block": ratio.cumprod(dim=1) * torch.stack(covered, dim=1),
    }


def expected_passes(reach: Tensor) -> float:
    """Verify passes that a text takes on average, from ``reached`` [A, K]."""
    count = reach.shape[1]
    exactly = torch.cat([torch.ones_like(reach[:, :1]), reach], dim=1)
    exactly[:, :-1] -= reach
    begins = [1.0] + [0.0] * (len(reach) + count)
    for position, row in enumerate(exactly.tolist()):
        for accepted, share in enumerate(row):
            begins[position + accepted + 1] += begins[position] * share
    return sum(begins[: len(reach)])


def learn(
    estimate: AcceptanceEstimate, block: Replay, reach: Tensor, one: SamplingTensors, noise: Random
) -> None:
    """Take in the passes of one walk through a text."""
    position = 0
    while position < len(reach):
        u = noise.random()
        accepted = int((reach[position] > u).sum())
        estimate.observe(
            one,
            block.target[position][None],
            block.drafter[position][None],
            torch.tensor([accepted]),
            torch.tensor([True]),
        )
        position += accepted + 1


def texts(
    engine: Engine, prompts: list[list[int]], params: dict[str, Any], new_tokens: int
) -> tuple[list[list[int]], float]:
    """Prompts with what the target samples behind them, and the engine's own τ."""
    requests = [
        Request(prompt, new_tokens, sampling=SamplingParams(**params, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    results = engine.generate(requests)
    both = zip(prompts, results, strict=True)
    return [prompt + result.tokens for prompt, result in both], pooled_tau(results)


def judge(
    drafter: Drafter,
    model: Any,
    written: list[list[int]],
    firsts: list[int],
    params: dict[str, Any],
) -> dict[str, Any]:
    """τ of every proposal on the same texts."""
    count = drafter.config.num_draft_tokens
    estimate, noise = AcceptanceEstimate(count, model.device), Random(0)
    sampling = SamplingParams(**params)
    one = SamplingTensors.build([sampling], model.device)
    passes: dict[str, float] = {}
    positions = 0
    for tokens, first in zip(written, firsts, strict=True):
        if len(tokens) - first < 2:
            continue
        block = replay(drafter, model, tokens, first, sampling)
        positions += len(block.wanted)
        ways = {name: torch.full((count,), factor) for name, factor in FIXED.items()}
        ways["auto"] = estimate.factors(one, torch.tensor([False]))[0]
        for name, factors in ways.items():
            for how, reach in reached(block, factors).items():
                key = name if how == "block" else f"{name}, {how}"
                passes[key] = passes.get(key, 0.0) + expected_passes(reach)
                if name == "auto" and how == "block":
                    learn(estimate, block, reach, one, noise)
    taus = {name: round(positions / number, 4) for name, number in passes.items()}
    factors = estimate.factors(one, torch.tensor([False]))[0].tolist()
    return {"positions": positions, "tau": taus, "auto_factors": factors}


def main(
    data: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    dflash: Path = Path("examples/smollm2-135m-dflash"),
    dflash2: Path = Path("examples/smollm2-135m-dflash2"),
    prompts: int = 3,
    new_tokens: int = 64,
    temperatures: str = "0.3,0.6,0.8,1.0",
) -> None:
    """Take ``--prompts`` of each of the five sets; write one JSON file and print its rows."""
    model, tokenizer = load_target(resolve_model(target), torch.float32, "cpu")
    drafters = {
        name: load_drafter(path, model)
        for name, path in (("DFlash", dflash), ("DFlash 2", dflash2))
    }
    chosen = [
        encode(tokenizer, prompt)
        for name in SETS
        for prompt in load_prompts(data / f"{name}.jsonl", prompts)
    ]
    longest = max(map(len, chosen)) + new_tokens
    engine = Engine(
        model,
        drafters["DFlash"],
        max_batch=len(chosen),
        max_length=longest,
        draft_sampling="probabilistic",
    )
    rows = []
    for temperature in map(float, temperatures.split(",")):
        for limits, values in LIMITS.items():
            params = {"temperature": temperature, **values}
            written, engine_tau = texts(engine, chosen, params, new_tokens)
            for name, drafter in drafters.items():
                found = judge(drafter, model, written, [len(one) for one in chosen], params)
                rows.append(
                    {"drafter": name, "temperature": temperature, "limits": limits, **found}
                )
                if name == "DFlash":
                    rows[-1]["engine_tau_probabilistic"] = round(engine_tau, 4)
                print(rows[-1], flush=True)
                record = {
                    "command": shlex.join(["python", *sys.argv]),
                    **machine(model),
                    "prompts": len(chosen),
                    "max_new_tokens": new_tokens,
                    "rows": rows,
                }
                output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
