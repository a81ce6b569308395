"""Turns the residuals of the regression method into ranked causes: which tag left its forecast or its partners.

A fault of one tag raises the forecast errors of all that lean on it, and its own past soon hides it from itself. So
each tag in turn is suspected of reading falsely, true value + f(t): its guilt is the evidence, in nats, that all
forecasts hold better with such an f than without (`kernels.suspects`). A tag that repeats one value to the last digit
longer than it otherwise does is suspected the more. The f of the guiltiest tag is taken out before the next one is
judged, so that those that only follow it are not blamed beside it, and several faulty tags are all named.

Where the guiltiest tag explains only a part of what is unusual, as when many tags move together in a new way, the
rest of the blame goes by the mean energy of each tag's own residuals. A share is blame, split by kind by that energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Float64, Int64, MethodModel
from opcua_detector.detectors.regression_linear import energy
from opcua_detector.kernels.regression import LARGEST
from opcua_detector.kernels.suspects import suspicion

Bool = NDArray[np.bool_]

KINDS = ("forecast", "relation")
MOST_CAUSES = 16
MOST_GUILTY = 6  # tags that are named together
MOST_ROWS = 1000  # newest ones that are looked at
SMALLEST_SHARE = 0.01
LEAST_EVIDENCE = 3.0  # nats that the next tag must add once the guiltier ones are taken out
BAND = 3.0  # held-out rms on either side of what was expected: the normal range that is told
MOST_SCALES = 30.0  # a larger error counts as this many
SHORTEST_RUN = 5  # rows of one value
ROWS_TO_COMPARE = 20  # outside of such a run
LEAST_SCALE = 1e-3  # healthy standard deviations; no forecast is trusted to be sharper
# The same of a linear forecast of a nonlinear plant (.018 to .026 on the two simulated ones). To take it from the rows
# at hand, as the distance from the corrected forecast, names the wrong tag more often: it grows with the fault.
LINEAR_SCALE = 0.02


@dataclass(frozen=True)
class Maps:
    """How the linear forecasts depend on readings.

    change : float64[L + 1, j, d]; change of the forecast error of judged column i at t by column c at t - lag
    inert : columns that are not judged, the first ones
    """

    change: Float64
    inert: int

    @classmethod
    def of(cls, model: MethodModel) -> Maps:
        """Unpack the forecasts of a regression model."""
        a, lags = model.arrays, int(model.params["lags"])
        d, m = a["partners"].shape
        j = a["rms"].shape[1]
        inert = d - j
        change = np.zeros((lags + 1, j, d))
        for i in range(j):
            seen, row = a["partners"][inert + i], a["forecast"][i]
            for lag in range(1, lags + 1):
                change[lag, i, seen] = -row[(lags - lag) * m:(lags - lag + 1) * m]
            now = seen[seen < inert]
            change[0, i, now] = -row[lags * m:lags * m + now.size]
            change[0, i, inert + i] = 1.0
        return cls(change, inert)


def explain_rows(
    model: MethodModel, raw: Float64, valid: Bool, source_ns: Int64, signed: Float64, window: int,
    without: Callable[[int], Float64] | None = None,
) -> list[Cause]:
    """Return the causes over the last `window` judged rows, the largest share first.

    Parameters
    ----------
    model : MethodModel
    raw : float64[m, d], engineering units, the model's columns in its order; no gap inside
    valid : bool[m, d]
    source_ns : int64[m], UTC
    signed : float64[m, 2 j], value less expectation, healthy standard deviations
    window : int, rows
    without : not used
    """
    judged_rows = np.flatnonzero(np.isfinite(signed).any(axis=1))[-max(1, window):]
    if judged_rows.size == 0:
        return []
    a = model.arrays
    j = a["rms"].shape[1]
    inert = len(model.columns) - j
    weights = _shares(model, raw, valid, signed, judged_rows)
    found = []
    for k, i in np.argwhere(weights > SMALLEST_SHARE):
        c = inert + int(i)
        known = np.isfinite(signed[judged_rows, k * j + i])
        rows = judged_rows[known]
        e = signed[rows, k * j + i]
        at = int(np.argmax(np.abs(e)))  # later ones may lean on a false past of its own
        scale = 1.0 / float(a["inverse"][c])
        observed = float(raw[rows[at], c])
        expected, band = observed - float(e[at]) * scale, BAND * float(a["rms"][k, i]) * scale
        found.append(Cause(
            model.columns[c], KINDS[k], float(weights[k, i]), observed=observed, normal_low=expected - band,
            normal_high=expected + band, other=_main_partner(model, c, valid[rows]) if k else "",
            source_ns=int(source_ns[rows[at]])))
    return sorted(found, key=lambda cause: -cause.share)[:MOST_CAUSES]


def _shares(model: MethodModel, raw: Float64, valid: Bool, signed: Float64, rows: Int64) -> Float64:
    """Return float64[2, j], sums to 1: guilt of each judged column, split by kind; 0 where nothing is known."""
    weights = _weights(model, signed, rows)
    own = weights.sum(axis=0)
    guilt, told_by_one = guilt_of(model, raw, valid, signed, rows)
    blame = own / max(float(own.sum()), 1e-300)
    if guilt.any():
        blame = told_by_one * guilt / guilt.sum() + (1.0 - told_by_one) * blame
    part = np.divide(weights, own, out=np.full(weights.shape, 0.5), where=own > 0.0)
    told = np.isfinite(signed[rows]).reshape(rows.size, 2, -1).any(axis=0)
    out: Float64 = np.where(told, part * blame, 0.0)
    total = float(out.sum())
    return out / total if total > 0.0 else out


def guilt_of(
    model: MethodModel, raw: Float64, valid: Bool, signed: Float64, rows: Int64,
) -> tuple[Float64, float]:
    """Return (guilt float64[j], nats; which part of all that is unusual the guiltiest column explains, 0..1).

    The parameters are those of `explain_rows`; rows : int64[k], judged ones, increasing
    """
    first, last = max(int(rows[0]), int(rows[-1]) + 1 - MOST_ROWS), int(rows[-1]) + 1
    maps = Maps.of(model)
    error, scale = _linear_errors(model, maps, raw, valid, signed)
    error = error[first:last]
    known = np.isfinite(error)
    error = np.where(known, error, 0.0)
    # What is far off the scale counts by what it is, not by how often it holds the scale.
    weight = known / (scale * np.maximum(1.0, np.abs(error) / (MOST_SCALES * scale))) ** 2
    pulled = error * weight
    unusual = 0.5 * float((error * pulled).sum() - known.sum())
    j = error.shape[1]
    moving = model.arrays["inverse"][maps.inert:] > 0.0
    repeats = np.array([_repeated(raw[:, maps.inert + i], valid[:, maps.inert + i], first, last) for i in range(j)])
    left = [i for i in range(j) if moving[i] and known[:, i].any()]
    out = np.zeros(j)
    grams = {i: _gram(maps, i, weight) for i in left}
    evidence, readings = np.zeros(j), {i: np.zeros(last - first + maps.change.shape[0] - 1) for i in left}
    for n in range(MOST_GUILTY):
        for i in left:
            pull = np.stack([pulled @ maps.change[lag, :, maps.inert + i] for lag in range(maps.change.shape[0])], 1)
            evidence[i] = suspicion(np.ascontiguousarray(pull), grams[i], readings[i]) + repeats[i]
        guilty = max(left, key=lambda i: evidence[i], default=-1)
        if guilty < 0 or evidence[guilty] <= (LEAST_EVIDENCE if n else 0.0):
            break
        out[guilty] = evidence[guilty]
        f = readings[guilty]
        reach = maps.change.shape[0] - 1
        for lag in range(reach + 1):
            moved = np.outer(f[reach - lag:f.size - lag], maps.change[lag, :, maps.inert + guilty])
            pulled -= moved * weight
        # those that follow it are innocent: only the likeliest others are asked again
        left = sorted((i for i in left if i != guilty), key=lambda i: -evidence[i])[:MOST_GUILTY]
    return out, 1.0 if unusual <= 0.0 else min(1.0, float(out.max()) / unusual)


def _linear_errors(
    model: MethodModel, maps: Maps, raw: Float64, valid: Bool, signed: Float64,
) -> tuple[Float64, Float64]:
    """Return (errors of the linear forecasts float64[m, j], NaN = not known; their scale float64[j]).

    A corrected forecast is too sharp, and too curved, to be asked about readings far from what it has learnt: the
    linear one under it is asked instead.
    """
    a = model.arrays
    j = a["rms"].shape[1]
    error = signed[:, :j].copy()
    scale = np.maximum(a["rms"][0], np.where(a["corrected"] >= 0, LINEAR_SCALE, LEAST_SCALE))
    corrected = np.flatnonzero(a["corrected"] >= 0)
    if corrected.size == 0:
        return error, scale
    reach = maps.change.shape[0] - 1
    with np.errstate(invalid="ignore", over="ignore"):
        z = np.clip((raw - a["mean"]) * a["inverse"], -LARGEST, LARGEST)
    z[~valid] = np.nan
    for i in corrected:
        linear = np.full(len(z), np.nan)
        if len(z) > reach:
            linear[reach:] = sum(z[reach - lag:len(z) - lag] @ maps.change[lag, i] for lag in range(reach + 1))
        error[:, i] = linear
    return error, scale


def _gram(maps: Maps, i: int, weight: Float64) -> Float64:
    """Return the `gram` of `suspicion` for judged column i: one for all rows where the weights float64[k, j] allow."""
    change = maps.change[:, :, maps.inert + i]
    if (weight == weight[0]).all():
        return np.ascontiguousarray((change * weight[0] @ change.T)[None])
    pairs = (change[:, None, :] * change[None, :, :]).reshape(-1, change.shape[1])
    size = change.shape[0]
    return np.ascontiguousarray((weight @ pairs.T).reshape(-1, size, size))


def _repeated(x: Float64, valid: Bool, first: int, last: int) -> float:
    """Return the evidence in nats that a sensor is stuck in rows [first, last): its longest run of one value.

    A sensor that repeats values outside of that run too, or is not seen outside of it, is not suspected.
    """
    same = np.zeros(len(x), np.bool_)
    same[1:] = (x[1:] == x[:-1]) & valid[1:] & valid[:-1]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same[first:last].astype(np.int8), [0]])))
    if edges.size == 0:
        return 0.0
    lengths = edges[1::2] - edges[::2]
    run = int(lengths.max())
    at = first + int(edges[2 * int(lengths.argmax())])
    outside = np.concatenate([valid[1:at], valid[at + run:]])
    if run < SHORTEST_RUN or outside.sum() < ROWS_TO_COMPARE or same[:at].any() or same[at + run:].any():
        return 0.0
    return run * float(np.log(outside.sum() + 2.0))


def _weights(model: MethodModel, signed: Float64, rows: Int64) -> Float64:
    """Return float64[2, j]: mean energy over the rows, less the usual; 0 where nothing is known or it is less."""
    a = model.arrays
    j = a["rms"].shape[1]
    e = signed[rows].reshape(rows.size, 2, j)
    known = np.isfinite(e)
    total = (energy(np.where(known, e, 0.0) / a["inner"]) * known).sum(axis=0)
    count = known.sum(axis=0)
    moving = a["inverse"][len(model.columns) - j :] > 0.0
    out: Float64 = np.where(moving & (count > 0), np.maximum(total / np.maximum(count, 1) - a["usual"], 0.0), 0.0)
    return out


def _main_partner(model: MethodModel, c: int, valid: NDArray[np.bool_]) -> str:
    """Return the column that weighs most in the reconstruction of column c; empty where none is known.

    What counts is what a partner usually contributes, for a slow one the sum of its weights over the lags, for a fast
    one their norm: what it contributes in the window may be nothing, where it happens to be near its mean.

    valid : bool[m, d]; a partner that is not valid on most of the rows has not been left
    """
    partners = model.arrays["partners"][c]
    weights = model.arrays["relation"][c].reshape(-1, partners.size)
    size = np.maximum(np.abs(weights.sum(axis=0)), np.linalg.norm(weights, axis=0))
    size[(partners == c) | (2 * valid[:, partners].sum(axis=0) < valid.shape[0])] = 0.0
    best = int(np.argmax(size))
    return model.columns[int(partners[best])] if size[best] > 0.0 else ""
