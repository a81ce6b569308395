"""Turns the residuals of the regression method into ranked causes: which tag left its forecast or its partners.

The weight of a judged column and kind is its mean energy in the window, (e / s)^2, less the same held out on healthy
rows; s is the rms of the 95 % smallest healthy errors. A large energy counts by its logarithm, so that the few rows
that nobody can foresee, such as those after a new setpoint, do not outweigh the others.

A fault of one tag raises the residuals of all that lean on it, and its own past hides a lasting one from itself. So
each suspect in turn is replaced by what the others say it should be: its guilt is its own weight plus the weight that
the others lose by it. A share is guilt, split by kind, over the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Float64, Int64, MethodModel
from opcua_detector.detectors.regression_fit import energy

KINDS = ("forecast", "relation")
MOST_CAUSES = 16
MOST_SUSPECTS = 8  # each takes one pass over the rows
SMALLEST_SHARE = 0.01
BAND = 3.0  # held-out rms on either side of what was expected: the normal range that is told


def explain_rows(
    model: MethodModel, raw: Float64, valid: NDArray[np.bool_], source_ns: Int64, signed: Float64, window: int,
    without: Callable[[int], Float64],
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
    without : gives the same with a column of the model replaced by what the others say it should be
    """
    judged_rows = np.flatnonzero(np.isfinite(signed).any(axis=1))[-max(1, window):]
    if judged_rows.size == 0:
        return []
    a = model.arrays
    j = a["rms"].shape[1]
    inert = len(model.columns) - j
    weights = _guilt(model, signed, judged_rows, without)
    total = float(weights.sum())
    found = []
    for k, i in np.argwhere(weights > SMALLEST_SHARE * total):
        c = inert + int(i)
        known = np.isfinite(signed[judged_rows, k * j + i])
        rows = judged_rows[known]
        e = signed[rows, k * j + i]
        at = int(np.argmax(np.abs(e)))
        scale = 1.0 / float(a["inverse"][c])
        observed = float(raw[rows[at], c])
        expected, band = observed - float(e[at]) * scale, BAND * float(a["rms"][k, i]) * scale
        found.append(Cause(
            model.columns[c], KINDS[k], float(weights[k, i]) / total, observed=observed, normal_low=expected - band,
            normal_high=expected + band, other=_main_partner(model, c, valid[rows]) if k else "",
            source_ns=int(source_ns[rows[at]])))
    return sorted(found, key=lambda cause: -cause.share)[:MOST_CAUSES]


def _guilt(model: MethodModel, signed: Float64, rows: Int64, without: Callable[[int], Float64]) -> Float64:
    """Return float64[2, j]: the guilt of each judged column, split by kind as its own weight is."""
    weights = _weights(model, signed, rows)
    own = weights.sum(axis=0)
    # A corrected forecast is too sharp to judge with an estimate among its inputs.
    usable = np.ones(weights.shape)
    usable[0, model.arrays["corrected"] >= 0] = 0.0
    guilt = own.copy()
    for i in np.argsort(-own, kind="stable")[:MOST_SUSPECTS]:
        if own[i] <= 0.0:
            break
        relief = (weights - _weights(model, without(len(model.columns) - own.size + int(i)), rows)) * usable
        relief[:, i] = 0.0
        guilt[i] = max(0.0, float(own[i] + relief.sum()))
    out: Float64 = weights * (guilt / np.where(own > 0.0, own, 1.0))
    return out


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
