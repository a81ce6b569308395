"""Detection without a server: fit on rows, score rows, explain, adapt, save. What a notebook or a benchmark uses.

>>> import numpy as np, opcua_detector
>>> rows = np.random.default_rng(0).standard_normal((3000, 2))
>>> model = opcua_detector.fit(rows, ["temperature", "pressure"], period_s=0.1)
>>> model.score(rows[:500]).shape
(500,)

The same monitor runs live: `score` gives for many rows what `monitor().step` gives one by one, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from .absence import Absence
from .allowances import Allowances
from .api import Explanation, Float64, Int64, Method, MethodModel, Record, Tag, TagKind, UInt8, Verdict
from .app import methods_of, only_nonlinear
from .config import monitor_of
from .engine import AlertSettings, Engine, RowMonitor, frames_of
from .errors import ConfigError, ModelFileError, RecordError
from .feedback import Feedback, Outcome, Policy, give_feedback, undo
from .feedback.bench import state_rows
from .fitting import FitReport, fit_monitor
from .guards import Guards
from .kernels.score import SCORE, SLOW
from .model import NormalityModel
from .model import load as load_model
from .parts import is_part_model
from .reasons import CALM_ROWS, Reasons, Rows
from .registry import Registry

NS = 1_000_000_000
MAX_HOLD = 3  # periods: a longer step between two rows is a gap, after which every method starts anew
LIMIT = 1.0
_PARAMS: Final = {"false_alarms_per_day": 1.0, "windows_s": (), "methods": ("auto",), "state_tag": "", "name": "rows"}


class Detector:
    """A fitted model on rows; immutable: feedback gives a new one.

    Attributes
    ----------
    normality : NormalityModel
    report : FitReport of the fit, None for a model that was loaded
    outcome : what became of the last feedback, None where there was none (see `with_feedback`)
    """

    def __init__(self, normality: NormalityModel, report: FitReport | None = None) -> None:
        self.normality, self.report = normality, report
        self.outcome: Outcome | None = None
        if is_part_model(normality):
            raise ModelFileError("the model judges parts of a cyclic process, this judges rows",
                                 where=f"monitor {normality.monitor}",
                                 next_step="use the commands `replay` and `run`, or `opcua_detector.parts`")
        registry = Registry()
        columns = normality.plan.columns
        self._plugins = [registry.get(m.plugin) for m in normality.methods]
        self._guards = Guards(normality.facts.get("guards", {}), [tag.name for tag in normality.tags])
        self._methods: list[Method] = [
            plugin.open(m, columns) for plugin, m in zip(self._plugins, normality.methods, strict=True)]
        self._allowances = Allowances.of(normality)
        self._absence = Absence.of(normality.calibration, self._methods)

    @property
    def limit(self) -> float:
        """Score at which the model alarms."""
        return LIMIT

    @property
    def model_id(self) -> str:
        """First 16 hex digits of the hash over all that was learnt."""
        return self.normality.model_id

    @property
    def tags(self) -> tuple[Tag, ...]:
        """Tags that rows must have, in order: those of the fit, the ones left out included."""
        return self.normality.given

    def score(self, rows: ArrayLike, times: ArrayLike | None = None, valid: ArrayLike | None = None) -> Float64:
        """Return float64[n]: how abnormal each row is, 1.0 = limit; causal, NaN while warming up.

        rows : float64[n, n_tags], in engineering units; times : see `fit`; valid : bool[n, n_tags]

        Raises
        ------
        RecordError
            Another number of tags, or times that do not increase.
        """
        return self.outs(rows, times, valid)[:, SCORE]

    def slow_score(self, rows: ArrayLike, times: ArrayLike | None = None, valid: ArrayLike | None = None) -> Float64:
        """Return float64[n]: the second lamp, over a long window: what is weak but lasts (see `score`)."""
        return self.outs(rows, times, valid)[:, SLOW]

    def outs(self, rows: ArrayLike, times: ArrayLike | None = None, valid: ArrayLike | None = None) -> Float64:
        """Return float64[n, 6]: score, leading view, second lamp, r_trans, r_bound, r_conf (`kernels.score`)."""
        record = self.record(rows, times, valid)
        own = self._guards.rows(record.select([tag.name for tag in self.normality.tags]))
        columns = self.normality.plan.prepare(own)
        residual = np.concatenate([method.residuals(columns) for method in self._methods], axis=1)
        state = state_rows(self.normality, record)
        if self._allowances is not None:
            residual = self._allowances.rows(columns, state, residual)
        if self._absence is not None:
            residual = self._absence.rows(columns, residual)
        return self.normality.calibration.score_rows(residual, own.gap, state)

    def record(self, rows: ArrayLike, times: ArrayLike | None = None, valid: ArrayLike | None = None) -> Record:
        """Return rows as a record of the model's tags."""
        return _record(rows, self.tags, self.normality.period_ns, times, valid)

    def _with_interval(self, rows: ArrayLike, start: int, stop: int, times: ArrayLike | None,
                       valid: ArrayLike | None) -> Record:
        """Return rows as a record, of which [start, stop) is meant.

        Raises
        ------
        RecordError
            Rows that do not fit the model, or an empty interval.
        """
        record = self.record(rows, times, valid)
        if not 0 <= start < stop <= len(record):
            raise RecordError(f"interval ({start}, {stop}) is empty or lies outside the {len(record)} rows",
                              next_step="give a range [start, stop) of the rows")
        return record

    def monitor(self, *, on_delay_s: float = 0.0, off_delay_s: float = 0.5) -> RowMonitor:
        """Return the streaming form: `monitor.step(frame)` for each row (`opcua_detector.api.Frame`)."""
        columns = self.normality.plan.columns
        methods = [plugin.open(m, columns) for plugin, m in zip(self._plugins, self.normality.methods, strict=True)]
        alert = AlertSettings(int(on_delay_s * NS), int(off_delay_s * NS))
        return RowMonitor(self.normality.monitor, self.normality, methods, self.tags, alert)

    def verdicts(self, rows: ArrayLike, at: int, *, times: ArrayLike | None = None,
                 valid: ArrayLike | None = None) -> tuple[Verdict, Explanation]:
        """Return the verdict on row `at` and its explanation, having seen the rows before it."""
        record = self.record(rows, times, valid)
        n = len(record)
        at = at + n if at < 0 else at
        if not 0 <= at < n:
            raise RecordError(f"row {at} is none of the {n} rows given", next_step="choose a row of the record")
        reach = int(self.normality.calibration.windows.max()) + 2 * max(m.lag + m.memory for m in self._methods) + 2
        monitor = self.monitor()
        engine = Engine([monitor])
        # A score depends on the rows of its longest window alone, so the rows long before need not be replayed.
        for frame in frames_of(record.rows(max(0, at + 1 - 2 * reach), at + 1)):
            engine.step(frame)
        return monitor.verdict, monitor.explain(monitor.snapshot())

    def explain(self, rows: ArrayLike, at: int, *, times: ArrayLike | None = None,
                valid: ArrayLike | None = None) -> Explanation:
        """Say why row `at` scores as it does: one sentence and ranked causes.

        rows : float64[n, n_tags]; the rows before `at` give the situation
        """
        return self.verdicts(rows, at, times=times, valid=valid)[1]

    def contributions(self, rows: ArrayLike, start: int, stop: int, *, times: ArrayLike | None = None,
                      valid: ArrayLike | None = None) -> dict[str, float]:
        """Return tag -> share of the blame for the rows [start, stop), the largest first; the shares sum to 1.

        Empty where none of the rows can be judged. Tags that are not judged, or have no share, are left out.

        rows : float64[n, n_tags]; the rows before `start` give the situation, and what is usual

        Raises
        ------
        RecordError
            Rows that do not fit the model, or an empty interval.
        """
        record = self._with_interval(rows, start, stop, times, valid)
        part = record.rows(max(0, start - CALM_ROWS), stop)
        # Rows of one stretch only: what lies before the last gap tells nothing about what follows it.
        first = int(np.flatnonzero(part.gap)[-1])
        part = part.rows(first, len(part))
        columns = self.normality.plan.prepare(part.select([tag.name for tag in self.normality.tags]))
        state = int(state_rows(self.normality, part)[-1])
        given = Rows(columns.values, columns.valid, columns.source_ns, state)
        return Reasons(self.normality, self._methods).shares(given, min(stop - start, len(part)))

    def with_feedback(
        self, rows: ArrayLike, start: int, stop: int, label: str = "false alarm", *, who: str = "",
        times: ArrayLike | None = None, valid: ArrayLike | None = None, at_ns: int = 0,
        policy: Policy | None = None, healthy: ArrayLike | None = None,
    ) -> Detector:
        """Return the detector with an operator's word on the rows [start, stop); `outcome` says what became of it.

        A false alarm is taken in, so that the same situation alarms no more; an alert that was missed lowers a limit;
        "true" and "unsure" change nothing (`opcua_detector.feedback`).

        Parameters
        ----------
        rows : float64[n, n_tags]; the rows before `start` give the situation
        label : "false alarm", "true", "unsure" or "missed"
        who, at_ns : for the journal; 0 = now
        policy : how far feedback may go
        healthy : float64[m, n_tags]; for a missed alert: what a lower limit would cost

        Raises
        ------
        ConfigError
            An unknown label.
        RecordError
            Rows that do not fit the model, or an empty interval.
        """
        record = self._with_interval(rows, start, stop, times, valid)
        said = Feedback(label, int(record.source_ns[start]), int(record.source_ns[stop - 1]), who, at_ns)
        outcome = give_feedback(self.normality, record, said, self.open, policy=policy or Policy(),
                                healthy=None if healthy is None else self.record(healthy))
        return self._next(outcome.model, outcome)

    def without_feedback(self, delta_id: str) -> Detector:
        """Return the detector as if one feedback (`outcome.delta_id`) had never been given.

        Raises
        ------
        ConfigError
            There is no such feedback in it.
        """
        return self._next(undo(self.normality, delta_id), None)

    def _next(self, normality: NormalityModel, outcome: Outcome | None) -> Detector:
        made = Detector(normality, self.report)
        made.outcome = outcome
        return made

    @staticmethod
    def open(model: MethodModel, columns: Sequence[Tag]) -> Method:
        """Open one method of a model for rows of these columns."""
        return Registry().get(model.plugin).open(model, columns)

    def save(self, path: str | Path) -> str:
        """Write the model file, all or nothing; return its model_id."""
        return self.normality.save(path)


