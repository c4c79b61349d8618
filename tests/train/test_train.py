"""The trainer: its blocks are the engine's, it resumes, and its estimate is the engine's τ."""

import json
import operator
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from dflash_plugin.bench.evaluate import pooled_tau
from dflash_plugin.drafter import blockwise
from dflash_plugin.drafter.blockwise import accepted_run, block_hidden, make_blocks
from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt
from dflash_plugin.train import pipeline
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import DataConfig, TrainConfig
from dflash_plugin.train.data import respond, write_prompts
from dflash_plugin.train.features import CachedFeatures, OnlineFeatures, cache_features
from dflash_plugin.train.losses import (
    dpace_weights,
    exponential_weights,
    gamma_for,
)
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, batches, collate
from dflash_plugin.train.setup import drafter_config
from dflash_plugin.transformers import Engine, Request, load_target
from tests.helpers.tiny import DFLASH2, tiny_config, tiny_drafter, tiny_target, write_target
from tests.helpers.training import KINDS, sequences_of, trainer_of

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(data=st.data(), alpha=st.floats(0, 1))
def test_dpace_weights_are_the_expected_length_that_passes_through(data, alpha):
    count = data.draw(st.integers(1, 6))
    losses = data.draw(st.lists(st.floats(0, 5), min_size=count, max_size=count))
    length = data.draw(st.integers(0, count))
    valid = torch.arange(count) < length
    found = dpace_weights(torch.tensor(losses), valid, alpha)
    smooth = [(1 - alpha) * torch.tensor(loss).neg().exp().item() + alpha for loss in losses]
    for k in range(count):
        expected, reach = 0.0, 1.0
        for j in range(length):
            reach *= smooth[j]
            expected += reach if j >= k and k < length else 0.0
        assert found[k].item() == pytest.approx(expected, abs=1e-5)


def test_position_weights_and_runs():
    assert [gamma_for(size) for size in (8, 10, 16)] == [4.0, 5.0, 7.0]
    weights = exponential_weights(3, 4.0, CPU)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.7788008, 0.6065307]))
    correct = torch.tensor([[True, True, False, True], [False, True, True, True], [True] * 4])
    assert accepted_run(correct).tolist() == [2, 0, 4]


def test_anchors_are_distinct_places_of_the_response_with_a_token_after_them():
    pairs = [([1] * 3, [5] * 9), ([1] * 7, [6] * 2), ([1], [7] * 30)]
    batch = collate(SequenceSet.build(pairs), torch.arange(3))
    anchors, valid = choose_anchors(batch, 8, torch.Generator().manual_seed(0))
    assert valid.sum(1).tolist() == [8, 1, 8]
    for row, (prompt, response) in enumerate(pairs):
        chosen = anchors[row][valid[row]].tolist()
        assert len(set(chosen)) == len(chosen)
        assert all(len(prompt) <= a < len(prompt) + len(response) - 1 for a in chosen)
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, tiny_config())
    for row, (prompt, response) in enumerate(pairs):
        whole = [*prompt, *response]
        for column in range(8):
            if not valid[row, column]:
                assert not blocks.label_valid[row, column].any()
                continue
            place = int(anchors[row, column])
            assert blocks.tokens[row, column].tolist() == [whole[place], 3, 3, 3]
            following = whole[place + 1 : place + 4]
            assert blocks.labels[row, column][: len(following)].tolist() == following
            inside = [k < len(following) for k in range(3)]
            assert blocks.label_valid[row, column].tolist() == inside


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": (LayerAttention(sliding_window=5, causal=True), LayerAttention())},
        {"layers": (LayerAttention(sliding_window=4),), "window_from": "anchor"},
        {"sample_from_anchor": True},
        DFLASH2,
    ],
)
def test_a_packed_block_is_the_block_that_the_engine_drafts(changes):
    target = tiny_target()
    drafter = tiny_drafter(target, **changes)
    batch = collate(sequences_of(target), torch.arange(3))
    anchors, valid = choose_anchors(batch, 6, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    with torch.no_grad():
        packed = block_hidden(drafter, features, blocks)
        for row in range(3):
            for column in range(6):
                place = int(anchors[row, column])
                drafter.store = StaticStore(drafter, 1, 48, torch.float32, CPU)
                drafter.inject(features[row : row + 1, :place], torch.arange(place)[None])
                token = batch.tokens[row, place][None]
                drafted = drafter.draft(token, torch.tensor([place]))
                torch.testing.assert_close(packed[row, column], drafted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"layers": (LayerAttention(sliding_window=4),)}, DFLASH2])
