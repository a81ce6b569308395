"""What the alarms of a replay are worth: against ground truth, or against the alarm budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, Record, UInt8
from ..errors import RecordError
from ..metrics import OperatingPoint, auc, operating_point, partial_auc, vus_pr
from .replay import MOST_EXPLAINED, Replay
from .words import at_most, in_budget, in_words

MAX_FPR: Final = 0.1
VUS_WINDOW: Final = 100  # rows, the default of the metric's authors
VUS_PARTS: Final = 10  # the same for a monitor that judges parts, of which there are far fewer
RANDOM_SEEDS: Final = 5  # the random score's row is the mean over so many
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
DAY_NS: Final = 86_400_000_000_000
DAY_S: Final = 86_400.0
FEW_ALERTS: Final = 3.0  # expected alerts below which a rate per day says little


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
