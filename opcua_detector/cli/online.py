"""Commands that talk to a server: browse, check, record, run, sim; and reading the healthy history for fit."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.live import Live

from .. import config as configuration
from ..api import Frame, Record, Tag
from ..app import changed_since_fit, group_tags, methods_of, model_path, open_monitor, registry_of
from ..client import (
    BrowsedNode,
    Finding,
    GroupFeed,
    Mark,
    Session,
    examine_server,
    finding_of,
    oldest_ns,
    raise_findings,
    read_history,
    recent_values,
    walk,
)
from ..client.arrays import indexes_of
from ..config import Config, GroupConfig, ServerConfig
from ..errors import ConfigError, DetectorError, NodeProblem, RecordError, SimulatorError
from ..frames import iso_utc
from ..model import load as load_model
from ..nodes import TOP
from ..service import Service, check_nodes, retention_of, set_apart_what_stays
from ..store import Store
from ..telemetry import Redactor, configure_logging
from .doctor import open_sessions
from .emit import config_text, is_result, period_of, proposals
from .live import run_view, tree_lines
from .terminal import (
    EXIT_FOUND,
    AsJson,
    ConfigFile,
    Lines,
    MonitorName,
    chosen_server,
    err,
    fail,
    log_lines,
    out,
    print_json,
    progress_bar,
)

log = logging.getLogger(__name__)

MISSING_SHARE = 0.01  # of the rows of a history: below it the edges of the range explain it
FEW_KNOWN = 0.1  # share of a server's values that may be missing beside those of other servers before it is told
_T = TypeVar("_T")
FEW_NODES = 50  # of so few variables a longer time is looked at, to tell their kinds apart


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end on a loop of its own."""
    return asyncio.run(work)


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows: no handlers on the event loop
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    return stop


# --- history -------------------------------------------------------------------------------------------------------


def history_record(config: Config, config_file: Path, group: GroupConfig, span_ns: int) -> Record:
    """Return the last `span_ns` of the history of a group's servers, with a progress bar.

    Tags of several servers become rows by their SourceTimestamps, as they do live; the rows begin where all of the
    servers have values.

    Raises
    ------
    ConnectionProblem, NodeProblem
        A server cannot be reached, or a tag is not there or has no history; the server is named.
    RecordError
        A server has no value of that time.
    """
    return run_async(_history(config, config_file, group, span_ns))


async def _history(config: Config, config_file: Path, group: GroupConfig, span_ns: int) -> Record:
    names = [tag.server or group.server for tag in group.tags]
    sessions = {name: Session(config.server(name)) for name in dict.fromkeys(names)}
    try:
        for session in sessions.values():
            await session.open()
        raise_findings(await check_nodes(config, sessions, [group.name], [], file=str(config_file)))
        tags = group_tags(group)
        first = max([await _oldest(session, name, tags[names.index(name)]) for name, session in sessions.items()])
        now = time.time_ns()
        counts: dict[str, int] = {}
        with progress_bar(f"history of {group.name}") as update:
            rows = await read_history([sessions[name] for name in names], tags, max(first, now - span_ns), now,
                                      group.period, lateness_ns=group.lateness_ns, max_hold=group.max_hold,
                                      indexes=indexes_of(group), progress=update, counts=counts)
        if counts["missing"] > MISSING_SHARE * max(1, counts["expected"]):
            err.print(f"note: history of {group.name}: {counts['missing']} of {counts['expected']} rows are missing "
                      f"({int(rows.gap.sum()) - 1} gaps longer than max_hold)", style="yellow", markup=False)
        for name in sessions:
            known = float(np.mean(rows.valid[:, [k for k, one in enumerate(names) if one == name]]))
            if len(sessions) > 1 and known < 1 - FEW_KNOWN:
                err.print(f"note: history of {group.name}: only {known:.0%} of the values of server {name} are there "
                          "at the times of the others", style="yellow", markup=False)
        return rows
    finally:
        for session in sessions.values():
            await session.close()


