"""Keeps the store within its quota and ages: raw rows go first, then the trend gets coarser, the rest stays.

Works on the writer thread between two batches, one chunk per transaction and some tens of milliseconds per
turn, so that a large clean-up never delays a commit. Events, feedback, audit, models and runs are never
touched; recordings marked `keep` neither. Where only those remain and the quota is still exceeded, that is
reported.
"""

from __future__ import annotations

import logging
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlite_utils

from .chunks import (
    CHUNK_COLUMNS,
    DEFLATED,
    INSERT_CHUNK,
    MERGED,
    NEAR_EVENT,
    SELECT_CHUNK,
    SMALL,
    THINNED,
    decode,
    encode,
    merge_small,
)
from .entries import tags_from_json
from .schema import immediate
from .trend import COARSER_NS, coarsen, delete_detail

log = logging.getLogger(__name__)

DAY_NS = 86_400_000_000_000
HYSTERESIS = 0.95  # once over the quota, free a little more, so that not every batch starts a clean-up
_LADDER_NS = (30 * DAY_NS, 7 * DAY_NS, DAY_NS, 3_600_000_000_000, -(1 << 61))  # the last: everything
_BUCKETS_PER_STEP = 2000


@dataclass(frozen=True, slots=True)
class Retention:
    """What may be taken away, and when. Ages count from when it was recorded, on our clock, so that
    history read today and simulated time are not old.

    quota_bytes : int or None; most bytes of the database file (its write-ahead log, some MB, comes on top)
    thin_after_ns : int or None; raw rows older than this that are not near an event keep every nth row
    delete_after_ns : int or None; raw rows older than this are deleted, near an event or not
    coarsen_after_ns : int or None; the trend older than this has one bucket per minute
    thin_keep : int; the n above
    event_margin_ns : int; what counts as near an event, before it was raised and after it was cleared
    interval_s : float; pause between two passes
    step_s : float; longest turn between two batches (one chunk at least)
    """

    quota_bytes: int | None = None
    thin_after_ns: int | None = None
    delete_after_ns: int | None = None
    coarsen_after_ns: int | None = 30 * DAY_NS
    thin_keep: int = 10
    event_margin_ns: int = 600_000_000_000
    interval_s: float = 30.0
    step_s: float = 0.05


def live_bytes(db: sqlite_utils.Database) -> int:
    """Return the bytes of the file that hold something."""
    pages, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


