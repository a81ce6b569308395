"""The two servers the faults are tried on, under one set of words: the asyncua simulator and node-opcua."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from asyncua import Client

from opcua_detector.client.waiting import farewell
from sim_server.processes import make
from sim_server.testing import RunningPlant, running_plant

from .node_server import NodeServer, node_server

SEED = 0
WARMUP_ROWS = 2000
# 70 min; the second vendor plays them over and over, and the step from the last to the first is an anomaly.
ROWS = 420_000
TAGS = ("x1", "x3")
PLANT_URI = "urn:opcua-detector:simulated-plant"
ALL = "measured"  # every tag, in a quirk
FULL = "full"  # argument of session_limit: no room for one more
STATUS = {"BadSensorFailure": "bad", "GoodOverload": "overload"}


class Vendor(Protocol):
    """A server that plays the healthy Lorenz process and can be disturbed."""

    name: str

    @property
    def port(self) -> int:
        """TCP port."""
        ...

    def kill(self) -> None:
        """End the process (SIGKILL)."""
        ...

    def restart(self, *, namespaces_before: Sequence[str] = (), **changes: Any) -> None:
        """Start again on the same port; namespaces registered before the plant's shift all indexes.

        changes : to the settings of this server, for good
        """
        ...

    def pause(self) -> None:
        """Freeze the process (SIGSTOP)."""
        ...

    def resume(self) -> None:
        """Let the process go on."""
        ...

    async def disturb(self, what: str, argument: str = "") -> None:
        """Do one of `sim_server.disturb.DISTURBANCES`."""
        ...

    async def status(self, code: str, *tags: str) -> None:
        """Report these tags with a status by name; "Good" ends it."""
        ...

    async def quirk(self, tag: str, what: str, value: float) -> None:
        """Set one of `sim_server.quirks.QUIRKS` for a tag, or for all with `ALL`; 0 ends it."""
        ...

    async def clock(self, offset_ms: float) -> None:
        """Let the clock of the server jump by this much from its true time, in every stamp that it gives."""
        ...

    async def calm(self) -> None:
        """End every disturbance, so that the next test finds a healthy plant."""
        ...


class Simulator:
    """The project's own simulated plant, on asyncua."""

    name = "asyncua"

    def __init__(self, running: RunningPlant, config_file: Path, settings: Mapping[str, Any]) -> None:
        self._running, self._config_file, self._settings = running, config_file, dict(settings)
        self._removed: set[str] = set()
        self._control: Client | None = None  # beside any proxy, opened before a disturbance may hinder it

    @property
    def port(self) -> int:
        return self._running.port

    def kill(self) -> None:
        self._running.kill()

    def restart(self, *, namespaces_before: Sequence[str] = (), **changes: Any) -> None:
        self._settings |= changes
        write_config(self._config_file, **self._settings | {"namespaces_before": list(namespaces_before)})
        self._running.restart()

    def pause(self) -> None:
        self._running.pause()

    def resume(self) -> None:
        self._running.resume()

    async def _call(self, method: str, *arguments: Any) -> None:
        if self._control is None:
            self._control = Client(self._running.endpoint)
            await self._control.connect()
        try:
            index = await self._control.get_namespace_index(PLANT_URI)
        except OSError:  # the server was killed or stopped meanwhile
            await self.let_go()
            await self._call(method, *arguments)
            return
        await self._control.get_node(f"ns={index};s=lorenz").call_method(f"{index}:{method}", *arguments)

    async def let_go(self) -> None:
        """Close the connection that works the plant; the next call opens another one."""
        control, self._control = self._control, None
        if control is not None:
            await farewell(control.disconnect(), 2.0)

    async def quirk(self, tag: str, what: str, value: float) -> None:
        """Set a quirk of the samples."""
        await self._call("SetQuirk", tag, what, value)

    async def disturb(self, what: str, argument: str = "") -> None:
        if argument == FULL:
            argument = "1"  # the connection that works the plant
        await self._call("Disturb", what, argument)
        if what == "remove":
            self._removed.add(argument)
        elif what == "restore":
            self._removed -= {argument}

    async def status(self, code: str, *tags: str) -> None:
        for tag in tags:
            for name, what in STATUS.items():
                await self.quirk(tag, what, 1.0 if name == code else 0.0)

    async def clock(self, offset_ms: float) -> None:
        await self.disturb("clock", str(offset_ms))
        await self.quirk("*", "skew_ms", offset_ms)

    async def calm(self) -> None:
        """End every disturbance, so that the next test finds a healthy plant."""
        await self._call("ClearQuirks")
        for what, argument in [*_usual(self._removed), ("clock", "0")]:
            await self.disturb(what, argument)


