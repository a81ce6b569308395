"""Wiring of config, models, engine and store: what fit, replay, feedback and service share; it knows no client."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .api import Plugin, Record, Tag
from .config import Config, GroupConfig, MonitorConfig
from .engine import AlertSettings, Monitor, RowMonitor
from .errors import ConfigError, ModelTagsError, PluginError, RecordError
from .fitting import FitReport, fit_monitor
from .model import NormalityModel
from .model import load as load_model
from .parts import Cycle, PartMonitor, fit_parts, is_part_model
from .registry import Registry
from .store import AuditEntry, Store


def group_tags(group: GroupConfig) -> tuple[Tag, ...]:
    """Return the tags of a group, in the order of its frames."""
    return tuple(tag.tag() for tag in group.tags)


def monitor_tags(monitor: MonitorConfig, group: GroupConfig) -> tuple[Tag, ...]:
    """Return the tags a monitor looks at: those it names (or all), its state tag and the trigger of its parts.

    Tags that keep alarms back are not looked at, unless they are named.
    """
    aside = {*monitor.inhibit, monitor.maintenance}
    wanted = monitor.tags if monitor.tags is not None else tuple(t.name for t in group.tags if t.name not in aside)
    for extra in (monitor.state_tag, monitor.cycle.tag if monitor.cycle else ""):
        if extra and extra not in wanted:
            wanted = (*wanted, extra)
    known = {tag.name: tag for tag in group_tags(group)}
    return tuple(known[name] for name in wanted)


def model_path(config_file: Path, monitor: MonitorConfig) -> Path:
    """Return where the model of a monitor is kept: as configured, or models/<monitor>.npz beside the config."""
    return monitor.model or config_file.resolve().parent / "models" / f"{monitor.name}.npz"


def registry_of(config: Config) -> Registry:
    """Return the plugins that this config can use."""
    return Registry(config.plugins)


AUTOMATIC = "auto"  # in a list of methods: regression and checks, and transition where the plant is nonlinear
_AUTOMATIC_METHODS = ("regression", "transition", "checks")
_ONLY_NONLINEAR = ("transition",)


def methods_of(monitor: MonitorConfig, registry: Registry, config_file: Path) -> list[tuple[str, Plugin, Any]]:
    """Return (name, plugin, parameters) of each method of a monitor, `auto` taken apart.

    Raises
    ------
    PluginError
        No such plugin, or it cannot be imported.
    ConfigError
        A parameter that the plugin does not know, or of the wrong type.
    """
    found = []
    where = f"monitors.{monitor.name}.methods"
    for item in _taken_apart(monitor.methods):
        given = {key: value for key, value in item.items() if key != "name"}
        try:
            found.append((item["name"], registry.get(item["name"]), registry.params(item["name"], given)))
        except ConfigError as error:
            raise ConfigError(error.problem, file=str(config_file), key=f"{where}.{error.key}", value=error.value,
                              expected=error.expected, next_step=error.next_step) from error
        except PluginError as error:
            raise PluginError(error.what, where=f"{config_file}: {where}", next_step=error.next_step) from error
    return found


def _taken_apart(methods: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for item in methods:
        found += [{"name": name} for name in _AUTOMATIC_METHODS] if item["name"] == AUTOMATIC else [item]
    return found


def only_nonlinear(monitor: MonitorConfig) -> tuple[str, ...]:
    """Return the methods of a monitor that are left out where the plant is linear."""
    return _ONLY_NONLINEAR if any(item["name"] == AUTOMATIC for item in monitor.methods) else ()


def setup_of(monitor: MonitorConfig, group: GroupConfig) -> dict[str, Any]:
    """Return what of a monitor's config decides its model, JSON-able, without paths of this machine."""
    def portable(key: str, value: Any) -> Any:
        return Path(value).name if key == "model" and not str(value).startswith("bundled:") else value

    setup: dict[str, Any] = {
        "tags": [tag.name for tag in monitor_tags(monitor, group)], "state_tag": monitor.state_tag,
        "methods": [{key: portable(key, value) for key, value in item.items()} for item in monitor.methods],
        "windows_ns": list(monitor.windows), "false_alarms_per_day": monitor.false_alarms_per_day,
        "settling_ns": monitor.settling or 0, "maintenance": monitor.maintenance,
    }
    cycle = cycle_of(monitor)
    if cycle is not None:
        for key in ("methods", "windows_ns", "state_tag", "settling_ns"):
            del setup[key]
        setup["cycle"] = asdict(cycle)
    return setup


def cycle_of(monitor: MonitorConfig) -> Cycle | None:
    """Return what cuts the stream of a monitor into parts, None where it judges row by row."""
    item = monitor.cycle
    return None if item is None else Cycle(item.tag, item.on, item.until, item.shortest or 0, item.longest or 0)


def changed_since_fit(monitor: MonitorConfig, group: GroupConfig, model: NormalityModel) -> list[str]:
    """Return the keys of the monitor's config that differ from those the model was fitted with."""
    fitted = model.facts.get("setup", {})
    now = json.loads(json.dumps(setup_of(monitor, group)))
    return [key for key, value in fitted.items() if now.get(key) != value]


@dataclass(frozen=True)
class Fitted:
    """One fitted monitor."""

    monitor: MonitorConfig
    model: NormalityModel
    report: FitReport
    path: Path


