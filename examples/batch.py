"""Answers several prompts at once with SmolLM2 and the shipped drafter, streaming as they come.

python examples/batch.py "What is a prime number?" "Name three rivers."
"""

import sys

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.prompts import Prompt, encode
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target


def main(questions: list[str]) -> None:
    target, tokenizer = load_target(resolve_model("smollm2"))
    drafter = load_drafter(resolve_drafter(None, "smollm2"), target)
    engine = Engine(target, drafter, max_batch=len(questions), max_length=512)
    requests = [
        Request(encode(tokenizer, Prompt.user(question)), max_new_tokens=64)
        for question in questions
    ]

    def show(index: int, tokens: list[int]) -> None:
        print(f"[{index}] {tokenizer.decode(tokens)!r}")

    for question, result in zip(questions, engine.generate(requests, show), strict=True):
        print(f"\n{question}\n{tokenizer.decode(result.tokens, skip_special_tokens=True)}")
        print(f"τ {result.acceptance_length:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is a prime number?", "Name three rivers of Europe."])
