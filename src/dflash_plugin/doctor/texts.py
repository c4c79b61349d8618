"""Texts that a target wrote, with the hidden states that drafters read of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt, encode
from dflash_plugin.train.sequences import SequenceSet, collate
from dflash_plugin.transformers.engine import Engine
from dflash_plugin.transformers.requests import Request

Form = Literal["chat template", "no template", "thinking on", "thinking off"]

_STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = (
    "A baker sells 18 loaves in the morning and twice as many in the afternoon, for $3 each. How "
    "much does she take in a day?" + _STEPS,
    "Write a Python function that checks whether a string is a palindrome.",
    "What are the main causes of inflation? Answer in a short paragraph.",
    "Find the sum of all integers from 1 to 20." + _STEPS,
    "Write a Python function that returns the n-th Fibonacci number and explain how it works.",
    "Give three tips for staying healthy.",
    "A train leaves at 3 pm and travels 120 miles at 40 miles an hour. When does it arrive?",
    "Explain how photosynthesis works in simple words.",
    "Write a Python function that counts the vowels in a string.",
    "Write a short letter that asks a landlord to repair a broken heater.",
    "What is the difference between a list and a tuple in Python?",
    "Tom has 3 boxes with 12 pencils each and gives away 9 pencils. How many are left?" + _STEPS,
    "Summarize the story of Romeo and Juliet in a few sentences.",
    "List five countries in South America and their capitals.",
    "Write a SQL query that finds the ten customers with the highest total orders.",
    "How does a vaccine protect the body?",
    "Write a Python class for a bank account with deposit and withdraw methods.",
    "What should I pack for a week of hiking in the mountains?",
    "If 5 machines make 40 parts in 2 hours, how many parts do 8 machines make in 3 hours?"
    + _STEPS,
    "Describe the water cycle.",
    "Write a JavaScript function that reverses the words of a sentence.",
    "A rectangle is 12 cm long and 7 cm wide. What are its area and its perimeter?" + _STEPS,
    "Give me a recipe for pancakes.",
    "Explain what a binary search does and write it in Python.",
)
"""What is asked where no prompts are given: sums, code and plain questions."""


class Texts:
    """A batch of texts and the outputs of the target's layers over them.

    Args:
        target: wrote the texts; its layers are run when they are first asked for.
        sequences: prompts and responses.
    """

    def __init__(self, target: PreTrainedModel, sequences: SequenceSet) -> None:
        self.target = target
        self.sequences = sequences
        self.batch = collate(sequences, torch.arange(len(sequences))).to(target.device)
        self._layers: dict[int, Tensor] = {}

    @torch.inference_mode()
    def prepare(self, layer_ids: Iterable[int]) -> None:
        """Run the target once for all layers among these that have not been asked for yet."""
        missing = sorted(set(layer_ids) - set(self._layers))
        if not missing:
            return
        out = self.target(
            input_ids=self.batch.tokens,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        self._layers.update({layer: out.hidden_states[layer + 1].clone() for layer in missing})

    def layer_bytes(self) -> int:
        """Memory of one layer's output."""
        width = self.target.config.get_text_config().hidden_size
        return int(self.batch.tokens.numel() * width * self.target.dtype.itemsize)

    def layer(self, layer_id: int) -> Tensor:
        """Output [B, S, hidden] of a layer; -1 is the embedding's."""
        self.prepare([layer_id])
        return self._layers[layer_id]

    def features(self, layer_ids: Sequence[int]) -> Tensor:
        """Context features [B, S, n * hidden]."""
        self.prepare(layer_ids)
        return torch.cat([self._layers[layer] for layer in layer_ids], dim=-1)

    def first(self, count: int) -> Texts:
        """The first texts, of which the target is not run again."""
        part = Texts(self.target, self.sequences.select(torch.arange(count)))
        length = part.batch.tokens.shape[1]
        part._layers = {layer: out[:count, :length] for layer, out in self._layers.items()}
        return part

    def on(self, target: PreTrainedModel) -> Texts:
        """The same texts, read by another target."""
        return Texts(target, self.sequences)


def forms(tokenizer: Any) -> list[Form]:
    """The ways in which a prompt can be put to the target; the usual one first."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ["no template"]
    found: list[Form] = ["chat template", "no template"]
    if "enable_thinking" in str(template):
        found += ["thinking on", "thinking off"]
    return found


def encode_as(tokenizer: Any, prompt: Prompt, form: Form) -> list[int]:
    """Token ids of a prompt, put to the target in one of the ``forms``."""
    if form == "no template":
        text = prompt.text or "\n".join(message.content for message in prompt.messages)
        return list(tokenizer.encode(text))
    return encode(tokenizer, prompt, {"thinking on": True, "thinking off": False}.get(form))


def write_texts(
    target: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Texts:
    """Let the target answer prompts, greedily.

    Args:
        target: any that the Transformers engine runs.
        prompts: token ids.
        max_new_tokens: of an answer.

    Raises:
        DFlashError: every answer was empty.
    """
    length = max(len(prompt) for prompt in prompts) + max_new_tokens
    engine = Engine(target, None, max_batch=len(prompts), max_length=length)
    results = engine.generate([Request(prompt, max_new_tokens) for prompt in prompts])
    pairs = [
        (prompt, result.tokens)
        for prompt, result in zip(prompts, results, strict=True)
        if len(result.tokens) > 1
    ]
    if not pairs:
        raise DFlashError(
            f"the target answered none of the {len(prompts)} prompts: give others with --data, or "
            "leave --raw out if it is a chat model"
        )
    return Texts(target, SequenceSet.build(pairs))
