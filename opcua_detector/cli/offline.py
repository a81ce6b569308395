"""Commands that work on records and models: fit, replay, models, nodeset, schema."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import config as configuration
from ..api import Record
from ..app import Fitted, fit_config, group_tags, keep_fitted, model_path, open_monitors
from ..config import Config, GroupConfig
from ..csv_rows import read_csv
from ..engine import Engine, Monitor, frames_of
from ..errors import ConfigError, DetectorError, RecordError
from ..explain import counterfactual_sentence
from ..frames import record_from_columns
from ..model import load as load_model
from ..nodes import TOP, nodeset_xml
from ..store import Store
from .terminal import (
    AsJson,
    ConfigFile,
    MonitorName,
    cell,
    clock,
    err,
    interval_ns,
    out,
    plain,
    print_json,
    progress_bar,
    show,
    table,
)

Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help=(
    "Rows from a CSV file: a time column, then one per tag."))]
Recording = Annotated[str | None, typer.Option("--recording", metavar="NAME", help=(
    "Rows of a recording in the store."))]
Intervals = Annotated[list[str] | None, typer.Option(metavar="FROM/TO", help=(
    "Use these times alone (ISO 8601, UTC); repeatable."))]
Without = Annotated[list[str] | None, typer.Option(metavar="FROM/TO", help=(
    "Leave these times out, such as a suspicious stretch; repeatable."))]


def csv_record(path: Path, group: GroupConfig) -> Record:
    """Return the rows of a CSV for the tags of a group, on the group's grid."""
    tags = group_tags(group)
    source_ns, values, names, truth = read_csv(path, tags=[tag.name for tag in tags])
    by_name = {tag.name: tag for tag in tags}
    return record_from_columns(source_ns, values, [by_name[name] for name in names], group.period,
                               lateness_ns=group.lateness_ns, max_hold=group.max_hold, truth=truth, where=str(path))


def stored_record(config: Config, name: str, group: GroupConfig) -> Record:
    """Return the rows of a recording for the tags of a group."""
    with Store.open(config.store.path, readonly=True) as store:
        record = store.read_recording(name)
    if record.period_ns != group.period:
        raise RecordError(f"the recording has a period of {record.period_ns / 1e6:g} ms, the group {group.name} "
                          f"{group.period / 1e6:g} ms", where=f"recording {name}",
                          next_step="record again with this config")
    tags = group_tags(group)
    missing = [t.name for t in tags if t.name not in {r.name for r in record.tags}]
    if missing:
        raise RecordError(f"the recording lacks the tags {', '.join(missing)}", where=f"recording {name}",
                          next_step="record again with this config")
    return replace(record.select([t.name for t in tags]), tags=tags)


def _source(config: Config, csv: Path | None, recording: str | None,
            history: Callable[[GroupConfig], Record]) -> Callable[[GroupConfig], Record]:
    if csv is not None and recording is not None:
        raise ConfigError("give either --csv or --recording", next_step="drop one of the two")
    if csv is not None:
        return lambda group: csv_record(csv, group)
    if recording is not None:
        return lambda group: stored_record(config, recording, group)
    return history


def fit(
    config_file: ConfigFile,
    csv: Csv = None,
    recording: Recording = None,
    last: Annotated[str, typer.Option(metavar="DURATION", help=(
        "How much of the server's history to read, such as '2 h'."))] = "1 h",
    only: Intervals = None,
    without: Without = None,
    monitor: MonitorName = None,
    as_json: AsJson = False,
) -> None:
    """Learn what is normal from a healthy record: the server's history (default), a recording, or a CSV.

    Writes one model file per monitor and reports what the record covers, which tags are left out and why, and
    stretches of the "healthy" record that look unlike the rest.
    """
    from .online import history_record

    config = configuration.load(config_file)
    span_ns = configuration.duration_ns(last, key="--last")
    keep = [interval_ns(text, key="--only") for text in only or ()]
    drop = [interval_ns(text, key="--without") for text in without or ()]
    whole = _source(config, csv, recording, lambda group: history_record(config, config_file, group, span_ns))
    started = time.perf_counter()
    with err.status("reading rows") if err.is_terminal else nullcontext() as line:
        done = fit_config(config, config_file, lambda group: _within(whole(group), keep, drop), only=monitor or (),
                          progress=lambda text: line.update(text) if line else None)
    seconds = time.perf_counter() - started
    with Store.open(config.store.path, beside=True) as store:  # also while `run` is live
        keep_fitted(done, store)
    for fitted in done:
        _show_fit(fitted)
    if as_json:
        print_json({"seconds": seconds, "monitors": [_fit_facts(f) for f in done]})


def _within(record: Record, keep: list[tuple[int, int]], drop: list[tuple[int, int]]) -> Record:
    """Return the rows inside any of `keep` (all where there is none) and outside each of `drop`."""
    if not keep and not drop:
        return record
    at = record.source_ns
    inside = np.full(len(record), not keep)
    for start, end in keep:
        inside |= (at >= start) & (at <= end)
    for start, end in drop:
        inside &= (at < start) | (at > end)
    if not inside.any():
        raise RecordError("no row is left", where=f"{clock(int(at[0]))} to {clock(int(at[-1]))}",
                          next_step="choose --only and --without inside this time")
    return record.take(np.flatnonzero(inside))


