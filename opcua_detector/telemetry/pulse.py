"""The pulse of the event loop: the proof that it turns, for /health and for the watchdog of systemd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from .systemd import Notifier

EVERY_S = 0.5
_PER_WATCHDOG = 4  # messages within the time-out of the watchdog: a late turn or two is no reason to be killed


class Pulse:
    """Notes each half second that the loop has turned.

    A blocked loop notes nothing, so its age grows, and systemd, which gets its WATCHDOG=1 from here alone, restarts
    the process.

    Attributes
    ----------
    turns : int
    delay_s, longest_delay_s : float; how late the last turn was, and the latest of all: the loop was busy so long
    """

    def __init__(self, notifier: Notifier | None = None, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._notifier = notifier or Notifier({})
        self._clock_s = clock_s
        watchdog_s = self._notifier.watchdog_s
        self._every_s = EVERY_S if watchdog_s is None else min(EVERY_S, watchdog_s / _PER_WATCHDOG)
        self._handle: asyncio.TimerHandle | None = None
        self._last_s = clock_s()
        self._due_s = 0.0
        self.turns = 0
        self.delay_s = self.longest_delay_s = 0.0

    @property
    def age_s(self) -> float:
        """Seconds since the loop was last seen to turn; any thread may ask."""
        return self._clock_s() - self._last_s

    def start(self) -> None:
        """Begin, on the running loop."""
        self._due_s = self._clock_s()
        self._turn()

    def stop(self) -> None:
        """End; the age grows from now on."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _turn(self) -> None:
        now = self._clock_s()
        self.delay_s = max(0.0, now - self._due_s)
        self.longest_delay_s = max(self.longest_delay_s, self.delay_s)
        self._last_s, self._due_s = now, now + self._every_s
        self.turns += 1
        if self._notifier.watchdog_s is not None:
            self._notifier.tell(WATCHDOG="1")
        self._handle = asyncio.get_running_loop().call_later(self._every_s, self._turn)
