"""What vLLM writes, accepts and drafts beside a target, and what must be the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.transformers.loading import load_drafter
from tests.helpers import gpu_families
from tests.helpers.core_drafts import core_drafts
from tests.helpers.device import ON_GPU
from tests.helpers.families import Family
from tests.helpers.greedy import first_difference
from tests.helpers.tiny import ENGINE_SIZES, VOCABULARY, write_tiny
from tests.on_vllm import rows_on_cpu
from tests.on_vllm.family_targets import settings
from tests.on_vllm.vllm_helpers import ON_V2, counter, on_worker, running

BLOCK_SIZE = 4
DRAFTS = BLOCK_SIZE - 1
# The V2 runner's kernels are interpreted on a CPU.
NEW_TOKENS = 8 if ON_V2 and not ON_GPU else 16
# As many prompts run one by one too, after all of them side by side.
ALONE = 2
# Of a best logit to the next, below which a pass of another shape may choose the other token.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5}


def prompts() -> list[list[int]]:
    """Prompts of different lengths; the second is longer than a chunk and two cache blocks."""
    return gpu_families.random_prompts((3, gpu_families.LONG if ON_GPU else 75, 21, 40))


def known_drafts(texts: Sequence[Sequence[int]], position: int, anchor: int) -> list[int]:
    """The tokens that follow an anchor in a text, every fifth of which is wrong."""
    known = (text for text in texts if len(text) > position and text[position] == anchor)
    following = [*next(known, ())][position + 1 : position + BLOCK_SIZE]
    following += [4] * (DRAFTS - len(following))
    return [
        (token + 1) % VOCABULARY if (position + 1 + offset) % 5 == 0 else token
        for offset, token in enumerate(following)
    ]


def accepted(texts: Sequence[Sequence[int]], text: Sequence[int], start: int) -> int:
    """How many of ``known_drafts`` verification accepts while it writes ``text`` from ``start``."""
    count, position = 0, start
    while position - start + 1 < NEW_TOKENS:
        drafts = known_drafts(texts, position, text[position])
        pairs = zip(drafts, text[position + 1 :], strict=False)
        right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        count += right
        position += right + 1
    return count


def prompt_lengths(runner: Any, count: int, *proposing: Any) -> list[int]:
    """Tokens of the prompt of each request that drafts are proposed for.

    Args:
        runner: of the worker.
        count: requests.
        proposing: the arguments; the V2 runner's begin with its batch.
    """
    if hasattr(runner, "req_states"):
        rows = proposing[0].idx_mapping_np[:count]
        return runner.req_states.prompt_len.np[rows].tolist()
    return runner.input_batch.num_prompt_tokens[:count].tolist()


def knowing(worker: Any, texts: list[list[int]]) -> None:
    """Keep every proposal of the drafter, and let the runner verify ``known_drafts`` instead."""
    runner = worker.model_runner
    drafter = getattr(runner, "speculator", None) or runner.drafter
    propose, worker.proposals = drafter.propose, []

    def proposed(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        buffers, rows = getattr(drafter, "input_buffers", drafter), len(drafts) * BLOCK_SIZE
        for row, anchor, position, length in zip(
            range(len(drafts)),
            buffers.input_ids[:rows:BLOCK_SIZE].tolist(),
            buffers.positions[:rows:BLOCK_SIZE].tolist(),
            prompt_lengths(runner, len(drafts), *args),
            strict=True,
        ):
            # No pass verifies the drafts that follow a part of a prompt.
            if position >= length:
                worker.proposals.append((position, anchor, drafts[row].tolist()))
            drafts[row] = torch.tensor(known_drafts(texts, position, anchor))
        return drafts

    drafter.propose = proposed


def proposals(worker: Any) -> list[tuple[int, int, list[int]]]:
    """Position, anchor and drafts of what the drafter has proposed."""
    found: list[tuple[int, int, list[int]]] = worker.proposals
    return found


@dataclass
class Written:
    """Texts after the prompts, side by side, then the first ones alone; and what the cache had."""

    batched: list[list[int]]
    alone: list[list[int]]
    # Tokens of the prompts that ran alone.
    hits: list[int]
    logprobs: list[list[dict[int, float]]]

    @property
    def texts(self) -> list[list[int]]:
        return [*self.batched, *self.alone]


def write(engine: Any, new_tokens: int = NEW_TOKENS) -> Written:
    """What an engine writes after the prompts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=5)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    together = engine.generate(asked, params, use_tqdm=False)
    one_by_one = [engine.generate([one], params, use_tqdm=False)[0] for one in asked[:ALONE]]
    return Written(
        [list(output.outputs[0].token_ids) for output in together],
        [list(output.outputs[0].token_ids) for output in one_by_one],
        [output.num_cached_tokens for output in one_by_one],
        [
            [{token: found.logprob for token, found in step.items()} for step in logprobs]
            for output in (*together, *one_by_one)
            if (logprobs := output.outputs[0].logprobs) is not None
        ],
    )


