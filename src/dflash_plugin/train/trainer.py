"""The training loop: AdamW, cosine schedule, bf16, resumable, data-parallel under torchrun."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.dialects import write_config
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.tensors import checkpoint_tensors, load_tensors
from dflash_plugin.drafter.blockwise import block_starts, make_blocks
from dflash_plugin.drafter.config import (
    DrafterConfig,
    LayerAttention,
    RopeConfig,
    build_config,
    spread_layers,
)
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.features import FeatureSource
from dflash_plugin.train.losses import gamma_for
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, batches, collate

Report = Callable[[dict[str, float]], None]
# What a checkpoint to start from decides, and what a DFlash 2 drafter has besides.
SHAPE = (
    "block_size",
    "num_layers",
    "intermediate_size",
    "target_layer_ids",
    "num_features",
    "mask_token_id",
    "sliding_window",
)
PARTS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


class TrainConfig(BaseModel):
    """How a drafter is trained.

    Attributes:
        start_from: a drafter checkpoint whose weights and shape it takes over; the fields of
            ``SHAPE`` are then left unset.
        dflash2: adds convolutions and a selector where the checkpoint has none.
        conv_kernel_size, conv_group_size, selector_rank, selector_top_k: their sizes, by default
            those of the public drafters.
        selector_weight: of the selector's cross-entropy beside the head's.
        block_size: anchor + masks.
        num_layers, intermediate_size: size of the drafter; heads and width follow the target.
        target_layer_ids: layers whose outputs it reads; None spreads ``num_features`` evenly.
        num_features: how many layers are read when ``target_layer_ids`` is None.
        mask_token_id: token whose embedding stands for "to be drafted"; needed without
            ``start_from``.
        sliding_window: window of every layer, or None.
        steps, batch_size, anchors: optimizer steps, sequences a step and process, anchors a
            sequence.
        learning_rate, weight_decay, warmup, clip, betas: AdamW with linear warm-up (a share of the
            steps), cosine decay to a tenth, and gradient-norm clipping.
        weighting: "exponential" (gamma; by block size when None) or "dpace" (dpace_alpha).
        seed: initial weights, order and anchors.
        eval_every, save_every: steps between held-out evaluations and between snapshots.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_from: Path | None = None
    dflash2: bool = False
    conv_kernel_size: int = Field(default=2, gt=0)
    conv_group_size: int = Field(default=16, gt=0)
    selector_rank: int = Field(default=256, gt=0)
    selector_top_k: int = Field(default=16, ge=2)
    selector_weight: float = Field(default=1.0, ge=0)
    block_size: int = Field(default=8, ge=2)
    num_layers: int = Field(default=3, ge=1)
    intermediate_size: int | None = Field(default=None, gt=0)
    target_layer_ids: tuple[int, ...] | None = None
    num_features: int = Field(default=5, ge=1)
    mask_token_id: int | None = Field(default=None, ge=0)
    sliding_window: int | None = Field(default=None, gt=0)
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    anchors: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.04, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weighting: Literal["exponential", "dpace"] = "exponential"
    gamma: float | None = Field(default=None, gt=0)
    dpace_alpha: float = Field(default=0.5, ge=0, le=1)
    seed: int = 0
    eval_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)


def drafter_config(target: PreTrainedModel, train: TrainConfig) -> DrafterConfig:
    """The drafter to train for a target.

    Raises:
        DFlashError: settings exclude one another, the target lacks what they name, or the
            checkpoint to start from is not for it or holds what an export cannot express.
    """
    if train.start_from is None:
        config = _config_for(target, train)
    else:
        _require_unset(train, SHAPE, f"{str(train.start_from)!r} decides it: leave it out")
        config = load_config(train.start_from)
        text = target.config.get_text_config()
        config.require_target(
            text.hidden_size, text.num_hidden_layers, target.get_input_embeddings().weight.shape[0]
        )
    if config.selector is not None:
        _require_unset(train, PARTS, f"{str(train.start_from)!r} decides it: leave it out")
    elif train.dflash2:
        convolution = {"kernel_size": train.conv_kernel_size, "group_size": train.conv_group_size}
        selector = {"rank": train.selector_rank, "top_k": train.selector_top_k}
        config = build_config(
            {**config.model_dump(), "convolution": convolution, "selector": selector}
        )
    else:
        parts = (*PARTS, "selector_weight")
        _require_unset(train, parts, "only a DFlash 2 drafter has it: set dflash2 or leave it out")
    write_config(config, "z-lab")
    return config


def _require_unset(train: TrainConfig, names: Sequence[str], why: str) -> None:
    for name in names:
        if name in train.model_fields_set:
            raise DFlashError(f"{name} is {getattr(train, name)!r}, but {why}")


