"""Rows that go into the store come out again, exactly; what is lost is counted and seen as a gap."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_rows import NEVER_S, PERIOD_NS, noise, offer_counted, row_frame, tags, verdict, write_lock

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.errors import StoreError
from opcua_detector.store import Retention, Store
from opcua_detector.store.chunks import chunk_rows

NAMES = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=12
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    n, k = draw(st.integers(0, 120)), draw(st.integers(1, 4))
    steps = draw(hnp.arrays(np.int64, n, elements=st.integers(1, 10**12)))
    names = draw(st.lists(NAMES, min_size=k, max_size=k, unique=True))
    listed = tuple(
        Tag(name, f"nsu=urn:x;s={name}", draw(st.sampled_from(list(TagKind))), unit=draw(NAMES),
            eu_range=draw(st.none() | st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))))
        for name in names
    )  # fmt: skip
    flags = hnp.arrays(np.uint8, n, elements=st.integers(0, 1))
    gap = draw(flags)
    gap[:1] = 1
    return Record(
        listed,
        draw(st.integers(1, 10**12)),
        draw(st.integers(-(10**18), 10**18)) + np.cumsum(steps),
        draw(hnp.arrays(np.float64, (n, k), elements=st.floats())),
        draw(hnp.arrays(np.uint8, (n, k), elements=st.integers(0, 1))),
        gap,
        draw(st.none() | flags),
    )


def assert_same(read: Record, written: Record) -> None:
    assert read.tags == written.tags
    assert read.period_ns == written.period_ns
    np.testing.assert_array_equal(read.source_ns, written.source_ns)
    np.testing.assert_array_equal(read.values.view(np.uint64), written.values.view(np.uint64))  # NaN bits too
    np.testing.assert_array_equal(read.valid, written.valid)
    np.testing.assert_array_equal(read.gap, written.gap)
    assert (read.truth is None) == (written.truth is None)
    if written.truth is not None:
        np.testing.assert_array_equal(read.truth, written.truth)
    for array in (read.source_ns, read.values, read.valid, read.gap):
        assert array.flags.writeable and array.flags.c_contiguous


def test_a_record_comes_back_bit_by_bit(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:

        @settings(max_examples=60, deadline=None, derandomize=True)
        @given(records(), NAMES)
        def check(record: Record, name: str) -> None:
            stored = store.write_record(None, record, group=name)
            assert stored.rows == len(record) and stored.group == name
            assert_same(store.read_recording(stored.id), record)

        check()


def test_a_record_of_many_chunks_comes_back_and_any_time_range_of_it(path: Path) -> None:
    record = noise(10_001, 3, start_ns=1_000)
    record.gap[[77, 5000]] = 1
    with Store.open(path) as store:
        store.write_record("lang", record)
        assert_same(store.read_recording("lang"), record)
        first, end = record.source_ns[4090], record.source_ns[9000]
        part = store.read_recording("lang", int(first), int(end))
        np.testing.assert_array_equal(part.values, record.values[4090:9000])
        assert part.gap[0] == 1 and part.gap.sum() == 2 and part.gap[5000 - 4090] == 1
        assert len(store.read_recording("lang", int(first) + 1, int(first) + 2)) == 0
        assert len(store.read_recording("lang", end_ns=1_000)) == 0


def test_live_rows_come_back_with_status_gap_and_truth_over_commits_and_merges(path: Path) -> None:
    n, k = 3 * chunk_rows(700), 700
    rng = np.random.default_rng(1)
    values = rng.normal(size=(n, k))
    valid = rng.integers(0, 2, (n, k), dtype=np.uint8)
    status = rng.integers(0, 2**32, (n, k), dtype=np.uint32)
    gap = (rng.random(n) < 0.1).astype(np.uint8)
    gap[0] = 1
    truth = rng.integers(0, 2, n, dtype=np.uint8)
    commits = set(rng.integers(0, n, 40).tolist())
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("läuft", tags(k), PERIOD_NS, truth=True)
        frame = row_frame(k)
        for i in range(n):
            frame.values[:], frame.valid[:], frame.status[:] = values[i], valid[i], status[i]
            frame.source_ns, frame.gap = i * PERIOD_NS, bool(gap[i])
            assert store.offer_row(recording, frame, int(truth[i])) == i + 1
            if i in commits:
                assert store.flush()
                assert store.committed_seq == i + 1
        store.end_recording(recording)
        read = store.read_recording("läuft")
        np.testing.assert_array_equal(read.values, values)
        np.testing.assert_array_equal(read.valid, valid)
        np.testing.assert_array_equal(read.gap, gap)
        np.testing.assert_array_equal(read.truth, truth)
        np.testing.assert_array_equal(store.read_status("läuft"), status)
        with store.reading() as db:
            chunks = db.execute("SELECT count(*) FROM row_chunks").fetchone()[0]
        assert chunks <= 6  # 40 commits, merged
        assert store.recording("läuft").ended_ns is not None
        assert store.counters.dropped_rows == 0


def test_a_slow_group_does_not_leave_one_database_row_per_sample(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("slow", tags(2), 10**9)
        for i in range(300):
            offer_counted(store, recording, i, i + 1, row_frame(2))
            store.flush()
        with store.reading() as db:
            assert db.execute("SELECT count(*) FROM row_chunks").fetchone()[0] < 50
        assert store.read_recording("slow").values[:, 0].tolist() == list(range(300))


def test_rows_beyond_a_full_ring_are_dropped_counted_and_seen_as_a_gap(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opcua_detector.store")
    with Store.open(path, commit_interval_s=NEVER_S, ring_rows=256, busy_timeout_s=0.02) as store:
        recording = store.start_recording("r", tags(2), PERIOD_NS)
        frame = row_frame(2)
        with write_lock(path):
            assert offer_counted(store, recording, 0, 300, frame) == 256
            assert store.offer_row(recording, frame) == 0
            assert store.counters.dropped_rows == 45
            assert not store.flush(0.3)
        assert store.flush()
        assert store.committed_seq == 256
        offer_counted(store, recording, 400, 410, frame)
        store.flush()
        read = store.read_recording("r")
        assert read.values[:, 0].tolist() == [*range(256), *range(400, 410)]
        assert np.flatnonzero(read.gap).tolist() == [0, 256]
        store.flush()
    drops = [record.getMessage() for record in caplog.records if "drops" in record.getMessage()]
    assert len(drops) == 2 and "locked" in drops[0] and "45 rows" in drops[1]


def test_verdicts_beyond_a_full_ring_are_dropped_and_counted(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S, ring_rows=128, busy_timeout_s=0.02) as store:
        given = verdict()
        with write_lock(path):
            taken = sum(store.offer_verdict(given) > 0 for _ in range(200))
        assert taken == 128 and store.counters.dropped_verdicts == 72


def test_a_row_that_does_not_fit_is_counted_and_never_raises_in_the_loop(path: Path) -> None:
    with Store.open(path) as store:
        recording = store.start_recording("r", tags(2), PERIOD_NS)
        assert store.offer_row(recording, row_frame(3)) == 0
        assert store.counters.rejected == 1
        assert offer_counted(store, recording, 1, 3, row_frame(2)) == 2
        store.flush()
        assert len(store.read_recording("r")) == 2


def test_a_row_that_is_not_later_is_counted_and_left_out(path: Path) -> None:
    with Store.open(path) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS)
        frame = row_frame(1)
        for source_ns in (10, 20, 20, 15, 30):
            frame.source_ns = source_ns
            store.offer_row(recording, frame)
        store.flush()
        assert store.read_recording("r").source_ns.tolist() == [10, 20, 30]
        assert store.counters.out_of_order_rows == 2


def test_a_source_clock_that_is_set_back_continues_in_a_new_recording(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS, group="g", truth=True)
        frame = row_frame(1)
        for commit, source_ns, gap in [
            (0, 100, 1),
            (0, 200, 0),
            (1, 300, 0),
            (0, 50, 1),
            (1, 60, 0),
            (1, 5, 1),
        ]:
            frame.source_ns, frame.gap = source_ns, bool(gap)
            store.offer_row(recording, frame, 1)
            if commit:
                store.flush()
        assert [(r.name, r.rows, r.group, r.truth) for r in store.recordings()] == [
            ("r", 3, "g", True), ("r (2)", 2, "g", True), ("r (3)", 1, "g", True)]  # fmt: skip
        assert store.read_recording("r (2)").source_ns.tolist() == [50, 60]
        assert recording.name == "r (3)"
        store.end_recording(recording)
        assert all(r.ended_ns is not None for r in store.recordings())


def test_rows_offered_after_the_end_of_a_recording_are_counted_as_dropped(path: Path) -> None:
    with Store.open(path) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS)
        offer_counted(store, recording, 0, 5, row_frame(1))
        store.end_recording(recording)
        assert offer_counted(store, recording, 5, 8, row_frame(1)) == 0
        assert store.recording("r").rows == 5


def test_names_are_unique_and_an_unknown_one_is_answered_with_those_that_exist(path: Path) -> None:
    with Store.open(path) as store:
        store.write_record("größe 'x'; --", noise(5, 1))
        with pytest.raises(StoreError, match="already"):
            store.start_recording("größe 'x'; --", tags(1), PERIOD_NS)
        with pytest.raises(StoreError, match="größe"):
            store.read_recording("grosse")
        with pytest.raises(StoreError, match="no recording 7"):
            store.read_recording(7)
        first = store.write_record(None, noise(2, 1), group="Presse")
        second = store.write_record(None, noise(2, 1), group="Presse")
        assert first.name.startswith("Presse 20") and first.name != second.name


def test_a_record_whose_time_goes_back_is_refused_as_a_whole(path: Path) -> None:
    record = noise(10, 1)
    record.source_ns[6] = record.source_ns[5]
    with Store.open(path) as store:
        with pytest.raises(StoreError, match="row 6"):
            store.write_record("r", record)
        assert store.recordings() == []


def test_deleting_a_recording_takes_its_rows_and_is_audited(path: Path) -> None:
    with Store.open(path) as store:
        store.write_record("a", noise(5000, 2))
        store.write_record("b", noise(10, 2))
        live = store.start_recording("c", tags(1), PERIOD_NS)
        store.delete_recording("a", "Ute")
        with pytest.raises(StoreError, match="being written"):
            store.delete_recording(live.id, "Ute")
        assert [r.name for r in store.recordings()] == ["b", "c"]
        with store.reading() as db:
            assert db.execute("SELECT count(*) FROM row_chunks").fetchone()[0] == 1
        entry = store.audit()[0]
        assert (entry.who, entry.action, entry.detail) == (
            "Ute",
            "recording deleted",
            {"name": "a", "rows": 5000},
        )


def test_a_damaged_chunk_is_named_and_the_rest_stays_readable(path: Path) -> None:
    with Store.open(path) as store:
        record = noise(9000, 2)
        store.write_record("r", record)
        store._writer.call(
            lambda db: db.execute(
                "UPDATE row_chunks SET value_blob = x'00' WHERE first_seq > 0 AND first_seq < 5000"
            ),
            10,
        )
        with pytest.raises(StoreError, match=r"rows 3000 to 5999 of recording 'r' are damaged"):
            store.read_recording("r")
        assert len(store.read_recording("r", end_ns=int(record.source_ns[2000]))) == 2000


def test_offers_do_not_grow_memory(path: Path) -> None:
    quiet = Retention(interval_s=NEVER_S)
    with Store.open(path, commit_interval_s=NEVER_S, ring_rows=65_536, retention=quiet) as store:
        recording = store.start_recording("r", tags(8), PERIOD_NS)
        frame, given = row_frame(8), verdict()

        def offers(start: int, stop: int) -> None:
            for n in range(start, stop):
                frame.source_ns = given.source_ns = n
                assert store.offer_row(recording, frame, 1)
                assert store.offer_verdict(given)

        offers(0, 1000)
        tracemalloc.start()
        try:
            offers(1000, 1010)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            offers(1010, 11_010)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak - before < 4096
        assert store.counters.dropped_rows == 0
        assert store.flush() and store.committed_seq == 22_020
