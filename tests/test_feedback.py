"""Operator feedback on rows: the same situation alarms no more whatever channel raised it, everything else still does,
and nothing that is taken in goes further than it may, stays longer than it may, or cannot be undone."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import roc_auc_score

from opcua_detector.allowances import BALLS, CALM, Allowances, calm_residual, residual_of
from opcua_detector.api import Frame, Record, Tag
from opcua_detector.detector import Detector, fit, load
from opcua_detector.detectors.regression_signed import SignedRegression
from opcua_detector.engine import AlertSettings, Engine, RowMonitor, frames_of
from opcua_detector.errors import ConfigError, RecordError
from opcua_detector.feedback import (
    DAY_NS,
    FOLDED,
    Feedback,
    Policy,
    confirm,
    expire,
    fold,
    forecast,
    give_feedback,
    journal,
    undo,
)
from opcua_detector.fitting import fit_monitor
from opcua_detector.kernels.allowance import allow_rows
from opcua_detector.model import NormalityModel
from sim_server.processes import Fault, make
from tests.plants import DeviationParams, DeviationPlugin, noise_record

AT = 1_790_000_000_000_000_000
TAGS = {"lorenz": ["x1", "x3"], "throttle": ["x1", "u"]}
PERIOD_S = {"lorenz": 0.01, "throttle": 0.02}
FAULTS = {
    "lorenz": {"sigma": 2 / 3, "rho": 26 / 28, "beta": 1.25},
    "throttle": {"Kb": 1.3, "Kt": 1.3, "La": 1.3},
}
METHODS = ["regression", "transition"]
START = 3000  # of a fault
ROWS = 6000
Rows = tuple[np.ndarray, np.ndarray]
"""Rows and their ground truth."""


@cache
def rows_of(process: str, n: int, seed: int, fault: str = "", factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a simulated plant, with a fault from row START on, and their ground truth."""
    plant = make(process, seed=seed)
    plant.simulate(1000)
    block = plant.simulate_block(n, (Fault(fault, factor, START, n),) if fault else ())
    return block.measured, block.labels


@cache
def plant_model(process: str) -> Detector:
    return fit(rows_of(process, 12_000, 1)[0], TAGS[process], PERIOD_S[process], params={"methods": METHODS})


