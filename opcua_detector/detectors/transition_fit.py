"""Learns the arrays of a transition model from one or several healthy intervals.

Source: M. Alamir, R. Dion (2024); the decisions where the paper is silent stand at each function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Float64, Int64, Record, UInt8
from opcua_detector.errors import RecordError
from opcua_detector.kernels.affine import hold_out, learn_maps
from opcua_detector.kernels.bounds import learn_sensor

Int32 = NDArray[np.int32]
ALL_PARTNERS_UP_TO: Final = 16
PARTNERS_BEYOND: Final = 6
"""With more columns than `ALL_PARTNERS_UP_TO` a sensor sees so many of the others (unless told otherwise)."""
ROWS_FOR_PARTNERS: Final = 50_000
LEVELS: Final = (8, 12, 16, 20, 30, 40, 60)
RIDGES: Final = tuple(10.0**k for k in range(-8, 3))
"""What automatic configuration chooses from; ridges in scaled units squared, summed over instants."""
USUAL_LEVELS: Final = 20
USUAL_RIDGE: Final = 1e-2
"""In force where the record is too short to choose, and the levels of the faithful mode."""
FOLDS: Final = 5
MOST_UNSEEN: Final = 0.005
UNSEEN_BESIDE: Final = 1.5
"""Levels are allowed with so large a share of unseen held-out transitions, or so many times the smallest one."""
TEACHING_SHARE: Final = 0.8
ROWS_FOR_CHOICE: Final = 1_000_000
SENSORS_FOR_CHOICE: Final = (2, 8)
"""The choice looks at so many sensors (fewest, most), as many as make `ROWS_FOR_CHOICE` rows in all."""
SMALLEST_ERROR: Final = 1e-9
ROUNDING: Final = 12.0**-0.5
"""Root mean square of a rounding error, in steps of the resolution."""
USUAL_SHARE: Final = 0.99
USUAL_ERRORS: Final = 3.0
"""An affine error is normal up to so many held-out root mean squares, or as far as it went in healthy data."""
NO_ROOM: Final = np.empty((0, 1))


class Columns(NamedTuple):
    """What is learnt of each column by itself; all float64[n_columns].

    mean, inverse : scaled value = (raw - mean) * inverse; inverse is 0 for a column that never moved
    tolerance : eps of that column, scaled
    resolution : smallest step of that column, scaled; 0 where it never moved
    low, high : smallest and largest value seen, engineering unit
    """

    mean: Float64
    inverse: Float64
    tolerance: Float64
    resolution: Float64
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
        out.mean[c], out.inverse[c], out.resolution[c] = mean, 1.0 / scale, resolution / scale
        out.tolerance[c] = max(eps, out.resolution[c])
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
    wanted : int, columns beside its own; 0 = all up to 16 columns, else the 6 most correlated ones
    """
    n = scaled.shape[0]
    others = wanted or (n - 1 if n <= ALL_PARTNERS_UP_TO else PARTNERS_BEYOND)
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


class Instants(NamedTuple):
    """The instants of one sensor, sorted by transition, within a transition by time.

    order : int64[m]; codes : int64[n_rows], ascending, before * levels + after; starts : int64[n_rows + 1]
    """

    order: Int64
    codes: Int64
    starts: Int64


def sort_instants(x: Float64, t: Int64, edges: Float64, step: int) -> Instants:
    """Sort the instants of one sensor by transition.

    x : float64[n], engineering unit; t : int64[m], ascending, not empty; edges : float64[levels - 1]
    """
    levels = edges.size + 1
    level = np.searchsorted(edges, x, side="left")
    code = level[t] * levels + level[t + step]
    # 16 bits: a stable sort of them is a radix sort
    by_code = np.argsort(code.astype(np.uint16) if levels <= 256 else code, kind="stable")
    ordered = code[by_code]
    first = np.flatnonzero(np.append(True, np.diff(ordered) != 0))
    return Instants(t[by_code], ordered[first], np.append(first, t.size).astype(np.int64))


def see(scaled: Float64, own: Int64, params: Any) -> Int32:
    """Return int32[n_sensors, n_seen]: the columns that each sensor sees (see `choose_partners`)."""
    every = params.faithful and not params.partners
    return choose_partners(scaled, own, scaled.shape[0] if every else params.partners)


