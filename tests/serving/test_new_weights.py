"""New weights of a drafter on an engine's layers: as if it had been started with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.checkpoints.updates import layout_of
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.serving.new_weights import (
    refuse_to_lose,
    restore,
    route,
    take_checkpoint,
    take_weights,
)
from tests.helpers.layouts import write_laguna
from tests.helpers.tiny import DFLASH2, tiny_config, tiny_target, write_tiny
from tests.serving.test_engine_drafter import EngineDrafter, Head

BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "biases, layers unsorted": {**BIASES, "target_layer_ids": (2, 0)},
    "own everything": {
        "own_embedding": True, "own_mask_embedding": True, "own_head": True, "draft_vocab_size": 24,
    },
    "DFlash 2": DFLASH2,
}  # fmt: skip
# Its queries, keys and values are fused, and it norms context and taps.
LAGUNA = "Laguna"
FP8 = Options(draft_weights="fp8")


def by_rows(parameter: torch.Tensor, tensor: torch.Tensor, shard: Any = None) -> None:
    """As an engine's loader: into the rows of a part, wherever the others are."""
    rows = len(parameter)
    start = {"q": 0, "k": rows // 2, "v": 3 * rows // 4, 0: 0, 1: rows // 2}.get(shard, 0)
    parameter.data[start : start + len(tensor)] = tensor


def write(directory: Path, kind: str, seed: int) -> Path:
    if kind == LAGUNA:
        return write_laguna(directory, {"target_layer_ids": (2, 0)}, seed)
    return write_tiny(directory, seed=seed, **KINDS[kind])


def running(checkpoint: Path, options: Options = Options()) -> Any:  # noqa: B008
    """A drafter that is loaded, bound and prepared."""
    config = load_config(checkpoint, drafts=3)
    drafter = EngineDrafter(DrafterSpec(checkpoint=checkpoint, config=config, options=options))
    for parameter in drafter.parameters():
        parameter.weight_loader = by_rows
    drafter.load_whole_checkpoint()
    target = tiny_target()
    drafter.borrow(target, target.model.embed_tokens, Head.of(target.lm_head.weight))
    drafter.prepare_weights()
    return drafter


def state(drafter: Any) -> dict[str, torch.Tensor]:
    """All that drafts: parameters, buffers and what is stacked."""
    found = {**dict(drafter.named_parameters()), **dict(drafter.named_buffers())}
    stacked = drafter.context_weight
    parts = stacked if isinstance(stacked, tuple) else (stacked,)
    found |= {f"stacked {index}": part for index, part in enumerate(parts)}
    if drafter.context_bias is not None:
        found["stacked bias"] = drafter.context_bias
    return found


def check_same(drafter: Any, other: Any, exact: bool = True) -> None:
    found, expected = state(drafter), state(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        one, two = tensor.detach().float(), expected[name].detach().float()
        # A norm alone multiplies rows that were rounded before.
        assert torch.equal(one, two) if exact else torch.allclose(one, two, rtol=0.15), name


def tensors(checkpoint: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(checkpoint / "model.safetensors").items())


@pytest.fixture(params=[Options(draft_weights="checkpoint"), FP8], ids=["plain", "FP8"])
def options(request) -> Options:
    return request.param


@pytest.mark.parametrize("kind", [*KINDS, LAGUNA])
@pytest.mark.parametrize("parts", ["at once", "one by one", "a checkpoint"])
def test_a_running_drafter_becomes_the_new_one(tmp_path, options, kind, parts):
    old, new = (write(tmp_path / str(seed), kind, seed) for seed in (0, 1))
    drafter, expected = running(old, options), running(new, options)
    addresses = {name: tensor.data_ptr() for name, tensor in state(drafter).items()}
    if parts == "a checkpoint":
        take_checkpoint(drafter, new)
    elif parts == "at once":
        assert take_weights(drafter, tensors(new)) == {name for name, _ in tensors(new)}
    else:
        order = torch.randperm(len(tensors(new)), generator=torch.Generator().manual_seed(0))
        for index in order.tolist():
            name, tensor = tensors(new)[index]
            take_weights(drafter, [(f"draft.model.{name}", tensor)])
    rounds_twice = parts == "one by one" and options is FP8 and kind == LAGUNA
    check_same(drafter, expected, exact=not rounds_twice)
    # Captured graphs read the same memory.
    assert addresses == {name: tensor.data_ptr() for name, tensor in state(drafter).items()}


def test_a_drafter_that_names_no_block_takes_them_too(tmp_path):
    old, new, third = (write_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2))
    for directory in (old, new, third):
        raw = json.loads((directory / "config.json").read_text())
        del raw["block_size"]
        (directory / "config.json").write_text(json.dumps(raw))
    drafter = running(old)
    take_checkpoint(drafter, new)
    check_same(drafter, running(new))
    take_weights(drafter, tensors(third))
    check_same(drafter, running(third))


def test_what_does_not_fit_changes_nothing(tmp_path, options):
    old, new = (write_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    drafter, unchanged = running(old, options), running(old, options)
    (name, weight), *others = tensors(new)
    for wrong, message in (
        ([(name, weight[:-1])], f"keeps its weights: tensor '{name}' has shape"),
        ([(name, weight), ("layers.9.mlp.up_proj.weight", weight)], "does not belong"),
        ([(name, torch.full_like(weight, torch.inf))], "not finite"),
        ([(name, weight), (f"draft.{name}", weight)], "stands twice"),
        ([(name, weight.to(torch.float8_e4m3fn))], "is missing"),
        ([(name, weight.int())], "is int32"),
    ):
        with pytest.raises(DFlashError, match=message):
            take_weights(drafter, [*others, *wrong])
    check_same(drafter, unchanged)


def test_another_drafters_checkpoint_is_refused_by_its_difference(tmp_path):
    old = write_tiny(tmp_path / "old")
    other = write_tiny(tmp_path / "other", block_size=8, seed=1)
    drafter, unchanged = running(old), running(old)
    with pytest.raises(DFlashError, match="makes block_size 8, but the running drafter has 4"):
        take_checkpoint(drafter, other)
    with pytest.raises(DFlashError, match="nothing"):
        take_checkpoint(drafter, tmp_path / "nowhere")
    check_same(drafter, unchanged)


@pytest.mark.parametrize("linears", [{}, {"layers.0.mlp.down_proj": torch.nn.Linear(1, 1)}])
def test_linears_that_an_engine_has_taken_apart_keep_their_weights(tmp_path, linears) -> None:
    old, new = (write_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    drafter, unchanged = running(old), running(old)
    drafter.quantised = SimpleNamespace(linears=linears)
    if not linears:
        refuse_to_lose(drafter, "sleep")
        take_checkpoint(drafter, new)
        check_same(drafter, running(new))
        return
    for change in (
        lambda: take_checkpoint(drafter, new),
        lambda: take_weights(drafter, tensors(new)),
        lambda: refuse_to_lose(drafter, "sleep loses weights: do not"),
    ):
        with pytest.raises(DFlashError, match=r"'checkpoint'.* set (it|draft_weights) to 'deq"):
            change()
    check_same(drafter, unchanged)


@pytest.mark.parametrize("came", ["a checkpoint", "tensors"])
def test_lost_weights_are_those_of_the_last_checkpoint_again(tmp_path, options, caplog, came):
    paths = [write_tiny(tmp_path / str(seed), seed=seed, **BIASES) for seed in (0, 1, 2)]
    drafter = running(paths[0], options)
    take_checkpoint(drafter, paths[1])
    if came == "tensors":
        take_weights(drafter, tensors(paths[2])[:3])
    kept = copy.copy(drafter.drafter.head().weight)
    for tensor in state(drafter).values():
        tensor.data.zero_()
    restore(drafter)
    drafter.drafter.head().weight.data.copy_(kept.data)
    expected = running(paths[1], options)
    check_same(drafter, expected)
    assert ("send yours again" in caplog.text) is (came == "tensors")


class Target:
    """A target, and what its own loader was given."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_weights(self, weights: Any) -> set[str]:
        names = {name for name, _ in weights}
        self.loaded += sorted(names)
        return names


@pytest.mark.parametrize("stream", [list, iter])
def test_the_targets_loader_passes_the_drafters_tensors_on(tmp_path, stream):
    old, new = (write_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    drafter, target = running(old), Target()
    route(target, drafter)
    layer = "layers.0.mlp.up_proj.weight"
    target.load_weights(stream([(f"model.{layer}", torch.zeros(3)), ("lm_head.weight", None)]))
    assert target.loaded == ["lm_head.weight", f"model.{layer}"]
    check_same(drafter, running(old))
    assert drafter.target_changed
    ours = [(f"draft.{name}", tensor) for name, tensor in tensors(new)]
    target.load_weights(stream([("model.norm.weight", torch.zeros(3)), *ours]))
    assert target.loaded[2:] == ["model.norm.weight"]
    check_same(drafter, running(new))


def test_wrong_tensors_of_the_drafter_keep_the_target_too(tmp_path):
    drafter, target = running(write_tiny(tmp_path)), Target()
    route(target, drafter)
    with pytest.raises(DFlashError, match=r"'fc\.weight' has shape"):
        target.load_weights([("model.norm.weight", None), ("draft.fc.weight", torch.zeros(2, 2))])
    assert target.loaded == []


def test_the_layout_is_read_once(tmp_path):
    """The directory may be gone, or a trainer's next checkpoint, when tensors come."""
    directory = write_tiny(tmp_path)
    drafter = running(directory)
    given = tensors(directory)
    take_weights(drafter, given[:1])
    (directory / "config.json").unlink()
    take_weights(drafter, given)
    assert layout_of(directory, None, 3).config == tiny_config()
    assert drafter.has_tensors
