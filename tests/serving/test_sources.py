"""Where a drafter comes from: directories, the Hugging Face hub, ModelScope, caches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import sources
from dflash_plugin.serving.sources import Source, config_of, resolve
from tests.helpers.fake_hub import FakeHub, fake_hub
from tests.helpers.tiny import write_tiny

NAME = "org/drafter"


class Here(NamedTuple):
    """Finds ``NAME`` as a process would with these variables, which the library reads once."""

    patch: pytest.MonkeyPatch
    endpoint: str

    def ask(self, home: Path, *, offline: bool = False, **source: Any) -> dict[str, Any]:
        self.patch.setattr(constants, "HF_HUB_CACHE", str(home))
        self.patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        self.patch.setattr(constants, "ENDPOINT", self.endpoint)
        files = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        asked = Source(**source)
        return {"config": config_of(NAME, asked), "directory": resolve(NAME, asked)}


def blocks(found: dict[str, Any]) -> tuple[int, int]:
    """The block size by the configuration alone, and in the directory, which has the weights."""
    directory = found["directory"]
    assert (directory / "model.safetensors").is_file()
    inside = json.loads((directory / "config.json").read_text())
    return found["config"]["block_size"], inside["block_size"]


@pytest.fixture
def hub(tmp_path):
    """Two revisions, which differ in the block size."""
    main = write_tiny(tmp_path / "main")
    (main / "README.md").write_text("a card")
    revisions = {"main": main, "v2": write_tiny(tmp_path / "v2", block_size=6)}
    with fake_hub(FakeHub(NAME, revisions)) as running:
        yield running


@pytest.fixture
def here(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Here(monkeypatch, hub.url)


def test_a_repository_is_fetched_from_the_endpoint(hub, here, tmp_path):
    found = here.ask(tmp_path / "home")
    assert blocks(found) == (4, 4)
    assert any("model.safetensors" in path for path in hub.asked)
    assert not any("README" in path for path in hub.asked)
    assert found["directory"].is_relative_to(tmp_path / "home")


def test_a_pickled_mask_embedding_is_fetched_and_so_refused(hub, here, tmp_path):
    """Unseen, the drafter would read the mask token's row and seem to load."""
    (hub.revisions["main"] / "mask_embedding.pt").write_bytes(b"a pickle")
    directory = here.ask(tmp_path / "home")["directory"]
    with pytest.raises(DFlashError, match=r"mask_embedding\.pt is a pickle file"):
        load_config(directory)


def test_the_revision_and_the_download_directory(here, tmp_path):
    found = here.ask(tmp_path / "home", revision="v2", download_dir=str(tmp_path / "there"))
    assert blocks(found) == (6, 6)
    assert found["directory"].is_relative_to(tmp_path / "there")
    message = "'org/drafter' is neither a directory nor a repository at revision 'v3'"
    with pytest.raises(DFlashError, match=message):
        here.ask(tmp_path / "home", revision="v3")


def test_the_token_is_the_engines_or_the_environments(hub, here, tmp_path, monkeypatch):
    hub.token = "secret"
    with pytest.raises(DFlashError, match="check the name, the revision and the token"):
        here.ask(tmp_path / "1")
    assert blocks(here.ask(tmp_path / "2", token="secret")) == (4, 4)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert blocks(here.ask(tmp_path / "3")) == (4, 4)
    with pytest.raises(DFlashError, match="the token"):
        here.ask(tmp_path / "4", token=False)


def test_without_a_network_the_caches_serve(hub, here, tmp_path):
    home, there = tmp_path / "home", str(tmp_path / "there")
    with pytest.raises(DFlashError, match="'org/drafter' is neither"):
        here.ask(home, offline=True)
    here.ask(home)
    here.ask(home, revision="v2", download_dir=there)
    asked = len(hub.asked)
    assert blocks(here.ask(home, offline=True)) == (4, 4)
    found = here.ask(home, offline=True, revision="v2", download_dir=there)
    assert blocks(found) == (6, 6)
    assert len(hub.asked) == asked


