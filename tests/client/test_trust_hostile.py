"""A server that was trusted and turned hostile: what it sends is encrypted and signed as it should be, and garbage.

The signature says who sends, not that it makes sense. Each kind of garbage comes once in the log-in and once on a
connection that stands; the client must answer with an error of ours, wait between its attempts, leave nothing behind,
and be back when the server is sane again.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from asyncua import ua
from asyncua.crypto.security_policies import SecurityPolicyNone
from asyncua.server.uaprocessor import UaProcessor
from asyncua.ua.ua_binary import struct_to_binary
from running import until

from opcua_detector.client import GroupFeed, LinkState, Session, pki, session, subscription
from opcua_detector.client.trust import Folder, TrustList
from opcua_detector.config import GroupConfig, ServerConfig, TagConfig
from opcua_detector.errors import ConnectionProblem

from .certificates import make, secure_server
from .conftest import Rows

PERIOD_S = 0.05
HOSTILE_S = 1.0
MOST_PER_S, FREE = 100, 200  # answers that a client may ask for: it logs in anew now and then, in steps
WAIT_S = 60.0
TYPE, NOBODY = "an unknown type", "answers to nobody"
_HEADER = struct.Struct("<BBHqII")  # NodeId in 4 bytes, Timestamp, RequestHandle, ServiceResult (Part 6, 5.2.2.9, 7.29)


def _reads(body: bytes) -> tuple[int, ...]:
    found: tuple[int, ...] = _HEADER.unpack_from(body)
    return found


def _noise(body: bytes) -> bytes:
    return random.Random(len(body)).randbytes(len(body))


def _endless(body: bytes) -> bytes:
    """The header, and then an array that announces 2^31 - 1 elements."""
    return body[:24] + struct.pack("<i", 2**31 - 1)


def _nested(body: bytes) -> bytes:
    """A DiagnosticInfo in a DiagnosticInfo in a DiagnosticInfo (Part 6, 5.2.2.12: at most 100 levels)."""
    return body[:20] + b"\x40" * 60_000


def _unknown(body: bytes) -> bytes:
    return struct.pack("<BBH", 1, 0, 65_000) + body[4:]


def _another_service(body: bytes) -> bytes:
    answer = ua.FindServersResponse()
    answer.ResponseHeader.RequestHandle = _reads(body)[4]
    return bytes(struct_to_binary(answer))


def _refused(body: bytes) -> bytes:
    """A fault with a code that nobody knows."""
    fault = ua.ServiceFault()
    fault.ResponseHeader.RequestHandle = _reads(body)[4]
    fault.ResponseHeader.ServiceResult = ua.StatusCode(0x80FF_0000)
    return bytes(struct_to_binary(fault))


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda body: b"",
    "one byte": lambda body: body[:1],
    "noise": _noise,
    "cut short": lambda body: body[: len(body) // 2],
    "an array without end": _endless,
    "nested without end": _nested,
    TYPE: _unknown,
    "an answer of another service": _another_service,
    "an unknown fault": _refused,
}


class Hostile:
    """Spoils the answers of a server of this process, inside correct signature and encryption.

    spoil : made of the body of each answer on a secure channel; None: the server is sane
    to_nobody : answers bear the number of a request that was never sent
    sent : how many answers were spoilt
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spoil: Callable[[bytes], bytes] | None = None
        self.to_nobody = False
        self.sent = 0
        self.url = ""
        self.value: Any = None

        def send(processor: UaProcessor, handle: int, sequence: Any, response: Any,
                 kind: Any = ua.MessageType.SecureMessage) -> None:
            response.ResponseHeader.RequestHandle = handle
            body, number = struct_to_binary(response), sequence.RequestId
            channel = processor._connection
            secure = kind is ua.MessageType.SecureMessage and channel.security_policy.URI != SecurityPolicyNone.URI
            if secure and (self.spoil is not None or self.to_nobody):
                self.sent += 1
                body = self.spoil(body) if self.spoil else body
                number += 7_000_000 if self.to_nobody else 0
            processor._transport.write(channel.message_to_binary(body, message_type=kind, request_id=number))

        monkeypatch.setattr(UaProcessor, "send_response", send)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PROBE_S", 0.2)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.5)
    monkeypatch.setattr(subscription, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(subscription, "SILENCE_MARGIN_S", 0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `pki` folder with this client's pair."""
    folder = tmp_path_factory.mktemp("hostile-pki")
    pki.own_certificate(folder)
    return folder


@pytest_asyncio.fixture
async def hostile(cache: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hostile]:
    """A trusted server with one variable that changes every PERIOD_S; still sane."""
    shown = make()
    TrustList(place).put(shown.certificate, Folder.TRUSTED)
    one = Hostile(monkeypatch)
    async with secure_server(cache, shown) as server:
        index = await server.register_namespace("urn:hostile")
        node = await server.nodes.objects.add_variable(ua.NodeId("value", index), f"{index}:value", 0.0)
        one.url = server.url

        async def change() -> None:
            number = 0.0
            while True:
                number += 1.0
                await node.write_value(number)
                await asyncio.sleep(PERIOD_S)

        changing = asyncio.create_task(change(), name="plant")
        yield one
        one.spoil, one.to_nobody = None, False
        changing.cancel()


def to(hostile: Hostile, place: Path) -> Session:
    return Session(ServerConfig(name="plant", endpoint=hostile.url, policy="Basic256Sha256", pki=place, timeout="1 s"))


def tasks() -> Counter[str]:
    """The tasks of the client by name; those of the server and of the test have no name of ours."""
    return Counter(one.get_name() for one in asyncio.all_tasks() if not one.get_name().startswith("Task-"))


async def not_in_a_hurry(hostile: Hostile) -> None:
    """Let the server be hostile for a while, and assert that the client does not ask without a pause."""
    sent, begun = hostile.sent, time.monotonic()
    await asyncio.sleep(HOSTILE_S)
    assert hostile.sent - sent <= FREE + MOST_PER_S * (time.monotonic() - begun)


async def test_garbage_in_the_log_in_is_an_error_of_ours(hostile: Hostile, place: Path) -> None:
    before = tasks()
    for kind in (*SPOILT, NOBODY):
        if kind == TYPE:  # the log-in is left to asyncua, which does not look at the type of an answer that is right
            continue
        hostile.spoil, hostile.to_nobody, sent = SPOILT.get(kind), kind == NOBODY, hostile.sent
        one = to(hostile, place)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ConnectionProblem) as caught:
                await one.open()
        assert caught.value.next_step and hostile.sent > sent, kind
        await one.close()
    await until(lambda: not tasks() - before, "the tasks of the attempts to end")
    hostile.spoil, hostile.to_nobody = None, False
    one = to(hostile, place)
    await one.open()
    assert one.state is LinkState.CONNECTED
    await one.close()


@pytest.mark.parametrize("kinds", [
    ("noise", "nested without end", NOBODY),
    pytest.param(tuple(SPOILT), marks=pytest.mark.plant),
], ids=["some", "all"])
@pytest.mark.usefixtures("quick")
async def test_garbage_on_a_standing_connection_is_survived(
    hostile: Hostile, place: Path, kinds: tuple[str, ...],
) -> None:
    one, rows = to(hostile, place), Rows()
    await one.open()
    group = GroupConfig(name="g", server="plant", period="50 ms", tags=(
        TagConfig(name="value", node="nsu=urn:hostile;s=value"),))
    feed = GroupFeed(group, {"plant": one}, rows.take)
    await feed.start()
    await rows.more(10)
    before = tasks()
    for n, kind in enumerate(kinds):
        hostile.spoil, hostile.to_nobody = SPOILT.get(kind), kind == NOBODY
        await until(lambda n=n: one.counters["lost"] > n, f"the connection to be given up, {kind}", WAIT_S)
        assert one.state is not LinkState.CONNECTED and one.reason
        await not_in_a_hurry(hostile)
        hostile.spoil, hostile.to_nobody = None, False
        await until(lambda: one.state is LinkState.CONNECTED, f"the connection, {kind}", WAIT_S)
        lost = one.counters["lost"]
        await rows.more(20)
        assert feed.counters()["gaps"] >= n + 1 and rows.rows[-1][3].all()
        assert set(feed.tag_states().values()) == {""} and one.counters["lost"] == lost == n + 1, kind
        await until(lambda: not tasks() - before, f"no more tasks than before, {kind}")
    await feed.stop()
    await one.close()
