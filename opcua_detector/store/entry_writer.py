"""Writing what is kept for ever: events, feedback, audit, models, runs; queued, never dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlite_utils

from ..errors import StoreError
from .entries import AuditEntry, Event, FeedbackEntry, StoredModel, causes_to_json, to_json
from .reader import Reader
from .recorder import Recorder
from .writer_lock import WriterLock

CALL_TIMEOUT_S = 30.0
_EVENT = """
    INSERT INTO events (run_id, monitor, event_no, raised_ns, cleared_ns, peak_score, severity, model_id,
    sentence,
                        causes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (run_id, monitor, event_no) DO UPDATE SET
        cleared_ns = coalesce(excluded.cleared_ns, cleared_ns),
        peak_score = max(coalesce(peak_score, excluded.peak_score), coalesce(excluded.peak_score,
        peak_score)), severity = max(severity, excluded.severity),
        model_id = CASE WHEN excluded.model_id = '' THEN model_id ELSE excluded.model_id END,
        sentence = CASE WHEN excluded.sentence = '' THEN sentence ELSE excluded.sentence END,
        causes = CASE WHEN excluded.causes = '[]' THEN causes ELSE excluded.causes END"""


def insert_audit(db: sqlite_utils.Database, now_ns: int, entry: AuditEntry) -> None:
    """Write one audit entry, inside the caller's transaction."""
    db.table("audit").insert(
        {
            "at_ns": entry.at_ns or now_ns,
            "who": entry.who,
            "action": entry.action,
            "detail": to_json(entry.detail),
        }
    )


class EntryWriter(Reader):
    """The part of `Store` that writes single entries."""

    def __init__(
        self,
        path: Path,
        busy_timeout_s: float,
        clock_ns: Callable[[], int],
        writer: Recorder | None,
        lock: WriterLock | None,
    ) -> None:
        super().__init__(path, busy_timeout_s)
        self._clock_ns, self._recorder, self._lock_file = clock_ns, writer, lock

    def _check_exclusive(self, what: str) -> None:
        if self._recorder is not None and self._lock_file is None:
            raise StoreError(
                f"{what} needs a store that was opened for itself",
                where=str(self.path),
                next_step="open it without beside",
            )

    @property
    def _writer(self) -> Recorder:
        if self._recorder is None:
            raise StoreError(
                "the store was opened for reading only",
                where=str(self.path),
                next_step="open it without readonly",
            )
        return self._recorder

    def flush(self, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Wait until everything offered so far is committed; False where that takes longer."""
        future = self._writer.submit(None, waited=True)
        try:
            future.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def record_event(self, event: Event) -> None:
        """Write an event, or complete the one of the same number: what is not given stays as it was.

        Never waits and never drops; committed with the next batch. For raised, explained and cleared alike.
        """
        run_id = event.run_id or self._writer.run_id
        values = (
            run_id,
            event.monitor,
            event.event_no,
            event.raised_ns,
            event.cleared_ns,
            event.peak_score,
            event.severity,
            event.model_id,
            event.sentence,
            causes_to_json(event.causes),
        )
        self._writer.submit(lambda db: db.execute(_EVENT, values), urgent=False)

    def start_run(self, version: str, config_hash: str = "", monitors: Sequence[str] = ()) -> int:
        """Begin a run, to which events and trend belong from now on; `monitors` get their rings now."""
        self._check_exclusive("a run")
        for monitor in monitors:
            self._writer.watch(monitor)
        row = {
            "started_ns": self._clock_ns(),
            "ended_ns": None,
            "version": version,
            "config_hash": config_hash,
            "end_reason": "",
        }
        run_id = int(self._writer.call(lambda db: db.table("runs").insert(row).last_pk, CALL_TIMEOUT_S))
        self._writer.run_id = run_id
        return run_id

    def end_run(self, reason: str = "stopped", timeout_s: float = CALL_TIMEOUT_S) -> None:
        """End the run under way; everything offered in it is in the same or an earlier commit."""
        values = [self._clock_ns(), reason, self._writer.run_id]
        self._writer.call(
            lambda db: db.execute("UPDATE runs SET ended_ns = ?, end_reason = ? WHERE id = ?", values),
            timeout_s,
        )
        self._writer.run_id = 0

    def register_model(
        self,
        model_id: str,
        monitor: str,
        path: str | os.PathLike[str],
        sha256: str,
        header: Mapping[str, Any],
    ) -> StoredModel:
        """Write where a model file lies; the same model registered again updates path and header."""
        row = {
            "model_id": model_id,
            "monitor": monitor,
            "path": str(path),
            "sha256": sha256,
            "created_ns": self._clock_ns(),
            "header": to_json(header),
        }
        self._writer.call(
            lambda db: db.table("models").upsert(row, pk=("model_id", "monitor")), CALL_TIMEOUT_S
        )
        return StoredModel(model_id, monitor, str(path), sha256, int(str(row["created_ns"])), header)

    def record_feedback(self, entry: FeedbackEntry, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Write what an operator said; return its number."""
        row = {
            "at_ns": entry.at_ns or self._clock_ns(),
            "who": entry.who,
            "label": entry.label,
            "monitor": entry.monitor,
            "event_no": entry.event_no,
            "start_ns": entry.start_ns,
            "end_ns": entry.end_ns,
            "tags": to_json(entry.tags),
            "comment": entry.comment,
            "model_id": entry.model_id,
        }
        return int(self._writer.call(lambda db: db.table("feedback").insert(row).last_pk, timeout_s))

    def record_audit(self, entry: AuditEntry, timeout_s: float | None = CALL_TIMEOUT_S) -> None:
        """Write who did what; None as time-out does not wait for the commit (and still drops nothing)."""
        if timeout_s is None:
            self._writer.submit(lambda db: insert_audit(db, self._clock_ns(), entry))
        else:
            self._writer.call(lambda db: insert_audit(db, self._clock_ns(), entry), timeout_s)
