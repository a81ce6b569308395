"""Commands that talk to a server: browse, check, record, run, sim; and reading the healthy history for fit."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.live import Live
from rich.logging import RichHandler

from .. import config as configuration
from ..api import Frame, Record
from ..app import group_tags, model_path, open_monitor, registry_of
from ..client import BrowsedNode, Finding, GroupFeed, Session, oldest_ns, problem_of, read_history, recent_values, walk
from ..columns import suggest_kind
from ..config import Config, GroupConfig, ServerConfig
from ..errors import ConfigError, ConnectionProblem, DetectorError, RecordError
from ..frames import iso_utc
from ..model import load as load_model
from ..nodes import STATE_TEXTS
from ..service import Service, check_nodes, retention_of
from ..store import Store
from .emit import config_text
from .terminal import EXIT_FOUND, AsJson, ConfigFile, MonitorName, err, out, print_json, progress_bar, table

_T = TypeVar("_T")


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


def history_record(config: Config, group: GroupConfig, span_ns: int) -> Record:
    """Return the last `span_ns` of the servers' history for a group, with a progress bar."""
    return run_async(_history(config, group, span_ns))


async def _history(config: Config, group: GroupConfig, span_ns: int) -> Record:
    if any(tag.server not in ("", group.server) for tag in group.tags):
        raise ConfigError("history is read from one server", key=f"groups.{group.name}", next_step=(
            "record the group with `opcua-detector record` and fit with --recording"))
    session = Session(config.server(group.server))
    await session.open()
    try:
        tags = group_tags(group)
        first = await oldest_ns(session, tags[0].node)
        if first is None:
            raise RecordError("the server has no history of this tag", where=f"{session.where}, {tags[0].node}",
                              next_step="record with `opcua-detector record`, then fit with --recording")
        now = time.time_ns()
        with progress_bar(f"history of {group.name}") as update:
            return await read_history(session, tags, max(first, now - span_ns), now, group.period,
                                      lateness_ns=group.lateness_ns, max_hold=group.max_hold, progress=update)
    finally:
        await session.close()


# --- browse --------------------------------------------------------------------------------------------------------


