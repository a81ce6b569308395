"""What every simulated process has in common: tags, parameters, faults and the stepping of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sim_server.errors import ProcessError

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.uint8]

Kernel = Callable[[FloatArray, FloatArray, FloatArray, FloatArray], None]
"""``kernel(state f64[3], parameters f64[n_parameters], setpoint f64[n], rows f64[n, n_measured])``.

Writes one row for each setpoint value and leaves ``state`` at the start of the next row.
"""


@dataclass(frozen=True, slots=True)
class TagSpec:
    """One variable of the plant: name, unit and the range an engineer would give it.

    Attributes
    ----------
    name, unit, description
        ``unit`` is the display name ("rad", "V", "1"); ``unit_code`` its UNECE Recommendation 20 code.
    eu_low, eu_high
        EURange, in ``unit``.
    kind
        ``measured``, ``setpoint``, ``counter``, ``clock``, ``constant``, ``duplicate`` or ``state``.
    healthy_std
        Standard deviation over a long healthy run, in ``unit``; 0 where it has no meaning.
    """

    name: str
    unit: str
    unit_code: str
    eu_low: float
    eu_high: float
    kind: str
    description: str
    healthy_std: float = 0.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One physical parameter that a fault may multiply.

    Attributes
    ----------
    nominal
        Value in SI units.
    touches
        The measured tags whose own law the parameter changes: what an explanation may rightly name.
    factor_low, factor_high
        Factors for which the simulation is known to stay bounded.
    """

    name: str
    nominal: float
    touches: tuple[str, ...]
    factor_low: float
    factor_high: float
    description: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A parameter factor that holds on the rows ``start_row <= row < stop_row`` of one batch."""

    parameter: str
    factor: float
    start_row: int
    stop_row: int


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one process.

    Attributes
    ----------
    measured
        float64[n, n_measured], the measured tags with noise, in their units.
    setpoints
        float64[n, n_setpoints], the setpoints in force at each row, in their units.
    labels
        uint8[n], 1 where any parameter factor differs from 1.
    first_row
        Number of the first row since the process started (counting from 0).
    """

    measured: FloatArray
    setpoints: FloatArray
    labels: LabelArray
    first_row: int


@dataclass(frozen=True, slots=True)
class ProcessModel:
    """The immutable description of a process; `Process` runs it.

    Attributes
    ----------
    period_ns
        Time between two rows, ns.
    measured, setpoints
        Tag tables, in column order.
    parameters
        In the order in which ``kernel`` wants them.
    setpoint_hold_rows
        A new setpoint is drawn each so many rows, counting from row 0.
    first_setpoint
        Setpoint of the first hold interval.
    start_state
        Draws the initial state, float64[3].
    draw_setpoint
        Draws the next setpoint.
    """

    name: str
    period_ns: int
    measured: tuple[TagSpec, ...]
    setpoints: tuple[TagSpec, ...]
    parameters: tuple[Parameter, ...]
    setpoint_hold_rows: int
    first_setpoint: float
    start_state: Callable[[np.random.Generator], FloatArray]
    draw_setpoint: Callable[[np.random.Generator], float]
    kernel: Kernel

    @property
    def fault_names(self) -> tuple[str, ...]:
        """Names that `Fault.parameter` and `Process.set_factor` accept."""
        return tuple(one.name for one in self.parameters)

    def parameter(self, name: str) -> Parameter:
        """Return one parameter by name.

        Raises
        ------
        ProcessError
            No parameter has this name.
        """
        for one in self.parameters:
            if one.name == name:
                return one
        raise ProcessError(
            f"process {self.name}: no parameter {name!r}",
            "parameter",
            name,
            f"one of {', '.join(self.fault_names)}",
        )

    def check_factor(self, name: str, factor: float) -> float:
        """Return the factor as a float after checking name and range.

        Raises
        ------
        ProcessError
            Unknown parameter, or a factor outside ``factor_low .. factor_high``.
        """
        one = self.parameter(name)
        factor = float(factor)
        if not (math.isfinite(factor) and one.factor_low <= factor <= one.factor_high):
            raise ProcessError(
                f"process {self.name}: factor {factor} for {name} would leave the simulated range",
                "factor",
                factor,
                f"{one.factor_low} .. {one.factor_high} (1 is healthy)",
            )
        return factor


