"""The live service on real servers: what it writes, what it survives, what it keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asyncua import Client, ua
from running import PLANT, RESULTS, result_nodes, until, write
from serving import SEED, Child, configuration, healthy, insecure, nodes_say, running, scoring, stored

from opcua_detector.app import fit_config
from opcua_detector.client import LinkState
from opcua_detector.client.observer import Observer
from opcua_detector.config import load
from opcua_detector.nodes import NO_SCORE, SIGNALS, State
from opcua_detector.service import MonitorRun, Service
from sim_server.testing import RunningPlant, running_plant

FAULT, FACTOR = f"{PLANT}lorenz.faults.rho", 1.5


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant that the tests here share; those that kill one have their own."""
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


# --- outages ---


async def test_a_killed_and_restarted_server_is_a_gap_then_scores_again_and_no_alert(folder: Path) -> None:
    with running_plant("lorenz", history_rows=100, seed=SEED) as plant:
        file = write(folder, configuration(plant.endpoint))
        async with running(file) as service:
            run, session = service.runs["lorenz"], service.sessions["plant"]
            feed = service.feeds["lorenz"]
            await scoring(run)
            assert feed.counters()["gaps"] == 0
            plant.kill()
            await until(lambda: session.state is LinkState.WAITING, "the loss to be noticed")
            assert run.state == State.NO_DATA
            frozen = run.scored
            await asyncio.to_thread(plant.restart)
            await scoring(run, 300)
            assert run.scored > frozen
            assert session.counters["reconnects"] == 1 and session.counters["lost"] == 1
            assert feed.counters()["gaps"] == 1
            async with Observer(plant.endpoint) as observer:
                await until(lambda: nodes_say(observer, State=State.NORMAL, IsAnomaly=False, Quality="Good"),
                            "the nodes to say that all is well again")
            assert not run.alerts and run.monitor.verdict.event_no == 0
        with stored(file) as store:
            (alarm,) = store.events()  # of the connection, and none of the monitor
            assert alarm.monitor == "connection plant" and alarm.cleared_ns is not None
            recording = next(one for one in store.recordings() if not one.note)
            record = store.read_recording(recording.name)
        assert record.gap.sum() == 2  # its first row, and the first one after the outage
        outage = int(np.flatnonzero(record.gap)[1])
        assert record.source_ns[outage] - record.source_ns[outage - 1] > 100 * record.period_ns


async def test_of_two_servers_either_may_die_and_the_other_one_tells_or_catches_up(folder: Path) -> None:
    with running_plant("lorenz", history_rows=100, seed=SEED) as tags, \
            running_plant("throttle", history_rows=100) as results:
        given = configuration(tags.endpoint)
        given["servers"].append({"name": "hmi", "endpoint": results.endpoint, "policy": "None", "insecure": True})
        given["monitors"][0]["outputs"]["server"] = "hmi"
        async with running(write(folder, given)) as service:
            run = service.runs["lorenz"]
            async with Observer(results.endpoint) as observer:
                await scoring(run)
                await until(lambda: nodes_say(observer, State=State.NORMAL), "the state normal on the second server")
                tags.kill()
                await until(lambda: nodes_say(observer, State=State.NO_DATA, StateText=insecure("no data"),
                                              Score=NO_SCORE, Quality="Bad: no connection to plant"),
                            "no data on the second server")
                beat = await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"})
                await until(lambda: differs(observer, beat), "the heartbeat to count on")
                await asyncio.to_thread(tags.restart)
                await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "the state normal again")
            gaps = service.feeds["lorenz"].counters()["gaps"]
            results.kill()
            await until(lambda: service.sessions["hmi"].state is LinkState.WAITING, "the loss to be noticed")
            await scoring(run)
            await asyncio.to_thread(results.restart)
            async with Observer(results.endpoint) as observer:
                await until(lambda: nodes_say(observer, State=State.NORMAL, StateText=insecure("normal"), Limit=1.0),
                            "results on the restarted server")
            assert not run.alerts and service.feeds["lorenz"].counters()["gaps"] == gaps == 1
            untouched = await stopped_nodes(tags.endpoint)
        assert untouched == {"State": 0, "Heartbeat": 0}  # the tags' own server has such nodes too


async def stopped_nodes(endpoint: str) -> dict[str, Any]:
    """State and heartbeat in the nodes of a server."""
    async with Observer(endpoint) as observer:
        return await observer.read({signal: f"{RESULTS}lorenz.{signal}" for signal in ("State", "Heartbeat")})


async def differs(observer: Observer, before: dict[str, Any]) -> bool:
    """Whether nodes of the Lorenz monitor have other values now."""
    return await observer.read({signal: f"{RESULTS}lorenz.{signal}" for signal in before}) != before


# --- what is written ---


SENTINELS = {"Boolean": True, "UInt16": 777, "Int32": -777, "UInt32": 777_777, "Double": -77.5, "String": "untouched"}


