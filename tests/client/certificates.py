"""Certificates of every kind, and real servers that show them: what the tests of security are made of."""

from __future__ import annotations

import base64
import functools
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from asyncua import Server, ua
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.user_managers import UserManager
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(UTC)
URI = "urn:tests:secure-server"
USER, PASSWORD = "engineer", "correct-horse-battery"
POLICIES = ("Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss")
MODES = ("Sign", "SignAndEncrypt")
EVERY_POLICY = (
    ua.SecurityPolicyType.NoSecurity,
    *(getattr(ua.SecurityPolicyType, f"{policy}_{mode}") for policy in POLICIES for mode in MODES),
)

# Self-signed with SHA-1, valid until 2126; today's libraries make none any more. CN=old, the URI above, 127.0.0.1.
SHA1 = base64.b64decode(
    "MIIC9zCCAd+gAwIBAgIUUf8uLF4hodSn6DMp1+yz39+j4R8wDQYJKoZIhvcNAQEFBQAwDjEMMAoGA1UEAwwDb2xkMCAXDTI2MTEy"
    "MjEwMzUxNVoYDzIxMjYxMDI5MTAzNTE1WjAOMQwwCgYDVQQDDANvbGQwggEiMA0GCSqGSIb3DQEBAQUAA4IBDwAwggEKAoIBAQC0"
    "azMGTzJYKaiV39GRFpKuddIX9S/Frpw6nni0lqcxb4CA6HOhjQerwLLjFUh/yeRzQdYdKYTX5F20J+BV0PGdrgM5d/VUS8dwxUFM"
    "OMw5Hzb309RuGR7nHzk4zr700x+O06ZCYiDO6wAe7Wnl0wWoMIG3TVweIUR571GtPjgp8+uOnLoZFF93N2bRnzDqABaZSTmluqXJ"
    "6ft+avQzGsV157ErRdSRq1uiBvfmE/q/6B0KqpBsI5A4vZtMZVM10wXuhX6AD2EpGaDepRJgIiFeleX97H24R00Hq2tM7Fawm+jP"
    "auEjicbUzMYTxhn1WYynGebjM4YA+L2qfOoT2JA9AgMBAAGjSzBJMCgGA1UdEQQhMB+GF3Vybjp0ZXN0czpzZWN1cmUtc2VydmVy"
    "hwR/AAABMB0GA1UdDgQWBBQlD3+laZkqAKE1hlyfl2GD9GEc4jANBgkqhkiG9w0BAQUFAAOCAQEAVfK7as8AG2a8y48XPyDR+fya"
    "qpbEeY3ysvhFWbBgHTYICcHD/gQOKg6jlG/PYppGU09V9pPHBA0yTel67tc0jGifgwcbVglWJPKkShEZzrM0+8ADR1Sgpn5ZYs6+"
    "Sh+JeAn8/VN7NaHwQWDzLFSrPmJNnrKozPoCvU/UK9xEDngs38bX4n5V54n0b28lMd/LRGGGsdx32RiOk0oPdnw/+9chI26LaawC"
    "HyF890xywfbIrMG6yUkqMud1nhV4MzSMeYv27VymbzJQDMGqyo3uqpkVa2aWJI73bKF87x9mNFLiO0yea3CKsfh+g5ZlkViBlbVZ"
    "9lflWgfimRk/qG6vrQ=="
)


@functools.cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key by its name: making one takes a noticeable time, so that each is made once."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@dataclass(frozen=True)
class Made:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def pem_key(self, password: str = "") -> bytes:
        how = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


@dataclass(frozen=True)
class Wanted:
    """How a certificate is to be; the defaults make a good one of a server on 127.0.0.1."""

    name: str = "server"
    uris: Sequence[str] = (URI,)
    hosts: Sequence[str] = ("127.0.0.1", "localhost")
    days: tuple[float, float] = (-1, 365)
    bits: int = 2048
    ca: bool | None = False
    path_length: int | None = None
    sign_others: bool = False
    usage: bool = True
    extended: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH,)
    more: Sequence[tuple[x509.ExtensionType, bool]] = ()


