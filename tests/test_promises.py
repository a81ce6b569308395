"""What the samples promise of their monitors, on the simulated plants and without a server.

The monitors are those of `configs/*.yaml` with both methods, fitted on as many healthy rows as the demonstration reads.
"""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Frame, TagKind
from opcua_detector.columns import make_plan, usable_tags
from opcua_detector.engine import Engine, frames_of
from sim_server.processes import Fault
from tests.benchmarks import FAULTS, demo_monitor

BOTH = ("lorenz", "throttle")
SEEDS = (1, 2)
HOUR_S = 3600
EACH_FAULT = [(process, name) for process in BOTH for name in FAULTS[process]]


@cache
def fitted(process, seed=SEEDS[0]):
    """The demonstration's monitor; it is for one plant, so each test takes the next rows of that."""
    return demo_monitor(process, seed)


def holed(record, seed):
    """The record in several intervals, with gaps, stretches of masked values and single masked ones."""
    rng = np.random.default_rng(seed)
    n = len(record)
    gap, valid = record.gap.copy(), record.valid.copy()
    gap[rng.choice(n, 3, replace=False)] = 1
    valid[:, :2][rng.random((n, 2)) < 0.001] = 0  # the measured tags are the first
    start = int(rng.integers(n // 8, n // 4))
    valid[start:start + 400, 0] = 0
    values = np.where(valid != 0, record.values, np.nan)
    cut = int(rng.integers(n // 2, 3 * n // 4))
    return replace(record, gap=gap, valid=valid, values=values).take(np.r_[0:cut, cut + 1:cut + 5, cut + 300:n])


def streamed(one, record):
    """Stream a record: score and the paper's residuals float64[n, 4], residuals, window means, alert flags."""
    monitor = one.monitor()
    engine = Engine([monitor])
    rows, residual, means, alert = [], [], [], []
    for frame in frames_of(record):
        verdict = engine.step(frame)[0]
        rows.append((verdict.score, verdict.r_trans, verdict.r_bound, verdict.r_conf))
        residual.append(np.concatenate([method.residual for method in one.methods]))
        means.append(verdict.residual.copy())
        alert.append((verdict.alert, verdict.raised, verdict.cleared))
    return np.array(rows), np.array(residual), np.array(means), np.array(alert)


# -- tags that tell nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", BOTH)
def test_a_totaliser_a_clock_a_constant_and_a_duplicate_are_left_out_each_with_its_reason(process):
    one = fitted(process)
    first = one.plant.measured[0]
    assert tuple(tag.name for tag in one.model.tags) == one.plant.measured
    assert set(one.report.excluded) == {"total", "clock", "constant", "duplicate"}
    assert one.report.excluded["total"].startswith("a totaliser: it only moves one way")
    assert one.report.excluded["clock"] == "a clock: it moves at a constant rate"
    assert one.report.excluded["constant"] == "constant at 24"
    assert one.report.excluded["duplicate"] == f"duplicate of {first}"
    assert one.model.excluded == one.report.excluded


@pytest.mark.parametrize("process", BOTH)
def test_a_totaliser_declared_as_counter_is_judged_by_its_rate(process):
    one = fitted(process)
    record = one.healthy.rows(0, 5000)
    tags = tuple(replace(tag, kind=TagKind.COUNTER) if tag.name in ("total", "clock") else tag for tag in record.tags)
    used, excluded = usable_tags(replace(record, tags=tags))
    assert "step of total" in [column.name for column in make_plan(used).columns]
    assert excluded["clock"] == "counts at a constant rate, like a clock"


# -- an hour without a fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("process", BOTH)
def test_a_healthy_hour_raises_at_most_one_alert(process, seed):
    one = fitted(process, seed)
    hour = one.plant.record(one.plant.rows_of(HOUR_S))
    assert len(hour) == {"lorenz": 360_000, "throttle": 180_000}[process] and not hour.truth.any()
    judged = one.judge(hour)
    warming = np.flatnonzero(np.isfinite(judged.score))[0]
    assert warming < 200 and np.isfinite(judged.score[warming:]).all()
    assert len(judged.raised) <= 1


# -- stream and batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_fault", [False, True])
@pytest.mark.parametrize("process", BOTH)
def test_the_hours_fast_path_is_the_engine_row_by_row(process, with_fault):
    one = fitted(process)
    faults = [Fault(*next(iter(FAULTS[process].items())), 1500, 3500)] if with_fault else []
    record = one.plant.record(6000, faults)
    rows, _, _, alert = streamed(one, record)
    judged = one.judge(record)
    assert_allclose(rows, judged.out[:, [0, 3, 4, 5]], rtol=0, atol=1e-10)
    assert_array_equal(np.flatnonzero(alert[:, 1]), judged.raised)
    assert_array_equal(np.flatnonzero(alert[:, 2]), judged.cleared)
    assert bool(judged.raised) == with_fault


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("process", BOTH)
def test_stream_equals_batch_over_gaps_masks_and_several_intervals(process, seed):
    one = fitted(process)
    record = holed(one.healthy.rows(5000, 9000), seed)
    assert record.gap.sum() >= 5 and (record.valid == 0).sum() > 400
    rows, residual, means, _ = streamed(one, record)
    batch = one.residuals(record)
    ends = np.cumsum([part.shape[1] for part in batch])
    for plugin, end, part in zip([m.plugin for m in one.model.methods], ends, batch, strict=True):
        seen = residual[:, end - part.shape[1]:end]
        assert 1000 < np.isfinite(part).all(axis=1).sum() < len(record)
        assert_allclose(seen, part, rtol=0, atol=1e-5 if plugin == "onnx" else 1e-10, err_msg=plugin)
    # From the same residuals on, everything is float64.
    zeros = np.zeros(len(record), np.int64)
    out = one.model.calibration.score_rows(one.less_absence(record, residual), record.gap, zeros)
    assert_allclose(rows, out[:, [0, 3, 4, 5]], rtol=0, atol=1e-10)
    assert_allclose(rows, one.judge(record).out[:, [0, 3, 4, 5]], rtol=0, atol=1e-5)
    assert 1000 < np.isfinite(rows[:, 0]).sum() < len(record)
    assert np.isfinite(means[-1]).all()


# -- faults -------------------------------------------------------------------------------------------------------

BEFORE_S, FAULT_S, AFTER_S = 20, 20, 30
DETECTED_WITHIN_S, CLEARED_WITHIN_S = 20, 20


@pytest.mark.parametrize("process, name", EACH_FAULT)
def test_each_fault_is_detected_blamed_on_a_tag_it_touches_and_over_when_it_is_over(process, name):
    one = fitted(process)
    plant = one.plant
    start, stop, end = (plant.rows_of(s) for s in (BEFORE_S, BEFORE_S + FAULT_S, BEFORE_S + FAULT_S + AFTER_S))
    record = plant.record(end, [Fault(name, FAULTS[process][name], start, stop)])
    assert_array_equal(np.flatnonzero(record.truth)[[0, -1]], [start, stop - 1])
    monitor = one.monitor()
    engine, blame = Engine([monitor]), np.zeros(len(one.model.tags))
    raised, cleared, standing = [], [], []
    for k, frame in enumerate(frames_of(record)):
        verdict = engine.step(frame)[0]
        standing.append(verdict.alert)
        raised += [k] * verdict.raised
        cleared += [k] * verdict.cleared
        if verdict.alert:
            blame += verdict.contribution
    assert not any(standing[:start])
    assert raised and raised[0] < start + plant.rows_of(DETECTED_WITHIN_S)
    assert verdict.tags[int(np.argmax(blame))] in plant.plant.process.model.parameter(name).touches
    assert len(cleared) == len(raised) and cleared[-1] <= stop + plant.rows_of(CLEARED_WITHIN_S)


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", BOTH)
def test_ten_thousand_steps_of_both_methods_stay_below_4_kib(process):
    one = fitted(process)
    name, factor = next(iter(FAULTS[process].items()))
    record = one.plant.record(5000, [Fault(name, factor, 1000, 3000)])
    record.gap[4000] = 1
    engine, frame = Engine([one.monitor()]), Frame.empty(len(record.tags))
    rows = list(zip(record.values, record.valid, record.source_ns.tolist(), record.gap.astype(bool).tolist(),
                    strict=True))  # made before, so that only the engine can allocate

    def run(some):
        for values, valid, source_ns, gap in some:
            np.copyto(frame.values, values)
            np.copyto(frame.valid, valid)
            frame.source_ns, frame.gap = source_ns, gap
            engine.step(frame)

    run(rows)
    gc.collect()
    peaks = []
    tracemalloc.start()
    try:
        run(rows)
        for _ in range(2):  # what grows does so each time; the interpreter's own caches need not
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            run(rows)
            run(rows)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert engine.monitors[0].verdict.event_no >= 2
    assert min(peaks) < 4096
