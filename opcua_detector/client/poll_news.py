"""What the answer to a poll tells: which values are news, which rest, and whether values in between were missed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .wire_columns import NO_STAMP

HOLE = 1.5  # periods without an answer, in which a row may have had no sample of its own
NEVER = np.iinfo(np.int64).min // 2

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


class News:
    """Tells which values of polls are news and which *rest*.

    News has another stamp than at the last poll. Where polls come as often as rows, the others rest. Where they come
    more often, a row must not close with the old value of a tag that is about to change: what rests is what has not
    changed for `REST` periods. It is handed on beside news, so that no row waits for it, and alone once per period. A
    value or status that changes under the same stamp, which some servers never renew, is handed on at once, as what
    rests: its stamp says nothing of the change.

    Parameters
    ----------
    every_ns : from one poll to the next; period_ns : of the rows
    """

    REST = 1.5

    def __init__(self, every_ns: int, period_ns: int) -> None:
        often = every_ns < period_ns
        self._rest_ns, self._alone_ns = (int(self.REST * period_ns), period_ns) if often else (0, 0)
        self._steps = Steps(period_ns)
        self.forget()

    def forget(self) -> None:
        """Begin anew: the next value of each tag is news."""
        self._raw, self._handed_ns = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._changed_ns = np.zeros(0, np.int64)
        self._value, self._status = np.zeros(0), np.zeros(0, np.uint32)
        self._steps.forget()

    def of(
        self, column: Int32, raw: Int64, value: NDArray[np.float64], status: NDArray[np.uint32], now_ns: int, *,
        hole: bool = False,
    ) -> tuple[Bool, Bool, bool]:
        """Return bool[m], bool[m], bool: which values of an answer are news, which are handed on as resting, a hole.

        Behind a hole everything is handed on.

        column : int32[m]; raw : int64[m]; stamps as the server tells them, NO_STAMP where it tells none; value :
        float64[m]; status : uint32[m]; now_ns : monotonic; hole : whether there was one before this answer
        """
        if column.max() >= len(self._raw):
            self._widen(int(column.max()) + 1)
        known = self._value[column]
        other = (value != known) & ~(np.isnan(value) & np.isnan(known)) | (status != self._status[column])
        changed_ns = self._changed_ns[column]
        news = (raw != self._raw[column]) | (changed_ns == NEVER) | (other & (raw == NO_STAMP))
        timed = news & (raw != NO_STAMP) & (self._raw[column] != NO_STAMP) & (changed_ns != NEVER)
        if timed.any():
            hole |= self._steps.missed(
                column[timed], (raw - self._raw[column])[timed], (now_ns - changed_ns)[timed])
        self._raw[column], self._value[column], self._status[column] = raw, value, status
        self._changed_ns[column[news | other]] = now_ns
        rests = now_ns - self._changed_ns[column] >= self._rest_ns
        if not news.any():
            rests &= now_ns - self._handed_ns[column] >= self._alone_ns
        rests = ~news & (rests | other | hole)
        self._handed_ns[column[rests]] = now_ns
        return news, rests, hole

    def _widen(self, n: int) -> None:
        more = n - len(self._raw)
        self._raw, self._value = np.append(self._raw, np.zeros(more, np.int64)), np.append(self._value, np.zeros(more))
        self._status = np.append(self._status, np.zeros(more, np.uint32))
        self._changed_ns = np.append(self._changed_ns, np.full(more, NEVER))
        self._handed_ns = np.append(self._handed_ns, np.full(more, NEVER))
        self._steps.widen(n)


class Steps:
    """Tells by their stamps whether values of tags that move with the rows were missed between two polls.

    A step is the distance of the stamps of two values that were read one after the other. Values were missed where the
    steps of most tags that move evenly are longer than usual by half, or where most of those that changed a moment ago
    go on faster than our clock, by more than `HOLE` periods: the source catches up. One tag among many is no sign: its
    stamps may be wild. A tag that takes other steps for long has changed its ways.

    Parameters
    ----------
    period_ns : of the rows
    """

    EVEN, LONGER = 0.2, 1.5  # of the usual step
    SURE, MOST = 5, 8  # even steps until they are usual, and those that are remembered
    ODD = 3  # even steps that one of any length takes back; one of several usual steps takes back one

    def __init__(self, period_ns: int) -> None:
        self._hole_ns = int(HOLE * period_ns)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._usual, self._sure = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def widen(self, n: int) -> None:
        """Make room for columns below n."""
        more = np.zeros(n - len(self._usual), np.int64)
        self._usual, self._sure = np.append(self._usual, more), np.append(self._sure, more)

    def missed(self, column: Int32, step_ns: Int64, since_ns: Int64) -> bool:
        """Return whether values were missed before these.

        column : int32[m]; step_ns : int64[m]; since_ns : int64[m]; on our clock, since the value before was read
        """
        usual, sure = self._usual[column], self._sure[column]
        evenly = (sure >= self.SURE) & (usual <= self._hole_ns)
        longer = evenly & (step_ns > self.LONGER * usual)
        of_late = since_ns <= self._hole_ns
        faster = of_late & (step_ns - since_ns > self._hole_ns)
        times = np.maximum(1, np.rint(step_ns / np.maximum(1, usual)))
        even = np.abs(step_ns - times * usual) <= self.EVEN * usual
        sure = np.where(even & (times == 1), np.minimum(sure + 1, self.MOST), sure - np.where(even, 1, self.ODD))
        self._usual[column] = np.where(sure <= 0, step_ns, usual)
        self._sure[column] = np.maximum(sure, 1)
        return bool(2 * longer.sum() > evenly.sum() or 2 * faster.sum() > of_late.sum())
