"""Keys and values at fixed slots."""

from __future__ import annotations

import torch

from dflash_plugin.drafter.static_kv import KVShape, StaticKV


def test_gradients_end_where_keys_are_stored():
    """Also where the buffers were made without gradients and are written with them."""
    with torch.no_grad():
        kv = StaticKV(
            [KVShape(1, 2, 2), KVShape(1, 2, 2)], 2, 5, torch.float32, torch.device("cpu")
        )
    keys = torch.rand(2, 1, 1, 2, requires_grad=True)
    with torch.enable_grad():
        kv.write(1, keys * 2, keys * 3, kv.flat_slots(torch.tensor([[4], [0]])))
        kv.move_slots(torch.tensor([[4], [0]]), torch.tensor([[1], [1]]))
        kv.move_row(0, 1)
    found = kv.read(1, 2, 5)
    assert not any(part.requires_grad for part in found)
    assert torch.equal(found[0][1, 0, 1], (keys * 2)[0, 0, 0].detach())
    assert torch.equal(found[1][0, 0, 4], (keys * 3)[0, 0, 0].detach())
