"""What a monitor's alarms on a recording are worth: against ground truth, or against the alarm budget.

`replay` runs the recording through the same engine that runs live and keeps what it said; `evaluate` turns that into
the figures of section 6 of the design (`opcua_detector.metrics`). No limit is chosen here and no point is adjusted: an
event counts as found only by an alert that stands on one of its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from .api import Float64, Int64, Record, UInt8, UInt32
from .engine import Engine, Monitor, frames_of
from .errors import RecordError
from .metrics import OperatingPoint, auc, operating_point, partial_auc, vus_pr
from .parts import PartVerdict, as_part_monitor
from .views import FIXED_KINDS

MAX_FPR: Final = 0.1
VUS_WINDOW: Final = 100  # rows, the default of the metric's authors
VUS_PARTS: Final = 10  # the same for a monitor that judges parts, of which there are far fewer
RANDOM_SEEDS: Final = 5  # the random score's row is the mean over so many
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
DAY_NS: Final = 86_400_000_000_000
DAY_S: Final = 86_400.0
MOST_EXPLAINED: Final = 1000  # alerts that get a sentence: explaining costs far more than scoring
MOST_CAUSES: Final = 3
BLOCK: Final = 4096  # rows
EXPECTED_ENERGY: Final = 0.2  # channels whose healthy energy is below it are too seldom active to compare
FEW_ALERTS: Final = 3.0  # expected alerts below which a rate per day says little


@dataclass(slots=True)
class Alert:
    """One alert of a replay.

    event_no : number of the alert in this replay, from 1
    begin, end : rows, half open; `end` is the number of rows where it still stands
    raised_ns, cleared_ns : SourceTimestamps; cleared_ns None while it stands
    peak_score : float, 1.0 = the limit; top_tag : tag of the first cause, or, without an explanation, the
        one with the largest contribution when it was raised
    sentence : for the operator; causes : (tag, words, share) of the first few
    explained : False beyond the first `MOST_EXPLAINED`
    """

    event_no: int
    begin: int
    end: int
    raised_ns: int
    cleared_ns: int | None
    peak_score: float
    top_tag: str = ""
    sentence: str = ""
    causes: tuple[tuple[str, str, float], ...] = ()
    explained: bool = False


@dataclass(frozen=True)
class Replay:
    """What a monitor said of a recording, row by row.

    tags : names of the monitor's tags
    score, slow : float64[n]; 1.0 = the limit, NaN = no verdict; slow : the second lamp
    alert : bool[n]; status : uint32[n], OPC UA StatusCodes
    lead : float32[n_bins, n_tags]; contribution of each tag at the highest score of each stretch of time, 0 below
        half the limit; peak : float32[n_bins], that score, NaN without one (no bins were asked for: empty)
    error : float64[n_tags]; mean error of each tag on quiet rows, as a multiple of its held-out one of the fit, NaN
        where nothing is known; quiet : ground truth says healthy, or, without ground truth, no alert stands
    alerts : all alerts; parts : verdicts on whole parts of a cyclic process, empty for a monitor of rows
    """

    monitor: str
    model_id: str
    tags: tuple[str, ...]
    score: Float64
    slow: Float64
    alert: NDArray[np.bool_]
    status: UInt32
    lead: NDArray[np.float32]
    peak: NDArray[np.float32]
    error: Float64
    alerts: tuple[Alert, ...]
    parts: tuple[PartVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the ground truth: was it found, when, and who was named.

    begin, end : rows, half open; begin_ns, end_ns : SourceTimestamps of its first and last row
    found : an alert stood on one of its rows; delay_s : from its first row to that, NaN where missed
    alert : number of that alert, 0 where missed; top_tag, sentence : of that alert; standing : it stood before already
    peak_score : highest score inside, NaN without a verdict
    """

    begin: int
    end: int
    begin_ns: int
    end_ns: int
    found: bool
    delay_s: float
    alert: int
    top_tag: str
    sentence: str
    standing: bool
    peak_score: float


