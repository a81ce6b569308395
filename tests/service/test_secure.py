"""What an HMI sees of insecure connections: in StateText and on a Boolean, per monitor, as long as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RESULTS, until, write
from serving import SEED, configuration, insecure, nodes_say, running, scoring

from opcua_detector.client import secure
from opcua_detector.client.observer import Observer
from opcua_detector.client.write_rules import WriteRules
from opcua_detector.nodes import State
from opcua_detector.service import Writing
from sim_server.testing import RunningPlant, running_plant


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlant]:
    """A plant that takes secure and insecure sessions."""
    with running_plant("lorenz", history_rows=100, seed=SEED, pki=tmp_path_factory.mktemp("plant-pki")) as running:
        yield running


async def with_secure(given: dict[str, Any], plant: RunningPlant, folder: Path) -> dict[str, Any]:
    """Add a server "safe": the same plant, encrypted, its certificate pinned."""
    pinned = folder / "plant.der"
    found = await secure.discover(plant.endpoint, 10.0)
    pinned.write_bytes(next(one.ServerCertificate for one in found.endpoints if one.ServerCertificate))
    given["servers"].append({"name": "safe", "endpoint": plant.endpoint, "server_certificate": str(pinned)})
    return given


async def test_an_insecure_connection_stands_in_the_nodes_as_long_as_the_service_runs(
    plant: RunningPlant, folder: Path,
) -> None:
    async with running(write(folder, configuration(plant.endpoint))) as service, Observer(plant.endpoint) as observer:
        await scoring(service.runs["lorenz"])
        await until(lambda: nodes_say(observer, State=State.NORMAL, StateText="normal (INSECURE connection)",
                                      Insecure=True), "the insecure connection in the nodes")
        assert service.runs["lorenz"].state_text == "normal"  # the number, and what a terminal shows, are as before
        await service.stop()
        assert await nodes_say(observer, State=State.STOPPED, StateText="stopped", Insecure=False)


async def test_secure_connections_alone_leave_no_mark(plant: RunningPlant, folder: Path) -> None:
    given = await with_secure(configuration(plant.endpoint), plant, folder)
    given["groups"][0]["server"] = given["monitors"][0]["outputs"]["server"] = "safe"
    async with running(write(folder, given)) as service, Observer(plant.endpoint) as observer:
        await scoring(service.runs["lorenz"])
        assert list(service.sessions) == ["safe"]
        await until(lambda: nodes_say(observer, State=State.NORMAL, StateText="normal", Insecure=False), "no mark")


@pytest.mark.parametrize("where", ["tag", "outputs"])
async def test_one_insecure_server_of_several_marks_the_monitor(
    plant: RunningPlant, folder: Path, where: str,
) -> None:
    given = await with_secure(configuration(plant.endpoint), plant, folder)
    given["groups"][0] |= {"server": "safe", "lateness": "300 ms"}
    if where == "tag":
        given["monitors"][0]["outputs"]["server"] = "safe"
        given["groups"][0]["tags"][1]["server"] = "plant"
    async with running(write(folder, given)) as service, Observer(plant.endpoint) as observer:
        await scoring(service.runs["lorenz"])
        assert set(service.sessions) == {"safe", "plant"}
        await until(lambda: nodes_say(observer, StateText=insecure("normal"), Insecure=True), "the mark")


async def test_an_allow_list_without_the_node_is_no_reason_not_to_start(plant: RunningPlant, folder: Path) -> None:
    given = configuration(plant.endpoint)
    given["monitors"][0]["outputs"]["signals"] = ["Score", "StateText", "Quality"]
    async with Observer(plant.endpoint) as observer:
        allow = tuple(f"{RESULTS}lorenz.{signal}" for signal in ("Score", "StateText", "Quality"))
        async with running(write(folder, given), writing={"plant": Writing(WriteRules(allow=allow))}) as service:
            await scoring(service.runs["lorenz"])
            await until(lambda: nodes_say(observer, StateText=insecure("normal"), Quality="Good", Insecure=False),
                        "the text, which is allowed, and nothing else")
