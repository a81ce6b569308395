"""Tags that are read instead of monitored: in the shape of samples, fresh while they stand still, told by name."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from asyncua import ua
from asyncua.server.subscription_service import SubscriptionService
from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.client import GroupFeed, LinkState, Session, session, wire
from opcua_detector.client.limits import Profile
from opcua_detector.client.polling import News, Stamps
from opcua_detector.config import GroupConfig, TagConfig
from sim_server.testing import RunningPlant, running_plant

from .bounded import Bounds, add_many
from .conftest import WAIT_S, OddServer, Rows, group_config, server_config

PERIOD = 50_000_000


def polled(**changes: Any) -> GroupConfig:
    return group_config(**({"period": "50 ms", "sampling": "poll"} | changes))


def tags_of(odd: OddServer, names: list[str], **changes: Any) -> tuple[TagConfig, ...]:
    return tuple(TagConfig(name=name, node=odd.text(name), **changes) for name in names)


# --- stamps ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.booleans()), min_size=1, max_size=40),
    st.integers(-10**6, 10**6),
)
def test_stamps_never_go_back_and_never_run_ahead(polls: list[tuple[int, int, bool]], apart: int) -> None:
    """A server whose clock is `apart` from ours; each poll: way there, way back, and whether the value changed."""
    now, changed_at = 1000, 10**9
    stamps = Stamps(1)
    last: int | None = None
    value_since = 0
    for there, back, changes in polls:
        sent = now
        answered = sent + there
        if changes or value_since == 0:
            value_since = answered - min(there, 3)  # at some moment before the answer, after the poll before
            value_since = max(value_since, sent)
        now = answered + back
        raw = np.array([value_since + apart + changed_at], np.int64)
        stamp = int(stamps.of(raw, sent, now)[0])
        assert last is None or stamp >= last
        assert stamp <= now + apart + changed_at
        last = stamp
        now += 7


def test_values_without_any_stamp_stay_without() -> None:
    stamps = Stamps(2)
    for k in range(3):
        raw = np.array([wire.NO_STAMP, 10**9], np.int64)
        found = stamps.of(raw, 100 * k, 100 * k + 10).tolist()
        assert found == [wire.NO_STAMP, 10**9 + max(0, 100 * k - 10)]


# --- news ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(
    st.tuples(st.integers(1, 40), st.sets(st.integers(0, 2)), st.sampled_from(["stamp", "value", "status"])),
    min_size=1, max_size=60,
))
def test_news_is_what_changed_and_what_rests_once_per_period(polls: list[tuple[int, set[int], str]]) -> None:
    """Each poll: time since the last one, which values have changed, and what of them."""
    period, rest = 20, 30
    news = News(3, period)
    raw, value, status = np.ones(3, np.int64), np.array([0.0, np.nan, 1.0]), np.zeros(3, np.uint32)
    now, handed_at = 0, -1000
    changed_at = np.full(3, -1000)
    for n, (later, changes, what) in enumerate(polls):
        now += later
        at = np.array(sorted(changes), np.int64)
        if what == "stamp":
            raw[at] += 1
        elif what == "value":
            value[at] = now
        else:
            status[at] += 1
        changed_at[at if n else slice(None)] = now  # nothing is known before the first answer
        found = news.of(raw, value, status, now)
        changed, rests = changed_at == now, now - changed_at >= rest
        due = bool(changed.any()) or now - handed_at >= period
        assert found.tolist() == (changed | rests if due else np.zeros(3, np.bool_)).tolist()
        if found.any():
            handed_at = now


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