def fit(
    rows: ArrayLike, tags: Sequence[Tag | str], period_s: float, times: ArrayLike | None = None,
    valid: ArrayLike | None = None, intervals: Sequence[tuple[int, int]] | None = None,
    params: Mapping[str, Any] | None = None,
) -> Detector:
    """Learn what is normal from healthy rows.

    Parameters
    ----------
    rows : float64[n, n_tags]; engineering units, NaN = not known
    tags : names, or `Tag` where kind, unit or range matter
    period_s : seconds between two rows
    times : n increasing instants: seconds since 1970 (float), nanoseconds (int) or datetime64; a step of more than 3
        periods is a gap. Default: no gaps
    valid : bool[n, n_tags]; False = do not use
    intervals : healthy row ranges [start, stop), disjoint and ascending, each a run of its own; default: all rows
    params : `false_alarms_per_day` (1), `windows_s` (automatic), `methods` (["auto"]), `state_tag` (""), `name`

    Raises
    ------
    RecordError
        Rows, times or intervals that do not fit together, or too few of them.
    ConfigError
        A parameter that is not known.
    """
    given = {**_PARAMS, **(params or {})}
    unknown = [key for key in given if key not in _PARAMS]
    if unknown:
        raise ConfigError("fit does not know this parameter", key=unknown[0], value=given[unknown[0]],
                          expected=f"one of {', '.join(_PARAMS)}", next_step="correct its name")
    if not period_s > 0:
        raise ConfigError("the period must be above 0", key="period_s", value=period_s, expected="seconds")
    named = tuple(tag if isinstance(tag, Tag) else Tag(tag) for tag in tags)
    twice = [name for name, times_named in Counter(tag.name for tag in named).items() if times_named > 1]
    if twice:
        raise RecordError(f"two tags are called {twice[0]}", next_step="give every column a name of its own")
    if given["state_tag"]:
        named = tuple(_as_state(tag) if tag.name == given["state_tag"] else tag for tag in named)
    record = _record(rows, named, round(period_s * NS), times, valid)
    if intervals is not None:
        record = record.take(_rows_of(intervals, len(record)))
        record.gap[np.cumsum([0, *(stop - start for start, stop in intervals[:-1])])] = 1  # touching ones are runs too
    monitor = monitor_of(name=given["name"], group="rows", methods=given["methods"], state_tag=given["state_tag"],
                         false_alarms_per_day=given["false_alarms_per_day"])
    methods = methods_of(monitor, Registry(), Path("params"))
    model, report = fit_monitor(
        given["name"], record, methods, state_tag=given["state_tag"],
        windows_ns=[round(w * NS) for w in given["windows_s"]],
        false_alarms_per_day=given["false_alarms_per_day"], only_nonlinear=only_nonlinear(monitor))
    return Detector(model, report)


