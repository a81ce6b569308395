"""Healthy records, a method simple enough to check by hand, and fitted monitors that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from opcua_detector.api import Cause, Channel, Float64, Int64, Method, MethodModel, Plugin, Record, Tag, UInt8
from opcua_detector.app import methods_of, only_nonlinear
from opcua_detector.config import MonitorConfig
from opcua_detector.detectors.onnx_model import OnnxParams, OnnxPlugin
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin
from opcua_detector.engine import AlertSettings, Engine, RowMonitor, frames_of
from opcua_detector.errors import ModelTagsError
from opcua_detector.fitting import FitReport, fit_monitor
from opcua_detector.model import NormalityModel
from opcua_detector.registry import Registry
from sim_server.processes import Fault, make

PERIOD_NS = 10_000_000


@dataclass(frozen=True)
class DeviationParams:
    """memory : rows before the first residual."""

    memory: int = 3


class DeviationPlugin:
    """Learns the mean and standard deviation of each judged column; its residual is the distance in those."""

    name = "deviation"
    Params = DeviationParams
    learns = True

    def __init__(self) -> None:
        self.fitted_on: list[Record] = []

    def fit(self, record: Record, params: DeviationParams) -> MethodModel:
        self.fitted_on.append(record)
        masked = np.where(record.valid != 0, record.values, np.nan)
        return MethodModel(self.name, tuple(t.name for t in record.tags), record.period_ns, asdict(params), {
            "mean": np.nanmean(masked, axis=0), "std": np.nanstd(masked, axis=0)})

    def open(self, model: MethodModel, columns: Sequence[Tag]) -> DeviationMethod:
        return DeviationMethod(model, columns)


class DeviationMethod:
    """|x - mean| / std of each judged column, silent for `memory` rows after a reset."""

    name = "deviation"
    lag = 0

    def __init__(self, model: MethodModel, columns: Sequence[Tag]) -> None:
        at = {tag.name: i for i, tag in enumerate(columns)}
        missing = [name for name in model.columns if name not in at]
        if missing:
            raise ModelTagsError(f"needs {missing}")
        judged = [(k, at[name]) for k, name in enumerate(model.columns) if columns[at[name]].judged]
        self._at = np.array([i for _, i in judged])
        self._mean, self._std = (model.arrays[name][[k for k, _ in judged]] for name in ("mean", "std"))
        self.channels = tuple(Channel(columns[i].name, columns[i].name, "bound") for i in self._at)
        self.memory = int(model.params["memory"])
        self.residual = np.full(len(judged), np.nan)
        self._seen = 0

    def update(self, values: Float64, valid: UInt8) -> None:
        self._seen += 1
        self.residual[:] = np.abs(values[self._at] - self._mean) / self._std
        self.residual[(valid[self._at] == 0) | (self._seen <= self.memory)] = np.nan

    def reset(self) -> None:
        self._seen = 0
        self.residual[:] = np.nan

    def residuals(self, record: Record) -> Float64:
        out = np.abs(record.values[:, self._at] - self._mean) / self._std
        out[record.valid[:, self._at] == 0] = np.nan
        for start in np.flatnonzero(record.gap):
            stop = next((k for k in range(start + 1, len(record)) if record.gap[k]), len(record))
            out[start:min(start + self.memory, stop)] = np.nan
        return out

    def explain(self, values: Float64, valid: UInt8, source_ns: Int64, window: int) -> list[Cause]:
        last = np.abs(values[-window:, self._at] - self._mean) / self._std
        far = np.nan_to_num(last).sum(axis=0)
        share = far / max(far.sum(), 1e-9)
        return [Cause(c.tag, "bound", float(share[k]), float(values[-1, self._at[k]]),
                      float(self._mean[k] - 3 * self._std[k]), float(self._mean[k] + 3 * self._std[k]), other=c.tag)
                for k, c in enumerate(self.channels)]


def record_of(values: Float64, tags: Sequence[Tag | str], **more: object) -> Record:
    """Rows on a 10 ms grid."""
    return Record.from_rows(values, tags, PERIOD_NS, **more)  # type: ignore[arg-type]


def noise_record(n: int, tags: Sequence[Tag | str], seed: int = 0) -> Record:
    """White noise of standard deviation 1 on every tag."""
    return record_of(np.random.default_rng(seed).standard_normal((n, len(tags))), tags)


@cache
def lorenz_rows(n: int, seed: int, *faults: Fault) -> Record:
    """Lorenz rows x1, x3 with ground truth, after 1000 rows of settling."""
    plant = make("lorenz", seed=seed)
    plant.simulate(1000)
    block = plant.simulate_block(n, faults)
    return record_of(block.measured, ["x1", "x3"], truth=block.labels)


@cache
def lorenz_fit(n: int = 12_000) -> tuple[NormalityModel, FitReport]:
    """The method `transition` with its defaults, fitted on healthy Lorenz rows."""
    return fit_monitor("lorenz", lorenz_rows(n, 1), [("transition", TransitionPlugin(), TransitionParams())])


def lorenz_monitor(tags: Sequence[Tag], alert: AlertSettings = AlertSettings()) -> RowMonitor:  # noqa: B008 - frozen
    """A fresh monitor on the shared Lorenz model, for frames of these tags."""
    model, _ = lorenz_fit()
    return RowMonitor("lorenz", model, [TransitionPlugin().open(model.methods[0], model.plan.columns)], tags, alert)


@cache
def _sharp_model() -> NormalityModel:
    """The shared Lorenz model with the limit of each view at 1.5 times what 5000 fresh healthy rows reach."""
    model, _ = lorenz_fit()
    record = lorenz_rows(5000, 2)
    method = TransitionPlugin().open(model.methods[0], model.plan.columns)
    _, _, values = model.calibration.scorer().rows(
        method.residuals(model.plan.prepare(record)), record.gap, np.zeros(len(record), np.int64), details=True)
    limit = 1.5 * np.nanmax(values, axis=0)[None]
    return replace(model, calibration=replace(model.calibration, limit=limit))


def sharp_monitor(tags: Sequence[Tag], alert: AlertSettings = AlertSettings()) -> RowMonitor:  # noqa: B008 - frozen
    """As `lorenz_monitor`, for tests of alerts that must not depend on how the limit is chosen."""
    model = _sharp_model()
    return RowMonitor("lorenz", model, [TransitionPlugin().open(model.methods[0], model.plan.columns)], tags, alert)


_DEFAULT = MonitorConfig(name="auto", group="rows")


def automatic_methods() -> list[tuple[str, Plugin, Any]]:
    """The methods of a monitor whose config names none."""
    return methods_of(_DEFAULT, Registry(), Path("default.yaml"))


def automatic_fit(record: Record, **more: Any) -> tuple[NormalityModel, FitReport]:
    """A fit with the default configuration: `methods: [auto]`."""
    return fit_monitor("auto", record, automatic_methods(), only_nonlinear=only_nonlinear(_DEFAULT), **more)


def opened(model: NormalityModel) -> list[Method]:
    """The methods of a model, opened."""
    registry = Registry()
    return [registry.get(m.plugin).open(m, model.plan.columns) for m in model.methods]


def monitor_of(
    model: NormalityModel, tags: Sequence[Tag], alert: AlertSettings = AlertSettings(),  # noqa: B008 - frozen
) -> RowMonitor:
    """A fresh monitor on a model, for frames of these tags."""
    return RowMonitor(model.monitor, model, opened(model), tags, alert)


@cache
def product_fit() -> NormalityModel:
    """The model of `configs/lorenz.yaml`: the default methods and the bundled graph, 40 000 healthy rows."""
    methods = [*automatic_methods(), ("onnx", OnnxPlugin(), OnnxParams(model="bundled:lorenz"))]
    return fit_monitor("lorenz", lorenz_rows(40_000, 1), methods, only_nonlinear=only_nonlinear(_DEFAULT))[0]


def product_monitor(tags: Sequence[Tag]) -> RowMonitor:
    """A monitor as `configs/lorenz.yaml` makes it, with the limits that its fit set."""
    return monitor_of(product_fit(), tags)


def deviation_monitor(
    record: Record, *, group_tags: Sequence[Tag] = (), state_tag: str = "", windows: Sequence[int] = (20,),
    alert: AlertSettings = AlertSettings(), per_day: float = 100.0,  # noqa: B008 - frozen
) -> RowMonitor:
    """A monitor with the method `deviation`, fitted on this record."""
    plugin = DeviationPlugin()
    model, _ = fit_monitor("plain", record, [("deviation", plugin, DeviationParams())], state_tag=state_tag,
                           windows_ns=[w * record.period_ns for w in windows], false_alarms_per_day=per_day)
    methods = [plugin.open(model.methods[0], model.plan.columns)]
    return RowMonitor("plain", model, methods, group_tags or record.tags, alert)


def scores(monitor: RowMonitor, record: Record) -> Float64:
    """Score of each row, streamed through an engine."""
    engine = Engine([monitor])
    return np.array([engine.step(frame)[0].score for frame in frames_of(record)])
