"""Kernels of calibration: residual -> surprise -> window means -> fused score, one call per row."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# Layout of `out` in `score_step`.
SCORE, LEAD_GROUP, LEAD_WINDOW, TRANS, BOUND, CONF = range(6)
SURPRISE_CAP = 12.0


@njit("float64(float64, float64[::1], float64[::1], int64, float64, float64)", cache=True)
def surprise(x, grid, level, n, knee, slope):
    """Return -ln p of a residual by the held-out residuals, at most 12.

    grid float64[k] increasing, level float64[k]: surprise where x lies in (grid[i-1], grid[i]]; n: entries in use;
    knee: residual from which the tail takes over (inf: none); slope: its mean log excess. `detector.md` 3.2:
    p = (n - #{held-out < x} + 1) / (n + 1), above the knee s = -ln p(knee) + ln(x / knee) / slope.
    """
    if x > knee:
        value = level[n] + math.log(x / knee) / slope
    else:
        lo, hi = 0, n
        while lo < hi:
            mid = (lo + hi) // 2
            if grid[mid] < x:
                lo = mid + 1
            else:
                hi = mid
        value = level[lo]
    return min(value, SURPRISE_CAP)


@njit("float64(float64[::1], float64[::1], float64[::1], int64, float64, float64)", cache=True)
def mean_surprise(x, grid, level, n, knee, slope):
    """Return the mean surprise of residuals float64[m], NaN left out; 0 where nothing is left (see `surprise`)."""
    acc = 0.0
    count = 0.0
    for t in range(x.shape[0]):
        if not math.isnan(x[t]):
            acc += surprise(x[t], grid, level, n, knee, slope)
            count += 1.0
    return acc / max(count, 1.0)


@njit("void(float64[:, :, ::1], float64[:, :, :, ::1], int64[::1])", cache=True)
def forget(ring, sums, cursor):
    """Empty the windows after a gap: ring, sums, cursor as in `score_step`."""
    ring[:] = np.nan
    sums[:] = 0.0
    cursor[:] = 0


@njit(
    "void(int64, int64[::1], int64[::1], int64[::1], float64[:, :, :, ::1], float64[:, ::1], float64[:, :, ::1],"
    " float64[::1])",
    cache=True,
)
def _fuse(state, group, kind, windows, sums, stat, limit, out):
    """Form group means, the score and the paper's three windowed residuals (eq. 22-25) from the sums.

    Arguments as in `score_step`; writes stat and out.
    """
    n_channels = group.shape[0]
    best = -1.0
    out[1] = -1.0
    out[2] = -1.0
    n_groups = stat.shape[0]
    for w in range(windows.shape[0]):
        total = np.zeros(n_groups)
        count = np.zeros(n_groups)
        possible = np.zeros(n_groups)
        for c in range(n_channels):
            total[group[c]] += sums[c, w, 0, 0]
            count[group[c]] += sums[c, w, 0, 1]
            possible[group[c]] += windows[w]
        for g in range(n_groups):
            # Half of what the window can hold must be there; a tag masked for long leaves the others to judge.
            enough = count[g] * 2.0 >= possible[g] and count[g] > 0.0
            stat[g, w] = max(total[g], 0.0) / count[g] if enough else np.nan
            if state >= 0 and not math.isnan(stat[g, w]):
                ratio = stat[g, w] / limit[state, g, w]
                if ratio > best:
                    best = ratio
                    out[1] = g
                    out[2] = w
    out[0] = best if best >= 0.0 else np.nan
    for k in range(3):
        acc = 0.0
        known = 0.0
        for c in range(n_channels):
            if kind[c] == k:
                acc += sums[c, 0, 1, 0]
                known += sums[c, 0, 1, 1]
        out[3 + k] = max(acc, 0.0) / known if known > 0.0 else np.nan


@njit(
    "void(float64[::1], int64, float64[:, :, ::1], float64[:, :, ::1], int64[:, ::1], float64[:, :, ::1],"
    " int64[::1], int64[::1], int64[::1], float64[:, :, ::1], float64[:, :, :, ::1], float64[:, ::1],"
    " float64[:, :, ::1], int64[::1], float64[::1])",
    cache=True,
)
def score_step(residual, state, grid, level, used, tail, group, kind, windows, ring, sums, stat, limit, cursor, out):
    """Take one row of residuals and write the fused score.

    residual float64[n_channels], NaN = no verdict; state: which calibration, -1 = not learnt (no score);
    grid, level float64[n_states, n_channels, k (+1)], used int64[n_states, n_channels]: see `surprise`;
    tail float64[n_states, n_channels, 2]: knee, slope; group int64[n_channels]: fusion group;
    kind int64[n_channels]: 0 trans, 1 bound, 2 conf, else other; windows int64[n_windows] rows;
    ring float64[2, n_channels, length]: surprise and residual of the last rows, length >= longest window;
    sums float64[n_channels, n_windows, 2, 3]: of surprise and residual; [.., 0] sum, [.., 1] count, [.., 2] sum
    since the last whole window;
    stat float64[n_groups, n_windows]: mean surprise; limit float64[n_states, n_groups, n_windows];
    cursor int64[2]: ring position, rows since the reset; out float64[6]: see the constants above.
    score = max over groups and windows of stat / limit, 1.0 = limit.
    """
    n_channels = residual.shape[0]
    length = ring.shape[2]
    pos = cursor[0]
    for c in range(n_channels):
        r = residual[c]
        s = np.nan
        if state >= 0 and not math.isnan(r):
            s = surprise(r, grid[state, c], level[state, c], used[state, c], tail[state, c, 0], tail[state, c, 1])
        for w in range(windows.shape[0]):
            leaving = (pos - windows[w]) % length
            whole = (cursor[1] + 1) % windows[w] == 0
            for q in range(2):
                old = ring[q, c, leaving]
                new = s if q == 0 else r
                if not math.isnan(old):
                    sums[c, w, q, 0] -= old
                    sums[c, w, q, 1] -= 1.0
                if not math.isnan(new):
                    sums[c, w, q, 0] += new
                    sums[c, w, q, 1] += 1.0
                    sums[c, w, q, 2] += new
                if whole:  # the sum begun a window ago replaces the running one: rounding never adds up
                    sums[c, w, q, 0] = sums[c, w, q, 2]
                    sums[c, w, q, 2] = 0.0
        ring[0, c, pos] = s
        ring[1, c, pos] = r
    cursor[0] = (pos + 1) % length
    cursor[1] += 1
    _fuse(state, group, kind, windows, sums, stat, limit, out)


@njit(
    "void(float64[:, ::1], uint8[::1], int64[::1], float64[:, :, ::1], float64[:, :, ::1], int64[:, ::1],"
    " float64[:, :, ::1], int64[::1], int64[::1], int64[::1], float64[:, :, ::1], float64[:, :, :, ::1],"
    " float64[:, ::1], float64[:, :, ::1], int64[::1], float64[::1], float64[:, :, ::1], float64[:, ::1])",
    cache=True,
)
def score_rows(residual, gap, state, grid, level, used, tail, group, kind, windows, ring, sums, stat, limit, cursor,
               out, stats, outs):
    """Run `score_step` over a record: float64[n, n_channels] -> stats float64[n, n_groups, n_windows], outs [n, 6]."""
    for t in range(residual.shape[0]):
        if gap[t] != 0:
            forget(ring, sums, cursor)
        score_step(residual[t], state[t], grid, level, used, tail, group, kind, windows, ring, sums, stat, limit,
                   cursor, out)
        stats[t] = stat
        outs[t] = out
