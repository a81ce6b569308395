"""What a missing tag does to the residuals of the others, learnt so that the limits stay true while it is missing.

A tag that is Bad, stale or masked is an input of its partners' forecasts all the same: a guess takes its place, and
their errors grow although the plant is healthy. How much is seen at the fit by hiding each tag in turn on healthy
rows. While a tag is missing, residuals are divided by it: the monitor sees less, and what it still sees alarms as
seldom as asked. A method need not know of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from .api import Float64, Int64, Method, Record, UInt8
from .calibration import Calibration
from .kernels.absence import lower_absent
from .views import FIXED_KINDS

HIDDEN_ROWS: Final = 60_000  # over all tags, and
LEAST_HIDDEN: Final = 200  # of each: rows on which a tag is hidden
DROPPED: Final = (1, 2, 5, 12, 40)  # rows for which a tag is lost now and then, in the first half of them
WHOLE: Final = 100  # rows at most that it is there in between, for a method that looks back so far, and
BETWEEN: Final = 20  # more
HIGH: Final = 0.99  # quantile at which mean squares are compared, beside the highest
LEAST_PLAIN: Final = 1e-4  # of the mean square: below it a residual counts as that, so that no ratio has no bounds


def learn_absence(
    methods: Sequence[tuple[Method, Record, Float64]], columns: Record, owner: Sequence[int], windows: Iterable[int],
) -> Float64:
    """Return float64[n_channels, n_columns]: times by which a residual grows while a column is missing, at least 1.

    The tag is lost for some rows again and again, and then for good: a method may judge on for some rows with a guess,
    and not at all without the tag. Compared are the mean squares over each window, hidden and not, at their 99 %
    quantile and at their highest: errors of a guess last longer than errors of a measurement, and so weigh more in a
    long window.

    Parameters
    ----------
    methods : (opened method, the healthy rows it was fitted on, float64[n, its channels] residuals of these)
    columns : all columns of the healthy record
    owner : the tag of each column; the columns of one tag go missing together
    windows : rows over which residuals are averaged
    """
    n = len(columns)
    tags = list(dict.fromkeys(owner))
    length = min(n, max(LEAST_HIDDEN, HIDDEN_ROWS // len(tags)))
    blocks = []
    for method, rows, full in methods:
        table = np.ones((full.shape[1], len(columns.tags)))
        kinds = np.array([channel.kind not in FIXED_KINDS for channel in method.channels])
        reach = method.lag + method.memory
        usual = np.nanmean(np.where(np.isnan(full).all(axis=0), 0.0, full) ** 2, axis=0)
        for k, tag in enumerate(tags):
            gone = [i for i, of in enumerate(owner) if of == tag]
            hidden = [i for i, column in enumerate(rows.tags) if column.name in {columns.tags[g].name for g in gone}]
            if not hidden or not kinds.any():
                continue
            start = (n - length) * k // max(1, len(tags) - 1)
            early = max(0, start - reach)
            part = rows.rows(early, start + length)
            valid = part.valid.copy()
            lost = _lost(len(part), early, start, length, min(reach, WHOLE) + BETWEEN)
            valid[lost[:, None], hidden] = 0
            blind = method.residuals(replace(part, valid=valid))[start - early:]
            times = _growth(blind[:, kinds], full[start:start + length, kinds], windows, usual[kinds])
            table[np.ix_(kinds, np.array(gone))] = times[:, None]
        blocks.append(table)
    return np.concatenate(blocks)


def _lost(n: int, early: int, start: int, length: int, between: int) -> Int64:
    """Return the rows of a part of n on which a tag is hidden; early, start : its first row, and the first judged."""
    at, rows, turn = start - early, [], 0
    while at < start - early + length // 2:
        rows.append(np.arange(at, at + DROPPED[turn % len(DROPPED)]))
        at += DROPPED[turn % len(DROPPED)] + between
        turn += 1
    rows.append(np.arange(at, n))
    found = np.concatenate(rows)
    return found[found < n].astype(np.int64)


def _growth(blind: Float64, plain: Float64, windows: Iterable[int], usual: Float64) -> Float64:
    """Return float64[k]: by how much the root mean squares of float64[n, k] are above those of another, at least 1.

    usual : float64[k]; mean square of each over the whole record
    """
    both = ~np.isnan(blind) & ~np.isnan(plain)
    a, b = np.where(both, blind, 0.0) ** 2, np.where(both, plain, 0.0) ** 2
    least = LEAST_PLAIN * np.where(usual > 0.0, usual, 1.0)
    most = np.ones(blind.shape[1])
    for w in (1, *windows):
        if len(a) < 2 * w:
            continue
        there = _sums(both.astype(np.float64), w)
        x, y = (_sums(one, w) / np.maximum(there, 1.0) for one in (a, b))
        at = min(len(x) - 1, int(HIGH * len(x)))
        for high, low in ((np.partition(x, at, axis=0)[at], np.partition(y, at, axis=0)[at]),
                          (x.max(axis=0), y.max(axis=0))):
            np.maximum(most, high / np.maximum(low, least), out=most)
    return np.sqrt(most)


def _sums(x: Float64, w: int) -> Float64:
    """Return float64[n - w + 1, k]: sums over w rows of float64[n, k]."""
    total = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, axis=0)])
    return np.maximum(total[w:] - total[:-w], 0.0)


class Absence:
    """Brings residuals down while tags are missing; holds the memory of a stream.

    Parameters
    ----------
    calibration : with its table `absent`; hold : rows that the methods look back
    """

    def __init__(self, calibration: Calibration, hold: int) -> None:
        n_columns = calibration.absent.shape[1]
        self._table = np.ascontiguousarray(calibration.absent, np.float64).ravel()
        self._hold = hold
        self._left = np.zeros(n_columns, np.int64)
        self._gap: UInt8 = np.zeros(1, np.uint8)

    @classmethod
    def of(cls, calibration: Calibration, methods: Sequence[Method]) -> Absence | None:
        """Return what a calibration has learnt of missing tags, None where it has learnt nothing."""
        if not calibration.absent.size:
            return None
        return cls(calibration, max(method.lag + method.memory for method in methods))

    def step(self, valid: UInt8, gap: bool, residual: Float64) -> None:
        """Take the masks of one row of columns, uint8[n_columns]; lower `residual` float64[n_channels] in place."""
        self._gap[0] = gap
        lower_absent(valid, self._gap, residual, self._hold, self._table, self._left)

    def rows(self, columns: Record, residual: Float64) -> Float64:
        """Return float64[n, n_channels]: what `step` makes of a whole record of columns; the stream is not touched."""
        if (columns.valid != 0).all() or not len(columns):
            return residual
        out = np.array(residual, np.float64, order="C")
        lower_absent(np.require(columns.valid, np.uint8, ["C"]).ravel(), np.require(columns.gap, np.uint8, ["C"]),
                     out.ravel(), self._hold, self._table, np.zeros_like(self._left))
        return out
