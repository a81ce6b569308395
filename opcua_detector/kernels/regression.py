"""Kernels of the method `regression`: forecast and relation residuals of every judged column, row by row.

One call of `score_rows` scores any number of rows, so the stream (one row a call) and the batch (a record a
call) run the same machine code and agree to the last bit.

Columns come in the model's order: those that are not judged (setpoints, commands, states) first, so that the
inputs of every forecast are one contiguous stretch of the ring: the rows t - lags ... t - 1 of all columns, then
the not judged columns of row t. The inputs of every relation are the same stretch up to the end of row t.

What a call needs is packed, since each array argument costs about 80 ns (d columns, j judged ones, h features):

    ints    int64    HEADER: d, columns not judged, columns seen (m), lags, rows of memory, h, feature inputs (p),
                     entries kept for each forecast (f); then cols[d], partners[d * m] ascending (in use where m < d),
                     not judged ones among them [d], row of `correction` or -1 [j]
    floats  float64  mean[d], inverse[d], low[d], high[d] (scaled), forecast[j * f], relation[d * (lags + 1) * m],
                     directions[p * h], offsets[h], correction[* (h + p + 1)]
    state   float64  slot, rows seen, invalid entries, 1 = write residuals with their sign, columns with
                     a guess in the memory; invalid entries of each row [length], rows since each column was valid
                     [d], rows for which its newest guess stays in the memory [d], ring of scaled values [2 length * d]
                     (each row twice, so that any stretch of `length` rows is contiguous), ring of invalid marks
                     [2 length * d], inputs [(lags + 1) * m], features, their inputs and 1 [h + p + 1]

with length = rows of memory + 1. Where a column is not valid its place as an input is taken by its own forecast for
HOLD_ROWS rows, later by a guess: what the other columns say it should be (its relation). A healthy mean in its place
would raise the residuals of all columns that follow it.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]

HEADER: Final = 8
STATE_HEADER: Final = 5
SIGNED: Final = 3
LARGEST: Final = 50.0
"""Scaled values are clipped here (healthy standard deviations)."""
HOLD_ROWS: Final = 10
SUM_FLAGS: Final = {"reassoc", "contract", "nsz"}
"""Sums may be reordered for SIMD; NaN and infinity keep their meaning."""


@kernel("f8(f8[::1], i8, f8[::1], i8, i8)", cache=True, nogil=True, fastmath=SUM_FLAGS)
def dot(x: Array, at_x: int, w: Array, at_w: int, n: int) -> float:
    """Return the inner product of `n` entries: x float64 from `at_x`, w float64 from `at_w`.

    The slices are views: with at + k as an index each access is tested for a negative one, which keeps the loop out
    of SIMD registers (9 times slower at 200 entries).
    """
    total = 0.0
    one, two = x[at_x : at_x + n], w[at_w : at_w + n]
    for k in range(n):
        total += one[k] * two[k]
    return total


@kernel("void(f8[::1], i8, f8[::1], i8, i8, i8, i8)", cache=True, nogil=True, fastmath={"contract"},
        error_model="numpy")
def features(floats: Array, at: int, state: Array, inputs: int, out: int, h: int, p: int) -> None:
    """Write h random features and their p inputs, then 1, at state[out].

    A feature is a / sqrt(1 + a^2), a = offset + direction . inputs.

    floats : float64[:], directions[p * h] from `at`, then offsets[h]
    state : float64[:], inputs (scaled) from `inputs`

    Notes
    -----
    The sigmoid needs no exponential, so it runs in SIMD registers and is the same on every machine; on the two
    simulated processes it forecasts as well as tanh.
    """
    sums, past = state[out : out + h], state[inputs : inputs + p]
    for k in range(h):
        sums[k] = floats[at + p * h + k]
    for q in range(p):
        x = past[q]
        row = floats[at + q * h : at + q * h + h]
        for k in range(h):
            sums[k] += x * row[k]
    for k in range(h):
        sums[k] = sums[k] / math.sqrt(1.0 + sums[k] * sums[k])
    for q in range(p):
        state[out + h + q] = past[q]
    state[out + h + p] = 1.0


@kernel("i8(i8[::1])", cache=True, nogil=True)
def ring_at(ints: Array) -> int:
    """Return where the ring of scaled values begins in the state; ints int64[:], packed."""
    return STATE_HEADER + ints[4] + 1 + 2 * ints[0]


@kernel("void(f8[::1], u1[::1], i8, i8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def push_row(values: Array, valid: Array, at: int, ints: Array, floats: Array, state: Array) -> None:
    """Take one row into the ring, scaled; a value that is not valid or not finite holds its last input for now.

    values : float64[:], engineering units, valid : uint8[:]; the row starts at `at`; the rest is packed as the
    module's docstring says.
    """
    d, memory = ints[0], ints[4]
    length = memory + 1
    rows_at = STATE_HEADER
    away_at = rows_at + length
    guess_at = away_at + d
    ring = guess_at + d
    marks = ring + 2 * length * d
    last = int(state[0])
    slot = last + 1
    if slot == length:
        slot = 0
    state[0] = slot
    if state[1] <= memory:  # the count stays where it is enough
        state[1] += 1.0
    here, again = ring + slot * d, ring + (slot + length) * d
    if state[rows_at + slot] > 0.0:
        for c in range(d):
            state[marks + slot * d + c] = 0.0
            state[marks + (slot + length) * d + c] = 0.0
        state[2] -= state[rows_at + slot]
        state[rows_at + slot] = 0.0
    for c in range(d):
        x = values[at + ints[HEADER + c]]
        if valid[at + ints[HEADER + c]] != 0 and math.isfinite(x):
            z = min(max((x - floats[c]) * floats[d + c], -LARGEST), LARGEST)
            state[away_at + c] = 0.0
        else:
            z = state[ring + last * d + c] if state[1] > 1.0 else 0.0
            state[away_at + c] += 1.0
            state[marks + slot * d + c] = 1.0
            state[marks + (slot + length) * d + c] = 1.0
            state[rows_at + slot] += 1.0
        if state[away_at + c] > HOLD_ROWS:
            state[4] += state[guess_at + c] == 0.0
            state[guess_at + c] = length
        elif state[guess_at + c] > 0.0:
            state[guess_at + c] -= 1.0
            state[4] -= state[guess_at + c] == 0.0
        state[here + c] = z
        state[again + c] = z
    state[2] += state[rows_at + slot]


@kernel("i8(i8, i8[::1], f8[::1])", cache=True, nogil=True)
def inputs_of(c: int, ints: Array, state: Array) -> int:
    """Return where the inputs of column c lie in the state: rows t - lags ... t of the columns it sees.

    Where it sees all columns they lie in the ring; else they are gathered.
    """
    d, m, lags, length = ints[0], ints[2], ints[3], ints[4] + 1
    ring = ring_at(ints)
    oldest = ring + (int(state[0]) + length - lags) * d
    if m == d:
        return oldest
    out = ring + 4 * length * d
    seen = HEADER + d + c * m
    columns = ints[seen : seen + m]
    for lag in range(lags + 1):
        row = state[oldest + lag * d : oldest + lag * d + d]
        inputs = state[out + lag * m : out + lag * m + m]
        for k in range(m):
            inputs[k] = row[columns[k]]
    return out


@kernel("b1(i8, i8, i8[::1], f8[::1])", cache=True, nogil=True)
def known(c: int, kind: int, ints: Array, state: Array) -> bool:
    """Say whether column c, valid now, can be judged; kind 0 = forecast, 1 = relation.

    At least half of its inputs must be valid, and its own past must hold no guess. A corrected forecast, which can be
    a thousand times as sharp as a guess, needs inputs without any, and a valid past of its own.
    """
    if state[2] == 0.0 and state[4] == 0.0:
        return True
    d, inert, m, lags, length = ints[0], ints[1], ints[2], ints[3], ints[4] + 1
    slot = int(state[0])
    if state[STATE_HEADER + length + d + c] > length - 1 - lags:
        return False
    newest = ring_at(ints) + (3 * length + slot) * d  # in the marks
    behind = lags
    if kind == 0 and ints[HEADER + 2 * d + d * m + c - inert] >= 0:
        if state[4] > 0.0:
            return False
        behind = (ints[6] - inert) // d
        for lag in range(1, behind + 1):
            if state[newest - lag * d + c] > 0.0:
                return False
    if 2.0 * state[2] <= lags * m:  # all that is invalid in the memory would leave half
        return True
    seen = HEADER + d + c * m
    bad, total = 0.0, behind * m
    if m == d:
        for lag in range(1, behind + 1):
            bad += state[STATE_HEADER + (slot - lag if slot >= lag else slot - lag + length)]
        if kind == 1:
            bad += state[STATE_HEADER + slot]
            total += d - 1
        else:
            for k in range(inert):
                bad += state[newest + k]
            total += inert
        return 2.0 * bad <= total
    for k in range(m):
        other = ints[seen + k]
        for lag in range(1, behind + 1):
            bad += state[newest - lag * d + other]
        if other < inert or (kind == 1 and other != c):
            bad += state[newest + other]
            total += 1
    return 2.0 * bad <= total


@kernel("f8(i8, i8, i8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def relation_of(c: int, x: int, ints: Array, floats: Array, state: Array) -> float:
    """Return value less reconstruction of column c (scaled) at the newest row; its inputs lie at state[x]."""
    d, n = ints[0], (ints[3] + 1) * ints[2]
    at = 4 * d + (d - ints[1]) * ints[7] + c * n
    return dot(state, x, floats, at, n)


@kernel("b1(i8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def make_features(ints: Array, floats: Array, state: Array) -> bool:
    """Write the features of the newest row; False where no column uses them, or the past is too short."""
    d, inert, m, lags, h, p, f = ints[0], ints[1], ints[2], ints[3], ints[5], ints[6], ints[7]
    behind = (p - inert) // d
    if h == 0 or state[1] <= behind:
        return False
    length = ints[4] + 1
    ring = ring_at(ints)
    directions = 4 * d + (d - inert) * f + d * (lags + 1) * m
    first = ring + (int(state[0]) + length - behind) * d
    features(floats, directions, state, first, ring + 4 * length * d + (lags + 1) * m, h, p)
    return True


@kernel("f8(i8, i8, b1, i8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def forecast_of(c: int, x: int, wide: bool, ints: Array, floats: Array, state: Array) -> float:
    """Return the forecast (scaled) of the judged column c for the newest row; its inputs lie at state[x].

    wide : whether the features are there; a column that needs them gets NaN where they are not
    """
    d, inert, m, lags, h, p, f = ints[0], ints[1], ints[2], ints[3], ints[5], ints[6], ints[7]
    i = c - inert
    held_at = HEADER + d + d * m
    row = ints[held_at + d + i]
    if row < 0:
        return dot(state, x, floats, 4 * d + i * f, lags * m + ints[held_at + c])
    if not wide:
        return np.nan
    at = 4 * d + (d - inert) * f + d * (lags + 1) * m + (p + 1) * h + row * (h + p + 1)
    features_at = ring_at(ints) + 4 * (ints[4] + 1) * d + (lags + 1) * m
    return dot(state, features_at, floats, at, h + p + 1)


@kernel("void(b1, i8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def fill_in(wide: bool, ints: Array, floats: Array, state: Array) -> None:
    """Put an estimate in place of each value of the newest row that is not valid (see the module's docstring)."""
    d, inert, lags, length = ints[0], ints[1], ints[3], ints[4] + 1
    slot = int(state[0])
    if state[STATE_HEADER + slot] == 0.0 or state[1] <= lags:
        return
    ring = ring_at(ints)
    marks = ring + 2 * length * d + slot * d
    away_at = STATE_HEADER + length
    here = ring + slot * d
    for late in range(2):  # forecasts first: relations use them
        for c in range(d):
            if state[marks + c] == 0.0 or (state[away_at + c] > HOLD_ROWS) != (late == 1):
                continue
            z = state[here + c]
            if late == 1:
                z -= relation_of(c, inputs_of(c, ints, state), ints, floats, state)
            elif c >= inert:
                ahead = forecast_of(c, inputs_of(c, ints, state), wide, ints, floats, state)
                z = ahead if math.isfinite(ahead) else z
            z = min(max(z, floats[2 * d + c]), floats[3 * d + c])
            state[here + c] = z
            state[here + length * d + c] = z


@kernel("void(i8[::1], f8[::1])", cache=True, nogil=True)
def forget(ints: Array, state: Array) -> None:
    """Empty the memory, as at the start and after a gap; ints int64[:], state float64[:], packed."""
    length = ints[4] + 1
    state[0] = -1.0
    state[1] = 0.0
    state[2] = 0.0
    state[4] = 0.0
    for k in range(STATE_HEADER, ring_at(ints) + 4 * length * ints[0]):
        state[k] = 0.0


@kernel("void(f8[::1], u1[::1], u1[::1], i8[::1], f8[::1], f8[::1], f8[::1])", cache=True, nogil=True)
def score_rows(
    values: Array, valid: Array, gap: Array, ints: Array, floats: Array, state: Array, out: Array,
) -> None:
    """Score rows one after the other, carrying the memory on from the last call.

    Parameters
    ----------
    values : float64[n * width of a row], engineering units
    valid : uint8[same]; 0 = do not use
    gap : uint8[n]; 1 = this row does not continue the row before
    ints, floats : the packed model (see the module's docstring)
    state : float64[:], changed in place
    out : float64[n * 2 j], healthy standard deviations, written: forecast residuals of the judged columns, then
        their relation residuals, absolute unless state[SIGNED] is 1 (then value less expectation); NaN while
        warming up, where the column is not valid, or where more than half of its inputs are not

    Notes
    -----
    Source: section 8 of the design, F and R.
    """
    n = gap.size
    if n == 0:
        return
    width = values.size // n
    d, inert, lags, length = ints[0], ints[1], ints[3], ints[4] + 1
    judged = d - inert
    ring = ring_at(ints)
    for r in range(n):
        if gap[r] != 0:
            forget(ints, state)
        push_row(values, valid, r * width, ints, floats, state)
        wide = make_features(ints, floats, state)
        fill_in(wide, ints, floats, state)
        slot = int(state[0])
        at = r * 2 * judged
        for i in range(judged):
            c = inert + i
            ahead = aside = np.nan
            if state[1] > lags and state[ring + (2 * length + slot) * d + c] == 0.0:
                x = inputs_of(c, ints, state)
                if known(c, 0, ints, state):
                    ahead = state[ring + slot * d + c] - forecast_of(c, x, wide, ints, floats, state)
                if known(c, 1, ints, state):
                    aside = relation_of(c, x, ints, floats, state)
            if state[SIGNED] == 0.0:
                ahead, aside = abs(ahead), abs(aside)
            out[at + i] = ahead
            out[at + judged + i] = aside


@kernel("void(f8[::1], u1[::1], u1[::1], i8[::1], f8[::1], f8[::1], i8, f8[::1])", cache=True, nogil=True)
def follow_rows(
    values: Array, valid: Array, gap: Array, ints: Array, floats: Array, state: Array, column: int, out: Array,
) -> None:
    """Write float64[n]: the values (scaled) of one column as the others say it should be.

    Its own past is the reconstruction too, so that a fault in it leaves no trace; the first `lags` rows after a gap
    are as observed and give NaN, and so do rows where more than half of the inputs are not valid. The rest is as in
    `score_rows`.
    """
    n = gap.size
    if n == 0:
        return
    width = values.size // n
    d, lags, length = ints[0], ints[3], ints[4] + 1
    for r in range(n):
        if gap[r] != 0:
            forget(ints, state)
        push_row(values, valid, r * width, ints, floats, state)
        fill_in(make_features(ints, floats, state), ints, floats, state)
        slot = int(state[0])
        out[r] = np.nan
        if state[1] > lags:
            here = ring_at(ints) + slot * d + column
            z = state[here] - relation_of(column, inputs_of(column, ints, state), ints, floats, state)
            z = min(max(z, -LARGEST), LARGEST)
            state[here] = z
            state[here + length * d] = z
            if known(column, 1, ints, state):
                out[r] = z
