"""Options of the plugin, and what travels with the draft model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dflash_plugin.config import Dialect, DrafterConfig
from dflash_plugin.errors import DFlashError

KEY = "dflash_plugin"


class Options(BaseModel):
    """``additional_config["dflash_plugin"]``.

    Attributes:
        known_answers: at start, draft the checkpoint's recorded prompts through the whole engine;
            "require" ends the engine where a draft differs, "warn" logs it, "off" leaves it out.
        expected_acceptance_length: τ that the drafter should reach; that of the checkpoint's
            training record when None.
        acceptance_warning: warn when τ less its bonus token stays below this share of the
            expected one's; 0 never warns.
        acceptance_window: verify passes that one such judgement looks at.
        dialect: overrides the detection of the checkpoint's dialect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    known_answers: Literal["require", "warn", "off"] = "require"
    expected_acceptance_length: float | None = Field(default=None, ge=1)
    acceptance_warning: float = Field(default=0.5, ge=0, le=1)
    acceptance_window: int = Field(default=2000, ge=1)
    dialect: Dialect | None = None


class Hosted(BaseModel):
    """What the workers know of a drafter; an attribute of the draft model's configuration.

    Attributes:
        checkpoint: its directory.
        config: what it is; ``target_layer_ids`` in the checkpoint's order.
        options: how the plugin runs it.
        expected_acceptance_length: τ to judge the measured one by, if any is known.
    """

    model_config = ConfigDict(frozen=True)

    checkpoint: Path
    config: DrafterConfig
    options: Options
    expected_acceptance_length: float | None = None


def read_options(additional_config: Any) -> Options:
    """Validated options.

    Raises:
        DFlashError: names the option that is wrong.
    """
    values = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([KEY, *(str(part) for part in first["loc"])])
        raise DFlashError(
            f"additional_config: {field} is {first['input']!r}: {first['msg']}; the options are "
            f"{', '.join(Options.model_fields)}"
        ) from None


def hosted(speculative_config: Any) -> Hosted | None:
    """What is hosted under a ``SpeculativeConfig``, or None where the drafter is not ours."""
    draft = getattr(speculative_config, "draft_model_config", None)
    values = getattr(getattr(draft, "hf_config", None), KEY, None)
    return None if values is None else Hosted.model_validate(values)
