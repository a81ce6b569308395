"""Every fault on the second vendor, and those that take minutes on both; run by `make test-plant`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running import RESULTS

from opcua_detector.client import subscription
from opcua_detector.client.observer import Observer
from opcua_detector.nodes import State

from . import faults as f
from .faults import OUTAGE, Fault, hold, survives
from .proxy import TO_CLIENT
from .rig import rigged, until
from .test_faults_quick import FAULTS
from .vendors import SecondVendor, Simulator, Vendor, second_vendor

pytestmark = [pytest.mark.plant, pytest.mark.timeout(300)]

SLOW = [
    Fault("killed and restarted", f.killed_and_restarted, OUTAGE),
    Fault("restarted with other namespaces", f.restarted_with_other_namespaces, OUTAGE),
    Fault("stopped 10 s", f.stopped_10_s, OUTAGE),
    Fault("server stutters, own loop busy", f.stutters, still=("lost", "reconnects", "gaps", "held", "replaced")),
    Fault("blackholed 10 s", f.blackholed_10_s, OUTAGE),
    Fault("slow network", f.slow_network, ("write_superseded",), lost="results that a newer one overtook"),
    Fault("GoodOverload for 30 s", f.overload_30_s, ("overload",), still=("lost", "reconnects", "gaps"),
          seen="counter `overload`"),
]


@pytest.fixture(params=["own_plant", "own_node"], ids=["asyncua", "node-opcua"])
def vendor(request: pytest.FixtureRequest) -> Vendor:
    """A server of its own for each test."""
    found: Vendor = request.getfixturevalue(request.param)
    return found


@survives(SLOW)
async def test_slow_fault_is_survived(fault: Fault, vendor: Vendor, folder: Path) -> None:
    await hold(fault, vendor, folder)
    if isinstance(vendor, Simulator):
        await vendor.let_go()


@survives(FAULTS)
async def test_fault_is_survived_on_the_second_vendor(
    fault: Fault, node: SecondVendor, folder: Path, quick: None
) -> None:
    await hold(fault, node, folder)


# --- limits that only the second vendor enforces ---

LIMITS = {"maxNodesPerRead": 6, "maxNodesPerWrite": 5, "maxMonitoredItemsPerCall": 1,
          "maxNodesPerTranslateBrowsePathsToNodeIds": 1}


@pytest.mark.parametrize("hidden", [False, True], ids=["told", "not told"])
async def test_too_many_operations_are_split(own_node: SecondVendor, folder: Path, hidden: bool, quick: None) -> None:
    """Where the server tells its limits, and where it says that it has none and answers BadTooManyOperations."""
    await own_node.do("limits", limits=LIMITS, hidden=hidden)
    async with rigged(own_node, folder, group={"sampling": "0 ms"}) as rig:
        back = rig.run.back
        assert back is not None
        await until(lambda: not any(back.states().values()), "every output to be written")
        await rig.strike_begins()
        async with Observer(f"opc.tcp://127.0.0.1:{own_node.port}/") as observer:
            nodes = {name: f"{RESULTS}lorenz.{name}" for name in ("Score", "State", "LastUpdateText")}
            first = await observer.read(nodes)
            await until(lambda: changed(observer, nodes, first["LastUpdateText"]), "results on the server")
        await rig.survived(per_row=1.0 + len(back.outputs) / LIMITS["maxNodesPerWrite"])


async def changed(observer: Observer, nodes: dict[str, str], before: str) -> bool:
    """Whether the server shows another row, in state normal."""
    now = await observer.read(nodes)
    return bool(now["LastUpdateText"] != before and now["State"] == State.NORMAL)


async def test_a_limit_of_items_that_is_told_makes_more_subscriptions(
    own_node: SecondVendor, folder: Path, quick: None
) -> None:
    await own_node.do("max_items", n=1)
    # What two subscriptions tell of one row comes in two notifications.
    async with rigged(own_node, folder, group={"sampling": "0 ms", "lateness": "300 ms"}) as rig:
        await rig.strike_begins()
        await own_node.disturb("delete_subscriptions")
        await until(lambda: rig.grown("rebuilt") + rig.grown("reconnects") > 0, "new subscriptions")
        await rig.survived(per_row=3.0)  # two subscriptions, two publish requests
        assert (await own_node.do("stats"))["items"] == [1, 1]


async def test_an_item_beyond_the_servers_limit_is_polled_and_monitored_when_there_is_room(
    own_node: SecondVendor, folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "_ROOM_FIRST_S", 1.0)
    await own_node.do("max_items", n=1, hidden=True)
    async with rigged(own_node, folder, scores=False, group={"sampling": "0 ms"}) as rig:
        (one,) = rig.feed.subscriptions.values()
        x1, x3 = one.items
        await until(lambda: "TooManyMonitoredItems" in x3.polled, "the second tag to find no room")
        assert x1.polled == "" and rig.feed.tag_states() == {"x1": "", "x3": ""}
        await until(lambda: rig.feed.frame.valid.all(), "rows of both tags")
        await rig.strike_begins()
        await own_node.do("max_items", n=100)
        await until(lambda: x3.polled == "", "the second tag to be monitored")
        await rig.scoring()
        rig.not_busy(per_row=3.0)  # a poll beside publish request and write
        assert (await own_node.do("stats"))["items"] == [2]


async def test_a_queue_that_runs_over_is_counted_and_a_gap(folder: Path, tmp_path: Path, quick: None) -> None:
    """A server that grants a short queue; while the answers are held up it throws values away and says so."""
    with second_vendor(tmp_path, queue=10) as server:
        async with rigged(server, folder, group={"sampling": "0 ms"}) as rig:
            await rig.strike_begins()
            rig.proxy.stall(TO_CLIENT)
            await asyncio.sleep(0.8)
            rig.proxy.heal()
            await until(lambda: rig.grown("overflowed") > 0, "the overflow to be told")
            assert rig.counters()["lost"] > rig.feed_before["lost"]
            await rig.scoring()
            rig.not_busy()
            await rig.nothing_left()


# --- certificates of another maker ---


@pytest.mark.parametrize("policy", ["Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss"])
async def test_a_secure_connection_to_the_second_vendor_survives_a_cut(
    folder: Path, tmp_path: Path, policy: str, quick: None
) -> None:
    with second_vendor(tmp_path, pki=str(tmp_path / "server-pki")) as server:
        secure = {"policy": policy, "mode": "SignAndEncrypt", "insecure": True, "pki": str(tmp_path / "pki")}
        async with rigged(server, folder, group={"sampling": "0 ms"}, server=secure) as rig:
            await rig.strike_begins()
            rig.proxy.reset_in_message(100, TO_CLIENT)
            await rig.reconnected()
            await rig.survived()
