"""Healthy-only calibration: residual -> energy -> window means -> views -> score, where 1.0 is the limit.

Residuals are held out (five contiguous folds: fit on four, look at the fifth; `detector.md` 3.1), so the limit is not
set on rows that the model has learnt by heart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np

from .api import Channel, Float64, Int64, MethodModel, Plugin, Record, UInt8
from .errors import RecordError
from .kernels.score import (
    BESIDE,
    FIXED,
    HEADER,
    LAMP,
    LEADING,
    LEAST,
    OUT,
    PLAIN,
    SCORE,
    SQUARE,
    SURPRISE,
    forget,
    score_rows,
    score_step,
    soft,
    transform_rows,
)
from .limits import CLUSTER_QUANTILE, MIN_CLUSTERS, tail_limit
from .views import ERROR_KINDS, FIXED_KINDS, PREDICTED, Part, View, choose_windows, compose, is_nonlinear

FOLDS = 5
GRID = 512  # entries of the held-out distribution kept per state and channel
KNEE_SHARE = 0.99  # above this quantile the tail takes over
MIN_SLOPE = 0.12  # smallest mean log excess: keeps a thin tail from shouting
MIN_HELD_OUT = 150  # judged rows of a channel
MIN_SPREAD = 0.05  # of the logarithm of a mean: keeps a flat one from shouting
REPORT_WINDOW = 100  # rows over which residuals are told
LEAST_SCALE = 1e-9
KINDS = {"trans": 0, "bound": 1, "conf": 2}
DAY_S = 86400.0
UNSUPPORTED = 1e6  # healthy spreads; limit of a view that the record cannot support
ENOUGH_ALARMS = 10.0  # that the budget allows in the record: their number is known within a factor of two
ONE_ALERT_S = 0.5  # alarms closer than that are one
MOST_CORRECTION = (0.5, 2.0)  # of the limits, to the budget
UNEVEN = 13.28  # chi square of 4 degrees of freedom that chance exceeds in 1 of 100: alarms over the folds
LEADING_SHARE = 0.5  # of the alarm budget; the views beside share the rest
# A method that learns from this record alone is surprised by any healthy movement that the record happens not to
# hold, for as long as the movement lasts, and no record tells how often that will be. Beside a predictor, or a method
# trained elsewhere, its limit stays above such a stretch (simulated Lorenz plants: rare passes of 2 to 4 s with 2 to 5
# nats); alone it must do without, or it would find nothing.
NOVELTY_NATS, NOVELTY_ROWS = 5.0, 300
MOST_NATS = 12.0  # of mean surprise, of 30 possible: above it everything is as abnormal as can be told

_ROLES: Final = {"leading": LEADING, "beside": BESIDE, "fixed": FIXED, "lamp": LAMP}


@dataclass(frozen=True)
class Calibration:
    """What turns residuals into a score.

    channels : all channels of the monitor, in the order of the residual vector
    views : see `opcua_detector.views`; score = the largest of them over its limit
    transform, slot : int64[n_channels]; how a residual becomes energy, and its distribution where it is a surprise
    windows : int64[n_windows] rows
    states : learnt operating states; (0,) where no state tag is used
    grid : float64[n_states, n_slots, k]; level : float64[n_states, n_slots, k + 1]
    used : int64[n_states, n_slots]; entries of `grid` in use
    tail : float64[n_states, n_slots, 2]; knee and slope
    scale : float64[n_states, n_channels]; held-out root mean square
    usual : float64[n_states, n_channels]; held-out mean energy
    weight : float64[n_states, n_terms]; offset : float64[n_states, n_views]; limit : float64[n_states, n_views]
    notes : what the record cannot support
    floor : float64[n_channels]; a residual counts as no smaller: the resolution of the tag; no entry: all 0
    absent : float64[n_channels, n_columns]; times by which a residual grows while a column is missing, at least 1; no
        entry: not known (`opcua_detector.absence`)
    """

    channels: tuple[Channel, ...]
    views: tuple[View, ...]
    transform: Int64
    slot: Int64
    windows: Int64
    states: tuple[int, ...]
    grid: Float64
    level: Float64
    used: Int64
    tail: Float64
    scale: Float64
    usual: Float64
    weight: Float64
    offset: Float64
    limit: Float64
    notes: tuple[str, ...] = field(default=())
    floor: Float64 = field(default_factory=lambda: np.zeros(0))
    absent: Float64 = field(default_factory=lambda: np.zeros((0, 0)))

    def in_logs(self, view: View) -> bool:
        """Whether a view adds logarithms of its terms: those of squares, a surprise is a logarithm already."""
        return bool((self.transform[[c for group in view.groups for c in group]] == SQUARE).any())

    def scorer(self, tag: Int64 | None = None, n_tags: int = 0) -> Scorer:
        """Return the streaming form; tag int64[n_channels], n_tags: see `Scorer`."""
        return Scorer(self, tag, n_tags)

    def score_rows(self, residual: Float64, gap: UInt8, state: Int64) -> Float64:
        """Return outs float64[n, 6] (layout: `kernels.score`) for a record of residuals."""
        return self.scorer().rows(residual, gap, state)[0]


class Scorer:
    """Streaming form of a `Calibration`.

    Parameters
    ----------
    tag : int64[n_channels]; index of the tag that each channel speaks of, below n_tags; by default each of its own

    Attributes
    ----------
    out : float64[6], laid out as in `kernels.score`
    means : float64[n_channels]; mean residual over the last rows, NaN where nothing is known
    shares : float64[n_tags]; part of each tag in what makes the score, sums to 1; all 0 while nothing does. Both are
        written by each `step`
    """

    def __init__(self, calibration: Calibration, tag: Int64 | None = None, n_tags: int = 0) -> None:
        c = calibration
        self.calibration = c
        n, n_windows, n_views = len(c.channels), len(c.windows), len(c.views)
        terms = [term for view in c.views for term in view.terms]
        length = int(c.windows.max())
        self._report = min(REPORT_WINDOW, length)
        last = np.cumsum([len(group) for group, _ in terms])
        first = last - [len(group) for group, _ in terms]
        view_first = np.cumsum([0, *(len(view.terms) for view in c.views)])
        owner = np.arange(n) if tag is None else tag
        n_tags = n_tags or n
        head = [n, n_windows, len(terms), n_views, c.used.shape[1], c.grid.shape[2], length, self._report, n_tags]
        assert len(head) == HEADER
        self._ints = np.concatenate([
            head, c.transform, c.slot, [KINDS.get(channel.kind, 9) for channel in c.channels], c.windows, first, last,
            [w for _, w in terms], view_first, [_ROLES[view.role] for view in c.views],
            [int(c.in_logs(view)) for view in c.views], owner,
            np.array([m for group, _ in terms for m in group])]).astype(np.int64)
        self._tables = self._pack_tables()
        self._ring = np.empty(length * n)
        self._raw = np.empty(self._report * n)
        told = 3 * n_windows * n + 5 * n + len(terms) + n_views
        self._memory = np.zeros(told + 2 * n + n_tags)
        self.means, self.shares = self._memory[told:told + n], self._memory[told + n:told + n + n_tags]
        self._cursor = np.zeros(3, np.int64)
        self._floor = c.floor if len(c.floor) and c.floor.max() > LEAST_SCALE else None
        self._floored = np.empty(n)
        self.out = np.full(OUT, np.nan)

    def _pack_tables(self) -> Float64:
        c = self.calibration
        rows = []
        for s in range(len(c.states)):
            slots = [np.concatenate([c.tail[s, k], [float(c.used[s, k])], c.grid[s, k], c.level[s, k]])
                     for k in range(c.used.shape[1])]
            top = [limit if view.role == "fixed" else soft(limit)
                   for view, limit in zip(c.views, c.limit[s], strict=True)]
            rows.append(np.concatenate([c.scale[s], c.usual[s], c.weight[s], c.offset[s], c.limit[s], top, *slots]))
        return np.ascontiguousarray(rows, dtype=np.float64)

    def reset(self) -> None:
        """Empty the windows (after a gap)."""
        forget(self._ints, self._cursor)
        self.out[SCORE] = np.nan

    def forget_told(self) -> None:
        """Say nothing in `means` and `shares` until the next row."""
        self.means.fill(np.nan)
        self.shares.fill(0.0)

    def step(self, residual: Float64, state: int) -> None:
        """Take float64[n_channels]; write `out`, `means` and `shares`.

        state : index into the calibration's `states`, -1 = not learnt
        """
        if self._floor is not None:
            residual = np.maximum(residual, self._floor, out=self._floored)
        score_step(residual, state, self._ints, self._tables, self._ring, self._raw, self._memory, self._cursor,
                   self.out)

    def rows(
        self, residual: Float64, gap: UInt8, state: Int64, *, details: bool = False,
    ) -> tuple[Float64, Float64, Float64]:
        """Return (outs float64[n, 6], and with details: terms float64[n, n_terms], values float64[n, n_views])."""
        n = residual.shape[0]
        if self._floor is not None:
            residual = np.maximum(residual, self._floor)
        outs = np.empty((n, OUT))
        stats = np.empty((n if details else 0, self._ints[2]))
        values = np.empty((n if details else 0, self._ints[3]))
        score_rows(np.ascontiguousarray(residual), gap, state, self._ints, self._tables, self._ring, self._raw,
                   self._memory, self._cursor, self.out, outs, stats, values)
        return outs, stats, values

    def energies(self, residual: Float64, state: Int64) -> Float64:
        """Return float64[n, n_channels]: the energy of each residual."""
        if self._floor is not None:
            residual = np.maximum(residual, self._floor)
        residual = np.ascontiguousarray(residual)  # a method's batch may come column by column
        out = np.empty_like(residual)
        transform_rows(residual, np.ascontiguousarray(state, np.int64), self._ints, self._tables, out)
        return out


def held_out_residuals(
    plugin: Plugin, record: Record, params: Any, full: Float64, channels: Sequence[Channel] = (),
    whole: MethodModel | None = None,
) -> Float64:
    """Return float64[n, n_channels] residuals of rows that the fitted model has not seen.

    `full` : float64[n, n_channels]; residuals of the model fitted on everything. A plugin that does not learn
    gives those at once, since it has seen none of the record. `channels` : those of `full`; a channel that a fold
    does not have (a tag that stood still in the other folds) is NaN there. `whole` : the model fitted on everything.

    A plugin that chooses by the record, or spends time on what no residual hangs on, may have a
    `fit_fold(record, params, whole)`, which chooses as `whole` did and leaves that out.
    """
    if not plugin.learns:
        return full
    fold_of = getattr(plugin, "fit_fold", None)
    n = len(record)
    bounds = np.linspace(0, n, FOLDS + 1).astype(np.int64)
    out = np.full_like(full, np.nan)
    rows = np.arange(n)
    for start, stop in pairwise(bounds):
        rest = np.concatenate([rows[:start], rows[stop:]])
        part = record.take(rest)
        model = plugin.fit(part, params) if fold_of is None or whole is None else fold_of(part, params, whole)
        method = plugin.open(model, record.tags)
        # Some rows before the fold warm the method up, so that the fold itself is judged whole.
        early = max(0, start - method.memory - method.lag)
        fold = method.residuals(record.rows(int(early), int(stop)))[start - early:]
        own = {channel: k for k, channel in enumerate(method.channels)}
        for k, channel in enumerate(channels or method.channels):
            if channel in own:
                out[start:stop, k] = fold[:, own[channel]]
    return out


def calibrate(
    parts: Sequence[Part], held_out: Float64, gap: UInt8, state: Int64, states: Sequence[int],
    windows: Sequence[int], period_s: float, false_alarms_per_day: float, learnt_here: Sequence[str] = (),
    floor: Float64 | None = None,
) -> Calibration:
    """Calibrate channels on held-out healthy residuals.

    Parameters
    ----------
    parts : the methods with their channels, in the order of the residual vector
    held_out : float64[n, n_channels]
    gap : uint8[n]; state : int64[n], index into `states`
    windows : rows, empty = automatic; period_s : seconds per row; false_alarms_per_day : the alarm budget
    learnt_here : labels of methods whose model was fitted on this record, see `NOVELTY_NATS`
    floor : float64[n_channels]; residuals up to it are the resolution of the tag and no surprise, and no scale is
        smaller: a near-constant tag must not hold the alarm on by moving one step (`detector.md` 3.8)

    Raises
    ------
    RecordError
        The record is too short to calibrate.
    """
    channels = tuple(channel for part in parts for channel in part.channels)
    n_states, n_channels = len(states), len(channels)
    nonlinear = is_nonlinear(parts)
    transform = np.array([_transform(part, c, nonlinear) for part in parts for c in part.channels], np.int64)
    slot = np.where(transform == SURPRISE, np.cumsum(transform == SURPRISE) - 1, -1)
    n_slots = int((transform == SURPRISE).sum())
    grid, level = np.zeros((n_states, n_slots, GRID)), np.zeros((n_states, n_slots, GRID + 1))
    used, tail = np.zeros((n_states, n_slots), np.int64), np.zeros((n_states, n_slots, 2))
    scale = np.ones((n_states, n_channels))
    for s in range(n_states):
        for c in range(n_channels):
            x = held_out[state == s, c]
            x = x[~np.isnan(x)]
            if floor is not None:
                x = np.maximum(x, floor[c])
            if len(x) < MIN_HELD_OUT and transform[c] != PLAIN:  # a plain residual brings its own limit
                where = f"channel {channels[c].kind} of {channels[c].column}"
                if n_states > 1:
                    where += f" in state {states[s]}"
                raise RecordError(
                    f"the healthy record is too short to calibrate: {len(x)} judged rows, {MIN_HELD_OUT} needed",
                    where=where, next_step="fit on a longer healthy record")
            if slot[c] >= 0:
                used[s, slot[c]], tail[s, slot[c]] = _distribution(x, grid[s, slot[c]], level[s, slot[c]])
            if len(x):
                scale[s, c] = max(math.sqrt(float(np.mean(x * x))), LEAST_SCALE)
    rows_per_state = min(int((state == s).sum()) for s in range(n_states))
    chosen = choose_windows(windows, nonlinear, rows_per_state)
    views = compose(parts, chosen, nonlinear, bool(windows))
    n_terms = sum(len(view.terms) for view in views)
    plain = Calibration(
        channels, views, transform, slot, np.array(chosen, np.int64), tuple(int(s) for s in states), grid, level, used,
        tail, scale, np.zeros_like(scale), np.ones((n_states, n_terms)), np.zeros((n_states, len(views))),
        np.ones((n_states, len(views))), floor=np.zeros(n_channels) if floor is None else floor)
    usual = _usual(plain, held_out, state)
    plain = dataclasses.replace(plain, usual=usual)
    _, stats, _ = plain.scorer().rows(held_out, gap, state, details=True)
    plain = _standardised(plain, stats, state)
    return _limited(plain, parts, view_values(plain, stats, state), state, period_s, false_alarms_per_day, learnt_here)


def _transform(part: Part, channel: Channel, nonlinear: bool) -> int:
    """Squares on a linear plant (surprise costs up to .1 AUC there); surprise where errors have heavy tails."""
    if channel.kind in FIXED_KINDS:
        return PLAIN
    return SQUARE if part.predicts and channel.kind in ERROR_KINDS and not nonlinear else SURPRISE


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


def _usual(plain: Calibration, held_out: Float64, state: Int64) -> Float64:
    """Return float64[n_states, n_channels]: mean energy of healthy rows."""
    energy = plain.scorer().energies(held_out, state)
    usual = np.zeros_like(plain.usual)
    for s in range(len(plain.states)):
        known = ~np.isnan(energy) & (state == s)[:, None]
        usual[s] = energy.sum(axis=0, where=known) / np.maximum(known.sum(axis=0), 1)
    return usual


def _standardised(plain: Calibration, stats: Float64, state: Int64) -> Calibration:
    """Set weight and offset, so that each view has healthy median 0 and spread 1 (84 % quantile less median).

    stats : float64[n, n_terms]; see `Scorer.rows`
    """
    weight, offset = plain.weight.copy(), plain.offset.copy()
    at = 0
    for v, view in enumerate(plain.views):
        own = slice(at, at + len(view.terms))
        at += len(view.terms)
        if view.role == "fixed":
            continue
        for s in range(len(plain.states)):
            rows = stats[state == s, own]
            rows = rows[~np.isnan(rows).any(axis=1)]
            if len(rows) == 0:
                continue
            together = (np.log(rows + LEAST) if plain.in_logs(view) else rows).sum(axis=1)
            centre, top = np.quantile(together, [0.5, 0.84])
            spread = max(float(top - centre), MIN_SPREAD * len(view.terms))
            weight[s, own] = 1.0 / spread
            offset[s, v] = float(centre) / spread
    return dataclasses.replace(plain, weight=weight, offset=offset)


def _to_the_budget(
    plain: Calibration, limit: Float64, values: Float64, state: Int64, expected: float, period_s: float,
) -> tuple[Float64, Int64]:
    """Return (float64[n_views]: factors by which the limits give just the expected number of alarms on the record,
    int64[FOLDS]: how many of those alarms each fold has).

    The views share the budget without knowing when another one alarms, and a tail that ends (a plant without noise)
    ends before the exponential one: on 12 h of the simulated plants the limits let through .2 to .5 of the budget.
    """
    ours = np.array([view.role in ("leading", "beside") for view in plain.views])
    highest = np.full(len(values), -np.inf)
    for v in np.flatnonzero(ours):
        np.fmax(highest, values[:, v] / limit[np.maximum(state, 0), v], out=highest)
    highest[state < 0] = -np.inf
    above = np.flatnonzero(highest > np.quantile(highest[state >= 0], CLUSTER_QUANTILE))
    starts = np.append(0, np.flatnonzero(np.diff(above) * period_s > ONE_ALERT_S) + 1)
    peaks = np.maximum.reduceat(highest[above], starts) if len(above) else np.zeros(0)
    k = round(expected)
    if len(peaks) <= k:
        return np.ones(len(ours)), np.zeros(FOLDS, np.int64)
    order = np.argsort(peaks)
    alarms = above[starts[order[-k:]]]
    return (np.where(ours, np.clip(peaks[order[-k - 1]], *MOST_CORRECTION), 1.0),
            np.bincount(alarms * FOLDS // len(values), minlength=FOLDS))


def _uneven(alarms: Int64, hours: float, per_day: float) -> tuple[str, ...]:
    """Return a note where the alarms that a limit allows in the record lie in some folds more often than by chance.

    Then the models of the parts differ in how high a healthy row takes them, and so may the model of the whole: the
    alarms to come may be several times those asked for, or a part of them (seen: throttle without noise, 1, 5 and 10
    of 12 on three records).
    """
    total = int(alarms.sum())
    if total == 0 or float(((alarms - total / FOLDS) ** 2).sum()) / (total / FOLDS) <= UNEVEN:
        return ()
    return (f"the parts of the healthy record ({hours:.2f} h) do not agree on the limit: of {total} alarms that it "
            f"allows there, {int(alarms.max())} lie in one fifth of it, so {per_day:g} false alarms a day cannot be "
            "vouched for: there may be several times as many, or far fewer; a longer record would tell",)


def view_values(calibration: Calibration, stats: Float64, state: Int64) -> Float64:
    """Return float64[n, n_views]: what `Scorer.rows` gives beside its terms, from these (to rounding).

    Terms hang on no weight, so a fit that sets the weights by them need not run through the record again.

    stats : float64[n, n_terms]; state : int64[n]
    """
    c = calibration
    values = np.full((len(stats), len(c.views)), np.nan)
    at = 0
    for v, view in enumerate(c.views):
        own = slice(at, at + len(view.terms))
        at += len(view.terms)
        for s in range(len(c.states)):
            here = state == s
            terms = stats[here, own]
            if view.role == "fixed":
                values[here, v] = terms.sum(axis=1)
            elif c.in_logs(view):
                values[here, v] = c.weight[s, own.start] * np.log((terms + LEAST).prod(axis=1)) - c.offset[s, v]
            else:
                values[here, v] = terms @ c.weight[s, own] - c.offset[s, v]
    return values


def _limited(
    plain: Calibration, parts: Sequence[Part], values: Float64, state: Int64, period_s: float, per_day: float,
    learnt_here: Sequence[str],
) -> Calibration:
    """Set the limit of each view from the alarm budget; values float64[n, n_views], held out."""
    rate = per_day / DAY_S * period_s
    leading = sum(view.role == "leading" for view in plain.views)
    beside = sum(view.role == "beside" for view in plain.views)
    share = {"leading": (LEADING_SHARE if beside else 1.0) / max(leading, 1),
             "beside": (1 - LEADING_SHARE if leading else 1.0) / max(beside, 1), "lamp": 1.0}
    labels = [part.label for part in parts for _ in part.channels]
    company = any(view.name == "all" for view in plain.views) or any(p.label not in learnt_here for p in parts)
    limit = plain.limit.copy()
    short: set[int] = set()
    at = 0
    for v, view in enumerate(plain.views):
        first = at
        at += len(view.terms)
        if view.role == "fixed":
            continue
        own = plain.windows[list(view.windows)]
        longest, typical = int(own.max()), float(np.exp(np.log(own).mean()))
        novel = view.tag and not plain.in_logs(view) and not view.name.startswith(PREDICTED)
        for s in range(len(plain.states)):
            limit[s, v], clusters = tail_limit(values[state == s, v], typical, rate * share[view.role],
                                               normal=plain.in_logs(view))
            if novel:
                def nats(mean: float, s: int = s, v: int = v, first: int = first) -> float:
                    return float(plain.weight[s, first] * mean - plain.offset[s, v])

                if company and labels[view.groups[0][0]] in learnt_here:
                    limit[s, v] = max(limit[s, v], nats(NOVELTY_NATS * min(1.0, NOVELTY_ROWS / longest)))
                limit[s, v] = min(limit[s, v], nats(MOST_NATS))
            if clusters < MIN_CLUSTERS:
                short.add(longest)
                if view.role == "beside":  # so many views on so few independent windows: one of them would always alarm
                    limit[s, v] = UNSUPPORTED
    hours = len(values) * period_s / 3600
    expected = rate * len(values)
    notes: tuple[str, ...] = ()
    if short:
        of = ", ".join(map(str, sorted(short)))
        notes = (f"the healthy record ({hours:.2f} h) has too few peaks over windows of {of} rows to support "
                 f"{per_day:g} false alarms a day; their limits stand above all that was seen",)
    elif expected < ENOUGH_ALARMS:
        notes = (f"the healthy record ({hours:.2f} h) is too short to show that {per_day:g} false alarms a day are "
                 f"kept: the limit is a careful guess beyond it, and "
                 f"{hours * ENOUGH_ALARMS / expected:.3g} h of record would show it",)
    else:
        factors, alarms = _to_the_budget(plain, limit, values, state, expected, period_s)
        limit *= factors
        notes = _uneven(alarms, hours, per_day)
    return dataclasses.replace(plain, limit=limit, notes=notes)
