"""What a server's certificate is held against, whoever is trusted: time, strength, use, identity, signatures.

Nothing here reads a file: `trust` looks into the trust list, and asks these for the rest. Sources: OPC UA Part 4, 6.1.3
(validation of certificates, table 100); Part 6, 6.2; Part 7 (key lengths of the policies); RFC 5280, 4.2 and 6.1.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from . import pki

SKEW_S = 5.0  # a smaller difference of the clocks is not worth a word
WARN_DAYS = 30
_WEAK_HASHES = frozenset({"md5", "sha1"})


class Cause(StrEnum):
    """Why a certificate is refused; the values are the StatusCodes of OPC UA (Part 4, 6.1.3) where there is one."""

    DAMAGED = "BadCertificateInvalid"
    UNTRUSTED = "BadCertificateUntrusted"
    CHAIN = "BadCertificateChainIncomplete"
    EXPIRED = "BadCertificateTimeInvalid"
    NOT_YET = "BadCertificateTimeInvalid (not yet valid)"
    HOST = "BadCertificateHostNameInvalid"
    URI = "BadCertificateUriInvalid"
    USE = "BadCertificateUseNotAllowed"
    WEAK = "BadCertificatePolicyCheckFailed"
    REVOKED = "BadCertificateRevoked"
    REVOCATION_UNKNOWN = "BadCertificateRevocationUnknown"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a certificate, and what to do about it."""

    cause: Cause
    what: str
    next_step: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What a server's certificate is held against.

    Attributes
    ----------
    application_uri : of the ApplicationDescription of the endpoint
    host : name or address the certificate must carry; empty: not compared
    clock_offset_s : server's clock minus ours, in seconds; None where it is not known
    pinned : DER of the one certificate that is trusted, in place of the trust list
    require_crl : a certificate signed by a CA needs a current revocation list of it
    server : name in the configuration, for the texts
    """

    application_uri: str
    host: str
    clock_offset_s: float | None = None
    pinned: bytes | None = None
    require_crl: bool = False
    server: str = ""


def host_of(endpoint: str) -> str:
    """Return the host name or address of an endpoint URL, without brackets."""
    return urlsplit(endpoint).hostname or ""


def same_host(host: str, name: str) -> bool:
    """Tell whether a name of a certificate is this host; addresses are compared as such, wildcards mean nothing.

    Many PLCs write their address as a DNS name; it counts.
    """
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(name)
    except ValueError:
        return bool(host) and host.rstrip(".").casefold() == name.rstrip(".").casefold()


def offset_text(offset_s: float | None) -> str:
    """Return in words how far the server's clock is off ours; empty where that is not worth a word."""
    if offset_s is None or abs(offset_s) < SKEW_S:
        return ""
    size = abs(offset_s)
    unit, width = next((u for u in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)) if size >= u[1]), ("s", 1.0))
    return f"the server's clock is {size / width:.3g} {unit} {'ahead of' if offset_s > 0 else 'behind'} ours"


def warnings_of(not_after: datetime, *, now: datetime, whose: str = "the server's") -> list[str]:
    """Return what is to be told of a certificate that is in use until `not_after`: it has expired, or soon will."""
    left = (not_after - now).total_seconds() / 86400
    if left < 0:
        return [f"{whose} certificate expired on {not_after:%Y-%m-%d %H:%M} UTC: the connection stays, "
                "the next one is refused"]
    return [f"{whose} certificate expires in {left:.0f} days"] if left < WARN_DAYS else []


def problems_of(leaf: x509.Certificate, about: pki.Described, expected: Expected, now: datetime) -> list[Problem]:
    """Return every reason to refuse a server's certificate that does not hang on who is trusted, the gravest first.

    leaf, about : the certificate, and what it says; now : UTC

    Raises
    ------
    ValueError and others of `pki.UNREADABLE`
        The certificate is damaged.
    """
    return [*_validity(about, expected, now), *_strength(leaf, about), *_usage(leaf), *_identity(leaf, expected)]


