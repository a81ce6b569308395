"""The file that touches asyncua's internals, beside `wire_receive`: sends without a task, in bytes where there are any.

Why: asyncua's own path makes an asyncio task per tag value and a dataclass per field. Here prepared requests
(`wire_requests`) go out as bytes, messages are taken out of the socket by `wire_receive`, an answer is a future or a
call, and answers that carry values are read into columns (`wire_decode`). Nothing here keeps state.
"""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import numpy as np
from asyncua import Client, ua
from asyncua.client.ua_client import UASocketState
from asyncua.common.utils import Buffer
from asyncua.crypto.security_policies import CryptographyNone
from asyncua.ua import ua_binary
from asyncua.ua.ua_binary import struct_from_binary

from ..errors import ConnectionProblem
from ..kernels.wire import EPOCH_TICKS
from . import wire_buffer
from .cipher import seal
from .wire_columns import NO_STAMP, NOTE_NO_STAMP, NOTE_STATUS, NOTE_TEXT, NOTE_UNKNOWN, Columns, Samples
from .wire_decode import (
    NO_ELEMENTS,
    Message,
    Publish,
    check,
    decode_publish,
    decode_read,
    open_publish,
    open_republish,
    read_message,
    write_results,
)
from .wire_history import HistoryPage, decode_history
from .wire_receive import Answer, OnAnswer, take_over

wire_buffer.mend()

__all__ = [
    "NOTE_NO_STAMP",
    "NOTE_STATUS",
    "NOTE_TEXT",
    "NOTE_UNKNOWN",
    "NO_ELEMENTS",
    "NO_STAMP",
    "Answer",
    "Columns",
    "HistoryPage",
    "Message",
    "OnAnswer",
    "Prepared",
    "Publish",
    "Samples",
    "abandon",
    "check",
    "decode",
    "decode_history",
    "decode_publish",
    "decode_read",
    "is_open",
    "node_id",
    "number_of",
    "on_closed",
    "open_publish",
    "open_republish",
    "post",
    "read_message",
    "samples_of",
    "send",
    "send_prepared",
    "start_session",
    "status_name",
    "to_datetime",
    "to_ns",
    "to_number",
    "token_of",
    "write_results",
]

MOST_BYTES = 16 * 2**20  # of an answer that is left to asyncua, which makes a hundred bytes of one
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FRAME = struct.Struct("<4sIIIII")  # message type, size, channel, token, sequence number, request id (Part 6, 7.1.2)


def node_id(number: int) -> Any:
    """Return a NodeId of namespace 0."""
    make: Any = ua.NodeId
    return make(number, 0)


def status_name(code: int) -> str:
    """Return the name of a StatusCode, such as `BadNodeIdUnknown`."""
    make: Any = ua.StatusCode
    return str(make(code).name)


def on_closed(client: Client, call: Callable[[Exception | None], None]) -> None:
    """Call back when the socket of a connected client closes."""
    protocol = client.uaclient.protocol
    if protocol is not None:
        protocol.on_connection_lost = call


def send(client: Client, request: Any, timeout_s: float) -> asyncio.Future[Buffer]:
    """Send a request at once and return the future of its response body; ConnectionError when closed."""
    protocol = client.uaclient.protocol
    if protocol is None or protocol.state is not UASocketState.OPEN:
        raise ConnectionError("the connection is closed")
    future: asyncio.Future[Buffer] = protocol._send_request(request, timeout_s)
    return future


class Prepared(Protocol):
    """A request that is there as bytes but for what changes from one sending to the next."""

    def body(self, request_handle: int, ticks: int, timeout_ms: int) -> bytes | bytearray:
        """Return the encoded request; ticks: now, 100 ns since 1601."""
        ...


def token_of(client: Client) -> bytes:
    """Return the encoded AuthenticationToken of the session, with which prepared requests begin."""
    protocol = client.uaclient.protocol
    if protocol is None:
        raise ConnectionError("the connection is closed")
    return bytes(ua_binary.nodeid_to_binary(protocol.authentication_token))


