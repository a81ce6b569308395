"""Feedback on monitors of a config: from an entry in the store to a changed model file, with an audit of every step.

The service and the command line use the same desk; whoever holds the store for itself answers what is pending. So a
command reaches a running service through the store alone: it adds an entry, and reads the answer from the audit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..api import Method, MethodModel, Record, Tag
from ..app import group_tags, model_path, record_model, registry_of
from ..config import Config, MonitorConfig
from ..engine import AlertSettings
from ..errors import ConfigError, DetectorError, ModelFileError, RecordError
from ..model import NormalityModel
from ..model import load as load_model
from ..store import AuditEntry, Event, FeedbackEntry, Store
from .bench import FORECAST_ROWS, forecast, lead_rows
from .deltas import confirm, expire, journal, undo
from .give import give_feedback
from .policy import DAY_NS, LABELS, Feedback, Outcome, Policy

CONFIRM, UNDO = "confirm", "undo"
REQUESTS: Final = (*LABELS, CONFIRM, UNDO)
ANSWERED: Final = "feedback answered"
FORECAST: Final = "feedback forecast"
EXPIRED: Final = "feedback expired"
MISSED_NS: Final = 60_000_000_000  # of a missed alert that is told without an interval: so long before

STANDING_NS: Final = 2**62  # end of an alert that stands: as far as there are rows


@dataclass(frozen=True)
class Answer:
    """What became of an entry.

    model : the model in force from now on, None where nothing changed; before : the one until now
    """

    entry: FeedbackEntry
    action: str
    text: str
    before: NormalityModel | None = None
    model: NormalityModel | None = None
    delta_id: str = ""


class Desk:
    """Answers feedback on the monitors of a config, one entry at a time; any thread, but never two at once.

    Parameters
    ----------
    store : open for writing (beside another process will do)
    policy : how far feedback may go; default: what the config says of each monitor
    models : the models in force, monitor -> model; others are loaded when they are asked for
    """

    def __init__(self, config: Config, config_file: Path, store: Store, *, policy: Policy | None = None,
                 models: Mapping[str, NormalityModel] | None = None) -> None:
        self.config, self.config_file, self.store = config, config_file, store
        self._policy = policy
        self.models = dict(models or {})
        self._registry = registry_of(config)

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> Method:
        """Open one method of a model."""
        return self._registry.get(model.plugin).open(model, columns)

    def model(self, monitor: str) -> NormalityModel:
        """Return the model in force."""
        if monitor not in self.models:
            self.models[monitor] = load_model(model_path(self.config_file, self.config.monitor(monitor)))
        return self.models[monitor]

    # --- entries

    def pending(self) -> list[FeedbackEntry]:
        """Return the entries that nobody has answered, oldest first."""
        known = {m.name for m in self.config.monitors}
        return [entry for entry in self.store.unanswered_feedback(ANSWERED) if entry.monitor in known]

    def answer(self, entry: FeedbackEntry, recent: Record | None = None) -> Answer:
        """Do what an entry asks for, save the model file where it changes, and write the answer to the audit.

        recent : rows of the monitor's group that may not be in the store yet
        """
        return self.keep(self.decide(entry, recent))

    def decide(self, entry: FeedbackEntry, recent: Record | None = None) -> Answer:
        """Return what becomes of an entry; nothing is kept yet (see `keep`).

        Until it is kept the entry counts as pending, so that a stop in between leaves it to be answered again.
        """
        try:
            answer = self._do(entry, recent)
            if answer.model is not None and answer.before is not None:
                self._require_same_file(entry.monitor, answer.before)
            return answer
        except DetectorError as error:
            return _refused(entry, error)

    def keep(self, answer: Answer) -> Answer:
        """Save the model file where it changes and write the answer to the audit; return what holds.

        Where the file cannot be written the answer is a refusal that says why, with the model `before` in force: a
        service that runs the new one already takes it back.
        """
        entry = answer.entry
        if answer.model is not None and answer.before is not None:
            try:
                self._save(entry.monitor, answer.before, answer.model)
            except DetectorError as error:
                answer = replace(_refused(entry, error), before=answer.before)
        after = answer.model or answer.before
        self.store.record_audit(AuditEntry(entry.who, ANSWERED, {
            "feedback": entry.id, "monitor": entry.monitor, "label": entry.label, "event_no": entry.event_no,
            "action": answer.action, "text": answer.text, "delta": answer.delta_id,
            "model_before": answer.before.model_id if answer.before else None,
            "model_after": after.model_id if after else None}))
        return answer

    def _do(self, entry: FeedbackEntry, recent: Record | None) -> Answer:
        if entry.label not in REQUESTS:
            raise ConfigError("there is no such feedback", key="label", value=entry.label, expected=", ".join(REQUESTS))
        monitor = self.config.monitor(entry.monitor)
        before = self.model(entry.monitor)
        if entry.label == CONFIRM:
            after = confirm(before, entry.comment, entry.who, entry.at_ns)
            return Answer(entry, "confirmed", f"confirmed: {_told(before, entry.comment)}; model {after.model_id}",
                          before, after, entry.comment)
        if entry.label == UNDO:
            after = undo(before, entry.comment)
            return Answer(entry, "undone", f"undone: {_told(before, entry.comment)}; model {after.model_id}",
                          before, after, entry.comment)
        said = self.interval(entry)
        if entry.label in ("true", "unsure"):
            return Answer(entry, "noted", f"noted: {entry.label}; the model stays as it is", before)
        record = self.rows(monitor, before, said, recent)
        if len(record):
            said = replace(said, end_ns=min(said.end_ns, int(record.source_ns[-1])))
        healthy = self.healthy(monitor, said) if entry.label == "missed" else None
        outcome: Outcome = give_feedback(before, record, said, self.open, policy=self._policy or policy_of(monitor),
                                         healthy=healthy, alert=alert_of(monitor))
        return Answer(entry, outcome.action, outcome.text, before, outcome.model if outcome.changed else None,
                      outcome.delta_id)

    def interval(self, entry: FeedbackEntry) -> Feedback:
        """Return what is meant: an interval, or an event (0 or none: the last one).

        Raises
        ------
        RecordError
            There is no such event.
        """
        start, end = entry.start_ns, entry.end_ns
        if start is None or end is None:
            if entry.label == "missed":
                start, end = entry.at_ns - MISSED_NS, entry.at_ns
            else:
                event = self._event(entry.monitor, entry.event_no or 0)
                start, end = event.raised_ns, STANDING_NS if event.cleared_ns is None else event.cleared_ns
        return Feedback(entry.label, start, end, entry.who, entry.at_ns, entry.event_no or 0, entry.comment)

    def _event(self, monitor: str, number: int) -> Event:
        self.store.flush()  # an alert of this moment may still be on its way to the disk
        found = [e for e in self.store.events(monitor) if number in (0, e.event_no)]
        if not found:
            raise RecordError(f"there is no alert {number}" if number else "there was no alert yet",
                              where=f"monitor {monitor}", next_step="give its number, or an interval")
        return found[0]

    def _require_same_file(self, monitor: str, before: NormalityModel) -> None:
        """Check that the model file is the one in force.

        Raises
        ------
        ModelFileError
            Somebody has fitted the monitor again meanwhile.
        """
        path = model_path(self.config_file, self.config.monitor(monitor))
        if _id_in_file(path) != before.model_id:
            raise ModelFileError("the model file is another one than the model in force: it was fitted again",
                                 where=str(path), next_step="restart the service, then give the feedback again")

    def _save(self, monitor: str, before: NormalityModel, after: NormalityModel) -> None:
        """Replace the model file, if it still is the one that was changed.

        Raises
        ------
        ModelFileError
            Somebody has fitted the monitor again meanwhile, or it cannot be written.
        StoreError
            The store cannot note it; the file is as before.
        """
        self._require_same_file(monitor, before)
        path = model_path(self.config_file, self.config.monitor(monitor))
        record_model(self.store, after, path)
        after.save(path)
        self.models[monitor] = after

    # --- review

    def expire(self, now_ns: int) -> list[Answer]:
        """Revert what was provisional and is over; audited."""
        answers = []
        for item in self.config.monitors:
            try:
                before = self.model(item.name)
                after, over = expire(before, now_ns)
                if not over:
                    continue
                self._save(item.name, before, after)
            except DetectorError:
                continue  # no model yet, or fitted again: there is nothing of ours to revert
            text = f"expired unreviewed: {'; '.join(str(d['text']) for d in over)}; model {after.model_id}"
            self.store.record_audit(AuditEntry("opcua-detector", EXPIRED, {
                "monitor": item.name, "deltas": [d["id"] for d in over], "text": text,
                "model_before": before.model_id, "model_after": after.model_id}))
            entry = FeedbackEntry("opcua-detector", UNDO, item.name, at_ns=now_ns)
            answers.append(Answer(entry, "expired", text, before, after))
        return answers

    def forecast(self, answer: Answer) -> str:
        """Replay stored rows with the models before and after an answer; return and audit alerts per day."""
        if answer.before is None or answer.model is None:
            return ""
        text = str(self.compare(answer.entry.monitor, answer.before, answer.model))
        self.store.record_audit(AuditEntry(answer.entry.who, FORECAST, {
            "feedback": answer.entry.id, "monitor": answer.entry.monitor, "text": text,
            "model_before": answer.before.model_id, "model_after": answer.model.model_id}))
        return text

    def compare(self, monitor: str, before: NormalityModel, after: NormalityModel) -> Any:
        """Return the `Forecast` of two models of a monitor from the newest stored rows of its group."""
        item = self.config.monitor(monitor)
        return forecast(before, after, self.stored(item), self.open, alert=alert_of(item))

    # --- rows

    def rows(self, monitor: MonitorConfig, model: NormalityModel, said: Feedback, recent: Record | None) -> Record:
        """Return the rows of an interval with what makes its judgement exact before it.

        Raises
        ------
        RecordError
            They are not stored (any more).
        """
        group = self.config.group(monitor.group)
        first = said.start_ns - 2 * lead_rows(model) * group.period
        if recent is not None and len(recent) and recent.source_ns[0] <= said.start_ns:
            return recent.take(np.flatnonzero((recent.source_ns >= first) & (recent.source_ns <= said.end_ns)))
        found = [r for r in self.store.recordings() if r.group == group.name and r.period_ns == group.period
                 and r.first_ns is not None and r.last_ns is not None
                 and r.first_ns <= said.end_ns and r.last_ns >= said.start_ns and not r.thinned]
        if not found:
            raise RecordError("the rows of this interval are not stored", where=f"group {group.name}",
                              next_step="set `record: true` under store, or give a newer interval")
        best = max(found, key=lambda r: min(r.last_ns or 0, said.end_ns) - max(r.first_ns or 0, said.start_ns))
        return self._as_group(self.store.read_recording(best.id, first, said.end_ns + 1), monitor)

    def stored(self, monitor: MonitorConfig) -> Record:
        """Return the newest stored rows of a monitor's group, `FORECAST_ROWS` of them at most."""
        group = self.config.group(monitor.group)
        found = [r for r in self.store.recordings() if r.group == group.name and r.period_ns == group.period
                 and r.last_ns is not None and not r.thinned]
        parts: list[Record] = []
        rows = 0
        for r in sorted(found, key=lambda r: -(r.last_ns or 0)):
            first = (r.last_ns or 0) - (FORECAST_ROWS - rows) * group.period
            part = self._as_group(self.store.read_recording(r.id, first), monitor)
            if len(part) and (not parts or part.source_ns[-1] < parts[-1].source_ns[0]):
                parts.append(part)
                rows += len(part)
            if rows >= FORECAST_ROWS:
                break
        return _joined(parts[::-1], group_tags(group), group.period)

    def healthy(self, monitor: MonitorConfig, said: Feedback) -> Record:
        """Return stored rows without alerts and without the interval of an alert that was missed."""
        record = self.stored(monitor)
        keep = (record.source_ns < said.start_ns) | (record.source_ns > said.end_ns)
        for event in self.store.events(monitor.name):
            end = event.cleared_ns if event.cleared_ns is not None else event.raised_ns
            margin = 100 * record.period_ns
            keep &= (record.source_ns < event.raised_ns - margin) | (record.source_ns > end + margin)
        return record.take(np.flatnonzero(keep))

    def _as_group(self, record: Record, monitor: MonitorConfig) -> Record:
        tags = group_tags(self.config.group(monitor.group))
        missing = [t.name for t in tags if t.name not in {r.name for r in record.tags}]
        if missing:
            raise RecordError(f"the recording lacks the tags {', '.join(missing)}", where=f"monitor {monitor.name}",
                              next_step="give an interval that was recorded with this config")
        return replace(record.select([t.name for t in tags]), tags=tags)