def load(path: str | Path) -> Detector:
    """Read a model file (see `Detector.save` and the `fit` command).

    Raises
    ------
    ModelFileError
        Missing, truncated, altered, of an unknown format, or of a monitor of parts.
    """
    return Detector(load_model(path))


def _as_state(tag: Tag) -> Tag:
    return replace(tag, kind=TagKind.STATE) if tag.kind is TagKind.MEASURED else tag


def _record(rows: ArrayLike, tags: Sequence[Tag], period_ns: int, times: ArrayLike | None, valid: ArrayLike | None,
            ) -> Record:
    try:
        values = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RecordError(f"rows are no numbers: {error}", next_step="give float64[n, n_tags], NaN where not known",
                          ) from None
    if values.ndim != 2 or values.shape[1] != len(tags):
        raise RecordError(f"rows have shape {values.shape}, expected (n, {len(tags)})",
                          where=", ".join(t.name for t in tags),
                          next_step="give one column for each tag, in their order")
    mask: UInt8 | None = None
    if valid is not None:
        mask = np.asarray(valid).astype(np.uint8)
        if mask.shape != values.shape:
            raise RecordError(f"valid has shape {mask.shape}, the rows {values.shape}",
                              next_step="give one flag a value")
    if times is None:
        return Record.from_rows(values, tags, period_ns, valid=mask)
    source_ns = _nanoseconds(times)
    if source_ns.shape != (len(values),):
        raise RecordError(f"{len(source_ns)} times for {len(values)} rows", next_step="give one time a row")
    steps = np.diff(source_ns)
    if (steps <= 0).any():
        row = int(np.flatnonzero(steps <= 0)[0]) + 1
        raise RecordError("times do not increase", where=f"row {row}", next_step="sort the rows by time")
    gap = np.concatenate([[1], (steps > MAX_HOLD * period_ns)]).astype(np.uint8)[:len(values)]
    record = Record.from_rows(values, tags, period_ns, valid=mask, gap=gap)
    record.source_ns[:] = source_ns
    return record


def _nanoseconds(times: ArrayLike) -> Int64:
    given = np.asarray(times)
    if given.dtype.kind == "M":
        return given.astype("datetime64[ns]").astype(np.int64)
    if given.dtype.kind in "iu":
        return given.astype(np.int64)
    return np.round(given.astype(np.float64) * NS).astype(np.int64)


def _rows_of(intervals: Sequence[tuple[int, int]], n: int) -> Int64:
    parts = []
    last = 0
    for start, stop in intervals:
        if not last <= start < stop <= n:
            raise RecordError(f"interval ({start}, {stop}) is empty, overlaps, or lies outside the {n} rows",
                              next_step="give disjoint, ascending ranges [start, stop)")
        parts.append(np.arange(start, stop))
        last = stop
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
