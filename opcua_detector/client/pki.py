"""This client's own certificate, and how certificates and keys are read: made once, kept, never changed in silence.

The pair in `<pki>/own` is made by `cert new`, or by the first secure connection (so `check` makes it too). Why it is
kept: a certificate that changes at each start must be trusted anew on every server. What is trusted of others lies
in `trust`. Source: OPC UA Part 6, 6.2.2 (application instance certificate).
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import AccessRefused, ConfigError

DAYS = 3650
KEY_BITS = (2048, 3072, 4096)  # what the three policies allow (Part 7, 6.6.161 to 6.6.169)
CHAIN_BYTES, CHAIN_CERTIFICATES = 65_536, 10  # a server may send no longer chain than this
_OWN, _KEY = "opcua-detector.der", "opcua-detector.key.pem"
_SHOWN_CHARS = 200
# What the library raises for a damaged certificate, at once or when a part of it is looked at.
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
              x509.UnsupportedGeneralNameType)
_PEM = b"-----BEGIN"


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """Files of the certificate (DER) and its key (PEM), the ApplicationUri it names, and both as they were read."""

    certificate: Path
    key: Path
    application_uri: str
    content: x509.Certificate
    private: rsa.RSAPrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Described:
    """What a certificate says, as plain values.

    Attributes
    ----------
    subject, issuer : RFC 4514 text
    name : common name, or the subject where there is none
    fingerprint : SHA-256 of the DER, 64 hex digits
    thumbprint : SHA-1 of the DER, 40 hex digits; what most OPC UA tools show
    application_uri : first URI of the subjectAltName, or empty
    hosts : DNS names and IP addresses of the subjectAltName
    not_before, not_after : UTC
    key_bits : of the RSA modulus; 0 for another kind of key
    """

    subject: str
    issuer: str
    name: str
    fingerprint: str
    thumbprint: str
    serial: str
    application_uri: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    key_bits: int
    signed_with: str
    self_signed: bool
    authority: bool


def fingerprint(certificate: x509.Certificate | bytes) -> str:
    """Return the SHA-256 of a certificate's DER as 64 hex digits."""
    raw = certificate if isinstance(certificate, bytes) else certificate.public_bytes(Encoding.DER)
    return hashlib.sha256(raw).hexdigest()


def spaced(digits: str) -> str:
    """Return a fingerprint in groups of four, so that a person can compare it."""
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4)).upper()


def printable(text: str) -> str:
    """Return text of a stranger as it may be shown: no control characters for the terminal, no endless line."""
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN_CHARS])


def describe(certificate: x509.Certificate) -> Described:
    """Return what a certificate says; ValueError where it is damaged inside."""
    try:
        return _described(certificate)
    except UNREADABLE as error:
        raise ValueError(str(error)) from error


def _described(certificate: x509.Certificate) -> Described:
    raw = certificate.public_bytes(Encoding.DER)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    subject = printable(certificate.subject.rfc4514_string())
    uris, hosts = alternative_names(certificate)
    try:
        key = certificate.public_key()
        bits = key.key_size if isinstance(key, rsa.RSAPublicKey) else 0
        signed_with = certificate.signature_hash_algorithm.name if certificate.signature_hash_algorithm else ""
    except UnsupportedAlgorithm:
        bits, signed_with = 0, ""
    return Described(
        subject=subject,
        issuer=printable(certificate.issuer.rfc4514_string()),
        name=printable(str(names[0].value)) if names else subject,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        thumbprint=hashlib.sha1(raw).hexdigest(),
        serial=f"{certificate.serial_number:x}",
        application_uri=printable(uris[0]) if uris else "",
        hosts=tuple(printable(one) for one in hosts),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key_bits=bits,
        signed_with=signed_with,
        self_signed=certificate.subject == certificate.issuer,
        authority=is_authority(certificate),
    )


