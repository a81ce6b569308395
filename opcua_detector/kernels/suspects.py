"""Kernel of the question "which sensor lies?": how much better all forecasts hold if one sensor read falsely.

Suppose that sensor i read true value + f(t). Then every forecast error that leans on it is off by a known linear map
of f, and the best f follows from a banded system. The evidence against the sensor is the logarithm of the Bayes
factor between "some f of this kind" and "no f": it pays for the freedom that f has, so that a sensor whose error
explains the rows with one number (a bias) is preferred to one that needs another number in every row.

Each kind of f is a Gaussian one, in healthy standard deviations of the sensor: a random walk (bias, drift, lag, gain,
stuck) or white (noise) of a given step; it is 0 before a first row, and several first rows are tried.

Source: generalised likelihood ratio for sensor faults (A. S. Willsky, H. L. Jones, 1976), with the evidence of D. J. C.
MacKay (1992) in place of the ratio.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .jit import kernel

Array = NDArray[Any]

WALKS: Final = (0.003, 0.03, 0.3, 3.0)  # steps of a random walk, healthy standard deviations a row
WHITE: Final = (0.3, 3.0)
LATEST: Final = (100, 30, 10, 3)  # rows before the end at which a fault may have begun
_SPANS: Final = np.array([*WALKS, *WHITE])
_STARTS: Final = np.array(LATEST)
_N_WALKS: Final = len(WALKS)


@kernel("f8(f8[:, ::1], f8[::1], i8, f8, b1, f8[:, ::1], f8[::1])", cache=True, nogil=True)
def _evidence(band: Array, rhs: Array, first: int, span: float, walk: bool, factor: Array, solution: Array) -> float:
    """Return the log Bayes factor for f of one kind that begins at row `first`; write f from there on.

    band : float64[L + 1, n]; band[o, m] = entry (m + o, m) of the normal matrix; rhs : float64[n]
    span : step of the walk, or standard deviation of the white f; factor, solution : work space of the same shapes
    """
    n, reach = rhs.size, band.shape[0] - 1
    weight = 1.0 / (span * span)
    log_prior = (n - first) * math.log(weight)
    if walk:  # its first value: standard deviation 1
        log_prior -= math.log(weight)
    log_factor, fit = 0.0, 0.0
    for m in range(first, n):
        for o in range(min(reach, n - 1 - m) + 1):
            x = band[o, m]
            if o == 0:
                x += weight
                if walk:
                    x += (weight if m + 1 < n else 0.0) + (1.0 - weight if m == first else 0.0)
            elif o == 1 and walk:
                x -= weight
            for k in range(1, min(reach - o, m - first) + 1):
                x -= factor[k, m - k] * factor[o + k, m - k]
            if o == 0:
                factor[0, m] = math.sqrt(max(x, 1e-300))
            else:
                factor[o, m] = x / factor[0, m]
        log_factor += math.log(factor[0, m])
        y = rhs[m]
        for k in range(1, min(reach, m - first) + 1):
            y -= factor[k, m - k] * solution[m - k]
        solution[m] = y / factor[0, m]
        fit += solution[m] * solution[m]
    for m in range(n - 1, first - 1, -1):
        y = solution[m]
        for k in range(1, min(reach, n - 1 - m) + 1):
            y -= factor[k, m] * solution[m + k]
        solution[m] = y / factor[0, m]
    return 0.5 * fit - log_factor + 0.5 * log_prior


@kernel("i8(f8[:, ::1], f8[::1])", cache=True, nogil=True)
def _step_at(band: Array, rhs: Array) -> int:
    """Return the row at which one step of f explains most."""
    best, at, pull, norm = -1.0, 0, 0.0, 0.0
    for m in range(rhs.size - 1, -1, -1):
        pull += rhs[m]
        norm += band[0, m]
        for o in range(1, min(band.shape[0] - 1, rhs.size - 1 - m) + 1):
            norm += 2.0 * band[o, m]
        gain = pull * pull / (norm + 1.0) - math.log(1.0 + max(norm, 0.0))
        if gain > best:
            best, at = gain, m
    return at


@njit("f8(f8[:, ::1], f8[:, :, ::1], f8[::1])", cache=True, nogil=True)
def suspicion(pull: Array, gram: Array, best: Array) -> float:
    """Return the largest log Bayes factor (nats) over all kinds of f, and write that f.

    Parameters
    ----------
    pull : float64[k, L + 1]; sum over the residuals of row t of weight * residual * its change by f(t - l)
    gram : float64[k or 1, L + 1, L + 1]; the same sums of products of two such changes; 1: alike for all rows
    best : float64[k + L], written: f on the rows t - L of the first residual ... the last row
    """
    k, reach = pull.shape[0], pull.shape[1] - 1
    n = k + reach
    band, factor = np.zeros((reach + 1, n)), np.zeros((reach + 1, n))
    rhs, f = np.zeros(n), np.zeros(n)
    for t in range(k):
        g = gram[t if gram.shape[0] > 1 else 0]
        for lag in range(reach + 1):
            rhs[t + reach - lag] += pull[t, lag]
            for older in range(lag, reach + 1):
                band[older - lag, t + reach - older] += g[lag, older]
    best[:] = 0.0
    largest = 0.0
    onset = _step_at(band, rhs)
    for s in range(_STARTS.size + 2):
        first, price = 0, 0.0
        if s == 1:
            first, price = onset, math.log(n)
        elif s > 1:
            first, price = n - _STARTS[s - 2], math.log(float(_STARTS.size))
        if first < 0 or (s == 1 and first == 0):
            continue
        for i in range(_SPANS.size):
            value = _evidence(band, rhs, first, _SPANS[i], i < _N_WALKS, factor, f) - price
            if value > largest:
                largest = value
                best[:first] = 0.0
                best[first:] = f[first:]
    return largest
