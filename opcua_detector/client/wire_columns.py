"""Values of an answer as columns: what the decoders fill, and what everybody else reads.

`Columns` is the room, made once and used for every answer; `Samples` is what one answer has put there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..kernels import wire as _kernel

NO_STAMP = _kernel.NO_STAMP
NOTE_STATUS, NOTE_NO_STAMP, NOTE_TEXT = _kernel.NOTE_STATUS, _kernel.NOTE_NO_STAMP, _kernel.NOTE_TEXT
NOTE_UNKNOWN = NOTE_STATUS | NOTE_NO_STAMP | NOTE_TEXT
MOST_SAMPLES = 2_000_000  # in one answer: 88 MB of columns
_I4 = struct.Struct("<i")


@dataclass(slots=True)
class Samples:
    """DataValues as columns.

    handle : int64[m] ClientHandle (place in a ReadResponse, 0 in history), source_ns, server_ns : int64[m] (NO_STAMP:
    null), value : float64[m] (NaN: none or no number; a DateTime is seconds since 1970, a text its CRC-32),
    status : uint32[m], text_at : int64[m] position of a text in `raw` (-1: none)
    notes : what is among them (NOTE_STATUS: a StatusCode that is not plain Good, NOTE_NO_STAMP: a null source stamp,
    NOTE_TEXT), so that nobody has to look where nothing is; a bit too many is no error
    highest : handle; -1 where it is not known
    """

    handle: NDArray[np.int64]
    source_ns: NDArray[np.int64]
    server_ns: NDArray[np.int64]
    value: NDArray[np.float64]
    status: NDArray[np.uint32]
    text_at: NDArray[np.int64] | None = field(default=None, kw_only=True)
    raw: bytes = field(default=b"", kw_only=True)
    notes: int = field(default=NOTE_UNKNOWN, kw_only=True)
    highest: int = field(default=-1, kw_only=True)

    def text(self, row: int) -> str | None:
        """Return the text of a value that is a String; None for any other."""
        at = -1 if self.text_at is None else int(self.text_at[row])
        if at < 0:
            return None
        (size,) = _I4.unpack_from(self.raw, at)
        return self.raw[at + 4 : at + 4 + size].decode("utf-8", "replace")


class Columns:
    """Room for the values of one answer, made once and used for every answer; grows to the largest seen.

    stamps : int64[4, capacity] handle, source ns, server ns, position of a text
    value : float64[capacity], status : uint32[capacity], notes : int64[2], see `kernels.wire.data_values`
    """

    __slots__ = ("_shown", "notes", "stamps", "status", "value")

    def __init__(self, capacity: int = 256) -> None:
        self.stamps: NDArray[np.int64] = np.empty((4, capacity), np.int64)
        self.value: NDArray[np.float64] = np.empty(capacity, np.float64)
        self.status: NDArray[np.uint32] = np.empty(capacity, np.uint32)
        self.notes: NDArray[np.int64] = np.array([0, -1], np.int64)
        self._shown: Samples | None = None

    def reserve(self, rows: int, kept: int) -> None:
        """Make room for `rows`, of which the first `kept` are filled."""
        if kept == 0:
            self.notes[0], self.notes[1] = 0, -1
        if rows <= len(self.value):
            return
        grown = Columns(max(rows, min(2 * len(self.value), MOST_SAMPLES)))
        grown.stamps[:, :kept] = self.stamps[:, :kept]
        grown.value[:kept], grown.status[:kept] = self.value[:kept], self.status[:kept]
        self.stamps, self.value, self.status = grown.stamps, grown.value, grown.status
        self._shown = None

    def view(self, rows: int, raw: bytes) -> Samples:
        """Return the first rows as Samples; they hold until these columns are filled again."""
        last = self._shown
        if last is None or len(last.value) != rows:  # most answers have as many values as the one before
            stamps = self.stamps[:, :rows]
            last = Samples(stamps[0], stamps[1], stamps[2], self.value[:rows], self.status[:rows], text_at=stamps[3])
            self._shown = last
        return Samples(
            last.handle, last.source_ns, last.server_ns, last.value, last.status, text_at=last.text_at, raw=raw,
            notes=int(self.notes[0]), highest=int(self.notes[1]),
        )
