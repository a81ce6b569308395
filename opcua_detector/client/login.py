"""Logs in to one server: socket, hello, secure channel, session; and tells what a refusal means.

A user name or user certificate that was refused is shown to the server again only after a pause (`refusals`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from asyncua import Client
from asyncua.ua.uaerrors import UaError

from ..config import ServerConfig
from ..errors import AccessRefused, ConnectionProblem, DetectorError, LoginRefused, ServerUnreachable
from . import inflow, pki, secure, wire
from .refusals import MOST_TRIES, Refusals
from .waiting import farewell, within

ENDING_S = 1.0  # at most, of the time-out, for a farewell, and for tasks that are cancelled on closing
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
_USER = frozenset({"BadUserAccessDenied", "BadIdentityTokenInvalid", "BadIdentityTokenRejected"})


@dataclass(frozen=True, slots=True)
class Held:
    """A login that is held back: for how many seconds, whether that is news for the log, and the words for it."""

    left_s: float
    news: bool
    what: str


class Login:
    """How to log in to the endpoints of one server, or of one redundant set.

    Parameters
    ----------
    config : endpoints, policy, login, time-out
    on_refused : called with the error when a connection is dropped because the server sends too much (`inflow`)
    rng : how much longer than they must be the pauses after a refused login are

    Attributes
    ----------
    endpoints : tuple of str; the configured one first
    securities : endpoint -> Security; policy, certificates and warnings
    refusals : endpoint -> Refusals; of the login
    timeout_s : of each step
    leaving : tasks that say goodbye
    """

    def __init__(
        self, config: ServerConfig, on_refused: Callable[[ConnectionProblem], None], rng: random.Random | None = None
    ) -> None:
        self.config = config
        self.endpoints = (config.endpoint, *config.endpoints)
        self.securities = {
            one: secure.Security(config.model_copy(update={"endpoint": one})) for one in self.endpoints
        }
        rng = rng or random.Random()
        self.refusals = {one: Refusals(rng) for one in self.endpoints}
        self._salt = os.urandom(16)
        self.timeout_s = config.timeout / 1e9
        self.leaving: set[asyncio.Task[None]] = set()
        self._on_refused = on_refused

    def where(self, endpoint: str) -> str:
        """Name, endpoint and policy, as errors and logs show them."""
        return f"server {self.config.name} at {endpoint} ({self.securities[endpoint].text})"

    def new_client(self, endpoint: str) -> Client:
        """Return a client that is not connected yet and takes no message without end."""
        where = self.where(endpoint)
        return inflow.bounded_client(endpoint, self.timeout_s, self._on_refused, where, self.config.max_message_size)

    async def log_in(self, client: Client, endpoint: str) -> None:
        """Connect a client and activate a session; raises ConnectionProblem, and then nothing is left of it.

        While a login that was refused is held back nothing is sent, and LoginRefused says so.
        """
        config, security, where = self.config, self.securities[endpoint], self.where(endpoint)
        mark, refusals = await self._mark(), self.refusals[endpoint]
        left_s = refusals.left_s(mark)
        if left_s > 0.0:
            raise LoginRefused(f"{refusals.what}; not tried again before {_at(left_s)}", where=where,
                               next_step=self._access_step("BadUserAccessDenied"))
        client.name = client.description = "opcua-detector"
        client.product_uri = "urn:opcua-detector"
        client.session_timeout = SESSION_TIMEOUT_MS
        security.identify(client, where)
        if config.policy != "None":
            found = await self.discover(endpoint)
            await self._ask(security.prepare(client, found, where), "load the certificates", where)
        await self._ask(client.connect_socket(), "open the connection", where)
        try:
            await self._stage(client, client.send_hello(), "say hello", endpoint)
            await self._stage(client, client.open_secure_channel(), "open a secure channel", endpoint)
            await self._stage(client, wire.start_session(client), "create and activate a session", endpoint)
            client.set_password("")  # not needed any more, and in nobody's memory dump
            refusals.taken()
        except BaseException as error:
            wire.abandon(client)
            if mark and isinstance(error, AccessRefused) and type(error.__cause__).__name__ in _USER:
                refusals.refused(mark, error.what)
                raise LoginRefused(error.what, where=error.where, next_step=error.next_step) from error.__cause__
            raise

    async def held_back(self) -> Held | None:
        """Return for how long no endpoint may be shown the login; None where one may.

        Where the secret has changed since it was refused it may be shown.
        """
        mark = await self._mark()
        left_s, endpoint = min((one.left_s(mark), endpoint) for endpoint, one in self.refusals.items())
        if left_s <= 0.0:
            return None
        refusals = self.refusals[endpoint]
        times = "once" if refusals.in_a_row == 1 else f"{refusals.in_a_row} times in a row"
        then = ", then every 5 minutes" if refusals.in_a_row >= MOST_TRIES else ""
        return Held(left_s, refusals.news, (
            f"{refusals.what} ({times}); so as not to lock the account the next try is at {_at(left_s)}{then}, or as "
            "soon as the secret changes or the configuration is reloaded"))

    def forgive(self) -> None:
        """Let a login that was refused be tried again at once."""
        for refusals in self.refusals.values():
            refusals.forgive()

    async def _mark(self) -> bytes:
        """Return a mark of the secret as it is now: another one for another secret, empty for an anonymous session."""
        config = self.config
        if not config.user and config.user_certificate is None:
            return b""
        return await asyncio.to_thread(self._mark_now)

    def _mark_now(self) -> bytes:
        config, mark = self.config, hashlib.blake2b(key=self._salt)
        try:
            if config.user:
                mark.update(config.password().encode("utf-8", "surrogateescape"))
            else:
                assert config.user_certificate is not None and config.user_key is not None
                for part in (config.user_certificate.read_bytes(), config.user_key.read_bytes(),
                             (config.user_key_password() or "").encode("utf-8", "surrogateescape")):
                    mark.update(len(part).to_bytes(8, "big") + part)
        except (DetectorError, OSError):
            return b"unreadable"  # nothing of it can be sent: the log-in tells why
        return mark.digest()

    async def discover(self, endpoint: str) -> secure.Discovery:
        """Ask a server for its endpoints and its time, over a channel of its own; no login, nothing is checked."""
        return await self._ask(secure.discover(endpoint, self.timeout_s), "ask for the endpoints", self.where(endpoint))

    def leave(self, client: Client) -> None:
        """Drop a connection; a server that may still hear us is told, so that it does not keep the session.

        By a task of its own: the next attempt does not wait for a server that may be frozen.
        """
        wire.on_closed(client, _nobody)
        if not wire.is_open(client):
            wire.abandon(client)
            return
        task = asyncio.create_task(_say_goodbye(client, min(ENDING_S, self.timeout_s / 2)), name="leaving")
        self.leaving.add(task)
        task.add_done_callback(self.leaving.discard)

    async def _ask(self, request: Awaitable[_T], what: str, where: str) -> _T:
        try:
            return await within(request, self.timeout_s)
        except DetectorError:
            raise
        except Exception as error:
            raise self.problem(error, what, where) from error

    async def _stage(self, client: Client, request: Awaitable[Any], what: str, endpoint: str) -> None:
        """Await one step of the log-in; a server that hangs up in it refuses policy or certificate."""
        try:
            await within(request, self.timeout_s)
        except DetectorError:
            raise
        except Exception as error:
            refusal = inflow.refusal_of(client)
            if refusal is not None:  # we hung up, not the server
                raise refusal from error
            problem = self.problem(error, what, self.where(endpoint))
            closed = isinstance(error, ConnectionError) or (
                isinstance(error, UaError) and not isinstance(problem, AccessRefused) and type(error) is UaError
            )
            if what != "say hello" and (
                closed or (isinstance(error, TimeoutError) and self.config.policy != "None")
            ):
                problem = await self._refusal(what, error, problem, endpoint)
            raise problem from error

    async def _refusal(
        self, what: str, error: Exception, problem: ConnectionProblem, endpoint: str
    ) -> ConnectionProblem:
        """Find out why the server hung up: is the policy offered at all?"""
        try:
            offered = (await self.discover(endpoint)).endpoints
        except ConnectionProblem:
            return problem  # gone altogether
        if not secure.fitting(offered, self.config):
            return secure.not_offered(offered, self.where(endpoint))
        return AccessRefused(
            f"{what}: the server hung up ({type(error).__name__})",
            where=self.where(endpoint),
            next_step=self._access_step("BadCertificateUntrusted"),
        )

    # --- what an error means ---

    def problem(self, error: BaseException, what: str, where: str) -> ConnectionProblem:
        """Translate an error of the network or of asyncua; the text never holds the password."""
        name = type(error).__name__
        if isinstance(error, TimeoutError | asyncio.CancelledError):
            return ServerUnreachable(
                f"no answer within {self.timeout_s:g} s: {what}",
                where=where,
                next_step="check that the server runs and the network lets the port through",
            )
        if isinstance(error, OSError):
            return ServerUnreachable(
                f"{what}: {error.strerror or error or name}",
                where=where,
                next_step="check endpoint, host and port, and that the server runs",
            )
        if name in ("BadTooManySessions", "BadMaxConnectionsReached"):
            return ConnectionProblem(
                f"{what}: the server has no room for one more session ({name})",
                where=where,
                next_step="close other clients of the server, or raise its session limit",
            )
        if name in _ACCESS:
            return AccessRefused(f"{what}: the server answers {name}", where=where, next_step=self._access_step(name))
        return ConnectionProblem(
            f"{what}: {name}{f': {error}' if isinstance(error, UaError) else ''}",
            where=where,
            next_step="see the server's log",
        )

    def _access_step(self, name: str) -> str:
        if name in _USER:
            if self.config.user:
                return f"check user {self.config.user!r} and its password, and that the server allows this user"
            return "give user and password_env (or password_file): the server does not take anonymous sessions"
        if name == "BadSecurityModeInsufficient" and self.config.user:
            return "mode: SignAndEncrypt; in mode Sign the server takes the password unencrypted"
        if name.startswith("BadSecurityPolicy") or name.startswith("BadSecurityMode"):
            return "choose a policy and mode that the server offers"
        return (
            f"let the server trust this client's certificate ({pki.certificate_file(self.config.pki)}), "
            "and check server_certificate"
        )


def _at(left_s: float) -> str:
    """Return the time of day in so many seconds as text, UTC."""
    return f"{datetime.fromtimestamp(time.time() + left_s, UTC):%Y-%m-%d %H:%M:%S}Z"


async def _say_goodbye(client: Client, timeout_s: float) -> None:
    try:
        await farewell(client.disconnect(), timeout_s)
    finally:
        wire.abandon(client)


def _nobody(error: Exception | None) -> None:
    """Nobody has to know when a connection closes that was given up."""


def quiet_asyncua() -> None:
    """Keep asyncua from logging each refused call; what matters is logged here, on change of state."""
    logger = logging.getLogger("asyncua")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    secure.hide_logins()  # whoever sets a level of their own must not find a password in the log
