"""`evaluate` and `report` as a user runs them, on both simulated plants and on recordings of the store."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from running import cli, content, snapshot, tag, write

from opcua_detector.api import Record, Tag
from opcua_detector.config import load
from opcua_detector.csv_rows import read_csv, write_csv
from opcua_detector.metrics import auc, partial_auc, vus_pr
from opcua_detector.store import Store
from sim_server.processes import Fault, make

START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z
NOWHERE = "opc.tcp://127.0.0.1:1/"
FAULT_OF = {"lorenz": ("rho", 1.3), "throttle": ("Kt", 1.3)}
TAGS_OF = {"lorenz": ("x1", "x3"), "throttle": ("theta", "u")}
PERIOD_OF = {"lorenz": 10_000_000, "throttle": 20_000_000}


@dataclass
class Ready:
    """A fitted monitor without a server, and rows with faults."""

    process: str
    folder: Path
    file: Path
    faulty: Path
    record: Record


def rows_of(process: str, n: int, seed: int, *faults: Fault) -> Record:
    """Rows of a simulated plant with ground truth, after a settling time."""
    plant = make(process, seed=seed)
    plant.simulate(1000)
    block = plant.simulate_block(n, faults)
    return Record.from_rows(block.measured, [Tag(name) for name in TAGS_OF[process]], PERIOD_OF[process],
                            start_ns=START_NS, truth=block.labels)


@pytest.fixture(scope="module")
def plants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ready]:
    """Both plants, fitted once."""
    made = {}
    for process in TAGS_OF:
        folder = tmp_path_factory.mktemp(process)
        given = content(NOWHERE, tags=[tag(name, process) for name in TAGS_OF[process]], outputs=False)
        given["groups"][0] |= {"name": process, "period": f"{PERIOD_OF[process] // 10**6} ms"}
        given["monitors"] = [{"name": process, "group": process}]
        file = write(folder, given)
        write_csv(folder / "healthy.csv", rows_of(process, 12_000, 1))
        name, factor = FAULT_OF[process]
        record = rows_of(process, 8000, 2, Fault(name, factor, 3000, 4000), Fault(name, factor, 6500, 7000))
        write_csv(folder / "faulty.csv", record)
        ran = cli("fit", file, "--csv", folder / "healthy.csv")
        assert ran.code == 0, ran.err
        made[process] = Ready(process, folder, file, folder / "faulty.csv", record)
    return made


@pytest.fixture
def lorenz(plants: dict[str, Ready], tmp_path: Path) -> Ready:
    """A copy of the Lorenz plant that a test may spoil."""
    folder = tmp_path / "lorenz"
    shutil.copytree(plants["lorenz"].folder, folder, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    return Ready("lorenz", folder, folder / "plant.yaml", folder / "faulty.csv", plants["lorenz"].record)


def scores_of(ready: Ready) -> np.ndarray:
    """The scores that `replay` writes."""
    file = ready.folder / "scores.csv"
    ran = cli("replay", ready.file, "--csv", ready.faulty, "--scores", file)
    assert ran.code == 0, ran.err
    with file.open(encoding="utf-8") as stream:
        return np.array([float(row["score"] or "nan") for row in csv.DictReader(stream)])


@pytest.mark.parametrize("process", ["lorenz", "throttle"])
def test_evaluate_gives_the_metrics_of_what_replay_scores(process: str, plants: dict[str, Ready]) -> None:
    ready = plants[process]
    ran = cli("evaluate", ready.file, "--csv", ready.faulty, "--json")
    assert ran.code == 0, ran.err
    (found,) = ran.json["monitors"]
    score, truth = scores_of(ready), ready.record.truth
    assert truth is not None
    assert found["ranking"] == {"auc": auc(score, truth), "pauc": partial_auc(score, truth, 0.1),
                                "vus_pr": vus_pr(score, truth, found["vus_window"])}
    assert found["random"]["auc"] == pytest.approx(0.5, abs=0.05)
    assert found["ranking"]["auc"] > 0.9 and found["ranking"]["vus_pr"] > found["random"]["vus_pr"]
    assert [e["found"] for e in found["events"]] == [True, True] and found["point"]["onset_recall"] == 1.0
    for event, row in zip(found["events"], (3000, 6500), strict=True):
        at = START_NS + row * PERIOD_OF[process]
        assert event["from"].startswith(np.datetime64(at, "ns").astype("datetime64[ms]").item().isoformat()[:19])
        assert 0 <= event["delay_s"] < 5 and event["top_tag"] in TAGS_OF[process] and event["sentence"]
    assert len(found["alerts"]) == found["raised"] and found["source"] == "file faulty.csv"
    replayed = cli("replay", ready.file, "--csv", ready.faulty, "--json").json["monitors"][0]
    assert [a["raised"] for a in found["alerts"]] == [a["raised"] for a in replayed["alerts"]]
    assert [a["sentence"] for a in found["alerts"]] == [a["explanation"] for a in replayed["alerts"]]


@pytest.mark.parametrize("process", ["lorenz", "throttle"])
def test_report_writes_one_page_that_stands_alone(process: str, plants: dict[str, Ready], tmp_path: Path) -> None:
    ready, page = plants[process], tmp_path / "report.html"
    ran = cli("report", ready.file, "--csv", ready.faulty, "--output", page, "--json")
    assert ran.code == 0, ran.err
    text = page.read_text(encoding="utf-8")
    assert ran.json["bytes"] == len(text.encode()) < 1_000_000 and ran.json["file"] == str(page)
    assert "http" not in re.sub(r'"data:image/png;base64,[^"]*"', "", text)
    assert "<script" not in text and "2 of 2" in text
    HTMLParser().feed(text)
    for name in TAGS_OF[process]:
        assert name in text
    assert list(tmp_path.iterdir()) == [page]
    (found,) = ran.json["monitors"]
    assert found == cli("evaluate", ready.file, "--csv", ready.faulty, "--json").json["monitors"][0]


def test_evaluate_tells_a_person_what_it_tells_a_program(lorenz: Ready) -> None:
    before = snapshot(lorenz.folder)
    ran = cli("evaluate", lorenz.file, "--csv", lorenz.faulty)
    assert ran.code == 0, ran.err
    found = cli("evaluate", lorenz.file, "--csv", lorenz.faulty, "--json").json["monitors"][0]
    assert f"{found['ranking']['auc']:.3f}" in ran.out and "random: 0." in ran.out and "2 of 2" in ran.out
    for event in found["events"]:
        assert event["from"] in ran.out and event["sentence"] in ran.out
    assert "too short to check a budget of 1 false alarm a day" in ran.err
    assert snapshot(lorenz.folder) == before


def test_without_ground_truth_alerts_are_told_beside_the_budget(lorenz: Ready) -> None:
    source_ns, values, names, _ = read_csv(lorenz.faulty)
    record = Record.from_rows(values, names, 10_000_000, start_ns=int(source_ns[0]))
    write_csv(lorenz.folder / "plain.csv", record)
    ran = cli("evaluate", lorenz.file, "--csv", lorenz.folder / "plain.csv", "--json")
    (found,) = ran.json["monitors"]
    assert found["ranking"] is None and found["point"] is None and found["events"] == []
    assert found["budget_per_day"] == 1.0 and 0 < found["allowed"] < 0.01 and found["raised"] >= 2
    assert found["quantiles"]["1"] >= found["quantiles"]["0.99"] >= found["quantiles"]["0.5"]
    assert "the budget allows under 0.01 in this time" in ran.out
    page = lorenz.folder / "plain.html"
    assert cli("report", lorenz.file, "--csv", lorenz.folder / "plain.csv", "-o", page).code == 0
    assert "There is no ground truth" in page.read_text(encoding="utf-8")


# --- where rows and ground truth come from ---


def test_rows_come_from_the_store_and_the_newest_recording_is_the_default(lorenz: Ready) -> None:
    ran = cli("evaluate", lorenz.file)
    assert ran.code == 3 and "holds no recording of the group lorenz" in ran.err and "--csv FILE" in ran.err
    with Store.open(load(lorenz.file).store.path) as store:
        store.write_record("old", rows_of("lorenz", 3000, 8), group="lorenz")
        store.write_record("new", lorenz.record, group="lorenz")
        store.write_record("other", lorenz.record, group="elsewhere")
    (found,) = cli("evaluate", lorenz.file, "--json").json["monitors"]
    assert found["source"] == "recording new" and found["rows"] == 8000 and found["point"]["detected"] == 2
    assert found == cli("evaluate", lorenz.file, "--recording", "new", "--json").json["monitors"][0]
    (end,) = cli("evaluate", lorenz.file, "--last", "20 s", "--json").json["monitors"]
    assert end["rows"] == 2000 and end["to"] == found["to"] and end["point"]["onsets"] == 1
    (cut,) = cli("evaluate", lorenz.file, "--only", "2026-01-01T00:00:20Z/2026-01-01T00:00:50Z", "--json").json[
        "monitors"]
    assert cut["rows"] == 3001 and len(cut["events"]) == 1
    assert cli("evaluate", lorenz.file, "--recording", "none").code == 5


def test_ground_truth_can_be_a_tag_of_the_recording(lorenz: Ready) -> None:
    record = lorenz.record
    assert record.truth is not None
    alarm = np.where(record.truth == 1, 4.0, 0.0)
    values = np.column_stack([record.values, alarm])
    valid = np.ones(values.shape, np.uint8)
    valid[5000:5010, 2] = 0
    with Store.open(load(lorenz.file).store.path) as store:
        store.write_record("marked", Record.from_rows(
            values, ["x1", "x3", "broken"], 10_000_000, start_ns=START_NS, valid=valid), group="lorenz")
    ran = cli("evaluate", lorenz.file, "--truth", "broken", "--json")
    assert ran.code == 0 and "no valid value in 10 rows" in ran.err
    expected = cli("evaluate", lorenz.file, "--csv", lorenz.faulty, "--json").json["monitors"][0]
    assert ran.json["monitors"][0]["point"] == expected["point"]
    ran = cli("evaluate", lorenz.file, "--truth", "nothing")
    assert ran.code == 3 and "no tag 'nothing'" in ran.err and "x1, x3, broken" in ran.err


def test_ground_truth_can_be_any_column_of_a_csv(lorenz: Ready, tmp_path: Path) -> None:
    text = lorenz.faulty.read_text(encoding="utf-8").replace("truth", "label", 1)
    other = tmp_path / "other.csv"
    other.write_text(text, encoding="utf-8")
    with_truth = cli("evaluate", lorenz.file, "--csv", other, "--truth", "label", "--json").json["monitors"][0]
    assert with_truth["point"]["detected"] == 2
    assert cli("evaluate", lorenz.file, "--csv", other, "--json").json["monitors"][0]["point"] is None
    ran = cli("evaluate", lorenz.file, "--csv", other, "--truth", "fault")
    assert ran.code == 3 and "no truth column 'fault'" in ran.err and "'label'" in ran.err


def test_one_class_and_rows_without_a_verdict_are_told(lorenz: Ready, tmp_path: Path) -> None:
    healthy = tmp_path / "healthy.csv"
    write_csv(healthy, rows_of("lorenz", 2000, 11))
    ran = cli("evaluate", lorenz.file, "--csv", healthy, "--truth", "truth")
    assert ran.code == 3 and "every row is healthy" in ran.err and "leave --truth out" in ran.err
    (found,) = cli("evaluate", lorenz.file, "--csv", healthy, "--json").json["monitors"]
    assert found["ranking"] is None and found["point"]["onsets"] == 0 and found["point"]["false_alarm_share"] < 0.2
    silent = tmp_path / "silent.csv"
    rows = rows_of("lorenz", 50, 11)
    write_csv(silent, dataclasses.replace(rows, valid=np.zeros_like(rows.valid)))
    for command in ("evaluate", "report"):
        ran = cli(command, lorenz.file, "--csv", silent, "--json")
        assert ran.code == 3 and "not one of 50 rows got a verdict" in ran.json["error"]["what"], ran.err
        assert "longer recording" in ran.json["error"]["next_step"]
    assert cli("evaluate", lorenz.file, "--csv", healthy, "--recording", "x").code == 2
    assert cli("evaluate", lorenz.file, "--csv", healthy, "--monitor", "x").code == 2
    assert cli("evaluate", lorenz.file, "--csv", healthy, "--last", "yesterday").code == 2


def test_a_page_that_cannot_be_written_is_told_before_and_after_the_work(lorenz: Ready) -> None:
    ran = cli("report", lorenz.file, "--csv", lorenz.faulty, "--output", lorenz.folder / "nowhere" / "r.html")
    assert ran.code == 2 and "no such folder" in ran.err
    (lorenz.folder / "taken").mkdir()
    ran = cli("report", lorenz.file, "--csv", lorenz.faulty, "--output", lorenz.folder / "taken")
    assert ran.code == 2 and "cannot be written" in ran.err
    assert not list(lorenz.folder.glob(".*.part"))


def test_a_map_can_be_chosen_and_a_wrong_one_is_refused(lorenz: Ready) -> None:
    given = yaml.safe_load(lorenz.file.read_text(encoding="utf-8"))
    given["monitors"][0]["methods"] = ["transition"]
    file = write(lorenz.folder, given, "transition.yaml")
    assert cli("fit", file, "--csv", lorenz.folder / "healthy.csv").code == 0
    page = lorenz.folder / "map.html"
    assert cli("report", file, "--csv", lorenz.faulty, "--map", "x3", "-o", page).code == 0
    assert page.read_text(encoding="utf-8").count("made a movement never seen") == 1
    ran = cli("report", file, "--csv", lorenz.faulty, "--map", "x2", "-o", page)
    assert ran.code == 4 and "no transition map of x2" in ran.err and "x1, x3" in ran.err


@pytest.mark.parametrize(("command", "options"), [
    ("evaluate", ("--csv", "--recording", "--last", "--only", "--without", "--truth", "--monitor", "--json")),
    ("report", ("--output", "--csv", "--recording", "--last", "--truth", "--map", "--monitor", "--json"))])
def test_help_names_every_option_and_what_happens(command: str, options: tuple[str, ...]) -> None:
    text = cli(command, "--help").out
    for option in options:
        assert option in text
    assert "ground truth" in text.lower() and "recording" in text


def test_commands_work_in_a_process_of_their_own_and_drawing_is_loaded_for_the_report_alone(lorenz: Ready) -> None:
    code = ("import sys\nfrom opcua_detector.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n"
            "    assert not e.code\nprint('matplotlib' in sys.modules)")
    for command, loaded in (("evaluate", "False"), ("report", "True")):
        ran = subprocess.run(
            [sys.executable, "-c", code, command, str(lorenz.file), "--csv", str(lorenz.faulty)],
            capture_output=True, text=True, cwd=lorenz.folder, timeout=120)
        assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == loaded, ran.stderr
    assert (lorenz.folder / "report.html").stat().st_size > 100_000
