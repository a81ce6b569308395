"""The event loop that is chosen carries a whole session: uvloop where it is installed, asyncio's own elsewhere."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from opcua_detector.client import Session, WriteBack
from opcua_detector.client.wire_loop import loop_factory

from .conftest import OddServer, server_config
from .test_writeback import Acks


async def write_and_read(cache: Path) -> tuple[str, float]:
    """Write through the client layer; return the module of the loop and what the node then holds."""
    odd = OddServer(cache)
    await odd.start()
    session = Session(server_config(odd.endpoint))
    await session.open()
    acks = Acks()
    back = WriteBack(session, {("m", "Score"): odd.text("Double")}, on_ack=acks)
    await session.attach(back)
    back.offer("m", 1, {"Score": 2.5})
    await acks.of(1)
    found = await odd.nodes["Double"].read_value()
    await back.stop()
    await session.close()
    await odd.server.stop()
    return type(asyncio.get_running_loop()).__module__, found


def test_a_session_runs_on_the_loop_that_is_chosen(cache: Path) -> None:
    there = importlib.util.find_spec("uvloop") is not None
    factory = loop_factory()
    assert (factory is not None) == there
    with asyncio.Runner(loop_factory=factory) as runner:
        module, value = runner.run(write_and_read(cache))
    assert value == 2.5 and module.startswith("uvloop" if there else "asyncio")


def test_without_uvloop_the_loop_is_asyncios_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # as if it were not installed
    assert loop_factory() is None
