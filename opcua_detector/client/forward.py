"""Store and forward: what a server missed while it could not be written, and what its history knows of a gap in rows.

Result nodes show the present, so an alert that came and went meanwhile is told as text, never shown as standing. Rows
of the history go into the store, marked as such; they are not scored: an alert of an hour ago asks nobody to act now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from ..api import Record, Tag
from ..errors import RecordError
from ..frames import START_PERIODS, iso_utc
from .history import read_tags, rows_of_samples
from .session import Session

MOST_EVENTS, MOST_CHARS = 100, 2000
SLICE_VALUES, MOST_VALUES = 200_000, 10_000_000  # of history: at once, and of one gap
MOST_SPANS = 256  # of rows that are there, in memory: as many outages that could not be filled
_CLOCK_NS = 10**9  # what our clock and the source's may differ over an outage, and rows be late, at least


@dataclass(frozen=True, slots=True)
class Away:
    """One alert of the time away; times are SourceTimestamps, `cleared_ns` is None while it stands."""

    event_no: int
    raised_ns: int
    cleared_ns: int | None
    sentence: str
    noted_ns: int  # by our own clock


@dataclass
class EventsAway:
    """The alerts of one monitor that its server has not seen; the newest `most` of at most `most_age_ns`.

    dropped : alerts beyond these bounds, since the start; the store has them
    """

    most_age_ns: int
    most: int = MOST_EVENTS
    dropped: int = 0
    _events: OrderedDict[int, Away] = field(default_factory=OrderedDict)
    _since_ns: int | None = None
    _dropped_now: int = 0

    def begin(self, since_ns: int) -> None:
        """The server is away; it has seen what was written up to this time of our clock."""
        if self._since_ns is None:
            self._since_ns, self._dropped_now = since_ns, 0

    def note(self, event_no: int, raised_ns: int, cleared_ns: int | None, sentence: str, now_ns: int) -> None:
        """Take an alert that was raised, explained or cleared."""
        self._events[event_no] = Away(event_no, raised_ns, cleared_ns, sentence, now_ns)
        self._events.move_to_end(event_no)
        while len(self._events) > self.most:
            self._drop()

    def end(self, now_ns: int) -> str:
        """The server is back: return what it missed as text, empty where that is nothing."""
        if self._since_ns is None:
            return ""
        since_ns = self._since_ns
        for one in [one for one in self._events.values() if now_ns - one.noted_ns > self.most_age_ns]:
            self._drop(one.event_no)
        self._since_ns = None
        told = [one for one in reversed(self._events.values()) if one.noted_ns >= since_ns]
        if not told and not self._dropped_now:
            return ""
        return self._text(told, since_ns, now_ns)

    def _text(self, told: Sequence[Away], since_ns: int, now_ns: int) -> str:
        n = len(told) + self._dropped_now
        span = f"{iso_utc(since_ns)[:19]}Z to {iso_utc(now_ns)[:19]}Z"
        text = f"{n} alert{'s' if n != 1 else ''} not seen here from {span}"
        for k, one in enumerate(told):
            until = "stands" if one.cleared_ns is None else f"to {iso_utc(one.cleared_ns)[:19]}Z"
            more = f"; no {one.event_no} from {iso_utc(one.raised_ns)[:19]}Z {until}"
            more += f": {one.sentence}" if one.sentence else ""
            if len(text) + len(more) > MOST_CHARS:
                self.dropped += len(told) - k
                self._dropped_now += len(told) - k
                break
            text += more
        return f"{text}; {self._dropped_now} in the store only" if self._dropped_now else text

    def _drop(self, event_no: int | None = None) -> None:
        if event_no is None:
            event_no = next(iter(self._events))
        one = self._events.pop(event_no)
        if self._since_ns is None or one.noted_ns < self._since_ns:
            return  # the server has seen it
        self.dropped += 1
        self._dropped_now += 1


@dataclass(frozen=True, slots=True)
class Gap:
    """A hole in the rows of a group: SourceTimestamps of the row before and of the row after it."""

    after_ns: int
    before_ns: int

    def rows(self, period_ns: int) -> int:
        """Return how many rows it has room for."""
        return max(0, round((self.before_ns - self.after_ns) / period_ns) - 1)


def bounded(gap: Gap, n_tags: int, period_ns: int, most_ns: int) -> Gap:
    """Return the newest part of a gap that may be read: of at most this age and of at most MOST_VALUES values."""
    reach_ns = min(most_ns, MOST_VALUES // max(1, n_tags) * period_ns)
    return Gap(max(gap.after_ns, gap.before_ns - reach_ns), gap.before_ns)


class Continuity:
    """Which rows of a group are there, and what is missing between two of them.

    By the stamps of the source a gap may be anything: a clock that was set an hour forward leaves a hole of an hour in
    which nothing ever was, one that is set right again leaves one that is full of rows that are there. What was missed
    is what passed by our own clock while no row came. So a gap of the stamps that is longer than this outage is one of
    the source's clock, and only as much time as the outage lasted is looked for at either end of it: before the clock
    was set its stamps continue the row before the gap, after that they lead to the row behind it.

    Our clock shows how late a row comes, too: the source is taken to be as far ahead of us as its most punctual row
    since the last gap was. A row that came late before an outage does not shorten it.

    Parameters
    ----------
    period_ns, lateness_ns : of the group
    """

    def __init__(self, period_ns: int, lateness_ns: int) -> None:
        self._period_ns = period_ns
        self._tolerance_ns = max(_CLOCK_NS, 2 * period_ns + lateness_ns)
        # Rows begin anew after a clock was set: the first one is told when it has that many behind it.
        self._least_ns = max(_CLOCK_NS, (START_PERIODS + 3) * period_ns + lateness_ns)
        self._first_ns: int | None = None  # of the rows that follow each other now
        self._last_ns = 0
        self._ahead_ns = 0  # stamp of the most punctual of them, less our clock
        self._spans: list[tuple[int, int]] = []  # of earlier ones, and of what was read back; in order, none overlaps

    def row(self, source_ns: int, gap: bool, now_ns: int) -> list[Gap]:
        """Take the time of a live row; return what is missing before it, oldest first.

        source_ns : its stamp; gap : it does not continue the row before; now_ns : our clock, monotonic
        """
        if not gap and self._first_ns is not None:
            self._last_ns = source_ns
            self._ahead_ns = max(self._ahead_ns, source_ns - now_ns)
            return []
        missing = self._missing_before(source_ns, now_ns)
        if self._first_ns is not None:
            self.add(self._first_ns, self._last_ns)
        self._first_ns = self._last_ns = source_ns
        self._ahead_ns = source_ns - now_ns
        return missing

    def _missing_before(self, source_ns: int, now_ns: int) -> list[Gap]:
        if self._first_ns is None:
            return []
        last_ns = self._last_ns
        away_ns = now_ns + self._ahead_ns - last_ns
        whole = Gap(last_ns, source_ns)
        if last_ns < source_ns <= last_ns + away_ns + self._tolerance_ns:
            return [whole] if whole.rows(self._period_ns) else []
        if away_ns < self._least_ns:
            return []  # the clock was set, and nothing was away
        reach_ns = away_ns + self._tolerance_ns
        if source_ns <= last_ns:  # set back: stamps of the outage are those of rows before it, too
            return [Gap(last_ns, last_ns + reach_ns), Gap(source_ns - reach_ns, source_ns)]
        if 2 * reach_ns >= source_ns - last_ns:
            return [whole]
        return [Gap(last_ns, last_ns + reach_ns), Gap(source_ns - reach_ns, source_ns)]

    def add(self, first_ns: int, last_ns: int) -> None:
        """Take note of rows from a stamp to another that are stored."""
        joined = [(first_ns, last_ns)]
        for begin, end in self._spans:
            if begin <= last_ns + self._period_ns and end >= first_ns - self._period_ns:
                first_ns, last_ns = min(first_ns, begin), max(last_ns, end)
                joined[0] = (first_ns, last_ns)
            else:
                joined.append((begin, end))
        self._spans = sorted(joined)[-MOST_SPANS:]

    def without(self, gap: Gap) -> list[Gap]:
        """Return the parts of a gap of which no row is there, oldest first."""
        spans = list(self._spans)
        if self._first_ns is not None:
            spans.append((self._first_ns, self._last_ns))
        after_ns, parts = gap.after_ns, []
        for begin, end in sorted(spans):
            if end < after_ns or begin > gap.before_ns:
                continue
            parts.append(Gap(after_ns, begin))
            after_ns = max(after_ns, end)
        parts.append(Gap(after_ns, gap.before_ns))
        return [one for one in parts if one.rows(self._period_ns)]


async def rows_of_gap(
    sources: Sequence[Session], tags: Sequence[Tag], gap: Gap, period_ns: int, *, lateness_ns: int, max_hold: int,
    indexes: Mapping[str, int] = MappingProxyType({}),
) -> AsyncIterator[Record]:
    """Yield the rows that the history has of a gap, oldest first, in slices; none lies outside of it.

    sources : of each tag, in the order of the tags, the session whose history has it. Tags of several servers become
        rows by their SourceTimestamps, as they do live.
    indexes : name of a tag -> its place in the array that its node is

    Raises NodeProblem where a server keeps no history of a tag, ConnectionProblem where a connection is lost.
    """
    span_ns = max(1, SLICE_VALUES // max(1, len(tags))) * period_ns
    first_ns, last_ns = gap.after_ns + period_ns // 2, gap.before_ns - period_ns // 2
    start_ns = first_ns
    lead_ns = max_hold * period_ns  # values before the slice, so that what changes seldom is known in its first rows
    while start_ns < last_ns:
        end_ns = min(start_ns + span_ns, last_ns)
        begin_ns = start_ns - lead_ns
        try:
            samples = await read_tags(sources, tags, begin_ns, end_ns, indexes=indexes)
            record = rows_of_samples(tags, samples, (begin_ns, end_ns), period_ns, lateness_ns=lateness_ns,
                                     max_hold=max_hold)
        except RecordError:  # nothing in this slice: a gap stays a gap
            start_ns = end_ns
            continue
        inside = np.flatnonzero((record.source_ns > start_ns) & (record.source_ns <= end_ns))
        if len(inside):
            yield record.take(inside)
        start_ns = end_ns
