"""The nonlinear part of a regression model's forecasts, where the plant asks for one.

Source: section 8 of the design; the decisions where it is silent stand at each function.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, Record
from opcua_detector.detectors.regression_linear import (
    HELD_OUT,
    MIN_ROWS,
    MOST_ROWS,
    SMALLEST_RMS,
    Bool,
    Layout,
    blocks,
    inner_rms,
    lagged,
    rms,
    usable_rows,
)

MIN_ROWS_NONLINEAR = 1000  # below, a gain of a tenth on the last fifth can be luck
IN_CACHE = 512  # rows of features at a time
MOST_ENTRIES = 8_000_000  # of the features of all rows: 64 MB
MOST_INPUTS = 512
GAINS = (0.3, 3.0)
# Below 1e-10 the rms still falls on noise-free rows, but by weights that amplify the last decimals 10 000 times.
RIDGES = 10.0 ** np.arange(-10.0, 1.0)
LEAST_CUT, MOST_LOSS, PLANT_SHARE = 0.10, 0.05, 0.5
OUTLIER, MOST_OUTLIERS, ROUNDS = 20.0, 0.05, 3
# -- whether the plant is to be judged as a nonlinear one
PIECES = 20  # of the held-out rows, for a standard error
SURE = 2.0  # standard errors
HEAVY = 3.0  # times the inner rms: normal errors have 1.15, those of a throttle whose setpoint jumps 7 and more


class Found(NamedTuple):
    """What was found while a correction was learnt; shares are of the judged columns that move at all.

    errors : float64[m, k], held out, of the k columns that keep it
    curved : share whose features beat a linear map of the same longer past
    nonlinear : share for which the plant is to be judged as a nonlinear one (see `Correction.learn`)
    """

    errors: Float64
    curved: float
    nonlinear: float


NOTHING = Found(np.zeros((0, 0)), 0.0, 0.0)


class Correction:
    """The nonlinear part of the forecasts: random features of a longer past, fitted on what the linear part leaves.

    Notes
    -----
    Source: section 8. What it is silent about, measured on the two simulated processes (`bench_regression
    --forecast`): the inputs themselves stand beside the features with the same light ridge (throttle without noise:
    rms of the angle 3e-4 -> 5e-5), and rows whose error is more than 20 times the median, at most 5 %, are left out
    of the fit where that does better: setpoint steps, which nobody can foresee, otherwise drown what can be learnt
    (median error of the throttle's voltage 1e-2 -> 3e-7).
    """

    def __init__(self, z: Float64, good: Bool, record: Record, layout: Layout, params: Any, moving: Bool,
                 chosen: Bool | None = None) -> None:
        self.z, self.layout, self.params, self.moving, self.chosen = z, layout, params, moving, chosen
        d = layout.d
        self.behind = max(params.lags, min(params.feature_lags, MOST_INPUTS // d))
        self.inputs = self.behind * d + layout.inert
        self.rows = usable_rows(record, good, self.behind) if params.nonlinear != "off" else np.zeros(0, np.int64)
        rng = np.random.default_rng(params.seed)
        h = params.features
        self.directions = rng.standard_normal((self.inputs, h)) / math.sqrt(self.inputs)
        self.directions *= np.exp(rng.uniform(math.log(GAINS[0]), math.log(GAINS[1]), h))
        self.offsets = rng.uniform(-1.0, 1.0, h)

    def learn(self, early: Float64, final: Float64) -> tuple[dict[str, NDArray[Any]], Found]:
        """Return the arrays, and what was found.

        early, final : float64[j, f]; linear forecasts fitted on the first rows, and on all

        Notes
        -----
        corrected int64[j]: row of `correction`, or -1; directions float64[p, h]; offsets float64[h]; correction
        float64[*, h + p + 1]: whole forecast, the linear part included. Without any, h and p are 0.

        A column keeps the correction where it cuts the held-out rms by a tenth. On a plant where half of them do so,
        it is enough that the 95 % smallest errors shrink by a tenth and the rms does not grow: there the rare large
        errors that nobody can foresee make up the rms.

        A correction also sees a longer past with a lighter ridge, which alone helps a random walk or a resonance, and
        these are linear. So the plant is a nonlinear one for a column only where its features beat a linear map of
        the same past (by a tenth; of rows that leave what was learnt the typical error tells, not the mean square),
        or where its errors have heavy tails: squares of those would be drowned by what nobody can foresee. The
        throttle with 1 % noise is of the latter kind: beside the setpoint's jumps a linear map forecasts it as well.

        Where the columns are `chosen` already, none of this is asked: a model of a part of the record, by which the
        limits are set, must not be of another kind than the model that runs.
        """
        nothing: dict[str, NDArray[Any]] = {
            "corrected": np.full(early.shape[0], -1), "directions": np.zeros((0, 0)), "offsets": np.zeros(0),
            "correction": np.zeros((0, 1))}
        mode, h, chosen = self.params.nonlinear, int(self.params.features), self.chosen
        mode = mode if chosen is None else "on" if chosen.any() else "off"
        if mode == "off" or self.rows.size < (MIN_ROWS_NONLINEAR if mode == "auto" else MIN_ROWS):
            return nothing, NOTHING
        first = int(self.rows.size * (1.0 - HELD_OUT))
        most = min(MOST_ROWS, MOST_ENTRIES // (h + self.inputs + 1))
        head = blocks(self.rows[:first], int(most * (1.0 - HELD_OUT)))
        tail = blocks(self.rows[first:], int(most * HELD_OUT))
        rows = np.concatenate([head, tail])
        design, left = self._design(rows), self._left(rows, early)
        sums = Sums.of(design[: head.size], left[: head.size])
        x_out, y_out = design[head.size :], left[head.size :]
        ridge, error, weights = _path(sums, x_out, y_out)
        clear = (rms(error) <= (1.0 - LEAST_CUT) * rms(y_out)) & self.moving
        keep, outlier = clear, np.zeros(left.shape, bool)
        if mode == "on" or clear.sum() >= PLANT_SHARE * max(1, self.moving.sum()):
            for i in np.flatnonzero(self.moving):
                one = slice(i, i + 1)
                ridge[one], error[:, one], outlier[:, i] = _without_outliers(
                    design, left[:, one], head.size, sums.column(int(i)), ridge[one], error[:, one], weights[:, one])
            inner = inner_rms(error) <= (1.0 - LEAST_CUT) * inner_rms(y_out)
            keep = clear | (inner & (rms(error) <= (1.0 + MOST_LOSS) * rms(y_out)) & self.moving)
            keep = self.moving & (True if chosen is None else chosen) if mode == "on" else keep
        kept = np.flatnonzero(keep)
        if kept.size == 0:
            return nothing, NOTHING
        _, plain, _ = _path(sums.behind(h), x_out[:, h:], y_out)
        curved = self.moving & (inner_rms(error) <= (1.0 - LEAST_CUT) * inner_rms(plain))
        heavy = rms(error) >= HEAVY * inner_rms(error)
        nonlinear = self.moving & (curved | heavy | _typically_sharper(error, plain) | (mode == "on"))
        moving = max(1, self.moving.sum())
        left = self._left(rows, final)
        sums = Sums.of(design, left, sums.products + x_out.T @ x_out)
        whole = ~outlier[:, kept].any(axis=0)
        weights = np.empty((design.shape[1], kept.size))
        weights[:, whole] = _weights(sums.columns(kept[whole]), ridge[kept[whole]])
        for k in np.flatnonzero(~whole):
            used = sums.column(int(kept[k])).without(design, left[:, kept[[k]]], outlier[:, kept[k]])
            weights[:, [k]] = _weights(used, ridge[[kept[k]]])
        weights[h + (self.behind - self.layout.lags) * self.layout.d : -1] += self._spread(final)[kept].T
        corrected = np.full(early.shape[0], -1)
        corrected[kept] = np.arange(kept.size)
        return {"corrected": corrected, "directions": self.directions, "offsets": self.offsets,
                "correction": np.ascontiguousarray(weights.T)}, \
            Found(error[:, kept], float(curved.sum() / moving), float(nonlinear.sum() / moving))

    def _design(self, rows: Int64) -> Float64:
        """Return float64[n, h + p + 1]: features, their inputs, 1; the expression of the kernel `features`."""
        h, past = self.offsets.size, self.behind * self.layout.d
        out = np.empty((rows.size, h + self.inputs + 1))
        out[:, h : h + past] = lagged(self.z, rows, self.behind, 1)
        out[:, h + past : -1] = self.z[rows, : self.layout.inert]
        out[:, -1] = 1.0
        for k in range(0, rows.size, IN_CACHE):
            part = out[k : k + IN_CACHE]
            a = part[:, h:-1] @ self.directions + self.offsets
            np.divide(a, np.sqrt(1.0 + a * a), out=part[:, :h])
        return out

    def _spread(self, forecast: Float64) -> Float64:
        """Return float64[j, lags d + inert]: linear forecasts over all columns, whatever each of them sees."""
        layout = self.layout
        out = np.zeros((forecast.shape[0], layout.lags * layout.d + layout.inert))
        for i in range(forecast.shape[0]):
            entries = layout.forecast_entries(layout.inert + i)
            out[i, entries] = forecast[i, : entries.size]
        return out

    def _left(self, rows: Int64, forecast: Float64) -> Float64:
        """Return float64[n, j]: what a linear forecast leaves."""
        inert = self.layout.inert
        x = np.hstack([lagged(self.z, rows, self.layout.lags, 1), self.z[rows, :inert]])
        out: Float64 = self.z[rows, inert:] - x @ self._spread(forecast).T
        return out


class Sums(NamedTuple):
    """What a ridge regression needs of its rows.

    products : float64[q, q], sum of x x'; targets : float64[q, j], sum of x y'; n : rows
    """

    products: Float64
    targets: Float64
    n: int

    @classmethod
    def of(cls, x: Float64, y: Float64, products: Float64 | None = None) -> Sums:
        """Return the sums over rows x float64[n, q], y float64[n, j]; products, where they are known."""
        return cls(x.T @ x if products is None else products, x.T @ y, x.shape[0])

    def column(self, i: int) -> Sums:
        """Return those of one target."""
        return self.columns(np.array([i]))

    def columns(self, at: Int64) -> Sums:
        """Return those of some targets."""
        return self._replace(targets=self.targets[:, at])

    def behind(self, first: int) -> Sums:
        """Return those of the inputs from `first` on."""
        return self._replace(products=self.products[first:, first:], targets=self.targets[first:])

    def without(self, x: Float64, y: Float64, rows: Bool) -> Sums:
        """Return the sums less the rows marked in bool[n], a few of them: the others need not be summed again."""
        out, target = x[rows], y[rows]
        return Sums(self.products - out.T @ out, self.targets - out.T @ target, self.n - out.shape[0])


def _without_outliers(
    design: Float64, left: Float64, first: int, sums: Sums, ridge: Float64, error: Float64, weights: Float64,
) -> tuple[Float64, Float64, Bool]:
    """Fit one column again without the rows that nobody can foresee; return (ridge, errors held out, rows left out).

    design : float64[n, q]; left : float64[n, 1]; the rows from `first` on are held out; sums : of the others;
    ridge float64[1], error float64[n - first, 1] and weights float64[q, 1] : the fit with all rows, which stays where
    it does better: large errors may be approximation, not chance. It is judged by the inner errors, and the rms must
    not grow.
    """
    nothing = outlier = np.zeros(left.shape[0], bool)
    other_ridge, other_error = ridge, error
    for _ in range(ROUNDS):
        found = _outliers((left - design @ weights)[:, 0])
        if not (found[:first] & ~outlier[:first]).any():
            break
        outlier = found
        used = sums.without(design[:first], left[:first], outlier[:first])
        other_ridge, other_error, weights = _path(used, design[first:], left[first:])
    better = inner_rms(other_error) < inner_rms(error)
    if better.all() and (rms(other_error) <= (1.0 + MOST_LOSS) * rms(error)).all():
        return other_ridge, other_error, outlier
    return ridge, error, nothing


def _path(sums: Sums, x_out: Float64, y_out: Float64) -> tuple[Float64, Float64, Float64]:
    """Fit each column of y with the ridge that leaves the least inner error held out.

    x_out, y_out : float64[m, q], float64[m, j] held out. Returns (ridge float64[j] per row, errors held out
    float64[m, j], weights float64[q, j]).
    """
    values, vectors = np.linalg.eigh(sums.products)
    values = np.maximum(values, 0.0)[:, None]
    target = vectors.T @ sums.targets
    few = RIDGES.size * y_out.shape[1] < x_out.shape[1]  # then turning the weights is cheaper than turning the rows
    ahead = x_out if few else x_out @ vectors
    best, ridge, error = np.full(y_out.shape[1], np.inf), np.ones(y_out.shape[1]), y_out.copy()
    for one in RIDGES:
        along = target / (values + one * sums.n)
        e = y_out - ahead @ (vectors @ along if few else along)
        inner = inner_rms(e)
        better = inner < best
        best[better], ridge[better], error[:, better] = inner[better], one, e[:, better]
    return ridge, error, vectors @ (target / (values + ridge * sums.n))


def _typically_sharper(error: Float64, plain: Float64) -> Bool:
    """Return bool[j]: whether the geometric mean of `error` float64[m, j] is a tenth below that of `plain`, for sure.

    The standard error is that over contiguous pieces, so that errors which last do not count as many.
    """
    gain = 0.5 * np.log((plain * plain + SMALLEST_RMS**2) / (error * error + SMALLEST_RMS**2))
    pieces = np.array([piece.mean(axis=0) for piece in np.array_split(gain, PIECES)])
    mean, spread = pieces.mean(axis=0), pieces.std(axis=0, ddof=1) / math.sqrt(PIECES)
    return np.asarray((mean >= -math.log(1.0 - LEAST_CUT)) & (mean >= SURE * spread))


def _outliers(e: Float64) -> Bool:
    """Return bool[n]: errors of more than OUTLIER times the median, the largest MOST_OUTLIERS of all at most."""
    size = np.abs(e)
    bar = max(OUTLIER * max(float(np.median(size)), SMALLEST_RMS), float(np.quantile(size, 1.0 - MOST_OUTLIERS)))
    found: Bool = size > bar
    return found


def _weights(sums: Sums, ridge: Float64) -> Float64:
    """Return float64[q, k]: ridge regressions of each target, each with its own ridge per row."""
    values, vectors = np.linalg.eigh(sums.products)
    target = vectors.T @ sums.targets
    out: Float64 = vectors @ (target / (np.maximum(values, 0.0)[:, None] + ridge * sums.n))
    return out
