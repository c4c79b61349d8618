"""What inspect finds, and known answers."""

import json
from pathlib import Path

import pytest
import torch

from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.checkpoints.reference_drafts import (
    ReferenceDrafts,
    answer,
    load_record,
    replay,
    save_record,
)
from dflash_plugin.drafter.config import LayerAttention, RopeConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import load_drafter, load_target
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target, write_target, write_tiny


@pytest.fixture
def target(tmp_path):
    """A tiny target's directory; token 3 is its mask token."""
    return write_target(tmp_path / "target")


def findings(directory, target=None, **options):
    report = inspect_checkpoint(directory, target, **options)
    return report, {(f.level, f.subject): f.message for f in report.findings}


def test_a_drafter_that_fits_has_no_errors(target, tmp_path):
    report, found = findings(write_tiny(tmp_path / "drafter"), target, num_speculative_tokens=3)
    assert report.fits
    assert report.num_draft_tokens == 3
    # It was made for more positions than the target has, and has no known answers yet.
    assert set(found) == {("note", "known answers")}


@pytest.mark.parametrize(
    ("changes", "subject", "message"),
    [
        ({"target_hidden_size": 48}, "hidden_size", "48 wide, the target's hidden_size is 32"),
        ({"hidden_size": 48, "target_hidden_size": 32}, "hidden_size", "borrows the target's"),
        (
            {"target_layer_ids": (0, 7), "num_target_layers": None},
            "target_layer_ids",
            "layer 7 is out of range: the target has layers 0 to 3",
        ),
        ({"num_target_layers": 9}, "num_target_layers", "9 layers, this one has 4"),
        (
            {"vocab_size": 300, "mask_token_id": 200},
            "vocab_size",
            "mask_token_id 200 is outside the target's vocabulary of 97",
        ),
        (
            {**DFLASH2, "vocab_size": 90, "own_head": True},
            "vocab_size",
            "lm_head.weight has 90 rows but the target has 97 tokens",
        ),
        (
            {"vocab_size": 300, "draft_vocab_size": 30, "own_head": True},
            "vocab_size",
            "d2t maps a draft token to 290",
        ),
    ],
)
def test_every_mismatch_with_the_target_is_an_error(changes, subject, message, target, tmp_path):
    report, found = findings(write_tiny(tmp_path / "drafter", **changes), target)
    assert not report.fits
    assert message in found["error", subject]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 104}, "is 104, the target's 97: its rows from 97 on are left out"),
        ({"vocab_size": 90}, "is 90, the target's 97: it drafts over the target's"),
        ({"vocab_size": 90, "own_head": True}, "its tables know no token from 90 on"),
    ],
)
def test_another_size_of_vocabulary_is_a_warning_told_once(
    changes, message, target, tmp_path, caplog
):
    report, found = findings(write_tiny(tmp_path / "drafter", **changes), target)
    assert report.fits
    assert message in found["warning", "vocab_size"]
    load_drafter(tmp_path / "drafter", load_target(target, torch.float32, "cpu")[0])
    assert message not in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "by 5.65685, and the drafter reads the same"),
        ({"embedding_scale": 2.0}, "by 5.65685, and the drafter by 2 instead"),
        ({"own_embedding": True}, None),
    ],
)
def test_a_targets_factor_on_its_embedding_is_a_note(changes, told, tmp_path):
    target = write_target(tmp_path / "target", "gemma3_text")
    _, found = findings(write_tiny(tmp_path / "drafter", **changes), target)
    note = found.get(("note", "input_embedding_scale"))
    assert note is None if told is None else told in note


