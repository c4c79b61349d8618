"""Changes of weights of a scheduler that runs, as its server asks for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

# What requests of every version have, beside what they ask for.
COMMON = {
    "load_format": None,
    "flush_cache": True,
    "torch_empty_cache": False,
    "weight_version": None,
    "recapture_cuda_graph": False,
    "disable_draft_model": None,
    "tags": None,
}


def take(scheduler: Any, step: dict[str, Any]) -> list[Any]:
    """Carry out one step.

    Args:
        scheduler: the scheduler.
        step: "call", a method of its updater, or "lose" for all memory of the drafter's weights;
            "fields" of the request; "tensors", directories with what to put in front of names.

    Returns:
        Whether it succeeded, and the message.
    """
    manager, fields = scheduler.weight_updater, {**COMMON, **step.get("fields", {})}
    if step["call"] == "lose":
        return lose(scheduler.draft_worker.draft_model)
    if "tensors" in step:
        named = [
            (prefix + name, tensor[:-1] if step.get("cut") == name else tensor)
            for prefix, directory in step["tensors"]
            for name, tensor in load_file(Path(directory) / "model.safetensors").items()
        ]
        return in_session(manager, step["call"], named, fields)
    # What SGLang's tokenizer fills in for a directory.
    fields["load_format"] = "auto"
    answer = getattr(manager, step["call"])(SimpleNamespace(**fields))
    return [getattr(answer, "success", True), getattr(answer, "message", "")]


def in_session(
    manager: Any, call: str, named: list[tuple[str, torch.Tensor]], fields: dict[str, Any]
) -> list[Any]:
    """Hand tensors over; from SGLang 0.5.21 on between the calls that begin and end it."""
    from sglang.srt.utils import MultiprocessingSerializer

    # SGLang makes tensors of a GPU alone ready to be sent.
    MultiprocessingSerializer.deserialize = staticmethod(lambda data: data)
    fields = {"selector": "all", **fields}
    request = SimpleNamespace(serialized_named_tensors=[named], **fields)
    sessions = hasattr(manager, "begin_weight_update")
    if sessions:
        assert manager.begin_weight_update(request).success
    answer = getattr(manager, call)(request)
    if sessions:
        assert manager.end_weight_update(request).success
    return [answer.success, answer.message]


def lose(model: Any) -> list[Any]:
    """Spoil the memory of the drafter's weights, and let it recover."""
    from dflash_plugin.serving.new_weights import restore

    stacked = model.context_weight
    for tensor in (
        *model.drafter.parameters(), *model.drafter.buffers(), model.context_bias,
        model._key_weights, *(stacked if isinstance(stacked, tuple) else [stacked]),
    ):  # fmt: skip
        if tensor is not None:
            tensor.data.zero_()
    restore(model)
    return [True, ""]
