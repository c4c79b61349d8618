"""Whether a directory's files are there and whole, before anything is made of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.errors import DFlashError, reason

# Of PEFT.
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
STORE_PLAIN = "store it as float32, bfloat16 or float16"
# What safetensors calls the dtypes of torch.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def local_path(path: str | Path) -> Path:
    """A path with "~" as the home.

    Raises:
        DFlashError: the user has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DFlashError(
            f"the home in {str(path)!r} cannot be found ({reason(error)}): write the whole path"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DFlashError: missing, unreadable or not an object.
    """
    try:
        # Some editors put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text, object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        if path.with_name(ADAPTER).exists():
            raise DFlashError(
                f"{ADAPTER} is there but {path.name} is missing: this is a LoRA adapter, and a "
                "drafter takes none, so merge it into the drafter's weights"
            ) from None
        raise DFlashError(f"{path.name} is missing: give a checkpoint that has it") from None
    except DFlashError as error:
        raise DFlashError(f"{path.name}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DFlashError(
            f"{path.name} is not readable JSON ({reason(error)}): write it again"
        ) from error
    if not isinstance(raw, dict):
        raise DFlashError(f"{path.name} holds a {type(raw).__name__}: it must be a JSON object")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys stand once or have one value."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise DFlashError(
                f"{name} stands twice, as {found[name]!r} and {value!r}: leave one out"
            )
    return found


# What stands beside a checkpoint's weights, unless there is nothing else.
STRAYS = (
    "adapter",
    "consolidated",
    "ema",
    "optim",
    "random_states",
    "rng_state",
    "scaler",
    "scheduler",
    "training_args",
)
# A tensor that some write into a file of its own, which an index does not list.
MASK_EMBEDDING = "mask_embedding"


def whole_shards(directory: Path) -> list[Path]:
    """The .safetensors files that hold a directory's weights, by name; none where there are none.

    Files that the index does not list are strays, as are, without an index, those that training
    leaves.

    Raises:
        DFlashError: the index names one that is missing, or one is truncated.
    """
    shards = sorted(directory.glob("*.safetensors"))
    listed = _listed(directory, {shard.name for shard in shards})
    if listed is None:
        kept = [shard for shard in shards if not shard.name.startswith(STRAYS)] or shards
    else:
        kept = [shard for shard in shards if shard.name in listed or shard.stem == MASK_EMBEDDING]
    for shard in kept:
        try:
            _check_size(shard)
        except OSError as error:
            raise DFlashError(
                f"{shard.name} cannot be read ({reason(error)}): fetch it again"
            ) from error
    return kept


def _listed(directory: Path, shards: set[str]) -> set[str] | None:
    """The files that the index names, or None without one."""
    path = directory / INDEX
    if not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DFlashError(f"{path.name} has no weight_map: write the checkpoint again")
    listed = {str(name) for name in weight_map.values()}
    missing = sorted(listed - shards)
    if missing:
        raise DFlashError(
            f"{path.name} names {missing[0]}, which is not there: fetch it again, or remove the "
            "index if the weights are whole without it"
        )
    return listed


def _check_size(shard: Path) -> None:
    """Hold a file's size against its header; anything else that is wrong is the reader's to say."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        needed = 8
        if len(prefix) == 8:
            length = struct.unpack("<Q", prefix)[0]
            needed = 8 + length
            if needed <= size:
                try:
                    header = json.loads(file.read(length))
                    ends = [
                        entry["data_offsets"][1]
                        for name, entry in header.items()
                        if name != "__metadata__"
                    ]
                except (ValueError, AttributeError, KeyError, IndexError, TypeError):
                    return
                needed += max(ends, default=0)
    if size < needed:
        raise DFlashError(
            f"{shard.name} is truncated: {size} bytes where the header says {needed}; fetch it "
            "again"
        )


def read_header(file: Any, name: str) -> Tensor:
    """A tensor without its values, on the meta device.

    Args:
        file: an open safetensors file.
        name: of the tensor.

    Raises:
        DFlashError: its dtype is none of torch.
    """
    header = file.get_slice(name)
    dtype = _DTYPES.get(header.get_dtype())
    if dtype is None:
        raise DFlashError(f"tensor {name!r} is {header.get_dtype()}: {STORE_PLAIN}")
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")
