"""Kernel that brings residuals down while a tag they were learnt with is missing (see `opcua_detector.absence`)."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]


@kernel("void(u1[::1], u1[::1], f8[::1], i8, f8[::1], i8[::1])", cache=True, nogil=True, error_model="numpy")
def lower_absent(valid: Array, gap: Array, residual: Array, hold: int, table: Array, left: Array) -> None:
    """Divide residuals, in place, by what they grow while columns are not valid.

    valid : uint8[n * D]; rows of columns; gap : uint8[n]; 1 = the methods start anew
    residual : float64[n * C]; hold : rows after its return in which a column still counts as missing
    table : float64[C * D]; times by which a residual grows while a column is missing, at least 1. Those of several
        missing columns add up as variances: f^2 = 1 + sum (f_i^2 - 1)
    left : int64[D]; rows for which each column still counts as missing; carries on from call to call
    """
    d = left.shape[0]
    n = gap.shape[0]
    n_channels = residual.shape[0] // n
    for t in range(n):
        if gap[t] != 0:
            left[:] = 0
        absent = False
        for i in range(d):
            if valid[t * d + i] == 0:
                left[i] = hold + 1
            elif left[i] > 0:
                left[i] -= 1
            absent = absent or left[i] > 0
        if not absent:
            continue
        for c in range(n_channels):
            grown = 1.0
            for i in range(d):
                if left[i] > 0:
                    times = table[c * d + i]
                    grown += times * times - 1.0
            residual[t * n_channels + c] /= math.sqrt(grown)