def _config_for(target: PreTrainedModel, train: TrainConfig) -> DrafterConfig:
    """A drafter with the target's width, heads, rotation and vocabulary."""
    text = target.config.get_text_config()
    ids = train.target_layer_ids or spread_layers(text.num_hidden_layers, train.num_features)
    outside = [i for i in ids if not -1 <= i < text.num_hidden_layers]
    if outside:
        raise DFlashError(
            f"target layer {outside[0]} does not exist: the target has layers 0 to "
            f"{text.num_hidden_layers - 1}"
        )
    if train.mask_token_id is None:
        raise DFlashError(
            "mask_token_id is missing: name a token that the target never writes, or a checkpoint "
            "to start from"
        )
    vocabulary = target.get_input_embeddings().weight.shape[0]
    if train.mask_token_id >= vocabulary:
        raise DFlashError(
            f"mask_token_id {train.mask_token_id} is outside the target's vocabulary of "
            f"{vocabulary}: choose a token that the target never writes"
        )
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", 10000.0))
    return DrafterConfig(
        hidden_size=text.hidden_size,
        intermediate_size=train.intermediate_size or text.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        rms_norm_eps=1e-6,
        layers=(LayerAttention(sliding_window=train.sliding_window),) * train.num_layers,
        rope=RopeConfig(theta=theta, max_position_embeddings=text.max_position_embeddings),
        block_size=train.block_size,
        mask_token_id=train.mask_token_id,
        target_layer_ids=ids,
        num_target_layers=text.num_hidden_layers,
        target_hidden_size=text.hidden_size,
        vocab_size=vocabulary,
    )


def new_drafter(config: DrafterConfig, train: TrainConfig) -> Drafter:
    """The drafter before the first step: a checkpoint's weights, where one is started from."""
    drafter = Drafter(config)
    initialize(drafter, train.seed)
    if train.start_from is not None:
        kept = load_checkpoint(train.start_from, dtype=torch.float32).tensors
        load_tensors(drafter, {**checkpoint_tensors(drafter), **kept})
    return drafter


