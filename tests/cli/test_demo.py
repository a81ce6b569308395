"""The demonstration keeps its promise, tells what it saw as JSON, and fails aloud when it does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from running import cli

from opcua_detector.cli import demo
from opcua_detector.client.observer import Observer

FIELDS = (
    "process", "detectors", "rows_fitted", "fit_s", "samples_scored", "lost_samples", "superseded_writes", "fault",
    "fault_at_s", "detected", "delay_s", "false_alarms_before_fault", "score_healthy_p99", "score_fault_p50",
    "top_tag", "explanation", "readback_ok", "alarm_cleared", "latency_ms", "scoring_us",
)
Started = dict[str, "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def demos() -> Iterator[Started]:
    """Both demonstrations at once, as processes of their own."""
    options = {"lorenz": ["--fault", "sigma", "--seconds", "30"], "throttle": ["--fault", "none", "--seconds", "20"]}
    started = {name: subprocess.Popen(
        [sys.executable, "-m", "opcua_detector", "demo", "--process", name, *more, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name, more in options.items()}
    yield started
    for child in started.values():
        if child.poll() is None:
            child.kill()
        child.communicate()


def ended(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a demonstration that must succeed and return what it told."""
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert len(out.splitlines()) == 1 and "Traceback" not in err
    told: dict[str, Any] = json.loads(out)
    assert set(FIELDS) <= set(told)
    assert told["rows_fitted"] >= 20_000 and len(told["detectors"]) >= 2
    assert told["samples_scored"] > 500 and told["false_alarms_before_fault"] == 0
    assert told["readback_ok"] is True and told["readbacks"] > 5
    assert 0 <= told["score_healthy_p99"] < 1.0
    for part, ceiling in (("latency_ms", 60_000.0), ("scoring_us", 60e6)):
        assert 0 < told[part]["p50"] <= told[part]["p99"] < ceiling
    return told


def test_a_healthy_throttle_raises_nothing(demos: Started) -> None:
    told = ended(demos["throttle"])
    assert told["process"] == "throttle" and told["fault"] == "none" and told["detected"] is False
    for name in ("fault_at_s", "delay_s", "score_fault_p50", "top_tag", "alarm_cleared"):
        assert told[name] is None, name


def test_a_lorenz_fault_is_detected_explained_read_back_and_cleared(demos: Started) -> None:
    told = ended(demos["lorenz"])
    assert told["process"] == "lorenz" and told["fault"] == "sigma" and told["detected"] is True
    assert 5 < told["fault_at_s"] < 30 and 0 < told["delay_s"] < 15
    assert told["score_fault_p50"] > told["score_healthy_p99"]
    assert told["top_tag"] in ("x1", "x3") and told["explanation"] and told["alarm_cleared"] is True
    assert set(told["excluded"]) == {"total", "clock", "constant"}


@pytest.mark.parametrize(("arguments", "says"), [
    (("--process", "reactor"), ("--process", "'reactor'", "lorenz or throttle")),
    (("--process", "throttle", "--fault", "sigma"), ("--fault", "'sigma'", "Kb, Kt, La, none")),
    (("--seconds", "3"), ("--seconds", "greater than or equal to 15")),
])
def test_a_process_or_fault_that_is_not_there_is_wrong_usage(arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    ran = cli("demo", *arguments, "--json")
    assert ran.code == 2
    assert all(text in ran.err for text in says), ran.err
    assert ran.json["error"]["exit_code"] == 2


def test_a_promise_that_does_not_hold_exits_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.HISTORY_ROWS, "throttle", 6000)  # fewer rows than the demonstration promises
    acts = demo.Show._acts

    async def brief(show: demo.Show, observer: Observer) -> None:
        show.seconds = 4.0
        await acts(show, observer)

    monkeypatch.setattr(demo.Show, "_acts", brief)
    ran = cli("demo", "--process", "throttle", "--fault", "none", "--seconds", "15", "--json")
    assert ran.code == 9, ran.err
    assert "not as promised: only 60" in ran.err and ran.json["rows_fitted"] < 20_000


READY = {"faults": {"sigma": {"factor": 0.67, "touches": ["x1"]}}}
GOOD = {"rows_fitted": 120_000, "detectors": ["transition", "onnx"], "samples_scored": 1000, "detected": True,
        "false_alarms_before_fault": 0, "readback_ok": True, "top_tag": "x1", "alarm_cleared": True,
        "explanation": "x1 is high"}


def test_a_demonstration_in_which_all_held_has_no_problem() -> None:
    assert demo.Show("lorenz", "sigma", READY, 20.0).problems(GOOD) == []
    nothing = GOOD | {"detected": False, "top_tag": None, "alarm_cleared": None, "explanation": None}
    assert demo.Show("lorenz", "none", READY, 20.0).problems(nothing) == []


@pytest.mark.parametrize(("changed", "says"), [
    ({"rows_fitted": 19_999}, "only 19999 rows"), ({"detectors": ["transition"]}, "fewer than two methods"),
    ({"samples_scored": 0}, "no sample was scored"), ({"false_alarms_before_fault": 2}, "2 false alarms"),
    ({"readback_ok": False}, "read back"), ({"detected": False}, "the fault was not detected"),
    ({"top_tag": "x3"}, "top tag x3 is not touched"), ({"alarm_cleared": False}, "did not clear"),
    ({"explanation": None}, "no explanation"),
])
def test_each_promise_of_the_demonstration_is_checked(changed: dict[str, Any], says: str) -> None:
    (problem,) = demo.Show("lorenz", "sigma", READY, 20.0).problems(GOOD | changed)
    assert says in problem


def test_a_false_alarm_without_a_fault_is_a_problem() -> None:
    show = demo.Show("lorenz", "none", READY, 20.0)
    assert show.problems(GOOD | {"false_alarms_before_fault": 1}) == ["1 false alarms while healthy"]
