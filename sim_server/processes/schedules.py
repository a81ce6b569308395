"""The paper's test runs: six blocks of one process, some of them faulty, each from a fresh start."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from sim_server.errors import ProcessError
from sim_server.processes.base import Fault, FloatArray, LabelArray, Process, ProcessModel
from sim_server.processes.lorenz import LORENZ
from sim_server.processes.throttle import THROTTLE


@dataclass(frozen=True, slots=True)
class Schedule:
    """The blocks of one published run: their length and the one factor, if any, that each carries."""

    model: ProcessModel
    block_rows: int
    blocks: tuple[tuple[str, str | None, float], ...]


@dataclass(frozen=True, slots=True)
class ScheduledRun:
    """The rows of a whole schedule.

    Attributes
    ----------
    measured
        float64[n, n_measured], in the tags' units.
    setpoints
        float64[n, 1].
    labels
        uint8[n], 1 in a faulty block.
    block
        int64[n], number of the block of each row, from 0; the process restarts at each block.
    names
        Name of each block.
    """

    measured: FloatArray
    setpoints: FloatArray
    labels: LabelArray
    block: npt.NDArray[np.int64]
    names: tuple[str, ...]


SCHEDULES: Final = MappingProxyType(
    {
        "lorenz": Schedule(
            LORENZ,
            20_001,
            (
                ("training", None, 1.0),
                ("nominal 1", None, 1.0),
                ("sigma x 2/3", "sigma", 2.0 / 3.0),
                ("nominal 2", None, 1.0),
                ("rho x 26/28", "rho", 26.0 / 28.0),
                ("beta x 1.25", "beta", 1.25),
            ),
        ),
        "throttle": Schedule(
            THROTTLE,
            180_001,
            (
                ("nominal 1", None, 1.0),
                ("Kb x 1.3", "Kb", 1.3),
                ("Kt x 1.3", "Kt", 1.3),
                ("nominal 2", None, 1.0),
                ("La x 1.3", "La", 1.3),
                ("nominal 3", None, 1.0),
            ),
        ),
    }
)
"""The published runs by process; read-only."""


def run_schedule(
    name: str, *, seed: int = 0, block_rows: int | None = None, noise: float = 0.0
) -> ScheduledRun:
    """Simulate the paper's schedule of a process.

    Parameters
    ----------
    name
        ``lorenz`` or ``throttle``.
    seed
        Each block gets an independent stream of its own from this seed.
    block_rows
        Rows of each block; None takes the published length (20001 and 180001).
    noise
        As in `sim_server.processes.make`.

    Raises
    ------
    ProcessError
        Unknown process, ``block_rows`` below 1, or a bad noise.

    Notes
    -----
    Source: Alamir and Dion (2024), sections on the Lorenz and throttle examples.
    """
    if name not in SCHEDULES:
        raise ProcessError(f"schedule: {name!r} is not known", "name", name, f"one of {', '.join(SCHEDULES)}")
    schedule = SCHEDULES[name]
    rows = schedule.block_rows if block_rows is None else block_rows
    if rows < 1:
        raise ProcessError(f"schedule {name}: {rows} rows a block", "block_rows", rows, "a number >= 1")
    seeds = np.random.SeedSequence(seed).generate_state(len(schedule.blocks))
    parts = []
    for block_seed, (_, parameter, factor) in zip(seeds, schedule.blocks, strict=True):
        process = Process(schedule.model, seed=int(block_seed), noise=noise)
        faults = [] if parameter is None else [Fault(parameter, factor, 0, rows)]
        parts.append(process.simulate_block(rows, faults))
    return ScheduledRun(
        measured=np.concatenate([part.measured for part in parts]),
        setpoints=np.concatenate([part.setpoints for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        block=np.repeat(np.arange(len(parts)), rows),
        names=tuple(block[0] for block in schedule.blocks),
    )
