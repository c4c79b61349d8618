"""The training loop: bf16 on a GPU, resumable, data-parallel under torchrun."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dflash_plugin.drafter.blockwise import block_starts, make_blocks
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.features import FeatureSource
from dflash_plugin.train.losses import gamma_for
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.optimizer import learning_rate, make_optimizers, set_rate
from dflash_plugin.train.sequences import SequenceSet, batches, collate
from dflash_plugin.train.setup import block_attention, drafter_config, new_drafter
from dflash_plugin.train.snapshot import load_snapshot, save_snapshot

LOG = "log.jsonl"
# Steps between two looks at rank 0's clock where several processes must stop after the same step.
AGREE_EVERY = 10
Record = dict[str, Any]
Report = Callable[[Record], None]


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
            self.drafter,
            config.weighting,
            gamma,
            config.dpace_alpha,
            config.selector_weight,
            block_attention(self.drafter.config, config, self.device),
        )
        self.optimizers = make_optimizers(self.drafter, config)
        self.step = 0
        self.seconds = 0.0
        self.history: list[Record] = []

    def run(
        self,
        report: Report | None = None,
        stop_at: int | None = None,
        deadline: float | None = None,
    ) -> list[Record]:
        """Train to the end, from the last snapshot if there is one.

        Args:
            report: called after every step with step, loss, tau (of the training blocks),
                learning_rate and seconds (of all starts of the run), and after every evaluation
                with held_out_tau and held_out_acceptance besides.
            stop_at: step after which the run leaves a snapshot and stops; the end when None.
            deadline: time of ``time.monotonic`` from which on it does so after its next step.

        Returns:
            One record per evaluation. ``LOG`` in the directory holds the same, a line each.
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
        start = time.monotonic() - self.seconds
        end = self.config.steps if stop_at is None else min(stop_at, self.config.steps)

        def tell(record: Record) -> None:
            record.setdefault("seconds", time.monotonic() - start)
            if report is not None and self.rank == 0:
                report(record)

        for batch in source:
            if self.step >= end:
                break
            generator.manual_seed(self._anchor_seed())
            pending = self._train_step(module, batch.to(self.device), generator)
            for _ in range(self.world - 1):
                next(source)
            self.step += 1
            if deadline is not None and self._is_past(deadline):
                end = self.step
            # Reading a step's loss one step late lets the host run ahead of the device.
            if waiting is not None:
                tell(self._read(waiting))
            waiting = pending
            last = self.step == self.config.steps
            evaluating = last or self.step % self.config.eval_every == 0
            saving = self.step == end or self.step % self.config.save_every == 0
            if evaluating or saving:
                record, waiting = self._read(pending), None
                if evaluating:
                    found = self.evaluate()
                    record["held_out_tau"] = found["tau"]
                    record["held_out_acceptance"] = found["acceptance"]
                self.seconds = record["seconds"] = time.monotonic() - start
                if evaluating:
                    self.history.append(record)
                    self._write_log()
                if saving:
                    self.save()
                tell(record)
        return self.history

    def _is_past(self, deadline: float) -> bool:
        """Whether it is too late for another step, the same in every process."""
        past = time.monotonic() >= deadline
        if self.world == 1:
            return past
        if self.step % AGREE_EVERY:
            return False
        flag = torch.tensor(int(past), device=self.device)
        dist.broadcast(flag, src=0)
        return bool(flag)

    def _write_log(self) -> None:
        """Write the whole log, so that it holds no record of steps that a kill undid."""
        if self.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(record) + "\n" for record in self.history]
            (self.directory / LOG).write_text("".join(lines))

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
        rate = learning_rate(self.config, self.step)
        set_rate(self.optimizers, rate)
        anchors, valid = choose_anchors(batch, self.config.anchors, generator)
        blocks = make_blocks(batch.tokens, batch.lengths, anchors, valid, self.drafter.config)
        features = self.features(batch)
        with self._autocast():
            outcome = module(features, blocks)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        mean_run = (outcome.runs * valid).sum() / valid.sum()
        return _Pending(self.step + 1, rate, torch.stack([outcome.loss.detach(), mean_run + 1]))

    def _read(self, pending: _Pending) -> Record:
        """Wait for a step and turn it into a record."""
        loss, tau = pending.values.tolist()
        if not math.isfinite(loss):
            raise DFlashError(
                f"the loss became {loss} at step {pending.step}: lower learning_rate "
                f"({self.config.learning_rate}); the last snapshot is in {str(self.directory)!r}"
            )
        rate = pending.learning_rate
        return {"step": pending.step, "loss": loss, "tau": tau, "learning_rate": rate}

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
        """Write a snapshot from which a stopped run goes on; rank 0 only."""
        if self.rank == 0:
            state = {"step": self.step, "history": self.history, "seconds": self.seconds}
            meta = {**state, **self._identity()}
            save_snapshot(self.directory, self.drafter, self.optimizers, meta)

    def resume(self) -> bool:
        """Continue from the snapshot, if one of this run is there.

        Order and anchors follow from seed and step, so weights, optimizer state and the number of
        steps are all that a run consists of.

        Raises:
            DFlashError: the snapshot belongs to another configuration, data set or process count.
        """
        meta = load_snapshot(self.directory, self.drafter, self.optimizers, self._identity())
        if meta is None:
            return False
        self.step, self.history = meta["step"], meta["history"]
        self.seconds = meta.get("seconds", 0.0)
        return True
