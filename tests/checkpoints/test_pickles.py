"""Pickled tensors: which files belong to a checkpoint, and what in them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.pickles import pickle_files
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import write_tiny


def pickled(directory: Path, name: str, wrapped: str | None = None) -> Path:
    """The checkpoint with its weights in a pickle, in a dictionary of others if so asked."""
    path = write_tiny(directory) / "model.safetensors"
    weights: dict[str, Any] = load_file(path)
    path.unlink()
    torch.save({wrapped: weights, "step": 3} if wrapped else weights, directory / name)
    return directory


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "drafter.pt", "step_100.ckpt"])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "module"])
def test_convert_reads_what_the_refusal_sends_to_it(tmp_path, name, wrapped):
    wanted = load_checkpoint(write_tiny(tmp_path / "plain")).tensors
    directory = pickled(tmp_path / "pickled", name, wrapped)
    (directory / "optimizer.pt").write_bytes(b"no pickle")
    with pytest.raises(DFlashError, match=rf"{name} is a pickle file.*dflash-plugin convert"):
        load_config(directory)
    convert(directory, tmp_path / "converted", "z-lab")
    found = load_checkpoint(tmp_path / "converted").tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "stored", [torch.ones(32), {"embedding": torch.ones(1, 32)}, [torch.ones(32)]]
)
def test_one_tensor_is_the_masks_embedding(tmp_path, stored):
    directory = write_tiny(tmp_path / "drafter")
    torch.save(stored, directory / "mask_embedding.pt")
    assert convert(directory, tmp_path / "converted", "z-lab").own_mask_embedding
    assert torch.equal(
        load_checkpoint(tmp_path / "converted").tensors["mask_embedding"], torch.ones(32)
    )


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": torch.ones(32), "b": torch.ones(32)}, "holds 2 tensors, not the one that stands"),
        ({"id": 3}, "holds 0 tensors, not the one"),
        ("text", "holds 0 tensors, not the one"),
        (torch.ones(32, dtype=torch.int64), "'mask_embedding' is int64: store it as float32"),
        (torch.ones(31), r"'mask_embedding' has shape \[31\]"),
        (Path("/"), "cannot be read as tensors alone"),
    ],
)
def test_another_content_is_refused_and_nothing_is_written(tmp_path, stored, message):
    directory = write_tiny(tmp_path / "drafter")
    torch.save(stored, directory / "mask_embedding.pt")
    with pytest.raises(DFlashError, match=message) as caught:
        convert(directory, tmp_path / "converted", "z-lab")
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "converted").exists()


def test_which_pickles_belong_to_a_checkpoint(tmp_path):
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "other.pt"):
        (tmp_path / name).touch()

    def named(*, has_shards: bool) -> list[str]:
        return [path.name for path in pickle_files(tmp_path, has_shards)]

    assert named(has_shards=False) == ["other.pt"]
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "mask_embedding.pt").touch()
    assert named(has_shards=False) == ["pytorch_model.bin", "mask_embedding.pt"]
    assert named(has_shards=True) == ["mask_embedding.pt"]
