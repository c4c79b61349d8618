"""What a target answers without a drafter, in float32, and how surely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from serving_common import first_difference

from dflash_plugin.transformers import Engine, Request, load_target

# Nats by which two tokens' log-probabilities may differ where float32 programs round apart.
TIE = 1e-4


class TargetAlone:
    """Greedy texts of a target and the margins in them.

    Args:
        directory: the target's.
        prompts: token ids.
        length: tokens of every text; no token ends one.
        saved: a JSON file that keeps the texts; read where it exists.

    Raises:
        ValueError: ``saved`` holds texts of another number or length.
    """

    def __init__(
        self, directory: Path, prompts: list[list[int]], length: int, saved: Path | None = None
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _ = load_target(directory, torch.float32, device)
        self.prompts = prompts
        if saved is not None and saved.exists():
            self.texts: list[list[int]] = json.loads(saved.read_text())
            if [len(text) for text in self.texts] != [length] * len(prompts):
                raise ValueError(
                    f"{saved} does not hold {len(prompts)} texts of {length} tokens: name another "
                    "file"
                )
            return
        requests = [Request(prompt, length, stop_ids=()) for prompt in prompts]
        longest = max(map(len, prompts)) + length
        results = Engine(self.model, max_batch=8, max_length=longest).generate(requests)
        self.texts = [result.tokens for result in results]
        if saved is not None:
            saved.write_text(json.dumps(self.texts))

    @torch.inference_mode()
    def margin(self, index: int, place: int) -> float:
        """By how much the best token's log-probability leads at a place of a text."""
        tokens = [*self.prompts[index], *self.texts[index][:place]]
        ids = torch.tensor([tokens], device=self.model.device)
        best = self.model(ids).logits[0, -1].float().topk(2).values
        return float(best[0] - best[1])

    def compare(self, index: int, text: Sequence[int]) -> dict[str, Any] | None:
        """Where a text, or its beginning, parts from the target's own, or None."""
        place = first_difference(list(text), self.texts[index])
        if place is None:
            return None
        return {"prompt": index, "at": place, "margin": self.margin(index, place)}


def other_weights(directory: Path, made: Path, seed: int = 0, noise: float = 0.1) -> Path:
    """A target of the same sizes that writes other texts.

    Args:
        directory: the target's.
        made: takes the new one.
        seed: of the noise.
        noise: added to every matrix, as a share of its standard deviation.
    """
    model, tokenizer = load_target(directory, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=generator)
                weight += noise * weight.std() * drawn.to(weight.device)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made
