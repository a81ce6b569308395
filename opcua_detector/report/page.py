"""Puts the page together: figures in words, tables, plots; everything that came from a server is escaped."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from .. import __version__
from ..api import Float64, Record, Tag
from ..errors import PluginError
from ..evaluation import Alert, Evaluation, Event, Replay, at_most, in_budget, in_words, top_tags
from ..kernels.columns import SAME
from ..model import NormalityModel
from . import plots
from .timeaxis import Stretches, TimeAxis
from .transitions import transition_maps

MOST_TRENDS: Final = 20
MOST_HEAT: Final = 100
MOST_ERRORS: Final = 30
MOST_MAPS: Final = 3
MOST_LISTED: Final = 200
MOST_OPEN: Final = 10  # rows of a table that are not folded away
_EXTRA: Final = ("matplotlib", "jinja2")


@dataclass(frozen=True)
class Section:
    """One monitor of the report.

    model : what was replayed; record : rows of its group; said : what it said of them, with the stretches of
    `TimeAxis.of(record).borders(plots.HEAT_BINS)`; found : what that is worth; source : where the rows came from
    maps : tags whose transition map is wanted, empty for those with the most that was never seen
    """

    model: NormalityModel
    record: Record
    said: Replay
    found: Evaluation
    source: str
    maps: tuple[str, ...] = ()


def need_extra() -> None:
    """Raise PluginError where matplotlib or jinja2 is missing."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise PluginError(f"the report needs {' and '.join(missing)}, not installed here", where="report",
                          next_step='pip install "opcua-detector[report]"')


def make_section(
    model: NormalityModel, record: Record, said: Replay, found: Evaluation, source: str, maps: Sequence[str] = (),
) -> Section:
    """Return a section; PluginError where a tag of `maps` has no transition map."""
    if maps:
        known = {one.tag for one in transition_maps(model, record.rows(0, 1))}
        wrong = [name for name in maps if name not in known]
        if wrong:
            raise PluginError(
                f"there is no transition map of {', '.join(wrong)}", where=f"monitor {model.monitor}",
                next_step=f"choose among {', '.join(sorted(known))}" if known else
                "leave the option out: this monitor does not use the method transition")
    return Section(model, record, said, found, source, tuple(maps))


def render(sections: Sequence[Section], made_ns: int) -> str:
    """Return the whole page.

    Raises
    ------
    PluginError
        The extra `report` is not installed.
    """
    need_extra()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda x: plots.clean(x) if type(x) is str else x)
    environment.filters.update(utc=utc, breakable=breakable, words=in_words, at_most=at_most, budget=in_budget,
                               figure=figure, percent=percent)
    text = environment.get_template("page.html").render(
        sections=[_content(section) for section in sections], version=__version__, made_ns=made_ns,
        colours=plots.COLOURS, most=MOST_LISTED, open=MOST_OPEN)
    number = iter(range(1, 1_000_000))
    # Each figure counts its own ids: two figures of one page never share one.
    return re.sub(r"<svg .*?</svg>", lambda m: m[0].replace(plots.ID_MARK, f"f{next(number)}-"), text,
                  flags=re.DOTALL)


