"""Bounds what a server can make us hold: no chunk and no message larger than we have said that we take.

Why our own: asyncua tells a server that there is no limit, takes over as its own limits what the server acknowledges,
and collects a chunk of whatever size its header announces before it looks at it. So a broken or hostile server fills
the memory. Here the sizes in the headers are added up as they come; beyond the limit the connection is dropped at once.
Source: OPC UA Part 6, 6.7.2 (chunks), 7.1.2.3 and 7.1.2.4 (Hello and Acknowledge).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

from asyncua import Client, ua
from asyncua.client.ua_client import UASocketProtocol
from asyncua.common.connection import TransportLimits
from asyncua.ua.ua_binary import uatcp_to_binary

from ..errors import ConnectionProblem
from . import wire_buffer
from .waiting import within

wire_buffer.mend()

LEAST_BYTES = 1_000_000  # of one message where little is asked for, such as the endpoints
CHUNK_BYTES = 65_535  # ReceiveBufferSize of our Hello: no chunk is larger
LEAST_CHUNK_BYTES = 8192  # that any end must be able to receive and to send
_HEADER = struct.Struct("<3scI")  # message type, kind of chunk, size with this header
_MORE = b"C"  # more chunks of this message follow


class _Limits(TransportLimits):
    """Limits of which the Acknowledge of a server changes how much we send, never how much we take."""

    def update_client_limits(self, msg: Any) -> None:
        """Take over the largest chunk that the server receives."""
        self.max_send_buffer = max(LEAST_CHUNK_BYTES, min(self.max_send_buffer, int(msg.ReceiveBufferSize)))


class _BoundedProtocol(UASocketProtocol):
    """asyncua's end of a connection, behind a count of what comes in.

    Parameters
    ----------
    most_bytes : of one message
    on_refused : called once with the error when the server sends more
    where : server and endpoint, for the error

    Attributes
    ----------
    refusal : why the connection was dropped; None as long as it was not
    """

    def __init__(
        self, timeout_s: float, security_policy: Any, most_bytes: int,
        on_refused: Callable[[ConnectionProblem], None], where: str,
    ) -> None:
        # 0: the sizes are checked here, before anything is kept.
        super().__init__(timeout_s, security_policy, _Limits(CHUNK_BYTES, CHUNK_BYTES, 0, 0))
        self._most_bytes, self._most_chunks = most_bytes, chunks_of(most_bytes)
        self._on_refused, self._where = on_refused, where
        self._partial = bytearray()  # the beginning of a chunk, less than CHUNK_BYTES
        self._message_bytes = self._message_chunks = 0  # of the message that is under way
        self.refusal: ConnectionProblem | None = None

    async def send_hello(self, url: str, max_messagesize: int = 0, max_chunkcount: int = 0) -> ua.Acknowledge:
        """Say what we take, and wait for the Acknowledge; asyncua would ask for chunks of 2 GB."""
        if self.transport is None:
            raise ConnectionError("the connection is closed")
        hello: Any = ua.Hello()
        hello.ReceiveBufferSize = hello.SendBufferSize = CHUNK_BYTES
        hello.MaxMessageSize, hello.MaxChunkCount = self._most_bytes, self._most_chunks
        hello.EndpointUrl = url
        kind: Any = ua.MessageType.Hello
        self._callbackmap[0] = answer = asyncio.get_running_loop().create_future()
        self.transport.write(uatcp_to_binary(kind, hello))
        acknowledge: ua.Acknowledge = await within(answer, self.timeout)
        return acknowledge

    def data_received(self, data: bytes) -> None:
        """Hand on whole chunks and keep the beginning of the next one."""
        if self.refusal is not None:
            return
        if self._partial:
            self._partial += data
            data = bytes(self._partial)
        at, n = 0, len(data)
        problem = ""
        while n - at >= _HEADER.size:
            _, kind, size = _HEADER.unpack_from(data, at)
            problem = self._too_large(size)
            if problem or size > n - at:
                break
            self._end_of_chunk(kind, size)
            at += size
        self._partial = bytearray(data[at:])
        if at:
            self._process_received_data(data[:at])
        if problem:
            self.refuse(problem)

    def _too_large(self, size: int) -> str:
        """Return what is wrong with a chunk of this size; empty where all is well."""
        if not _HEADER.size <= size <= CHUNK_BYTES:
            return f"a chunk of {size} bytes, at most {CHUNK_BYTES} are agreed upon"
        if self._message_bytes + size > self._most_bytes:
            return f"a message of more than {self._most_bytes} bytes"
        # Chunks without content cost memory as well.
        if self._message_chunks + 1 > self._most_chunks:
            return f"a message of more than {self._most_chunks} chunks"
        return ""

    def _end_of_chunk(self, kind: bytes, size: int) -> None:
        if kind == _MORE:
            self._message_bytes += size
            self._message_chunks += 1
        else:
            self._message_bytes = self._message_chunks = 0

    def refuse(self, what: str) -> None:
        """Drop the connection; whoever waits for an answer on it learns why."""
        self.refusal = problem = ConnectionProblem(
            f"the server sends {what}; the connection was dropped", where=self._where,
            next_step="look after the server; if its answers are that large, read fewer nodes at once or raise its "
            "'max_message_size'",
        )
        self._partial.clear()
        self._fail_all_pending(problem)
        if self.transport is not None:
            self.transport.abort()
        self._on_refused(problem)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reason where it is ours."""
        super().connection_lost(exc or self.refusal)


def refusal_of(client: Client) -> ConnectionProblem | None:
    """Return why a client of ours has dropped its connection; None where it has not."""
    protocol = client.uaclient.protocol
    return protocol.refusal if isinstance(protocol, _BoundedProtocol) else None


def chunks_of(most_bytes: int) -> int:
    """Return how many chunks a message of this size has at most, by the smallest chunks that an end may send."""
    return most_bytes // LEAST_CHUNK_BYTES + 1


def bounded_client(
    endpoint: str, timeout_s: float, on_refused: Callable[[ConnectionProblem], None], where: str, most_bytes: int
) -> Client:
    """Return an asyncua client that takes no larger message, says so in its Hello, and drops who sends one.

    most_bytes : of one message, headers included
    on_refused : called once for each connection that is dropped for it, with the error that all requests under way get
    where : server and endpoint, for the error
    """
    client = Client(endpoint, timeout=timeout_s)
    inner = client.uaclient

    def make() -> UASocketProtocol:
        protocol = _BoundedProtocol(timeout_s, inner.security_policy, most_bytes, on_refused, where)
        protocol.pre_request_hook = inner.pre_request_hook
        protocol.on_connection_lost = inner._on_transport_lost
        protocol.is_session_closing = inner._is_session_closing
        inner.protocol = protocol
        return protocol

    inner._make_protocol = make  # type: ignore[method-assign]
    return client