async def mark(endpoint: str, nodes: dict[str, str]) -> dict[str, Any]:
    """Write a mark into each result node but the dates; return node name -> mark."""
    marked: dict[str, Any] = {}
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:results")
        for name, node in nodes.items():
            signal = SIGNALS[name.split(".")[1]]
            if signal.type == "DateTime":
                continue
            value = SENTINELS[signal.type]
            marked[name] = [value] if signal.array else value
            variant = ua.Variant(marked[name], ua.VariantType[signal.type], is_array=signal.array)
            target = client.get_node(f"ns={index};{node.split(';')[1]}")
            await target.write_attribute(ua.AttributeIds.Value, ua.DataValue(variant))
    return marked


async def test_only_configured_nodes_are_ever_written(plant: RunningPlant, folder: Path) -> None:
    given = configuration(plant.endpoint)
    given["monitors"][0]["outputs"]["signals"] = ["Score", "State", "Heartbeat"]
    nodes = result_nodes("lorenz", "throttle")
    marked = await mark(plant.endpoint, nodes)
    async with running(write(folder, given)) as service:
        await scoring(service.runs["lorenz"], 200)
    written = {"lorenz.Score", "lorenz.State", "lorenz.Heartbeat"}
    async with Observer(plant.endpoint) as observer:
        after = await observer.read({name: nodes[name] for name in marked})
        faults = await observer.read({name: f"{PLANT}lorenz.faults.{name}" for name in ("sigma", "rho", "beta")})
    assert {name for name in marked if after[name] != marked[name]} == written
    assert after["lorenz.State"] == State.STOPPED and after["lorenz.Score"] == NO_SCORE
    assert set(faults.values()) == {1.0}


async def test_a_dry_run_scores_and_stores_but_writes_no_node(plant: RunningPlant, folder: Path) -> None:
    nodes = result_nodes("lorenz", "throttle")
    marked = await mark(plant.endpoint, nodes)
    file = write(folder, configuration(plant.endpoint))
    async with running(file, write=False) as service:
        await scoring(service.runs["lorenz"], 200)
    async with Observer(plant.endpoint) as observer:
        assert await observer.read({name: nodes[name] for name in marked}) == marked
    with stored(file) as store:
        assert len(store.trend("lorenz").source_ns) > 0


async def test_the_heartbeat_counts_and_a_shutdown_says_stopped(plant: RunningPlant, folder: Path) -> None:
    file = write(folder, configuration(plant.endpoint))
    words = {signal: f"{RESULTS}lorenz.{signal}" for signal in ("State", "StateText", "Score", "Quality", "Heartbeat")}
    async with Observer(plant.endpoint) as observer:
        async with running(file) as service:
            await scoring(service.runs["lorenz"])
            first = await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"})
            await until(lambda: differs(observer, first), "the heartbeat to count")
            second = await observer.read({"Heartbeat": f"{RESULTS}lorenz.Heartbeat"})
            assert second["Heartbeat"] > first["Heartbeat"]
            live = await observer.read(result_nodes("lorenz"))
            assert live["lorenz.ModelId"] == service.runs["lorenz"].monitor.model.model_id
            assert live["lorenz.Limit"] == 1.0 and live["lorenz.StateText"] == insecure("normal")
            assert 0 <= live["lorenz.Score"] < 1 and live["lorenz.ExplanationText"] == ""
            assert len(live["lorenz.Contributions"]) == 2 and len(live["lorenz.Residuals"]) > 2
            assert live["lorenz.LastUpdateText"].endswith("Z")
        after = await observer.read(words)
        assert (after["State"], after["StateText"], after["Score"]) == (State.STOPPED, "stopped", NO_SCORE)
        assert "stopped" in after["Quality"]
    with stored(file) as store:
        assert store.runs()[0].end_reason == "stopped" and store.runs()[0].ended_ns


