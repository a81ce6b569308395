"""Kernel of operator feedback: what a residual may be in a situation that was declared normal.

A situation is a ball in the space of some columns, now and some rows ago, and for each channel an interval of its
residual with its direction. A residual inside both counts as one between `low` and `high`, in proportion to its size:
both are such that they do not alarm, but stand above what is healthy. What lies outside the interval by d, on either
side, counts as `high` + d, and never as more than it is. So r' is continuous in the residual, a larger fault in the
same situation still alarms, and so does one in the other direction. Where several balls hold, the one that excuses
most counts for each channel, so the order of feedback does not matter.

What a call needs is packed (D columns, C channels, E balls, B groups of balls that share columns and channels):

    ints    int64    HEADER: D, C, B, rows of memory, largest K; then for each group: E, K, M, place of its balls in
                     `floats`, columns[K], ages[K] (rows ago), channels[M]
    floats  float64  middle[D], inverse[D] (of the healthy spans), then for each ball: radius, centre[K],
                     least[M], most[M] (NaN: nothing is excused)
    calm    float64  [n_states * C * 2]: low and high of each channel
    memory  float64  excused[C], point[largest K], then scaled values of the last rows [rows of memory * D]
    cursor  int64    place in the memory, rows since the last gap
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]

HEADER: Final = 5
GROUP: Final = 4


@kernel(
    "void(f8[::1], u1[::1], u1[::1], i8[::1], f8[::1], f8[::1], i8[::1], f8[::1], f8[::1], f8[::1], i8[::1])",
    cache=True, nogil=True,
)
def allow_rows(
    values: Array, valid: Array, gap: Array, state: Array, signed: Array, residual: Array, ints: Array, floats: Array,
    calm: Array, memory: Array, cursor: Array,
) -> None:
    """Take rows into the memory and lower their residuals, in place, by what is excused.

    values : float64[n * D], valid : uint8[n * D]; rows of columns
    gap : uint8[n]; 1 = the row does not continue the one before
    state : int64[n]; which calibration, -1 = none: nothing is changed
    signed : float64[n * C]; the residuals with their direction; the residual itself where a channel has none
    residual : float64[n * C]; NaN stays NaN
    the rest : packed, see the module's docstring; memory and cursor carry on from call to call

    A component that is not known (masked, or from before a gap) is passed over; a ball holds where all that are known
    lie within its radius and at least half of them are known.
    """
    d, n_channels, n_groups, length = ints[0], ints[1], ints[2], ints[3]
    first = n_channels + ints[4]
    point = memory[n_channels:first]
    for t in range(state.shape[0]):
        if gap[t] != 0:
            cursor[1] = 0
        place = cursor[0] + 1
        if place >= length:
            place = 0
        cursor[0] = place
        if cursor[1] < length:
            cursor[1] += 1
        at = first + place * d
        for c in range(d):
            x = values[t * d + c]
            known = valid[t * d + c] != 0 and math.isfinite(x)
            memory[at + c] = (x - floats[c]) * floats[d + c] if known else np.nan
        if state[t] < 0:
            continue
        hit = False
        where = HEADER
        for _ in range(n_groups):
            n_balls, n_keys, n_own, ball = ints[where], ints[where + 1], ints[where + 2], ints[where + 3]
            keys = where + GROUP
            own = keys + 2 * n_keys
            where = own + n_own
            size = 1 + n_keys + 2 * n_own
            n_known = 0
            for k in range(n_keys):
                age = ints[keys + n_keys + k]
                row = place - age
                if row < 0:
                    row += length
                point[k] = memory[first + row * d + ints[keys + k]] if age < cursor[1] else np.nan
                n_known += not math.isnan(point[k])
            if 2 * n_known < n_keys:
                continue
            for _ in range(n_balls):
                radius = floats[ball]
                inside = True
                for k in range(n_keys):
                    if abs(point[k] - floats[ball + 1 + k]) > radius:  # false for NaN
                        inside = False
                        break
                if inside:
                    if not hit:
                        hit = True
                        for c in range(n_channels):
                            memory[c] = np.inf
                    for m in range(n_own):
                        c = ints[own + m]
                        least, most = floats[ball + 1 + n_keys + m], floats[ball + 1 + n_keys + n_own + m]
                        s = signed[t * n_channels + c]
                        low = calm[2 * (state[t] * n_channels + c)]
                        high = calm[2 * (state[t] * n_channels + c) + 1]
                        if s < least:
                            counts = high + least - s
                        elif s > most:
                            counts = high + s - most
                        else:  # a NaN comes here too, and is not less than what there is
                            counts = low + (high - low) * abs(s) / max(abs(least), abs(most))
                        if counts < memory[c]:
                            memory[c] = counts
                ball += size
        if hit:
            for c in range(n_channels):
                if memory[c] < residual[t * n_channels + c]:  # false for NaN
                    residual[t * n_channels + c] = memory[c]
