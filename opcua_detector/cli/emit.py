"""Turns browsed nodes into configuration text, with proposals and reasons as comments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..client import BrowsedNode
from ..columns import suggest_kind
from ..config import ServerConfig
from ..nodes import RESULTS_NAMESPACE

Recent = Mapping[str, Any]  # node -> (source_ns int64[m], value float64[m])
MIN_PERIOD_NS, GUESSED_PERIOD_NS = 10**6, 10**8


def is_result(node: BrowsedNode) -> bool:
    """Whether a node is one that a detector writes."""
    return f"nsu={RESULTS_NAMESPACE};" in node.node


def proposals(nodes: Sequence[BrowsedNode], recent: Recent) -> dict[str, tuple[str, str]]:
    """Return node -> (proposed kind, reason against using it or empty)."""
    found: dict[str, tuple[str, str]] = {}
    kept: list[tuple[str, Any, Any]] = []
    historian = any(n.history for n in nodes)
    for node in nodes:
        stamps, values = recent[node.node]
        kind, reason = suggest_kind(node.type, node.writable, values)
        if node.type == "String" and kind != "state" and not reason:
            reason = "text"
        elif not reason and historian and not node.history:
            reason = "no history, so that fit needs a recording"
        for other, other_stamps, other_values in kept:
            if not reason and len(stamps) > 2 and np.array_equal(stamps, other_stamps) and np.array_equal(
                    values, other_values):
                reason = f"duplicate of {other}"
        if not reason:
            kept.append((node.name, stamps, values))
        found[node.node] = (kind, reason)
    return found


def period_of(used: Sequence[BrowsedNode], recent: Recent) -> int:
    """Return the period to propose, ns: the fastest of the tags' median distances of stamps, to two digits."""
    steps = []
    for node in used:
        stamps = np.unique(recent[node.node][0])
        if len(stamps) > 2:
            steps.append(float(np.median(np.diff(stamps))))
    fastest = min(steps, default=float(GUESSED_PERIOD_NS))
    return max(MIN_PERIOD_NS, int(float(f"{fastest:.2g}")) // 10**6 * 10**6)


def config_text(server: ServerConfig, nodes: Sequence[BrowsedNode], kinds: Mapping[str, tuple[str, str]],
                period_ns: int) -> str:
    """Return a configuration with the usable variables; the others stand below as comments with the reason.

    kinds : node -> (proposed kind, reason against using it or empty)
    """
    used = [n for n in nodes if not kinds[n.node][1]]
    names = _unique_names([*used, *(n for n in nodes if kinds[n.node][1])])
    name = server.name
    lines = ["version: 1", "", "servers:", *_server_lines(server), "", "groups:", f"  - name: {name}",
             f"    server: {name}", f"    period: {period_ns // 10**6} ms  # how often the values change", "    tags:"]
    lines += [f"      - {_tag(n, names[n.node], kinds[n.node][0])}" for n in used]
    lines += [f"      # - {_tag(n, names[n.node], kinds[n.node][0])}  # left out: {kinds[n.node][1]}"
              for n in nodes if kinds[n.node][1]]
    lines += ["", "monitors:", f"  - name: {name}", f"    group: {name}", "    methods: [transition]",
              "    # Results go to the server once it has nodes for them ('opcua-detector nodeset' prints them):",
              f'    # outputs: {{server: {name}, base: "nsu={RESULTS_NAMESPACE};s={name}"}}', ""]
    return "\n".join(lines)


def _server_lines(server: ServerConfig) -> list[str]:
    """Return what is not default of a server, as it would be typed."""
    given = server.model_dump(exclude_defaults=True)
    if "timeout" in given:
        given["timeout"] = f"{given['timeout'] // 10**6} ms"
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    lines = [f"{key}: {value if key in ('name', 'policy') else json.dumps(value)}" for key, value in shown.items()]
    return [f"  {'-' if i == 0 else ' '} {line}" for i, line in enumerate(lines)]


def _tag(node: BrowsedNode, name: str, kind: str) -> str:
    parts = [f"name: {name}", f"node: {json.dumps(node.node, ensure_ascii=False)}"]
    if kind != "measured":
        parts.append(f"kind: {kind}")
    if node.unit:
        parts.append(f"unit: {json.dumps(node.unit, ensure_ascii=False)}")
    if node.eu_range:
        parts.append(f"eu_range: [{node.eu_range[0]!r}, {node.eu_range[1]!r}]")
    return "{" + ", ".join(parts) + "}"


def _unique_names(nodes: Sequence[BrowsedNode]) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in nodes:
        base = re.sub(r"[^A-Za-z0-9_.\-]", "_", node.name).lstrip(".-")[:60] or "tag"
        name, n = base, 2
        while name in names.values():
            name, n = f"{base}_{n}", n + 1
        names[node.node] = name
    return names
