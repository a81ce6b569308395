"""Prepared requests are, byte for byte, what asyncua would send, and real servers take them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua
from asyncua.ua.ua_binary import nodeid_to_binary, struct_to_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import Session, wire
from opcua_detector.client.wire_requests import (
    PreparedPublish,
    PreparedRead,
    PreparedRepublish,
    PreparedWrite,
    ReadFrom,
    WriteTo,
)
from sim_server.testing import RunningPlant

from .conftest import PASSWORD, USER, OddServer, server_config

SENT = datetime(2026, 3, 4, 5, 6, 7, 8, tzinfo=UTC)
TICKS = 116_444_736_000_000_000 + int((SENT - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) * 10
NODES = st.sampled_from(
    [
        ua.NodeId(7, 0, ua.NodeIdType.TwoByte), ua.NodeId(700, 2, ua.NodeIdType.FourByte), ua.NodeId(2**31, 300),
        ua.NodeId("läuft", 4), ua.NodeId(uuid.UUID(int=5), 1), ua.NodeId(b"opaque", 2, ua.NodeIdType.ByteString),
    ]
)
TOKENS = st.sampled_from([ua.NodeId(uuid.UUID(int=9), 1), ua.NodeId(1001, 0), ua.NodeId(b"token" * 6, 1)])
VALUES: dict[str, Any] = {
    "Boolean": st.booleans(),
    "SByte": st.integers(-128, 127),
    "Byte": st.integers(0, 255),
    "Int16": st.integers(-(2**15), 2**15 - 1),
    "UInt16": st.integers(0, 2**16 - 1),
    "Int32": st.integers(-(2**31), 2**31 - 1),
    "UInt32": st.integers(0, 2**32 - 1),
    "Int64": st.integers(-(2**63), 2**63 - 1),
    "UInt64": st.integers(0, 2**64 - 1),
    "Float": st.floats(width=32, allow_nan=False),
    "Double": st.floats(allow_nan=False),
    "String": st.one_of(st.none(), st.text(max_size=6)),
    "ByteString": st.one_of(st.none(), st.binary(max_size=6)),
    "DateTime": st.integers(0, 10**15).map(lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)),
    "LocalizedText": st.one_of(
        st.text(max_size=6).map(ua.LocalizedText), st.just(ua.LocalizedText("t", "de")), st.just(ua.LocalizedText())
    ),
}


def with_header(request: Any, token: ua.NodeId) -> bytes:
    header = request.RequestHeader
    header.AuthenticationToken, header.Timestamp, header.RequestHandle, header.TimeoutHint = token, SENT, 12, 4000
    return bytes(struct_to_binary(request))


@st.composite
def writes(draw: st.DrawFn) -> tuple[list[WriteTo], list[list[Any]]]:
    """Items, and values for them several times over."""
    items = [
        WriteTo(draw(NODES), draw(st.sampled_from(list(VALUES))), draw(st.integers(0, 3)) == 0)
        for _ in range(draw(st.integers(0, 5)))
    ]

    def value(item: WriteTo) -> Any:
        return draw(st.lists(VALUES[item.type], max_size=4) if item.array else VALUES[item.type])

    return items, [[value(item) for item in items] for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TOKENS, writes())
def test_a_write_is_encoded_as_asyncua_does(token: ua.NodeId, made: tuple[list[WriteTo], list[list[Any]]]) -> None:
    items, rounds = made
    prepared = PreparedWrite(bytes(nodeid_to_binary(token)), items)
    for values in rounds:
        request = ua.WriteRequest()
        for item, value in zip(items, values, strict=True):
            one = ua.WriteValue()
            one.NodeId, one.AttributeId = item.node, ua.AttributeIds.Value
            one.Value = ua.DataValue(ua.Variant(value, ua.VariantType[item.type], is_array=item.array), None)
            request.Parameters.NodesToWrite.append(one)
        prepared.set(values)
        assert bytes(prepared.body(12, TICKS, 4000)) == with_header(request, token)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    TOKENS,
    st.lists(st.builds(ReadFrom, NODES, st.sampled_from([13, 14, 1]), st.sampled_from([None, "2", "0:9"])), max_size=5),
    st.sampled_from(["source", "server", "both", "neither"]),
)
def test_a_read_is_encoded_as_asyncua_does(token: ua.NodeId, items: list[ReadFrom], times: str) -> None:
    prepared = PreparedRead(bytes(nodeid_to_binary(token)), items, times=times, max_age_ms=2.5)
    request = ua.ReadRequest()
    request.Parameters.MaxAge = 2.5
    request.Parameters.TimestampsToReturn = ua.TimestampsToReturn[times.title()]
    for item in items:
        one = ua.ReadValueId()
        one.NodeId, one.AttributeId, one.IndexRange = item.node, item.attribute, item.index_range
        request.Parameters.NodesToRead.append(one)
    for _ in range(2):
        assert bytes(prepared.body(12, TICKS, 4000)) == with_header(request, token)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TOKENS, st.lists(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), max_size=4), min_size=1, max_size=3))
def test_publish_and_republish_are_encoded_as_asyncua_does(
    token: ua.NodeId, rounds: list[list[tuple[int, int]]]
) -> None:
    publish = PreparedPublish(bytes(nodeid_to_binary(token)))
    republish = PreparedRepublish(bytes(nodeid_to_binary(token)))
    for acks in rounds:
        request = ua.PublishRequest()
        for subscription_id, number in acks:
            again = ua.RepublishRequest()
            again.Parameters.SubscriptionId, again.Parameters.RetransmitSequenceNumber = subscription_id, number
            republish.ask(subscription_id, number)
            assert bytes(republish.body(12, TICKS, 4000)) == with_header(again, token)
            one = ua.SubscriptionAcknowledgement()
            one.SubscriptionId, one.SequenceNumber = subscription_id, number
            request.Parameters.SubscriptionAcknowledgements.append(one)
        publish.acknowledge(acks)
        assert bytes(publish.body(12, TICKS, 4000)) == with_header(request, token)


def test_what_cannot_be_written_is_told() -> None:
    with pytest.raises(ValueError, match="type Guid cannot be written"):
        PreparedWrite(b"\0\0", [WriteTo(ua.NodeId(1, 0), "Guid")])
    prepared = PreparedWrite(b"\0\0", [WriteTo(ua.NodeId(1, 0), "Byte")])
    with pytest.raises(ValueError, match="1 values are needed, not 2"):
        prepared.set([1, 2])
    with pytest.raises(Exception, match="ubyte"):
        prepared.set([256])


# --- real servers ---


async def exchange(session: Session, request: wire.Prepared) -> Any:
    return await session.call(wire.send_prepared(session.client, request, session.timeout_s), "exchange")


async def test_a_real_server_takes_prepared_requests_between_asyncuas_own(odd: OddServer) -> None:
    session = Session(server_config(odd.endpoint))
    await session.open()
    try:
        token = wire.token_of(session.client)
        names = ["Double", "Int16", "Boolean", "String", "Array", "ReadOnly"]
        items = [
            WriteTo(odd.nodes[name].nodeid, {"Array": "Double", "ReadOnly": "Double"}.get(name, name), name == "Array")
            for name in names
        ]
        write = PreparedWrite(token, items)
        read = PreparedRead(token, [ReadFrom(odd.nodes[name].nodeid) for name in names])
        for values in ([1.5, -3, True, "a", [1.0, 2.0], 0.0], [2.5, 4, False, "longer", [3.0, 4.0, 5.0], 0.0]):
            write.set(values)
            codes = wire.write_results(await exchange(session, write))
            assert codes == [0] * 5 + [int(ua.StatusCodes.BadUserAccessDenied)]
            assert await session.client.get_node(odd.nodes["String"].nodeid).read_value() == values[3]  # asyncua's own
            assert await odd.nodes["Array"].read_value() == values[4]
            found = wire.decode_read(await exchange(session, read), len(names))
            assert found.value[:3].tolist() == [float(one) for one in values[:3]]
            assert found.text(3) == values[3] and found.value[3] == wire.to_number(values[3])
            assert found.value[5] == 0.0
        client = session.client
    finally:
        await session.close()
    with pytest.raises(ConnectionError):
        wire.send_prepared(client, read, 1.0)


@pytest.mark.parametrize("policy", ["None", "Basic256Sha256"])
async def test_long_and_secured_requests_go_out_in_chunks(
    plant: RunningPlant, pki: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIRE_PASSWORD", PASSWORD)
    secure = {"policy": policy, "pki": pki, "user": USER, "password_env": "WIRE_PASSWORD"} if policy != "None" else {}
    session = Session(server_config(plant.endpoint, **secure))
    await session.open()
    try:
        time_of_server = ReadFrom(ua.NodeId(ua.ObjectIds.Server_ServerStatus_CurrentTime))
        for n in (1, 6000, 2):  # 6000 take more than the 64 KiB of a chunk
            read = PreparedRead(wire.token_of(session.client), [time_of_server] * n)
            found = wire.decode_read(await exchange(session, read), n)
            assert (found.status == 0).all() and (found.value > 1.7e9).all()
    finally:
        await session.close()
