"""Symmetric security of messages, as asyncua's policies have it, with less work per message and in constant time.

asyncua makes three objects of the crypto library per message and compares signatures byte by byte until the first
difference, which tells an attacker by its time how far a guess was right. Here the two SHA-256 states of a key (HMAC,
RFC 2104) and the cipher are made once per token, and signatures are compared in constant time. Keys are derived by
asyncua (Part 6, 6.7.5); handshake and asymmetric part are asyncua's.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from asyncua.crypto import security_policies, uacrypto
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SIGNATURE, BLOCK, IV = 32, 16, 16  # bytes: HMAC-SHA-256, AES, its initialisation vector
_FRAME = struct.Struct("<4sIIIII")  # MessageHeader, channel, token, sequence number, request id (Part 6, 6.7.2)
_AFTER_TOKEN = 16
_PADDINGS = tuple(bytes([n]) * (n + 1) for n in range(BLOCK))


class Hmac:
    """HMAC-SHA-256 with one key; asyncua's Signer and Verifier.

    key : at most 64 bytes; the policies have 32
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        padded = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(one ^ 0x36 for one in padded))
        self._outer = hashlib.sha256(bytes(one ^ 0x5C for one in padded))

    def signature_size(self) -> int:
        """Return the bytes of a signature."""
        return SIGNATURE

    def signature(self, data: bytes) -> bytes:
        """Return the signature of a message."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(data)
        outer.update(inner.digest())
        return outer.digest()

    def verify(self, data: bytes, signature: bytes) -> None:
        """Raise asyncua's InvalidSignature unless the signature is right."""
        if not hmac.compare_digest(self.signature(data), signature):
            raise uacrypto.InvalidSignature

    def reset(self) -> None:
        """Forget the key."""
        self._inner = self._outer = hashlib.sha256()


class Cbc:
    """AES-CBC with one key and initialisation vector, as Part 6, 6.7.2 has it; asyncua's Encryptor and Decryptor.

    Data are whole blocks: the message pads itself.
    """

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes, vector: bytes) -> None:
        self._cipher: Any = Cipher(algorithms.AES(key), modes.CBC(vector))

    def plain_block_size(self) -> int:
        """Return the bytes of a block."""
        return BLOCK

    def encrypted_block_size(self) -> int:
        """Return the bytes of a block."""
        return BLOCK

    def encrypt(self, data: bytes) -> bytes:
        """Return the ciphertext of whole blocks; ValueError for others."""
        one = self._cipher.encryptor()
        return bytes(one.update(data) + one.finalize())

    def decrypt(self, data: bytes) -> bytes:
        """Return the plaintext of whole blocks; ValueError for others."""
        one = self._cipher.decryptor()
        return bytes(one.update(data) + one.finalize())

    def reset(self) -> None:
        """Forget the key."""
        self._cipher = None


class _Symmetric:
    """Mixed into asyncua's policies: derives the keys of a token into the classes above."""

    signature_key_size: int
    symmetric_key_size: int
    symmetric_cryptography: Any

    def make_local_symmetric_key(self, secret: bytes, seed: bytes) -> None:
        sizes = (self.signature_key_size, self.symmetric_key_size, IV)
        sign, key, vector = uacrypto.p_sha256(secret, seed, sizes)
        crypto = self.symmetric_cryptography
        crypto.Signer, crypto.Encryptor = Hmac(sign), Cbc(key, vector)

    def make_remote_symmetric_key(self, secret: bytes, seed: bytes, lifetime: float) -> None:
        sizes = (self.signature_key_size, self.symmetric_key_size, IV)
        sign, key, vector = uacrypto.p_sha256(secret, seed, sizes)
        crypto = self.symmetric_cryptography
        if crypto.Verifier is not None:  # messages under the old token may still be on their way
            crypto.Prev_Verifier, crypto.Prev_Decryptor = crypto.Verifier, crypto.Decryptor
            crypto.prev_key_expiration = crypto.key_expiration
        crypto.key_expiration = time.monotonic() + lifetime / 1000
        crypto.Verifier, crypto.Decryptor = Hmac(sign), Cbc(key, vector)


class Basic256Sha256(_Symmetric, security_policies.SecurityPolicyBasic256Sha256):
    """RSA-OAEP, RSA-PKCS1.5-SHA-256, AES-256 (Part 7, 6.6.165)."""


class Aes128Sha256RsaOaep(_Symmetric, security_policies.SecurityPolicyAes128Sha256RsaOaep):
    """RSA-OAEP, RSA-PKCS1.5-SHA-256, AES-128 (Part 7, 6.6.161)."""


class Aes256Sha256RsaPss(_Symmetric, security_policies.SecurityPolicyAes256Sha256RsaPss):
    """RSA-OAEP-SHA-256, RSA-PSS-SHA-256, AES-256 (Part 7, 6.6.169)."""


POLICIES: Final[Mapping[str, type[Any]]] = MappingProxyType({
    one.__name__: one for one in (Basic256Sha256, Aes128Sha256RsaOaep, Aes256Sha256RsaPss)
})


def seal(connection: Any, body: bytes | bytearray, request_id: int) -> bytes | None:
    """Return the frame of a request that fits into one chunk, as `SecureConnection.message_to_binary` would.

    connection : asyncua's SecureConnection of an open channel; its sequence number counts up

    Returns None, and counts nothing, where it does not fit or the policy is not one of the above.
    """
    crypto = connection.security_policy.symmetric_cryptography
    signer = getattr(crypto, "Signer", None)
    if not isinstance(signer, Hmac):
        return None
    size = _FRAME.size + len(body)
    padding = b""
    if crypto.is_encrypted:  # what is encrypted begins behind the token: sequence header, body, padding, signature
        padding = _PADDINGS[-(size - _AFTER_TOKEN + 1 + SIGNATURE) % BLOCK]
    size += len(padding) + SIGNATURE
    if size > connection._limits.max_send_buffer:
        return None
    connection._sequence_number = number = connection._sequence_number % 0xFFFFFFFF + 1
    token = connection.security_token
    plain = _FRAME.pack(b"MSGF", size, token.ChannelId, token.TokenId, number, request_id) + body + padding
    sealed = plain + signer.signature(plain)
    return sealed[:_AFTER_TOKEN] + crypto.Encryptor.encrypt(sealed[_AFTER_TOKEN:]) if crypto.is_encrypted else sealed
