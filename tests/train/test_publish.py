"""A run from the command line: files in a mix, a stop, the card, and its publication."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.cli.main import app
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.card import learning_curve, model_card
from dflash_plugin.train.config import DataConfig
from dflash_plugin.train.pipeline import given_prompts
from tests.helpers.tiny import tiny_config, write_target


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def prompt_file(path: Path, count: int) -> Path:
    lines = [
        json.dumps({"prompt": f"w{number} w{number + 1} w{number % 7}"}) for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


EVALUATION = {
    "device": "a machine",
    "dtype": "float32",
    "date": "2026-01-01",
    "sets": [{"set_name": "gsm8k", "prompts": 3, "tau": 2.5, "acceptance": [0.75, 0.5, 0.25]}],
}


def test_from_files_in_a_mix_to_a_directory_for_a_hub(tmp_path):
    target, output = write_target(tmp_path / "target"), tmp_path / "out"
    files = [prompt_file(tmp_path / "a.jsonl", 40), prompt_file(tmp_path / "b.jsonl", 30)]
    training = [
        *("train", "--target", target, "--output", output, "--mask-token", 3, "--mix", "1,2"),
        *("--prompts", files[0], "--prompts", files[1], "--max-new-tokens", 8, "--held-out", 4),
        *("--block-size", 4, "--layers", 1, "--intermediate-size", 16, "--target-layers", "0,2"),
        *("--batch-size", 4, "--anchors", 4, "--steps", 4, "--eval-every", 2, "--device", "cpu"),
        *(
            "--max-prompt-tokens",
            40,
        ),
    ]
    assert "--resume was given, but" in run(*training, "--resume", code=1)
    stopped = run(*training, "--minutes", 0)
    assert f"stopped after step 1 of 4, snapshot in {output / 'work'}" in stopped
    assert "give the same command with --resume to go on" in stopped
    assert "stopped after step 3 of 4" in run(*training, "--resume", "--stop-at", 3)
    assert not (output / "config.json").exists()
    refused = run("publish", output, "--to", tmp_path / "hub", "--license", "mit", code=1)
    assert "lacks config.json, so it is no finished run" in refused
    shown = run(*training, "--resume")
    assert re.search(r"training 4/4 loss .* held-out τ .* s, 0 s left", shown), shown

    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps(EVALUATION))
    publishing = ("publish", output, "--to", tmp_path / "hub", "--license", "apache-2.0")
    run(
        *publishing, *("--base-model", "org/target", "--name", "me/drafter"),
        *("--evaluation", evaluation, "--target", target),
    )  # fmt: skip
    card = (tmp_path / "hub" / "README.md").read_text()
    for line in (
        'license: "apache-2.0"',
        'base_model: "org/target"',
        "| gsm8k | 3 | 2.50 | 0.75 | 0.50 | 0.25 |",
        "vllm serve org/target --speculative-method dflash --speculative-model me/drafter",
        "| prompts | 15 of a.jsonl, 30 of b.jsonl |",
        "| optimizer steps | 4 |",
        "![Held-out τ against optimizer steps](learning_curve.svg)",
    ):
        assert line in card.splitlines()
    assert (output / "README.md").read_text().count("## ") == 2
    report = inspect_checkpoint(tmp_path / "hub", target)
    assert report.fits
    assert report.known_answers == 3
    facts = json.loads((tmp_path / "hub" / "training.json").read_text())
    assert [record["step"] for record in facts["history"]] == [2, 4]
    run("inspect", tmp_path / "hub", "--target", target, "--replay")
    assert "is already there: give another directory" in run(*publishing, code=1)
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"")
    run(*publishing, "--overwrite")
    assert inspect_checkpoint(tmp_path / "hub", target).fits
    evaluation.write_text("{}")
    refused = run(*publishing, "--overwrite", "--evaluation", evaluation, code=1)
    assert "which holds no τ by set" in refused


def test_a_mix_keeps_the_shares_of_files(tmp_path):
    files = (prompt_file(tmp_path / "a.jsonl", 10), prompt_file(tmp_path / "b.jsonl", 8))

    def counts(*mix):
        found = given_prompts(DataConfig(prompts=files, mix=mix or None))
        return [len(prompts) for prompts in found.values()]

    assert counts() == [10, 8]
    assert counts(1, 1) == [8, 8]
    assert counts(5, 1) == [10, 2]
    for mix in ((1,), (1, 0)):
        with pytest.raises(DFlashError, match=r"mix is 1.* for 2 files"):
            counts(*mix)
    with pytest.raises(DFlashError, match="prompts names a file twice"):
        given_prompts(DataConfig(prompts=(files[0], files[0])))


def test_the_card_leaves_out_what_is_not_known():
    config: DrafterConfig = tiny_config()
    card = model_card(config, 1000, {})
    assert "None" not in card
    assert "license" not in card
    assert "| started from | new weights |" in card


def test_the_curve_is_a_drawing_of_every_evaluation():
    history = [{"step": 100, "held_out_tau": 2.0}, {"step": 200, "held_out_tau": 3.0}]
    drawing = ElementTree.fromstring(learning_curve(history))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    circles = drawing.findall("{http://www.w3.org/2000/svg}circle")
    assert [circle.find("{*}title").text for circle in circles] == [
        "held-out τ: 100, 2",
        "held-out τ: 200, 3",
    ]
    assert float(circles[0].get("cy")) > float(circles[1].get("cy"))
