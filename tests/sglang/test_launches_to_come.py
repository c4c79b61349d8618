"""What is compiled while SGLang starts is what its captured passes launch."""

from __future__ import annotations

import json

from dflash_plugin.sglang.launches_to_come import MOST_REQUESTS, batches
from tests.helpers import without_interpreter


def test_no_captured_pass_launches_a_variant_that_was_not_launched_ahead() -> None:
    done = without_interpreter.run("sglang_launches")
    for record in json.loads(done.stdout).values():
        assert record["missing"] == []
        # Few are compiled for nothing.
        assert 30 < record["captured"] <= record["ahead"] < record["captured"] + 10
        assert record["blocks_are_back"]


def test_batches_are_powers_of_two_and_the_largest() -> None:
    assert batches(1) == [1]
    assert batches(48) == [48, 32, 16, 8, 4, 2, 1]
    assert batches(4096)[0] == MOST_REQUESTS
