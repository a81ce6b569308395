"""Pure simulated processes: a seeded generator in, rows out; no clock, no I/O.

>>> from sim_server.processes import Fault, make
>>> plant = make("lorenz", seed=1, noise=0.01)
>>> plant.simulate(20_000).shape
(20000, 2)
>>> block = plant.simulate_block(1000, faults=[Fault("sigma", 2 / 3, 500, 1000)])
>>> int(block.labels.sum())
500
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from sim_server.errors import ProcessError
from sim_server.processes.base import (
    Block,
    Fault,
    Parameter,
    Process,
    ProcessModel,
    TagSpec,
)
from sim_server.processes.lorenz import LORENZ
from sim_server.processes.press import PRESS
from sim_server.processes.schedules import SCHEDULES, Schedule, ScheduledRun, run_schedule
from sim_server.processes.throttle import THROTTLE

__all__ = [
    "CYCLIC",
    "MODELS",
    "SCHEDULES",
    "Block",
    "Fault",
    "Parameter",
    "Process",
    "ProcessError",
    "ProcessModel",
    "Schedule",
    "ScheduledRun",
    "TagSpec",
    "make",
    "model",
    "run_schedule",
]

MODELS: Final = MappingProxyType({one.name: one for one in (LORENZ, THROTTLE)})
"""Every continuous process by name, read-only."""

CYCLIC: Final = MappingProxyType({one.name: one for one in (PRESS,)})
"""Every process that makes one part after the other, with a counter of its cycles, by name; read-only."""


def model(name: str) -> ProcessModel:
    """Return the immutable description of a process.

    Raises
    ------
    ProcessError
        No process has this name.
    """
    known = {**MODELS, **CYCLIC}
    if name not in known:
        raise ProcessError(f"process: {name!r} is not known", "name", name, f"one of {', '.join(known)}")
    return known[name]


def make(name: str, *, seed: int = 0, noise: float = 0.0) -> Process:
    """Build a process at its start state.

    Parameters
    ----------
    name
        ``lorenz``, ``throttle`` or ``press``.
    seed
        Seed of every random choice; the noise draws from a stream of its own, so the trajectory of a
        seed is the same at every noise level.
    noise
        Standard deviation of the white measurement noise, as a fraction of each tag's healthy
        standard deviation (``TagSpec.healthy_std``).

    Raises
    ------
    ProcessError
        Unknown name, or a negative or non-finite noise.
    """
    return Process(model(name), seed=seed, noise=noise)
