"""Which server of a redundant set is the active one.

Every server of a non-transparent set says by ServerState and ServiceLevel how well it can serve (Part 4, 6.6.2.4):
0 maintenance, 1 no data, 2 to 199 degraded, 200 to 255 healthy. Clients go to the highest. A standby has a lower level
than the active server; it answers, its values may even move, and they may be old: it must not be taken for the active
one only because it was reached first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncua import Client, ua

from . import wire

RUNNING = 0  # ServerState, Part 5, 12.6
HEALTHY, DEGRADED = 200, 2  # the least level of each
PATIENCE_S = 10.0  # so long a degraded server is not taken: the other one may just be taking over
_STATES = (
    "running", "failed", "no configuration", "suspended", "shutting down", "test", "communication fault", "unknown"
)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a server stands; `state` is -1 where it did not answer, `level` 255 where it states none."""

    state: int = -1
    level: int = 0

    @property
    def healthy(self) -> bool:
        """Whether it runs and can serve in full."""
        return self.state == RUNNING and self.level >= HEALTHY

    @property
    def usable(self) -> bool:
        """Whether it runs and has data at all."""
        return self.state == RUNNING and self.level >= DEGRADED

    @property
    def text(self) -> str:
        """As logs and errors show it."""
        if self.state < 0:
            return "no answer"
        state = _STATES[self.state] if self.state < len(_STATES) else str(self.state)
        return f"{state}, service level {self.level}"


async def standing(client: Client) -> Standing:
    """Ask a server how it stands; one that states no ServiceLevel counts as in full service."""
    nodes = [wire.node_id(ua.ObjectIds.Server_ServerStatus_State), wire.node_id(ua.ObjectIds.Server_ServiceLevel)]
    state, level = [
        one.Value.Value if one.Value is not None and (one.StatusCode is None or one.StatusCode.is_good()) else None
        for one in await client.uaclient.read_attributes(nodes, ua.AttributeIds.Value)
    ]
    return Standing(
        int(state) if isinstance(state, int) else RUNNING, int(level) if isinstance(level, int) else 255
    )


def choose(found: Mapping[str, Standing], present: str, waited_s: float) -> str | None:
    """Return the endpoint of the active server; None while there is none.

    found : endpoint -> how it stands
    present : the endpoint that was used last, which wins among equals: no change without need
    waited_s : for how long none was healthy; after `PATIENCE_S` the best of those that are degraded is taken
    """
    able = [one for one, how in found.items() if how.healthy or (how.usable and waited_s >= PATIENCE_S)]
    return max(able, key=lambda one: (found[one].level, one == present), default=None)
