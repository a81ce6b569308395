"""The command `feedback`: on store and model file alone, and beside whoever holds the store."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from running import NOWHERE, Ran, cli, snapshot, two_methods, write

from opcua_detector.api import Record
from opcua_detector.app import group_tags
from opcua_detector.config import load
from opcua_detector.feedback import DAY_NS, journal
from opcua_detector.feedback.desk import ANSWERED, EXPIRED, FORECAST, Desk
from opcua_detector.model import load as load_model
from opcua_detector.store import Event, FeedbackEntry, Store
from sim_server.processes import Fault, make

START_NS = 1_772_345_000_000_000_000
PERIOD_NS = 10_000_000
HEALTHY, FAULTY, ONSET = 12_000, 6_000, 3_000


def iso(row: int) -> str:
    """Time of a row of the recording with the fault."""
    stamp = START_NS + (HEALTHY + 1000 + row) * PERIOD_NS
    return f"{np.datetime64(stamp // 1000, 'us')}Z"


@pytest.fixture(scope="session")
def _once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feedback")
    file = write(folder, two_methods(NOWHERE))
    config = load(file)
    tags = group_tags(config.groups[0])
    plant = make("lorenz", seed=1)
    plant.simulate(1000)
    healthy = Record.from_rows(plant.simulate(HEALTHY), tags, PERIOD_NS, start_ns=START_NS)
    plant = make("lorenz", seed=7)
    plant.simulate(1000)
    rows = plant.simulate_block(FAULTY, (Fault("beta", 1.25, ONSET, FAULTY),)).measured
    faulty = Record.from_rows(rows, tags, PERIOD_NS, start_ns=START_NS + (HEALTHY + 1000) * PERIOD_NS)
    with Store.open(config.store.path) as store:
        store.write_record("healthy", healthy, group="lorenz", server="plant")
        store.write_record("faulty", faulty, group="lorenz", server="plant")
    ran = cli("fit", file, "--recording", "healthy", "--json")
    assert ran.code == 0, ran.err
    return folder


@dataclass
class Bench:
    file: Path
    model: Path
    store: Path
    onset: int  # row of the first alarm in the recording `faulty`

    @property
    def model_id(self) -> str:
        return load_model(self.model).model_id


@pytest.fixture
def bench(_once: Path, tmp_path: Path) -> Bench:
    """A copy of store and model that a test may change."""
    import shutil

    shutil.copytree(_once, tmp_path / "plant", ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    file = tmp_path / "plant" / "plant.yaml"
    ran = cli("replay", file, "--recording", "faulty", "--json")
    raised = np.datetime64(ran.json["monitors"][0]["alerts"][0]["raised"].rstrip("Z"))
    onset = int((raised - np.datetime64(iso(0).rstrip("Z"))) / np.timedelta64(10, "ms"))
    return Bench(file, file.parent / "models" / "lorenz.npz", load(file).store.path, onset)


def add(bench: Bench, *more: object, rows: int = 200, label: str = "false alarm") -> Ran:
    return cli("feedback", "add", bench.file, "--label", label, "--interval",
               f"{iso(bench.onset)}/{iso(bench.onset + rows)}", "--who", "anna", *more, "--json")


def alerts(bench: Bench) -> int:
    return len(cli("replay", bench.file, "--recording", "faulty", "--json").json["monitors"][0]["alerts"])


def test_a_false_alarm_changes_the_model_file_tells_the_forecast_and_every_step_is_kept(bench: Bench) -> None:
    before, seen = bench.model_id, alerts(bench)
    ran = add(bench, rows=FAULTY - bench.onset)
    assert ran.code == 0, ran.err
    told = ran.json
    assert told["action"] == "adapted" and "unless confirmed" in told["text"] and bench.model_id in told["text"]
    assert "alerts per day" in told["forecast"] and f"{seen} -> 0" in told["forecast"]
    assert bench.model_id != before and alerts(bench) == 0 < seen
    with Store.open(bench.store, readonly=True) as store:
        (entry,) = store.feedback("lorenz")
        assert (entry.who, entry.label) == ("anna", "false alarm")
        (answer,) = store.audit(ANSWERED)
        assert answer.who == "anna" and answer.detail["feedback"] == entry.id
        assert (answer.detail["model_before"], answer.detail["model_after"]) == (before, bench.model_id)
        assert len(store.audit(FORECAST)) == 1
        assert {m.model_id for m in store.models("lorenz")} == {before, bench.model_id}
        assert store.unanswered_feedback(ANSWERED) == []


def test_the_same_again_changes_nothing_and_undo_gives_back_the_identical_model(bench: Bench) -> None:
    before = bench.model_id
    first = add(bench).json
    adapted = bench.model_id
    again = add(bench)
    assert again.code == 0 and again.json["action"] == "unchanged" and bench.model_id == adapted
    ran = cli("feedback", "undo", bench.file, "--id", first["delta"][:5], "--who", "ben", "--json")
    assert ran.json["action"] == "undone" and bench.model_id == before


def test_list_shows_what_is_in_force_and_what_was_said(bench: Bench) -> None:
    delta = add(bench, "--comment", "cleaning").json["delta"]
    cli("feedback", "add", bench.file, "--label", "true", "--interval", f"{iso(bench.onset)}/{iso(bench.onset + 9)}")
    listed = cli("feedback", "list", bench.file, "--json").json
    (one,) = listed["adaptations"]
    assert (one["id"], one["who"], one["state"], one["comment"]) == (delta, "anna", "provisional", "cleaning")
    assert [s["action"] for s in listed["said"]] == ["noted", "adapted"]
    text = cli("feedback", "list", bench.file).out
    assert delta in text and "provisional, expires" in text and "the model stays as it is" in text


def test_confirm_keeps_it_and_what_nobody_confirms_expires_with_an_audit(bench: Bench) -> None:
    before = bench.model_id
    delta = add(bench).json["delta"]
    ran = cli("feedback", "confirm", bench.file, "--id", delta, "--who", "eva", "--json")
    assert ran.json["action"] == "confirmed"
    (kept,) = journal(load_model(bench.model))
    assert (kept["state"], kept["confirmed_by"]) == ("confirmed", "eva") and "expires_ns" not in kept
    config = load(bench.file)
    with Store.open(bench.store) as store:
        assert Desk(config, bench.file, store).expire(time.time_ns() + 400 * DAY_NS) == []
    assert cli("feedback", "undo", bench.file, "--id", delta).code == 0
    assert bench.model_id == before
    add(bench)
    with Store.open(bench.store) as store:
        (answer,) = Desk(config, bench.file, store).expire(time.time_ns() + 8 * DAY_NS)
        assert answer.action == "expired" and bench.model_id == before
        (entry,) = store.audit(EXPIRED)
        assert entry.detail["model_after"] == before and entry.who == "opcua-detector"
    assert "expired unreviewed" in cli("feedback", "list", bench.file).out


def test_for_good_confirms_at_once(bench: Bench) -> None:
    told = add(bench, "--for-good").json
    assert told["action"] == "adapted" and told["confirmed"]["action"] == "confirmed"
    assert [d["state"] for d in journal(load_model(bench.model))] == ["confirmed"]


def test_a_refused_feedback_changes_nothing_and_is_kept(bench: Bench) -> None:
    config = load(bench.file)
    before = bench.model.read_bytes()
    tight = bench.file.read_text(encoding="utf-8")
    assert "eu_range" not in tight
    ran = cli("feedback", "add", bench.file, "--label", "false alarm", "--interval",
              "2020-01-01T00:00:00Z/2020-01-01T00:00:10Z", "--json")
    assert ran.code == 1 and ran.json["action"] == "refused" and "not stored" in ran.json["text"]
    assert "not stored" in ran.err and "give a newer interval" in ran.err
    ran = cli("feedback", "undo", bench.file, "--id", "abcd")
    assert ran.code == 1 and "no such adaptation" in ran.err and "feedback list" in ran.err and not ran.out.strip()
    assert bench.model.read_bytes() == before
    with Store.open(config.store.path, readonly=True) as store:
        assert [e.detail["action"] for e in store.audit(ANSWERED)] == ["refused", "refused"]
        assert len(store.feedback("lorenz")) == 2


def with_policy(bench: Bench, **policy: object) -> None:
    """Give the monitor of the config a section `feedback`."""
    given = yaml.safe_load(bench.file.read_text(encoding="utf-8"))
    given["monitors"][0]["feedback"] = policy
    bench.file.write_text(yaml.safe_dump(given), encoding="utf-8")


def test_the_config_says_how_far_feedback_may_go(bench: Bench) -> None:
    with_policy(bench, mode="bounded", expires="14 d")
    assert add(bench).code == 0
    (delta,) = journal(load_model(bench.model))
    assert delta["expires_ns"] - delta["at_ns"] == 14 * DAY_NS
    assert cli("feedback", "undo", bench.file, "--id", delta["id"]).code == 0
    with_policy(bench, protected={"x1": [-1.0, 1.0]})
    ran = add(bench)
    assert ran.code == 1 and "x1" in ran.err and "its protected range -1 to 1" in ran.err
    with_policy(bench, mode="off")
    ran = add(bench)
    assert ran.code == 1 and "mode off" in ran.err and journal(load_model(bench.model)) == ()
    assert cli("feedback", "add", bench.file, "--label", "true", "--interval", f"{iso(1)}/{iso(2)}").code == 0
    with_policy(bench, mode="paper")
    assert add(bench).code == 0
    (delta,) = journal(load_model(bench.model))
    assert delta["state"] == "paper" and "expires_ns" not in delta


def test_an_alert_is_meant_by_its_number_and_without_one_the_last(bench: Bench) -> None:
    stamp = START_NS + (HEALTHY + 1000 + bench.onset) * PERIOD_NS
    with Store.open(bench.store) as store:
        store.start_run("test", monitors=["lorenz"])
        store.record_event(Event("lorenz", 4, START_NS, START_NS + 50 * PERIOD_NS))
        store.record_event(Event("lorenz", 5, stamp, stamp + 100 * PERIOD_NS))
        store.flush()
        store.end_run()
    old = cli("feedback", "add", bench.file, "--label", "false alarm", "--event", 4, "--json").json
    assert old["action"] == "unchanged"
    assert cli("feedback", "add", bench.file, "--label", "false alarm", "--json").json["action"] == "adapted"
    (delta,) = journal(load_model(bench.model))
    assert (delta["start_ns"], delta["end_ns"]) == (stamp, stamp + 100 * PERIOD_NS)
    missing = cli("feedback", "add", bench.file, "--label", "false alarm", "--event", 9, "--json")
    assert missing.code == 1 and missing.json["action"] == "refused" and "there is no alert 9" in missing.err


def test_forecast_replays_without_and_with_an_adaptation_and_writes_nothing(bench: Bench) -> None:
    delta = add(bench, rows=FAULTY - bench.onset).json["delta"]
    files = snapshot(bench.file.parent)
    ran = cli("feedback", "forecast", bench.file, "--id", delta, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["alerts_before"] > ran.json["alerts_after"] == 0
    assert ran.json["days"] == pytest.approx((HEALTHY + FAULTY) * 0.01 / 86400)
    assert "alerts per day" in cli("feedback", "forecast", bench.file, "--id", delta).out
    assert snapshot(bench.file.parent) == files


def test_a_missed_alert_is_weighed_against_the_stored_healthy_rows(bench: Bench) -> None:
    span = f"{iso(500)}/{iso(520)}"
    told = cli("feedback", "add", bench.file, "--label", "missed", "--interval", span, "--json").json
    assert told["action"] in ("tightened", "noted")
    assert "alerts per day" in told["text"] or "true for evaluation" in told["text"]


def test_a_new_fit_is_never_overwritten_with_an_older_adapted_model(bench: Bench) -> None:
    config = load(bench.file)
    with Store.open(bench.store) as store:
        desk = Desk(config, bench.file, store)
        desk.model("lorenz")
        model = load_model(bench.model)
        other = replace(model, facts={**model.facts, "rows": 1})
        other.save(bench.model)  # somebody fits again while a service is running
        stamp = START_NS + (HEALTHY + 1000 + bench.onset) * PERIOD_NS
        entry = FeedbackEntry("anna", "false alarm", "lorenz", None, stamp, stamp + 100 * PERIOD_NS,
                              at_ns=time.time_ns())
        answer = desk.answer(entry)
    assert answer.action == "refused" and "fitted again" in answer.text
    assert bench.model_id == other.model_id


def test_while_another_process_holds_the_store_it_answers(bench: Bench) -> None:
    config = load(bench.file)
    before = bench.model_id
    with Store.open(bench.store) as store:
        kept = cli("feedback", "add", bench.file, "--label", "true", "--interval", f"{iso(1)}/{iso(2)}", "--wait", "0",
                   "--json")
        assert kept.code == 0 and kept.json["action"] == "pending"
        assert "nobody has answered yet" in cli("feedback", "list", bench.file).out
        desk, stop = Desk(config, bench.file, store), threading.Event()

        def serve() -> None:
            while not stop.is_set():
                for entry in desk.pending():
                    desk.forecast(desk.answer(entry))
                time.sleep(0.05)

        server = threading.Thread(target=serve)
        server.start()
        try:
            told = add(bench).json
        finally:
            stop.set()
            server.join()
        assert told["action"] == "adapted" and "alerts per day" in told["forecast"]
        assert told["model_before"] == before != told["model_after"] == bench.model_id
        assert [e.detail["label"] for e in reversed(store.audit(ANSWERED))] == ["true", "false alarm"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--label", "wrong"), "false alarm, true, unsure, missed"),
    (("--label", "missed"), "FROM/TO"),
    (("--label", "true", "--event", "3", "--interval", "2026-01-01T00:00:00Z/2026-01-01T00:00:01Z"), "either"),
    (("--label", "true", "--monitor", "nobody"), "lorenz"),
    (("--label", "true", "--interval", "yesterday"), "FROM/TO"),
])
def test_wrong_usage_says_what_is_expected(bench: Bench, arguments: tuple[str, ...], words: str) -> None:
    ran = cli("feedback", "add", bench.file, *arguments, "--json")
    assert ran.code == 2 and words in ran.err and ran.json["error"]["exit_code"] == 2


@pytest.mark.parametrize("command", ["add", "list", "confirm", "undo", "forecast"])
def test_every_part_of_the_command_has_help(command: str) -> None:
    assert command in cli("feedback", "--help").out
    ran = cli("feedback", command, "--help")
    assert ran.code == 0 and "--json" in ran.out and "--monitor" in ran.out
    assert "Exit code 1: it was refused" in cli("feedback", "--help").out
