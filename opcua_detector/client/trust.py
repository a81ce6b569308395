"""Whom this client trusts: the folders of the trust list, and every check of a server's certificate.

The trust list is a folder of certificates (DER or PEM), changed by `cert trust` and `cert untrust`, or by hand:

    <pki>/trusted/   servers' certificates, and CAs whose certificates are all trusted
    <pki>/issuers/   CAs that complete a chain, and are not trusted by themselves
    <pki>/crl/       revocation lists of these CAs (optional; `require_crl: true` makes them mandatory)
    <pki>/rejected/  what servers showed and was not trusted; `cert trust FINGERPRINT` takes it from there

Why our own checks: asyncua accepts any server certificate by default, compares no host name, and its trust
validation lets everything pass where it was given no store. Sources: OPC UA Part 4, 6.1.3 (validation of
certificates, table 100); Part 6, 6.2; RFC 5280, 6.1 and 6.3.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ..errors import AccessRefused, ConfigError
from . import pki

KEEP_REJECTED = 50  # files; a hostile server must not fill the disk with certificates
FEW_DIGITS = 8  # a shorter beginning of a fingerprint names nothing
SKEW_S = 5.0  # a smaller difference of the clocks is not worth a word
WARN_DAYS = 30
_DEEP = 6  # CAs above a leaf
_FILE_BYTES = 4_000_000  # of one certificate or revocation list
_WEAK_HASHES = frozenset({"md5", "sha1"})
_UNREADABLE = pki.UNREADABLE


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


class Folder(StrEnum):
    """The folders of the trust list."""

    TRUSTED = "trusted"
    ISSUERS = "issuers"
    REJECTED = "rejected"


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the trust list; `about` is None where it cannot be read."""

    folder: Folder
    file: Path
    about: pki.Described | None


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


