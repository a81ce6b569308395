"""Every fault on the second vendor, and those that take minutes on both; run by `make test-plant`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import faults as f
from .faults import OUTAGE, Fault, hold, survives
from .test_faults_quick import FAULTS
from .vendors import SecondVendor, Simulator, Vendor

pytestmark = [pytest.mark.plant, pytest.mark.timeout(300)]

# What only the simulator's quirks can do; the second vendor's own server does not.
_QUIRKS = ("subscription expired", "out of order and twice", "overflow bits", "NaN")

SLOW = [
    Fault("killed and restarted", f.killed_and_restarted, OUTAGE),
    Fault("restarted with other namespaces", f.restarted_with_other_namespaces, OUTAGE),
    Fault("stopped 10 s", f.stopped_10_s, OUTAGE),
    Fault("blackholed 10 s", f.blackholed_10_s, OUTAGE),
    Fault("slow network", f.slow_network, ("write_superseded",)),
    Fault("GoodOverload for 30 s", f.overload_30_s, ("overload",), still=("lost", "reconnects", "gaps")),
]


@pytest.fixture(params=["asyncua", "node-opcua"])
def vendor(request: pytest.FixtureRequest) -> Iterator[Vendor]:
    """A server of its own for each test."""
    yield request.getfixturevalue("own_plant" if request.param == "asyncua" else "node")


@survives(SLOW)
async def test_slow_fault_is_survived(fault: Fault, vendor: Vendor, folder: Path) -> None:
    await hold(fault, vendor, folder)
    if isinstance(vendor, Simulator):
        await vendor.let_go()


@survives([one for one in FAULTS if one.name not in _QUIRKS])
async def test_fault_is_survived_on_the_second_vendor(
    fault: Fault, node: SecondVendor, folder: Path, quick: None
) -> None:
    await hold(fault, node, folder)
