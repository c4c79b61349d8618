"""When the start-up check stops an engine, warns or is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from dflash_plugin.checkpoints.reference_drafts import FILE_NAME, ReferenceDraft, ReferenceDrafts
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.serving.reference_check import check_drafter, find_mismatch
from tests.helpers.tiny import DFLASH2, tiny_config

EXPECTED = ReferenceDraft(
    prompt=[1], anchor=2, drafts=[5, 6, 7], margins=[9.0, 9.0, 9.0], hidden=[]
)
WRONG = [5, 0, 7]


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="engine")
    return caplog


def run(directory, drafts, *, options=None, changes=None, record=True, **settings):
    """The check of a drafter with 3 drafts; returns the prompts that were drafted."""
    if record:
        answers = ReferenceDrafts(answers=[EXPECTED] * 2)
        (directory / FILE_NAME).write_text(answers.model_dump_json())
    spec = DrafterSpec(
        checkpoint=directory,
        config=tiny_config(**(changes or {})),
        options=Options(**(options or {})),
    )
    asked = []

    def draft(expected):
        asked.append(expected.prompt)
        return next(drafts) if isinstance(drafts, Iterator) else drafts

    given = {
        "block_size": 4,
        "dtype": "torch.float32",
        "is_quantized": False,
        "how_to_override": "this",
        "logger": logging.getLogger("engine"),
    }
    check_drafter(spec, draft, **{**given, **settings})
    return asked


def test_drafts_that_agree_pass(tmp_path, logged):
    assert run(tmp_path, EXPECTED.drafts) == [[1], [1]]
    assert "the drafter's 2 known answers agree" in logged.text


def test_drafts_that_differ_stop_the_engine_with_the_way_out(tmp_path):
    with pytest.raises(DFlashError, match=r"2 of 6 known drafts differ; .*\. To serve .* set this"):
        run(tmp_path, WRONG)


@pytest.mark.parametrize(
    ("options", "settings"), [({"known_answers": "warn"}, {}), ({}, {"is_quantized": True})]
)
def test_drafts_that_differ_are_a_warning(tmp_path, logged, options, settings):
    run(tmp_path, WRONG, options=options, **settings)
    warned = [one.getMessage() for one in logged.records if one.levelno == logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith("2 of 6 known drafts differ; ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"known_answers": "off"}}, ""),
        ({"record": False}, "has no known answers: the drafter is not checked"),
        ({"skip_reason": "the cache moves"}, "the cache moves: the drafter is not checked"),
        ({"block_size": 3}, "blocks are cut to 3 tokens of 4: the known answers do not apply"),
    ],
)
def test_the_check_is_left_out(tmp_path, logged, given, message):
    assert run(tmp_path, WRONG, **given) == []
    assert logged.text.strip().endswith(message)
    assert all(one.levelno == logging.INFO for one in logged.records)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"draft_weights": "fp8"}, "torch.float32"), ({}, "torch.bfloat16")],
)
def test_rounded_drafts_may_differ_in_a_quarter(tmp_path, options, dtype):
    """In float32 one wrong draft is too many."""
    answers = (WRONG, EXPECTED.drafts)
    run(tmp_path, iter(answers), options=options, dtype=dtype)
    with pytest.raises(DFlashError, match="2 of 6 known drafts differ"):
        run(tmp_path, WRONG, options=options, dtype=dtype)
    with pytest.raises(DFlashError, match="1 of 6 known drafts differ"):
        run(tmp_path, iter(answers))


def test_a_selectors_drafts_behind_a_difference_do_not_count(tmp_path):
    with pytest.raises(DFlashError, match="2 of 2 known drafts differ"):
        run(tmp_path, [0, 0, 0], changes=DFLASH2)
    with pytest.raises(DFlashError, match="6 of 6 known drafts differ"):
        run(tmp_path, [0, 0, 0])


def test_an_engine_that_can_tell_nothing(tmp_path):
    run(tmp_path, None)
    with pytest.raises(DFlashError, match="another target"):
        run(tmp_path, None, if_none_compared="another target")


def test_what_is_wrong_with_a_path():
    expected = ReferenceDraft(
        prompt=[1], anchor=2, drafts=[5, 6, 7, 8], margins=[9.0, 0.1, 9.0, 9.0], hidden=[]
    )
    record = ReferenceDrafts(answers=[expected] * 4)
    for drafts, message in (
        ([5, 0, 0, 0], None),
        ([0, 6, 7, 8], "4 of 4 known drafts differ; known answer 0: draft 1 is token 0 instead"),
        ([5, 6, 7, 0], "4 of 12 known drafts differ; known answer 0: draft 4"),
    ):
        found = find_mismatch(
            record, lambda _, drafts=drafts: drafts, is_float32=False, is_chained=True
        )
        assert found is None if message is None else str(found).startswith(message)
