"""Writes every block that a worker verifies to the file that ``RECORD_DRAFTS`` names."""

import json
import os
from functools import wraps


def patch(module):
    """Wrap ``Worker`` of ``dflash_plugin.sglang.worker``."""
    native = module.Worker.forward_batch_generation

    @wraps(native)
    def recorded(self, batch, *args, **kwargs):
        decodes = not batch.forward_mode.is_extend() and not batch.is_extend_in_batch
        anchors = batch.seq_lens.tolist() if decodes else []
        rids = [request.rid for request in batch.reqs]
        result = native(self, batch, *args, **kwargs)
        if anchors:
            blocks = self._draft_block_tokens_buf[: len(anchors)].tolist()
            with open(os.environ["RECORD_DRAFTS"], "a") as file:
                for rid, anchor, block in zip(rids, anchors, blocks, strict=True):
                    file.write(json.dumps([rid, anchor, block]) + "\n")
        return result

    module.Worker.forward_batch_generation = recorded
