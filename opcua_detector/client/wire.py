"""The one file that touches asyncua's internals: sends without a task, decodes without an object per value.

Why: asyncua's own path makes an asyncio task per tag value and a dataclass per field.
Here a request is a future with a callback, and a run of DataValues of one shape is read by numpy in one go.
Whatever has an unusual shape goes through asyncua's decoder. Nothing here keeps state.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from asyncua import Client, ua
from asyncua.client.ua_client import UASocketState
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import nodeid_from_binary, struct_from_binary
from numpy.typing import NDArray

NO_STAMP = -(2**63)  # a null timestamp
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_TICKS = 116_444_736_000_000_000  # 100 ns from 1601 to 1970
_MAX_TICKS = 208_678_456_000_000_000  # year 2262: where int64 nanoseconds end
_FAULT = ua.ObjectIds.ServiceFault_Encoding_DefaultBinary
_HISTORY_DATA = ua.ObjectIds.HistoryData_Encoding_DefaultBinary
_DATA_CHANGE = ua.ObjectIds.DataChangeNotification_Encoding_DefaultBinary
_NUMERIC = {
    1: "u1",
    2: "i1",
    3: "u1",
    4: "<i2",
    5: "<u2",
    6: "<i4",
    7: "<u4",
    8: "<i8",
    9: "<u8",
    10: "<f4",
    11: "<f8",
}


@dataclass(slots=True)
class Samples:
    """DataValues as columns.

    handle : int64[m] ClientHandle (0 in history), source_ns, server_ns : int64[m] (NO_STAMP: null),
    value : float64[m] (NaN: none or no number), status : uint32[m]
    """

    handle: NDArray[np.int64]
    source_ns: NDArray[np.int64]
    server_ns: NDArray[np.int64]
    value: NDArray[np.float64]
    status: NDArray[np.uint32]


@dataclass(slots=True)
class Publish:
    """One publish response.

    samples : None on a keep-alive; status_change : StatusCode of a StatusChangeNotification, else None
    """

    subscription_id: int
    sequence_number: int
    publish_ns: int
    more: bool
    samples: Samples | None
    status_change: int | None


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


def is_open(client: Client) -> bool:
    """Whether the socket is open."""
    protocol = client.uaclient.protocol
    return protocol is not None and protocol.state is UASocketState.OPEN


async def start_session(client: Client) -> None:
    """Activate a session on an open channel and keep the channel renewed, without asyncua's supervisor."""
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


def check(body: Buffer) -> None:
    """Raise the UaStatusCodeError of a ServiceFault."""
    if nodeid_from_binary(body.copy(32)) == node_id(_FAULT):
        rest = body.copy()
        nodeid_from_binary(rest)
        struct_from_binary(ua.ResponseHeader, rest).ServiceResult.check()


def decode(body: Buffer, answer: type) -> Any:
    """Decode a response by asyncua; UaStatusCodeError for a ServiceFault or a Bad result."""
    check(body)
    response: Any = struct_from_binary(answer, body)
    response.ResponseHeader.ServiceResult.check()
    return response


def write_results(body: Buffer) -> list[int]:
    """Return the StatusCode of each item of a WriteResponse."""
    check(body)
    response = struct_from_binary(ua.WriteResponse, body)
    response.ResponseHeader.ServiceResult.check()
    return [int(code.value) for code in response.Results]


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


def _ticks_to_ns(ticks: NDArray[np.int64]) -> NDArray[np.int64]:
    ns = (ticks - _EPOCH_TICKS) * 100
    ns[(ticks <= 0) | (ticks >= _MAX_TICKS)] = NO_STAMP
    return ns


