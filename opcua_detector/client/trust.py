"""Whom this client trusts: the folders of the trust list, and the judgement of a server's certificate by it.

The trust list is a folder of certificates (DER or PEM), changed by `cert trust` and `cert untrust`, or by hand:

    <pki>/trusted/   servers' certificates, and CAs whose certificates are all trusted
    <pki>/issuers/   CAs that complete a chain, and are not trusted by themselves
    <pki>/crl/       revocation lists of these CAs (optional; `require_crl: true` makes them mandatory)
    <pki>/rejected/  what servers showed and was not trusted; `cert trust FINGERPRINT` takes it from there

Why our own checks: asyncua accepts any server certificate by default, compares no host name, and its trust
validation lets everything pass where it was given no store. What does not hang on the list is in `certificate_checks`.
Sources: OPC UA Part 4, 6.1.3 (validation of certificates, table 100); RFC 5280, 6.1 and 6.3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..errors import AccessRefused, ConfigError
from . import pki
from .certificate_checks import Cause, Expected, Problem, may_sign, problems_of, signed, signed_list

KEEP_REJECTED = 50  # files; a hostile server must not fill the disk with certificates
FEW_DIGITS = 8  # a shorter beginning of a fingerprint names nothing
_DEEP = 6  # CAs above a leaf
_FILE_BYTES = 4_000_000  # of one certificate or revocation list
_UNREADABLE = pki.UNREADABLE


class Folder(StrEnum):
    """The folders of the trust list."""

    TRUSTED = "trusted"
    ISSUERS = "issuers"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the trust list; `about` is None where it cannot be read."""

    folder: Folder
    file: Path
    about: pki.Described | None


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
        signer = next((ca for ca in self._authorities(()) if signed_list(crl, ca)), None)
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
            return [*self._trust(leaf, about, chain[1:], expected, now), *problems_of(leaf, about, expected, now)]
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
        if leaf.issuer != leaf.subject and not any(signed(leaf, ca) for ca in self._authorities(sent)):
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
                if digits in tried or ca == below or not signed(below, ca) or not may_sign(ca, len(path), now):
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
            found = [one for one in lists if signed_list(one, ca)]
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
