"""Rows of a recording as blobs and back: a chunk is some hundred to some thousand rows in one database row.

One database row per sample would cost more for its header than for its values and make reading back slow; the
writer appends one small plain chunk per commit and later merges them into large compressed ones (byte planes,
deflate level 1). What is the same everywhere (all valid, all Good, no gap, seq counting up) is not stored.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, Int64, UInt8, UInt32

PLAIN, DEFLATED = 0, 1
SMALL, MERGED, THINNED, NEAR_EVENT = 0, 1, 2, 3  # column `level`
CHUNK_BYTES = 262_144  # of values; large enough for deflate, small enough for a bounded step of the writer
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096

CHUNK_COLUMNS = (
    "recording_id",
    "first_seq",
    "row_count",
    "first_ns",
    "last_ns",
    "written_ns",
    "level",
    "codec",
    "bytes",
    "source_ns",
    "value_blob",
    "seq",
    "valid",
    "status",
    "gap",
    "truth",
)
INSERT_CHUNK = (
    f"INSERT INTO row_chunks ({', '.join(CHUNK_COLUMNS)}) VALUES ({', '.join('?' * len(CHUNK_COLUMNS))})"
)
SELECT_CHUNK = "SELECT id, first_seq, row_count, codec, source_ns, value_blob, seq, valid, status, gap, truth"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one recording as arrays.

    seq : int64[n]; number of the row since the start of the recording, strictly increasing; a jump = rows
    missing
    source_ns : int64[n]; strictly increasing
    values : float64[n, k]; valid : uint8[n, k]; status : uint32[n, k]
    gap : uint8[n]; truth : uint8[n] or None
    """

    seq: Int64
    source_ns: Int64
    values: Float64
    valid: UInt8
    status: UInt32
    gap: UInt8
    truth: UInt8 | None

    def __len__(self) -> int:
        return len(self.seq)

    def take(self, index: slice | NDArray[Any]) -> Rows:
        """Return the rows of a slice or index."""
        return Rows(
            self.seq[index],
            self.source_ns[index],
            self.values[index],
            self.valid[index],
            self.status[index],
            self.gap[index],
            None if self.truth is None else self.truth[index],
        )


def chunk_rows(n_tags: int) -> int:
    """Return how many rows of `n_tags` tags a merged chunk holds."""
    return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, CHUNK_BYTES // (8 * max(1, n_tags))))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    truth = [part.truth for part in parts if part.truth is not None]
    return Rows(
        np.concatenate([part.seq for part in parts]),
        np.concatenate([part.source_ns for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.valid for part in parts]),
        np.concatenate([part.status for part in parts]),
        np.concatenate([part.gap for part in parts]),
        np.concatenate(truth) if len(truth) == len(parts) else None,
    )


def _planes(array: NDArray[Any]) -> bytes:
    """Deflate the byte planes (first bytes, second bytes ...): exponents stand together and shrink."""
    flat = np.ascontiguousarray(array.T)  # one tag after the other
    planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, array.itemsize).T)
    return zlib.compress(planes.data, 1)


def _from_planes(blob: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(zlib.decompress(blob), np.uint8).reshape(size, -1)
    flat = np.ascontiguousarray(planes.T).view(dtype).reshape(shape[::-1])
    return np.ascontiguousarray(flat.T)


def _encode(array: NDArray[Any], codec: int) -> bytes:
    return _planes(array) if codec == DEFLATED else array.tobytes()


def _decode(blob: bytes, codec: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if codec == DEFLATED:
        return _from_planes(blob, dtype, shape)
    return np.frombuffer(blob, dtype).reshape(shape)


def encode(rows: Rows, recording_id: int, written_ns: int, level: int, codec: int) -> tuple[Any, ...]:
    """Return the parameters of `INSERT_CHUNK` for these rows (at least one).

    written_ns : int; when they were recorded, on our clock: what retention counts their age from
    """
    source_ns = np.ascontiguousarray(rows.source_ns, "<i8")
    if codec == DEFLATED:  # distances compress to almost nothing on a regular grid
        source_ns = np.diff(source_ns, prepend=np.int64(0))
    contiguous = int(rows.seq[-1]) - int(rows.seq[0]) == len(rows) - 1
    blobs: list[bytes | None] = [
        _encode(source_ns, codec),
        _encode(np.ascontiguousarray(rows.values, "<f8"), codec),
        None if contiguous else _encode(np.ascontiguousarray(rows.seq, "<i8"), codec),
        None if (rows.valid == 1).all() else _encode(np.ascontiguousarray(rows.valid, np.uint8), codec),
        None if not rows.status.any() else _encode(np.ascontiguousarray(rows.status, "<u4"), codec),
        None if not rows.gap.any() else _encode(np.ascontiguousarray(rows.gap, np.uint8), codec),
        None if rows.truth is None else _encode(np.ascontiguousarray(rows.truth, np.uint8), codec),
    ]
    size = sum(len(blob) for blob in blobs if blob is not None)
    return (
        recording_id,
        int(rows.seq[0]),
        len(rows),
        int(rows.source_ns[0]),
        int(rows.source_ns[-1]),
        written_ns,
        level,
        codec,
        size,
        *blobs,
    )


def decode(stored: Sequence[Any], n_tags: int) -> Rows:
    """Return the rows of a `SELECT_CHUNK` result; ValueError or zlib.error where a blob is damaged."""
    _, first_seq, n, codec, source_blob, value_blob, seq, valid, status, gap, truth = stored
    source_ns = _decode(source_blob, codec, "<i8", (n,))
    if codec == DEFLATED:
        source_ns = np.cumsum(source_ns)
    return Rows(
        np.arange(first_seq, first_seq + n, dtype=np.int64)
        if seq is None
        else _decode(seq, codec, "<i8", (n,)),
        source_ns,
        _decode(value_blob, codec, "<f8", (n, n_tags)),
        np.ones((n, n_tags), np.uint8) if valid is None else _decode(valid, codec, "|u1", (n, n_tags)),
        np.zeros((n, n_tags), np.uint32) if status is None else _decode(status, codec, "<u4", (n, n_tags)),
        np.zeros(n, np.uint8) if gap is None else _decode(gap, codec, "|u1", (n,)),
        None if truth is None else _decode(truth, codec, "|u1", (n,)),
    )


def split(rows: Rows, size: int) -> Iterator[Rows]:
    """Yield the rows in nearly equal parts of at most `size` rows."""
    parts = -(-len(rows) // size)
    for k in range(parts):
        yield rows.take(slice(k * len(rows) // parts, (k + 1) * len(rows) // parts))


def merge_small(conn: sqlite3.Connection, recording_id: int, n_tags: int, limit: int) -> int:
    """Replace the oldest `limit` small chunks of a recording by merged ones, inside the caller's transaction.

    Returns the number of small chunks replaced.
    """
    stored = conn.execute(
        f"{SELECT_CHUNK}, written_ns FROM row_chunks WHERE recording_id = ? AND level = ? "
        "ORDER BY first_seq LIMIT ?",
        (recording_id, SMALL, limit),
    ).fetchall()
    if not stored:
        return 0
    rows = concatenate([decode(chunk[:-1], n_tags) for chunk in stored])
    written_ns = max(chunk[-1] for chunk in stored)
    conn.executemany("DELETE FROM row_chunks WHERE id = ?", [(chunk[0],) for chunk in stored])
    conn.executemany(
        INSERT_CHUNK,
        (
            encode(part, recording_id, written_ns, MERGED, DEFLATED)
            for part in split(rows, chunk_rows(n_tags))
        ),
    )
    return len(stored)
