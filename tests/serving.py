"""A service on a real server, as several test files need it: configuration, fitted model, starting, waiting."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from running import NOWHERE, content, until, write

from opcua_detector.api import Record
from opcua_detector.app import fit_config, group_tags
from opcua_detector.client.observer import Observer
from opcua_detector.config import GroupConfig, load
from opcua_detector.model import load as load_model
from opcua_detector.nodes import State
from opcua_detector.service import MonitorRun, Service
from opcua_detector.service.delivery import INSECURE_WORDS
from opcua_detector.store import Store
from sim_server.processes import make

METHODS = ["transition", {"name": "onnx", "model": "bundled:lorenz"}]
RESULTS = "nsu=urn:opcua-detector:results;s="
SEED = 0


def healthy(group: GroupConfig) -> Record:
    """Rows of the simulated plant of SEED: those that it sends live, so that none of them is news."""
    every = group.period // 10_000_000
    rows = make("lorenz", seed=SEED).simulate(60_000)[::every]
    return Record.from_rows(rows, group_tags(group), group.period)


def configuration(endpoint: str, **changes: Any) -> dict[str, Any]:
    """The Lorenz monitor with both methods."""
    given = content(endpoint, **changes)
    given["monitors"][0]["methods"] = METHODS
    del given["monitors"][0]["windows"]
    return given


def fit_models(folder: Path, given: Mapping[str, Any] | None = None) -> Path:
    """Fit the Lorenz monitor of `configuration`, or of this one, into a folder; return the folder of the models."""
    file = write(folder, given or configuration(NOWHERE))
    for fitted in fit_config(load(file), file, healthy):
        fitted.model.save(fitted.path)
    return folder / "models"


def insecure(words: str) -> str:
    """What StateText says for these words on the simulated plants, whose connections are not protected."""
    return words + INSECURE_WORDS


def name_copies(models: Path, *names: str) -> None:
    """Put copies of the Lorenz model beside it, for monitors of other names."""
    model = load_model(models / "lorenz.npz")
    for name in names:
        replace(model, monitor=name).save(models / f"{name}.npz")


@asynccontextmanager
async def running(file: Path, **options: Any) -> AsyncIterator[Service]:
    """A started service, stopped at the end."""
    service = Service(load(file), file, **options)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


class Child:
    """A service in a process of its own, which can be killed; `last` is what it said last (`service_child`)."""

    def __init__(self, file: Path, *, lease_s: float = 0.0) -> None:
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("service_child.py")), str(file),
                                          str(lease_s)], stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)  # a full pipe would stop its event loop
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it was killed in the middle of it
                self.last = json.loads(line)

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until what it says meets a condition."""
        def met() -> bool:
            assert self._reader.is_alive(), f"the service ended: {self._process.wait()}"
            return bool(self.last) and condition(self.last)

        await until(met, "what the service in the other process says")

    def kill(self) -> None:
        """End it as the operating system ends a process that takes too much memory; `last` is then its last word.

        Nothing happens where it is dead already.
        """
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


async def scoring(run: MonitorRun, more: int = 100) -> None:
    """Wait until a monitor judges rows and finds them normal."""
    target = run.scored + more
    await until(lambda: run.scored >= target and run.state == State.NORMAL,
                f"{more} more scores of {run.config.name}, which is in state {run.state}")


async def nodes_say(observer: Observer, base: str = f"{RESULTS}lorenz", **expected: Any) -> bool:
    """Whether result nodes have these values."""
    got = await observer.read({signal: f"{base}.{signal}" for signal in expected})
    return got == expected


def stored(file: Path) -> Store:
    """The store of a configuration, to look at."""
    return Store.open(load(file).store.path, readonly=True)
