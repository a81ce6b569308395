"""A TCP proxy with the bad habits of a plant network, switched while it runs.

It sits between a client and a server, both on loopback, forwards bytes and counts what passes. Each fault is what
a network does to TCP, seen from the client: late, slow, silent, half-open, reset in the middle of a message. The
messages are OPC UA's (OPC UA Part 6, 7.1.2: three letters of type, one of chunk, uint32 size), so that a busy loop
shows as messages per second.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Self

CHUNK = 16 * 1024
HEADER = struct.Struct("<4sI")
TO_SERVER, TO_CLIENT = "to_server", "to_client"
BOTH = (TO_SERVER, TO_CLIENT)


@dataclass
class Direction:
    """One direction of all connections: what is done to it, and what has passed.

    latency_s : each piece arrives this much later, order kept
    rate : bytes per second at most, over all connections; 0: no limit
    stalled : bytes are read and held back, as by a path that has stopped; they pass when it ends
    swallowed : bytes are read and thrown away, as by a path that is gone while both ends believe in it
    reset_after : after so many more bytes the connection that carries them is reset; None: never
    bytes, messages : passed on to the other side
    lost_bytes : thrown away
    """

    latency_s: float = 0.0
    rate: float = 0.0
    stalled: bool = False
    swallowed: bool = False
    reset_after: int | None = None
    bytes: int = 0
    messages: int = 0
    lost_bytes: int = 0
    free_at: float = 0.0  # when the throttled line has sent what it was given
    moving: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.moving.set()

    def clear(self) -> None:
        """Forward again as if nothing had been."""
        self.latency_s = self.rate = 0.0
        self.swallowed, self.reset_after = False, None
        self.stall(False)

    def stall(self, on: bool) -> None:
        """Hold bytes back, or let them pass."""
        self.stalled = on
        if on:
            self.moving.clear()
        else:
            self.moving.set()


class _Counter:
    """Counts the OPC UA chunks of one stream by their headers; pieces may be cut anywhere."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    def feed(self, data: bytes) -> int:
        """Return how many chunks begin in this piece."""
        begun, at = 0, 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
                continue
            take = HEADER.size - len(self._head)
            self._head += data[at : at + take]
            at += take
            if len(self._head) == HEADER.size:
                begun += 1
                self._left = max(0, HEADER.unpack(self._head)[1] - HEADER.size)
                self._head = b""
        return begun


