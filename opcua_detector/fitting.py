"""From a healthy record to the model of a monitor, with a report of what the record can and cannot support."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .absence import learn_absence
from .api import Float64, Int64, Method, MethodModel, Plugin, Record, Tag, TagKind, UInt8
from .calibration import MIN_HELD_OUT, Calibration, calibrate, held_out_residuals
from .columns import ColumnPlan, make_plan, usable_tags
from .detectors.checks import LEAST_CHANGES, far_from
from .errors import ConfigError, RecordError
from .guards import lasted, learn_guards, settling_rows
from .model import NormalityModel
from .suspicious import respond_unlike_the_rest, unlike_the_rest
from .views import ERROR_KINDS, Part, is_nonlinear

MIN_ROWS = 250
MAX_STATES = 32
STRANGE_RESIDUAL = 5.0
OUR_PREDICTORS = ("regression", "transition")  # plugins whose errors make up the leading view
NEAR_CONSTANT = 2  # steps of its resolution within which a near-constant tag stays
SMALL_STEP = 0.02  # of the largest value: such a step
FLOOR = "checks"  # the method that looks at near-constant tags, and at those that stand still
NONLINEAR_SHARE = 0.5  # of the tags that keep the nonlinear correction (`detector.md` 8, plant gate)


@dataclass(frozen=True)
class FitReport:
    """What a fit found.

    rows, seconds : length of the record in use; span_ns : its first and last SourceTimestamp
    excluded : tag -> reason why no method learns it
    coverage : learnt state -> share of rows (one entry where there is no state tag)
    not_learnt : share of rows in a state that was too short to learn, or unknown; settling : share of rows within the
        settling time after a change of state, which set no limit
    suspicious : lasting stretches of the "healthy" record that look unlike the rest: (from_ns, to_ns, healthy spreads
        above the median, view), the highest first; notes : what the record cannot support
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
    not_learnt: float = 0.0
    settling: float = 0.0


