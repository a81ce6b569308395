"""Alerts of a running service: into the store, explained off the loop, told, numbered so that no number comes twice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..api import Explanation, Verdict
from ..explain import counterfactual_sentence
from ..store import Event, Store
from .delivery import MonitorRun
from .outputs import EVENT_NO

log = logging.getLogger(__name__)


class Alerting:
    """Follows the alerts of all monitors, verdict by verdict, on the event loop.

    Parameters
    ----------
    store : called for the store, None when it is closed
    note : called with (event, our clock in ns) for each event that was recorded

    Attributes
    ----------
    tasks : explanations that are being made on other threads
    """

    def __init__(self, store: Callable[[], Store | None], note: Callable[[Event, int], None]) -> None:
        self.tasks: set[asyncio.Future[Explanation]] = set()
        self._store, self._note = store, note

    def follow(self, run: MonitorRun, verdict: Verdict) -> None:
        """Take the verdict on a row."""
        if verdict.raised:
            run.raised_ns, run.peak, run.explanation = verdict.source_ns, verdict.score, None
            log.warning("monitor %s: alert %d raised", run.config.name, verdict.event_no)
            self._record(run, verdict)
        if verdict.alert and verdict.score > run.peak:
            run.peak = verdict.score
        if verdict.cleared:
            log.warning("monitor %s: alert %d cleared", run.config.name, verdict.event_no)
            self._record(run, verdict, cleared_ns=verdict.source_ns)
        if run.explain_due(verdict):
            self._explain(run, verdict.event_no)

    def adopt(self, run: MonitorRun, number: int, taking: bool) -> None:
        """Number the alerts of a monitor on from the one that another instance told last: an HMI sees none fall.

        A standing alert keeps its number until this instance takes over (`taking`): then it ends in the store, and
        goes on under the next free number.
        """
        verdict = run.monitor.verdict
        if number <= verdict.event_no:
            return
        if verdict.alert:
            if not taking:
                return
            self._record(run, verdict, cleared_ns=verdict.source_ns)
            old, number = verdict.event_no, number + 1
            verdict.event_no, run.raised_ns = number, verdict.source_ns
            run.explanation = None
            log.warning("monitor %s: alert %d goes on as %d: another instance told numbers up to %d", run.config.name,
                        old, number, number - 1)
            self._record(run, verdict)
        run.monitor.continue_events(number)
        if run.back is not None:
            run.back.offer(run.config.name, 0, {EVENT_NO: number})

    def end_interrupted(self, store: Store, monitor: str) -> None:
        """End alerts that stood when their process was killed: what still stands is raised anew, as the next one."""
        for event in store.events(monitor):
            if event.cleared_ns is not None or event.run_id == store.run_id:
                continue
            trend = store.trend(monitor, run_id=event.run_id)
            seen = int(trend.source_ns[-1]) if len(trend) else event.raised_ns
            log.warning("monitor %s: alert %d stood when its process ended", monitor, event.event_no)
            store.record_event(replace(event, cleared_ns=max(seen, event.raised_ns)))

    def _record(self, run: MonitorRun, verdict: Verdict, *, cleared_ns: int | None = None) -> None:
        """Keep an event in the store, and for a server that is away."""
        store, told = self._store(), run.explanation
        assert store is not None
        event = Event(run.config.name, verdict.event_no, run.raised_ns, cleared_ns, run.peak, run.config.severity,
                      verdict.model_id, told.sentence if told else "", told.causes if told else ())
        store.record_event(event)
        self._note(event, time.time_ns())

    def _explain(self, run: MonitorRun, event_no: int) -> None:
        """Explain on another thread; the score is not delayed by it."""
        run.explaining = True
        future = asyncio.get_running_loop().run_in_executor(None, run.monitor.explain, run.monitor.snapshot())
        self.tasks.add(future)
        future.add_done_callback(partial(self._explained, run, event_no))

    def _explained(self, run: MonitorRun, event_no: int, done: asyncio.Future[Explanation]) -> None:
        self.tasks.discard(done)
        run.explaining = False
        verdict = run.monitor.verdict
        if done.cancelled() or self._store() is None:
            return
        if done.exception() is not None:
            log.error("monitor %s: alert %d could not be explained", run.config.name, event_no,
                      exc_info=done.exception())
            return
        first = run.explanation is None
        if verdict.event_no != event_no:
            return
        run.explanation = done.result()
        if first:
            run.alerts.append(run.explanation)
            run.alerts_told += 1
            log.warning("monitor %s: %s", run.config.name, run.explanation.sentence)
            for tag, without in run.explanation.counterfactual[:1]:
                log.info("monitor %s: %s", run.config.name, counterfactual_sentence(tag, without, verdict.score))
        if verdict.alert:
            self._record(run, verdict)
            if run.back is not None:
                run.back.tell(run.config.name, run.cause_values())
