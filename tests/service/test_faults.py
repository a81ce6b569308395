"""What goes wrong beside us and in us: silence, a detector that fails, our loop, our disk, our store, our death."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asyncua import Client
from running import PLANT, RESULTS, until, write
from serving import SEED, Child, configuration, insecure, nodes_say, running, scoring, stored

from opcua_detector.client import LinkState
from opcua_detector.client.observer import Observer
from opcua_detector.client.write_rules import WriteRules
from opcua_detector.config import load
from opcua_detector.errors import NodeProblem, StoreError
from opcua_detector.nodes import NO_SCORE, SIGNALS, State
from opcua_detector.service import MonitorRun, Writing
from opcua_detector.service.delivery import fail_words
from opcua_detector.store import Event, Store
from sim_server.testing import RunningPlant, running_plant

FAULT = f"{PLANT}lorenz.faults.rho"


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant that the tests here share."""
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


async def call(endpoint: str, method: str, *arguments: Any) -> None:
    """Call a method of the simulated plant."""
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:simulated-plant")
        await client.get_node(f"ns={index};s=lorenz").call_method(f"{index}:{method}", *arguments)


# --- fail values ---


def test_the_words_without_a_verdict_are_never_just_no_anomaly() -> None:
    for outputs in ({"IsAnomaly"}, {"IsAnomaly", "Severity"}, set()):
        assert fail_words(outputs, State.NO_DATA, "Bad", {})["IsAnomaly"] is True
    for telling in ("Score", "State", "StateText", "Quality"):
        words = fail_words({"IsAnomaly", telling}, State.STOPPED, "Bad: x", {})
        assert "IsAnomaly" not in words and words["State"] == State.STOPPED and words["Quality"] == "Bad: x"
    words = fail_words({"Score"}, State.FAULT, "Bad", {"Severity": 1000, "IsAnomaly": True})
    assert words["Severity"] == 1000 and words["IsAnomaly"] is True
    assert set(words) <= set(SIGNALS)


async def test_a_monitor_that_writes_nothing_but_the_alert_raises_it_when_it_stops(
    plant: RunningPlant, folder: Path,
) -> None:
    given = configuration(plant.endpoint)
    given["monitors"][0]["outputs"]["signals"] = ["IsAnomaly", "EventNo"]
    async with Observer(plant.endpoint) as observer:
        async with running(write(folder, given)) as service:
            await scoring(service.runs["lorenz"])
            await until(lambda: nodes_say(observer, IsAnomaly=False), "no alert")
        assert await nodes_say(observer, IsAnomaly=True)


async def test_tags_that_fall_silent_while_the_server_lives_are_no_data(plant: RunningPlant, folder: Path) -> None:
    given = configuration(plant.endpoint)
    given["monitors"][0]["outputs"] |= {"fail_after": "1 s", "fail_values": {"Severity": 999}}
    async with running(write(folder, given)) as service, Observer(plant.endpoint) as observer:
        run = service.runs["lorenz"]
        await scoring(run)
        try:
            await call(plant.endpoint, "SetQuirk", "*", "drop", 1.0)
            await until(lambda: run.state == State.NO_DATA, "the silence to be noticed")
            await until(lambda: nodes_say(observer, State=State.NO_DATA, Score=NO_SCORE, StateText=insecure("no data"),
                                          Severity=999),
                        "no data in the nodes")
            assert run.quality.startswith("Bad: no") and service.sessions["plant"].state is LinkState.CONNECTED
            beat = await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"})
            await until(lambda: later(observer, beat), "the heartbeat to count on")
        finally:
            await call(plant.endpoint, "SetQuirk", "*", "drop", 0.0)
        await scoring(run)
        await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "normal again")
        await until(lambda: nodes_say(observer, Severity=0), "the severity of no alert")
        assert service.counters["silences"] == 1


async def later(observer: Observer, before: dict[str, Any]) -> bool:
    """Whether nodes of the Lorenz monitor have other values now."""
    return await observer.read({signal: f"{RESULTS}lorenz.{signal}" for signal in before}) != before


async def test_a_detector_that_fails_is_a_fault_in_the_nodes_and_comes_back_by_itself(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service, Observer(plant.endpoint) as observer:
        run = service.runs["lorenz"]
        await scoring(run)
        sound = run.monitor.step

        def fails(frame: Any) -> Any:
            raise FloatingPointError("overflow in a kernel")

        run.monitor.step = fails  # type: ignore[method-assign]
        await until(lambda: nodes_say(observer, State=State.FAULT, StateText=insecure("fault"), Score=NO_SCORE,
                                      Quality="Bad: the detector failed (FloatingPointError)"),
                    "the fault in the nodes")
        run.monitor.step = sound  # type: ignore[method-assign]
        await scoring(run)
        await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "normal again")
        assert service.counters["detector_errors"] == service.feeds["lorenz"].counters()["frame_errors"] > 0
    told = [one for one in caplog.records if "the detector failed" in one.getMessage()]
    assert len(told) == 1


