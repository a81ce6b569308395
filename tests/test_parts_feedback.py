"""Feedback on a monitor of parts, on the simulated press: a part that was declared normal no longer alarms, others do;
what is too far is refused, and undo gives the identical model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from presses import FIT_ROWS, PERIOD_NS, TAGS, configuration, fitted, press
from running import WAIT_S, cli, wait_for

from opcua_detector import config as config_files
from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.app import fit_config, keep_fitted, model_path, open_monitors
from opcua_detector.engine import AlertSettings, Engine, frames_of
from opcua_detector.errors import RecordError
from opcua_detector.feedback import Feedback, Outcome, Policy, confirm, expire, forecast, give_feedback, undo
from opcua_detector.feedback.desk import Desk
from opcua_detector.feedback.live import LiveFeedback
from opcua_detector.metrics import auc
from opcua_detector.model import NormalityModel, load
from opcua_detector.parts import Cycle, PartModel, PartMonitor, fit_parts, part_scores
from opcua_detector.service import MonitorRun
from opcua_detector.store import Event, FeedbackEntry, Store
from sim_server.processes import Fault

DAY_NS = 86_400_000_000_000
OPEN = None  # parts open no method


def said(model: NormalityModel, record: Record, first: int, last: int, label: str = "false alarm",
         policy: Policy | None = None, at_ns: int = DAY_NS) -> Outcome:
    """Give feedback on the rows first ... last of a record."""
    word = Feedback(label, int(record.source_ns[first]), int(record.source_ns[last]), "anna", at_ns)
    return give_feedback(model, record, word, OPEN, policy=policy)  # type: ignore[arg-type]


def inside(model: NormalityModel, record: Record, first: int, last: int) -> np.ndarray:
    """Scores of the whole parts that lie between rows."""
    cut, scores = part_scores(model, record)
    return scores[(cut.whole != 0) & (cut.begin >= first) & (cut.end <= last)]


WEAR = (Fault("wear", 1.12, 3000, 4500),)


@pytest.mark.parametrize("cycle", ["counter", "stroke"])
def test_a_part_declared_normal_no_longer_alarms_and_neither_does_its_like(cycle: str) -> None:
    model, record = fitted(cycle), press(8000, faults=WEAR)
    before = inside(model, record, 3000, 4500)
    assert (before >= 1.0).all() and len(before) > 7
    outcome = said(model, record, 3000, 4500)
    assert outcome.action == "adapted", outcome.text
    assert "force may" in outcome.text and "of the cycle" in outcome.text and "expires 1970-01-09" in outcome.text
    assert (inside(outcome.model, record, 3000, 4500) < 1.0).all()
    again = inside(outcome.model, press(8000, faults=(Fault("wear", 1.12, 5000, 7000),)), 5000, 7000)
    assert len(again) > 10 and (again < 1.0).mean() > 0.9  # other parts with the same wear
    one = PartMonitor("press", outcome.model, TAGS, AlertSettings(off_delay_ns=0))
    engine = Engine([one])
    assert not any(engine.step(frame)[0].alert for frame in frames_of(record))


OTHERS = {"blank": 0.01, "hold_position": 2.0, "hold_force": 2.0, "friction": 4.0, "cooling": 0.6, "stroke": 1.25}


@pytest.mark.parametrize("given", [WEAR[0], Fault("stroke", 1.12, 3000, 4500), Fault("friction", 4.0, 3000, 4500)],
                         ids=lambda fault: str(fault.parameter))
def test_other_faults_are_found_as_before(given: Fault) -> None:
    model = fitted()
    outcome = said(model, press(8000, faults=(given,)), 3000, 4500)
    assert outcome.action == "adapted", outcome.text
    adapted = outcome.model
    for name, factor in OTHERS.items():
        if name == given.parameter:
            continue
        record = press(8000, faults=(Fault(name, factor, 3000, 6000),))
        cut, old = part_scores(model, record)
        new = part_scores(adapted, record)[1]
        whole = (cut.whole != 0) & ((cut.end <= 6000) | (cut.begin >= 6300))
        truth = (cut.begin >= 3000) & (cut.begin < 6000)
        assert (new[whole & truth] >= 1.0).sum() >= 0.95 * (old[whole & truth] >= 1.0).sum() > 0, name
        assert auc(new[whole], truth[whole]) >= auc(old[whole], truth[whole]) - 0.005, name
    strong = press(8000, faults=(Fault("wear", 1.5, 3000, 4500),))  # of the same, too
    assert (inside(adapted, strong, 3000, 4500) >= 1.0).all()


def test_undo_gives_the_identical_model_and_the_order_does_not_matter(tmp_path: Path) -> None:
    model, wear = fitted(), press(8000, faults=WEAR)
    slow = press(8000, faults=(Fault("stroke", 1.08, 3000, 4500),))
    first = said(model, wear, 3000, 4500)
    second = said(first.model, slow, 3000, 4500)
    assert second.action == "adapted", second.text
    assert undo(undo(second.model, first.delta_id), second.delta_id).model_id == model.model_id
    assert undo(undo(second.model, second.delta_id), first.delta_id).model_id == model.model_id
    other = said(said(model, slow, 3000, 4500).model, wear, 3000, 4500).model
    for name, array in second.model.methods[0].arrays.items():
        assert_array_equal(other.methods[0].arrays[name], array)
    assert second.model.save(tmp_path / "m.npz") == load(tmp_path / "m.npz").model_id
    kept = confirm(second.model, first.delta_id, "eva", DAY_NS)
    left, over = expire(kept, 30 * DAY_NS)
    assert [d["id"] for d in over] == [second.delta_id]
    assert_array_equal(left.methods[0].arrays["spread"], first.model.methods[0].arrays["spread"])


def test_a_time_that_was_normal_widens_the_time_within_the_configured_one() -> None:
    model, slow = fitted(), press(8000, faults=(Fault("stroke", 1.12, 3000, 4500),))
    corridor = PartModel.from_method(model.methods[0])
    assert (inside(model, slow, 3000, 4500) >= 1.0).all()
    outcome = said(model, slow, 3000, 4500)
    assert outcome.action == "adapted", outcome.text
    assert PartModel.from_method(outcome.model.methods[0]).rows[2] >= corridor.rows[2]
    assert (inside(outcome.model, slow, 3000, 4500) < 1.0).all()
    cycle = Cycle("cycle", longest_ns=int(corridor.rows[2]) * PERIOD_NS)
    bound = fit_parts("press", press(FIT_ROWS, 0), cycle)[0]
    slower = press(8000, faults=(Fault("stroke", 1.4, 3000, 4500),))
    for one in (bound, model):
        refused = said(one, slower, 3000, 4500)
        assert refused.action == "refused" and refused.model is one
        assert "outside its protected time" in refused.text or "off its corridor" in refused.text


@pytest.mark.parametrize(("fault", "words"), [
    (Fault("wear", 1.6, 3000, 4500), "force"),
    (Fault("blank", 0.01, 3000, 4500), "force is off its corridor by"),
    (Fault("hold_temperature", 2.0, 3000, 4500), "temperature stands still"),
])
def test_what_is_too_far_is_refused_with_the_tag_and_the_limit(fault: Fault, words: str) -> None:
    model, record = fitted(), press(8000, faults=(fault,))
    outcome = said(model, record, 3000, 4500)
    assert outcome.action == "refused" and outcome.model is model and words in outcome.text, outcome.text


def test_a_value_outside_eurange_or_a_protected_range_is_refused() -> None:
    model, record = fitted(), press(8000, faults=WEAR)
    highest = float(record.values[:3000, 1].max())
    tags = tuple(replace(tag, eu_range=(-5.0, highest)) if tag.name == "force" else tag for tag in model.tags)
    refused = said(replace(model, tags=tags), record, 3000, 4500)
    assert refused.action == "refused" and "its EURange" in refused.text
    refused = said(model, record, 3000, 4500, policy=Policy(protected={"force": (-5.0, highest)}))
    assert refused.action == "refused" and "its protected range" in refused.text


def test_a_slow_ramp_that_is_clicked_away_each_time_is_refused_as_a_trend_before_it_is_large() -> None:
    model, actions = fitted(), []
    for factor in (1.08, 1.13, 1.19, 1.26, 1.33, 1.4):
        record = press(8000, faults=(Fault("wear", factor, 3000, 4500),))
        if not (inside(model, record, 3000, 4500) >= 1.0).any():
            continue
        outcome = said(model, record, 3000, 4500)
        actions.append(outcome.action)
        model = outcome.model
    assert actions[-1] == "refused" and 1 <= actions.count("adapted") <= 4
    strong = press(8000, faults=(Fault("wear", 1.3, 3000, 4500),))
    assert (inside(model, strong, 3000, 4500) >= 1.0).all()


def test_what_cannot_be_taken_in_is_told() -> None:
    model, record = fitted(), press(8000, faults=WEAR)
    healthy = said(model, record, 500, 2500)
    assert healthy.action == "unchanged" and healthy.model is model
    assert "no part of this interval is bad" in healthy.text
    with pytest.raises(RecordError, match="wait until the part has ended"):
        said(model, record.rows(3000, 3060), 5, 50)
    assert said(model, record, 500, 2500, "missed").action == "noted"
    assert said(model, record, 3000, 4500, "missed").action == "unchanged"
    twice = said(model, record, 3000, 4500)
    assert said(twice.model, record, 3000, 4500).model is twice.model


def test_many_feedbacks_do_not_bloat_the_model() -> None:
    model, record = fitted(), press(8000, faults=WEAR)
    paper = Policy(mode="paper")
    outcome = said(model, record, 3000, 4500, policy=paper)
    first = len(outcome.model.deltas)
    size = sum(a.nbytes for a in outcome.model.adapted.values())
    now = outcome.model
    for k in range(80):
        other = press(8000, faults=(Fault("wear", 1.12 + 0.001 * k, 3000, 4500),)) if k % 40 == 0 else record
        shifted = replace(other, values=other.values + np.array([0.0, 0.02 * k, 0.0, 0.0, 0.0]))
        now = said(now, shifted, 3000, 4500, policy=paper, at_ns=DAY_NS + k).model
    assert first == 1 and len(now.deltas) <= 65
    assert sum(a.nbytes for a in now.adapted.values()) < 70 * size


def test_the_forecast_counts_alerts_of_parts() -> None:
    model = fitted()
    faults = tuple(Fault("wear", 1.12, at, at + 400) for at in range(2000, 18_000, 4000))
    record = press(20_000, faults=faults)
    adapted = said(model, record, 2000, 2400).model
    told = forecast(model, adapted, record, OPEN, alert=AlertSettings(off_delay_ns=0))  # type: ignore[arg-type]
    assert told.before == len(faults) and told.after <= 1
    engine = Engine([PartMonitor("press", model, TAGS, AlertSettings(off_delay_ns=0))])
    assert told.before == sum(engine.step(frame)[0].raised for frame in frames_of(record))


def test_parts_that_were_kept_back_are_neither_forecast_nor_taken_in() -> None:
    model = fitted()
    record = press(8000, faults=(*WEAR, Fault("wear", 1.5, 5500, 6500)))
    column = np.zeros((len(record), 1))
    column[5400:6700] = 1.0
    record = replace(record, tags=(*record.tags, Tag("setup", kind=TagKind.STATE)),
                     values=np.hstack([record.values, column]),
                     valid=np.hstack([record.valid, np.ones_like(column, np.uint8)]))
    word = Feedback("false alarm", int(record.source_ns[3000]), int(record.source_ns[7000]), "anna", DAY_NS)
    alert = AlertSettings(off_delay_ns=0, maintenance="setup")
    refused = give_feedback(model, record, word, OPEN)  # type: ignore[arg-type]
    assert refused.action == "refused", refused.text
    adapted = give_feedback(model, record, word, OPEN, alert=alert)  # type: ignore[arg-type]
    assert adapted.action == "adapted", adapted.text
    told = forecast(model, adapted.model, record, OPEN, alert=alert)  # type: ignore[arg-type]
    assert (told.before, told.after) == (1, 0)
    free = forecast(model, adapted.model, record, OPEN, alert=AlertSettings(off_delay_ns=0))  # type: ignore[arg-type]
    assert (free.before, free.after) == (2, 1)


def test_a_changed_model_is_swapped_in_between_two_rows_and_the_standing_alert_ends() -> None:
    model, record = fitted(), press(8000, faults=WEAR)
    old = PartMonitor("press", model, TAGS, AlertSettings(off_delay_ns=0))
    old.continue_events(41)
    engine = Engine([old])
    frames = frames_of(record)
    for frame in frames:
        if engine.step(frame)[0].alert and frame.seq >= 3700:
            break
    outcome = said(model, record.rows(0, frame.seq + 1), 3000, frame.seq)
    assert outcome.action == "adapted", outcome.text
    new = PartMonitor("press", outcome.model, TAGS, AlertSettings(off_delay_ns=0))
    for past in frames_of(record.rows(frame.seq - 800, frame.seq + 1)):
        new.step(past)
    new.take_over(old)
    engine.swap(old, new)
    assert new.verdict.alert and new.verdict.event_no == 42
    raised, alerts = 0, []
    for frame in frames:
        verdict = engine.step(frame)[0]
        raised += verdict.raised
        alerts.append(verdict.alert)
    assert raised == 0 and not any(alerts[1:])


# -- the same desk --------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> tuple[Path, list[Event]]:
    """A fitted press with a recording and the alerts that its monitor raised in it."""
    file = configuration(folder, {"tag": "cycle"}, tags=["position", "force", "temperature"])
    config = config_files.load(file)
    record = press(8000, faults=WEAR)
    events: list[Event] = []
    with Store.open(config.store.path) as store:
        keep_fitted(fit_config(config, file, lambda group: press(FIT_ROWS, 0)), store)
        (one,) = open_monitors(config, file)["press"]
        recording = store.start_recording(None, TAGS, PERIOD_NS, group="press", server="plant")
        raised_ns = 0
        for frame in frames_of(record):
            at = store.offer_row(recording, frame)
            if frame.seq % 4000 == 0:
                wait_for(lambda at=at: store.committed_seq >= at, "the recorder thread")  # type: ignore[misc]
            verdict = one.step(frame)
            if verdict.raised:
                raised_ns = verdict.source_ns
            if verdict.cleared:
                events.append(Event("press", verdict.event_no, raised_ns, verdict.source_ns, 1.5, 500,
                                    verdict.model_id, "", ()))
                store.record_event(events[-1])
        store.end_recording(recording)
    return file, events


def test_the_desk_adapts_the_file_and_the_command_undoes_it(tmp_path: Path) -> None:
    file, events = recorded(tmp_path)
    config = config_files.load(file)
    path = model_path(file, config.monitors[0])
    before = load(path).model_id
    assert len(events) >= 1
    with Store.open(config.store.path) as store:
        desk = Desk(config, file, store)
        number = store.record_feedback(FeedbackEntry("anna", "false alarm", "press", events[0].event_no,
                                                     at_ns=time.time_ns()))
        (entry,) = desk.pending()
        answer = desk.answer(entry)
        assert answer.action == "adapted" and entry.id == number, answer.text
        assert "alerts per day" in desk.forecast(answer)
    assert load(path).model_id == answer.model.model_id != before  # type: ignore[union-attr]
    listed = cli("feedback", "list", file, "--json").json
    assert [d["id"] for d in listed["adaptations"]] == [answer.delta_id] and listed["said"][0]["action"] == "adapted"
    told = cli("feedback", "forecast", file, "--id", answer.delta_id, "--json").json
    assert told["alerts_before"] >= len(events) > told["alerts_after"]
    undone = cli("feedback", "undo", file, "--id", answer.delta_id, "--json")
    assert undone.code == 0 and undone.json["action"] == "undone" and load(path).model_id == before
    added = cli("feedback", "add", file, "--label", "false alarm", "--event", str(events[0].event_no), "--json")
    assert added.code == 0 and added.json["action"] == "adapted", added.err
    assert load(path).model_id != before


async def test_a_running_service_answers_and_swaps_the_monitor_between_two_rows(tmp_path: Path) -> None:
    file = configuration(tmp_path, {"tag": "cycle"}, tags=["position", "force", "temperature"])
    config, record = config_files.load(file), press(8000, faults=WEAR)
    with Store.open(config.store.path) as store:
        keep_fitted(fit_config(config, file, lambda group: press(FIT_ROWS, 0)), store)
        (old,) = open_monitors(config, file)["press"]
        engine, run, told = Engine([old]), MonitorRun(config.monitors[0], old, None), []
        live = LiveFeedback(config, file, store, {"press": run}, lambda run, text: told.append(text))
        recent = live.watch("press", engine)
        await live.start({}, read_nodes=False)
        frames = frames_of(record)
        for frame in frames:
            verdict = engine.step(frame)[0]
            recent.offer(frame)
            if verdict.raised:
                store.record_event(Event("press", verdict.event_no, verdict.source_ns, None, verdict.score, 500,
                                         verdict.model_id, "", ()))
            if frame.seq == 3700:
                break
        assert old.verdict.alert
        store.record_feedback(FeedbackEntry("anna", "false alarm", "press", at_ns=time.time_ns()))
        async with asyncio.timeout(WAIT_S):
            while len(told) < 2:  # the answer, then the forecast
                await asyncio.sleep(0.05)
        assert told[0].startswith("adapted: force may reach"), told
        assert run.monitor is engine.monitors[0] is not old and run.monitor.verdict.event_no == old.verdict.event_no
        alerts = []
        for frame in frames:
            verdict = engine.step(frame)[0]
            alerts.append(verdict.alert)
            assert not verdict.raised
        assert not any(alerts[1:])
        await live.stop()
    assert load(model_path(file, config.monitors[0])).model_id == run.monitor.model.model_id
