"""The table in ``seams``, applied to the installed SGLang and checked against it.

Hooks and patches of modules are applied from the table. A server that uses this project's drafter
verifies it when it starts: the launcher its hooks, and each scheduler process the rest, as far as
the features in use need it.

Functions that ask whether an object of SGLang has an attribute stand here too.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_surface import Seam, Surface
from dflash_plugin.sglang import compat
from dflash_plugin.sglang.seams import SEAMS

ENGINE = "SGLang"


def surface() -> Surface:
    """The part of the installed SGLang that this adapter depends on."""
    return _surface(compat.installed())


@cache
def _surface(version: str) -> Surface:
    return Surface(ENGINE, version, SEAMS)


def hooks(features: Collection[str] | None = None) -> list[Seam]:
    """The rows of the installed version that SGLang's ``HookRegistry`` applies.

    Args:
        features: those whose hooks are meant, or None for all.
    """
    return [
        seam
        for seam in surface().current()
        if seam.kind == "hook" and (features is None or seam.feature in features)
    ]


def verify_hooks(features: Collection[str] | None = None) -> None:
    """Check that SGLang applied our hooks; SGLang only logs one that it cannot apply.

    Args:
        features: those whose hooks are checked, or None for all.

    Raises:
        DFlashError: a hook was not applied, or the signature of its function changed.
    """
    rows = hooks(features)
    missing = [seam.name for seam in rows if not _is_wrapped(seam.name)]
    if missing:
        raise DFlashError(
            f"SGLang {compat.installed()} did not take the hooks on {', '.join(missing)}: its log "
            "above says why; install a supported version as it was published, or set "
            "DFLASH_PLUGIN=off"
        )
    for seam in rows:
        surface().record(seam.module, seam.symbol)
    _part(seam._replace(kind="subclass") for seam in rows).verify({seam.feature for seam in rows})


def verify_features(features: Collection[str]) -> None:
    """Check the functions, classes and patches that features in use in this process need.

    Raises:
        DFlashError: names what is missing, has changed or was not patched.
    """
    verify_hooks(features)
    surface().verify(features)


def verify_objects(features: Collection[str], *objects: object) -> None:
    """Check the attributes of SGLang's objects that features in use in this process need.

    Raises:
        DFlashError: names what is missing.
    """
    found = _part(seam for seam in SEAMS if seam.feature in features)
    for value in objects:
        found.verify_object(value)


def is_instance(value: object, *names: str) -> bool:
    """Whether an object is of one of SGLang's classes, by name, without importing them."""
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _is_wrapped(name: str) -> bool:
    try:
        return hasattr(pkgutil.resolve_name(name), "__wrapped__")
    except (ImportError, AttributeError):
        return False


def _part(seams: Iterable[Seam]) -> Surface:
    return Surface(ENGINE, compat.installed(), seams)


def without_lora(module: Any) -> Any:
    """A target's layer without the wrapper that LoRA puts around it."""
    return getattr(module, "base_layer", module)


def head_of(model: Any) -> Any:
    """A target model's output head, or None where it has none of that name."""
    return getattr(model, "lm_head", None)


def is_dense(head: Any) -> bool:
    """Whether a head's weight is a matrix of floating-point numbers."""
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    method = getattr(head, "quant_method", None)
    if method is not None and not isinstance(method, UnquantizedEmbeddingMethod):
        return False
    return getattr(head, "weight", None) is not None


def max_positions(config: Any) -> int:
    """Positions that a target's configuration names; 0 where it names none."""
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def model_type(config: Any) -> str:
    """The name of a target's architecture in its configuration; empty where it has none."""
    return str(getattr(config, "model_type", None) or "")


def final_norm(model: Any) -> Any:
    """The norm behind a target model's last layer, or None where it has none of that name."""
    language = getattr(model, "language_model", model)
    return getattr(getattr(language, "model", language), "norm", None)


def method_of(model: Any, name: str) -> Any:
    """A method that only some target models have, or None."""
    return getattr(model, name, None)


def layer_stack(model: Any) -> Any:
    """The part of a target model that keeps the inputs of layers, or None."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "layers_to_capture") else None


def can_return_layers(model: Any) -> bool:
    """Whether a target model hands on the inputs of layers once it is told to."""
    return hasattr(model, "capture_aux_hidden_states")
