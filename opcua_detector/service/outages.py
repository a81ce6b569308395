"""What a service does about time without a connection: one alarm for each, events told later, gaps filled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..alarms import ConnectionAlarm
from ..app import group_tags
from ..client import LinkState, Session
from ..client.arrays import indexes_of
from ..client.forward import Continuity, Gap, bounded, rows_of_gap
from ..config import GroupConfig
from ..errors import ConnectionProblem, DetectorError
from ..frames import iso_utc
from ..store import AuditEntry, Event, Store

log = logging.getLogger(__name__)

OFF_DELAY_NS = 2 * 10**9
SEVERITY = 700  # of a lost connection: between an alert of a monitor (500 by default) and the most severe, 1000
SETTLE_S = 2.0  # a historian takes this long to have the last value before the connection came back
MOST_GAPS = 16  # of one group that wait to be filled
_TRIES, _AGAIN_S = 3, 5.0
_LEAST_ROWS = 5  # that are worth a question to the history; fewer are missed where a poll comes late


def alarm_name(server: str) -> str:
    """Return the name under which the alarms of a connection are stored; no monitor can have it (it has a space)."""
    return f"connection {server}"


class ConnectionAlarms:
    """One alarm per connection, in the store and in the log.

    store : called for the store, None while there is none
    dependants : called with the name of a server, returns how many monitors it feeds
    """

    def __init__(self, store: Callable[[], Store | None], dependants: Callable[[str], int], *,
                 utc_ns: Callable[[], int] = time.time_ns) -> None:
        self.alarms: dict[str, ConnectionAlarm] = {}
        self._store, self._dependants, self._utc_ns = store, dependants, utc_ns
        self._sentences: dict[str, str] = {}

    def watch(self, server: str) -> None:
        """Begin with a server that is connected; an alarm that stood when the process ended is over."""
        store = self._store()
        alarm = self.alarms[server] = ConnectionAlarm(OFF_DELAY_NS)
        if store is not None:
            alarm.event_no = store.last_event_no(alarm_name(server))
            for event in store.events(alarm_name(server)):
                if event.cleared_ns is None:
                    store.record_event(replace(event, cleared_ns=self._utc_ns()))

    def link(self, server: str, session: Session, state: LinkState, reason: str) -> None:
        """Take a change of a connection."""
        alarm = self.alarms.get(server)
        if alarm is None:
            return
        if state is LinkState.CONNECTED:
            alarm.connected(self._utc_ns())
        elif state is LinkState.WAITING and alarm.lost(self._utc_ns()):
            n = self._dependants(server)
            self._sentences[server] = (
                f"No connection to {server} ({session.config.endpoint}): "
                f"{n} monitor{'s have' if n != 1 else ' has'} no data ({reason})")
            log.warning("alarm %d raised: %s", alarm.event_no, self._sentences[server])
            self._record(server, alarm, None)

    def step(self) -> None:
        """Look at the time."""
        now = self._utc_ns()
        for server, alarm in self.alarms.items():
            if alarm.step(now):
                log.warning("alarm %d cleared: the connection to %s stands again, after %.1f s%s", alarm.event_no,
                            server, (now - alarm.raised_ns) / 1e9,
                            f" and {alarm.losses} losses" if alarm.losses > 1 else "")
                self._record(server, alarm, now)

    def _record(self, server: str, alarm: ConnectionAlarm, cleared_ns: int | None) -> None:
        store = self._store()
        if store is not None:
            store.record_event(Event(alarm_name(server), alarm.event_no, alarm.raised_ns, cleared_ns,
                                     severity=SEVERITY, sentence=self._sentences.get(server, "")))


def since_boot_ns() -> int:
    """Return our clock for the length of outages: nobody sets it, and where the system has such a one it counts on
    while the computer sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic_ns()


