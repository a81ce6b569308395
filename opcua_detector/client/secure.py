"""Makes a connection secure: asks for the endpoints, chooses the configured one, checks its certificate, logs in.

Nothing weaker than what is configured is ever taken: policy and mode must be offered exactly, the certificate of the
endpoint is checked before anything is sent under it, and the secure channel and the session must show the same one
(asyncua encrypts to it, verifies with it, and compares it with CreateSession's). The discovery itself travels
unprotected, as Part 4, 5.4 has it: it can make a connection fail, not make it weaker.

What happens to a connection that stands when something ends:

- a certificate expires: the connection stays, with a warning, and the next one is refused. An alarm system that goes
  blind at midnight is the greater danger; the peer was authenticated, and its keys do not weaken by the hour.
- a certificate is taken off the trust list, or revoked: a person has decided, so the connection is ended.

Sources: OPC UA Part 4, 5.4.4 (GetEndpoints), 5.6.2 (CreateSession), 6.1.3; Part 6, 6.7.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from asyncua import Client, ua
from asyncua.crypto import security_policies
from asyncua.ua.ua_binary import struct_from_binary
from cryptography import x509

from ..config import ServerConfig
from ..errors import AccessRefused
from . import inflow, pki, trust, wire
from .certificate_checks import Cause, Expected, host_of, same_host, warnings_of
from .cipher import POLICIES

RECHECK_S = 60.0  # the trust list is asked again this often while a connection stands
_NO_POLICY = security_policies.SecurityPolicyNone.URI
_BINARY = "uatcp-uasc-uabinary"
_ENDED = frozenset({Cause.UNTRUSTED, Cause.CHAIN, Cause.REVOKED})
_TOKENS = {
    ua.UserTokenType.Anonymous: "anonymous",
    ua.UserTokenType.UserName: "user name",
    ua.UserTokenType.Certificate: "user certificate",
    ua.UserTokenType.IssuedToken: "issued token",
}


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a server offers.

    Attributes
    ----------
    endpoints : EndpointDescriptions, as it sends them
    clock_offset_s : its clock minus ours, in seconds, known to half of `round_trip_s`; None where it tells no time
    """

    endpoints: Sequence[Any]
    clock_offset_s: float | None
    round_trip_s: float


async def discover(endpoint: str, timeout_s: float) -> Discovery:
    """Ask a server for its endpoints over an open channel; errors are those of the network and of asyncua."""
    asker = inflow.bounded_client(endpoint, timeout_s, lambda _: None, f"server at {endpoint}", inflow.LEAST_BYTES)
    try:
        await asker.connect_socket()
        await asker.send_hello()
        await asker.open_secure_channel()
        request = ua.GetEndpointsRequest()
        request.Parameters.EndpointUrl = endpoint
        sent, began = time.time(), time.monotonic()
        assert asker.uaclient.protocol is not None
        body = await asker.uaclient.protocol.send_request(request)
        took = time.monotonic() - began
        answer = struct_from_binary(ua.GetEndpointsResponse, body)
        answer.ResponseHeader.ServiceResult.check()
        await asker.close_secure_channel()
        asker.disconnect_socket()
    except BaseException:
        wire.abandon(asker)
        raise
    stamp = answer.ResponseHeader.Timestamp
    offset = None
    if isinstance(stamp, datetime) and stamp.year > 1601:  # 1601 is the null of OPC UA
        stamp = stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)
        offset = stamp.timestamp() - (sent + took / 2)
    return Discovery(list(answer.Endpoints or []), offset, took)


def offer_text(endpoints: Sequence[Any]) -> str:
    """Return in words which policies and modes a server offers."""
    texts = {
        f"{one.SecurityPolicyUri.rpartition('#')[2].replace('_', '')}/"
        f"{ua.MessageSecurityMode(one.SecurityMode).name.rstrip('_')}"
        for one in endpoints if one.SecurityPolicyUri
    }
    return ", ".join(sorted(texts)) or "nothing"


