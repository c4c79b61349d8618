"""New tensors in a checkpoint's layout are read as its own were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.updates import holds_drafter, layout_of, read_update
from dflash_plugin.checkpoints.vocabulary import fitted
from dflash_plugin.errors import DFlashError
from tests.helpers.layouts import write_laguna, write_muse
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import PADDED, write_target, write_tiny

REDUCED = {"own_embedding": True, "own_head": True, "draft_vocab_size": 24}


def write(directory: Path, kind: str) -> Path:
    """A checkpoint of a kind."""
    if kind in LAYOUTS:
        plain = write_tiny(directory / "plain", intermediate_size=48)
        return quantise(plain, directory / "quantised", LAYOUTS[kind])
    if kind == "Muse":
        return write_muse(directory)
    if kind == "Laguna":
        return write_laguna(directory)
    if kind == "padded":
        return write_tiny(directory, **PADDED)
    return write_tiny(directory, kind, **REDUCED)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("kind", ["z-lab", "speculators", "Muse", "Laguna", "padded", *LAYOUTS])
def test_a_whole_checkpoint_reads_as_at_start(tmp_path, kind):
    directory = write(tmp_path, kind)
    expected = fitted(load_checkpoint(directory, torch.float32), 97)
    layout = layout_of(directory, None, 3)
    found = read_update(tensors(directory).items(), layout, expected.config, torch.float32)
    assert found.keys() == expected.tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected.tensors[name]), name
        assert tensor.dtype == expected.tensors[name].dtype


def test_tensors_come_one_by_one(tmp_path):
    directory = write(tmp_path, "padded")
    expected = fitted(load_checkpoint(directory, torch.float32), 97)
    layout, found = layout_of(directory, None, 3), {}
    for pair in tensors(directory).items():
        found |= read_update([pair], layout, expected.config, torch.float32)
    assert found.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors.items())


def test_half_of_a_quantised_weight_is_refused(tmp_path):
    directory = write(tmp_path, next(iter(LAYOUTS)))
    layout = layout_of(directory, None, 3)
    given = [pair for pair in tensors(directory).items() if "scale" not in pair[0]]
    with pytest.raises(DFlashError, match="is missing"):
        read_update(given, layout, layout.config, torch.float32)


def test_a_bad_vocabulary_map_is_refused(tmp_path):
    directory = write(tmp_path, "z-lab")
    layout = layout_of(directory, None, 3)
    offsets = torch.zeros_like(tensors(directory)["d2t"])
    offsets[0] = 1
    with pytest.raises(DFlashError, match="two draft tokens"):
        read_update([("d2t", offsets)], layout, layout.config, torch.float32)


def test_a_drafters_directory_is_told_from_a_targets(tmp_path):
    assert holds_drafter(write_tiny(tmp_path / "drafter"))
    assert holds_drafter(write_tiny(tmp_path / "speculators", "speculators"))
    assert not holds_drafter(write_target(tmp_path / "target"))
    assert not holds_drafter(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert not holds_drafter(broken)
