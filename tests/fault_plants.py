"""Plants with single-sensor faults: a linear pump and heater loop of ten tags, and the two simulated processes.

A fault changes what one sensor tells from a row on and nothing else: the process itself stays healthy, so the tag to
be named is known without doubt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from opcua_detector import detector
from opcua_detector.api import Float64, Tag
from opcua_detector.detector import Detector
from sim_server.processes import make

KINDS = ("bias", "stuck", "noise", "gain", "lag")
NONLINEAR_KINDS = ("bias", "stuck", "noise", "gain")
NOISE = 0.03  # of each tag's own standard deviation
SETTLING = 1000

LOOP = (
    Tag("pump speed", unit="rpm"), Tag("flow", unit="l/min"), Tag("pressure", unit="bar"), Tag("power", unit="kW"),
    Tag("level", unit="m"), Tag("outflow", unit="l/min"), Tag("inlet temperature", unit="degC"),
    Tag("outlet temperature", unit="degC"), Tag("cooling valve", unit="%"), Tag("vibration", unit="mm/s"),
)
_UNITS = np.array([120.0, 2.0, 0.4, 1.5, 0.3, 1.8, 1.5, 3.0, 9.0, 0.5])  # per unit of the equations
_POINT = np.array([1450.0, 14.0, 4.2, 11.0, 2.0, 13.5, 18.0, 62.0, 45.0, 3.5])  # of operation


@dataclass(frozen=True)
class Plant:
    """How to make rows of a plant, and its faults.

    rows : healthy ones to learn from; before, lasting : rows before a fault and of it; lag : rows, of the fault "lag"
    """

    name: str
    tags: tuple[Tag, ...]
    period_s: float
    rows: int
    before: int
    lasting: int
    lag: int
    noise: float

    def healthy(self, n: int, seed: int) -> Float64:
        """Return float64[n, n_tags]; the same plant for every seed."""
        if self.name == "loop":
            return loop_rows(n, seed, self.noise)
        return make(self.name, seed=seed, noise=self.noise).simulate(n + SETTLING)[SETTLING:]


LINEAR = Plant("loop", LOOP, 1.0, 8000, 600, 300, 20, NOISE)
LORENZ = Plant("lorenz", (Tag("x1"), Tag("x3")), 0.01, 20_000, 2000, 600, 20, 0.01)
THROTTLE = Plant("throttle", (Tag("theta", unit="rad"), Tag("u", unit="V")), 0.02, 30_000, 2000, 1000, 20, 0.01)


@cache
def fitted(plant: Plant, seed: int = 1) -> Detector:
    """Return a detector on healthy rows of the plant, default settings."""
    return detector.fit(plant.healthy(plant.rows, seed), plant.tags, plant.period_s)


@cache
def usual(plant: Plant) -> tuple[Float64, Float64]:
    """Return mean and standard deviation of each tag, float64[n_tags] each."""
    rows = plant.healthy(8000, 999)
    return rows.mean(axis=0), rows.std(axis=0)


@dataclass(frozen=True)
class FaultyRows:
    """Rows with a fault of one sensor in [start, stop); tag : the guilty one."""

    rows: Float64
    kind: str
    tag: str
    start: int
    stop: int


def faulty(plant: Plant, kind: str, k: int, seed: int) -> FaultyRows:
    """Return rows of the plant whose tag k fails at `before`: what its sensor tells, not what the process does.

    bias: + 1 standard deviation; stuck: stays where it is; noise: + white noise of .5; gain: 1.6 times its distance
    from the operating point; lag: tells what was `lag` rows ago.
    """
    start, stop = plant.before, plant.before + plant.lasting
    rows = plant.healthy(stop, seed)
    x = rows[:, k].copy()
    mean, std = (a[k] for a in usual(plant))
    fails = slice(start, stop)
    x[fails] = {
        "bias": x[fails] + std, "stuck": x[start], "gain": mean + 1.6 * (x[fails] - mean),
        "noise": x[fails] + 0.5 * std * np.random.default_rng([seed, k]).standard_normal(plant.lasting),
        "lag": x[start - plant.lag:stop - plant.lag]}[kind]
    rows[:, k] = x
    return FaultyRows(rows, kind, plant.tags[k].name, start, stop)


def faults(plant: Plant, seeds: range, kinds: tuple[str, ...] = KINDS) -> Iterator[FaultyRows]:
    """Yield each kind of fault of each tag, once a seed."""
    for seed in seeds:
        for kind in kinds:
            for k in range(len(plant.tags)):
                yield faulty(plant, kind, k, seed)


def loop_rows(n: int, seed: int, noise: float = NOISE) -> Float64:
    """Return float64[n, 10]: rows of the loop, one a second.

    A pump (speed by a slow demand, friction of the line) feeds a tank that drains by its level and a draw; what the
    pump's power leaves over warms the flow, a cooling valve follows the outlet temperature by a PI rule, the bearings
    shake with the speed and a disturbance of their own.
    """
    rows = _clean(n, seed)
    return rows + noise * _spread() * np.random.default_rng([seed, 1]).standard_normal(rows.shape)


@cache
def _spread() -> Float64:
    return np.asarray(_clean(8000, 999).std(axis=0))


def _clean(n: int, seed: int) -> Float64:
    rng = np.random.default_rng(seed)
    demand, friction, draw, inlet, shake = (_slow(rng, n + SETTLING, tau) for tau in (60, 90, 70, 120, 40))
    x = np.zeros((n + SETTLING, len(LOOP)))
    speed = flow = level = warm = valve = integral = 0.0
    for t in range(n + SETTLING):
        speed += 0.15 * (demand[t] - speed)
        flow += 0.4 * (0.9 * speed - 0.5 * friction[t] - flow)
        pressure = 0.8 * speed - 0.35 * flow + 0.5 * friction[t]
        power = 0.6 * speed + 0.5 * flow + 0.3 * pressure
        outflow = 0.8 * level + 0.4 * draw[t]
        level += 0.03 * (flow - outflow)
        integral += 0.01 * warm
        warm += 0.06 * (inlet[t] + 0.5 * power - 0.6 * flow - 0.7 * valve - warm)
        valve += 0.2 * (0.8 * warm + 0.5 * integral - valve)
        x[t] = (speed, flow, pressure, power, level, outflow, inlet[t], warm, valve, 0.7 * speed + 0.8 * shake[t])
    return np.asarray(_POINT + _UNITS * x[SETTLING:])


def _slow(rng: np.random.Generator, n: int, tau: float) -> Float64:
    """Return float64[n]: a first-order random walk of standard deviation 1, time constant `tau` rows."""
    a = np.exp(-1.0 / tau)
    steps = np.sqrt(1.0 - a * a) * rng.standard_normal(n)
    out = np.zeros(n)
    for t in range(1, n):
        out[t] = a * out[t - 1] + steps[t]
    return out
