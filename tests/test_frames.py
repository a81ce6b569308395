"""The rule of time: skew, change-only, mixed rates, gaps, quality, accounting; live equals batch."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.api import Frame, Record, Tag, TagKind
from opcua_detector.errors import RecordError
from opcua_detector.frames import (
    COUNTERS,
    RETURN_NS,
    START_PERIODS,
    FrameBuilder,
    record_from_columns,
    rows_from_samples,
)

P = 100_000_000  # 100 ms
T0 = 1_700_000_000_000_000_000
GOOD, BAD, UNCERTAIN = 0, 0x80000000, 0x40000000
OVERFLOW = 0x480
DISPOSED = ("used", "late", "duplicate", "replaced", "skipped")


# --- slow twin ---


@dataclass
class Cell:
    """What the twin knows of a tag."""

    sample: tuple[int, float, int] | None = None  # stamp, value, status
    slot: int = 0
    good: tuple[int, float] | None = None  # slot, value
    newest: int = -1
    seen: bool = False
    step: int = 1
    steps: list[int] = field(default_factory=list)


class Twin:
    """`close_rows` once more, slowly: samples one by one in the order of stamps, rows in dictionaries."""

    def __init__(self, tags: list[Tag], period: int, lateness: int, max_hold: int) -> None:
        self.tags, self.period, self.lateness, self.max_hold = tags, period, lateness, max_hold
        self.cells = [Cell() for _ in tags]
        self.kept: list[tuple[int, int, float, int]] = []
        self.first = 0
        self.holes = 0
        self.anchor: int | None = None
        self.row, self.last_any, self.newest, self.gap = 0, -1, 0, True
        self.pending: dict[int, dict[int, tuple[int, float, int]]] = {}
        self.rows: list[tuple[int, bool, list[float], list[int]]] = []

    def slot(self, stamp: int) -> int:
        assert self.anchor is not None
        return math.ceil((stamp - self.anchor - self.period // 2) / self.period)

    def feed(self, sample: tuple[int, int, float, int]) -> None:
        if self.anchor is not None:
            self.take(sample)
            return
        stamp = sample[1]
        too_far = self.max_hold * self.period
        if self.kept and stamp - self.kept[-1][1] > too_far and self.holes <= len(self.tags):
            self.first = len(self.kept)
            self.holes += 1
        self.kept.append(sample)
        full = len(self.kept) == 64 + 4 * START_PERIODS * len(self.tags)
        if stamp - self.kept[self.first][1] >= START_PERIODS * self.period or full:
            self.start()

    def start(self) -> None:
        first = self.kept[self.first][1]
        phases = sorted((s[1] - first) % self.period for s in self.kept[self.first :])
        gaps = [(phases[0] + self.period - phases[-1], 0)]
        gaps += [(b - a, i + 1) for i, (a, b) in enumerate(itertools.pairwise(phases))]
        widest = max(g for g, _ in gaps)
        after = next(i for g, i in gaps if g == widest)
        self.anchor = first
        if widest >= self.period // 8:
            self.anchor = first + phases[after] + (self.period - widest) // 2
        self.anchor += self.slot(first) * self.period
        self.newest = first
        for sample in self.kept:
            self.take(sample)
        self.kept = []

    @staticmethod
    def policy(tag: Tag, status: int) -> str:
        if status & BAD:
            return tag.quality
        return str(getattr(tag, "uncertain", "use")) if status & UNCERTAIN else "use"

    def due(self, j: int) -> bool:
        cell = self.cells[j]
        return cell.newest < self.row and cell.step <= self.row - cell.newest <= self.max_hold

    def close(self, hole: bool, flush: bool = False) -> None:
        assert self.anchor is not None
        while True:
            overdue = self.newest >= self.anchor + self.row * self.period + self.period // 2 + self.lateness
            if self.row <= self.last_any:
                ready = flush or hole or overdue or not any(self.due(j) for j in range(len(self.tags)))
            else:
                ready = overdue and not hole and not flush and self.row - self.last_any <= self.max_hold
            if not ready:
                return
            self.emit()

    def emit(self) -> None:
        assert self.anchor is not None
        k = self.row
        for j, sample in self.pending.pop(k, {}).items():
            self.set_current(j, k, sample)
        self.row += 1
        values, valid = [], []
        for tag, cell in zip(self.tags, self.cells, strict=True):
            value, ok = math.nan, 0
            if cell.sample is not None:
                what = self.policy(tag, cell.sample[2])
                finite = math.isfinite(cell.sample[1])
                if what == "stop" or (tag.quality == "stop" and not finite):
                    self.gap = True
                    return
                own = getattr(tag, "stale_after_ns", None)
                held = self.max_hold if own is None else own // self.period
                if what != "use":
                    if what == "hold" and cell.good and k - cell.good[0] <= held:
                        value, ok = cell.good[1], 1
                elif finite:
                    value = cell.sample[1]
                    ok = int((own is None and not tag.judged) or k - cell.slot <= held)
            values.append(value)
            valid.append(ok)
        self.rows.append((self.anchor + k * self.period, self.gap, values, valid))
        self.gap = False

    def set_current(self, j: int, slot: int, sample: tuple[int, float, int]) -> None:
        cell = self.cells[j]
        cell.sample, cell.slot = sample, slot
        if self.policy(self.tags[j], sample[2]) == "use" and math.isfinite(sample[1]):
            cell.good = (slot, sample[1])

    def take(self, sample: tuple[int, int, float, int]) -> None:
        j, stamp, value, status = sample
        slot = self.slot(stamp)
        hole = slot - self.last_any > self.max_hold
        self.newest = max(self.newest, stamp)
        self.close(hole)
        if hole:
            self.gap = True
            row = max(slot, self.row)
            for cell in self.cells:
                if self.last_any - cell.newest <= self.max_hold:
                    cell.newest, cell.step = row - 1, 1
            self.row = row
        cell = self.cells[j]
        if cell.sample is not None and stamp <= cell.sample[0]:
            if stamp == cell.sample[0]:
                self.set_current(j, cell.slot, (stamp, value, status))
            return
        if slot < self.row:
            self.set_current(j, slot, (stamp, value, status))
        else:
            held = self.pending.setdefault(slot, {}).get(j)
            if held is None or stamp >= held[0]:
                self.pending[slot][j] = (stamp, value, status)
            self.last_any = max(self.last_any, slot)
        if slot > cell.newest:
            if cell.seen:
                cell.steps.append(slot - cell.newest)
                cell.step = min(cell.step, cell.steps[-1])
                if len(cell.steps) == 8:
                    even = 4 * min(cell.steps) >= 3 * max(cell.steps)
                    cell.step, cell.steps = min(cell.steps) if even else 1, []
            cell.newest = slot
        cell.seen = True
        self.close(False)

    def finish(self) -> None:
        if self.anchor is None and self.kept:
            self.start()
        if self.anchor is not None:
            self.close(False, flush=True)


# --- helpers ---


def arrays(samples: list[tuple[int, int, float, int]]) -> tuple[np.ndarray, ...]:
    return (
        np.array([s[0] for s in samples], np.int32),
        np.array([s[1] for s in samples], np.int64),
        np.array([s[2] for s in samples], np.float64),
        np.array([s[3] for s in samples], np.uint32),
    )


def stream(builder: FrameBuilder, chunks: list[list[tuple[int, int, float, int]]]) -> list[tuple]:
    """Push chunk by chunk; return the rows as plain tuples."""
    rows = []
    for chunk in chunks:
        builder.push(*arrays(chunk))
        rows += [copied(frame) for frame in builder.closed()]
    builder.finish()
    rows += [copied(frame) for frame in builder.closed()]
    return rows


def copied(frame: Frame) -> tuple:
    return (
        frame.source_ns,
        frame.gap,
        frame.values.tobytes(),
        frame.valid.tobytes(),
        frame.status.tobytes(),
        frame.seq,
    )


def accounted(builder: FrameBuilder) -> int:
    counts = builder.counters()
    return sum(counts[name] for name in DISPOSED) + builder.pending


def lorenz_like(n: int, seed: int) -> np.ndarray:
    """Two smooth signals, float64[n, 2]."""
    t = np.arange(n) * 0.1 + seed
    return np.column_stack([np.sin(t), np.cos(0.7 * t)])


MEASURED = [Tag("a"), Tag("b")]


# --- properties ---

tags_strategy = st.lists(
    st.builds(
        Tag,
        name=st.just("t"),
        kind=st.sampled_from([TagKind.MEASURED, TagKind.SETPOINT, TagKind.COUNTER]),
        quality=st.sampled_from(["hold", "mask", "stop"]),
        uncertain=st.sampled_from(["use", "use", "hold", "mask", "stop"]),
        stale_after_ns=st.sampled_from([None, None, 0, P, 5 * P // 2, 100 * P]),
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def samples_strategy(draw: st.DrawFn, n_tags: int) -> list[tuple[int, int, float, int]]:
    """Samples in the order of their stamps, with jitter, doubles, silences, holes, Bad, NaN and overflow."""
    n = draw(st.integers(1, 120))
    stamp, samples = T0, []
    for i in range(n):
        stamp += draw(st.sampled_from([0, 0, 1, P // 10, P // 2, P, P, P + 3, 3 * P, 7 * P, 40 * P]))
        value = draw(st.sampled_from([float(i), float(i), float(i), math.nan, math.inf]))
        status = draw(st.sampled_from([GOOD, GOOD, GOOD, GOOD, BAD, UNCERTAIN, OVERFLOW]))
        samples.append((draw(st.integers(0, n_tags - 1)), stamp, value, status))
    return samples


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_chunks_never_change_rows_and_every_sample_is_accounted_for(data: st.DataObject) -> None:
    tags = data.draw(tags_strategy)
    samples = data.draw(samples_strategy(len(tags)))
    lateness = data.draw(st.sampled_from([0, P // 2, P, 5 * P]))
    max_hold = data.draw(st.integers(1, 12))
    out_rows = data.draw(st.integers(1, 8))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=12)))
    edges = [0, *cuts, len(samples)]
    chunks = [samples[a:b] for a, b in itertools.pairwise(edges)]
    whole = FrameBuilder(tags, P, lateness, max_hold)
    parts = FrameBuilder(tags, P, lateness, max_hold, rows=out_rows)
    expected = stream(whole, [samples])
    assert stream(parts, chunks) == expected
    assert parts.counters() == whole.counters()
    assert whole.counters()["delivered"] == len(samples) == accounted(whole)
    record = rows_from_samples(tags, P, *arrays(samples), lateness_ns=lateness, max_hold=max_hold)
    assert record.source_ns.tolist() == [row[0] for row in expected]
    assert record.values.tobytes() == b"".join(row[2] for row in expected)
    assert record.valid.tobytes() == b"".join(row[3] for row in expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_the_kernel_equals_its_slow_twin(data: st.DataObject) -> None:
    tags = data.draw(tags_strategy)
    samples = data.draw(samples_strategy(len(tags)))
    lateness = data.draw(st.sampled_from([0, P // 2, P, 5 * P]))
    max_hold = data.draw(st.integers(1, 12))
    twin = Twin(tags, P, lateness, max_hold)
    for sample in samples:
        twin.feed(sample)
    twin.finish()
    rows = stream(FrameBuilder(tags, P, lateness, max_hold), [samples])
    assert [(row[0], row[1]) for row in rows] == [(row[0], row[1]) for row in twin.rows]
    for row, (_, _, values, valid) in zip(rows, twin.rows, strict=True):
        assert np.array_equal(np.frombuffer(row[2]), values, equal_nan=True)
        assert list(row[3]) == valid


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_arrival_out_of_step_within_lateness_gives_the_rows_of_the_stamps(data: st.DataObject) -> None:
    """Tags that report every period may arrive in any order across tags, by less than the lateness."""
    n_tags, n_rows, lateness = data.draw(st.integers(1, 4)), 60, 3 * P
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    tags = [Tag(f"t{j}") for j in range(n_tags)]
    skew = rng.integers(-P // 5, P // 5, n_tags)
    samples = [(j, int(T0 + k * P + skew[j]), float(k), GOOD) for k in range(n_rows) for j in range(n_tags)]
    samples.sort(key=lambda s: s[1])
    delay = {j: int(rng.integers(0, lateness // 2)) for j in range(n_tags)}
    arrived = sorted(samples, key=lambda s: s[1] + delay[s[0]])
    expected = stream(FrameBuilder(tags, P, lateness, 20), [samples])
    assert (
        stream(FrameBuilder(tags, P, lateness, 20), [[s] for s in arrived])[START_PERIODS:]
        == expected[START_PERIODS:]
    )


# --- the demand ---


def test_jitter_and_skew_of_40_ms_at_100_ms_give_the_aligned_rows() -> None:
    rng = np.random.default_rng(1)
    n = 2000
    values = lorenz_like(n, 1)
    grid = T0 + np.arange(n) * P
    index = np.repeat(np.arange(2, dtype=np.int32), n)
    stamps = np.concatenate([grid + rng.integers(-40_000_000, 40_000_001, n) for _ in range(2)])
    counts: dict[str, int] = {}
    record = rows_from_samples(MEASURED, P, index, stamps, values.T.ravel(), counts=counts)
    assert abs(len(record) - n) <= 1
    assert record.gap.sum() == 1 and record.valid.all()
    assert abs(int(record.source_ns[0]) - int(grid[0])) < 10_000_000
    # a stamp at the very edge of its window may fall into the next row; all others are the aligned rows
    same = (record.values[: n - 1] == values[: n - 1]).mean()
    assert same > 0.99, counts


def test_change_only_reporting_gives_every_row_with_the_last_value_held() -> None:
    n = 3000
    values = np.round(lorenz_like(n, 2), 1)
    samples = [
        (j, T0 + k * P, float(values[k, j]), GOOD)
        for k in range(n)
        for j in range(2)
        if k == 0 or values[k, j] != values[k - 1, j]
    ]
    assert len(samples) < 0.8 * 2 * n
    record = rows_from_samples(MEASURED, P, *arrays(samples))
    assert abs(len(record) - n) <= 1
    assert record.gap.sum() == 1
    # where a tag has changed evenly every second row and then changes sooner, its new value comes one row
    # late
    assert (record.values == values[: len(record)]).mean() > 0.999


def test_100_ms_beside_1_s_gives_a_row_per_100_ms_and_both_valid() -> None:
    n = 1000
    fast = [(0, T0 + k * P, float(k), GOOD) for k in range(n)]
    slow = [(1, T0 + k * P, float(k), GOOD) for k in range(0, n, 10)]
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = stream(builder, [[s] for s in sorted(fast + slow, key=lambda s: s[1])])
    assert abs(len(rows) - n) <= 1
    assert all(row[3] == b"\1\1" for row in rows)
    assert builder.counters()["stale"] == 0


def test_a_slow_tag_costs_no_waiting_between_its_samples() -> None:
    """Once its interval is learnt the row closes with the sample of the fast tag, not a period later."""
    builder = FrameBuilder(MEASURED, P, P, 20)
    ready = []
    for k in range(400):
        stamp = T0 + k * P
        n = builder.push(*arrays([(0, stamp, 1.0, GOOD), *([(1, stamp, 1.0, GOOD)] if k % 10 == 0 else [])]))
        newest = [frame.source_ns for frame in builder.closed()]
        assert n == len(newest)
        if k >= 200:
            ready.append(bool(newest) and newest[-1] == stamp)
    assert all(ready)


def test_a_row_closes_with_its_last_tag_and_not_before() -> None:
    builder = FrameBuilder([Tag("a"), Tag("b"), Tag("set", kind=TagKind.SETPOINT)], P, P, 20)
    stream_until = 40
    builder.push(*arrays([(2, T0 - 3600 * 10**9, 5.0, GOOD)]))
    list(builder.closed())
    for k in range(stream_until):
        stamp = T0 + k * P
        first = builder.push(*arrays([(0, stamp, 1.0, GOOD)]))
        list(builder.closed())
        second = builder.push(*arrays([(1, stamp, 2.0, GOOD)]))
        rows = [copied(frame) for frame in builder.closed()]
        if k > 25:  # the set-point that never changes has stopped being waited for
            assert (first, second) == (0, 1)
            assert rows[0][0] == stamp
            assert np.frombuffer(rows[0][2]).tolist() == [1.0, 2.0, 5.0]


def test_values_set_long_ago_start_no_rows_but_are_held_into_the_first() -> None:
    old = [(2, T0 - 3600 * 10**9, 5.0, GOOD), (3, T0 - 60 * 10**9, 7.0, GOOD)]
    now = [(j, T0 + k * P, float(k), GOOD) for k in range(30) for j in range(2)]
    tags = [*MEASURED, Tag("set", kind=TagKind.SETPOINT), Tag("constant")]
    rows = stream(FrameBuilder(tags, P, P, 20), [old + now[:4], now[4:]])
    assert len(rows) == 30
    assert rows[0][0] == T0
    assert np.frombuffer(rows[0][2]).tolist() == [0.0, 0.0, 5.0, 7.0]
    assert rows[0][3] == b"\1\1\1\0"  # the measured one is stale


# --- gaps and holds ---


def feed_rows(builder: FrameBuilder, start: int, n: int, tags: tuple[int, ...] = (0, 1)) -> list[tuple]:
    rows = []
    for k in range(start, start + n):
        builder.push(*arrays([(j, T0 + k * P, float(k), GOOD) for j in tags]))
        rows += [copied(frame) for frame in builder.closed()]
    return rows


def test_a_hole_longer_than_max_hold_is_a_gap_and_keeps_the_phase() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = feed_rows(builder, 0, 50) + feed_rows(builder, 100, 50)
    builder.finish()
    rows += [copied(frame) for frame in builder.closed()]
    assert [row[0] for row in rows] == [T0 + k * P for k in (*range(50), *range(100, 150))]
    assert [k for k, row in enumerate(rows) if row[1]] == [0, 50]
    assert rows[50][3] == b"\1\1"
    assert builder.counters()["gaps"] == 1


def test_a_hole_of_max_hold_periods_is_held_without_a_gap() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = feed_rows(builder, 0, 50) + feed_rows(builder, 69, 20)
    builder.finish()
    rows += [copied(frame) for frame in builder.closed()]
    assert [row[0] for row in rows] == [T0 + k * P for k in range(89)]
    assert sum(row[1] for row in rows) == 1
    assert builder.counters()["held"] == 2 * 19


def test_a_lost_connection_is_a_gap_and_ends_the_hold_of_a_setpoint() -> None:
    tags = [*MEASURED, Tag("set", kind=TagKind.SETPOINT)]
    builder = FrameBuilder(tags, P, P, 20)
    builder.push(*arrays([(2, T0, 5.0, GOOD)]))
    assert list(builder.closed()) == []
    before = feed_rows(builder, 0, 50)
    assert before[-1][3] == b"\1\1\1"
    builder.connection_lost()
    before += [copied(frame) for frame in builder.closed()]
    returning = RETURN_NS // P
    after = feed_rows(builder, 60, returning + 30)
    builder.finish()
    after += [copied(frame) for frame in builder.closed()]
    assert [row[1] for row in after] == [True] + [False] * (len(after) - 1)
    assert after[0][3] == b"\1\1\0"  # the set-point did not come back, for which the rows have waited
    assert [row[0] for row in after] == [T0 + k * P for k in range(60 + returning, 90 + returning)]
    assert builder.counters()["delivered"] == accounted(builder)


def test_an_idle_connection_makes_held_rows_up_to_max_hold_and_then_none() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = feed_rows(builder, 0, 30)
    for k in range(30, 100):
        builder.advance(T0 + k * P)
        rows += [copied(frame) for frame in builder.closed()]
    assert [row[0] for row in rows] == [T0 + k * P for k in range(50)]
    rows = feed_rows(builder, 100, 5)
    assert rows[0][1] and rows[0][0] == T0 + 100 * P


def test_a_measured_tag_is_stale_after_max_hold_and_a_setpoint_never() -> None:
    tags = [*MEASURED, Tag("set", kind=TagKind.SETPOINT)]
    builder = FrameBuilder(tags, P, P, 20)
    rows = stream(
        builder,
        [[(1, T0, 1.0, GOOD), (2, T0, 5.0, GOOD)], *[[(0, T0 + k * P, float(k), GOOD)] for k in range(100)]],
    )
    valid = np.array([list(row[3]) for row in rows])
    assert valid[:, 0].all() and valid[:, 2].all()
    assert valid[:21, 1].all() and not valid[21:, 1].any()
    assert builder.counters()["stale"] == len(rows) - 21


def test_a_clock_set_back_an_hour_starts_the_rows_again_there() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    feed_rows(builder, 0, 100)
    rows = feed_rows(builder, -36_000, 100)
    assert len(rows) > 60
    assert rows[0][1] and rows[0][0] < T0
    assert builder.counters()["clock_back"] == 1
    assert builder.counters()["delivered"] == accounted(builder)


# --- quality ---


@pytest.mark.parametrize(("quality", "valid", "value"), [("hold", 1, 9.0), ("mask", 0, math.nan)])
def test_a_bad_sample_is_held_or_masked_by_policy(quality: str, valid: int, value: float) -> None:
    tags = [Tag("a"), Tag("b", quality=quality)]  # type: ignore[arg-type]
    builder = FrameBuilder(tags, P, P, 20)
    feed_rows(builder, 0, 10)
    rows = []
    for k in range(10, 14):
        builder.push(*arrays([(0, T0 + k * P, 1.0, GOOD), (1, T0 + k * P, 77.0, BAD)]))
        rows += [copied(frame) for frame in builder.closed()]
    assert len(rows) == 4
    for row in rows:
        assert list(row[3]) == [1, valid]
        assert np.array_equal(np.frombuffer(row[2])[1], value, equal_nan=True)
    assert builder.counters()["bad"] == 4


def test_a_bad_value_is_held_no_longer_than_max_hold() -> None:
    tags = [Tag("a"), Tag("b", quality="hold")]
    builder = FrameBuilder(tags, P, P, 20)
    feed_rows(builder, 0, 10)
    rows = []
    for k in range(10, 50):
        builder.push(*arrays([(0, T0 + k * P, 1.0, GOOD), (1, T0 + k * P, 77.0, BAD)]))
        rows += [copied(frame) for frame in builder.closed()]
    assert [row[3][1] for row in rows] == [1] * 20 + [0] * 20


def test_policy_stop_makes_no_rows_while_bad_and_a_gap_afterwards() -> None:
    tags = [Tag("a"), Tag("b", quality="stop")]
    builder = FrameBuilder(tags, P, P, 20)
    feed_rows(builder, 0, 10)
    for k in range(10, 15):
        builder.push(*arrays([(0, T0 + k * P, 1.0, GOOD), (1, T0 + k * P, 77.0, BAD)]))
        assert list(builder.closed()) == []
    rows = feed_rows(builder, 15, 5)
    assert [row[0] for row in rows] == [T0 + k * P for k in range(15, 20)]
    assert [row[1] for row in rows] == [True, False, False, False, False]
    assert builder.counters()["skipped"] == 10


def test_uncertain_is_used_and_counted_and_nan_is_masked_and_counted() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = stream(
        builder, [[(0, T0 + k * P, float(k), UNCERTAIN), (1, T0 + k * P, math.inf, GOOD)] for k in range(10)]
    )
    assert all(list(row[3]) == [1, 0] for row in rows)
    counts = builder.counters()
    assert counts["uncertain"] == 10 and counts["non_finite"] == 10 and counts["masked"] == 10
    assert all(np.isnan(np.frombuffer(row[2])[1]) for row in rows)


@pytest.mark.parametrize(("uncertain", "valid", "value"), [
    ("use", 1, 2.0), ("hold", 1, 1.0), ("mask", 0, math.nan),
])
def test_an_uncertain_sample_is_used_held_over_or_masked_by_policy(uncertain: str, valid: int, value: float) -> None:
    tags = [Tag("a", uncertain=uncertain), Tag("b")]
    builder = FrameBuilder(tags, P, P, 20)
    samples = [(j, T0 + k * P, 1.0 + (j == 0 and k == 9), UNCERTAIN if (j, k) == (0, 9) else GOOD)
               for k in range(12) for j in (0, 1)]
    builder.push(*arrays(samples))
    rows = [(frame.values[0], frame.valid[0], frame.status[0]) for frame in builder.closed()]
    assert rows[9][1] == valid and (rows[9][0] == value or math.isnan(value))
    assert builder.counters()["uncertain"] == 1 and rows[8][1] == rows[10][1] == 1


def test_a_tag_with_an_age_limit_of_its_own_is_stale_after_it_whatever_its_kind() -> None:
    tags = [Tag("short", stale_after_ns=3 * P), Tag("long", stale_after_ns=15 * P),
            Tag("set-point", kind=TagKind.SETPOINT, stale_after_ns=6 * P), Tag("moves")]
    builder = FrameBuilder(tags, P, P, 10)
    samples = [(j, T0 + k * P, 1.0, GOOD) for k in range(40) for j in range(4) if j == 3 or k < 10]
    builder.push(*arrays(samples))
    valid = np.array([frame.valid.copy() for frame in builder.closed()])
    assert [int(np.flatnonzero(valid[:, j] == 0)[0]) for j in range(3)] == [9 + 4, 9 + 16, 9 + 7]
    assert valid[:, 3].all()


def test_the_overflow_bit_is_counted_and_the_value_used() -> None:
    builder = FrameBuilder([Tag("a")], P, P, 20)
    rows = stream(builder, [[(0, T0 + k * P, float(k), OVERFLOW)] for k in range(10)])
    assert builder.counters()["overflowed"] == 10
    assert len(rows) == 10 and all(row[3] == b"\1" for row in rows)


def test_of_two_samples_with_one_stamp_the_later_arrival_wins() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    samples = [
        [(0, T0 + k * P, 1.0, GOOD), (0, T0 + k * P, 2.0, GOOD), (1, T0 + k * P, 3.0, GOOD)]
        for k in range(20)
    ]
    rows = stream(builder, samples)
    assert all(np.frombuffer(row[2]).tolist() == [2.0, 3.0] for row in rows)
    assert builder.counters()["duplicate"] == 20


def test_the_later_arrival_wins_in_a_notification_whose_stamps_go_back_too() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    feed_rows(builder, 0, 20)
    builder.push(
        *arrays([(1, T0 + 21 * P, 9.0, GOOD), (0, T0 + 20 * P, 1.0, GOOD), (0, T0 + 20 * P, 2.0, GOOD)])
    )
    list(builder.closed())
    builder.finish()
    rows = [copied(frame) for frame in builder.closed()]
    assert np.frombuffer(rows[0][2])[0] == 2.0
    assert builder.counters()["duplicate"] == 1


def test_a_sample_older_than_one_used_is_late_and_dropped() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20)
    feed_rows(builder, 0, 20)
    builder.push(*arrays([(0, T0 + 5 * P, 99.0, GOOD)]))
    assert list(builder.closed()) == []
    rows = feed_rows(builder, 20, 2)
    assert np.frombuffer(rows[0][2]).tolist() == [20.0, 20.0]
    assert builder.counters()["late"] == 1


def test_a_notification_with_one_tag_after_the_other_gives_every_row() -> None:
    """Servers send the queue of one item, then of the next: stamps go back inside a notification."""
    builder = FrameBuilder(MEASURED, P, P, 20)
    rows = []
    for block in range(10):
        ks = range(block * 10, block * 10 + 10)
        builder.push(*arrays([(j, T0 + k * P, float(k), GOOD) for j in range(2) for k in ks]))
        rows += [copied(frame) for frame in builder.closed()]
    assert [row[0] for row in rows] == [T0 + k * P for k in range(100)]
    assert all(np.frombuffer(row[2]).tolist() == [k, k] for k, row in enumerate(rows))


# --- bounds ---


def test_a_burst_longer_than_the_output_loses_no_row() -> None:
    builder = FrameBuilder(MEASURED, P, P, 20, rows=4)
    samples = [(j, T0 + k * P, float(k), GOOD) for k in range(1000) for j in range(2)]
    rows = stream(builder, [samples])
    assert [row[5] for row in rows] == list(range(1000))
    assert [row[0] for row in rows] == [T0 + k * P for k in range(1000)]


def test_undrained_rows_are_refused_to_be_lost() -> None:
    builder = FrameBuilder([Tag("a")], P, P, 20)
    builder.push(*arrays([(0, T0 + k * P, 1.0, GOOD) for k in range(30)]))
    with pytest.raises(RuntimeError, match="drain"):
        builder.push(*arrays([(0, T0 + 31 * P, 1.0, GOOD)]))


def test_a_tag_index_outside_the_group_is_skipped_and_counted() -> None:
    builder = FrameBuilder([Tag("a")], P, P, 20)
    stream(builder, [[(7, T0, 1.0, GOOD), (-1, T0, 1.0, GOOD), (0, T0, 1.0, GOOD)]])
    assert builder.counters()["skipped"] == 2
    assert builder.counters()["delivered"] == 3 == accounted(builder)


def test_push_and_row_do_not_grow_memory() -> None:
    n_tags = 20
    builder = FrameBuilder([Tag(f"t{j}") for j in range(n_tags)], P, P, 20)
    frame = Frame.empty(n_tags)
    index, value = np.arange(n_tags, dtype=np.int32), np.zeros(n_tags)
    stamps, status = np.zeros(n_tags, np.int64), np.zeros(n_tags, np.uint32)

    def run(first: int, n: int) -> None:
        for k in range(first, first + n):
            stamps[:] = T0 + k * P
            builder.push(index, stamps, value, status)
            while builder.next_row(frame):
                pass

    run(0, 200)
    gc.collect()
    tracemalloc.start()
    run(200, 50)
    start, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    run(250, 10_000)
    end, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - start < 4096
    assert end - start < 1024
    assert builder.counters()["rows"] == 10_250


# --- tables ---


def test_a_table_on_the_grid_comes_back_as_it_is() -> None:
    values = lorenz_like(500, 3)
    values[7, 1] = math.nan
    record = record_from_columns(T0 + np.arange(500) * P, values, ["a", "b"], truth=(np.arange(500) > 250))
    assert isinstance(record, Record) and record.period_ns == P
    assert np.array_equal(record.values, values, equal_nan=True)
    assert record.valid[7].tolist() == [1, 0] and record.valid.sum() == 999
    assert record.truth is not None and np.array_equal(record.truth, np.arange(500) > 250)
    assert [tag.name for tag in record.tags] == ["a", "b"]


def test_a_table_with_a_hole_gets_a_gap() -> None:
    stamps = T0 + np.r_[np.arange(100), np.arange(200, 300)] * P
    record = record_from_columns(stamps, np.ones((200, 1)), ["a"], P)
    assert len(record) == 200
    assert np.flatnonzero(record.gap).tolist() == [0, 100]


def test_stamps_that_do_not_increase_are_told_with_row_and_stamp() -> None:
    stamps = T0 + np.arange(10) * P
    stamps[4] = stamps[2]
    with pytest.raises(RecordError, match=r"my\.csv: row 4 .*2023-11-14T22:13:20\.200000Z.*row 3"):
        record_from_columns(stamps, np.ones((10, 1)), ["a"], where="my.csv")


def test_a_table_whose_shape_does_not_fit_is_refused() -> None:
    with pytest.raises(RecordError, match="10 stamps and 2 tags"):
        record_from_columns(T0 + np.arange(10) * P, np.ones((10, 1)), ["a", "b"])
    with pytest.raises(RecordError, match="no rows"):
        record_from_columns([], np.ones((0, 1)), ["a"])


def test_counter_names_are_those_of_the_contract() -> None:
    wanted = {
        "delivered",
        "used",
        "held",
        "masked",
        "late",
        "duplicate",
        "overflowed",
        "lost",
        "non_finite",
        "null_timestamp",
        "gaps",
        "stale",
    }
    assert wanted <= set(COUNTERS)
