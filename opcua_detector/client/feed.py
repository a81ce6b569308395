"""A group's tags, from one or several servers, as frames: subscriptions in, one call per row out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..api import Frame, TagKind
from ..config import GroupConfig
from ..frames import FrameBuilder
from ..kernels.stamps import wild_stamps
from .session import Session
from .subscription import Item, Revised, Subscription

log = logging.getLogger(__name__)

_LEAST_KEEP_ALIVE_S = 0.5
_IDLE_WAIT_S = 0.05  # after a keep-alive, for samples that are on their way
_JUMP_S = 1.0  # a source clock that moves by more than this against ours, all tags together, was set
_SUSPICIONS = 3
_SPAN_NS = 10 * 10**9  # the least delay is that of two such spans in which something changed
_UNKNOWN = -(2**62)
_LAST_NS = 2**63 - 1


class SourceClock:
    """Tells when the clock of the source was set, by the stamps of samples and our own monotonic clock.

    A stamp shows the source's time less what the value was under way. The least delay seen so far is the measure: a
    network that was slow and is quick again never shows stamps ahead of it, a clock that was set forward does. A clock
    that was set back shows stamps behind those that the same tags had before. One tag alone is no clock: most samples
    of a notification must say so, and where they are few, those of three notifications in a row. Samples that are
    ahead of a clock that was not set are of no use: their rows lie in the future. Where nothing has changed yet, values
    of a plant at a standstill are all that is known of the clock: it is not set when the plant begins to move.

    It also tells what time it is for the source (`now`), for values that were read again and had not changed. There the
    least delay is one of the last changes only: clocks that run unevenly by 50 ppm are .2 s apart after an hour, and a
    value that rests must not come from a time that those that move have not reached.

    Parameters
    ----------
    n_tags : columns of the group
    tolerance_ns : int; smaller movements are left to the rule of time (late samples, gaps)
    """

    def __init__(self, n_tags: int, tolerance_ns: int) -> None:
        self._tolerance_ns = tolerance_ns
        self._last = np.zeros(n_tags, np.int64)
        self._ahead_ns: int | None = None  # the largest (stamp - our clock) so far
        self._moved = False  # whether a tag has come twice
        self._suspected = 0
        self._of_span_ns = self._of_last_span_ns = _UNKNOWN  # the same, of the last spans
        self._span_from_ns = 0

    def forget(self) -> None:
        """Begin anew: the next connection may be to another source."""
        self._last[:] = 0
        self._ahead_ns = None
        self._moved = False
        self._suspected = 0
        self._of_span_ns = self._of_last_span_ns = _UNKNOWN

    def now(self, at_ns: int) -> int | None:
        """Return the source's time at a moment of our clock, a little early at most; None before its first sample."""
        ahead_ns = max(self._of_span_ns, self._of_last_span_ns)
        return None if ahead_ns == _UNKNOWN else at_ns + ahead_ns

    def _note(self, ahead_ns: int, now_ns: int) -> None:
        """Take note of (stamp - our clock) for `now`."""
        if self._of_span_ns == _UNKNOWN or now_ns - self._span_from_ns >= _SPAN_NS:
            self._of_last_span_ns, self._of_span_ns, self._span_from_ns = self._of_span_ns, ahead_ns, now_ns
        else:
            self._of_span_ns = max(self._of_span_ns, ahead_ns)

    def take(
        self, column: NDArray[np.int32], source_ns: NDArray[np.int64], now_ns: int
    ) -> tuple[bool, NDArray[np.bool_] | None]:
        """Take the stamps of one notification.

        column : int32[m]; source_ns : int64[m], m > 0; now_ns : int; monotonic

        Returns whether the clock was set since the last notification, and bool[m], the samples to use (None: all).
        """
        newest_ns = int(source_ns.max()) - now_ns
        if self._ahead_ns is None:
            self._ahead_ns = newest_ns
        again = self._moved or bool(self._last[column].any())
        most_ns = min(self._ahead_ns + now_ns + self._tolerance_ns, _LAST_NS)
        n_wild = wild_stamps(self._last, column, source_ns, most_ns, self._tolerance_ns)
        if n_wild == 0:
            self._suspected, self._moved = 0, again
            self._ahead_ns = max(self._ahead_ns, newest_ns)
            self._note(newest_ns, now_ns)
            return False, None
        if 2 * n_wild > len(column):
            self._suspected += 1
            if 2 * len(column) >= len(self._last) or self._suspected >= _SUSPICIONS:
                was_set = self._moved
                self.forget()
                self._ahead_ns, self._moved = newest_ns, True
                self._note(newest_ns, now_ns)
                self._last[column] = source_ns
                return was_set, None
        # A stamp that goes back is late, which the rule of time counts; one that is ahead would open a gap.
        use = source_ns <= most_ns
        return False, None if use.all() else use


