"""Training DFlash 2 drafters: they start as a DFlash drafter, and every part of them learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.tensors import checkpoint_tensors
from dflash_plugin.drafter.blockwise import Blocks, block_hidden, make_blocks
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.losses import dpace_weights, exponential_weights
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, collate
from dflash_plugin.train.trainer import Trainer
from dflash_plugin.transformers import load_drafter
from tests.helpers.core_drafts import core_drafts
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target, write_tiny
from tests.helpers.training import PARTS, sequences_of, trainer_of
from tests.train.test_train import CPU, compare_losses


def started(target, start: Path, work: Path, **changes) -> Trainer:
    """A trainer that goes on from a checkpoint, which decides the drafter's shape."""
    sequences = sequences_of(target)
    config = TrainConfig(start_from=start, steps=4, batch_size=4, anchors=4, **changes)
    features = OnlineFeatures(target, (0, 2))
    return Trainer(target, config, sequences, sequences, features, features, work)


def choices(objective: Objective, hidden: Tensor, blocks: Blocks) -> Tensor:
    """The selector's cross-entropies [B, A, K], one at a time; infinite without a candidate."""
    drafter = objective.drafter
    selector = drafter.candidate_selector
    assert selector is not None
    found = torch.full(blocks.labels.shape, torch.inf)
    for block in torch.cartesian_prod(*(torch.arange(n) for n in blocks.anchors.shape)).tolist():
        before = blocks.tokens[(*block, 0)]
        for place in range(blocks.labels.shape[-1]):
            here = (*block, place)
            best = drafter.logits(hidden[here][None])[0].topk(selector.top_k)
            gate = selector.hidden_projection(hidden[here])
            edges = selector.successor_codebook[best.indices] @ (
                selector.predecessor_codebook[before] * gate
            )
            before = blocks.labels[here]
            is_label = best.indices == before
            if is_label.any():
                found[here] = -F.log_softmax(best.values + edges, -1)[is_label][0]
    return found


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("weighting", ["exponential", "dpace"])
def test_the_loss_adds_the_selectors_cross_entropy(weighting, frozen):
    target = tiny_target().requires_grad_(not frozen)
    selector = DFLASH2["selector"].model_copy(update={"top_k": 30})
    drafter = tiny_drafter(target, **{**DFLASH2, "selector": selector})
    batch = collate(sequences_of(target), torch.arange(4))
    anchors, valid = choose_anchors(batch, 8, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    objective = Objective(drafter, weighting, 4.0, 0.5, selector_weight=0.3)
    outcome = objective(features, blocks)

    hidden = block_hidden(drafter, features, blocks)
    logits = drafter.logits(hidden).flatten(0, 2)
    plain = F.cross_entropy(logits, blocks.labels.flatten(), reduction="none")
    expected = torch.tensor(0.0)
    chosen = choices(objective, hidden, blocks)
    assert 0.1 < chosen.isinf().float().mean() < 0.9
    for losses, share in ((plain.view(blocks.labels.shape), 1.0), (chosen, 0.3)):
        if weighting == "dpace":
            weights = dpace_weights(losses, blocks.label_valid, 0.5)
            normalizer = blocks.label_valid[..., 0].sum()
        else:
            weights = exponential_weights(3, 4.0, CPU) * blocks.label_valid
            normalizer = weights.sum()
        finite = ~losses.isinf()
        expected = expected + share * (losses[finite] * weights[finite]).sum() / normalizer
    compare_losses(drafter, outcome.loss, expected)


def test_a_start_from_a_dflash_checkpoint_drafts_as_it_does(tmp_path):
    target = tiny_target()
    start = write_tiny(tmp_path / "start")
    trainer = started(target, start, tmp_path / "work", **PARTS)
    assert trainer.drafter.config.selector == DFLASH2["selector"]
    text, anchors = torch.randint(4, 97, (40,)).tolist(), list(range(5, 39))
    theirs = {"target": target, "drafter": load_drafter(start, target)}
    ours = {"target": target, "drafter": trainer.drafter.eval()}
    with torch.no_grad():
        expected = core_drafts(theirs, text, anchors)
        assert core_drafts(ours, text, anchors) == expected
        # The other weights decide nothing while the second codebook is zero, and then they do.
        nn.init.normal_(trainer.drafter.candidate_selector.successor_codebook)
        assert core_drafts(ours, text, anchors) != expected


def test_without_a_checkpoint_a_drafter_starts_as_the_dflash_drafter_of_its_seed(tmp_path):
    target = tiny_target()
    plain = trainer_of(target, tmp_path).drafter.state_dict()
    made = trainer_of(target, tmp_path, **PARTS).drafter.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in plain.items())


