"""The press makes one part after the other, the same however a row was asked for, and a fault does what it says."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from sim_server.cli import main
from sim_server.config import parse_config
from sim_server.plant import Plant
from sim_server.processes import CYCLIC, MODELS, Fault, ProcessError, make, model
from sim_server.processes.press import DOWN, PAUSE_S, RELEASED, STROKE_S, UP, draw, forming_force, ram_position

POSITION, FORCE, TEMPERATURE, CYCLE, IN_CYCLE = range(5)
SENSORS = {"hold_position": POSITION, "hold_force": FORCE, "hold_temperature": TEMPERATURE}


def strokes(rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each whole stroke with its pause."""
    at = np.flatnonzero(np.diff(rows[:, CYCLE]) > 0) + 1
    return np.split(rows, at)[1:-1]


def test_the_press_is_known_beside_the_continuous_processes() -> None:
    assert model("press") is CYCLIC["press"] and "press" not in MODELS
    assert [tag.name for tag in model("press").measured] == ["position", "force", "temperature", "cycle", "in_cycle"]
    assert parse_config({"process": "press", "faults": [
        {"parameter": "wear", "factor": 1.3, "from": 1, "to": 2}]}).process == "press"
    with pytest.raises(ProcessError, match="lorenz, throttle, press"):
        model("pump")


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_batch_and_step_give_identical_bits(noise: float) -> None:
    faults = [Fault("wear", 1.3, 100, 300), Fault("stroke", 1.2, 250, 500), Fault("hold_force", 2.0, 400, 450)]
    whole, single, chunked = (make("press", seed=4, noise=noise) for _ in range(3))
    block = whole.simulate_block(800, faults)
    changes = {100: [("wear", 1.3)], 250: [("stroke", 1.2)], 300: [("wear", 1.0)], 400: [("hold_force", 2.0)],
               450: [("hold_force", 1.0)], 500: [("stroke", 1.0)]}
    rows, labels = [], []
    for k in range(800):
        for change in changes.get(k, []):
            single.set_factor(*change)
        rows.append(single.step())
        labels.append(single.faulty)
    assert (block.measured == np.array(rows)).all() and (block.labels == labels).all()
    assert (whole.state == single.state).all()
    healthy = np.concatenate([chunked.simulate(n) for n in (1, 0, 66, 33)])
    assert (healthy == block.measured[:100]).all()


def test_strokes_and_pauses_vary_a_little_and_are_counted_one_by_one() -> None:
    rows = make("press", seed=7).simulate(60_000)
    parts = strokes(rows)
    assert len(parts) > 350
    assert [part[0, CYCLE] for part in parts] == list(range(2, 2 + len(parts)))
    stroke_s = np.array([part[:, IN_CYCLE].sum() for part in parts]) * 0.01
    pause_s = np.array([(part[:, IN_CYCLE] == 0).sum() for part in parts]) * 0.01
    assert abs(stroke_s.mean() - STROKE_S) < 0.02 and stroke_s.min() / STROKE_S > 0.97
    assert stroke_s.max() / STROKE_S < 1.04 and len(np.unique(stroke_s)) > 3
    assert pause_s.min() >= PAUSE_S[0] - 0.01 and pause_s.max() <= PAUSE_S[1] + 0.03 and pause_s.std() > 0.05
    for part in parts[:20]:
        assert part[0, POSITION] == 100.0 and part[:, POSITION].min() == 0.0
        assert (np.diff(part[:, IN_CYCLE]) <= 0).all()  # one pause, after the stroke
        assert 38.0 < part[:, FORCE].max() < 42.0
        assert part[part[:, IN_CYCLE] == 0][:, [POSITION, FORCE]].tolist() == [[100.0, 0.0]] * int(
            (part[:, IN_CYCLE] == 0).sum())
    peaks = np.array([part[:, FORCE].max() for part in parts])
    assert 0.1 < peaks.std() < 1.0


def test_the_curves_of_a_stroke_join_without_a_jump() -> None:
    for border in (DOWN, UP, 1.0):
        assert ram_position(border - 1e-9) == pytest.approx(ram_position(border), abs=1e-5)
    for border in (DOWN, UP, RELEASED):
        assert forming_force(border - 1e-9, 1.0) == pytest.approx(forming_force(border, 1.0), abs=1e-5)
    assert forming_force(0.2, 1.0) == 0.0 == forming_force(0.9, 1.0)


