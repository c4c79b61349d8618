"""Pages of the repository and of docs/: links, anchors, navigation, and commands of the CLI."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from dflash_plugin.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(?!`)([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
# At the beginning of a line, behind another command, or in a virtual environment's folder.
COMMAND = re.compile(r"(?:^ *|&& *|\$\(|/bin/)dflash-plugin ([^\n&|;)#]+)", re.M)


def ids(pages: list[Path]) -> list[str]:
    return [page.name for page in pages]


def prose(text: str) -> str:
    """Without code."""
    return INLINE.sub("", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """What headings are called in links, in ASCII."""
    titles = HEADING.findall(FENCE.sub("", text))
    words = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles)
    return {re.sub(r"\s", "-", word) for word in words}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links of a page that lead nowhere, or out of the site."""
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file():
            yield f"{link}: no such file"
        elif page.parent == DOCS and target.parent != DOCS:
            yield f"{link}: leaves docs/, which the site does not have"
        elif anchor and anchor not in anchors(target.read_text()):
            yield f"{link}: no such heading"


def commands(text: str) -> list[list[str]]:
    """Words behind ``dflash-plugin`` in code, fenced and inline."""
    fenced = [found.replace("\\\n", " ") for found in FENCE.findall(text)]
    inline = [" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", text))]
    found = (line for code in [*fenced, *inline] for line in COMMAND.findall(code))
    return [words(line) for line in found]


def words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # A quote that a pipe or a bracket cut.
        return line.split()


def unknown(command: list[str]) -> list[str]:
    """What the command line does not have of a command."""
    group = typer.main.get_command(app)
    name, *rest = command
    found = getattr(group, "commands", {}).get(name)
    if found is None:
        return [name]
    options = {"--help"}
    for param in found.params:
        options |= {*param.opts, *param.secondary_opts}
    given = (word.strip("[],…").partition("=")[0] for word in rest)
    return [word for word in given if re.match(r"--?[a-z]", word) and word not in options]


def nav_pages(nav: str | list | dict) -> list[str]:
    """Pages of a navigation, groups opened."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in nav_pages(part)]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    assert list(broken_links(page, page.read_text())) == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_are_those_of_the_cli(page):
    wrong = {" ".join(command): unknown(command) for command in commands(page.read_text())}
    assert {command: what for command, what in wrong.items() if what} == {}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_code_is_not_indented(page):
    """The site's Markdown knows fences only at the beginning of a line."""
    assert re.findall(r"^ +```.*", page.read_text(), re.M) == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_no_path_leads_out_of_the_repository(page):
    assert re.findall(r"\.\./(?:shared|work)\S*", page.read_text()) == []


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(nav_pages(config["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("![a](nowhere.svg)", "nowhere.svg"),
        ("[a](design.md#nowhere)", "design.md#nowhere"),
        ("[a](#nowhere)", "#nowhere"),
        ("[a](../README.md)", "../README.md"),
    ],
)
def test_a_broken_link_is_found(text, link):
    (found,) = broken_links(DOCS / "index.md", text)
    assert found.startswith(f"{link}:")


def test_a_link_in_code_is_none():
    assert list(broken_links(DOCS / "index.md", "`x[0](y)`\n\n```\n[a](b.md)\n```\n")) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`dflash-plugin nothing DIR`", ["nothing"]),
        ("```bash\ncd x && dflash-plugin eval --data x \\\n  --datas y\n```", ["--datas"]),
        ("```bash\n  dflash-plugin top -x URL\n```", ["-x"]),
        ("`T=$(dflash-plugin fetch smollm2 --outputs=x)`", ["--outputs"]),
        ("`dflash-plugin bench URL [--baseline URL] --no-warmup -o x.json`", []),
    ],
)
def test_a_wrong_command_is_found(text, wrong):
    (command,) = commands(text)
    assert unknown(command) == wrong