def send_prepared(client: Client, request: Prepared, timeout_s: float) -> asyncio.Future[bytes | Buffer]:
    """Send a prepared request at once and return the future of its response body; ConnectionError when closed."""
    future: asyncio.Future[bytes | Buffer] = asyncio.get_running_loop().create_future()
    _send(client, request, timeout_s, future)
    return future


def post(client: Client, request: Prepared, timeout_s: float, call: OnAnswer) -> Answer:
    """Send a prepared request at once; `call` gets (body, None), or (None, error) when the connection ends before.

    It is called while the socket is read, without a turn of the loop in between, and must not wait.
    ConnectionError when closed.
    """
    answer = Answer(call)
    _send(client, request, timeout_s, answer)
    return answer


def _send(client: Client, request: Prepared, timeout_s: float, waiting: asyncio.Future[Any] | Answer) -> None:
    protocol = client.uaclient.protocol
    if protocol is None or protocol.state is not UASocketState.OPEN or protocol.transport is None:
        raise ConnectionError("the connection is closed")
    protocol._request_handle = handle = (protocol._request_handle + 1) & 0xFFFFFFFF
    body = request.body(handle, time.time_ns() // 100 + EPOCH_TICKS, int(timeout_s * 1000))
    protocol.revolve_security_token()
    connection = protocol._connection
    request_id = protocol._request_id % 0xFFFFFFFF + 1
    size = _FRAME.size + len(body)
    plain = type(connection.security_policy.symmetric_cryptography) is CryptographyNone
    if plain and size <= connection._limits.max_send_buffer:
        connection._sequence_number = number = connection._sequence_number % 0xFFFFFFFF + 1
        token = connection.security_token
        frame = _FRAME.pack(b"MSGF", size, token.ChannelId, token.TokenId, number, request_id) + body
    else:
        frame = seal(connection, body, request_id) or connection.message_to_binary(bytes(body), request_id=request_id)
    protocol._request_id = request_id
    protocol._callbackmap[request_id] = waiting  # type: ignore[assignment]
    protocol.transport.write(frame)


def is_open(client: Client) -> bool:
    """Whether the socket is open."""
    protocol = client.uaclient.protocol
    return protocol is not None and protocol.state is UASocketState.OPEN


async def start_session(client: Client) -> None:
    """Activate a session on an open channel and keep the channel renewed, without asyncua's supervisor."""
    take_over(client)
    await client.create_session()
    encrypted = client.security_policy.Mode == ua.MessageSecurityMode.SignAndEncrypt
    if client._username and not encrypted:
        policy = client.server_policy(ua.UserTokenType.UserName).SecurityPolicyUri or ""
        if not policy or policy.endswith("#None"):
            raise ua.uaerrors.BadSecurityModeInsufficient  # the password would travel in clear
    await client._activate_with_credentials()
    client._start_renew_loop()


def abandon(client: Client) -> None:
    """Drop the socket and the tasks of a client without waiting for the server; it calls nobody back."""
    if client._renew_channel_task is not None:
        client._renew_channel_task.cancel()
        client._renew_channel_task = None
    protocol = client.uaclient.protocol
    client.disconnect_socket()
    if protocol is not None:
        protocol.on_connection_lost = None
        if protocol.transport is not None:  # closing alone would wait until a frozen peer takes what was sent
            protocol.transport.abort()


def decode(body: bytes | Buffer, answer: type) -> Any:
    """Decode a response by asyncua, for answers that carry no values.

    Raises UaStatusCodeError for a ServiceFault or a Bad result, ConnectionProblem for bytes that are no OPC UA.
    """
    check(body, answer.__name__, getattr(ua.ObjectIds, f"{answer.__name__}_Encoding_DefaultBinary"))
    size = len(body)
    what = "it is too long"
    if size <= MOST_BYTES:
        try:
            response: Any = struct_from_binary(answer, Buffer(body) if isinstance(body, bytes) else body.copy())
        except Exception as error:  # asyncua raises whatever a wrong byte leads to
            what = repr(error)
        else:
            response.ResponseHeader.ServiceResult.check()
            return response
    raise ConnectionProblem(
        f"the {answer.__name__} of the server ({size} bytes) is no OPC UA: {what}",
        next_step="see the server's log; if it comes again, report it with 'opcua-detector support-bundle'",
    )


# --- time and numbers ---


def to_ns(stamp: datetime | None) -> int:
    """Return ns since 1970 of a decoded timestamp; NO_STAMP for null and for dates no clock shows."""
    if stamp is None:
        return NO_STAMP
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    delta = stamp - _EPOCH
    us = (delta.days * 86400 + delta.seconds) * 1_000_000 + delta.microseconds
    return us * 1000 if -8_000_000_000_000_000 < us < 9_000_000_000_000_000 else NO_STAMP


def to_datetime(stamp_ns: int) -> datetime:
    """Return a stamp as datetime, UTC, whole microseconds."""
    return _EPOCH + timedelta(microseconds=stamp_ns // 1000)


def to_number(value: Any) -> float:
    """Return a value as float64: numbers and Booleans as they are, text as a stable code, the rest NaN.

    A DateTime is seconds since 1970 UTC. The code of a text is its CRC-32: the same text gives the same number on
    every run, which is what a state tag needs.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        return float(zlib.crc32(value.encode("utf-8", "surrogateescape")))
    if isinstance(value, datetime):
        stamp_ns = to_ns(value)
        return float("nan") if stamp_ns == NO_STAMP else stamp_ns // 1000 / 1e6
    if isinstance(value, ua.Variant):
        return number_of(value)
    return float("nan")


def number_of(variant: ua.Variant, element: int = -1) -> float:
    """Return a Variant as float64, or the element of its flattened array; NaN for an array where none is asked for."""
    content = variant.Value
    if not variant.is_array and not isinstance(content, list | tuple):
        return to_number(content) if element < 0 else float("nan")
    while isinstance(content, list | tuple) and content and isinstance(content[0], list | tuple):
        content = [one for row in content for one in row]
    return to_number(content[element]) if content and 0 <= element < len(content) else float("nan")


def samples_of(values: list[tuple[int, ua.DataValue]], elements: Mapping[int, int] | None = None) -> Samples:
    """Turn asyncua's own DataValues into columns: what the compiled walk must agree with.

    elements : client handle -> place in the array that a tag stands for
    """
    n = len(values)
    out = Columns(n).view(n, b"")
    out.text_at, out.notes, out.highest = None, NOTE_UNKNOWN, -1
    for i, (handle, one) in enumerate(values):
        out.handle[i] = handle
        out.source_ns[i] = to_ns(one.SourceTimestamp)
        out.server_ns[i] = to_ns(one.ServerTimestamp)
        out.value[i] = np.nan if one.Value is None else number_of(one.Value, (elements or {}).get(handle, -1))
        out.status[i] = one.StatusCode.value if one.StatusCode is not None else 0
    return out


# --- hostile bytes ---


def _refuse_endless_arrays() -> None:
    """Let asyncua's codec refuse an array of Null.

    Its elements have no bytes, so a length of 2^31 would pass asyncua's checks and fill the memory. Everything else
    there is bounded by the bytes of the message.
    """
    original = ua_binary.unpack_uatype_array

    def unpack_uatype_array(vtype: Any, data: Any) -> Any:
        if vtype == ua.VariantType.Null:
            length = ua_binary.Primitives.Int32.unpack(data)
            if length > 0:
                raise ua.UaError(f"an array of {length} times nothing")
            return None if length == -1 else []
        return original(vtype, data)

    ua_binary.unpack_uatype_array = unpack_uatype_array


_refuse_endless_arrays()
