"""Messages taken out of the socket: whatever way the bytes are cut, they arrive whole, in order, or not at all."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from asyncua import ua
from asyncua.client.ua_client import UASocketProtocol, UASocketState
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_to_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import Session, wire
from opcua_detector.client.wire_receive import ROOM, Answer, Receiver
from opcua_detector.client.wire_requests import PreparedRead, ReadFrom

from .conftest import WAIT_S, OddServer, server_config

CHANNEL, TOKEN = 7, 3


class Transport(asyncio.Transport):
    """Remembers that it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Wire:
    """asyncua's protocol on an open channel without security, read for by ours, or reading for itself."""

    def __init__(self, own: bool = True) -> None:
        self.protocol = UASocketProtocol()
        self.transport = Transport()
        self.protocol.connection_made(self.transport)
        connection = self.protocol._connection
        connection._open = True
        connection.security_token.ChannelId, connection.security_token.TokenId = CHANNEL, TOKEN
        self.receiver = Receiver(self.protocol) if own else None
        self.got: list[Any] = []

    def wait_for(self, request_id: int, future: bool = False) -> None:
        waiting: Any
        if future:
            waiting = asyncio.get_running_loop().create_future()
            waiting.add_done_callback(
                lambda done: self.got.append(
                    (request_id, type(done.exception()) if done.exception() else bytes(done.result()))))
        else:
            waiting = Answer(lambda body, error: self.got.append(
                (request_id, type(error) if error else bytes(body or b""))))
        self.protocol._callbackmap[request_id] = waiting

    def feed(self, data: bytes) -> None:
        if self.transport.closed:
            return
        if self.receiver is None:
            self.protocol.data_received(data)
            return
        room = self.receiver.get_buffer(len(data))
        room[: len(data)] = data
        self.receiver.buffer_updated(len(data))


def message(
    number: int, request_id: int, body: bytes, *, kind: bytes = b"MSGF", channel: int = CHANNEL, token: int = TOKEN
) -> bytes:
    return struct.pack("<4sIIIII", kind, 24 + len(body), channel, token, number, request_id) + body


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[tuple[int, bytes]], bytes, list[int]]:
    """Messages, some in several chunks, as one run of bytes, and where it is cut."""
    number, raw, expected = draw(st.integers(1, 10)), b"", []
    for request_id in range(1, draw(st.integers(1, 6)) + 1):
        parts = draw(st.lists(st.binary(max_size=90), min_size=1, max_size=3))
        for i, part in enumerate(parts):
            raw += message(number, request_id, part, kind=b"MSGF" if i == len(parts) - 1 else b"MSGC")
            number += 1
        expected.append((request_id, b"".join(parts)))
    cuts = draw(st.lists(st.integers(0, len(raw)), max_size=8).map(sorted))
    return expected, raw, cuts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(streams(), st.booleans())
def test_messages_arrive_whole_and_in_order_however_they_are_cut(
    made: tuple[list[tuple[int, bytes]], bytes, list[int]], future: bool
) -> None:
    expected, raw, cuts = made

    async def run() -> list[Any]:
        line = Wire()
        for request_id, _ in expected:
            line.wait_for(request_id, future)
        for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            if end > begin:
                line.feed(raw[begin:end])
        await asyncio.sleep(0)
        assert not line.transport.closed and not line.protocol._callbackmap
        return line.got

    assert asyncio.run(run()) == expected


