"""Kernels of cyclic processes: a trigger cuts the stream into parts, parts become features, features leave corridors.

A part of n rows is seen twice: in bins of absolute time since its begin (`run`, known while the part runs), and in
bins of its own length (`bin`, known at its end, blind to how fast it went).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .jit import kernel

CHANGE, RISING, FALLING = 0, 1, 2  # what of the trigger begins a part
END, BEGIN, BROKEN = 1, 2, 4  # bits of `watch`
KNOWN, LAST, MISSING = 0, 1, 2  # layout of the trigger's state, float64[3]
BIN_SHARE, PHASE_SHARE, WHOLE_SHARE = 0.5, 0.8, 0.9  # valid rows without which a mean is not that of its stretch


@kernel("int64(float64, boolean, int64, boolean, int64, float64[::1])", cache=True)
def watch(value, ok, mode, back, tolerance, state):
    """Take the trigger of one row; return bits: END (the running part ended before this row), BEGIN, BROKEN.

    mode: CHANGE of the value, RISING or FALLING over 0.5; back: a part ends where the trigger goes back, otherwise
    where the next begins; tolerance: rows without a valid trigger that are bridged; state float64[3], zeros after a
    gap. A longer silence hides when the trigger moved: a level may have moved twice, so its part is broken at once; a
    counter that is found unchanged has not moved, one that is found changed breaks the part.
    """
    if not (ok and math.isfinite(value)):
        state[MISSING] += 1.0
        if state[MISSING] == tolerance + 1.0 and mode != CHANGE:
            state[KNOWN] = 0.0
            return BROKEN
        return 0
    late = state[MISSING] > tolerance
    state[MISSING] = 0.0
    now = value
    if mode == RISING:
        now = 1.0 if value > 0.5 else 0.0
    elif mode == FALLING:
        now = 0.0 if value > 0.5 else 1.0
    before = state[LAST]
    state[LAST] = now
    if state[KNOWN] == 0.0:
        state[KNOWN] = 1.0
        return 0
    if now == before:
        return 0
    if mode == CHANGE:
        return BROKEN if late else END | BEGIN
    if now > before:
        return BEGIN if back else END | BEGIN
    return END if back else 0


@njit(
    "void(float64[::1], uint8[::1], uint8[::1], int64, boolean, int64, int64[::1], uint8[::1])",
    cache=True,
)
def watch_rows(values, valid, gap, mode, back, tolerance, codes, silent):
    """Write the bits of `watch` for a whole record, int64[n], and where the trigger is missing too long, uint8[n]."""
    state = np.zeros(3)
    for t in range(values.shape[0]):
        if gap[t] != 0:
            state[:] = 0.0
        codes[t] = watch(values[t], valid[t] != 0, mode, back, tolerance, state)
        silent[t] = 1 if state[MISSING] > tolerance else 0


@kernel(
    "boolean(float64[::1], uint8[::1], int64, float64, float64[::1], int64[::1], float64[:, ::1])",
    cache=True,
)
def run_row(values, valid, row, width, sums, counts, means):
    """Take row number `row` of the running part; True where it closes a bin of absolute time.

    values float64[c], valid uint8[c]; width: rows of a bin; sums float64[c], counts int64[c + 1] (last: all rows): the
    open bin;
    means float64[n_run, c]: written for the bin that closes, NaN where fewer than half its rows are valid.
    """
    k = int(row / width)
    if k >= means.shape[0]:
        return False
    n = values.shape[0]
    if row == 0:
        sums[:] = 0.0
        counts[:] = 0
    for c in range(n):
        if valid[c] != 0:
            sums[c] += values[c]
            counts[c] += 1
    counts[n] += 1
    if int((row + 1) / width) == k:
        return False
    for c in range(n):
        means[k, c] = sums[c] / counts[c] if counts[c] > 0 and counts[c] >= BIN_SHARE * counts[n] else np.nan
    sums[:] = 0.0
    counts[:] = 0
    return True


@njit("void(float64[:, ::1], uint8[:, ::1], float64, float64[:, ::1])", cache=True)
def run_rows(values, valid, width, means):
    """Write all bins of absolute time of a whole part, float64[n, c] -> float64[n_run, c], as `run_row` row by row."""
    means[:] = np.nan
    sums = np.zeros(values.shape[1])
    counts = np.zeros(values.shape[1] + 1, np.int64)
    for t in range(values.shape[0]):
        run_row(values[t], valid[t], t, width, sums, counts, means)


@kernel(
    "void(float64[:, ::1], float64[:, ::1], float64[:, ::1], int64[::1], int64, int64, float64[:, ::1],"
    " int64[:, ::1])",
    cache=True,
)
def depart(features, center, spread, kind, start, stop, worst, where):
    """Raise `worst` to how far features left their centre, in spreads, for the feature rows start ... stop - 1.

    features, center, spread float64[r, c]: NaN is not judged; kind int64[r]: group of each feature row;
    worst float64[k, c]: largest of the group so far (NaN: none), where int64[k, c]: its feature row.
    """
    for r in range(start, stop):
        k = kind[r]
        for c in range(features.shape[1]):
            z = abs(features[r, c] - center[r, c]) / spread[r, c]
            if math.isnan(z):
                continue
            if math.isnan(worst[k, c]) or z > worst[k, c]:
                worst[k, c] = z
                where[k, c] = r


@kernel(
    "void(float64[:, ::1], uint8[:, ::1], int64, int64, int64, float64, float64[:, ::1], int64)",
    cache=True,
)
def _stretches(values, valid, n, c, pieces, share, features, first):
    """Write the mean of column c in each of `pieces` equal stretches of n rows to features[first ...]."""
    at, total, count, rows = 0, 0.0, 0, 0
    for k in range(pieces):
        features[first + k, c] = np.nan
    for t in range(n + 1):
        k = t * pieces // n if t < n else pieces
        if k != at:
            if count > 0 and count >= share * rows:
                features[first + at, c] = total / count
            at, total, count, rows = k, 0.0, 0, 0
        if t < n:
            rows += 1
            if valid[t, c] != 0:
                total += values[t, c]
                count += 1


@kernel(
    "void(float64[:, ::1], uint8[:, ::1], int64, int64, int64, int64, float64[:, ::1])",
    cache=True,
)
def part_features(values, valid, n, first, n_bins, n_phases, features):
    """Write what a part of n rows is like, from feature row `first` on: bins, phases, shape, mean, swing, noise.

    values float64[>= n, c], valid uint8[>= n, c]. bin: mean in each of n_bins equal stretches of the part; phase: the
    same in n_phases; shape: phase less the mean over the part; mean, swing (standard deviation), noise (root mean
    square of the change from row to row) over the part. NaN where too few rows are valid.
    """
    columns = values.shape[1]
    phase, shape = first + n_bins, first + n_bins + n_phases
    whole = shape + n_phases
    for c in range(columns):
        _stretches(values, valid, n, c, n_bins, BIN_SHARE, features, first)
        _stretches(values, valid, n, c, n_phases, PHASE_SHARE, features, phase)
        total, count = 0.0, 0
        for t in range(n):
            if valid[t, c] != 0:
                total += values[t, c]
                count += 1
        if count < WHOLE_SHARE * n or count < 2:
            features[shape:whole + 3, c] = np.nan
            continue
        mean = total / count
        square, step, steps = 0.0, 0.0, 0
        for t in range(n):
            if valid[t, c] != 0:
                square += (values[t, c] - mean) ** 2
                if t > 0 and valid[t - 1, c] != 0:
                    step += (values[t, c] - values[t - 1, c]) ** 2
                    steps += 1
        for k in range(n_phases):
            features[shape + k, c] = features[phase + k, c] - mean
        features[whole, c] = mean
        features[whole + 1, c] = math.sqrt(square / count)
        features[whole + 2, c] = math.sqrt(step / steps) if steps > 0 else np.nan


@kernel(
    "void(float64[:, ::1], uint8[:, ::1], int64, float64, float64[:, ::1], float64[:, ::1], float64[::1],"
    " float64[::1])",
    cache=True,
)
def stretched(values, valid, n, total, center, spread, limit, away):
    """Write how far the n rows so far leave the corridor of `bin` if the part is to take `total` rows in the end.

    values float64[>= n, c]; center, spread float64[n_bins, c]; limit float64[c] in spreads; away float64[c]: written,
    the largest departure in units of the limit over all bins that are whole by then, 0 where there is none.
    """
    bins = center.shape[0]
    for c in range(values.shape[1]):
        away[c] = 0.0
        at, acc, count, rows = 0, 0.0, 0, 0
        for t in range(n + 1):
            k = int(t * bins / total)
            if k != at:
                if at < bins and count > 0 and count >= BIN_SHARE * rows:
                    z = abs(acc / count - center[at, c]) / (spread[at, c] * limit[c])
                    if z > away[c]:
                        away[c] = z
                at, acc, count, rows = k, 0.0, 0, 0
            if t < n and valid[t, c] != 0:
                acc += values[t, c]
                count += 1
            rows += 1


@kernel("float64(float64[::1], float64)", cache=True)
def _quantile(ordered, q):
    """Return the q quantile of an ordered float64[n], linear between neighbours."""
    at = q * (ordered.shape[0] - 1)
    low = int(at)
    high = min(low + 1, ordered.shape[0] - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@njit("void(float64[:, :, ::1], int64, float64[:, ::1], float64[:, ::1])", cache=True)
def corridor(features, needed, center, spread):
    """Write median and robust spread over parts, float64[r, c], of features float64[p, r, c]; NaN below `needed` parts.

    The spread is that of a normal distribution with the same inner 68 % or the same inner 90 %, whichever is wider: up
    to 5 % of odd parts on one side do not move it, and a tail that is there in one part of ten does.
    """
    parts = features.shape[0]
    x = np.empty(parts)
    for r in range(features.shape[1]):
        for c in range(features.shape[2]):
            n = 0
            for p in range(parts):
                if not math.isnan(features[p, r, c]):
                    x[n] = features[p, r, c]
                    n += 1
            if n < needed:
                center[r, c] = np.nan
                spread[r, c] = np.nan
                continue
            s = np.sort(x[:n])
            center[r, c] = _quantile(s, 0.5)
            inner = (_quantile(s, 0.8413) - _quantile(s, 0.1587)) / 2.0
            outer = (_quantile(s, 0.95) - _quantile(s, 0.05)) / 3.2897
            spread[r, c] = max(inner, outer)
