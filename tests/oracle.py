"""Slow, plain twins of the kernels: one line per formula, no packing, no speed; tests compare against them.

A twin has the name of its kernel and takes what the formula needs rather than packed arrays. The stream's
memory (`push_row`, `forget`) has no twin: the oracle looks back into the whole record instead.
"""

from __future__ import annotations

import itertools
import math

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


def map_residual(w, x, coefficients):
    """Value less its prediction: coefficients times the extended vector, and a constant (section 3.4)."""
    return float(x - (np.sum(np.asarray(w) * coefficients[:-1]) + coefficients[-1]))


def judge_sensor(model, i, own, z, valid, level, t):
    """(trans, bound, conf, affine) of sensor i at t (eq. 22 - 25 at one instant, sections 2 and 3.4).

    Without maps affine is NaN. What is not valid has z = 0.
    """
    a, p = model.arrays, model.params
    step = p["step"]
    if not (valid[t, own] and valid[t + step, own]):
        return np.nan, np.nan, np.nan, np.nan
    row = a["table"][i, level[t, i] * p["levels"] + level[t + step, i]]
    w, ok = extend(z, valid, t, own, a["partners"][i], step)
    half = 2 * ok.sum() >= len(ok)
    affine = np.nan
    if "maps" in a and half and ok[len(a["partners"][i]):].all():
        affine = abs(map_residual(w, z[t, own], a["maps"][row] if row >= 0 else a["general"][i]))
        affine = max(0.0, affine - (a["slack"][row] if row >= 0 else 0.0))
    if row < 0:
        return 1.0, 0.0, 1.0, affine
    if not half:
        return 0.0, np.nan, np.nan, np.nan
    tolerance = np.array([a["tolerance"][j] for j in a["partners"][i]] + [a["tolerance"][own]] * (step - 1))
    bound = bound_residual(w, ok, a["lo"][row], a["hi"][row], tolerance, p["nu"])
    vectors = a["vectors"][a["pointers"][row] : a["pointers"][row + 1]]
    conf = conf_residual(w, vectors) if ok.all() else masked_conf_residual(w, ok, vectors)
    return 0.0, bound, conf, affine


def scaled_rows(model, values, valid):
    """Scaled values, 0 where not valid, and which are valid; float64[n, n_columns] and bool."""
    a = model.arrays
    valid = (valid != 0) & np.isfinite(values)
    return np.where(valid, (np.where(valid, values, 0.0) - a["mean"]) * a["inverse"], 0.0), valid


def score_rows(model, values, valid, gap):
    """Residuals of all rows, float64[n, n_kinds * n_sensors]; values and valid in the model's column order."""
    a, step = model.arrays, model.params["step"]
    own = np.flatnonzero(a["judged"])
    z, valid = scaled_rows(model, values, valid)
    level = np.array([[level_of(x[c], e) for c, e in zip(own, a["edges"], strict=True)] for x in values])
    kinds = 4 if "maps" in a else 3
    out = np.full((len(values), kinds * len(own)), np.nan)
    start = 0
    for n in range(len(values)):
        if gap[n]:
            start = n
        if n - start + 1 >= 2 * step:
            for i, c in enumerate(own):
                out[n, i :: len(own)] = judge_sensor(model, i, c, z, valid, level, n - step)[:kinds]
    return out


def hold_out(z, own, partners, step, instants_by_row, before, after, ridge, floor):
    """(mean log of the held-out errors, those errors) of maps of t < before at t >= after."""
    taught = [[t for t in instants if t < before] for instants in instants_by_row]
    general, maps, _ = learn_maps(z, own, partners, step, [one for one in taught if one], ridge)
    maps, errors = iter(maps), []
    for teaching, instants in zip(taught, instants_by_row, strict=True):
        coefficients = next(maps) if teaching else general
        for t in [t for t in instants if t >= after]:
            w = extend(z, np.ones(z.shape), t, own, partners, step)[0]
            errors.append(map_residual(w, z[t, own], coefficients))
    errors = np.array(errors)
    return float(np.mean(np.log(np.sqrt(errors**2 + floor**2)))), errors