async def _oldest(session: Session, server: str, tag: Tag) -> int:
    """Return the stamp of the oldest value that a server has of a tag; the errors name both."""
    try:
        first = await oldest_ns(session, tag.node)
    except NodeProblem as problem:
        raise NodeProblem(f"server {server}, tag {tag.name}: {problem.what}", where=problem.where,
                          next_step=problem.next_step) from problem
    if first is None:
        raise RecordError(f"server {server} has no history of tag {tag.name}", where=f"{session.where}, {tag.node}",
                          next_step="record with `opcua-detector record`, then fit with --recording")
    return first


# --- browse --------------------------------------------------------------------------------------------------------


def browse(
    target: Annotated[str, typer.Argument(metavar="ENDPOINT|CONFIG", help=(
        "Endpoint such as opc.tcp://192.0.2.10:4840/, or a config file."))],
    filter_: Annotated[str, typer.Option("--filter", metavar="TEXT", help=(
        "Only variables whose path or NodeId contains this; with * and ? a pattern."))] = "",
    start: Annotated[str, typer.Option(metavar="PATH", help="Browse path to start at.")] = "/Objects",
    depth: Annotated[int, typer.Option(metavar="N", help="Levels below the start.", min=1)] = 10,
    server: Annotated[str, typer.Option(metavar="NAME", help="Server of a config file; default: the first.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Connect to an endpoint without security.")] = False,
    emit_yaml: Annotated[bool, typer.Option("--emit-yaml", help=(
        "Print a config with the variables found: proposes kinds and leaves out counters, constants and duplicates, "
        "each with its reason."))] = False,
    as_json: AsJson = False,
) -> None:
    """Show the tree of a server, or turn it into a configuration."""
    where = _browse_target(target, server, insecure)
    with err.status(f"browsing {where.endpoint}") if err.is_terminal else nullcontext():
        nodes, recent = run_async(_browse(where, start, filter_, depth, emit_yaml))
    facts = [{"path": n.path, "node": n.node, "variable": n.is_variable, "type": n.type, "array": n.array,
              "unit": n.unit, "value": n.value, "readable": n.readable, "writable": n.writable,
              "history": n.history} for n in nodes]
    if not emit_yaml:
        if as_json:
            print_json({"nodes": facts})
            return
        for line in tree_lines(nodes, flat=bool(filter_)):
            out.print(line, markup=False)
        err.print(f"{sum(n.is_variable for n in nodes)} variables")
        return
    proposed = proposals(nodes, recent)
    used = [n for n in nodes if not proposed[n.node][1]]
    if not used:
        raise NodeProblem(f"none of {len(nodes)} variables is of use: " + "; ".join(
            f"{n.name}: {proposed[n.node][1]}" for n in nodes[:5]), where=where.endpoint,
            next_step="widen --filter, --start or --depth")
    text = config_text(where, nodes, proposed, period_of(used, recent))
    if as_json:
        print_json({"yaml": text, "nodes": [fact | {"kind": proposed[n.node][0], "left_out": proposed[n.node][1]}
                                            for n, fact in zip(nodes, facts, strict=True)]})
    else:
        print(text, end="")


def _browse_target(target: str, server: str, insecure: bool) -> ServerConfig:
    if "://" in target:
        if not insecure:
            raise ConfigError("an endpoint alone says nothing of security", key="ENDPOINT", value=target,
                              next_step="add --insecure, or give a config file whose server has a policy")
        text = f'version: 1\nservers: [{{name: plant, endpoint: "{target}", policy: None, insecure: true}}]\n'
        text += 'groups: [{name: g, server: plant, period: 1 s, tags: [{name: t, node: "i=2258"}]}]\n'
        return configuration.parse(text, file="command line").servers[0]
    return chosen_server(target, server)


