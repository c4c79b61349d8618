"""The training loop: AdamW, cosine schedule, bf16, resumable, data-parallel under torchrun."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dflash_plugin.drafter.blockwise import block_starts, make_blocks
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import FeatureSource
from dflash_plugin.train.losses import gamma_for
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, batches, collate
from dflash_plugin.train.setup import drafter_config, new_drafter

Report = Callable[[dict[str, float]], None]


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
            target.get_input_embeddings().weight.detach(),
            target.get_output_embeddings(),
            factor=embedding_factor(target.config.get_text_config()),
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
                for start in block_starts(row[:count]):
                    reached[: row[start]] += 1
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
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["state"])
            tensors = load_file(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DFlashError(
                f"{str(path)!r} is not a whole snapshot ({reason(error)}): remove it to train from "
                "the start, or give another --output"
            ) from error
        differing = _differences(meta, self._identity())
        if differing:
            raise DFlashError(
                f"{str(path)!r} was made with {differing}: give another --output, or remove the "
                "snapshot to train from the start"
            )
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


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a snapshot's run did otherwise, setting by setting; empty where nothing."""
    before, now = found.get("config", {}), wanted["config"]
    parts = [
        f"{name} {before.get(name)!r} instead of {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if found.get("world") != wanted["world"]:
        parts.append(f"{found.get('world')} processes instead of {wanted['world']}")
    if found.get("data") != wanted["data"]:
        parts.append("other sequences")
    return ", ".join(parts)


def _decay_groups(drafter: Drafter, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms, biases, vectors and a convolution's channels."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith("base_kernel")
        (matrices if is_matrix else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
    return [*groups, {"params": vectors, "weight_decay": 0.0}]
