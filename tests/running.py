"""What the tests of command line and service share: configurations, the command line in process, reading nodes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opcua_detector.cli import main
from opcua_detector.client.observer import Observer
from opcua_detector.nodes import SIGNALS

PLANT = "nsu=urn:opcua-detector:simulated-plant;s="
RESULTS = "nsu=urn:opcua-detector:results;s="
NOWHERE = "opc.tcp://127.0.0.1:1/"  # an endpoint, for what never connects
WAIT_S = 90.0
_STORE_SIDE_FILES = ("-wal", "-shm", ".lock")


# --- configurations ---


def tag(name: str, process: str = "lorenz", **more: Any) -> dict[str, Any]:
    """One tag of the simulated plant."""
    return {"name": name, "node": f"{PLANT}{process}.{name}", **more}


def content(endpoint: str, *, tags: list[dict[str, Any]] | None = None, outputs: Any = True) -> dict[str, Any]:
    """A configuration of one Lorenz monitor, as a mapping that a test may change before it writes it."""
    monitor: dict[str, Any] = {"name": "lorenz", "group": "lorenz", "methods": ["transition"], "windows": ["1 s"]}
    if outputs:
        monitor["outputs"] = {"server": "plant", "base": f"{RESULTS}lorenz"} if outputs is True else outputs
    return {
        "version": 1,
        "servers": [{"name": "plant", "endpoint": endpoint, "policy": "None", "insecure": True}],
        "groups": [{"name": "lorenz", "server": "plant", "period": "10 ms",
                    "tags": tags or [tag("x1"), tag("x3")]}],
        "monitors": [monitor],
    }


def two_methods(endpoint: str) -> dict[str, Any]:
    """The Lorenz monitor with a linear and a nonlinear method and the windows that the plant gives."""
    given = content(endpoint)
    given["monitors"][0]["methods"] = ["regression", "transition"]
    del given["monitors"][0]["windows"]
    return given


def write(folder: Path, configuration: Mapping[str, Any], name: str = "plant.yaml") -> Path:
    """Write a configuration file."""
    file = folder / name
    file.write_text(yaml.safe_dump(dict(configuration), sort_keys=False), encoding="utf-8")
    return file


# --- the command line ---


@dataclass
class Ran:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def cli(*arguments: object) -> Ran:
    """Run a command in this process, as `opcua-detector` does."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(one) for one in arguments])
        except SystemExit as ended:
            code = ended.code
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Ran(0 if code is None else code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, str]:
    """Relative path -> hash of each file below a folder, without those that SQLite keeps beside a store."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(_STORE_SIDE_FILES)
    }


# --- nodes ---


def result_nodes(*monitors: str) -> dict[str, str]:
    """<monitor>.<Signal> -> node, for all results of these monitors."""
    return {f"{m}.{signal}": f"{RESULTS}{m}.{signal}" for m in monitors for signal in SIGNALS}


def read(endpoint: str, nodes: Mapping[str, str]) -> dict[str, Any]:
    """Read nodes by a client of their own."""

    async def once() -> dict[str, Any]:
        async with Observer(endpoint) as observer:
            return await observer.read(nodes)

    return asyncio.run(once())


async def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait for a condition (plain or awaitable) on the running loop and return what it gave."""
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"in vain: {what}"
        await asyncio.sleep(0.05)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait for a condition outside a loop."""
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.05)
