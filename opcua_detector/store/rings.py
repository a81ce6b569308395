"""Preallocated rings between the loop, which must not wait, and the writer thread, which may.

One thread pushes, the writer alone moves `tail`, so no lock is needed: a slot is written before `head` shows
it, and a slot is reused only after its rows are committed. A full ring drops the new item and counts it.
"""

from __future__ import annotations

import numpy as np

from ..api import Frame, Tag, Verdict
from .chunks import Rows
from .trend import Scores


class RowRing:
    """Rows of one recording that are not committed yet.

    `seq` counts every row offered, dropped ones too, so that a reader sees the hole.

    Parameters
    ----------
    n_tags, capacity : int
    has_truth : bool; keep the ground truth of each row
    """

    def __init__(self, n_tags: int, capacity: int, has_truth: bool) -> None:
        self.capacity, self.n_tags, self.has_truth = capacity, n_tags, has_truth
        # filled, not only reserved: a page fault in the loop costs more than the whole push
        self._values = np.full((capacity, n_tags), np.nan)
        self._valid = np.full((capacity, n_tags), 0, np.uint8)
        self._status = np.full((capacity, n_tags), 0, np.uint32)
        self._source_ns = np.full(capacity, 0, np.int64)
        self._seq = np.full(capacity, 0, np.int64)
        self._gap = np.full(capacity, 0, np.uint8)
        self._truth = np.full(capacity, 0, np.uint8)
        self.head = self.tail = 0
        self.room = capacity  # -1 once the recording has ended: whatever still comes is dropped and counted
        self.dropped = self.out_of_order = self.rejected = 0
        self._offered = 0
        self._last_ns = -(1 << 63)

    def push(self, frame: Frame, truth: int) -> bool:
        """Copy one row; False where it was dropped (and counted)."""
        seq = self._offered
        self._offered = seq + 1
        head, source_ns = self.head, frame.source_ns
        if head - self.tail >= self.room:
            self.dropped += 1
            return False
        if source_ns <= self._last_ns and not frame.gap:
            self.out_of_order += 1
            return False
        at = head % self.capacity
        try:
            self._values[at] = frame.values
            self._valid[at] = frame.valid
            self._status[at] = frame.status
            self._truth[at] = truth
        except (ValueError, TypeError, OverflowError):
            self.rejected += 1
            return False
        self._source_ns[at] = self._last_ns = source_ns
        self._seq[at] = seq
        self._gap[at] = frame.gap
        self.head = head + 1
        return True

    def peek(self, head: int) -> Rows:
        """Return copies of the rows from tail to `head`."""
        index = np.arange(self.tail, head) % self.capacity
        return Rows(
            self._seq[index],
            self._source_ns[index],
            self._values[index],
            self._valid[index],
            self._status[index],
            self._gap[index],
            self._truth[index] if self.has_truth else None,
        )


class VerdictRing:
    """Verdicts of one monitor that are not committed yet: time, score, status, alert, event number."""

    def __init__(self, monitor: str, capacity: int) -> None:
        self.monitor, self.capacity = monitor, capacity
        self._source_ns = np.full(capacity, 0, np.int64)
        self._score = np.full(capacity, np.nan)
        self._status = np.full(capacity, 0, np.uint32)
        self._alert = np.full(capacity, 0, np.uint8)
        self._event_no = np.full(capacity, 0, np.int64)
        self.head = self.tail = 0
        self.dropped = self.rejected = 0

    def push(self, verdict: Verdict) -> bool:
        """Copy one verdict; False where it was dropped (and counted)."""
        head = self.head
        if head - self.tail >= self.capacity:
            self.dropped += 1
            return False
        at = head % self.capacity
        try:
            self._source_ns[at] = verdict.source_ns
            self._score[at] = verdict.score
            self._status[at] = verdict.status
            self._alert[at] = verdict.alert
            self._event_no[at] = verdict.event_no
        except (ValueError, TypeError, OverflowError):
            self.rejected += 1
            return False
        self.head = head + 1
        return True

    def peek(self, head: int) -> Scores:
        """Return copies of the verdicts from tail to `head`."""
        index = np.arange(self.tail, head) % self.capacity
        return Scores(
            self._source_ns[index],
            self._score[index],
            self._status[index],
            self._alert[index],
            self._event_no[index],
        )


class Recording:
    """A recording that is being written: what `Store.offer_row` takes.

    id, name : change when the source clock goes back and the store continues in a new recording
    """

    def __init__(
        self, recording_id: int, name: str, tags: tuple[Tag, ...], period_ns: int, ring: RowRing
    ) -> None:
        self.id, self.name, self.tags, self.period_ns, self.ring = recording_id, name, tags, period_ns, ring
        self.first_name = name
        # the writer's own, as of the last commit
        self.last_ns = -(1 << 63)
        self.small_rows = self.small_chunks = 0
        self.ending = False
