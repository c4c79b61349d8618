"""Fair tables: the columns, the choice of the best setting, and the attention back end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.tables.fair import fair, gain, plot, rows_by_level

RECORD = "vllm-h200-qwen3-8b-default"
SPEEDS = {
    1: {"none": 200, "native": 900, "native-k7": 700, "plugin": 950, "plugin-fp8-adaptive": 940},
    64: {"none": 9000, "native": 10000, "native-k7": 14000, "plugin": 11000, "plugin-fp8": 13000,
         "plugin-fp8-adaptive": 17500},
}  # fmt: skip


def write(directory: Path, **changes: object) -> None:
    rows = [
        {"engine": mode, "concurrency": level, "tokens_per_second": speed, "tau": 6.4,
         "all": [speed - 1, speed, speed + 1]}
        for level, speeds in SPEEDS.items()
        for mode, speed in speeds.items()
    ]  # fmt: skip
    record = {
        "command": "python benchmarks/vllm_serving.py --replay 6.4",
        "device": "a GPU",
        "versions": {"vllm": "0.33.0"},
        "date": "2026-01-01",
        "dtype": "bfloat16",
        "acceptance_replayed": 6.4,
        "num_speculative_tokens": 15,
        "engine_arguments": {"attention_backend": "fa3"},
        "rows": rows,
    }
    (directory / f"{RECORD}.json").write_text(json.dumps({**record, **changes}))


def test_what_is_not_measured_is_said(results):
    assert fair(RECORD).startswith("Not measured yet")
    assert "how-it-works.svg" in plot()


def test_a_column_that_nothing_is_in_is_left_out(results):
    rows = [
        {"engine": mode, "concurrency": 1, "tokens_per_second": 100, "tau": 6.4, "all": [99, 101]}
        for mode in ("native", "plugin")
    ]
    write(results, rows=rows)
    header, _, row = fair(RECORD).splitlines()[2:5]
    assert "no drafter" not in header
    assert "options" not in header
    assert header.count("|") == row.count("|") == 7 - 1


def test_both_sides_are_shown_at_their_best_setting(results):
    write(results)
    few, many = fair(RECORD).splitlines()[4:6]
    assert few == (
        "| 1 | 200 (199-201) | 900 (899-901) | 900 (899-901), as it comes | 950 (949-951) "
        "| 940 (939-941), FP8 drafter, adaptive | **1.06×** |"
    )
    assert many == (
        "| 64 | 9,000 (8,999-9,001) | 10,000 (9,999-10,001) | 14,000 (13,999-14,001), 7 drafts "
        "| 11,000 (10,999-11,001) | 17,500 (17,499-17,501), FP8 drafter, adaptive | **1.25×** |"
    )


def test_the_title_says_what_is_made_up_and_names_the_back_end(results):
    write(results)
    title = fair(RECORD).splitlines()[0]
    assert "dummy weights, acceptance replayed at 6.4" in title
    assert "attention back end: fa3" in title


def test_back_ends_that_differ_are_named_by_mode(results):
    backends = {mode: "fa3" if "native" in mode or mode == "none" else "triton" for mode in
                SPEEDS[64]}  # fmt: skip
    write(results, attention=backends)
    title = fair(RECORD).splitlines()[0]
    assert "fa3 (no drafter; native; native, 7 drafts)" in title
    assert "triton (plugin; plugin, FP8 drafter, adaptive; plugin, FP8 drafter)" in title


def test_a_table_without_its_back_end_is_refused(results):
    write(results, engine_arguments={})
    with pytest.raises(ValueError, match="attention back end of none is unknown"):
        fair(RECORD)


def test_the_back_end_is_read_from_vllms_settings(results):
    settings = json.dumps({"attention_config": {"backend": "FLASH_ATTN"}})
    write(results, engine_arguments={}, command=f"python x.py --settings '{settings}'")
    assert "attention back end: FLASH_ATTN" in fair(RECORD).splitlines()[0]


def test_of_a_mode_in_two_groups_the_first_counts():
    rows = [
        {"engine": "native", "concurrency": 1, "all": speeds, "tokens_per_second": speeds[1]}
        for speeds in ([10, 11, 12], [13, 14, 15])
    ]
    assert rows_by_level([{"rows": rows}]) == {1: {"native": rows[0]}}


def test_a_gain_is_bold_only_where_no_ranges_overlap():
    slow = {"tokens_per_second": 10, "all": [9, 10, 12]}
    fast = {"tokens_per_second": 15, "all": [13, 15, 16]}
    near = {"tokens_per_second": 11, "all": [10, 11, 14]}
    assert gain(fast, slow) == "**1.50×**"
    assert gain(slow, fast) == "**0.67×**"
    assert gain(near, slow) == "1.10×, ranges overlap"