class TrustList:
    """The trust list in a `pki` folder; every method reads it anew, so that a change counts at once.

    folder : need not exist; an empty list trusts nobody
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # -- what lies there

    def entries(self, *folders: Folder) -> list[Entry]:
        """Return what lies in these folders (none given: in all), unreadable files too, by folder and name."""
        found = []
        for one in folders or tuple(Folder):
            for file in self._files(one.value):
                try:
                    found.append(Entry(one, file, pki.describe(pki.load_certificate(_bounded(file)))))
                except (OSError, *_UNREADABLE):
                    found.append(Entry(one, file, None))
        return found

    def find(self, digits: str, *folders: Folder) -> list[Entry]:
        """Return the certificates whose SHA-256 or SHA-1 fingerprint begins with these hex digits."""
        wanted = re.sub(r"[\s:]", "", digits).lower()
        if len(wanted) < FEW_DIGITS or not re.fullmatch(r"[0-9a-f]+", wanted):
            return []
        return [entry for entry in self.entries(*folders) if entry.about is not None
                and (entry.about.fingerprint.startswith(wanted) or entry.about.thumbprint.startswith(wanted))]

    def _files(self, name: str) -> list[Path]:
        try:
            return sorted(f for f in (self.folder / name).iterdir() if f.is_file() and not f.name.startswith("."))
        except OSError:
            return []

    def _certificates(self, folder: Folder) -> Iterator[x509.Certificate]:
        for file in self._files(folder.value):
            try:
                yield pki.load_certificate(_bounded(file))
            except (OSError, *_UNREADABLE):
                continue  # `cert show` tells of it; a file that cannot be read trusts nobody

    def _revocations(self) -> Iterator[x509.CertificateRevocationList]:
        for file in self._files("crl"):
            try:
                yield load_crl(_bounded(file))
            except (OSError, *_UNREADABLE):
                continue

    # -- changing it

    def put(self, certificate: x509.Certificate, folder: Folder) -> Path:
        """Put a certificate into a folder, out of the others, and return its file; AccessRefused if it cannot."""
        raw = certificate.public_bytes(Encoding.DER)
        digits = pki.fingerprint(raw)
        try:
            name = pki.describe(certificate).name
        except _UNREADABLE:
            name = "damaged"
        # No leading dot either: hidden files are left out of the list.
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:40].lstrip("._-") or "certificate"
        target = self.folder / folder.value / f"{safe}-{digits[:16]}.der"
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for entry in self.find(digits):
                if entry.folder is not folder:
                    entry.file.unlink(missing_ok=True)
                else:
                    return entry.file
            pki.write_new(target, raw, 0o644)
        except OSError as error:
            raise _unwritable(target, error) from error
        return target

    def put_crl(self, crl: x509.CertificateRevocationList) -> Path:
        """Put a revocation list in force in place of an older one of its issuer, and return its file.

        Raises
        ------
        AccessRefused
            No CA of the trust list has signed it, a newer one is there, or the folder cannot be written.
        """
        signer = next((ca for ca in self._authorities(()) if _signed_list(crl, ca)), None)
        issuer = crl.issuer.rfc4514_string()
        if signer is None:
            raise AccessRefused(f"no CA of the trust list has signed this revocation list of {issuer}",
                                where=str(self.folder), next_step="trust the CA's certificate first")
        target = self.folder / "crl" / f"{pki.fingerprint(signer)[:16]}.crl"
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if target.exists() and load_crl(_bounded(target)).last_update_utc > crl.last_update_utc:
                raise AccessRefused("a newer revocation list of this CA is there already", where=str(target),
                                    next_step="get the newest one from the CA")
            temporary = target.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(crl.public_bytes(Encoding.DER))
            temporary.replace(target)
        except OSError as error:
            raise _unwritable(target, error) from error
        return target

    def reject(self, certificate: x509.Certificate) -> Path | None:
        """Keep what a server showed for whoever decides; None where the folder cannot be written.

        The newest `KEEP_REJECTED` are kept.
        """
        try:
            file = self.put(certificate, Folder.REJECTED)
            old = sorted(self._files(Folder.REJECTED.value), key=lambda f: (f != file, -f.stat().st_mtime_ns))
            for one in old[KEEP_REJECTED:]:
                one.unlink(missing_ok=True)
            return file
        except (AccessRefused, OSError):
            return None

    # -- judging

    def inspect(self, chain: Sequence[x509.Certificate], expected: Expected, *,
                now: datetime | None = None) -> list[Problem]:
        """Return every reason to refuse a server's certificate, the gravest first; empty: it is accepted.

        Parameters
        ----------
        chain : as the server sends it, the leaf first
        expected : what it is held against
        now : UTC, by default our clock
        """
        now = now or datetime.now(UTC)
        leaf = chain[0]
        try:
            about = pki.describe(leaf)
            return [
                *self._trust(leaf, about, chain[1:], expected, now),
                *_validity(about, expected, now),
                *_strength(leaf, about),
                *_usage(leaf),
                *_identity(leaf, expected),
            ]
        except _UNREADABLE as error:
            return [Problem(Cause.DAMAGED, f"the server's certificate is damaged ({error})",
                            "let the server make or load a valid certificate")]

    def check(self, chain: Sequence[x509.Certificate], expected: Expected, *, where: str,
              now: datetime | None = None) -> None:
        """Accept a server's certificate, or keep it under `rejected` and say why.

        Raises
        ------
        AccessRefused
            With every reason, and the next step of the gravest.
        """
        problems = self.inspect(chain, expected, now=now)
        if not problems:
            return
        causes = {one.cause for one in problems}
        if expected.pinned is None and causes & {Cause.UNTRUSTED, Cause.CHAIN}:
            self.reject(chain[0])
        text = "; ".join(one.what for one in problems)
        raise AccessRefused(f"{text} [{problems[0].cause.value.split()[0]}]", where=where,
                            next_step=problems[0].next_step)

    def _trust(self, leaf: x509.Certificate, about: pki.Described, sent: Sequence[x509.Certificate],
               expected: Expected, now: datetime) -> list[Problem]:
        """Is it listed itself, or signed by a listed CA, and not revoked?"""
        if expected.pinned is not None:
            if leaf.public_bytes(Encoding.DER) != expected.pinned:
                return [Problem(Cause.UNTRUSTED,
                                "the server shows another certificate than the one in server_certificate "
                                f"(SHA-256 {pki.spaced(about.fingerprint[:16])} ...)",
                                "make sure that this is your server, then put its present certificate there")]
            listed = True
        else:
            listed = any(one == leaf for one in self._certificates(Folder.TRUSTED))
        path = self._path(leaf, sent, now, need_anchor=not listed)
        if path is None and not listed:
            return [self._untrusted(leaf, about, sent, expected, now)]
        revoked = self._revoked([leaf, *(path or ())], expected, now)
        if path is None and expected.require_crl and leaf.issuer != leaf.subject:
            revoked.append(Problem(
                Cause.REVOCATION_UNKNOWN, f"the CA of the server's certificate is not there ({about.issuer})",
                f"opcua-detector cert trust CA-FILE --issuer --pki {self.folder}"))
        return revoked

    def _untrusted(self, leaf: x509.Certificate, about: pki.Described, sent: Sequence[x509.Certificate],
                   expected: Expected, now: datetime) -> Problem:
        command = f"opcua-detector cert trust {about.fingerprint[:16]} --pki {self.folder}"
        digits = f"SHA-256 {pki.spaced(about.fingerprint)}"
        if leaf.issuer != leaf.subject and not any(_signed(leaf, ca) for ca in self._authorities(sent)):
            return Problem(Cause.CHAIN, f"the server's certificate is not trusted: its CA is not known "
                           f"({about.issuer}; {digits})",
                           f"get the CA's certificate and run: opcua-detector cert trust CA-FILE --pki {self.folder}; "
                           f"or compare the fingerprint with the server's and run: {command}")
        return Problem(Cause.UNTRUSTED, f"the server's certificate is not trusted ({about.name}; {digits})",
                       f"compare the fingerprint with the one that the server itself shows, then run: {command}")

    def _authorities(self, sent: Iterable[x509.Certificate]) -> list[x509.Certificate]:
        """Return all CAs that may stand in a chain: ours first, then those that the server sent."""
        return [one for one in (*self._certificates(Folder.TRUSTED), *self._certificates(Folder.ISSUERS), *sent)
                if pki.is_authority(one)]

    def _path(self, leaf: x509.Certificate, sent: Sequence[x509.Certificate], now: datetime,
              *, need_anchor: bool) -> list[x509.Certificate] | None:
        """Return the CAs from the leaf's up, to a listed one where that is needed; None where there is no such way.

        A self-signed certificate has no CA: it must be listed itself. Each CA on the way must be valid now, strong
        enough, allowed to sign, and allowed to stand so high (RFC 5280, 6.1.4).
        """
        anchors = {pki.fingerprint(one) for one in self._certificates(Folder.TRUSTED)}
        authorities = self._authorities(sent)
        tried: set[str] = set()  # once each: a hostile chain of CAs that sign each other must not cost minutes

        def climb(below: x509.Certificate, path: list[x509.Certificate]) -> list[x509.Certificate] | None:
            best: list[x509.Certificate] | None = None
            for ca in authorities if len(path) < _DEEP else ():
                digits = pki.fingerprint(ca)
                if digits in tried or ca == below or not _signed(below, ca) or not _may_sign(ca, len(path), now):
                    continue
                tried.add(digits)
                longer = [*path, ca]
                higher = longer if digits in anchors else climb(ca, longer)
                if higher is not None and pki.fingerprint(higher[-1]) in anchors:
                    return higher
                best = best or higher or longer
            return None if need_anchor else best

        if leaf.issuer == leaf.subject:
            return None
        return climb(leaf, [])

    def _revoked(self, path: Sequence[x509.Certificate], expected: Expected, now: datetime) -> list[Problem]:
        """Ask the revocation lists of each CA of a path about the certificate below it (RFC 5280, 6.3)."""
        problems = []
        lists = list(self._revocations())
        for below, ca in pairwise(path):
            found = [one for one in lists if _signed_list(one, ca)]
            name = pki.printable(below.subject.rfc4514_string())
            for one in found:
                entry = one.get_revoked_certificate_by_serial_number(below.serial_number)
                if entry is not None:
                    problems.append(Problem(
                        Cause.REVOKED, f"the certificate {name} was revoked on {entry.revocation_date_utc:%Y-%m-%d}",
                        "do not trust this server until its operator has given it a new certificate"))
                    break
            current = any(one.next_update_utc is None or one.next_update_utc >= now for one in found)
            if expected.require_crl and not current:
                problems.append(Problem(
                    Cause.REVOCATION_UNKNOWN,
                    f"there is no {'current ' if found else ''}revocation list of {ca.subject.rfc4514_string()}",
                    f"get it from the CA and run: opcua-detector cert trust FILE.crl --pki {self.folder}"))
        return problems


def load_crl(raw: bytes) -> x509.CertificateRevocationList:
    """Return a revocation list from DER or PEM; ValueError where it is none."""
    return x509.load_pem_x509_crl(raw) if b"-----BEGIN" in raw[:4096] else x509.load_der_x509_crl(raw)


def warnings_of(not_after: datetime, *, now: datetime, whose: str = "the server's") -> list[str]:
    """Return what is to be told of a certificate that is in use until `not_after`: it has expired, or soon will."""
    left = (not_after - now).total_seconds() / 86400
    if left < 0:
        return [f"{whose} certificate expired on {not_after:%Y-%m-%d %H:%M} UTC: the connection stays, "
                "the next one is refused"]
    return [f"{whose} certificate expires in {left:.0f} days"] if left < WARN_DAYS else []


def _bounded(file: Path) -> bytes:
    with file.open("rb") as opened:
        raw = opened.read(_FILE_BYTES + 1)
    if len(raw) > _FILE_BYTES:
        raise ValueError("too large")
    return raw


def read_any(file: Path) -> x509.Certificate | x509.CertificateRevocationList:
    """Return the certificate or revocation list of a file; ConfigError where it is neither."""
    try:
        raw = _bounded(file)
    except OSError as error:
        raise ConfigError("the file cannot be read", value=str(file),
                          next_step=f"check the path ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError("this is no certificate", value=str(file), expected="X.509 in DER or PEM",
                          next_step="export the certificate again") from error
    for load in (pki.load_certificate, load_crl):
        try:
            return load(raw)
        except _UNREADABLE:
            continue
    raise ConfigError("this is neither a certificate nor a revocation list", value=str(file),
                      expected="X.509 in DER or PEM", next_step="export it again")


def _unwritable(file: Path, error: OSError) -> AccessRefused:
    return AccessRefused(f"the trust list cannot be written ({error.strerror})", where=str(file),
                         next_step="check the rights of the folder, or choose another pki")


def _signed(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
        return True
    except (InvalidSignature, *_UNREADABLE):
        return False


def _signed_list(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    try:
        key = ca.public_key()
        return crl.issuer == ca.subject and isinstance(key, rsa.RSAPublicKey) and crl.is_signature_valid(key)
    except (InvalidSignature, *_UNREADABLE):
        return False


def _may_sign(ca: x509.Certificate, below: int, now: datetime) -> bool:
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
    except (x509.ExtensionNotFound, *_UNREADABLE):
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
