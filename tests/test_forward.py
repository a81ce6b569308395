"""What a server missed, within bounds that say so; and the rows of a gap, from history, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import tag

from opcua_detector.api import Tag
from opcua_detector.client import Session, forward, read_history
from opcua_detector.client.forward import MOST_CHARS, Continuity, EventsAway, Gap, bounded, rows_of_gap
from opcua_detector.config import ServerConfig
from opcua_detector.errors import NodeProblem
from opcua_detector.frames import iso_utc
from sim_server.testing import RunningPlant, running_plant

S = 10**9
T0 = 1_700_000_000 * S


# --- events ---


def test_only_alerts_of_the_time_away_are_told_the_newest_first_and_once() -> None:
    away = EventsAway(24 * 3600 * S)
    away.note(1, T0, T0 + S, "x1 is 31", T0 + S)  # seen by the server
    assert away.end(T0 + 2 * S) == ""
    away.begin(T0 + 10 * S)
    away.begin(T0 + 90 * S)  # lost again before it was back: it is away since the first time
    away.note(2, T0 + 20 * S, None, "", T0 + 20 * S)
    away.note(2, T0 + 20 * S, None, "x1 is 32", T0 + 21 * S)
    away.note(2, T0 + 20 * S, T0 + 30 * S, "x1 is 32", T0 + 30 * S)
    away.note(3, T0 + 40 * S, None, "x3 is 7", T0 + 40 * S)
    told = away.end(T0 + 100 * S)
    day = iso_utc(T0)[:11]
    assert told == (f"2 alerts not seen here from {day}22:13:30Z to {day}22:15:00Z; "
                    f"no 3 from {day}22:14:00Z stands: x3 is 7; no 2 from {day}22:13:40Z to {day}22:13:50Z: x1 is 32")
    assert away.end(T0 + 200 * S) == "" and away.dropped == 0
    away.begin(T0 + 300 * S)
    assert away.end(T0 + 301 * S) == ""


def test_an_alert_that_was_raised_before_and_cleared_while_the_server_was_away_is_told() -> None:
    away = EventsAway(24 * 3600 * S)
    away.note(4, T0, None, "x1", T0)
    away.begin(T0 + S)
    away.note(4, T0, T0 + 5 * S, "x1", T0 + 5 * S)
    assert "no 4 from" in away.end(T0 + 9 * S)


@settings(max_examples=50)
@given(st.integers(0, 400), st.integers(0, 300))
def test_bounds_in_number_length_and_age_hold_and_every_alert_beyond_them_is_counted(n: int, chars: int) -> None:
    away = EventsAway(3600 * S, most=100)
    away.begin(T0)
    for k in range(1, n + 1):
        away.note(k, T0 + k * S, T0 + k * S, "y" * chars, T0 + k * 60 * S)
    told = away.end(T0 + (n + 1) * 60 * S)
    shown = told.count("; no ")
    assert len(told) <= MOST_CHARS + 40 and shown <= min(n, 60)
    assert shown + away.dropped == n  # nothing is left out in silence
    if n:
        assert told.startswith(f"{n} alert")
        assert (f"{n - shown} in the store only" in told) == (shown < n)


# --- gaps ---


@given(st.integers(1, 10**6), st.integers(1, 2000), st.integers(0, 10**6))
def test_of_a_long_gap_the_newest_part_is_read(rows: int, n_tags: int, most_rows: int) -> None:
    period = 10**7
    gap = Gap(T0, T0 + (rows + 1) * period)
    assert gap.rows(period) == rows
    part = bounded(gap, n_tags, period, most_rows * period)
    assert part.before_ns == gap.before_ns and part.after_ns >= gap.after_ns
    assert part.rows(period) <= min(rows, most_rows) and part.rows(period) * n_tags <= forward.MOST_VALUES
    if most_rows >= rows + 1 and (rows + 1) * n_tags <= forward.MOST_VALUES:
        assert part == gap


PERIOD = 10**7
HOUR = 3600 * S


class Source:
    """A plant's rows as a group gets them: a clock that is set, rows that are late, times without a connection."""

    def __init__(self, clock_ns: int = T0) -> None:
        self.here = Continuity(PERIOD, PERIOD)
        self.ahead_ns = clock_ns  # clock of the source less ours, which begins at 0
        self.now_ns = 0
        self.live: list[int] = []

    def run(self, rows: int, *, late_ns: int = 0, gap: bool = False) -> list[Gap]:
        """Let rows come, the first of them behind a gap; return what is missing before it."""
        found: list[Gap] = []
        for k in range(rows):
            self.now_ns += PERIOD
            stamp = self.now_ns + self.ahead_ns
            missing = self.here.row(stamp, (gap or not self.live) and k == 0, self.now_ns + late_ns)
            assert k == 0 or not missing
            found += missing
            self.live.append(stamp)
        return found


def test_a_gap_is_what_passed_by_our_clock_whatever_the_source_says_of_the_time() -> None:
    plant = Source()
    assert plant.run(1000) == []
    plant.now_ns += 60 * S
    assert plant.run(1000, gap=True) == [Gap(plant.live[999], plant.live[1000])]
    plant.ahead_ns += HOUR  # the clock is set forward, and nothing is missed
    assert plant.run(1000, gap=True) == []
    plant.ahead_ns -= HOUR  # and right again
    assert plant.run(1000, gap=True) == []
    plant.ahead_ns -= HOUR
    assert plant.run(1000, gap=True) == []
    plant.ahead_ns += HOUR  # the hour between is full of rows that are there
    assert plant.run(1000, gap=True) == []
    plant.now_ns += 60 * S  # it is set while there is no connection
    plant.ahead_ns += HOUR
    first, second = plant.run(1000, gap=True)
    assert first.after_ns == plant.live[-1001] and second.before_ns == plant.live[-1000]
    assert all(60 * S <= gap.before_ns - gap.after_ns <= 63 * S for gap in (first, second))