def distance(found: list[int], expected: list[int], logprobs: list[dict[int, float]]) -> float:
    """How much less likely the first token is that is not the expected one; 0 where all are."""
    place = first_difference(found, expected)
    if place is None:
        return 0.0
    return logprobs[place][expected[place]] - logprobs[place].get(found[place], float("-inf"))


def unlike_core(made: list[Any], target: Any, drafter: Any, texts: list[list[int]]) -> list[float]:
    """How far each proposal is from the core's: the largest margin of a draft that is another.

    A proposal whose anchor stands at that place of several texts may be that of either.
    """
    found: dict[int, float] = {}
    for text in texts:
        here = {
            number: proposal
            for number, proposal in enumerate(made)
            if text[proposal[0] :][:1] == [proposal[1]]
        }
        reference = {"target": target, "drafter": drafter}
        core = core_drafts(reference, text, [proposal[0] for proposal in here.values()])
        for (number, (_, _, drafts)), (best, margins) in zip(here.items(), core, strict=True):
            rows = zip(drafts, best, margins, strict=True)
            far = max(0.0 if got == wanted else margin for got, wanted, margin in rows)
            found[number] = min(far, found.get(number, far))
    return list(found.values())


def served(family: Family, directory: Path, dtype: str, drafter: Path | None, **more: Any) -> Any:
    """An engine of the target, or the target with a drafter."""
    return running(directory, drafter, **{**settings(family, dtype), **more})


def drafted(
    family: Family,
    place: Path,
    target: PreTrainedModel,
    dtype: str,
    own: Written,
    adapts: bool,
    is_reference: bool,
) -> list[str]:
    """What differs with a drafter, whose drafts are right and wrong by turns.

    Args:
        family: of the target.
        place: where the target is.
        target: for the core.
        dtype: of the engine.
        own: what vLLM writes without a drafter, longer by a block.
        adapts: whether the number of verified drafts changes from pass to pass.
        is_reference: whether ``target`` computes what vLLM's does, so that drafts are compared.
    """
    near_tie = NEAR_TIE[dtype]
    checkpoint = place / "drafter"
    width = target.config.get_text_config().hidden_size
    if not checkpoint.exists():
        sizes = gpu_families.DRAFTER if ON_GPU else ENGINE_SIZES
        write_tiny(checkpoint, **{**sizes, "target_hidden_size": width, "dtype": dtype})
    drafter = load_drafter(checkpoint, target)
    texts = [prompt + text for prompt, text in zip(prompts(), own.batched, strict=True)]
    speculative = {"enable_adaptive_verification": True} if adapts else {}
    faults = []
    if adapts and "delta" in family.trait and not ON_GPU:
        rows_on_cpu.turn_on()
    with served(family, place / "target", dtype, checkpoint, speculative=speculative) as engine:
        manager = turn_by_turn() if adapts else None
        on_worker(engine, knowing, texts)
        with_drafts = write(engine)
        made = on_worker(engine, proposals)
        count = counter(engine, "vllm:spec_decode_num_accepted_tokens")
    if manager is not None and not manager.steps:
        faults.append("every step verified whole blocks")
    cut = [text[:NEW_TOKENS] for text in own.texts]
    far = max(map(distance, with_drafts.texts, cut, own.logprobs))
    if far >= near_tie:
        places = [*map(first_difference, with_drafts.texts, cut)]
        faults.append(f"text, by {far:.3f}, first at {places}")
    if with_drafts.hits != own.hits:
        faults.append(f"prefix hits {with_drafts.hits} instead of {own.hits}")
    by_text = [
        accepted(texts, text, len(prompt)) for text, prompt in zip(texts, prompts(), strict=True)
    ]
    expected = sum(by_text) + sum(by_text[:ALONE])
    is_exact = with_drafts.texts == cut and own.alone == own.batched[:ALONE]
    if not count or (is_exact and not adapts and count != expected):
        faults.append(f"{count} accepted drafts instead of {expected}")
    if is_reference and not adapts:
        with torch.inference_mode():
            margins = unlike_core(made, target, drafter, texts)
        unlike = [margin for margin in margins if margin >= near_tie]
        if not margins or unlike:
            furthest = max(margins, default=0)
            faults.append(f"{len(unlike)} of {len(margins)} proposals, by {furthest:.3f}")
    return faults


def turn_by_turn() -> Any:
    """Let adaptive verification choose 3, 0, 2 and 1 drafts by turns; returns its manager."""
    from dflash_plugin.vllm import adaptive

    manager = adaptive.latest()
    assert manager is not None
    # On a GPU small batches would verify whole blocks without a choice.
    manager.bypass = 0
    rows, choose = itertools.cycle((4, 1, 3, 2)), manager.policy.choose
    manager.policy.choose = lambda *args: choose(*args) and next(rows)
    return manager
