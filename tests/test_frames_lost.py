"""After a lost connection: no row before every tag is back, one gap, every sample accounted for, no endless wait."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frames import BAD, GOOD, T0, P, accounted, arrays, copied

from opcua_detector.api import Tag, TagKind
from opcua_detector.frames import RETURN_NS, FrameBuilder

TAGS = [Tag("a"), Tag("b"), Tag("c")]
BOTH = b"\1\1\1"
WAITING = 0x80320000  # BadWaitingForInitialData


def push(builder: FrameBuilder, *samples: tuple[int, int, float, int]) -> list[tuple]:
    """Push (tag, period, value, status) and return the rows that close."""
    builder.push(*arrays([(j, T0 + int(k * P), value, status) for j, k, value, status in samples]))
    return [copied(frame) for frame in builder.closed()]


def moving(builder: FrameBuilder, periods: range, *tags: int) -> list[tuple]:
    """Let these tags deliver once per period."""
    return [row for k in periods for row in push(builder, *((j, k, float(k), GOOD) for j in tags))]


def lose(builder: FrameBuilder) -> list[tuple]:
    builder.connection_lost()
    return [copied(frame) for frame in builder.closed()]


def running() -> tuple[FrameBuilder, list[tuple]]:
    """A builder that has made rows of all three tags and has just lost the connection."""
    builder = FrameBuilder(TAGS, P, P, 20)
    rows = moving(builder, range(50), 0, 1, 2)
    return builder, rows + lose(builder)


def test_tags_that_come_back_one_after_the_other_make_no_row_until_all_are_there() -> None:
    builder, before = running()
    assert len(before) == 50 and builder.counters()["rows"] == 50
    assert moving(builder, range(60, 80), 1) == []
    assert moving(builder, range(80, 90), 1, 2) == []
    after = moving(builder, range(90, 120), 0, 1, 2)
    assert [row[1] for row in after] == [True] + [False] * (len(after) - 1)
    assert all(row[3] == BOTH for row in after)
    assert after[0][0] >= T0 + 89 * P
    assert [row[5] for row in before + after] == list(range(len(before) + len(after)))  # seq counts what is seen
    counts = builder.counters()
    assert counts["rows"] == len(before) + len(after) and counts["gaps"] == 1 and counts["masked"] == 0
    assert counts["skipped"] >= 35 and counts["delivered"] == accounted(builder)


@pytest.mark.parametrize("status", [BAD, BAD | 0x340000])
def test_a_tag_that_comes_back_bad_is_back(status: int) -> None:
    builder, _ = running()
    assert moving(builder, range(60, 70), 1, 2) == []
    push(builder, (0, 70, np.nan, status))
    after = moving(builder, range(70, 90), 1, 2)
    assert after[0][1] and after[0][3] == b"\0\1\1"


def test_a_server_that_waits_for_its_own_first_value_is_waited_for() -> None:
    builder, _ = running()
    push(builder, (0, 60, np.nan, WAITING))
    assert moving(builder, range(60, 80), 1, 2) == []
    assert moving(builder, range(80, 90), 0, 1, 2)[0][3] == BOTH


def test_a_tag_that_never_comes_back_is_waited_for_once_and_no_longer_than_the_limit() -> None:
    builder, _ = running()
    limit = RETURN_NS // P
    after = moving(builder, range(60, 60 + limit + 40), 1, 2)
    assert after[0][:2] == (T0 + (60 + limit) * P, True) and after[0][3] == b"\0\1\1"
    assert sum(row[1] for row in after) == 1
    lose(builder)
    start = 60 + limit + 50
    again = moving(builder, range(start, start + 20), 1, 2)  # it was not there before this loss
    assert again[0][:2] == (T0 + start * P, True)
    assert builder.counters()["delivered"] == accounted(builder)


def test_a_loss_while_tags_are_awaited_begins_the_wait_anew() -> None:
    builder, before = running()
    limit = RETURN_NS // P
    assert moving(builder, range(60, 60 + limit - 10), 1, 2) == []
    assert lose(builder) == []
    start = 60 + limit
    assert moving(builder, range(start, start + limit - 10), 1, 2) == []
    after = moving(builder, range(start + limit - 10, start + limit + 20), 0, 1, 2)
    assert after[0][1] and all(row[3] == BOTH for row in after)
    assert builder.counters()["gaps"] == 1 and builder.counters()["rows"] == len(before) + len(after)
    assert builder.counters()["delivered"] == accounted(builder)


def test_a_clock_set_back_while_a_tag_is_awaited_does_not_prolong_the_wait() -> None:
    builder, _ = running()
    assert moving(builder, range(60, 70), 1, 2) == []
    back = -36_000  # an hour
    after = moving(builder, range(back, back + 40), 1, 2)
    assert after and after[0][1] and after[0][0] < T0


def test_a_setpoint_that_was_set_long_ago_is_back_with_its_old_stamp() -> None:
    tags = [Tag("a"), Tag("set", kind=TagKind.SETPOINT)]
    builder = FrameBuilder(tags, P, P, 20)
    push(builder, (1, -1000, 5.0, GOOD))
    moving(builder, range(50), 0)
    lose(builder)
    assert moving(builder, range(60, 70), 0) == []
    rows = push(builder, (1, -1000, 5.0, GOOD)) + moving(builder, range(70, 80), 0)
    assert rows[0][1] and all(row[3] == b"\1\1" for row in rows)
    assert builder.counters()["delivered"] == accounted(builder)


def test_an_idle_plant_comes_back_by_its_keep_alives() -> None:
    builder, _ = running()
    push(builder, (1, 60, 1.0, GOOD))
    builder.advance(T0 + 66 * P)
    assert list(builder.closed()) == []
    push(builder, (0, 61, 1.0, GOOD), (2, 61, 1.0, GOOD))
    builder.advance(T0 + 70 * P)
    rows = [copied(frame) for frame in builder.closed()]
    assert rows[0][1] and all(row[3] == BOTH for row in rows)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_is_lost_no_row_lacks_a_tag_that_was_there_and_the_count_is_right(data: st.DataObject) -> None:
    """Random losses, tags that stay away and come back; a row may lack a tag only after the limit."""
    builder = FrameBuilder(TAGS, P, P, 20, rows=data.draw(st.sampled_from([1, 3, 64])))
    rows: list[tuple] = []
    delivered: set[int] = set()  # since the last loss
    awaited: set[int] = set()
    first: int | None = None  # period of the first delivery since the loss
    begin = 0
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.sampled_from([12, 40, 130]))
        tags = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        first = begin if first is None else first
        made = moving(builder, range(begin, begin + n), *tags)
        delivered |= set(tags)
        awaited -= delivered
        for row in made:
            late = row[0] >= T0 + first * P + RETURN_NS
            assert late or not any(row[3][j] == 0 and row[4][4 * j:4 * j + 4] == WAITING.to_bytes(4, "little")
                                   for j in awaited)
        rows += made
        awaited = set() if made else awaited
        begin += n
        if data.draw(st.booleans()):
            rows += lose(builder)
            awaited |= delivered
            delivered = set()
            begin += data.draw(st.integers(1, 50))
            first = None
    builder.finish()
    rows += [copied(frame) for frame in builder.closed()]
    counts = builder.counters()
    assert counts["rows"] == len(rows) and counts["gaps"] == sum(row[1] for row in rows[1:])
    assert [row[5] for row in rows] == list(range(len(rows)))
    assert counts["delivered"] == accounted(builder)
