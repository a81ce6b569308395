"""History: complete, over several pages, equal to what the plant did."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from opcua_detector.api import Tag, TagKind
from opcua_detector.client import Session, history, oldest_ns, read_history, wire
from opcua_detector.client.history import read_samples
from opcua_detector.client.limits import Limits
from opcua_detector.client.wire_history import HistoryPage
from opcua_detector.errors import NodeProblem, RecordError
from sim_server.plant import Plant
from sim_server.processes import Process, model
from sim_server.testing import RunningPlant, running_plant

from .conftest import HISTORY_ROWS, PLANT, server_config

PERIOD = 10_000_000
TAGS = [
    Tag("x1", f"{PLANT}lorenz.x1"),
    Tag("x3", f"{PLANT}lorenz.x3"),
    Tag("total", f"{PLANT}lorenz.total", TagKind.COUNTER),
    Tag("state", f"{PLANT}lorenz.state", TagKind.STATE),
]


def truth(rows: int) -> np.ndarray:
    """The plant once more, without a server: float64[rows, n_tags] after the warm-up."""
    plant = Plant(Process(model("lorenz"), seed=0, noise=0.0))
    plant.rows(2000)
    names = [tag.name for tag in plant.tags]
    values = plant.rows(rows).values
    return np.column_stack([values[:, names.index(tag.name)] for tag in TAGS])


async def test_the_whole_history_is_the_plants_own_values_with_progress(
    session: Session, plant: RunningPlant
) -> None:
    start = plant.start_ns - HISTORY_ROWS * PERIOD
    assert await oldest_ns(session, TAGS[0].node) == start
    steps: list[tuple[int, int]] = []
    counts: dict[str, int] = {}
    record = await read_history(
        session,
        TAGS,
        start,
        plant.start_ns,
        PERIOD,
        progress=lambda done, total: steps.append((done, total)),
        counts=counts,
    )
    assert len(record) == HISTORY_ROWS >= 20_000
    assert np.array_equal(record.source_ns, start + np.arange(HISTORY_ROWS) * PERIOD)
    assert np.array_equal(record.values, truth(HISTORY_ROWS))
    assert record.valid.all() and record.gap.sum() == 1
    assert counts["delivered"] == counts["used"] == 4 * HISTORY_ROWS
    done = [step[0] for step in steps]
    assert len(steps) > 5 and done == sorted(done) and steps[-1] == (HISTORY_ROWS, HISTORY_ROWS)


async def test_a_part_of_the_history_has_no_row_twice_at_page_borders(
    session: Session, plant: RunningPlant
) -> None:
    start = plant.start_ns - 15_000 * PERIOD
    (samples,) = await read_samples(session, [TAGS[0].node], start, start + 12_345 * PERIOD)
    assert np.array_equal(samples.source_ns, start + np.arange(12_345) * PERIOD)


async def test_a_server_without_continuation_points_is_read_on_by_time(
    session: Session,
    plant: RunningPlant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plant counts NumValuesPerNode over all pages: a small page ends without a continuation point."""
    monkeypatch.setattr("opcua_detector.client.history.PAGE_VALUES", 4000)
    start = plant.start_ns - HISTORY_ROWS * PERIOD
    record = await read_history(session, TAGS[:2], start, plant.start_ns, PERIOD)
    assert np.array_equal(record.values, truth(HISTORY_ROWS)[:, :2])


async def test_a_tag_without_history_says_what_to_do(session: Session) -> None:
    with pytest.raises(NodeProblem, match="BadHistoryOperationUnsupported") as caught:
        await read_history(session, [Tag("s", f"{PLANT}lorenz.faults.sigma")], 0, 10**18, PERIOD)
    assert "record" in caught.value.next_step


async def test_an_unknown_tag_and_an_empty_range_are_told(session: Session, plant: RunningPlant) -> None:
    with pytest.raises(NodeProblem, match="BadNodeIdUnknown"):
        await read_history(session, [Tag("s", f"{PLANT}lorenz.x9")], 0, 10**18, PERIOD)
    with pytest.raises(RecordError, match=r"no history of x1 .*1970"):
        await read_history(session, TAGS[:1], 0, 10**9, PERIOD)


