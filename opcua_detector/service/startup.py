"""What a service does before the first row: open models and store, check nodes, run every code path once."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..api import Frame
from ..app import changed_since_fit, open_monitors
from ..client import Finding, Session, check_outputs, check_tags
from ..client.arrays import indexes_of
from ..config import Config, MonitorConfig
from ..engine import Engine, Monitor
from ..store import Retention, Store
from ..store.schema import DamagedStore

log = logging.getLogger(__name__)

OpenMonitors = Mapping[str, list[tuple[MonitorConfig, Monitor]]]  # group -> its monitors


def load_monitors(config: Config, config_file: Path, only: Sequence[str] = ()) -> OpenMonitors:
    """Load the models of these monitors (none: of all), and warn where the config has changed since the fit.

    Raises
    ------
    ModelError
        A model cannot be loaded, or does not fit its monitor.
    """
    opened = {group: [(config.monitor(monitor.name), monitor) for monitor in monitors]
              for group, monitors in open_monitors(config, config_file, only=only).items()}
    for group, items in opened.items():
        for item, monitor in items:
            changed = changed_since_fit(item, config.group(group), monitor.model)
            if changed:
                log.warning("monitor %s: %s changed in the config since the fit; the model decides until you fit again",
                            item.name, ", ".join(changed))
    return opened


def open_store(config: Config) -> Store:
    """Open the store; a damaged one is set aside: an old record must not keep the plant from being watched.

    Raises
    ------
    StoreError
        It cannot be opened, or is damaged where `store.on_corrupt` says `refuse`.
    """
    settings, retention = config.store, retention_of(config)
    try:
        return Store.open(settings.path, synchronous=settings.synchronous, retention=retention)
    except DamagedStore as damage:
        if settings.on_corrupt != "set_aside":
            raise
        store = Store.open(settings.path, synchronous=settings.synchronous, retention=retention,
                           on_corrupt="set_aside")
        entry = next(iter(store.audit("damaged file set aside", limit=1)), None)
        log.error("%s: it was renamed to %s, and an empty store is begun; event numbers begin anew", damage.what,
                  entry.detail["renamed_to"] if entry else "a file beside it")
        return store


async def check_nodes(config: Config, sessions: Mapping[str, Session], groups: Sequence[str],
                      outputs: Sequence[MonitorConfig], *, file: str = "") -> list[Finding]:
    """Return every problem with tags and outputs, each with the key it comes from; writes nothing."""
    asked: list[Awaitable[list[Finding]]] = []
    prefix = f"{file}: " if file else ""
    for name in groups:
        group = config.group(name)
        by_server: dict[str, list[Any]] = {}
        indexes = indexes_of(group)
        for item in group.tags:
            by_server.setdefault(item.server or group.server, []).append(item.tag())
        for server, tags in by_server.items():
            if server in sessions:
                asked.append(check_tags(sessions[server], tags, f"{prefix}groups.{name}.tags", indexes))
    for monitor in outputs:
        assert monitor.outputs is not None
        if monitor.outputs.server in sessions:
            asked.append(check_outputs(sessions[monitor.outputs.server], monitor.outputs.node_of(),
                                       where=f"{prefix}monitors.{monitor.name}.outputs"))
    return [one for found in await asyncio.gather(*asked) for one in found]


def retention_of(config: Config) -> Retention:
    """Return the store's retention for a config: raw rows are thinned at a quarter of their life."""
    keep = config.store.keep_rows
    return Retention(quota_bytes=config.store.quota, thin_after_ns=keep // 4, delete_after_ns=keep)


def config_hash(file: Path) -> str:
    """Return the sha256 of the configuration file, empty where there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def servers_of(config: Config, item: MonitorConfig) -> list[str]:
    """Return the servers that a monitor reads from and writes to, each once."""
    group = config.group(item.group)
    names = [group.server, *(tag.server for tag in group.tags if tag.server)]
    return list(dict.fromkeys([*names, *([item.outputs.server] if item.outputs else [])]))


def warm(engine: Engine, n_tags: int) -> None:
    """Run every code path once before the first row: a compile or first call in mid-loop costs milliseconds."""
    frame = Frame.empty(n_tags)
    frame.values[:], frame.valid[:] = 0.0, 1
    for monitor in engine.monitors:
        for i in range(2 * max(m.lag + m.memory for m in monitor.methods) + 4):
            frame.gap, frame.source_ns = i == 0, i
            monitor.step(frame)
        monitor.restart()


def set_apart_what_stays() -> None:
    """Take the objects that exist by now (modules, compiled code) out of all later garbage collections.

    A full collection looks at each of them and would hold up the event loop for some tenths of a second, again and
    again; without them it is short and may come often. For a process that runs one service until it ends.
    """
    gc.collect()
    gc.freeze()
