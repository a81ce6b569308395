"""Monitors of cyclic processes: a trigger cuts the stream into parts, and each part gets one verdict.

A part is compared with a corridor that was learnt from whole healthy parts (`opcua_detector.parts_fit`): bin by bin
of absolute time while it runs, bin by bin of its own length at its end, and as a whole (time it took, mean, swing and
noise of each column). A departure is counted in spreads of the healthy parts; divided by its limit it is a ratio, and
the score of a part is its largest ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .alarms import AlertState
from .api import (
    BAD_NO_COMMUNICATION,
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    UNCERTAIN_SUB_NORMAL,
    Cause,
    Explanation,
    Float64,
    Frame,
    Int64,
    MethodModel,
    Record,
    Tag,
    UInt8,
    Verdict,
)
from .columns import ColumnPlan, make_plan
from .engine import AlertSettings
from .errors import ModelFileError, ModelTagsError
from .kernels.parts import (
    BEGIN,
    BROKEN,
    CHANGE,
    END,
    FALLING,
    MISSING,
    RISING,
    depart,
    part_features,
    run_row,
    stretched,
    watch,
    watch_rows,
)
from .model import NormalityModel
from .parts_explain import PartCause, PartFacts, Stretch, explain_part, part_sentence

PLUGIN = "parts"
KINDS = ("run", "bin", "phase", "shape", "mean", "swing", "noise")
RUN, BIN, PHASE, SHAPE, MEAN, SWING, NOISE = range(len(KINDS))
MODES = {"change": CHANGE, "rising": RISING, "falling": FALLING}
ENOUGH_VALID = 0.5  # share of valid cells of a part without which there is no verdict
SCORE_CAP = 99.0
SHARE_FROM = 0.5  # ratio from which a column takes part in the contributions
SPEEDS, FEW_SPEEDS, MANY_CELLS = 40, 10, 20_000  # speeds tried to see whether a part is only slow or fast; even: not 1
MOST_SPEED = 2.0
FITS = 0.5  # of its limit: a column this near its corridor's middle fits a speed


@dataclass(frozen=True)
class Cycle:
    """What cuts the stream into parts.

    tag : the trigger
    on : what of it begins a part: any change of value (a counter), or rising or falling over 0.5 (a signal)
    until : a part lasts until the `next` begins, or until the trigger goes `back`: what lies between is no part
    shortest_ns, longest_ns : no part takes less or more, whatever the healthy record holds; 0 for none
    """

    tag: str
    on: Literal["change", "rising", "falling"] = "change"
    until: Literal["next", "back"] = "next"
    shortest_ns: int = 0
    longest_ns: int = 0


@dataclass(frozen=True)
class PartModel:
    """The corridor of healthy parts, as `parts_fit` makes it and a model file keeps it.

    columns : names of the judged columns; period_ns : distance of rows; tolerance : rows without a valid trigger
        that are bridged
    width : rows of a bin of absolute time; n_run, n_bins, n_phases : numbers of feature rows of these kinds
    center, spread : float64[r, c]; healthy median and spread of each feature row (run, bin, phase, shape, then one
        row each of mean, swing, noise); NaN is not judged
    limit : float64[k, c]; spreads that count as 1.0, by kind
    rows : float64[3]; shortest, usual and longest number of rows of a part
    """

    cycle: Cycle
    columns: tuple[str, ...]
    period_ns: int
    tolerance: int
    width: float
    n_run: int
    n_bins: int
    n_phases: int
    center: Float64
    spread: Float64
    limit: Float64
    rows: Float64

    @property
    def kind(self) -> Int64:
        """Kind of each feature row, int64[r]."""
        return feature_kinds(self.n_run, self.n_bins, self.n_phases)

    @property
    def capacity(self) -> int:
        """Rows of a part that are kept; a longer one has an alert anyway."""
        return math.ceil(self.rows[2]) + 1

    def late(self, rows: int) -> float:
        """Return how far a number of rows is from the usual one; 1.0 is the shortest or the longest."""
        low, usual, high = self.rows
        away = (rows - usual) / (high - usual) if rows >= usual else (usual - rows) / (usual - low)
        return min(float(away), SCORE_CAP)

    def to_method(self) -> MethodModel:
        """Return what a model file keeps."""
        c = self.cycle
        params = {"tag": c.tag, "on": c.on, "until": c.until, "shortest_ns": c.shortest_ns,
                  "longest_ns": c.longest_ns, "tolerance": self.tolerance, "width": self.width, "n_run": self.n_run,
                  "n_bins": self.n_bins, "n_phases": self.n_phases}
        arrays = {"center": self.center, "spread": self.spread, "limit": self.limit, "rows": self.rows}
        return MethodModel(PLUGIN, self.columns, self.period_ns, params, arrays)

    @classmethod
    def from_method(cls, model: MethodModel) -> PartModel:
        """Return the corridor of a model file.

        Raises
        ------
        ModelFileError
            The model is not of this kind.
        """
        if model.plugin != PLUGIN:
            raise ModelFileError(f"the model was made by {model.plugin}, not by parts", next_step="fit again")
        try:
            p: Mapping[str, Any] = model.params
            cycle = Cycle(p["tag"], p["on"], p["until"], p["shortest_ns"], p["longest_ns"])
            arrays = {name: np.ascontiguousarray(model.arrays[name], np.float64)
                      for name in ("center", "spread", "limit", "rows")}
            return cls(cycle, model.columns, model.period_ns, p["tolerance"], p["width"], p["n_run"], p["n_bins"],
                       p["n_phases"], **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"the model describes no parts: {error!r}", next_step="fit again") from error


def is_part_model(model: NormalityModel) -> bool:
    """Whether a model judges parts."""
    return bool(model.methods) and model.methods[0].plugin == PLUGIN


def feature_kinds(n_run: int, n_bins: int, n_phases: int) -> Int64:
    """Return the kind of each feature row, int64[r]."""
    return np.repeat(np.arange(len(KINDS)), [n_run, n_bins, n_phases, n_phases, 1, 1, 1]).astype(np.int64)


class PartJudge:
    """Compares one part after the other with the corridor; everything is allocated at construction.

    rows : rows of the part so far
    features, worst, where : as in `kernels.parts`; worst in spreads
    ratio : float64[k, c]; worst / limit, NaN where nothing is judged
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
        self.rows, self.running = 0, 0.0

    def begin(self) -> None:
        """Start with an empty part."""
        self.rows, self.running = 0, 0.0
        self.features[:] = np.nan
        self.worst[:] = np.nan
        self.ratio[:] = np.nan
        self.where[:] = 0

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
        model = self.model
        depart(self.features, model.center, model.spread, self.kind, k, k + 1, self.worst, self.where)
        np.divide(self.worst[RUN], model.limit[RUN], out=self.ratio[RUN])
        self.running = min(float(np.fmax.reduce(self.ratio[RUN], initial=0.0)), SCORE_CAP)
        return True

    def end(self) -> float:
        """Judge the whole part; return its score, NaN where too few of its cells are valid."""
        model = self.model
        if self.valid[:self.kept].mean() < ENOUGH_VALID:
            return math.nan
        # A part that is cut short or does not end has no phases to compare with those of whole ones.
        if model.rows[0] <= self.rows <= len(self.values):
            part_features(self.values, self.valid, self.rows, model.n_run, model.n_bins, model.n_phases, self.features)
            depart(self.features, model.center, model.spread, self.kind, model.n_run, len(self.kind), self.worst,
                   self.where)
        np.divide(self.worst, model.limit, out=self.ratio)
        largest = float(np.fmax.reduce(self.ratio, axis=None, initial=0.0))
        return min(max(largest, model.late(self.rows)), SCORE_CAP)

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


