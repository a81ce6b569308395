"""Feedback on monitors of parts: a part that was declared normal widens the corridor of the features that were out.

The bounds of `Policy` hold here as for rows: no value far beyond the healthy range of its tag or outside its EURange,
no feature further off its corridor, as fitted, than the protected part of the tag's healthy span, no time that the
configured cycle excludes, nothing that stands still, and nothing that keeps trending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..api import Record
from ..kernels.columns import SAME
from ..model import NormalityModel
from ..parts import TIME, WIDER, BadPart, Departure, PartModel, bad_parts
from .deltas import Delta, delta_id_of, fitted_methods, with_delta
from .false_alarm import about_of
from .fold import make_room
from .policy import Feedback, Outcome, Policy, Refused
from .refusals import check_trend
from .words import until_text, value_text

LEVELS: Final = ("run", "bin", "phase", "mean")  # kinds that are values of the tag itself
STILL: Final = 0.05  # of what is usual: less swing or noise is a tag that stands still
TIMES_USUAL: Final = 5.0  # protected parts of what is usual that swing and noise may go beyond their corridor


def part_feedback(
    model: NormalityModel, record: Record, feedback: Feedback, policy: Policy, kept_back: NDArray[np.bool_],
) -> Outcome:
    """Take in what an operator says of the whole parts of an interval.

    kept_back : bool[n]; rows of the record on which alerts are kept back: their parts are neither bad nor taken in

    Raises
    ------
    Refused
        The part is too far from what was learnt, with the tag, what it did and the limit.
    RecordError
        No whole part of the interval is there.
    """
    fitted = fitted_methods(model)[0]
    found = bad_parts(model, fitted, record, feedback.start_ns, feedback.end_ns, kept_back)
    if feedback.label == "missed":
        if found:
            return Outcome("unchanged", model, "nothing to change: the monitor alarms in this interval already; noted "
                                               f"as true for evaluation; model {model.model_id}")
        return Outcome("noted", model, "noted as true for evaluation: parts have no limit that could be lowered; fit "
                                       "again with more parts, or with a larger alarm budget")
    if not found:
        return Outcome("unchanged", model, f"nothing to change: no part of this interval is bad; model "
                                           f"{model.model_id}")
    corridor = PartModel.from_method(fitted)
    for bad in found:
        for departure in bad.departures:
            _check(model, corridor, bad, departure, policy)
    reach = _reach(model, corridor, found)
    check_trend(model, reach, policy)
    about = {**about_of(feedback, policy), "reach": reach, "parts": [bad.part.number for bad in found],
             "text": _words(model, corridor, found)}
    arrays = {WIDER: np.concatenate([bad.wanted for bad in found])}
    about["id"] = delta_id_of(about, arrays)
    made = make_room(with_delta(model, Delta(about, arrays)))
    return Outcome("adapted", made, f"adapted: {about['text']}; {until_text(about)}; model {made.model_id}",
                   str(about["id"]))


def _check(model: NormalityModel, corridor: PartModel, bad: BadPart, departure: Departure, policy: Policy) -> None:
    """Refuse what is too far from what was learnt.

    Raises
    ------
    Refused
        With the tag, what it did and the limit.
    """
    number, seen = bad.part.number, departure.seen
    again = "look for the cause, or fit again on a record that holds such parts"
    if departure.row == TIME:
        period_s = corridor.period_ns / 1e9
        margin = policy.beyond * float(corridor.rows[1])
        least, most = departure.low - margin, departure.high + margin
        cycle = corridor.cycle
        if cycle.longest_ns:
            most = min(most, cycle.longest_ns / corridor.period_ns)
        least = max(least, cycle.shortest_ns / corridor.period_ns)
        if not least <= seen <= most:
            raise Refused(f"part {number} took {seen * period_s:.4g} s, outside its protected time "
                          f"{max(least, 0.0) * period_s:.4g} to {most * period_s:.4g} s; {again}")
        return
    plan = model.plan
    at = [c.name for c in plan.columns].index(corridor.columns[departure.column])
    column = plan.columns[at]
    low, high = (float(x) for x in model.span[departure.column])
    span = high - low
    if departure.kind in LEVELS:
        margin = policy.beyond * span
        limits = [("what was learnt by more than it may be,", low - margin, high + margin)]
        if plan.op[at] == SAME:
            limits += [("its protected range", *policy.protected[name]) for name in (column.name,)
                       if name in policy.protected]
            limits += [("its EURange", *column.eu_range)] if column.eu_range is not None else []
        for name, least, most in limits:
            if not least <= seen <= most:
                raise Refused(f"{column.name} went to {value_text(seen, column)} in part {number}, outside {name} "
                              f"{least:.4g} to {value_text(most, column)}; {again}")
    usual = float(corridor.center[departure.row, departure.column])
    far = policy.beyond * span
    if departure.kind in ("swing", "noise"):
        if seen < STILL * usual:
            raise Refused(f"{column.name} stands still in part {number}; {again}")
        far = min(far, TIMES_USUAL * policy.beyond * usual)
    # What absolute time shows early, the bins of a part's own length judge again at its end, and their bound holds.
    if departure.kind != "run" and departure.beyond > far:
        raise Refused(f"{column.name} is off its corridor by {value_text(departure.beyond, column)} in part {number} "
                      f"({departure.kind}), {value_text(far, column)} is the protected limit; {again}")


def _reach(model: NormalityModel, corridor: PartModel, found: Sequence[BadPart]) -> dict[str, list[float]]:
    """Return tag -> [how far it was off in healthy spreads, which way (-1, 1), 1]."""
    reach: dict[str, list[float]] = {}
    for bad in found:
        for departure in bad.departures:
            tag = corridor.cycle.tag if departure.row == TIME else model.plan.owner(corridor.columns[departure.column])
            if tag not in reach or abs(departure.spreads) > reach[tag][0]:
                reach[tag] = [abs(departure.spreads), float(np.sign(departure.spreads)), 1.0]
    return reach


def _words(model: NormalityModel, corridor: PartModel, found: Sequence[BadPart]) -> str:
    """Return in words what is allowed from now on: the time, or the feature that was furthest off."""
    every = [(bad, departure) for bad in found for departure in bad.departures]
    if not every:
        return "what was seen is normal"
    times = [item for item in every if item[1].row == TIME]
    departure = max((times or every), key=lambda item: abs(item[1].spreads))[1]
    more = len({(d.row, d.column) for _, d in every}) - 1
    rest = f", and {more} more feature{'s' if more > 1 else ''} of {_parts_text(found)}" if more else \
        f" ({_parts_text(found)})"
    if departure.row == TIME:
        return f"a part may take {departure.seen * corridor.period_ns / 1e9:.4g} s{rest}"
    columns = {c.name: c for c in model.plan.columns}
    column = columns[corridor.columns[departure.column]]
    where = corridor.stretches[departure.row]
    place = "" if where.stop - where.start >= 100.0 else f" at {where.start:.0f} to {where.stop:.0f} % of the cycle"
    what = {"swing": "may vary by", "noise": "may change from row to row by", "shape": "may be off its own mean by"}
    words = what.get(departure.kind, "may reach" if departure.spreads > 0 else "may fall to")
    return f"{column.name} {words} {value_text(departure.seen, column)}{place}{rest}"


def _parts_text(found: Sequence[BadPart]) -> str:
    numbers = [bad.part.number for bad in found]
    return f"part {numbers[0]}" if len(numbers) == 1 else f"parts {numbers[0]} to {numbers[-1]}"
