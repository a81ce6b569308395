"""Feedback of a running service: from the HMI's nodes and from the command line, without losing a row."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asyncua import Client, ua
from running import NOWHERE, PLANT, RESULTS, cli, two_methods, until, write
from serving import SEED, fit_models

from opcua_detector.api import Frame, Tag
from opcua_detector.client.observer import Observer
from opcua_detector.config import load
from opcua_detector.feedback import DAY_NS, journal
from opcua_detector.feedback.desk import ANSWERED, EXPIRED, FORECAST
from opcua_detector.feedback.hmi import parse
from opcua_detector.feedback.recent import RecentRows
from opcua_detector.model import load as load_model
from opcua_detector.nodes import State
from opcua_detector.service import Service
from opcua_detector.store import Store
from sim_server.testing import RunningPlant, running_plant

FAULT = f"{PLANT}lorenz.faults.beta"
NODES = {name: f"{RESULTS}lorenz.{name}" for name in ("FeedbackResult", "Feedback", "ModelId", "IsAnomaly", "EventNo")}


@pytest.fixture(scope="module")
def plant() -> Iterator[RunningPlant]:
    with running_plant("lorenz", history_rows=100, seed=SEED) as running:
        yield running


@pytest.fixture(scope="module")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_models(tmp_path_factory.mktemp("feedback-models"), two_methods(NOWHERE))


@pytest.fixture
def file(_models: Path, tmp_path: Path, plant: RunningPlant) -> Path:
    shutil.copytree(_models, tmp_path / "models")
    return write(tmp_path, two_methods(plant.endpoint))


@asynccontextmanager
async def running(file: Path, **options: Any) -> AsyncIterator[Service]:
    service = Service(load(file), file, **options)
    await service.start()
    try:
        run = service.runs["lorenz"]
        await until(lambda: run.scored > 100 and run.state == State.NORMAL, "scores")
        yield service
    finally:
        await service.stop()


async def put(endpoint: str, **texts: str) -> None:
    """Write String nodes of the result object, as an HMI does."""
    async with Client(endpoint) as client:
        index = await client.get_namespace_index("urn:opcua-detector:results")
        for name, text in texts.items():
            node = client.get_node(f"ns={index};s=lorenz.{name}")
            await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(ua.Variant(text, ua.VariantType.String)))


@asynccontextmanager
async def broken(endpoint: str, service: Service) -> AsyncIterator[None]:
    """The plant with a fault, and an alert that stands."""
    run = service.runs["lorenz"]
    async with Observer(endpoint) as observer:
        await observer.write_double(FAULT, 1.2)
        try:
            await until(lambda: run.state == State.ALERT, "an alert")
            yield
        finally:
            await observer.write_double(FAULT, 1.0)


async def test_a_click_on_the_hmi_adapts_the_running_monitor_without_losing_a_row(
    file: Path, plant: RunningPlant,
) -> None:
    verdicts: list[tuple[int, float, str, int]] = []

    def keep(_: Any, verdict: Any) -> None:
        verdicts.append((verdict.seq, verdict.score, verdict.model_id, verdict.event_no))

    async with running(file, on_verdict=keep) as service, Observer(plant.endpoint) as hmi:
        run, before = service.runs["lorenz"], service.runs["lorenz"].monitor.model.model_id
        assert service.feedback is not None
        async with broken(plant.endpoint, service):
            number = run.monitor.verdict.event_no
            await put(plant.endpoint, FeedbackBy="Olga", Feedback="false alarm")
            await until(lambda: service.feedback and service.feedback.answers, "an answer")
            (answer,) = service.feedback.answers
            assert answer.action == "adapted", answer.text
            await until(lambda: run.monitor.model.model_id != before, "the swap")
        await until(lambda: run.state == State.NORMAL, "the alert to clear")
        assert run.monitor.model.model_id == load_model(answer_path(file)).model_id

        async def told() -> dict[str, Any] | None:
            got = await hmi.read(NODES)
            return got if "alerts per day" in got["FeedbackResult"] else None

        got = await until(told, "the forecast in the result node")
        assert got["FeedbackResult"].startswith("adapted: x") and "expires" in got["FeedbackResult"]
        assert run.monitor.model.model_id in got["FeedbackResult"] and got["Feedback"] == ""
        await until(lambda: verdicts[-1][2] == run.monitor.model.model_id, "a verdict of the new model")
        feed = service.feeds["lorenz"]
        assert feed.frame_errors == 0 and feed.counters()["lost"] == 0
        changes = [i for i in range(1, len(verdicts)) if verdicts[i][2] != verdicts[i - 1][2]]
        assert len(changes) == 1
        score = np.array([v[1] for v in verdicts])
        assert not np.isnan(score[changes[0]:]).any(), "its windows were full from the first row on"
        assert verdicts[changes[0]][3] == number, "the standing alert stands, under its number"
    assert len(journal(load_model(answer_path(file)))) == 1
    with Store.open(load(file).store.path, readonly=True) as store:
        (entry,) = store.feedback("lorenz")
        assert (entry.who, entry.label, entry.event_no) == ("Olga", "false alarm", number)
        assert len(store.audit(ANSWERED)) == len(store.audit(FORECAST)) == 1
        events = [event for event in store.events("lorenz") if event.event_no == number]
        assert len(events) == 1 and events[0].cleared_ns is not None
        (recording,) = store.recordings()
        rows = store.read_recording(recording.name)
        assert int(rows.gap.sum()) == 1 and (np.diff(rows.source_ns) == rows.period_ns).all()


def answer_path(file: Path) -> Path:
    return file.parent / "models" / "lorenz.npz"


async def test_the_command_line_reaches_the_running_service_and_undo_gives_the_first_model_back(
    file: Path, plant: RunningPlant,
) -> None:
    async with running(file) as service:
        run, before = service.runs["lorenz"], service.runs["lorenz"].monitor.model.model_id
        async with broken(plant.endpoint, service):
            ran = await asyncio.to_thread(cli, "feedback", "add", file, "--label", "false alarm", "--who", "eva",
                                          "--json")
            assert ran.code == 0 and ran.json["action"] == "adapted", ran.out + ran.err
        await until(lambda: run.monitor.model.model_id == ran.json["model_after"] != before, "the swap")
        undone = await asyncio.to_thread(cli, "feedback", "undo", file, "--id", ran.json["delta"], "--json")
        assert undone.json["action"] == "undone"
        await until(lambda: run.monitor.model.model_id == before, "the first model")
        assert load_model(answer_path(file)).model_id == before


async def test_what_nobody_confirmed_expires_while_the_service_runs(
    file: Path, plant: RunningPlant, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opcua_detector.feedback.live.EXPIRE_S", 0.2)
    async with running(file) as service:
        run, before = service.runs["lorenz"], service.runs["lorenz"].monitor.model.model_id
        async with broken(plant.endpoint, service):
            await put(plant.endpoint, Feedback="false alarm")
            await until(lambda: run.monitor.model.model_id != before, "the swap")
        now_ns = time.time_ns()
        monkeypatch.setattr("opcua_detector.feedback.live.time.time_ns", lambda: now_ns + 8 * DAY_NS)
        await until(lambda: run.monitor.model.model_id == before, "the first model")
    with Store.open(load(file).store.path, readonly=True) as store:
        assert len(store.audit(EXPIRED)) == 1


async def test_what_the_hmi_may_not_write_is_told_and_audited_and_changes_nothing(
    file: Path, plant: RunningPlant,
) -> None:
    await put(plant.endpoint, Feedback="false alarm", FeedbackBy="")  # nobody was listening
    async with running(file) as service, Observer(plant.endpoint) as hmi:
        before = service.runs["lorenz"].monitor.model.model_id

        async def result(words: str) -> bool:
            return words in (await hmi.read(NODES))["FeedbackResult"]

        await until(lambda: result("before the detector started"), "a stale click to be told")
        await put(plant.endpoint, Feedback="it was nothing")
        await until(lambda: result("write one of"), "wrong words to be told")
        await put(plant.endpoint, Feedback="unsure")
        await until(lambda: service.feedback and service.feedback.answers, "an answer")
        await put(plant.endpoint, Feedback="unsure")
        await until(lambda: result("wait 2 s"), "the rate to be limited")
        assert service.runs["lorenz"].monitor.model.model_id == before
        assert service.feedback is not None and service.feedback.refused == 3
    with Store.open(load(file).store.path, readonly=True) as store:
        assert [e.detail["text"] for e in reversed(store.audit("feedback not taken"))] == [
            "false alarm", "it was nothing", "unsure"]
        assert [e.label for e in store.feedback("lorenz")] == ["unsure"]


async def test_junk_written_without_pause_costs_no_row(file: Path, plant: RunningPlant) -> None:
    await put(plant.endpoint, Feedback="", FeedbackBy="")
    junk = ("x" * 1_000_000, "\x00\x1b[31mtrue", "'; DROP TABLE feedback; --", "missed 99999", "true" * 50)
    async with running(file) as service, Client(plant.endpoint) as hmi:
        run, feed = service.runs["lorenz"], service.feeds["lorenz"]
        before, scored = run.monitor.model.model_id, run.scored
        index = await hmi.get_namespace_index("urn:opcua-detector:results")
        nodes = [hmi.get_node(f"ns={index};s=lorenz.{name}") for name in ("Feedback", "FeedbackBy")]
        written = 0
        while service.feedback is not None and service.feedback.refused < 3:
            for node in nodes:
                value = ua.Variant(junk[written % len(junk)], ua.VariantType.String)
                await node.write_attribute(ua.AttributeIds.Value, ua.DataValue(value))
            written += 1
        assert written > 3, "far more was written than was looked at"
        await until(lambda: run.scored > scored + 50, "scores")
        assert feed.frame_errors == 0 and feed.counters()["lost"] == 0
        assert run.monitor.model.model_id == before and service.feedback.answers == []
    await put(plant.endpoint, Feedback="", FeedbackBy="")
    with Store.open(load(file).store.path, readonly=True) as store:
        assert store.feedback("lorenz") == []
        assert all(len(e.detail["text"]) <= 200 for e in store.audit("feedback not taken"))


async def test_a_dry_run_reads_no_feedback_from_nodes(file: Path, plant: RunningPlant) -> None:
    async with running(file, write=False) as service:
        await put(plant.endpoint, Feedback="true")
        await asyncio.sleep(1.5)
        async with Observer(plant.endpoint) as hmi:
            assert (await hmi.read(NODES))["Feedback"] == "true"
        assert service.feedback is not None and service.feedback.answers == []
    await put(plant.endpoint, Feedback="")


@pytest.mark.parametrize(("text", "label", "number", "seconds"), [
    ("false alarm", "false alarm", None, None), ("  FALSE ALARM 12 ", "false alarm", 12, None),
    ("true", "true", None, None), ("unsure 3", "unsure", 3, None), ("missed", "missed", None, 60),
    ("missed 120", "missed", None, 120),
])
def test_the_words_of_the_hmi(text: str, label: str, number: int | None, seconds: int | None) -> None:
    entry = parse(text, 10**18)
    assert entry is not None and (entry.label, entry.event_no) == (label, number)
    if seconds:
        assert (entry.start_ns, entry.end_ns) == (10**18 - seconds * 10**9, 10**18)


@pytest.mark.parametrize("text", ["", "no", "false alarm -1", "false alarm; drop", "missed 0", "missed 100000", "1"])
def test_other_words_are_none(text: str) -> None:
    assert parse(text, 0) is None


def test_recent_rows_are_those_of_the_last_frames_in_order() -> None:
    recent = RecentRows([Tag("a"), Tag("b")], 10, 5)
    frame = Frame.empty(2)
    assert len(recent.record()) == 0
    for i in range(12):
        frame.values[:], frame.valid[:], frame.source_ns, frame.gap = (i, -i), 1, 10 * i, i in (0, 9)
        recent.offer(frame)
    record = recent.record()
    assert record.source_ns.tolist() == [70, 80, 90, 100, 110]
    assert record.values[:, 1].tolist() == [-7, -8, -9, -10, -11]
    assert record.gap.tolist() == [1, 0, 1, 0, 0]
    later = recent.record(after=10)
    assert later.source_ns.tolist() == [100, 110] and later.gap.tolist() == [0, 0]
    assert len(recent.record(after=12)) == 0

