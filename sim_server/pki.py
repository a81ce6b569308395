"""The server's own certificate: self-signed, made once and kept in a folder."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from asyncua.crypto.cert_gen import (
    dump_private_key_as_pem,
    generate_private_key,
    generate_self_signed_app_certificate,
)
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from sim_server.errors import StartError

KEY_FILE = "server.key.pem"
CERTIFICATE_FILE = "server.cert.der"


def ensure_certificate(folder: Path, application_uri: str, host: str) -> tuple[Path, Path]:
    """Return (certificate, key) files in a folder, made there if missing, expired or for another URI.

    Parameters
    ----------
    folder
        Created if missing; the key is readable by its owner alone.
    application_uri
        Goes into the subjectAltName, where clients compare it (OPC UA Part 6, clause 6.2.2).
    host
        Name or address clients connect to; goes into the subjectAltName too.

    Raises
    ------
    StartError
        The folder cannot be written, or its key cannot be read.
    """
    key_file, certificate_file = folder / KEY_FILE, folder / CERTIFICATE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _usable(key_file, certificate_file, application_uri, host):
            return certificate_file, key_file
        key = generate_private_key()
        certificate = generate_self_signed_app_certificate(
            key,
            "opcua-detector simulated plant",
            {"organizationName": "opcua-detector"},
            [x509.UniformResourceIdentifier(application_uri), *_host_names(host)],
            extended=[ExtendedKeyUsageOID.SERVER_AUTH],
            days=365,
        )
        _write(key_file, dump_private_key_as_pem(key), 0o600)
        _write(certificate_file, certificate.public_bytes(Encoding.DER), 0o644)
    except OSError as error:
        raise StartError(
            f"the certificate cannot be kept ({error.strerror or error})",
            str(folder),
            "Choose another --pki folder.",
        ) from error
    return certificate_file, key_file


def _usable(key_file: Path, certificate_file: Path, application_uri: str, host: str) -> bool:
    if not (key_file.is_file() and certificate_file.is_file()):
        return False
    try:
        key = load_pem_private_key(key_file.read_bytes(), None)
        certificate = x509.load_der_x509_certificate(certificate_file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise StartError(
            f"the certificate or key is damaged ({error})",
            str(key_file.parent),
            f"Delete {KEY_FILE} and {CERTIFICATE_FILE} there to have new ones made.",
        ) from error
    if key.public_key() != certificate.public_key():
        return False
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    hosts = {str(one.value) for one in names if not isinstance(one, x509.UniformResourceIdentifier)}
    wanted = {str(one.value) for one in _host_names(host)}
    alive = certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=1)
    return alive and application_uri in uris and wanted <= hosts


def _host_names(host: str) -> list[x509.GeneralName]:
    try:
        address: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(host))]
    except ValueError:
        address = [] if host == "localhost" else [x509.DNSName(host)]
    return [*address, x509.DNSName("localhost")]


def _write(file: Path, content: bytes, mode: int) -> None:
    """Replace a file in one step, so that a second server starting now never reads half of it."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as out:
        out.write(content)
    temporary.replace(file)
