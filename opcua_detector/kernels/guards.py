"""Kernel of the guards: does a tag still come with the resolution and the scale it was learnt with? O(1) per tag.

Resolution: the greatest common step of the last changes of a tag, by Euclid's algorithm, one change at a time. Values
that were rounded share a step far above their rounding error; values that were not leave no common step after two or
three changes. Scale: mean, spread, step and extremes of blocks of rows; a factor fits where all of them, divided by it,
lie within those of healthy blocks, while as they are they do not.

What a call needs is packed:

    ints    int64    n_tags, n_scales, then index[n_tags]: the tag's place in the row
    tables  float64  [n_tags * TABLE]: coarse, needed, block, centre, low, high, mean_low, mean_high, spread_low,
                     spread_high, step_low, step_high, units; then [n_scales * SCALE]: factor, offset, units
    state   float64  [n_tags * STATE], places below

coarse: least common step that counts as coarser than learnt (inf: not watched); needed: changes that must share it;
block: rows, 0 = scale not watched; low .. step_high: of healthy blocks. A scale with an offset or of a factor below
LEAST_FACTOR holds for tags of its unit only (`units` of both share a bit).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

TABLE: Final = 13
SCALE: Final = 3
STATE: Final = 18
(COMMON, LAST, CHANGES, LEVELS, ORIGIN, FINE, COARSE_MASK, TOLD_STEP, ROWS, SUM, SQUARES, MOVED, STEPS, LOWEST, HIGHEST,
 BEFORE, SCALE_MASK, LONGEST) = range(STATE)
MIN_LEVELS: Final = 4  # different values: a tag that toggles between two or three has no resolution to tell
BACK: Final = 5  # changes without a common step end the mask
ROUNDING: Final = 4.0  # units in the last place of a value
SINGLE, DOUBLE = 2.0**-23, 2.0**-52
WITHIN: Final = 1.5  # healthy spreads and steps may be exceeded by this factor, and still be as learnt
CLOSE: Final = 1.2  # the same for a scale that explains them
MARGIN, CLOSE_MARGIN = 0.25, 0.1  # of the healthy span, on both sides of mean and extremes
BLOCKS_THAT_AGREE: Final = 2


@njit("void(float64[::1])", cache=True)
def begin(state):
    """Forget everything, masks too."""
    state[:] = 0.0
    for s in range(0, state.shape[0], STATE):
        _new_block(state, s)
        state[s + LAST] = np.nan


@njit("void(float64[::1], int64)", cache=True)
def _new_block(state, s):
    for k in range(ROWS, STEPS + 1):
        state[s + k] = 0.0
    state[s + LOWEST] = np.inf
    state[s + HIGHEST] = -np.inf


@njit("int64(int64)", cache=True)
def _bits(x):
    count = 0
    while x:
        x &= x - 1
        count += 1
    return count


@njit("float64(float64, float64, float64, float64)", cache=True)
def common_step(a, b, rounding, least):
    """Return the greatest common step of two distances to their rounding; 0 where it is below `least`."""
    if a < b:
        a, b = b, a
    for _ in range(64):
        if b <= rounding:
            return a if a >= least else 0.0
        if b < least:
            return 0.0
        q = np.round(a / b)
        a, b = b, abs(a - q * b)
        rounding *= min(q + 1.0, 1e6)  # an error of b enters q times
        if rounding > 0.1 * a:
            return 0.0  # nothing can be told
    return 0.0


@njit("void(float64, float64[::1], int64, float64[::1], int64)", cache=True)
def _resolution(x, tables, t, state, s):
    """Take a change to x into the common step of the tag; set or end its mask."""
    coarse, last = tables[t], state[s + LAST]
    apart = abs(x - last)
    single = np.float64(np.float32(x)) == x and np.float64(np.float32(last)) == last
    rounding = ROUNDING * (SINGLE if single else DOUBLE) * max(abs(x), abs(last))
    g = state[s + COMMON]
    if apart < coarse:
        g = -1.0
    elif g == 0.0:
        g = apart
        state[s + CHANGES] = 0.0
        state[s + LEVELS] = 0.0
        state[s + ORIGIN] = last
    else:
        q = np.round(apart / g)
        if abs(apart - q * g) > rounding * (q + 2.0):
            g = common_step(g, apart, rounding, coarse)
            if g == 0.0:
                g = -1.0
            state[s + CHANGES] = 0.0
            state[s + LEVELS] = 0.0
    if g < 0.0:
        state[s + COMMON] = 0.0
        state[s + CHANGES] = 0.0
        state[s + FINE] += 1.0
        if state[s + FINE] >= BACK:
            state[s + COARSE_MASK] = 0.0
        return
    state[s + COMMON] = g
    state[s + CHANGES] += 1.0
    place = int(np.round((x - state[s + ORIGIN]) / g)) % 48
    state[s + LEVELS] = float(int(state[s + LEVELS]) | (1 << place))
    if _bits(int(state[s + LEVELS])) >= MIN_LEVELS:
        state[s + LONGEST] = max(state[s + LONGEST], state[s + CHANGES])
        if state[s + CHANGES] >= tables[t + 1]:
            state[s + COARSE_MASK] = 1.0
            state[s + TOLD_STEP] = g
            state[s + FINE] = 0.0


@njit("boolean(float64[::1], int64, float64, float64, float64, float64, float64, float64, float64, float64, float64)",
      cache=True)
def _explains(tables, t, factor, offset, mean, spread, step, lowest, highest, within, margin):
    """Return whether a block, brought back by y = factor x + offset, is like the healthy ones."""
    m = margin * (tables[t + 5] - tables[t + 4])
    return (
        tables[t + 8] / within <= spread / factor <= tables[t + 9] * within
        and tables[t + 10] / within <= step / factor <= tables[t + 11] * within
        and tables[t + 6] - m <= (mean - offset) / factor <= tables[t + 7] + m
        and (lowest - offset) / factor >= tables[t + 4] - m
        and (highest - offset) / factor <= tables[t + 5] + m
    )


@njit("void(int64[::1], float64[::1], int64, float64[::1], int64)", cache=True)
def _scale(ints, tables, t, state, s):
    """Judge a whole block: as learnt, explained by a scale, or neither (which is for the methods to judge)."""
    rows = state[s + ROWS]
    mean = state[s + SUM] / rows
    spread = math.sqrt(max(state[s + SQUARES] / rows - mean * mean, 0.0))
    mean += tables[t + 3]
    step = state[s + MOVED] / max(state[s + STEPS], 1.0)
    lowest, highest = state[s + LOWEST], state[s + HIGHEST]
    if _explains(tables, t, 1.0, 0.0, mean, spread, step, lowest, highest, WITHIN, MARGIN):
        state[s + BEFORE] = 0.0
        state[s + SCALE_MASK] = 0.0
        return
    middle = math.sqrt(tables[t + 8] * tables[t + 9])
    best, found = np.inf, 0
    for k in range(ints[1]):
        at = ints[0] * TABLE + k * SCALE
        factor, offset, units = tables[at], tables[at + 1], int(tables[at + 2])
        if units != 0 and (int(tables[t + 12]) & units) == 0:
            continue
        if _explains(tables, t, factor, offset, mean, spread, step, lowest, highest, CLOSE, CLOSE_MARGIN):
            far = abs(math.log(spread / factor / middle))
            if far < best:
                best, found = far, k + 1
    if found != 0 and int(state[s + BEFORE]) % 1000 == found:
        state[s + BEFORE] += 1000.0
    else:
        state[s + BEFORE] = float(found + 1000)
    if found != 0 and state[s + BEFORE] >= 1000.0 * BLOCKS_THAT_AGREE:
        state[s + SCALE_MASK] = float(found)


@njit("int64(float64[::1], uint8[::1], boolean, int64[::1], float64[::1], float64[::1], uint8[::1])", cache=True)
def guard_row(values, valid, gap, ints, tables, state, out_valid):
    """Take one row; write `out_valid` uint8[n]: `valid` less the masked tags. Returns 1 where a tag was masked just
    now, 2 where a mask ended, 3 for both, else 0.
    """
    out_valid[:] = valid
    told = 0
    for i in range(ints[0]):
        c, t, s = ints[2 + i], i * TABLE, i * STATE
        before = state[s + COARSE_MASK] != 0.0 or state[s + SCALE_MASK] != 0.0
        x = values[c]
        if gap:
            state[s + LAST] = np.nan
            _new_block(state, s)
        if valid[c] != 0 and math.isfinite(x):
            last = state[s + LAST]
            known = not math.isnan(last)
            if known and x != last and tables[t] < np.inf:
                _resolution(x, tables, t, state, s)
            if tables[t + 2] > 0.0:
                y = x - tables[t + 3]
                state[s + SUM] += y
                state[s + SQUARES] += y * y
                if known:
                    state[s + MOVED] += abs(x - last)
                    state[s + STEPS] += 1.0
                state[s + LOWEST] = min(state[s + LOWEST], x)
                state[s + HIGHEST] = max(state[s + HIGHEST], x)
                state[s + ROWS] += 1.0
                if state[s + ROWS] >= tables[t + 2]:
                    _scale(ints, tables, t, state, s)
                    _new_block(state, s)
            state[s + LAST] = x
        masked = state[s + COARSE_MASK] != 0.0 or state[s + SCALE_MASK] != 0.0
        if masked:
            out_valid[c] = 0
        if masked and not before:
            told |= 1
        elif before and not masked:
            told |= 2
    return told


@njit(
    "void(float64[:, ::1], uint8[:, ::1], uint8[::1], int64[::1], float64[::1], float64[::1], uint8[:, ::1],"
    " uint8[::1])",
    cache=True,
)
def guard_rows(values, valid, gap, ints, tables, state, out_valid, told):
    """Run `guard_row` over a record: float64[n, n_tags] -> out_valid uint8[n, n_tags], told uint8[n]."""
    for k in range(values.shape[0]):
        told[k] = guard_row(values[k], valid[k], gap[k] != 0, ints, tables, state, out_valid[k])
