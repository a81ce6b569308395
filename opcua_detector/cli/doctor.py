"""The command `doctor`: looks at everything between here and the plant, measures it, and says how to mend it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .. import config as configuration
from ..client import (
    Diagnosis,
    Examined,
    Finding,
    Mark,
    Session,
    diagnosis_of,
    examine_server,
    measure_group,
    measure_write,
)
from ..config import Config, GroupConfig
from ..errors import DetectorError
from ..service import check_nodes
from .terminal import EXIT_FOUND, AsJson, ConfigFile, err, out, print_json

SECONDS = 5.0
MOST_PIPED = 120  # columns, where the output is no terminal
_STYLE = {Mark.OK: "green", Mark.WARNING: "yellow", Mark.PROBLEM: "bold red"}


def doctor(
    config_file: ConfigFile,
    seconds: Annotated[float, typer.Option("--seconds", metavar="N", min=1.0, max=600.0, help=(
        "How long to watch each group; slow groups are watched for 20 periods, at most 30 s."))] = SECONDS,
    group: Annotated[list[str] | None, typer.Option("--group", metavar="NAME", help=(
        "Watch only this group; repeatable."))] = None,
    write: Annotated[bool, typer.Option("--write", help=(
        "Measure a write too: one output node per monitor gets its present value again. Without it nothing is "
        "written."))] = False,
    as_json: AsJson = False,
) -> None:
    """Examine servers, certificates, clocks, limits, tags and outputs, and measure what each group really delivers.

    Each finding is ok, a warning or a problem, with its fix beside it. Exit code 0: no problem (there may be warnings);
    9: a problem.
    """
    config = configuration.load(config_file)
    groups = [config.group(name) for name in group] if group else list(config.groups)
    with err.status("examining") if err.is_terminal else nullcontext():
        diagnoses, facts = asyncio.run(examine(config, groups, seconds, write))
    counts = {mark.value: sum(one.mark is mark for one in diagnoses) for mark in Mark}
    if as_json:
        print_json({"ok": not counts["problem"], "counts": counts,
                    "diagnoses": [asdict(one) for one in diagnoses], **facts})
    else:
        show_diagnoses(diagnoses)
    if counts["problem"]:
        raise typer.Exit(EXIT_FOUND)


async def examine(config: Config, groups: Sequence[GroupConfig], seconds: float,
                   write: bool) -> tuple[list[Diagnosis], dict[str, Any]]:
    """Return all diagnoses, servers first, and the figures behind them."""
    async with open_sessions(config) as (sessions, told):
        facts: dict[str, Any] = {"servers": {}, "groups": {}, "writes": {}}
        for name, session in sessions.items():
            told += await _one(facts["servers"], name, examine_server(session, config.groups), f"server {name}")
        findings = await check_nodes(config, sessions, [g.name for g in config.groups],
                                     [m for m in config.monitors if m.outputs])
        told += [diagnosis_of(one) for one in findings]
        told += _all_well(config, sessions, findings)
        offsets = {name: one.get("clock", {}).get("offset_s", 0.0) for name, one in facts["servers"].items()}
        for one in groups:
            missing = [tag.server or one.server for tag in one.tags if (tag.server or one.server) not in sessions]
            if missing:
                told.append(Diagnosis(f"group {one.name}", "rows", Mark.WARNING,
                                      f"not watched: no connection to {missing[0]}", "see what is said of that server"))
                continue
            told += await _one(facts["groups"], one.name, measure_group(one, sessions, seconds, offsets),
                               f"group {one.name}")
        for item in config.monitors if write else ():
            if item.outputs and item.outputs.server in sessions:
                work = measure_write(sessions[item.outputs.server], item.name, item.outputs.node_of())
                told += await _one(facts["writes"], item.name, work, f"monitor {item.name}")
    return told, facts


async def _one(facts: dict[str, Any], name: str, work: Any, where: str) -> list[Diagnosis]:
    """Await one examination; a connection that is lost meanwhile is a finding, and the rest goes on."""
    try:
        found: Examined = await work
    except DetectorError as error:
        return [Diagnosis(where, "connection", Mark.PROBLEM, error.what, error.next_step)]
    facts[name] = found.facts
    return found.diagnoses


def _all_well(config: Config, sessions: Mapping[str, Session], findings: Iterable[Finding]) -> list[Diagnosis]:
    """Say of each group and monitor on which nothing was found that its nodes are as configured."""
    spoilt = {one.where.split(".")[1] for one in findings if one.where.startswith(("groups.", "monitors."))}
    told = [Diagnosis(f"groups.{one.name}.tags", "node", Mark.OK,
                      f"{len(one.tags)} tags found, readable, of a usable type")
            for one in config.groups if one.name not in spoilt and one.server in sessions]
    told += [Diagnosis(f"monitors.{one.name}.outputs", "node", Mark.OK,
                       f"{len(one.outputs.node_of())} nodes found, writable, of a type that takes the result")
             for one in config.monitors if one.outputs and one.name not in spoilt and one.outputs.server in sessions]
    return told


# --- shared with `check` ---


@asynccontextmanager
async def open_sessions(config: Config) -> AsyncIterator[tuple[dict[str, Session], list[Diagnosis]]]:
    """Connect to every server of a config; what cannot be connected to is a diagnosis."""
    sessions: dict[str, Session] = {}
    told: list[Diagnosis] = []
    try:
        for item in config.servers:
            session = Session(item)
            try:
                await session.open()
                sessions[item.name] = session
            except DetectorError as error:
                told.append(Diagnosis(error.where or f"server {item.name}", "connection", Mark.PROBLEM, error.what,
                                      error.next_step))
        yield sessions, told
    finally:
        for session in sessions.values():
            await session.close()


# --- on the terminal ---


def show_diagnoses(diagnoses: Sequence[Diagnosis]) -> None:
    """Print diagnoses, those of one thing together, each with its fix below; readable in a narrow terminal too."""
    console = out if out.is_terminal else Console(file=sys.stdout, width=MOST_PIPED, highlight=False)
    by_place: dict[str, list[Diagnosis]] = {}
    for one in diagnoses:
        by_place.setdefault(one.where, []).append(one)
    for where, found in by_place.items():
        console.print(Text(where, "bold"), soft_wrap=False, overflow="fold")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=7, no_wrap=True)
        grid.add_column(max_width=max(8, min(24, console.width // 4)), overflow="fold")
        grid.add_column(ratio=1, overflow="fold")
        for one in found:
            words = Text(one.found)
            if one.fix:
                words.append("\nfix: ", _STYLE[one.mark])
                words.append(one.fix)
            grid.add_row(Text(one.mark.value, _STYLE[one.mark]), one.what, words)
        console.print(Padding(grid, (0, 0, 0, 2), expand=False), soft_wrap=False)
    n = {mark: sum(one.mark is mark for one in diagnoses) for mark in Mark}
    console.print(Text.assemble(
        (_count(n[Mark.PROBLEM], "problem"), _STYLE[Mark.PROBLEM] if n[Mark.PROBLEM] else ""), ", ",
        (_count(n[Mark.WARNING], "warning"), _STYLE[Mark.WARNING] if n[Mark.WARNING] else ""), f", {n[Mark.OK]} ok"))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
