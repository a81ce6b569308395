"""Two servers of one plant: the active one is used, whichever that is, and never a standby in its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from asyncua import ua

from opcua_detector.client import GroupFeed, LinkState, Session, redundancy, session
from opcua_detector.client.redundancy import PATIENCE_S, Standing, choose
from opcua_detector.config import ServerConfig, TagConfig
from opcua_detector.errors import ServerUnreachable

from .conftest import WAIT_S, OddServer, Rows, group_config, server_config

ACTIVE, STANDBY, DEGRADED = 255, 199, 100


async def set_level(odd: OddServer, level: int, state: ua.ServerState = ua.ServerState.Running) -> None:
    """Let a server state how well it can serve."""
    server = odd.server
    await server.write_attribute_value(
        ua.NodeId(ua.ObjectIds.Server_ServiceLevel), ua.DataValue(ua.Variant(level, ua.VariantType.Byte)))
    await server.write_attribute_value(
        ua.NodeId(ua.ObjectIds.Server_ServerStatus_State), ua.DataValue(ua.Variant(int(state), ua.VariantType.Int32)))


@pytest_asyncio.fixture
async def pair(cache: Path) -> AsyncIterator[tuple[OddServer, OddServer]]:
    """Two servers; the second has other namespace indexes."""
    first, second = OddServer(cache), OddServer(cache)
    await first.start()
    await second.start("urn:one", "urn:two")
    yield first, second
    await first.server.stop()
    await second.server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PROBE_S", 0.2)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.3)


def config_of(*servers: OddServer, **changes: Any) -> ServerConfig:
    usual = server_config(servers[0].endpoint, timeout="2 s", **changes)
    return ServerConfig(**{name: getattr(usual, name) for name in ("name", "endpoint", "policy", "insecure")},
                     timeout="2 s", endpoints=tuple(one.endpoint for one in servers[1:]))


@asynccontextmanager
async def opened(*servers: OddServer) -> AsyncIterator[Session]:
    one = Session(config_of(*servers))
    await one.open()
    try:
        yield one
    finally:
        await one.close()


async def connected_to(one: Session, odd: OddServer) -> None:
    async with asyncio.timeout(WAIT_S):
        while one.endpoint != odd.endpoint or one.state is not LinkState.CONNECTED:
            await asyncio.sleep(0.02)


# --- the choice ---

HOW = {"active": Standing(0, ACTIVE), "standby": Standing(0, STANDBY), "degraded": Standing(0, DEGRADED),
       "lower": Standing(0, 220), "no data": Standing(0, 1), "maintenance": Standing(0, 0), "gone": Standing(),
       "failed": Standing(1, ACTIVE), "twin": Standing(0, ACTIVE)}


@pytest.mark.parametrize(("found", "present", "waited_s", "chosen"), [
    (("active", "standby"), "standby", 0.0, "active"),
    (("active", "lower"), "lower", 0.0, "active"),
    (("active", "twin"), "twin", 0.0, "twin"),
    (("active", "twin"), "active", 0.0, "active"),
    (("standby", "gone"), "standby", 0.0, None),
    (("standby", "degraded"), "degraded", PATIENCE_S, "standby"),
    (("no data", "maintenance"), "no data", 10 * PATIENCE_S, None),
    (("failed", "degraded"), "failed", 0.0, None),
    (("failed", "degraded"), "failed", PATIENCE_S, "degraded"),
    (("gone", "gone"), "gone", 10 * PATIENCE_S, None),
])
def test_the_active_server_is_chosen(
    found: tuple[str, ...], present: str, waited_s: float, chosen: str | None
) -> None:
    assert choose({one: HOW[one] for one in found}, present, waited_s) == chosen


# --- the session ---


async def test_the_standby_is_not_taken_though_it_is_named_first(pair: tuple[OddServer, OddServer]) -> None:
    standby, active = pair
    await set_level(standby, STANDBY)
    async with opened(standby, active) as one:
        assert one.endpoint == active.endpoint and active.endpoint in one.where
        assert one.namespaces.index("urn:odd") == 4
        assert one.standing[standby.endpoint].text == "running, service level 199"
        assert one.counters["changeovers"] == 0


async def test_the_others_are_left_and_hold_no_session(pair: tuple[OddServer, OddServer]) -> None:
    standby, active = pair
    await set_level(standby, STANDBY)
    async with opened(standby, active), asyncio.timeout(WAIT_S):
        while standby.server.bserver is None or standby.server.bserver.clients:
            await asyncio.sleep(0.02)


async def test_rows_go_on_from_the_other_server_when_the_active_one_steps_down_and_when_it_falls(
    pair: tuple[OddServer, OddServer],
) -> None:
    first, second = pair
    await set_level(second, STANDBY)
    await first.nodes["Double"].write_value(1.0)
    await second.nodes["Double"].write_value(2.0)
    tags = (TagConfig(name="a", node=first.text("Double"), kind="setpoint"),)
    async with opened(first, second) as one:
        assert one.endpoint == first.endpoint
        rows = Rows()
        feed = GroupFeed(group_config(period="50 ms", tags=tags), {"plant": one}, rows.take)
        await feed.start()
        await rows.until(lambda r: bool(r.rows) and r.rows[-1][2][0] == 1.0)
        await set_level(second, ACTIVE)
        await set_level(first, STANDBY)  # steps down: the index of the namespace is another one on the second
        await rows.until(lambda r: r.rows[-1][2][0] == 2.0)
        assert one.endpoint == second.endpoint and one.counters["changeovers"] == 1
        await set_level(first, ACTIVE)
        await second.server.stop()  # falls
        await rows.until(lambda r: r.rows[-1][2][0] == 1.0)
        assert one.endpoint == first.endpoint and one.counters["changeovers"] == 2
        assert feed.counters()["gaps"] == 2 and feed.tag_states() == {"a": ""}
        await feed.stop()
    await second.start("urn:one", "urn:two")  # for the fixture, which stops it


async def test_a_standby_alone_is_waited_for_and_taken_when_it_takes_over(
    pair: tuple[OddServer, OddServer],
) -> None:
    first, second = pair
    await set_level(second, STANDBY)
    async with opened(first, second) as one:
        await set_level(first, 0, ua.ServerState.Shutdown)
        async with asyncio.timeout(WAIT_S):
            while one.counters["failed_attempts"] < 2:
                await asyncio.sleep(0.02)
        assert one.state is LinkState.WAITING and "no server of the redundant set is active" in one.reason
        assert "service level 199" in one.reason and "shutting down" in one.reason
        await set_level(second, ACTIVE)
        await connected_to(one, second)


async def test_a_degraded_server_is_taken_in_the_end_and_left_for_a_better_one(
    pair: tuple[OddServer, OddServer], monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = pair
    await set_level(first, DEGRADED)
    await set_level(second, 1)
    with pytest.raises(ServerUnreachable, match="no server of the redundant set is active"):
        await Session(config_of(first, second)).open()
    monkeypatch.setattr(redundancy, "PATIENCE_S", 0.0)
    async with opened(first, second) as one:
        assert one.endpoint == first.endpoint
        await asyncio.sleep(0.6)  # probes that find nothing better change nothing
        assert one.counters["lost"] == 0 and one.endpoint == first.endpoint
        await set_level(second, 220)
        await connected_to(one, second)
        assert one.counters["changeovers"] == 1


async def test_a_set_of_which_nobody_answers_is_told_as_one_server_would_be() -> None:
    one = Session(ServerConfig(name="plant", endpoint="opc.tcp://127.0.0.1:9/", policy="None", insecure=True,
                            timeout="1 s", endpoints=("opc.tcp://127.0.0.1:10/",)))
    with pytest.raises(ServerUnreachable, match="open the connection"):
        await one.open()
