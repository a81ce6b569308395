"""Reads a HistoryReadResponse into columns, of an array as many of its elements as there are tags.

As `wire_decode` reads the other answers: a compiled walk (`kernels.wire`) over the values of each node, whatever types,
status words and stamps they are mixed of. The walk picks one element of an array, so the values of a node are walked
once more for each further one. Source: OPC UA Part 4, 5.11.3; Part 11, 6.5 and 7.2 (HistoryData).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from asyncua import ua
from numpy.typing import NDArray

from ..kernels import wire as _kernel
from .wire_columns import MOST_SAMPLES, Columns, Samples
from .wire_decode import NO_ELEMENTS, _after, _block, _broken, _number_of_type, _opened

MOST_NODES = 10_000  # in one response
SCALAR = (-1,)  # what is asked of a node that is no array
_HISTORY_READ = int(ua.ObjectIds.HistoryReadResponse_Encoding_DefaultBinary)
_HISTORY_DATA = frozenset(
    {
        int(ua.ObjectIds.HistoryData_Encoding_DefaultBinary),
        int(ua.ObjectIds.HistoryModifiedData_Encoding_DefaultBinary),  # begins with the same values
    }
)
_BYTES, _DIAGNOSTIC = 15, 25  # numbers of built-in types, Part 6, 5.1.2
_U4, _I4 = struct.Struct("<I"), struct.Struct("<i")
_NAME = "HistoryReadResponse"


@dataclass(slots=True)
class HistoryPage:
    """What one node answered: its StatusCode, the point where the next page begins, its samples.

    samples : of the first element that was asked for, or of the scalar; further : of the other elements, in the order
        in which they were asked for; all have the same rows and stamps
    """

    status: int
    continuation: bytes | None
    samples: Samples
    further: tuple[Samples, ...] = ()


def decode_history(body: Any, elements: Sequence[Sequence[int]] = ()) -> list[HistoryPage]:
    """Decode a HistoryReadResponse (Part 4, 5.11.3), one page per node.

    elements : of each node, in the order of the request, the places in its flattened array, -1 for a scalar (`SCALAR`);
        empty: all are scalars. What an array does not have is NaN, with the status that the server gave

    Raises UaStatusCodeError for a ServiceFault or a Bad result, ConnectionProblem where the answer does not fit the
    request or is no OPC UA.
    """
    raw = bytes(body)
    at = _opened(_NAME, raw, _HISTORY_READ)
    view = np.frombuffer(raw, np.uint8)
    pages: list[HistoryPage] = []
    left = MOST_SAMPLES
    try:
        (count,) = _I4.unpack_from(raw, at)
        at += 4
        if count > MOST_NODES or (elements and max(0, count) != len(elements)):
            _broken(_NAME, at, raw, f"it claims {count} nodes")
        for k in range(count):
            wanted = elements[k] if elements else SCALAR
            (status,) = _U4.unpack_from(raw, at)
            point_at = at + 4
            at = _after(_NAME, raw, point_at, _BYTES)
            number, body_at, stop = _frame(raw, at)
            n = max(0, _I4.unpack_from(raw, body_at)[0]) if number in _HISTORY_DATA and body_at < stop else 0
            if n * len(wanted) > left or n > stop - body_at:
                _broken(_NAME, body_at, raw, f"a node claims {n} values")
            left -= n * len(wanted)
            read = [_values(raw, view, body_at, stop, n, element) for element in wanted]
            pages.append(HistoryPage(status, raw[point_at + 4 : at] or None, read[0], tuple(read[1:])))
            at = stop
    except struct.error:
        _broken(_NAME, at, raw, "it ends too early")
    _after(_NAME, raw, at, _DIAGNOSTIC, array=True)
    return pages


def _values(raw: bytes, view: NDArray[np.uint8], at: int, stop: int, n: int, element: int) -> Samples:
    """Read the `n` DataValues of a HistoryData, of arrays one element."""
    columns = Columns(n)
    picked = NO_ELEMENTS if element < 0 else np.full(n, element, np.int32)  # the walk takes the row as the handle
    if n and _kernel.data_values(
        view, at + 4, stop, n, False, 0, picked, columns.stamps, columns.value, columns.status, columns.notes
    ) < 0:
        _broken(_NAME, at, raw, "its values are not readable")
    columns.stamps[0], columns.notes[1] = 0, min(n, 1) - 1
    return columns.view(n, raw)


def _frame(raw: bytes, at: int) -> tuple[int, int, int]:
    """Read the frame of the HistoryData of a node; servers without any leave out the body."""
    number, after = _number_of_type(_NAME, raw, at)
    if after < len(raw) and raw[after] == 0:
        return number, after + 1, after + 1
    return _block(_NAME, raw, at)
