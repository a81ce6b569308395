"""Killed, locked, full, damaged, doubled: the store says so, keeps what is committed, goes on by itself."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sqlite_utils import Database
from store_rows import NEVER_S, PERIOD_NS, noise, offer_counted, row_frame, tags, verdict, write_lock

from opcua_detector.errors import StoreError
from opcua_detector.store import MIGRATIONS, AuditEntry, Event, FeedbackEntry, Migration, Retention, Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}


@pytest.mark.parametrize("reports", np.random.default_rng(7).integers(1, 60, 5).tolist())
def test_kill_9_loses_nothing_up_to_committed_seq_and_corrupts_nothing(path: Path, reports: int) -> None:
    with subprocess.Popen(
        [sys.executable, str(HERE / "kill_child.py"), str(path)], stdout=subprocess.PIPE, env=environment()
    ) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(reports)]
        child.kill()
        told += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    committed = told[-1]
    with Store.open(path) as store:
        store.verify()
        read = store.read_recording(1)
        assert len(read) >= committed // 2 > 0
        np.testing.assert_array_equal(read.values[:, 3], np.arange(len(read)))
        assert np.flatnonzero(read.gap).tolist() == [0]
        trend = store.trend("pump")
        assert trend.rows.sum() >= committed // 2
        np.testing.assert_array_equal(trend.score_last[:-1], np.cumsum(trend.rows)[:-1] - 1)
        events = {event.event_no for event in store.events()}
        assert events == set(range(1, len(events) + 1)) and len(events) >= (committed // 2 - 1) // 100 + 1
        run = store.runs()[0]
        assert run.ended_ns is None and "did not end" in run.end_reason
        assert store.recording(1).ended_ns is not None
        store.apply_retention()  # merges what the killed process left in small chunks
        np.testing.assert_array_equal(store.read_recording(1).values, read.values)
        with store.reading() as db:
            assert db.execute("SELECT count(*) FROM row_chunks WHERE level = 0").fetchone()[0] == 0


def test_a_locked_database_is_survived_without_loss_and_told_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opcua_detector.store")
    with Store.open(path, commit_interval_s=0.01, busy_timeout_s=0.02) as store:
        recording = store.start_recording("r", tags(2), PERIOD_NS)
        frame = row_frame(2)
        with write_lock(path):
            offer_counted(store, recording, 0, 500, frame)
            store.record_event(Event("pump", 1, 5))
            assert not store.flush(0.5)
            assert "locked" in store.last_error
            assert store.counters.write_errors >= 2
            assert store.committed_seq == 0 and store.queued >= 501
            with pytest.raises(StoreError, match=r"locked.*not written"):
                store.record_feedback(FeedbackEntry("me", "true"), timeout_s=0.1)
        assert store.flush()
        assert store.last_error == "" and store.committed_seq == 500
        assert len(store.read_recording("r")) == 500
        assert len(store.events()) == 1 and store.feedback() == []
    told = [record.getMessage() for record in caplog.records]
    assert sum("cannot be written" in text for text in told) == 1
    assert sum("is written again" in text for text in told) == 1


def test_a_full_disk_is_survived_and_nothing_is_lost_when_there_is_room_again(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("r", tags(50), PERIOD_NS)

        def limit(pages: int) -> None:  # what SQLite may use stands for the size of the disk
            store._writer.call(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone(), 30)

        limit(60)
        frame = row_frame(50)
        assert offer_counted(store, recording, 0, 2000, frame) == 2000
        store.record_event(Event("pump", 1, 5))
        assert not store.flush(0.5)
        assert "full" in store.last_error and store.counters.write_errors >= 1
        assert store.committed_seq == 0
        assert store.events() == []  # all of a batch or nothing
        limit(1_000_000)
        assert store.flush()
        assert store.last_error == "" and store.committed_seq == 2000
        assert store.read_recording("r").values[:, 7].tolist() == list(range(2000))
        assert len(store.events()) == 1
        store.verify()


def test_a_commit_that_fails_at_its_very_end_is_made_again_as_a_whole(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("r", tags(2), PERIOD_NS)
        attempts: list[tuple[int, int]] = []

        def break_first(db: Database) -> None:
            attempts.append((store.committed_seq, recording.ring.tail))
            if len(attempts) == 1:  # a foreign key that is only checked by COMMIT
                db.execute("PRAGMA defer_foreign_keys = ON")
                columns = (
                    "recording_id, first_seq, row_count, first_ns, last_ns, written_ns, level, codec, bytes"
                )
                db.execute(f"INSERT INTO row_chunks ({columns}, source_ns, value_blob) "
                           "VALUES (99, 0, 1, 0, 0, 0, 1, 0, 0, x'', x'')")  # fmt: skip

        offer_counted(store, recording, 0, 20, row_frame(2))
        store.record_event(Event("pump", 1, 5))
        store._writer.submit(break_first).result(10)
        assert attempts == [(0, 0), (0, 0)]  # nothing was taken for written in between
        assert store.counters.write_errors == 1 and store.committed_seq == 20
        assert len(store.read_recording("r")) == 20 and len(store.events()) == 1


def test_an_io_error_is_answered_with_a_fresh_connection_and_a_new_attempt(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("r", tags(2), PERIOD_NS)
        connections: list[int] = []

        def break_first(db: Database) -> None:
            connections.append(id(db))
            if len(connections) == 1:
                fault = sqlite3.OperationalError("disk I/O error")
                fault.sqlite_errorcode = sqlite3.SQLITE_IOERR  # type: ignore[misc]
                raise fault

        offer_counted(store, recording, 0, 20, row_frame(2))
        store._writer.submit(break_first).result(10)
        assert len(set(connections)) == 2
        assert len(store.read_recording("r")) == 20 and store.last_error == ""


def test_retention_that_cannot_write_says_so_and_works_later(path: Path) -> None:
    with Store.open(path, busy_timeout_s=0.02, retention=Retention(quota_bytes=100_000)) as store:
        store.write_record("r", noise(5000, 8))
        with write_lock(path), pytest.raises(StoreError, match="locked"):
            store.apply_retention()
        assert store.apply_retention().total_bytes <= 100_000


def test_a_closed_store_says_so(path: Path) -> None:
    store = Store.open(path)
    recording = store.start_recording("r", tags(1), PERIOD_NS)
    store.close()
    store.close()
    for refused in (
        store.recordings,
        store.flush,
        store.apply_retention,
        lambda: store.record_event(Event("a", 1, 1)),
    ):
        with pytest.raises(StoreError, match="closed"):
            refused()
    assert store.offer_row(recording, row_frame(1)) == 0  # the loop never raises


def test_closing_while_nothing_can_be_written_says_how_much_is_lost(path: Path) -> None:
    store = Store.open(path, commit_interval_s=NEVER_S, busy_timeout_s=0.02)
    recording = store.start_recording("r", tags(1), PERIOD_NS)
    with write_lock(path):
        offer_counted(store, recording, 0, 7, row_frame(1))
        with pytest.raises(StoreError, match=r"7 rows.*locked"):
            store.close(timeout_s=0.2)
    with Store.open(path) as again:  # the lock was given back
        assert len(again.read_recording("r")) == 0


def test_an_exception_in_the_body_is_not_hidden_by_a_failing_close(path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), Store.open(path) as store:
        offer_counted(store, store.start_recording("r", tags(1), PERIOD_NS), 0, 3, row_frame(1))
        raise KeyError("mine")
    with Store.open(path, readonly=True) as store:
        assert len(store.read_recording("r")) == 3


def test_a_store_file_that_vanishes_is_an_error_and_not_a_silent_loss(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS)
        hidden = path.with_name("hidden")
        path.rename(hidden)
        offer_counted(store, recording, 0, 5, row_frame(1))
        assert not store.flush(0.2)
        assert "moved, replaced or deleted" in store.last_error
        hidden.rename(path)
        assert store.flush()
        assert len(store.read_recording("r")) == 5


def test_an_entry_that_the_database_refuses_is_counted_and_stops_nothing(path: Path) -> None:
    with Store.open(path) as store:
        store.record_event(Event("pump", 1, 5))
        store.record_event(Event("pump", 2, 2**70))  # does not fit an SQLite integer
        store.record_event(Event("pump", 3, 7))
        assert store.flush()
        assert {event.event_no for event in store.events()} == {1, 3}
        assert store.counters.rejected == 1 and store.last_error == ""


def test_reading_works_while_rows_are_written(path: Path) -> None:
    with Store.open(path, commit_interval_s=0.001) as store, Store.open(path, readonly=True) as other:
        recording = store.start_recording("r", tags(3), PERIOD_NS)
        frame = row_frame(3)
        seen = 0
        for block in range(60):
            offer_counted(store, recording, block * 100, block * 100 + 100, frame)
            for reader in (store, other):
                read = reader.read_recording("r")
                np.testing.assert_array_equal(read.values[:, 1], np.arange(len(read)))
                assert len(read) >= seen
                seen = len(read)
        assert store.flush()
        assert len(other.read_recording("r")) == 6000


# ---- two processes


def test_a_second_writer_is_refused_while_readers_are_welcome(path: Path) -> None:
    code = (
        "import sys; from opcua_detector.store import Store; from opcua_detector.errors import StoreError\n"
        "print(len(Store.open(sys.argv[1], readonly=True).recordings()))\n"
        "try: Store.open(sys.argv[1])\n"
        "except StoreError as exc: print(exc)"
    )
    with Store.open(path) as store:
        store.write_record("a", noise(3, 1))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("1\n")
        assert f"another process writes to this store (process {os.getpid()})" in done.stdout
        assert "next step: stop that process" in done.stdout
        with pytest.raises(StoreError, match="another process writes"):
            Store.open(path)
    Store.open(path).close()


def test_a_reader_cannot_write(path: Path) -> None:
    Store.open(path).close()
    with Store.open(path, readonly=True) as store:
        with pytest.raises(StoreError, match="reading only"):
            store.record_audit(AuditEntry("me", "x"))
        with pytest.raises(StoreError), store.reading() as db:
            db.execute("DELETE FROM runs")


def test_single_entries_can_be_written_beside_the_process_that_records(path: Path) -> None:
    with Store.open(path) as store:
        run = store.start_run("1")
        recording = store.start_recording("live", tags(1), PERIOD_NS)
        offer_counted(store, recording, 0, 10, row_frame(1))
        with Store.open(path, beside=True) as other:
            other.register_model("m1", "pump", "m1.npz", "00", {})
            other.write_record("history", noise(100, 2))
            for refused in (
                lambda: other.start_recording("x", tags(1), 1),
                lambda: other.start_run("2"),
                lambda: other.apply_retention(),
            ):
                with pytest.raises(StoreError, match="without beside"):
                    refused()
        store.flush()
        assert [model.model_id for model in store.models()] == ["m1"]
        assert {r.name: (r.rows, r.ended_ns is None) for r in store.recordings()} == {
            "live": (10, True), "history": (100, False)}  # fmt: skip
        assert store.runs()[0].id == run and store.runs()[0].end_reason == ""


# ---- files that are not ours, or not whole


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "text":
        content = bytearray(b"this is no database " * 100)
    elif kind == "cut":
        content = content[: len(content) // 2]
    else:
        for page in range(2, len(content) // 4096, 3):
            content[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["text", "cut", "scribbled"])
def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(path: Path, kind: str) -> None:
    with Store.open(path) as store:
        store.write_record("r", noise(3000, 4))
    damage(path, kind)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="damaged") as caught:
        Store.open(path)
    assert str(path) in str(caught.value) and "set_aside" in caught.value.next_step
    assert path.read_bytes() == before

    with Store.open(path, on_corrupt="set_aside") as store:
        assert store.recordings() == []
        aside = Path(store.audit()[0].detail["renamed_to"])
    assert aside.read_bytes() == before


def test_a_damaged_file_can_be_set_aside_by_hand_but_not_under_a_writer(path: Path) -> None:
    with Store.open(path), pytest.raises(StoreError, match="another process"):
        Store.set_aside(path)
    path.write_bytes(b"x" * 5000)
    assert Store.set_aside(path).read_bytes() == b"x" * 5000
    Store.open(path).close()


def test_another_programs_database_is_refused_and_not_touched(path: Path) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE accounts (x)")
    conn.close()
    before = path.read_bytes()
    for on_corrupt in ("refuse", "set_aside"):
        with pytest.raises(StoreError, match="another program"):
            Store.open(path, on_corrupt=on_corrupt)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="folder"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="cannot be made"):
        Store.open(tmp_path / "file" / "s.db")
    with pytest.raises(StoreError, match="no store"):
        Store.open(tmp_path / "none.db", readonly=True)
    assert not (tmp_path / "none.db").exists()
    with Store.open(tmp_path / "new" / "folder" / "s.db"):
        assert (tmp_path / "new" / "folder" / "s.db").exists()


# ---- versions

NEXT = Migration(2, "colour of a recording", lambda db: db.execute(  # type: ignore[arg-type,return-value]
    "ALTER TABLE recordings ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'"))  # fmt: skip


def version(path: Path) -> int:
    conn = sqlite3.connect(path)
    try:
        return int(conn.execute("PRAGMA user_version").fetchone()[0])
    finally:
        conn.close()


def test_a_file_of_the_version_before_is_migrated_with_all_it_holds(path: Path) -> None:
    record = noise(5000, 2)
    with Store.open(path) as store:
        store.write_record("r", record)
        store.record_audit(AuditEntry("me", "before"))
    assert version(path) == 1
    with pytest.raises(StoreError, match="schema version 1, this program needs 2"):
        Store.open(path, readonly=True, migrations=(*MIGRATIONS, NEXT))
    with Store.open(path, migrations=(*MIGRATIONS, NEXT)) as store:
        np.testing.assert_array_equal(store.read_recording("r").values, record.values)
        assert store.audit()[0].action == "before"
        with store.reading() as db:
            assert db.execute("SELECT colour FROM recordings").fetchone()[0] == "grey"
            assert db.execute("SELECT version, name FROM migrations ORDER BY version").fetchall() == [
                (1, "first schema"), (2, "colour of a recording")]  # fmt: skip
    assert version(path) == 2
    Store.open(path, migrations=(*MIGRATIONS, NEXT)).close()  # once is enough


def test_a_migration_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    def half(db: object) -> None:
        NEXT.apply(db)  # type: ignore[arg-type]
        db.execute("ALTER TABLE no_such_table ADD COLUMN x")  # type: ignore[attr-defined]

    with Store.open(path) as store:
        store.write_record("r", noise(10, 1))
    with pytest.raises(StoreError, match="migration to schema version 2"):
        Store.open(path, migrations=(*MIGRATIONS, Migration(2, "half", half)))
    assert version(path) == 1
    with Store.open(path) as store, store.reading() as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(recordings)").fetchall()]
        assert "colour" not in columns


@pytest.mark.parametrize("mode", [{}, {"readonly": True}, {"beside": True}])
def test_a_file_of_a_newer_version_is_refused(path: Path, mode: dict[str, bool]) -> None:
    Store.open(path, migrations=(*MIGRATIONS, NEXT)).close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="schema version 2, this program knows up to 1") as caught:
        Store.open(path, **mode)  # type: ignore[arg-type]
    assert "newer program" in caught.value.next_step
    assert path.read_bytes() == before


# ---- power failure


def test_synced_seq_follows_committed_seq_at_each_checkpoint(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S, sync_interval_s=0) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS)
        offer_counted(store, recording, 0, 50, row_frame(1))
        store.flush()
        store.flush()  # the checkpoint came between the two
        assert store.synced_seq == 50
    with Store.open(path, commit_interval_s=NEVER_S, sync_interval_s=NEVER_S) as store:
        assert store._writer.call(lambda db: db.execute("PRAGMA synchronous").fetchone()[0], 10) == 1
        store.offer_verdict(verdict())
        store.flush()
        store.flush()
        assert store.committed_seq == 1 and store.synced_seq == 0


def test_synced_seq_waits_while_a_reader_of_another_program_holds_back_the_checkpoint(path: Path) -> None:
    with Store.open(path, commit_interval_s=NEVER_S, sync_interval_s=0) as store:
        recording = store.start_recording("r", tags(1), PERIOD_NS)
        store.flush()
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM recordings").fetchall()
        offer_counted(store, recording, 0, 50, row_frame(1))
        for _ in range(3):
            store.flush()
        assert store.committed_seq == 50 and store.synced_seq == 0
        reader.close()
        store.flush()
        store.flush()
        assert store.synced_seq == 50


def test_synchronous_full_makes_every_commit_safe(path: Path) -> None:
    with Store.open(path, synchronous="full", sync_interval_s=NEVER_S) as store:
        assert store._writer.call(lambda db: db.execute("PRAGMA synchronous").fetchone()[0], 10) == 2
        store.offer_verdict(verdict())
        store.flush()
        assert store.synced_seq == store.committed_seq == 1
