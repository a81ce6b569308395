"""Learns the arrays of a regression model from one or several healthy intervals.

Every linear map comes out of one Gram matrix of [z(t - lags) ... z(t)], summed in one pass over the rows; that of
the last fifth is kept apart, so that held-out errors need no second pass.

Source: section 8 of the design (F and R); the decisions where it is silent stand at each function.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, Record
from opcua_detector.detectors.transition_fit import Columns, describe_columns
from opcua_detector.errors import RecordError
from opcua_detector.kernels.regression import HOLD_ROWS, LARGEST
from opcua_detector.kernels.ridge import last_on_others, ridged

Bool = NDArray[np.bool_]
ALL_PARTNERS_UP_TO = 128
PARTNERS = 64
MIN_ROWS = 50
CHUNK = 8192  # rows at a time: 8 lagged columns of 200 take 50 MB
IN_CACHE = 512  # rows of features at a time
FEW_COLUMNS = 16
ENDS_PER_ROW = 4  # a run of rows shorter than this is summed whole
HELD_OUT = 0.2
# -- the nonlinear correction
MIN_ROWS_NONLINEAR = 1000  # below, a gain of a tenth on the last fifth can be luck
MOST_ROWS, BLOCKS = 20_000, 20
MOST_ENTRIES = 8_000_000  # of the features of all rows: 64 MB
MOST_INPUTS = 512
GAINS = (0.3, 3.0)
# Below 1e-10 the rms still falls on noise-free rows, but by weights that amplify the last decimals 10 000 times.
RIDGES = 10.0 ** np.arange(-10.0, 1.0)
LEAST_CUT, MOST_LOSS, PLANT_SHARE = 0.10, 0.05, 0.5
INNER = 0.95  # share of the held-out errors, the smallest ones, that decides
OUTLIER, MOST_OUTLIERS, ROUNDS = 20.0, 0.05, 3
# -- whether the plant is to be judged as a nonlinear one
PIECES = 20  # of the held-out rows, for a standard error
SURE = 2.0  # standard errors
HEAVY = 3.0  # times the inner rms: normal errors have 1.15, those of a throttle whose setpoint jumps 7 and more
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


def learn(
    record: Record, params: Any, inert: int, *, described: bool = True, corrected: Bool | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Return the arrays of the model and facts: how many of the judged columns that move at all are nonlinear.

    `nonlinear_share` of them keep the correction; for `feature_share` its features do better than a linear map of
    the same longer past. `plant_share`: as far as the plant is to be judged as a nonlinear one, see `Found`.

    Parameters
    ----------
    record : healthy rows; the columns that are not judged come first
    params : RegressionParams
    inert : int, how many those are
    described : whether the arrays that tell of errors (rms, inner, usual) are wanted; if not they are NaN, which saves
        half of the work where there is no correction
    corrected : bool[j]; the columns that keep the correction, where that is not to be chosen

    Raises
    ------
    RecordError
        A column has no valid value, or too few rows have all of theirs.
    """
    columns = describe_columns(record, 0.0, False)
    z, good = scaled_rows(record, columns)
    d = z.shape[1]
    rows = usable_rows(record, good, params.lags)
    needed = max(MIN_ROWS, 4 * params.lags)
    if rows.size < needed and not good.all():
        # A value here and there that is missing would leave no whole row: those inputs are held, as in the stream.
        z, good = held(z, good, record.gap)
        rows = usable_rows(record, good, params.lags)
    if rows.size < needed:
        share = (record.valid != 0).mean(axis=0)
        worst = record.tags[int(share.argmin())]
        raise RecordError(
            f"only {rows.size} rows have valid values of all columns now and {params.lags} rows before, {needed} "
            f"needed ({worst.name} is valid in {100 * float(share.min()):.0f} % of the rows)",
            where=", ".join(tag.name for tag in record.tags[:6]) + (" ..." if d > 6 else ""),
            next_step="fit on a longer healthy interval, or leave out the tags that are often missing")
    layout = make_layout(z, inert, params)
    first = int(rows.size * (1.0 - HELD_OUT))
    head, tail = gram(z, rows[:first], params.lags), gram(z, rows[first:], params.lags)
    linear = solve(head + tail, rows.size, layout, params)
    alone = params.nonlinear == "off" or (corrected is not None and not corrected.any())
    early = linear if alone and not described else solve(head, first, layout, params)
    arrays: dict[str, NDArray[Any]] = {
        "mean": columns.mean, "inverse": columns.inverse,
        "low": _scaled(columns.low, columns), "high": _scaled(columns.high, columns),
        "partners": layout.partners.astype(np.int32), "forecast": linear.forecast, "relation": linear.relation,
    }
    correction = Correction(z, good, record, layout, params, columns.inverse[inert:] > 0.0, corrected)
    nonlinear, found = correction.learn(early.forecast, linear.forecast)
    arrays |= nonlinear
    if described:
        told = describe_errors(held_out_errors(z, blocks(rows[first:], MOST_ROWS), layout, early))
        if found.errors.size:
            kept_at, told_sharper = arrays["corrected"] >= 0, describe_errors(found.errors[None])
            for name, figures in told.items():
                figures[0, kept_at] = told_sharper[name][0]
        arrays |= told
    else:
        arrays |= {name: np.full((2, d - inert), np.nan) for name in ("rms", "inner", "usual")}
    kept = float((arrays["corrected"] >= 0).sum() / max(1, correction.moving.sum()))
    return arrays, {"nonlinear_share": kept, "feature_share": found.curved, "plant_share": min(kept, found.nonlinear)}