async def _browse(target: ServerConfig, start: str, pattern: str, depth: int,
                  values: bool) -> tuple[list[BrowsedNode], dict[str, Any]]:
    """Return the nodes, and for a configuration the usable variables alone with their recent values."""
    session = Session(target)
    await session.open()
    try:
        found = [n async for n in walk(session, start=start, pattern=pattern, max_depth=depth)]
        if not values:
            return found, {}
        found = [n for n in found if n.is_variable and n.readable and not n.array and np.isfinite(n.number)
                 and not is_result(n)]
        span_ns = (300 if len(found) <= FEW_NODES else 60) * 10**9
        return found, dict(await recent_values(session, found, span_ns=span_ns))
    finally:
        await session.close()


# --- check ---------------------------------------------------------------------------------------------------------


def check(config_file: ConfigFile, as_json: AsJson = False) -> None:
    """Check config, connections, nodes, types and rights; each problem with its fix. Writes nothing."""
    config = configuration.load(config_file)
    with err.status("checking") if err.is_terminal else nullcontext():
        findings = _check_models(config, config_file) + run_async(_check_servers(config))
    errors = [f for f in findings if f.error]
    if as_json:
        print_json({"ok": not errors, "findings": [
            {"where": f.where, "problem": f.problem, "fix": f.fix, "error": f.error} for f in findings]})
    else:
        for finding in findings:
            out.print(f"{'error' if finding.error else 'note'}: {finding}", style="red" if finding.error else None,
                      markup=False)
        out.print(f"{_count(len(errors), 'problem')}, {_count(len(findings) - len(errors), 'note')}")
    if errors:
        raise typer.Exit(EXIT_FOUND)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _check_models(config: Config, config_file: Path) -> list[Finding]:
    """Check methods and models: a model that is missing is a note, since `fit` comes after `check`."""
    registry = registry_of(config)
    found = []
    for item in config.monitors:
        where = f"monitors.{item.name}"
        try:
            methods_of(item, registry, config_file)
            path, group = model_path(config_file, item), config.group(item.group)
            if path.exists():
                model = load_model(path)
                open_monitor(item, group, model, registry)
                changed = changed_since_fit(item, group, model)
                if changed:
                    found.append(Finding(where, f"changed in the config since the fit: {', '.join(changed)}; the model "
                                         "still decides", f"opcua-detector fit {config_file}", error=False))
            else:
                found.append(Finding(where, f"not fitted yet: {path} is not there",
                                     f"opcua-detector fit {config_file}", error=False))
        except DetectorError as error:
            found.append(Finding(error.where or where, error.what, error.next_step or "see the README"))
    return found


async def _check_servers(config: Config) -> list[Finding]:
    """Check connections, what the servers can do, and all nodes; what is as it should be is left out."""
    async with open_sessions(config) as (sessions, told):
        for session in sessions.values():
            told += (await examine_server(session, config.groups)).diagnoses
        findings = [finding_of(one) for one in told if one.mark is not Mark.OK and one.what != "security"]
        return findings + await check_nodes(config, sessions, [g.name for g in config.groups],
                                            [m for m in config.monitors if m.outputs])


# --- record --------------------------------------------------------------------------------------------------------


def record(
    config_file: ConfigFile,
    group: Annotated[str, typer.Option(metavar="NAME", help="Group to record; default: the first.")] = "",
    seconds: Annotated[float, typer.Option(metavar="N", help="How long; 0: until Ctrl-C.", min=0)] = 0,
    name: Annotated[str | None, typer.Option(metavar="NAME", show_default="group and time", help=(
        "Name of the recording, by which fit and replay find it."))] = None,
    as_json: AsJson = False,
) -> None:
    """Record the rows of a group into the store, for fit and replay. Ctrl-C ends it, and keeps the rows."""
    config = configuration.load(config_file)
    log_lines()
    chosen = config.group(group) if group else config.groups[0]
    facts = run_async(_record(config, config_file, chosen, seconds, name))
    err.print(f"recording {facts['recording']}: {facts['rows']} rows, {facts['counters']['gaps']} gaps, "
              f"{facts['counters']['lost']} samples lost; in {config.store.path}", markup=False)
    if as_json:
        print_json(facts)


