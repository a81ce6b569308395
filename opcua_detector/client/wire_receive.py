"""Takes messages out of the socket: one copy per message, no object per header, and the answer calls its receiver.

Why our own: asyncua's reader lets asyncio make 256 KiB of room per read, joins the pieces of a message again and
again, decodes three headers by its general decoder, and wakes a future one turn of the loop later. Here the socket is
read into one buffer that stays, and the plain case (one chunk, no security, the number that comes next) is taken out of
it directly. Everything else, and everything odd, is handed to asyncua's reader, whose checks and errors hold.

Source: OPC UA Part 6, 6.7.2 (MessageChunk), 7.1.2 (message header).
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any

from asyncua import Client, ua
from asyncua.common.utils import Buffer
from asyncua.crypto.security_policies import CryptographyNone

log = logging.getLogger(__name__)

ROOM = 2**18  # bytes read at once, and the least that is kept
MOST_OFFERED = 65_535  # the ReceiveBufferSize of asyncua's Hello: a server may send chunks as long as this
_HEAD = struct.Struct("<4sI")  # type of the message and of the chunk, size
_SEQUENCE = struct.Struct("<IIII")  # channel, token, sequence number, request id
_BODY_AT = _HEAD.size + _SEQUENCE.size

OnAnswer = Callable[[bytes | Buffer | None, BaseException | None], None]


class Answer:
    """What waits for one answer, in place of the future that asyncua keeps: it is called at once, in the same turn.

    call : called once with (body, None), or with (None, error) a turn later, so that who hears of a closed connection
        from several sides hears it from the connection first
    """

    __slots__ = ("_call",)

    def __init__(self, call: OnAnswer) -> None:
        self._call: OnAnswer | None = call

    def done(self) -> bool:
        """Whether it was answered, or given up."""
        return self._call is None

    def set_result(self, body: bytes | Buffer) -> None:
        """Hand over the body of the answer; what the receiver raises goes to the loop and not into the reader."""
        call, self._call = self._call, None
        if call is None:
            return
        try:
            call(body, None)
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "an answer could not be worked on", "exception": error})

    def set_exception(self, error: BaseException) -> None:
        """Hand over why there is no answer."""
        call, self._call = self._call, None
        if call is not None:
            asyncio.get_running_loop().call_soon(call, None, error)


class Receiver(asyncio.BufferedProtocol):
    """Reads for asyncua's protocol, which keeps the connection, the requests under way and the security.

    protocol : asyncua's UASocketProtocol of an open channel
    """

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._connection = protocol._connection
        self._room = bytearray(ROOM)
        self._view = memoryview(self._room)
        self._filled = 0

    def feed(self, data: bytes) -> None:
        """Take bytes that were read by somebody else."""
        for start in range(0, len(data), ROOM // 2):
            piece = data[start : start + ROOM // 2]
            self.get_buffer(len(piece))[: len(piece)] = piece
            self.buffer_updated(len(piece))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go; never empty."""
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take out all messages that are whole."""
        filled, at, size = self._filled + nbytes, 0, 0
        room, transport = self._room, self._protocol.transport
        while filled - at >= _HEAD.size:
            kind, size = _HEAD.unpack_from(room, at)
            if not _HEAD.size <= size <= max(MOST_OFFERED, self._connection._limits.max_recv_buffer):
                self._refuse(size)
                return
            if filled - at < size:
                break
            if kind != b"MSGF" or not self._plain(at, size):
                self._protocol.data_received(bytes(self._view[at : at + size]))
                if transport is None or transport.is_closing():  # it was no OPC UA: nothing after it is believed
                    self._filled = 0
                    return
            at, size = at + size, 0
        left = filled - at
        if size > len(room):
            self._room = bytearray(size + ROOM)
            self._view = memoryview(self._room)
        if at or self._room is not room:
            self._room[:left] = room[at:filled]
        self._filled = left

    def _plain(self, at: int, size: int) -> bool:
        """Hand a message of one chunk without security to who waits for it; False where it is anything else."""
        connection = self._connection
        if (size < _BODY_AT or connection._incoming_parts
                or type(connection.security_policy.symmetric_cryptography) is not CryptographyNone):
            return False
        channel, token, number, request_id = _SEQUENCE.unpack_from(self._room, at + _HEAD.size)
        known, last = connection.security_token, connection._peer_sequence_number
        if channel != known.ChannelId or token != known.TokenId or (last is not None and number != last + 1):
            return False
        waiting = self._protocol._callbackmap.pop(request_id, None)
        if waiting is None:
            return False
        connection._peer_sequence_number = number
        body = bytes(self._view[at + _BODY_AT : at + size])
        if type(waiting) is Answer:
            waiting.set_result(body)
        elif not waiting.done():
            waiting.set_result(Buffer(body))
        return True

    def _refuse(self, size: int) -> None:
        """End a connection whose peer announces a chunk that cannot be: it is not waited for, and not made room for."""
        self._filled = 0
        refuse = getattr(self._protocol, "refuse", None)  # of `inflow`: reported and counted
        if refuse is not None:
            refuse(f"a chunk of {size} bytes")
            return
        log.warning("a chunk of %d bytes was announced; the connection is closed", size)
        self._protocol._fail_all_pending(ua.UaStatusCodeError(ua.StatusCodes.BadTcpMessageTooLarge))
        self._protocol.disconnect_socket()

    def eof_received(self) -> None:
        """Let the transport close."""

    def connection_lost(self, error: Exception | None) -> None:
        """Tell asyncua's protocol."""
        self._protocol.connection_lost(error)


def take_over(client: Client) -> None:
    """Read for a client whose channel is open, from now on."""
    protocol = client.uaclient.protocol
    if protocol is None or protocol.transport is None:
        raise ConnectionError("the connection is closed")
    receiver = Receiver(protocol)
    left, protocol.receive_buffer = protocol.receive_buffer, None
    protocol.transport.set_protocol(receiver)
    if left:
        receiver.feed(left)
