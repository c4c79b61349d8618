"""Files of a checkpoint that are not there, not whole, not its own, or not as usual."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import write_tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def spoilt(directory: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The checkpoint with one file replaced."""
    path = directory / name
    path.unlink(missing_ok=True)
    make(path)
    return directory


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (WEIGHTS, lambda path: path.mkdir(), f"{WEIGHTS} cannot be read .*fetch it again"),
        (WEIGHTS, lambda path: path.symlink_to("/nowhere"), f"{WEIGHTS} cannot be read"),
        (WEIGHTS, lambda path: path.symlink_to(path), f"{WEIGHTS} cannot be read"),
        (WEIGHTS, lambda path: path.write_bytes(b""), f"{WEIGHTS} is truncated: 0 bytes"),
        (INDEX, lambda path: path.write_text('{"weight_map": {}}'), f"{INDEX} has no weight_map"),
        (INDEX, lambda path: path.write_text('{"weight_map": {"a": "b"}}'), "remove the index"),
        ("config.json", lambda path: path.write_text("[" * 100_000), "is not readable JSON"),
        ("config.json", lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "not readable"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, make, message):
    directory = spoilt(write_tiny(tmp_path / "drafter"), name, make)
    for read in (load_config, load_checkpoint):
        with pytest.raises(DFlashError, match=message):
            read(directory)


@pytest.mark.parametrize("name", ["adapter_model", "ema_model", "optimizer", "consolidated.00"])
def test_what_training_leaves_beside_the_weights_is_ignored(tmp_path, name):
    directory = write_tiny(tmp_path)
    save_file({"lora_A.weight": torch.ones(2)}, directory / f"{name}.safetensors")
    (directory / f"{name}.pt").write_bytes(b"no pickle")
    assert load_checkpoint(directory).config == load_config(directory)


def test_a_byte_order_mark(tmp_path):
    path = write_tiny(tmp_path) / "config.json"
    wanted = load_config(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(tmp_path) == wanted


def test_the_home_in_a_path(tmp_path, monkeypatch):
    write_tiny(tmp_path / "drafter")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/drafter") == load_config(tmp_path / "drafter")
    assert convert("~/drafter", "~/other", "z-lab") == load_config(tmp_path / "other")
    with pytest.raises(DFlashError, match="the home in '~nobody-here/x' cannot be found"):
        load_config("~nobody-here/x")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_names_that_wrappers_put_a_prefix_to(tmp_path, prefix):
    path = write_tiny(tmp_path) / WEIGHTS
    wanted = load_checkpoint(tmp_path).tensors
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    found = load_checkpoint(tmp_path).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("shape", [(32,), (1, 32)])
def test_a_mask_embedding_in_a_file_of_its_own_by_any_name(tmp_path, shape):
    mask = torch.randn(shape)
    save_file({"embedding": mask}, write_tiny(tmp_path) / "mask_embedding.safetensors")
    assert torch.equal(load_checkpoint(tmp_path).tensors["mask_embedding"], mask.flatten())
    assert load_config(tmp_path).own_mask_embedding


def test_a_tensor_without_dimensions_has_the_wrong_shape(tmp_path):
    path = write_tiny(tmp_path) / WEIGHTS
    name = "layers.0.self_attn.q_proj.weight"
    save_file({**load_file(path), name: torch.tensor(1.0)}, path)
    with pytest.raises(DFlashError, match=rf"{name}' has shape \[\]"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("norm.weight", lambda t: t.double(), "'norm.weight' is float64: store it as float32"),
        ("d2t", lambda t: t.float(), "'d2t' is float32: store int64 offsets"),
        ("d2t", lambda t: t * 0 - 50, "d2t maps draft token 0 to -50, outside the vocabulary"),
        ("d2t", lambda t: -torch.arange(len(t)), "d2t maps two draft tokens to one target token"),
    ],
)
def test_the_verdict_on_values_is_the_engines_before_they_load(tmp_path, name, make, message):
    """They ask for the configuration, hours before they read weights where a target is large."""
    path = write_tiny(tmp_path, draft_vocab_size=24, own_head=True) / WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, name: make(tensors[name])}, path)
    for read in (load_config, load_checkpoint):
        with pytest.raises(DFlashError, match=message):
            read(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    source = write_tiny(tmp_path / "drafter")
    with pytest.raises(
        DFlashError, match=r"/proc/drafter cannot be made .*choose another directory"
    ):
        convert(source, "/proc/drafter", "z-lab")
    assert json.loads((source / "config.json").read_text())
