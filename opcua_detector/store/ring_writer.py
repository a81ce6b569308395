"""From rings to tables inside a transaction: rows as chunks of a recording, verdicts as trend.

What is written becomes true of a recording only once the transaction is committed: an attempt that fails leaves rings
and recordings as they were, and is made again.
"""

from __future__ import annotations

import itertools
import logging
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .chunks import INSERT_CHUNK, MERGED, PLAIN, SMALL, Rows, chunk_rows, encode, merge_small, split
from .rings import Recording, VerdictRing
from .trend import AlertSurroundings, series_id, write_buckets, write_detail

log = logging.getLogger(__name__)

SMALL_CHUNKS = 256  # merged at the latest then, so that slow groups do not leave one database row per sample


@dataclass(slots=True)
class Written:
    """What becomes true of a recording once the transaction is committed."""

    recording: Recording
    head: int
    id: int
    name: str
    last_ns: int
    small_rows: int
    small_chunks: int
    written: int
    ended: bool


class RingWriter:
    """Writes rings; the writer thread alone uses it, inside a transaction of its own."""

    def __init__(self, path: Path, clock_ns: Callable[[], int]) -> None:
        self.path, self._clock_ns = path, clock_ns
        self._surroundings: dict[tuple[int, str], AlertSurroundings] = {}
        self._open: dict[tuple[int, str], AlertSurroundings] = {}

    def begin(self) -> None:
        """Start a transaction."""
        self._open = {}

    def committed(self) -> None:
        """Take as true what the transaction wrote of verdicts."""
        self._surroundings.update(self._open)

    def write_verdicts(self, conn: sqlite3.Connection, run_id: int, ring: VerdictRing, head: int) -> int:
        """Write the verdicts of a monitor's ring up to `head`; return how many."""
        scores = ring.peek(head)
        key = (run_id, ring.monitor)
        series = series_id(conn, *key, self._clock_ns() - int(scores.source_ns[-1]))
        write_buckets(conn, series, scores)
        detail, self._open[key] = self._surroundings.get(key, AlertSurroundings()).choose(scores)
        write_detail(conn, series, detail)
        return len(scores)

    def write_rows(self, conn: sqlite3.Connection, recording: Recording, head: int) -> Written:
        """Write the rows of a recording's ring up to `head`; nothing of the recording changes yet."""
        done = Written(
            recording,
            head,
            recording.id,
            recording.name,
            recording.last_ns,
            recording.small_rows,
            recording.small_chunks,
            head - recording.ring.tail,
            recording.ending,
        )
        if done.written:
            rows = recording.ring.peek(head)
            for k, part in enumerate(_increasing(rows)):
                if k or int(part.source_ns[0]) <= recording.last_ns:
                    self._continue_elsewhere(conn, recording, done)
                self._append(conn, recording, done, part)
        if (
            done.ended
            or done.small_chunks >= SMALL_CHUNKS
            or done.small_rows >= chunk_rows(len(recording.tags))
        ):
            self._merge(conn, recording, done)
        if done.ended:
            conn.execute("UPDATE recordings SET ended_ns = ? WHERE id = ?", (self._clock_ns(), done.id))
        return done

    def _append(self, conn: sqlite3.Connection, recording: Recording, done: Written, rows: Rows) -> None:
        now_ns = self._clock_ns()
        parts = list(split(rows, chunk_rows(len(recording.tags))))
        conn.executemany(INSERT_CHUNK, [encode(part, done.id, now_ns, SMALL, PLAIN) for part in parts])
        done.small_chunks += len(parts)
        done.small_rows += len(rows)
        done.last_ns = int(rows.source_ns[-1])

    def _merge(self, conn: sqlite3.Connection, recording: Recording, done: Written) -> None:
        conn.execute("SAVEPOINT merge")
        try:
            while merge_small(conn, done.id, len(recording.tags), SMALL_CHUNKS):
                pass
        except (ValueError, zlib.error) as exc:  # a damaged chunk must not stop the recording
            conn.execute("ROLLBACK TO merge")
            conn.execute(
                "UPDATE row_chunks SET level = ? WHERE recording_id = ? AND level = ?",
                (MERGED, done.id, SMALL),
            )
            log.error("store %s: rows of recording %s cannot be merged: %s", self.path, done.name, exc)
        conn.execute("RELEASE merge")
        done.small_rows = done.small_chunks = 0

    def _continue_elsewhere(self, conn: sqlite3.Connection, recording: Recording, done: Written) -> None:
        """The source clock went back: time increases within a recording, so the rest becomes a new one."""
        self._merge(conn, recording, done)
        now_ns = self._clock_ns()
        conn.execute("UPDATE recordings SET ended_ns = ? WHERE id = ?", (now_ns, done.id))
        name = free_name(conn, recording.first_name)
        added = conn.execute(
            "INSERT INTO recordings "
            "(name, group_name, server, tags, period_ns, started_ns, truth, keep, note) "
            "SELECT ?, group_name, server, tags, period_ns, ?, truth, keep, ? FROM recordings WHERE id = ?",
            (
                name,
                now_ns,
                f"continues {done.name}: the source clock went back",
                done.id,
            ),
        )
        log.warning(
            "store %s: the source clock of recording %s went back; it continues as %s",
            self.path,
            done.name,
            name,
        )
        done.id, done.name = int(added.lastrowid or 0), name


def _increasing(rows: Rows) -> list[Rows]:
    """Cut rows where time does not increase."""
    cuts = (rows.source_ns[1:] <= rows.source_ns[:-1]).nonzero()[0] + 1
    borders = [0, *cuts.tolist(), len(rows)]
    return [rows.take(slice(a, b)) for a, b in itertools.pairwise(borders)]


def free_name(conn: sqlite3.Connection, name: str) -> str:
    """Return `name`, or `name (2)`, `name (3)` ... where it is taken."""
    candidate, k = name, 1
    while conn.execute("SELECT 1 FROM recordings WHERE name = ?", (candidate,)).fetchone():
        k += 1
        candidate = f"{name} ({k})"
    return candidate
