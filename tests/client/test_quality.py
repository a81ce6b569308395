"""What odd samples and odd clocks do to the rows: masked, counted, told, and never a reconnect."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import numpy as np
import pytest
from asyncua import Client, ua

from opcua_detector.client import GroupFeed, Session, wire
from opcua_detector.client.clock import ClockWatch
from opcua_detector.client.feed import SourceClock
from opcua_detector.config import TagConfig
from sim_server.testing import running_plant

from .conftest import WAIT_S, OddServer, Rows, call, group_config, server_config

S = 10**9
HOUR = 3600 * S
T0 = 1_700_000_000 * S


# --- the clock of the source ---


class Source:
    """Feeds a SourceClock with notifications of all four tags, 100 ms apart on our clock."""

    def __init__(self) -> None:
        self.clock = SourceClock(4, S)
        self.now = 5 * S

    def send(self, *shift: int, late: int = 0, tags: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[bool, list[bool] | None]:
        """Send one sample of each tag; shift : of the source clock, one for all tags or one for each, ns."""
        self.now += S // 10
        shifts = np.array(shift if len(shift) > 1 else (shift or (0,)) * len(tags), np.int64)
        stamps = T0 + self.now - late + shifts
        jumped, use = self.clock.take(np.array(tags, np.int32), stamps, self.now)
        return jumped, None if use is None else use.tolist()


@pytest.mark.parametrize("by", [HOUR, -HOUR, 2 * S, -2 * S])
def test_a_clock_that_is_set_is_noticed_once(by: int) -> None:
    source = Source()
    assert not any(source.send()[0] for _ in range(20))
    assert [source.send(by)[0] for _ in range(20)] == [True] + [False] * 19
    assert [source.send()[0] for _ in range(20)] == [True] + [False] * 19  # and back


@pytest.mark.parametrize("tags", [(0, 1, 2, 3), (2,)])
def test_a_plant_that_begins_to_move_has_set_no_clock(tags: tuple[int, ...]) -> None:
    source = Source()
    source.send(late=HOUR)  # the values of a plant that has stood still for an hour
    source.now += 60 * S
    found = [source.send(tags=tags) for _ in range(5)]
    assert not any(jumped for jumped, _ in found) and found[-3:] == [(False, None)] * 3
    assert [source.send(HOUR)[0] for _ in range(3)] == [True, False, False]


def test_the_time_of_the_source_is_told_by_its_last_changes() -> None:
    source = Source()
    assert source.clock.now(source.now) is None
    source.send(late=5 * 10**6)
    assert source.clock.now(source.now) == T0 + source.now - 5 * 10**6
    source.send()
    source.send(late=10**7, tags=(2,))  # the least delay counts
    assert source.clock.now(source.now + 7) == T0 + source.now + 7
    for _ in range(300):  # of the last 10 s and the 10 s before, in which anything changed
        source.send(late=3 * 10**6)
    assert source.clock.now(source.now) == T0 + source.now - 3 * 10**6
    source.now += HOUR
    assert source.clock.now(source.now) == T0 + source.now - 3 * 10**6
    source.send(HOUR, tags=(1,))  # one tag that is wild is no clock
    assert source.clock.now(source.now) == T0 + source.now - 3 * 10**6
    source.send(-2 * HOUR)
    assert source.clock.now(source.now) == T0 + source.now - 2 * HOUR
    source.clock.forget()
    assert source.clock.now(source.now) is None


def test_a_small_step_is_left_to_the_rule_of_time() -> None:
    source = Source()
    assert not any(source.send()[0] for _ in range(5))
    assert not any(source.send(S // 2)[0] for _ in range(5))
    assert not any(source.send(-S // 2)[0] for _ in range(5))


def test_a_network_that_stalls_and_catches_up_is_no_clock() -> None:
    source = Source()
    assert not any(source.send()[0] for _ in range(5))
    for late in (S, 2 * S, 3 * S, S, 0):
        source.now += S if late > S else 0
        assert source.send(late=late) == (False, None)
    source.now += 60 * S  # silence
    assert source.send() == (False, None)


def test_one_tag_that_is_ahead_is_no_clock_and_its_samples_are_left_out() -> None:
    source = Source()
    for _ in range(5):
        source.send()
    for _ in range(10):
        assert source.send(0, 0, HOUR, 0) == (False, [True, True, False, True])
    assert source.send() == (False, None)


def test_few_samples_must_say_so_three_times() -> None:
    source = Source()
    source.send()
    assert source.send(HOUR, tags=(1,)) == (False, [False])
    assert source.send(tags=(2,)) == (False, None)
    assert [source.send(HOUR, tags=(k,))[0] for k in (0, 1, 2)] == [False, False, True]
    assert source.send(HOUR) == (False, None)


def test_values_set_long_ago_say_nothing_of_the_clock() -> None:
    source = Source()
    assert source.send(0, -HOUR, -24 * HOUR, 0) == (False, None)
    assert source.send() == (False, None)


@pytest.mark.parametrize("by_ms", [3_600_000.0, -3_600_000.0])
async def test_rows_go_on_when_the_servers_clock_jumps_an_hour(by_ms: float) -> None:
    jump = int(by_ms * 1e6)
    with running_plant("lorenz", history_rows=0) as plant:  # of its own: what it keeps is stamped an hour off
        async with Client(plant.endpoint) as other:
            one = Session(server_config(plant.endpoint))
            await one.open()
            rows = Rows()
            feed = GroupFeed(group_config("x1", "x3"), {"plant": one}, rows.take)
            await feed.start()
            await rows.more(30)
            await call(other, "SetQuirk", "*", "skew_ms", by_ms)
            await rows.until(lambda r: abs(r.rows[-1][0] - r.rows[0][0] - jump) < 60 * S)
            await rows.more(50)
            counts = feed.counters()
            assert counts["clock_jumps"] == 1 and counts["gaps"] == 1
            assert one.counters["lost"] == 0 and all(row[3].all() for row in rows.rows[-40:])
            await feed.stop()
            await one.close()


async def test_the_offset_of_the_servers_clock_is_kept_with_the_session(link: Session) -> None:
    watch = ClockWatch(link)
    assert np.isnan(link.clock_offset_s)
    await link.attach(watch)
    async with asyncio.timeout(WAIT_S):
        while watch.measured is None:
            await asyncio.sleep(0.01)
    assert link.clock_offset_s == watch.measured.offset_s and abs(link.clock_offset_s) < 5.0
    link.detach(watch)


# --- types ---


async def write_raw(odd: OddServer, name: str, value: object, kind: ua.VariantType) -> None:
    """Let a node of the server hold a value of another type, as after a download into a PLC."""
    assert odd.server.iserver is not None
    node = odd.nodes[name].nodeid
    stamped = ua.DataValue(ua.Variant(value, kind), SourceTimestamp=datetime.now(UTC))
    odd.server.iserver.aspace[node].attributes[ua.AttributeIds.Value].value = stamped  # else it refuses the type
    await odd.server.write_attribute_value(node, stamped)


async def two_tags(odd: OddServer, link: Session) -> tuple[Rows, GroupFeed]:
    """The rows of a Double "a" and a Float "b", from the first whole one on, and their feed."""
    rows = Rows()
    tags = (TagConfig(name="a", node=odd.text("Double"), kind="setpoint"),
            TagConfig(name="b", node=odd.text("Float"), kind="setpoint"))
    feed = GroupFeed(group_config(period="50 ms", tags=tags), {"plant": link}, rows.take)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and bool(r.rows[-1][3].all()))
    return rows, feed


async def test_a_number_that_becomes_text_is_masked_counted_and_back_with_the_next_number(
    odd: OddServer, link: Session
) -> None:
    rows = Rows()
    tags = (TagConfig(name="a", node=odd.text("Double"), kind="setpoint"),
            TagConfig(name="b", node=odd.text("Float"), kind="setpoint"),
            TagConfig(name="mode", node=odd.text("String"), kind="state"))
    feed = GroupFeed(group_config(period="50 ms", tags=tags), {"plant": link}, rows.take)
    await write_raw(odd, "String", "auto", ua.VariantType.String)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and bool(r.rows[-1][3].all()))
    await write_raw(odd, "Double", "broken", ua.VariantType.String)
    await rows.until(lambda r: r.rows[-1][3].tolist() == [0, 1, 1])
    assert feed.masked_tags() == {"a": "delivers text instead of numbers"} and np.isnan(rows.rows[-1][2][0])
    await write_raw(odd, "Double", "still", ua.VariantType.String)
    await write_raw(odd, "Float", 3.0, ua.VariantType.Float)
    await rows.until(lambda r: r.rows[-1][2][1] == 3.0)
    assert rows.rows[-1][3].tolist() == [0, 1, 1]
    await write_raw(odd, "Double", 7, ua.VariantType.Int32)  # a number again, if of another type
    await rows.until(lambda r: r.rows[-1][2][0] == 7.0 and bool(r.rows[-1][3].all()))
    counts = feed.counters()
    assert counts["type_changes"] == 2 and counts["not_numeric"] == 2 and not feed.masked_tags()
    assert link.counters["lost"] == 0
    await feed.stop()


async def test_what_is_no_number_at_all_is_masked(odd: OddServer, link: Session) -> None:
    rows, feed = await two_tags(odd, link)
    for value, kind in ((b"12", ua.VariantType.ByteString), ([1.0, 2.0], ua.VariantType.Double),
                        (float("inf"), ua.VariantType.Double)):
        await write_raw(odd, "Double", value, kind)
        await rows.until(lambda r: r.rows[-1][3].tolist() == [0, 1])
        await write_raw(odd, "Double", 1.5, ua.VariantType.Double)
        await rows.until(lambda r: r.rows[-1][2][0] == 1.5 and bool(r.rows[-1][3].all()))
    assert feed.counters()["non_finite"] >= 3 and link.counters["lost"] == 0
    await feed.stop()


# --- a node that goes and comes ---


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # of the server's own
async def test_a_node_that_is_gone_is_told_and_monitored_anew_when_it_is_back(
    odd: OddServer, link: Session
) -> None:
    rows, feed = await two_tags(odd, link)
    node = odd.nodes["Double"]
    gone = ua.DataValue(None, ua.StatusCode(ua.StatusCodes.BadNodeIdUnknown))
    await odd.server.write_attribute_value(node.nodeid, gone)
    await odd.server.delete_nodes([node])
    await rows.until(lambda r: r.rows[-1][3].tolist() == [0, 1])
    assert feed.tag_states() == {"a": "BadNodeIdUnknown", "b": ""}
    back = await odd.server.nodes.objects.add_variable(node.nodeid, "back", 4.0, ua.VariantType.Double)
    async with asyncio.timeout(WAIT_S):
        while feed.tag_states()["a"]:
            await asyncio.sleep(0.05)
    await back.write_value(5.0)
    await rows.until(lambda r: r.rows[-1][2][0] == 5.0 and bool(r.rows[-1][3].all()))
    assert feed.tag_states() == {"a": "", "b": ""} and link.counters["lost"] == 0
    await feed.stop()


# --- what a server should not do ---


async def test_samples_of_items_that_are_none_of_ours_are_left_out_and_counted(odd: OddServer, link: Session) -> None:
    rows, feed = await two_tags(odd, link)
    (one,) = feed.subscriptions.values()
    stamp = datetime.now(UTC)
    wild = [(handle, ua.DataValue(ua.Variant(9.0, ua.VariantType.Double), SourceTimestamp=stamp))
            for handle in (7, 2**32 - 1, 1, 2**31)]
    one._published(wire.Publish(1, 2, 0, False, wire.samples_of(wild), None))
    await rows.until(lambda r: r.rows[-1][2].tolist() == [0.0, 9.0])
    assert feed.counters()["unknown_handles"] == 3 and link.counters["lost"] == 0
    await feed.stop()
