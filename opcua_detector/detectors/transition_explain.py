"""Turns the residuals of the transition method into ranked causes: which tag, against which other, when.

Evidence makes the kinds comparable; per sensor i and instant t each is in 0..1:

    trans   1 for a transition that was never seen (its conf, 1 by rule, is not counted again)
    bound   a / (1 + a), a = largest excess over a bound in widths; shared among the components by excess
    conf    (r - h) / 2, r = sqrt(2 conf) = |w - v| the distance from the nearest kept shape (centred unit
            vectors: 2 is the opposite shape), h the same for the farthest healthy vector of this transition;
            shared among the components by their part in |w - v|^2
    affine  a / (1 + a), a = how far s_t lies outside of its normal range, in half widths of that range: the
            prediction -+ 3 held-out rms, or as far as it went in healthy data; speaks against sensor i itself

A cause's share is its evidence summed over the window, over all evidence in the window.

Source: M. Alamir, R. Dion (2024), "characterisation": the components (i, j, t) of each residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Float64, Int64, MethodModel
from opcua_detector.kernels.transition import LARGEST

MOST_CAUSES = 16
MOST_SHAPES = 32
"""So many instants of a sensor at most, the worst ones, are compared with shapes one by one."""
SMALLEST_SHARE = 0.01


class _Rows(NamedTuple):
    """The rows that are judged, for all sensors.

    raw : float64[m, n_columns], engineering units
    scaled : float64[m, n_columns], 0 where not valid
    valid : bool[m, n_columns]
    t : int64[k], judged instants
    source_ns : int64[m]
    residuals : float64[k, n_kinds, n_sensors]
    """

    raw: Float64
    scaled: Float64
    valid: NDArray[np.bool_]
    t: Int64
    source_ns: Int64
    residuals: Float64


def explain_rows(
    model: MethodModel, raw: Float64, valid: NDArray[np.bool_], source_ns: Int64, residuals: Float64,
    window: int,
) -> list[Cause]:
    """Return the causes over the last `window` rows, the largest share first.

    Parameters
    ----------
    model : MethodModel
    raw : float64[m, n_columns], engineering units, the model's columns in its order; no gap inside
    valid : bool[m, n_columns]
    source_ns : int64[m], UTC
    residuals : float64[m, n_channels], what the method gave for these rows
    window : int, rows
    """
    a, step = model.arrays, int(model.params["step"])
    judged = np.flatnonzero(a["judged"])
    newest = np.arange(max(2 * step - 1, raw.shape[0] - window), raw.shape[0])
    if newest.size == 0:
        return []
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.where(valid, (raw - a["mean"]) * a["inverse"], 0.0).clip(-LARGEST, LARGEST)
    by_kind = residuals[newest].reshape(newest.size, -1, judged.size)
    rows = _Rows(raw, scaled, valid, newest - step, source_ns, by_kind)
    found: list[tuple[float, Cause]] = []
    for i, own in enumerate(judged):
        found += _sensor_causes(model, rows, i, int(own))
    total = sum(weight for weight, _ in found)
    causes = [replace(cause, share=weight / total) for weight, cause in found]
    causes = [cause for cause in causes if cause.share > SMALLEST_SHARE]
    return sorted(causes, key=lambda cause: -cause.share)[:MOST_CAUSES]


def _sensor_causes(model: MethodModel, rows: _Rows, i: int, own: int) -> list[tuple[float, Cause]]:
    """Return (evidence, cause without share) of all that speaks against sensor i."""
    a, levels, step = model.arrays, int(model.params["levels"]), int(model.params["step"])
    trans, bound, conf = rows.residuals[:, 0, i], rows.residuals[:, 1, i], rows.residuals[:, 2, i]
    judged = np.isfinite(trans)
    before = np.searchsorted(a["edges"][i], rows.raw[rows.t, own], side="left")
    after = np.searchsorted(a["edges"][i], rows.raw[rows.t + step, own], side="left")
    row = np.where(judged, a["table"][i][np.where(judged, before * levels + after, 0)], -1)
    found: list[tuple[float, Cause]] = []
    unseen = judged & (row < 0)
    if unseen.any():
        found.append((float(unseen.sum()), _unseen_cause(model, rows, i, own, before, after, unseen)))
    outside = np.flatnonzero((row >= 0) & (bound > 0.0))
    if outside.size:
        found += _column_causes(model, rows, i, "bound", before, after, row, outside, _bound_parts)
    # a little more than reached, since the vectors are kept with 7 digits
    distance = np.maximum(a["cover"][row], 1.0 - float(model.params["eta"])) * 1.001 + 1e-6
    with np.errstate(invalid="ignore"):
        unlike = np.flatnonzero((row >= 0) & (conf > distance))
    if unlike.size:
        evidence = (np.sqrt(2.0 * conf[unlike]) - np.sqrt(2.0 * distance[unlike])) / 2.0
        worst = np.sort(np.argsort(-evidence, kind="stable")[:MOST_SHAPES])
        weight = evidence[worst] * (evidence.sum() / evidence[worst].sum())
        found += _column_causes(
            model, rows, i, "conf", before, after, row, unlike[worst],
            lambda *w: _shape_parts(model, row[unlike[worst]], *w) * weight[:, None],
        )
    if rows.residuals.shape[1] > 3:
        found += _affine_cause(model, rows, i, own, before, after, row)
    return found


def _unseen_cause(
    model: MethodModel, rows: _Rows, i: int, own: int, before: Int64, after: Int64, unseen: NDArray[np.bool_]
) -> Cause:
    """Return the cause of the latest instant with a transition that was never seen.

    Its normal range is made of the seen levels that join the one nearest to where it went.
    """
    a, levels, step = model.arrays, int(model.params["levels"]), int(model.params["step"])
    at = int(np.flatnonzero(unseen)[-1])
    to_levels = np.flatnonzero(a["table"][i].reshape(levels, levels)[before[at]] >= 0)
    low = high = float("nan")
    if to_levels.size:
        joined = np.split(to_levels, np.flatnonzero(np.diff(to_levels) > 1) + 1)
        nearest = min(joined, key=lambda run: int(np.abs(run - after[at]).min()))
        # a level is open at the ends: what was normal there ends where the healthy values did
        low = max(_level_range(model, i, int(nearest[0]))[0], float(a["low"][own]))
        high = min(_level_range(model, i, int(nearest[-1]))[1], float(a["high"][own]))
    name = model.columns[own]
    return Cause(
        name, "trans", 0.0, observed=float(rows.raw[rows.t[at] + step, own]), normal_low=low,
        normal_high=high, other=name, **_situation(model, i, int(before[at]), int(after[at])),
        source_ns=int(rows.source_ns[rows.t[at] + step]), seen=False,
    )


def _affine_cause(
    model: MethodModel, rows: _Rows, i: int, own: int, before: Int64, after: Int64, row: Int64
) -> list[tuple[float, Cause]]:
    """Return the cause of the instant at which sensor i is farthest outside of its normal range, or none."""
    a, step = model.arrays, int(model.params["step"])
    error = np.where(row >= 0, rows.residuals[:, 3, i], np.nan)
    # a little more than reached in healthy data, since sums differ in the last digits
    limit = a["limit"][row] * (1.0 + 1e-9) + 1e-12
    off = np.flatnonzero(error > limit)
    if off.size == 0:
        return []
    excess = np.minimum((error[off] - limit[off]) / limit[off], 1e9)
    k = int(off[np.argmax(excess)])
    half = float(limit[k] + a["slack"][row[k]])
    t = int(rows.t[k])
    w = np.concatenate([rows.scaled[t, a["partners"][i]], rows.scaled[t - step + 1 : t, own]])
    predicted = float(w @ a["maps"][row[k], :-1] + a["maps"][row[k], -1])
    name = model.columns[own]
    cause = Cause(
        name, "affine", 0.0, observed=float(rows.raw[t, own]), normal_low=_raw(a, own, predicted - half),
        normal_high=_raw(a, own, predicted + half), other=name,
        **_situation(model, i, int(before[k]), int(after[k])), source_ns=int(rows.source_ns[t]),
    )
    return [(float((excess / (1.0 + excess)).sum()), cause)]


def _column_causes(
    model: MethodModel, rows: _Rows, i: int, kind: str, before: Int64, after: Int64, row: Int64,
    chosen: Int64, parts: Callable[[Float64, NDArray[np.bool_], Float64, Float64, Float64], Float64],
) -> list[tuple[float, Cause]]:
    """Return one cause per column that is off while sensor i makes its transitions.

    `parts` gives the evidence of each component, float64[m, n_e], at the `chosen` ones of the judged
    instants, from w, its validity, lo, hi (all [m, n_e], scaled) and the tolerance [n_e]. The instant that is
    told is the one with the largest evidence; for bounds the one farthest outside in the tag's unit, which a
    trend shows best.
    """
    a, step = model.arrays, int(model.params["step"])
    own, partners = int(np.flatnonzero(a["judged"])[i]), a["partners"][i]
    column = np.concatenate([partners, np.full(step - 1, own)])  # of each component
    back = np.concatenate([np.zeros(partners.size, np.int64), np.arange(step - 1, 0, -1)])  # rows before t
    at = rows.t[chosen][:, None] - back
    lo, hi = a["lo"][row[chosen]], a["hi"][row[chosen]]
    w = rows.scaled[at, column]
    part = parts(w, rows.valid[at, column], lo, hi, a["tolerance"][column])
    telling = np.where(part > 0.0, np.maximum(lo - w, w - hi), -np.inf) if kind == "bound" else part
    found = []
    for j in np.unique(column):
        mine = np.flatnonzero(column == j)
        weight = float(part[:, mine].sum())
        if weight <= 0.0:
            continue
        k, component = np.unravel_index(int(np.argmax(telling[:, mine])), (chosen.size, mine.size))
        c = mine[component]
        low = high = float("nan")
        if kind == "bound":
            low, high = _raw(a, j, lo[k, c]), _raw(a, j, hi[k, c])
        situation = _situation(model, i, int(before[chosen[k]]), int(after[chosen[k]]))
        found.append((weight, Cause(
            model.columns[j], kind, 0.0, observed=float(rows.raw[at[k, c], j]), normal_low=low,
            normal_high=high, other=model.columns[own], **situation, source_ns=int(rows.source_ns[at[k, c]]),
        )))
    return found


def _bound_parts(
    w: Float64, valid: NDArray[np.bool_], lo: Float64, hi: Float64, tolerance: Float64
) -> Float64:
    """Return float64[m, n_e]: a / (1 + a) of the largest excess a, shared by excess."""
    excess = np.maximum(lo - w, 0.0) + np.maximum(w - hi, 0.0)
    excess = np.where(valid, excess / (hi - lo + tolerance), 0.0)
    largest = excess.max(axis=1, keepdims=True)
    return excess / np.maximum(excess.sum(axis=1, keepdims=True), 1e-300) * (largest / (1.0 + largest))


def _shape_parts(
    model: MethodModel, row: Int64, w: Float64, valid: NDArray[np.bool_], lo: Float64, hi: Float64,
    tolerance: Float64,
) -> Float64:
    """Return float64[m, n_e], rows sum to 1: parts in the distance from the nearest kept shape."""
    a = model.arrays
    part = np.zeros(w.shape)
    for k, ok in enumerate(valid):
        v = a["vectors"][a["pointers"][row[k]] : a["pointers"][row[k] + 1], ok].astype(np.float64)
        shape, v = w[k, ok] - w[k, ok].mean(), v - v.mean(axis=1, keepdims=True)
        shape /= np.linalg.norm(shape)
        v /= np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
        square = (shape - v[np.argmax(v @ shape)]) ** 2
        part[k, ok] = square / square.sum()
    return part


def _raw(arrays: Any, column: int, scaled: float) -> float:
    """Return a scaled value in the unit of its column (one that never moved has one value only)."""
    inverse = float(arrays["inverse"][column])
    return float(arrays["mean"][column]) + (float(scaled) / inverse if inverse else 0.0)


def _level_range(model: MethodModel, i: int, level: int) -> tuple[float, float]:
    """Return (low, high) of a level of sensor i, in its unit; the outermost ones are open."""
    edges = model.arrays["edges"][i]
    low = float(edges[level - 1]) if level > 0 else float("-inf")
    return low, float(edges[level]) if level < edges.size else float("inf")


def _situation(model: MethodModel, i: int, before: int, after: int) -> dict[str, Any]:
    """Return the fields of a cause that say which transition sensor i made."""
    return {
        "from_range": _level_range(model, i, before), "to_range": _level_range(model, i, after),
        "step_s": int(model.params["step"]) * model.period_ns / 1e9,
    }
