"""Write-back: Value only, cast, newest wins, only configured nodes; an item that fails stops no other."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from asyncua import Client, ua
from asyncua.server.internal_session import InternalSession

from opcua_detector.client import Session, WriteBack, write_outputs, writeback
from opcua_detector.client import session as session_module
from opcua_detector.client.casts import CastError, cast
from opcua_detector.client.write_outputs import GATHER_S
from opcua_detector.nodes import NO_SCORE, SIGNALS, State
from sim_server.testing import RunningPlant, running_plant

from .conftest import RESULTS, WAIT_S, OddServer, server_config, watch

T0 = 1_700_000_000_123_456_000


def all_nodes(*signals: str) -> dict[tuple[str, str], str]:
    return {("m", signal): RESULTS + signal for signal in (signals or tuple(SIGNALS))}


class Acks:
    """Collects acknowledgements and lets a test wait for one."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int, int]] = []
        self._event = asyncio.Event()

    def __call__(self, monitor: str, source_ns: int, ack_ns: int) -> None:
        self.got.append((monitor, source_ns, ack_ns))
        self._event.set()

    async def of(self, source_ns: int) -> None:
        async def wait() -> None:
            while not any(one[1] == source_ns for one in self.got):
                self._event.clear()
                await self._event.wait()

        await asyncio.wait_for(wait(), WAIT_S)


FULL: dict[str, Any] = {
    "Score": 1.25,
    "Limit": 1.0,
    "IsAnomaly": True,
    "Severity": 500,
    "State": State.ALERT,
    "StateText": "alert",
    "Quality": "Good",
    "EventNo": 3,
    "RTrans": 0.5,
    "RBound": 0.25,
    "RConf": 0.125,
    "LastUpdate": T0,
    "LatencyMs": 12.5,
    "LostSamples": 4,
    "SupersededWrites": 5,
}
SLOW: dict[str, Any] = {
    "ExplanationText": "x1 is 31",
    "Top1Tag": "x1",
    "Top1Contribution": 0.75,
    "Top1Cause": "high",
    "ModelId": "abc",
    "Residuals": np.array([0.5, 0.25]),
    "Contributions": [0.75, 0.25],
    "LastUpdateText": "2023-11-14T22:13:20Z",
}


async def read(client: Client, name: str) -> ua.DataValue:
    index = await client.get_namespace_index("urn:opcua-detector:results")
    return await client.get_node(f"ns={index};s=lorenz.{name}").read_data_value()


async def test_the_plant_refuses_timestamps_and_a_second_client_reads_what_was_written(
    session: Session,
    other: Client,
) -> None:
    index = await other.get_namespace_index("urn:opcua-detector:results")
    with pytest.raises(ua.uaerrors.BadWriteNotSupported):  # what asyncua's own helper does
        await other.get_node(f"ns={index};s=lorenz.Score").write_value(
            ua.DataValue(ua.Variant(1.0, ua.VariantType.Double), SourceTimestamp=ua.uatypes.get_win_epoch())
        )
    acks = Acks()
    back = WriteBack(session, all_nodes(), on_ack=acks)
    await session.attach(back)
    assert set(back.states().values()) == {""}
    seen = await watch(other, "ExplanationText", "Contributions")
    back.offer("m", T0, FULL, SLOW)
    await acks.of(T0)
    await seen.until(lambda name, value: value == "x1 is 31")
    await seen.until(lambda name, value: value == [0.75, 0.25])
    for name, value in {**FULL, **SLOW}.items():
        got = (await read(other, name)).Value
        if name == "LastUpdate":
            assert int(got.Value.timestamp() * 1e6) == T0 // 1000
        else:
            assert got.Value == (list(value) if isinstance(value, np.ndarray) else value), name
        assert got.VariantType.name == SIGNALS[name].type
        assert bool(got.is_array) == SIGNALS[name].array
    assert acks.got[0][0] == "m" and acks.got[0][2] > T0
    assert back.counters["failed_items"] == back.counters["cast_errors"] == 0
    assert await back.stop({"m": {"Score": math.nan, "State": State.STOPPED, "StateText": "stopped"}})
    assert (await read(other, "State")).Value.Value == State.STOPPED
    assert (await read(other, "StateText")).Value.Value == "stopped"
    assert (await read(other, "Score")).Value.Value == NO_SCORE


