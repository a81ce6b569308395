"""The faults: what is done to network, server or ourselves, and what must have been counted after it."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opcua_detector.config import load
from opcua_detector.nodes import State
from opcua_detector.store import Store

from .proxy import TO_CLIENT, TO_SERVER
from .rig import PER_ROW, Rig, rigged, until
from .seen import Seen, watching
from .vendors import ALL, FULL, PLANT_URI, Vendor

OUTAGE = ("lost", "reconnects", "gaps")


@dataclass(frozen=True)
class Fault:
    """A fault, and what must have been counted after it.

    strike : does it, waits for what is seen of it, and ends it
    counted : counters of session, feed or write-back that must have grown
    still : counters that must not have grown
    changes : to the configuration
    long : left out of the tests that everybody runs, where another fault is much like it
    seen : words for what a user sees of it beside State, Quality and the alarm of the connection, which are recorded
    lost : words for what is lost, where the counters do not say it all
    per_row : messages that a row costs
    """

    name: str
    strike: Callable[[Rig], Awaitable[None]]
    counted: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    long: bool = False
    seen: str = ""
    lost: str = ""
    per_row: float = PER_ROW


async def cut(rig: Rig) -> None:
    rig.proxy.cut()
    await rig.reconnected()


async def reset(rig: Rig) -> None:
    rig.proxy.reset()
    await rig.reconnected()


async def reset_in_answer(rig: Rig) -> None:
    rig.proxy.reset_in_message(37, TO_CLIENT)
    await rig.reconnected()


async def reset_in_request(rig: Rig) -> None:
    rig.proxy.reset_in_message(37, TO_SERVER)
    await rig.reconnected()


async def reset_at_every_step_of_the_log_in(rig: Rig) -> None:
    """Each attempt comes a little further: hello, channel, session, namespaces, limits, subscription, nodes."""
    rig.proxy.reset()
    for n in (10, 60, 200, 700, 1500, 3000):
        tried = rig.proxy.accepted
        rig.proxy.reset_in_message(n, TO_CLIENT)
        await until(lambda tried=tried: rig.proxy.accepted > tried, f"an attempt that is reset after {n} bytes")
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def blackhole(rig: Rig) -> None:
    rig.proxy.blackhole()
    await rig.waiting()
    await asyncio.sleep(1.0)
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def half_open_server_mute(rig: Rig) -> None:
    rig.proxy.blackhole(TO_CLIENT)
    await rig.waiting()
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def half_open_client_mute(rig: Rig) -> None:
    rig.proxy.blackhole(TO_SERVER)
    await rig.waiting()
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def refused_for_a_while(rig: Rig) -> None:
    rig.proxy.refuse()
    rig.proxy.reset()
    await until(lambda: rig.grown("failed_attempts") >= 3, "attempts that are refused")
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def short_stall(rig: Rig) -> None:
    """Shorter than what counts as silence: nothing may be lost, nothing reconnects."""
    rig.proxy.stall(TO_CLIENT)
    await asyncio.sleep(0.4)
    rig.proxy.heal()
    rig.over()


async def subscription_deleted(rig: Rig) -> None:
    await rig.vendor.disturb("delete_subscriptions")
    await until(lambda: rig.grown("rebuilt") + rig.grown("reconnects") > 0, "a new subscription")


async def subscription_expired(rig: Rig) -> None:
    await rig.vendor.disturb("expire_subscriptions")
    await until(lambda: rig.grown("rebuilt") + rig.grown("reconnects") > 0, "a new subscription")


async def session_closed(rig: Rig) -> None:
    await rig.vendor.disturb("close_sessions")
    await rig.reconnected()


async def session_limit(rig: Rig) -> None:
    """Others hold all the sessions there may be; ours gets one when there is room again."""
    await rig.vendor.disturb("session_limit", FULL)
    await rig.vendor.disturb("close_sessions")
    await until(lambda: rig.grown("failed_attempts") >= 2, "attempts that find no room")
    await rig.vendor.disturb("session_limit", "0")
    rig.over()
    await rig.reconnected()


async def publish_limit(rig: Rig) -> None:
    """One publish request fewer than ours keeps is what the server takes."""
    await rig.vendor.disturb("publish_limit", "1")
    await rig.scoring(100)


async def overload(rig: Rig) -> None:
    await rig.vendor.status("GoodOverload", "x1", "x3")
    await until(lambda: rig.grown("overload") >= 100, "GoodOverload to be counted")
    await rig.scoring(100)
    await rig.vendor.status("Good", "x1", "x3")
    rig.over()


async def all_bad(rig: Rig) -> None:
    await rig.vendor.status("BadSensorFailure", "x1", "x3")
    await until(lambda: rig.run.state == State.NO_DATA, "no data")
    await asyncio.sleep(0.5)  # the windows still hold rows of before
    scored = rig.run.scored
    await asyncio.sleep(1.0)
    assert rig.run.scored == scored and rig.run.state == State.NO_DATA
    await rig.vendor.status("Good", "x1", "x3")
    rig.over()


async def one_tag_removed(rig: Rig) -> None:
    await rig.vendor.disturb("remove", "x3")
    await until(lambda: rig.feed.tag_states()["x3"] or not rig.feed.frame.valid[1], "the tag to be missed")
    scored = rig.feed.builder.counters()["delivered"]
    await until(lambda: rig.feed.builder.counters()["delivered"] > scored + 50, "the other tag to go on")
    await rig.vendor.disturb("restore", "x3")
    rig.over()
    await until(lambda: rig.feed.frame.valid[1], "the tag to be back")


async def type_changed(rig: Rig) -> None:
    await rig.vendor.disturb("type", "x3=String")
    await until(lambda: not rig.feed.frame.valid[1], "the tag to be masked")
    await rig.vendor.disturb("type", "x3=Float")
    await until(lambda: rig.feed.frame.valid[1], "the tag to be back as Float")
    await rig.vendor.disturb("type", "x3=Double")
    rig.over()
    await until(lambda: rig.feed.frame.valid[1], "the tag to be back as Double")


async def output_removed(rig: Rig) -> None:
    await rig.vendor.disturb("remove", "lorenz.Score")
    await until(lambda: rig.run.back is not None and rig.run.back.states()[("lorenz", "Score")], "the output to fail")
    await rig.scoring(50)
    await rig.vendor.disturb("restore", "lorenz.Score")
    rig.over()
    await until(lambda: rig.run.back is not None and not rig.run.back.states()[("lorenz", "Score")], "the output back")


async def rights_withdrawn(rig: Rig) -> None:
    back = rig.run.back
    assert back is not None
    await rig.vendor.disturb("read_only", "lorenz.")
    await until(lambda: back.states()[("lorenz", "Score")] and back.states()[("lorenz", "Quality")],
                "the outputs to be refused")
    await rig.scoring(50)
    await rig.vendor.disturb("writable", "lorenz.")
    rig.over()
    await until(lambda: not any(back.states().values()), "all outputs to be written again")


async def clock_ahead(rig: Rig) -> None:
    await rig.vendor.clock(3_600_000)
    await until(lambda: rig.grown("gaps") >= 1, "the jump to be a gap")
    await rig.scoring(100)


async def clock_there_and_back(rig: Rig) -> None:
    await clock_ahead(rig)
    await rig.vendor.clock(0)
    rig.over()


async def clock_behind(rig: Rig) -> None:
    await rig.vendor.clock(-3_600_000)
    await rig.scoring(100)


async def out_of_order_and_twice(rig: Rig) -> None:
    await rig.vendor.quirk(ALL, "swap", 0.3)
    await rig.vendor.quirk(ALL, "duplicate", 0.3)
    await until(lambda: rig.grown("duplicate") + rig.grown("replaced") >= 20, "second samples to be counted")
    await rig.scoring(100)
    await rig.vendor.quirk(ALL, "swap", 0.0)
    await rig.vendor.quirk(ALL, "duplicate", 0.0)
    rig.over()


async def overflow(rig: Rig) -> None:
    await rig.vendor.quirk("x3", "overflow", 0.5)
    await until(lambda: rig.grown("overflowed") >= 20, "overflow bits to be counted")
    await rig.vendor.quirk("x3", "overflow", 0.0)
    rig.over()


async def loop_blocked(rig: Rig) -> None:
    """Our own event loop stands still for 2 s, as in a machine that swaps."""
    time.sleep(2.0)
    rig.over()


async def nan_and_infinity(rig: Rig) -> None:
    for what in ("nan", "inf"):
        await rig.vendor.quirk("x3", what, 1.0)
        await until(lambda: not rig.feed.frame.valid[1], "the tag to be masked")
        await rig.vendor.quirk("x3", what, 0.0)
        rig.over()
        await until(lambda: rig.feed.frame.valid[1], "the tag to be back")


async def killed_and_restarted(rig: Rig) -> None:
    rig.vendor.kill()
    await rig.waiting()
    await asyncio.to_thread(rig.vendor.restart)
    rig.over()
    await rig.reconnected()


async def restarted_with_other_namespaces(rig: Rig) -> None:
    before = list(rig.session.namespaces)
    await asyncio.to_thread(lambda: rig.vendor.restart(namespaces_before=["urn:one", "urn:two"]))
    rig.over()
    await rig.reconnected()
    assert rig.session.namespaces.index(PLANT_URI) == before.index(PLANT_URI) + 2


async def stopped_10_s(rig: Rig) -> None:
    rig.vendor.pause()
    try:
        await rig.waiting()
        await asyncio.sleep(10.0)
    finally:
        rig.vendor.resume()
        rig.over()
    await rig.reconnected()


async def stutters(rig: Rig) -> None:
    """The server stands still for more than a keep-alive, again and again, while our loop is busy: late is not lost."""
    rng = random.Random(0)

    async def busy() -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.0, 0.03))
            time.sleep(rng.uniform(0.02, 0.08))

    hiccups = asyncio.create_task(busy(), name="proxy: hiccups of our loop")
    try:
        for _ in range(20):
            rig.vendor.pause()
            try:
                await asyncio.sleep(rng.uniform(0.5, 0.9))
            finally:
                rig.vendor.resume()
            await asyncio.sleep(0.7)
    finally:
        hiccups.cancel()
    rig.over()


async def blackholed_10_s(rig: Rig) -> None:
    rig.proxy.blackhole()
    await rig.waiting()
    await asyncio.sleep(10.0)
    rig.proxy.heal()
    rig.over()
    await rig.reconnected()


async def slow_network(rig: Rig) -> None:
    """200 ms and 64 kbit/s each way: rows come late and scores go on; results that find no room are superseded."""
    rig.proxy.slow(latency_s=0.2, rate=8000.0)
    await until(lambda: rig.grown("write_superseded") >= 10, "results that were replaced by newer ones")
    await rig.scoring(300)
    rig.proxy.heal()
    rig.over()


async def overload_30_s(rig: Rig) -> None:
    await rig.vendor.status("GoodOverload", "x1", "x3")
    await asyncio.sleep(30.0)
    assert rig.grown("overload") >= 3000
    await rig.vendor.status("Good", "x1", "x3")
    rig.over()


# --- the store: its disk, its lock ---


def store_of(rig: Rig) -> Store:
    """The store of the running service."""
    assert rig.service.store is not None
    return rig.service.store


async def nothing_lost(rig: Rig) -> None:
    """Wait until everything is committed, and assert that the recording has every row of the feed, without a hole."""
    store = store_of(rig)
    await until(lambda: store.last_error == "", "the store to be written again")
    assert store.counters.dropped_rows == store.counters.dropped_verdicts == 0
    assert store.counters.write_errors > 0
    assert await asyncio.to_thread(store.flush)
    (recording,) = store.recordings()
    record = store.read_recording(recording.name)
    assert np.flatnonzero(record.gap).tolist() == [0]
    assert set(np.diff(record.source_ns).tolist()) == {record.period_ns}


async def store_locked(rig: Rig) -> None:
    """Another program holds the database."""
    other = sqlite3.connect(load(rig.file).store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        await until(lambda: store_of(rig).counters.write_errors > 0, "the lock to be met")
        await rig.scoring(100)
    finally:
        other.execute("ROLLBACK")
        other.close()
    rig.over()
    await nothing_lost(rig)


async def store_full(rig: Rig) -> None:
    """No room is left for the database: by what SQLite may use, which stands for the size of the disk."""
    store = store_of(rig)

    async def most(pages: int) -> None:
        await asyncio.to_thread(
            store._writer.call, lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone(), 30)

    await most(10)
    await until(lambda: store.last_error, "the store to be full")
    assert "full" in store.last_error
    await rig.scoring(100)
    await most(1_000_000)
    rig.over()
    await nothing_lost(rig)


async def disk_full(rig: Rig) -> None:
    """The disk that the store lies on is filled to the last byte, and emptied again."""
    store, filler = store_of(rig), load(rig.file).store.path.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    await until(lambda: store.last_error, "the store to be full")
    assert "full" in store.last_error
    await rig.scoring(100)
    filler.unlink()
    rig.over()
    await nothing_lost(rig)


STORE = [
    Fault("database locked", store_locked, still=("lost", "reconnects", "gaps"),
          seen="the log says so, counter `write_errors` of the store"),
    Fault("disk full", store_full, still=("lost", "reconnects", "gaps"),
          seen="the log says so, counter `write_errors` of the store"),
]


def survives(faults: Sequence[Fault]) -> pytest.MarkDecorator:
    """Parametrise a test by faults; one that takes its time is left to the long run of tests."""
    def marks(fault: Fault) -> list[pytest.MarkDecorator]:
        return [pytest.mark.plant] if fault.long else []

    return pytest.mark.parametrize("fault", [pytest.param(one, id=one.name, marks=marks(one)) for one in faults])


async def hold(fault: Fault, vendor: Vendor, folder: Path) -> Seen:
    """Let the service meet a fault, hold it to what must be true after it, and return what was seen."""
    await vendor.calm()  # opens what works the server, which is none of the service's
    # The second vendor samples by a timer unless 0 is asked for; what that timer misses is no matter of the fault.
    group = {"sampling": "0 ms"} if vendor.name == "node-opcua" else {}
    async with rigged(vendor, folder, **{"group": group, **fault.changes}) as rig:
        await rig.strike_begins()
        with watching(rig, fault.name) as seen:
            await fault.strike(rig)
            await rig.survived(per_row=fault.per_row)
        for name in fault.counted:
            assert rig.grown(name) > 0, f"{name} does not tell of it: {rig.counters()}"
        for name in fault.still:
            assert rig.grown(name) == 0, f"{name} grew by {rig.grown(name)}"
    seen.keep()
    return seen
