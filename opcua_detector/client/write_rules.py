"""Bounds on what is written to a server: which nodes, how often, whether at all; pure, without a connection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WriteRules:
    """What the configuration allows to be written to one server.

    allow : NodeIds as `nsu=<uri>;s=<id>`, or their beginnings with `*` at the end; empty: what is configured as output
    dry_run : everything is looked up, cast and counted, nothing is written
    node_every_s : least time between two writes of one node; 0: none
    values_per_s : most values a second over all nodes; 0: no bound
    read_back_s : values are read again this often and compared; 0: never
    """

    allow: tuple[str, ...] = ()
    dry_run: bool = False
    node_every_s: float = 0.0
    values_per_s: float = 0.0
    read_back_s: float = 0.0

    @property
    def limited(self) -> bool:
        """Whether anything may have to wait."""
        return self.node_every_s > 0 or self.values_per_s > 0

    def allows(self, nsu: str) -> bool:
        """Whether this node, as it was found on the server, may be written."""
        return not self.allow or any(
            nsu.startswith(one[:-1]) if one.endswith("*") else nsu == one for one in self.allow)


NO_RULES = WriteRules()


@dataclass(slots=True)
class Budget:
    """How many values may be sent now: so many a second, at most those of one second at once.

    What has begun may go beyond it and is paid back first, so that the values of a row stay together.
    """

    per_s: float
    clock_s: Callable[[], float]
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.per_s, self.clock_s()

    def take(self, n: int) -> bool:
        """Whether n values may be sent now; they are then taken off."""
        if self.per_s <= 0:
            return True
        self._fill()
        if self._left <= 0:
            return False
        self._left -= n
        return True

    def wait_s(self) -> float:
        """Seconds until there is something again."""
        if self.per_s <= 0:
            return 0.0
        self._fill()
        return 0.0 if self._left > 0 else (1e-3 - self._left) / self.per_s

    def _fill(self) -> None:
        now = self.clock_s()
        self._left = min(self.per_s, self._left + max(0.0, now - self._at) * self.per_s)
        self._at = now


@dataclass
class Pace:
    """When the values of one kind ("fast": scores, "slow": texts) of a monitor may be written again."""

    every_s: float
    budget: Budget
    clock_s: Callable[[], float]
    _due: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def may(self, monitor: str, n: int) -> bool:
        """Whether n values of a monitor may be written now; they then count."""
        now = self.clock_s()
        if now < self._due.get(monitor, -math.inf) or not self.budget.take(n):
            self.waiting.add(monitor)
            return False
        self.waiting.discard(monitor)
        self._due[monitor] = now + self.every_s
        return True

    def wait_s(self, monitors: set[str]) -> float:
        """Seconds until one of these monitors may be written."""
        now = self.clock_s()
        soonest = min((self._due.get(one, now) for one in monitors), default=now)
        return max(0.001, soonest - now, self.budget.wait_s())