def _content(section: Section) -> dict[str, Any]:
    import markupsafe

    model, record, said, found = section.model, section.record, section.said, section.found
    axis = TimeAxis.of(record)
    lines, heat = Stretches.of(record, axis, plots.LINE_BINS), Stretches.of(record, axis, plots.HEAT_BINS)
    shades = plots.Shades(
        lines.spans(said.alert.astype(np.uint8)), [] if record.truth is None else lines.spans(record.truth),
        lines.spans(np.isnan(said.score).astype(np.uint8)) if np.isnan(said.score).any() else [])
    order = list(top_tags(said))
    trends = [_trend(section, name) for name in order[:MOST_TRENDS]]
    svgs = {"score": plots.score_plot(said, lines, shades), "trends": plots.trend_plot(trends, lines, shades)}
    hot, strength = plots.heat(said, order[:MOST_HEAT])
    if hot:
        svgs["heat"] = plots.heat_plot(hot, strength, heat, shades)
    svgs["spread"] = plots.spread_plot(said.score, record.truth)
    if len(found.days) > 1 and sum(day.hours for day in found.days) >= 24:
        svgs["days"] = plots.day_plot(found)
    ratio, names = _errors(said)
    if names:
        svgs["errors"] = plots.error_plot(names, ratio)
    maps = [one for one in transition_maps(model, record) if not section.maps or one.tag in section.maps]
    return {
        "monitor": model.monitor, "model": model, "record": record, "said": said, "found": found,
        "source": section.source, "facts": model.facts, "notes": [*model.calibration.notes], "cards": _cards(found),
        "headline": _headline(found), "svg": {name: markupsafe.Markup(svg) for name, svg in svgs.items()},
        "maps": [(one, markupsafe.Markup(plots.transition_plot(one))) for one in maps[:MOST_MAPS]],
        "more_maps": len(maps) - len(maps[:MOST_MAPS]), "tags": _tags(section),
        "alerts": [_alert_row(a, said, found) for a in said.alerts[:MOST_LISTED]],
        "events": [_event_row(e) for e in found.events[:MOST_LISTED]],
        "trends": len(trends), "all_tags": len(order), "heat_tags": len(hot),
        "high_errors": [(name, float(r)) for name, r in zip(names, ratio, strict=True) if r > 2.0],
        "more_errors": int(np.isfinite(said.error).sum()) - len(names),
        "holes": len(axis.holes), "silent": float(np.mean(np.isnan(said.score))),
        "slow": not bool(np.isnan(said.slow).all()),
    }


def _trend(section: Section, name: str) -> plots.Trend:
    record, model = section.record, section.model
    at = [tag.name for tag in record.tags].index(name)
    column = next((c for c, op in enumerate(model.plan.op)
                   if op == SAME and model.plan.columns[c].name == name and c < len(model.span)), -1)
    usual = (float(model.span[column, 0]), float(model.span[column, 1])) if column >= 0 else None
    return plots.Trend(name, record.tags[at].unit, record.values[:, at], record.valid[:, at], usual)


def _errors(said: Replay) -> tuple[Float64, list[str]]:
    known = np.flatnonzero(np.isfinite(said.error))
    worst = known[np.argsort(-said.error[known], kind="stable")][:MOST_ERRORS]
    return said.error[worst], [said.tags[i] for i in worst]


def _tags(section: Section) -> list[dict[str, Any]]:
    """Return a line for each tag: in use or not, why, share of valid rows."""
    record, model = section.record, section.model
    used = {tag.name for tag in model.tags}
    shown: list[Tag] = [tag for tag in record.tags if tag.name in used or tag.name in model.excluded]
    names = [tag.name for tag in record.tags]
    return [{
        "name": tag.name, "unit": tag.unit, "kind": tag.kind.value,
        "use": model.excluded.get(tag.name) or ("judged" if tag.judged else "helps to judge the others"),
        "excluded": tag.name in model.excluded,
        "valid": float(np.mean(record.valid[:, names.index(tag.name)] != 0))} for tag in shown]


def _alert_row(alert: Alert, said: Replay, found: Evaluation) -> dict[str, Any]:
    ends = alert.cleared_ns
    return {
        "no": alert.event_no, "raised_ns": alert.raised_ns, "lasted": (ends - alert.raised_ns) / 1e9 if ends else None,
        "peak": alert.peak_score, "tag": alert.top_tag, "sentence": alert.sentence,
        "causes": [(tag, words, share) for tag, words, share in alert.causes[1:]],
        "kind": "" if found.point is None else "false alarm" if alert.event_no in found.false_alerts else "true",
    }


