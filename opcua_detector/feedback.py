"""Operator feedback on a model: a false alarm is taken in as a small delta that can be undone, an alert that was missed
tightens a limit. The model is immutable; every function gives a new one, and none does I/O.

A delta holds what one feedback adds, made from the model as it was fitted and the rows of the alert alone, so that
the order of feedback does not matter and any delta can be dropped:

    rows     rows that were normal: the method `transition` adapts to them by the paper's own rules
             (`detectors.transition_adapt`; Alamir and Dion 2024, eqs. 14, 17, 20, 21)
    balls    situations, and how far each residual may go in them (`kernels.allowance`): every other channel, and what
             the paper's rules leave over
    limits   lower limits of views, from alerts that were missed

Methods and limits of the model are those in force; what the deltas replaced lies beside them (`adapted`), which makes
undo exact to the bit. See `Policy` for how far feedback may go.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from .alarms import AlertState
from .allowances import BALLS, CALM, Allowances, Scale, calm_residual
from .api import Float64, Int64, Method, MethodModel, Record, Tag, TagKind
from .calibration import DAY_S, Calibration
from .detectors.transition_adapt import adapt
from .errors import ConfigError, RecordError
from .kernels.columns import SAME
from .kernels.score import SCORE, soft
from .model import NormalityModel

LABELS: Final = ("false alarm", "true", "unsure", "missed")
Action = Literal["adapted", "tightened", "unchanged", "refused", "noted"]
Opener = Callable[[MethodModel, Sequence[Tag]], Method]

TRANSITION: Final = "transition"
IN_DEVIATIONS: Final[Mapping[str, Sequence[str]]] = {TRANSITION: ("affine",), "regression": ("forecast", "relation")}
"""Plugin -> kinds whose residuals are in healthy standard deviations of their column."""
DAY_NS: Final = 86_400_000_000_000

MAX_ROWS: Final = 4000  # of an interval: the situation of an alert shows in its first rows
MAX_CELLS: Final = 400_000  # rows x columns looked at
KEY_COLUMNS: Final = 6  # that tell a situation: those with the largest excess, then those that go with them
LEAST_RADIUS, MOST_RADIUS = 0.02, 0.25  # of a ball, in parts of a column's healthy span
RADIUS_MARGIN: Final = 1.2
MOST_AGE: Final = 40  # rows
MOST_BALLS: Final = 128  # of one delta
GENEROSITY: Final = 1.1  # a residual may go so much beyond what was seen
AT_REST: Final = 0.95  # score below which a situation is to stand afterwards
LEAST_SHARE: Final = 0.2  # of the excess of the channel that is most off: others are let alone, if that is enough
ATTEMPTS: Final = 6
MOST_DELTAS: Final = 64  # that can be undone; older ones that are for good are folded into the model
TOTAL_BALLS: Final = 2048
TOTAL_CELLS: Final = 1_000_000
FOLDED_BALLS: Final = 1024
FURTHER: Final = 1.15  # so much more than ever before is further
TREND: Final = 3  # a tag may go further than ever so often, then it is a trend
TIGHTER: Final = 0.98  # a limit is set so far below what a missed alert reached
CANDIDATES: Final = 4  # views that are tried for a missed alert
FORECAST_ROWS: Final = 200_000
FORECAST_CHUNK: Final = 500
_PERMANENT: Final = ("confirmed", "paper")
FOLDED: Final = "folded"


@dataclass(frozen=True)
class Feedback:
    """What an operator says of an alert or an interval.

    label : one of `LABELS`; start_ns, end_ns : the interval, SourceTimestamps; at_ns : when it was said (0: now)
    """

    label: str
    start_ns: int
    end_ns: int
    who: str
    at_ns: int = 0
    event_no: int = 0
    comment: str = ""


@dataclass(frozen=True)
class Policy:
    """How far feedback may go.

    mode : "review": an adaptation is provisional and reverts after `expires_days` unless an engineer confirms it;
        "paper": it holds at once and for good, as in the paper
    protected : no value may be taken in that lies further than this beyond the healthy range of its tag (or outside
        its EURange), and no distance from what the other tags say that is larger; in parts of the tag's healthy span.
        Holds in both modes; that a tag which keeps trending is refused, in "review" alone
    budget_factor : a missed alert may tighten a limit only while the healthy recording is forecast to give at most so
        many times the alarm budget
    """

    mode: Literal["review", "paper"] = "review"
    expires_days: float = 7.0
    protected: float = 0.2
    budget_factor: float = 3.0

    def __post_init__(self) -> None:
        for key, ok, expected in (
            ("mode", self.mode in ("review", "paper"), "review or paper"),
            ("expires_days", 0.0 < self.expires_days <= 3650.0, "days, above 0"),
            ("protected", 0.0 <= self.protected <= 0.3, "a part of the healthy span, 0 to 0.3"),
            ("budget_factor", 1.0 <= self.budget_factor <= 100.0, "1 to 100"),
        ):
            if not ok:
                raise ConfigError("feedback cannot use this", key=key, value=getattr(self, key), expected=expected)


@dataclass(frozen=True)
class Forecast:
    """Alerts of a replay of stored rows, with the model before and after.

    before, after : alerts; days : of rows that were judged
    """

    before: int
    after: int
    days: float

    @property
    def per_day(self) -> tuple[float, float]:
        """Alerts per day (before, after)."""
        return self.before / self.days, self.after / self.days

    def __str__(self) -> str:
        if self.days <= 0.0:
            return "no stored rows to forecast alerts from"
        span = f"{self.days:.1f} days" if self.days >= 1.0 else f"{24 * self.days:.2g} h"
        before, after = self.per_day
        return f"alerts per day {before:.3g} -> {after:.3g} (replay of {span}: {self.before} -> {self.after})"


@dataclass(frozen=True)
class Outcome:
    """What became of a feedback.

    action : "adapted", "tightened", "unchanged" (nothing had to change), "refused" (with the reason), "noted" (true,
        unsure, or missed and nothing can be done: it counts for evaluation)
    model : the model to use from now on; the very same one where nothing changed
    """

    action: Action
    model: NormalityModel
    text: str
    delta_id: str = ""
    forecast: Forecast | None = None

    @property
    def changed(self) -> bool:
        """Whether the model is another one."""
        return self.action in ("adapted", "tightened")


class _Refused(Exception):
    """A feedback is not taken in; its text says why."""


@dataclass(frozen=True)
class _Delta:
    """A delta with its arrays, apart from a model."""

    about: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.about["id"])

    @property
    def permanent(self) -> bool:
        return self.about["state"] in _PERMANENT


# --- what can be done ----------------------------------------------------------------------------------------------


def give_feedback(
    model: NormalityModel, record: Record, feedback: Feedback, opener: Opener, *, policy: Policy = Policy(),
    healthy: Record | None = None,
) -> Outcome:
    """Take in what an operator says.

    Parameters
    ----------
    record : rows of the model's tags around the interval; `lead_rows` of them before it make the judgement exact
    opener : opens a method model, (model, columns) -> method
    healthy : healthy rows of the same tags; a missed alert can tighten a limit only where there are some

    Raises
    ------
    ConfigError
        An unknown label.
    RecordError
        No row of the interval is there, or it ends before it begins.
    """
    if feedback.label not in LABELS:
        raise ConfigError("there is no such feedback", key="label", value=feedback.label,
                          expected=", ".join(LABELS), next_step="choose one of them")
    feedback = replace(feedback, at_ns=feedback.at_ns or time.time_ns())
    if feedback.label in ("true", "unsure"):
        return Outcome("noted", model, f"noted: {feedback.label}; the model stays as it is")
    if feedback.end_ns < feedback.start_ns:
        raise RecordError("the interval ends before it begins", next_step="give its first and last time")
    if any(m.plugin == "parts" for m in model.methods):
        return Outcome("refused", model, "refused: a monitor of parts learns from whole parts; fit it again with them")
    bench = _Bench(model, record, opener)
    if feedback.label == "missed":
        return _missed(bench, feedback, policy, healthy)
    try:
        return _false_alarm(bench, feedback, policy)
    except _Refused as reason:
        return Outcome("refused", model, f"refused: {reason}")


def confirm(model: NormalityModel, delta_id: str, who: str, at_ns: int = 0) -> NormalityModel:
    """Return the model with a provisional delta made permanent.

    Raises
    ------
    ConfigError
        There is no such delta.
    """
    found = _find(model, delta_id)
    about = {**found, "state": "confirmed", "confirmed_by": who, "confirmed_ns": at_ns or time.time_ns()}
    about.pop("expires_ns", None)
    return replace(model, deltas=tuple(about if d["id"] == found["id"] else d for d in model.deltas))


def undo(model: NormalityModel, delta_id: str) -> NormalityModel:
    """Return the model without a delta: the same, to the bit, as if it had never been given.

    Raises
    ------
    ConfigError
        There is no such delta, or it was folded into the model.
    """
    found = _find(model, delta_id)
    return _without(model, {str(found["id"])})


def expire(model: NormalityModel, now_ns: int) -> tuple[NormalityModel, tuple[Mapping[str, Any], ...]]:
    """Return the model without the provisional deltas whose time is over, and those deltas."""
    over = tuple(d for d in model.deltas if d.get("state") == "provisional" and d.get("expires_ns", now_ns) <= now_ns)
    return (_without(model, {str(d["id"]) for d in over}) if over else model), over


def forecast(
    before: NormalityModel, after: NormalityModel, record: Record, opener: Opener, *, on_delay_ns: int = 0,
    off_delay_ns: int = 500_000_000,
) -> Forecast:
    """Replay stored rows with both models and count alerts; the newest `FORECAST_ROWS` rows at most."""
    record = record.rows(max(0, len(record) - FORECAST_ROWS), len(record))
    if len(record) == 0:
        return Forecast(0, 0, 0.0)
    bench = _Bench(before, record, opener, FORECAST_CHUNK)
    counts = [_alerts(bench.score(m), bench.record, on_delay_ns, off_delay_ns) for m in (before, after)]
    days = len(record) * record.period_ns / 1e9 / DAY_S
    return Forecast(counts[0], counts[1], days)


def lead_rows(model: NormalityModel, reach: int = 100) -> int:
    """Return how many rows before an interval make its judgement exact: the longest window and the methods' memory."""
    return int(max(model.calibration.windows, default=0)) + 2 * reach + 2


