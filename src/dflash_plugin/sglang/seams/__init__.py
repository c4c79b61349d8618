"""Every symbol of SGLang that this adapter hooks, patches, subclasses, calls or reads.

The table is for all supported versions, one file a subject. ``surface`` applies and checks it,
and ``tests/contracts`` checks it against the source of each supported version.

Rows of kind "hook" are applied by SGLang's own ``HookRegistry``. Methods that are replaced on a
live object, and not in their module, are listed as "subclass": what holds for an override holds for
them.

Not in the table: what serves on a CPU only (``cpu``), which is for development and tests.
"""

from __future__ import annotations

from dflash_plugin.serving.engine_surface import Seam
from dflash_plugin.sglang.seams import (
    adaptive,
    block_attention,
    drafting,
    new_weights,
    prompt_graphs,
    server,
    targets,
    verifying,
)

SEAMS: tuple[Seam, ...] = (
    *server.ROWS,
    *drafting.ROWS,
    *verifying.ROWS,
    *adaptive.ROWS,
    *block_attention.ROWS,
    *new_weights.ROWS,
    *prompt_graphs.ROWS,
    *targets.ROWS,
)
