"""From a healthy record to the model of a monitor, with a report of what the record can and cannot support."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .api import Float64, Int64, Method, MethodModel, Plugin, Record, TagKind
from .calibration import MIN_HELD_OUT, Calibration, calibrate, held_out_residuals
from .columns import make_plan, usable_tags
from .errors import ConfigError, RecordError
from .limits import unlike_the_rest
from .model import NormalityModel
from .views import Part, is_nonlinear

MIN_ROWS = 250
MAX_STATES = 32
STRANGE_RESIDUAL = 5.0
OUR_PREDICTORS = ("regression", "transition")  # plugins whose errors make up the leading view
NONLINEAR_SHARE = 0.5  # of the tags that keep the nonlinear correction (`detector.md` 8, plant gate)


@dataclass(frozen=True)
class FitReport:
    """What a fit found.

    rows, seconds : length of the record in use; span_ns : its first and last SourceTimestamp
    excluded : tag -> reason; coverage : state -> share of rows (one entry where there is no state tag)
    suspicious : stretches of the "healthy" record that look unlike the rest: (from_ns, to_ns, how many times
        the usual level, channel group); notes : what the record cannot support
    """

    monitor: str
    rows: int
    seconds: float
    span_ns: tuple[int, int]
    gaps: int
    excluded: Mapping[str, str]
    coverage: Mapping[int, float]
    suspicious: tuple[tuple[int, int, float, str], ...] = ()
    notes: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)


def fit_monitor(
    name: str, record: Record, methods: Sequence[tuple[str, Plugin, Any]], *, state_tag: str = "",
    windows_ns: Sequence[int] = (), false_alarms_per_day: float = 1.0, only_nonlinear: Collection[str] = (),
    setup: Mapping[str, Any] | None = None, progress: Callable[[str], None] = lambda _: None,
) -> tuple[NormalityModel, FitReport]:
    """Fit a monitor on healthy rows.

    Parameters
    ----------
    record : rows of the monitor's tags (and its state tag), gaps marked
    methods : (name in the config, plugin, parameters)
    windows_ns : averaging windows, by default see `opcua_detector.views`
    only_nonlinear : names of methods that are left out where the methods before them find the plant linear

    Raises
    ------
    RecordError
        Too short, not increasing in time, or without a tag to judge.
    ConfigError
        The state tag is none.
    ModelTagsError
        A model trained elsewhere does not fit these tags.
    """
    _check_record(record)
    state, states = _states(record, state_tag)
    tags, excluded = usable_tags(record)
    plan = make_plan(tags)
    columns = plan.prepare(record.select([tag.name for tag in tags]))
    windows = _windows(windows_ns, record.period_ns)
    labels = _labels([name for name, _, _ in methods])

    models: list[MethodModel] = []
    parts: list[Part] = []
    learnt: list[str] = []
    strange: list[str] = []
    held_out: list[Float64] = []
    for label, (name_of, plugin, params) in zip(labels, methods, strict=True):
        if name_of in only_nonlinear and not is_nonlinear(parts):
            continue
        progress(f"fitting {label}")
        fitted = plugin.fit(columns, params)
        method = plugin.open(fitted, columns.tags)
        full = method.residuals(columns)
        progress(f"calibrating {label}")
        held_out.append(held_out_residuals(plugin, columns, _resolved(params, fitted), full))
        if plugin.learns:
            learnt.append(label)
        else:
            strange += _strangers(label, method, full)
        models.append(fitted)
        parts.append(_part(label, plugin, fitted, method, [plan.owner(c.column) for c in method.channels]))
    residual = np.concatenate(held_out, axis=1)
    calibration = calibrate(parts, residual, columns.gap, state, states, windows, record.period_ns / 1e9,
                            false_alarms_per_day, learnt)
    span = np.array([np.quantile(columns.values[columns.valid[:, c] != 0, c], [0.01, 0.99])
                     for c in range(len(plan.columns))])
    span_ns = (int(record.source_ns[0]), int(record.source_ns[-1]))
    facts = {"rows": len(record), "from_ns": span_ns[0], "to_ns": span_ns[1], "gaps": int(record.gap.sum()) - 1,
             "false_alarms_per_day": false_alarms_per_day, "given": [tag.name for tag in record.tags],
             "setup": dict(setup or {})}
    model = NormalityModel(name, tags, excluded, record.period_ns, state_tag,
                           tuple(part.label for part in parts), tuple(models), calibration, span, (), facts)
    report = _report(name, record, excluded, state, states, calibration, residual)
    return model, replace(report, notes=(*strange, *report.notes))


def _resolved(params: Any, fitted: MethodModel) -> Any:
    """Return the parameters with what the fit chose by itself, so that the folds do not choose again."""
    chosen = {f.name: fitted.params[f.name] for f in fields(params) if f.name in fitted.params}
    share = fitted.params.get("nonlinear_share")
    if share is not None and chosen["nonlinear"] == "auto":
        chosen["nonlinear"] = "on" if share == 1.0 else "off" if share == 0.0 else "auto"
    return replace(params, **chosen)


def _part(label: str, plugin: Plugin, fitted: MethodModel, method: Method, tags: Sequence[str]) -> Part:
    share = fitted.params.get("nonlinear_share")
    return Part(label, tuple(method.channels), tuple(tags), plugin.name in OUR_PREDICTORS,
                None if share is None else float(share) >= NONLINEAR_SHARE)


def _check_record(record: Record) -> None:
    if len(record) < MIN_ROWS:
        raise RecordError(f"the healthy record is too short to calibrate: {len(record)} rows, {MIN_ROWS} needed",
                          where=f"{len(record) * record.period_ns / 1e9:.1f} s at {record.period_ns / 1e6:g} ms",
                          next_step="take a longer history, or record longer")
    steps = np.diff(record.source_ns)
    if (steps <= 0).any():
        row = int(np.flatnonzero(steps <= 0)[0]) + 1
        raise RecordError("timestamps do not increase", where=f"row {row}, {record.source_ns[row]} ns",
                          next_step="sort the record by time and remove duplicates")


def _states(record: Record, state_tag: str) -> tuple[Int64, tuple[int, ...]]:
    """Return (index of the state of each row, -1 where unknown; the learnt states)."""
    if not state_tag:
        return np.zeros(len(record), np.int64), (0,)
    at = next((i for i, tag in enumerate(record.tags) if tag.name == state_tag), -1)
    if at < 0 or record.tags[at].kind is not TagKind.STATE:
        raise ConfigError("the state tag must be a tag of kind state", key="state_tag", value=state_tag,
                          next_step="set `kind: state` on that tag")
    ok = record.valid[:, at] != 0
    values = np.where(ok, record.values[:, at], -1).astype(np.int64)
    found, counts = np.unique(values[ok], return_counts=True)
    learnt = tuple(int(v) for v, n in zip(found, counts, strict=True) if n >= MIN_HELD_OUT + 200)
    if not learnt or len(learnt) > MAX_STATES:
        raise RecordError(f"the state tag takes {len(found)} values, {len(learnt)} of them long enough to learn",
                          where=f"tag {state_tag}", next_step="take a longer record or another state tag")
    index = {value: i for i, value in enumerate(learnt)}
    state = np.array([index.get(int(v), -1) if good else -1 for v, good in zip(values, ok, strict=True)], np.int64)
    return state, learnt


def _strangers(label: str, method: Method, residual: Float64) -> list[str]:
    """Return notes on channels whose healthy residual is far above that of the method's own training.

    A residual of a graph trained elsewhere is in units of its usual error there, so its median is about 1 or less.
    """
    notes = []
    for c, channel in enumerate(method.channels):
        known = residual[~np.isnan(residual[:, c]), c]
        times = float(np.median(known)) if len(known) else 0.0
        if channel.kind == "forecast" and times > STRANGE_RESIDUAL:
            notes.append(f"{label}: on {channel.tag} it errs {times:.0f} times as much as where it was trained: "
                         "another plant, another sampling, or shifted time stamps; train a model of this plant, or "
                         "leave it out")
    return notes


def _windows(windows_ns: Sequence[int], period_ns: int) -> list[int]:
    return [max(2, round(w / period_ns)) for w in windows_ns]


def _labels(names: Sequence[str]) -> list[str]:
    """Number the second and later use of a method: onnx, onnx2."""
    return [n if names[:i].count(n) == 0 else f"{n}{names[:i].count(n) + 1}" for i, n in enumerate(names)]


def _report(
    name: str, record: Record, excluded: Mapping[str, str], state: Int64, states: Sequence[int],
    calibration: Calibration, held_out: Float64,
) -> FitReport:
    coverage = {int(value): float(np.mean(state == i)) for i, value in enumerate(states)}
    if (state < 0).any():
        coverage[-1] = float(np.mean(state < 0))
    _, _, values = calibration.scorer().rows(held_out, record.gap, state, details=True)
    found: list[tuple[int, int, float, str]] = []
    for v, view in enumerate(calibration.views):
        if view.role != "fixed":
            found += _stretches(values[:, v], record.source_ns, int(calibration.windows[view.windows[0]]), view.name)
    found.sort(key=lambda item: -item[2])
    limits = {f"{view.name}, {', '.join(str(int(calibration.windows[w])) for w in view.windows)} rows":
              float(calibration.limit[0, v]) for v, view in enumerate(calibration.views)}
    return FitReport(
        name, len(record), len(record) * record.period_ns / 1e9, (int(record.source_ns[0]), int(record.source_ns[-1])),
        int(record.gap.sum()) - 1, excluded, coverage, tuple(found[:5]), calibration.notes, limits)


def _stretches(value: Float64, source_ns: Int64, window: int, view: str) -> list[tuple[int, int, float, str]]:
    """Return (from_ns, to_ns, healthy spreads above the median, view) of stretches unlike the rest."""
    return [
        (int(source_ns[max(0, run[0] - window + 1)]), int(source_ns[run[-1]]), float(value[run].max()), view)
        for run in unlike_the_rest(value, window)
    ]
