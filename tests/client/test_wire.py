"""The fast decoder says what asyncua's own says, on any mixture of types, status words and timestamps."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_to_binary
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import wire

STAMPS = st.one_of(
    st.none(),
    st.integers(0, 4_000_000_000_000_000).map(
        lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    ),
)
KINDS: dict[ua.VariantType, Any] = {
    ua.VariantType.Double: st.floats(),
    ua.VariantType.Float: st.floats(width=32),
    ua.VariantType.Boolean: st.booleans(),
    ua.VariantType.SByte: st.integers(-128, 127),
    ua.VariantType.Byte: st.integers(0, 255),
    ua.VariantType.Int16: st.integers(-(2**15), 2**15 - 1),
    ua.VariantType.UInt16: st.integers(0, 2**16 - 1),
    ua.VariantType.Int32: st.integers(-(2**31), 2**31 - 1),
    ua.VariantType.UInt32: st.integers(0, 2**32 - 1),
    ua.VariantType.Int64: st.integers(-(2**63), 2**63 - 1),
    ua.VariantType.UInt64: st.integers(0, 2**64 - 1),
    ua.VariantType.String: st.text(max_size=5),
}


@st.composite
def data_values(draw: st.DrawFn) -> list[ua.DataValue]:
    """DataValues of one shape or of several."""
    uniform = draw(st.booleans())
    kinds = [draw(st.sampled_from(list(KINDS)))] if uniform else list(KINDS)
    shape = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))
    values = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(kinds))
        with_status, with_source, with_server = shape if uniform else draw(st.tuples(*[st.booleans()] * 3))
        moment = STAMPS.filter(lambda stamp: stamp is not None)
        values.append(
            ua.DataValue(
                ua.Variant(draw(KINDS[kind]), kind),
                ua.StatusCode(draw(st.sampled_from([0x40000000, 0x80000000, 0x480, 0x002F0000])))
                if with_status
                else None,
                draw(moment) if with_source else None,
                draw(moment) if with_server else None,
            )
        )
    return values


def publish_bytes(values: list[ua.DataValue]) -> Buffer:
    response = ua.PublishResponse()
    response.Parameters.SubscriptionId = 7
    response.Parameters.AvailableSequenceNumbers = [1, 2]
    response.Parameters.MoreNotifications = False
    response.Parameters.NotificationMessage.SequenceNumber = 9
    response.Parameters.NotificationMessage.PublishTime = datetime(2026, 1, 1, tzinfo=UTC)
    if values:
        change = ua.DataChangeNotification()
        for i, one in enumerate(values):
            item = ua.MonitoredItemNotification()
            item.ClientHandle, item.Value = i * 3, one
            change.MonitoredItems.append(item)
        response.Parameters.NotificationMessage.NotificationData = [change]
    return Buffer(struct_to_binary(response))


def same(a: wire.Samples, b: wire.Samples) -> None:
    for name in ("handle", "source_ns", "server_ns", "value", "status"):
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "value"), name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data_values())
def test_publish_is_decoded_as_asyncua_does(values: list[ua.DataValue]) -> None:
    fast = wire.decode_publish(publish_bytes(values))
    assert fast.samples is not None
    same(fast.samples, wire.samples_of([(i * 3, one) for i, one in enumerate(values)]))
    assert (fast.subscription_id, fast.sequence_number, fast.more, fast.status_change) == (7, 9, False, None)
    assert fast.publish_ns == 1_767_225_600_000_000_000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(data_values(), min_size=1, max_size=3), st.sampled_from([None, b"point"]))
def test_history_is_decoded_as_asyncua_does(nodes: list[list[ua.DataValue]], point: bytes | None) -> None:
    response = ua.HistoryReadResponse()
    for values in nodes:
        result = ua.HistoryReadResult()
        result.ContinuationPoint = point
        result.HistoryData = ua.HistoryData()
        result.HistoryData.DataValues = values
        response.Results.append(result)
    pages = wire.decode_history(Buffer(struct_to_binary(response)))
    assert [page.continuation for page in pages] == [point] * len(nodes)
    for page, values in zip(pages, nodes, strict=True):
        same(page.samples, wire.samples_of([(0, one) for one in values]))


def test_uniform_doubles_take_the_fast_way() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    values = [ua.DataValue(ua.Variant(float(i), ua.VariantType.Double), None, now, now) for i in range(50)]
    found = wire._fast_publish(bytes(publish_bytes(values)))
    assert found.samples is not None and found.samples.value.tolist() == list(range(50))


def test_a_keep_alive_has_no_samples_and_a_status_change_its_code() -> None:
    assert wire.decode_publish(publish_bytes([])).samples is None
    response = ua.PublishResponse()
    response.Parameters.NotificationMessage.NotificationData = [
        ua.StatusChangeNotification(Status=ua.StatusCode(ua.StatusCodes.BadTimeout))
    ]
    assert wire.decode_publish(Buffer(struct_to_binary(response))).status_change == ua.StatusCodes.BadTimeout


def test_a_service_fault_is_its_status_code() -> None:
    fault = ua.ServiceFault()
    fault.ResponseHeader.ServiceResult = ua.StatusCode(ua.StatusCodes.BadNoSubscription)
    with pytest.raises(ua.uaerrors.BadNoSubscription):
        wire.decode_publish(Buffer(struct_to_binary(fault)))


@pytest.mark.parametrize("cut", [13, 20, 41, 60])
def test_a_message_cut_short_raises_and_reads_nothing_beyond(cut: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    whole = bytes(publish_bytes([ua.DataValue(ua.Variant(1.0, ua.VariantType.Double), None, now, now)] * 3))
    with pytest.raises(Exception, match=r".*"):
        wire.decode_publish(Buffer(whole[: len(whole) - cut]))


def test_stamps_without_meaning_are_null_and_text_has_a_stable_code() -> None:
    assert wire.to_ns(None) == wire.to_ns(datetime(1601, 1, 1, tzinfo=UTC)) == wire.NO_STAMP
    assert wire.to_ns(datetime(9999, 12, 31, tzinfo=UTC)) == wire.NO_STAMP
    assert wire.to_datetime(wire.to_ns(datetime(2026, 1, 1, 0, 0, 0, 7, tzinfo=UTC))).microsecond == 7
    assert wire.to_number("auto") == wire.to_number("auto") != wire.to_number("manual")
    assert math.isnan(wire.to_number([1.0])) and wire.to_number(True) == 1.0
