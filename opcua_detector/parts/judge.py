"""How far one part leaves the corridor: while it runs by absolute time, at its end as a whole."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, UInt8
from ..kernels.parts import depart, part_features, run_row, run_rows, stretched
from .model import BIN, KINDS, PHASE, RUN, SCORE_CAP, SHAPE, PartModel

ENOUGH_VALID = 0.5  # share of valid cells of a part, masked columns aside, without which there is no verdict
SHARE_FROM = 0.5  # ratio from which a column takes part in the contributions
SPEEDS, FEW_SPEEDS, MANY_CELLS = 40, 10, 20_000  # speeds tried to see whether a part is only slow or fast; even: not 1
MOST_SPEED = 2.0
FITS = 0.5  # of its limit: a column this near its corridor's middle fits a speed


class PartJudge:
    """Compares one part after the other with the corridor; everything is allocated at construction.

    rows : rows of the part so far
    features, worst, where : as in `kernels.parts`; worst in spreads
    ratio : float64[k, c]; worst / limit, NaN where nothing is judged
    aside : bool[c]; columns that a guard masks: they do not count as missing
    running : largest ratio of the part so far, by its bins of absolute time; 0 while there is none
    """

    def __init__(self, model: PartModel) -> None:
        n = len(model.columns)
        self.model = model
        self.kind = model.kind
        self.values = np.full((model.capacity, n), np.nan)
        self.valid = np.zeros((model.capacity, n), np.uint8)
        self.features = np.full(model.center.shape, np.nan)
        self._run_means = self.features[:model.n_run]
        self.worst = np.full(model.limit.shape, np.nan)
        self.where = np.zeros(model.limit.shape, np.int64)
        self.ratio: Float64 = np.full(model.limit.shape, np.nan)
        self._sums, self._counts = np.zeros(n), np.zeros(n + 1, np.int64)
        self._away = np.zeros(n)
        self.aside = np.zeros(n, bool)
        self.rows, self.running = 0, 0.0

    def begin(self) -> None:
        """Start with an empty part."""
        self.rows, self.running = 0, 0.0
        self.features[:] = np.nan
        self.worst[:] = np.nan
        self.ratio[:] = np.nan
        self.where[:] = 0
        self.aside[:] = False

    @property
    def kept(self) -> int:
        """Rows that are kept."""
        return min(self.rows, len(self.values))

    def row(self, values: Float64, valid: UInt8) -> bool:
        """Take one row, float64[c], uint8[c]; True where `running` may have changed."""
        n = self.rows
        self.rows = n + 1
        if n >= len(self.values):
            return False
        self.values[n] = values
        self.valid[n] = valid
        if not run_row(values, valid, n, self.model.width, self._sums, self._counts, self._run_means):
            return False
        k = int(n / self.model.width)
        self._judge_run(k, k + 1)
        return True

    def _judge_run(self, start: int, stop: int) -> None:
        model = self.model
        depart(self.features, model.center, model.spread, self.kind, start, stop, self.worst, self.where)
        np.divide(self.worst[RUN], model.limit[RUN], out=self.ratio[RUN])
        self.running = min(float(np.fmax.reduce(self.ratio[RUN], initial=0.0)), SCORE_CAP)

    def whole(self, values: Float64, valid: UInt8, aside: NDArray[np.bool_]) -> float:
        """Judge a whole part at once, float64[n, c], uint8[n, c]; as `begin`, `row` for each row, and `end`.

        aside : bool[c]
        """
        self.begin()
        self.aside[:] = aside
        self.rows = len(values)
        kept = self.kept
        self.values[:kept], self.valid[:kept] = values[:kept], valid[:kept]
        run_rows(self.values[:kept], self.valid[:kept], self.model.width, self._run_means)
        self._judge_run(0, self.model.n_run)
        return self.end()

    def drop(self, columns: NDArray[np.bool_]) -> None:
        """Take columns out of the part so far, bool[c]: what was seen of them is not to be trusted."""
        self.valid[:self.kept, columns] = 0
        self._sums[columns] = 0.0
        self._counts[:-1][columns] = 0
        for seen in (self.features, self.worst, self.ratio):
            seen[:, columns] = np.nan
        self.running = min(float(np.fmax.reduce(self.ratio[RUN], initial=0.0)), SCORE_CAP)

    def end(self) -> float:
        """Judge the whole part; return its score, NaN where too few of its cells are valid."""
        model = self.model
        if not self.enough():
            return math.nan
        # A part that is cut short or does not end has no phases to compare with those of whole ones.
        if model.rows[0] <= self.rows <= len(self.values):
            part_features(self.values, self.valid, self.rows, model.n_run, model.n_bins, model.n_phases, self.features)
            depart(self.features, model.center, model.spread, self.kind, model.n_run, len(self.kind), self.worst,
                   self.where)
        np.divide(self.worst, model.limit, out=self.ratio)
        return self.score()

    def enough(self) -> bool:
        """Whether a part can be judged: half its cells are valid, those of columns that a guard masks aside."""
        cells = self.valid[:self.kept, ~self.aside]
        return cells.size > 0 and float(cells.mean()) >= ENOUGH_VALID

    def score(self) -> float:
        """Return the score of a part that was judged."""
        largest = float(np.fmax.reduce(self.ratio, axis=None, initial=0.0))
        return min(max(largest, self.model.late(self.rows)), SCORE_CAP)

    def speed(self) -> float:
        """Return the speed of the part, 1 is usual, if that alone explains what was seen of it so far; else NaN.

        At that speed every column is in its corridor and none fits worse than at the usual speed; and two columns at
        least must have left their corridor of absolute time, or one tag that is wrong would be told as a wrong speed.
        """
        model = self.model
        off = int(np.sum(self.ratio[RUN] >= 1.0))
        if off < min(2, self.values.shape[1]):
            return math.nan
        bins = slice(model.n_run, model.n_run + model.n_bins)
        corridor = (model.center[bins], model.spread[bins], model.limit[BIN])
        usual = float(model.rows[1])
        stretched(self.values, self.valid, self.kept, usual, *corridor, self._away)
        allowed = np.maximum(self._away, FITS)
        many = self.kept * self.values.shape[1] > MANY_CELLS
        best, found = 1.0, math.nan
        for factor in np.geomspace(1 / MOST_SPEED, MOST_SPEED, FEW_SPEEDS if many else SPEEDS):
            stretched(self.values, self.valid, self.kept, usual * factor, *corridor, self._away)
            largest = float(self._away.max())
            if largest < best and bool((self._away <= allowed).all()):
                best, found = largest, 1 / float(factor)
        return found

    def shares(self, late: float, only_speed: bool, whole: bool) -> tuple[Float64, float]:
        """Return (how far each column is above half its limit, float64[c]; the same of the time).

        What only follows from the time that the part took is left out: a slow part leaves its corridor of absolute
        time in every tag that moves.
        """
        ratio = self.ratio
        if only_speed or (late >= 1.0 and not whole):
            used = []
        elif not whole:
            used = [RUN]
        elif late >= 1.0:
            used = [BIN, PHASE, SHAPE]
        else:
            used = list(range(len(KINDS)))
        largest = np.fmax.reduce(ratio[used], axis=0, initial=0.0) if used else np.zeros(ratio.shape[1])
        time = max(late, float(np.fmax.reduce(ratio[RUN], initial=0.0))) if only_speed else late
        return np.maximum(largest - SHARE_FROM, 0.0), max(time - SHARE_FROM, 0.0)
