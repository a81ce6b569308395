"""The live service: subscriptions -> frames -> engine -> write-back and store, with its start and shutdown order."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .api import BAD_DATA_UNAVAILABLE, Explanation, Frame, Verdict
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
from .config import Config, MonitorConfig
from .engine import Engine, Monitor
from .explain import counterfactual_sentence
from .feedback.live import LiveFeedback
from .model import load as load_model
from .nodes import NO_SCORE, STATE_TEXTS, TOP, State
from .store import AuditEntry, Event, Retention, Store
from .telemetry import Telemetry

log = logging.getLogger(__name__)

EXPLAIN_AGAIN_NS = 1_000_000_000  # while an alert stands its explanation follows the situation this often
SLOW_EVERY_NS = 1_000_000_000
TIMINGS = 1 << 16
EXPLAIN_PATIENCE_S = 2.0
NOTHING_VALID = "Bad: no tag has a valid value"


# An alert that nobody watches any more must not stand for ever; State and Score say that this is no all-clear.
LAST_WORDS: Mapping[str, Any] = {
    "State": State.STOPPED, "StateText": STATE_TEXTS[State.STOPPED], "Score": math.nan,
    "SlowScore": float(NO_SCORE), "Quality": "Bad: the detector was stopped", "IsAnomaly": False, "Severity": 0,
    "ExplanationText": "",
    **{f"Top{rank}{what}": empty for rank in range(1, TOP + 1)
       for what, empty in (("Tag", ""), ("Contribution", 0.0), ("Cause", ""))},
}


class MonitorRun:
    """One monitor in operation: its outputs, its explanation and what the terminal shows of it."""

    def __init__(self, config: MonitorConfig, monitor: Monitor, back: WriteBack | None) -> None:
        self.config, self.monitor, self.back = config, monitor, back
        self.explanation: Explanation | None = None
        self.explaining = False
        self.latency_ms = math.nan
        self.scored = 0
        self.raised_ns = 0
        self.peak = math.nan
        self.state = State.WARMING_UP
        self.alerts: list[Explanation] = []
        self.columns = np.zeros(0, np.int64)  # of the group's frame: the tags that the monitor looks at
        self._told_state = -1
        self._told_ns = self._explained_ns = 0
        self._quality = ""

    @property
    def top_tags(self) -> list[tuple[str, float]]:
        """Tags by contribution, the largest first, those without any left out."""
        verdict = self.monitor.verdict
        order = np.argsort(-verdict.contribution, kind="stable")[:TOP]
        return [(verdict.tags[i], float(verdict.contribution[i])) for i in order if verdict.contribution[i] > 0]

    def explain_due(self, verdict: Verdict) -> bool:
        """Whether this row asks for a (new) explanation."""
        if not verdict.alert or self.explaining:
            return False
        due = verdict.raised or verdict.source_ns - self._explained_ns >= EXPLAIN_AGAIN_NS
        if due:
            self._explained_ns = verdict.source_ns
        return due

    def fast(self, verdict: Verdict) -> dict[str, Any]:
        """Return what changes with every row."""
        return {
            "Score": verdict.score, "SlowScore": known(verdict.slow_score), "IsAnomaly": verdict.alert,
            "Severity": verdict.severity, "State": self.state,
            "EventNo": verdict.event_no, "RTrans": known(verdict.r_trans), "RBound": known(verdict.r_bound),
            "RConf": known(verdict.r_conf), "Contributions": verdict.contribution,
            "Residuals": np.where(np.isnan(verdict.residual), NO_SCORE, verdict.residual),
            "LastUpdate": verdict.source_ns, "LastUpdateText": iso(verdict.source_ns), "LatencyMs": self.latency_ms,
        }

    def slow_due(self, verdict: Verdict) -> bool:
        """Whether texts or counters have to be told: something of them changed or a second has passed."""
        return (self.state != self._told_state or verdict.quality != self._quality or verdict.cleared
                or verdict.source_ns - self._told_ns >= SLOW_EVERY_NS)

    def slow(self, verdict: Verdict, lost: int, superseded: int) -> dict[str, Any]:
        """Return texts and counters."""
        self._told_state, self._quality, self._told_ns = self.state, verdict.quality, verdict.source_ns
        quality = NOTHING_VALID if self.state == State.NO_DATA else verdict.quality
        return {"StateText": STATE_TEXTS[self.state], "Quality": quality, "ModelId": verdict.model_id,
                "Limit": 1.0, "LostSamples": lost, "SupersededWrites": superseded, **self.cause_values()}

    def cause_values(self) -> dict[str, Any]:
        """Return explanation, top tags and causes; empty texts while no alert stands."""
        verdict, told = self.monitor.verdict, self.explanation
        standing = verdict.alert
        values: dict[str, Any] = {"ExplanationText": told.sentence if standing and told else ""}
        top = (list(told.shares[:TOP]) if told and told.shares else self.top_tags) if standing else []
        causes = told.causes if standing and told else ()
        for rank in range(1, TOP + 1):
            tag, share = top[rank - 1] if rank <= len(top) else ("", 0.0)
            values[f"Top{rank}Tag"], values[f"Top{rank}Contribution"] = tag, share
            values[f"Top{rank}Cause"] = self.monitor.cause_text(causes[rank - 1]) if rank <= len(causes) else ""
        return values


class Service:
    """A config in operation.

    Parameters
    ----------
    only : names of the monitors to run; none: all
    on_verdict : called with (run, verdict) after each verdict, on the loop; for demonstrations and tests
    write : False: a dry run, nothing is written to any server
    """

    def __init__(self, config: Config, config_file: Path, *, only: Sequence[str] = (), write: bool = True,
                 on_verdict: Callable[[MonitorRun, Verdict], None] | None = None) -> None:
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
            self.store = Store.open(self.config.store.path, synchronous=self.config.store.synchronous,
                                    retention=retention_of(self.config))
            await self._attach(monitors)
            self.telemetry.running()
        except BaseException:
            await self.stop("start failed")
            raise

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
        for group_name, items in monitors.items():
            group = self.config.group(group_name)
            for server in [group.server, *(t.server for t in group.tags if t.server)]:
                wanted[server] = None
            for item, _ in items:
                if item.outputs and self._write:
                    wanted[item.outputs.server] = None
        for name in wanted:
            session = Session(self.config.server(name),
                              on_state=lambda state, reason, name=name: self._link(name, state))  # type: ignore[misc]
            self.sessions[name] = session
            await session.open()
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
        for item in self._outputs(monitors):
            assert item.outputs is not None
            nodes = targets.setdefault(item.outputs.server, {})
            nodes |= {(item.name, signal): node for signal, node in item.outputs.node_of().items()}
        for server, nodes in targets.items():
            back = WriteBack(self.sessions[server], nodes, on_ack=self._acknowledged)
            self.backs[server] = back
            await self.sessions[server].attach(back)
        self.feedback = LiveFeedback(self.config, self.config_file, self.store, self.runs, self._tell_feedback)
        for group_name, items in monitors.items():
            for item, monitor in items:
                record_model(self.store, monitor.model, model_path(self.config_file, item))
                writer = self.backs.get(item.outputs.server) if item.outputs else None
                self.runs[item.name] = MonitorRun(item, monitor, writer)
            await self._start_group(group_name, [self.runs[item.name] for item, _ in items])
        await self.feedback.start(self.sessions, read_nodes=self._write)

    async def _start_group(self, name: str, runs: list[MonitorRun]) -> None:
        assert self.store is not None
        group = self.config.group(name)
        engine = Engine([run.monitor for run in runs])
        _warm(engine, len(group.tags))
        names = [tag.name for tag in group.tags]
        for run in runs:
            run.monitor.continue_events(self.store.last_event_no(run.config.name))
            run.columns = np.array([names.index(tag) for tag in run.monitor.verdict.tags], np.int64)
            self._no_data(run, "Bad: waiting for the first row")
        if self.config.store.record:
            self._recordings[name] = self.store.start_recording(
                None, group_tags(group), group.period, group=name, server=group.server)
        recording = self._recordings.get(name)
        assert self.feedback is not None
        recent = self.feedback.watch(name, engine)

        def on_frame(frame: Frame) -> None:
            started = time.perf_counter_ns()
            verdicts = engine.step(frame)
            self.scoring_ns[self.steps % TIMINGS] = time.perf_counter_ns() - started
            self.steps += 1
            for run, verdict in zip(runs, verdicts, strict=True):
                run.state = state_of(verdict) if frame.valid[run.columns].any() else State.NO_DATA
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
        async with AsyncExitStack() as last_first:  # runs every step, then raises what the first failing one raised
            last_first.callback(self.telemetry.stop)
            last_first.callback(self._close_store, reason)
            for session in self.sessions.values():
                last_first.push_async_callback(session.close)
            for back in self.backs.values():
                names = [name for name, run in self.runs.items() if run.back is back]
                last_first.push_async_callback(back.stop, {name: LAST_WORDS for name in names})
            if self._tasks:
                last_first.push_async_callback(asyncio.wait, set(self._tasks), timeout=EXPLAIN_PATIENCE_S)
            if self.feedback is not None:
                last_first.push_async_callback(self.feedback.stop)
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
            self.store.record_event(self._event(run, verdict))
        if verdict.alert and verdict.score > run.peak:
            run.peak = verdict.score
        if verdict.cleared:
            log.warning("monitor %s: alert %d cleared", run.config.name, verdict.event_no)
            self.store.record_event(self._event(run, verdict, cleared_ns=verdict.source_ns))
        if run.explain_due(verdict):
            self._explain(run, verdict.event_no)

    def _event(self, run: MonitorRun, verdict: Verdict, *, cleared_ns: int | None = None) -> Event:
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
            self.store.record_event(self._event(run, verdict))
            if run.back is not None:
                run.back.offer(run.config.name, verdict.source_ns, run.fast(verdict), run.cause_values())

    def _tell_feedback(self, run: MonitorRun, text: str) -> None:
        if run.back is not None:
            verdict = run.monitor.verdict
            run.back.offer(run.config.name, verdict.source_ns, run.fast(verdict), {"FeedbackResult": text})

    def _acknowledged(self, monitor: str, source_ns: int, ack_utc_ns: int) -> None:
        run = self.runs.get(monitor)
        if run is not None:
            run.latency_ms = (ack_utc_ns - source_ns) / 1e6  # offers without a row are not acknowledged

    def _link(self, server: str, state: LinkState) -> None:
        """A lost connection is told in the nodes of the other servers at once, in its own when it is back."""
        log.info("server %s: %s", server, state.value)  # the session warns
        if state is LinkState.CONNECTED:
            return
        for name, feed in self.feeds.items():
            if server not in feed.subscriptions:
                continue
            for run in self.runs.values():
                if run.config.group == name:
                    self._no_data(run, f"Bad: no connection to {server}")

    def _no_data(self, run: MonitorRun, quality: str) -> None:
        run.state = State.NO_DATA
        if run.back is not None:
            run.back.offer(run.config.name, 0,
                           {"Score": math.nan, "State": State.NO_DATA},
                           {"StateText": STATE_TEXTS[State.NO_DATA], "Quality": quality})


def known(residual: float) -> float:
    """Return a residual, or -1 where there is none: many PLCs and HMIs take NaN badly."""
    return NO_SCORE if math.isnan(residual) else residual


def state_of(verdict: Verdict) -> int:
    """Return the `State` that a verdict means."""
    if verdict.status == BAD_DATA_UNAVAILABLE:
        return State.STATE_NOT_LEARNT
    if math.isnan(verdict.score):
        return State.WARMING_UP
    return State.ALERT if verdict.alert else State.NORMAL


async def check_nodes(config: Config, sessions: Mapping[str, Session], groups: Sequence[str],
                      outputs: Sequence[MonitorConfig], *, file: str = "") -> list[Finding]:
    """Return every problem with tags and outputs, each with the key it comes from; writes nothing."""
    found: list[Finding] = []
    prefix = f"{file}: " if file else ""
    for name in groups:
        group = config.group(name)
        by_server: dict[str, list[Any]] = {}
        for item in group.tags:
            by_server.setdefault(item.server or group.server, []).append(item.tag())
        for server, tags in by_server.items():
            if server in sessions:
                found += await check_tags(sessions[server], tags, where=f"{prefix}groups.{name}.tags")
    for monitor in outputs:
        assert monitor.outputs is not None
        if monitor.outputs.server in sessions:
            found += await check_outputs(sessions[monitor.outputs.server], monitor.outputs.node_of(),
                                         where=f"{prefix}monitors.{monitor.name}.outputs")
    return found


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


def iso(source_ns: int) -> str:
    """Return a SourceTimestamp as ISO 8601 text, UTC, microseconds."""
    text = datetime.fromtimestamp(source_ns // 1000 / 1e6, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")


def _warm(engine: Engine, n_tags: int) -> None:
    """Run every code path once before the first row: a compile or first call in mid-loop costs milliseconds."""
    frame = Frame.empty(n_tags)
    frame.values[:], frame.valid[:] = 0.0, 1
    for monitor in engine.monitors:
        for i in range(2 * max(m.lag + m.memory for m in monitor.methods) + 4):
            frame.gap, frame.source_ns = i == 0, i
            monitor.step(frame)
        monitor.restart()


