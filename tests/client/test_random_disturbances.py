"""Random sequences of disturbances of network, server and plant: after the last one scores flow again, of all tags.

The sequences are those of their seeds; a test that fails names what was done, in order.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from plant.proxy import TO_CLIENT, TO_SERVER
from plant.rig import Rig, configuration, rigged
from plant.vendors import FULL, SEED, Simulator, simulator
from running import until, write

from opcua_detector.api import Record
from opcua_detector.app import fit_config, group_tags
from opcua_detector.client import LinkState, session, subscription
from opcua_detector.config import GroupConfig, load
from opcua_detector.nodes import State
from sim_server.processes import make

RECOVERY_S = 20.0
DISPOSED = ("used", "late", "duplicate", "replaced", "skipped")
PAUSES_S = (0.0, 0.05, 0.3, 1.0)
HOLDS_S = (0.05, 0.3, 0.8)

_T = TypeVar("_T")
# Begins a disturbance; what ends it again, where it does not end by itself, comes after a while.
Begin = Callable[[Rig, Simulator, random.Random], Awaitable[Callable[[], Awaitable[None]] | None]]


def network(do: Callable[[Rig, random.Random], None], *, lasts: bool) -> Begin:
    """Something of the proxy; one that lasts is healed."""

    async def begin(rig: Rig, plant: Simulator, rng: random.Random) -> Callable[[], Awaitable[None]] | None:
        async def end() -> None:
            rig.proxy.heal()

        do(rig, rng)
        return end if lasts else None

    return begin


def server(what: str, argument: str = "", *end: tuple[str, str]) -> Begin:
    """One of the simulator's disturbances and the one that ends it."""

    async def begin(rig: Rig, plant: Simulator, rng: random.Random) -> Callable[[], Awaitable[None]] | None:
        async def ends() -> None:
            for one in end:
                await plant.disturb(*one)

        await plant.disturb(what, argument)
        return ends if end else None

    return begin


def quality(code: str, *tags: str) -> Begin:
    async def begin(rig: Rig, plant: Simulator, rng: random.Random) -> Callable[[], Awaitable[None]]:
        await plant.status(code, *tags)
        return lambda: plant.status("Good", *tags)

    return begin


def quirk(tag: str, what: str, value: float) -> Begin:
    async def begin(rig: Rig, plant: Simulator, rng: random.Random) -> Callable[[], Awaitable[None]]:
        await plant.quirk(tag, what, value)
        return lambda: plant.quirk(tag, what, 0.0)

    return begin


async def blocked(rig: Rig, plant: Simulator, rng: random.Random) -> None:
    """Our own event loop stands still."""
    time.sleep(rng.choice(HOLDS_S))


async def failed(rig: Rig, plant: Simulator, rng: random.Random) -> None:
    """A part of ours takes the connection for dead."""
    rig.session.fail("cut by the test")


DISTURBANCES: dict[str, Begin] = {
    "cut": network(lambda rig, rng: rig.proxy.cut(), lasts=False),
    "reset": network(lambda rig, rng: rig.proxy.reset(), lasts=False),
    "reset in an answer": network(
        lambda rig, rng: rig.proxy.reset_in_message(rng.choice((1, 37, 300, 3000)), TO_CLIENT), lasts=False),
    "reset in a request": network(
        lambda rig, rng: rig.proxy.reset_in_message(rng.choice((1, 37, 300, 3000)), TO_SERVER), lasts=False),
    "blackhole": network(lambda rig, rng: rig.proxy.blackhole(), lasts=True),
    "server not heard": network(lambda rig, rng: rig.proxy.blackhole(TO_CLIENT), lasts=True),
    "client not heard": network(lambda rig, rng: rig.proxy.blackhole(TO_SERVER), lasts=True),
    "stall": network(lambda rig, rng: rig.proxy.stall(rng.choice((TO_CLIENT, TO_SERVER))), lasts=True),
    "slow": network(lambda rig, rng: rig.proxy.slow(latency_s=0.1, rate=20_000.0), lasts=True),
    "refused": network(lambda rig, rng: rig.proxy.refuse(), lasts=True),
    "subscriptions deleted": server("delete_subscriptions"),
    "subscriptions expired": server("expire_subscriptions"),
    "sessions closed": server("close_sessions"),
    "no room for a session": server("session_limit", FULL, ("session_limit", "0")),
    "few publish requests": server("publish_limit", "1", ("publish_limit", "0")),
    "tag removed": server("remove", "x3", ("restore", "x3")),
    "type changed": server("type", "x1=String", ("type", "x1=Double")),  # not of the tag that may be removed
    "output removed": server("remove", "lorenz.Score", ("restore", "lorenz.Score")),
    "all Bad": quality("BadSensorFailure", "x1", "x3"),
    "one Bad": quality("BadSensorFailure", "x1"),
    "GoodOverload": quality("GoodOverload", "x1", "x3"),
    "clock an hour ahead": quirk("*", "skew_ms", 3_600_000.0),
    "clock an hour behind": quirk("*", "skew_ms", -3_600_000.0),
    "out of order": quirk("measured", "swap", 0.3),
    "NaN": quirk("x1", "nan", 1.0),
    "loop blocked": blocked,
    "taken for dead": failed,
}


