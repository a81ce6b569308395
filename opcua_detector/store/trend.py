"""Scores over time, bounded: one bucket per second for ever coarser history, every row around an alert.

A bucket is merged in the database (upsert), so a bucket that is still open when a batch is committed, or
when the process is killed, is completed by the next batch and loses nothing.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

import numpy as np

from ..api import Float64, Int64, UInt8, UInt32

BUCKET_NS = 1_000_000_000
COARSER_NS = (60_000_000_000, 3_600_000_000_000)  # what retention merges buckets into

_UPSERT = """
    INSERT INTO trend (series_id, bucket_ns, width_ns, score_min, score_max, score_last, status, alert,
    row_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (series_id, bucket_ns) DO UPDATE SET
        width_ns = max(width_ns, excluded.width_ns),
        score_min = min(coalesce(score_min, excluded.score_min), coalesce(excluded.score_min, score_min)),
        score_max = max(coalesce(score_max, excluded.score_max), coalesce(excluded.score_max, score_max)),
        score_last = excluded.score_last, status = max(status, excluded.status),
        alert = max(alert, excluded.alert), row_count = row_count + excluded.row_count"""


@dataclass(frozen=True, slots=True)
class Scores:
    """Verdicts of one monitor: source_ns int64[n], score float64[n], status uint32[n], alert uint8[n],
    event_no int64[n]."""

    source_ns: Int64
    score: Float64
    status: UInt32
    alert: UInt8
    event_no: Int64

    def __len__(self) -> int:
        return len(self.source_ns)


def series_id(conn: sqlite3.Connection, run_id: int, monitor: str, behind_ns: int) -> int:
    """Return the number under which the scores of this monitor in this run stand.

    behind_ns : int; our clock less the source clock (replayed and simulated time), kept when the series
    begins
    """
    conn.execute(
        "INSERT OR IGNORE INTO trend_series (run_id, monitor, behind_ns) VALUES (?, ?, ?)",
        (run_id, monitor, behind_ns),
    )
    return int(
        conn.execute(
            "SELECT id FROM trend_series WHERE run_id = ? AND monitor = ?", (run_id, monitor)
        ).fetchone()[0]
    )


def write_buckets(conn: sqlite3.Connection, series: int, scores: Scores) -> None:
    """Merge scores (at least one) into their buckets of one second."""
    bucket = scores.source_ns // BUCKET_NS * BUCKET_NS
    starts = np.flatnonzero(np.diff(bucket, prepend=bucket[0] - 1))
    ends = np.append(starts[1:], len(scores))
    conn.executemany(
        _UPSERT,
        zip(
            [series] * len(starts),
            bucket[starts].tolist(),
            [BUCKET_NS] * len(starts),
            np.fmin.reduceat(scores.score, starts).tolist(),
            np.fmax.reduceat(scores.score, starts).tolist(),
            scores.score[ends - 1].tolist(),
            np.maximum.reduceat(scores.status, starts).tolist(),
            np.maximum.reduceat(scores.alert, starts).tolist(),
            (ends - starts).tolist(),
            strict=True,
        ),
    )


def write_detail(conn: sqlite3.Connection, series: int, scores: Scores) -> None:
    """Write scores row by row."""
    conn.executemany(
        "INSERT OR REPLACE INTO trend_detail VALUES (?, ?, ?, ?, ?)",
        zip(
            [series] * len(scores),
            scores.source_ns.tolist(),
            scores.score.tolist(),
            scores.status.tolist(),
            scores.alert.tolist(),
            strict=True,
        ),
    )


def coarsen(conn: sqlite3.Connection, series: int, width_ns: int, before_ns: int, limit: int) -> int:
    """Merge up to `limit` of a series' oldest buckets narrower than `width_ns`; return how many.

    Only whole target buckets that end before `before_ns`; the caller holds the transaction.
    """
    before_ns = before_ns // width_ns * width_ns
    fine = conn.execute(
        "SELECT bucket_ns, score_min, score_max, score_last, status, alert, row_count FROM trend "
        "WHERE series_id = ? AND width_ns < ? AND bucket_ns < ? ORDER BY bucket_ns LIMIT ?",
        (series, width_ns, before_ns, limit),
    ).fetchall()
    conn.executemany(
        "DELETE FROM trend WHERE series_id = ? AND bucket_ns = ?", [(series, row[0]) for row in fine]
    )
    conn.executemany(_UPSERT, [(series, row[0] // width_ns * width_ns, width_ns, *row[1:]) for row in fine])
    return len(fine)


def delete_detail(conn: sqlite3.Connection, series: int, before_ns: int, limit: int) -> int:
    """Delete up to `limit` of the oldest row-by-row scores of a series; return how many."""
    oldest = conn.execute(
        "SELECT source_ns FROM trend_detail WHERE series_id = ? AND source_ns < ? ORDER BY source_ns LIMIT ?",
        (series, before_ns, limit),
    ).fetchall()
    if oldest:
        conn.execute(
            "DELETE FROM trend_detail WHERE series_id = ? AND source_ns <= ?", (series, oldest[-1][0])
        )
    return len(oldest)


class AlertSurroundings:
    """Chooses the verdicts of one monitor that lie around an alert, over batch borders.

    Parameters
    ----------
    before, after : int; rows kept before and after each alert row
    budget : int; most rows kept for one alert, so that an alert that stands for days stays bounded
    """

    def __init__(self, before: int = 500, after: int = 500, budget: int = 20_000) -> None:
        self.before, self.after, self.budget = before, after, budget
        none = np.empty(0, np.int64)
        self._recent = Scores(none, np.empty(0), none.astype(np.uint32), none.astype(np.uint8), none)
        self._written = np.empty(0, np.bool_)
        self._event_no, self._spent = -1, 0

    def choose(self, batch: Scores) -> tuple[Scores, AlertSurroundings]:
        """Return the verdicts to write now and the state after this batch, to be kept once committed."""
        recent = self._recent
        rows = Scores(
            *(
                np.concatenate([getattr(recent, name), getattr(batch, name)])
                for name in ("source_ns", "score", "status", "alert", "event_no")
            )
        )
        n = len(rows)
        written = np.concatenate([self._written, np.zeros(len(batch), np.bool_)])
        alerts = np.concatenate([[0], np.cumsum(rows.alert, dtype=np.int64)])
        at = np.arange(n)
        near = alerts[np.minimum(n, at + self.before + 1)] > alerts[np.maximum(0, at - self.after)]
        chosen = np.flatnonzero(near & ~written)

        after = AlertSurroundings(self.before, self.after, self.budget)
        after._event_no, after._spent = self._event_no, self._spent
        if alerts[-1]:
            newest = int(rows.event_no[np.flatnonzero(rows.alert)[-1]])
            if newest != after._event_no:
                after._event_no, after._spent = newest, 0
        chosen = chosen[: max(0, self.budget - after._spent)]
        after._spent += len(chosen)
        written[chosen] = True
        last = slice(max(0, n - self.before - self.after), n)
        after._recent = Scores(
            rows.source_ns[last], rows.score[last], rows.status[last], rows.alert[last], rows.event_no[last]
        )
        after._written = written[last]
        return Scores(
            rows.source_ns[chosen],
            rows.score[chosen],
            rows.status[chosen],
            rows.alert[chosen],
            rows.event_no[chosen],
        ), after