@dataclass(frozen=True)
class PartSnapshot:
    """What `explain` needs of the part that sets the score, copied."""

    facts: PartFacts
    contribution: Float64
    event_no: int
    source_ns: int


@dataclass(frozen=True)
class PartVerdict:
    """The verdict on one whole part.

    number : of the part; begin_ns, end_ns : SourceTimestamps of its first and last row
    score : 1.0 = the limit; NaN where too few of its rows are valid
    top_tag, phase, sentence : of a bad part: the tag, from where to where in % of the cycle (NaN: all of it), and why
    """

    number: int
    begin_ns: int
    end_ns: int
    score: float
    top_tag: str = ""
    phase: tuple[float, float] = (math.nan, math.nan)
    sentence: str = ""


@dataclass(frozen=True)
class _Reach:
    """What the service asks of a method: rows of warming up."""

    lag: int = 0
    memory: int = 4


class PartMonitor:
    """One monitor of a cyclic process; has the attributes and methods of `engine.Monitor`.

    `verdict.score` is that of the last whole part until the next one ends. While a part runs and has left the
    corridor (or has not ended in time), its own score stands instead. `part_ended` is True after the step that ended a
    part; `last_part` then says what is to be said of it.

    Parameters
    ----------
    model : NormalityModel of `parts_fit.fit_parts`
    group_tags : tags of the frames that will come (a superset of the model's tags, in any order)

    Raises
    ------
    ModelTagsError
        The frames lack a tag of the model.
    """

    def __init__(self, name: str, model: NormalityModel, group_tags: Sequence[Tag],
                 alert: AlertSettings = AlertSettings()) -> None:  # noqa: B008 - frozen
        model.require(group_tags, model.period_ns)
        self.name, self.model, self.settings = name, model, alert
        self.parts = PartModel.from_method(model.methods[0])
        self.methods = (_Reach(),)
        names = [tag.name for tag in group_tags]
        self.plan, at = judged_plan(model, names)
        self._trigger = names.index(self.parts.cycle.tag)
        self._stepper = ColumnPlan(tuple(names), self.plan.columns, at, self.plan.op, self.plan.scale).stepper()
        self._row = np.full(len(self.plan.columns), np.nan)
        self._row_valid = np.zeros(len(self.plan.columns), np.uint8)
        self._mode, self._back = MODES[self.parts.cycle.on], self.parts.cycle.until == "back"
        self._watched = np.zeros(3)
        self.judge = PartJudge(self.parts)  # the running part
        self._last = PartJudge(self.parts)  # the last whole part
        self._begun = 0
        tag_of = {tag.name: i for i, tag in enumerate(model.tags)}
        self._column_tag = np.array([tag_of[self.plan.owner(c.name)] for c in self.plan.columns], np.int64)
        self._trigger_tag = tag_of[self.parts.cycle.tag]
        self._forget()
        self.verdict = self._no_verdict()
        self._alert = self._alert_state()

    def _alert_state(self, event_no: int = 0) -> AlertState:
        # A part is good or bad: a good one ends the alert, however near the limit it is.
        return AlertState(self.settings.on_delay_ns, self.settings.off_delay_ns, deadband=0.0, event_no=event_no)

    def _no_verdict(self) -> Verdict:
        return Verdict(self.name, self.model.model_id, tuple(t.name for t in self.model.tags),
                       np.full(len(self.model.calibration.channels), np.nan), np.zeros(len(self.model.tags)),
                       quality="waiting for the first whole part")

    def _forget(self) -> None:
        self._running = False
        self._watched[:] = 0.0
        self._final, self._final_late, self._final_speed, self._final_number = math.nan, math.nan, math.nan, 0
        self._number, self._begin_ns, self._final_ns = 0, 0, (0, 0)
        self.part_ended = False
        self._speed = math.nan
        self._late_told = False
        self._lead_running = False
        self._status, self._quality = BAD_WAITING_FOR_INITIAL_DATA, "waiting for the first whole part"
        self._ended = False
        self.judge.begin()
        self._last.begin()

    def reset(self) -> None:
        """Forget the running part and the last verdict (after a gap); a standing alert stands."""
        self._forget()
        self.verdict.residual[:] = np.nan
        self.verdict.contribution[:] = 0.0

    def restart(self) -> None:
        """Forget everything, a standing alert and the verdict too, as after construction; event numbers go on."""
        self._forget()
        self._begun = 0
        self.verdict = self._no_verdict()
        self._alert = self._alert_state(self._alert.event_no)

    def continue_events(self, last_event_no: int) -> None:
        """Number the next alert after this one (the last that the store knows)."""
        self._alert.event_no = last_event_no

    def step(self, frame: Frame) -> Verdict:
        """Take one row of the group; return the verdict (reused)."""
        self.part_ended = False
        if frame.gap:
            self.reset()
        code = watch(frame.values[self._trigger], frame.valid[self._trigger] != 0, self._mode, self._back,
                     self.parts.tolerance, self._watched)
        self._stepper.step(frame.values, frame.valid, frame.gap, self._row, self._row_valid)
        if code:
            self._turn(code, float(frame.values[self._trigger]), frame.source_ns)
        if self._running:
            self._collect()
        self._judge(frame)
        return self.verdict

    def last_part(self) -> PartVerdict:
        """Return the verdict on the part that ended last; right after a step that set `part_ended`."""
        begin_ns, end_ns = self._final_ns
        if not self._final >= 1.0:
            return PartVerdict(self._final_number, begin_ns, end_ns, self._final)
        told = self.explain(self.snapshot())
        cause = told.causes[0] if told.causes else None
        phase = cause.phase if isinstance(cause, PartCause) else (math.nan, math.nan)
        share = self.verdict.contribution
        return PartVerdict(self._final_number, begin_ns, end_ns, self._final, self.verdict.tags[int(share.argmax())],
                           phase, told.sentence)

    def _turn(self, code: int, value: float, source_ns: int) -> None:
        """A part ends, begins, or is broken."""
        if code & BROKEN:
            self._running = False
            self.judge.begin()
            if self._lead_running:
                self._show_final()
        if code & END and self._running:
            self._finish(source_ns - self.parts.period_ns)
        if code & BEGIN:
            self._begin_ns = source_ns
            self._begun += 1
            self._number = round(value) if self._mode == CHANGE else self._begun
            self._running, self._speed, self._late_told = True, math.nan, False
            self.judge.begin()

    def _finish(self, end_ns: int) -> None:
        """The running part is whole: its verdict stands until the next one ends."""
        self.part_ended, self._final_ns = True, (self._begin_ns, end_ns)
        self._running = False
        self.judge, self._last = self._last, self.judge
        self._final, self._final_late = self._last.end(), self.parts.late(self._last.rows)
        self._final_speed = self._last.speed() if self._final >= 1.0 and self._final_late < 1.0 else math.nan
        self._final_number, self._ended = self._number, True
        missing = 1.0 - self._last.valid[:self._last.kept].mean(axis=0)
        masked = ", ".join(f"{self.plan.columns[c].name} {missing[c]:.0%}" for c in np.flatnonzero(missing > 0))
        if math.isnan(self._final):
            self._status = BAD_WAITING_FOR_INITIAL_DATA
            self._quality = f"part {self._number} has too few valid rows, masked: {masked}"
        elif masked:
            self._status, self._quality = UNCERTAIN_SUB_NORMAL, f"part {self._number} masked: {masked}"
        else:
            self._status, self._quality = GOOD, "Good"
        self._show_final()

    def _collect(self) -> None:
        """Add the row to the running part; once it has left the corridor it sets the score."""
        if self.judge.row(self._row, self._row_valid) and self._ended and self.judge.running >= 1.0:
            self._speed = self.judge.speed()
            self._show_running()
        if not self._late_told and self._ended and self.judge.rows > self.parts.rows[2]:
            self._late_told = True
            self._show_running()

    def _show_running(self) -> None:
        self._lead_running = True
        verdict, late = self.verdict, self._late_so_far()
        verdict.residual[:] = np.nan
        verdict.residual[:-1] = self.judge.ratio.ravel()
        verdict.residual[-1] = late
        self._contributions(self.judge, late, not math.isnan(self._speed), whole=False)

    def _show_final(self) -> None:
        self._lead_running = False
        verdict, judge = self.verdict, self._last
        verdict.residual[:-1] = judge.ratio.ravel()
        verdict.residual[-1] = self._final_late
        verdict.contribution[:] = 0.0
        if self._final >= SHARE_FROM:
            self._contributions(judge, self._final_late, not math.isnan(self._final_speed), whole=True)

    def _contributions(self, judge: PartJudge, late: float, only_speed: bool, *, whole: bool) -> None:
        columns, time = judge.shares(late, only_speed, whole)
        share = self.verdict.contribution
        share[:] = 0.0
        np.maximum.at(share, self._column_tag, columns)
        share[self._trigger_tag] = max(share[self._trigger_tag], time)
        total = share.sum()
        if total > 0:
            share /= total

    def _late_so_far(self) -> float:
        """Return how late the running part is: it cannot be too short yet."""
        return self.parts.late(self.judge.rows) if self.judge.rows > self.parts.rows[1] else 0.0

    def _judge(self, frame: Frame) -> None:
        verdict = self.verdict
        score, status, quality = self._final, self._status, self._quality
        if self._lead_running and self._running:
            score = max(self.judge.running, self._late_so_far())
            if status == BAD_WAITING_FOR_INITIAL_DATA:
                status = UNCERTAIN_SUB_NORMAL
        if self._watched[MISSING] > self.parts.tolerance:
            score, status = math.nan, BAD_NO_COMMUNICATION
            quality = "the trigger has no valid value"
        verdict.score, verdict.status, verdict.quality = score, status, quality
        verdict.source_ns, verdict.seq = frame.source_ns, frame.seq
        verdict.alert = self._alert.step(score, frame.source_ns)
        verdict.raised, verdict.cleared = self._alert.raised, self._alert.cleared
        verdict.event_no = self._alert.event_no
        verdict.severity = self.settings.severity if verdict.alert else 0

    def snapshot(self) -> PartSnapshot:
        """Copy what `explain` needs; call it on the loop's thread, right after `step`."""
        running = self._lead_running
        judge = self.judge if running else self._last
        facts = PartFacts(
            self._number if running else self._final_number, not running, judge.rows, judge.features.copy(),
            judge.ratio.copy(), judge.where.copy(), self._late_so_far() if running else self._final_late,
            self._speed if running else self._final_speed)
        return PartSnapshot(facts, self.verdict.contribution.copy(), self.verdict.event_no, self.verdict.source_ns)

    def explain(self, taken: PartSnapshot) -> Explanation:
        """Say why the score is what it is; pure, may run on another thread."""
        order = np.argsort(-taken.contribution, kind="stable")
        top = [self.model.tags[i].name for i in order if taken.contribution[i] > 0]
        causes = explain_part(self.parts, self._stretches(), taken.facts, taken.source_ns)
        owner = {c.name: self.plan.owner(c.name) for c in self.plan.columns}
        place = {name: i for i, name in enumerate(top)}
        ranked = tuple(sorted(causes, key=lambda cause: (
            place.get(owner.get(cause.tag, cause.tag), len(place)), -cause.share)))
        text = self.cause_text(ranked[0]) if ranked else f"part {taken.facts.number} has no cause that stands out"
        return Explanation(taken.event_no, taken.source_ns, text, ranked)

    def _stretches(self) -> list[Stretch]:
        """Return where each feature row lies in a part."""
        p = self.parts
        usual = p.rows[1]
        found = [Stretch(KINDS[RUN], 100 * k * p.width / usual, 100 * (k + 1) * p.width / usual)
                 for k in range(p.n_run)]
        found += [Stretch(KINDS[BIN], 100 * k / p.n_bins, 100 * (k + 1) / p.n_bins) for k in range(p.n_bins)]
        for kind in (PHASE, SHAPE):
            found += [Stretch(KINDS[kind], 100 * k / p.n_phases, 100 * (k + 1) / p.n_phases)
                      for k in range(p.n_phases)]
        return found + [Stretch(KINDS[kind], 0.0, 100.0) for kind in (MEAN, SWING, NOISE)]

    def cause_text(self, cause: Cause) -> str:
        """Return the sentence of one cause."""
        columns = {c.name: c for c in self.plan.columns}
        spans = {c.name: float(hi - lo) for c, (lo, hi) in zip(self.plan.columns, self.model.span, strict=False)}
        return part_sentence(cause, columns, spans)


