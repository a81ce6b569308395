"""Fit a monitor of a cyclic process: from a healthy record to a model, and what the record cannot support."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..api import Channel, Float64, Int64, Record, Tag, UInt8
from ..calibration import DAY_S, Calibration
from ..columns import ColumnPlan, make_plan, usable_tags
from ..errors import ConfigError, RecordError
from ..fitting import FitReport
from ..guards import learn_guards
from ..kernels.parts import part_features, run_rows
from ..limits import unlike_the_rest
from ..model import NormalityModel
from .corridor import held_out, peak_limit, pooled_corridor, spread_floors, time_limits
from .cut import Cut, cut_record
from .judge import ENOUGH_VALID
from .model import BIN, KINDS, NOISE, PHASE, PLUGIN, Cycle, PartModel, feature_kinds

MIN_PARTS = 30
MIN_PART_ROWS = 4
MAX_BINS, PHASES = 64, 10
BRIDGED_SHARE, MIN_BRIDGED = 0.02, 2  # of the usual part, rows: the trigger may be missing for so long
ODD_SPREADS, ODD_SHARE = 8.0, 0.25  # a part this far from the usual time is no example of a healthy one
ODD_TIMES = 3.5  # times the usual departure: a healthy part among hundreds reaches 3
SUPPORTED = 100.0  # the tail is trusted for so many times what was seen


@dataclass(frozen=True)
class _Parts:
    """Whole healthy parts. begin, rows int64[p]; features float64[p, r, c]."""

    begin: Int64
    rows: Int64
    features: Float64


def fit_parts(
    name: str, record: Record, cycle: Cycle, *, false_alarms_per_day: float = 1.0,
    setup: Mapping[str, Any] | None = None, progress: Callable[[str], None] = lambda _: None,
) -> tuple[NormalityModel, FitReport]:
    """Fit a monitor of a cyclic process on healthy rows.

    Parts that are cut by the record, by a gap or by a missing trigger, that took far too short or too long or are
    mostly masked are left out and counted. The corridor is the median and a robust spread over parts, neighbouring
    bins pooled; its limits come from held-out parts (five contiguous folds) and the alarm budget.

    Parameters
    ----------
    record : rows of the monitor's tags and of the trigger, gaps marked
    false_alarms_per_day : alarm budget, shared evenly by all kinds of departure of all columns

    Raises
    ------
    RecordError
        Fewer than 30 whole parts, no tag to judge, or times that do not increase.
    ConfigError
        The trigger is none of the tags.
    """
    judged = _check(record, cycle)
    used, excluded = usable_tags(record.select([tag.name for tag in judged]))
    inputs = [tag.name for tag in record.tags if not tag.judged and tag.name != cycle.tag]
    excluded |= {tag: "an input: parts are judged by measured tags" for tag in inputs}
    plan = make_plan(used)
    columns = plan.prepare(record)
    progress("cutting parts")
    cut, usual, tolerance = _cut(record, cycle)
    kept, reasons = _healthy(cut, columns, cycle, usual)
    if len(kept) < MIN_PARTS:
        raise RecordError(
            f"the healthy record holds {len(kept)} whole parts, {MIN_PARTS} needed{_left_out(reasons)}",
            where=f"trigger {cycle.tag}, on: {cycle.on}", next_step=(
                "record longer, or check the keys 'tag', 'on' and 'until' of the cycle"))
    progress(f"learning {len(kept)} parts")
    rows = (cut.end - cut.begin)[kept]
    usual = float(np.median(rows))
    n_bins = int(min(MAX_BINS, max(MIN_PART_ROWS, usual // 2)))
    n_phases = min(PHASES, n_bins)
    width = usual / n_bins
    n_run = int(rows.max() / width)
    kind = feature_kinds(n_run, n_bins, n_phases)
    parts = _Parts(cut.begin[kept], rows, _features(columns, cut, kept, width, (n_run, n_bins, n_phases), len(kind)))
    floor = spread_floors(plan, columns, kind)
    per_day = len(cut.begin) / (len(record) * record.period_ns / 1e9) * DAY_S
    n_limits = len(KINDS) * len(plan.columns) + 1
    rate = false_alarms_per_day / per_day / n_limits
    progress("calibrating")
    worst, late = held_out(parts.features, rows, kind, floor)
    limit = np.array([[peak_limit(worst[:, k, c], rate, int((kind == k).sum())) for c in range(worst.shape[2])]
                      for k in range(len(KINDS))])
    center, spread = pooled_corridor(parts.features, kind, floor)
    model = PartModel(cycle, tuple(c.name for c in plan.columns), record.period_ns, tolerance, width, n_run, n_bins,
                      n_phases, center, spread, limit, time_limits(rows, late, rate, cycle, record.period_ns))
    notes = _notes(parts, model, reasons, per_day, false_alarms_per_day, n_limits)
    trigger = next(tag for tag in record.tags if tag.name == cycle.tag)
    fitted = _normality_model(name, record, plan, (*used, trigger), excluded, model, notes, {
        "rows": len(record), "from_ns": int(record.source_ns[0]), "to_ns": int(record.source_ns[-1]),
        "gaps": int(record.gap.sum()) - 1, "false_alarms_per_day": false_alarms_per_day, "setup": dict(setup or {}),
        "parts": len(kept), "parts_left_out": reasons, "parts_per_day": per_day,
        "guards": learn_guards(record.select([tag.name for tag in used]), usual_errors(used, model))})
    return fitted, _report(name, record, excluded, model, parts, worst, notes)


def usual_errors(tags: Sequence[Tag], model: PartModel) -> Float64:
    """Return float64[n_tags]: how small a change of a tag shows in parts, in its unit; 0 for what is not judged as is.

    The least healthy spread of its bins, or its usual change from row to row where that is less.
    """
    usual = np.zeros(len(tags))
    fine = np.where(model.kind == BIN, True, model.kind == PHASE)
    with np.errstate(all="ignore"):
        least = np.fmin.reduce(model.spread[fine], axis=0, initial=np.inf)
    least = np.fmin(least, model.center[model.kind == NOISE][0])
    for i, tag in enumerate(tags):
        if tag.name in model.columns:
            error = float(least[model.columns.index(tag.name)])
            usual[i] = error if math.isfinite(error) else 0.0
    return usual


def _check(record: Record, cycle: Cycle) -> list[Tag]:
    """Return the tags that are judged, all but the trigger."""
    known = [tag.name for tag in record.tags]
    if cycle.tag not in known:
        raise ConfigError("the trigger is none of the monitor's tags", key="cycle.tag", value=cycle.tag,
                          expected=f"one of {', '.join(known)}", next_step="correct the name, or add the tag")
    steps = np.diff(record.source_ns)
    if (steps <= 0).any():
        row = int(np.flatnonzero(steps <= 0)[0]) + 1
        raise RecordError("timestamps do not increase", where=f"row {row}, {record.source_ns[row]} ns",
                          next_step="sort the record by time and remove duplicates")
    judged = [tag for tag in record.tags if tag.judged and tag.name != cycle.tag]
    if not judged:
        raise RecordError("no tag is left to judge", where=f"trigger {cycle.tag}",
                          next_step="add measured tags beside the trigger")
    return judged


def _cut(record: Record, cycle: Cycle) -> tuple[Cut, float, int]:
    """Return (parts, usual rows of a part, rows of a missing trigger that are bridged)."""
    cut = cut_record(record, cycle, MIN_BRIDGED)
    whole = cut.whole != 0
    if not whole.any():
        raise RecordError(f"the trigger cuts no whole part out of the record: it fired {len(cut.begin)} times",
                          where=f"trigger {cycle.tag}, on: {cycle.on}",
                          next_step="check tag and 'on' of the cycle, or take a record in which parts are made")
    usual = float(np.median((cut.end - cut.begin)[whole]))
    if usual < MIN_PART_ROWS:
        raise RecordError(f"a part has {usual:g} rows, {MIN_PART_ROWS} needed",
                          where=f"trigger {cycle.tag}, on: {cycle.on}, period {record.period_ns / 1e6:g} ms",
                          next_step="take a shorter period of the group, or check what the trigger does")
    tolerance = max(MIN_BRIDGED, int(BRIDGED_SHARE * usual))
    return cut_record(record, cycle, tolerance), usual, tolerance


def _healthy(cut: Cut, columns: Record, cycle: Cycle, usual: float) -> tuple[Int64, dict[str, int]]:
    """Return (numbers of the parts to learn from, reason -> how many are left out for it)."""
    rows = cut.end - cut.begin
    whole = cut.whole != 0
    spread = 1.4826 * float(np.median(np.abs(rows[whole] - usual)))
    usual_time = np.abs(rows - usual) <= max(ODD_SPREADS * spread, ODD_SHARE * usual)
    at_ns = rows * columns.period_ns
    usual_time &= at_ns >= cycle.shortest_ns
    if cycle.longest_ns:
        usual_time &= at_ns <= cycle.longest_ns
    known = np.concatenate([[0.0], np.cumsum(columns.valid.mean(axis=1))])
    seen = (known[cut.end] - known[cut.begin]) / np.maximum(rows, 1) >= ENOUGH_VALID
    reasons = {
        "cut by the ends of the record, a gap or a missing trigger": int((~whole).sum()),
        "far too short or too long": int((whole & ~usual_time).sum()),
        "mostly masked": int((whole & usual_time & ~seen).sum()),
    }
    return np.flatnonzero(whole & usual_time & seen), reasons


def _left_out(reasons: Mapping[str, int]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f"; left out: {told}" if told else ""


def _features(columns: Record, cut: Cut, kept: Int64, width: float, counts: tuple[int, int, int],
              n_rows: int) -> Float64:
    """Return float64[p, r, c]: what each part is like."""
    n_run, n_bins, n_phases = counts
    out = np.full((len(kept), n_rows, len(columns.tags)), np.nan)
    for i, p in enumerate(kept):
        rows = slice(int(cut.begin[p]), int(cut.end[p]))
        values: Float64 = columns.values[rows]
        valid: UInt8 = columns.valid[rows]
        means = np.empty((n_run, values.shape[1]))
        run_rows(values, valid, width, means)
        out[i, :n_run] = means
        part_features(values, valid, len(values), n_run, n_bins, n_phases, out[i])
    return out


def _notes(parts: _Parts, model: PartModel, reasons: Mapping[str, int], per_day: float, budget: float,
           n_limits: int) -> tuple[str, ...]:
    seconds = np.array([parts.rows.min(), parts.rows.max()]) * model.period_ns / 1e9
    notes = [f"{len(parts.rows)} parts learnt, {seconds[0]:.4g} to {seconds[1]:.4g} s each{_left_out(reasons)}"]
    wanted = per_day / budget
    if wanted > SUPPORTED * len(parts.rows):
        notes.append(
            f"{len(parts.rows)} parts are too few to support {budget:g} false alarms a day at {per_day:.0f} parts a "
            f"day, which is one in {wanted:.0f}: the limit is extrapolated; learn from "
            f"{math.ceil(wanted / SUPPORTED)} parts or more, or allow more false alarms")
    return tuple(notes)


def _normality_model(
    name: str, record: Record, plan: ColumnPlan, tags: tuple[Tag, ...], excluded: Mapping[str, str],
    model: PartModel, notes: tuple[str, ...], facts: Mapping[str, Any],
) -> NormalityModel:
    channels = [Channel(c.name, plan.owner(c.name), kind) for kind in KINDS for c in plan.columns]
    channels.append(Channel(model.cycle.tag, model.cycle.tag, "time"))
    columns = plan.prepare(record)
    span = [np.quantile(columns.values[columns.valid[:, c] != 0, c], [0.01, 0.99]) for c in range(len(plan.columns))]
    return NormalityModel(name, tags, dict(excluded), record.period_ns, "", (PLUGIN,), (model.to_method(),),
                          _channels_alone(channels, notes), np.array([*span, [0.0, 1.0]]), (), dict(facts))


def _channels_alone(channels: Sequence[Channel], notes: tuple[str, ...]) -> Calibration:
    """Return a calibration that says what the channels are and nothing else: limits of parts are in their corridor."""
    empty: dict[str, Any] = {"Float64": np.zeros(0), "Int64": np.zeros(0, np.int64)}
    values = {f.name: empty.get(str(f.type), ()) for f in fields(Calibration)}
    return Calibration(**values | {"channels": tuple(channels), "states": (0,), "notes": notes})


def _report(name: str, record: Record, excluded: Mapping[str, str], model: PartModel,
            parts: _Parts, worst: Float64, notes: tuple[str, ...]) -> FitReport:
    limits = {f"{kind} of {column}": float(model.limit[k, c])
              for k, kind in enumerate(KINDS) for c, column in enumerate(model.columns)
              if math.isfinite(model.limit[k, c])}
    seconds = model.rows * model.period_ns / 1e9
    limits |= {"shortest part, s": float(seconds[0]), "longest part, s": float(seconds[2])}
    usual = np.nanmedian(worst, axis=0) if len(worst) else worst
    times = np.nan_to_num(worst / np.maximum(usual, 0.1), nan=0.0).reshape(len(worst), -1)
    stat = times.max(axis=1)
    level = float(np.median(stat))
    found = []
    for run in unlike_the_rest(stat, 1):
        peak = int(run[np.argmax(stat[run])])
        if stat[peak] < ODD_TIMES * level:
            continue
        column = model.columns[int(np.argmax(times[peak])) % len(model.columns)]
        last = int(parts.begin[run[-1]] + parts.rows[run[-1]]) - 1
        found.append((int(record.source_ns[parts.begin[run[0]]]), int(record.source_ns[last]),
                      float(stat[peak] / level), f"{PLUGIN}/{column}"))
    found.sort(key=lambda item: -item[2])
    return FitReport(name, len(record), len(record) * record.period_ns / 1e9,
                     (int(record.source_ns[0]), int(record.source_ns[-1])), int(record.gap.sum()) - 1, dict(excluded),
                     {0: 1.0}, tuple(found[:5]), notes, limits)
