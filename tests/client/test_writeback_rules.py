"""Bounds on what is written: allow-list, dry run, rate limits, reading back; pure, and on a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.server.internal_session import InternalSession
from asyncua.ua import ua_binary
from hypothesis import given
from hypothesis import strategies as st

from opcua_detector.client import Session, WriteBack
from opcua_detector.client.casts import _RANGES, CastError, cast, same
from opcua_detector.client.write_rules import Budget, Pace, WriteRules
from opcua_detector.nodes import EVENTS_AWAY, NO_SCORE

from .conftest import WAIT_S, OddServer, server_config


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def eventually(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition, plain or awaitable."""

    async def wait() -> None:
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)

    try:
        await asyncio.wait_for(wait(), WAIT_S)
    except TimeoutError:
        raise AssertionError(f"in vain: {what}") from None


# --- pure ---


@pytest.mark.parametrize(("allow", "node", "may"), [
    ((), "nsu=urn:p;s=a.Score", True),
    (("nsu=urn:p;s=a.*",), "nsu=urn:p;s=a.Score", True),
    (("nsu=urn:p;s=a.*",), "nsu=urn:p;s=ab.Score", False),
    (("nsu=urn:p;s=a.Score",), "nsu=urn:p;s=a.Score", True),
    (("nsu=urn:p;s=a.Score",), "nsu=urn:p;s=a.ScoreX", False),
    (("nsu=urn:p;s=a.*", "nsu=urn:q;i=7"), "nsu=urn:q;i=7", True),
    (("nsu=urn:p;s=a.*",), "i=2258", False),
])
def test_only_what_is_allowed_may_be_written(allow: tuple[str, ...], node: str, may: bool) -> None:
    assert WriteRules(allow=allow).allows(node) is may


def test_a_budget_gives_so_many_values_a_second_and_takes_back_what_went_beyond() -> None:
    clock = Clock()
    budget = Budget(10.0, clock)
    sent = 0
    for _ in range(1000):  # 10 s in steps of 10 ms, 4 values asked for in each
        sent += 4 * budget.take(4)
        clock.now += 0.01
    assert 100 <= sent <= 100 + 10 + 4
    assert Budget(0.0, clock).take(10**9)
    empty = Budget(2.0, clock)
    assert empty.take(6) and not empty.take(1)
    clock.now += empty.wait_s()
    assert empty.take(1)


def test_a_monitor_is_written_at_most_so_often_and_others_do_not_wait_for_it() -> None:
    clock = Clock()
    pace = Pace(1.0, Budget(0.0, clock), clock)
    assert pace.may("a", 5) and not pace.may("a", 5) and pace.may("b", 5)
    assert pace.waiting == {"a"} and pace.wait_s({"a"}) == pytest.approx(1.0)
    clock.now += 1.0
    assert pace.may("a", 5) and pace.waiting == set()


@given(st.sampled_from(sorted(_RANGES)), st.integers(-(2**65), 2**65))
def test_every_width_takes_its_range_and_nothing_beyond(kind: str, value: int) -> None:
    low, high = _RANGES[kind]
    if low <= value <= high:
        got = cast("EventNo", value, kind, False)
        assert got == value and type(got) is int
        packed = ua_binary.pack_uatype(ua.VariantType[kind], got)
        assert ua_binary.unpack_uatype(ua.VariantType[kind], Buffer(packed)) == value
    else:
        with pytest.raises(CastError):
            cast("EventNo", value, kind, False)
    assert cast("Heartbeat", value, kind, False) == value % (high + 1)


@pytest.mark.parametrize(("value", "kind", "expected"), [
    (math.inf, "Int16", 32767), (1e300, "Byte", 255), (1e39, "Float", 3.4028234663852886e38),
    (math.inf, "Float", math.inf),
    (math.nan, "Float", NO_SCORE), (40_000.4, "Int16", 32767), (np.float32(2.6), "SByte", 3),
])
def test_a_score_beyond_its_type_is_the_end_of_the_type_and_never_the_value_before(
    value: float, kind: str, expected: float,
) -> None:
    assert cast("Score", value, kind, False) == cast("SlowScore", value, kind, False) == expected


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "Byte"), (math.nan, "UInt32")])
def test_a_type_without_room_for_no_score_is_refused(value: float, kind: str) -> None:
    with pytest.raises(CastError):
        cast("Score", value, kind, False)


