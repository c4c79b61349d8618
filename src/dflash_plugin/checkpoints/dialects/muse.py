"""Meta's assistant drafters, ``MuseGlimmerAssistantModel``: z-lab's layout without a vocabulary.

Source: what vLLM 0.33 and SGLang 0.5.23 read for this architecture. Its windows are not causal,
its ids count layer outputs from 0, and its ``encoder.*`` tensors are z-lab's ``fc`` and
``hidden_norm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects import common, zlab
from dflash_plugin.checkpoints.dialects.fields import Fields, section

# vLLM puts its own prefix to the name.
ARCHITECTURES = {"MuseGlimmerAssistantModel", "DFlashMuseGlimmerAssistantModel"}
MODEL_TYPE = "muse_glimmer_assistant"


def is_muse(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a drafter."""
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        return not ARCHITECTURES.isdisjoint(map(str, names))
    return raw.get("model_type") == MODEL_TYPE


def read(raw: Mapping[str, Any], shapes: common.Shapes) -> dict[str, Any]:
    """Values of a ``DrafterConfig``; ``vocab_size`` is 0, the target's, where the file has none.

    Raises:
        DFlashError: names the value that is wrong and the fix.
    """
    plain = {**raw, "architectures": [zlab.DFLASH]}
    fields = Fields(("dflash_config.", section(raw, "dflash_config")), ("", raw))
    common.require_layer_types(fields)
    if fields.get(*common.CAUSAL) is None:
        plain["is_causal"] = False
    if fields.get("vocab_size") is not None:
        return zlab.read(plain, shapes, "z-lab")
    # Any number will do: nothing that such a drafter is read for has a row a token.
    return {**zlab.read({**plain, "vocab_size": 1}, shapes, "z-lab"), "vocab_size": 0}
