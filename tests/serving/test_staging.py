"""From the name of a drafter to the directory that an engine loads."""

from __future__ import annotations

import enum
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY, staging
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options, expected_acceptance
from dflash_plugin.serving.sources import Source
from tests.helpers.tiny import tiny_config, write_tiny

TARGET = staging.TargetShape(hidden_size=32, num_layers=4, vocab_size=97)


class LoadFormat(enum.Enum):
    AUTO = "auto"
    DUMMY = "dummy"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", str(tmp_path / "cache"))


def prepared(model, *, options=None, target=TARGET, check=lambda config: None, load_format="auto"):
    return staging.prepare(
        DrafterSpec,
        str(model),
        source=Source(),
        options=options or Options(),
        target=target,
        check=check,
        load_format=load_format,
    )


def test_a_drafter_is_found_and_described(tmp_path):
    drafter = write_tiny(tmp_path / "drafter", target_layer_ids=(2, 0))
    spec = prepared(drafter, options=Options(expected_acceptance_length=4.0))
    assert spec.checkpoint == drafter.resolve()
    assert spec.config.target_layer_ids == (2, 0)
    assert spec.expected_acceptance_length == 4.0


def test_a_drafter_must_fit_the_target_and_the_engine(tmp_path):
    drafter = write_tiny(tmp_path / "drafter")

    def refuse(config):
        raise DFlashError(f"no blocks of {config.block_size}")

    with pytest.raises(DFlashError, match="no blocks of 4"):
        prepared(drafter, check=refuse)
    with pytest.raises(DFlashError, match="hidden_size is 64"):
        prepared(drafter, target=TARGET._replace(hidden_size=64))


def test_expectation_comes_from_the_option_or_the_training_record(tmp_path):
    assert expected_acceptance(tmp_path, Options()) is None
    (tmp_path / "training.json").write_text('{"held_out": {"held_out_tau": 3.5}}')
    assert expected_acceptance(tmp_path, Options()) == 3.5
    assert expected_acceptance(tmp_path, Options(expected_acceptance_length=5)) == 5


@pytest.mark.parametrize("load_format", ["dummy", LoadFormat.DUMMY, "LoadFormat.DUMMY"])
def test_dummy_weights_are_not_judged(tmp_path, load_format):
    options = prepared(write_tiny(tmp_path / "drafter"), load_format=load_format).options
    assert (options.known_answers, options.acceptance_warning) == ("off", 0)


@pytest.mark.parametrize("load_format", ["auto", LoadFormat.AUTO])
def test_other_weights_are_judged(tmp_path, load_format):
    assert prepared(write_tiny(tmp_path / "drafter"), load_format=load_format).options == Options()


def test_a_layer_that_an_engine_does_not_give_is_refused():
    config = tiny_config(target_layer_ids=(0, 3))
    staging.refuse_layer(config, 2, "the engine gives none")
    with pytest.raises(DFlashError, match=r"layers \[0, 3\], and the engine gives none: use hands"):
        staging.refuse_layer(config, 3, "the engine gives none", use="hands")


def staged_config(tmp_path, **changes):
    spec = prepared(write_tiny(tmp_path / "drafter", **changes))
    return spec, staging.engine_config(
        spec,
        architecture="Ours",
        vocab_size=97,
        max_positions=100,
        mask_token_id=5,
        of_this_engine=7,
    )


def test_what_an_engine_reads_and_the_spec(tmp_path):
    layers = ({"sliding_window": 64, "causal": True}, {"causal": True})
    spec, config = staged_config(tmp_path, layers=layers, target_layer_ids=(2, 0))
    assert config["architectures"] == ["Ours"]
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["sliding_window"], config["use_sliding_window"]) == (64, True)
    assert config["is_causal"] is True
    assert config["dflash_config"] == {"mask_token_id": 5, "target_layer_ids": [0, 2]}
    assert config["max_position_embeddings"] == spec.config.rope.max_position_embeddings
    assert config["of_this_engine"] == 7
    assert DrafterSpec.model_validate(config[KEY]) == spec


def test_a_staged_directory_is_known_and_named_by_its_content(tmp_path):
    spec, config = staged_config(tmp_path)
    weights = list(spec.checkpoint.glob("*.safetensors"))
    directory = staging.stage("engine", config, weights)
    assert json.loads((directory / "config.json").read_text()) == json.loads(json.dumps(config))
    assert [(directory / file.name).resolve() for file in weights] == weights
    assert staging.stage("engine", config, weights) == directory
    assert staging.stage("engine", {**config, "of_this_engine": 8}) != directory
    assert staging.is_staged("engine", directory)
    assert not staging.is_staged("other", directory)
    assert not staging.is_staged("engine", spec.checkpoint)
    assert not staging.is_staged("engine", None)