class GroupFeed:
    """Rows of a group, live.

    Parameters
    ----------
    group : tags, period, sampling, publishing, lateness, max_hold
    sessions : name of the server -> its session
    on_frame : called synchronously for each closed row with one reused frame; it must not wait
    clock_ns : for silence of an idle plant

    Attributes
    ----------
    builder : FrameBuilder
    frame : the reused Frame
    """

    def __init__(
        self,
        group: GroupConfig,
        sessions: Mapping[str, Session],
        on_frame: Callable[[Frame], None],
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.group = group
        tags = [tag.tag() for tag in group.tags]
        self.frame = Frame.empty(len(tags))
        self.frame_errors = 0
        self.clock_jumps = 0
        self.ahead_of_clock = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._on_frame = on_frame
        self._clock_ns = clock_ns
        self._newest_ns: int | None = None
        self._pushed_at_ns = 0
        # Beyond what the rule of time holds over, so that it begins anew when it is told to.
        tolerance_ns = max(int(_JUMP_S * 1e9), (group.max_hold + 3) * group.period + group.lateness_ns)
        by_server: dict[str, list[Item]] = {}
        for column, (tag, known) in enumerate(zip(group.tags, tags, strict=True)):
            element = -1 if tag.index is None else tag.index
            item = Item(tag.name, tag.node, column, text=known.kind is TagKind.STATE, element=element)
            by_server.setdefault(tag.server or group.server, []).append(item)
        self._clocks = {server: SourceClock(len(tags), tolerance_ns) for server in by_server}
        self._rest_ns: dict[str, int] = {}  # by server: the newest time of a value that rested
        self.subscriptions: dict[str, Subscription] = {}
        for server, items in by_server.items():
            most = sessions[server].limits.items_per_subscription or len(items)
            for number, first in enumerate(range(0, len(items), most), 1):
                self.subscriptions[server if number == 1 else f"{server} ({number})"] = Subscription(
                    sessions[server],
                    items[first : first + most],
                    sampling_ns=group.sampling_ns,
                    publishing_ns=group.publishing_ns,
                    on_samples=partial(self._samples, server=server),
                    on_resting=partial(self._rested, server=server),
                    on_hole=self._hole,
                    on_lost=partial(self._lost, server, columns_of(items[first : first + most])),
                    on_idle=self._idle,
                    keep_alive_s=max(_LEAST_KEEP_ALIVE_S, group.max_hold * group.period / 2e9),
                    period_ns=group.period,
                    poll_ns=group.poll_ns,
                    fallback_poll_ns=group.fallback_poll_ns,
                    clock_ns=clock_ns,
                )

        # Subscriptions publish by clocks of their own: the tags of one row come up to an interval apart.
        apart_ns = group.publishing_ns if group.lateness is None and len(self.subscriptions) > 1 else 0
        self.builder = FrameBuilder(tags, group.period, group.lateness_ns + apart_ns, group.max_hold)

    async def start(self) -> None:
        """Subscribe on every server; the sessions must be open."""
        await asyncio.gather(*(one.session.attach(one) for one in self.subscriptions.values()))

    async def stop(self) -> None:
        """Stop the rows."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for subscription in self.subscriptions.values():
            subscription.session.detach(subscription)

    def counters(self) -> dict[str, int]:
        """Return the counters of rows and of subscriptions by name; those of several servers are added."""
        found = self.builder.counters()
        for subscription in self.subscriptions.values():
            for name, n in subscription.counts.items():
                found[name] = found.get(name, 0) + n
        found["lost"] += found["overflowed"] + found["lost_notifications"]
        found["frame_errors"] = self.frame_errors
        found["clock_jumps"], found["ahead_of_clock"] = self.clock_jumps, self.ahead_of_clock
        return found

    def tag_states(self) -> dict[str, str]:
        """Return for each tag why it delivers nothing; empty while it delivers."""
        items = sorted(
            (item for one in self.subscriptions.values() for item in one.items), key=lambda i: i.column
        )
        return {item.name: item.reason for item in items}

    def polled_tags(self) -> dict[str, str]:
        """Return for each tag that is read why it is not monitored; the others are left out."""
        return {
            item.name: item.polled for one in self.subscriptions.values() for item in one.items if item.polled
        }

    def masked_tags(self) -> dict[str, str]:
        """Return for each tag whose values are of a wrong type what they are; the others are left out."""
        return {
            item.name: "delivers text instead of numbers"
            for one in self.subscriptions.values() for item in one.items if item.textual
        }

    def revised(self) -> dict[str, Revised]:
        """Return per server what it made of the requested intervals."""
        return {server: one.revised for server, one in self.subscriptions.items()}

    def _samples(
        self,
        column: NDArray[np.int32],
        source_ns: NDArray[np.int64],
        value: NDArray[np.float64],
        status: NDArray[np.uint32],
        server: str = "",
    ) -> None:
        now_ns = self._clock_ns()
        server = server or next(iter(self._clocks))
        jumped, use = self._clocks[server].take(column, source_ns, now_ns)
        if jumped:
            self._clock_was_set(server)
        if use is not None:
            self.ahead_of_clock += int(len(use) - use.sum())
            if not use.any():
                return
            column, source_ns, value, status = column[use], source_ns[use], value[use], status[use]
        self._newest_ns = max(int(source_ns.max()), self._newest_ns or 0)
        self._pushed_at_ns = now_ns
        self.builder.push(column, source_ns, value, status)
        self._drain()

    def _rested(
        self,
        column: NDArray[np.int32],
        value: NDArray[np.float64],
        status: NDArray[np.uint32],
        sent_ns: int,
        server: str = "",
    ) -> None:
        """Take values that had not changed when they were read again; `sent_ns` is when, at least, by our clock."""
        server = server or next(iter(self._clocks))
        now_ns = self._clocks[server].now(sent_ns)
        if now_ns is None:
            return
        # The least delay varies by a little: time does not go back for it.
        self._rest_ns[server] = rest_ns = max(now_ns, self._rest_ns.get(server, 0) + 1)
        self._newest_ns = max(rest_ns, self._newest_ns or 0)
        self._pushed_at_ns = self._clock_ns()
        self.builder.push(column, np.full(len(column), rest_ns), value, status)
        self._drain()

    def _hole(self, column: NDArray[np.int32]) -> None:
        """Let the next row be a gap: changes of these polled tags may have been missed."""
        self.builder.connection_lost(column)
        self._drain()

    def _clock_was_set(self, server: str) -> None:
        """Begin the rows anew: by the old time none of them could close, or all samples would be late."""
        self.clock_jumps += 1
        log.warning("group %s: the clock of server %s was set; its rows begin anew", self.group.name, server)
        self._newest_ns = None
        self._rest_ns.clear()
        self.builder.clock_set()
        self._drain()

    def _lost(self, server: str, columns: NDArray[np.int32]) -> None:
        self._clocks[server].forget()
        self._rest_ns.pop(server, None)
        self._newest_ns = None
        self.builder.connection_lost(columns)
        self._drain()

    def _drain(self) -> None:
        while self.builder.next_row(self.frame):
            try:
                self._on_frame(self.frame)
            except Exception:
                self.frame_errors += 1
                if self.frame_errors == 1:
                    log.exception(
                        "group %s: a row could not be worked on; further ones are counted only",
                        self.group.name,
                    )

    def _idle(self, told_ns: int) -> None:
        """Close held rows soon when a server says that it lives and nothing has changed.

        By a keep-alive and not by a timer: a server that stalls says nothing, and its samples, late but
        complete, must find their rows open. Not by our clock alone: where our loop stood still, what came
        meanwhile is read right after the keep-alive. And not at once: a server that wakes up may say that it
        lives before it sends what waits.

        told_ns : between the server's last message with values and its keep-alive, by its own clock
        """
        if self._newest_ns is None:
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        wait_s = max(_IDLE_WAIT_S, 2e-9 * self.group.publishing_ns)
        self._idle_timer = asyncio.get_running_loop().call_later(wait_s, self._close_idle, told_ns, self._pushed_at_ns)

    def _close_idle(self, told_ns: int, pushed_at_ns: int) -> None:
        """Close held rows, where no sample has come since the keep-alive."""
        self._idle_timer = None
        if self._newest_ns is None or self._pushed_at_ns != pushed_at_ns:
            return
        silent_ns = min(self._clock_ns() - self._pushed_at_ns, told_ns)
        # The source clock as it was at the last value, less the time a value may be under way.
        self.builder.advance(self._newest_ns + silent_ns - 2 * self.group.publishing_ns)
        self._drain()


def columns_of(items: Sequence[Item]) -> NDArray[np.int32]:
    """Return int32[m], the columns of items."""
    return np.array([item.column for item in items], np.int32)
