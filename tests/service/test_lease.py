"""Two services on the same outputs: one writes, the other one stands by and takes over when the first is gone."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from asyncua import Client, ua
from plant.proxy import ChaosProxy
from running import PLANT, RESULTS, until, write
from serving import SEED, Child, configuration, insecure, nodes_say, running, scoring, stored

from opcua_detector.client.lease import Role
from opcua_detector.client.observer import Observer
from opcua_detector.client.write_rules import WriteRules
from opcua_detector.config import load
from opcua_detector.errors import ConfigError, NodeProblem
from opcua_detector.nodes import State
from opcua_detector.service import Service, Writing, writing_of
from sim_server.testing import RunningPlant, running_plant

LEASED = {"plant": Writing(lease_s=2.0)}
FAULT = f"{PLANT}lorenz.faults.rho"


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant that the tests here share."""
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


@pytest.fixture
def two(lorenz_models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, as on two machines, each with the fitted model."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        shutil.copytree(lorenz_models, folder / "models")
    return folders


async def lease_text(observer: Observer) -> str:
    """What the lease node says."""
    return str((await observer.read({"Lease": f"{RESULTS}lorenz.Lease"}))["Lease"])


def writes(service: Service) -> bool:
    """Whether a service writes its outputs."""
    return service.keepers["plant"].holds("lorenz")


class Both:
    """Watches that no two services write at the same time."""

    def __init__(self, *services: Service) -> None:
        self.services, self.times = services, 0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self.times += sum(writes(one) for one in self.services) > 1
            await asyncio.sleep(0.005)

    def stop(self) -> int:
        """Return how often two were seen to write."""
        self._task.cancel()
        return self.times


async def test_the_second_service_takes_over_when_the_first_one_is_killed_and_it_comes_back_as_standby(
    plant: RunningPlant, two: tuple[Path, Path],
) -> None:
    first, second = (write(folder, configuration(plant.endpoint)) for folder in two)
    child = Child(first, lease_s=2.0)
    try:
        await child.until(lambda said: said["writes"])
        async with Observer(plant.endpoint) as observer:
            holder = (await lease_text(observer)).split()
            async with running(second, writing=LEASED) as service:
                run, back = service.runs["lorenz"], service.backs["plant"]
                await scoring(run, 300)
                assert not writes(service) and run.standby and run.state_text == "standby, normal"
                assert back.counters["values"] == 0 and back.counters["withheld"] > 200
                assert service.keepers["plant"].leases["lorenz"].other == holder[0]
                assert (await lease_text(observer)).split()[1] == holder[1]
                child.kill()
                await until(lambda: writes(service), "the takeover")
                await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good",
                                              StateText=insecure("normal"), ModelId=run.monitor.model.model_id),
                            "the nodes by the second one")
                assert run.state_text == "normal" and not run.standby
                name = service.keepers["plant"].name
                # The one that was killed comes back: same name as before, and stands by.
                async with running(first, writing=LEASED) as again:
                    assert again.keepers["plant"].name == holder[0] != name
                    await scoring(again.runs["lorenz"], 300)
                    assert writes(service) and not writes(again)
                    await again.stop()  # and says nothing when it goes
                    assert await nodes_say(observer, StateText=insecure("normal"))
            assert await nodes_say(observer, StateText="stopped")  # the holder does
            assert (await lease_text(observer)).endswith("released")
    finally:
        child.kill()
    with stored(second) as store:
        roles = [entry.detail["role"] for entry in reversed(store.audit("lease"))]
    assert roles[-1] == Role.HOLDER.value and roles.count(Role.HOLDER.value) == 1


# --- numbers of alerts ---