def _refused(entry: FeedbackEntry, error: DetectorError) -> Answer:
    return Answer(entry, "refused", f"refused: {error.what}" + (f"; {error.next_step}" if error.next_step else ""))


def policy_of(monitor: MonitorConfig) -> Policy:
    """Return how far the feedback on a monitor may go, as its config says."""
    item = monitor.feedback
    return Policy(item.mode, item.expires / DAY_NS, item.beyond, item.protected, item.budget_factor)


def alert_of(monitor: MonitorConfig) -> AlertSettings:
    """Return the delays of a monitor's alert and what keeps it back."""
    return AlertSettings(monitor.on_delay, monitor.off_delay, monitor.severity, monitor.settling or 0, monitor.inhibit,
                         monitor.maintenance)


def _id_in_file(path: Path) -> str:
    """Return the model_id that a model file claims, without reading the rest of it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return bytes(archive["sha256"]).decode("ascii")[:16]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return load_model(path).model_id  # which says what is wrong with it


def _told(model: NormalityModel, delta_id: str) -> str:
    return next((f"{d['id']}, {d['text']}" for d in journal(model) if str(d["id"]).startswith(delta_id)), delta_id)


def _joined(parts: Sequence[Record], tags: Sequence[Tag], period_ns: int) -> Record:
    if not parts:
        return Record.from_rows(np.zeros((0, len(tags))), tags, period_ns)
    return Record(tuple(tags), period_ns, *(np.concatenate([getattr(p, name) for p in parts])
                                            for name in ("source_ns", "values", "valid", "gap")))
