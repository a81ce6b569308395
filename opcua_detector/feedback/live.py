"""Feedback of a running service: from the HMI's nodes and from the store, answered off the loop, swapped in between
two rows.

One entry is answered at a time, on a thread: the model is adapted, a new monitor is primed with the last rows, and
between two rows of the loop it takes the place of the old one, with its windows as if it had always been there and the
standing alert as it stands. Then the model file is saved and the answer noted; where that fails the old model takes its
place again, and the operator is told. What was said lies in the store from the start and counts as pending until its
answer is noted, so a stop at any point loses nothing. The forecast comes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from ..api import Record, Verdict
from ..app import group_tags, open_monitor, registry_of
from ..client import Session, WriteBack
from ..client.inputs import TextInputs
from ..config import Config, MonitorConfig
from ..engine import Engine, Monitor, frames_of
from ..errors import DetectorError
from ..model import NormalityModel
from ..nodes import INPUT_NODES
from ..store import AuditEntry, FeedbackEntry, Store
from .bench import MAX_ROWS, lead_rows, prime_rows
from .desk import Answer, Desk
from .hmi import FEEDBACK, FEEDBACK_BY, PER_HOUR, Gate, is_name, shown
from .recent import RecentRows

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
EXPIRE_S: Final = 60.0
RING_BYTES: Final = 64_000_000
MOST_ANSWERS: Final = 100
RESULT_CHARS: Final = 400
STOP_S: Final = 5.0


class Run(Protocol):
    """What is needed of a monitor in operation."""

    config: MonitorConfig
    monitor: Monitor
    back: WriteBack | None

    def fast(self, verdict: Verdict) -> dict[str, Any]:
        """Return what changes with every row."""
        ...


class _Clock:
    """How long each step of an answer took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class LiveFeedback:
    """The feedback of a service.

    Parameters
    ----------
    tell : called with (run, text) on the loop when there is something to tell the operator

    Attributes
    ----------
    answers : the last ones, oldest first
    taken_back : adaptations that ran already and were taken back, because they could not be saved
    seconds : of the last answer: adapt, prime, swap, save, forecast
    """

    def __init__(self, config: Config, config_file: Path, store: Store, runs: Mapping[str, Run],
                 tell: Callable[[Any, str], None]) -> None:
        self.config, self.config_file, self.store, self.runs = config, config_file, store, runs
        self.answers: list[Answer] = []
        self.taken_back = 0
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._desk = Desk(config, config_file, store)
        self._registry = registry_of(config)
        self._engines: dict[str, tuple[Engine, RecentRows]] = {}
        self._inputs: list[TextInputs] = []
        self._gates: dict[str, Gate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    @property
    def refused(self) -> int:
        """Words of the HMI that were not taken, since the start."""
        return sum(gate.refused for gate in self._gates.values())

    # --- start and stop

    def watch(self, group: str, engine: Engine) -> RecentRows:
        """Take the engine of a group under care; return where its rows are to be copied to, one call per row."""
        item = self.config.group(group)
        need = max((max(2 * lead_rows(m.model), prime_rows(m.model)) for m in engine.monitors), default=2) + MAX_ROWS
        recent = RecentRows(group_tags(item), item.period, min(need, RING_BYTES // (9 * len(item.tags) + 9)))
        self._engines[group] = (engine, recent)
        return recent

    async def start(self, sessions: Mapping[str, Session], *, read_nodes: bool) -> None:
        """Answer what the store holds from now on, and with `read_nodes` what the HMI writes."""
        self._desk.models = {name: run.monitor.model for name, run in self.runs.items()}
        if read_nodes:
            by_server: dict[str, dict[str, dict[str, str]]] = {}
            for name, run in self.runs.items():
                outputs = run.config.outputs
                if outputs is not None and outputs.base:
                    by_server.setdefault(outputs.server, {})[name] = {
                        node.signal: f"{outputs.base}.{node.signal}" for node in INPUT_NODES}
            for server, nodes in by_server.items():
                def on_texts(name: str, texts: Mapping[str, str], stale: bool, server: str = server) -> None:
                    self._heard(server, name, texts, stale)

                inputs = TextInputs(sessions[server], nodes, INPUT_NODES[0].signal, on_texts,
                                    lambda name: (back := self.runs[name].back) is None or back.may_write(name))
                self._inputs.append(inputs)
                await sessions[server].attach(inputs)
        self._spawn(self._poll(), "feedback")

    async def stop(self) -> None:
        """Let what is being answered end, and take nothing more."""
        for inputs in self._inputs:
            await inputs.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._one_at_a_time.acquire()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=5.0)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("feedback: %s", error, exc_info=error)

    async def _poll(self) -> None:
        expire_at = 0.0
        while True:
            try:
                for entry in await asyncio.to_thread(self._desk.pending):
                    if entry.monitor in self.runs:
                        await self._answer(entry)
                if time.monotonic() >= expire_at:
                    expire_at = time.monotonic() + EXPIRE_S
                    await self._expire()
            except DetectorError as error:
                log.warning("feedback: %s", error)  # the store says why; the next poll tries again
            await asyncio.sleep(POLL_S)

    # --- the HMI

    def _heard(self, server: str, name: str, texts: Mapping[str, str], stale: bool) -> None:
        """Take a text of the HMI; on the loop."""
        run, gate = self.runs[name], self._gates.setdefault(name, Gate(name))
        verdict = run.monitor.verdict
        entry, why = gate.take(server, texts, stale, verdict.source_ns or time.time_ns(), time.monotonic())
        if entry is None:
            if gate.refused <= PER_HOUR:  # a server that floods us must not fill the audit
                by = texts[FEEDBACK_BY]
                self.store.record_audit(AuditEntry(
                    by if is_name(by) else f"operator at {server}", "feedback not taken",
                    {"monitor": name, "server": server, "text": shown(texts[FEEDBACK]), "why": why}), timeout_s=None)
            self._tell(run, f"not taken: {why}"[:RESULT_CHARS])
            return
        entry = replace(entry, at_ns=time.time_ns(), model_id=run.monitor.model.model_id)
        if entry.event_no is None and entry.label in ("false alarm", "true", "unsure"):
            entry = replace(entry, event_no=verdict.event_no)
        self._tell(run, f"received: {entry.label}")
        self._spawn(self._take(entry, gate), "feedback from the HMI")

    async def _take(self, entry: FeedbackEntry, gate: Gate) -> None:
        """Keep it; the poll, or this, answers it."""
        try:
            number = await asyncio.to_thread(self.store.record_feedback, entry)
            await self._answer(replace(entry, id=number))
        finally:
            gate.waiting -= 1

    # --- answering

    async def _answer(self, entry: FeedbackEntry) -> None:
        async with self._one_at_a_time:
            pending = await asyncio.to_thread(self._desk.pending)
            if entry.id not in {one.id for one in pending}:
                return  # the poll and the HMI's own task both saw it
            run = self.runs[entry.monitor]
            engine, recent = self._engines[run.config.group]
            clock = _Clock()
            rows, seq = recent.record(), recent.seq
            answer = await asyncio.to_thread(self._desk.decide, entry, rows)
            clock.lap("adapt")
            if answer.model is not None:
                await self._swap(run, engine, recent, answer.model, rows, seq, clock)
            kept = await asyncio.to_thread(self._desk.keep, answer)
            clock.lap("save")
            if answer.model is not None and kept.model is None and answer.before is not None:
                self.taken_back += 1
                await self._swap(run, engine, recent, answer.before, recent.record(), recent.seq, _Clock())
            self.answers.append(kept)
            del self.answers[:-MOST_ANSWERS]
            log.warning("monitor %s: feedback of %s: %s", entry.monitor, entry.who, kept.text)
            self._tell(run, kept.text[:RESULT_CHARS])
            if kept.model is not None:
                told = await asyncio.to_thread(self._desk.forecast, kept)
                clock.lap("forecast")
                self._tell(run, _with_forecast(kept.text, told)[:RESULT_CHARS])
            self.seconds = clock.seconds

    async def _expire(self) -> None:
        async with self._one_at_a_time:
            for answer in await asyncio.to_thread(self._desk.expire, time.time_ns()):
                run = self.runs.get(answer.entry.monitor)
                if run is None or answer.model is None:
                    continue
                engine, recent = self._engines[run.config.group]
                await self._swap(run, engine, recent, answer.model, recent.record(), recent.seq,
                                 _Clock())
                log.warning("monitor %s: %s", answer.entry.monitor, answer.text)
                self._tell(run, answer.text[:RESULT_CHARS])

    async def replace(self, run: Run, model: NormalityModel) -> None:
        """Put a model that was fitted meanwhile in the place of the one in force; its alert and its numbers stand."""
        async with self._one_at_a_time:
            engine, recent = self._engines[run.config.group]
            await self._swap(run, engine, recent, model, recent.record(), recent.seq, _Clock())
            self._desk.models[run.config.name] = model

    async def _swap(self, run: Run, engine: Engine, recent: RecentRows, model: NormalityModel, rows: Record,
                    seq: int, clock: _Clock) -> None:
        """Put a monitor with the new model in the place of the old one."""
        need = prime_rows(model)
        primed = await asyncio.to_thread(self._primed, run, model, rows.rows(max(0, len(rows) - need), len(rows)))
        clock.lap("prime")
        old = run.monitor
        for frame in frames_of(recent.record(after=seq)):  # on the loop: no row comes between
            primed.step(frame)
        primed.take_over(old)
        engine.swap(old, primed)
        run.monitor = primed
        clock.lap("swap")

    def _primed(self, run: Run, model: NormalityModel, rows: Record) -> Monitor:
        monitor = open_monitor(run.config, self.config.group(run.config.group), model, self._registry)
        for i, frame in enumerate(frames_of(rows)):
            monitor.step(frame)
            if i % 50 == 49:
                time.sleep(0)  # let the loop have Python's lock
        return monitor


def _with_forecast(text: str, told: str) -> str:
    """Put the forecast before the date and the model, as an operator reads it."""
    head, _, tail = text.rpartition("; model ")
    return f"{head}; {told}; model {tail}" if told and head else text

