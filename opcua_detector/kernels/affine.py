"""Kernels that learn the affine maps of one sensor: a general one, and one per transition shrunk to it.

A map predicts the sensor's own value now, s_t, from the rest of its extended vector w_t (at most `MOST_PAST`
of its own delayed values, the latest ones) and a constant, by a ridge whose rest is drawn to the general map:

    B_r = B_g + (A_r + lam I)^-1 (b_r - A_r B_g)

Inside, the place of s_t in w_t is taken by the constant 1, so that a map of n_e entries needs no column more;
the maps that are handed out have n_e + 1 entries, 0 at the place of s_t and the constant last.

Source: section 3.4 of the design (local affine residual); not in M. Alamir, R. Dion (2024).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from opcua_detector.kernels.transition import SUM_FLAGS, Array

from .jit import kernel

MOST_PAST: Final = 32
"""Cost and memory of a ridge grow with the square of its inputs: a long transition must not blow it up."""


@kernel("void(f8[:, ::1], i4[::1], i8, i8, i8, f8[::1])", cache=True, nogil=True)
def design_row(scaled: Array, partners: Array, own: int, step: int, t: int, x: Array) -> None:
    """Write the inputs at t, then the target s_t, into x.

    Parameters
    ----------
    scaled : float64[n_columns, n]; partners : int32[n_seen], `own` among them; step : int, rows
    x : float64[n_seen + min(step - 1, MOST_PAST) + 1], scaled units; the entry of `own` is 1
    """
    n_seen = partners.size
    n_past = min(step - 1, MOST_PAST)
    for k in range(n_seen):
        x[k] = 1.0 if partners[k] == own else scaled[partners[k], t]
    for k in range(n_past):
        x[n_seen + k] = scaled[own, t - n_past + k]
    x[n_seen + n_past] = scaled[own, t]


@kernel("void(f8[::1], f8[:, ::1])", cache=True, nogil=True, fastmath=SUM_FLAGS)
def add_products(x: Array, gram: Array) -> None:
    """Add x x' to the lower triangle of gram; float64[d + 1] and float64[d + 1, d + 1], target last."""
    for a in range(x.size):
        for b in range(a + 1):
            gram[a, b] += x[a] * x[b]


@njit("void(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8[::1], i8, f8[:, :, ::1], f8[:, ::1])", cache=True, nogil=True)
def sum_products(
    scaled: Array, partners: Array, own: int, step: int, order: Array, starts: Array, before: int, grams: Array,
    total: Array,
) -> None:
    """Add the products of the instants t < before of each transition to grams, and of all of them to total.

    Parameters
    ----------
    scaled, partners, own, step : see `design_row`; order, starts, before : see `hold_out`
    grams : float64[n_rows, d + 1, d + 1]; total : float64[d + 1, d + 1]; lower triangles, target last
    """
    x = np.empty(total.shape[0])
    for row in range(starts.size - 1):
        for p in range(starts[row], starts[row + 1]):
            if order[p] < before:
                design_row(scaled, partners, own, step, order[p], x)
                add_products(x, grams[row])
        total += grams[row]


@kernel("void(f8[:, ::1], f8[::1], f8, f8[:, ::1], f8[::1])", cache=True, nogil=True, fastmath=SUM_FLAGS)
def solve_map(gram: Array, prior: Array, ridge: float, room: Array, out: Array) -> None:
    """Write prior + (A + ridge I)^-1 (b - A prior) into out, by Cholesky.

    Parameters
    ----------
    gram : float64[d + 1, d + 1], lower triangle: A, and b in the last row
    prior, out : float64[d]; may not be the same
    ridge : float64 above 0
    room : float64[d, d], overwritten
    """
    d = prior.size
    for a in range(d):
        rest = gram[d, a]
        for b in range(d):
            rest -= (gram[a, b] if b <= a else gram[b, a]) * prior[b]
        out[a] = rest
        for b in range(a + 1):
            room[a, b] = gram[a, b]
        room[a, a] += ridge
    for a in range(d):
        for b in range(a):
            total = room[a, b]
            for k in range(b):
                total -= room[a, k] * room[b, k]
            room[a, b] = total / room[b, b]
        total = room[a, a]
        for k in range(a):
            total -= room[a, k] * room[a, k]
        # ridge is what is left of the pivot where the inputs are dependent; rounding may take that too
        room[a, a] = math.sqrt(max(total, 0.5 * ridge))
    for a in range(d):
        total = out[a]
        for k in range(a):
            total -= room[a, k] * out[k]
        out[a] = total / room[a, a]
    for a in range(d - 1, -1, -1):
        total = out[a]
        for k in range(a + 1, d):
            total -= room[k, a] * out[k]
        out[a] = total / room[a, a]
    for a in range(d):
        out[a] += prior[a]


@kernel("f8(f8[::1], f8[::1])", cache=True, nogil=True, fastmath=SUM_FLAGS)
def error_of(x: Array, coefficients: Array) -> float:
    """Return target less prediction; x as `design_row` writes it, coefficients float64[d]."""
    predicted = 0.0
    for k in range(coefficients.size):
        predicted += x[k] * coefficients[k]
    return x[coefficients.size] - predicted


