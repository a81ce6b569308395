"""Which server of a redundant set is the active one.

Every server of a non-transparent set says by ServerState and ServiceLevel how well it can serve (Part 4, 6.6.2.4):
0 maintenance, 1 no data, 2 to 199 degraded, 200 to 255 healthy. Clients go to the highest. A standby has a lower level
than the active server; it answers, its values may even move, and they may be old: it must not be taken for the active
one only because it was reached first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from asyncua import Client, ua

from ..errors import ServerUnreachable
from . import wire
from .login import Login
from .waiting import within

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


class RedundantSet:
    """The servers of one set, seen from one session.

    Parameters
    ----------
    login : their endpoints, and how to log in to them

    Attributes
    ----------
    standing : endpoint -> Standing, as last read
    """

    def __init__(self, login: Login) -> None:
        self.standing: dict[str, Standing] = {}
        self._login = login
        self._none_active_since: float | None = None

    async def active(self, present: str) -> tuple[str, Client]:
        """Log in to all endpoints, ask each how it stands, keep the active one; the others are left again.

        present : the endpoint that was used last
        Raises ConnectionProblem where none answers, or none is active (`choose`).
        """
        endpoints, login = self._login.endpoints, self._login
        clients = {one: login.new_client(one) for one in endpoints}
        kept: Client | None = None
        try:
            answers = await asyncio.gather(
                *(self._ask(one, client) for one, client in clients.items()), return_exceptions=True
            )
            problems: dict[str, BaseException] = {}
            for one, told in zip(clients, answers, strict=True):
                self.standing[one] = told if isinstance(told, Standing) else Standing()
                if isinstance(told, BaseException):
                    problems[one] = told
            if len(problems) == len(clients):
                raise problems[present]
            now = asyncio.get_running_loop().time()
            waited_s = 0.0 if self._none_active_since is None else now - self._none_active_since
            endpoint = choose(self.standing, present, waited_s)
            if endpoint is None:
                self._none_active_since = now if self._none_active_since is None else self._none_active_since
                told_all = ", ".join(f"{one}: {self.standing[one].text}" for one in endpoints)
                raise ServerUnreachable(
                    f"no server of the redundant set is active ({told_all})", where=login.where(present),
                    next_step="wait until one takes over, or look after the servers",
                )
            self._none_active_since = None
            kept = clients[endpoint]
            return endpoint, kept
        finally:
            for client in clients.values():
                if client is not kept:
                    login.leave(client)

    async def left_behind(self, present: str, found: Standing) -> bool:
        """Whether another server of the set is the one to use now, seen from the one in use, which stands so."""
        self.standing[present] = found
        others = [one for one in self._login.endpoints if one != present]
        if not others:
            return False
        if not found.usable:
            return True
        if found.healthy:
            return False
        # A degraded server is better than none: it is left only for one that is better.
        clients = [self._login.new_client(one) for one in others]
        try:
            answers = await asyncio.gather(
                *(self._ask(one, client) for one, client in zip(others, clients, strict=True)),
                return_exceptions=True,
            )
        finally:
            for client in clients:
                self._login.leave(client)
        return any(
            isinstance(told, Standing) and told.state == RUNNING and told.level > found.level for told in answers
        )

    async def _ask(self, endpoint: str, client: Client) -> Standing:
        await self._login.log_in(client, endpoint)
        try:
            return await within(standing(client), self._login.timeout_s)
        except Exception as error:
            what = f"read the ServiceLevel of {endpoint}"
            raise self._login.problem(error, what, self._login.where(endpoint)) from error