def journal(model: NormalityModel) -> tuple[Mapping[str, Any], ...]:
    """Return what of a model came from feedback, oldest first."""
    return tuple(d for d in model.deltas if "label" in d)


def _find(model: NormalityModel, delta_id: str) -> Mapping[str, Any]:
    known = [d for d in journal(model) if d["label"] != FOLDED]
    found = [d for d in known if str(d["id"]).startswith(delta_id)] if delta_id else []
    if len(found) != 1:
        folded = sum(d.get("count", 0) for d in journal(model) if d["label"] == FOLDED)
        raise ConfigError(
            "there is no such adaptation" if not found else "more than one adaptation begins like this",
            key=f"monitor {model.monitor}", value=delta_id,
            expected=("one of " + ", ".join(str(d["id"]) for d in known)) if known else "none is there",
            next_step=f"{folded} older ones were folded into the model for good; fit again to be rid of them"
            if folded else "see `opcua-detector feedback list`")
    return found[0]


# --- judging rows --------------------------------------------------------------------------------------------------


class _Bench:
    """Rows of a model's columns, and what models with the same columns make of them; residuals are made once.

    chunk : rows of one kernel call, 0 = all; a long call would hold Python's lock and with it the live loop
    """

    def __init__(self, model: NormalityModel, record: Record, opener: Opener, chunk: int = 0) -> None:
        self.model, self.record, self._opener, self._chunk = model, record, opener, chunk or max(1, len(record))
        self.columns = model.plan.prepare(record.select([tag.name for tag in model.tags]))
        self.state = state_rows(model, record)
        self._made: dict[int, tuple[MethodModel, Method, Float64]] = {}

    def method(self, of: MethodModel) -> tuple[Method, Float64]:
        """Return a method and its residuals, float64[n, n_channels of it]."""
        if id(of) not in self._made:
            method = self._opener(of, self.model.plan.columns)
            self._made[id(of)] = (of, method, self._residuals(method))
        return self._made[id(of)][1:]

    def _residuals(self, method: Method) -> Float64:
        out = np.full((len(self.columns), len(method.channels)), np.nan)
        for first in range(0, len(out), self._chunk):
            stop = min(first + self._chunk, len(out))
            early = max(0, first - 2 * (method.lag + method.memory))
            out[first:stop] = method.residuals(self.columns.rows(early, stop))[first - early:]
        return out

    def residual(self, methods: Sequence[MethodModel]) -> Float64:
        """Return float64[n, n_channels] without any allowance."""
        return np.concatenate([self.method(m)[1] for m in methods], axis=1)

    def allowed(self, model: NormalityModel) -> Float64:
        """Return float64[n, n_channels] with the allowances of a model."""
        residual = self.residual(model.methods)
        allowances = Allowances.of(model)
        return residual if allowances is None else allowances.rows(self.columns, self.state, residual)

    def views(self, model: NormalityModel) -> tuple[Float64, Float64]:
        """Return (score float64[n], score of each view float64[n, n_views]) under a model."""
        outs, _, values = model.calibration.scorer().rows(
            self.allowed(model), self.record.gap, self.state, details=True)
        return outs[:, SCORE], _view_scores(model.calibration, values, self.state)

    def score(self, model: NormalityModel) -> Float64:
        """Return float64[n]: the score under a model."""
        residual, scorer = self.allowed(model), model.calibration.scorer()
        parts = [scorer.rows(residual[i:i + self._chunk], self.record.gap[i:i + self._chunk],
                             self.state[i:i + self._chunk])[0][:, SCORE] for i in range(0, len(residual), self._chunk)]
        return np.concatenate(parts) if parts else np.zeros(0)

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
            raise RecordError("no row of this interval is there", where=_span_text(feedback.start_ns, feedback.end_ns),
                              next_step="give an interval inside a recording of the store")
        return rows[:max(1, min(MAX_ROWS, MAX_CELLS // max(1, len(self.columns.tags))))]


def state_rows(model: NormalityModel, record: Record) -> Int64:
    """Return int64[n]: which calibration each row of a record belongs to, -1 where its state was not learnt."""
    if not model.state_tag:
        return np.zeros(len(record), np.int64)
    at = [tag.name for tag in record.tags].index(model.state_tag)
    index = {value: i for i, value in enumerate(model.calibration.states)}
    return np.array([index.get(int(x), -1) if ok else -1
                     for x, ok in zip(record.values[:, at], record.valid[:, at], strict=True)], np.int64)


def _view_scores(calibration: Calibration, values: Float64, state: Int64) -> Float64:
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


def _alerts(score: Float64, record: Record, on_delay_ns: int, off_delay_ns: int) -> int:
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


# --- false alarm ---------------------------------------------------------------------------------------------------


def _false_alarm(bench: _Bench, feedback: Feedback, policy: Policy) -> Outcome:
    model = bench.model
    inside = bench.inside(feedback)
    score, views = bench.views(model)
    with np.errstate(invalid="ignore"):
        alarming = inside[score[inside] >= 1.0]
    if len(alarming) == 0:
        highest = np.nanmax(score[inside], initial=0.0)
        return Outcome("unchanged", model, f"nothing to change: the score stays at {highest:.2g} in this interval, "
                                           f"1 is the limit; model {model.model_id}")
    maker = _Maker(bench, feedback, policy)
    maker.look_at(alarming, views)
    maker.check_values()
    for attempt in range(ATTEMPTS):
        delta = maker.delta(GENEROSITY * 1.25**attempt)
        made = _with(model, delta)
        score, views = bench.views(made)
        with np.errstate(invalid="ignore"):
            left = inside[score[inside] >= AT_REST]
        if len(left) == 0:
            break
        maker.look_at(left, views, AT_REST, relax=attempt >= 1)
        maker.check_values()
    else:
        with np.errstate(invalid="ignore"):
            if (score[inside] >= 1.0).any():
                raise _Refused("the interval runs through too many situations to take them all in; give a shorter one, "
                               "or fit again on a record that holds it")
    maker.check_residuals()
    maker.check_trend()
    made = _make_room(made)
    text = f"adapted: {delta.about['text']}; {_until(delta.about)}; model {made.model_id}"
    return Outcome("adapted", made, text, delta.id)


def _until(about: Mapping[str, Any]) -> str:
    return f"expires {_day(about['expires_ns'])} unless confirmed" if "expires_ns" in about else "for good"


class _Maker:
    """Makes the delta of one false alarm.

    evidence : bool[n]; rows whose residuals made the alarm: those in the windows of the views that alarmed
    alarming : bool[n_views]
    """

    def __init__(self, bench: _Bench, feedback: Feedback, policy: Policy) -> None:
        self.bench, self.feedback, self.policy = bench, feedback, policy
        self.model = bench.model
        self.fitted = fitted_methods(self.model)
        self.base = bench.residual(self.fitted)
        self.evidence = np.zeros(len(bench.record), bool)
        self.alarming = np.zeros(len(self.model.calibration.views), bool)
        self.energy = self.model.calibration.scorer().energies(self.base, bench.state)
        self.least_share = LEAST_SHARE
        self.scale = Scale(self.model)
        plan = self.model.plan
        at = {c.name: i for i, c in enumerate(plan.columns)}
        self.column = np.array([at[c.column] for c in self.model.calibration.channels], np.int64)
        calm = calm_residual(self.model.calibration, CALM[0])
        self.calm: Float64 = np.where((bench.state >= 0)[:, None], calm[np.maximum(bench.state, 0)], np.inf)
        methods = [bench.method(m)[0] for m in self.fitted]
        self.plugins = [m.plugin for m, method in zip(self.fitted, methods, strict=True) for _ in method.channels]
        self.transition = np.array(self.plugins) == TRANSITION
        reach = max(method.lag + method.memory for method in methods)
        self.ages = (0, min(reach, MOST_AGE))
        self.context = 2 * max((method.lag for method, m in zip(methods, self.fitted, strict=True)
                                if m.plugin == TRANSITION), default=0)
        self._adapted: tuple[bytes, list[MethodModel], list[dict[str, Any]]] = (b"", [], [])

    def look_at(self, rows: Int64, views: Float64, bar: float = 1.0, *, relax: bool = False) -> None:
        """Add the evidence of rows that alarm: rows int64[m], views float64[n, n_views] over their limits.

        relax : also take in channels that matter less
        """
        calibration = self.model.calibration
        starts = np.flatnonzero(self.bench.record.gap)
        for v, view in enumerate(calibration.views):
            with np.errstate(invalid="ignore"):
                own = rows[views[rows, v] >= bar]
            if len(own) == 0:
                continue
            window = int(calibration.windows[list(view.windows)].max())
            first = np.maximum(own - window + 1, starts[np.searchsorted(starts, own, side="right") - 1])
            mark = np.zeros(len(self.evidence) + 1, np.int64)
            np.add.at(mark, first, 1)
            np.add.at(mark, own + 1, -1)
            self.evidence |= np.cumsum(mark[:-1]) > 0
            self.alarming[v] = True
        if relax:
            self.least_share *= 0.25

    def _off(self, residual: Float64) -> NDArray[np.bool_]:
        """Return bool[n, n_channels]: evidence above what an excused residual counts as, of channels that matter."""
        usual = self.model.calibration.usual[np.maximum(self.bench.state, 0)]
        excess = np.nan_to_num(np.maximum(self.energy - usual, 0.0)[self.evidence]).sum(axis=0)
        matter = np.zeros(len(excess), bool)
        for view in np.array(self.model.calibration.views, object)[self.alarming]:
            own = [c for group in view.groups for c in group]
            matter[own] |= excess[own] >= self.least_share * excess[own].max(initial=0.0)
        with np.errstate(invalid="ignore"):
            return self.evidence[:, None] & matter & (residual > self.calm)

    # -- what is refused

    def check_values(self) -> None:
        """Refuse values beyond EURange, or too far beyond the healthy range.

        Raises
        ------
        _Refused
            With the tag, its value and the limit.
        """
        plan, columns = self.model.plan, self.bench.columns
        rows = self.evidence & self._off(self.base).any(axis=1)
        low, high = healthy_range(self.model)
        for c, column in enumerate(plan.columns):
            known = rows & (columns.valid[:, c] != 0)
            if column.kind is TagKind.STATE or not known.any():
                continue
            x = columns.values[known, c]
            margin = self.policy.protected * float(high[c] - low[c])
            limits = [("its protected range", low[c] - margin, high[c] + margin)]
            if column.eu_range is not None and plan.op[c] == SAME:
                limits.insert(0, ("its EURange", *column.eu_range))
            for name, least, most in limits:
                if x.min() < least or x.max() > most:
                    worst = x.min() if x.min() < least else x.max()
                    raise _Refused(f"{column.name} went to {_value(worst, column)}, outside {name} "
                                   f"{least:.4g} to {_value(most, column)}; correct the plant or the sensor, or fit "
                                   "again on a record that holds it")

    def check_residuals(self) -> None:
        """Refuse a distance from what the other tags say that is too large a part of the tag's span.

        Raises
        ------
        _Refused
            With the tag, the distance and the limit.
        """
        off = self._off(self.base)
        units = channel_units(self.model, self.plugins)
        healthy = largest_healthy(self.model.calibration)
        for c in np.flatnonzero(off.any(axis=0) & (units > 0)):
            column = self.model.plan.columns[self.column[c]]
            span = float(self.scale.span[self.column[c]])
            # Less the plant's own noise. A jump that nobody can foresee is off by much in healthy operation too.
            far = (float(np.quantile(self.base[off[:, c], c], 0.9)) - 2 * self.model.calibration.scale[0, c]) * units[c]
            if far > max(self.policy.protected * span, healthy[c] * units[c]):
                raise _Refused(f"{column.name} is off by {_value(far, column)} ({far / span:.0%} of its healthy span) "
                               f"from what the rest says, {self.policy.protected:.0%} is the protected limit; fit "
                               "again on a record that holds it")

    def check_trend(self) -> None:
        """Refuse a tag that goes further the same way with every feedback.

        Raises
        ------
        _Refused
            With the tag and how often it went further.
        """
        if self.policy.mode == "paper":
            return
        before = [d["reach"] for d in self.model.deltas if "reach" in d]
        for tag, (level, way, _) in self.reach().items():
            highs, most = 0, 0.0
            for reach in before:
                if tag in reach and way * reach[tag][1] >= 0 and reach[tag][0] > FURTHER * most:
                    highs, most = highs + int(reach[tag][2]), reach[tag][0]
            if highs >= TREND and level > FURTHER * most:
                raise _Refused(f"{tag} keeps trending: {highs} adaptations have gone ever further the same way, and "
                               f"this is {level / most:.1f} times the last; look for drift or wear, or fit again if "
                               "it is the new normal")

    def reach(self) -> dict[str, list[float]]:
        """Return tag -> [how far it is off in healthy deviations, which way (-1, 0, 1), 1]."""
        off = self._off(self.base)
        usual = np.maximum(self.model.calibration.scale[0], 1e-12)
        found: dict[str, list[float]] = {}
        plan = self.model.plan
        total = np.where(off, self.base / usual, 0.0).sum(axis=0)
        for c in np.flatnonzero(off.any(axis=0) & (total >= 0.1 * total.max(initial=0.0))):
            level = float(np.quantile(self.base[off[:, c], c], 0.9)) / usual[c]
            column = plan.columns[self.column[c]].name
            tag = plan.owner(column)
            if tag not in found or level > found[tag][0]:
                found[tag] = [level, self._way(column, off[:, c]), 1.0]
        return found

    def _way(self, column: str, rows: NDArray[np.bool_]) -> float:
        """Return the sign of a column's distance from what the others say, 0 where it has none."""
        for m in self.fitted:
            method, _ = self.bench.method(m)
            follow = getattr(method, "reconstruct", None)
            if follow is None or column not in m.columns:
                continue
            columns = self.bench.columns
            at = [c.name for c in self.model.plan.columns].index(column)
            away = columns.values[rows, at] - follow(columns.values, columns.valid, column, columns.gap)[rows]
            away = away[np.isfinite(away)]
            if len(away) and abs(away.mean()) > away.std():
                return float(np.sign(away.mean()))
        return 0.0

    # -- what is made

    def delta(self, generosity: float) -> _Delta:
        """Return the delta for the evidence so far."""
        arrays: dict[str, NDArray[Any]] = {}
        about: dict[str, Any] = {
            "label": self.feedback.label, "who": self.feedback.who, "at_ns": int(self.feedback.at_ns),
            "start_ns": int(self.feedback.start_ns), "end_ns": int(self.feedback.end_ns),
            "event_no": int(self.feedback.event_no), "comment": self.feedback.comment,
            "state": "paper" if self.policy.mode == "paper" else "provisional", "reach": self.reach(),
        }
        if self.policy.mode != "paper":
            about["expires_ns"] = int(self.feedback.at_ns + self.policy.expires_days * DAY_NS)
        residual = self.base
        rows = self._rows_to_adapt()
        changes: list[dict[str, Any]] = []
        if rows is not None:
            methods, changes = self._adapt(rows)
            if any(change["changed"] for change in changes):
                residual = self.bench.residual(methods)
                arrays |= {"values": rows.values, "valid": rows.valid, "gap": rows.gap}
                about["rows"] = [tag.name for tag in rows.tags]
        balls = self._balls(residual, generosity)
        if balls is not None:
            about[BALLS], arrays[BALLS] = balls
        about["text"] = self._words(changes)
        about["id"] = _delta_id(about, arrays)
        return _Delta(about, arrays)

    def _rows_to_adapt(self) -> Record | None:
        """Return the rows that the transition methods are to adapt to, with those around them; None for none."""
        off = self._off(self.base)[:, self.transition].any(axis=1)
        if not off.any():
            return None
        # The residual of row n looks back over two steps.
        wide = np.convolve(off, np.ones(self.context + 1), "full")[self.context:] > 0.5
        columns = self.bench.columns
        names = list(dict.fromkeys(name for m in self.fitted if m.plugin == TRANSITION for name in m.columns))
        return columns.take(np.flatnonzero(wide)).select(names)

    def _adapt(self, rows: Record) -> tuple[list[MethodModel], list[dict[str, Any]]]:
        key = hashlib.sha256(rows.source_ns.tobytes()).digest()
        if self._adapted[0] != key:
            pairs = [adapt(m, rows) if m.plugin == TRANSITION else (m, {"changed": False}) for m in self.fitted]
            self._adapted = (key, [m for m, _ in pairs], [change for _, change in pairs])
        return self._adapted[1], self._adapted[2]

    def _balls(self, residual: Float64, generosity: float) -> tuple[dict[str, Any], Float64] | None:
        """Return the situations of the evidence with their allowances, None where all is as usual.

        residual : float64[n, n_channels], after the transition methods have adapted to these rows alone
        """
        off = self._off(residual)
        rows = np.flatnonzero(off.any(axis=1))
        if len(rows) == 0:
            return None
        with np.errstate(invalid="ignore"):
            excess = np.where(off, residual - self.calm, 0.0)[rows]
        own = np.flatnonzero(excess.any(axis=0))
        key = self._key_columns(excess / np.maximum(self.model.calibration.scale[0], 1e-12))
        z = self.scale.rows(self.bench.columns)
        before = rows - self.ages[1]
        start = np.maximum.accumulate(np.where(self.bench.record.gap != 0, np.arange(len(z)), 0))
        past = np.where((before >= start[rows])[:, None], z[np.maximum(before, 0)][:, key], np.nan)
        points = np.concatenate([z[rows][:, key], past], axis=1)
        centres, nearest, radius = _cover(points)
        allowance = np.zeros((len(centres), len(own)))
        np.maximum.at(allowance, nearest, excess[:, own] * generosity)
        about = {"columns": [*key, *key], "ages": [self.ages[0]] * len(key) + [self.ages[1]] * len(key),
                 "channels": [int(c) for c in own]}
        full = np.full((len(centres), 1), radius)
        return about, np.concatenate([full, np.nan_to_num(points[centres]), allowance], axis=1)

    def _key_columns(self, excess: Float64) -> list[int]:
        """Return the columns that tell the situation: those most off, then those that go with them.

        excess : float64[m, n_channels] in healthy deviations
        """
        n = len(self.model.plan.columns)
        by_column = np.bincount(self.column, excess.sum(axis=0), n)
        usable = self.scale.inverse > 0
        most = [int(c) for c in np.argsort(-by_column, kind="stable") if by_column[c] > 0 and usable[c]]
        key = most[:KEY_COLUMNS // 2 if n > KEY_COLUMNS else KEY_COLUMNS]
        if not key:
            key = [int(np.argmax(usable))]
        z = np.nan_to_num(self.scale.rows(self.bench.columns))
        z = z - z.mean(axis=0)
        norm = np.sqrt((z * z).sum(axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):
            together = np.nan_to_num(np.abs(z.T @ z[:, key]) / np.outer(norm, norm[key])).max(axis=1)
        for c in np.argsort(-together, kind="stable"):
            if len(key) < KEY_COLUMNS and usable[c] and int(c) not in key:
                key.append(int(c))
        return sorted(key)

    def _words(self, changes: Sequence[Mapping[str, Any]]) -> str:
        """Return in words what is allowed from now on."""
        off = self._off(self.base)
        if not off.any():
            return "what was seen is normal"
        usual = np.maximum(self.model.calibration.scale[0], 1e-12)
        c = int(np.argmax(np.where(off, self.base / usual, 0.0).sum(axis=0)))
        at, columns = int(self.column[c]), self.bench.columns
        column = self.model.plan.columns[at]
        rows = np.flatnonzero(off.any(axis=1) & (columns.valid[:, at] != 0))
        low, high = healthy_range(self.model)
        unit = channel_units(self.model, self.plugins)[c]
        x = columns.values[rows, at]
        if len(x) and x.max() > high[at]:
            text = f"{column.name} may reach {_value(x.max(), column)}"
        elif len(x) and x.min() < low[at]:
            text = f"{column.name} may fall to {_value(x.min(), column)}"
        elif unit > 0:
            text = f"{column.name} may be off by {_value(float(self.base[off[:, c], c].max()) * unit, column)}"
        else:
            times = float(self.base[off[:, c], c].max() / usual[c])
            text = f"{column.name} may be off by {times:.2g} times its usual"
        text += self._while(at, rows)
        new = sum(of["transitions"] for change in changes for of in change.get("tags", {}).values())
        wider = sum(of["bounds"] for change in changes for of in change.get("tags", {}).values())
        if new or wider:
            text += f"; {new} new transitions, {wider} with wider bounds"
        return text

    def _while(self, top: int, rows: Int64) -> str:
        """Return the situation: what the tag that moves most beside the one that is off does meanwhile."""
        columns = self.bench.columns
        others = [c for c in range(len(columns.tags)) if c != top and self.scale.inverse[c] > 0]
        if len(rows) < 2 or not others:
            return ""
        z = self.scale.rows(columns)[rows[0]:rows[-1] + 1, others]
        move = np.nan_to_num(z[-1] - z[0])
        c = int(np.argmax(np.abs(move)))
        name = columns.tags[others[c]].name
        if abs(move[c]) < 0.05:
            return f" while {name} is about {float(np.nanmedian(columns.values[rows, others[c]])):.4g}"
        return f" while {name} {'rises' if move[c] > 0 else 'falls'}"


def _cover(points: Float64) -> tuple[Int64, Int64, float]:
    """Return (centres: rows of points, nearest: centre of each point, radius) by farthest first.

    The radius is the roughness of the path itself: the largest component by which points differ from their nearest
    other, so that the same path with the plant's own noise stays inside.

    points : float64[m, n_keys]; NaN = not known

    Raises
    ------
    _Refused
        More situations than one delta may hold.
    """
    x = np.nan_to_num(points)
    m = len(x)
    sample = np.linspace(0, m - 1, min(m, 400)).astype(np.int64)
    apart = np.abs(x[sample][:, None, :] - x[None, :, :]).max(axis=2)
    apart[np.abs(sample[:, None] - np.arange(m)[None, :]) < 1] = np.inf
    rough = float(np.quantile(apart.min(axis=1), 0.95)) if m > 1 else 0.0
    radius = min(max(LEAST_RADIUS, RADIUS_MARGIN * rough), MOST_RADIUS)
    centres = [0]
    distance = np.abs(x - x[0]).max(axis=1)
    nearest = np.zeros(m, np.int64)
    while distance.max() > 0.5 * radius and len(centres) < MOST_BALLS:
        far = int(np.argmax(distance))
        other = np.abs(x - x[far]).max(axis=1)
        nearest[other < distance] = len(centres)
        distance = np.minimum(distance, other)
        centres.append(far)
    if distance.max() > MOST_RADIUS:
        raise _Refused("the interval runs through too many situations to take them all in; give a shorter one, or fit "
                       "again on a record that holds it")
    return np.array(centres, np.int64), nearest, max(radius, RADIUS_MARGIN * float(distance.max()))


# --- missed --------------------------------------------------------------------------------------------------------


def _missed(bench: _Bench, feedback: Feedback, policy: Policy, healthy: Record | None) -> Outcome:
    """Lower the limit of the view that came closest, as far as the alarm budget on healthy rows allows."""
    model = bench.model
    inside = bench.inside(feedback)
    score, views = bench.views(model)
    if np.nanmax(score[inside], initial=0.0) >= 1.0:
        return Outcome("unchanged", model, "nothing to change: the monitor alarms in this interval already; noted as "
                                           f"true for evaluation; model {model.model_id}")
    known = views[inside][~np.isnan(views[inside]).any(axis=1)]
    kept = "noted as true for evaluation"
    if len(known) == 0:
        return Outcome("noted", model, f"{kept}: there was no verdict in this interval, so no limit can be lowered")
    if healthy is None or len(healthy) == 0:
        return Outcome("noted", model, f"{kept}: the highest score was {known.max():.2g}; a limit is lowered only with "
                                       "a healthy recording to forecast from: record one, or give --healthy")
    calm = _Bench(model, healthy, bench._opener, FORECAST_CHUNK)
    budget = float(model.facts.get("false_alarms_per_day", 1.0))
    days = len(healthy) * healthy.period_ns / 1e9 / DAY_S
    before = _alerts(calm.score(model), calm.record, 0, 500_000_000)
    best: tuple[int, _Delta] | None = None
    for v in np.argsort(-known.max(axis=0), kind="stable")[:CANDIDATES]:
        view = model.calibration.views[v]
        if view.role in ("fixed", "lamp") or known[:, v].max() <= 0.0:
            continue
        delta = _tighter(bench, feedback, policy, int(v), inside)
        after = _alerts(calm.score(_with(model, delta)), calm.record, 0, 500_000_000)
        if best is None or after < best[0]:
            best = (after, delta)
    if best is None:
        return Outcome("noted", model, f"{kept}: no limit that could be lowered came near")
    after, delta = best
    told = Forecast(before, after, days)
    # One alert in a short recording is no rate; the budget counts where the recording is long enough to tell.
    if after - before > policy.budget_factor * max(budget * days, 0.0) and after > before:
        return Outcome("noted", model, f"{kept}: finding it would cost too much, {told}; the budget is {budget:g} a "
                                       f"day, {policy.budget_factor:g} times that is the most", forecast=told)
    made = _make_room(_with(model, delta))
    return Outcome("tightened", made, f"tightened: {delta.about['text']}; {told}; {_until(delta.about)}; "
                                      f"model {made.model_id}", delta.id, told)


def _tighter(bench: _Bench, feedback: Feedback, policy: Policy, v: int, inside: Int64) -> _Delta:
    """Return the delta that makes one view alarm in an interval."""
    model = bench.model
    calibration = model.calibration
    _, _, values = calibration.scorer().rows(bench.allowed(model), bench.record.gap, bench.state, details=True)
    limits = []
    for s in range(len(calibration.states)):
        own = values[inside[bench.state[inside] == s], v]
        own = own[~np.isnan(own)]
        if len(own) and own.max() < calibration.limit[s, v]:
            # A score is soft(value) / soft(limit), so that is what is lowered.
            wanted = soft(float(own.max())) * TIGHTER
            limits.append([s, v, math.log(math.expm1(wanted)) if wanted < 30.0 else wanted])
    view = calibration.views[v]
    name = "all tags together" if view.name in ("all", "quick") else view.name.replace("predicted/", "")
    about: dict[str, Any] = {
        "label": feedback.label, "who": feedback.who, "at_ns": int(feedback.at_ns), "start_ns": int(feedback.start_ns),
        "end_ns": int(feedback.end_ns), "event_no": int(feedback.event_no), "comment": feedback.comment,
        "state": "paper" if policy.mode == "paper" else "provisional", "limits": limits,
        "text": f"the limit of {name} falls from {float(calibration.limit[0, v]):.3g} to "
                f"{limits[0][2] if limits else math.nan:.3g} healthy spreads",
    }
    if policy.mode != "paper":
        about["expires_ns"] = int(feedback.at_ns + policy.expires_days * DAY_NS)
    about["id"] = _delta_id(about, {})
    return _Delta(about)


# --- models and their deltas ---------------------------------------------------------------------------------------


def _delta_id(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in about.items() if k != "id")).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:8]


def fitted_methods(model: NormalityModel) -> tuple[MethodModel, ...]:
    """Return the methods as they were fitted, without any feedback (but for what was folded)."""
    methods = []
    for i, method in enumerate(model.methods):
        prefix = f"fitted/{i}/"
        own = {name.removeprefix(prefix): a for name, a in model.adapted.items() if name.startswith(prefix)}
        methods.append(replace(method, arrays={**method.arrays, **own}) if own else method)
    return tuple(methods)


def _fitted_limit(model: NormalityModel) -> Float64:
    return model.adapted.get("fitted/limit", model.calibration.limit)


def _deltas(model: NormalityModel) -> list[_Delta]:
    return [_Delta(d, {name.removeprefix(f"{d['id']}/"): a for name, a in model.adapted.items()
                       if name.startswith(f"{d['id']}/")}) for d in model.deltas]


def _with(model: NormalityModel, delta: _Delta) -> NormalityModel:
    """Return the model with one delta more."""
    return _assemble(model, fitted_methods(model), _fitted_limit(model), [*_deltas(model), delta],
                     model.methods, [delta])


def _without(model: NormalityModel, gone: set[str]) -> NormalityModel:
    """Return the model without some deltas."""
    fitted = fitted_methods(model)
    left = [d for d in _deltas(model) if d.id not in gone]
    return _assemble(model, fitted, _fitted_limit(model), left, fitted, left)


def _assemble(
    model: NormalityModel, fitted: Sequence[MethodModel], limit: Float64, deltas: Sequence[_Delta],
    methods: Sequence[MethodModel], more: Sequence[_Delta],
) -> NormalityModel:
    """Return the model of these deltas; `more` are those that `methods` have not adapted to yet."""
    now = list(methods)
    for delta in more:
        if "rows" in delta.about:
            rows = _stored_rows(model, delta)
            now = [adapt(m, rows)[0] if m.plugin == TRANSITION else m for m in now]
    lowered = np.array(limit)
    for delta in deltas:
        for s, v, value in delta.about.get("limits", ()):
            lowered[s, v] = min(lowered[s, v], value)
    adapted: dict[str, NDArray[Any]] = {}
    for i, (old, new) in enumerate(zip(fitted, now, strict=True)):
        adapted |= {f"fitted/{i}/{name}": array for name, array in old.arrays.items()
                    if new.arrays[name] is not array and not _equal(new.arrays[name], array)}
    if not _equal(lowered, limit):
        adapted["fitted/limit"] = limit
    if "range" in model.adapted:
        adapted["range"] = model.adapted["range"]
    for delta in deltas:
        adapted |= {f"{delta.id}/{name}": array for name, array in delta.arrays.items()}
    return replace(model, methods=tuple(now), calibration=replace(model.calibration, limit=lowered),
                   deltas=tuple(d.about for d in deltas), adapted=adapted)


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _stored_rows(model: NormalityModel, delta: _Delta) -> Record:
    by_name = {c.name: c for c in model.plan.columns}
    tags = [by_name[name] for name in delta.about["rows"]]
    return Record.from_rows(delta.arrays["values"], tags, model.period_ns, valid=delta.arrays["valid"],
                            gap=delta.arrays["gap"])


def healthy_range(model: NormalityModel) -> tuple[Float64, Float64]:
    """Return (low, high), float64[n_columns]: the values of the healthy record, in engineering units.

    As far as a method knows them; otherwise the 1 % and 99 % quantiles.
    """
    if "range" in model.adapted:
        return model.adapted["range"][0], model.adapted["range"][1]
    low, high = model.span[:, 0].copy(), model.span[:, 1].copy()
    at = {c.name: i for i, c in enumerate(model.plan.columns)}
    for m in fitted_methods(model):
        if not {"low", "high", "mean", "inverse"} <= set(m.arrays):
            continue
        for k, name in enumerate(m.columns):
            inverse = float(m.arrays["inverse"][k])
            least, most = float(m.arrays["low"][k]), float(m.arrays["high"][k])
            if m.plugin != TRANSITION:  # kept scaled
                if inverse == 0.0:
                    continue
                least, most = (float(m.arrays["mean"][k]) + x / inverse for x in (least, most))
            low[at[name]], high[at[name]] = min(low[at[name]], least), max(high[at[name]], most)
    return low, high


def channel_units(model: NormalityModel, plugins: Sequence[str]) -> Float64:
    """Return float64[n_channels]: engineering units per unit of residual, 0 where a residual has none.

    plugins : name of the plugin of each channel
    """
    units = np.zeros(len(model.calibration.channels))
    for c, (channel, plugin) in enumerate(zip(model.calibration.channels, plugins, strict=True)):
        if channel.kind not in IN_DEVIATIONS.get(plugin, ()):
            continue
        for m in model.methods:
            if m.plugin == plugin and channel.column in m.columns:
                inverse = float(m.arrays["inverse"][m.columns.index(channel.column)])
                units[c] = 1.0 / inverse if inverse > 0.0 else 0.0
    return units


def largest_healthy(calibration: Calibration) -> Float64:
    """Return float64[n_channels]: the largest residual of the healthy record, as far as the calibration tells."""
    c = calibration
    top = 4.0 * c.scale.max(axis=0)
    for channel, slot in enumerate(c.slot):
        if slot >= 0:
            top[channel] = max(float(c.grid[s, slot, c.used[s, slot] - 1]) for s in range(len(c.states)))
    return np.asarray(top)


# --- bounded size --------------------------------------------------------------------------------------------------


def _make_room(model: NormalityModel) -> NormalityModel:
    """Return the model within its bounds: the oldest deltas that are for good are folded into it.

    Raises
    ------
    _Refused
        It is full of deltas that nobody has reviewed.
    """
    while _full(model):
        oldest = next((d for d in _deltas(model) if d.permanent and d.about["label"] != FOLDED), None)
        if oldest is None:
            raise _Refused("the model holds as many unreviewed adaptations as it may; confirm or undo some "
                           "(`opcua-detector feedback list`), or fit again")
        model = _fold(model, oldest)
    return model


def _full(model: NormalityModel) -> bool:
    own = [d for d in _deltas(model) if d.about["label"] != FOLDED]
    return (len(own) > MOST_DELTAS
            or sum(len(d.arrays[BALLS]) for d in own if BALLS in d.arrays) > TOTAL_BALLS
            or sum(d.arrays["values"].size for d in own if "values" in d.arrays) > TOTAL_CELLS)


def _fold(model: NormalityModel, delta: _Delta) -> NormalityModel:
    """Return the model with one delta made part of what counts as fitted; it cannot be undone any more."""
    fitted = list(fitted_methods(model))
    if "rows" in delta.about:
        rows = _stored_rows(model, delta)
        fitted = [adapt(m, rows)[0] if m.plugin == TRANSITION else m for m in fitted]
    limit = np.array(_fitted_limit(model))
    for s, v, value in delta.about.get("limits", ()):
        limit[s, v] = min(limit[s, v], value)
    if "range" not in model.adapted:
        model = replace(model, adapted={**model.adapted, "range": np.array(healthy_range(model))})
    deltas = [d for d in _deltas(model) if d.id != delta.id]
    folded = [d for d in deltas if d.about["label"] == FOLDED]
    rest = [d for d in deltas if d.about["label"] != FOLDED]
    return _assemble(model, fitted, limit, [*_folded(folded, delta), *rest], fitted, rest)


def _folded(folded: Sequence[_Delta], delta: _Delta) -> list[_Delta]:
    """Return the folded groups with one delta more: its balls go to the group of the same columns and ages."""
    about = delta.about.get(BALLS)
    key = [about["columns"], about["ages"]] if about else []
    at = next((i for i, d in enumerate(folded) if d.about["key"] == key), len(folded))
    empty = _Delta({"id": f"{FOLDED}-{at}", "label": FOLDED, "state": "confirmed", "key": key, "count": 0,
                    "forgotten": 0, "reach": {}, "text": "folded into the model"})
    old = folded[at] if at < len(folded) else empty
    reach = {tag: list(value) for tag, value in old.about["reach"].items()}
    for tag, (level, way, highs) in delta.about.get("reach", {}).items():
        if tag not in reach:
            reach[tag] = [level, way, highs]
        elif way * reach[tag][1] >= 0 and level > FURTHER * reach[tag][0]:
            reach[tag] = [level, way or reach[tag][1], reach[tag][2] + highs]
    now = {**old.about, "count": old.about["count"] + 1, "reach": reach}
    arrays: dict[str, NDArray[Any]] = {}
    if about:
        channels = sorted({*old.about.get(BALLS, {}).get("channels", ()), *about["channels"]})
        keys = 1 + len(about["columns"])
        both = [(old.arrays[BALLS], old.about[BALLS]["channels"])] if BALLS in old.arrays else []
        both.append((delta.arrays[BALLS], about["channels"]))
        wide = np.zeros((sum(len(balls) for balls, _ in both), keys + len(channels)))
        first = 0
        for balls, own in both:
            wide[first:first + len(balls), :keys] = balls[:, :keys]
            wide[first:first + len(balls), [keys + channels.index(c) for c in own]] = balls[:, keys:]
            first += len(balls)
        others = sum(len(d.arrays[BALLS]) for i, d in enumerate(folded) if i != at and BALLS in d.arrays)
        arrays[BALLS], lost = _thinned(wide, keys, max(1, FOLDED_BALLS - others))
        now[BALLS] = {**about, "channels": channels}
        now["forgotten"] = old.about["forgotten"] + lost
    made = _Delta(now, arrays)
    return [made if i == at else d for i, d in enumerate(folded)] if at < len(folded) else [*folded, made]


def _thinned(balls: Float64, keys: int, most: int) -> tuple[Float64, int]:
    """Return at most so many balls: those that lie together become one, then the oldest are forgotten.

    balls : float64[E, keys + M], oldest first: radius, centre, allowance
    """
    if len(balls) <= most:
        return balls, 0
    kept = np.empty_like(balls)
    n = 0
    for ball in balls[::-1]:
        apart = np.abs(kept[:n, 1:keys] - ball[1:keys]).max(axis=1) if n else np.zeros(0)
        wide = np.maximum(kept[:n, 0], apart + ball[0])
        near = int(np.argmin(wide)) if n else -1
        if n and wide[near] <= 2 * max(ball[0], kept[near, 0]) and wide[near] <= MOST_RADIUS:
            kept[near, 0] = wide[near]
            kept[near, keys:] = np.maximum(kept[near, keys:], ball[keys:])
        else:
            kept[n] = ball
            n += 1
    lost = max(0, n - most)
    return np.ascontiguousarray(kept[:n - lost][::-1]), lost


# --- words ---------------------------------------------------------------------------------------------------------


def _value(x: float, tag: Tag) -> str:
    return f"{float(x):.4g}" + (f" {tag.unit}" if tag.unit else "")


def _day(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%d")


def _span_text(start_ns: int, end_ns: int) -> str:
    return " to ".join(datetime.fromtimestamp(t / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for t in (start_ns, end_ns))
