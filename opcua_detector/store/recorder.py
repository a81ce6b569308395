"""The writer thread: the only one that writes the database, in batches; outlives a full or locked disk.

A batch is one transaction: the queued entries first (events, feedback, audit, models, runs; never dropped),
then the rows and verdicts of the rings. Rings and queue are only emptied once the transaction is committed,
so an attempt that fails costs nothing and is made again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlite_utils

from ..api import Frame, Verdict
from ..errors import StoreError
from .entries import StoreCounters
from .retention import Retainer, Retention
from .ring_writer import RingWriter, Written
from .rings import Recording, VerdictRing
from .schema import RETRYABLE, code_of, configure_writer, connect, immediate, store_error
from .tasks import Task, WriterSettings

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.05, 5.0
_RECONNECT = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    }
)


class Recorder:
    """The writer of one store; `start` begins the thread, `close` ends it.

    committed_seq : int; every item offered up to this number is committed (safe against kill -9)
    synced_seq : int; every item offered up to this number is on the disk (safe against power failure)
    last_error : str; why the last attempt failed; empty while it works
    """

    def __init__(
        self,
        path: Path,
        db: sqlite_utils.Database,
        settings: WriterSettings,
        retention: Retention,
        clock_ns: Callable[[], int],
    ) -> None:
        self.path, self.settings = path, settings
        self.run_id = 0
        self.committed_seq = self.synced_seq = 0
        self.last_error = ""
        self._db, self._clock_ns = db, clock_ns
        self._offered = 0
        self._recordings: list[Recording] = []
        self._verdicts: dict[str, VerdictRing] = {}
        self._writer = RingWriter(path, clock_ns)
        self._tasks: deque[Task] = deque()
        self._batch: list[Task] = []
        self._counters = StoreCounters()
        self._retired = StoreCounters()  # counts of rings that are gone
        self._retainer = Retainer(retention, clock_ns)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._close_by = 0.0
        self._backoff_s = 0.0
        self._aside_error = ""
        self._dropping, self._dropped_seen = False, 0
        self._next_sync = time.monotonic() + settings.sync_interval_s
        self._inode = os.stat(path).st_ino
        self._thread = threading.Thread(target=self._run, name="opcua-detector store", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    # ---- called by the loop: microseconds, no lock, no allocation that stays

    def offer_row(self, recording: Recording, frame: Frame, truth: int) -> int:
        """Copy one row into the ring; return its number, or 0 where it was not taken (and counted)."""
        ring = recording.ring
        if not ring.push(frame, truth):
            return 0
        self._offered += 1
        if (ring.head - ring.tail) * 2 == ring.capacity:
            self._wake.set()
        return self._offered

    def offer_verdict(self, verdict: Verdict) -> int:
        """Copy one verdict into the ring of its monitor; return its number, or 0 where it was dropped."""
        ring = self._verdicts.get(verdict.monitor)
        if ring is None:
            ring = self.watch(verdict.monitor)
        if not ring.push(verdict):
            return 0
        self._offered += 1
        if (ring.head - ring.tail) * 2 == ring.capacity:
            self._wake.set()
        return self._offered

    # ---- called by other threads

    def watch(self, monitor: str) -> VerdictRing:
        """Make the ring of a monitor, so that its first verdict finds it."""
        return self._verdicts.setdefault(monitor, VerdictRing(monitor, self.settings.ring_rows))

    def adopt(self, recording: Recording) -> None:
        """Write the rows of this recording from now on."""
        self._recordings.append(recording)

    def submit(
        self,
        work: Callable[[sqlite_utils.Database], Any] | None,
        *,
        urgent: bool = True,
        waited: bool = False,
    ) -> Future[Any]:
        """Queue work for the next transaction; never waits, never drops."""
        self._check_open()
        task = Task(work, Future(), waited)
        self._tasks.append(task)
        if urgent:
            self._wake.set()
        return task.future

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreError("the store is closed", where=str(self.path), next_step="open it again")

    def call(self, work: Callable[[sqlite_utils.Database], Any] | None, timeout_s: float) -> Any:
        """Queue work, wait until it is committed and return what it returned.

        Raises
        ------
        StoreError
            It was not committed in time (the text says whether it still will be), or its content was refused.
        """
        future = self.submit(work, waited=True)
        try:
            return future.result(timeout_s)
        except sqlite3.Error as exc:
            raise store_error(exc, self.path) from exc
        except TimeoutError as exc:
            outcome = "it was not written" if future.cancel() else "it stays queued"
            reason = self.last_error or "the writer is busy"
            raise StoreError(
                f"not committed within {timeout_s:g} s ({reason}); {outcome}",
                where=str(self.path),
                next_step="remove the cause (disk full, file locked) and try again",
            ) from exc

    def end(self, recording: Recording) -> None:
        """Take no more rows; the next transaction writes what is there and marks the recording as ended."""
        recording.ring.room = -1
        recording.ending = True

    def retain(self) -> Future[Any]:
        """Ask for a full retention pass; the future is done when it is through."""
        self._check_open()
        future = self._retainer.request()
        self._wake.set()
        return future

    @property
    def quota_unmet(self) -> bool:
        """Whether the last retention pass could not meet the quota."""
        return self._retainer.unmet

    @property
    def queued(self) -> int:
        """Entries and items that wait for a commit."""
        return (
            len(self._tasks)
            + len(self._batch)
            + sum(r.ring.head - r.ring.tail for r in list(self._recordings))
            + sum(ring.head - ring.tail for ring in list(self._verdicts.values()))
        )

    @property
    def counters(self) -> StoreCounters:
        """All counters as of now."""
        rings = [recording.ring for recording in list(self._recordings)]
        scores = list(self._verdicts.values())
        kept = self._retainer
        return replace(
            self._counters,
            dropped_rows=self._retired.dropped_rows + sum(ring.dropped for ring in rings),
            out_of_order_rows=self._retired.out_of_order_rows + sum(ring.out_of_order for ring in rings),
            dropped_verdicts=sum(ring.dropped for ring in scores),
            rejected=self._counters.rejected
            + self._retired.rejected
            + sum(ring.rejected for ring in rings)
            + sum(ring.rejected for ring in scores),
            thinned_rows=kept.thinned_rows,
            deleted_rows=kept.deleted_rows,
            decimated_trend=kept.decimated,
        )

    def close(self, timeout_s: float) -> int:
        """Write what is pending and end the thread; return how many things could not be written."""
        for recording in list(self._recordings):
            self.end(recording)
        self._close_by = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join()
        return self.queued

    # ---- the thread

    def _run(self) -> None:
        wait_s = self.settings.commit_interval_s
        while not self._closing.is_set():
            self._wake.wait(wait_s)
            self._wake.clear()
            wait_s = self.settings.commit_interval_s
            if not self._attempt(self._commit_pending):
                self._closing.wait(self._backoff_s)
                wait_s = 0.0
                continue
            self._aside(self._sync_if_due)
            self._aside(self._retain_step)
            if self._retainer.active:
                wait_s = min(wait_s, 0.005)
        while not self._attempt(self._commit_pending) and time.monotonic() < self._close_by:
            time.sleep(min(self._backoff_s, max(0.0, self._close_by - time.monotonic())))
        self._end()

    def _end(self) -> None:
        reason = StoreError(
            f"the store was closed before this was written ({self.last_error})", where=str(self.path)
        )
        for task in (*self._batch, *self._tasks):
            if not task.future.cancelled():
                task.future.set_exception(reason)
        self._retainer.stop(reason)
        with suppress(sqlite3.Error):
            busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if not busy and not self.queued:
                self.synced_seq = self.committed_seq
        with suppress(sqlite3.Error):
            self._db.close()

    def _attempt(self, step: Callable[[], None]) -> bool:
        """Run one step; an error is counted, told once, and answered by a growing pause."""
        try:
            step()
        except Exception as exc:
            self._failed(exc)
            return False
        return True

    def _aside(self, step: Callable[[], None]) -> None:
        """Run a step that commits nothing of what was offered; it comes round again by itself."""
        try:
            step()
        except Exception as exc:
            self._counters = replace(self._counters, write_errors=self._counters.write_errors + 1)
            if str(exc) != self._aside_error:
                log.warning("store %s: checkpoint or retention failed: %s", self.path, exc)
            self._aside_error = str(exc)

    def _failed(self, exc: Exception) -> None:
        self._counters = replace(self._counters, write_errors=self._counters.write_errors + 1)
        if not self.last_error:
            log.warning(
                "store %s cannot be written: %s; rows are kept in memory and tried again",
                self.path,
                exc,
                exc_info=None if isinstance(exc, (sqlite3.Error, StoreError)) else exc,
            )
        self.last_error = str(exc) or type(exc).__name__
        self._backoff_s = min(LONGEST_BACKOFF_S, max(FIRST_BACKOFF_S, 2 * self._backoff_s))
        if isinstance(exc, sqlite3.Error) and code_of(exc) in _RECONNECT:
            self._reconnect()
        self._tell_drops()

    def _reconnect(self) -> None:
        """Open the file again: after an I/O error or a remount the old handle may stay broken for ever."""
        try:
            self._check_not_moved()
            db = connect(self.path, create=False, busy_timeout_s=self.settings.busy_timeout_s)
            configure_writer(db, self.settings.synchronous)
        except (sqlite3.Error, OSError, StoreError) as exc:
            log.debug("store %s could not be opened again: %s", self.path, exc)
            return
        self._retainer.stop(None)
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = db

    def _works(self) -> None:
        self._backoff_s = 0.0
        if self.last_error:
            log.info(
                "store %s is written again after %d failed attempts since the start",
                self.path,
                self._counters.write_errors,
            )
            self.last_error = ""
        self._tell_drops()

    def _tell_drops(self) -> None:
        counters = self.counters
        dropped = counters.dropped_rows + counters.dropped_verdicts
        if dropped > self._dropped_seen and not self._dropping:
            log.warning(
                "store %s drops rows or verdicts: they come faster than they can be written%s",
                self.path,
                f" ({self.last_error})" if self.last_error else "",
            )
        elif self._dropping and dropped == self._dropped_seen:
            log.info(
                "store %s drops nothing any more; dropped since the start: %d rows, %d verdicts",
                self.path,
                counters.dropped_rows,
                counters.dropped_verdicts,
            )
        self._dropping, self._dropped_seen = dropped > self._dropped_seen, dropped

    # ---- one transaction

    def _commit_pending(self) -> None:
        while self._tasks:
            self._batch.append(self._tasks.popleft())
        offered = self._offered  # before the heads: a slot is written before it is counted
        recordings = [
            (r, r.ring.head) for r in list(self._recordings) if r.ending or r.ring.head > r.ring.tail
        ]
        verdicts = [(ring, ring.head) for ring in list(self._verdicts.values()) if ring.head > ring.tail]
        if not (self._batch or recordings or verdicts):
            self._works()
            return
        self._check_not_moved()
        with immediate(self._db) as conn:
            for task in self._batch:
                self._work(task)
            self._writer.begin()
            written = [self._writer.write_rows(conn, recording, head) for recording, head in recordings]
            scored = sum(self._writer.write_verdicts(conn, self.run_id, ring, head) for ring, head in verdicts)
        self._writer.committed()
        for ring, head in verdicts:
            ring.tail = head
        rows = self._apply(written)
        self.committed_seq = offered
        if self.settings.synchronous == "full":
            self.synced_seq = offered
        self._finish_tasks(rows, scored)

    def _check_not_moved(self) -> None:
        """On POSIX a deleted file can still be written, and everything written is lost: look at the name."""
        try:
            here = os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            here = False
        if not here:
            raise StoreError(
                "the file was moved, replaced or deleted while in use",
                where=str(self.path),
                next_step="put it back, or restart to begin a new store",
            )

    def _work(self, task: Task) -> None:
        if task.future.cancelled():
            return
        if not task.future.running() and not task.future.set_running_or_notify_cancel():
            return
        task.error = None
        if task.work is None:
            return
        self._db.conn.execute("SAVEPOINT task")
        try:
            task.value = task.work(self._db)
        except Exception as exc:
            if isinstance(exc, sqlite3.Error) and code_of(exc) in RETRYABLE:
                raise
            self._db.conn.execute("ROLLBACK TO task")  # its content is at fault: trying again would not help
            task.error = exc
        self._db.conn.execute("RELEASE task")

    def _finish_tasks(self, rows: int, scored: int) -> None:
        batch, self._batch = self._batch, []
        rejected = sum(task.error is not None and not task.waited for task in batch)
        self._counters = replace(
            self._counters,
            rows=self._counters.rows + rows,
            verdicts=self._counters.verdicts + scored,
            entries=self._counters.entries + sum(task.work is not None for task in batch),
            commits=self._counters.commits + 1,
            rejected=self._counters.rejected + rejected,
        )
        self._works()  # before those who wait look at the state
        for task in batch:
            if task.future.cancelled():
                continue
            if task.error is None:
                task.future.set_result(task.value)
                continue
            task.future.set_exception(task.error)
            if not task.waited:
                log.error("store %s refused an entry: %s", self.path, task.error)

    def _apply(self, written: list[Written]) -> int:
        rows = 0
        for done in written:
            recording = done.recording
            recording.id, recording.name, recording.last_ns = done.id, done.name, done.last_ns
            recording.small_rows, recording.small_chunks = done.small_rows, done.small_chunks
            recording.ring.tail = done.head
            rows += done.written
            if done.ended and recording.ring.head == done.head:
                ring, gone = recording.ring, self._retired
                self._recordings.remove(recording)
                self._retired = replace(
                    gone,
                    dropped_rows=gone.dropped_rows + ring.dropped,
                    rejected=gone.rejected + ring.rejected,
                    out_of_order_rows=gone.out_of_order_rows + ring.out_of_order,
                )
        return rows

    # ---- between transactions

    def _sync_if_due(self) -> None:
        """Checkpoint: with synchronous NORMAL this is what brings commits to the disk."""
        if time.monotonic() < self._next_sync:
            return
        self._next_sync = time.monotonic() + self.settings.sync_interval_s
        committed = self.committed_seq
        busy, frames, done = self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if not busy and frames == done:
            self.synced_seq = max(self.synced_seq, committed)

    def _retain_step(self) -> None:
        self._retainer.step(self._db, self.path)
