"""What an engine's workers know of a drafter, and the options that a user sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from dflash_plugin.decoding.draft_sampling import DraftSampling
from dflash_plugin.drafter.config import Dialect, DrafterConfig, DraftWeights
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving.variables import nearest


class Options(BaseModel):
    """How the plugin runs a drafter, in every engine.

    Attributes:
        known_answers: at start, draft the checkpoint's recorded prompts through the whole engine;
            "require" stops the engine where a draft differs, "warn" logs it, "off" skips the check.
        expected_acceptance_length: τ that the drafter should reach; None takes the checkpoint's
            training record.
        acceptance_warning: warn when the accepted drafts per pass (τ - 1) stay below this share of
            the expected ones; 0 never warns.
        acceptance_window: verify passes that one comparison covers.
        dialect: overrides the detection of the checkpoint's dialect.
        draft_weights: "fp8" rounds the drafter's linears, and a copy of the head that drafts, to
            FP8 with one scale a row. The target, and so the text, stays as it is. "auto" does so
            where the GPU multiplies FP8 and the weights are plain 16-bit matrices that fit it.
            "checkpoint" keeps what the checkpoint stores, quantised weights where the engine has
            linears for them. "dequantised" makes plain matrices of those.
        draft_sampling: how drafts of requests with a temperature are made; the text keeps the
            target's distribution whichever. "probabilistic" draws them from the drafter's
            distribution, "greedy" takes its likeliest tokens. "auto" draws in SGLang, and leaves
            the choice to ``draft_sample_method`` in vLLM, where drawn drafts cost memory.
        adaptive_verification: verify the number of drafts that commits most tokens per second, by
            their acceptance probabilities and the measured step times; that may be none. None
            leaves the choice to the engine's adapter.
        min_draft_tokens: drafts that are verified per request at the minimum.
        max_draft_tokens: drafts that are verified per request at the maximum; None verifies whole
            blocks.
        latency_vs_throughput: weight of a step's seconds in that choice, from 1 (in full) to 0
            (not at all, so that each step verifies all the drafts it may).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    known_answers: Literal["require", "warn", "off"] = "require"
    expected_acceptance_length: float | None = Field(default=None, ge=1)
    acceptance_warning: float = Field(default=0.5, ge=0, le=1)
    acceptance_window: int = Field(default=2000, ge=1)
    dialect: Dialect | None = None
    draft_weights: DraftWeights | Literal["auto", "dequantised"] = "auto"
    draft_sampling: DraftSampling = "auto"
    adaptive_verification: bool | None = None
    min_draft_tokens: int = Field(default=0, ge=0)
    max_draft_tokens: int | None = Field(default=None, ge=0)
    latency_vs_throughput: float = Field(default=1.0, ge=0, le=1)


class DrafterSpec(BaseModel):
    """What an engine's workers know of a drafter; travels in the draft model's configuration.

    Attributes:
        checkpoint: the checkpoint's directory.
        config: the drafter's configuration, with the target's vocabulary; ``target_layer_ids`` in
            the checkpoint's order.
        options: how the plugin runs the drafter.
        expected_acceptance_length: τ to compare the measured one with; None where none is known.
        embedding_factor: of the target on the rows of its embedding.
    """

    model_config = ConfigDict(frozen=True)

    checkpoint: Path
    config: DrafterConfig
    options: SerializeAsAny[Options]
    expected_acceptance_length: float | None = None
    embedding_factor: float = 1.0


OptionsT = TypeVar("OptionsT", bound=Options)


def validated(model: type[OptionsT], values: Any, source: str) -> OptionsT:
    """Options that a user gave, checked.

    Args:
        model: the engine's class of options.
        values: a mapping of option names to values.
        source: where the user gave them, for the message.

    Raises:
        DFlashError: names the option that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([KEY, *(str(part) for part in first["loc"])])
        what = first["msg"]
        if first["type"] == "extra_forbidden":
            similar = nearest(str(first["loc"][-1]), model.model_fields)
            what = "there is no such option" + (f", did you mean {similar}?" if similar else "")
        raise DFlashError(
            f"{source}: {field} is {first['input']!r}: {what}; the options are "
            f"{', '.join(model.model_fields)}"
        ) from None


def without_checks(options: OptionsT) -> OptionsT:
    """The options for dummy weights: no start-up check, and no warning of low acceptance."""
    return options.model_copy(update={"known_answers": "off", "acceptance_warning": 0.0})


def expected_acceptance(checkpoint: Path, options: Options) -> float | None:
    """The expected τ: the option's, or what training measured on held-out text.

    Args:
        checkpoint: directory that may hold a ``training.json``.
        options: the user's.
    """
    if options.expected_acceptance_length is not None:
        return options.expected_acceptance_length
    try:
        record = json.loads((checkpoint / "training.json").read_text())
        return float(record["held_out"]["held_out_tau"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
