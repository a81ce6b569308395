"""Faults of our own machine, on the asyncua simulator: disk, database, files, a killed process, many reconnects."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from asyncua import Client
from running import write

from opcua_detector.client.publish import PublishPump
from opcua_detector.client.subscription import Subscription
from opcua_detector.config import load
from opcua_detector.errors import ModelError
from opcua_detector.model import load as load_model
from opcua_detector.nodes import State
from opcua_detector.service import Service

from .faults import STORE, disk_full, hold, store_of
from .proxy import ChaosProxy
from .rig import configuration, living, rigged, until
from .vendors import Simulator

pytestmark = pytest.mark.usefixtures("quick")

HERE = Path(__file__).resolve().parent
CUTS = 25
KIB_PER_CUT = 64  # what a reconnect may leave in caches of libraries; a leaked connection holds ten times as much


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 2 MiB, None where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True,
                             check=False).returncode == 0 if shutil.which("mount") else False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_stops_no_score_and_loses_no_row_once_there_is_room(
    plant: Simulator, folder: Path, disk: Path | None
) -> None:
    (full,) = (one for one in STORE if one.name == "disk full")
    if disk is not None:
        full = replace(full, strike=disk_full, changes={"store": {"path": str(disk / "store.db")}})
    await hold(full, plant, folder)


async def test_a_locked_database_stops_no_score_and_loses_no_row(plant: Simulator, folder: Path) -> None:
    (locked,) = (one for one in STORE if one.name == "database locked")
    await hold(locked, plant, folder)


async def test_a_corrupt_store_is_set_aside_and_the_service_runs(plant: Simulator, folder: Path) -> None:
    async with rigged(plant, folder) as rig:
        path = load(rig.file).store.path
    path.write_bytes(b"SQLite format 3\0" + os.urandom(8192))
    async with rigged(plant, folder) as rig:
        await rig.scoring()
        await until(lambda: store_of(rig).committed_seq > 0, "rows in a new store")
        assert [one.name for one in path.parent.glob(f"{path.name}.damaged-*") if one.suffix not in ("-wal", "-shm")]
        assert any("damaged" in str(one.detail) or "damaged" in one.action for one in store_of(rig).audit())


@pytest.mark.parametrize("damage", ["cut short", "one byte", "empty"])
async def test_a_corrupt_model_is_refused_by_name_before_anything_is_written(
    plant: Simulator, folder: Path, damage: str
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, configuration(proxy.endpoint))
        model = folder / "models" / "lorenz.npz"
        good = model.read_bytes()
        middle = len(good) // 2
        model.write_bytes({"cut short": good[:middle], "empty": b"",
                           "one byte": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]}[damage])
        service = Service(load(file), file)
        with pytest.raises(ModelError, match=r"lorenz\.npz"):
            await service.start()
        assert proxy.accepted == 0 and not load(file).store.path.exists()


@pytest.mark.plant
async def test_kill_9_of_ourselves_loses_nothing_committed_and_the_next_run_goes_on(
    plant: Simulator, folder: Path
) -> None:
    async with ChaosProxy(plant.port) as proxy:
        file = write(folder, configuration(proxy.endpoint))
        root = HERE.parents[1]
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "kill_child.py"), str(file), stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])})
        assert child.stdout is not None
        committed = scored = 0
        while scored < 150:
            line = await asyncio.wait_for(child.stdout.readline(), 60.0)
            assert line, "the service ended by itself"
            committed, scored = (int(word) for word in line.split())
        child.kill()
        await child.wait()
    async with rigged(plant, folder) as rig:
        store = store_of(rig)
        first = min(store.recordings(), key=lambda one: one.started_ns)
        record = await asyncio.to_thread(store.read_recording, first.name)
        assert len(record) >= committed // 2 > 100  # rows and verdicts are numbered together
        assert np.flatnonzero(record.gap).tolist() == [0]
        before = min(store.runs(), key=lambda one: one.started_ns)
        assert before.ended_ns is None and "did not end" in before.end_reason
        await rig.scoring(100)
        assert rig.run.monitor.verdict.event_no == 0


@pytest.mark.plant
async def test_many_reconnects_leave_nothing_behind(plant: Simulator, folder: Path) -> None:
    async with rigged(plant, folder) as rig:
        async def cut_and_back() -> None:
            n = rig.session.counters["reconnects"] + 1
            rig.proxy.reset()
            await until(lambda: rig.session.counters["reconnects"] >= n, "the session to be back")
            await rig.scoring(5)

        for _ in range(3):  # what is made once stays
            await cut_and_back()
        await rig.strike_begins()
        kinds = (Client, PublishPump, Subscription)
        objects = living(*kinds)
        tracemalloc.start()
        try:
            held = tracemalloc.get_traced_memory()[0]
            for _ in range(CUTS):
                await cut_and_back()
            await rig.nothing_left()
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - held
        finally:
            tracemalloc.stop()
        assert living(*kinds) == objects
        assert grown < CUTS * KIB_PER_CUT * 1024, f"{grown / 1024 / CUTS:.0f} KiB per reconnect"
        assert rig.grown("lost") == rig.grown("reconnects") == CUTS


@pytest.mark.plant
async def test_fifty_monitors_on_a_connection_that_is_cut_are_one_alarm(plant: Simulator, folder: Path) -> None:
    async with ChaosProxy(plant.port) as proxy:
        given = configuration(proxy.endpoint)
        base = given["monitors"][0]
        del base["outputs"]
        given["monitors"] = [base | {"name": f"m{k}", "model": str(folder / "models" / f"m{k}.npz")} for k in range(50)]
        fitted = load_model(folder / "models" / "lorenz.npz")
        for k in range(50):
            replace(fitted, monitor=f"m{k}").save(folder / "models" / f"m{k}.npz")
        file = write(folder, given)
        service = Service(load(file), file)
        await service.start()
        try:
            runs = list(service.runs.values())
            await until(lambda: all(run.scored > 20 for run in runs), "50 monitors to score")
            store = service.store
            assert store is not None and store.events() == []
            proxy.refuse()
            proxy.reset()
            await until(lambda: all(run.state == State.NO_DATA for run in runs), "all monitors to have no data")
            await asyncio.to_thread(store.flush)
            assert len(store.events()) == 1  # of the connection, not of any monitor
            proxy.heal()
            await until(lambda: all(run.state == State.NORMAL for run in runs), "all monitors to be normal")
            await until(lambda: all(one.cleared_ns for one in store.events()), "the alarm of the connection to end")
            (event,) = store.events()
            assert event.monitor not in service.runs and "50 monitors" in event.sentence
        finally:
            await service.stop()
