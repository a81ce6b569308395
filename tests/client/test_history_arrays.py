"""History of array elements: one read of each node, any element of it, as the rows are live and in a recording."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from asyncua import ua
from asyncua.common.utils import Buffer
from asyncua.server.internal_session import InternalSession
from asyncua.ua.ua_binary import struct_from_binary, struct_to_binary
from asyncua.ua.uaerrors import UaStatusCodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from running import cli, content, write

from opcua_detector.api import Tag, TagKind
from opcua_detector.client import GroupFeed, Session, history, read_history, wire
from opcua_detector.client.arrays import indexes_of
from opcua_detector.client.history import read_samples
from opcua_detector.client.wire_history import decode_history
from opcua_detector.config import TagConfig, load
from opcua_detector.errors import ConnectionProblem
from opcua_detector.model import load as load_model
from opcua_detector.service.outages import GapFiller
from opcua_detector.store import Store
from sim_server.processes import make

from .conftest import OddServer, Rows, group_config, server_config, until
from .test_wire import data_values, same

PERIOD = 20_000_000


# --- the decoder ---


def response_of(nodes: Sequence[Sequence[ua.DataValue]]) -> bytes:
    """A HistoryReadResponse of these nodes."""
    response = ua.HistoryReadResponse()
    for values in nodes:
        result = ua.HistoryReadResult()
        result.HistoryData = ua.HistoryData()
        result.HistoryData.DataValues = list(values)
        response.Results.append(result)
    return bytes(struct_to_binary(response))


NODE = st.tuples(data_values(), st.lists(st.integers(-1, 6), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(NODE, max_size=3))
def test_elements_of_a_history_are_decoded_as_asyncua_does(nodes: list[tuple[list[ua.DataValue], list[int]]]) -> None:
    raw = response_of([values for values, _ in nodes])
    pages = decode_history(Buffer(raw), [elements for _, elements in nodes])
    theirs = struct_from_binary(ua.HistoryReadResponse, Buffer(raw)).Results
    for page, (_, elements), their in zip(pages, nodes, theirs, strict=True):
        found = their.HistoryData.DataValues if isinstance(their.HistoryData, ua.HistoryData) else []
        for samples, element in zip((page.samples, *page.further), elements, strict=True):
            same(samples, wire.samples_of([(0, one) for one in found], {0: element}))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(NODE, min_size=1, max_size=2), st.data())
def test_hostile_bytes_of_a_history_are_refused(
    nodes: list[tuple[list[ua.DataValue], list[int]]], data: st.DataObject
) -> None:
    raw = bytearray(response_of([values for values, _ in nodes]))
    elements = [wanted for _, wanted in nodes]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for hostile in (bytes(raw), cut):
        try:
            pages = decode_history(hostile, elements)
        except (ConnectionProblem, UaStatusCodeError):
            continue
        assert [1 + len(page.further) for page in pages] == [len(one) for one in elements]


def test_an_answer_of_other_nodes_than_were_asked_for_is_refused() -> None:
    raw = response_of([[], []])
    assert len(decode_history(raw)) == len(decode_history(raw, [(0, 1), (-1,)])) == 2
    with pytest.raises(ConnectionProblem, match="claims 2 nodes"):
        decode_history(raw, [(0,)])


# --- a server that keeps an array ---


class ArrayPlant:
    """A real server whose history has every value that an array and a scalar of it ever had."""

    def __init__(self, odd: OddServer) -> None:
        self.odd = odd
        self.kept: dict[str, list[tuple[int, Any]]] = {"Array": [], "Double": []}

    @property
    def _storage(self) -> Any:
        return self.odd.server.iserver.history_manager.storage

    async def open(self) -> None:
        """Let the server keep the two nodes; nothing is kept but what `put` writes."""
        for name in self.kept:
            await self._storage.new_historized_node(self.odd.nodes[name].nodeid, None)

    async def put(self, name: str, stamp_ns: int, value: Any, kind: Any = ua.VariantType.Double, *,
                  show: bool = True) -> None:
        """Write a value with the stamp of its source, live (`show`) and into the history."""
        stamp = datetime.fromtimestamp(stamp_ns // 1000 / 1e6, UTC)
        one = ua.DataValue(ua.Variant(value, kind), ua.StatusCode(), stamp, stamp)
        node = self.odd.nodes[name]
        await self._storage.save_node_value(node.nodeid, one)
        self.kept[name].append((wire.to_ns(stamp), value))
        if show:
            await self.odd.server.write_attribute_value(node.nodeid, one)

    @asynccontextmanager
    async def running(self, rows: np.ndarray, begin_ns: int, period_ns: int) -> AsyncIterator[None]:
        """Write a row after the other in real time, float64[n, k] as the array and its first column as the scalar."""

        async def play() -> None:
            loop = asyncio.get_running_loop()
            zero = loop.time()
            for k, row in enumerate(rows):
                await asyncio.sleep(max(0.0, zero + k * period_ns / 1e9 - loop.time()))
                await self.put("Array", begin_ns + k * period_ns, row.tolist())
                await self.put("Double", begin_ns + k * period_ns, float(row[0]))

        task = asyncio.create_task(play())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


@pytest_asyncio.fixture
async def arrays(odd: OddServer) -> ArrayPlant:
    one = ArrayPlant(odd)
    await one.open()
    return one


@pytest_asyncio.fixture
async def link(odd: OddServer) -> AsyncIterator[Session]:
    one = Session(server_config(odd.endpoint))
    await one.open()
    yield one
    await one.close()


def now_ns() -> int:
    return int(datetime.now(UTC).timestamp()) * 10**9


class Asked:
    """What the server was asked of its history."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[list[str], int]] = []  # nodes, values of each
        original = InternalSession.history_read

        async def history_read(session: InternalSession, given: Any) -> Any:
            self.requests.append(([str(one.NodeId.Identifier) for one in given.NodesToRead],
                                  int(given.HistoryReadDetails.NumValuesPerNode)))
            return await original(session, given)

        monkeypatch.setattr(InternalSession, "history_read", history_read)