def healthy(group: GroupConfig) -> Record:
    """Rows of the plant that the server plays."""
    return Record.from_rows(make("lorenz", seed=SEED).simulate(60_000), group_tags(group), group.period)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with simulator(tmp_path_factory.mktemp("plant")) as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fitted model."""
    folder = tmp_path_factory.mktemp("models")
    file = write(folder, configuration("opc.tcp://127.0.0.1:1/"))
    for fitted in fit_config(load(file), file, healthy):
        fitted.model.save(fitted.path)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice silence and try again within tenths of a second instead of seconds."""
    monkeypatch.setattr(subscription, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(subscription, "SILENCE_MARGIN_S", 0.5)
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.5)
    monkeypatch.setattr(session, "PROBE_S", 1.0)


async def disturb(rig: Rig, plant: Simulator, rng: random.Random, steps: int, done: list[str]) -> None:
    """Begin and end disturbances in a random order; several may last at once."""
    standing: dict[str, Callable[[], Awaitable[None]]] = {}
    for _ in range(steps):
        if standing and rng.random() < 0.5:
            name = rng.choice(sorted(standing))
            done.append(f"end of {name}")
            await worked(plant, standing.pop(name))
        name = rng.choice(sorted(set(DISTURBANCES) - set(standing)))
        done.append(name)
        end = await worked(plant, partial(DISTURBANCES[name], rig, plant, rng))
        if end is not None:
            standing[name] = end
        await asyncio.sleep(rng.choice(PAUSES_S))
    for name, end in standing.items():
        done.append(f"end of {name}")
        await worked(plant, end)
    rig.proxy.heal()
    await worked(plant, plant.calm)


async def worked(plant: Simulator, do: Callable[[], Awaitable[_T]]) -> _T:
    """Work the plant, once more by a new connection where its own was hit as well."""
    try:
        return await do()
    except OSError:
        await plant.let_go()
        return await do()


def settled(rig: Rig) -> bool:
    """Whether everything is as it was: connected, every tag delivers and is valid, rows are judged normal."""
    return (
        rig.session.state is LinkState.CONNECTED and not any(rig.feed.tag_states().values())
        and bool(rig.feed.frame.valid.all()) and rig.run.state == State.NORMAL
    )


def left_over(rig: Rig) -> dict[str, object]:
    """What of ours there is more of than before; what the proxy still holds of a connection is its own."""
    more = rig.stock().more_than(rig.before)
    return {name: found for name, found in more.items() if name != "connections"}


async def survive(plant: Simulator, models: Path, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    done: list[str] = []
    await worked(plant, plant.calm)
    async with rigged(plant, models) as rig:
        try:
            await rig.strike_begins()
            await disturb(rig, plant, rng, steps, done)
            scored = rig.run.scored
            # A detector with a window judges nothing while an alert of the disturbances has not cleared.
            await until(lambda: rig.run.scored >= scored + 50 and settled(rig), "scores of all tags", RECOVERY_S)
            rig.not_busy()
            await until(lambda: not left_over(rig), f"nothing to be left: {left_over(rig)}", RECOVERY_S)
            counts, link = rig.counters(), rig.session.counters
            assert counts["delivered"] == sum(counts[name] for name in DISPOSED) + rig.feed.builder.pending
            assert counts["samples"] == counts["delivered"] + counts["ahead_of_clock"]
            assert counts["frame_errors"] == counts["handler_errors"] == 0
            assert link["connects"] == link["reconnects"] + 1 and link["lost"] == link["reconnects"]
            assert link["oversized"] == 0 and rig.feed.frame.seq + 1 == counts["rows"]
            assert len(rig.feed.frame.values) == 2 and not rig.feed.polled_tags() and not rig.feed.masked_tags()
        except AssertionError as error:
            error.add_note(f"seed {seed}: {', '.join(done)}")
            raise


@pytest.mark.parametrize("seed", range(2))
async def test_some_random_disturbances_are_survived(plant: Simulator, models: Path, seed: int) -> None:
    await survive(plant, models, seed, 6)
    await plant.let_go()


@pytest.mark.plant
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(100, 103))
async def test_many_random_disturbances_are_survived(plant: Simulator, models: Path, seed: int) -> None:
    await survive(plant, models, seed, 16)
    await plant.let_go()
