"""Events, feedback, audit, models, runs and the score trend: what goes in comes out, and stays."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from store_rows import NEVER_S, verdict

from opcua_detector.api import GOOD, UNCERTAIN_SUB_NORMAL, Cause
from opcua_detector.store import AuditEntry, Event, FeedbackEntry, Store
from opcua_detector.store.trend import AlertSurroundings, Scores

CAUSE = Cause("θ", "trans", 0.7, 31.0, -8.0, 12.0, "u", (-math.inf, 2.0), (2.0, math.inf), 0.02, 5, False)


def test_an_event_is_raised_explained_and_cleared_in_one_entry(path: Path) -> None:
    with Store.open(path) as store:
        run = store.start_run("0.1", "abc", ["pump"])
        store.record_event(Event("pump", 4, 1000, peak_score=1.2, severity=500, model_id="m1"))
        store.record_event(Event("pump", 4, 1000, sentence="u is 31 V - θ falls", causes=(CAUSE,)))
        store.record_event(Event("pump", 4, 1000, cleared_ns=2000, peak_score=3.5))
        store.record_event(Event("pump", 4, 1000, peak_score=2.0))
        store.flush()
        assert store.events() == [
            Event("pump", 4, 1000, 2000, 3.5, 500, "m1", "u is 31 V - θ falls", (CAUSE,), run)
        ]
        assert store.last_event_no("pump") == 4 and store.last_event_no("fan") == 0


def test_events_of_two_runs_with_the_same_number_do_not_overwrite_each_other(path: Path) -> None:
    with Store.open(path) as store:
        for raised_ns in (10, 20):
            store.start_run("0.1")
            store.record_event(Event("pump", 1, raised_ns))
            store.end_run("done")
        assert [event.raised_ns for event in store.events()] == [20, 10]
        assert [(run.end_reason, run.ended_ns is not None) for run in store.runs()] == [("done", True)] * 2


def test_events_are_found_by_monitor_and_by_the_time_in_which_they_stood(path: Path) -> None:
    with Store.open(path) as store:
        for number, (monitor, raised, cleared) in enumerate(
            [("a", 10, 20), ("a", 30, 40), ("b", 15, 35), ("a", 50, None)], 1
        ):
            store.record_event(Event(monitor, number, raised, cleared))
        store.flush()

        def numbers(*where: object, **named: object) -> list[int]:
            return [event.event_no for event in store.events(*where, **named)]  # type: ignore[arg-type]

        assert numbers() == [4, 2, 3, 1]
        assert numbers("a") == [4, 2, 1]
        assert numbers(start_ns=21) == [4, 2, 3]
        assert numbers(end_ns=16) == [3, 1]
        assert numbers("a", 100) == [4]  # still standing
        assert numbers(limit=2) == [4, 2]


def test_feedback_audit_and_models_come_back_as_they_were_given(path: Path) -> None:
    clock = iter(range(100, 200))
    with Store.open(path, clock_ns=lambda: next(clock)) as store:
        number = store.record_feedback(
            FeedbackEntry(
                "Jörg", "false alarm", "pump", 3, 10, 20, ("θ", "u"), "cleaning\n'; DROP", "m1", at_ns=7
            )
        )
        assert store.feedback("pump", 3) == [
            FeedbackEntry(
                "Jörg", "false alarm", "pump", 3, 10, 20, ("θ", "u"), "cleaning\n'; DROP", "m1", 7, number
            )
        ]
        assert store.feedback("fan") == []
        store.record_audit(
            AuditEntry("Jörg", "limit", {"to": 2.5, "was": math.nan, "Ω": [1, math.inf]}, at_ns=8)
        )
        store.record_audit(AuditEntry("x", "later"), timeout_s=None)
        store.flush()
        assert store.audit("limit")[0].detail == {"to": 2.5, "was": None, "Ω": [1, "Infinity"]}
        assert [entry.action for entry in store.audit()] == ["later", "limit"]
        store.register_model("m1", "pump", "a.npz", "aa", {"rows": np.int64(3), "limit": np.float64(0.5)})
        store.register_model("m1", "pump", "b.npz", "aa", {"rows": 4})
        store.register_model("m2", "pump", Path("c.npz"), "cc", {})
        assert [(m.model_id, m.path, m.header) for m in store.models("pump")] == [
            ("m2", "c.npz", {}), ("m1", "b.npz", {"rows": 4})]  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM audit", "UPDATE audit SET who = 'x'", "DELETE FROM events", "DELETE FROM feedback"],
)
def test_the_database_itself_refuses_to_change_what_must_stay(path: Path, statement: str) -> None:
    with Store.open(path) as store:
        store.record_audit(AuditEntry("me", "x"))
        store.record_feedback(FeedbackEntry("me", "true"))
        store.record_event(Event("pump", 1, 1))
    conn = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="never"):
        conn.execute(statement)
    conn.close()


# ---- trend


def offer_scores(store: Store, scores: list[tuple[int, float, int, bool]], commits: set[int]) -> None:
    given = verdict()
    for i, (given.source_ns, given.score, given.status, given.alert) in enumerate(scores):
        given.event_no = int(given.alert)
        store.offer_verdict(given)
        if i in commits:
            store.flush()
    store.flush()


def test_the_trend_has_one_bucket_per_second_however_the_batches_fall(path: Path) -> None:
    rng = np.random.default_rng(3)
    n = 2000
    source_ns = np.cumsum(rng.integers(1, 60_000_000, n)).tolist()
    score = np.where(rng.random(n) < 0.2, np.nan, rng.random(n)).tolist()
    score[300:420] = [math.nan] * 120  # whole buckets without a verdict
    status = rng.choice([GOOD, UNCERTAIN_SUB_NORMAL, 0x80320000], n).tolist()
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        rows = list(zip(source_ns, score, status, [False] * n, strict=True))
        offer_scores(store, rows, set(rng.integers(0, n, 100).tolist()))
        trend = store.trend("pump")
        assert len(store.trend_detail("pump")) == 0

    buckets: dict[int, list[tuple[int, float, int, bool]]] = {}
    for row in rows:  # the slow twin
        buckets.setdefault(row[0] // 10**9 * 10**9, []).append(row)
    assert trend.source_ns.tolist() == sorted(buckets)
    for k, bucket in enumerate(sorted(buckets)):
        real = [row[1] for row in buckets[bucket] if not math.isnan(row[1])]
        np.testing.assert_equal(trend.score_min[k], min(real, default=math.nan))
        np.testing.assert_equal(trend.score_max[k], max(real, default=math.nan))
        np.testing.assert_equal(trend.score_last[k], buckets[bucket][-1][1])
        assert trend.status[k] == max(row[2] for row in buckets[bucket])
        assert trend.rows[k] == len(buckets[bucket])
    assert any(math.isnan(x) for x in trend.score_max)


def test_the_trend_is_found_by_monitor_time_and_run(path: Path) -> None:
    with Store.open(path) as store:
        for start_s in (0, 100):
            run = store.start_run("1", monitors=["pump"])
            offer_scores(store, [((start_s + s) * 10**9, 0.5, 0, False) for s in range(10)], set())
            store.end_run()
        assert len(store.trend("pump")) == 20 and len(store.trend("fan")) == 0
        assert store.trend("pump", 5 * 10**9 + 1, 7 * 10**9).source_ns.tolist() == [5 * 10**9, 6 * 10**9]
        assert store.trend("pump", run_id=run).source_ns[0] == 100 * 10**9


@pytest.mark.parametrize("seed", range(5))
def test_every_row_around_an_alert_is_chosen_once_however_the_batches_fall(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, before, after = 600, 7, 11
    alert = np.zeros(n, np.uint8)
    for start in rng.integers(0, n, 6):
        alert[start : start + rng.integers(1, 30)] = 1
    state = AlertSurroundings(before, after, budget=10**6)
    chosen: list[int] = []
    at = 0
    while at < n:
        end = min(n, at + int(rng.integers(1, 40)))
        index = np.arange(at, end, dtype=np.int64)
        batch = Scores(
            index, index.astype(float), index.astype(np.uint32), alert[at:end], np.ones(end - at, np.int64)
        )
        again, _ = state.choose(batch)  # a batch that is tried again chooses the same
        rows, state = state.choose(batch)
        assert again.source_ns.tolist() == rows.source_ns.tolist()
        chosen += rows.source_ns.tolist()
        at = end
    expected = [i for i in range(n) if alert[max(0, i - after) : i + before + 1].any()]
    assert sorted(chosen) == expected


def test_an_alert_that_stands_for_ever_keeps_a_bounded_number_of_rows(path: Path) -> None:
    state = AlertSurroundings(before=5, after=5, budget=100)
    total = 0
    for batch in range(20):
        index = np.arange(batch * 50, batch * 50 + 50, dtype=np.int64)
        ones = np.ones(50, np.uint8)
        event = np.full(50, 1 if batch < 10 else 2, np.int64)
        rows, state = state.choose(Scores(index, index.astype(float), index.astype(np.uint32), ones, event))
        total += len(rows)
    assert total == 200  # 100 for each of the two events


def test_rows_around_an_alert_are_kept_at_full_rate(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        rows = [(n * 10**7, n / 1000, 0, 1500 <= n < 1600) for n in range(4000)]
        offer_scores(store, rows, {200, 1400, 1550, 1700})
        detail = store.trend_detail("pump")
        assert detail.source_ns.tolist() == [n * 10**7 for n in range(1000, 2100)]
        assert detail.score_last[0] == 1.0 and detail.alert.sum() == 100
