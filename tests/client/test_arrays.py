"""Elements of array nodes as tags: monitored and polled, several of one node by one item, on two makes of server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from asyncua import Client, ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_to_binary
from plant.node_server import node_server

from opcua_detector.client import Item, Session, Subscription, subscription, wire
from opcua_detector.client.arrays import Fan

from .conftest import RESULTS, WAIT_S, OddServer, server_config

PERIOD = 50_000_000


class Seen:
    """The last sample of each column, and how often each came."""

    def __init__(self, n: int) -> None:
        self.value = np.full(n, np.nan)
        self.status = np.zeros(n, np.uint32)
        self.stamp = np.zeros(n, np.int64)
        self.count = np.zeros(n, np.int64)
        self.losses = 0

    def take(self, column: Any, source_ns: Any, value: Any, status: Any) -> None:
        assert len(set(column.tolist())) <= len(column) == len(source_ns) == len(value) == len(status)
        for k, one in enumerate(column):
            self.value[one], self.status[one], self.stamp[one] = value[k], status[k], source_ns[k]
            self.count[one] += 1

    def lost(self) -> None:
        self.losses += 1

    async def until(self, *wanted: float) -> None:
        """Wait for these values, NaN for what has none."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not np.array_equal(self.value, np.array(wanted), equal_nan=True) or not self.count.all():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.value} is not {wanted}, counts {self.count}") from None


def subscribe(session: Session, seen: Seen, items: Sequence[Item], *, poll: bool, **more: Any) -> Subscription:
    return Subscription(
        session, items, sampling_ns=0, publishing_ns=PERIOD, on_samples=seen.take, on_lost=seen.lost,
        period_ns=None if not poll else PERIOD, poll_ns=PERIOD if poll else None, **more,
    )


def elements(node: str, *places: int, first: int = 0) -> list[Item]:
    return [Item(f"e{place}", node, first + k, element=place) for k, place in enumerate(places)]


def monitored(odd: OddServer) -> int:
    """How many items the server monitors."""
    service: Any = odd.server.iserver.subscription_service  # type: ignore[union-attr]
    return sum(len(one.monitored_item_srv._monitored_items) for one in service.subscriptions.values())


@pytest.mark.parametrize("poll", [False, True], ids=["monitored", "polled"])
async def test_elements_beside_scalars(odd: OddServer, link: Session, poll: bool) -> None:
    await odd.nodes["Array"].write_value([float(k) for k in range(20)])
    items = [Item("d", odd.text("Double"), 0), *elements(odd.text("Array"), 3, 19, 0, 20, first=1),
             Item("f", odd.text("Float"), 5)]
    seen = Seen(6)
    one = subscribe(link, seen, items, poll=poll)
    await link.attach(one)
    await seen.until(0.0, 3.0, 19.0, 0.0, np.nan, 0.0)  # there is no element 20
    if not poll:
        assert monitored(odd) == 3
        assert all(item.revised_queue >= 10 for item in items)
    await odd.nodes["Array"].write_value([10.0 * k for k in range(21)])
    await odd.nodes["Float"].write_value(ua.Variant(4.0, ua.VariantType.Float))
    await seen.until(0.0, 30.0, 190.0, 0.0, 200.0, 4.0)
    assert len(set(seen.stamp[1:5].tolist())) == 1  # one answer, one stamp
    assert {item.name: item.reason for item in items} == dict.fromkeys(["d", "e3", "e19", "e0", "e20", "f"], "")
    assert {item.polled for item in items} == {"as configured" if poll else ""}
    await odd.nodes["Array"].write_value(ua.DataValue(None, ua.StatusCode(ua.StatusCodes.BadSensorFailure)))
    await seen.until(0.0, np.nan, np.nan, np.nan, np.nan, 4.0)
    assert (seen.status[1:5] == ua.StatusCodes.BadSensorFailure).all() and (seen.status[[0, 5]] == 0).all()
    link.detach(one)


@pytest.mark.parametrize("poll", [False, True], ids=["monitored", "polled"])
async def test_elements_come_back_after_a_cut_and_after_their_node_was_away(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch, poll: bool
) -> None:
    monkeypatch.setattr(subscription, "_RETRY_FIRST_S", 0.1)
    seen = Seen(2)
    items = elements("nsu=urn:odd;s=Late", 1, 0)
    one = subscribe(link, seen, items, poll=poll)
    await link.attach(one)
    if not poll:
        assert [item.reason for item in items] == ["BadNodeIdUnknown"] * 2
    index = await odd.server.get_namespace_index(odd.uri)

    async def add(values: list[int]) -> Any:
        return await odd.server.nodes.objects.add_variable(
            ua.NodeId("Late", index), f"{index}:Late", values, ua.VariantType.Int32
        )

    node = await add([5, 6, 7])
    await seen.until(6.0, 5.0)
    link.fail("cut by the test")
    seen.count[:] = 0
    await seen.until(6.0, 5.0)
    assert seen.losses == 1
    await odd.server.delete_nodes([node])
    if poll:
        async with asyncio.timeout(WAIT_S):
            while not all(item.reason for item in items):
                await asyncio.sleep(0.02)
        assert (seen.status == ua.StatusCodes.BadNodeIdUnknown).all()
    await add([8, 9])
    if poll:  # a deleted node ends its monitored items at this server without a word
        await seen.until(9.0, 8.0)
        async with asyncio.timeout(WAIT_S):
            while any(item.reason for item in items):
                await asyncio.sleep(0.02)
    link.detach(one)


