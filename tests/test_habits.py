"""The files around the code: workflows, templates, hooks and commands name what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# A path of this repository in a command. Results are left out: a page may name one that is still to
# be measured, and tools/make_tables.py checks the others.
OURS = re.compile(r"(?<![\w./-])((?:tests|tools|examples|benchmarks(?!/results)|\.ci)/[\w./-]+)")
PAGES = ["README.md", "CONTRIBUTING.md"]
SCRIPTS = ["justfile", ".ci/run", *PAGES]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def steps(workflow: dict) -> Iterator[dict]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def missing(text: str) -> list[str]:
    """Paths of this repository that a text names and that are not there."""
    fixed = re.sub(r"\S*\{\{\S*", "", text)  # A path with a variable is none yet.
    return [
        path
        for path in (found.rstrip(".") for found in OURS.findall(fixed))
        if not (ROOT / path).exists()
    ]


def block(page: str, heading: str) -> str:
    """The command under a heading, as .ci/run reads it."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^page\(\) \{.*?^\}$", script, re.M | re.S).group()
    function = function.replace('bash -euo pipefail -c "$command"', "true")
    code = f'set -euo pipefail\n{function}\npage "$1" "$2"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", page, heading], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_a_workflow_runs_commands_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    # YAML 1.1 reads the key "on" as true.
    assert {"name", True, "permissions", "jobs"} <= set(workflow)
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert missing(step.get("run", "")) == []
        assert re.fullmatch(r"[\w-]+/[\w.-]+@[\w./]+", step.get("uses", "a/b@v1"))


def test_only_the_publishing_job_may_ask_for_an_identity():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            asks = "id-token" in job.get("permissions", {})
            assert asks == ((path.name, name) == ("publish.yml", "publish"))


@pytest.mark.parametrize("path", FORMS, ids=names(FORMS))
def test_an_issue_template_is_a_form(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= set(form)
    kinds = {"textarea", "input", "checkboxes", "dropdown", "markdown"}
    assert {part["type"] for part in form["body"]} <= kinds
    assert all("label" in part["attributes"] for part in form["body"])


def test_a_bug_report_asks_for_versions_and_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    asked = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"plugin", "engine", "doctor"} <= asked
    (doctor,) = (part for part in form["body"] if part["id"] == "doctor")
    assert "dflash-plugin doctor" in doctor["attributes"]["description"]
    assert "--json" in doctor["attributes"]["description"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_and_pages_name_files_that_exist(name):
    assert missing((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    ("page", "heading", "command"),
    [
        ("README.md", "Run", "dflash-plugin generate"),
        ("README.md", "Test", "/pytest"),
        ("CONTRIBUTING.md", "Run on vLLM", "examples/vllm_offline.py"),
        ("CONTRIBUTING.md", "Test on vLLM", "tests/on_vllm/run.sh"),
        ("CONTRIBUTING.md", "Run on SGLang", "examples/sglang_offline.py"),
        ("CONTRIBUTING.md", "Test on SGLang", "tests/on_sglang/run.sh"),
        ("CONTRIBUTING.md", "Lint", "ruff check ."),
        ("CONTRIBUTING.md", "Contracts", "pytest tests/contracts"),
    ],
)
def test_ci_finds_the_pages_commands(page, heading, command):
    assert command in block(page, heading)
    assert f"page {page} {heading}" in (ROOT / ".ci" / "run").read_text().replace('"', "")


def test_ci_refuses_a_heading_without_a_command():
    assert block("README.md", "License") == ""


def test_ci_runs_the_readme_in_a_users_environment():
    """A number of threads that CI exports hid a test that failed without it."""
    script = (ROOT / ".ci" / "run").read_text()
    for job in ("run", "core"):
        body = re.search(rf"^{job}\(\) \{{(.*?)\}}$", script, re.M | re.S).group(1)
        assert "export" not in body
        assert "engine" not in body
    before = script.partition("engine() {")[0]
    assert "export" not in re.sub(r"#.*", "", before)


def test_hooks_run_what_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    assert hooks == {"ruff", "ruff-format", "mypy"}


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_ci_is_valid_bash():
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_the_changelog_has_a_place_for_what_comes():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
