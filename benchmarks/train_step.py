"""Time of a training step by part, with dense masks and with FlexAttention side by side.

    python benchmarks/train_step.py --output FILE.json

The target is random, with the sizes of SmolLM2-135M or Qwen2.5-Coder-1.5B but for its number of
layers, as the drafter's speed does not depend on it. Responses are random tokens, of ``--response``
tokens down to 20. Figures are medians in milliseconds, of processor time on a CPU and of wall time
on a GPU; anchors count where a block can learn something. The first step is timed apart, as it
compiles, and so is one with responses of half the length, which must not compile again. On a CPU
FlexAttention is not fused, so that it cannot be faster there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dflash_plugin.bench.evaluate import machine
from dflash_plugin.drafter.blockwise import block_hidden, make_blocks
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.sequences import Batch, SequenceSet, collate
from dflash_plugin.train.trainer import Trainer

SIZES: dict[str, dict[str, int]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "coder-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


def sequences(count: int, prompt: int, response: int, vocabulary: int) -> SequenceSet:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(5, vocabulary, (length,), generator=generator).tolist()

    lengths = torch.linspace(response, 20, count).int().tolist()
    return SequenceSet.build([(tokens(prompt), tokens(length)) for length in lengths])


class Stopwatch:
    """Times of named parts, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = defaultdict(list)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        # Other processes may share the processor.
        return time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.times[name].append(1000 * (self._now() - start))


class Steps:
    """Steps of a trainer, part by part."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.watch = Stopwatch(trainer.device)

    def take(self, batch: Batch) -> tuple[int, float]:
        """One step over ``batch``: its anchors and its loss."""
        trainer, watch = self.trainer, self.watch
        generator = torch.Generator(device=trainer.device).manual_seed(1)
        anchors, valid = choose_anchors(batch, trainer.config.anchors, generator)
        config = trainer.drafter.config
        blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, config)
        with watch.part("features"):
            features = trainer.features(batch)
        with watch.part("drafter alone, forward"), torch.no_grad(), trainer._autocast():
            block_hidden(trainer.drafter, features, blocks, trainer.objective.attention)
        with watch.part("forward"), trainer._autocast():
            outcome = trainer.objective(features, blocks)
        with watch.part("backward"):
            outcome.loss.backward()
        with watch.part("optimizer"):
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return int(valid.sum()), outcome.loss.item()


def measure(
    trainer: Trainer, whole: SequenceSet, half: SequenceSet, repeats: int
) -> dict[str, Any]:
    """A step's parts, and what the first step and one of half the length take."""
    full, short = (
        collate(some, torch.arange(len(some))).to(trainer.device) for some in (whole, half)
    )
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    apart = {}
    for name, batch in (("first_step_seconds", full), ("half_length_seconds", short)):
        start = time.perf_counter()
        Steps(trainer).take(batch)
        apart[name] = round(time.perf_counter() - start, 2)
    steps = Steps(trainer)
    for _ in range(repeats):
        anchors, loss = steps.take(full)
    parts = {name: round(median(times), 1) for name, times in steps.watch.times.items()}
    step = sum(time for name, time in parts.items() if "alone" not in name)
    found = {
        "attention": trainer.objective.attention,
        "milliseconds": parts,
        "step": round(step, 1),
        "anchors": anchors,
        "anchors_per_second": round(1000 * anchors / step, 1),
        **apart,
        "loss": loss,
    }
    if trainer.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def random_target(sizes: dict[str, int], layers: int) -> PreTrainedModel:
    """A frozen target, in bfloat16 on a GPU as training loads it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return target.requires_grad_(False).to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sizes", choices=sorted(SIZES), default="smollm2")
    parser.add_argument("--attention", default="dense,flex", help="What to measure, in turn.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--anchors", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4, help="Of the target.")
    parser.add_argument("--draft-layers", type=int, default=3)
    parser.add_argument("--intermediate-size", type=int, default=768, help="Of the drafter.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sizes = SIZES[options.sizes]
    target = random_target(sizes, options.layers)
    whole, half = (
        sequences(options.batch, options.prompt, response, sizes["vocab_size"])
        for response in (options.response, options.response // 2)
    )
    rows = []
    for attention in options.attention.split(","):
        config = TrainConfig(
            mask_token_id=4,
            block_size=options.block_size,
            num_layers=options.draft_layers,
            intermediate_size=options.intermediate_size,
            target_layer_ids=tuple(range(options.layers)),
            anchors=options.anchors,
            batch_size=options.batch,
            attention=attention,
        )
        features = OnlineFeatures(target, config.target_layer_ids or ())
        trainer = Trainer(target, config, whole, whole, features, features, Path("unused"))
        rows.append(measure(trainer, whole, half, options.repeats))
        del trainer
    found = {
        "command": " ".join(["python", *sys.argv]),
        **machine(target),
        "triton": metadata.version("triton") if find_spec("triton") else None,
        **{
            name: value
            for name, value in vars(options).items()
            if name not in ("output", "attention")
        },
        "rows": rows,
    }
    text = json.dumps(found, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
