"""The lease and the one alarm of a connection on the second vendor's server; run by `make test-plant`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import until as wait_until
from running import write

from opcua_detector.config import load
from opcua_detector.nodes import State
from opcua_detector.service import Service, Writing

from .proxy import ChaosProxy
from .rig import configuration, until
from .vendors import SecondVendor

pytestmark = [pytest.mark.plant, pytest.mark.timeout(300), pytest.mark.usefixtures("quick")]


async def test_of_two_services_one_writes_and_the_other_takes_over_when_the_first_is_cut_off(
    own_node: SecondVendor, folder: Path,
) -> None:
    other = folder / "other"
    shutil.copytree(folder / "models", other / "models")
    leased = {"plant": Writing(lease_s=2.0)}
    fast = {"sampling": "0 ms"}

    def writes(service: Service) -> bool:
        return service.keepers["plant"].holds("lorenz")

    async with ChaosProxy(own_node.port) as proxy:
        first = write(folder, configuration(proxy.endpoint, group=fast))
        second = write(other, configuration(f"opc.tcp://127.0.0.1:{own_node.port}/", group=fast))
        a, b = Service(load(first), first, writing=leased), Service(load(second), second, writing=leased)
        try:
            await a.start()
            await until(lambda: writes(a), "the first one to write")
            await b.start()
            await until(lambda: b.runs["lorenz"].state == State.NORMAL, "the second one to score")
            assert writes(a) and not writes(b) and b.backs["plant"].counters["values"] == 0
            proxy.blackhole()
            await until(lambda: writes(b), "the takeover")
            assert not writes(a)
            await until(lambda: a.connections.alarms["plant"].active, "the alarm of the connection")
            proxy.heal()
            scored = a.runs["lorenz"].scored
            await until(lambda: a.runs["lorenz"].scored > scored + 100, "the first one to score again")
            await until(lambda: not a.connections.alarms["plant"].active, "the alarm to return to normal")
            assert writes(b) and not writes(a) and a.connections.alarms["plant"].event_no == 1
            assert a.runs["lorenz"].monitor.verdict.event_no == b.runs["lorenz"].monitor.verdict.event_no == 0
            await b.stop()
            await wait_until(lambda: writes(a), "the first one to write again, since the lease was released")
        finally:
            proxy.heal()
            await a.stop()
            await b.stop()