@cache
def faulty(process: str, fault: str, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    return rows_of(process, ROWS, seed, fault, FAULTS[process][fault])


@cache
def linear_rows(n: int, seed: int, noise: int | None = None) -> np.ndarray:
    """Ten tags of three slow factors, with noise of their own (of another seed where `noise` is given)."""
    plant = np.random.default_rng(99)
    mix, offset, gain = plant.standard_normal((10, 3)), plant.uniform(-50, 50, 10), plant.uniform(0.5, 20, 10)
    rng = np.random.default_rng(seed)
    keep, state, factors = np.array([0.98, 0.95, 0.9]), np.zeros(3), np.empty((n, 3))
    for t in range(n):
        state = keep * state + np.sqrt(1 - keep * keep) * rng.standard_normal(3)
        factors[t] = state
    own = rng if noise is None else np.random.default_rng(noise)
    return offset + gain * (factors @ mix.T + 0.15 * own.standard_normal((n, 10)))


LINEAR_TAGS = [f"t{i}" for i in range(10)]


@cache
def linear_model() -> Detector:
    return fit(linear_rows(8000, 1), LINEAR_TAGS, 1.0, params={"methods": METHODS})


def biased(
    seed: int, tag: int, times: float, start: int = 1500, n: int = 3000, noise: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the linear plant, one tag too high by so many standard deviations from `start` on."""
    rows = linear_rows(n, seed, noise).copy()
    rows[start:, tag] += times * linear_rows(8000, 1)[:, tag].std()
    return rows, (np.arange(n) >= start).astype(np.uint8)


def first_alarm(model: Detector, rows: np.ndarray, after: int = 0) -> int:
    score = model.score(rows)
    found = np.flatnonzero(score[after:] >= model.limit)
    assert len(found), "this test needs rows that alarm"
    return int(found[0]) + after


def auc(model: Detector, rows: np.ndarray, truth: np.ndarray) -> float:
    score = model.score(rows)
    known = ~np.isnan(score)
    return float(roc_auc_score(truth[known], score[known]))


def clicked(model: Detector, rows: np.ndarray, start: int, stop: int, label: str = "false alarm", **more) -> Detector:
    return model.with_feedback(rows, start, stop, label, who="op", at_ns=AT, **more)


# -- the same situation, other situations -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [60, ROWS])
@pytest.mark.parametrize(("process", "fault"), [(p, f) for p in FAULTS for f in FAULTS[p]])
def test_a_false_alarm_alarms_no_more_and_other_faults_rank_as_before(process, fault, length):
    model, (rows, _) = plant_model(process), faulty(process, fault)
    start = first_alarm(model, rows, START)
    stop = min(start + length, len(rows))
    adapted = clicked(model, rows, start, stop)
    assert adapted.outcome.action == "adapted", adapted.outcome.text
    assert np.nanmax(adapted.score(rows)[start:stop]) < 1.0
    for other in FAULTS[process]:
        if other != fault:
            assert auc(adapted, *faulty(process, other)) >= auc(model, *faulty(process, other)) - 0.005
    assert (adapted.score(rows_of(process, 6000, 3)[0])[100:] < 1.0).mean() >= (
        model.score(rows_of(process, 6000, 3)[0])[100:] < 1.0).mean()


@pytest.mark.parametrize(("process", "fault"), [("lorenz", "sigma"), ("throttle", "Kt")])
def test_after_the_first_alarm_was_declared_false_another_fault_still_alarms(process, fault):
    model, (rows, _) = plant_model(process), faulty(process, fault)
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 60)
    found = 0
    for other in FAULTS[process]:
        score = model.score(faulty(process, other)[0])[START:]
        if other != fault and (score >= 1.0).mean() > 0.2:  # what was hardly found before may be lost in the noise
            found += 1
            assert (adapted.score(faulty(process, other)[0])[START:] >= 1.0).mean() > 0.3
    assert found


def test_on_a_linear_plant_the_tag_is_excused_and_the_others_are_not():
    model = linear_model()
    rows, _ = biased(5, 3, 0.7)
    start = first_alarm(model, rows, 1500)
    adapted = clicked(model, rows, start, start + 300)
    assert adapted.outcome.action == "adapted"
    assert np.nanmax(adapted.score(rows)[start:start + 300]) < 1.0
    for noise in (11, 12, 13):  # the plant comes by there again, with other noise
        again, _ = biased(5, 3, 0.7, noise=noise)
        before, after = ((m.score(again)[start:start + 300] >= 1.0).mean() for m in (model, adapted))
        assert after < 0.2 * before
    elsewhere, _ = biased(6, 3, 0.7)  # where the plant never was when that was said, it still alarms
    assert (adapted.score(elsewhere)[1500:] >= 1.0).mean() > 0.2
    for tag in (0, 1, 5, 8):
        other = biased(8, tag, 1.0)
        assert auc(adapted, *other) >= auc(model, *other) - 0.005
        assert (adapted.score(other[0])[1500:] >= 1.0).mean() >= (model.score(other[0])[1500:] >= 1.0).mean() - 0.02
    worse, _ = biased(5, 3, 1.4)  # the same tag, further off than it may be
    assert (adapted.score(worse)[start:] >= 1.0).mean() > 0.3


@cache
def several_methods() -> Detector:
    return fit(rows_of("lorenz", 12_000, 1)[0], TAGS["lorenz"], 0.01, params={
        "methods": ["transition", {"name": "onnx", "model": "bundled:lorenz"}], "false_alarms_per_day": 200.0})


def test_every_channel_takes_part_by_its_own_rule():
    model, (rows, _) = several_methods(), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 300)
    assert adapted.outcome.action == "adapted"
    assert np.nanmax(adapted.score(rows)[start:start + 300]) < 1.0
    (delta,) = journal(adapted.normality)
    kinds = {model.normality.calibration.channels[c].kind for c in delta.get(BALLS, {"channels": []})["channels"]}
    plain = {"trans", "bound", "conf", "affine"}
    assert "rows" in delta or kinds & plain, "the transition channels have adapted"
    assert kinds - plain, "and the onnx channels have allowances"


def test_the_papers_detector_adapts_at_once_and_for_good_by_the_papers_rules():
    methods = [{"name": "transition", "faithful": True, "levels": 20}]
    model = fit(rows_of("lorenz", 12_000, 1)[0], TAGS["lorenz"], 0.01, params={"methods": methods})
    rows, _ = faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 300, policy=Policy(mode="paper"))
    assert adapted.outcome.action == "adapted" and "for good" in adapted.outcome.text
    (delta,) = journal(adapted.normality)
    assert delta["state"] == "paper" and "expires_ns" not in delta and "rows" in delta
    assert np.nanmax(adapted.score(rows)[start:start + 300]) < 1.0
    old, new = (m.normality.methods[0].arrays["lo"].shape[0] for m in (model, adapted))
    assert new > old, "eq. 14: new transitions joined"
    assert expire(adapted.normality, AT + 10**6 * DAY_NS) == (adapted.normality, ())


def other_fault(seed: int, tag: int, kind: str, size: float, start: int = 1500, n: int = 3000) -> Rows:
    """Rows of the linear plant with a fault of one tag; size in standard deviations, a factor, or rows."""
    rows = linear_rows(n, seed).copy()
    healthy, x = linear_rows(8000, 1)[:, tag], rows[start:, tag]
    if kind == "bias":
        x = x + size * healthy.std()
    elif kind == "noise":
        x = x + size * healthy.std() * np.random.default_rng(seed + 1000).standard_normal(len(x))
    elif kind == "gain":
        x = healthy.mean() + size * (x - healthy.mean())
    elif kind == "lag":
        x = rows[start - int(size):n - int(size), tag].copy()
    else:
        x = x + size * healthy.std() * np.linspace(0, 1, len(x))
    rows[start:, tag] = x
    return rows, (np.arange(n) >= start).astype(np.uint8)


def before_and_after(model: Detector, adapted: Detector, faults: Sequence[Rows]) -> tuple[float, float, float, float]:
    """Return (AUC before, after, share of faulty rows in alarm before, after), means over some faults."""
    found = []
    for rows, truth in faults:
        shares = [float((m.score(rows)[truth != 0] >= 1.0).mean()) for m in (model, adapted)]
        found.append([auc(model, rows, truth), auc(adapted, rows, truth), *shares])
    return tuple(np.mean(found, axis=0))


SAME_TAG = [(3, "bias", 0.7), (3, "bias", 0.5), (3, "bias", 0.4), (3, "bias", -0.7), (3, "bias", -0.5),
            (3, "bias", -0.4), (3, "noise", 0.3), (3, "noise", 0.6), (3, "gain", 1.3), (3, "lag", 5),
            (3, "drift", 1.0), (3, "drift", -1.0)]
OTHER_TAGS = [(1, "bias", 0.5), (5, "bias", -0.5), (8, "noise", 0.5), (0, "gain", 1.4)]


@pytest.mark.parametrize(("said", "length"), [
    (("bias", 0.7), 60), (("bias", -0.7), 60), (("noise", 0.6), 60), (("bias", 0.7), 300),
])
def test_on_a_linear_plant_other_and_weaker_faults_of_the_same_tag_are_still_found(said, length):
    """A fault is excused where it was seen, in its direction and with its size: no other loses more than .005 AUC or a
    tenth of its rows in alarm.

    Two cannot be told apart, and only there: where the plant stood when a bias of .7 standard deviations was declared
    normal, one of .5 lies inside the plant's own noise about it (relation error .1 standard deviations, and the mean
    of 8 to 18 rows is judged). After 300 such rows the bias of -.5 in the same direction as a declared -.7 kept .79 of
    its rows in alarm (161 of 1000 before, AUC .9960 -> .9949); after 60 rows .99.
    """
    model = linear_model()
    rows, _ = other_fault(5, 3, *said)
    start = first_alarm(model, rows, 1500)
    adapted = clicked(model, rows, start, start + length)
    assert adapted.outcome.action == "adapted", adapted.outcome.text
    assert np.nanmax(adapted.score(rows)[start:start + length]) < 1.0
    for fault in [*SAME_TAG, *OTHER_TAGS]:
        auc_before, auc_after, before, after = before_and_after(
            model, adapted, [other_fault(seed, *fault) for seed in (8, 9)])
        assert auc_after >= auc_before - 0.005, fault
        assert before < 0.02 or after >= 0.9 * before, fault


@pytest.mark.parametrize(("process", "fault"), [(p, f) for p in FAULTS for f in FAULTS[p]])
def test_on_the_simulated_plants_other_and_weaker_faults_are_still_found(process, fault):
    """The first alert (60 rows) was declared false: every other fault, and the same one at 60 % of its size, loses at
    most .005 AUC and a tenth of its rows in alarm.

    After a *whole* fault of 30 s or more was declared false (1024 situations), AUC still falls by at most .005, and
    other faults of the Lorenz plant keep at least .99 of their rows in alarm. What keeps fewer on the throttle lies
    inside what was seen everywhere: the same fault at 60 % (Kb .73, La .62, Kt .99), and La, which shows in 8 % of
    its rows only (.80 after Kt).
    """
    model, (rows, _) = plant_model(process), faulty(process, fault)
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 60)
    assert adapted.outcome.action == "adapted", adapted.outcome.text
    for other, whole in FAULTS[process].items():
        for factor in (whole, 1.0 + 0.6 * (whole - 1.0)):
            if (other, factor) != (fault, whole):
                auc_before, auc_after, before, after = before_and_after(
                    model, adapted, [rows_of(process, ROWS, seed, other, factor) for seed in (7, 8)])
                assert auc_after >= auc_before - 0.005, (other, factor)
                assert before < 0.02 or after >= 0.9 * before, (other, factor)


@pytest.mark.parametrize(("process", "fault"), [("lorenz", "sigma"), ("lorenz", "beta")])
def test_after_a_whole_fault_was_declared_false_other_faults_alarm_as_before(process, fault):
    model, (rows, _) = plant_model(process), faulty(process, fault)
    adapted = clicked(model, rows, first_alarm(model, rows, START), ROWS)
    assert adapted.outcome.action == "adapted", adapted.outcome.text
    for other, factor in FAULTS[process].items():
        if other != fault:
            auc_before, auc_after, before, after = before_and_after(
                model, adapted, [rows_of(process, ROWS, seed, other, factor) for seed in (7, 8)])
            assert auc_after >= auc_before - 0.005 and after >= 0.9 * before, other


def test_a_residual_with_its_direction_is_the_plain_one_with_a_sign():
    for model in (linear_model(), plant_model("lorenz")):
        rows = linear_rows(3000, 5) if model is linear_model() else faulty("lorenz", "beta")[0]
        columns = model.normality.plan.prepare(model.record(rows))
        fitted = next(m for m in model.normality.methods if m.plugin == "regression")
        plain, signed = model.open(fitted, columns.tags), SignedRegression(fitted, columns.tags)
        assert_array_equal(np.abs(signed.residuals(columns)), plain.residuals(columns))
        assert (signed.residuals(columns) < 0).any() and (signed.residuals(columns) > 0).any()
        for t in range(50):
            signed.update(columns.values[t], columns.valid[t])
        assert_array_equal(signed.residual, signed.residuals(columns.rows(0, 50))[-1])
        signed.reset()
        signed.update(columns.values[0], columns.valid[0])
        assert np.isnan(signed.residual).all()


def test_rows_that_are_kept_back_are_neither_alerts_nor_adapted_to():
    """Maintenance, inhibit and settling, as the running monitor sees them."""
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    hold = np.zeros(len(rows))
    hold[start + 30:] = 1.0
    alert = AlertSettings(inhibit=("hold",))
    record = Record.from_rows(np.column_stack([rows, hold]), [*model.tags, Tag("hold")], 10_000_000)
    frames, monitor = frames_of(record), RowMonitor(
        "rows", model.normality, model.monitor().methods, record.tags, alert)
    alerts = sum(Engine([monitor]).step(frame)[0].raised for frame in frames)
    told = forecast(model.normality, model.normality, record, model.open, alert=alert)
    assert told.before == told.after == alerts
    free = forecast(model.normality, model.normality, record, model.open)
    assert free.before >= told.before
    inside = Feedback("false alarm", int(record.source_ns[start + 30]), int(record.source_ns[start + 90]), "op", AT)
    nothing = give_feedback(model.normality, record, inside, model.open, alert=alert)
    assert nothing.action == "unchanged" and nothing.model is model.normality
    across = replace(inside, start_ns=int(record.source_ns[start]))
    part = give_feedback(model.normality, record, across, model.open, alert=alert)
    whole = give_feedback(model.normality, record, across, model.open)
    assert part.action == whole.action == "adapted"
    balls = [Allowances.of(outcome.model).n_balls for outcome in (part, whole)]
    assert balls[0] < balls[1], "what was seen in maintenance teaches nothing"


# -- what streams -------------------------------------------------------------------------------------------------


def test_the_stream_equals_the_batch_with_feedback_and_over_gaps_and_masks():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 400)
    rng = np.random.default_rng(3)
    some = rows[start - 800:start + 1200].copy()
    some[rng.random(some.shape) < 0.01] = np.nan
    times = np.arange(len(some)) * 0.01
    times[900:] += 5.0
    batch = adapted.score(some, times)
    engine = Engine([adapted.monitor()])
    stream = np.array([engine.step(frame)[0].score for frame in frames_of(adapted.record(some, times))])
    assert_allclose(stream, batch, rtol=1e-10, atol=0)
    assert not np.allclose(np.nan_to_num(batch), np.nan_to_num(model.score(some, times)))


def test_a_model_without_feedback_has_no_allowances():
    assert Allowances.of(plant_model("lorenz").normality) is None


def test_a_step_with_feedback_takes_no_memory():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    part = rows[start - 1500:start + 500]

    def peak(detector: Detector) -> int:
        engine, frame = Engine([detector.monitor()]), Frame.empty(2)

        def run(first: int, last: int) -> None:
            for i in range(first, last):
                frame.values[:], frame.valid[:], frame.source_ns = part[i], 1, i * 10_000_000
                engine.step(frame)

        run(0, 800)
        tracemalloc.start()
        run(800, 2000)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(model)  # whatever is made once
    plain = peak(model)
    assert peak(clicked(model, rows, start, start + 400)) <= plain + 512


def test_a_new_monitor_takes_over_between_two_rows_with_its_windows_and_the_standing_alert():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    record = model.record(rows)
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 200)
    old = model.monitor()
    engine = Engine([old])
    engine_of_new = Engine([adapted.monitor()])
    scores, ideal = [], []
    for i, frame in enumerate(frames_of(record.rows(0, start + 600))):
        ideal.append(engine_of_new.step(frame)[0].score)
        if i == start + 200:
            assert old.verdict.alert and old.verdict.event_no >= 1
            number = old.verdict.event_no
            primed = adapted.monitor()
            for earlier in frames_of(record.rows(start + 200 - 2200, start + 200)):
                primed.step(earlier)
            primed.take_over(old)
            assert primed.verdict.alert and primed.verdict.event_no == number
            engine.swap(old, primed)
        verdict = engine.step(frame)[0]
        scores.append(verdict.score)
        if verdict.cleared:
            assert verdict.event_no == number
    assert engine.monitors == (primed,)
    assert_allclose(scores[start + 200:], ideal[start + 200:], rtol=1e-9)


@np.errstate(invalid="ignore")
def reference(values, valid, gap, signed, residual, groups, middle, inverse, low, high):
    """What the kernel does, row by row and ball by ball."""
    z = np.where(valid != 0, (values - middle) * inverse, np.nan)
    out = residual.copy()
    begin = 0
    for t in range(len(z)):
        begin = t if gap[t] else begin
        excused = np.full(residual.shape[1], np.inf)
        for about, balls in groups:
            for ball in balls:
                k = len(about["columns"])
                point = [z[t - age, c] if t - age >= begin else np.nan
                         for c, age in zip(about["columns"], about["ages"], strict=True)]
                away = np.abs(np.array(point) - ball[1:1 + k])
                known = ~np.isnan(away)
                if 2 * known.sum() >= k and (away[known] <= ball[0]).all():
                    m = len(about["channels"])
                    for c, least, most in zip(about["channels"], ball[1 + k:1 + k + m], ball[1 + k + m:], strict=True):
                        s = signed[t, c]
                        if math.isnan(least):
                            continue
                        outside = max(least - s, s - most, 0.0)
                        size = max(abs(least), abs(most))
                        counts = high[c] + outside if outside else low[c] + (high[c] - low[c]) * abs(s) / size
                        excused[c] = min(excused[c], counts)
        out[t] = np.where(np.isnan(residual[t]), np.nan, np.fmin(residual[t], excused))
    return out


def test_the_kernel_does_what_its_docstring_says_in_one_call_and_row_by_row():
    rng = np.random.default_rng(0)
    n, d, c = 400, 3, 4
    values, signed = rng.standard_normal((n, d)), rng.standard_normal((n, c)) * 3
    valid = (rng.random((n, d)) > 0.15).astype(np.uint8)
    gap = (rng.random(n) < 0.01).astype(np.uint8)
    signed[rng.random((n, c)) < 0.05] = np.nan
    signed[:, 3] = np.abs(signed[:, 3])  # a channel without a direction
    residual = np.abs(signed)

    def balls(n_balls: int, keys: int, own: int) -> np.ndarray:
        ends = np.sort(rng.standard_normal((n_balls, own, 2)) * 3, axis=2)
        ends[rng.random((n_balls, own)) < 0.2] = np.nan
        return np.concatenate([np.abs(rng.standard_normal((n_balls, 1 + keys))), ends[..., 0], ends[..., 1]], axis=1)

    groups = [
        ({"columns": [0, 2, 0], "ages": [0, 0, 5], "channels": [1, 3]}, balls(9, 3, 2)),
        ({"columns": [1], "ages": [2], "channels": [0, 1, 2]}, balls(3, 1, 3)),
    ]
    middle, inverse = rng.standard_normal(d), rng.uniform(0.5, 2, d)
    low, high = np.array([0.2, 0.3, 0.1, np.inf]), np.array([0.4, 0.5, np.inf, np.inf])
    ints, floats, at = [np.array([d, c, 2, 6, 3])], [middle, inverse], 2 * d
    for about, own in groups:
        ints += [np.array([len(own), len(about["columns"]), len(about["channels"]), at]), about["columns"],
                 about["ages"], about["channels"]]
        floats.append(own.ravel())
        at += own.size
    packed = np.concatenate(ints).astype(np.int64), np.concatenate(floats), np.stack([low, high], 1).ravel()
    expected = reference(values, valid, gap, signed, residual, groups, middle, inverse, low, high)
    assert np.nansum(expected) < np.nansum(residual)
    whole = residual.copy()
    allow_rows(values.ravel(), valid.ravel(), gap, np.zeros(n, np.int64), signed.ravel(), whole.ravel(), *packed,
               np.full(c + 3 + 6 * d, np.nan), np.zeros(2, np.int64))
    assert_allclose(whole, expected, rtol=1e-12)
    single, memory, cursor = residual.copy(), np.full(c + 3 + 6 * d, np.nan), np.zeros(2, np.int64)
    for t in range(n):
        allow_rows(values[t], valid[t], gap[t:t + 1], np.zeros(1, np.int64), signed[t].copy(), single[t], *packed,
                   memory, cursor)
    assert_array_equal(single, whole)


def test_an_excused_residual_stands_between_two_parts_of_the_limit():
    calibration = plant_model("lorenz").normality.calibration
    low, high = (calm_residual(calibration, part)[0] for part in CALM)
    assert (low <= high).all() and (low >= 0).all()
    finite = np.isfinite(high) & (high > 0)
    assert finite.any()
    for c in np.flatnonzero(finite):  # nothing but this residual, for as long as the longest window
        residual = np.zeros((2100, len(high)))
        residual[:, c] = high[c]
        score = calibration.score_rows(residual, np.zeros(2100, np.uint8), np.zeros(2100, np.int64))[-1, 0]
        assert score < 0.8
    energy = calibration.scorer().energies(high[None], np.zeros(1, np.int64))[0]
    for c in np.flatnonzero(finite):
        assert residual_of(calibration, 0, int(c), float(energy[c])) >= high[c] * (1 - 1e-9)


# -- twice, undone, expired, refused ------------------------------------------------------------------------------


def test_feedback_twice_changes_nothing():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    once = clicked(model, rows, start, start + 300)
    twice = clicked(once, rows, start, start + 300)
    assert twice.outcome.action == "unchanged" and "nothing to change" in twice.outcome.text
    assert twice.model_id == once.model_id and twice.normality is once.normality


@pytest.mark.parametrize("process", ["lorenz", "throttle"])
def test_undo_restores_the_identical_model_also_of_an_older_feedback(process):
    model = plant_model(process)
    first, second = list(FAULTS[process])[:2]
    rows_a, rows_b = faulty(process, first)[0], faulty(process, second)[0]
    a = first_alarm(model, rows_a, START)
    one = clicked(model, rows_a, a, a + 100)
    b = first_alarm(one, rows_b, START)
    both = clicked(one, rows_b, b, b + 100)
    assert len({model.model_id, one.model_id, both.model_id}) == 3
    assert both.without_feedback(both.outcome.delta_id).model_id == one.model_id
    only_second = both.without_feedback(one.outcome.delta_id)
    assert [d["id"] for d in journal(only_second.normality)] == [both.outcome.delta_id]
    assert only_second.without_feedback(both.outcome.delta_id).model_id == model.model_id
    assert one.without_feedback(one.outcome.delta_id[:6]).model_id == model.model_id
    with pytest.raises(ConfigError, match="no such adaptation"):
        model.without_feedback("feed")


def test_undo_restores_adapted_transitions_to_the_bit():
    model, (rows, _) = several_methods(), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    one = clicked(model, rows, start, start + 200)
    far = first_alarm(one, rows, start + 200)
    two = clicked(one, rows, far, min(far + 200, ROWS))
    assert two.outcome.changed
    assert two.without_feedback(two.outcome.delta_id).model_id == one.model_id
    back = two.without_feedback(one.outcome.delta_id).without_feedback(two.outcome.delta_id)
    assert back.model_id == model.model_id
    assert_array_equal(back.score(rows), model.score(rows))


def test_a_model_with_feedback_survives_its_file(tmp_path: Path):
    model, (rows, _) = several_methods(), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 200)
    path = tmp_path / "model.npz"
    assert adapted.save(path) == adapted.model_id
    again = load(path)
    assert again.model_id == adapted.model_id
    assert_array_equal(again.score(rows), adapted.score(rows))
    assert again.without_feedback(adapted.outcome.delta_id).model_id == model.model_id
    assert journal(again.normality)[0]["who"] == "op"


def test_it_is_provisional_until_confirmed_and_expires_by_itself():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, start + 100)
    assert "expires 2026-09-28 unless confirmed" in adapted.outcome.text
    early, over = expire(adapted.normality, AT + 7 * DAY_NS - 1)
    assert not over and early is adapted.normality
    reverted, over = expire(adapted.normality, AT + 7 * DAY_NS)
    assert [d["id"] for d in over] == [adapted.outcome.delta_id]
    assert reverted.model_id == model.model_id
    kept = confirm(adapted.normality, adapted.outcome.delta_id, "engineer", AT + DAY_NS)
    assert expire(kept, AT + 400 * DAY_NS) == (kept, ())
    (delta,) = journal(kept)
    assert (delta["state"], delta["confirmed_by"], delta["who"]) == ("confirmed", "engineer", "op")
    assert_array_equal(Detector(kept).score(rows), adapted.score(rows))
    assert undo(kept, delta["id"]).model_id == model.model_id


def test_true_and_unsure_change_nothing():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    for label in ("true", "unsure"):
        noted = clicked(model, rows, 3100, 3200, label)
        assert noted.outcome.action == "noted" and noted.normality is model.normality
    with pytest.raises(ConfigError, match="no such feedback"):
        clicked(model, rows, 3100, 3200, "flase alarm")
    with pytest.raises(RecordError, match="interval"):
        clicked(model, rows, 3100, 9000)


# -- bounds -------------------------------------------------------------------------------------------------------


def ranged(low: float, high: float) -> Detector:
    """The linear model, with an EURange on t3."""
    model = linear_model().normality
    tags = tuple(replace(t, eu_range=(low, high)) if t.name == "t3" else t for t in model.tags)
    return Detector(replace(model, tags=tags))


def test_no_value_is_taken_in_beyond_the_eu_range():
    rows, _ = biased(5, 3, 0.5)
    start = first_alarm(linear_model(), rows, 1500)
    top = float(rows[start - 30:start + 60, 3].max())
    assert clicked(ranged(-1000.0, top + 1.0), rows, start, start + 60).outcome.action == "adapted"
    tight = ranged(-1000.0, float(np.median(rows[start:start + 60, 3])))
    refused = clicked(tight, rows, start, start + 60)
    assert refused.outcome.action == "refused" and "EURange" in refused.outcome.text and "t3" in refused.outcome.text
    assert refused.normality is tight.normality


def test_no_value_and_no_distance_is_taken_in_beyond_the_protected_limits():
    model = linear_model()
    span = np.diff(model.normality.span[3])[0]
    rows = linear_rows(3000, 5).copy()
    rows[1500:, 3] += 3 * span
    start = first_alarm(model, rows, 1500)
    refused = clicked(model, rows, start, start + 60)
    assert refused.outcome.action == "refused" and "what was learnt by more" in refused.outcome.text
    rows = linear_rows(3000, 5).copy()
    middle = np.argsort(np.abs(rows[1500:2900, 3] - model.normality.span[3].mean()))[0] + 1500
    rows[middle:middle + 40, 3] = model.normality.span[3].mean() + 0.38 * span  # inside its range, far from the others
    start = first_alarm(model, rows, middle)
    refused = clicked(model, rows, start, middle + 40, policy=Policy(beyond=0.1))
    assert refused.outcome.action == "refused" and "of its healthy span" in refused.outcome.text


@pytest.mark.parametrize(("model", "rows", "column"), [
    (linear_model, lambda: linear_rows(12_000, 21), 3),
    (linear_model, lambda: linear_rows(12_000, 22), 7),
    (lambda: plant_model("lorenz"), lambda: rows_of("lorenz", 12_000, 21)[0], 0),
    (lambda: plant_model("throttle"), lambda: rows_of("throttle", 12_000, 21)[0], 0),
    (several_methods, lambda: rows_of("lorenz", 12_000, 22)[0], 1),
])
def test_a_slow_ramp_that_is_called_false_at_every_alert_still_alarms_before_30_percent(model, rows, column):
    detector, ramp = model(), rows().copy()
    span = float(np.diff(detector.normality.span[column])[0])
    drift = np.linspace(0.0, 0.30, len(ramp))
    ramp[:, column] += drift * span
    clicks, at, standing = 0, 0, []
    while True:
        score = detector.score(ramp)
        with np.errstate(invalid="ignore"):
            alarms = np.flatnonzero(score[at:] >= 1.0)
        if len(alarms) == 0:
            break
        start = int(alarms[0]) + at
        stop = min(start + 50, len(ramp))
        detector = clicked(detector, ramp[:stop], start, stop)
        clicks += 1
        if detector.outcome.action == "refused":
            standing.append(drift[start])
        at = stop
        if at >= len(ramp) or len(standing) >= 3:
            break
    assert clicks and standing, f"it alarmed {clicks} times, and each was taken in"
    assert standing[0] < 0.30
    assert (detector.score(ramp)[int(standing[0] / 0.30 * len(ramp)):] >= 1.0).any()


def test_what_keeps_trending_is_refused_with_the_reason_and_paper_mode_takes_it():
    model = linear_model()
    taken = []
    for times in (0.6, 0.75, 0.95, 1.2, 1.5):
        rows, _ = biased(5, 3, times)
        start = first_alarm(model, rows, 1500)
        before = model
        model = clicked(model, rows, start, start + 60, policy=Policy(beyond=0.3))
        taken.append(model.outcome.action)
        if model.outcome.action == "refused":
            assert "keeps trending" in model.outcome.text and "t3" in model.outcome.text
            assert model.normality is before.normality
            break
    assert taken[0] == "adapted" and taken[-1] == "refused" and len(taken) >= 3
    for_good = clicked(before, rows, start, start + 60, policy=Policy(mode="paper", beyond=0.3))
    assert for_good.outcome.action == "adapted"


# -- many ---------------------------------------------------------------------------------------------------------


MANY = list("abcdefgh")


@cache
def deviation() -> tuple[NormalityModel, Record]:
    record = noise_record(3000, MANY, seed=1)
    model, _ = fit_monitor("plain", record, [("deviation", DeviationPlugin(), DeviationParams())],
                           windows_ns=[20 * record.period_ns], false_alarms_per_day=100.0)
    return model, record


def deviation_opener(model, columns):
    return DeviationPlugin().open(model, columns)


def a_situation(rng: np.random.Generator) -> Record:
    """Noise in which three of the tags step away by some amount that may be taken in."""
    values = 0.3 * rng.standard_normal((160, len(MANY)))
    values[80:140, rng.permutation(len(MANY))[:3]] += rng.uniform(2.2, 2.9, 3) * rng.choice([-1, 1], 3)
    return Record.from_rows(values, [Tag(name) for name in MANY], 10_000_000)


@pytest.mark.parametrize("mode", ["paper", "bounded"])
def test_a_thousand_feedbacks_do_not_bloat_the_model(mode, tmp_path):
    model, _ = deviation()
    empty = model.save(tmp_path / "empty.npz")
    rng = np.random.default_rng(0)
    actions: list[str] = []
    balls = 0
    for k in range(1000):
        record = a_situation(rng)
        said = Feedback("false alarm", int(record.source_ns[80]), int(record.source_ns[139]), "op", AT + k)
        outcome = give_feedback(model, record, said, deviation_opener, policy=Policy(mode=mode, beyond=0.3))
        actions.append(outcome.action)
        model = outcome.model
        if k % 50 == 0 or k == 999:
            allowances = Allowances.of(model)
            balls = max(balls, allowances.n_balls if allowances else 0)
            assert len(model.deltas) <= fold.MOST_DELTAS + fold.MOST_GROUPS
    counts = {action: actions.count(action) for action in actions}
    assert counts["adapted"] >= (fold.MOST_DELTAS if mode == "paper" else 20), counts
    assert mode == "paper" or counts["refused"] > 100  # nobody has reviewed them
    assert balls <= fold.TOTAL_BALLS + fold.FOLDED_BALLS  # and with it the time of a step
    model.save(tmp_path / "full.npz")
    grown = (tmp_path / "full.npz").stat().st_size - (tmp_path / "empty.npz").stat().st_size
    assert grown < 1_000_000 and model.model_id != empty


def test_folding_keeps_what_was_learnt_and_says_that_it_cannot_be_undone(monkeypatch):
    monkeypatch.setattr(fold, "MOST_DELTAS", 3)
    model, (rows, _) = several_methods(), faulty("lorenz", "beta")
    first = first_alarm(model, rows, START)
    ids, spans, at = [], [], first
    for _ in range(6):
        score = model.score(rows)
        with np.errstate(invalid="ignore"):
            alarms = np.flatnonzero(score[at:] >= 1.0)
        if len(alarms) == 0:
            break
        start = int(alarms[0]) + at
        model = clicked(model, rows, start, min(start + 40, ROWS), policy=Policy(mode="paper"))
        if model.outcome.changed:
            ids.append(model.outcome.delta_id)
            spans.append((start, min(start + 40, ROWS)))
        at = min(start + 40, ROWS - 1)
    assert len(ids) > 3, "this test needs more feedback than may be open"
    own = [d for d in journal(model.normality) if d["label"] != FOLDED]
    assert [d["id"] for d in own] == ids[-3:]
    score = model.score(rows)
    for start, stop in spans:
        assert np.nanmax(score[start:stop]) < 1.0
    with pytest.raises(ConfigError, match="folded into the model for good"):
        model.without_feedback(ids[0])
    back = model
    for one in ids[-3:]:
        back = back.without_feedback(one)
    assert all(d["label"] == FOLDED for d in journal(back.normality))


def test_unreviewed_adaptations_fill_up_and_then_an_engineer_is_asked(monkeypatch):
    monkeypatch.setattr(fold, "MOST_DELTAS", 1)
    model = plant_model("lorenz")
    rows_a, rows_b = faulty("lorenz", "beta")[0], faulty("lorenz", "sigma")[0]
    a = first_alarm(model, rows_a, START)
    one = clicked(model, rows_a, a, a + 60)
    b = first_alarm(one, rows_b, START)
    refused = clicked(one, rows_b, b, b + 60)
    assert refused.outcome.action == "refused" and "unreviewed" in refused.outcome.text
    assert refused.normality is one.normality
    reviewed = Detector(confirm(one.normality, one.outcome.delta_id, "engineer"))
    assert clicked(reviewed, rows_b, b, b + 60).outcome.action == "adapted"


# -- forecast and missed ------------------------------------------------------------------------------------------


def test_the_forecast_counts_the_alerts_of_a_replay_before_and_after():
    model, (rows, _) = plant_model("lorenz"), faulty("lorenz", "beta")
    start = first_alarm(model, rows, START)
    adapted = clicked(model, rows, start, ROWS)
    record = model.record(rows)
    told = forecast(model.normality, adapted.normality, record, model.open)

    def alerts(monitor: RowMonitor) -> int:
        return sum(Engine([monitor]).step(frame)[0].raised for frame in frames_of(record))

    assert told.before == alerts(model.monitor()) > 0
    assert told.after == alerts(adapted.monitor()) == 0
    assert told.days == pytest.approx(len(rows) * 0.01 / 86400)
    assert math.isclose(told.per_day[0], told.before / told.days) and "alerts per day" in str(told)
    nothing = forecast(model.normality, adapted.normality, record.rows(0, 0), model.open)
    assert (nothing.before, nothing.days) == (0, 0.0) and "no stored rows" in str(nothing)


def test_a_missed_alert_tightens_a_limit_as_far_as_the_budget_allows():
    model = linear_model()
    rows, _ = biased(5, 3, 0.35, start=1500, n=1700)
    near = int(np.nanargmax(model.score(rows)[1500:])) + 1500
    assert model.score(rows)[1500:].max() < 1.0, "this test needs a fault that is missed"
    healthy = linear_rows(20_000, 77)
    tightened = clicked(model, rows, near - 30, near + 1, "missed", healthy=healthy)
    assert tightened.outcome.action == "tightened", tightened.outcome.text
    assert "alerts per day" in tightened.outcome.text and "the limit of" in tightened.outcome.text
    assert np.nanmax(tightened.score(rows)[near - 30:near + 1]) >= 1.0
    assert tightened.outcome.forecast.after - tightened.outcome.forecast.before <= 3 * 20_000 / 86_400 + 1
    assert tightened.without_feedback(tightened.outcome.delta_id).model_id == model.model_id
    again = clicked(tightened, rows, near - 30, near + 1, "missed", healthy=healthy)
    assert again.outcome.action == "unchanged" and again.model_id == tightened.model_id


def test_a_missed_alert_that_would_cost_too_much_or_cannot_be_weighed_is_noted_for_evaluation():
    model = linear_model()
    calm = linear_rows(3000, 31)
    quiet = int(np.nanargmin(model.score(calm)[200:])) + 200
    cost = clicked(model, calm, quiet - 5, quiet, "missed", healthy=linear_rows(20_000, 77))
    assert cost.outcome.action == "noted" and cost.normality is model.normality
    assert "true for evaluation" in cost.outcome.text and "cost too much" in cost.outcome.text
    blind = clicked(model, calm, quiet - 5, quiet, "missed")
    assert blind.outcome.action == "noted" and "healthy recording" in blind.outcome.text
    rows, _ = biased(5, 3, 2.0)
    start = first_alarm(model, rows, 1500)
    seen = clicked(model, rows, start, start + 50, "missed", healthy=linear_rows(5000, 77))
    assert seen.outcome.action == "unchanged" and "alarms in this interval already" in seen.outcome.text
