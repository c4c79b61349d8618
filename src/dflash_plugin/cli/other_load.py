"""How much of the processor others used while something was timed."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OtherLoad:
    """Counts from its creation on; times of one process mean little beside another busy one."""

    def __init__(self) -> None:
        self._since = _clock()

    def cores(self) -> float | None:
        """Cores that other processes kept busy, on average; None where the system does not tell."""
        if self._since is None:
            return None
        now = _clock()
        assert now is not None
        seconds, busy, own = (
            later - earlier for later, earlier in zip(now, self._since, strict=True)
        )
        return max(0.0, (busy - own) / seconds) if seconds > 0 else 0.0

    def warning(self, threads: int) -> str | None:
        """What to tell about times that were taken meanwhile; None where others left room.

        Args:
            threads: that this process computes with.
        """
        others, cores = self.cores(), os.cpu_count() or 1
        if others is None or others + min(threads, cores) <= cores + 0.25:
            return None
        return (
            f"the machine was busy: other processes used {others:.1f} of {cores} cores beside the "
            f"{threads} threads of this one, so speeds and their ratio may be far off; wait, or "
            "give this process fewer threads with OMP_NUM_THREADS"
        )


def _clock() -> tuple[float, float, float] | None:
    """Seconds by the clock, of all cores' work, and of this process's."""
    try:
        fields = [int(field) for field in _STAT.read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    # user nice system idle iowait irq softirq steal
    busy = sum(fields[:8]) - fields[3] - fields[4]
    mine = os.times()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), mine.user + mine.system
