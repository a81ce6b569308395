"""Requests of the write-back: encoded once, patched in place, and byte for byte what asyncua would send."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from asyncua import ua
from asyncua.ua.ua_binary import nodeid_to_binary, struct_to_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import Session, WriteBack, wire
from opcua_detector.client.casts import cast
from opcua_detector.client.nodes import ACCEPTS
from opcua_detector.client.wire_requests import Encoded, PreparedWrite, WriteTo
from opcua_detector.client.write_outputs import Output
from opcua_detector.client.write_requests import MOST_SETS, CannotEncode, WriteRequests
from opcua_detector.nodes import RESULT_SIGNALS

from .conftest import WAIT_S, OddServer, server_config
from .test_wire_requests import NODES, TICKS, TOKENS, with_header
from .test_writeback import Acks

RAW: dict[str, Any] = {
    "Double": st.floats(-1e4, 1e4).map(lambda x: x / 7),
    "Boolean": st.booleans(),
    "UInt16": st.integers(0, 127),
    "Int32": st.integers(0, 127),
    "UInt32": st.integers(0, 127),
    "String": st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    "DateTime": st.integers(0, 2 * 10**18),
}


def requests_of(token: ua.NodeId) -> WriteRequests:
    """The requests of a connection that has nothing but its token."""
    protocol = SimpleNamespace(authentication_token=token)
    client: Any = SimpleNamespace(uaclient=SimpleNamespace(protocol=protocol))
    return WriteRequests(client)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[Output], list[list[Any]]]:
    """Result nodes of any type that takes them, and values for some of them, several times over."""
    outputs = []
    for signal in draw(st.lists(st.sampled_from(sorted(RESULT_SIGNALS)), min_size=1, max_size=8, unique=True)):
        about = RESULT_SIGNALS[signal]
        kind = draw(st.sampled_from(sorted(ACCEPTS[about.type])))
        output = Output("m", signal, "")
        output.target = WriteTo(draw(NODES), kind, about.array)
        outputs.append(output)

    def value(output: Output) -> Any:
        kind = RESULT_SIGNALS[output.signal].type
        raw = st.integers(0, 127) if output.type not in ("Double", "Float") and kind == "Double" else RAW[kind]
        return draw(st.lists(raw, max_size=3) if output.array else raw)

    return outputs, [[value(one) for one in outputs] for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TOKENS, rows(), st.data())
def test_a_row_is_written_in_the_bytes_of_asyncua(
    token: ua.NodeId, made: tuple[list[Output], list[list[Any]]], data: st.DataObject
) -> None:
    outputs, rounds = made
    requests = requests_of(token)
    for values in rounds:
        for output, value in zip(outputs, values, strict=True):
            output.value = cast(output.signal, value, output.type, output.array)
        some = data.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
        request = ua.WriteRequest()
        for output in some:
            assert output.target is not None
            item = ua.WriteValue()
            item.NodeId, item.AttributeId = output.target.node, ua.AttributeIds.Value
            # The second argument: no status. Stamps are None by default: a PLC refuses a write that has either.
            item.Value = ua.DataValue(
                ua.Variant(output.value, ua.VariantType[output.type], is_array=output.array), None)
            assert struct_to_binary(item.Value)[0] == 0x01
            request.Parameters.NodesToWrite.append(item)
        expected = with_header(request, token)
        prepared = requests.write(some)
        assert isinstance(prepared, PreparedWrite) and bytes(prepared.body(12, TICKS, 4000)) == expected
        assert Encoded(bytes(nodeid_to_binary(token)), request).body(12, TICKS, 4000) == expected
    assert requests.encoded == 0


def an_output(signal: str, kind: str, value: Any, array: bool = False) -> Output:
    output = Output("m", signal, "nsu=urn:x;s=" + signal)
    output.target, output.value = WriteTo(ua.NodeId(signal, 2), kind, array), value
    return output


def test_a_request_is_made_once_for_the_nodes_that_are_written_together() -> None:
    requests = requests_of(ua.NodeId(7, 0))
    a, b = an_output("Score", "Double", 1.0), an_output("State", "Int32", 3)
    both = requests.write([a, b])
    a.value = 2.0
    assert requests.write([a, b]) is both and requests.write([a]) is not both
    assert requests.read([a, b]) is requests.read([a, b])
    a.target = WriteTo(ua.NodeId("Score", 2), "Float")  # found anew, with another type
    again = requests.write([a, b])
    assert again is not both
    assert b"\x0a" + bytes(ua.ua_binary.Primitives.Float.pack(2.0)) in bytes(again.body(1, TICKS, 1))


def test_the_requests_that_are_kept_have_a_bound() -> None:
    requests = requests_of(ua.NodeId(7, 0))
    many = [an_output(f"Top{k}Tag", "String", "x") for k in range(3 * MOST_SETS)]
    for one in many:
        requests.write([one])
        requests.read([one])
    assert len(requests._writes) == len(requests._reads) == MOST_SETS


@pytest.mark.parametrize(("kind", "value"), [("Guid", UUID(int=5)), ("NodeId", ua.NodeId(1, 1))])
def test_a_type_without_a_prepared_form_goes_out_by_asyncua(kind: str, value: Any) -> None:
    requests = requests_of(ua.NodeId(7, 0))
    outputs = [an_output("Score", "Double", 1.5), an_output("ModelId", kind, value)]
    request = requests.write(outputs)
    assert isinstance(request, Encoded) and requests.encoded == 1
    expected = ua.WriteRequest()
    for one in outputs:
        assert one.target is not None
        item = ua.WriteValue()
        item.NodeId, item.AttributeId = one.target.node, ua.AttributeIds.Value
        item.Value = ua.DataValue(ua.Variant(one.value, ua.VariantType[one.type]), None)
        expected.Parameters.NodesToWrite.append(item)
    assert request.body(12, TICKS, 4000) == with_header(expected, ua.NodeId(7, 0))


def test_a_value_that_nobody_can_encode_is_named_and_the_others_are_not() -> None:
    requests = requests_of(ua.NodeId(7, 0))
    good, bad = an_output("Score", "Double", math.inf), an_output("Top1Tag", "String", "\ud800")
    with pytest.raises(CannotEncode) as caught:
        requests.write([good, bad])
    assert [one for one, _ in caught.value.outputs] == [bad] and "String" in caught.value.outputs[0][1]
    assert isinstance(requests.write([good]), PreparedWrite)


async def test_one_text_without_an_encoding_keeps_no_other_value_from_its_node(odd: OddServer) -> None:
    session = Session(server_config(odd.endpoint))
    await session.open()
    acks = Acks()
    back = WriteBack(session, {("m", "Score"): odd.text("Double"), ("m", "StateText"): odd.text("String")},
                     on_ack=acks)
    await session.attach(back)
    back.offer("m", 5, {"Score": 4.5, "StateText": "\ud800"})
    await acks.of(5)
    assert await odd.nodes["Double"].read_value() == 4.5
    assert "cannot be encoded as String" in back.states()["m", "StateText"] and back.states()["m", "Score"] == ""
    assert back.counters["cast_errors"] == 1 and back.counters["values"] == 1
    await back.stop()
    await session.close()


async def test_requests_belong_to_their_connection(odd: OddServer) -> None:
    session = Session(server_config(odd.endpoint))
    await session.open()
    acks = Acks()
    back = WriteBack(session, {("m", "Score"): odd.text("Double")}, on_ack=acks)
    await session.attach(back)
    back.offer("m", 1, {"Score": 1.0})
    await acks.of(1)
    token = wire.token_of(session.client)
    session.fail("test")
    async with asyncio.timeout(WAIT_S):
        while session.state == "connected":
            await asyncio.sleep(0.005)
    back.offer("m", 2, {"Score": 2.0})
    await acks.of(2)  # on the next connection, whose token the request carries
    assert wire.token_of(session.client) != token and await odd.nodes["Double"].read_value() == 2.0
    await back.stop()
    await session.close()