def fit_monitor(
    name: str, record: Record, methods: Sequence[tuple[str, Plugin, Any]], *, state_tag: str = "",
    windows_ns: Sequence[int] = (), false_alarms_per_day: float = 1.0, only_nonlinear: Collection[str] = (),
    setup: Mapping[str, Any] | None = None, progress: Callable[[str], None] = lambda _: None, settling_ns: int = 0,
) -> tuple[NormalityModel, FitReport]:
    """Fit a monitor on healthy rows.

    Parameters
    ----------
    record : rows of the monitor's tags (and its state tag), gaps marked
    methods : (name in the config, plugin, parameters)
    windows_ns : averaging windows, by default see `opcua_detector.views`
    only_nonlinear : names of methods that are left out where the methods before them find the plant linear
    settling_ns : rows so long after a change of the state tag are learnt, but set no limit

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
    tags, excluded, loud = _tags_in_use(record, any(plugin.name == FLOOR for _, plugin, _ in methods))
    plan = make_plan(tags)
    columns = plan.prepare(record.select([tag.name for tag in tags]))
    learnable = columns.select([c.name for c in columns.tags if plan.owner(c.name) in loud])
    windows = _windows(windows_ns, record.period_ns)
    labels = _labels([name for name, _, _ in methods])

    models: list[MethodModel] = []
    parts: list[Part] = []
    learnt: list[str] = []
    strange: list[str] = []
    held_out: list[Float64] = []
    as_learnt: list[Float64] = []
    opened: list[tuple[Method, Record, Float64]] = []
    for label, (name_of, plugin, params) in zip(labels, methods, strict=True):
        if name_of in only_nonlinear and not is_nonlinear(parts):
            continue
        progress(f"fitting {label}")
        # A method that was trained elsewhere has learnt what it needs there.
        rows = columns if plugin.name == FLOOR or not plugin.learns else learnable
        fitted = plugin.fit(rows, params)
        method = plugin.open(fitted, rows.tags)
        full = method.residuals(rows)
        progress(f"calibrating {label}")
        as_learnt.append(full)
        opened.append((method, rows, full))
        held_out.append(held_out_residuals(plugin, rows, _resolved(params, fitted), full, method.channels, fitted))
        if plugin.learns:
            learnt.append(label)
        else:
            strange += _strangers(label, method, full)
        models.append(fitted)
        parts.append(_part(label, plugin, fitted, method, [plan.owner(c.column) for c in method.channels]))
    residual = np.concatenate(held_out, axis=1)
    settling, judged = _without_settling(record, state, state_tag, settling_ns)
    gap = _gap_after(columns.gap, settling)
    own = record.select([tag.name for tag in tags])
    guards = learn_guards(own, _usual_errors(tags, columns, parts, residual))
    calibration = calibrate(parts, residual, gap, judged, states, windows, record.period_ns / 1e9,
                            false_alarms_per_day, learnt, _resolutions(guards, columns, parts))
    if len(tags) > 1:
        progress("hiding each tag in turn")
        absent = learn_absence(opened, columns, plan.index.tolist(), calibration.windows)
        calibration = replace(calibration, absent=absent)
    guards["still"] = _stand_still(models, plan, guards["tags"], int(calibration.windows[0]))
    span = np.array([np.quantile(columns.values[columns.valid[:, c] != 0, c], [0.01, 0.99])
                     for c in range(len(plan.columns))])
    span_ns = (int(record.source_ns[0]), int(record.source_ns[-1]))
    facts = {"rows": len(record), "from_ns": span_ns[0], "to_ns": span_ns[1], "gaps": int(record.gap.sum()) - 1,
             "false_alarms_per_day": false_alarms_per_day, "given": [tag.name for tag in record.tags],
             "setup": dict(setup or {}),
             "guards": guards}
    model = NormalityModel(name, tags, excluded, record.period_ns, state_tag,
                           tuple(part.label for part in parts), tuple(models), calibration, span, (), facts)
    report = _report(name, record, excluded, state, judged, gap, states, calibration, residual,
                     np.concatenate(as_learnt, axis=1), learnable)
    return model, replace(report, notes=(*strange, *report.notes), settling=float(settling.mean()))


def _tags_in_use(record: Record, floor: bool) -> tuple[tuple[Tag, ...], dict[str, str], frozenset[str]]:
    """Return (tags of the model, tag -> why no method learns it, names of those that are learnt).

    Left out for good is what `usable_tags` names. A near-constant tag, and a constant one whose unit has a range, is
    learnt by no method and no partner of another tag, but stays with the method `checks` where there is one (`floor`),
    so that it is told when it leaves its values by far. A constant tag without such a range is left out for good:
    nothing says what would be far, and an alert for each change of each of them would stand until the next fit.

    Raises
    ------
    RecordError
        No tag is left to judge.
    """
    usable, excluded = usable_tags(record)
    at = {tag.name: i for i, tag in enumerate(record.tags)}
    quiet: dict[str, float] = {}
    for tag in record.tags:
        i = at[tag.name]
        x = record.values[record.valid[:, i] != 0, i]
        low, high = float(x.min()), float(x.max())
        reason = ""
        if tag in usable:
            reason = _near_constant(tag, record, i)
        elif high == low and tag.kind is TagKind.MEASURED and tag.eu_range is not None:
            reason = f"{excluded[tag.name]}: nothing to learn; record a time in which it moves, or leave it out"
        if reason:
            quiet[tag.name] = far_from(tag, low, high)
            watched = floor and quiet[tag.name] > 0 and _changes(record, i) < LEAST_CHANGES
            excluded[tag.name] = reason + (
                f"; told only when it leaves {low - quiet[tag.name]:.6g} to {high + quiet[tag.name]:.6g}"
                if watched else "")
    loud = frozenset(tag.name for tag in usable if tag.name not in quiet)
    if not any(tag.judged for tag in usable if tag.name in loud):
        raise RecordError("no tag is left to judge", where="; ".join(f"{a}: {why}" for a, why in excluded.items()),
                          next_step="add measured tags that move, or take a record in which they move")
    kept = tuple(tag for tag in record.tags if tag.name in loud or (floor and tag.name in quiet))
    return kept, excluded, loud


def _near_constant(tag: Tag, record: Record, i: int) -> str:
    """Return why a judged tag moves too little to be learnt, empty where it moves enough.

    It changed fewer than `LEAST_CHANGES` times, or it has two values whose distance is small beside them: the last
    digit flickers.
    """
    if not tag.judged:
        return ""
    again = "record a time in which it moves, or leave it out"
    changes = _changes(record, i)
    if changes < LEAST_CHANGES:
        times = "once" if changes == 1 else f"{changes} times"
        return f"moved {times} in {lasted(len(record) * record.period_ns / 1e9)} of healthy record: not learnt; {again}"
    x = record.values[record.valid[:, i] != 0, i]
    low, high = float(x.min()), float(x.max())
    if tag.kind is TagKind.MEASURED and high - low <= SMALL_STEP * max(abs(low), abs(high)) and (
            (x == low) | (x == high)).all():
        return f"moved by no more than one step of its resolution, {low:.6g} to {high:.6g}: not learnt; {again}"
    return ""


def _changes(record: Record, i: int) -> int:
    """Return how often a tag took another value, from one valid row to the next without a gap between."""
    known = np.flatnonzero((record.valid[:, i] != 0) & np.isfinite(record.values[:, i]))
    stretch = np.cumsum(record.gap)[known]
    return int(((np.diff(record.values[known, i]) != 0) & (np.diff(stretch) == 0)).sum())


def _stand_still(
    models: Sequence[MethodModel], plan: ColumnPlan, watched: Collection[str], window: int,
) -> dict[str, Any]:
    """Return from which run of equal values on a tag is masked for all methods but the checks (`guards`).

    JSON-able: tags; after, longest: rows; period_s. From a window of rows after the limit of the checks on, so that
    their alert stands already. Not counters: what stands still is their step, and it needs two valid rows.
    """
    rows: dict[str, tuple[int, int]] = {}
    period_s = 1.0
    for model in (m for m in models if m.plugin == FLOOR):
        a, period_s = model.arrays, model.period_ns / 1e9
        for name, moves, longest, allowance in zip(model.columns, a["moves"], a["longest"], a["stuck_allowance"],
                                                   strict=True):
            tag = plan.owner(name)
            if moves and tag in watched and not any(c.name == name and c.kind is TagKind.COUNTER
                                                    for c in plan.columns):
                after = math.ceil(longest + allowance) + window
                before = rows.get(tag, (0, 0))
                rows[tag] = (max(before[0], after), max(before[1], int(longest)))
    return {"tags": [*rows], "after": [after for after, _ in rows.values()],
            "longest": [longest for _, longest in rows.values()], "period_s": period_s}


def _resolutions(guards: Mapping[str, Any], columns: Record, parts: Sequence[Part]) -> Float64:
    """Return float64[n_channels]: resolution of a near-constant tag in units of an error channel, 0 for all others.

    Near-constant: all values lie within `NEAR_CONSTANT` steps of the resolution, and that is small beside them; what
    goes from 0 to 1 says something by it. A coarse tag that does move keeps the scale of its errors (a floor for
    every tag, or for those of two values, cost .08 VUS-PR on the design half of ASD). An error is in standard
    deviations of its column; a counter's and an angle's columns are not the tag itself and have no floor.
    """
    step = dict(zip(guards["tags"], guards["step"], strict=True))
    at = {tag.name: i for i, tag in enumerate(columns.tags)}
    out = []
    for part in parts:
        for channel, tag in zip(part.channels, part.tags, strict=True):
            floor = 0.0
            if channel.kind in ERROR_KINDS and channel.column == tag and part.predicts and tag in step:
                x = columns.values[columns.valid[:, at[tag]] != 0, at[tag]]
                spread = float(x.std())
                small = step[tag] <= SMALL_STEP * float(np.abs(x).max())
                if spread > 0 and small and np.ptp(x) <= (NEAR_CONSTANT + 0.5) * step[tag]:
                    floor = step[tag] / spread
            out.append(floor)
    return np.array(out)


def _without_settling(record: Record, state: Int64, state_tag: str, settling_ns: int) -> tuple[UInt8, Int64]:
    """Return (uint8[n], 1 while settling; the states with -1 there)."""
    if not state_tag or settling_ns <= 0:
        return np.zeros(len(record), np.uint8), state
    at = [tag.name for tag in record.tags].index(state_tag)
    settling = settling_rows(record.values[:, at], record.valid[:, at], record.source_ns, settling_ns)
    return settling, np.where(settling != 0, -1, state)


def _gap_after(gap: UInt8, settling: UInt8) -> UInt8:
    """Return the gaps with one where settling ends: the windows of the score start anew there, as in the stream."""
    out = gap.copy()
    out[1:] |= settling[:-1] & (1 - settling[1:])
    return out


def _usual_errors(tags: Sequence[Tag], columns: Record, parts: Sequence[Part], held_out: Float64) -> Float64:
    """Return float64[n_tags]: median held-out error of the sharpest forecast of a tag, in its unit; 0 = none."""
    out = np.full(len(tags), np.inf)
    at = {tag.name: i for i, tag in enumerate(tags)}
    channels = [(channel, tag) for part in parts for channel, tag in zip(part.channels, part.tags, strict=True)]
    names = [tag.name for tag in columns.tags]
    for c, (channel, tag) in enumerate(channels):
        if channel.kind not in ERROR_KINDS:
            continue
        column = names.index(channel.column)
        known = held_out[~np.isnan(held_out[:, c]), c]
        spread = float(columns.values[columns.valid[:, column] != 0, column].std())
        if len(known):
            out[at[tag]] = min(out[at[tag]], float(np.median(known)) * spread)
    return np.where(np.isfinite(out), out, 0.0)


def _resolved(params: Any, fitted: MethodModel) -> Any:
    """Return the parameters with what the fit chose by itself, so that the folds do not choose again."""
    chosen = {f.name: fitted.params[f.name] for f in fields(params) if f.name in fitted.params}
    return replace(params, **chosen)


def _part(label: str, plugin: Plugin, fitted: MethodModel, method: Method, tags: Sequence[str]) -> Part:
    share = fitted.params.get("plant_share", fitted.params.get("nonlinear_share"))
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
    name: str, record: Record, excluded: Mapping[str, str], state: Int64, judged: Int64, gap: UInt8,
    states: Sequence[int], calibration: Calibration, held_out: Float64, as_learnt: Float64, columns: Record,
) -> FitReport:
    coverage = {int(value): float(np.mean(state == i)) for i, value in enumerate(states)}
    _, _, values = calibration.scorer().rows(held_out, gap, judged, details=True)
    _, _, again = calibration.scorer().rows(as_learnt, gap, judged, details=True)
    found = unlike_the_rest(calibration, values, again, record.source_ns)
    if len(states) == 1:  # each state may respond in its own way
        found += [one for one in respond_unlike_the_rest(columns)
                  if not any(one[0] <= stop and start <= one[1] for start, stop, _, _ in found)]
        found.sort(key=lambda item: -item[2])
    limits = {f"{view.name}, {', '.join(str(int(calibration.windows[w])) for w in view.windows)} rows":
              float(calibration.limit[0, v]) for v, view in enumerate(calibration.views)}
    return FitReport(
        name, len(record), len(record) * record.period_ns / 1e9, (int(record.source_ns[0]), int(record.source_ns[-1])),
        int(record.gap.sum()) - 1, excluded, coverage, tuple(found[:5]), calibration.notes, limits,
        float(np.mean(state < 0)))
