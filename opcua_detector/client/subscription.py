"""One subscription for the tags of a group on one server: one call per notification, with all its values.

The client handle of a monitored item is the column of its tag. What the server revised is kept and shown; an item that
fails is retried with growing delays while the rest runs.

What cannot be monitored, or not fast enough, is polled (`polling`): tags for which the server has no room or no
sampling as fast as the period, all of them where it has no room for a subscription or publishes too slowly. What was
refused for lack of room is asked for again now and then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import Client, ua
from asyncua.ua.uaerrors import UaStatusCodeError
from numpy.typing import NDArray

from ..errors import ConnectionProblem, DetectorError, NodeProblem
from . import wire
from .limits import TOO_MUCH, in_batches
from .nodes import NodeRef, resolve
from .polling import Poller
from .session import LinkState, Session

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5.0
LIFETIME_S = 60.0
SILENCE_MARGIN_S = 2.0  # beyond a keep-alive interval; then the connection counts as dead
BURST_S = 1.0  # the item queue holds what a server may send after a stall of this length
GOOD_OVERLOAD = 0x002F0000  # Part 4, 7.38.2: sampling slowed down for lack of resources
_FILTER_REFUSED = frozenset(
    {"BadMonitoredItemFilterUnsupported", "BadMonitoredItemFilterInvalid", "BadFilterNotAllowed"}
)
# No room: the rest runs, these are polled and asked for again.
_NO_ROOM = TOO_MUCH | {
    "BadTooManyMonitoredItems", "BadTooManySubscriptions", "BadOutOfMemory", "BadResourceUnavailable",
    "BadMaxConnectionsReached", "BadLicenseExpired", "BadLicenseLimitsExceeded",
}
# The server, or this node, cannot report changes at all: these are polled.
_NO_REPORTS = frozenset({
    "BadServiceUnsupported", "BadNotSupported", "BadNotImplemented", "BadMonitoringModeInvalid",
    "BadDataEncodingUnsupported", *_FILTER_REFUSED,
})
# A value with one of these means that the node is not there any more, or not for us: its item may stay dead for ever.
_GONE = np.array(
    [getattr(ua.StatusCodes, name) for name in (
        "BadNodeIdUnknown", "BadNodeIdInvalid", "BadAttributeIdInvalid", "BadNotReadable", "BadUserAccessDenied",
        "BadMonitoredItemIdInvalid",
    )],
    np.uint32,
)
_TYPE_MISMATCH = np.uint32(ua.StatusCodes.BadTypeMismatch)
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0
_ROOM_FIRST_S, _ROOM_LAST_S = 60.0, 600.0  # between two tries to monitor what is polled for lack of room
_TOO_SLOW = 2.0  # times the longer of what was asked and of the period: a publishing interval that is too long
_ROUNDING = 1.01
_LATE_S = 0.1  # beyond this our own loop stood still, and what was sent to us meanwhile is not read yet

OnSamples = Callable[[NDArray[np.int32], NDArray[np.int64], NDArray[np.float64], NDArray[np.uint32]], None]


@dataclass(slots=True)
class Item:
    """One tag of the subscription.

    reason : str; why it does not deliver, empty while it does
    polled : str; why it is polled, empty while it is monitored
    revised_sampling_ms, revised_queue : what the server made of the request
    text : whether a text is a value of this tag (its code); else it is masked
    textual : whether its last value was a text although it should not be
    """

    name: str
    node: str
    column: int
    reason: str = "not connected"
    revised_sampling_ms: float = math.nan
    revised_queue: int = 0
    filtered: bool = True
    text: bool = True
    polled: str = ""
    textual: bool = False
    item_id: int | None = None
    doubted: bool = False  # its node was gone: it delivers again when a value says so
    renew: bool = False  # and is monitored anew, whatever the old item still sent (a value may overtake the news)


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
    on_lost : called when the connection or the subscription is gone: the next samples do not continue the
        last
    on_idle : called on a keep-alive: the server lives and nothing has changed
    keep_alive_s : how soon a server without news says that it lives, at most KEEP_ALIVE_S
    period_ns : of the rows; None: nothing is ever polled for being too slow
    poll : read once per period from the start
    clock_ns, utc_ns : for silence, and for samples without any stamp

    counters : notifications, samples, keep_alives, overload (GoodOverload), null_timestamp, lost_notifications,
        rebuilt (subscriptions made anew), type_changes (to text and back), not_numeric (samples masked for that),
        unknown_handles (samples of items that are none of ours), polls, poll_overruns, poll_failures,
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
        on_lost: Callable[[], None],
        on_idle: Callable[[], None] | None = None,
        keep_alive_s: float | None = None,
        period_ns: int | None = None,
        poll: bool = False,
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
        }
        self.poller = Poller(
            session, period_ns or publishing_ns, self._polled, clock_ns=clock_ns
        )
        self.last_heard_ns = 0
        self._sampling_ns, self._publishing_ns = sampling_ns, publishing_ns
        self._on_samples, self._on_lost, self._on_idle = on_samples, on_lost, on_idle
        self._keep_alive_s = KEEP_ALIVE_S if keep_alive_s is None else min(keep_alive_s, KEEP_ALIVE_S)
        self._clock_ns, self._utc_ns = clock_ns, utc_ns
        self._by_column = {item.column: item for item in self.items}
        self._period_ns, self._poll = period_ns, poll
        width = max(self._by_column, default=-1) + 1
        self._own = np.zeros(width, np.bool_)  # by column: is it one of these items
        self._own[list(self._by_column)] = True
        self._no_text = np.zeros(width, np.bool_)
        self._no_text[[item.column for item in self.items if not item.text]] = True
        self._doubted = np.zeros(width, np.bool_)  # by column, as the items say
        self._textual = np.zeros(width, np.bool_)
        self._told_ms = math.nan
        self._id: int | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._client: Client | None = None  # the tasks of any other connection end by themselves
        self._alive = False

    @property
    def alive(self) -> bool:
        """Whether the server has answered within the keep-alive interval."""
        return self._alive

    @property
    def counts(self) -> dict[str, int]:
        """All counters, those of the polls included."""
        return self.counters | self.poller.counters

    async def link_up(self) -> None:
        """Create the subscription and its items, or begin to poll."""
        client = self.session.client
        if not self.session.limits.profile.filters:
            for item in self.items:
                item.filtered = False
        if self._poll:
            await self._poll_items(self.items, "as configured")
        else:
            await self._create()
        self._alive = True
        if len(self.poller):
            self.poller.start(client)
        self._tasks = [
            asyncio.create_task(self._watch(client), name="silence"),
            asyncio.create_task(self._retry(client), name="items that fail"),
        ]
        self._client = client

    def link_down(self) -> None:
        """Forget the subscription of the lost connection."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._client = None
        self.poller.stop()
        if self._id is not None and self.session.pump is not None:
            self.session.pump.forget(self._id)
        self._id = None
        for item in self.items:
            item.reason = "not connected"
            item.item_id, item.polled, item.doubted, item.renew = None, "", False, False
        self._doubted[:] = False
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
            if name not in _NO_ROOM | _NO_REPORTS:
                raise
            await self._poll_items(self.items, name)
            return
        result = response.Parameters
        self._id = int(result.SubscriptionId)
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
            await self._poll_items(
                self.items, f"the server publishes no faster than every {self.revised.publishing_ms:g} ms"
            )
            return
        assert session.pump is not None
        session.pump.register(self._id, self._published)
        await self._create_items(self.items)

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
        number, self._id = self._id, None
        if self.session.pump is not None and number is not None:
            self.session.pump.forget(number)
        request = ua.DeleteSubscriptionsRequest()
        request.Parameters.SubscriptionIds = [number]
        await self.session.call(self._exchange(request, ua.DeleteSubscriptionsResponse), "delete a subscription")

    async def _poll_items(self, items: Sequence[Item], why: str) -> None:
        """Read these items once per period from now on; what is not found keeps its reason."""
        found = await resolve(self.session, [item.node for item in items])
        polled = 0
        for item in items:
            ref = found[item.node]
            if isinstance(ref, NodeProblem):
                self._fails(item, ref.what)
                continue
            polled += item.polled != why
            item.polled, item.renew = why, False
            if item.doubted or item.reason:
                self._doubt(item)  # whether it delivers its first answer tells
            self.poller.add(item.column, ref.id)
        if polled:
            log.warning(
                "%s: %d of %d tags are polled every %g ms: %s", self.session.where, polled, len(self.items),
                self.poller.period_ns / 1e6, why,
            )
        if self._client is not None and len(self.poller):
            self.poller.start(self._client)

    async def _exchange(self, request: Any, answer: type) -> Any:
        body = await wire.send(self.session.client, request, self.session.timeout_s)
        return wire.decode(body, answer)

    async def _create_items(self, items: Sequence[Item]) -> None:
        """Resolve and monitor items; what fails keeps its reason, the rest delivers."""
        await self._delete_items([item for item in items if item.item_id is not None])
        found = await resolve(self.session, [item.node for item in items])
        ready: list[tuple[Item, NodeRef]] = []
        for item in items:
            ref = found[item.node]
            if isinstance(ref, NodeProblem):
                self._fails(item, ref.what)
            else:
                ready.append((item, ref))
        refused = await self._monitor(ready)
        if refused:  # a server that knows no filter: its own trigger is better than nothing
            for item, _ in refused:
                item.filtered = False
            await self._monitor(refused)
        slow = [item for item in items if item.item_id is not None and self._samples_too_slowly(item)]
        if slow:
            worst = max(item.revised_sampling_ms for item in slow)
            await self._delete_items(slow)
            await self._poll_items(slow, f"the server samples no faster than every {worst:g} ms")

    def _samples_too_slowly(self, item: Item) -> bool:
        if self._period_ns is None or not self.session.limits.profile.tells_sampling:
            return False
        return item.revised_sampling_ms > self._period_ns / 1e6 * _ROUNDING

    async def _delete_items(self, items: Sequence[Item]) -> None:
        """Delete monitored items at the server; what it thinks of them does not matter."""
        if not items or self._id is None:
            return

        async def ask(part: Sequence[Item]) -> Sequence[Any]:
            request = ua.DeleteMonitoredItemsRequest()
            request.Parameters.SubscriptionId = self._id
            request.Parameters.MonitoredItemIds = [item.item_id for item in part]
            return list((await self._exchange(request, ua.DeleteMonitoredItemsResponse)).Results)

        await in_batches(self.session, "monitor", items, ask, "end the monitoring of tags")
        for item in items:
            item.item_id = None

    async def _monitor(self, ready: Sequence[tuple[Item, NodeRef]]) -> list[tuple[Item, NodeRef]]:
        """Create monitored items; return those whose filter was refused. What there is no room for is polled."""
        answers = await in_batches(self.session, "monitor", ready, self._ask_to_monitor, "monitor the tags")
        refused: list[tuple[Item, NodeRef]] = []
        to_poll: dict[str, list[Item]] = {}
        for (item, ref), (name, result) in zip(ready, answers, strict=True):
            if result is not None:
                item.item_id, item.renew = int(result.MonitoredItemId), False
                item.revised_sampling_ms = float(result.RevisedSamplingInterval)
                item.revised_queue = int(result.RevisedQueueSize)
                item.polled = ""
                self.poller.remove(item.column)
                if not item.doubted:
                    self._delivers(item)
            elif name in _FILTER_REFUSED and item.filtered:
                refused.append((item, ref))
            elif name in _NO_ROOM or name in _NO_REPORTS:
                to_poll.setdefault(name, []).append(item)
            else:
                self._fails(item, name)
        for name, items in to_poll.items():
            await self._poll_items(items, name)
        return refused

    async def _ask_to_monitor(self, ready: Sequence[tuple[Item, NodeRef]]) -> Sequence[tuple[str, Any]]:
        """Ask for monitored items in one call; return (name of the status, result or None) of each."""
        request = ua.CreateMonitoredItemsRequest()
        request.Parameters.SubscriptionId = self._id
        request.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
        span_ns = max(self._publishing_ns, int(BURST_S * 1e9))
        sampling_ms = self.session.limits.profile.sampling(self._sampling_ns / 1e6)
        every_ms = sampling_ms or (self._period_ns or self._publishing_ns) / 1e6
        queue = math.ceil(span_ns / (every_ms * 1e6)) + 2
        for item, ref in ready:
            one = ua.MonitoredItemCreateRequest()
            one.ItemToMonitor.NodeId = ref.id
            one.ItemToMonitor.AttributeId = ua.AttributeIds.Value
            one.MonitoringMode = ua.MonitoringMode.Reporting
            asked = one.RequestedParameters
            asked.ClientHandle = item.column
            asked.SamplingInterval = sampling_ms
            asked.QueueSize = min(1000, max(10, queue))
            asked.DiscardOldest = True
            if item.filtered:
                trigger = ua.DataChangeFilter()
                trigger.Trigger = ua.DataChangeTrigger.StatusValueTimestamp
                trigger.DeadbandType = ua.DeadbandType.None_
                asked.Filter = trigger
            request.Parameters.ItemsToCreate.append(one)
        try:
            response = await self._exchange(request, ua.CreateMonitoredItemsResponse)
        except UaStatusCodeError as error:
            name = wire.status_name(error.code)
            if (name in TOO_MUCH and len(ready) > 1) or name not in _NO_ROOM | _NO_REPORTS:
                raise
            return [(name, None)] * len(ready)
        return [
            (one.StatusCode.name, one if one.StatusCode.is_good() else None) for one in response.Results
        ]

    def _fails(self, item: Item, reason: str) -> None:
        if item.reason != reason:
            log.warning(
                "%s: tag %s (%s) delivers nothing: %s", self.session.where, item.name, item.node, reason
            )
        item.reason = reason

    def _delivers(self, item: Item) -> None:
        if item.reason not in ("", "not connected"):
            log.warning("%s: tag %s (%s) delivers again", self.session.where, item.name, item.node)
        item.reason = ""
        item.doubted = self._doubted[item.column] = False

    def _doubt(self, item: Item) -> None:
        """Believe that an item delivers when a value of it says so."""
        item.doubted = self._doubted[item.column] = True

    async def _retry(self, client: Client) -> None:
        """Try items that fail again, after 1 s, 2 s ... 30 s, and what is polled for lack of room, more rarely."""
        delay, room_s = _RETRY_FIRST_S, _ROOM_FIRST_S
        loop = asyncio.get_running_loop()
        room_at = loop.time() + room_s
        while self._client is client:
            await asyncio.sleep(delay)
            if self._client is not client:
                return
            failing = [item for item in self.items if item.reason or item.renew]
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
        monitored = [item for item in failing if not item.polled] if self._id is not None else []
        polled = [item for item in failing if item.polled or self._id is None]
        if monitored:
            await self._create_items(monitored)
        for why in {item.polled for item in polled}:
            await self._poll_items([item for item in polled if item.polled == why], why or self._why_polled)

    @property
    def _why_polled(self) -> str:
        return next((item.polled for item in self.items if item.polled), "there is no subscription")

    async def _ask_for_room(self) -> None:
        """Ask the server to monitor what it had no room for."""
        waiting = [item for item in self.items if item.polled in _NO_ROOM]
        if not waiting:
            return
        if self._id is not None:
            await self._create_items(waiting)
        elif len(waiting) == len(self.items):
            await self._create()

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
                self._on_idle()
            return
        samples = answer.samples
        self.counters["notifications"] += 1
        handles = samples.handle
        known = (handles >= 0) & (handles < len(self._own))
        if not known.all() or not self._own[handles].all():
            known[known] = self._own[handles[known]]
            self.counters["unknown_handles"] += int(len(known) - known.sum())
            samples = _only(samples, known)
        if len(samples.handle):
            self._take(samples.handle.astype(np.int32), samples.source_ns, samples)

    def _polled(self, columns: NDArray[np.int32], stamps: NDArray[np.int64], samples: wire.Samples) -> None:
        """Take the answer of one poll."""
        self.last_heard_ns = self._clock_ns()
        self._take(columns, stamps, samples)

    def _take(self, columns: NDArray[np.int32], stamps: NDArray[np.int64], samples: wire.Samples) -> None:
        """Count what is odd, put in what is missing, and hand the samples on."""
        self.counters["samples"] += len(columns)
        null = stamps == wire.NO_STAMP
        if null.any():
            self.counters["null_timestamp"] += int(null.sum())
            stamps = np.where(null, samples.server_ns, stamps)
            stamps = np.where(stamps == wire.NO_STAMP, self._utc_ns(), stamps)
        value, status = samples.value, samples.status
        severe = status >= 0x80000000
        if severe.any() or self._doubted.any():
            self._look_for_gone(columns, status, severe)
        self.counters["overload"] += int(((status & 0xFFFF0000) == GOOD_OVERLOAD).sum())
        if samples.text_at is not None and (self._textual.any() or (samples.text_at >= 0).any()):
            value, status = self._without_text(columns, samples.text_at >= 0, value, status)
        self._on_samples(columns, stamps, value, status)

    def _look_for_gone(
        self, columns: NDArray[np.int32], status: NDArray[np.uint32], severe: NDArray[np.bool_]
    ) -> None:
        """Doubt items whose node is gone, and believe those again that deliver."""
        gone = severe & np.isin(status & 0xFFFF0000, _GONE)
        for i in np.flatnonzero(gone):
            item = self._by_column.get(int(columns[i]))
            if item is not None:
                self._doubt(item)
                item.renew = True
                self._fails(item, wire.status_name(int(status[i]) & 0xFFFF0000))
        for column in columns[~gone & self._doubted[columns]]:
            self._delivers(self._by_column[int(column)])

    def _without_text(
        self, columns: NDArray[np.int32], text: NDArray[np.bool_], value: NDArray[np.float64],
        status: NDArray[np.uint32],
    ) -> tuple[NDArray[np.float64], NDArray[np.uint32]]:
        """Mask the texts of tags that are numbers: the code of a text would pass for a value."""
        wrong = text & self._no_text[columns]
        bad = status >= 0x80000000  # without a value, which says nothing of the type
        for i in np.flatnonzero((wrong != self._textual[columns]) & ~bad):
            item = self._by_column[int(columns[i])]
            item.textual = self._textual[item.column] = bool(wrong[i])
            self.counters["type_changes"] += 1
            log.warning(
                "%s: tag %s (%s) delivers %s", self.session.where, item.name, item.node,
                "text instead of numbers; it is masked" if item.textual else "numbers again",
            )
        if not wrong.any():
            return value, status
        self.counters["not_numeric"] += int(wrong.sum())
        return np.where(wrong, np.nan, value), np.where(wrong, _TYPE_MISMATCH, status).astype(np.uint32)

    def _ended(self, code: str) -> None:
        """Make a new subscription on the same session when the server has ended this one."""
        if self._id is None:
            return  # told twice
        log.warning("%s: the server ended the subscription (%s); making a new one", self.session.where, code)
        self.counters["rebuilt"] += 1
        client = self.session.client
        if self.session.pump is not None:
            self.session.pump.forget(self._id)
        self._id = None
        for item in self.items:
            item.item_id = None
        self._alive = False
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._rebuild(client), name="rebuild"))
        self._on_lost()

    async def _rebuild(self, client: Client) -> None:
        try:
            await self._create()
        except DetectorError as error:
            self.session.fail(error.what, client)


def _only(samples: wire.Samples, keep: NDArray[np.bool_]) -> wire.Samples:
    """Return some of the samples."""
    return wire.Samples(
        samples.handle[keep], samples.source_ns[keep], samples.server_ns[keep], samples.value[keep],
        samples.status[keep], text_at=None if samples.text_at is None else samples.text_at[keep], raw=samples.raw,
    )