async def test_tags_of_different_rates_are_read_whole_and_short_rows_are_told() -> None:
    """The slow tag is done long before the fast ones, which need several pages and several requests by time."""
    rows, period = 20_000, 20_000_000
    names = ["theta", "u", "total", "clock", "constant"]
    tags = [Tag(name, f"{PLANT}throttle.{name}") for name in names]
    quirks = [
        {"tag": "total", "quirk": "rate_ms", "value": 1000},
        {"tag": "theta", "quirk": "skew_ms", "value": 40},
        {"tag": "u", "quirk": "skew_ms", "value": -40},
    ]
    with running_plant("throttle", history_rows=rows, config={"quirks": quirks}) as plant:
        one = Session(server_config(plant.endpoint))
        await one.open()
        start = plant.start_ns - rows * period
        samples = await read_samples(one, [tag.node for tag in tags], start, plant.start_ns)
        assert [len(each.source_ns) for each in samples] == [rows - 2, rows, rows // 50, rows, rows]
        for k, each in enumerate(samples):  # none twice, none left out
            assert set(np.diff(each.source_ns)) == {1_000_000_000 if k == 2 else period}
        pages = 0

        def count(done: int, total: int) -> None:
            nonlocal pages
            pages += 1

        counts: dict[str, int] = {}
        record = await read_history(
            one, tags, start, plant.start_ns, period, max_hold=100, progress=count, counts=counts
        )
        assert abs(len(record) - rows) <= 3 and record.gap.sum() == 1 and counts["gaps"] == 0  # skew: 2 rows
        assert counts["expected"] == rows and counts["missing"] == max(0, rows - len(record)) and pages > 5
        counts = {}
        await read_history(one, tags, start - 1000 * period, plant.start_ns, period, max_hold=100, counts=counts)
        assert counts["expected"] == rows + 1000 and 998 <= counts["missing"] <= 1003
        await one.close()


class Historian:
    """A server's history of one or several tags, in memory, with the ways in which servers differ.

    over_all : NumValuesPerNode bounds all pages of a read together, else each response
    cap : values in one response; silent : beyond it there is no continuation point
    forgets : continuation points are refused after so many
    server_ns : stamps of the server, by which it keeps its values; None: by the source, its stamps are the
        time of the answer
    """

    def __init__(
        self,
        source_ns: list[np.ndarray],
        *,
        over_all: bool = False,
        cap: int = 300,
        silent: bool = False,
        forgets: int = 10**9,
        ahead_ns: int | None = None,
    ) -> None:
        self.source_ns = source_ns
        self.over_all, self.cap, self.silent, self.forgets = over_all, cap, silent, forgets
        self.ahead_ns = ahead_ns
        self.asked = 0
        # what the reader needs of a session
        self.timeout_s, self.namespaces, self.where, self.client = 1.0, ["", "urn"], "here", None
        self.limits = Limits()
        self.limits.stated["history"] = 100

    def limit(self, name: str) -> int:
        return self.limits.size(name)

    def problem(self, error: Exception, what: str) -> Exception:
        return error

    def send(self, client: Any, request: Any, timeout_s: float) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(request)
        return future

    def decode(self, request: Any, elements: Any) -> list[HistoryPage]:
        self.asked += 1
        assert self.asked < 2000
        details = request.Parameters.HistoryReadDetails
        start, end = wire.to_ns(details.StartTime), wire.to_ns(details.EndTime)
        return [
            self.page(one, start, end, int(details.NumValuesPerNode)) for one in request.Parameters.NodesToRead
        ]

    def page(self, one: Any, start: int, end: int, wanted: int) -> HistoryPage:
        source = self.source_ns[int(one.NodeId.Identifier)]
        axis = source if self.ahead_ns is None else source - self.ahead_ns
        inside = np.flatnonzero((axis >= start) & (axis < end))
        sent, left = 0, wanted
        if one.ContinuationPoint:
            begun, sent, left = (int(text) for text in one.ContinuationPoint.split())
            assert begun == start  # a continuation repeats its request
            if sent // self.cap >= self.forgets:
                return HistoryPage(0x804A0000, None, wire.samples_of([]))
        n = min(self.cap, left if self.over_all else wanted)
        now = inside[sent : sent + n]
        sent, left = sent + len(now), left - len(now)
        point = None
        if sent < len(inside) and not self.silent and not (self.over_all and left == 0):
            point = f"{start} {sent} {left}".encode()
        server = axis[now] if self.ahead_ns is not None else np.full(len(now), 2 * 10**18 + self.asked)
        zeros = np.zeros(len(now), np.int64)
        return HistoryPage(
            0, point, wire.Samples(zeros, source[now], server, zeros.astype(float), zeros.astype(np.uint32))
        )


@pytest.mark.parametrize(
    "ways",
    [
        {"over_all": True},
        {"over_all": False},
        {"silent": True},
        {"forgets": 2},
        {"over_all": True, "cap": 10**6},
        {"ahead_ns": 40_000_000, "over_all": True},
        {"ahead_ns": -40_000_000, "over_all": True},
        {"ahead_ns": 40_000_000, "silent": True},
        {"ahead_ns": -(10**10), "silent": True},
    ],
    ids=str,
)
async def test_whatever_a_server_means_by_a_page_no_value_is_lost_or_read_twice(
    ways: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = 1_700_000_000_000_000_000
    fast = start + np.arange(7000) * PERIOD
    fast2 = start + np.arange(6500) * PERIOD + 1_234_500
    slow = start + np.arange(70) * 100 * PERIOD
    server = Historian([fast, slow, fast2], **ways)
    monkeypatch.setattr(wire, "send", server.send)
    monkeypatch.setattr(history, "decode_history", server.decode)
    monkeypatch.setattr(history, "PAGE_VALUES", 3000)
    shift = max(0, abs(ways.get("ahead_ns", 0)))
    got = await read_samples(
        cast(Session, server), ["ns=1;i=0", "ns=1;i=1", "ns=1;i=2"], start - shift, int(fast[-1]) + shift + 1000
    )
    for one, expected in zip(got, (fast, slow, fast2), strict=True):
        assert np.array_equal(one.source_ns, expected)