async def _record(config: Config, config_file: Path, group: GroupConfig, seconds: float,
                  name: str | None) -> dict[str, Any]:
    stop = stop_on_signals()
    sessions = {server: Session(config.server(server))
                for server in dict.fromkeys([group.server, *(t.server for t in group.tags if t.server)])}
    rows = 0
    try:
        for session in sessions.values():
            await session.open()
        raise_findings(await check_nodes(config, sessions, [group.name], [], file=str(config_file)))
        with Store.open(config.store.path, synchronous=config.store.synchronous,
                        retention=retention_of(config)) as store:
            started = store.start_recording(name, group_tags(group), group.period, group=group.name,
                                            server=group.server, keep=True)

            def on_frame(frame: Frame) -> None:
                nonlocal rows
                store.offer_row(started, frame)
                rows += 1

            feed = GroupFeed(group, sessions, on_frame)
            await feed.start()
            expected = round(seconds * 1e9 / group.period)
            with progress_bar(f"recording {started.name}") as update:
                until = time.monotonic() + seconds if seconds else float("inf")
                while not stop.is_set() and time.monotonic() < until:
                    update(rows, max(expected, rows))
                    await _wait(stop, min(0.25, max(0.0, until - time.monotonic())))
            silent = "; ".join(f"{tag}: {why}" for tag, why in feed.tag_states().items() if why)
            await feed.stop()
            store.end_recording(started)
            if not rows and not stop.is_set():
                raise RecordError(f"no row came within {seconds:g} s", where=silent or f"group {group.name}",
                                  next_step="see with 'opcua-detector browse' whether the tags change")
            return {"recording": started.name, "rows": rows, "committed_seq": store.committed_seq,
                    "counters": feed.counters()}
    finally:
        for session in sessions.values():
            await session.close()


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), max(seconds, 0.001))
    except TimeoutError:
        return


# --- run -----------------------------------------------------------------------------------------------------------