def make(issuer: Made | None = None, **changes: Any) -> Made:
    """Make a certificate, self-signed where no issuer is given; `Wanted` tells the keys."""
    wanted = Wanted(**changes)
    key = rsa_key(wanted.name, wanted.bits)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wanted.name)])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in wanted.uris]
    for host in wanted.hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host.removeprefix("dns:")))
    builder = (
        x509.CertificateBuilder().subject_name(subject).public_key(key.public_key())
        .issuer_name(issuer.certificate.subject if issuer else subject).serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=wanted.days[0])).not_valid_after(NOW + timedelta(days=wanted.days[1]))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if wanted.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=wanted.ca, path_length=wanted.path_length), True)
    if wanted.usage:
        builder = builder.add_extension(x509.KeyUsage(
            digital_signature=True, content_commitment=True, key_encipherment=True, data_encipherment=True,
            key_agreement=False, key_cert_sign=wanted.sign_others, crl_sign=wanted.sign_others, encipher_only=False,
            decipher_only=False), True)
    if wanted.extended:
        builder = builder.add_extension(x509.ExtendedKeyUsage(wanted.extended), False)
    for extension, critical in wanted.more:
        builder = builder.add_extension(extension, critical)
    return Made(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def authority(issuer: Made | None = None, name: str = "plant CA", **changes: Any) -> Made:
    """Make a CA."""
    return make(issuer, **({"name": name, "uris": (), "hosts": (), "ca": True, "sign_others": True, "extended": ()}
                           | changes))


def crl(ca: Made, *revoked: Made, days: tuple[float, float] = (-1, 30)) -> x509.CertificateRevocationList:
    """Make a revocation list of a CA."""
    builder = (x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
               .last_update(NOW + timedelta(days=days[0])).next_update(NOW + timedelta(days=days[1])))
    for one in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(one.certificate.serial_number)
            .revocation_date(NOW - timedelta(days=1)).build())
    return builder.sign(ca.key, hashes.SHA256())


class Users(UserManager):
    """Lets in one name with one password, one user certificate, and anonymous sessions where they are wanted."""

    def __init__(self, certificate: bytes | None = None, *, anonymous: bool = True) -> None:
        self.certificate, self.anonymous = certificate, anonymous

    def get_user(
        self, iserver: Any, username: Any = None, password: Any = None, certificate: Any = None
    ) -> User | None:
        if username is not None:
            return User(role=UserRole.User) if (username, password) == (USER, PASSWORD) else None
        if self.certificate is not None:
            return User(role=UserRole.User) if certificate == self.certificate else None
        return User(role=UserRole.User) if self.anonymous else None


@asynccontextmanager
async def secure_server(
    cache: Path, shown: Made, *, chain: Sequence[Made] = (), uri: str = URI, policies: Sequence[Any] = EVERY_POLICY,
    tokens: Sequence[type] = (ua.AnonymousIdentityToken, ua.UserNameIdentityToken), users: Users | None = None,
    port: int = 0,
) -> AsyncIterator[Any]:
    """Run a real server that shows this certificate; yields it with the attribute `url`.

    cache : of the standard address space, shared by servers
    chain : CAs that it sends behind its own certificate
    """
    logging.getLogger("asyncua").setLevel(logging.CRITICAL + 1)
    server = Server(user_manager=users or Users())
    server.set_identity_tokens(list(tokens))
    await server.init(shelf_file=cache)
    cache.with_suffix(".db").touch()  # by this the library sees that the cache is there
    await server.set_application_uri(uri)
    server.set_endpoint(f"opc.tcp://127.0.0.1:{port}/")
    server.set_security_policy(list(policies))
    server.iserver.certificate = shown.certificate
    server.iserver.private_key = shown.key
    await server.start()
    for endpoint in server.iserver.endpoints:
        endpoint.ServerCertificate = shown.der + b"".join(one.der for one in chain)
    try:
        server.url = f"opc.tcp://127.0.0.1:{server.bserver.port}/"
        yield server
    finally:
        await server.stop()
