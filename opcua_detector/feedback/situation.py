"""Situations: where the plant was, and in what direction and by how much each residual was off there.

A situation is no wider than it takes for the same one to be known again: its balls are as wide as the plant's own
noise and its movement from row to row, and each residual has an interval of its own with its direction.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..api import Float64, Int64
from .evidence import Evidence
from .policy import Refused
from .ranges import channel_units, usual_residual

KEY_COLUMNS: Final = 6  # that tell a situation: those with the largest excess, then those that go with them
LEAST_RADIUS, MOST_RADIUS = 0.02, 0.25  # of a ball, in parts of a column's healthy span
NOISES: Final = 3.5  # healthy errors between two passes through the same situation
STEPS: Final = 0.5  # of the movement from row to row, between two of whose rows another pass may lie
MOST_AGE: Final = 40  # rows
MOST_BALLS: Final = 1024  # of one delta
WIDER: Final = 1.1
SLACK: Final = 1.5  # healthy errors that a residual may differ between two passes
GENEROSITY: Final = 0.05  # part of a residual by which it may differ


def balls_of(evidence: Evidence, residual: Float64, signed: Float64, generosity: float,
             ) -> tuple[dict[str, Any], Float64] | None:
    """Return the situations of the evidence and what is excused in them, None where all is as usual.

    Parameters
    ----------
    residual, signed : float64[n, n_channels], after the transition methods have adapted to these rows alone
    generosity : 1 or more; times the slack of the intervals

    Returns
    -------
    dict, see `allowances.BALLS`
    float64[E, 1 + K + 2 M] : radius, centre, least and most residual with its direction

    Raises
    ------
    Refused
        More situations than one delta may hold.
    """
    off = evidence.off(residual)
    rows = np.flatnonzero(off.any(axis=1))
    if len(rows) == 0:
        return None
    scale = np.maximum(evidence.model.calibration.scale[0], 1e-12)
    usual = usual_residual(evidence.model.calibration)
    with np.errstate(invalid="ignore"):
        excess = np.where(off, residual - evidence.calm, 0.0)[rows]
    own = np.flatnonzero(off.any(axis=0))
    key = key_columns(evidence, excess / scale)
    ages = (0, min(evidence.reach, MOST_AGE))
    points = _points(evidence, rows, key, ages)
    centres, nearest, radius = cover(points, rows, _noise(evidence, key))
    seen = off[rows][:, own]
    value = signed[rows][:, own]
    least, most = np.full((len(centres), len(own)), np.inf), np.full((len(centres), len(own)), -np.inf)
    np.minimum.at(least, nearest, np.where(seen, value, np.inf))
    np.maximum.at(most, nearest, np.where(seen, value, -np.inf))
    known = least <= most
    slack = generosity * (SLACK * usual[own] + GENEROSITY * np.where(known, np.maximum(-least, most), 0.0))
    # What is known to be too high does not become too low by its slack.
    least = np.where(known, np.where(least > 0, np.maximum(least - slack, 0.0), least - slack), np.nan)
    most = np.where(known, np.where(most < 0, np.minimum(most + slack, 0.0), most + slack), np.nan)
    about = {"columns": [*key, *key], "ages": [ages[0]] * len(key) + [ages[1]] * len(key),
             "channels": [int(c) for c in own]}
    return about, np.concatenate([radius[:, None], np.nan_to_num(points[centres]), least, most], axis=1)


def _points(evidence: Evidence, rows: Int64, key: list[int], ages: tuple[int, int]) -> Float64:
    """Return float64[m, 2 K]: the columns that tell the situation, now and some rows ago; NaN = not known."""
    z = evidence.scale.rows(evidence.bench.columns)
    before = rows - ages[1]
    start = np.maximum.accumulate(np.where(evidence.bench.gap != 0, np.arange(len(z)), 0))
    past = np.where((before >= start[rows])[:, None], z[np.maximum(before, 0)][:, key], np.nan)
    return np.concatenate([z[rows][:, key], past], axis=1)


def _noise(evidence: Evidence, key: list[int]) -> float:
    """Return the largest usual error of a column by what the rest says of it, in parts of its span."""
    usual = channel_units(evidence.model, evidence.plugins) * usual_residual(evidence.model.calibration)
    found = 0.0
    for column in key:
        own = usual[(evidence.column == column) & (usual > 0)]
        if len(own) and evidence.scale.span[column] > 0:
            found = max(found, float(own.min() / evidence.scale.span[column]))
    return found


def key_columns(evidence: Evidence, excess: Float64) -> list[int]:
    """Return the columns that tell the situation: those most off, then those that go with them.

    excess : float64[m, n_channels] in healthy deviations
    """
    n = len(evidence.model.plan.columns)
    by_column = np.bincount(evidence.column, excess.sum(axis=0), n)
    usable = evidence.scale.inverse > 0
    most = [int(c) for c in np.argsort(-by_column, kind="stable") if by_column[c] > 0 and usable[c]]
    key = most[:KEY_COLUMNS // 2 if n > KEY_COLUMNS else KEY_COLUMNS]
    if not key:
        key = [int(np.argmax(usable))]
    z = np.nan_to_num(evidence.scale.rows(evidence.bench.columns))
    z = z - z.mean(axis=0)
    norm = np.sqrt((z * z).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        together = np.nan_to_num(np.abs(z.T @ z[:, key]) / np.outer(norm, norm[key])).max(axis=1)
    for c in np.argsort(-together, kind="stable"):
        if len(key) < KEY_COLUMNS and usable[c] and int(c) not in key:
            key.append(int(c))
    return sorted(key)


def cover(points: Float64, rows: Int64, noise: float) -> tuple[Int64, Int64, Float64]:
    """Return (centres: rows of points, nearest: centre of each point, radius of each centre) by farthest first.

    points : float64[m, n_keys]; NaN = not known; rows : int64[m]; their rows in the record
    noise : of a column, in parts of its span

    Raises
    ------
    Refused
        More situations than one delta may hold.
    """
    x = np.nan_to_num(points)
    m = len(x)
    move = np.abs(np.diff(x, axis=0)).max(axis=1)[np.diff(rows) == 1]
    step = float(np.median(move)) if len(move) else 0.0
    radius = min(max(LEAST_RADIUS, NOISES * noise, STEPS * step), MOST_RADIUS)
    centres = [0]
    distance = np.abs(x - x[0]).max(axis=1)
    nearest = np.zeros(m, np.int64)
    while distance.max() > 0.5 * radius and len(centres) < MOST_BALLS:
        far = int(np.argmax(distance))
        other = np.abs(x - x[far]).max(axis=1)
        nearest[other < distance] = len(centres)
        distance = np.minimum(distance, other)
        centres.append(far)
    if distance.max() > MOST_RADIUS:
        raise Refused("the interval runs through too many situations to take them all in; give a shorter one, or fit "
                      "again on a record that holds it")
    wide = np.full(len(centres), radius)
    np.maximum.at(wide, nearest, WIDER * distance)
    return np.array(centres, np.int64), nearest, wide
