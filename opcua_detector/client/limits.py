"""How much a server takes in one call: what it says, what its make is known for, and what it refused.

A server states OperationLimits (Part 5, 6.3.11), or nothing, or more than it keeps: open62541 states 0 for a limit that
it enforces, and an S7-1500 counts the items of all requests that are under way against its 1000. So the stated limit
is where a session begins, the table of makes fills in what is not stated, and a refusal (BadTooManyOperations, an
answer or a request that is too large) halves the size of that call. What was learnt holds for the server, not for the
connection: after a reconnect nothing is tried in vain again. On one session such calls go out one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from asyncua import Client, ua
from asyncua.ua.uaerrors import UaStatusCodeError

from ..errors import ConnectionProblem
from . import wire

log = logging.getLogger(__name__)

# kind of call -> node of the limit
KINDS = {
    "read": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerRead,
    "write": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerWrite,
    "monitor": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxMonitoredItemsPerCall,
    "translate": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerTranslateBrowsePathsToNodeIds,
    "browse": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerBrowse,
    "history": ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerHistoryReadData,
}
_ABOUT = (
    ua.ObjectIds.Server_ServerStatus_BuildInfo_ManufacturerName,
    ua.ObjectIds.Server_ServerStatus_BuildInfo_ProductName,
    ua.ObjectIds.Server_ServerStatus_BuildInfo_ProductUri,
    ua.ObjectIds.Server_ServerStatus_BuildInfo_SoftwareVersion,
)
_ITEMS = ua.ObjectIds.Server_ServerCapabilities_MaxMonitoredItemsPerSubscription
MOST_PER_CALL = 10_000  # whatever is stated: an answer must stay well below `wire.MOST_BYTES`
MOST_AT_ONCE = 1000  # of what asyncua encodes, 0.1 ms each: a longer call would hold up the rows of other servers
TOO_MUCH = frozenset(
    {
        "BadTooManyOperations",
        "BadEncodingLimitsExceeded",
        "BadResponseTooLarge",
        "BadRequestTooLarge",
        "BadTcpMessageTooLarge",
    }
)
_HANG_UPS = 2  # in a row, in the middle of a call: a server may answer one that is too large by hanging up
_LEAST_AFTER_HANG_UP = 50

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of a make of server.

    name : as it is shown
    pattern : regular expression, any case, on "manufacturer | product | uri | version"
    batch : items in one call where the server states no limit
    sampling_ms : the sampling intervals that it has, ascending; empty: any
    filters : whether it takes a DataChangeFilter; without one its own trigger (status and value) is what there is
    items : monitored items that one subscription holds; 0: not known
    tells_sampling : whether the revised sampling interval is one; asyncua states the publishing interval there, and
        samples with each change
    """

    name: str
    pattern: str
    batch: int
    sampling_ms: tuple[float, ...] = ()
    filters: bool = True
    items: int = 0
    tells_sampling: bool = True

    def sampling(self, asked_ms: float) -> float:
        """Return the interval to ask for: the longest of the make that is not above what is wanted, else its shortest.

        asked_ms : 0 stands for "as fast as you can" and stays
        """
        if not self.sampling_ms or asked_ms <= 0:
            return asked_ms
        return max((one for one in self.sampling_ms if one <= asked_ms), default=self.sampling_ms[0])


UNKNOWN = Profile("unknown", "", 50)
# The first that fits. Where no figure of a make is known its batch is a careful one; a refusal halves it anyway.
PROFILES = (
    Profile("S7-1200", r"s7-?1200|6es7 ?21[1-7]", 100, (100.0, 250.0, 500.0, 1000.0), filters=False, items=1000),
    Profile("S7-1500", r"s7-?1500|et ?200sp|6es7 ?5[1-4]", 500, (100.0, 250.0, 500.0, 1000.0), items=1000),
    Profile("Siemens", r"siemens|simatic", 100, items=1000),
    Profile("Kepware", r"kepware|kepserver|thingworx", 1000),
    Profile("Beckhoff", r"beckhoff|twincat|tf6100", 100),
    Profile("CODESYS", r"codesys|3s-smart|3s - smart", 100),
    Profile("open62541", r"open62541", 500),
    Profile("node-opcua", r"node-?opcua|second vendor|sterfive", 500),
    Profile("asyncua", r"freeopcua|opcua-asyncio|asyncua", 1000, tells_sampling=False),
)


def profile_of(manufacturer: str, product: str, uri: str = "", version: str = "") -> Profile:
    """Return what is known of the server with this BuildInfo (Part 5, 12.4)."""
    text = " | ".join((manufacturer, product, uri, version))
    return next((one for one in PROFILES if re.search(one.pattern, text, re.IGNORECASE)), UNKNOWN)


