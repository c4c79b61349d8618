"""In a scheduler's process: batches of prompts one after the other, over one prefix cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def record_drafts(place: Path) -> None:
    """Write every block that the worker verifies to a file; call it before the scheduler is made.

    Args:
        place: the file; each line is a request's id, the anchor's position and the block.
    """
    from shim import record_drafts

    from dflash_plugin.sglang import worker

    os.environ["RECORD_DRAFTS"] = str(place)
    place.touch()
    record_drafts.patch(worker)


def run(
    scheduler: Any, batches: list[list[list[int]]], length: int, known: list[list[int]] | None
) -> list[dict[str, Any]]:
    """Run batches of prompts, greedily; the prefix cache keeps what they leave.

    Args:
        scheduler: SGLang's, with a drafter or without.
        batches: of prompts.
        length: of each text.
        known: whole texts, prompts included, that the drafts are read from instead of the drafter;
            each fifth position is drafted wrong.

    Returns:
        Of each batch the "ids" of its requests, their "texts", and the tokens of each prompt that
        were "cached".
    """
    from dflash_plugin.sglang.selfcheck import make_request, serve

    if known:
        read_drafts(scheduler.draft_worker, known)
    # ``make_request`` reads the vocabulary from a worker with a drafter.
    origin = SimpleNamespace(
        tokenizer=scheduler.tokenizer,
        draft_worker=SimpleNamespace(vocab_size=scheduler.model_config.vocab_size),
    )
    found = []
    for prompts in batches:
        requests = [
            make_request(origin, prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
            for prompt in prompts
        ]
        serve(scheduler, requests, lambda: None)
        found.append(
            {
                "ids": [request.rid for request in requests],
                "texts": [list(request.output_ids_through_stop) for request in requests],
                "cached": [int(request.cached_tokens) for request in requests],
            }
        )
    return found


def read_drafts(worker: Any, known: list[list[int]]) -> None:
    """Let a worker's drafts be what whole texts say, and wrong at each fifth position."""
    import torch

    def corrected(drafts: Any, anchors: list[int]) -> Any:
        """Drafts [B, K] of blocks behind these anchor tokens."""
        places = zip(anchors, worker.step.anchors.tolist(), strict=False)
        for row, (anchor, position) in enumerate(places):
            texts = [t for t in known if len(t) > position and t[position] == anchor]
            following = texts[0][position + 1 : position + 1 + drafts.shape[1]] if texts else []
            for offset, token in enumerate(following):
                is_wrong = (position + 1 + offset) % 5 == 0
                drafts[row, offset] = (token + is_wrong) % worker.vocab_size
        return drafts.flatten().to(torch.int64)

    native = worker.choose_drafts

    def choose(drafting: Any) -> Any:
        anchors = drafting.anchors.tolist()
        return corrected(native(drafting).view(len(anchors), -1), anchors)

    worker.choose_drafts = choose
    if worker._draft_sampler is not None:
        worker._draft_sampler = Replayed(worker, worker._draft_sampler, corrected)


class Replayed:
    """What SGLang reads the drafts of a captured pass from.

    Args:
        worker: the plugin's.
        native: the head that was captured.
        corrected: what to put in the place of drafts [B, K] behind anchor tokens.
    """

    def __init__(self, worker: Any, native: Any, corrected: Callable[..., Any]) -> None:
        self.worker, self.native, self.corrected = worker, native, corrected

    @property
    def out(self) -> Any:
        worker = self.worker
        size, drafts = len(worker.step.batch.reqs), worker.block_size - 1
        made = self.native.out[: size * drafts].clone().view(size, drafts)
        return self.corrected(made, worker._draft_block_ids_buf[:size, 0].tolist())
