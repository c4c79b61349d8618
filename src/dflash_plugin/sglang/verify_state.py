"""The state that SGLang keeps of a recurrent target for every row of a verify pass.

Rejected drafts cannot be taken out of a recurrent state. SGLang therefore keeps the state after
each row of a pass, for as many requests as may run, and commits the one of the last accepted row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from dflash_plugin.sglang.seams.features import VERIFY_STATE
from dflash_plugin.sglang.surface import verify_features

# What a request keeps between passes, whether blocks are verified or not.
LASTING = ("conv", "temporal")
GIB = 2**30


@dataclass(frozen=True)
class VerifyState:
    """Size of the state.

    Attributes:
        total: bytes.
        recurrent: bytes of the recurrent states alone; 0 where SGLang replays them instead.
        slots: requests that may run, and one that takes what padding writes.
        rows: of a pass for each request.
        itemsize: bytes of a number of the recurrent states.
    """

    total: int
    recurrent: int
    slots: int
    rows: int
    itemsize: int

    def limited(self, *, rows: int | None = None, slots: int | None = None, item: int = 0) -> int:
        """Bytes at most with fewer rows, fewer slots or smaller numbers of the recurrent states."""
        share = (rows or self.rows) / self.rows * (item or self.itemsize) / max(1, self.itemsize)
        share *= (slots or self.slots) / self.slots
        return self.total - self.recurrent + round(share * self.recurrent)

    def describe(self) -> str:
        """The line of the log, with the flags that make it smaller."""
        requests = self.slots - 1
        line = (
            f"the target's state for verify passes takes {self.total / GIB:.2f} GiB: {self.rows} "
            f"rows for each of {requests} requests"
        )
        if not self.recurrent:
            return line
        sizes = {}
        if self.rows > 2:
            rows = max(2, self.rows // 2)
            sizes[f"--speculative-num-draft-tokens {rows}"] = self.limited(rows=rows)
        if self.itemsize > 2:
            sizes["--mamba-ssm-dtype bfloat16"] = self.limited(item=2)
        if requests > 1:
            half = requests // 2
            sizes[f"--max-running-requests {half}"] = self.limited(slots=half + 1)
        less = [f"{flag} ({size / GIB:.2f} GiB), " for flag, size in sizes.items()]
        rest = (self.total - self.recurrent) / GIB
        replay = f"--enable-linear-replayssm-spec ({rest:.2f} GiB and its own rings)"
        return f"{line}; less with {''.join(less)}{'or ' if less else ''}{replay}"


def verify_state(pool: Any) -> VerifyState | None:
    """The state of a target's request pool, or None where the target keeps none.

    Args:
        pool: SGLang's ``ReqToTokenPool``; that of a recurrent target has a ``MambaPool`` too.
    """
    states = vars(pool).get("mamba_pool")
    if states is None:
        return None
    verify_features({VERIFY_STATE})
    cache = states.mamba_cache
    windows = vars(cache).get("intermediate_conv_window")
    if not windows:
        return None
    kept = {field.name: getattr(cache, field.name) for field in fields(cache)}
    recurrent = kept["intermediate_ssm"]
    return VerifyState(
        total=sum(_bytes(value) for name, value in kept.items() if name not in LASTING),
        recurrent=_bytes(recurrent),
        slots=int(windows[0].shape[1]),
        rows=int(windows[0].shape[2]),
        itemsize=0 if recurrent is None else recurrent.element_size(),
    )


def _bytes(value: Tensor | list[Tensor] | None) -> int:
    """Bytes of memory; windows that overlap share it."""
    tensors = [] if value is None else value if isinstance(value, list) else [value]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
