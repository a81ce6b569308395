"""The decoder says what asyncua's own says, bit for bit, on any mixture of types, arrays, status words and stamps."""

from __future__ import annotations

import math
import struct
import tracemalloc
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_from_binary, struct_to_binary, variant_from_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import wire
from opcua_detector.errors import ConnectionProblem

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOW_NS = 1_767_225_600_000_000_000
MOMENTS = st.one_of(
    st.sampled_from([datetime(year, 1, 1, tzinfo=UTC) for year in (1601, 1650, 1716, 1717, 2255, 2256, 9999)]),
    st.integers(0, 8_000_000_000_000_000).map(lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)),
)
STATUS = st.one_of(
    st.sampled_from([0, 0x40000000, 0x80000000, 0x480, 0x002F0000, 0x808A0000]), st.integers(0, 2**32 - 1)
)
VT = ua.VariantType
KINDS: dict[Any, Any] = {
    VT.Double: st.floats(),
    VT.Float: st.floats(width=32),
    VT.Boolean: st.booleans(),
    VT.SByte: st.integers(-128, 127),
    VT.Byte: st.integers(0, 255),
    VT.Int16: st.integers(-(2**15), 2**15 - 1),
    VT.UInt16: st.integers(0, 2**16 - 1),
    VT.Int32: st.integers(-(2**31), 2**31 - 1),
    VT.UInt32: st.integers(0, 2**32 - 1),
    VT.Int64: st.integers(-(2**63), 2**63 - 1),
    VT.UInt64: st.integers(0, 2**64 - 1),
    VT.String: st.one_of(st.none(), st.text(max_size=9)),
    VT.DateTime: MOMENTS,
}
OTHERS: dict[Any, Any] = {
    VT.Guid: st.uuids(),
    VT.ByteString: st.one_of(st.none(), st.binary(max_size=9)),
    VT.NodeId: st.sampled_from(
        [
            ua.NodeId(5, 0, ua.NodeIdType.TwoByte), ua.NodeId(5, 3, ua.NodeIdType.FourByte), ua.NodeId(2**31, 3),
            ua.NodeId("x", 3), ua.NodeId(uuid.UUID(int=7), 3), ua.NodeId(b"xy", 3, ua.NodeIdType.ByteString),
        ]
    ),
    VT.ExpandedNodeId: st.sampled_from([ua.ExpandedNodeId("x", 3, NamespaceUri="urn:a", ServerIndex=2)]),
    VT.StatusCode: STATUS.map(ua.StatusCode),
    VT.QualifiedName: st.just(ua.QualifiedName("name", 2)),
    VT.LocalizedText: st.sampled_from([ua.LocalizedText("text"), ua.LocalizedText("t", "en"), ua.LocalizedText()]),
    VT.ExtensionObject: st.sampled_from([ua.Range(0.0, 1.0), None, ua.EUInformation()]),
    VT.DiagnosticInfo: st.sampled_from(
        [ua.DiagnosticInfo(), ua.DiagnosticInfo(SymbolicId=1, AdditionalInfo="more", InnerStatusCode=ua.StatusCode(5))]
    ),
    VT.DataValue: st.sampled_from(
        [
            ua.DataValue(ua.Variant(1.0, VT.Double), None, NOW), ua.DataValue(None),
            ua.DataValue(ua.Variant([1, 2], VT.Int32)),
        ]
    ),
}
ALL = KINDS | OTHERS


@st.composite
def variants(draw: st.DrawFn, kinds: tuple[Any, ...] = tuple(ALL)) -> ua.Variant:
    """Scalars, arrays, arrays of several dimensions, arrays of Variants, nulls."""
    form = draw(st.sampled_from(["scalar"] * 6 + ["array", "array", "matrix", "variants", "null", "null array"]))
    kind = draw(st.sampled_from(kinds))
    if form == "array":
        return ua.Variant(draw(st.lists(ALL[kind], max_size=5)), kind, is_array=True)
    if form == "matrix":
        number = draw(st.sampled_from([VT.Double, VT.Int16, VT.String]))
        rows = [[draw(ALL[number]) for _ in range(3)] for _ in range(2)]
        return ua.Variant(rows, number, [2, 3])
    if form == "variants":
        inner = st.sampled_from(kinds).flatmap(lambda one: ALL[one].map(lambda value: ua.Variant(value, one)))
        return ua.Variant(draw(st.lists(inner, max_size=4)), VT.Variant, is_array=True)
    if form == "null":
        return ua.Variant(None, VT.Null)
    if form == "null array":
        return ua.Variant(None, VT.Double, is_array=True)
    return ua.Variant(draw(ALL[kind]), kind)


