"""How good scores and alarms are against ground truth: ranking figures and the operating point.

Ranking figures (`auc`, `partial_auc`, `average_precision`, `vus_pr`, `best_f1`) use nothing of a score but its order.
One rule holds for all of them: a NaN (warming up, no verdict) ranks below every other score, so a row without a
verdict counts as one that would never alarm. Where the truth holds one class alone there is nothing to rank and the
figure is NaN. Nothing here adjusts points: an event is not credited whole because one of its rows alarmed.

Source: section 6 of the design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .api import Float64, Int64
from .errors import RecordError

VUS_THRESHOLDS = 250


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What alarms at one limit are worth; the first four figures are only meaningful together.

    onset_recall : float; share of events with an alarm on one of their rows, NaN without an event
    false_alarms_per_hour : float; alarms that begin on a healthy row, per healthy hour, NaN without a healthy row
    false_alarm_share : float; share of the healthy rows in alarm (FAR), NaN without a healthy row
    delay_s : float; median over the detected events of the time from the first row to the alarm, NaN without one
    missed_share : float; share of the anomalous rows without an alarm (MAR), NaN without an anomalous row
    f1 : float; of rows, no point adjustment, NaN where nothing is anomalous and nothing alarms
    onsets, detected : int; events, and those detected
    false_alarms : int; alarms that begin on a healthy row
    healthy_h : float; healthy time, hours
    """

    onset_recall: float
    false_alarms_per_hour: float
    false_alarm_share: float
    delay_s: float
    missed_share: float
    f1: float
    onsets: int
    detected: int
    false_alarms: int
    healthy_h: float