# --- what may be written ---


async def test_an_output_outside_the_allow_list_keeps_the_service_from_starting_and_nothing_is_written(
    plant: RunningPlant, folder: Path,
) -> None:
    given = configuration(plant.endpoint)
    results = "/Objects/nsu=urn:opcua-detector:results;lorenz/nsu=urn:opcua-detector:results;"
    given["monitors"][0]["outputs"] = {"server": "plant", "nodes": {"Score": results + "Score",
                                                                   "RTrans": results + "RBound"}}
    allow = (f"{RESULTS}lorenz.Score", f"{RESULTS}lorenz.RTrans")
    file = write(folder, given)
    async with Observer(plant.endpoint) as observer:
        before = await observer.read({"RBound": f"{RESULTS}lorenz.RBound"})
        with pytest.raises(NodeProblem, match=r"outputs.RTrans.*lorenz.RBound is outside the allow-list"):
            async with running(file, writing={"plant": Writing(WriteRules(allow=allow))}):
                raise AssertionError("it started")
        assert await observer.read({"RBound": f"{RESULTS}lorenz.RBound"}) == before


async def test_a_dry_run_shows_what_would_be_written(plant: RunningPlant, folder: Path) -> None:
    async with Observer(plant.endpoint) as observer:
        before = await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"})
        for options in ({"write": False}, {"writing": {"plant": Writing(WriteRules(dry_run=True))}}):
            async with running(write(folder, configuration(plant.endpoint)), **options) as service:
                await scoring(service.runs["lorenz"])
                shown = service.backs["plant"].preview()
                assert shown["lorenz", "State"] == State.NORMAL and shown["lorenz", "StateText"] == insecure("normal")
                assert {signal for _, signal in shown} >= set(SIGNALS) - {"FeedbackResult"}
                assert f"lorenz.StateText = {insecure('normal')!r} (String) to {RESULTS}lorenz.StateText" in (
                    service.backs["plant"].preview_lines())
                assert service.backs["plant"].counters["values"] == 0 < service.backs["plant"].counters["dry"]
        assert await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"}) == before


async def test_outputs_that_the_server_does_not_let_us_write_are_named_in_the_quality_of_the_others(
    plant: RunningPlant, folder: Path,
) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service, Observer(plant.endpoint) as observer:
        await scoring(service.runs["lorenz"])
        await call(plant.endpoint, "Disturb", "read_only", "lorenz.Score")
        try:
            await until(lambda: quality(observer, "not written: Score (Bad"), "the output in the quality")
            assert await nodes_say(observer, State=State.NORMAL)
        finally:
            await call(plant.endpoint, "Disturb", "writable", "")
        await until(lambda: nodes_say(observer, Quality="Good"), "all outputs again")


async def quality(observer: Observer, words: str) -> bool:
    """Whether the Quality node has these words in it."""
    return words in (await observer.read({"Quality": f"{RESULTS}lorenz.Quality"}))["Quality"]


# --- our loop ---