class SecondVendor:
    """node-opcua."""

    name = "node-opcua"

    def __init__(self, server: NodeServer) -> None:
        self.server = server
        self._removed: set[str] = set()

    @property
    def port(self) -> int:
        return self.server.port

    def kill(self) -> None:
        self.server.kill()

    def restart(self, *, namespaces_before: Sequence[str] = (), **changes: Any) -> None:
        self.server.restart(namespaces_before=list(namespaces_before), **changes)

    def pause(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()

    async def do(self, what: str, **how: Any) -> dict[str, Any]:
        """Give the server a command of its own words."""
        return await asyncio.to_thread(lambda: self.server.do(what, **how))

    async def disturb(self, what: str, argument: str = "") -> None:
        tag, _, kind = argument.partition("=")
        how: dict[str, dict[str, Any]] = {
            "remove": {"name": argument}, "restore": {"name": argument}, "type": {"name": tag, "type": kind},
            "read_only": {"prefix": argument, "writable": False}, "writable": {"prefix": argument, "writable": True},
            "session_limit": {"n": 0 if argument == FULL else 100},
            "publish_limit": {"n": int(argument or 0) or 100} if what == "publish_limit" else {},
        }
        words = {"read_only": "access", "writable": "access", "session_limit": "max_sessions"}
        await self.do(words.get(what, what), **how.get(what, {}))
        if what == "remove":
            self._removed.add(argument)
        elif what == "restore":
            self._removed -= {argument}

    async def calm(self) -> None:
        """End every disturbance, so that the next test finds a healthy plant."""
        await self.do("clear_quirks")
        for what, argument in _usual(self._removed):
            await self.disturb(what, argument)
        await self.status("Good", *TAGS)
        await self.clock(0.0)

    async def quirk(self, tag: str, what: str, value: float) -> None:
        await self.do("quirk", names=list(TAGS) if tag == ALL else [tag], quirk=what, value=value)

    async def status(self, code: str, *tags: str) -> None:
        await self.do("status", names=list(tags), code=code)

    async def clock(self, offset_ms: float) -> None:
        await self.do("clock", offset_ms=offset_ms)


def _usual(removed: Collection[str]) -> list[tuple[str, str]]:
    """What ends the disturbances of nodes and limits."""
    return [("session_limit", "0"), ("publish_limit", "0"), ("writable", ""),
            *(("restore", name) for name in sorted(removed)), *(("type", f"{tag}=Double") for tag in TAGS)]


def write_config(file: Path, **content: Any) -> None:
    """Write the settings of the simulator (JSON is YAML)."""
    file.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def simulator(folder: Path, **settings: Any) -> Iterator[Simulator]:
    """Run the simulated plant with a settings file (`sim_server.config`) that a restart may change."""
    file = folder / "plant-settings.yaml"
    write_config(file, **settings)
    with running_plant("lorenz", history_rows=0, seed=SEED, config=file) as running:
        yield Simulator(running, file, settings)


def rows_file(folder: Path) -> Path:
    """Write what the simulator would send live, as float64 rows for the second vendor."""
    rows = make("lorenz", seed=SEED).simulate(ROWS)[WARMUP_ROWS:]
    file = folder / "rows.f64"
    file.write_bytes(np.ascontiguousarray(rows[:, : len(TAGS)], dtype=np.float64).tobytes())
    return file


@contextmanager
def second_vendor(folder: Path, **settings: Any) -> Iterator[SecondVendor]:
    """Run node-opcua with the same tags and values."""
    with node_server(columns=list(TAGS), period_ms=10, rows=str(rows_file(folder)), **settings) as server:
        yield SecondVendor(server)