def auc(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve; ties count half.

    score : float64[n], higher = more anomalous, NaN = no verdict; truth : 0/1 [n]

    Raises
    ------
    RecordError
        Lengths differ, or truth holds anything but 0 and 1.
    """
    positive, negative = _steps(score, truth)
    if _one_class(positive, negative):
        return math.nan
    lower = negative.sum() - np.cumsum(negative)
    return float((positive * (lower + negative / 2)).sum() / (positive.sum() * negative.sum()))


def partial_auc(score: ArrayLike, truth: ArrayLike, max_fpr: float = 0.1) -> float:
    """Return the area under the ROC curve up to `max_fpr`, standardised so that chance is .5 and the best is 1.

    score, truth : as in `auc`; max_fpr : false positive rate in (0, 1]

    Raises
    ------
    RecordError
        As in `auc`.
    ValueError
        max_fpr is not in (0, 1].

    Notes
    -----
    McClish (1989), the same as `max_fpr` of scikit-learn's `roc_auc_score`.
    """
    if not 0.0 < max_fpr <= 1.0:
        raise ValueError(f"max_fpr {max_fpr} is not in (0, 1]")
    positive, negative = _steps(score, truth)
    if _one_class(positive, negative):
        return math.nan
    tpr = np.concatenate([[0.0], np.cumsum(positive) / positive.sum()])
    fpr = np.concatenate([[0.0], np.cumsum(negative) / negative.sum()])
    stop = int(np.searchsorted(fpr, max_fpr, side="right"))
    edge = float(np.interp(max_fpr, fpr[stop - 1:stop + 1], tpr[stop - 1:stop + 1]))
    x, y = np.append(fpr[:stop], max_fpr), np.append(tpr[:stop], edge)
    area = float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)
    chance = max_fpr**2 / 2
    return 0.5 * (1.0 + (area - chance) / (max_fpr - chance)) if max_fpr < 1.0 else area


def average_precision(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the precision-recall curve as the sum of precision x gain of recall.

    score, truth : as in `auc`, with its errors. Rows of equal score are taken together.
    """
    positive, negative = _steps(score, truth)
    if _one_class(positive, negative):
        return math.nan
    found = np.cumsum(positive)
    precision = found / (found + np.cumsum(negative))
    return float((precision * positive).sum() / positive.sum())


def best_f1(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the largest F1 over all limits: an upper bound that no limit chosen on healthy data need reach.

    score, truth : as in `auc`, with its errors. Rows without a verdict never alarm here, so the limit that lets
    everything alarm covers the rows with a score only.
    """
    score, labels = _checked(score, truth)
    anomalous = int(labels.sum())
    if anomalous in (0, len(labels)):
        return math.nan
    known = ~np.isnan(score)
    positive, negative = _steps(score[known], labels[known])
    if len(positive) == 0:
        return 0.0
    found = np.cumsum(positive)
    return float((2.0 * found / (found + np.cumsum(negative) + anomalous)).max())


def vus_pr(score: ArrayLike, truth: ArrayLike, window: int, thresholds: int = VUS_THRESHOLDS) -> float:
    """Return the volume under the PR surface: range-based precision and recall, averaged over buffers.

    Around each event the labels fall off over a buffer on either side; the area under the range-based PR curve is
    averaged over the surface l = 0 ... `window`, whose buffer reaches l // 2 rows.

    Parameters
    ----------
    score, truth : as in `auc`
    window : int, rows, >= 0; 0 leaves the range-based area without a buffer
    thresholds : int >= 2; limits taken at equal steps of the sorted scores

    Raises
    ------
    RecordError
        As in `auc`.
    ValueError
        window or thresholds out of range.

    Notes
    -----
    Paparrizos et al., "Volume under the surface", VLDB 2022; equal to the authors' public code (TSB-AD,
    `RangeAUC_volume_opt` with 250 limits) to rounding, also in its details: a buffer row counts towards the positives
    only where it is above the limit, and events whose buffers touch are one. That code runs through all rows for each
    limit and buffer; here each row is assigned once to the first limit that it reaches, and sums over limits follow
    from one count.
    """
    if window < 0 or thresholds < 2:
        raise ValueError(f"window {window} must be at least 0 and thresholds {thresholds} at least 2")
    score, labels = _checked(score, truth)
    n, anomalous = len(labels), int(labels.sum())
    if anomalous in (0, n):
        return math.nan
    rank = _rank(score)
    limits = np.sort(rank)[::-1][np.linspace(0, n - 1, thresholds).astype(int)]
    # First limit that a row reaches; the last limit is the lowest score, so every row reaches one.
    reached = np.searchsorted(-limits, -rank, side="left")
    above = np.cumsum(np.bincount(reached, minlength=thresholds))
    inside = np.cumsum(np.bincount(reached[labels == 1], minlength=thresholds))
    starts, stops = _runs(labels)
    near, distance = _neighbourhood(labels, starts, stops, window // 2)
    at = reached[near]
    areas = []
    for length in range(window + 1):
        reach = length // 2
        soft = np.zeros(len(near))
        for side in distance:
            covered = side <= reach
            soft[covered] += np.sqrt(1.0 - side[covered] / max(length, 1))
        buffered = np.cumsum(np.bincount(at, np.minimum(soft, 1.0), minlength=thresholds))
        hits = inside + buffered
        recall = np.minimum(hits / (anomalous + buffered / 2.0), 1.0) * _existence(
            reached, starts, stops, reach, thresholds)
        precision = hits / above
        areas.append(float((np.diff(recall, prepend=0.0) * precision).sum()))
    return float(np.mean(areas))


def operating_point(
    alert: ArrayLike, truth: ArrayLike, period_s: float, gap: ArrayLike | None = None,
) -> OperatingPoint:
    """Return what these alarms are worth against ground truth.

    An event is an unbroken run of anomalous rows; it is detected by an alarm on any of its rows, and an alarm that is
    already on when it begins counts with delay 0 (that it was on before shows in the false alarms). An alarm that
    begins inside an event and outlasts it is no new false alarm, but its healthy rows count in `false_alarm_share`.

    Parameters
    ----------
    alert : bool[n]; in alarm
    truth : 0/1 [n]
    period_s : float > 0, seconds per row
    gap : 0/1 [n] or None; 1 = a new recording begins here, no event or alarm continues over it

    Raises
    ------
    RecordError
        Lengths differ, or truth holds anything but 0 and 1.
    ValueError
        period_s is not positive, or alert is not boolean.
    """
    if not (math.isfinite(period_s) and period_s > 0):
        raise ValueError(f"period_s {period_s} is not positive")
    on = np.asarray(alert)
    if on.dtype != np.bool_:
        raise ValueError(f"alert is {on.dtype}, expected bool: compare scores with the limit first")
    _, labels = _checked(np.zeros(on.shape), truth)
    fresh = np.zeros(len(labels), np.bool_) if gap is None else np.asarray(gap) != 0
    if fresh.shape != labels.shape:
        raise RecordError(f"gap has shape {fresh.shape}, truth {labels.shape}", next_step="pass one value per row")
    event = labels == 1
    starts, stops = _runs(labels, fresh)
    delays = [int(hit[0]) for a, b in zip(starts, stops, strict=True) if len(hit := np.flatnonzero(on[a:b]))]
    begins = on.copy()
    begins[1:] &= ~on[:-1] | fresh[1:]
    healthy = int((~event).sum())
    anomalous, false_alarms = len(labels) - healthy, int((begins & ~event).sum())
    hits, wrong = int((on & event).sum()), int((on & ~event).sum())
    hours = healthy * period_s / 3600.0
    return OperatingPoint(
        onset_recall=_share(len(delays), len(starts)), false_alarms_per_hour=_share(false_alarms, hours),
        false_alarm_share=_share(wrong, healthy), delay_s=float(np.median(delays)) * period_s if delays else math.nan,
        missed_share=_share(anomalous - hits, anomalous), f1=_share(2 * hits, anomalous + hits + wrong),
        onsets=len(starts), detected=len(delays), false_alarms=false_alarms, healthy_h=hours)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _checked(score: ArrayLike, truth: ArrayLike) -> tuple[Float64, Int64]:
    """Return float64[n] and int64[n] of 0 and 1."""
    values, labels = np.asarray(score, dtype=np.float64), np.asarray(truth)
    if values.ndim != 1 or labels.shape != values.shape:
        raise RecordError(f"scores have shape {values.shape}, truth {labels.shape}",
                          next_step="pass one score and one label per row")
    if not np.isin(labels, (0, 1)).all():
        raise RecordError(f"truth holds {np.unique(labels)[:5].tolist()}",
                          next_step="label healthy rows 0 and anomalous rows 1")
    return values, labels.astype(np.int64)


def _rank(score: Float64) -> Int64:
    """Return int64[n]: dense rank of each score, 0 for NaN."""
    rank = np.zeros(len(score), np.int64)
    known = ~np.isnan(score)
    rank[known] = np.unique(score[known], return_inverse=True)[1] + 1
    return rank


def _steps(score: ArrayLike, truth: ArrayLike) -> tuple[Float64, Float64]:
    """Return (anomalous, healthy) rows at each distinct score, highest score first, float64[m] each."""
    values, labels = _checked(score, truth)
    rank = _rank(values)
    total = np.bincount(rank).astype(np.float64)
    positive = np.bincount(rank, labels).astype(np.float64)
    there = total > 0
    return positive[there][::-1], (total - positive)[there][::-1]


def _one_class(positive: Float64, negative: Float64) -> bool:
    return not (positive.sum() > 0 and negative.sum() > 0)


def _runs(labels: Int64, fresh: NDArray[np.bool_] | None = None) -> tuple[Int64, Int64]:
    """Return starts and stops (half-open) of the runs of 1, broken also where `fresh` is set."""
    padded = np.concatenate([[0], labels, [0]])
    starts, stops = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    if fresh is not None:
        cuts = np.flatnonzero(fresh[1:] & (labels[1:] == 1) & (labels[:-1] == 1)) + 1
        starts, stops = np.sort(np.concatenate([starts, cuts])), np.sort(np.concatenate([stops, cuts]))
    return starts.astype(np.int64), stops.astype(np.int64)


def _neighbourhood(labels: Int64, starts: Int64, stops: Int64, reach: int) -> tuple[Int64, list[Float64]]:
    """Return the healthy rows within `reach` of an event, and their distances to two events on either side.

    Two are enough: a buffer is worth at least sqrt(1/2) where it covers, so two of them already give the full 1.
    """
    rows = np.flatnonzero(labels == 0)
    after = np.searchsorted(starts, rows)
    ends, begins = np.concatenate([[-np.inf] * 2, stops - 1]), np.concatenate([starts, [np.inf] * 2])
    distances = [rows - ends[after + 1], begins[after] - rows, rows - ends[after], begins[after + 1] - rows]
    near = np.minimum(distances[0], distances[1]) <= reach
    return rows[near], [side[near] for side in distances]


def _existence(reached: Int64, starts: Int64, stops: Int64, reach: int, thresholds: int) -> Float64:
    """Return float64[thresholds]: share of the events, widened by `reach` and merged, with a row above the limit."""
    n = len(reached)
    # Widened events that touch at a row are one; a buffer cut off by the end of the record reaches no further.
    apart = stops[:-1] - 1 + reach < starts[1:] - reach
    first = np.maximum(starts[np.concatenate([[True], apart])] - reach, 0)
    last = np.minimum(stops[np.concatenate([apart, [True]])] - 1 + reach, n - 1)
    edges = np.column_stack([first, last + 1]).ravel()
    # reduceat takes every second slice; a stop at the end of the array is left open.
    best = np.minimum.reduceat(reached, edges[:-1] if edges[-1] == n else edges)[::2]
    return np.asarray(np.cumsum(np.bincount(best, minlength=thresholds)) / len(first))