def to_number(value: Any) -> float:
    """Return a value as float64: numbers and Booleans as they are, text as a stable code, the rest NaN.

    The code of a text is its CRC-32: the same text gives the same number on every run, which is what a state
    tag needs.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        return float(zlib.crc32(value.encode()))
    return float("nan")


# --- DataValues ---


def _layout(mask: int, kind: int, with_handle: bool) -> np.dtype[Any] | None:
    """Numpy layout of a DataValue of this mask and scalar type (Part 6, 5.2.2.17); None: unusual."""
    fields: list[tuple[str, str]] = [("handle", "<u4")] if with_handle else []
    fields.append(("mask", "u1"))
    if mask & 0x01:
        if kind not in _NUMERIC:
            return None
        fields += [("kind", "u1"), ("value", _NUMERIC[kind])]
    for bit, name, form in (
        (0x02, "status", "<u4"),
        (0x04, "source", "<i8"),
        (0x10, "source_pico", "<u2"),
        (0x08, "server", "<i8"),
        (0x20, "server_pico", "<u2"),
    ):
        if mask & bit:
            fields.append((name, form))
    return None if mask & ~0x3F else np.dtype(fields)


def _uniform(raw: bytes, start: int, count: int, with_handle: bool) -> tuple[Samples, int] | None:
    """Read `count` DataValues of one shape; None when they are not of one shape."""
    at = start + (4 if with_handle else 0)
    if count <= 0 or at + 1 >= len(raw):
        return None
    mask = raw[at]
    layout = _layout(mask, raw[at + 1], with_handle)
    end = start + (0 if layout is None else count * layout.itemsize)
    if layout is None or end > len(raw):
        return None
    table = np.frombuffer(raw, layout, count, start)
    if (table["mask"] != mask).any() or (mask & 0x01 and (table["kind"] != raw[at + 1]).any()):
        return None
    nowhere = np.full(count, NO_STAMP, np.int64)
    return Samples(
        table["handle"].astype(np.int64) if with_handle else np.zeros(count, np.int64),
        _ticks_to_ns(table["source"].astype(np.int64)) if mask & 0x04 else nowhere,
        _ticks_to_ns(table["server"].astype(np.int64)) if mask & 0x08 else nowhere,
        table["value"].astype(np.float64) if mask & 0x01 else np.full(count, np.nan),
        table["status"].astype(np.uint32) if mask & 0x02 else np.zeros(count, np.uint32),
    ), end


def samples_of(values: list[tuple[int, ua.DataValue]]) -> Samples:
    """Turn asyncua's own DataValues into columns (the slow path)."""
    n = len(values)
    out = Samples(
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.full(n, np.nan),
        np.zeros(n, np.uint32),
    )
    for i, (handle, one) in enumerate(values):
        out.handle[i] = handle
        out.source_ns[i] = to_ns(one.SourceTimestamp)
        out.server_ns[i] = to_ns(one.ServerTimestamp)
        out.value[i] = to_number(one.Value.Value) if one.Value is not None else np.nan
        out.status[i] = one.StatusCode.value if one.StatusCode is not None else 0
    return out


class _Unusual(Exception):
    """The message has a shape that the fast reader leaves to asyncua."""


