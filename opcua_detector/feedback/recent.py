"""The last rows of a group, kept for feedback on an alert of this moment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..api import Frame, Int64, Record, Tag


class RecentRows:
    """The last rows of a group, copied from its frames: what a new monitor is primed with, and an alert just now."""

    def __init__(self, tags: Sequence[Tag], period_ns: int, rows: int) -> None:
        self.tags, self.period_ns, self.seq = tuple(tags), period_ns, 0
        n = max(2, rows)
        self._values = np.full((n, len(self.tags)), np.nan)
        self._valid = np.zeros((n, len(self.tags)), np.uint8)
        self._ns, self._gap = np.zeros(n, np.int64), np.zeros(n, np.uint8)

    def offer(self, frame: Frame) -> None:
        """Copy one row."""
        at = self.seq % len(self._ns)
        self._values[at], self._valid[at] = frame.values, frame.valid
        self._ns[at], self._gap[at] = frame.source_ns, frame.gap
        self.seq += 1

    def record(self, after: int = 0) -> Record:
        """Return a copy of the rows with number > `after` (rows count from 1) that are still there."""
        n = min(self.seq - after, self.seq, len(self._ns))
        order: Int64 = np.arange(self.seq - n, self.seq, dtype=np.int64) % len(self._ns)
        gap = self._gap[order]
        if after == 0 and len(gap):
            gap[0] = 1
        return Record(self.tags, self.period_ns, self._ns[order], self._values[order], self._valid[order], gap)
