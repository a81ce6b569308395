"""Each quirk does what it says, and nothing else; a stream is the same row by row and as a block."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_server.errors import QuirkError
from sim_server.plant import tag_table
from sim_server.processes import model
from sim_server.quirks import BAD, GOOD, NO_STAMP, OVERFLOW_BITS, QUIRKS, UNCERTAIN, Reporter, Samples

START_NS = 1_700_000_000_000_000_000
TAGS = tag_table(model("lorenz"))
PERIOD_NS = model("lorenz").period_ns
X1 = 0


def reporter(*rules: tuple, seed: int = 1) -> Reporter:
    made = Reporter(TAGS, PERIOD_NS, seed)
    for rule in rules:
        made.set_quirk(*rule)
    return made


def values(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, len(TAGS)))
    rows[:, -1] = 1.0
    return rows


def of_tag(samples: Samples, tag: int) -> Samples:
    at = samples.tag == tag
    return Samples(
        *(getattr(samples, name)[at] for name in ("tag", "source_ns", "value", "status", "arrival_ns"))
    )


def stamps(n: int) -> np.ndarray:
    return START_NS + np.arange(n) * PERIOD_NS


def x1(n: int, *rules: tuple, rows: np.ndarray | None = None) -> Samples:
    rows = values(n) if rows is None else rows
    samples = reporter(*rules).report_block(0, START_NS, rows)
    others = samples.tag != X1
    assert np.count_nonzero(others) == n * (len(TAGS) - 1), "a quirk of one tag must leave the others alone"
    assert (samples.status[others] == GOOD).all()
    return of_tag(samples, X1)


def by_step(made: Reporter, first_row: int, rows: np.ndarray) -> list[tuple]:
    found = []
    for k, row in enumerate(rows):
        for one in made.report(first_row + k, START_NS + k * PERIOD_NS, row):
            found.append(
                (one.tag, NO_STAMP if one.source_ns is None else one.source_ns, *one[1:3], one.arrival_ns)
            )
    return found


def test_without_quirks_each_row_gives_one_clean_sample_a_tag() -> None:
    rows = values(50)
    samples = reporter().report_block(0, START_NS, rows)
    assert len(samples) == 50 * len(TAGS)
    assert (samples.value.reshape(50, -1) == rows).all()
    assert (samples.source_ns == np.repeat(stamps(50), len(TAGS))).all()
    assert (samples.status == GOOD).all()
    assert (samples.arrival_ns == samples.source_ns).all()


@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["x1", "x3", "measured", "*", "total"]),
            st.sampled_from(sorted(QUIRKS)),
            st.floats(0.0, 1.0),
            st.one_of(st.none(), st.integers(-5, 60)),
            st.one_of(st.none(), st.integers(0, 90)),
        ),
        max_size=6,
    ),
    cut=st.integers(0, 80),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_block_equals_row_by_row(rules: list[tuple], cut: int) -> None:
    wide = {"skew_ms": 40.0, "jitter_ms": 15.0, "rate_ms": 100.0, "burst": 8.0}
    rules = [(tag, quirk, value * wide.get(quirk, 1.0), *rows) for tag, quirk, value, *rows in rules]
    rows = np.round(values(80), 1)
    stepped = by_step(reporter(*rules), -10, rows)
    made = reporter(*rules)
    blocks = [made.report_block(-10, START_NS, rows[:cut])]
    blocks.append(made.report_block(-10 + cut, START_NS + cut * PERIOD_NS, rows[cut:]))
    joined = [
        (int(tag), int(source), float(value), int(status), int(arrival))
        for one in blocks
        for tag, source, value, status, arrival in zip(
            one.tag, one.source_ns, one.value, one.status, one.arrival_ns, strict=True
        )
    ]
    assert [str(one) for one in joined] == [str(one) for one in stepped]


def test_skew_and_jitter_move_the_source_stamp_only() -> None:
    skewed = x1(500, ("x1", "skew_ms", -40.0))
    assert (skewed.source_ns - stamps(500) == -40_000_000).all()
    assert (skewed.arrival_ns == stamps(500)).all()
    jittered = x1(5000, ("x1", "jitter_ms", 3.0), ("x1", "skew_ms", 7.0))
    offset_ms = (jittered.source_ns - stamps(5000)) / 1e6
    assert offset_ms.min() >= 4.0
    assert offset_ms.max() <= 10.0
    assert offset_ms.std() == pytest.approx(3.0 / math.sqrt(3), rel=0.05)
    assert (jittered.source_ns % 1000 == 0).all()
    assert (jittered.value == values(5000)[:, X1]).all()


def test_on_change_reports_each_new_value_once() -> None:
    rows = values(9)
    rows[:, X1] = [1, 1, 1, 2, 2, 1, 1, 3, 3]
    samples = x1(9, ("x1", "on_change", 1), rows=rows)
    assert samples.value.tolist() == [1, 2, 1, 3]
    assert ((samples.source_ns - START_NS) // PERIOD_NS).tolist() == [0, 3, 5, 7]


def test_on_change_knows_what_was_reported_before_it_was_set() -> None:
    made, rows = reporter(), values(3)
    rows[:, X1] = [1, 2, 2]
    made.report_block(0, START_NS, rows)
    made.set_quirk("x1", "on_change", 1, start_row=3)
    assert len(of_tag(made.report_block(3, START_NS + 3 * PERIOD_NS, rows[1:]), X1)) == 0


def test_rate_reports_at_its_own_interval() -> None:
    samples = x1(1000, ("x1", "rate_ms", 100.0))
    assert len(samples) == 100
    assert (np.diff(samples.source_ns) == 100_000_000).all()


def test_null_source_has_no_stamp_but_arrives() -> None:
    samples = x1(20, ("x1", "null_source", 1))
    assert (samples.source_ns == NO_STAMP).all()
    assert (samples.arrival_ns == stamps(20)).all()
    assert reporter(("x1", "null_source", 1)).report(0, START_NS, values(1)[0])[X1].source_ns is None


@pytest.mark.parametrize(
    ("quirk", "status"), [("bad", BAD), ("uncertain", UNCERTAIN), ("overflow", OVERFLOW_BITS)]
)
def test_status_quirks_hit_as_often_as_stated(quirk: str, status: int) -> None:
    samples = x1(10_000, ("x1", quirk, 0.1))
    hits = samples.status == status
    assert hits.mean() == pytest.approx(0.1, abs=0.01)
    assert (samples.status[~hits] == GOOD).all()
    assert (samples.value == values(10_000)[:, X1]).all()


def test_status_quirk_holds_for_its_interval() -> None:
    samples = x1(100, ("x1", "bad", 1.0, 30, 40))
    assert np.flatnonzero(samples.status == BAD).tolist() == list(range(30, 40))


def test_nan_stuck_and_drop() -> None:
    rows = values(10_000)
    holes = x1(10_000, ("x1", "nan", 0.05))
    assert np.isnan(holes.value).mean() == pytest.approx(0.05, abs=0.01)
    assert (holes.status == GOOD).all()
    beyond = x1(10_000, ("x1", "inf", 0.05))
    assert np.isposinf(beyond.value).mean() == pytest.approx(0.05, abs=0.01)
    assert (beyond.status == GOOD).all()
    stuck = x1(100, ("x1", "stuck", 1, 40, 60))
    assert (stuck.value[40:60] == rows[39, X1]).all()
    assert (stuck.value[60:] == rows[60:100, X1]).all()
    made = reporter(("x1", "drop", 0.2))
    dropped = of_tag(made.report_block(0, START_NS, rows), X1)
    assert len(dropped) == pytest.approx(8000, abs=150)
    assert made.dropped == 10_000 - len(dropped)


def test_burst_holds_samples_back_and_loses_none() -> None:
    samples = x1(100, ("x1", "burst", 10))
    assert (samples.source_ns == stamps(100)).all()
    assert (np.unique(samples.arrival_ns) == stamps(100)[9::10]).all()
    assert np.bincount((samples.arrival_ns - START_NS) // PERIOD_NS)[9] == 10


def test_swap_changes_the_order_and_loses_none() -> None:
    samples = x1(2000, ("x1", "swap", 0.2))
    late = np.diff(samples.source_ns) < 0
    assert 200 < np.count_nonzero(late) < 450
    assert (np.diff(samples.source_ns)[late] == -PERIOD_NS).all()
    missing = set(stamps(2000).tolist()) - set(samples.source_ns.tolist())
    assert missing <= {int(stamps(2000)[-1])}, "only the last one may still be held back"


def test_clearing_releases_what_is_held_back() -> None:
    made = reporter(("x1", "burst", 1000))
    rows = values(20)
    assert len(of_tag(made.report_block(0, START_NS, rows), X1)) == 0
    made.clear()
    again = of_tag(made.report_block(20, START_NS + 20 * PERIOD_NS, values(1)), X1)
    assert (again.source_ns == stamps(21)).all()


def test_a_quirk_is_the_same_whatever_else_is_set() -> None:
    alone = x1(1000, ("x1", "bad", 0.1))
    together = x1(1000, ("x1", "jitter_ms", 5.0), ("x1", "bad", 0.1), ("x1", "uncertain", 0.3))
    assert ((alone.status == BAD) == (together.status == BAD)).all()
    other_seed = reporter(("x1", "bad", 0.1), seed=2).report_block(0, START_NS, values(1000))
    assert not ((of_tag(other_seed, X1).status == BAD) == (alone.status == BAD)).all()
    both = reporter(("measured", "bad", 0.1)).report_block(0, START_NS, values(1000))
    assert not (of_tag(both, 0).status == of_tag(both, 1).status).all(), "tags must not fail together"


def test_a_later_setting_replaces_an_earlier_one_and_the_rules_do_not_pile_up() -> None:
    made = reporter()
    for k in range(200):
        made.set_quirk("x1", "skew_ms", float(k), start_row=k)
        (sample,) = [one for one in made.report(k, START_NS, values(1)[0]) if one.tag == X1]
        assert sample.source_ns == START_NS + k * 1_000_000
    assert len(made._tags[X1].rules) == 1
    made.set_quirk("x1", "skew_ms", 0.0, start_row=200)
    assert made.report(200, START_NS, values(1)[0])[X1].source_ns == START_NS


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("x9", "bad", 0.1), "tag"),
        (("x1", "rust", 0.1), "quirk"),
        (("x1", "bad", 1.5), "value"),
        (("x1", "skew_ms", math.nan), "value"),
        (("state", "nan", 0.5), "tag"),
        (("state", "inf", 0.5), "tag"),
    ],
)
def test_wrong_quirks_are_refused_with_what_was_expected(arguments: tuple, key: str) -> None:
    with pytest.raises(QuirkError) as caught:
        reporter(arguments)
    assert caught.value.key == key
    assert caught.value.expected in str(caught.value)


def test_duplicates_and_overload_are_reported_as_such() -> None:
    twice = x1(2000, ("x1", "duplicate", 0.25))
    again = np.diff(twice.source_ns) == 0
    assert 300 < again.sum() < 700 and len(twice) == 2000 + again.sum()
    assert (twice.value[1:][again] == np.nextafter(twice.value[:-1][again], np.inf)).all()
    overload = x1(2000, ("x1", "overload", 1.0))
    assert set(overload.status.tolist()) == {0x002F_0000} and len(overload) == 2000