def test_rows_that_came_late_before_the_connection_was_lost_do_not_shorten_the_gap() -> None:
    plant = Source()
    plant.run(500)
    plant.run(500, late_ns=8 * S)  # the last ones before the loss had been under way for 8 s
    plant.now_ns += 20 * S
    (gap,) = plant.run(10, gap=True)
    assert gap == Gap(plant.live[999], plant.live[1000]) and 20 * S <= gap.before_ns - gap.after_ns < 21 * S


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(20, 300), st.integers(0, 90),
                          st.sampled_from([-HOUR, -60 * S, 0, 0, 60 * S, HOUR])), max_size=8))
def test_what_is_looked_for_is_never_there_already_and_never_longer_than_the_outage(
    outages: list[tuple[int, int, int]],
) -> None:
    plant = Source()
    plant.run(300)
    stored: list[tuple[int, int]] = []
    for rows, away_s, jump_ns in outages:
        plant.now_ns += away_s * S
        plant.ahead_ns += jump_ns
        missing = plant.run(rows, gap=True)
        parts = [part for gap in missing for part in plant.here.without(gap)]
        looked_for = sum(part.before_ns - part.after_ns for part in parts)
        assert looked_for <= 2 * (away_s * S + 2 * S) if jump_ns else looked_for <= (away_s + 1) * S
        if jump_ns == 0 and away_s > 1:  # all that is missing and not there by another time of the same name
            at = {stamp // PERIOD for stamp in plant.live} | {k for a, b in stored for k in range(a, b + 1)}
            lost = set(range(plant.live[-rows - 1] // PERIOD + 1, plant.live[-rows] // PERIOD)) - at
            reached = {k for one in parts for k in range(one.after_ns // PERIOD + 1, one.before_ns // PERIOD)}
            assert lost <= reached
        for part in parts:
            inside = [one for one in plant.live if part.after_ns < one < part.before_ns]
            assert not inside
            assert not any(a < part.before_ns // PERIOD and b > part.after_ns // PERIOD for a, b in stored)
        for part in parts:  # all of it is read back
            first, last = part.after_ns + PERIOD, part.before_ns - PERIOD
            plant.here.add(first, last)
            stored.append((first // PERIOD, last // PERIOD))


def test_what_is_there_is_remembered_within_bounds() -> None:
    here = Continuity(PERIOD, PERIOD)
    for k in range(3 * forward.MOST_SPANS):
        here.add(T0 + k * HOUR, T0 + k * HOUR + S)
    newest = T0 + (3 * forward.MOST_SPANS - 1) * HOUR
    assert here.without(Gap(newest - S, newest + 2 * S)) == [Gap(newest - S, newest), Gap(newest + S, newest + 2 * S)]
    assert here.without(Gap(newest, newest + S)) == []
    assert here.without(Gap(T0 - S, T0 + 2 * S)) == [Gap(T0 - S, T0 + 2 * S)]  # forgotten


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    """A plant with history."""
    with running_plant("lorenz", history_rows=5000, seed=0) as running:
        yield running


def tags() -> list[Tag]:
    """Two tags of the plant."""
    return [Tag(one["name"], one["node"]) for one in (tag("x1"), tag("x3"))]


def settings_of(plant: RunningPlant, folder: Path) -> ServerConfig:
    """How to reach it."""
    return ServerConfig(name="plant", endpoint=plant.endpoint, policy="None", insecure=True, pki=folder)


@pytest.mark.parametrize("apart", [False, True], ids=["one server", "two servers"])
async def test_the_slices_of_a_gap_are_its_history_row_by_row_and_nothing_else(
    plant: RunningPlant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool,
) -> None:
    monkeypatch.setattr(forward, "SLICE_VALUES", 500)
    period = 10**7
    session, second = Session(settings_of(plant, tmp_path)), Session(settings_of(plant, tmp_path))
    await session.open()
    await second.open()
    try:
        begin = plant.start_ns - 4000 * period
        whole = await read_history(session, tags(), begin, plant.start_ns - 100 * period, period)
        gap = Gap(int(whole.source_ns[500]), int(whole.source_ns[2500]))
        parts = [record async for record in rows_of_gap(
            [session, second if apart else session], tags(), gap, period, lateness_ns=period, max_hold=20)]
    finally:
        await session.close()
        await second.close()
    assert len(parts) >= 7
    stamps = np.concatenate([one.source_ns for one in parts])
    assert (np.diff(stamps) > 0).all() and stamps[0] > gap.after_ns and stamps[-1] < gap.before_ns
    assert np.array_equal(stamps, whole.source_ns[501:2500])
    assert np.array_equal(np.concatenate([one.values for one in parts]), whole.values[501:2500])


async def test_a_gap_beyond_the_history_has_no_rows_and_a_node_without_history_says_so(
    plant: RunningPlant, tmp_path: Path,
) -> None:
    period = 10**7
    session = Session(settings_of(plant, tmp_path))
    await session.open()
    try:
        old = Gap(plant.start_ns - 10**6 * period, plant.start_ns - 990_000 * period)
        both = [session, session]
        assert [one async for one in rows_of_gap(both, tags(), old, period, lateness_ns=period, max_hold=20)] == []
        lost = [Tag("a", "nsu=urn:opcua-detector:results;s=lorenz.Score")]
        with pytest.raises(NodeProblem):
            _ = [one async for one in rows_of_gap(
                [session], lost, Gap(old.after_ns, old.after_ns + 100 * period), period, lateness_ns=period,
                max_hold=20)]
    finally:
        await session.close()


