"""The alert of one monitor as a pure state machine over (score, time), in the words of IEC 62682.

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