def _scaled(x: Float64, columns: Columns) -> Float64:
    return np.clip((x - columns.mean) * columns.inverse, -LARGEST, LARGEST)


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
    inner = np.maximum([_inner_rms(e) for e in errors], SMALLEST_RMS)
    return {"rms": np.maximum([_rms(e) for e in errors], SMALLEST_RMS), "inner": inner,
            "usual": np.array([energy(e / scale).mean(axis=0) for e, scale in zip(errors, inner, strict=True)])}


def energy(times: Float64) -> Float64:
    """Return the squares, beyond MOST_ENERGY growing as their logarithm only: one row must not outweigh a window."""
    square = times * times
    return np.where(square <= MOST_ENERGY, square, MOST_ENERGY * (1.0 + np.log(np.maximum(square, 1.0) / MOST_ENERGY)))


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
        clear = (_rms(error) <= (1.0 - LEAST_CUT) * _rms(y_out)) & self.moving
        keep, outlier = clear, np.zeros(left.shape, bool)
        if mode == "on" or clear.sum() >= PLANT_SHARE * max(1, self.moving.sum()):
            for i in np.flatnonzero(self.moving):
                one = slice(i, i + 1)
                ridge[one], error[:, one], outlier[:, i] = _without_outliers(
                    design, left[:, one], head.size, sums.column(int(i)), ridge[one], error[:, one], weights[:, one])
            inner = _inner_rms(error) <= (1.0 - LEAST_CUT) * _inner_rms(y_out)
            keep = clear | (inner & (_rms(error) <= (1.0 + MOST_LOSS) * _rms(y_out)) & self.moving)
            keep = self.moving & (True if chosen is None else chosen) if mode == "on" else keep
        kept = np.flatnonzero(keep)
        if kept.size == 0:
            return nothing, NOTHING
        _, plain, _ = _path(sums.behind(h), x_out[:, h:], y_out)
        curved = self.moving & (_inner_rms(error) <= (1.0 - LEAST_CUT) * _inner_rms(plain))
        heavy = _rms(error) >= HEAVY * _inner_rms(error)
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
    better = _inner_rms(other_error) < _inner_rms(error)
    if better.all() and (_rms(other_error) <= (1.0 + MOST_LOSS) * _rms(error)).all():
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
        inner = _inner_rms(e)
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


def blocks(rows: Int64, most: int) -> Int64:
    """Return at most `most` of the rows: contiguous stretches, evenly spread."""
    if rows.size <= most:
        return rows
    size = max(1, most // BLOCKS)
    starts = np.linspace(0, rows.size - size, BLOCKS).astype(np.int64)
    return rows[(starts[:, None] + np.arange(size)).ravel()]


def _rms(e: Float64) -> Float64:
    out: Float64 = np.sqrt(np.mean(e * e, axis=0))
    return out


def _inner_rms(e: Float64) -> Float64:
    """Return the rms of each column's smallest errors."""
    ordered = np.sort(e * e, axis=0)[: max(1, int(INNER * e.shape[0]))]
    out: Float64 = np.sqrt(ordered.mean(axis=0))
    return out


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