def test_servers_that_start_at_once_stage_the_same_directory(tmp_path):
    spec, config = staged_config(tmp_path)
    weights = list(spec.checkpoint.glob("*.safetensors"))
    barrier = Barrier(8)

    def start(number: int) -> Path:
        barrier.wait()
        directory = staging.stage("engine", {**config, "number": number}, weights)
        assert [(directory / file.name).resolve() for file in weights] == weights
        return directory

    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            [directory] = set(pool.map(start, [number] * 8))
        assert not list(directory.glob(".*")), "no scratch file is left"


def test_a_staged_directory_follows_weights_that_moved(tmp_path):
    _, config = staged_config(tmp_path)
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_text(place)
        directory = staging.stage("engine", config, [tmp_path / place / "model.safetensors"])
        assert (directory / "model.safetensors").read_text() == place


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """It serves what is in it; else the message names the variable."""
    _, config = staged_config(tmp_path)
    directory = staging.stage("engine", config)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(staging.Path, "mkdir", refuse)
    assert staging.stage("engine", config) == directory
    with pytest.raises(DFlashError, match=r"cannot be written.*set DFLASH_PLUGIN_CACHE"):
        staging.stage("engine", {**config, "of_this_engine": 9})


def test_an_unwritable_home_is_stood_in_for(tmp_path, monkeypatch):
    """Temporary files of this user alone; the engine's processes know the directory again."""
    _, config = staged_config(tmp_path)
    monkeypatch.delenv("DFLASH_PLUGIN_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(staging.tempfile, "gettempdir", lambda: str(place))
    directory = staging.stage("engine", config)
    own = directory.parents[1]
    assert own.parent == place
    assert own.stat().st_mode & 0o077 == 0
    assert staging.stage("engine", config) == directory
    assert staging.is_staged("engine", directory)
    # With a home again the old directory is still known.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert staging.is_staged("engine", directory)
    assert staging.stage("engine", {**config, "new": 1}).is_relative_to(tmp_path / ".cache")


@pytest.mark.parametrize("kind", ["writable by others", "link", "file"])
def test_a_stand_in_that_is_not_this_users_alone_is_not_used(tmp_path, monkeypatch, kind):
    _, config = staged_config(tmp_path)
    monkeypatch.delenv("DFLASH_PLUGIN_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(staging.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"dflash-plugin-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        own.symlink_to(elsewhere)
    elif kind == "file":
        own.touch()
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(DFlashError, match=r"cannot be written.*set DFLASH_PLUGIN_CACHE"):
        staging.stage("engine", config)
    assert not list(elsewhere.iterdir())
    assert not staging.is_staged("engine", own / "engine" / "0")


def test_a_user_without_home_and_temporary_files_is_told_of_the_variable(monkeypatch):
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.delenv("DFLASH_PLUGIN_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(staging.tempfile, "gettempdir", none)
    with pytest.raises(DFlashError, match=r"cannot be found.*set DFLASH_PLUGIN_CACHE to a folder"):
        staging.stage("engine", {})


def test_the_cache_may_be_relative_or_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("~/cache", "cache", "./cache"):
        monkeypatch.setenv("DFLASH_PLUGIN_CACHE", given)
        assert staging.stage("engine", {}).is_relative_to(tmp_path / "cache" / "engine"), given
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", "")
    assert staging.stage("engine", {}).is_relative_to(tmp_path / ".cache"), "empty is unset"


def test_a_staged_directory_links_the_checkpoints_files_alone(tmp_path):
    """Shards that became one file, or the other way round, leave no link behind."""
    _, config = staged_config(tmp_path)
    shards = [tmp_path / f"model-{n}.safetensors" for n in range(2)]
    whole = tmp_path / "model.safetensors"
    for files in (shards, [whole], shards):
        directory = staging.stage("engine", config, files)
        links = {path.name for path in directory.iterdir()} - {"config.json"}
        assert links == {file.name for file in files}


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"dflash_plugin": 1}'])
def test_a_damaged_staged_configuration_is_written_again(tmp_path, content):
    _, config = staged_config(tmp_path)
    directory = staging.stage("engine", config)
    (directory / "config.json").write_text(content)
    assert staging.is_staged("engine", directory) is (content[-2:] == "1}")
    assert staging.stage("engine", config) == directory
    assert json.loads((directory / "config.json").read_text())["of_this_engine"] == 7


def test_a_target_of_another_depth_is_told_as_inspect_does(tmp_path, caplog):
    other = TARGET._replace(num_layers=TARGET.num_layers + 2)
    directory = write_tiny(tmp_path / "drafter")
    made_for = prepared(directory, target=other).config.num_target_layers
    said = f"made for a target of {made_for} layers, this one has {other.num_layers}"
    assert f"num_target_layers: {said}" in caplog.text
