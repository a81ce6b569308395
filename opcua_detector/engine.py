"""The low-latency loop's core: `Engine.step(frame) -> verdicts`; no asyncio, no OPC UA, no SQLite.

Live operation, replay and tests all use it. Everything is allocated at construction; a step only copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from .absence import Absence
from .alarms import AlertState
from .allowances import Allowances
from .api import (
    BAD_DATA_UNAVAILABLE,
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    UNCERTAIN_SUB_NORMAL,
    Cause,
    Explanation,
    Float64,
    Frame,
    Int64,
    Method,
    PartVerdict,
    Record,
    Tag,
    UInt8,
    Verdict,
)
from .calibration import REPORT_WINDOW
from .columns import ColumnPlan
from .guards import Guards, Pauses, masked_words
from .kernels.masks import all_valid
from .kernels.score import LEAD
from .model import NormalityModel
from .reasons import Reasons, Rows

EXPLAINED_ROWS = (400, 1000)  # so many are kept: how an event began tells best which tag is to blame
EXPLAINED_VALUES = 50_000  # in all, where that allows for more than the least

_QUALITY = {
    GOOD: "Good", BAD_WAITING_FOR_INITIAL_DATA: "warming up", BAD_DATA_UNAVAILABLE: "operating state not learnt",
}


@dataclass(frozen=True)
class AlertSettings:
    """What makes an alert of a score (times on the SourceTimestamp clock).

    settling_ns : no alert so long after each change of the state tag; inhibit, maintenance : tags of the group, no
    alert while one of them is Good and not 0 (see `guards.Pauses`)
    """

    on_delay_ns: int = 0
    off_delay_ns: int = 500_000_000
    severity: int = 500
    settling_ns: int = 0
    inhibit: tuple[str, ...] = ()
    maintenance: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The last rows of a monitor, copied, so that they can be explained on another thread.

    values float64[m, n_columns]; valid uint8[m, n_columns]; source_ns int64[m]; window: judged rows;
    contribution float64[n_tags]; lead: indices of the methods that set the score; event_no;
    since: rows back to the beginning of the event and a window before it; residual float64[n_channels] and score of
    the newest row; state: index of the operating state, -1 = not learnt
    """

    values: Float64
    valid: UInt8
    source_ns: Int64
    window: int
    contribution: Float64
    lead: frozenset[int]
    event_no: int
    since: int
    residual: Float64
    score: float
    state: int


class Reach(Protocol):
    """What can be known of the way a monitor looks at rows: how many it needs (see `api.Method`)."""

    @property
    def lag(self) -> int:
        """Rows by which its verdict trails."""
        ...

    @property
    def memory(self) -> int:
        """Rows needed before the first verdict."""
        ...


class Monitor(Protocol):
    """A monitor in operation, as engine, service, replay and feedback use it: of rows (`RowMonitor`) or of parts
    (`parts.PartMonitor`).
    """

    name: str
    model: NormalityModel
    plan: ColumnPlan
    verdict: Verdict

    @property
    def methods(self) -> Sequence[Reach]:
        """How the monitor looks at rows."""
        ...

    def step(self, frame: Frame) -> Verdict:
        """Take one row of the group; return the verdict (reused)."""
        ...

    def ended_part(self) -> PartVerdict | None:
        """Return the verdict on the part that ended with the last step; None where none did, or rows are judged."""
        ...

    def reset(self) -> None:
        """Forget all rows; a standing alert stands."""
        ...

    def restart(self) -> None:
        """Forget everything, as after construction; event numbers go on."""
        ...

    def continue_events(self, last_event_no: int) -> None:
        """Number the next alert after this one."""
        ...

    def take_over(self, old: Self) -> None:
        """Go on where another monitor stands, for a changed model: its alert stands here, and events are numbered on.
        """
        ...

    def snapshot(self) -> Any:
        """Copy what `explain` needs; call it on the loop's thread, right after `step`."""
        ...

    def explain(self, taken: Any) -> Explanation:
        """Say why the score is what it is; pure, may run on another thread."""
        ...

    def cause_text(self, cause: Cause) -> str:
        """Return the sentence of one cause."""
        ...


