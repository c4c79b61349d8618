"""Lets torchvision's Python part import next to a CPU build of torch.

The registry's torchvision is a CUDA build whose compiled part cannot load here; its Python part only needs
the schemas of two operators to exist.
"""

import importlib.abc
import os
import sys


class _DefineOpsFirst(importlib.abc.MetaPathFinder):
    defined = False

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not _DefineOpsFirst.defined:
            _DefineOpsFirst.defined = True
            import torch

            for op in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{op}",
                    "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                )
        return


sys.meta_path.insert(0, _DefineOpsFirst())

if os.environ.get("RECORD_DRAFTS"):
    import record_drafts

    from dflash_plugin.serving.after_import import after_import

    after_import("dflash_plugin.sglang.worker", record_drafts.patch)

if os.environ.get("FORK_PROCESSES"):
    # A server's processes fork from its first one, where SGLang has it that they start anew: each
    # would import for longer than a tiny model runs.
    import multiprocessing

    _native = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: _native("fork", force=True)