class Process:
    """One running instance of a `ProcessModel`; every random choice comes from its seed.

    Parameters
    ----------
    model
        What to run.
    seed
        Seed of start state, setpoints and noise (three independent streams).
    noise
        White measurement noise as a fraction of each tag's healthy standard deviation.
    """

    def __init__(self, model: ProcessModel, *, seed: int = 0, noise: float = 0.0) -> None:
        if not (math.isfinite(noise) and noise >= 0.0):
            raise ProcessError(f"process {model.name}: noise {noise}", "noise", noise, "a number >= 0")
        self.model = model
        self.noise = float(noise)
        start, setpoint, white = np.random.SeedSequence(seed).spawn(3)
        self._setpoint_rng = np.random.default_rng(setpoint)
        self._noise_rng = np.random.default_rng(white)
        self._noise_scale = self.noise * np.array([tag.healthy_std for tag in model.measured])
        self._state: FloatArray = np.ascontiguousarray(
            model.start_state(np.random.default_rng(start)), dtype=np.float64
        )
        self._nominal = np.array([one.nominal for one in model.parameters])
        self._index = {one.name: i for i, one in enumerate(model.parameters)}
        self._factors = np.ones(len(model.parameters))
        self._effective = self._nominal.copy()
        self._row = 0
        self._setpoint = model.first_setpoint
        self._one_row = np.empty((1, len(model.measured)))
        self._one_setpoint = np.empty(1)

    # -- description -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the process."""
        return self.model.name

    @property
    def period_ns(self) -> int:
        """Time between two rows, ns."""
        return self.model.period_ns

    @property
    def row(self) -> int:
        """Number of the next row (counting from 0)."""
        return self._row

    @property
    def state(self) -> FloatArray:
        """Copy of the full state at the start of the next row, float64[3]."""
        return self._state.copy()

    @property
    def setpoint(self) -> float:
        """Setpoint that was in force at the last row."""
        return self._setpoint

    # -- faults ------------------------------------------------------------------------------------

    @property
    def factors(self) -> Mapping[str, float]:
        """Copy of the factors in force, by parameter name; 1 is healthy."""
        return {name: float(self._factors[i]) for name, i in self._index.items()}

    @property
    def faulty(self) -> bool:
        """Ground truth: whether any factor differs from 1."""
        return bool(np.any(self._factors != 1.0))

    def set_factor(self, parameter: str, factor: float) -> None:
        """Multiply a parameter by ``factor`` from the next row on; the state is kept.

        Raises
        ------
        ProcessError
            Unknown parameter, or a factor outside its simulated range.
        """
        factor = self.model.check_factor(parameter, factor)
        i = self._index[parameter]
        self._factors[i] = factor
        # factor 1 must restore the nominal value to the last bit
        self._effective[i] = self._nominal[i] * factor if factor != 1.0 else self._nominal[i]

    def clear_factors(self) -> None:
        """Make the process healthy from the next row on; the state is kept."""
        self._factors[:] = 1.0
        self._effective[:] = self._nominal

    # -- rows --------------------------------------------------------------------------------------

    def step(self) -> FloatArray:
        """Advance by one row and return it.

        Returns
        -------
        float64[n_measured]
            A new array, in the units of ``model.measured``; bit-identical with the same row of
            `simulate`.
        """
        self._fill_setpoints(self._one_setpoint)
        self.model.kernel(self._state, self._effective, self._one_setpoint, self._one_row)
        self._row += 1
        row = self._one_row[0].copy()
        if self.noise:
            row += self._noise_rng.standard_normal(row.size) * self._noise_scale
        return row

    def simulate(self, n: int, faults: Iterable[Fault] = ()) -> FloatArray:
        """Advance by ``n`` rows and return the measured tags, float64[n, n_measured].

        See `simulate_block` for the faults and the errors.
        """
        return self.simulate_block(n, faults).measured

    def simulate_block(self, n: int, faults: Iterable[Fault] = ()) -> Block:
        """Advance by ``n`` rows and return them with setpoints and ground truth.

        Parameters
        ----------
        n
            Number of rows, at least 0.
        faults
            Row numbers count from the first row of this call.  Where a fault ends, its parameter is
            healthy again; one with ``stop_row`` beyond ``n`` is still in force afterwards.

        Raises
        ------
        ProcessError
            Unknown parameter, factor out of range, a start outside ``0 .. n`` or after the stop, or two
            faults of one parameter that overlap.
        """
        if n < 0:
            raise ProcessError(f"process {self.name}: {n} rows", "n", n, "a number >= 0")
        events = self._events(n, list(faults))
        measured = np.empty((n, len(self.model.measured)))
        setpoints = np.empty(n)
        labels = np.zeros(n, dtype=np.uint8)
        self._fill_setpoints(setpoints)
        at = 0
        for stop, changes in [*events, (n, [])]:
            if stop > at:
                self.model.kernel(self._state, self._effective, setpoints[at:stop], measured[at:stop])
                labels[at:stop] = self.faulty
                at = stop
            for parameter, factor in changes:
                self.set_factor(parameter, factor)
        first_row, self._row = self._row, self._row + n
        if self.noise:
            measured += self._noise_rng.standard_normal(measured.shape) * self._noise_scale
        return Block(measured, setpoints.reshape(n, 1), labels, first_row)

    def _events(self, n: int, faults: Sequence[Fault]) -> list[tuple[int, list[tuple[str, float]]]]:
        by_row: dict[int, list[tuple[str, float]]] = {}
        last: dict[str, Fault] = {}
        for fault in sorted(faults, key=lambda one: one.start_row):
            self.model.check_factor(fault.parameter, fault.factor)
            if not 0 <= fault.start_row <= min(fault.stop_row, n):
                raise ProcessError(
                    f"process {self.name}: {fault.parameter} on rows {fault.start_row} .. {fault.stop_row}",
                    "faults",
                    fault,
                    f"0 <= start_row <= {n}, and not after stop_row",
                )
            earlier = last.get(fault.parameter)
            if earlier is not None and fault.start_row < earlier.stop_row:
                raise ProcessError(
                    f"process {self.name}: two faults of {fault.parameter} overlap at row {fault.start_row}",
                    "faults",
                    fault,
                    f"start_row >= {earlier.stop_row}",
                )
            last[fault.parameter] = fault
            if fault.stop_row == fault.start_row:
                continue
            by_row.setdefault(fault.start_row, []).append((fault.parameter, fault.factor))
            if fault.stop_row <= n:
                # in front of what starts on the same row, so that the later fault wins
                by_row.setdefault(fault.stop_row, []).insert(0, (fault.parameter, 1.0))
        return sorted(by_row.items())

    def _fill_setpoints(self, out: npt.NDArray[Any]) -> None:
        """Write the setpoint of the next ``len(out)`` rows; draws are made at hold boundaries only."""
        hold = self.model.setpoint_hold_rows
        at, row = 0, self._row
        while at < out.size:
            if row % hold == 0 and row > 0:
                self._setpoint = self.model.draw_setpoint(self._setpoint_rng)
            length = min(hold - row % hold, out.size - at)
            out[at : at + length] = self._setpoint
            at += length
            row += length