class RowMonitor:
    """One monitor: tags -> columns -> methods -> channels -> one fused score -> alert.

    Parameters
    ----------
    model : NormalityModel
    methods : opened methods, in the order of the model
    group_tags : tags of the frames that will come (a superset of the model's tags, in any order)
    """

    def __init__(
        self, name: str, model: NormalityModel, methods: Sequence[Method], group_tags: Sequence[Tag],
        alert: AlertSettings = AlertSettings(),
    ) -> None:
        model.require(group_tags, model.period_ns)
        self.name, self.model, self.methods = name, model, tuple(methods)
        self.settings = alert
        names = [tag.name for tag in group_tags]
        plan = model.plan
        at = np.array([names.index(tag.name) for tag in model.tags], np.int64)
        # The stepper reads the group's frame directly: tag indices are those of the group.
        self._stepper = ColumnPlan(tuple(names), plan.columns, at[plan.index], plan.op, plan.scale).stepper()
        self.plan = plan
        self._used = at
        self._state_at = names.index(model.state_tag) if model.state_tag else -1
        self._state_index = {value: i for i, value in enumerate(model.calibration.states)}
        self._allowances = Allowances.of(model)
        self._absence = Absence.of(model.calibration, self.methods)
        self._alert = AlertState(alert.on_delay_ns, alert.off_delay_ns)
        self._guards = Guards(model.facts.get("guards", {}), names)
        self._pauses = Pauses(names, inhibit=alert.inhibit, maintenance=alert.maintenance, state_tag=model.state_tag,
                              settling_ns=alert.settling_ns)
        self._judged = frozenset(tag.name for tag in model.tags if tag.judged)
        self._reasons = Reasons(model, self.methods)
        self._raised_ns, self._last_state = 0, 0
        self._make_buffers()
        self.verdict = self._no_verdict()

    def _no_verdict(self) -> Verdict:
        model = self.model
        self._scorer.forget_told()
        return Verdict(self.name, model.model_id, tuple(t.name for t in model.tags), self._scorer.means,
                       self._scorer.shares)

    def _make_buffers(self) -> None:
        n_columns = len(self.plan.columns)
        self._residual = np.full(len(self.model.calibration.channels), np.nan)
        self._slices: list[tuple[Method, Float64]] = []
        first = 0
        for method in self.methods:
            self._slices.append((method, self._residual[first:first + len(method.channels)]))
            first += len(method.channels)
        reach = max(method.lag + method.memory for method in self.methods)
        self._report = REPORT_WINDOW
        least, most = EXPLAINED_ROWS
        length = max(self._report, least, min(most, EXPLAINED_VALUES // max(1, n_columns))) + 2 * reach + 2
        self._ring = np.full((length, n_columns), np.nan)
        self._ring_valid = np.zeros((length, n_columns), np.uint8)
        self._ring_ns = np.zeros(length, np.int64)
        self._rows = [(self._ring[i], self._ring_valid[i]) for i in range(length)]
        self._pos, self._filled = -1, 0
        tag_of = {tag.name: i for i, tag in enumerate(self.model.tags)}
        calibration = self.model.calibration
        owner = np.array([tag_of[self.plan.owner(c.column)] for c in calibration.channels], np.int64)
        self._scorer = calibration.scorer(owner, len(tag_of))
        of_channel = np.repeat(np.arange(len(self.methods)), [len(method.channels) for method in self.methods])
        self._lead_methods = [frozenset(int(of_channel[c]) for group in view.groups for c in group)
                              for view in calibration.views]

    def reset(self) -> None:
        """Forget all rows; a standing alert stands."""
        for method in self.methods:
            method.reset()
        if self._allowances is not None:
            self._allowances.reset()
        self._scorer.reset()
        self._filled = 0

    def restart(self) -> None:
        """Forget everything, a standing alert and the verdict too, as after construction; event numbers go on."""
        self.reset()
        self._guards.restart()
        self._pauses.restart()
        self.verdict = self._no_verdict()
        self._alert = AlertState(self.settings.on_delay_ns, self.settings.off_delay_ns, event_no=self._alert.event_no)

    def continue_events(self, last_event_no: int) -> None:
        """Number the next alert after this one (the last that the store knows)."""
        self._alert.event_no = last_event_no

    def take_over(self, old: RowMonitor) -> None:
        """Go on where another monitor stands: its alert stands here, and events are numbered on.

        For a changed model: prime a new monitor with the last rows, call this between two rows, and swap.
        """
        if self._guards.same_as(old._guards):
            self._guards = old._guards
        if self.settings == old.settings and self.model.state_tag == old.model.state_tag:
            self._pauses = old._pauses
        alert = old._alert
        self._alert = AlertState(self.settings.on_delay_ns, self.settings.off_delay_ns, active=alert.active,
                                 event_no=alert.event_no)
        self.verdict.alert, self.verdict.event_no = alert.active, alert.event_no
        self.verdict.severity = self.settings.severity if alert.active else 0
        self._raised_ns = old._raised_ns

    def step(self, frame: Frame) -> Verdict:
        """Take one row of the group; return the verdict (reused)."""
        # What the methods remember of a tag that is masked from now on is wrong: they start anew, as after a gap.
        gap = self._guards.step(frame.values, frame.valid, frame.gap) or frame.gap
        self._pauses.step(frame.values, frame.valid, frame.source_ns)
        if gap:
            self.reset()
        elif self._pauses.settled:
            self._scorer.reset()
        self._pos = pos = (self._pos + 1) % len(self._rows)
        self._filled = min(self._filled + 1, len(self._rows))
        values, valid = self._rows[pos]
        self._ring_ns[pos] = frame.source_ns
        self._stepper.step(frame.values, self._guards.valid, gap, values, valid)
        for method, target in self._slices:
            method.update(values, valid)
            target[:] = method.residual
        state = self._state(frame)
        if self._allowances is not None:
            self._allowances.step(values, valid, gap, state, self._residual)
        if self._absence is not None:
            self._absence.step(valid, gap, self._residual)
        self._scorer.step(self._residual, state)
        self._judge(frame, state)
        return self.verdict

    def _state(self, frame: Frame) -> int:
        if self._state_at < 0:
            return 0
        if not frame.valid[self._state_at]:
            return -1
        return self._state_index.get(int(frame.values[self._state_at]), -1)

    def _judge(self, frame: Frame, state: int) -> None:
        verdict, out = self.verdict, self._scorer.out
        score, _, verdict.slow_score, verdict.r_trans, verdict.r_bound, verdict.r_conf = out.tolist()
        verdict.source_ns, verdict.seq, verdict.score = frame.source_ns, frame.seq, score
        verdict.alert = self._alert.step(0.0 if self._kept_back(frame, state) else score, frame.source_ns)
        verdict.raised, verdict.cleared = self._alert.raised, self._alert.cleared
        verdict.event_no = self._alert.event_no
        verdict.severity = self.settings.severity if verdict.alert else 0
        self._last_state = state
        if verdict.raised:
            self._raised_ns = frame.source_ns
        whole = not self._guards.changed and not self._guards.standing and all_valid(frame.valid, self._used)
        if state < 0:
            status = BAD_DATA_UNAVAILABLE
        elif score != score and not self._blind():
            status = BAD_WAITING_FOR_INITIAL_DATA
        else:
            status = GOOD if whole and self._pauses.reason != self._pauses.settling else UNCERTAIN_SUB_NORMAL
        blank = status == BAD_WAITING_FOR_INITIAL_DATA and not whole
        if status == UNCERTAIN_SUB_NORMAL or blank or self._pauses.reason or self._pauses.warning:
            verdict.quality = self._told(frame, status)
        else:
            verdict.quality = _QUALITY[status]
        verdict.status = status

    def _blind(self) -> bool:
        """Whether every tag that is judged comes with another resolution or scale; one that stands still is judged."""
        return bool(self._guards.changed) and self._judged <= self._guards.changed.keys()

    def _kept_back(self, frame: Frame, state: int) -> bool:
        """Whether there is no alert at this row whatever the score, so that a standing one ends."""
        unlearnt = state < 0 and bool(frame.valid[self._state_at])
        return unlearnt or bool(self._pauses.reason) or self._blind()

    def _told(self, frame: Frame, status: int) -> str:
        """Return the quality text of a row that is not plainly Good."""
        told = ["" if status in (GOOD, UNCERTAIN_SUB_NORMAL) else _QUALITY[status], self._pauses.reason,
                self._pauses.warning]
        if status in (UNCERTAIN_SUB_NORMAL, BAD_WAITING_FOR_INITIAL_DATA):
            masked = masked_words(self.model.tags, self._used, frame)
            if masked and told[0]:
                told[0] = "no verdict"
            told += [masked, *self._guards.changed.values(), *self._guards.standing.values()]
        return "; ".join(text for text in told if text)

    def ended_part(self) -> PartVerdict | None:
        """Return None: rows are judged, not parts."""
        return None

    def snapshot(self) -> Snapshot:
        """Copy what `explain` needs; call it on the loop's thread, right after `step`."""
        n, m = len(self._rows), self._filled
        order = (np.arange(self._pos - m + 1, self._pos + 1)) % n
        lead, window, methods = int(self._scorer.out[LEAD]), self._report, frozenset[int]()
        if lead >= 0:
            view = self.model.calibration.views[lead]
            window = min(self._report, int(self.model.calibration.windows[view.windows[-1]]))
            methods = self._lead_methods[lead]
        ns = self._ring_ns[order]
        since = window
        if self.verdict.alert:
            since += int((ns >= self._raised_ns).sum())
        return Snapshot(self._ring[order], self._ring_valid[order], ns, window, self.verdict.contribution.copy(),
                        methods, self.verdict.event_no, since, self._residual.copy(), self.verdict.score,
                        self._last_state)

    def explain(self, taken: Snapshot) -> Explanation:
        """Say why the score is what it is; pure, may run on another thread."""
        return self._reasons.explain(
            Rows(taken.values, taken.valid, taken.source_ns, taken.state), taken.window, taken.since,
            taken.contribution, taken.lead, taken.residual, taken.score, taken.event_no)

    def cause_text(self, cause: Cause) -> str:
        """Return the sentence of one cause."""
        return self._reasons.text(cause)


class Engine:
    """The monitors of one group, stepped in order by the group's frames."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.monitors = tuple(monitors)
        self._verdicts = [monitor.verdict for monitor in self.monitors]

    def step(self, frame: Frame) -> list[Verdict]:
        """Take one row; return the verdicts (reused), one per monitor."""
        for i, monitor in enumerate(self.monitors):
            self._verdicts[i] = monitor.step(frame)
        return self._verdicts

    def swap(self, old: Monitor, new: Monitor) -> None:
        """Put one monitor in the place of another, between two rows (see `Monitor.take_over`)."""
        i = self.monitors.index(old)
        self.monitors = (*self.monitors[:i], new, *self.monitors[i + 1:])
        self._verdicts[i] = new.verdict


def frames_of(record: Record) -> Iterator[Frame]:
    """Yield the rows of a record as frames (one reused frame), for replay and tests."""
    frame = Frame.empty(len(record.tags))
    for i in range(len(record)):
        frame.values[:] = record.values[i]
        frame.valid[:] = record.valid[i]
        frame.source_ns, frame.gap, frame.seq = int(record.source_ns[i]), bool(record.gap[i]), i
        yield frame
