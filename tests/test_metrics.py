"""Metrics against scikit-learn, a slow VUS-PR by its definition, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from opcua_detector.errors import RecordError
from opcua_detector.metrics import (
    VUS_THRESHOLDS,
    auc,
    average_precision,
    best_f1,
    operating_point,
    partial_auc,
    vus_pr,
)

RANKING = (auc, partial_auc, average_precision, best_f1, lambda score, truth: vus_pr(score, truth, 5))


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties and truth with both classes, in runs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(8, 250))
    truth = np.zeros(n, np.int64)
    for _ in range(draw(st.integers(1, 5))):
        start = int(rng.integers(0, n))
        truth[start:start + int(rng.integers(1, 15))] = 1
    truth[0] = 1 - truth[1:].max()
    truth[-1] = 1 - truth[:-1].min()
    score = rng.standard_normal(n) + truth * draw(st.sampled_from([0.0, 1.0, 4.0]))
    return np.round(score, draw(st.sampled_from([0, 1, 15]))), truth


@given(scored())
@settings(max_examples=80, deadline=None)
def test_curves_equal_scikit_learn(case):
    score, truth = case
    assert auc(score, truth) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert average_precision(score, truth) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    for max_fpr in (0.02, 0.1, 0.5, 1.0):
        assert partial_auc(score, truth, max_fpr) == pytest.approx(
            roc_auc_score(truth, score, max_fpr=max_fpr), abs=1e-12)
    assert best_f1(score, truth) == pytest.approx(max(f1_score(truth, score >= t) for t in np.unique(score)), abs=1e-12)


def slow_vus_pr(score, truth, window):
    """VUS-PR, limit by limit and buffer by buffer (Paparrizos et al. 2022)."""
    n, events, limits = len(truth), [], -np.sort(-score)
    for t in range(n):
        if truth[t] and (t == 0 or not truth[t - 1]):
            events.append([t, t])
        elif truth[t]:
            events[-1][1] = t
    volume = 0.0
    for length in range(window + 1):
        reach, soft, wide = length // 2, truth.astype(float), []
        for first, last in events:
            for d in range(1, reach + 1):
                for t in (first - d, last + d):
                    if 0 <= t < n:
                        soft[t] = min(1.0, soft[t] + math.sqrt(1 - d / length))
            if wide and wide[-1][1] >= first - reach:
                wide[-1][1] = last + reach
            else:
                wide.append([max(first - reach, 0), last + reach])
        area = before = 0.0
        for k in np.linspace(0, n - 1, VUS_THRESHOLDS).astype(int):
            alarm = score >= limits[k]
            positives = truth.sum() + (soft * alarm * (truth == 0)).sum() / 2
            there = np.mean([alarm[a:b + 1].any() for a, b in wide])
            recall = min(1.0, (soft * alarm).sum() / positives) * there
            area += (recall - before) * (soft * alarm).sum() / alarm.sum()
            before = recall
        volume += area
    return volume / (window + 1)


@given(scored(), st.integers(0, 24))
@settings(max_examples=25, deadline=None)
def test_vus_pr_equals_its_definition(case, window):
    score, truth = case
    assert vus_pr(score, truth, window) == pytest.approx(slow_vus_pr(score, truth, window), abs=1e-12)


def test_vus_pr_worked_by_hand():
    # Two one-row events, one alarm row beside the first (distance 1). Without a buffer the best row misses and recall
    # comes only with the second and third limit; with l = 2 or 3 the near miss counts sqrt(1 - 1/l).
    truth = np.array([0, 0, 1, 0, 0, 0, 0, 1, 0, 0])
    score = np.array([0, 0, 8, 9, 0, 0, 0, 7, 0, 0.0])
    # l = 0 and 1: after the first limit TP 0; second: TP 1 of 2, one of two events, precision 1/2; third: all, 2/3.
    plain = 0.25 * 1 / 2 + 0.75 * 2 / 3
    # l = 2, soft s = sqrt(1/2) on rows 1, 3, 6, 8: first limit TP s, positives 2 + s/2, one of two events.
    s = math.sqrt(0.5)
    steps = [s / (2 + s / 2) / 2, (1 + s) / (2 + s / 2) / 2, 1.0]
    buffered = steps[0] * s + (steps[1] - steps[0]) * (1 + s) / 2 + (steps[2] - steps[1]) * (2 + s) / 3
    assert vus_pr(score, truth, 1) == pytest.approx(plain, abs=1e-12)
    assert vus_pr(score, truth, 2) == pytest.approx((2 * plain + buffered) / 3, abs=1e-12)


def test_vus_pr_of_a_perfect_score_is_one_without_buffer():
    truth = np.repeat([0, 1, 0, 1, 0], 50)
    assert vus_pr(truth + 0.0, truth, 0) == 1.0


def test_ranking_figures_depend_on_order_alone():
    rng = np.random.default_rng(3)
    truth = np.repeat([0, 1, 0, 1, 0], 40)
    score = rng.standard_normal(200) + truth
    for figure in RANKING:
        assert figure(np.exp(5 * score), truth) == figure(score, truth)


def test_all_ties_are_chance():
    truth = np.repeat([0, 1], [30, 10])
    flat = np.full(40, 2.5)
    assert auc(flat, truth) == 0.5
    assert partial_auc(flat, truth) == pytest.approx(0.5, abs=1e-12)
    assert average_precision(flat, truth) == 0.25
    assert best_f1(flat, truth) == pytest.approx(0.4)  # everything alarms: precision 1/4, recall 1


@pytest.mark.parametrize("figure", RANKING)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_nan(figure, label):
    assert math.isnan(figure(np.arange(10.0), np.full(10, label)))


@pytest.mark.parametrize("figure", RANKING)
def test_nan_ranks_below_every_score(figure):
    rng = np.random.default_rng(4)
    truth = np.repeat([0, 1, 0, 1], 30)
    score = rng.standard_normal(120) + truth
    score[:12] = np.nan
    score[35:40] = np.nan
    lowest = np.where(np.isnan(score), -1e9, score)
    assert figure(score, truth) == pytest.approx(figure(lowest, truth), abs=1e-12)
    with_infinity = np.where(score == np.nanmin(score), -np.inf, score)  # -inf is a score, NaN is none
    assert figure(with_infinity, truth) == figure(score, truth)


def test_rows_without_a_verdict_never_alarm_in_best_f1():
    truth = np.array([1, 1, 1, 0])
    assert best_f1([np.nan, np.nan, 1.0, 2.0], truth) == pytest.approx(2 * 1 / (2 + 3))
    assert best_f1([np.nan] * 4, truth) == 0.0


@pytest.mark.parametrize("figure", RANKING)
def test_wrong_input_is_named(figure):
    with pytest.raises(RecordError, match=r"shape \(3,\)"):
        figure(np.zeros(3), np.array([0, 1]))
    with pytest.raises(RecordError, match="label healthy rows 0"):
        figure(np.zeros(3), np.array([0, 1, 2]))


def test_ranges_are_checked():
    for max_fpr in (0.0, 1.1):
        with pytest.raises(ValueError, match="max_fpr"):
            partial_auc([1, 2], [0, 1], max_fpr)
    with pytest.raises(ValueError, match="window"):
        vus_pr([1, 2], [0, 1], -1)
    with pytest.raises(ValueError, match="thresholds"):
        vus_pr([1, 2], [0, 1], 1, thresholds=1)


def test_operating_point_worked_by_hand():
    truth = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0])
    alert = np.array([0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]) != 0
    point = operating_point(alert, truth, 1800.0)
    assert (point.onsets, point.detected) == (3, 2)
    assert point.onset_recall == pytest.approx(2 / 3)
    assert point.delay_s == 1800.0  # median of 2 rows and of 0 rows (already on)
    assert point.false_alarms == 2  # rows 1 and 8; row 6 goes on from the event
    assert point.healthy_h == 5.0
    assert point.false_alarms_per_hour == pytest.approx(0.4)
    assert point.false_alarm_share == pytest.approx(4 / 10)
    assert point.missed_share == pytest.approx(4 / 6)
    assert point.f1 == pytest.approx(2 * 2 / (2 * 2 + 4 + 4))


def test_no_point_adjustment():
    truth = np.repeat([0, 1, 0], [100, 100, 100])
    alert = np.zeros(300, bool)
    alert[150] = True
    point = operating_point(alert, truth, 1.0)
    assert (point.onset_recall, point.delay_s, point.missed_share) == (1.0, 50.0, 0.99)
    assert point.f1 == pytest.approx(f1_score(truth, alert))


def test_nothing_goes_on_over_a_gap():
    truth, alert, gap = np.array([0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 1]) != 0, np.array([1, 0, 1, 0, 1])
    whole, parts = operating_point(alert, truth, 1.0), operating_point(alert, truth, 1.0, gap)
    assert (whole.onsets, whole.detected, whole.false_alarms, whole.delay_s) == (1, 1, 0, 1.0)
    assert (parts.onsets, parts.detected, parts.false_alarms, parts.delay_s) == (2, 1, 1, 0.0)


def test_operating_point_without_one_class():
    healthy = operating_point(np.array([False, True, True]), np.zeros(3, int), 1200.0)
    assert math.isnan(healthy.onset_recall) and math.isnan(healthy.missed_share) and math.isnan(healthy.delay_s)
    assert healthy.false_alarms_per_hour == pytest.approx(1.0) and healthy.f1 == 0.0
    faulty = operating_point(np.array([False, True]), np.ones(2, int), 1.0)
    assert math.isnan(faulty.false_alarms_per_hour) and math.isnan(faulty.false_alarm_share)
    assert (faulty.onset_recall, faulty.delay_s, faulty.missed_share) == (1.0, 1.0, 0.5)


def test_operating_point_refuses_scores_and_bad_periods():
    with pytest.raises(ValueError, match="compare scores with the limit"):
        operating_point(np.array([0.2, 1.4]), [0, 1], 1.0)
    for period in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="period_s"):
            operating_point(np.array([True, False]), [0, 1], period)
    with pytest.raises(RecordError, match="gap"):
        operating_point(np.array([True, False]), [0, 1], 1.0, [1])


def test_buffers_of_several_events_on_one_side_add_up():
    # From row 6 on, two events to the left are within reach of the longer buffers: sqrt(1 - d/l) of both, at most 1.
    truth = np.array([0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0])
    score = np.random.default_rng(5).standard_normal(len(truth))
    assert vus_pr(score, truth, 12) == pytest.approx(slow_vus_pr(score, truth, 12), abs=1e-12)
