"""Loading a target: what is missing is named, and no hub is asked for a path."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from dflash_plugin.checkpoints.hub import looks_like_path, resolve_model
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request, load_target, loading
from tests.helpers.tiny import write_target
from tests.transformers.test_engine import TARGETS, greedy


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny target with its tokenizer."""
    return write_target(tmp_path_factory.mktemp("target"), "qwen3")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "target"))


def test_a_whole_target_loads(whole):
    model, tokenizer = load_target(whole, device="cpu")
    assert model.dtype == torch.float32
    assert len(tokenizer) > 50


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_a_target_that_takes_no_attention_but_its_own_is_served(kind, tmp_path):
    model, _ = load_target(write_target(tmp_path, kind, **TARGETS[kind]), device="cpu")
    expected = greedy(model, [5, 6, 7, 8], 8)
    found = Engine(model, None, max_length=32).generate([Request([5, 6, 7, 8], 8, stop_ids=())])
    assert found[0].tokens == expected


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove(name: str):
    return lambda directory: (directory / name).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut, r"model.safetensors is truncated: \d+ bytes where the header says \d+; fetch"),
        (remove("config.json"), "config.json is missing"),
        (remove("model.safetensors"), "does not load as a causal language model"),
        (remove("tokenizer.json"), "tokenizer"),
    ],
    ids=["truncated", "no-config", "no-weights", "no-tokenizer"],
)
def test_what_a_target_lacks_is_named_with_its_path(copy, damage, named):
    damage(copy)
    if named == "tokenizer":
        (copy / "tokenizer_config.json").unlink(missing_ok=True)
        named = "there is no tokenizer|the tokenizer does not load"
    with pytest.raises(DFlashError, match=named) as caught:
        load_target(copy, device="cpu")
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere/at/all", "a/b/c", "tests/x"])
def test_a_missing_path_is_no_question_for_a_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "hub_answers", lambda: pytest.fail("a hub was asked"))
    monkeypatch.chdir(Path(__file__).parents[2])
    assert looks_like_path(name)
    for load in (load_target, resolve_model):
        with pytest.raises(DFlashError, match=f"the model '{name}' is not there"):
            load(name)


def test_a_name_fails_fast_where_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(loading.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not looks_like_path("nobody/has-this-model")
    start = time.monotonic()
    with pytest.raises(DFlashError, match=r"'nobody/has-this-model' .*hub cannot be reached"):
        load_target("nobody/has-this-model")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("device", ["banana", "cuda"])
def test_an_unusable_device_is_named(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DFlashError, match=f"device is '{device}'"):
        load_target("smollm2", device=device)
