"""Turns the residuals of the transition method into ranked causes: which tag, against which other, when.

Evidence makes the three kinds comparable; per sensor i and instant t each is in 0..1:

    trans   1 for a transition that was never seen (its conf, 1 by rule, is not counted again)
    bound   a / (1 + a), a = largest excess over a bound in widths; shared among the components by excess
    conf    1 - sqrt(d / conf) where conf > d; d = what healthy vectors of this transition reached (the root,
            since sqrt(2 conf) is the distance of two unit vectors)

A cause's share is its evidence summed over the window, over all evidence in the window.

Source: M. Alamir, R. Dion (2024), "characterisation": the components (i, j, t) of each residual.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Float64, Int64, MethodModel

MOST_CAUSES = 16
SMALLEST_SHARE = 0.01


class _Rows(NamedTuple):
    """The rows that are judged, for all sensors.

    raw : float64[m, n_columns], engineering units
    scaled : float64[m, n_columns], 0 where not valid
    valid : bool[m, n_columns]
    t : int64[k], judged instants
    source_ns : int64[m]
    residuals : float64[k, 3, n_sensors]
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
    newest = np.arange(max(2 * step - 1, raw.shape[0] - window), raw.shape[0])
    if newest.size == 0:
        return []
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.where(valid, (raw - a["mean"]) * a["inverse"], 0.0)
    rows = _Rows(
        raw, scaled, valid, newest - step, source_ns, residuals[newest].reshape(newest.size, 3, -1)
    )
    found: list[tuple[float, Cause]] = []
    for i, own in enumerate(np.flatnonzero(a["judged"])):
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
    distance = np.maximum(a["cover"][row], 1.0 - float(model.params["eta"]))
    with np.errstate(invalid="ignore"):
        above = np.sqrt(np.maximum(conf, distance) / distance)
        evidence = np.where((row >= 0) & (conf > distance), 1.0 - 1.0 / above, 0.0)
    if evidence.any():
        at = int(np.argmax(evidence))
        name = model.columns[own]
        found.append((float(evidence.sum()), Cause(
            name, "conf", 0.0, other=name, **_situation(model, i, int(before[at]), int(after[at])),
            source_ns=int(rows.source_ns[rows.t[at]]),
        )))
    outside = np.flatnonzero((row >= 0) & (bound > 0.0))
    if outside.size:
        found += _bound_causes(model, rows, i, own, before, after, row, outside)
    return found


def _unseen_cause(
    model: MethodModel, rows: _Rows, i: int, own: int, before: Int64, after: Int64, unseen: NDArray[np.bool_]
) -> Cause:
    """Return the cause of the latest instant with a transition that was never seen."""
    a, levels, step = model.arrays, int(model.params["levels"]), int(model.params["step"])
    at = int(np.flatnonzero(unseen)[-1])
    to_levels = np.flatnonzero(a["table"][i].reshape(levels, levels)[before[at]] >= 0)
    low = high = float("nan")
    if to_levels.size:
        # a level is open at the ends: what was normal there ends where the healthy values did
        low = max(_level_range(model, i, int(to_levels[0]))[0], float(a["low"][own]))
        high = min(_level_range(model, i, int(to_levels[-1]))[1], float(a["high"][own]))
    name = model.columns[own]
    return Cause(
        name, "trans", 0.0, observed=float(rows.raw[rows.t[at] + step, own]), normal_low=low,
        normal_high=high, other=name, **_situation(model, i, int(before[at]), int(after[at])),
        source_ns=int(rows.source_ns[rows.t[at] + step]), seen=False,
    )


def _bound_causes(
    model: MethodModel, rows: _Rows, i: int, own: int, before: Int64, after: Int64, row: Int64, outside: Int64
) -> list[tuple[float, Cause]]:
    """Return one cause per column that leaves its bounds while sensor i makes its transitions."""
    a, step = model.arrays, int(model.params["step"])
    partners = a["partners"][i]
    column = np.concatenate([partners, np.full(step - 1, own)])  # of each component
    back = np.concatenate([np.zeros(partners.size, np.int64), np.arange(step - 1, 0, -1)])  # rows before t
    t = rows.t[outside]
    at = t[:, None] - back
    w = rows.scaled[at, column]
    lo, hi = a["lo"][row[outside]], a["hi"][row[outside]]
    excess = np.maximum(lo - w, 0.0) + np.maximum(w - hi, 0.0)
    excess = np.where(rows.valid[at, column], excess / (hi - lo + a["tolerance"][column]), 0.0)
    largest = excess.max(axis=1, keepdims=True)
    part = excess / np.maximum(excess.sum(axis=1, keepdims=True), 1e-300) * (largest / (1.0 + largest))
    found = []
    for j in np.unique(column):
        mine = np.flatnonzero(column == j)
        weight = float(part[:, mine].sum())
        if weight <= 0.0:
            continue
        k, component = np.unravel_index(int(np.argmax(excess[:, mine])), (t.size, mine.size))
        c = mine[component]
        found.append((weight, Cause(
            model.columns[j], "bound", 0.0, observed=float(rows.raw[at[k, c], j]),
            normal_low=_raw(a, j, lo[k, c]), normal_high=_raw(a, j, hi[k, c]), other=model.columns[own],
            **_situation(model, i, int(before[outside[k]]), int(after[outside[k]])),
            source_ns=int(rows.source_ns[at[k, c]]),
        )))
    return found


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
