"""From features of healthy parts to their corridor and its limits, by held-out parts and the alarm budget."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from ..api import Float64, Int64, Record
from ..calibration import FOLDS
from ..columns import ColumnPlan
from ..kernels.parts import corridor, depart
from .model import BIN, KINDS, MEAN, NOISE, RUN, Cycle

NEIGHBOURS = 2  # bins on each side that share their spread
FLOOR, NOISE_FLOOR = 0.005, 0.002  # of the span of a column: no spread is smaller
RESOLUTION_SHARE = 0.3  # standard deviation of rounding, in units of the step, about
LIMIT_FLOOR = 3.0  # spreads: no limit is lower
SEEN_FACTOR = 1.05  # no limit is nearer to what healthy parts have reached
MIN_PEAKS, MAX_PEAKS = 10, 25
FEW_PARTS = 40  # peaks are looked for among so many of the highest parts, or a tenth of them


def spread_floors(plan: ColumnPlan, columns: Record, kind: Int64) -> Float64:
    """Return float64[r, c]: the smallest spread of each feature; the resolution of a tag is no health."""
    floor = np.empty((len(kind), len(plan.columns)))
    for c, column in enumerate(plan.columns):
        x = columns.values[columns.valid[:, c] != 0, c]
        low, high = np.quantile(x, [0.01, 0.99])
        distinct = np.unique(x)
        steps = np.diff(distinct)
        step = float(np.median(steps)) if len(distinct) < len(x) // 4 else 0.0  # many equal values: it is rounded
        if column.decimals is not None and column.name in plan.tags:
            step = max(step, 10.0 ** -column.decimals)
        span = max(float(high - low), float(x.max() - x.min()) * 0.1, 1e-12)
        floor[:, c] = max(FLOOR * span, RESOLUTION_SHARE * step)
        floor[kind == NOISE, c] = max(NOISE_FLOOR * span, RESOLUTION_SHARE * step)
    return floor


def pooled_corridor(features: Float64, kind: Int64, floor: Float64) -> tuple[Float64, Float64]:
    """Return (center, spread), float64[r, c]; a bin has at least the mean spread of its neighbours."""
    center = np.empty(features.shape[1:])
    own = np.empty_like(center)
    corridor(np.ascontiguousarray(features), max(MIN_PEAKS, len(features) // 2), center, own)
    spread = own.copy()
    for k in range(MEAN):
        rows = np.flatnonzero(kind == k)
        reach = NEIGHBOURS if k in (RUN, BIN) else 1
        squares = own[rows] ** 2
        total, count = np.zeros_like(squares), np.zeros_like(squares)
        for shift in range(-reach, reach + 1):
            for i in range(max(0, -shift), min(len(rows), len(rows) - shift)):
                good = ~np.isnan(squares[i + shift])
                total[i, good] += squares[i + shift, good]
                count[i, good] += 1
        pooled = np.sqrt(total / np.maximum(count, 1))
        spread[rows] = np.maximum(own[rows], pooled)
    return center, np.where(np.isnan(own), np.nan, np.maximum(spread, floor))


def held_out(features: Float64, rows: Int64, kind: Int64, floor: Float64) -> tuple[Float64, Float64]:
    """Return departures of parts not learnt, in spreads: the worst float64[p, k, c] and of the time float64[p]."""
    p, _, n_columns = features.shape
    worst = np.full((p, len(KINDS), n_columns), np.nan)
    where = np.zeros((len(KINDS), n_columns), np.int64)
    late = np.zeros(p)
    every = np.arange(p)
    for start, stop in pairwise(np.linspace(0, p, FOLDS + 1).astype(np.int64)):
        rest = np.concatenate([every[:start], every[stop:]])
        center, spread = pooled_corridor(features[rest], kind, floor)
        usual, time_spread = _time_corridor(rows[rest])
        for i in range(start, stop):
            depart(features[i], center, spread, kind, 0, len(kind), worst[i], where)
            late[i] = abs(rows[i] - usual) / time_spread
    return worst, late


def _time_corridor(rows: Int64) -> tuple[float, float]:
    """Return (usual, spread) of the number of rows of a part."""
    x = np.ascontiguousarray(rows, np.float64).reshape(-1, 1, 1)
    center, spread = np.empty((1, 1)), np.empty((1, 1))
    corridor(x, 1, center, spread)
    return float(center[0, 0]), max(float(spread[0, 0]), 0.5, FLOOR * float(center[0, 0]))


def time_limits(rows: Int64, late: Float64, rate: float, cycle: Cycle, period_ns: int) -> Float64:
    """Return (shortest, usual, longest) rows of a part, float64[3]: the limits of the time it takes."""
    usual, spread = _time_corridor(rows)
    reach = peak_limit(late, rate, 0) * spread
    low = max(0.0, min(usual - reach, float(rows.min()) - 1))
    high = max(usual + reach, float(rows.max()) + 1)
    if cycle.shortest_ns:
        low = max(low, min(cycle.shortest_ns / period_ns, usual - 1))
    if cycle.longest_ns:
        high = min(high, max(cycle.longest_ns / period_ns, usual + 1))
    return np.array([low, usual, high])


def peak_limit(stat: Float64, rate: float, features: int) -> float:
    """Return the limit that `rate` of the parts exceed; never below all that was seen.

    stat : float64[p]; largest departure of `features` features of a held-out part, in spreads (0: of a single figure
    without any mixing, such as the time it took, which may well be bounded). The tail is that of
    `calibration`: peaks of runs of high parts, u + m ln(lambda / rate) or the same in the logarithm, whichever is
    larger (see `detector.md` 8). No tail is taken to be lighter than a normal one: where steep and quiet stretches are
    mixed, the bounded departures of the steep ones hide the tails of the quiet ones (5 % noise on the simulated press:
    12 false alarms a day instead of 1). With too few peaks for a tail of its own the normal one goes through the
    largest departure that was seen.
    """
    x = stat[~np.isnan(stat)]
    n = len(x)
    if n < MIN_PEAKS:
        return math.inf
    seen = float(x.max())
    limit = max(SEEN_FACTOR * seen, LIMIT_FLOOR)
    if features:
        limit = max(limit, -NormalDist().inv_cdf(min(0.5, rate / (2 * features))))
    above = np.flatnonzero(x > np.quantile(x, min(0.9, max(0.5, 1 - FEW_PARTS / n))))
    starts = np.append(0, np.flatnonzero(np.diff(above) > 1) + 1) if len(above) else np.zeros(0, np.int64)
    peaks = np.sort(np.maximum.reduceat(x[above], starts)) if len(above) else np.zeros(0)
    highest = min(len(peaks) - 1, max(MIN_PEAKS, min(MAX_PEAKS, len(peaks) // 4)))
    if highest < MIN_PEAKS:
        return max(limit, seen * math.sqrt(max(1.0, -math.log(min(1.0, rate)) / math.log(n))))
    base = float(peaks[-highest - 1])
    ahead = max(0.0, math.log(highest / n / rate))
    limit = max(limit, base + float(np.mean(peaks[-highest:] - base)) * ahead)
    if base > 0:
        limit = max(limit, base * math.exp(float(np.mean(np.log(peaks[-highest:] / base))) * ahead))
    return limit
