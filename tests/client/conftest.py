"""Real servers for the client: the simulated plant in its own process, and one with nodes of odd types."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from asyncua import Client, Server, ua
from asyncua.server.user_managers import UserManager

from opcua_detector.api import Frame
from opcua_detector.client import LinkState, Session
from opcua_detector.config import GroupConfig, ServerConfig, TagConfig
from sim_server.testing import RunningPlant, running_plant

PLANT = "nsu=urn:opcua-detector:simulated-plant;s="
RESULTS = "nsu=urn:opcua-detector:results;s=lorenz."
USER, PASSWORD = "engineer", "correct-horse"
HISTORY_ROWS = 20_000
WAIT_S = 30.0


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlant]:
    """Lorenz with history, which refuses writes that carry timestamps."""
    pki = tmp_path_factory.mktemp("plant-pki")
    with running_plant(
        "lorenz",
        history_rows=HISTORY_ROWS,
        user=f"{USER}:{PASSWORD}",
        pki=pki,
        config={"history_page_rows": 3000, "refuse_write_timestamps": True},
    ) as running:
        yield running


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of this client's certificate, shared so that the key is made once."""
    return tmp_path_factory.mktemp("pki")


def server_config(endpoint: str, **changes: Any) -> ServerConfig:
    settings: dict[str, Any] = {"name": "plant", "endpoint": endpoint, "policy": "None", "insecure": True}
    return ServerConfig(**(settings | changes))


def group_config(*names: str, **changes: Any) -> GroupConfig:
    settings: dict[str, Any] = {"name": "g", "server": "plant", "period": "10 ms"}
    tags = tuple(TagConfig(name=name, node=f"{PLANT}lorenz.{name}") for name in names)
    return GroupConfig(**(settings | {"tags": tags} | changes))


@pytest_asyncio.fixture
async def session(plant: RunningPlant) -> AsyncIterator[Session]:
    """An open session to the plant."""
    one = Session(server_config(plant.endpoint))
    await one.open()
    yield one
    await one.close()
    assert one.state is LinkState.CLOSED


@pytest_asyncio.fixture
async def other(plant: RunningPlant) -> AsyncIterator[Client]:
    """A second client, asyncua's own."""
    async with Client(plant.endpoint) as client:
        yield client


class Rows:
    """Collects frames and lets a test wait for some."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool, np.ndarray, np.ndarray]] = []
        self._waiting: list[tuple[Callable[[Rows], bool], asyncio.Event]] = []

    def take(self, frame: Frame) -> None:
        self.rows.append((frame.source_ns, frame.gap, frame.values.copy(), frame.valid.copy()))
        for wanted, event in self._waiting:
            if wanted(self):
                event.set()

    async def until(self, wanted: Callable[[Rows], bool]) -> None:
        event = asyncio.Event()
        self._waiting.append((wanted, event))
        if wanted(self):
            event.set()
        await asyncio.wait_for(event.wait(), WAIT_S)

    async def more(self, n: int) -> None:
        target = len(self.rows) + n
        await self.until(lambda rows: len(rows.rows) >= target)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition on the running loop."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


class Values:
    """What a second client sees of nodes, as a queue of (node text, value)."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, Any, Any]] = asyncio.Queue()

    def datachange_notification(self, node: Any, value: Any, notification: Any) -> None:
        self.queue.put_nowait((node.nodeid.Identifier, value, notification.monitored_item.Value))

    async def until(self, wanted: Callable[[str, Any], bool]) -> tuple[str, Any, Any]:
        async def first() -> tuple[str, Any, Any]:
            while True:
                found = await self.queue.get()
                if wanted(found[0], found[1]):
                    return found

        return await asyncio.wait_for(first(), WAIT_S)


async def watch(client: Client, *names: str) -> Values:
    """Subscribe result nodes by a second client."""
    seen = Values()
    index = await client.get_namespace_index("urn:opcua-detector:results")
    subscription = await client.create_subscription(10, seen)
    await subscription.subscribe_data_change(
        [client.get_node(f"ns={index};s=lorenz.{name}") for name in names]
    )
    return seen


async def call(client: Client, method: str, *arguments: Any) -> None:
    """Call a method of the simulated plant."""
    index = await client.get_namespace_index("urn:opcua-detector:simulated-plant")
    parent = client.get_node(f"ns={index};s=lorenz")
    await parent.call_method(f"{index}:{method}", *arguments)


class NoAnonymous(UserManager):
    """Lets nobody in without a user name."""

    def get_user(
        self, iserver: Any, username: Any = None, password: Any = None, certificate: Any = None
    ) -> None:
        return None


class OddServer:
    """A real server with nodes of many types; what is written can be read from it directly."""

    def __init__(self, cache: Path, *, anonymous: bool = True) -> None:
        self.server = Server(user_manager=None if anonymous else NoAnonymous())
        self._cache = cache  # the standard address space takes seconds to build, once
        self.nodes: dict[str, Any] = {}
        self.endpoint = ""
        self.uri = "urn:odd"

    async def start(self, *namespaces: str) -> None:
        """Start with these namespaces registered before its own."""
        logging.getLogger("asyncua").setLevel(logging.CRITICAL)
        server = self.server
        await server.init(shelf_file=self._cache)
        self._cache.with_suffix(".db").touch()  # by this the library sees that the cache is there
        server.set_endpoint("opc.tcp://127.0.0.1:0/")
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        for uri in namespaces:
            await server.register_namespace(uri)
        index = await server.register_namespace(self.uri)
        for name, value, kind in (
            ("Float", 0.0, ua.VariantType.Float),
            ("Double", 0.0, ua.VariantType.Double),
            ("Int16", 0, ua.VariantType.Int16),
            ("Byte", 0, ua.VariantType.Byte),
            ("UInt32", 0, ua.VariantType.UInt32),
            ("Boolean", False, ua.VariantType.Boolean),
            ("String", "", ua.VariantType.String),
            ("Text", ua.LocalizedText(""), ua.VariantType.LocalizedText),
            ("ReadOnly", 0.0, ua.VariantType.Double),
            ("Array", [0.0, 0.0], ua.VariantType.Double),
            ("Outside", 7.0, ua.VariantType.Double),
        ):
            node = await server.nodes.objects.add_variable(
                ua.NodeId(name, index), f"{index}:{name}", value, kind
            )
            if name != "ReadOnly":
                await node.set_writable()
            self.nodes[name] = node
        await server.start()
        self.endpoint = f"opc.tcp://127.0.0.1:{server.bserver.port}/"

    def text(self, name: str) -> str:
        return f"nsu={self.uri};s={name}"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the standard address space is kept between servers."""
    return tmp_path_factory.mktemp("cache") / "address-space"


@pytest_asyncio.fixture
async def odd(cache: Path) -> AsyncIterator[OddServer]:
    one = OddServer(cache)
    await one.start()
    yield one
    await one.server.stop()


@pytest_asyncio.fixture
async def link(odd: OddServer) -> AsyncIterator[Session]:
    """An open session to the server of odd types."""
    one = Session(server_config(odd.endpoint))
    await one.open()
    yield one
    await one.close()
