"""The historian returns every sample once, in order, however it is asked."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
from asyncua import ua
from asyncua.server.internal_server import InternalServer

from sim_server.history import NO_STAMP, Historian, TagHistory
from sim_server.ua_types import node_id, to_datetime, to_ns

T0 = 1_700_000_000_000_000_000
STEP = 10_000_000
NODE = node_id("lorenz.x1", 2)


def filled(times: list[int], capacity: int = 1000) -> TagHistory:
    history = TagHistory(capacity, ua.VariantType.Double)
    stamps = np.array([T0 + one * STEP for one in times], np.int64)
    history.load(stamps, np.arange(len(times), dtype=float), np.zeros(len(times), np.uint32), stamps)
    return history


async def ask(
    history: TagHistory,
    start: int | None,
    end: int | None,
    wanted: int = 0,
    *,
    bounds: bool = False,
    page_rows: int = 4,
) -> tuple[list[float], list[int]]:
    """Read to the last page; return values and page sizes."""
    historian = Historian(InternalServer(), page_rows)
    historian.add(NODE, history)
    details = ua.ReadRawModifiedDetails()
    details.IsReadModified = False
    details.StartTime = ua.get_win_epoch() if start is None else to_datetime(T0 + start * STEP)
    details.EndTime = ua.get_win_epoch() if end is None else to_datetime(T0 + end * STEP)
    details.NumValuesPerNode = wanted
    details.ReturnBounds = bounds
    values, sizes, point = [], [], None
    for _ in range(100):
        params = ua.HistoryReadParameters()
        params.HistoryReadDetails = details
        value = ua.HistoryReadValueId()
        value.NodeId = NODE
        value.ContinuationPoint = point
        params.NodesToRead = [value]
        (result,) = await historian.read_history(params)
        result.StatusCode.check()
        values += [one.Value.Value for one in result.HistoryData.DataValues]
        sizes.append(len(result.HistoryData.DataValues))
        point = result.ContinuationPoint
        if not point:
            return values, sizes
    raise AssertionError("paging does not end")


@pytest.mark.parametrize(
    ("start", "end", "wanted", "bounds", "expected"),
    [
        (0, 10, 0, False, list(range(10))),
        (0, 10, 0, True, list(range(11))),
        (3, 5, 0, False, [3, 4]),
        (5, 5, 0, False, [5]),
        (0, 10, 6, False, list(range(6))),
        (2, None, 9, False, list(range(2, 11))),
        (None, 8, 3, False, [8, 7, 6]),
        (8, 2, 0, False, [8, 7, 6, 5, 4, 3]),
        (8, 2, 0, True, [8, 7, 6, 5, 4, 3, 2]),
        (8, 0, 5, False, [8, 7, 6, 5, 4]),
        (50, 60, 0, False, []),
    ],
)
async def test_time_domain_and_order_follow_part_11(
    start: int | None, end: int | None, wanted: int, bounds: bool, expected: list[int]
) -> None:
    for page_rows in (1, 3, 4, 100):
        values, sizes = await ask(
            filled(list(range(11))), start, end, wanted, bounds=bounds, page_rows=page_rows
        )
        assert values == expected
        assert max(sizes) <= page_rows


async def test_equal_times_are_neither_lost_nor_repeated_at_a_page_border() -> None:
    times = [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]
    for page_rows in (1, 2, 3, 5):
        forward, _ = await ask(filled(times), 0, 9, page_rows=page_rows)
        assert forward == list(range(11))
        backward, _ = await ask(filled(times), 9, 0, bounds=True, page_rows=page_rows)
        assert backward == list(range(10, -1, -1))


async def test_history_that_grows_and_forgets_while_being_read_stays_in_order() -> None:
    history = filled(list(range(20)), capacity=20)
    historian = Historian(InternalServer(), 5)
    historian.add(NODE, history)
    details = ua.ReadRawModifiedDetails()
    details.IsReadModified = False
    details.StartTime, details.EndTime = to_datetime(T0), to_datetime(T0 + 1000 * STEP)
    value, seen, at = ua.HistoryReadValueId(), [], 20
    value.NodeId = NODE
    params = ua.HistoryReadParameters()
    params.HistoryReadDetails, params.NodesToRead = details, [value]
    for _ in range(6):
        (result,) = await historian.read_history(params)
        seen += [one.Value.Value for one in result.HistoryData.DataValues]
        value.ContinuationPoint = result.ContinuationPoint
        for _ in range(2):
            history.append(T0 + at * STEP, float(at), 0, T0 + at * STEP)
            at += 1
    assert seen == [float(one) for one in range(30)]


def test_a_full_history_drops_the_oldest() -> None:
    history = TagHistory(100, ua.VariantType.Double)
    for k in range(5000):
        history.append(T0 + k * STEP, float(k), 0, T0 + k * STEP)
    assert len(history) == 100
    assert history.data_value(0).Value.Value == 4900.0
    assert history.data_value(99).Value.Value == 4999.0
    assert (np.diff(history.times_ns) == STEP).all()


def test_late_samples_are_filed_at_their_time() -> None:
    history = TagHistory(100, ua.VariantType.Double)
    for k in (0, 1, 3, 2, 5, 4, 6):
        history.append(T0 + k * STEP, float(k), 0, T0 + k * STEP)
    assert [history.data_value(i).Value.Value for i in range(7)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_sample_keeps_status_and_null_stamp() -> None:
    history = TagHistory(10, ua.VariantType.Double)
    history.append(NO_STAMP, 1.5, 0x4093_0000, T0)
    history.append(T0 + STEP, 2.5, 0x808C_0000, T0 + STEP)
    uncertain, bad = history.data_value(0), history.data_value(1)
    assert uncertain.SourceTimestamp is None
    assert uncertain.ServerTimestamp == to_datetime(T0)
    assert (uncertain.Value.Value, uncertain.StatusCode.value) == (1.5, 0x4093_0000)
    assert (bad.Value.Value, bad.StatusCode.value) == (None, 0x808C_0000)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"NodeId": node_id("gone", 2)}, "BadNodeIdUnknown"),
        ({"ContinuationPoint": b"not ours"}, "BadContinuationPointInvalid"),
        ({"details": ua.ReadProcessedDetails()}, "BadHistoryOperationUnsupported"),
        ({"EndTime": ua.get_win_epoch()}, "BadHistoryOperationInvalid"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_its_own_code(change: dict, code: str) -> None:
    historian = Historian(InternalServer(), 5)
    historian.add(NODE, filled([0, 1, 2]))
    details = change.get("details") or ua.ReadRawModifiedDetails()
    if isinstance(details, ua.ReadRawModifiedDetails):
        details.IsReadModified = False
        details.StartTime = to_datetime(T0)
        details.EndTime = change.get("EndTime", to_datetime(T0 + STEP))
    value = ua.HistoryReadValueId()
    value.NodeId = change.get("NodeId", NODE)
    value.ContinuationPoint = change.get("ContinuationPoint")
    params = ua.HistoryReadParameters()
    params.HistoryReadDetails, params.NodesToRead = details, [value]
    (result,) = await historian.read_history(params)
    assert result.StatusCode.name == code


def test_stamps_survive_the_library_s_datetime() -> None:
    for ns in (T0, T0 + 123_456_000, 0):
        assert to_ns(to_datetime(ns)) == ns
    assert to_ns((to_datetime(T0) + timedelta(seconds=1)).replace(tzinfo=None)) == T0 + 10**9
