"""The simulated press, a cyclic process, as the tests of parts use it: rows, models and a configuration."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from running import PLANT

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.model import NormalityModel
from opcua_detector.parts import Cycle, fit_parts
from sim_server.processes import Fault, make

PERIOD_NS = 10_000_000
TAGS = (Tag("position", unit="mm"), Tag("force", unit="kN"), Tag("temperature", unit="degC"),
        Tag("cycle", kind=TagKind.COUNTER), Tag("in_cycle", kind=TagKind.STATE))
POSITION, FORCE, TEMPERATURE, CYCLE = range(4)
FIT_ROWS, HOUR_ROWS = 60_000, 360_000
CYCLES = {
    "counter": Cycle("cycle"), "signal": Cycle("in_cycle", "rising"), "stroke": Cycle("in_cycle", "rising", "back")}


@cache
def press(n: int, first: int = FIT_ROWS, faults: tuple[Fault, ...] = (), seed: int = 1, noise: float = 0.01) -> Record:
    """Rows first ... first + n - 1 of one press."""
    plant = make("press", seed=seed, noise=noise)
    plant.simulate(first)
    block = plant.simulate_block(n, faults)
    record = Record.from_rows(block.measured, TAGS, PERIOD_NS, truth=block.labels)
    return replace(record, source_ns=record.source_ns + first * PERIOD_NS)


@cache
def fitted(cycle: str = "counter", seed: int = 1) -> NormalityModel:
    """The model of 10 healthy minutes, as a user would fit it, with the default budget."""
    return fit_parts("press", press(FIT_ROWS, 0, seed=seed), CYCLES[cycle])[0]


def configuration(folder: Path, cycle: dict[str, Any], more_tags: tuple[Tag, ...] = (), **monitor_keys: Any) -> Path:
    """A configuration of the press, as a file."""
    tags = [{"name": tag.name, "node": f"{PLANT}press.{tag.name}", "kind": tag.kind.value, "unit": tag.unit}
            for tag in (*TAGS, *more_tags)]
    content = {
        "version": 1,
        "servers": [{"name": "plant", "endpoint": "opc.tcp://127.0.0.1:1/", "policy": "None", "insecure": True}],
        "groups": [{"name": "press", "server": "plant", "period": "10 ms", "tags": tags}],
        "monitors": [{"name": "press", "group": "press", "cycle": cycle, "off_delay": "0 s", **monitor_keys}],
    }
    file = folder / "press.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file
