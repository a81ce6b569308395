"""Reading the store: on connections of its own, from any thread, beside the writer and other processes.

Each call reads one snapshot of the database and ends its transaction before it returns, so that readers
never hold up the checkpoints of the writer.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import sqlite_utils

from ..api import Record, UInt32
from ..errors import StoreError
from .chunks import SELECT_CHUNK, THINNED, Rows, concatenate, decode
from .entries import (
    AuditEntry,
    Event,
    FeedbackEntry,
    StoredModel,
    StoredRecording,
    StoredRun,
    Trend,
    Usage,
    causes_from_json,
    tags_from_json,
)
from .schema import connect, quick_check, store_error

_FIRST, _LAST = -(1 << 63), (1 << 63) - 1
_RECORDINGS = f"""
    SELECT r.*, c.row_count, c.first_ns, c.last_ns, c.thinned FROM recordings r LEFT JOIN (
        SELECT recording_id, sum(row_count) AS row_count, min(first_ns) AS first_ns, max(last_ns) AS last_ns,
               max(level = {THINNED}) AS thinned
        FROM row_chunks GROUP BY recording_id) c ON c.recording_id = r.id"""
# content of a row plus about what SQLite adds to it (header, key, cell pointer)
_USAGE = {
    "raw": "SELECT coalesce(sum(bytes + 64), 0) FROM row_chunks",
    "trend": "SELECT (SELECT count(*) * 52 FROM trend) + (SELECT count(*) * 28 FROM trend_detail)",
    "events": "SELECT coalesce(sum(60 + length(cast(monitor || model_id || sentence || causes AS BLOB))), 0) "
    "FROM events",
    "feedback": "SELECT coalesce(sum(48 + length(cast(who || label || monitor || tags || comment || model_id "
    "AS BLOB))), 0) FROM feedback",
    "audit": "SELECT coalesce(sum(24 + length(cast(who || action || detail AS BLOB))), 0) FROM audit",
    "models": "SELECT coalesce(sum(32 + length(cast(model_id || monitor || path || sha256 || header "
    "AS BLOB))), 0) FROM models",
    "runs": "SELECT coalesce(sum(32 + length(cast(version || config_hash || end_reason AS BLOB))), 0) "
    "FROM runs",
}


class Reader:
    """Read access to a store file; safe to share between threads.

    Raises
    ------
    StoreError
        From every method: the file cannot be read, is damaged, or what was asked for is not there.
    """

    def __init__(self, path: Path, busy_timeout_s: float = 2.0) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._idle: list[sqlite_utils.Database] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close the connections that are not in use; those in use close when their call returns."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite_utils.Database]:
        """Borrow a read connection, inside one snapshot of the database."""
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed", where=str(self.path), next_step="open it again")
            db = self._idle.pop() if self._idle else None
        try:
            if db is None:
                db = connect(self.path, create=False, busy_timeout_s=self._busy_timeout_s)
                db.execute("PRAGMA query_only = ON")
            db.conn.execute("BEGIN")
            yield db
            db.conn.execute("COMMIT")
        except BaseException as exc:
            if db is not None:
                db.close()  # whatever went wrong, the next call starts with a fresh one
            if isinstance(exc, sqlite3.Error):
                raise store_error(exc, self.path) from exc
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(db)
                return
        db.close()

    # ---- rows

    def recordings(self) -> list[StoredRecording]:
        """Return all recordings, oldest first."""
        with self.reading() as db:
            return [_recording(row) for row in db.query(f"{_RECORDINGS} ORDER BY r.id")]

    def recording(self, key: int | str) -> StoredRecording:
        """Return one recording by number or name; the error lists the names that exist."""
        with self.reading() as db:
            return self._find(db, key)

    def _find(self, db: sqlite_utils.Database, key: int | str) -> StoredRecording:
        column = "name" if isinstance(key, str) else "id"
        for row in db.query(f"{_RECORDINGS} WHERE r.{column} = ?", [key]):
            return _recording(row)
        names = [
            row[0] for row in db.execute("SELECT name FROM recordings ORDER BY id DESC LIMIT 10").fetchall()
        ]
        known = ", ".join(repr(name) for name in names)
        raise StoreError(
            f"there is no recording {key!r}",
            where=str(self.path),
            next_step=f"use one of {known}" if names else "record something first",
        )

    def _rows(self, key: int | str, start_ns: int | None, end_ns: int | None) -> tuple[StoredRecording, Rows]:
        first = _FIRST if start_ns is None else start_ns
        end = _LAST if end_ns is None else end_ns
        with self.reading() as db:
            found = self._find(db, key)
            stored = db.execute(
                f"{SELECT_CHUNK} FROM row_chunks WHERE recording_id = ? AND last_ns >= ? "
                "AND first_ns < ? ORDER BY first_seq",
                [found.id, first, end],
            ).fetchall()
        k = len(found.tags)
        parts = []
        for chunk in stored:
            try:
                parts.append(decode(chunk, k))
            except (ValueError, zlib.error) as exc:
                raise StoreError(
                    f"rows {chunk[1]} to {chunk[1] + chunk[2] - 1} of recording {found.name!r} are "
                    f"damaged ({exc})",
                    where=str(self.path),
                    next_step="read the time before and after them, or restore a backup",
                ) from exc
        if not parts:
            none = np.empty(0, np.int64)
            empty = np.empty((0, k))
            return found, Rows(
                none,
                none,
                empty,
                empty.astype(np.uint8),
                empty.astype(np.uint32),
                none.astype(np.uint8),
                none.astype(np.uint8) if found.truth else None,
            )
        rows = concatenate(parts)
        return found, rows.take(slice(*np.searchsorted(rows.source_ns, [first, end]).tolist()))

    def read_recording(
        self, key: int | str, start_ns: int | None = None, end_ns: int | None = None
    ) -> Record:
        """Return the rows of a recording with start_ns <= source_ns < end_ns.

        Row 0, rows recorded after a gap and rows whose neighbour is missing (dropped, thinned) have gap = 1.
        """
        found, rows = self._rows(key, start_ns, end_ns)
        gap = rows.gap.copy()
        if len(rows):
            gap[0] = 1
            gap[1:] |= (np.diff(rows.seq) != 1).astype(np.uint8)
        return Record(
            found.tags,
            found.period_ns,
            _own(rows.source_ns),
            _own(rows.values),
            _own(rows.valid),
            gap,
            None if rows.truth is None else _own(rows.truth),
        )

    def read_status(self, key: int | str, start_ns: int | None = None, end_ns: int | None = None) -> UInt32:
        """Return uint32[n, n_tags]: the OPC UA StatusCodes of the rows that `read_recording` returns."""
        return _own(self._rows(key, start_ns, end_ns)[1].status)

    # ---- events, trend, and what is kept for ever

    def events(
        self,
        monitor: str | None = None,
        start_ns: int | None = None,
        end_ns: int | None = None,
        limit: int | None = None,
    ) -> list[Event]:
        """Return events that stood at some time in [start_ns, end_ns), newest first."""
        where, values = _where(
            ("monitor = ?", monitor),
            ("coalesce(cleared_ns, 9223372036854775807) >= ?", start_ns),
            ("raised_ns < ?", end_ns),
        )
        with self.reading() as db:
            return [
                _event(row)
                for row in db.query(
                    f"SELECT * FROM events {where} ORDER BY raised_ns DESC, id DESC LIMIT ?",
                    [*values, -1 if limit is None else limit],
                )
            ]

    def last_event_no(self, monitor: str) -> int:
        """Return the highest event number of a monitor (0 = none), so that a new run counts on."""
        with self.reading() as db:
            return int(
                db.execute(
                    "SELECT coalesce(max(event_no), 0) FROM events WHERE monitor = ?", [monitor]
                ).fetchone()[0]
            )

    def trend(
        self, monitor: str, start_ns: int | None = None, end_ns: int | None = None, run_id: int | None = None
    ) -> Trend:
        """Return the scores of a monitor in time order, one per bucket (1 s; older ones 60 s, 3600 s)."""
        where, values = _where(
            ("s.monitor = ?", monitor),
            ("t.bucket_ns + t.width_ns > ?", start_ns),
            ("t.bucket_ns < ?", end_ns),
            ("s.run_id = ?", run_id),
        )
        with self.reading() as db:
            return _trend(
                db.execute(
                    "SELECT bucket_ns, score_min, score_max, score_last, status, alert, row_count "
                    f"FROM trend t JOIN trend_series s ON s.id = t.series_id {where} ORDER BY bucket_ns",
                    values,
                ).fetchall()
            )

    def trend_detail(
        self, monitor: str, start_ns: int | None = None, end_ns: int | None = None, run_id: int | None = None
    ) -> Trend:
        """Return the scores of a monitor row by row, as far as they are kept (around alerts)."""
        where, values = _where(
            ("s.monitor = ?", monitor),
            ("t.source_ns >= ?", start_ns),
            ("t.source_ns < ?", end_ns),
            ("s.run_id = ?", run_id),
        )
        with self.reading() as db:
            return _trend(
                db.execute(
                    "SELECT source_ns, score, score, score, status, alert, 1 FROM trend_detail t "
                    f"JOIN trend_series s ON s.id = t.series_id {where} ORDER BY source_ns",
                    values,
                ).fetchall()
            )

    def models(self, monitor: str | None = None) -> list[StoredModel]:
        """Return the registered models, newest first."""
        where, values = _where(("monitor = ?", monitor))
        with self.reading() as db:
            return [
                StoredModel(
                    row["model_id"],
                    row["monitor"],
                    row["path"],
                    row["sha256"],
                    row["created_ns"],
                    json.loads(row["header"]),
                )
                for row in db.query(f"SELECT * FROM models {where} ORDER BY created_ns DESC", values)
            ]

    def runs(self) -> list[StoredRun]:
        """Return all runs, newest first."""
        with self.reading() as db:
            return [
                StoredRun(**row)
                for row in db.query(
                    "SELECT id, started_ns, ended_ns, version, config_hash, end_reason FROM runs "
                    "ORDER BY id DESC"
                )
            ]

    def feedback(self, monitor: str | None = None, event_no: int | None = None) -> list[FeedbackEntry]:
        """Return what operators said, newest first."""
        where, values = _where(("monitor = ?", monitor), ("event_no = ?", event_no))
        with self.reading() as db:
            return [
                FeedbackEntry(**{**row, "tags": tuple(json.loads(row["tags"]))})
                for row in db.query(f"SELECT * FROM feedback {where} ORDER BY id DESC", values)
            ]

    def unanswered_feedback(self, action: str) -> list[FeedbackEntry]:
        """Return feedback that no audit entry of this action names by its number (`feedback`), oldest first."""
        with self.reading() as db:
            return [
                FeedbackEntry(**{**row, "tags": tuple(json.loads(row["tags"]))})
                for row in db.query(
                    "SELECT * FROM feedback WHERE id NOT IN (SELECT answered FROM (SELECT "
                    "json_extract(detail, '$.feedback') AS answered FROM audit WHERE action = ?) "
                    "WHERE answered IS NOT NULL) ORDER BY id",
                    [action],
                )
            ]

    def audit(self, action: str | None = None, limit: int | None = None) -> list[AuditEntry]:
        """Return the audit trail, newest first."""
        where, values = _where(("action = ?", action))
        with self.reading() as db:
            return [
                AuditEntry(**{**row, "detail": json.loads(row["detail"])})
                for row in db.query(
                    f"SELECT * FROM audit {where} ORDER BY id DESC LIMIT ?",
                    [*values, -1 if limit is None else limit],
                )
            ]

    # ---- the file

    def measure(self, quota_bytes: int | None, unmet: bool) -> Usage:
        """Return the bytes in use by class of table."""
        with self.reading() as db:
            pages, free, size = (
                int(db.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_count", "freelist_count", "page_size")
            )
            used = {name: int(db.execute(sql).fetchone()[0]) for name, sql in _USAGE.items()}
        total = (pages - free) * size
        raw, trend = used.pop("raw"), used.pop("trend")
        protected = sum(used.values())
        wal = self.path.with_name(self.path.name + "-wal")
        return Usage(
            total,
            raw,
            trend,
            protected,
            total - raw - trend - protected,
            free * size,
            wal.stat().st_size if wal.exists() else 0,
            quota_bytes,
            unmet or (quota_bytes is not None and total > quota_bytes),
        )

    def verify(self) -> None:
        """Read the whole file (SQLite's integrity_check); StoreError where it is damaged."""
        with self.reading() as db:
            quick_check(db, self.path, full=True)


def _own(array: Any) -> Any:
    """Return the array itself where it may be written, else a copy (blobs are read-only)."""
    return np.array(array) if not array.flags.writeable or not array.flags.c_contiguous else array


def _where(*conditions: tuple[str, Any]) -> tuple[str, list[Any]]:
    used = [(text, value) for text, value in conditions if value is not None]
    return ("WHERE " + " AND ".join(text for text, _ in used) if used else ""), [value for _, value in used]


def _recording(row: dict[str, Any]) -> StoredRecording:
    return StoredRecording(
        id=row["id"],
        name=row["name"],
        group=row["group_name"],
        server=row["server"],
        tags=tags_from_json(row["tags"]),
        period_ns=row["period_ns"],
        started_ns=row["started_ns"],
        ended_ns=row["ended_ns"],
        note=row["note"],
        truth=bool(row["truth"]),
        keep=bool(row["keep"]),
        rows=row["row_count"] or 0,
        first_ns=row["first_ns"],
        last_ns=row["last_ns"],
        thinned=bool(row["thinned"]),
    )


def _event(row: dict[str, Any]) -> Event:
    named = {key: value for key, value in row.items() if key != "id"}
    named["causes"] = causes_from_json(named["causes"])
    named["peak_score"] = math.nan if named["peak_score"] is None else named["peak_score"]
    return Event(**named)


def _trend(rows: list[tuple[Any, ...]]) -> Trend:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 7
    low, high, last = (
        np.array([math.nan if value is None else value for value in column], np.float64)
        for column in columns[1:4]
    )
    return Trend(
        np.array(columns[0], np.int64),
        low,
        high,
        last,
        np.array(columns[4], np.uint32),
        np.array(columns[5], np.uint8),
        np.array(columns[6], np.int64),
    )
