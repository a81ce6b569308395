"""The demonstration's monitors without a server: simulated plants as records, fitted as `opcua-detector demo` does.

Tests of the promises and benchmarks use them; windows, methods, alert and tags are those of `configs/<process>.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opcua_detector import config as configuration
from opcua_detector.absence import Absence
from opcua_detector.alarms import AlertState
from opcua_detector.api import Float64, Method, Record, Tag
from opcua_detector.app import group_tags, methods_of, only_nonlinear, registry_of
from opcua_detector.cli.demo import HISTORY_ROWS
from opcua_detector.engine import AlertSettings, RowMonitor
from opcua_detector.fitting import FitReport, fit_monitor
from opcua_detector.model import NormalityModel
from sim_server.plant import Plant
from sim_server.processes import Fault, make

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTLING_ROWS = 6000
START_NS = 1_767_225_600_000_000_000
FAULTS = {"lorenz": {"sigma": 2 / 3, "rho": 26 / 28, "beta": 1.25}, "throttle": {"Kb": 1.3, "Kt": 1.3, "La": 1.3}}


class PlantRecords:
    """A settled plant that goes on from record to record, with the tags of the sample config and a duplicate."""

    def __init__(self, process: str, seed: int, noise: float = 0.0) -> None:
        self.plant = Plant(make(process, seed=seed, noise=noise))
        self.plant.rows(SETTLING_ROWS)
        group = configuration.load(CONFIGS / f"{process}.yaml").groups[0]
        assert group.period == self.plant.period_ns
        self.tags = (*group_tags(group), Tag("duplicate"))
        names = [tag.name for tag in self.plant.tags]
        self._columns = [names.index(tag.name) for tag in self.tags]

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the tags that a detector should judge."""
        return tuple(tag.name for tag in self.plant.process.model.measured)

    def rows_of(self, seconds: float) -> int:
        """Rows in so many seconds."""
        return round(seconds * 1e9 / self.plant.period_ns)

    def record(self, rows: int, faults: Sequence[Fault] = ()) -> Record:
        """Return the next rows with ground truth; row numbers of the faults count from the first of them."""
        block = self.plant.rows(rows, list(faults))
        return Record.from_rows(block.values[:, self._columns], self.tags, self.plant.period_ns, truth=block.labels,
                                start_ns=START_NS + block.first_row * self.plant.period_ns)


@dataclass(frozen=True)
class Judged:
    """Every row of a record judged by array calls; rows of `raised` and `cleared` count from 0."""

    score: Float64
    out: Float64
    raised: tuple[int, ...]
    cleared: tuple[int, ...]


@dataclass(frozen=True)
class DemoMonitor:
    """The monitor of a sample config, fitted on the healthy history of a plant that then goes on."""

    process: str
    plant: PlantRecords
    healthy: Record
    model: NormalityModel
    report: FitReport
    methods: tuple[Method, ...]
    alert: AlertSettings

    def monitor(self) -> RowMonitor:
        """Return a monitor for frames of the plant's tags; it shares the methods, so use one at a time."""
        fresh = RowMonitor(self.process, self.model, self.methods, self.plant.tags, self.alert)
        fresh.reset()
        return fresh

    def residuals(self, record: Record) -> list[Float64]:
        """Return float64[n, n_channels] for each method."""
        columns = self.model.plan.prepare(record.select([tag.name for tag in self.model.tags]))
        return [method.residuals(columns) for method in self.methods]

    def less_absence(self, record: Record, residual: Float64) -> Float64:
        """Return residuals float64[n, n_channels] less what missing tags add to them."""
        absence = Absence.of(self.model.calibration, self.methods)
        columns = self.model.plan.prepare(record.select([tag.name for tag in self.model.tags]))
        return residual if absence is None else absence.rows(columns, residual)

    def judge(self, record: Record) -> Judged:
        """Judge a record by the array calls: residuals, scores, alert."""
        residual = self.less_absence(record, np.concatenate(self.residuals(record), axis=1))
        out = self.model.calibration.score_rows(residual, record.gap, np.zeros(len(record), np.int64))
        state, raised, cleared = AlertState(self.alert.on_delay_ns, self.alert.off_delay_ns), [], []
        for k, (score, now) in enumerate(zip(out[:, 0].tolist(), record.source_ns.tolist(), strict=True)):
            state.step(score, now)
            if state.raised:
                raised.append(k)
            if state.cleared:
                cleared.append(k)
        return Judged(out[:, 0], out, tuple(raised), tuple(cleared))


def demo_monitor(process: str, seed: int, *, noise: float = 0.0, rows: int = 0) -> DemoMonitor:
    """Fit the sample config's monitor on `rows` healthy rows, by default as many as the demonstration reads."""
    config = configuration.load(CONFIGS / f"{process}.yaml")
    item = config.monitors[0]
    plant = PlantRecords(process, seed, noise)
    healthy = plant.record(rows or HISTORY_ROWS[process])
    registry = registry_of(config)
    model, report = fit_monitor(item.name, healthy, methods_of(item, registry, CONFIGS), state_tag=item.state_tag,
                                windows_ns=item.windows, false_alarms_per_day=item.false_alarms_per_day,
                                only_nonlinear=only_nonlinear(item))
    methods = tuple(registry.get(m.plugin).open(m, model.plan.columns) for m in model.methods)
    alert = AlertSettings(item.on_delay, item.off_delay, item.severity)
    return DemoMonitor(process, plant, healthy, model, report, methods, alert)
