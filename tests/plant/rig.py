"""The service between a proxy and a server, and what must hold after every fault.

After each fault, whatever it was: scores flow again, a counter tells what was lost, nothing is left over (tasks,
sockets, connections), nothing was asked in a hurry (messages and connections per second), and no
alert was raised.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from running import content, write
from running import until as wait_until

from opcua_detector.client import GroupFeed, LinkState, Session
from opcua_detector.config import load
from opcua_detector.nodes import State
from opcua_detector.service import MonitorRun, Service

from .proxy import ChaosProxy
from .seen import ScoreClock
from .vendors import Vendor

WAIT_S = 40.0
# What a sound client sends: a publish request and a write per row, heartbeats and look-ups of what fails beside them,
# and for each connection the log-in, limits, nodes and types. A busy loop sends a thousand messages a second.
PER_ROW, PER_SECOND, PER_CONNECTION = 2.0, 20.0, 60
FREE_CONNECTIONS, CONNECTIONS_PER_S = 8, 2.0  # the first attempts follow each other quickly


@dataclass
class Stock:
    """What there is of things that must not become more."""

    tasks: Counter[str] = field(default_factory=Counter)
    sockets: int = 0
    connections: int = 0

    def more_than(self, before: Stock) -> dict[str, Any]:
        """Return what there is more of than before."""
        found: dict[str, Any] = {}
        tasks = self.tasks - before.tasks
        if tasks:
            found["tasks"] = dict(tasks)
        for name in ("sockets", "connections"):
            if getattr(self, name) > getattr(before, name):
                found[name] = (getattr(before, name), getattr(self, name))
        return found


class Rig:
    """A running service with its proxy and its server."""

    def __init__(self, service: Service, proxy: ChaosProxy, vendor: Vendor, file: Path, clock: ScoreClock) -> None:
        self.service, self.proxy, self.vendor, self.file, self.clock = service, proxy, vendor, file, clock
        self.before = Stock()
        self.session_before: dict[str, int] = {}
        self.feed_before: dict[str, int] = {}
        self._struck_at = 0.0
        self._proxy_before: dict[str, int] = {}

    @property
    def run(self) -> MonitorRun:
        """The monitor."""
        return self.service.runs["lorenz"]

    @property
    def session(self) -> Session:
        """The session to the plant."""
        return self.service.sessions["plant"]

    @property
    def feed(self) -> GroupFeed:
        """The rows."""
        return self.service.feeds["lorenz"]

    def grown(self, name: str) -> int:
        """Return by how much a counter of session, feed or write-back has grown since `strike_begins`."""
        if name in self.session.counters:
            return self.session.counters[name] - self.session_before.get(name, 0)
        return self.counters()[name] - self.feed_before.get(name, 0)

    def counters(self) -> dict[str, int]:
        """Return the counters of feed and write-back by name."""
        found = dict(self.feed.counters())
        for back in {run.back for run in self.service.runs.values() if run.back is not None}:
            found |= {f"write_{name}": n for name, n in back.counters.items()}
        return found

    def told(self) -> str:
        """Return where everything stands, for a test that fails."""
        items = [(one.name, one.reason, one.item_id, one.polled) for sub in self.feed.subscriptions.values()
                 for one in sub.items]
        return (f"session {self.session.state} ({self.session.reason}), state {self.run.state}, items {items}, "
                f"valid {self.feed.frame.valid}, counters {self.session.counters} {self.counters()}")

    async def scoring(self, more: int = 50) -> None:
        """Wait until the monitor judges rows and finds them normal."""
        target = self.run.scored + more
        await until(lambda: self.run.scored >= target and self.run.state == State.NORMAL, f"{more} more scores")

    async def waiting(self) -> None:
        """Wait until the session has noticed that its connection is lost."""
        await until(lambda: self.session.state is LinkState.WAITING, "the loss to be noticed")

    async def reconnected(self, n: int = 1) -> None:
        """Wait until the session is connected once more than when the fault began."""
        await until(lambda: self.grown("reconnects") >= n and self.session.state is LinkState.CONNECTED,
                    f"reconnect; {self.session.state} ({self.session.reason}), {self.session.counters}")

    def stock(self) -> Stock:
        """Count what must not become more; what the rig itself opens is left out."""
        ours = ("proxy", "Task-")
        names = Counter(task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith(ours))
        return Stock(names, sockets(), self.proxy.open_connections)

    async def strike_begins(self) -> None:
        """Remember everything that is compared at the end."""
        self.before = self.stock()
        self.session_before, self.feed_before = dict(self.session.counters), self.counters()
        self._proxy_before, self._struck_at = self.proxy.counts(), time.monotonic()
        self.clock.begin()

    def over(self) -> None:
        """Note that what disturbs has ended; without it the fault is one of a moment."""
        self.clock.over()

    async def survived(self, more: int = 60, *, per_row: float = PER_ROW) -> None:
        """Hold the service to what is true after every fault; `per_row` as in `not_busy`."""
        await self.scoring(more)
        self.not_busy(per_row)
        await self.nothing_left()
        alerts = [one.sentence for one in self.run.alerts]
        assert self.run.monitor.verdict.event_no == 0, f"alerts {alerts}, counters {self.counters()}"
        assert self.feed.frame_errors == 0 and set(self.feed.tag_states().values()) == {""}

    def not_busy(self, per_row: float = PER_ROW) -> None:
        """Assert that neither messages nor connections came faster than a sound client sends them.

        per_row : messages that a row costs; more than usual where calls are split
        """
        seconds = time.monotonic() - self._struck_at
        now, then = self.proxy.counts(), self._proxy_before
        tried = now["accepted"] + now["refused"] - then["accepted"] - then["refused"]
        sent = now["to_server_messages"] - then["to_server_messages"]
        each = 1 if self.session.config.policy == "None" else 2  # with security the endpoints are asked for first
        most = each * (FREE_CONNECTIONS + CONNECTIONS_PER_S * seconds)
        assert tried <= most, f"{tried} connections in {seconds:.1f} s"
        rows_per_s = 1e9 / self.feed.group.period
        allowed = (per_row * rows_per_s + PER_SECOND) * seconds + PER_CONNECTION * (tried + 1)
        assert sent <= allowed, f"{sent} messages in {seconds:.1f} s, {tried} connections"

    async def nothing_left(self) -> None:
        """Wait until nothing is more than before the fault."""
        found: dict[str, Any] = {}

        def gone() -> bool:
            nonlocal found
            found = self.stock().more_than(self.before)
            return not found

        try:
            await until(gone, "everything of the fault to be gone")
        except AssertionError:
            raise AssertionError(f"left over: {found}") from None


def living(*kinds: type) -> Counter[str]:
    """Count the living objects of these classes; takes a second, in which the event loop stands still."""
    gc.collect()
    return Counter(kind.__name__ for one in gc.get_objects() if (kind := type(one)) in kinds)


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition; AssertionError with these words when it is in vain."""
    await wait_until(condition, what, WAIT_S)


