"""Reads tags where a server cannot report their changes fast enough, or at all.

One prepared Read per poll and call size; its answer comes as columns, in the shape of a notification. A poll that
takes longer than it may is not overtaken by the next one: what is missed is counted.

Polls come at least twice per period of the rows, unless another interval is asked for: at the period itself changes are
lost, as they are by sampling. A change is known one poll later and not one publishing interval later.

Holes. A Read tells what is, and not what was since the last one. Where no answer came for `HOLE` periods, or where the
stamps show that values were missed (`poll_news.Steps`), the values of that answer do not continue the last ones, and
are told as the first after a hole.

Time of a sample. A value that has not changed (`News`) comes with the stamp that it had before; as a sample it says
that the value still stood when it was read. It is handed on with the moment at which the Read was *sent* in place of
its stamp: the server answered after that, so any later change has a later stamp. What time that is for the source, the
one who knows its clock tells (`feed.SourceClock.now`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import Client
from asyncua.ua.uaerrors import UaError
from numpy.typing import NDArray

from ..errors import ConnectionProblem
from . import wire
from .arrays import Fan, take
from .limits import TOO_MUCH
from .poll_news import HOLE, NEVER, News
from .session import Session
from .waiting import within
from .wire_requests import PreparedRead, ReadFrom

log = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3  # answers that are no values; then the connection counts as dead


# (column int32[m], source_ns int64[m], samples): `source_ns` takes the place of the stamps of the samples
OnPolled = Callable[[NDArray[np.int32], NDArray[np.int64], wire.Samples], None]
# (column int32[m], samples, sent_ns): what still stood when the Read was sent, on our clock
OnResting = Callable[[NDArray[np.int32], wire.Samples, int], None]
# (column int32[m]): the next values of these do not continue the last ones
OnHole = Callable[[NDArray[np.int32]], None]


@dataclass(frozen=True, slots=True)
class _Polled:
    """A node that is read; places : (column, element) of each tag that it is read for, element -1: a scalar."""

    node: Any
    places: tuple[tuple[int, int], ...]


class _Call:
    """The values of one Read."""

    def __init__(self, token: bytes, nodes: Sequence[_Polled]) -> None:
        self.n = len(nodes)
        self.fan = Fan({place: one.places for place, one in enumerate(nodes)})
        self.request = PreparedRead(token, [ReadFrom(one.node) for one in nodes])
        self.values = wire.Columns(self.n)
        self.sent_ns = self.received_ns = NEVER  # the last time


class Poller:
    """Reads some tags of one session again and again.

    Parameters
    ----------
    every_ns : from one poll to the next
    period_ns : of the rows
    on_polled : called with (column int32[m], source_ns int64[m], samples) of the news in an answer; NO_STAMP where the
        server gives neither stamp; the samples hold until it returns
    on_resting : called then with (column int32[m], samples, sent_ns) of what rests
    on_hole : called before both with the columns of an answer whose values do not continue the last ones
    clock_ns : monotonic

    Attributes
    ----------
    counters : polls (answers), poll_overruns (polls left out since an answer was slow), poll_holes (answers behind a
        hole), poll_failures, handler_errors
    last_heard_ns : when the last answer came, by `clock_ns`
    """

    def __init__(
        self, session: Session, every_ns: int, on_polled: OnPolled, on_resting: OnResting, on_hole: OnHole, *,
        period_ns: int, clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.session = session
        self.counters = {"polls": 0, "poll_overruns": 0, "poll_holes": 0, "poll_failures": 0, "handler_errors": 0}
        self.last_heard_ns = 0
        self.every_ns, self._period_ns = every_ns, period_ns
        self._on_polled, self._on_resting, self._on_hole = on_polled, on_resting, on_hole
        self._clock_ns = clock_ns
        self._news = News(every_ns, period_ns)
        self._nodes: dict[int, _Polled] = {}
        self._calls: list[_Call] | None = None
        self._failed = 0
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, column: int) -> bool:
        return column in self._nodes

    def add(self, column: int, node: Any, places: tuple[tuple[int, int], ...]) -> None:
        """Read this node from the next poll on.

        column : of the tag that it is known by; places : (column, element) of each tag that it is read for, element -1
        for a scalar
        """
        wanted = _Polled(node, places)
        if self._nodes.get(column) != wanted:
            self._nodes[column] = wanted
            self._calls = None

    def remove(self, column: int) -> None:
        """Read a column no more."""
        if self._nodes.pop(column, None) is not None:
            self._calls = None

    def start(self, client: Client) -> None:
        """Begin to read on this connection; nothing happens where it has begun."""
        if self._task is None or self._task.done():
            self.last_heard_ns = self._clock_ns()
            self._failed = 0
            self._news.forget()
            self._task = asyncio.create_task(self._poll(client), name="polling")
            self.session.watch_over(self._task, client)

    def stop(self) -> None:
        """Read no more and forget the nodes; never waits."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._nodes.clear()
        self._calls = None

    async def _poll(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if self._nodes and not await self._round(client):
                return
            now = loop.time()
            every_s = (self._period_ns if self._failed else self.every_ns) / 1e9  # a refusal may pass
            due += every_s
            if due < now:
                missed = int((now - due) / every_s) + 1
                self.counters["poll_overruns"] += missed
                due += missed * every_s
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _round(self, client: Client) -> bool:
        """Read everything once; False when the connection is given up."""
        try:
            if self._calls is None:
                self._calls = self._make(client)
            for call in self._calls:
                if not await self._read(client, call):
                    break
        except (TimeoutError, OSError) as error:
            self.session.fail(f"a poll is not answered ({type(error).__name__})", client)
            return False
        except (UaError, ConnectionProblem) as error:
            self.counters["poll_failures"] += 1
            self._failed += 1
            if self._failed >= _FAILURES_IN_A_ROW:
                self.session.fail(f"polls fail: {type(error).__name__}: {error}", client)
                return False
        return True

    def _make(self, client: Client) -> list[_Call]:
        token = wire.token_of(client)
        size = self.session.limit("read")
        columns = sorted(self._nodes)
        return [
            _Call(token, [self._nodes[column] for column in part])
            for part in (columns[first : first + size] for first in range(0, len(columns), size))
        ]

    async def _read(self, client: Client, call: _Call) -> bool:
        """Read one call; False when it was too large and all calls are made anew."""
        timeout_s = self.session.timeout_s
        sent_ns = self._clock_ns()
        body = await within(wire.send_prepared(client, call.request, timeout_s), timeout_s)
        received_ns = self._clock_ns()
        n = call.n
        try:
            samples = wire.decode_read(body, n, call.values, call.fan.elements)
        except UaError as error:
            if _name(error) not in TOO_MUCH or n == 1:
                raise
            self.session.limits.refused("read", n)
            self.session.counters["halved_calls"] += 1
            self._calls = None
            return False
        self.last_heard_ns = received_ns
        self._failed = 0
        self.counters["polls"] += 1
        answer = samples.raw
        raw = np.where(samples.source_ns == wire.NO_STAMP, samples.server_ns, samples.source_ns)
        column, samples, rows = call.fan.spread(
            samples, lambda elements, room: wire.decode_read(answer, n, room, elements)
        )
        raw = raw[rows]
        hole = call.received_ns != NEVER and (
            max(sent_ns - call.sent_ns, received_ns - call.received_ns) > HOLE * self._period_ns)
        call.sent_ns, call.received_ns = sent_ns, received_ns
        news, rests, hole = self._news.of(column, raw, samples.value, samples.status, received_ns, hole=hole)
        try:
            if hole:
                self._tell_hole(column)
            if news.any():
                self._on_polled(column[news], raw[news], take(samples, np.flatnonzero(news)))
            if rests.any():
                self._on_resting(column[rests], take(samples, np.flatnonzero(rests)), sent_ns)
        except Exception:  # the next poll must not fail for it
            self.counters["handler_errors"] += 1
            if self.counters["handler_errors"] == 1:
                log.exception("%s: a poll could not be worked on; further ones are counted only", self.session.where)
        return True


    def _tell_hole(self, column: NDArray[np.int32]) -> None:
        self.counters["poll_holes"] += 1
        if self.counters["poll_holes"] == 1:
            log.warning(
                "%s: polls came so late that changes were missed (rows of %g ms); a gap stands for them, further ones "
                "are counted only", self.session.where, self._period_ns / 1e6,
            )
        self._on_hole(column)


def _name(error: UaError) -> str:
    code = getattr(error, "code", None)
    return wire.status_name(code) if isinstance(code, int) else type(error).__name__
