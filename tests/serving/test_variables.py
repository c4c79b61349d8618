"""Environment variables: the switch, options, and those that are meant for somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_plugin.checkpoints.hub import cache_directory
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import variables


@pytest.mark.parametrize(
    ("value", "off"),
    [
        ("off", True),
        ("OFF ", True),
        ("no", True),
        ("0", True),
        ("on", False),
        ("", False),
        (None, False),
    ],
)
def test_the_switch(monkeypatch, value, off):
    if value is None:
        monkeypatch.delenv("DFLASH_PLUGIN", raising=False)
    else:
        monkeypatch.setenv("DFLASH_PLUGIN", value)
    assert variables.is_off() is off
    variables.require_switch()


def test_a_switch_that_is_neither_on_nor_off_is_named(monkeypatch):
    monkeypatch.setenv("DFLASH_PLUGIN", "offf")
    assert not variables.is_off()
    with pytest.raises(DFlashError, match="DFLASH_PLUGIN is 'offf': give on or off"):
        variables.require_switch()


def test_options_are_told_from_other_variables(monkeypatch):
    given = {
        "DFLASH_PLUGIN": "on",
        "DFLASH_PLUGIN_CACHE": "/cache",
        "DFLASH_PLUGIN_CONFIG": "/file",
        "DFLASH_PLUGIN_KNOWN_ANSWERS": "off",
        "DFLASH_PLUGIN_DIALECT": "",
        "DFLASH_PLUGIN_SERVICE_HOST": "10.0.0.1",
        "DFLASH_PLUGIN_PORT": "tcp://10.0.0.1:80",
        "DFLASH_PLUGIN_PORT_80_TCP_ADDR": "10.0.0.1",
        "DFLASH_PLUGIN_CACHE_SERVICE_PORT_HTTP": "80",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert variables.given_options() == {"known_answers": "off"}


@pytest.mark.parametrize(
    ("option", "similar"),
    [
        ("known_answer", "DFLASH_PLUGIN_KNOWN_ANSWERS"),
        ("draftweights", "DFLASH_PLUGIN_DRAFT_WEIGHTS"),
        ("cache_dir", "DFLASH_PLUGIN_CACHE"),
        ("conf", "DFLASH_PLUGIN_CONFIG"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest(option, similar):
    message = (
        rf"{option} is '1'.*no variable DFLASH_PLUGIN_{option.upper()}, did you mean {similar}\?"
    )
    with pytest.raises(DFlashError, match=message):
        variables.require_options({option: "1"}, ["known_answers", "draft_weights"])


def test_a_variable_like_none_is_told_without_a_guess():
    with pytest.raises(DFlashError, match="no variable DFLASH_PLUGIN_XYZ; the options are a, b"):
        variables.require_options({"a": "1", "xyz": "1"}, ["a", "b"])


def test_dashes_and_capitals_do_not_hide_a_name():
    assert variables.nearest("Draft-Weights", ["known_answers", "draft_weights"]) == "draft_weights"
    assert variables.nearest("other", ["known_answers", "draft_weights"]) is None


def test_a_blank_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("DFLASH_PLUGIN_DIALECT", "  ")
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", " ")
    assert "dialect" not in variables.given_options()
    assert cache_directory() == Path.home() / ".cache" / "dflash-plugin"
