"""The whole plant without a server: the process, the tags beside the measured ones, and the script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sim_server.errors import ProcessError
from sim_server.faults import FaultScript
from sim_server.processes import Fault, Process, ProcessModel, TagSpec
from sim_server.processes.base import FloatArray, LabelArray

RUNNING: Final = 1
"""Value of the state tag while the process runs."""

CONSTANT_VALUE: Final = 24.0
"""Value of the constant tag, V: a supply that never moves."""


def tag_table(model: ProcessModel) -> tuple[TagSpec, ...]:
    """Return the tags of a plant: measured, setpoints, then those a detector must leave alone.

    ``total`` is a totaliser, ``clock`` a running time, ``constant`` never moves, ``duplicate`` is the
    first measured tag once more, ``state`` is the operating state (`RUNNING`).
    """
    first = model.measured[0]
    return (
        *model.measured,
        *model.setpoints,
        TagSpec("total", "s", "SEC", 0.0, 1e9, "counter", f"Totaliser: integral of |{first.name}| over time"),
        TagSpec("clock", "s", "SEC", 0.0, 1e9, "clock", "Running time of the process"),
        TagSpec("constant", "V", "VLT", 0.0, 48.0, "constant", "Supply voltage, never moves"),
        TagSpec(
            "duplicate",
            first.unit,
            first.unit_code,
            first.eu_low,
            first.eu_high,
            "duplicate",
            f"The same signal as {first.name}",
            first.healthy_std,
        ),
        TagSpec("state", "", "C62", 0.0, 10.0, "state", "Operating state: 0 stopped, 1 running"),
    )


@dataclass(frozen=True, slots=True)
class PlantRows:
    """Consecutive rows of a plant.

    Attributes
    ----------
    values
        float64[n, n_tags], in the units of the tag table; the state as a whole number.
    labels
        uint8[n], ground truth: 1 where any parameter factor differs from 1.
    first_row
        Number of the first row since the process started, from 0.
    """

    values: FloatArray
    labels: LabelArray
    first_row: int


class Plant:
    """A process with its other tags; rows come one by one or in blocks, bit-identical either way.

    Parameters
    ----------
    process
        Runs the measured tags; the plant owns it from now on.
    total_rollover
        The totaliser starts again at 0 when it reaches this value; 0 is never.

    Raises
    ------
    ProcessError
        A negative ``total_rollover``.
    """

    def __init__(self, process: Process, *, total_rollover: float = 0.0) -> None:
        if not total_rollover >= 0.0:
            raise ProcessError(
                f"plant {process.name}: rollover {total_rollover}",
                "total_rollover",
                total_rollover,
                "0 or more",
            )
        self.process = process
        self.tags = tag_table(process.model)
        self.period_ns = process.period_ns
        self._period_s = process.period_ns * 1e-9
        self._rollover = total_rollover
        self._total = 0.0

    def step(self) -> FloatArray:
        """Advance by one row and return it, float64[n_tags]."""
        measured = self.process.step()
        self._total += abs(measured[0]) * self._period_s
        return np.array(
            [
                *measured,
                self.process.setpoint,
                self._total % self._rollover if self._rollover else self._total,
                (self.process.row - 1) * self._period_s,
                CONSTANT_VALUE,
                measured[0],
                RUNNING,
            ]
        )

    def rows(self, n: int, faults: list[Fault] | None = None) -> PlantRows:
        """Advance by ``n`` rows; row numbers of the faults count from the first of them.

        Raises
        ------
        ProcessError
            As `Process.simulate_block`.
        """
        block = self.process.simulate_block(n, faults or [])
        increments = np.concatenate(([self._total], np.abs(block.measured[:, 0]) * self._period_s))
        # cumsum adds from left to right, as step does
        total = np.cumsum(increments)
        self._total = float(total[-1])
        total = total[1:]
        values = np.column_stack(
            [
                block.measured,
                block.setpoints,
                np.mod(total, self._rollover) if self._rollover else total,
                np.arange(block.first_row, block.first_row + n) * self._period_s,
                np.full(n, CONSTANT_VALUE),
                block.measured[:, 0],
                np.full(n, float(RUNNING)),
            ]
        )
        return PlantRows(values, block.labels, block.first_row)

    @property
    def active_fault(self) -> str:
        """The active faults as text, "" when healthy; for example ``sigma x 0.667``."""
        return ", ".join(
            f"{name} x {factor:.4g}" for name, factor in self.process.factors.items() if factor != 1.0
        )


class ScriptPlayer:
    """Applies a fault script to a running process, one row at a time."""

    def __init__(self, script: FaultScript | None) -> None:
        self._changes = script.changes() if script is not None else {}

    def apply(self, row: int, process: Process) -> bool:
        """Set the factors that change before this row; return whether there were any.

        Parameters
        ----------
        row
            Row of the script, from 0; each row must be passed once, in order.
        process
            Its factors are changed; factors set by hand stay until the script says otherwise.
        """
        changes = self._changes.get(row)
        if not changes:
            return False
        for parameter, factor in changes:
            process.set_factor(parameter, factor)
        return True
