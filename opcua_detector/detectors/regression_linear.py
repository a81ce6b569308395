"""Linear maps of a regression model from healthy rows: which rows and columns, sums of products, ridges, errors.

Every linear map comes out of one Gram matrix of [z(t - lags) ... z(t)], summed in one pass over the rows.

Source: section 8 of the design (F and R); the decisions where it is silent stand at each function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, Record
from opcua_detector.detectors.transition_fit import Columns
from opcua_detector.kernels.regression import HOLD_ROWS, LARGEST
from opcua_detector.kernels.ridge import last_on_others, ridged

Bool = NDArray[np.bool_]
ALL_PARTNERS_UP_TO = 128
PARTNERS = 64
MIN_ROWS = 50
HELD_OUT = 0.2  # share of the rows, the last ones
CHUNK = 8192  # rows at a time: 8 lagged columns of 200 take 50 MB
FEW_COLUMNS = 16
ENDS_PER_ROW = 4  # a run of rows shorter than this is summed whole
MOST_ROWS, BLOCKS = 20_000, 20  # of a sample of the rows, contiguous stretches in it
INNER = 0.95  # share of the held-out errors, the smallest ones, that decides
SMALLEST_RMS = 1e-9
MOST_ENERGY = 1000.0


class Linear(NamedTuple):
    """Linear maps, scaled units; d columns, j judged ones, m seen by each, f inputs of a forecast.

    forecast : float64[j, f]; rows t - lags ... t - 1 of the columns seen, then the not judged ones among them at t;
        0 behind the last input in use
    relation : float64[d, (lags + 1) m]; residual of z(t) of each column; its own entry is 1
    """

    forecast: Float64
    relation: Float64


class Layout(NamedTuple):
    """Which columns enter what.

    d, inert, lags : columns, not judged ones (they come first), rows of the past
    partners : int64[d, m], ascending
    seen_inert : int64[d]; not judged ones among them
    """

    d: int
    inert: int
    lags: int
    partners: Int64
    seen_inert: Int64

    @property
    def dense(self) -> bool:
        """Whether each column sees all."""
        return bool(self.partners.shape[1] == self.d)

    def relation_entries(self, c: int) -> Int64:
        """Return int64[(lags + 1) m]: entries of the Gram matrix that column c sees, in the order of its inputs."""
        return (np.arange(self.lags + 1)[:, None] * self.d + self.partners[c]).ravel()

    def forecast_entries(self, c: int) -> Int64:
        """Return the same for its forecast: without the judged columns at t."""
        m = self.partners.shape[1]
        return self.relation_entries(c)[: self.lags * m + int(self.seen_inert[c])]


def scaled_rows(record: Record, columns: Columns) -> tuple[Float64, Bool]:
    """Return (scaled values float64[n, d], 0 where not valid; valid bool[n, d]); the expression of `push_row`."""
    good = (record.valid != 0) & np.isfinite(record.values)
    with np.errstate(invalid="ignore", over="ignore"):
        z = np.clip((record.values - columns.mean) * columns.inverse, -LARGEST, LARGEST)
    return np.where(good, z, 0.0), good


def usable_rows(record: Record, good: Bool, lags: int) -> Int64:
    """Return int64[m]: rows with `lags` rows before them in the same interval, all values of them valid."""
    n = len(record)
    bad = ~good.all(axis=1)
    start = np.maximum.accumulate(np.where(record.gap != 0, np.arange(n), 0))
    count = np.concatenate([[0], np.cumsum(bad)])
    t = np.flatnonzero(np.arange(n) - start >= lags)
    return t[count[t + 1] == count[t - lags]]


def held(z: Float64, good: Bool, gap: Any) -> tuple[Float64, Bool]:
    """Return rows and marks with values held over at most HOLD_ROWS missing rows, never over a gap."""
    z, good = z.copy(), good.copy()
    age = np.where(good[0], 0, HOLD_ROWS + 1)
    for t in range(1, z.shape[0]):
        age = np.where(good[t], 0, HOLD_ROWS + 1 if gap[t] else age + 1)
        hold = ~good[t] & (age <= HOLD_ROWS)
        z[t, hold] = z[t - 1, hold]
        good[t] |= hold
    return z, good


def make_layout(z: Float64, inert: int, params: Any) -> Layout:
    """Choose the columns that each column sees: itself and its most correlated partners."""
    d = z.shape[1]
    others = params.partners or (d - 1 if d <= ALL_PARTNERS_UP_TO else PARTNERS)
    if others >= d - 1:
        return Layout(d, inert, params.lags, np.tile(np.arange(d), (d, 1)), np.full(d, inert))
    sample = z[:: max(1, z.shape[0] // MOST_ROWS)]
    sample = sample - sample.mean(axis=0)
    norm = np.sqrt((sample * sample).sum(axis=0))
    sample = sample / np.where(norm > 0, norm, 1.0)
    correlation = np.abs(sample.T @ sample)
    np.fill_diagonal(correlation, np.inf)
    partners = np.sort(np.argsort(-correlation, axis=1, kind="stable")[:, : others + 1], axis=1)
    return Layout(d, inert, params.lags, partners, (partners < inert).sum(axis=1))


def gram(z: Float64, rows: Int64, lags: int) -> Float64:
    """Return float64[(lags + 1) d, ...]: sum over the rows of x x', x = [z(t - lags), ..., z(t)].

    Notes
    -----
    Over an unbroken run of rows a ... b - 1 the block of the lags (i + 1, j + 1) is that of (i, j) with the row before
    the run, z(a - 1 - i) z(a - 1 - j)', in place of its last one, z(b - 1 - i) z(b - 1 - j)'. So only the products
    with z(t) are summed over all rows: with 8 lags a quarter of the work. Where the runs are short the ends would cost
    more than that saves, and of few columns the whole sum is quick as it is.
    """
    d = z.shape[1]
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    if d <= FEW_COLUMNS or ENDS_PER_ROW * first.size >= rows.size:
        return _products(z, rows, lags, 0)
    total = np.empty(((lags + 1) * d, (lags + 1) * d))
    here = lags * d
    now = total[here:]
    now[:] = 0.0
    for k in range(0, rows.size, CHUNK):
        part = rows[k : k + CHUNK]
        unbroken = int(part[-1] - part[0]) == part.size - 1
        for i in range(lags + 1):
            past = z[part[0] - i : part[-1] - i + 1] if unbroken else z[part - i]  # the former is no copy
            if i == 0:
                x = past
            now[:, here - i * d : here - i * d + d] += x.T @ past
    ends = _products(z, rows[first], lags, 1) - _products(z, rows[np.append(first[1:] - 1, rows.size - 1)] + 1, lags, 1)
    for at in range(here - d, -1, -d):
        total[at : at + d, :here] = total[at + d : at + 2 * d, d:] + ends[at : at + d]
        total[at : at + d, here:] = now[:, at : at + d].T
    return total


def _products(z: Float64, rows: Int64, oldest: int, newest: int) -> Float64:
    """Return the sum over the rows of x x', x = [z(t - oldest), ..., z(t - newest)]."""
    width = (oldest - newest + 1) * z.shape[1]
    total = np.zeros((width, width))
    for k in range(0, rows.size, CHUNK):
        x = lagged(z, rows[k : k + CHUNK], oldest, newest)
        total += x.T @ x
    return total