def signed(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Tell whether a CA has signed a certificate; a damaged one is signed by nobody."""
    try:
        certificate.verify_directly_issued_by(ca)
        return True
    except (InvalidSignature, *pki.UNREADABLE):
        return False


def signed_list(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    """Tell whether a CA has signed a revocation list; a damaged one is signed by nobody."""
    try:
        key = ca.public_key()
        return crl.issuer == ca.subject and isinstance(key, rsa.RSAPublicKey) and crl.is_signature_valid(key)
    except (InvalidSignature, *pki.UNREADABLE):
        return False


def may_sign(ca: x509.Certificate, below: int, now: datetime) -> bool:
    """Tell whether a CA may stand above `below` other CAs (RFC 5280, 6.1.4 k to n)."""
    try:
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        if constraints.path_length is not None and constraints.path_length < below:
            return False
        if not ca.not_valid_before_utc <= now <= ca.not_valid_after_utc or _strength(ca, pki.describe(ca)):
            return False
        for extension in ca.extensions:
            if isinstance(extension.value, x509.KeyUsage) and not extension.value.key_cert_sign:
                return False
            # What is critical and not looked at here forbids the use (RFC 5280, 4.2), name constraints above all.
            if extension.critical and not isinstance(extension.value, x509.KeyUsage | x509.BasicConstraints):
                return False
        return True
    except (x509.ExtensionNotFound, *pki.UNREADABLE):
        return False


def _validity(about: pki.Described, expected: Expected, now: datetime) -> list[Problem]:
    """Is it valid by our clock? The server's clock is told, since one of the two is often wrong."""
    clock = offset_text(expected.clock_offset_s)
    told = f"; {clock}" if clock else ""
    if about.not_after < now:
        return [Problem(Cause.EXPIRED,
                        f"the server's certificate expired on {about.not_after:%Y-%m-%d %H:%M} UTC{told}",
                        "renew the certificate on the server, then trust the new one"
                        + ("; check the clocks first" if clock else ""))]
    if about.not_before > now:
        return [Problem(Cause.NOT_YET,
                        f"the server's certificate is not valid before {about.not_before:%Y-%m-%d %H:%M} UTC "
                        f"(our clock says {now:%Y-%m-%d %H:%M}){told}", "set the clocks of server and this machine")]
    return []


def _strength(certificate: x509.Certificate, about: pki.Described) -> list[Problem]:
    """Are key and signature strong enough for the policies (Part 7: RSA 2048 to 4096, SHA-256)?"""
    low, high = pki.KEY_BITS[0], pki.KEY_BITS[-1]
    if not low <= about.key_bits <= high:
        kind = f"an RSA key of {about.key_bits} bits" if about.key_bits else "no RSA key"
        return [Problem(Cause.WEAK, f"the certificate {about.name} has {kind}; the policies need {low} to {high}",
                        f"make a new certificate with RSA {low} on the server")]
    if not about.signed_with or about.signed_with in _WEAK_HASHES:
        return [Problem(Cause.WEAK,
                        f"the certificate {about.name} is signed with {about.signed_with or 'what is unknown'}; "
                        "the policies need SHA-256", "make a new certificate, signed with SHA-256, on the server")]
    return []


def _usage(leaf: x509.Certificate) -> list[Problem]:
    """May it be used by a server, to sign and to take secrets (Part 6, 6.2.2)?"""
    wrong = ""
    for extension in leaf.extensions:
        value = extension.value
        if isinstance(value, x509.KeyUsage) and not (value.digital_signature and value.key_encipherment):
            wrong = "its keyUsage lacks digitalSignature or keyEncipherment"
        elif isinstance(value, x509.ExtendedKeyUsage) and not (
            {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(value)
        ):
            wrong = "its extendedKeyUsage lacks serverAuth"
        elif isinstance(value, x509.BasicConstraints) and value.ca and leaf.issuer != leaf.subject:
            wrong = "it is the certificate of a CA"
        elif extension.critical and isinstance(value, x509.UnrecognizedExtension):
            wrong = f"its critical extension {extension.oid.dotted_string} is not known"
    return [Problem(Cause.USE, f"the server's certificate must not be used for a server: {wrong}",
                    "give the server an application instance certificate")] if wrong else []


def _identity(leaf: x509.Certificate, expected: Expected) -> list[Problem]:
    """Is it the certificate of this application, on this host (Part 4, 6.1.3)?"""
    problems = []
    uris, hosts = pki.alternative_names(leaf)
    if expected.application_uri not in uris:
        problems.append(Problem(
            Cause.URI, f"the server calls itself {pki.printable(expected.application_uri)!r}, its certificate names "
            f"{', '.join(repr(pki.printable(one)) for one in uris) or 'no ApplicationUri'}",
            "set ApplicationUri and certificate of the server to the same URI (most make a new certificate then)"))
    if expected.host and not any(same_host(expected.host, one) for one in hosts):
        problems.append(Problem(
            Cause.HOST, f"the server's certificate is not for host {expected.host}, but for "
            f"{', '.join(pki.printable(one) for one in hosts) or 'none'}",
            "put a name of the certificate into the endpoint; or, where a gateway stands between, as "
            f"servers.{expected.server or 'NAME'}.expected_host"))
    return problems
