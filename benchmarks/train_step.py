"""Time of a training step by part: features, drafter, head and loss, backward pass, optimizer.

    python benchmarks/train_step.py --output FILE.json

The target is random, with SmolLM2-135M's sizes but for its number of layers, as the drafter's
speed does not depend on it. Responses are random tokens, of ``--response`` tokens down to 20.
Figures are medians in milliseconds, of processor time on a CPU and of wall time on a GPU; anchors
count where a block can learn something.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dflash_plugin.drafter.blockwise import block_hidden, make_blocks
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.sequences import SequenceSet, collate
from dflash_plugin.train.trainer import Trainer

SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
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


def measure(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """One step's parts, over the same batch."""
    watch = Stopwatch(trainer.device)
    whole = trainer.sequences
    batch = collate(whole, torch.arange(len(whole))).to(trainer.device)
    generator = torch.Generator(device=trainer.device)
    for _ in range(repeats + 1):
        generator.manual_seed(1)
        anchors, valid = choose_anchors(batch, trainer.config.anchors, generator)
        config = trainer.drafter.config
        blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, config)
        with watch.part("features"):
            features = trainer.features(batch)
        with watch.part("drafter alone, forward"), torch.no_grad(), trainer._autocast():
            block_hidden(trainer.drafter, features, blocks)
        with watch.part("forward"), trainer._autocast():
            outcome = trainer.objective(features, blocks)
        with watch.part("backward"):
            outcome.loss.backward()
        with watch.part("optimizer"):
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    parts = {name: round(median(times[1:]), 1) for name, times in watch.times.items()}
    step = sum(time for name, time in parts.items() if "alone" not in name)
    anchored = int(valid.sum())
    return {
        "milliseconds": parts,
        "step": round(step, 1),
        "anchors": anchored,
        "anchors_per_second": round(1000 * anchored / step, 1),
        "loss": outcome.loss.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--anchors", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4, help="Of the target.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.layers, **SIZES)).to(device)
    target.requires_grad_(False)
    data = sequences(options.batch, options.prompt, options.response, SIZES["vocab_size"])
    config = TrainConfig(
        mask_token_id=4,
        block_size=options.block_size,
        intermediate_size=768,
        target_layer_ids=tuple(range(options.layers)),
        anchors=options.anchors,
        batch_size=options.batch,
    )
    features = OnlineFeatures(target, config.target_layer_ids or ())
    trainer = Trainer(target, config, data, data, features, features, Path("unused"))
    found = {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(options).items() if name != "output"},
        **measure(trainer, options.repeats),
    }
    text = json.dumps(found, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
