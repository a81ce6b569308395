"""Slow, plain twins of `kernels.columns` and `kernels.score`: one line per formula, windows looked up anew each row.

A twin has the name of its kernel. It takes whole records and looks back into them, so it needs no memory of its
own: no ring, no running sums, nothing to forget but where the last gap was.
"""

from __future__ import annotations

import math

import numpy as np

SAME, DIFFERENCE, SINE, COSINE = 0, 1, 2, 3
CAP = 12.0


# -- columns ----------------------------------------------------------------------------------------------------


def prepare(now, now_ok, before, before_ok, gap, op, scale):
    """One column of one row: (value, valid); `before` is the value of the same tag one row earlier."""
    ok = bool(now_ok) and math.isfinite(now)
    if op == SAME:
        return now, ok
    if op == DIFFERENCE:
        good = ok and not gap and bool(before_ok) and math.isfinite(before) and now - before >= 0.0
        return (now - before if good else math.nan), good
    if not math.isfinite(now):
        return math.nan, ok
    return (math.sin if op == SINE else math.cos)(now * scale), ok


def prepare_rows(values, valid, gap, index, op, scale):
    """All columns of a record: (float64[n, n_columns], uint8[n, n_columns])."""
    out = np.empty((len(values), len(index)))
    out_valid = np.empty((len(values), len(index)), np.uint8)
    for t in range(len(values)):
        for c, tag in enumerate(index):
            before, before_ok = (values[t - 1, tag], valid[t - 1, tag]) if t else (math.nan, 0)
            out[t, c], out_valid[t, c] = prepare(
                values[t, tag], valid[t, tag], before, before_ok, bool(gap[t]), op[c], scale[c])
    return out, out_valid


# -- score ------------------------------------------------------------------------------------------------------


def p_value(x, held_out):
    """Share of held-out residuals at least as large (section 3.2): (n - #{held-out < x} + 1) / (n + 1)."""
    n = len(held_out)
    return (n - sum(1 for h in held_out if h < x) + 1) / (n + 1)


def surprise(x, grid, level, n, knee, slope):
    """Surprise of a residual from its table: that of the smallest grid entry not below x, or the tail."""
    if x > knee:
        return min(level[n] + math.log(x / knee) / slope, CAP)
    not_below = [level[i] for i in range(n) if grid[i] >= x]
    return min(not_below[0] if not_below else level[n], CAP)


def window_rows(gap, t, window):
    """Rows of the window that ends at t: never reaching over a gap."""
    return [k for k in range(max(0, t - window + 1), t + 1) if not any(gap[k + 1:t + 1])]


def mean_of(entries):
    """Exactly rounded mean, NaN left out; NaN where nothing is left."""
    known = [x for x in entries if not math.isnan(x)]
    return math.fsum(known) / len(known) if known else math.nan


def score_step(residual, gap, state, t, calibration):
    """Row t of a record: (stat float64[n_groups, n_windows], out float64[6])."""
    c = calibration
    n_channels = len(c.channels)

    def surprise_at(k, j):
        s, r = state[k], residual[k, j]
        if s < 0 or math.isnan(r):
            return math.nan
        return surprise(r, c.grid[s, j], c.level[s, j], c.used[s, j], c.tail[s, j, 0], c.tail[s, j, 1])

    stat = np.full((len(c.groups), len(c.windows)), np.nan)
    out = np.array([np.nan, -1.0, -1.0, np.nan, np.nan, np.nan])
    for w, window in enumerate(c.windows):
        rows = window_rows(gap, t, int(window))
        for g in range(len(c.groups)):
            members = [j for j in range(n_channels) if c.group[j] == g]
            entries = [surprise_at(k, j) for k in rows for j in members]
            known = sum(not math.isnan(x) for x in entries)
            if known and 2 * known >= len(members) * window:  # half of what the window can hold
                stat[g, w] = mean_of(entries)
            ratio = stat[g, w] / c.limit[state[t], g, w] if state[t] >= 0 else math.nan
            if ratio >= 0 and not out[0] >= ratio:
                out[:3] = ratio, g, w
    rows = window_rows(gap, t, int(c.windows[0]))
    for kind in range(3):
        out[3 + kind] = mean_of([residual[k, j] for k in rows for j in range(n_channels) if c.kind[j] == kind])
    return stat, out


def score_rows(residual, gap, state, calibration):
    """All rows: (stats float64[n, n_groups, n_windows], outs float64[n, 6])."""
    rows = [score_step(residual, gap, state, t, calibration) for t in range(len(residual))]
    return np.array([stat for stat, _ in rows]), np.array([out for _, out in rows])