@njit("void(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8[::1], i8, i8, f8[::1], f8, f8[::1], f8[:, ::1])", cache=True,
      nogil=True)
def hold_out(
    scaled: Array, partners: Array, own: int, step: int, order: Array, starts: Array, before: int, after: int,
    ridges: Array, floor: float, logs: Array, errors: Array,
) -> None:
    """Learn maps from the first instants and look at their errors at the last ones, for each ridge.

    Parameters
    ----------
    scaled, partners, own, step : see `design_row`
    order, starts : int64[m], int64[n_rows + 1]; instants sorted by transition, where each one begins
    before, after : instants t < before teach, instants t >= after are held out, the rest is left out
    ridges : float64[n_ridges], above 0
    floor : float64, scaled units; errors well below it count alike
    logs : float64[n_ridges], written: mean of ln sqrt(error^2 + floor^2) over the held-out instants; one whose
        transition no teaching instant made counts with the error of the general map
    errors : float64[>= number of held-out instants or 0, n_ridges], written where there is room, scaled units
    """
    d = partners.size + min(step - 1, MOST_PAST)
    n_rows = starts.size - 1
    x = np.empty(d + 1)
    grams = np.zeros((n_rows, d + 1, d + 1))
    total = np.zeros((d + 1, d + 1))
    sum_products(scaled, partners, own, step, order, starts, before, grams, total)
    room = np.empty((d, d))
    zero = np.zeros(d)
    general = np.empty((ridges.size, d))
    logs[:] = 0.0
    for r in range(ridges.size):
        solve_map(total, zero, ridges[r], room, general[r])
    local = np.empty((ridges.size, d))
    count = 0
    for row in range(n_rows):
        first = starts[row]
        while first < starts[row + 1] and order[first] < after:  # within a transition in order of time
            first += 1
        if first == starts[row + 1]:
            continue
        known = order[starts[row]] < before
        for r in range(ridges.size):
            if known:
                solve_map(grams[row], general[r], ridges[r], room, local[r])
            else:
                local[r] = general[r]
        for p in range(first, starts[row + 1]):
            design_row(scaled, partners, own, step, order[p], x)
            for r in range(ridges.size):
                error = error_of(x, local[r])
                logs[r] += 0.5 * math.log(error * error + floor * floor)
                if count < errors.shape[0]:
                    errors[count, r] = error
            count += 1
    logs /= max(count, 1)


@kernel("void(f8[::1], i4[::1], i8, i8, f8[::1])", cache=True, nogil=True)
def hand_out(inside: Array, partners: Array, own: int, step: int, out: Array) -> None:
    """Write a map of the inputs of `design_row` as a map of the extended vector and a constant.

    inside : float64[d]; out : float64[n_e + 1], written
    """
    n_seen = partners.size
    n_past = min(step - 1, MOST_PAST)
    out[:] = 0.0
    for k in range(n_seen):
        if partners[k] == own:
            out[out.size - 1] = inside[k]
        else:
            out[k] = inside[k]
    for k in range(n_past):
        out[out.size - 1 - n_past + k] = inside[n_seen + k]


@njit("void(f8[:, ::1], i4[::1], i8, i8, i8[::1], i8[::1], f8, f8[:, ::1], f8[::1], f8[:, ::1])", cache=True,
      nogil=True)
def learn_maps(
    scaled: Array, partners: Array, own: int, step: int, order: Array, starts: Array, ridge: float, maps: Array,
    general: Array, spread: Array,
) -> None:
    """Learn the maps of one sensor from all its instants.

    Parameters
    ----------
    scaled, partners, own, step, order, starts : see `hold_out`
    ridge : float64 above 0
    maps : float64[n_rows, n_e + 1], written; general : float64[n_e + 1], written (see the module's docstring)
    spread : float64[n_rows, 2], written: smallest and largest error at the instants of a transition, scaled
    """
    n_seen = partners.size
    d = n_seen + min(step - 1, MOST_PAST)
    n_rows = starts.size - 1
    x = np.empty(d + 1)
    grams = np.zeros((n_rows, d + 1, d + 1))
    total = np.zeros((d + 1, d + 1))
    sum_products(scaled, partners, own, step, order, starts, scaled.shape[1], grams, total)
    room = np.empty((d, d))
    shared = np.empty(d)
    local = np.empty(d)
    solve_map(total, np.zeros(d), ridge, room, shared)
    hand_out(shared, partners, own, step, general)
    for row in range(n_rows):
        solve_map(grams[row], shared, ridge, room, local)
        hand_out(local, partners, own, step, maps[row])
        spread[row, 0] = np.inf
        spread[row, 1] = -np.inf
        for p in range(starts[row], starts[row + 1]):
            design_row(scaled, partners, own, step, order[p], x)
            error = error_of(x, local)
            spread[row, 0] = min(spread[row, 0], error)
            spread[row, 1] = max(spread[row, 1], error)
