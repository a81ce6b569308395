"""Write, Read, Publish and Republish requests that are encoded once and patched in place from then on.

Why: encoding 16 scalar writes takes asyncua 68 us, the same bytes every time but for the values. A prepared request
keeps its bytes: each sending puts in time, request handle and time-out hint, and a write its values. It belongs to one
session, whose AuthenticationToken stands at its beginning. Source: OPC UA Part 4, 5.11 (Read, Write), 5.14.5 and 5.14.6
(Publish, Republish), 7.33 (RequestHeader); Part 6, 5.2 (encoding).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import nodeid_from_binary, nodeid_to_binary, struct_to_binary

_WRITE = int(ua.ObjectIds.WriteRequest_Encoding_DefaultBinary)
_READ = int(ua.ObjectIds.ReadRequest_Encoding_DefaultBinary)
_PUBLISH = int(ua.ObjectIds.PublishRequest_Encoding_DefaultBinary)
_REPUBLISH = int(ua.ObjectIds.RepublishRequest_Encoding_DefaultBinary)
_VALUE = int(ua.AttributeIds.Value)
_TIMES = {"source": 0, "server": 1, "both": 2, "neither": 3}  # TimestampsToReturn, Part 4, 7.40

_FIXED = {
    "Boolean": (1, "?"),
    "SByte": (2, "b"),
    "Byte": (3, "B"),
    "Int16": (4, "h"),
    "UInt16": (5, "H"),
    "Int32": (6, "i"),
    "UInt32": (7, "I"),
    "Int64": (8, "q"),
    "UInt64": (9, "Q"),
    "Float": (10, "f"),
    "Double": (11, "d"),
}
_HEADER = struct.Struct("<qIIiIBBB")  # time, handle, diagnostics, no audit entry, time-out, no additional header
_I4 = struct.Struct("<i")
_ACK = struct.Struct("<II")
_NO_TEXT = _I4.pack(-1)
_IS_ARRAY = 0x80


def _string(text: str | bytes | None) -> bytes:
    if text is None:
        return _NO_TEXT
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return _I4.pack(len(raw)) + raw


def _localized(text: Any) -> bytes:
    """Encode a LocalizedText (Part 6, 5.2.2.14); a plain text has no locale."""
    if not isinstance(text, ua.LocalizedText):
        return b"\x02" + _string(text)
    mask = (1 if text.Locale is not None else 0) | (2 if text.Text is not None else 0)
    parts = [_string(one) for one in (text.Locale, text.Text) if one is not None]
    return bytes([mask]) + b"".join(parts)


def _date(value: datetime | None) -> bytes:
    return struct.pack("<q", 0 if value is None else ua.datetime_to_win_epoch(value))


_OTHERS: dict[str, tuple[int, Callable[[Any], bytes]]] = {
    "String": (12, _string),
    "DateTime": (13, _date),
    "ByteString": (15, _string),
    "LocalizedText": (21, _localized),
}


@dataclass(frozen=True, slots=True)
class WriteTo:
    """A node and the type that is written to it: a built-in type by name, an array of it with `array`."""

    node: Any
    type: str
    array: bool = False


@dataclass(frozen=True, slots=True)
class ReadFrom:
    """A node that is read; `index_range` (Part 4, 7.27) takes a part of an array, such as "2" or "0:9"."""

    node: Any
    attribute: int = _VALUE
    index_range: str | None = None


class _Request:
    """Type, RequestHeader and what follows, as bytes."""

    def __init__(self, number: int, token: bytes, rest: bytes) -> None:
        self._header_at = 4 + len(token)
        self._rest_at = self._header_at + _HEADER.size
        self._bytes = bytearray(struct.pack("<BBH", 1, 0, number) + token + bytes(_HEADER.size) + rest)

    def body(self, request_handle: int, ticks: int, timeout_ms: int) -> bytes | bytearray:
        """Return the encoded request; ticks: now, 100 ns since 1601. The bytes hold until the next call."""
        _HEADER.pack_into(self._bytes, self._header_at, ticks, request_handle, 0, -1, timeout_ms, 0, 0, 0)
        return self._bytes


class Encoded:
    """A request that asyncua encodes at each sending: what cannot be prepared.

    token : `wire.token_of` the connected client; request : asyncua's object
    """

    def __init__(self, token: bytes, request: Any) -> None:
        self._token, self._request = nodeid_from_binary(Buffer(token)), request

    def body(self, request_handle: int, ticks: int, timeout_ms: int) -> bytes:
        """Return the encoded request; ticks: now, 100 ns since 1601."""
        header = self._request.RequestHeader
        header.AuthenticationToken, header.RequestHandle, header.TimeoutHint = self._token, request_handle, timeout_ms
        header.Timestamp = ua.win_epoch_to_datetime(ticks)
        return bytes(struct_to_binary(self._request))


class PreparedWrite(_Request):
    """A WriteRequest for always the same nodes: Values alone, without status and time stamps.

    Many PLCs answer BadWriteNotSupported to a value that comes with either.

    Parameters
    ----------
    token : `wire.token_of` the connected client
    items : nodes with their types

    Raises ValueError for a type that has no encoding here.
    """

    def __init__(self, token: bytes, items: Sequence[WriteTo]) -> None:
        super().__init__(_WRITE, token, b"")
        self.items = tuple(items)
        self._heads: list[bytes] = []
        self._packs: list[Callable[[Any], bytes]] = []
        self._fixed: list[tuple[struct.Struct, int] | None] = []  # where a scalar of fixed size lies
        self._spans: list[tuple[int, int]] = []  # where every value lies
        for item in self.items:
            if item.type in _FIXED:
                kind, form = _FIXED[item.type]
                pack: Callable[[Any], bytes] = _array_of(form) if item.array else struct.Struct(f"<{form}").pack
            elif item.type in _OTHERS:
                kind, one = _OTHERS[item.type]
                pack = _list_of(one) if item.array else one
            else:
                raise ValueError(f"values of type {item.type} cannot be written")
            self._heads.append(
                nodeid_to_binary(item.node)
                + struct.pack("<Ii", _VALUE, -1)
                + bytes([0x01, kind | (_IS_ARRAY if item.array else 0)])
            )
            self._packs.append(pack)
            fixed = item.type in _FIXED and not item.array
            self._fixed.append((struct.Struct(f"<{_FIXED[item.type][1]}"), -1) if fixed else None)
        empty = [() if item.array else 0 if item.type in _FIXED else None for item in self.items]
        self._lay_out([pack(value) for pack, value in zip(self._packs, empty, strict=True)])

    def set(self, values: Sequence[Any]) -> None:
        """Put in the values of all items, in their order: numbers, bool, str, datetime, sequences for arrays.

        struct.error, TypeError or OverflowError where one does not fit its type; the bytes are then as they were, or
        hold some of the new values: set them all again before the next sending.
        """
        if len(values) != len(self.items):
            raise ValueError(f"{len(self.items)} values are needed, not {len(values)}")
        raw = self._bytes
        changed: dict[int, bytes] = {}
        for i, value in enumerate(values):
            place = self._fixed[i]
            if place is not None:
                place[0].pack_into(raw, place[1], value)
                continue
            encoded = self._packs[i](value)
            begin, end = self._spans[i]
            if len(encoded) == end - begin:
                raw[begin:end] = encoded
            else:
                changed[i] = encoded
        if changed:
            self._lay_out([changed.get(i, bytes(raw[a:b])) for i, (a, b) in enumerate(self._spans)])

    def _lay_out(self, encoded: Sequence[bytes]) -> None:
        """Build the bytes after the header anew: a text or an array has another length."""
        parts = [_I4.pack(len(self.items))]
        at = self._rest_at + 4
        self._spans = []
        for i, (head, value) in enumerate(zip(self._heads, encoded, strict=True)):
            parts += [head, value]
            begin = at + len(head)
            at = begin + len(value)
            self._spans.append((begin, at))
            place = self._fixed[i]
            if place is not None:
                self._fixed[i] = (place[0], begin)
        self._bytes[self._rest_at :] = b"".join(parts)


def _array_of(form: str) -> Callable[[Any], bytes]:
    def pack(values: Sequence[Any]) -> bytes:
        return struct.pack(f"<i{len(values)}{form}", len(values), *values)

    return pack


def _list_of(one: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def pack(values: Sequence[Any]) -> bytes:
        return _I4.pack(len(values)) + b"".join(one(value) for value in values)

    return pack


class PreparedRead(_Request):
    """A ReadRequest for always the same nodes; its answer is for `wire.decode_read`.

    times : "source", "server", "both" or "neither"; max_age_ms : 0: ask the device
    """

    def __init__(
        self, token: bytes, items: Sequence[ReadFrom], *, times: str = "both", max_age_ms: float = 0.0
    ) -> None:
        self.items = tuple(items)
        rest = [struct.pack("<dii", max_age_ms, _TIMES[times], len(self.items))]
        for item in self.items:
            rest.append(nodeid_to_binary(item.node) + struct.pack("<I", item.attribute) + _string(item.index_range))
            rest.append(b"\0\0" + _NO_TEXT)  # DataEncoding: the default
        super().__init__(_READ, token, b"".join(rest))


class PreparedPublish(_Request):
    """A PublishRequest; the acknowledgements of the messages that came since ride on it."""

    def __init__(self, token: bytes) -> None:
        super().__init__(_PUBLISH, token, _I4.pack(0))

    def acknowledge(self, acks: Sequence[tuple[int, int]]) -> None:
        """Put in (SubscriptionId, SequenceNumber) of each message that is acknowledged."""
        raw, at = self._bytes, self._rest_at
        raw[at:] = _I4.pack(len(acks)) + b"".join([_ACK.pack(*ack) for ack in acks])


class PreparedRepublish(_Request):
    """A RepublishRequest: asks for one notification message once more."""

    def __init__(self, token: bytes) -> None:
        super().__init__(_REPUBLISH, token, _ACK.pack(0, 0))

    def ask(self, subscription_id: int, sequence_number: int) -> None:
        """Name the message."""
        _ACK.pack_into(self._bytes, self._rest_at, subscription_id, sequence_number)