def lagged(z: Float64, rows: Int64, oldest: int, newest: int) -> Float64:
    """Return float64[m, (oldest - newest + 1) d]: [z(t - oldest), ..., z(t - newest)] of each row."""
    at = rows[:, None] - np.arange(oldest, newest - 1, -1)
    return np.ascontiguousarray(z[at].reshape(rows.size, -1))


def solve(total: Float64, n: int, layout: Layout, params: Any) -> Linear:
    """Return the ridge regressions of a Gram matrix over n rows.

    Notes
    -----
    Source: section 8. With P = (L'L + lambda I)^-1 the residual of entry i regressed on all other entries is
    (L P)_i / P_ii, so one inverse serves all columns that see the same inputs.
    """
    d, inert, lags, partners, seen_inert = layout
    m = partners.shape[1]
    here = lags * d
    forecast = np.zeros((d - inert, lags * m + int(seen_inert[inert:].max())))
    relation = np.empty((d, (lags + 1) * m))
    light, strong = params.ridge * n, params.relation_ridge * n
    if layout.dense:
        width = here + inert
        a = total[:width, :width] + light * np.eye(width)
        forecast[:] = np.linalg.solve(a, total[:width, here + inert :]).T
        inverse = np.linalg.inv(total + strong * np.eye(here + d))
        relation[:] = inverse[here:] / np.diag(inverse)[here:, None]
        return Linear(forecast, relation)
    for c in range(d):
        if c >= inert:
            seen = layout.forecast_entries(c)
            forecast[c - inert, : seen.size] = _ridge(total, seen, here + c, light)
        seen = layout.relation_entries(c)
        own = seen == here + c
        relation[c, own] = 1.0
        relation[c, ~own] = -_ridge(total, seen[~own], here + c, strong)
    return Linear(forecast, relation)