@pytest.mark.parametrize(("written", "read", "kind", "agree"), [
    (0.1, float(np.float32(0.1)), "Float", True), (0.1, float(np.float32(0.1)), "Double", False),
    (1, 1, "Int16", True), (1, 2, "Int16", False), ("a", "a", "String", True), ("", None, "String", True),
    ("a", "b", "String", False), (True, True, "Boolean", True), (True, False, "Boolean", False),
    ([1.0, 2.0], [1.0, 2.0], "Double", True), ([1.0, 2.0], [1.0], "Double", False), ([1.0], 1.0, "Double", False),
    (math.nan, math.nan, "Double", True), (1.0, None, "Double", False), (1.0, "1", "Double", False),
    (ua.LocalizedText("x"), ua.LocalizedText("x"), "LocalizedText", True),
    (ua.LocalizedText("x"), ua.LocalizedText("y"), "LocalizedText", False),
])
def test_a_node_holds_what_was_written_as_far_as_its_type_can(written: Any, read: Any, kind: str, agree: bool) -> None:
    assert same(written, read, kind) is agree


# --- on a server ---


async def writing(odd: OddServer, nodes: dict[str, str], **options: Any) -> tuple[Session, WriteBack]:
    """A write-back of monitor m: signal -> name of a node."""
    session = Session(server_config(odd.endpoint))
    await session.open()
    back = WriteBack(session, {("m", signal): odd.text(name) if "/" not in name else name
                               for signal, name in nodes.items()}, **options)
    await session.attach(back)
    return session, back


async def test_a_path_that_leads_outside_the_allow_list_is_refused_and_the_rest_is_written(odd: OddServer) -> None:
    index = odd.nodes["Outside"].nodeid.NamespaceIndex
    allow = (odd.text("Double"), odd.text("Fl") + "*")
    session, back = await writing(
        odd, {"Score": "Double", "RTrans": f"/Objects/{index}:Outside", "RBound": f"/Objects/{index}:Float"},
        rules=WriteRules(allow=allow))
    assert "outside the allow-list" in back.states()["m", "RTrans"] and back.counters["refused"] == 1
    back.offer("m", 1, {"Score": 2.0, "RTrans": 3.0, "RBound": 4.0})
    await eventually(lambda: _reads(odd, Double=2.0, Float=4.0), "the allowed ones")
    assert await odd.nodes["Outside"].read_value() == 7.0
    assert "RTrans (nsu=urn:odd;s=Outside is outside the allow-list)" in back.trouble("m")
    assert await back.stop({"m": {"Score": NO_SCORE, "RTrans": 1.0}})
    assert await odd.nodes["Outside"].read_value() == 7.0
    await session.close()


async def _reads(odd: OddServer, **expected: Any) -> bool:
    return {name: await odd.nodes[name].read_value() for name in expected} == expected


async def test_a_dry_run_casts_and_shows_and_writes_nothing(odd: OddServer) -> None:
    session, back = await writing(odd, {"Score": "Float", "State": "Int16", "Limit": "ReadOnly", "StateText": "String",
                                        "Residuals": "Array", "Heartbeat": "UInt32", "EventNo": "Byte"},
                                  rules=WriteRules(dry_run=True))
    back.offer("m", 1, {"Score": math.nan, "State": 3, "Limit": 1.0, "Residuals": [1, 2], "EventNo": 256},
               {"StateText": "alert"})
    shown = back.preview()
    assert shown["m", "Heartbeat"] >= 1 and back.counters["dry"] >= 5
    assert {signal: value for (_, signal), value in shown.items() if signal != "Heartbeat"} == {
        "Score": NO_SCORE, "State": 3, "StateText": "alert", "Residuals": [1.0, 2.0]}
    assert "may not write" in back.states()["m", "Limit"] and "does not fit Byte" in back.states()["m", "EventNo"]
    await asyncio.sleep(1.2)  # heartbeats too
    assert not await back.stop({"m": {"State": 0}})
    assert back.counters["values"] == back.counters["requests"] == 0
    assert await _reads(odd, Float=0.0, Int16=0, String="", UInt32=0, Array=[0.0, 0.0])
    await session.close()


