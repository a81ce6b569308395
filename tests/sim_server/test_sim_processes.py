"""The processes are the published ones, and a row is the same however it was asked for."""

from __future__ import annotations

import gzip
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest

from sim_server.processes import MODELS, SCHEDULES, Fault, ProcessError, make, model, run_schedule
from sim_server.processes.lorenz import lorenz_rows
from sim_server.processes.throttle import throttle_rows

SHARED = Path(os.environ.get("OPCUA_DETECTOR_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
BOTH = sorted(MODELS)


def nominal(name: str) -> np.ndarray:
    return np.array([one.nominal for one in model(name).parameters])


def test_lorenz_predicts_every_published_row_from_the_row_before() -> None:
    file = SHARED / "lorenz" / "df_train.csv.gz"
    if not file.is_file():
        pytest.skip("needs the shared data folder")
    with gzip.open(file) as lines:
        published = np.loadtxt(lines, delimiter=",", skiprows=1)[:, 1:]
    assert published.shape == (20_001, 3)
    worst = 0.0
    row, no_setpoint, parameters = np.empty((1, 2)), np.zeros(1), nominal("lorenz")
    for before, after in itertools.pairwise(published):
        state = before.copy()
        lorenz_rows(state, parameters, no_setpoint, row)
        assert (row[0] == before[[0, 2]]).all()
        worst = max(worst, float(np.abs(state - after).max()))
    assert worst < 1e-12


def test_throttle_starts_as_published() -> None:
    plant = make("throttle", seed=5)
    assert (plant.state == 0.0).all()
    for _ in range(4):
        plant.step()
    assert plant.setpoint == math.pi / 6
    theta, speed, current = plant.state
    row = plant.step()
    assert row[0] == theta
    assert (theta, speed, current, row[1]) == pytest.approx(
        (0.019925, 0.709796, 9.397869, -18.156752), rel=5e-4
    )


def throttle_slopes(state: np.ndarray, r: float, p: dict[str, float]) -> tuple[np.ndarray, float]:
    """The design's equations as they stand; the control law knows nominal parameters only."""
    n = {one.name: one.nominal for one in model("throttle").parameters}
    x1, x2, x3 = state
    gear, th0 = 4.0, -math.pi / 2
    a2 = (-n["Ksp"] * (x1 - th0) - n["Kf"] * x2 + gear * n["Kt"] * x3 - n["P0"] * math.cos(x1) ** 2) / n["J"]
    jerk = -889 * (x1 - r) - 281.5 * x2 - 20.75 * a2
    v = (n["J"] * jerk + n["Ksp"] * x2 + n["Kf"] * a2 - n["P0"] * math.sin(2 * x1) * x2) / (gear * n["Kt"])
    u = -(n["La"] * v + n["Ra"] * x3 + gear * n["Kb"] * x2)
    d2 = (-p["Ksp"] * (x1 - th0) - p["Kf"] * x2 + gear * p["Kt"] * x3 - p["P0"] * math.cos(x1) ** 2) / p["J"]
    d3 = (-gear * p["Kb"] * x2 - p["Ra"] * x3 - u) / p["La"]
    return np.array([x2, d2, d3]), u


@pytest.mark.parametrize("fault", [None, "Kb", "Kt", "La", "Ksp", "J"])
def test_throttle_kernel_is_rk4_of_the_equations(fault: str | None) -> None:
    parameters = nominal("throttle")
    names = [one.name for one in model("throttle").parameters]
    if fault is not None:
        parameters[names.index(fault)] *= 1.3
    p = dict(zip(names, parameters, strict=True))
    h, r = 0.02, 0.4
    state, rows = np.array([0.1, -0.5, 4.0]), np.empty((50, 2))
    expected = state.copy()
    throttle_rows(state, parameters, np.full(50, r), rows)
    for k in range(50):
        k1, u = throttle_slopes(expected, r, p)
        assert rows[k] == pytest.approx([expected[0], u], rel=1e-9)
        k2, _ = throttle_slopes(expected + h / 2 * k1, r, p)
        k3, _ = throttle_slopes(expected + h / 2 * k2, r, p)
        k4, _ = throttle_slopes(expected + h * k3, r, p)
        expected = expected + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert state == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_batch_and_step_give_identical_bits(name: str, noise: float) -> None:
    first, second = model(name).parameters[:2]
    faults = [
        Fault(first.name, 1.2, 150, 420),
        Fault(second.name, 0.9, 300, 900),
        Fault(first.name, 1.1, 420, 500),
    ]
    whole, single, chunked = (make(name, seed=7, noise=noise) for _ in range(3))
    block = whole.simulate_block(800, faults)
    changes = {
        150: (first.name, 1.2),
        300: (second.name, 0.9),
        420: (first.name, 1.1),
        500: (first.name, 1.0),
    }
    rows, setpoints, labels = [], [], []
    for k in range(800):
        if k in changes:
            single.set_factor(*changes[k])
        rows.append(single.step())
        setpoints.append(single.setpoint)
        labels.append(single.faulty)
    assert (block.measured == np.array(rows)).all()
    assert (block.setpoints[:, 0] == setpoints).all()
    assert (block.labels == labels).all()
    assert (whole.state == single.state).all()
    # the second fault is still in force, because its end lies beyond the batch
    assert whole.factors == single.factors
    assert whole.factors[second.name] == 0.9
    healthy = make(name, seed=7, noise=noise).simulate(150)
    assert (block.measured[:150] == healthy).all()
    parts = [chunked.simulate(n) for n in (1, 99, 0, 50)]
    assert (np.concatenate(parts) == healthy).all()


@pytest.mark.parametrize("name", BOTH)
def test_a_fault_keeps_the_state_and_healing_restores_the_nominal_law(name: str) -> None:
    one = model(name).parameters[0].name
    healthy, faulty = make(name, seed=2), make(name, seed=2)
    healthy.simulate(500)
    faulty.simulate(500)
    faulty.set_factor(one, 1.3)
    assert (healthy.state == faulty.state).all()
    assert (healthy.simulate(1) == faulty.simulate(1)).any()
    assert not (healthy.simulate(50) == faulty.simulate(50)).all()
    place = [p.name for p in model(name).parameters].index(one)
    faulty.set_factor(one, 1.1)
    assert faulty._effective[place] == nominal(name)[place] * 1.1, "factors replace each other"
    faulty.set_factor(one, 1.0)
    assert not faulty.faulty
    assert (faulty._effective == nominal(name)).all()
    faulty.set_factor(one, 1.2)
    faulty.clear_factors()
    assert not faulty.faulty
    assert (faulty._effective == nominal(name)).all()


@pytest.mark.parametrize("name", BOTH)
def test_noise_is_white_of_the_stated_size_and_leaves_the_trajectory_alone(name: str) -> None:
    clean, noisy = make(name, seed=3).simulate(50_000), make(name, seed=3, noise=0.01).simulate(50_000)
    noise = noisy - clean
    stated = 0.01 * np.array([tag.healthy_std for tag in model(name).measured])
    assert noise.std(axis=0) == pytest.approx(stated, rel=0.02)
    assert np.abs(noise.mean(axis=0)).max() < 4 * stated.max() / math.sqrt(50_000)
    lag = (noise[1:] * noise[:-1]).mean(axis=0) / noise.var(axis=0)
    assert np.abs(lag).max() < 0.02
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.02


@pytest.mark.parametrize("name", BOTH)
def test_stated_standard_deviations_and_ranges_are_those_of_a_long_healthy_run(name: str) -> None:
    rows = make(name, seed=11).simulate(1_000_000)[1000:]
    measured = model(name).measured
    assert rows.std(axis=0) == pytest.approx([tag.healthy_std for tag in measured], rel=0.02)
    assert (rows.min(axis=0) > [tag.eu_low for tag in measured]).all()
    assert (rows.max(axis=0) < [tag.eu_high for tag in measured]).all()


@pytest.mark.parametrize("name", BOTH)
def test_every_factor_of_the_stated_range_stays_bounded(name: str) -> None:
    for one in model(name).parameters:
        for factor in (one.factor_low, one.factor_high):
            plant = make(name, seed=1)
            plant.simulate(1000)
            plant.set_factor(one.name, factor)
            limit = 12 * np.array([tag.healthy_std for tag in model(name).measured])
            assert (np.abs(plant.simulate(50_000)) < limit + 20).all(), (one.name, factor)


@pytest.mark.parametrize("name", BOTH)
def test_every_fault_names_measured_tags(name: str) -> None:
    measured = {tag.name for tag in model(name).measured}
    for one in model(name).parameters:
        assert one.touches
        assert set(one.touches) <= measured
    assert model("lorenz").parameter("rho").touches == ("x1",)
    assert model("throttle").parameter("La").touches == ("theta", "u")


def test_reference_of_the_throttle_holds_for_100_rows_within_60_degrees() -> None:
    r = make("throttle", seed=4).simulate_block(20_000).setpoints[:, 0].reshape(200, 100)
    assert (r == r[:, :1]).all()
    assert (r[0] == math.pi / 6).all()
    assert np.unique(r[:, 0]).size == 200
    assert np.abs(r).max() <= math.pi / 3
    assert np.abs(r).max() > 0.95 * math.pi / 3


def test_setpoint_of_lorenz_steps_rarely_and_acts_on_nothing() -> None:
    block = make("lorenz", seed=4).simulate_block(60_000)
    assert set(np.unique(block.setpoints)) == {40.0, 50.0, 60.0}
    assert np.count_nonzero(np.diff(block.setpoints[:, 0])) <= 9


@pytest.mark.parametrize("name", BOTH)
def test_schedule_has_the_published_blocks(name: str) -> None:
    run = run_schedule(name, seed=9, block_rows=2001)
    assert run.measured.shape == (6 * 2001, 2)
    assert (np.bincount(run.block) == 2001).all()
    assert SCHEDULES[name].block_rows == {"lorenz": 20_001, "throttle": 180_001}[name]
    faulty = [name for name, parameter, _ in SCHEDULES[name].blocks if parameter is not None]
    for i, block in enumerate(run.names):
        of = run.block == i
        assert (run.labels[of] == (block in faulty)).all()
        start = run.measured[of][0]
        # a small random state, at rest for the throttle
        assert abs(start[0]) <= 0.2
    starts = run.measured[::2001, 0]
    assert np.unique(starts).size == (6 if name == "lorenz" else 1)
    again = run_schedule(name, seed=9, block_rows=2001)
    assert (run.measured == again.measured).all()
    assert not (run.measured == run_schedule(name, seed=10, block_rows=2001).measured).all()


def test_published_factors() -> None:
    factors = {(p, f) for schedule in SCHEDULES.values() for _, p, f in schedule.blocks if p}
    assert factors == {
        ("sigma", 2 / 3),
        ("rho", 26 / 28),
        ("beta", 1.25),
        ("Kb", 1.3),
        ("Kt", 1.3),
        ("La", 1.3),
    }


@pytest.mark.parametrize("name", BOTH)
def test_bad_arguments_say_what_was_expected(name: str) -> None:
    plant = make(name)
    one = model(name).parameters[0].name
    cases = [
        (lambda: make("pump"), "name"),
        (lambda: make(name, noise=-1.0), "noise"),
        (lambda: make(name, noise=math.nan), "noise"),
        (lambda: plant.simulate(-1), "n"),
        (lambda: plant.set_factor("gamma", 1.1), "parameter"),
        (lambda: plant.set_factor(one, 50.0), "factor"),
        (lambda: plant.set_factor(one, math.nan), "factor"),
        (lambda: plant.simulate(10, [Fault(one, 1.1, 11, 12)]), "faults"),
        (lambda: plant.simulate(10, [Fault(one, 1.1, 5, 4)]), "faults"),
        (lambda: plant.simulate(10, [Fault(one, 1.1, 0, 6), Fault(one, 1.2, 5, 8)]), "faults"),
        (lambda: run_schedule(name, block_rows=0), "block_rows"),
        (lambda: run_schedule("pump"), "name"),
    ]
    for call, key in cases:
        with pytest.raises(ProcessError) as caught:
            call()
        assert caught.value.key == key
        assert caught.value.expected in str(caught.value)
    assert plant.row == 0, "a refused call must not advance the process"
