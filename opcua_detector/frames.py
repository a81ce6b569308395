"""The rule of time: samples with stamps of their own become rows on one regular grid.

Why: real servers stamp each item by itself and report on change. The methods need rows. This file is the only
place where the one becomes the other, for the live connection, for history, for recordings and for CSVs, and
all four use one compiled state machine (`opcua_detector.kernels.rows`), so that replay equals live.

The rule, for period P:

1. *Grid.* Rows stand at g_k = g_0 + k P. The phase of g_0 is the middle of the stamps of the first
   periods (`START_PERIODS`), so that jitter and skew fall to both sides; with exact stamps it is the first
   stamp. Values that were set long before (a set-point of yesterday) start no rows, they are held into the
   first one.
2. *Value.* Row k takes for each tag the newest sample stamped at or before g_k + P/2, so skews below P/2
   vanish; a tag without one is held.
3. *Closing.* Row k closes at once when every tag that is due has reported for it or later, and in any case
   when the newest stamp of all tags reaches g_k + P/2 + lateness. A tag is due when it has reported within
   max_hold, and, if its last intervals were even, when the shortest of them has passed: a slow tag costs no
   waiting between its samples, one that went silent costs none after max_hold. One that reports on change is
   waited for.
4. *Late.* A sample older than one already used by its tag is dropped; of two with the same stamp the later
   arrival wins; one that comes after its row closed is held into the next.
5. *Quality.* A Bad sample does what the tag's `quality` says: the last value before it is held, the tag is masked, or
   the rows stop; an Uncertain one what its `uncertain` says, by default it is used. NaN and infinity are masked.
   *Stale.* A measured, counter or angle tag without a sample for more than max_hold periods is not valid; set-points,
   commands and states are held for as long as the connection lives. `stale_after_ns` is the tag's own limit, of either
   kind; a value that is held over a Bad sample ends with it too.
6. *Gap.* No sample of any tag for more than max_hold periods, a lost connection, or a Bad sample of a tag
   with quality `stop`: the next row carries the gap flag. The grid keeps its phase; the rows of such a hole
   are not made, those of a shorter one are held. While a connection is idle, `advance` makes held rows up to
   max_hold. A lost connection lasts until every tag that it carried and that had delivered has delivered again, with
   whatever status, or for `RETURN_NS` of rows at most: subscriptions come back one after the other, and a row of some
   of the tags is none that a method has learnt.
7. *Clock set back.* When nothing but stamps older than max_hold arrives, the grid starts again there, as a
   gap.

Every sample is accounted for: delivered = used + late + duplicate + replaced + skipped + `pending`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .api import Float64, Frame, Int64, Record, Tag, TagKind, UInt8, UInt32
from .errors import RecordError
from .kernels import rows as _k

START_PERIODS = 8
# From the first row after a loss: a server that sends its first values later than this does not have them.
RETURN_NS = 10 * 10**9
_BAD = 0x80000000
_POLICY = {"hold": _k.POLICY_HOLD, "mask": _k.POLICY_MASK, "stop": _k.POLICY_STOP, "use": _k.POLICY_USE}
_NO_INDEX = np.empty(0, np.int32)
_NO_STAMPS = np.empty(0, np.int64)
_NO_VALUES = np.empty(0, np.float64)
_NO_STATUS = np.empty(0, np.uint32)
# What is counted of a row when it closes; a row that is withheld takes it back.
_OF_ROWS = np.array([_k.C_HELD, _k.C_MASKED, _k.C_STALE, _k.C_ROWS, _k.C_GAPS])

# What makes a hold, of the state of a tag.
_OF_HOLD = (_k.STAMP, _k.SLOT, _k.STATUS, _k.KNOWN, _k.USED, _k.GOOD_SLOT, _k.HAS_GOOD)

Int32 = NDArray[np.int32]
COUNTERS = _k.COUNTERS


class FrameBuilder:
    """Turns samples into rows; feed it with `push`, drain it with `next_row` or `closed` after every call.

    Parameters
    ----------
    tags : the columns, in order; kind and quality policy decide how each is held
    period_ns : int; the grid
    lateness_ns : int; how long a row waits for tags that are due
    max_hold : int; periods before a tag is stale and before a hole is a gap
    rows : int; rows of output kept before the caller must drain; a longer burst goes on after draining

    Attributes
    ----------
    counts : uint64[len(COUNTERS)]; see `COUNTERS`
    """

    def __init__(
        self, tags: Sequence[Tag], period_ns: int, lateness_ns: int, max_hold: int, *, rows: int = 64
    ) -> None:
        if not tags or period_ns < 2 or lateness_ns < 0 or max_hold < 1:
            raise ValueError("at least one tag, period >= 2 ns, lateness >= 0 and max_hold >= 1")
        n = len(tags)
        self.tags = tuple(tags)
        self.period_ns, self.lateness_ns, self.max_hold = int(period_ns), int(lateness_ns), int(max_hold)
        self.counts = np.zeros(_k.N_COUNTERS, np.uint64)
        state = np.zeros(_k.N_SCALARS, np.int64)
        state[_k.PERIOD], state[_k.LATENESS], state[_k.MAX_HOLD] = (
            self.period_ns,
            self.lateness_ns,
            self.max_hold,
        )
        state[_k.NEWEST], state[_k.GAP_NEXT], state[_k.BOOT_SPAN] = _k.FAR_PAST, 1, START_PERIODS
        per_tag = np.zeros((_k.N_TAG_INTS, n), np.int64)
        per_tag[_k.STAMP], per_tag[_k.USED], per_tag[_k.STEP] = _k.FAR_PAST, 1, 1
        stale_ns: list[int | None] = [tag.stale_after_ns for tag in tags]
        rows_held = [self.max_hold if one is None else one // self.period_ns for one in stale_ns]
        per_tag[_k.HOLD] = rows_held
        per_tag[_k.STALE] = [
            n if tag.judged or one is not None else _k.FOR_EVER
            for tag, n, one in zip(tags, rows_held, stale_ns, strict=True)
        ]
        per_tag[_k.POLICY] = [_POLICY[tag.quality] for tag in tags]
        per_tag[_k.UNCERTAIN] = [_POLICY[tag.uncertain] for tag in tags]
        slots = self.lateness_ns // self.period_ns + 3
        ring = np.zeros((2, slots, n), np.int64)
        ring[0] = _k.FAR_PAST
        kept = 64 + 4 * START_PERIODS * n
        self._state = state
        self._out = np.zeros((2, rows), np.int64)
        self._values = np.zeros((rows, n))
        self._valid = np.zeros((rows, n), np.uint8)
        self._status = np.zeros((rows, n), np.uint32)
        self._per_tag, self._ring = per_tag, ring
        self._inner = (state, per_tag, np.zeros((2, n)), ring, np.zeros((slots, n)))
        self._boot = (np.zeros((4, kept), np.int64), np.zeros(kept))
        self._outer = (self._out, self._values, self._valid, self._status, self.counts)
        # After a loss rows are closed one by one, so that what one of them has counted is known.
        self._one = (
            np.zeros((2, 1), np.int64), np.zeros((1, n)), np.zeros((1, n), np.uint8), np.zeros((1, n), np.uint32),
            self.counts,
        )
        self._lost = np.zeros(n, np.bool_)  # tags that have not delivered since the connection was lost
        self._returning_since_ns: int | None = None  # the first row that was withheld
        self._gap_owed = False
        self._kept = np.zeros(n, np.bool_)  # tags whose hold outlives the loss that is under way
        self._stampless = False  # and whether their stamps are of a time that is over
        self._position = np.zeros(1, np.int64)
        self._input: tuple[Int32, Int64, Float64, UInt32] = (_NO_INDEX, _NO_STAMPS, _NO_VALUES, _NO_STATUS)
        self._watermark = _k.FAR_PAST
        self._flush = False
        self._losing = False
        self._more = False
        self._read = 0
        self._seq = -1

    def push(self, tag_index: Int32, source_ns: Int64, value: Float64, status: UInt32) -> int:
        """Take the samples of one notification and return the number of rows ready to be read.

        tag_index : int32[m]; column of each sample
        source_ns : int64[m]; any order: one notification is put in the order of its stamps
        value : float64[m]; engineering units
        status : uint32[m]; StatusCode

        The arrays are kept until the rows are drained, and must not change before. RuntimeError where rows of
        the call before were not drained, since they would be lost.
        """
        self._demand_drained()
        self._input = (tag_index, source_ns, value, status)
        return self._begin()

    def advance(self, watermark_ns: int) -> int:
        """Close the rows that lie `lateness` behind this time although nothing arrived; return rows ready.

        For an idle connection that is known to be alive: `watermark_ns` is what the source clock shows now.
        """
        self._demand_drained()
        self._watermark = int(watermark_ns)
        return self._begin()

    def finish(self) -> int:
        """Close every row that has a sample (end of a recording); return rows ready."""
        self._demand_drained()
        self._flush = True
        return self._begin()

    def connection_lost(self, columns: Int32 | None = None) -> int:
        """Close what has samples and end the hold of what was lost: the next row is a gap; return rows ready.

        columns : int32[k]; the tags that were lost, None: all; others are held as before, since a server that reports
            changes does not say again what has not changed

        The next row has all tags again that were there before, see rule 6.
        """
        self._demand_drained()
        self._kept = np.ones(len(self.tags), np.bool_)
        self._kept[slice(None) if columns is None else columns] = False
        self._losing = True
        return self._begin()

    def clock_set(self) -> int:
        """Close what has samples and begin anew, since the clock of the source was set; return rows ready.

        What is held for as long as the connection lives (set-points, commands, states) is held on: it is not sent
        again. Its stamp is of the old time and says nothing any more.
        """
        self._demand_drained()
        self._kept = self._per_tag[_k.STALE] == _k.FOR_EVER
        self._stampless = True
        self._losing = True
        return self._begin()

    def next_row(self, frame: Frame) -> bool:
        """Copy the next closed row into `frame`; False when there is none, then the builder is drained."""
        if self._read >= self._state[_k.OUT_N] and not self._refill():
            return False
        i = self._read
        self._read = i + 1
        self._seq += 1
        frame.values[:] = self._values[i]
        frame.valid[:] = self._valid[i]
        frame.status[:] = self._status[i]
        frame.source_ns = int(self._out[0, i])
        frame.gap = bool(self._out[1, i])
        frame.seq = self._seq
        return True

    def closed(self, frame: Frame | None = None) -> Iterator[Frame]:
        """Yield the closed rows in one reused frame until the builder is drained."""
        row = Frame.empty(len(self.tags)) if frame is None else frame
        while self.next_row(row):
            yield row

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter that is found before the samples get here: `null_timestamp`, `lost`."""
        self.counts[COUNTERS.index(name)] += np.uint64(n)

    def counters(self) -> dict[str, int]:
        """Return the counters by name."""
        return {name: int(n) for name, n in zip(COUNTERS, self.counts, strict=True)}

    @property
    def pending(self) -> int:
        """Samples that wait for their row."""
        state, per_tag = self._state, self._per_tag
        waiting = int(np.count_nonzero(self._ring[0] != _k.FAR_PAST))
        waiting += int(np.count_nonzero((per_tag[_k.KNOWN] == 1) & (per_tag[_k.USED] == 0)))
        return waiting + int(state[_k.BOOT_N] - state[_k.BOOT_POS])

    @property
    def newest_ns(self) -> int:
        """Newest stamp or watermark seen; far in the past before the first row."""
        return int(self._state[_k.NEWEST])

    def _demand_drained(self) -> None:
        if self._more or self._read < self._state[_k.OUT_N]:
            raise RuntimeError("drain the closed rows before the next call: they would be lost")

    def _begin(self) -> int:
        self._position[0] = 0
        self._more = True
        self._refill()
        return int(self._state[_k.OUT_N])

    def _refill(self) -> bool:
        """Run the kernel on what is left of the input; True when there are rows."""
        if not self._more:
            return False
        self._read = 0
        while True:
            self._state[_k.OUT_N] = 0
            withholding = bool(self._lost.any())
            before = self.counts.copy() if withholding else self.counts
            result = self._run(self._one if withholding else self._outer)
            ready = bool(self._state[_k.OUT_N])
            if ready and withholding:
                ready = self._pass_on(before)
            if result == _k.DONE:
                if self._losing:
                    self._returning_since_ns = None
                self._more = self._flush = self._losing = False
                self._watermark = _k.FAR_PAST
                self._input = (_NO_INDEX, _NO_STAMPS, _NO_VALUES, _NO_STATUS)
                return ready
            if ready:
                return True

    def _run(self, outer: tuple[Int64, Float64, UInt8, UInt32, NDArray[np.uint64]]) -> int:
        """Call the kernel for what is to be done, into these arrays; its result is DONE or FULL."""
        if self._losing:
            # First the rows that have samples: what is held is known only when they are closed.
            running = self._state[_k.PHASE] == _k.PHASE_RUN
            if running and self._close(outer, flush=True) == _k.FULL:
                return _k.FULL
            known = self._per_tag[_k.KNOWN] == 1
            kept = known & self._kept
            per_tag, values = self._per_tag[:, kept].copy(), self._inner[2][:, kept].copy()
            lost: int = _k.lose_connection(*self._inner, *outer)
            assert lost == _k.DONE  # nothing is left to close
            self._lost |= known
            if running and kept.any():
                if self._stampless:
                    per_tag[_k.STAMP] = _k.FAR_PAST
                per_tag[_k.USED] = 1
                for row in _OF_HOLD:
                    self._per_tag[row, kept] = per_tag[row]
                self._inner[2][:, kept] = values
                self._lost &= ~kept
            self._stampless = False
            return lost
        return self._close(outer, flush=self._flush)

    def _close(
        self, outer: tuple[Int64, Float64, UInt8, UInt32, NDArray[np.uint64]], *, flush: bool
    ) -> int:
        """Take the input and close rows."""
        result: int = _k.close_rows(
            *self._inner, *self._boot, *outer, *self._input, self._position, self._watermark, flush
        )
        if result == _k.UNSORTED:
            order = np.argsort(self._input[1], kind="stable")
            self._input = tuple(part[order] for part in self._input)  # type: ignore[assignment]
            result = _k.close_rows(
                *self._inner, *self._boot, *outer, *self._input, self._position, self._watermark, flush
            )
        return result

    def _pass_on(self, before: NDArray[np.uint64]) -> bool:
        """Pass on the row that was closed alone, or withhold it while a lost tag has not delivered again.

        before : uint64[len(COUNTERS)]; counters before it closed
        """
        out, values, valid, status, _ = self._one
        if self._returning_since_ns is None:
            self._returning_since_ns = int(out[0, 0])
        self._lost &= status[0] == _k.WAITING
        # Below 0 where the clock was set back meanwhile, which would make it a long wait.
        if self._lost.any() and 0 <= out[0, 0] - self._returning_since_ns < RETURN_NS:
            self._state[_k.OUT_N] = 0
            self._gap_owed |= bool(out[1, 0])
            used = self.counts[_k.C_USED] - before[_k.C_USED]
            self.counts[_k.C_USED] -= used
            self.counts[_k.C_SKIPPED] += used
            self.counts[_OF_ROWS] = before[_OF_ROWS]
            return False
        self._lost[:] = False
        if self._gap_owed and not out[1, 0]:
            out[1, 0] = 1
            self.counts[_k.C_GAPS] += np.uint64(self.counts[_k.C_ROWS] > 1)
        self._gap_owed = False
        self._out[:, 0], self._values[0], self._valid[0], self._status[0] = out[:, 0], values[0], valid[0], status[0]
        return True

    def _chunk(self) -> tuple[Int64, Float64, UInt8]:
        """Copy all rows ready now; the caller calls `_refill` for the next ones (whole records)."""
        n = int(self._state[_k.OUT_N])
        self._read = n
        return self._out[:, :n].copy(), self._values[:n].copy(), self._valid[:n].copy()


