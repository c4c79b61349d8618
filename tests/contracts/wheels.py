"""Source of the supported engine versions, from wheels that are unpacked and never imported."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

# The folder that download.sh was given. With it, a wheel that is missing is a failure.
GIVEN = "ENGINE_WHEELS"
DEFAULT = Path(__file__).with_name("wheels")


def unpacked(package: str, distributions: Sequence[str], version: str, into: Path) -> Path:
    """The Python source of one engine version.

    Args:
        package: the engine's top package; the rest of the wheel stays packed.
        distributions: names under which a wheel may be there.
        version: the minor or the whole version, such as "0.31" or "0.5.20".
        into: an empty folder.

    Returns:
        ``into``, with the package in it.
    """
    given = os.environ.get(GIVEN)
    folder = Path(given) if given else DEFAULT
    found = [
        wheel
        for name in distributions
        for pattern in (f"{name}-{version}-*.whl", f"{name}-{version}.*.whl")
        for wheel in sorted(folder.glob(pattern))
    ]
    if not found:
        message = f"no wheel of {package} {version} in {folder}: run tests/contracts/download.sh"
        if given:
            pytest.fail(message)
        pytest.skip(f"{message}, and set {GIVEN} where it must not be skipped")
    with zipfile.ZipFile(found[-1]) as wheel:
        names = [n for n in wheel.namelist() if n.startswith(f"{package}/") and n.endswith(".py")]
        wheel.extractall(into, names)
    return into
