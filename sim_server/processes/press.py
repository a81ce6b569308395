"""A servo press: a cyclic process that makes one part after the other, with a pause between two strokes.

A stroke goes down, forms the blank, dwells at the bottom and goes up again.  Strokes and pauses are of slightly
different length, blanks of slightly different strength.  `cycle` counts the strokes, `in_cycle` is true during one.
Forming heats the tool, whose body follows the hall's temperature.  Not identified from a real press: the orders of
magnitude are those of a small one.
"""

from __future__ import annotations

import math
from typing import Final

import numba
import numpy as np

from sim_server.processes.base import FloatArray, Parameter, ProcessModel, TagSpec

STEP_S: Final = 0.01

STROKE_S: Final = 1.2
STROKE_SPREAD: Final = 0.02
PAUSE_S: Final = (0.15, 0.45)
TOP_MM: Final = 100.0
CONTACT_MM: Final = 20.0
FORMING_KN: Final = 40.0
FRICTION_KN: Final = 1.2
STRENGTH_SPREAD: Final = 0.02
DOWN: Final = 0.45
UP: Final = 0.60
RELEASED: Final = 0.65
"""Phases of the stroke: at the bottom from `DOWN` on, going up from `UP` on, without force from `RELEASED` on."""

COOLANT_C: Final = 25.0
TOOL_RISE_K: Final = 20.0
HALL_SWING_K: Final = 1.0
HALL_PERIOD_S: Final = 100.0
BODY_S: Final = 20.0
FLASH_S: Final = 0.5
FLASH_K_PER_S: Final = 6.0

# layout of the state
_PART, _PHASE, _PAUSED, _BODY, _FLASH, _ROW, _SEED, _HELD = 0, 1, 2, 3, 4, 5, 6, 7


@numba.njit("float64(float64, float64, int64)", cache=True)
def draw(seed: float, part: float, which: int) -> float:
    """Return a number of 0 .. 1 that depends on its arguments alone, so that a part is the same however it is run.

    Notes
    -----
    The finaliser of splitmix64 (Steele, Lea, Flood 2014), applied to a mix of seed, part and purpose.
    """
    z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    z ^= np.uint64(part) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(which) * np.uint64(0x94D049BB133111EB)
    for _ in range(2):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@numba.njit("float64(float64)", cache=True)
def ram_position(phase: float) -> float:
    """Return the height of the ram over the bottom, mm, at a phase of the stroke (0 .. 1; beyond: at the top)."""
    if phase < DOWN:
        return TOP_MM * 0.5 * (1.0 + math.cos(math.pi * phase / DOWN))
    if phase < UP:
        return 0.0
    if phase < 1.0:
        return TOP_MM * 0.5 * (1.0 - math.cos(math.pi * (phase - UP) / (1.0 - UP)))
    return TOP_MM


@numba.njit("float64(float64, float64)", cache=True)
def forming_force(phase: float, strength: float) -> float:
    """Return the force on the blank, kN: rises from contact to the bottom, relaxes in the dwell, is released."""
    if phase < DOWN:
        depth = max(0.0, 1.0 - ram_position(phase) / CONTACT_MM)
        return strength * FORMING_KN * depth**1.5
    if phase < UP:
        return strength * FORMING_KN * (1.0 - 0.1 * (phase - DOWN) / (UP - DOWN))
    if phase < RELEASED:
        return strength * FORMING_KN * 0.9 * (RELEASED - phase) / (RELEASED - UP)
    return 0.0


