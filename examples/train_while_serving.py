"""Train target and drafter while vLLM serves them; each round trains on texts of the last weights.

python examples/train_while_serving.py 3

The reward here is the share of different tokens. Put your own in its place.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.checkpoints.io import save_checkpoint
from dflash_plugin.checkpoints.tensors import checkpoint_tensors
from dflash_plugin.drafter.blockwise import make_blocks
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.losses import gamma_for
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, collate
from dflash_plugin.transformers import load_drafter, load_target

Pair = tuple[list[int], list[int]]


def write(engine: LLM, prompts: list[list[int]]) -> list[Pair]:
    """Prompts with responses, four of each."""
    params = SamplingParams(temperature=1.0, max_tokens=48, n=4)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    made = engine.generate(inputs, params, use_tqdm=False)
    pairs = [(list(one.prompt_token_ids), list(o.token_ids)) for one in made for o in one.outputs]
    return [(prompt, response) for prompt, response in pairs if len(response) > 1]


def train_target(
    target: PreTrainedModel, optimizer: torch.optim.Optimizer, pairs: list[Pair]
) -> None:
    """One step of policy gradient."""
    rewards = torch.tensor([len(set(response)) / len(response) for _, response in pairs])
    optimizer.zero_grad()
    for (prompt, response), advantage in zip(pairs, rewards - rewards.mean(), strict=True):
        tokens = torch.tensor([prompt + response], device=target.device)
        labels = tokens.clone()
        labels[:, : len(prompt)] = -100
        (float(advantage) * target(input_ids=tokens, labels=labels).loss / len(pairs)).backward()
    optimizer.step()


def train_drafter(
    drafter: Drafter, target: PreTrainedModel, optimizer: torch.optim.Optimizer, pairs: list[Pair]
) -> None:
    """One step towards the target's own responses."""
    sequences = SequenceSet.build(pairs)
    batch = collate(sequences, torch.arange(len(sequences))).to(target.device)
    anchors, valid = choose_anchors(batch, 32, torch.Generator(target.device))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    gamma = gamma_for(drafter.config.block_size)
    optimizer.zero_grad()
    Objective(drafter, "exponential", gamma, 0.5)(features, blocks).loss.backward()
    optimizer.step()


def push(engine: LLM, target: PreTrainedModel, drafter: Drafter, directory: Path) -> None:
    """Give the engine both models' weights, and drop what the old ones have cached."""
    target.save_pretrained(directory / "target")
    tensors = checkpoint_tensors(drafter)
    config = drafter.config
    save_checkpoint(directory / "drafter", config, tensors, config.dialect, overwrite=True)
    path = str(directory / "target")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
    engine.collective_rpc("reload_draft_weights", args=(str(directory / "drafter"),))
    engine.reset_prefix_cache()


def run(
    engine: LLM,
    target: PreTrainedModel,
    drafter: Drafter,
    prompts: list[list[int]],
    directory: Path,
    rounds: int,
) -> None:
    """Write, train both models and hand them over, ``rounds`` times."""
    for model in (target, drafter):
        model.requires_grad_(True)
    target_optimizer = torch.optim.AdamW(target.parameters(), lr=1e-6)
    drafter_optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4)
    for _ in range(rounds):
        pairs = write(engine, prompts)
        train_target(target, target_optimizer, pairs)
        train_drafter(drafter, target, drafter_optimizer, pairs)
        push(engine, target, drafter, directory)


def main(rounds: int) -> None:
    model, checkpoint = resolve_model("smollm2"), resolve_drafter(None, "smollm2")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_target(model, torch.float32, device)
    drafter = load_drafter(checkpoint, target)
    settings: dict[str, Any] = {"method": "dflash", "model": str(checkpoint)}
    engine = LLM(
        str(model),
        speculative_config=settings,
        max_model_len=1024,
        gpu_memory_utilization=0.4,  # leaves room for training
        disable_log_stats=False,
    )
    questions = ["What is a prime number?", "Name three rivers of Europe."]
    prompts = [tokenizer(question)["input_ids"] for question in questions]
    with TemporaryDirectory() as directory:
        run(engine, target, drafter, prompts, Path(directory), rounds)
    found = {metric.name: metric for metric in engine.get_metrics()}
    passes = found["vllm:spec_decode_num_drafts"].value
    accepted = found["vllm:spec_decode_num_accepted_tokens"].value
    print(f"τ {1 + accepted / passes:.2f} over {passes} verify passes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