def test_without_a_network_weights_alone_in_the_download_directory(here, tmp_path):
    """As an engine leaves it: the configuration is in the hub's own cache."""
    home, there = tmp_path / "home", str(tmp_path / "there")
    directory = here.ask(home, download_dir=there)["directory"]
    (directory / "config.json").unlink()
    with pytest.raises(DFlashError, match="'org/drafter' is neither"):
        here.ask(home, offline=True, download_dir=there)
    here.ask(home)
    found = here.ask(home, offline=True, download_dir=there)
    assert blocks(found) == (4, 4)
    assert found["directory"].is_relative_to(home)


@pytest.mark.parametrize("raises", [True, False], ids=["new library", "old library"])
def test_a_copy_that_is_not_whole_is_named(here, tmp_path, monkeypatch, raises):
    """Newer releases of the hub's library say so themselves."""
    home = tmp_path / "home"
    directory = here.ask(home)["directory"]
    (directory / "config.json").unlink()
    if not raises:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: directory)
    with pytest.raises(DFlashError, match=r"'org/drafter' .*config\.json.*HF_HUB_OFFLINE"):
        here.ask(home, offline=True)
    if not raises:
        with pytest.raises(DFlashError, match=r"has no config\.json: check its name"):
            here.ask(home)


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """A stand-in for ModelScope's package; what was asked of it."""
    place, asked = write_tiny(tmp_path / "from-modelscope"), []

    def snapshot_download(model_id: str, **kwargs: Any) -> str:
        asked.append((model_id, kwargs))
        if model_id != NAME:
            raise KeyError(f"no model {model_id}")
        return str(place)

    for name in ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module: Any = sys.modules["modelscope.hub.snapshot_download"]
    module.snapshot_download = snapshot_download

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("the Hugging Face hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return place, asked


@pytest.mark.parametrize("offline", [False, True])
def test_modelscope_is_asked_alone(modelscope, monkeypatch, offline):
    place, asked = modelscope
    monkeypatch.setattr(sources, "is_offline", lambda: offline)
    source = Source(revision="v1", download_dir="/there", token="secret", modelscope=True)
    assert resolve(NAME, source) == place
    [(name, kwargs)] = asked
    assert name == NAME
    assert (kwargs["revision"], kwargs["cache_dir"]) == ("v1", "/there")
    assert kwargs["local_files_only"] is offline
    assert "token" not in kwargs, "it is the other hub's"
    config = config_of(NAME, source)
    assert config is not None
    assert config["block_size"] == 4
    assert asked[1][1]["allow_patterns"] == ["config.json"]


def test_what_modelscope_lacks_is_named(modelscope, monkeypatch):
    with pytest.raises(DFlashError, match=r"'org/other' is neither .*ModelScope \('no model org"):
        resolve("org/other", Source(modelscope=True))
    assert config_of("org/other", Source(modelscope=True)) is None
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(DFlashError, match="pip install modelscope"):
        resolve(NAME, Source(modelscope=True))


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    drafter = write_tiny(tmp_path / "drafter")
    assert resolve("~/drafter", Source()) == drafter
    assert config_of("~/drafter", Source()) is not None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("s3://bucket/drafter", r"'s3://bucket/drafter' is an address.*copy it to a directory"),
        ("org/repo/drafter", r"'org/repo/drafter' is neither a directory nor a repository"),
        ("~nobody-of-that-name/d", r"'~nobody-of-that-name/d' is neither a directory nor"),
        ("/nowhere/d", r"'/nowhere/d' is neither a directory nor"),
    ],
)
def test_what_is_no_repository_is_named(model, message):
    with pytest.raises(DFlashError, match=message):
        resolve(model, Source())


@pytest.mark.parametrize(
    "model",
    ["ngram", "[ngram]", "package.Proposer", "s3://b/d", "/no/where", "./no", "~/no", "a/b/c"],
)
def test_no_hub_is_asked_for_the_configuration_of_what_is_no_repository(model, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert config_of(model, Source()) is None


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_a_readable_configuration_has_none(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert config_of(str(tmp_path), Source()) is None


def test_a_name_too_long_for_a_file_is_no_directory():
    assert sources.config_at_hand("x" * 300, None) is None
    with pytest.raises(DFlashError, match="is neither a directory nor a repository"):
        resolve("x" * 300, Source())