async def test_tags_of_one_array_share_one_read_and_each_gets_its_element(
    arrays: ArrayPlant, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = now_ns() - 3600 * 10**9
    rows = np.random.default_rng(0).normal(size=(500, 4))
    for k, row in enumerate(rows):
        await arrays.put("Array", start + k * PERIOD, row.tolist(), show=k == len(rows) - 1)
        await arrays.put("Double", start + k * PERIOD, float(k), show=False)
    asked = Asked(monkeypatch)
    monkeypatch.setattr(history, "PAGE_VALUES", 800)
    array, scalar = arrays.odd.text("Array"), arrays.odd.text("Double")
    same_node = f"ns={link.namespaces.index('urn:odd')};s=Array"
    got = await read_samples(link, [array, scalar, array, same_node, array], start, start + 500 * PERIOD,
                             elements=[3, -1, 0, 3, 4])
    stamps = start + np.arange(500) * PERIOD
    assert all(np.array_equal(one.source_ns, stamps) for one in got)
    for one, expected in zip(got[:4], (rows[:, 3], np.arange(500.0), rows[:, 0], rows[:, 3]), strict=True):
        assert np.array_equal(one.value, expected)
    assert np.isnan(got[4].value).all() and not got[4].status.any()  # there is no element 4: as it is live
    assert all(len(nodes) == len(set(nodes)) for nodes, _ in asked.requests)
    assert {tuple(nodes) for nodes, _ in asked.requests} <= {("Array",), ("Double",)}
    # An array of four costs a response four times as much as a scalar.
    most = {name: max(values for nodes, values in asked.requests if nodes == [name]) for name in ("Array", "Double")}
    assert most["Array"] * 4 == most["Double"] == 800


async def test_an_array_that_changes_its_length_or_type_is_masked_where_it_lacks_the_element(
    arrays: ArrayPlant, link: Session
) -> None:
    start = now_ns() - 3600 * 10**9
    given: list[tuple[Any, Any]] = [
        ([1.0, 2.0, 3.0], ua.VariantType.Double), ([1.0, 2.0], ua.VariantType.Double), (5.0, ua.VariantType.Double),
        ([7, 8, 9], ua.VariantType.Int16), (["a", "b", "c"], ua.VariantType.String), ([], ua.VariantType.Double),
        ([True, False, True], ua.VariantType.Boolean), ([[1.0, 2.0], [3.0, 4.0]], ua.VariantType.Float),
    ]
    for k, (value, kind) in enumerate(given):
        await arrays.put("Array", start + k * PERIOD, value, kind, show=k == 0)
        await arrays.put("Double", start + k * PERIOD, float(k), show=False)
    node = arrays.odd.text("Array")
    tags = [Tag("number", node), Tag("scalar", arrays.odd.text("Double")), Tag("state", node, TagKind.STATE)]
    counts: dict[str, int] = {}
    record = await read_history(link, tags, start, start + 10**9, PERIOD, indexes={"number": 2, "state": 2},
                                counts=counts)
    assert len(record) == len(given)
    code = wire.to_number("c")
    assert np.array_equal(record.values[:, 0], [3.0, np.nan, np.nan, 9.0, np.nan, np.nan, 1.0, 3.0], equal_nan=True)
    assert np.array_equal(record.valid[:, 0], [1, 0, 0, 1, 0, 0, 1, 1])
    assert np.array_equal(record.values[:, 1], np.arange(8.0)) and record.valid[:, 1].all()
    assert record.values[4, 2] == code and record.valid[4, 2]  # a text is a value of a state alone
    assert counts["not_numeric"] == 1 and counts["bad"] == 1 and counts["non_finite"] == 3 + 3
    assert counts["delivered"] == counts["used"] == 3 * len(given)


async def test_rows_of_elements_are_the_same_live_recorded_and_from_history(
    arrays: ArrayPlant, link: Session, tmp_path: Path
) -> None:
    array = arrays.odd.text("Array")
    configured = (
        TagConfig(name="third", node=array, index=2), TagConfig(name="scalar", node=arrays.odd.text("Double")),
        TagConfig(name="first", node=array, index=0), TagConfig(name="beyond", node=array, index=9),
    )
    group = group_config(period="20 ms", lateness="200 ms", tags=configured)
    tags = [one.tag() for one in group.tags]
    rows = np.random.default_rng(1).normal(size=(1000, 3))
    begin = now_ns()
    await arrays.put("Array", begin, [0.0, 0.0, 0.0])
    await arrays.put("Double", begin, 0.0)
    live = Rows()
    with Store.open(tmp_path / "rows.db") as store:
        started = store.start_recording("live", tags, group.period, group=group.name, server="plant")

        def take(frame: Any) -> None:
            store.offer_row(started, frame)
            live.take(frame)

        feed = GroupFeed(group, {"plant": link}, take)
        await feed.start()
        async with arrays.running(rows, begin + 10**9, PERIOD):
            await live.until(lambda r: len(r.rows) >= 150)
        counters = feed.counters()
        await feed.stop()
        store.end_recording(started)
        recorded = store.read_recording("live")
    counts: dict[str, int] = {}
    record = await read_history(
        link, tags, begin + 10**9, arrays.kept["Array"][-1][0] + 1, PERIOD, counts=counts, max_hold=group.max_hold,
        indexes=indexes_of(group))
    at = {int(stamp): k for k, stamp in enumerate(record.source_ns)}
    both = [(k, at[stamp]) for k, (stamp, *_) in enumerate(live.rows) if stamp in at]
    assert len(both) >= 120
    for k, j in both:
        _, _, values, valid = live.rows[k]
        assert np.array_equal(values, record.values[j], equal_nan=True) and np.array_equal(valid, record.valid[j])
    assert record.valid[:, :3].all() and not record.valid[:, 3].any()
    assert np.array_equal(recorded.source_ns, [row[0] for row in live.rows])
    assert np.array_equal(recorded.values, np.array([row[2] for row in live.rows]), equal_nan=True)
    assert counts["non_finite"] == len(record) and 0 < counters["non_finite"] <= counters["delivered"] // 4 + 1


async def test_a_gap_of_elements_is_filled_from_history(arrays: ArrayPlant, link: Session, tmp_path: Path) -> None:
    array = arrays.odd.text("Array")
    configured = (TagConfig(name="third", node=array, index=2), TagConfig(name="first", node=array, index=0))
    group = group_config(period="20 ms", tags=configured)
    begin = now_ns() - 100 * 10**9
    rows = np.random.default_rng(2).normal(size=(500, 3))
    for k, row in enumerate(rows):
        await arrays.put("Array", begin + k * PERIOD, row.tolist(), show=k == len(rows) - 1)
    ours = 0
    with Store.open(tmp_path / "rows.db") as store:
        filler = GapFiller(group, {"plant": link}, store, 3600 * 10**9, settle_s=0.0, clock_ns=lambda: ours)
        for k in (*range(100), *range(400, 500)):
            ours = k * PERIOD
            filler.row(begin + k * PERIOD, k in (0, 400))
        await until(lambda: filler.counters["gaps_filled"] == 1)
        assert await asyncio.to_thread(store.flush)
        (filled,) = store.recordings()
        record = store.read_recording(filled.name)
    assert np.array_equal(record.source_ns, begin + np.arange(100, 400) * PERIOD)
    assert np.array_equal(record.values, rows[100:400, [2, 0]]) and record.valid.all()


async def test_fit_learns_an_element_from_history_as_from_a_recording(arrays: ArrayPlant, tmp_path: Path) -> None:
    period = 10_000_000
    lorenz = make("lorenz", seed=0).simulate(9000)
    rows = np.column_stack([lorenz[:, 0], np.zeros(len(lorenz)), lorenz[:, 1]])
    begin = now_ns() - 6000 * period
    for k, row in enumerate(rows[:6000]):
        await arrays.put("Array", begin + k * period, row.tolist(), show=k == 5999)
    array = arrays.odd.text("Array")
    given = content(arrays.odd.endpoint, outputs=False, tags=[
        {"name": "x1", "node": array, "index": 0}, {"name": "x3", "node": array, "index": 2}])
    file = write(tmp_path, given)
    fitted = await asyncio.to_thread(cli, "fit", file, "--json")
    assert fitted.code == 0, fitted.err
    (monitor,) = fitted.json["monitors"]
    assert monitor["rows"] == 6000 and not monitor["excluded"]
    model = load_model(tmp_path / "models" / "lorenz.npz")
    assert [tag.name for tag in model.tags] == ["x1", "x3"]
    async with arrays.running(rows[6000:], begin + 6000 * period, period):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "opcua_detector", "record", str(file), "--seconds", "3", "--name", "short")
        assert await child.wait() == 0
    with Store.open(load(file).store.path, readonly=True) as store:
        recorded = store.read_recording("short")
    kept = dict(arrays.kept["Array"])
    known = [k for k, stamp in enumerate(recorded.source_ns) if int(stamp) in kept and recorded.valid[k].all()]
    assert len(known) >= 100
    for k in known[5:]:
        row = kept[int(recorded.source_ns[k])]
        assert recorded.values[k].tolist() == [row[0], row[2]]


async def test_fit_names_the_server_whose_history_is_empty(arrays: ArrayPlant, tmp_path: Path) -> None:
    """This server answers for a node that it does not keep as for one that had no value."""
    await arrays.put("Array", now_ns() - 10**9, [1.0, 2.0])
    given = content(arrays.odd.endpoint, outputs=False, tags=[
        {"name": "x1", "node": arrays.odd.text("Array"), "index": 1},
        {"name": "x3", "node": arrays.odd.text("Float"), "server": "other"}])
    given["servers"].append(given["servers"][0] | {"name": "other"})
    fitted = await asyncio.to_thread(cli, "fit", write(tmp_path, given), "--json")
    assert fitted.code == 3
    assert "server other has no history of tag x3" in fitted.err and "opcua-detector record" in fitted.err
