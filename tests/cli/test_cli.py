"""The commands, as a user calls them."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dflash_plugin.cli import other_load
from dflash_plugin.cli.common import in_flags
from dflash_plugin.cli.main import app
from dflash_plugin.drafter.config import LayerAttention
from tests.helpers.tiny import DFLASH2, write_target, write_tiny

DATA = Path(__file__).parents[1] / "data"


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture
def target(tmp_path):
    return write_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path):
    return write_tiny(tmp_path / "drafter")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"question": f"w{i} w{i + 7} w{2 * i}"}) for i in range(6)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_inspect(target, drafter):
    report = json.loads(run("inspect", drafter, "--target", target, "--json"))
    assert report["fits"]
    assert report["config"]["target_layer_ids"] == [0, 2]
    table = run("inspect", drafter, "--target", target, "--num-speculative-tokens", 9, code=1)
    assert "9 speculative tokens are asked for" in " ".join(table.split())


def test_inspect_shows_what_makes_a_drafter_dflash2(target, tmp_path):
    shown = run("inspect", write_tiny(tmp_path / "drafter", **DFLASH2), "--target", target)
    for line in ("convolution kernel_size 2, group_size 8", "selector rank 6, top_k 5"):
        assert line in " ".join(shown.replace("│", " ").split())


def test_inspect_replays_known_answers(target, tmp_path):
    missing = run("inspect", write_tiny(tmp_path / "a"), "--target", target, "--replay", code=1)
    assert "--replay needs" in missing


def test_inspect_records_known_answers_once(target, drafter):
    run("inspect", drafter, "--target", target, "--record", "--replay")
    record = drafter / "known_answer.json"
    written = record.read_text()
    assert len(json.loads(written)["answers"]) == 3
    again = run("inspect", drafter, "--target", target, "--record", code=1)
    assert "is already there" in " ".join(again.split())
    assert record.read_text() == written
    record.write_text(json.dumps({**json.loads(written), "answers": []}))
    run("inspect", drafter, "--target", target, "--record", "--overwrite")
    assert record.read_text() == written
    record.unlink()
    assert "--record needs --target" in run("inspect", drafter, "--record", code=1)
    assert not record.exists()


def test_a_record_is_made_and_replayed_in_the_dialect_that_is_given(target, tmp_path):
    # Without is_causal, SpecForge's sliding layers are not causal and z-lab's are.
    sliding = [LayerAttention(sliding_window=6)] * 2
    drafter = write_tiny(tmp_path / "sliding", layers=sliding, dialect="z-lab")
    config = drafter / "config.json"
    raw = json.loads(config.read_text())
    raw.pop("is_causal", None)
    raw["dflash_config"].pop("is_causal", None)
    config.write_text(json.dumps(raw))
    arguments = ["inspect", drafter, "--target", target, "--dialect", "specforge"]
    run(*arguments, "--record", "--replay")
    assert "known answer" in run("inspect", drafter, "--target", target, "--replay", code=1)


def test_convert(drafter, tmp_path):
    found = json.loads(run("convert", drafter, tmp_path / "out", "--to", "speculators", "--json"))
    assert found["config"]["dialect"] == "speculators"
    assert "already there" in run("convert", drafter, tmp_path / "out", "--to", "z-lab", code=1)
    run("convert", drafter, tmp_path / "out", "--to", "z-lab", "--overwrite")
    file = tmp_path / "file"
    file.write_text("kept")
    assert f"{str(file)!r} is a file" in run("convert", drafter, file, "--to", "z-lab", code=1)
    assert file.read_text() == "kept"
    record = tmp_path / "other" / "known_answer.json"
    record.parent.mkdir()
    record.write_text("kept")
    refused = run("convert", drafter, record.parent, "--to", "z-lab", code=1)
    assert f"{str(record)!r} is already there" in refused
    assert record.read_text() == "kept"


def test_generate_compares_with_the_target_alone(target, drafter):
    arguments = ("w5 w9", "--target", target, "--drafter", drafter, "--max-new-tokens", 12)
    found = json.loads(run("generate", *arguments, "--compare", "--repeats", 1, "--json"))
    assert found["equal"] is True
    assert found["tokens_per_second"] > 0 < found["plain_tokens_per_second"]
    assert 1 + sum(found["committed"]) == len(found["tokens"])
    adaptive = json.loads(
        run("generate", *arguments, "--adaptive", "--compare", "--repeats", 1, "--json")
    )
    assert adaptive["text"] == found["text"]
    tree = json.loads(run("generate", *arguments, "--tree-rows", 6, "--json"))
    assert tree["text"] == found["text"]
    streamed = run("generate", *arguments)
    assert streamed.strip() == found["text"].strip()
    shown = run("generate", *arguments, "--compare", "--repeats", 1)
    assert "yes, token for token" in shown
    assert "median of 1" in shown
    assert len(found["seconds"]) == len(found["plain_seconds"]) == 1
    assert found["other_processes_cores"] is None or found["other_processes_cores"] >= 0
    sampled = run("generate", *arguments, "--compare", "--temperature", 0.9, "--seed", 3, "--json")
    assert json.loads(sampled)["equal"] is None


def test_eval_reports_every_set(target, drafter, prompts):
    found = json.loads(
        run(
            "eval", "--data", prompts, "--target", target, "--drafter", drafter, "--batch", 4,
            "--max-new-tokens", 10, "--limit", 5, "--json",
        )
    )  # fmt: skip
    (only,) = found["sets"]
    assert only["prompts"] == only["equal"] == len(only["tau_per_request"]) == 5
    assert len(only["acceptance"]) == 3
    assert len(only["runs_tokens_per_second"]) == len(only["runs_plain_tokens_per_second"]) == 3
    assert only["tokens_per_second"] == sorted(only["runs_tokens_per_second"])[1]
    assert found["mean_tau"] == only["tau"] == pytest.approx((only["tokens"] - 5) / only["passes"])


NEW = ("--mask-token", 3, "--layers", 1, "--target-layers", "0,2")


@pytest.mark.parametrize("start", [None, {}, DFLASH2], ids=["new", "dflash", "dflash2"])
@pytest.mark.parametrize("dflash2", [False, True])
def test_train_makes_a_drafter_that_generates(target, prompts, start, dflash2, tmp_path):
    if start is None:
        options: tuple = NEW
    else:
        options = ("--start-from", write_tiny(tmp_path / "start", **start))
    if dflash2:
        options = (*options, "--dflash2", "--selector-weight", 0.5)
    if dflash2 and start is not DFLASH2:
        options = (*options, "--selector-rank", 6, "--conv-group-size", 8, "--selector-top-k", 5)
    out = tmp_path / "trained"
    facts = json.loads(
        run(
            "train", "--target", target, "--output", out, "--prompts", prompts,
            "--max-new-tokens", 12, "--held-out", 2, "--steps", 3, "--batch-size", 2,
            "--anchors", 4, *options, "--json",
        )
    )  # fmt: skip
    assert facts["steps"] == 3
    assert facts["start_from"] == (None if start is None else "start")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "known_answer.json", "learning_curve.svg",
        "model.safetensors", "work",
    }  # fmt: skip
    report = json.loads(run("inspect", out, "--target", target, "--replay", "--json"))
    assert report["replayed"]
    assert report["known_answers"] == 3
    has_selector = dflash2 or start is DFLASH2
    assert (report["config"]["selector"] is not None) == has_selector
    assert ("# DFlash 2 drafter" in (out / "README.md").read_text()) == has_selector
    options = ("--target", target, "--drafter", out, "--max-new-tokens", 4)
    run("generate", "w5", *options)
    (only,) = json.loads(run("eval", "--data", prompts, *options, "--json"))["sets"]
    assert only["equal"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--target", "nowhere"), "'nowhere' is neither a model directory"),
        (("generate", ""), "the prompt is empty: write what to ask"),
        (("generate", " \n"), "the prompt is empty: write what to ask"),
        (("generate", "x", "--max-new-tokens", "0"), "--max-new-tokens is 0: give at least 1"),
        (("eval", "--data", "p.jsonl", "--limit", "0"), "--limit=0 leaves no prompt"),
        (("generate", "x", "--target", "./nowhere", "--drafter", "."), "'./nowhere' is not there"),
        (("fetch", "smollm2", "--output", "file/model"), "nothing can be written in 'file'"),
        (("train", "--target", "a", "--output", "file"), "file' is a file: give a directory"),
        (("train", "--target", "a", "--output", "file/b"), "file' is a file: give a directory"),
        (
            ("train", "--target", "a", "--output", "b", "--openings", "no.jsonl"),
            "--openings is 'no.jsonl', which cannot be read",
        ),
        (("train", "--target", "t", "--output", "b"), "there is nothing to train on: give"),
        (
            ("train", "--target", "t", "--output", "b", "--self-prompts", "9"),
            "--held-out is 128, but the prompts make at most 9 sequences",
        ),
        (
            ("train", "--target", "t", "--output", "done", "--self-prompts", "9"),
            "'done' holds a drafter that this run did not make: give another --output",
        ),
        (("generate", "x", "--target", "nowhere", "--drafter", "."), "nowhere"),
        (("fetch", "gpt-7"), "gpt-7"),
        (("eval", "--data", "no.jsonl"), "no.jsonl"),
        (("generate", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("generate", "x", "--tree-rows", "few"), "--tree-rows is 'few': give auto, or a number"),
        (
            ("train", "--target", "a", "--output", "b", "--mask-token", "3", "--block-size", "1"),
            "--block-size is 1",
        ),
        (
            (
                "train",
                "--target",
                "a",
                "--output",
                "b",
                "--mask-token",
                "3",
                "--target-layers",
                "x",
            ),
            "--target-layers is 'x'",
        ),
        (
            ("train", "--target", "a", "--output", "b", "--dflash2", "--selector-top-k", "1"),
            "--selector-top-k is 1",
        ),
        (
            ("train", "--target", "a", "--output", "b", "--selector-weight", "-1"),
            "--selector-weight is -1",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t", "done"):
        (tmp_path / name).mkdir()
    (tmp_path / "done" / "config.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "p.jsonl").touch()
    output = run(*arguments, code=1)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("device", ["banana", "cuda"])
@pytest.mark.parametrize("command", ["generate", "train"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_torch_lacks_is_named(command, device, target, drafter, prompts, tmp_path):
    arguments = {
        "generate": ("generate", "w5", "--drafter", drafter),
        "train": ("train", "--output", tmp_path / "out", "--prompts", prompts, "--held-out", 2),
    }
    shown = run(*arguments[command], "--target", target, "--device", device, code=1)
    assert f"error: --device is {device!r}, which torch" in shown


def test_a_truncated_target_is_named(target, drafter):
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shown = run("generate", "w5", "--target", target, "--drafter", drafter, code=1)
    assert f"{target}: model.safetensors is truncated: 1000 bytes" in shown
    assert len(shown.strip().splitlines()) == 1


def test_a_target_without_tokenizer_is_named(target, drafter):
    for path in target.glob("*token*"):
        path.unlink()
    shown = run("generate", "w5", "--target", target, "--drafter", drafter, code=1)
    assert "tokenizer" in shown
    assert "empty prompt" not in shown


def test_training_refuses_too_few_prompts_and_layers(target, prompts, tmp_path):
    arguments = ("train", "--target", target, "--output", tmp_path / "o", "--prompts", prompts)
    wanted = (*arguments, "--mask-token", 3, "--held-out", 2)
    assert "--mask-token is not given" in run(*arguments, "--held-out", 2, code=1)
    assert "--features is 2, but of a target with 4 layers only 1" in run(
        *wanted, "--features", 2, code=1
    )
    assert "--held-out is 128, but the prompts make at most 6" in run(*arguments, code=1)
    assert "--selector-rank is 4, but only a DFlash 2 drafter" in run(
        *wanted, "--selector-rank", 4, code=1
    )


def test_names_in_paths_and_quotes_stay_as_they_are():
    flags = {"max_new_tokens": "--max-new-tokens", "steps": "--steps"}
    message = "max_new_tokens is 0 in '/a/max_new_tokens/b' of 'max_new_tokens', steps is 3"
    assert in_flags(message, flags) == (
        "--max-new-tokens is 0 in '/a/max_new_tokens/b' of 'max_new_tokens', steps is 3"
    )
    assert in_flags("steps is 0: give at least 1", flags) == "--steps is 0: give at least 1"


def test_a_piped_path_is_not_wrapped(drafter, tmp_path):
    out = tmp_path / ("long" * 40)
    result = CliRunner().invoke(app, ["convert", str(drafter), str(out), "--to", "specforge"])
    assert str(out) in result.output
    shown = run("inspect", out)
    assert str(out) in shown


def test_a_busy_machine_is_said(monkeypatch):
    clock = iter([(0.0, 0.0, 0.0), (10.0, 25.0, 10.0), (10.0, 10.5, 10.0)])
    monkeypatch.setattr(other_load, "_clock", lambda: next(clock))
    monkeypatch.setattr(other_load.os, "cpu_count", lambda: 2)
    load = other_load.OtherLoad()
    assert "other processes used 1.5 of 2 cores beside the 1 threads" in load.warning(1)
    assert load.warning(1) is None


def test_the_clock_adds_what_the_cores_did(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(other_load, "_STAT", stat)
    assert other_load.OtherLoad().warning(1) is None
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text("cpu  100 1 50 1000 20 2 5 4 7 7\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    _, busy, own = other_load._clock()
    assert busy == 162 / os.sysconf("SC_CLK_TCK")
    assert own > 0