@dataclass(frozen=True, slots=True)
class Day:
    """One day of a recording: UTC date, alerts raised, those of them that are false (without ground truth: all), hours
    recorded."""

    day: str
    raised: int
    false_alarms: int
    hours: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well scores order rows, whatever the limit; `metrics` says how each is formed.

    auc, pauc (up to `MAX_FPR`, McClish), vus_pr : float
    """

    auc: float
    pauc: float
    vus_pr: float


@dataclass(frozen=True)
class Evaluation:
    """What a monitor's alarms on one recording are worth.

    unit : what the figures count: "rows", or "parts" for a cyclic process; period_s : seconds per unit
    rows, scored : rows of the recording, and those with a verdict; hours : time with a verdict
    gaps : holes in the recording; masked : share of the cells of the monitor's tags without a valid value
    raised, alerts_per_day, allowed : alerts, their rate per day of scored time, and how many the budget allows in
        this time; budget_per_day : of the model
    quantiles : quantile -> score; above : level -> share of the scored rows at or above it
    days : each day that holds a row
    ranking, random : ranking figures, and those of a random score; None without ground truth of both classes
    point : the operating point at the model's own limit, None without ground truth
    events : of the ground truth; false_alerts : numbers of alerts raised on healthy rows
    vus_window : rows or parts; notes : what to know when reading the figures
    """

    monitor: str
    model_id: str
    unit: Literal["rows", "parts"]
    period_s: float
    rows: int
    scored: int
    hours: float
    span_ns: tuple[int, int]
    gaps: int
    masked: float
    raised: int
    alerts_per_day: float
    allowed: float
    budget_per_day: float
    quantiles: dict[float, float]
    above: dict[float, float]
    days: tuple[Day, ...]
    ranking: Ranking | None = None
    random: Ranking | None = None
    point: OperatingPoint | None = None
    events: tuple[Event, ...] = ()
    false_alerts: tuple[int, ...] = ()
    vus_window: int = VUS_WINDOW
    notes: tuple[str, ...] = field(default=())


def replay(
    record: Record, monitor: Monitor, *, edges: Int64 | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Replay:
    """Run a recording through the engine and keep what it said.

    Parameters
    ----------
    record : rows of the tags that the monitor was opened for
    monitor : freshly opened
    edges : int64[n_bins + 1], increasing; borders of the stretches of time of `Replay.lead`; None = none
    progress : called now and then with (rows done, rows)
    """
    return _Replayer(record, monitor, edges).run(progress)


class _Replayer:
    """One run of a recording through one monitor."""

    def __init__(self, record: Record, monitor: Monitor, edges: Int64 | None) -> None:
        n, k = len(record), len(monitor.model.tags)
        self.record, self.monitor = record, monitor
        self.score, self.slow = np.full(n, np.nan), np.full(n, np.nan)
        self.alert, self.status = np.zeros(n, np.bool_), np.zeros(n, np.uint32)
        n_bins = 0 if edges is None else len(edges) - 1
        self.lead, self.peak = np.zeros((n_bins, k), np.float32), np.full(n_bins, np.nan, np.float32)
        self.bin = None if edges is None else np.clip(np.searchsorted(edges, record.source_ns, "right") - 1, 0,
                                                      n_bins - 1)
        self.alerts: list[Alert] = []
        self.parts: list[PartVerdict] = []
        self.owner = {c.name: monitor.plan.owner(c.name) for c in monitor.plan.columns}
        self.judge = as_part_monitor(monitor)
        self.errors = None if self.judge is not None else _Errors(record, monitor)

    def run(self, progress: Callable[[float, float], None]) -> Replay:
        """Step through all rows."""
        engine, n = Engine([self.monitor]), len(self.record)
        for i, frame in enumerate(frames_of(self.record)):
            (verdict,) = engine.step(frame)
            self.score[i], self.slow[i] = verdict.score, verdict.slow_score
            self.alert[i], self.status[i] = verdict.alert, verdict.status
            if verdict.raised:
                self._raise(i, frame.source_ns)
            if self.judge is not None and self.judge.part_ended:
                self._end_part()
            if self.alerts and verdict.alert and verdict.score > self.alerts[-1].peak_score:
                self.alerts[-1].peak_score = verdict.score
            if verdict.cleared and self.alerts:
                self.alerts[-1].end, self.alerts[-1].cleared_ns = i, frame.source_ns
            if self.bin is not None and verdict.score == verdict.score:
                b = self.bin[i]
                if not verdict.score <= self.peak[b]:
                    self.peak[b] = verdict.score
                    self.lead[b] = verdict.contribution
            if self.errors is not None:
                self.errors.take(i, verdict.alert)
            if i % BLOCK == 0:
                progress(i, n)
        progress(n, n)
        error = np.full(len(self.monitor.model.tags), np.nan) if self.errors is None else self.errors.by_tag()
        return Replay(self.monitor.name, self.monitor.model.model_id, tuple(t.name for t in self.monitor.model.tags),
                      self.score, self.slow, self.alert, self.status, self.lead, self.peak, error, tuple(self.alerts),
                      tuple(self.parts))

    def _raise(self, row: int, now_ns: int) -> None:
        share, verdict = self.monitor.verdict.contribution, self.monitor.verdict
        top = verdict.tags[int(share.argmax())] if share.any() else ""
        self.alerts.append(Alert(len(self.alerts) + 1, row, len(self.record), now_ns, None, verdict.score, top))
        if len(self.alerts) <= MOST_EXPLAINED:
            self._explain(self.alerts[-1])

    def _explain(self, alert: Alert) -> None:
        told = self.monitor.explain(self.monitor.snapshot())
        alert.sentence, alert.explained = told.sentence, True
        if told.causes:  # the tag that the sentence speaks of, where it is not the one with the largest contribution
            alert.top_tag = self.owner.get(told.causes[0].tag, told.causes[0].tag)
        alert.causes = tuple((c.tag, self.monitor.cause_text(c), c.share) for c in told.causes[:MOST_CAUSES])

    def _end_part(self) -> None:
        """Keep the verdict on a part; the first whole bad part tells more of an alert than what raised it midway."""
        assert self.judge is not None
        part = self.judge.last_part()
        self.parts.append(part)
        if part.sentence and self.monitor.verdict.alert and self.alerts:
            alert = self.alerts[-1]
            if alert.explained and (len(self.parts) < 2 or alert.raised_ns > self.parts[-2].end_ns):
                self._explain(alert)
                alert.top_tag, alert.sentence = part.top_tag, part.sentence


class _Errors:
    """Sums up how large the errors of quiet rows are, beside what the fit held out."""

    def __init__(self, record: Record, monitor: Monitor) -> None:
        calibration = monitor.model.calibration
        self.monitor, self.truth = monitor, record.truth
        self.state = _states(record, monitor)
        self.scorer = calibration.scorer()
        n = len(calibration.channels)
        self.block, self.rows, self.filled = np.full((BLOCK, n), np.nan), np.zeros(BLOCK, np.int64), 0
        self.found, self.expected = np.zeros(n), np.zeros(n)

    def take(self, row: int, alert: bool) -> None:
        """Take the residuals of the row that the monitor has just judged."""
        if (self.truth[row] if self.truth is not None else alert) or self.state[row] < 0:
            return
        at = 0
        for method in self.monitor.methods:
            self.block[self.filled, at:at + len(method.channels)] = method.residual
            at += len(method.channels)
        self.rows[self.filled] = row
        self.filled += 1
        if self.filled == BLOCK:
            self._add()

    def _add(self) -> None:
        state = self.state[self.rows[:self.filled]]
        energy = self.scorer.energies(self.block[:self.filled], state)
        known = ~np.isnan(energy)
        self.found += np.where(known, energy, 0.0).sum(axis=0)
        self.expected += np.where(known, self.scorer.calibration.usual[state], 0.0).sum(axis=0)
        self.filled = 0

    def by_tag(self) -> Float64:
        """Return float64[n_tags]: mean ratio of the channels of each tag."""
        self._add()
        model = self.monitor.model
        owner = np.array([self.monitor.plan.owner(c.column) for c in model.calibration.channels])
        usable = np.array([c.kind not in FIXED_KINDS for c in model.calibration.channels])
        usable &= (model.calibration.usual >= EXPECTED_ENERGY).all(axis=0) & (self.expected > 0)
        ratio = np.divide(self.found, self.expected, out=np.full(len(owner), np.nan), where=usable)
        return np.array([float(np.mean(ratio[own])) if (own := usable & (owner == tag.name)).any() else np.nan
                         for tag in model.tags])


def _states(record: Record, monitor: Monitor) -> Int64:
    """Return int64[n]: index of the learnt state of each row, -1 = none, as the monitor chooses it."""
    name = monitor.model.state_tag
    if not name:
        return np.zeros(len(record), np.int64)
    at = [tag.name for tag in record.tags].index(name)
    state = np.full(len(record), -1, np.int64)
    ok = record.valid[:, at] != 0
    value = np.where(ok, record.values[:, at], 0).astype(np.int64)
    for i, learnt in enumerate(monitor.model.calibration.states):
        state[ok & (value == learnt)] = i
    return state


def evaluate(record: Record, said: Replay, *, budget_per_day: float, vus_window: int | None = None) -> Evaluation:
    """Return what the alarms of a replay are worth.

    Figures of rows count the rows of the recording; those of a cyclic process count whole parts: a part is anomalous
    where one of its rows is, and alarms where its score is at least 1. An event or an alert that spans a hole of the
    recording is one.

    Parameters
    ----------
    record : the recording that was replayed; its `truth` is what the figures are measured against
    budget_per_day : false alarms that the model was fitted for; vus_window : rows or parts, see `metrics.vus_pr`;
        None = `VUS_WINDOW` or `VUS_PARTS`

    Raises
    ------
    RecordError
        No row got a verdict.
    """
    n = len(record)
    known = ~np.isnan(said.score)
    if vus_window is None:
        vus_window = VUS_PARTS if said.parts else VUS_WINDOW
    if not known.any():
        raise RecordError(
            f"not one of {n} rows got a verdict: the recording is too short, or nothing in it can be judged",
            where=f"monitor {said.monitor}", next_step="take a longer recording, with valid values of the model's tags")
    period_s = record.period_ns / 1e9
    names = [tag.name for tag in record.tags]
    own = [names.index(name) for name in said.tags]
    quantiles = dict(zip(QUANTILES, np.quantile(said.score[known], QUANTILES).tolist(), strict=True))
    hours = float(known.sum()) * period_s / 3600
    days = hours / 24
    notes = _notes(record, said, hours, budget_per_day)
    plain: dict[str, Any] = dict(
        monitor=said.monitor, model_id=said.model_id, rows=n, scored=int(known.sum()), hours=hours,
        span_ns=(int(record.source_ns[0]), int(record.source_ns[-1])), gaps=int(record.gap.sum()) - 1,
        masked=float(np.mean([np.mean(record.valid[:, c] == 0) for c in own])), raised=len(said.alerts),
        alerts_per_day=len(said.alerts) / days, allowed=budget_per_day * days, budget_per_day=budget_per_day,
        quantiles=quantiles, above={level: float(np.mean(said.score[known] >= level)) for level in (0.5, 1.0)},
        vus_window=vus_window)
    truth = record.truth
    if truth is None:
        every = [a.raised_ns for a in said.alerts]
        return Evaluation(unit="rows", period_s=period_s, days=_days(record, every, every), notes=notes, **plain)
    unit: Literal["rows", "parts"] = "parts" if said.parts else "rows"
    if said.parts:
        score, labels, truth, unit_s = _part_table(record, said, truth)
        alert = np.nan_to_num(score, nan=0.0) >= 1.0
    else:
        score, labels, alert, unit_s = said.score, truth, said.alert, period_s
    ranking = random = None
    if labels.any() and not labels.all():
        ranking, random = rank(score, labels, vus_window), _random(score, labels, vus_window)
    else:
        only = "faulty" if labels.any() else "healthy"
        notes += (f"the ground truth calls every one of the {unit} {only}: nothing can be ranked",)
    events = _events(record, said, truth)
    point = operating_point(alert, labels, unit_s)
    if said.parts:  # a part is judged at its end, so recall and delay are those of the events in rows
        delays = [event.delay_s for event in events if event.found]
        point = replace(point, onsets=len(events), detected=len(delays),
                        onset_recall=len(delays) / len(events) if events else math.nan,
                        delay_s=float(np.median(delays)) if delays else math.nan)
    false = [a for a in said.alerts if not truth[a.begin]]
    return Evaluation(
        unit=unit, period_s=unit_s, ranking=ranking, random=random, point=point, events=events, notes=notes,
        false_alerts=tuple(a.event_no for a in false),
        days=_days(record, [a.raised_ns for a in said.alerts], [a.raised_ns for a in false]), **plain)


def rank(score: Float64, truth: UInt8, vus_window: int = VUS_WINDOW) -> Ranking:
    """Return the ranking figures of a score; both classes must be there."""
    return Ranking(auc(score, truth), partial_auc(score, truth, MAX_FPR), vus_pr(score, truth, vus_window))


def _random(score: Float64, truth: UInt8, vus_window: int) -> Ranking:
    """Return the mean figures of random scores on the rows that have a verdict: what the truth alone gives away."""
    found = []
    for seed in range(RANDOM_SEEDS):
        drawn = np.where(np.isnan(score), np.nan, np.random.default_rng(seed).random(len(score)))
        found.append(rank(drawn, truth, vus_window))
    return Ranking(*(float(np.mean([getattr(r, name) for r in found])) for name in ("auc", "pauc", "vus_pr")))


def runs(flags: NDArray[Any]) -> list[tuple[int, int]]:
    """Return (begin, end) of the unbroken runs of non-zero entries, half open."""
    on = np.concatenate([[0], (np.asarray(flags) != 0).astype(np.int8), [0]])
    edges = np.diff(on)
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def _events(record: Record, said: Replay, truth: UInt8) -> tuple[Event, ...]:
    starts = np.array([a.begin for a in said.alerts], np.int64)
    found = []
    for begin, end in runs(truth):
        hit = np.flatnonzero(said.alert[begin:end])
        first = begin + int(hit[0]) if len(hit) else -1
        # The alert that stands at the first hit is the last one raised until then.
        alert = said.alerts[int(np.searchsorted(starts, first, "right")) - 1] if first >= 0 else None
        inside = said.score[begin:end]
        peak = float(np.nanmax(inside)) if not np.isnan(inside).all() else math.nan
        delay = (int(record.source_ns[first]) - int(record.source_ns[begin])) / 1e9 if alert else math.nan
        found.append(Event(
            begin, end, int(record.source_ns[begin]), int(record.source_ns[end - 1]), alert is not None, delay,
            alert.event_no if alert else 0, alert.top_tag if alert else "", alert.sentence if alert else "",
            alert is not None and alert.begin < begin, peak))
    return tuple(found)


def _part_table(record: Record, said: Replay, truth: UInt8) -> tuple[Float64, UInt8, UInt8, float]:
    """Return (score float64[p], truth uint8[p], truth uint8[n], mean seconds) of the whole parts.

    A part is judged with the row after its last one, so the rows of an event last until then.
    """
    begin = np.searchsorted(record.source_ns, [p.begin_ns for p in said.parts])
    end = np.searchsorted(record.source_ns, [p.end_ns for p in said.parts], "right")
    labels = np.array([truth[a:b].any() for a, b in zip(begin, end, strict=True)], np.uint8)
    rows = truth.copy()
    for a, b in zip(begin[labels == 1], end[labels == 1], strict=True):
        rows[a + int(np.argmax(truth[a:b])):b + 1] = 1
    seconds = float(np.mean(end - begin)) * record.period_ns / 1e9
    return np.array([p.score for p in said.parts]), labels, rows, seconds


def _days(record: Record, raised_ns: Sequence[int], false_ns: Sequence[int]) -> tuple[Day, ...]:
    day = record.source_ns // DAY_NS
    first = int(day[0])
    rows = np.bincount(day - first)
    raised, false = (np.bincount(np.array(times, np.int64) // DAY_NS - first, minlength=len(rows))
                     for times in (raised_ns, false_ns))
    hour = record.period_ns / 3.6e12
    return tuple(
        Day(datetime.fromtimestamp((first + i) * DAY_S, UTC).strftime("%Y-%m-%d"), int(raised[i]), int(false[i]),
            float(rows[i]) * hour)
        for i in np.flatnonzero(rows).tolist())


def _notes(record: Record, said: Replay, hours: float, budget: float) -> tuple[str, ...]:
    notes: list[str] = []
    if budget * hours / 24 < FEW_ALERTS:
        notes.append(f"{in_words(hours * 3600)} are too short to check a budget of {in_budget(budget)}, which allows "
                     f"{at_most(budget * hours / 24)} in this time")
    if len(said.alerts) > MOST_EXPLAINED:
        notes.append(f"only the first {MOST_EXPLAINED} of {len(said.alerts)} alerts are explained")
    unknown = float(np.mean(np.isnan(said.score)))
    if unknown > 0.1:
        notes.append(f"{unknown:.0%} of the rows got no verdict (warming up after holes, masked tags, or an operating "
                     "state that was not learnt)")
    if said.parts:
        notes.append("the monitor judges parts, so the figures count whole parts; a delay counts from the first faulty "
                     "row to the verdict")
    return tuple(notes)


def in_words(seconds: float) -> str:
    """Return a length of time as a person says it."""
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.001 or seconds == 0 else f"{seconds * 1000:.2g} ms"


def in_budget(per_day: float) -> str:
    """Return a budget of false alarms in words."""
    return f"{per_day:g} false alarm{'' if per_day == 1 else 's'} a day"


def at_most(count: float) -> str:
    """Return an expected number of alerts in words."""
    return "under 0.01" if 0 <= count < 0.01 else f"{count:.2g}" if count < 10 else f"{count:.0f}"


def held_truth(values: Float64, valid: UInt8) -> tuple[UInt8, int]:
    """Return (truth uint8[n], rows where it was not known) of a tag that is not 0 while something is wrong.

    A row without a valid value keeps the truth of the row before; before the first one it is healthy.
    """
    ok = (valid != 0) & np.isfinite(values)
    last = np.maximum.accumulate(np.where(ok, np.arange(len(values)), -1))
    wrong = np.where(ok, values != 0, False)
    return np.where(last >= 0, wrong[last], False).astype(np.uint8), int((~ok).sum())


def as_dict(found: Evaluation, said: Replay) -> dict[str, Any]:
    """Return an evaluation as plain names and numbers, without times in words."""
    out: dict[str, Any] = asdict(found)
    out["quantiles"] = {f"{q:g}": value for q, value in found.quantiles.items()}
    out["above"] = {f"{level:g}": share for level, share in found.above.items()}
    out["alerts"] = [asdict(alert) for alert in said.alerts]
    out["parts"] = len(said.parts)
    return out


def top_tags(said: Replay) -> Sequence[str]:
    """Return the tags by how much of the score they carried, those that carried most first."""
    weight = (said.lead * np.nan_to_num(said.peak)[:, None]).sum(axis=0) if len(said.lead) else np.zeros(len(said.tags))
    order = np.argsort(-weight, kind="stable")
    return [said.tags[i] for i in order]
