"""The lease on outputs: one writes, the other takes over, never both, with nodes that know no compare-and-swap."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest
from asyncua import ua

from opcua_detector.client import Session, WriteBack
from opcua_detector.client.lease import Lease, LeaseKeeper, Role, instance_name

from .conftest import WAIT_S, OddServer, server_config

P = 2.0
STEP = P / 6


class Instance:
    """One instance in a simulated time: reads and writes a node with delays, may be cut off or frozen."""

    def __init__(self, name: str, life: str, node: list[str], rng: random.Random, slow: float = 0.0) -> None:
        self.lease = Lease(name, life, P)
        self.node, self.rng, self.slow = node, rng, slow
        self.next_at = rng.uniform(0, STEP)
        self.alive = self.linked = True
        self.asked = 0.0
        self.landing: tuple[float, str] | None = None  # when a write reaches the server
        self.acked: tuple[float, float] | None = None  # (when it is acknowledged, when it was sent)

    def _delay(self) -> float:
        return self.rng.uniform(0.001, 0.01 + self.slow)

    def turn(self, now: float) -> None:
        """Do what is due."""
        if not self.alive:
            return
        if self.landing is not None and now >= self.landing[0]:
            self.node[0] = self.landing[1]
            self.landing = None
        if self.acked is not None and now >= self.acked[0]:
            if self.linked:
                self.lease.written(self.acked[1], now)
            else:
                self.lease.refused()
            self.acked = None
        if now < self.next_at or self.acked is not None or not self.linked:
            return
        self.next_at = now + STEP
        said = self.lease.read(self.node[0], now, now)
        if said is not None:
            lands = now + self._delay()
            self.landing, self.acked = (lands, said), (lands + self._delay(), now)


def play(instances: list[Instance], begin: float, end: float) -> tuple[float, float]:
    """Let time pass in steps of 5 ms; return seconds in which two wrote, and in which nobody did."""
    both = none = 0.0
    now = begin
    while now < end:
        for one in instances:
            one.turn(now)
        writing = sum(one.alive and one.lease.holds(now) for one in instances)
        both += 0.005 * (writing > 1)
        none += 0.005 * (writing == 0)
        now += 0.005
    return both, none


@pytest.mark.parametrize("seed", range(30))
def test_of_several_instances_exactly_one_writes_and_after_its_death_another_within_five_seconds(seed: int) -> None:
    rng = random.Random(seed)
    node = [""]
    some = [Instance(f"pc{k}", f"{k}a", node, rng, slow=rng.choice([0.0, 0.2])) for k in range(rng.choice([2, 2, 3]))]
    both, none = play(some, 0.0, 20.0)
    assert both == 0 and none < P
    now = 20.0
    for _ in range(len(some) - 1):
        (holder,) = [one for one in some if one.alive and one.lease.holds(now)]
        holder.alive = False
        both, none = play(some, now, now + 20.0)
        now += 20.0
        assert both == 0 and none < 5.0
        assert sum(one.lease.holds(now) for one in some if one.alive) == 1


@pytest.mark.parametrize("seed", range(10))
def test_an_instance_that_is_cut_off_stops_by_itself_before_the_other_begins_and_stands_by_when_it_is_back(
    seed: int,
) -> None:
    rng = random.Random(seed)
    node = [""]
    a, b = Instance("a", "a0", node, rng), Instance("b", "b0", node, rng)
    play([a, b], 0.0, 10.0)
    (holder, other) = (a, b) if a.lease.holds(10.0) else (b, a)
    holder.linked = False
    both, none = play([a, b], 10.0, 20.0)
    assert both == 0 and none < 5.0 and other.lease.holds(20.0) and not holder.lease.holds(20.0)
    holder.linked = True
    both, none = play([a, b], 20.0, 40.0)
    assert both == 0 and none == 0 and other.lease.holds(40.0)  # no flapping back
    assert holder.lease.role is Role.STANDBY and holder.lease.other == other.lease.name


@pytest.mark.parametrize("seed", range(10))
def test_an_emptied_node_as_after_a_restart_of_the_server_stays_with_its_holder(seed: int) -> None:
    rng = random.Random(seed)
    node = [""]
    a, b = Instance("a", "a0", node, rng), Instance("b", "b0", node, rng)
    play([a, b], 0.0, 10.0)
    holder = a if a.lease.holds(10.0) else b
    node[0] = ""
    both, none = play([a, b], 10.0, 20.0)
    assert both == 0 and none == 0 and holder.lease.holds(20.0)
    # The server is away for a while, for both, and comes back with an empty node.
    a.linked = b.linked = False
    both, _ = play([a, b], 20.0, 30.0)
    assert both == 0
    node[0] = ""
    a.linked = b.linked = True
    both, none = play([a, b], 30.0, 40.0)
    assert both == 0 and none < 2 * P and holder.lease.holds(40.0)


def test_two_that_were_frozen_together_do_not_change_places() -> None:
    rng = random.Random(3)
    node = [""]
    a, b = Instance("a", "a0", node, rng), Instance("b", "b0", node, rng)
    play([a, b], 0.0, 10.0)
    holder = a if a.lease.holds(10.0) else b
    both, none = play([a, b], 100.0, 110.0)  # a server that stood still for 90 s
    assert both == 0 and none < 2 * P and holder.lease.holds(110.0)


def test_a_released_lease_is_taken_at_once_and_a_text_of_a_stranger_is_no_lease() -> None:
    node = ["whatever an operator has written here"]
    rng = random.Random(1)
    a = Instance("a", "a0", node, rng)
    play([a], 0.0, P)
    assert a.lease.holds(P)
    b = Instance("b", "b0", node, rng)
    b.next_at = P
    play([a, b], P, 2 * P)
    assert not b.lease.holds(2 * P)
    node[0], a.alive = a.lease.released(), False
    assert not a.lease.holds(2 * P)
    _, none = play([b], 2 * P, 4 * P)
    assert none < P / 3 + 3 * STEP and b.lease.holds(4 * P)


def test_a_life_after_a_crash_waits_half_as_long_for_its_own_name() -> None:
    texts = {}
    for name in ("a", "b"):
        lease = Lease(name, "1f", P)
        now = 0.0
        while lease.read("a 0e 17 holds", now, now) is None:
            now += 0.01
        texts[name] = now
    assert texts["a"] == pytest.approx(P / 2, abs=0.02) and texts["b"] == pytest.approx(P, abs=0.02)


def test_a_twin_with_the_same_name_is_another_one() -> None:
    lease = Lease("a", "1f", P)
    for k in range(200):
        assert lease.read(f"a 0e {k} holds", k * STEP, k * STEP) is None
    assert lease.role is Role.STANDBY and lease.other == "a"


def test_the_name_of_an_instance_is_kept_over_restarts(tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    name = instance_name(store)
    assert instance_name(store) == name and len(name) > 7
    assert instance_name(tmp_path / "other.db") != name
    assert instance_name(store, "line-3") == "line-3"
    (tmp_path / "store.db.instance").write_text("two words\n")
    assert " " not in instance_name(store)
    assert instance_name(tmp_path / "no such folder" / "s.db")  # it cannot be kept: another one each time


async def keeper_on(odd: OddServer, name: str, changes: list[tuple[str, Role, str]]) -> tuple[Session, LeaseKeeper]:
    """A keeper of its own session on the node String."""
    session = Session(server_config(odd.endpoint))
    await session.open()
    keeper = LeaseKeeper(session, {"m": odd.text("String")}, name, 1.0,
                         on_change=lambda monitor, role, other: changes.append((name, role, other)))
    await session.attach(keeper)
    return session, keeper


async def eventually(condition: object, what: str) -> None:
    """Wait for a condition."""
    assert callable(condition)

    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    try:
        await asyncio.wait_for(wait(), WAIT_S)
    except TimeoutError:
        raise AssertionError(f"in vain: {what}") from None


async def test_on_a_server_the_second_one_stands_by_and_writes_when_the_first_one_releases(odd: OddServer) -> None:
    changes: list[tuple[str, Role, str]] = []
    session_a, a = await keeper_on(odd, "a", changes)
    await eventually(lambda: a.holds("m"), "a to hold")
    session_b, b = await keeper_on(odd, "b", changes)
    outputs = {("m", "Score"): odd.text("Double")}
    back_a, back_b = WriteBack(session_a, outputs, leases=a), WriteBack(session_b, outputs, leases=b)
    b.on_change = lambda monitor, role, other: back_b.resume(monitor) if role is Role.HOLDER else None
    await session_a.attach(back_a)
    await session_b.attach(back_b)
    for k in itertools.count(1):
        back_a.offer("m", k, {"Score": 1.0})
        back_b.offer("m", k, {"Score": 2.0})
        assert not (a.holds("m") and b.holds("m"))
        await asyncio.sleep(0.02)
        if k > 100 and b.leases["m"].other == "a":
            break
    assert await odd.nodes["Double"].read_value() == 1.0
    assert back_b.counters["withheld"] > 50 and back_b.counters["values"] == 0
    assert not await back_b.stop({"m": {"Score": 9.0}})  # who stands by has no last words
    assert await odd.nodes["Double"].read_value() == 1.0
    back_b = WriteBack(session_b, outputs, leases=b)
    await session_b.attach(back_b)
    back_b.offer("m", 0, {"Score": 2.0})
    assert await back_a.stop({"m": {"Score": -1.0}})
    await a.stop()
    assert (await odd.nodes["String"].read_value()).endswith("released")
    await eventually(lambda: b.holds("m"), "b to take over")
    back_b.resume("m")

    async def written() -> None:
        while await odd.nodes["Double"].read_value() != 2.0:
            await asyncio.sleep(0.02)

    await asyncio.wait_for(written(), WAIT_S)  # what b knew all the time, without a new row
    assert [one for one in changes if one[1] is Role.HOLDER] == [("a", Role.HOLDER, "")]
    assert ("b", Role.STANDBY, "a") in changes
    for session in (session_a, session_b):
        await session.close()


async def test_a_lease_that_cannot_be_kept_is_told_and_nothing_is_written(
    odd: OddServer, caplog: pytest.LogCaptureFixture,
) -> None:
    changes: list[tuple[str, Role, str]] = []
    session, keeper = await keeper_on(odd, "a", changes)
    await eventually(lambda: keeper.holds("m"), "the lease")
    await odd.nodes["String"].set_read_only()
    await eventually(lambda: not keeper.holds("m"), "the lease to run out")
    assert keeper.counters["refused"] > 0 and "Bad" in keeper.reason("m")
    await eventually(lambda: changes[-1][1] is Role.STANDBY, "standby to be told")
    assert len([one for one in caplog.records if "its lease" in one.getMessage()]) == 1
    await odd.nodes["String"].set_writable()
    await eventually(lambda: keeper.holds("m") and not keeper.reason("m"), "the lease again")
    for text in ("", "garbage"):  # somebody empties the node, or writes into it
        await odd.nodes["String"].write_value(ua.Variant(text, ua.VariantType.String))
        await asyncio.sleep(0.4)
        assert keeper.holds("m") and (await odd.nodes["String"].read_value()).startswith("a ")
    await keeper.stop()
    await session.close()
