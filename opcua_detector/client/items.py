"""The tags of one subscription at the server: monitored, polled, or failing with a reason and tried again.

What cannot be monitored, or not fast enough, is polled (`polling`): tags for which the server has no room or no
sampling as fast as the period, all of them where it has no room for a subscription or publishes too slowly. What was
refused for lack of room is asked for again now and then. Tags that are elements of one array share an item (`arrays`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import Client, ua
from asyncua.ua.uaerrors import UaStatusCodeError
from numpy.typing import NDArray

from ..errors import NodeProblem
from . import wire
from .limits import TOO_MUCH, in_batches
from .nodes import NodeRef, resolve
from .polling import Poller
from .session import Session

log = logging.getLogger(__name__)

BURST_S = 1.0  # the item queue holds what a server may send after a stall of this length
_FILTER_REFUSED = frozenset(
    {"BadMonitoredItemFilterUnsupported", "BadMonitoredItemFilterInvalid", "BadFilterNotAllowed"}
)
# No room: the rest runs, these are polled and asked for again.
NO_ROOM = TOO_MUCH | {
    "BadTooManyMonitoredItems", "BadTooManySubscriptions", "BadOutOfMemory", "BadResourceUnavailable",
    "BadMaxConnectionsReached", "BadLicenseExpired", "BadLicenseLimitsExceeded",
}
# The server, or this node, cannot report changes at all: these are polled.
NO_REPORTS = frozenset({
    "BadServiceUnsupported", "BadNotSupported", "BadNotImplemented", "BadMonitoringModeInvalid",
    "BadDataEncodingUnsupported", *_FILTER_REFUSED,
})
_ROUNDING = 1.01


@dataclass(slots=True)
class Item:
    """One tag of the subscription.

    element : place in the flattened array that its node is; -1: the node is a scalar
    reason : str; why it does not deliver, empty while it does
    polled : str; why it is polled, empty while it is monitored
    revised_sampling_ms, revised_queue : what the server made of the request
    text : whether a text is a value of this tag (its code); else it is masked
    textual : whether its last value was a text although it should not be
    riders : further elements of the same array, which have no item of their own at the server and follow this one
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
    element: int = -1
    riders: tuple[Item, ...] = ()

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(column, element) of each tag that is read from this node."""
        return tuple((one.column, one.element) for one in (self, *self.riders))

    def lead(self) -> None:
        """Let the riders stand as this one does."""
        for one in self.riders:
            one.reason, one.polled, one.doubted = self.reason, self.polled, self.doubted
            one.revised_sampling_ms, one.revised_queue = self.revised_sampling_ms, self.revised_queue


def carriers(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items that are asked of the server: all scalars, and of each array the first tag, with its riders."""
    arrays: dict[str, list[Item]] = {}
    for item in items:
        if item.element >= 0:
            arrays.setdefault(item.node, []).append(item)
    for first, *others in arrays.values():
        first.riders = tuple(others)
    return tuple(item for item in items if item.element < 0 or arrays[item.node][0] is item)


