"""A vLLM on a CPU whose processes fork from its first one. As a program: the command ``vllm``.

vLLM has them start anew there, and each imports for longer than a tiny model runs.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch


@contextmanager
def forking() -> Iterator[None]:
    """Fork in this block; threads of OpenMP do not survive that, so with several nothing changes.

    Models are looked at in this process, not in another that imports them, and processes that look
    for each other's messages sleep in between, where vLLM has them keep a core busy.
    """
    import torch
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    configure = current_platform.check_and_update_config

    def configured(config: Any) -> None:
        configure(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    def called(function: Callable[[], Any]) -> Any:
        return function()

    with ExitStack() as patches:
        if current_platform.is_cpu() and torch.get_num_threads() == 1:
            patches.enter_context(
                patch.object(current_platform, "check_and_update_config", configured)
            )
            patches.enter_context(patch.object(registry, "_run_in_subprocess", called))
            patches.enter_context(
                patch.object(shm_broadcast, "sched_yield", partial(time.sleep, 0.001))
            )
            # What is here already need not be looked through each time that vLLM collects garbage.
            gc.freeze()
            patches.callback(gc.unfreeze)
        yield


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    with forking():
        main()