def _ridge(total: Float64, seen: Int64, own: int, ridge: float) -> Float64:
    """Return the ridge regression of entry `own` of a Gram matrix on the entries `seen`.

    By the Cholesky factor of both together, at half the cost of an LU solve. A matrix that rounding has made indefinite
    (a ridge far below 1e-16 of the largest product) gives the shortest of the solutions that are left, which is where
    the ridge tends to as its weight falls; an LU solve refuses such a matrix, or amplifies rounding.
    """
    entries = np.append(seen, own)
    a = np.empty((entries.size, entries.size))
    ridged(total, entries, ridge, a)
    try:
        factor = np.linalg.cholesky(a.T)
    except np.linalg.LinAlgError:
        b = total[np.ix_(seen, seen)] + ridge * np.eye(seen.size)
        return np.asarray(np.linalg.lstsq(b, total[seen, own], rcond=None)[0], np.float64)
    weights = np.empty(seen.size)
    last_on_others(factor, weights)
    return weights


def held_out_errors(z: Float64, rows: Int64, layout: Layout, early: Linear) -> Float64:
    """Return float64[2, m, j]: errors of forecast and relation on rows that `early` was not fitted on."""
    d, inert, lags, _, _ = layout
    weights = np.zeros((2, (lags + 1) * d, d - inert))
    for i in range(d - inert):
        seen = layout.forecast_entries(inert + i)
        weights[0, seen, i] = -early.forecast[i, : seen.size]
        weights[0, lags * d + inert + i, i] = 1.0
        weights[1, layout.relation_entries(inert + i), i] = early.relation[inert + i]
    return lagged(z, rows, lags, 0) @ weights


def describe_errors(errors: Float64) -> dict[str, NDArray[Any]]:
    """Return float64[2, j] each, of float64[2, m, j]: rms, rms of the 95 % smallest, mean of their `energy`."""
    inner = np.maximum([inner_rms(e) for e in errors], SMALLEST_RMS)
    return {"rms": np.maximum([rms(e) for e in errors], SMALLEST_RMS), "inner": inner,
            "usual": np.array([energy(e / scale).mean(axis=0) for e, scale in zip(errors, inner, strict=True)])}


def energy(times: Float64) -> Float64:
    """Return the squares, beyond MOST_ENERGY growing as their logarithm only: one row must not outweigh a window."""
    square = times * times
    return np.where(square <= MOST_ENERGY, square, MOST_ENERGY * (1.0 + np.log(np.maximum(square, 1.0) / MOST_ENERGY)))


def blocks(rows: Int64, most: int) -> Int64:
    """Return at most `most` of the rows: contiguous stretches, evenly spread."""
    if rows.size <= most:
        return rows
    size = max(1, most // BLOCKS)
    starts = np.linspace(0, rows.size - size, BLOCKS).astype(np.int64)
    return rows[(starts[:, None] + np.arange(size)).ravel()]


def rms(e: Float64) -> Float64:
    """Return the root of the mean square of each column."""
    out: Float64 = np.sqrt(np.mean(e * e, axis=0))
    return out


def inner_rms(e: Float64) -> Float64:
    """Return the rms of each column's smallest errors."""
    ordered = np.sort(e * e, axis=0)[: max(1, int(INNER * e.shape[0]))]
    out: Float64 = np.sqrt(ordered.mean(axis=0))
    return out
