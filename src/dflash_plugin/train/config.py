"""Settings of a training run. The options of ``dflash-plugin train`` are made from these fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dflash_plugin.errors import DFlashError


class Flag(NamedTuple):
    """What a field's option is called where the field's own name is not it; None: has no option."""

    name: str | None


class PromptPrefix(BaseModel):
    """How self-written prompts of one kind begin.

    Attributes:
        text: what the user's turn begins with; the target writes on from here.
        suffix: appended to the finished prompt.
        weight: share of the prompts, relative to the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    suffix: str = ""
    weight: float = Field(default=1.0, gt=0)


def load_prefixes(path: Path) -> tuple[PromptPrefix, ...]:
    """Read how self-written prompts begin, one JSON object a line.

    Raises:
        DFlashError: the file cannot be read, or names the line that is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DFlashError(
            f"--openings is {str(path)!r}, which cannot be read ({error}): give a JSONL file"
        ) from error
    prefixes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prefixes.append(PromptPrefix.model_validate_json(line))
        except ValidationError as error:
            raise DFlashError(
                f"{str(path)!r} line {number} is not an opening ({error.errors()[0]['msg']}): "
                'write {"text": "...", "suffix": "...", "weight": 1}'
            ) from error
    if not prefixes:
        raise DFlashError(f"{str(path)!r} holds no opening: write at least one line")
    return tuple(prefixes)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def flags(cls) -> Iterator[tuple[str, str, FieldInfo]]:
        """Field name, flag and field of every field that has an option."""
        for name, field in cls.model_fields.items():
            flag: str | None = "--" + name.replace("_", "-")
            for marker in field.metadata:
                flag = marker.name if isinstance(marker, Flag) else flag
            if flag is not None:
                yield name, flag, field


class TrainConfig(_Settings):
    """How a drafter is trained. With ``start_from``, the fields of ``SHAPE`` are left unset."""

    mask_token_id: Annotated[int | None, Flag("--mask-token")] = Field(
        default=None,
        ge=0,
        description="Token id that the target never writes; stands for 'to be drafted'.",
    )
    start_from: Path | None = Field(
        default=None,
        description="Drafter checkpoint to go on from; it decides mask token, block size, layers, "
        "window and features.",
    )
    dflash2: bool = Field(default=False, description="Add convolutions and selector.")
    selector_rank: int = Field(default=256, gt=0, description="Rank of the selector's codebooks")
    selector_top_k: int = Field(default=16, ge=2, description="Candidates per position")
    selector_weight: float = Field(
        default=1.0, ge=0, description="Of the selector's loss beside the head's"
    )
    conv_kernel_size: int = Field(default=2, gt=0, description="Taps")
    conv_group_size: int = Field(default=16, gt=0, description="Channels per dynamic coefficient")
    block_size: int = Field(default=8, ge=2, description="Anchor and drafts")
    num_layers: Annotated[int, Flag("--layers")] = Field(
        default=3, ge=1, description="Layers of the drafter"
    )
    intermediate_size: int | None = Field(
        default=None, gt=0, description="The target's by default."
    )
    target_layer_ids: Annotated[tuple[int, ...] | None, Flag("--target-layers")] = Field(
        default=None, description="Comma-separated layer ids; evenly spread by default."
    )
    num_features: Annotated[int, Flag("--features")] = Field(
        default=5,
        ge=1,
        description="How many layers of the target to read where --target-layers is left out",
    )
    sliding_window: int | None = Field(
        default=None, gt=0, description="Positions that every layer sees; all by default."
    )
    steps: int = Field(default=2000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(default=32, ge=1, description="Sequences per step and process.")
    anchors: int = Field(default=128, ge=1, description="Anchors per sequence.")
    attention: Literal["auto", "dense", "flex"] = Field(
        default="dense", description="Of the blocks; auto is flex on a GPU where it runs."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon steps the layers' matrices, AdamW the rest."
    )
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Largest; decays to a tenth along a cosine."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Of matrices.")
    warmup: float = Field(default=0.04, ge=0, lt=1, description="Share of the steps.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    betas: Annotated[tuple[float, float], Flag(None)] = (0.9, 0.95)
    weighting: Literal["exponential", "dpace"] = Field(
        default="exponential", description="Of a block's positions in the loss."
    )
    gamma: float | None = Field(
        default=None, gt=0, description="Of exponential weighting; by block size if left out."
    )
    dpace_alpha: float = Field(default=0.5, ge=0, le=1, description="Of dpace weighting.")
    seed: int = Field(default=0, description="Of initial weights, order and anchors.")
    eval_every: int = Field(default=500, ge=1, description="Steps between evaluations.")
    save_every: int = Field(default=500, ge=1, description="Steps between snapshots.")


SHAPE = (
    "block_size",
    "num_layers",
    "intermediate_size",
    "target_layer_ids",
    "num_features",
    "mask_token_id",
    "sliding_window",
)
"""Fields of ``TrainConfig`` that a checkpoint to start from decides."""
PARTS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
"""Fields of ``TrainConfig`` that only a DFlash 2 drafter has."""


class DataConfig(_Settings):
    """Where training sequences come from."""

    prompts: tuple[Path, ...] = Field(default=(), description="JSONL prompts; repeatable.")
    mix: tuple[float, ...] | None = Field(
        default=None,
        description="Shares of the files of --prompts, with commas between, like 2,1; every "
        "prompt by default.",
    )
    self_prompts: int = Field(default=0, ge=0, description="User turns the target writes itself.")
    openings: tuple[PromptPrefix, ...] = Field(
        default=(PromptPrefix(),), description="JSONL of how self-written turns begin."
    )
    max_prompt_tokens: int = Field(
        default=256, ge=8, description="Prompts with more tokens are left out."
    )
    max_new_tokens: int = Field(default=256, ge=2, description="Limit of a response.")
    temperature: float = Field(default=0.0, ge=0, description="Of the responses; 0 is greedy.")
    samples: int = Field(default=1, ge=1, description="Responses per prompt.")
    held_out: int = Field(default=128, ge=1, description="Sequences kept for measuring.")
    batch: Annotated[int, Flag("--generation-batch")] = Field(
        default=8, ge=1, description="Requests that generate at once."
    )
    cache_features: bool = Field(default=False, description="Keep features in shards.")


def flag_names() -> dict[str, str]:
    """Flags by field name, of both classes."""
    return {name: flag for model in (TrainConfig, DataConfig) for name, flag, _ in model.flags()}
