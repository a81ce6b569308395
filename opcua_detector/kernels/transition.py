"""Kernels of the transition method: score rows in a stream, and learn bounds and vectors from healthy rows.

One call of `score_rows` scores any number of rows, so the stream (one row a call) and the batch (a record a
call) run the same machine code and agree to the last bit.

What a call needs is packed, since each array argument costs about 80 ns:

    ints     int32    HEADER: n_columns, n_sensors, n_seen, step, levels, rows, affine (0 or 1); then
                      cols[n_columns], own[n_sensors], partners[n_sensors * n_seen],
                      table[n_sensors * levels**2], pointers[rows + 1]
    floats   float64  nu; mean[n_columns], inverse[n_columns], tolerance[n_columns],
                      edges[n_sensors * (levels - 1)], of each row lo[n_e], hi[n_e], its map [n_e + 1] and
                      slack, general map of each sensor [n_sensors * (n_e + 1)]; the last three only where
                      affine is 1
    vectors  float32  [n_v * n_e], centred, of unit norm, those of one row together
    memory   int32    head, count, n_bad; level ring [n_sensors * length], validity ring
                      [n_columns * 2 length], validity of the extended vector [n_e]
    ring     float64  scaled values [n_columns * 2 length] (each written twice, so that any stretch of
                      `length` rows is contiguous), extended vector [n_e]

with length = 2 step (rows t - step + 1 .. t + step) and n_e = n_seen + step - 1. The extended vector of
sensor i at t is [partners of i at t, s_i(t - step + 1) ... s_i(t - 1)]; "row" is the row of the transition
table. A map predicts s_i(t): its last entry is the constant, its entry of s_i(t) itself is 0. Its
slack is taken off the error; operator feedback raises it, after a fit it is 0.

Source: M. Alamir, R. Dion, "Model-Free Unsupervised Anomaly detection framework in multivariate
time-series of industrial dynamical systems" (2024).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]

HEADER: Final = 7
MEMORY_HEADER: Final = 3
SMALLEST_NORM: Final = 1e-9
LARGEST: Final = 1e60
"""Scaled values are clipped here: no real value is touched, and no square or power overflows."""
SUM_FLAGS: Final = {"reassoc", "contract", "nsz"}
"""Sums may be reordered for SIMD; NaN and infinity keep their meaning."""


@kernel("i4(f8, f8[::1], i8, i8)", cache=True, nogil=True)
def level_of(x: float, edges: Array, first: int, n_edges: int) -> int:
    """Return the level of a raw value: how many of its thresholds lie below it.

    Parameters
    ----------
    x : float64, engineering unit
    edges : float64[:], ascending thresholds at [first, first + n_edges), engineering unit

    Notes
    -----
    Source: section 1, quantiser: levels (-inf, v0], (v0, v1], ... (v_last, inf).
    """
    low = first
    high = first + n_edges
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low - first


@kernel("f8(f8[::1], i8, f4[::1], i8, i8)", cache=True, nogil=True, fastmath=SUM_FLAGS)
def dot(w: Array, at_w: int, vectors: Array, at_v: int, n: int) -> float:
    """Return the inner product of `n` entries: w float64 from `at_w`, vectors float32 from `at_v`."""
    total = 0.0
    for k in range(n):
        total += w[at_w + k] * vectors[at_v + k]
    return total


@kernel("f8(f8[::1], i8, f8, f8[::1], i8, i8)", cache=True, nogil=True, fastmath=SUM_FLAGS)
def map_residual(w: Array, at_w: int, x: float, maps: Array, at_map: int, n_e: int) -> float:
    """Return x less what a map predicts from the extended vector, scaled units, with its sign.

    Parameters
    ----------
    w : float64[:], extended vector at [at_w, at_w + n_e), scaled; 0 where not valid: its healthy mean
    x : float64, the value that is predicted, scaled
    maps : float64[:], coefficients at [at_map, at_map + n_e), then the constant

    Notes
    -----
    Source: section 3.4 of the design, local affine residual.
    """
    predicted = 0.0
    for k in range(n_e):
        predicted += w[at_w + k] * maps[at_map + k]
    return x - (predicted + maps[at_map + n_e])


@kernel("b1(i4[::1], i8, i8)", cache=True, nogil=True)
def all_valid(memory: Array, first: int, n: int) -> bool:
    """Return whether n entries of the validity of the extended vector are all 1."""
    good = 0
    for k in range(first, first + n):
        good += memory[k] != 0
    return good == n


@kernel("f8(f8[::1], i8, i8)", cache=True, nogil=True, fastmath=SUM_FLAGS)
def centre(w: Array, at: int, n: int) -> float:
    """Subtract the mean from `n` entries in place and return the norm of what is left.

    Two passes: a running sum of squares cancels on plateaus.
    """
    mean = 0.0
    for k in range(n):
        mean += w[at + k]
    mean /= n
    square = 0.0
    for k in range(n):
        w[at + k] -= mean
        square += w[at + k] * w[at + k]
    return math.sqrt(square)


@kernel("f8(f8[::1], i8, f8[::1], i8, i4[::1], i8, i4[::1], i8, i8, i8, i8)", cache=True, nogil=True)
def bound_residual(
    w: Array, at_w: int, floats: Array, at_bounds: int, used: Array, at_used: int, ints: Array,
    at_partners: int, n_seen: int, n_e: int, own: int,
) -> float:
    """Return the mean relative excess of the used components over their bounds.

    Parameters
    ----------
    w : float64[:], extended vector at [at_w, at_w + n_e), scaled
    floats : float64[:], packed model; bounds of the transition (lo, hi), scaled, at `at_bounds`
    used : int32[:], 1 = the component is valid, at [at_used, at_used + n_e); at least one is
    ints : int32[:], packed model; columns of the first `n_seen` components at `at_partners`
    own : column of the remaining components

    Notes
    -----
    Source: section 1, eq. 23 and 24, with a tolerance for each column in place of one eps.
    """
    nu = floats[0]
    tolerance = 1 + 2 * ints[0]
    total = 0.0
    n_used = 0
    for k in range(n_e):
        if used[at_used + k] == 0:
            continue
        n_used += 1
        x = w[at_w + k]
        lo = floats[at_bounds + k]
        hi = floats[at_bounds + n_e + k]
        if x < lo or x > hi:
            column = ints[at_partners + k] if k < n_seen else own
            excess = (lo - x if x < lo else x - hi) / (hi - lo + floats[tolerance + column])
            total += excess if nu == 1.0 else excess**nu
    return total / n_used


@kernel("f8(f8[::1], i8, i8, f4[::1], i8, i8, i4[::1], i8)", cache=True, nogil=True)
def masked_conf_residual(
    w: Array, at_w: int, n_e: int, vectors: Array, first: int, last: int, used: Array, at_used: int
) -> float:
    """Return 1 - the largest correlation with the vectors [first, last), over the used components alone.

    w : float64[:], extended vector, scaled, not centred; vectors : float32[:]; used : int32[:]
    """
    best = -2.0
    for v in range(first, last):
        n = 0
        sum_w = 0.0
        sum_v = 0.0
        for k in range(n_e):
            if used[at_used + k] != 0:
                n += 1
                sum_w += w[at_w + k]
                sum_v += vectors[v * n_e + k]
        mean_w = sum_w / n
        mean_v = sum_v / n
        ww = 0.0
        vv = 0.0
        wv = 0.0
        for k in range(n_e):
            if used[at_used + k] != 0:
                a = w[at_w + k] - mean_w
                b = vectors[v * n_e + k] - mean_v
                ww += a * a
                vv += b * b
                wv += a * b
        if math.sqrt(ww) < SMALLEST_NORM:
            return 0.0
        if math.sqrt(vv) >= 1e-4:  # float32 vectors: a smaller rest is rounding, not shape
            best = max(best, wv / math.sqrt(ww * vv))
    if best < -1.5:
        return 0.0
    return max(0.0, 1.0 - best)


@kernel("void(f8[::1], u1[::1], i8, i4[::1], f8[::1], i4[::1], f8[::1])", cache=True, nogil=True)
def push_row(
    values: Array, valid: Array, at: int, ints: Array, floats: Array, memory: Array, ring: Array
) -> None:
    """Take one row into the memory: scaled values, validity, level of each sensor.

    values : float64[:], engineering units, valid : uint8[:]; the row starts at `at`; the rest is packed
    as the module's docstring says. A value that is not finite is not valid.
    """
    n_columns, n_sensors = ints[0], ints[1]
    length = 2 * ints[3]
    n_edges = ints[4] - 1
    slot = memory[0] + 1
    if slot == length:
        slot = 0
    memory[0] = slot
    memory[1] += 1
    valid_at = MEMORY_HEADER + n_sensors * length
    for c in range(n_columns):
        x = values[at + ints[HEADER + c]]
        ok = 1 if valid[at + ints[HEADER + c]] != 0 and math.isfinite(x) else 0
        z = 0.0
        if ok:
            z = min(max((x - floats[1 + c]) * floats[1 + n_columns + c], -LARGEST), LARGEST)
        place = c * 2 * length + slot
        memory[2] += memory[valid_at + place] - ok
        ring[place] = z
        ring[place + length] = z
        memory[valid_at + place] = ok
        memory[valid_at + place + length] = ok
    edges_at = 1 + 3 * n_columns
    for i in range(n_sensors):
        own = ints[HEADER + n_columns + i]
        level = -1
        if memory[valid_at + own * 2 * length + slot]:
            level = level_of(values[at + ints[HEADER + own]], floats, edges_at + i * n_edges, n_edges)
        memory[MEMORY_HEADER + i * length + slot] = level


@kernel("i8(i8, i4[::1], i4[::1], f8[::1])", cache=True, nogil=True)
def extend(i: int, ints: Array, memory: Array, ring: Array) -> int:
    """Write the extended vector of sensor i and its validity into the memory; return how many are valid.

    ints int32[:], memory int32[:], ring float64[:] : packed as the module's docstring says

    Notes
    -----
    Source: section 1, w_t = [s_t of the partners, own delayed values]; own past in ascending time here.
    """
    n_columns, n_sensors, n_seen, step = ints[0], ints[1], ints[2], ints[3]
    length = 2 * step
    oldest = memory[0] + 1
    valid_at = MEMORY_HEADER + n_sensors * length
    used_at = valid_at + n_columns * 2 * length
    w_at = n_columns * 2 * length
    n_e = n_seen + step - 1
    partners_at = HEADER + n_columns + n_sensors + i * n_seen
    past = ints[HEADER + n_columns + i] * 2 * length + oldest
    for k in range(n_seen):
        ring[w_at + k] = ring[ints[partners_at + k] * 2 * length + oldest + step - 1]
    for k in range(step - 1):
        ring[w_at + n_seen + k] = ring[past + k]
    if memory[2] == 0:
        for k in range(n_e):
            memory[used_at + k] = 1
        return n_e
    n_used = 0
    for k in range(n_e):
        place = past + k - n_seen
        if k < n_seen:
            place = ints[partners_at + k] * 2 * length + oldest + step - 1
        memory[used_at + k] = memory[valid_at + place]
        n_used += memory[valid_at + place]
    return n_used


@kernel("void(i8, i4[::1], f8[::1], f4[::1], i4[::1], f8[::1], f8[::1], i8)", cache=True, nogil=True)
def judge_sensor(
    i: int, ints: Array, floats: Array, vectors: Array, memory: Array, ring: Array, out: Array, at: int
) -> None:
    """Write the residuals of sensor i at out[at], out[at + n_sensors], out[at + 2 n_sensors] and so on.

    i : int, sensor; out : float64[:], dimensionless (affine: scaled units); the rest is packed as the
    module's docstring says. All are NaN where the sensor itself is not valid at t or t + step; bound, conf
    and affine are NaN where fewer than half of the components are valid, affine where any of its own past is not.

    Notes
    -----
    Source: section 1, eq. 22 - 25 at one instant; unseen transition: trans 1, bound 0, conf 1, affine by the
    general map (section 3.4).
    """
    n_columns, n_sensors, n_seen, step, levels = ints[0], ints[1], ints[2], ints[3], ints[4]
    affine = ints[6]
    length = 2 * step
    n_e = n_seen + step - 1
    slot = memory[0]
    past_slot = slot + step
    if past_slot >= length:
        past_slot -= length
    before = memory[MEMORY_HEADER + i * length + past_slot]
    after = memory[MEMORY_HEADER + i * length + slot]
    if before < 0 or after < 0:
        for kind in range(3 + affine):
            out[at + kind * n_sensors] = np.nan
        return
    partners_at = HEADER + n_columns + n_sensors
    table_at = partners_at + n_sensors * n_seen
    pointers_at = table_at + n_sensors * levels * levels
    rows_at = 1 + 3 * n_columns + n_sensors * (levels - 1)
    stride = 2 * n_e + affine * (n_e + 2)
    w_at = n_columns * 2 * length
    own = ints[HEADER + n_columns + i]
    now = ring[own * 2 * length + past_slot]
    row = ints[table_at + (i * levels + before) * levels + after]
    if row < 0:
        out[at], out[at + n_sensors], out[at + 2 * n_sensors] = 1.0, 0.0, 1.0
        if affine:
            used = extend(i, ints, memory, ring)
            own_at = MEMORY_HEADER + n_sensors * length + w_at
            if 2 * used < n_e or not all_valid(memory, own_at + n_seen, n_e - n_seen):
                out[at + 3 * n_sensors] = np.nan
            else:
                general_at = rows_at + ints[5] * stride + i * (n_e + 1)
                out[at + 3 * n_sensors] = abs(map_residual(ring, w_at, now, floats, general_at, n_e))
        return
    out[at] = 0.0
    n_used = extend(i, ints, memory, ring)
    if 2 * n_used < n_e:
        for kind in range(1, 3 + affine):
            out[at + kind * n_sensors] = np.nan
        return
    used_at = MEMORY_HEADER + n_sensors * length + w_at
    bounds_at = rows_at + row * stride
    out[at + n_sensors] = bound_residual(
        ring, w_at, floats, bounds_at, memory, used_at, ints, partners_at + i * n_seen, n_seen, n_e, own,
    )
    if affine and not all_valid(memory, used_at + n_seen, n_e - n_seen):  # a guessed past would be taken for a jump
        out[at + 3 * n_sensors] = np.nan
    elif affine:
        error = abs(map_residual(ring, w_at, now, floats, bounds_at + 2 * n_e, n_e))
        out[at + 3 * n_sensors] = max(0.0, error - floats[bounds_at + 3 * n_e + 1])
    first, last = ints[pointers_at + row], ints[pointers_at + row + 1]
    if n_used < n_e:
        out[at + 2 * n_sensors] = masked_conf_residual(ring, w_at, n_e, vectors, first, last, memory, used_at)
        return
    conf = 0.0
    norm = centre(ring, w_at, n_e)
    if norm >= SMALLEST_NORM and last > first:
        best = -norm
        for v in range(first, last):
            best = max(best, dot(ring, w_at, vectors, v * n_e, n_e))
        conf = max(0.0, 1.0 - best / norm)
    out[at + 2 * n_sensors] = conf


@kernel("void(i4[::1], i4[::1])", cache=True, nogil=True)
def forget(ints: Array, memory: Array) -> None:
    """Empty the memory, as at the start and after a gap; both arrays int32[:], packed."""
    memory[0] = -1
    memory[1] = 0
    memory[2] = 0
    for k in range(MEMORY_HEADER, memory.size):
        memory[k] = 1  # what was never written must not count as bad when it is overwritten


@kernel("void(f8[::1], u1[::1], u1[::1], i4[::1], f8[::1], f4[::1], i4[::1], f8[::1], f8[::1])", cache=True,
      nogil=True)
def score_rows(
    values: Array, valid: Array, gap: Array, ints: Array, floats: Array, vectors: Array, memory: Array,
    ring: Array, out: Array,
) -> None:
    """Score rows one after the other, carrying the memory on from the last call.

    Parameters
    ----------
    values : float64[n * n_columns of a row], engineering units
    valid : uint8[same]; 0 = do not use
    gap : uint8[n]; 1 = this row does not continue the row before
    ints, floats, vectors : the packed model (see the module's docstring)
    memory, ring : int32[:] and float64[:], changed in place
    out : float64[n * (3 + affine) n_sensors], written: trans, bound, conf (dimensionless) and affine
        (scaled units) of all sensors at t = row - step; NaN while fewer than 2 step rows are in the memory

    Notes
    -----
    Source: section 1 of the paper's algorithm; section 2 (decisions) of the design.
    """
    n = gap.size
    if n == 0:
        return
    width = values.size // n
    n_sensors = ints[1]
    n_channels = (3 + ints[6]) * n_sensors
    for r in range(n):
        if gap[r] != 0:
            forget(ints, memory)
        push_row(values, valid, r * width, ints, floats, memory, ring)
        at = r * n_channels
        if memory[1] < 2 * ints[3]:
            for k in range(n_channels):
                out[at + k] = np.nan
            continue
        memory[1] = 2 * ints[3]  # the count stays where it is enough: it never overflows
        for i in range(n_sensors):
            judge_sensor(i, ints, floats, vectors, memory, ring, out, at + i)