def fit_config(
    config: Config, config_file: Path, record_of: Callable[[GroupConfig], Record], *, only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Fitted]:
    """Fit the monitors of a config on a healthy record of each group; nothing is saved, see `keep_fitted`.

    `record_of` is called once per group and gives a record of the group's tags.
    """
    registry = registry_of(config)
    chosen = [config.monitor(name) for name in only] if only else list(config.monitors)
    if not chosen:
        raise ConfigError("no monitor is configured", file=str(config_file), key="monitors",
                          next_step="add a monitor; the samples in configs/ show one")
    prepared = [(monitor, methods_of(monitor, registry, config_file)) for monitor in chosen]
    records: dict[str, Record] = {}
    done = []
    for monitor, methods in prepared:
        group = config.group(monitor.group)
        if group.name not in records:
            records[group.name] = record_of(group)
        tags = monitor_tags(monitor, group)
        record = out_of_maintenance(records[group.name], monitor.maintenance).select([tag.name for tag in tags])
        record = replace(record, tags=tags)
        progress(f"monitor {monitor.name}: {len(record)} rows of {len(tags)} tags")
        cycle, setup = cycle_of(monitor), setup_of(monitor, group)
        if cycle is not None:
            model, report = fit_parts(
                monitor.name, record, cycle, false_alarms_per_day=monitor.false_alarms_per_day, setup=setup,
                progress=progress)
        else:
            model, report = fit_monitor(
                monitor.name, record, methods, state_tag=monitor.state_tag, windows_ns=monitor.windows,
                false_alarms_per_day=monitor.false_alarms_per_day, only_nonlinear=only_nonlinear(monitor), setup=setup,
                progress=progress, settling_ns=monitor.settling or 0)
        done.append(Fitted(monitor, model, report, model_path(config_file, monitor)))
    return done


def out_of_maintenance(record: Record, tag: str) -> Record:
    """Return the rows of a record on which a maintenance tag is Good and 0: others are not to be learnt.

    Raises
    ------
    RecordError
        No row is left.
    """
    if not tag:
        return record
    at = [one.name for one in record.tags].index(tag)
    rows = np.flatnonzero((record.valid[:, at] != 0) & (record.values[:, at] == 0))
    if len(rows) == 0:
        raise RecordError("every row of the record was taken in maintenance", where=f"maintenance tag {tag}",
                          next_step="take a record of normal operation, or correct the key 'maintenance'")
    return record if len(rows) == len(record) else record.take(rows)


def keep_fitted(fitted: Sequence[Fitted], store: Store) -> None:
    """Save the models and note them in the store, which is open by now: no model is replaced that cannot be noted."""
    for one in fitted:
        one.model.save(one.path)
        record_model(store, one.model, one.path)
        store.record_audit(AuditEntry("fit", "model fitted", {
            "monitor": one.monitor.name, "model_id": one.model.model_id, "rows": one.report.rows,
            "excluded": dict(one.report.excluded)}))


def alert_of(monitor: MonitorConfig) -> AlertSettings:
    """Return what makes an alert of a monitor's score."""
    return AlertSettings(monitor.on_delay, monitor.off_delay, monitor.severity, monitor.settling or 0, monitor.inhibit,
                         monitor.maintenance)


def open_monitor(
    monitor: MonitorConfig, group: GroupConfig, model: NormalityModel, registry: Registry,
) -> Monitor:
    """Open a fitted monitor for frames of its group.

    Raises
    ------
    ModelTagsError
        The model was fitted for another monitor, other tags, another state tag, another cycle or period.
    """
    if model.monitor != monitor.name:
        raise ModelTagsError(f"the model was fitted for monitor {model.monitor}", where=f"monitor {monitor.name}",
                             next_step="give this monitor its own model file, or fit it again")
    if is_part_model(model) != (monitor.cycle is not None):
        fitted, now = ("parts", "rows") if is_part_model(model) else ("rows", "parts")
        raise ModelTagsError(f"the model judges {fitted}, the config asks for {now}", where=f"monitor {monitor.name}",
                             next_step="fit the monitor again, or correct the key 'cycle'")
    model.require(monitor_tags(monitor, group), group.period)
    tags = group_tags(group)
    for key in changed_since_fit(monitor, group, model):
        if key in ("tags", "state_tag", "cycle"):
            fitted, now = model.facts["setup"][key], setup_of(monitor, group)[key]
            raise ModelTagsError(f"the model was fitted with {key} {fitted}, the config says {now}",
                                 where=f"monitor {monitor.name}", next_step="fit the monitor again")
    alert = alert_of(monitor)
    if is_part_model(model):
        return PartMonitor(monitor.name, model, tags, alert)
    columns = model.plan.columns
    methods = [registry.get(m.plugin).open(m, columns) for m in model.methods]
    return RowMonitor(monitor.name, model, methods, tags, alert)


def open_monitors(config: Config, config_file: Path, *, only: Sequence[str] = ()) -> dict[str, list[Monitor]]:
    """Load the models of a config and return group name -> opened monitors."""
    registry = registry_of(config)
    chosen = [config.monitor(name) for name in only] if only else list(config.monitors)
    opened: dict[str, list[Monitor]] = {}
    for monitor in chosen:
        group = config.group(monitor.group)
        model = load_model(model_path(config_file, monitor))
        opened.setdefault(group.name, []).append(open_monitor(monitor, group, model, registry))
    return opened


def record_model(store: Store, model: NormalityModel, path: Path) -> None:
    """Register a model file in the store."""
    header = {"tags": [t.name for t in model.tags], "excluded": dict(model.excluded), "methods": list(model.names),
              "facts": dict(model.facts), "notes": list(model.calibration.notes)}
    store.register_model(model.model_id, model.monitor, path, model.sha256, header)
