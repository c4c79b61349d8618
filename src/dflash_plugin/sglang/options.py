"""Options of the plugin in SGLang, which has no extension point for flags."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.io import CONFIG
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY
from dflash_plugin.serving import drafter_spec as shared
from dflash_plugin.serving.drafter_spec import validated
from dflash_plugin.serving.staging import is_staged
from dflash_plugin.serving.variables import (
    FILE,
    given_options,
    require_options,
    require_switch,
)
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.names import ENGINE


class Options(shared.Options):
    """Read from ``DFLASH_PLUGIN_CONFIG=file.json`` and ``DFLASH_PLUGIN_<OPTION>=value``."""


class DrafterSpec(shared.DrafterSpec):
    """What the workers know of a drafter, with SGLang's options."""

    options: Options


def read_options() -> Options:
    """Validated options; a variable of its own wins over the file, and an empty one is unset.

    Raises:
        DFlashError: names the file, option or variable that is wrong.
    """
    require_switch()
    values: dict[str, Any] = {}
    file = os.environ.get(FILE)
    if file:
        try:
            values = json.loads(Path(file).expanduser().read_text())
        except (OSError, ValueError, RuntimeError) as error:
            raise DFlashError(
                f"{FILE} is {file!r}, which cannot be read ({reason(error)}): give a JSON file"
            ) from error
        if not isinstance(values, dict):
            raise DFlashError(f"{FILE} is {file!r}, which holds no JSON object: write one")
    given = given_options()
    require_options(given, Options.model_fields)
    return validated(Options, {**values, **given}, f"{file or 'environment'}")


def draft_model_path(server_args: Any) -> Path | None:
    """The directory of the draft model, as SGLang's ``ServerArgs`` name it by now."""
    path = argument(server_args, "speculative_draft_model_path")
    return None if path is None else Path(path)


def drafter_spec(path: Any) -> DrafterSpec | None:
    """The spec of the drafter at a draft model path, or None where the plugin did not stage it."""
    if path is None or not is_staged(ENGINE, path):
        return None
    return DrafterSpec.model_validate(json.loads((Path(path) / CONFIG).read_text())[KEY])


def required_spec(path: Any) -> DrafterSpec:
    """The spec of the drafter at a draft model path.

    Raises:
        DFlashError: the directory was not made by the plugin.
    """
    spec = drafter_spec(path)
    if spec is None:
        raise DFlashError(
            f"the draft model {str(path)!r} was not prepared by dflash-plugin: start SGLang with "
            "--speculative-algorithm DFLASH and let it"
        )
    return spec
