"""The live loop keeps an absolute schedule on any clock, however late it is woken."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from asyncua import ua

from sim_server.config import parse_config
from sim_server.faults import parse_script
from sim_server.history import TagHistory
from sim_server.live import LivePlant
from sim_server.nodes import DIAGNOSTICS, PlantNodes
from sim_server.plant import Plant, ScriptPlayer
from sim_server.processes import make, model
from sim_server.quirks import Reporter
from sim_server.ua_types import node_id, to_datetime, to_ns

START_NS = 1_700_000_000_000_000_000
PERIOD_NS = model("throttle").period_ns


class Clock:
    """A clock that moves only when somebody waits, and sometimes too far."""

    def __init__(self, stalls: dict[int, float]) -> None:
        self.now_s = 100.0
        self.sleeps: list[float] = []
        self._stalls = stalls
        self._end: int | None = None

    def wall_ns(self) -> int:
        return START_NS + round((self.now_s - 100.0) * 1e9)

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds + self._stalls.get(len(self.sleeps), 0.0)
        if self._end is not None and len(self.sleeps) >= self._end:
            raise asyncio.CancelledError

    def stop_after(self, sleeps: int) -> None:
        self._end = sleeps


class Written:
    """Stands where the server's fast write is: keeps what is written to which node."""

    def __init__(self) -> None:
        self.values: dict[str, list[ua.DataValue]] = {}

    async def write_attribute_value(self, node: ua.NodeId, value: ua.DataValue) -> None:
        self.values.setdefault(str(node.Identifier), []).append(value)


def live(
    clock: Clock, speed: float = 1.0, script: list[dict[str, Any]] | None = None
) -> tuple[LivePlant, Written]:
    plant = Plant(make("throttle", seed=1))
    written = Written()
    tags = tuple((node_id(tag.name, 2), ua.VariantType.Double) for tag in plant.tags)
    factors = {node_id(f"faults.{one.name}", 2): one.name for one in model("throttle").parameters}
    nodes = PlantNodes(
        2,
        tags,
        factors,
        node_id("truth", 2),
        node_id("text", 2),
        {name: node_id(name, 2) for name in DIAGNOSTICS},
    )
    made = LivePlant(
        written,  # type: ignore[arg-type]
        nodes,
        plant,
        ScriptPlayer(parse_script(script or [], model("throttle"))),
        Reporter(plant.tags, PERIOD_NS),
        [TagHistory(10_000, ua.VariantType.Double) for _ in range(len(tags) + 1)],
        START_NS,
        speed,
        wall_clock_ns=clock.wall_ns,
        clock_s=lambda: clock.now_s,
        sleep_s=clock.sleep,
    )
    return made, written


async def run(made: LivePlant, clock: Clock, sleeps: int) -> None:
    clock.stop_after(sleeps)
    with pytest.raises(asyncio.CancelledError):
        await made.run()


@pytest.mark.parametrize("speed", [0.5, 1.0, 10.0])
async def test_rows_come_at_their_nominal_time_without_drift(speed: float) -> None:
    clock = Clock({})
    made, written = live(clock, speed)
    await run(made, clock, 1000)
    stamps = [to_ns(one.SourceTimestamp) for one in written.values["theta"]]
    assert stamps == [START_NS + k * PERIOD_NS for k in range(len(stamps))]
    assert len(stamps) >= 999
    expected = Plant(make("throttle", seed=1)).rows(len(stamps)).values[:, 0]
    assert ([one.Value.Value for one in written.values["theta"]] == expected).all()
    elapsed_s = clock.now_s - 100.0
    assert elapsed_s == pytest.approx(
        len(stamps) * PERIOD_NS * 1e-9 / speed, abs=2 * PERIOD_NS * 1e-9 / speed
    )
    assert made.late_rows == 0


async def test_a_stall_is_caught_up_with_nominal_stamps_in_small_steps_and_counted() -> None:
    clock = Clock({50: 10.0})
    made, written = live(clock)
    await run(made, clock, 200)
    stamps = np.array([to_ns(one.SourceTimestamp) for one in written.values["theta"]])
    assert (np.diff(stamps) == PERIOD_NS).all()
    assert stamps[-1] <= clock.wall_ns()
    assert clock.wall_ns() - stamps[-1] <= 2 * PERIOD_NS
    # 501 rows wait, 500 .. 0 periods old; late is older than one period, give or take rounding
    assert made.late_rows == pytest.approx(499, abs=1)
    assert made.max_lag_ms == pytest.approx(10_000, abs=25)
    # clients are served while it catches up: 500 rows need at least 7 rounds without waiting
    assert clock.sleeps[50:].count(0.0) >= 7


async def test_ground_truth_follows_the_script_row_by_row() -> None:
    clock = Clock({})
    made, written = live(clock, 1.0, [{"parameter": "Kb", "factor": 1.3, "from": 1, "to": 2}])
    await run(made, clock, 160)
    truth = [(to_ns(one.SourceTimestamp), one.Value.Value) for one in written.values["truth"]]
    assert truth == [(START_NS, False), (START_NS + 10**9, True), (START_NS + 2 * 10**9, False)]
    assert [one.Value.Value for one in written.values["faults.Kb"]] == [1.3, 1.0]
    assert [one.Value.Value for one in written.values["text"]] == ["", "Kb x 1.3", ""]


async def test_accelerated_server_stamps_agree_with_the_source_stamps() -> None:
    clock = Clock({})
    made, written = live(clock, 10.0)
    await run(made, clock, 50)
    for one in written.values["u"]:
        assert one.ServerTimestamp == one.SourceTimestamp
    clock = Clock({})
    made, written = live(clock, 1.0)
    await run(made, clock, 50)
    late_ns = [to_ns(one.ServerTimestamp) - to_ns(one.SourceTimestamp) for one in written.values["u"]]
    assert min(late_ns) >= 0
    assert written.values["u"][0].ServerTimestamp == to_datetime(START_NS)


def test_defaults_make_a_healthy_plant() -> None:
    config = parse_config({})
    assert (config.process, config.noise, config.speed, config.faults, config.quirks) == (
        "lorenz",
        0.0,
        1.0,
        (),
        (),
    )
    assert config.history_rows >= 20_000
