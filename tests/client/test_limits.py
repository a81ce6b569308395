"""Servers that take less in one call than they are asked for, or have no room for all that is wanted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asyncua import ua
from asyncua.common.utils import ServiceError
from asyncua.server.internal_session import InternalSession

from opcua_detector.api import Tag
from opcua_detector.client import GroupFeed, LinkState, Session, login, session, subscription
from opcua_detector.client.history import read_samples
from opcua_detector.client.limits import PROFILES, UNKNOWN, Limits, profile_of
from opcua_detector.client.nodes import NodeRef, read_facts, resolve
from opcua_detector.config import TagConfig

from .bounded import Bounds, add_many
from .conftest import WAIT_S, OddServer, Rows, group_config, server_config

N = 120


def tags_of(odd: OddServer, names: list[str]) -> tuple[TagConfig, ...]:
    return tuple(TagConfig(name=name, node=odd.text(name), kind="setpoint") for name in names)


# --- what is known before the first refusal ---


@pytest.mark.parametrize(("manufacturer", "product", "name"), [
    ("Siemens AG", "SIMATIC.S7-1200.OPC-UA.Application", "S7-1200"),
    ("Siemens AG", "SIMATIC.S7-1500.OPC-UA.Application", "S7-1500"),
    ("Siemens AG", "WinCC Unified", "Siemens"),
    ("Kepware", "KEPServerEX/V6", "Kepware"),
    ("Beckhoff Automation", "TcOpcUaServer", "Beckhoff"),
    ("3S - Smart Software Solutions GmbH", "OPCUAServer", "CODESYS"),
    ("open62541", "open62541 OPC UA Server", "open62541"),
    ("NodeOPCUA : MIT Licence ( see http://node-opcua.github.io/)", "NodeOPCUA-Server", "node-opcua"),
    ("FreeOpcUa", "FreeOpcUa Python Server", "asyncua"),
    ("Somebody", "Something", "unknown"),
])
def test_a_make_is_known_by_its_build_info(manufacturer: str, product: str, name: str) -> None:
    assert profile_of(manufacturer, product).name == name


def test_every_profile_is_of_use() -> None:
    assert len({one.name for one in PROFILES}) == len(PROFILES)
    assert UNKNOWN.batch == 50 == min(one.batch for one in (*PROFILES, UNKNOWN))
    for one in PROFILES:
        assert list(one.sampling_ms) == sorted(one.sampling_ms)


@pytest.mark.parametrize(("asked", "given"), [(5, 100), (100, 100), (240, 100), (250, 250), (7000, 1000), (0, 0)])
def test_a_make_with_steps_is_asked_for_one_of_them(asked: float, given: float) -> None:
    assert profile_of("Siemens AG", "S7-1500").sampling(asked) == given


def test_what_is_stated_comes_before_what_is_known_and_what_was_refused_before_both() -> None:
    limits = Limits()
    assert limits.size("read") == 50
    limits.stated["read"] = 4000
    assert limits.size("read") == 4000
    assert limits.refused("read", 4000) == 2000 == limits.size("read") and limits.size("monitor") == 50
    limits.stated["read"] = 100  # another server behind the same endpoint states less
    assert limits.size("read") == 100


def test_one_hang_up_in_a_call_is_chance_and_two_in_a_row_are_a_refusal() -> None:
    limits = Limits()
    limits.stated["read"] = 1000
    limits.hung_up("read", 1000)
    limits.worked("read")
    limits.hung_up("read", 1000)
    assert limits.size("read") == 1000
    limits.hung_up("read", 1000)
    assert limits.size("read") == 500
    limits.hung_up("read", 20)
    limits.hung_up("read", 20)
    assert limits.size("read") == 500


async def test_the_limits_and_the_make_are_read_from_the_server(odd: OddServer) -> None:
    for number, value in ((ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerRead, 7000),
                          (ua.ObjectIds.Server_ServerCapabilities_OperationLimits_MaxMonitoredItemsPerCall, 0)):
        await odd.server.get_node(ua.NodeId(number)).write_value(ua.Variant(value, ua.VariantType.UInt32))
    one = Session(server_config(odd.endpoint))
    await one.open()
    assert one.limits.profile.name == "asyncua" and "FreeOpcUa" in one.limits.about
    assert one.limit("read") == 7000 and "monitor" not in one.limits.stated and one.limit("monitor") == 1000
    await one.close()


# --- refusals ---


@pytest.mark.parametrize("refusal", ["BadTooManyOperations", "BadEncodingLimitsExceeded", "BadResponseTooLarge"])
async def test_reads_and_browse_paths_are_halved_until_the_server_takes_them(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    names = await add_many(odd, N)
    index = link.namespaces.index(odd.uri)
    bounds = Bounds(monkeypatch, read=40, translate=30)
    bounds.refusal = getattr(ua.StatusCodes, refusal)
    paths = [f"/Objects/{index}:{name}" for name in names]
    found = await resolve(link, paths)
    refs = [found[path] for path in paths]
    assert all(isinstance(ref, NodeRef) for ref in refs)
    facts = await read_facts(link, [ref for ref in refs if isinstance(ref, NodeRef)])
    assert [one.value for one in facts] == [float(k) for k in range(N)]
    assert 0 < bounds.largest["read"] <= 40 and 0 < bounds.largest["translate"] <= 30
    halved = link.counters["halved_calls"]
    assert halved == bounds.refused["read"] + bounds.refused["translate"] > 0
    await resolve(link, paths)
    await read_facts(link, [ref for ref in refs if isinstance(ref, NodeRef)])
    assert link.counters["halved_calls"] == halved  # remembered


async def test_what_was_learnt_holds_on_the_next_connection(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await add_many(odd, N)
    bounds = Bounds(monkeypatch, read=40)
    await read_facts(link, [one for one in (await resolve(link, [odd.text(name) for name in names])).values()
                            if isinstance(one, NodeRef)])
    size, refused = link.limit("read"), bounds.refused["read"]
    assert size <= 40 and refused > 0
    monkeypatch.setattr(session, "FIRST_DELAY_S", 0.01)
    link.fail("cut by the test")
    async with asyncio.timeout(WAIT_S):
        while link.counters["reconnects"] < 1 or link.state is not LinkState.CONNECTED:
            await asyncio.sleep(0.01)
    assert link.limit("read") == size
    await read_facts(link, [one for one in (await resolve(link, [odd.text(name) for name in names])).values()
                            if isinstance(one, NodeRef)])
    assert bounds.refused["read"] == refused


async def test_monitored_items_are_created_in_calls_that_the_server_takes(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await add_many(odd, N)
    bounds = Bounds(monkeypatch, monitor=25)
    feed = GroupFeed(group_config(period="100 ms", tags=tags_of(odd, names)), {"plant": link}, Rows().take)
    await feed.start()
    assert set(feed.tag_states().values()) == {""} and not feed.polled_tags()
    assert bounds.largest["monitor"] <= 25 and bounds.refused["monitor"] > 0
    await feed.stop()


async def historized(odd: OddServer, n: int, values: int) -> list[Tag]:
    """Add n tags and write some values of each, which the server keeps."""
    names = await add_many(odd, n)
    for name in names:
        await odd.server.historize_node_data_change(odd.nodes[name], period=None, count=1000)
    for k in range(values):
        for name in names:
            await odd.nodes[name].write_value(float(k + 1))
    return [Tag(name, odd.text(name)) for name in names]


async def test_history_is_read_of_fewer_tags_at_once_when_the_server_refuses_many(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = await historized(odd, 7, 5)
    bounds = Bounds(monkeypatch, history=2)
    samples = await read_samples(link, [tag.node for tag in tags], 0, 2 * 10**18)
    assert bounds.refused["history"] > 0 and bounds.largest["history"] <= 2 and link.limit("history") <= 2
    assert all(one.value.tolist()[-5:] == [1.0, 2.0, 3.0, 4.0, 5.0] for one in samples)


async def test_history_is_read_in_smaller_pages_when_an_answer_would_be_too_large(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = await historized(odd, 2, 30)
    original = InternalSession.history_read
    asked: list[int] = []

    async def history_read(session: InternalSession, given: Any) -> Any:
        asked.append(given.HistoryReadDetails.NumValuesPerNode)
        if asked[-1] > 16:
            raise ServiceError(ua.StatusCodes.BadEncodingLimitsExceeded)
        return await original(session, given)

    monkeypatch.setattr(InternalSession, "history_read", history_read)
    samples = await read_samples(link, [tag.node for tag in tags], 0, 2 * 10**18)
    assert min(asked) <= 16 < max(asked) and link.counters["halved_calls"] > 0
    assert all(one.value.tolist()[-30:] == [float(k + 1) for k in range(30)] for one in samples)


# --- no room ---


async def test_tags_beyond_the_limit_of_monitored_items_are_polled_and_told(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await add_many(odd, 10)
    bounds = Bounds(monkeypatch)
    bounds.items = 6
    rows = Rows()
    feed = GroupFeed(group_config(period="100 ms", tags=tags_of(odd, names)), {"plant": link}, rows.take)
    monkeypatch.setattr(subscription, "_ROOM_FIRST_S", 0.2)
    await feed.start()
    assert feed.polled_tags() == dict.fromkeys(names[6:], "BadTooManyMonitoredItems")
    await rows.until(lambda r: bool(r.rows) and bool(r.rows[-1][3].all()))
    assert rows.rows[-1][2].tolist() == [float(k) for k in range(10)]
    assert set(feed.tag_states().values()) == {""}
    await odd.nodes[names[9]].write_value(90.0)
    await odd.nodes[names[0]].write_value(91.0)
    await rows.until(lambda r: r.rows[-1][2][9] == 90.0 and r.rows[-1][2][0] == 91.0)
    bounds.items = 100
    async with asyncio.timeout(WAIT_S):
        while feed.polled_tags():
            await asyncio.sleep(0.05)
    await odd.nodes[names[9]].write_value(92.0)
    await rows.until(lambda r: r.rows[-1][2][9] == 92.0)
    polls = feed.counters()["polls"]
    await rows.more(5)
    assert feed.counters()["polls"] == polls and link.counters["lost"] == 0
    await feed.stop()


async def test_a_server_without_room_for_a_subscription_is_polled_until_it_has_some(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await add_many(odd, 4)
    assert odd.server.iserver is not None
    odd.server.iserver.max_subscriptions = 0
    monkeypatch.setattr(subscription, "_ROOM_FIRST_S", 0.2)
    rows = Rows()
    feed = GroupFeed(group_config(period="100 ms", tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    assert feed.polled_tags() == dict.fromkeys(names, "BadTooManySubscriptions")
    await rows.more(10)
    assert rows.rows[-1][3].all() and set(feed.tag_states().values()) == {""}
    odd.server.iserver.max_subscriptions = 10
    async with asyncio.timeout(WAIT_S):
        while feed.polled_tags():
            await asyncio.sleep(0.05)
    await odd.nodes[names[2]].write_value(77.0)
    await rows.until(lambda r: r.rows[-1][2][2] == 77.0)
    assert link.counters["lost"] == 0 and feed.counters()["gaps"] == 0
    await feed.stop()


async def test_a_subscription_that_holds_few_items_is_followed_by_another(odd: OddServer, link: Session) -> None:
    names = await add_many(odd, 10)
    link.limits.items_per_subscription = 4
    rows = Rows()
    feed = GroupFeed(group_config(period="100 ms", tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    assert [len(one.items) for one in feed.subscriptions.values()] == [4, 4, 2]
    for name in names:
        await odd.nodes[name].write_value(5.0)
    await rows.until(lambda r: bool(r.rows) and r.rows[-1][2].tolist() == [5.0] * 10)
    await feed.stop()


async def test_a_session_limit_is_waited_out_without_a_busy_loop(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert odd.server.iserver is not None
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.5)
    monkeypatch.setattr(InternalSession, "max_connections", 0)
    tried = link.counters["failed_attempts"]
    link.fail("cut by the test")
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(WAIT_S):
        while link.counters["failed_attempts"] < tried + 4:
            await asyncio.sleep(0.01)
    seconds = asyncio.get_running_loop().time() - began
    assert link.counters["failed_attempts"] - tried <= 4 + seconds / 0.1
    assert "no room for one more session" in link.reason
    monkeypatch.setattr(InternalSession, "max_connections", 1000)
    async with asyncio.timeout(WAIT_S):
        while link.state is not LinkState.CONNECTED:
            await asyncio.sleep(0.01)
    assert link.counters["reconnects"] == 1


async def test_a_connection_that_is_given_up_leaves_no_session_at_the_server(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small PLCs have room for few sessions: those of lost connections must not use it up."""
    monkeypatch.setattr(session, "FIRST_DELAY_S", 0.05)
    # a server keeps a session that has a subscription when its connection ends (Part 4, 6.7)
    feed = GroupFeed(group_config(period="100 ms", tags=tags_of(odd, ["Double"])), {"plant": link}, Rows().take)
    await feed.start()
    for k in range(4):
        link.fail("cut by the test")
        async with asyncio.timeout(WAIT_S):
            while link.counters["reconnects"] <= k or link.state is not LinkState.CONNECTED:
                await asyncio.sleep(0.01)
    assert odd.server.iserver is not None
    held = odd.server.iserver._external_sessions
    async with asyncio.timeout(login.SESSION_TIMEOUT_MS / 3e3):  # by then it would have ended by itself
        while len(held) > 1:
            await asyncio.sleep(0.01)
    assert len(odd.server.iserver.subscription_service.subscriptions) == 1
    await feed.stop()


async def test_limits_that_cannot_be_read_at_once_are_read_one_by_one(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = Bounds(monkeypatch, read=3)
    one = Session(server_config(odd.endpoint))
    await one.open()
    assert bounds.refused["read"] == 1 and one.limits.profile.name == "asyncua"
    await one.close()
