"""Options of the plugin in SGLang, which has no extension point for flags."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from dflash_plugin.checkpoints.io import CONFIG
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY
from dflash_plugin.serving import drafter_spec as shared
from dflash_plugin.serving.drafter_spec import SWITCH, is_staged, validated

ENGINE = "sglang"
FILE = f"{SWITCH}_CONFIG"
OTHERS = {SWITCH, FILE, f"{SWITCH}_CACHE"}


class Options(shared.Options):
    """Read from ``DFLASH_PLUGIN_CONFIG=file.json`` and ``DFLASH_PLUGIN_<OPTION>=value``.

    Attributes:
        draft_sampling: how drafts of requests with a temperature are made; "probabilistic" draws
            them from the drafter's distribution, "greedy" takes its likeliest token.
    """

    draft_sampling: Literal["probabilistic", "greedy"] = "probabilistic"


class DrafterSpec(shared.DrafterSpec):
    """What the workers know of a drafter, with SGLang's options."""

    options: Options


def read_options() -> Options:
    """Validated options; a variable of its own wins over the file.

    Raises:
        DFlashError: names the file, option or variable that is wrong.
    """
    values: dict[str, Any] = {}
    file = os.environ.get(FILE)
    if file:
        try:
            values = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise DFlashError(
                f"{FILE} is {file!r}, which cannot be read ({reason(error)}): give a JSON file"
            ) from error
        if not isinstance(values, dict):
            raise DFlashError(f"{FILE} is {file!r}, which holds no JSON object: write one")
    own = {
        name.removeprefix(f"{SWITCH}_").lower(): value
        for name, value in os.environ.items()
        if name.startswith(f"{SWITCH}_") and name not in OTHERS
    }
    return validated(Options, {**values, **own}, f"{file or 'environment'}")


def drafter_spec(path: Any) -> DrafterSpec | None:
    """What is hosted at a draft model path, or None where the drafter is not ours."""
    if path is None or not is_staged(ENGINE, path):
        return None
    return DrafterSpec.model_validate(json.loads((Path(path) / CONFIG).read_text())[KEY])


def require_hosted(path: Any) -> DrafterSpec:
    """What is hosted at a draft model path.

    Raises:
        DFlashError: the directory was not made by the plugin.
    """
    info = drafter_spec(path)
    if info is None:
        raise DFlashError(
            f"the draft model {str(path)!r} was not prepared by dflash-plugin: start SGLang with "
            "--speculative-algorithm DFLASH and let it"
        )
    return info
