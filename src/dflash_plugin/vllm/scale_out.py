"""Spreading a server over ranks and nodes: what a drafter goes along with, and on how many ranks.

What it does not go along with is refused by name while vLLM reads its arguments, before a model is
loaded. docs/scale-out.md is the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.shards import indivisible

logger = logging.getLogger("vllm.dflash_plugin")
DRAFT_RANKS = "draft_tensor_parallel_size"


class _Refusal(NamedTuple):
    """A setting of ``EngineArgs`` that a drafter does not go along with.

    Attributes:
        setting: its name.
        is_in_use: whether a value of it spreads the server.
        why: what is missing, and the fix.
    """

    setting: str
    is_in_use: Callable[[Any], bool]
    why: str


def _is_several(value: Any) -> bool:
    return int(value or 1) > 1


_REFUSALS = (
    _Refusal(
        "pipeline_parallel_size",
        _is_several,
        "the drafter needs the target's embedding, which the first stage has, where its layers' "
        "outputs arrive, on the last: leave it at 1 and give --tensor-parallel-size",
    ),
    _Refusal(
        "prefill_context_parallel_size",
        _is_several,
        "the drafter's context is not divided by position: leave it at 1",
    ),
    _Refusal(
        "decode_context_parallel_size",
        _is_several,
        "the drafter's cache is not divided by position: leave it at 1",
    ),
    _Refusal(
        "enable_dbo",
        bool,
        "vLLM does not join the outputs of the target's layers, which the drafter reads, of two "
        "microbatches: leave --enable-dbo out",
    ),
    _Refusal(
        "ubatch_size",
        _is_several,
        "vLLM does not join the outputs of the target's layers, which the drafter reads, of "
        "several microbatches: leave --ubatch-size out",
    ),
)


def refuse_unsupported(arguments: Any) -> None:
    """Refuse the settings of ``EngineArgs`` that a drafter does not go along with.

    Args:
        arguments: vLLM's ``EngineArgs``.

    Raises:
        DFlashError: names the setting, its value and what to do.
    """
    for setting, is_in_use, why in _REFUSALS:
        value = getattr(arguments, setting)
        if is_in_use(value):
            raise DFlashError(f"{setting} is {value}, and {why}")


def choose_draft_ranks(
    config: DrafterConfig, shards: int, settings: MutableMapping[str, Any]
) -> None:
    """Have each rank hold the whole drafter where its sizes cannot be shared out.

    Args:
        config: the drafter's.
        shards: the target's tensor-parallel degree.
        settings: the speculative configuration; gets ``draft_tensor_parallel_size`` 1.

    Raises:
        DFlashError: it asks for shards of a drafter that cannot be shared out.
    """
    obstacle = indivisible(config, shards)
    asked = settings.get(DRAFT_RANKS)
    if obstacle is None or asked == 1:
        return
    if asked is not None:
        raise DFlashError(
            f"{DRAFT_RANKS} is {asked}, which does not divide {obstacle}: leave it out, or give 1 "
            "for a whole drafter on each rank"
        )
    settings[DRAFT_RANKS] = 1
    logger.info(
        "each of %d ranks runs the whole drafter: %d does not divide %s", shards, shards, obstacle
    )


def draft_shards(vllm_config: Any) -> int:
    """Ranks that share the drafter's layers: 1, or as many as share the target's."""
    ranks = vllm_config.speculative_config.draft_parallel_config.tensor_parallel_size
    return int(ranks)