async def test_two_arrays_and_types_other_than_double(odd: OddServer, link: Session) -> None:
    index = await odd.server.get_namespace_index(odd.uri)
    for name, values, kind in (("Bits", [True, False, True], ua.VariantType.Boolean),
                               ("Words", [1, 65535], ua.VariantType.UInt16),
                               ("Table", [[1.0, 2.0], [3.0, 4.0]], ua.VariantType.Float)):
        await odd.server.nodes.objects.add_variable(ua.NodeId(name, index), f"{index}:{name}", values, kind)
    items = [*elements(odd.text("Bits"), 0, 1), *elements(odd.text("Words"), 1, first=2),
             *elements(odd.text("Table"), 2, 1, 0, first=3)]
    seen = Seen(6)
    one = subscribe(link, seen, items, poll=False)
    await link.attach(one)
    await seen.until(1.0, 0.0, 65535.0, 3.0, 2.0, 1.0)
    assert monitored(odd) == 3
    link.detach(one)


async def test_an_array_that_becomes_a_scalar_is_masked(odd: OddServer, link: Session) -> None:
    seen = Seen(2)
    one = subscribe(link, seen, elements(odd.text("Array"), 0, 1), poll=False)
    await odd.nodes["Array"].write_value([1.0, 2.0])
    await link.attach(one)
    await seen.until(1.0, 2.0)
    await odd.nodes["Array"].write_value(ua.Variant(7.0, ua.VariantType.Double))
    await seen.until(np.nan, np.nan)
    link.detach(one)


@contextmanager
def second_vendor() -> Any:
    with node_server(columns=["x1"], period_ms=1000) as server:
        yield server


@pytest.mark.plant
@pytest.mark.parametrize("poll", [False, True], ids=["monitored", "polled"])
async def test_elements_on_the_second_vendor(poll: bool) -> None:
    with second_vendor() as server:
        session = Session(server_config(server.endpoint))
        await session.open()
        node = f"{RESULTS}Residuals"
        seen = Seen(4)
        items = [Item("score", f"{RESULTS}Score", 0), *elements(node, 2, 0, 3, first=1)]
        one = subscribe(session, seen, items, poll=poll)
        async with Client(server.endpoint) as other:
            index = await other.get_namespace_index("urn:opcua-detector:results")

            async def write(values: list[float]) -> None:
                value = ua.DataValue(ua.Variant(values, ua.VariantType.Double), SourceTimestamp=None)
                await other.get_node(f"ns={index};s=lorenz.Residuals").write_value(value)

            await write([1.0, 2.0, 3.0])
            await session.attach(one)
            await seen.until(-1.0, 3.0, 1.0, np.nan)
            await write([4.0, 5.0, 6.0, 7.0])
            await seen.until(-1.0, 6.0, 4.0, 7.0)
            stats = await asyncio.to_thread(lambda: server.do("stats"))
            assert stats["items"] == ([] if poll else [2])
            session.fail("cut by the test")
            seen.count[:] = 0
            await seen.until(-1.0, 6.0, 4.0, 7.0)
        await session.close()


# --- the fan ---


def message(values: dict[int, Any], *, republished: bool = False) -> bytes:
    change: Any = ua.DataChangeNotification()
    for handle, value in values.items():
        item: Any = ua.MonitoredItemNotification()
        item.ClientHandle, item.Value = handle, ua.DataValue(ua.Variant(value))
        change.MonitoredItems.append(item)
    answer: Any = ua.RepublishResponse() if republished else ua.PublishResponse()
    if republished:
        answer.NotificationMessage.NotificationData = [change]
    else:
        answer.Parameters.NotificationMessage.NotificationData = [change]
    return struct_to_binary(answer)


@pytest.mark.parametrize("republished", [False, True])
async def test_a_message_with_a_handle_of_nobody_and_one_that_was_brought_back(
    odd: OddServer, link: Session, republished: bool
) -> None:
    seen = Seen(4)
    items = [Item("s", odd.text("Double"), 0), *elements(odd.text("Array"), 1, 0, first=1),
             Item("t", odd.text("Float"), 3)]
    one = subscribe(link, seen, items, poll=False)
    raw = message({9: 1.0, 3: 5.0, 1: [7.0, 8.0], 2: 3.0, 0: 6.0}, republished=republished)
    opened = wire.open_republish(Buffer(raw), 1) if republished else wire.open_publish(Buffer(raw))
    one._published(wire.read_message(opened, None, one._intake.elements))
    assert seen.value.tolist() == [6.0, 8.0, 7.0, 5.0] and seen.count.tolist() == [1, 1, 1, 1]
    assert one.counters["unknown_handles"] == 2 and one.counters["samples"] == 4  # 2 rides on 1


def test_a_group_without_arrays_reads_an_answer_once() -> None:
    fan = Fan({2: ((5, -1),), 0: ((1, -1),)})
    assert fan.elements is wire.NO_ELEMENTS
    samples = wire.samples_of([(0, ua.DataValue(ua.Variant(3.0))), (2, ua.DataValue(ua.Variant(4.0)))])

    def never(elements: Any, room: Any) -> Any:
        raise AssertionError

    column, found, rows = fan.spread(samples, never)
    assert column.tolist() == [1, 5] and found is samples and rows.tolist() == [0, 1]
