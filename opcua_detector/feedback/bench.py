"""Rows judged again: what models with the same columns make of stored rows, and the forecast of alerts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..absence import Absence
from ..alarms import AlertState
from ..allowances import REGRESSION, Allowances
from ..api import Float64, Int64, Method, MethodModel, Record, UInt8
from ..calibration import DAY_S, Calibration
from ..detectors.regression_signed import SignedRegression
from ..engine import AlertSettings
from ..errors import RecordError
from ..guards import Guards, Pauses
from ..kernels.score import SCORE, soft
from ..model import NormalityModel
from ..parts import PartModel, count_part_alerts, is_part_model
from .policy import Feedback, Forecast, Opener, span_text

MAX_ROWS: Final = 4000  # of an interval: the situation of an alert shows in its first rows
MAX_CELLS: Final = 400_000  # rows x columns looked at
FORECAST_ROWS: Final = 200_000
FORECAST_CHUNK: Final = 500
NOTHING_KEPT_BACK: Final = AlertSettings()


class Bench:
    """Rows of a model's columns as the running monitor sees them, and what models with the same columns make of them;
    residuals are made once.

    Parameters
    ----------
    record : rows of the monitor's group; those of the model's tags are enough where nothing keeps alarms back
    chunk : rows of one kernel call, 0 = all; a long call would hold Python's lock and with it the live loop
    alert : what keeps alarms back, and the delays of an alert

    Attributes
    ----------
    columns : the rows as columns, less what the guards mask
    gap : uint8[n]; rows on which the windows start anew: after gaps, masks and settling
    state : int64[n]; see `state_rows`
    kept_back : bool[n]; rows on which there is no alert whatever the score: maintenance, inhibit, settling
    """

    def __init__(self, model: NormalityModel, record: Record, opener: Opener, chunk: int = 0,
                 alert: AlertSettings = NOTHING_KEPT_BACK) -> None:
        self.model, self.record, self.opener, self._chunk = model, record, opener, chunk or max(1, len(record))
        names = [tag.name for tag in model.tags]
        own = Guards(model.facts.get("guards", {}), names).rows(record.select(names))
        self.columns = model.plan.prepare(own)
        self.state = state_rows(model, record)
        self.kept_back, settled = paused_rows(record, model.state_tag, alert)
        self.gap = np.bitwise_or(own.gap, settled)
        self._made: dict[int, tuple[MethodModel, Method, Float64]] = {}

    def method(self, of: MethodModel) -> tuple[Method, Float64]:
        """Return a method and its residuals, float64[n, n_channels of it], with their direction where they have one."""
        if id(of) not in self._made:
            columns = self.model.plan.columns
            method = SignedRegression(of, columns) if of.plugin == REGRESSION else self.opener(of, columns)
            self._made[id(of)] = (of, method, self._residuals(method))
        return self._made[id(of)][1:]

    def _residuals(self, method: Method) -> Float64:
        out = np.full((len(self.columns), len(method.channels)), np.nan)
        for first in range(0, len(out), self._chunk):
            stop = min(first + self._chunk, len(out))
            early = max(0, first - 2 * (method.lag + method.memory))
            out[first:stop] = method.residuals(self.columns.rows(early, stop))[first - early:]
        return out

    def signed(self, methods: Sequence[MethodModel]) -> Float64:
        """Return float64[n, n_channels] without any allowance: residuals, with their direction where they have one."""
        return np.concatenate([self.method(m)[1] for m in methods], axis=1)

    def allowed(self, model: NormalityModel) -> Float64:
        """Return float64[n, n_channels] with the allowances of a model, and less what missing tags add."""
        signed = self.signed(model.methods)
        residual = np.abs(signed)
        allowances = Allowances.of(model)
        if allowances is not None:
            residual = allowances.rows(self.columns, self.state, residual, signed)
        absence = Absence.of(model.calibration, [self.method(m)[0] for m in model.methods])
        return residual if absence is None else absence.rows(self.columns, residual)

    def views(self, model: NormalityModel) -> tuple[Float64, Float64]:
        """Return (score float64[n], score of each view float64[n, n_views]) under a model."""
        outs, _, values = model.calibration.scorer().rows(
            self.allowed(model), self.gap, self.state, details=True)
        score, views = outs[:, SCORE].copy(), view_scores(model.calibration, values, self.state)
        score[self.kept_back], views[self.kept_back] = 0.0, 0.0
        return score, views

    def score(self, model: NormalityModel) -> Float64:
        """Return float64[n]: the score under a model, 0 on rows that are kept back."""
        residual, scorer = self.allowed(model), model.calibration.scorer()
        parts = [scorer.rows(residual[i:i + self._chunk], self.gap[i:i + self._chunk],
                             self.state[i:i + self._chunk])[0][:, SCORE] for i in range(0, len(residual), self._chunk)]
        score = np.concatenate(parts) if parts else np.zeros(0)
        score[self.kept_back] = 0.0
        return score

    def inside(self, feedback: Feedback) -> Int64:
        """Return the rows of the interval, the first `MAX_ROWS` of them.

        Raises
        ------
        RecordError
            There is none.
        """
        at = self.record.source_ns
        rows = np.flatnonzero((at >= feedback.start_ns) & (at <= feedback.end_ns))
        if len(rows) == 0:
            raise RecordError("no row of this interval is there", where=span_text(feedback.start_ns, feedback.end_ns),
                              next_step="give an interval inside a recording of the store")
        return rows[:max(1, min(MAX_ROWS, MAX_CELLS // max(1, len(self.columns.tags))))]


def state_rows(model: NormalityModel, record: Record) -> Int64:
    """Return int64[n]: which calibration each row of a record belongs to, -1 where its state was not learnt."""
    if not model.state_tag:
        return np.zeros(len(record), np.int64)
    at = [tag.name for tag in record.tags].index(model.state_tag)
    state = np.full(len(record), -1, np.int64)
    ok = record.valid[:, at] != 0
    value = np.where(ok, record.values[:, at], 0.0).astype(np.int64)
    for i, learnt in enumerate(model.calibration.states):
        state[ok & (value == learnt)] = i
    return state


def paused_rows(record: Record, state_tag: str, alert: AlertSettings) -> tuple[NDArray[np.bool_], UInt8]:
    """Return (kept back bool[n], settled uint8[n]) of the rows of a group, as `guards.Pauses` tells a monitor.

    kept back : no alert on this row; settled : the first row after settling, on which the windows start anew
    """
    kept_back, settled = np.zeros(len(record), bool), np.zeros(len(record), np.uint8)
    if not (alert.inhibit or alert.maintenance or (state_tag and alert.settling_ns)):
        return kept_back, settled
    pauses = Pauses([tag.name for tag in record.tags], inhibit=alert.inhibit, maintenance=alert.maintenance,
                    state_tag=state_tag, settling_ns=alert.settling_ns)
    for t in range(len(record)):
        pauses.step(record.values[t], record.valid[t], int(record.source_ns[t]))
        kept_back[t], settled[t] = bool(pauses.reason), pauses.settled
    return kept_back, settled


def view_scores(calibration: Calibration, values: Float64, state: Int64) -> Float64:
    """Return float64[n, n_views]: each view over its own limit, 1.0 = it alarms; NaN: no verdict, -1: a lamp.

    values : float64[n, n_views], see `kernels.score`
    """
    out = np.full_like(values, np.nan)
    for v, view in enumerate(calibration.views):
        if view.role == "lamp":
            out[:, v] = -1.0
        elif view.role == "fixed":
            out[:, v] = values[:, v]
        else:
            for s in range(len(calibration.states)):
                rows = state == s
                x = values[rows, v]
                out[rows, v] = np.where(x > 30.0, x, np.log1p(np.exp(np.minimum(x, 30.0)))) / soft(
                    float(calibration.limit[s, v]))
    return out


def count_alerts(score: Float64, record: Record, on_delay_ns: int, off_delay_ns: int) -> int:
    """Return how many alerts scores raise."""
    alert = AlertState(on_delay_ns, off_delay_ns)
    # Rows far below the limit change nothing while no alert stands.
    near = np.flatnonzero((score >= 1.0) | np.isnan(score))
    if len(near) == 0:
        return 0
    raised, t = 0, int(near[0])
    while t < len(score):
        alert.step(float(score[t]), int(record.source_ns[t]))
        raised += alert.raised
        t += 1
        if not alert.active and t < len(score) and score[t] < 1.0:
            after = int(np.searchsorted(near, t))
            if after == len(near):
                break
            t = max(t, int(near[after]) - 1)
    return raised


def forecast(
    before: NormalityModel, after: NormalityModel, record: Record, opener: Opener, *,
    alert: AlertSettings = NOTHING_KEPT_BACK,
) -> Forecast:
    """Replay stored rows with both models and count alerts; the newest `FORECAST_ROWS` rows at most.

    alert : delays, and what keeps alarms back; `record` then has those tags too
    """
    record = record.rows(max(0, len(record) - FORECAST_ROWS), len(record))
    if len(record) == 0:
        return Forecast(0, 0, 0.0)
    on_delay_ns, off_delay_ns = alert.on_delay_ns, alert.off_delay_ns
    if is_part_model(before):
        kept_back, _ = paused_rows(record, "", alert)
        counts = [count_part_alerts(m, record, kept_back, on_delay_ns, off_delay_ns) for m in (before, after)]
    else:
        bench = Bench(before, record, opener, FORECAST_CHUNK, alert)
        counts = [count_alerts(bench.score(m), bench.record, on_delay_ns, off_delay_ns) for m in (before, after)]
    days = len(record) * record.period_ns / 1e9 / DAY_S
    return Forecast(counts[0], counts[1], days)


def lead_rows(model: NormalityModel, reach: int = 100) -> int:
    """Return how many rows before an interval make its judgement exact: the longest window that can alarm and the
    methods' memory, or two parts.
    """
    if is_part_model(model):
        return 2 * PartModel.from_method(model.methods[0]).capacity
    windows = model.calibration.windows
    return max((int(windows[w]) for view in model.calibration.views if view.role != "lamp" for w in view.windows),
               default=0) + 2 * reach + 2


def prime_rows(model: NormalityModel) -> int:
    """Return how many of the last rows fill all windows of a new monitor, that of the second lamp too."""
    return max(lead_rows(model), int(max(model.calibration.windows, default=0)) + 202)
