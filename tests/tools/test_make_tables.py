"""Fair tables: the columns, the choice of the best setting, and the attention back end."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = "vllm-h200-qwen3-8b-default"
SPEEDS = {
    1: {"none": 200, "native": 900, "native-k7": 700, "plugin": 950, "plugin-fp8-adaptive": 940},
    64: {"none": 9000, "native": 10000, "native-k7": 14000, "plugin": 11000, "plugin-fp8": 13000,
         "plugin-fp8-adaptive": 17500},
}  # fmt: skip


@pytest.fixture
def tables(tmp_path: Path) -> dict:
    """The tool's names, which read results from an empty directory."""
    found = runpy.run_path(str(ROOT / "tools" / "make_tables.py"))
    found["load"].__globals__["RESULTS"] = tmp_path
    return found["load"].__globals__


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


def test_what_is_not_measured_is_said(tables):
    assert tables["fair"](RECORD).startswith("Not measured yet")
    assert "how-it-works.svg" in tables["plot"]()


def test_a_column_that_nothing_is_in_is_left_out(tables, tmp_path):
    rows = [
        {"engine": mode, "concurrency": 1, "tokens_per_second": 100, "tau": 6.4, "all": [99, 101]}
        for mode in ("native", "plugin")
    ]
    write(tmp_path, rows=rows)
    header, _, row = tables["fair"](RECORD).splitlines()[2:5]
    assert "no drafter" not in header
    assert "options" not in header
    assert header.count("|") == row.count("|") == 7 - 1


def test_both_sides_are_shown_at_their_best_setting(tables, tmp_path):
    write(tmp_path)
    few, many = tables["fair"](RECORD).splitlines()[4:6]
    assert few == (
        "| 1 | 200 (199-201) | 900 (899-901) | 900 (899-901), as it comes | 950 (949-951) "
        "| 940 (939-941), FP8 drafter, adaptive | **1.06×** |"
    )
    assert many == (
        "| 64 | 9,000 (8,999-9,001) | 10,000 (9,999-10,001) | 14,000 (13,999-14,001), 7 drafts "
        "| 11,000 (10,999-11,001) | 17,500 (17,499-17,501), FP8 drafter, adaptive | **1.25×** |"
    )


def test_the_title_says_what_is_made_up_and_names_the_back_end(tables, tmp_path):
    write(tmp_path)
    title = tables["fair"](RECORD).splitlines()[0]
    assert "dummy weights, acceptance replayed at 6.4" in title
    assert "attention back end: fa3" in title


def test_back_ends_that_differ_are_named_by_mode(tables, tmp_path):
    backends = {mode: "fa3" if "native" in mode or mode == "none" else "triton" for mode in
                SPEEDS[64]}  # fmt: skip
    write(tmp_path, attention=backends)
    title = tables["fair"](RECORD).splitlines()[0]
    assert "fa3 (no drafter; native; native, 7 drafts)" in title
    assert "triton (plugin; plugin, FP8 drafter, adaptive; plugin, FP8 drafter)" in title


def test_a_table_without_its_back_end_is_refused(tables, tmp_path):
    write(tmp_path, engine_arguments={})
    with pytest.raises(ValueError, match="attention back end of none is unknown"):
        tables["fair"](RECORD)


def test_the_back_end_is_read_from_vllms_settings(tables, tmp_path):
    settings = json.dumps({"attention_config": {"backend": "FLASH_ATTN"}})
    write(tmp_path, engine_arguments={}, command=f"python x.py --settings '{settings}'")
    assert "attention back end: FLASH_ATTN" in tables["fair"](RECORD).splitlines()[0]


def test_of_a_mode_in_two_groups_the_first_counts(tables):
    rows = [
        {"engine": "native", "concurrency": 1, "all": speeds, "tokens_per_second": speeds[1]}
        for speeds in ([10, 11, 12], [13, 14, 15])
    ]
    assert tables["rows_by_level"]([{"rows": rows}]) == {1: {"native": rows[0]}}


def test_a_gain_is_bold_only_where_no_ranges_overlap(tables):
    slow = {"tokens_per_second": 10, "all": [9, 10, 12]}
    fast = {"tokens_per_second": 15, "all": [13, 15, 16]}
    near = {"tokens_per_second": 11, "all": [10, 11, 14]}
    assert tables["gain"](fast, slow) == "**1.50×**"
    assert tables["gain"](slow, fast) == "**0.67×**"
    assert tables["gain"](near, slow) == "1.10×, ranges overlap"


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("none", "no drafter"),
        ("native-k7", "native, 7 drafts"),
        ("plugin-fp8-adaptive-triton", "plugin, FP8 drafter, adaptive, Triton attention"),
    ],
)
def test_modes_are_named(tables, mode, name):
    assert tables["name_of"](mode) == name


def test_engines_are_compared_where_both_have_a_cell(tables, tmp_path):
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
        (tmp_path / f"sampled-tau-{engine}-cpu.json").write_text(json.dumps(record))

    write_taus("transformers", 2.0, 2.5)
    write_taus("vllm", 2.1, 2.5, 3.0)
    text = tables["sampled_tau"]()
    # Errors of 10 % and 8 % in each engine.
    assert (
        "- vLLM, argmax: +2.5 % on average over 2 cells (independent draws would differ by 9.1 %), "
        "at most +5.0 % in a cell (13 %)." in text
    )
    assert "| DFlash | 0.1 | none | 2.00 | 2.10 |  |  |" in text