def test_the_random_numbers_of_parts_are_even_and_independent() -> None:
    u = np.array([[draw(12345.0, float(part), which) for which in range(5)] for part in range(4000)])
    assert ((u >= 0) & (u < 1)).all()
    assert u.mean(axis=0) == pytest.approx(np.full(5, 0.5), abs=0.02)
    assert u.std(axis=0) == pytest.approx(np.full(5, 12 ** -0.5), abs=0.01)
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.06
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.06


def test_stated_standard_deviations_and_ranges_are_those_of_a_long_healthy_run() -> None:
    rows = make("press", seed=11).simulate(300_000)[1000:]
    measured = model("press").measured
    assert rows[:, :3].std(axis=0) == pytest.approx([tag.healthy_std for tag in measured[:3]], rel=0.03)
    assert (rows.min(axis=0) >= [tag.eu_low for tag in measured]).all()
    assert (rows.max(axis=0) <= [tag.eu_high for tag in measured]).all()
    noise = make("press", seed=11, noise=0.1).simulate(2000) - make("press", seed=11).simulate(2000)
    assert (noise[:, CYCLE:] == 0).all() and (noise[:, :3].std(axis=0) > 0).all()  # a counter has no noise


def test_every_factor_of_the_stated_range_stays_bounded_and_names_tags() -> None:
    names = {tag.name for tag in model("press").measured}
    for one in model("press").parameters:
        assert one.touches and set(one.touches) <= names
        for factor in (one.factor_low, one.factor_high):
            plant = make("press", seed=1)
            plant.set_factor(one.name, factor)
            rows = plant.simulate(5000)
            assert np.isfinite(rows).all() and (np.abs(rows[:, :3]) < 250).all(), (one.name, factor)


def test_each_fault_does_what_it_says() -> None:
    def last_parts(parameter: str, factor: float) -> list[np.ndarray]:
        block = make("press", seed=2).simulate_block(6000, [Fault(parameter, factor, 1500, 6000)])
        return strokes(block.measured[2000:])

    healthy = strokes(make("press", seed=2).simulate(6000)[2000:])
    phase = np.arange(60) / 120
    forming = slice(40, 76)  # rows of the stroke with force on the blank
    worn = last_parts("wear", 1.3)
    assert np.allclose([p[:, POSITION].min() for p in worn], 0.0) and len(worn) == len(healthy)
    ratio = np.mean([p[forming, FORCE].sum() for p in worn]) / np.mean([p[forming, FORCE].sum() for p in healthy])
    assert ratio == pytest.approx(1.3, abs=0.03)
    assert worn[0][20, FORCE] == healthy[0][20, FORCE] and phase[20] < DOWN  # not before the blank is touched
    assert np.mean([len(p) for p in last_parts("stroke", 1.2)]) - np.mean([len(p) for p in healthy]) == pytest.approx(
        24, abs=2)
    assert max(p[:, FORCE].max() for p in last_parts("blank", 0.01)) < 2.0
    assert last_parts("cooling", 0.8)[-1][:, TEMPERATURE].mean() > healthy[-1][:, TEMPERATURE].mean() + 2.0
    still = make("press", seed=2).simulate_block(6000, [Fault("stroke", 1000.0, 1500, 6000)]).measured
    assert len(np.unique(still[1600:, CYCLE])) == 1


@pytest.mark.parametrize("fault", SENSORS)
def test_a_held_sensor_repeats_its_last_value_and_the_press_goes_on(fault: str) -> None:
    block = make("press", seed=2).simulate_block(1000, [Fault(fault, 2.0, 350, 800)])
    clean = make("press", seed=2).simulate(1000)
    held = SENSORS[fault]
    assert (block.measured[350:800, held] == clean[349, held]).all()
    others = [c for c in range(5) if c != held]
    assert (block.measured[:, others] == clean[:, others]).all()
    assert (block.measured[800:] == clean[800:]).all()
    assert block.labels.sum() == 450


def test_rows_of_the_plant_and_the_csv_have_the_counter_and_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    plant, stepped = Plant(make("press", seed=3)), Plant(make("press", seed=3))
    rows = plant.rows(400).values
    assert (rows == np.array([stepped.step() for _ in range(400)])).all()
    assert main(["csv", "--process", "press", "--rows", "400", "--seed", "3", "--out", "-"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["cycle"]) for row in table] == rows[:, CYCLE].tolist()
    assert {row["in_cycle"] for row in table} == {"0", "1"}