def _fit_facts(fitted: Fitted) -> dict[str, Any]:
    report = asdict(fitted.report)
    report["suspicious"] = [{"from": clock(a), "to": clock(b), "times_usual": x, "group": g}
                            for a, b, x, g in fitted.report.suspicious]
    return {"model_id": fitted.model.model_id, "path": fitted.path, **report}


def _show_fit(fitted: Fitted) -> None:
    report, model = fitted.report, fitted.model
    err.print(f"[bold]{report.monitor}[/]: {report.rows} rows, {report.seconds:.0f} s, {report.gaps} gaps "
              f"({clock(report.span_ns[0])} to {clock(report.span_ns[1])})")
    err.print(f"  judged: {', '.join(t.name for t in model.tags if t.judged and t.name not in report.excluded)}")
    inputs = ", ".join(f"{t.name} ({t.kind.value})" for t in model.tags if not t.judged)
    if inputs:
        err.print(f"  inputs, not judged: {inputs}", markup=False)
    for name, reason in report.excluded.items():
        err.print(f"  left out: {name}: {reason}", markup=False)
    if len(report.coverage) > 1:
        for state, share in report.coverage.items():
            err.print(f"  coverage of state {state}: {share:.1%}")
        if report.not_learnt > 0:
            err.print(f"  coverage of not learnt: {report.not_learnt:.1%}")
    stretches = _merged(report.suspicious)
    if stretches:
        err.print("  these stretches look unlike the rest; leave out what was not healthy:", style="yellow")
    for start, end, why in stretches:
        err.print(f"    --without {clock(start)}/{clock(end)}  ({why})", markup=False)
    for note in report.notes:
        err.print(f"  note: {note}", style="yellow", markup=False)
    err.print(f"  model {model.model_id} written to {fitted.path}", markup=False)


def _merged(found: Sequence[tuple[int, int, float, str]]) -> list[tuple[int, int, str]]:
    """Return (from_ns, to_ns, why) in order of time; what several methods see at one time is one stretch."""
    merged: list[tuple[int, int, dict[str, float]]] = []
    for start, end, height, view in sorted(found):
        if merged and start <= merged[-1][1]:
            first, last, why = merged.pop()
            merged.append((first, max(last, end), why | {view: max(height, why.get(view, 0.0))}))
        else:
            merged.append((start, end, {view: height}))
    return [(start, end, ", ".join(f"{view}: {height:.1f} healthy spreads above the usual"
                                   for view, height in why.items())) for start, end, why in merged]


def replay(
    config_file: ConfigFile,
    csv: Csv = None,
    recording: Recording = None,
    monitor: MonitorName = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help=(
        "Write time and score of each row to this CSV."))] = None,
    as_json: AsJson = False,
) -> None:
    """Run the same engine over a recording or a CSV and list the alerts it would have raised."""
    config = configuration.load(config_file)

    def no_source(group: GroupConfig) -> Record:
        raise ConfigError("nothing to replay", next_step="give --csv FILE or --recording NAME")

    source = _source(config, csv, recording, no_source)
    results: list[dict[str, Any]] = []
    for group_name, monitors in open_monitors(config, config_file, only=monitor or ()).items():
        group = config.group(group_name)
        results += _replay_group(source(group), monitors, scores, append=bool(results))
    for result in results:
        err.print(f"[bold]{result['monitor']}[/]: {result['rows']} rows, {result['scored']} scored, "
                  f"{len(result['alerts'])} alerts; score median {cell(result['score_p50'])}, "
                  f"99 % below {cell(result['score_p99'])}")
        if "parts" in result:
            bad = [p for p in result["parts"] if p["explanation"]]
            err.print(f"  {len(result['parts'])} whole parts, {len(bad)} of them bad", markup=False)
            for p in bad:
                err.print(f"  {p['to']}: {p['explanation']}", markup=False)
    alerts = [alert for result in results for alert in result["alerts"]]
    if alerts and not as_json:
        show(table("", ["monitor", "raised", "cleared", "peak", "explanation"],
                   [[a["monitor"], a["raised"], a["cleared"] or "standing", a["peak_score"], a["explanation"]]
                    for a in alerts]))
    if as_json:
        print_json({"monitors": results})


