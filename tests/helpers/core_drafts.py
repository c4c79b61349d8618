"""What the float32 core drafts at places of a text."""

from __future__ import annotations

from typing import Any

import torch

from dflash_plugin.drafter.selector import Proposal
from dflash_plugin.drafter.static_store import StaticStore


def core_drafts(reference: dict[str, Any], text: list[int], anchors: list[int]) -> list[Any]:
    """The core's drafts and their margins for anchors at positions of a text.

    Args:
        reference: holds the "target" and a "drafter" bound to it.
        text: token ids.
        anchors: positions in it.
    """
    found = []
    for proposal in core_proposals(reference, text, anchors):
        best = proposal.scores[0].topk(2, dim=-1).values
        found.append((proposal.tokens[0].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    return found


def core_proposals(
    reference: dict[str, Any], text: list[int], anchors: list[int]
) -> list[Proposal]:
    """What the core proposes greedily, one block for each anchor; arguments as ``core_drafts``'."""
    drafter, target = reference["drafter"], reference["target"]
    ids = torch.tensor([text])
    out = target(input_ids=ids, use_cache=False, output_hidden_states=True)
    layers = drafter.config.target_layer_ids
    length = max(512, len(text) + drafter.config.block_size)
    features = torch.cat([out.hidden_states[layer + 1] for layer in layers], dim=-1)
    kept, found = drafter.store, []
    try:
        for anchor in anchors:
            drafter.store = StaticStore(drafter, 1, length, torch.float32, torch.device("cpu"))
            drafter.inject(features[:, :anchor], torch.arange(anchor)[None])
            place = ids[0, anchor : anchor + 1], torch.tensor([anchor])
            found.append(drafter.propose(drafter.draft(*place), *place))
    finally:
        drafter.store = kept
    return found
