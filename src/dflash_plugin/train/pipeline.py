"""From a target and prompts to an exported drafter: what ``dflash-plugin train`` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt, load_prompts
from dflash_plugin.train.config import DataConfig, TrainConfig
from dflash_plugin.train.data import respond, save_prompts, write_prompts
from dflash_plugin.train.features import CachedFeatures, OnlineFeatures, cache_features
from dflash_plugin.train.sequences import SequenceSet
from dflash_plugin.train.setup import drafter_config
from dflash_plugin.train.trainer import Report, Trainer
from dflash_plugin.transformers.engine import Engine
from dflash_plugin.transformers.loading import load_target

Status = Callable[[str, int, int], None]


def distributed() -> AbstractContextManager[Any]:
    """Join the process group that torchrun announces, if it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return nullcontext()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return _ProcessGroup()


class _ProcessGroup(AbstractContextManager[None]):
    def __exit__(self, *exception: object) -> None:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and their number; (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def check_counts(data: DataConfig) -> None:
    """Find out before anything is loaded whether the data can be enough.

    Raises:
        DFlashError: there are no prompts, too few to hold some out, or a file of them is malformed
            or has no share in the mix.
    """
    count = sum(map(len, given_prompts(data).values())) + data.self_prompts
    if not count:
        raise DFlashError(
            "there is nothing to train on: give --prompts FILE.jsonl or --self-prompts N"
        )
    _check_held_out(data.held_out, count * data.samples, "prompts make at most")
    if data.samples > 1 and data.temperature == 0:
        raise DFlashError(
            f"samples is {data.samples}, which at temperature 0 would all be equal: raise the "
            "temperature"
        )


def given_prompts(data: DataConfig) -> dict[Path, list[Prompt]]:
    """The prompts of each file: all, or as many from the start as keep the shares of the mix.

    Raises:
        DFlashError: a file is malformed or given twice, or the mix has not a share for each.
    """
    found = {file: load_prompts(file) for file in data.prompts}
    if len(found) < len(data.prompts):
        raise DFlashError("prompts names a file twice: leave one out")
    if data.mix is None:
        return found
    if len(data.mix) != len(found) or min(data.mix) <= 0:
        raise DFlashError(
            f"mix is {','.join(f'{share:g}' for share in data.mix)} for {len(found)} files of "
            "prompts: give each file a share above 0"
        )
    unit = min(len(one) / share for one, share in zip(found.values(), data.mix, strict=True))
    return {
        file: prompts[: round(unit * share)]
        for (file, prompts), share in zip(found.items(), data.mix, strict=True)
    }


def _check_held_out(held_out: int, sequences: int, found: str) -> None:
    if held_out > sequences - 2:
        raise DFlashError(
            f"held_out is {held_out}, but the {found} {sequences} sequences, of which 2 are needed "
            "to train on: give more prompts or hold out fewer"
        )


def make_sequences(
    target: PreTrainedModel,
    tokenizer: Any,
    data: DataConfig,
    directory: Path,
    seed: int,
    status: Status | None = None,
) -> SequenceSet:
    """Have the target write the training data; every process writes its share.

    What is already in ``directory`` is used again, so an interrupted run goes on.

    Raises:
        DFlashError: there is nothing to write about, or what is there was made otherwise.
    """
    rank, world = rank_and_world()
    path = directory / f"sequences-{rank:02d}.safetensors"
    origin = _origin(data, target, seed, world)
    if path.is_file():
        _check_origin(path, origin)
    else:
        engine = Engine(
            target,
            max_batch=data.batch,
            max_length=data.max_prompt_tokens + data.max_new_tokens,
        )

        def tell(what: str) -> Callable[[int, int], None] | None:
            return (lambda done, of: status(what, done, of)) if status else None

        prompts: list[Prompt] = []
        for given in given_prompts(data).values():
            prompts += given[rank::world]
        if data.self_prompts:
            prompts += write_prompts(
                engine,
                tokenizer,
                -(-data.self_prompts // world),
                data.openings,
                seed=seed * world + rank,
                max_tokens=data.max_prompt_tokens // 2,
                progress=tell("prompts"),
            )
        directory.mkdir(parents=True, exist_ok=True)
        save_prompts(directory / f"prompts-{rank:02d}.jsonl", prompts)
        written = respond(
            engine,
            tokenizer,
            prompts,
            data.max_new_tokens,
            data.temperature,
            data.samples,
            seed=seed,
            max_prompt_tokens=data.max_prompt_tokens,
            progress=tell("responses"),
        )
        written.save(path, origin)
    if world > 1:
        dist.barrier()
    parts = [
        SequenceSet.load(directory / f"sequences-{other:02d}.safetensors") for other in range(world)
    ]
    return _join(parts)


def _origin(data: DataConfig, target: PreTrainedModel, seed: int, world: int) -> dict[str, Any]:
    """What decides the sequences' content."""
    return {
        **data.model_dump(mode="json", exclude={"held_out", "batch", "cache_features"}),
        "target": str(target.name_or_path),
        "seed": seed,
        "processes": world,
    }


def _check_origin(path: Path, origin: dict[str, Any]) -> None:
    found = SequenceSet.origin(path)
    for name, value in origin.items():
        if found.get(name) != value:
            raise DFlashError(
                f"{str(path)!r} was made with {name} {found.get(name)!r} instead of {value!r}: "
                "give another --output, or remove the file to have the sequences made again"
            )


def _join(parts: Sequence[SequenceSet]) -> SequenceSet:
    if len(parts) == 1:
        return parts[0]
    lengths = torch.cat([part.lengths for part in parts])
    return SequenceSet(
        torch.cat([part.tokens for part in parts]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.cat([part.prompt_lengths for part in parts]),
    )


def split(sequences: SequenceSet, held_out: int, seed: int) -> tuple[SequenceSet, SequenceSet]:
    """Training and held-out sequences, disjoint and the same for the same seed.

    Raises:
        DFlashError: fewer than two sequences would be left to train on.
    """
    _check_held_out(held_out, len(sequences), "prompts that could be used made")
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences.select(order[held_out:].sort().values), sequences.select(order[:held_out])


def train(
    target_directory: Path,
    output: Path,
    config: TrainConfig,
    data: DataConfig,
    device: str | None = None,
    status: Status | None = None,
    report: Report | None = None,
    stop_at: int | None = None,
    deadline: float | None = None,
) -> tuple[Trainer, dict[str, Any]]:
    """Make data, train, and leave snapshots in ``output/work``.

    Args:
        target_directory: the target.
        output: of the run.
        config, data: settings.
        device: the first GPU by default.
        status: called with what is done, how much of it, and of how much.
        report, stop_at, deadline: see ``Trainer.run``.

    Returns:
        The trainer, and facts for the model card.
    """
    check_counts(data)
    rank, world = rank_and_world()
    if device is None and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"
    target, tokenizer = load_target(target_directory, device=device)
    target.requires_grad_(False)
    # Before the sequences are made, so that settings which do not fit cost no time.
    layer_ids = drafter_config(target, config).target_layer_ids
    work = output / "work"
    start = time.monotonic()
    sequences = make_sequences(target, tokenizer, data, work, config.seed, status)
    seconds_data = time.monotonic() - start
    training, held_out = split(sequences, data.held_out, config.seed)
    online = OnlineFeatures(target, layer_ids)
    features: OnlineFeatures | CachedFeatures = online
    if data.cache_features:
        if rank == 0:
            cache_features(work / "features", training, online, target.device)
        if world > 1:
            dist.barrier()
        features = CachedFeatures(work / "features", training, online.layer_ids)
    trainer = Trainer(target, config, training, held_out, features, online, work)
    trainer.run(report, stop_at, deadline)
    sources = {file.name: len(prompts) for file, prompts in given_prompts(data).items()}
    if data.self_prompts:
        sources["written by the target"] = data.self_prompts
    facts = {
        "target": target_directory.name,
        "prompts": sources,
        "start_from": None if config.start_from is None else config.start_from.name,
        "processes": world,
        "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "CPU",
        "sequences": len(training),
        "response_tokens": training.num_response_tokens,
        "seconds_data": round(seconds_data, 1),
        "seconds_training": round(trainer.seconds, 1),
        "steps": config.steps,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "weighting": config.weighting,
        "anchors": config.steps * config.batch_size * config.anchors * world,
        "held_out": trainer.history[-1] if trainer.history else {},
        "history": trainer.history,
        "torch": torch.__version__,
    }
    return trainer, facts
