"""Live rows: complete, equal to what the plant did, through bad habits of the server."""

from __future__ import annotations

import numpy as np
import pytest
import pytest_asyncio
from asyncua import Client, ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import struct_to_binary

from opcua_detector.client import GroupFeed, Session, subscription, wire
from opcua_detector.config import TagConfig
from sim_server.plant import Plant
from sim_server.processes import Process, model
from sim_server.testing import RunningPlant

from .conftest import HISTORY_ROWS, PLANT, OddServer, Rows, call, group_config, server_config

PERIOD = 10_000_000


@pytest_asyncio.fixture
async def healthy(other: Client):
    """A second client; the plant's quirks are cleared afterwards."""
    yield other
    await call(other, "ClearQuirks")


async def test_live_rows_are_complete_and_equal_the_plants_own_values(
    session: Session, plant: RunningPlant
) -> None:
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(300)
    await feed.stop()
    stamps = np.array([row[0] for row in rows.rows])
    assert (np.diff(stamps) == PERIOD).all()
    twin = Plant(Process(model("lorenz"), seed=0, noise=0.0))
    numbers = (stamps - plant.start_ns) // PERIOD
    assert (stamps == plant.start_ns + numbers * PERIOD).all()
    twin.rows(2000 + HISTORY_ROWS + int(numbers[0]))
    assert np.array_equal(np.array([row[2] for row in rows.rows]), twin.rows(len(stamps)).values[:, :2])
    assert all(row[3].all() for row in rows.rows)
    counts = feed.counters()
    assert (
        counts["used"] + counts["skipped"] + feed.builder.pending == counts["delivered"] == counts["samples"]
    )
    assert counts["lost"] == counts["late"] == counts["overload"] == counts["frame_errors"] == 0
    revised = feed.revised()["plant"]
    assert revised.publishing_ms == 10.0 and revised.keep_alive_count >= 1
    assert all(item.revised_queue >= 10 for one in feed.subscriptions.values() for item in one.items)


async def test_null_source_timestamps_fall_back_to_the_server_and_are_counted(
    session: Session, healthy: Client
) -> None:
    await call(healthy, "SetQuirk", "measured", "null_source", 1.0)
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(100)
    assert feed.counters()["null_timestamp"] >= 150
    assert np.diff([row[0] for row in rows.rows]).min() == PERIOD
    await feed.stop()


async def test_bad_and_nan_samples_are_masked_and_the_other_tag_is_not(
    session: Session, healthy: Client
) -> None:
    await call(healthy, "SetQuirk", "x1", "bad", 1.0)
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(30)
    assert all(row[3].tolist() == [0, 1] and np.isnan(row[2][0]) for row in rows.rows[1:])
    await call(healthy, "ClearQuirks")
    await rows.until(lambda r: bool(r.rows[-1][3].all()))
    await call(healthy, "SetQuirk", "x3", "nan", 1.0)
    await rows.until(lambda r: r.rows[-1][3].tolist() == [1, 0])
    counts = feed.counters()
    assert counts["bad"] >= 28 and counts["non_finite"] >= 1 and counts["masked"] >= 28
    await feed.stop()


async def test_change_only_reporting_beside_a_fast_tag_gives_every_row(
    session: Session, healthy: Client
) -> None:
    rows = Rows()
    feed = GroupFeed(
        group_config(
            "x1",
            "constant",
            tags=(
                TagConfig(name="x1", node=f"{PLANT}lorenz.x1"),
                TagConfig(name="constant", node=f"{PLANT}lorenz.constant", kind="setpoint"),
            ),
        ),
        {"plant": session},
        rows.take,
    )
    await call(healthy, "SetQuirk", "constant", "on_change", 1.0)
    await feed.start()
    await rows.more(200)
    assert (np.diff([row[0] for row in rows.rows]) == PERIOD).all()
    # the server may bring the first value of each tag in a notification of its own
    begin = next(k for k, row in enumerate(rows.rows) if row[3].all())
    assert begin < 50
    assert all(row[3].all() and row[2][1] == 24.0 for row in rows.rows[begin:])
    await feed.stop()


async def test_a_tag_that_is_missing_is_named_and_the_rest_delivers(session: Session) -> None:
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x9"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(30)
    states = feed.tag_states()
    assert states["x1"] == "" and "BadNodeIdUnknown" in states["x9"]
    assert all(row[3].tolist() == [1, 0] for row in rows.rows)
    await feed.stop()


