"""τ of sampled requests: engines beside each other."""

from __future__ import annotations

import json

from tools.tables.sampling import sampled_tau


def test_engines_are_compared_where_both_have_a_cell(results):
    def write_taus(engine: str, *taus: float) -> None:
        rows = [
            {"drafter": "smollm2-135m-dflash", "draft_sampling": "greedy", "temperature": 0.1 * t,
             "limits": "none", "tau": tau, "error": 0.2}
            for t, tau in enumerate(taus, 1)
        ]  # fmt: skip
        record = {
            "command": "python x", "device": "CPU", "versions": {engine: "1"}, "rows": rows,
            "date": "2026-01-01", "prompts": 8, "max_new_tokens": 64,
        }  # fmt: skip
        (results / f"sampled-tau-{engine}-cpu.json").write_text(json.dumps(record))

    write_taus("transformers", 2.0, 2.5)
    write_taus("vllm", 2.1, 2.5, 3.0)
    text = sampled_tau()
    # Errors of 10 % and 8 % in each engine.
    assert (
        "- vLLM, argmax: +2.5 % on average over 2 cells (independent draws would differ by 9.1 %), "
        "at most +5.0 % in a cell (13 %)." in text
    )
    assert "| DFlash | 0.1 | none | 2.00 | 2.10 |  |  |" in text
