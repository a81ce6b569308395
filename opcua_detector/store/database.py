"""The store as the rest of the product sees it: `Store.open`, offers from the loop, entries, reading, retention."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    Event,
    FeedbackEntry,
    StoreCounters,
    StoredModel,
    StoredRecording,
    Usage,
    causes_to_json,
    tags_to_json,
    to_json,
)
from .reader import Reader
from .recorder import Recorder, WriterSettings, free_name
from .retention import Retention
from .rings import Recording, RowRing
from .schema import (
    DAMAGED,
    MIGRATIONS,
    Migration,
    Synchronous,
    check_file,
    code_of,
    configure_writer,
    connect,
    migrate,
    quick_check,
    schema_version,
    store_error,
)
from .writer_lock import WriterLock

CALL_TIMEOUT_S = 30.0
QUICK_CHECK_BYTES = 268_435_456  # larger files are not read through at each start; see Store.verify
_EVENT = """
    INSERT INTO events (run_id, monitor, event_no, raised_ns, cleared_ns, peak_score, severity, model_id, sentence,
                        causes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (run_id, monitor, event_no) DO UPDATE SET
        cleared_ns = coalesce(excluded.cleared_ns, cleared_ns),
        peak_score = max(coalesce(peak_score, excluded.peak_score), coalesce(excluded.peak_score, peak_score)),
        severity = max(severity, excluded.severity),
        model_id = CASE WHEN excluded.model_id = '' THEN model_id ELSE excluded.model_id END,
        sentence = CASE WHEN excluded.sentence = '' THEN sentence ELSE excluded.sentence END,
        causes = CASE WHEN excluded.causes = '[]' THEN causes ELSE excluded.causes END"""


class Store(Reader):
    """Recordings, events, trend, feedback, audit, models and runs in one SQLite file.

    One process writes (a lock beside the file sees to it), any number read. Within it one thread owns the write
    connection; `offer_row` and `offer_verdict` are for the loop: one thread calls them, they copy into a ring and
    return, they never wait, raise or log. Everything else may be called from any thread.

    What can be lost
    ----------------
    * The process is killed (kill -9) or crashes: what was offered since the last commit, that is at most
      `commit_interval_s` (0.5 s) plus the duration of one commit. `committed_seq` is the number of the last
      item that cannot be lost this way. Nothing is corrupted.
    * Power failure or crash of the operating system, with `synchronous="normal"` (default): at most what was
      offered since the last checkpoint: `sync_interval_s` (5 s) + `commit_interval_s` (0.5 s) + the duration of
      one commit and one checkpoint, 5.5 s plus some milliseconds on a disk that keeps up. `synced_seq` is the
      number of the last item that cannot be lost this way. The file is not corrupted: SQLite's log is
      checksummed and replayed up to the last whole transaction. A reader of another program that keeps one read
      transaction open for longer holds back checkpoints, and `synced_seq` shows that.
    * The same with `synchronous="full"`: each commit is flushed to the disk, so `synced_seq` is `committed_seq`
      and the window is `commit_interval_s` plus the duration of one commit. It costs a disk flush per commit.
    * Both hold as far as the disk does not lie about flushing. Events, feedback, audit, models and runs
      are committed in the same batches; the calls that wait (`feedback`, `audit`, `register_model`, `start_run`,
      `start_recording`, `write_record`) return after the commit.
    * While the disk is full or the file locked, batches are kept in the rings and tried again; when a ring is
      full, new rows or verdicts are dropped and counted (`counters.dropped_rows`), and reading shows a gap there.
    """

    def __init__(self, path: Path, retention: Retention, clock_ns: Callable[[], int], lock: WriterLock | None,
                 writer: Recorder | None, settings: WriterSettings) -> None:
        super().__init__(path, settings.busy_timeout_s)
        self.retention, self._settings = retention, settings
        self._clock_ns, self._lock_file, self._recorder = clock_ns, lock, writer

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, readonly: bool = False, commit_interval_s: float = 0.5,
        ring_rows: int = 8192, ring_bytes: int = 33_554_432, synchronous: Synchronous = "normal",
        sync_interval_s: float = 5.0, busy_timeout_s: float = 2.0, retention: Retention | None = None,
        on_corrupt: Literal["refuse", "set_aside"] = "refuse", clock_ns: Callable[[], int] = time.time_ns,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> Self:
        """Open, create or migrate a store.

        Parameters
        ----------
        readonly : bool
            No lock, no writer thread; for looking at a store that another process may be writing.
        commit_interval_s : float
            Longest wait between two commits (sooner where a ring is half full).
        ring_rows, ring_bytes : int
            Rows or verdicts that each ring holds while the disk is away, and most bytes of a ring of rows.
        synchronous, sync_interval_s
            See the class: what a power failure can take.
        busy_timeout_s : float
            Longest wait for a lock that another program holds, per attempt.
        on_corrupt : "refuse" or "set_aside"
            A damaged file is refused, or renamed (never deleted) and replaced by an empty store; the audit says so.

        Raises
        ------
        StoreError
            Another writer, locked, damaged, another program's file, a newer schema, no permission.
        """
        where = Path(path).absolute()
        settings = WriterSettings(commit_interval_s, max(2, ring_rows + ring_rows % 2), ring_bytes, synchronous,
                                  sync_interval_s, busy_timeout_s)
        rules = retention or Retention()
        if readonly:
            store = cls(where, rules, clock_ns, None, None, settings)
            store._check_readable(migrations)
            return store
        _make_folder(where)
        lock = WriterLock(where)
        aside: Path | None = None
        try:
            try:
                db = _open_for_writing(where, settings, migrations)
            except StoreError as exc:
                damaged = isinstance(exc.__cause__, sqlite3.Error) and code_of(exc.__cause__) in DAMAGED
                if on_corrupt != "set_aside" or not (damaged or isinstance(exc, _Damaged)):
                    raise
                aside = _rename(where)
                db = _open_for_writing(where, settings, migrations)
            writer = Recorder(where, db, settings, rules, clock_ns)
        except BaseException:
            lock.release()
            raise
        store = cls(where, rules, clock_ns, lock, writer, settings)
        writer.submit(store._tidy, urgent=False)
        writer.start()
        if aside is not None:
            store.record_audit(AuditEntry("store", "damaged file set aside", {"renamed_to": str(aside)}))
        return store

    @staticmethod
    def set_aside(path: str | os.PathLike[str]) -> Path:
        """Rename a damaged store and its log; return the new name. Nothing is deleted; no writer may be running."""
        where = Path(path).absolute()
        lock = WriterLock(where)
        try:
            return _rename(where)
        finally:
            lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None,
                 trace: TracebackType | None) -> None:
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
            raise StoreError(f"closed with {pending} rows, verdicts and entries not written "
                             f"({self._recorder.last_error})", where=str(self.path),
                             next_step="remove the cause (disk full, file locked) before the next start")

    # ---- for the loop

    def offer_row(self, recording: Recording, frame: Frame, truth: int = 0) -> int:
        """Copy one row of a recording; return its number in the order of offers, 0 where it was not taken.

        `truth` is stored where the recording was started with truth.
        """
        return self._writer.offer_row(recording, frame, truth)

    def offer_verdict(self, verdict: Verdict) -> int:
        """Copy score, status and alert of one verdict; return its number in the order of offers, 0 = dropped."""
        return self._writer.offer_verdict(verdict)

    def record_event(self, event: Event) -> None:
        """Write an event, or complete the one of the same number: what is not given stays as it was.

        Never waits and never drops; committed with the next batch. For raised, explained and cleared alike.
        """
        run_id = event.run_id or self._writer.run_id
        values = (run_id, event.monitor, event.event_no, event.raised_ns, event.cleared_ns, event.peak_score,
                  event.severity, event.model_id, event.sentence, causes_to_json(event.causes))
        self._writer.submit(lambda db: db.execute(_EVENT, values), urgent=False)

    # ---- state

    @property
    def _writer(self) -> Recorder:
        if self._recorder is None:
            raise StoreError("the store was opened for reading only", where=str(self.path),
                             next_step="open it without readonly")
        return self._recorder

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

    def flush(self, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Wait until everything offered so far is committed; False where that takes longer."""
        future = self._writer.submit(None, waited=True)
        try:
            future.result(timeout_s)
        except TimeoutError:
            return False
        return True

    # ---- recordings

    def start_recording(
        self, name: str | None, tags: Sequence[Tag], period_ns: int, *, group: str = "", server: str = "",
        note: str = "", truth: bool = False, keep: bool = False, timeout_s: float = CALL_TIMEOUT_S,
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
        listed = tuple(tags)
        row = self._recording_row(name, listed, period_ns, group, server, note, truth, keep)
        recording_id, given = self._writer.call(lambda db: self._insert_recording(db, row, name is None), timeout_s)
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
        self, name: str | None, record: Record, *, status: UInt32 | None = None, group: str = "", server: str = "",
        note: str = "", keep: bool = False, timeout_s: float = 300.0,
    ) -> StoredRecording:
        """Write a whole record as one recording, in one transaction: all of it or nothing.

        status : uint32[n, n_tags]; None = Good
        """
        n, k = len(record), len(record.tags)
        if record.values.shape != (n, k) or record.valid.shape != (n, k) or record.source_ns.shape != (n,):
            raise StoreError(f"record of {n} rows and {k} tags with values {record.values.shape}, valid "
                             f"{record.valid.shape}, source_ns {record.source_ns.shape}", where=f"recording {name}",
                             next_step="give arrays of one length")
        back = np.flatnonzero(np.diff(record.source_ns) <= 0)
        if len(back):
            at = int(back[0]) + 1
            raise StoreError(f"time does not increase at row {at} ({record.source_ns[at - 1]} ns, then "
                             f"{record.source_ns[at]} ns)", where=f"recording {name}",
                             next_step="sort the rows and remove duplicates")
        rows = Rows(np.arange(n, dtype=np.int64), record.source_ns, record.values, record.valid,
                    np.zeros((n, k), np.uint32) if status is None else status, record.gap, record.truth)
        chunks = [encode(part, 0, MERGED, DEFLATED)[1:] for part in split(rows, chunk_rows(k))] if n else []
        row = self._recording_row(name, record.tags, record.period_ns, group, server, note,
                                  record.truth is not None, keep)
        row["ended_ns"] = row["started_ns"]

        def write(db: sqlite_utils.Database) -> int:
            recording_id, _ = self._insert_recording(db, row, name is None)
            db.conn.executemany(INSERT_CHUNK, ((recording_id, *chunk) for chunk in chunks))
            return recording_id

        return self.recording(int(self._writer.call(write, timeout_s)))

    def keep_recording(self, key: int | str, keep: bool = True) -> None:
        """Put a recording under, or take it from, the protection against retention."""
        found = self.recording(key)
        self._writer.call(lambda db: db.execute("UPDATE recordings SET keep = ? WHERE id = ?", [int(keep), found.id]),
                          CALL_TIMEOUT_S)

    def delete_recording(self, key: int | str, who: str) -> None:
        """Delete a recording that has ended, with its rows; the audit says who did it."""
        found = self.recording(key)
        if found.ended_ns is None:
            raise StoreError(f"recording {found.name!r} is being written", where=str(self.path),
                             next_step="end it first")

        def delete(db: sqlite_utils.Database) -> None:
            db.execute("DELETE FROM recordings WHERE id = ?", [found.id])
            self._insert_audit(db, AuditEntry(who, "recording deleted", {"name": found.name, "rows": found.rows}))

        self._writer.call(delete, CALL_TIMEOUT_S)

    def _recording_row(self, name: str | None, tags: tuple[Tag, ...], period_ns: int, group: str, server: str,
                       note: str, truth: bool, keep: bool) -> dict[str, Any]:
        now_ns = self._clock_ns()
        given = name or f"{group or 'recording'} {datetime.fromtimestamp(now_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return {"name": given, "group_name": group, "server": server, "tags": tags_to_json(tags),
                "period_ns": int(period_ns), "started_ns": now_ns, "ended_ns": None, "truth": int(truth),
                "keep": int(keep), "note": note}

    def _insert_recording(self, db: sqlite_utils.Database, row: dict[str, Any], rename: bool) -> tuple[int, str]:
        free = free_name(db.conn, row["name"])
        if free != row["name"] and not rename:
            raise StoreError(f"there is a recording {row['name']!r} already", where=str(self.path),
                             next_step="choose another name, or delete that recording first")
        added = db.table("recordings").insert({**row, "name": free})
        return int(added.last_pk), free

    # ---- entries that are kept

    def start_run(self, version: str, config_hash: str = "", monitors: Sequence[str] = ()) -> int:
        """Begin a run: events and trend from now on belong to it. `monitors` get their rings made in advance."""
        for monitor in monitors:
            self._writer.watch(monitor)
        run_id = int(self._writer.call(lambda db: db.table("runs").insert({
            "started_ns": self._clock_ns(), "ended_ns": None, "version": version, "config_hash": config_hash,
            "end_reason": ""}).last_pk, CALL_TIMEOUT_S))
        self._writer.run_id = run_id
        return run_id

    def end_run(self, reason: str = "stopped") -> None:
        """End the run under way, after everything offered in it."""
        run_id = self._writer.run_id
        self.flush()
        self._writer.call(lambda db: db.execute("UPDATE runs SET ended_ns = ?, end_reason = ? WHERE id = ?",
                                                [self._clock_ns(), reason, run_id]), CALL_TIMEOUT_S)
        self._writer.run_id = 0

    def register_model(self, model_id: str, monitor: str, path: str | os.PathLike[str], sha256: str,
                       header: Mapping[str, Any]) -> StoredModel:
        """Write where a model file lies; the same model registered again updates path and header."""
        row = {"model_id": model_id, "monitor": monitor, "path": str(path), "sha256": sha256,
               "created_ns": self._clock_ns(), "header": to_json(header)}
        self._writer.call(lambda db: db.table("models").upsert(row, pk=("model_id", "monitor")), CALL_TIMEOUT_S)
        return StoredModel(model_id, monitor, str(path), sha256, int(str(row["created_ns"])), header)

    def record_feedback(self, entry: FeedbackEntry, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Write what an operator said; return its number."""
        row = {"at_ns": entry.at_ns or self._clock_ns(), "who": entry.who, "label": entry.label,
               "monitor": entry.monitor, "event_no": entry.event_no, "start_ns": entry.start_ns,
               "end_ns": entry.end_ns, "tags": to_json(entry.tags), "comment": entry.comment,
               "model_id": entry.model_id}
        return int(self._writer.call(lambda db: db.table("feedback").insert(row).last_pk, timeout_s))

    def record_audit(self, entry: AuditEntry, timeout_s: float | None = CALL_TIMEOUT_S) -> None:
        """Write who did what; None as time-out does not wait for the commit (and still drops nothing)."""
        if timeout_s is None:
            self._writer.submit(lambda db: self._insert_audit(db, entry))
        else:
            self._writer.call(lambda db: self._insert_audit(db, entry), timeout_s)

    def _insert_audit(self, db: sqlite_utils.Database, entry: AuditEntry) -> None:
        db.table("audit").insert({"at_ns": entry.at_ns or self._clock_ns(), "who": entry.who,
                                  "action": entry.action, "detail": to_json(entry.detail)})

    # ---- retention

    def usage(self) -> Usage:
        """Return the bytes in use by class of table, and whether the quota can be met."""
        return self.measure(self.retention.quota_bytes, self._recorder is not None and self._recorder.quota_unmet)

    def apply_retention(self, timeout_s: float = 300.0) -> Usage:
        """Run a whole retention pass now, on the writer thread, and return the usage after it."""
        future = self._writer.retain()
        try:
            future.result(timeout_s)
        except TimeoutError as exc:
            raise StoreError(f"retention is not through after {timeout_s:g} s; it goes on in the background",
                             where=str(self.path), next_step="ask again later") from exc
        return self.usage()

    # ---- opening

    def _tidy(self, db: sqlite_utils.Database) -> None:
        """End what a killed process left open."""
        db.execute("UPDATE runs SET end_reason = 'did not end by itself (killed, or power failure)' "
                   "WHERE ended_ns IS NULL AND end_reason = ''")
        db.execute("UPDATE recordings SET ended_ns = coalesce((SELECT max(last_ns) FROM row_chunks WHERE "
                   "recording_id = recordings.id), started_ns) WHERE ended_ns IS NULL")

    def _check_readable(self, migrations: Sequence[Migration]) -> None:
        if not self.path.exists():
            raise StoreError("there is no store", where=str(self.path),
                             next_step="check the path, or record something first")
        newest = migrations[-1].version
        with self.reading() as db:
            version = check_file(db, self.path, newest)
        if version < newest:
            raise StoreError(f"the store has schema version {version}, this program needs {newest}",
                             where=str(self.path), next_step="open it once for writing, which migrates it")


class _Damaged(StoreError):
    """Raised inside `open` only, so that it can tell damage from other faults."""


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(f"the folder cannot be made: {exc.strerror}", where=str(path.parent),
                         next_step="make it, or choose another store path") from exc
    if path.is_dir():
        raise StoreError("is a folder, not a file", where=str(path), next_step="add a file name to the store path")


def _open_for_writing(path: Path, settings: WriterSettings, migrations: Sequence[Migration]) -> sqlite_utils.Database:
    db = None
    try:
        db = connect(path, create=True, busy_timeout_s=settings.busy_timeout_s)
        if schema_version(db) and path.stat().st_size <= QUICK_CHECK_BYTES:
            try:
                quick_check(db, path)
            except StoreError as exc:
                raise _Damaged(exc.what, where=exc.where, next_step=exc.next_step) from exc
        check_file(db, path, migrations[-1].version)
        if schema_version(db) == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before WAL and the first table
        configure_writer(db, settings.synchronous)
        migrate(db, path, migrations)
    except BaseException as exc:
        if db is not None:
            db.close()
        if isinstance(exc, sqlite3.Error):
            raise store_error(exc, path) from exc
        raise
    return db


def _rename(path: Path) -> Path:
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    target = path.with_name(f"{path.name}.damaged-{stamp}Z")
    k = 1
    while target.exists():
        k += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}Z-{k}")
    try:
        path.rename(target)
        for suffix in ("-wal", "-shm"):
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(target.with_name(target.name + suffix))
    except OSError as exc:
        raise StoreError(f"cannot be renamed: {exc.strerror}", where=str(path),
                         next_step="close programs that have it open") from exc
    return target