class Retainer:
    """The retention of one store; `step` is called by the writer thread between two batches."""

    def __init__(self, retention: Retention, clock_ns: Callable[[], int]) -> None:
        self.retention = retention
        self.unmet = False
        self.thinned_rows = self.deleted_rows = self.decimated = 0
        self._clock_ns = clock_ns
        self._pass: Iterator[None] | None = None
        self._requested: list[Future[Any]] = []
        self._serving: list[Future[Any]] = []
        self._next = time.monotonic() + retention.interval_s

    @property
    def active(self) -> bool:
        """Whether a pass is under way."""
        return self._pass is not None

    def request(self) -> Future[Any]:
        """Ask for a pass that begins after this call; the future is done when it is through."""
        future: Future[Any] = Future()
        self._requested.append(future)
        return future

    def stop(self, reason: Exception | None) -> None:
        """Give up the pass under way; with a reason, also those who wait for one."""
        self._pass = None
        self._requested, self._serving = [*self._serving, *self._requested], []
        if reason is not None:
            for future in self._requested:
                future.set_exception(reason)
            self._requested = []

    def step(self, db: sqlite_utils.Database, path: Path) -> None:
        """Work for one turn; begin a pass where one is due or asked for."""
        if self._pass is None:
            if not self._requested and time.monotonic() < self._next:
                return
            self._serving, self._requested = self._requested, []
            self._next = time.monotonic() + self.retention.interval_s
            self._pass = self._work(db, path)
        end = time.monotonic() + self.retention.step_s
        try:
            for _ in self._pass:
                if time.monotonic() >= end:
                    return
        except BaseException as exc:
            self._pass = None
            for future in self._serving:
                future.set_exception(exc)
            self._serving = []
            raise
        self._pass = None
        for future in self._serving:
            future.set_result(None)
        self._serving = []

    def _work(self, db: sqlite_utils.Database, path: Path) -> Iterator[None]:
        """One pass; each yield is a point where the writer may turn to the next batch."""
        now_ns, rules = self._clock_ns(), self.retention
        yield from self._merge_leftovers(db)
        if rules.delete_after_ns is not None:
            while self._delete_oldest(
                db, (SMALL, MERGED, THINNED, NEAR_EVENT), now_ns - rules.delete_after_ns
            ):
                yield
        if rules.thin_after_ns is not None:
            while self._thin_oldest(db, now_ns - rules.thin_after_ns):
                yield
        if rules.coarsen_after_ns is not None:
            yield from self._coarsen(db, COARSER_NS[0], now_ns - rules.coarsen_after_ns)
        if rules.quota_bytes is not None:
            yield from self._meet_quota(db, path, rules.quota_bytes, now_ns)
        free = -1
        while (left := int(db.execute("PRAGMA freelist_count").fetchone()[0])) > 0 and left != free:
            free = left
            db.execute("PRAGMA incremental_vacuum(256)").fetchall()
            yield

    def _merge_leftovers(self, db: sqlite_utils.Database) -> Iterator[None]:
        """Merge the small chunks of recordings that a killed process left."""
        for recording_id, tags in db.execute(
            "SELECT id, tags FROM recordings WHERE ended_ns IS NOT NULL AND EXISTS (SELECT 1 FROM row_chunks "
            "WHERE recording_id = recordings.id AND level = ?)",
            (SMALL,),
        ).fetchall():
            merged = 1
            while merged:
                try:
                    with immediate(db) as conn:
                        merged = merge_small(conn, recording_id, len(tags_from_json(tags)), 256)
                except (ValueError, zlib.error) as exc:
                    log.error("rows of recording %d cannot be merged: %s", recording_id, exc)
                    with immediate(db) as conn:
                        conn.execute(
                            "UPDATE row_chunks SET level = ? WHERE recording_id = ? AND level = ?",
                            (MERGED, recording_id, SMALL),
                        )
                    merged = 0
                yield

    def _oldest(
        self, conn: sqlite3.Connection, level: int, before_ns: int
    ) -> tuple[int, int, int, int, int, int] | None:
        """Return id, rows, bytes, first_ns, last_ns, written_ns of a level's oldest chunk."""
        row: tuple[int, int, int, int, int, int] | None = conn.execute(
            "SELECT c.id, c.row_count, c.bytes, c.first_ns, c.last_ns, c.written_ns FROM row_chunks c "
            "JOIN recordings r ON r.id = c.recording_id AND r.keep = 0 "
            "WHERE c.level = ? AND c.written_ns < ? ORDER BY c.written_ns, c.id LIMIT 1",
            (level, before_ns),
        ).fetchone()
        return row

    def _delete_oldest(self, db: sqlite_utils.Database, levels: tuple[int, ...], before_ns: int) -> int:
        """Delete the oldest chunk of the first level that has one; return its bytes, 0 = there is none."""
        with immediate(db) as conn:
            for level in levels:
                chunk = self._oldest(conn, level, before_ns)
                if chunk is not None:
                    conn.execute("DELETE FROM row_chunks WHERE id = ?", (chunk[0],))
                    break
            else:
                return 0
        self.deleted_rows += chunk[1]
        return chunk[2] or 1

    def _thin_oldest(self, db: sqlite_utils.Database, before_ns: int) -> tuple[int, int] | None:
        """Thin the oldest complete chunk; return bytes before and after, None where there is none."""
        margin, keep = self.retention.event_margin_ns, self.retention.thin_keep
        removed = 0
        with immediate(db) as conn:
            chunk = self._oldest(conn, MERGED, before_ns)
            if chunk is None:
                return None
            chunk_id, n, size, first_ns, last_ns, written_ns = chunk
            near = conn.execute(
                "SELECT 1 FROM events WHERE raised_ns <= ? AND coalesce(cleared_ns, raised_ns) >= ? LIMIT 1",
                (last_ns + margin, first_ns - margin),
            ).fetchone()
            if near:
                conn.execute("UPDATE row_chunks SET level = ? WHERE id = ?", (NEAR_EVENT, chunk_id))
                return size, 0
            recording_id, tags = conn.execute(
                "SELECT r.id, r.tags FROM recordings r JOIN row_chunks c ON c.recording_id = r.id "
                "WHERE c.id = ?",
                (chunk_id,),
            ).fetchone()
            try:
                rows = decode(
                    conn.execute(f"{SELECT_CHUNK} FROM row_chunks WHERE id = ?", (chunk_id,)).fetchone(),
                    len(tags_from_json(tags)),
                )
            except (ValueError, zlib.error) as exc:  # damaged: leave it to the quota, which deletes it last
                log.error(
                    "rows of recording %d cannot be read and are left as they are: %s", recording_id, exc
                )
                conn.execute("UPDATE row_chunks SET level = ? WHERE id = ?", (NEAR_EVENT, chunk_id))
                return size, 0
            kept = rows.take(np.flatnonzero(rows.seq % keep == 0))
            conn.execute("DELETE FROM row_chunks WHERE id = ?", (chunk_id,))
            left = 0
            if len(kept):
                stored = encode(kept, recording_id, written_ns, THINNED, DEFLATED)
                conn.execute(INSERT_CHUNK, stored)
                left = int(stored[CHUNK_COLUMNS.index("bytes")])
            removed = n - len(kept)
        self.thinned_rows += removed
        return size, left

    def _coarsen(self, db: sqlite_utils.Database, width_ns: int, before_ns: int) -> Iterator[None]:
        """Delete the row-by-row scores and merge the buckets older than `before_ns`, series by series."""
        for series, behind_ns in db.execute("SELECT id, behind_ns FROM trend_series ORDER BY id").fetchall():
            end_ns = before_ns - behind_ns  # on the source clock
            for fine in (True, False):
                done = 1
                while done:
                    with immediate(db) as conn:
                        done = (
                            delete_detail(conn, series, end_ns, _BUCKETS_PER_STEP)
                            if fine
                            else coarsen(conn, series, width_ns, end_ns, _BUCKETS_PER_STEP)
                        )
                    self.decimated += done
                    yield

    def _meet_quota(self, db: sqlite_utils.Database, path: Path, quota: int, now_ns: int) -> Iterator[None]:
        if live_bytes(db) > quota:
            yield from self._shrink_rows(db, int(quota * HYSTERESIS))
            for width_ns in COARSER_NS:
                for age_ns in _LADDER_NS:
                    if live_bytes(db) > quota:
                        yield from self._coarsen(db, width_ns, now_ns - age_ns)
        used = live_bytes(db)
        unmet = used > quota
        if unmet and not self.unmet:
            log.warning(
                "store %s uses %d bytes, its quota is %d: what remains (events, feedback, audit, models, "
                "kept recordings, newest rows) is never deleted; raise the quota or archive the file",
                path,
                used,
                quota,
            )
        elif self.unmet and not unmet:
            log.info("store %s is within its quota again", path)
        self.unmet = unmet

    def _shrink_rows(self, db: sqlite_utils.Database, target: int) -> Iterator[None]:
        """Thin and delete the oldest raw rows until the file holds at most `target` bytes.

        Thinned rows may take as much room as those at full resolution; beyond that the oldest of them are
        deleted. So recent rows stay complete while old ones are still there as an outline.
        """
        forever = 1 << 62
        sums: dict[int, int] = dict(
            db.execute(
                "SELECT c.level, sum(c.bytes) FROM row_chunks c JOIN recordings r ON r.id = c.recording_id "
                "WHERE r.keep = 0 GROUP BY c.level"
            ).fetchall()
        )
        full, thinned = sums.get(MERGED, 0), sums.get(THINNED, 0)
        while live_bytes(db) > target:
            if full > thinned or thinned <= 0:
                change = self._thin_oldest(db, forever)
                if change is not None:
                    full, thinned = full - change[0], thinned + change[1]
                    yield
                    continue
                full = 0
            deleted = self._delete_oldest(db, (THINNED, MERGED, NEAR_EVENT), forever)
            if not deleted:
                return
            thinned -= deleted
            yield
