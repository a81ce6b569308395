"""The Lorenz attractor as the paper's first test process; x2 is not measured.

Identified from the rows published by M. Alamir and R. Dion (2024): classical RK4, h = 0.01 s,
sigma 12, rho 28, beta 8/3 predicts each published row from the row before to 7e-15.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np

from sim_server.processes.base import FloatArray, Parameter, ProcessModel, TagSpec

STEP_S: Final = 0.01
SETPOINT_LEVELS: Final = (40.0, 50.0, 60.0)


@numba.njit("void(float64[::1], float64[::1], float64[::1], float64[:, ::1])", cache=True)
def lorenz_rows(state: FloatArray, parameters: FloatArray, setpoint: FloatArray, rows: FloatArray) -> None:
    """Write the rows (x1, x3) and leave the state at the start of the next one.

    Parameters
    ----------
    state
        float64[3], (x1, x2, x3), dimensionless; changed in place.
    parameters
        float64[3], (sigma, rho, beta).
    setpoint
        float64[n], without effect on this process; its length says how many rows.
    rows
        float64[n, 2], written.
    """
    sigma, rho, beta = parameters[0], parameters[1], parameters[2]
    h = STEP_S
    a, b, c = state[0], state[1], state[2]
    for k in range(setpoint.size):
        rows[k, 0] = a
        rows[k, 1] = c
        k1a = sigma * (b - a)
        k1b = a * (rho - c) - b
        k1c = a * b - beta * c
        p, q, r = a + 0.5 * h * k1a, b + 0.5 * h * k1b, c + 0.5 * h * k1c
        k2a = sigma * (q - p)
        k2b = p * (rho - r) - q
        k2c = p * q - beta * r
        p, q, r = a + 0.5 * h * k2a, b + 0.5 * h * k2b, c + 0.5 * h * k2c
        k3a = sigma * (q - p)
        k3b = p * (rho - r) - q
        k3c = p * q - beta * r
        p, q, r = a + h * k3a, b + h * k3b, c + h * k3c
        k4a = sigma * (q - p)
        k4b = p * (rho - r) - q
        k4c = p * q - beta * r
        a = a + h / 6.0 * (k1a + 2.0 * k2a + 2.0 * k3a + k4a)
        b = b + h / 6.0 * (k1b + 2.0 * k2b + 2.0 * k3b + k4b)
        c = c + h / 6.0 * (k1c + 2.0 * k2c + 2.0 * k3c + k4c)
    state[0], state[1], state[2] = a, b, c


def _start_state(rng: np.random.Generator) -> FloatArray:
    """A small random state, as at the start of each published block."""
    return rng.uniform(-0.2, 0.2, 3)


def _draw_setpoint(rng: np.random.Generator) -> float:
    return float(rng.choice(SETPOINT_LEVELS))


LORENZ: Final = ProcessModel(
    name="lorenz",
    period_ns=10_000_000,
    measured=(
        TagSpec("x1", "1", "C62", -30.0, 30.0, "measured", "First Lorenz state", 7.95),
        TagSpec("x3", "1", "C62", -10.0, 60.0, "measured", "Third Lorenz state", 8.52),
    ),
    setpoints=(
        TagSpec("setpoint", "%", "P1", 0.0, 100.0, "setpoint", "Demand; steps rarely, acts on nothing", 0.0),
    ),
    parameters=(
        Parameter("sigma", 12.0, ("x1", "x3"), 0.5, 2.0, "Prandtl number"),
        Parameter("rho", 28.0, ("x1",), 0.5, 1.5, "Rayleigh number ratio"),
        Parameter("beta", 8.0 / 3.0, ("x3",), 0.5, 2.0, "Geometric factor"),
    ),
    setpoint_hold_rows=6000,
    first_setpoint=50.0,
    start_state=_start_state,
    draw_setpoint=_draw_setpoint,
    kernel=lorenz_rows,
)
