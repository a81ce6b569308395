"""Evidence of an alert: which rows and which residuals made it, and in what direction."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..allowances import CALM, REGRESSION, Scale, calm_residual
from ..api import Float64, Int64
from .bench import Bench
from .deltas import TRANSITION, fitted_methods

LEAST_SHARE: Final = 0.2  # of the excess of the channel that is most off: others are let alone, if that is enough


class Evidence:
    """What of some rows made an alert; grows with `look_at`.

    rows : bool[n]; rows in the windows of the views that alarmed, less those that are kept back
    alarming : bool[n_views]
    base : float64[n, n_channels]; residuals of the methods as they were fitted; signed : with their direction
    calm : float64[n, n_channels]; what an excused residual counts as at least
    column : int64[n_channels]; the column of each channel; plugins : the plugin of each
    transition, directed : bool[n_channels]; channels of transition methods, channels with a direction
    reach : rows that the methods look back
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.model = bench, bench.model
        self.fitted = fitted_methods(self.model)
        self.signed = bench.signed(self.fitted)
        self.base: Float64 = np.abs(self.signed)
        self.rows = np.zeros(len(bench.record), bool)
        self.alarming = np.zeros(len(self.model.calibration.views), bool)
        self.scale = Scale(self.model)
        self._energy = self.model.calibration.scorer().energies(self.base, bench.state)
        self._least_share = LEAST_SHARE
        at = {c.name: i for i, c in enumerate(self.model.plan.columns)}
        self.column = np.array([at[c.column] for c in self.model.calibration.channels], np.int64)
        calm = calm_residual(self.model.calibration, CALM[0])
        self.calm: Float64 = np.where((bench.state >= 0)[:, None], calm[np.maximum(bench.state, 0)], np.inf)
        methods = [bench.method(m)[0] for m in self.fitted]
        self.plugins = [m.plugin for m, method in zip(self.fitted, methods, strict=True) for _ in method.channels]
        self.transition = np.array(self.plugins) == TRANSITION
        self.directed = np.array(self.plugins) == REGRESSION
        self.reach = max(method.lag + method.memory for method in methods)
        self.context = 2 * max((method.lag for method, m in zip(methods, self.fitted, strict=True)
                                if m.plugin == TRANSITION), default=0)

    def look_at(self, rows: Int64, views: Float64, bar: float = 1.0, *, relax: bool = False) -> None:
        """Add the evidence of rows that alarm: rows int64[m], views float64[n, n_views] over their limits.

        relax : also take in channels that matter less
        """
        calibration = self.model.calibration
        starts = np.flatnonzero(self.bench.gap)
        for v, view in enumerate(calibration.views):
            with np.errstate(invalid="ignore"):
                own = rows[views[rows, v] >= bar]
            if len(own) == 0:
                continue
            window = int(calibration.windows[list(view.windows)].max())
            first = np.maximum(own - window + 1, starts[np.searchsorted(starts, own, side="right") - 1])
            mark = np.zeros(len(self.rows) + 1, np.int64)
            np.add.at(mark, first, 1)
            np.add.at(mark, own + 1, -1)
            self.rows |= (np.cumsum(mark[:-1]) > 0) & ~self.bench.kept_back
            self.alarming[v] = True
        if relax:
            self._least_share *= 0.25

    def off(self, residual: Float64 | None = None) -> NDArray[np.bool_]:
        """Return bool[n, n_channels]: evidence above what an excused residual counts as, of channels that matter.

        residual : float64[n, n_channels]; default: `base`
        """
        usual = self.model.calibration.usual[np.maximum(self.bench.state, 0)]
        excess = np.nan_to_num(np.maximum(self._energy - usual, 0.0)[self.rows]).sum(axis=0)
        matter = np.zeros(len(excess), bool)
        for view in np.array(self.model.calibration.views, object)[self.alarming]:
            own = [c for group in view.groups for c in group]
            matter[own] |= excess[own] >= self._least_share * excess[own].max(initial=0.0)
        with np.errstate(invalid="ignore"):
            return self.rows[:, None] & matter & ((self.base if residual is None else residual) > self.calm)

    def reaches(self) -> dict[str, list[float]]:
        """Return tag -> [how far it is off in healthy deviations, which way (-1, 0, 1), 1]."""
        off = self.off()
        usual = np.maximum(self.model.calibration.scale[0], 1e-12)
        found: dict[str, list[float]] = {}
        plan = self.model.plan
        total = np.where(off, self.base / usual, 0.0).sum(axis=0)
        for c in np.flatnonzero(off.any(axis=0) & (total >= 0.1 * total.max(initial=0.0))):
            level = float(np.quantile(self.base[off[:, c], c], 0.9)) / usual[c]
            column = plan.columns[self.column[c]].name
            tag = plan.owner(column)
            if tag not in found or level > found[tag][0]:
                found[tag] = [level, self._way(int(c), off[:, c]) if self.directed[c] else 0.0, 1.0]
        return found

    def _way(self, channel: int, rows: NDArray[np.bool_]) -> float:
        """Return the direction of a channel's residuals, 0 where it has none."""
        away = self.signed[rows, channel]
        return float(np.sign(away.mean())) if abs(away.mean()) > away.std() else 0.0
