"""Keeps one session to one server alive: connects, notices that it died, connects again for ever.

Why our own loop: asyncua's `auto_reconnect` keeps NodeIds by the old namespace index, drops items that fail
and can answer a reused session with a thousand calls a second. Here a lost connection is thrown away whole; a
new asyncua client is made, namespaces are read anew, and every attached part (subscription, write-back)
builds what it needs again in its `link_up`. Only a login that the server refuses is not repeated every few seconds
(`refusals`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import partial
from typing import Protocol, TypeVar

from asyncua import Client

from ..config import ServerConfig
from ..errors import ConnectionProblem, DetectorError, ServerUnreachable
from . import secure, wire
from .limits import Limits
from .login import ENDING_S as ENDING_S
from .login import Login, quiet_asyncua
from .publish import PublishPump
from .redundancy import RedundantSet, Standing, standing
from .waiting import end_tasks, farewell, within

log = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 0.2, 5.0
PROBE_S = 5.0  # an idle session is asked for its state this often
LOOK_S = 1.0  # while a refused login is held back, it is looked this often whether the secret is another one
_T = TypeVar("_T")

_DEAD = frozenset(
    {
        "BadSessionIdInvalid",
        "BadSessionClosed",
        "BadSecureChannelClosed",
        "BadSecureChannelIdInvalid",
        "BadSessionNotActivated",
    }
)
class LinkState(StrEnum):
    """Where a session stands."""

    CLOSED = "closed"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"  # between two attempts


class Part(Protocol):
    """What lives on a session and is built again on each connection."""

    async def link_up(self) -> None:
        """Build everything on the new connection; an error counts as a lost connection."""
        ...

    def link_down(self) -> None:
        """Forget everything that belonged to the connection; never waits."""
        ...


class Session:
    """One session to one server.

    Parameters
    ----------
    config : endpoint, policy, login, time-out
    on_state : called with (state, reason) on each change of state
    rng : jitter of the delays between attempts

    Attributes
    ----------
    state : LinkState
    endpoint : str; of the redundant set the one that is used, or was last
    namespaces : list of str; NamespaceArray of this connection
    limits : Limits; how many items go into one call
    clock_offset_s : float; clock of the server less ours, NaN until it is measured (`clock.ClockWatch`)
    counters : connects, reconnects, failed_attempts, lost, halved_calls, changeovers (to another endpoint), oversized
        (connections that were dropped because the server sends more than we take)
    security : Security; policy, certificates and warnings of this connection
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_state: Callable[[LinkState, str], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.endpoint = config.endpoint
        self.endpoints = (config.endpoint, *config.endpoints)
        self._rng = rng or random.Random()
        self._login = Login(config, self._oversized, self._rng)
        self._set_of = RedundantSet(self._login)
        self.clock_offset_s = math.nan
        self.timeout_s = config.timeout / 1e9
        self.state = LinkState.CLOSED
        self.namespaces: list[str] = []
        self.limits = Limits()
        self.counters = {
            "connects": 0, "reconnects": 0, "failed_attempts": 0, "lost": 0, "halved_calls": 0, "changeovers": 0,
            "oversized": 0,
        }
        self.reason = ""
        self.pump: PublishPump | None = None
        self._on_state = on_state
        self._client: Client | None = None
        self._parts: list[Part] = []
        self._task: asyncio.Task[None] | None = None
        self._probe_task: asyncio.Task[None] | None = None
        self._life: object | None = None  # from open() to close(); a task of an earlier life ends by itself
        self._lost = asyncio.Event()
        self._attempt_failed = ""
        self._connected_at = -math.inf
        self._told = LinkState.CLOSED
        quiet_asyncua()

    @property
    def security(self) -> secure.Security:
        """Policy, certificates and warnings of the endpoint in use."""
        return self._login.securities[self.endpoint]

    @property
    def standing(self) -> dict[str, Standing]:
        """ServerState and ServiceLevel as last read, by endpoint."""
        return self._set_of.standing

    @property
    def client(self) -> Client:
        """The connected asyncua client, for this folder alone; ServerUnreachable while there is none."""
        if self._client is None or self.state not in (LinkState.CONNECTED, LinkState.CONNECTING):
            raise ServerUnreachable("not connected", where=self.where, next_step="wait for the connection")
        return self._client

    @property
    def where(self) -> str:
        """Name, endpoint and policy, as errors and logs show them."""
        return self._login.where(self.endpoint)

    def limit(self, kind: str) -> int:
        """Return how many items the server takes in one call of a kind (`limits.KINDS`)."""
        return self.limits.size(kind)

    async def attach(self, part: Part) -> None:
        """Let a part live on this session; it is built now when the session is connected."""
        self._parts.append(part)
        if self.state is LinkState.CONNECTED:  # while connecting the attempt finds it, otherwise the next one
            await part.link_up()

    def detach(self, part: Part) -> None:
        """Let go of a part."""
        if part in self._parts:
            self._parts.remove(part)
            part.link_down()

    async def open(self) -> None:
        """Connect for the first time and keep the session alive from then on.

        Raises ServerUnreachable, AccessRefused or another ConnectionProblem; nothing is retried here, so that
        a wrong configuration is told at once.
        """
        self._login.forgive()
        self._life = life = object()
        await self._connect(life)
        self._task = asyncio.create_task(self._keep_alive(life), name=f"session {self.config.name}")

    async def close(self) -> None:
        """End the session; waits no longer than the time-out, whatever the server or a task does.

        Cancelling it cancels the waiting alone: the connection is dropped all the same.
        """
        self._life = None
        client, self._client = self._client, None
        task, probe = self._task, self._probe_task
        self._task = self._probe_task = None
        ending_s = min(ENDING_S, self.timeout_s / 2)
        self._parts_down()
        self._stop_pump()
        try:
            await end_tasks((task, probe, *self._login.leaving), ending_s)
            await end_tasks(tuple(self._login.leaving), ending_s)  # of an attempt that has just been given up
            if client is not None and wire.is_open(client):
                await farewell(client.disconnect(), self.timeout_s - ending_s)
        finally:
            self._parts_down()  # once more: a connection that was just being made may have built some
            self._parts.clear()
            self._stop_pump()
            if client is not None:
                wire.abandon(client)
            if self._life is None:
                self._set(LinkState.CLOSED, "")

    def fail(self, reason: str, of: Client | None = None) -> None:
        """Report that the connection is dead; it is rebuilt.

        of : the connection it was seen on (None: the present one); a report on an earlier one is ignored, so
            that what is left of it never ends the connection that took its place
        """
        if self._client is None or (of is not None and of is not self._client):
            return
        if self.state in (LinkState.CONNECTED, LinkState.CONNECTING) and not self._lost.is_set():
            self.reason = reason
            self._lost.set()

    def retry_now(self) -> None:
        """Try a login that was refused again at once: somebody may have mended what it was refused for."""
        self._login.forgive()

    async def call(self, request: Awaitable[_T], what: str) -> _T:
        """Await one request with the time-out; errors come out as the product's own.

        what : str; what is being done, for the error text: "read the NamespaceArray"
        """
        client = self._client
        try:
            answer = await within(request, self.timeout_s)
        except DetectorError:
            raise
        except Exception as error:
            raise self.problem(error, what) from error
        if self._client is not client:  # NodeIds and the like of another connection are worth nothing
            raise self._gone(what)
        return answer

    async def read_namespaces(self) -> None:
        """Read the NamespaceArray: a server that has just started may add to it while it is connected.

        Where what was known has another place now, the connection is rebuilt: all NodeIds on it are wrong.
        """
        found = list(await self.call(self.client.get_namespace_array(), "read the NamespaceArray"))
        if found[: len(self.namespaces)] != self.namespaces:
            self.fail("the server's namespaces have changed their places")
        self.namespaces = found

    def watch_over(self, task: asyncio.Task[None], client: Client) -> None:
        """Rebuild the connection when a task that lives on it ends by an error that nobody has foreseen."""

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.error("%s: %s has ended", self.where, task.get_name(), exc_info=error)
                self.fail(f"{task.get_name()} has ended: {error!r}", client)

        task.add_done_callback(ended)

    def _gone(self, what: str) -> ServerUnreachable:
        return ServerUnreachable(
            f"the connection was lost: {what}", where=self.where, next_step="wait for the connection"
        )

    def problem(self, error: BaseException, what: str) -> ConnectionProblem:
        """Translate an error of the network or of asyncua; the text never holds the password."""
        return self._login.problem(error, what, self.where)

    async def discover(self) -> secure.Discovery:
        """Ask the server for its endpoints and its time, over a channel of its own; no login, nothing is checked."""
        return await self._login.discover(self.endpoint)

    def _oversized(self, problem: ConnectionProblem) -> None:
        self.counters["oversized"] += 1
        log.warning("%s: %s", self.where, problem.what)

    def _set(self, state: LinkState, reason: str) -> None:
        if state is self.state:
            return
        retrying = state is LinkState.CONNECTING and self.state is LinkState.WAITING
        self.state, self.reason = state, reason
        # The attempts of an outage are one state for whoever looks at it: waiting.
        if not retrying and state is not self._told:
            self._told = state
            if self._on_state is not None:
                try:
                    self._on_state(state, reason)
                except Exception:  # an error of who looks on must not end the reconnecting
                    log.exception("%s: the change to %s could not be told", self.where, state.value)

    async def _keep_alive(self, life: object) -> None:
        """Connect again whenever the connection is lost, with growing, jittered delays.

        A connection that did not outlive the longest delay counts as one more attempt: a server that takes everybody in
        and hangs up on the first request must not be asked five times a second for ever.
        """
        loop = asyncio.get_running_loop()
        delay = FIRST_DELAY_S
        while self._life is life:
            await self._lost.wait()
            if self._life is not life:
                return
            log.warning("%s: connection lost: %s", self.where, self.reason)
            self.counters["lost"] += 1
            self._drop(self.reason)
            if loop.time() - self._connected_at > LAST_DELAY_S:
                delay = FIRST_DELAY_S
            while True:
                await asyncio.sleep(delay * self._rng.uniform(0.5, 1.0))
                await self._hold_back(life)
                if self._life is not life:
                    return
                delay = min(delay * 2, LAST_DELAY_S)
                try:
                    await self._connect(life)
                    break
                except DetectorError as error:
                    self._attempt(error.what)
                except Exception as error:
                    log.exception("%s: a part could not be built again", self.where)
                    self._attempt(repr(error))
            self.counters["reconnects"] += 1
            self._attempt_failed = ""
            log.warning("%s: connected again", self.where)

    async def _hold_back(self, life: object) -> None:
        """Wait while a login that was refused is not to be shown to the server again, and say for how long."""
        told = False
        while self._life is life and (held := await self._login.held_back()) is not None:
            if not told:
                told, self.reason = True, held.what
                log.log(logging.WARNING if held.news else logging.DEBUG, "%s: %s", self.where, held.what)
            await asyncio.sleep(min(held.left_s, LOOK_S))

    def _attempt(self, what: str) -> None:
        self.counters["failed_attempts"] += 1
        if what != self._attempt_failed:  # on change only: an outage of a night is one line
            self._attempt_failed = what
            log.warning("%s: not back yet: %s", self.where, what)

    def _drop(self, reason: str) -> None:
        self._lost.clear()
        if self._probe_task is not None:
            self._probe_task.cancel()
            self._probe_task = None
        client, self._client = self._client, None
        self._stop_pump()
        self._parts_down()
        if client is not None:
            self._login.leave(client)
        self._set(LinkState.WAITING, reason)

    def _parts_down(self) -> None:
        for part in tuple(self._parts):
            try:
                part.link_down()
            except Exception:  # one part must not keep the others, or the next connection, from their turn
                log.exception("%s: a part did not take the loss of the connection", self.where)

    def _stop_pump(self) -> None:
        pump, self.pump = self.pump, None
        if pump is not None:
            pump.stop()

    async def _connect(self, life: object) -> None:
        """Make one attempt: socket, hello, channel, session, namespaces, limits, then all parts."""
        if self._life is not life:
            raise self._gone("the session was closed")
        self._set(LinkState.CONNECTING, "")
        client = await self._open_client(life)
        self._lost.clear()
        try:
            if self._client is not client:
                raise self._gone("the session was closed")
            self.namespaces = []
            await self.read_namespaces()
            await self.call(self.limits.read(client), "read the OperationLimits")
            self.pump = PublishPump(client, partial(self.fail, of=client), timeout_s=self.timeout_s)
            built: list[Part] = []
            while (part := next((one for one in self._parts if one not in built), None)) is not None:
                built.append(part)
                await part.link_up()
            if self._client is not client:
                raise self._gone("the session was closed")
        except BaseException as error:
            if self._client is client:
                self._client = None
                self._stop_pump()
                self._parts_down()
                self._set(LinkState.WAITING, str(error))
            if isinstance(error, ConnectionProblem) and not isinstance(error, ServerUnreachable):
                self._login.leave(client)
            else:
                wire.abandon(client)
            raise
        self.counters["connects"] += 1
        self._connected_at = asyncio.get_running_loop().time()
        self._set(LinkState.CONNECTED, "")
        self._tell_security(first=self.counters["connects"] == 1)
        wire.on_closed(client, partial(self._socket_lost, client))
        if not wire.is_open(client):
            self.fail("the server closed the connection", client)
        self._probe_task = asyncio.create_task(self._probe(client), name=f"probe {self.config.name}")
        self.watch_over(self._probe_task, client)

    async def _open_client(self, life: object) -> Client:
        """Log in: to the one endpoint there is, or to the active one of a redundant set."""
        if len(self.endpoints) == 1:
            client = self._login.new_client(self.endpoint)
            self._client = client
            self._lost.clear()
            try:
                await self._login.log_in(client, self.endpoint)
            except BaseException as error:
                wire.abandon(client)
                if self._client is client:
                    self._client = None
                    self._set(LinkState.WAITING, str(error))
                raise
            return client
        try:
            endpoint, client = await self._set_of.active(self.endpoint)
        except BaseException as error:
            if self._life is life:
                self._set(LinkState.WAITING, str(error))
            raise
        if self._life is not life:
            self._login.leave(client)
            raise self._gone("the session was closed")
        if self.counters["connects"] and endpoint != self.endpoint:
            self.counters["changeovers"] += 1
            log.warning("%s: %s takes over", self.where, endpoint)
        self.endpoint, self._client = endpoint, client
        return client

    def _tell_security(self, *, first: bool = False) -> None:
        """Log what there is to say of certificates and, once, that the server is not checked."""
        if first and self.config.insecure:
            log.warning("%s: connected with insecure: true, %s", self.where, self.security.unchecked)
        elif first and self.security.server is not None:
            about = self.security.server
            log.info("%s: connected to %s, SHA-256 %s", self.where, about.name, about.fingerprint)
        for text in self.security.news():
            log.warning("%s: %s", self.where, text)

    def _socket_lost(self, client: Client, error: Exception | None) -> None:
        self.fail(f"the connection was closed ({error or 'by the server'})", client)

    async def _probe(self, client: Client) -> None:
        """Ask for the server's state now and then: it keeps the session and finds a dead connection."""
        while self._client is client:
            await asyncio.sleep(PROBE_S)
            if self._client is not client:
                return
            self._tell_security()
            reason = await self.security.withdrawn()
            if reason:
                self.fail(reason, client)
                return
            try:
                found = await within(standing(client), self.timeout_s)
            except (TimeoutError, OSError) as error:
                self.fail(f"the server does not answer ({type(error).__name__})", client)
                return
            except Exception as error:  # any other answer is an answer: the connection lives
                if type(error).__name__ in _DEAD:
                    self.fail(type(error).__name__, client)
                    return
                continue
            if await self._set_of.left_behind(self.endpoint, found):
                self.fail(f"the server is not the active one any more ({found.text})", client)
                return