def test_speculative_tokens_are_held_against_the_block(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    _, found = findings(directory, num_speculative_tokens=4)
    assert "ask for at most 3" in found["error", "num_speculative_tokens"]
    report, found = findings(directory, num_speculative_tokens=2)
    assert report.fits
    assert "wasted" in found["warning", "num_speculative_tokens"]


def test_a_block_that_the_file_leaves_open_is_asked_for(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    block, wanted = raw.pop("block_size"), load_config(directory)
    path.write_text(json.dumps(raw))
    report, _ = findings(directory, num_speculative_tokens=block - 1)
    assert (report.config, load_config(directory, drafts=block - 1)) == (wanted, wanted)
    raw["dflash_config"]["sample_from_anchor"] = True
    path.write_text(json.dumps(raw))
    assert load_config(directory, drafts=block).block_size == block
    with pytest.raises(DFlashError, match=r"block_size is missing: .*DFLASH_PLUGIN=off"):
        inspect_checkpoint(directory)


def test_what_is_likely_to_hurt_is_a_warning(target, tmp_path, caplog):
    directory = write_tiny(
        tmp_path / "drafter",
        layers=(LayerAttention(sliding_window=5, causal=True),) * 2,
        target_layer_ids=(0, 3),
        mask_token_id=50,
        dtype="bfloat16",
    )
    raw = json.loads((directory / "config.json").read_text())
    del raw["is_causal"]
    raw["max_position_embeddings"] = 128
    (directory / "config.json").write_text(json.dumps(raw))
    report, found = findings(directory, target)
    assert report.fits
    assert "--dialect specforge" in found["warning", "is_causal"]
    # The report tells it, so that the log does not.
    assert "--dialect specforge" not in caplog.text
    assert "the target's last" in found["warning", "target_layer_ids"]
    assert "'w46'" in found["warning", "mask_token_id"]
    assert "128 positions, the target for 512" in found["warning", "max_position_embeddings"]
    _, found = findings(directory, target, dialect="specforge")
    assert ("warning", "is_causal") not in found


def test_another_tokenizer_is_an_error(target, tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    (directory / "tokenizer.json").write_text("{}")
    report, found = findings(directory, target)
    assert not report.fits
    assert "differs from the target's" in found["error", "tokenizer"]


def test_a_target_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DFlashError, match=r"config\.json cannot be read"):
        inspect_checkpoint(write_tiny(tmp_path / "drafter"), tmp_path)


@pytest.mark.parametrize("kind", [{}, DFLASH2], ids=["dflash", "dflash2"])
def test_known_answers_tell_a_wrongly_run_drafter(kind, tmp_path):
    target = tiny_target()
    drafter = tiny_drafter(target, **kind)
    prompts = ([5, 6, 7], list(range(10, 40)))
    record = ReferenceDrafts(answers=[answer(drafter, target, prompt) for prompt in prompts])
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    replay(drafter, target, record)
    wrong = [
        {"target_layer_ids": (1, 2)},
        {"layers": (LayerAttention(causal=True),) * 2},
        {"mask_token_id": 9},
        {"rope": RopeConfig(interleaved=True)},
        {"seed": 1},
    ]
    for changes in wrong:
        with pytest.raises(DFlashError, match="not run as it was trained"):
            replay(tiny_drafter(target, **kind, **changes), target, record)
    with pytest.raises(DFlashError, match="not the target that the drafter was made for"):
        replay(drafter, tiny_target(seed=9), record)


def test_a_broken_record_is_refused(tmp_path):
    assert load_record(tmp_path) is None
    (tmp_path / "known_answer.json").write_text('{"answers": [{"prompt": "x"}]}')
    with pytest.raises(DFlashError, match="is not a known-answer record"):
        load_record(tmp_path)


@pytest.mark.parametrize(("kind", "size"), [("dflash", 16_000_000), ("dflash2", 24_000_000)])
def test_the_shipped_drafters_give_their_known_answers(smollm2, kind, size):
    directory = Path(__file__).parents[2] / "examples" / f"smollm2-135m-{kind}"
    record = load_record(directory)
    assert record is not None
    assert len(record.answers) == 3
    target, _ = load_target(smollm2, torch.float32, "cpu")
    replay(load_drafter(directory, target), target, record)
    report = inspect_checkpoint(directory, smollm2, num_speculative_tokens=7)
    assert report.fits
    assert not [finding for finding in report.findings if finding.level == "warning"]
    assert (directory / "model.safetensors").stat().st_size <= size
