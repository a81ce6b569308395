"""The store as the rest of the product sees it: open, offers from the loop, recordings, retention."""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import sqlite_utils

from ..api import Frame, Record, Tag, UInt32, Verdict
from ..errors import StoreError
from .chunks import DEFLATED, INSERT_CHUNK, MERGED, MIN_CHUNK_ROWS, Rows, chunk_rows, encode, split
from .entries import (
    AuditEntry,
    StoreCounters,
    StoredRecording,
    Usage,
    tags_to_json,
)
from .entry_writer import CALL_TIMEOUT_S, EntryWriter, insert_audit
from .opening import make_folder, open_beside, open_for_writing, set_aside
from .recorder import Recorder
from .retention import Retention
from .ring_writer import free_name
from .rings import Recording, RowRing
from .schema import MIGRATIONS, DamagedStore, Migration, Synchronous, check_file, store_error
from .tasks import WriterSettings
from .writer_lock import WriterLock


class Store(EntryWriter):
    """Recordings, events, trend, feedback, audit, models and runs in one SQLite file.

    One process writes (a lock beside the file sees to it), any number read. Within it one thread owns the
    write connection; `offer_row` and `offer_verdict` are for the loop: one thread calls them, they copy into
    a ring and return, they never wait, raise or log. Everything else may be called from any thread.

    What can be lost
    ----------------
    * The process is killed (kill -9) or crashes: what was offered since the last commit, that is at most
      `commit_interval_s` (0.5 s) plus the duration of one commit. `committed_seq` is the number of the last
      item that cannot be lost this way. Nothing is corrupted.
    * Power failure or crash of the operating system, with `synchronous="normal"` (default): at most what was
      offered since the last checkpoint: `sync_interval_s` (5 s) + `commit_interval_s` (0.5 s) + the duration
      of one commit and one checkpoint, 5.5 s plus some milliseconds on a disk that keeps up. `synced_seq` is
      the number of the last item that cannot be lost this way. The file is not corrupted: SQLite's log is
      checksummed and replayed up to the last whole transaction. A reader of another program that keeps one
      read transaction open for longer holds back checkpoints, and `synced_seq` shows that.
    * The same with `synchronous="full"`: each commit is flushed, so `synced_seq` is `committed_seq`
      and the window is `commit_interval_s` plus the duration of one commit. It costs a disk flush per commit.
    * Both hold as far as the disk does not lie about flushing. Events, feedback, audit, models and runs
      are committed in the same batches; the calls that wait (`feedback`, `audit`, `register_model`,
      `start_run`, `start_recording`, `write_record`) return after the commit.
    * While the disk is full or the file locked, batches are kept in the rings and tried again; when a ring is
      full, new rows or verdicts are dropped and counted (`counters.dropped_rows`), and reading shows a gap
      there.
    """

    def __init__(
        self,
        path: Path,
        retention: Retention,
        clock_ns: Callable[[], int],
        lock: WriterLock | None,
        writer: Recorder | None,
        settings: WriterSettings,
    ) -> None:
        super().__init__(path, settings.busy_timeout_s, clock_ns, writer, lock)
        self.retention, self._settings = retention, settings

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        beside: bool = False,
        commit_interval_s: float = 0.5,
        ring_rows: int = 8192,
        ring_bytes: int = 33_554_432,
        synchronous: Synchronous = "normal",
        sync_interval_s: float = 5.0,
        busy_timeout_s: float = 2.0,
        retention: Retention | None = None,
        on_corrupt: Literal["refuse", "set_aside"] = "refuse",
        clock_ns: Callable[[], int] = time.time_ns,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> Self:
        """Open, create or migrate a store.

        Parameters
        ----------
        readonly : bool
            No lock, no writer thread; for looking at a store that another process may be writing.
        beside : bool
            Write single entries and whole records (models, feedback, audit, `write_record`) beside the
            process that records: the writer lock is not taken; live recordings, runs and retention are
            refused.
        commit_interval_s : float
            Longest wait between two commits (sooner where a ring is half full).
        ring_rows, ring_bytes : int
            Rows or verdicts that each ring holds while the disk is away, and most bytes of a ring of rows.
        synchronous, sync_interval_s
            See the class: what a power failure can take.
        busy_timeout_s : float
            Longest wait for a lock that another program holds, per attempt.
        on_corrupt : "refuse" or "set_aside"
            A damaged file is refused, or renamed (never deleted) and replaced by an empty store; the audit
            says so.

        Raises
        ------
        StoreError
            Another writer, locked, damaged, another program's file, a newer schema, no permission.
        """
        where = Path(path).absolute()
        settings = WriterSettings(
            commit_interval_s,
            max(2, ring_rows + ring_rows % 2),
            ring_bytes,
            synchronous,
            sync_interval_s,
            busy_timeout_s,
        )
        rules = retention or Retention()
        if readonly:
            store = cls(where, rules, clock_ns, None, None, settings)
            store._check_readable(migrations)
            return store
        make_folder(where)
        if beside:
            db = open_beside(where, settings, migrations)
            store = cls(
                where,
                rules,
                clock_ns,
                None,
                Recorder(where, db, settings, replace(rules, interval_s=math.inf), clock_ns),
                settings,
            )
            store._writer.start()
            return store
        lock = WriterLock(where)
        aside: Path | None = None
        try:
            try:
                db = open_for_writing(where, settings, migrations)
            except DamagedStore:
                if on_corrupt != "set_aside":
                    raise
                aside = set_aside(where)
                db = open_for_writing(where, settings, migrations)
            writer = Recorder(where, db, settings, rules, clock_ns)
        except BaseException:
            lock.release()
            raise
        store = cls(where, rules, clock_ns, lock, writer, settings)
        writer.start()
        with suppress(TimeoutError):  # a locked file does not keep the process from starting
            writer.submit(store._tidy).result(busy_timeout_s)
        if aside is not None:
            store.record_audit(AuditEntry("store", "damaged file set aside", {"renamed_to": str(aside)}))
        return store

    @staticmethod
    def set_aside(path: str | os.PathLike[str]) -> Path:
        """Rename a damaged store and its log (nothing is deleted); return the new name."""
        where = Path(path).absolute()
        lock = WriterLock(where)
        try:
            return set_aside(where)
        finally:
            lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
            return
        with suppress(StoreError):  # do not hide what went wrong first
            self.close()

    def close(self, timeout_s: float = 10.0) -> None:
        """Commit what is pending, end open recordings, close.

        Raises
        ------
        StoreError
            Something could not be written within the time; the text says how much.
        """
        if self._closed:
            return
        pending = self._recorder.close(timeout_s) if self._recorder else 0
        super().close()
        if self._lock_file is not None:
            self._lock_file.release()
        if pending and self._recorder:
            raise StoreError(
                f"closed with {pending} rows, verdicts and entries not written ({self._recorder.last_error})",
                where=str(self.path),
                next_step="remove the cause (disk full, file locked) before the next start",
            )

    # ---- for the loop

    def offer_row(self, recording: Recording, frame: Frame, truth: int = 0) -> int:
        """Copy one row of a recording; return its number in the order of offers, 0 where it was not taken.

        `truth` is stored where the recording was started with truth.
        """
        return self._writer.offer_row(recording, frame, truth)

    def offer_verdict(self, verdict: Verdict) -> int:
        """Copy score, status and alert of one verdict; return its number among the offers, 0 = dropped."""
        return self._writer.offer_verdict(verdict)

    # ---- state

    @property
    def readonly(self) -> bool:
        """Whether the store was opened for reading only."""
        return self._recorder is None

    @property
    def committed_seq(self) -> int:
        """Number of the last offered item up to which a killed process loses nothing."""
        return self._writer.committed_seq

    @property
    def synced_seq(self) -> int:
        """Number of the last offered item up to which a power failure loses nothing."""
        return self._writer.synced_seq

    @property
    def counters(self) -> StoreCounters:
        """What was written, dropped and refused since the store was opened."""
        return self._writer.counters

    @property
    def last_error(self) -> str:
        """Why the last attempt to write failed; empty while writing works."""
        return self._writer.last_error

    @property
    def queued(self) -> int:
        """Rows, verdicts and entries that wait for a commit."""
        return self._writer.queued

    @property
    def run_id(self) -> int:
        """Number of the run under way, 0 outside a run."""
        return self._writer.run_id

    # ---- recordings

    def start_recording(
        self,
        name: str | None,
        tags: Sequence[Tag],
        period_ns: int,
        *,
        group: str = "",
        server: str = "",
        note: str = "",
        truth: bool = False,
        keep: bool = False,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Recording:
        """Begin a recording; rows come by `offer_row`.

        Parameters
        ----------
        name : str or None
            Unique; None makes one of group and time.
        truth : bool
            Each row has ground truth.
        keep : bool
            Retention leaves it alone.
        """
        self._check_exclusive("recording")
        listed = tuple(tags)
        row = self._recording_row(name, listed, period_ns, group, server, note, truth, keep)
        recording_id, given = self._writer.call(
            lambda db: self._insert_recording(db, row, name is None), timeout_s
        )
        size = max(1, len(listed)) * 13 + 26
        capacity = max(MIN_CHUNK_ROWS, min(self._settings.ring_rows, self._settings.ring_bytes // size)) & ~1
        recording = Recording(recording_id, given, listed, period_ns, RowRing(len(listed), capacity, truth))
        self._writer.adopt(recording)
        return recording

    def end_recording(self, recording: Recording, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Write the remaining rows and mark the recording as ended; rows offered after this are dropped."""
        self._writer.end(recording)
        self._writer.call(None, timeout_s)

    def write_record(
        self,
        name: str | None,
        record: Record,
        *,
        status: UInt32 | None = None,
        group: str = "",
        server: str = "",
        note: str = "",
        keep: bool = False,
        timeout_s: float = 300.0,
    ) -> StoredRecording:
        """Write a whole record as one recording, in one transaction: all of it or nothing.

        status : uint32[n, n_tags]; None = Good
        """
        n, k = len(record), len(record.tags)
        if record.values.shape != (n, k) or record.valid.shape != (n, k) or record.source_ns.shape != (n,):
            raise StoreError(
                f"record of {n} rows and {k} tags with values {record.values.shape}, valid "
                f"{record.valid.shape}, source_ns {record.source_ns.shape}",
                where=f"recording {name}",
                next_step="give arrays of one length",
            )
        back = np.flatnonzero(np.diff(record.source_ns) <= 0)
        if len(back):
            at = int(back[0]) + 1
            raise StoreError(
                f"time does not increase at row {at} ({record.source_ns[at - 1]} ns, then "
                f"{record.source_ns[at]} ns)",
                where=f"recording {name}",
                next_step="sort the rows and remove duplicates",
            )
        rows = Rows(
            np.arange(n, dtype=np.int64),
            record.source_ns,
            record.values,
            record.valid,
            np.zeros((n, k), np.uint32) if status is None else status,
            record.gap,
            record.truth,
        )
        now_ns = self._clock_ns()
        chunks = (
            [encode(part, 0, now_ns, MERGED, DEFLATED)[1:] for part in split(rows, chunk_rows(k))]
            if n
            else []
        )
        row = self._recording_row(
            name, record.tags, record.period_ns, group, server, note, record.truth is not None, keep
        )
        row["ended_ns"] = row["started_ns"]

        def write(db: sqlite_utils.Database) -> int:
            recording_id, _ = self._insert_recording(db, row, name is None)
            db.conn.executemany(INSERT_CHUNK, ((recording_id, *chunk) for chunk in chunks))
            return recording_id

        return self.recording(int(self._writer.call(write, timeout_s)))

    def keep_recording(self, key: int | str, keep: bool = True) -> None:
        """Put a recording under, or take it from, the protection against retention."""
        found = self.recording(key)
        self._writer.call(
            lambda db: db.execute("UPDATE recordings SET keep = ? WHERE id = ?", [int(keep), found.id]),
            CALL_TIMEOUT_S,
        )

    def delete_recording(self, key: int | str, who: str) -> None:
        """Delete a recording that has ended, with its rows; the audit says who did it."""
        found = self.recording(key)
        if found.ended_ns is None:
            raise StoreError(
                f"recording {found.name!r} is being written", where=str(self.path), next_step="end it first"
            )

        def delete(db: sqlite_utils.Database) -> None:
            db.execute("DELETE FROM recordings WHERE id = ?", [found.id])
            insert_audit(
                db,
                self._clock_ns(),
                AuditEntry(who, "recording deleted", {"name": found.name, "rows": found.rows}),
            )

        self._writer.call(delete, CALL_TIMEOUT_S)

    def _recording_row(
        self,
        name: str | None,
        tags: tuple[Tag, ...],
        period_ns: int,
        group: str,
        server: str,
        note: str,
        truth: bool,
        keep: bool,
    ) -> dict[str, Any]:
        now_ns = self._clock_ns()
        given = (
            name
            or f"{group or 'recording'} {datetime.fromtimestamp(now_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%SZ}"
        )
        return {
            "name": given,
            "group_name": group,
            "server": server,
            "tags": tags_to_json(tags),
            "period_ns": int(period_ns),
            "started_ns": now_ns,
            "ended_ns": None,
            "truth": int(truth),
            "keep": int(keep),
            "note": note,
        }

    def _insert_recording(
        self, db: sqlite_utils.Database, row: dict[str, Any], rename: bool
    ) -> tuple[int, str]:
        free = free_name(db.conn, row["name"])
        if free != row["name"] and not rename:
            raise StoreError(
                f"there is a recording {row['name']!r} already",
                where=str(self.path),
                next_step="choose another name, or delete that recording first",
            )
        added = db.table("recordings").insert({**row, "name": free})
        return int(str(added.last_pk)), free

    # ---- retention

    def usage(self) -> Usage:
        """Return the bytes in use by class of table, and whether the quota can be met."""
        return self.measure(
            self.retention.quota_bytes, self._recorder is not None and self._recorder.quota_unmet
        )

    def apply_retention(self, timeout_s: float = 300.0) -> Usage:
        """Run a whole retention pass now, on the writer thread, and return the usage after it."""
        self._check_exclusive("retention")
        future = self._writer.retain()
        try:
            future.result(timeout_s)
        except sqlite3.Error as exc:
            raise store_error(exc, self.path) from exc
        except TimeoutError as exc:
            raise StoreError(
                f"retention is not through after {timeout_s:g} s; it goes on in the background",
                where=str(self.path),
                next_step="ask again later",
            ) from exc
        return self.usage()

    # ---- opening

    def _tidy(self, db: sqlite_utils.Database) -> None:
        """End what a killed process left open."""
        db.execute(
            "UPDATE runs SET end_reason = 'did not end by itself (killed, or power failure)' "
            "WHERE ended_ns IS NULL AND end_reason = ''"
        )
        db.execute(
            "UPDATE recordings SET ended_ns = coalesce((SELECT max(written_ns) FROM row_chunks WHERE "
            "recording_id = recordings.id), started_ns) WHERE ended_ns IS NULL"
        )

    def _check_readable(self, migrations: Sequence[Migration]) -> None:
        if not self.path.exists():
            raise StoreError(
                "there is no store",
                where=str(self.path),
                next_step="check the path, or record something first",
            )
        newest = migrations[-1].version
        with self.reading() as db:
            version = check_file(db, self.path, newest)
        if version < newest:
            raise StoreError(
                f"the store has schema version {version}, this program needs {newest}",
                where=str(self.path),
                next_step="open it once for writing, which migrates it",
            )
