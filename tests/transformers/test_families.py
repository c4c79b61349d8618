"""Families of targets: their own text alone, beside others and with drafts, or a refusal."""

import json
import re
from pathlib import Path

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine
from tests.helpers.families import FAMILIES, LATENT, Family, outcome, target_of
from tests.helpers.tiny import tiny_drafter, tiny_target

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "targets.json"


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict]:
    """The recorded table, by family."""
    return {row["family"]: row for row in json.loads(RECORD.read_text())["families"]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_writes_its_own_text_or_is_refused(family: Family, recorded):
    found = outcome(family)
    if family.refusal is not None:
        assert found["text"] == "refused"
        assert re.search(family.refusal, found["message"])
        assert family.kind in found["message"]
    else:
        assert found["text"] == ("equal" if family.drafts else "equal, no drafts")
    assert recorded[family.name]["transformers"]["text"] == found["text"]
    assert recorded[family.name]["model_type"] == family.kind


def test_the_record_has_every_family_and_no_other(recorded):
    assert list(recorded) == [family.name for family in FAMILIES]


def test_a_target_of_several_streams_is_told_with_a_drafter():
    (family,) = (one for one in FAMILIES if one.name == "Gemma 3n")
    with pytest.raises(DFlashError, match=r"outputs of shape \[2, 1, 2, 32\].*without a drafter"):
        Engine(target_of(family), tiny_drafter())


def test_a_layer_whose_output_the_target_does_not_give_is_named():
    """LongCat counts each of its layers twice."""
    changes = {**LATENT, "num_layers": 2, "expert_ffn_hidden_size": 24, "zero_expert_num": 0}
    target = tiny_target("longcat_flash", **changes)
    with pytest.raises(DFlashError, match=r"reads layer 2 .* outputs of 2 layers"):
        Engine(target, tiny_drafter())