def alternative_names(certificate: x509.Certificate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (URIs, host names and IP addresses) of the subjectAltName; ValueError where it is damaged."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return (), ()
    return (
        tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        (*names.get_values_for_type(x509.DNSName), *(str(a) for a in names.get_values_for_type(x509.IPAddress))),
    )


def is_authority(certificate: x509.Certificate) -> bool:
    """Tell whether a certificate may sign others.

    Many servers mark their self-signed application certificate as a CA, which Part 6, 6.2.2 once asked for. One that
    names an ApplicationUri is an application's, whatever its basicConstraints say: it never signs for others here.
    """
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    return constraints.ca and not alternative_names(certificate)[0]


def certificate_file(folder: Path) -> Path:
    """Return where the certificate of this client lies; servers must trust it."""
    return folder / "own" / _OWN


def key_file(folder: Path) -> Path:
    """Return where the private key of this client lies."""
    return folder / "own" / _KEY


def own_certificate(folder: Path) -> OwnCertificate:
    """Return this client's certificate, made on the first call and kept.

    Raises
    ------
    AccessRefused
        It has expired, is damaged, does not belong to its key, or the key can be read by others. It is never
        replaced silently, since every server would have to trust the new one.
    """
    certificate, key = certificate_file(folder), key_file(folder)
    again = f"opcua-detector cert new --replace --pki {folder}"
    if not certificate.exists():
        make_pair(folder)
    elif not key.exists():
        raise AccessRefused(
            "the private key of this client's certificate is missing", where=str(key),
            next_step=f"put it back, or make a new pair, which every server must trust anew: {again}")
    private = read_private_key(key, again=again)
    try:
        content = x509.load_der_x509_certificate(certificate.read_bytes())
        uris, _ = alternative_names(content)
        fits = content.public_key() == private.public_key()
    except (OSError, *UNREADABLE) as error:
        raise AccessRefused(
            "this client's certificate cannot be read", where=str(certificate),
            next_step=f"put it back, or make a new pair, which every server must trust anew: {again}") from error
    if not fits:
        raise AccessRefused(
            "this client's certificate and private key do not belong together", where=str(certificate),
            next_step=f"put the right ones there, or make a new pair: {again}")
    if content.not_valid_after_utc < datetime.now(UTC):
        raise AccessRefused(
            f"this client's certificate expired on {content.not_valid_after_utc:%Y-%m-%d}", where=str(certificate),
            next_step=f"{again}; then let the servers trust the new one")
    return OwnCertificate(certificate, key, uris[0] if uris else "urn:opcua-detector", content, private)


def read_certificate(file: Path, key: str) -> bytes:
    """Return a certificate as DER; ConfigError with the key of the configuration where it cannot be read."""
    try:
        raw = file.read_bytes()
        loaded = load_certificate(raw)
    except OSError as error:
        raise ConfigError(
            "the certificate cannot be read", key=key, value=str(file),
            next_step=f"check the path ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(
            "this is no certificate", key=key, value=str(file), expected="X.509 in DER or PEM",
            next_step="export the certificate again") from error
    return loaded.public_bytes(Encoding.DER)


def load_certificate(raw: bytes) -> x509.Certificate:
    """Return a certificate from DER or PEM; ValueError where it is none."""
    try:
        return x509.load_pem_x509_certificate(raw) if _PEM in raw[:4096] else x509.load_der_x509_certificate(raw)
    except UNREADABLE as error:
        raise ValueError(str(error)) from error


def load_chain(raw: bytes) -> list[x509.Certificate]:
    """Return the certificates of a chain as a server sends it: DER after DER, the leaf first (Part 4, 7.3.1).

    Raises
    ------
    ValueError
        It is empty, too long, or holds what is no certificate.
    """
    if len(raw) > CHAIN_BYTES:
        raise ValueError(f"a chain of {len(raw)} bytes")
    found: list[x509.Certificate] = []
    at = 0
    while at < len(raw):
        size = _der_size(raw, at)
        found.append(load_certificate(raw[at : at + size]))
        at += size
        if len(found) > CHAIN_CERTIFICATES:
            raise ValueError(f"a chain of more than {CHAIN_CERTIFICATES} certificates")
    if not found:
        raise ValueError("no certificate")
    return found


def _der_size(raw: bytes, at: int) -> int:
    """Return how many bytes the DER SEQUENCE at `at` takes (X.690, 8.1.3)."""
    if len(raw) < at + 2 or raw[at] != 0x30:
        raise ValueError("no DER sequence")
    first = raw[at + 1]
    if first < 0x80:
        size = 2 + first
    else:
        count = first & 0x7F
        if not 1 <= count <= 4 or len(raw) < at + 2 + count:
            raise ValueError("a damaged DER length")
        size = 2 + count + int.from_bytes(raw[at + 2 : at + 2 + count], "big")
    if at + size > len(raw):
        raise ValueError("a certificate that is cut short")
    return size


def read_private_key(file: Path, *, password: str | None = None, again: str = "") -> rsa.RSAPrivateKey:
    """Return a private key from a PEM or DER file that nobody else can read.

    Parameters
    ----------
    password : pass phrase of the key, where it has one
    again : what to do where it is damaged; empty: export it again

    Raises
    ------
    AccessRefused
        It is missing, readable by others, damaged, no RSA key, or the pass phrase is wrong; never shows any part
        of the key or the pass phrase.
    """
    try:
        with file.open("rb") as opened:
            # The mode of the opened file: a check of the path could be of another file than the one that is read.
            if os.name == "posix" and os.fstat(opened.fileno()).st_mode & 0o077:
                raise AccessRefused("the private key can be read by others", where=str(file),
                                    next_step=f"chmod 600 {file}; replace the pair if others had access")
            raw = opened.read(CHAIN_BYTES)
    except OSError as error:
        raise AccessRefused(f"the private key cannot be read ({error.strerror})", where=str(file),
                            next_step="check path and rights") from error
    load = load_pem_private_key if _PEM in raw[:4096] else load_der_private_key
    try:
        # Whether its numbers are primes takes 0.1 s, in which nothing else runs, at each connecting. It is this
        # client's own file, and a key that does not fit its certificate is found by comparing the two.
        key = load(raw, password.encode() if password else None, unsafe_skip_rsa_key_validation=True)
    except UNREADABLE:
        # From None: the library's error may quote the file.
        raise AccessRefused(
            "the private key is damaged, or its pass phrase is wrong or missing", where=str(file),
            next_step=f"export it again as PEM{f', or: {again}' if again else ''}") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise AccessRefused("the private key is no RSA key", where=str(file),
                            next_step="the security policies offered here need RSA of 2048 to 4096 bits")
    return key


def make_pair(
    folder: Path, *, hosts: Sequence[str] = (), days: int = DAYS, bits: int = KEY_BITS[0], uri: str = ""
) -> Path:
    """Make this client's key and self-signed certificate where they are missing, and return the certificate's file.

    Several processes may do so at once: the first key and the first certificate win, and all of them use those.

    Parameters
    ----------
    folder : the `pki` folder
    hosts : DNS names and IP addresses besides those of this machine
    days : validity
    bits : of the RSA key, 2048, 3072 or 4096
    uri : ApplicationUri; empty: urn:<host>:opcua-detector

    Raises
    ------
    AccessRefused
        The folder cannot be written, or there is a key already that cannot be used.
    """
    certificate, key = certificate_file(folder), key_file(folder)
    try:
        certificate.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not key.exists():
            made = rsa.generate_private_key(public_exponent=65537, key_size=bits)
            write_new(key, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
        private = read_private_key(key, again=f"opcua-detector cert new --replace --pki {folder}")
        if not certificate.exists():
            made_of = _self_signed(private, hosts or (), days, uri)
            write_new(certificate, made_of.public_bytes(Encoding.DER), 0o644)
    except OSError as error:
        raise AccessRefused(
            f"this client's certificate cannot be made ({error.strerror})", where=str(certificate.parent),
            next_step="choose a folder that can be written as pki") from error
    return certificate


def retire_pair(folder: Path) -> list[Path]:
    """Move this client's pair aside, so that a new one can be made; return where it lies now.

    Raises
    ------
    AccessRefused
        The folder cannot be written.
    """
    aside = folder / "own" / f"old-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    moved = []
    try:
        for file in (certificate_file(folder), key_file(folder)):
            if file.exists():
                aside.mkdir(mode=0o700, exist_ok=True)
                moved.append(file.rename(aside / file.name))
    except OSError as error:
        raise AccessRefused(f"the old pair cannot be moved ({error.strerror})", where=str(aside),
                            next_step="check the rights of the folder") from error
    return moved


def _self_signed(private: rsa.RSAPrivateKey, hosts: Sequence[str], days: int, uri: str) -> x509.Certificate:
    """Sign an application instance certificate (Part 6, 6.2.2, table 43)."""
    host = socket.gethostname()
    name = x509.Name([
        x509.NameAttribute(NameOID.COMMON_NAME, f"opcua-detector@{host}"[:64]),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "opcua-detector"),
    ])
    public = private.public_key()
    serial = x509.random_serial_number()
    key_id = x509.SubjectKeyIdentifier.from_public_key(public)
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri or f"urn:{host}:opcua-detector")]
    names += [_general_name(one) for one in dict.fromkeys([host, *hosts, *_addresses()])]
    return (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(public).serial_number(serial)
        # An hour back: a server whose clock is a little behind must not find it not yet valid.
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(
            digital_signature=True, content_commitment=True, key_encipherment=True, data_encipherment=True,
            key_agreement=False, key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False),
            critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(key_id, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(key_id.digest, [x509.DirectoryName(name)], serial), critical=False)
        .sign(private, hashes.SHA256())
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _addresses() -> list[str]:
    """Return the addresses by which this machine is seen; connecting a UDP socket sends nothing and never waits."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                found.append(probe.getsockname()[0].partition("%")[0])
        except OSError:
            continue
    return found


def write_new(file: Path, content: bytes, mode: int) -> bool:
    """Write a file whole, unless it is there already; True when it was written. OSError as the system tells it."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if os.name == "posix":
            os.chmod(temporary, mode)
        return _place(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _place(temporary: str, file: Path) -> bool:
    """Give a complete file its name, unless another one has it."""
    try:
        os.link(temporary, file)  # fails where the name is taken; a rename would overwrite on POSIX
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if file.exists():
            return False
        os.replace(temporary, file)
        return True
