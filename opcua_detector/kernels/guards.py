"""Kernel of the guards: does a tag still come with the resolution and the scale it was learnt with, and does it move?

O(1) per tag.

Resolution: the greatest common step of the last changes of a tag, by Euclid's algorithm, one change at a time. Values
that were rounded share a step far above their rounding error; values that were not leave no common step after two or
three changes. Scale: mean, spread, step and extremes of blocks of rows; a factor fits where all of them, divided by it,
lie within those of healthy blocks, while as they are they do not. Standing still: a run of equal values longer than
so many rows, by the rules of `kernels.checks`.

What a call needs is packed:

    ints    int64    n_tags, n_scales, how many of them are tried first, then index[n_tags]: the tag's place in the
                     row, then longest[n_tags]: rows of one value from which it is masked, 0 = not watched
    tables  float64  [n_tags * TABLE]: coarse, needed, block, centre, low, high, mean_low, mean_high, spread_low,
                     spread_high, step_low, step_high, units, relative; then [n_scales * SCALE]: factor, offset, units
    state   float64  [n_tags * STATE], places below

coarse: least common step that counts as coarser than learnt (inf: not watched), for a tag of few significant digits
at least relative times its value; needed: changes that must share it;
block: rows, 0 = scale not watched; low .. step_high: of healthy blocks. A scale with an offset or of a factor below
LEAST_FACTOR holds for tags of its unit only (`units` of both share a bit).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .jit import kernel

TABLE: Final = 14
SCALE: Final = 3
STATE: Final = 20
(COMMON, LAST, CHANGES, LEVELS, ORIGIN, FINE, COARSE_MASK, TOLD_STEP, ROWS, SUM, SQUARES, MOVED, STEPS, LOWEST, HIGHEST,
 BEFORE, SCALE_MASK, LONGEST, ERROR, RUN) = range(STATE)
MIN_LEVELS: Final = 4  # different values: a tag that toggles between two or three has no resolution to tell
CONFIRMED: Final = 3  # changes after which a step is kept though a long change cannot be measured by it
BACK: Final = 5  # changes without a common step end the mask
ROUNDING: Final = 2.0  # units in the last place of a value
TELLING: Final = 0.02  # of a step: a rounding error above it tells nothing
SINGLE, DOUBLE = 2.0**-23, 2.0**-52
WITHIN: Final = 1.5  # healthy spreads and steps may be exceeded by this factor, and still be as learnt
CLOSE: Final = 1.2  # the same for a scale that explains them
MARGIN, CLOSE_MARGIN = 0.25, 0.1  # of the healthy span, on both sides of mean and extremes
BLOCKS_THAT_AGREE: Final = 2
CHANGED, AS_LEARNT, STILL = 1, 2, 4  # what a row tells, added up: see `guard_row`


@kernel("void(float64[::1], int64)", cache=True)
def _new_block(state, s):
    for k in range(ROWS, STEPS + 1):
        state[s + k] = 0.0
    state[s + LOWEST] = np.inf
    state[s + HIGHEST] = -np.inf


@kernel("void(float64[::1])", cache=True)
def begin(state):
    """Forget everything, masks too."""
    state[:] = 0.0
    for s in range(0, state.shape[0], STATE):
        _new_block(state, s)
        state[s + LAST] = np.nan


@kernel("int64(int64)", cache=True)
def _bits(x):
    count = 0
    while x:
        x &= x - 1
        count += 1
    return count


@kernel("UniTuple(float64, 2)(float64, float64, float64, float64, float64)", cache=True)
def common_step(a, of_a, b, of_b, least):
    """Return (the greatest common step of two distances, how true it is); (0, 0) where it is below `least`.

    of_a, of_b : how true the distances are. Each remainder a - q b is true to of_a + q of_b; where that comes near b
    nothing can be told, which is (0, 0) as well.
    """
    if a < b:
        a, of_a, b, of_b = b, of_b, a, of_a
    for _ in range(64):
        if b <= of_b:
            return (a, of_a) if a >= least and of_a <= TELLING * a else (0.0, 0.0)
        if b < least or of_b > TELLING * b:
            return 0.0, 0.0
        q = np.round(a / b)
        a, of_a, b, of_b = b, of_b, abs(a - q * b), of_a + q * of_b
    return 0.0, 0.0


@kernel("UniTuple(float64, 3)(float64, float64, float64, float64, float64)", cache=True)
def join(g, of_g, apart, rounding, least):
    """Take one more distance into a common step: (step, how true it is, 1 where the distance lay on it).

    The step is 0 where there is none, and stays where the distance is too long to tell. A distance of q steps makes
    the step q times as true as itself.
    """
    if g == 0.0:
        return apart, rounding, 0.0
    q = np.round(apart / g)
    if rounding + q * of_g > TELLING * g:
        return g, of_g, -1.0
    if abs(apart - q * g) <= rounding + q * of_g:
        if rounding < of_g * q:
            return apart / q, rounding / q, 1.0
        return g, of_g, 1.0
    g, of_g = common_step(g, of_g, apart, rounding, least)
    return g, of_g, 0.0


@kernel("void(float64, float64[::1], int64, float64[::1], int64)", cache=True)
def _resolution(x, tables, t, state, s):
    """Take a change to x into the common step of the tag; set or end its mask."""
    last = state[s + LAST]
    coarse = max(tables[t], tables[t + 13] * max(abs(x), abs(last)))
    apart = abs(x - last)
    single = np.float64(np.float32(x)) == x and np.float64(np.float32(last)) == last
    rounding = ROUNDING * (SINGLE if single else DOUBLE) * max(abs(x), abs(last))
    g, on_it = 0.0, 0.0
    if apart >= coarse:
        if state[s + COMMON] == 0.0:
            state[s + ORIGIN] = last
        g, of_g, on_it = join(state[s + COMMON], state[s + ERROR], apart, rounding, coarse)
        state[s + ERROR] = of_g
        if on_it < 0.0:
            if state[s + CHANGES] < CONFIRMED:  # a step that long ones cannot be measured by is not to stay
                state[s + COMMON] = 0.0
                state[s + CHANGES] = 0.0
                state[s + LEVELS] = 0.0
            return
    if on_it == 0.0:
        state[s + CHANGES] = 0.0
        state[s + LEVELS] = 0.0
    if g == 0.0:
        state[s + COMMON] = 0.0
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


@kernel("boolean(float64[::1], int64, float64, float64, float64, float64, float64, float64, float64, float64, float64)",
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


@kernel("void(int64[::1], float64[::1], int64, float64[::1], int64)", cache=True)
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
        if k == ints[2] and found != 0:
            break
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


@kernel("int64(float64[::1], uint8[::1], boolean, int64[::1], float64[::1], float64[::1], uint8[::1])", cache=True)
def guard_row(values, valid, gap, ints, tables, state, out_valid):
    """Take one row; write `out_valid` uint8[n]: `valid` less the masked tags.

    Returns the sum of CHANGED where the mask of a tag of another resolution or scale began just now, AS_LEARNT where
    one ended, STILL where a tag was masked for standing still, or no longer is. On a row with CHANGED all methods
    start anew, and so do the runs: the checks, which must tell of a tag that stands still, have forgotten theirs.
    """
    for c in range(valid.shape[0]):
        out_valid[c] = valid[c]
    told = 0
    n = ints[0]
    for i in range(n):
        c, t, s = ints[3 + i], i * TABLE, i * STATE
        longest = ints[3 + n + i]
        before = state[s + COARSE_MASK] != 0.0 or state[s + SCALE_MASK] != 0.0
        stood = longest > 0 and state[s + RUN] >= longest
        x = values[c]
        if gap:
            state[s + LAST] = np.nan
            state[s + RUN] = 0.0
            _new_block(state, s)
        if valid[c] != 0 and math.isfinite(x):
            last = state[s + LAST]
            known = not math.isnan(last)
            state[s + RUN] = state[s + RUN] + 1.0 if known and x == last else 0.0
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
            state[s + RUN] = 0.0
        if masked and not before:
            told |= CHANGED
        elif before and not masked:
            told |= AS_LEARNT
        stands = longest > 0 and state[s + RUN] >= longest
        if stands:
            out_valid[c] = 0
        if stands != stood:
            told |= STILL
    if told & CHANGED:
        for i in range(n):
            c, s = ints[3 + i], i * STATE
            state[s + RUN] = 0.0
            if state[s + COARSE_MASK] == 0.0 and state[s + SCALE_MASK] == 0.0:
                out_valid[c] = valid[c]
    return told


@kernel(
    "void(float64[:, ::1], uint8[:, ::1], uint8[::1], int64[::1], float64[::1], float64[::1], uint8[:, ::1],"
    " uint8[::1])",
    cache=True,
)
def guard_rows(values, valid, gap, ints, tables, state, out_valid, told):
    """Run `guard_row` over a record: float64[n, n_tags] -> out_valid uint8[n, n_tags], told uint8[n]."""
    for k in range(values.shape[0]):
        told[k] = guard_row(values[k], valid[k], gap[k] != 0, ints, tables, state, out_valid[k])


@kernel("float64(float64[::1])", cache=True)
def least_step(x):
    """Return the greatest common step of all changes in float64[n], 0 where none can be told from their rounding."""
    g, of_g = 0.0, 0.0
    for k in range(1, x.shape[0]):
        if x[k] == x[k - 1]:
            continue
        apart = abs(x[k] - x[k - 1])
        single = np.float64(np.float32(x[k])) == x[k] and np.float64(np.float32(x[k - 1])) == x[k - 1]
        rounding = ROUNDING * (SINGLE if single else DOUBLE) * max(abs(x[k]), abs(x[k - 1]))
        g, of_g, on_it = join(g, of_g, apart, rounding, 10.0 * rounding)
        if g == 0.0 or on_it < 0.0:
            return 0.0
    return g
