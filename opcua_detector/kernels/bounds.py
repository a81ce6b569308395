"""Kernel that learns the normality parameters of one sensor: bounds and reduced vectors of each transition.

Source: M. Alamir, R. Dion (2024), eq. 15 (bounds), 7, 18 and 19 (reduced vectors).
"""

from __future__ import annotations

import math

from numba import njit

from opcua_detector.kernels.transition import SMALLEST_NORM, SUM_FLAGS, Array


@njit("f8(f4[:, ::1], i8, i8)", cache=True, fastmath=SUM_FLAGS)
def row_dot(unit: Array, a: int, b: int) -> float:
    """Return the inner product of the rows a and b of float32[n, n_e]."""
    total = 0.0
    for k in range(unit.shape[1]):
        total += float(unit[a, k]) * float(unit[b, k])
    return total


@njit("i8(f4[:, ::1], i8, f8, i8, b1, b1, f8[::1], i4[::1])", cache=True, nogil=True)
def reduce_vectors(
    unit: Array, n: int, eta: float, most: int, farthest: bool, absolute: bool, best: Array, kept: Array
) -> int:
    """Choose vectors that are pairwise less than eta correlated and to which all others are at least eta.

    Parameters
    ----------
    unit : float32[>= n, n_e], centred rows of unit norm, in order of time
    eta : float64; most : int, largest number to keep
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
    Source: eq. 18 and 19 (remover). With `most` reached the covering is what farthest-first gives.
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
        if following < 0 or n_kept >= most:
            return n_kept
        chosen = following


@njit("i8(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8, i8, f8[:, ::1], i8, f4[:, ::1])", cache=True, nogil=True)
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


@njit("i8(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8[::1], f8, i8, b1, b1, f8[:, ::1], f4[:, ::1], f8[::1],"
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
        n_kept = reduce_vectors(unit, n, eta, most if most > 0 else n, farthest, absolute, best, kept)
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
