"""Seeds of a request for several answers: each answer draws with its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from dflash_plugin.sglang.options import draft_model_path, drafter_spec

# Far apart, and odd: no two answers of a request meet.
STRIDE = 0x5851_F42D_4C95_7F2D
SEEDS = 1 << 62

# Answers sent so far, by the id of the parameters that a request's answers share.
_sent: dict[int, int] = {}


def spread_seeds(native: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Send one of a request's answers; the first keeps the request's seed.

    SGLang sends as many copies of the request, which would all draw alike.

    Args:
        native: ``TokenizerManager._send_one_request``.
        manager: the ``TokenizerManager``.
        request: tokenized; its parameters are shared by all answers, but for the empty answer that
            is sent before them to fill the cache.
    """
    params = request.sampling_params
    if params.n == 1 or params.sampling_seed is None or params.max_new_tokens == 0:
        return native(manager, request)
    if drafter_spec(draft_model_path(manager.server_args)) is None:
        return native(manager, request)
    index = _sent.pop(id(params), 0)
    if index + 1 < params.n:
        _sent[id(params)] = index + 1
    request.sampling_params = copy.copy(params)
    request.sampling_params.sampling_seed = (params.sampling_seed + index * STRIDE) % SEEDS
    return native(manager, request)
