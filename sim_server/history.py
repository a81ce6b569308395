"""The plant's historian: every published sample in memory, served by HistoryRead in pages."""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from asyncua import ua
from asyncua.server.history import HistoryManager
from asyncua.server.internal_server import InternalServer

from sim_server.ua_types import data_value, status_code, to_datetime, to_ns, to_variant

NO_STAMP: Final = -1

_POINT: Final = struct.Struct("<qqq")


class TagHistory:
    """The samples of one tag in the order of their time, oldest dropped when full.

    Parameters
    ----------
    capacity
        Samples kept at most, at least 1.
    variant_type
        Type in which the values are served.
    """

    def __init__(self, capacity: int, variant_type: ua.VariantType) -> None:
        self.variant_type = variant_type
        self._capacity = capacity
        # room to append without moving: moved once per quarter of the capacity
        room = capacity + max(1024, capacity // 4)
        self._time = np.empty(room, np.int64)
        self._source = np.empty(room, np.int64)
        self._value = np.empty(room)
        self._status = np.empty(room, np.uint32)
        self._first = 0
        self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._first

    @property
    def times_ns(self) -> npt.NDArray[np.int64]:
        """View of the times by which samples are found, int64[n], ns, never decreasing."""
        return self._time[self._first : self._stop]

    def append(self, source_ns: int, value: float, status: int, arrival_ns: int) -> None:
        """Append one sample; `NO_STAMP` as ``source_ns`` files it under its arrival."""
        if self._stop == self._time.size:
            self._move()
        time = arrival_ns if source_ns == NO_STAMP else source_ns
        at = self._stop
        if len(self) and self._time[at - 1] > time:
            # a late sample goes to its place in time, behind those of the same time
            at = self._first + int(np.searchsorted(self.times_ns, time, side="right"))
        for column, item in self._columns(time, source_ns, value, status):
            column[at + 1 : self._stop + 1] = column[at : self._stop].copy()
            column[at] = item
        self._stop += 1
        if len(self) > self._capacity:
            self._first += 1

    def load(
        self,
        source_ns: npt.NDArray[np.int64],
        value: npt.NDArray[np.float64],
        status: npt.NDArray[np.uint32],
        arrival_ns: npt.NDArray[np.int64],
    ) -> None:
        """Replace everything by these samples (all [n]); only the newest ``capacity`` are kept."""
        time = np.where(source_ns == NO_STAMP, arrival_ns, source_ns)
        order = np.argsort(time, kind="stable")[-self._capacity :]
        n = order.size
        self._first, self._stop = 0, n
        for column, items in self._columns(time, source_ns, value, status):
            column[:n] = items[order]

    def _columns(self, *items: Any) -> list[tuple[npt.NDArray[Any], Any]]:
        return list(zip((self._time, self._source, self._value, self._status), items, strict=True))

    def _move(self) -> None:
        n = len(self)
        for column in (self._time, self._source, self._value, self._status):
            column[:n] = column[self._first : self._stop].copy()
        self._first, self._stop = 0, n

    def select(self, start_ns: int | None, end_ns: int | None, with_end: bool) -> npt.NDArray[np.int64]:
        """Return positions of the samples of a time domain, newest first where it runs backwards.

        Parameters
        ----------
        start_ns, end_ns
            None is open; ``start_ns`` None or after ``end_ns`` reads backwards.
        with_end
            Whether a sample exactly at the far end belongs to it.

        Notes
        -----
        OPC UA Part 11, clause 6.5.3.2: the start belongs to the domain, the end does not unless bounds
        are asked for or both are equal.
        """
        times = self.times_ns
        with_end = with_end or start_ns == end_ns
        if start_ns is not None and (end_ns is None or start_ns <= end_ns):
            low = int(np.searchsorted(times, start_ns, "left"))
            high = times.size
            if end_ns is not None:
                high = int(np.searchsorted(times, end_ns, "right" if with_end else "left"))
            return np.arange(low, high)
        low, high = 0, times.size
        if start_ns is None:
            # reading begins at the end then, so it belongs to the domain
            if end_ns is not None:
                high = int(np.searchsorted(times, end_ns, "right"))
        else:
            high = int(np.searchsorted(times, start_ns, "right"))
            if end_ns is not None:
                low = int(np.searchsorted(times, end_ns, "left" if with_end else "right"))
        return np.arange(high - 1, low - 1, -1)

    def data_value(self, position: int) -> ua.DataValue:
        """Return one sample as the server published it."""
        at = self._first + position
        status = int(self._status[at])
        source = int(self._source[at])
        return data_value(
            to_variant(float(self._value[at]), self.variant_type, status),
            status_code(status),
            None if source == NO_STAMP else to_datetime(source),
            to_datetime(int(self._time[at])),
        )


class Historian(HistoryManager):
    """Serves HistoryRead (raw) from `TagHistory`, with stateless continuation points.

    Parameters
    ----------
    iserver
        The server it belongs to.
    page_rows
        Values in one response at most.

    Notes
    -----
    The library's own manager hands out the time of the next value as continuation point: it repeats or
    loses values of equal time and forgets how many values were asked for.  Here the point holds the time
    of the last value sent, how many values of that time were sent, and how many are still wanted.
    """

    def __init__(self, iserver: InternalServer, page_rows: int) -> None:
        super().__init__(iserver)
        self._page_rows = page_rows
        self._tags: dict[ua.NodeId, TagHistory] = {}

    async def init(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Nothing to close."""

    def add(self, node_id: ua.NodeId, history: TagHistory) -> None:
        """Serve the history of a node."""
        self._tags[node_id] = history

    async def _read_history(self, details: Any, rv: ua.HistoryReadValueId) -> ua.HistoryReadResult:
        result = ua.HistoryReadResult()
        result.HistoryData = ua.HistoryData()
        history = self._tags.get(rv.NodeId)
        if history is None:
            known = self.iserver.aspace.get(rv.NodeId) is not None
            code = "BadHistoryOperationUnsupported" if known else "BadNodeIdUnknown"
        elif not isinstance(details, ua.ReadRawModifiedDetails) or details.IsReadModified:
            code = "BadHistoryOperationUnsupported"
        else:
            code = self._read_raw(details, rv.ContinuationPoint, history, result)
        result.StatusCode = status_code(getattr(ua.StatusCodes, code))
        return result

    def _read_raw(
        self,
        details: ua.ReadRawModifiedDetails,
        point: bytes | None,
        history: TagHistory,
        result: ua.HistoryReadResult,
    ) -> str:
        start, end = _bound(details.StartTime), _bound(details.EndTime)
        wanted = int(details.NumValuesPerNode)
        if (start is None) + (end is None) + (wanted == 0) > 1:
            return "BadHistoryOperationInvalid"
        positions = history.select(start, end, bool(details.ReturnBounds))
        if point:
            if len(point) != _POINT.size:
                return "BadContinuationPointInvalid"
            time, sent, wanted = _POINT.unpack(point)
            positions = _after(history.times_ns, positions, time, sent)
        if wanted:
            positions = positions[:wanted]
        page = positions[: self._page_rows]
        result.HistoryData.DataValues = [history.data_value(int(i)) for i in page]
        if page.size == 0 and not point:
            return "GoodNoData"
        if page.size < positions.size:
            times = history.times_ns[page]
            last = int(times[-1])
            equal = int(np.count_nonzero(times == last))
            if point and equal == page.size and last == time:
                equal += sent
            result.ContinuationPoint = _POINT.pack(last, equal, wanted - page.size if wanted else 0)
        return "Good"


def _bound(stamp: datetime | None) -> int | None:
    """ns since the epoch, or None where the request leaves the bound open."""
    if stamp is None or stamp.replace(tzinfo=None) <= ua.get_win_epoch().replace(tzinfo=None):
        return None
    return to_ns(stamp)


def _after(
    times: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], time: int, sent: int
) -> npt.NDArray[np.int64]:
    """Cut off what earlier pages have sent: all before ``time`` and ``sent`` values of ``time`` itself."""
    if positions.size == 0:
        return positions
    ordered = times[positions]
    if positions[0] <= positions[-1]:
        before = int(np.searchsorted(ordered, time, "left"))
    else:
        before = int(np.searchsorted(-ordered, -time, "left"))
    return positions[before + sent :]