def _event_row(event: Event) -> dict[str, Any]:
    return {"begin_ns": event.begin_ns, "lasts": (event.end_ns - event.begin_ns) / 1e9, "found": event.found,
            "standing": event.standing, "delay": event.delay_s, "alert": event.alert, "tag": event.top_tag,
            "sentence": event.sentence, "peak": event.peak_score}


def _cards(found: Evaluation) -> list[tuple[str, str, str, bool]]:
    """Return (what, figure, what it means, whether it is bad) of the figures that come first."""
    if found.point is None:
        over = found.raised > max(found.allowed, 1.0) * 2
        return [
            ("Alerts", f"{found.raised}", f"in {in_words(found.hours * 3600)} with a verdict", over),
            ("Allowed by the budget", at_most(found.allowed), f"of {in_budget(found.budget_per_day)}", over),
            ("Time at or over the limit", percent(found.above[1.0]), "of the time with a verdict", False),
            ("Highest score", figure(found.quantiles[1.0]), "1 is the limit", False)]
    point = found.point
    missed = point.onsets - point.detected
    return [
        ("Faults found", f"{point.detected} of {point.onsets}" if point.onsets else "none known",
         f"{missed} missed" if missed else "none missed" if point.onsets else "no fault in the ground truth",
         missed > 0),
        ("Median delay", in_words(point.delay_s), "from the begin of a fault to the alert", False),
        ("False alarms", f"{point.false_alarms}", f"{figure(point.false_alarms_per_hour)} in an hour of healthy time",
         point.false_alarms > max(found.allowed, 1.0) * 2),
        ("Healthy time in alarm", percent(point.false_alarm_share),
         f"of {in_words(point.healthy_h * 3600)}; an alert that outlasts its fault counts too",
         point.false_alarm_share > 0.05)]


def _headline(found: Evaluation) -> str:
    """Return the outcome in one or two sentences."""
    time = in_words(found.hours * 3600)
    alerts = f"{found.raised} alert{'' if found.raised == 1 else 's'}"
    text = f"In {time} with a verdict this monitor raised {alerts if found.raised else 'no alert'}."
    if found.point is None:
        allowed = "less than one" if found.allowed < 1 else at_most(found.allowed)
        right = " There is no ground truth, so nothing says which alerts are right." if found.raised else ""
        return f"{text} Its budget of {in_budget(found.budget_per_day)} allows {allowed} in this time.{right}"
    point = found.point
    if not point.onsets:
        return f"{text} The ground truth knows no fault, so all of them are false."
    found_words = "all of them were found" if point.detected == point.onsets else \
        "none of them was found" if not point.detected else f"{point.detected} of them were found"
    if point.onsets == 1:
        found_words = "it was found" if point.detected else "it was missed"
    faults = f"The ground truth knows {point.onsets} fault{'' if point.onsets == 1 else 's'}: {found_words}."
    return f"{text} {faults} {point.false_alarms or 'No'} alert{'' if point.false_alarms == 1 else 's'} " \
           f"{'was' if point.false_alarms == 1 else 'were'} raised in healthy time."


def utc(ns: int) -> str:
    """Return a SourceTimestamp as text, UTC."""
    when = datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    part = ns % 1_000_000_000 // 1_000_000
    return f"{when}.{part:03d}" if part else when


def breakable(text: str) -> Any:
    """Return a name, escaped, that may be broken after each of its parts."""
    import markupsafe

    parts = re.split(r"(?<=[._/:;-])", plots.clean(text))
    return markupsafe.Markup("<wbr>").join(parts)


def figure(value: float) -> str:
    """Return a number as a person reads it."""
    if not np.isfinite(value):
        return "-"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share in percent; what is not 0 never reads as 0."""
    if not np.isfinite(share):
        return "-"
    return "0 %" if share == 0 else "under 0.01 %" if share < 0.0001 else f"{100 * share:.3g} %"