async def test_only_configured_nodes_are_written(session: Session, other: Client) -> None:
    before = {name: await read(other, name) for name in SIGNALS}
    acks = Acks()
    back = WriteBack(session, all_nodes("Score", "Heartbeat"), on_ack=acks)
    await session.attach(back)
    back.offer("m", T0 + 1, FULL | {"Score": 3.5}, SLOW)
    back.offer("unknown monitor", T0 + 2, FULL, SLOW)
    await acks.of(T0 + 1)
    await back.stop({"m": {"State": State.FAULT, "Score": 3.25}})
    after = {name: await read(other, name) for name in SIGNALS}
    changed = {name for name in SIGNALS if before[name].Value != after[name].Value}
    assert {"Score"} <= changed <= {"Score", "Heartbeat"}
    assert after["Score"].Value.Value == 3.25


async def test_the_newest_result_wins_and_superseded_ones_are_counted(
    session: Session, other: Client
) -> None:
    acks = Acks()
    back = WriteBack(session, all_nodes("Score"), on_ack=acks)
    await session.attach(back)
    seen = await watch(other, "Score")
    for k in range(6):  # no await in between: the first goes out, the last one waits, four are superseded
        back.offer("m", T0 + k, {"Score": 10.0 + k})
    await acks.of(T0 + 5)
    assert [one[1] for one in acks.got] == [T0, T0 + 5]
    assert back.counters["superseded"] == back.superseded["m"] == 4
    await seen.until(lambda name, value: value == 15.0)
    await back.stop()


async def test_an_offer_without_a_row_is_written_but_not_acknowledged(session: Session, other: Client) -> None:
    acks = Acks()
    back = WriteBack(session, all_nodes("Score", "StateText"), on_ack=acks)
    await session.attach(back)
    back.offer("m", 0, {"StateText": "no data"})
    back.offer("m", T0 + 9, {"Score": 21.0})  # waits for the first: its acknowledgement is the later one
    await acks.of(T0 + 9)
    assert [one[1] for one in acks.got] == [T0 + 9]
    assert (await read(other, "StateText")).Value.Value == "no data"
    await back.stop()


async def test_the_heartbeat_counts_on_without_rows(session: Session, other: Client) -> None:
    back = WriteBack(session, all_nodes("Heartbeat"))
    await session.attach(back)
    seen = await watch(other, "Heartbeat")
    _, first, _ = await seen.until(lambda name, value: True)
    _, second, one = await seen.until(lambda name, value: value > first)
    _, third, two = await seen.until(lambda name, value: value > second)
    assert (two.ServerTimestamp - one.ServerTimestamp).total_seconds() < 5
    assert third > second > first
    await back.stop()


async def test_values_are_cast_to_the_nodes_type_and_a_failing_one_is_told(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Any] = []
    original = InternalSession.write

    async def listens(self: Any, params: Any) -> Any:
        arrived.extend((item.Value.SourceTimestamp, item.Value.ServerTimestamp) for item in params.NodesToWrite)
        return await original(self, params)

    monkeypatch.setattr(InternalSession, "write", listens)
    one = Session(server_config(odd.endpoint))
    await one.open()
    acks = Acks()
    back = WriteBack(
        one,
        {
            ("m", "Score"): odd.text("Float"),
            ("m", "State"): odd.text("Int16"),
            ("m", "IsAnomaly"): odd.text("Byte"),
            ("m", "StateText"): odd.text("Text"),
            ("m", "Limit"): odd.text("ReadOnly"),
            ("m", "Quality"): odd.text("None"),
            ("m", "Residuals"): odd.text("Array"),
            ("m", "LatencyMs"): odd.text("String"),
            ("m", "LostSamples"): odd.text("UInt32"),
        },
        on_ack=acks,
    )
    await one.attach(back)
    states = back.states()
    assert "may not write" in states["m", "Limit"] and "no such variable" in states["m", "Quality"]
    assert "String, LatencyMs is Double" in states["m", "LatencyMs"]
    back.offer(
        "m",
        1,
        {
            "Score": 0.1,
            "State": 3,
            "IsAnomaly": True,
            "StateText": "alert",
            "Limit": 1.0,
            "Quality": "x",
            "Residuals": (1, 2, 3),
            "LatencyMs": 1.0,
            "LostSamples": 2**33,
        },
    )
    await acks.of(1)
    assert arrived == [(None, None)] * 5  # that there is no status either: test_write_requests
    read_odd = {name: (await odd.nodes[name].read_data_value()) for name in odd.nodes}
    assert read_odd["Float"].Value == ua.Variant(float(np.float32(0.1)), ua.VariantType.Float)
    assert read_odd["Int16"].Value == ua.Variant(3, ua.VariantType.Int16)
    assert read_odd["Byte"].Value == ua.Variant(1, ua.VariantType.Byte)
    assert read_odd["Text"].Value.Value.Text == "alert"
    assert read_odd["Array"].Value.Value == [1.0, 2.0, 3.0]
    assert read_odd["ReadOnly"].Value.Value == 0.0 and read_odd["Outside"].Value.Value == 7.0
    assert read_odd["UInt32"].Value.Value == 0 and "does not fit" in back.states()["m", "LostSamples"]
    assert back.counters["cast_errors"] == 1
    await back.stop()
    await one.close()