async def test_a_node_is_not_written_more_often_than_allowed_and_the_newest_value_is_what_comes(odd: OddServer) -> None:
    changes: list[float] = []

    class Handler:
        def datachange_notification(self, node: Any, value: float, data: Any) -> None:
            changes.append(value)

    subscription = await odd.server.create_subscription(1, Handler())
    await subscription.subscribe_data_change(odd.nodes["Double"])
    session, back = await writing(odd, {"Score": "Double", "StateText": "String"}, rules=WriteRules(node_every_s=0.3))
    loop = asyncio.get_running_loop()
    began = loop.time()
    for k in range(1, 101):
        back.offer("m", k, {"Score": float(k)}, {"StateText": f"text {k}"})
        await asyncio.sleep(0.01)
    await eventually(lambda: _reads(odd, Double=100.0, String="text 100"), "the newest values")
    requests = back.counters["requests"]
    assert requests <= 2 * ((loop.time() - began) / 0.3 + 2) and len(changes) <= requests
    assert back.counters["limited"] >= 2 and back.counters["superseded"] > 50
    await back.stop()
    await subscription.delete()
    await session.close()


async def test_the_values_a_second_are_bounded_and_texts_get_their_share(odd: OddServer) -> None:
    session, back = await writing(odd, {"Score": "Double", "RTrans": "Float", "StateText": "String"},
                                  rules=WriteRules(values_per_s=20.0))
    loop = asyncio.get_running_loop()
    began = loop.time()
    k = 0
    while loop.time() - began < 2.0:
        k += 1
        back.offer("m", k, {"Score": float(k), "RTrans": 0.5}, {"StateText": f"text {k}"})
        await asyncio.sleep(0.005)
    took = loop.time() - began
    assert back.counters["values"] <= 20.0 * took + 20.0 + 10  # a second's worth at once, and one row beyond of each
    await eventually(lambda: _reads(odd, Double=float(k), String=f"text {k}"), "the newest values")
    await back.stop()
    await session.close()


async def test_what_is_read_back_differently_is_counted_and_shown_until_it_agrees(odd: OddServer) -> None:
    session, back = await writing(odd, {"Score": "Float", "StateText": "String", "Residuals": "Array"},
                                  rules=WriteRules(read_back_s=0.05))
    back.offer("m", 1, {"Score": 0.1, "Residuals": [0.5, 0.25]}, {"StateText": "normal"})
    await eventually(lambda: back.counters["read_back"] >= 3, "a first reading")
    assert back.counters["mismatches"] == 0 and back.mismatches() == {} and back.trouble("m") == ""
    stubborn = odd.server.iserver.aspace
    # A node whose logic clamps what is written, as a PLC block may.
    original = stubborn.write_attribute_value

    async def clamps(nodeid: Any, attr: Any, value: Any) -> Any:
        if nodeid == odd.nodes["Float"].nodeid:
            value = ua.DataValue(ua.Variant(0.75, ua.VariantType.Float))
        return await original(nodeid, attr, value)

    stubborn.write_attribute_value = clamps
    k = 1

    def offered(condition: Callable[[], bool]) -> Callable[[], bool]:
        def once() -> bool:
            nonlocal k
            k += 1
            back.offer("m", k, {"Score": 3.5})
            return condition()

        return once

    await eventually(offered(lambda: bool(back.mismatches())), "the mismatch")
    assert back.mismatches() == {("m", "Score"): "reads 0.75, written 3.5"}
    assert "Score (reads 0.75, written 3.5)" in back.trouble("m") and back.counters["mismatches"] >= 1
    stubborn.write_attribute_value = original
    await eventually(offered(lambda: not back.mismatches()), "agreement again")
    await back.stop()
    await session.close()


