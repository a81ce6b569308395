"""The public API on rows: streaming equals scoring, explanations, saving, and errors that say what is wrong."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from presses import fitted

import opcua_detector
from opcua_detector import Detector
from opcua_detector.engine import Engine, frames_of
from opcua_detector.errors import ConfigError, ModelFileError, RecordError

TAGS = ["level", "flow", "pressure"]
N = 3000


@cache
def rows() -> np.ndarray:
    """A stable autoregression of three coupled tags."""
    rng = np.random.default_rng(0)
    a = np.array([[0.9, 0.05, 0.0], [0.0, 0.8, 0.1], [0.1, 0.0, 0.7]])
    x = np.zeros((2 * N, 3))
    for t in range(1, 2 * N):
        x[t] = a @ x[t - 1] + rng.standard_normal(3)
    return x


@cache
def model() -> Detector:
    return opcua_detector.fit(rows()[:N], TAGS, 1.0)


def test_streaming_gives_what_score_gives_bit_for_bit_over_gaps_and_masks():
    x = rows()[N:].copy()
    valid = np.random.default_rng(1).random(x.shape) > 0.02
    times = np.arange(len(x), dtype=float)
    times[1000:] += 60.0
    scores = model().score(x, times=times, valid=valid)
    engine = Engine([model().monitor()])
    streamed = [engine.step(frame)[0].score for frame in frames_of(model().record(x, times, valid))]
    assert_array_equal(scores, streamed)
    assert np.isnan(scores[[0, 1000]]).all() and np.isfinite(scores[[999, -1]]).all()


def test_a_score_does_not_look_ahead():
    x = rows()[N:].copy()
    before = model().score(x)
    x[1500:] = 1e3
    assert_array_equal(model().score(x)[:1500], before[:1500])


def test_a_fault_is_scored_above_the_limit_told_and_blamed():
    x = rows()[N:].copy()
    x[2000:2200, 1] += 15.0
    scores = model().score(x)
    assert np.nanmax(scores[:2000]) < model().limit <= np.nanmax(scores[2000:2010])
    assert model().explain(x, 2003).sentence.startswith("flow ")
    shares = model().contributions(x, 2000, 2200)
    assert max(shares, key=lambda tag: shares[tag]) == "flow" and sum(shares.values()) == pytest.approx(1.0)
    assert model().explain(x, -1).source_ns == (len(x) - 1) * 10**9


def test_intervals_that_touch_are_runs_of_their_own():
    x = rows()
    assert opcua_detector.fit(x, TAGS, 1.0, intervals=[(0, 1000), (1000, N)]).report.gaps == 1
    assert opcua_detector.fit(x, TAGS, 1.0, intervals=[(0, N)]).report.gaps == 0


def test_disjoint_intervals_are_learnt_without_what_lies_between():
    x = rows()[:N].copy()
    x[1000:1200] = 1e4
    holed = opcua_detector.fit(x, TAGS, 1.0, intervals=[(0, 1000), (1200, N)])
    assert holed.report is not None and holed.report.rows == N - 200 and holed.report.gaps == 1
    assert np.nanmedian(holed.score(rows()[N:])) < 0.5


def test_a_saved_model_comes_back_the_same(tmp_path):
    model().save(tmp_path / "m.npz")
    again = opcua_detector.load(tmp_path / "m.npz")
    assert again.model_id == model().model_id
    assert_array_equal(again.score(rows()[N:]), model().score(rows()[N:]))


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"tags": ["a", "a", "b"]}, RecordError, "two tags are called a"),
    ({"tags": ["a"]}, RecordError, r"shape \(3000, 3\), expected \(n, 1\)"),
    ({"rows": [["x", "y", "z"]] * 300}, RecordError, "rows are no numbers"),
    ({"rows": np.zeros((10, 3))}, RecordError, "10 rows, 250 needed"),
    ({"period_s": 0.0}, ConfigError, "period must be above 0"),
    ({"times": np.zeros(N)}, RecordError, "times do not increase"),
    ({"times": np.arange(5.0)}, RecordError, "5 times for 3000 rows"),
    ({"valid": np.ones((2, 2))}, RecordError, r"valid has shape \(2, 2\)"),
    ({"intervals": [(0, 9000)]}, RecordError, "outside the 3000 rows"),
    ({"intervals": [(500, 900), (100, 200)]}, RecordError, "ascending"),
    ({"params": {"window": 3}}, ConfigError, "does not know this parameter"),
    ({"params": {"false_alarms_per_day": -1}}, ConfigError, "false_alarms_per_day"),
])
def test_bad_input_gets_an_error_that_says_what(change, error, text):
    given = {"rows": rows()[:N], "tags": TAGS, "period_s": 1.0} | change
    with pytest.raises(error, match=text):
        opcua_detector.fit(**given)


def test_importing_the_package_alone_stays_light():
    import subprocess
    import sys

    code = "import sys, opcua_detector; print([m for m in ('numba', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_model_of_parts_is_refused_with_where_it_belongs(tmp_path):
    fitted().save(tmp_path / "press.npz")
    with pytest.raises(ModelFileError, match="judges parts of a cyclic process") as refused:
        opcua_detector.load(tmp_path / "press.npz")
    assert "opcua_detector.parts" in str(refused.value)
