"""This client's own certificate: made once, kept, never changed behind the user's back.

The pair in `<pki>/own` is all that this client ever writes for a connection, and a secure one needs it: so
`check`, which writes nothing to the server, makes it too when there is none. A server's certificate is never
stored.

Why: a certificate that changes at each start must be trusted anew on every server.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from asyncua.crypto.cert_gen import (
    dump_private_key_as_pem,
    generate_private_key,
    generate_self_signed_app_certificate,
)
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ..errors import AccessRefused, ConfigError

_DAYS = 3650


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """Files of the certificate (DER) and its key (PEM), and the ApplicationUri it names."""

    certificate: Path
    key: Path
    application_uri: str


def certificate_file(folder: Path) -> Path:
    """Return where the certificate of this client lies; servers must trust it."""
    return folder / "own" / "opcua-detector.der"


def own_certificate(folder: Path) -> OwnCertificate:
    """Return this client's certificate, made on the first call and kept.

    Raises AccessRefused when it has expired or is damaged: it is never replaced silently, since every server
    would have to trust the new one.
    """
    certificate = certificate_file(folder)
    key = certificate.with_name("opcua-detector.key.pem")
    if not certificate.exists() or not key.exists():
        _make(certificate, key)
    try:
        content = x509.load_der_x509_certificate(certificate.read_bytes())
        names = content.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise AccessRefused(
            "this client's certificate cannot be read",
            where=str(certificate),
            next_step="delete it together with its key: a new pair is made",
        ) from error
    if content.not_valid_after_utc < datetime.now(UTC):
        raise AccessRefused(
            f"this client's certificate expired on {content.not_valid_after_utc:%Y-%m-%d}",
            where=str(certificate),
            next_step="delete it together with its key, then let the servers trust the new one",
        )
    return OwnCertificate(certificate, key, uris[0] if uris else "urn:opcua-detector")


def read_certificate(file: Path, key: str) -> bytes:
    """Return a certificate as DER; ConfigError with the key of the configuration where it cannot be read."""
    try:
        raw = file.read_bytes()
        loaded = (
            x509.load_pem_x509_certificate(raw)
            if raw.lstrip().startswith(b"-----")
            else (x509.load_der_x509_certificate(raw))
        )
    except OSError as error:
        raise ConfigError(
            "the certificate cannot be read",
            key=key,
            value=str(file),
            next_step=f"check the path ({error.strerror})",
        ) from error
    except ValueError as error:
        raise ConfigError(
            "this is no certificate",
            key=key,
            value=str(file),
            expected="X.509 in DER or PEM",
            next_step="export the server's certificate again",
        ) from error
    return loaded.public_bytes(Encoding.DER)


def _make(certificate: Path, key: Path) -> None:
    host = socket.gethostname()
    uri = f"urn:{host}:opcua-detector"
    try:
        certificate.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        private = generate_private_key()
        made = generate_self_signed_app_certificate(
            private,
            f"opcua-detector@{host}",
            {"organizationName": "opcua-detector"},
            [x509.UniformResourceIdentifier(uri), x509.DNSName(host)],
            extended=[ExtendedKeyUsageOID.CLIENT_AUTH],
            days=_DAYS,
        )
        _write(key, dump_private_key_as_pem(private), 0o600)
        _write(certificate, made.public_bytes(Encoding.DER), 0o644)
    except OSError as error:
        raise AccessRefused(
            f"this client's certificate cannot be made ({error.strerror})",
            where=str(certificate.parent),
            next_step="choose a folder that can be written as pki",
        ) from error


def _write(file: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as out:
        out.write(content)
