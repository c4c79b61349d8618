"""Processes of vLLM that look for each other's messages sleep in between: others get the core.

Put this folder on PYTHONPATH; ``forking.py`` does the same in the processes that fork.
"""

import time
from functools import partial

from dflash_plugin.serving.after_import import after_import


def _sleep(module):
    module.sched_yield = partial(time.sleep, 0.001)


after_import("vllm.distributed.device_communicators.shm_broadcast", _sleep)
