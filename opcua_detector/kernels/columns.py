"""Kernel that turns one row of tags into one row of columns: identity, difference, sine, cosine."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .jit import kernel

SAME, DIFFERENCE, SINE, COSINE = 0, 1, 2, 3


@kernel(
    "void(float64[::1], uint8[::1], int64[::1], int64[::1], float64[::1], boolean, float64[::1], uint8[::1],"
    " float64[::1], uint8[::1])",
    cache=True,
)
def prepare(values, valid, index, op, scale, gap, last, last_valid, out, out_valid):
    """Write one row of columns.

    values float64[n_tags] (EU), valid uint8[n_tags]: the row; index int64[n_columns]: tag of each column;
    op int64[n_columns]; scale float64[n_columns]: radians per unit of an angle; gap: forget the row before;
    last float64[n_columns], last_valid uint8[n_columns]: value of the row before, kept here;
    out float64[n_columns], out_valid uint8[n_columns]: the result. A difference needs two valid neighbours and
    does not go down: a counter that was reset or rolled over masks that one row.
    """
    for c in range(index.shape[0]):
        x = values[index[c]]
        ok = valid[index[c]] != 0 and math.isfinite(x)
        kind = op[c]
        if kind == 0:
            out[c] = x
            out_valid[c] = 1 if ok else 0
        elif kind == 1:
            step = x - last[c]
            good = ok and not gap and last_valid[c] != 0 and step >= 0.0
            out[c] = step if good else np.nan
            out_valid[c] = 1 if good else 0
        else:
            out[c] = math.sin(x * scale[c]) if kind == 2 else math.cos(x * scale[c])
            out_valid[c] = 1 if ok else 0
        last[c] = x
        last_valid[c] = 1 if ok else 0


@njit(
    "void(float64[:, ::1], uint8[:, ::1], uint8[::1], int64[::1], int64[::1], float64[::1], float64[:, ::1],"
    " uint8[:, ::1])",
    cache=True,
)
def prepare_rows(values, valid, gap, index, op, scale, out, out_valid):
    """Write the columns of a whole record: float64[n, n_tags] -> float64[n, n_columns], as `prepare` row by row."""
    last = np.full(index.shape[0], np.nan)
    last_valid = np.zeros(index.shape[0], np.uint8)
    for t in range(values.shape[0]):
        prepare(values[t], valid[t], index, op, scale, gap[t] != 0, last, last_valid, out[t], out_valid[t])
