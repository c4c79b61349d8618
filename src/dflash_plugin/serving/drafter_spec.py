"""What an engine's workers know of a drafter, and the options that a user sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from dflash_plugin.drafter.config import Dialect, DrafterConfig, DraftWeights
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY

SWITCH = "DFLASH_PLUGIN"


class Options(BaseModel):
    """How the plugin runs a drafter, in every engine.

    Attributes:
        known_answers: at start, draft the checkpoint's recorded prompts through the whole engine;
            "require" ends the engine where a draft differs, "warn" logs it, "off" leaves it out.
        expected_acceptance_length: τ that the drafter should reach; that of the checkpoint's
            training record when None.
        acceptance_warning: warn when τ less its bonus token stays below this share of the
            expected one's; 0 never warns.
        acceptance_window: verify passes that one such judgement looks at.
        dialect: overrides the detection of the checkpoint's dialect.
        draft_weights: "fp8" rounds the drafter's linears, and a copy of the head that drafts, to
            FP8 with one scale a row; text stays the target's own.
        adaptive_verification: verify as many drafts as commit most tokens a second, by what they
            promise and by the clock; none where none pays. None leaves it to the engine's adapter.
        min_draft_tokens: drafts of a request that are verified at least.
        max_draft_tokens: drafts of a request that are verified at most; all of a block when None.
        latency_vs_throughput: with 1 a step's seconds count in full, with 0 not at all, so that
            each step verifies all it may.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    known_answers: Literal["require", "warn", "off"] = "require"
    expected_acceptance_length: float | None = Field(default=None, ge=1)
    acceptance_warning: float = Field(default=0.5, ge=0, le=1)
    acceptance_window: int = Field(default=2000, ge=1)
    dialect: Dialect | None = None
    draft_weights: DraftWeights = "checkpoint"
    adaptive_verification: bool | None = None
    min_draft_tokens: int = Field(default=0, ge=0)
    max_draft_tokens: int | None = Field(default=None, ge=0)
    latency_vs_throughput: float = Field(default=1.0, ge=0, le=1)


class DrafterSpec(BaseModel):
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
    options: SerializeAsAny[Options]
    expected_acceptance_length: float | None = None


OptionsT = TypeVar("OptionsT", bound=Options)


def is_off() -> bool:
    """Whether the user asked for the engine's own DFlash."""
    return os.environ.get(SWITCH, "on").lower() in ("off", "0", "false")


def validated(model: type[OptionsT], values: Any, source: str) -> OptionsT:
    """Options of a mapping.

    Args:
        model: the engine's options.
        values: what the user gave.
        source: where, for the message.

    Raises:
        DFlashError: names the option that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([KEY, *(str(part) for part in first["loc"])])
        raise DFlashError(
            f"{source}: {field} is {first['input']!r}: {first['msg']}; the options are "
            f"{', '.join(model.model_fields)}"
        ) from None


def without_checks(options: OptionsT) -> OptionsT:
    """For weights that mean nothing: nothing to compare, nothing to warn of."""
    return options.model_copy(update={"known_answers": "off", "acceptance_warning": 0.0})


def expected_acceptance(checkpoint: Path, options: Options) -> float | None:
    """τ to expect: the option's, or what training measured on held-out text."""
    if options.expected_acceptance_length is not None:
        return options.expected_acceptance_length
    try:
        record = json.loads((checkpoint / "training.json").read_text())
        return float(record["held_out"]["held_out_tau"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
