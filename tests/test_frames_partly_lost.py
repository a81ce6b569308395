"""A loss of some of the tags, and a clock that is set: what is held for the others is held on, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from test_frames import GOOD, T0, P, accounted, copied
from test_frames_lost import lose, moving, push

from opcua_detector.api import Tag, TagKind
from opcua_detector.frames import FrameBuilder

TAGS = [Tag("a"), Tag("b"), Tag("set", kind=TagKind.SETPOINT), Tag("mode", kind=TagKind.STATE)]
ALL = b"\1\1\1\1"


def running(rows: int = 64) -> FrameBuilder:
    """A builder with two moving tags, and two that were set long ago."""
    builder = FrameBuilder(TAGS, P, P, 20, rows=rows)
    push(builder, (2, -1000, 5.0, GOOD), (3, -500, 7.0, GOOD))
    assert moving(builder, range(50), 0, 1)[-1][3] == ALL
    return builder


def lost(builder: FrameBuilder, *columns: int) -> list[tuple]:
    builder.connection_lost(np.array(columns, np.int32))
    return [copied(frame) for frame in builder.closed()]


def values(row: tuple) -> list[float]:
    return np.frombuffer(row[2]).tolist()


@pytest.mark.parametrize("rows", [1, 64])
def test_the_setpoint_of_another_server_is_held_over_the_loss(rows: int) -> None:
    builder = running(rows)
    lost(builder, 0, 3)
    assert moving(builder, range(60, 70), 1) == []  # 0 and 3 are awaited
    push(builder, (3, -500, 8.0, GOOD))
    after = moving(builder, range(70, 90), 0, 1)
    assert after[0][1] and all(row[3] == ALL and values(row)[2:] == [5.0, 8.0] for row in after)
    assert builder.counters()["delivered"] == accounted(builder)


def test_what_came_last_is_held_although_its_row_was_not_closed() -> None:
    builder = running()
    rows = push(builder, (2, 50, 6.0, GOOD)) + lost(builder, 0)
    assert values(rows[-1])[2] == 6.0
    after = moving(builder, range(60, 80), 0, 1)
    assert after[0][1] and all(values(row)[2] == 6.0 for row in after)


def test_a_sample_that_is_older_than_what_is_held_on_is_late() -> None:
    builder = running()
    push(builder, (2, 50, 6.0, GOOD))
    lost(builder, 0)
    push(builder, (2, 45, 5.5, GOOD))
    assert {values(row)[2] for row in moving(builder, range(60, 80), 0, 1)} == {6.0}


def test_all_that_is_lost_ends_every_hold() -> None:
    builder = running()
    lose(builder)
    assert moving(builder, range(60, 90), 0, 1) == []


@pytest.mark.parametrize("jump", [36_000, -36_000])
def test_setpoints_outlive_a_clock_that_is_set_and_take_the_new_time(jump: int) -> None:
    builder = running()
    builder.clock_set()
    list(builder.closed())
    assert builder.newest_ns <= T0 + 51 * P
    rows = moving(builder, range(jump, jump + 30), 0, 1)
    assert rows[0][1] and all(row[3] == ALL and values(row)[2:] == [5.0, 7.0] for row in rows)
    push(builder, (2, jump + 30, 9.0, GOOD))
    assert values(moving(builder, range(jump + 30, jump + 40), 0, 1)[-1])[2] == 9.0
    assert builder.counters()["delivered"] == accounted(builder)
