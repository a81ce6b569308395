"""Reads the answers that carry values, without an object per value: Publish, Republish, Read, Write.

Why our own: asyncua builds four dataclasses per value. Here the fixed parts of a message are unpacked in one go and a
compiled walk (`kernels.wire`) puts the values into columns, of whatever types, status words and stamps they are mixed.
The walk knows every built-in type, so nothing is left for a second decoder; what is no number and no text is NaN.

Bytes of a server are not trusted: a length is compared with what is there before anything is allocated, nesting has an
end, and what is wrong raises ConnectionProblem. Source: OPC UA Part 6, 5.2 (encoding), Part 4, 5.11 and 5.14.
Nothing here keeps state but `Columns`, which belong to who made them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from asyncua import ua
from asyncua.ua.uaerrors import UaStatusCodeError
from numpy.typing import NDArray

from ..errors import ConnectionProblem
from ..kernels import wire as _kernel
from .wire_columns import MOST_SAMPLES, NO_STAMP, Columns, Samples

NO_ELEMENTS: NDArray[np.int32] = np.empty(0, np.int32)
_NO_NUMBERS: NDArray[np.uint32] = np.empty(0, np.uint32)
MOST_BLOCKS = 1000  # notifications in one message; the standard knows three kinds
_FAULT = int(ua.ObjectIds.ServiceFault_Encoding_DefaultBinary)
_PUBLISH = int(ua.ObjectIds.PublishResponse_Encoding_DefaultBinary)
_REPUBLISH = int(ua.ObjectIds.RepublishResponse_Encoding_DefaultBinary)
_READ = int(ua.ObjectIds.ReadResponse_Encoding_DefaultBinary)
_WRITE = int(ua.ObjectIds.WriteResponse_Encoding_DefaultBinary)
_DATA_CHANGE = int(ua.ObjectIds.DataChangeNotification_Encoding_DefaultBinary)
_STATUS_CHANGE = int(ua.ObjectIds.StatusChangeNotification_Encoding_DefaultBinary)
_STRING, _EXTENSION, _DIAGNOSTIC = 12, 22, 25  # numbers of built-in types, Part 6, 5.1.2
_SEVERE = 0xC0000000  # Bad and Uncertain

_HEADER = struct.Struct("<BBHqIIBiBBB")  # type in four bytes, time, handle, result, no diagnostics, texts or extras
_RESULT = struct.Struct("<qII")
_PUBLISHED = struct.Struct("<BIqi")  # more to come, sequence number, publish time, notifications
_MESSAGE = struct.Struct("<Iqi")
_BLOCK = struct.Struct("<BBHBi")  # an ExtensionObject: type in four bytes, encoding, length
_U1, _U2, _U4, _I4 = (struct.Struct(f"<{form}") for form in "BHIi")
_NONE = b"\xff\xff\xff\xff"


@dataclass(slots=True)
class Publish:
    """One notification message.

    samples : None on a keep-alive; status_change : StatusCode of a StatusChangeNotification, else None
    lost : messages before this one that the server sent and nobody can bring back
    refused_acks : acknowledgements that the server did not take; other_blocks : notifications of no use here (events)
    """

    subscription_id: int
    sequence_number: int
    publish_ns: int
    more: bool
    samples: Samples | None
    status_change: int | None
    lost: int = 0
    refused_acks: int = 0
    other_blocks: int = 0


@dataclass(slots=True)
class Message:
    """A notification message whose values are not read yet.

    raw : bytes of the answer; at : position of its first notification; blocks : how many follow, 0 on a keep-alive
    sequence_number : on a keep-alive that of the next message (Part 4, 5.14.1.1)
    available : uint32[k]; on a keep-alive the numbers of the messages that the server keeps for Republish
    """

    raw: bytes
    at: int
    blocks: int
    subscription_id: int
    sequence_number: int
    publish_ns: int
    more: bool
    republished: bool = False
    available: NDArray[np.uint32] = field(default_factory=lambda: _NO_NUMBERS)


def _broken(name: str, at: int, raw: bytes, what: str = "a length or a type is wrong") -> NoReturn:
    raise ConnectionProblem(
        f"the {name} of the server is no OPC UA: {what} (byte {at} of {len(raw)})",
        next_step="see the server's log; if it comes again, report it with 'opcua-detector support-bundle'",
    )


def _ns(ticks: int) -> int:
    return (ticks - _kernel.EPOCH_TICKS) * 100 if _kernel.MIN_TICKS <= ticks < _kernel.MAX_TICKS else NO_STAMP


def _number_of_type(name: str, raw: bytes, at: int) -> tuple[int, int]:
    """Return (number of a type of namespace 0, position after it); the number is -1 for other forms of NodeId."""
    form = raw[at] if at < len(raw) else 255
    if form == 0 and at + 2 <= len(raw):
        return raw[at + 1], at + 2
    if form == 1 and at + 4 <= len(raw):
        return (int(_U2.unpack_from(raw, at + 2)[0]) if raw[at + 1] == 0 else -1), at + 4
    if form == 2 and at + 7 <= len(raw):
        return (int(_U4.unpack_from(raw, at + 3)[0]) if raw[at + 1 : at + 3] == b"\0\0" else -1), at + 7
    after = int(_kernel.after(np.frombuffer(raw, np.uint8), at, len(raw), 17)) if at < len(raw) else -1
    if after < 0:
        _broken(name, at, raw, "the type of the message is missing")
    return -1, after


def _after(name: str, raw: bytes, at: int, kind: int, array: bool = False) -> int:
    """Return the position after something that is skipped."""
    found = (_kernel.after_array if array else _kernel.after)(np.frombuffer(raw, np.uint8), at, len(raw), kind)
    if found < 0:
        _broken(name, at, raw)
    return int(found)


def _opened(name: str, raw: bytes, expected: int | None) -> int:
    """Check type and ResponseHeader (Part 4, 7.34) and return the position after it; UaStatusCodeError if not Good."""
    if len(raw) >= _HEADER.size:
        form, space, number, _, _, result, diagnostics, texts, *extra = _HEADER.unpack_from(raw)
        plain = form == 1 and space == 0 and diagnostics == 0 and -1 <= texts <= 0 and extra == [0, 0, 0]
    else:
        plain = False
    at = _HEADER.size
    if not plain:
        number, at = _number_of_type(name, raw, 0)
        if at + _RESULT.size > len(raw):
            _broken(name, at, raw, "it ends in its header")
        _, _, result = _RESULT.unpack_from(raw, at)
        at = _after(name, raw, at + _RESULT.size, _DIAGNOSTIC)
        at = _after(name, raw, at, _STRING, array=True)
        at = _after(name, raw, at, _EXTENSION)
    if result & _SEVERE:
        raise UaStatusCodeError(result)
    if number == _FAULT or (expected is not None and number != expected):
        _broken(name, 0, raw, f"it has the type {number}")
    return at


def check(body: Any, name: str = "answer", expected: int | None = None) -> None:
    """Raise the UaStatusCodeError of a ServiceFault or of a result that is not Good.

    name, expected : what the answer must be, in words and as the number of its encoding (None: any)
    Raises ConnectionProblem for bytes that are no OPC UA and for an answer to another question.
    """
    _opened(name, bytes(body), expected)


# --- Publish and Republish ---


def open_publish(body: Any) -> Message:
    """Read all of a PublishResponse (Part 4, 5.14.5) but its values.

    Raises UaStatusCodeError for a ServiceFault or a Bad result, ConnectionProblem for bytes that are no OPC UA.
    """
    raw = bytes(body)
    at = _opened("PublishResponse", raw, _PUBLISH)
    try:
        subscription_id, available = _U4.unpack_from(raw, at)[0], _I4.unpack_from(raw, at + 4)[0]
        numbers_at = at + 8
        at = numbers_at + 4 * max(0, available)
        more, sequence_number, ticks, blocks = _PUBLISHED.unpack_from(raw, at)
    except struct.error:
        _broken("PublishResponse", at, raw, "it ends too early")
    message = Message(
        raw, at + _PUBLISHED.size, max(0, blocks), subscription_id, sequence_number, _ns(ticks), more != 0
    )
    if blocks <= 0 and available > 0:
        message.available = np.frombuffer(raw, "<u4", available, numbers_at)
    return message


def open_republish(body: Any, subscription_id: int) -> Message:
    """Read all of a RepublishResponse (Part 4, 5.14.6) but its values; errors as `open_publish`."""
    raw = bytes(body)
    at = _opened("RepublishResponse", raw, _REPUBLISH)
    try:
        sequence_number, ticks, blocks = _MESSAGE.unpack_from(raw, at)
    except struct.error:
        _broken("RepublishResponse", at, raw, "it ends too early")
    return Message(
        raw, at + _MESSAGE.size, max(0, blocks), subscription_id, sequence_number, _ns(ticks), False, True
    )


def read_message(
    message: Message, columns: Columns | None = None, elements: NDArray[np.int32] = NO_ELEMENTS
) -> Publish:
    """Read the values of a message into `columns` (None: into new ones).

    elements : int32[m]; by client handle the place in its array that a tag stands for, -1 for a scalar
    Raises ConnectionProblem for bytes that are no OPC UA.
    """
    name = "RepublishResponse" if message.republished else "PublishResponse"
    raw, at = message.raw, message.at
    found = Publish(
        message.subscription_id, message.sequence_number, message.publish_ns, message.more, None, None
    )
    rows = 0
    if message.blocks > MOST_BLOCKS:
        _broken(name, at, raw, f"it claims {message.blocks} notifications")
    view = np.frombuffer(raw, np.uint8)
    try:
        for _ in range(message.blocks):
            number, body_at, stop = _block(name, raw, at)
            if number == _DATA_CHANGE and body_at < stop:
                columns, rows, at = _items(name, view, raw, body_at, stop, columns, rows, elements)
            elif number == _STATUS_CHANGE and body_at < stop:
                found.status_change = int(_U4.unpack_from(raw, body_at)[0])
                at = _after(name, raw, body_at + 4, _DIAGNOSTIC)
            else:
                found.other_blocks += 1
                at = stop
            if at > stop:
                _broken(name, at, raw)
            at = stop
        if not message.republished:
            found.refused_acks = _refused(name, raw, at)
    except struct.error:
        _broken(name, at, raw, "it ends too early")
    if rows and columns is not None:
        found.samples = columns.view(rows, raw)
    return found


def decode_publish(
    body: Any, columns: Columns | None = None, elements: NDArray[np.int32] = NO_ELEMENTS
) -> Publish:
    """Decode a PublishResponse: `open_publish` and `read_message` in one."""
    return read_message(open_publish(body), columns, elements)


def _block(name: str, raw: bytes, at: int) -> tuple[int, int, int]:
    """Read the frame of an ExtensionObject (Part 6, 5.2.2.15): number of its type, begin and end of its body."""
    form, space, number, encoding, length = _BLOCK.unpack_from(raw, at)
    if form == 1 and space == 0 and encoding == 1:
        body_at = at + _BLOCK.size
    else:
        number, body_at = _number_of_type(name, raw, at)
        encoding = _U1.unpack_from(raw, body_at)[0]
        body_at += 1
        if encoding == 0:
            return number, body_at, body_at
        length = _I4.unpack_from(raw, body_at)[0]
        body_at += 4
        if encoding != 1:
            number = -1  # XML
    if not 0 <= length <= len(raw) - body_at:
        _broken(name, at, raw, f"a notification claims {length} bytes")
    return number, body_at, body_at + length


def _items(
    name: str, view: NDArray[np.uint8], raw: bytes, at: int, stop: int, columns: Columns | None, rows: int,
    elements: NDArray[np.int32],
) -> tuple[Columns, int, int]:
    """Append the items of a DataChangeNotification (Part 4, 7.25.2): the columns, rows in them, position after it."""
    count = max(0, _I4.unpack_from(raw, at)[0])
    at += 4
    if count * 5 > stop - at or rows + count > MOST_SAMPLES:  # a handle and a mask each, at least
        _broken(name, at, raw, f"a notification claims {count} values")
    if columns is None:
        columns = Columns(count)
    columns.reserve(rows + count, rows)
    at = _kernel.data_values(
        view, at, stop, count, True, rows, elements, columns.stamps, columns.value, columns.status, columns.notes
    )
    if at < 0:
        _broken(name, stop, raw, "its values are not readable")
    if at + 4 > stop or _I4.unpack_from(raw, at)[0] > 0:
        return columns, rows + count, _after(name, raw, at, _DIAGNOSTIC, array=True)
    return columns, rows + count, at + 4


def _refused(name: str, raw: bytes, at: int) -> int:
    """Count acknowledgements that were not taken (Results and DiagnosticInfos at the end of a PublishResponse)."""
    if at + 8 <= len(raw):  # the usual: all are Good, and nothing is said about them
        size = 4 * max(0, _I4.unpack_from(raw, at)[0])
        if size <= 64 and raw[at + 4 : at + 8 + size] in (bytes(size + 4), bytes(size) + _NONE):
            return 0
    codes, at = _codes(name, raw, at)
    _after(name, raw, at, _DIAGNOSTIC, array=True)
    return int(np.count_nonzero(codes & 0x80000000))


def _codes(name: str, raw: bytes, at: int) -> tuple[NDArray[np.uint32], int]:
    """Read an array of StatusCodes."""
    count = max(0, _I4.unpack_from(raw, at)[0]) if at + 4 <= len(raw) else MOST_SAMPLES + 1
    if count > MOST_SAMPLES or 4 * count > len(raw) - at - 4:
        _broken(name, at, raw, f"it claims {count} results")
    return np.frombuffer(raw, "<u4", count, at + 4), at + 4 + 4 * count


# --- Read, Write ---


def decode_read(
    body: Any, count: int, columns: Columns | None = None, elements: NDArray[np.int32] = NO_ELEMENTS
) -> Samples:
    """Decode a ReadResponse (Part 4, 5.11.2) to `count` nodes; handles count from 0 in the order of the request.

    columns : where the values go, None for new ones; elements : by handle, see `read_message`
    Raises UaStatusCodeError for a ServiceFault or a Bad result, ConnectionProblem where the answer does not fit the
    request or is no OPC UA.
    """
    raw, name = bytes(body), "ReadResponse"
    at = _opened(name, raw, _READ)
    if at + 4 > len(raw) or max(0, _I4.unpack_from(raw, at)[0]) != count:
        _broken(name, at, raw, f"it has not the {count} values that were asked for")
    columns = columns or Columns(count)
    columns.reserve(count, 0)
    view = np.frombuffer(raw, np.uint8)
    after = _kernel.data_values(
        view, at + 4, len(raw), count, False, 0, elements, columns.stamps, columns.value, columns.status, columns.notes
    )
    if after < 0:
        _broken(name, at, raw, "its values are not readable")
    _after(name, raw, int(after), _DIAGNOSTIC, array=True)
    return columns.view(count, raw)


def write_results(body: Any) -> list[int]:
    """Return the StatusCode of each item of a WriteResponse (Part 4, 5.11.4); errors as `decode_read`."""
    raw, name = bytes(body), "WriteResponse"
    codes, at = _codes(name, raw, _opened(name, raw, _WRITE))
    _after(name, raw, at, _DIAGNOSTIC, array=True)
    return [int(code) for code in codes]
