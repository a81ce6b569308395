"""Store and forward: what a server missed while it could not be written, and what its history knows of a gap in rows.

Result nodes show the present, so an alert that came and went meanwhile is told as text, never shown as standing. Rows
of the history go into the store, marked as such; they are not scored: an alert of an hour ago asks nobody to act now.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..api import Record, Tag
from ..errors import RecordError
from ..frames import iso_utc
from .history import read_samples, rows_of_samples
from .session import Session
from .wire import Samples

MOST_EVENTS, MOST_CHARS = 100, 2000
SLICE_VALUES, MOST_VALUES = 200_000, 10_000_000  # of history: at once, and of one gap


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


async def rows_of_gap(
    sources: Sequence[Session], tags: Sequence[Tag], gap: Gap, period_ns: int, *, lateness_ns: int, max_hold: int
) -> AsyncIterator[Record]:
    """Yield the rows that the history has of a gap, oldest first, in slices; none lies outside of it.

    sources : of each tag, in the order of the tags, the session whose history has it. Tags of several servers become
        rows by their SourceTimestamps, as they do live.

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
            samples = await _samples(sources, [tag.node for tag in tags], begin_ns, end_ns)
            record = rows_of_samples(tags, samples, (begin_ns, end_ns), period_ns, lateness_ns=lateness_ns,
                                     max_hold=max_hold)
        except RecordError:  # nothing in this slice: a gap stays a gap
            start_ns = end_ns
            continue
        inside = np.flatnonzero((record.source_ns > start_ns) & (record.source_ns <= end_ns))
        if len(inside):
            yield record.take(inside)
        start_ns = end_ns


async def _samples(sources: Sequence[Session], nodes: Sequence[str], start_ns: int, end_ns: int) -> list[Samples]:
    """Read the samples of each node from its server, from all servers at once."""
    of: dict[Session, list[int]] = {}
    for k, session in enumerate(sources):
        of.setdefault(session, []).append(k)
    read = await asyncio.gather(*(read_samples(session, [nodes[k] for k in chosen], start_ns, end_ns)
                                  for session, chosen in of.items()), return_exceptions=True)
    found: dict[int, Samples] = {}
    for chosen, samples in zip(of.values(), read, strict=True):
        if isinstance(samples, BaseException):
            raise samples
        found |= dict(zip(chosen, samples, strict=True))
    return [found[k] for k in range(len(nodes))]
