"""The command `doctor`: what it finds on a real server, what it measures, and that it writes only when asked."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from running import PLANT, RESULTS, cli, content, read, result_nodes, tag, write

from cli.conftest import PASSWORD, UNREADABLE, USER, Fitted
from opcua_detector.cli import doctor
from opcua_detector.client import Diagnosis, Examined, Mark, diagnosis_of, finding_of
from opcua_detector.client.doctor import _fits, interval
from opcua_detector.client.measure import _rate, _rows
from opcua_detector.client.node_checks import Finding
from opcua_detector.config import GroupConfig, TagConfig
from sim_server.testing import RunningPlant

SECONDS = ("--seconds", "2")


def said(answer: dict[str, Any], what: str, where: str = "") -> list[dict[str, Any]]:
    """Return the diagnoses of one kind."""
    return [one for one in answer["diagnoses"] if one["what"] == what and where in one["where"]]


def test_a_healthy_plant_is_measured_and_nothing_is_written(plant: RunningPlant, fitted: Fitted) -> None:
    nodes = result_nodes("lorenz")
    before = read(plant.endpoint, nodes)
    ran = cli("doctor", fitted.file, *SECONDS, "--json")
    assert ran.code == 0, ran.out
    told = ran.json
    assert told["ok"] and told["counts"]["problem"] == 0
    server, group = told["servers"]["plant"], told["groups"]["lorenz"]
    assert abs(server["clock"]["offset_s"]) < 1 and server["clock"]["reads"] == 9
    assert 0 < server["round_trip_ms"]["shortest"] <= server["round_trip_ms"]["longest"]
    assert server["insecure"] and said(told, "security")[0]["mark"] == "warning"
    assert "Basic256Sha256" in said(told, "security")[0]["fix"]
    assert server["certificate"]["application_uri"] and server["certificate"]["days_left"] > 0
    assert server["limits"]["MaxNodesPerRead"] > 0 and server["server"]["state"] == "Running"
    stream = group["plant"]
    assert stream["publishing_ms"] == {"asked": 10.0, "revised": 10.0}
    assert stream["sampling_ms"]["asked"] == 5.0 and stream["queue"]["revised"] >= 2
    for name in ("x1", "x3"):
        rate = stream["tags"][name]
        assert rate["values"] > 50 and rate["interval_ms"] == pytest.approx(10, rel=0.2)
        assert rate["jitter_ms"] >= 0
    assert stream["read_ms"]["tags"] == 2 and 0 < stream["read_ms"]["median"] <= stream["read_ms"]["longest"]
    assert group["counters"]["rows"] > 50 and group["counters"]["lost"] == 0
    assert said(told, "node", "groups.lorenz") and said(told, "node", "monitors.lorenz")
    assert told["writes"] == {} and read(plant.endpoint, nodes) == before


def test_a_group_that_is_polled_is_measured_as_it_is_polled(plant: RunningPlant, tmp_path: Path) -> None:
    given = content(plant.endpoint)
    given["groups"][0]["sampling"] = "poll 2 ms"
    told = cli("doctor", write(tmp_path, given), *SECONDS, "--json").json
    stream = told["groups"]["lorenz"]["plant"]
    assert stream["polls"]["every_ms"] == 2.0 and stream["polls"]["answers"] > 100 and "publishing_ms" not in stream
    (polls,) = said(told, "polls")
    assert "as configured" in polls["found"] and bool(polls["fix"]) == (polls["mark"] != "ok")
    assert stream["tags"]["x1"]["values"] > 50 and stream["tags"]["x1"]["interval_ms"] == pytest.approx(10, rel=0.3)


def test_with_write_one_node_per_monitor_gets_its_own_value_again(plant: RunningPlant, fitted: Fitted) -> None:
    nodes = result_nodes("lorenz")
    before = read(plant.endpoint, nodes)
    told = cli("doctor", fitted.file, *SECONDS, "--write", "--json").json
    assert told["writes"]["lorenz"]["signal"] == "Heartbeat" and told["writes"]["lorenz"]["median_ms"] > 0
    assert read(plant.endpoint, nodes) == before


def test_a_write_goes_to_no_node_that_is_not_an_output(plant: RunningPlant, tmp_path: Path) -> None:
    given = content(plant.endpoint, outputs={"server": "plant", "nodes": {"IsAnomaly": f"{RESULTS}lorenz.IsAnomaly"}})
    told = cli("doctor", write(tmp_path, given), *SECONDS, "--write", "--json").json
    (one,) = said(told, "write")
    assert one["mark"] == "ok" and "not measured" in one["found"]


def test_every_problem_has_its_fix_and_the_rest_is_measured_all_the_same(plant: RunningPlant, tmp_path: Path) -> None:
    tags = [tag("x1"), tag("x3"), {"name": "gone", "node": f"{PLANT}lorenz.gone"},
            {"name": "secret", "node": UNREADABLE}, tag("clock")]
    given = content(plant.endpoint, tags=tags, outputs={"server": "plant", "nodes": {"Score": f"{PLANT}lorenz.x1"}})
    file = write(tmp_path, given)
    ran = cli("doctor", file, *SECONDS)
    assert ran.code == 9
    told = cli("doctor", file, *SECONDS, "--json").json
    problems = [one for one in told["diagnoses"] if one["mark"] == "problem"]
    assert all(one["fix"] for one in told["diagnoses"] if one["mark"] != "ok")
    places = " ".join(one["where"] + one["found"] for one in problems)
    assert "groups.lorenz.tags.gone" in places and "secret" in places and "may not write" in places
    assert "gone" in " ".join(one["found"] for one in said(told, "tag"))
    assert told["groups"]["lorenz"]["plant"]["tags"]["x1"]["values"] > 50
    assert not said(told, "node", "groups.lorenz.tags (") and "doctor" not in ran.err
    for one in problems:
        assert one["fix"].split(":")[0][:30] in ran.out.replace("\n", " ") or one["fix"][:20] in ran.out


def test_a_server_that_is_away_is_a_problem_and_its_groups_are_not_watched(tmp_path: Path) -> None:
    ran = cli("doctor", write(tmp_path, content("opc.tcp://127.0.0.1:1/")), *SECONDS, "--json")
    assert ran.code == 9
    (away,) = said(ran.json, "connection")
    assert away["mark"] == "problem" and "127.0.0.1:1" in away["where"] and away["fix"]
    assert "no connection to plant" in said(ran.json, "rows", "group lorenz")[0]["found"]


def test_an_unchecked_certificate_is_told_by_doctor_and_by_check(
    plant: RunningPlant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCTOR_TEST_PASSWORD", PASSWORD)
    given = content(plant.endpoint)
    given["servers"][0] |= {"policy": "Basic256Sha256", "user": USER, "password_env": "DOCTOR_TEST_PASSWORD"}
    file = write(tmp_path, given)
    ran = cli("doctor", file, *SECONDS, "--json")
    assert ran.code == 0 and PASSWORD not in ran.out + ran.err
    (found,) = said(ran.json, "certificate")
    assert found["mark"] == "warning" and "not trusted" in found["found"] and "cert trust" in found["fix"]
    assert ran.json["servers"]["plant"]["login"] == "user name"
    checked = cli("check", file, "--json")
    assert checked.code == 0
    notes = [one for one in checked.json["findings"] if one["problem"].startswith("certificate: ")]
    assert len(notes) == 1 and not notes[0]["error"] and "cert trust" in notes[0]["fix"]


def test_a_group_can_be_chosen_and_an_unknown_one_is_refused(fitted: Fitted) -> None:
    ran = cli("doctor", fitted.file, "--group", "nobody", "--json")
    assert ran.code == 2 and "lorenz" in ran.err


# --- the terminal ---

LONG = [
    Diagnosis("server plant", "security", Mark.WARNING, "policy None, insecure: true: nothing is encrypted " * 3,
              "set policy: Basic256Sha256 and take insecure away"),
    Diagnosis("server plant", "MaxMonitoredItemsPerSubscription", Mark.PROBLEM, "100, the configuration needs 200",
              "raise it at the server, or leave tags out"),
    Diagnosis("groups.g.tags.a (nsu=urn:a:very:long:namespace:uri:of:a:plant;s=Area51.Unit7.Reactor2.Temperature)",
              "node", Mark.OK, "found"),
]


@pytest.mark.parametrize("width", [44, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(doctor, "out", Console(file=text, width=width, force_terminal=True, color_system=None,
                                               highlight=False, soft_wrap=True))
    doctor.show_diagnoses(LONG)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    letters = re.sub(r"\s", "", text.getvalue())
    for one in LONG:
        for part in (one.where, one.mark.value):
            assert re.sub(r"\s", "", part) in letters
    if width == 200:
        assert "fix: raise it at the server, or leave tags out" in text.getvalue()
        assert lines[-1] == "1 problem, 1 warning, 1 ok"


# --- judging, without a server ---


def group(period: str = "10 ms", **more: Any) -> GroupConfig:
    """A group of two tags."""
    tags = tuple(TagConfig(name=name, node=f"ns=2;s={name}") for name in ("a", "b"))
    return GroupConfig(name="g", server="plant", period=period, tags=tags, **more)  # type: ignore[arg-type]


def test_limits_below_what_the_configuration_needs_are_problems() -> None:
    told = Examined()
    can = {"MaxMonitoredItems": 1, "MaxSubscriptionsPerSession": 5, "MinSupportedSampleRate": 50.0}
    _fits(told, "server plant", can, "plant", [group()])
    assert [(one.what, one.mark) for one in told.diagnoses] == [
        ("MaxMonitoredItems", Mark.PROBLEM), ("MinSupportedSampleRate", Mark.WARNING)]
    assert "needs 2" in told.diagnoses[0].found and "sampling: 50 ms" in told.diagnoses[1].fix
    fine = Examined()
    _fits(fine, "server plant", {"MaxMonitoredItems": 2, "MinSupportedSampleRate": 5.0}, "plant", [group()])
    assert fine.diagnoses == []


def test_rate_jitter_and_delay_of_a_tag_are_those_of_its_stamps() -> None:
    ms = 1_000_000
    jitter = np.tile([0, 2, 0, -2], 25)
    source = (np.arange(100) * 100 + jitter) * ms
    arrived = source + 30 * ms
    rate = _rate(source, arrived, offset_s=0.01)
    assert rate.values == 100 and rate.interval_ms == pytest.approx(100, abs=2.1)
    assert rate.jitter_ms == pytest.approx(4, abs=2.1)
    assert rate.delay_ms == pytest.approx(40)  # the server's clock is ahead: its stamps look younger than they are
    old = _rate(np.array([5 * ms]), np.array([10**15]), 0.0)
    assert old.values == 1 and np.isnan(old.interval_ms) and np.isnan(old.delay_ms)
    assert _rate(np.zeros(0, np.int64), np.zeros(0, np.int64), 0.0).values == 0


@pytest.mark.parametrize(("counts", "rows", "mark"), [
    ({"lost": 0, "gaps": 1, "delivered": 1000}, 500, Mark.OK),
    ({"lost": 3, "gaps": 1, "delivered": 1000}, 500, Mark.WARNING),
    ({"lost": 0, "gaps": 2, "delivered": 1000}, 500, Mark.WARNING),
    ({"lost": 0, "gaps": 1, "late": 100, "delivered": 1000}, 500, Mark.WARNING),
    ({"lost": 0, "gaps": 0, "delivered": 0}, 0, Mark.PROBLEM),
])
def test_lost_late_and_missing_rows_are_told(counts: dict[str, int], rows: int, mark: Mark) -> None:
    told = Examined()
    _rows(told, "group g", group(), counts, rows, 5.0)
    assert told.diagnoses[0].mark is mark


def test_a_finding_of_check_and_a_diagnosis_of_doctor_say_the_same() -> None:
    finding = Finding("groups.g.tags.a", "the tag is text", "give it 'kind: state'")
    one = diagnosis_of(finding)
    assert (one.where, one.found, one.fix, one.mark) == (finding.where, finding.problem, finding.fix, Mark.PROBLEM)
    assert finding_of(one) == Finding("groups.g.tags.a", "node: the tag is text", "give it 'kind: state'")
    assert diagnosis_of(Finding("a", "b", "c", error=False)).mark is Mark.WARNING


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0 us"), (1.5e-4, "150 us"), (-0.0123, "12.3 ms"), (5, "5 s"), (90, "1.5 min"), (-7200, "2 h"),
])
def test_an_interval_is_told_as_a_person_reads_it(seconds: float, text: str) -> None:
    assert interval(seconds) == text
