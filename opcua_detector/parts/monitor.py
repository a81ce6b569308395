"""The monitor of a cyclic process in the loop: it follows the trigger and gives each part its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..alarms import AlertState
from ..api import (
    BAD_NO_COMMUNICATION,
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    UNCERTAIN_SUB_NORMAL,
    Cause,
    Explanation,
    Frame,
    PartVerdict,
    Tag,
    UInt8,
    Verdict,
)
from ..columns import ColumnPlan
from ..engine import AlertSettings
from ..guards import Guards, Pauses
from ..kernels.parts import BEGIN, BROKEN, CHANGE, END, MISSING, watch
from ..model import NormalityModel
from .explain import PartCause, PartFacts, PartReasons, PartSnapshot
from .judge import SHARE_FROM, PartJudge
from .model import MODES, PartModel, judged_plan


@dataclass(frozen=True)
class _Reach:
    """What the service asks of a method: rows of warming up."""

    lag: int = 0
    memory: int = 4


class PartMonitor:
    """One monitor of a cyclic process; an `engine.Monitor`.

    `verdict.score` is that of the last whole part until the next one ends. While a part runs and has left the
    corridor (or has not ended in time), its own score stands instead. `ended_part` says what is to be said of a part
    right after the step that ended it.

    A tag that its guard masks is taken out of the running part and of the last verdict. A part during which an inhibit
    or maintenance tag was on has no verdict; meanwhile, and until the next whole part, there is no alert.

    Parameters
    ----------
    model : NormalityModel of `parts.fit.fit_parts`
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
        self._tag_at = at
        self._trigger = names.index(self.parts.cycle.tag)
        self._stepper = ColumnPlan(tuple(names), self.plan.columns, at, self.plan.op, self.plan.scale).stepper()
        self._row = np.full(len(self.plan.columns), np.nan)
        self._row_valid = np.zeros(len(self.plan.columns), np.uint8)
        self._guards = Guards(model.facts.get("guards", {}), names)
        self._pauses = Pauses(names, inhibit=alert.inhibit, maintenance=alert.maintenance)
        self._mode, self._back = MODES[self.parts.cycle.on], self.parts.cycle.until == "back"
        self._watched = np.zeros(3)
        self.judge = PartJudge(self.parts)  # the running part
        self._last = PartJudge(self.parts)  # the last whole part
        self._begun = 0
        tag_of = {tag.name: i for i, tag in enumerate(model.tags)}
        self._column_tag = np.array([tag_of[self.plan.owner(c.name)] for c in self.plan.columns], np.int64)
        self._trigger_tag = tag_of[self.parts.cycle.tag]
        self._reasons = PartReasons(model, self.parts, self.plan)
        self._forget()
        self.verdict = self._no_verdict()
        self._alert = self._alert_state()

    def _alert_state(self, event_no: int = 0, *, active: bool = False) -> AlertState:
        # A part is good or bad: a good one ends the alert, however near the limit it is.
        return AlertState(self.settings.on_delay_ns, self.settings.off_delay_ns, deadband=0.0, active=active,
                          event_no=event_no)

    def _no_verdict(self) -> Verdict:
        return Verdict(self.name, self.model.model_id, tuple(t.name for t in self.model.tags),
                       np.full(len(self.model.calibration.channels), np.nan), np.zeros(len(self.model.tags)),
                       quality="waiting for the first whole part")

    def _forget(self) -> None:
        self._running = False
        self._watched[:] = 0.0
        self._final, self._final_late, self._final_speed, self._final_number = math.nan, math.nan, math.nan, 0
        self._number, self._begin_ns, self._final_ns = 0, 0, (0, 0)
        self._part_ended = False
        self._speed = math.nan
        self._late_told = False
        self._lead_running = False
        self._status, self._quality = BAD_WAITING_FOR_INITIAL_DATA, "waiting for the first whole part"
        self._ended = False
        self._held = self._final_held = ""  # why the running, or the last whole part is not judged
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
        self._guards.restart()
        self._pauses.restart()
        self._begun = 0
        self.verdict = self._no_verdict()
        self._alert = self._alert_state(self._alert.event_no)

    def continue_events(self, last_event_no: int) -> None:
        """Number the next alert after this one (the last that the store knows)."""
        self._alert.event_no = last_event_no

    def take_over(self, old: PartMonitor) -> None:
        """Go on where another monitor stands: its alert stands here, and events are numbered on."""
        if self._guards.same_as(old._guards):
            self._guards = old._guards
        if self.settings == old.settings:
            self._pauses = old._pauses
        active, event_no = old._alert.active, old._alert.event_no
        self._alert = self._alert_state(event_no, active=active)
        self.verdict.alert, self.verdict.event_no = active, event_no
        self.verdict.severity = self.settings.severity if active else 0
        self._begun, self._number, self._final_number = old._begun, old._number, old._final_number

    def step(self, frame: Frame) -> Verdict:
        """Take one row of the group; return the verdict (reused)."""
        self._part_ended = False
        masked = self._guards.step(frame.values, frame.valid, frame.gap)
        self._pauses.step(frame.values, frame.valid, frame.source_ns)
        if frame.gap:
            self.reset()
        if self._guards.reasons:
            self._set_aside(frame.valid)
        if masked:
            self._drop()
        code = watch(frame.values[self._trigger], frame.valid[self._trigger] != 0, self._mode, self._back,
                     self.parts.tolerance, self._watched)
        self._stepper.step(frame.values, self._guards.valid, frame.gap, self._row, self._row_valid)
        if code:
            self._turn(code, float(frame.values[self._trigger]), frame.source_ns)
        if self._running:
            self._hold()
            self._collect()
        self._judge(frame)
        return self.verdict

    def ended_part(self) -> PartVerdict | None:
        """Return the verdict on the part that ended with the last step, None where none did."""
        if not self._part_ended:
            return None
        begin_ns, end_ns = self._final_ns
        if not self._final >= 1.0:
            why = self._final_held or ("too few valid rows" if math.isnan(self._final) else "")
            return PartVerdict(self._final_number, begin_ns, end_ns, self._final, unjudged=why)
        told = self.explain(self.snapshot())
        cause = told.causes[0] if told.causes else None
        phase = cause.phase if isinstance(cause, PartCause) else (math.nan, math.nan)
        share = self.verdict.contribution
        return PartVerdict(self._final_number, begin_ns, end_ns, self._final, self.verdict.tags[int(share.argmax())],
                           phase, told.sentence)

    def _set_aside(self, valid: UInt8) -> None:
        """Note which columns of the running part a guard masks."""
        self.judge.aside |= (self._guards.valid[self._tag_at] == 0) & (valid[self._tag_at] != 0)

    def _drop(self) -> None:
        """Take the tags that a guard masks out of the running part and out of the last verdict."""
        columns = np.array([self.plan.owner(c.name) in self._guards.reasons for c in self.plan.columns])
        self.judge.drop(columns)
        self._last.drop(columns)
        self._last.aside |= columns
        if self._final >= 0.0:
            self._final = self._last.score() if self._last.enough() else math.nan
        if self._lead_running:
            self._lead_running = self.judge.running >= 1.0 or self._late_told
        if self._lead_running:
            self._show_running()
        else:
            self._show_final()

    def _hold(self) -> None:
        """While alerts are kept back, the running part is not judged."""
        if self._pauses.reason and self._held != self._pauses.reason:
            self._held = self._pauses.reason
            if self._lead_running:
                self._show_final()

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
            self._running, self._speed, self._late_told, self._held = True, math.nan, False, ""
            self.judge.begin()

    def _finish(self, end_ns: int) -> None:
        """The running part is whole: its verdict stands until the next one ends."""
        self._part_ended, self._final_ns = True, (self._begin_ns, end_ns)
        self._running = False
        self.judge, self._last = self._last, self.judge
        self._final_held = self._held
        self._final = math.nan if self._held else self._last.end()
        self._final_late = self.parts.late(self._last.rows)
        self._final_speed = self._last.speed() if self._final >= 1.0 and self._final_late < 1.0 else math.nan
        self._final_number, self._ended = self._number, True
        missing = 1.0 - self._last.valid[:self._last.kept].mean(axis=0)
        masked = ", ".join(f"{self.plan.columns[c].name} {missing[c]:.0%}" for c in np.flatnonzero(missing > 0))
        if self._held:
            self._status, self._quality = BAD_WAITING_FOR_INITIAL_DATA, f"part {self._number} not judged: {self._held}"
        elif math.isnan(self._final):
            self._status = BAD_WAITING_FOR_INITIAL_DATA
            self._quality = f"part {self._number} has too few valid rows, masked: {masked}"
        elif masked:
            self._status, self._quality = UNCERTAIN_SUB_NORMAL, f"part {self._number} masked: {masked}"
        else:
            self._status, self._quality = GOOD, "Good"
        self._show_final()

    def _collect(self) -> None:
        """Add the row to the running part; once it has left the corridor it sets the score."""
        moved = self.judge.row(self._row, self._row_valid)
        if self._held:
            return
        if moved and self._ended and self.judge.running >= 1.0:
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
        if self._guards.reasons or self._pauses.reason or self._pauses.warning:
            status, quality = self._told(status, quality)
        verdict.score, verdict.status, verdict.quality = score, status, quality
        verdict.source_ns, verdict.seq = frame.source_ns, frame.seq
        kept_back = self._pauses.reason or (self._final_held and not self._lead_running) or self._blind()
        verdict.alert = self._alert.step(0.0 if kept_back else score, frame.source_ns)
        verdict.raised, verdict.cleared = self._alert.raised, self._alert.cleared
        verdict.event_no = self._alert.event_no
        verdict.severity = self.settings.severity if verdict.alert else 0

    def _blind(self) -> bool:
        """Whether the guards have masked every tag that is judged."""
        return bool(self._guards.reasons) and all(self.plan.owner(c.name) in self._guards.reasons
                                                  for c in self.plan.columns)

    def _told(self, status: int, quality: str) -> tuple[int, str]:
        """Return status and quality of a row with masked tags, or with alerts kept back."""
        told = [self._pauses.reason, self._pauses.warning, *self._guards.reasons.values()]
        if self._guards.reasons and status == GOOD:
            status = UNCERTAIN_SUB_NORMAL
        return status, "; ".join(text for text in ("" if quality == "Good" else quality, *told) if text)

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
        return self._reasons.explain(taken)

    def cause_text(self, cause: Cause) -> str:
        """Return the sentence of one cause."""
        return self._reasons.text(cause)
