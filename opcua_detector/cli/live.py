"""What a terminal shows of a running service, and of the tree of a server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from ..client import BrowsedNode
from ..frames import iso_utc
from ..nodes import State
from ..service import MonitorRun, Service
from .terminal import table

_STYLE = {State.NORMAL: "green", State.ALERT: "bold red", State.NO_DATA: "yellow", State.STATE_NOT_LEARNT: "yellow",
          State.FAULT: "bold red"}
_NAME_CHARS, _VALUE_CHARS = 40, 24


def run_view(service: Service, seconds: float) -> Group:
    """Return the live view: connections, one line per monitor, its cause, its tags."""
    parts: list[Any] = [_links(service, seconds)]
    rows = [[name, Text(run.state_text, _STYLE.get(run.state, "")), _number(run.monitor.verdict.score, 3),
             *(_number(r, 3) for r in (run.monitor.verdict.r_trans, run.monitor.verdict.r_bound,
                                       run.monitor.verdict.r_conf)),
             run.alerts_told, _number(run.latency_ms, 1), run.quality]
            for name, run in service.runs.items()]
    parts.append(table("", ["monitor", "state", "score", "r_trans", "r_bound", "r_conf", "alerts", "latency ms",
                            "quality"], rows))
    parts += [line for run in service.runs.values() for line in _cause(run)]
    parts.append(Text())
    parts.append(table("", ["tag", "value", "unit", "state", "part of score"], list(_tags(service))))
    return Group(*parts)


def _links(service: Service, seconds: float) -> Text:
    line = Text()
    for name, session in service.sessions.items():
        good = session.state.value == "connected"
        line.append(f"{name} {session.state.value}", "green" if good else "yellow")
        line.append(f", {session.counters['reconnects']} reconnects; " if session.counters["reconnects"] else "; ")
    counted = [feed.counters() for feed in service.feeds.values()]
    line.append(f"{sum(c['rows'] for c in counted)} rows, {sum(c['lost'] for c in counted)} samples lost, "
                f"{sum(c['gaps'] for c in counted)} gaps; {seconds:.0f} s")
    return line


def _cause(run: MonitorRun) -> Iterator[Text]:
    if run.monitor.verdict.alert and run.explanation is not None:
        yield Text(f"  {run.explanation.sentence}", "red")
    elif run.alerts:
        told = run.alerts[-1]
        yield Text(f"  last alert {iso_utc(told.source_ns)[:19]}Z: {told.sentence}", "dim")


def _tags(service: Service) -> Iterator[list[Any]]:
    for name, feed in service.feeds.items():
        share: dict[str, float] = {}
        for run in service.runs.values():
            if run.config.group == name:
                for tag, part in zip(run.monitor.verdict.tags, run.monitor.verdict.contribution, strict=True):
                    share[tag] = max(share.get(tag, 0.0), float(part))
        states = feed.tag_states()
        for i, one in enumerate(service.config.group(name).tags):
            if one.name in share:
                state = states.get(one.name) or ("" if feed.frame.valid[i] else "masked")
                yield [one.name, _number(float(feed.frame.values[i]), 4), one.unit, state,
                       f"{share[one.name]:.0%}" if share[one.name] else ""]


def _number(value: float, digits: int) -> Text:
    return Text("-" if value != value else f"{value:.{digits}f}", justify="right")


def tree_lines(nodes: Sequence[BrowsedNode], *, flat: bool) -> list[str]:
    """Return one line per node: name (indented, or the whole path), type, value, rights, NodeId."""
    ordered = list(nodes) if flat else _depth_first(nodes)
    names = [n.path if flat else "  " * (n.depth - 1) + n.name for n in ordered]
    values = [f"{n.value} {n.unit}".strip() for n in ordered]
    wide = min(max((len(name) for name in names), default=0), 80 if flat else _NAME_CHARS)
    wide_value = min(max((len(value) for value in values), default=0), _VALUE_CHARS)
    lines = []
    for name, value, n in zip(names, values, ordered, strict=True):
        kind = (n.type + ("[]" if n.array else "")).ljust(8)
        short = value if len(value) <= _VALUE_CHARS else value[:_VALUE_CHARS - 3] + "..."
        rights = ("w" if n.writable else "-") + ("h" if n.history else "-") if n.is_variable else "  "
        lines.append(f"{name.ljust(wide)} {kind} {short.rjust(wide_value)} {rights} {n.node}")
    return lines


def _depth_first(nodes: Sequence[BrowsedNode]) -> list[BrowsedNode]:
    """Return nodes, which come level by level, in the order of a tree."""
    below: dict[str, list[BrowsedNode]] = {}
    known = {n.path for n in nodes}
    for node in nodes:
        match = re.fullmatch(r"(.*)/(?:&.|[^/&])*", node.path, re.DOTALL)
        parent = match[1] if match else ""
        below.setdefault(parent if parent in known else "", []).append(node)
    ordered: list[BrowsedNode] = []
    waiting = list(reversed(below.pop("", [])))
    while waiting:
        node = waiting.pop()
        ordered.append(node)
        waiting += reversed(below.pop(node.path, []))
    return ordered
