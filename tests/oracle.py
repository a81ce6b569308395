"""Slow, plain twins of the kernels: one line per formula, no packing, no speed; tests compare against them.

A twin has the name of its kernel and takes what the formula needs rather than packed arrays. The stream's
memory (`push_row`, `forget`) has no twin: the oracle looks back into the whole record instead.
"""

from __future__ import annotations

import itertools

import numpy as np

# -- transition: M. Alamir, R. Dion (2024); section numbers are those of the design -----------------------------


def level_of(x, edges):
    """Level of a raw value: number of thresholds strictly below it (section 1, quantiser)."""
    return sum(1 for edge in edges if edge < x)


def dot(w, v):
    """Inner product."""
    return sum(float(a) * float(b) for a, b in zip(w, v, strict=True))


row_dot = dot


def centre(w):
    """The vector less its mean, and the norm of that."""
    c = np.asarray(w, float) - np.mean(w)
    return c, float(np.sqrt(np.sum(c * c)))


def correlation(a, b):
    """Pearson correlation; None where one of the two is constant."""
    (a, norm_a), (b, norm_b) = centre(a), centre(b)
    if norm_a < 1e-9 or norm_b < 1e-4:
        return None
    return float(np.sum(a * b)) / (norm_a * norm_b)


def extend(z, valid, t, i_own, partners, step):
    """Extended vector at t and which of its components are valid: partners now, then the own past."""
    w = [z[t, j] for j in partners] + [z[s, i_own] for s in range(t - step + 1, t)]
    ok = [valid[t, j] for j in partners] + [valid[s, i_own] for s in range(t - step + 1, t)]
    return np.array(w), np.array(ok, bool)


def bound_residual(w, ok, lo, hi, tolerance, nu):
    """Mean over the valid components of the excess in widths, to the power nu (eq. 23, 24)."""
    excess = (np.maximum(0, lo - w) + np.maximum(0, w - hi)) / (hi - lo + tolerance)
    return float(np.mean(excess[ok] ** nu))


def conf_residual(w, vectors):
    """1 - largest inner product of the centred unit w with the kept vectors, which are stored so (eq. 25)."""
    c, norm = centre(w)
    if norm < 1e-9 or len(vectors) == 0:
        return 0.0
    return min(2.0, max(0.0, 1.0 - max(dot(c, v) / norm for v in vectors)))  # float32 norms: 1 to 1e-7


def masked_conf_residual(w, ok, vectors):
    """1 - largest signed correlation over the valid components; 0 where none can be formed (eq. 25)."""
    found = [correlation(w[ok], v[ok]) for v in vectors.astype(float)]
    found = [one for one in found if one is not None]
    return max(0.0, 1.0 - max(found)) if found else 0.0


def judge_sensor(model, i, own, z, valid, level, t):
    """(trans, bound, conf) of sensor i at t (eq. 22 - 25 at one instant, section 2 for what they leave open)."""
    a, p = model.arrays, model.params
    step = p["step"]
    if not (valid[t, own] and valid[t + step, own]):
        return np.nan, np.nan, np.nan
    row = a["table"][i, level[t, i] * p["levels"] + level[t + step, i]]
    if row < 0:
        return 1.0, 0.0, 1.0
    w, ok = extend(z, valid, t, own, a["partners"][i], step)
    if 2 * ok.sum() < len(ok):
        return 0.0, np.nan, np.nan
    tolerance = np.array([a["tolerance"][j] for j in a["partners"][i]] + [a["tolerance"][own]] * (step - 1))
    bound = bound_residual(w, ok, a["lo"][row], a["hi"][row], tolerance, p["nu"])
    vectors = a["vectors"][a["pointers"][row] : a["pointers"][row + 1]]
    conf = conf_residual(w, vectors) if ok.all() else masked_conf_residual(w, ok, vectors)
    return 0.0, bound, conf


def score_rows(model, values, valid, gap):
    """Residuals of all rows, float64[n, 3 n_sensors]; values and valid in the model's column order."""
    a, step = model.arrays, model.params["step"]
    own = np.flatnonzero(a["judged"])
    valid = (valid != 0) & np.isfinite(values)
    z = np.where(valid, (np.where(valid, values, 0.0) - a["mean"]) * a["inverse"], 0.0)
    level = np.array([[level_of(x[c], e) for c, e in zip(own, a["edges"], strict=True)] for x in values])
    out = np.full((len(values), 3 * len(own)), np.nan)
    start = 0
    for n in range(len(values)):
        if gap[n]:
            start = n
        if n - start + 1 >= 2 * step:
            for i, c in enumerate(own):
                out[n, i :: len(own)] = judge_sensor(model, i, c, z, valid, level, n - step)
    return out


def reduce_vectors(unit, eta, most, farthest, absolute):
    """Kept rows of unit vectors, and the largest correlation of each row with those (eq. 18, 19)."""
    sign = abs if absolute else float
    kept, best = [0], [sign(dot(unit[0], v)) for v in unit]
    while True:
        best[kept[-1]] = 1.0
        open_ones = [k for k in range(len(unit)) if best[k] < eta]
        if not open_ones or (most and len(kept) >= most):
            return kept, best
        kept.append(min(open_ones, key=lambda k: (best[k], k)) if farthest else open_ones[0])
        best = [max(b, sign(dot(unit[kept[-1]], v))) for b, v in zip(best, unit, strict=True)]


def learn_bounds(z, own, partners, step, instants):
    """lo, hi (eq. 15) and the centred unit vectors of the instants of one transition that are not constant."""
    rows = [extend(z, np.ones(z.shape), t, own, partners, step)[0] for t in instants]
    centred = [centre(w) for w in rows]
    unit = [(c / norm).astype(np.float32) for c, norm in centred if norm >= 1e-9]
    return np.min(rows, axis=0), np.max(rows, axis=0), unit


def learn_sensor(record, own, z, edges, partners, params):
    """Per transition of one sensor, in order of its code: (code, instants, lo, hi, its unit vectors).

    Which of the vectors are kept is left to `reduce_vectors`: where two are equally far the choice is free.
    """
    step, by_code = params.step, {}
    starts = [n for n in range(len(record)) if record.gap[n]] + [len(record)]
    for first, end in itertools.pairwise(starts):
        for t in range(first + step - 1, end - step):
            used = [record.valid[t, j] for j in partners] + [record.valid[t + step, own]]
            used += [record.valid[s, own] for s in range(t - step + 1, t + 1)]
            if all(used):
                q = [level_of(record.values[s, own], edges) for s in (t, t + step)]
                by_code.setdefault(q[0] * params.levels + q[1], []).append(t)
    learnt = []
    for code in sorted(by_code):
        lo, hi, unit = learn_bounds(z, own, partners, step, by_code[code])
        learnt.append((code, len(by_code[code]), lo, hi, unit))
    return learnt