def configure(record: Record, params: Any, judged: UInt8, columns: Columns) -> dict[str, Any]:
    """Return the parameters in force: what was automatic in `params`, chosen from the healthy rows.

    Parameters
    ----------
    record : healthy rows
    params : TransitionParams; levels 0 and, with affine, affine_ridge 0 are chosen here
    judged : uint8[n_columns]
    columns : see `describe_columns`

    Returns
    -------
    dict : levels, and affine_ridge where affine; the values of `params` where they are given

    Notes
    -----
    Source: section 3.6 of the design. Maps learnt from the first 80 % of the rows predict the last 20 %; the
    mean over sensors and instants of the logarithm of the error decides, among the levels for which at most
    .5 % of the transitions of a fifth of the rows are not seen in the others. Where that holds for none, a
    stretch of the record is like no other whatever the levels; then up to 1.5 times the smallest share is
    allowed (Lorenz, whose record starts up from rest: AUC of the affine channel over 5 seeds that were not used
    to find this rule .979 with the 8 to 20 levels it gives, .961 with 40). The logarithm, since
    errors are heavy-tailed where a setpoint jumps: the mean square then tells of the jumps alone (throttle,
    noise-free: rms .8, median 1e-6 healthy standard deviations). The levels are chosen by the affine error
    without the affine channel too, so that switching it changes no other channel.
    """
    affine = params.affine and not params.faithful
    levels = (params.levels,) if params.levels else LEVELS
    ridges = (params.affine_ridge,) if params.affine_ridge else RIDGES
    if params.faithful or (len(levels) == 1 and (len(ridges) == 1 or not affine)):
        return {"levels": params.levels or USUAL_LEVELS}
    scaled = scaled_columns(record, columns)
    own = np.flatnonzero(judged)
    partners = see(scaled, own, params)
    moving = np.flatnonzero(columns.inverse[own])
    most = int(np.clip(ROWS_FOR_CHOICE // max(len(record), 1), *SENSORS_FOR_CHOICE))
    chosen = np.unique(np.linspace(0, moving.size - 1, most).round().astype(np.int64)) if moving.size else moving
    cut = int(TEACHING_SHARE * len(record))
    error, unseen = np.zeros((len(levels), len(ridges))), np.zeros(len(levels))
    counted = 0
    for i in moving[chosen]:
        c = int(own[i])
        t = usable_instants(record, c, partners[i], params.step)
        if not t.size or t[-1] < cut + params.step - 1 or t[0] >= cut - params.step:
            continue
        counted += 1
        x = np.ascontiguousarray(record.values[:, c])
        taught = np.sort(x[:cut][record.valid[:cut, c] != 0])
        for k, n in enumerate(levels):
            found = sort_instants(x, t, quantile_edges(taught, n), params.step)
            logs = np.zeros(len(ridges))
            _hold_out(scaled, partners[i], c, params.step, found, ridges, columns, logs)
            error[k] += logs
            unseen[k] += unseen_share(found, len(record), params.step)
    if not counted:
        found_none = {"levels": params.levels or USUAL_LEVELS}
        return {**found_none, "affine_ridge": params.affine_ridge or USUAL_RIDGE} if affine else found_none
    unseen /= counted
    allowed = unseen <= max(MOST_UNSEEN, UNSEEN_BESIDE * float(unseen.min()))
    k, r = divmod(int(np.argmin(np.where(allowed[:, None], error, np.inf))), len(ridges))
    return {"levels": levels[k], **({"affine_ridge": ridges[r]} if affine else {})}


def _hold_out(
    scaled: Float64, partners: Int32, own: int, step: int, instants: Instants, ridges: Sequence[float],
    columns: Columns, logs: Float64, errors: Float64 = NO_ROOM,
) -> None:
    """Run the kernel `hold_out` over the first 80 % and the last 20 % of the rows; write logs and errors.

    Instants that touch both parts are left out.
    """
    cut = int(TEACHING_SHARE * scaled.shape[1])
    floor = max(SMALLEST_ERROR, float(columns.resolution[own]) * ROUNDING)
    hold_out(
        scaled, partners, own, step, instants.order, instants.starts, cut - step, cut + step - 1,
        np.array(ridges, np.float64), floor, logs, errors,
    )


def unseen_share(instants: Instants, n: int, step: int) -> float:
    """Return the share of instants whose transition is not made outside of their own fifth of the n rows.

    Five contiguous folds as in the calibration; instants that touch two of them are left out.
    """
    row = np.repeat(np.arange(instants.codes.size), np.diff(instants.starts))
    first, last = instants.order - step + 1, instants.order + step
    held_out = unseen = 0
    for fold in range(FOLDS):
        start, stop = fold * n // FOLDS, (fold + 1) * n // FOLDS
        mine = row[(first >= start) & (last < stop)]
        seen = np.zeros(instants.codes.size, bool)
        seen[row[(last < start) | (first >= stop)]] = True
        held_out += mine.size
        unseen += int((~seen[mine]).sum())
    return unseen / max(held_out, 1)


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
    partners = see(scaled, own, params)
    n_e = partners.shape[1] + params.step - 1
    edges = np.empty((own.size, params.levels - 1))
    table = np.full((own.size, params.levels**2), -1, np.int32)
    affine = params.affine and not params.faithful
    parts: list[tuple[NDArray[Any], ...]] = []
    maps: list[tuple[NDArray[Any], ...]] = []
    n_rows = 0
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
        found = sort_instants(x, t, edges[i], params.step)
        table[i, found.codes] = np.arange(n_rows, n_rows + found.codes.size, dtype=np.int32)
        n_rows += found.codes.size
        parts.append(_learn_one(scaled, partners[i], int(c), params, found, n_e))
        if affine:
            maps.append(_learn_maps(scaled, partners[i], int(c), params, found, n_e, columns))
    lo, hi, vectors, n_vectors, cover, instants = (np.concatenate(x) for x in zip(*parts, strict=True))
    arrays = {
        "partners": partners, "edges": edges, "table": table, "lo": lo, "hi": hi, "vectors": vectors,
        "pointers": np.concatenate([[0], np.cumsum(n_vectors)]).astype(np.int32), "cover": cover,
        "instants": instants,
    }
    if affine:
        names = ("maps", "spread", "limit", "slack", "general", "usual")
        arrays |= {name: np.concatenate(x) for name, x in zip(names, zip(*maps, strict=True), strict=True)}
    return arrays


def _learn_one(
    scaled: Float64, partners: Int32, own: int, params: Any, found: Instants, n_e: int
) -> tuple[NDArray[Any], ...]:
    """Run the kernel for one sensor; return lo, hi, vectors, vectors per row, cover, instants per row."""
    instants = np.diff(found.starts)
    n_rows, largest = instants.size, int(instants.max())
    most = 0 if params.faithful else params.max_vectors
    room = int(np.minimum(instants, most).sum() if most else instants.sum())
    bounds = np.empty((2 * n_rows, n_e))
    bounds[0::2], bounds[1::2] = np.inf, -np.inf
    vectors = np.empty((room, n_e), np.float32)
    pointers = np.zeros(n_rows + 1, np.int64)
    cover = np.zeros(n_rows, np.float32)
    n_v = learn_sensor(
        scaled, partners, own, params.step, found.order, found.starts, params.eta, most, not params.faithful,
        params.faithful, bounds, np.empty((largest, n_e), np.float32), np.empty(largest),
        np.empty(largest, np.int32), vectors, pointers, cover,
    )
    return bounds[0::2], bounds[1::2], vectors[:n_v], np.diff(pointers), cover, instants


def _learn_maps(
    scaled: Float64, partners: Int32, own: int, params: Any, found: Instants, n_e: int, columns: Columns
) -> tuple[NDArray[Any], ...]:
    """Run the affine kernels for one sensor; return maps, spread, limit, slack, general[1, n_e + 1], usual[1]."""
    n_rows = found.codes.size
    maps, general, spread = np.zeros((n_rows, n_e + 1)), np.zeros((1, n_e + 1)), np.zeros((n_rows, 2))
    learn_maps(
        scaled, partners, own, params.step, found.order, found.starts, params.affine_ridge, maps, general[0], spread
    )
    errors, after = np.zeros((instants_after(found, scaled.shape[1], params.step), 1)), np.zeros(1)
    _hold_out(scaled, partners, own, params.step, found, (params.affine_ridge,), columns, after, errors)
    # a record of a few rows has none held out: what is learnt by heart is all there is
    error = np.abs(errors if errors.size else spread)
    floor = float(columns.resolution[own]) * ROUNDING
    clipped = np.minimum(error, np.quantile(error, USUAL_SHARE))
    usual = np.array([max(floor, float(np.sqrt(np.mean(clipped**2))))])
    limit = np.maximum(USUAL_ERRORS * usual[0], np.abs(spread).max(axis=1))
    return maps, spread, limit, np.zeros(n_rows), general, usual


def instants_after(found: Instants, n: int, step: int) -> int:
    """Return how many instants of a record of n rows `_hold_out` holds out."""
    return int((found.order >= int(TEACHING_SHARE * n) + step - 1).sum())
