"""The proxy does to a stream of bytes what its faults say, and counts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from .proxy import HEADER, TO_CLIENT, TO_SERVER, ChaosProxy, _Counter

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
WAIT_S = 20.0


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[ChaosProxy]:
    """A proxy before a server that sends back what it gets."""
    writers = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with ChaosProxy(server.sockets[0].getsockname()[1]) as one:
        yield one
    server.close()


async def connect(proxy: ChaosProxy) -> Streams:
    """A client of the proxy that has been heard by the server."""
    streams = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await said(streams, b"hello") == b"hello"
    return streams


async def said(streams: Streams, data: bytes) -> bytes:
    """Send bytes and return as many."""
    streams[1].write(data)
    return await asyncio.wait_for(streams[0].readexactly(len(data)), WAIT_S)


async def silent(streams: Streams) -> bool:
    """Whether nothing comes for a moment."""
    try:
        await asyncio.wait_for(streams[0].readexactly(1), 0.2)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_unchanged_and_are_counted(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    data = bytes(range(256)) * 4096
    assert await said(streams, data) == data
    assert proxy.ways[TO_SERVER].bytes == proxy.ways[TO_CLIENT].bytes == len(data) + 5
    assert proxy.accepted == proxy.open_connections == 1


@pytest.mark.parametrize("cut", [1, 3, 8, 9, 100])
def test_chunks_are_counted_wherever_the_stream_is_cut(cut: int) -> None:
    stream = b"".join(HEADER.pack(b"MSGF", 8 + n) + bytes(n) for n in (0, 5, 40, 300))
    counter = _Counter()
    assert sum(counter.feed(stream[at : at + cut]) for at in range(0, len(stream), cut)) == 4


async def test_latency_delays_and_a_rate_limits(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    proxy.slow(latency_s=0.1)
    start = time.monotonic()
    await said(streams, b"x")
    assert time.monotonic() - start >= 0.2  # both ways
    proxy.slow(rate=10_000.0, ways=(TO_SERVER,))
    start = time.monotonic()
    assert len(await said(streams, bytes(5000))) == 5000
    assert time.monotonic() - start >= 0.4


async def test_a_stall_holds_bytes_back_and_loses_none(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    proxy.stall(TO_CLIENT)
    streams[1].write(b"one two three")
    assert await silent(streams)
    proxy.heal()
    assert await asyncio.wait_for(streams[0].readexactly(13), WAIT_S) == b"one two three"
    assert proxy.accepted == 1


async def test_a_blackhole_swallows_and_answers_no_new_connection(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    proxy.blackhole()
    streams[1].write(b"lost")
    assert await silent(streams)
    other = await asyncio.open_connection("127.0.0.1", proxy.port)  # the kernel takes it
    other[1].write(b"hello")
    assert await silent(other)
    assert proxy.ways[TO_SERVER].lost_bytes == 9
    proxy.heal()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(streams[0].readexactly(1), WAIT_S)
    other[1].close()
    await connect(proxy)


@pytest.mark.parametrize("way", [TO_SERVER, TO_CLIENT])
async def test_half_open_one_way_is_heard_and_the_other_is_not(proxy: ChaosProxy, way: str) -> None:
    streams = await connect(proxy)
    proxy.blackhole(way)
    before = proxy.ways[TO_SERVER].bytes
    streams[1].write(b"half")
    assert await silent(streams)
    assert proxy.ways[way].lost_bytes == 4
    assert (proxy.ways[TO_SERVER].bytes > before) == (way == TO_CLIENT)


async def test_a_reset_is_an_error_at_once_and_a_cut_is_an_end(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(streams[0].readexactly(1), WAIT_S)
    streams = await connect(proxy)
    proxy.cut()
    assert await asyncio.wait_for(streams[0].read(1), WAIT_S) == b""


async def test_a_reset_in_the_middle_of_a_message_lets_its_beginning_through(proxy: ChaosProxy) -> None:
    streams = await connect(proxy)
    proxy.reset_in_message(7, TO_CLIENT)
    before = proxy.ways[TO_CLIENT].bytes
    streams[1].write(b"0123456789")
    got = b""
    with pytest.raises(ConnectionResetError):
        while True:
            piece = await asyncio.wait_for(streams[0].read(100), WAIT_S)
            assert piece, "an end, where a reset was due"
            got += piece
    assert b"0123456".startswith(got) and proxy.ways[TO_CLIENT].bytes - before == 7


async def test_refused_is_refused_until_it_is_healed(proxy: ChaosProxy) -> None:
    proxy.refuse()
    streams = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionError):
        streams[1].write(b"hello")
        assert await asyncio.wait_for(streams[0].read(1), WAIT_S)
    assert proxy.refused == 1 and proxy.accepted == 0
    proxy.heal()
    await connect(proxy)