async def test_a_subscription_that_the_server_has_forgotten_is_made_anew(
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plant deletes it without a word: no StatusChangeNotification, no BadNoSubscription, silence."""
    monkeypatch.setattr(subscription, "KEEP_ALIVE_S", 0.3)
    monkeypatch.setattr(subscription, "SILENCE_MARGIN_S", 0.3)
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(20)
    (one,) = feed.subscriptions.values()
    await session.client.uaclient.delete_subscriptions([one._id])
    before = len(rows.rows)
    await rows.until(lambda r: len(r.rows) > before + 30 and any(row[1] for row in r.rows[1:]))
    assert session.counters["lost"] == 1 and session.counters["reconnects"] == 1
    await feed.stop()


async def test_a_subscription_ended_with_a_status_is_made_anew_on_the_same_session(session: Session) -> None:
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3"), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(20)
    (one,) = feed.subscriptions.values()
    message = ua.PublishResponse()
    message.Parameters.SubscriptionId = one._id
    message.Parameters.NotificationMessage.NotificationData = [
        ua.StatusChangeNotification(Status=ua.StatusCode(ua.StatusCodes.BadTimeout))
    ]
    one._published(wire.decode_publish(Buffer(struct_to_binary(message))))
    before = len(rows.rows)
    await rows.until(lambda r: len(r.rows) > before + 30)
    assert one.counters["rebuilt"] == 1 and session.counters["lost"] == 0
    assert sum(row[1] for row in rows.rows) == 2
    await feed.stop()


async def test_a_connection_lost_for_a_moment_is_a_gap_even_within_max_hold(session: Session) -> None:
    rows = Rows()
    feed = GroupFeed(group_config("x1", "x3", max_hold=100_000), {"plant": session}, rows.take)
    await feed.start()
    await rows.more(20)
    session.fail("cut by the test")
    before = len(rows.rows)
    await rows.until(lambda r: len(r.rows) > before + 30 and session.counters["reconnects"] == 1)
    gaps = [k for k, row in enumerate(rows.rows) if row[1]]
    assert len(gaps) == 2 and gaps[1] >= before
    assert all(row[3].all() for row in rows.rows[gaps[1] :])
    await feed.stop()


async def test_two_groups_share_a_session(session: Session) -> None:
    first, second = Rows(), Rows()
    feeds = [
        GroupFeed(group_config("x1"), {"plant": session}, first.take),
        GroupFeed(group_config("x3", period="20 ms"), {"plant": session}, second.take),
    ]
    for feed in feeds:
        await feed.start()
    await first.more(40)
    await second.more(20)
    assert set(np.diff([row[0] for row in second.rows])) == {2 * PERIOD}
    for feed in feeds:
        await feed.stop()


async def test_a_row_that_cannot_be_worked_on_is_counted_and_the_next_ones_come(session: Session) -> None:
    rows = Rows()

    def breaks(frame) -> None:
        rows.take(frame)
        if frame.seq % 2:
            raise ZeroDivisionError

    feed = GroupFeed(group_config("x1"), {"plant": session}, breaks)
    await feed.start()
    await rows.more(40)
    assert feed.frame_errors >= 20
    assert (np.diff([row[0] for row in rows.rows]) == PERIOD).all()
    await feed.stop()


async def test_an_idle_server_gives_held_rows_and_text_tags_a_stable_code(odd: OddServer) -> None:
    """Nothing changes after the first value: held rows come by the clock, since the server is alive."""
    one = Session(server_config(odd.endpoint))
    await one.open()
    group = group_config(
        "x",
        period="50 ms",
        max_hold=10,
        tags=(
            TagConfig(name="speed", node=odd.text("Double")),
            TagConfig(name="on", node=odd.text("Boolean")),
            TagConfig(name="mode", node=odd.text("String"), kind="state"),
        ),
    )
    rows = Rows()
    feed = GroupFeed(group, {"plant": one}, rows.take)
    now = ua.DataValue(ua.Variant("auto", ua.VariantType.String))
    await odd.nodes["String"].write_value(now)
    for name in ("Double", "Boolean"):
        await odd.nodes[name].write_value(await odd.nodes[name].read_value())
    await feed.start()
    await rows.more(8)
    assert np.diff([row[0] for row in rows.rows]).tolist() == [50_000_000] * (len(rows.rows) - 1)
    code = rows.rows[-1][2][2]
    assert rows.rows[-1][2][:2].tolist() == [0.0, 0.0] and code > 0
    await odd.nodes["String"].write_value(ua.Variant("manual", ua.VariantType.String))
    await odd.nodes["Boolean"].write_value(True)
    await rows.until(lambda r: r.rows[-1][2][1] == 1.0 and r.rows[-1][2][2] not in (code, np.nan))
    await feed.stop()
    await one.close()
