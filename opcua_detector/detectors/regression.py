"""The method `regression`: each judged tag against its own past and the other tags, learnt from healthy rows alone.

Two channels per judged column, both absolute and in healthy standard deviations of the column:

    forecast   |value - forecast|: ridge VAR of all columns over the last rows; columns that are not judged
               (setpoints, commands, states) enter with their present value too. A column keeps a nonlinear
               correction (random features of a longer past) where that forecasts held-out rows clearly better.
    relation   |value - reconstruction| of its own past and the other columns now and before, by a strong ridge: a
               light one explains joint jumps away

Masks: a column that is not valid gets NaN on both channels of that row, and after more than 10 such rows until its
past is known again. As an input of others it is replaced by its own forecast for 10 rows (a column that is not
judged holds its value), later by its reconstruction from the others; a channel is NaN where more than half of its
inputs are not valid. A column that never moved in the healthy record has residual 0.

Source: section 8 of the design, F and R.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from opcua_detector.api import Cause, Channel, Float64, Int64, MethodModel, Record, Tag, UInt8
from opcua_detector.detectors.common import number, places, require, whole
from opcua_detector.detectors.regression_explain import KINDS, explain_rows
from opcua_detector.detectors.regression_fit import learn
from opcua_detector.errors import ModelTagsError, RecordError
from opcua_detector.kernels.regression import SIGNED, STATE_HEADER, follow_rows, forget, score_rows

_ONE_ROW: Final = 1
_FACTS: Final = ("nonlinear_share", "feature_share", "plant_share")


@dataclasses.dataclass(frozen=True)
class RegressionParams:
    """Parameters of the method `regression`.

    lags : int, rows; past that the linear maps see
    ridge : float; ridge of the forecast, per healthy row (scaled units)
    relation_ridge : float; ridge of the relation, per healthy row
    features : int; random features of the nonlinear correction
    feature_lags : int, rows; past that the correction sees (fewer with more than 51 columns: 512 inputs at most)
    partners : int; other columns that a column sees; 0 = all up to 128 columns, else the 64 most correlated
    seed : int; of the random features
    nonlinear : "auto": the correction is kept for a column where it cuts the held-out error by a tenth; "on": for
        all; "off": for none
    """

    lags: int = 8
    ridge: float = 0.01
    relation_ridge: float = 0.1
    features: int = 256
    feature_lags: int = 10
    partners: int = 0
    seed: int = 0
    nonlinear: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        require("regression", self, (
            ("lags", whole(self.lags) and 1 <= self.lags <= 100, "a whole number of rows, 1 .. 100"),
            ("ridge", number(self.ridge) and 0.0 < self.ridge <= 1e6, "a number above 0"),
            ("relation_ridge", number(self.relation_ridge) and 0.0 < self.relation_ridge <= 1e6, "a number above 0"),
            ("features", whole(self.features) and 1 <= self.features <= 4096, "a whole number of 1 .. 4096"),
            ("feature_lags", whole(self.feature_lags) and self.lags <= self.feature_lags <= 1000,
             "a whole number of rows, lags .. 1000"),
            ("partners", whole(self.partners) and self.partners >= 0, "a whole number, 0 = automatic"),
            ("seed", whole(self.seed) and self.seed >= 0, "a whole number, 0 or more"),
            ("nonlinear", self.nonlinear in ("auto", "on", "off"), "auto, on or off"),
        ))


class RegressionPlugin:
    """Fits and opens the method `regression`."""

    name = "regression"
    Params = RegressionParams
    learns = True

    def fit(self, record: Record, params: RegressionParams) -> MethodModel:
        """Learn forecasts and relations from healthy rows.

        Raises
        ------
        RecordError
            No judged tag, a tag without a valid value, or too few rows with all their values.

        Notes
        -----
        The model's columns are those of the record, the ones that are not judged first. Its params hold, besides
        the parameters, facts about the judged columns that move at all: `nonlinear_share` of them keep the
        correction, for `feature_share` its features beat a linear map of the same longer past, and for `plant_share`
        the plant is to be judged as a nonlinear one (see `regression_correction.Correction.learn`).

        Arrays (d columns, j judged ones, m seen by each, h features of p inputs):
        mean, inverse, low, high float64[d], low and high scaled; partners int32[d, m];
        forecast float64[j, *], relation float64[d, (lags + 1) m] (see `regression_linear.Linear`);
        corrected int64[j], row of correction or -1; directions float64[p, h]; offsets float64[h];
        correction float64[*, h + p + 1]; rms, inner, usual float64[2, j], held out, forecast and relation: scaled
        rms, that of the 95 % smallest errors, mean energy in the latter (see `regression_linear.energy`).
        """
        return self._learn(record, params, None)

    def fit_fold(self, record: Record, params: RegressionParams, whole: MethodModel) -> MethodModel:
        """Learn from a part of a record what `fit` learnt for residuals of the whole, with corrections of the same
        columns; rms, inner and usual are NaN (see `calibration.held_out_residuals`).

        Raises
        ------
        RecordError
            As `fit`.
        """
        return self._learn(record, params, whole)

    def _learn(self, record: Record, params: RegressionParams, whole: MethodModel | None) -> MethodModel:
        names = [tag.name for tag in record.tags]
        inert = [tag.name for tag in record.tags if not tag.judged]
        if len(inert) == len(names):
            raise RecordError(
                "no tag is judged", where=", ".join(names),
                next_step="give the monitor at least one tag of kind measured, counter or angle")
        ordered = record.select([*inert, *(tag.name for tag in record.tags if tag.judged)])
        corrected = None if whole is None else whole.arrays["corrected"] >= 0
        arrays, facts = learn(ordered, params, len(inert), described=whole is None, corrected=corrected)
        return MethodModel(
            plugin=self.name, columns=tuple(tag.name for tag in ordered.tags), period_ns=record.period_ns,
            params={**dataclasses.asdict(params), **facts}, arrays=arrays)

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> RegressionMethod:
        """Make the method for rows of these columns (in any order, more than needed are passed over).

        Raises
        ------
        ModelTagsError
            A column that the model needs is missing.
        """
        return RegressionMethod(model, columns)


class RegressionMethod:
    """The method `regression`, opened on a model; see the module's docstring and `api.Method`."""

    name = RegressionPlugin.name
    lag = 0

    def __init__(self, model: MethodModel, columns: Sequence[Tag]) -> None:
        at = places(self.name, model, columns)
        self.model = model
        self.params = RegressionParams(**{k: v for k, v in model.params.items() if k not in _FACTS})
        self.nonlinear_share = float(model.params["nonlinear_share"])
        self._cols = np.array([at[name] for name in model.columns], dtype=np.int64)
        self._width = len(columns)
        self._inert = len(model.columns) - int(model.arrays["rms"].shape[1])
        judged = model.columns[self._inert :]
        self.channels = tuple(Channel(name, name, kind) for kind in KINDS for name in judged)
        d, p = len(model.columns), int(model.arrays["directions"].shape[0])
        self.memory = max(self.params.lags, (p - self._inert) // d if p else 0)
        self.residual: Float64 = np.full(len(self.channels), np.nan)
        self._ints, self._floats = self._pack()
        self._state = self._fresh()
        self._no_gap = np.zeros(_ONE_ROW, np.uint8)

    def _pack(self) -> tuple[Int64, Float64]:
        """Return the model as the kernel wants it (layout: `kernels.regression`)."""
        a = self.model.arrays
        d, m = a["partners"].shape
        p, h = a["directions"].shape
        head = np.array([d, self._inert, m, self.params.lags, self.memory, h, p, a["forecast"].shape[1]])
        seen_inert = (a["partners"] < self._inert).sum(axis=1)
        ints = [head, self._cols, a["partners"].ravel(), seen_inert, a["corrected"]]
        floats = [a[name].ravel() for name in (
            "mean", "inverse", "low", "high", "forecast", "relation", "directions", "offsets", "correction")]
        return np.concatenate(ints).astype(np.int64), np.concatenate(floats).astype(np.float64)

    def _fresh(self) -> Float64:
        """Return an empty state (layout: `kernels.regression`)."""
        d, _, m, lags, memory, h, p = (int(x) for x in self._ints[:7])
        length = memory + 1
        state = np.zeros(STATE_HEADER + length + 2 * d + 4 * length * d + (lags + 1) * m + h + p + 1)
        forget(self._ints, state)
        return state

    def update(self, values: Float64, valid: UInt8) -> None:
        """Take one row, float64[n_columns] and uint8[n_columns]; write `residual`."""
        score_rows(values, valid, self._no_gap, self._ints, self._floats, self._state, self.residual)

    def reset(self) -> None:
        """Forget all rows (after a gap)."""
        forget(self._ints, self._state)
        self.residual.fill(np.nan)

    def residuals(self, record: Record) -> Float64:
        """Return float64[n, n_channels]: what `update` gives row by row, bit for bit.

        The record has the columns the method was opened with; the stream's own memory is not touched.
        """
        return self._score(record.values, record.valid, record.gap, signed=False)

    def _score(self, values: Float64, valid: UInt8, gap: UInt8, *, signed: bool) -> Float64:
        rows, mask, starts = self._rows(values, valid, gap)
        out = np.full((starts.size, len(self.channels)), np.nan)
        state = self._fresh()
        state[SIGNED] = float(signed)
        score_rows(rows, mask, starts, self._ints, self._floats, state, out.ravel())
        return out

    def _rows(self, values: Float64, valid: UInt8, gap: UInt8) -> tuple[Float64, UInt8, UInt8]:
        """Return the rows as the kernel wants them."""
        if values.shape[1] != self._width:
            raise RecordError(
                f"rows have {values.shape[1]} columns, the method was opened for {self._width}", where=self.name,
                next_step="select the monitor's columns first")
        return (np.require(values, np.float64, ["C", "W"]).ravel(), np.require(valid, np.uint8, ["C", "W"]).ravel(),
                np.require(gap, np.uint8, ["C", "W"]))

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        """Return ranked causes over the last `window` judged rows; pure (see `regression_explain`)."""
        signed = self._score(values, valid, _one_interval(values), signed=True)
        rows = np.ascontiguousarray(values[:, self._cols])
        mask: NDArray[np.bool_] = (valid[:, self._cols] != 0) & np.isfinite(rows)

        def without(c: int) -> Float64:
            other = values.copy()
            followed = self.reconstruct(values, valid, self.model.columns[c])
            at, known = self._cols[c], np.isfinite(followed)
            other[known, at] = followed[known]
            return self._score(other, valid, _one_interval(values), signed=True)

        return explain_rows(self.model, rows, mask, np.asarray(source_ns), signed, window, without)

    def reconstruct(self, values: Float64, valid: UInt8, column: str, gap: UInt8 | None = None) -> Float64:
        """Return float64[m]: what one column would be had it followed the others, in its engineering unit.

        Its own past is reconstructed too, so give the rows from before the fault on. NaN for the first `lags` rows,
        and where more than half of its inputs are not valid.

        Parameters
        ----------
        values, valid : float64[m, n_columns], uint8[m, n_columns]
        column : name of one of the model's columns
        gap : uint8[m]; 1 = this row does not continue the row before; None: one interval

        Raises
        ------
        ModelTagsError
            The model has no such column.
        """
        if column not in self.model.columns:
            raise ModelTagsError(
                f"the model has no column {column!r}, only {', '.join(self.model.columns)}", where=self.name,
                next_step="name one of these")
        c = self.model.columns.index(column)
        at = int(self._cols[c])
        own = (valid[:, at] != 0) & np.isfinite(values[:, at])
        values, valid = values.copy(), valid.copy()
        values[:, at] = np.where(own, values[:, at], self.model.arrays["mean"][c])  # no more than a start is needed
        valid[:, at] = 1
        rows, mask, starts = self._rows(values, valid, _one_interval(values) if gap is None else gap)
        out = np.full(starts.size, np.nan)
        follow_rows(rows, mask, starts, self._ints, self._floats, self._fresh(), c, out)
        inverse = float(self.model.arrays["inverse"][c])
        mean = float(self.model.arrays["mean"][c])
        return mean + (out / inverse if inverse else 0.0 * out)


def _one_interval(values: Float64) -> UInt8:
    gap = np.zeros(values.shape[0], np.uint8)
    gap[:1] = 1
    return gap
