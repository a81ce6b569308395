"""Kernel of the method `checks`: distance outside the healthy range, step beyond the largest, run of equal values.

What a call needs is packed:

    ints    int64    n, then column[n], range_at[n], stuck_at[n]: where in the residual a column's range and stuck
                     check go, -1 = it has none; its rate check goes to its own number
    tables  float64  [n * TABLE]: low, high, 1 / range allowance, largest step, 1 / rate allowance, longest run,
                     1 / stuck allowance (rows)
    state   float64  [n * STATE]: last valid value, rows since it, length of the run of values equal to it
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from .jit import kernel

TABLE: Final = 7
STATE: Final = 3
MOST: Final = 1e6  # of a residual, so that sums over rows stay finite


@kernel("void(float64[::1])", cache=True, nogil=True)
def forget(state):
    """Forget all rows: NaN stands for "no value yet"."""
    for k in range(0, state.shape[0], STATE):
        state[k] = np.nan
        state[k + 1] = 0.0
        state[k + 2] = 0.0


@kernel("void(float64[::1], uint8[::1], int64[::1], float64[::1], float64[::1], float64[::1])", cache=True, nogil=True)
def check(values, valid, ints, tables, state, residual):
    """Take one row, float64[n_columns] and uint8[n_columns]; write `residual` float64[n_channels], NaN where masked.

    Each residual is 0 within what the healthy record held, and 1 one allowance beyond it. A masked row neither counts
    to a run nor ends it; a step over masked rows is told per row, so that a hole makes no large step. Once a run is
    one allowance longer than the longest healthy one, a masked row that still carries its value belongs to it: from
    then on the tag may be masked for standing still (`kernels.guards`), and to say so is the business of this check.
    """
    n = ints[0]
    for i in range(n):
        c = ints[1 + i]
        x = values[c]
        range_at, stuck_at = ints[1 + n + i], ints[1 + 2 * n + i]
        t, s = i * TABLE, i * STATE
        finite = math.isfinite(x)
        stands = stuck_at >= 0 and finite and x == state[s] and (state[s + 2] - tables[t + 5]) * tables[t + 6] >= 1.0
        if (valid[c] == 0 or not finite) and not stands:
            residual[i] = np.nan
            if range_at >= 0:
                residual[range_at] = np.nan
            if stuck_at >= 0:
                residual[stuck_at] = np.nan
            state[s + 1] += 1.0
            continue
        if range_at >= 0:
            residual[range_at] = min(max(tables[t] - x, x - tables[t + 1], 0.0) * tables[t + 2], MOST)
        last = state[s]
        known = not math.isnan(last)
        if known and x == last:
            state[s + 2] += 1.0
        else:
            state[s + 2] = 0.0
        if known:
            step = abs(x - last) / (state[s + 1] + 1.0)
            residual[i] = min(max(step - tables[t + 3], 0.0) * tables[t + 4], MOST)
        else:
            residual[i] = np.nan
        if stuck_at >= 0:
            residual[stuck_at] = min(max(state[s + 2] - tables[t + 5], 0.0) * tables[t + 6], MOST)
        state[s] = x
        state[s + 1] = 0.0


@kernel(
    "void(float64[:, ::1], uint8[:, ::1], uint8[::1], int64[::1], float64[::1], float64[::1], float64[:, ::1])",
    cache=True, nogil=True,
)
def check_rows(values, valid, gap, ints, tables, state, residual):
    """Run `check` over a record, with a reset at each gap: float64[n, n_columns] -> float64[n, n_channels]."""
    for t in range(values.shape[0]):
        if gap[t] != 0:
            forget(state)
        check(values[t], valid[t], ints, tables, state, residual[t])


@njit("float64[:, ::1](float64[:, ::1], uint8[:, ::1], uint8[::1], int64[::1])", cache=True, nogil=True)
def extremes(values, valid, gap, fold):
    """Return what each fold of a record holds, by the rules of `check`: float64[n_folds * n_columns, 7].

    fold : int64[n]; number of the fold of each row, ascending. Per fold and column: lowest, highest (inf, -inf where
    nothing is valid), largest step per row, longest run, steps, changes, valid rows.
    """
    n, width = values.shape
    n_folds = fold[n - 1] + 1
    out = np.zeros((n_folds * width, 7))
    out[:, 0] = np.inf
    out[:, 1] = -np.inf
    last = np.full(width, np.nan)
    since = np.zeros(width)
    run = np.zeros(width)
    for t in range(n):
        if gap[t] != 0:
            last[:] = np.nan
        for c in range(width):
            x = values[t, c]
            if valid[t, c] == 0 or not math.isfinite(x):
                since[c] += 1.0
                continue
            row = out[fold[t] * width + c]
            row[0] = min(row[0], x)
            row[1] = max(row[1], x)
            row[6] += 1.0
            if math.isnan(last[c]):
                run[c] = 0.0
            else:
                row[4] += 1.0
                row[2] = max(row[2], abs(x - last[c]) / (since[c] + 1.0))
                if x == last[c]:
                    run[c] += 1.0
                    row[3] = max(row[3], run[c])
                else:
                    run[c] = 0.0
                    row[5] += 1.0
            last[c] = x
            since[c] = 0.0
    return out


@kernel("int64(float64[::1], float64, float64)", cache=True, nogil=True)
def excursions(x, low, high):
    """Return how often float64[n] goes from at most `low` to at least `high` or back; NaN is passed over."""
    side, count = 0, 0
    for one in x:
        now = -1 if one <= low else 1 if one >= high else 0
        if now != 0 and now != side:
            count += side != 0
            side = now
    return count