async def test_before_the_first_row_the_nodes_say_no_data(plant: RunningPlant, folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    given = configuration(plant.endpoint)
    service = Service(load(write(folder, given)), folder / "plant.yaml")
    started = service._no_data

    def spy(run: MonitorRun, quality: str) -> None:
        started(run, quality)
        seen.append({"state": run.state, "quality": quality, "offered": run.back is not None})

    service._no_data = spy  # type: ignore[method-assign]
    await service.start()
    await service.stop()
    assert seen[0] == {"state": State.NO_DATA, "quality": "Bad: waiting for the first row", "offered": True}


async def test_a_tag_that_turns_bad_is_no_data_and_not_an_alert(plant: RunningPlant, folder: Path) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service:
        run = service.runs["lorenz"]
        await scoring(run)
        async with Observer(plant.endpoint) as observer:
            try:
                for name in ("x1", "x3"):
                    await quirk(plant.endpoint, name, "bad", 1.0)
                await until(lambda: nodes_say(observer, State=State.NO_DATA, Score=NO_SCORE,
                                              Quality="Bad: no tag has a valid value"), "no data")
            finally:
                for name in ("x1", "x3"):
                    await quirk(plant.endpoint, name, "bad", 0.0)
            await scoring(run, 50)
            assert not run.alerts


async def quirk(endpoint: str, name: str, what: str, value: float) -> None:
    """Give the simulated plant a bad habit."""
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:simulated-plant")
        await client.get_node(f"ns={index};s=lorenz").call_method(f"{index}:SetQuirk", name, what, value)


async def test_two_groups_and_two_monitors_on_one_server_with_nodes_by_browse_path(
    plant: RunningPlant, folder: Path,
) -> None:
    given = configuration(plant.endpoint)
    path = "/Objects/2:Plant/2:lorenz/2:"
    results = "/Objects/nsu=urn:opcua-detector:results;throttle/nsu=urn:opcua-detector:results;"
    given["groups"].append({"name": "slow", "server": "plant", "period": "20 ms", "tags": [
        {"name": "x1", "node": f"{path}x1"}, {"name": "x3", "node": f"{path}x3"}]})
    given["monitors"].append({"name": "slow", "group": "slow", "methods": ["transition"], "outputs": {
        "server": "plant", "nodes": {signal: results + signal for signal in ("Score", "State", "LastUpdate")}}})
    file = write(folder, given)
    for fitted in fit_config(load(file), file, healthy, only=["slow"]):
        fitted.model.save(fitted.path)
    async with running(file) as service, Observer(plant.endpoint) as observer:
        for run in service.runs.values():
            await scoring(run)
        for base in ("lorenz", "throttle"):
            await until(lambda base=base: nodes_say(observer, f"{RESULTS}{base}", State=State.NORMAL),  # type: ignore[misc]
                        f"the state of {base} in its nodes")
        counters = {name: feed.counters() for name, feed in service.feeds.items()}
        assert counters["lorenz"]["rows"] > 1.5 * counters["slow"]["rows"]
    with stored(file) as store:
        assert {r.group for r in store.recordings()} == {"lorenz", "slow"}


# --- alerts ---


async def test_a_fault_is_an_alert_with_its_explanation_in_store_and_nodes_and_numbers_go_on(folder: Path) -> None:
    with running_plant("lorenz", history_rows=100, seed=SEED) as plant:
        file = write(folder, configuration(plant.endpoint))
        for number in (1, 2):  # two runs of the service, one store
            async with running(file) as service, Observer(plant.endpoint) as observer:
                await scoring(service.runs["lorenz"])
                await observer.write_double(FAULT, FACTOR)
                told = await until(lambda number=number: explained(observer, number),  # type: ignore[misc]
                                   "the alert in the nodes")
                assert told["Top1Tag"] in ("x1", "x3") and told["Top1Cause"]
                assert 0 < told["Top1Contribution"] <= 1 and told["Severity"] == 500 and told["State"] == State.ALERT
                await observer.write_double(FAULT, 1.0)
                await until(lambda: nodes_say(observer, IsAnomaly=False, State=State.NORMAL, ExplanationText="",
                                              Top1Tag="", Severity=0), "the alert to clear in the nodes")
            with stored(file) as store:
                numbers = [event.event_no for event in store.events("lorenz")]
                newest = store.events("lorenz", limit=1)[0]
            # A plant that heals from a fault may alert again on its way back.
            assert numbers == list(range(len(numbers), 0, -1)) and len(numbers) >= number
            assert newest.cleared_ns is not None and newest.cleared_ns > newest.raised_ns
            assert newest.sentence and newest.causes and newest.peak_score >= 1.0
            assert newest.model_id == service.runs["lorenz"].monitor.model.model_id


async def explained(observer: Observer, at_least: int) -> dict[str, Any] | None:
    """The nodes of an alert, once all of them are there."""
    signals = ("IsAnomaly", "EventNo", "State", "Severity", "ExplanationText", "Top1Tag", "Top1Contribution",
               "Top1Cause")
    got = await observer.read({signal: f"{RESULTS}lorenz.{signal}" for signal in signals})
    done = got["IsAnomaly"] and got["EventNo"] >= at_least and got["ExplanationText"] and got["Top1Tag"]
    return got if done else None


# --- kill -9 ---


async def test_kill_9_loses_nothing_up_to_committed_seq_and_the_next_run_goes_on(
    plant: RunningPlant, folder: Path,
) -> None:
    file = write(folder, configuration(plant.endpoint))
    child = Child(file)
    try:
        await child.until(lambda said: said["committed"] >= 800)  # each row is an offer, and each verdict
    finally:
        child.kill()
    committed = child.last["committed"]
    with stored(file) as store:
        store.verify()
        (recording,) = store.recordings()
        record = store.read_recording(recording.name)
        assert len(record) >= committed // 2 >= 400
        assert (np.diff(record.source_ns) == record.period_ns).all() and record.gap.sum() == 1
        assert store.runs()[0].ended_ns is None
    async with running(file) as service:
        await scoring(service.runs["lorenz"])
    with stored(file) as store:
        store.verify()
        assert len(store.recordings()) == 2 and store.runs()[0].end_reason == "stopped"
        assert len(store.read_recording(recording.name)) == len(record)