class Limits:
    """The sizes of calls to one server; lives as long as its session object, over all connections.

    Attributes
    ----------
    stated : kind of call -> what the server states; a kind that it does not state is missing
    learnt : kind of call -> what was left after refusals
    profile : Profile; what is known of its make
    about : str; manufacturer, product and version as the server tells them
    halved : int; how often a call was too large
    items_per_subscription : int; that a subscription has room for, 0 where nobody knows
    """

    def __init__(self) -> None:
        self.stated: dict[str, int] = {}
        self.learnt: dict[str, int] = {}
        self.profile = UNKNOWN
        self.about = ""
        self.halved = 0
        self.items_per_subscription = 0
        self.turn = asyncio.Lock()  # held by the call that is under way
        self._hang_ups: dict[str, int] = {}

    def size(self, kind: str) -> int:
        """Return how many items of a kind (`KINDS`) go into one call."""
        known = min(self.stated.get(kind, self.profile.batch), MOST_PER_CALL)
        return max(1, min(known, self.learnt.get(kind, known)))

    def refused(self, kind: str, size: int) -> int:
        """Take note that a call of this size was too large; return the size of the next one."""
        self.learnt[kind] = max(1, size // 2)
        self.halved += 1
        return self.learnt[kind]

    def worked(self, kind: str) -> None:
        """Take note that a call was answered."""
        self._hang_ups.pop(kind, None)

    def hung_up(self, kind: str, size: int) -> None:
        """Take note that the connection ended while a call was under way; once may be chance, twice is not."""
        if size <= _LEAST_AFTER_HANG_UP:
            return
        self._hang_ups[kind] = self._hang_ups.get(kind, 0) + 1
        if self._hang_ups[kind] >= _HANG_UPS:
            self._hang_ups[kind] = 0
            self.refused(kind, max(size, 2 * _LEAST_AFTER_HANG_UP))

    async def read(self, client: Client) -> None:
        """Read what the server states and who made it; a server without these nodes states nothing."""
        nodes = [wire.node_id(number) for number in (*KINDS.values(), *_ABOUT, _ITEMS)]
        try:
            found = await client.uaclient.read_attributes(nodes, ua.AttributeIds.Value)
        except UaStatusCodeError as error:
            if wire.status_name(error.code) not in TOO_MUCH:
                raise
            found = [(await client.uaclient.read_attributes([one], ua.AttributeIds.Value))[0] for one in nodes]
        contents = [_content(one) for one in found]
        self.stated = {
            kind: int(value)
            for kind, value in zip(KINDS, contents, strict=False)
            if isinstance(value, int) and value > 0  # 0 and absent mean no limit known
        }
        about = [value if isinstance(value, str) else "" for value in contents[len(KINDS) : -1]]
        self.profile = profile_of(*about)
        self.about = " ".join(one for one in (about[0], about[1], about[3]) if one)
        most = contents[-1] if isinstance(contents[-1], int) else 0
        self.items_per_subscription = min((one for one in (most, self.profile.items) if one > 0), default=0)


def _content(value: Any) -> Any:
    good = value.StatusCode is None or value.StatusCode.is_good()
    return value.Value.Value if good and value.Value is not None else None


class Caller(Protocol):
    """What of a session is needed here."""

    limits: Limits
    counters: dict[str, int]

    @property
    def where(self) -> str:
        """As errors and logs show it."""
        ...

    async def call(self, request: Awaitable[Any], what: str) -> Any:
        """Await one request."""
        ...


def too_much(problem: BaseException) -> bool:
    """Whether a call failed because it was too large."""
    cause = problem.__cause__ or problem
    return type(cause).__name__ in TOO_MUCH


async def in_batches(
    session: Caller,
    kind: str,
    items: Sequence[_T],
    ask: Callable[[Sequence[_T]], Awaitable[Sequence[_R]]],
    what: str,
    *,
    most: int = MOST_AT_ONCE,
) -> list[_R]:
    """Ask for items in calls that the server takes; return the answers in the order of the items.

    kind : one of `KINDS`; ask : makes the request for some of them; what : is being done, for the error text
    most : items in one call whatever the server would take

    Raises ConnectionProblem where a call fails for another reason than its size, or with a single item.
    """
    done: list[_R] = []
    while len(done) < len(items):
        part = items[len(done) : len(done) + min(most, session.limits.size(kind))]
        try:
            async with session.limits.turn:
                answers = await session.call(ask(part), what)
        except ConnectionProblem as problem:
            if too_much(problem) and len(part) > 1:
                smaller = session.limits.refused(kind, len(part))
                session.counters["halved_calls"] += 1
                log.warning(
                    "%s: %s: %d at once are too many (%s); %d from now on",
                    session.where, what, len(part), type(problem.__cause__).__name__, smaller,
                )
                continue
            if isinstance(problem.__cause__, ConnectionError):
                session.limits.hung_up(kind, len(part))
            raise
        if len(answers) != len(part):  # a server that answers fewer than asked, as some cut a list that is too long
            if len(part) == 1 or not 0 < len(answers) < len(part):
                raise ConnectionProblem(
                    f"{what}: {len(answers)} answers to {len(part)} items", where=session.where,
                    next_step="see the server's log",
                )
            session.limits.refused(kind, 2 * len(answers))
            session.counters["halved_calls"] += 1
        session.limits.worked(kind)
        done += answers
    return done