def data_value(
    variant: ua.Variant | None, status: int | None, source: datetime | None, server: datetime | None
) -> ua.DataValue:
    """A DataValue in which everything may be absent."""
    one = ua.DataValue(variant, None if status is None else ua.StatusCode(status), source, server)
    if variant is None:
        object.__setattr__(one, "Value", None)  # its own constructor would make it a null that is there
    return one


@st.composite
def data_values(draw: st.DrawFn) -> list[ua.DataValue]:
    """DataValues of one shape or of several."""
    uniform = draw(st.booleans())
    shape = tuple(draw(st.booleans()) for _ in range(3))
    scalar = draw(st.sampled_from(list(KINDS)))
    values = []
    for _ in range(draw(st.integers(0, 8))):
        if uniform:
            variant: ua.Variant | None = ua.Variant(draw(KINDS[scalar]), scalar)
            with_status, with_source, with_server = shape
        else:
            variant = draw(st.one_of(st.none(), variants()))
            with_status, with_source, with_server = draw(st.tuples(*[st.booleans()] * 3))
        values.append(
            data_value(
                variant,
                draw(STATUS) if with_status else None,
                draw(MOMENTS) if with_source else None,
                draw(MOMENTS) if with_server else None,
            )
        )
    return values


ELEMENTS = st.dictionaries(st.integers(0, 30), st.integers(-1, 6), max_size=12)


def as_array(elements: dict[int, int]) -> np.ndarray:
    out = np.full(max(elements, default=-1) + 1, -1, np.int32)
    for handle, element in elements.items():
        out[handle] = element
    return out


def publish(blocks: list[Any], **header: Any) -> ua.PublishResponse:
    response = ua.PublishResponse()
    for name, value in header.items():
        setattr(response.ResponseHeader, name, value)
    response.Parameters.SubscriptionId = 7
    response.Parameters.AvailableSequenceNumbers = [1, 2]
    response.Parameters.MoreNotifications = False
    response.Parameters.NotificationMessage.SequenceNumber = 9
    response.Parameters.NotificationMessage.PublishTime = NOW
    response.Parameters.NotificationMessage.NotificationData = blocks
    return response


def change(values: list[ua.DataValue]) -> ua.DataChangeNotification:
    block = ua.DataChangeNotification()
    for i, one in enumerate(values):
        item = ua.MonitoredItemNotification()
        item.ClientHandle, item.Value = i * 3, one
        block.MonitoredItems.append(item)
    return block


def publish_bytes(values: list[ua.DataValue]) -> bytes:
    return bytes(struct_to_binary(publish([change(values)] if values else [])))


def same(ours: wire.Samples, theirs: wire.Samples) -> None:
    """Equal bit for bit; what is no number has many bit patterns, which all mean the same."""
    for name in ("handle", "source_ns", "server_ns", "status"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    nan = np.isnan(theirs.value)
    assert np.array_equal(np.isnan(ours.value), nan)
    assert np.array_equal(ours.value.view(np.int64)[~nan], theirs.value.view(np.int64)[~nan])
    if ours.highest >= 0:  # what the walk says of the columns is what is in them
        assert ours.highest == ours.handle.max()
        assert bool(ours.notes & wire.NOTE_STATUS) == bool((ours.status != 0).any())
        assert bool(ours.notes & wire.NOTE_NO_STAMP) == bool((ours.source_ns == wire.NO_STAMP).any())
        assert ours.text_at is not None
        assert bool(ours.notes & wire.NOTE_TEXT) == bool((ours.text_at >= 0).any())
    else:
        assert ours.notes == wire.NOTE_UNKNOWN or len(ours.value) == 0


def theirs_of_publish(raw: bytes, elements: dict[int, int]) -> wire.Samples:
    """What asyncua makes of the bytes, as columns."""
    blocks = struct_from_binary(ua.PublishResponse, Buffer(raw)).Parameters.NotificationMessage.NotificationData
    items = [item for one in blocks or [] if isinstance(one, ua.DataChangeNotification) for item in one.MonitoredItems]
    return wire.samples_of([(item.ClientHandle, item.Value) for item in items], elements)


# --- the same as asyncua ---


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data_values(), ELEMENTS)
def test_publish_is_decoded_as_asyncua_does(values: list[ua.DataValue], elements: dict[int, int]) -> None:
    raw = publish_bytes(values)
    ours = wire.decode_publish(Buffer(raw), None, as_array(elements))
    assert (ours.samples is None) == (not values)
    if ours.samples is not None:
        same(ours.samples, theirs_of_publish(raw, elements))
    assert (ours.subscription_id, ours.sequence_number, ours.more, ours.status_change) == (7, 9, False, None)
    assert ours.publish_ns == NOW_NS


