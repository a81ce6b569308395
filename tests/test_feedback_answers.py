"""Answers of a running service, without a server: swap before save, what cannot be saved is taken back, and whatever
an HMI writes at whatever rate disturbs nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import NOWHERE, two_methods, write

from opcua_detector.api import Frame, Record
from opcua_detector.app import fit_config, group_tags, keep_fitted, open_monitors
from opcua_detector.config import load
from opcua_detector.engine import Engine, RowMonitor
from opcua_detector.feedback import journal
from opcua_detector.feedback.desk import ANSWERED
from opcua_detector.feedback.hmi import FEEDBACK, FEEDBACK_BY, MOST_WAITING, PER_HOUR, Gate, is_name, parse, shown
from opcua_detector.feedback.live import LiveFeedback
from opcua_detector.model import load as load_model
from opcua_detector.store import FeedbackEntry, Store
from sim_server.processes import Fault, make

PERIOD_NS = 10_000_000
START_NS = 1_790_000_000_000_000_000
ONSET, ROWS = 3000, 3600


@dataclass
class Running:
    """What the feedback needs of a monitor in operation; without write-back nobody is told."""

    config: Any
    monitor: RowMonitor
    back: None = None

    def fast(self, verdict: Any) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def _once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    file = write(folder, two_methods(NOWHERE))
    plant = make("lorenz", seed=1)
    plant.simulate(1000)
    rows = plant.simulate(12_000)
    config = load(file)
    with Store.open(config.store.path) as store:
        keep_fitted(fit_config(config, file, lambda group: Record.from_rows(rows, group_tags(group), PERIOD_NS)), store)
    return folder


@dataclass
class Bench:
    live: LiveFeedback
    run: Running
    engine: Engine
    store: Store
    file: Path
    told: list[str]
    raised_ns: int = 0

    @property
    def path(self) -> Path:
        return self.file.parent / "models" / "lorenz.npz"

    def entry(self) -> FeedbackEntry:
        return FeedbackEntry("op", "false alarm", "lorenz", None, self.raised_ns,
                             START_NS + ROWS * PERIOD_NS, at_ns=time.time_ns())


@pytest.fixture
def bench(_once: Path, tmp_path: Path) -> Iterator[Bench]:
    """A monitor that has just seen a fault, with an alert that stands."""
    shutil.copytree(_once, tmp_path / "plant", ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    file = tmp_path / "plant" / "plant.yaml"
    config = load(file)
    with Store.open(config.store.path) as store:
        (monitor,) = open_monitors(config, file)["lorenz"]
        assert isinstance(monitor, RowMonitor)
        engine, told = Engine([monitor]), []
        run = Running(config.monitors[0], monitor)
        live = LiveFeedback(config, file, store, {"lorenz": run}, lambda _, text: told.append(text))
        recent = live.watch("lorenz", engine)
        live._desk.models = {"lorenz": monitor.model}
        made = Bench(live, run, engine, store, file, told)
        plant = make("lorenz", seed=7)
        plant.simulate(1000)
        rows = plant.simulate_block(ROWS, (Fault("beta", 1.25, ONSET, ROWS),)).measured
        frame = Frame.empty(2)
        for i, row in enumerate(rows):
            frame.values[:], frame.valid[:], frame.source_ns = row, 1, START_NS + i * PERIOD_NS
            frame.gap, frame.seq = i == 0, i
            if engine.step(frame)[0].raised and i >= ONSET:
                made.raised_ns = made.raised_ns or frame.source_ns
            recent.offer(frame)
        assert monitor.verdict.alert
        yield made


async def test_the_new_model_runs_before_it_is_saved_and_nothing_is_lost(bench: Bench) -> None:
    before = bench.run.monitor.model.model_id
    await bench.live._take(bench.entry(), Gate("lorenz"))
    (answer,) = bench.live.answers
    assert answer.action == "adapted", answer.text
    after = bench.run.monitor.model.model_id
    assert after != before and load_model(bench.path).model_id == after
    assert list(bench.live.seconds) == ["adapt", "prime", "swap", "save", "forecast"]
    assert bench.engine.monitors == (bench.run.monitor,)
    (audit,) = bench.store.audit(ANSWERED)
    assert (audit.detail["model_before"], audit.detail["model_after"]) == (before, after)
    assert bench.store.unanswered_feedback(ANSWERED) == []


async def test_what_cannot_be_saved_is_taken_back_and_told(bench: Bench) -> None:
    before, file = bench.run.monitor.model.model_id, bench.path.read_bytes()
    blocked = bench.path.with_name(f".{bench.path.name}.{os.getpid()}.part")  # where the new file is written first
    blocked.mkdir()
    await bench.live._take(bench.entry(), Gate("lorenz"))
    (answer,) = bench.live.answers
    assert answer.action == "refused" and bench.live.taken_back == 1
    assert bench.run.monitor.model.model_id == before and bench.path.read_bytes() == file
    assert bench.run.monitor.verdict.event_no and bench.run.monitor.verdict.alert, "the alert still stands"
    assert bench.told[-1].startswith("refused")
    (audit,) = bench.store.audit(ANSWERED)
    assert audit.detail["action"] == "refused" and audit.detail["model_after"] == before
    blocked.rmdir()
    await bench.live._take(bench.entry(), Gate("lorenz"))
    assert bench.live.answers[-1].action == "adapted" and len(journal(load_model(bench.path))) == 1


JUNK = (
    "x" * 1_000_000, "\x00\x01\x1b[31mfalse alarm", "'; DROP TABLE feedback; --", "false alarm 999999999999999999999",
    "FALSE  ALARM?", "missed -1", "missed 86401", "\ud800\udfff lone", "\u202efalse alarm", "unsure\n1", "event 7",
    "false alarm \u0661\u0662", "\u2028" * 300, "null", "{}", "true" * 100,
)


@pytest.mark.parametrize("text", JUNK)
def test_junk_is_no_feedback(text: str) -> None:
    assert parse(text, START_NS) is None
    assert len(shown(text)) <= 200 and shown(text).isprintable()
    shown(text).encode("utf-8")


@pytest.mark.parametrize(("name", "ok"), [
    ("Olga", True), ("Jos\u00e9 P.", True), ("x" * 64, True), ("", False), ("x" * 65, False), ("a\x1b[0m", False),
    ("a\u202eb", False), ("\ud800", False), ("a\nb", False),
])
def test_a_name_is_short_and_can_be_printed(name: str, ok: bool) -> None:
    assert is_name(name) is ok


def test_few_are_let_through_and_all_others_are_counted() -> None:
    gate, now, taken = Gate("pump"), 0.0, 0
    for i in range(5000):
        now += 0.5
        entry, why = gate.take("plant", {FEEDBACK: "unsure", FEEDBACK_BY: ""}, False, START_NS, now)
        assert (entry is None) == bool(why)
        taken += entry is not None
        if i % 10 == 0 and gate.waiting:
            gate.waiting -= 1
    assert gate.refused + taken == 5000 and taken <= PER_HOUR
    waiting = Gate("pump")
    got = [waiting.take("plant", {FEEDBACK: "unsure", FEEDBACK_BY: ""}, False, START_NS, 10.0 * i) for i in range(9)]
    assert [entry is not None for entry, _ in got] == [True] * MOST_WAITING + [False] * (9 - MOST_WAITING)
    assert "wait for their answer" in got[-1][1]


async def test_ten_thousand_words_of_junk_disturb_nothing(bench: Bench) -> None:
    verdict = bench.run.monitor.verdict
    model, score, tasks = bench.run.monitor.model.model_id, verdict.score, len(asyncio.all_tasks())

    def write_junk(count: int) -> None:
        for i in range(count):
            texts = {FEEDBACK: JUNK[i % len(JUNK)], FEEDBACK_BY: JUNK[(i + 3) % len(JUNK)]}
            bench.live._heard("plant", "lorenz", texts, stale=i % 7 == 0)
            del bench.told[:-1]

    write_junk(200)  # whatever is made once
    bench.store.flush()
    tracemalloc.start()
    write_junk(10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000, "nothing is kept of what is not taken"
    assert bench.live.refused == 10_200 and bench.told[-1].startswith("not taken")
    assert len(asyncio.all_tasks()) == tasks and bench.live.answers == []
    assert (bench.run.monitor.model.model_id, verdict.score) == (model, score) and not np.isnan(score)
    bench.store.flush()
    refused = bench.store.audit("feedback not taken")
    assert 0 < len(refused) <= PER_HOUR and bench.store.feedback("lorenz") == []
    assert all(len(e.detail["text"]) <= 200 and is_name(e.who) for e in refused)