def rows_from_samples(
    tags: Sequence[Tag],
    period_ns: int,
    tag_index: ArrayLike,
    source_ns: ArrayLike,
    value: ArrayLike,
    status: ArrayLike | None = None,
    *,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    counts: dict[str, int] | None = None,
) -> Record:
    """Return the rows of a whole set of samples by the rule of time (history, recordings).

    tag_index : int32[m], source_ns : int64[m], value : float64[m], status : uint32[m] (None: all Good); any
        order
    counts : filled with the counters by name when given
    """
    stamps = np.asarray(source_ns, dtype=np.int64)
    order = np.argsort(stamps, kind="stable")
    words = np.zeros(len(stamps), np.uint32) if status is None else np.asarray(status, dtype=np.uint32)
    rows = int(min(8192, max(64, len(stamps))))
    builder = FrameBuilder(
        tags, period_ns, period_ns if lateness_ns is None else lateness_ns, max_hold, rows=rows
    )
    chunks: list[tuple[Int64, Float64, UInt8]] = []
    builder.push(
        np.ascontiguousarray(np.asarray(tag_index, dtype=np.int32)[order]),
        np.ascontiguousarray(stamps[order]),
        np.ascontiguousarray(np.asarray(value, dtype=np.float64)[order]),
        np.ascontiguousarray(words[order]),
    )
    chunks.append(builder._chunk())
    while builder._refill():
        chunks.append(builder._chunk())
    builder.finish()
    chunks.append(builder._chunk())
    while builder._refill():
        chunks.append(builder._chunk())
    if counts is not None:
        counts.update(builder.counters())
    grid = np.concatenate([c[0] for c in chunks], axis=1)
    gap = grid[1].astype(np.uint8)
    if len(gap):
        gap[0] = 1
    return Record(
        tuple(tags),
        int(period_ns),
        np.ascontiguousarray(grid[0]),
        np.concatenate([c[1] for c in chunks]),
        np.concatenate([c[2] for c in chunks]),
        gap,
    )


