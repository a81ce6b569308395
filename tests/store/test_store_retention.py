"""The store stays within its quota and ages: raw rows go first, then trend detail; what must stay, stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_rows import NEVER_S, PERIOD_NS, noise, offer_counted, row_frame, tags, verdict

from opcua_detector.store import AuditEntry, Event, FeedbackEntry, Retention, Store, Usage

DAY_NS = 86_400 * 10**9
QUIET = {"interval_s": NEVER_S}  # passes only when a test asks for one


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_800_000_000 * 10**9

    def __call__(self) -> int:
        return self.now_ns


def entries(store: Store, n: int) -> None:
    for k in range(n):
        store.record_event(Event("fan", k + 1, k, k + 1, sentence="s" * 50))
        store.record_audit(AuditEntry("me", "x", {"k": k}), timeout_s=None)
    store.record_feedback(FeedbackEntry("me", "true", "fan", 1))
    store.flush()


def kept(store: Store) -> tuple[object, ...]:
    return store.events(), store.audit(), store.feedback(), store.models(), store.runs()


def size_on_disk(store: Store, path: Path) -> int:
    store._writer.submit(None).result(10)
    with store.reading() as db:
        assert db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2
    store.close()
    return path.stat().st_size


def test_the_quota_takes_the_oldest_raw_rows_and_never_events_audit_or_feedback(path: Path) -> None:
    quota = 3_000_000
    with Store.open(path, retention=Retention(quota_bytes=quota, event_margin_ns=0, **QUIET)) as store:
        entries(store, 200)
        for k in range(10):
            store.write_record(f"r{k}", noise(10_000, 8, seed=k, start_ns=(k + 1) * 10**15))
        before = kept(store)
        assert store.usage().total_bytes > 5_000_000 and store.usage().quota_unmet
        usage = store.apply_retention()
        assert usage.total_bytes <= quota and not usage.quota_unmet
        assert usage.total_bytes >= 0.7 * quota  # and no more than needed
        assert kept(store) == before
        rows = [store.recording(f"r{k}").rows for k in range(10)]
        assert rows[9] == 10_000  # the newest is whole
        assert rows == sorted(rows) and rows[0] < 1500
        np.testing.assert_array_equal(
            store.read_recording("r9").values, noise(10_000, 8, seed=9, start_ns=10**16).values
        )
        counters = store.counters
        assert counters.thinned_rows + counters.deleted_rows == 100_000 - sum(rows) > 0
        store.verify()
        assert size_on_disk(store, path) <= quota * 1.02


def test_old_rows_are_thinned_before_any_are_deleted(path: Path) -> None:
    with Store.open(path, retention=Retention(quota_bytes=4_000_000, **QUIET)) as store:
        for k in range(8):
            store.write_record(f"r{k}", noise(10_000, 8, seed=k))
        store.apply_retention()
        assert store.counters.deleted_rows == 0 and store.counters.thinned_rows > 10_000
        thinned = store.recording("r0")
        assert thinned.thinned and 1000 <= thinned.rows < 1100
        read = store.read_recording("r0")
        whole = noise(10_000, 8, seed=0)
        np.testing.assert_array_equal(read.values, whole.values[::10])
        assert read.gap.all()  # no row continues the one before


def test_the_same_quota_met_again_and_again_keeps_recent_rows_whole(path: Path) -> None:
    with Store.open(path, retention=Retention(quota_bytes=1_000_000, **QUIET)) as store:
        for k in range(25):
            store.write_record(f"r{k}", noise(5_000, 8, seed=k))
            assert store.apply_retention().total_bytes <= 1_000_000
            newest = store.recording(f"r{k}")
            assert newest.rows == 5_000 and not newest.thinned
        assert store.counters.deleted_rows > 0


def test_rows_near_an_event_stay_whole_until_nothing_else_is_left(path: Path) -> None:
    start = 10**15
    record = noise(40_000, 8, start_ns=start)
    rules = Retention(quota_bytes=1_500_000, event_margin_ns=5 * 10**9, **QUIET)
    with Store.open(path, retention=rules) as store:
        store.write_record("r", record)
        store.record_event(Event("pump", 1, start + 20_000 * PERIOD_NS, start + 20_100 * PERIOD_NS))
        store.flush()
        store.apply_retention()
        near = store.read_recording("r", start + 19_500 * PERIOD_NS, start + 20_600 * PERIOD_NS)
        np.testing.assert_array_equal(near.values, record.values[19_500:20_600])
        assert store.recording("r").rows < 30_000
    with Store.open(path, retention=Retention(quota_bytes=150_000, **QUIET)) as store:
        assert store.apply_retention().total_bytes <= 150_000
        assert store.recording("r").rows == 0 and len(store.events()) == 1


def test_a_kept_recording_is_left_alone_and_a_quota_it_breaks_is_reported(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(path, retention=Retention(quota_bytes=500_000, **QUIET)) as store:
        store.write_record("healthy", noise(10_000, 8, seed=1), keep=True)
        store.write_record("other", noise(10_000, 8, seed=2))
        for _ in range(3):
            usage = store.apply_retention()
            assert usage.quota_unmet and usage.total_bytes > 500_000
        assert store.recording("healthy").rows == 10_000 and store.recording("other").rows == 0
        assert sum("its quota is" in record.getMessage() for record in caplog.records) == 1
        store.keep_recording("healthy", False)
        assert not store.apply_retention().quota_unmet


def test_a_quota_below_the_protected_tables_is_reported_and_takes_nothing_of_them(path: Path) -> None:
    with Store.open(path, retention=Retention(quota_bytes=50_000, **QUIET)) as store:
        entries(store, 2000)
        store.write_record("r", noise(5000, 4))
        before = kept(store)
        usage = store.apply_retention()
        assert usage.quota_unmet and usage.protected_bytes > 100_000
        assert kept(store) == before and store.recording("r").rows == 0


def test_rows_are_thinned_and_deleted_by_age_counted_from_when_they_were_recorded(path: Path) -> None:
    clock = Clock()
    rules = Retention(thin_after_ns=2 * DAY_NS, delete_after_ns=5 * DAY_NS, thin_keep=4, **QUIET)
    with Store.open(path, retention=rules, clock_ns=clock) as store:
        for day in range(8):
            store.write_record(
                f"day {day}", noise(1000, 2, seed=day, start_ns=10**16)
            )  # 1970: history is not old
            clock.now_ns += DAY_NS
        entries(store, 5)
        store.apply_retention()
        rows = {r.name: r.rows for r in store.recordings()}
        assert rows == {f"day {day}": n for day, n in enumerate([0, 0, 0, 250, 250, 250, 1000, 1000])}
        assert len(store.events()) == 5


def test_a_live_recording_is_trimmed_at_its_old_end_while_it_runs(path: Path) -> None:
    clock = Clock()
    rules = Retention(delete_after_ns=DAY_NS, **QUIET)
    with Store.open(
        path, retention=rules, clock_ns=clock, commit_interval_s=NEVER_S, ring_rows=5000
    ) as store:
        recording = store.start_recording("live", tags(8), PERIOD_NS)
        frame = row_frame(8)
        for block in range(4):
            offer_counted(store, recording, block * 5000, block * 5000 + 5000, frame)
            store.flush()
            clock.now_ns += DAY_NS // 2
        store.apply_retention()
        offer_counted(store, recording, 20_000, 20_010, frame)
        store.flush()
        read = store.read_recording("live")
        assert read.values[:, 0].tolist() == list(range(10_000, 20_010))
        assert np.flatnonzero(read.gap).tolist() == [0]


def fill_trend(store: Store, seconds: int) -> None:
    given = verdict()
    for n in range(seconds * 2):
        given.source_ns, given.score = n * 500_000_000, float(n % 97)
        given.alert, given.event_no = n < 2000, 1
        store.offer_verdict(given)
        if n % 4000 == 3999:
            store.flush()
    store.flush()


def test_an_old_trend_becomes_minutes_with_the_same_extremes(path: Path) -> None:
    clock = Clock()
    rules = Retention(coarsen_after_ns=DAY_NS, **QUIET)
    with Store.open(path, retention=rules, clock_ns=clock) as store:
        fill_trend(store, 7200)
        store.apply_retention()
        fine = store.trend("pump")
        assert len(fine) == 7200 and len(store.trend_detail("pump")) > 0
        clock.now_ns += DAY_NS + 3600 * 10**9
        store.apply_retention()
        coarse = store.trend("pump")
        old = coarse.source_ns < 3540 * 10**9
        assert (np.diff(coarse.source_ns[old]) == 60 * 10**9).all()
        assert len(coarse) < 60 + 3700 and len(store.trend_detail("pump")) == 0
        assert coarse.rows.sum() == fine.rows.sum() == 14_400
        for k in np.flatnonzero(old):
            inside = (fine.source_ns >= coarse.source_ns[k]) & (
                fine.source_ns < coarse.source_ns[k] + 60 * 10**9
            )
            assert coarse.score_max[k] == fine.score_max[inside].max()
            assert coarse.score_min[k] == fine.score_min[inside].min()
            assert coarse.score_last[k] == fine.score_last[inside][-1]
            assert coarse.alert[k] == fine.alert[inside].max()
        clock.now_ns += 30 * DAY_NS
        store.apply_retention()
        assert len(store.trend("pump")) == 120


def test_the_quota_takes_the_trend_only_after_the_raw_rows(path: Path) -> None:
    clock = Clock()
    with Store.open(path, retention=Retention(quota_bytes=600_000, **QUIET), clock_ns=clock) as store:
        fill_trend(store, 4000)
        store.write_record("r", noise(20_000, 8))
        store.apply_retention()
        assert len(store.trend("pump")) == 4000 and store.recording("r").rows < 10_000
    with Store.open(path, retention=Retention(quota_bytes=150_000, **QUIET), clock_ns=clock) as store:
        usage = store.apply_retention()
        assert store.recording("r").rows == 0
        assert len(store.trend("pump")) < 400 and usage.total_bytes <= 150_000
        assert store.trend("pump").rows.sum() == 8000


def test_usage_tells_what_is_used_by_which_class(path: Path) -> None:
    with Store.open(path) as store:
        empty = store.usage()
        store.write_record("r", noise(10_000, 8))
        fill_trend(store, 3000)
        entries(store, 500)
        usage = store.usage()
        assert isinstance(usage, Usage) and usage.quota_bytes is None and not usage.quota_unmet
        assert usage.raw_bytes == pytest.approx(10_000 * 8 * 8, rel=0.15)
        assert usage.total_bytes == (
            usage.raw_bytes + usage.trend_bytes + usage.protected_bytes + usage.other_bytes
        )
        assert usage.other_bytes - empty.other_bytes < 0.25 * usage.total_bytes
        with store.reading() as db:
            exact = dict(db.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name").fetchall())
        assert usage.trend_bytes == pytest.approx(exact["trend"] + exact["trend_detail"], rel=0.35)
        protected = sum(exact[name] for name in ("events", "audit", "feedback", "models", "runs"))
        assert usage.protected_bytes == pytest.approx(protected, rel=0.35)


def test_commits_go_on_during_a_large_clean_up(path: Path) -> None:
    rules = Retention(quota_bytes=1_000_000, step_s=0.0, **QUIET)  # one chunk per turn
    with Store.open(path, retention=rules, commit_interval_s=NEVER_S) as store:
        store.write_record("r", noise(60_000, 8))
        recording = store.start_recording("live", tags(1), PERIOD_NS)
        done = store._writer.retain()
        offer_counted(store, recording, 0, 10, row_frame(1))
        assert store.flush(5)
        assert not done.done()  # the commit did not wait for the end of the pass
        done.result(60)
        assert store.usage().total_bytes <= 1_000_000
