"""Offline generation on SGLang with the shipped drafter, and what it accepted.

Runs on a GPU as it is. On a CPU, in an environment that tests/on_sglang/install.sh made, it runs in
float32.
"""

from pathlib import Path

import torch
from sglang import Engine
from transformers import AutoTokenizer

from dflash_plugin.checkpoints.hub import fetch_model

PROMPTS = ["Write a Python function that reverses a list.", "Why is the sky blue?"]
CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
}


def main() -> None:
    target = fetch_model("smollm2")
    drafter = Path(__file__).parent / "smollm2-135m-dflash"
    tokenizer = AutoTokenizer.from_pretrained(target)
    engine = Engine(
        model_path=str(target),
        speculative_algorithm="DFLASH",
        speculative_draft_model_path=str(drafter),
        **({} if torch.cuda.is_available() else CPU),
    )
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    answers = engine.generate(chats, {"temperature": 0.0, "max_new_tokens": 96})
    for answer in answers:
        meta = answer["meta_info"]
        by_position = " ".join(f"{share:.2f}" for share in meta["spec_accept_by_position"])
        print(answer["text"].strip(), f"\nτ {meta['spec_accept_length']:.2f}, at {by_position}\n")
    engine.shutdown()


if __name__ == "__main__":
    main()