@dataclass
class GapFiller:
    """Fills the gaps in the recording of one group from the history of its servers.

    A gap is one of the whole group, whichever of its servers was away: all of them are asked for it, and rows are
    made where each has something to tell. Where one keeps no history of a tag the gap stays. How long a gap can be is
    known by our own clock (`client.forward.Continuity`), and no row is stored twice: neither those of a time that a
    clock which was set brings once more, nor those that were stored before a connection was lost again.

    The rows are a recording of their own, whose note says where they come from. They are not scored: the verdicts of
    the time away were never given, and an alert of an hour ago asks nobody to act now; `replay` and `evaluate` judge
    them where somebody wants to know.

    most_ns : no more of a gap than this, its newest part; 0: gaps stay gaps
    clock_ns : our clock, which nobody sets

    Attributes
    ----------
    counters : gaps_filled, gaps_left (without history, beyond the bounds, or of a few rows),
        backfilled_rows, backfill_left_rows (beyond the bounds)
    """

    group: GroupConfig
    sessions: Mapping[str, Session]
    store: Store
    most_ns: int
    settle_s: float = SETTLE_S
    clock_ns: Callable[[], int] = since_boot_ns
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("gaps_filled", "gaps_left", "backfilled_rows", "backfill_left_rows"), 0))

    def __post_init__(self) -> None:
        self._rows = Continuity(self.group.period, self.group.lateness_ns)
        self._gaps: asyncio.Queue[list[Gap]] = asyncio.Queue(MOST_GAPS)
        self._task: asyncio.Task[None] | None = None
        self._told: set[str] = set()

    def row(self, source_ns: int, gap: bool) -> None:
        """Take the time of a row; called on the loop for each."""
        missing = self._rows.row(source_ns, gap, self.clock_ns())
        if any(gap.rows(self.group.period) >= _LEAST_ROWS for gap in missing):
            self._found(missing)
        elif missing:
            self.counters["gaps_left"] += 1

    async def stop(self) -> None:
        """Fill nothing more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)

    def _found(self, missing: list[Gap]) -> None:
        if self._gaps.full():
            self._left(missing, "too many gaps wait to be filled")
            return
        self._gaps.put_nowait(missing)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._fill_all(), name=f"gaps of {self.group.name}")

    async def _fill_all(self) -> None:
        while not self._gaps.empty():
            missing = self._gaps.get_nowait()
            try:
                await self._fill(missing)
            except Exception as error:  # one gap that cannot be filled must not end the others
                log.exception("group %s: a gap could not be filled", self.group.name)
                self._left(missing, repr(error))

    async def _fill(self, missing: list[Gap]) -> None:
        """Read back one gap: what is missing of it at one or at both of its ends."""
        if self.most_ns <= 0:
            self._left(missing, "backfill is 0")
            return
        n_tags, period_ns = len(self.group.tags), self.group.period
        wanted = [part for gap in missing for part in self._rows.without(gap)]
        parts = [bounded(part, n_tags, period_ns, self.most_ns) for part in wanted]
        n_wanted = sum(part.rows(period_ns) for part in wanted)
        beyond = n_wanted - sum(part.rows(period_ns) for part in parts)
        if beyond > 0:
            self.counters["backfill_left_rows"] += beyond
            log.warning("group %s: a gap of %d rows is longer than what is read back: its first %d rows stay missing",
                        self.group.name, n_wanted, beyond)
        before, why = self.counters["backfilled_rows"], ""
        for k in range(_TRIES if parts else 0):
            await asyncio.sleep(self.settle_s if k == 0 else _AGAIN_S)
            try:
                for part in parts:
                    for left in self._rows.without(part):  # of what an earlier try has stored nothing is read again
                        await self._read(left)
                why = "the history has nothing of it"
                break
            except ConnectionProblem as problem:
                why = problem.what
            except DetectorError as problem:  # no history of a tag: asking again would not help
                why = problem.what
                break
        rows = self.counters["backfilled_rows"] - before
        if rows == 0:
            self._left(missing, why if parts else "the rows of these times are there already")
            return
        self.counters["gaps_filled"] += 1
        self._audit("gap filled", missing, {"rows": rows, "of": n_wanted})
        log.warning("group %s: %d of %d rows from %s to %s were read back from the history of %s", self.group.name,
                    rows, n_wanted, iso_utc(missing[0].after_ns), iso_utc(missing[-1].before_ns),
                    ", ".join(self._servers))

    @property
    def _servers(self) -> list[str]:
        return list(dict.fromkeys(tag.server or self.group.server for tag in self.group.tags))

    async def _read(self, part: Gap) -> None:
        """Read a part of a gap and store it. What was stored before an error stays, and is known to be there."""
        sources = [self.sessions[tag.server or self.group.server] for tag in self.group.tags]
        async for record in rows_of_gap(sources, group_tags(self.group), part, self.group.period,
                                        lateness_ns=self.group.lateness_ns, max_hold=self.group.max_hold,
                                        indexes=indexes_of(self.group)):
            name = f"{self.group.name} backfill {iso_utc(int(record.source_ns[0]))[:23]}Z"
            note = f"backfill: read from the history of {', '.join(self._servers)} after a gap, not scored"
            await asyncio.to_thread(self.store.write_record, name, record, group=self.group.name,
                                    server=self.group.server, note=note)
            for first, end in record.segments():
                self._rows.add(int(record.source_ns[first]), int(record.source_ns[end - 1]))
            self.counters["backfilled_rows"] += len(record)

    def _left(self, missing: list[Gap], why: str) -> None:
        """Note that a gap stays one: the recording marks it by its gap flag."""
        self.counters["gaps_left"] += 1
        self._audit("gap left", missing, {"why": why})
        if why not in self._told:  # once for each reason: a server without history is one line
            self._told.add(why)
            log.warning("group %s: the gap from %s to %s stays one: %s", self.group.name, iso_utc(missing[0].after_ns),
                        iso_utc(missing[-1].before_ns), why)

    def _audit(self, action: str, missing: list[Gap], more: dict[str, Any]) -> None:
        try:
            self.store.record_audit(AuditEntry("service", action, {
                "group": self.group.name, "after": missing[0].after_ns, "before": missing[-1].before_ns, **more}),
                timeout_s=None)
        except DetectorError as error:  # the store is being closed
            log.debug("group %s: %s is not in the audit: %s", self.group.name, action, error)
