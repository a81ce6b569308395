"""Tags that are read instead of monitored: in the shape of samples, fresh while they stand still, told by name."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from asyncua import ua
from asyncua.server.subscription_service import SubscriptionService
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import GroupFeed, LinkState, Session, session
from opcua_detector.client.limits import Profile
from opcua_detector.client.poll_news import News
from opcua_detector.config import GroupConfig, TagConfig
from sim_server.testing import RunningPlant, running_plant

from .bounded import Bounds, add_many
from .conftest import WAIT_S, OddServer, Rows, group_config, server_config

PERIOD = 50_000_000


def polled(**changes: Any) -> GroupConfig:
    return group_config(**({"period": "50 ms", "sampling": "poll"} | changes))


def tags_of(odd: OddServer, names: list[str], **changes: Any) -> tuple[TagConfig, ...]:
    return tuple(TagConfig(name=name, node=odd.text(name), **changes) for name in names)


OLD = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=1)


async def write_old(odd: OddServer, name: str, value: float) -> None:
    """Write a value under the stamp of an hour ago, always the same."""
    await odd.nodes[name].write_value(ua.DataValue(ua.Variant(value, ua.VariantType.Double), SourceTimestamp=OLD))


# --- news ---


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sets(st.integers(0, 2)), st.sampled_from(["stamp", "value", "status"])),
        min_size=1, max_size=60,
    ),
    st.booleans(),
)
def test_news_is_what_changed_and_what_rests_comes_with_it_or_once_per_period(
    polls: list[tuple[int, set[int], str]], often: bool
) -> None:
    """Each poll: time since the last one, which values have changed, and what of them."""
    period, rest, alone = (20, 30, 20) if often else (20, 0, 0)
    news = News(5 if often else 20, period)
    columns = np.array([4, 0, 2], np.int32)
    raw, value, status = np.zeros(3, np.int64), np.array([0.0, np.nan, 1.0]), np.zeros(3, np.uint32)
    now = 0
    stamped_at, changed_at, handed_at = np.zeros(3, np.int64), np.zeros(3, np.int64), np.full(3, -(10**6))
    for n, (later, changes, what) in enumerate(polls):
        now += later
        at = np.array(sorted(changes if n else {0, 1, 2}), np.int64)  # nothing is known before the first answer
        if what == "stamp":
            raw[at] += n
            stamped_at[at] = now
        elif what == "value":
            value[at] = now if n else value[at]
        else:
            status[at] += n
        changed_at[at] = now
        stamped_at[at if not n else []] = now
        found, rests, hole = news.of(columns, raw, value, status, now)
        assert not hole
        changed, stamped = changed_at == now, stamped_at == now
        due = (now - changed_at >= rest) & (now - handed_at >= (0 if stamped.any() else alone))
        assert found.tolist() == stamped.tolist()
        assert rests.tolist() == (~stamped & (due | changed)).tolist()
        handed_at[rests] = now
    news.forget()
    assert news.of(columns, raw, value, status, now)[0].all()


def test_a_source_that_catches_up_leaves_holes_and_one_that_is_slow_does_not() -> None:
    period = 20
    columns, zeros = np.arange(3, dtype=np.int32), np.zeros(3)
    status = np.zeros(3, np.uint32)

    def holes(stamps: list[int | tuple[int, ...]], every: int) -> list[bool]:
        news = News(every, period)
        return [news.of(columns, np.array(np.broadcast_to(one, 3), np.int64), zeros, status, 1000 + k * every)[2]
                for k, one in enumerate(stamps)]

    assert not any(holes([20 * k + k % 3 for k in range(20)], 20))  # in step
    assert holes([20 * k + 20 * (k > 10) for k in range(20)], 20) == [k == 11 for k in range(20)]  # one was missed
    assert sum(holes([20 * k if k < 10 else 40 * k - 200 for k in range(40)], 20)) < 10  # another pace
    rng = np.random.default_rng(0)
    assert not any(holes(np.cumsum(rng.integers(5, 40, 50)).tolist(), 20)[5:])  # at will
    assert not any(holes([20 * (k // 10) for k in range(50)], 2))
    assert holes([0, 20, 40, 200, 360, 380, 400], 20) == [False] * 3 + [True] * 2 + [False] * 2
    assert not any(holes([(0, 0, 0), (20, 20, 20), (900, 40, 40), (1800, 60, 60)], 20))  # one tag is no clock
    assert not any(holes([0, 0, 0, 0, 150, 150, 150, 150, 180, 180, 180, 180, 300], 20))  # seldom, late at will
    found = News(20, period)
    found.of(columns, np.zeros(3, np.int64), zeros, status, 0)
    news, rests, hole = found.of(columns, np.array([20, 0, 0], np.int64), zeros, status, 100, hole=True)
    assert news.tolist() == [True, False, False] and rests.tolist() == [False, True, True] and hole


# --- groups ---


async def test_a_group_can_ask_to_be_polled_and_has_no_subscription_then(
    odd: OddServer, link: Session
) -> None:
    names = await add_many(odd, 5)
    rows = Rows()
    feed = GroupFeed(polled(tags=tags_of(odd, names), max_hold=4), {"plant": link}, rows.take)
    await feed.start()
    assert feed.polled_tags() == dict.fromkeys(names, "as configured")
    service = odd.server.iserver.subscription_service  # type: ignore[union-attr]
    assert not service.subscriptions
    await rows.more(20)  # far more than max_hold, and nothing has changed
    assert all(row[3].all() for row in rows.rows[1:])
    assert set(np.diff([row[0] for row in rows.rows]).tolist()) == {PERIOD}
    await odd.nodes[names[3]].write_value(33.0)
    await rows.until(lambda r: r.rows[-1][2].tolist() == [0.0, 1.0, 2.0, 33.0, 4.0])
    counts = feed.counters()
    assert counts["late"] == 0 and counts["polls"] > 20 and counts["gaps"] == 0
    assert set(feed.tag_states().values()) == {""}
    await feed.stop()
    polls = feed.counters()["polls"]
    await asyncio.sleep(0.2)
    assert feed.counters()["polls"] == polls


async def test_polls_between_rows_hand_on_every_change_once_and_what_rests_with_it(
    odd: OddServer, link: Session
) -> None:
    names = await add_many(odd, 3)
    rows = Rows()
    feed = GroupFeed(polled(sampling="poll 5 ms", max_hold=4, tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    await rows.more(8)  # at rest: more than max_hold
    first = len(rows.rows)
    for k in range(1, 31):
        await odd.nodes[names[0]].write_value(float(k))
        await asyncio.sleep(PERIOD / 1e9)
    await rows.until(lambda r: r.rows[-1][2][0] == 30.0)
    counts = feed.counters()
    await feed.stop()
    assert all(row[3].all() and row[2].tolist()[1:] == [1.0, 2.0] for row in rows.rows[1:])
    moved = np.array([row[2][0] for row in rows.rows[first:]])
    assert (np.diff(moved) >= 0).all() and len(np.unique(moved)) > 15  # two changes within one row: the later one
    assert counts["late"] == 0 and counts["gaps"] == 0 and counts["lost"] == 0
    assert counts["polls"] > 3 * len(rows.rows)  # far more than rows, and no sample for each of them
    assert counts["samples"] < 2 * 3 * len(rows.rows)


@pytest.mark.parametrize("sampling", ["poll", "poll 5 ms"])
async def test_a_tag_that_has_rested_for_long_is_valid_beside_one_that_moves_and_after_a_cut(
    odd: OddServer, link: Session, sampling: str
) -> None:
    names = await add_many(odd, 3)
    for k in (1, 2):
        await write_old(odd, names[k], float(k))
    rows = Rows()
    feed = GroupFeed(polled(sampling=sampling, max_hold=4, tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    moves = asyncio.create_task(move(odd, names[0]))
    try:
        await rows.more(30)
        before = len(rows.rows)
        link.fail("cut by the test", link.client)
        await rows.until(lambda r: len(r.rows) > before + 30)
    finally:
        moves.cancel()
    await feed.stop()
    counts = feed.counters()
    # The first row of a connection may be one of values as they are first read.
    settled = [row for k, row in enumerate(rows.rows) if k > 2 and not any(one[1] for one in rows.rows[k - 2 : k + 1])]
    assert len(settled) > 40 and all(row[3].all() and row[2].tolist()[1:] == [1.0, 2.0] for row in settled)
    assert counts["clock_jumps"] == 0 and counts["ahead_of_clock"] == 0


@pytest.mark.parametrize("ppm", [-200, 0, 200])
def test_what_rests_and_what_moves_stay_together_where_the_clocks_run_unevenly(ppm: int) -> None:
    """An hour of polls at 10 Hz; the clock of the source runs faster or slower than ours, some answers are slow."""
    ours, period = 10**12, 100_000_000
    rows = Rows()
    group = polled(period="100 ms", tags=group_config("x1", "x2", "x3").tags, max_hold=4)
    feed = GroupFeed(group, {"plant": Session(server_config("opc.tcp://127.0.0.1:1/"))}, rows.take,
                     clock_ns=lambda: ours)
    start, moving, resting = ours, np.array([0], np.int32), np.array([1, 2], np.int32)
    good = np.zeros(3, np.uint32)

    def source() -> int:
        return 10**18 + (ours - start) * (10**6 + ppm) // 10**6

    changed = source()
    for k in range(36_000):
        sent = ours
        ours += 3_000_000 if k % 50 else 40_000_000
        if k == 0:
            old = np.array([changed - 3600 * 10**9] * 2 + [changed], np.int64)
            feed._samples(np.array([1, 2, 0], np.int32), old, np.array([5.0, 7.0, 0.0]), good)
        else:
            feed._samples(moving, np.array([changed]), np.array([float(k)]), good[:1])
            feed._rested(resting, np.array([5.0, 7.0]), good[:2], sent)
        changed = source() + 1_000_000 * (k % 7)  # after this answer and before the next one
        ours = start + (k + 1) * period
    counts = feed.counters()
    assert counts["late"] == counts["stale"] == counts["gaps"] == counts["clock_jumps"] == 0
    assert counts["held"] < 0.03 * counts["rows"] and counts["rows"] > 35_900


async def move(odd: OddServer, name: str) -> None:
    """Change a value twice a period, for as long as the test lasts."""
    for k in range(10**6):
        await odd.nodes[name].write_value(float(k))
        await asyncio.sleep(PERIOD / 2e9)


@pytest.mark.parametrize("sampling", ["25 ms", "poll", "poll 5 ms"])
async def test_rows_begin_where_a_plant_that_stood_still_begins_to_move(
    odd: OddServer, link: Session, sampling: str
) -> None:
    names = await add_many(odd, 3)
    for name in names:
        await write_old(odd, name, 1.0)
    rows = Rows()
    feed = GroupFeed(polled(sampling=sampling, tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    await asyncio.sleep(0.5)
    moves = [asyncio.create_task(move(odd, name)) for name in names]
    try:
        await rows.until(lambda r: len(r.rows) > 40 and all(row[3].all() for row in r.rows[-20:]))
    finally:
        for one in moves:
            one.cancel()
    await feed.stop()
    assert feed.counters()["clock_jumps"] == 0


@pytest.mark.parametrize("sampling", ["poll", "poll 5 ms"])
async def test_changes_that_no_poll_has_seen_are_a_gap_and_not_held_rows(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sampling: str
) -> None:
    names = await add_many(odd, 3)
    rows = Rows()
    feed = GroupFeed(polled(sampling=sampling, tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    moves = [asyncio.create_task(move(odd, name)) for name in names[:2]]
    try:
        await rows.more(30)
        (one,) = feed.subscriptions.values()
        read = one.poller._read

        async def slow(*given: Any) -> bool:
            monkeypatch.undo()
            await asyncio.sleep(4 * PERIOD / 1e9)  # far less than max_hold
            return await read(*given)

        before, gaps = len(rows.rows), sum(row[1] for row in rows.rows)
        monkeypatch.setattr(one.poller, "_read", slow)
        await rows.until(lambda r: sum(row[1] for row in r.rows) > gaps)
        await rows.more(20)
    finally:
        for one_ in moves:
            one_.cancel()
    await feed.stop()
    assert feed.counters()["poll_holes"] >= 1 and any("changes were missed" in one.message for one in caplog.records)
    assert link.counters["lost"] == 0 and all(row[3].all() for row in rows.rows[before + 1 :])
    behind = [k for k, row in enumerate(rows.rows) if row[1] and k >= before - 1]
    assert any(rows.rows[k][0] - rows.rows[k - 1][0] >= 3 * PERIOD for k in behind)


@pytest.mark.parametrize("sampling", ["poll", "poll 5 ms"])
async def test_values_that_change_under_a_stamp_that_does_not_are_taken(
    odd: OddServer, link: Session, sampling: str
) -> None:
    names = await add_many(odd, 2)
    rows = Rows()
    feed = GroupFeed(polled(sampling=sampling, max_hold=4, tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    for k in range(20):
        for name in names:
            await write_old(odd, name, float(k))
        await rows.until(lambda r, k=float(k): bool(r.rows) and r.rows[-1][2].tolist() == [k, k])  # type: ignore[misc]
    assert all(row[3].all() for row in rows.rows[4:])
    await feed.stop()


async def test_of_an_array_that_is_polled_between_rows_one_element_changes(odd: OddServer, link: Session) -> None:
    (name,) = await add_many(odd, 1)
    await odd.nodes[name].write_value([1.0, 2.0, 3.0])
    tags = tuple(TagConfig(name=f"e{k}", node=odd.text(name), index=k) for k in (2, 0))
    rows = Rows()
    feed = GroupFeed(polled(sampling="poll 5 ms", tags=tags), {"plant": link}, rows.take)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and r.rows[-1][2].tolist() == [3.0, 1.0])
    await odd.nodes[name].write_value([7.0, 2.0, 3.0])
    await rows.until(lambda r: r.rows[-1][2].tolist() == [3.0, 7.0] and bool(r.rows[-1][3].all()))
    await feed.stop()


async def test_a_moving_plant_is_polled_without_late_samples(session: Session, plant: RunningPlant) -> None:
    rows = Rows()
    feed = GroupFeed(
        polled(period="20 ms", tags=group_config("x1", "x3").tags), {"plant": session}, rows.take
    )
    await feed.start()
    await rows.more(100)
    await feed.stop()
    counts = feed.counters()
    assert counts["late"] == 0 and counts["clock_jumps"] == 0
    stamps = np.array([row[0] for row in rows.rows])
    assert (np.diff(stamps) > 0).all() and np.std([row[2][0] for row in rows.rows]) > 0.1


@pytest.mark.parametrize("floor", ["publishing", "sampling"])
async def test_a_floor_above_the_period_leads_to_polling_and_is_told(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, floor: str
) -> None:
    names = await add_many(odd, 3)
    changes: dict[str, Any] = {"period": "50 ms"}
    if floor == "publishing":
        original = SubscriptionService.create_subscription

        async def slow(service: SubscriptionService, given: Any, *more: Any, **named: Any) -> Any:
            given.RequestedPublishingInterval = max(1000.0, given.RequestedPublishingInterval)
            return await original(service, given, *more, **named)

        monkeypatch.setattr(SubscriptionService, "create_subscription", slow)
        words = "publishes no faster than every 1000 ms"
    else:  # asyncua states its publishing interval as that of sampling, which other servers mean
        link.limits.profile = Profile("means it", "", 100)
        changes["publishing"] = "80 ms"
        words = "samples no faster than every 80 ms"
    rows = Rows()
    feed = GroupFeed(group_config(tags=tags_of(odd, names), **changes), {"plant": link}, rows.take)
    await feed.start()
    assert all(words in why for why in feed.polled_tags().values()) and len(feed.polled_tags()) == 3
    assert any(words in record.message for record in caplog.records)
    await odd.nodes[names[0]].write_value(7.0)
    await rows.until(lambda r: bool(r.rows) and r.rows[-1][2][0] == 7.0 and bool(r.rows[-1][3].all()))
    service = odd.server.iserver.subscription_service  # type: ignore[union-attr]
    assert not any(one.monitored_item_srv._monitored_items for one in service.subscriptions.values())
    await feed.stop()


async def test_a_floor_below_the_period_does_not(odd: OddServer, link: Session) -> None:
    names = await add_many(odd, 2)
    link.limits.profile = Profile("means it", "", 100)
    feed = GroupFeed(group_config(period="50 ms", tags=tags_of(odd, names)), {"plant": link}, Rows().take)
    await feed.start()
    assert not feed.polled_tags() and set(feed.tag_states().values()) == {""}
    await feed.stop()


async def test_a_polled_node_that_vanishes_is_masked_with_its_reason_and_comes_back(
    odd: OddServer, link: Session
) -> None:
    names = await add_many(odd, 2)
    rows = Rows()
    feed = GroupFeed(polled(tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and bool(r.rows[-1][3].all()))
    await odd.server.delete_nodes([odd.nodes[names[1]]])
    await rows.until(lambda r: r.rows[-1][3].tolist() == [1, 0])
    assert feed.tag_states() == {names[0]: "", names[1]: "BadNodeIdUnknown"}
    await odd.server.nodes.objects.add_variable(odd.nodes[names[1]].nodeid, "back", 5.0, ua.VariantType.Double)
    await rows.until(lambda r: r.rows[-1][2].tolist() == [0.0, 5.0])
    assert set(feed.tag_states().values()) == {""} and link.counters["lost"] == 0
    await feed.stop()


async def test_polls_are_halved_until_the_server_takes_them(
    odd: OddServer, link: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await add_many(odd, 60)
    bounds = Bounds(monkeypatch, read=20)
    rows = Rows()
    feed = GroupFeed(polled(tags=tags_of(odd, names)), {"plant": link}, rows.take)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and bool(r.rows[-1][3].all()))
    refused = bounds.refused["read"]
    await rows.more(5)
    assert 0 < refused == bounds.refused["read"] and bounds.largest["read"] <= 20
    assert link.counters["halved_calls"] == refused and link.counters["lost"] == 0
    await feed.stop()


async def test_a_server_that_does_not_answer_a_poll_is_given_up_and_taken_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LAST_DELAY_S", 0.3)
    with running_plant("lorenz", history_rows=0) as plant:
        one = Session(server_config(plant.endpoint, timeout="700 ms"))
        await one.open()
        rows = Rows()
        feed = GroupFeed(polled(tags=group_config("x1", "x3").tags), {"plant": one}, rows.take)
        await feed.start()
        await rows.more(5)
        plant.pause()
        try:
            async with asyncio.timeout(WAIT_S):
                while one.state is not LinkState.WAITING:
                    await asyncio.sleep(0.02)
            assert "poll is not answered" in one.reason or "does not answer" in one.reason
        finally:
            plant.resume()
        before = len(rows.rows)
        await rows.until(lambda r: len(r.rows) > before + 5)
        assert one.counters["reconnects"] >= 1 and any(row[1] for row in rows.rows[1:])
        await feed.stop()
        await one.close()