@numba.njit("void(float64[::1], float64[::1], float64[::1], float64[:, ::1])", cache=True)
def press_rows(state: FloatArray, parameters: FloatArray, setpoint: FloatArray, rows: FloatArray) -> None:
    """Write the rows (position, force, temperature, cycle, in_cycle) and leave the state at the next one.

    Parameters
    ----------
    state
        float64[10]: strokes before this one, phase of the stroke (0 .. 1, 1 in the pause), seconds in the pause,
        temperature of the tool's body and of its surface above that (degC, K), row, seed, and what the three sensors
        last gave; changed in place.
    parameters
        float64[8]: tool wear, stroke time s, blank, friction kN, cooling, and the switches that hold the sensors of
        position, force and temperature (1 is free).
    setpoint
        float64[n], without effect on this process; its length says how many rows.
    rows
        float64[n, 5], written.
    """
    wear, stroke_s, blank = parameters[0], parameters[1], parameters[2]
    friction, cooling = parameters[3], parameters[4]
    for k in range(setpoint.size):
        part, phase, seed = state[_PART], state[_PHASE], state[_SEED]
        strength = 1.0 + STRENGTH_SPREAD * (draw(seed, part, 0) + draw(seed, part, 1) - 1.0)
        stroke = stroke_s * (1.0 + STROKE_SPREAD * (draw(seed, part, 2) + draw(seed, part, 3) - 1.0))
        speed = 0.0
        if phase < DOWN:
            speed = math.sin(math.pi * phase / DOWN)
        elif UP <= phase < 1.0:
            speed = math.sin(math.pi * (phase - UP) / (1.0 - UP))
        force = forming_force(phase, strength * blank * wear) + friction * speed
        rows[k, 0] = ram_position(phase)
        rows[k, 1] = force
        rows[k, 2] = state[_BODY] + state[_FLASH]
        rows[k, 3] = part + 1.0
        rows[k, 4] = 1.0 if phase < 1.0 else 0.0
        for i in range(3):
            if parameters[5 + i] != 1.0:
                rows[k, i] = state[_HELD + i]
            state[_HELD + i] = rows[k, i]
        hall = HALL_SWING_K * math.sin(2.0 * math.pi * state[_ROW] * STEP_S / HALL_PERIOD_S)
        target = COOLANT_C + TOOL_RISE_K / cooling + hall
        state[_BODY] += STEP_S / BODY_S * (target - state[_BODY])
        state[_FLASH] += STEP_S * (FLASH_K_PER_S * force / FORMING_KN - state[_FLASH] / FLASH_S)
        state[_ROW] += 1.0
        if phase < 1.0:
            state[_PHASE] = min(phase + STEP_S / stroke, 1.0)
            state[_PAUSED] = 0.0
        else:
            state[_PAUSED] += STEP_S
            if state[_PAUSED] > PAUSE_S[0] + (PAUSE_S[1] - PAUSE_S[0]) * draw(seed, part, 4):
                state[_PART] += 1.0
                state[_PHASE] = 0.0


def _start_state(rng: np.random.Generator) -> FloatArray:
    """Return a warm press at the top of its first stroke."""
    warm = COOLANT_C + TOOL_RISE_K
    return np.array([0.0, 0.0, 0.0, warm, 1.0, 0.0, float(rng.integers(1, 2**50)), TOP_MM, 0.0, warm + 1.0])


def _draw_setpoint(rng: np.random.Generator) -> float:
    return float(rng.choice((50.0, 60.0, 70.0)))


PRESS: Final = ProcessModel(
    name="press",
    period_ns=10_000_000,
    measured=(
        TagSpec("position", "mm", "MMT", -5.0, 120.0, "measured", "Height of the ram over the bottom", 40.5),
        TagSpec("force", "kN", "B47", -5.0, 100.0, "measured", "Force of the ram", 14.1),
        TagSpec("temperature", "degC", "CEL", 0.0, 150.0, "measured", "Surface temperature of the tool", 0.574),
        TagSpec("cycle", "1", "C62", 0.0, 1e9, "counter", "Number of the stroke"),
        TagSpec("in_cycle", "", "C62", 0.0, 1.0, "state", "1 during a stroke, 0 in the pause after it"),
    ),
    setpoints=(TagSpec("order", "1", "C62", 0.0, 100.0, "setpoint", "Parts ordered; steps rarely, acts on nothing"),),
    parameters=(
        Parameter("wear", 1.0, ("force",), 0.5, 2.0, "Worn tool: force of forming"),
        Parameter("stroke", STROKE_S, ("position", "cycle"), 0.5, 1000.0,
                  "Time of a stroke, s: slow cycle; 1000 is a standstill"),
        Parameter("blank", 1.0, ("force",), 0.01, 1.5, "Resistance of the blank; 0.01 is no part in the press"),
        Parameter("friction", FRICTION_KN, ("force",), 0.2, 10.0, "Friction of the guides, kN"),
        Parameter("cooling", 1.0, ("temperature",), 0.4, 3.0, "Cooling of the tool"),
        Parameter("hold_position", 1.0, ("position",), 0.5, 2.0, "Any factor but 1: the sensor repeats its last value"),
        Parameter("hold_force", 1.0, ("force",), 0.5, 2.0, "Any factor but 1: the sensor repeats its last value"),
        Parameter("hold_temperature", 1.0, ("temperature",), 0.5, 2.0,
                  "Any factor but 1: the sensor repeats its last value"),
    ),
    setpoint_hold_rows=6000,
    first_setpoint=50.0,
    start_state=_start_state,
    draw_setpoint=_draw_setpoint,
    kernel=press_rows,
)
