"""Kernels that read OPC UA binary: a run of DataValues into columns, and how long anything else is.

Source: OPC UA Part 6, 5.2.2 (built-in types). Nothing is allocated, whatever a length field says: a length is compared
with the bytes that are there before it is used, and every turn of a loop consumes bytes, so the time is linear in the
size of the message. Nesting (a Variant in a Variant, a DataValue in a Variant, an inner DiagnosticInfo) ends at
`MAX_DEPTH`, the least that Part 6, 5.1.12 asks of a decoder.

A position of -1 says that the bytes are no OPC UA.
"""

from __future__ import annotations

import numpy as np
from numba import types

from .jit import kernel

NO_STAMP = -(2**63)  # a null timestamp
NOTE_STATUS, NOTE_NO_STAMP, NOTE_TEXT = 1, 2, 4  # a StatusCode that is not plain Good, no source stamp, a text
MAX_DEPTH = 100
EPOCH_TICKS = 116_444_736_000_000_000  # 100 ns from 1601 to 1970
# The years 1716 to 2255: where int64 nanoseconds hold them; no clock of a plant shows others.
MIN_TICKS = 36_444_736_000_000_010
MAX_TICKS = 206_444_736_000_000_000

RAW = types.Array(types.uint8, 1, "C", readonly=True)
_PLACE = types.int64
_FOUND = types.Tuple((types.int64, types.float64, types.int64))

# Bytes of a built-in type by its number; 0: Null, or as long as it says itself. From 26 on it is read as ByteString.
_SIZE = np.zeros(64, np.int64)
_SIZE[[1, 2, 3]] = 1
_SIZE[[4, 5]] = 2
_SIZE[[6, 7, 10, 19]] = 4
_SIZE[[8, 9, 11, 13]] = 8
_SIZE[14] = 16