class _Connection:
    """One client with its own connection to the server."""

    def __init__(self, proxy: ChaosProxy, client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
                 server: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._proxy = proxy
        self._ends = {TO_SERVER: (client[0], server[1]), TO_CLIENT: (server[0], client[1])}
        self._writers = (client[1], server[1])

    async def run(self) -> None:
        """Forward until either side ends; the other one is then ended the same way."""
        tasks = [asyncio.create_task(self._forward(name), name=f"proxy {name}") for name in BOTH]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in self._writers:
                writer.close()
            for writer in self._writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _forward(self, name: str) -> None:
        reader, writer = self._ends[name]
        way, counter = self._proxy.ways[name], _Counter()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.create_task(self._send(late, writer, way, counter), name=f"proxy {name} sender")
        reading = asyncio.create_task(self._read(reader, late, way), name=f"proxy {name} reader")
        try:
            await asyncio.wait((sender, reading), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not sender.done():  # what came before the end still arrives
                emptied = asyncio.create_task(late.join())
                await asyncio.wait((emptied, sender), return_when=asyncio.FIRST_COMPLETED)
                emptied.cancel()
        finally:
            for task in (sender, reading):
                task.cancel()
            await asyncio.gather(sender, reading, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader, late: asyncio.Queue[tuple[float, bytes]],
                    way: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if way.swallowed:
                    way.lost_bytes += len(data)
                    continue
                if way.rate or way.latency_s:
                    while late.qsize() > 64:  # a slow line pushes back, as TCP does
                        await asyncio.sleep(0.01)
                late.put_nowait((time.monotonic() + way.latency_s, data))

    async def _send(self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Direction,
                    counter: _Counter) -> None:
        while True:
            due, data = await late.get()
            try:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await way.moving.wait()
                if way.swallowed:
                    way.lost_bytes += len(data)
                    continue
                for piece in self._pieces(data, way):
                    await self._pay(len(piece), way)
                    writer.write(piece)
                    way.bytes += len(piece)
                    way.messages += counter.feed(piece)
                    if way.reset_after is not None:
                        way.reset_after -= len(piece)
                        if way.reset_after <= 0:
                            way.reset_after = None
                            await asyncio.sleep(0)  # the piece itself goes out
                            self.reset()
                            return
                    await writer.drain()
            except OSError:
                return
            finally:
                late.task_done()

    @staticmethod
    def _pieces(data: bytes, way: Direction) -> list[bytes]:
        """Cut where the reset is due, and into what a slow line sends in a twentieth of a second."""
        size = max(64, int(way.rate / 20)) if way.rate else len(data)
        if way.reset_after is not None and 0 < way.reset_after < len(data):
            return [data[: way.reset_after]]
        return [data[at : at + size] for at in range(0, len(data), size)]

    @staticmethod
    async def _pay(n: int, way: Direction) -> None:
        if way.rate:
            now = time.monotonic()
            way.free_at = max(way.free_at, now) + n / way.rate
            await asyncio.sleep(way.free_at - now)

    def reset(self) -> None:
        """End both sides by RST: what was under way is lost, and a read fails at once."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        """End both sides by FIN, as a server that stops does."""
        for writer in self._writers:
            writer.close()


class ChaosProxy:
    """Forwards connections from a free loopback port to another loopback port.

    Parameters
    ----------
    port : where the real server listens; may be changed while running, for a server that comes back elsewhere

    Attributes
    ----------
    ways : TO_SERVER, TO_CLIENT -> Direction
    accepted : connections taken so far
    refused : connections turned away so far, by the proxy or since the server is not there

    Use as ``async with ChaosProxy(port) as proxy``; connect to ``proxy.endpoint``.
    """

    def __init__(self, port: int) -> None:
        self.port_of_server = port
        self.port = 0
        self.ways = {name: Direction() for name in BOTH}
        self.accepted = self.refused = 0
        self._refuse = self._mute = False
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        """URL to connect to."""
        return f"opc.tcp://127.0.0.1:{self.port}/"

    @property
    def open_connections(self) -> int:
        """Connections that are forwarded now."""
        return len(self._connections)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for way in self.ways.values():
            way.clear()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._refuse:
                self.refused += 1
                writer.transport.abort()
                return
            if self._mute:  # accepted and then nothing: the kernel of a frozen host still says SYN-ACK
                self.accepted += 1
                await self._swallow(reader)
                writer.close()
                return
            try:
                server = await asyncio.open_connection("127.0.0.1", self.port_of_server)
            except OSError:
                self.refused += 1
                writer.transport.abort()
                return
            self.accepted += 1
            connection = _Connection(self, (reader, writer), server)
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                self.ways[TO_SERVER].lost_bytes += len(data)

    # --- faults ----------------------------------------------------------------------------------------------------

    def slow(self, *, latency_s: float = 0.0, rate: float = 0.0, ways: tuple[str, ...] = BOTH) -> None:
        """Delay each way by `latency_s` and let at most `rate` bytes per second through (0: no limit)."""
        for name in ways:
            self.ways[name].latency_s, self.ways[name].rate = latency_s, rate

    def stall(self, *ways: str) -> None:
        """Hold back what comes, in the named ways or in both; nothing is lost, `heal` lets it pass."""
        for name in ways or BOTH:
            self.ways[name].stall(True)

    def blackhole(self, *ways: str) -> None:
        """Throw away what comes, in the named ways or in both, and answer no new connection.

        One way alone is a half-open connection: the server hears the client and is not heard, or the reverse.
        """
        for name in ways or BOTH:
            self.ways[name].swallowed = True
        self._mute = TO_CLIENT in (ways or BOTH)

    def reset_in_message(self, after: int, way: str = TO_CLIENT) -> None:
        """Reset the connection that carries the next `after` bytes of a way, at that byte."""
        self.ways[way].reset_after = after

    def reset(self) -> None:
        """Reset all connections at once (RST)."""
        for connection in tuple(self._connections):
            connection.reset()

    def cut(self) -> None:
        """Close all connections at once (FIN)."""
        for connection in tuple(self._connections):
            connection.close()

    def refuse(self, on: bool = True) -> None:
        """Turn new connections away (RST after the handshake)."""
        self._refuse = on

    def heal(self) -> None:
        """Forward again; connections that lost bytes are reset, since no stream survives a hole."""
        damaged = any(way.swallowed for way in self.ways.values())
        self._refuse = self._mute = False
        for way in self.ways.values():
            way.clear()
        if damaged:
            self.reset()

    def counts(self) -> dict[str, int]:
        """Return accepted, refused, open connections, and messages and bytes of each way."""
        found = {"accepted": self.accepted, "refused": self.refused, "open": self.open_connections}
        for name, way in self.ways.items():
            found |= {f"{name}_messages": way.messages, f"{name}_bytes": way.bytes}
        return found