class Numbers:
    """Every EventNo that a client of the server is told, in order."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def datachange_notification(self, node: Any, value: int, data: Any) -> None:
        """Take a change."""
        self.seen.append(value)


@asynccontextmanager
async def numbers(endpoint: str) -> AsyncIterator[list[int]]:
    """What an HMI that shows EventNo has shown; none may be less than the one before."""
    told = Numbers()
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:results")
        subscription = await client.create_subscription(20, told)
        await subscription.subscribe_data_change(client.get_node(f"ns={index};s=lorenz.EventNo"), queuesize=100)
        yield told.seen
    assert told.seen == sorted(told.seen)


async def come_and_go(observer: Observer) -> int:
    """Let a fault come and go, as the nodes tell it; return the number of its alert, or of the last of several."""
    await observer.write_double(FAULT, 1.5)
    await until(lambda: nodes_say(observer, IsAnomaly=True), "the alert")
    await observer.write_double(FAULT, 1.0)
    await until(lambda: nodes_say(observer, IsAnomaly=False, State=State.NORMAL), "the alert to clear")
    return int((await observer.read({"EventNo": f"{RESULTS}lorenz.EventNo"}))["EventNo"])


async def test_whoever_takes_over_numbers_alerts_on_from_what_the_server_shows(
    plant: RunningPlant, two: tuple[Path, Path],
) -> None:
    first, second = (write(folder, configuration(plant.endpoint)) for folder in two)
    child = Child(first, lease_s=2.0)
    async with Observer(plant.endpoint) as observer, numbers(plant.endpoint) as seen:
        try:
            await child.until(lambda said: said["writes"])
            await until(lambda: nodes_say(observer, State=State.NORMAL), "the first one's results")
            last = [await come_and_go(observer) for _ in range(2)][-1]
            assert last >= 2
            async with running(second, writing=LEASED) as service:  # with a store of its own, which knows no alert
                run = service.runs["lorenz"]
                await scoring(run)
                assert not writes(service) and run.monitor.verdict.event_no == last
                child.kill()
                await until(lambda: writes(service), "the takeover")
                before = len(seen)
                await scoring(run)
                assert await nodes_say(observer, EventNo=run.monitor.verdict.event_no)
                assert await come_and_go(observer) == run.monitor.verdict.event_no > last
                assert seen[before:] and seen[-1] == run.monitor.verdict.event_no
        finally:
            await observer.write_double(FAULT, 1.0)
            child.kill()
    with stored(second) as store:
        events = store.events("lorenz")
    assert [one.event_no for one in events] == list(range(last + len(events), last, -1)) and events


class Stranger:
    """Another instance that holds the lease and tells the numbers it is given."""

    def __init__(self, endpoint: str, number: int) -> None:
        self.number = number
        self._endpoint = endpoint
        self._task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        async with Client(self._endpoint) as client:
            index = await client.get_namespace_index("urn:opcua-detector:results")
            lease, number = (client.get_node(f"ns={index};s=lorenz.{name}") for name in ("Lease", "EventNo"))
            for count in itertools.count():
                for node, value in ((number, ua.Variant(self.number, ua.VariantType.UInt32)),
                                    (lease, ua.Variant(f"stranger 0e {count} holds", ua.VariantType.String))):
                    await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(value))
                await asyncio.sleep(0.2)

    async def die(self) -> None:
        """Write nothing more, and say nothing."""
        self._task.cancel()
        await asyncio.wait({self._task})


async def test_an_alert_that_stands_at_the_takeover_goes_on_under_a_number_that_was_never_shown(
    plant: RunningPlant, two: tuple[Path, Path],
) -> None:
    file = write(two[0], configuration(plant.endpoint))
    stranger = Stranger(plant.endpoint, 1000)
    async with Observer(plant.endpoint) as observer, numbers(plant.endpoint) as seen:
        await until(lambda: nodes_say(observer, EventNo=1000), "the number of the other one")
        try:
            async with running(file, writing=LEASED) as service:
                run = service.runs["lorenz"]
                assert run.monitor.verdict.event_no == 1000  # before the first row
                await scoring(run)
                stranger.number = 1005
                await until(lambda: run.monitor.verdict.event_no == 1005, "the next number")
                await observer.write_double(FAULT, 1.5)
                await until(lambda: run.monitor.verdict.alert and run.explanation is not None, "its own alert")
                own = run.monitor.verdict.event_no
                stranger.number = 2000
                await until(lambda: service.outputs.numbers["lorenz"] == 2000, "the number to be read")
                assert run.monitor.verdict.event_no == own == 1006  # a standing alert keeps its number
                await stranger.die()
                await until(lambda: writes(service), "the takeover")
                await until(lambda: nodes_say(observer, EventNo=2001, IsAnomaly=True), "the alert in the nodes")
                await observer.write_double(FAULT, 1.0)
                await until(lambda: not run.monitor.verdict.alert and run.state == State.NORMAL, "the end of it")
                assert seen[-1] == run.monitor.verdict.event_no >= 2001
        finally:
            await observer.write_double(FAULT, 1.0)
            await stranger.die()
    with stored(file) as store:
        events = {one.event_no: one for one in store.events("lorenz")}
    assert events[1006].cleared_ns == events[2001].raised_ns and 2000 not in events
    assert all(one.cleared_ns is not None and one.sentence for one in events.values())


# --- cut off ---


async def test_a_service_that_is_cut_off_stops_first_and_does_not_take_the_outputs_back(
    plant: RunningPlant, two: tuple[Path, Path],
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        first, second = write(two[0], configuration(proxy.endpoint)), write(two[1], configuration(plant.endpoint))
        async with running(first, writing=LEASED) as a:
            await until(lambda: writes(a), "the first one to write")
            async with running(second, writing=LEASED) as b, Observer(plant.endpoint) as observer:
                both = Both(a, b)
                await scoring(b.runs["lorenz"])
                assert writes(a) and not writes(b)
                proxy.blackhole()
                await until(lambda: writes(b), "the takeover")
                await until(lambda: nodes_say(observer, State=State.NORMAL, Quality="Good"), "the nodes")
                proxy.heal()
                await scoring(a.runs["lorenz"], 300)
                await asyncio.sleep(3.0)  # longer than a lease
                assert writes(b) and not writes(a) and both.stop() == 0
                assert a.keepers["plant"].counters["lost"] == 1 and b.keepers["plant"].counters["lost"] == 0


def test_the_configuration_says_how_a_server_is_written(plant: RunningPlant, two: tuple[Path, Path]) -> None:
    given = configuration(plant.endpoint)
    given["servers"][0]["writing"] = {
        "allow": [f"{RESULTS}lorenz.*"], "node_every": "50 ms", "values_per_s": 100, "read_back": "2 s",
        "lease": {"period": "1.5 s", "name": "line-3-a"}}
    assert writing_of(load(write(two[0], given)).servers[0]) == Writing(
        WriteRules((f"{RESULTS}lorenz.*",), False, 0.05, 100.0, 2.0), 1.5, "line-3-a")
    assert writing_of(load(write(two[0], configuration(plant.endpoint))).servers[0]) == Writing()


async def test_a_server_without_the_lease_node_keeps_the_service_from_starting(
    plant: RunningPlant, two: tuple[Path, Path],
) -> None:
    given = configuration(plant.endpoint)
    file = write(two[0], given)
    await disturb(plant.endpoint, "remove", "lorenz.Lease")
    try:
        with pytest.raises(NodeProblem, match=r"outputs.base.*no lease can be kept"):
            async with running(file, writing=LEASED):
                raise AssertionError("it started")
    finally:
        await disturb(plant.endpoint, "restore", "lorenz.Lease")


async def disturb(endpoint: str, what: str, argument: str) -> None:
    """Disturb the simulated plant."""
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:simulated-plant")
        await client.get_node(f"ns={index};s=lorenz").call_method(f"{index}:Disturb", what, argument)


async def test_a_lease_needs_a_node_and_says_so(plant: RunningPlant, two: tuple[Path, Path]) -> None:
    given: dict[str, Any] = configuration(plant.endpoint)
    given["monitors"][0]["outputs"] = {"server": "plant", "nodes": {"Score": f"{RESULTS}lorenz.Score"}}
    with pytest.raises(ConfigError, match="Lease"):
        async with running(write(two[0], given), writing=LEASED):
            raise AssertionError("it started")
