"""Ways in which a tag could stay silent on a connection that is well: each is found, told, and ended by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from asyncua import ua

from opcua_detector.client import Item, LinkState, Session, Subscription, silence, subscription
from opcua_detector.client.items import Monitoring
from opcua_detector.client.silence import Silence
from opcua_detector.errors import ServerUnreachable

from .conftest import OddServer, server_config, until

PERIOD = 50_000_000


class Last:
    """The last value of each column."""

    def __init__(self, n: int) -> None:
        self.value = np.full(n, np.nan)

    def take(self, column: Any, source_ns: Any, value: Any, status: Any) -> None:
        self.value[column] = value


def of(session: Session, last: Last, *items: Item, poll: bool = False) -> Subscription:
    return Subscription(
        session, items, sampling_ns=0, publishing_ns=PERIOD, on_samples=last.take, on_lost=lambda: None,
        period_ns=PERIOD if poll else None, poll_ns=PERIOD if poll else None,
    )


async def add(odd: OddServer, name: str, value: float, uri: str = "urn:odd") -> Any:
    index = await odd.server.get_namespace_index(uri)
    return await odd.server.nodes.objects.add_variable(
        ua.NodeId(name, index), f"{index}:{name}", value, ua.VariantType.Double
    )


async def test_an_item_that_the_server_has_lost_without_a_word_is_monitored_anew(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This server drops the items of a node that is deleted, and tells nobody; the others go on."""
    monkeypatch.setattr(silence, "SILENT_S", 0.2)
    monkeypatch.setattr(subscription, "_RETRY_FIRST_S", 0.1)
    node = await add(odd, "Downloaded", 1.0)
    last = Last(2)
    one = of(link, last, Item("gone", odd.text("Downloaded"), 0), Item("stays", odd.text("Double"), 1))
    await link.attach(one)
    await until(lambda: last.value.tolist() == [1.0, 0.0])
    await asyncio.sleep(1.0)  # several looks at tags that only do not change
    assert one.counters["silent_items"] == 0
    await odd.server.delete_nodes([node])
    node = await add(odd, "Downloaded", 2.0)
    await until(lambda: last.value[0] == 2.0)
    assert one.counters["silent_items"] == 1 and link.counters["lost"] == 0
    await node.write_value(3.0)
    await until(lambda: last.value[0] == 3.0)  # it is really monitored
    assert [item.reason for item in one.items] == ["", ""]
    link.detach(one)


def test_a_tag_must_differ_twice_with_silence_between() -> None:
    now = 0
    tags = Silence(3, lambda: now)
    tags.begin()
    column = np.arange(3, dtype=np.int32)
    tags.heard(column, np.array([1.0, np.nan, 5.0]), np.array([0, 0, ua.StatusCodes.Bad], np.uint32))
    limit = 60 * 10**9

    def look(column: int, value: float, bad: bool = False) -> bool:
        return tags._differs(column, value, bad) and tags._still(column, now - limit)

    now = 100 * 10**9
    assert not look(0, 1.0) and not look(1, np.nan) and not look(2, 7.0, bad=True)  # as they were
    assert not look(0, 2.0) and not look(2, 7.0)  # they differ: once
    now = 200 * 10**9
    assert look(0, 2.0) and look(2, 7.0)
    tags.heard(column[:1], np.array([2.0]), np.array([0], np.uint32))
    now = 300 * 10**9
    assert not look(0, 3.0)
    now = 310 * 10**9
    assert not look(0, 3.0)  # too soon
    now = 320 * 10**9
    assert not look(0, 2.0)  # and back: its change was only not under way yet
    now = 400 * 10**9
    assert not look(0, 3.0)


async def test_a_namespace_that_the_server_adds_while_it_is_connected_is_found(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PLC that opens its port before its program is loaded."""
    monkeypatch.setattr(subscription, "_RETRY_FIRST_S", 0.1)
    last = Last(2)
    one = of(link, last, Item("late", "nsu=urn:late;s=Late", 0), Item("d", odd.text("Double"), 1))
    await link.attach(one)
    assert "no namespace" in one.items[0].reason
    await odd.server.register_namespace("urn:late")
    await add(odd, "Late", 4.0, "urn:late")
    await until(lambda: last.value.tolist() == [4.0, 0.0])
    assert one.items[0].reason == "" and link.counters["lost"] == 0
    link.detach(one)


async def test_namespaces_that_change_their_places_rebuild_the_connection(odd: OddServer, link: Session) -> None:
    link.namespaces = ["http://opcfoundation.org/UA/", "urn:another", *link.namespaces[1:]]
    await link.read_namespaces()
    await until(lambda: link.counters["reconnects"] == 1 and link.state is LinkState.CONNECTED)


@pytest.mark.parametrize("poll", [False, True], ids=["retry", "poll"])
async def test_a_task_that_ends_by_an_error_nobody_has_foreseen_rebuilds_the_connection(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch, poll: bool, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subscription, "_RETRY_FIRST_S", 0.1)
    last = Last(2)
    items = [Item("d", odd.text("Double"), 0), Item("missing", odd.text("Missing"), 1)]
    one = of(link, last, *items, poll=poll)
    await link.attach(one)
    await until(lambda: last.value[0] == 0.0)

    async def breaks(*_: Any) -> None:
        raise KeyError("unforeseen")

    with monkeypatch.context() as broken:
        broken.setattr(one.poller, "_round", breaks) if poll else broken.setattr(Monitoring, "create", breaks)
        await until(lambda: link.counters["lost"] >= 1)
    await until(lambda: link.counters["reconnects"] >= 1 and link.state is LinkState.CONNECTED)
    assert "unforeseen" in caplog.text
    last.value[:] = np.nan
    await odd.nodes["Double"].write_value(5.0)
    await until(lambda: last.value[0] == 5.0)
    link.detach(one)


async def test_a_part_that_is_attached_while_the_others_are_built_is_built_too(odd: OddServer) -> None:
    class Slow:
        def __init__(self) -> None:
            self.begun, self.go = asyncio.Event(), asyncio.Event()

        async def link_up(self) -> None:
            self.begun.set()
            await self.go.wait()

        def link_down(self) -> None:
            pass

    one = Session(server_config(odd.endpoint))
    slow = Slow()
    await one.attach(slow)
    opening = asyncio.create_task(one.open())
    await slow.begun.wait()
    assert one.state is LinkState.CONNECTING
    last = Last(1)
    await one.attach(of(one, last, Item("d", odd.text("Double"), 0)))
    slow.go.set()
    await opening
    await until(lambda: last.value[0] == 0.0)
    await one.close()
    with pytest.raises(ServerUnreachable):
        _ = one.client