def run(
    config_file: ConfigFile,
    monitor: MonitorName = None,
    seconds: Annotated[float, typer.Option(metavar="N", help="Stop after so long; 0: run until Ctrl-C.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Score, but write to no server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the monitors: sample, score, explain, write back, store; a live table of tags, score and cause.

    Ctrl-C or SIGTERM ends it: the nodes then say State "stopped".
    """
    config = configuration.load(config_file)
    configure_logging(form=config.log.format, level=config.log.level, redactor=Redactor.of(config),
                      text_handler=Lines(), file=config.log.file, file_bytes=config.log.size)
    facts = run_async(_run(config, config_file, monitor or (), seconds, dry_run))
    for name, item in facts["monitors"].items():
        _say(config, f"{name}: {item['scored']} rows scored, {_count(len(item['alerts']), 'alert')}, "
                  f"{item['superseded_writes']} writes superseded")
    if as_json:
        print_json(facts)


async def _run(config: Config, config_file: Path, only: Sequence[str], seconds: float, dry_run: bool) -> dict[str, Any]:
    service = Service(config, config_file, only=only, write=not dry_run)
    stop = stop_on_signals()
    set_apart_what_stays()
    with err.status("starting") if err.is_terminal else nullcontext():
        await service.start()
    reloads: set[asyncio.Task[Any]] = set()

    def reload() -> None:
        task = asyncio.get_running_loop().create_task(service.reload(), name="reload")
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    try:
        began = time.monotonic()
        _say(config, _what_runs(service, dry_run))
        until = began + seconds if seconds else float("inf")
        shown = err.is_terminal and config.log.format == "text"
        with Live(console=err, auto_refresh=False) if shown else nullcontext() as live:
            while not stop.is_set() and time.monotonic() < until:
                if live is not None:
                    live.update(run_view(service, time.monotonic() - began), refresh=True)
                await _wait(stop, min(0.25, max(0.0, until - time.monotonic())))
        facts = {"seconds": time.monotonic() - began, **run_facts(service)}
        for line in [line for back in service.backs.values() if back.rules.dry_run for line in back.preview_lines()]:
            _say(config, f"would write {line}")
    finally:
        await service.stop("stopped")
    return facts


def _say(config: Config, text: str) -> None:
    """Tell a person on stderr; where machines read the log there, as a line of it."""
    if config.log.format == "json":
        log.info("%s", text, extra={"event": "run"})
    else:
        err.print(text, markup=False)


def _what_runs(service: Service, dry_run: bool) -> str:
    """Say in one line what runs and what is written."""
    written = sum(len(run.config.outputs.node_of()) for run in service.runs.values() if run.config.outputs)
    targets = sorted({run.config.outputs.server for run in service.runs.values() if run.config.outputs})
    writing = ("a dry run, nothing is written" if dry_run else "no outputs are configured" if not written else
               f"writing {written} nodes of {', '.join(targets)}")
    return f"running {', '.join(service.runs)}: {writing}; Ctrl-C ends it"


def run_facts(service: Service) -> dict[str, Any]:
    """Return what a run has done so far, JSON-able."""
    used = np.sort(service.scoring_ns[: min(service.steps, len(service.scoring_ns))])
    return {
        "steps": service.steps,
        "scoring_us": {"p50": float(np.median(used)) / 1e3, "p99": float(np.quantile(used, 0.99)) / 1e3}
        if len(used) else None,
        "sessions": {name: {"state": s.state.value, "security": s.security.facts(), **s.counters}
                     for name, s in service.sessions.items()},
        "groups": {name: feed.counters() for name, feed in service.feeds.items()},
        "store": {"committed_seq": service.store.committed_seq} if service.store else None,
        "monitors": {name: {
            "state": item.state_text, "score": item.monitor.verdict.score, "scored": item.scored,
            "events": item.monitor.verdict.event_no, "latency_ms": item.latency_ms,
            "alerts": [{"at": iso_utc(told.source_ns), "explanation": told.sentence,
                        "causes": [asdict(cause) for cause in told.causes[:TOP]]} for told in item.alerts],
            "superseded_writes": item.back.superseded.get(name, 0) if item.back else 0,
        } for name, item in service.runs.items()},
    }


# --- sim -----------------------------------------------------------------------------------------------------------


def sim(context: typer.Context) -> None:
    """Run the simulated plant; options and help are those of `python -m sim_server run`.

    Listens on port 4840 unless told otherwise. Its first line on stdout is one JSON object (--json changes nothing).
    """
    given = [one for one in context.args if one != "--json"]
    command = [sys.executable, "-m", "sim_server"]
    if given[:1] == ["csv"]:
        code = subprocess.call([*command, *given])
    elif {"-h", "--help"} & set(given):
        code = subprocess.call([*command, "run", "--help"])
    else:
        given = given[1:] if given[:1] == ["run"] else given
        at = [] if any(one.split("=")[0] in ("--port", "--config") for one in given) else ["--port", "4840"]
        code = _serve([*command, "run", "--die-with-parent", *at, *given])
    if code and len(given) != len(context.args):
        fail(SimulatorError("the simulated plant refused or failed; stderr says why",
                            next_step="correct the option it names, or choose another port with --port"),
             as_json=True, tell=False)
    raise typer.Exit(SimulatorError.exit_code if code else 0)


def _serve(command: Sequence[str]) -> int:
    """Run the plant until it ends; SIGINT and SIGTERM stop it, and it never outlives this process."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    kept = {number: signal.signal(number, lambda *_: child.terminate()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        assert child.stdin is not None
        child.stdin.close()
