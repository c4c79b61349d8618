"""The table of engine symbols: what is patched from it, and what it finds wrong."""

import sys
import textwrap

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_source import check_source
from dflash_plugin.serving.engine_surface import Seam, Surface

ENGINE = """
    from dataclasses import dataclass
    from typing import overload

    from {package}.parts import Base, Kept as Exported

    LIMIT = 3

    def propose(batch, *, count=1):
        return count

    @overload
    def compiled(cls): ...

    def compiled(cls=None, *, sizes=None):
        return cls

    @dataclass
    class Step:
        tokens: int
        drafts: int = 0

    class Runner(Base):
        ready = False

        def __init__(self, config):
            self.config = config

        def run(self, batch, extra=None):
            return "native"

        @staticmethod
        def options(parser, names=()):
            return ["native"]

    class Registry:
        def add(self, name, model):
            pass

    registry = Registry()
"""
PARTS = """
    class Base:
        def observe(self, tokens, rejected, *args):
            self.seen: int = 1

    class Kept:
        def __init__(self, a, b=1, **kwargs):
            pass
"""
BATCH = ("batch", "extra")


@pytest.fixture
def engine(tmp_path, monkeypatch, request):
    """A package of its own name for each test: modules are patched once in a process."""
    name = "engine_" + "".join(c for c in request.node.name if c.isalnum())
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(textwrap.dedent(ENGINE.format(package=name)))
    (folder / "parts.py").write_text(textwrap.dedent(PARTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def load(name):
    return __import__(f"{name}.core", fromlist=["core"])


def seam(engine, symbol, kind="call", signature=None, feature="serve", **more):
    return Seam(f"{engine}.core", symbol, kind, feature, "a test needs it", signature, **more)


def table(engine):
    """Every kind of symbol, as the source has it."""
    return [
        seam(engine, "Runner.run", "patch", BATCH),
        seam(engine, "Runner.options", "patch", ("parser", "...")),
        seam(engine, "Runner.observe", "subclass", ("tokens", "rejected")),
        seam(engine, "Runner", "subclass", ("config",)),
        seam(engine, "Runner.config", "attribute"),
        seam(engine, "Runner.seen", "attribute"),
        seam(engine, "Runner.ready", "attribute"),
        seam(engine, "registry.add", "call", ("name", "model")),
        seam(engine, "propose", "call", ("batch", "*", "count")),
        seam(engine, "compiled", "call", ("*", "sizes")),
        seam(engine, "Step", "call", ("*", "drafts", "tokens")),
        seam(engine, "Exported", "call", ("a", "*", "c")),
        seam(engine, "LIMIT", "attribute"),
        seam(engine, "Runner.gone", "call", until="0.5"),
        seam(engine, "Runner.to_come", "call", since="1.1"),
    ]


WRONG = [
    (("Runner.run", "patch", ("batch",)), r"expected the parameters \(batch\), found \(batch, ex"),
    (("Runner.run", "call", ("extra",)), r"expected the parameters \(extra\)"),
    (("Runner.options", "patch", ("parser",)), r"found \(parser, names=\)"),
    (("propose", "call", ("batch", "*", "number")), r"found \(batch, count=\)"),
    (("Step", "call", ("*", "drafts")), r"found \(tokens, drafts=\)"),
    (("Runner", "call", ()), r"found \(config\)"),
    (("Runner.rum", "call", None), "rum"),
    (("Runer", "subclass", None), "Runer"),
    (("registry.remove", "call", None), "remove"),
]


def test_a_table_that_fits_passes(engine, tmp_path):
    surface = Surface("toy", "1.0", table(engine))
    for symbol in ("Runner.run", "Runner.options"):
        surface.patch(f"{engine}.core", symbol, lambda native: None)
    surface.verify({"serve"}, load=True)
    assert check_source(tmp_path, table(engine), "1.0") == []


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[str(row[:2]) for row, _ in WRONG])
def test_a_symbol_that_differs_is_named(engine, tmp_path, row, message):
    wrong = seam(engine, *row)
    surface = Surface("toy", "1.0", [wrong])
    if wrong.kind == "patch":
        surface.patch(wrong.module, wrong.symbol, lambda native: pytest.fail("was patched"))
    with pytest.raises(DFlashError, match=rf"toy 1\.0 .*core\.{row[0]} .*{message}.*DFLASH_PLUGIN"):
        surface.verify({"serve"}, load=True)
    (line,) = check_source(tmp_path, [wrong], "1.0")
    assert line.startswith(f"{engine}.core.{row[0]} (serve: a test needs it)")


def test_instance_attributes_are_seen_in_source_and_on_objects(engine, tmp_path):
    missing, written = seam(engine, "Runner.lost", "attribute"), seam(engine, "Runner.set", "write")
    (line, _) = check_source(tmp_path, [missing, written], "1.0")
    assert line.endswith("Runner has no 'lost'")
    surface = Surface("toy", "1.0", [missing, written, *table(engine)])
    surface.seams = tuple(s for s in surface.seams if s.kind in ("attribute", "write"))
    surface.verify({"serve"}, load=True)
    runner = load(engine).Runner("config")
    with pytest.raises(DFlashError, match=r"lost.*Runner has no 'lost'.*seen.*has no 'seen'"):
        surface.verify_object(runner)
    runner.observe(1, 2)
    runner.lost = 1
    surface.verify_object(runner)


def test_patches_keep_static_methods_and_skip_other_versions(engine):
    rows = [
        seam(engine, "Runner.run", "patch", BATCH),
        seam(engine, "Runner.options", "patch", ("parser", "names")),
        seam(engine, "registry", "hook"),
        seam(engine, "Runner.gone", "patch", until="0.5"),
    ]
    surface = Surface("toy", "1.0", rows)
    seen = []
    for _ in range(2):  # The second time changes nothing.
        surface.patch(f"{engine}.core", "Runner.run", lambda native: lambda self, batch: "ours")
        surface.patch(
            f"{engine}.core", "Runner.options", lambda native: lambda p: [*native(p), "ours"]
        )
        surface.patch(f"{engine}.core", "registry", seen.append)
        surface.patch(f"{engine}.core", "Runner.gone", lambda native: pytest.fail("not there"))
    assert f"{engine}.core" not in sys.modules
    module = load(engine)
    assert module.Runner("c").run(1) == "ours"
    assert module.Runner.options("p") == module.Runner("c").options("p") == ["native", "ours"]
    assert seen == [module.registry]
    surface.verify({"serve"})


def test_only_what_the_table_lists_is_patched(engine):
    surface = Surface("toy", "1.0", [seam(engine, "Runner.run", "call")])
    for symbol in ("Runner.run", "propose"):
        with pytest.raises(KeyError, match="not in the table"):
            surface.patch(f"{engine}.core", symbol, lambda native: None)


def test_a_changed_signature_leaves_the_engine_as_it_is(engine, caplog):
    surface = Surface("toy", "1.0", [seam(engine, "Runner.run", "patch", ("batch",))])
    surface.patch(f"{engine}.core", "Runner.run", lambda native: lambda self, batch: "ours")
    assert load(engine).Runner("c").run(1) == "native"
    assert "core.Runner.run is left as it is: expected the parameters (batch)" in caplog.text
    surface.verify({"metrics"})
    with pytest.raises(DFlashError, match="expected the parameters"):
        surface.verify({"serve"})


def test_a_patch_that_was_never_applied_is_an_error_where_it_is_needed(engine):
    row = seam(engine, "Runner.run", "patch")
    surface = Surface("toy", "1.0", [row])
    with pytest.raises(DFlashError, match="no patch was registered"):
        surface.verify({"serve"}, load=True)
    del sys.modules[f"{engine}.core"]
    surface = Surface("toy", "1.0", [row])
    surface.patch(f"{engine}.core", "Runner.run", lambda native: None)
    surface.verify({"metrics"})
    with pytest.raises(DFlashError, match="the engine has not imported its module"):
        surface.verify({"serve"})
    load(engine)
    surface.verify({"serve"})


def test_a_module_that_moved_is_named_where_it_is_needed(engine):
    surface = Surface("toy", "1.0", [Seam(f"{engine}.lost", "f", "patch", "serve", "a test")])
    surface.patch(f"{engine}.lost", "f", lambda native: None)
    surface.verify({"metrics"}, load=True)
    with pytest.raises(DFlashError, match=r"lost\.f \(serve: a test\): its module cannot be"):
        surface.verify({"serve"}, load=True)


def test_what_other_features_lack_is_a_warning(engine, caplog):
    surface = Surface("toy", "1.0", [seam(engine, "Runner.rum", feature="metrics")])
    load(engine)
    surface.verify({"serve"})
    assert "Runner.rum (metrics: a test needs it)" in caplog.text


def test_a_patch_by_other_means_is_recorded(engine):
    surface = Surface("toy", "1.0", [seam(engine, "Runner.run", "hook")])
    load(engine)
    surface.record(f"{engine}.core", "Runner.run")
    surface.verify({"serve"})


def test_attributes_of_some_versions_have_a_default_in_the_others(engine):
    rows = [
        seam(engine, "Runner.config", "attribute", since="1.0"),
        seam(engine, "Runner.old", "attribute", until="1.0"),
    ]
    runner = load(engine).Runner("config")
    surface = Surface("toy", "1.0.post1", rows)
    assert surface.read(runner, "Runner.config") == "config"
    assert surface.read(runner, "Runner.old", default=7) == 7
    assert Surface("toy", "0.9", rows).read(runner, "Runner.config") is None
    with pytest.raises(DFlashError, match=r"Runner\.old .*the Runner has no 'old'"):
        Surface("toy", "0.9", rows).read(runner, "Runner.old")
    with pytest.raises(KeyError, match="not in the table"):
        surface.read(runner, "Runner.new")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.9", False), ("0.10.0", True), ("0.10.1rc1", True), ("0.33", False), ("0.32.9", True)],
)
def test_versions_are_compared_by_number(version, expected):
    row = Seam("m", "s", "call", "serve", "why", since="0.10", until="0.33")
    assert row.exists_in(version) is expected
