"""Training with FlexAttention is training with dense masks."""

import pytest
import torch

from dflash_plugin.drafter import flex
from dflash_plugin.drafter.blockwise import make_blocks
from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import OnlineFeatures
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, collate
from dflash_plugin.train.setup import block_attention
from tests.helpers.tiny import DFLASH2, VOCABULARY, tiny_config, tiny_drafter, tiny_target
from tests.helpers.training import trainer_of

WINDOWS = (LayerAttention(sliding_window=5, causal=True), LayerAttention())


def of_lengths(*lengths: tuple[int, int]) -> SequenceSet:
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()

    return SequenceSet.build([(tokens(prompt), tokens(response)) for prompt, response in lengths])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": WINDOWS},
        {"layers": (LayerAttention(sliding_window=40),), "window_from": "anchor"},
        DFLASH2,
        {**DFLASH2, "layers": WINDOWS},
    ],
    ids=["dflash", "windows", "window-from-anchor", "dflash2", "dflash2-windows"],
)
# A text that fills a tile and a bit, one with fewer places than anchors, and one between.
@pytest.mark.parametrize("lengths", [[(30, 110), (2, 5), (60, 70)], [(3, 20)]])
def test_loss_and_gradients_are_those_of_dense_masks(changes, lengths):
    target = tiny_target()
    drafter = tiny_drafter(target, **changes)
    batch = collate(of_lengths(*lengths), torch.arange(len(lengths)))
    anchors, valid = choose_anchors(batch, 40, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    found = {}
    for attention in ("dense", "flex"):
        drafter.zero_grad()
        outcome = Objective(drafter, "dpace", 4.0, 0.5, attention=attention)(features, blocks)
        outcome.loss.backward()
        gradients = [parameter.grad.clone() for parameter in drafter.parameters()]
        found[attention] = (outcome.loss.detach(), outcome.runs, gradients)
    (loss, runs, gradients), (expected, expected_runs, expected_gradients) = (
        found["flex"],
        found["dense"],
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(runs, expected_runs)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-3)


def test_a_run_attends_as_its_setting_says(tmp_path):
    target = tiny_target()
    records = {"dense": [], "flex": []}
    for attention, into in records.items():
        trainer = trainer_of(target, tmp_path / attention, steps=4, attention=attention)
        assert trainer.objective.attention == attention
        trainer.run(into.append)
    losses = [[record["loss"] for record in into] for into in records.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert trainer_of(target, tmp_path / "auto").objective.attention == "dense"


@pytest.mark.parametrize(
    ("attention", "device", "head_dim", "expected"),
    [
        ("auto", "cuda", 64, "flex"),
        ("auto", "cuda", 8, "dense"),
        ("auto", "cpu", 64, "dense"),
        ("dense", "cuda", 64, "dense"),
        ("flex", "cuda", 64, "flex"),
        ("flex", "cpu", 8, "flex"),
    ],
)
def test_by_default_a_gpu_has_flex_where_it_runs(
    attention, device, head_dim, expected, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(flex, "find_spec", lambda name: object())
    config = tiny_config(head_dim=head_dim)
    train = TrainConfig(attention=attention)
    assert block_attention(config, train, torch.device(device)) == expected


def test_flex_where_it_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(flex, "find_spec", lambda name: object())
    train = TrainConfig(attention="flex")
    for changes, device, named in (
        ({"head_dim": 8}, "cuda", "head_dim is 8"),
        ({"attention_sinks": True}, "cpu", "the drafter has attention sinks"),
    ):
        with pytest.raises(DFlashError, match=f"attention is 'flex', but {named}.*: choose dense"):
            block_attention(tiny_config(**changes), train, torch.device(device))