def fitting(endpoints: Sequence[Any], config: ServerConfig) -> list[Any]:
    """Return the endpoints with exactly the configured policy and mode over the binary protocol."""
    if config.policy == "None":
        return [one for one in endpoints if one.SecurityPolicyUri == _NO_POLICY]
    uri, mode = POLICIES[config.policy].URI, getattr(ua.MessageSecurityMode, config.mode)
    return [one for one in endpoints if one.SecurityPolicyUri == uri and one.SecurityMode == mode
            and (not one.TransportProfileUri or one.TransportProfileUri.endswith(_BINARY))]


def not_offered(endpoints: Sequence[Any], where: str) -> AccessRefused:
    """Return the error of a server that does not offer the configured policy and mode."""
    return AccessRefused("the server does not offer this policy and mode", where=where,
                         next_step=f"choose among what it offers: {offer_text(endpoints)}")


@dataclass
class Security:
    """Security of the connections of one session, and what it says about itself.

    Attributes
    ----------
    server : what the server's certificate of this connection says; None without security
    clock_offset_s : server's clock minus ours at the last connecting; None where it is not known
    problems : with `insecure: true`, why the certificate would be refused
    counters : certificates_expired (while connected), trust_withdrawn
    """

    config: ServerConfig
    server: pki.Described | None = None
    clock_offset_s: float | None = None
    problems: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=lambda: {"certificates_expired": 0, "trust_withdrawn": 0})
    _chain: list[x509.Certificate] = field(default_factory=list, repr=False)
    _expected: Expected | None = field(default=None, repr=False)
    _own_ends: datetime | None = field(default=None, repr=False)
    _told: set[str] = field(default_factory=set, repr=False)
    _asked_at: float = field(default=0.0, repr=False)
    _doubted: bool = field(default=False, repr=False)

    @property
    def text(self) -> str:
        """Policy and mode, and the word where the server is not checked: for states, logs and errors."""
        config = self.config
        mode = "" if config.policy == "None" else f"/{config.mode}"
        return f"policy {config.policy}{mode}{', INSECURE' if config.insecure else ''}"

    @property
    def unchecked(self) -> str:
        """Return in words what `insecure: true` leaves out."""
        if self.config.policy == "None":
            return "nothing is encrypted, and the server is not checked"
        login = "; the password goes to whoever answers" if self.config.user else ""
        return f"the server's certificate is not checked: {'; '.join(self.problems) or 'it would be accepted'}{login}"

    def facts(self) -> dict[str, Any]:
        """Return what a state page or a support bundle shows of it; no secret is ever in it."""
        config, about = self.config, self.server
        return {
            "policy": config.policy, "mode": "None" if config.policy == "None" else config.mode,
            "insecure": config.insecure,
            "login": "user name" if config.user else "user certificate" if config.user_certificate else "anonymous",
            "server_certificate": about and {
                "name": about.name, "fingerprint": about.fingerprint, "application_uri": about.application_uri,
                "not_after": about.not_after.isoformat()},
            "own_not_after": self._own_ends and self._own_ends.isoformat(),
            "clock_offset_s": self.clock_offset_s,
            "warnings": [*self.warnings(), *self.problems], **self.counters,
        }

    # -- connecting

    async def prepare(self, client: Client, found: Discovery, where: str) -> None:
        """Choose the endpoint, check its certificate, and load the keys into a client that is not connected yet.

        Raises
        ------
        AccessRefused
            Not offered, not trusted, not valid, not this server; or this client's own pair cannot be used.
        ConfigError
            The pinned certificate cannot be read.
        """
        config = self.config
        own = await asyncio.to_thread(pki.own_certificate, config.pki)
        self.clock_offset_s = found.clock_offset_s
        endpoint = self._chosen(found.endpoints, where)
        try:
            chain = pki.load_chain(bytes(endpoint.ServerCertificate or b""))
        except ValueError as error:
            raise AccessRefused(f"the server shows no certificate that can be read ({error})", where=where,
                                next_step="let the server make or load a valid certificate") from error
        pinned = config.server_certificate
        expected = Expected(
            application_uri=endpoint.Server.ApplicationUri or "", host=config.expected_host or
            host_of(config.endpoint), clock_offset_s=found.clock_offset_s,
            pinned=pki.read_certificate(pinned, f"servers.{config.name}.server_certificate") if pinned else None,
            require_crl=config.require_crl, server=config.name)
        await asyncio.to_thread(self._check, chain, expected, where)
        self._check_login(endpoint, where)
        policy, mode = POLICIES[config.policy], getattr(ua.MessageSecurityMode, config.mode)
        client.application_uri = own.application_uri
        # As `client.set_security` does, but for reading and examining the key once more.
        client.security_policy = policy(chain[0], own.content, own.private, mode)
        client.uaclient.set_security(client.security_policy)
        if not config.insecure:
            client.certificate_validator = _same_application(expected.application_uri, where)
        self._chain, self._expected = chain, expected
        self._own_ends = own.content.not_valid_after_utc
        self._asked_at = time.monotonic()
        try:
            self.server = pki.describe(chain[0])
        except ValueError:  # only `insecure: true` comes so far with a damaged one
            self.server = None

    def _chosen(self, endpoints: Sequence[Any], where: str) -> Any:
        """Return the endpoint to use: of those that fit, the one whose URL names our host, else the first."""
        found = fitting(endpoints, self.config)
        if not found:
            raise not_offered(endpoints, where)
        host = host_of(self.config.endpoint)
        return next((one for one in found if same_host(host, host_of(one.EndpointUrl or ""))), found[0])

    def _check(self, chain: Sequence[x509.Certificate], expected: Expected, where: str) -> None:
        listed = trust.TrustList(self.config.pki)
        if not self.config.insecure:
            listed.check(chain, expected, where=where)
            self.problems = ()
            return
        problems = listed.inspect(chain, expected)
        self.problems = tuple(one.what for one in problems)
        if expected.pinned is not None and problems and problems[0].cause is Cause.UNTRUSTED:
            # Who pins a certificate wants that one, whatever else is left unchecked.
            raise AccessRefused(problems[0].what, where=where, next_step=problems[0].next_step)

    def _check_login(self, endpoint: Any, where: str) -> None:
        """Refuse before anything is sent what the endpoint does not take, or would take in clear."""
        offered = list(endpoint.UserIdentityTokens or [])
        wanted = self._token_type()
        if offered and all(one.TokenType != wanted for one in offered):
            takes = ", ".join(sorted({_TOKENS.get(one.TokenType, "another") for one in offered}))
            keys = {"user name": "user with password_env or password_file",
                    "user certificate": "user_certificate with user_key"}
            raise AccessRefused(
                f"the server does not take this login ({_TOKENS[wanted]})", where=where,
                next_step=f"it takes: {takes}; give "
                f"{' or '.join(text for name, text in keys.items() if name in takes) or 'no user'}")
        token = next((one for one in offered if one.TokenType == wanted), None)
        if wanted is ua.UserTokenType.UserName and token is not None and self.config.mode != "SignAndEncrypt" \
                and token.SecurityPolicyUri == _NO_POLICY:
            raise AccessRefused("the server takes the password unencrypted in mode Sign", where=where,
                                next_step="mode: SignAndEncrypt")

    def _token_type(self) -> Any:
        config = self.config
        return (ua.UserTokenType.UserName if config.user else ua.UserTokenType.Certificate
                if config.user_certificate else ua.UserTokenType.Anonymous)

    def identify(self, client: Client, where: str) -> None:
        """Give a client the login of the configuration.

        Raises
        ------
        ConfigError
            A secret is not where the configuration says, or can be read by others.
        AccessRefused
            The password would travel in clear; the user's certificate and key cannot be used.
        """
        config = self.config
        if self._token_type() is not ua.UserTokenType.Anonymous and config.policy == "None":
            raise AccessRefused("a login never travels over policy None", where=where,
                                next_step=f"choose a policy: {', '.join(POLICIES)}")
        if config.user:
            client.set_user(config.user)
            client.set_password(config.password())
        elif config.user_certificate is not None:
            key = f"servers.{config.name}.user_certificate"
            shown = x509.load_der_x509_certificate(pki.read_certificate(config.user_certificate, key))
            assert config.user_key is not None
            private = pki.read_private_key(config.user_key, password=config.user_key_password())
            if shown.public_key() != private.public_key():
                raise AccessRefused("user_certificate and user_key do not belong together", where=where,
                                    next_step="put the pair there as it was issued")
            if shown.not_valid_after_utc < datetime.now(UTC):
                raise AccessRefused(f"the user certificate expired on {shown.not_valid_after_utc:%Y-%m-%d}",
                                    where=where, next_step="have it renewed")
            client.user_certificate, client.user_private_key = shown, private

    # -- while connected

    def warnings(self, now: datetime | None = None) -> list[str]:
        """Return what is to be told of the certificates in use."""
        now = now or datetime.now(UTC)
        found = warnings_of(self.server.not_after, now=now) if self.server is not None else []
        if self.server is not None and self._own_ends is not None:
            found += warnings_of(self._own_ends, now=now, whose="this client's")
        return found

    def news(self, now: datetime | None = None) -> list[str]:
        """Return the warnings that were not told yet; counts what expired while connected."""
        fresh = []
        for text in self.warnings(now):
            kind = text.partition(" certificate ")[0] + (" expired" if " expired on " in text else "")
            if kind not in self._told:
                self._told.add(kind)
                fresh.append(text)
                self.counters["certificates_expired"] += " expired on " in text
        return fresh

    async def withdrawn(self) -> str:
        """Return why a standing connection must end: trust was taken back; asked every `RECHECK_S`, else empty."""
        if self.config.insecure or self._expected is None or time.monotonic() - self._asked_at < RECHECK_S:
            return ""
        self._asked_at = time.monotonic()
        found = await asyncio.to_thread(trust.TrustList(self.config.pki).inspect, self._chain, self._expected)
        reason = next((one.what for one in found if one.cause in _ENDED), "")
        if reason and not self._doubted:  # asked once more: a folder that could not be read is no decision
            self._doubted, self._asked_at = True, -RECHECK_S
            return ""
        self._doubted = False
        self.counters["trust_withdrawn"] += bool(reason)
        return reason


def _same_application(uri: str, where: str) -> Any:
    """Return asyncua's hook that compares the application of the authenticated session with the discovered one."""

    async def compare(certificate: x509.Certificate, application: Any) -> None:
        if application.ApplicationUri != uri:
            raise AccessRefused(
                f"the server called itself {uri!r} in the discovery and {application.ApplicationUri!r} in the session",
                where=where, next_step="somebody may stand between: check the network before you trust it")

    return compare


class HideLogins(logging.Filter):
    """Keeps logins and session tokens out of asyncua's debug log.

    In an encrypted channel a server may take the password as it is, and asyncua's debug log shows whole messages.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass but what activates or creates a session."""
        shown = (record.msg, *(record.args if isinstance(record.args, tuple) else (record.args,)))
        return not any(isinstance(one, ua.ActivateSessionRequest | ua.CreateSessionResponse) for one in shown)


def hide_logins() -> None:
    """Set `HideLogins`, once, on the loggers of asyncua that show messages."""
    for name in ("asyncua.client.ua_client.UASocketProtocol", "asyncua.client.ua_session.UaSession"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, HideLogins) for one in logger.filters):
            logger.addFilter(HideLogins())
