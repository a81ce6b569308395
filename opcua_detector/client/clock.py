"""How far the clock of a server is from ours.

Method, as in NTP (RFC 5905, section 8) with one stamp of the server: t0, a read of Server/ServerStatus/CurrentTime, t1.
The stamp is the one in the head of the response, the moment at which the server sent it (Part 4, 7.33). It was made
between t0 and t1, so offset = stamp - (t0 + t1) / 2, wrong by half of the round trip t1 - t0 at most. Where the head
has none the ServerTimestamp of the value serves: second choice, because some servers (asyncua among them) renew that
value once a second only. Of several reads the median is taken over the half with the shortest round trips, since a
read that was held up says little. Our own span comes from the monotonic clock, so that a step of our clock in between
cannot spoil it. A server that stamps in ticks of 1 or 15.6 ms limits the rest.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from asyncua import Client, ua

from ..errors import DetectorError
from . import wire
from .session import Session

log = logging.getLogger(__name__)

READS = 9
PAUSE_S = 0.01
WATCH_EVERY_S = 60.0
WATCH_READS = 5
TELL_S = 1.0  # an offset beyond this is told, once per change; rows live on the server's clock, so it does no harm


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """Clock of the server less ours.

    offset_s, uncertainty_s : float; the uncertainty is half of the shortest round trip
    round_trip_s : float; the shortest; median_round_trip_s, longest_round_trip_s : of all reads
    reads : int
    """

    offset_s: float
    uncertainty_s: float
    round_trip_s: float
    median_round_trip_s: float
    longest_round_trip_s: float
    reads: int


async def measure_clock(
    session: Session, reads: int = READS, *, pause_s: float = PAUSE_S, utc_ns: Callable[[], int] = time.time_ns,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> ClockOffset | None:
    """Return the offset of a server's clock; None where it gives no time.

    Raises ConnectionProblem where it does not answer.
    """
    found: list[tuple[float, float]] = []  # (round trip, offset), seconds
    for i in range(reads):
        if i:
            await asyncio.sleep(pause_s)
        began_utc, began = utc_ns(), clock_ns()
        stamp = await session.call(_server_time(session), "read the server's time")
        round_trip = clock_ns() - began
        if stamp != wire.NO_STAMP:
            found.append((round_trip / 1e9, (stamp - began_utc - round_trip / 2) / 1e9))
    if not found:
        return None
    found.sort()
    best = found[: (len(found) + 1) // 2]
    trips = [trip for trip, _ in found]
    return ClockOffset(
        statistics.median(offset for _, offset in best), trips[0] / 2, trips[0], statistics.median(trips), trips[-1],
        len(found))


async def _server_time(session: Session) -> int:
    """Return the moment at which the server answered by its clock, ns since 1970 UTC; NO_STAMP where it tells none."""
    one = ua.ReadValueId()
    one.NodeId = wire.node_id(ua.ObjectIds.Server_ServerStatus_CurrentTime)
    one.AttributeId = ua.AttributeIds.Value
    request = ua.ReadRequest()
    request.Parameters.TimestampsToReturn = ua.TimestampsToReturn.Server
    request.Parameters.NodesToRead = [one]
    answer = wire.decode(await wire.send(session.client, request, session.timeout_s), ua.ReadResponse)
    told = [answer.ResponseHeader.Timestamp, *(value.ServerTimestamp for value in answer.Results)]
    return next((stamp for stamp in map(wire.to_ns, told) if stamp > 0), wire.NO_STAMP)


class ClockWatch:
    """A part of a session that measures the server's clock now and then.

    Attributes
    ----------
    measured : ClockOffset or None; the last measurement of this or an earlier connection
    """

    def __init__(self, session: Session, *, every_s: float = WATCH_EVERY_S) -> None:
        self.session, self._every_s = session, every_s
        self.measured: ClockOffset | None = None
        self._task: asyncio.Task[None] | None = None
        self._told = False

    async def link_up(self) -> None:
        """Begin to measure on this connection."""
        self._task = asyncio.create_task(self._watch(self.session.client), name=f"clock {self.session.config.name}")

    def link_down(self) -> None:
        """Forget the connection; what was measured stands."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _watch(self, client: Client) -> None:
        while True:
            try:
                found = await measure_clock(self.session, WATCH_READS)
            except DetectorError as error:
                log.debug("%s: the clock could not be measured: %s", self.session.where, error.what)
                found = None  # the probe of the session finds out whether the connection lives
            if found is not None:
                self.measured = found
                self.session.clock_offset_s = found.offset_s
                self._tell(found)
            await asyncio.sleep(self._every_s)

    def _tell(self, found: ClockOffset) -> None:
        off = abs(found.offset_s) > TELL_S
        if off != self._told:
            self._told = off
            log.warning("%s: its clock is %+.1f s from ours%s", self.session.where, found.offset_s,
                        "" if off else ", which is close again")