def test_a_start_from_a_dflash2_checkpoint_goes_on_with_it(tmp_path):
    start = write_tiny(tmp_path / "start", **DFLASH2)
    trainer = started(tiny_target(), start, tmp_path / "work", selector_weight=0.5)
    made = checkpoint_tensors(trainer.drafter)
    stored = load_checkpoint(start).tensors
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in stored.items())


def test_gradients_reach_every_parameter(tmp_path):
    trainer = started(tiny_target(), write_tiny(tmp_path / "start"), tmp_path / "work", **PARTS)
    trainer.run()
    for name, parameter in trainer.drafter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def phrases(count: int, seed: int) -> SequenceSet:
    """Phrases 10 20 and 11 21, 12 21, 13 21: the likeliest first word and second never meet."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        shares = torch.tensor([0.4, 0.2, 0.2, 0.2])
        first = 10 + torch.multinomial(shares, 12, replacement=True, generator=generator)
        second = torch.where(first == 10, 20, 21)
        pairs.append(([5], torch.stack([first, second], dim=1).flatten().tolist()))
    return SequenceSet.build(pairs)


def test_the_selector_learns_which_tokens_go_together(tmp_path):
    target = tiny_target().requires_grad_(False)
    features = OnlineFeatures(target, (0, 2))
    found = {}
    for weight in (0.0, 1.0):
        config = TrainConfig(
            mask_token_id=3, block_size=4, num_layers=1, target_layer_ids=(0, 2), steps=200,
            batch_size=8, anchors=8, learning_rate=3e-3, selector_weight=weight, **PARTS,
        )  # fmt: skip
        trainer = Trainer(
            target,
            config,
            phrases(64, 0),
            phrases(16, 1),
            features,
            features,
            tmp_path / f"{weight}",
        )
        trainer.run()
        found[weight] = trainer.evaluate()["tau"]
    # Left as it starts, it drafts 10 21.
    assert found[1.0] > found[0.0] + 0.3


@pytest.mark.parametrize(
    ("start", "changes", "named"),
    [
        (None, {"selector_rank": 4}, "selector_rank is 4, but only a DFlash 2 drafter has it"),
        (None, {"selector_weight": 0.5}, "selector_weight is 0.5, but only a DFlash 2"),
        (None, {**PARTS, "conv_group_size": 5}, "conv_group_size is 5, which does not divide"),
        (None, {**PARTS, "conv_kernel_size": 5}, "conv_kernel_size is 5, more than block_size 4"),
        (None, {**PARTS, "selector_top_k": 98}, "selector_top_k is 98, more than vocab_size 97"),
        (None, {"mask_token_id": None}, "mask_token_id is not given"),
        ({}, {"block_size": 4}, "block_size is 4, but '.*start' decides it: leave it out"),
        (DFLASH2, {"selector_rank": 6}, "selector_rank is 6, but '.*start' decides it"),
        ({"num_target_layers": 9, "target_layer_ids": (0, 8)}, {}, "reads target layer 8 but"),
        ({"draft_vocab_size": 24, "own_head": True}, PARTS, "draft_vocab_size is 24, but the sel"),
        ({"sample_from_anchor": True}, PARTS, "sample_from_anchor is true, but a DFlash 2"),
    ],
)
def test_settings_that_exclude_one_another_are_refused(start, changes, named, tmp_path):
    target = tiny_target()
    if start is None:
        make, arguments = trainer_of, (target, tmp_path / "work")
    else:
        checkpoint = write_tiny(tmp_path / "start", **start)
        make, arguments = started, (target, checkpoint, tmp_path / "work")
    with pytest.raises(DFlashError, match=named):
        make(*arguments, **changes)
