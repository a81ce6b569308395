"""Alerts and alarms as pure state machines over time, in the words of IEC 62682: of a monitor, of a connection.

A score at or above the limit for `on_delay_ns` raises the alert; a score below the limit less the deadband for
`off_delay_ns` returns it to normal. Without a verdict (gap, warming up) a standing alert stands and the delays
start again: silence is neither an anomaly nor an all-clear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class AlertState:
    """Alert of one monitor.

    on_delay_ns, off_delay_ns : int; SourceTimestamp clock
    limit, deadband : float; in units of the score
    """

    on_delay_ns: int = 0
    off_delay_ns: int = 0
    limit: float = 1.0
    deadband: float = 0.1
    active: bool = False
    event_no: int = 0
    raised: bool = False
    cleared: bool = False
    _since_ns: int = -1

    def step(self, score: float, now_ns: int) -> bool:
        """Take one score; set `raised` / `cleared` for this step and return whether the alert stands."""
        self.raised = self.cleared = False
        if math.isnan(score):
            self._since_ns = -1
            return self.active
        moving = score < self.limit - self.deadband if self.active else score >= self.limit
        if not moving:
            self._since_ns = -1
            return self.active
        if self._since_ns < 0 or now_ns < self._since_ns:
            self._since_ns = now_ns
        if now_ns - self._since_ns >= (self.off_delay_ns if self.active else self.on_delay_ns):
            self.active = not self.active
            self._since_ns = -1
            self.raised, self.cleared = self.active, not self.active
            self.event_no += self.active
        return self.active


@dataclass(slots=True)
class ConnectionAlarm:
    """The one alarm for a connection that is lost, whatever and however much hangs on it.

    It is raised with the loss and returns to normal when the connection has stood for `off_delay_ns`: a connection
    that comes and goes is one alarm, and `losses` counts how often it went.

    off_delay_ns : int; times are ns of one clock, UTC
    raised_ns : of the standing or last alarm; losses : within it
    """

    off_delay_ns: int
    active: bool = False
    event_no: int = 0
    raised_ns: int = 0
    losses: int = 0
    _back_ns: int = -1

    def lost(self, now_ns: int) -> bool:
        """Take a loss; True where it raises the alarm."""
        self._back_ns = -1
        self.losses = self.losses + 1 if self.active else 1
        if self.active:
            return False
        self.active, self.raised_ns = True, now_ns
        self.event_no += 1
        return True

    def connected(self, now_ns: int) -> None:
        """Take that the connection stands again."""
        if self.active and self._back_ns < 0:
            self._back_ns = now_ns

    def step(self, now_ns: int) -> bool:
        """Look at the time; True where the alarm returns to normal now."""
        if not self.active or self._back_ns < 0:
            return False
        self._back_ns = min(self._back_ns, now_ns)  # a clock that was set back must not keep it standing
        if now_ns - self._back_ns < self.off_delay_ns:
            return False
        self.active, self._back_ns = False, -1
        return True
