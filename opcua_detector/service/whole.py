"""The live service: subscriptions -> frames -> engine -> write-back and store, with its start and shutdown order."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..api import Frame, Verdict
from ..app import group_tags, model_path, record_model
from ..client import ClockWatch, GroupFeed, LinkState, Session, WriteBack, raise_findings
from ..client.lease import LeaseKeeper
from ..config import Config, MonitorConfig
from ..engine import Engine, Monitor
from ..errors import ConnectionProblem
from ..feedback.live import LiveFeedback
from ..nodes import State
from ..store import AuditEntry, Store
from ..telemetry import Telemetry
from .alerting import Alerting
from .delivery import MonitorRun
from .outages import ConnectionAlarms, GapFiller
from .outputs import Outputs, Writing
from .reloading import Reloading
from .startup import OpenMonitors, check_nodes, config_hash, load_monitors, open_store, servers_of, warm

log = logging.getLogger(__name__)

TIMINGS = 1 << 16
EXPLAIN_PATIENCE_S = 2.0
TICK_S = 0.25
BLOCKED_S = 1.0  # the loop has stood still when it is as late as this
FAIL_AFTER_S = 5.0  # without a row: no verdict


class Service:
    """A config in operation.

    Parameters
    ----------
    only : names of the monitors to run; none: all
    on_verdict : called with (run, verdict) after each verdict, on the loop; for demonstrations and tests
    write : False: a dry run, nothing is written to any server
    writing : server -> how it is written, in place of what the configuration says

    Attributes
    ----------
    counters : loop_blocked (times that our own event loop stood still), detector_errors (rows that a detector could
        not work on), silences (monitors that were told to have no data because no row came), events_dropped (alerts
        of the time away that were told in the store only), models_refused (files that `reload` did not take),
        configs_refused (changed configurations with an error, found by `reload`)
    """

    def __init__(self, config: Config, config_file: Path, *, only: Sequence[str] = (), write: bool = True,
                 on_verdict: Callable[[MonitorRun, Verdict], None] | None = None,
                 writing: Mapping[str, Writing] | None = None) -> None:
        self.config, self.config_file = config, config_file
        self.runs: dict[str, MonitorRun] = {}
        self.feeds: dict[str, GroupFeed] = {}
        self.sessions: dict[str, Session] = {}
        self.store: Store | None = None
        self.scoring_ns = np.zeros(TIMINGS, np.int64)
        self.steps = 0
        self._only, self._write, self._on_verdict = only, write, on_verdict
        self.clocks: dict[str, ClockWatch] = {}
        self.fillers: dict[str, GapFiller] = {}
        self.connections = ConnectionAlarms(lambda: self.store, self._fed_by)
        self.counters = dict.fromkeys(("loop_blocked", "detector_errors", "silences", "events_dropped",
                                       "models_refused", "configs_refused"), 0)
        self.outputs = Outputs(config, config_file, self.sessions, lambda: self.store, write=write,
                               writing=writing or {}, on_ack=self._acknowledged, on_number=self._number)
        self._alerting = Alerting(lambda: self.store, self.outputs.note)
        self._reloading = Reloading(config, config_file, self.runs, self.counters)
        self._fail_after: dict[str, float] = {}
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self.wanted = tuple(only) or tuple(item.name for item in config.monitors)
        self.telemetry = Telemetry(self)
        self._recordings: dict[str, Any] = {}
        self.feedback: LiveFeedback | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def backs(self) -> dict[str, WriteBack]:
        """Server -> what writes to it."""
        return self.outputs.backs

    @property
    def keepers(self) -> dict[str, LeaseKeeper]:
        """Server -> the leases on its outputs, where there are any."""
        return self.outputs.keepers

    # --- start and stop --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load, connect, check, then let rows flow; any problem raises before the first row.

        Raises
        ------
        DetectorError
            ModelError, StoreError, ConnectionProblem, ConfigError: what, where, next step.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self.telemetry.start()
            monitors = load_monitors(self.config, self.config_file, self._only)
            await self._open_sessions(monitors)
            raise_findings(await check_nodes(self.config, self.sessions, list(monitors), self._written(monitors),
                                             file=str(self.config_file)))
            self.store = open_store(self.config)
            await self._attach(monitors)
            self._tick_due = self._loop.time()
            self._tick()
            self.telemetry.running()
        except BaseException:
            await self.stop("start failed")
            raise

    async def _open_sessions(self, monitors: OpenMonitors) -> None:
        needed = {tag.server or group.server for group in map(self.config.group, monitors) for tag in group.tags}
        needed |= {self.config.group(name).server for name in monitors}
        wanted = dict.fromkeys(server for items in monitors.values() for item, _ in items
                               for server in servers_of(self.config, item))
        # All at once; one that fails is told when every other has been tried, so that none is left half open.
        problems = await asyncio.gather(*(self._open_session(name, name in needed) for name in wanted),
                                        return_exceptions=True)
        for problem in problems:
            if problem is not None:
                raise problem

    async def _open_session(self, name: str, needed: bool) -> None:
        session = Session(self.config.server(name), on_state=lambda state, reason: self._link(name, state, reason))
        self.sessions[name] = session
        try:
            await session.open()
        except ConnectionProblem as problem:
            if self._write or needed:
                raise
            del self.sessions[name]
            log.warning("dry run without the outputs: %s", problem)
            return
        self.clocks[name] = ClockWatch(session)
        await session.attach(self.clocks[name])

    def _written(self, monitors: OpenMonitors) -> list[MonitorConfig]:
        return [item for items in monitors.values() for item, _ in items if item.outputs and self._write]

    async def _attach(self, monitors: OpenMonitors) -> None:
        assert self.store is not None
        self.store.start_run(__version__, config_hash(self.config_file), [m.name for m in self.config.monitors])
        self.store.record_audit(AuditEntry("service", "run started", {
            "config": str(self.config_file), "write": self._write,
            "models": {item.name: monitor.model.model_id for items in monitors.values() for item, monitor in items}},
            ), timeout_s=None)
        for name in self.sessions:
            self.connections.watch(name)
        await self.outputs.attach([item for items in monitors.values() for item, _ in items])
        self.feedback = LiveFeedback(self.config, self.config_file, self.store, self.runs, self._tell_feedback)
        for group_name, items in monitors.items():
            for item, monitor in items:
                record_model(self.store, monitor.model, model_path(self.config_file, item))
                self.runs[item.name] = self._run_of(item, monitor)
            await self._start_group(group_name, [self.runs[item.name] for item, _ in items])
        dry = any(back.rules.dry_run for back in self.backs.values())  # to read feedback empties its node
        await self.feedback.start(self.sessions, read_nodes=self._write and not dry)

    def _run_of(self, item: MonitorConfig, monitor: Monitor) -> MonitorRun:
        insecure = any(self.config.server(name).insecure for name in servers_of(self.config, item)
                       if name in self.sessions)
        return MonitorRun(item, monitor, self.outputs.of(item), insecure=insecure)

    async def _start_group(self, name: str, runs: list[MonitorRun]) -> None:
        assert self.store is not None
        group = self.config.group(name)
        engine = Engine([run.monitor for run in runs])
        warm(engine, len(group.tags))
        names = [tag.name for tag in group.tags]
        for run in runs:
            self._continue_events(run, self.store)
            fail_after_s = run.config.outputs.fail_after / 1e9 if run.config.outputs else FAIL_AFTER_S
            self._fail_after[run.config.name] = max(fail_after_s, 2 * group.max_hold * group.period / 1e9)
            run.columns = np.array([names.index(tag) for tag in run.monitor.verdict.tags], np.int64)
            self._no_data(run, "Bad: waiting for the first row")
        if self.config.store.record:
            self._recordings[name] = self.store.start_recording(
                None, group_tags(group), group.period, group=name, server=group.server)
        recording = self._recordings.get(name)
        most_ns = self.config.store.backfill if recording is not None else 0
        filler = self.fillers[name] = GapFiller(group, self.sessions, self.store, most_ns)
        assert self.feedback is not None
        recent = self.feedback.watch(name, engine)

        def on_frame(frame: Frame) -> None:
            started = time.perf_counter_ns()
            filler.row(frame.source_ns, frame.gap)
            try:
                verdicts = engine.step(frame)
            except Exception as error:
                self._detector_failed(runs, error)
                raise
            self.scoring_ns[self.steps % TIMINGS] = time.perf_counter_ns() - started
            self.steps += 1
            for run, verdict in zip(runs, verdicts, strict=True):
                run.take(verdict, bool(frame.valid[run.columns].any()))
                self._deliver(name, run, verdict)
            recent.offer(frame)
            if recording is not None:
                self.store.offer_row(recording, frame)  # type: ignore[union-attr]

        self.feeds[name] = GroupFeed(group, self.sessions, on_frame)
        await self.feeds[name].start()

    def _continue_events(self, run: MonitorRun, store: Store) -> None:
        """Number alerts on from the last one that the store knows, or that another instance told in the nodes."""
        name = run.config.name
        last = max(store.last_event_no(name), self.outputs.numbers.get(name, 0))
        run.monitor.continue_events(last)
        run.monitor.verdict.event_no = last  # until the first row
        self._alerting.end_interrupted(store, name)

    async def run(self, stop: asyncio.Event) -> None:
        """Start, live until `stop` is set, stop."""
        await self.start()
        try:
            await stop.wait()
        finally:
            await self.stop("stopped")

    async def stop(self, reason: str = "stopped") -> None:
        """Stop rows, say so in the nodes, close connections, commit the store; each step even if one fails."""
        self.telemetry.stopping()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None
        async with AsyncExitStack() as last_first:  # runs every step, then raises what the first failing one raised
            last_first.callback(self.telemetry.stop)
            last_first.callback(self._close_store, reason)
            for session in self.sessions.values():
                last_first.push_async_callback(session.close)
            for keeper in self.keepers.values():
                last_first.push_async_callback(keeper.stop)
            for back in self.backs.values():
                last_first.push_async_callback(back.stop, {
                    name: run.last_words() for name, run in self.runs.items() if run.back is back})
            if self._alerting.tasks:
                last_first.push_async_callback(asyncio.wait, set(self._alerting.tasks), timeout=EXPLAIN_PATIENCE_S)
            if self.feedback is not None:
                last_first.push_async_callback(self.feedback.stop)
            for filler in self.fillers.values():
                last_first.push_async_callback(filler.stop)
            for feed in self.feeds.values():
                last_first.push_async_callback(feed.stop)

    def _close_store(self, reason: str) -> None:
        if self.store is None:
            return
        store, self.store = self.store, None
        try:
            if store.run_id:
                store.record_audit(AuditEntry("service", "run ended", {"reason": reason}), timeout_s=None)
                store.end_run(reason, timeout_s=5.0)
        finally:
            store.close()

    async def reload(self) -> dict[str, str]:
        """Take the model files as they are now; return monitor -> what became of it (see `Reloading.all`).

        A login that is held back is tried at once.
        """
        for session in self.sessions.values():
            session.retry_now()
        assert self.store is not None and self.feedback is not None
        return await self._reloading.all(self.feedback, self.store)

    # --- the loop --------------------------------------------------------------------------------------------------

    def _deliver(self, group: str, run: MonitorRun, verdict: Verdict) -> None:
        if not math.isnan(verdict.score):
            run.scored += 1
        if run.back is not None:
            slow = None
            if run.slow_due(verdict):
                slow = run.slow(verdict, self.feeds[group].counters()["lost"],
                                run.back.superseded.get(run.config.name, 0))
            run.back.offer(run.config.name, verdict.source_ns, run.fast(verdict), slow)
        assert self.store is not None
        self.store.offer_verdict(verdict)
        self._alerting.follow(run, verdict)
        if self._on_verdict is not None:
            self._on_verdict(run, verdict)

    def _number(self, monitor: str, number: int, taking: bool) -> None:
        """Take the number of an alert that another instance has told, now and then and before this one writes."""
        run = self.runs.get(monitor)
        if run is not None:
            self._alerting.adopt(run, number, taking)

    def _tell_feedback(self, run: MonitorRun, text: str) -> None:
        if run.back is not None:
            run.back.tell(run.config.name, {"FeedbackResult": text})

    def _acknowledged(self, monitor: str, latency_ns: int) -> None:
        run = self.runs.get(monitor)
        if run is not None:
            run.latency_ms = latency_ns / 1e6  # offers without a row are not acknowledged

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def _fed_by(self, server: str) -> int:
        """Return how many monitors have tags on a server."""
        groups = {name for name, feed in self.feeds.items() if server in feed.subscriptions}
        return sum(run.config.group in groups for run in self.runs.values())

    def _link(self, server: str, state: LinkState, reason: str) -> None:
        """A lost connection is one alarm; it is told in the nodes of the other servers at once, in its own later."""
        log.info("server %s: %s", server, state.value)  # the session warns
        session = self.sessions.get(server)
        if session is None:
            return
        self.connections.link(server, session, state, reason)
        connected = state is LinkState.CONNECTED
        for name, feed in self.feeds.items():
            if server in feed.subscriptions:
                for run in self.runs.values():
                    if run.config.group == name:
                        self._cut_off(run, server, connected)
        self.outputs.link(server, connected)
        self.counters["events_dropped"] = self.outputs.dropped

    def _cut_off(self, run: MonitorRun, server: str, connected: bool) -> None:
        others = tuple(one for one in run.cut_off if one != server)
        if connected:
            if run.cut_off != others:
                run.cut_off = others
                if run.state == State.NO_DATA:
                    self._no_data(run, "Bad: waiting for the first row")
            return
        run.cut_off = (*others, server)
        self._no_data(run, f"Bad: no connection to {server}")

    def _no_data(self, run: MonitorRun, quality: str) -> None:
        self._no_verdict(run, State.NO_DATA, quality)

    def _no_verdict(self, run: MonitorRun, state: int, quality: str) -> None:
        fast, slow = run.no_verdict(state, quality)
        if run.back is not None:
            run.back.offer(run.config.name, 0, fast, slow)

    def _detector_failed(self, runs: Sequence[MonitorRun], error: Exception) -> None:
        """A row could not be worked on: what the nodes say of the one before is not true any more."""
        self.counters["detector_errors"] += 1
        for run in runs:
            if run.state != State.FAULT:
                log.error("monitor %s: the detector failed: %r", run.config.name, error)
            self._no_verdict(run, State.FAULT, f"Bad: the detector failed ({type(error).__name__})")

    def _tick(self) -> None:
        """Look at the time, whatever rows do."""
        assert self._loop is not None
        now = self._loop.time()
        late = now - self._tick_due
        if late >= BLOCKED_S:
            self.counters["loop_blocked"] += 1
            log.warning("our own event loop stood still for %.1f s: rows of that time are late", late)
            for run in self.runs.values():
                run.stepped_s += late  # the rows were there, we were not
        self.connections.step()
        self.outputs.look()
        for run in self.runs.values():
            limit = self._fail_after.get(run.config.name, FAIL_AFTER_S)
            if run.state not in (State.NO_DATA, State.FAULT) and time.monotonic() - run.stepped_s >= limit:
                self.counters["silences"] += 1
                log.warning("monitor %s: no row for %.1f s", run.config.name, limit)
                self._no_data(run, f"Bad: no row for {limit:g} s")
        self._tick_due = self._loop.time() + TICK_S
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