def initialize(drafter: Drafter, seed: int) -> None:
    """Normal weights of width 0.02, residual outputs narrower by the depth, norms at one.

    A DFlash 2 drafter begins as the DFlash drafter of the same seed: its convolutions are the
    identity, and its selector adds nothing to the logits, as one of the codebooks is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * len(drafter.layers))
    for name, parameter in drafter.named_parameters():
        if parameter.dim() < 2 or name.endswith("base_kernel"):
            continue
        if name.endswith(("kernel_projection.weight", "successor_codebook")):
            parameter.data.zero_()
            continue
        narrow = depth if ("output_proj" in name or "down_proj" in name) else 1.0
        drawn = torch.randn(parameter.shape, generator=generator) * (0.02 / narrow)
        parameter.data.copy_(drawn)


class _Pending(NamedTuple):
    """A step that the device may still be working on; values [2] are loss and τ."""

    step: int
    learning_rate: float
    values: Tensor


class Trainer:
    """Trains a drafter on the target's own sequences.

    Args:
        target: gives embedding and head, frozen.
        config: sizes and schedule.
        sequences, held_out: what to learn from, and what to measure on.
        features: the target's hidden states for a batch of ``sequences`` or ``held_out``.
        directory: where snapshots go; a run with the same configuration and data resumes there.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        config: TrainConfig,
        sequences: SequenceSet,
        held_out: SequenceSet,
        features: FeatureSource,
        held_out_features: FeatureSource,
        directory: Path,
    ) -> None:
        self.config = config
        self.sequences, self.held_out = sequences, held_out
        self.features, self.held_out_features = features, held_out_features
        self.directory = directory
        self.device: torch.device = target.device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.drafter = new_drafter(drafter_config(target, config), config).to(self.device)
        self.drafter.borrow(
            target.get_input_embeddings().weight.detach(), target.get_output_embeddings()
        )
        gamma = config.gamma or gamma_for(self.drafter.config.block_size)
        self.objective = Objective(
            self.drafter, config.weighting, gamma, config.dpace_alpha, config.selector_weight
        )
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.drafter, config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.history: list[dict[str, float]] = []

    def run(self, report: Report | None = None) -> list[dict[str, float]]:
        """Train to the end, from the last snapshot if there is one.

        Args:
            report: called after every step with step, loss, tau (of the training blocks) and
                learning_rate, and after every evaluation with held_out_tau besides.

        Returns:
            One record per evaluation.
        """
        self.resume()
        module = self._parallel()
        source = batches(
            self.sequences,
            self.config.batch_size,
            self.config.seed,
            start=self.step * self.world + self.rank,
        )
        generator = torch.Generator(device=self.device)
        waiting: _Pending | None = None
        start = time.monotonic()

        def tell(record: dict[str, float]) -> None:
            record.setdefault("seconds", time.monotonic() - start)
            if report is not None and self.rank == 0:
                report(record)

        for batch in source:
            if self.step >= self.config.steps:
                break
            generator.manual_seed(self._anchor_seed())
            pending = self._train_step(module, batch.to(self.device), generator)
            for _ in range(self.world - 1):
                next(source)
            self.step += 1
            # Reading a step's loss one step late lets the host run ahead of the device.
            if waiting is not None:
                tell(self._read(waiting))
            waiting = pending
            last = self.step == self.config.steps
            evaluating = last or self.step % self.config.eval_every == 0
            saving = last or self.step % self.config.save_every == 0
            if evaluating or saving:
                record, waiting = self._read(pending), None
                record["seconds"] = time.monotonic() - start
                if evaluating:
                    record["held_out_tau"] = self.evaluate()["tau"]
                    self.history.append(record)
                if saving:
                    self.save()
                tell(record)
        return self.history

    def _anchor_seed(self) -> int:
        return (self.config.seed * 1_000_003 + self.step) * self.world + self.rank

    def _parallel(self) -> nn.Module:
        if self.world == 1:
            return self.objective
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.objective, device_ids=ids)

    def _autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _train_step(self, module: nn.Module, batch: Any, generator: torch.Generator) -> _Pending:
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        anchors, valid = choose_anchors(batch, self.config.anchors, generator)
        blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, self.drafter.config)
        features = self.features(batch)
        with self._autocast():
            outcome = module(features, blocks)
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.clip)
        self.optimizer.step()
        mean_run = (outcome.runs * valid).sum() / valid.sum()
        return _Pending(self.step + 1, rate, torch.stack([outcome.loss.detach(), mean_run + 1]))

    def _read(self, pending: _Pending) -> dict[str, float]:
        """Wait for a step and turn it into a record."""
        loss, tau = pending.values.tolist()
        if not math.isfinite(loss):
            raise DFlashError(
                f"the loss became {loss} at step {pending.step}: lower learning_rate "
                f"({self.config.learning_rate}); the last snapshot is in {str(self.directory)!r}"
            )
        rate = pending.learning_rate
        return {"step": pending.step, "loss": loss, "tau": tau, "learning_rate": rate}

    def _learning_rate(self) -> float:
        config = self.config
        warm = max(1, round(config.steps * config.warmup))
        if self.step < warm:
            return config.learning_rate * (self.step + 1) / warm
        progress = (self.step - warm) / max(1, config.steps - warm)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Acceptance on the held-out sequences, as greedy decoding would have it.

        Drafts a block at every response position and walks each sequence: from a position with a
        run of r right drafts the next block starts r + 1 later. Where the response is the target's
        greedy output this is what the engine commits.

        Returns:
            tau, and acceptance [K]: the share of blocks whose first k drafts are all right.
        """
        committed = passes = 0
        reached = torch.zeros(self.drafter.config.num_draft_tokens)
        for group in torch.arange(len(self.held_out)).split(self.config.batch_size):
            batch = collate(self.held_out, group).to(self.device)
            anchors, valid = choose_anchors(batch, batch.longest_response, None)
            blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, self.drafter.config)
            with self._autocast():
                outcome = self.objective(self.held_out_features(batch), blocks)
            runs = outcome.runs.cpu()
            for row, count in zip(runs.tolist(), valid.sum(dim=1).tolist(), strict=True):
                committed += count
                for place in block_starts(row[:count]):
                    reached[: row[place]] += 1
                    passes += 1
        return {
            "tau": committed / max(1, passes),
            "acceptance": (reached / max(1, passes)).tolist(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "config": json.loads(self.config.model_dump_json()),
            "data": self.sequences.fingerprint(),
            "world": self.world,
        }

    def save(self) -> None:
        """Write a snapshot from which a killed run goes on; rank 0 only."""
        if self.rank != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"drafter.{k}": v for k, v in self.drafter.state_dict().items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{name}"] = value
        temporary = self.directory / "snapshot.tmp"
        meta = {"step": self.step, "history": self.history, **self._identity()}
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            temporary,
            metadata={"state": json.dumps(meta)},
        )
        os.replace(temporary, self.directory / "snapshot.safetensors")

    def resume(self) -> bool:
        """Continue from the snapshot, if one of this run is there.

        Raises:
            DFlashError: the snapshot belongs to another configuration, data set or process count.
        """
        path = self.directory / "snapshot.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["state"])
        for key, value in self._identity().items():
            if meta[key] != value:
                raise DFlashError(
                    f"{str(path)!r} was made with another {key} ({meta[key]!r} instead of "
                    f"{value!r}): give another output directory or remove the snapshot"
                )
        tensors = load_file(path)
        prefix = "drafter."
        self.drafter.load_state_dict(
            {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            state: dict[str, Tensor] = {}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{index}.{name}"]
                on_device = name != "step" or self.device.type == "cuda"
                state[name] = value.to(self.device) if on_device else value
            self.optimizer.state[parameter] = state
        self.step = cast(int, meta["step"])
        self.history = meta["history"]
        return True


def _decay_groups(drafter: Drafter, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms, biases, vectors and a convolution's channels."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith("base_kernel")
        (matrices if is_matrix else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
    return [*groups, {"params": vectors, "weight_decay": 0.0}]
