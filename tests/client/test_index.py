"""`index` of a tag: in groups, live and polled, checked before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

from opcua_detector.client import GroupFeed, Session, check_tags
from opcua_detector.config import TagConfig, parse
from opcua_detector.errors import ConfigError

from .conftest import OddServer, Rows, group_config, server_config


@pytest.mark.parametrize("how", [{}, {"sampling": "poll"}], ids=["monitored", "polled"])
async def test_a_group_of_elements_and_scalars(odd: OddServer, how: dict[str, Any]) -> None:
    one = Session(server_config(odd.endpoint))
    await one.open()
    await odd.nodes["Array"].write_value([1.0, 2.0, 3.0])
    tags = (
        TagConfig(name="third", node=odd.text("Array"), index=2), TagConfig(name="scalar", node=odd.text("Float")),
        TagConfig(name="first", node=odd.text("Array"), index=0),
    )
    rows = Rows()
    feed = GroupFeed(group_config(period="50 ms", tags=tags, **how), {"plant": one}, rows.take)
    await feed.start()
    await rows.until(lambda r: bool(r.rows) and r.rows[-1][2].tolist() == [3.0, 0.0, 1.0])
    await odd.nodes["Array"].write_value([10.0, 20.0, 30.0])
    await rows.until(lambda r: r.rows[-1][2].tolist() == [30.0, 0.0, 10.0] and bool(r.rows[-1][3].all()))
    assert set(feed.tag_states().values()) == {""}
    await feed.stop()
    await one.close()


async def test_an_index_is_checked(odd: OddServer) -> None:
    one = Session(server_config(odd.endpoint))
    await one.open()
    await odd.nodes["Array"].write_value([1.0, 2.0, 3.0])
    index = await odd.server.get_namespace_index(odd.uri)
    values = [[1.0, 2.0], [3.0, 4.0]]
    table = await odd.server.nodes.objects.add_variable(f"ns={index};s=Table", f"{index}:Table", values)
    await table.write_value_rank(2)
    await odd.nodes["Array"].write_value_rank(1)
    tags = {
        "fits": TagConfig(name="fits", node=odd.text("Array"), index=2),
        "long": TagConfig(name="long", node=odd.text("Array"), index=3),
        "flat": TagConfig(name="flat", node=odd.text("Table"), index=3),
        "beyond": TagConfig(name="beyond", node=odd.text("Table"), index=4),
        "scalar": TagConfig(name="scalar", node=odd.text("Double"), index=0),
        "whole": TagConfig(name="whole", node=odd.text("Array")),
    }
    indexes = {name: tag.index for name, tag in tags.items() if tag.index is not None}
    found = await check_tags(one, [tag.tag() for tag in tags.values()], indexes=indexes)
    told = {finding.where.split(".")[1].split(" ")[0]: finding for finding in found}
    assert set(told) == {"long", "beyond", "scalar", "whole"}
    assert "an array of 3" in told["long"].problem and not told["long"].error
    assert "an array of 4" in told["beyond"].problem
    assert "no array" in told["scalar"].problem and told["scalar"].error
    assert "'index'" in told["whole"].fix and told["whole"].error
    await one.close()


async def test_setpoints_of_a_subscription_that_stays_are_held_when_another_one_ends(odd: OddServer) -> None:
    """A group over two subscriptions: the server ends one, and does not repeat what the other has told long ago."""
    one = Session(server_config(odd.endpoint))
    await one.open()
    one.limits.items_per_subscription = 1
    tags = (TagConfig(name="moving", node=odd.text("Double")),
            TagConfig(name="set", node=odd.text("Float"), kind="setpoint"))
    rows = Rows()
    feed = GroupFeed(group_config(period="50 ms", tags=tags), {"plant": one}, rows.take)
    await feed.start()
    number = 0.0

    async def move(until: Any) -> None:
        nonlocal number
        while not until():
            number += 1.0
            await odd.nodes["Double"].write_value(number)
            await rows.more(1)

    await move(lambda: len(rows.rows) > 10 and rows.rows[-1][3].all())
    first, _ = feed.subscriptions.values()
    first._ended("BadTimeout")
    before = len(rows.rows)
    await move(lambda: len(rows.rows) > before + 20)
    gap = next(k for k, row in enumerate(rows.rows) if k >= before - 1 and row[1])
    assert all(row[3].all() and row[2][1] == 0.0 for row in rows.rows[gap:])
    assert not np.isnan(np.array([row[2] for row in rows.rows[gap:]])).any()
    await feed.stop()
    await one.close()


def plant(**server: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "servers": [
            {"name": "plant", "endpoint": "opc.tcp://127.0.0.1:1/", "policy": "None", "insecure": True, **server}
        ],
        "groups": [{"name": "g", "server": "plant", "period": "1 s",
                    "tags": [{"name": "e", "node": "ns=2;s=A", "index": 0}]}],
        "monitors": [{"name": "m", "group": "g", "methods": ["transition"], "windows": ["1 s"]}],
    }


def test_index_and_size_in_the_configuration() -> None:
    found = parse(yaml.safe_dump(plant()))
    assert found.groups[0].tags[0].index == 0 and found.servers[0].max_message_size == 64_000_000
    assert parse(yaml.safe_dump(plant(max_message_size="8 MB"))).servers[0].max_message_size == 8_000_000
    for wrong in ("10 kB", "3 GB", 5):
        with pytest.raises(ConfigError, match="max_message_size"):
            parse(yaml.safe_dump(plant(max_message_size=wrong)))
    bad = plant()
    bad["groups"][0]["tags"][0]["index"] = -1
    with pytest.raises(ConfigError, match="index"):
        parse(yaml.safe_dump(bad))