@st.composite
def messages(draw: st.DrawFn) -> tuple[ua.PublishResponse, int]:
    """Several blocks, diagnostics everywhere, results of acknowledgements, extra headers; and the bad ones of these."""
    info = st.sampled_from([ua.DiagnosticInfo(), ua.DiagnosticInfo(SymbolicId=3, Locale=1, AdditionalInfo="why")])
    blocks: list[Any] = []
    for kind in draw(st.lists(st.sampled_from(["change", "change", "event", "status"]), max_size=4)):
        if kind == "change":
            block = change(draw(data_values()))
            block.DiagnosticInfos = draw(st.lists(info, max_size=2))
        elif kind == "event":
            fields = ua.EventFieldList(3, [ua.Variant("text", VT.String), ua.Variant(4, VT.Int32)])
            block = ua.EventNotificationList([fields] * draw(st.integers(0, 2)))
        else:
            block = ua.StatusChangeNotification(ua.StatusCode(ua.StatusCodes.BadTimeout), draw(info))
        blocks.append(block)
    response = publish(
        blocks,
        ServiceDiagnostics=draw(info),
        StringTable=draw(st.lists(st.text(max_size=3), max_size=2)),
        AdditionalHeader=draw(st.sampled_from([ua.ExtensionObject(), ua.ExtensionObject(ua.NodeId(1, 1), b"body")])),
        ServiceResult=ua.StatusCode(draw(st.sampled_from([0, 0x2D0000]))),
    )
    codes = draw(st.lists(st.sampled_from([0, 0x807A0000, 0x80280000]), max_size=3))
    response.Parameters.Results = [ua.StatusCode(code) for code in codes]
    response.Parameters.DiagnosticInfos = draw(st.lists(info, max_size=2))
    return response, sum(code != 0 for code in codes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages(), ELEMENTS)
def test_any_message_is_decoded_as_asyncua_does(made: tuple[ua.PublishResponse, int], elements: dict[int, int]) -> None:
    response, refused = made
    raw = bytes(struct_to_binary(response))
    columns = wire.Columns(2)
    ours = wire.decode_publish(Buffer(raw), columns, as_array(elements))
    blocks = response.Parameters.NotificationMessage.NotificationData
    theirs = theirs_of_publish(raw, elements)
    same(wire.samples_of([]) if ours.samples is None else ours.samples, theirs)
    changed = any(isinstance(one, ua.StatusChangeNotification) for one in blocks)
    assert ours.status_change == (ua.StatusCodes.BadTimeout if changed else None)
    assert ours.other_blocks == sum(isinstance(one, ua.EventNotificationList) for one in blocks)
    assert ours.refused_acks == refused


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data_values(), ELEMENTS)
def test_read_is_decoded_as_asyncua_does(values: list[ua.DataValue], elements: dict[int, int]) -> None:
    response = ua.ReadResponse()
    response.Results = values
    raw = bytes(struct_to_binary(response))
    theirs = struct_from_binary(ua.ReadResponse, Buffer(raw)).Results
    ours = wire.decode_read(Buffer(raw), len(values), wire.Columns(1), as_array(elements))
    same(ours, wire.samples_of(list(enumerate(theirs)), elements))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(data_values(), min_size=0, max_size=3), st.sampled_from([None, b"point"]))
