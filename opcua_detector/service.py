"""The live service: subscriptions -> frames -> engine -> write-back and store, with its start and shutdown order."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .api import Explanation, Frame, Verdict
from .app import changed_since_fit, group_tags, model_path, open_monitor, record_model, registry_of
from .client import (
    ClockWatch,
    Finding,
    GroupFeed,
    LinkState,
    Session,
    WriteBack,
    check_outputs,
    check_tags,
    raise_findings,
)
from .client.forward import EventsAway
from .client.lease import LeaseKeeper, Role, instance_name
from .client.write_rules import NO_RULES, WriteRules
from .client.writeback import OUTSIDE
from .config import Config, MonitorConfig, ServerConfig
from .delivery import MonitorRun, known
from .engine import Engine, Monitor
from .errors import ConfigError, ConnectionProblem, DetectorError
from .explain import counterfactual_sentence
from .feedback.live import LiveFeedback
from .model import load as load_model
from .nodes import EVENTS_AWAY, LEASE, State
from .outages import ConnectionAlarms, GapFiller
from .store import AuditEntry, Event, Retention, Store
from .store.schema import DamagedStore
from .telemetry import Telemetry

__all__ = ["MonitorRun", "Service", "Writing", "check_nodes", "config_hash", "known", "retention_of", "writing_of"]

log = logging.getLogger(__name__)

TIMINGS = 1 << 16
EXPLAIN_PATIENCE_S = 2.0
TICK_S = 0.25
BLOCKED_S = 1.0  # the loop has stood still when it is as late as this
FAIL_AFTER_S = 5.0  # without a row: no verdict


@dataclass(frozen=True)
class Writing:
    """How one server is written.

    lease_s : period of the lease on the outputs; 0: this instance alone writes
    name : of this instance; empty: made once and kept beside the store
    """

    rules: WriteRules = NO_RULES
    lease_s: float = 0.0
    name: str = ""


def writing_of(server: ServerConfig) -> Writing:
    """Return how the configuration wants a server to be written."""
    given = server.writing
    lease = given.lease
    return Writing(
        WriteRules(given.allow, given.dry_run, given.node_every / 1e9, given.values_per_s,
                   given.read_back / 1e9),
        lease.period / 1e9 if lease else 0.0, lease.name if lease else "")


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
        of the time away that were told in the store only), models_refused (files that `reload` did not take)
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
        self.backs: dict[str, WriteBack] = {}
        self.clocks: dict[str, ClockWatch] = {}
        self.keepers: dict[str, LeaseKeeper] = {}
        self.fillers: dict[str, GapFiller] = {}
        self.connections = ConnectionAlarms(lambda: self.store, self._fed_by)
        self.counters = dict.fromkeys(
            ("loop_blocked", "detector_errors", "silences", "events_dropped", "models_refused"), 0)
        self._writing = dict(writing or {})
        self._away: dict[str, EventsAway] = {}
        self._acked_ns: dict[str, int] = {}
        self._fail_after: dict[str, float] = {}
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self.wanted = tuple(only) or tuple(item.name for item in config.monitors)
        self.telemetry = Telemetry(self)
        self._recordings: dict[str, Any] = {}
        self.feedback: LiveFeedback | None = None
        self._tasks: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

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
            monitors = self._open_monitors()
            await self._open_sessions(monitors)
            await self._check(monitors)
            self.store = self._open_store()
            await self._attach(monitors)
            self._tick_due = self._loop.time()
            self._tick()
            self.telemetry.running()
        except BaseException:
            await self.stop("start failed")
            raise

    def _open_store(self) -> Store:
        """Open the store; a damaged one is set aside: an old record must not keep the plant from being watched."""
        settings = self.config.store
        try:
            return Store.open(settings.path, synchronous=settings.synchronous, retention=retention_of(self.config))
        except DamagedStore as damage:
            if settings.on_corrupt != "set_aside":
                raise
            store = Store.open(settings.path, synchronous=settings.synchronous, retention=retention_of(self.config),
                               on_corrupt="set_aside")
            entry = next(iter(store.audit("damaged file set aside", limit=1)), None)
            log.error("%s: it was renamed to %s, and an empty store is begun; event numbers begin anew", damage.what,
                      entry.detail["renamed_to"] if entry else "a file beside it")
            return store

    def _open_monitors(self) -> dict[str, list[tuple[MonitorConfig, Monitor]]]:
        registry = registry_of(self.config)
        chosen = [self.config.monitor(n) for n in self._only] if self._only else list(self.config.monitors)
        opened: dict[str, list[tuple[MonitorConfig, Monitor]]] = {}
        for item in chosen:
            group = self.config.group(item.group)
            model = load_model(model_path(self.config_file, item))
            opened.setdefault(group.name, []).append((item, open_monitor(item, group, model, registry)))
            changed = changed_since_fit(item, group, model)
            if changed:
                log.warning("monitor %s: %s changed in the config since the fit; the model decides until you fit again",
                            item.name, ", ".join(changed))
        return opened

    async def _open_sessions(self, monitors: Mapping[str, list[tuple[MonitorConfig, Monitor]]]) -> None:
        wanted: dict[str, None] = {}
        for group_name in monitors:
            group = self.config.group(group_name)
            for server in [group.server, *(t.server for t in group.tags if t.server)]:
                wanted[server] = None
        needed = set(wanted)
        for items in monitors.values():
            for item, _ in items:
                if item.outputs:
                    wanted[item.outputs.server] = None
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

    async def _check(self, monitors: Mapping[str, list[tuple[MonitorConfig, Monitor]]]) -> None:
        raise_findings(await check_nodes(self.config, self.sessions, list(monitors), self._outputs(monitors),
                                         file=str(self.config_file)))

    def _outputs(self, monitors: Mapping[str, list[tuple[MonitorConfig, Monitor]]]) -> list[MonitorConfig]:
        return [item for items in monitors.values() for item, _ in items if item.outputs and self._write]

    async def _attach(self, monitors: Mapping[str, list[tuple[MonitorConfig, Monitor]]]) -> None:
        assert self.store is not None
        self.store.start_run(__version__, config_hash(self.config_file), [m.name for m in self.config.monitors])
        self.store.record_audit(AuditEntry("service", "run started", {
            "config": str(self.config_file), "write": self._write,
            "models": {item.name: monitor.model.model_id for items in monitors.values() for item, monitor in items}},
            ), timeout_s=None)
        targets: dict[str, dict[tuple[str, str], str]] = {}
        for item in [item for items in monitors.values() for item, _ in items]:
            if item.outputs is None or item.outputs.server not in self.sessions:
                continue
            nodes = targets.setdefault(item.outputs.server, {})
            nodes |= {(item.name, signal): node for signal, node in item.outputs.node_of().items()}
        for name in self.sessions:
            self.connections.watch(name)
        for server, nodes in targets.items():
            await self._attach_outputs(server, nodes)
        self.feedback = LiveFeedback(self.config, self.config_file, self.store, self.runs, self._tell_feedback)
        for group_name, items in monitors.items():
            for item, monitor in items:
                record_model(self.store, monitor.model, model_path(self.config_file, item))
                writer = self.backs.get(item.outputs.server) if item.outputs else None
                self.runs[item.name] = MonitorRun(item, monitor, writer)
            await self._start_group(group_name, [self.runs[item.name] for item, _ in items])
        dry = any(back.rules.dry_run for back in self.backs.values())  # to read feedback empties its node
        await self.feedback.start(self.sessions, read_nodes=self._write and not dry)

    async def _attach_outputs(self, server: str, nodes: dict[tuple[str, str], str]) -> None:
        """Begin to write to a server.

        Raises
        ------
        ConfigError
            A lease is asked for where there is no node for it.
        NodeProblem
            An output leads to a node outside the allow-list.
        """
        session, writing = self.sessions[server], self._writing.get(server) or writing_of(self.config.server(server))
        bases = {name: outputs.base for name in dict.fromkeys(name for name, _ in nodes)
                 if (outputs := self.config.monitor(name).outputs) is not None}
        rules = writing.rules if self._write else replace(writing.rules, dry_run=True)
        keeper = None
        if writing.lease_s > 0 and not rules.dry_run:
            keeper = self._lease(server, bases, writing)
            await session.attach(keeper)
            raise_findings([
                Finding(f"{self.config_file}: monitors.{name}.outputs.base", f"no lease can be kept there: {why}",
                        "import the result nodes of this version into the server, or take the lease away")
                for name in bases if (why := keeper.reason(name))])
        extra = {(name, EVENTS_AWAY): f"{base}.{EVENTS_AWAY}" for name, base in bases.items() if base}
        back = WriteBack(session, nodes, optional=extra, on_ack=self._acknowledged, rules=rules, leases=keeper)
        self.backs[server] = back
        for name in bases:
            self._away[name] = EventsAway(most_age_ns=self.config.store.forward)
        await session.attach(back)
        if self._write:
            raise_findings([
                Finding(f"{self.config_file}: monitors.{monitor}.outputs.{signal}", reason,
                        "correct the output, or add the node to writing.allow of the server")
                for (monitor, signal), reason in back.states().items() if reason.endswith(OUTSIDE)])

    def _lease(self, server: str, bases: Mapping[str, str], writing: Writing) -> LeaseKeeper:
        for name, base in bases.items():
            if not base:
                raise ConfigError("a lease needs the result node Lease", file=str(self.config_file),
                                  key=f"monitors.{name}.outputs.base", next_step="give base, or take the lease away")
        keeper = LeaseKeeper(self.sessions[server], {name: f"{base}.{LEASE}" for name, base in bases.items()},
                             instance_name(self.config.store.path, writing.name), writing.lease_s,
                             on_change=self._role_changed)
        self.keepers[server] = keeper
        return keeper

    def _role_changed(self, monitor: str, role: Role, other: str) -> None:
        """Another instance writes from now on, or this one does."""
        outputs = self.config.monitor(monitor).outputs
        assert outputs is not None
        who = f", {other} writes" if other else ""
        log.warning("monitor %s: %s%s", monitor, "writes its outputs" if role is Role.HOLDER else "standby", who)
        if self.store is not None:
            self.store.record_audit(AuditEntry("service", "lease", {
                "monitor": monitor, "role": role.value, "other": other}), timeout_s=None)
        if role is Role.HOLDER and outputs.server in self.backs:
            self.backs[outputs.server].resume(monitor)

    async def _start_group(self, name: str, runs: list[MonitorRun]) -> None:
        assert self.store is not None
        group = self.config.group(name)
        engine = Engine([run.monitor for run in runs])
        _warm(engine, len(group.tags))
        names = [tag.name for tag in group.tags]
        for run in runs:
            run.monitor.continue_events(self.store.last_event_no(run.config.name))
            self._end_interrupted(run.config.name)
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
            if self._tasks:
                last_first.push_async_callback(asyncio.wait, set(self._tasks), timeout=EXPLAIN_PATIENCE_S)
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
        """Take the model files as they are now; return monitor -> what became of it.

        A file that cannot be read, or whose model does not fit the configuration, changes nothing: the model in force
        stays, and the error is logged and counted.
        """
        assert self.store is not None and self.feedback is not None
        registry, told = registry_of(self.config), {}
        for name, run in self.runs.items():
            path, group = model_path(self.config_file, run.config), self.config.group(run.config.group)
            try:
                model = await asyncio.to_thread(load_model, path)
                open_monitor(run.config, group, model, registry)
            except DetectorError as error:
                self.counters["models_refused"] += 1
                log.error("monitor %s: the model is not taken, the one before stays in force: %s", name, error)
                told[name] = f"kept {run.monitor.model.model_id}: {error.what}"
                continue
            if model.model_id == run.monitor.model.model_id:
                told[name] = f"unchanged {model.model_id}"
                continue
            before = run.monitor.model.model_id
            await self.feedback.replace(run, model)
            record_model(self.store, model, path)
            self.store.record_audit(AuditEntry("service", "model reloaded", {
                "monitor": name, "before": before, "model_id": model.model_id}), timeout_s=None)
            log.warning("monitor %s: model %s in place of %s", name, model.model_id, before)
            told[name] = f"took {model.model_id}"
        return told

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
        self._follow_alert(run, verdict)
        if self._on_verdict is not None:
            self._on_verdict(run, verdict)

    def _follow_alert(self, run: MonitorRun, verdict: Verdict) -> None:
        assert self.store is not None
        if verdict.raised:
            run.raised_ns, run.peak, run.explanation = verdict.source_ns, verdict.score, None
            log.warning("monitor %s: alert %d raised", run.config.name, verdict.event_no)
            self._record_event(run, verdict)
        if verdict.alert and verdict.score > run.peak:
            run.peak = verdict.score
        if verdict.cleared:
            log.warning("monitor %s: alert %d cleared", run.config.name, verdict.event_no)
            self._record_event(run, verdict, cleared_ns=verdict.source_ns)
        if run.explain_due(verdict):
            self._explain(run, verdict.event_no)

    def _record_event(self, run: MonitorRun, verdict: Verdict, *, cleared_ns: int | None = None) -> None:
        """Keep an event in the store, and for a server that is away."""
        assert self.store is not None
        event = self._event(run, verdict, cleared_ns)
        self.store.record_event(event)
        away = self._away.get(run.config.name)
        if away is not None:
            away.note(event.event_no, event.raised_ns, cleared_ns, event.sentence, time.time_ns())

    def _event(self, run: MonitorRun, verdict: Verdict, cleared_ns: int | None) -> Event:
        told = run.explanation
        return Event(run.config.name, verdict.event_no, run.raised_ns, cleared_ns, run.peak, run.config.severity,
                     verdict.model_id, told.sentence if told else "", told.causes if told else ())

    def _explain(self, run: MonitorRun, event_no: int) -> None:
        """Explain on another thread; the score is not delayed by it."""
        assert self._loop is not None
        run.explaining = True
        future = self._loop.run_in_executor(None, run.monitor.explain, run.monitor.snapshot())
        self._tasks.add(future)
        future.add_done_callback(lambda done: self._explained(run, event_no, done))

    def _explained(self, run: MonitorRun, event_no: int, done: asyncio.Future[Explanation]) -> None:
        self._tasks.discard(done)
        run.explaining = False
        verdict = run.monitor.verdict
        if done.cancelled() or self.store is None:
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
            log.warning("monitor %s: %s", run.config.name, run.explanation.sentence)
            for tag, without in run.explanation.counterfactual[:1]:
                log.info("monitor %s: %s", run.config.name, counterfactual_sentence(tag, without, verdict.score))
        if verdict.alert:
            self._record_event(run, verdict)
            if run.back is not None:
                run.back.tell(run.config.name, run.cause_values())

    def _tell_feedback(self, run: MonitorRun, text: str) -> None:
        if run.back is not None:
            run.back.tell(run.config.name, {"FeedbackResult": text})

    def _acknowledged(self, monitor: str, source_ns: int, ack_utc_ns: int) -> None:
        run = self.runs.get(monitor)
        if run is not None:
            run.latency_ms = (ack_utc_ns - source_ns) / 1e6  # offers without a row are not acknowledged
            self._acked_ns[monitor] = ack_utc_ns

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
        now = time.time_ns()
        for name, away in self._away.items():
            outputs = self.config.monitor(name).outputs
            if outputs is None or outputs.server != server:
                continue
            if not connected:
                away.begin(self._acked_ns.get(name, now))
            elif text := away.end(now):
                self.backs[server].tell(name, {EVENTS_AWAY: text})
        dropped = sum(away.dropped for away in self._away.values())
        if dropped > self.counters["events_dropped"]:
            log.warning("server %s: %d alerts of the time away are told in the store only", server,
                        dropped - self.counters["events_dropped"])
            self.counters["events_dropped"] = dropped

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
        for keeper in self.keepers.values():
            keeper.look()
        for run in self.runs.values():
            limit = self._fail_after.get(run.config.name, FAIL_AFTER_S)
            if run.state not in (State.NO_DATA, State.FAULT) and time.monotonic() - run.stepped_s >= limit:
                self.counters["silences"] += 1
                log.warning("monitor %s: no row for %.1f s", run.config.name, limit)
                self._no_data(run, f"Bad: no row for {limit:g} s")
        self._tick_due = self._loop.time() + TICK_S
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    def _end_interrupted(self, monitor: str) -> None:
        """End alerts that stood when their process was killed: what still stands is raised anew, as the next one."""
        assert self.store is not None
        for event in self.store.events(monitor):
            if event.cleared_ns is not None or event.run_id == self.store.run_id:
                continue
            trend = self.store.trend(monitor, run_id=event.run_id)
            seen = int(trend.source_ns[-1]) if len(trend) else event.raised_ns
            log.warning("monitor %s: alert %d stood when its process ended", monitor, event.event_no)
            self.store.record_event(replace(event, cleared_ns=max(seen, event.raised_ns)))


async def check_nodes(config: Config, sessions: Mapping[str, Session], groups: Sequence[str],
                      outputs: Sequence[MonitorConfig], *, file: str = "") -> list[Finding]:
    """Return every problem with tags and outputs, each with the key it comes from; writes nothing."""
    asked: list[Awaitable[list[Finding]]] = []
    prefix = f"{file}: " if file else ""
    for name in groups:
        group = config.group(name)
        by_server: dict[str, list[Any]] = {}
        for item in group.tags:
            by_server.setdefault(item.server or group.server, []).append(item.tag())
        for server, tags in by_server.items():
            if server in sessions:
                asked.append(check_tags(sessions[server], tags, where=f"{prefix}groups.{name}.tags"))
    for monitor in outputs:
        assert monitor.outputs is not None
        if monitor.outputs.server in sessions:
            asked.append(check_outputs(sessions[monitor.outputs.server], monitor.outputs.node_of(),
                                       where=f"{prefix}monitors.{monitor.name}.outputs"))
    return [one for found in await asyncio.gather(*asked) for one in found]


def retention_of(config: Config) -> Retention:
    """Return the store's retention for a config: raw rows are thinned at a quarter of their life."""
    keep = config.store.keep_rows
    return Retention(quota_bytes=config.store.quota, thin_after_ns=keep // 4, delete_after_ns=keep)


def config_hash(file: Path) -> str:
    """Return the sha256 of the configuration file, empty where there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _warm(engine: Engine, n_tags: int) -> None:
    """Run every code path once before the first row: a compile or first call in mid-loop costs milliseconds."""
    frame = Frame.empty(n_tags)
    frame.values[:], frame.valid[:] = 0.0, 1
    for monitor in engine.monitors:
        for i in range(2 * max(m.lag + m.memory for m in monitor.methods) + 4):
            frame.gap, frame.source_ns = i == 0, i
            monitor.step(frame)
        monitor.restart()


