"""A server that sends without end: refused by the sizes in its headers, counted, told, and left alone for longer."""

from __future__ import annotations

import asyncio
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_from_binary

from opcua_detector.api import Tag
from opcua_detector.client import GroupFeed, LinkState, Session, inflow, read_history, session
from opcua_detector.errors import ConnectionProblem
from sim_server.testing import RunningPlant

from .conftest import PLANT, WAIT_S, Rows, group_config, server_config, until

HEAD = struct.Struct("<4sI")
CHANNEL = struct.Struct("<4sIIIII")  # type, size, channel, token, sequence number, request
ZEROS = bytes(8000)
PERIOD = 10_000_000
MOST_BYTES = 64_000_000  # the default


async def message(reader: asyncio.StreamReader) -> bytes:
    """Read one chunk."""
    head = await reader.readexactly(8)
    return head + await reader.readexactly(HEAD.unpack(head)[1] - 8)


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object],
) -> AsyncIterator[str]:
    """Run a TCP server and return its endpoint."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"opc.tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


class Hostile:
    """A TCP server that says how large a message is, or does not, and sends until it is cut off.

    head : what follows the Acknowledge, before endless zeros; again : sent over and over instead of zeros
    """

    def __init__(self, head: bytes, again: bytes = ZEROS) -> None:
        self.head, self.again = head, again
        self.hello: ua.Hello | None = None
        self.sent = 0
        self.cut_off = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.hello = struct_from_binary(ua.Hello, Buffer((await message(reader))[8:]))
            # Claims everything for itself: what a client takes is for the client to say.
            writer.write(struct.pack("<4sIIIIII", b"ACKF", 28, 0, 2**31 - 1, 2**31 - 1, 0, 0))
            await message(reader)
            writer.write(self.head)
            while True:
                writer.write(self.again)
                await writer.drain()
                self.sent += len(self.again)
        except (OSError, asyncio.IncompleteReadError):
            self.cut_off.set()
        finally:
            writer.transport.abort()


def opening(size: int, kind: bytes = b"F") -> bytes:
    return HEAD.pack(b"OPN" + kind, size)


@pytest.mark.parametrize(
    ("head", "again", "what"),
    [
        (opening(2**31), ZEROS, "a chunk of 2147483648 bytes"),
        (opening(inflow.CHUNK_BYTES + 1), ZEROS, f"a chunk of {inflow.CHUNK_BYTES + 1} bytes"),
        (opening(7), ZEROS, "a chunk of 7 bytes"),
        (b"", HEAD.pack(b"ACKC", 8), "chunks"),
    ],
    ids=["2 GB announced", "one byte more", "shorter than its head", "chunks without content"],
)
async def test_a_log_in_to_a_server_that_sends_without_end_fails_and_holds_nothing(
    head: bytes, again: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of a kind that asyncua takes alone never add up to a message; counted they are all the same.
    monkeypatch.setattr(inflow._BoundedProtocol, "_process_received_data", keep_acknowledge_only)
    hostile = Hostile(head, again)
    async with listening(hostile.serve) as endpoint:
        one = Session(server_config(endpoint, timeout="10 s"))
        tracemalloc.start()
        try:
            with pytest.raises(ConnectionProblem, match=what) as refused:
                await one.open()
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        await asyncio.wait_for(hostile.cut_off.wait(), WAIT_S)
        assert one.counters["oversized"] == 1 and "server plant at" in str(refused.value)
        assert held < 4_000_000
        hello = hostile.hello
        assert hello is not None and hello.MaxMessageSize == MOST_BYTES
        assert hello.MaxChunkCount == inflow.chunks_of(MOST_BYTES) > 1000
        assert hello.ReceiveBufferSize == inflow.CHUNK_BYTES
        await one.close()


_process = inflow._BoundedProtocol._process_received_data


def keep_acknowledge_only(protocol: inflow._BoundedProtocol, data: bytes) -> None:
    """Let asyncua see the first Acknowledge alone; what a stranger sends after it would end the connection sooner."""
    if data[:4] == b"ACKF":
        _process(protocol, data[:28])


class Relay:
    """Stands between client and plant and, where it is told to, goes on with a message of its own that never ends."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.hostile = False
        self.accepted: list[float] = []
        self.sent = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(time.monotonic())
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        forward = asyncio.create_task(self._forward(reader, back), name="relay")
        try:
            while True:
                chunk = await message(there)
                writer.write(chunk)
                await writer.drain()
                if self.hostile and chunk[:4] == b"MSGF":
                    await self._without_end(chunk, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            forward.cancel()
            writer.transport.abort()
            back.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                back.write(data)
                await back.drain()
        finally:
            back.transport.abort()

    async def _without_end(self, last: bytes, writer: asyncio.StreamWriter) -> None:
        """Chunks that are right in every field: channel, token, the next number, one request."""
        _, _, channel, token, number, request = CHANNEL.unpack_from(last)
        while True:
            number += 1
            writer.write(CHANNEL.pack(b"MSGC", CHANNEL.size + len(ZEROS), channel, token, number, request + 1) + ZEROS)
            await writer.drain()
            self.sent += len(ZEROS)


async def test_a_message_without_end_ends_the_connection_again_and_again_and_then_rows_go_on(
    plant: RunningPlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FIRST_DELAY_S", 0.1)
    relay = Relay(plant.port)
    async with listening(relay.serve) as endpoint:
        one = Session(server_config(endpoint, max_message_size="2 MB"))
        await one.open()
        rows = Rows()
        feed = GroupFeed(group_config("x1", "x3"), {"plant": one}, rows.take)
        await feed.start()
        await rows.more(20)
        relay.hostile = True
        await until(lambda: one.counters["oversized"] >= 5)
        assert one.counters["lost"] >= 1
        # 0.1 s, doubled at each of the attempts, less the half that is left to chance.
        assert relay.accepted[4] - relay.accepted[3] > 0.39
        assert relay.sent < 6 * (2_000_000 + 16_000_000)  # the limit, and what sockets hold
        relay.hostile = False
        await until(lambda: one.state is LinkState.CONNECTED)
        before = len(rows.rows)
        await rows.until(lambda r: len(r.rows) > before + 30 and bool(r.rows[-1][3].all()))
        await feed.stop()
        await one.close()


async def test_answers_of_the_size_that_is_allowed_pass(plant: RunningPlant) -> None:
    """Many chunks, however TCP cuts them."""

    class Cut(Relay):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted.append(time.monotonic())
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            forward = asyncio.create_task(self._forward(reader, back), name="relay")
            size = 1
            try:
                while data := await there.read(size):
                    writer.write(data)
                    await writer.drain()
                    self.sent += len(data)
                    size = size * 7 % 9973 + 1
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                forward.cancel()
                writer.transport.abort()
                back.transport.abort()

    relay = Cut(plant.port)
    async with listening(relay.serve) as endpoint:
        one = Session(server_config(endpoint, max_message_size="2 MB"))
        await one.open()
        record = await read_history(
            one, [Tag("x1", f"{PLANT}lorenz.x1")], plant.start_ns - 2500 * PERIOD, plant.start_ns - PERIOD, PERIOD
        )
        assert len(record) > 2400 and record.valid.all() and relay.sent > inflow.CHUNK_BYTES
        assert one.counters["oversized"] == 0 and one.state is LinkState.CONNECTED
        await one.close()