def test_history_is_decoded_as_asyncua_does(nodes: list[list[ua.DataValue]], point: bytes | None) -> None:
    response = ua.HistoryReadResponse()
    for values in nodes:
        result = ua.HistoryReadResult()
        result.ContinuationPoint = point
        result.HistoryData = ua.HistoryData()
        result.HistoryData.DataValues = values
        response.Results.append(result)
    nothing = ua.HistoryReadResult()
    nothing.StatusCode = ua.StatusCode(ua.StatusCodes.BadNoData)
    response.Results.append(nothing)
    raw = bytes(struct_to_binary(response))
    pages = wire.decode_history(Buffer(raw))
    assert [page.continuation for page in pages] == [point] * len(nodes) + [None]
    assert [page.status for page in pages] == [0] * len(nodes) + [ua.StatusCodes.BadNoData]
    assert len(pages[-1].samples.value) == 0
    for page, theirs in zip(pages, struct_from_binary(ua.HistoryReadResponse, Buffer(raw)).Results, strict=True):
        if isinstance(theirs.HistoryData, ua.HistoryData):
            same(page.samples, wire.samples_of([(0, one) for one in theirs.HistoryData.DataValues]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(STATUS, max_size=5))
def test_write_results_are_their_status_codes(codes: list[int]) -> None:
    response = ua.WriteResponse()
    response.Results = [ua.StatusCode(code) for code in codes]
    assert wire.write_results(Buffer(struct_to_binary(response))) == codes


# --- what asyncua cannot show ---


def spec_bytes(mask: int, ticks: tuple[int, int], variant: bytes = b"\x0b" + struct.pack("<d", 2.5)) -> bytes:
    """Encode a DataValue in the order of Part 6, 5.2.2.17."""
    parts = [bytes([mask])]
    if mask & 0x01:
        parts.append(variant)
    if mask & 0x02:
        parts.append(struct.pack("<I", 0x40000000))
    if mask & 0x04:
        parts.append(struct.pack("<q", ticks[0]))
    if mask & 0x10:
        parts.append(struct.pack("<H", 1111))
    if mask & 0x08:
        parts.append(struct.pack("<q", ticks[1]))
    if mask & 0x20:
        parts.append(struct.pack("<H", 2222))
    return b"".join(parts)


def read_response(body: bytes, count: int) -> Buffer:
    head = struct.pack("<BBHqIIBiBBB", 1, 0, 634, 0, 1, 0, 0, -1, 0, 0, 0)
    return Buffer(head + struct.pack("<i", count) + body + struct.pack("<i", -1))


def test_every_mask_is_read_in_the_order_of_the_standard_with_stamps_of_100_ns() -> None:
    # asyncua writes and reads both picoseconds after both stamps, which is not the order of the standard.
    epoch = 116_444_736_000_000_000
    ticks = (epoch + NOW_NS // 100 + 3, epoch + NOW_NS // 100 + 7)
    masks = list(range(64))
    found = wire.decode_read(read_response(b"".join(spec_bytes(mask, ticks) for mask in masks), 64), 64)
    for mask in masks:
        assert found.value[mask] == 2.5 if mask & 0x01 else math.isnan(found.value[mask])
        assert found.status[mask] == (0x40000000 if mask & 0x02 else 0)
        assert found.source_ns[mask] == (NOW_NS + 300 if mask & 0x04 else wire.NO_STAMP)
        assert found.server_ns[mask] == (NOW_NS + 700 if mask & 0x08 else wire.NO_STAMP)
    assert found.handle.tolist() == masks


@pytest.mark.parametrize(
    ("encoded", "number"),
    [
        (b"\x10" + struct.pack("<i", 4) + b"<a/>", math.nan),  # XmlElement, which asyncua cannot encode
        (b"\x1d" + struct.pack("<i", 2) + b"ab", math.nan),  # a type of later versions is read as ByteString
        (b"\x01\x07", 1.0),  # any byte but 0 is true
        (b"\x19" + b"\x41" + struct.pack("<i", 3) + b"\x10" + struct.pack("<i", 1) + b"x", math.nan),  # inner info
        (b"\x98" + struct.pack("<i", 1) + b"\x98" + struct.pack("<i", 1) + b"\x06" + struct.pack("<i", 5), math.nan),
        (b"\x16\x00\x00\x02" + struct.pack("<i", 2) + b"<>", math.nan),  # ExtensionObject in XML
        (b"\x16\x00\x00\x01" + struct.pack("<i", -1), math.nan),
    ],
)
def test_values_that_asyncua_does_not_know_are_passed_over(encoded: bytes, number: float) -> None:
    after = spec_bytes(1, (0, 0))
    found = wire.decode_read(read_response(spec_bytes(1, (0, 0), encoded) + after, 2), 2)
    assert found.value[1] == 2.5
    assert found.value[0] == number or (math.isnan(number) and math.isnan(found.value[0]))


def test_a_text_comes_along_with_its_code() -> None:
    values = [
        ua.DataValue(ua.Variant("läuft", VT.String)), ua.DataValue(ua.Variant(1.0, VT.Double)),
        ua.DataValue(ua.Variant(["a", "steht"], VT.String)), ua.DataValue(ua.Variant(None, VT.String)),
    ]
    samples = wire.decode_publish(Buffer(publish_bytes(values)), None, np.array([-1] * 6 + [1], np.int32)).samples
    assert samples is not None
    assert [samples.text(i) for i in range(4)] == ["läuft", None, "steht", None]
    assert samples.value[0] == wire.to_number("läuft") != samples.value[2] == wire.to_number("steht")
    assert math.isnan(samples.value[3])


def test_columns_are_used_again_and_grow_to_what_comes() -> None:
    columns = wire.Columns(4)

    def decoded(n: int) -> wire.Samples:
        raw = publish_bytes([ua.DataValue(ua.Variant(float(i), VT.Double)) for i in range(n)])
        samples = wire.decode_publish(Buffer(raw), columns).samples
        assert samples is not None and samples.value.tolist() == list(range(n))
        return samples

    room = columns.value
    assert decoded(3).value.base is room and decoded(3).value.base is room and decoded(2).value.base is room
    assert len(decoded(50).value) == 50
    room = columns.value
    assert decoded(7).value.base is room


def test_a_keep_alive_has_no_samples_and_a_status_change_its_code() -> None:
    assert wire.decode_publish(Buffer(publish_bytes([]))).samples is None
    ended = publish([ua.StatusChangeNotification(Status=ua.StatusCode(ua.StatusCodes.BadTimeout))])
    assert wire.decode_publish(Buffer(struct_to_binary(ended))).status_change == ua.StatusCodes.BadTimeout


@pytest.mark.parametrize("decode", [wire.decode_publish, wire.write_results, wire.check, wire.decode_history])
def test_a_service_fault_is_its_status_code(decode: Callable[[Buffer], Any]) -> None:
    fault = ua.ServiceFault()
    fault.ResponseHeader.ServiceResult = ua.StatusCode(ua.StatusCodes.BadNoSubscription)
    with pytest.raises(ua.uaerrors.BadNoSubscription):
        decode(Buffer(struct_to_binary(fault)))
    fault.ResponseHeader.ServiceResult = ua.StatusCode(ua.StatusCodes.Good)
    with pytest.raises(ConnectionProblem, match="it has the type 397"):
        decode(Buffer(struct_to_binary(fault)))


def test_stamps_without_meaning_are_null_and_text_has_a_stable_code() -> None:
    assert wire.to_ns(None) == wire.to_ns(datetime(1601, 1, 1, tzinfo=UTC)) == wire.NO_STAMP
    assert wire.to_ns(datetime(9999, 12, 31, tzinfo=UTC)) == wire.NO_STAMP
    assert wire.to_datetime(wire.to_ns(datetime(2026, 1, 1, 0, 0, 0, 7, tzinfo=UTC))).microsecond == 7
    assert wire.to_number("auto") == wire.to_number("auto") != wire.to_number("manual")
    assert math.isnan(wire.to_number([1.0])) and wire.to_number(True) == 1.0
    assert wire.to_number(NOW) == NOW_NS / 1e9 and math.isnan(wire.to_number(datetime(1601, 1, 1, tzinfo=UTC)))


# --- bytes that are not to be trusted ---


def whole_messages() -> dict[str, tuple[bytes, Callable[[Buffer], Any]]]:
    value = ua.DataValue(ua.Variant([ua.Variant("a", VT.String)], VT.Variant), ua.StatusCode(5), NOW, NOW)
    values = [value, ua.DataValue(ua.Variant([1.0, 2.0], VT.Double), None, NOW, NOW)] * 2
    response = publish([change(values), ua.StatusChangeNotification()])
    response.Parameters.Results = [ua.StatusCode()]
    read, write, history = ua.ReadResponse(), ua.WriteResponse(), ua.HistoryReadResponse()
    read.Results = values
    write.Results = [ua.StatusCode()] * 3
    result = ua.HistoryReadResult()
    result.ContinuationPoint, result.HistoryData = b"point", ua.HistoryData()
    result.HistoryData.DataValues = values
    history.Results = [result]
    again = ua.RepublishResponse()
    again.NotificationMessage.NotificationData = [change(values)]
    return {
        "publish": (struct_to_binary(response), wire.decode_publish),
        "keep-alive": (publish_bytes([]), wire.decode_publish),
        "republish": (struct_to_binary(again), lambda body: wire.read_message(wire.open_republish(body, 1))),
        "read": (struct_to_binary(read), lambda body: wire.decode_read(body, 4)),
        "write": (struct_to_binary(write), wire.write_results),
        "history": (struct_to_binary(history), wire.decode_history),
        "by asyncua": (
            struct_to_binary(ua.CreateMonitoredItemsResponse(Results=[ua.MonitoredItemCreateResult()])),
            lambda body: wire.decode(body, ua.CreateMonitoredItemsResponse),
        ),
    }


@pytest.mark.parametrize("name", whole_messages())
def test_a_message_cut_anywhere_raises_and_reads_nothing_beyond(name: str) -> None:
    raw, decode = whole_messages()[name]
    decode(Buffer(raw))
    for end in range(len(raw)):
        with pytest.raises(ConnectionProblem, match="is no OPC UA"):
            decode(Buffer(raw[:end]))


HUGE = struct.pack("<i", 2**31 - 1)


@pytest.mark.parametrize(
    "variant",
    [
        *(bytes([0x80 | kind]) + HUGE for kind in range(64)),  # an array of every type
        b"\x0c" + HUGE, b"\x0f" + HUGE, b"\x16\x00\x00\x01" + HUGE, b"\x11\x03\x00\x00" + HUGE,
        b"\xc6" + struct.pack("<i", 0) + HUGE,  # dimensions
        b"\x8c" + struct.pack("<i", -2), b"\x80" + struct.pack("<i", 1), b"\x46" + struct.pack("<ii", 1, 0),
        b"\x18" * 200 + b"\x00", b"\x98\x01\x00\x00\x00" * 150 + b"\x00", b"\x19" + b"\x40" * 150 + b"\x00",
    ],
    ids=lambda one: one[:8].hex(),
)
def test_lengths_and_depths_without_end_are_refused_before_anything_is_made(variant: bytes) -> None:
    padding = spec_bytes(1, (0, 0)) * 10
    tracemalloc.start()
    try:
        with pytest.raises(ConnectionProblem, match="values are not readable"):
            wire.decode_read(read_response(spec_bytes(1, (0, 0), variant) + padding, 11), 11)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["publish", "read", "write", "history"])
def test_counts_without_end_are_refused_before_anything_is_made(name: str) -> None:
    raw, decode = whole_messages()[name]
    tracemalloc.start()
    refused = 0
    try:
        for at in range(len(raw) - 3):
            try:
                decode(Buffer(raw[:at] + HUGE + raw[at + 4 :]))
            except ConnectionProblem:
                refused += 1
            except ua.UaStatusCodeError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert refused > 5


def test_an_answer_to_another_question_is_refused() -> None:
    raw, _ = whole_messages()["read"]
    with pytest.raises(ConnectionProblem, match="has the type 634"):
        wire.decode_publish(Buffer(raw))
    with pytest.raises(ConnectionProblem, match="has the type 634"):
        wire.decode(Buffer(raw), ua.CreateSubscriptionResponse)
    with pytest.raises(ConnectionProblem, match="not the 3 values"):
        wire.decode_read(Buffer(raw), 3)


@pytest.mark.parametrize("length", [-5, -2, -(2**31)])
def test_a_length_that_leads_back_is_refused_and_not_read_without_end(length: int) -> None:
    whole = struct_to_binary(ua.CreateMonitoredItemsResponse())
    # In place of no DiagnosticInfos 100 million: each a text that would lead back to its own beginning.
    raw = whole[:-4] + struct.pack("<iBi", 10**8, 0x10, length) + bytes(8)
    with pytest.raises(ConnectionProblem, match="is no OPC UA: NotEnoughData"):
        wire.decode(raw, ua.CreateMonitoredItemsResponse)


def test_asyncuas_own_codec_refuses_an_array_of_nothing() -> None:
    assert variant_from_binary(Buffer(b"\x80" + struct.pack("<i", 0))).Value == []
    with pytest.raises(ua.UaError, match="times nothing"):
        variant_from_binary(Buffer(b"\x80" + HUGE))
