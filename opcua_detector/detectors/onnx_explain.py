"""Says which column a graph's residuals blame, and where in the window that shows best.

Healthy residuals may have rare large values (a new setpoint that nobody can foresee), and every window holds some of
them. So a window is compared with a healthy one rank by rank: its k-th largest residual with the healthy quantile of
that rank. Among the rows where this ratio is large, the one furthest outside its band is the one to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..api import Cause, Channel, Float64, Int64

# Half-normal quantiles in units of a robust scale: what a graph without healthy quantiles is compared with.
_LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999)
_HALF_NORMAL = (0.0, 0.319, 0.674, 1.150, 1.645, 1.960, 2.576, 3.291, 3.891)
_LEAST_QUANTILE = 0.05  # of the median: a healthy residual of exactly 0 must not make any other one infinitely bad


@dataclass(frozen=True)
class Judged:
    """One judged column over some rows.

    observed, residual, prediction : float64[m]; EU, scales, EU; NaN where there is none
    scale : float, EU for a residual of 1; NaN: unknown
    levels, quantiles : healthy quantiles of the residual; empty: unknown
    """

    channel: Channel
    observed: Float64
    residual: Float64
    prediction: Float64
    scale: float
    levels: Sequence[float]
    quantiles: Sequence[float]


def causes(judged: Sequence[Judged], source_ns: Int64, window: int) -> list[Cause]:
    """Return one cause for each column that has a residual in the last `window` judged rows, the worst first."""
    spoken = np.flatnonzero(np.isfinite([one.residual for one in judged]).any(axis=0))[-max(1, window):]
    found: list[tuple[float, Cause]] = []
    for one in judged:
        rows = spoken[np.isfinite(one.residual[spoken])]
        if len(rows):
            found.append(_cause(one, rows, source_ns))
    total = sum(weight for weight, _ in found)
    ranked = sorted(found, key=lambda item: -item[0])
    return [_with_share(cause, weight / total if total > 0 else 1.0 / len(found)) for weight, cause in ranked]


def _cause(one: Judged, rows: Int64, source_ns: Int64) -> tuple[float, Cause]:
    """Return (weight, cause): the mean logarithm of the ratios above 1, and the row that shows best."""
    order = rows[np.argsort(-one.residual[rows], kind="stable")]
    rank = 1.0 - (np.arange(len(order)) + 0.5) / len(order)
    healthy = np.interp(rank, one.levels or _LEVELS, one.quantiles or _HALF_NORMAL)
    median = float(np.interp(0.5, one.levels or _LEVELS, one.quantiles or _HALF_NORMAL))
    healthy = np.maximum(healthy, max(_LEAST_QUANTILE * median, 1e-12))
    ratio = one.residual[order] / healthy
    weight = float(np.log(np.maximum(ratio, 1.0)).mean())
    # Far off in scales may be too little to see in units: of the telling rows take the most visible one.
    log_ratio = np.log(np.maximum(ratio, 1e-12))
    telling = log_ratio >= 0.5 * log_ratio.max() if log_ratio.max() > 0 else ratio == ratio.max()
    k = int(np.argmax(np.where(telling, one.residual[order] - healthy, -np.inf)))
    t = int(order[k])
    band = healthy[k] * one.scale
    low, high = one.prediction[t] - band, one.prediction[t] + band
    if not (math.isfinite(low) and math.isfinite(high)):
        low = high = math.nan
    return weight, Cause(
        tag=one.channel.column, kind=one.channel.kind, share=0.0, observed=float(one.observed[t]),
        normal_low=float(low), normal_high=float(high), source_ns=int(source_ns[t]),
    )


def _with_share(cause: Cause, share: float) -> Cause:
    return Cause(tag=cause.tag, kind=cause.kind, share=share, observed=cause.observed, normal_low=cause.normal_low,
                 normal_high=cause.normal_high, source_ns=cause.source_ns)
