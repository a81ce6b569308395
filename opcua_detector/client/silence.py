"""Finds tags that are silent although they change: monitored items that a server has lost without a word.

A value that does not change is not reported, so silence alone says nothing. Some servers drop an item, and say nothing,
when its node is deleted and made anew, as a download to a PLC does. So what has been silent for long is read now and
then, and where the server's value is another one than the last that was delivered, twice with silence between, the item
is monitored anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..kernels.stamps import note_heard
from . import wire
from .items import Item
from .limits import in_batches
from .nodes import NodeRef, resolve
from .session import Session
from .wire_requests import PreparedRead, ReadFrom

SILENT_S = 60.0  # so long a tag says nothing before it is read, and again before it is monitored anew
_BAD = np.uint32(0x80000000)


class Silence:
    """When each tag was heard last, and with what.

    Parameters
    ----------
    n : columns
    clock_ns : monotonic
    """

    def __init__(self, n: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._heard_ns = np.zeros(n, np.int64)
        self._value = np.full(n, np.nan)
        self._status = np.full(n, _BAD)  # what never came is as if it were Bad
        self._suspect_ns = np.zeros(n, np.int64)  # when a tag was found to differ; it counts if it was not heard since

    def begin(self) -> None:
        """Begin anew: what is monitored from now on has said nothing yet."""
        self._heard_ns[:] = self._clock_ns()
        self._value[:], self._status[:] = np.nan, _BAD

    def heard(self, column: NDArray[np.int32], value: NDArray[np.float64], status: NDArray[np.uint32]) -> None:
        """Take note of what was delivered."""
        note_heard(self._heard_ns, self._value, self._status, column, value, status, self._clock_ns())

    async def lost(self, session: Session, items: Sequence[Item]) -> list[Item]:
        """Return those of the monitored items that the server does not report any more.

        Raises ConnectionProblem where the server cannot be asked.
        """
        limit_ns = self._clock_ns() - int(SILENT_S * 1e9)
        quiet = [item for item in items if self._heard_ns[item.column] < limit_ns]
        found = await resolve(session, [item.node for item in quiet])
        ready = [(item, ref) for item in quiet if isinstance(ref := found[item.node], NodeRef)]

        async def ask(part: Sequence[tuple[Item, NodeRef]]) -> list[tuple[float, bool]]:
            elements = np.array([item.element for item, _ in part], np.int32)
            request = PreparedRead(wire.token_of(session.client), [ReadFrom(ref.id) for _, ref in part])
            body = await wire.send_prepared(session.client, request, session.timeout_s)
            read = wire.decode_read(body, len(part), None, elements)
            return list(zip(read.value.tolist(), (read.status >= _BAD).tolist(), strict=True))

        answers = await in_batches(session, "read", ready, ask, "look after tags that are silent")
        return [
            item for (item, _), (value, bad) in zip(ready, answers, strict=True)
            if self._differs(item.column, value, bad) and self._still(item.column, limit_ns)
        ]

    def _differs(self, column: int, value: float, bad: bool) -> bool:
        last = float(self._value[column])
        same = bad == bool(self._status[column] >= _BAD) and (bad or value == last or (value != value and last != last))
        if same:
            self._suspect_ns[column] = 0
        return not same

    def _still(self, column: int, limit_ns: int) -> bool:
        """Whether a tag that differs now did so an interval ago, and has said nothing since."""
        if self._suspect_ns[column] <= self._heard_ns[column]:
            self._suspect_ns[column] = self._clock_ns()
            return False
        return bool(self._suspect_ns[column] < limit_ns)
