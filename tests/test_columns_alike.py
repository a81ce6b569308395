"""Pairs of tags that may be duplicates, found by products of all columns at once, against a look at each pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from opcua_detector import columns
from opcua_detector.api import Record
from tests import oracle

CLEAR = 1e-4  # below 1 of a correlation: no duplicate, and no rounding makes it one


def record_of(values, valid):
    return Record.from_rows(values, [f"t{i}" for i in range(values.shape[1])], 10_000_000, valid=valid)


def check(record):
    """A duplicate is always kept for the closer look; a pair that is clearly none is not, where both move enough."""
    got = columns._alike(record)
    assert_array_equal(got, got.T)
    for i in range(len(record.tags)):
        for j in range(i):
            same, correlation, moves = oracle.alike(record.values, record.valid, i, j)
            with np.errstate(all="ignore"):
                same = same or columns._same(record, i, j)
            assert got[i, j] or not same, (i, j)
            if moves and correlation < 1.0 - CLEAR:
                assert not got[i, j], (i, j)


@pytest.mark.parametrize("bad", [0.0, 0.02, 0.5, 0.97])
def test_masked_rows_hide_no_duplicate_and_make_none(bad, monkeypatch):
    monkeypatch.setattr(columns, "_CHUNK", 61)  # several pieces, the last one short
    rng = np.random.default_rng(4)
    x = rng.standard_normal((700, 4)) * [1.0, 1e-6, 1e5, 1.0] + [0.0, 3.0, -1e7, 0.0]
    values = np.column_stack([x, 2.0 * x[:, 0] - 7.0, -x[:, 2], x[:, 1] + 1e-8 * rng.standard_normal(700),
                              x[:, 0] + 0.1 * x[:, 3]])
    valid = (rng.random(values.shape) >= bad).astype(np.uint8)
    values[valid == 0] = rng.choice([np.nan, 1e9, -5.0, np.inf], (valid == 0).sum())
    check(record_of(values, valid))
    if bad < 0.9:
        got = columns._alike(record_of(values, valid))
        assert got[0, 4] and got[2, 5] and not got[0, 1] and not got[0, 7] and not got[1, 6]


def test_tags_that_are_alike_only_on_the_rows_that_both_have_are_kept_for_the_closer_look():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 400))
    b[100:200] = a[100:200]
    valid = np.ones((400, 2), np.uint8)
    valid[:100, 0] = valid[200:, 1] = 0  # only rows 100 to 199 are in both
    record = record_of(np.column_stack([a, b]), valid)
    assert columns._alike(record)[0, 1]
    check(record)
    assert not columns._alike(record_of(np.column_stack([a, b]), np.ones((400, 2), np.uint8)))[0, 1]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.0, 0.3, 0.8]))
def test_no_duplicate_is_lost_however_few_rows_are_left(seed, n, bad):
    rng = np.random.default_rng(seed)
    x = rng.choice([rng.standard_normal((n, 3)), np.round(rng.standard_normal((n, 3))), np.full((n, 3), 2.5)])
    values = np.column_stack([x, 1e3 * x[:, 0] + 1e6, -1e-3 * x[:, 1], np.where(np.arange(n) % 5, x[:, 2], 1e308)])
    check(record_of(values, (rng.random(values.shape) >= bad).astype(np.uint8)))