async def test_an_item_refused_at_run_time_is_reported_and_taken_up_again(
    odd: OddServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writeback, "HEARTBEAT_S", 0.05)
    one = Session(server_config(odd.endpoint))
    await one.open()
    acks = Acks()
    back = WriteBack(
        one, {("m", "Score"): odd.text("Double"), ("m", "RTrans"): odd.text("Float")}, on_ack=acks
    )
    await one.attach(back)
    await odd.nodes["Double"].set_read_only()
    back.offer("m", 1, {"Score": 1.0, "RTrans": 0.5})
    await acks.of(1)
    assert back.states() == {("m", "Score"): "BadNotWritable", ("m", "RTrans"): ""} or (
        "Bad" in back.states()["m", "Score"] and back.states()["m", "RTrans"] == ""
    )
    assert (await odd.nodes["Float"].read_value()) == 0.5
    await odd.nodes["Double"].set_writable()

    async def again() -> None:
        k = 2
        while await odd.nodes["Double"].read_value() != 2.0:
            back.offer("m", k, {"Score": 2.0, "RTrans": 0.5})
            await acks.of(k)
            k += 1

    await asyncio.wait_for(again(), WAIT_S)
    assert back.states()["m", "Score"] == "" and back.counters["failed_items"] >= 1
    await back.stop()
    told = [r.message for r in caplog.records if "m.Score" in r.message]
    assert len(told) == 2 and "not written" in told[0] and "written again" in told[1]
    await one.close()


async def test_rights_that_are_withdrawn_from_many_outputs_are_one_line_and_one_when_they_come_back(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writeback, "HEARTBEAT_S", 0.05)
    one = Session(server_config(odd.endpoint))
    await one.open()
    acks = Acks()
    signals = {"Score": "Double", "RTrans": "Float", "State": "Int16", "EventNo": "UInt32", "IsAnomaly": "Boolean"}
    back = WriteBack(one, {("m", signal): odd.text(name) for signal, name in signals.items()}
                     | {("m", "StateText"): odd.text("String")}, on_ack=acks)
    await one.attach(back)
    fast, slow = {"Score": 1.0, "RTrans": 0.5, "State": 3, "EventNo": 1, "IsAnomaly": True}, {"StateText": "alert"}
    back.offer("m", 1, fast, slow)
    await acks.of(1)
    for name in (*signals.values(), "String"):
        await odd.nodes[name].set_read_only()
    k = 1

    async def until(wanted: str, count: int) -> list[str]:
        nonlocal k
        async with asyncio.timeout(WAIT_S):
            while True:
                k += 1
                back.offer("m", k, fast, slow)
                await asyncio.sleep(0.02)
                told = [r.message for r in caplog.records if wanted in r.message]
                if len(told) >= count and (wanted != "written again" or not any(back.states().values())):
                    return told

    failing = await until("not written:", 1)
    assert failing[0].count("m.") == 3 and "6 outputs are" in failing[0] and "and 3 more" in failing[0]
    # Tried again and refused again, by what the server says of its nodes: no news.
    async with asyncio.timeout(WAIT_S):
        while not all("may not write" in reason for reason in back.states().values()):
            await asyncio.sleep(0.05)
    await asyncio.sleep(2 * GATHER_S)
    assert len([r for r in caplog.records if "not written:" in r.message]) == 1
    for name in (*signals.values(), "String"):
        await odd.nodes[name].set_writable()
    again = await until("written again", 1)
    await back.stop()
    again = [r.message for r in caplog.records if "written again" in r.message]
    assert len(again) <= 2 and "outputs are written again" in again[0]  # they come back as their retries fall due
    assert len([r for r in caplog.records if "not written:" in r.message]) == 1
    await one.close()