class Monitoring:
    """What is asked of the server for the items of one subscription.

    Parameters
    ----------
    items : all tags; those that are asked for are `carriers`
    poller : reads what is not monitored
    exchange : sends a request and returns its answer
    sampling_ns, publishing_ns, period_ns : as `Subscription`

    Attributes
    ----------
    subscription_id : at the server; None while there is none
    doubted : bool[columns]; of tags whose node was gone, True until a value says that it is there
    """

    def __init__(
        self, session: Session, items: Sequence[Item], poller: Poller,
        exchange: Callable[[Any, type], Awaitable[Any]], *, sampling_ns: int, publishing_ns: int,
        period_ns: int | None,
    ) -> None:
        self.session, self.poller = session, poller
        self.carriers = carriers(items)
        self.subscription_id: int | None = None
        self.doubted: NDArray[np.bool_] = np.zeros(max((one.column for one in items), default=-1) + 1, np.bool_)
        self._n_tags = len(items)
        self._exchange = exchange
        self._sampling_ns, self._publishing_ns, self._period_ns = sampling_ns, publishing_ns, period_ns
        self._carrier = {one.column: item for item in self.carriers for one in (item, *item.riders)}

    def forget(self) -> None:
        """Forget everything that was of the connection."""
        self.subscription_id = None
        for item in self.carriers:
            item.reason = "not connected"
            item.item_id, item.polled, item.doubted, item.renew = None, "", False, False
            item.lead()
        self.doubted[:] = False

    def without_subscription(self) -> None:
        """Forget the items of a subscription that the server has ended."""
        self.subscription_id = None
        for item in self.carriers:
            item.item_id = None

    def without_filter(self) -> None:
        """Ask for no DataChangeFilter."""
        for item in self.carriers:
            item.filtered = False

    @property
    def places(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Client handle -> (column, element) of its tags."""
        return {item.column: item.places for item in self.carriers}

    @property
    def why_polled(self) -> str:
        """Why those that are polled are."""
        return next((item.polled for item in self.carriers if item.polled), "there is no subscription")

    @property
    def failing(self) -> list[Item]:
        """Items that deliver nothing, or must be monitored anew."""
        return [item for item in self.carriers if item.reason or item.renew]

    @property
    def monitored(self) -> list[Item]:
        """Items that the server monitors."""
        return [item for item in self.carriers if item.item_id is not None and not item.reason and not item.renew]

    @property
    def waiting_for_room(self) -> list[Item]:
        """Items that the server had no room for."""
        return [item for item in self.carriers if item.polled in NO_ROOM]

    async def poll(self, items: Sequence[Item], why: str, client: Client | None) -> None:
        """Read these items from now on; what is not found keeps its reason.

        client : the connection to begin on; None: whoever asked begins
        """
        found = await resolve(self.session, [item.node for item in items])
        polled = 0
        for item in items:
            ref = found[item.node]
            if isinstance(ref, NodeProblem):
                self._fails(item, ref.what)
                continue
            polled += (1 + len(item.riders)) * (item.polled != why)
            item.polled, item.renew = why, False
            if item.doubted or item.reason:
                self._doubt(item)  # whether it delivers its first answer tells
            self.poller.add(item.column, ref.id, item.places)
            item.lead()
        if polled:
            log.warning(
                "%s: %d of %d tags are polled every %g ms: %s", self.session.where, polled, self._n_tags,
                self.poller.every_ns / 1e6, why,
            )
        if client is not None and len(self.poller):
            self.poller.start(client)

    async def create(self, items: Sequence[Item], client: Client | None) -> None:
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
        refused = await self._monitor(ready, client)
        if refused:  # a server that knows no filter: its own trigger is better than nothing
            for item, _ in refused:
                item.filtered = False
            await self._monitor(refused, client)
        slow = [item for item in items if item.item_id is not None and self._samples_too_slowly(item)]
        if slow:
            worst = max(item.revised_sampling_ms for item in slow)
            await self._delete_items(slow)
            await self.poll(slow, f"the server samples no faster than every {worst:g} ms", client)

    def _samples_too_slowly(self, item: Item) -> bool:
        if self._period_ns is None or not self.session.limits.profile.tells_sampling:
            return False
        return item.revised_sampling_ms > self._period_ns / 1e6 * _ROUNDING

    async def _delete_items(self, items: Sequence[Item]) -> None:
        """Delete monitored items at the server; what it thinks of them does not matter."""
        if not items or self.subscription_id is None:
            return

        async def ask(part: Sequence[Item]) -> Sequence[Any]:
            request = ua.DeleteMonitoredItemsRequest()
            request.Parameters.SubscriptionId = self.subscription_id
            request.Parameters.MonitoredItemIds = [item.item_id for item in part]
            return list((await self._exchange(request, ua.DeleteMonitoredItemsResponse)).Results)

        await in_batches(self.session, "monitor", items, ask, "end the monitoring of tags")
        for item in items:
            item.item_id = None

    async def _monitor(
        self, ready: Sequence[tuple[Item, NodeRef]], client: Client | None
    ) -> list[tuple[Item, NodeRef]]:
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
                if item.doubted:
                    item.lead()
                else:
                    self._delivers(item)
            elif name in _FILTER_REFUSED and item.filtered:
                refused.append((item, ref))
            elif name in NO_ROOM or name in NO_REPORTS:
                to_poll.setdefault(name, []).append(item)
            else:
                self._fails(item, name)
        for name, items in to_poll.items():
            await self.poll(items, name, client)
        return refused

    async def _ask_to_monitor(self, ready: Sequence[tuple[Item, NodeRef]]) -> Sequence[tuple[str, Any]]:
        """Ask for monitored items in one call; return (name of the status, result or None) of each."""
        request = ua.CreateMonitoredItemsRequest()
        request.Parameters.SubscriptionId = self.subscription_id
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
            if (name in TOO_MUCH and len(ready) > 1) or name not in NO_ROOM | NO_REPORTS:
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
        item.lead()

    def _delivers(self, item: Item) -> None:
        if item.reason not in ("", "not connected"):
            log.warning("%s: tag %s (%s) delivers again", self.session.where, item.name, item.node)
        item.reason = ""
        self._set_doubted(item, False)

    def _doubt(self, item: Item) -> None:
        """Believe that an item delivers when a value of it says so."""
        self._set_doubted(item, True)

    def _set_doubted(self, item: Item, doubted: bool) -> None:
        item.doubted = doubted
        for column, _ in item.places:
            self.doubted[column] = doubted
        item.lead()

    def gone(self, column: int, reason: str) -> None:
        """Take note that the node of a tag is not there any more: its item may stay dead for ever."""
        item = self._carrier[column]
        self._doubt(item)
        item.renew = True
        self._fails(item, reason)

    def back(self, column: int) -> None:
        """Take note of a value of a tag that was doubted."""
        self._delivers(self._carrier[column])
