"""The table of SGLang symbols against the source of each supported version."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dflash_plugin.serving.engine_source import check_source
from dflash_plugin.sglang import compat, surface
from dflash_plugin.sglang.compat import SUPPORTED
from dflash_plugin.sglang.seams import SEAMS
from dflash_plugin.sglang.seams.new_weights import UPDATES
from tests.contracts.wheels import unpacked

# The module imports its own class for type checking, from a module that imports it from there.
CIRCULAR = "sglang.srt.managers.utils"


def fields(root: Path, module: str, name: str) -> set[str]:
    """The annotated fields of a class in source text."""
    tree = ast.parse(root.joinpath(*module.split(".")).with_suffix(".py").read_text())
    owner = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        node.target.id
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("version", SUPPORTED)
def test_sglang_has_what_the_adapter_uses(version, tmp_path):
    root = unpacked("sglang", ("sglang",), version, tmp_path)
    rows = [row for row in SEAMS if row.module != CIRCULAR]
    assert check_source(root, rows, version) == []
    circular = [row for row in SEAMS if row.module == CIRCULAR]
    assert len(circular) == 6
    for row in circular:
        owner, _, name = row.symbol.partition(".")
        assert name in fields(root, row.module, owner)


def test_the_table_is_one_of_supported_versions():
    """Each row holds for at least one of them, no symbol is listed twice for one purpose."""
    for version in SUPPORTED:
        current = [row for row in SEAMS if row.exists_in(version)]
        assert len({row[:3] for row in current}) == len(current)
    assert all(any(row.exists_in(version) for version in SUPPORTED) for row in SEAMS)


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_differs_by_version_agrees_with_the_table(monkeypatch, version):
    monkeypatch.setattr(compat, "installed", lambda: version)
    found, module = surface.surface(), "sglang.srt."
    row = compat.current()
    for expected, name, symbol in (
        (
            row.has_sampling_masks,
            "sampling.sampling_batch_info",
            "SamplingBatchInfo.sampling_mask_batch_indices",
        ),
        (
            row.defers_gather,
            "layers.logits_processor",
            "LogitsProcessor.finish_deferred_gather",
        ),
        (
            row.has_kv_index_translator,
            "layers.attention.triton_backend",
            "TritonAttnBackend.kv_index_translator",
        ),
        (row.plans_kv_writes, "speculative.dflash_info", "DFlashVerifyInput.kv_loc_plan"),
        (
            row.counts_rows_on_host,
            "model_executor.forward_batch_info",
            "ForwardBatch.global_num_token_non_padded_cpu",
        ),
        (row.declares_arguments, "arg_groups.overrides", "declare_resolution"),
    ):
        assert found.has(module + name, symbol) is expected


def test_hooks_are_those_of_the_table(monkeypatch):
    from dflash_plugin.sglang.plugin import AROUND

    hooked = {}
    for version in ("0.5.20", "0.5.23"):
        monkeypatch.setattr(compat, "installed", lambda version=version: version)
        hooked[version] = {seam.symbol for seam in surface.hooks()}
    assert AROUND.keys() == hooked["0.5.20"] | hooked["0.5.23"]
    assert hooked["0.5.20"] - hooked["0.5.23"] == set(UPDATES)
    newer = hooked["0.5.23"] - hooked["0.5.20"]
    assert newer == {"SchedulerWeightUpdaterManager._select_runners"}
