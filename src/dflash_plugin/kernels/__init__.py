"""Small Triton kernels, one op a file, each with its naive torch twin beside it.

``dflash_plugin.kernels.<op>`` holds ``<op>`` and ``<op>_naive``, which take the same arguments.
Op files import Triton; this file does not.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

# Looked for once: an engine that compiles the drafter traces the question, not a search.
_HAS_TRITON = find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``; callers use the twins where they do not."""
    return device.type == "cuda" and _HAS_TRITON
