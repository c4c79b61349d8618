"""What config.json and hf_quant_config.json say of a checkpoint's quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.errors import OFF, DFlashError

MODELOPT_FILE = "hf_quant_config.json"
COMPRESSED_TENSORS = "compressed-tensors"
_KEYS = ("quantization_config", "compression_config")
_FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
)
_ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "NVFP4",
    "W4A16_NVFP4",
    "MIXED_PRECISION",
)


class Declared(NamedTuple):
    """What a checkpoint's files declare; the tensors decide the rest.

    Attributes:
        method: "compressed-tensors", "modelopt" or "fp8"; None where nothing is declared.
        packed_bits: sizes that packed integers may have.
        block: rows and columns of a block with one scale.
        asymmetric: every weight has a zero point.
    """

    method: str | None = None
    packed_bits: tuple[int, ...] = (4, 8)
    block: tuple[int, int] = (128, 128)
    asymmetric: bool = False


def refusal(what: str) -> DFlashError:
    """The error for quantised weights that cannot be read."""
    return DFlashError(
        f"the weights are quantised, and {what}: give the checkpoint in bfloat16, float16 or "
        f"float32, or in a layout that docs/checkpoints.md lists; {OFF}"
    )


def declared(raw: Mapping[str, Any], directory: Path) -> Declared:
    """Read what a checkpoint declares of its quantisation.

    Args:
        raw: config.json.
        directory: may hold hf_quant_config.json.

    Raises:
        DFlashError: the method, or something about it, is not read.
    """
    found: dict[str, Declared] = {}
    for place, section in sections(raw, directory):
        if not isinstance(section, dict):
            raise refusal(f"{place} is {section!r}, not a JSON object")
        found[place] = _read(place, section)
    methods = {one.method: place for place, one in found.items()}
    if len(methods) > 1:
        said = " but ".join(f"{place} says {method!r}" for method, place in methods.items())
        raise refusal(f"{said}, so one of them is wrong")
    # All of them say the same; the first says the most.
    return next(iter(found.values()), Declared())


def sections(raw: Mapping[str, Any], directory: Path) -> Iterator[tuple[str, Any]]:
    """Where a checkpoint declares its quantisation, and what it says there.

    Args:
        raw: config.json.
        directory: may hold hf_quant_config.json.
    """
    inner = raw.get("transformer_layer_config")
    layers = inner if isinstance(inner, dict) else {}
    for prefix, section in (("", raw), ("transformer_layer_config.", layers)):
        for key in _KEYS:
            if section.get(key):
                yield prefix + key, section[key]
    path = directory / MODELOPT_FILE
    if path.is_file():
        yield MODELOPT_FILE, {"quant_method": "modelopt", **read_json(path)}


def _read(place: str, section: Mapping[str, Any]) -> Declared:
    method = str(section.get("quant_method") or "").lower().replace("_", "-")
    if not method and "config_groups" in section:
        method = COMPRESSED_TENSORS
    if method == COMPRESSED_TENSORS:
        return _compressed_tensors(place, section)
    if method in ("modelopt", "modelopt-fp4", "modelopt-fp8"):
        return _modelopt(place, section)
    if method == "fp8":
        return _fp8(place, section)
    if not method:
        raise refusal(f"{place} has no quant_method")
    raise refusal(f"{place} names the method {section['quant_method']!r}, which is not read")


def _compressed_tensors(place: str, section: Mapping[str, Any]) -> Declared:
    sparsity = _object(section.get("sparsity_config")).get("format", "dense")
    if sparsity != "dense":
        raise refusal(f"{place} names the sparsity format {sparsity!r}, which is not read")
    if _object(section.get("transform_config")).get("config_groups"):
        raise refusal(f"{place} has a transform_config, whose transforms are not read")
    groups = [one for one in _object(section.get("config_groups")).values() if _object(one)]
    for name in (section.get("format"), *(group.get("format") for group in groups)):
        if name is not None and name not in _FORMATS:
            raise refusal(f"{place} names the format {name!r}, which is not read")
    weights = [_object(group.get("weights")) for group in groups if group.get("weights")]
    kinds = [(str(one.get("type", "int")).lower(), one.get("num_bits", 8)) for one in weights]
    for kind, bits in kinds:
        if kind not in ("int", "float") or bits not in (4, 8):
            raise refusal(
                f"{place} names weights of num_bits {bits!r} ({kind}), which are not read"
            )
    packed = sorted({bits for kind, bits in kinds if kind == "int"})
    blocks = [one["block_structure"] for one in weights if one.get("block_structure")]
    if any(block != blocks[0] for block in blocks):
        raise refusal(f"{place} names blocks of different sizes {blocks}, which are not read")
    return Declared(
        COMPRESSED_TENSORS,
        tuple(packed) or Declared().packed_bits,
        _block(place, blocks[0] if blocks else None),
        bool(weights) and all(one.get("symmetric", True) is False for one in weights),
    )


def _modelopt(place: str, section: Mapping[str, Any]) -> Declared:
    said = _object(section.get("quantization")) or section
    layers = _object(said.get("quantized_layers")).values()
    for one in (said, *map(_object, layers)):
        algorithm = one.get("quant_algo")
        if algorithm and str(algorithm).upper() not in _ALGORITHMS:
            raise refusal(f"{place} names quant_algo {algorithm!r}, which is not read")
    return Declared("modelopt")


def _fp8(place: str, section: Mapping[str, Any]) -> Declared:
    if section.get("fmt") not in (None, "e4m3"):
        raise refusal(f"{place} names fmt {section['fmt']!r}, which is not read")
    return Declared("fp8", block=_block(place, section.get("weight_block_size")))


def _block(place: str, said: Any) -> tuple[int, int]:
    if said is None:
        return Declared().block
    # Old files write "128x128".
    match said.split("x") if isinstance(said, str) else said:
        case [str(rows), str(columns)] if rows.isdecimal() and columns.isdecimal():
            return int(rows), int(columns)
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise refusal(f"{place} names blocks of {said!r}, which are not two sizes")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
