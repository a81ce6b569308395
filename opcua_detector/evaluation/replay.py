"""A recording run through the engine that runs live, and what it said, row by row and part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, Int64, PartVerdict, Record, UInt32
from ..engine import Engine, Monitor, RowMonitor, frames_of
from ..feedback.bench import state_rows
from ..views import FIXED_KINDS

MOST_EXPLAINED: Final = 1000  # alerts that get a sentence: explaining costs far more than scoring
MOST_CAUSES: Final = 3
BLOCK: Final = 4096  # rows
EXPECTED_ENERGY: Final = 0.2  # channels whose healthy energy is below it are too seldom active to compare


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
        self.errors = _Errors(record, monitor) if isinstance(monitor, RowMonitor) else None  # parts have no row errors

    def run(self, progress: Callable[[float, float], None]) -> Replay:
        """Step through all rows."""
        engine, n = Engine([self.monitor]), len(self.record)
        for i, frame in enumerate(frames_of(self.record)):
            (verdict,) = engine.step(frame)
            self.score[i], self.slow[i] = verdict.score, verdict.slow_score
            self.alert[i], self.status[i] = verdict.alert, verdict.status
            if verdict.raised:
                self._raise(i, frame.source_ns)
            part = self.monitor.ended_part()
            if part is not None:
                self._end_part(part)
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

    def _end_part(self, part: PartVerdict) -> None:
        """Keep the verdict on a part; the first whole bad part tells more of an alert than what raised it midway."""
        self.parts.append(part)
        if part.sentence and self.monitor.verdict.alert and self.alerts:
            alert = self.alerts[-1]
            if alert.explained and (len(self.parts) < 2 or alert.raised_ns > self.parts[-2].end_ns):
                self._explain(alert)
                alert.top_tag, alert.sentence = part.top_tag, part.sentence


class _Errors:
    """Sums up how large the errors of quiet rows are, beside what the fit held out."""

    def __init__(self, record: Record, monitor: RowMonitor) -> None:
        calibration = monitor.model.calibration
        self.monitor, self.truth = monitor, record.truth
        self.state = state_rows(monitor.model, record)
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


def top_tags(said: Replay) -> Sequence[str]:
    """Return the tags by how much of the score they carried, those that carried most first."""
    weight = (said.lead * np.nan_to_num(said.peak)[:, None]).sum(axis=0) if len(said.lead) else np.zeros(len(said.tags))
    order = np.argsort(-weight, kind="stable")
    return [said.tags[i] for i in order]