def _replay_group(record: Record, monitors: list[Monitor], scores: Path | None, *,
                  append: bool) -> list[dict[str, Any]]:
    engine = Engine(monitors)
    results: list[dict[str, Any]] = [{"monitor": m.name, "model_id": m.model.model_id, "rows": len(record), "scored": 0,
                                      "alerts": []} for m in monitors]
    kept = np.full((len(record), len(monitors)), np.nan)
    with progress_bar("replaying") as update:
        for i, frame in enumerate(frames_of(record)):
            for m, verdict in enumerate(engine.step(frame)):
                kept[i, m] = verdict.score
                alerts = results[m]["alerts"]
                if verdict.raised:
                    told = monitors[m].explain(monitors[m].snapshot())
                    alerts.append({"monitor": verdict.monitor, "event_no": verdict.event_no,
                                   "raised": clock(frame.source_ns), "cleared": None, "peak_score": verdict.score,
                                   "top_tag": told.shares[0][0] if told.shares else _top_tag(monitors[m]),
                                   "explanation": told.sentence, "without": [
                                       counterfactual_sentence(tag, without, verdict.score)
                                       for tag, without in told.counterfactual],
                                   "causes": [asdict(cause) for cause in told.causes[:TOP]]})
                _add_part(results[m], monitors[m])
                if verdict.alert and verdict.score > alerts[-1]["peak_score"]:
                    alerts[-1]["peak_score"] = verdict.score
                if verdict.cleared:
                    alerts[-1]["cleared"] = clock(frame.source_ns)
            if i % 4096 == 0:
                update(i, len(record))
        update(len(record), len(record))
    for m, result in enumerate(results):
        known = kept[~np.isnan(kept[:, m]), m]
        result["scored"] = len(known)
        result["score_p50"], result["score_p99"] = (np.quantile(known, [0.5, 0.99]) if len(known) else (None, None))
        if scores is not None:
            _write_scores(scores, record, kept[:, m], monitors[m].name, append=append or m > 0)
    return [plain(result) for result in results]


def _add_part(result: dict[str, Any], monitor: Monitor) -> None:
    """Add the verdict on a part that just ended; the alert that it ends with is told by the first whole part."""
    part = monitor.ended_part()
    if part is None:
        return
    result.setdefault("parts", []).append({
        "part": part.number, "from": clock(part.begin_ns), "to": clock(part.end_ns), "score": part.score,
        "top_tag": part.top_tag, "phase": part.phase, "explanation": part.sentence})
    alerts = result["alerts"]
    if part.sentence and monitor.verdict.alert and alerts and "part" not in alerts[-1]:
        told = monitor.explain(monitor.snapshot())
        alerts[-1] |= {"part": part.number, "top_tag": part.top_tag, "explanation": part.sentence,
                       "causes": [asdict(cause) for cause in told.causes[:TOP]]}


def _top_tag(monitor: Monitor) -> str:
    share = monitor.verdict.contribution
    return monitor.verdict.tags[int(share.argmax())] if share.any() else ""


def _write_scores(path: Path, record: Record, score: Any, monitor: str, *, append: bool) -> None:
    with path.open("a" if append else "w", encoding="utf-8", newline="") as file:
        if not append:
            file.write("source_ns,monitor,score,valid_tags\n")
        for i in range(len(record)):
            value = "" if np.isnan(score[i]) else f"{score[i]:.9g}"
            file.write(f"{record.source_ns[i]},{monitor},{value},{int(record.valid[i].sum())}\n")


def models(config_file: ConfigFile, as_json: AsJson = False) -> None:
    """List the models of a config: file, sha256 check, tags, limits, notes; and what the store has registered."""
    config = configuration.load(config_file)
    rows: list[dict[str, Any]] = []
    for item in config.monitors:
        path = model_path(config_file, item)
        row: dict[str, Any] = {"monitor": item.name, "path": path, "model_id": None, "state": "ok"}
        try:
            model = load_model(path)
            model.require(group_tags(config.group(item.group)), config.group(item.group).period)
            row |= {"model_id": model.model_id, "tags": [t.name for t in model.tags],
                    "excluded": dict(model.excluded), "methods": list(model.names), "facts": dict(model.facts),
                    "notes": list(model.calibration.notes)}
        except DetectorError as error:
            row["state"] = str(error)
        rows.append(row)
    registered: list[dict[str, Any]] = []
    if config.store.path.exists():
        with Store.open(config.store.path, readonly=True) as store:
            registered = [asdict(m) for m in store.models()]
    if as_json:
        print_json({"models": rows, "registered": [{k: v for k, v in r.items() if k != "header"} for r in registered]})
        return
    show(table("", ["monitor", "model", "methods", "tags", "rows", "state"],
               [[r["monitor"], r["model_id"] or "-", ", ".join(r.get("methods", [])) or "-",
                 ", ".join(r.get("tags", [])) or "-", r.get("facts", {}).get("rows", 0),
                 str(r["state"]).splitlines()[0]] for r in rows]))
    for r in rows:
        for note in r.get("notes", []):
            out.print(f"{r['monitor']}: {note}", markup=False)
    out.print(f"{len(registered)} registered in the store {config.store.path}", markup=False)


def nodeset(
    config_file: ConfigFile,
    to: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to this file, not to stdout.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the NodeSet2 file with the result nodes of the monitors, to import into the plant's server."""
    names = [m.name for m in configuration.load(config_file).monitors]
    text = nodeset_xml(names)
    if to is not None:
        to.write_text(text, encoding="utf-8")
        err.print(f"written: {to}", markup=False)
    if as_json:
        print_json({"monitors": names, "file": to, "nodeset": text if to is None else None})
    elif to is None:
        print(text, end="")


def schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of the configuration file, for editors (with --json on one line)."""
    if as_json:
        print_json(configuration.json_schema())
    else:
        print(json.dumps(configuration.json_schema(), indent=2))
