"""Learns the arrays of a transition model from one or several healthy intervals.

Source: M. Alamir, R. Dion (2024); the decisions where the paper is silent stand at each function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, Record, UInt8
from opcua_detector.errors import RecordError
from opcua_detector.kernels.bounds import learn_sensor

Int32 = NDArray[np.int32]
ALL_PARTNERS_UP_TO = 16
"""With more columns than this a sensor sees the most correlated ones alone (unless told otherwise)."""
ROWS_FOR_PARTNERS = 50_000


class Columns(NamedTuple):
    """What is learnt of each column by itself; all float64[n_columns].

    mean, inverse : scaled value = (raw - mean) * inverse; inverse is 0 for a column that never moved
    tolerance : eps of that column, scaled
    low, high : smallest and largest value seen, engineering unit
    """

    mean: Float64
    inverse: Float64
    tolerance: Float64
    low: Float64
    high: Float64


def describe_columns(record: Record, eps: float, faithful: bool) -> Columns:
    """Learn location, scale and tolerance of each column.

    Notes
    -----
    The scale is the standard deviation, but at least the tag's resolution (its decimals where known, else the
    smallest step between two healthy values), and so is the tolerance: a nearly constant tag, or one
    recorded with fewer decimals than before, must not hold the alarm on. A column that never moved is inert:
    its scaled value is always 0. `faithful` leaves the values raw.

    Raises
    ------
    RecordError
        A column has no valid value.
    """
    out = Columns(*(np.zeros(len(record.tags)) for _ in Columns._fields))
    for c, tag in enumerate(record.tags):
        x = record.values[record.valid[:, c] != 0, c]
        if x.size == 0:
            raise RecordError(
                "the tag has no valid value", where=tag.name,
                next_step="leave the tag out of the monitor, or fit on an interval where it was Good",
            )
        out.low[c], out.high[c] = x.min(), x.max()
        if faithful:
            out.inverse[c], out.tolerance[c] = 1.0, eps
            continue
        mean, std = float(x.mean()), float(x.std())
        if out.low[c] == out.high[c] or std <= 1e-12 * abs(mean):
            out.mean[c], out.tolerance[c] = out.low[c], eps
            continue
        resolution = 10.0**-tag.decimals if tag.decimals is not None else float(np.diff(np.unique(x)).min())
        scale = max(std, resolution)
        out.mean[c], out.inverse[c], out.tolerance[c] = mean, 1.0 / scale, max(eps, resolution / scale)
    return out


def quantile_edges(x: Float64, levels: int) -> Float64:
    """Return float64[levels - 1]: thresholds of raw values that fill the levels equally.

    Many equal values give equal thresholds; the levels between them stay empty, which is harmless.

    Notes
    -----
    Source: section 1, quantiser ("filled equally by the training data").
    """
    return np.ascontiguousarray(np.quantile(x, np.arange(1, levels) / levels))


def scaled_columns(record: Record, columns: Columns) -> Float64:
    """Return float64[n_columns, n]: scaled values, 0 where not valid; the expression of `push_row`."""
    with np.errstate(invalid="ignore", over="ignore"):
        z = (record.values - columns.mean) * columns.inverse
    z = np.where(record.valid != 0, z, 0.0)
    return np.ascontiguousarray(z.T)


def choose_partners(scaled: Float64, own: Int64, wanted: int) -> Int32:
    """Return int32[n_sensors, n_seen]: the columns that each sensor sees at t, itself included, ascending.

    Parameters
    ----------
    scaled : float64[n_columns, n]
    own : int64[n_sensors], column of each sensor
    wanted : int, columns beside its own; 0 = all up to 16 columns, else the 16 most correlated ones
    """
    n = scaled.shape[0]
    others = wanted or (n - 1 if n <= ALL_PARTNERS_UP_TO else ALL_PARTNERS_UP_TO)
    if others >= n - 1:
        return np.tile(np.arange(n, dtype=np.int32), (own.size, 1))
    z = scaled[:, :: max(1, scaled.shape[1] // ROWS_FOR_PARTNERS)]
    z = z - z.mean(axis=1, keepdims=True)
    norm = np.sqrt((z * z).sum(axis=1))
    z /= np.where(norm > 0, norm, 1.0)[:, None]
    correlation = np.abs(z[own] @ z.T)
    correlation[np.arange(own.size), own] = np.inf
    best = np.argsort(-correlation, axis=1, kind="stable")[:, : others + 1]
    return np.ascontiguousarray(np.sort(best, axis=1).astype(np.int32))


def usable_instants(record: Record, own: int, partners: Int32, step: int) -> Int64:
    """Return int64[m]: the instants t of a sensor that count.

    [t - step + 1, t + step] lies inside one interval, and every value used is valid: the partners at t, the
    sensor's own past, and the sensor at t + step.
    """
    n = len(record)
    ok = np.zeros(n, dtype=bool)
    for start, stop in record.segments():
        ok[start + step - 1 : max(start + step - 1, stop - step)] = True
    bad = np.concatenate([[0], np.cumsum(record.valid[:, own] == 0)])
    t = np.flatnonzero(ok)
    t = t[bad[t + 1] == bad[t - step + 1]]
    t = t[record.valid[t + step, own] != 0]
    for c in partners:
        t = t[record.valid[t, c] != 0]
    return t


def learn(record: Record, params: Any, judged: UInt8, columns: Columns) -> dict[str, NDArray[Any]]:
    """Return the arrays of the model that belong to sensors and transitions.

    Parameters
    ----------
    record : healthy rows
    params : TransitionParams
    judged : uint8[n_columns]
    columns : see `describe_columns`

    Raises
    ------
    RecordError
        A sensor has no instant that counts.
    """
    own = np.flatnonzero(judged)
    scaled = scaled_columns(record, columns)
    n_columns = scaled.shape[0]
    wanted = n_columns if params.faithful and not params.partners else params.partners
    partners = choose_partners(scaled, own, wanted)
    n_e = partners.shape[1] + params.step - 1
    edges = np.empty((own.size, params.levels - 1))
    table = np.full((own.size, params.levels**2), -1, np.int32)
    parts: list[tuple[NDArray[Any], ...]] = []
    for i, c in enumerate(own):
        x = np.ascontiguousarray(record.values[:, c])
        good = record.valid[:, c] != 0
        edges[i] = quantile_edges(x[good], params.levels) if columns.inverse[c] else np.inf
        t = usable_instants(record, int(c), partners[i], params.step)
        if t.size == 0:
            raise RecordError(
                f"no {2 * params.step} rows without a gap have valid values of it and of its partners",
                where=record.tags[c].name, next_step="fit on a longer healthy interval, or lower step",
            )
        level = np.searchsorted(edges[i], x, side="left")
        code = level[t] * params.levels + level[t + params.step]
        by_code = np.argsort(code, kind="stable")
        seen, first = np.unique(code[by_code], return_index=True)
        table[i, seen] = np.arange(seen.size, dtype=np.int32) + sum(part[0].shape[0] for part in parts)
        starts = np.append(first, t.size).astype(np.int64)
        parts.append(_learn_one(scaled, partners[i], int(c), params, t[by_code], starts, n_e))
    lo, hi, vectors, n_vectors, cover, instants = (np.concatenate(x) for x in zip(*parts, strict=True))
    return {
        "partners": partners, "edges": edges, "table": table, "lo": lo, "hi": hi, "vectors": vectors,
        "pointers": np.concatenate([[0], np.cumsum(n_vectors)]).astype(np.int32), "cover": cover,
        "instants": instants,
    }


def _learn_one(
    scaled: Float64, partners: Int32, own: int, params: Any, order: Int64, starts: Int64, n_e: int
) -> tuple[NDArray[Any], ...]:
    """Run the kernel for one sensor; return lo, hi, vectors, vectors per row, cover, instants per row."""
    instants = np.diff(starts)
    n_rows, largest = instants.size, int(instants.max())
    most = 0 if params.faithful else params.max_vectors
    room = int(np.minimum(instants, most).sum() if most else instants.sum())
    bounds = np.empty((2 * n_rows, n_e))
    bounds[0::2], bounds[1::2] = np.inf, -np.inf
    vectors = np.empty((room, n_e), np.float32)
    pointers = np.zeros(n_rows + 1, np.int64)
    cover = np.zeros(n_rows, np.float32)
    n_v = learn_sensor(
        scaled, partners, own, params.step, order, starts, params.eta, most, not params.faithful,
        params.faithful, bounds, np.empty((largest, n_e), np.float32), np.empty(largest),
        np.empty(largest, np.int32), vectors, pointers, cover,
    )
    return bounds[0::2], bounds[1::2], vectors[:n_v], np.diff(pointers), cover, instants