class _Reader:
    """Reads the fixed parts of a message."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, form: str) -> Any:
        try:
            (value,) = struct.unpack_from(form, self.raw, self.at)
        except struct.error as error:
            raise _Unusual from error
        self.at += struct.calcsize(form)
        return value

    def type_id(self) -> int:
        """Numeric NodeId of namespace 0 in two or four bytes (Part 6, 5.2.2.9)."""
        form = self.take("<B")
        if form == 0:
            return int(self.take("<B"))
        if form == 1 and self.take("<B") == 0:
            return int(self.take("<H"))
        raise _Unusual

    def header(self) -> None:
        """Response type and a ResponseHeader that is Good and carries no diagnostics."""
        self.type_id()
        self.at += 12
        if self.take("<I") != 0 or self.take("<B") != 0 or self.take("<i") > 0:
            raise _Unusual
        if self.type_id() != 0 or self.take("<B") != 0:
            raise _Unusual

    def byte_string(self) -> bytes | None:
        n = self.take("<i")
        if n < 0:
            return None
        self.at += n
        return self.raw[self.at - n : self.at]


def decode_publish(body: Buffer) -> Publish:
    """Decode a PublishResponse; UaStatusCodeError for a ServiceFault or a Bad result."""
    check(body)
    try:
        return _fast_publish(bytes(body))
    except _Unusual:
        pass
    response = struct_from_binary(ua.PublishResponse, body.copy())
    response.ResponseHeader.ServiceResult.check()
    result = response.Parameters
    message = result.NotificationMessage
    values: list[tuple[int, ua.DataValue]] = []
    status_change = None
    for one in message.NotificationData or []:
        if isinstance(one, ua.DataChangeNotification):
            values += [(item.ClientHandle, item.Value) for item in one.MonitoredItems]
        elif isinstance(one, ua.StatusChangeNotification):
            status_change = int(one.Status.value)
    return Publish(
        int(result.SubscriptionId),
        int(message.SequenceNumber),
        to_ns(message.PublishTime),
        bool(result.MoreNotifications),
        samples_of(values) if values else None,
        status_change,
    )


def _fast_publish(raw: bytes) -> Publish:
    """Read a PublishResponse (Part 4, 5.14.5) with at most one DataChangeNotification of uniform items."""
    reader = _Reader(raw)
    reader.header()
    subscription_id = reader.take("<I")
    available = reader.take("<i")
    reader.at += 4 * max(0, available)
    more = bool(reader.take("<B"))
    sequence_number = reader.take("<I")
    ticks = reader.take("<q")
    publish_ns = (ticks - _EPOCH_TICKS) * 100 if 0 < ticks < _MAX_TICKS else NO_STAMP
    count = reader.take("<i")
    if count <= 0:
        return Publish(subscription_id, sequence_number, publish_ns, more, None, None)
    if count != 1 or reader.type_id() != _DATA_CHANGE or reader.take("<B") != 1:
        raise _Unusual
    reader.take("<i")
    found = _uniform(raw, reader.at + 4, reader.take("<i"), True)
    if found is None:
        raise _Unusual
    return Publish(subscription_id, sequence_number, publish_ns, more, found[0], None)


@dataclass(slots=True)
class HistoryPage:
    """What one node answered: its StatusCode, the point where the next page begins, its samples."""

    status: int
    continuation: bytes | None
    samples: Samples


def decode_history(body: Buffer) -> list[HistoryPage]:
    """Decode a HistoryReadResponse, one page per node; UaStatusCodeError for a fault or a Bad result."""
    check(body)
    try:
        return _fast_history(bytes(body))
    except _Unusual:
        pass
    response = struct_from_binary(ua.HistoryReadResponse, body.copy())
    response.ResponseHeader.ServiceResult.check()
    pages = []
    for result in response.Results:
        content = result.HistoryData
        if isinstance(content, ua.ExtensionObject) and content.Body:
            content = struct_from_binary(ua.HistoryData, Buffer(content.Body))
        values = getattr(content, "DataValues", None) or []
        pages.append(
            HistoryPage(
                int(result.StatusCode.value),
                result.ContinuationPoint or None,
                samples_of([(0, one) for one in values]),
            )
        )
    return pages


def _fast_history(raw: bytes) -> list[HistoryPage]:
    """Read a HistoryReadResponse (Part 4, 5.11.3) whose DataValues have one shape per node."""
    reader = _Reader(raw)
    reader.header()
    pages = []
    for _ in range(max(0, reader.take("<i"))):
        status = reader.take("<I")
        continuation = reader.byte_string()
        kind = reader.type_id()
        samples = samples_of([])
        if reader.take("<B") != 0:
            length = reader.take("<i")
            end = reader.at + length
            if kind != _HISTORY_DATA:
                raise _Unusual
            count = reader.take("<i")
            if count > 0:
                found = _uniform(raw, reader.at, count, False)
                if found is None or found[1] != end:
                    raise _Unusual
                samples = found[0]
            reader.at = end
        pages.append(HistoryPage(status, continuation or None, samples))
    return pages
