"""Commands that judge a fitted monitor on a recording: evaluate (figures) and report (a page)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import config as configuration
from ..api import Int64, Record
from ..app import group_tags, open_monitors
from ..config import Config, GroupConfig
from ..csv_rows import read_csv
from ..engine import Monitor
from ..errors import ConfigError, RecordError
from ..evaluation import VUS_PARTS, VUS_WINDOW, Evaluation, Replay, as_dict, at_most, held_truth, in_words, replay
from ..evaluation import evaluate as worth
from ..frames import record_from_columns
from ..report import Section, TimeAxis, make_section, need_extra, render
from ..report.page import figure, percent
from ..report.plots import HEAT_BINS
from ..store import Store, StoredRecording
from .offline import Csv, Intervals, Without, _within
from .terminal import (
    AsJson,
    ConfigFile,
    MonitorName,
    clock,
    err,
    interval_ns,
    plain,
    print_json,
    progress_bar,
    show,
    table,
)

DEFAULT_LAST = "1 d"
Stored = Annotated[str | None, typer.Option("--recording", metavar="NAME", help=(
    "Rows of a recording in the store; without this and --csv, the newest one of the monitor's group."))]
Last = Annotated[str | None, typer.Option("--last", metavar="DURATION", help=(
    f"Only the end of the recording, such as '8 h'. [default: all, of the newest one {DEFAULT_LAST}]"))]
Truth = Annotated[str | None, typer.Option("--truth", metavar="NAME", help=(
    "Ground truth: the CSV column, or the tag of the recording, that is not 0 while something is wrong. "
    "[default: the column 'truth', or what the recording was stored with]"))]
MapOf = Annotated[list[str] | None, typer.Option("--map", metavar="TAG", help=(
    "Draw the transition map of this tag; repeatable. [default: the tags with the most movements never seen]"))]
VusWindow = Annotated[int | None, typer.Option("--vus-window", metavar="ROWS", min=0, max=100_000, help=(
    "Window of the figure VUS-PR: how near a row must be to an event to count in part. "
    f"[default: {VUS_WINDOW}; of a monitor that judges parts {VUS_PARTS} parts]"))]


def evaluate(
    config_file: ConfigFile,
    csv: Csv = None,
    recording: Stored = None,
    last: Last = None,
    only: Intervals = None,
    without: Without = None,
    truth: Truth = None,
    monitor: MonitorName = None,
    vus_window: VusWindow = None,
    as_json: AsJson = False,
) -> None:
    """Run a recording through the engine and say what the alarms are worth.

    With ground truth: which events were found, how late and which tag was named, false alarms, healthy time in alarm,
    and how well the score ranks, beside a random score. Without it: alerts against the budget, and how the score is
    distributed. An event counts as found only if an alert stands on one of its rows; nothing is adjusted.
    """
    rows = _Rows(configuration.load(config_file), csv, recording, last, only, without, truth)
    results = [(_figures(found, said, source), found, said)
               for _, _, said, found, source in _judge(rows, config_file, monitor, vus_window, bins=0)]
    for result, found, said in results:
        _tell(found, said, result["source"])
    if as_json:
        print_json({"monitors": [result for result, _, _ in results]})


def report(
    config_file: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")] = Path(
        "report.html"),
    csv: Csv = None,
    recording: Stored = None,
    last: Last = None,
    only: Intervals = None,
    without: Without = None,
    truth: Truth = None,
    monitor: MonitorName = None,
    map_of: MapOf = None,
    vus_window: VusWindow = None,
    as_json: AsJson = False,
) -> None:
    """Run a recording through the engine and write what happened as one HTML page.

    The page holds everything in itself and needs no network: score and tags over time with alerts and ground truth,
    which tag carried the score, alerts with their causes, alerts against the budget, and how well the limit fits.
    """
    need_extra()
    if not output.parent.is_dir():
        raise ConfigError("there is no such folder", key="--output", value=str(output),
                          next_step="create the folder, or choose another file")
    rows = _Rows(configuration.load(config_file), csv, recording, last, only, without, truth)
    sections: list[Section] = []
    results: list[dict[str, Any]] = []
    for opened, record, said, found, source in _judge(rows, config_file, monitor, vus_window, bins=HEAT_BINS):
        sections.append(make_section(opened.model, record, said, found, source, map_of or ()))
        results.append(_figures(found, said, source))
    with err.status("drawing"):
        page = render(sections, time.time_ns())
    _write(output, page)
    err.print(f"written: {output} ({len(page.encode()) / 1e6:.1f} MB)", markup=False)
    if as_json:
        print_json({"file": output, "bytes": len(page.encode()), "monitors": results})


class _Rows:
    """Where the rows come from, and which of them are wanted."""

    def __init__(self, config: Config, csv: Path | None, recording: str | None, last: str | None,
                 only: list[str] | None, without: list[str] | None, truth: str | None) -> None:
        if csv is not None and recording is not None:
            raise ConfigError("give either --csv or --recording", next_step="drop one of the two")
        self.config, self.csv, self.recording, self.truth = config, csv, recording, truth
        self.last_ns = None if last is None else configuration.duration_ns(last, key="--last")
        self.keep = [interval_ns(text, key="--only") for text in only or ()]
        self.drop = [interval_ns(text, key="--without") for text in without or ()]

    def read(self, group: GroupConfig) -> tuple[Record, str]:
        """Return (rows of the group's tags with their ground truth, where they came from)."""
        record, source = (_from_csv(self.csv, group, self.truth), f"file {self.csv.name}") if self.csv is not None \
            else self._stored(group)
        if self.csv is not None and self.last_ns is not None:
            record = record.take(np.flatnonzero(record.source_ns > record.source_ns[-1] - self.last_ns))
        record = _within(record, self.keep, self.drop)
        if self.truth is not None and record.truth is not None and len(np.unique(record.truth)) == 1:
            only = "faulty" if record.truth[0] else "healthy"
            raise RecordError(
                f"by {self.truth!r} every row is {only}, so there is nothing to tell apart", where=source,
                next_step="take a recording with healthy and faulty rows, or leave --truth out to see the alerts alone")
        return record, source

    def _stored(self, group: GroupConfig) -> tuple[Record, str]:
        with Store.open(self.config.store.path, readonly=True) as store:
            about = store.recording(self.recording) if self.recording is not None else _newest(
                store.recordings(), group, self.config.store.path)
            last_ns = self.last_ns
            if last_ns is None and self.recording is None:
                last_ns = configuration.duration_ns(DEFAULT_LAST, key="--last")
            start = None if last_ns is None or about.last_ns is None else about.last_ns - last_ns + 1
            record = store.read_recording(about.id, start)
        source = f"recording {about.name}"
        if not len(record):
            raise RecordError("the recording holds no row", where=source, next_step="record again, or take another one")
        if record.period_ns != group.period:
            raise RecordError(
                f"the recording has a period of {record.period_ns / 1e6:g} ms, the group {group.name} "
                f"{group.period / 1e6:g} ms", where=source, next_step="record again with this config")
        names = [tag.name for tag in record.tags]
        missing = [tag.name for tag in group_tags(group) if tag.name not in names]
        if missing:
            raise RecordError(f"the recording lacks the tags {', '.join(missing)}", where=source,
                              next_step="record again with this config")
        if self.truth is not None:
            if self.truth not in names:
                raise RecordError(f"there is no tag {self.truth!r} to take ground truth from", where=source,
                                  next_step=f"use one of {', '.join(names)}, or leave --truth out")
            at = names.index(self.truth)
            labels, unknown = held_truth(record.values[:, at], record.valid[:, at])
            if unknown:
                err.print(f"{self.truth} has no valid value in {unknown} rows: they keep the ground truth of the row "
                          "before", style="yellow", markup=False)
            record = replace(record, truth=labels)
        tags = group_tags(group)
        return replace(record.select([tag.name for tag in tags]), tags=tags), source


def _newest(recordings: list[StoredRecording], group: GroupConfig, path: Path) -> StoredRecording:
    own = [one for one in recordings if one.rows and one.group == group.name]
    if not own:
        raise RecordError(f"the store holds no recording of the group {group.name}", where=str(path),
                          next_step="run the service or `record` first, or give --recording NAME or --csv FILE")
    return own[-1]


def _from_csv(path: Path, group: GroupConfig, truth: str | None) -> Record:
    tags = group_tags(group)
    source_ns, values, _, labels = read_csv(path, tags=[tag.name for tag in tags], truth_column=truth)
    return record_from_columns(source_ns, values, tags, group.period, lateness_ns=group.lateness_ns,
                               max_hold=group.max_hold, truth=labels, where=str(path))


def _judge(
    rows: _Rows, config_file: Path, only: list[str] | None, vus_window: int | None, *, bins: int,
) -> list[tuple[Monitor, Record, Replay, Evaluation, str]]:
    """Replay the rows through each monitor; return what it said and what that is worth."""
    done = []
    for group_name, monitors in open_monitors(rows.config, config_file, only=only or ()).items():
        record, source = rows.read(rows.config.group(group_name))
        edges: Int64 | None = TimeAxis.of(record).borders(bins) if bins else None
        for monitor in monitors:
            with progress_bar(f"replaying {monitor.name}") as update:
                said = replay(record, monitor, edges=edges, progress=update)
            budget = float(monitor.model.facts.get("false_alarms_per_day", 1.0))
            found = worth(record, said, budget_per_day=budget, vus_window=vus_window)
            done.append((monitor, record, said, found, source))
    return done


def _figures(found: Evaluation, said: Replay, source: str) -> dict[str, Any]:
    result = as_dict(found, said) | {"source": source}
    result["from"], result["to"] = (clock(ns) for ns in result.pop("span_ns"))
    for event in result["events"]:
        event["from"], event["to"] = clock(event.pop("begin_ns")), clock(event.pop("end_ns"))
    for alert in result["alerts"]:
        cleared = alert.pop("cleared_ns")
        alert["raised"], alert["cleared"] = clock(alert.pop("raised_ns")), None if cleared is None else clock(cleared)
        alert["causes"] = [{"tag": tag, "cause": words, "share": share} for tag, words, share in alert["causes"]]
    made: dict[str, Any] = plain(result)
    return made


def _tell(found: Evaluation, said: Replay, source: str) -> None:
    err.print(f"[bold]{found.monitor}[/]: {found.rows} rows of {source}, {found.scored} with a verdict "
              f"({in_words(found.hours * 3600)}), {found.raised} alerts")
    for note in found.notes:
        err.print(f"  note: {note}", style="yellow", markup=False)
    rows: list[list[str]] = []
    if found.ranking is not None and found.random is not None:
        for name, key in (("AUC", "auc"), ("pAUC (false positives up to 10 %)", "pauc"),
                          (f"VUS-PR (window {found.vus_window} {found.unit})", "vus_pr")):
            rows.append([name, f"{getattr(found.ranking, key):.3f}", f"random: {getattr(found.random, key):.3f}"])
    point = found.point
    if point is not None:
        rows += [
            ["events found", f"{point.detected} of {point.onsets}" if point.onsets else "none known",
             f"recall of onsets {figure(point.onset_recall)}" if point.onsets else ""],
            ["median delay", in_words(point.delay_s), ""],
            ["false alarms", f"{point.false_alarms}", f"{figure(point.false_alarms_per_hour)} in an hour"],
            ["healthy time in alarm", percent(point.false_alarm_share), f"of {in_words(point.healthy_h * 3600)}"]]
    else:
        rows += [["alerts", f"{found.raised}", f"the budget allows {at_most(found.allowed)} in this time"],
                 ["alerts a day", figure(found.alerts_per_day), f"budget {found.budget_per_day:g}"],
                 ["time at or over the limit", percent(found.above[1.0]), ""]]
        rows += [[f"score, {100 * q:g} % of the time below" if q < 1 else "highest score", figure(value), ""]
                 for q, value in found.quantiles.items() if q >= 0.5]
    show(table("", [found.monitor, "", ""], rows))
    if found.events:
        show(table("", ["event", "lasted", "outcome", "delay", "tag", "explanation"], [
            [clock(e.begin_ns), in_words((e.end_ns - e.begin_ns) / 1e9), "found" if e.found else "missed",
             in_words(e.delay_s), e.top_tag or "-", e.sentence or "-"] for e in found.events]))
    wrong = [a for a in said.alerts if point is None or a.event_no in found.false_alerts]
    if wrong:
        show(table("", ["alert" if point is None else "false alarm", "lasted", "peak", "tag", "explanation"], [
            [clock(a.raised_ns), in_words((a.cleared_ns - a.raised_ns) / 1e9) if a.cleared_ns else "standing",
             a.peak_score, a.top_tag or "-", a.sentence or "-"] for a in wrong]))


def _write(path: Path, page: str) -> None:
    """Write the page all or nothing: a page that is open in a browser is never half."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ConfigError("the page cannot be written", key="--output", value=str(path),
                          next_step=f"check space and rights ({error.strerror})") from error


