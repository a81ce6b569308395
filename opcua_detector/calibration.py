"""Healthy-only calibration: residual -> surprise -> window mean -> score, where 1.0 is the limit.

Everything is indexed [state, channel, window]. Residuals are held out (five contiguous folds: fit on four, look
at the fifth; `detector.md` 3.1), so the limit is not set on rows that the model has learnt by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .api import Channel, Float64, Int64, Plugin, Record, UInt8
from .errors import RecordError
from .kernels.score import SCORE, forget, mean_surprise, score_rows, score_step

FOLDS = 5
GRID = 512  # entries of the held-out distribution kept per state and channel
KNEE_SHARE = 0.99  # above this quantile the tail takes over
MIN_SLOPE = 0.12  # smallest mean log excess: keeps a thin tail from shouting
CLUSTER_QUANTILE = 0.9  # windows above it form clusters; the highest cluster peaks set the limit
MIN_CLUSTERS, MAX_PEAKS = 10, 25
MIN_HELD_OUT = 1000
SUSPICIOUS_FACTOR = 3.0  # times the spread of the held-out windows: stretches unlike the rest
MAX_TRIMMED = 0.1  # share of windows that may be set apart as such
# A method that learns from this record alone is surprised by any healthy movement that the record happens not to
# hold, for as long as the movement lasts, and no record tells how often that will be. Where a method trained elsewhere
# stands beside it, its limit stays above such a stretch (simulated Lorenz plants: rare passes of 2 to 4 s with 2 to 5
# nats); alone it must do without, or it would find nothing.
NOVELTY_NATS, NOVELTY_ROWS = 5.0, 300
LIMIT_CAP = 7.0  # nats of mean surprise, of 12 possible: above it everything is as abnormal as can be told
STAT_FLOOR = 0.25  # nats: a limit is never below this mean surprise
KINDS = {"trans": 0, "bound": 1, "conf": 2}
DAY_S = 86400.0


@dataclass(frozen=True)
class Calibration:
    """What turns residuals into a score.

    channels : all channels of the monitor, in the order of the residual vector
    groups : names of the fusion groups, "<method>/<tag>"; score = max over them: a fault of one tag among many
        must not be averaged away
    group, kind : int64[n_channels]
    windows : int64[n_windows] rows
    states : learnt operating states; (0,) where no state tag is used
    grid : float64[n_states, n_channels, k]; level : float64[n_states, n_channels, k + 1]
    used : int64[n_states, n_channels]; entries of `grid` in use
    tail : float64[n_states, n_channels, 2]; knee and slope
    scale : float64[n_states, n_channels]; held-out root mean square, for contributions
    usual : float64[n_states, n_channels]; held-out mean surprise, for contributions
    limit : float64[n_states, n_groups, n_windows]; mean surprise that counts as 1.0
    notes : what the record cannot support
    """

    channels: tuple[Channel, ...]
    groups: tuple[str, ...]
    group: Int64
    kind: Int64
    windows: Int64
    states: tuple[int, ...]
    grid: Float64
    level: Float64
    used: Int64
    tail: Float64
    scale: Float64
    usual: Float64
    limit: Float64
    notes: tuple[str, ...] = field(default=())

    def scorer(self) -> Scorer:
        """Return the streaming form."""
        return Scorer(self)

    def score_rows(self, residual: Float64, gap: UInt8, state: Int64) -> tuple[Float64, Float64]:
        """Return (stats float64[n, n_groups, n_windows], outs float64[n, 6]) for a record of residuals."""
        return self.scorer().rows(residual, gap, state)


class Scorer:
    """Streaming form of a `Calibration`; `out` is laid out as in `kernels.score`."""

    def __init__(self, calibration: Calibration) -> None:
        n_channels, n_windows = len(calibration.channels), len(calibration.windows)
        length = int(calibration.windows.max())
        self.calibration = calibration
        self.ring = np.full((2, n_channels, length), np.nan)
        self.sums = np.zeros((n_channels, n_windows, 2, 3))
        self.stat = np.full((len(calibration.groups), n_windows), np.nan)
        self.cursor = np.zeros(2, np.int64)
        self.out = np.full(6, np.nan)
        c = calibration
        methods = [method_of(name) for name in c.groups]
        self._method_of_group = np.array([methods.index(name) for name in methods], np.int64)
        self._method = self._method_of_group[c.group]
        self._table = (c.grid, c.level, c.used, c.tail, c.group, c.kind, c.windows)

    def reset(self) -> None:
        """Empty the windows (after a gap)."""
        forget(self.ring, self.sums, self.cursor)
        self.out[SCORE] = np.nan

    def step(self, residual: Float64, state: int) -> None:
        """Take float64[n_channels]; write `out`. `state` is an index into `states`, -1 = not learnt."""
        score_step(residual, state, *self._table, self.ring, self.sums, self.stat, self.calibration.limit,
                   self.cursor, self.out)

    def rows(self, residual: Float64, gap: UInt8, state: Int64) -> tuple[Float64, Float64]:
        """As `Calibration.score_rows`."""
        n = residual.shape[0]
        stats = np.empty((n, *self.stat.shape))
        outs = np.empty((n, len(self.out)))
        score_rows(np.ascontiguousarray(residual), gap, state, *self._table, self.ring, self.sums, self.stat,
                   self.calibration.limit, self.cursor, self.out, stats, outs)
        return stats, outs

    def window_means(self, into: Float64) -> None:
        """Write the mean residual over the first window into float64[n_channels]; NaN where nothing is known."""
        counted = self.sums[:, 0, 1, 1]
        np.divide(self.sums[:, 0, 1, 0], counted, out=into, where=counted > 0)
        into[counted <= 0] = np.nan

    def channel_shares(self, state: int) -> Float64:
        """Return float64[n_channels]: weight of each channel of the leading method, by excess over its healthy level.

        Surprise is capped, so it is weighted by the plain residual in healthy units: among channels that are all
        off the scale the one that is furthest off leads.
        """
        share = np.zeros(len(self.calibration.channels))
        lead, window = int(self.out[1]), int(self.out[2])
        if lead < 0 or state < 0:
            return share
        counts = np.maximum(self.sums[:, window, :, 1], 1.0)
        surprise_mean = self.sums[:, window, 0, 0] / counts[:, 0]
        residual_mean = self.sums[:, window, 1, 0] / counts[:, 1]
        excess = np.maximum(surprise_mean - self.calibration.usual[state], 0.0)
        share[:] = excess * np.maximum(residual_mean, 0.0) / self.calibration.scale[state]
        share[self._method != self._method_of_group[lead]] = 0.0
        return share


def method_of(group: str) -> str:
    """Return the method of a fusion group, "<method>/<tag>"."""
    return group.split("/", 1)[0]


def held_out_residuals(plugin: Plugin, record: Record, params: object, full: Float64) -> Float64:
    """Return float64[n, n_channels] residuals of rows that the fitted model has not seen.

    `full` : float64[n, n_channels]; residuals of the model fitted on everything. A plugin that does not learn
    gives those at once, since it has seen none of the record.
    """
    if not plugin.learns:
        return full
    n = len(record)
    bounds = np.linspace(0, n, FOLDS + 1).astype(np.int64)
    out = np.full_like(full, np.nan)
    rows = np.arange(n)
    for start, stop in pairwise(bounds):
        rest = np.concatenate([rows[:start], rows[stop:]])
        method = plugin.open(plugin.fit(record.take(rest), params), record.tags)
        # Some rows before the fold warm the method up, so that the fold itself is judged whole.
        early = max(0, start - method.memory - method.lag)
        out[start:stop] = method.residuals(record.rows(int(early), int(stop)))[start - early:]
    return out


def calibrate(
    channels: Sequence[Channel], group_names: Sequence[str], held_out: Float64, gap: UInt8, state: Int64,
    states: Sequence[int], windows: Sequence[int], period_s: float, false_alarms_per_day: float,
    learnt_here: Sequence[str] = (),
) -> Calibration:
    """Calibrate channels on held-out healthy residuals.

    Parameters
    ----------
    held_out : float64[n, n_channels]
    group_names : fusion group of each channel, "<method>/<tag>"
    gap : uint8[n]; state : int64[n], index into `states`
    windows : rows; period_s : seconds per row; false_alarms_per_day : the alarm budget of this monitor
    learnt_here : methods whose model was fitted on this record, see `NOVELTY_NATS`

    Raises
    ------
    RecordError
        The record is too short to calibrate.
    """
    groups = tuple(dict.fromkeys(group_names))
    group = np.array([groups.index(name) for name in group_names], np.int64)
    kind = np.array([KINDS.get(c.kind, 9) for c in channels], np.int64)
    n_states, n_channels = len(states), len(channels)
    grid = np.zeros((n_states, n_channels, GRID))
    level = np.zeros((n_states, n_channels, GRID + 1))
    used = np.zeros((n_states, n_channels), np.int64)
    tail = np.zeros((n_states, n_channels, 2))
    scale = np.ones((n_states, n_channels))
    for s in range(n_states):
        for c in range(n_channels):
            x = held_out[state == s, c]
            x = x[~np.isnan(x)]
            if len(x) < MIN_HELD_OUT:
                where = f"channel {channels[c].kind} of {channels[c].column}"
                if n_states > 1:
                    where += f" in state {states[s]}"
                raise RecordError(
                    f"the healthy record is too short to calibrate: {len(x)} judged rows, {MIN_HELD_OUT} needed",
                    where=where, next_step="fit on a longer healthy record")
            used[s, c], tail[s, c] = _distribution(x, grid[s, c], level[s, c])
            scale[s, c] = max(math.sqrt(float(np.mean(x * x))), 1e-9)
    plain = Calibration(
        tuple(channels), groups, group, kind, np.array(windows, np.int64), tuple(int(s) for s in states), grid, level,
        used, tail, scale, np.zeros_like(scale), np.ones((n_states, len(groups), len(windows))))
    return _with_limits(plain, held_out, gap, state, period_s, false_alarms_per_day, learnt_here)


def _distribution(x: Float64, grid: Float64, level: Float64) -> tuple[int, tuple[float, float]]:
    """Fill grid and level (see `kernels.score.surprise`) from held-out residuals; return entries used and the tail."""
    n = len(x)
    ordered = np.sort(x)
    distinct = np.unique(ordered)
    if len(distinct) > GRID:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, GRID), method="nearest"))
    below = np.searchsorted(ordered, distinct, side="left")
    k = len(distinct)
    grid[:k] = distinct
    level[:k] = -np.log((n - below + 1) / (n + 1))
    level[k:] = math.log(n + 1)
    knee = float(np.quantile(ordered, KNEE_SHARE))
    beyond = ordered[ordered > knee]
    if knee <= 0 or len(beyond) < MIN_CLUSTERS:
        return k, (math.inf, 1.0)
    # Beyond the knee the tail starts from the knee's own surprise; level[k] carries it.
    level[k] = -math.log(1 - KNEE_SHARE)
    return k, (knee, max(MIN_SLOPE, float(np.mean(np.log(beyond / knee)))))


def _with_limits(
    plain: Calibration, held_out: Float64, gap: UInt8, state: Int64, period_s: float, per_day: float,
    learnt_here: Sequence[str],
) -> Calibration:
    """Set the limit of each group and window by peaks over threshold with an exponential tail (`detector.md` 8)."""
    scorer = plain.scorer()
    stats, _ = scorer.rows(held_out, gap, state)
    rate = per_day / DAY_S * period_s / (len(plain.groups) * len(plain.windows))
    limit = np.ones_like(plain.limit)
    beside = any(method_of(name) not in learnt_here for name in plain.groups)
    short: dict[tuple[str, int], float] = {}
    for s in range(len(plain.states)):
        rows = state == s
        for g, name in enumerate(plain.groups):
            for w, window in enumerate(plain.windows):
                limit[s, g, w], clusters, windows = _tail_limit(stats[rows, g, w], int(window), rate)
                if method_of(name) in learnt_here and beside:
                    novelty = NOVELTY_NATS * min(1.0, NOVELTY_ROWS / int(window))
                    limit[s, g, w] = max(limit[s, g, w], novelty)
                if clusters < MIN_CLUSTERS:
                    short[method_of(name), int(window)] = windows * period_s / 3600
    notes = [f"{method}, window of {window} rows: the healthy record ({hours:.2f} h) has too few peaks to support "
             f"{per_day:g} false alarms a day; the limit is set above all that was seen"
             for (method, window), hours in short.items()]
    usual = np.zeros_like(plain.usual)
    for s in range(len(plain.states)):
        usual[s] = _mean_surprise(plain, held_out[state == s], s)
    return Calibration(**{**plain.__dict__, "limit": limit, "usual": usual, "notes": tuple(notes)})


def _mean_surprise(plain: Calibration, held_out: Float64, s: int) -> Float64:
    """Return float64[n_channels]: mean surprise of healthy rows in state s."""
    return np.array([
        mean_surprise(np.ascontiguousarray(held_out[:, c]), plain.grid[s, c], plain.level[s, c], plain.used[s, c],
                      plain.tail[s, c, 0], plain.tail[s, c, 1])
        for c in range(len(plain.channels))])


def unlike_the_rest(stat: Float64, window: int) -> list[Int64]:
    """Return runs of rows (int64 arrays) whose window mean of surprise stands far above the bulk.

    stat : float64[n], NaN = no window. At most `MAX_TRIMMED` of the windows are set apart: more is no exception.
    """
    known = stat[~np.isnan(stat)]
    if len(known) == 0:
        return []
    usual, high = np.quantile(known, [0.5, 0.9])
    bar = usual + SUSPICIOUS_FACTOR * max(high - usual, 0.1 * usual, 0.1)
    above = np.flatnonzero(np.nan_to_num(stat, nan=-1.0) > bar)
    if len(above) == 0 or len(above) > MAX_TRIMMED * len(known):
        return []
    return np.split(above, np.flatnonzero(np.diff(above) > window) + 1)


def _tail_limit(stat: Float64, window: int, rate: float) -> tuple[float, int, int]:
    """Return (limit, clusters, windows): limit = u + m ln(lambda / rate) or more, never below all that was seen.

    Windows above the 90 % quantile form clusters; of the cluster peaks the highest quarter (10 to 25) counts: u is
    the next lower peak, m their mean excess over it, lambda their number per row. The larger of this exponential tail
    and of the same in the logarithm (Hill: u exp(mean ln(peak / u) ln(lambda / rate))) is taken: on 32 simulated
    plants the first alone broke the alarm budget in 5 healthy hours, both together in none. Fitted lower down, an
    exponential tail overshoots; generalised Pareto fits were unstable.

    stat : float64[n]; held-out window means of surprise; rate : wanted false alarms per row. Stretches unlike the
    rest count too (the fit names them): a plant that has had them will have them again.
    """
    known = np.flatnonzero(~np.isnan(stat))
    if len(known) == 0:
        return STAT_FLOOR, 0, 0
    x = stat[known]
    seen = float(x.max())
    above = known[x > np.quantile(x, CLUSTER_QUANTILE)]
    if len(above) == 0:
        return max(seen * 1.5, STAT_FLOOR), 0, len(known)
    starts = np.append(0, np.flatnonzero(np.diff(above) > window) + 1)
    peaks = np.sort(np.maximum.reduceat(stat[above], starts))
    highest = min(len(peaks) - 1, max(MIN_CLUSTERS, min(MAX_PEAKS, len(peaks) // 4)))
    if highest < 1:
        return max(seen * 1.5, STAT_FLOOR), len(peaks), len(known)
    base = float(peaks[-highest - 1])
    ahead = max(0.0, math.log(highest / len(known) / rate))
    limit = base + float(np.mean(peaks[-highest:] - base)) * ahead
    if base > 0:
        limit = max(limit, base * math.exp(float(np.mean(np.log(peaks[-highest:] / base))) * ahead))
    return min(max(limit, seen * 1.05, STAT_FLOOR), LIMIT_CAP), len(peaks), len(known)
