"""Turns browsed nodes into configuration text, with proposals and reasons as comments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..client import BrowsedNode
from ..config import ServerConfig


def config_text(server: ServerConfig, nodes: Sequence[BrowsedNode], kinds: Mapping[str, tuple[str, str]]) -> str:
    """Return a configuration with the usable variables; the others stand below as comments with the reason.

    kinds : node -> (proposed kind, reason against using it or empty)
    """
    used = [n for n in nodes if not kinds[n.node][1]]
    names = _unique_names(used)
    lines = [
        "version: 1", "", "servers:",
        f"  - name: {server.name}", f"    endpoint: {server.endpoint}", f"    policy: {server.policy}",
        *(["    insecure: true"] if server.insecure else []), "", "groups:", "  - name: plant",
        f"    server: {server.name}", "    period: 100 ms  # set it to how often the plant's values change",
        "    tags:",
    ]
    for node in used:
        kind, _ = kinds[node.node]
        parts = [f"name: {names[node.node]}", f'node: "{node.node}"']
        if kind != "measured":
            parts.append(f"kind: {kind}")
        if node.unit:
            parts.append(f'unit: "{node.unit}"')
        if node.eu_range:
            parts.append(f"eu_range: [{node.eu_range[0]:g}, {node.eu_range[1]:g}]")
        lines.append("      - {" + ", ".join(parts) + "}")
    if not used:
        lines.append("      []  # no usable variable was found")
    for node in nodes:
        if kinds[node.node][1]:
            lines.append(f"      # left out: {node.node}: {kinds[node.node][1]}")
    lines += ["", "monitors:", "  - name: plant", "    group: plant", "    methods: [transition]", ""]
    return "\n".join(lines)


def _unique_names(nodes: Sequence[BrowsedNode]) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in nodes:
        base = re.sub(r"[^A-Za-z0-9_.\-]", "_", node.name).lstrip(".-")[:60] or "tag"
        name, n = base, 2
        while name in names.values():
            name, n = f"{base}_{n}", n + 1
        names[node.node] = name
    return names
