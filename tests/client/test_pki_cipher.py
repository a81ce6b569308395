"""The message security of our own against asyncua's: each understands the other, and nothing altered gets through."""

from __future__ import annotations

import hmac
import time
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.connection import SecureConnection, TransportLimits
from asyncua.crypto import security_policies, uacrypto
from asyncua.ua.ua_binary import header_from_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client.cipher import BLOCK, POLICIES, Cbc, Hmac, seal

from .certificates import MODES, make

US, PEER = make(name="us"), make(name="peer")
NONCES = (b"1" * 32, b"2" * 32)


def ends(policy: str, mode: str, ours: type[Any] | None = None) -> tuple[SecureConnection, SecureConnection]:
    """Both ends of an open channel: ours, and asyncua's."""
    theirs = getattr(security_policies, f"SecurityPolicy{policy}")
    level = getattr(ua.MessageSecurityMode, mode)
    made = []
    for kind, local, remote, (seed, secret) in (
        (ours or POLICIES[policy], US, PEER, NONCES), (theirs, PEER, US, NONCES[::-1])):
        one = SecureConnection(kind(remote.certificate, local.certificate, local.key, level), TransportLimits())
        one.security_policy.make_local_symmetric_key(secret, seed)
        one.security_policy.make_remote_symmetric_key(seed, secret, 3_600_000)
        one.security_token.ChannelId, one.security_token.TokenId, one._open = 7, 9, True
        made.append(one)
    return made[0], made[1]


def received(end: SecureConnection, frame: bytes) -> Any:
    """What an end makes of a frame."""
    buffer = ua.utils.Buffer(frame)
    return end.receive_from_header_and_body(header_from_binary(buffer), buffer)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_both_ends_understand_each_other(policy: str, mode: str) -> None:
    us, peer = ends(policy, mode)
    for size in (0, 1, 7, 8, 15, 16, 31, 32, 33, 100, 5000, 65_000, 200_000):
        body = bytes(i % 251 for i in range(size))
        for sent, got in ((us, peer), (peer, us)):
            chunks = [sent.message_to_binary(body, request_id=size + 1)] if size else []
            for raw in chunks:
                buffer, message = ua.utils.Buffer(raw), None
                while buffer:
                    message = got.receive_from_header_and_body(header_from_binary(buffer), buffer)
                assert message is not None
                assert bytes(message.body()) == body and message.request_id() == size + 1


@settings(deadline=None, max_examples=150)
@given(st.binary(min_size=1, max_size=3000), st.sampled_from(sorted(POLICIES)), st.sampled_from(MODES),
       st.integers(1, 2**32 - 1))
def test_a_sealed_frame_is_read_by_asyncua(body: bytes, policy: str, mode: str, request_id: int) -> None:
    us, peer = _KEPT.setdefault((policy, mode), ends(policy, mode))
    peer._peer_sequence_number = None
    for kind in (bytes, bytearray):
        frame = seal(us, kind(body), request_id)
        assert frame is not None
        message = received(peer, frame)
        assert bytes(message.body()) == body and message.request_id() == request_id
    if mode == "Sign":  # without padding the bytes are asyncua's own
        us._sequence_number -= 1
        assert us.message_to_binary(body, request_id=request_id) == frame


_KEPT: dict[tuple[str, str], tuple[SecureConnection, SecureConnection]] = {}


def test_what_does_not_fit_is_left_to_asyncua_and_counts_nothing() -> None:
    us, _ = ends("Basic256Sha256", "SignAndEncrypt")
    before = us._sequence_number
    assert seal(us, bytes(us._limits.max_send_buffer - 60), 1) is None
    theirs, _ = ends("Basic256Sha256", "Sign", security_policies.SecurityPolicyBasic256Sha256)
    assert seal(theirs, b"body", 1) is None
    assert seal(SecureConnection(security_policies.SecurityPolicyNone(), TransportLimits()), b"body", 1) is None
    assert us._sequence_number == before
    us._sequence_number = 2**32 - 1
    assert seal(us, b"body", 1) is not None and us._sequence_number == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_frame_that_was_altered_anywhere_is_refused(mode: str) -> None:
    us, peer = ends("Aes128Sha256RsaOaep", mode)
    frame = peer.message_to_binary(b"a message that matters", request_id=5)
    assert bytes(received(us, frame).body()) == b"a message that matters"
    for at in (*range(3, 4), *range(8, len(frame))):  # the size, at 4 to 7, is what says where it ends
        altered = bytearray(frame)
        altered[at] ^= 0x40
        us._peer_sequence_number = None
        with pytest.raises(Exception):  # noqa: B017 - each field is checked by another part
            received(us, bytes(altered))


def test_hmac_is_the_one_of_the_standard_library() -> None:
    for key in (bytes(range(32)), b"", b"k" * 64):
        for data in (b"", b"x", bytes(10_000)):
            expected = hmac.digest(key, data, "sha256")
            assert Hmac(key).signature(data) == expected
            Hmac(key).verify(data, expected)
            for wrong in (b"", expected[:-1], expected[:-1] + b"\0" if expected[-1] else b"\1", expected + b"\0"):
                with pytest.raises(uacrypto.InvalidSignature):
                    Hmac(key).verify(data, wrong)


def test_a_key_that_was_reset_is_gone() -> None:
    signer, cipher = Hmac(b"k" * 32), Cbc(b"k" * 32, bytes(16))
    right = signer.signature(b"x")
    assert cipher.decrypt(cipher.encrypt(bytes(BLOCK))) == bytes(BLOCK)
    signer.reset()
    cipher.reset()
    assert signer.signature(b"x") != right
    with pytest.raises(AttributeError):
        cipher.encrypt(bytes(BLOCK))


def test_messages_under_the_old_token_are_taken_until_its_keys_expire() -> None:
    us, peer = ends("Basic256Sha256", "SignAndEncrypt")
    late = [peer.message_to_binary(b"late", request_id=1), peer.message_to_binary(b"too late", request_id=2)]
    us.prev_security_token = us.security_token
    us._allow_prev_token = True
    us.security_policy.make_remote_symmetric_key(b"3" * 32, b"4" * 32, 3_600_000)
    assert bytes(received(us, late[0]).body()) == b"late"
    us.security_policy.symmetric_cryptography.prev_key_expiration = time.monotonic() - 1
    with pytest.raises(uacrypto.InvalidSignature):
        received(us, late[1])