def sockets() -> int:
    """Return how many sockets this process has open; 0 where the system does not say."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return 0
    n = 0
    for one in folder.iterdir():
        try:
            n += os.readlink(one).startswith("socket:")
        except OSError:
            continue
    return n


def configuration(endpoint: str, **changes: Any) -> dict[str, Any]:
    """The Lorenz monitor; `group` and `server` are merged into the one there is."""
    given = content(endpoint)
    given["groups"][0] |= changes.get("group", {})
    given["servers"][0] |= {"timeout": "2 s"} | changes.get("server", {})
    given |= {"store": changes["store"]} if "store" in changes else {}
    given["monitors"][0] |= {"windows": ["200 ms"]} | changes.get("monitor", {})
    return given


@asynccontextmanager
async def rigged(vendor: Vendor, folder: Path, *, scores: bool = True, **changes: Any) -> AsyncIterator[Rig]:
    """Run the service on a server through a proxy; with `scores` the body begins when it scores."""
    async with ChaosProxy(vendor.port) as proxy:
        file = write(folder, configuration(proxy.endpoint, **changes))
        clock = ScoreClock()
        service = Service(load(file), file, on_verdict=clock.take)
        await service.start()
        rig = Rig(service, proxy, vendor, file, clock)
        try:
            if scores:
                await rig.scoring()
            yield rig
        except AssertionError as error:
            error.add_note(rig.told())
            raise
        finally:
            proxy.heal()
            await service.stop()