async def test_a_right_that_the_server_shows_and_does_not_give_is_told_once(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writeback, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(write_outputs, "RETRY_LAST_S", 0.05)
    original = InternalSession.write
    asked, mine = 0, [odd.nodes["Double"].nodeid, odd.nodes["Float"].nodeid]

    async def refuses(self: Any, params: Any) -> Any:
        nonlocal asked
        if params.NodesToWrite[0].NodeId not in mine:  # the server's own clock
            return await original(self, params)
        asked += 1
        return [ua.StatusCode(ua.StatusCodes.BadUserAccessDenied)] * len(params.NodesToWrite)

    one = Session(server_config(odd.endpoint))
    await one.open()
    back = WriteBack(one, {("m", "Score"): odd.text("Double"), ("m", "RTrans"): odd.text("Float")})
    await one.attach(back)
    monkeypatch.setattr(InternalSession, "write", refuses)
    k = 0
    async with asyncio.timeout(WAIT_S):
        while asked < 5:
            k += 1
            back.offer("m", k, {"Score": 1.0, "RTrans": 1.0})
            await asyncio.sleep(0.02)
    monkeypatch.setattr(InternalSession, "write", original)
    async with asyncio.timeout(WAIT_S):
        while any(back.states().values()) or await odd.nodes["Double"].read_value() != 2.0:
            k += 1
            back.offer("m", k, {"Score": 2.0, "RTrans": 2.0})
            await asyncio.sleep(0.02)
    await back.stop()
    told = [r.message for r in caplog.records if "m.Score" in r.message]
    assert len(told) == 2 and "2 outputs are not written" in told[0] and "2 outputs are written again" in told[1]
    assert back.counters["failed_items"] >= 8
    await one.close()


async def test_writing_goes_on_after_a_restart_with_the_newest_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LAST_DELAY_S", 0.5)
    with running_plant("lorenz", history_rows=0) as plant:
        assert isinstance(plant, RunningPlant)
        down = asyncio.Event()
        one = Session(
            server_config(plant.endpoint),
            on_state=lambda state, _: down.set() if state == "waiting" else None,
        )
        await one.open()
        acks = Acks()
        back = WriteBack(one, all_nodes("Score", "State"), on_ack=acks)
        await one.attach(back)
        back.offer("m", 1, {"Score": 1.0})
        await acks.of(1)
        plant.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)
        for k in range(2, 12):
            back.offer("m", k, {"Score": float(k)})
        await asyncio.to_thread(plant.restart)
        await acks.of(11)
        async with Client(plant.endpoint) as reader:
            assert (await read(reader, "Score")).Value.Value == 11.0
        assert back.counters["superseded"] >= 9
        await back.stop()
        await one.close()


async def test_stop_without_a_server_returns_within_the_timeout(odd: OddServer) -> None:
    one = Session(server_config(odd.endpoint))
    await one.open()
    back = WriteBack(one, {("m", "Score"): odd.text("Double")})
    await one.attach(back)
    one.fail("test")
    assert await asyncio.wait_for(back.stop({"m": {"Score": 1.0}}), WAIT_S) in (True, False)
    await one.close()


@pytest.mark.parametrize(
    ("signal", "value", "kind", "expected"),
    [
        ("Score", math.nan, "Double", NO_SCORE),
        ("Score", math.nan, "Int16", -1),
        ("Score", 1.6, "Int32", 2),
        ("RTrans", 0.5, "Float", 0.5),
        ("Heartbeat", 2**32 + 5, "UInt32", 5),
        ("Heartbeat", 300, "Byte", 44),
        ("State", np.int64(3), "Int16", 3),
        ("IsAnomaly", np.True_, "Boolean", True),
        ("IsAnomaly", True, "Byte", 1),
    ],
)
def test_casts(signal: str, value: Any, kind: str, expected: Any) -> None:
    got = cast(signal, value, kind, False)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("signal", "value", "kind"),
    [
        ("State", 40_000, "Int16"),
        ("LostSamples", -1, "UInt32"),
        ("RBound", math.inf, "Int32"),
        ("RBound", 1e39, "Float"),
        ("Score", 1.0, "Guid"),
        ("RBound", math.nan, "Byte"),
    ],
)
def test_values_that_do_not_fit_are_refused(signal: str, value: Any, kind: str) -> None:
    with pytest.raises(CastError):
        cast(signal, value, kind, False)
