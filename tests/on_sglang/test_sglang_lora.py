"""LoRA adapters of the target in mixed batches: each request's text is its own model's."""

from __future__ import annotations

import pytest

from tests.helpers.adapters import write_adapter
from tests.helpers.greedy import greedy_text
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import write_tiny

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40]


@pytest.mark.parametrize("widths", [None, [3, 1, 4, 2]], ids=["whole blocks", "cut passes"])
def test_requests_with_and_without_adapters(pair, schedulers, tmp_path, widths):
    target, directory = pair
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    first = write_adapter(tmp_path / "first", target, seed=1)
    second = write_adapter(tmp_path / "second", target, seed=2)
    made = schedulers.run(
        directory,
        checkpoint,
        [PROMPT, PROMPT[:4]],
        copies=4,
        adapters=[None, tmp_path / "first", tmp_path / "second", tmp_path / "first"],
        widths=widths,
        temperature=0.0,
        max_new_tokens=24,
        ignore_eos=True,
    )
    for prompt, texts in zip([PROMPT, PROMPT[:4]], made["texts"], strict=True):
        expected = [greedy_text(model, prompt, 24) for model in (target, first, second, first)]
        assert len({tuple(text) for text in expected}) == 3
        assert texts == expected
