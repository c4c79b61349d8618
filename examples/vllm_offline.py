"""Offline generation in vLLM with SmolLM2 and the shipped drafter.

python examples/vllm_offline.py "What is a prime number?" "Name three rivers."
"""

import sys

from vllm import LLM, SamplingParams

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model


def main(questions: list[str]) -> None:
    engine = LLM(
        str(resolve_model("smollm2")),
        speculative_config={
            "method": "dflash",
            "model": str(resolve_drafter(None, "smollm2")),
        },
        max_model_len=1024,
        enforce_eager=True,  # starts faster; leave it out on a GPU that is to serve
        disable_log_stats=False,
    )
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = engine.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64))
    for question, answer in zip(questions, answers, strict=True):
        print(f"\n{question}\n{answer.outputs[0].text}")
    found = {metric.name: metric for metric in engine.get_metrics()}
    passes = found["vllm:spec_decode_num_drafts"].value
    accepted = found["vllm:spec_decode_num_accepted_tokens"].value
    print(f"\nτ {1 + accepted / passes:.2f} over {passes} verify passes")


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is a prime number?", "Name three rivers of Europe."])
