"""Products and solutions of the regression's fit against slow, plain twins: shifted sums, ridges near the rounding."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from opcua_detector.detectors import regression_linear
from opcua_detector.detectors.regression_linear import ENDS_PER_ROW, FEW_COLUMNS, gram
from tests.detectors import oracle_regression as oracle

D = FEW_COLUMNS + 4
RUNS = {
    "one run": [(8, 400)],
    "runs of unlike length": [(8, 60), (69, 70), (90, 300), (320, 322), (340, 400)],
    "a run ends where the next can just begin": [(8, 150), (159, 400)],
    "runs too short to shift": [(k, k + 3) for k in range(8, 380, 12)],
    "no rows": [],
}


def rows_of(runs):
    return np.concatenate([np.arange(start, stop) for start, stop in runs] or [np.zeros(0, np.int64)]).astype(np.int64)


@pytest.mark.parametrize("runs", list(RUNS))
@pytest.mark.parametrize(("lags", "chunk"), [(1, 8192), (3, 8192), (8, 8192), (3, 37), (8, 1)])
def test_shifted_sums_of_products_are_those_of_the_oracle(runs, lags, chunk, monkeypatch):
    monkeypatch.setattr(regression_linear, "CHUNK", chunk)
    z = np.random.default_rng(3).standard_normal((400, D)) * np.geomspace(1e-3, 50.0, D) + 0.5
    rows = rows_of(RUNS[runs])
    assert_allclose(gram(z, rows, lags), oracle.gram(z, rows, lags), rtol=1e-10, atol=1e-9)


def test_both_ways_to_sum_are_under_test():
    shifted = {name: ENDS_PER_ROW * len(runs) < len(rows_of(runs)) for name, runs in RUNS.items()}
    assert sorted(shifted.values()) == [False, False, True, True, True]


def inputs(n=500):
    """float64[n, 6], of which the last three are the first three again (one of them to 1e-12), and a target."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((n, 3)) * [1.0, 1e3, 1e-2]
    twice = np.column_stack([x, x[:, 0], 2.0 * x[:, 1], x[:, 2] + 1e-12 * rng.standard_normal(n)])
    return twice, x @ [0.5, -2e-3, 30.0] + 0.01 * rng.standard_normal(n)


@pytest.mark.parametrize("weight", [1e-300, 1e-12, 1e-6, 1.0, 1e3])
def test_the_ridge_of_a_singular_matrix_predicts_as_the_oracle_does(weight):
    """Its weights are not unique to rounding, what they say of a row is."""
    x, y = inputs()
    whole = np.column_stack([x, y])
    total = whole.T @ whole
    got = regression_linear._ridge(total, np.arange(6), 6, weight)
    assert np.isfinite(got).all()
    want = oracle.ridge(x, y, weight)
    assert_allclose(x @ got, x @ want, atol=1e-5 * np.abs(y).max())


def test_the_fallback_of_the_ridge_is_reached_and_the_usual_way_stands_beside_it(monkeypatch):
    x, y = inputs()
    whole = np.column_stack([x, y])
    total = whole.T @ whole
    fell = []
    plain = np.linalg.cholesky

    def watched(a):
        try:
            return plain(a)
        except np.linalg.LinAlgError:
            fell.append(True)
            raise

    monkeypatch.setattr(np.linalg, "cholesky", watched)
    regression_linear._ridge(total, np.arange(6), 6, 1.0)
    assert not fell
    total[5, 5] -= 1e-4 * total[5, 5]  # what rounding can do, told plainly: an indefinite matrix
    regression_linear._ridge(total, np.arange(6), 6, 1e-300)
    assert fell


@pytest.mark.parametrize("seen", [[0, 1, 2], [2, 0], [1]])
@pytest.mark.parametrize("weight", [1e-3, 1.0, 50.0])
def test_the_ridge_of_some_entries_is_the_least_squares_of_their_columns(seen, weight):
    x, y = inputs()
    whole = np.column_stack([y, x[:, :3]])
    got = regression_linear._ridge(whole.T @ whole, np.array(seen) + 1, 0, weight)
    assert_allclose(got, oracle.ridge(x[:, seen], y, weight), rtol=1e-6)