def unseen_share(by_code, n, step):
    """Share of instants whose transition is not made outside of their own fifth of the rows."""
    found = []
    for start, stop in ((k * n // 5, (k + 1) * n // 5) for k in range(5)):
        for instants in by_code.values():
            inside = [t for t in instants if start <= t - step + 1 and t + step < stop]
            outside = [t for t in instants if t + step < start or t - step + 1 >= stop]
            found += [not outside] * len(inside)
    return float(np.mean(found))


def learn_maps(z, own, partners, step, instants_by_row, ridge):
    """General map and one per transition, as coefficients of the extended vector and a constant (section 3.4).

    B_g = (A + ridge I)^-1 b over all instants; B_r = B_g + (A_r + ridge I)^-1 (b_r - A_r B_g), where the rows of
    the design are the extended vectors without s_t, with at most 32 delayed values, and a constant 1.
    """
    at = list(partners).index(own)
    n_e = len(partners) + step - 1
    used = [k for k in range(n_e) if k != at and (k < len(partners) or k >= n_e - 32)]

    def design(instants):
        w = np.array([extend(z, np.ones(z.shape), t, own, partners, step)[0] for t in instants])
        return np.column_stack([w[:, used], np.ones(len(w))]), z[instants, own]

    def out(b):
        full = np.zeros(n_e + 1)
        full[[*used, n_e]] = b
        return full

    unit = ridge * np.eye(len(used) + 1)
    x, y = design([t for instants in instants_by_row for t in instants])
    general = np.linalg.solve(x.T @ x + unit, x.T @ y)
    maps, spread = [], []
    for instants in instants_by_row:
        x, y = design(instants)
        b = general + np.linalg.solve(x.T @ x + unit, x.T @ y - x.T @ x @ general)
        maps.append(out(b))
        spread.append([np.min(y - x @ b), np.max(y - x @ b)])
    return out(general), np.array(maps), np.array(spread)


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


def instants_of(record, own, edges, partners, params):
    """Instants of one sensor that teach, by code of their transition: {code: [t, ...]}."""
    step, by_code = params.step, {}
    starts = [n for n in range(len(record)) if record.gap[n]] + [len(record)]
    for first, end in itertools.pairwise(starts):
        for t in range(first + step - 1, end - step):
            used = [record.valid[t, j] for j in partners] + [record.valid[t + step, own]]
            used += [record.valid[s, own] for s in range(t - step + 1, t + 1)]
            if all(used):
                q = [level_of(record.values[s, own], edges) for s in (t, t + step)]
                by_code.setdefault(q[0] * params.levels + q[1], []).append(t)
    return by_code


def learn_sensor(record, own, z, edges, partners, params):
    """Per transition of one sensor, in order of its code: (code, instants, lo, hi, its unit vectors).

    Which of the vectors are kept is left to `reduce_vectors`: where two are equally far the choice is free.
    """
    by_code = instants_of(record, own, edges, partners, params)
    learnt = []
    for code in sorted(by_code):
        lo, hi, unit = learn_bounds(z, own, partners, params.step, by_code[code])
        learnt.append((code, len(by_code[code]), lo, hi, unit))
    return learnt


def judged_instants(record_gap, valid, own, step):
    """Instants that are judged: [t - step + 1, t + step] without a gap, the sensor valid at t and t + step."""
    starts = [n for n in range(len(record_gap)) if record_gap[n] or n == 0] + [len(record_gap)]
    return [t for first, end in itertools.pairwise(starts) for t in range(first + step - 1, end - step)
            if valid[t, own] and valid[t + step, own]]


def adapt(model, values, valid, gap, borrow):
    """Per sensor {code: lo, hi, map, spread, limit, slack} after instants declared normal, one by one.

    Eq. 14 (new transition), 17a and b (bounds), widths of the nearest by L1 (section 1.7); the map of a new
    transition is the general one with error 0 here; a known map's offset goes to the middle of the errors to be
    normal where they all fit into -+ limit, else the slack takes what is too much.
    """
    a, p = model.arrays, model.params
    step, levels = p["step"], p["levels"]
    z, valid = scaled_rows(model, values, valid)
    sensors = []
    for i, own in enumerate(np.flatnonzero(a["judged"])):
        rows = {}
        for code in np.flatnonzero(a["table"][i] >= 0):
            k = a["table"][i, code]
            rows[int(code)] = {"lo": a["lo"][k].copy(), "hi": a["hi"][k].copy()}
            if "maps" in a:
                rows[int(code)] |= {"map": a["maps"][k].copy(), "spread": list(a["spread"][k]),
                                    "limit": a["limit"][k], "slack": a["slack"][k]}
        for t in judged_instants(gap, valid, own, step):
            w, ok = extend(z, valid, t, own, a["partners"][i], step)
            q = [level_of(values[s, own], a["edges"][i]) for s in (t, t + step)]
            row = rows.get(q[0] * levels + q[1])
            if row is None:
                near = min(rows, key=lambda c: (abs(c // levels - q[0]) + abs(c % levels - q[1]), c))
                half = (rows[near]["hi"] - rows[near]["lo"]) / 2 if borrow else 0.0
                row = {"lo": np.where(ok, w - half, rows[near]["lo"]), "hi": np.where(ok, w + half, rows[near]["hi"])}
                if "maps" in a:
                    one = a["general"][i].copy()
                    one[-1] += map_residual(w, z[t, own], one)
                    row |= {"map": one, "spread": [0.0, 0.0], "limit": 3 * a["usual"][i], "slack": 0.0}
                rows[q[0] * levels + q[1]] = row
            elif 2 * ok.sum() >= len(ok):
                row["lo"] = np.where(ok, np.minimum(row["lo"], w), row["lo"])
                row["hi"] = np.where(ok, np.maximum(row["hi"], w), row["hi"])
                if "maps" in a and ok.all():
                    adapt_map(row, w, z[t, own])
        sensors.append(rows)
    return sensors


def adapt_map(row, w, x):
    """One vector declared normal, on one map (see `adapt`); 1e-9 is the margin for rounding."""
    error = map_residual(w, x, row["map"])
    union = [min(row["spread"][0], error), max(row["spread"][1], error)]
    if abs(error) - row["slack"] > row["limit"] + 1e-9:
        if union[1] - union[0] <= 2 * row["limit"]:
            middle = sum(union) / 2
            row["map"][-1] += middle
            row["spread"] = [union[0] - middle, union[1] - middle]
            row["slack"] += abs(middle) if row["slack"] > 0 else 0.0
        else:
            row["slack"] = abs(error) - row["limit"]
    elif abs(error) <= row["limit"]:
        row["spread"] = union


def whole_vectors(model, i, own, z, valid, record):
    """{code: centred unit vectors, float[m, n_e]} of the judged instants whose components are all valid."""
    a, p, found = model.arrays, model.params, {}
    for t in judged_instants(record.gap, valid, own, p["step"]):
        w, ok = extend(z, valid, t, own, a["partners"][i], p["step"])
        centred, norm = centre(w)
        if ok.all() and norm >= 1e-9:
            q = [level_of(record.values[s, own], a["edges"][i]) for s in (t, t + p["step"])]
            found.setdefault(q[0] * p["levels"] + q[1], []).append(centred / norm)
    return {code: np.array(unit) for code, unit in found.items()}


# -- tags that carry the same signal ----------------------------------------------------------------------------


def alike(values, valid, i, j):
    """Look at the rows that both tags have: (is the |correlation| 1 to rounding, what it is, does each of them move).

    A tag moves where its spread on those rows is more than a hundredth of that on all of its own. Where a square
    overflows, or all that moves is rounding, nothing can be said: (False, 0, False).
    """
    both = [t for t in range(len(values)) if valid[t, i] and valid[t, j]]
    if len(both) < 3:
        return False, 0.0, False
    parts, spreads = [], []
    for k in (i, j):
        parts.append(less_mean([values[t, k] for t in both]))
        own = less_mean([values[t, k] for t in range(len(values)) if valid[t, k]])
        spreads.append((size_of(parts[-1]) / math.sqrt(len(both)), size_of(own) / math.sqrt(len(own))))
        if spreads[-1][0] <= 1e-12 * max(abs(values[t, k]) for t in both):
            return False, 0.0, False
    norm = size_of(parts[0]) * size_of(parts[1])
    if not math.isfinite(norm + sum(whole for _, whole in spreads)):
        return False, 0.0, False
    correlation = abs(math.fsum(a * b for a, b in zip(*parts, strict=True))) / norm
    return correlation > 1 - 1e-10, correlation, all(here > 0.01 * whole for here, whole in spreads)


def less_mean(x):
    """x less its mean."""
    mean = sum(float(one) / len(x) for one in x)
    return [float(one) - mean for one in x]


def size_of(x):
    """Root of the sum of squares; inf where that overflows."""
    return math.sqrt(sum(one * one for one in x))