def _crc_table():
    """Rows of CRC-32 (ISO 3309) by byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0xEDB88320) ^ (table >> 1), table >> 1).astype(np.uint32)
    return table


_CRC = _crc_table()


@kernel(types.uint64(RAW, _PLACE), cache=True)
def _u2(raw, at):
    return np.uint64(raw[at]) | np.uint64(raw[at + 1]) << np.uint64(8)


@kernel(types.uint64(RAW, _PLACE), cache=True)
def _u4(raw, at):
    return (
        np.uint64(raw[at])
        | np.uint64(raw[at + 1]) << np.uint64(8)
        | np.uint64(raw[at + 2]) << np.uint64(16)
        | np.uint64(raw[at + 3]) << np.uint64(24)
    )


@kernel(types.uint64(RAW, _PLACE), cache=True)
def _u8(raw, at):
    return (
        np.uint64(raw[at])
        | np.uint64(raw[at + 1]) << np.uint64(8)
        | np.uint64(raw[at + 2]) << np.uint64(16)
        | np.uint64(raw[at + 3]) << np.uint64(24)
        | np.uint64(raw[at + 4]) << np.uint64(32)
        | np.uint64(raw[at + 5]) << np.uint64(40)
        | np.uint64(raw[at + 6]) << np.uint64(48)
        | np.uint64(raw[at + 7]) << np.uint64(56)
    )


@kernel(types.int64(RAW, _PLACE), cache=True)
def _i4(raw, at):
    return np.int64(np.int32(np.uint32(_u4(raw, at))))


@kernel(types.int64(RAW, _PLACE), cache=True)
def _i8(raw, at):
    return np.int64(_u8(raw, at))


@kernel(types.int64(types.int64), cache=True)
def _nanoseconds(ticks):
    """Nanoseconds since 1970 of a DateTime; NO_STAMP for null and for dates that no clock shows."""
    return (ticks - EPOCH_TICKS) * 100 if MIN_TICKS <= ticks < MAX_TICKS else np.int64(NO_STAMP)


@kernel(types.float64(RAW, _PLACE, types.int64), cache=True)
def _crc(raw, at, size):
    """CRC-32 (ISO 3309, as zlib has it) of a text as a number."""
    code = np.uint32(0xFFFFFFFF)
    for i in range(at, at + size):
        code = _CRC[(code ^ np.uint32(raw[i])) & np.uint32(0xFF)] ^ (code >> np.uint32(8))
    return np.float64(code ^ np.uint32(0xFFFFFFFF))


@kernel(types.float64(RAW, _PLACE, types.int64), cache=True)
def _number(raw, at, kind):
    """A value of fixed size as float64: numbers, Boolean 0 or 1, DateTime seconds since 1970, the rest NaN."""
    if kind == 11:
        return np.uint64(_u8(raw, at)).view(np.float64)
    if kind == 10:
        return np.float64(np.uint32(_u4(raw, at)).view(np.float32))
    if kind == 6:
        return np.float64(_i4(raw, at))
    if kind == 1:
        return 1.0 if raw[at] != 0 else 0.0
    if kind == 7:
        return np.float64(_u4(raw, at))
    if kind == 4:
        return np.float64(np.int16(np.uint16(_u2(raw, at))))
    if kind == 5:
        return np.float64(_u2(raw, at))
    if kind == 2:
        return np.float64(np.int8(raw[at]))
    if kind == 3:
        return np.float64(raw[at])
    if kind == 8:
        return np.float64(_i8(raw, at))
    if kind == 9:
        return np.float64(_u8(raw, at))
    if kind == 13:
        ticks = _i8(raw, at)
        if MIN_TICKS <= ticks < MAX_TICKS:
            return np.float64((ticks - EPOCH_TICKS) // 10) / 1e6
    return np.nan


@kernel(types.int64(RAW, _PLACE, _PLACE), cache=True)
def _after_string(raw, at, end):
    """Position after a String, ByteString or XmlElement; -1 where it does not fit."""
    if at < 0 or at + 4 > end:
        return np.int64(-1)
    n = _i4(raw, at)
    if n < -1 or n > end - at - 4:
        return np.int64(-1)
    return at + 4 + max(n, np.int64(0))


@kernel(types.int64(RAW, _PLACE, _PLACE), cache=True)
def _after_node_id(raw, at, end):
    """Position after a NodeId or ExpandedNodeId (Part 6, 5.2.2.9 and 5.2.2.10); -1 where it does not fit."""
    if at < 0 or at >= end:
        return np.int64(-1)
    form = raw[at] & 0x3F
    after = np.int64(-1)
    if form == 0:
        after = at + 2
    elif form == 1:
        after = at + 4
    elif form == 2:
        after = at + 7
    elif form == 4:
        after = at + 19
    elif form == 3 or form == 5:
        after = _after_string(raw, at + 3, end)
    if after >= 0 and raw[at] & 0x80:
        after = _after_string(raw, after, end)
    if after >= 0 and raw[at] & 0x40:
        after += 4
    return after if after <= end else np.int64(-1)


@kernel(types.int64(RAW, _PLACE, _PLACE), cache=True)
def _after_extension(raw, at, end):
    """Position after an ExtensionObject (Part 6, 5.2.2.15); -1 where it does not fit."""
    at = _after_node_id(raw, at, end)
    if at < 0 or at >= end or raw[at] > 2:
        return np.int64(-1)
    return _after_string(raw, at + 1, end) if raw[at] else at + 1


@kernel(types.int64(RAW, _PLACE, _PLACE), cache=True)
def _after_diagnostic(raw, at, end):
    """Position after a DiagnosticInfo and all that are nested in it (Part 6, 5.2.2.12); -1 where it does not fit."""
    for _ in range(MAX_DEPTH):
        if at < 0 or at >= end:
            return np.int64(-1)
        mask = raw[at]
        at += 1
        for bit in (0x01, 0x02, 0x04, 0x08):
            if mask & bit:
                at += 4
        if mask & 0x10:
            at = _after_string(raw, at, end)
        if at >= 0 and mask & 0x20:
            at += 4
        if at < 0 or at > end:
            return np.int64(-1)
        if not mask & 0x40:
            return at
    return np.int64(-1)


@kernel(types.int64(RAW, _PLACE, _PLACE, types.int64), cache=True)
def _after_one(raw, at, end, kind):
    """Position after one value of a built-in type that holds no Variant; -1 where it does not fit."""
    size = _SIZE[kind]
    if size:
        return at + size if at + size <= end else np.int64(-1)
    if kind == 12 or kind == 15 or kind == 16 or kind >= 26:
        return _after_string(raw, at, end)
    if kind == 17 or kind == 18:
        return _after_node_id(raw, at, end)
    if kind == 20:
        return _after_string(raw, at + 2, end)
    if kind == 21:
        if at >= end or raw[at] > 3:
            return np.int64(-1)
        mask = raw[at]
        at += 1
        if mask & 1:
            at = _after_string(raw, at, end)
        return _after_string(raw, at, end) if mask & 2 else at
    if kind == 22:
        return _after_extension(raw, at, end)
    return _after_diagnostic(raw, at, end)


@kernel(types.int64(types.int64), cache=True)
def _tail(mask):
    """Bytes of a DataValue after its Variant: status, stamps and their picoseconds (Part 6, 5.2.2.17)."""
    size = 4 if mask & 0x02 else 0
    size += 8 if mask & 0x04 else 0
    size += 8 if mask & 0x08 else 0
    size += 2 if mask & 0x10 else 0
    return np.int64(size + (2 if mask & 0x20 else 0))


@kernel(_FOUND(RAW, _PLACE, _PLACE, types.int64, types.int64), cache=True)
def variant(raw, at, end, element, depth):
    """Read a Variant (Part 6, 5.2.2.16): (position after it or -1, float64, position of a text or -1).

    element : -1 for a scalar, which an array is not; else the place in the flattened array, which a scalar has not.
        What is not there is NaN. A text counts as its CRC-32, a Variant in a Variant as what it holds.
    """
    bad = (np.int64(-1), np.nan, np.int64(-1))
    if at >= end or depth <= 0:
        return bad
    form = raw[at]
    kind = np.int64(form & 0x3F)
    size = _SIZE[kind]
    at += 1
    value, text = np.nan, np.int64(-1)
    if form & 0x80 == 0:
        if form & 0x40:
            return bad
        if kind == 0:
            return at, value, text
        count, first, last = np.int64(1), np.int64(0) if element < 0 else np.int64(-1), True
    else:
        if at + 4 > end:
            return bad
        count = _i4(raw, at)
        at += 4
        if count < -1 or count > end - at:  # every element has at least one byte
            return bad
        if kind == 0 and count > 0:
            return bad
        first, last = element, False
    if size:
        if count > 0:
            if count * size > end - at:
                return bad
            if 0 <= first < count:
                value = _number(raw, at + first * size, kind)
            at += count * size
    else:
        for j in range(count):
            start = at
            if kind == 24:
                at, inner, inner_text = variant(raw, start, end, np.int64(-1), depth - 1)
                if j == first:
                    value, text = inner, inner_text
            elif kind == 23:
                if at >= end:
                    return bad
                mask = np.int64(raw[at])
                at += 1
                if mask & 1:
                    at, _, _ = variant(raw, at, end, np.int64(-1), depth - 1)
                if at >= 0:
                    at += _tail(mask)
                if at > end:
                    return bad
            else:
                at = _after_one(raw, start, end, kind)
            if at < 0:
                return bad
            if kind == 12 and j == first and _i4(raw, start) >= 0:
                value, text = _crc(raw, start + 4, at - start - 4), start
    if not last and form & 0x40:
        if at + 4 > end:
            return bad
        dimensions = _i4(raw, at)
        at += 4
        if dimensions < -1 or max(dimensions, np.int64(0)) * 4 > end - at:
            return bad
        at += 4 * max(dimensions, np.int64(0))
    return at, value, text


@kernel(
    types.int64(
        RAW, _PLACE, _PLACE, types.int64, types.boolean, types.int64, types.Array(types.int32, 1, "C", readonly=True),
        types.int64[:, ::1], types.float64[::1], types.uint32[::1], types.int64[::1],
    ),
    cache=True,
)
def data_values(raw, at, end, count, with_handle, row, element, stamps, value, status, notes):
    """Read `count` DataValues (Part 6, 5.2.2.17) into columns; return the position after them, or -1.

    raw uint8[n]: a message; at, end: where they begin, where they must have ended
    with_handle: each is a MonitoredItemNotification, whose ClientHandle stands before it (Part 4, 7.25.2); else the
    handle is the number of the row, counted from 0 here
    row: the first row that is filled; count rows must be free
    element int32[m]: by handle, see `variant`; handles from m on are scalars
    stamps int64[4, capacity]: handle, source ns, server ns (NO_STAMP: none), position of a text in `raw` (-1: none)
    value float64[capacity]: NaN where there is no number; status uint32[capacity]: 0 where none is sent
    notes int64[2]: the NOTE bits of all rows are added to the first, the highest handle is kept in the second, so that
    who takes the columns need not look through them for what is almost never there
    Picoseconds are left out, since plants do not have them, and so are bits that Part 6 does not define.
    """
    found, highest = notes[0], notes[1]
    for i in range(count):
        handle = np.int64(i)
        if with_handle:
            if at + 4 > end:
                return np.int64(-1)
            handle = np.int64(_u4(raw, at))
            at += 4
        if at >= end:
            return np.int64(-1)
        mask = np.int64(raw[at])
        at += 1
        number, text = np.nan, np.int64(-1)
        if mask & 0x01:
            wanted = np.int64(element[handle]) if handle < element.shape[0] else np.int64(-1)
            if wanted < 0 and at + 9 <= end and raw[at] == 11:  # a Double: what plants send most
                number = np.uint64(_u8(raw, at + 1)).view(np.float64)
                at += 9
            else:
                at, number, text = variant(raw, at, end, wanted, np.int64(MAX_DEPTH))
                if at < 0:
                    return np.int64(-1)
        if at + _tail(mask) > end:
            return np.int64(-1)
        code, source, server = np.uint32(0), np.int64(NO_STAMP), np.int64(NO_STAMP)
        if mask & 0x02:
            code = np.uint32(_u4(raw, at))
            at += 4
        if mask & 0x04:
            source = _nanoseconds(_i8(raw, at))
            at += 8
        if mask & 0x10:
            at += 2
        if mask & 0x08:
            server = _nanoseconds(_i8(raw, at))
            at += 8
        if mask & 0x20:
            at += 2
        if code != 0:
            found |= NOTE_STATUS
        if source == NO_STAMP:
            found |= NOTE_NO_STAMP
        if text >= 0:
            found |= NOTE_TEXT
        highest = max(highest, handle)
        stamps[0, row] = handle
        stamps[1, row] = source
        stamps[2, row] = server
        stamps[3, row] = text
        value[row] = number
        status[row] = code
        row += 1
    notes[0], notes[1] = found, highest
    return at


@kernel(types.int64(RAW, _PLACE, _PLACE, types.int64), cache=True)
def after(raw, at, end, kind):
    """Return the position after one value of a built-in type (its number in Part 6, 5.1.2); -1 where it does not fit.

    raw uint8[n]; 0 <= at <= end <= n; kind: no Null, Variant or DataValue
    """
    return _after_one(raw, at, end, kind)


@kernel(types.int64(RAW, _PLACE, _PLACE, types.int64), cache=True)
def after_array(raw, at, end, kind):
    """Return the position after an array of a built-in type, its length included; as `after`."""
    if at + 4 > end:
        return np.int64(-1)
    count = _i4(raw, at)
    at += 4
    if count < -1 or count > end - at:
        return np.int64(-1)
    for _ in range(count):
        at = _after_one(raw, at, end, kind)
        if at < 0:
            return np.int64(-1)
    return at
