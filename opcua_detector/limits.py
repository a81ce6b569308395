"""Limits from an alarm budget: how high a view must stand that healthy data alarms no more often than asked."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .api import Float64, Int64

CLUSTER_QUANTILE: Final = 0.9  # rows above it form clusters; the highest cluster peaks set the limit
MIN_CLUSTERS, MAX_PEAKS = 10, 25
MARGIN: Final = 1.05  # a limit stands so much above the highest healthy value, where the budget allows none of those
LEAST_LIMIT: Final = 2.0  # healthy spreads above the median: a limit is never lower
SUSPICIOUS_FACTOR: Final = 3.0  # times the spread of the held-out windows: stretches unlike the rest
MAX_TRIMMED: Final = 0.1  # share of windows that may be set apart as such


def tail_limit(value: Float64, typical: float, rate: float, *, normal: bool) -> tuple[float, int]:
    """Return (limit, clusters) for a view in healthy spreads.

    Rows above the 90 % quantile form clusters; of the cluster peaks the highest quarter (10 to 25, or as
    many as the budget allows in the record) counts: u is the
    next lower peak, m their mean excess over it, lambda their number per row; limit = u + m ln(lambda / rate)
    (`detector.md` 8; a view is a logarithm, so this is the Hill estimate of the tail of the residuals). Where fewer
    than 10 clusters were seen, a tail through the median and the highest value takes over: of k = n / typical
    independent values the highest is exceeded with 1 / (k + 1), so limit = max ln(K + 1) / ln(k + 1) with K = 1 /
    (rate typical), or its root with a normal tail (the logarithm of a mean of squares is close to normal, a mean
    surprise is not). Where the budget expects none of it in the record, the limit stands above all that was seen.

    value : float64[n]; held-out, NaN = no verdict; typical : rows, the geometric mean of the view's windows, by which
    clusters are told apart; rate : wanted false alarms per row. Stretches unlike the rest count too (the fit names
    them): a plant that has had them will have them again.
    """
    known = np.flatnonzero(~np.isnan(value))
    n = len(known)
    if n == 0:
        return LEAST_LIMIT, 0
    x = value[known]
    seen = max(float(x.max()), 0.0)
    above = known[x > np.quantile(x, CLUSTER_QUANTILE)]
    starts = np.append(0, np.flatnonzero(np.diff(above) > typical) + 1) if len(above) else np.zeros(0, np.int64)
    peaks = np.sort(np.maximum.reduceat(value[above], starts)) if len(above) else np.zeros(0)
    highest = min(len(peaks) - 1, max(MIN_CLUSTERS, min(MAX_PEAKS, len(peaks) // 4), math.ceil(n * rate)))
    if highest >= MIN_CLUSTERS:
        base = float(peaks[-highest - 1])
        limit = base + float(np.mean(peaks[-highest:] - base)) * max(0.0, math.log(highest / n / rate))
    else:
        times = math.log1p(1 / (rate * typical)) / math.log1p(max(n / typical, 1.0))
        limit = seen * (math.sqrt(times) if normal else times)
    if n * rate < 1.0:
        limit = max(limit, seen * MARGIN)
    return max(limit, LEAST_LIMIT), len(peaks)


def unlike_the_rest(value: Float64, window: int) -> list[Int64]:
    """Return runs of rows (int64 arrays) in which a window mean stands far above the bulk.

    value : float64[n], NaN = no window. At most `MAX_TRIMMED` of the windows are set apart: more is no exception.
    """
    known = value[~np.isnan(value)]
    if len(known) == 0:
        return []
    usual, high = np.quantile(known, [0.5, 0.9])
    bar = usual + SUSPICIOUS_FACTOR * max(high - usual, 0.1 * abs(usual), 0.1)
    above = np.flatnonzero(np.nan_to_num(value, nan=-np.inf) > bar)
    if len(above) == 0 or len(above) > MAX_TRIMMED * len(known):
        return []
    return np.split(above, np.flatnonzero(np.diff(above) > window) + 1)
