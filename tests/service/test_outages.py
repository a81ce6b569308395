"""A connection that is lost: one alarm whatever hangs on it, no alert, gaps filled from history, events told later."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asyncua import Client
from plant.proxy import ChaosProxy
from running import PLANT, RESULTS, until, write
from serving import SEED, configuration, healthy, insecure, name_copies, nodes_say, running, scoring, stored

from opcua_detector.alarms import ConnectionAlarm
from opcua_detector.app import fit_config, group_tags
from opcua_detector.client import LinkState, forward, read_history
from opcua_detector.client import session as session_module
from opcua_detector.client.observer import Observer
from opcua_detector.config import load
from opcua_detector.nodes import NO_SCORE, State
from opcua_detector.service import Service, outages
from sim_server.testing import RunningPlant, running_plant

FAULT = f"{PLANT}lorenz.faults.rho"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant that the tests here share; its process runs on whatever becomes of connections."""
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again within tenths of a second."""
    monkeypatch.setattr(session_module, "LAST_DELAY_S", 0.5)


def two_servers(tags: str, outputs: str) -> dict[str, Any]:
    """Tags from one server, results to another one."""
    given = configuration(tags)
    given["servers"].append({"name": "hmi", "endpoint": outputs, "policy": "None", "insecure": True})
    given["monitors"][0]["outputs"]["server"] = "hmi"
    return given


# --- the alarm ---


def test_a_connection_that_comes_and_goes_is_one_alarm_until_it_has_stood_for_the_delay() -> None:
    alarm = ConnectionAlarm(10, event_no=7)
    assert not alarm.step(0)
    assert alarm.lost(100) and alarm.active and alarm.event_no == 8 and alarm.raised_ns == 100
    alarm.connected(110)
    assert not alarm.step(115) and not alarm.lost(118)  # again, within the delay
    assert not alarm.step(140)  # it is away: no delay has begun
    alarm.connected(150)
    alarm.connected(155)  # told twice
    assert not alarm.step(159) and alarm.step(160) and not alarm.active and not alarm.step(161)
    assert alarm.losses == 2
    assert alarm.lost(200) and alarm.event_no == 9 and alarm.losses == 1
    alarm.connected(300)
    assert not alarm.step(250) and alarm.step(260)  # our own clock was set back: it counts from there


async def test_fifty_monitors_on_one_connection_that_is_cut_are_one_alarm_and_recovery_is_no_alert(
    plant: RunningPlant, folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    names = ["lorenz", *(f"unit-{k}" for k in range(1, 50))]
    async with ChaosProxy(plant.port) as proxy:
        given = two_servers(proxy.endpoint, plant.endpoint)
        given["monitors"][0]["methods"] = ["transition"]  # fifty graphs a row would take a core
        file = write(folder, given)
        for fitted in fit_config(load(file), file, healthy):
            fitted.model.save(fitted.path)
        name_copies(folder / "models", *names[1:])
        given["monitors"] += [{"name": name, "group": "lorenz", "methods": ["transition"]} for name in names[1:]]
        file = write(folder, given)
        async with running(file) as service, Observer(plant.endpoint) as observer:
            await asyncio.gather(*(scoring(run, 20) for run in service.runs.values()))
            caplog.clear()
            proxy.refuse()
            proxy.reset()
            await until(lambda: service.sessions["plant"].state is LinkState.WAITING, "the loss to be noticed")
            assert {run.state for run in service.runs.values()} == {State.NO_DATA}
            assert {run.quality for run in service.runs.values()} == {"Bad: no connection to plant"}
            await until(lambda: nodes_say(observer, State=State.NO_DATA, StateText=insecure("no data"), Score=NO_SCORE,
                                          SlowScore=NO_SCORE, Quality="Bad: no connection to plant"),
                        "no data in the nodes")
            assert service.connections.alarms["plant"].active and not service.connections.alarms["hmi"].active
            proxy.heal()
            await asyncio.gather(*(scoring(run, 200) for run in service.runs.values()))
            await until(lambda: not service.connections.alarms["plant"].active, "the alarm to return to normal")
            await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "all well in the nodes")
            assert all(not run.alerts and run.monitor.verdict.event_no == 0 for run in service.runs.values())
    raised = [one.getMessage() for one in caplog.records if "raised" in one.getMessage()]
    assert len(raised) == 1 and "50 monitors have no data" in raised[0]
    with stored(file) as store:
        (alarm,) = store.events()
    assert (alarm.monitor, alarm.event_no) == ("connection plant", 1)
    assert alarm.cleared_ns is not None and alarm.cleared_ns > alarm.raised_ns and "50 monitors" in alarm.sentence


async def test_the_alarm_of_a_service_that_ended_meanwhile_is_over_at_the_next_start_and_numbers_go_on(
    plant: RunningPlant, folder: Path,
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, configuration(proxy.endpoint))
        for number in (1, 2):
            async with running(file) as service:
                await scoring(service.runs["lorenz"], 5)
                proxy.refuse()
                proxy.reset()
                await until(lambda: service.connections.alarms["plant"].active, "the alarm")
            proxy.heal()
            with stored(file) as store:
                events = store.events("connection plant")
            assert [one.event_no for one in events] == list(range(number, 0, -1))
            assert events[0].cleared_ns is None and all(one.cleared_ns for one in events[1:])


# --- gaps ---


async def test_a_gap_in_the_rows_is_filled_from_history_as_rows_that_nobody_scored(
    plant: RunningPlant, folder: Path,
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, configuration(proxy.endpoint))
        async with running(file) as service:
            run, filler = service.runs["lorenz"], service.fillers["lorenz"]
            await scoring(run)
            proxy.refuse()
            proxy.reset()
            await until(lambda: service.sessions["plant"].state is LinkState.WAITING, "the loss to be noticed")
            await asyncio.sleep(1.5)
            proxy.heal()
            await scoring(run)
            await until(lambda: filler.counters["gaps_filled"] == 1, f"the gap to be filled: {filler.counters}")
            scored, steps = run.scored, service.steps
            assert filler.counters["gaps_left"] == filler.counters["backfill_left_rows"] == 0
            rows = filler.counters["backfilled_rows"]
            await scoring(run, 20)
            assert service.steps - steps == run.scored - scored  # each step is a live row
        with stored(file) as store:
            live = store.read_recording(next(one for one in store.recordings() if not one.note).name)
            (filled,) = [one for one in store.recordings() if one.note.startswith("backfill")]
            record = store.read_recording(filled.name)
            trend = store.trend("lorenz")
            (entry,) = store.audit("gap filled")
            assert store.events("lorenz") == []
    hole = int(np.flatnonzero(live.gap)[1])
    before, after = int(live.source_ns[hole - 1]), int(live.source_ns[hole])
    assert (record.source_ns > before).all() and (record.source_ns < after).all() and len(record) == rows
    assert rows >= 0.9 * ((after - before) / live.period_ns - 1) >= 100
    assert np.isfinite(record.values).all() and record.valid.all()
    assert entry.detail["rows"] == rows and entry.detail["after"] == before
    missing = (trend.source_ns > before + 10**9) & (trend.source_ns < after - 10**9)
    assert trend.rows[missing].sum() == 0


async def test_a_gap_of_a_group_on_two_servers_is_filled_from_both_histories(plant: RunningPlant, folder: Path) -> None:
    async with ChaosProxy(plant.port) as proxy:
        given = configuration(plant.endpoint)
        given["servers"].append({"name": "other", "endpoint": proxy.endpoint, "policy": "None", "insecure": True})
        given["groups"][0]["tags"][1]["server"] = "other"
        given["groups"][0]["lateness"] = "300 ms"  # one of the two comes through a proxy that shares this process
        file = write(folder, given)
        async with running(file) as service:
            run, filler = service.runs["lorenz"], service.fillers["lorenz"]
            await scoring(run)
            proxy.refuse()
            proxy.reset()
            await until(lambda: service.sessions["other"].state is LinkState.WAITING, "the loss to be noticed")
            assert service.sessions["plant"].state is LinkState.CONNECTED and run.state == State.NO_DATA
            await asyncio.sleep(1.5)
            proxy.heal()
            await scoring(run)
            await until(lambda: filler.counters["gaps_filled"] >= 1, f"the gap to be filled: {filler.counters}")
            assert filler.counters["gaps_left"] == 0 and not run.alerts
            assert service.store is not None
            (filled,) = [one for one in service.store.recordings() if one.note.startswith("backfill")]
            record = await asyncio.to_thread(service.store.read_recording, filled.name)
            group = service.config.groups[0]
            truth = await read_history(service.sessions["plant"], group_tags(group), int(record.source_ns[0]),
                                       int(record.source_ns[-1]) + group.period // 2, group.period)
    assert "history of plant, other" in filled.note and len(record) >= 100
    assert record.valid.all() and np.array_equal(record.source_ns, truth.source_ns)
    assert np.array_equal(record.values, truth.values)  # both tags of one instant in each row


async def set_clock(plant: RunningPlant, offset_ms: float) -> None:
    """Let the plant's clock jump by this much from its true time, in every stamp that it gives."""
    async with Client(plant.endpoint) as client:
        index = await client.get_namespace_index(PLANT.removeprefix("nsu=").partition(";")[0])
        node = client.get_node(f"ns={index};s=lorenz")
        await node.call_method(f"{index}:Disturb", "clock", str(offset_ms))
        await node.call_method(f"{index}:SetQuirk", "*", "skew_ms", offset_ms)