ODD = {
    "another channel": message(2, 2, b"x", channel=8),
    "another token": message(2, 2, b"x", token=9),
    "a number twice": message(1, 2, b"x"),
    "a number left out": message(3, 2, b"x"),
    "nobody asked": message(2, 77, b"x"),
    "an error": struct.pack("<4sI", b"ERRF", 16) + struct.pack("<Ii", ua.StatusCodes.BadTcpInternalError, -1),
    "another type": message(2, 2, b"x", kind=b"XYZF"),
    "another kind of chunk": message(2, 2, b"x", kind=b"MSGX"),
    "no room for a header": struct.pack("<4sI", b"MSGF", 12) + b"\0" * 4,
    "less than its head": struct.pack("<4sI", b"MSGF", 3) + b"\0" * 30,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
async def test_what_is_wrong_ends_the_connection_as_it_does_with_asyncua(odd: bytes) -> None:
    for own in (True, False):
        line = Wire(own)
        line.wait_for(1)
        line.wait_for(2)
        line.feed(message(1, 1, b"good") + odd + message(4, 2, b"after"))
        await asyncio.sleep(0)
        assert line.transport.closed, own
        assert line.got[0] == (1, b"good") and (2, b"after") not in line.got, own


async def test_a_chunk_that_cannot_be_is_refused_by_its_header_and_makes_no_room() -> None:
    line = Wire()
    assert line.receiver is not None
    line.wait_for(5)
    line.feed(struct.pack("<4sI", b"MSGF", 400_000_000) + b"\0" * 100)
    await asyncio.sleep(0)
    assert line.transport.closed and line.got == [(5, ua.uaerrors.BadTcpMessageTooLarge)]
    assert len(line.receiver._room) == ROOM


async def test_a_server_whose_chunks_are_larger_than_our_room_is_read_too() -> None:
    line = Wire()
    line.protocol._connection._limits.max_recv_buffer = 4 * ROOM
    body = bytes(range(256)) * (3 * ROOM // 256)
    line.wait_for(1)
    line.wait_for(2)
    raw = message(1, 1, body) + message(2, 2, b"next")
    for at in range(0, len(raw), 60_000):
        line.feed(raw[at : at + 60_000])
    assert line.got == [(1, body), (2, b"next")]


async def test_the_sequence_number_wraps_around_as_part_6_has_it() -> None:
    line = Wire()
    for request_id in (1, 2, 3):
        line.wait_for(request_id)
    line.feed(message(2**32 - 1, 1, b"a") + message(1, 2, b"b") + message(2, 3, b"c"))
    assert [one[1] for one in line.got] == [b"a", b"b", b"c"] and not line.transport.closed


async def test_an_error_of_who_gets_an_answer_does_not_end_the_reading() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    line = Wire()

    def fails(body: Any, error: Any) -> None:
        raise RuntimeError("of the receiver")

    line.protocol._callbackmap[1] = Answer(fails)  # type: ignore[assignment]
    line.wait_for(2)
    line.feed(message(1, 1, b"a") + message(2, 2, b"b"))
    assert line.got == [(2, b"b")] and not line.transport.closed
    assert str(told[0]["exception"]) == "of the receiver"


async def test_an_answer_comes_once() -> None:
    got: list[Any] = []
    answer = Answer(lambda body, error: got.append((body, error)))
    assert not answer.done()
    answer.set_result(b"x")
    answer.set_exception(ConnectionError("too late"))
    answer.set_result(b"again")
    await asyncio.sleep(0)
    assert answer.done() and got == [(b"x", None)]


async def test_a_real_connection_is_read_by_ours_and_its_end_is_told(odd: OddServer) -> None:
    session = Session(server_config(odd.endpoint))
    await session.open()
    protocol = session.client.uaclient.protocol
    assert protocol is not None and protocol.transport is not None
    assert isinstance(protocol.transport.get_protocol(), Receiver)
    nodes = [ReadFrom(odd.nodes["Double"].nodeid)] * 4000  # an answer of several chunks
    body = await session.call(
        wire.send_prepared(session.client, PreparedRead(wire.token_of(session.client), nodes), 5.0), "read")
    assert len(body) > ROOM // 4 and len(wire.decode_read(body, 4000).value) == 4000
    errors: list[Any] = []
    ended = asyncio.Event()

    def call(body: Any, error: Any) -> None:
        errors.append(error)
        ended.set()

    client = session.client
    protocol.transport.abort()
    wire.post(client, PreparedRead(wire.token_of(client), nodes[:1]), 5.0, call)
    await asyncio.wait_for(ended.wait(), WAIT_S)
    assert isinstance(errors[0], ConnectionError) and protocol.state is UASocketState.CLOSED
    with pytest.raises(ConnectionError):
        wire.post(client, PreparedRead(b"\0\0", nodes[:1]), 5.0, call)
    await session.close()


def test_an_answer_of_asyncuas_own_requests_is_its_buffer() -> None:
    async def run() -> Any:
        line = Wire()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        line.protocol._callbackmap[1] = future
        body = struct_to_binary(ua.WriteResponse())
        line.feed(message(1, 1, body))
        return await future, body

    answer, body = asyncio.run(run())
    assert isinstance(answer, Buffer) and bytes(answer) == body
