"""What only a worker knows of how the two models run: attention back ends, and the draft's graphs.

vLLM chooses a back end while it loads a model, and runs the draft without a graph where its back
end has none, whatever the configuration asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dflash_plugin.serving.prometheus import WORKER_FACTS
from dflash_plugin.vllm.cache_groups import split


def worker_facts(worker: Any) -> dict[str, int]:
    """The facts of a warm worker, each as a count of 1 by "NAME:VALUE"; see ``read_facts``."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    config = worker.vllm_config
    layers = config.compilation_config.static_forward_context
    backends = {
        name: layer.get_attn_backend().get_name()
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase)
    }
    target, draft = split(config, backends)
    # The V1 runner captures no graph of the draft pass.
    runner, is_v2 = worker.model_runner, config.use_v2_model_runner
    graphs = runner.speculator.query_cudagraph_manager if is_v2 else None
    values = (
        _joined(backends[name] for name in target),
        _joined(backends[name] for name in draft),
        "yes" if graphs is not None and graphs.cudagraph_mode else "no",
    )
    return {f"{name}:{value}": 1 for name, value in zip(WORKER_FACTS, values, strict=True)}


def _joined(names: Iterable[str]) -> str:
    """Back ends of a model, of which a hybrid one has several."""
    return "+".join(sorted(set(names)))


def read_facts(counts: Iterable[str]) -> dict[str, str]:
    """The facts among the names of counts; empty where there are none."""
    found = dict(name.split(":", 1) for name in counts if name.partition(":")[0] in WORKER_FACTS)
    return {name: found[name] for name in WORKER_FACTS} if found else {}