def test_groups_of_blocks_are_what_all_blocks_at_once_are(changes, monkeypatch):
    target = tiny_target()
    drafter = tiny_drafter(target, **changes)
    batch = collate(sequences_of(target), torch.arange(3))
    anchors, valid = choose_anchors(batch, 7, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    whole = block_hidden(drafter, features, blocks)
    monkeypatch.setattr(blockwise, "GROUP_ROWS", 3 * drafter.config.block_size)
    torch.testing.assert_close(block_hidden(drafter, features, blocks), whole)


def test_no_block_is_drafted_where_no_response_has_a_place_for_it():
    batch = collate(SequenceSet.build([([1], [5] * 4), ([1] * 3, [6] * 9)]), torch.arange(2))
    wide, wide_valid = choose_anchors(batch, 8, torch.Generator().manual_seed(0))
    anchors, valid = choose_anchors(batch, 30, torch.Generator().manual_seed(0))
    assert wide.shape == anchors.shape == (2, 8)
    assert valid.sum(1).tolist() == wide_valid.sum(1).tolist() == [3, 8]
    assert anchors[0, :3].tolist() == [1, 2, 3]


def compare_losses(drafter, loss, expected) -> None:
    """Their values, and the gradients that each gives the drafter."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    found = [parameter.grad.clone() for parameter in drafter.parameters()]
    drafter.zero_grad()
    expected.backward()
    for gradient, parameter in zip(found, drafter.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("weighting", ["exponential", "dpace"])
def test_the_loss_is_weighted_cross_entropy(weighting):
    target = tiny_target()
    drafter = tiny_drafter(target)
    batch = collate(sequences_of(target), torch.arange(4))
    anchors, valid = choose_anchors(batch, 8, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    objective = Objective(drafter, weighting, 4.0, 0.5)
    outcome = objective(features, blocks)
    logits = drafter.logits(block_hidden(drafter, features, blocks))
    losses = F.cross_entropy(logits.flatten(0, 2), blocks.labels.flatten(), reduction="none")
    losses = losses.view(blocks.labels.shape)
    if weighting == "dpace":
        weights = dpace_weights(losses, blocks.label_valid, 0.5)
        expected = (losses * weights).sum() / blocks.label_valid[..., 0].sum()
    else:
        weights = exponential_weights(3, 4.0, CPU) * blocks.label_valid
        expected = (losses * weights).sum() / weights.sum()
    compare_losses(drafter, outcome.loss, expected)


def test_a_label_outside_a_reduced_vocabulary_carries_no_loss():
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab_size=24, own_head=True)
    batch = collate(sequences_of(target), torch.arange(4))
    anchors, valid = choose_anchors(batch, 8, torch.Generator().manual_seed(1))
    blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)
    features = OnlineFeatures(target, drafter.config.target_layer_ids)(batch)
    outcome = Objective(drafter, "exponential", 4.0, 0.5)(features, blocks)
    reachable = (blocks.labels % 4 == 0) & (blocks.labels < 96)
    assert torch.isfinite(outcome.loss)
    assert int(outcome.correct.sum()) <= int((reachable & blocks.label_valid).sum())


def test_batches_cover_the_set_and_start_anywhere():
    sequences = SequenceSet.build([([1], [2] * n) for n in range(2, 22)])
    source = batches(sequences, 4, seed=3)
    epoch = [next(source) for _ in range(5)]
    assert sorted(i for batch in epoch for i in batch.indices.tolist()) == list(range(20))
    following = next(source)
    resumed = next(batches(sequences, 4, seed=3, start=5))
    assert torch.equal(following.tokens, resumed.tokens)


def test_cached_features_are_the_online_ones(tmp_path):
    target = tiny_target()
    sequences = sequences_of(target)
    online = OnlineFeatures(target, (0, 2))
    cached = cache_features(tmp_path, sequences, online, CPU, batch_size=5)
    batch = collate(sequences, torch.tensor([3, 11, 7]))
    for row, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(
            cached(batch)[row, :length], online(batch)[row, :length], atol=1e-4, rtol=1e-4
        )
    with pytest.raises(DFlashError, match="no features of these sequences"):
        CachedFeatures(tmp_path, sequences.select(torch.arange(3)), (0, 2))


@KINDS
def test_training_learns_and_its_estimate_is_what_the_engine_gets(parts, tmp_path):
    target = tiny_target()
    trainer = trainer_of(target, tmp_path, steps=150, eval_every=150, save_every=1000, **parts)
    records = []
    trainer.run(records.append)
    assert [record["step"] for record in records] == list(range(1, 151))
    for name, better in (("loss", lambda old, new: new < 0.7 * old), ("tau", operator.lt)):
        first, last = (mean(r[name] for r in part) for part in (records[:20], records[-20:]))
        assert better(first, last), name
    estimate = trainer.evaluate()
    drafter = trainer.drafter.eval()
    engine = Engine(target, drafter, max_batch=4, max_length=40)
    held_out = trainer.held_out
    requests = []
    for index in range(len(held_out)):
        tokens, prompt = held_out[index]
        requests.append(Request(tokens[:prompt].tolist(), len(tokens) - prompt, stop_ids=[]))
    assert pooled_tau(engine.generate(requests)) == pytest.approx(estimate["tau"])


@KINDS
def test_an_interrupted_run_ends_as_an_uninterrupted_one(parts, tmp_path):
    target = tiny_target()
    whole = trainer_of(target, tmp_path / "whole", **parts)
    whole.run()

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        trainer_of(target, tmp_path / "killed", **parts).run(kill)
    resumed = trainer_of(target, tmp_path / "killed", **parts)
    steps = []
    resumed.run(lambda record: steps.append(record["step"]))
    assert steps == list(range(6, 13))
    for ours, theirs in zip(resumed.drafter.parameters(), whole.drafter.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(DFlashError, match=r"was made with learning_rate 0.003 instead of 0.001: "):
        trainer_of(target, tmp_path / "killed", learning_rate=1e-3, **parts).run()


def test_a_snapshot_that_is_cut_off_is_named(tmp_path):
    trainer = trainer_of(tiny_target(), tmp_path, steps=2)
    trainer.run()
    snapshot = tmp_path / "snapshot.safetensors"
    whole = snapshot.read_bytes()
    for length in (0, 100, len(whole) // 2):
        snapshot.write_bytes(whole[:length])
        with pytest.raises(DFlashError, match=r"is not a whole snapshot \(.*\): remove it"):
            trainer.resume()


def test_only_what_differs_is_named(tmp_path):
    trainer_of(tiny_target(), tmp_path, steps=2).run()
    with pytest.raises(DFlashError) as refused:
        trainer_of(tiny_target(), tmp_path, steps=3, anchors=4).resume()
    assert "made with steps 2 instead of 3, anchors 8 instead of 4: give" in str(refused.value)


@pytest.mark.parametrize(
    ("layers", "ids"),
    [
        (2, (1,)),
        (3, (1,)),
        (4, (2,)),
        (5, (1, 2)),
        (6, (1, 2, 3)),
        (7, (1, 2, 3, 4)),
        (9, (1, 2, 4, 5, 6)),
    ],
)
def test_a_shallow_target_gives_fewer_layers_each_once(layers, ids):
    target = tiny_target(num_hidden_layers=layers)
    assert drafter_config(target, TrainConfig(mask_token_id=3)).target_layer_ids == ids
    if len(ids) < 5:
        asked = TrainConfig(mask_token_id=3, num_features=5)
        with pytest.raises(
            DFlashError, match=f"num_features is 5, .* {layers} layers only {len(ids)}"
        ):
            drafter_config(target, asked)


def test_gpt2_has_no_intermediate_size_of_its_own():
    sizes = GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=97, n_positions=64)
    config = drafter_config(GPT2LMHeadModel(sizes), TrainConfig(mask_token_id=3))
    assert config.intermediate_size == 4 * config.hidden_size


def test_prompts_that_are_too_long_are_counted(tmp_path, caplog):
    target, tokenizer = load_target(write_target(tmp_path), torch.float32, "cpu")
    engine = Engine(target, max_batch=4, max_length=64)
    prompts = [Prompt.user("w5 " * n) for n in (1, 2, 30)]
    assert len(respond(engine, tokenizer, prompts, 8, max_prompt_tokens=12)) == 2
    assert "1 of 3 prompts are left out: they have more than 12 tokens" in caplog.text
    with pytest.raises(DFlashError, match="max_prompt_tokens is 2, but the shortest of 3 prompts"):
        respond(engine, tokenizer, prompts, 8, max_prompt_tokens=2)
    with pytest.raises(
        DFlashError, match="8 of 8 self-written prompts are left out: 8 did not end"
    ):
        write_prompts(engine, tokenizer, 8, max_tokens=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "there is nothing to train on"),
        ({"self_prompts": 20}, "held_out is 128, but the prompts make at most 20 sequences"),
        ({"self_prompts": 200, "samples": 2}, "samples is 2, which at temperature 0"),
    ],
)
def test_data_that_cannot_be_enough_is_refused_before_anything_is_loaded(changes, named, tmp_path):
    with pytest.raises(DFlashError, match=named):
        pipeline.train(tmp_path / "no target", tmp_path, TrainConfig(), DataConfig(**changes))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    target = tiny_target()
    trainer = trainer_of(target, tmp_path)
    with torch.no_grad():
        trainer.drafter.fc.weight.fill_(float("nan"))
    with pytest.raises(DFlashError, match="the loss became nan at step 1: lower learning_rate"):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_layer_ids": (0, 4)}, "target layer 4 does not exist"),
        ({"mask_token_id": 97}, "mask_token_id 97 is outside"),
    ],
)
def test_settings_that_the_target_lacks_are_refused(changes, named, tmp_path):
    with pytest.raises(DFlashError, match=named):
        trainer_of(tiny_target(), tmp_path, **changes)


def test_the_target_writes_prompts_and_responses(tmp_path):
    target, tokenizer = load_target(write_target(tmp_path), torch.float32, "cpu")
    engine = Engine(target, max_batch=16, max_length=64)
    prompts = write_prompts(engine, tokenizer, 60, seed=1, max_tokens=24)
    assert prompts
    assert len({prompt.messages[0].content for prompt in prompts}) == len(prompts)
    again = write_prompts(engine, tokenizer, 60, seed=1, max_tokens=24)
    assert again == prompts
    written = respond(engine, tokenizer, prompts, 16, max_prompt_tokens=40)
    tokens, prompt = written[0]
    assert 1 < len(tokens) - prompt <= 16
    with pytest.raises(DFlashError, match="2 samples at temperature 0"):
        respond(engine, tokenizer, prompts, 16, samples=2)
    tokenizer.chat_template = None
    with pytest.raises(DFlashError, match="no chat template"):
        write_prompts(engine, tokenizer, 4)


TRAIN = (
    "--mask-token 3 --self-prompts 80 --max-prompt-tokens 40 --max-new-tokens 12 --held-out 4 "
    "--generation-batch 16 --block-size 4 --layers 1 --intermediate-size 16 --target-layers 0,2 "
    "--batch-size 4 --anchors 4 --eval-every 20 --save-every 10 --json"
)


def command(target: Path, output: Path, *options: str, processes: int = 1) -> list[str]:
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    arguments = [
        "train",
        "--target",
        str(target),
        "--output",
        str(output),
        *shlex.split(TRAIN),
        *options,
    ]
    return [*python, "dflash_plugin", *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: list[str]) -> dict:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    target = write_target(tmp_path / "target")
    run(command(target, tmp_path / "whole", "--steps", "60"))
    killed = subprocess.Popen(
        command(target, tmp_path / "killed", "--steps", "60"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    snapshot = tmp_path / "killed" / "work" / "snapshot.safetensors"
    deadline = time.monotonic() + 120
    while not snapshot.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert snapshot.is_file()
    facts = run(command(target, tmp_path / "killed", "--steps", "60"))
    assert facts["steps"] == 60
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    refused = subprocess.run(
        command(target, tmp_path / "killed", "--steps", "60", "--max-new-tokens", "14"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert refused.returncode == 1
    assert "was made with --max-new-tokens 12 instead of 14" in " ".join(refused.stderr.split())


def test_two_processes_train_one_drafter(tmp_path):
    target = write_target(tmp_path / "target")
    options = "--steps 20 --cache-features --dflash2 --selector-rank 4 --selector-top-k 6"
    training = command(target, tmp_path / "out", *options.split(), processes=2)
    stopped = subprocess.run(
        [*training, "--minutes", "0"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after step 10 of 20" in " ".join(stopped.stderr.split())
    facts = run(training)
    assert facts["processes"] == 2
    assert facts["anchors"] == 20 * 4 * 4 * 2
    assert (tmp_path / "out" / "known_answer.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "torchrun --nproc-per-node 2 -m dflash_plugin train" in card
