"""Slow, plain twins of `kernels.columns` and `kernels.score`: one line per formula, windows looked up anew each row.

A twin has the name of its kernel. It takes whole records and looks back into them, so it needs no memory of its
own: no ring, no running sums, nothing to forget but where the last gap was.
"""

from __future__ import annotations

import math

import numpy as np

from opcua_detector.kernels.score import SHARPNESS

SAME, DIFFERENCE, SINE, COSINE = 0, 1, 2, 3
SURPRISE, SQUARE, PLAIN = 0, 1, 2
SURPRISE_CAP, ENERGY_CAP = 30.0, 1000.0
FLOOR = 0.01  # under every logarithm of a mean
REPORT = 100  # rows over which residuals are told


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
        return min(level[n] + math.log(x / knee) / slope, SURPRISE_CAP)
    not_below = [level[i] for i in range(n) if grid[i] >= x]
    return min(not_below[0] if not_below else level[n], SURPRISE_CAP)


def energy(r, s, j, calibration):
    """Energy of a residual of channel j in state s: surprise, square in healthy units, or itself; NaN: no verdict."""
    c = calibration
    if s < 0 or math.isnan(r):
        return math.nan
    if c.transform[j] == SQUARE:
        return min((r / c.scale[s, j]) ** 2, ENERGY_CAP)
    if c.transform[j] == PLAIN:
        return min(r, ENERGY_CAP)
    k = c.slot[j]
    return surprise(r, c.grid[s, k], c.level[s, k], c.used[s, k], c.tail[s, k, 0], c.tail[s, k, 1])


def start_of(gap, t):
    """Row after the last gap: the interval that row t belongs to begins there."""
    return max([0, *(k for k in range(t + 1) if gap[k])])


def filled(k, j, start, residual, state, calibration):
    """Energy of row k, which may lie before the interval: until a channel has spoken it stands at its healthy mean."""
    c = calibration
    if k < start:
        return c.usual[max(state[start], 0), j]
    now = energy(residual[k, j], state[k], j, c)
    spoken = any(not math.isnan(energy(residual[i, j], state[i], j, c)) for i in range(start, k + 1))
    return now if spoken else c.usual[max(state[k], 0), j]


def term(members, window, t, start, residual, state, calibration, fixed):
    """Mean energy over channels and one trailing window; NaN where less than half of it is known. What is not known
    counts as the healthy mean of the state of now, but for channels with a limit of their own (`fixed`)."""
    rows = range(t - window + 1, t + 1)
    entries = {(k, j): filled(k, j, start, residual, state, calibration) for k in rows for j in members}
    known = [x for x in entries.values() if not math.isnan(x)]
    usual = [calibration.usual[max(state[t], 0), j] for (_, j), x in entries.items() if math.isnan(x)]
    if not known or 2 * len(known) < len(entries):
        return math.nan
    return math.fsum(known) / len(known) if fixed else math.fsum(known + usual) / len(entries)


def soft(x):
    """ln(1 + e^x)."""
    return float(np.logaddexp(0.0, x))


def ratio(view, value, limit):
    """How far a view is towards its limit, 1 = there."""
    return value if view.role == "fixed" else soft(value) / soft(limit)


def counted(view, score):
    """What a view adds to the score: those beside the leading ones count little below their limit."""
    return score ** SHARPNESS if view.role == "beside" and score < 1.0 else score


def score_step(residual, gap, state, t, calibration):
    """Row t of a record: (terms float64[n_terms], values float64[n_views], out float64[6])."""
    c, s, start = calibration, state[t], start_of(gap, t)
    terms, values = [], []
    best, lead, slow = math.nan, -1.0, math.nan
    at = 0
    for v, view in enumerate(c.views):
        own = [term(group, int(c.windows[w]), t, start, residual, state, c, view.role == "fixed")
               for group, w in view.terms]
        weights = c.weight[s, at:at + len(own)]
        at += len(own)
        terms += own
        if s < 0 or any(math.isnan(x) for x in own):
            values.append(math.nan)
            continue
        if view.role == "fixed":
            values.append(sum(own))
        else:
            squares = any(c.transform[j] == SQUARE for group in view.groups for j in group)
            parts = [math.log(x + FLOOR) if squares else x for x in own]  # a surprise is a logarithm already
            values.append(math.fsum(w * x for w, x in zip(weights, parts, strict=True)) - c.offset[s, v])
        score = ratio(view, values[-1], c.limit[s, v])
        if view.role == "lamp":
            slow = score
        elif not best >= counted(view, score):
            best, lead = counted(view, score), float(v)
    # A plain residual stands from the first row on, so it alone is no verdict where others still warm up.
    telling = [j for j in range(len(c.channels)) if c.transform[j] != PLAIN]
    spoken = any(not math.isnan(energy(residual[k, j], state[k], j, c))
                 for k in range(start, t + 1) for j in telling)
    if telling and not spoken:
        best, lead, slow = math.nan, -1.0, math.nan
    told = range(max(start, t - min(REPORT, int(max(c.windows))) + 1), t + 1)
    out = [best, lead, slow]
    for kind in ("trans", "bound", "conf"):
        known = [residual[k, j] for k in told for j, channel in enumerate(c.channels)
                 if channel.kind == kind and not math.isnan(residual[k, j])]
        out.append(math.fsum(known) / len(known) if known else math.nan)
    return np.array(terms), np.array(values), np.array(out)


def score_rows(residual, gap, state, calibration):
    """All rows: (outs float64[n, 6], terms float64[n, n_terms], values float64[n, n_views])."""
    rows = [score_step(residual, gap, state, t, calibration) for t in range(len(residual))]
    terms, values, outs = (np.array(part) for part in zip(*rows, strict=True))
    return outs, terms, values


def told(residual, gap, state, t, calibration, lead, tag, n_tags):
    """What is told of row t: (mean residual float64[n_channels], weight of each tag float64[n_tags]).

    lead : the view whose tags are named, -1 = none
    """
    c, s, start = calibration, state[t], start_of(gap, t)
    rows = range(max(start, t - min(REPORT, int(max(c.windows))) + 1), t + 1)
    known = [[residual[k, j] for k in rows if not math.isnan(residual[k, j])] for j in range(len(c.channels))]
    means = np.array([math.fsum(x) / len(x) if x else math.nan for x in known])
    weights = np.zeros(n_tags)
    if lead < 0 or s < 0:
        return means, weights
    for group, w in c.views[lead].terms:
        for j in group:
            entries = [filled(k, j, start, residual, state, c) for k in range(t - int(c.windows[w]) + 1, t + 1)]
            there = [x for x in entries if not math.isnan(x)]
            excess = max(0.0, math.fsum(there) / max(1, len(there)) - c.usual[s, j])
            far = math.fsum(known[j]) / max(1, len(known[j])) / c.scale[s, j]
            weights[tag[j]] += excess * (1.0 + far)
    return means, weights