async def test_a_reading_back_that_fails_is_counted_told_once_and_stops_no_write(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    original = InternalSession.read
    refusing = False

    async def refuses(self: Any, params: Any) -> Any:
        if refusing and params.TimestampsToReturn == ua.TimestampsToReturn.Neither:
            raise ua.UaStatusCodeError(ua.StatusCodes.BadUserAccessDenied)
        return await original(self, params)

    monkeypatch.setattr(InternalSession, "read", refuses)
    session, back = await writing(odd, {"Score": "Double"}, rules=WriteRules(read_back_s=0.02))
    k = 0

    def offered(condition: Callable[[], bool]) -> Callable[[], bool]:
        def once() -> bool:
            nonlocal k
            k += 1
            back.offer("m", k, {"Score": float(k)})
            return condition()

        return once

    await eventually(offered(lambda: back.counters["read_back"] >= 2), "what is read back")
    assert back.counters["read_back_failed"] == 0
    refusing = True
    await eventually(offered(lambda: back.counters["read_back_failed"] >= 3), "failed readings")
    compared = back.counters["read_back"]
    await eventually(offered(lambda: back.counters["read_back_failed"] >= 5), "more of them")
    assert back.counters["read_back"] == compared and session.state == "connected"
    refusing = False
    await eventually(offered(lambda: back.counters["read_back"] >= compared + 2), "what is read back again")
    last = k
    await eventually(lambda: _reads(odd, Double=float(last)), "the newest value")
    told = [one.getMessage() for one in caplog.records if "read back" in one.getMessage()]
    assert len(told) == 2 and "cannot be read back" in told[0] and "again" in told[1]
    assert back.counters["mismatches"] == 0 and back.counters["failed_items"] == 0
    await back.stop()
    await session.close()


async def test_a_node_that_is_there_on_some_servers_only_is_no_trouble(
    odd: OddServer, caplog: pytest.LogCaptureFixture,
) -> None:
    session, back = await writing(odd, {"Score": "Double"},
                                  optional={("m", EVENTS_AWAY): "nsu=urn:odd;s=nobody.EventsAway"})
    assert back.states() == {("m", "Score"): ""} and back.trouble("m") == ""
    back.tell("m", {EVENTS_AWAY: "1 alert"})
    back.offer("m", 1, {"Score": 1.5})
    await eventually(lambda: _reads(odd, Double=1.5), "the score")
    assert not [one for one in caplog.records if "EventsAway" in one.getMessage()]
    await back.stop()
    await session.close()


async def test_texts_that_did_not_change_are_written_again_once_their_node_can_be_written(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opcua_detector.client.writeback.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("opcua_detector.client.write_outputs.RETRY_FIRST_S", 0.1)
    session, back = await writing(odd, {"StateText": "String", "Score": "Double"})
    await odd.nodes["String"].set_read_only()
    back.offer("m", 1, {"Score": 1.0}, {"StateText": "normal"})
    await eventually(lambda: back.states()["m", "StateText"], "the refusal")
    await odd.nodes["String"].set_writable()
    await eventually(lambda: _reads(odd, String="normal"), "the text, which nobody offered again")
    await back.stop()
    await session.close()


async def test_a_write_that_is_too_large_for_the_server_is_split_and_nothing_is_left_out(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = InternalSession.write
    sizes: list[int] = []

    async def at_most_two(self: Any, params: Any) -> Any:
        sizes.append(len(params.NodesToWrite))
        if sizes[-1] > 2:
            raise ua.UaStatusCodeError(ua.StatusCodes.BadTooManyOperations)
        return await original(self, params)

    monkeypatch.setattr(InternalSession, "write", at_most_two)
    acks: list[int] = []
    nodes = {"Score": "Double", "RTrans": "Float", "State": "Int16", "EventNo": "Byte", "LostSamples": "UInt32",
             "IsAnomaly": "Boolean", "Limit": "ReadOnly"}
    session, back = await writing(odd, nodes, on_ack=lambda monitor, source_ns, ack_ns: acks.append(source_ns))
    back.offer("m", 5, {"Score": 1.5, "RTrans": 0.5, "State": 3, "EventNo": 7, "LostSamples": 9, "IsAnomaly": True})
    await eventually(lambda: acks == [5], "the acknowledgement, one for all parts")
    assert await _reads(odd, Double=1.5, Float=0.5, Int16=3, Byte=7, UInt32=9, Boolean=True)
    assert sizes[0] == 6 and max(sizes[3:]) <= 2 and back.counters["failed_items"] == 0
    sizes.clear()
    back.offer("m", 6, {"Score": 2.5, "RTrans": 0.25, "State": 4})
    await eventually(lambda: 6 in acks, "the next row")
    assert max(sizes) <= 2  # what was learnt holds
    assert await back.stop({"m": {"Score": NO_SCORE, "State": 0, "EventNo": 8}})
    assert await _reads(odd, Double=NO_SCORE, Int16=0, Byte=8)
    await session.close()
