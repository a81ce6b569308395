"""From tags to columns: what is left out is named with its reason, and a stream is prepared as a batch is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Tag, TagKind
from opcua_detector.columns import make_plan, usable_tags
from opcua_detector.errors import RecordError
from tests import oracle_score
from tests.plants import noise_record, record_of

N = 400
KINDS = [TagKind.MEASURED, TagKind.COUNTER, TagKind.ANGLE, TagKind.SETPOINT, TagKind.STATE]


def wander(seed=0, n=N):
    return np.cumsum(np.random.default_rng(seed).standard_normal(n))


def reasons(tags, *columns, **more):
    """Reasons for leaving tags out, beside one good tag that is always there."""
    record = record_of(np.column_stack([wander(), *columns]), ["good", *tags], **more)
    used, found = usable_tags(record)
    assert "good" not in found
    assert {tag.name for tag in used} | set(found) == {tag.name for tag in record.tags}
    return found


def stepped(plan, record):
    """Columns of a record, one row at a time."""
    stepper = plan.stepper()
    out = np.empty((len(record), len(plan.columns)))
    out_valid = np.empty(out.shape, np.uint8)
    for t in range(len(record)):
        stepper.step(record.values[t], record.valid[t], bool(record.gap[t]), out[t], out_valid[t])
    return out, out_valid


# -- what is left out -------------------------------------------------------------------------------------------


def test_an_undeclared_totaliser_is_left_out_and_the_reason_says_how_to_judge_it():
    steps = np.random.default_rng(1).exponential(size=N)
    assert "declare `kind: counter`" in reasons(["total"], np.cumsum(steps))["total"]


def test_a_totaliser_that_rolls_over_once_is_still_known_as_one():
    total = np.cumsum(np.random.default_rng(1).exponential(size=3000)) % 2000.0
    record = record_of(np.column_stack([wander(n=3000), total]), ["good", "total"])
    assert "totaliser" in usable_tags(record)[1]["total"]


def test_a_totaliser_that_counts_down_is_known_as_one():
    steps = np.random.default_rng(1).exponential(size=N)
    assert "totaliser" in reasons(["stock"], -np.cumsum(steps))["stock"]


@pytest.mark.parametrize("kind", [TagKind.MEASURED, TagKind.COUNTER])
def test_a_clock_is_left_out_also_when_declared_a_counter(kind):
    assert "clock" in reasons([Tag("clock", kind=kind)], 1e9 + np.arange(N) * 0.01)["clock"]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e12])
def test_a_constant_is_left_out_with_its_value_and_unit(value):
    assert reasons([Tag("idle", unit="bar")], np.full(N, value))["idle"] == f"constant at {value:g} bar"


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (1.8, 32.0), (-1.0, 0.0), (1e-3, 273.15)])
def test_a_duplicate_is_left_out_also_in_another_unit(factor, offset):
    assert reasons(["again"], wander() * factor + offset)["again"] == "duplicate of good"


def test_a_tag_that_only_resembles_another_is_kept():
    rng = np.random.default_rng(2)
    assert reasons(["near"], wander() + 1e-3 * rng.standard_normal(N)) == {}


def test_a_duplicate_is_found_by_the_rows_where_both_tags_are_valid():
    again = wander()
    again[::3] = np.nan
    assert reasons(["again"], again)["again"] == "duplicate of good"


def test_a_measured_tag_that_rises_for_a_while_only_is_kept():
    assert reasons(["ramp"], np.minimum(np.arange(N), N - np.arange(N)) + 0.0) == {}


def test_a_declared_counter_and_a_moving_setpoint_are_kept():
    counter = np.cumsum(np.random.default_rng(1).exponential(size=N))
    staircase = np.floor(np.arange(N) / 5.0)
    tags = [Tag("total", kind=TagKind.COUNTER), Tag("r", kind=TagKind.SETPOINT)]
    assert reasons(tags, counter, staircase) == {}


def test_a_tag_without_any_valid_value_is_an_error_that_names_it_and_the_next_step():
    record = record_of(np.column_stack([wander(), np.full(N, np.nan)]), ["good", "dead"])
    with pytest.raises(RecordError, match=r"tag dead: .*no valid value[\s\S]*next step: .*check"):
        usable_tags(record)


def test_nothing_left_to_judge_is_an_error_that_lists_every_reason():
    record = record_of(np.column_stack([np.zeros(N), np.arange(N) + 0.0, wander()]),
                       ["idle", "clock", Tag("r", kind=TagKind.SETPOINT)])
    with pytest.raises(RecordError) as caught:
        usable_tags(record)
    assert all(text in str(caught.value) for text in ("no tag is left to judge", "idle: constant", "clock: a clock"))


def test_setpoints_alone_are_nothing_to_judge():
    with pytest.raises(RecordError, match="only setpoints and states"):
        usable_tags(record_of(wander()[:, None], [Tag("r", kind=TagKind.SETPOINT)]))


# -- what a method sees -----------------------------------------------------------------------------------------


def counter_columns(values, **more):
    record = record_of(np.array(values, float)[:, None], [Tag("total", kind=TagKind.COUNTER, unit="m3")], **more)
    plan = make_plan(record.tags)
    assert [(c.name, c.unit) for c in plan.columns] == [("step of total", "m3/row")]
    assert plan.owner("step of total") == "total"
    made = plan.prepare(record)
    return [float(x) if ok else None for x, ok in zip(made.values[:, 0], made.valid[:, 0], strict=True)]


def test_a_counter_becomes_its_difference_per_row():
    assert counter_columns([5, 6, 6, 9]) == [None, 1.0, 0.0, 3.0]


def test_a_roll_over_masks_one_row_and_no_more():
    assert counter_columns([98, 99, 1, 2]) == [None, 1.0, None, 1.0]


def test_no_difference_is_formed_over_a_gap_or_an_invalid_neighbour():
    assert counter_columns([1, 2, 30, 31], gap=np.array([1, 0, 1, 0], np.uint8)) == [None, 1.0, None, 1.0]
    assert counter_columns([1, np.nan, 30, 31]) == [None, None, None, 1.0]


@pytest.mark.parametrize("turn", [360.0, 2 * np.pi, 1.0])
def test_an_angle_does_not_jump_where_it_wraps(turn):
    turned = np.linspace(0, 3 * turn, 301)
    record = record_of((turned % turn)[:, None], [Tag("phi", kind=TagKind.ANGLE, turn=turn)])
    plan = make_plan(record.tags)
    made = plan.prepare(record).values
    assert [c.name for c in plan.columns] == ["sin(phi)", "cos(phi)"]
    assert np.abs(np.diff(record.values[:, 0])).max() > 0.9 * turn
    assert np.abs(np.diff(made, axis=0)).max() < 0.07
    assert_allclose(np.hypot(*made.T), 1.0, atol=1e-12)


def test_the_columns_of_a_record_do_not_depend_on_the_order_or_number_of_its_tags():
    record = noise_record(50, ["a", Tag("b", kind=TagKind.COUNTER), "c"])
    plan = make_plan(record.select(["c", "b"]).tags)
    assert_array_equal(plan.prepare(record).values, plan.prepare(record.select(["b", "c"])).values)
    assert_array_equal(plan.prepare(record).values[:, 0], record.values[:, 2])


records = st.builds(
    lambda values, mask, gap, kinds: record_of(
        values, [Tag(f"t{i}", kind=kind) for i, kind in enumerate(kinds)], valid=mask, gap=gap),
    hnp.arrays(float, (12, 3), elements=st.one_of(
        st.floats(-1e3, 1e3), st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))),
    hnp.arrays(np.uint8, (12, 3), elements=st.integers(0, 1)),
    hnp.arrays(np.uint8, 12, elements=st.integers(0, 1)),
    st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(records)
def test_stream_batch_and_oracle_agree_over_any_gaps_and_masks(record):
    plan = make_plan(record.tags)
    batch = plan.prepare(record)
    streamed, streamed_valid = stepped(plan, record)
    expected, expected_valid = oracle_score.prepare_rows(
        record.values, record.valid, record.gap, plan.index, plan.op, plan.scale)
    assert_array_equal(streamed, batch.values)
    assert_array_equal(streamed_valid, batch.valid)
    assert_array_equal(batch.valid, expected_valid)
    assert_allclose(batch.values, expected, rtol=0, atol=1e-15)
    assert np.isfinite(batch.values[batch.valid != 0]).all()