async def test_a_clock_that_was_set_and_is_right_again_has_no_row_read_back_that_is_there(folder: Path) -> None:
    with running_plant("lorenz", history_rows=3000, seed=SEED) as plant:
        async with ChaosProxy(plant.port) as proxy:
            file = write(folder, configuration(proxy.endpoint))
            async with running(file) as service:
                run, filler, feed = service.runs["lorenz"], service.fillers["lorenz"], service.feeds["lorenz"]
                await scoring(run)
                for offset_ms in (-20_000.0, 0.0, 20_000.0, 0.0):  # each time by less than the history has
                    jumps = feed.counters()["clock_jumps"]
                    await set_clock(plant, offset_ms)
                    await until(lambda n=jumps: feed.counters()["clock_jumps"] > n, "the jump to be seen")
                    await scoring(run)
                assert set(filler.counters.values()) == {0}, filler.counters
                await set_clock(plant, -20_000.0)
                await scoring(run)
                # Away for some seconds, in which the clock is set right: the stamps of the hole are of 20 s and more.
                proxy.refuse()
                proxy.reset()
                await until(lambda: service.sessions["plant"].state is LinkState.WAITING, "the loss to be noticed")
                await set_clock(plant, 0.0)
                await asyncio.sleep(2.0)
                proxy.heal()
                await scoring(run)
                await until(lambda: filler.counters["gaps_filled"] == 1, f"the gap to be filled: {filler.counters}")
            with stored(file) as store:
                kept = {one: store.read_recording(one.name) for one in store.recordings()}
    read_back = [record.source_ns for one, record in kept.items() if one.note.startswith("backfill")]
    live = [record.source_ns for one, record in kept.items() if not one.note.startswith("backfill")]
    filled, before = np.sort(np.concatenate(read_back)), np.sort(np.concatenate(live))
    assert 100 <= len(filled) == filler.counters["backfilled_rows"]
    # A clock that is set back brings live rows of times that were there; what is read back adds none.
    half = 10_000_000 // 2
    assert (np.abs(filled[:, None] - before[None, :]).min(axis=1) > half).all()
    assert (np.diff(filled) > half).all()


