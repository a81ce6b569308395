"""The method `checks`: a floor under the learnt ones. Range, rate and stuck value of each judged tag, by itself.

Three channels per judged column, each in units of its own limit, so that 1.0 is an alarm whatever the other methods
say; all are 0 within what the healthy record held:

    range   distance outside the healthy min .. max
    rate    how much the step from one row to the next exceeds the largest healthy one
    stuck   how much a run of identical values is longer than the longest healthy one

How far beyond the healthy extreme 1.0 lies (the allowance) is the largest of a share of the extreme, the resolution of
the column, and twice what one fifth of the record went beyond the other four: a healthy record that keeps finding new
extremes will go on doing so. A column that seldom changes has no stuck check, and one that went less than 30 times
from its lower to its upper quarter or back has no range check: a slow tag has not shown its range in such a record
(slow temperatures of a water rig and of a reactor went up to 1.8 spans beyond theirs within the hour).

A column that hardly ever moved in the healthy record has a range and a rate check alone, and far wider ones: nothing
says how it moves, so what counts is that it leaves its values by far (`far_from`).

Masks: a masked value gets no residual; it neither counts to a run nor ends it. A value that already stands for one
allowance longer than ever goes on standing while masked, until another one comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np

from opcua_detector.api import Cause, Channel, Float64, Int64, MethodModel, Record, Tag, TagKind, UInt8
from opcua_detector.detectors.common import number, places, require, whole
from opcua_detector.errors import RecordError
from opcua_detector.kernels.checks import STATE, check, check_rows, excursions, extremes, forget

FOLDS: Final = 5
NEW_EXTREME: Final = 2.0  # times what a fifth of the record went beyond the rest
STEPS_OF_RESOLUTION: Final = 2.0
# In the healthy record: what moves more rarely is not in every fold. A rare move is told best by the forecasts: with 10
# a flag of a server that moved 6 times in 30 days was lost to them (ASD design half, VUS-PR .589 -> .509).
LEAST_CHANGES: Final = FOLDS
FAR: Final = 2.0  # spans by which a column that moves more rarely must leave its values
FAR_OF_VALUE, FAR_OF_EU_RANGE = 0.1, 0.05  # the same, of its largest value or, where that is known, of its unit's range
MIN_CHANGES: Final = 50  # of a column with a stuck check
MOST_OF_RECORD: Final = 0.1  # longest healthy run of such a column
MIN_EXCURSIONS: Final = 30  # between the quarters of a column with a range check
UNSEEN: Final = 10.0  # spans divided by the excursions: added to the range allowance of a short record
UNSEEN_STEPS: Final = 200.0  # as many steps double the allowance of the rate
MOST_CAUSES: Final = 16
MOST_WEIGHT: Final = 100.0  # of one row, in limits: beyond it everything is as far off as can be told
WHOLE_WINDOW: Final = 0.5  # weight of a row of a value that stood still over all rows to be explained


@dataclasses.dataclass(frozen=True)
class ChecksParams:
    """Parameters of the method `checks`.

    range_share : float; least allowance outside the healthy range, in parts of the healthy span
    rate_share : float; least allowance above the largest healthy step, in parts of it
    stuck_rows : int; least allowance of a run of identical values, in rows
    """

    range_share: float = 0.25
    rate_share: float = 0.5
    stuck_rows: int = 20

    def __post_init__(self) -> None:
        require("checks", self, (
            ("range_share", number(self.range_share) and 0.0 < self.range_share <= 100.0, "a number above 0"),
            ("rate_share", number(self.rate_share) and 0.0 < self.rate_share <= 100.0, "a number above 0"),
            ("stuck_rows", whole(self.stuck_rows)
             and 1 <= self.stuck_rows <= 10**9, "a whole number of rows, 1 or more"),
        ))


class ChecksPlugin:
    """Fits and opens the method `checks`."""

    name = "checks"
    Params = ChecksParams
    learns = True

    def fit(self, record: Record, params: ChecksParams) -> MethodModel:
        """Learn the extremes of each judged column from healthy rows.

        Raises
        ------
        RecordError
            No judged tag, or a tag without a valid value.

        Notes
        -----
        Arrays (j judged columns): low, high, range_allowance, step, rate_allowance float64[j], in the unit of the
        column; longest, stuck_allowance float64[j], rows; ranged, moves uint8[j]: it has a range, a stuck check.
        """
        judged = [tag.name for tag in record.tags if tag.judged]
        if not judged:
            raise RecordError("no tag is judged", where=", ".join(tag.name for tag in record.tags),
                              next_step="give the monitor at least one tag of kind measured, counter or angle")
        rows = record.select(judged)
        n, width = rows.values.shape
        folds = np.minimum(np.arange(n) * FOLDS // max(n, 1), FOLDS - 1)
        found = extremes(np.require(rows.values, np.float64, ["C", "W"]), np.require(rows.valid, np.uint8, ["C", "W"]),
                         np.require(rows.gap, np.uint8, ["C", "W"]), folds.astype(np.int64))
        found = found.reshape(-1, width, 7)
        known = found[:, :, 6].sum(axis=0)
        if (known == 0).any():
            raise RecordError("the tag has no valid value in the whole record",
                              where=f"tag {judged[int(known.argmin())]}",
                              next_step="check its node and its StatusCode, or remove the tag")
        low, high = found[:, :, 0].min(axis=0), found[:, :, 1].max(axis=0)
        step, longest = found[:, :, 2].max(axis=0), found[:, :, 3].max(axis=0)
        grain = STEPS_OF_RESOLUTION * _resolution(rows.values, rows.valid)
        beyond_range = np.maximum(_beyond(-found[:, :, 0]), _beyond(found[:, :, 1]))
        span = high - low
        steps, changes = found[:, :, 4].sum(axis=0), found[:, :, 5].sum(axis=0)
        seen = _excursions(rows.values, rows.valid)
        rests = changes < LEAST_CHANGES
        far = np.array([far_from(tag, a, b) for tag, a, b in zip(rows.tags, low, high, strict=True)])
        far[far == 0.0] = np.finfo(np.float64).max  # nothing says what would be far
        arrays = {
            "low": low, "high": high, "step": step, "longest": longest,
            "range_allowance": np.where(rests, far, _largest(
                (params.range_share + UNSEEN / np.maximum(seen, 1)) * span, grain, NEW_EXTREME * beyond_range)),
            "rate_allowance": np.where(rests, far, _largest(
                params.rate_share * (1 + UNSEEN_STEPS / np.maximum(steps, 1)) * step, grain,
                NEW_EXTREME * _beyond(found[:, :, 2]))),
            "stuck_allowance": _largest(np.full(width, float(params.stuck_rows)), 2.0 * longest,
                                        NEW_EXTREME * _beyond(found[:, :, 3])),
            "ranged": ((seen >= MIN_EXCURSIONS) | rests).astype(np.uint8),
            "moves": ((changes >= MIN_CHANGES) & (longest <= MOST_OF_RECORD * known)).astype(np.uint8),
        }
        return MethodModel(self.name, tuple(judged), record.period_ns, dataclasses.asdict(params), arrays)

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> ChecksMethod:
        """Make the method for rows of these columns (in any order, more than needed are passed over).

        Raises
        ------
        ModelTagsError
            A column that the model needs is missing.
        """
        return ChecksMethod(model, columns)


def far_from(tag: Tag, low: float, high: float) -> float:
    """Return how far beyond [low, high] a tag that hardly ever moved must go to be told; 0 = nothing says.

    In its unit. The range of the unit says most; without it, how far it moved and how large it is.
    """
    if tag.kind is TagKind.MEASURED and tag.eu_range is not None:
        share = FAR_OF_EU_RANGE * (tag.eu_range[1] - tag.eu_range[0])
    else:
        share = FAR_OF_VALUE * max(abs(low), abs(high))
    return float(max(FAR * (high - low), share))


def _beyond(extreme: Float64) -> Float64:
    """Return float64[j]: how far the fold with the highest of float64[n_folds, j] stands above the other folds."""
    with np.errstate(invalid="ignore"):
        ordered = np.sort(extreme, axis=0)
        above = ordered[-1] - ordered[-2] if len(ordered) > 1 else np.zeros(extreme.shape[1])
    return np.where(np.isfinite(above), above, 0.0)


def _excursions(values: Float64, valid: UInt8) -> Int64:
    """Return int64[j]: how often a column went from its lower to its upper quarter or back."""
    out = np.zeros(values.shape[1], np.int64)
    for c in range(values.shape[1]):
        x = values[(valid[:, c] != 0) & np.isfinite(values[:, c]), c]
        # A tag that mostly rests has both quarters there, and then its rarer moves count.
        levels = np.quantile(x, [0.25, 0.75, 0.05, 0.95, 0.0, 1.0]).reshape(3, 2)
        for low, high in levels[levels[:, 0] < levels[:, 1]][:1]:
            out[c] = excursions(x, low, high)
    return out


def _largest(*of: Float64) -> Float64:
    """Return the largest entry by entry, never 0."""
    return np.maximum(np.maximum.reduce(of), np.finfo(np.float64).tiny)


def _resolution(values: Float64, valid: UInt8) -> Float64:
    """Return float64[j]: least distance of two different values of a column; 0 for a constant."""
    out = np.zeros(values.shape[1])
    for c in range(values.shape[1]):
        x = values[(valid[:, c] != 0) & np.isfinite(values[:, c]), c]
        apart = np.diff(np.unique(x))
        if len(apart):
            out[c] = max(float(apart.min()), float(np.spacing(np.abs(x).max())))
    return out


class ChecksMethod:
    """The method `checks`, opened on a model; see the module's docstring and `api.Method`."""

    name = ChecksPlugin.name
    lag = 0
    memory = 1

    def __init__(self, model: MethodModel, columns: Sequence[Tag]) -> None:
        at = places(self.name, model, columns)
        self.model = model
        a, n = model.arrays, len(model.columns)
        ranged, moves = np.flatnonzero(a["ranged"]), np.flatnonzero(a["moves"])
        self._owner = np.concatenate([np.arange(n), ranged, moves])
        self._first_stuck = n + len(ranged)
        kinds = ["rate"] * n + ["range"] * len(ranged) + ["stuck"] * len(moves)
        self.channels = tuple(Channel(model.columns[i], model.columns[i], kind)
                              for i, kind in zip(self._owner, kinds, strict=True))
        range_at, stuck_at = np.full((2, n), -1)
        range_at[ranged] = n + np.arange(len(ranged))
        stuck_at[moves] = self._first_stuck + np.arange(len(moves))
        self._cols = np.array([at[name] for name in model.columns], np.int64)
        self._width = len(columns)
        self._ints = np.concatenate([[n], self._cols, range_at, stuck_at]).astype(np.int64)
        self._tables = np.ascontiguousarray(np.column_stack([
            a["low"], a["high"], 1.0 / a["range_allowance"], a["step"], 1.0 / a["rate_allowance"], a["longest"],
            1.0 / a["stuck_allowance"]])).ravel()
        self.residual: Float64 = np.full(len(self.channels), np.nan)
        self._state = np.empty(n * STATE)
        forget(self._state)

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row, float64[n_columns] and uint8[n_columns]; write `residual`."""
        check(values, valid, self._ints, self._tables, self._state, self.residual)

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        forget(self._state)
        self.residual.fill(np.nan)

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels]: what `update` gives row by row, bit for bit."""
        return self._score(record.values, record.valid, record.gap)

    def _score(self, values: Float64, valid: UInt8, gap: UInt8) -> Float64:
        if values.shape[1] != self._width:
            raise RecordError(
                f"rows have {values.shape[1]} columns, the method was opened for {self._width}", where=self.name,
                next_step="select the monitor's columns first")
        out = np.full((values.shape[0], len(self.channels)), np.nan)
        state = np.empty_like(self._state)
        forget(state)
        check_rows(np.require(values, np.float64, ["C", "W"]), np.require(valid, np.uint8, ["C", "W"]),
                   np.require(gap, np.uint8, ["C", "W"]), self._ints, self._tables, state, out)
        return out

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        """Return ranked causes over the last `window` rows; pure.

        `observed` and the normal range are values for `range` and `stuck` and steps per row for `rate`; `step_s` of
        `stuck` is how long the value has stood. A share is a channel's sum of residuals over that of all.
        """
        gap = np.zeros(values.shape[0], np.uint8)
        gap[:1] = 1
        first = max(0, values.shape[0] - window)
        residual = np.nan_to_num(self._score(values, valid, gap)[first:])
        still = self._still(values, valid)
        residual[:, still] = np.maximum(residual[:, still], WHOLE_WINDOW)
        weight = np.minimum(residual, MOST_WEIGHT).sum(axis=0)
        total = float(weight.sum())
        if not total > 0:
            return []
        causes = []
        for k in np.argsort(-weight, kind="stable")[:MOST_CAUSES]:
            if weight[k] > 0:
                # The latest of the worst rows: a value that stays outside is told as it is, not as it was.
                row = first + len(residual) - 1 - (0 if k in still else int(np.argmax(residual[::-1, k])))
                causes.append(self._cause(int(k), row, values, valid, source_ns, float(weight[k]) / total))
        return causes

    def _still(self, values: Float64, valid: UInt8) -> Int64:
        """Return the stuck channels whose value never changes in these rows: how long before that is not known."""
        found = []
        for k in range(self._first_stuck, len(self.channels)):
            c = int(self._cols[self._owner[k]])
            known = values[np.isfinite(values[:, c]), c]
            # Masked or not: it may be masked just because it stands still.
            if len(known) > 1 and (known == known[0]).all():
                found.append(k)
        return np.array(found, np.int64)

    def stood_s(self, channel: int, residual: float) -> float:
        """Return for how many seconds a value stands, by the number of a stuck channel and its residual."""
        a, i = self.model.arrays, int(self._owner[channel])
        return float(residual * a["stuck_allowance"][i] + a["longest"][i]) * self.model.period_ns / 1e9

    def _cause(
        self, k: int, row: int, values: Float64, valid: UInt8, source_ns: Int64, share: float,
    ) -> Cause:
        a, i, kind = self.model.arrays, int(self._owner[k]), self.channels[k].kind
        c = int(self._cols[i])
        observed, low, high, lasted = float(values[row, c]), float(a["low"][i]), float(a["high"][i]), float("nan")
        known = np.flatnonzero((valid[:row, c] != 0) & np.isfinite(values[:row, c]))
        if kind == "rate" and len(known):
            before = int(known[-1])
            high = float(a["step"][i])
            observed, low = (observed - float(values[before, c])) / (row - before), -high
        elif kind == "stuck":
            other = np.flatnonzero(np.isfinite(values[:row, c]) & (values[:row, c] != observed))
            began = int(other[-1]) + 1 if len(other) else 0
            lasted = float(source_ns[row] - source_ns[began]) / 1e9
            longest = float(a["longest"][i]) * self.model.period_ns / 1e9
            return Cause(self.channels[k].column, kind, share, observed, low, high, to_range=(0.0, longest),
                         step_s=lasted, source_ns=int(source_ns[row]))
        return Cause(self.channels[k].column, kind, share, observed, low, high, step_s=lasted,
                     source_ns=int(source_ns[row]))
