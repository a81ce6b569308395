"""One subscription for the tags of a group on one server: one call per notification, with all its values.

The client handle of a monitored item is the column of its tag. What the server revised is kept and shown; an item that
fails is retried with growing delays while the rest runs, and what cannot be monitored is polled (`items`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import Client, ua
from numpy.typing import NDArray

from ..errors import ConnectionProblem, DetectorError
from . import silence, wire
from .intake import Intake, OnRested, OnSamples
from .items import NO_REPORTS, NO_ROOM, Item, Monitoring
from .polling import OnHole, Poller
from .session import LinkState, Session

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5.0
LIFETIME_S = 60.0
_UNTOLD_NS = 2**62
SILENCE_MARGIN_S = 2.0  # beyond a keep-alive interval; then the connection counts as dead
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0
_ROOM_FIRST_S, _ROOM_LAST_S = 60.0, 600.0  # between two tries to monitor what is polled for lack of room
_TOO_SLOW = 2.0  # times the longer of what was asked and of the period: a publishing interval that is too long
_ROUNDING = 1.01
_LATE_S = 0.1  # beyond this our own loop stood still, and what was sent to us meanwhile is not read yet

@dataclass(slots=True)
class Revised:
    """What the server made of the requested intervals."""

    publishing_ms: float = math.nan
    keep_alive_count: int = 0
    lifetime_count: int = 0


class Subscription:
    """A part of a session: items come back after each reconnect.

    on_samples : called with (column int32[m], source_ns int64[m], value float64[m], status uint32[m]),
        synchronously, once per notification
    on_resting : called with (column int32[m], value float64[m], status uint32[m], sent_ns) of polled values that have
        not changed, and still stood at `sent_ns` of `clock_ns`
    on_hole : called with column int32[m] of polled tags whose next samples do not continue the last
    on_lost : called when the connection or the subscription is gone: the next samples do not continue the
        last
    on_idle : called on a keep-alive, with the ns since the last message with values by the server's clock: it lives
        and nothing has changed
    keep_alive_s : how soon a server without news says that it lives, at most KEEP_ALIVE_S
    period_ns : of the rows; None: nothing is ever polled for being too slow
    poll_ns : read so often from the start; None: monitored
    fallback_poll_ns : how often tags are read that cannot be monitored; None: twice per period
    clock_ns, utc_ns : for silence, and for samples without any stamp

    counters : notifications, samples, keep_alives, overload (GoodOverload), null_timestamp, lost_notifications,
        rebuilt (subscriptions made anew), type_changes (to text and back), not_numeric (samples masked for that),
        unknown_handles (samples of items that are none of ours), silent_items (monitored anew, since the server did not
        report their changes any more), polls, poll_overruns, poll_holes, poll_failures,
        handler_errors (see `Poller`)
    """

    def __init__(
        self,
        session: Session,
        items: Sequence[Item],
        *,
        sampling_ns: int,
        publishing_ns: int,
        on_samples: OnSamples,
        on_resting: OnRested = lambda column, value, status, sent_ns: None,
        on_hole: OnHole = lambda column: None,
        on_lost: Callable[[], None],
        on_idle: Callable[[int], None] | None = None,
        keep_alive_s: float | None = None,
        period_ns: int | None = None,
        poll_ns: int | None = None,
        fallback_poll_ns: int | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.session = session
        self.items = tuple(items)
        self.revised = Revised()
        self.counters = {
            "notifications": 0,
            "samples": 0,
            "keep_alives": 0,
            "overload": 0,
            "null_timestamp": 0,
            "lost_notifications": 0,
            "rebuilt": 0,
            "type_changes": 0,
            "not_numeric": 0,
            "unknown_handles": 0,
            "silent_items": 0,
        }
        period = period_ns or publishing_ns
        self.poller = Poller(
            session, poll_ns or fallback_poll_ns or period // 2, self._polled, self._rested, on_hole,
            period_ns=period, clock_ns=clock_ns,
        )
        self.last_heard_ns = 0
        self._published_ns = 0  # PublishTime of the last message with values, by the server's clock
        self._publishing_ns = publishing_ns
        self._on_lost, self._on_idle = on_lost, on_idle
        self._keep_alive_s = KEEP_ALIVE_S if keep_alive_s is None else min(keep_alive_s, KEEP_ALIVE_S)
        self._clock_ns = clock_ns
        self._period_ns, self._poll = period_ns, poll_ns is not None
        self._state = Monitoring(
            session, self.items, self.poller, self._exchange, sampling_ns=sampling_ns, publishing_ns=publishing_ns,
            period_ns=period_ns,
        )
        self._silence = silence.Silence(len(self._state.doubted), clock_ns)
        self._intake = Intake(self.items, self._state, on_samples, on_resting, self.counters, self._silence, utc_ns)
        self._told_ms = math.nan
        self._tasks: list[asyncio.Task[None]] = []
        self._client: Client | None = None  # the tasks of any other connection end by themselves
        self._alive = False

    @property
    def alive(self) -> bool:
        """Whether the server has answered within the keep-alive interval."""
        return self._alive

    @property
    def _id(self) -> int | None:
        return self._state.subscription_id

    @property
    def counts(self) -> dict[str, int]:
        """All counters, those of the polls included."""
        return self.counters | self.poller.counters

    async def link_up(self) -> None:
        """Create the subscription and its items, or begin to poll."""
        client = self.session.client
        if not self.session.limits.profile.filters:
            self._state.without_filter()
        if self._poll:
            await self._poll_all("as configured")
        else:
            await self._create()
        self._alive = True
        if len(self.poller):
            self.poller.start(client)
        self._tasks = []
        self._begin(self._watch(client), "silence", client)
        self._begin(self._retry(client), "items that fail", client)
        self._begin(self._look_after(client), "items that are silent", client)
        self._client = client

    def _begin(self, work: Coroutine[Any, Any, None], name: str, client: Client) -> None:
        task = asyncio.create_task(work, name=name)
        self.session.watch_over(task, client)
        self._tasks.append(task)

    def link_down(self) -> None:
        """Forget the subscription of the lost connection."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._client = None
        self.poller.stop()
        if self._id is not None and self.session.pump is not None:
            self.session.pump.forget(self._id)
        self._state.forget()
        if self._alive:
            self._alive = False
            self._on_lost()

    async def _create(self) -> None:
        session = self.session
        publishing_ms = self._publishing_ns / 1e6
        parameters = ua.CreateSubscriptionParameters()
        parameters.RequestedPublishingInterval = publishing_ms
        parameters.RequestedMaxKeepAliveCount = max(
            1, round(self._keep_alive_s * 1e3 / max(publishing_ms, 1.0))
        )
        parameters.RequestedLifetimeCount = max(
            3 * parameters.RequestedMaxKeepAliveCount, round(LIFETIME_S * 1e3 / max(publishing_ms, 1.0))
        )
        parameters.MaxNotificationsPerPublish = 0
        parameters.PublishingEnabled = True
        parameters.Priority = 0
        request = ua.CreateSubscriptionRequest()
        request.Parameters = parameters
        try:
            response = await session.call(
                self._exchange(request, ua.CreateSubscriptionResponse), "create a subscription"
            )
        except ConnectionProblem as problem:
            name = type(problem.__cause__).__name__
            if name not in NO_ROOM | NO_REPORTS:
                raise
            await self._poll_all(name)
            return
        result = response.Parameters
        self._state.subscription_id = number = int(result.SubscriptionId)
        self.revised = Revised(
            float(result.RevisedPublishingInterval),
            int(result.RevisedMaxKeepAliveCount),
            int(result.RevisedLifetimeCount),
        )
        self.last_heard_ns = self._clock_ns()
        self._alive = True
        self._tell_revised(publishing_ms)
        slowest_ms = _TOO_SLOW * max(publishing_ms, (self._period_ns or 0) / 1e6)
        if self._period_ns is not None and self.revised.publishing_ms > slowest_ms:
            await self._end()
            await self._poll_all(f"the server publishes no faster than every {self.revised.publishing_ms:g} ms")
            return
        assert session.pump is not None
        self._silence.begin()
        session.pump.register(number, self._published, self._intake.elements)
        await self._state.create(self._state.carriers, self._client)

    async def _poll_all(self, why: str) -> None:
        await self._state.poll(self._state.carriers, why, self._client)

    def _tell_revised(self, asked_ms: float) -> None:
        """Say once per change when the server publishes more slowly than it was asked to."""
        if self.revised.publishing_ms > asked_ms * _ROUNDING and self.revised.publishing_ms != self._told_ms:
            log.warning(
                "%s: asked for a publishing interval of %g ms, the server gives %g ms",
                self.session.where, asked_ms, self.revised.publishing_ms,
            )
        self._told_ms = self.revised.publishing_ms

    async def _end(self) -> None:
        """Delete the subscription at the server."""
        number, self._state.subscription_id = self._id, None
        if self.session.pump is not None and number is not None:
            self.session.pump.forget(number)
        request = ua.DeleteSubscriptionsRequest()
        request.Parameters.SubscriptionIds = [number]
        await self.session.call(self._exchange(request, ua.DeleteSubscriptionsResponse), "delete a subscription")

    async def _exchange(self, request: Any, answer: type) -> Any:
        body = await wire.send(self.session.client, request, self.session.timeout_s)
        return wire.decode(body, answer)

    async def _retry(self, client: Client) -> None:
        """Try items that fail again, after 1 s, 2 s ... 30 s, and what is polled for lack of room, more rarely."""
        delay, room_s = _RETRY_FIRST_S, _ROOM_FIRST_S
        loop = asyncio.get_running_loop()
        room_at = loop.time() + room_s
        while self._client is client:
            await asyncio.sleep(delay)
            if self._client is not client:
                return
            failing = self._state.failing
            if not failing or self.session.state is not LinkState.CONNECTED:
                delay = _RETRY_FIRST_S
            try:
                if failing and self.session.state is LinkState.CONNECTED:
                    await self._again(failing)
                    delay = min(delay * 2, _RETRY_LAST_S)
                if loop.time() >= room_at:
                    await self._ask_for_room()
                    room_s = min(2 * room_s, _ROOM_LAST_S)
                    room_at = loop.time() + room_s
            except DetectorError as error:
                self.session.fail(error.what, client)
                return

    async def _again(self, failing: Sequence[Item]) -> None:
        """Look for nodes that fail and begin with them anew, each in its way."""
        await self.session.read_namespaces()
        monitored = [item for item in failing if not item.polled] if self._id is not None else []
        polled = [item for item in failing if item.polled or self._id is None]
        if monitored:
            await self._state.create(monitored, self._client)
        for why in {item.polled for item in polled}:
            again = [item for item in polled if item.polled == why]
            await self._state.poll(again, why or self._state.why_polled, self._client)

    async def _ask_for_room(self) -> None:
        """Ask the server to monitor what it had no room for."""
        waiting = self._state.waiting_for_room
        if not waiting:
            return
        if self._id is not None:
            await self._state.create(waiting, self._client)
        elif len(waiting) == len(self._state.carriers):
            await self._create()

    async def _look_after(self, client: Client) -> None:
        """Monitor anew what the server does not report any more although it changes (`silence`)."""
        while self._client is client:
            await asyncio.sleep(silence.SILENT_S)
            if self._client is not client or self.session.state is not LinkState.CONNECTED:
                continue
            try:
                lost = await self._silence.lost(self.session, self._state.monitored)
            except DetectorError as error:
                self.session.fail(error.what, client)
                return
            for item in lost:
                log.warning("%s: tag %s (%s) changes and is not reported", self.session.where, item.name, item.node)
                self.counters["silent_items"] += 1
                item.renew = True

    async def _watch(self, client: Client) -> None:
        """Report the connection dead when neither values nor keep-alives come.

        The time in which our own loop stood still does not count: what the server sent meanwhile is not read yet.
        """
        loop = asyncio.get_running_loop()
        while self._client is client:
            if self._id is None:  # a poll that is not answered ends by itself
                await asyncio.sleep(KEEP_ALIVE_S)
                self.last_heard_ns = self._clock_ns()
                continue
            limit_s = self.revised.keep_alive_count * self.revised.publishing_ms / 1e3 + SILENCE_MARGIN_S
            silent_s = (self._clock_ns() - self.last_heard_ns) / 1e9
            if silent_s >= limit_s:
                self.session.fail(f"no value and no keep-alive for {silent_s:.1f} s", client)
                return
            due = loop.time() + max(0.05, limit_s - silent_s)
            while (left := due - loop.time()) > 0:
                step_s = min(left, 4 * _LATE_S)
                woken = loop.time() + step_s
                await asyncio.sleep(step_s)
                late_s = loop.time() - woken
                if late_s > _LATE_S:
                    self.last_heard_ns = min(self.last_heard_ns + int(late_s * 1e9), self._clock_ns())
                    break

    def _published(self, answer: wire.Publish | None) -> None:
        """Take one publish answer: values, keep-alive or the end of the subscription."""
        if answer is None or answer.status_change is not None:
            status = ua.StatusCodes.BadNoSubscription if answer is None else answer.status_change
            code = wire.status_name(status or 0)
            if code != "GoodSubscriptionTransferred" and not (status or 0) & 0x80000000:
                return
            self._ended(code)
            return
        self.last_heard_ns = self._clock_ns()
        self.counters["lost_notifications"] += answer.lost
        if answer.samples is None:
            self.counters["keep_alives"] += 1
            if self._on_idle is not None:
                told = min(answer.publish_ns, self._published_ns) > 0  # a server may give no PublishTime
                self._on_idle(answer.publish_ns - self._published_ns if told else _UNTOLD_NS)
            return
        self._published_ns = answer.publish_ns
        self.counters["notifications"] += 1
        self._intake.published(answer.samples)

    def _polled(self, columns: NDArray[np.int32], stamps: NDArray[np.int64], samples: wire.Samples) -> None:
        """Take what has changed by the answer of a poll."""
        self.last_heard_ns = self._clock_ns()
        self._intake.take(columns, stamps, samples)

    def _rested(self, columns: NDArray[np.int32], samples: wire.Samples, sent_ns: int) -> None:
        """Take what has not changed by the answer of a poll."""
        self.last_heard_ns = self._clock_ns()
        self._intake.rested(columns, samples, sent_ns)

    def _ended(self, code: str) -> None:
        """Make a new subscription on the same session when the server has ended this one."""
        if self._id is None:
            return  # told twice
        log.warning("%s: the server ended the subscription (%s); making a new one", self.session.where, code)
        self.counters["rebuilt"] += 1
        client = self.session.client
        if self.session.pump is not None:
            self.session.pump.forget(self._id)
        self._state.without_subscription()
        self._alive = False
        self._tasks = [task for task in self._tasks if not task.done()]
        self._begin(self._rebuild(client), "rebuild", client)
        self._on_lost()

    async def _rebuild(self, client: Client) -> None:
        try:
            await self._create()
        except DetectorError as error:
            self.session.fail(error.what, client)
