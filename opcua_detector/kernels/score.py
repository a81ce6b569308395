"""Kernel of the score: residual -> energy or surprise -> window means -> views -> one score, one call per row.

What a call needs is packed, since each array argument costs about 80 ns (`calibration.Scorer`):

    ints    int64    HEADER numbers (see below), then transform[C], slot[C], kind[C], windows[W], term_first[T],
                     term_last[T], term_window[T], view_first[V + 1], view_role[V], view_log[V], tag[C], members[...]
    tables  float64  [n_states, ...]: scale[C], usual[C], weight[T], offset[V], limit[V], top[V], then per slot
                     knee, slope, used, grid[K], level[K + 1]
    ring    float64  [length * C]: energies of the last rows, row after row
    raw     float64  [report * C]: residuals of the last rows
    memory  float64  sums[W * C], counts[W * C], fresh[W * C], raw_sum[C], raw_count[C], raw_fresh[C], energy[C],
                     seen[C], stat[T], value[V], then what is told of a row: mean[C], share[G]; excess[C]
    cursor  int64    place in ring, place in raw, rows since the reset

C channels, G tags, W windows, T terms, V views, K entries of a grid. A term is the mean over its channels and one
window; a view is a weighted sum of its terms (of squares: of their logarithms; a surprise is one already), in units of
its own healthy spread, so that 0 is its healthy median.

Divisions follow the rules of floating point (error_model): a kernel that cannot raise is a quarter faster, and the loop
must not raise.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]

# Layout of `out`.
SCORE, LEAD, SLOW, TRANS, BOUND, CONF = range(6)
OUT: Final = 6
HEADER: Final = 9  # C, W, T, V, slots, K, rows of ring, rows of raw, G
SURPRISE, SQUARE, PLAIN = 0, 1, 2  # transforms of a residual
LEADING, BESIDE, FIXED, LAMP = 0, 1, 2, 3  # roles of a view; a lamp is shown and does not alarm
SURPRISE_CAP: Final = 30.0
ENERGY_CAP: Final = 1000.0
LEAST: Final = 0.01  # added to a mean before the logarithm, so that a flat residual has one
SQUARINGS: Final = 3
SHARPNESS: Final = 2.0**SQUARINGS
"""A view beside the leading ones counts below its limit by this power only, so that it alarms but does not rank."""
NAMED_FROM: Final = 0.5
"""From this score on tags are named."""


@kernel("float64(float64, float64[::1], int64, int64, int64, float64, float64)", cache=True, nogil=True,
      error_model="numpy")
def surprise(x, table, at, n, k, knee, slope):
    """Return -ln p of a residual by the held-out residuals, at most `SURPRISE_CAP`.

    table[at:at + k] increasing grid, table[at + k:at + 2 k + 1] level: surprise where x lies in
    (grid[i-1], grid[i]]; n: entries in use; knee: residual from which the tail takes over (inf: none); slope: its
    mean log excess. `detector.md` 3.2: p = (n - #{held-out < x} + 1) / (n + 1), above the knee
    s = -ln p(knee) + ln(x / knee) / slope.
    """
    if x > knee:
        value = table[at + k + n] + math.log(x / knee) / slope
    else:
        lo, hi = 0, n
        while lo < hi:
            mid = (lo + hi) // 2
            if table[at + mid] < x:
                lo = mid + 1
            else:
                hi = mid
        value = table[at + k + lo]
    return min(value, SURPRISE_CAP)


@kernel("float64(float64)", cache=True, nogil=True, error_model="numpy")
def _sharp(x):
    """Return x to the power of `SHARPNESS`; `**` takes three times as long."""
    for _ in range(SQUARINGS):
        x *= x
    return x


@kernel("float64(float64)", cache=True, nogil=True, error_model="numpy")
def _blunt(x):
    """Return the inverse of `_sharp`."""
    for _ in range(SQUARINGS):
        x = math.sqrt(x)
    return x


@kernel("float64(float64)", cache=True, nogil=True, error_model="numpy")
def soft(x):
    """Return ln(1 + exp(x)): positive, increasing, x itself where x is large."""
    return x if x > 30.0 else math.log1p(math.exp(x))


@kernel("void(float64[::1], int64, int64[::1], float64[:, ::1], float64[::1])", cache=True, nogil=True,
      error_model="numpy")
def transform(residual, state, ints, tables, energy):
    """Write float64[C]: square in healthy units, surprise or the plain residual of each channel; NaN = no verdict."""
    n, k = ints[0], ints[5]
    slots_at = 2 * n + ints[2] + 3 * ints[3]
    for c in range(n):
        r = residual[c]
        if state < 0 or math.isnan(r):
            energy[c] = np.nan
            continue
        how = ints[HEADER + c]
        if how == SQUARE:
            x = r / tables[state, c]
            energy[c] = min(x * x, ENERGY_CAP)
        elif how == PLAIN:
            energy[c] = min(r, ENERGY_CAP)
        else:
            at = slots_at + ints[HEADER + n + c] * (2 * k + 4)
            energy[c] = surprise(r, tables[state], at + 3, int(tables[state, at + 2]), k, tables[state, at],
                                 tables[state, at + 1])


@kernel("void(int64[::1], int64[::1])", cache=True, nogil=True, error_model="numpy")
def forget(ints, cursor):
    """Empty the windows (after a gap); the next row fills them with the healthy mean."""
    cursor[:] = 0


@kernel("void(int64, int64[::1], float64[:, ::1], float64[::1], float64[::1], float64[::1])", cache=True, nogil=True,
      error_model="numpy")
def _fill(state, ints, tables, ring, raw, memory):
    """Fill the windows with the healthy mean of the state, so that a score stands from the first residual on."""
    n, n_windows = ints[0], ints[1]
    wc = n_windows * n
    windows_at = HEADER + 3 * n
    for p in range(ints[6]):
        for c in range(n):
            ring[p * n + c] = tables[state, n + c]
    raw[:] = np.nan
    memory[3 * wc:3 * wc + 5 * n] = 0.0
    for w in range(n_windows):
        rows = float(ints[windows_at + w])
        for c in range(n):
            memory[w * n + c] = rows * tables[state, n + c]
            memory[wc + w * n + c] = rows
            memory[2 * wc + w * n + c] = 0.0


@kernel("void(float64[::1], int64[::1], float64[::1], float64[::1], float64[::1], int64[::1])", cache=True, nogil=True,
      error_model="numpy")
def _push(residual, ints, ring, raw, memory, cursor):
    """Take energies and residuals of one row into the window sums."""
    n, n_windows, length, report = ints[0], ints[1], ints[6], ints[7]
    wc = n_windows * n
    windows_at = HEADER + 3 * n
    energy_at = 3 * wc + 3 * n
    pos = cursor[0]
    rows = cursor[2] + 1
    for w in range(n_windows):
        size = ints[windows_at + w]
        leaving = (pos - size if pos >= size else pos - size + length) * n
        for c in range(n):
            old = ring[leaving + c]
            new = memory[energy_at + c]
            gone = old if old == old else 0.0
            came = new if new == new else 0.0
            memory[w * n + c] += came - gone
            memory[wc + w * n + c] += (1.0 if new == new else 0.0) - (1.0 if old == old else 0.0)
            memory[2 * wc + w * n + c] += came
        if rows % size == 0:  # the sum begun a window ago replaces the running one: rounding never adds up
            for c in range(n):
                memory[w * n + c] = memory[2 * wc + w * n + c]
                memory[2 * wc + w * n + c] = 0.0
    at = pos * n
    for c in range(n):
        ring[at + c] = memory[energy_at + c]
    sum_at = 3 * wc
    leaving = cursor[1] * n
    for c in range(n):
        old, new = raw[leaving + c], residual[c]
        gone = old if old == old else 0.0
        came = new if new == new else 0.0
        memory[sum_at + c] += came - gone
        memory[sum_at + n + c] += (1.0 if new == new else 0.0) - (1.0 if old == old else 0.0)
        memory[sum_at + 2 * n + c] += came
        raw[leaving + c] = new
    if rows % report == 0:
        for c in range(n):
            memory[sum_at + c] = memory[sum_at + 2 * n + c]
            memory[sum_at + 2 * n + c] = 0.0
    cursor[0] = pos + 1 if pos + 1 < length else 0
    cursor[1] = cursor[1] + 1 if cursor[1] + 1 < report else 0
    cursor[2] = rows


@kernel("void(int64, int64[::1], float64[:, ::1], float64[::1], float64[::1])", cache=True, nogil=True,
      error_model="numpy")
def _judge(state, ints, tables, memory, out):
    """Form terms, views and the score from the sums; half of what a term can hold must be there, the rest is usual."""
    n, n_windows, n_terms, n_views = ints[0], ints[1], ints[2], ints[3]
    wc = n_windows * n
    windows_at = HEADER + 3 * n
    first_at = windows_at + n_windows
    members_at = first_at + 3 * n_terms + 3 * n_views + 1 + n
    views_at = first_at + 3 * n_terms
    stat_at = 3 * wc + 5 * n
    weight_at = 2 * n
    best, bar, lead, slow = -1.0, -1.0, -1, -1.0  # bar: score that a view beside needs to lead
    for v in range(n_views):
        role = ints[views_at + n_views + 1 + v]
        in_logs = ints[views_at + 2 * n_views + 1 + v] != 0
        value, product = 0.0, 1.0
        for t in range(ints[views_at + v], ints[views_at + v + 1]):
            w = ints[first_at + 2 * n_terms + t]
            total, count, usual = 0.0, 0.0, 0.0
            size = float(ints[windows_at + w])
            first, last = ints[first_at + t], ints[first_at + n_terms + t]
            for m in range(first, last):
                c = ints[members_at + m]
                known = memory[wc + w * n + c]
                total += memory[w * n + c]
                count += known
                usual += (size - known) * tables[max(state, 0), n + c]
            enough = count * 2.0 >= (last - first) * size and count > 0.0
            if enough and role != FIXED:  # what is missing counts as usual: a mean over less would vary more
                total += usual
                count = (last - first) * size
            stat = max(total, 0.0) / count if enough else np.nan
            memory[stat_at + t] = stat
            if state < 0 or not enough:
                value = np.nan
            elif role == FIXED:
                value += stat
            elif in_logs:
                product *= stat + LEAST
            else:
                value += tables[state, weight_at + t] * stat
        score = np.nan
        if not math.isnan(value):
            if role == FIXED:
                score = value
            else:
                if in_logs:  # the terms of a view weigh the same: one logarithm does for all
                    value += tables[state, weight_at + ints[views_at + v]] * math.log(product)
                value -= tables[state, weight_at + n_terms + v]
                top = tables[state, weight_at + n_terms + 2 * n_views + v]
                if role == BESIDE and max(value, 0.0) + 0.7 <= bar * top:  # soft(x) <= max(x, 0) + ln 2
                    memory[stat_at + n_terms + v] = value
                    continue
                score = soft(value) / top
            counted = _sharp(score) if role == BESIDE and score < 1.0 else score
            if role == LAMP:
                slow = score
            elif counted > best:
                best, lead = counted, v
                bar = best if best >= 1.0 else _blunt(best)
        memory[stat_at + n_terms + v] = value
    out[0] = best if best >= 0.0 else np.nan
    out[1] = lead
    out[2] = slow if slow >= 0.0 else np.nan
    for k in range(3):
        acc, known = 0.0, 0.0
        for c in range(n):
            if ints[HEADER + 2 * n + c] == k:
                acc += memory[3 * wc + c]
                known += memory[3 * wc + n + c]
        out[3 + k] = max(acc, 0.0) / known if known > 0.0 else np.nan


@kernel(
    "void(float64[::1], int64, int64[::1], float64[:, ::1], float64[::1], float64[::1], float64[::1], int64[::1],"
    " float64[::1])",
    cache=True, nogil=True, error_model="numpy",
)
def _score(residual, state, ints, tables, ring, raw, memory, cursor, out):
    """Take one row of residuals float64[C] (NaN = no verdict) and write `out` float64[6] (constants above).

    state: which calibration, -1 = not learnt (no score); the rest as in the module's docstring. A leading view counts
    as soft(v) / soft(limit); one beside it by the same, to the power of `SHARPNESS` below its limit; a fixed one by
    its plain mean. score = the largest, 1.0 = limit.
    """
    n = ints[0]
    energy = memory[3 * ints[1] * n + 3 * n:3 * ints[1] * n + 4 * n]
    if cursor[2] == 0:
        _fill(max(state, 0), ints, tables, ring, raw, memory)
    transform(residual, state, ints, tables, energy)
    seen_at = 3 * ints[1] * n + 4 * n
    warm, learnt = False, False  # a plain residual stands from the first row on; it alone is no verdict beside others
    for c in range(n):
        plain = ints[HEADER + c] == PLAIN
        if not math.isnan(energy[c]):
            memory[seen_at + c] = 1.0
        elif memory[seen_at + c] == 0.0:  # still warming up: its windows stay at the healthy mean
            energy[c] = tables[max(state, 0), n + c]
        learnt = learnt or not plain
        warm = warm or (memory[seen_at + c] != 0.0 and not plain)
    if not learnt:
        warm = True
    _push(residual, ints, ring, raw, memory, cursor)
    _judge(state, ints, tables, memory, out)
    if not warm:
        out[0] = np.nan
        out[1] = -1.0
        out[2] = np.nan


@kernel("void(int64, int64[::1], float64[:, ::1], float64[::1], float64[::1])", cache=True, nogil=True,
      error_model="numpy")
def _tell(state, ints, tables, memory, out):
    """Write what is told of a row beside its score: mean residual of each channel, share of each tag.

    mean float64[C]: over the last rows, NaN where nothing is known. share float64[G], sums to 1; all 0 while the score
    is below `NAMED_FROM`: by the excess of the leading view's channels over their healthy level, over its windows.
    Energy is capped, so it is weighted by the plain residual in healthy units: among channels that are all off the
    scale the one that is furthest off leads.
    """
    n, n_windows, n_terms, n_views, n_tags = ints[0], ints[1], ints[2], ints[3], ints[8]
    wc = n_windows * n
    sum_at = 3 * wc
    mean_at = 3 * wc + 5 * n + n_terms + n_views
    share_at = mean_at + n
    excess_at = share_at + n_tags
    for c in range(n):
        known = memory[sum_at + n + c]
        memory[mean_at + c] = memory[sum_at + c] / known if known > 0.0 else np.nan
    for g in range(n_tags):
        memory[share_at + g] = 0.0
    lead = int(out[1])
    if lead < 0 or state < 0 or not out[0] >= NAMED_FROM:
        return
    for c in range(n):
        memory[excess_at + c] = 0.0
    first_at = HEADER + 3 * n + n_windows
    views_at = first_at + 3 * n_terms
    tag_at = views_at + 3 * n_views + 1
    members_at = tag_at + n
    for t in range(ints[views_at + lead], ints[views_at + lead + 1]):
        w = ints[first_at + 2 * n_terms + t]
        for m in range(ints[first_at + t], ints[first_at + n_terms + t]):
            c = ints[members_at + m]
            mean = memory[w * n + c] / max(memory[wc + w * n + c], 1.0)
            memory[excess_at + c] += max(mean - tables[state, n + c], 0.0)
    total = 0.0
    for c in range(n):
        if memory[excess_at + c] > 0.0:
            residual = max(memory[sum_at + c], 0.0) / max(memory[sum_at + n + c], 1.0)
            part = memory[excess_at + c] * (1.0 + residual / tables[state, c])
            memory[share_at + ints[tag_at + c]] += part
            total += part
    if total > 0.0:
        for g in range(n_tags):
            memory[share_at + g] /= total


@kernel(
    "void(float64[::1], int64, int64[::1], float64[:, ::1], float64[::1], float64[::1], float64[::1], int64[::1],"
    " float64[::1])",
    cache=True, nogil=True, error_model="numpy",
)
def score_step(residual, state, ints, tables, ring, raw, memory, cursor, out):
    """Take one row as `score_rows` does, and tell of it: mean residuals and the tags to blame (see `_tell`)."""
    _score(residual, state, ints, tables, ring, raw, memory, cursor, out)
    _tell(state, ints, tables, memory, out)


@njit(
    "void(float64[:, ::1], uint8[::1], int64[::1], int64[::1], float64[:, ::1], float64[::1], float64[::1],"
    " float64[::1], int64[::1], float64[::1], float64[:, ::1], float64[:, ::1], float64[:, ::1])",
    cache=True, nogil=True, error_model="numpy",
)
def score_rows(residual, gap, state, ints, tables, ring, raw, memory, cursor, out, outs, stats, values):
    """Score a record row by row: float64[n, C] -> outs [n, 6], stats [n, T], values [n, V].

    stats and values may have no rows, where they are not wanted.
    """
    n = ints[0]
    stat_at = 3 * ints[1] * n + 5 * n
    for t in range(residual.shape[0]):
        if gap[t] != 0:
            forget(ints, cursor)
        _score(residual[t], state[t], ints, tables, ring, raw, memory, cursor, out)
        outs[t] = out
        if stats.shape[0] > 0:
            stats[t] = memory[stat_at:stat_at + ints[2]]
        if values.shape[0] > 0:
            values[t] = memory[stat_at + ints[2]:stat_at + ints[2] + ints[3]]


@kernel("void(float64[:, ::1], int64[::1], int64[::1], float64[:, ::1], float64[:, ::1])", cache=True, nogil=True,
      error_model="numpy")
def transform_rows(residual, state, ints, tables, energy):
    """Run `transform` over a record: float64[n, C], int64[n] -> energy float64[n, C]."""
    for t in range(residual.shape[0]):
        transform(residual[t], state[t], ints, tables, energy[t])
