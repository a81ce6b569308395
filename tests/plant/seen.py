"""What a fault looked like: what the result nodes said, how long no score came, and what was counted.

With OPCUA_DETECTOR_FAULTS set to a file, each fault that is survived appends one line of JSON to it;
`tests/benchmarks/bench_recovery.py` makes the README's table of such lines.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from opcua_detector.api import Verdict
from opcua_detector.service import MonitorRun

if TYPE_CHECKING:
    from .rig import Rig

ENVIRONMENT = "OPCUA_DETECTOR_FAULTS"
LOOK_S = 0.02
STALLED_S = 0.25  # between two scores; at 100 rows a second this is a break and no jitter
# What tells of loss or repair; the other counters grow on any day. "lost" is of connections, "samples_lost" of samples.
TELLING = (
    "lost", "samples_lost", "lost_notifications", "gaps", "late", "duplicate", "replaced", "masked", "uncertain",
    "overflowed", "overload", "clock_jumps", "ahead_of_clock", "rebuilt", "reconnects", "failed_attempts",
    "write_superseded", "write_failed_items", "polls",
)


@dataclass
class Seen:
    """What was seen of one fault on one server.

    fault, vendor : names
    states, qualities : what StateText and Quality said, in order of appearance, each once
    alarm : the alarm of the connection was raised
    alerts : anomaly alerts raised; none is right
    blind_s : longest time between two scores, from the begin of the fault until it was survived; s
    after_s : from the end of the disturbance to the next score, 0 where scores never stopped; s
    counted : counters of session, feed and write-back that have grown, and by how much
    loop_blocked : times that our own event loop stood still
    """

    fault: str
    vendor: str
    states: list[str] = field(default_factory=list)
    qualities: list[str] = field(default_factory=list)
    alarm: bool = False
    alerts: int = 0
    blind_s: float = 0.0
    after_s: float = 0.0
    counted: dict[str, int] = field(default_factory=dict)
    loop_blocked: int = 0

    def keep(self) -> None:
        """Append this to the file that the environment names, if it does."""
        file = os.environ.get(ENVIRONMENT)
        if file:
            with Path(file).open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(self)) + "\n")


class ScoreClock:
    """Notes when scores come: the longest time without one since `begin`, and when the disturbance was over."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._break = (self._last, self._last)
        self._over = self._last

    def begin(self) -> None:
        """Begin to look for the longest break."""
        now = time.monotonic()
        self._break, self._over = (now, now), now

    def over(self) -> None:
        """Note that what disturbs has ended; from here on it is up to us."""
        self._over = time.monotonic()

    def take(self, run: MonitorRun, verdict: Verdict) -> None:
        """Take a verdict; the callback of the service."""
        if math.isnan(verdict.score):
            return
        now = time.monotonic()
        if now - self._last > self._break[1] - self._break[0]:
            self._break = (self._last, now)
        self._last = now

    @property
    def blind_s(self) -> float:
        """The longest time between two scores; s."""
        return self._break[1] - self._break[0]

    @property
    def after_s(self) -> float:
        """From the end of the disturbance to the score that ended this time; s."""
        return max(0.0, self._break[1] - self._over) if self.blind_s >= STALLED_S else 0.0


@contextmanager
def watching(rig: Rig, fault: str) -> Iterator[Seen]:
    """Look at the result nodes' words while the block runs; what it finds is complete when the block ends."""
    seen = Seen(fault, rig.vendor.name)

    async def look() -> None:
        while True:
            for word, said in ((rig.run.state_text, seen.states), (rig.run.quality, seen.qualities)):
                if word not in said:
                    said.append(word)
            await asyncio.sleep(LOOK_S)

    alarm = rig.service.connections.alarms["plant"]
    alarms, alerts = alarm.event_no, rig.run.monitor.verdict.event_no
    blocked = rig.service.counters["loop_blocked"]
    task = asyncio.create_task(look(), name="proxy: words of the nodes")  # a task of the rig, as those of the proxy
    try:
        yield seen
    finally:
        task.cancel()
        seen.alarm, seen.alerts = alarm.event_no > alarms, rig.run.monitor.verdict.event_no - alerts
        seen.blind_s, seen.after_s = rig.clock.blind_s, rig.clock.after_s
        grown = {name: rig.grown(name) for name in (*rig.session.counters, *rig.counters()) if name in TELLING}
        grown["samples_lost"] = rig.counters()["lost"] - rig.feed_before["lost"]
        seen.counted = {name: n for name, n in grown.items() if n}
        seen.loop_blocked = rig.service.counters["loop_blocked"] - blocked