async def test_a_connection_that_is_lost_while_a_gap_is_read_back_leaves_no_row_twice(
    plant: RunningPlant, folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "SLICE_VALUES", 100)
    monkeypatch.setattr(outages, "_AGAIN_S", 1.0)
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, configuration(proxy.endpoint))
        async with running(file) as service:
            run, filler = service.runs["lorenz"], service.fillers["lorenz"]
            await scoring(run)
            assert service.store is not None
            writes, original = 0, service.store.write_record
            loop = asyncio.get_running_loop()

            def write_record(*given: Any, **options: Any) -> Any:
                nonlocal writes
                done = original(*given, **options)
                writes += 1
                if writes == 2:  # two slices of the first gap are stored
                    asyncio.run_coroutine_threadsafe(lose(), loop).result()
                return done

            async def lose() -> None:
                proxy.reset()

            monkeypatch.setattr(service.store, "write_record", write_record)
            proxy.refuse()
            proxy.reset()
            await until(lambda: service.sessions["plant"].state is LinkState.WAITING, "the loss to be noticed")
            await asyncio.sleep(2.0)
            proxy.heal()
            await until(lambda: filler.counters["gaps_filled"] == 2, f"the gaps to be filled: {filler.counters}")
        with stored(file) as store:
            kept = [store.read_recording(one.name) for one in store.recordings()]
    assert writes > 3 and filler.counters["gaps_left"] == 0
    stamps = np.sort(np.concatenate([one.source_ns for one in kept]))
    assert (np.diff(stamps) > kept[0].period_ns // 2).all()
    assert len(stamps) >= 0.98 * ((stamps[-1] - stamps[0]) / kept[0].period_ns)


async def test_where_there_is_no_history_a_gap_stays_a_gap_and_says_why(folder: Path) -> None:
    with running_plant("lorenz", history_rows=0, seed=SEED, config={"history_rows": 0}) as plant:
        async with ChaosProxy(plant.port) as proxy:
            file = write(folder, configuration(proxy.endpoint) | {"store": {"backfill": "0 s"}})
            async with running(file) as service:
                filler = service.fillers["lorenz"]
                await scoring(service.runs["lorenz"])
                proxy.reset()
                await until(lambda: filler.counters["gaps_left"] == 1, "the gap to be counted")
                assert filler.counters["backfilled_rows"] == 0
            with stored(file) as store:
                assert store.audit("gap left")[0].detail["why"] == "backfill is 0"
                (recording,) = store.recordings()
                assert store.read_recording(recording.name).gap.sum() == 2


# --- events ---


async def test_alerts_of_the_time_without_the_hmi_are_told_when_it_is_back_newest_value_first(
    plant: RunningPlant, folder: Path,
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, two_servers(plant.endpoint, proxy.endpoint))
        async with running(file) as service, Observer(plant.endpoint) as observer:
            run = service.runs["lorenz"]
            await scoring(run)
            await until(lambda: nodes_say(observer, State=State.NORMAL, EventNo=0), "the nodes")
            proxy.refuse()
            proxy.reset()
            await until(lambda: service.sessions["hmi"].state is LinkState.WAITING, "the loss to be noticed")
            await fault(service, observer)
            last = run.monitor.verdict.event_no
            assert last >= 1 and await nodes_say(observer, EventNo=0)
            proxy.heal()
            await until(lambda: nodes_say(observer, EventNo=run.monitor.verdict.event_no, State=State.NORMAL,
                                          IsAnomaly=False, ExplanationText="", Severity=0,
                                          StateText=insecure("normal")),
                        "what is true now")
            (told,) = (await until(lambda: missed(observer), "what was missed")).values()
            assert told.startswith(f"{last} alert") and f"no {last} from " in told and "x" in told.split(": ", 1)[1]
            assert service.counters["events_dropped"] == 0
    with stored(file) as store:
        events = store.events("lorenz")
        assert [one.event_no for one in events] == list(range(len(events), 0, -1)) and len(events) >= last
        assert all(one.cleared_ns is not None and one.sentence for one in events)


async def fault(service: Service, observer: Observer) -> None:
    """A fault of the process that comes and goes."""
    run = service.runs["lorenz"]
    await observer.write_double(FAULT, 1.5)
    try:
        await until(lambda: run.explanation is not None and run.monitor.verdict.alert, "the alert")
    finally:
        await observer.write_double(FAULT, 1.0)
    await until(lambda: not run.monitor.verdict.alert and run.state == State.NORMAL, "the alert to clear")
    await scoring(run, 300)  # a plant that heals may alert again on its way back


async def missed(observer: Observer) -> dict[str, Any] | None:
    """What the node for missed alerts says, once it says something."""
    got = await observer.read({"EventsAway": f"{RESULTS}lorenz.EventsAway"})
    return got if got["EventsAway"] else None
