"""The electronic throttle in closed loop, the paper's second test process.

The angle and the voltage are measured, speed and current are not.

Identified from the rows published by M. Alamir and R. Dion (2024); RK4 with h = 0.02 s, the control
law evaluated at each stage, reproduces the published start-up rows to 2e-4.  The controller always
works with the nominal parameters; a fault changes the plant alone.
"""

from __future__ import annotations

import math
from typing import Final

import numba
import numpy as np

from sim_server.processes.base import FloatArray, Parameter, ProcessModel, TagSpec

STEP_S: Final = 0.02

KSP: Final = 0.4316
KF: Final = 0.4834
N_GEAR: Final = 4.0
KT: Final = 0.1045
KB: Final = 0.1051
LA: Final = 0.003
RA: Final = 1.9
TH0: Final = -math.pi / 2
J: Final = 0.216
P0: Final = 0.00287


@numba.njit("float64(float64, float64, float64, float64)", cache=True, inline="always")
def control_voltage(x1: float, x2: float, x3: float, r: float) -> float:
    """Return u, V (reversed sign as in the authors' file): feedback linearisation on nominal parameters."""
    a2 = (-KSP * (x1 - TH0) - KF * x2 + N_GEAR * KT * x3 - P0 * math.cos(x1) ** 2) / J
    jerk = -889.0 * (x1 - r) - 281.5 * x2 - 20.75 * a2
    v = (J * jerk + KSP * x2 + KF * a2 - P0 * math.sin(2.0 * x1) * x2) / (N_GEAR * KT)
    return -(LA * v + RA * x3 + N_GEAR * KB * x2)


@numba.njit(
    "UniTuple(float64, 4)(float64, float64, float64, float64, float64[::1])", cache=True, inline="always"
)
def _slopes(x1: float, x2: float, x3: float, r: float, p: FloatArray) -> tuple[float, float, float, float]:
    u = control_voltage(x1, x2, x3, r)
    d2 = (-p[0] * (x1 - TH0) - p[1] * x2 + N_GEAR * p[2] * x3 - p[7] * math.cos(x1) ** 2) / p[6]
    d3 = (-N_GEAR * p[3] * x2 - p[5] * x3 - u) / p[4]
    return x2, d2, d3, u


@numba.njit("void(float64[::1], float64[::1], float64[::1], float64[:, ::1])", cache=True)
def throttle_rows(state: FloatArray, parameters: FloatArray, setpoint: FloatArray, rows: FloatArray) -> None:
    """Write the rows (theta, u) and leave the state at the start of the next one.

    Parameters
    ----------
    state
        float64[3], (angle rad, speed rad/s, current A); changed in place.
    parameters
        float64[8], (Ksp, Kf, Kt, Kb, La, Ra, J, P0) of the plant, SI units.
    setpoint
        float64[n], reference angle r, rad, held over each step.
    rows
        float64[n, 2], written; u is the voltage at the start of the step.
    """
    h = STEP_S
    a, b, c = state[0], state[1], state[2]
    for k in range(setpoint.size):
        r = setpoint[k]
        k1a, k1b, k1c, u = _slopes(a, b, c, r, parameters)
        rows[k, 0] = a
        rows[k, 1] = u
        g = 0.5 * h
        k2a, k2b, k2c, _ = _slopes(a + g * k1a, b + g * k1b, c + g * k1c, r, parameters)
        k3a, k3b, k3c, _ = _slopes(a + g * k2a, b + g * k2b, c + g * k2c, r, parameters)
        k4a, k4b, k4c, _ = _slopes(a + h * k3a, b + h * k3b, c + h * k3c, r, parameters)
        a = a + h / 6.0 * (k1a + 2.0 * k2a + 2.0 * k3a + k4a)
        b = b + h / 6.0 * (k1b + 2.0 * k2b + 2.0 * k3b + k4b)
        c = c + h / 6.0 * (k1c + 2.0 * k2c + 2.0 * k3c + k4c)
    state[0], state[1], state[2] = a, b, c


def _start_state(rng: np.random.Generator) -> FloatArray:
    """At rest, as in the published file; the generator is not used."""
    return np.zeros(3)


def _draw_setpoint(rng: np.random.Generator) -> float:
    return float(rng.uniform(-math.pi / 3, math.pi / 3))


_BOTH: Final = ("theta", "u")

THROTTLE: Final = ProcessModel(
    name="throttle",
    period_ns=20_000_000,
    measured=(
        TagSpec("theta", "rad", "C81", -2.0, 2.0, "measured", "Angle of the throttle plate", 0.568),
        TagSpec("u", "V", "VLT", -80.0, 80.0, "measured", "Motor voltage, reversed sign", 5.60),
    ),
    setpoints=(TagSpec("r", "rad", "C81", -1.05, 1.05, "setpoint", "Reference angle, a new one each 2 s"),),
    parameters=(
        Parameter("Ksp", KSP, _BOTH, 0.5, 2.0, "Spring stiffness, N m/rad"),
        Parameter("Kf", KF, _BOTH, 0.5, 2.0, "Viscous friction, N m s/rad"),
        Parameter("Kt", KT, _BOTH, 0.7, 1.5, "Motor torque constant, N m/A"),
        Parameter("Kb", KB, _BOTH, 0.7, 1.5, "Back-EMF constant, V s/rad"),
        Parameter("La", LA, _BOTH, 0.7, 1.5, "Armature inductance, H"),
        Parameter("Ra", RA, _BOTH, 0.98, 1.1, "Armature resistance, ohm"),
        Parameter("J", J, _BOTH, 0.7, 1.5, "Moment of inertia, kg m2"),
        Parameter("P0", P0, _BOTH, 0.5, 2.0, "Airflow torque, N m"),
    ),
    setpoint_hold_rows=100,
    first_setpoint=math.pi / 6,
    start_state=_start_state,
    draw_setpoint=_draw_setpoint,
    kernel=throttle_rows,
)
