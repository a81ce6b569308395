"""One subscription for the tags of a group on one server: one call per notification, with all its values.

The client handle of a monitored item is the column of its tag. What the server revised is kept and shown; an
item that fails is retried with growing delays while the rest runs.
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
from numpy.typing import NDArray

from ..errors import DetectorError, NodeProblem
from . import wire
from .nodes import NodeRef, resolve
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
_RETRY_FIRST_S, _RETRY_LAST_S = 1.0, 30.0

OnSamples = Callable[[NDArray[np.int32], NDArray[np.int64], NDArray[np.float64], NDArray[np.uint32]], None]


@dataclass(slots=True)
class Item:
    """One tag of the subscription.

    reason : str; why it does not deliver, empty while it does
    revised_sampling_ms, revised_queue : what the server made of the request
    """

    name: str
    node: str
    column: int
    reason: str = "not connected"
    revised_sampling_ms: float = math.nan
    revised_queue: int = 0
    filtered: bool = True


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
    clock_ns, utc_ns : for silence, and for samples without any stamp
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
        }
        self.last_heard_ns = 0
        self._sampling_ns, self._publishing_ns = sampling_ns, publishing_ns
        self._on_samples, self._on_lost, self._on_idle = on_samples, on_lost, on_idle
        self._keep_alive_s = KEEP_ALIVE_S if keep_alive_s is None else min(keep_alive_s, KEEP_ALIVE_S)
        self._clock_ns, self._utc_ns = clock_ns, utc_ns
        self._by_column = {item.column: item for item in self.items}
        self._id: int | None = None
        self._sequence = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._client: Client | None = None  # the tasks of any other connection end by themselves
        self._alive = False

    @property
    def alive(self) -> bool:
        """Whether the server has answered within the keep-alive interval."""
        return self._alive

    async def link_up(self) -> None:
        """Create the subscription and its items."""
        client = self.session.client
        await self._create()
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
        if self._id is not None and self.session.pump is not None:
            self.session.pump.forget(self._id)
        self._id = None
        for item in self.items:
            item.reason = "not connected"
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
        response = await session.call(
            self._exchange(request, ua.CreateSubscriptionResponse), "create a subscription"
        )
        result = response.Parameters
        self._id = int(result.SubscriptionId)
        self._sequence = 0
        self.revised = Revised(
            float(result.RevisedPublishingInterval),
            int(result.RevisedMaxKeepAliveCount),
            int(result.RevisedLifetimeCount),
        )
        self.last_heard_ns = self._clock_ns()
        self._alive = True
        assert session.pump is not None
        session.pump.register(self._id, self._published)
        await self._create_items(self.items)

    async def _exchange(self, request: Any, answer: type) -> Any:
        body = await wire.send(self.session.client, request, self.session.timeout_s)
        return wire.decode(body, answer)

    async def _create_items(self, items: Sequence[Item]) -> None:
        """Resolve and monitor items; what fails keeps its reason, the rest delivers."""
        found = await resolve(self.session, [item.node for item in items])
        ready: list[tuple[Item, NodeRef]] = []
        for item in items:
            ref = found[item.node]
            if isinstance(ref, NodeProblem):
                self._fails(item, ref.what)
            else:
                ready.append((item, ref))
        size = self.session.limit("monitor")
        refused: list[tuple[Item, NodeRef]] = []
        for start in range(0, len(ready), size):
            refused += await self._monitor(ready[start : start + size])
        if refused:  # a server that knows no filter: its own trigger is better than nothing
            for item, _ in refused:
                item.filtered = False
            await self._monitor(refused)

    async def _monitor(self, ready: Sequence[tuple[Item, NodeRef]]) -> list[tuple[Item, NodeRef]]:
        """Create monitored items in one call; return those whose filter was refused."""
        if not ready:
            return []
        request = ua.CreateMonitoredItemsRequest()
        request.Parameters.SubscriptionId = self._id
        request.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Both
        span_ns = max(self._publishing_ns, int(BURST_S * 1e9))
        queue = 10 if self._sampling_ns == 0 else math.ceil(span_ns / self._sampling_ns) + 2
        for item, ref in ready:
            one = ua.MonitoredItemCreateRequest()
            one.ItemToMonitor.NodeId = ref.id
            one.ItemToMonitor.AttributeId = ua.AttributeIds.Value
            one.MonitoringMode = ua.MonitoringMode.Reporting
            asked = one.RequestedParameters
            asked.ClientHandle = item.column
            asked.SamplingInterval = self._sampling_ns / 1e6
            asked.QueueSize = min(1000, max(10, queue))
            asked.DiscardOldest = True
            if item.filtered:
                trigger = ua.DataChangeFilter()
                trigger.Trigger = ua.DataChangeTrigger.StatusValueTimestamp
                trigger.DeadbandType = ua.DeadbandType.None_
                asked.Filter = trigger
            request.Parameters.ItemsToCreate.append(one)
        response = await self.session.call(
            self._exchange(request, ua.CreateMonitoredItemsResponse), "monitor the tags"
        )
        refused = []
        for (item, ref), result in zip(ready, response.Results, strict=True):
            if result.StatusCode.is_good():
                self._delivers(item)
                item.revised_sampling_ms = float(result.RevisedSamplingInterval)
                item.revised_queue = int(result.RevisedQueueSize)
            elif result.StatusCode.name in _FILTER_REFUSED and item.filtered:
                refused.append((item, ref))
            else:
                self._fails(item, result.StatusCode.name)
        return refused

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

    async def _retry(self, client: Client) -> None:
        """Try items that fail again, after 1 s, 2 s ... 30 s."""
        delay = _RETRY_FIRST_S
        while self._client is client:
            await asyncio.sleep(delay)
            if self._client is not client:
                return
            failing = [item for item in self.items if item.reason]
            if not failing or self._id is None or self.session.state is not LinkState.CONNECTED:
                delay = _RETRY_FIRST_S
                continue
            try:
                await self._create_items(failing)
            except DetectorError as error:
                self.session.fail(error.what, client)
                return
            delay = min(delay * 2, _RETRY_LAST_S)

    async def _watch(self, client: Client) -> None:
        """Report the connection dead when neither values nor keep-alives come."""
        while self._client is client:
            limit_s = self.revised.keep_alive_count * self.revised.publishing_ms / 1e3 + SILENCE_MARGIN_S
            silent_s = (self._clock_ns() - self.last_heard_ns) / 1e9
            if silent_s >= limit_s:
                self.session.fail(f"no value and no keep-alive for {silent_s:.1f} s", client)
                return
            await asyncio.sleep(max(0.05, limit_s - silent_s))

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
        if answer.samples is None:
            self.counters["keep_alives"] += 1
            if self._on_idle is not None:
                self._on_idle()
            return
        expected = self._sequence % 0xFFFFFFFF + 1
        if self._sequence and answer.sequence_number != expected:
            self.counters["lost_notifications"] += (answer.sequence_number - expected) % 0xFFFFFFFF
        self._sequence = answer.sequence_number
        samples = answer.samples
        self.counters["notifications"] += 1
        self.counters["samples"] += len(samples.handle)
        stamps = samples.source_ns
        null = stamps == wire.NO_STAMP
        if null.any():
            self.counters["null_timestamp"] += int(null.sum())
            stamps = np.where(null, samples.server_ns, stamps)
            stamps = np.where(stamps == wire.NO_STAMP, self._utc_ns(), stamps)
        self.counters["overload"] += int(((samples.status & 0xFFFF0000) == GOOD_OVERLOAD).sum())
        self._on_samples(samples.handle.astype(np.int32), stamps, samples.value, samples.status)

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
        self._alive = False
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._rebuild(client), name="rebuild"))
        self._on_lost()

    async def _rebuild(self, client: Client) -> None:
        try:
            await self._create()
        except DetectorError as error:
            self.session.fail(error.what, client)
