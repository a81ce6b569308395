"""Stretches of a "healthy" record that look unlike the rest: a fault that was recorded too should not be learnt.

Both look at stretches of a share `STRETCH` of the record: `unlike_the_rest` at what the fitted monitor says of its own
record, held out; `respond_unlike_the_rest` at how each column follows its past, which a weak change bends all along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .api import Float64, Int64, Record
from .calibration import FOLDS, Calibration
from .kernels.score import SURPRISE

STRETCH, MIN_STRETCH = 0.03, 50  # share of the record, rows: of a stretch that is unlike the rest
STRETCH_BAR = 2.0  # healthy spreads above the median; on a nonlinear plant more in a short record, whose rare
RARE_ROWS = 200.0  # movements may last about as many rows
MOST_UNLIKE = 0.15  # of the record: what is more is no exception
# A nonlinear model knows nothing of a movement that only the held-out stretch shows, however healthy. Learnt with it, a
# rare movement looks as usual; a fault contradicts the rest of the record and does not. At 12 000 rows, rare stretches
# of clean Lorenz records and faults: median held out 4 to 6 and 5 to 11, lower quartile as learnt up to .8 and from 1.1
# (without noise; with 1 % the features can tell a fault from the rest, but then it is 8 to 11 high).
FAR_UNLIKE, STILL_UNLIKE = 7.5, 0.95
RESPONSE_LAGS, RESPONSE_BLOCKS = 8, 8  # rows; parts of a stretch
RESPONSE_ROWS = 2000  # least, to know how healthy stretches differ
# How far a stretch must lie from the centre of all: times the median distance, times that of MOST_UNLIKE, times the
# farthest one outside it (squares). At 12 000 rows the faults of the throttle: from 168, 59 and 31 on; 80 clean records
# of four plants: up to 144, 32 and 11, none with all three near.
RESPONSE_BARS = (100.0, 40.0, 18.0)
RESPONSE_RIDGE = 1e-3  # per row
SAME_INPUT, LEAST_SCATTER = 1e-5, 1e-3  # of the largest: directions of less spread are left out, or count as so much
RESTING_SHARE, RESTS = 0.25, 0.1  # of the stretches; of the widest movement in one: less is rest
WIDER = 1.2  # than in any other stretch: such a movement came once only, and may be as healthy as rare
USUAL_SHARE, TRIMMED = 0.8, 6  # of the stretches that set the scatter, rounds
RESPONSE = "response/"  # and the tag: the view of such a stretch


def unlike_the_rest(
    calibration: Calibration, values: Float64, again: Float64, source_ns: Int64,
) -> list[tuple[int, int, float, str]]:
    """Return (from_ns, to_ns, healthy spreads above the median, view) of lasting stretches, the highest first.

    A stretch counts where a view stands above a bar on three quarters of the rows of a window of 3 % of the record: a
    rare healthy movement is as high, but not for so long (at 12 000 rows, clean records of both simulated
    plants and a linear one name nothing; most faults of 5 % are named, see `tests/test_robust.py`). The views are
    those of the predictors, where there are any, and the fixed ones. A nonlinear forecast must still be unlike the rest
    once it has learnt the stretch, or be very far off (`FAR_UNLIKE`).

    values : float64[n, n_views]; held out; again : the same of the model that has learnt all rows
    """
    n = len(values)
    width = max(MIN_STRETCH, round(STRETCH * n))
    nonlinear = SURPRISE in calibration.transform
    predicted = [view.name for view in calibration.views if view.name == "all" or view.name.startswith("predicted/")]
    found = []
    for v, view in enumerate(calibration.views):
        if view.role == "lamp" or (view.role != "fixed" and predicted and view.name not in predicted):
            continue
        bar = 1.0 if view.role == "fixed" else STRETCH_BAR * (1.0 + (RARE_ROWS / width if nonlinear else 0.0))
        early = int(calibration.windows[view.windows[0]]) - 1
        runs = lasting(values[:, v], width, bar)
        if nonlinear and any(calibration.channels[c].kind == "forecast" for group in view.groups for c in group):
            runs = [(start, stop) for start, stop in runs
                    if np.nanmedian(values[start:stop, v]) >= FAR_UNLIKE
                    or np.nanquantile(again[start:stop, v], 0.25) >= STILL_UNLIKE]
        if sum(stop - start for start, stop in runs) <= MOST_UNLIKE * n:
            found += [(int(source_ns[max(0, start - early)]), int(source_ns[stop - 1]),
                       float(np.nanmax(values[start:stop, v])), view.name) for start, stop in runs]
    return sorted(found, key=lambda item: -item[2])


def respond_unlike_the_rest(columns: Record) -> list[tuple[int, int, float, str]]:
    """Return (from_ns, to_ns, distance in usual ones, view) of the stretch in which each column responds otherwise.

    A change of the plant too small to stand out of the noise row by row still bends how a column follows its own past
    and its closest partner's, and it does so in the same way over the whole stretch. Where e is the held-out error of
    a linear forecast and x its inputs, the sum of e x over a stretch scatters around a common centre if one map holds
    for all of the record. The distance from the centre is measured in the scatter of the stretches themselves, so
    that a plant that is not linear, or its rare movements, are allowed for as far as they come more than once. A column
    that rests in most stretches, or moves far wider in one than in all others (a drive that is set up), does not say
    how it usually responds.

    Notes
    -----
    Source: the score (Lagrange multiplier) test of constant parameters, J. Nyblom (1989), B. E. Hansen (1992), with
    the scatter estimated from the stretches and its outliers trimmed. What one linear map cannot see, such as the
    faults of the Lorenz plant, is left to `unlike_the_rest`.
    """
    n = len(columns)
    width = max(MIN_STRETCH, round(STRETCH * n))
    if n < RESPONSE_ROWS:
        return []
    good = (columns.valid != 0) & np.isfinite(columns.values)
    count = np.maximum(good.sum(axis=0), 1)
    z = np.where(good, columns.values, 0.0)
    z = np.where(good, columns.values - z.sum(axis=0) / count, 0.0)
    z /= np.maximum(np.sqrt((z * z).sum(axis=0) / count), np.finfo(np.float64).tiny)
    alike = np.abs(z.T @ z) / n
    np.fill_diagonal(alike, -1.0)
    begin = np.maximum.accumulate(np.where(columns.gap != 0, np.arange(n), 0))
    warm = np.arange(n) - begin >= RESPONSE_LAGS
    block = max(1, width // RESPONSE_BLOCKS)
    found = []
    for c, tag in enumerate(columns.tags):
        if not tag.judged or not z[:, c].any():
            continue
        seen = [c] if z.shape[1] == 1 else [c, int(alike[c].argmax())]
        far = _distances(z, c, seen, warm & good[:, c], block)
        at = int(far.argmax())
        rows = np.arange(len(far)) * block
        outside = np.abs(rows - rows[at]) > 2 * width
        if not outside.any() or not far[at] > 0.0:
            continue
        moves = np.array([float(z[row:row + width, c].std()) for row in rows])
        if np.quantile(moves, RESTING_SHARE) < RESTS * moves.max() or moves[at] > WIDER * moves[outside].max():
            continue
        beside = float(np.median(far)), float(np.quantile(far, 1.0 - MOST_UNLIKE)), float(far[outside].max())
        if any(far[at] < bar * usual for bar, usual in zip(RESPONSE_BARS, beside, strict=True)):
            continue
        # A stretch of which half lies inside has a quarter of the distance.
        half = far >= far[at] / 4.0
        first = at - int(np.argmin(np.append(half[at::-1], False))) + 1
        last = at + int(np.argmin(np.append(half[at:], False))) - 1
        start, stop = rows[first] + width // 2, min(n, int(rows[last]) + width // 2 + block)
        found.append((int(columns.source_ns[start]), int(columns.source_ns[stop - 1]),
                      math.sqrt(float(far[at]) / beside[0]), f"{RESPONSE}{tag.name}"))
    return found


def _distances(z: Float64, c: int, seen: Sequence[int], use: NDArray[np.bool_], block: int) -> Float64:
    """Return float64[m]: distance of each stretch of RESPONSE_BLOCKS blocks, one begins with every block.

    z : float64[n, d], scaled; c : the column forecast from the rows before of the columns `seen`; use : bool[n]
    """
    n = len(z)
    lagged = [np.concatenate([np.zeros(lag), z[:-lag, k]]) for k in seen for lag in range(1, RESPONSE_LAGS + 1)]
    x = np.column_stack([*lagged, np.ones(n)])
    x[~use] = 0.0
    fold = np.minimum(np.arange(n) * FOLDS // n, FOLDS - 1)
    grams = [x[fold == f].T @ x[fold == f] for f in range(FOLDS)]
    pulls = [x[fold == f].T @ z[fold == f, c] for f in range(FOLDS)]
    error = np.zeros(n)
    for f in range(FOLDS):
        gram = sum(grams) - grams[f]
        ridge = RESPONSE_RIDGE * gram[-1, -1] * np.eye(len(gram))
        error[fold == f] = z[fold == f, c] - x[fold == f] @ np.linalg.solve(gram + ridge, sum(pulls) - pulls[f])
    spread, axes = np.linalg.eigh(sum(grams))
    kept = spread > SAME_INPUT * spread[-1]
    pull = error[:, None] * (x @ (axes[:, kept] / np.sqrt(spread[kept])))
    blocks = n // block
    total = pull[: blocks * block].reshape(blocks, block, -1).sum(axis=1)
    summed = np.concatenate([np.zeros((1, total.shape[1])), np.cumsum(total, axis=0)])
    sums = summed[RESPONSE_BLOCKS:] - summed[:-RESPONSE_BLOCKS]
    usual = np.ones(len(sums), np.bool_)
    far = np.zeros(len(sums))
    for _ in range(TRIMMED):
        about = sums - sums[usual].mean(axis=0)
        scatter, turn = np.linalg.eigh(about[usual].T @ about[usual])
        if not scatter[-1] > 0.0:
            return far
        far = ((about @ turn) ** 2 / np.maximum(scatter, LEAST_SCATTER * scatter[-1])).sum(axis=1)
        usual = far <= np.quantile(far, USUAL_SHARE)
    return far


def lasting(value: Float64, width: int, bar: float) -> list[tuple[int, int]]:
    """Return row ranges [start, stop) made of windows in which float64[n] stands above a bar on 3/4 of the rows.

    NaN is no verdict and counts as below. A range begins and ends with a row above the bar.
    """
    if len(value) < width:
        return []
    high = np.nan_to_num(value, nan=-np.inf) > bar
    count = np.concatenate([[0], np.cumsum(high)])
    begin = np.flatnonzero(count[width:] - count[:-width] >= 0.75 * width)
    if len(begin) == 0:
        return []
    above = np.flatnonzero(high)
    ranges = []
    for run in np.split(begin, np.flatnonzero(np.diff(begin) > width) + 1):
        inside = above[(above >= run[0]) & (above < run[-1] + width)]
        ranges.append((int(inside[0]), int(inside[-1]) + 1))
    return ranges
