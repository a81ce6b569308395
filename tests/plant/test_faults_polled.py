"""Faults while tags are read instead of monitored: nothing is queued meanwhile, and no alert is raised all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from . import faults as f
from .faults import OUTAGE, Fault, hold, survives
from .vendors import SecondVendor, Simulator

POLLED = {"group": {"sampling": "poll"}}
PER_ROW = 5.0  # two polls, the write, and room for a row that a gap took



def polled(faults: list[Fault]) -> list[Fault]:
    return [replace(one, changes={**POLLED, **one.changes}, per_row=PER_ROW) for one in faults]


FAULTS = polled([
    Fault("cut", f.cut, OUTAGE),
    Fault("blackhole", f.blackhole, OUTAGE),
    Fault("half open, server not heard", f.half_open_server_mute, OUTAGE, long=True),
    Fault("short stall", f.short_stall, ("poll_holes", "gaps"), still=("lost", "reconnects")),
    Fault("GoodOverload", f.overload, ("overload",), still=("lost", "reconnects")),
    Fault("all tags Bad", f.all_bad, ("masked",), still=("lost", "reconnects")),
    Fault("tag removed and back", f.one_tag_removed, still=("reconnects",)),
    Fault("type changed", f.type_changed, still=("reconnects",)),
    Fault("clock jumps ahead and back", f.clock_there_and_back, ("gaps",), still=("reconnects",)),
    Fault("clock jumps behind", f.clock_behind, still=("reconnects",)),
    Fault("NaN and infinity", f.nan_and_infinity, ("masked",), still=("lost", "reconnects")),
    Fault("own event loop blocked 2 s", f.loop_blocked, ("poll_holes", "gaps"), still=("lost", "reconnects"),
          changes={"server": {"timeout": "4 s"}}),
])
SLOW = polled([
    Fault("killed and restarted", f.killed_and_restarted, OUTAGE),
    Fault("stopped 10 s", f.stopped_10_s, OUTAGE),
])


@survives(FAULTS)
async def test_fault_is_survived(fault: Fault, disturbed: Simulator, folder: Path, quick: None) -> None:
    await hold(fault, disturbed, folder)


@pytest.mark.plant
@survives(FAULTS)
async def test_fault_is_survived_on_the_second_vendor(
    fault: Fault, node: SecondVendor, folder: Path, quick: None
) -> None:
    await hold(fault, node, folder)


@pytest.mark.plant
@survives(SLOW)
async def test_an_outage_of_the_server_is_survived(fault: Fault, own_plant: Simulator, folder: Path) -> None:
    await hold(fault, own_plant, folder)
    await own_plant.let_go()


@pytest.mark.plant
@survives(SLOW)
async def test_an_outage_of_the_second_vendor_is_survived(fault: Fault, own_node: SecondVendor, folder: Path) -> None:
    await hold(fault, own_node, folder)
