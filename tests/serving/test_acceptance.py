"""When low acceptance is warned of, and with which cause."""

from pathlib import Path

import pytest

from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from tests.helpers.tiny import tiny_config


def watch(expected, **options):
    spec = DrafterSpec(
        checkpoint=Path("x"),
        config=tiny_config(),
        options=Options(acceptance_window=10, **options),
        expected_acceptance_length=expected,
    )
    return AcceptanceWatch(spec)


@pytest.mark.parametrize(
    ("accepted", "reason"),
    [
        ([0, 0, 0], "another target"),
        ([9, 1, 0], "rotation, window"),
        ([4, 2, 1], "unlike the training text"),
    ],
)
def test_low_acceptance_is_warned_of_with_its_likely_cause(accepted, reason):
    found = watch(3.4).observe(10, accepted)
    assert found is not None
    assert f"{1 + sum(accepted) / 10:.2f}" in found
    assert reason in found


def test_acceptance_is_judged_over_whole_windows():
    judged = watch(3.4)
    assert judged.observe(9, [0, 0, 0]) is None
    assert judged.acceptance_length is None
    assert judged.observe(1, [1, 1, 1]) is not None
    assert judged.acceptance_length == pytest.approx(1.3)
    assert judged.observe(10, [8, 6, 4]) is None
    assert judged.acceptance_length == pytest.approx(2.8)


@pytest.mark.parametrize(("expected", "options"), [(None, {}), (3.4, {"acceptance_warning": 0.0})])
def test_without_an_expectation_nothing_is_warned_of(expected, options):
    assert watch(expected, **options).observe(10, [0, 0, 0]) is None