def record_from_columns(
    source_ns: ArrayLike,
    values: ArrayLike,
    tags: Sequence[Tag | str],
    period_ns: int | None = None,
    *,
    lateness_ns: int | None = None,
    max_hold: int = 20,
    valid: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    where: str = "",
    counts: dict[str, int] | None = None,
) -> Record:
    """Return the rows of a table that has one line per stamp (CSV, recording) by the rule of time.

    source_ns : int64[n]; strictly increasing
    values : float64[n, n_tags]; NaN and infinity are masked
    period_ns : int; None: the median distance of two stamps
    valid : uint8[n, n_tags]; 0 = the cell is Bad
    truth : uint8[n]; carried along, held like a state tag
    where : what the table is called in an error (file name)

    Raises RecordError naming row and stamp where the stamps do not increase, and where shapes do not fit.
    """
    stamps = np.asarray(source_ns, dtype=np.int64)
    cells = np.asarray(values, dtype=np.float64)
    named = tuple(tag if isinstance(tag, Tag) else Tag(tag) for tag in tags)
    n, n_tags = len(stamps), len(named)
    if cells.shape != (n, n_tags):
        raise RecordError(
            f"{n} stamps and {n_tags} tags, but values of shape {cells.shape}",
            where=where,
            next_step="give one value per stamp and tag",
        )
    if n == 0:
        raise RecordError("the table has no rows", where=where, next_step="check the file or the time range")
    wrong = np.flatnonzero(np.diff(stamps) <= 0)
    if len(wrong):
        i = int(wrong[0]) + 1
        raise RecordError(
            f"row {i} (counting from 0) is stamped {iso_utc(int(stamps[i]))}, not after row {i - 1} "
            f"at {iso_utc(int(stamps[i - 1]))}; {len(wrong)} such row(s)",
            where=where,
            next_step="sort the rows by time and remove those with equal stamps",
        )
    if period_ns is None:
        if n < 2:
            raise RecordError("one row has no period", where=where, next_step="give the period")
        period_ns = int(np.median(np.diff(stamps)))
    status = np.zeros((n, n_tags), np.uint32)
    if valid is not None:
        status[np.asarray(valid) == 0] = _BAD
    columns: tuple[Tag, ...] = named
    if truth is not None:
        columns = (*named, Tag("\0truth", kind=TagKind.STATE))
        cells = np.column_stack([cells, np.asarray(truth, dtype=np.float64)])
        status = np.column_stack([status, np.zeros(n, np.uint32)])
    wide = len(columns)
    record = rows_from_samples(
        columns,
        period_ns,
        np.tile(np.arange(wide, dtype=np.int32), n),
        np.repeat(stamps, wide),
        cells.ravel(),
        status.ravel(),
        lateness_ns=lateness_ns,
        max_hold=max_hold,
        counts=counts,
    )
    if truth is None:
        return record
    labels = np.where(np.isfinite(record.values[:, -1]), record.values[:, -1], 0).astype(np.uint8)
    return Record(
        named,
        record.period_ns,
        record.source_ns,
        np.ascontiguousarray(record.values[:, :-1]),
        np.ascontiguousarray(record.valid[:, :-1]),
        record.gap,
        labels,
    )


def iso_utc(stamp_ns: int) -> str:
    """Return a stamp as ISO 8601 text in UTC with microseconds."""
    return str(np.datetime64(stamp_ns // 1000, "us")) + "Z"


def add_counters(totals: dict[str, int], more: Mapping[str, int]) -> None:
    """Add counters by name into `totals`."""
    for name, n in more.items():
        totals[name] = totals.get(name, 0) + n
