"""Kernels that learn the normality parameters of one sensor, bounds and reduced vectors of each transition.

Source: M. Alamir, R. Dion (2024), eq. 15 (bounds), 7, 18 and 19 (reduced vectors), 14 and 17 (feedback).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from opcua_detector.kernels.transition import SMALLEST_NORM, SUM_FLAGS, Array, map_residual

from .jit import kernel


@kernel("f8(f4[:, ::1], i8, i8)", cache=True, fastmath=SUM_FLAGS)
def row_dot(unit: Array, a: int, b: int) -> float:
    """Return the inner product of the rows a and b of float32[n, n_e]."""
    total = 0.0
    for k in range(unit.shape[1]):
        total += float(unit[a, k]) * float(unit[b, k])
    return total


@kernel("i8(f4[:, ::1], i8, i8, f8, i8, b1, b1, f8[::1], i4[::1])", cache=True, nogil=True)
def reduce_vectors(
    unit: Array, n: int, given: int, eta: float, most: int, farthest: bool, absolute: bool, best: Array,
    kept: Array,
) -> int:
    """Choose vectors that are pairwise less than eta correlated and to which all others are at least eta.

    Parameters
    ----------
    unit : float32[>= n, n_e], centred rows of unit norm, in order of time
    given : int; the first so many are kept in any case, though they may be correlated
    eta : float64; most : int, largest number to keep, not below `given`
    farthest : take the least covered vector next (else the first one in time that is not covered, which is
        the paper's order); the first vector is always kept
    absolute : correlation without its sign
    best : float64[>= n], written: largest correlation of each vector with those kept
    kept : int32[>= most], written: rows of `unit` in the order of choice

    Returns
    -------
    int : how many are kept

    Notes
    -----
    Source: eq. 18 and 19 (remover), 20 and 21 (with those kept before given). With `most` reached the covering
    is what farthest-first gives.
    """
    if n == 0:
        return 0
    for k in range(n):
        best[k] = -2.0
    n_kept = 0
    chosen = 0
    while True:
        kept[n_kept] = chosen
        n_kept += 1
        best[chosen] = 1.0
        start = 0 if farthest else chosen + 1
        lowest, following = eta, -1
        for k in range(start, n):
            # a covered vector cannot be chosen again, but its best must be right where it is farthest-first
            if not farthest and best[k] >= eta:
                continue
            correlation = row_dot(unit, chosen, k)
            if absolute:
                correlation = abs(correlation)
            best[k] = max(best[k], correlation)
            if best[k] < lowest:
                following = k
                lowest = best[k] if farthest else -3.0
        if n_kept < given:
            chosen = n_kept
            continue
        if following < 0 or n_kept >= most:
            return n_kept
        chosen = following


@kernel("i8(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8, i8, f8[:, ::1], i8, f4[:, ::1])", cache=True, nogil=True)
def learn_bounds(
    scaled: Array, partners: Array, own: int, step: int, order: Array, first: int, last: int, bounds: Array,
    row: int, unit: Array,
) -> int:
    """Widen the bounds of one transition to its instants and collect their centred unit vectors.

    Parameters
    ----------
    scaled : float64[n_columns, n], scaled values, rows of the record along the second axis
    partners : int32[n_seen], columns of the first components; own : column of the sensor
    step : int, rows
    order : int64[:], instants (row numbers) of this transition at [first, last)
    bounds : float64[2 n_rows, n_e], scaled; rows 2 row (lo) and 2 row + 1 (hi) are widened
    unit : float32[>= last - first, n_e], written: vectors that are not constant

    Returns
    -------
    int : how many vectors are not constant

    Notes
    -----
    Source: eq. 15; a constant vector (norm < 1e-9) has no correlation and is not collected.
    """
    n_seen = partners.size
    n_e = n_seen + step - 1
    count = 0
    for p in range(first, last):
        t = order[p]
        mean = 0.0
        for k in range(n_e):
            x = scaled[partners[k], t] if k < n_seen else scaled[own, t - step + 1 + k - n_seen]
            bounds[2 * row, k] = min(bounds[2 * row, k], x)
            bounds[2 * row + 1, k] = max(bounds[2 * row + 1, k], x)
            mean += x
        mean /= n_e
        square = 0.0
        for k in range(n_e):
            x = scaled[partners[k], t] if k < n_seen else scaled[own, t - step + 1 + k - n_seen]
            square += (x - mean) * (x - mean)
        norm = math.sqrt(square)
        if norm < SMALLEST_NORM:
            continue
        for k in range(n_e):
            x = scaled[partners[k], t] if k < n_seen else scaled[own, t - step + 1 + k - n_seen]
            unit[count, k] = (x - mean) / norm
        count += 1
    return count


@kernel("i8(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8[::1], f8, i8, b1, b1, f8[:, ::1], f4[:, ::1], f8[::1],"
      " i4[::1], f4[:, ::1], i8[::1], f4[::1])", cache=True, nogil=True)
def learn_sensor(
    scaled: Array, partners: Array, own: int, step: int, order: Array, starts: Array, eta: float, most: int,
    farthest: bool, absolute: bool, bounds: Array, unit: Array, best: Array, kept: Array, vectors: Array,
    pointers: Array, cover: Array,
) -> int:
    """Learn bounds and reduced vectors of all transitions of one sensor.

    Parameters
    ----------
    scaled, partners, own, step, order : see `learn_bounds`; order sorted by transition, then time
    starts : int64[n_rows + 1], where each transition begins in `order`
    eta, most, farthest, absolute : see `reduce_vectors`; most = 0: no cap
    bounds : float64[2 n_rows, n_e], to start with (inf, -inf); widened
    unit, best, kept : room for the largest transition: float32[m, n_e], float64[m], int32[m]
    vectors : float32[enough, n_e], written
    pointers : int64[n_rows + 1], written: where the vectors of each transition begin
    cover : float32[n_rows], written: 1 - the lowest signed correlation of a training vector with those kept
        (where not farthest, that of a covered vector counts no closer than the first that covered it)

    Returns
    -------
    int : number of vectors
    """
    n_v = 0
    pointers[0] = 0
    for row in range(starts.size - 1):
        n = learn_bounds(scaled, partners, own, step, order, starts[row], starts[row + 1], bounds, row, unit)
        n_kept = reduce_vectors(unit, n, 0, eta, most if most > 0 else n, farthest, absolute, best, kept)
        for v in range(n_kept):
            for k in range(unit.shape[1]):
                vectors[n_v, k] = unit[kept[v], k]
            n_v += 1
        lowest = 1.0
        for k in range(n):
            if absolute:  # the score has a sign
                best[k] = -1.0
                for v in range(n_kept):
                    best[k] = max(best[k], row_dot(unit, kept[v], k))
            lowest = min(lowest, best[k])
        cover[row] = 1.0 - lowest
        pointers[row + 1] = n_v
    return n_v


@kernel("f8(f4[:, ::1], i8, i8)", cache=True, nogil=True)
def lowest_correlation(unit: Array, n_kept: int, n: int) -> float:
    """Return the lowest, over the rows [n_kept, n), of the largest signed correlation with the first n_kept rows.

    unit : float32[>= n, n_e], centred rows of unit norm; 1 where no row is left
    """
    lowest = 1.0
    for k in range(n_kept, n):
        best = -1.0
        for v in range(n_kept):
            best = max(best, row_dot(unit, v, k))
        lowest = min(lowest, best)
    return lowest


@kernel("i8(i4[::1], i8, i8)", cache=True, nogil=True)
def nearest_code(table: Array, levels: int, code: int) -> int:
    """Return the code of the seen transition nearest to `code` by L1 on (before, after), the lowest one of equals.

    table : int32[levels**2], -1 = not seen; -1 is returned where none is seen
    """
    before = code // levels
    after = code % levels
    nearest, least = -1, 2 * levels
    for other in range(table.size):
        if table[other] >= 0:
            distance = abs(other // levels - before) + abs(other % levels - after)
            if distance < least:
                nearest, least = other, distance
    return nearest


@kernel("void(f8[::1], f8, f8[::1], f8[:, ::1], f8[::1], f8[::1], i8, u1[:, ::1])", cache=True, nogil=True)
def adapt_map(
    w: Array, x: float, one_map: Array, spread: Array, limit: Array, slack: Array, row: int, changed: Array
) -> None:
    """Make the affine error of one vector, declared normal, normal: move the map's offset, else raise the slack.

    Parameters
    ----------
    w, x : float64[n_e], extended vector, and s_t, scaled
    one_map : float64[n_e + 1], changed in its last entry
    spread : float64[n_rows, 2], changed: errors that must stay within -+ limit (healthy ones and these)
    limit, slack : float64[n_rows]; slack is changed
    changed : uint8[n_rows, 4]; [row, 2] and [row, 3] are set where offset and slack are changed

    Notes
    -----
    The offset goes to the middle of the errors to be normal, if they all fit into -+ limit then; so it never
    drifts further than healthy errors allow. What does not fit is taken off the error as slack, which is what
    widening (17) is to bounds. A margin of 1e-9 keeps a second pass from changing the last digits.
    """
    margin = 1e-9
    error = map_residual(w, 0, x, one_map, 0, w.size)
    if abs(error) - slack[row] > limit[row] + margin:
        low = min(spread[row, 0], error)
        high = max(spread[row, 1], error)
        if high - low > 2.0 * limit[row]:
            slack[row] = abs(error) - limit[row]
            changed[row, 3] = 1
            return
        move = 0.5 * (low + high)
        one_map[w.size] += move
        spread[row, 0] = low - move
        spread[row, 1] = high - move
        if slack[row] > 0.0:  # what it covers may have moved away by as much
            slack[row] += abs(move)
        changed[row, 2] = 1
    elif abs(error) <= limit[row]:
        if error < spread[row, 0] - margin:
            spread[row, 0] = error
        if error > spread[row, 1] + margin:
            spread[row, 1] = error


@njit("void(f8[:, ::1], u1[:, ::1], i4[::1], i8, i8, i8, i8[::1], i8[::1], i4[::1], f8[:, ::1], f8[:, ::1],"
      " f8[:, ::1], f8[::1], f8[:, ::1], f8[::1], f8[::1], f8, b1, i8, u1[:, ::1])", cache=True, nogil=True)
def widen_sensor(
    scaled: Array, valid: Array, partners: Array, own: int, step: int, levels: int, order: Array, codes: Array,
    table: Array, lo: Array, hi: Array, maps: Array, general: Array, spread: Array, limit: Array, slack: Array,
    usual_limit: float, borrow: bool, n_rows: int, changed: Array,
) -> None:
    """Make the instants of one sensor normal, one after the other: transitions, bounds and maps.

    Parameters
    ----------
    scaled, valid : float64 and uint8[n_columns, n]; scaled is 0 where not valid
    partners, own, step, levels : see `learn_bounds`
    order, codes : int64[m], instants in order of time and their transitions; `own` is valid at t and t + step
    table : int32[levels**2], transition -> row or -1; changed
    lo, hi : float64[room, n_e], scaled; changed; `n_rows` are in use, with room for the new transitions
    maps, general, spread, limit, slack : see `kernels.affine` and `adapt_map`, float64[room or 0, n_e + 1],
        [n_e + 1], [room or 0, 2], [room or 0] twice; changed but for general
    usual_limit : float64, limit of a new transition, scaled
    borrow : a new transition starts with the widths of the nearest one (else with none)
    changed : uint8[room, 4], set to 1 where a row is new, its bounds, offset or slack changed

    Notes
    -----
    Source: eq. 14 (new transition), 17a and 17b (wider bounds); section 1.7 of the design (start of a new
    transition). Components that are not valid widen nothing, and a new transition takes the bounds of the
    nearest one there; a map is moved by whole vectors alone.
    """
    n_seen = partners.size
    n_e = n_seen + step - 1
    w = np.empty(n_e)
    used = np.empty(n_e, np.uint8)
    affine = maps.shape[0] > 0
    free = n_rows
    for p in range(order.size):
        t = order[p]
        n_used = 0
        for k in range(n_e):
            if k < n_seen:
                w[k] = scaled[partners[k], t]
                used[k] = valid[partners[k], t]
            else:
                w[k] = scaled[own, t - step + 1 + k - n_seen]
                used[k] = valid[own, t - step + 1 + k - n_seen]
            n_used += used[k]
        row = table[codes[p]]
        if row < 0:
            near = table[nearest_code(table, levels, codes[p])]
            row = free
            free += 1
            table[codes[p]] = row
            changed[row, 0] = 1
            for k in range(n_e):
                half = 0.5 * (hi[near, k] - lo[near, k]) if borrow else 0.0
                lo[row, k] = w[k] - half if used[k] else lo[near, k]
                hi[row, k] = w[k] + half if used[k] else hi[near, k]
            if affine:
                maps[row] = general
                maps[row, n_e] += map_residual(w, 0, scaled[own, t], general, 0, n_e)
                spread[row] = 0.0
                limit[row] = usual_limit
                slack[row] = 0.0
            continue
        if 2 * n_used < n_e:
            continue
        for k in range(n_e):
            if used[k] and (w[k] < lo[row, k] or w[k] > hi[row, k]):
                lo[row, k] = min(lo[row, k], w[k])
                hi[row, k] = max(hi[row, k], w[k])
                changed[row, 1] = 1
        if affine and n_used == n_e:
            adapt_map(w, scaled[own, t], maps[row], spread, limit, slack, row, changed)