def browse(
    endpoint: Annotated[str, typer.Argument(help="Endpoint such as opc.tcp://192.0.2.10:4840/, or a config file.")],
    filter_: Annotated[str, typer.Option("--filter", help="Only variables whose path contains this.")] = "",
    start: Annotated[str, typer.Option(help="Browse path to start at.")] = "/Objects",
    depth: Annotated[int, typer.Option(help="Levels below the start.", min=1)] = 10,
    server: Annotated[str, typer.Option(help="Name of the server, where a config file is given.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Connect without security.")] = False,
    emit_yaml: Annotated[bool, typer.Option("--emit-yaml", help="Print a config with the variables found: proposes "
                                            "kinds and leaves out counters, constants and duplicates.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the tree of a server, or turn it into a configuration."""
    target = _browse_target(endpoint, server, insecure)
    nodes, kinds = run_async(_browse(target, start, filter_, depth, emit_yaml))
    if emit_yaml:
        print(config_text(target, nodes, kinds), end="")
        return
    if as_json:
        print_json({"nodes": [{"path": n.path, "node": n.node, "type": n.type, "unit": n.unit, "value": n.value,
                               "writable": n.writable, "history": n.history} for n in nodes]})
        return
    out.print(table("", ["path", "node", "type", "unit", "value", "rights"],
                    [["  " * n.depth + n.name, n.node, n.type, n.unit, n.value,
                      ("write " if n.writable else "") + ("history" if n.history else "")] for n in nodes]))
    err.print(f"{sum(n.is_variable for n in nodes)} variables")


def _browse_target(endpoint: str, server: str, insecure: bool) -> ServerConfig:
    if endpoint.startswith("opc.tcp://"):
        if not insecure:
            raise ConfigError("an endpoint alone says nothing of security", key="endpoint", value=endpoint,
                              next_step="add --insecure, or give a config file whose server has a policy")
        text = f'version: 1\nservers: [{{name: plant, endpoint: "{endpoint}", policy: None, insecure: true}}]\n'
        text += 'groups: [{name: g, server: plant, period: 1 s, tags: [{name: t, node: "i=2258"}]}]\n'
        return configuration.parse(text, file="command line").servers[0]
    config = configuration.load(endpoint)
    names = [s.name for s in config.servers]
    if server and server not in names:
        raise ConfigError("there is no server of this name", key="--server", value=server,
                          expected=f"one of {', '.join(names)}")
    return config.server(server or names[0])


async def _browse(target: ServerConfig, start: str, pattern: str, depth: int, kinds: bool,
                  ) -> tuple[list[BrowsedNode], dict[str, tuple[str, str]]]:
    session = Session(target)
    await session.open()
    try:
        found = [n async for n in walk(session, start=start, pattern=pattern, max_depth=depth)]
        if not kinds:
            return found, {}
        found = [n for n in found if n.is_variable and n.readable and not n.array and np.isfinite(n.number)]
        return found, _kinds(found, await recent_values(session, found))
    finally:
        await session.close()


def _kinds(nodes: Sequence[BrowsedNode], recent: Any) -> dict[str, tuple[str, str]]:
    """Return node -> (proposed kind, reason against using it or empty)."""
    kinds: dict[str, tuple[str, str]] = {}
    kept: list[tuple[str, Any, Any]] = []
    for node in nodes:
        stamps, values = recent[node.node]
        kind, reason = suggest_kind(node.type, node.writable, values)
        for other, other_stamps, other_values in kept:
            if not reason and len(stamps) > 2 and np.array_equal(stamps, other_stamps) and np.array_equal(
                    values, other_values):
                reason = f"duplicate of {other}"
        if not reason:
            kept.append((node.name, stamps, values))
        kinds[node.node] = (kind, reason)
    return kinds


# --- check ---------------------------------------------------------------------------------------------------------


def check(config_file: ConfigFile, as_json: AsJson = False) -> None:
    """Check config, connections, nodes, types and rights; each problem with its fix. Writes nothing."""
    config = configuration.load(config_file)
    findings = _check_models(config, config_file) + run_async(_check_servers(config))
    errors = [f for f in findings if f.error]
    if as_json:
        print_json({"ok": not errors, "findings": [
            {"where": f.where, "problem": f.problem, "fix": f.fix, "error": f.error} for f in findings]})
    else:
        for finding in findings:
            out.print(f"{'error' if finding.error else 'note'}: {finding}", style="red" if finding.error else None,
                      markup=False)
        out.print(f"{len(errors)} problems, {len(findings) - len(errors)} notes")
    if errors:
        raise typer.Exit(EXIT_FOUND)


def _check_models(config: Config, config_file: Path) -> list[Finding]:
    """Check methods and models: a model that is missing is a note, since `fit` comes after `check`."""
    registry = registry_of(config)
    found = []
    for item in config.monitors:
        where = f"monitors.{item.name}"
        try:
            for method in item.methods:
                registry.params(method["name"], {k: v for k, v in method.items() if k != "name"})
            path = model_path(config_file, item)
            if path.exists():
                open_monitor(item, config.group(item.group), load_model(path), registry)
            else:
                found.append(Finding(where, f"not fitted yet: {path} is not there", "opcua-detector fit", error=False))
        except DetectorError as error:
            found.append(Finding(where, error.what, error.next_step or "see the README"))
    return found


async def _check_servers(config: Config) -> list[Finding]:
    sessions: dict[str, Session] = {}
    findings: list[Finding] = []
    try:
        for item in config.servers:
            session = Session(item)
            try:
                await session.open()
                sessions[item.name] = session
            except ConnectionProblem as error:
                findings.append(problem_of(error))
            except DetectorError as error:
                findings.append(Finding(error.where, error.what, error.next_step))
        findings += await check_nodes(config, sessions, [g.name for g in config.groups],
                                      [m for m in config.monitors if m.outputs])
    finally:
        for session in sessions.values():
            await session.close()
    return findings


# --- record --------------------------------------------------------------------------------------------------------


def record(
    config_file: ConfigFile,
    group: Annotated[str, typer.Option(help="Group to record; default: the first.")] = "",
    seconds: Annotated[float, typer.Option(help="How long; 0: until interrupted.", min=0)] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the recording; default: group and time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Record the rows of a group into the store, for fit and replay."""
    config = configuration.load(config_file)
    chosen = config.group(group) if group else config.groups[0]
    facts = run_async(_record(config, chosen, seconds, name))
    err.print(f"recording {facts['recording']}: {facts['rows']} rows", markup=False)
    if as_json:
        print_json(facts)


async def _record(config: Config, group: GroupConfig, seconds: float, name: str | None) -> dict[str, Any]:
    stop = stop_on_signals()
    sessions = {server: Session(config.server(server))
                for server in dict.fromkeys([group.server, *(t.server for t in group.tags if t.server)])}
    rows = 0
    with Store.open(config.store.path, synchronous=config.store.synchronous, retention=retention_of(config)) as store:
        try:
            for session in sessions.values():
                await session.open()
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
            await feed.stop()
            counters = feed.counters()
            store.end_recording(started)
        finally:
            for session in sessions.values():
                await session.close()
        return {"recording": started.name, "rows": rows, "committed_seq": store.committed_seq, "counters": counters}


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), max(seconds, 0.001))
    except TimeoutError:
        return


# --- run -----------------------------------------------------------------------------------------------------------


def run(
    config_file: ConfigFile,
    monitor: MonitorName = None,
    seconds: Annotated[float, typer.Option(help="Stop after so long; 0: run until interrupted.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Score, but write to no server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the monitors: sample, score, explain, write back, store; a live table of tags, score and cause."""
    config = configuration.load(config_file)
    logging.basicConfig(level=logging.WARNING, format="%(message)s",
                        handlers=[RichHandler(console=err, show_path=False)])
    facts = run_async(_run(config, config_file, monitor or (), seconds, dry_run))
    if as_json:
        print_json(facts)


async def _run(config: Config, config_file: Path, only: Sequence[str], seconds: float, dry_run: bool) -> dict[str, Any]:
    service = Service(config, config_file, only=only, write=not dry_run)
    stop = stop_on_signals()
    await service.start()
    try:
        until = time.monotonic() + seconds if seconds else float("inf")
        with Live(console=err, refresh_per_second=4, transient=False, auto_refresh=False) as live:
            while not stop.is_set() and time.monotonic() < until:
                if err.is_terminal:
                    live.update(run_view(service), refresh=True)
                await _wait(stop, min(0.25, max(0.0, until - time.monotonic())))
        facts = run_facts(service)
    finally:
        await service.stop("stopped")
    return facts


def run_view(service: Service) -> Any:
    """Return the live table: one line per monitor, then its tags."""
    rows: list[list[Any]] = []
    for name, item in service.runs.items():
        verdict = item.monitor.verdict
        told = item.explanation.sentence if verdict.alert and item.explanation else ""
        rows.append([name, STATE_TEXTS[item.state], round(verdict.score, 3), f"{item.latency_ms:.1f}", verdict.quality,
                     told])
        frame = service.feeds[item.config.group].frame if item.config.group in service.feeds else None
        names = [t.name for t in service.config.group(item.config.group).tags]
        for tag, share in zip(verdict.tags, verdict.contribution, strict=True):
            value = float(frame.values[names.index(tag)]) if frame is not None else float("nan")
            rows.append([f"  {tag}", "", value, "", "", f"{share:.0%} of the score" if share else ""])
    return table("", ["monitor / tag", "state", "score / value", "latency ms", "quality", "cause"], rows)


def run_facts(service: Service) -> dict[str, Any]:
    """Return what a run has done so far, JSON-able."""
    used = np.sort(service.scoring_ns[: min(service.steps, len(service.scoring_ns))])
    return {
        "steps": service.steps,
        "scoring_us": {"p50": float(np.median(used)) / 1e3, "p99": float(np.quantile(used, 0.99)) / 1e3}
        if len(used) else None,
        "sessions": {name: {"state": s.state.value, **s.counters} for name, s in service.sessions.items()},
        "groups": {name: feed.counters() for name, feed in service.feeds.items()},
        "store": {"committed_seq": service.store.committed_seq} if service.store else None,
        "monitors": {name: {
            "state": STATE_TEXTS[item.state], "score": item.monitor.verdict.score, "scored": item.scored,
            "events": item.monitor.verdict.event_no, "latency_ms": item.latency_ms,
            "alerts": [{"at": iso_utc(told.source_ns), "explanation": told.sentence} for told in item.alerts],
            "superseded_writes": item.back.superseded.get(name, 0) if item.back else 0,
        } for name, item in service.runs.items()},
    }


# --- sim -----------------------------------------------------------------------------------------------------------


def sim(context: typer.Context) -> None:
    """Run the simulated plant; all options go to `python -m sim_server run` (see `--help` there)."""
    arguments = context.args or ["--port", "4840"]
    raise typer.Exit(subprocess.call([sys.executable, "-m", "sim_server", *arguments]))