def judged_plan(model: NormalityModel, names: Sequence[str]) -> tuple[ColumnPlan, Int64]:
    """Return the plan of the judged columns of a part model, and for each column its tag among `names`, int64[c].

    Raises
    ------
    ModelTagsError
        The plan does not give the columns that the model was fitted on.
    """
    trigger = model.methods[0].params["tag"]
    judged = [tag for tag in model.tags if tag.name != trigger]
    plan = make_plan(judged)
    if tuple(c.name for c in plan.columns) != model.methods[0].columns:
        raise ModelTagsError("the columns are not those of the fit", where=f"monitor {model.monitor}",
                             next_step="fit the monitor again")
    at = np.array([names.index(plan.tags[i]) for i in plan.index], np.int64)
    return plan, at


def as_part_monitor(monitor: object) -> PartMonitor | None:
    """Return the monitor if it judges parts, else None."""
    return monitor if isinstance(monitor, PartMonitor) else None


@dataclass(frozen=True)
class Cut:
    """How a record falls into parts, int64[p] each.

    begin, end : rows, half open; whole : uint8[p], 0 where the part is cut by the record, a gap or a missing
    trigger; number : value of the counter, or count from 1
    """

    begin: Int64
    end: Int64
    whole: UInt8
    number: Int64


def cut_record(record: Record, cycle: Cycle, tolerance: int) -> Cut:
    """Cut a record into parts, as the stream is cut; the record holds the trigger among its tags."""
    at = [tag.name for tag in record.tags].index(cycle.tag)
    codes = np.zeros(len(record), np.int64)
    silent = np.zeros(len(record), np.uint8)
    value = np.ascontiguousarray(record.values[:, at])
    mode = MODES[cycle.on]
    watch_rows(value, np.ascontiguousarray(record.valid[:, at]), record.gap, mode, cycle.until == "back", tolerance,
               codes, silent)
    found: list[tuple[int, int, int, int]] = []
    open_at, number, begun = -1, 0, 0
    for t in np.flatnonzero((codes != 0) | (record.gap != 0)):
        if open_at >= 0 and (record.gap[t] or codes[t] & (BROKEN | END)):
            found.append((open_at, int(t), int(not record.gap[t] and not codes[t] & BROKEN), number))
            open_at = -1
        if codes[t] & BEGIN:
            begun += 1
            open_at, number = int(t), round(float(value[t])) if mode == CHANGE else begun
    if open_at >= 0:
        found.append((open_at, len(record), 0, number))
    table = np.array(found, np.int64).reshape(-1, 4)
    return Cut(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(np.uint8), table[:, 3].copy())


def part_scores(model: NormalityModel, record: Record) -> tuple[Cut, Float64]:
    """Return the parts of a record and the score of each, float64[p]; NaN where it is not whole or mostly masked.

    The record holds the model's tags; the score is the one that a stream of the same rows gives at each part's end.
    """
    parts = PartModel.from_method(model.methods[0])
    names = [tag.name for tag in record.tags]
    plan, _ = judged_plan(model, names)
    columns = plan.prepare(record)
    cut = cut_record(record, parts.cycle, parts.tolerance)
    judge = PartJudge(parts)
    score = np.full(len(cut.begin), np.nan)
    for p in np.flatnonzero(cut.whole):
        judge.begin()
        for t in range(cut.begin[p], cut.end[p]):
            judge.row(columns.values[t], columns.valid[t])
        score[p] = judge.end()
    return cut, score