async def test_our_own_loop_that_stood_still_is_counted_and_scores_go_on(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service:
        run = service.runs["lorenz"]
        await scoring(run)
        await asyncio.sleep(0.6)  # a tick
        before = service.counters["loop_blocked"]
        time.sleep(2.0)
        await until(lambda: service.counters["loop_blocked"] > before, "the standstill to be counted")
        await scoring(run)
        assert service.counters["silences"] == 0 and not run.alerts
        assert service.sessions["plant"].counters["lost"] == 0
        assert any("our own event loop stood still for " in one.getMessage() for one in caplog.records)


# --- our disk and our store ---


async def alive(run: MonitorRun, observer: Observer) -> None:
    """Scores go on, and reach the nodes."""
    await scoring(run)
    seen = await observer.read({"LastUpdate": f"{RESULTS}lorenz.LastUpdate"})
    await until(lambda: later(observer, seen), "results in the nodes")


async def test_a_store_that_another_program_has_locked_stops_neither_scores_nor_results(
    plant: RunningPlant, folder: Path,
) -> None:
    file = write(folder, configuration(plant.endpoint))
    async with running(file) as service, Observer(plant.endpoint) as observer:
        run, store = service.runs["lorenz"], service.store
        assert store is not None
        await scoring(run)
        other = sqlite3.connect(store.path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            await until(lambda: "locked" in store.last_error, "the lock to be noticed")
            committed = store.committed_seq
            await alive(run, observer)
            assert store.counters.write_errors >= 1 and store.committed_seq == committed
        finally:
            other.execute("ROLLBACK")
            other.close()
        await until(lambda: store.committed_seq > committed and not store.last_error, "the store to be written again")
        assert not run.alerts and store.counters.dropped_rows == store.counters.dropped_verdicts == 0
    with stored(file) as read:
        (recording,) = read.recordings()
        assert read.read_recording(recording.name).gap.sum() == 1  # nothing is missing


async def test_a_full_disk_stops_neither_scores_nor_results_and_what_is_dropped_is_counted(
    plant: RunningPlant, folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = Store.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Store, "open", classmethod(lambda cls, *a, **k: opened(cls, *a, **{"ring_rows": 64, **k})))
    file = write(folder, configuration(plant.endpoint))
    async with running(file) as service, Observer(plant.endpoint) as observer:
        run, store = service.runs["lorenz"], service.store
        assert store is not None
        await scoring(run)

        def room(pages: int) -> None:  # what SQLite may use stands for the size of the disk
            store._writer._db.execute(f"PRAGMA max_page_count = {pages}")

        room(1)
        await until(lambda: "full" in store.last_error, "the full disk to be noticed")
        await alive(run, observer)
        await until(lambda: store.counters.dropped_rows > 0 and store.counters.dropped_verdicts > 0, "full rings")
        await alive(run, observer)
        committed = store.committed_seq
        room(1_000_000)
        await until(lambda: store.committed_seq > committed and not store.last_error, "the store to be written again")
        dropped = store.counters.dropped_rows
        await scoring(run)
        assert store.counters.dropped_rows == dropped and not run.alerts
    with stored(file) as read:
        (recording,) = read.recordings()
        assert read.read_recording(recording.name).gap.sum() >= 2  # the rows that were dropped are a gap


async def test_a_damaged_store_is_set_aside_with_an_error_and_a_fresh_one_is_begun(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    file = write(folder, configuration(plant.endpoint))
    async with running(file) as service:
        await scoring(service.runs["lorenz"], 5)
        assert service.store is not None
        path = service.store.path
    damaged = b"this is no database" * 1000
    path.write_bytes(damaged)
    async with running(file) as service:
        await scoring(service.runs["lorenz"])
    (aside,) = path.parent.glob(f"{path.name}.damaged-*Z")
    assert aside.read_bytes() == damaged
    (told,) = [one for one in caplog.records if "renamed to" in one.getMessage()]
    assert told.levelno == logging.ERROR and str(aside) in told.getMessage()
    with stored(file) as store:
        store.verify()
        assert len(store.runs()) == 1 and len(store.recordings()) == 1
        assert store.audit("damaged file set aside")


async def test_a_damaged_store_is_refused_where_that_is_asked_for(plant: RunningPlant, folder: Path) -> None:
    given = configuration(plant.endpoint) | {"store": {"on_corrupt": "refuse"}}
    file = write(folder, given)
    path = load(file).store.path
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        async with running(file):
            raise AssertionError("it started")
    assert path.read_bytes() == b"this is no database" * 1000


# --- our death ---


async def test_an_alert_that_stood_when_we_were_killed_ends_with_that_life_and_the_next_one_is_raised_anew(
    plant: RunningPlant, folder: Path,
) -> None:
    file = write(folder, configuration(plant.endpoint))
    child = Child(file)
    async with Observer(plant.endpoint) as observer:
        try:
            await child.until(lambda said: said["scored"] > 100)
            await observer.write_double(FAULT, 1.5)
            await child.until(lambda said: said["alert"])
            await until(lambda: open_events(file), "the alert in the store")
            child.kill()
            (stood,) = open_events(file)
            assert await nodes_say(observer, IsAnomaly=True, EventNo=stood.event_no)  # as it was left
            async with running(file) as service:
                run = service.runs["lorenz"]
                await until(lambda: run.state == State.ALERT, "the alert that still stands")
                await until(lambda: nodes_say(observer, IsAnomaly=True, State=State.ALERT,
                                              EventNo=run.monitor.verdict.event_no), "the alert in the nodes")
                assert run.monitor.verdict.event_no == stood.event_no + 1
                await observer.write_double(FAULT, 1.0)
                await until(lambda: run.state == State.NORMAL and not run.monitor.verdict.alert, "normal")
        finally:
            await observer.write_double(FAULT, 1.0)
            child.kill()
    with stored(file) as store:
        events = store.events("lorenz")
    numbers = [one.event_no for one in events]
    assert numbers == list(range(len(numbers), 0, -1)) and not open_events(file)
    old = next(one for one in events if one.event_no == stood.event_no)
    assert old.cleared_ns is not None and old.raised_ns <= old.cleared_ns <= events[-2].raised_ns


def open_events(file: Path) -> list[Event]:
    """Alerts of the monitor that stand in the store."""
    with stored(file) as store:
        return [one for one in store.events("lorenz") if one.cleared_ns is None]


