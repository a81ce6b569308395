"""Keeps one session to one server alive: connects, notices that it died, connects again for ever.

Why our own loop: asyncua's `auto_reconnect` keeps NodeIds by the old namespace index, drops items that fail
and can answer a reused session with a thousand calls a second. Here a lost connection is thrown away whole; a
new asyncua client is made, namespaces are read anew, and every attached part (subscription, write-back)
builds what it needs again in its `link_up`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, TypeVar

from asyncua import Client
from asyncua.ua.uaerrors import UaError

from ..config import ServerConfig
from ..errors import AccessRefused, ConnectionProblem, DetectorError, ServerUnreachable
from . import pki, secure, wire
from .limits import Limits
from .publish import PublishPump
from .redundancy import Standing, choose, standing
from .waiting import end_tasks, farewell, within

log = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 0.2, 5.0
PROBE_S = 5.0  # an idle session is asked for its state this often
ENDING_S = 1.0  # at most, of the time-out, for tasks that are cancelled on closing
# A session that we lost lives on at the server for this long, and small PLCs have room for few.
SESSION_TIMEOUT_MS = 30_000
_T = TypeVar("_T")

# What refuses the user, the certificate or the policy (Part 4, 7.38).
_ACCESS = frozenset(
    {
        "BadUserAccessDenied",
        "BadIdentityTokenInvalid",
        "BadIdentityTokenRejected",
        "BadSecurityChecksFailed",
        "BadSecurityPolicyRejected",
        "BadSecurityModeRejected",
        "BadSecurityModeInsufficient",
        "BadCertificateInvalid",
        "BadCertificateUntrusted",
        "BadCertificateTimeInvalid",
        "BadCertificateHostNameInvalid",
        "BadCertificateUriInvalid",
        "BadCertificateUseNotAllowed",
        "BadCertificateRevoked",
        "BadCertificateChainIncomplete",
        "BadCertificateIssuerTimeInvalid",
        "BadCertificateRevocationUnknown",
        "BadApplicationSignatureInvalid",
        "BadUserSignatureInvalid",
        "BadNoValidCertificates",
        "BadNonceInvalid",
    }
)
_DEAD = frozenset(
    {
        "BadSessionIdInvalid",
        "BadSessionClosed",
        "BadSecureChannelClosed",
        "BadSecureChannelIdInvalid",
        "BadSessionNotActivated",
    }
)
_USER = frozenset({"BadUserAccessDenied", "BadIdentityTokenInvalid", "BadIdentityTokenRejected"})


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
    standing : Standing; ServerState and ServiceLevel as last read, for each endpoint
    namespaces : list of str; NamespaceArray of this connection
    limits : Limits; how many items go into one call
    clock_offset_s : float; clock of the server less ours, NaN until it is measured (`clock.ClockWatch`)
    counters : connects, reconnects, failed_attempts, lost, halved_calls, changeovers (to another endpoint)
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
        self._securities = {
            one: secure.Security(config.model_copy(update={"endpoint": one})) for one in self.endpoints
        }
        self.standing: dict[str, Standing] = {}
        self.clock_offset_s = math.nan
        self.timeout_s = config.timeout / 1e9
        self.state = LinkState.CLOSED
        self.namespaces: list[str] = []
        self.limits = Limits()
        self.counters = {
            "connects": 0, "reconnects": 0, "failed_attempts": 0, "lost": 0, "halved_calls": 0, "changeovers": 0
        }
        self.reason = ""
        self.pump: PublishPump | None = None
        self._on_state = on_state
        self._rng = rng or random.Random()
        self._client: Client | None = None
        self._parts: list[Part] = []
        self._task: asyncio.Task[None] | None = None
        self._probe_task: asyncio.Task[None] | None = None
        self._life: object | None = None  # from open() to close(); a task of an earlier life ends by itself
        self._lost = asyncio.Event()
        self._attempt_failed = ""
        self._leaving: set[asyncio.Task[None]] = set()
        self._none_active_since: float | None = None
        self._told = LinkState.CLOSED
        _quiet_asyncua()

    @property
    def security(self) -> secure.Security:
        """Policy, certificates and warnings of the endpoint in use."""
        return self._securities[self.endpoint]

    @property
    def client(self) -> Client:
        """The connected asyncua client, for this folder alone; ServerUnreachable while there is none."""
        if self._client is None or self.state not in (LinkState.CONNECTED, LinkState.CONNECTING):
            raise ServerUnreachable("not connected", where=self.where, next_step="wait for the connection")
        return self._client

    @property
    def where(self) -> str:
        """Name, endpoint and policy, as errors and logs show them."""
        return f"server {self.config.name} at {self.endpoint} ({self.security.text})"

    def limit(self, kind: str) -> int:
        """Return how many items the server takes in one call of a kind (`limits.KINDS`)."""
        return self.limits.size(kind)

    async def attach(self, part: Part) -> None:
        """Let a part live on this session; it is built now when the session is connected."""
        self._parts.append(part)
        if self.state is LinkState.CONNECTED:
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
            await end_tasks((task, probe, *self._leaving), ending_s)
            await end_tasks(tuple(self._leaving), ending_s)  # of an attempt that has just been given up
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

    def _gone(self, what: str) -> ServerUnreachable:
        return ServerUnreachable(
            f"the connection was lost: {what}", where=self.where, next_step="wait for the connection"
        )

    def problem(self, error: BaseException, what: str) -> ConnectionProblem:
        """Translate an error of the network or of asyncua; the text never holds the password."""
        name = type(error).__name__
        if isinstance(error, TimeoutError | asyncio.CancelledError):
            return ServerUnreachable(
                f"no answer within {self.timeout_s:g} s: {what}",
                where=self.where,
                next_step="check that the server runs and the network lets the port through",
            )
        if isinstance(error, OSError):
            return ServerUnreachable(
                f"{what}: {error.strerror or error or name}",
                where=self.where,
                next_step="check endpoint, host and port, and that the server runs",
            )
        if name in ("BadTooManySessions", "BadMaxConnectionsReached"):
            return ConnectionProblem(
                f"{what}: the server has no room for one more session ({name})",
                where=self.where,
                next_step="close other clients of the server, or raise its session limit",
            )
        if name in _ACCESS:
            return AccessRefused(
                f"{what}: the server answers {name}", where=self.where, next_step=self._access_step(name)
            )
        return ConnectionProblem(
            f"{what}: {name}{f': {error}' if isinstance(error, UaError) else ''}",
            where=self.where,
            next_step="see the server's log",
        )

    def _access_step(self, name: str) -> str:
        if name in _USER:
            if self.config.user:
                return (
                    f"check user {self.config.user!r} and its password, and that the server allows this user"
                )
            return (
                "give user and password_env (or password_file): the server does not take anonymous sessions"
            )
        if name == "BadSecurityModeInsufficient" and self.config.user:
            return "mode: SignAndEncrypt; in mode Sign the server takes the password unencrypted"
        if name.startswith("BadSecurityPolicy") or name.startswith("BadSecurityMode"):
            return "choose a policy and mode that the server offers"
        return (
            f"let the server trust this client's certificate ({pki.certificate_file(self.config.pki)}), "
            "and check server_certificate"
        )

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
        """Connect again whenever the connection is lost, with growing, jittered delays."""
        while self._life is life:
            await self._lost.wait()
            if self._life is not life:
                return
            log.warning("%s: connection lost: %s", self.where, self.reason)
            self.counters["lost"] += 1
            self._drop(self.reason)
            delay = FIRST_DELAY_S
            while True:
                await asyncio.sleep(delay * self._rng.uniform(0.5, 1.0))
                if self._life is not life:
                    return
                try:
                    await self._connect(life)
                    break
                except DetectorError as error:
                    self._attempt(error.what)
                except Exception as error:
                    log.exception("%s: a part could not be built again", self.where)
                    self._attempt(repr(error))
                delay = min(delay * 2, LAST_DELAY_S)
            self.counters["reconnects"] += 1
            self._attempt_failed = ""
            log.warning("%s: connected again", self.where)

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
            self._leave(client)
        self._set(LinkState.WAITING, reason)

    def _leave(self, client: Client) -> None:
        """Drop a connection; a server that may still hear us is told, so that it does not keep the session.

        By a task of its own: the next attempt does not wait for a server that may be frozen.
        """
        wire.on_closed(client, _nobody)
        if not wire.is_open(client):
            wire.abandon(client)
            return
        task = asyncio.create_task(_say_goodbye(client, min(ENDING_S, self.timeout_s / 2)), name="leaving")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

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
            self.namespaces = await self.call(client.get_namespace_array(), "read the NamespaceArray")
            await self.call(self.limits.read(client), "read the OperationLimits")
            self.pump = PublishPump(client, partial(self.fail, of=client), timeout_s=self.timeout_s)
            for part in tuple(self._parts):
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
                self._leave(client)
            else:
                wire.abandon(client)
            raise
        self.counters["connects"] += 1
        self._set(LinkState.CONNECTED, "")
        self._tell_security(first=self.counters["connects"] == 1)
        wire.on_closed(client, partial(self._socket_lost, client))
        if not wire.is_open(client):
            self.fail("the server closed the connection", client)
        self._probe_task = asyncio.create_task(self._probe(client), name=f"probe {self.config.name}")

    async def _open_client(self, life: object) -> Client:
        """Log in: to the one endpoint there is, or to the active one of a redundant set."""
        if len(self.endpoints) == 1:
            client = self._new_client(self.endpoint)
            self._client = client
            self._lost.clear()
            try:
                await self._log_in(client)
            except BaseException as error:
                wire.abandon(client)
                if self._client is client:
                    self._client = None
                    self._set(LinkState.WAITING, str(error))
                raise
            return client
        try:
            endpoint, client = await self._active(life)
        except BaseException as error:
            if self._life is life:
                self._set(LinkState.WAITING, str(error))
            raise
        if self.counters["connects"] and endpoint != self.endpoint:
            self.counters["changeovers"] += 1
            log.warning("%s: %s takes over", self.where, endpoint)
        self.endpoint, self._client = endpoint, client
        return client

    def _new_client(self, endpoint: str) -> Client:
        return Client(endpoint, timeout=self.timeout_s)

    async def _active(self, life: object) -> tuple[str, Client]:
        """Log in to all endpoints, ask each how it stands, keep the active one; the others are left again.

        Raises ConnectionProblem where none answers, or none is active (`redundancy.choose`).
        """
        clients = {one: self._new_client(one) for one in self.endpoints}
        kept: Client | None = None
        try:
            answers = await asyncio.gather(
                *(self._ask_standing(one, client) for one, client in clients.items()), return_exceptions=True
            )
            problems: dict[str, BaseException] = {}
            for one, told in zip(clients, answers, strict=True):
                self.standing[one] = told if isinstance(told, Standing) else Standing()
                if isinstance(told, BaseException):
                    problems[one] = told
            if len(problems) == len(clients):
                raise problems[self.endpoint]
            if self._life is not life:
                raise self._gone("the session was closed")
            now = asyncio.get_running_loop().time()
            waited_s = 0.0 if self._none_active_since is None else now - self._none_active_since
            endpoint = choose(self.standing, self.endpoint, waited_s)
            if endpoint is None:
                self._none_active_since = now if self._none_active_since is None else self._none_active_since
                told_all = ", ".join(f"{one}: {self.standing[one].text}" for one in self.endpoints)
                raise ServerUnreachable(
                    f"no server of the redundant set is active ({told_all})", where=self.where,
                    next_step="wait until one takes over, or look after the servers",
                )
            self._none_active_since = None
            kept = clients[endpoint]
            return endpoint, kept
        finally:
            for client in clients.values():
                if client is not kept:
                    self._leave(client)

    async def _ask_standing(self, endpoint: str, client: Client) -> Standing:
        await self._log_in(client, endpoint)
        try:
            return await within(standing(client), self.timeout_s)
        except Exception as error:
            raise self.problem(error, f"read the ServiceLevel of {endpoint}") from error

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
            self.standing[self.endpoint] = found
            if len(self.endpoints) > 1 and await self._left_behind(found):
                self.fail(f"the server is not the active one any more ({found.text})", client)
                return

    async def _left_behind(self, found: Standing) -> bool:
        """Whether another server of the redundant set is the one to use now, seen from the one in use."""
        if not found.usable:
            return True
        if found.healthy:
            return False
        # A degraded server is better than none: it is left only for one that is better.
        others = [one for one in self.endpoints if one != self.endpoint]
        clients = [self._new_client(one) for one in others]
        try:
            answers = await asyncio.gather(
                *(self._ask_standing(one, client) for one, client in zip(others, clients, strict=True)),
                return_exceptions=True,
            )
        finally:
            for client in clients:
                self._leave(client)
        return any(isinstance(told, Standing) and told.state == 0 and told.level > found.level for told in answers)

    async def _log_in(self, client: Client, endpoint: str | None = None) -> None:
        config = self.config
        security = self._securities[endpoint or self.endpoint]
        where = f"server {config.name} at {endpoint or self.endpoint} ({security.text})"
        client.name = client.description = "opcua-detector"
        client.product_uri = "urn:opcua-detector"
        client.session_timeout = SESSION_TIMEOUT_MS
        security.identify(client, where)
        if config.policy != "None":
            found = await self.discover(endpoint)
            await self.call(security.prepare(client, found, where), "load the certificates")
        await self.call(client.connect_socket(), "open the connection")
        try:
            await self._stage(client.send_hello(), "say hello")
            await self._stage(client.open_secure_channel(), "open a secure channel")
            await self._stage(wire.start_session(client), "create and activate a session")
            client.set_password("")  # not needed any more, and in nobody's memory dump
        except BaseException:
            wire.abandon(client)
            raise

    async def discover(self, endpoint: str | None = None) -> secure.Discovery:
        """Ask the server for its endpoints and its time, over a channel of its own; no login, nothing is checked."""
        return await self.call(secure.discover(endpoint or self.endpoint, self.timeout_s), "ask for the endpoints")

    async def _endpoints(self) -> list[Any]:
        return list((await self.discover()).endpoints)

    async def _stage(self, request: Awaitable[Any], what: str) -> None:
        """Await one step of the log-in; a server that hangs up in it refuses policy or certificate."""
        try:
            await within(request, self.timeout_s)
        except DetectorError:
            raise
        except Exception as error:
            problem = self.problem(error, what)
            closed = isinstance(error, ConnectionError) or (
                isinstance(error, UaError)
                and not isinstance(problem, AccessRefused)
                and type(error) is UaError
            )
            if what != "say hello" and (
                closed or (isinstance(error, TimeoutError) and self.config.policy != "None")
            ):
                problem = await self._refusal(what, error, problem)
            raise problem from error

    async def _refusal(self, what: str, error: Exception, problem: ConnectionProblem) -> ConnectionProblem:
        """Find out why the server hung up: is the policy offered at all?"""
        try:
            offered = await self._endpoints()
        except ConnectionProblem:
            return problem  # gone altogether
        if not secure.fitting(offered, self.config):
            return secure.not_offered(offered, self.where)
        return AccessRefused(
            f"{what}: the server hung up ({type(error).__name__})",
            where=self.where,
            next_step=self._access_step("BadCertificateUntrusted"),
        )


async def _say_goodbye(client: Client, timeout_s: float) -> None:
    try:
        await farewell(client.disconnect(), timeout_s)
    finally:
        wire.abandon(client)


def _nobody(error: Exception | None) -> None:
    """Nobody has to know when a connection closes that was given up."""


def _quiet_asyncua() -> None:
    """Keep asyncua from logging each refused call; what matters is logged here, on change of state."""
    logger = logging.getLogger("asyncua")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    secure.hide_logins()  # whoever sets a level of their own must not find a password in the log
