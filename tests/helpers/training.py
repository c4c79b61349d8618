"""A tiny training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.sequences import SequenceSet
from dflash_plugin.train.trainer import Trainer
from dflash_plugin.transformers import Engine, Request
from tests.helpers.tiny import VOCABULARY

# Settings that add DFlash 2's parts in ``tiny.DFLASH2``'s sizes.
PARTS = {"dflash2": True, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}
KINDS = pytest.mark.parametrize("parts", [{}, PARTS], ids=["dflash", "dflash2"])


def sequences_of(target, count: int = 24, new_tokens: int = 20) -> SequenceSet:
    """Random prompts with the target's greedy responses."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    prompts = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    engine = Engine(target, max_batch=8, max_length=32)
    results = engine.generate([Request(p, new_tokens, stop_ids=[]) for p in prompts])
    return SequenceSet.build([(p, r.tokens) for p, r in zip(prompts, results, strict=True)])


def trainer_of(target, directory: Path, **changes) -> Trainer:
    sequences = sequences_of(target)
    values = {
        "block_size": 4,
        "num_layers": 2,
        "target_layer_ids": (0, 2),
        "mask_token_id": 3,
        "steps": 12,
        "batch_size": 6,
        "anchors": 8,
        "learning_rate": 3e-3,
        "eval_every": 6,
        "save_every": 5,
    }
    config = TrainConfig(**{**values, **changes})
    features = OnlineFeatures(target, config.target_layer_ids)
    held_out = sequences.select(torch.arange(4))
    training = sequences.select(torch.arange(4, len(sequences)))
    return Trainer(target, config, training, held_out, features, features, directory)
